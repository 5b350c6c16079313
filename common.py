"""What all methods share, because results could not be compared if it differed.

  1 data        load_data(name, root, device)        -> Data: training, bank and test images, labels
  2 views       Crop, Loader, make_views             -> batches of random views
                random_flip, color_jitter, random_grayscale, gaussian_blur, solarize, normalize
  3 networks    backbone(arch, size), load_backbone  -> ResNet or ViT without its classifier
  4 evaluation  evaluate(network, data, size, ...)   -> kNN, linear probe, retrieval, collapse panel
  5 processes   join_processes, gather, all_reduce_sum, distribute
  6 runs        parse: flags from a table of settings;
                Run: resume, metrics, checkpoints, pictures, the table at the end

Randomness. Every random number of a run comes from numpy's SeedSequence([seed, epoch, step, view,
stream]). It is drawn for the whole GLOBAL batch, and each process keeps the rows of its own images.
The order of the images, the views and the training therefore do not depend on the number of
processes or workers, and a killed run resumes exactly.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  before anything that an older Python cannot import
    sys.exit(f"error: this project needs Python 3.11 or newer, not {sys.version.split()[0]}")

import argparse
import atexit
import copy
import datetime
import difflib
import importlib
import json
import math
import os
import platform
import shutil
import signal
import stat
import subprocess
import threading
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms import functional as TF
from tqdm import tqdm

try:
    import fcntl  # locks of files
except ImportError:  # Windows
    fcntl = None

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # after all others: kernels and methods are found beside this file
from kernels.mae_mask import gather_tokens

EMBEDDED = ("emoji", "fashion")  # in tests/data: no download, ever
DOWNLOADED = {  # name here -> class in torchvision.datasets
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "stl10": "STL10",
}
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
OTHER_ENDINGS = (".tif", ".tiff", ".gif", ".bmp", ".avif", ".heic", ".jp2", ".ppm", ".jfif")
TEST_FOLDERS = ("val", "valid", "validation", "test")  # beside train/, the first that there is
MAX_PIXELS = 250_000_000  # a file with more is read with a warning, with twice as many not at all
BICUBIC = TF.InterpolationMode.BICUBIC
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's channels: the convention of most published networks
STD = (0.229, 0.224, 0.225)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SAVE_EVERY = 180  # seconds between checkpoints inside an epoch
PATIENCE = 120  # seconds, and one per image, without a batch from the workers: then a run ends
DIVERGED = "lower --lr or lengthen the warm-up, and choose another --out; the last good state is in"


def fail(message, only_first=True):
    """Exits with a one-line message on stderr and code 1. By default only process 0 prints it."""
    if os.environ.get("RANK", "0") == "0" or not only_first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(1)


# -------- 1. Data ---------------------------------------------------------------------------------


class Split(NamedTuple):
    """One half of a data set.

    images: a reader, InMemory or Files, of N images. labels: (N,) int64, or None.
    emoji, drawing: (N,) int64 or None: what is drawn, and by which artist, for retrieval.
    """

    images: object
    labels: torch.Tensor | None = None
    emoji: torch.Tensor | None = None
    drawing: torch.Tensor | None = None


class Data(NamedTuple):
    """train: what the method learns from; its labels are not used. bank: the labelled training
    images, for kNN and the probe (train itself, unless that holds unlabelled images too).
    test: held-out images; None where there are no labels."""

    name: str
    train: Split
    bank: Split
    test: Split | None


class InMemory:
    """Reader of images in memory. pixels: (N, 3, H, W) uint8, on the device of the training."""

    def __init__(self, pixels):
        self.pixels = pixels
        self.side = pixels.shape[3]
        self.broken = {}

    def __len__(self):
        return len(self.pixels)

    def batches(self, plan, crops, device, workers):
        """For each step of the plan: (n,) indices, and float crops (n, 3, size, size) per view."""
        for index, draws in plan:
            index = torch.from_numpy(index).to(device)
            yield index, crop_images(self.pixels[index], crops, draws)

    def part(self, indices):
        """A reader of some of the images."""
        return InMemory(self.pixels[indices.to(self.pixels.device)])

    def count_together(self):
        """See Files: nothing in memory is ever broken."""

    def whole(self, indices, size, workers=0):
        """uint8 batches (b, 3, H, W) of whole images, each with its list of broken indices."""
        for index in indices.split(256):
            yield self.pixels[index.to(self.pixels.device)], []


class Files:
    """Reader of image files, which worker processes decode and crop. paths: a list of N files.
    broken: a BrokenFiles, shared by the splits of a data set."""

    def __init__(self, paths, broken=None):
        self.paths = paths
        self.broken = BrokenFiles(len(paths)) if broken is None else broken
        self.side = math.inf  # it differs, and is not known before they are read
        self.stream = None  # the DataLoader of the training, whose workers live as long as the run

    def __len__(self):
        return len(self.paths)

    def part(self, indices):
        return Files([self.paths[i] for i in indices.tolist()], self.broken)

    def batches(self, plan, crops, device, workers):
        """As InMemory.batches. The index is that of the file which was read for a broken one."""
        if self.stream is None or self.stream.batch_sampler.plan is not plan:
            workers = min(workers, CORES)
            share = plan.rows.stop - plan.rows.start
            check_shared_memory(workers, share * sum(3 * crop.size**2 for crop in crops))
            self.stream = DataLoader(
                Decoder(self.paths, crops=crops),
                batch_sampler=Keys(plan),
                collate_fn=collate,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
                timeout=PATIENCE + share if workers else 0,
                worker_init_fn=ignore_ctrl_c,
            )
        for index, views, broken in decoded(self.stream):
            self.check(broken)
            views = [x.to(device, non_blocking=True).float().div_(255) for x in views]
            yield index.to(device, non_blocking=True), views

    def whole(self, indices, size, workers=0):
        """As InMemory.whole: the shorter side becomes 256/224 of `size`, as ImageNet models are
        evaluated, then the centre is cut out. A broken file gives a black image."""
        workers = min(workers, CORES)
        batch = 256 if size <= 64 else 64
        check_shared_memory(workers, batch * 3 * size**2)
        batches = DataLoader(
            Decoder(self.paths, size=size),
            batch_size=batch,
            sampler=indices.tolist(),
            num_workers=workers,
            collate_fn=collate,
            timeout=PATIENCE + batch if workers else 0,
            worker_init_fn=ignore_ctrl_c,
        )
        for _, (images,), broken in decoded(batches):
            self.check(broken)
            yield images, broken

    def check(self, broken):
        """Notes broken files, a list of (index, reason)."""
        self.broken.add({self.paths[index]: reason for index, reason in broken})

    def count_together(self):
        """Broken files that another process has met count, too. Every process must call it."""
        if world() > 1:
            everyone = [None] * world()
            dist.all_gather_object(everyone, dict(self.broken))
            for found in everyone:
                self.broken.add(found)


class BrokenFiles(dict):
    """{path: reason} of the files of a data set that could not be read. total: of all images."""

    def __init__(self, total=0):
        self.total = total

    def add(self, found):
        """Warns of each file once. Ends the run if ten or more files, and more than 1 in 100 of the
        whole data set, are broken, or all of them."""
        for path, reason in found.items():
            if path not in self:
                text = f"warning: left out, cannot be read: {path} ({reason})"
                print(text, file=sys.stderr, flush=True)
        self |= found
        if len(self) > max(9, self.total / 100) or 0 < self.total == len(self):
            fail(
                f"{len(self)} of {self.total} images cannot be read, more than 1 in 100: remove "
                f"them, for example {min(self)}",
                only_first=False,
            )


class Decoder(Dataset):
    """Image files as uint8 tensors, in a worker process. To train, crops are given: a key is
    (index, a row of crop numbers per view). To evaluate, a size: a key is an index."""

    def __init__(self, paths, crops=None, size=None):
        self.paths = paths
        self.crops = crops
        self.size = size

    def __getitem__(self, key):
        """-> the index that was read, views [(3, size, size), ...], and broken indices."""
        first, draws = key if self.crops else (key, None)

        # In training a broken file gives way to the next one, in evaluation to a black image.
        broken = []
        for place in range(first, first + (100 if self.crops else 1)):
            index = place % len(self.paths)
            picture, reason = try_picture(self.paths[index])
            if picture:
                break
            broken.append((index, reason))
        picture = picture or Image.new("RGB", (256, 256))

        if self.crops:
            views = [crop.cut(picture, u) for crop, u in zip(self.crops, draws)]
        else:
            picture = TF.resize(picture, round(self.size * 256 / 224), BICUBIC)
            views = [TF.center_crop(picture, self.size)]
        return index, [TF.pil_to_tensor(view) for view in views], broken


def check_shared_memory(workers, bytes_per_batch):
    """Exits with a one-line message where the workers would wait for ever: batches travel through
    /dev/shm, of which a container may have 64 MB."""
    workers *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of all processes on this machine
    needed = 3 * workers * bytes_per_batch  # two batches ahead for each worker, and one in hand
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    if free < needed:
        fail(
            f"/dev/shm has {free / 1e6:.0f} MB, {workers} workers need {needed / 1e6:.0f} MB: "
            "start the container with --shm-size 8g (or --ipc=host), or use a smaller --batch, or "
            "--workers 0",
            only_first=False,
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
    """Ctrl-C reaches all processes; the main one says what there is to say and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
            reason += "; MAX_PIXELS in common.py sets this limit"
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


def load_data(name, root, device):
    """An embedded data set (emoji, fashion), one that torchvision downloads into `root`
    (fashion-mnist, cifar10, cifar100, stl10), or a folder of images. Exits with a one-line message
    if it cannot be loaded."""
    if name in EMBEDDED:
        return embedded_data(name, device)
    if name in DOWNLOADED:
        return download_data(name, Path(root), device)
    if Path(name).is_dir():
        return folder_data(Path(name).resolve())
    known = [*EMBEDDED, *DOWNLOADED]
    if Path(name).is_file():
        fail(f"--data {name} is a file: give the folder of the images")
    near = difflib.get_close_matches(name.lower(), known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    fail(f"--data {name}: neither a data set ({', '.join(known)}) nor an existing folder{hint}")


def to_split(device, images, *numbers):
    """uint8 (N, H, W), (N, H, W, 3) or (N, 3, H, W), and arrays (N,) -> Split on the device.
    Grey images become three equal channels."""
    images = torch.as_tensor(np.asarray(images))
    if images.ndim == 3:
        images = images[:, None].expand(-1, 3, -1, -1)
    elif images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    numbers = [torch.as_tensor(np.asarray(a), dtype=torch.int64).to(device) for a in numbers]
    return Split(InMemory(images.contiguous().to(device)), *numbers)


def embedded_data(name, device):
    with np.load(HERE / "tests" / "data" / f"{name}.npz") as file:
        wanted = ("images", "labels", "emoji", "drawing")
        parts = [part for part in wanted if f"train_{part}" in file]
        train = to_split(device, *[file[f"train_{part}"] for part in parts])
        test = to_split(device, *[file[f"test_{part}"] for part in parts])
    return Data(name, train, train, test)


def download_data(name, root, device):
    dataset = getattr(torchvision.datasets, DOWNLOADED[name])

    def get(split):
        if name == "stl10":
            part = dataset(root, download=True, split=split)
            return to_split(device, part.data, part.labels)
        part = dataset(root, download=True, train=split == "train")
        return to_split(device, part.data, part.targets)

    # Process 0 downloads; the others wait, then read the same files.
    if rank() > 0:
        barrier()
    try:
        train = bank = get("train")
        test = get("test")
        if name == "stl10":  # learns from 5,000 labelled and 100,000 unlabelled images
            unlabelled = get("unlabeled").images.pixels
            train = Split(InMemory(torch.cat([bank.images.pixels, unlabelled])))
    except (OSError, RuntimeError) as error:
        fail(
            f"--data {name}: torchvision could not download it into {root.resolve()} "
            f"({str(error).splitlines()[0]}). Put the files of torchvision's {dataset.__name__} "
            f"there (--root names the folder), or use a data set that needs no download: "
            f"{', '.join(EMBEDDED)}"
        )
    if rank() == 0:
        barrier()
    return Data(name, train, bank, test)


def folder_data(path):
    """train/ and val/ (or valid/, validation/, test/) with class folders, as ImageNet has them; or
    class folders, of which one image in ten (at least one per class, by a hash of its name) is held
    out; or plain images at any depth, without labels. Hidden names, __MACOSX, run folders and other
    endings are left out. One printed line says what was found and what is not used."""
    unused = Counter()
    trains = [p for p in path.iterdir() if p.is_dir() and p.name.lower() == "train"]
    base = min(trains, default=path)
    train = files_by_class(base, unused)
    if trains and not image_files(base, Counter()):
        fail(f"--data {path}: no images found in {base.name}/{listed(unused)}")
    if len(train) < 2:
        return plain_folder(path)
    odd = [name for name in train if name.lower() in TEST_FOLDERS]
    if odd and not trains:
        fail(
            f"--data {path}: {odd[0]}/ looks like the test images, not like a class, but there is "
            "no train/ beside it: give the training images this name"
        )
    unused["images beside the class folders"] = sum(is_image(p.name) for p in base.iterdir())
    test = {}
    origin = "a tenth of the images, held out"
    if base != path:
        test, origin = find_test(path, base, unused)

    # One image in ten is held out. The hash does not change when other images come or go.
    if not test:
        for name, paths in train.items():
            first = len(os.path.join(path, ""))
            paths = sorted(paths, key=lambda p: zlib.crc32(os.fsencode(p[first:])))
            cut = max(1, len(paths) // 10)
            test[name] = sorted(paths[:cut])
            train[name] = sorted(paths[cut:])

    classes = sorted(train)
    unknown = sorted(set(test) - set(classes))
    if unknown:
        fail(f"--data {path}: {origin} has classes that train/ lacks: {', '.join(unknown[:5])}")
    broken = BrokenFiles()
    train = labelled(train, classes, broken)
    test = labelled(test, classes, broken)
    if not len(train.images):
        fail(f"--data {path}: one image per class leaves none for training; two are needed")
    some = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
    print0(
        f"{path}: {len(train.images)} training and {len(test.images)} test images of "
        f"{len(classes)} classes ({some}); test images: {origin}{listed(unused)}"
    )
    return Data(path.name, train, train, test)


def plain_folder(path):
    """All images of a folder, without labels."""
    unused = Counter()
    images = image_files(path, unused)
    if not images:
        fail(
            f"--data {path}: no images found{listed(unused)}. Expected class folders of "
            f"{', '.join(ENDINGS)} files, train/ and val/ with class folders, or plain images"
        )
    print0(
        f"{path}: {len(images)} images, fewer than two class folders, so no evaluation by "
        f"labels{listed(unused)}"
    )
    split = Split(Files(images))
    return Data(path.name, split, split, None)


def find_test(path, train, unused):
    """{class: test images} beside train/, and where they come from; {} if there are none."""
    found = {}
    flat = []
    ranks = {name: place for place, name in enumerate(TEST_FOLDERS)}

    def turn(folder):
        return ranks.get(folder.name.lower(), len(ranks)), folder.name

    for folder in sorted(path.iterdir(), key=turn):
        if folder == train or not folder.is_dir() or is_left_out(folder, unused):
            continue
        if folder.samefile(train):
            fail(f"--data {path}: {folder.name}/ and {train.name}/ are the same folder")
        ignored = Counter()
        classes = files_by_class(folder, ignored) if folder.name.lower() in ranks else {}
        if classes and not found:
            found = {folder.name: classes}
            unused += ignored
            continue
        images = len(image_files(folder, ignored))
        if images and folder.name.lower() in ranks:
            flat.append(folder.name)
        if images:
            unused[f"images in {folder.name}/"] += images
    if not found and flat:
        fail(
            f"--data {path}: the images in {flat[0]}/ have no class folders, so their labels are "
            "not known: move each into a folder with the name of its class, as in train/"
        )
    name = next(iter(found), None)
    return found.get(name, {}), f"{name}/" if name else "a tenth of the images, held out"


def listed(unused):
    """What is not used, and how much of it: "; not used: 40 .tif files"."""
    words = [f"{count} {what}" for what, count in unused.items() if count]
    return f"; not used: {', '.join(words)}" if words else ""


def is_image(name):
    return not name.startswith(".") and name.lower().endswith(ENDINGS)


def is_left_out(folder, unused):
    """Whether a folder is no part of a data set: hidden, of macOS's zip, or of a run."""
    name = os.path.basename(folder)
    run = os.path.exists(os.path.join(folder, "metrics.jsonl"))
    if name.startswith(".") or name == "__MACOSX" or run:
        unused["run folders" if run else "hidden folders"] += 1
        return True
    return False


def image_files(folder, unused):
    """All image files below a folder, sorted. Adds to unused what is left out."""
    found = []
    for place, folders, names in os.walk(folder, onerror=stop):
        links = [f for f in folders if os.path.islink(os.path.join(place, f))]
        unused["links to folders"] += len(links)
        folders[:] = [f for f in folders if not is_left_out(os.path.join(place, f), unused)]
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                unused["hidden files"] += 1
            elif ending in ENDINGS:
                found.append(os.path.join(place, name))
            elif ending in OTHER_ENDINGS:
                unused[f"{ending} files"] += 1
    return sorted(found)


def stop(error):
    """For os.walk, which would pass over a folder that cannot be read."""
    raise error


def files_by_class(folder, unused):
    """{name of a class folder: its image files}, without empty ones."""
    found = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not is_left_out(child, unused):
            found[child.name] = image_files(child, unused)
    return {name: paths for name, paths in found.items() if paths}


def labelled(files, classes, broken):
    """{class: files} -> Split; a label is the place of the class in `classes`."""
    paths = []
    labels = []
    for label, name in enumerate(classes):
        paths += files.get(name, [])
        labels += [label] * len(files.get(name, []))
    broken.total += len(paths)
    return Split(Files(paths, broken), torch.tensor(labels))


def thin(split, count):
    """At most `count` images of a split (0: all), chosen by a fixed seed and spread evenly over the
    classes."""
    n = len(split.images)
    if not 0 < count < n:
        return split
    order = np.random.default_rng(0).permutation(n)
    if split.labels is not None:
        # The first of each class, then the second of each, ...
        labels = split.labels.cpu().numpy()[order]
        by_class = np.argsort(labels, kind="stable")
        first = np.searchsorted(labels[by_class], labels[by_class])
        order = order[by_class[np.argsort(np.arange(n) - first, kind="stable")]]
    chosen = torch.from_numpy(np.sort(order[:count]))
    numbers = [None if part is None else part[chosen.to(part.device)] for part in split[1:]]
    return Split(split.images.part(chosen), *numbers)


# -------- 2. Views --------------------------------------------------------------------------------

# The streams of random numbers: boxes of crops, augmentation, order of images, a method's own.
CROP, AUGMENT, ORDER, METHOD = 1, 2, 3, 4


class BatchRandom:
    """Uniform random numbers for the images of one batch, drawn on the CPU for the whole global
    batch and cut to the rows of this process. key: a list of ints, see SeedSequence above."""

    def __init__(self, key, batch, rows=slice(None)):
        self.generator = np.random.default_rng(key)
        self.batch = batch
        self.rows = rows

    def uniform(self, low=0.0, high=1.0, columns=()):
        """float32 (n, *columns) on the CPU, for the n images of this process."""
        u = self.generator.random((self.batch, *columns), dtype=np.float32)[self.rows]
        return torch.from_numpy(low + (high - low) * u)


class Crop(NamedTuple):
    """RandomResizedCrop: a box with `scale` of the image's area and `ratio` of width to height,
    resized to (size, size). As a first element of a view: (Crop, augment)."""

    size: int
    scale: tuple = (0.08, 1.0)
    ratio: tuple = (3 / 4, 4 / 3)

    def boxes(self, u, height, width):
        """Uniform u (n, 22) -> (n, 4) int: top, left, height, width. torchvision's rule: ten tries
        of a uniform area and a log-uniform ratio; the first that fits, else the largest centred box
        within the ratios."""
        least, most = self.scale
        area = height * width * (least + (most - least) * u[:, :10])  # (n, 10)
        low, high = self.ratio
        ratio = np.exp(np.log(low) + np.log(high / low) * u[:, 10:20])
        w = np.rint(np.sqrt(area * ratio)).astype(int)
        h = np.rint(np.sqrt(area / ratio)).astype(int)

        # The first try that fits, at a uniform place.
        fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
        first = fits.argmax(1)[:, None]
        w = np.take_along_axis(w, first, 1)[:, 0]
        h = np.take_along_axis(h, first, 1)[:, 0]
        top = (u[:, 20] * (height - h + 1)).astype(int)
        left = (u[:, 21] * (width - w + 1)).astype(int)

        # Where none fits: the centre.
        none = ~fits.any(1)
        w[none] = min(width, round(height * high))
        h[none] = min(height, round(width / low))
        top[none] = (height - h[none]) // 2
        left[none] = (width - w[none]) // 2
        return np.stack([top, left, h, w], 1)

    def cut(self, picture, u):
        """A PIL picture and u (22,) -> the crop, a PIL picture of (size, size)."""
        box = self.boxes(u[None], picture.height, picture.width)[0].tolist()
        return TF.resized_crop(picture, *box, [self.size, self.size], BICUBIC)


def whole_image(size, augment):
    """The view (Crop, augment) that shows the whole image, or the square in its centre."""
    return Crop(size, scale=(1, 1), ratio=(1, 1)), augment


def resize_matrix(start, length, size_in, size_out):
    """(n, size_out, size_in): row i weighs the pixels of [start, start + length) that make output
    pixel i, by PIL's antialiased bicubic filter. start, length: (n,) int. Resizing is then one
    matrix product per axis."""
    start = start[:, None, None].float()
    length = length[:, None, None].float()
    step = length / size_out

    # The distance of every pixel from the centre of every output pixel, in steps.
    pixel = torch.arange(size_in, device=start.device) + 0.5 - start  # (n, 1, size_in), in the box
    centre = (torch.arange(size_out, device=start.device)[:, None] + 0.5) * step  # (n, size_out, 1)
    t = (pixel - centre).div_(step.clamp(min=1)).abs_()  # shrinking widens the filter

    # Keys' cubic with a = -1/2. Each of its two pieces ends in 0, so they can be added:
    #     1.5 t^3 - 2.5 t^2 + 1 for t <= 1,    -0.5 t^3 + 2.5 t^2 - 4 t + 2 for 1 <= t <= 2
    t1 = t.clamp(max=1)
    t2 = t.clamp(1, 2)
    inner = (1.5 * t1 - 2.5).mul_(t1).mul_(t1).add_(1)
    outer = (-0.5 * t2 + 2.5).mul_(t2).sub_(4).mul_(t2).add_(2)
    weight = inner + outer

    weight.mul_((pixel > 0) & (pixel < length))  # nothing outside the box
    return weight.div_(weight.sum(2, keepdim=True))


def resized_crop(images, boxes, size):
    """images (n, 3, H, W) uint8, boxes (n, 4) int -> (n, 3, size, size) float in [0, 1]: the box of
    each image, resized."""
    n, _, height, width = images.shape
    top, left, h, w = torch.as_tensor(boxes).to(images.device).unbind(1)
    x = images.float().mul_(1 / 255).view(n, 3 * height, width)
    x = x @ resize_matrix(left, w, width, size).transpose(1, 2)
    x = resize_matrix(top, h, height, size)[:, None] @ x.view(n, 3, height, size)
    return x.clamp_(0, 1)  # bicubic overshoots


def crop_images(images, crops, draws):
    """uint8 images (n, 3, H, W), a Crop and its numbers (n, 22) per view -> a batch per view."""
    height, width = images.shape[2:]
    views = []
    for crop, u in zip(crops, draws):
        views.append(resized_crop(images, crop.boxes(u, height, width), crop.size))
    return views


# The following take and return float images (n, 3, H, W) in [0, 1]. They draw one set of
# parameters per image from rand, a BatchRandom.


def random_flip(x, rand, p=0.5):
    """Horizontal flip with probability p."""
    flipped = column(rand.uniform() < p, x)
    return torch.lerp(x, x.flip(3), flipped)  # lerp by exactly 0 or 1 is faster than where


def random_grayscale(x, rand, p):
    """The grey image in all three channels with probability p."""
    return torch.lerp(x, luminance(x).expand_as(x), column(rand.uniform() < p, x))


def color_jitter(x, rand, brightness, contrast, saturation, hue, p=1.0):
    """torchvision's ColorJitter with probability p: brightness, contrast and saturation times a
    factor from 1 - s to 1 + s, hue shifted by -hue to hue of a turn, the four in random order,
    clamped to [0, 1] after each."""
    on = rand.uniform() < p
    order = rand.uniform(columns=(4,)).argsort(1)  # (n, 4): which operation comes first, second ...
    factors = [rand.uniform(max(0.0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)]
    factors.append(torch.ones(len(x)))  # in the turn of the hue, the blend below changes nothing
    factors = torch.stack(factors, 1)  # (n, 4)
    shift = rand.uniform(-hue, hue)
    x = x.clone()

    for operation in order.unbind(1):  # (n,): 0 brightness, 1 contrast, 2 saturation, 3 hue
        # f x + (1 - f) m, where m is 0 (brightness), the mean grey level, or the grey image
        f = torch.where(on, factors.gather(1, operation[:, None])[:, 0], 1.0)
        grey = luminance(x)
        mean = grey.mean((2, 3), keepdim=True)
        towards_mean = column((1 - f) * (operation == 1), x)
        towards_grey = column((1 - f) * (operation == 2), x)
        x.mul_(column(f, x)).add_(grey.mul_(towards_grey))
        x.add_(mean * towards_mean).clamp_(0, 1)

        i = chosen(on & (operation == 3), x)
        x[i] = shift_hue(x[i], column(shift, x)[i])
    return x


def shift_hue(x, shift):
    """RGB -> HSV, hue + shift (n, 1, 1, 1) in turns, HSV -> RGB. Sorting the channels by max and
    min gives the hue of any of the six sextants from one formula, without a branch per pixel."""
    r, g, b = x.split(1, 1)
    high = torch.maximum(g, b)
    low = torch.minimum(g, b)
    value = torch.maximum(r, high)
    middle = torch.minimum(r, high)
    least = torch.minimum(middle, low)
    chroma = value - least

    # The hue at which the sextant starts, in sixths of a turn; its sign is dropped below.
    sextant = (g < b).to(x.dtype) * -6
    sextant += (r < high).to(x.dtype) * (-2 - 2 * sextant)  # -2 - sextant if red is not the largest
    hue = (sextant + (middle - low) / chroma.clamp(min=1e-12)).abs_().add_(6 * shift)
    hue -= 6 * (hue / 6).floor_()

    # Back to red, green and blue: each is a ramp over the hue.
    red = (hue - 3).abs_().sub_(1)
    green = 2 - (hue - 2).abs_()
    blue = 2 - (hue - 4).abs_()
    ramps = torch.cat([red, green, blue], 1)
    return ramps.clamp_(0, 1).mul_(chroma).add_(least)


def gaussian_blur(x, rand, p, sigma=(0.1, 2.0)):
    """torchvision's GaussianBlur with probability p: sigma uniform in `sigma` pixels; the kernel
    has a tenth of the side in taps, as SimCLR's."""
    size = x.shape[3]
    radius = size // 20
    on = rand.uniform() < p
    sigma = rand.uniform(*sigma)
    i = chosen(on, x)

    # The weights of the taps, for the k chosen images.
    offset = torch.arange(-radius, radius + 1, device=x.device)
    sigma = sigma[on].to(x.device, non_blocking=True)
    taps = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)  # (k, taps)
    taps = (taps / taps.sum(1, keepdim=True))[:, None].expand(-1, size, -1)

    # The pixel that each tap reads, reflected at both borders.
    source = (torch.arange(size, device=x.device)[:, None] + offset).abs()  # (size, taps)
    source = size - 1 - (size - 1 - source).abs()
    source = source.expand(len(taps), -1, -1)

    # Blurring is one matrix product per axis.
    matrix = torch.zeros(len(taps), size, size, device=x.device, dtype=taps.dtype)
    matrix = matrix.scatter_add_(2, source, taps).to(x)[:, None]
    return x.index_copy(0, i, matrix @ x[i] @ matrix.transpose(2, 3))


def solarize(x, rand, p):
    """torchvision's RandomSolarize with probability p: pixels of 128/255 and more are inverted."""
    i = chosen(rand.uniform() < p, x)
    inverted = torch.where(x[i] >= 128 / 255, 1 - x[i], x[i])
    return x.index_copy(0, i, inverted)


def normalize(x):
    """[0, 1] to about zero mean and unit variance, by the statistics of ImageNet: for all methods
    and their evaluation."""
    mean, std = channel_statistics(x)
    return (x - mean) / std


def denormalize(x):
    """The inverse of normalize: images (n, 3, H, W) in [0, 1]."""
    mean, std = channel_statistics(x)
    return (x * std + mean).clamp(0, 1)


def channel_statistics(x):
    """ImageNet's mean and deviation of each channel, (2, 3, 1, 1), beside x."""
    return torch.tensor([MEAN, STD]).to(x).view(2, 3, 1, 1)


def luminance(x):
    """Grey level (n, 1, H, W) by ITU-R 601."""
    r, g, b = x.split(1, 1)
    return (r * 0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)


def column(values, x):
    """(n,) on the CPU -> (n, 1, 1, 1) beside x, to treat each image by its own number."""
    return values.to(x, non_blocking=True).view(-1, 1, 1, 1)


def chosen(mask, x):
    """Boolean (n,) on the CPU -> indices beside x. Computed on the CPU to avoid a GPU
    synchronisation."""
    return mask.nonzero()[:, 0].to(x.device, non_blocking=True)


class Plan:
    """Which images each step of an epoch shows, and the random numbers of their crops. Iterating
    over it gives the steps of `epoch` from `first` on: indices (n,), and numbers (n, 22) per view,
    of this process's rows."""

    def __init__(self, count, batch, seed, view_count):
        self.count = count
        self.batch = batch
        self.seed = seed
        self.view_count = view_count
        self.epoch = 0
        self.first = 0
        self.steps = count // batch  # an incomplete last batch is dropped
        share = batch // world()
        self.rows = slice(rank() * share, (rank() + 1) * share)

    def random(self, epoch, step, view, stream):
        """The random numbers of one step. A method's own have view 0 and stream METHOD."""
        return BatchRandom([self.seed, epoch, step, view, stream], self.batch, self.rows)

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch, 0, 0, ORDER]).permutation(self.count)
        for step in range(self.first, self.steps):
            index = order[step * self.batch : (step + 1) * self.batch][self.rows]
            draws = []
            for view in range(self.view_count):
                rand = self.random(self.epoch, step, view, CROP)
                draws.append(rand.uniform(columns=(22,)).numpy())
            yield index, draws


class Keys:
    """A plan as the batch sampler of a DataLoader: (index, a row of crop numbers per view)."""

    def __init__(self, plan):
        self.plan = plan

    def __iter__(self):
        for index, draws in self.plan:
            yield list(zip(index.tolist(), zip(*draws)))


class Loader:
    """Batches of random views: loader(epoch, done) yields (step, [view, ...]) with views of
    (batch / world, 3, size, size).

    views: a pair (Crop, augment) for each view; augment(x, rand) takes crops (n, 3, size, size) in
    [0, 1] and returns what the network is shown. batch counts the images of all processes; an
    incomplete last batch is dropped. Images in memory are cropped on their device, files are
    decoded and cropped by `workers` processes.

    loader.index (n,): the images of this step, as places in the split; a file that was read in
    place of a broken one counts as itself. Labels are split.labels[loader.index]."""

    def __init__(self, split, views, batch, seed, device, workers=0):
        count = len(split.images)
        if not 0 < batch <= count or batch % world():
            several = f", a multiple of {world()} (the processes)" if world() > 1 else ""
            fail(f"--batch {batch}: choose 2 to {count}, the number of images{several}")
        for crop, _ in views:
            if crop.size < 1 or not 0 < crop.scale[0] <= crop.scale[1] <= 1:
                fail(
                    f"a view like {crop} is not possible: choose a positive side (--size, "
                    "--small-size), and for the smallest crop a share above 0, up to 1"
                )
        self.reader = split.images
        self.views = views
        self.batch = batch
        self.device = device
        self.workers = workers
        self.count = count
        self.plan = Plan(count, batch, seed, len(views))
        self.steps = self.plan.steps  # per epoch
        self.rows = self.plan.rows  # of the global batch that are this process's
        self.random = self.plan.random
        self.index = None
        self.first_shown = None  # indices and views of the first batch, for views.png

    def __call__(self, epoch, done=0):
        """step counts over all epochs. `done` steps of the run are done: those of this epoch are
        skipped."""
        self.plan.epoch = epoch
        self.plan.first = max(0, done - epoch * self.steps)
        crops = [crop for crop, _ in self.views]
        batches = self.reader.batches(self.plan, crops, self.device, self.workers)

        for epoch_step, (index, cropped) in enumerate(batches, self.plan.first):
            self.index = index
            views = []
            for v, (x, (_, augment)) in enumerate(zip(cropped, self.views)):
                views.append(augment(x, self.random(epoch, epoch_step, v, AUGMENT)))
            if self.first_shown is None:
                few = [view[:8].float().cpu() for view in views]
                self.first_shown = index[:8].cpu(), few
            yield epoch * self.steps + epoch_step, views


def make_views(images, views, seed=0):
    """Views of your own images, as a training loop gets them: uint8 (n, 3, H, W) and the list
    [(Crop, augment), ...] of a method -> one batch per view, in the order of the images. Another
    seed gives other views; a number or a list of numbers."""
    key = np.atleast_1d(seed).tolist()
    result = []
    for v, (crop, augment) in enumerate(views):
        u = BatchRandom([*key, v, CROP], len(images)).uniform(columns=(22,))
        (x,) = crop_images(images, [crop], [u.numpy()])
        result.append(augment(x, BatchRandom([*key, v, AUGMENT], len(images))))
    return result


def first_batch(split, views, count, seed, device):
    """Up to `count` images of a split, a multiple of the number of processes, as each view shows
    them: one batch per view. No worker processes: for a single batch they would keep running."""
    batch = min(count, len(split.images)) // world() * world()
    loader = Loader(split, views, batch, seed, device)
    _, shown = next(loader(epoch=0))
    return shown


# -------- 3. Networks -----------------------------------------------------------------------------

RESNETS = ("resnet14", "resnet18", "resnet34", "resnet50", "resnet50x2", "resnet50x4")
VITS = {  # width, blocks and heads; vit_micro and vit_mini are sized for two CPU cores
    "vit_micro": (96, 4, 3),
    "vit_mini": (128, 6, 4),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}
ARCHS = (*RESNETS, *VITS)


def backbone(arch, size, **options):
    """A network without its classifier: images (n, 3, size, size) -> features (n, net.out_dim).

    resnet18, 34, 50: torchvision's; up to 64 pixels with the stem of the CIFAR literature (3x3,
    stride 1, no max-pool), which makes them ten times slower than at 96 pixels. resnet50x2, x4: two
    and four times as wide, as in SimCLR. resnet14: sized for two CPU cores; a 3x3 stem of stride 2,
    one bottleneck block per stage, 3/8 of the channels, no stride in the last stage.
    vit_*: vision transformers; `options` are those of ViT.

    net.first_layer is the convolution that sees the image."""
    if arch in VITS:
        return ViT(arch, size, **options)
    if arch not in RESNETS:
        fail(f"--arch {arch}: choose one of {', '.join(ARCHS)}")

    if arch == "resnet14":
        net = ResNet(Bottleneck, [1, 1, 1, 1])
        stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        rebuild(net, stem, 24, strides=[1, 2, 2, 1], depths=[1, 1, 1, 1])
    elif arch in ("resnet50x2", "resnet50x4"):
        net = ResNet(Bottleneck, [3, 4, 6, 3])
        width = 64 * int(arch[-1])
        stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        rebuild(net, stem, width, strides=[1, 2, 2, 2], depths=[3, 4, 6, 3])
    else:
        net = getattr(torchvision.models, arch)()

    if size <= 64 and arch != "resnet14":
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision does, for the layers made anew
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    net.out_dim = net.inplanes  # the channels of the last stage
    net.fc = nn.Identity()
    # Beside the registered modules, or the state dict would hold the layer twice.
    object.__setattr__(net, "first_layer", net.conv1)
    return net


def rebuild(net, stem, width, strides, depths):
    """Gives a torchvision ResNet of bottleneck blocks another stem and other stages, each twice as
    wide as the one before."""
    net.inplanes = stem.out_channels
    net.conv1 = stem
    net.bn1 = nn.BatchNorm2d(stem.out_channels)
    for i, (stride, depth) in enumerate(zip(strides, depths)):
        stage = net._make_layer(Bottleneck, width * 2**i, depth, stride)
        setattr(net, f"layer{i + 1}", stage)


def patch_side(size):
    """Side of a ViT's patch for images of `size` pixels: 4 for up to 48 pixels, 8 for up to 96,
    above that 16 as in the papers, so that there are 7 patches along a side or more."""
    side = 4 if size <= 48 else 8 if size <= 96 else 16
    if size < side or size % side:
        fail(f"--size {size}: choose a multiple of {side}, the side of a patch")
    return side


class Block(nn.Module):
    """Transformer block of a ViT, with parameters named as in timm: tokens (n, T, dim) -> the same.
    drop: the probability with which a branch of an image is left out in training."""

    def __init__(self, dim, heads, drop=0.0):
        super().__init__()
        self.heads = heads
        self.drop = drop
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict()
        self.attn["qkv"] = nn.Linear(dim, 3 * dim)
        self.attn["proj"] = nn.Linear(dim, dim)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))

    def qkv(self, x):
        """Queries, keys and values of tokens (n, T, dim), each (n, heads, T, dim / heads)."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))
        return qkv.permute(2, 0, 3, 1, 4)

    def forward(self, x, u=None):
        """u: uniform numbers (n, 2) for drop path, one per image and branch; None: no drop."""
        q, k, v = self.qkv(x)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (n, T, dim)
        x = x + self.kept(self.attn["proj"](y), u, 0)
        return x + self.kept(self.mlp(self.norm2(x)), u, 1)

    def kept(self, y, u, branch):
        """Drop path (stochastic depth): 0 for some images, 1 / (1 - drop) times y for others."""
        if u is None or not self.drop:
            return y
        kept = (u[:, branch] >= self.drop).to(y)
        return y * (kept / (1 - self.drop))[:, None, None]


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929), with
    parameters named as in timm: images (n, 3, H, W), sides multiples of a patch's -> (n, out_dim).

    positions: "learned" with the initialisation of DINO and timm, or "sincos", fixed, with that of
    MAE. pool: the feature is the class "token" or the "mean" of the patches. drop_path: of the last
    block; it grows linearly from 0 at the first."""

    def __init__(self, arch, size, positions="learned", pool="token", drop_path=0.0):
        super().__init__()
        dim, depth, heads = VITS[arch]
        side = patch_side(size)
        self.grid = size // side
        self.depth = depth
        self.pool = pool
        self.out_dim = dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, side, side)})

        if positions == "learned":
            self.cls_token = nn.Parameter(truncated_normal(1, 1, dim))
            self.pos_embed = nn.Parameter(truncated_normal(1, 1 + self.grid**2, dim))
        else:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
            self.register_buffer("pos_embed", sincos_positions(self.grid, dim))

        drops = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*[Block(dim, heads, drop) for drop in drops])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_normal if positions == "learned" else init_xavier)
        object.__setattr__(self, "first_layer", self.patch_embed["proj"])

    def embed(self, x, ids_keep=None):
        """x (n, 3, H, W) -> input of the first block (n, 1 + L, dim), class token first. Positions
        are resized to the grid of x. ids_keep (n, K): the visible patches, None for all L."""
        x = self.patch_embed["proj"](x)  # (n, dim, H / side, W / side)
        positions = self.pos_embed[:, 1:]
        if x.shape[2:] != (self.grid, self.grid):
            positions = positions.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            positions = F.interpolate(positions, x.shape[2:], mode="bicubic")
            positions = positions.flatten(2).transpose(1, 2)  # (1, L, dim)
        x = x.flatten(2).transpose(1, 2) + positions  # (n, L, dim)

        if ids_keep is not None:
            x = gather_tokens(x, ids_keep)  # (n, K, dim): it knows nothing of the hidden patches
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([first, x], 1)

    def tokens(self, x, ids_keep=None, u=None):
        """The last block's output, normalised: (n, 1 + K, dim), class token first. u (n, depth, 2):
        uniform numbers for drop path, None for none."""
        x = self.embed(x, ids_keep)
        for i, block in enumerate(self.blocks):
            x = block(x, None if u is None else u[:, i])
        return self.norm(x)

    def forward(self, x, u=None):
        x = self.tokens(x, u=u)
        return x[:, 0] if self.pool == "token" else x[:, 1:].mean(1)  # (n, dim)

    @torch.no_grad()
    def attention(self, x):
        """Attention of the class token to the patches in the last block, for each head:
        x (n, 3, H, H) -> (n, heads, H / side, H / side)."""
        x = self.blocks[:-1](self.embed(x))
        q, k, _ = self.blocks[-1].qkv(x)
        scores = q[:, :, :1] @ k.mT / q.shape[3] ** 0.5  # (n, heads, 1, 1 + L)
        weights = scores.softmax(3)[:, :, 0, 1:]
        return weights.unflatten(2, (math.isqrt(weights.shape[2]), -1))


def truncated_normal(*shape):
    return nn.init.trunc_normal_(torch.empty(*shape), std=0.02)


def init_normal(module):
    """Linear layers: normal weights of deviation 0.02, biases 0. The convolution of the patches
    keeps PyTorch's values."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def init_xavier(module):
    """Xavier uniform weights, those of the convolution of the patches as if it were a linear layer;
    biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


def sincos_positions(grid, dim):
    """Fixed positions (1, 1 + grid^2, dim): 0 for the class token, then in reading order. Half of
    the numbers encode the column, half the row: sines, then cosines, of frequencies from 1 to
    nearly 1/10000 (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5)."""
    exponent = -torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)
    angle = torch.arange(grid)[:, None] * 10000**exponent
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # (grid, dim / 2)
    positions = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], 1)
    return F.pad(positions, (0, 0, 1, 0))[None].float()


def new_backbone(method, arch, size):
    """The untrained backbone of a method: that of its file if it makes its own, else backbone()."""
    module = importlib.import_module(f"methods.{method}")
    return getattr(module, "backbone", backbone)(arch, size)


def load_backbone(path):
    """The trained network of a run, in eval mode on the CPU, without gradients.

    path: a run folder or the backbone.pt in it. The network takes images (n, 3, S, S), normalised
    by normalize(), and gives features (n, net.out_dim); net.method, net.arch, net.size and net.data
    say what was trained. Exits with a one-line message if the file is not such a network."""
    path = Path(path)
    path = path / "backbone.pt" if path.is_dir() else path
    if not path.is_file():
        fail(f"{path}: no such file; give a finished run folder or the backbone.pt in it")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        net = new_backbone(saved["method"], saved["arch"], saved["size"])
        net.load_state_dict(saved["weights"])
        for name in ("method", "arch", "size", "data"):
            setattr(net, name, saved[name])
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        fail(f"{path} is not the backbone.pt of a run ({type(error).__name__}), or is damaged")
    return net.eval().requires_grad_(False)


# -------- 4. Evaluation ---------------------------------------------------------------------------


def evaluate(network, data, size, device, workers=0, only_knn=False):
    """Evaluates frozen features. Returns a dict; accuracies in percent: knn20, knn200, linear; on
    data with drawings retrieval1, retrieval5; and the collapse panel, which is all there is without
    labels. network: normalised images (n, 3, size, size) -> (n, D). Every process must call it;
    process 0 computes, all get the result. Needs less than two times the float32 features of bank
    and test images."""
    result = {}
    shown = data.test or data.bank
    test, readable = features(network, shown, size, device, workers)
    bank, bank_readable = None, None
    if data.test:
        bank, bank_readable = features(network, data.bank, size, device, workers)
    if not only_knn:
        view = Crop(size, scale=(0.2, 1.0)), lambda x, rand: normalize(random_flip(x, rand))
        x1, x2 = first_batch(shown, [view, view], 1024, 0, device)
        h1 = gather(embed(network, x1))
        h2 = gather(embed(network, x2))

    if rank() == 0:
        if data.test and data.test.emoji is not None:
            for k in (1, 5):
                found = retrieval(test, data.test.emoji, data.test.drawing, k)
                result[f"retrieval{k}"] = found
        test = only(test, readable)
        if not only_knn:
            result |= collapse_panel(test, h1, h2)
        if data.test:
            bank = only(bank, bank_readable)
            labels = data.bank.labels.to(device)[bank_readable]
            test_labels = data.test.labels.to(device)[readable]
            for k in (20, 200):
                result[f"knn{k}"] = knn(bank, labels, test, test_labels, k)
            if not only_knn:
                groups = None if data.bank.emoji is None else data.bank.emoji[bank_readable]
                result["linear"] = linear_probe(bank, labels, test, test_labels, groups)

    if world() > 1:
        everyone = [result]
        dist.broadcast_object_list(everyone)
        result = everyone[0]
    return result


def only(x, rows):
    """x[rows], without a copy if that is all of x."""
    return x if rows.all() else x[rows]


def features(network, split, size, device, workers=0):
    """Frozen features (N, D) of one plain view per image, in the order of the split: of an image in
    memory the whole, of a file the centre; and (N,) bool, False for files that cannot be read. Each
    process computes its share; process 0 gets all, the others None. Matrices of more than 2^27
    numbers (0.5 GB in float32) are kept in float16."""
    count = len(split.images)
    share = -(-count // world())
    mine = torch.arange(rank() * share, (rank() + 1) * share)
    mine = mine.clamp(max=count - 1)  # equal shares; the surplus is cut off below
    readable = torch.ones(count, device=device)
    x = None
    done = 0
    text = f"features of {count} images"
    hidden = rank() > 0 or count < 5000
    bar = tqdm(total=share, desc=text, leave=False, disable=hidden, mininterval=pause_of_bars())
    for images, broken in split.images.whole(mine, size, workers):
        batch = images.to(device).float().div_(255)
        if batch.shape[3] != size:
            batch = F.interpolate(batch, (size, size), mode="bicubic", antialias=True).clamp_(0, 1)
        h = embed(network, normalize(batch))
        if x is None:
            large = count * h.shape[1] > 1 << 27
            x = h.new_empty(share, h.shape[1], dtype=torch.float16 if large else h.dtype)
        x[done : done + len(h)] = h
        done += len(h)
        bar.update(len(h))
        readable[[index for index, _ in broken]] = 0
    bar.close()
    readable = gather(readable[mine.to(device)])[:count] > 0
    if world() == 1:
        return x, readable

    # Every share goes to its place in one matrix on process 0.
    everyone = x.new_empty(share * world(), x.shape[1]) if rank() == 0 else None
    dist.gather(x, list(everyone.split(share)) if rank() == 0 else None)
    return (everyone[:count] if rank() == 0 else None), readable


def pause_of_bars():
    """Seconds between the updates of a progress bar: few lines where there is no terminal."""
    return 0.5 if sys.stderr.isatty() else 30


@torch.no_grad()
def embed(network, x):
    """Frozen features of a batch, float32 (n, D): the network in eval mode, left as it was."""
    training = network.training
    network.eval()
    h = network(x.contiguous(memory_format=torch.channels_last)).flatten(1).float()
    network.train(training)
    return h


def pixels(size, bank=0):
    """The network of the raw-pixel baseline: the image itself, averaged to at most 32x32, or 16x16
    if more than 20,000 images are in the bank, whose probe would take hours."""
    return nn.AdaptiveAvgPool2d(min(16 if bank > 20_000 else 32, size))


def knn(bank, bank_labels, test, test_labels, k, temperature=0.07):
    """Weighted k-nearest-neighbour accuracy in percent (Wu et al. 2018,
    https://arxiv.org/abs/1805.01978, section 3.4): each of the k bank images with the largest
    cosine s votes for its label with exp(s / temperature). Features (N, D), labels (N,)."""
    bank = F.normalize(bank.float(), dim=1)
    test = F.normalize(test.float(), dim=1)
    classes = int(bank_labels.max()) + 1
    correct = 0
    few = min(512, max(32, (1 << 23) // len(bank)))  # the cosines of so many at a time
    for x, y in zip(test.split(few), test_labels.split(few)):
        s, nearest = (x @ bank.T).topk(min(k, len(bank)), 1)  # (n, k)
        votes = x.new_zeros(len(x), classes)
        votes.scatter_add_(1, bank_labels[nearest], (s / temperature).exp())
        correct += (votes.argmax(1) == y).sum().item()
    return 100 * correct / len(test)


def linear_probe(bank, bank_labels, test, test_labels, groups=None):
    """Linear-probe accuracy in percent: multinomial logistic regression on frozen standardised
    features, solved to convergence. Its weight decay, of 10, 3, 1, ... 1e-4, is the one with the
    least loss on a fifth of the BANK (whole groups if given, so that near copies stay together);
    then all of the bank is fitted with it. The test images choose nothing. bank and test (N, D) are
    overwritten: a copy of the features may not fit."""
    bank = bank.float()
    test = test.float()
    mean = bank.mean(0)
    std = bank.std(0) + 1e-6
    for x in (bank, test):
        x.sub_(mean).div_(std)

    # Decorrelate. A rotation changes no solution, but the way to it is shorter.
    variance, rotation = torch.linalg.eigh(bank.T @ bank / len(bank))
    variance = variance.clamp(min=0)
    for part in (*bank.split(8192), *test.split(8192)):
        part.copy_(part @ rotation)

    # A fifth of the groups is held out.
    groups = torch.arange(len(bank)) if groups is None else groups.cpu()
    names = groups.unique()
    order = np.random.default_rng(0).permutation(len(names))
    held = torch.isin(groups, names[order[: len(names) // 5]]).to(bank.device)
    kept = (~held).nonzero()[:, 0]
    held = held.nonzero()[:, 0]

    # From strong to weak decay, each from the last solution.
    zeros = bank.new_zeros(int(bank_labels.max()) + 1, bank.shape[1])  # one row per class
    solution = zeros, zeros[:, 0]
    least, decay = math.inf, 10
    for candidate in (10, 3, 1, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4):
        solution = fit_logistic(bank, bank_labels, variance, candidate, *solution, rows=kept)
        logits = F.linear(bank[held], *solution).double()
        loss = F.cross_entropy(logits, bank_labels[held]).item()  # steadier than accuracy
        if not loss < least:  # it falls, then rises: from here on the probe overfits the bank
            break
        least, decay = loss, candidate

    weight, bias = fit_logistic(bank, bank_labels, variance, decay, zeros, zeros[:, 0])
    right = F.linear(test, weight, bias).argmax(1) == test_labels
    return 100 * right.double().mean().item()


def fit_logistic(x, y, variance, decay, weight, bias, rows=None):
    """argmin of mean cross-entropy + decay / 2 ||weight||^2 over some rows (default: all) by
    L-BFGS, from (weight (C, D), bias (C,)), to a gradient of 1e-4. x (N, D) is decorrelated, with
    the given variance per column: scaled by it, the way to the minimum is shorter."""
    scale = (0.1 * variance + decay).rsqrt()  # 0.1: about p (1 - p), the curvature of the softmax
    rows = torch.arange(len(x), device=x.device) if rows is None else rows

    # In pieces, so that ImageNet's logits are never in memory at once. One piece is made once.
    def make_pieces():
        for some in rows.split(len(rows) if small else 1 << 14):
            yield x[some].mul_(scale), y[some]

    small = len(rows) * x.shape[1] <= 1 << 25
    single = list(make_pieces()) if small else None
    penalty = decay * scale.double().square()
    weight = (weight / scale).double().requires_grad_()
    bias = bias.double().requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        tolerance_grad=1e-4,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective():
        solver.zero_grad()
        loss = (penalty * weight.square()).sum() / 2
        loss.backward()
        for piece, labels in single or make_pieces():
            logits = F.linear(piece, weight.float(), bias.float()).double()
            part = F.cross_entropy(logits, labels, reduction="sum") / len(rows)
            part.backward()
            loss = loss + part.detach()
        return loss

    solver.step(objective)
    return (weight.detach() * scale).float(), bias.detach().float()


def retrieval(x, emoji, drawing, k):
    """In percent: how often one of the k nearest test images BY OTHER ARTISTS shows the same
    emoji."""
    same = emoji[across_drawings(x, drawing, k)] == emoji[:, None]
    return 100 * same.any(1).double().mean().item()


def across_drawings(x, drawing, k, queries=None):
    """(N, k) indices of the images with the largest cosine among those of another drawing; for
    some queries, indices (n,), only theirs, (n, k)."""
    x = F.normalize(x.float(), dim=1)
    queries = torch.arange(len(x), device=x.device) if queries is None else queries
    nearest = []
    for some in queries.split(512):
        same = drawing[some][:, None] == drawing
        s = (x[some] @ x.T).masked_fill_(same, -2)  # below every cosine
        nearest.append(s.topk(min(k, len(x)), 1).indices)
    return torch.cat(nearest)


def collapse_panel(x, x1, x2):
    """Signs of collapse. x (N, D): features; x1, x2 (M, D): features of two random crops of the
    same M images.

    feature_std: deviation over images of normalised features: 1/sqrt(D) if they are spread evenly,
    0 if collapsed. rankme: exp(entropy of the singular values), 1 to min(N, D) (Garrido et al.
    2023, https://arxiv.org/abs/2210.02885). alignment: mean ||u1 - u2||^2 of normalised pairs, 0 is
    best; uniformity: log mean exp(-2 ||u - v||^2) over the first crops of two images, -4 is best, 0
    is collapse (Wang, Isola 2020, https://arxiv.org/abs/2005.10242)."""
    x = x.float()
    p = torch.linalg.svdvals(x)
    p = p / p.sum().clamp(min=1e-12) + 1e-7  # 1e-12: all features 0
    u = F.normalize(x, dim=1)
    u1 = F.normalize(x1, dim=1)
    u2 = F.normalize(x2, dim=1)
    return {
        "feature_std": u.std(0).mean().item(),
        "rankme": torch.exp(-(p * p.log()).sum()).item(),
        "alignment": (u1 - u2).square().sum(1).mean().item(),
        "uniformity": (-2 * torch.pdist(u1) ** 2).exp().mean().log().item(),
        "feature_std_isotropic": x.shape[1] ** -0.5,
    }


# -------- 5. Processes ----------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world() > 1:
        dist.barrier()


def print0(*words):
    """Prints in process 0 only. A full disk behind the output does not end a run."""
    if rank() == 0:
        try:
            print(*words, flush=True)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            print(f"warning: cannot print: {error.strerror}", file=sys.stderr)


def join_processes(seed):
    """Joins torchrun's group of processes, if there is one (nccl on GPUs, gloo on CPUs), seeds the
    initial weights, and returns the device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if place >= count:
            fail(f"LOCAL_RANK is {place}, but there are {count} GPUs: start one process per GPU")
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True

    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if len(missing) < 2 or "RANK" not in missing or "WORLD_SIZE" not in missing:
        if missing:
            fail(
                f"some of torchrun's variables are set, but not {', '.join(missing)}: start the "
                "program with torchrun, or unset RANK and WORLD_SIZE",
                only_first=False,
            )
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        fail("srun has started several tasks that do not know of each other: let each run torchrun")

    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        text = "waiting for the other processes: are all started, with the same MASTER_ADDR?"
        waiting = threading.Timer(20, print, [text], {"file": sys.stderr})
        waiting.daemon = True
        waiting.start()
        try:
            store, place, count = next(dist.rendezvous("env://"))
            # torchrun reuses the store after a restart; a new prefix hides stale addresses
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group(
                backend="nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=place,
                world_size=count,
                timeout=datetime.timedelta(hours=2),
            )
        except (RuntimeError, ValueError) as error:
            fail(
                f"the processes cannot join ({str(error).splitlines()[0]}): {', '.join(needed)} "
                "must be those of all",
                only_first=False,
            )
        finally:
            waiting.cancel()
        # torch 2.11 may hang at exit if DistributedDataParallel holds the last reference
        atexit.register([dist.group.WORLD].clear)
    torch.manual_seed(seed)  # the same weights in every process
    return device


class AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):  # every process used the sum, so its gradient is the sum of theirs
        return AllReduceSum.forward(None, grad)


def all_reduce_sum(x):
    """Sum over processes, with the gradient that torch.distributed.all_reduce lacks."""
    return AllReduceSum.apply(x) if world() > 1 else x


class AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        blocks = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(blocks, x)
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx, grad):  # every process used all rows; this one gets the sum for its own
        return AllReduceSum.forward(None, grad).chunk(world())[rank()]


def gather(x):
    """(n, ...) on each process -> (world * n, ...) on all, in the order of the processes, which is
    that of the global batch.

    The gradient is exact: if each process returns the mean loss of its own rows, the average over
    processes that DistributedDataParallel takes is the gradient of the mean loss of the global
    batch."""
    return AllGather.apply(x.contiguous()) if world() > 1 else x


class SyncBatchNorm(_BatchNorm):
    """Batch-norm over the images of all processes on any device (torch's own needs GPUs). The mean
    comes first, then the variance around it, so no precision is lost; the gradient runs through
    both sums."""

    def forward(self, x):
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1] * world()

        mean = all_reduce_sum(x.sum(dims)) / count
        x = x - mean.view(shape)
        variance = all_reduce_sum(x.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)

        x = x * torch.rsqrt(variance + self.eps).view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x


def distribute(model, device, compile=False):
    """The model as the loop calls it: on the device in channels_last, and with several processes
    also with synchronised batch-norm and DistributedDataParallel around it. Its parameters stay the
    same objects: optimise, save and evaluate those of the model."""
    model.to(device, memory_format=torch.channels_last)
    if world() > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world() > 1:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = SyncBatchNorm  # the same parameters and buffers
    if world() > 1:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            # torch 2.14 renames broadcast_buffers
            model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    # Around DistributedDataParallel, so that gradients can travel while others are computed.
    return torch.compile(model) if compile else model


# -------- 6. Runs ---------------------------------------------------------------------------------

RANGES = {"size": "[1, inf)", "epochs": "[1, inf)", "seed": "[0, 1e18]"}
RANGES["batch"] = "[2, inf)"  # batch-norm needs two
NO_SETTINGS = ("recipe", "out", "root", "workers", "compile", "argv")  # change no result


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence, where argparse would print its usage too."""
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, 1) or ["--help"]
            message = f"{word}: no such flag; see {near[0]}"
        fail(message.removeprefix("argument "))


def parse(doc, settings, argv=None, runs=None):
    """The flags of a script, from its docstring and its table of settings.

    settings: {name: (a value per column, ..., help)} or, with what is allowed at the end,
    (..., help, allowed): a tuple of choices, or an interval like "(0, 1]"; numbers without one may
    not be negative. The row "recipe" names the columns: `--recipe NAME` takes the defaults from
    one, the first if it is not given. A column named after a data set also sets --data.
    argv: a list of words; None for those of the command line. runs: the help of the folders that
    the command names besides its flags, for scripts that evaluate runs.

    Returns a namespace with all settings and the flags of a run: data, root, seed, out, workers,
    and if something is trained eval_every and compile. Exits with a one-line message on a value
    that makes no sense."""
    if argv is None:  # a program, not a notebook
        sys.excepthook = one_line
        for name in ("stdout", "stderr"):  # None if closed; for names that they cannot print
            setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
            getattr(sys, name).reconfigure(errors="backslashreplace")
        argv = sys.argv[1:]
    argv = [str(word) for word in argv]
    columns = settings["recipe"][:-1]
    n = len(columns)
    trains = "epochs" in settings
    known = (*EMBEDDED, *DOWNLOADED)
    data = [column if column in known else "" for column in columns]
    rows = {"data": (*data, f"{', '.join(known)}, or a folder of images")}
    rows |= {name: row for name, row in settings.items() if name != "recipe"}
    every_script = {
        "seed": (0, "seed for the initial weights, the image order and the augmentation"),
        "root": ("data", "folder for downloaded data sets"),
        "workers": (4, "processes that decode the images of a folder"),
        "out": ("", "folder for the results; the script's docstring names the default"),
    }
    every_training = {
        "out": ("runs/METHOD-DATA-SEED", "run folder; a run in it is continued"),
        "eval_every": (0, "epochs between kNN evaluations; 0: a sixth of the epochs"),
        "bank": (50_000, "training and test images at most in evaluations of the run; 0: all"),
        "compile": (False, "torch.compile the network"),
    }
    for name, (value, text) in (every_script | (every_training if trains else {})).items():
        rows[name] = (*[value] * n, text)

    # The recipe first: the other defaults depend on it.
    first = Parser(add_help=False, allow_abbrev=False)
    text = f"{settings['recipe'][-1]}: {', '.join(columns)}" if n > 1 else argparse.SUPPRESS
    first.add_argument("--recipe", choices=columns, default=columns[0], help=text)
    place = columns.index(first.parse_known_args(argv)[0].recipe)

    title = (doc or "").partition("\n")[0]  # python -OO leaves no docstrings
    usage = "%(prog)s [--FLAG VALUE ...]" + (" RUN ..." if runs else "")
    note = "In brackets: the default, or the default of each recipe."
    p = Parser(description=title, epilog=note, usage=usage, parents=[first], allow_abbrev=False)
    if runs:
        p.add_argument("runs", nargs="+", metavar="RUN", help=runs)
    for name, row in rows.items():
        add_flag(p, name, row, columns, place)
    args = p.parse_args(argv)

    for name, row in rows.items():
        value = getattr(args, name)
        allowed = row[-1] if len(row) > n + 1 else RANGES.get(name, "[0, inf)")
        if isinstance(value, int | float) and not isinstance(allowed, tuple):
            refuse_outside(flag_of(name), value, allowed)
    if trains:
        if not args.data:
            fail(f"--recipe {args.recipe} needs images: --data FOLDER, or the name of a data set")
        if "warmup" in settings and args.warmup > args.epochs:
            run = f"--epochs {args.epochs}, --warmup {args.warmup:g}"
            fail(f"{run}: choose more epochs or a shorter warm-up")
        args.eval_every = args.eval_every or max(1, args.epochs // 6)
        if not args.out:
            fail("--out is empty: give the name of a folder")
        if os.path.realpath(args.out) == os.path.realpath(args.data):
            fail(f"--out {args.out}: this is the folder of --data; choose another")
    refuse_unwritable(args.out)
    args.argv = argv
    return args


def refuse_unwritable(out):
    """Exits with a one-line message if the folder `out` cannot be made or written."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        fail(f"--out {out}: {place} is a file; choose the name of a folder")
    if not os.access(place, os.W_OK):
        fail(f"--out {out}: no right to write in {place}; choose another folder")


def flag_of(name):
    return "--" + name.strip("_").replace("_", "-")


def add_flag(parser, name, row, columns, place):
    """A row of the table as a flag, with the values of all columns in its help."""
    values = row[: len(columns)]
    kind = float if any(isinstance(value, float) for value in values) else type(values[0])
    words = [f"{value:g}" if isinstance(value, float) else f"{value}" for value in values]
    if len(set(words)) == 1:
        words = words[:1]
    else:
        pairs = zip(columns, words)
        words = [f"{column} {word}" for column, word in pairs if word not in ("", column)]
    text = f"{row[len(columns)]} ({', '.join(words)})".replace(" ()", "")

    if kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    else:
        options = {"type": kind, "metavar": name.strip("_").upper()}
    if isinstance(row[-1], tuple):
        options["choices"] = row[-1]
        text += f": {', '.join(row[-1])}"
    text = text.replace("%", "%%")
    parser.add_argument(flag_of(name), dest=name, default=values[place], help=text, **options)


def refuse_outside(flag, value, interval):
    """Exits with a one-line message if a number is not in an interval that is written as in
    mathematics: "[0, 1)", "(0, inf)"."""
    low, high = [float(end) for end in interval[1:-1].split(",")]
    from_low = value >= low if interval[0] == "[" else value > low
    to_high = value <= high if interval[-1] == "]" else value < high
    if from_low and to_high:
        return
    words = f"{'at least' if interval[0] == '[' else 'more than'} {low:g}"
    if high < math.inf:
        words += f" and {'at most' if interval[-1] == ']' else 'less than'} {high:g}"
    fail(f"{flag} {value:g}: choose {words}")


class Run:
    """The run folder: resumes from it, writes metrics.jsonl, last.pt, backbone.pt and the pictures,
    and prints the table. A method calls log after every step, end_epoch and finish; its main()
    shows how.

    Resumes model and `state`, {name: anything with state_dict and load_state_dict}; evaluates
    model.backbone. reference_loss: (word, value) of a dotted line beside the loss, for example
    ("chance", log 4). show(views) -> {heading: images (n, 3, h, w) in [0, 1]}: what views.png
    shows of the first views; by default the views themselves."""

    def __init__(self, name, args, data, loader, model, state, reference_loss=None, show=None):
        self.name = name
        self.args = args
        test = data.test and thin(data.test, args.bank)
        self.data = data._replace(bank=thin(data.bank, args.bank), test=test)
        self.loader = loader
        self.device = loader.device
        self.model = model
        self.state = {"model": model, **state}
        self.reference_loss = reference_loss
        self.show = show or numbered_views
        default = f"{name}-{data.name}-{args.seed}"
        self.folder = Path(args.out.replace("METHOD-DATA-SEED", default))
        self.metrics = self.folder / "metrics.jsonl"
        self.last = self.folder / "last.pt"
        self.settings = {k: v for k, v in vars(args).items() if k not in NO_SETTINGS}
        self.settings["train_images"] = loader.count
        self.total = args.epochs * loader.steps
        self.step = 0
        self.seconds = 0.0  # of training, over all starts
        self.clock = 0.0  # when the seconds were last added up
        self.pending = []  # steps whose losses are still on the device
        self.knn = {}  # for the progress bar
        self.baselines = {}
        # With many images the baselines take long: then the training comes first.
        self.late = len(self.data.bank.images) > 10_000
        self.untrained = model.backbone.state_dict() if self.late else {}
        self.untrained = {name: w.cpu().clone() for name, w in self.untrained.items()}
        self.resume()

        self.bar = tqdm(
            total=self.total,
            initial=self.step,
            unit="step",
            smoothing=0.05,
            ncols=shutil.get_terminal_size().columns,
            disable=rank() > 0 or not sys.stderr.isatty(),
        )
        self.clock = self.saved_at = time.perf_counter()

    def resume(self):
        """Continues from last.pt, or measures the baselines and begins. Refuses a folder that holds
        a run with other settings."""
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder)
        barrier()
        lines = read_lines(self.metrics)
        started = [line["settings"] for line in lines if "settings" in line]
        earlier = [*started, self.settings][0]
        saved = None
        if self.last.exists():
            try:
                saved = torch.load(self.last, map_location="cpu", weights_only=True)
                earlier = saved["settings"]
            except OSError as error:
                fail(f"{self.last} cannot be opened ({error.strerror}): it may be sound")
            except Exception as error:  # torch.load raises nearly anything on a damaged file
                fail(
                    f"{self.last} is damaged ({type(error).__name__}): remove it to begin again, "
                    "or choose another --out"
                )

        if saved and not lines:
            fail(f"{self.folder} has a last.pt, but no metrics.jsonl: choose another --out")
        changed = []
        for name in sorted(earlier.keys() | self.settings.keys()):
            before, now = earlier.get(name), self.settings.get(name)
            same_folder = name == "data" and os.path.abspath(before) == os.path.abspath(now)
            if before != now and not same_folder and name != "eval_every":
                changed.append(f"{name} {before}, now {now}")
        if changed:
            fail(
                f"{self.folder} holds a run with other settings ({', '.join(changed)}): choose "
                "another folder with --out, or remove this one"
            )

        barrier()  # every process has looked before process 0 writes
        if not saved:
            self.begin()
        else:
            self.continue_from(saved, lines)
        if not self.late:
            self.measure_baselines()
            if not self.step:
                print0(table(self.baselines))

    def continue_from(self, saved, lines):
        for name, part in self.state.items():
            part.load_state_dict(saved["state"][name])
        self.step = saved["step"]
        self.seconds = saved["seconds"]
        self.baselines = saved["baselines"]
        self.untrained = saved["untrained"]
        if rank() == 0:  # steps that were logged but not saved will be done again
            kept = [line for line in lines if line.get("step", -1) < self.step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            replace_file(self.metrics, lambda file: file.write(text.encode()))
        if self.step < self.total:
            print0(f"{self.folder}: continuing after step {self.step} of {self.total}")

    def begin(self):
        device = device_name(self.device)
        test = self.data.test.images if self.data.test else ()
        if rank() == 0:
            first = {
                "method": self.name,
                "command": " ".join([f"methods/{self.name}.py", *self.args.argv]),
                "commit": commit(),
                "versions": versions(),
                "device": device,
                "world_size": world(),
                "settings": self.settings,
                "evaluated_on": {"bank": len(self.data.bank.images), "test": len(test)},
            }
            self.metrics.write_text(json.dumps(first) + "\n")
        print0(
            f"{self.folder}: {self.loader.count} images, {self.args.epochs} epochs of "
            f"{self.loader.steps} steps, {world()} x {self.args.batch // world()} images per step "
            f"on {device}"
        )
        if self.loader.reader.side < self.args.size:
            words = f"images of {self.loader.reader.side} pixels are enlarged to {self.args.size}"
            print0(f"note: {words}")
        self.save()

    def measure_baselines(self):
        """Raw pixels, and the same network untrained; each is kept as soon as it is there."""
        for name in ("pixels", "random_init"):
            if name in self.baselines:
                continue
            print0(f"measuring the baselines: {name}")
            network = self.model.backbone
            if name == "pixels":
                network = pixels(self.args.size, len(self.data.bank.images))
            elif self.untrained:
                network = copy.deepcopy(network)
                network.load_state_dict(self.untrained)
            self.baselines[name] = self.evaluate(network)
            self.save()

    def evaluate(self, network, only_knn=False):
        """evaluate() of a network. Its time does not count as training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        size, workers = self.args.size, self.args.workers
        result = evaluate(network, self.data, size, self.device, workers, only_knn)
        self.clock += time.perf_counter() - began
        return result

    def log(self, loss, lr, **more):
        """Called once per step, after the update. loss: scalar tensor; it stays on the device until
        ten steps are fetched together. more: further numbers or scalar tensors, each a column of
        metrics.jsonl; like the loss they are averaged over processes."""
        more = {"loss": loss, **more}
        values = {name: torch.as_tensor(value).detach() for name, value in more.items()}
        self.pending.append((self.step, lr, values))
        self.step += 1
        self.bar.update()
        # end_epoch does the same for the last step of an epoch
        if len(self.pending) >= 10 and self.step % self.loader.steps:
            self.flush()
            if time.perf_counter() - self.saved_at > SAVE_EVERY:
                self.save()

    def flush(self, **extra):
        """Writes the pending steps; `extra` goes to the last one. Ends the run if a loss is not
        finite."""
        steps, lrs, values = zip(*self.pending)
        names = list(values[0])
        values = torch.stack([torch.stack([v[name].float() for v in values]) for name in names])
        values = (all_reduce_sum(values) / world()).T.tolist()  # the mean over processes
        elapsed = time.perf_counter() - self.clock
        self.clock += elapsed
        self.seconds += elapsed
        self.pending = []

        rows = []
        rate = {"images_per_s": round(len(steps) * self.args.batch / elapsed, 1)}
        for step, lr, numbers in zip(steps, lrs, values):
            place = {"step": step, "epoch": step // self.loader.steps}
            rows.append(place | dict(zip(names, numbers)) | {"lr": lr} | rate)
            loss = rows[-1]["loss"]
            if not math.isfinite(loss):
                fail(
                    f"the loss is {loss} at step {step}, learning rate {lr:.3g}: {DIVERGED} "
                    f"{self.last}"
                )
        rows[-1] |= {"seconds": round(self.seconds, 1), **extra}
        if rank() == 0:
            append(self.metrics, rows)
            if not (self.folder / "views.png").exists():
                draw_views(self.folder / "views.png", self)

        self.row = rows[-1]
        self.words = {name: f"{self.row[name]:.3f}" for name in names}
        self.bar.set_postfix(epoch=self.row["epoch"] + 1, **self.words, **self.knn)

    def save(self):
        """last.pt: everything that resume needs. Refuses weights that are not finite, so the last
        state kept is good."""
        self.saved_at = time.perf_counter()
        if rank() > 0:
            return
        if not all(p.isfinite().all() for p in self.model.parameters()):
            fail(f"a weight is no longer finite after step {self.step - 1}: {DIVERGED} {self.last}")
        saved = {
            "state": {name: part.state_dict() for name, part in self.state.items()},
            "settings": self.settings,
            "baselines": self.baselines,
            "untrained": self.untrained,
            "step": self.step,
            "seconds": self.seconds,
        }
        replace_file(self.last, lambda file: torch.save(saved, file))

    def end_epoch(self, epoch):
        """kNN when it is due, metrics, checkpoint; one printed line if there is no progress bar."""
        done = epoch + 1
        found = {}
        if self.data.test and done % self.args.eval_every == 0 and done < self.args.epochs:
            found = self.evaluate(self.model.backbone, only_knn=True)
            self.knn = {"knn20": f"{found['knn20']:.1f}"}
        self.flush(**found)
        self.save()
        self.loader.reader.count_together()

        if self.bar.disable:
            knn = f"  knn20 {found['knn20']:.1f}" if found else ""
            words = "  ".join(f"{name} {word}" for name, word in self.words.items())
            rate = f"{self.row['images_per_s']:.0f} images/s"
            print0(f"epoch {done}/{self.args.epochs}  {words}  {rate}  {self.seconds:.0f} s{knn}")
        if found and rank() == 0:
            draw_curve(self.folder / "curve.png", self)

    def finish(self):
        """The evaluation, backbone.pt, pictures, table. A finished run only shows its table."""
        self.bar.close()
        lines = read_lines(self.metrics)
        barrier()  # every process has read before process 0 writes
        if "evaluation" not in lines[-1]:
            self.measure_baselines()
            print0("evaluating")
            last = {
                "evaluation": self.evaluate(self.model.backbone),
                **self.baselines,
                "train_seconds": round(self.seconds, 1),
                "unreadable_files": len(self.loader.reader.broken),
            }
            lines.append(last)
            draw_neighbours(self.folder / "neighbours.png", self)
            if rank() == 0:
                self.save_backbone()
                append(self.metrics, [last])  # at the end: it marks the run as complete
        if rank() == 0:
            draw_curve(self.folder / "curve.png", self)
        files = sorted(path.name for path in self.folder.iterdir() if path.name[0] != ".")
        print0(table(lines[-1], self.name))
        print0(f"{self.folder}: {', '.join(files)}")
        if dist.is_initialized():
            dist.destroy_process_group()

    def save_backbone(self):
        """backbone.pt, which load_backbone reads."""
        saved = {
            "method": self.name,
            "arch": self.args.arch,
            "size": self.args.size,
            "data": self.data.name,
            "weights": {name: w.cpu() for name, w in self.model.backbone.state_dict().items()},
        }
        replace_file(self.folder / "backbone.pt", lambda file: torch.save(saved, file))


def lock(folder):
    """Exits with a one-line message if another process writes into a run folder. The lock is gone
    with the process that has it, however that ends."""
    if not fcntl:  # Windows
        return None
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not passed on to workers
    except (BlockingIOError, PermissionError):
        file.seek(0)
        fail(f"{folder} is in use by {file.read().strip()}: wait, or choose another --out")
    except OSError as error:
        print0(f"note: {folder} cannot be locked ({error.strerror}): start no second run in it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def one_line(kind, error, traceback):
    """In place of a traceback, for what a user can cause: one sentence. See sys.excepthook."""
    if issubclass(kind, KeyboardInterrupt):
        text = "stopped: the same command continues"
    elif issubclass(kind, BrokenPipeError):
        sys.stdout = open(os.devnull, "w")  # or Python would complain once more at its end
        text = "error: nobody reads the output any more; the same command continues"
    elif issubclass(kind, torch.OutOfMemoryError | MemoryError) or "t allocate mem" in str(error):
        text = "error: out of memory: choose a smaller --batch, --size, --arch or --bank"
    elif issubclass(kind, RuntimeError) and " by peer" in str(error):
        text = "error: another process has ended; its message says why"
    elif issubclass(kind, OSError) and error.strerror:
        text = f"error: {error.filename or 'a file'}: {error.strerror}"
    else:
        return sys.__excepthook__(kind, error, traceback)
    print(f"\n{text}", file=sys.stderr)


def table(results, name=None):
    """Results of evaluate() as text: raw pixels, random init and, if named, the method."""
    rows = {"raw pixels": results["pixels"], "random init": results["random_init"]}
    if name:
        rows[name] = results["evaluation"]
    columns = ("knn20", "knn200", "linear", "retrieval1", "retrieval5", "rankme")
    heads = [head for head in columns if head in results["pixels"]]
    lines = [" " * 14 + "".join(f"{head:>11}" for head in heads)]
    for row, values in rows.items():
        lines.append(f"{row:14}" + "".join(f"{values[head]:11.1f}" for head in heads))
    return "\n".join(lines)


def read_lines(path):
    """The JSON lines of a file, none if there is no file. Lines that were cut short are dropped."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # cut short by a kill or a full disk
            continue
    return [line for line in lines if isinstance(line, dict)]


def append(path, rows):
    """Adds dicts to a file as JSON lines."""
    try:
        with open(path, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror}); what was saved before is kept")


def replace_file(path, write):
    """write(file) to a file beside path, then rename it: path is the old file or the new one, never
    half of it."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    except Exception as error:  # torch.save raises a RuntimeError of its own on a full disk
        reason = getattr(error, "strerror", None) or f"{error} ".splitlines()[0].strip()
        if shutil.disk_usage(path.parent).free < 2**20:
            reason = "no space left on the disk"
        part.unlink(missing_ok=True)  # makes space
        fail(f"{path} cannot be written ({reason}); what was saved before is kept")


def versions():
    modules = {"torch": torch, "torchvision": torchvision, "numpy": np}
    return {"python": platform.python_version()} | {k: m.__version__ for k, m in modules.items()}


def commit():
    """The commit of this project, with "-dirty" if files differ from it; None if not known."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"]
    command.append("--exclude=*")
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(": ")[2]
    threads = torch.get_num_threads()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"


def save_grid(path, rows, columns=(), names=(), green=(), note=""):
    """Saves rows of images (3, h, w) in [0, 1] as a picture with its words. The first column is set
    apart. columns: a heading for each; names: a word per row; green: places (row, column) that are
    framed in green; note: a line below."""
    font = ImageFont.load_default(size=13)
    side = max(64, *[image.shape[2] for image in rows[0]])
    left = 12 + round(max([font.getlength(name) for name in names], default=0))
    cell = side + 8
    xs = [left] + [left + 16 + c * cell for c in range(1, len(rows[0]))]
    ys = [26 + r * cell for r in range(len(rows))]
    width = max(xs[-1] + side + 8, round(font.getlength(note)) + 16)
    picture = Image.new("RGB", (width, ys[-1] + side + 32), "white")
    draw = ImageDraw.Draw(picture)

    for x, heading in zip(xs, columns):
        draw.text((x + side // 2, 5), heading, "black", font, anchor="ma")
    for y, name in zip(ys, names):
        draw.text((6, y + side // 2), name, "black", font, anchor="lm")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            x, y = xs[c], ys[r]
            if (r, c) in green:
                corners = (x - 4, y - 4, x + cell - 5, y + cell - 5)
                draw.rectangle(corners, (0, 178, 0))
            large = F.interpolate(image[None].float().cpu(), (side, side))[0]
            picture.paste(TF.to_pil_image(large), (x, y))
    draw.text((8, picture.height - 20), note, "black", font)
    replace_file(path, lambda file: picture.save(file, format="png"))


def numbered_views(views):
    return {f"view {i}": denormalize(view) for i, view in enumerate(views, 1)}


def draw_views(path, run):
    """What the network is shown: one row per image, which comes first, and one column per view."""
    index, views = run.loader.first_shown
    shown = run.show(views)
    images, _ = next(run.loader.reader.whole(index, run.args.size))
    rows = list(zip(images / 255, *[part.float().cpu() for part in shown.values()]))
    note = f"{run.name}: the image, then what the network is shown"
    save_grid(path, rows, ["image", *shown], note=note)


def draw_neighbours(path, run):
    """Twelve test images and the eight nearest to each (drawings: by other artists), framed green
    if they show the same emoji or have the same label."""
    split = run.data.test or run.data.bank
    x, _ = features(run.model.backbone, split, run.args.size, run.device, run.args.workers)
    if rank() > 0:
        return
    sample = torch.from_numpy(np.random.default_rng(0).permutation(len(x))[:12])
    apart = split.drawing
    if apart is None:
        apart = torch.arange(len(x), device=x.device)
    nearest = across_drawings(x, apart, 8, sample.to(x.device))
    chosen_images = torch.cat([sample[:, None], nearest.cpu()], 1)  # (12, 9)

    meaning = split.labels if split.emoji is None else split.emoji
    green = set()
    if meaning is not None:
        same = meaning.cpu()[chosen_images] == meaning.cpu()[chosen_images[:, :1]]
        same[:, 0] = False  # the query itself
        green = set(map(tuple, same.nonzero().tolist()))
    parts = split.images.whole(chosen_images.flatten(), run.args.size)
    images = torch.cat([images.cpu() for images, _ in parts]) / 255
    rows = [list(row) for row in images.split(chosen_images.shape[1])]

    among = " among the drawings of other artists" if split.drawing is not None else ""
    note = f"{run.name}: test images, each with its nearest{among}"
    if green:
        note += f"; green: {'the same emoji' if split.emoji is not None else 'the same label'}"
    columns = ["test image", *[str(i) for i in range(1, chosen_images.shape[1])]]
    save_grid(path, rows, columns, green=green, note=note)


def draw_curve(path, run):
    """Loss by epoch, with a reference if there is one; beside it, where there are labels, kNN
    (k = 20) by epoch with the baselines as lines."""
    from matplotlib.figure import Figure  # here, so --help and the first step need not wait for it

    lines = read_lines(run.metrics)
    rows = [line for line in lines if "loss" in line]
    panels = 2 if run.data.test else 1
    figure = Figure((4.5 * panels, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]

    loss = axes[0]
    loss.set(xlabel="epoch", ylabel="loss", title=f"{run.name} on {run.data.name}")
    epochs = [row["step"] / run.loader.steps for row in rows]
    loss.plot(epochs, [row["loss"] for row in rows], linewidth=0.8)
    if run.reference_loss:
        word, value = run.reference_loss
        loss.axhline(value, color="tab:red", linestyle=":", label=f"{word}, {value:.2f}")
        loss.legend()

    if run.data.test:
        points = []
        if run.baselines:
            points = [(0, run.baselines["random_init"]["knn20"])]
        points += [(row["epoch"] + 1, row["knn20"]) for row in rows if "knn20" in row]
        for line in lines:
            if "evaluation" in line:
                points.append((run.args.epochs, line["evaluation"]["knn20"]))
        accuracy = axes[1]
        accuracy.set(xlabel="epoch", ylabel="%", title="kNN accuracy (k = 20)")
        accuracy.plot(*zip(*points), marker="o", label=run.name)
        baselines = (("pixels", "raw pixels", "--"), ("random_init", "random init", ":"))
        for name, label, style in baselines if run.baselines else ():
            value = run.baselines[name]["knn20"]
            accuracy.axhline(value, color="gray", linestyle=style, label=label)
        accuracy.legend()
    replace_file(path, lambda file: figure.savefig(file, format="png"))
