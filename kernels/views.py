"""Views of images: which images a step shows, random crops and colours, on any number of processes.

A method lists its views as pairs (Crop, augment). The crop decides which box of each image is
resized to the side of a view; augment(x, rand) changes the crops x (n, 3, H, W) in [0, 1] and ends
with normalize. Images in memory are cropped in batches on their device, files by worker processes,
with the same boxes:

    uint8 (n, 3, H, W) --Crop.boxes, resized_crop--> (n, 3, size, size) --augment--> a view
    a file --load_picture, Crop.cut--> uint8 (3, size, size) --augment, in batches--> a view

Every random number belongs to a seed, an epoch, a step, a view and an image of the GLOBAL batch
(BatchRandom). The operations equal torchvision's on each image by itself (tests/test_views.py).
They are products of small matrices or work on whole tensors, without a loop over images and without
a decision on the CPU that a GPU would have to wait for.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms import functional as TF

from kernels.collectives import rank, world

BICUBIC = TF.InterpolationMode.BICUBIC
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's channels: the convention of most published networks
STD = (0.229, 0.224, 0.225)


# The streams of random numbers: boxes of crops, augmentation, order of images, a method's own, and
# the moment of a video at which a clip begins.
CROP, AUGMENT, ORDER, METHOD, MOMENT = 1, 2, 3, 4, 5


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
        self.steps = count // max(1, batch)  # per epoch; an incomplete last batch is dropped
        share = batch // world()
        self.rows = slice(rank() * share, (rank() + 1) * share)  # of this process

    def random(self, epoch, step, view, stream):
        """The random numbers of one step. A method's own have view 0 and stream METHOD."""
        return BatchRandom([self.seed, epoch, step, view, stream], self.batch, self.rows)

    def __iter__(self):
        generator = np.random.default_rng([self.seed, self.epoch, 0, 0, ORDER])
        order = generator.permutation(self.count)
        for step in range(self.first, self.steps):
            index = order[step * self.batch :][self.rows]
            draws = []
            for view in range(self.view_count):
                rand = self.random(self.epoch, step, view, CROP)
                draws.append(rand.uniform(columns=(22,)).numpy())
            yield index, draws


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
        exponent = np.log(low) + np.log(high / low) * u[:, 10:20]
        ratio = np.exp(exponent)
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


class ClipCrop(NamedTuple):
    """A crop of videos: `frames` frames, every stride-th, from a random moment on, all cut to the
    same box. In place of a Crop as a first element of a view, which then gets (n, frames, 3, size,
    size). Videos must have at least `span` frames."""

    crop: Crop
    frames: int
    stride: int = 1

    @property
    def size(self):
        return self.crop.size

    @property
    def span(self):
        """From the first frame to the last one, both counted."""
        return (self.frames - 1) * self.stride + 1

    def places(self, moment, length):
        """Uniform moment (n,) in [0, 1), and length (n,) int, in frames -> (n, frames) int: which
        frames of each video are shown."""
        last = length - self.span
        begin = (moment * (last + 1)).astype(int).clip(max=last)  # a product may be rounded up
        return begin[:, None] + np.arange(self.frames) * self.stride


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

    # The pixels around the centre of each output pixel that can have a weight, the same number for
    # all: the filter reaches two steps to each side, and shrinking widens it.
    centre = (torch.arange(size_out, device=start.device)[:, None] + 0.5) * step  # (n, size_out, 1)
    reach = 2 * max(1, size_in / size_out)
    near = torch.arange(2 * math.ceil(reach) + 1, device=start.device) - math.ceil(reach)
    index = (start + centre).floor() + near  # (n, size_out, near)

    # Their distance from it, in steps.
    pixel = index + 0.5 - start  # in the box
    t = (pixel - centre).div_(step.clamp(min=1)).abs_()

    # Keys' cubic with a = -1/2. Each of its two pieces ends in 0, so they can be added:
    #     1.5 t^3 - 2.5 t^2 + 1 for t <= 1,    -0.5 t^3 + 2.5 t^2 - 4 t + 2 for 1 <= t <= 2
    t1 = t.clamp(max=1)
    t2 = t.clamp(1, 2)
    inner = (1.5 * t1 - 2.5).mul_(t1).mul_(t1).add_(1)
    outer = -0.5 * t2 + 2.5
    outer = outer.mul_(t2).sub_(4).mul_(t2).add_(2)
    weight = inner + outer
    weight.mul_((pixel > 0) & (pixel < length))  # nothing outside the box

    matrix = weight.new_zeros(len(start), size_out, size_in)
    matrix.scatter_add_(2, index.long().clamp_(0, size_in - 1), weight)
    return matrix.div_(matrix.sum(2, keepdim=True))


def resized_crop(images, boxes, size):
    """images (n, C, H, W) uint8, boxes (n, 4) int -> (n, C, size, size) float in [0, 1]: the box of
    each image, resized."""
    n, channels, height, width = images.shape
    top, left, h, w = torch.as_tensor(boxes).to(images.device).unbind(1)
    x = images.float().mul_(1 / 255).view(n, channels * height, width)
    x = x @ resize_matrix(left, w, width, size).transpose(1, 2)
    rows = resize_matrix(top, h, height, size)[:, None]
    x = rows @ x.view(n, channels, height, size)
    return x.clamp_(0, 1)  # bicubic overshoots


def crop_images(images, crops, draws):
    """uint8 images (n, 3, H, W), a Crop and its numbers (n, 22) per view -> a batch per view."""
    height, width = images.shape[2:]
    views = []
    for crop, u in zip(crops, draws):
        views.append(resized_crop(images, crop.boxes(u, height, width), crop.size))
    return views


def as_tall(clips):
    """Clips (n, T, 3, H, W) -> (n, 3, T H, W), the frames one below the other: an operation on such
    a picture flips or colours all frames of a clip alike."""
    return clips.transpose(1, 2).flatten(2, 3)


def as_clips(x, frames):
    """The inverse of as_tall."""
    return x.unflatten(2, (frames, -1)).transpose(1, 2)


# The following take and return float images (n, 3, H, W) in [0, 1]. They draw one set of
# parameters per image from rand, a BatchRandom.


def random_flip(x, rand, p=0.5):
    """Horizontal flip with probability p."""
    flipped = column(rand.uniform() < p, x)
    return torch.lerp(x, x.flip(3), flipped)  # lerp by exactly 0 or 1 is faster than where


def random_grayscale(x, rand, p):
    """The grey image in all three channels with probability p."""
    grey = luminance(x).expand_as(x)
    return torch.lerp(x, grey, column(rand.uniform() < p, x))


def color_jitter(x, rand, brightness, contrast, saturation, hue, p=1.0):
    """torchvision's ColorJitter with probability p: brightness, contrast and saturation times a
    factor from 1 - s to 1 + s, hue shifted by -hue to hue of a turn, the four in random order,
    clamped to [0, 1] after each."""
    on = rand.uniform() < p
    order = rand.uniform(columns=(4,)).argsort(1)  # (n, 4): which operation comes first, second ...
    factors = []
    for s in (brightness, contrast, saturation):
        factors.append(rand.uniform(max(0.0, 1 - s), 1 + s))
    factors.append(torch.ones(len(x)))  # in the turn of the hue, the blend below changes nothing
    factors = torch.stack(factors, 1)  # (n, 4)
    shift = rand.uniform(-hue, hue)
    x = x.clone()

    for operation in order.unbind(1):  # (n,): 0 brightness, 1 contrast, 2 saturation, 3 hue
        # f x + (1 - f) m, where m is 0 (brightness), the mean grey level, or the grey image
        f = factors.gather(1, operation[:, None])[:, 0]
        f = torch.where(on, f, 1.0)
        grey = luminance(x)
        mean = grey.mean((2, 3), keepdim=True)
        towards_mean = column((1 - f) * (operation == 1), x)
        towards_grey = column((1 - f) * (operation == 2), x)
        grey.mul_(towards_grey).add_(mean * towards_mean)
        x.mul_(column(f, x)).add_(grey).clamp_(0, 1)

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
    inside = (middle - low) / chroma.clamp(min=1e-12)  # how far into the sextant
    hue = (sextant + inside).abs_().add_(6 * shift)
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
    taps = taps * (taps > 1e-30)  # below 1e-38 a CPU multiplies many times slower
    taps = taps / taps.sum(1, keepdim=True)
    taps = taps[:, None].expand(-1, size, -1)

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
