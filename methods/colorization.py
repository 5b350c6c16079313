"""Colorization: Colorful Image Colorization.
Zhang, Isola, Efros, ECCV 2016. https://arxiv.org/abs/1603.08511
Official code (Caffe): https://github.com/richzhang/colorization/tree/caffe

Idea. Take the colour away from an image and predict it. Which colour a place should have depends on
what it shows, so a network that colours well must recognise things, and images are their own
labels. The colour of a thing is often open: a ball may be red or blue. The network therefore
predicts a distribution over colours; their mean would be grey. Most pixels have dull colours, so
rare colours weigh more in the loss.

Notation. N images in the global batch, n = N / processes on this process; x (n, 3, H, W) colour
images. In the colour space CIE Lab (white D65), L is lightness, 0 to 100, which is all that the
network sees; ab are the colour, green to red and blue to yellow, about -110 to 110. Y (n, 2, H/4,
W/4) is the ab of x; bins (Q, 2) are the points of a grid of step 10 in ab that sRGB can show. A
place is a pixel of Y. Each has Z, a target distribution that its 5 nearest bins share, Zhat, the
predicted one, and a weight v. p (Q,) is how often the data show each bin, w (Q,) the weight of each
bin, lambda how much of a uniform distribution is mixed into p. Eq. 2 to 4:

    loss = mean over places of  -v  sum over q of  Z_q log Zhat_q
    v    = w of the bin that is nearest to the place's ab
    w    proportional to  1 / ((1 - lambda) p + lambda / Q),  scaled so that  sum of p w = 1

The colour shown is a mean of the bins, with Zhat sharpened by a temperature T (Eq. 5):

    ab   = sum over q of  bin_q s_q,   s = softmax(log Zhat / T)

Run.
    python methods/colorization.py                            two CPU cores, 3 minutes
    python methods/colorization.py --recipe cifar10           one GPU
    torchrun --nproc_per_node 8 methods/colorization.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.
The run folder also gets colorized.png: test images, coloured by the network.

Reached. On emoji after 40 epochs, 138 s on two CPU cores: kNN 55.3 % (untrained 49.8, raw pixels
53.9); linear 55.8 % (untrained 50.1, raw pixels 54.1); mean of 6 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The network is a ResNet or ViT. Four of its feature maps, brought to a quarter of the image's
       side, are added (a hypercolumn), and two convolutions predict the colours | paper: a VGG-like
       network of constant resolution in its deeper half.
    2. backbone(...) turns its input into L, so the evaluation sees lightness alone, as in the
       paper, also for the untrained baseline; the raw pixels are in colour. L is repeated in three
       channels and normalised like an image | official code: L - 50 in one channel.
    3. Q = 261: the bins to which at least one 8-bit sRGB colour is nearest | official code: 313,
       also points outside, such as (100, 0), to which no sRGB colour is nearest.
    4. p is counted on the crops of the first epoch, of at most 100 steps, by nearest bin, then
       smoothed as in the paper (Gaussian of 5 in ab) | official code: brings the p of ImageNet; its
       uniform part covers only bins that occur. As in the official code, images without colour (no
       |ab| above 5) teach nothing. Z has the paper's 5 nearest bins | official code: 10.
    5. The loss is the mean over places, with its weights | paper: a sum; official code: the weights
       enter the gradient alone.
    6. Y takes pixels 2, 6, 10, ... of each axis | official code: 0, 4, 8, ...
    7. The learning rate falls to zero by a cosine, after a warm-up | paper: it is reduced twice.
       Crops are random resized crops | official code: all of one size.
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
from common import (ARCHS, VITS, Loader, Run, ViT, fail, first_batch, join_processes, load_data,
                    parse, patch_side, save_grid)
from kernels.collectives import all_reduce_sum, distribute, rank, world
from kernels.views import Crop, denormalize, normalize, random_flip, whole_image

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def colorization_loss(logits, nearest, z, v):
    """Eq. 2, the mean over the M = n h w places. Returns a scalar, in nats.

    logits: (n, Q, h, w); nearest, z: (M, 5) the bins in which Z is not 0, and Z in them; v: (M,)"""
    log_zhat = logits.movedim(1, 3).flatten(0, 2).log_softmax(1)  # (M, Q)
    cross_entropy = -(z * log_zhat.gather(1, nearest)).sum(1)  # (M,)
    return (v * cross_entropy).mean()


def soft_targets(ab, bins, neighbours=5, sigma=5.0):
    """Section 2.1: ab (n, 2, h, w) -> nearest (M, 5) int64 bins of each of the M = n h w places,
    the nearest first, and their weights (M, 5) in Z: a Gaussian of the distance, with sum 1."""
    places = ab.movedim(1, 3).flatten(0, 2)  # (M, 2)
    distance, nearest = torch.cdist(places, bins).topk(neighbours, largest=False)
    return nearest, (-distance.square() / (2 * sigma**2)).softmax(1)


def class_weights(count, bins, lambda_, sigma=5.0):
    """Eq. 4: w (Q,) from how often each bin was seen, count (Q,)."""
    distance = torch.cdist(bins, bins)
    kernel = (-distance.square() / (2 * sigma**2)).softmax(0)
    p = kernel @ (count / count.sum())  # each column of the kernel spreads the mass of one bin
    w = 1 / ((1 - lambda_) * p + lambda_ / len(p))
    return w / (p * w).sum()


def annealed_mean(logits, bins, T):
    """Eq. 5: logits (n, Q, h, w) -> ab (n, 2, h, w). T to 0 is the most likely bin, T = 1 the mean
    of the distribution."""
    return torch.einsum("nqhw,qc->nchw", (logits / T).softmax(1), bins)


# The network.

FROM_RGB = (  # linear sRGB to XYZ
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
WHITE = (0.95047, 1.0, 1.08883)  # XYZ of D65


def mix(matrix, x):
    """The matrix (3, 3) times the channels of x (n, 3, H, W). The sums are written out, because
    autocast would do a matrix product in bfloat16."""
    channels = x.unbind(1)
    mixed = [sum(m * c for m, c in zip(row, channels)) for row in matrix]
    return torch.stack(mixed, 1)


def rgb_to_lab(x):
    """sRGB (n, 3, H, W) in [0, 1] -> CIE Lab, white D65: L in [0, 100], a and b about -110 to 110.
    Keeps the dtype."""
    power = ((x + 0.055) / 1.055) ** 2.4
    linear = torch.where(x > 0.04045, power, x / 12.92)
    xyz = mix(FROM_RGB, linear) / x.new_tensor(WHITE).view(3, 1, 1)
    root = xyz.clamp(min=1e-6) ** (1 / 3)
    straight = xyz * (29 / 6) ** 2 / 3 + 4 / 29  # a straight line for dark colours
    f = torch.where(xyz > (6 / 29) ** 3, root, straight)
    fx, fy, fz = f.unbind(1)
    L = 116 * fy - 16
    a = 500 * (fx - fy)
    b = 200 * (fy - fz)
    return torch.stack([L, a, b], 1)


def lab_to_rgb(lab):
    """The inverse of rgb_to_lab; colours outside sRGB are clipped."""
    L, a, b = lab.unbind(1)
    fy = (L + 16) / 116
    f = torch.stack([fy + a / 500, fy, fy - b / 200], 1)
    straight = 3 * (6 / 29) ** 2 * (f - 4 / 29)
    xyz = torch.where(f > 6 / 29, f**3, straight)
    xyz = xyz * lab.new_tensor(WHITE).view(3, 1, 1)
    to_rgb = torch.tensor(FROM_RGB, dtype=torch.float64).inverse().tolist()
    linear = mix(to_rgb, xyz).clamp(0, 1)
    power = 1.055 * linear.clamp(min=1e-6) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, power, 12.92 * linear)


def gamut(step=10):
    """bins (Q, 2) float32: the points of a grid of `step` in ab to which at least one sRGB colour
    is nearest. 86 levels per channel, every third of 8 bits, find the same 261 bins as all 256."""
    level = torch.linspace(0, 1, 86, dtype=torch.float64)
    rgb = torch.cartesian_prod(level, level, level)  # (86^3, 3)
    ab = rgb_to_lab(rgb.T.reshape(1, 3, 1, -1))[0, 1:, 0]  # (2, 86^3)

    reach = 120 // step  # a and b lie between -120 and 120
    row, column = (ab / step).round().long() + reach  # (86^3,) each
    occurs = torch.zeros(2 * reach + 1, 2 * reach + 1, dtype=torch.bool)
    occurs[row, column] = True
    return step * (occurs.nonzero() - reach).float()


def lightness(x):
    """Normalised colour images -> their L in all three channels, divided by 100 to lie in [0, 1],
    then normalised like an image."""
    L = rgb_to_lab(denormalize(x.float()))[:, :1]
    return normalize((L / 100).expand(-1, 3, -1, -1))


def backbone(arch, size):
    """common.backbone that looks at lightness: its first layer gets the L of any normalised images.
    The feature of a ViT is the mean of its patches, which are what is trained."""
    net = common.backbone(arch, size, pool="mean")
    net.first_layer.register_forward_pre_hook(lambda layer, inputs: (lightness(inputs[0]),))
    return net


def feature_maps(net, x):
    """Yields four maps (n, channels, h, w): after a ResNet's stages, or a ViT's patches after four
    evenly spaced blocks."""
    if isinstance(net, ViT):
        ends = [len(net.blocks) * quarter // 4 for quarter in (1, 2, 3, 4)]
        x = net.embed(x)  # (n, 1 + L, D)
        for depth, block in enumerate(net.blocks, 1):
            x = block(x)
            if depth in ends:
                patches = net.norm(x)[:, 1:].transpose(1, 2)  # (n, D, L)
                yield patches.unflatten(2, (net.grid, net.grid))
    else:
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
            yield x


class Colorizer(nn.Module):
    def __init__(self, arch, size, bins, width=128):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.side = size // 4
        D = self.backbone.out_dim
        channels = [D // 8, D // 4, D // 2, D]  # of the four maps
        if arch in VITS:
            channels = [D, D, D, D]
        self.lateral = nn.ModuleList([nn.Conv2d(c, width, 1) for c in channels])
        self.head = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, len(bins), 1),
        )
        self.register_buffer("bins", bins)  # (Q, 2)
        self.register_buffer("weights", torch.ones(len(bins)))  # w (Q,), set before training

    def forward(self, x):
        total = 0
        for feature_map, lateral in zip(feature_maps(self.backbone, x), self.lateral):
            # the pooling repeats pixels where a map is smaller than a quarter of the image
            total = total + F.adaptive_avg_pool2d(lateral(feature_map), self.side)
        return self.head(total)  # (n, Q, H/4, W/4)


# The views.


def views(args):
    """A random crop and flip, in colour; backbone(...) decides what the network sees of it."""

    def augment(x, rand):
        return normalize(random_flip(x, rand))

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


def targets(x, bins):
    """Normalised colour images x (n, 3, H, W) -> nearest, z (M, 5) as in soft_targets, of every
    fourth pixel in both directions (a mean over pixels would invent colours), and (M,) bool: the
    image has colour, some |ab| above 5."""
    ab = rgb_to_lab(denormalize(x))[:, 1:, 2::4, 2::4]  # (n, 2, H/4, W/4): pixels 2, 6, 10, ...
    colourful = (ab.abs() > 5).flatten(1).any(1)  # (n,)
    colourful = colourful.repeat_interleave(ab[0, 0].numel())  # (M,)
    nearest, z = soft_targets(ab, bins)
    return nearest, z, colourful


def count_colours(loader, bins, steps=100):
    """How many places of the first epoch (at most `steps` batches), over all processes, are nearest
    to each bin: (Q,), float32. Images without colour do not count; exits if all are without."""
    count = torch.zeros(len(bins), device=loader.device)
    for _, (x,) in itertools.islice(loader(0), steps):
        nearest, _, colourful = targets(x, bins)
        count += torch.zeros_like(count).index_add_(0, nearest[:, 0], colourful.to(count))
    count = all_reduce_sum(count)
    if count.sum() == 0:
        fail("all images are grey; colorization learns from colours, for example --data emoji")
    return count


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 176, "side of a view, pixels; a multiple of 4"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (64, 256, 40, "images per step, over all processes"),
    "epochs": (40, 200, 14, "passes over the training images"),
    "warmup": (1.0, 1.0, 0.0, "epochs of linear learning-rate warm-up"),
    # 4e-3, 20 times the paper's (3e-5 for a batch of 40), whose run has 100 times as many steps
    "lr": (4e-3, 2e-3, 1.92e-4, "learning rate per 256 images"),
    "weight_decay": (1e-4, 1e-4, 1e-3, "on all parameters, in the gradient"),
    "min_crop": (0.5, 0.5, 0.5, "smallest crop, share of the image's area", "(0, 1]"),
    "lambda_": (0.5, 0.5, 0.5, "uniform share in the weights of colours", "[0, 1]"),
    "temperature": (0.38, 0.38, 0.38, "T of the colours in colorized.png", "(0, inf)"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.size % 4:
        fail(
            f"--size {args.size}: choose a multiple of 4, because colours are predicted at a "
            "quarter of the side"
        )
    if args.arch in VITS:
        patch_side(args.size)  # exits if it does not divide the side
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
    """For views.png: the lightness of each image."""
    (x,) = views  # (n, 3, H, W)
    return {"lightness": denormalize(lightness(x))}


@torch.no_grad()
def draw_colorized(path, run):
    """Twelve test images: as they are, without colour, and as the network colours them."""
    args = run.args
    split = run.data.test or run.data.bank
    view = whole_image(args.size, lambda x, rand: x)
    (x,) = first_batch(split, [view], 12 * world(), args.seed, run.device)  # (12, 3, H, W)

    run.model.eval()
    logits = run.model(normalize(x))  # (12, Q, H/4, W/4)
    run.model.train()
    ab = annealed_mean(logits, run.model.bins, args.temperature)
    ab = F.interpolate(ab, (args.size, args.size), mode="bilinear")
    L = rgb_to_lab(x)[:, :1]
    grey = lab_to_rgb(torch.cat([L, 0 * ab], 1))
    coloured = lab_to_rgb(torch.cat([L, ab], 1))

    rows = list(zip(x, grey, coloured))
    note = f"{run.name}: images, coloured from their lightness alone"
    save_grid(path, rows, ["image", "lightness", "coloured"], note=note)


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    bins = gamut().to(device)
    count = count_colours(loader, bins)
    model = Colorizer(args.arch, args.size, bins).to(device)
    model.weights.copy_(class_weights(count, bins, args.lambda_))
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=0.0,
        betas=(0.9, 0.99),
        weight_decay=args.weight_decay,
    )
    state = {"optimizer": optimizer}
    run = Run("colorization", args, data, loader, model, state, show=show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # What to predict, and how much each place matters: 0 in images without colour.
            nearest, z, colourful = targets(x, model.bins)  # (M, 5), (M, 5), (M,)
            v = model.weights[nearest[:, 0]] * colourful  # (M,)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = wrapped(x)  # (n, Q, H/4, W/4), from the lightness of x

            # The mean over the places of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N images.
            loss = colorization_loss(logits.float(), nearest, z, v)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    if rank() == 0:
        draw_colorized(run.folder / "colorized.png", run)
    run.finish()


if __name__ == "__main__":
    main()
