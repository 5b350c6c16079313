"""Readers: from stored images to the uint8 batches that views are made of.

A split of a data set has one reader, of one of two kinds:

    InMemory(pixels)   all images as one tensor on the device of the training
    Files(paths)       image files, decoded and cropped by worker processes

Both answer the same questions: reader.NOUN, what it reads; len(reader), how many of it;
reader.check(crops), whether it can be shown so; reader.batches(plan, crops, device, workers), the
crops of each step of a training; and reader.whole(indices, size, workers), whole images for an
evaluation. Another kind of data needs another reader with these, and no change elsewhere.

The plan (kernels/views.py) decides which images a step shows and which box of each, so the number
of workers changes nothing. A file that cannot be read is replaced by the next one, named once, and
counted.

load_solids(split) and load_photos(split), at the end of this file, read the embedded sets that have
more than one label per image, or images of several sizes.
"""

import io
import math
import os
import shutil
import signal
import stat
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as TF

from kernels.collectives import fail, warn, world
from kernels.views import BICUBIC, ClipCrop, crop_images

MAX_PIXELS = 250_000_000  # a file with more is read with a warning, with twice as many not at all
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
SOLIDS = DATA / "solids.npz"
PHOTOS = DATA / "photos.npz"
FOCAL = 24 / 0.45  # of the camera of `solids`, in pixels of its 48 x 48 images
PATIENCE = 120  # seconds, and one per image, without a batch from the workers: then a run ends


class InMemory:
    """Reader of images in memory. pixels: (N, 3, H, W) uint8, on the device of the training."""

    NOUN = "images"  # what it reads

    def __init__(self, pixels):
        self.pixels = pixels
        self.broken = BrokenFiles()  # nothing in memory is ever broken

    def __len__(self):
        return len(self.pixels)

    def check(self, crops):
        refuse_clips(crops)

    def batches(self, plan, crops, device, workers):
        """For each step of the plan: (n,) indices, and float crops (n, 3, size, size) per view."""
        for index, draws in plan:
            index = torch.from_numpy(index).to(device)
            yield index, crop_images(self.pixels[index], crops, draws)

    def part(self, indices):
        """A reader of some of the images."""
        return InMemory(self.pixels[indices.to(self.pixels.device)])

    def count_together(self):
        """See Files."""

    def whole(self, indices, size, workers=0):
        """uint8 batches (b, 3, H, W) of whole images, each with its list of broken indices."""
        for index in indices.split(256):
            yield self.pixels[index.to(self.pixels.device)], []


class Files:
    """Reader of image files, which worker processes decode and crop. paths: a list of N files.
    broken: a BrokenFiles, shared by the splits of a data set."""

    NOUN = "images"

    def __init__(self, paths, broken=None):
        self.paths = paths
        self.broken = BrokenFiles(len(paths)) if broken is None else broken
        self.stream = None  # the DataLoader of the training, whose workers live as long as the run

    def __len__(self):
        return len(self.paths)

    def part(self, indices):
        return type(self)([self.paths[i] for i in indices.tolist()], self.broken)

    def check(self, crops):
        refuse_clips(crops)

    def keys(self, plan):
        return Keys(plan)

    def decoder(self, crops=None, size=None):
        return Decoder(self.paths, crops, size)

    def batches(self, plan, crops, device, workers):
        """As InMemory.batches. The index is that of the file which was read for a broken one."""
        if self.stream is None or self.stream.batch_sampler.plan is not plan:
            share = plan.rows.stop - plan.rows.start
            numbers = share * sum(math.prod(shape_of(crop)) for crop in crops)
            self.stream = decoding(
                self.decoder(crops=crops),
                workers,
                share,
                numbers,
                batch_sampler=self.keys(plan),
                persistent_workers=min(workers, CORES) > 0,
                pin_memory=device.type == "cuda",
            )
        for index, views, broken in decoded(self.stream):
            self.broken.add(broken)
            views = [x.to(device, non_blocking=True).float().div_(255) for x in views]
            yield index.to(device, non_blocking=True), views

    def whole(self, indices, size, workers=0):
        """As InMemory.whole: the shorter side becomes 256/224 of `size`, as ImageNet models are
        evaluated, then the centre is cut out. A broken file gives a black image."""
        batch = 256 if size <= 64 else 64
        options = {"batch_size": batch, "sampler": indices.tolist()}
        batches = decoding(self.decoder(size=size), workers, batch, batch * 3 * size**2, **options)
        for _, (images,), broken in decoded(batches):
            self.broken.add(broken)
            yield images, [index for index, _, _ in broken]

    def count_together(self):
        """Broken files that another process has met count, too. Every process must call it."""
        if world() > 1:
            everyone = [None] * world()
            dist.all_gather_object(everyone, self.broken.met)
            self.broken.met.update(*everyone)
            self.broken.add([])


def shape_of(crop):
    """The shape of a view of one image or video."""
    frame = (3, crop.size, crop.size)
    return (crop.frames, *frame) if isinstance(crop, ClipCrop) else frame


def refuse_clips(crops):
    """Exits with a one-line message if a method that learns from videos is given images."""
    if any(isinstance(crop, ClipCrop) for crop in crops):
        fail(
            "this method learns from videos, and --data are images: choose movers, tripod, bunny, "
            "or a folder of videos"
        )


class BrokenFiles:
    """The files of a data set that could not be read. total: of all images. met: their paths."""

    def __init__(self, total=0):
        self.total = total
        self.met = set()

    def add(self, found):
        """Warns of each file once. Ends the run if ten or more files, and more than 1 in 100 of the
        whole data set, are broken, or all of them. found: [(index, path, reason), ...]."""
        for _, path, reason in found:
            if path not in self.met:
                self.met.add(path)
                warn(f"warning: left out, cannot be used: {path} ({reason})")
        count = len(self.met)
        if count > max(9, self.total / 100) or 0 < self.total == count:
            fail(
                f"{count} of {self.total} files cannot be used, more than 1 in 100: remove them, "
                f"for example {min(self.met)}",
                only_first=False,
            )


def decoding(decoder, workers, images, numbers, **options):
    """A DataLoader; a batch has `images` images and `numbers` bytes. Exits with a one-line message
    where the workers would wait for ever: batches travel through /dev/shm, of which a container may
    have 64 MB."""
    workers = min(workers, CORES)
    together = workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # all that share this memory
    needed = 3 * together * numbers  # two batches ahead for each worker, and one in hand
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    if free < needed:
        fail(
            f"/dev/shm has {free / 1e6:.0f} MB, {together} workers need {needed / 1e6:.0f} MB: "
            "start the container with --shm-size 8g (or --ipc=host), or use a smaller --batch, or "
            "--workers 0",
            only_first=False,
        )
    return DataLoader(
        decoder,
        collate_fn=collate,
        num_workers=workers,
        timeout=PATIENCE + images if workers else 0,
        worker_init_fn=ignore_ctrl_c,
        **options,
    )


def decoded(batches):
    """The batches of a DataLoader. A worker that died or is silent ends the run."""
    try:
        yield from batches
    except RuntimeError as error:
        fail(
            f"the processes that decode images have failed ({str(error).splitlines()[0]}): too "
            "little memory? Try fewer --workers, or --workers 0",
            only_first=False,
        )


def ignore_ctrl_c(worker):
    """Ctrl-C reaches all processes; the main one says what there is to say and ends the others. The
    thread of a worker that hands over batches then loses its connection, which nobody must know;
    what goes wrong with a file is said by the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *error: None


class Keys:
    """A plan as the batch sampler of a DataLoader: (index, a row of crop numbers per view)."""

    def __init__(self, plan):
        self.plan = plan

    def __iter__(self):
        for index, draws in self.plan:
            yield list(zip(index.tolist(), zip(*draws)))


class Decoder(Dataset):
    """Image files as uint8 tensors, in a worker process. To train, crops are given: a key is
    (index, a row of crop numbers per view). To evaluate, a size: a key is an index."""

    def __init__(self, paths, crops=None, size=None):
        self.paths = paths
        self.crops = crops
        self.size = size

    def __getitem__(self, key):
        """-> the index that was read, views [(3, size, size), ...], and of broken files
        [(index, path, reason), ...]."""
        first, draws = key if self.crops else (key, None)

        # In training a broken file gives way to the next one, in evaluation to a black image.
        broken = []
        for place in range(first, first + (100 if self.crops else 1)):
            index = place % len(self.paths)
            path = self.paths[index]
            picture, reason = try_picture(path)
            if picture:
                break
            broken.append((index, path, reason))
        picture = picture or Image.new("RGB", (256, 256))

        if self.crops:
            views = [crop.cut(picture, u) for crop, u in zip(self.crops, draws)]
        else:
            picture = TF.resize(picture, round(self.size * 256 / 224), BICUBIC)
            views = [TF.center_crop(picture, self.size)]
        return index, [TF.pil_to_tensor(view) for view in views], broken


def collate(samples):
    """Samples of a Decoder -> indices (n,), one uint8 batch per view, and all broken indices."""
    indices, views, broken = zip(*samples)
    views = [torch.stack(view) for view in zip(*views)]
    return torch.tensor(indices), views, [index for part in broken for index in part]


def try_picture(path):
    """(picture, None), or (None, why the file cannot be read): PIL raises nearly anything."""
    try:
        return load_picture(path), None
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).replace(f" {path!r}", "")
        reason = reason or type(error).__name__
        if isinstance(error, Image.DecompressionBombError):
            reason += "; MAX_PIXELS in kernels/readers.py sets this limit"
        return None, reason


def load_picture(path):
    """An image file -> PIL RGB, upright. Grey, palette, CMYK and 16-bit images are converted,
    transparency is laid on white. Raises what PIL raises."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
        raise OSError("not a regular file")
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith(("I", "F")):  # 16-bit grey, which PIL's convert clips, not scales
        grey = np.asarray(picture, np.float32) / 257
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


class Photos(NamedTuple):
    """Photographs of a split of the embedded set `photos`."""

    images: list  # n tensors (3, H, W) uint8, RGB; the shorter side has 128 pixels
    labels: torch.Tensor  # (n,) int64: kind, a row of `kinds`
    names: list  # n texts
    kinds: tuple  # 6 texts


def load_photos(split, path=PHOTOS):
    """The Photos of a split, "train" or "test"."""
    arrays = arrays_of(split, path)
    labels = torch.from_numpy(arrays["labels"]).long()
    kinds = tuple(arrays["kinds"].tolist())
    return Photos(decode_webp(arrays), labels, arrays["names"].tolist(), kinds)


class Scenes(NamedTuple):
    """Rendered scenes of a split of the embedded set `solids`: N images of 2 to 4 objects of 8
    shapes on a floor. How a scene is made, and its coordinates: tests/data/scenes.py.

    Labels are those of the surface at the centre (j + 0.5, i + 0.5) of pixel (i, j), which covers
    [j, j + 1) x [i, i + 1). Camera coordinates: x right, y down, z forward; the point (X, Y, Z) is
    seen at x = 24 + FOCAL X / Z, y = 24 + FOCAL Y / Z. Sky has depth 0 and normal 0: not valid.
    """

    images: torch.Tensor  # (N, 3, 48, 48) uint8, RGB
    instances: torch.Tensor  # (N, 48, 48) uint8: 0 background (floor, sky), j + 1 object j
    classes: torch.Tensor  # (N, 48, 48) uint8: 0 background, else the object's label
    depth: torch.Tensor  # (N, 48, 48) float32: z in scene units, multiples of 1/256
    normals: torch.Tensor  # (N, 3, 48, 48) float32 in camera coordinates, exact to 0.4 degrees
    boxes: list  # N tensors (n, 4) float32: x0, y0, x1, y1 of the visible part, half-open
    labels: list  # N tensors (n,) int64: 1 to 8, a row of `names`
    areas: list  # N tensors (n,) int64: visible pixels
    whole: list  # N tensors (n,) int64: pixels in the image if nothing stood before the object
    keypoints: torch.Tensor  # (N, 4, 9, 3) float32: x, y in pixels; 1 visible, 0 not, -1 no point
    names: tuple  # 9 texts: "background" and the shapes

    def visible_points(self):
        """Yields for each object that has some: scene, its number in it, box (4,), visible points
        (n, 2). The centre is left out: the box gives it away."""
        for scene, boxes in enumerate(self.boxes):
            for number, box in enumerate(boxes):
                points = self.keypoints[scene, number, 1:]  # (8, 3): x, y, state
                points = points[points[:, 2] == 1, :2]
                if len(points):
                    yield scene, number, box, points


def load_solids(split, path=SOLIDS):
    """The Scenes of a split, "train" or "test". Row 0 of an object's keypoints is its centre; rows
    1 to 8 are its corners or tips, in an order without meaning."""
    arrays = arrays_of(split, path)
    tensors = {name: torch.from_numpy(arrays[name]) for name in ARRAYS_OF_SOLIDS}
    labels = tensors["labels"].long()  # (N, 4), 0: no object
    instances = tensors["instances"]
    numbers = torch.nn.functional.pad(labels, (1, 0))  # (N, 5), by the value of an instance
    classes = numbers.gather(1, instances.flatten(1).long()).view_as(instances).byte()

    # Stored as 127 n, rounded.
    normals = tensors["normals"].permute(0, 3, 1, 2).float()
    normals = torch.nn.functional.normalize(normals, dim=1)

    places = tensors["keypoints"].float() / 256  # pixels
    keypoints = torch.cat([places, tensors["states"].float()[..., None]], -1)

    def of_objects(values):
        return [rows[present] for rows, present in zip(values, labels > 0)]

    areas = tensors["areas"].long()  # (N, 4, 2)
    return Scenes(
        images=torch.stack(decode_webp(arrays)),
        instances=instances,
        classes=classes,
        depth=tensors["depth"].float() / 256,
        normals=normals.contiguous(),
        boxes=of_objects(tensors["boxes"].float()),
        labels=of_objects(labels),
        areas=of_objects(areas[..., 0]),
        whole=of_objects(areas[..., 1]),
        keypoints=keypoints,
        names=("background", *arrays["shapes"].tolist()),
    )


ARRAYS_OF_SOLIDS = ["instances", "depth", "normals", "labels", "boxes", "areas"]
ARRAYS_OF_SOLIDS += ["keypoints", "states"]


def arrays_of(split, path):
    """{name: array} of an embedded set: those of one split without its prefix, and those that both
    splits share."""
    if split not in ("train", "test"):
        fail(f"{split!r} is not a split: train or test")
    if not os.path.isfile(path):
        fail(f"{path} is missing: it belongs to the project, see tests/data/README.md")
    with np.load(path) as file:
        other = {"train": "test_", "test": "train_"}[split]
        names = [name for name in file if not name.startswith(other)]
        return {name.removeprefix(f"{split}_"): file[name] for name in names}


def decode_webp(arrays, mode="RGB"):
    """Images (channels, H, W) uint8 from their concatenated files; ends: where each of them ends.
    mode: of Pillow."""
    data = arrays["webp"].tobytes()
    start = 0
    images = []
    for end in arrays["ends"].tolist():
        picture = Image.open(io.BytesIO(data[start:end])).convert(mode)
        images.append(TF.pil_to_tensor(picture).contiguous())
        start = end
    return images
