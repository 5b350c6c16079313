"""Triplet loss: FaceNet: A Unified Embedding for Face Recognition and Clustering.
Schroff, Kalenichenko, Philbin, CVPR 2015. https://arxiv.org/abs/1503.03832
Before it: Weinberger, Blitzer, Saul, NIPS 2005 (large margin nearest neighbours).
Official code: none was published. TensorFlow's triplet_semihard_loss, by the same company:
https://github.com/tensorflow/addons/blob/master/tensorflow_addons/losses/triplet.py

Idea. An image, the anchor, should be nearer to each of its positives than to any negative, by a
margin. Only the difference of two distances matters, so positives need not end in one point, and
images that are far away exert no force. Most triplets satisfy the margin soon and teach nothing, so
each batch is searched for hard ones. But if the nearest negative is always taken, early training
can send all images to one point, because that costs only the margin. FaceNet takes a negative that
is semi-hard: farther away than the positive, but by less than the margin. Here it is the nearest
negative beyond the positive; if even that is farther by the margin, the pair has no loss.

Notation. N images in the global batch, n = N / processes on this process; x1, x2 (n, 3, H, W) two
views of each; h = f(x) (n, D) representation, kept for later use; z = g(h) (n, d) embedding,
L2-normalised; d(i, j) = ||z_i - z_j||^2 squared distance, at most 4; m margin. A view has a name:
the number of its image, or its label, or the emoji that it shows (--positives). Views of the same
name are positives, others negatives. P: all ordered pairs (a, p) of positives among the 2N views.

    k(a, p) = argmin of d(a, k) over the negatives k of a with d(a, k) > d(a, p)
    L       = mean over (a, p) in P of  max(0, d(a, p) - d(a, k(a, p)) + m)

If all embeddings are the same, the loss is m.

Run.
    python methods/triplet.py                                 one CPU core, about 6 minutes
    python methods/triplet.py --mining hardest                the nearest negative instead
    python methods/triplet.py --recipe cifar10                one GPU
    torchrun --nproc_per_node 8 methods/triplet.py --recipe paper --data PATH/TO/FOLDER
--batch counts the images of all processes together.
With --positives labels or drawings the labels are used: that is no longer self-supervised.

Reached. On emoji after 30 epochs, 338 s on one busy core: kNN 55.9 % (untrained 50.8, raw pixels
53.9); linear 57.5 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or TensorFlow's code.)
    1. By default positives are two views of an image, made by SimCLR's crops and colours. With
       --positives labels, batches hold pairs of images of one label, each as two views | faces of
       one person: about 40 of each person in a batch, and further faces at random.
    2. The mean over all pairs of positives, also those without loss | paper: a sum, which is the
       same up to a factor. pytorch-metric-learning: distances that are not squared by default; the
       mean leaves out triplets without loss; its miner takes all semi-hard negatives of a pair.
    3. Where no negative is farther away than the positive, the farthest one is taken, as in
       TensorFlow's code | paper: not mentioned.
    4. The network is a ResNet or ViT, trained by AdamW; g has a hidden layer, except in the column
       `paper`; the features before g are evaluated | networks of their time with a linear layer,
       trained by AdaGrad; the embedding is the result. Epochs, rates and crops of the column
       `paper` are ours.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (ARCHS, PairLoader, Run, backbone, join_processes, load_data, parse,
                    positive_names)
from kernels.collectives import distribute, gather
from kernels.views import Crop, color_jitter, normalize, random_flip, random_grayscale

KIND = "metric"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def triplet_loss(z, name, margin, mining):
    """The equation above. Returns a scalar, and the share of the triplets that have a loss.

    z: (2N, d) L2-normalised; name: (2N,) integers, equal for positives. mining: "semi-hard", or
    "hardest", the negative nearest to the anchor."""
    d = 2 - 2 * z @ z.T  # (2N, 2N): row a, column p or k
    same = name[:, None] == name
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = same & ~itself
    negatives = (~same).sum(1, keepdim=True)  # (2N, 1): how many an anchor has

    # Sort the negatives of each anchor by distance; positives go to the end. For each positive,
    # find the first negative that is farther away. Indices need no gradient.
    sorted_d, order = d.detach().masked_fill(same, torch.inf).sort(dim=1)
    rank_of_negative = torch.zeros_like(order)  # (2N, 2N): place of k(a, p); 0 is the nearest
    if mining == "semi-hard":
        rank_of_negative = torch.searchsorted(sorted_d, d.detach().contiguous(), right=True)
        farthest = (negatives - 1).clamp(min=0)
        rank_of_negative = torch.minimum(rank_of_negative, farthest)
    to_negative = d.gather(1, order.gather(1, rank_of_negative))  # (2N, 2N): d(a, k(a, p))

    loss = (d - to_negative + margin).clamp(min=0)
    loss = loss * (positive & (negatives > 0))
    pairs = positive.sum()
    return loss.sum() / pairs, (loss > 0).sum() / pairs


# The network.


class Triplet(nn.Module):
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
    # the paper says: around 1,800
    "batch": (256, 512, 1792, "images per step, over all processes"),
    "epochs": (30, 200, 100, "passes over the training images"),
    "warmup": (2.0, 10.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (1e-3, 1e-3, 1e-4, "learning rate per 256 images"),
    "weight_decay": (0.05, 0.05, 0.0, "on all parameters"),
    "dim": (128, 128, 128, "dimensions of the embedding z", "[1, inf)"),
    "margin": (0.2, 0.2, 0.2, "margin m between squared distances, at most 4", "(0, 4]"),
    "mining": (*["semi-hard"] * 3, "which negative", ("semi-hard", "hardest")),
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


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    name = positive_names(args.positives, data.train)  # (M,)
    settings = (data.train, views(args), args.batch, args.seed, device, args.workers)
    loader = PairLoader(name, *settings)
    name = name.to(device)
    model = Triplet(args.arch, args.size, args.dim, args.head).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    state = {"optimizer": optimizer}
    run = Run("triplet", args, data, loader, model, state, ("collapsed", args.margin))
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
            z1, z2 = z.chunk(2)

            # Every process computes the whole loss, from the embeddings of all processes. The
            # gradient runs back through gather, and DistributedDataParallel averages: exactly the
            # gradient of one process with all N images.
            z = torch.cat([gather(z1), gather(z2)])  # (2N, d)
            name_of_view = gather(name[loader.index]).repeat(2)  # (2N,)
            loss, active = triplet_loss(z, name_of_view, args.margin, args.mining)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, active=active)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
