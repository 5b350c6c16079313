"""Jigsaw: Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles.
Noroozi, Favaro, ECCV 2016. https://arxiv.org/abs/1603.09246
Official code (Caffe): https://github.com/MehdiNoroozi/JigsawPuzzleSolver

Idea. Cut an image into 3 x 3 tiles, shuffle them by one of |P| fixed permutations, and ask which
one it was. The same network encodes every tile by itself, and only then are the nine compared, so
the features must say which part of which thing a tile shows. Clues that need no recognition are
taken away. Tiles have gaps and random offsets, because edges would match. Their colour channels are
shifted and some puzzles are grey, because the colour fringes of a lens (chromatic aberration) tell
where in the picture a tile was. Each tile gets zero mean and unit variance, because brightness and
contrast would match.

Notation. N images in the global batch, n = N / processes on this process; x (n, 9, 3, t, t) the
tiles as the network sees them, in shuffled order; P (|P|, 9) the permutations: place s of puzzle y
shows tile P[y, s], and tiles are numbered row by row; h_s = f(x_s) (9n, D) representation of the
tile at place s, kept for later use; logits (n, |P|). Section 3.2:

    L = mean over images of  -log softmax(logits(h_1, ..., h_9))[y]

A network that guesses has the loss log |P|.

Run.
    python methods/jigsaw.py                                  two CPU cores, 3 minutes
    python methods/jigsaw.py --recipe stl10                   one GPU
    torchrun --nproc_per_node 8 methods/jigsaw.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.
The network sees nine tiles of each.

Reached. On emoji after 16 epochs, 142 s on two CPU cores: kNN 50.6 % (untrained 49.5, raw pixels
54.4); linear 57.2 % (untrained 54.3, raw pixels 53.2); mean of 6 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The network is a ResNet, averaged over the places of a tile, or a ViT | paper: AlexNet, with
       a smaller stride than usual, and fc6 sees every place. The layers after it have batch-norm |
       paper: dropout. fc7 has four times --dim units, the ratio of the official code.
    2. Each channel of a tile is standardised, in backbone(...): of the whole image in evaluation,
       also for the untrained baseline | official code, ECCV version: no tile is normalised;
       train_val_cfn_jps++ in the same repository: all channels of a tile together, then times 50.
    3. Shifts of colour channels stay inside the tile's cell | official code: up to two pixels into
       the next. 30 % of the puzzles are grey, as in the paper, by the mean of the shifted channels
       | official code: 50 %, and half of the others lose their green-magenta axis.
    4. The first permutation is the identity | paper: a random one. Ties are broken by the largest
       minimum distance.
    5. Images are random resized crops, half of them mirrored | official code: the central square.
    6. The learning rate falls to zero by a cosine, after a warm-up where --warmup asks for one |
       official code: divided by ten every 100,000 of 350,000 steps; biases have twice the rate
       and no weight decay.
"""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import ARCHS, VITS, Loader, Run, fail, join_processes, load_data, parse, patch_side
from kernels.collectives import distribute
from kernels.views import AUGMENT, Crop, column, denormalize, normalize, random_flip

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def permutation_loss(logits, y):
    """Section 3.2: cross-entropy of the permutation. Returns a scalar, in nats.

    logits: (n, |P|); y: (n,) the place in P of the permutation that shuffled each puzzle."""
    return F.cross_entropy(logits, y)


# The network.


def standardize(x, eps=0.1):
    """Each channel of each picture (n, 3, h, w) to zero mean and unit variance. A channel that is
    nearly constant stays faint."""
    x = x - x.mean((2, 3), keepdim=True)
    variance = x.square().mean((2, 3), keepdim=True)
    return x * torch.rsqrt(variance + eps**2)


def backbone(arch, size):
    """common.backbone that standardises its input before the first layer: a tile in training, as in
    the paper, a whole image in evaluation. The names of its weights are unchanged."""
    net = common.backbone(arch, size)

    # Up to 64 pixels resnet14 loses its max-pool; the other ResNets have none. With it a tile of 12
    # pixels would give one place in the last stage: only the middle of each 3 x 3 filter would meet
    # the tile, the rest would meet padding and not learn. Without it there are 2 x 2 places.
    if arch == "resnet14" and size <= 64:
        net.maxpool = nn.Identity()
    net.first_layer.register_forward_pre_hook(
        lambda layer, inputs: (standardize(inputs[0].float()),)
    )
    return net


class Jigsaw(nn.Module):
    """The context-free network of Figure 3: a tile sees no other tile before the features of all
    nine are joined."""

    def __init__(self, arch, size, dim, perms):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.fc6 = nn.Sequential(
            nn.Linear(self.backbone.out_dim, dim, bias=False),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
        )
        self.fc7 = nn.Sequential(
            nn.Linear(9 * dim, 4 * dim, bias=False),
            nn.BatchNorm1d(4 * dim),
            nn.ReLU(),
        )
        self.fc8 = nn.Linear(4 * dim, perms)

    def forward(self, x):
        h = self.backbone(x.flatten(0, 1))  # (9n, D)
        h = self.fc6(h).view(len(x), -1)  # (n, 9 dim): in the order of the places
        return self.fc8(self.fc7(h))  # (n, |P|)


# The views.


def permutation_set(count):
    """P (count, 9) int64: permutations of the nine tiles that differ in as many places as possible
    (Algorithm 1). Begins with the identity, then adds one at a time: of all 9! permutations the one
    with the largest sum of Hamming distances (places that differ) to those chosen. Ties are broken
    by the largest minimum distance, then by lexicographic order. No random number."""
    orders = list(itertools.permutations(range(9)))
    every = np.array(orders, np.int8).T.copy()  # (9, 362880)
    total = np.zeros(every.shape[1], np.int32)
    least = np.full(every.shape[1], 9, np.int8)
    chosen = [0]
    while len(chosen) < count:
        latest = every[:, chosen[-1:]]  # (9, 1)
        distance = (every != latest).sum(0, dtype=np.int8)  # (362880,)
        total += distance
        least = np.minimum(least, distance)  # 0 for those already chosen
        score = np.where(least > 0, 10 * total + least, -1)
        chosen.append(int(score.argmax()))
    return torch.from_numpy(every[:, chosen].T.astype(np.int64))


def draw_puzzles(rand, count):
    """y (n,) int64: which permutation shuffles each image. These are the first numbers that the
    augmentation draws, so the training loop can draw them again as labels."""
    return rand.uniform(0, count).long()


def cut_tiles(x, top, left, tile):
    """Images x (n, 3, S, S) and corners top, left (n, 9, 3), one per tile and colour channel
    -> tiles (n, 9, 3, tile, tile)."""
    image = torch.arange(len(x), device=x.device)
    image = image.view(-1, 1, 1, 1, 1)
    channel = torch.arange(3, device=x.device).view(3, 1, 1)
    i = torch.arange(tile, device=x.device)
    rows = (top[..., None] + i).unsqueeze(4)  # (n, 9, 3, tile, 1)
    columns = (left[..., None] + i).unsqueeze(3)  # (n, 9, 3, 1, tile)
    return x[image, channel, rows, columns]


def views(args, P):
    """Section 3.2 and 'Preventing Shortcuts': crop, flip, then nine tiles, each at its own place
    inside its cell, shuffled."""
    cell = args.size // 3
    room = cell - args.tile - args.shift
    tile = torch.arange(9)
    corner = cell * torch.stack([tile // 3, tile % 3])  # (2, 9): top and left of each cell

    def augment(x, rand):
        y = draw_puzzles(rand, len(P))  # (n,)
        order = P[y]  # (n, 9): the tile at each place
        x = random_flip(x, rand)

        # One offset per tile, and on top of it a small shift per colour channel.
        offset = rand.uniform(0, room + 1, columns=(2, 9, 1)).long()
        shift = rand.uniform(0, args.shift + 1, columns=(2, 9, 3)).long()
        corners = corner[:, order].movedim(0, 1)[..., None]  # (n, 2, 9, 1)
        corners = corners + offset + shift  # (n, 2, 9, 3)
        top, left = corners.to(x.device).unbind(1)  # (n, 9, 3) each
        x = cut_tiles(x, top, left, args.tile)  # (n, 9, 3, t, t)

        # Grey, the same for all tiles of a puzzle.
        grey = column(rand.uniform() < args.gray, x)[:, None]  # (n, 1, 1, 1, 1)
        x = torch.lerp(x, x.mean(2, keepdim=True).expand_as(x), grey)
        return normalize(x.flatten(0, 1)).unflatten(0, (-1, 9))

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "stl10", "paper", "which column gives the defaults"),
    # a ViT needs a multiple of its patch's side: 240 instead of 255
    "size": (48, 96, 255, "side of the image that is cut, pixels; paper: 225 or 255"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (128, 128, 256, "images per step, over all processes; 9 tiles of each"),
    "epochs": (16, 100, 70, "passes over the training images"),
    "warmup": (1.0, 1.0, 0.0, "epochs of linear learning-rate warm-up"),
    # 0.1, ten times the paper's, whose network has no batch-norm
    "lr": (0.1, 0.1, 0.01, "learning rate per 256 images"),
    "weight_decay": (5e-4, 5e-4, 5e-4, "on all parameters"),
    "perms": (64, 200, 1000, "permutations to tell apart, |P|", "[2, 5000]"),
    "tile": (12, 24, 64, "side of a tile, pixels", "[1, inf)"),
    "shift": (1, 1, 2, "largest shift between colour channels, pixels"),
    "gray": (0.3, 0.3, 0.3, "share of puzzles in grey; official code: 0.5", "[0, 1]"),
    # 1024 with 4096 units in fc7 is the official code's; paper: 512 with 4096
    "dim": (128, 128, 1024, "features per tile that are compared", "[1, inf)"),
    "min_crop": (0.5, 0.5, 1.0, "smallest crop that is cut, share of the image's area", "(0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    cell = args.size // 3
    if args.tile + args.shift > cell:
        fail(
            f"--tile {args.tile}: with --shift {args.shift}, a cell of {cell} pixels (a third of "
            f"--size) is too small: choose at most {cell - args.shift}"
        )
    if args.arch in VITS and args.tile % patch_side(args.size):
        fail(
            f"--tile {args.tile}: choose a multiple of {patch_side(args.size)}, the side of a "
            f"patch of {args.arch} at --size {args.size}"
        )
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
    """For views.png: the nine tiles of each image, in shuffled order."""
    (x,) = views  # (n, 9, 3, t, t)
    return {f"place {s + 1}": denormalize(x[:, s]) for s in range(9)}


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    P = permutation_set(args.perms)
    shuffled = views(args, P)
    loader = Loader(data.train, shuffled, args.batch, args.seed, device, args.workers)
    model = Jigsaw(args.arch, args.size, args.dim, args.perms).to(device)
    weights = model.parameters()
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    chance = math.log(args.perms)
    state = {"optimizer": optimizer}
    run = Run("jigsaw", args, data, loader, model, state, ("chance", chance), show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = wrapped(x)  # (n, |P|)

            # The label: the numbers by which augment() shuffled the tiles of view 0 in this step.
            epoch_step = step % loader.steps
            rand = loader.random(epoch, epoch_step, 0, AUGMENT)
            y = draw_puzzles(rand, args.perms).to(device)  # (n,)

            # The mean over the images of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N images.
            loss = permutation_loss(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
