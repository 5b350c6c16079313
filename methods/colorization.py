"""Colorization: Colorful Image Colorization.
Zhang, Isola, Efros, ECCV 2016. https://arxiv.org/abs/1603.08511
Official code (Caffe): https://github.com/richzhang/colorization/tree/caffe

Idea. Take the colour away from an image and predict it. Which colour a place should have depends on what it shows, so a
network that colours well must recognise things, and images are their own labels. The colour of a thing is often open (a
ball may be red or blue), so the network predicts a distribution over colours instead of their mean, which would be grey;
and because dull colours are most of the pixels, rare colours weigh more in the loss.

Notation. N images of the global batch, n = N / processes of them on this one; x (n, 3, H, W) colour images, of which the
network sees the lightness L alone (CIE Lab, white D65: L 0 to 100, a green to red and b blue to yellow, about -110 to 110);
Y (n, 2, H/4, W/4) their ab; bins (Q, 2) the in-gamut points of a grid of 10 in ab; Z soft targets over the bins, Zhat the
predicted distribution; p (Q,) how often the data show each bin; v weight of a place, that of its nearest bin. Eq. 2 to 5:

    loss = mean over places of  -v(Z) sum over q of Z_q log Zhat_q           w ~ 1 / ((1 - lambda) p + lambda / Q), E_p[w] = 1
    colour shown = sum over q of bin_q f_T(Zhat)_q       f_T(z) = exp(log(z) / T) / sum over q of exp(log(z_q) / T), T = 0.38

Run.
    python methods/colorization.py                                        two CPU cores, 3 minutes: emoji, 32 pixels
    python methods/colorization.py --data cifar10 --arch resnet18 --batch 256 --epochs 200 --lr 2e-3            one GPU
    torchrun --nproc_per_node 8 methods/colorization.py --data IMAGENET --size 176 --arch resnet50 --batch 320 \
        --epochs 15 --lr 2e-4 --weight-decay 1e-3 --workers 12                        eight GPUs, the paper's optimizer
--batch counts the images of all processes together. Pictures: colorized.png. Results: the table in README.md.

Differs from the paper.
    1. The network is a ResNet whose four stages, brought to a quarter of the image's side, are added (a hypercolumn) before
       two convolutions predict the colours; the paper uses a VGG-like network of constant resolution in its deeper half.
    2. The representation is evaluated as in the paper on lightness alone: backbone(...) turns whatever image it is given into
       L first (in three equal channels, normalised like an image; the official code feeds L - 50 in one). The random
       initialisation in the tables sees the same; the raw pixels there are in colour.
    3. Q = 261: the bins to which at least one 8-bit sRGB colour is nearest. The official list of 313 also has points
       outside, such as (100, 0), to which no sRGB colour is nearest.
    4. p is counted on the crops of the first epoch, of at most 100 steps, by nearest bin, and then smoothed as in the paper
       (Gaussian of 5 in ab); the official code ships ImageNet's, and its uniform part covers only the bins that occur. As in
       the official code, images without colour (no |ab| above 5) teach nothing. Soft targets have the paper's 5 nearest bins;
       the official code takes 10.
    5. The loss is the mean over places and is reported with its weights; the paper sums, and the official code gives the
       weights to the gradient alone.
    6. Adam's learning rate has a warm-up and a cosine to zero; the paper divides it twice. Crops are random resized crops.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common.py is found from any working directory
import common
from common import (MEAN, STD, Crop, Loader, Run, all_reduce_sum, distribute, fail, load_data, normalize, random_flip,
                    rank, save_grid, start, world)

FROM_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))  # to XYZ
WHITE = (0.95047, 1.0, 1.08883)  # XYZ of D65


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="emoji", help="emoji, cifar10, cifar100, stl10 or a folder; not the grey fashion sets")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=32, help="side of a view, pixels; a multiple of 4 (paper, its code: 176)")
    p.add_argument("--arch", default="resnet14", help="resnet14, resnet18, resnet34 or resnet50 (paper: VGG-like)")
    p.add_argument("--batch", type=int, default=64, help="images a step, over all processes (paper, its code: 40)")
    p.add_argument("--epochs", type=int, default=40, help="passes over the training images (paper: 14)")
    p.add_argument("--warmup", type=float, default=1, help="epochs of linear learning-rate warm-up (paper: 0)")
    p.add_argument("--lr", type=float, default=4e-3, help="learning rate per 256 images (paper: 3e-5 at 40)")
    p.add_argument("--weight-decay", type=float, default=1e-4, help="on all parameters, in the gradient (paper: 1e-3)")
    p.add_argument("--min-crop", type=float, default=0.5, help="smallest crop, share of the area (code: all of one size)")
    p.add_argument("--lambda", dest="lamb", type=float, default=0.5, help="uniform share in the weights (paper: 0.5)")
    p.add_argument("--temperature", type=float, default=0.38, help="T of the colours in colorized.png (paper: 0.38)")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and the views")
    p.add_argument("--eval-every", type=int, default=10, help="epochs between kNN evaluations")
    p.add_argument("--out", default=None,
                   help="run folder (default: runs/colorization-DATA-SEED); a run found there is continued")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = p.parse_args()
    if args.size % 4:
        fail(f"--size {args.size}: choose a multiple of 4, because colours are predicted at a quarter of the side")
    if args.temperature <= 0:
        fail(f"--temperature {args.temperature}: choose a number above 0")
    return args


def views(args):
    """A random crop and flip, in colour: the network itself looks at the lightness alone."""
    def augment(x, rand):
        return normalize(random_flip(x, rand))

    return [(Crop(args.size, scale=(args.min_crop, 1.0)), augment)]


# Colour. Sums are written out, because under autocast a matrix product would be done in bfloat16.


def mix(matrix, x):
    """The matrix (3, 3) times the channels of x (n, 3, H, W)."""
    return torch.stack([sum(m * c for m, c in zip(row, x.unbind(1))) for row in matrix], 1)


def rgb_to_lab(x):
    """sRGB (n, 3, H, W) in [0, 1] -> CIE Lab, white D65: L in [0, 100], a and b about -110 to 110. Keeps the dtype."""
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = mix(FROM_RGB, linear) / x.new_tensor(WHITE).view(3, 1, 1)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-6) ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    X, Y, Z = f.unbind(1)
    return torch.stack([116 * Y - 16, 500 * (X - Y), 200 * (Y - Z)], 1)


def lab_to_rgb(lab):
    """The inverse of rgb_to_lab; colours outside sRGB are clipped."""
    L, a, b = lab.unbind(1)
    Y = (L + 16) / 116
    f = torch.stack([Y + a / 500, Y, Y - b / 200], 1)
    xyz = torch.where(f > 6 / 29, f ** 3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * lab.new_tensor(WHITE).view(3, 1, 1)
    linear = mix(torch.tensor(FROM_RGB, dtype=torch.float64).inverse().tolist(), xyz).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=1e-6) ** (1 / 2.4) - 0.055, 12.92 * linear)


def denormalize(x):
    """The inverse of normalize: images (n, 3, H, W) in [0, 1]."""
    mean, std = (torch.tensor(v).to(x).view(3, 1, 1) for v in (MEAN, STD))
    return (x * std + mean).clamp(0, 1)


def lightness(x):
    """Normalised colour images -> their L in all three channels, in [0, 1] before it is normalised likewise."""
    return normalize((rgb_to_lab(denormalize(x.float()))[:, :1] / 100).expand(-1, 3, -1, -1))


def gamut(step=10):
    """bins (Q, 2) float32: the points of a grid of `step` in ab to which at least one sRGB colour is nearest. 86 levels a
    channel, every third of 8 bits, find the same 261 bins as all 256 do."""
    level = torch.linspace(0, 1, 86, dtype=torch.float64)
    rgb = torch.cartesian_prod(level, level, level).T.reshape(1, 3, 1, -1)
    ab = rgb_to_lab(rgb)[0, 1:, 0].T  # (86^3, 2)
    return step * (ab / step).round().unique(dim=0).float()


def backbone(arch, size):
    """common.backbone that looks at lightness: whatever normalised images it is given, its first convolution gets their L."""
    net = common.backbone(arch, size)
    net.conv1.register_forward_pre_hook(lambda conv, inputs: (lightness(*inputs),))
    return net


class Colorizer(nn.Module):
    def __init__(self, arch, size, bins, width=128):
        super().__init__()
        self.backbone, self.side = backbone(arch, size), size // 4
        D = self.backbone.out_dim
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (D // 8, D // 4, D // 2, D))  # the four stages' channels
        self.head = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, len(bins), 1))
        self.register_buffer("bins", bins)  # (Q, 2)
        self.register_buffer("weights", torch.ones(len(bins)))  # w (Q,), set before training

    def forward(self, x):
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        total = 0
        for stage, lateral in zip((net.layer1, net.layer2, net.layer3, net.layer4), self.lateral):
            x = stage(x)
            total = total + F.adaptive_avg_pool2d(lateral(x), self.side)  # repeats pixels where the stage is smaller
        return self.head(total)  # (n, Q, H/4, W/4)


# The loss and what it needs


def soft_targets(ab, bins, neighbours=5, sigma=5.0):
    """Section 2.1: ab (n, 2, h, w) -> nearest (M, 5) int64 bins of each of the M = n h w places, the nearest first, and
    their weights (M, 5) in Z: a Gaussian of the distance, with sum 1."""
    distance, nearest = torch.cdist(ab.movedim(1, 3).flatten(0, 2), bins).topk(neighbours, largest=False)
    return nearest, (-distance.square() / (2 * sigma**2)).softmax(1)


def class_weights(count, bins, lamb, sigma=5.0):
    """Eq. 4: w (Q,) from how often each bin was seen, count (Q,). p is smoothed in ab; its mass stays 1, and E_p[w] = 1."""
    kernel = (-torch.cdist(bins, bins).square() / (2 * sigma**2)).softmax(0)  # each column spreads the mass of one bin
    p = kernel @ (count / count.sum())
    w = 1 / ((1 - lamb) * p + lamb / len(p))
    return w / (p * w).sum()


def colorization_loss(logits, nearest, z, v):
    """Eq. 2, mean over the places: logits (n, Q, h, w); nearest and z (M, 5), the bins of non-zero Z and Z there; v (M,)."""
    log_zhat = logits.movedim(1, 3).flatten(0, 2).log_softmax(1)  # (M, Q)
    return -(v * (z * log_zhat.gather(1, nearest)).sum(1)).mean()


def annealed_mean(logits, bins, T):
    """Eq. 5: logits (n, Q, h, w) -> ab (n, 2, h, w). T to 0 is the most likely bin, T = 1 the mean of the distribution."""
    return torch.einsum("nqhw,qc->nchw", (logits / T).softmax(1), bins)


def targets(x, bins):
    """Normalised colour images x (n, 3, H, W) -> nearest, z (M, 5) as in soft_targets, of every fourth pixel in both directions
    (as officially; a mean over pixels would invent colours), and (M,) bool: the image has colour, some |ab| above 5."""
    ab = rgb_to_lab(denormalize(x))[:, 1:, 2::4, 2::4]  # (n, 2, H/4, W/4)
    colourful = (ab.abs() > 5).flatten(1).any(1)  # (n,)
    return *soft_targets(ab, bins), colourful.repeat_interleave(ab[0, 0].numel())


def count_colours(loader, bins, steps=100):
    """How many places of the first epoch (at most `steps` batches), over all processes, are nearest to each bin: (Q,), float32.
    Images without colour do not count."""
    count = torch.zeros(len(bins), device=loader.device)
    for _, (x,) in itertools.islice(loader(0), steps):
        nearest, _, colourful = targets(x, bins)
        count += torch.bincount(nearest[colourful, 0], minlength=len(bins))
    return all_reduce_sum(count)


def learning_rate(step, args, steps):  # copy of: methods/simclr.py::learning_rate
    """Base rate x batch / 256, linear warm-up, then cosine to 0. step counts from 0, `steps` are those of an epoch."""
    peak, warmup, total = args.lr * args.batch / 256, args.warmup * steps, args.epochs * steps
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@torch.no_grad()
def draw_colorized(path, run):
    """Twelve test images in three rows: without colour, as the network colours them, and as they are."""
    size, split = run.args.size, run.data.test or run.data.bank
    whole = Crop(size, scale=(1, 1), ratio=(1, 1)), lambda x, rand: x
    _, (x,) = next(Loader(split, [whole], min(12, len(split.images) // world()) * world(), run.args.seed, run.device)(0))
    run.model.eval()
    ab = annealed_mean(run.model(normalize(x)), run.model.bins, run.args.temperature)  # (12, 2, H/4, W/4)
    run.model.train()
    L, ab = rgb_to_lab(x)[:, :1], F.interpolate(ab, (size, size), mode="bilinear")
    save_grid(path, [lab_to_rgb(torch.cat([L, 0 * ab], 1)), lab_to_rgb(torch.cat([L, ab], 1)), x])


def main():
    args = get_args()
    device = start(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    bins = gamut().to(device)
    count = count_colours(loader, bins)
    if count.sum() == 0:
        fail(f"--data {args.data}: its images are grey; colorization learns from colours, for example those of emoji")
    model = Colorizer(args.arch, args.size, bins)
    model.weights.copy_(class_weights(count, bins, args.lamb))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=args.weight_decay)
    run = Run("colorization", args, data, loader, model, {"optimizer": optimizer})
    network = distribute(model, device, args.compile)

    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            nearest, z, colourful = targets(x, model.bins)
            v = model.weights[nearest[:, 0]] * colourful
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = network(x)  # (n, Q, H/4, W/4), from the lightness of x
            # The mean over this process's places; DistributedDataParallel averages the gradients of the processes.
            loss = colorization_loss(logits.float(), nearest, z, v)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    if rank() == 0:
        draw_colorized(run.folder / "colorized.png", run)
    run.finish()


if __name__ == "__main__":
    main()
