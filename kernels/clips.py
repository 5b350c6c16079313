"""Readers of videos: from stored frames to the clips that views are made of.

    VideosInMemory(frames, lengths)   all videos in memory, on the device of the training

A reader of videos answers the questions of kernels/readers.py. A view that begins with a ClipCrop
is given clips (n, T, 3, size, size), one that begins with a Crop single frames (n, 3, size, size):
so a method for images can learn from videos, too. Of each video one clip is shown per epoch, from a
random moment on. All its frames are cut to the same box: if each had its own, the boxes would tell
the order of the frames.

load_film(name) reads an embedded set.
"""

import io
import itertools
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from kernels.collectives import fail
from kernels.movers import load_movers, render
from kernels.readers import DATA, BrokenFiles, InMemory, arrays_of
from kernels.views import MOMENT, ClipCrop, resized_crop


class VideosInMemory:
    """Reader of N videos in memory. frames: (F, 3, H, W) uint8 on the device of the training, all
    videos one after the other. lengths: (N,) int, frames of each. truth: what else is known of the
    videos, of `movers` and `tripod` the Clips of kernels/movers.py, else None."""

    NOUN = "videos"

    def __init__(self, frames, lengths, truth=None):
        self.frames = frames.contiguous()
        self.lengths = np.asarray(lengths)
        self.starts = self.lengths.cumsum() - self.lengths
        self.truth = truth
        self.broken = BrokenFiles()  # nothing in memory is ever broken

    def __len__(self):
        return len(self.lengths)

    def check(self, crops):
        """Exits with a one-line message if a video is shorter than a clip."""
        span = max(crop.span if isinstance(crop, ClipCrop) else 1 for crop in crops)
        short = int((self.lengths < span).sum())
        if short:
            fail(
                f"clips of {span} frames are asked for, and {short} of {len(self)} videos have "
                f"fewer, one has {self.lengths.min()}: choose fewer --frames, a smaller --stride, "
                "or other --data"
            )

    def batches(self, plan, crops, device, workers):
        """For each step of the plan: (n,) indices, and float clips or frames per view."""
        for step, (index, draws) in enumerate(plan, plan.first):
            views = []
            for view, (crop, u) in enumerate(zip(crops, draws)):
                moment = plan.random(plan.epoch, step, view, MOMENT).uniform().numpy()
                views.append(self.cut(index, crop, u, moment))
            yield torch.from_numpy(index).to(device), views

    def cut(self, index, crop, u, moment):
        """Videos `index` (n,), a ClipCrop or Crop, and its random numbers (n, 22) and (n,) ->
        (n, T, 3, size, size), or (n, 3, size, size)."""
        one_frame = not isinstance(crop, ClipCrop)
        clip = ClipCrop(crop, frames=1) if one_frame else crop
        places = self.starts[index][:, None] + clip.places(moment, self.lengths[index])  # (n, T)
        frames = self.frames[torch.from_numpy(places).to(self.frames.device)]  # (n, T, 3, H, W)

        # A clip is cut like an image of 3 T channels.
        boxes = clip.crop.boxes(u, *frames.shape[3:])
        x = resized_crop(frames.flatten(1, 2), boxes, clip.size)
        x = x.unflatten(1, (clip.frames, 3))
        return x[:, 0] if one_frame else x

    def part(self, indices):
        """A reader of some of the videos."""
        chosen = indices.tolist()
        places = [np.arange(self.starts[i], self.starts[i] + self.lengths[i]) for i in chosen]
        frames = self.frames[torch.from_numpy(np.concatenate(places)).to(self.frames.device)]
        truth = self.truth and self.truth.part(indices.to(self.frames.device))
        return VideosInMemory(frames, self.lengths[chosen], truth)

    def count_together(self):
        """See Files."""

    def middle(self):
        """The middle frame of each video, as a reader of images."""
        places = torch.from_numpy(self.starts + self.lengths // 2)
        return InMemory(self.frames[places.to(self.frames.device)])

    def whole(self, indices, size, workers=0):
        """As InMemory.whole: of each video its middle frame."""
        yield from self.middle().whole(indices, size, workers)


# The embedded data sets of videos; tripod is movers, filmed by a camera that stands still.
FILMS = ("movers", "tripod", "bunny")
CLIPS = {"train": 4000, "test": 1000}  # that are rendered, in about 20 seconds of one core


def load_film(name, device):
    """An embedded data set of videos: [(reader, labels (N,)), ...] of training and test."""
    return [read_film(name, split, device) for split in ("train", "test")]


def read_film(name, split, device):
    if name == "bunny":
        return pieces(load_bunny(split), device)
    return rendered(split, CLIPS[split], device, tripod=name == "tripod")


def rendered(split, count, device, tripod=False):
    """The first `count` clips of a split of `movers` or `tripod`: a reader, and the category of
    each emoji."""
    clips = render(load_movers(split, device), range(count), tripod=tripod)
    lengths = [clips.frames.shape[1]] * count
    reader = VideosInMemory(clips.frames.flatten(0, 1), lengths, clips)
    return reader, clips.category[:, 0]


def pieces(shots, device, seconds=1.5):
    """The shots of a film that last a second or more, cut into pieces of about so many seconds: a
    reader, and who is seen."""
    long = [len(frames) >= 12 for frames in shots.frames]
    kept = list(itertools.compress(shots.frames, long))
    lengths = []
    labels = []
    for frames, label in zip(kept, itertools.compress(shots.labels.tolist(), long)):
        count = max(1, round(len(frames) / (12 * seconds)))
        ends = [len(frames) * (i + 1) // count for i in range(count)]
        lengths += np.diff([0, *ends]).tolist()
        labels += [label] * count
    frames = torch.cat(kept).to(device)
    return VideosInMemory(frames, lengths), torch.tensor(labels, device=device)


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
