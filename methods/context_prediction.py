"""Context prediction: Unsupervised Visual Representation Learning by Context Prediction.
Doersch, Gupta, Efros, ICCV 2015. https://arxiv.org/abs/1505.05192
Official code (Caffe): https://github.com/cdoersch/deepcontext

Idea. Cut two neighbouring patches out of an image and ask where the second lies: above, below, to
the left, at one of four corners? To answer, the network must recognise what the patches are parts
of. The same network encodes each patch by itself, and only then are two compared. Clues that need
no recognition are taken away. Patches have gaps and random offsets, because edges would continue
from one into the next. A third of them is shrunk and enlarged again, because compression leaves
traces; in the others these stay. Colours are dropped or projected, because the colour fringes of a
lens (chromatic aberration: green moves against magenta) tell where in the picture a patch was.

Notation. N images in the global batch, n = N / processes on this process; x (n, 9, 3, t, t) the
patches of a grid of 3 x 3 of each image; h = f(x) (9n, D) representation, kept for later use; the
40 ordered pairs of neighbours (i, j), with y_ij = 0, ..., 7 for where j lies, seen from i:

    0 1 2
    3 i 4        y_ij + y_ji = 7
    5 6 7

logits (n, 40, 8), by layers that are thrown away after training. Section 3:

    L = mean over images and pairs of  -log softmax(logits(h_i, h_j))[y_ij]

A network that guesses has the loss log 8 = 2.079.

Run.
    python methods/context_prediction.py                      one CPU core, about 9 minutes
    python methods/context_prediction.py --recipe stl10       one GPU
    torchrun --nproc_per_node 8 methods/context_prediction.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.
The run folder also gets neighbours_of_patches.png: patches of test images with their nearest
patches, by the trained and by the untrained network.

Reached. On emoji after 16 epochs, 551 s on one busy core: kNN 50.6 % (untrained 49.6, raw pixels
54.4); linear 54.0 % (untrained 55.0, raw pixels 53.2); mean of 3 runs. Other recipes: not run.

What to expect. On emoji the task is learned. The gain over the same network untrained is +3.5, -2.2
and -4.3 points with three seeds: none as a mean, and uncertain. With seed 0 40 epochs have 53.5 %
(untrained 52.5), less than 16 epochs (56.0). What was tried is in tests/results/LOG.md.

Differs from the paper. (This file | the paper, or the official code.)
    1. A ResNet, averaged over the places of a patch, or a ViT | CaffeNet, whose fc6 sees every
       place. The next two layers have batch-norm as in the official code, with scale and offset.
    2. Every image gives one grid of 3 x 3 patches at a random place, and all of its 40 pairs, as in
       the official code | official code: four grids, as large as the image allows.
    3. Each patch gets zero mean per channel and then unit mean square over all channels, in
       backbone(...), and so does the whole image in evaluation, also for the untrained baseline |
       official code: zero mean in the kept channel alone, and a mean square of 50^2.
    4. Dropped channels become uniform noise, the same in all patches, of the paper's 1/100 of the
       kept channel's deviation | paper: Gaussian; official code: up to 0.5 of 255, each its own.
    5. Random resized crops | official code: whole images, resized to 150,000 to 450,000 pixels.
    6. Warm-up, cosine, momentum 0.9 | paper: momentum up to 0.999; official code: a constant rate
       (see lr), no momentum, no weight decay. Batch and epochs of the column `paper` are ours.
"""

import copy
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import (ARCHS, VITS, Loader, Run, embed, fail, first_batch, join_processes, load_data,
                    parse, patch_side, save_grid)
from kernels.collectives import distribute, rank, world
from kernels.views import Crop, denormalize, normalize, resize_matrix, whole_image

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def position_loss(logits, places):
    """Section 3: cross-entropy of where the second patch lies. Returns a scalar, in nats.

    logits: (n, 40, 8), one row per pair; places: (40,) y of each pair, the same in all images."""
    return F.cross_entropy(logits.flatten(0, 1), places.repeat(len(logits)))


def neighbours():
    """All ordered pairs of neighbours in a grid of 3 x 3: first (40,), second (40,), numbers of
    patches, row by row; y (40,) where the second lies, 0 to 7, as seen from the first."""
    steps = list(itertools.product((-1, 0, 1), repeat=2))
    steps.remove((0, 0))
    pairs = []
    for patch in range(9):
        for y, (down, right) in enumerate(steps):
            row = patch // 3 + down
            column = patch % 3 + right
            if 0 <= row < 3 and 0 <= column < 3:
                pairs.append((patch, 3 * row + column, y))
    return torch.tensor(pairs).T


# The network.


def standardize(x, eps=0.1):
    """Pictures (n, 3, h, w): each channel to zero mean, then all channels of a picture together to
    a mean square of 1. A picture that is nearly constant stays faint."""
    x = x - x.mean((2, 3), keepdim=True)
    square = x.square().mean((1, 2, 3), keepdim=True)
    return x * torch.rsqrt(square + eps**2)


def backbone(arch, size):  # copy of: methods/jigsaw.py::backbone
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


class ContextPrediction(nn.Module):
    """Figure 3: a patch sees no other patch before the features of two are joined."""

    def __init__(self, arch, size, dim):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.fc6 = nn.Sequential(
            nn.Linear(self.backbone.out_dim, dim, bias=False),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.Linear(2 * dim, dim, bias=False),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            nn.Linear(dim, dim),
            nn.ReLU(),
            nn.Linear(dim, 8),
        )
        first, second, places = neighbours()
        self.register_buffer("first", first, persistent=False)  # (40,)
        self.register_buffer("second", second, persistent=False)  # (40,)
        self.register_buffer("places", places, persistent=False)  # (40,)

    def forward(self, x):
        h = self.backbone(x.flatten(0, 1))  # (9n, D)
        h = self.fc6(h).unflatten(0, (-1, 9))  # (n, 9, dim)
        pairs = torch.cat([h[:, self.first], h[:, self.second]], 2)  # (n, 40, 2 dim)
        return self.head(pairs.flatten(0, 1)).unflatten(0, (-1, 40))  # (n, 40, 8)


# The views.


def grid_corners(rand, args):
    """Corners (n, 9, 2), top and left, of the patches of a grid that lies at a random place in each
    image. Every patch is moved by up to --jitter pixels from its place in the grid."""
    patch = torch.arange(9)
    cell = args.patch + args.gap
    row_and_column = torch.stack([patch // 3, patch % 3], 1)  # (9, 2)
    start = rand.uniform(0, room(args) + 1, columns=(1, 2)).floor()
    moved = rand.uniform(0, 2 * args.jitter + 1, columns=(9, 2)).floor()
    return (cell * row_and_column + start + moved).long()


def room(args):
    """By how many pixels the grid with all its jitter is smaller than the image."""
    return args.size - 3 * args.patch - 2 * args.gap - 2 * args.jitter


def cut_patches(x, corners, side):
    """Images x (n, 3, S, S), corners (n, 9, 2) -> patches (n, 9, 3, side, side)."""
    top, left = corners.to(x.device).unbind(2)  # (n, 9) each
    image = torch.arange(len(x), device=x.device)
    image = image.view(-1, 1, 1, 1)
    i = torch.arange(side, device=x.device)
    rows = (top[..., None] + i)[..., None]  # (n, 9, side, 1)
    columns = left[..., None] + i  # (n, 9, side)
    columns = columns[:, :, None]  # (n, 9, 1, side)
    return x[image, :, rows, columns].movedim(4, 2)


def resampling(side):
    """(side, side, side): matrix k shrinks a line of `side` pixels to k + 1 and enlarges it again.
    The last one changes nothing."""
    zero = torch.zeros(1)
    matrices = []
    for small in range(1, side + 1):  # pixels
        shrink = resize_matrix(zero, zero + side, side, small)  # (1, small, side)
        enlarge = resize_matrix(zero, zero + small, small, side)  # (1, side, small)
        matrices.append(enlarge @ shrink)
    return torch.cat(matrices)


def resample(x, rand, matrices, p=1 / 3, least=10 / 96):
    """Patches (n, 9, 3, t, t), of which a third is shrunk and enlarged again. The area of a shrunk
    patch is uniform between (10/96)^2 and 1 of the patch's area."""
    t = x.shape[4]
    side = rand.uniform(least**2, 1, columns=(9,)).sqrt() * t
    side = side.ceil().long()  # (n, 9): 1 to t
    side[rand.uniform(columns=(9,)) >= p] = t
    matrix = matrices[side.to(x.device) - 1][:, :, None]  # (n, 9, 1, t, t)
    return matrix @ x @ matrix.mT


def drop_colors(x, rand):
    """Patches (n, 9, 3, t, t): one random channel of each stays. Noise around its mean, with 1/100
    of its deviation, takes the place of the others; all patches of an image have the same noise."""
    kept = rand.uniform(0, 3, columns=(9,)).long()
    kept = F.one_hot(kept, 3)[..., None, None].to(x)  # (n, 9, 3, 1, 1)
    noise = rand.uniform(-(3**0.5), 3**0.5, columns=x.shape[2:])  # of deviation 1
    noise = noise.to(x)[:, None]  # (n, 1, 3, t, t)

    channel = (kept * x).sum(2, keepdim=True)  # (n, 9, 1, t, t)
    mean = channel.mean((3, 4), keepdim=True)
    deviation = (channel - mean).square().mean((3, 4), keepdim=True).sqrt()
    return torch.lerp(mean + 0.01 * deviation * noise, x, kept)


def project_colors(x):
    """Colours (..., 3, t, t) without their part along the axis from magenta to green, (-1, 2, -1),
    on which chromatic aberration shows."""
    r, g, b = x.unbind(-3)
    part = (2 * g - r - b) / 6  # 6: the squared length of the axis
    return torch.stack([r + part, g - 2 * part, b + part], -3)


def views(args, matrices):
    """Crop, then nine patches; some are resampled; colours are dropped or projected."""

    def augment(x, rand):
        x = cut_patches(x, grid_corners(rand, args), args.patch)  # (n, 9, 3, t, t)
        x = resample(x, rand, matrices)
        x = drop_colors(x, rand) if args.color == "drop" else project_colors(x)
        return normalize(x.flatten(0, 1)).unflatten(0, (-1, 9))

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "stl10", "paper", "which column gives the defaults"),
    "size": (48, 96, 400, "side of the image that is cut, pixels"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (64, 128, 64, "images per step, over all processes; 9 patches of each"),
    "epochs": (16, 100, 70, "passes over the training images"),
    "warmup": (1.0, 1.0, 0.0, "epochs of linear learning-rate warm-up"),
    # Official code: 1e-5 for the sum over 2,300 pairs, which is 0.023 for their mean. Momentum
    # makes steps ten times as long, so 0.0023 for a batch of 64 does the same: 0.0092 for 256.
    "lr": (0.1, 0.1, 0.0092, "learning rate per 256 images"),
    "weight_decay": (5e-4, 5e-4, 0.0, "on all parameters"),
    "patch": (12, 24, 96, "side of a patch, pixels", "[2, inf)"),
    "gap": (4, 8, 48, "pixels between two patches", "[1, inf)"),
    "jitter": (1, 2, 7, "pixels by which a patch is moved at most; less than half of --gap"),
    "color": ("project", "project", "drop", "against aberration", ("project", "drop")),
    "dim": (128, 256, 4096, "features per patch that are compared", "[1, inf)"),
    "min_crop": (0.5, 0.5, 1.0, "smallest crop that is cut, share of the image's area", "(0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if 2 * args.jitter >= args.gap:
        fail(f"--jitter {args.jitter}: choose less than half of --gap {args.gap}")
    if room(args) < 0:
        fail(
            f"--size {args.size}: choose at least {args.size - room(args)}, for three patches of "
            f"--patch {args.patch}, two gaps of --gap {args.gap} and --jitter {args.jitter}"
        )
    if args.arch in VITS and args.patch % patch_side(args.size):
        fail(
            f"--patch {args.patch}: choose a multiple of {patch_side(args.size)}, the side of a "
            f"token of {args.arch} at --size {args.size}"
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
    """For views.png: the nine patches of each image."""
    (x,) = views  # (n, 9, 3, t, t)
    return {f"patch {i}": denormalize(x[:, i]) for i in range(9)}


def draw_neighbours_of_patches(path, run, untrained):
    """Ten patches, each from the middle of a test image, and their four nearest patches of other
    test images by the features of the network, after its training and before. The ten have the most
    variance among the first 30 images, so that none is blank."""

    def cut(x, rand):
        return cut_patches(x, grid_corners(rand, run.args), run.args.patch)

    split = run.data.test or run.data.bank
    view = whole_image(run.args.size, cut)
    count = 256 * world()
    (x,) = first_batch(split, [view], count, run.args.seed, run.device)
    patches = x.flatten(0, 1)  # (9n, 3, t, t)
    image = torch.arange(len(patches), device=x.device) // 9
    variance = x[:30, 4].var((1, 2, 3))
    chosen = variance.topk(min(10, len(variance))).indices
    middle = 9 * chosen + 4  # among all patches
    shown = [patches[middle]]
    for network in (run.model.backbone, untrained):
        h = F.normalize(embed(network, normalize(patches)), dim=1)
        similarity = h[middle] @ h.T  # (10, 9n)
        similarity.masked_fill_(image[middle][:, None] == image, -2)  # below every cosine
        nearest = similarity.topk(4).indices  # (10, 4)
        shown += patches[nearest].unbind(1)

    columns = ["patch", *[f"{word} {k}" for word in ("after", "before") for k in range(1, 5)]]
    note = f"{run.name}: a patch, then its nearest after the training and before it"
    save_grid(path, list(zip(*shown)), columns, note=note)


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    patches = views(args, resampling(args.patch).to(device))
    loader = Loader(data.train, patches, args.batch, args.seed, device, args.workers)
    model = ContextPrediction(args.arch, args.size, args.dim).to(device)
    untrained = copy.deepcopy(model.backbone)  # for the picture; Run may continue a trained one
    weights = model.parameters()
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    chance = math.log(8)
    state = {"optimizer": optimizer}
    run = Run("context_prediction", args, data, loader, model, state, ("chance", chance), show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = wrapped(x)  # (n, 40, 8)

            # The mean over the images of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N images.
            loss = position_loss(logits.float(), model.places)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    if rank() == 0:
        draw_neighbours_of_patches(run.folder / "neighbours_of_patches.png", run, untrained)
    run.finish()


if __name__ == "__main__":
    main()
