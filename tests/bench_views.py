"""Measures random views per second: the batched path of common.py beside torchvision's transforms.

    python tests/bench_views.py                      32 and 224 pixels on all cores, within a minute
    python tests/bench_views.py --threads 2 --repeats 7

Both make SimCLR's two views of every image, as normalised float32 batches: crop of 8 to 100 % of
the area (bicubic), flip, colour jitter of strength 0.5, grey, and at 224 pixels Gaussian blur of
every second view. The images are emoji, at 224 pixels enlarged to 256 beforehand. The batched path
runs on T threads; the transforms, of one PIL image at a time, run in T worker processes of a
DataLoader, which get decoded images, so neither reads a file. torchvision's GaussianBlur is a slow
convolution; the last line takes PIL's own blur (a fast approximation) in its place. After a warm-up
the two take turns, and medians are compared.
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
from common import InMemory, Loader, Split, device_name, load_data
from kernels.readers import CORES
from kernels.views import BICUBIC, MEAN, STD
from methods.simclr import views

STRENGTH = 0.5
CPU = torch.device("cpu")
CASES = {  # name -> (side of the images, side of a view, images, batch, probability of blur)
    "32 px": (32, 32, 1024, 256, 0.0),
    "224 px": (256, 224, 64, 32, 0.5),
    "224 px, PIL's blur": (256, 224, 64, 32, 0.5),
}


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


class Pictures(Dataset):
    """Two views of each PIL image."""

    def __init__(self, pictures, recipe):
        self.pictures = pictures
        self.recipe = recipe

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.recipe(self.pictures[index]), self.recipe(self.pictures[index])


def seconds(epoch):
    """The time of going through all batches of an epoch."""
    began = time.perf_counter()
    for _ in epoch:
        pass
    return time.perf_counter() - began


def measure(case, threads, repeats, images):
    """(views per second of the batched path, of torchvision), medians of `repeats` epochs over the
    images of a case."""
    side, size, count, batch, blur = CASES[case]
    images = images[:count]
    if side != images.shape[2]:
        images = F.interpolate(images.float(), (side, side), mode="bicubic").clamp_(0, 255).byte()
    recipe = views(SimpleNamespace(size=size, strength=STRENGTH, blur=blur))
    ours = Loader(Split(InMemory(images)), recipe, batch, 0, CPU)

    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
    blurring = pil_blur if "PIL" in case else T.GaussianBlur(size // 10 | 1, (0.1, 2.0))
    # smaller batches, so that no worker waits while another has the last one
    theirs = DataLoader(
        Pictures(pictures, pil_recipe(size, blur, blurring)),
        batch_size=batch // threads,
        num_workers=threads,
        persistent_workers=True,
    )

    # The first epoch of both is the warm-up.
    times = []
    for epoch in range(1 + repeats):
        times.append((seconds(ours(epoch)), seconds(theirs)))
    return [2 * count / statistics.median(column) for column in zip(*times[1:])]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--threads", type=int, default=CORES, help="threads, and worker processes")
    p.add_argument("--repeats", type=int, default=5, help="epochs, of which the median counts")
    p.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    images = load_data("emoji", "unused", CPU).train.images.pixels
    modules = {"torch": torch, "torchvision": torchvision, "PIL": PIL}
    versions = ", ".join(f"{name} {module.__version__}" for name, module in modules.items())
    cores = f"{device_name(CPU)}, {os.cpu_count()} cores"
    print(f"{cores}; Python {platform.python_version()}, {versions}")
    print("views per second       batched  torchvision  ratio", flush=True)
    for case in args.cases:
        ours, theirs = measure(case, args.threads, args.repeats, images)
        print(f"{case:20}{ours:10.0f}{theirs:13.0f}{ours / theirs:6.1f}x", flush=True)


if __name__ == "__main__":
    main()
