"""What all methods share, because results could not be compared if it differed.

  1 data        load_data(name, root, device)        -> Data: training, bank and test images, labels
  2 views       Loader, make_views, first_batch      -> batches of random views, made of the
                                                        operations of kernels/views.py
  3 networks    backbone(arch, size), load_backbone  -> ResNet or ViT without its classifier
  4 evaluation  evaluate(network, data, size, ...)   -> kNN, linear probe, retrieval, collapse panel
  5 runs        parse: flags from a table of settings;
                Run: resume, metrics, checkpoints, pictures, the table at the end
  6 scripts     candidates, Results: what the scripts that evaluate runs have in common

How images are read is in kernels/readers.py, what several processes say to each other in
kernels/collectives.py.

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
import contextlib
import copy
import difflib
import hashlib
import importlib
import json
import math
import os
import platform
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms import functional as TF
from tqdm import tqdm

try:
    import fcntl  # locks of files
except ImportError:  # Windows
    fcntl = None

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # after all others: kernels and methods are found beside this file
from kernels.clips import FILMS, load_film
from kernels.collectives import (
    all_reduce_sum,
    barrier,
    fail,
    gather,
    join_processes,  # noqa: F401  for the scripts
    leave_processes,
    print0,
    rank,
    warn,
    world,
)
from kernels.cost import FlopCounter, run_cost
from kernels.folders import read_folder
from kernels.mae_mask import gather_tokens
from kernels.provenance import commit, device_name, peak_memory, versions
from kernels.readers import BrokenFiles, Files, InMemory
from kernels.video_files import VideoFiles
from kernels.views import (
    AUGMENT,
    CROP,
    METHOD,
    BatchRandom,
    Crop,
    Plan,
    crop_images,
    denormalize,
    normalize,
    random_flip,
)

EMBEDDED = ("emoji", "fashion", *FILMS)  # in tests/data: no download, ever
DOWNLOADED = {  # name here -> class in torchvision.datasets
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "stl10": "STL10",
}
SAVE_EVERY = 180  # seconds between checkpoints inside an epoch
OUT_OF_MEMORY = "error: out of memory: choose a smaller --batch, --size, --arch or --bank"
DIVERGED = "lower --lr or lengthen the warm-up, and choose another --out; the last good state is in"


# -------- 1. Data ---------------------------------------------------------------------------------


class Split(NamedTuple):
    """One half of a data set.

    images: a reader of N images or videos. labels: (N,) int64, or None.
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


def load_data(name, root, device):
    """An embedded data set (emoji, fashion; of videos movers, tripod, bunny), one that torchvision
    downloads into `root` (fashion-mnist, cifar10, cifar100, stl10), or a folder of images or
    videos. Exits with a one-line message if it cannot be loaded."""
    if name in FILMS:
        return as_data(name, *[Split(*half) for half in load_film(name, device)])
    if name in EMBEDDED:
        return embedded_data(name, device)
    if name in DOWNLOADED:
        return download_data(name, Path(root), device)
    if Path(name).is_dir():
        return folder_data(Path(name).resolve())
    known = [*EMBEDDED, *DOWNLOADED]
    if Path(name).is_file():
        fail(f"--data {name} is a file: give the folder of the images or videos")
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
    numbers = [
        torch.as_tensor(np.asarray(array), dtype=torch.int64, device=device)
        for array in numbers
    ]
    return Split(InMemory(images.contiguous().to(device)), *numbers)


def embedded_data(name, device):
    with np.load(HERE / "tests" / "data" / f"{name}.npz") as file:
        splits = []
        for half in ("train", "test"):
            names = [f"{half}_{part}" for part in ("images", "labels", "emoji", "drawing")]
            splits.append(to_split(device, *[file[name] for name in names if name in file]))
    return as_data(name, *splits)


def as_data(name, train, test=None):
    return Data(name, train, train, test)


def download_data(name, root, device):
    dataset = getattr(torchvision.datasets, DOWNLOADED[name])

    def get(**which):
        part = dataset(root, download=True, **which)
        return to_split(device, part.data, part.labels if name == "stl10" else part.targets)

    # Process 0 downloads; the others wait, then read the same files.
    if rank() > 0:
        barrier()
    try:
        if name == "stl10":  # learns from 5,000 labelled and 100,000 unlabelled images
            bank = get(split="train")
            test = get(split="test")
            more = get(split="unlabeled").images.pixels
            train = Split(InMemory(torch.cat([bank.images.pixels, more])))
        else:
            train = bank = get(train=True)
            test = get(train=False)
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
    """A folder of images or of videos. How it is read: kernels/folders.py."""
    halves, of_videos = read_folder(path)
    broken = BrokenFiles(sum(len(files) for files, _ in halves))
    reader = VideoFiles if of_videos else Files
    train, *test = [Split(reader(files, broken), labels) for files, labels in halves]
    return as_data(path.name, train, *test)


def thin(split, count):
    """At most `count` images of a split (0: all), chosen by a fixed seed and spread evenly over the
    classes."""
    n = len(split.images)
    if not 0 < count < n:
        return split
    order = np.random.default_rng(0).permutation(n)
    if split.labels is not None:
        order = order[np.argsort(split.labels.cpu().numpy()[order], kind="stable")]
    # Evenly spaced in the order of the labels: of each class its share.
    places = np.linspace(0, n - 1, count).astype(int)
    chosen = torch.from_numpy(np.sort(order[places]))
    numbers = [
        None if part is None else part[chosen.to(part.device)]
        for part in split[1:]
    ]
    return Split(split.images.part(chosen), *numbers)


# -------- 2. Views --------------------------------------------------------------------------------

class Loader(Plan):
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
        super().__init__(count, batch, seed, len(views))
        noun = split.images.NOUN
        if not 0 < batch <= count or batch % world():
            several = f", a multiple of {world()} (the processes)" if world() > 1 else ""
            fail(f"--batch {batch}: choose 2 to {count}, the number of {noun}{several}")
        self.reader = split.images
        self.reader.check([crop for crop, _ in views])
        self.views = views
        self.device = device
        self.workers = workers
        self.index = None
        self.first_shown = None  # indices and views of the first batch, for views.png
        self.counter = None  # of the operations of a step

    def __call__(self, epoch, done=0):
        """step counts over all epochs. `done` steps of the run are done: those of this epoch are
        skipped."""
        self.epoch = epoch
        self.first = max(0, done - epoch * self.steps)
        crops = [crop for crop, _ in self.views]
        batches = self.reader.batches(self, crops, self.device, self.workers)

        for epoch_step, (index, cropped) in enumerate(batches, self.first):
            self.index = index
            views = []
            for v, (x, (_, augment)) in enumerate(zip(cropped, self.views)):
                views.append(augment(x, self.random(epoch, epoch_step, v, AUGMENT)))
            if self.first_shown is None:
                few = [view[:8].float().cpu() for view in views]
                self.first_shown = index[:8].cpu(), few
            if self.counter:
                self.counter.start()
            try:
                yield epoch * self.steps + epoch_step, views
            finally:  # also where the loop around the batches ends early
                if self.counter:
                    self.counter.stop()


def positive_names(positives, split):
    """A name for each of the M images of a split: (M,) int64. Images, and views, of the same name
    are positives: they should be near each other."""
    known = {
        "views": torch.arange(len(split.images)),  # only the two views of an image
        "labels": split.labels,
        "drawings": split.emoji,  # the same emoji, by any artist
    }
    if known[positives] is None:
        fail(f"--positives {positives}: not known of these images; choose views or other --data")
    return known[positives]


class PairLoader(Loader):
    """A Loader whose batches hold pairs: the second, fourth, ... image has the name of the one
    before it, if another image has that name. Else a batch might have hardly any positives. The
    images are drawn at random, so some are shown twice in an epoch and others not."""

    def __init__(self, name, *settings):
        super().__init__(*settings)
        self.name = name.cpu().numpy()  # (M,)
        self.sorted = np.argsort(self.name, kind="stable")  # images of one name are neighbours
        self.place = np.argsort(self.sorted)  # of each image in `sorted`
        share = self.batch // world()
        if share % 2 and len(np.unique(self.name)) < len(self.name):
            fail(f"--batch {self.batch}: choose a multiple of {2 * world()}, pairs of images")

    def __iter__(self):
        for step, (index, draws) in enumerate(super().__iter__(), self.first):
            u = self.random(self.epoch, step, 0, METHOD).uniform().numpy()
            index = index.copy()
            even = slice(0, len(index) // 2 * 2, 2)  # the first image of each pair
            partner, exists = self.partners(index[even], u[even])
            index[1::2] = np.where(exists, partner, index[1::2])
            yield index, draws

    def partners(self, index, u):
        """For each image another one of the same name, and whether there is one. u: uniform
        numbers, one per image."""
        ordered = self.name[self.sorted]
        begin = np.searchsorted(ordered, self.name[index])
        count = np.searchsorted(ordered, self.name[index], side="right") - begin
        # one of the count - 1 others, counted from the image itself
        hop = 1 + (u * (count - 1)).astype(int)
        place = self.place[index] - begin
        return self.sorted[begin + (place + hop) % count], count > 1


def make_views(images, views, seed=0):
    """Views of your own images, as a training loop gets them: uint8 (n, 3, H, W) and the list
    [(Crop, augment), ...] of a method -> one batch per view, in the order of the images. Another
    seed gives other views; a number or a list of numbers."""
    key = np.atleast_1d(seed).tolist()
    result = []
    for v, (crop, augment) in enumerate(views):
        u = BatchRandom([*key, v, CROP], len(images)).uniform(columns=(22,))
        cropped = crop_images(images, [crop], [u.numpy()])[0]
        result.append(augment(cropped, BatchRandom([*key, v, AUGMENT], len(images))))
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

    small = size <= 64
    if arch == "resnet14":
        net = ResNet(Bottleneck, [1, 1, 1, 1])
        stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        rebuild(net, stem, 24, strides=(1, 2, 2, 1))
        small = False
    elif arch in ("resnet50x2", "resnet50x4"):
        width = 64 * int(arch[-1])
        net = ResNet(Bottleneck, [3, 4, 6, 3])
        stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        rebuild(net, stem, width, strides=(1, 2, 2, 2))
    else:
        net = getattr(torchvision.models, arch)()
    if small:
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


def rebuild(net, stem, width, strides):
    """Gives a torchvision ResNet of bottleneck blocks another stem and stages of other widths, each
    twice as wide as the one before, and strides."""
    net.inplanes = stem.out_channels
    net.conv1 = stem
    net.bn1 = nn.BatchNorm2d(stem.out_channels)
    for i, stride in enumerate(strides):
        depth = len(getattr(net, f"layer{i + 1}"))
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
        qkv = self.attn["qkv"](self.norm1(x))  # (n, T, 3 dim)
        qkv = qkv.unflatten(2, (3, self.heads, -1))
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
        first = self.cls_token + self.pos_embed[:, :1]  # (1, 1, dim)
        return torch.cat([first.expand(len(x), -1, -1), x], 1)

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
    try:
        return read_backbone(Path(path))
    except ValueError as error:
        fail(error)


def read_backbone(path):
    """load_backbone() for scripts that go on without a network: a ValueError says what is wrong."""
    path = path / "backbone.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; every finished run has one")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        net = new_backbone(saved["method"], saved["arch"], saved["size"])
        net.load_state_dict(saved["weights"])
        for name in ("method", "arch", "size", "data"):
            setattr(net, name, saved[name])
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise ValueError(
            f"{path} is not the backbone.pt of a run ({type(error).__name__}), or is damaged"
        )
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
    if data.test:
        bank, bank_readable = features(network, data.bank, size, device, workers)
    if not only_knn:
        view = Crop(size, scale=(0.2, 1.0)), flip_and_normalize
        pair = first_batch(shown, [view, view], 1024, 0, device)
        pair = [gather(embed(network, x)) for x in pair]

    if rank() == 0:
        if data.test and data.test.emoji is not None:
            for k in (1, 5):
                result[f"retrieval{k}"] = retrieval(test, *data.test[2:], k)
        test = only(test, readable)
        if not only_knn:
            result |= collapse_panel(test, *pair)
        if data.test:
            labels = data.bank.labels.to(device)[bank_readable]
            test_labels = data.test.labels.to(device)[readable]
            sets = only(bank, bank_readable), labels, test, test_labels
            for k in (20, 200):
                result[f"knn{k}"] = knn(*sets, k)
            if not only_knn:
                result["linear"] = linear_probe(*sets, data.bank.emoji)

    return share(lambda: result)


def share(function, *args):
    """What function(*args) returns in process 0, for all processes."""
    everyone = [function(*args) if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(everyone)
    return everyone[0]


@torch.no_grad()
def held_out(network, split, settings, measure):
    """{"held_out": the mean of measure(network(*views)), a scalar tensor or several numbers (k,),
    over batches of at most 1,000 held-out images or clips: a number, or a list of k}; {} where
    there are not two for each process. settings: those of a Loader. Every call shows the same. The
    network is in eval mode, and left as it was."""
    if not split or len(split.images) < 2 * world():
        return {}
    split = thin(split, 1000)
    views, batch, *others = settings
    batch = min(batch, len(split.images) // world() * world())
    training = network.training
    network.eval()
    loader = Loader(split, views, batch, *others)
    values = [measure(network(*shown)) for _, shown in loader(epoch=0)]
    loader.reader.stream = None  # of files: ends the processes that decode them
    network.train(training)
    mean = all_reduce_sum(torch.stack(values).mean(0)) / world()
    return {"held_out": mean.tolist()}


def flip_and_normalize(x, rand):
    return normalize(random_flip(x, rand))


def only(x, rows):
    """x[rows], without a copy if that is all of x."""
    return x if rows.all() else x[rows]


def features(network, split, size, device, workers=0):
    """Frozen features (N, D) of one plain view per image, in the order of the split: of an image in
    memory the whole, of a file the centre; and (N,) bool, False for files that cannot be read. Each
    process computes its share; process 0 gets all, the others None. Matrices of more than 2^27
    numbers (0.5 GB in float32) are kept in float16. Exits with a one-line message if no image can
    be read or a feature is not finite: some rules would fail, others give an ordinary number."""
    count = len(split.images)
    share = -(-count // world())
    mine = rank() * share + torch.arange(share)
    mine.clamp_(max=count - 1)  # equal shares; the surplus is cut off below
    readable = torch.ones(count, device=device)
    finite = torch.tensor(True, device=device)
    x = None
    done = 0
    batches = split.images.whole(mine, size, workers)
    hidden = rank() > 0 or count < 5000
    # The bar moves twice a second; where there is no terminal it is a line twice a minute.
    for images, broken in tqdm(
        batches, f"features of {count} images", unit=" batches", leave=False, disable=hidden,
        mininterval=0.5 if sys.stderr.isatty() else 30
    ):  # fmt: skip
        batch = images.to(device).float().div_(255)
        if batch.shape[2:] != (size, size):
            batch = F.interpolate(batch, (size, size), mode="bicubic", antialias=True)
            batch.clamp_(0, 1)  # bicubic overshoots
        h = embed(network, normalize(batch))
        if x is None:
            large = count * h.shape[1] > 1 << 27
            x = h.new_empty(share, h.shape[1], dtype=torch.float16 if large else h.dtype)
        h = h.to(x.dtype)
        finite &= h.isfinite().all()  # above 65,504 float16 is infinite
        x[done : done + len(h)] = h
        done += len(h)
        readable[broken] = 0
    readable = gather(readable[mine.to(device)])[:count] > 0
    if not readable.any():
        fail(f"none of {count} images for the evaluation can be read: replace these files")
    if all_reduce_sum(1.0 - finite.float()) > 0:
        fail(
            "some features are infinite or not a number: leave this network out, or train it anew "
            "at a lower rate"
        )
    if rank() > 0:
        dist.gather(x)
        return None, readable

    # Every share goes to its place in one matrix.
    if world() > 1:
        mine = x
        x = x.new_empty(share * world(), x.shape[1])
        dist.gather(mine, list(x.split(share)))
    return x[:count], readable


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
    if more than 20,000 images are in the bank, whose probe would take hours. (Scripts that evaluate
    runs do not say how many there are: they always have 32x32.)"""
    return nn.AdaptiveAvgPool2d(min(16 if bank > 20_000 else 32, size))


def knn(bank, bank_labels, test, test_labels, k, temperature=0.07):
    """Weighted k-nearest-neighbour accuracy in percent (Wu et al. 2018,
    https://arxiv.org/abs/1805.01978, section 3.4): each of the k bank images with the largest
    cosine s votes for its label with exp(s / temperature). Features (N, D), labels (N,)."""
    classes = int(bank_labels.max()) + 1
    correct = 0
    few = min(512, max(32, (1 << 23) // len(bank)))  # the cosines of so many at a time
    for x, y in zip(test.split(few), test_labels.split(few)):
        # The bank in pieces: a normalised copy of it may not fit.
        x = F.normalize(x.float(), dim=1)
        s = []
        for piece in bank.split(8192):
            s.append(x @ F.normalize(piece.float(), dim=1).T)
        s = torch.cat(s, 1)  # (n, N)
        s, nearest = s.topk(min(k, len(bank)), 1)  # (n, k)
        votes = x.new_zeros(len(x), classes)
        votes.scatter_add_(1, bank_labels[nearest], (s / temperature).exp())
        correct += (votes.argmax(1) == y).sum().item()
    return 100 * correct / len(test)


def linear_probe(bank, bank_labels, test, test_labels, groups=None):
    """Accuracy in percent of linear_classifier. bank and test (N, D) are overwritten."""
    right = linear_classifier(bank, bank_labels, groups)(test) == test_labels
    return 100 * right.double().mean().item()


def linear_classifier(bank, labels, groups=None):
    """Multinomial logistic regression on frozen standardised features, solved to convergence, as a
    function: features (n, D) -> labels (n,). Its weight decay, of 10, 3, 1, ... 1e-4, is the one
    with the least loss on a fifth of the BANK (whole groups if given, so that near copies stay
    together; if there is a single one, the decay is 10); then all of the bank is fitted with it.
    Test images choose nothing. bank (N, D) and what is classified are overwritten: a copy of the
    features may not fit."""
    bank = bank.float()
    mean = bank.mean(0)
    std = bank.std(0) + 1e-6
    bank.sub_(mean).div_(std)

    # Decorrelate. A rotation changes no solution, but the way to it is shorter.
    variance, rotation = principal_directions(bank)
    bank = rotate(bank, rotation)

    # A fifth of the groups is held out, and at least one.
    groups = torch.arange(len(bank)) if groups is None else groups.cpu()
    names = np.random.default_rng(0).permutation(groups.unique())
    names = torch.from_numpy(names[: len(names) // 5 or 1])
    held = torch.isin(groups, names).to(bank.device)
    kept = (~held).nonzero()[:, 0]

    # From strong to weak decay, each from the last solution.
    classes = int(labels.max()) + 1
    solution = start = bank.new_zeros(classes, bank.shape[1]), bank.new_zeros(classes)
    least, decay = math.inf, 10
    for candidate in (10, 3, 1, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4):
        solution = fit_logistic(bank, labels, variance, candidate, *solution, rows=kept)
        logits = F.linear(bank[held], *solution).double()
        loss = F.cross_entropy(logits, labels[held]).item()  # steadier than accuracy
        if not loss < least:  # it falls, then rises: from here on the probe overfits the bank
            break
        least, decay = loss, candidate
    weight, bias = fit_logistic(bank, labels, variance, decay, *start)

    def classify(x):
        x = x.float().sub_(mean).div_(std)
        return F.linear(rotate(x, rotation), weight, bias).argmax(1)

    return classify


def principal_directions(x):
    """Of features (N, D) around 0: the variance (K,) along each direction, and the rotation (D, K)
    with the directions as columns. With fewer images than features they are those in which images
    differ, N at most: along the others no image differs, and a classifier with weight decay has
    weights of 0."""
    few = len(x) <= x.shape[1]
    x = x.double() if few else x
    square = x @ x.T if few else x.T @ x  # the smaller of the two
    # In float32 eigh() may fail if features are constant.
    values, vectors = torch.linalg.eigh(square.double() / len(x))
    if few:
        # If x x^T u = s u, then x^T u is a direction: x^T x (x^T u) = s (x^T u).
        real = values > 1e-9 * values[-1]  # the others are rounding errors
        values = values[real]
        vectors = x.T @ vectors[:, real] / (len(x) * values).sqrt()
    return values.clamp(min=0).float(), vectors.float()


def rotate(x, rotation):
    """x @ rotation (N, K), in the memory of x (N, D), a piece at a time."""
    count = rotation.shape[1]
    for part in x.split(8192):
        part[:, :count] = part @ rotation
    return x[:, :count]


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
    some queries, indices (n,), only theirs, (n, k). k is at most the number of images that are not
    of the most frequent drawing."""
    x = F.normalize(x.float(), dim=1)
    k = min(k, len(x) - int(drawing.bincount().max()))
    queries = torch.arange(len(x), device=x.device) if queries is None else queries
    nearest = []
    for some in queries.split(512):
        same = drawing[some][:, None] == drawing
        s = (x[some] @ x.T).masked_fill_(same, -2)  # below every cosine
        nearest.append(s.topk(k, 1).indices)
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
    u, u1, u2 = [F.normalize(h, dim=1) for h in (x, x1, x2)]
    kernel = (-2 * torch.pdist(u1) ** 2).exp()
    return {
        "feature_std": u.std(0).mean().item(),
        "rankme": torch.exp(-(p * p.log()).sum()).item(),
        "alignment": (u1 - u2).square().sum(1).mean().item(),
        "uniformity": kernel.mean().log().item(),
        "feature_std_isotropic": x.shape[1] ** -0.5,
    }


# -------- 5. Runs ---------------------------------------------------------------------------------

EVERY_SCRIPT = {  # flag: (default, help)
    "seed": (0, "seed for the initial weights, the image order and the augmentation"),
    "root": ("data", "folder for downloaded data sets"),
    "workers": (4, "processes that decode the files of a folder"),
    "out": ("", "folder for the results; the script's docstring names the default"),
}
EVERY_TRAINING = {
    "out": ("runs/METHOD-DATA-SEED", "run folder; a run in it is continued"),
    "eval_every": (0, "epochs between kNN evaluations; 0: a sixth of the epochs"),
    "bank": (50_000, "training and test images at most in evaluations of the run; 0: all"),
    "compile": (False, "torch.compile the network"),
}
RANGES = {"size": "[1, inf)", "batch": "[2, inf)", "epochs": "[1, inf)", "seed": "[0, 1e18]"}
BASELINES = {"raw pixels": "pixels", "random init": "random_init"}  # in words: in results
NO_SETTINGS = ("recipe", "out", "root", "workers", "compile", "argv")  # change no result


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence, where argparse would print its usage too."""
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, 1, 0.7)
            message = f"{word}: no such flag; see {(near or ['--help'])[0]}"
        fail(message.removeprefix("argument "))


def parse(doc, settings, argv=None, runs=None, learns_from=None):
    """The flags of a script, from its docstring and its table of settings.

    settings: {name: (a value per column, ..., help)} or, with what is allowed at the end,
    (..., help, allowed): a tuple of choices, or an interval like "(0, 1]"; numbers without one may
    not be negative. The row "recipe" names the columns: `--recipe NAME` takes the defaults from
    one, the first if it is not given. A column named after a data set also sets --data.
    argv: a list of words; None for those of the command line. runs: the help of the folders that
    the command names besides its flags, for scripts that evaluate runs. learns_from: "videos or
    images" for a method that needs no videos, though its first column has some.

    Returns a namespace with all settings and the flags of a run: data, root, seed, out, workers,
    and if something is trained eval_every, bank and compile. Exits with a one-line message on a
    value that makes no sense."""
    if argv is None:  # a program, not a notebook
        prepare_program()
    argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    columns = settings["recipe"][:-1]
    n = len(columns)
    trains = "epochs" in settings
    noun = learns_from or ("videos" if columns[0] in FILMS else "images")
    known = FILMS if noun == "videos" else (*EMBEDDED, *DOWNLOADED)
    data = [column if column in known else "" for column in columns]
    choices = f"{', '.join(known)}, or a folder of {noun}"
    rows = {"data": (*data, choices), **settings}
    for name, (value, text) in (EVERY_SCRIPT | (EVERY_TRAINING if trains else {})).items():
        rows.setdefault(name, (*[value] * n, text))

    # The recipe first: the other defaults depend on it.
    first = Parser(add_help=False, allow_abbrev=False)
    help_of_recipe = rows.pop("recipe")[-1] if n > 1 else argparse.SUPPRESS
    first.add_argument("--recipe", choices=columns, default=columns[0], help=help_of_recipe)
    recipe = columns.index(first.parse_known_args(argv)[0].recipe)

    p = Parser(
        description=(doc or "").partition("\n")[0],  # python -OO leaves no docstrings
        usage="%(prog)s [--FLAG VALUE ...]" + (" RUN ..." if runs else ""),
        epilog=f"In brackets: the default, or that of each recipe, {' | '.join(columns)}.",
        parents=[first],
        allow_abbrev=False,
    )
    if runs:
        p.add_argument("runs", nargs="+", metavar="RUN", help=runs)
    rows.pop("recipe", None)
    for name, row in rows.items():
        add_flag(p, name, row[:n], recipe, *row[n:])
    args = p.parse_args(argv)
    args.argv = argv

    for name, row in rows.items():
        allowed = row[-1] if len(row) > n + 1 else RANGES.get(name, "[0, inf)")
        refuse_outside(flag_of(name), getattr(args, name), allowed)
    if trains:
        if not args.data:
            fail(f"--recipe {args.recipe} needs {noun}: --data FOLDER, or the name of a data set")
        if not args.out:
            fail("--out is empty: give the name of a folder")
        if getattr(args, "warmup", 0) > args.epochs:
            run = f"--epochs {args.epochs}, --warmup {args.warmup:g}"
            fail(f"{run}: choose more epochs or a shorter warm-up, 0 for a trial")
        args.eval_every = args.eval_every or max(1, args.epochs // 6)
    refuse_folder(args.out, args.data)
    return args


def refuse_folder(out, data):
    """Exits with a one-line message if the folder `out` cannot be made or written, or is that of
    the data."""
    place = Path(out).resolve()
    if data and place == Path(data).resolve():
        fail(f"--out {out}: this is the folder of --data; choose another")
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        fail(f"--out {out}: {place} is a file, or you may not write there; choose another folder")


def flag_of(name):
    return "--" + name.strip("_").replace("_", "-")


def add_flag(parser, name, values, recipe, text, allowed=None):
    """A row of the table as a flag. Its help has the values of all recipes, in brackets."""
    kind = float if float in map(type, values) else type(values[0])
    words = [f"{value:g}" if kind is float else f"{value}" for value in values]
    shown = " | ".join(words if len(set(words)) > 1 else words[:1])
    options = {"type": kind, "metavar": name.strip("_").upper()}
    if kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    if isinstance(allowed, tuple):
        options["choices"] = allowed
        text += f": {', '.join(allowed)}"
    text = f"{text} ({shown})".replace("%", "%%")
    parser.add_argument(flag_of(name), dest=name, default=values[recipe], help=text, **options)


def refuse_outside(flag, value, interval):
    """Exits with a one-line message if a number is not in an interval that is written as in
    mathematics: "[0, 1)", "(0, inf)"."""
    if isinstance(value, str) or isinstance(interval, tuple):
        return
    low, high = [float(end) for end in interval[1:-1].split(",")]
    closed_low = interval[0] == "["
    closed_high = interval[-1] == "]"
    if low < value < high or value == low and closed_low or value == high and closed_high:
        return
    words = f"{'at least' if closed_low else 'more than'} {low:g}"
    if high < math.inf:
        words += f" and {'at most' if closed_high else 'less than'} {high:g}"
    fail(f"{flag} {value:g}: choose {words}")


def prepare_program():
    """Sentences in place of tracebacks; output that is closed, or cannot print a name, is no
    reason to end."""
    sys.excepthook = one_line
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


class Run:
    """The run folder: resumes from it, writes metrics.jsonl, last.pt, backbone.pt and the pictures,
    and prints the table. A method calls log after every step, end_epoch and finish; its main()
    shows how.

    Resumes model and `state`, {name: anything with state_dict and load_state_dict}; evaluates
    model.backbone. reference_loss: (word, value) of a dotted line beside the loss, for example
    ("chance", log 4). show(views) -> {heading: images (n, 3, h, w) in [0, 1]}: what views.png
    shows of the first views, beside the image, or in place of it under the heading "image"; by
    default the views themselves."""

    def __init__(self, name, args, data, loader, model, state, reference_loss=None, show=None):
        self.name = self.label = name
        self.args = args
        test = data.test and thin(data.test, args.bank)
        self.data = data._replace(bank=thin(data.bank, args.bank), test=test)
        self.loader = loader
        self.device = loader.device
        self.model = model
        self.state = {"model": model, **state}
        self.reference_loss = reference_loss
        self.show = show or numbered_views
        if getattr(args, "positives", "views") != "views":  # not self-supervised
            self.label += f"-{args.positives}"
        default = f"{self.label}-{data.name}-{args.seed}"
        self.folder = Path(args.out.replace("METHOD-DATA-SEED", default))
        self.metrics = self.folder / "metrics.jsonl"
        self.last = self.folder / "last.pt"
        self.settings = {k: v for k, v in vars(args).items() if k not in NO_SETTINGS}
        self.settings["train_images"] = loader.count
        if Path(args.data).is_dir():  # the same, however it was written
            self.settings["data"] = os.path.abspath(args.data)
        self.total = args.epochs * loader.steps
        self.step = 0
        self.seconds = 0.0  # of training, over all starts
        self.clock = 0.0  # when the seconds were last added up
        self.counter = FlopCounter()
        self.pending = []  # steps whose losses are still on the device
        self.rows = []  # steps that are not yet written
        self.shown = {}  # beside the progress bar
        self.baselines = {}
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
        """Continues from last.pt, or begins. Refuses a folder that holds a run with other settings.
        The baselines of up to 10,000 images are measured now, of more after the training."""
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder)
        barrier()
        lines = read_lines(self.metrics)
        saved = self.read_checkpoint()
        if saved and not lines:
            fail(f"{self.folder} has a last.pt, but no metrics.jsonl: choose another --out")
        started = [line["settings"] for line in lines if "settings" in line]
        self.refuse_changes(saved["settings"] if saved else [*started, self.settings][0])

        barrier()  # every process has looked before process 0 writes
        if saved:
            self.continue_from(saved, lines)
        else:
            self.begin()
        if len(self.data.bank.images) <= 10_000:
            self.measure_baselines()
            if not self.step:
                print0(table(self.baselines))
        if not self.args.compile:  # what is compiled cannot be counted
            self.loader.counter = self.counter

    def read_checkpoint(self):
        """What save() wrote, or None."""
        try:
            if self.last.exists():
                saved = torch.load(self.last, map_location="cpu", weights_only=True)
                return {"settings": saved["settings"], **saved}
        except OSError as error:
            fail(f"{self.last} cannot be opened ({error.strerror}): it may be sound")
        except Exception as error:  # torch.load raises nearly anything on a damaged file
            fail(f"{self.last} is damaged ({type(error).__name__}): remove it or use another --out")

    def refuse_changes(self, earlier):
        """Exits with a one-line message if settings that matter differ from earlier ones."""
        changed = {name for name, _ in earlier.items() ^ self.settings.items()} - {"eval_every"}
        words = [f"{k} {earlier.get(k)}, now {self.settings.get(k)}" for k in sorted(changed)]
        if changed:
            fail(
                f"{self.folder} holds a run with other settings ({', '.join(words)}): choose "
                "another folder with --out, or remove this one"
            )

    def continue_from(self, saved, lines):
        for name, part in self.state.items():
            part.load_state_dict(saved["state"][name])
        self.step = saved["step"]
        self.seconds = saved["seconds"]
        self.counter.flops = saved.get("flops", 0) // world()  # older runs have none
        self.baselines = saved["baselines"]
        if rank() == 0:  # steps that were logged but not saved will be done again
            kept = [line for line in lines if line.get("step", -1) < self.step]
            write_lines(self.metrics, kept)
        if self.step < self.total:
            print0(f"{self.folder}: continuing after step {self.step} of {self.total}")

    def begin(self):
        device = device_name(self.device)
        test = self.data.test.images if self.data.test else ()
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
        images = self.loader.reader
        print0(
            f"{self.folder}: {self.loader.count} {images.NOUN}, {self.args.epochs} epochs of "
            f"{self.loader.steps} steps, {world()} x {self.args.batch // world()} {images.NOUN} "
            f"per step on {device}"
        )
        if isinstance(images, InMemory) and images.pixels.shape[3] < self.args.size:
            print0(f"note: the images are smaller than --size {self.args.size} and are enlarged")
        if rank() == 0:
            write_lines(self.metrics, [first])
            save_tensors(self.folder / "untrained.pt", self.model.backbone.state_dict())
        self.save()
        barrier()  # the others will read untrained.pt

    def measure_baselines(self):
        """Raw pixels, and the same network untrained; each is kept as soon as it is there."""
        if len(self.baselines) == 2:
            return
        networks = {
            "pixels": pixels(self.args.size, len(self.data.bank.images)),
            "random_init": copy.deepcopy(self.model.backbone),
        }
        networks["random_init"].load_state_dict(
            torch.load(self.folder / "untrained.pt", weights_only=True)
        )
        for name, network in networks.items():
            if name not in self.baselines:
                print0(f"measuring the baselines: {name}")
                self.baselines[name] = self.evaluate(network)
                self.save()

    @contextlib.contextmanager
    def not_training(self):
        """The time of what is done in this context does not count as training."""
        self.fetch()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    def evaluate(self, network, only_knn=False):
        """evaluate() of a network."""
        size, workers = self.args.size, self.args.workers
        with self.not_training():
            return evaluate(network, self.data, size, self.device, workers, only_knn)

    def log(self, loss, lr, **more):
        """Called once per step, after the update. loss: scalar tensor; it stays on the device until
        ten steps are fetched together. more: further numbers or scalar tensors, each a column of
        metrics.jsonl; like the loss they are averaged over processes."""
        self.counter.stop()
        row = {"step": self.step, "epoch": self.step // self.loader.steps, "lr": lr}
        values = [loss, *more.values()]
        values = [torch.as_tensor(value, device=self.device) for value in values]
        self.pending.append((row, torch.stack(values).float().detach()))
        self.columns = ["loss", *more]
        self.step += 1
        self.bar.update()
        # end_epoch does the same for the last step of an epoch
        if len(self.pending) >= 10 and self.step % self.loader.steps:
            self.flush()
            if time.perf_counter() - self.saved_at > SAVE_EVERY:
                self.save()

    def fetch(self):
        """Fetches the losses of the pending steps. Ends the run if one is not finite."""
        if not self.pending:
            return
        rows, values = zip(*self.pending)
        values = (all_reduce_sum(torch.stack(values)) / world()).tolist()  # mean over processes
        elapsed = time.perf_counter() - self.clock
        self.clock += elapsed
        self.seconds += elapsed
        self.pending = []

        rate = round(len(rows) * self.args.batch / elapsed, 1)
        for row, numbers in zip(rows, values):
            row |= dict(zip(self.columns, numbers)) | {"images_per_s": rate}
            if not math.isfinite(row["loss"]):
                fail(
                    f"the loss is {row['loss']} at step {row['step']}, "
                    f"learning rate {row['lr']:.3g}: {DIVERGED} {self.last}"
                )
        self.rows += rows

    def flush(self, **extra):
        """Writes the steps since the last call; `extra` goes to the last one."""
        self.fetch()
        *rows, last = self.rows
        self.rows = []
        self.row = last | {"seconds": round(self.seconds, 1), **extra}
        if rank() == 0:
            append(self.metrics, [*rows, self.row])
            views = self.folder / "views.png"
            if not views.exists():
                draw_views(views, self)
        self.shown |= {name: f"{self.row[name]:.3f}" for name in self.columns}
        self.bar.set_postfix(epoch=last["epoch"] + 1, **self.shown)

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
            "step": self.step,
            "seconds": self.seconds,
            "flops": self.counter.flops * world(),
        }
        save_tensors(self.last, saved)

    def end_epoch(self, epoch, **more):
        """kNN when it is due, metrics, checkpoint; one printed line if there is no progress bar.
        more: numbers that belong to the epoch, for its last line in metrics.jsonl."""
        done = epoch + 1
        found = {}
        self.shown.pop("knn20", None)
        if self.data.test and done % self.args.eval_every == 0 and done < self.args.epochs:
            self.fetch()
            try:
                found = self.evaluate(self.model.backbone, only_knn=True)
            except SystemExit:  # features that are not finite; the training is kept
                self.flush(**more)
                self.save()
                raise
            self.shown["knn20"] = f"{found['knn20']:.1f}"
        self.flush(**found, **more)
        self.shown |= {name: f"{value:.3f}" for name, value in more.items()}
        self.save()
        self.loader.reader.count_together()

        if self.bar.disable:
            words = "  ".join(f"{name} {word}" for name, word in self.shown.items())
            rate = f"{self.row['images_per_s']:.0f} images/s  {self.seconds:.0f} s"
            print0(f"epoch {done}/{self.args.epochs}  {rate}  {words}")
        if found and rank() == 0:
            draw_curve(self.folder / "curve.png", self)

    def finish(self, **more):
        """The evaluation, backbone.pt, pictures, table. A finished run only shows its table. more:
        for the last line of metrics.jsonl."""
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
                "peak_memory_gb": peak_memory(self.device),
                "unreadable_files": len(self.loader.reader.broken.met),
                **run_cost(self),
                **more,
            }
            lines.append(last)
            draw_neighbours(self.folder / "neighbours.png", self)
            if rank() == 0:
                trained = {
                    "method": self.name,
                    "data": self.data.name,
                    "arch": self.args.arch,
                    "size": self.args.size,
                    "weights": self.model.backbone.state_dict(),
                }
                save_tensors(self.folder / "backbone.pt", trained)
                append(self.metrics, [last])  # at the end: it marks the run as complete
        if rank() == 0 and self.total:
            draw_curve(self.folder / "curve.png", self)
        print0(table(lines[-1], self.label))
        print_files(self.folder)
        leave_processes()

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
    if issubclass(kind, BrokenPipeError):
        sys.stdout = open(os.devnull, "w")  # or Python would complain once more at its end
    known = (
        (KeyboardInterrupt, "", "stopped: the same command continues"),
        (BrokenPipeError, "", "error: nobody reads the output any more"),
        (MemoryError, "", OUT_OF_MEMORY),
        (torch.OutOfMemoryError, "", OUT_OF_MEMORY),
        (RuntimeError, "t allocate mem", OUT_OF_MEMORY),
        (RuntimeError, " by peer", "error: another process has ended; its message says why"),
        (OSError, "", f"error: {error}"),
    )
    for cause, words, text in known:
        if issubclass(kind, cause) and words in str(error):
            return warn(f"\n{text}")
    sys.__excepthook__(kind, error, traceback)


def table(results, name=None):
    """Results of evaluate() as text: raw pixels, random init and, if named, the method."""
    rows = BASELINES | ({name: "evaluation"} if name else {})
    columns = ("knn20", "knn200", "linear", "retrieval1", "retrieval5", "rankme")
    heads = [head for head in columns if head in results["pixels"]]
    width = max(14, *map(len, rows))
    lines = [" " * width + "".join(f"{head:>11}" for head in heads)]
    for row, part in rows.items():
        numbers = "".join(f"{results[part][head]:11.1f}" for head in heads)
        lines.append(f"{row:{width}}{numbers}")
    return "\n".join(lines)


def print_files(folder):
    """What a folder holds, but for hidden files."""
    files = sorted(path.name for path in folder.glob("[!.]*"))
    print0(f"{folder}: {', '.join(files)}")


def read_lines(path):
    """The JSON lines of a file, none if there is no file. Lines that were cut short are dropped."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # cut short by a kill or a full disk
            continue
    return [line for line in lines if isinstance(line, dict)]


def as_lines(rows):
    """Dicts -> JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_lines(path, rows):
    """Dicts -> a file of JSON lines, in place of an earlier one."""
    text = as_lines(rows).encode()
    replace_file(path, lambda file: file.write(text))


def append(path, rows):
    """Adds dicts to a file as JSON lines."""
    try:
        with open(path, "a") as file:
            file.write(as_lines(rows))
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror}); what was saved before is kept")


def save_tensors(path, content):
    """A dict with tensors, which torch.load reads with weights_only=True."""
    replace_file(path, lambda file: torch.save(content, file))


def replace_file(path, write):
    """write(file) to a file beside path, then rename it: path is the old file or the new one, never
    half of it. Ctrl-C counts afterwards: torch.save would make another error of it."""
    part = path.with_suffix(".part")
    try:
        with later_ctrl_c():
            with open(part, "wb") as file:
                write(file)
            os.replace(part, path)
    except Exception as error:  # torch.save raises a RuntimeError of its own on a full disk
        reason = getattr(error, "strerror", None) or f"{error} ".splitlines()[0].strip()
        if shutil.disk_usage(path.parent).free < 2**20:
            reason = "no space left on the disk"
        part.unlink(missing_ok=True)  # makes space
        fail(f"{path} cannot be written ({reason}); what was saved before is kept")


@contextlib.contextmanager
def later_ctrl_c():
    """A Ctrl-C inside the block is raised at its end. It stays ignored where it is ignored, as by a
    command that runs in the background; only the main thread gets signals."""
    usual = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if signal.getsignal(signal.SIGINT) is not usual or not main:
        yield
        return
    pressed = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed:
        raise KeyboardInterrupt


def save_grid(path, rows, columns, green=None, note=""):
    """Saves rows of images (3, h, w) in [0, 1] as a picture with its words. columns: a heading for
    each; the first one is set apart. green: bool (rows, columns), which images have a green frame.
    note: a line below."""
    font = ImageFont.load_default(size=13)
    side = max(64, *[image.shape[2] for image in rows[0]])
    cell = side + 8
    width = max(len(columns) * cell + 24, round(font.getlength(note)) + 16)
    picture = Image.new("RGB", (width, len(rows) * cell + 52), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((8, picture.height - 20), note, "black", font)

    for c, heading in enumerate(columns):
        x = 12 + c * cell + (16 if c else 0)
        draw.text((x + side // 2, 5), heading, "black", font, anchor="ma")
        for r, row in enumerate(rows):
            y = 26 + r * cell
            if green is not None and green[r, c]:
                frame = Image.new("RGB", (cell, cell), (0, 178, 0))
                picture.paste(frame, (x - 4, y - 4))
            image = row[c].float().cpu()
            image = F.interpolate(image[None], (side, side))[0]
            picture.paste(TF.to_pil_image(image), (x, y))
    replace_file(path, lambda file: picture.save(file, format="png"))


def numbered_views(views):
    return {f"view {i}": denormalize(view) for i, view in enumerate(views, 1)}


def draw_views(path, run):
    """What the network is shown: one row per image, which comes first, and one column per view."""
    index, views = run.loader.first_shown
    images, _ = next(run.loader.reader.whole(index, run.args.size))
    shown = {"image": images / 255, **run.show(views)}
    note = f"{run.name}: the image, then what the network is shown"
    save_grid(path, list(zip(*shown.values())), list(shown), note=note)


def draw_neighbours(path, run):
    """Twelve test images and up to eight nearest to each (drawings: by other artists), framed green
    if they show the same emoji or have the same label."""
    split = run.data.test or run.data.bank
    args = run.args
    x, _ = features(run.model.backbone, split, args.size, run.device, args.workers)
    if rank() > 0:
        return
    apart = torch.arange(len(x), device=x.device) if split.drawing is None else split.drawing
    queries = torch.from_numpy(np.random.default_rng(0).permutation(len(x))[:12])
    nearest = across_drawings(x, apart, 8, queries.to(x.device)).cpu()
    shown = torch.cat([queries[:, None], nearest], 1)  # (12, 9)

    note = f"{run.name}: test images, each with its nearest"
    green = None
    meaning = split.labels if split.emoji is None else split.emoji
    if meaning is not None:
        green = meaning.cpu()[shown] == meaning.cpu()[queries][:, None]
        green[:, 0] = False  # the query itself
        what = "label" if split.emoji is None else "emoji by another artist"
        note += f"; green: the same {what}"
    parts = split.images.whole(shown.flatten(), args.size)
    images = torch.cat([part.cpu() for part, _ in parts]) / 255
    columns = ["test image", *map(str, range(1, shown.shape[1]))]
    save_grid(path, images.unflatten(0, shown.shape), columns, green, note)


def draw_curve(path, run):
    """Loss by epoch, with a reference if there is one; beside it, where there are labels, kNN
    (k = 20) by epoch with the baselines as lines."""
    from matplotlib.figure import Figure  # here, so --help and the first step need not wait for it

    lines = read_lines(run.metrics)
    rows = [line for line in lines if "loss" in line]
    panels = 2 if run.data.test else 1
    figure = Figure((4.5 * panels, 3.4), dpi=110, layout="constrained")
    loss, *accuracy = figure.subplots(1, panels, squeeze=False)[0]

    loss.set(xlabel="epoch", ylabel="loss", title=f"{run.name} on {run.data.name}")
    epochs = [row["step"] / run.loader.steps for row in rows]
    loss.plot(epochs, [row["loss"] for row in rows], ".-", linewidth=0.8, markersize=1)
    if run.reference_loss:
        word, value = run.reference_loss
        loss.axhline(value, color="tab:red", linestyle=":", label=f"{word}, {value:.2f}")
        loss.legend()

    for axes in accuracy:
        points = [(row["epoch"] + 1, row["knn20"]) for row in rows if "knn20" in row]
        if "evaluation" in lines[-1]:
            points.append((run.args.epochs, lines[-1]["evaluation"]["knn20"]))
        for (name, key), style in zip(BASELINES.items(), ("--", ":")):
            if key in run.baselines:  # of many images they come after the training
                height = run.baselines[key]["knn20"]
                axes.axhline(height, color="gray", linestyle=style, label=name)
        axes.plot(*zip(*points), marker="o", label=run.name)
        axes.set(xlabel="epoch", ylabel="%", title="kNN accuracy (k = 20)")
        axes.legend()
    replace_file(path, lambda file: figure.savefig(file, format="png"))


# -------- 6. Evaluation scripts -------------------------------------------------------------------


class Candidate(NamedTuple):
    """A network to evaluate, and on which images. about: what else is known of it, for its line in
    results.jsonl. lines: of the metrics.jsonl of its run."""

    name: str
    network: nn.Module
    data: str
    size: int
    about: dict
    lines: list = []


def candidates(args):
    """The networks that the command of an evaluation script asks for: raw pixels and the untrained
    networks, once each, then the runs of args.runs. args.data and args.size, if they are given and
    not 0, replace those of the training."""
    runs = finished_runs(args)
    found = {}
    for run in runs:
        for baseline in baselines(run, args.seed):
            found.setdefault((baseline.name, baseline.data), baseline)
    return [*found.values(), *runs]


def finished_runs(args):
    """The runs of args.runs. One that is not finished, or damaged, is left out; the program says so
    now and again at its end. It ends before anything is measured if no run is left, or if a name
    is wrong."""
    files = []
    for path in map(Path, args.runs):
        if not path.exists():
            fail(f"{path}: no such folder")
        files.append(path / "backbone.pt" if path.is_dir() else path)

    # A run is called after its folder; a second folder of that name by its path.
    runs = {}
    left_out = []
    for file in dict.fromkeys(files):
        try:
            run = read_run(file, args)
            name = str(file.parent) if run.name in runs else run.name
            runs[name] = run._replace(name=name)
        except (OSError, ValueError) as error:
            left_out.append(f"{error}")
    if not runs:
        fail("; ".join(left_out))

    if left_out and rank() == 0:
        text = "\n".join(f"left out: {reason}" for reason in left_out)
        print0(text)
        atexit.register(print0, f"\n{text}")  # hours later the first lines are out of sight
    return list(runs.values())


def read_run(file, args):
    """The network in a backbone.pt, with what the metrics.jsonl beside it says of its training. An
    OSError or a ValueError says what is wrong with these files."""
    network = read_backbone(file)
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise ValueError(f"{file}: a weight is NaN or infinite; train the network anew")
    metrics = file.with_name("metrics.jsonl")
    lines = read_lines(metrics)
    settings = lines[0].get("settings") if lines else {}
    if settings is None:
        raise ValueError(f"{metrics}: its first line is damaged; restore or delete this file")
    size = getattr(args, "size", 0) or network.size
    patch = network.first_layer.stride[0] if isinstance(network, ViT) else 1
    if size % patch:
        fail(f"--size {size}: choose a multiple of {patch}, the side of a patch of {file}")
    about = {
        "method": network.method,
        "arch": network.arch,
        "seed": settings.get("seed"),
        "weights": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        "training": settings,
    }
    # A folder of images is recorded by its path in metrics.jsonl, by its name in backbone.pt.
    data = args.data or settings.get("data", network.data)
    return Candidate(file.resolve().parent.name, network, data, size, about, lines)


def baselines(run, seed):
    """Raw pixels, and the network of a run before training. Most methods share the networks of this
    file; those of a method with its own bear its name."""
    torch.manual_seed(seed)
    trained = run.network
    network = new_backbone(trained.method, trained.arch, trained.size).eval()
    own = getattr(importlib.import_module(f"methods.{trained.method}"), "backbone", backbone)
    arch = trained.arch
    name = f"untrained {arch}" if own is backbone else f"untrained {arch} of {trained.method}"
    if run.size != trained.size:
        name += f" made for {trained.size}"
    about = {"arch": arch, "seed": seed}
    return [
        Candidate(f"raw pixels, {run.size} px", pixels(run.size), run.data, run.size, {}),
        Candidate(f"{name}, {run.size} px", network, run.data, run.size, about),
    ]


def labelled_features(network, data, size, device, workers):
    """Features of the bank, labels, features of the test images, labels, and groups of the bank or
    None; without images that cannot be read. Every process must call it; process 0 gets them.
    Exits with a one-line message if there is only one image to learn from."""
    bank, readable = features(network, data.bank, size, device, workers)
    test, test_readable = features(network, data.test, size, device, workers)
    if rank() > 0:
        return [None] * 5
    if readable.sum() < 2:
        fail(f"{data.name}: two training images with labels are needed")
    groups = data.bank.emoji
    return (
        only(bank, readable),
        data.bank.labels.to(device)[readable],
        only(test, test_readable),
        data.test.labels.to(device)[test_readable],
        None if groups is None else groups.to(device)[readable],
    )


class Results:
    """The results.jsonl of an evaluation script: one line per result. What it holds is not measured
    again, so a command that was stopped continues.

    script: its name, "eval_features"; the folder is --out, by default runs/eval_features."""

    # What makes two lines the same measurement.
    IDENTITY = ("protocol", "network", "weights", "seed", "data", "settings")

    def __init__(self, script, args, device):
        self.script = script
        self.args = args
        self.device = device
        self.folder = Path(args.out or f"runs/{script}")
        self.path = self.folder / "results.jsonl"
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if {"backbone.pt", "metrics.jsonl"} & {*os.listdir(self.folder)}:
                fail(f"--out {args.out}: a training wrote this folder; choose another")
            self.lock = lock(self.folder)
        barrier()
        self.rows = read_lines(self.path)  # a line that a kill cut short is dropped
        barrier()  # every process has read before process 0 writes
        if rank() == 0:
            write_lines(self.path, self.rows)

    def measure(self, protocol, candidate, function, **settings):
        """The result of function(), a dict of numbers, lists and strings: read from an earlier
        line, or measured and written. What is not defined (NaN, infinite) is None, since JSON has
        no such numbers. protocol: what is measured. settings: all that the result depends on
        besides the network and its data."""
        row = {"protocol": protocol, "network": candidate.name, **candidate.about}
        row |= {"data": candidate.data, "settings": {"size": candidate.size, **settings}}
        row = json.loads(json.dumps(row))  # tuples become lists, as in a row that was read
        place = f"{candidate.name} on {candidate.data}, {protocol}"
        for earlier in self.rows:
            if all(earlier.get(name) == row.get(name) for name in self.IDENTITY):
                print0(f"{place}: already measured")
                return earlier["result"]

        print0(place)
        began = time.perf_counter()
        text = json.dumps(function(), default=float)  # of numpy's and torch's numbers
        row |= {
            "result": json.loads(text, parse_constant=lambda word: None),
            "seconds": round(time.perf_counter() - began, 1),
            "command": " ".join([f"methods/{self.script}.py", *self.args.argv]),
            "commit": commit(),
            "versions": versions(),
            "device": device_name(self.device),
        }
        self.rows.append(row)
        if rank() == 0:
            append(self.path, [row])
        return row["result"]
