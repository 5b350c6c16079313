"""Exemplar-CNN: Discriminative Unsupervised Feature Learning with Convolutional Neural Networks.
Dosovitskiy, Springenberg, Riedmiller, Brox, NIPS 2014. https://arxiv.org/abs/1406.6909
Official code: none was published for the training.

Idea. Before the training, squares are cut from the images, the seed patches. Each of them is a
class. The images of the class are random transformations of the patch: moved, scaled, turned and
with other colours. A network that names the seed of each must ignore what the transformations
change and keep what tells the seeds apart. Flat patches, such as sky, would be many equal classes,
so a patch is drawn with a probability in proportion to its mean squared image gradient, the
differences of neighbouring pixels. Without changes of colour the mean colour of a patch would be
enough to name nearly every class.

Notation. P seed patches x_1, ..., x_P; f the backbone; T a random transformation, in this order:
shift by up to 0.2 of the side, scale 0.7 to 1.4, angle up to 20 degrees, contrast 1 (principal
components of colour), contrast 2 (saturation and value), hue by up to 0.1 of the circle. A batch
shows N seed patches, n = N / processes on this process, each in several copies T x_i. h = f(T x_i)
(copies n, D) representation, kept for later use; logits (copies n, P), by a classifier that is
thrown away after training. Eq. 1 and 2:

    L = mean over seeds i and transformations T of  -log softmax(logits(f(T x_i)))[i]

A network that guesses has the loss log P, 7.60 for 2,000 seeds.

Run.
    python methods/exemplar.py                                one CPU core, about 9 minutes
    python methods/exemplar.py --recipe cifar10               one GPU
    torchrun --nproc_per_node 8 methods/exemplar.py --recipe paper --data stl10
--batch counts the images of all processes together.
Here these are seed patches; the network sees --copies of each.

Reached. On emoji after 40 epochs, 514 s on one busy core: kNN 57.9 % (untrained 50.8, raw pixels
53.9); linear 60.6 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper.)
    1. The network is a ResNet or ViT, followed by a hidden layer with batch-norm, which is thrown
       away | three or four layers with dropout in the hidden layer; max-pooling follows the first
       two. In evaluation the whole image is resized to --size, and the features are averaged over
       all places | the image keeps its size, the maxima of each quarter are taken, and an SVM
       classifies them.
    2. Each step draws new transformations, several for each seed | a fixed set of up to 300 per
       seed. The loss is a mean | a sum.
    3. Seeds are drawn from four times as many candidates: squares at random places of each image's
       central square, with sides from --min-seed of its side to all of it | at varying places and
       scales; which, the paper does not say. Where there are more candidates than images, an image
       may give several seeds | patches of different images. Where a transformed patch reaches
       beyond its image, border pixels are repeated.
    4. Factors and powers are drawn log-uniformly, so that they neither brighten nor darken on
       average; angles and offsets uniformly | only their ranges are given. The factors of contrast
       1 act on the distance from the mean colour, and its components are those of the patches with
       their margins | of the patches. Saturation and value are changed by separate random powers,
       factors and offsets.
    5. Inputs are normalised by ImageNet's mean and deviation | the mean of each pixel over all
       patches is subtracted.
    6. The learning rate falls to zero by a cosine, after --warmup epochs of warm-up | divided by
       three when the loss stalls. Batch and epochs of the column `paper` are ours.
"""

import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (ARCHS, InMemory, Loader, Run, Split, backbone, fail, join_processes, load_data,
                    parse)
from kernels.collectives import distribute, gather
from kernels.views import (METHOD, BatchRandom, column, denormalize, normalize, resized_crop,
                           shift_hue, whole_image)

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def exemplar_loss(logits, label):
    """Eq. 1 and 2: cross-entropy of the seed patch. Returns a scalar, in nats.

    logits: (copies n, P); label: (copies n,) number of the seed patch that each was made of."""
    return F.cross_entropy(logits, label)


# The network.


class Exemplar(nn.Module):
    def __init__(self, arch, size, classes):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        self.classifier = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, classes),
        )

    def forward(self, x):
        h = self.backbone(x)  # (copies n, D)
        return self.classifier(h)  # (copies n, P)


# The views.

SHIFT = 0.2  # at most a fifth of the patch's side, in both directions
SCALE = 0.7, 1.4
ANGLE = math.radians(20)
# How far a transformed patch reaches beyond the seed, in sides of the seed. Scale and angle need
# (1.4 (cos 20° + sin 20°) - 1) / 2 = 0.397 of the side, the shift 0.2 more: 0.597 together.
MARGIN = 0.6


def window_side(size):
    """Side of a seed with its margins, if the seed has `size` pixels."""
    return size + 2 * round(MARGIN * size)


def cut_windows(x, u, smallest, size):
    """Images x (n, 3, S, S) in [0, 1] and uniform u (n, 3) -> windows (n, 3, W, W) in [0, 1]: a
    square seed at a random place in each, with its margins, resized so that the seed has `size`
    pixels. The side of the seed is a random share of S, at least `smallest`; beyond the image,
    border pixels are repeated."""
    S = x.shape[3]
    side = (S * (smallest + (1 - smallest) * u[:, :1])).round()  # (n, 1)
    corner = (u[:, 1:] * (S - side + 1)).floor()  # (n, 2): top and left
    margin = (MARGIN * side).round()

    beyond = math.ceil(MARGIN * S)
    x = F.pad(x, [beyond] * 4, mode="replicate")
    start = corner - margin + beyond
    length = (side + 2 * margin).expand(-1, 2)
    boxes = torch.cat([start, length], 1).int()  # (n, 4): top, left, height, width
    # resized_crop takes 0 to 255.
    return resized_crop(255 * x, boxes, window_side(size))


def middles(windows, size):
    """Windows (n, 3, W, W) -> the seeds (n, 3, size, size), without their margins."""
    margin = round(MARGIN * size)
    return windows[:, :, margin:-margin, margin:-margin]


def gradient_energy(x):
    """Mean squared length of the gradient, over the pixels and channels of x (n, 3, h, w): (n,)."""
    down = x.diff(dim=2).square().mean((1, 2, 3))
    right = x.diff(dim=3).square().mean((1, 2, 3))
    return down + right


def draw_by_energy(energy, count, rand):
    """Indices (count,) of different candidates, drawn one after the other with probabilities in
    proportion to energy (M,). rand: a BatchRandom of M."""
    # Each candidate waits a random time, exponential with rate e_i. The first to arrive is i with
    # probability e_i / sum of e, and likewise among the rest. The `count` earliest are taken; flat
    # candidates come last.
    arrival = -torch.log1p(-rand.uniform()).to(energy) / energy.clamp(min=1e-6)
    return arrival.topk(count, largest=False).indices


def seed_windows(split, args, device):
    """Windows (P, 3, W, W) uint8, with the seed patches in their middles, drawn by gradient energy
    from four times as many candidates. Equal in all processes."""

    def candidates(x, rand):
        return cut_windows(x, rand.uniform(columns=(3,)), args.min_seed, args.size)

    # More seeds would overlap, and be classes that nothing tells apart.
    beside = int(1 / args.min_seed) ** 2  # smallest seeds in an image that do not overlap
    most = beside * len(split.images)
    if args.seeds > most:
        fail(
            f"--seeds {args.seeds}: choose at most {most}, {beside} for each image, which is how "
            f"many squares of --min-seed {args.min_seed} it holds side by side"
        )

    # Images are brought to a side at which the smallest seed has `size` pixels. The random numbers
    # are drawn for a batch at once: another batch than --batch, which the number of processes
    # divides, would find other seeds in 3 processes than in one.
    wanted = 4 * args.seeds
    places = math.ceil(wanted / len(split.images))  # in each image
    steps = math.ceil(wanted / places / args.batch)
    view = whole_image(math.ceil(args.size / args.min_seed), candidates)
    loader = Loader(split, [view] * places, args.batch, args.seed, device, args.workers)
    windows = []
    for _, cut in itertools.islice(loader(0), steps):
        for part in cut:  # (n, 3, W, W)
            windows.append(gather(part).mul(255).round().byte())
    windows = torch.cat(windows)

    patches = middles(windows, args.size)
    energy = torch.cat([gradient_energy(part.float()) for part in patches.split(1024)])
    rand = BatchRandom([args.seed, 0, 0, 0, METHOD], len(windows))
    return windows[draw_by_energy(energy, args.seeds, rand)]


def principal_colours(windows):
    """Mean colour (3, 1, 1) of the windows and principal components of their colours, as rows of
    (3, 3), for contrast 1."""
    colours = windows.movedim(1, 3).flatten(0, 2).float() / 255  # (P W W, 3)
    mean = colours.mean(0)
    colours = colours - mean
    _, directions = torch.linalg.eigh(colours.T @ colours / len(colours))
    return mean.view(3, 1, 1), directions.T


def log_uniform(rand, low, high, columns=()):
    return rand.uniform(math.log(low), math.log(high), columns).exp()


def warp(x, rand, size):
    """Windows (n, 3, W, W) -> seeds (n, 3, size, size), each moved, scaled and turned."""
    shift = rand.uniform(-SHIFT, SHIFT, columns=(2,))
    scale = log_uniform(rand, *SCALE)
    angle = rand.uniform(-ANGLE, ANGLE)

    # From the coordinates of the seed to those of the window; both go from -1 to 1.
    share = size / x.shape[3]
    cos = share * scale * angle.cos()
    sin = share * scale * angle.sin()
    right, down = (2 * share * shift).unbind(1)
    rows = [cos, -sin, right, sin, cos, down]
    matrix = torch.stack(rows, 1).view(-1, 2, 3).to(x)
    grid = F.affine_grid(matrix, (len(x), 3, size, size), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def contrast_of_components(x, rand, mean, directions):
    """Contrast 1: the distance of each pixel from the mean colour, along each principal component
    of all colours, times a factor from 0.5 to 2."""
    factors = log_uniform(rand, 0.5, 2, columns=(3,)).to(x)  # (n, 3)
    matrix = directions.T @ (factors[:, :, None] * directions)  # (n, 3, 3)
    x = torch.einsum("ncd,ndhw->nchw", matrix, x - mean) + mean
    return x.clamp(0, 1)


def contrast_of_saturation_and_value(x, rand):
    """Contrast 2, in the colour space HSV: saturation and value to a power from 1/4 to 4, times a
    factor from 0.7 to 1.4, plus an offset from -0.1 to 0.1. The hue stays. Grey has none: where
    saturation is added to it, it turns red, as in colorsys."""
    power = log_uniform(rand, 1 / 4, 4, columns=(2,))
    factor = log_uniform(rand, 0.7, 1.4, columns=(2,))
    offset = rand.uniform(-0.1, 0.1, columns=(2,))

    # Of each draw, column 0 is for the saturation, column 1 for the value.
    def change(channel, which):
        # First the power: a negative number has none.
        channel = channel ** column(power[:, which], x)
        channel = channel * column(factor[:, which], x)
        return (channel + column(offset[:, which], x)).clamp(0, 1)

    value = x.amax(1, keepdim=True)
    least = x.amin(1, keepdim=True)
    chroma = value - least
    saturation = chroma / value.clamp(min=1e-12)

    # The pure colour: that of the same hue with saturation 1 and value 1. With less saturation it
    # comes closer to white.
    red = x.new_tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    pure = torch.where(chroma > 0, (x - least) / chroma.clamp(min=1e-12), red)  # (n, 3, h, w)
    new_saturation = change(saturation, 0)
    new_value = change(value, 1)
    return new_value * (1 - new_saturation * (1 - pure))


def views(args, mean, directions):
    """The paper's transformations, in its order: place, scale and angle, contrast 1, contrast 2,
    hue. Each copy is a view of its own."""

    def augment(x, rand):
        x = warp(x, rand, args.size)
        x = contrast_of_components(x, rand, mean, directions)
        x = contrast_of_saturation_and_value(x, rand)
        x = shift_hue(x, column(rand.uniform(-0.1, 0.1), x))
        return normalize(x)

    view = whole_image(window_side(args.size), augment)
    return [view] * args.copies


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 32, "side of a patch as the network sees it, pixels", "[2, inf)"),
    "arch": ("resnet14", "resnet18", "resnet18", "the backbone", ARCHS),
    "batch": (32, 128, 128, "seed patches per step, over all processes"),
    "copies": (4, 2, 1, "transformed copies of each seed patch per step", "[1, inf)"),
    "epochs": (40, 400, 2000, "passes over the seed patches"),
    "warmup": (2.0, 5.0, 0.0, "epochs of linear learning-rate warm-up"),
    # 0.4 per 256 is 0.05 for this batch: five times the paper's rate, whose network has no
    # batch-norm
    "lr": (0.4, 0.2, 0.02, "learning rate per 256 seed patches"),
    "weight_decay": (5e-4, 5e-4, 0.0, "on all parameters"),
    "seeds": (2000, 8000, 8000, "seed patches, each a class; paper: 50 to 32000", "[2, inf)"),
    # paper: 32 of STL-10's 96 pixels
    "min_seed": (0.5, 0.5, 0.34, "smallest side of a seed patch, share of the image's", "[0.1, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.batch > args.seeds:
        fail(f"--batch {args.batch}: choose at most {args.seeds}, the number of --seeds")
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


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    windows = seed_windows(data.train, args, device)
    copies = views(args, *principal_colours(windows))
    # A data set of their own: the number of a patch in it, loader.index, is its class.
    split = Split(InMemory(windows))
    loader = Loader(split, copies, args.batch, args.seed, device)
    model = Exemplar(args.arch, args.size, args.seeds).to(device)
    weights = model.parameters()
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    chance = math.log(args.seeds)
    state = {"optimizer": optimizer}

    def show(views):
        """For views.png: in place of the window the seed patch in its middle, then the copies."""
        index, _ = loader.first_shown
        shown = {"image": middles(windows[index.to(device)], args.size).cpu() / 255}
        for k, copy in enumerate(views, 1):
            shown[f"copy {k}"] = denormalize(copy)
        return shown

    run = Run("exemplar", args, data, loader, model, state, ("chance", chance), show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, transformed in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # One pass for all copies, so that they share the batch statistics.
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = wrapped(torch.cat(transformed))  # (copies n, P)

            # The class of a copy is the number of its seed patch. This is the mean over the copies
            # of this process; DistributedDataParallel averages the gradients: exactly the gradient
            # of one process with all of them.
            label = loader.index.repeat(args.copies)  # (copies n,)
            loss = exemplar_loss(logits.float(), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
