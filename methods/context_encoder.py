"""Context encoder: Feature Learning by Inpainting.
Pathak, Krähenbühl, Donahue, Darrell, Efros, CVPR 2016. https://arxiv.org/abs/1604.07379
Official code (Torch): https://github.com/pathak22/context-encoder

Idea. Cut a hole into an image and fill it from what is around it. The network has to recognise what
the picture shows to know what is missing. Often many contents would fit. Their mean has the least
squared error, but it is blurred. A second network, the discriminator, therefore learns to tell
filled images from real ones, and the first also learns to deceive it: an adversarial loss, as that
of a generative adversarial network (GAN). The hole is a square in the centre, or has a random
shape; features learned with a fixed square depend on it, so random shapes are the default.

Notation. N images in the global batch, n = N / processes on this process; x (n, 3, H, W) the
images; hidden (n, 1, H, W) is 1 in a hole and 0 elsewhere; h = f(x with holes) (n, D, g, g) map
of the encoder f, whose mean over the g x g places is kept for later use; y = F(x with holes) what
the decoder makes of h, in the region R that is predicted; D(x) and D(y) the probability that the
discriminator gives to R being real; a = --adv-weight. Section 3.2, as in the official code:

    L_rec = mean over the pixels of R of  w (x - y)^2      w = 1 in the hole
    L_adv = mean over images of  -log D(y)
    L     = (1 - a) L_rec + a L_adv                        the loss of encoder and decoder
    L_D   = mean over images of  -log D(x) - log(1 - D(y)) the loss of the discriminator

--mask random: R is the whole image, a quarter of it is hidden, and w = 1 everywhere.
--mask center: R is the central square, a quarter of the image. Only its inside is hidden; a border
of --overlap pixels stays visible, with w = --overlap-weight, so that the painting fits around it.

Run.
    python methods/context_encoder.py                         one CPU core, about 12 minutes
    python methods/context_encoder.py --recipe cifar10        one GPU
    torchrun --nproc_per_node 8 methods/context_encoder.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.
--adv-weight 0 is reconstruction alone, as for the features that the authors published. The run
folder also gets inpainted.png: test images with holes, filled.

Reached. On emoji after 40 epochs, 731 s on one busy core: kNN 56.7 % (untrained 50.8, raw pixels
53.9); linear 59.0 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The encoder is a ResNet or ViT | paper: AlexNet for features; official code: five
       convolutions. One convolution over all places, at most 4 x 4 after averaging, leads to the
       decoder | paper: a fully-connected layer per channel; official code: a convolution over 4 x 4
       places. The decoder doubles the side from 4 pixels to that of R, as in the official code.
    2. Each image has a hole of its own, a quarter of its pixels exactly: those with the least of a
       smooth random pattern | official code: one hole per batch, where a pattern is below 1/4,
       drawn again until it covers 20 to 30 %.
    3. Holes get ImageNet's mean colour (123, 117, 104 of 255 for red, green, blue) | official code:
       the same numbers in the wrong order, 117, 104, 123.
    4. L_adv is -log D(y), as in the official code | paper: log(1 - D(y)), of which hardly any
       gradient is left where D is sure. D takes its step first, then the new D judges y | official
       code: the D before its step. The convolutions of decoder and discriminator have no offsets |
       official code: offsets that are set to 0 before each step.
    5. The learning rates fall to zero by a cosine, after a warm-up | official code: constant, and a
       tenth without adversarial loss: add --lr 8e-4 to --recipe paper --adv-weight 0. Views are
       random resized crops, half of them mirrored | official code: 128 pixels of an image whose
       shorter side has 350, half of them mirrored.
    6. The visible pixels of random holes weigh 1 | official code: 1, or 10 by an option; paper: 0.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import (ARCHS, VITS, Loader, Run, ViT, fail, first_batch, join_processes, load_data,
                    parse, patch_side, save_grid)
from kernels.collectives import distribute, rank, world
from kernels.views import Crop, denormalize, normalize, random_flip, resize_matrix, whole_image

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def reconstruction_loss(y, x, w):
    """L_rec. y, x: (n, 3, side, side) in [-1, 1]; w: (n, 1, side, side)."""
    return (w * (x - y).square()).mean()


def adversarial_loss(fake):
    """L_adv. fake: (n,) log(D(y) / (1 - D(y))), the discriminator's output before the sigmoid."""
    return F.softplus(-fake).mean()


def discriminator_loss(real, fake):
    """L_D. real, fake: (n,) its outputs for x and for y, before the sigmoid."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


# The network.


def backbone(arch, size):
    """common.backbone. The feature of a ViT is the mean of its patches, which are what is used."""
    return common.backbone(arch, size, pool="mean")


def last_map(net, x):
    """The map (n, D, g, g) whose mean over the places is the feature."""
    if isinstance(net, ViT):
        patches = net.tokens(x)[:, 1:].transpose(1, 2)  # (n, D, L)
        return patches.unflatten(2, (net.grid, net.grid))
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def widths(side, width):
    """Channels of the decoder at 4, 8, 16, ... pixels, up to half the side of what it paints: for
    32 pixels 8, 4 and 2 times `width`. The discriminator has the same at the same sides."""
    doublings = int(math.log2(side / 4))
    return [max(8 >> i, 1) * width for i in range(doublings)]


def init_normal(module):
    """The official code's initial values: normal, of deviation 0.02."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class ContextEncoder(nn.Module):
    """Normalised images with holes (n, 3, size, size) -> y (n, 3, side, side) in [-1, 1]."""

    def __init__(self, arch, size, side, bottleneck, width):
        super().__init__()
        self.backbone = backbone(arch, size)
        with torch.no_grad():
            empty = self.backbone.first_layer.weight.new_zeros(1, 3, size, size)
            places = last_map(self.backbone.eval(), empty).shape[2]  # g
        self.backbone.train()

        places = min(places, 4)
        channels = widths(side, width)
        layers = [
            nn.AdaptiveAvgPool2d(places),  # for maps that are larger than the official 4 x 4
            nn.Conv2d(self.backbone.out_dim, bottleneck, places, bias=False),
            nn.BatchNorm2d(bottleneck),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(bottleneck, channels[0], 4, bias=False),  # one place to 4 x 4
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(),
        ]
        for before, after in zip(channels, channels[1:]):
            layers.append(nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False))
            layers.append(nn.BatchNorm2d(after))
            layers.append(nn.ReLU())
        layers.append(nn.ConvTranspose2d(channels[-1], 3, 4, 2, 1, bias=False))
        self.decoder = nn.Sequential(*layers, nn.Tanh())
        self.decoder.apply(init_normal)

    def forward(self, x):
        return self.decoder(last_map(self.backbone, x))


class Discriminator(nn.Module):
    """Images (n, 3, side, side) in [-1, 1] -> (n,): log(D / (1 - D))."""

    def __init__(self, side, width):
        super().__init__()
        channels = widths(side, width)[::-1]
        layers = [
            nn.Conv2d(3, channels[0], 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2),
        ]
        for before, after in zip(channels, channels[1:]):
            layers.append(nn.Conv2d(before, after, 4, 2, 1, bias=False))
            layers.append(nn.BatchNorm2d(after))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(channels[-1], 1, 4, bias=False))  # 4 x 4 places to one
        self.layers = nn.Sequential(*layers)
        self.apply(init_normal)

    def forward(self, x):
        return self.layers(x).flatten()


# The views.


def random_holes(rand, count, size, cells):
    """hidden (count, 1, size, size): smooth random regions, a quarter of the pixels of each image.
    Each is a window of `cells` numbers along a side, at a random place of a pattern of its own."""
    grid = cells + 1
    pattern = rand.uniform(columns=(1, grid, grid))  # (n, 1, grid, grid)
    top, left = rand.uniform(columns=(2,)).unbind(1)
    length = torch.full_like(top, cells)
    rows = resize_matrix(top, length, grid, size)[:, None]  # (n, 1, size, grid)
    columns = resize_matrix(left, length, grid, size)[:, None]
    pattern = rows @ pattern @ columns.mT  # (n, 1, size, size), by Keys' cubic
    order = pattern.flatten(1).argsort(1).argsort(1)  # the rank of each pixel
    return (order < size**2 // 4).view(pattern.shape).to(pattern)


def central_hole(count, size, overlap):
    """hidden (count, 1, size, size): the central square but for a border of `overlap` pixels."""
    hidden = torch.zeros(count, 1, size, size)
    edge = size // 4 + overlap
    hidden[:, :, edge:-edge, edge:-edge] = 1
    return hidden


def views(args):
    """A random crop and flip, normalised, and as a fourth channel what is hidden of it."""

    def augment(x, rand):
        x = normalize(random_flip(x, rand))
        if args.mask == "random":
            hidden = random_holes(rand, len(x), args.size, args.cells)
        else:
            hidden = central_hole(len(x), args.size, args.overlap)
        return torch.cat([x, hidden.to(x, non_blocking=True)], 1)  # (n, 4, H, W)

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


def with_holes(view):
    """A view (n, 4, H, W) -> what the network sees: 0, the mean colour, where it is hidden."""
    return view[:, :3] * (1 - view[:, 3:])


def region(x, side):
    """R: the central square of that side."""
    edge = (x.shape[3] - side) // 2
    return x[:, :, edge : edge + side, edge : edge + side]


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 128, "side of a view, pixels: a power of two"),
    "arch": ("resnet14", "resnet18", "resnet50", "the encoder", ARCHS),
    "batch": (64, 128, 64, "images per step, over all processes"),
    "epochs": (40, 200, 500, "passes over the training images"),
    "warmup": (1.0, 1.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (4e-3, 4e-3, 8e-3, "learning rate of encoder and decoder per 256 images"),
    "d_share": (0.1, 0.1, 0.1, "learning rate of the discriminator, as a share of --lr"),
    "mask": ("random", "random", "random", "which region is hidden", ("random", "center")),
    # the official code: 0.06 numbers per pixel
    "cells": (8, 8, 8, "numbers of the random pattern along a side", "[1, inf)"),
    "overlap": (1, 1, 4, "with --mask center: border of the square that is not hidden, pixels"),
    "overlap_weight": (10.0, 10.0, 10.0, "weight of that border in the loss"),
    "adv_weight": (1e-3, 1e-3, 1e-3, "weight of the adversarial loss; 0: none", "[0, 1)"),
    "bottleneck": (256, 512, 4000, "channels between encoder and decoder", "[1, inf)"),
    "width": (16, 32, 64, "channels of decoder and discriminator at their finest", "[1, inf)"),
    "min_crop": (0.5, 0.5, 0.1, "smallest crop, share of the image's area", "(0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.size < 16 or args.size & (args.size - 1):
        fail(
            f"--size {args.size}: choose 16, 32, 64, ..., because the decoder doubles the side of "
            "what it paints"
        )
    most = args.size // 4 - 1
    if args.overlap > most:
        fail(f"--overlap {args.overlap}: choose at most {most}, or nothing would be hidden")
    if args.arch in VITS:
        patch_side(args.size)  # exits if it does not divide the side
    return args


def learning_rate(step, args, steps_per_epoch):  # copy of: methods/simclr.py::learning_rate
    """Base rate x batch / 256, linear warm-up, then cosine to 0. `step` counts from 0 over the
    whole run."""
    peak = args.lr * args.batch / 256
    warmup = args.warmup * steps_per_epoch
    total = args.epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / warmup
    angle = math.pi * (step - warmup) / (total - warmup)
    return peak * 0.5 * (1 + math.cos(angle))


def show(views):
    """For views.png: the crop, which is to be painted, and what the network sees of it."""
    (view,) = views  # (n, 4, H, W)
    return {"target": denormalize(view[:, :3]), "seen": denormalize(with_holes(view))}


@torch.no_grad()
def draw_inpainted(path, run):
    """Twelve test images, with holes, and filled."""
    args = run.args
    split = run.data.test or run.data.bank
    ((_, augment),) = views(args)
    view = whole_image(args.size, augment)
    (view,) = first_batch(split, [view], 12 * world(), args.seed, run.device)

    run.model.eval()
    y = run.model(with_holes(view))
    run.model.train()
    image = denormalize(view[:, :3])
    hidden = view[:, 3:]
    edge = (args.size - y.shape[3]) // 2
    painted = F.pad((y + 1) / 2, (edge, edge, edge, edge))  # (12, 3, H, W)
    filled = torch.lerp(image, painted, hidden)

    rows = list(zip(image, denormalize(with_holes(view)), filled))
    note = f"{run.name}: the hidden regions are painted by the network"
    save_grid(path, rows, ["image", "seen", "filled"], note=note)


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    random = args.mask == "random"
    side = args.size if random else args.size // 2  # of R
    visible_weight = 1.0 if random else args.overlap_weight
    model = ContextEncoder(args.arch, args.size, side, args.bottleneck, args.width).to(device)
    discriminator = Discriminator(side, args.width).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.5, 0.999))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.0, betas=(0.5, 0.999))
    state = {
        "optimizer": optimizer,
        "discriminator": discriminator,
        "discriminator_optimizer": d_optimizer,
    }
    run = Run("context_encoder", args, data, loader, model, state, show=show)
    wrapped = distribute(model, device, args.compile)
    wrapped_discriminator = distribute(discriminator, device, args.compile)
    mixed = {"dtype": torch.bfloat16, "enabled": device.type == "cuda"}

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (view,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for group in d_optimizer.param_groups:
                group["lr"] = lr * args.d_share

            x = region(2 * denormalize(view[:, :3]) - 1, side)
            hidden = region(view[:, 3:], side)
            with torch.autocast(device.type, **mixed):
                y = wrapped(with_holes(view))  # (n, 3, side, side)
            y = y.float()

            # The discriminator's step. Real and painted images have batch statistics of their own.
            if args.adv_weight:
                with torch.autocast(device.type, **mixed):
                    real = wrapped_discriminator(x)  # (n,)
                    fake = wrapped_discriminator(y.detach())  # (n,)
                d_loss = discriminator_loss(real.float(), fake.float())
                d_optimizer.zero_grad()
                d_loss.backward()
                d_optimizer.step()

            # The step of encoder and decoder. The means over the images of this process;
            # DistributedDataParallel averages the gradients: exactly the gradient of one process
            # with all N images.
            w = hidden + visible_weight * (1 - hidden)
            loss = reconstruction_loss(y, x, w)
            parts = {"reconstruction": loss.detach()}
            if args.adv_weight:
                # Its own gradients are not wanted here, so the discriminator is not wrapped.
                discriminator.requires_grad_(False)
                with torch.autocast(device.type, **mixed):
                    fake = discriminator(y)  # (n,)
                discriminator.requires_grad_(True)
                adversarial = adversarial_loss(fake.float())
                loss = (1 - args.adv_weight) * loss + args.adv_weight * adversarial
                parts |= {"adversarial": adversarial.detach(), "discriminator": d_loss.detach()}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, **parts)
        run.end_epoch(epoch)
    if rank() == 0:
        draw_inpainted(run.folder / "inpainted.png", run)
    run.finish()


if __name__ == "__main__":
    main()
