"""What every method shares, because results could not be compared if it differed: data, views, evaluation, plumbing.

  1 data        load_data(name, root, device)       -> Data: training, bank and test images (uint8), their labels
  2 views       Crop, Loader                        -> batches of random views, the same for any number of processes
                random_flip, color_jitter, random_grayscale, gaussian_blur, solarize, normalize: batched, per sample
  3 network     backbone(arch, size)                -> ResNet without its classifier
  4 evaluation  evaluate(network, data, size, ...)  -> dict: kNN, linear probe, retrieval, collapse panel
  5 processes   start, rank, world, gather, all_reduce_sum, distribute
  6 run folder  Run: resume, metrics, checkpoints, pictures, the table at the end

    python common.py runs/simclr-emoji-0/backbone.pt --data fashion      evaluates a saved backbone on any data set

Randomness: every random number of a run comes from numpy's SeedSequence([seed, epoch, step, view, stream]), drawn for
the whole GLOBAL batch, of which each process keeps the rows of its own images. So the order of the images, the views
and the training do not depend on the number of processes or workers, and a killed run resumes exactly.
"""

import argparse
import atexit
import datetime
import gzip
import importlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms import functional as TF
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
EMBEDDED = ("emoji", "fashion")  # in tests/data: no download, ever
DOWNLOADED = {"fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts the files
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
BICUBIC = TF.InterpolationMode.BICUBIC
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, the convention of most published backbones
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SAVE_EVERY = 180  # seconds between checkpoints inside an epoch
ADVICE = "lower --lr or lengthen the warm-up, and choose another --out; the last good state is kept in"

def fail(message, only_first=True):
    """Ends the program with one sentence on stderr and exit code 1; by default only the first process prints it."""
    if os.environ.get("RANK", "0") == "0" or not only_first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(1)
# -------- 1. Data -----------------------------------------------------------------------------------------------------

class Split(NamedTuple):
    """images: (N, 3, H, W) uint8 on the training device, or a list of N file paths. labels: (N,) int64, or None. emoji,
    drawing: (N,) int64 or None, what is drawn and by which artist: for retrieval across drawings."""
    images: object
    labels: torch.Tensor | None = None
    emoji: torch.Tensor | None = None
    drawing: torch.Tensor | None = None

class Data(NamedTuple):
    """train: what the method learns from; its labels are not used. bank: the labelled training images, for kNN and the probe
    (train itself, unless that holds unlabelled images). test: held out; None where there are no labels."""
    name: str
    train: Split
    bank: Split
    test: Split | None

def load_data(name, root, device):
    """An embedded data set (emoji, fashion), one that torchvision downloads into `root` (fashion-mnist, cifar10, cifar100,
    stl10), or the path of a folder of images. Ends the program with one sentence if it cannot be had."""
    if name in EMBEDDED:
        with np.load(HERE / "tests" / "data" / f"{name}.npz") as file:
            parts = [p for p in ("images", "labels", "emoji", "drawing") if f"train_{p}" in file]
            train, test = (to_split(device, *(file[f"{s}_{p}"] for p in parts)) for s in ("train", "test"))
            return Data(name, train, train, test)
    if name in DOWNLOADED:
        return download_data(name, Path(root), device)
    if Path(name).is_dir():
        return folder_data(Path(name).resolve())
    fail(f"--data {name}: neither a data set ({', '.join([*EMBEDDED, *DOWNLOADED])}) nor an existing folder")

def to_split(device, images, *numbers):
    """uint8 (N, H, W), (N, H, W, 3) or (N, 3, H, W) and arrays (N,) -> Split. Grey becomes three equal channels."""
    images = torch.as_tensor(np.asarray(images))
    if images.ndim == 3 or images.shape[3] == 3:
        images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    numbers = (torch.as_tensor(np.asarray(a), dtype=torch.int64).to(device) for a in numbers)
    return Split(images.contiguous().to(device), *numbers)

def download_data(name, root, device):
    def idx(file, header):  # Debian's copy, in the IDX format: a fixed header, then the bytes
        return np.frombuffer(bytearray(gzip.decompress((DEBIAN_FASHION / file).read_bytes())), np.uint8, offset=header)

    def get(split):
        if name == "fashion-mnist" and DEBIAN_FASHION.is_dir():
            stem = {"train": "train", "test": "t10k"}[split]
            images = idx(f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
            return to_split(device, images, idx(f"{stem}-labels-idx1-ubyte.gz", 8))
        which = {"split": split} if name == "stl10" else {"train": split == "train"}
        found = kind(root, download=True, **which)
        return to_split(device, found.data, found.labels if name == "stl10" else found.targets)

    kind = getattr(torchvision.datasets, DOWNLOADED[name])
    if rank() > 0:
        barrier()  # process 0 downloads; the others wait, then read the same files
    try:
        train = bank = get("train")
        test = get("test")
        if name == "stl10":  # learns from 5,000 labelled and 100,000 unlabelled images
            train = Split(torch.cat([bank.images, get("unlabeled").images]))
    except (OSError, RuntimeError) as error:
        fail(f"--data {name}: torchvision could not download it into {root.resolve()} ({str(error).splitlines()[0]}). "
             f"Put the files of torchvision's {kind.__name__} there (--root names the folder), or use a data set that "
             f"needs no download: {', '.join(EMBEDDED)}, or fashion-mnist from Debian's package dataset-fashion-mnist")
    if rank() == 0:
        barrier()
    return Data(name, train, bank, test)

def folder_data(path):
    """train/ and val/ with class folders (ImageNet's layout); or class folders, of which one image in ten (at least one a
    class, by a hash of its name) is held out; or plain images at any depth, without labels."""
    def files(folder):
        return sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())

    def by_class(folder):
        found = {d.name: files(d) for d in sorted(folder.iterdir()) if d.is_dir()} if folder.is_dir() else {}
        return {name: paths for name, paths in found.items() if paths}

    def split(found):
        return Split([f for name in classes for f in found.get(name, [])],
                     torch.tensor([i for i, name in enumerate(classes) for _ in found.get(name, [])]))

    base = path / "train" if (path / "train").is_dir() else path
    train, test = by_class(base), by_class(path / "val") if base != path else {}
    if len(train) < 2 or any(p.suffix.lower() in ENDINGS for p in base.iterdir()):
        images = Split(files(base))
        if not images.images:
            fail(f"--data {path}: no images found. Expected class folders of {', '.join(ENDINGS)} files, train/ and "
                 "val/ with class folders, or plain images")
        print0(f"{path}: {len(images.images)} images without class folders: evaluation by labels is not possible")
        return Data(path.name, images, images, None)
    if not test:
        for name, paths in train.items():
            paths = sorted(paths, key=lambda p: zlib.crc32(str(p.relative_to(path)).encode()))
            cut = max(1, len(paths) // 10)
            test[name], train[name] = sorted(paths[:cut]), sorted(paths[cut:])
    classes = sorted(train)
    if unknown := set(test) - set(classes):
        fail(f"--data {path}: val/ has classes that train/ lacks: {', '.join(sorted(unknown)[:5])}")
    train, test = split(train), split(test)
    print0(f"{path}: {len(train.images)} training and {len(test.images)} test images of {len(classes)} classes")
    return Data(path.name, train, train, test)

def load_picture(path):
    """An image file -> PIL RGB, upright: grey, palette, CMYK, 16-bit converted, transparency on white. Raises as PIL does."""
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith(("I", "F")):  # 16-bit grey, which PIL's convert would clip instead of scale
        picture = Image.fromarray((np.asarray(picture, np.float32) / 257).clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")

class Folder(Dataset):
    """Image files, decoded by worker processes into uint8 (3, size, size), with the indices of broken files beside them. To
    train (crops given), a key is (index, one row of crop numbers per view) and gives one crop per view; a broken file gives way
    to the next one. To evaluate, a key is an index and gives the centre of the image, black if broken."""

    def __init__(self, paths, crops=None, size=None):
        self.paths, self.crops, self.size, self.broken = paths, crops, size, set()

    def __getitem__(self, key):
        index, draws = key if self.crops else (key, None)
        picture, broken = None, []
        while picture is None and len(broken) < (100 if self.crops else 1):
            try:
                picture = load_picture(self.paths[index])
            except Exception:  # PIL raises nearly anything on a broken file
                broken, index = [*broken, index], (index + 1) % len(self.paths)
        picture = picture or Image.new("RGB", (256, 256))
        if self.crops:
            boxes = [crop.boxes(u[None], picture.height, picture.width)[0].tolist() for crop, u in zip(self.crops, draws)]
            views = [TF.resized_crop(picture, *box, [crop.size] * 2, BICUBIC) for crop, box in zip(self.crops, boxes)]
        else:  # shorter side to 256/224 of the size, as ImageNet models are evaluated, then the centre
            views = [TF.center_crop(TF.resize(picture, round(self.size * 256 / 224), BICUBIC), self.size)]
        return [TF.pil_to_tensor(view) for view in views], broken

    @staticmethod
    def collate(samples):
        views = [torch.stack(view) for view in zip(*(views for views, _ in samples))]
        return views, [index for _, broken in samples for index in broken]

    def check(self, views, broken):
        """Warns of each broken file once, ends the run if they are more than 1 in 100; returns the views."""
        for index in set(broken) - self.broken:
            self.broken.add(index)
            print(f"warning: left out, cannot be read as an image: {self.paths[index]}", file=sys.stderr, flush=True)
        if len(self.broken) > len(self.paths) / 100:
            fail(f"{len(self.broken)} of {len(self.paths)} images cannot be read, more than 1 in 100: remove them, for "
                 f"example {self.paths[min(self.broken)]}", only_first=False)
        return views
# -------- 2. Views ----------------------------------------------------------------------------------------------------

class BatchRandom:
    """Uniform random numbers for the images of one batch, drawn on the CPU for the whole global batch, cut to `rows`."""

    def __init__(self, key, batch, rows=slice(None)):
        self.generator, self.batch, self.rows = np.random.default_rng(key), batch, rows

    def uniform(self, low=0.0, high=1.0, columns=()):
        """float32 (n, *columns) on the CPU, for the n images of this process."""
        u = self.generator.random((self.batch, *columns), dtype=np.float32)[self.rows]
        return torch.from_numpy(low + (high - low) * u)

class Crop(NamedTuple):
    """RandomResizedCrop: a box of `scale` of the image's area and `ratio` (width / height), resized to (size, size)."""
    size: int
    scale: tuple = (0.08, 1.0)
    ratio: tuple = (3 / 4, 4 / 3)

    def boxes(self, u, height, width):
        """Uniform u (n, 22) -> (n, 4) int: top, left, height, width. torchvision's rule: ten tries of a uniform area and a
        log-uniform ratio, the first that fits, else the largest centred box within the ratios."""
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, :10])  # (n, 10)
        ratio = np.exp(np.log(self.ratio[0]) + np.log(self.ratio[1] / self.ratio[0]) * u[:, 10:20])
        w, h = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
        fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
        first = fits.argmax(1)[:, None]
        w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
        top, left = (u[:, 20] * (height - h + 1)).astype(int), (u[:, 21] * (width - w + 1)).astype(int)
        none = ~fits.any(1)
        w[none], h[none] = min(width, round(height * self.ratio[1])), min(height, round(width / self.ratio[0]))
        top[none], left[none] = (height - h[none]) // 2, (width - w[none]) // 2
        return np.stack([top, left, h, w], 1)

def resize_matrix(start, length, size_in, size_out):
    """(n, size_out, size_in): row i weighs the pixels of [start, start + length) that make output pixel i, by PIL's antialiased
    bicubic filter (a = -1/2). start, length: (n,) int. Resizing is then one matrix product per axis."""
    start, length = start[:, None, None].float(), length[:, None, None].float()
    step = length / size_out
    pixel = torch.arange(size_in, device=start.device) + 0.5 - start  # (n, 1, size_in), measured from the box
    centre = (torch.arange(size_out, device=start.device)[:, None] + 0.5) * step  # (n, size_out, 1)
    t = (pixel - centre).div_(step.clamp(min=1)).abs_()  # shrinking widens the filter
    t1, t2 = t.clamp(max=1), t.clamp(1, 2)  # the filter has two pieces; each ends in 0, so they can be added
    weight = (1.5 * t1 - 2.5).mul_(t1).mul_(t1).add_(1) + (-0.5 * t2 + 2.5).mul_(t2).sub_(4).mul_(t2).add_(2)
    weight.mul_((pixel > 0) & (pixel < length))
    return weight.div_(weight.sum(2, keepdim=True))

def resized_crop(images, boxes, size):
    """images (n, 3, H, W) uint8, boxes (n, 4) int -> (n, 3, size, size) float in [0, 1]: each image's own box, resized."""
    n, _, height, width = images.shape
    top, left, h, w = torch.as_tensor(boxes).to(images.device).unbind(1)
    x = images.float().mul_(1 / 255).view(n, 3 * height, width) @ resize_matrix(left, w, width, size).transpose(1, 2)
    x = resize_matrix(top, h, height, size)[:, None] @ x.view(n, 3, height, size)
    return x.clamp_(0, 1)  # bicubic overshoots

# The following take and return float (n, 3, H, W) in [0, 1] and draw one set of parameters per image from rand.

def random_flip(x, rand, p=0.5):
    """Horizontal flip with probability p."""
    return torch.lerp(x, x.flip(3), column(rand.uniform() < p, x))  # lerp by exactly 0 or 1: faster than where

def random_grayscale(x, rand, p):
    return torch.lerp(x, luminance(x).expand_as(x), column(rand.uniform() < p, x))

def color_jitter(x, rand, brightness, contrast, saturation, hue, p=1.0):
    """With probability p: brightness, contrast and saturation times a factor from 1 - s to 1 + s, hue shifted by -hue to hue of
    a turn, the four in random order, clamped to [0, 1] after each. torchvision's ColorJitter."""
    on = rand.uniform() < p
    order = rand.uniform(columns=(4,)).argsort(1)  # (n, 4): which operation comes first, second ...
    factor = [rand.uniform(max(0.0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)]
    factor = torch.stack([*factor, torch.ones(len(x))], 1)  # in hue's turn the blend below has f = 1: nothing changes
    shift, x = rand.uniform(-hue, hue), x.clone()
    for operation in order.unbind(1):
        # brightness, contrast, saturation are f x + (1 - f) m, where m is 0, the mean grey level, or the grey image
        f = torch.where(on, factor.gather(1, operation[:, None])[:, 0], 1.0)
        grey = luminance(x)
        mean = grey.mean((2, 3), keepdim=True)
        x.mul_(column(f, x)).add_(grey.mul_(column((1 - f) * (operation == 2), x)))
        x.add_(mean * column((1 - f) * (operation == 1), x)).clamp_(0, 1)
        i = chosen(on & (operation == 3), x)
        x[i] = shift_hue(x[i], column(shift, x)[i])
    return x

def shift_hue(x, shift):
    """RGB -> HSV, hue + shift (n, 1, 1, 1) in turns, HSV -> RGB. Sorting the channels by max and min gives the hue of any of
    the six sextants from one formula, without a branch per pixel."""
    r, g, b = x.split(1, 1)
    high, low = torch.maximum(g, b), torch.minimum(g, b)
    value, middle = torch.maximum(r, high), torch.minimum(r, high)
    least = torch.minimum(middle, low)
    chroma = value - least
    sextant = (g < b).to(x.dtype) * -6  # the hue at which the sextant starts, in sixths of a turn; its sign is dropped
    sextant += (r < high).to(x.dtype) * (-2 - 2 * sextant)  # where red is not the largest, -2 - sextant
    hue = (sextant + (middle - low) / chroma.clamp(min=1e-12)).abs_().add_(6 * shift)
    hue -= 6 * (hue / 6).floor_()
    ramps = torch.cat([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1)  # of r, g, b
    return ramps.clamp_(0, 1).mul_(chroma).add_(least)

def gaussian_blur(x, rand, p, sigma=(0.1, 2.0)):
    """With probability p: torchvision's GaussianBlur, sigma uniform in `sigma` pixels, taps a tenth of the side (SimCLR)."""
    size, radius = x.shape[3], x.shape[3] // 20
    on, sigma = rand.uniform() < p, rand.uniform(*sigma)
    i, offset = chosen(on, x), torch.arange(-radius, radius + 1)
    taps = torch.exp(-0.5 * (offset / sigma[on][:, None]) ** 2)  # (k, taps) for the k chosen images
    taps = (taps / taps.sum(1, keepdim=True))[:, None].expand(-1, size, -1)
    source = (torch.arange(size)[:, None] + offset).abs()  # (size, taps), reflected at the left ...
    source = (size - 1 - (size - 1 - source).abs()).expand(len(taps), -1, -1)  # ... and at the right
    matrix = torch.zeros(len(taps), size, size).scatter_add_(2, source, taps).to(x)[:, None]
    return x.index_copy(0, i, matrix @ x[i] @ matrix.transpose(2, 3))

def solarize(x, rand, p):
    """With probability p: pixels at or above 128 / 255 are inverted. torchvision's RandomSolarize."""
    i = chosen(rand.uniform() < p, x)
    return x.index_copy(0, i, torch.where(x[i] >= 128 / 255, 1 - x[i], x[i]))

def normalize(x):
    """[0, 1] to about zero mean and unit variance, by ImageNet's statistics: for all methods and their evaluation."""
    mean, std = (torch.tensor(v).to(x).view(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std

def luminance(x):
    """Grey level (n, 1, H, W) by ITU-R 601."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)

def column(values, x):
    """(n,) on the CPU -> (n, 1, 1, 1) beside x, to treat each image by its own number."""
    return values.to(x, non_blocking=True).view(-1, 1, 1, 1)

def chosen(mask, x):
    """Boolean (n,) on the CPU -> indices beside x. Found on the CPU, so that the GPU is not waited for."""
    return mask.nonzero()[:, 0].to(x.device, non_blocking=True)

class Loader:
    """Batches of random views: loader(epoch, done) yields (step, [view, ...]), each (batch / world, 3, size, size).

    views: a (Crop, augment) for each; augment(x, rand) takes crops (n, 3, size, size) in [0, 1] and returns what the network is
    shown. Images in memory are cropped on their device, those of a folder by `workers` processes that only decode and crop.
    batch counts the images of all processes; an incomplete last batch is dropped."""
    def __init__(self, split, views, batch, seed, device, workers=0):
        self.images, self.views, self.batch, self.seed, self.device = split.images, views, batch, seed, device
        self.count, self.in_memory, self.shown = len(split.images), torch.is_tensor(split.images), None
        if not 0 < batch <= self.count or batch % world():
            several = f", a multiple of {world()} (the processes)" if world() > 1 else ""
            fail(f"--batch {batch}: choose 1 to {self.count}, the number of images{several}")
        if bad := [crop for crop, _ in views if crop.size < 1 or not 0 < crop.scale[0] <= crop.scale[1] <= 1]:
            fail(f"views like {bad[0]}: choose a positive side (--size, --small), a --min-crop (or --scale) above 0, up to 1")
        self.steps, share = self.count // batch, batch // world()  # steps per epoch, images per process
        self.rows = slice(rank() * share, (rank() + 1) * share)
        if not self.in_memory:
            self.folder = Folder(split.images, [crop for crop, _ in views])
            self.stream = DataLoader(self.folder, batch_sampler=self, collate_fn=Folder.collate, persistent_workers=workers > 0,
                                     num_workers=min(workers, CORES), pin_memory=device.type == "cuda")

    def random(self, epoch, step, view, stream):
        return BatchRandom([self.seed, epoch, step, view, stream], self.batch, self.rows)

    def plan(self):
        """(indices (n,), [crop numbers (n, 22) of each view]) of the steps of self.epoch from self.first on."""
        order = np.random.default_rng([self.seed, self.epoch, 0, 0, 3]).permutation(self.count)
        for step in range(self.first, self.steps):
            draws = [self.random(self.epoch, step, v, 1).uniform(columns=(22,)).numpy() for v in range(len(self.views))]
            yield order[step * self.batch:(step + 1) * self.batch][self.rows], draws

    def __iter__(self):
        """The plan as batch sampler of the DataLoader of a folder: lists of (index, one row of crop numbers per view)."""
        for index, draws in self.plan():
            yield list(zip(index.tolist(), zip(*draws)))

    def __call__(self, epoch, done=0):
        """step counts over all epochs; `done` steps of the run are done, those of this epoch are skipped."""
        self.epoch, self.first = epoch, max(0, done - epoch * self.steps)
        for step, batch in enumerate(self.plan() if self.in_memory else self.stream, self.first):
            if self.in_memory:
                images = self.images[torch.from_numpy(batch[0]).to(self.device)]
                crops = [resized_crop(images, crop.boxes(u, *images.shape[2:]), crop.size)
                         for (crop, _), u in zip(self.views, batch[1])]
            else:
                crops = [x.to(self.device, non_blocking=True).float().div_(255) for x in self.folder.check(*batch)]
            views = [augment(x, self.random(epoch, step, v, 2)) for v, (x, (_, augment)) in enumerate(zip(crops, self.views))]
            if self.shown is None:
                self.shown = [view[:8].float().cpu() for view in views]  # for views.png
            yield epoch * self.steps + step, views
# -------- 3. Network --------------------------------------------------------------------------------------------------

def backbone(arch, size):
    """ResNet without its classifier: images (n, 3, size, size) -> features (n, net.out_dim). resnet18, resnet34, resnet50:
    torchvision's; up to 64 pixels with the stem of the CIFAR literature (3x3, stride 1, no max-pool). resnet14: sized for two
    CPU cores; 3x3 stem of stride 2, a bottleneck block a stage, 3/8 of the channels, no stride in the last stage. Saved weights
    load with backbone(arch, size).load_state_dict(torch.load("backbone.pt")); those of resnet18 trained at more than 64 pixels
    also with torchvision.models.resnet18().load_state_dict(torch.load("backbone.pt"), strict=False)."""
    if arch == "resnet14":
        net = ResNet(Bottleneck, [1, 1, 1, 1])
        net.inplanes, net.conv1, net.bn1 = 32, nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        for stage, (width, stride) in enumerate([(24, 1), (48, 2), (96, 2), (192, 1)], 1):
            setattr(net, f"layer{stage}", net._make_layer(Bottleneck, width, 1, stride))
    elif arch in ("resnet18", "resnet34", "resnet50"):
        net = getattr(torchvision.models, arch)()
        if size <= 64:
            net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    else:
        fail(f"--arch {arch}: choose resnet14, resnet18, resnet34 or resnet50")
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):  # as torchvision does, for those made anew
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    net.out_dim, net.fc = net.inplanes, nn.Identity()  # inplanes: the channels of the last stage
    return net
# -------- 4. Evaluation -----------------------------------------------------------------------------------------------

def evaluate(network, data, size, device, workers=0, only_knn=False):
    """What is measured of frozen features, as a dict, accuracies in percent: knn20, knn200, linear; on data with drawings
    retrieval1, retrieval5; the collapse panel. Without labels only the panel. network: normalised images (n, 3, size, size) ->
    (n, D). Every process must call it; process 0 computes, all get the result."""
    result, shown = {}, data.test or data.bank
    test, ok = features(network, shown, size, device, workers)
    if data.test:
        bank, bank_ok = features(network, data.bank, size, device, workers)
        sets = bank[bank_ok], data.bank.labels.to(device)[bank_ok], test[ok], data.test.labels.to(device)[ok]
        if rank() == 0:
            result = {f"knn{k}": knn(*sets, k) for k in (20, 200)}
            if not only_knn:
                result["linear"] = linear_probe(*sets, groups=data.bank.emoji)
            if data.test.emoji is not None:
                result |= {f"retrieval{k}": retrieval(test, data.test.emoji, data.test.drawing, k) for k in (1, 5)}
    if not only_knn:  # the one batch of pairs is made without workers, which would outlive it
        crop = (Crop(size, scale=(0.2, 1.0)), lambda x, rand: normalize(random_flip(x, rand)))
        _, pair = next(Loader(shown, [crop, crop], min(len(shown.images), 1024) // world() * world(), 0, device)(0))
        result |= collapse_panel(test[ok], *(gather(embed(network, x)) for x in pair))
    box = [result]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]

def features(network, split, size, device, workers=0):
    """Frozen features (N, D) in index order of one plain view per image: in memory the whole image, of a file the centre. Each
    process computes its share and gets all. Also (N,) bool, False for files that cannot be read."""
    count = len(split.images)
    share = -(-count // world())
    mine = torch.arange(rank() * share, (rank() + 1) * share).clamp(max=count - 1)  # equal shares; the surplus is cut
    folder = Folder(split.images, size=size)
    if torch.is_tensor(split.images):
        batches = (([split.images[i.to(device)]], []) for i in mine.split(256))
    else:
        batches = DataLoader(Subset(folder, mine.tolist()), 256, num_workers=min(workers, CORES), collate_fn=Folder.collate)
    found, readable = [], torch.ones(count, device=device)
    for (images,), broken in batches:
        x = folder.check(images, broken).to(device).float().div_(255)
        if x.shape[3] != size:
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp_(0, 1)
        found.append(embed(network, normalize(x)))
        readable[broken] = 0
    return gather(torch.cat(found))[:count], gather(readable[mine.to(device)])[:count] > 0

@torch.no_grad()
def embed(network, x):
    """Frozen features of a batch, float32 (n, D): the network in eval mode (and left as it was), no gradient."""
    training = network.training
    h = network.eval()(x.contiguous(memory_format=torch.channels_last)).flatten(1).float()
    network.train(training)
    return h

def pixels(size):
    """The network of the raw-pixel baseline: the image itself, averaged to at most 32x32."""
    return nn.AdaptiveAvgPool2d(min(32, size))

def knn(bank, bank_labels, test, test_labels, k, temperature=0.07):
    """Weighted k-nearest-neighbour accuracy in percent (Wu et al. 2018, arXiv 1805.01978, section 3.4): each of the k bank
    images of largest cosine s votes for its label with exp(s / temperature). Features (N, D), labels (N,)."""
    bank, test = F.normalize(bank, dim=1), F.normalize(test, dim=1)
    classes, correct = int(bank_labels.max()) + 1, 0
    for x, y in zip(test.split(512), test_labels.split(512)):
        s, nearest = (x @ bank.T).topk(min(k, len(bank)), 1)  # (n, k)
        votes = x.new_zeros(len(x), classes).scatter_add_(1, bank_labels[nearest], (s / temperature).exp())
        correct += (votes.argmax(1) == y).sum().item()
    return 100 * correct / len(test)

def linear_probe(bank, bank_labels, test, test_labels, groups=None):
    """Linear-probe accuracy in percent: multinomial logistic regression on frozen standardised features, solved to convergence.
    The weight decay, of 10, 3, 1, ... 1e-4, is that of the least loss on a fifth of the BANK (whole groups if given, so that
    near copies stay together); with it all of the bank is fitted. The test images choose nothing."""
    mean, std = bank.mean(0), bank.std(0) + 1e-6
    bank, test = (bank - mean) / std, (test - mean) / std
    variance, rotation = torch.linalg.eigh(bank.T @ bank / len(bank))  # decorrelates; a rotation changes no solution
    bank, test, variance = bank @ rotation, test @ rotation, variance.clamp(min=0)
    groups = torch.arange(len(bank)) if groups is None else groups.cpu()
    names = groups.unique()
    held = torch.isin(groups, names[np.random.default_rng(0).permutation(len(names))[:len(names) // 5]]).to(bank.device)
    zeros = bank.new_zeros(int(bank_labels.max()) + 1, bank.shape[1])  # a class each
    least, decay, solution = math.inf, 10, (zeros, zeros[:, 0])
    for candidate in (10, 3, 1, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4):
        solution = fit_logistic(bank[~held], bank_labels[~held], variance, candidate, *solution)
        loss = F.cross_entropy(F.linear(bank[held], *solution).double(), bank_labels[held]).item()  # steadier than accuracy
        if not loss < least:  # it falls, then rises: from here on the probe learns the bank by heart
            break
        least, decay = loss, candidate
    weight, bias = fit_logistic(bank, bank_labels, variance, decay, zeros, zeros[:, 0])
    return 100 * (F.linear(test, weight, bias).argmax(1) == test_labels).double().mean().item()

def fit_logistic(x, y, variance, decay, weight, bias):
    """argmin of mean cross-entropy + decay / 2 ||weight||^2 by L-BFGS, from (weight (C, D), bias (C,)), to a gradient of 1e-4.
    x (N, D) decorrelated, with the given variance per column: scaled by it, the way to the minimum is shorter."""
    scale = (0.1 * variance + decay).rsqrt()  # 0.1: about p (1 - p), the curvature of the softmax
    x, penalty = x * scale, decay * scale.double().square()
    weight, bias = (weight / scale).double().requires_grad_(), bias.double().requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-4, tolerance_change=0, history_size=10,
                               line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = (penalty * weight.square()).sum() / 2
        loss.backward()
        for some, labels in zip(x.split(1 << 17), y.split(1 << 17)):  # so that the logits of all of ImageNet are never there
            part = F.cross_entropy(F.linear(some, weight.float(), bias.float()).double(), labels, reduction="sum") / len(x)
            part.backward()
            loss = loss + part.detach()
        return loss

    solver.step(objective)
    return (weight.detach() * scale).float(), bias.detach().float()

def retrieval(x, emoji, drawing, k):
    """In percent: how often one of the k nearest test images BY OTHER ARTISTS shows the same emoji."""
    return 100 * (emoji[across_drawings(x, drawing, k)] == emoji[:, None]).any(1).double().mean().item()

def across_drawings(x, drawing, k):
    """(N, k) indices of the images of largest cosine among those of another drawing."""
    x = F.normalize(x, dim=1)
    return torch.cat([(q @ x.T).masked_fill_(d[:, None] == drawing, -2).topk(min(k, len(x)), 1).indices
                      for q, d in zip(x.split(512), drawing.split(512))])

def collapse_panel(x, x1, x2):
    """Signs of collapse. x (N, D): features; x1, x2 (M, D): features of two random crops of the same M images. feature_std, of
    normalised features over images: 1/sqrt(D) if spread evenly, 0 if collapsed. rankme, exp(entropy of the singular values): 1
    to min(N, D) (Garrido et al. 2023, arXiv 2210.02885). alignment, mean ||u1 - u2||^2 of normalised pairs: 0 is best;
    uniformity, log mean exp(-2 ||u - v||^2) over images: -4 is best, 0 collapsed (Wang, Isola 2020, arXiv 2005.10242)."""
    p = torch.linalg.svdvals(x)
    p = p / p.sum().clamp(min=1e-12) + 1e-7  # 1e-12: all features 0
    u, u1, u2 = (F.normalize(v, dim=1) for v in (x, x1, x2))
    panel = {"feature_std": u.std(0).mean(), "rankme": torch.exp(-(p * p.log()).sum()),
             "alignment": (u1 - u2).square().sum(1).mean(), "uniformity": (-2 * torch.pdist(u1) ** 2).exp().mean().log()}
    return {name: value.item() for name, value in panel.items()} | {"feature_std_isotropic": x.shape[1] ** -0.5}
# -------- 5. Processes ------------------------------------------------------------------------------------------------

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    return dist.get_world_size() if dist.is_initialized() else 1

def barrier():
    if world() > 1:
        dist.barrier()

def print0(*words):
    if rank() == 0:
        print(*words, flush=True)

def start(seed):
    """Joins torchrun's process group, if any (nccl on GPUs, gloo on CPUs), seeds the initial weights, returns the device."""
    if seed < 0:
        fail(f"--seed {seed}: a seed cannot be negative")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        store, *place = next(dist.rendezvous("env://"))  # torchrun keeps it over a restart; old addresses must not be met
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", None, datetime.timedelta(hours=2), place[1],
                                place[0], store)
        atexit.register([dist.group.WORLD].clear)  # if DistributedDataParallel held it last, torch 2.11 might hang as that goes
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

def gather(x):
    """(n, ...) on each process -> (world * n, ...) on all, in the order of the processes, which is that of the global batch.
    The gradient is exact: where each process returns the mean loss of its own rows, the average over processes that
    DistributedDataParallel takes is the gradient of the mean loss of the global batch."""
    if world() == 1:
        return x
    return all_reduce_sum(torch.cat([x if r == rank() else torch.zeros_like(x) for r in range(world())]))

class SyncBatchNorm(_BatchNorm):
    """Batch-norm over the images of all processes on any device (torch's own needs GPUs). The mean first, then the variance
    around it, so that no precision is lost; the gradient runs through both sums."""

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        dims, shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
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
    """The model as the loop calls it: on the device in channels_last, with several processes also synchronised batch-norm and
    DistributedDataParallel. Its parameters stay the same objects: optimise, save and evaluate those."""
    model.to(device, memory_format=torch.channels_last)
    if world() > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world() > 1:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = SyncBatchNorm  # the same parameters and buffers, another forward
    if compile:
        model = torch.compile(model)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.14 renames broadcast_buffers
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world() > 1 else model
# -------- 6. Run folder -----------------------------------------------------------------------------------------------

class Run:
    """The run folder: resumes from it, writes metrics.jsonl, last.pt, backbone.pt and the pictures, prints the table. A method
    calls log after every step, end_epoch and finish; its main() shows how. Resumes model and `state`, {name: anything with
    state_dict and load_state_dict}; evaluates model.backbone; collapse: the loss of a collapsed network."""

    def __init__(self, name, args, data, loader, model, state, collapse=None):
        self.name, self.args, self.data, self.loader, self.collapse = name, args, data, loader, collapse
        self.model, self.device, self.state = model.to(loader.device), loader.device, {"model": model, **state}
        self.folder = Path(args.out or f"runs/{name}-{data.name}-{args.seed}")
        self.metrics, self.last = self.folder / "metrics.jsonl", self.folder / "last.pt"
        self.settings = {k: v for k, v in vars(args).items() if k not in ("out", "root", "workers", "compile")}
        self.settings["train_images"] = loader.count
        self.step, self.seconds, self.clock, self.pending, self.knn = 0, 0.0, 0.0, [], {}
        if args.epochs < 1 or args.batch < 2:  # batch-norm needs two
            fail(f"--epochs {args.epochs}, --batch {args.batch}: choose at least 1 epoch and 2 images")
        self.resume()
        self.bar = tqdm(total=args.epochs * loader.steps, initial=self.step, unit="step", smoothing=0.05,
                        disable=rank() > 0 or not sys.stderr.isatty())
        self.clock = self.saved_at = time.perf_counter()

    def resume(self):
        """Continues from last.pt, or measures the baselines and begins. Refuses a folder of other settings."""
        lines = read_lines(self.metrics)
        try:
            saved = torch.load(self.last, map_location="cpu", weights_only=True) if self.last.exists() else None
        except Exception as error:  # torch.load raises nearly anything on a damaged file
            fail(f"{self.last} cannot be read ({type(error).__name__}): remove it to begin again, or choose another --out")
        there = saved["settings"] if saved else lines[0]["settings"] if lines else self.settings
        if changed := {k for k in {**there, **self.settings} if there.get(k) != self.settings.get(k)}:
            changed = ", ".join(f"{k} {there.get(k)}, now {self.settings.get(k)}" for k in sorted(changed))
            fail(f"{self.folder} holds a run with other settings ({changed}): choose another --out, or remove it")
        barrier()  # every process has looked before process 0 writes
        if saved:
            for name, part in self.state.items():
                part.load_state_dict(saved["state"][name])
            self.step, self.seconds, self.baselines = saved["step"], saved["seconds"], saved["baselines"]
            if rank() == 0:  # steps that were logged but not saved will be done again
                kept = "".join(json.dumps(line) + "\n" for line in lines if line.get("step", -1) < self.step)
                replace_file(self.metrics, lambda file: file.write(kept.encode()))
            return print0(f"{self.folder}: continuing after step {self.step} of {self.args.epochs * self.loader.steps}")
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            versions = {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, torchvision, np)}}
            self.metrics.write_text(json.dumps({
                "method": self.name, "command": " ".join([f"methods/{self.name}.py", *sys.argv[1:]]), "commit": commit(),
                "versions": versions, "device": device_name(self.device), "world_size": world(),
                "settings": self.settings}) + "\n")
        print0(f"{self.folder}: {self.loader.count} images, {self.args.epochs} epochs of {self.loader.steps} steps, {world()} "
               f"x {self.args.batch // world()} images a step on {device_name(self.device)}\nmeasuring the baselines")
        self.baselines = {"pixels": self.evaluate(pixels(self.args.size)), "random_init": self.evaluate()}
        self.save()
        print0(table(self.baselines))

    def evaluate(self, network=None, only_knn=False):
        """evaluate() of the backbone or another network; the time it takes does not count as training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began, network = time.perf_counter(), network or self.model.backbone
        result = evaluate(network, self.data, self.args.size, self.device, self.args.workers, only_knn)
        self.clock += time.perf_counter() - began
        return result

    def log(self, loss, lr):
        """Once a step, after the update. The loss stays on the device until ten steps are fetched together."""
        self.pending.append((self.step, loss.detach(), lr))
        self.step += 1
        self.bar.update()
        if len(self.pending) >= 10 and self.step % self.loader.steps:  # end_epoch does the same for the last step
            self.flush()
            if time.perf_counter() - self.saved_at > SAVE_EVERY:
                self.save()

    def flush(self, **extra):
        """Writes the pending steps, losses averaged over processes; extra goes to the last. Ends if one is not finite."""
        steps, losses, lrs = zip(*self.pending)
        losses = (all_reduce_sum(torch.stack(losses).float()) / world()).tolist()
        elapsed = time.perf_counter() - self.clock
        self.clock, self.seconds, self.pending = self.clock + elapsed, self.seconds + elapsed, []
        rate = round(len(losses) * self.args.batch / elapsed, 1)
        rows = [{"step": step, "epoch": step // self.loader.steps, "loss": loss, "lr": lr, "images_per_s": rate}
                for step, loss, lr in zip(steps, losses, lrs)]
        rows[-1] |= {"seconds": round(self.seconds, 1), **extra}
        for row in rows:
            if not math.isfinite(row["loss"]):
                fail(f"the loss is {row['loss']} at step {row['step']}, learning rate {row['lr']:.3g}: {ADVICE}, {self.last}")
        if rank() == 0:
            with open(self.metrics, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
            if not (self.folder / "views.png").exists():
                draw_views(self.folder / "views.png", self.loader.shown)
        self.row = rows[-1]
        self.bar.set_postfix(epoch=self.row["epoch"] + 1, loss=f"{self.row['loss']:.3f}", **self.knn)

    def save(self):
        """last.pt: everything that resume needs. Refuses weights that are not finite: the last state kept is good."""
        self.saved_at = time.perf_counter()
        if rank() == 0:
            if not all(p.isfinite().all() for p in self.model.parameters()):
                fail(f"a weight is no longer finite after step {self.step - 1}: {ADVICE}, {self.last}")
            saved = {"state": {name: part.state_dict() for name, part in self.state.items()}, "settings": self.settings,
                     "baselines": self.baselines, "step": self.step, "seconds": self.seconds}
            replace_file(self.last, lambda file: torch.save(saved, file))

    def end_epoch(self, epoch):
        """kNN when it is due, metrics, checkpoint; one line where there is no progress bar."""
        found, done = {}, epoch + 1
        if self.data.test and done % max(1, self.args.eval_every) == 0 and done < self.args.epochs:
            found = self.evaluate(only_knn=True)
            self.knn = {"knn20": f"{found['knn20']:.1f}"}
        self.flush(**found)
        self.save()
        if not self.loader.in_memory and world() > 1:  # files that another process could not read count, too
            dist.all_gather_object(broken := [None] * world(), self.loader.folder.broken)
            self.loader.folder.broken.update(*broken)
            self.loader.folder.check((), ())
        if self.bar.disable:
            print0(f"epoch {done}/{self.args.epochs}  loss {self.row['loss']:.3f}  {self.row['images_per_s']:.0f} images/s  "
                   f"{self.seconds:.0f} s" + (f"  knn20 {found['knn20']:.1f}" if found else ""))
        if found and rank() == 0:
            draw_curve(self.folder / "curve.png", self)

    def finish(self):
        """The evaluation, backbone.pt, pictures, table. A finished run only shows its table again."""
        self.bar.close()
        lines = read_lines(self.metrics)
        barrier()  # every process has read before process 0 writes
        if "evaluation" not in lines[-1]:
            print0("evaluating")
            lines.append({"evaluation": self.evaluate(), **self.baselines, "train_seconds": round(self.seconds, 1),
                          "unreadable_files": 0 if self.loader.in_memory else len(self.loader.folder.broken)})
            weights = {name: w.cpu() for name, w in self.model.backbone.state_dict().items()}
            draw_neighbours(self.folder / "neighbours.png", self)
            if rank() == 0:
                replace_file(self.folder / "backbone.pt", lambda file: torch.save(weights, file))
                with open(self.metrics, "a") as file:  # the line that ends a run: what comes before it is there
                    file.write(json.dumps(lines[-1]) + "\n")
        if rank() == 0:
            draw_curve(self.folder / "curve.png", self)
        print0(f"{table(lines[-1], self.name)}\n{self.folder}: {', '.join(sorted(p.name for p in self.folder.iterdir()))}")
        if dist.is_initialized():
            dist.destroy_process_group()

def table(results, name=None):
    """Results of evaluate() as text: raw pixels, random initialisation and, if named, the method."""
    rows = {"raw pixels": results["pixels"], "random init": results["random_init"], name: results.get("evaluation")}
    heads = [h for h in ("knn20", "knn200", "linear", "retrieval1", "retrieval5", "rankme") if h in results["pixels"]]
    return "\n".join([" " * 14 + "".join(f"{h:>11}" for h in heads)]
                     + [f"{row:14}" + "".join(f"{r[h]:11.1f}" for h in heads) for row, r in rows.items() if r])

def read_lines(path):
    """The JSON lines of a file, none if there is no file; a last line that a kill cut short is dropped."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]

def replace_file(path, write):
    """write(file) to a file beside path, then rename: path is the old file or the new one, at no moment half of it."""
    with open(path.with_suffix(".part"), "wb") as file:
        write(file)
    os.replace(path.with_suffix(".part"), path)

def commit():
    """The commit of this project, with "-dirty" if files differ from it; None where that is not known."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which("git") else ""
    return found.strip() or None

def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    model = [line.partition(": ")[2] for line in lines if line.startswith("model name")] or [platform.machine()]
    return f"{model[0]}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"

def save_grid(path, rows, green=()):
    """Saves rows of images (3, h, w) in [0, 1] as a picture; those at the (row, column) in green are framed so."""
    side, cells = max(64, *(x.shape[2] for x in rows[0])), []
    for r, c, x in ((r, c, x) for r, row in enumerate(rows) for c, x in enumerate(row)):
        frame = torch.tensor([0.0, 0.7, 0.0] if (r, c) in green else [1.0, 1.0, 1.0]).view(3, 1, 1)
        cells.append(frame.repeat(1, side + 8, side + 8))
        cells[-1][:, 4:-4, 4:-4] = F.interpolate(x[None].float().cpu(), (side, side))[0]
    picture = torchvision.utils.make_grid(cells, nrow=len(rows[0]), padding=0)
    replace_file(path, lambda file: torchvision.utils.save_image(picture, file, format="png"))

def draw_views(path, views):
    """What the network is shown: a row per image, a column per view (or, for a view of several parts, per part)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    parts = [part * std + mean for view in views for part in (view.unbind(1) if view.ndim == 5 else [view])]
    save_grid(path, list(zip(*(part.clamp(0, 1) for part in parts))))

def draw_neighbours(path, run):
    """Twelve test images and the eight nearest to each (drawings: by other artists), framed green if of one emoji or label."""
    split = run.data.test or run.data.bank
    x, _ = features(run.model.backbone, split, run.args.size, run.device, run.args.workers)
    if rank() == 0:
        some = np.random.default_rng(0).permutation(len(x))[:12]
        apart = torch.arange(len(x), device=x.device) if split.drawing is None else split.drawing
        shown = [[i, *near] for i, near in zip(some.tolist(), across_drawings(x, apart, 8)[some].tolist())]
        meaning = split.labels if split.emoji is None else split.emoji
        green = [(r, c) for r, row in enumerate(shown) for c, i in enumerate(row)
                 if c and meaning is not None and meaning[i] == meaning[row[0]]]
        folder = None if run.loader.in_memory else Folder(split.images, size=run.args.size)
        save_grid(path, [[(folder[i][0][0] if folder else split.images[i]) / 255 for i in row] for row in shown], green)

def draw_curve(path, run):
    """Loss by epoch, with the loss of collapse if there is one; kNN (k = 20) by epoch, with the baselines as lines."""
    from matplotlib.figure import Figure  # here, so that --help and the first step need not wait for it
    lines = read_lines(run.metrics)
    rows = [line for line in lines if "loss" in line]
    figure = Figure((9, 3.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel="epoch", title=f"loss, {run.name} on {run.data.name}")
    left.plot([row["step"] / run.loader.steps for row in rows], [row["loss"] for row in rows], linewidth=0.8)
    if run.collapse:
        left.axhline(run.collapse, color="tab:red", linestyle=":", label=f"collapsed, {run.collapse:.2f}")
        left.legend()
    if run.data.test:
        points = [(row["epoch"] + 1, row["knn20"]) for row in rows if "knn20" in row]
        points += [(run.args.epochs, line["evaluation"]["knn20"]) for line in lines if "evaluation" in line]
        right.plot(*zip((0, run.baselines["random_init"]["knn20"]), *points), marker="o", label=run.name)
        for name, label, style in (("pixels", "raw pixels", "--"), ("random_init", "random init", ":")):
            right.axhline(run.baselines[name]["knn20"], color="gray", linestyle=style, label=label)
        right.set(xlabel="epoch", title="kNN (k = 20) accuracy, %")
        right.legend()
    replace_file(path, lambda file: figure.savefig(file, format="png"))

def main():
    p = argparse.ArgumentParser(description="Evaluates a saved backbone on any data set, beside the usual baselines.")
    p.add_argument("backbone", type=Path, help="backbone.pt of a run folder, with its metrics.jsonl beside it")
    p.add_argument("--data", default="emoji", help=f"{', '.join([*EMBEDDED, *DOWNLOADED])} or a folder")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=None, help="side of the images, pixels (default: as trained)")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    args = p.parse_args()
    if not args.backbone.is_file() or not read_lines(args.backbone.with_name("metrics.jsonl")):
        fail(f"{args.backbone}: give the backbone.pt of a run folder, with its metrics.jsonl beside it")
    first = read_lines(args.backbone.with_name("metrics.jsonl"))[0]
    trained, method = first["settings"], importlib.import_module(f"methods.{first['method']}")  # some have their own backbone
    device, size = start(trained["seed"]), args.size or trained["size"]
    options = load_data(args.data, args.root, device), size, device, args.workers
    network = method.backbone(trained["arch"], trained["size"]).to(device)
    print0("measuring the baselines")
    results = {"pixels": evaluate(pixels(size), *options), "random_init": evaluate(network, *options)}
    try:
        network.load_state_dict(torch.load(args.backbone, map_location=device, weights_only=True))
    except Exception:  # torch.load raises nearly anything on a damaged file
        fail(f"{args.backbone} is damaged, or not a {trained['arch']} made for {trained['size']} pixels")
    print0("evaluating")
    results["evaluation"] = evaluate(network, *options)
    print0(table(results, "trained") + "\n" + json.dumps(results))

if __name__ == "__main__":
    main()
