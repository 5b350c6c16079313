"""Lifted structure: Deep Metric Learning via Lifted Structured Feature Embedding.
Oh Song, Xiang, Jegelka, Savarese, CVPR 2016. https://arxiv.org/abs/1511.06452
Official code (Caffe): https://github.com/rksltnl/Deep-Metric-Learning-CVPR16; the loss:
https://github.com/rksltnl/Caffe-Deep-Metric-Learning-CVPR16

Idea. Pairs and triplets use few of the distances within a batch. Here each pair of positives is
compared with all negatives of both its images: its distance plus a margin should be smaller than
the distance from either image to its nearest negative. A maximum over so many distances has a
gradient at a single negative, and this negative changes from step to step, so training ends in poor
local minima. So the maximum is replaced by a smooth upper bound, the logarithm of a sum of
exponentials, in which near negatives count most and all count a little, as in the softmax of N-pair
and InfoNCE.

Notation. N images in the global batch, n = N / processes on this process; x1, x2 (n, 3, H, W) two
views of each; h = f(x) (n, D) representation, kept for later use; z = g(h) (n, d) embedding, not
normalised; D_ij = ||z_i - z_j|| distance, not squared (some lecture notes square D); a is the
margin. A view has a name: the number of its image, or its label, or what it draws (--positives).
Views of the same name are positives, others negatives. P: all pairs i < j of positives among the 2N
views; N(i): the negatives of i. Eq. 4:

    J_ij = log( sum over k in N(i) of exp(a - D_ik)  +  sum over l in N(j) of exp(a - D_jl) ) + D_ij
    L    = 1 / (2 |P|)  sum over (i, j) in P of  max(0, J_ij)^2

This J_ij is an upper bound of that of Eq. 3, which --no-smooth takes instead:

    J_ij = max( max over k in N(i) of a - D_ik,  max over l in N(j) of a - D_jl ) + D_ij

A pair with J_ij < 0 is nearer than its negatives by the margin and has no loss. The gradient of
J_ij^2 / 2 is J_ij times that of J_ij: it fades where J_ij reaches 0. If all embeddings are the same
and all images have different names, J = a + log(4N - 4), with --no-smooth J = a, and the loss is
J^2 / 2.

Run.
    python methods/lifted_structure.py                        one CPU core, about 6 minutes
    python methods/lifted_structure.py --no-smooth            the hardest negative alone
    python methods/lifted_structure.py --recipe cifar10       one GPU
    torchrun --nproc_per_node 8 methods/lifted_structure.py --recipe paper --data PATH/TO/FOLDER
--batch counts the images of all processes together.
With --positives labels or drawings the labels are used: that is no longer self-supervised.

Reached. On emoji after 30 epochs, 334 s on one busy core: kNN 57.8 % (untrained 50.8, raw pixels
53.9); linear 58.8 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. By default positives are two views of an image, made by SimCLR's crops and colours. With
       --positives labels, batches hold pairs of images of one label, each as two views | images of
       one class. Official code: random pairs, most of them negative; paper: random pairs, to which
       hard negatives from outside the batch are added.
    2. At D = 0 the gradient of D is taken to be 0 | official code: divides by D, also by 0.
       pytorch-metric-learning's loss is ours, but of normalised embeddings by default.
    3. The network is a ResNet or ViT with random weights, trained by AdamW; g has a hidden layer,
       except in the column `paper`; the features before g are evaluated | GoogLeNet, pretrained on
       ImageNet's labels, with a linear layer that learns ten times faster, by stochastic gradient
       descent; the embedding is the result.
    4. The column `paper` has the official rate, 1e-4 for 128 images, though for AdamW; its epochs
       and crops are ours | paper: 20,000 steps of 128 images, in crops of 227 pixels.
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (ARCHS, PairLoader, Run, backbone, join_processes, load_data, parse,
                    positive_names)
from kernels.collectives import distribute, gather
from kernels.views import Crop, color_jitter, normalize, random_flip, random_grayscale

KIND = "metric"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def lifted_loss(z, name, margin, smooth):
    """Eq. 4, or with smooth=False Eq. 3. Returns a scalar.

    z: (2N, d) embeddings; name: (2N,) integers, equal for positives."""
    # cdist without matrix products, in which small distances would be lost to rounding. Where two
    # views coincide its gradient is 0.
    D = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")  # (2N, 2N)
    same = name[:, None] == name

    # own: log-sum-exp, or maximum, over the negatives of each view; both: over those of the two
    # views of a pair. What is no negative gets the lowest finite number: with minus infinity the
    # gradient of logsumexp would be NaN where a view has no negative.
    lowest = torch.finfo(D.dtype).min
    inside = (margin - D).masked_fill(same, lowest)  # (2N, 2N)
    if smooth:
        own = inside.logsumexp(1)  # (2N,)
        both = torch.logaddexp(own[:, None], own)  # (2N, 2N)
    else:
        own = inside.amax(1)
        both = torch.maximum(own[:, None], own)

    J = (both + D).clamp(min=0)
    pairs = same.triu(diagonal=1)
    return (J.square() * pairs).sum() / (2 * pairs.sum())


# The network.


class LiftedStructure(nn.Module):
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


def views(args):  # copy of: methods/drlim.py::views
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
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "positives": ("views", "views", "labels", "what makes a pair positive", POSITIVES),
    "size": (32, 32, 224, "side of a view, pixels"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "head": ("mlp", "mlp", "linear", "g: a linear layer, or two layers", ("linear", "mlp")),
    "batch": (256, 512, 128, "images per step, over all processes"),
    "epochs": (30, 200, 100, "passes over the training images"),
    "warmup": (2.0, 10.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (1e-3, 1e-3, 2e-4, "learning rate per 256 images"),
    "weight_decay": (0.05, 0.05, 2e-4, "on all parameters"),
    "dim": (128, 128, 64, "dimensions of the embedding z; paper: 64 to 1024", "[1, inf)"),
    "margin": (1.0, 1.0, 1.0, "margin a between distances", "(0, inf)"),
    "smooth": (True, True, True, "the smooth upper bound of Eq. 4 in place of Eq. 3"),
    "strength": (0.5, 0.5, 0.0, "strength s of the colour jitter", "[0, 1.25]"),
    "min_crop": (0.08, 0.08, 0.5, "smallest crop, share of the image's area", "(0, 1]"),
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


def loss_of_collapse(args):
    """The loss if all embeddings are the same and all images have different names."""
    J = args.margin
    if args.smooth:
        J += math.log(4 * args.batch - 4)  # 2N - 2 negatives of each of the two views of a pair
    return J**2 / 2


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    name = positive_names(args.positives, data.train)  # (M,)
    settings = (data.train, views(args), args.batch, args.seed, device, args.workers)
    loader = PairLoader(name, *settings)
    name = name.to(device)
    model = LiftedStructure(args.arch, args.size, args.dim, args.head).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    state = {"optimizer": optimizer}
    collapsed = None
    if args.positives == "views":  # the names of the images of a batch all differ
        collapsed = ("collapsed", loss_of_collapse(args))
    run = Run("lifted_structure", args, data, loader, model, state, collapsed)
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
            z1, z2 = z.float().chunk(2)

            # Every process computes the whole loss, from the embeddings of all processes. The
            # gradient runs back through gather, and DistributedDataParallel averages: exactly the
            # gradient of one process with all N images.
            z = torch.cat([gather(z1), gather(z2)])  # (2N, d)
            name_of_view = gather(name[loader.index]).repeat(2)  # (2N,)
            loss = lifted_loss(z, name_of_view, args.margin, args.smooth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
