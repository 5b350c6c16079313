"""ColorProxy: Colorization as a Proxy Task for Visual Understanding.
Larsson, Maire, Shakhnarovich, CVPR 2017. https://arxiv.org/abs/1703.04044
Official code (TensorFlow): https://github.com/gustavla/self-supervision

Idea. Predict the colours of a grey image, as colorization.py does, but in another way. At a few
random points of the image four feature maps of different depths are read out and joined (a
hypercolumn), and from it two distributions over --bins bins, which the paper calls histograms, are
predicted: of the hue, the place on the colour circle, and of the chroma, how far the colour is from
grey. A grey point has no hue, so the loss of the hue is multiplied by the chroma. Reading points
instead of whole maps is cheap and loses little, because neighbouring pixels have nearly the same
colour.

Notation. N images in the global batch, n = N / processes on this process; x (n, 3, H, W) colour
images, of which f sees the grey; h = f(x) (n, D) representation, kept for later use; P random
points per image, at least --border pixels from the edge. From the hypercolumn at a point u a small
network gives 2 K logits, K = --bins: z_hue(u), K of the hue, and z_chroma(u), K of the chroma. For
red, green and blue in [0, 1], chroma c = max - min, and hue is that of HSV in [0, 1). y_hue and
y_chroma are the bins of the true values v: floor(0.99999 K v), so that 1 falls into the last bin.
With CE the cross-entropy and b = --hue-weight:

    L = mean over points of  b c CE(z_hue(u), y_hue)  +  CE(z_chroma(u), y_chroma)

If the network guesses, the second part is log K, 3.47 for 32 bins.

Run.
    python methods/color_proxy.py                             one CPU core, about 13 minutes
    python methods/color_proxy.py --recipe cifar10            one GPU
    torchrun --nproc_per_node 8 methods/color_proxy.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.
The run folder also gets colorized.png: test images, coloured by the network.

Reached. On emoji after 40 epochs, 767 s on one busy core: kNN 57.2 % (untrained 50.1, raw pixels
53.9); linear 57.3 % (untrained 52.0, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The network is a ResNet or ViT, and the hypercolumn has four of its maps | official code:
       AlexNet, VGG-16 or ResNet-152, and up to 15 maps.
    2. backbone(...) turns its input into grey, so evaluation sees no colour either, nor does the
       untrained baseline; only the raw pixels are in colour. Grey is the plain mean of red, green
       and blue, as in the official code.
    3. The hypercolumn and the hidden layer have batch-norm, so maps of different scale count alike
       | official code: optionally a learned scale for each map; dropout of 0.5.
    4. A map w places wide divides the image into w equal cells, with its values at their centres |
       official code: the first value lies at the first pixel.
    5. The target is the bin of the pixel, as in the default of the official code | one of its
       variants: a histogram over 7 x 7 pixels.
    6. Adam, whose learning rate after a warm-up falls to zero by a cosine | the official code holds
       no training script; batch, epochs and learning rate of the column `paper` are those of
       colorization.py. Images are random resized crops, half of them mirrored | official code:
       squares of the image at its own scale, half of them mirrored.
"""

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
from kernels.collectives import distribute, gather, rank, world
from kernels.views import METHOD, Crop, denormalize, normalize, random_flip, whole_image

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def color_losses(hue_logits, chroma_logits, hue, chroma):
    """The two parts of L, hue and chroma, without the factor b: scalars, in nats.

    hue_logits, chroma_logits: (n, P, K); hue, chroma: (n, P) the true values in [0, 1]"""
    bins = hue_logits.shape[2]
    hue_bin = to_bin(hue, bins).flatten()  # (n P,)
    chroma_bin = to_bin(chroma, bins).flatten()
    hue_loss = F.cross_entropy(hue_logits.flatten(0, 1), hue_bin, reduction="none")
    chroma_loss = F.cross_entropy(chroma_logits.flatten(0, 1), chroma_bin)
    return (chroma.flatten() * hue_loss).mean(), chroma_loss


def to_bin(values, bins):
    """[0, 1] -> bins 0 ... bins - 1, int64. As in the official code, 1 falls into the last bin."""
    return (0.99999 * bins * values).floor().long()


def hue_and_chroma(rgb):
    """(n, P, 3) in [0, 1] -> hue and chroma (n, P) in [0, 1]. The highest channel decides from
    which primary the hue is counted, in sixths of the circle. The hue of grey is 0."""
    r, g, b = rgb.unbind(2)
    high = rgb.amax(2)
    chroma = high - rgb.amin(2)
    divisor = chroma.clamp(min=1e-6)
    from_red = ((g - b) / divisor) % 6
    from_green = (b - r) / divisor + 2
    from_blue = (r - g) / divisor + 4
    sixths = torch.where(high == g, from_green, from_blue)
    sixths = torch.where(high == r, from_red, sixths)
    return sixths / 6, chroma


# The network.


def grey(x):
    """Normalised colour images -> the mean of their channels in all three, normalised again."""
    mean = denormalize(x.float()).mean(1, keepdim=True)
    return normalize(mean.expand(-1, 3, -1, -1))


def backbone(arch, size):
    """common.backbone that sees grey only: whatever normalised images it gets, its first layer is
    given their grey. The feature of a ViT is the mean of its patches, because training reads the
    patches."""
    net = common.backbone(arch, size, pool="mean")
    net.first_layer.register_forward_pre_hook(lambda layer, inputs: (grey(inputs[0]),))
    return net


def feature_maps(net, x):  # copy of: methods/colorization.py::feature_maps
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


def read_out(feature_map, points, size):
    """A map (n, C, h, w) of images of `size` pixels, read at the points (n, P, 2), row and column
    in pixels: (n, P, C), by bilinear interpolation between the four nearest places."""
    grid = (2 * points.flip(2) + 1) / size - 1  # column first, the edges of the image at -1 and 1
    grid = grid[:, None].to(feature_map)  # (n, 1, P, 2)
    columns = F.grid_sample(feature_map, grid, padding_mode="border", align_corners=False)
    return columns[:, :, 0].transpose(1, 2)  # (n, P, C)


class ColorProxy(nn.Module):
    def __init__(self, arch, size, hidden, bins):
        super().__init__()
        self.size = size
        self.backbone = backbone(arch, size)
        D = self.backbone.out_dim
        total = D // 8 + D // 4 + D // 2 + D  # channels of the four maps together
        if arch in VITS:
            total = 4 * D
        self.head = nn.Sequential(
            nn.BatchNorm1d(total),
            nn.Linear(total, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2 * bins),
        )

    def forward(self, x, points):
        """Normalised images, points (n, P, 2) -> logits of hue and of chroma, (n, P, K) each."""
        maps = feature_maps(self.backbone, x)
        columns = [read_out(feature_map, points, self.size) for feature_map in maps]
        hypercolumn = torch.cat(columns, 2)  # (n, P, C)
        logits = self.head(hypercolumn.flatten(0, 1))  # (n P, 2 K)
        return logits.unflatten(0, points.shape[:2]).chunk(2, dim=2)


# The views.


def views(args):  # copy of: methods/colorization.py::views
    """A random crop and flip, in colour; backbone(...) decides what the network sees of it."""

    def augment(x, rand):
        return normalize(random_flip(x, rand))

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


def draw_points(rand, args):
    """(n, P, 2) int64, on the CPU: row and column of random pixels, none nearer than `border` to
    the edge."""
    u = rand.uniform(args.border, args.size - args.border, columns=(args.points, 2))
    return u.long()


def colours_at(x, points):
    """Normalised images (n, 3, H, W) -> their red, green and blue in [0, 1] at the points: (n, P,
    3)."""
    place = points[:, :, 0] * x.shape[3] + points[:, :, 1]  # (n, P)
    place = place[:, None].expand(-1, 3, -1)
    return denormalize(x).flatten(2).gather(2, place).transpose(1, 2)


def refuse_grey(loader):  # copy of: methods/split_brain.py::refuse_grey
    """Exits if no image of the first epoch has colour."""
    for _, (x,) in loader(0):
        rgb = denormalize(x)
        chroma = (rgb.amax(1) - rgb.amin(1)).amax()
        if gather(chroma[None]).amax() > 5 / 255:  # less may be traces of compression
            return
    fail("all images are grey; this method learns from colours, for example --data emoji")


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a view, pixels", "[2, inf)"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (64, 256, 40, "images per step, over all processes"),
    "epochs": (40, 200, 14, "passes over the training images"),
    "warmup": (1.0, 1.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (4e-3, 2e-3, 1.92e-4, "learning rate per 256 images"),
    "weight_decay": (1e-6, 1e-6, 1e-6, "on the weights after the hypercolumn, in the gradient"),
    "points": (64, 64, 256, "random points per image", "[1, inf)"),
    "border": (2, 2, 32, "least distance of a point from the edge, pixels"),
    "bins": (32, 32, 32, "bins of the hue, and of the chroma", "[2, inf)"),
    "hue_weight": (5.0, 5.0, 5.0, "weight b of the hue's loss, which the chroma multiplies"),
    "hidden": (128, 512, 1024, "width of the layer after the hypercolumn", "[1, inf)"),
    "min_crop": (0.5, 0.5, 0.5, "smallest crop, share of the image's area", "(0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if 2 * args.border >= args.size:
        fail(
            f"--border {args.border}: choose at most {(args.size - 1) // 2}, or no point of an "
            f"image of {args.size} pixels would be left"
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
    """For views.png: the grey image."""
    (x,) = views  # (n, 3, H, W)
    return {"grey": denormalize(grey(x))}


def point_estimates(hue_logits, chroma_logits):
    """Logits (..., K) of hue and of chroma -> a hue and a chroma (...), in [0, 1]: the means of the
    two distributions, for the hue the mean direction on the circle."""
    bins = hue_logits.shape[-1]
    middle = (torch.arange(bins, device=hue_logits.device) + 0.5) / bins  # (K,)
    angle = 2 * math.pi * middle
    p = hue_logits.softmax(-1)
    sine = (p * angle.sin()).sum(-1)
    cosine = (p * angle.cos()).sum(-1)
    hue = torch.atan2(sine, cosine) / (2 * math.pi) % 1
    return hue, (chroma_logits.softmax(-1) * middle).sum(-1)


def to_rgb(level, hue, chroma):
    """Grey level, hue and chroma, (n, 1, H, W) each -> the colours that have them, (n, 3, H, W);
    what [0, 1] does not hold is clipped."""
    red = (6 * hue - 3).abs() - 1
    green = 2 - (6 * hue - 2).abs()
    blue = 2 - (6 * hue - 4).abs()
    pure = torch.cat([red, green, blue], 1).clamp(0, 1)
    around_zero = pure - pure.mean(1, keepdim=True)
    return (level + chroma * around_zero).clamp(0, 1)


@torch.no_grad()
def draw_colorized(path, run):
    """Twelve test images: as they are, in grey, and as the network colours them."""
    args = run.args
    split = run.data.test or run.data.bank
    view = whole_image(args.size, lambda x, rand: x)
    (x,) = first_batch(split, [view], 12 * world(), args.seed, run.device)  # (12, 3, H, W)

    # Every pixel is a point; one image at a time, because its hypercolumns are large.
    line = torch.arange(args.size, device=x.device)
    points = torch.cartesian_prod(line, line)[None]  # (1, H W, 2)
    level = x.mean(1, keepdim=True)
    coloured = []
    run.model.eval()
    for image, grey_image in zip(x.split(1), level.split(1)):
        logits = run.model(normalize(image), points)
        hue, chroma = point_estimates(*logits)  # (1, H W) each
        hue = hue.view(grey_image.shape)
        chroma = chroma.view(grey_image.shape)
        coloured.append(to_rgb(grey_image, hue, chroma)[0])
    run.model.train()

    rows = list(zip(x, level.expand_as(x), coloured))
    note = f"{run.name}: images, coloured from their grey alone"
    save_grid(path, rows, ["image", "grey", "coloured"], note=note)


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    refuse_grey(loader)
    model = ColorProxy(args.arch, args.size, args.hidden, args.bins).to(device)
    matrices = [w for w in model.head.parameters() if w.ndim > 1]
    others = [w for w in model.head.parameters() if w.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": [*model.backbone.parameters(), *others]},
    ]
    # 0.9 and 0.99 are those of the official code of Colorization.
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99))
    state = {"optimizer": optimizer}
    run = Run("color_proxy", args, data, loader, model, state, show=show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            points = draw_points(loader.random(epoch, step, 0, METHOD), args).to(device)
            hue, chroma = hue_and_chroma(colours_at(x, points))  # (n, P) each
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                hue_logits, chroma_logits = wrapped(x, points)  # from the grey of x

            # The means over the points of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N images.
            hue_logits = hue_logits.float()
            chroma_logits = chroma_logits.float()
            hue_loss, chroma_loss = color_losses(hue_logits, chroma_logits, hue, chroma)
            loss = args.hue_weight * hue_loss + chroma_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, hue=hue_loss.detach(), chroma=chroma_loss.detach())
        run.end_epoch(epoch)
    if rank() == 0:
        draw_colorized(run.folder / "colorized.png", run)
    run.finish()


if __name__ == "__main__":
    main()
