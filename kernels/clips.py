"""Videos: what is known of each shot of the embedded film."""

import io
from typing import NamedTuple

import torch
from PIL import Image
from torchvision.transforms import functional as TF

from kernels.collectives import fail
from kernels.readers import DATA, arrays_of

# -------- The embedded film -----------------------------------------------------------------------

BUNNY = DATA / "bunny.npz"
FRAME_TIME = 83  # milliseconds from frame to frame as the WebP files count them: 1/12 s, rounded


class Shots(NamedTuple):
    """Shots of a split of the embedded set `bunny`, the film Big Buck Bunny: 12 frames per second.
    The splits have no scene in common: a scene, between whose set-ups the film cuts back and forth,
    is one block, and a block is in one split."""

    frames: list  # N tensors (T, 3, 54, 96) uint8, RGB
    sound: list  # N tensors (S, 48) uint8: log-mel spectrograms, 50 rows per second
    labels: torch.Tensor  # (N,) int64: who is seen, a row of `names`
    butterfly: torch.Tensor  # (N,) bool: one is seen
    numbers: torch.Tensor  # (N,) int64: which shot of the film, 0 to 129
    blocks: torch.Tensor  # (N,) int64: which block of consecutive shots
    names: tuple  # 4 texts: rabbit, rodents, neither, mixed


def load_bunny(split, path=BUNNY):
    """The Shots of a split, "train" or "test". The sound of frame t is around row 50 t / 12."""
    arrays = arrays_of(split, path)
    files = split_at(arrays["webp"], arrays["ends"])
    frames = [decode_animation(file.tobytes()) for file in files]
    counts = [last - first + 1 for first, last in arrays["frames"].tolist()]
    if [len(x) for x in frames] != counts:
        fail(f"{path}: this version of Pillow reads another number of frames than was written")
    sound = torch.from_numpy(arrays["sound"])
    return Shots(
        frames=frames,
        sound=split_at(sound, arrays["sound_ends"]),
        labels=torch.from_numpy(arrays["labels"]).long(),
        butterfly=torch.from_numpy(arrays["butterfly"]),
        numbers=torch.from_numpy(arrays["numbers"]).long(),
        blocks=torch.from_numpy(arrays["blocks"]).long(),
        names=tuple(arrays["subjects"].tolist()),
    )


def split_at(rows, ends):
    """Parts of an array or tensor, which lie in it one after the other. ends: where each ends."""
    starts = [0, *ends.tolist()]
    return [rows[start:end] for start, end in zip(starts, starts[1:])]


def decode_animation(data):
    """An animated WebP file -> (T, 3, H, W) uint8. Equal frames in a row were stored once, with a
    longer duration; here they come back."""
    picture = Image.open(io.BytesIO(data))
    frames = []
    for number in range(picture.n_frames):
        picture.seek(number)
        frame = TF.pil_to_tensor(picture.convert("RGB"))
        frames += [frame] * round(picture.info["duration"] / FRAME_TIME)
    return torch.stack(frames)
