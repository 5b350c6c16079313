"""DrLIM: Dimensionality Reduction by Learning an Invariant Mapping, and the contrastive loss.
Hadsell, Chopra, LeCun, CVPR 2006. https://doi.org/10.1109/CVPR.2006.100
(https://yann.lecun.com/exdb/publis/pdf/hadsell-chopra-lecun-06.pdf)
Before it: Chopra, Hadsell, LeCun, CVPR 2005, with an exponential in place of the margin.
https://doi.org/10.1109/CVPR.2005.202
Official code: none was published.

Idea. All that is given is which pairs of images are similar. A network maps every image to a point,
and two springs act on the points: similar ones attract each other, however far apart they are, and
dissimilar ones repel each other until their distance reaches a margin. Without the second spring
all images would end in one point. The loss compares only points, never the images themselves. So
the map learns to ignore whatever differs between similar images: where the object stands, its
colours. The other files of metric learning, and SimCLR, vary this contrastive loss: how many
dissimilar images are compared at once, and how.

Notation. N images in the global batch, n = N / processes on this process; x1, x2 (n, 3, H, W) two
views of each; h = f(x) (n, D) representation, kept for later use; z = g(h) (n, d) point;
D_ij = ||z_i - z_j|| distance, not squared; m margin. Two views are similar if they have the same
name: the number of their image, or its label, or what it draws (--positives).

    L = mean over similar pairs of  1/2 D_ij^2
        + w  mean over dissimilar pairs of  1/2 max(0, m - D_ij)^2

over all pairs of the 2N views. By default each image gives one similar pair, its two views. Then
there are 2N - 2 dissimilar pairs for each similar one, and w = 2N - 2 makes L the paper's sum over
all pairs, divided by N. Some lecture notes leave out both factors 1/2.

Run.
    python methods/drlim.py                                   one CPU core, about 8 minutes
    python methods/drlim.py --recipe fashion                  the plane of the paper's figures
    python methods/drlim.py --recipe cifar10                  one GPU
    torchrun --nproc_per_node 8 methods/drlim.py --recipe paper --data fashion-mnist
--batch counts the images of all processes together.
With --positives labels or drawings the labels are used: that is no longer self-supervised. With
--dim 2, points.png shows the test images in the plane.

Reached. On emoji after 45 epochs, 486 s on one busy core: kNN 54.9 % (untrained 50.8, raw pixels
53.9); linear 60.0 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or other code.)
    1. Similar are two views of an image, made by SimCLR's crops and colours, or images of one label
       or one emoji | of MNIST's digits 4 and 9 the five nearest neighbours by pixels, or copies of
       an image that are shifted by a few pixels; of NORB's airplanes neighbouring camera positions.
    2. w is 2 or 30: dissimilar pairs count less than in the paper's sum, which the column `paper`
       has (w = 254). A step uses all pairs of the views of a batch | the sum over all pairs of the
       training set, pair by pair. pytorch-metric-learning: distances that are not squared, between
       unit vectors, and the mean only over pairs that have a loss.
    3. The points have 128 dimensions and length 1, except in the columns `fashion` and `paper`, and
       the features before g are kept | two or three dimensions, any length, which are the result.
    4. The network is a ResNet or ViT, trained by AdamW, with a hidden layer behind it, except in
       the column `paper` | two convolutions, or two layers, trained by stochastic gradient descent.
       Margin, batch, epochs and rates of the column `paper` are ours.
    5. At D = 0 the gradient of D is taken to be 0: two dissimilar views at the same point do not
       repel each other | not mentioned.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (ARCHS, PairLoader, Run, backbone, features, join_processes, load_data, parse,
                    positive_names, replace_file)
from kernels.collectives import distribute, gather, rank
from kernels.views import Crop, color_jitter, normalize, random_flip, random_grayscale

KIND = "metric"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def contrastive_loss(z, name, margin, repel):
    """The equation above, over all pairs of the views that are given. Returns a scalar.

    z: (2N, d) points; name: (2N,) integers, equal for similar views; repel: the weight w."""
    # cdist without matrix products, in which small distances would be lost to rounding. Where two
    # views coincide its gradient is 0.
    D = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")  # (2N, 2N)
    similar = name[:, None] == name
    attracted = similar.triu(diagonal=1)  # each pair once
    repelled = (~similar).triu(diagonal=1)

    inner = D.square() / 2 * attracted
    outer = (margin - D).clamp(min=0).square() / 2 * repelled
    inner = inner.sum() / attracted.sum().clamp(min=1)
    outer = outer.sum() / repelled.sum().clamp(min=1)
    return inner + repel * outer


# The network.


class DrLIM(nn.Module):
    def __init__(self, arch, size, dim, head):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        self.head = nn.Linear(width, dim)
        if head == "mlp":
            hidden = nn.Linear(width, width, bias=False)
            self.head = nn.Sequential(hidden, nn.BatchNorm1d(width), nn.ReLU(), self.head)

    def forward(self, x):
        h = self.backbone(x)  # (n, D)
        return self.head(h)  # (n, d)


# The views.


def views(args):
    """SimCLR's recipe without blur, for both views: random crop, flip, colours, grey."""

    def augment(x, rand):
        s = args.strength
        x = random_flip(x, rand)
        x = color_jitter(x, rand, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
        x = random_grayscale(x, rand, p=0.2)
        return normalize(x)

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment), (crop, augment)]


# Training.

POSITIVES = ("views", "labels", "drawings")
SETTINGS = {
    "recipe": ("emoji", "fashion", "cifar10", "paper", "which column gives the defaults"),
    "positives": (*["views"] * 4, "what makes a pair similar", POSITIVES),
    "size": (32, 32, 32, 32, "side of a view, pixels"),
    "arch": ("resnet14", "resnet14", "resnet18", "resnet14", "the backbone", ARCHS),
    "head": ("mlp", "mlp", "mlp", "linear", "g: a linear layer, or two layers", ("linear", "mlp")),
    "batch": (256, 256, 512, 128, "images per step, over all processes"),
    "epochs": (45, 15, 200, 100, "passes over the training images"),
    "warmup": (2.0, 1.0, 10.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (3e-3, 1e-3, 1e-3, 1e-3, "learning rate per 256 images"),
    "weight_decay": (0.05, 0.05, 0.05, 0.0, "on all parameters"),
    "dim": (128, 2, 128, 2, "dimensions of a point z; with 2 they are drawn", "[1, inf)"),
    # on the sphere, where points cannot lower the loss by shrinking
    "unit": (True, False, True, False, "points of length 1, on the unit sphere"),
    "margin": (1.4, 1.0, 1.4, 1.0, "distance m at which views no longer repel", "(0, inf)"),
    # the paper's sum has 2N - 2, here 510: so many springs that repel hide the one that attracts
    "repel": (2.0, 30.0, 2.0, 254.0, "weight w of the dissimilar pairs"),
    "strength": (0.5, 0.0, 0.5, 0.0, "strength s of the colour jitter", "[0, 1.25]"),
    "min_crop": (0.08, 0.5, 0.08, 0.5, "smallest crop, share of the image's area", "(0, 1]"),
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


def draw_points(path, run):
    """For points in the plane: where the network sends the test images, in the colours of their
    labels, which it was told only with --positives labels, and some of the images themselves."""
    from matplotlib.figure import Figure  # here, so --help need not wait for it
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    split = run.data.test or run.data.bank
    z, _ = features(run.model, split, run.args.size, run.device, run.args.workers)
    if rank() > 0:
        return
    z = z.cpu()
    if run.args.unit:
        z = F.normalize(z, dim=1)
    order = np.random.default_rng(0).permutation(len(z))
    few = torch.from_numpy(order[:60])
    ((images, _),) = split.images.whole(few, run.args.size)
    images = images.cpu().permute(0, 2, 3, 1)  # (60, H, W, 3)

    figure = Figure((7, 7), dpi=110, layout="constrained")
    axes = figure.subplots()
    labels = torch.zeros(len(z)) if split.labels is None else split.labels.cpu()
    axes.scatter(*z.T, c=labels, s=6, cmap="tab10", alpha=0.6)
    for place, image in zip(z[few].tolist(), images.numpy()):
        axes.add_artist(AnnotationBbox(OffsetImage(image, zoom=0.6), place, frameon=False))

    # The margin as a scale.
    left, bottom = z.amin(0).tolist()
    axes.plot([left, left + run.args.margin], [bottom, bottom], "k", linewidth=3)
    axes.text(left, bottom, "margin m", va="top")
    title = f"{run.name}: test images as points in the plane; colours are labels"
    axes.set(title=title, xlabel="first number of z", ylabel="second number of z", aspect="equal")
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    name = positive_names(args.positives, data.train)  # (M,)
    settings = (data.train, views(args), args.batch, args.seed, device, args.workers)
    loader = PairLoader(name, *settings)
    name = name.to(device)
    model = DrLIM(args.arch, args.size, args.dim, args.head).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    run = Run("drlim", args, data, loader, model, {"optimizer": optimizer})
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
            z = z.float()
            if args.unit:
                z = F.normalize(z, dim=1)
            z1, z2 = z.chunk(2)

            # Every process computes the whole loss, from the points of all processes. The gradient
            # runs back through gather, and DistributedDataParallel averages: exactly the gradient
            # of one process with all N images.
            z = torch.cat([gather(z1), gather(z2)])  # (2N, d)
            name_of_view = gather(name[loader.index]).repeat(2)  # (2N,)
            loss = contrastive_loss(z, name_of_view, args.margin, args.repel)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    if args.dim == 2:
        draw_points(run.folder / "points.png", run)
    run.finish()


if __name__ == "__main__":
    main()
