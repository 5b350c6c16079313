"""Split-brain autoencoder: Unsupervised Learning by Cross-Channel Prediction.
Zhang, Isola, Efros, CVPR 2017. https://arxiv.org/abs/1611.09842
Official code (Caffe, trained networks only): https://github.com/richzhang/splitbrainauto

Idea. Split a network into two halves of half the width. One half sees the lightness of an image and
predicts its colours, the other sees the colours and predicts the lightness. Each must know what the
image shows, because it never sees what it predicts. An autoencoder, which predicts its own input,
may copy it without knowing anything. Side by side the features of the halves describe the whole
image, so that nothing is hidden from them in later use, as colour is from a colorization network.

Notation. N images in the global batch, n = N / processes on this process; x (n, 3, H, W) colour
images. In the colour space CIE Lab (white D65), L is lightness, 0 to 100; ab are the colour, green
to red and blue to yellow, about -110 to 110. X1 = L and X2 = ab are what the halves F1 and F2 see.
h = [h1, h2] (n, D) representation, kept for later use, of which each half gives D / 2 numbers. The
places are every fourth pixel of each axis. The target of a place is one of Q classes: for ab the
nearest of Q = 261 points of a grid of step 10, for L one of Q = 50 steps of width 2. Eq. 2 and 3,
with Y the class, and Eq. 1 for regression:

    loss = l(F1(L), ab) + l(F2(ab), L)
    l    = mean over places of  -log softmax(F)[Y]                   classification
    l    = mean over places of   1/2 sum over channels of (X - F)^2  regression

If both halves guess, classification has the loss log 261 + log 50 = 9.48. The colours and the
lightness of predicted.png are means of the classes, after the predicted distribution was sharpened
by a temperature T, as in Colorization.

Run.
    python methods/split_brain.py                             one CPU core, about 10 minutes
    python methods/split_brain.py --recipe cifar10            one GPU
    torchrun --nproc_per_node 8 methods/split_brain.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.
The run folder also gets predicted.png: test images, and what each half predicts of the other's.
--predict own trains an autoencoder in two halves, for comparison.

Reached. On emoji after 60 epochs, 600 s on one busy core: kNN 61.5 % (untrained 51.6, raw pixels
53.9); linear 60.6 % (untrained 55.1, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The network is a ResNet with convolutions in two groups, so the halves share nothing | paper:
       AlexNet, split in the same way.
    2. Each of a half's four maps goes through a 1 x 1 convolution, is brought to a quarter of the
       image's side, and the four are added; two convolutions predict from the sum | paper: fc6 and
       fc7 as convolutions predict 12 x 12 places of 180 x 180 pixels.
    3. The targets are pixels 2, 6, 10, ... of each axis | paper: the downsampled image. The losses
       are means over places | paper: sums.
    4. Q = 261: the points to which at least one 8-bit sRGB colour is nearest | paper: 313.
    5. L - 50 and ab are divided by 50 | official code: not divided.
    6. The autoencoder for comparison has the same two halves, each of which predicts its own input,
       as classes | paper: one network that sees Lab and predicts Lab, a regression (here --loss
       regression kills half of the features, see tests/results/LOG.md).
    7. Adam, whose learning rate after a warm-up falls to zero by a cosine | paper: nothing is said
       of the optimiser, so batch, epochs, rate and decay of the column `paper` are ours. Images are
       random resized crops, half of them mirrored | paper: crops of 180 pixels.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import (RESNETS, Loader, Run, fail, first_batch, join_processes, load_data, parse,
                    save_grid)
from kernels.collectives import distribute, gather, rank, world
from kernels.views import Crop, denormalize, normalize, random_flip, whole_image

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def classification_loss(logits, classes):
    """Eq. 2 for one half, the mean over the places. Returns a scalar, in nats.

    logits: (n, Q, h, w); classes: (n, h, w) int64"""
    return F.cross_entropy(logits, classes)


def regression_loss(predicted, target):
    """Eq. 1 for one half, the mean over the places. Both (n, C, h, w)."""
    return 0.5 * (predicted - target).square().sum(1).mean()


def annealed_mean(logits, bins, T):  # copy of: methods/colorization.py::annealed_mean
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


def mix(matrix, x):  # copy of: methods/colorization.py::mix
    """The matrix (3, 3) times the channels of x (n, 3, H, W). The sums are written out, because
    autocast would do a matrix product in bfloat16."""
    channels = x.unbind(1)
    mixed = [sum(m * c for m, c in zip(row, channels)) for row in matrix]
    return torch.stack(mixed, 1)


def rgb_to_lab(x):  # copy of: methods/colorization.py::rgb_to_lab
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


def lab_to_rgb(lab):  # copy of: methods/colorization.py::lab_to_rgb
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


def gamut(step=10):  # copy of: methods/colorization.py::gamut
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


def scaled_lab(x):
    """Normalised colour images (n, 3, H, W) -> L - 50 and ab, divided by 50."""
    lab = rgb_to_lab(denormalize(x.float()))
    middle = lab.new_tensor([50, 0, 0]).view(3, 1, 1)
    return (lab - middle) / 50


def what_halves_see(x):
    """Normalised colour images -> (n, 4, H, W): L, L, a, b. The first half sees L alone; it is
    given twice because both groups of a convolution must have the same number of channels."""
    lab = scaled_lab(x)
    return torch.cat([lab[:, :1], lab], 1)


def backbone(arch, size):
    """common.backbone split into two halves: every convolution is in two groups, of which the first
    has the first half of all channels. The other layers treat each channel by itself. The network
    takes normalised colour images, as any other."""
    net = common.backbone(arch, size)
    net.conv1.in_channels = 4
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.groups = 2
            shape = layer.out_channels, layer.in_channels // 2, *layer.kernel_size
            layer.weight = nn.Parameter(layer.weight.new_empty(shape))
            for half in layer.weight.data.chunk(2):
                nn.init.kaiming_normal_(half, mode="fan_out", nonlinearity="relu")
    net.first_layer.register_forward_pre_hook(lambda layer, inputs: (what_halves_see(inputs[0]),))
    return net


def feature_maps(net, x):
    """The four maps (n, channels, h, w) after the stages of a ResNet."""
    maps = []
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        maps.append(x)
    return maps


class Head(nn.Module):
    """Predicts `outputs` numbers at every place from the four maps of a half."""

    def __init__(self, channels, outputs, side, width=64):
        super().__init__()
        self.side = side
        self.lateral = nn.ModuleList([nn.Conv2d(c, width, 1) for c in channels])
        self.predict = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1),
        )

    def forward(self, maps):
        total = 0
        for feature_map, lateral in zip(maps, self.lateral):
            # adaptive pooling shrinks large maps; small ones it enlarges by repeating places
            total = total + F.adaptive_avg_pool2d(lateral(feature_map), self.side)
        return self.predict(total)  # (n, outputs, H/4, W/4)


class SplitBrain(nn.Module):
    """counts: how many numbers per place describe L, and how many describe ab. predict: whether
    they are predicted by the half that sees the "other", or by the one that sees its "own"."""

    def __init__(self, arch, size, counts, predict, bins):
        super().__init__()
        self.predict = predict
        self.backbone = backbone(arch, size)
        D = self.backbone.out_dim
        channels = [D // 16, D // 8, D // 4, D // 2]  # of the four maps, in each half
        self.head_L = Head(channels, counts[0], size // 4)
        self.head_ab = Head(channels, counts[1], size // 4)
        self.register_buffer("bins", bins)  # (Q, 2)

    def forward(self, x):
        sees_L = []
        sees_ab = []
        for feature_map in feature_maps(self.backbone, x):
            first, second = feature_map.chunk(2, dim=1)
            sees_L.append(first)
            sees_ab.append(second)
        if self.predict == "own":
            return self.head_L(sees_L), self.head_ab(sees_ab)
        return self.head_L(sees_ab), self.head_ab(sees_L)


# The views.


def views(args):  # copy of: methods/colorization.py::views
    """A random crop and flip, in colour; backbone(...) decides what the network sees of it."""

    def augment(x, rand):
        return normalize(random_flip(x, rand))

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


def targets(x, bins, loss):
    """Normalised colour images (n, 3, H, W) -> what is to be predicted of L and of ab, at every
    fourth pixel of each axis (a mean over pixels would invent colours): classes (n, h, w), or
    scaled channels (n, 1, h, w) and (n, 2, h, w)."""
    lab = scaled_lab(x)[:, :, 2::4, 2::4]  # pixels 2, 6, 10, ...
    L = lab[:, :1]
    ab = lab[:, 1:]
    if loss == "regression":
        return L, ab
    steps = (25 * L[:, 0] + 25).floor()  # 50 steps of 2 in L
    places = 50 * ab.movedim(1, 3).flatten(0, 2)  # (n h w, 2)
    nearest = torch.cdist(places, bins).argmin(1)
    return steps.clamp(0, 49).long(), nearest.view(steps.shape)


def refuse_grey(loader):
    """Exits if no image of the first epoch has colour."""
    for _, (x,) in loader(0):
        rgb = denormalize(x)
        chroma = (rgb.amax(1) - rgb.amin(1)).amax()
        if gather(chroma[None]).amax() > 5 / 255:  # less may be traces of compression
            return
    fail("all images are grey; this method learns from colours, for example --data emoji")


# Training.

LOSSES = {"classification": classification_loss, "regression": regression_loss}
SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 180, "side of a view, pixels; a multiple of 4"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone, split in two", RESNETS),
    "batch": (64, 256, 256, "images per step, over all processes"),
    "epochs": (60, 200, 100, "passes over the training images"),
    "warmup": (1.0, 1.0, 1.0, "epochs of linear learning-rate warm-up"),
    "lr": (4e-3, 2e-3, 1e-3, "learning rate per 256 images"),
    "weight_decay": (1e-4, 1e-4, 1e-4, "on all parameters, in the gradient"),
    "min_crop": (0.5, 0.5, 0.5, "smallest crop, share of the image's area", "(0, 1]"),
    "loss": (*["classification"] * 3, "what the halves minimise", tuple(LOSSES)),
    "predict": ("other", "other", "other", "whose channels a half predicts", ("other", "own")),
    "temperature": (0.38, 0.38, 0.38, "T of what predicted.png shows", "(0, inf)"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.size % 4:
        fail(
            f"--size {args.size}: choose a multiple of 4, because every fourth pixel of each axis "
            "is predicted"
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


def pictures_of(L, ab):
    """Lab images in two parts -> the lightness alone, and the colours alone, at L = 60: sRGB."""
    lightness = lab_to_rgb(torch.cat([L, 0 * L, 0 * L], 1))
    colours = lab_to_rgb(torch.cat([0 * L + 60, ab], 1))
    return lightness, colours


def show(views):
    """For views.png: what each half sees."""
    (x,) = views  # (n, 3, H, W)
    lab = rgb_to_lab(denormalize(x))
    lightness, colours = pictures_of(lab[:, :1], lab[:, 1:])
    return {"half 1: L": lightness, "half 2: ab": colours}


def point_estimates(predicted, bins, args):
    """The predictions of L and of ab -> L (n, 1, h, w) and ab (n, 2, h, w)."""
    of_L, of_ab = predicted
    if args.loss == "regression":
        return 50 * of_L + 50, 50 * of_ab
    middles = torch.arange(1.0, 100, 2, device=bins.device)[:, None]  # (50, 1): of the steps
    L = annealed_mean(of_L, middles, args.temperature)
    ab = annealed_mean(of_ab, bins, args.temperature)
    return L, ab


@torch.no_grad()
def draw_predicted(path, run):
    """Twelve test images, their lightness and colours, and what the halves predict of them."""
    args = run.args
    split = run.data.test or run.data.bank
    view = whole_image(args.size, lambda x, rand: x)
    (x,) = first_batch(split, [view], 12 * world(), args.seed, run.device)  # (12, 3, H, W)

    run.model.eval()
    predicted = run.model(normalize(x))
    run.model.train()
    L, ab = point_estimates(predicted, run.model.bins, args)  # at a quarter of the side
    lab = rgb_to_lab(x)
    lightness, colours = pictures_of(lab[:, :1], lab[:, 1:])
    predicted_lightness, predicted_colours = pictures_of(L, ab)

    rows = list(zip(x, lightness, predicted_colours, colours, predicted_lightness))
    columns = ["image", "L", "predicted ab", "ab", "predicted L"]
    note = "ab is predicted from L, and L from ab"
    if args.predict == "own":
        note = "ab is predicted from ab, and L from L"
    note = f"{run.name}: {note} (ab is shown at L = 60)"
    save_grid(path, rows, columns, note=note)


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    refuse_grey(loader)
    bins = gamut().to(device)
    counts = 50, len(bins)
    guess = "guess", math.log(50) + math.log(len(bins))
    if args.loss == "regression":
        counts = 1, 2
        guess = None
    model = SplitBrain(args.arch, args.size, counts, args.predict, bins).to(device)
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=0.0,
        betas=(0.9, 0.99),
        weight_decay=args.weight_decay,
    )
    state = {"optimizer": optimizer}
    run = Run("split_brain", args, data, loader, model, state, guess, show)
    wrapped = distribute(model, device, args.compile)
    loss_of = LOSSES[args.loss]

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            L, ab = targets(x, model.bins, args.loss)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                predicted_L, predicted_ab = wrapped(x)

            # The means over the places of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N images.
            loss_L = loss_of(predicted_L.float(), L)
            loss_ab = loss_of(predicted_ab.float(), ab)
            loss = loss_ab + loss_L
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, loss_L=loss_L.detach(), loss_ab=loss_ab.detach())
        run.end_epoch(epoch)
    if rank() == 0:
        draw_predicted(run.folder / "predicted.png", run)
    run.finish()


if __name__ == "__main__":
    main()
