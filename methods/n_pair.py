"""N-pair loss: Improved Deep Metric Learning with Multi-class N-pair Loss Objective.
Sohn, NIPS 2016.
https://papers.nips.cc/paper/2016/hash/6b180037abbebea991d8b1232f8a8ca9-Abstract.html
Official code: none was published. npairs_loss of TensorFlow 1.15:
https://github.com/tensorflow/tensorflow/tree/r1.15/tensorflow/contrib/losses/python/metric_learning

Idea. A triplet compares a positive with a single negative, so images of most other classes exert no
force in a step. Here an anchor must pick out its positive among the positives of all other pairs of
the batch: N - 1 negatives at once, by a softmax, for the price of N pairs. It is the loss that
became InfoNCE and, with unit vectors and a temperature, SimCLR's. Embeddings are not normalised:
cosines lie between -1 and 1, so a softmax over them could never be sure. A penalty keeps the
embeddings from growing instead.

Notation. N images in the global batch, n = N / processes on this process; x1, x2 (n, 3, H, W) two
views of each; h = f(x) (n, D) representation, kept for later use; z1, z2 = g(h) (n, d) embeddings
of both, not normalised. Images have names: their number, their label, or what they draw
(--positives). Those of the same name are positives: p(i) is the next image in the batch with i's
name (after the last comes the first). If no other image has it, p(i) = i: the positive is i's own
second view. Eq. 6 of the paper with i's positive z2_p(i):

    L = mean over i of  log( 1 + sum over j of another name of  exp(z1_i . z2_j - z1_i . z2_p(i)) )
        + lambda / 2  mean over all 2N embeddings of  ||z||^2

If all embeddings are 0, and all names differ, the loss is log N.

Run.
    python methods/n_pair.py                                  one CPU core, about 10 minutes
    python methods/n_pair.py --recipe cifar10                 one GPU
    torchrun --nproc_per_node 8 methods/n_pair.py --recipe paper --data PATH/TO/FOLDER
--batch counts the images of all processes together.
With --positives labels or drawings the labels are used: that is no longer self-supervised.

Reached. On emoji after 60 epochs, 609 s on one busy core: kNN 59.5 % (untrained 50.8, raw pixels
53.9); linear 59.8 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or TensorFlow's code.)
    1. By default the positive is a second view of the image, made by SimCLR's crops and colours.
       With --positives labels, batches hold pairs of images of one label, and several pairs may
       have the same: their images are left out of each other's sum | another image of the class.
       Paper: one pair of each of N classes. TensorFlow: the images of several pairs of one class
       are all positives of each other and share the probability.
    2. The penalty is lambda / 2 times the mean, as in TensorFlow's code | paper: not verified.
       pytorch-metric-learning: no penalty, and normalised embeddings by default.
    3. The classes of a batch are drawn at random | paper: also so that they are hard to tell apart,
       where there are many.
    4. The network is a ResNet or ViT with random weights, trained by AdamW; g has a hidden layer,
       except in the column `paper`; the features before g are evaluated | GoogLeNet, pretrained on
       ImageNet's labels, and a linear layer; the embedding is the result. Epochs, batch, rate and
       crops of the column `paper` are ours.
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


def n_pair_loss(z1, z2, name, lambda_):
    """The equation above. Returns a scalar, in nats.

    z1, z2: (N, d) embeddings of two views of N images; name: (N,) integers, equal for positives."""
    N = len(name)
    same = name[:, None] == name
    place = torch.arange(N, device=z1.device)
    steps = (place - place[:, None] - 1) % N  # 0: the next image, N - 1: the image itself
    positive = steps.masked_fill(~same, N).argmin(1)  # (N,): p(i)

    logits = z1 @ z2.T  # (N, N)
    neither = same & (place != positive[:, None])  # not i's positive, but no negative
    logits = logits.masked_fill(neither, -torch.inf)
    squares = torch.cat([z1, z2]).square().sum(1)  # (2N,)
    return F.cross_entropy(logits, positive) + lambda_ / 2 * squares.mean()


# The network.


class NPair(nn.Module):
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
    "epochs": (60, 200, 100, "passes over the training images"),
    "warmup": (2.0, 10.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (3e-3, 1e-3, 1e-4, "learning rate per 256 images"),
    "weight_decay": (0.05, 0.05, 0.0, "on all parameters"),
    # 32: with more, the inner products of the start are so large that the softmax is one-hot
    "dim": (32, 32, 64, "dimensions of the embedding z", "[1, inf)"),
    "lambda_": (0.002, 0.002, 0.002, "weight of the penalty on the embeddings' norms"),
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
    model = NPair(args.arch, args.size, args.dim, args.head).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    # If all embeddings are the same and all names differ, the positive is one of N equal
    # candidates.
    collapsed = ("collapsed", math.log(args.batch)) if args.positives == "views" else None
    run = Run("n_pair", args, data, loader, model, {"optimizer": optimizer}, collapsed)
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
            z1, z2 = z.float().chunk(2)  # (n, d) each

            # Every process computes the whole loss, from the embeddings of all processes. The
            # gradient runs back through gather, and DistributedDataParallel averages: exactly the
            # gradient of one process with all N images.
            name_of_image = gather(name[loader.index])  # (N,)
            loss = n_pair_loss(gather(z1), gather(z2), name_of_image, args.lambda_)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
