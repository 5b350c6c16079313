"""Jigsaw: Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles.
Noroozi, Favaro, ECCV 2016. https://arxiv.org/abs/1603.09246
Official code (Caffe): https://github.com/MehdiNoroozi/JigsawPuzzleSolver

Idea. Cut an image into 3 x 3 tiles, shuffle them by one of |P| fixed permutations, and ask which one it was. Every tile is
encoded by itself, by the same network, and only then are the nine compared, so the features must say what part of what
thing a tile shows. Clues that need no recognition are taken away: tiles have gaps and random offsets (else edges would
match), their colour channels are shifted and some puzzles are grey (else the chromatic aberration of lenses tells where a
tile was), and each tile is given zero mean and unit variance (else brightness and contrast would match).

Notation. N images of the global batch, n = N / processes of them on this one; x (n, 9, 3, t, t) the tiles as the network sees
them, in shuffled order; P (|P|, 9) the permutations: place s of puzzle y shows tile P[y, s], tiles numbered row by row;
h = f(x_s) (9n, D) representation of one tile; logits (n, |P|). Section 3.2:

    L = mean over images of  -log softmax(logits(h_1, ..., h_9))[y]                                      chance: log |P|

Run.
    python methods/jigsaw.py                                              two CPU cores, 3 minutes: emoji, tiles of 12 pixels
    python methods/jigsaw.py --data stl10 --size 96 --tile 24 --arch resnet18 --epochs 100 --perms 200          one GPU
    torchrun --nproc_per_node 8 methods/jigsaw.py --data IMAGENET --size 255 --tile 64 --shift 2 --arch resnet50 \
        --epochs 100 --perms 1000 --dim 1024 --workers 12                                                       eight GPUs
--batch counts the images of all processes together; the network sees nine tiles of each. Results: the table in README.md.

Differs from the paper.
    1. The convolutions are a ResNet's, averaged over the places of a tile; in the paper they are AlexNet's, with less stride
       than usual on tiles (as here for images of up to 64 pixels, see backbone), and fc6 sees every place. The layers after
       them have batch-norm in place of dropout; fc7 has four times as many units as a tile has features, as officially.
    2. Each channel of a tile is standardised, and that inside backbone(...), so that whole images are when it is evaluated; the
       random initialisation in the tables sees the same. The official code has this switched off.
    3. Colour shifts stay inside the tile's cell; in the official code they reach up to two pixels into the next. 30 % of the
       puzzles are grey, as in the paper, by the mean of the shifted channels; in the official code 50 %, and half of the others
       lose their green-magenta axis.
    4. The first permutation is the identity, in the paper a random one. Ties go to the one of the largest smallest distance.
    5. Images are random resized crops, half of them mirrored; the official code takes the central square, as it is.
    6. Learning rate: cosine to zero with a warm-up; the official code divides it by ten every 100,000 of 350,000 steps, and
       gives biases twice the rate and no weight decay.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common.py is found from any working directory
import common
from common import Crop, Loader, Run, distribute, fail, load_data, normalize, random_flip, start


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="emoji", help="emoji, fashion, fashion-mnist, cifar10, cifar100, stl10 or a folder")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=48, help="side of the image that is cut, pixels (paper: 225 or 255)")
    p.add_argument("--arch", default="resnet14", help="resnet14, resnet18, resnet34 or resnet50 (paper: AlexNet)")
    p.add_argument("--batch", type=int, default=128, help="images a step, over all processes; 9 tiles of each (paper: 256)")
    p.add_argument("--epochs", type=int, default=16, help="passes over the training images (paper: 70)")
    p.add_argument("--warmup", type=float, default=1, help="epochs of linear learning-rate warm-up (paper: 0)")
    p.add_argument("--lr", type=float, default=0.1, help="learning rate per 256 images (paper: 0.01, without batch-norm)")
    p.add_argument("--weight-decay", type=float, default=5e-4, help="on all parameters (paper: 5e-4)")
    p.add_argument("--perms", type=int, default=64, help="permutations to tell apart, |P| (paper: 1000)")
    p.add_argument("--tile", type=int, default=12, help="side of a tile, pixels (paper: 64 in cells of 75 or 85)")
    p.add_argument("--shift", type=int, default=1, help="largest shift between colour channels, pixels (paper: 2)")
    p.add_argument("--gray", type=float, default=0.3, help="share of puzzles in grey (paper: 0.3; official code: 0.5)")
    p.add_argument("--dim", type=int, default=128, help="features a tile gives to the comparison (paper: 512; code: 1024)")
    p.add_argument("--min-crop", type=float, default=0.5, help="smallest crop that is cut, share of the area (code: 1)")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and the puzzles")
    p.add_argument("--eval-every", type=int, default=8, help="epochs between kNN evaluations")
    p.add_argument("--out", default=None, help="run folder (default: runs/jigsaw-DATA-SEED); a run found there is continued")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = p.parse_args()
    if args.tile < 1 or args.shift < 0:
        fail(f"--tile {args.tile}, --shift {args.shift}: choose at least 1 and 0 pixels")
    if args.tile + args.shift > args.size // 3:
        fail(f"--tile {args.tile}: with --shift {args.shift}, a cell of {args.size // 3} pixels (a third of --size) is too "
             f"small: choose at most {args.size // 3 - args.shift}")
    if not 2 <= args.perms <= 5000:
        fail(f"--perms {args.perms}: choose 2 to 5000 permutations")
    return args


def permutation_set(count):
    """P (count, 9) int64: permutations of the nine tiles that differ in as many places as possible (Algorithm 1). Begins with
    the identity and adds, again and again, the one of all 9! with the largest sum of Hamming distances to those chosen;
    among equals the one whose smallest distance is largest, then the first in lexicographic order. No random number."""
    every = np.array(list(itertools.permutations(range(9))), np.int8)  # (362880, 9)
    total, least = np.zeros(len(every), np.int64), np.full(len(every), 9, np.int64)
    chosen = [0]
    while len(chosen) < count:
        distance = (every != every[chosen[-1]]).sum(1)  # (362880,)
        total, least = total + distance, np.minimum(least, distance)  # least is 0 for those already chosen
        chosen.append(int(np.where(least > 0, 10 * total + least, -1).argmax()))
    return torch.from_numpy(every[chosen].astype(np.int64))


def draw_puzzles(rand, count):
    """y (n,) int64: which permutation shuffles each image. The first numbers that an image's puzzle draws, so that
    the training loop can draw them again as labels."""
    return rand.uniform(0, count).long()


def cut_tiles(x, top, left, tile):
    """Images x (n, 3, S, S) and corners top, left (n, 9, 3), of each tile and colour channel -> tiles (n, 9, 3, tile, tile)."""
    image = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1, 1)
    channel = torch.arange(3, device=x.device).view(3, 1, 1)
    i = torch.arange(tile, device=x.device)
    return x[image, channel, (top[..., None] + i)[..., None], (left[..., None] + i)[..., None, :]]


def views(args, P):
    """Section 3.2 and 'Preventing Shortcuts': crop, flip, then nine tiles, each at its own place inside its cell, shuffled."""
    cell = args.size // 3
    corner = cell * torch.stack([torch.arange(9) // 3, torch.arange(9) % 3])  # (2, 9): top and left of each cell

    def augment(x, rand):
        order = P[draw_puzzles(rand, len(P))]  # (n, 9): the tile at each place
        x = random_flip(x, rand)
        # One jitter for each tile (columns 2, 9, 1), small shifts on top of it for each channel (2, 9, 3).
        jitter = rand.uniform(0, cell - args.tile - args.shift + 1, columns=(2, 9, 1)).long()
        shift = rand.uniform(0, args.shift + 1, columns=(2, 9, 3)).long()
        corners = corner[:, order].transpose(0, 1)[..., None] + jitter + shift  # (n, 2, 9, 3)
        x = cut_tiles(x, *corners.to(x.device).unbind(1), args.tile)  # (n, 9, 3, t, t)
        gray = (rand.uniform() < args.gray).to(x).view(-1, 1, 1, 1, 1)  # the same for all tiles of a puzzle
        x = torch.lerp(x, x.mean(2, keepdim=True).expand_as(x), gray)
        return normalize(x.flatten(0, 1)).unflatten(0, (-1, 9))

    return [(Crop(args.size, scale=(args.min_crop, 1.0)), augment)]


def standardize(x, eps=0.1):
    """Each channel of each picture (n, 3, h, w) to zero mean and unit variance; one of nearly constant colour stays faint."""
    x = x - x.mean((2, 3), keepdim=True)
    return x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + eps**2)


def backbone(arch, size):
    """common.backbone that standardises what it is given before its first convolution: a tile in training, as the paper does,
    and a whole image in evaluation. Up to 64 pixels resnet14 loses its max-pool, as the others have none: the last stage then
    sees 2 x 2 places of a tile, not one, and more of its 3 x 3 filters learn what they need in a whole image. The names of
    its weights are unchanged."""
    net = common.backbone(arch, size)
    if size <= 64:
        net.maxpool = nn.Identity()
    net.conv1.register_forward_pre_hook(lambda conv, inputs: (standardize(inputs[0].float()),))
    return net


class Jigsaw(nn.Module):
    """The context-free network of Figure 3: a tile sees no other tile before the features of all nine are joined."""

    def __init__(self, arch, size, dim, perms):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.fc6 = nn.Sequential(nn.Linear(self.backbone.out_dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU())
        self.fc7 = nn.Sequential(nn.Linear(9 * dim, 4 * dim, bias=False), nn.BatchNorm1d(4 * dim), nn.ReLU())
        self.fc8 = nn.Linear(4 * dim, perms)

    def forward(self, x):
        h = self.backbone(x.flatten(0, 1))  # (9n, D)
        h = self.fc6(h).view(len(x), -1)  # (n, 9 dim): in the order of the places
        return self.fc8(self.fc7(h))  # (n, |P|)


def permutation_loss(logits, y):
    """Section 3.2: mean over the puzzles of -log softmax(logits)[y], in nats. logits (n, |P|), y (n,) the index in P of the
    permutation that shuffled each."""
    return F.cross_entropy(logits, y)


def learning_rate(step, args, steps):  # copy of: methods/simclr.py::learning_rate
    """Base rate x batch / 256, linear warm-up, then cosine to 0. step counts from 0, `steps` are those of an epoch."""
    peak, warmup, total = args.lr * args.batch / 256, args.warmup * steps, args.epochs * steps
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def main():
    args = get_args()
    device = start(args.seed)
    data = load_data(args.data, args.root, device)
    P = permutation_set(args.perms)
    loader = Loader(data.train, views(args, P), args.batch, args.seed, device, args.workers)
    model = Jigsaw(args.arch, args.size, args.dim, args.perms)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run = Run("jigsaw", args, data, loader, model, {"optimizer": optimizer}, collapse=math.log(args.perms))
    network = distribute(model, device, args.compile)

    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = network(x)  # (n, |P|)
            # The numbers that views() shuffled the tiles by: of this step of the epoch, view 0, stream 2 (the augmentation).
            y = draw_puzzles(loader.random(epoch, step % loader.steps, 0, 2), args.perms).to(device)
            # The mean over this process's images; DistributedDataParallel averages the gradients of the processes.
            loss = permutation_loss(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
