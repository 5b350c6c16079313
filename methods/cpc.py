"""CPC: Representation Learning with Contrastive Predictive Coding.
van den Oord, Li, Vinyals, 2018. https://arxiv.org/abs/1807.03748
Official code: none is known.

Second version, CPC v2: Data-Efficient Image Recognition with Contrastive Predictive Coding.
Hénaff, Srinivas, De Fauw, Razavi, Doersch, Eslami, van den Oord, ICML 2020.
https://arxiv.org/abs/1905.09272

Idea. Cut an image into a grid of overlapping patches and encode each by itself. Then read the grid
row by row, from the top, and predict the encodings of patches further down, which have not been
read yet. Neighbouring pixels are easy to predict from each other, so what is predicted lies some
rows away, where only knowledge of what the picture shows is of help. The prediction need not be
exact. It must only be more like the encoding of the true patch than like those of all other patches
of the batch (InfoNCE, a loss that this paper introduced; SimCLR and MoCo took it over).

Notation. N images in the global batch, n = N / processes on this process; x (n, G, G, 3, t, t) of
each image a grid of G x G patches of t x t pixels; z = f(x) (n, G, G, D) their encodings, whose
mean over the grid is the representation that is kept for later use; i row, j column of a patch;
c_ij context, computed from rows 1 to i of z; u = V z (d) what is to be predicted, a linear map of
z; W_k c_ij (d) prediction of u_(i+k)j, k rows below, with a matrix W_k for each k. All indices are
within one image, except l, which stands for any patch of the global batch (Eq. 4):

    p_ijk = exp(u_(i+k)j . W_k c_ij) / sum over l of exp(u_l . W_k c_ij)
    L     = mean over images, i, j and k of  -log p_ijk

Predictions are multiplied by --scale. W_k and V have an offset. Guessing has the loss log(N G G).
In CPC v2 the grid is also read from the other three sides, each by a context network of its own.

Run.
    python methods/cpc.py                                     one CPU core, about 14 minutes
    python methods/cpc.py --recipe stl10                      one GPU
    torchrun --nproc_per_node 8 methods/cpc.py --recipe paper --data IMAGENET
--batch counts the images of all processes together. --recipe v2 follows the second paper.
predictions.png shows which patches the network expects in the part of an image it has not read.

Reached. On emoji after 12 epochs, 838 s on one busy core: kNN 53.2 % (untrained 49.9, raw pixels
54.4); linear 58.7 % (untrained 51.3, raw pixels 53.2); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the papers.)
    1. The encoder is a whole ResNet or ViT for each patch | v1: a ResNet-101 up to its third stage;
       v2: the same with a wider and longer third stage (ResNet-161).
    2. On small images there are 5 x 5 patches; the side of a patch is a third of the image's. On
       large ones there are 7 x 7, and the next shares half of a patch, as in v1 | v2: 6 x 6.
    3. Layer-norm (-layer in --arch) is over the channels and places of one patch. Without
       normalisation (-none), a scale and an offset for each channel stay where batch-norm was, and
       a residual branch starts at 0 | v1: does not say how such a network starts.
    4. The context network and V are those of v2's appendix; the context network reads a linear
       projection of z | v1: a PixelCNN without details; it predicts z itself.
    5. Where colours are dropped, one random channel stands for all three | v2: two of the three
       are dropped. v2 also bends, shears and recolours its patches.
    6. Images are random resized crops | v1: crops of 256 from 300 pixels, in grey.
    7. The learning rate falls to zero by a cosine, after a warm-up where --warmup asks for one, and
       Adam has its usual momenta | v2: beta_1 = 0.8, gradients cut to a norm of 0.01, and an
       average of the weights over time.
    8. No fused loss of kernels/ is used: all want rows of length 1; bank_loss gives the candidates
       no gradient, and clip_loss would also predict contexts from patches.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import (ARCHS, RESNETS, VITS, Loader, Run, fail, first_batch, join_processes, load_data,
                    parse, patch_side, save_grid)
from kernels.collectives import distribute, gather, rank, world
from kernels.views import Crop, denormalize, normalize, random_flip, whole_image

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def info_nce(predicted, candidates, positive):
    """-log p, averaged over all R predictions. Returns a scalar, in nats.

    predicted: (R, d); candidates: (C, d), the patches of all images; positive: (R,) for each
    prediction, the row of its true patch among the candidates."""
    logits = predicted @ candidates.T  # (R, C)
    return F.cross_entropy(logits, positive)


def true_patches(number, turn, steps):
    """Which patches a Reader predicts, in its order: (n, sum over k of (G - k) G).

    number: (n, G, G) the place of each patch among the candidates; turn: by how many quarter turns
    the grid is turned before it is read from the top; steps: all k."""
    number = torch.rot90(number, turn, dims=(1, 2))
    return torch.cat([number[:, k:].flatten(1) for k in steps], 1)


# The network.

ENCODERS = (*ARCHS, *[f"{arch}-{norm}" for arch in RESNETS for norm in ("layer", "none")])


def grid_of(size):
    """For images of `size` pixels: patches along a side, pixels from one to the next, and pixels
    along the side of a patch. Half of a patch is shared with the next, or a little more."""
    count = 5 if size <= 96 else 7
    stride = size // (count + 1)
    return count, stride, size - (count - 1) * stride


def cut_patches(x):
    """Images (n, 3, S, S) -> overlapping patches (n, G, G, 3, t, t)."""
    _, stride, side = grid_of(x.shape[3])
    x = x.unfold(2, side, stride).unfold(3, side, stride)  # (n, 3, G, G, t, t)
    return x.permute(0, 2, 3, 1, 4, 5)


class Affine(nn.Module):
    """In the place of a batch-norm: its scale and offset without its normalisation."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def replace_norms(module, norm):
    """Puts layer-norm, or none, in the place of every batch-norm of a ResNet. Batch-norm mixes the
    patches of an image: the network could read from its statistics what it should predict."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            channels = child.num_features
            # One group: layer-norm over all channels and places.
            new = nn.GroupNorm(1, channels) if norm == "layer" else Affine(channels)
            setattr(module, name, new)
        else:
            replace_norms(child, norm)

    # Without normalisation, each residual block (only blocks have a conv2) would double the
    # variance. So the last scale of its branch starts at 0.
    if norm == "none" and hasattr(module, "conv2"):
        last = module.bn3 if hasattr(module, "bn3") else module.bn2
        nn.init.zeros_(last.weight)


class PatchEncoder(nn.Module):
    """Images (n, 3, S, S) -> the mean encoding of their patches (n, D)."""

    def __init__(self, arch, size):
        super().__init__()
        arch, _, norm = arch.partition("-")  # "resnet14-layer" -> "resnet14", "layer"
        self.net = common.backbone(arch, size)
        self.out_dim = self.net.out_dim
        if norm:
            replace_norms(self.net, norm)

    def encode(self, x):
        """Patches (n, G, G, 3, t, t) -> (n, G, G, D)."""
        z = self.net(x.flatten(0, 2))  # (n G G, D)
        return z.unflatten(0, x.shape[:3])

    def maps(self, x):
        """For dense evaluations, by kernels/maps.py: [(n, D, G, G)], a place per patch."""
        z = self.encode(cut_patches(x))  # (n, G, G, D)
        return [z.movedim(3, 1)]

    def forward(self, x):
        z = self.encode(cut_patches(x))  # (n, G, G, D)
        return z.mean((1, 2))


def backbone(arch, size):
    """The network of this file, for common.py, which measures it and loads it again."""
    return PatchEncoder(arch, size)


class ContextBlock(nn.Module):
    """A residual block that sees one more column to each side than its input does, and one more row
    above, but none below (as in a PixelCNN). Maps (n, C, G, G) -> the same."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, (1, 3), padding=(0, 1)),
            nn.ZeroPad2d((0, 0, 1, 0)),  # left, right, top, bottom
            nn.Conv2d(width, width, (2, 1)),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x):
        return x + self.layers(x)


class Reader(nn.Module):
    """The context network of one direction, and the linear maps W_k."""

    def __init__(self, width, hidden, blocks, dim, steps):
        super().__init__()
        self.steps = steps
        self.context = nn.Sequential(
            nn.Conv2d(width, hidden, 1),
            *[ContextBlock(hidden) for _ in range(blocks)],
            nn.ReLU(),
        )
        self.maps = nn.ModuleList([nn.Conv2d(hidden, dim, 1) for _ in steps])

    def forward(self, z):
        """Encodings (n, D, G, G) -> all predictions (n, sum over k of (G - k) G, d)."""
        c = self.context(z)  # (n, hidden, G, G)
        predicted = []
        for k, linear in zip(self.steps, self.maps):
            # The last k rows have nothing k rows below them.
            rows = linear(c[:, :, :-k])  # (n, d, G - k, G)
            predicted.append(rows.flatten(2).mT)  # (n, (G - k) G, d)
        return torch.cat(predicted, 1)


class CPC(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.scale = args.scale
        self.backbone = backbone(args.arch, args.size)
        width = self.backbone.out_dim
        self.target = nn.Linear(width, args.dim)  # V
        readers = []
        for _ in range(4 if args.all_directions else 1):
            readers.append(Reader(width, args.hidden, args.blocks, args.dim, steps_of(args)))
        self.readers = nn.ModuleList(readers)

    def forward(self, x):
        """Patches (n, G, G, 3, t, t) -> predictions (n, R, d), and what is predicted
        (n, G, G, d)."""
        z = self.backbone.encode(x)  # (n, G, G, D)
        predicted = []
        for turn, reader in enumerate(self.readers):
            # Turned, so that the side from which this reader begins is at the top.
            turned = torch.rot90(z, turn, dims=(1, 2))
            predicted.append(reader(turned.permute(0, 3, 1, 2)))
        return self.scale * torch.cat(predicted, 1), self.target(z)


# The views.


# Each of these takes patches x (n, G, G, 3, t, t) in [0, 1] and draws for every patch by itself.


def per_patch(values, x):
    """One number for each patch, (n, G, G) on the CPU -> (n, G, G, 1, 1, 1), of the type and on the
    device of the patches x."""
    return values.to(x, non_blocking=True)[..., None, None, None]


def drop_colors(x, rand, p):
    """With probability p one random channel stands for all three: the colours of an image should
    not tell which patches belong together."""
    dropped = rand.uniform(columns=x.shape[1:3]) < p
    kept = rand.uniform(0, 3, columns=x.shape[1:3]).long()  # (n, G, G)
    kept = per_patch(kept, x).long()
    channel = torch.take_along_dim(x, kept, dim=3)  # (n, G, G, 1, t, t)
    return torch.lerp(x, channel.expand_as(x), per_patch(dropped, x))  # channel where dropped


def flip_patches(x, rand, p):
    """Mirrored with probability p."""
    flipped = rand.uniform(columns=x.shape[1:3]) < p
    return torch.lerp(x, x.flip(5), per_patch(flipped, x))


def shift_patches(x, rand, margin):
    """Of each patch a random square that is `margin` pixels smaller, with black around it, so that
    the size stays (v1: 60 of 64 pixels)."""
    grid = x.shape[1:3]
    start = rand.uniform(0, margin + 1, columns=(2, *grid)).long()
    start = start.to(x.device, non_blocking=True)[..., None]  # (n, 2, G, G, 1)
    place = start + torch.arange(x.shape[5] - margin, device=x.device)
    rows, columns = place.unbind(1)  # (n, G, G, t - margin) each
    rows = rows[:, :, :, None, :, None]  # (n, G, G, 1, t - margin, 1)
    columns = columns[:, :, :, None, None]  # (n, G, G, 1, 1, t - margin)
    x = torch.take_along_dim(x, rows, dim=4)
    x = torch.take_along_dim(x, columns, dim=5)

    # Black all around; an odd margin has one more pixel below and to the right.
    before = margin // 2
    after = margin - before
    return F.pad(x, (before, after, before, after))


def views(args):
    """Crop and flip, then overlapping patches, and the patches' own augmentation."""

    def augment(x, rand):
        x = cut_patches(random_flip(x, rand))  # (n, G, G, 3, t, t)
        x = drop_colors(x, rand, args.drop)
        x = flip_patches(x, rand, args.flip)
        x = shift_patches(x, rand, args.margin)
        return normalize(x.flatten(0, 2)).unflatten(0, x.shape[:3])

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "stl10", "v2", "paper", "which column gives the defaults; paper: v1"),
    "size": (48, 96, 260, 256, "side of the image that is cut, pixels"),
    "arch": ("resnet14-layer", "resnet18-layer", "resnet50x2-layer", "resnet50-none",
             "the encoder of a patch; -layer: with layer-norm, -none: without normalisation",
             ENCODERS),
    "batch": (64, 128, 512, 512, "images per step, over all processes; 25 or 49 patches of each"),
    # v1 does not say for how long it trains on images
    "epochs": (12, 100, 200, 100, "passes over the training images"),
    "warmup": (1.0, 1.0, 0.0, 0.0, "epochs of linear learning-rate warm-up"),
    # 4e-3: with 64 images per step this is 1e-3, the usual rate of Adam
    "lr": (4e-3, 1e-3, 2e-4, 1e-4, "learning rate of Adam per 256 images"),
    # patches that are one row apart share half of their pixels
    "nearest": (2, 2, 3, 1, "k, rows down to the first patch that is predicted", "[1, inf)"),
    "furthest": (4, 4, 3, 5, "k, rows down to the last patch that is predicted", "[1, inf)"),
    "all_directions": (True, True, True, False, "also read from below, left and right (v2)"),
    "drop": (0.5, 0.8, 0.8, 0.0, "share of patches without colours (v2)", "[0, 1]"),
    "flip": (0.0, 0.0, 0.5, 0.0, "share of patches that are mirrored by themselves", "[0, 1]"),
    "margin": (0, 0, 0, 4, "pixels by which the shown part of a patch is smaller (v1)"),
    "hidden": (64, 128, 256, 256, "width of the context network", "[1, inf)"),
    "blocks": (2, 3, 5, 5, "its blocks; each sees one more row above", "[1, inf)"),
    "dim": (64, 64, 64, 64, "d, dimensions in which patches are compared", "[1, inf)"),
    "scale": (0.1, 0.1, 0.1, 0.1, "factor of the predictions: the first logits are small"),
    "min_crop": (0.5, 0.5, 0.5, 0.5, "smallest crop, share of the image's area", "(0, 1]"),
}


def steps_of(args):
    """All k: by how many rows a predicted patch lies below its context."""
    return range(args.nearest, args.furthest + 1)


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    count, stride, side = grid_of(args.size)
    if not stride:
        fail(f"--size {args.size}: choose at least {count + 1}, for {count} patches along a side")
    if not args.nearest <= args.furthest < count:
        fail(
            f"--nearest {args.nearest}, --furthest {args.furthest}: choose from 1 to {count - 1}, "
            f"the first not larger: --size {args.size} gives {count} rows of patches"
        )
    if args.margin >= side:
        fail(f"--margin {args.margin}: choose less than {side}, the side of a patch")
    if args.arch in VITS and side % patch_side(args.size):
        fail(
            f"--size {args.size}: its patches have {side} pixels, not a multiple of "
            f"{patch_side(args.size)}, the side of a token of {args.arch}"
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
    """For views.png: the patches of each image side by side, with grey lines between them."""
    (x,) = views  # (n, G, G, 3, t, t)
    n, count = x.shape[:2]
    x = denormalize(x.flatten(0, 2))
    x = F.pad(x, (1, 1, 1, 1), value=0.6)
    x = x.unflatten(0, (n, count, count))
    x = x.permute(0, 3, 1, 4, 2, 5)  # (n, 3, rows, t + 2, columns, t + 2)
    return {"patches": x.flatten(4, 5).flatten(2, 3)}


@torch.no_grad()
def draw_predictions(path, run):
    """Of ten test images: what is read of them, from the top; the true patch some rows below; and
    the patches, of 64 images, that the network thinks likeliest there."""
    size = run.args.size
    split = run.data.test or run.data.bank
    view = whole_image(size, lambda x, rand: x)  # without augmentation
    count = 64 * world()
    (images,) = first_batch(split, [view], count, run.args.seed, run.device)
    patches = cut_patches(normalize(images))  # (n, G, G, 3, t, t)
    predicted, targets = run.model.eval()(patches)

    # One prediction of each image: by the reader from the top, of the patch k rows below `row`, in
    # the middle column. In the model's output the reader from the top comes first, with its
    # smallest k first, row by row: so this one is number row * count + column.
    count, stride, side = grid_of(size)
    k = run.args.nearest
    row = (count - k) // 2
    column = count // 2
    predicted = predicted[:10, row * count + column]  # (10, d)
    scores = predicted @ targets.flatten(0, 2).T  # (10, n G G)
    likeliest = scores.topk(6).indices.cpu()  # (10, 6)
    first = count**2 * torch.arange(len(scores))  # (10,) the first patch of each image
    true = first[:, None] + (row + k) * count + column

    read = images[:10].clone()
    read[:, :, row * stride + side :] = 0.6  # grey where nothing has been read
    shown = torch.cat([true, likeliest], 1)  # (10, 7)
    patches = denormalize(patches.flatten(0, 2)).cpu()
    rows = [[image, *patches[some]] for image, some in zip(read, shown)]
    guesses = [f"guess {i}" for i in range(1, 7)]
    columns = ["read", "true", *guesses]
    green = F.pad(likeliest == true, (2, 0))  # guesses that are right; not the first two columns
    note = f"{run.name}: the true patch, {k} rows below what is read, and the likeliest ones"
    save_grid(path, rows, columns, green, note)


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = CPC(args).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

    # The candidates are the patches of all processes; those of this process begin at `first`.
    count = grid_of(args.size)[0]
    shape = (args.batch // world(), count, count)
    first = rank() * math.prod(shape)
    number = first + torch.arange(math.prod(shape), device=device).view(shape)

    # The number of the true candidate of each prediction: the same in every step.
    positive = []
    for turn in range(len(model.readers)):
        positive.append(true_patches(number, turn, steps_of(args)))
    positive = torch.cat(positive, 1)  # (n, R)

    chance = math.log(args.batch * count**2)
    state = {"optimizer": optimizer}
    run = Run("cpc", args, data, loader, model, state, ("chance", chance), show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                predicted, targets = wrapped(x)  # (n, R, d), (n, G, G, d)

            # The mean over the predictions of this process, each against the patches of all;
            # DistributedDataParallel averages the gradients: exactly the gradient of one process
            # with all N images.
            candidates = gather(targets.float()).flatten(0, 2)  # (N G G, d)
            loss = info_nce(predicted.float().flatten(0, 1), candidates, positive.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    if rank() == 0:
        draw_predictions(run.folder / "predictions.png", run)
    run.finish()


if __name__ == "__main__":
    main()
