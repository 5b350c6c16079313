"""Measures random views per second, and SimCLR's whole step: the batched path of kernels/views.py
beside torchvision's transforms and, if it is installed, beside lightly's.

    python tests/bench_views.py                      32 and 224 pixels on all cores, in two minutes
    python tests/bench_views.py --threads 2 --repeats 7
    pip install lightly; python tests/bench_views.py --cases "32 px" step

All make SimCLR's two views of every image, as normalised float32 batches: crop of 8 to 100 % of
the area (bicubic), flip, colour jitter of strength 0.5, grey, and at 224 pixels Gaussian blur of
every second view. The images are emoji, at 224 pixels enlarged to 256 beforehand. The batched path
runs on T threads; the transforms, of one PIL image at a time, run in T worker processes of a
DataLoader, which get decoded images, so nobody reads a file. torchvision's GaussianBlur is a slow
convolution; the third line takes PIL's own blur (a fast approximation) in its place, which is also
what lightly uses. After a warm-up all take turns, and medians are compared.

`step` is a whole training step of SimCLR with resnet14 at batch 256 and 32 pixels: views, network,
loss and update. `alone` is the same step on views that were made before, the most that is possible.
lightly's step has its transform, its loss and its DataLoader, our network and optimiser.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import InMemory, Loader, Split, load_data
from kernels.infonce import simclr_loss
from kernels.provenance import device_name
from kernels.readers import CORES
from kernels.views import BICUBIC, MEAN, STD
from methods.simclr import LARS, SimCLR, views

try:
    from lightly import loss as lightly_loss
    from lightly import transforms as lightly_transforms
except ImportError:
    lightly_transforms = None

STRENGTH = 0.5
CPU = torch.device("cpu")
CASES = {  # name -> (side of the images, side of a view, images, batch, probability of blur)
    "32 px": (32, 32, 1024, 256, 0.0),
    "224 px": (256, 224, 64, 32, 0.5),
    "224 px, PIL's blur": (256, 224, 64, 32, 0.5),
}
STEP = (32, 1024, 256)  # side of a view, images, batch


def pil_blur(picture):
    return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def pil_recipe(size, blur, blurring):
    """Appendix A of SimCLR by torchvision, of one PIL image: `views` of methods/simclr.py,
    operation by operation."""
    s = STRENGTH
    jitter = T.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    steps = [
        T.RandomResizedCrop(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation=BICUBIC),
        T.RandomHorizontalFlip(),
        T.RandomApply([jitter], p=0.8),
        T.RandomGrayscale(p=0.2),
    ]
    if blur:
        steps.append(T.RandomApply([blurring], p=blur))
    return T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])


class Twice:
    """Two views of a picture by one recipe."""

    def __init__(self, recipe):
        self.recipe = recipe

    def __call__(self, picture):
        return self.recipe(picture), self.recipe(picture)


def lightly_recipe(size, blur):
    """lightly's transform with the same settings: a picture -> two views."""
    transform = lightly_transforms.SimCLRTransform
    return transform(input_size=size, cj_strength=STRENGTH, gaussian_blur=blur, sigmas=(0.1, 2.0))


class Pictures(Dataset):
    """Two views of each PIL image."""

    def __init__(self, pictures, pair):
        self.pictures = pictures
        self.pair = pair

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.pair(self.pictures[index])


def in_workers(pictures, pair, batch, threads, **options):
    """A DataLoader of pairs of views, made in worker processes that live through all epochs."""
    pictures = Pictures(pictures, pair)
    options |= {"num_workers": threads, "persistent_workers": True}
    return DataLoader(pictures, batch_size=batch, **options)


def seconds(epoch):
    """The time of going through all batches of an epoch."""
    began = time.perf_counter()
    for _ in epoch:
        pass
    return time.perf_counter() - began


def take_turns(repeats, images, epochs):
    """Images per second of each of some functions that return an epoch: medians. The first epoch
    of each is the warm-up."""
    times = [[seconds(epoch()) for epoch in epochs] for _ in range(1 + repeats)]
    return [images / statistics.median(column) for column in zip(*times[1:])]


def measure(case, threads, repeats, images):
    """Views per second of the batched path, of torchvision and, if it is there, of lightly."""
    side, size, count, batch, blur = CASES[case]
    images = images[:count]
    if side != images.shape[2]:
        images = F.interpolate(images.float(), (side, side), mode="bicubic").clamp_(0, 255).byte()
    recipe = views(SimpleNamespace(size=size, strength=STRENGTH, blur=blur))
    ours = Loader(Split(InMemory(images)), recipe, batch, 0, CPU)
    epochs = [lambda: ours(0)]

    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
    blurring = pil_blur if "PIL" in case else T.GaussianBlur(size // 10 | 1, (0.1, 2.0))
    pairs = [Twice(pil_recipe(size, blur, blurring))]
    if lightly_transforms and "px, " not in case:  # once for each size
        pairs.append(lightly_recipe(size, blur))
    for pair in pairs:
        # smaller batches, so that no worker waits while another has the last one
        batches = in_workers(pictures, pair, batch // threads, threads)
        epochs.append(batches.__iter__)
    return take_turns(repeats, 2 * count, epochs)


def measure_step(threads, repeats, images):
    """Images per second of whole steps: ours, the network alone and, if it is there, lightly's."""
    size, count, batch = STEP
    images = images[:count]
    recipe = views(SimpleNamespace(size=size, strength=STRENGTH, blur=0.0))
    ours = Loader(Split(InMemory(images)), recipe, batch, 0, CPU)
    fixed = [pair for _, pair in ours(0)]
    model = SimCLR("resnet14", size, 128)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = LARS(weights, lr=0.1, weight_decay=1e-4)

    def steps(pairs, loss_of):
        for x1, x2 in pairs:
            z1, z2 = model(torch.cat([x1, x2])).chunk(2)
            loss = loss_of(z1, z2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield

    def our_loss(z1, z2):
        return simclr_loss(F.normalize(z1, dim=1), F.normalize(z2, dim=1), 0.1)

    epochs = [
        lambda: steps((pair for _, pair in ours(0)), our_loss),
        lambda: steps(fixed, our_loss),
    ]
    if lightly_transforms:
        pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
        pair = lightly_recipe(size, 0.0)
        theirs = in_workers(pictures, pair, batch, threads, shuffle=True, drop_last=True)
        epochs.append(lambda: steps(theirs, lightly_loss.NTXentLoss(temperature=0.1)))
    return take_turns(repeats, count, epochs)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--threads", type=int, default=CORES, help="threads, and worker processes")
    p.add_argument("--repeats", type=int, default=5, help="epochs, of which the median counts")
    p.add_argument("--cases", nargs="+", default=[*CASES, "step"], choices=[*CASES, "step"])
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    images = load_data("emoji", "unused", CPU).train.images.pixels
    modules = {"torch": torch, "torchvision": torchvision, "PIL": PIL}
    versions = ", ".join(f"{name} {module.__version__}" for name, module in modules.items())
    cores = f"{device_name(CPU)}, {os.cpu_count()} cores"
    print(f"{cores}; Python {platform.python_version()}, {versions}")
    print("views per second       batched  torchvision  ratio      lightly  ratio")
    for case in [case for case in args.cases if case != "step"]:
        ours, *others = measure(case, args.threads, args.repeats, images)
        numbers = "".join(f"{other:13.0f}{ours / other:6.1f}x" for other in others)
        print(f"{case:20}{ours:10.0f}{numbers}", flush=True)
    if "step" in args.cases:
        ours, *others = measure_step(args.threads, args.repeats, images)
        numbers = "".join(f"{other:13.0f}{ours / other:6.2f}x" for other in others)
        print("images per second         step        alone  ratio      lightly  ratio")
        print(f"{'32 px, resnet14':20}{ours:10.0f}{numbers}", flush=True)


if __name__ == "__main__":
    main()
