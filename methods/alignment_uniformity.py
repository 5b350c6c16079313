"""Alignment and Uniformity: the two aims of contrastive learning, each as a loss.
Understanding Contrastive Representation Learning through Alignment and Uniformity on the
Hypersphere. Wang, Isola, ICML 2020. https://arxiv.org/abs/2005.10242
Official code: https://github.com/ssnl/align_uniform

Idea. The paper shows that a contrastive loss such as InfoNCE, with very many negatives, asks for
two things, which can also be measured and minimised directly. Alignment: two views of an image come
to nearby points of the unit sphere. Uniformity: the points of different images spread evenly over
the sphere, which keeps as much as possible of what distinguishes them. Alignment alone would
collapse, because it is perfect if all images come to one point. Uniformity is the log of the mean
energy of all pairs, as if the points repelled each other. The energy of a pair is a Gaussian of its
distance, largest where both coincide. Neither needs a softmax or a temperature.

Notation. N images in the global batch, n = N / processes on this process; x1, x2 (n, 3, H, W) two
views of each; h = f(x) (n, D) representation, kept for later use; z1, z2 (N, d): projections of the
first and of the second views, from all processes, L2-normalised; alpha, t > 0. Section 4.1:

    alignment(z1, z2) = mean over images i of  ||z1_i - z2_i||^alpha
    uniformity(z)     = log mean over pairs of images i < j of  exp(-t ||z_i - z_j||^2)
    L = align_weight alignment(z1, z2) + uniform_weight (uniformity(z1) + uniformity(z2)) / 2

If all projections are the same, both terms are 0: the best alignment and the worst uniformity. Two
opposite points have a uniformity of -4 t, the smallest value; random points of a sphere of many
dimensions have nearly -2 t.

Run.
    python methods/alignment_uniformity.py                    one CPU core, about 6 minutes
    python methods/alignment_uniformity.py --recipe cifar10      one GPU
    torchrun --nproc_per_node 8 methods/alignment_uniformity.py --recipe paper --data stl10
--batch counts the images of all processes together.

Reached. On emoji after 36 epochs, 331 s on one busy core: kNN 57.8 % (untrained 50.8, raw pixels
53.9); linear 60.9 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The network is a ResNet or ViT, followed by a hidden layer with batch-norm that is thrown
       away with the projection | official code, STL-10: an AlexNet whose two hidden layers of 4096
       units are kept, and all weights start from a normal distribution with a deviation of 0.02.
       The runs on ImageNet, a variant of MoCo with a queue, are not in this file.
    2. The learning rate falls to zero by a cosine, after a warm-up where --warmup asks for one |
       official code: divided by ten at epochs 155, 170 and 185 of 200.
    3. Inputs are normalised by ImageNet's mean and deviation | official code: by those of STL-10.
    4. On emoji the jitter changes hues less, as in SimCLR | official code: 0.4.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import ARCHS, Loader, Run, backbone, join_processes, load_data, parse
from kernels.collectives import distribute, gather
from kernels.views import Crop, color_jitter, normalize, random_flip, random_grayscale

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def alignment_loss(z1, z2, alpha):
    """The mean distance of the two views of an image, to the power alpha. Returns a scalar.

    z1, z2: (N, d) L2-normalised; row k of both comes from image k."""
    return (z1 - z2).norm(dim=1).pow(alpha).mean()


def uniformity_loss(z, t):
    """The logarithm of the mean energy of a pair of unlike images. Returns a scalar, from -4 t to
    0, the value if all rows are the same.

    z: (N, d) L2-normalised, one view of each image."""
    distance = torch.pdist(z)  # (N (N - 1) / 2,): every pair once, none with itself
    return distance.square().mul(-t).exp().mean().log()


# The network.


class Projected(nn.Module):
    def __init__(self, arch, size, hidden, dim):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.projector = nn.Sequential(
            nn.Linear(self.backbone.out_dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, dim),
        )

    def forward(self, x):
        h = self.backbone(x)  # (n, D)
        return self.projector(h)  # (n, d)


# The views.


def views(args):
    """Crop, flip, colour jitter, grey; the same recipe for both views, with independent draws."""

    def augment(x, rand):
        x = random_flip(x, rand)
        x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.4, hue=args.hue)
        x = random_grayscale(x, rand, p=0.2)
        return normalize(x)

    crop = Crop(args.size, scale=(0.08, 1.0))
    return [(crop, augment), (crop, augment)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 64, "side of a view, pixels"),
    "arch": ("resnet14", "resnet18", "resnet18", "the backbone", ARCHS),
    "batch": (256, 512, 768, "images per step, over all processes"),
    "epochs": (36, 200, 200, "passes over the training images"),
    "warmup": (2.0, 5.0, 0.0, "epochs of linear learning-rate warm-up"),
    # 0.4, three times the paper's: emoji has only a few hundred steps
    "lr": (0.4, 0.12, 0.12, "learning rate per 256 images"),
    "weight_decay": (1e-4, 1e-4, 1e-4, "on all parameters"),
    "align_weight": (1.0, 1.0, 1.0, "weight of the alignment"),
    "uniform_weight": (1.0, 1.0, 1.0, "weight of the uniformity"),
    "alpha": (2.0, 2.0, 2.0, "power of the distance in the alignment", "[1, inf)"),
    "t": (2.0, 2.0, 2.0, "sharpness of the Gaussian in the uniformity", "(0, 20]"),
    "hidden": (512, 1024, 4096, "units of the projector's hidden layer", "[1, inf)"),
    "dim": (128, 128, 128, "dimensions of the projection z", "[2, inf)"),
    "hue": (0.1, 0.4, 0.4, "strength of the jitter of the hue", "[0, 0.5]"),
}


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


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = Projected(args.arch, args.size, args.hidden, args.dim).to(device)
    weights = model.parameters()
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    state = {"optimizer": optimizer}
    run = Run("alignment_uniformity", args, data, loader, model, state, ("collapsed", 0.0))
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # One pass for both views, so that they share the batch statistics.
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z = wrapped(torch.cat([x1, x2]))  # (2n, d)
            z = F.normalize(z.float(), dim=1)
            z1, z2 = [gather(view) for view in z.chunk(2)]  # (N, d) each, of all processes

            # Every process computes the loss of the whole batch: a pair may be on two of them. The
            # gradients pass through gather, and DistributedDataParallel averages over processes:
            # exactly the gradient of one process with all N images.
            alignment = alignment_loss(z1, z2, args.alpha)
            uniformity = (uniformity_loss(z1, args.t) + uniformity_loss(z2, args.t)) / 2
            loss = args.align_weight * alignment + args.uniform_weight * uniformity
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, alignment=alignment.detach(), uniformity=uniformity.detach())
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
