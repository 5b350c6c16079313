"""RotNet: Unsupervised Representation Learning by Predicting Image Rotations.
Gidaris, Singh, Komodakis, ICLR 2018. https://arxiv.org/abs/1803.07728
Official code: https://github.com/gidariss/FeatureLearningRotNet

Idea. Turn every image by 0, 90, 180 and 270 degrees and ask the network which turn it was. To
answer, it must recognise what is in the picture and know which way up such things usually stand, so
the features that it learns are useful for other tasks too. The turns are exact, without
interpolation, so they leave no trace by which they could be told apart without looking at the
content.

Notation. N images in the global batch, n = N / processes on this process; x (n, 4, 3, H, W) the
four turns g(X | y) of each, y = 0, 1, 2, 3 for 0, 90, 180 and 270 degrees counter-clockwise;
h = f(x) (4n, D) representation, kept for later use; logits (4n, 4) of the four answers, by a
classifier that is thrown away after training. Eq. 2 and 3:

    L = mean over images of  -1/4  sum over y of  log softmax(logits(g(X | y)))[y]

A network that guesses has the loss log 4 = 1.386.

Run.
    python methods/rotnet.py                                  two CPU cores, 1 to 3 minutes
    python methods/rotnet.py --recipe cifar10                 one GPU
    torchrun --nproc_per_node 8 methods/rotnet.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.
The network sees four times as many.

Reached. On emoji after 12 epochs, 73 s on two CPU cores: kNN 56.8 % (untrained 50.8, raw pixels
53.9); linear 56.0 % (untrained 53.3, raw pixels 54.1); mean of 6 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The network is a ResNet or ViT, followed by two hidden layers that are thrown away | paper:
       Network-in-Network on CIFAR-10, of which the features of block 2 of 4 are kept, and AlexNet
       on ImageNet, where middle layers are best. The last layers specialise in rotation; ours are
       the two hidden layers, so the features before them stay general.
    2. Crops are random resized crops on every data set | official code on CIFAR-10: shifts by up to
       four pixels.
    3. The learning rate falls to zero by a cosine, after a warm-up where --warmup asks for one |
       official code: on CIFAR-10 divided by five at epochs 60, 120 and 160 of 200; on ImageNet by
       ten at 15, 30 and 45 of 50.
    4. Inputs are normalised by ImageNet's mean and deviation on every data set | official code:
       by those of the data set.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import ARCHS, Loader, Run, backbone, join_processes, load_data, parse
from kernels.collectives import distribute
from kernels.views import Crop, denormalize, normalize, random_flip

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def rotation_loss(logits):
    """Eq. 2 and 3: cross-entropy of the turn. Returns a scalar, in nats.

    logits: (4n, 4), rows in the order image 0 turned by 0, 90, 180, 270 degrees, image 1 turned by
    0, ..., as (n, 4, ...).flatten(0, 1) lays them out."""
    turns = torch.arange(4, device=logits.device).repeat(len(logits) // 4)  # (4n,): 0 1 2 3 0 1 ...
    return F.cross_entropy(logits, turns)


# The network.


class RotNet(nn.Module):
    def __init__(self, arch, size):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        # two hidden layers, in place of the paper's two last convolutional blocks
        self.classifier = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, 4),
        )

    def forward(self, x):
        h = self.backbone(x)  # (4n, D)
        return self.classifier(h)  # (4n, 4)


# The views.


def views(args):
    """Crop and flip, then all four turns. The flip must come first: after a turn it would make 90
    and 270 degrees the same question, because flip(rot90(x)) = rot270(flip(x))."""

    def augment(x, rand):
        x = normalize(random_flip(x, rand))
        turned = [torch.rot90(x, turns, dims=(2, 3)) for turns in range(4)]
        return torch.stack(turned, dim=1)  # (n, 4, 3, H, W)

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a view, pixels"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (128, 128, 192, "images per step, over all processes; each is turned 4 times"),
    "epochs": (12, 200, 30, "passes over the training images; official code, ImageNet: 50"),
    "warmup": (1.0, 1.0, 0.0, "epochs of linear learning-rate warm-up"),
    # the official code's 0.1, for 128 images on CIFAR-10 and for 192 on ImageNet
    "lr": (0.2, 0.2, 0.1333, "learning rate per 256 images"),
    "weight_decay": (5e-4, 5e-4, 5e-4, "on all parameters"),
    "min_crop": (0.5, 0.5, 0.08, "smallest crop, share of the image's area", "(0, 1]"),
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


def show(views):
    """For views.png: the four turns of each image."""
    (x,) = views  # (n, 4, 3, H, W)
    return {f"{90 * turns}°": denormalize(x[:, turns]) for turns in range(4)}


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = RotNet(args.arch, args.size).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=0.0,
        momentum=0.9,
        nesterov=True,
        weight_decay=args.weight_decay,
    )
    chance = math.log(4)
    state = {"optimizer": optimizer}
    run = Run("rotnet", args, data, loader, model, state, ("chance", chance), show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # One pass for all four turns, so that they share the batch statistics.
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = wrapped(x.flatten(0, 1))  # (4n, 4)

            # The mean over the images of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N images.
            loss = rotation_loss(logits.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
