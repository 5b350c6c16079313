"""Egomotion: Learning to See by Moving.
Agrawal, Carreira, Malik, ICCV 2015. https://arxiv.org/abs/1505.01596
Official code (data preparation): https://github.com/pulkitag/learning-to-see-by-moving

Idea. Whoever moves knows how, from muscles, wheels or an odometer, without any label. Show the
network two frames of a video and ask how the camera moved in between. To answer, it must find the
same things in both, so each frame needs features by which its parts can be recognised. The motion
is a class along each axis, not a number, because several answers can be likely at once.

Notation. N clips in the global batch, n = N / processes on this process; x_1, ..., x_K frames of
each clip; f(x_i) (D, g, g) maps of the network, whose mean over the places is the representation,
kept for later use; P = K (K - 1) ordered pairs (i, j) of frames, the later one first in half of
them; s_ij how far the camera moves from x_i to x_j, to the right and down, in pixels of a frame;
y_ij the class of each component, of C classes that are equally frequent; logits (n, P, 2, C), by a
network on both maps of a pair that is thrown away after training (section 3 of the paper):

    L = mean over clips and pairs of  sum over a in {right, down} of
        -log softmax(logits(f(x_i), f(x_j))[a])[y_ij[a]]

A network that guesses has the loss 2 log C, 3.892 for C = 7.

Run.
    python methods/egomotion.py                               one CPU core, about 8 minutes
    python methods/egomotion.py --arch resnet18 --epochs 100  one GPU
    torchrun --nproc_per_node 8 methods/egomotion.py --recipe paper --data movers
--batch counts the clips of all processes together.
The network sees K frames of each. How the camera moves must be known: of the data sets that come
with this project only movers tells.

Reached. On movers after 18 epochs, 474 s on one busy core: kNN 27.8 % (untrained 34.0, raw pixels
34.4); linear 31.8 % (untrained 40.4, raw pixels 40.6); mean of 3 runs. Other recipes: not run.

What to expect. It learns the camera's motion and forgets the emoji: the features are worse than
those of the untrained network (tests/results/LOG.md).

Differs from the paper. (This file | the paper, or the official code.)
    1. The camera looks straight ahead while it pans over a photograph: two degrees of freedom |
       paper: cars in a city, KITTI: sideways, ahead, and a turn, of which each has its softmax.
    2. The classes have bounds between which the training pairs are equally frequent | paper: 20
       bins of equal width after dividing by the standard deviation. The official code has 22
       outputs.
    3. A clip shows K frames and all of their pairs, whose maps are computed once | paper: two
       frames; in the official code 0 to 7 apart, in either order.
    4. The network is a ResNet or ViT | paper: the first five layers of AlexNet. The network on top
       has a 1x1 convolution and a hidden layer, with batch-norm.
    5. All frames have the same crop, as in the paper, of a fixed size: enlarging would change the
       motion | official code: 227 x 227 pixels of a frame of KITTI, which is much larger.
    6. Half of the clips are mirrored, and the motion with them; the colours of all frames change
       alike | neither.
    7. AdamW with warm-up and cosine | official code: SGD, a rate that is halved every 20,000 steps.
"""

import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import ARCHS, Loader, Run, ViT, join_processes, load_data, parse
from kernels.collectives import all_reduce_sum, distribute, fail, world
from kernels.views import (AUGMENT, ClipCrop, Crop, as_clips, as_tall, color_jitter, column,
                           denormalize, normalize)

KIND = "video"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def motion_loss(logits, classes):
    """Section 3: a softmax for each axis. Returns a scalar, in nats.

    logits: (n, P, 2, C); classes: (n, P, 2) y, of the motion to the right and down."""
    losses = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none")
    return losses.view_as(classes).sum(2).mean()


def accuracy(logits, classes):
    """Share of right answers, the mean of both axes: guesses are right for 1 / C. A scalar
    tensor."""
    return (logits.argmax(3) == classes).float().mean()


# The network.


def backbone(arch, size):  # copy of: methods/context_encoder.py::backbone
    """common.backbone. The feature of a ViT is the mean of its patches, which are what is used."""
    return common.backbone(arch, size, pool="mean")


def last_map(net, x):  # copy of: methods/context_encoder.py::last_map
    """The map (n, D, g, g) whose mean over the places is the feature."""
    if isinstance(net, ViT):
        patches = net.tokens(x)[:, 1:].transpose(1, 2)  # (n, D, L)
        return patches.unflatten(2, (net.grid, net.grid))
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def pairs(frames):
    """All ordered pairs of different frames, (P, 2) int64."""
    return torch.tensor(list(itertools.permutations(range(frames), 2)))


class Egomotion(nn.Module):
    """The paper's base network (BCNN) is the backbone, its top network (TCNN) is `top`."""

    def __init__(self, arch, size, hidden, classes):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.top = nn.Sequential(
            nn.Conv2d(2 * self.backbone.out_dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),  # any map to 3 x 3 places
            nn.Flatten(),
            nn.Linear(9 * hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2 * classes),
        )

    def forward(self, x):
        """K frames of each clip (n, K, 3, H, W) -> (n, P, 2, C)."""
        n, K = x.shape[:2]
        maps = last_map(self.backbone, x.flatten(0, 1))  # (n K, D, g, g), one network for all
        maps = maps.unflatten(0, (n, K))
        table = pairs(K).to(x.device)
        both = maps[:, table].flatten(2, 3)  # (n, P, 2D, g, g)
        logits = self.top(both.flatten(0, 1))  # (n P, 2 C)
        return logits.unflatten(1, (2, -1)).unflatten(0, (n, -1))


# The views.


def draw_mirrored(rand):
    """Which clips are mirrored, (n,) bool on the CPU. This is the first number that the
    augmentation draws, so the training loop can draw it again."""
    return rand.uniform() < 0.5


def views(args):
    """One crop of the clip, in half of them mirrored, and one change of colours."""

    def augment(x, rand):
        mirrored = draw_mirrored(rand)
        x = as_tall(x)  # one draw for all frames of a clip
        x = torch.lerp(x, x.flip(3), column(mirrored, x))
        x = color_jitter(x, rand, 0.4, 0.4, 0.4, 0.0)
        return as_clips(normalize(x), args.frames)  # (n, K, 3, H, W)

    # A crop that was enlarged at random would change the motion that is seen.
    crop = Crop(args.size, scale=(args.crop, args.crop), ratio=(1, 1))
    return [(ClipCrop(crop, args.frames, args.stride), augment)]


def moved(camera, mirrored, args):
    """How far the camera moves between the frames of each pair, (n, P, 2) to the right and down.
    camera: (n, 2) pixels per frame; mirrored: (n,) bool.

    From a later frame to an earlier one it is the opposite, and in a mirror left is right."""
    first, second = pairs(args.frames).T
    ahead = args.stride * (second - first)  # (P,), in frames
    sign = 1 - 2 * mirrored.long()[:, None]  # (n, 1), of the motion to the right
    steps = torch.stack([sign * ahead, ahead.expand(len(sign), -1)], 2)  # (n, P, 2)
    return camera[:, None] * steps.to(camera)


def class_bounds(camera, args):
    """The bounds between C classes of motions, (2, C - 1), which are equally frequent among the
    pairs of the training clips. camera: (N, 2). A motion and its opposite have opposite classes."""
    motions = moved(camera, torch.zeros(len(camera)), args)
    motions = motions.flatten(0, 1).sort(dim=0).values  # (N P, 2)
    places = torch.arange(1, args.classes, device=camera.device) * len(motions) // args.classes
    bounds = motions[places].T

    # The mean of the bounds and of their mirror image, so that -s has the opposite class of s.
    return (bounds - bounds.flip(1)) / 2


def to_classes(motions, bounds):
    """Pixels (n, P, 2) -> (n, P, 2) int64 from 0 to C - 1."""
    return (motions[..., None] > bounds).sum(3)


# Training.

SETTINGS = {
    "recipe": ("movers", "paper", "which column gives the defaults"),
    "size": (32, 224, "side of a frame, pixels"),
    "arch": ("resnet14", "resnet18", "the backbone", ARCHS),
    "frames": (4, 2, "frames K of a clip, of which all pairs are shown", "[2, 16]"),
    "stride": (2, 7, "show every n-th frame, of 12 per second", "[1, inf)"),
    "classes": (7, 20, "classes C of the motion along each axis", "[2, inf)"),
    "batch": (64, 128, "clips per step, over all processes"),
    "epochs": (18, 100, "passes over the training clips"),
    "warmup": (1.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (4e-3, 2e-3, "learning rate per 256 clips"),
    "weight_decay": (0.05, 5e-4, "on all parameters"),
    "hidden": (256, 512, "channels and units of the network on top", "[1, inf)"),
    "crop": (0.7, 0.7, "the crop, share of a frame's area", "(0, 1]"),
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
    """For views.png: the frames."""
    (x,) = views  # (n, K, 3, H, W)
    return {f"x_{i + 1}": denormalize(x[:, i]) for i in range(x.shape[1])}


def known_camera(videos, args):
    """The camera's motion in each of the videos, (N, 2) pixels per frame."""
    truth = getattr(videos, "truth", None)
    if truth is None:
        fail(f"--data {args.data}: how its camera moves is not known; choose --data movers")
    if args.data == "tripod":
        fail("--data tripod: its camera stands still; choose --data movers")
    return truth.camera


def answers(loader, epoch, step, args, bounds):
    """The classes (n, P, 2) of the clips that the loader has just shown, by the random numbers with
    which augment() has mirrored them."""
    camera = loader.reader.truth.camera[loader.index]
    mirrored = draw_mirrored(loader.random(epoch, step % loader.steps, 0, AUGMENT))
    return to_classes(moved(camera, mirrored, args), bounds)


@torch.no_grad()
def held_out(model, split, args, bounds, device):
    """{"held_out": the accuracy on held-out clips}. Every call shows the same frames."""
    batch = min(args.batch, len(split.images) // world() * world())
    loader = Loader(split, views(args), batch, args.seed, device)
    model.eval()
    values = []
    for step, (x,) in loader(epoch=0):
        classes = answers(loader, 0, step, args, bounds)
        values.append(accuracy(model(x), classes))
    model.train()
    return {"held_out": all_reduce_sum(torch.stack(values).mean()).item() / world()}


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    bounds = class_bounds(known_camera(data.train.images, args), args)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = Egomotion(args.arch, args.size, args.hidden, args.classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    state = {"optimizer": optimizer}
    chance = "chance", 2 * math.log(args.classes)
    run = Run("egomotion", args, data, loader, model, state, chance, show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = wrapped(x)  # (n, P, 2, C)
            logits = logits.float()
            classes = answers(loader, epoch, step, args, bounds)

            # The mean over the clips of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N clips.
            loss = motion_loss(logits, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, accuracy=accuracy(logits, classes))
        with run.not_training():
            found = held_out(model, data.test, args, bounds, device)
        run.end_epoch(epoch, **found)
    run.finish()


if __name__ == "__main__":
    main()
