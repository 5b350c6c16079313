"""PIRL: Self-Supervised Learning of Pretext-Invariant Representations.
Misra, van der Maaten, CVPR 2020. https://arxiv.org/abs/1912.01991
Official code: https://github.com/facebookresearch/vissl (configs/config/pretrain/pirl)

Idea. Pretext tasks such as jigsaw.py and rotnet.py transform an image and ask what was done to it,
so the features that they learn must keep track of the transformation. PIRL asks for the opposite.
An image and its transformed version, a shuffled puzzle of nine patches or a turned picture, should
have the same embedding, different from those of other images. What an image shows does not change
with such a transformation, so the features should not change either. The other images come from a
memory bank. It holds one embedding of each training image, a moving average over epochs.

Notation. M training images, N of them in the global batch, n = N / processes on this process;
I (n, 3, H, W) a view of each, I^t its transformed version: nine patches (n, 9, 3, t, t) in random
order, or a turned view (n, 3, H, W). h (n, D) representation of a view, (9n, D) of the patches,
made by the backbone and kept for later use. One head for each kind of view makes embeddings of h,
L2-normalised: f (n, d) of the images, g (n, d) of the transformed versions. bank (M, d) has rows
m_I, one for each image; tau temperature; mu momentum.
The loss is noise-contrastive estimation (NCE, Eq. 4 and 5), averaged over images. An embedding v is
compared with the row of its own image and with those of K others, drawn anew for each step. P is a
softmax over all rows of the bank, but a constant Z stands for its sum. p is the probability that
m_I is the row of v's own image and not one of the K. lambda is the weight of the transformed
versions. After the step the bank learns the embeddings of the images, not of those versions:

    P(I, v)   = exp(m_I . v / tau) / Z,    p = P / (P + K / M)
    NCE(I, v) = -log p(I, v) - sum over K others I' of log(1 - p(I', v))
    L         = lambda NCE(I, g) + (1 - lambda) NCE(I, f)
    m_I      <- mu m_I + (1 - mu) f,    back to length 1

Run.
    python methods/pirl.py                                    one CPU core, about 17 minutes
    python methods/pirl.py --transform rotation               turned views instead of puzzles
    torchrun --nproc_per_node 8 methods/pirl.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.

Reached. On emoji after 40 epochs, 1040 s on one busy core: kNN 58.9 % (untrained 50.8, raw pixels
53.9); linear 57.9 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The constant Z is estimated once, from the first batch, from all kinds of views | official
       code: from the patches. Paper, Eq. 3, with s = m . v / tau: p = e^s / (e^s + sum of e^s over
       the K others). Each view has a sum of its own where we, and the official code, have the
       constant Z K / M.
    2. The K others are the same for all images of a step; where one is the image itself, it is
       left out | official code: drawn for each image, from all M.
    3. With --transform both, the terms of the puzzle and of the turned view have half of lambda
       each | paper: combines both, too; official code: puzzles only.
    4. The nine patches of a puzzle have the same changes of colour and are mirrored together |
       official code: each by itself, with random changes of contrast and sharpness (photometric)
       on top.
    5. On emoji the heads end in a batch-norm without scale and offset, as in MoCo v3, and the loss
       is a softmax over the 1 + K rows, which the official code offers too | paper, and our other
       columns: no batch-norm, and NCE (--no-head-norm --loss nce).
    6. The cosine schedule ends at 0 and changes at every step | official code: ends at a thousandth
       of the first rate and changes once per epoch.
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (ARCHS, VITS, Loader, Run, backbone, fail, join_processes, load_data, parse,
                    patch_side)
from kernels.collectives import all_reduce_sum, distribute, gather, world
from kernels.views import (METHOD, Crop, color_jitter, denormalize, normalize, random_flip,
                           random_grayscale)

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def pirl_loss(image_logits, transformed_logits, Z, M, weight):
    """Eq. 5: both terms, the transformed versions with `weight`, the images with 1 - weight.
    Returns a scalar, in nats.

    image_logits (n, 1 + K), transformed_logits: a list of such, one for each transformation; Z: the
    constant, or None for a softmax over the 1 + K rows; M: the number of training images."""
    if Z is None:
        loss = info_nce
    else:
        loss = partial(nce_loss, Z=Z, M=M)
    of_images = loss(image_logits)
    terms = [loss(logits) for logits in transformed_logits]
    return weight * torch.stack(terms).mean() + (1 - weight) * of_images


def info_nce(logits):
    """-log softmax of the own row, which comes first, among all 1 + K rows. Each view has a sum of
    its own instead of the constant Z (loss_type cross_entropy in the official code). moco_loss of
    kernels/ cannot leave out the own image among the K others, so it is not used."""
    own = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, own)


def nce_loss(logits, Z, M):  # copy of: methods/instance_discrimination.py::nce_loss
    """Noise-contrastive estimation (Wu et al. 2018, Eq. 7), averaged over the n views: is a row of
    the bank that of the view's own image, or one of K that were drawn at random? Returns a scalar,
    in nats.

    logits: (n, 1 + K) products m . v / tau with the own row, then with the K others; Z: the
    constant in P = exp(logit) / Z; M: the number of images, each drawn with probability 1 / M."""
    K = logits.shape[1] - 1
    # P / (P + K / M) is the sigmoid of log P - log(K / M).
    evidence = logits - torch.log(Z * K / M)
    own, others = evidence.split([1, K], 1)
    losses = -F.logsigmoid(own).sum(1) - F.logsigmoid(-others).sum(1)  # (n,)
    return losses.mean()


# The network.


class JigsawHead(nn.Module):
    """Nine features become one embedding: the same projection for each, then one of all nine."""

    def __init__(self, width, dim, bias):
        super().__init__()
        self.patch = nn.Linear(width, dim, bias)
        self.join = nn.Linear(9 * dim, dim, bias)

    def forward(self, h):
        h = self.patch(h)  # (9n, d)
        h = h.view(-1, self.join.in_features)  # (n, 9 d): the nine of an image side by side
        return self.join(h)  # (n, d)


class PIRL(nn.Module):
    def __init__(self, arch, size, dim, images, kinds, head_norm=True):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        self.heads = nn.ModuleDict()  # f of the image, and a g for each transformation
        for kind in kinds:
            head = JigsawHead if kind == "jigsaw" else nn.Linear
            self.heads[kind] = nn.Sequential(head(width, dim, bias=not head_norm))
            if head_norm:  # difference 5
                self.heads[kind].append(nn.BatchNorm1d(dim, affine=False))
        self.register_buffer("bank", F.normalize(torch.randn(images, dim), dim=1))  # (M, d)
        self.register_buffer("Z", torch.ones(()))  # estimated in the first step

    def forward(self, shown):
        """The views of each kind, images (n, 3, H, W) or patches (n, 9, 3, t, t) -> a list of
        embeddings (n, d). Puzzles have another size, so each kind has batch statistics of its own.
        """
        embeddings = []
        for x, head in zip(shown, self.heads.values()):
            # One image per row: each patch of a puzzle is an image of its own.
            h = self.backbone(x.flatten(0, -4))  # (n, D); of puzzles (9n, D)
            embeddings.append(F.normalize(head(h).float(), dim=1))
        return embeddings


def draw_others(rand, count, images):
    """Indices (count,) of images, uniform over all; the same in every process."""
    return torch.from_numpy(rand.generator.integers(images, size=count))


def compare(v, bank, index, others, tau):
    """Logits (n, 1 + K) of the embeddings v (n, d): with the row of the own image, then with those
    of the others (K,). If one of the others is the image itself, its logit is -inf, which adds
    nothing to the loss."""
    own = (v * bank[index]).sum(1, keepdim=True)  # (n, 1)
    rest = v @ bank[others].T  # (n, K)
    rest = rest.masked_fill(others == index[:, None], -torch.inf)
    return torch.cat([own, rest], 1) / tau


@torch.no_grad()
def update_bank(bank, index, v, mu):  # copy of: methods/instance_discrimination.py::update_bank
    """The rows `index` (N,) move towards the embeddings v (N, d) of the images of all processes, so
    every process holds the same bank. If a file is broken, another is read in its place, so an
    image may stand twice in a batch: its first view counts."""
    first = (index[:, None] == index).int().argmax(1)
    rows = mu * bank[index] + (1 - mu) * v[first]
    bank[index] = F.normalize(rows, dim=1)


# The views.


def cut_tiles(x, top, left, tile):  # copy of: methods/jigsaw.py::cut_tiles
    """Images x (n, 3, S, S) and corners top, left (n, 9, 3), one per tile and colour channel
    -> tiles (n, 9, 3, tile, tile)."""
    image = torch.arange(len(x), device=x.device)
    image = image.view(-1, 1, 1, 1, 1)
    channel = torch.arange(3, device=x.device).view(3, 1, 1)
    i = torch.arange(tile, device=x.device)
    rows = (top[..., None] + i).unsqueeze(4)  # (n, 9, 3, tile, 1)
    columns = (left[..., None] + i).unsqueeze(3)  # (n, 9, 3, 1, tile)
    return x[image, channel, rows, columns]


def kinds(args):
    """What is shown of each image, in the order of the views."""
    if args.transform == "both":
        return ["image", "jigsaw", "rotation"]
    return ["image", args.transform]


def views(args):
    """A view of the image, and its transformed versions: nine patches of a crop that shows most of
    the image, or a turned view, or both."""

    def flip_and_recolour(x, rand):
        x = random_flip(x, rand)
        x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.4, hue=args.hue)
        return random_grayscale(x, rand, p=0.2)

    def untransformed(x, rand):
        return normalize(flip_and_recolour(x, rand))

    def puzzle(x, rand):
        x = untransformed(x, rand)

        # Nine patches in random order, each at a random place inside its cell.
        cell = args.puzzle // 3
        order = rand.uniform(columns=(9,)).argsort(1)  # (n, 9): which cell is shown at each place
        corner = cell * torch.stack([order // 3, order % 3], 1)  # (n, 2, 9): top and left
        room = cell - args.tile  # by so many pixels a patch can move inside its cell
        corner = corner + rand.uniform(0, room + 1, columns=(2, 9)).long()
        corner = corner[..., None].expand(-1, -1, -1, 3)  # the same for the three channels
        top, left = corner.to(x.device).unbind(1)  # (n, 9, 3) each
        return cut_tiles(x, top, left, args.tile)  # (n, 9, 3, t, t)

    def turned(x, rand):
        x = untransformed(x, rand)

        # Turn all images by 0, 90, 180 and 270 degrees, then choose one turn of each.
        turns = rand.uniform(0, 4).long().to(x.device)  # (n,)
        every = [torch.rot90(x, k, dims=(2, 3)) for k in range(4)]
        every = torch.stack(every)  # (4, n, 3, H, W)
        image = torch.arange(len(x), device=x.device)
        return every[turns, image]

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    most_of_it = Crop(args.puzzle, scale=(0.6, 1.0))
    recipes = {
        "image": (crop, untransformed),
        "jigsaw": (most_of_it, puzzle),
        "rotation": (crop, turned),
    }
    return [recipes[kind] for kind in kinds(args)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "transform": ("jigsaw", "rotation", "jigsaw", "what the embedding ignores",
                  ("jigsaw", "rotation", "both")),
    "size": (32, 32, 224, "side of a view of the image, pixels"),
    "puzzle": (48, 48, 255, "side of the image that is cut into nine, pixels; without effect with "
               "--transform rotation", "[3, inf)"),
    "tile": (12, 12, 64, "side of a patch of it, pixels", "[1, inf)"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (256, 256, 1024, "images per step, over all processes"),
    "epochs": (40, 200, 800, "passes over the training images"),
    "warmup": (2.0, 5.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (0.02, 0.03, 0.03, "learning rate per 256 images"),
    "weight_decay": (1e-4, 1e-4, 1e-4, "on weights, not on biases or batch-norm"),
    # it has another name, because lambda is a keyword of Python
    "weight": (0.5, 0.5, 0.5, "lambda, weight of the transformed versions", "[0, 1]"),
    "loss": ("softmax", "nce", "nce", "with a constant Z, or a softmax", ("nce", "softmax")),
    "negatives": (1024, 4096, 32000, "K, other images per step", "[1, inf)"),
    # e^(1 / tau), by which Z is estimated, must stay finite
    "tau": (0.1, 0.1, 0.07, "temperature of the logits", "[0.02, inf)"),
    "dim": (128, 128, 128, "dimensions of an embedding", "[1, inf)"),
    "bank_momentum": (0.5, 0.5, 0.5, "mu, how much of its row the bank keeps", "[0, 1]"),
    # difference 5
    "head_norm": (True, False, False, "batch-norm at the end of the heads"),
    "min_crop": (0.2, 0.2, 0.08, "smallest crop, share of the image's area", "(0, 1]"),
    "hue": (0.1, 0.2, 0.2, "strength of the jitter of the hue", "[0, 0.5]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.transform == "rotation":  # no puzzle is shown
        return args
    cell = args.puzzle // 3
    if args.tile > cell:
        fail(
            f"--tile {args.tile}: a cell of --puzzle {args.puzzle} has {cell} pixels (a third of "
            f"it): choose at most {cell}"
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


def show(args, first_views):
    """For views.png: the nine patches of a puzzle in one picture, in the order of their places."""
    headings = {"image": "view", "jigsaw": "puzzle", "rotation": "turned"}
    shown = {}
    for kind, x in zip(kinds(args), first_views):
        if kind == "jigsaw":
            side = 3 * args.tile
            x = x.unflatten(1, (3, 3))  # (n, rows, columns, 3, t, t)
            x = x.permute(0, 3, 1, 4, 2, 5)  # (n, 3, rows, t, columns, t)
            x = x.reshape(-1, 3, side, side)
        shown[headings[kind]] = denormalize(x)
    return shown


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    images = loader.count
    model = PIRL(args.arch, args.size, args.dim, images, kinds(args), args.head_norm)
    model.to(device)
    matrices = [w for w in model.parameters() if w.ndim > 1]
    biases_and_norms = [w for w in model.parameters() if w.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": biases_and_norms, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    # For a network that cannot tell images apart P is 1 / M, so p is 1 / (K + 1).
    K = args.negatives
    chance = math.log(K + 1)
    if args.loss == "nce":
        chance += K * math.log1p(1 / K)
    state = {"optimizer": optimizer}
    pictures = partial(show, args)
    run = Run("pirl", args, data, loader, model, state, ("chance", chance), pictures)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, shown in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                embeddings = wrapped(shown)  # (n, d) each, of the images first

            index = loader.index  # (n,)
            rand = loader.random(epoch, step, 0, METHOD)
            others = draw_others(rand, K, images).to(device, non_blocking=True)  # (K,)
            logits = [compare(v, model.bank, index, others, args.tau) for v in embeddings]
            if step == 0:
                # Z = M times the mean of exp(logit), over this batch in all processes.
                means = torch.stack([each.detach().exp().mean() for each in logits])
                model.Z.copy_(images * all_reduce_sum(means.mean()) / world())

            # The mean over the images of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N images.
            Z = model.Z if args.loss == "nce" else None
            loss = pirl_loss(logits[0], logits[1:], Z, images, args.weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # Only after the loss: a view must not be compared with its own embedding.
            f = gather(embeddings[0].detach())  # (N, d)
            update_bank(model.bank, gather(index), f, args.bank_momentum)
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
