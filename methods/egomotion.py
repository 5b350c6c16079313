"""Egomotion: Learning to See by Moving.
Agrawal, Carreira, Malik, ICCV 2015. https://arxiv.org/abs/1505.01596
Official code (data preparation): https://github.com/pulkitag/learning-to-see-by-moving

Idea. Whoever moves knows how, from muscles, wheels or an odometer, without any label. Show the
network two frames of a video and ask how the camera moved in between. To answer, it must find the
same things in both frames, so each frame needs features by which its parts can be recognised. What
moves by itself must not mislead it. The motion is not a number but a class along each axis, because
several answers can be likely at once.

Notation. N clips in the global batch, n = N / processes on this process; x1, x2 two frames of each
clip, up to `distance` frames apart, in either order; f(x1), f(x2) (n, D, g, g) maps of the same
network, whose mean over the places is the representation, kept for later use; s (n, 2) how far the
camera moves from x1 to x2, to the right and down, in pixels of a frame; y (n, 2) the class of each
component, of C classes that are equally frequent; logits (n, 2, C), by a network on top of both
maps that is thrown away after training. Section 3:

    L = mean over clips of  sum over a in {right, down} of  -log softmax(logits[a])[y[a]]

A network that guesses has the loss 2 log C, 3.892 for C = 7.

Run.
    python methods/egomotion.py                               two CPU cores, about 4 minutes
    python methods/egomotion.py --arch resnet18 --epochs 100  one GPU
    torchrun --nproc_per_node 8 methods/egomotion.py --recipe paper --data movers
--batch counts the clips of all processes together.
The network sees two frames of each. How the camera moves must be known: of the data sets that come
with this project it is so of movers only.

Reached. Not run yet.

Differs from the paper. (This file | the paper, or the official code.)
    1. The camera looks straight ahead while it pans over a photograph: two degrees of freedom |
       paper: cars in a city, KITTI: sideways, ahead, and a turn, of which each has its softmax.
    2. The classes have bounds between which the training pairs are equally frequent | paper: 20
       bins of equal width after dividing by the standard deviation. The official code has 22
       outputs.
    3. Two frames are 1 to `distance` apart, in both orders | official code: 0 to 7, in both orders.
    4. The network is a ResNet or ViT | paper: the first five layers of AlexNet. The network on top
       has a 1x1 convolution and a hidden layer, with batch-norm.
    5. Both frames have the same crop, as in the paper, of a fixed size: enlarging would change the
       motion | official code: 227 x 227 pixels of a frame of KITTI, which is much larger.
    6. Half of the clips are mirrored, and the motion with them; the colours of both frames change
       alike | neither.
    7. AdamW with warm-up and cosine | official code: SGD, a rate that is halved every 20,000 steps.
"""

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
from kernels.views import (
    AUGMENT,
    ClipCrop,
    Crop,
    as_clips,
    as_tall,
    color_jitter,
    column,
    denormalize,
    normalize,
)

KIND = "video"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def motion_loss(logits, classes):
    """Section 3: a softmax for each axis. Returns a scalar, in nats.

    logits: (n, 2, C); classes: (n, 2) y, of the motion to the right and down."""
    losses = F.cross_entropy(logits.mT, classes, reduction="none")  # (n, 2)
    return losses.sum(1).mean()


def accuracy(logits, classes):
    """Share of right answers, the mean of both axes: guessing has 1 / C. A scalar tensor."""
    return (logits.argmax(2) == classes).float().mean()


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
        """Two frames of each clip (n, 2, 3, H, W) -> (n, 2, C)."""
        maps = last_map(self.backbone, x.flatten(0, 1))  # (2n, D, g, g), one network for both
        both = maps.unflatten(0, (-1, 2)).flatten(1, 2)  # (n, 2D, g, g)
        return self.top(both).unflatten(1, (2, -1))


# The views.


def draw_pairs(rand, args):
    """For each clip, on the CPU, (n,) each: how many frames apart the two are, whether the later
    one comes first, and whether both are mirrored. These are the first numbers that the
    augmentation draws, so the training loop can draw them again."""
    gap = 1 + rand.uniform(0, args.distance).long()
    backwards = rand.uniform() < 0.5
    mirrored = rand.uniform() < 0.5
    return gap, backwards, mirrored


def views(args):
    """One crop of the clip, then two of its frames, in either order, mirrored alike and with the
    same change of colours."""

    def augment(x, rand):
        gap, backwards, mirrored = draw_pairs(rand, args)
        chosen = torch.stack([gap * backwards, gap * ~backwards], 1)  # (n, 2)
        clips = torch.arange(len(x), device=x.device)[:, None]
        x = as_tall(x[clips, chosen.to(x.device)])
        x = torch.lerp(x, x.flip(3), column(mirrored, x))
        x = color_jitter(x, rand, 0.4, 0.4, 0.4, 0.0)
        return as_clips(normalize(x), 2)  # (n, 2, 3, H, W)

    # A crop that was enlarged at random would change the motion that is seen.
    crop = Crop(args.size, scale=(args.crop, args.crop), ratio=(1, 1))
    return [(ClipCrop(crop, args.distance + 1), augment)]


def moved(camera, rand, args):
    """How far the camera moves between the frames that augment() shows, (n, 2) to the right and
    down. camera: (n, 2) pixels per frame; rand: the random numbers that augment() was given.

    Backwards it moves the opposite way, and in a mirror left is right."""
    gap, backwards, mirrored = draw_pairs(rand, args)
    down = gap * (1 - 2 * backwards.long())
    right = down * (1 - 2 * mirrored.long())
    return camera * torch.stack([right, down], 1).to(camera)


def class_bounds(camera, args):
    """The bounds between C classes of motions, (2, C - 1), which are equally frequent among pairs
    of the training clips. camera: (N, 2). A motion and its opposite have opposite classes."""
    gaps = torch.arange(1, args.distance + 1, device=camera.device)
    motions = (camera[:, None] * gaps[:, None]).flatten(0, 1)  # (N distance, 2)
    motions = torch.cat([motions, -motions]).sort(dim=0).values
    places = torch.arange(1, args.classes, device=camera.device) * len(motions) // args.classes
    bounds = motions[places].T
    return (bounds - bounds.flip(1)) / 2


def to_classes(motions, bounds):
    """(n, 2) pixels -> (n, 2) int64 from 0 to C - 1."""
    return (motions[:, :, None] > bounds).sum(2)


# Training.

SETTINGS = {
    "recipe": ("movers", "paper", "which column gives the defaults"),
    "size": (32, 224, "side of a frame, pixels"),
    "arch": ("resnet14", "resnet18", "the backbone", ARCHS),
    "distance": (4, 7, "most frames between the two", "[1, inf)"),
    "classes": (7, 20, "classes C of the motion along each axis", "[2, inf)"),
    "batch": (64, 128, "clips per step, over all processes"),
    "epochs": (30, 100, "passes over the training clips"),
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
    """For views.png: both frames."""
    (x,) = views  # (n, 2, 3, H, W)
    return {"x1": denormalize(x[:, 0]), "x2": denormalize(x[:, 1])}


def known_camera(videos, args):
    """The camera's motion in each of the videos, (N, 2) pixels per frame."""
    truth = getattr(videos, "truth", None)
    if truth is None:
        fail(f"--data {args.data}: how its camera moves is not known; choose --data movers")
    shortest = min(videos.lengths)
    if args.distance >= shortest:
        found = f"--distance {args.distance}: a clip has {shortest} frames"
        fail(f"{found}; choose 1 to {shortest - 1}")
    return truth.camera


def answers(loader, epoch, step, args, bounds):
    """The classes (n, 2) of the clips that the loader has just shown, by the random numbers with
    which augment() has chosen their frames."""
    camera = loader.reader.truth.camera[loader.index]
    rand = loader.random(epoch, step % loader.steps, 0, AUGMENT)
    return to_classes(moved(camera, rand, args), bounds)


@torch.no_grad()
def held_out(model, split, args, bounds, device):
    """{"held_out": the accuracy on held-out clips}. Every call shows the same pairs."""
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
                logits = wrapped(x)  # (n, 2, C)
            logits = logits.float()
            classes = answers(loader, epoch, step, args, bounds)

            # The mean over the clips of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N clips.
            loss = motion_loss(logits, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, accuracy=accuracy(logits, classes))
        run.end_epoch(epoch, **held_out(model, data.test, args, bounds, device))
    run.finish()


if __name__ == "__main__":
    main()
