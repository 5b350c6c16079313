"""Counting: Representation Learning by Learning to Count.
Noroozi, Pirsiavash, Favaro, ICCV 2017. https://arxiv.org/abs/1708.06734
Official code: none is known.

Idea. Whatever can be counted in an image, eyes, wheels or corners, is as often in the whole image
as in its four quarters together. The network maps an image to a list of counts, without being told
what to count, such that the counts of the quarters add up to those of the image. Counting nothing
would do that too, so the counts of two different images must differ. To make them differ the
network has to find things that tell images apart, and that can be counted.

Notation. N images in the global batch, n = N / processes on this process; x an image of side S, T_j
its four quarters (tiles), D x the whole image reduced to the side S / 2 of a tile; y another image.
h = f(.) representation, kept for later use; phi(.) = ReLU(g(h)) (d,) counts, which are never
negative, by layers g that are thrown away after training; M a margin. Section 3:

    s    = sum over j = 1 to 4 of  phi(T_j x)
    L(x) = ||phi(D x) - s||^2  +  max(0, M - ||phi(D y) - s||^2)

The loss is the mean over images; a network that counts nothing has the loss M.

Run.
    python methods/counting.py                                one CPU core, about 11 minutes
    python methods/counting.py --recipe stl10                 one GPU
    torchrun --nproc_per_node 8 methods/counting.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.
Of each image the network sees five pictures: the reduced image and its four quarters; y is another
image of the batch. The run folder also gets counts.png: what is counted.

Reached. On emoji after 32 epochs, 682 s on one busy core: kNN 51.3 % (untrained 50.7, raw pixels
53.9); linear 55.5 % (untrained 52.6, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

What to expect. On emoji the loss falls to a third of M. Of the eight rows of counts.png three count
a colour (orange, purple, pale grey), three the same animals. A histogram of colours alone can have
half of M for pictures in colour, M in grey; nothing is done about one of brightness. The file needs
its epochs: after 12 a linear probe has 53.1 %, hardly more than before the training.

Differs from the paper. (This file | the paper.)
    1. The network is a ResNet or ViT, followed by two hidden layers with batch-norm | paper:
       AlexNet without batch-norm, of which fc6 and fc7 are the hidden layers.
    2. The images of a batch form pairs, and each is the other's y. Both share colour or grey and
       the filter, so phi(D y) is the partner's phi(D x): five pictures per image are enough |
       paper: six pictures, any other image.
    3. The four ways to reduce an image are PIL's filters, with antialiasing: the mean of four
       pixels, linear, cubic and Lanczos | paper: the same names, of a library that it does not
       name.
    4. Adam | paper: does not name its optimiser. The learning rate falls to zero by a cosine, after
       a warm-up where --warmup asks for one | paper: times 0.9 every 10,000 of 200,000 steps.
    5. Views are random resized crops, half of them mirrored | paper: squares of 224 pixels from
       images of which the shorter side has 256. Pictures are normalised by ImageNet's mean and
       deviation of each channel | paper: by those of the intensity.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import (ARCHS, VITS, Loader, Run, fail, features, join_processes, load_data, parse,
                    patch_side, save_grid)
from kernels.collectives import distribute, rank, world
from kernels.views import Crop, column, denormalize, luminance, normalize, random_flip

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def counting_loss(whole, tiles, other, margin):
    """The counts of the tiles add up to those of their own image, and differ from those of another.
    Returns a scalar.

    whole: (n, d) phi(D x); tiles: (n, 4, d) phi(T_j x); other: (n, d) phi(D y)"""
    s = tiles.sum(1)  # (n, d)
    same = (whole - s).square().sum(1)  # (n,)
    different = (other - s).square().sum(1)  # (n,)
    return (same + F.relu(margin - different)).mean()


# The network.


def backbone(arch, size):
    """common.backbone; up to 64 pixels resnet14 loses its max-pool, the other ResNets have none.
    With it a tile of 16 pixels would give one place in the last stage: only the middle of each
    3 x 3 filter would meet the tile, the rest would meet padding and not learn."""
    net = common.backbone(arch, size)
    if arch == "resnet14" and size <= 64:
        net.maxpool = nn.Identity()
    return net


class Counter(nn.Module):
    def __init__(self, arch, size, hidden, dim):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.head = nn.Sequential(
            nn.Linear(self.backbone.out_dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, dim),
            nn.ReLU(),  # there are no negative counts
        )

    def forward(self, x):
        h = self.backbone(x)  # (n, D)
        return self.head(h)  # (n, d)


# The views.


def reducers(size):
    """(4, size / 2, size): matrices that halve the side of an image, one for each of PIL's filters.
    D x is then matrix @ x @ matrix.T."""
    pixels = Image.fromarray(np.eye(size, dtype=np.float32))
    matrices = []
    for kind in ("BOX", "BILINEAR", "BICUBIC", "LANCZOS"):
        rows = pixels.resize((size, size // 2), Image.Resampling[kind])
        matrices.append(torch.from_numpy(np.array(rows)))
    return torch.stack(matrices)


def cut_tiles(x):
    """Images (n, 3, S, S) -> their quarters (n, 4, 3, S / 2, S / 2), row by row."""
    halves = x.unflatten(3, (2, -1)).unflatten(2, (2, -1))  # (n, 3, 2, S / 2, 2, S / 2)
    return halves.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def of_pair(values):
    """Numbers (n, ...), one per image: both images of a pair, 2k and 2k + 1, get that of the first.
    If one were grey and the other in colour, this alone would make their counts differ."""
    first = torch.arange(len(values)) // 2 * 2
    return values[first]


def views(args):
    """Crop and flip; a pair of images in colour or in grey, in which the colour fringes of a lens
    are not seen; reduced in one of four ways. No single trace of a filter then tells the whole
    image from its tiles; the mixture makes it harder, not impossible."""
    matrices = reducers(args.size)

    def augment(x, rand):
        x = random_flip(x, rand)
        grey = column(of_pair(rand.uniform()) < args.gray, x)
        x = torch.lerp(x, luminance(x).expand_as(x), grey)

        kind = of_pair(rand.uniform(0, 4)).long()
        matrix = matrices[kind][:, None].to(x, non_blocking=True)  # (n, 1, S / 2, S)
        whole = matrix @ x @ matrix.mT  # (n, 3, S / 2, S / 2)
        whole = whole.clamp(0, 1)  # cubic and Lanczos overshoot

        pictures = torch.cat([whole[:, None], cut_tiles(x)], 1)  # (n, 5, 3, S / 2, S / 2)
        return normalize(pictures.flatten(0, 1)).unflatten(0, (-1, 5))

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "stl10", "paper", "which column gives the defaults"),
    "size": (32, 96, 224, "side of the image that is cut in four, pixels; even", "[4, inf)"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (64, 256, 256, "images per step, over all processes; even on each"),
    "epochs": (32, 100, 40, "passes over the training images"),
    "warmup": (1.0, 1.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (2e-3, 1e-3, 1e-4, "learning rate per 256 images"),
    "weight_decay": (1e-4, 1e-4, 0.0, "on all parameters, in the gradient"),
    "margin": (10.0, 10.0, 10.0, "M, squared distance from which two images differ", "(0, inf)"),
    # 0.33, half of the paper's: drawings have no lens, and little but their colours to count
    "gray": (0.33, 0.67, 0.67, "share of pairs of images in grey", "[0, 1]"),
    "hidden": (512, 1024, 4096, "units of the two hidden layers of the head", "[1, inf)"),
    "dim": (64, 256, 1000, "how many things are counted, d", "[1, inf)"),
    "min_crop": (0.5, 0.5, 0.77, "smallest crop, share of the image's area", "(0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.arch in VITS:
        # A tile holds whole patches. Their side is the same up to the next multiple of 16.
        step = 2 * patch_side(math.ceil(args.size / 16) * 16)
        if args.size % step:
            fits = math.ceil(args.size / step) * step
            fail(
                f"--size {args.size}: choose {fits}, the next multiple of {step}, twice the side "
                f"of a patch of {args.arch}"
            )
    if args.size % 2:
        fail(f"--size {args.size}: choose an even number, because the image is cut in four")
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
    """For views.png: the whole image, reduced, and its four tiles."""
    (x,) = views  # (n, 5, 3, S / 2, S / 2)
    headings = ("whole", "tile 1", "tile 2", "tile 3", "tile 4")
    return {heading: denormalize(x[:, i]) for i, heading in enumerate(headings)}


def draw_counts(path, run, shown=8):
    """One row for each of the features whose counts vary most over the test images: an image with
    the fewest, then those with the most. Every process must call it."""
    split = run.data.test or run.data.bank
    side = run.args.size // 2
    counts, _ = features(run.model, split, side, run.device, run.args.workers)
    if rank() > 0:
        return
    rows = min(shown, counts.shape[1])
    busiest = counts.float().std(0).topk(rows).indices
    order = counts[:, busiest].T.argsort(1).cpu()  # (8, N): from few to many
    most = order.flip(1)[:, : min(shown, len(counts))]
    places = torch.cat([order[:, :1], most], 1)  # (8, 9)

    parts = split.images.whole(places.flatten(), run.args.size)
    images = torch.cat([part.cpu() for part, _ in parts]) / 255
    columns = ["fewest", "most", *map(str, range(2, places.shape[1]))]
    note = f"{run.name}: one row per feature, the images in which it counts most"
    save_grid(path, images.unflatten(0, places.shape), columns, note=note)


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    if args.batch // world() % 2:
        fail(f"--batch {args.batch}: choose a multiple of {2 * world()}, for pairs of images")
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = Counter(args.arch, args.size, args.hidden, args.dim).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    counts_nothing = ("counts nothing", args.margin)
    state = {"optimizer": optimizer}
    run = Run("counting", args, data, loader, model, state, counts_nothing, show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # One pass for all pictures, so that they share the batch statistics.
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                phi = wrapped(x.flatten(0, 1))  # (5n, d)
            phi = phi.float().unflatten(0, (-1, 5))  # (n, 5, d)

            # Images 2k and 2k + 1 of this process are a pair.
            whole = phi[:, 0]  # (n, d)
            other = whole.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # (n, d)

            # The mean over the images of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N images.
            loss = counting_loss(whole, phi[:, 1:], other, args.margin)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, count=whole.detach().sum(1).mean())
        run.end_epoch(epoch)
    draw_counts(run.folder / "counts.png", run)
    run.finish()


if __name__ == "__main__":
    main()
