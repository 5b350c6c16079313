"""Video colorization: Tracking Emerges by Colorizing Videos.
Vondrick, Shrivastava, Fathi, Guadarrama, Murphy, ECCV 2018. https://arxiv.org/abs/1806.09594
No official code; a reimplementation: https://github.com/wbaek/tracking_via_colorization

Idea. Take the colour away from a frame of a video, and copy it back from earlier frames: each place
of the grey frame points at places of the coloured ones. Nobody says where to point. But the colour
is only right if the place shows the same thing, so the network learns to find things again,
although they move and turn: it learns to track. Its pointing then also carries masks along a video.

Notation. N clips in the global batch, n = N / processes on this process. Of each clip T frames are
shown, T - 1 references and then the target, all of them as lightness L only. A frame has P places,
squares of --cell pixels, and R = (T - 1) P is the number of places of all references. f (n, T, P,
d) features of the places. The colour space is CIE Lab: L is the lightness, the two numbers ab are
the colour. k-means finds K = 16 centres in ab; the class c of a place is the centre nearest to its
colour. For the places i of the references and j of the target:

    A_ij   = exp(f_i . f_j) / sum over k of exp(f_k . f_j)        attention, over the references
    y_j    = sum over i of  A_ij  onehot(c_i)                     the copied distribution
    L      = - mean over j of  log y_j[c_j]

y is a distribution already, so no softmax comes after it. y_j[c_j] is the attention that falls on
references of the true class. If no reference has the class of a place, the place cannot be answered
and its loss counts as 0. If all f are equal, y is how often each class occurs in the references.

Run.
    python methods/video_colorization.py                      one CPU core, about 13 minutes
    python methods/video_colorization.py --recipe bunny       the embedded film
    torchrun --nproc_per_node 8 methods/video_colorization.py --recipe paper --data VIDEOS
--batch counts the clips of all processes together. The run folder also gets coloured.png: test
clips, coloured from their first frames. In metrics.jsonl, held_out is the share of places of
held-out clips whose most likely class is right. Beside it stand two rules without a network: the
class that the references show most often, and that of the same place in the last reference. masks
is J (intersection / union) of masks that f carries through test clips (eval_video.py: by the maps
of the backbone); masks_stay: left in place; masks_raw: carried by raw patches of lightness.

Reached. On movers after 12 epochs, 758 s on one busy core: kNN 32.5 % (untrained 34.2, raw pixels
34.9); linear 39.4 % (untrained 38.0, raw pixels 40.7); mean of 3 runs. Other recipes: not run.

What to expect. It copies colours well, but its features hardly gain (tests/results/LOG.md).

Differs from the paper. (This file | the paper, or the reimplementation.)
    1. The network is a ResNet or ViT, which sees each frame by itself. Four of its maps, brought to
       one place per --cell pixels, are added, and two convolutions turn the sum into f | paper:
       ResNet-18 at a resolution of an eighth, then five 3-D convolutions over all four frames,
       which are also given x and y of each place.
    2. backbone(...) turns its input into L, so in the evaluation this network and the untrained one
       see lightness alone. The baseline of raw pixels is in colour.
    3. The colour of a place is the mean of its pixels; the centres are those of 256 training clips.
       Frames are 1/6 s apart | reimplementation: 4, 4, 8 frames.
    4. Adam, warm-up, cosine; crops, flips | paper: a tenth of the rate after 60,000 of 400,000.
    5. Reimplementation: y is given to a softmax cross-entropy as if it were logits, so its loss
       cannot fall below log(1 + 15 / e) = 1.88, that of y = 1 for the true class.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import (ARCHS, VITS, Loader, Run, first_batch, held_out, join_processes, load_data,
                    parse, patch_side, save_grid)
from kernels.collectives import distribute, fail, gather, rank, world
from kernels.maps import maps, prepare
from kernels.propagation import as_masks, carry, mean_region, visible
from kernels.views import (ClipCrop, Crop, as_clips, as_tall, denormalize, normalize, random_flip,
                           whole_image)

KIND = "video"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def copy_loss(scores, references, target):
    """The mean over the target's places. Returns a scalar, in nats.

    scores: (n, P, R) f_i . f_j; references (n, R), target (n, P): classes of colours."""
    # The logarithm of a sum of A_ij is a difference of two logsumexp: of the references with the
    # true class, and of all.
    same = references[:, None] == target[:, :, None]  # (n, P, R)
    right = scores.masked_fill(~same, -1e9).logsumexp(2)
    log_y = right - scores.logsumexp(2)  # (n, P), of the true class
    answerable = same.any(2)
    return -log_y.where(answerable, 0).mean()


def copied(scores, values):
    """What the attention copies from the references to the target: scores (n, P, R), values of the
    references (n, R, C) -> (n, P, C)."""
    return scores.softmax(2) @ values


def accuracy(scores, references, target, classes):
    """Share of places whose most likely class is the true one. A scalar tensor."""
    # One-hot: (n, R, classes).
    values = references[:, :, None] == torch.arange(classes, device=references.device)
    y = copied(scores.float(), values.float())  # (n, P, classes)
    return (y.argmax(2) == target).float().mean()


# The network.

FROM_RGB = (  # from linear sRGB to the colour space XYZ, on the way to Lab
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
WHITE = (0.95047, 1.0, 1.08883)  # XYZ of daylight, D65


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


def lightness(x):  # copy of: methods/colorization.py::lightness
    """Normalised colour images -> their L in all three channels, divided by 100 to lie in [0, 1],
    then normalised like an image."""
    L = rgb_to_lab(denormalize(x.float()))[:, :1]
    return normalize((L / 100).expand(-1, 3, -1, -1))


def colours_of(x, cell):
    """Normalised clips (n, T, 3, H, W) -> ab of each place, the mean of its pixels: (n, T, P, 2).
    """
    small = F.avg_pool2d(denormalize(x.flatten(0, 1)), cell)
    ab = rgb_to_lab(small)[:, 1:].flatten(2).mT  # (n T, P, 2)
    return ab.unflatten(0, x.shape[:2])


def k_means(points, count, seed, rounds=30):
    """Points (M, D) -> centres (count, D)."""
    # k-means++: the first centres are points. Each is drawn with a probability proportional to the
    # squared distance from the nearest centre so far.
    u = np.random.default_rng(seed).random(count).tolist()
    centres = points[int(u[0] * len(points))][None]
    for number in u[1:]:
        distance = torch.cdist(points, centres).amin(1).square()
        total = distance.cumsum(0)
        # The first point at which the sum reaches this share of the whole.
        place = (total < number * total[-1]).sum(0, keepdim=True)  # (1,)
        chosen = points[place.clamp(max=len(points) - 1)]
        centres = torch.cat([centres, chosen])

    # Each centre moves to the mean of the points that are nearest to it, if there are any.
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        member = nearest[:, None] == torch.arange(count, device=points.device)
        size = member.sum(0)[:, None]  # (count, 1)
        mean = member.to(points).T @ points / size.clamp(min=1)
        centres = torch.where(size > 0, mean, centres)
    return centres


class Palette(nn.Module):
    """Normalised clips (n, T, 3, H, W) -> the class of the colour of each place, (n, T, P)."""

    def __init__(self, centres, cell):
        super().__init__()
        self.cell = cell
        self.register_buffer("centres", centres)  # (K, 2)

    def forward(self, x):
        ab = colours_of(x, self.cell)
        distance = torch.cdist(ab.flatten(0, 2), self.centres)  # (n T P, K)
        return distance.argmin(1).view(ab.shape[:3])


def refuse_grey(ab):
    """Exits with a one-line message if no place has colour."""
    if ab.abs().max() < 5:
        fail("all videos are grey; this method learns from colours, for example --data movers")


def backbone(arch, size):  # copy of: methods/colorization.py::backbone
    """common.backbone that looks at lightness: its first layer gets the L of any normalised images.
    The feature of a ViT is the mean of its patches, which are what is trained."""
    net = common.backbone(arch, size, pool="mean")
    net.first_layer.register_forward_pre_hook(lambda layer, inputs: (lightness(inputs[0]),))
    return net


class VideoColorizer(nn.Module):
    def __init__(self, arch, size, palette, dim, width=128):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.palette = palette
        self.side = size // palette.cell
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
            nn.Conv2d(width, dim, 1),
        )

    def places(self, x):
        """Clips (n, T, 3, H, W) -> f (n, T, P, dim), of each frame by itself."""
        total = 0
        # after a ResNet's stages, or a ViT's patches after four evenly spaced blocks
        four = maps(self.backbone, x.flatten(0, 1))[-4:]
        for feature_map, lateral in zip(four, self.lateral):
            # the pooling repeats pixels where a map is smaller than the grid of places
            total = total + F.adaptive_avg_pool2d(lateral(feature_map), self.side)
        f = self.head(total).flatten(2).mT  # (n T, P, dim)
        return f.unflatten(0, x.shape[:2])

    def forward(self, x):
        """Clips (n, T, 3, H, W) -> scores (n, P, R), classes of the references (n, R) and of the
        target (n, P)."""
        f = self.places(x)
        references = f[:, :-1].flatten(1, 2)  # (n, R, dim)
        scores = f[:, -1] @ references.mT
        classes = self.palette(x)  # (n, T, P)
        return scores, classes[:, :-1].flatten(1), classes[:, -1]


# The views.


def views(args):
    """The same crop and flip for all frames of a clip, in colour: the network itself looks at the
    lightness alone."""

    def augment(x, rand):
        x = random_flip(as_tall(x), rand)
        return as_clips(normalize(x), args.frames)  # (n, T, 3, H, W)

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(ClipCrop(crop, args.frames, args.stride), augment)]


# Training.

SETTINGS = {
    "recipe": ("movers", "bunny", "paper", "which column gives the defaults"),
    "size": (48, 48, 256, "side of a frame, pixels; a multiple of --cell"),
    "arch": ("resnet14", "resnet14", "resnet18", "the backbone", ARCHS),
    "frames": (4, 4, 4, "frames of a clip: references, then the target", "[2, inf)"),
    "stride": (2, 2, 2, "show every n-th frame, of 12 per second", "[1, inf)"),
    "cell": (4, 4, 8, "side of a place, pixels", "[1, inf)"),
    "dim": (64, 64, 64, "d, numbers per place", "[1, inf)"),
    "clusters": (16, 16, 16, "K, classes of colours", "[2, inf)"),
    "batch": (32, 32, 32, "clips per step, over all processes"),
    "epochs": (12, 100, 50, "passes over the training clips"),
    "warmup": (1.0, 5.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (8e-3, 8e-3, 8e-3, "learning rate per 256 clips"),
    "weight_decay": (1e-4, 1e-4, 0.0, "on all parameters, in the gradient"),
    "min_crop": (0.5, 0.5, 0.5, "smallest crop, share of a frame's area", "(0, 1]"),
    "temperature": (0.5, 0.5, 0.5, "of the attention in coloured.png and masks", "(0, inf)"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.size % args.cell:
        fail(f"--size {args.size}: choose a multiple of {args.cell}, the side of a place (--cell)")
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
    """For views.png: the lightness of each frame."""
    (x,) = views  # (n, T, 3, H, W)
    frames = [denormalize(lightness(frame)) for frame in x.unbind(1)]
    names = [f"reference {number}" for number in range(1, len(frames))]
    return dict(zip([*names, "target"], frames))


def rules(model, data, settings, classes):
    """{rule: held-out accuracy} without a network, {} if there are no held-out clips. A rule is
    given the classes c (n, T, P) of all places."""

    def both(c):
        # The class that the references show most often: equal scores, as if all features were the
        # same.
        references = c[:, :-1].flatten(1)
        scores = references.new_zeros(len(c), c.shape[2], references.shape[1])
        most_frequent = accuracy(scores, references, c[:, -1], classes)
        same_place = (c[:, -2] == c[:, -1]).float().mean()
        return torch.stack([most_frequent, same_place])

    found = held_out(model.palette, data.test, settings, both)
    return dict(zip(("most_frequent", "same_place"), found.get("held_out", ())))


@torch.no_grad()
def carried_masks(model, data, args, device):
    """{name: J} of masks of the first frames of 60 test clips, in the later frames: carried by f;
    left in place; carried by the lightness of the pixels of a place. {} where none are known."""
    truth = getattr(data.test and data.test.images, "truth", None)
    if truth is None:
        return {}
    clips = visible(truth, 60)
    masks = clips.masks > 0  # (n, T, H, W)
    x = prepare(clips.frames.flatten(0, 1).to(device), args.size)
    model.eval()
    f = model.places(x.unflatten(0, masks.shape[:2]))
    model.train()
    raw = F.unfold(lightness(x)[:, :1], args.cell, stride=args.cell)  # (n T, cell^2, P)
    raw = F.normalize(raw.mT, dim=2).unflatten(0, masks.shape[:2])

    # The share of the emoji in each place of the first frame is what is copied.
    first = F.adaptive_avg_pool2d(masks[:, 0].float(), model.side).flatten(1)
    found = {"masks_stay": mean_region(masks[:, :1].expand_as(masks), masks)}
    for name, features in (("masks", f), ("masks_raw", raw)):
        values = carry(features, first.to(device), args.frames, args.temperature)  # (n, T, P)
        values = values.unflatten(2, (model.side, model.side))
        carried = as_masks(values, masks.shape[3]).to(masks.device)
        found[name] = mean_region(carried, masks)
    return found


@torch.no_grad()
def draw_coloured(path, run):
    """Twelve test clips: the target as it is and as it is shown, the colours that the network
    copies, and the references from which it copies."""
    args = run.args
    whole, augment = whole_image(args.size, lambda x, rand: x)  # without augmentation
    view = (ClipCrop(whole, args.frames, args.stride), augment)
    split = run.data.test or run.data.bank
    (x,) = first_batch(split, [view], 12 * world(), args.seed, run.device)
    *references, target = x.unbind(1)  # (12, 3, H, W) each

    run.model.eval()
    scores, _, _ = run.model(normalize(x))
    run.model.train()

    # The colours of the places of the target, then of its pixels, between the places.
    ab = colours_of(normalize(x[:, :-1]), args.cell).flatten(1, 2)  # (12, R, 2)
    ab = copied(scores / args.temperature, ab).mT  # (12, 2, P)
    ab = ab.unflatten(2, (run.model.side, -1))
    ab = F.interpolate(ab, (args.size, args.size), mode="bilinear")

    L = rgb_to_lab(target)[:, :1]
    grey = lab_to_rgb(torch.cat([L, 0 * ab], 1))
    coloured = lab_to_rgb(torch.cat([L, ab], 1))

    rows = list(zip(target, grey, coloured, *references))
    names = [f"reference {number}" for number in range(1, args.frames)]
    note = f"{run.name}: the grey target gets colours that are copied from the references"
    save_grid(path, rows, ["the truth", "target", "copied", *names], note=note)


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    settings = (views(args), args.batch, args.seed, device, args.workers)
    loader = Loader(data.train, *settings)

    # The classes of colours, from the first clips. gather makes them the same in every process.
    (x,) = first_batch(data.train, views(args), 256, args.seed, device)
    ab = gather(colours_of(x, args.cell)).flatten(0, 2)
    refuse_grey(ab)
    palette = Palette(k_means(ab, args.clusters, args.seed), args.cell)

    model = VideoColorizer(args.arch, args.size, palette, args.dim).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    state = {"optimizer": optimizer}
    without_network = rules(model, data, settings, args.clusters)
    run = Run("video_colorization", args, data, loader, model, state, show=show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                scores, references, target = wrapped(x)  # (n, P, R), (n, R), (n, P)

            # The mean over the clips of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N clips.
            loss = copy_loss(scores.float(), references, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right = accuracy(scores.detach(), references, target, args.clusters)
            run.log(loss, lr, accuracy=right)

        with run.not_training():
            found = held_out(model, data.test, settings, lambda out: accuracy(*out, args.clusters))
            carried = carried_masks(model, data, args, device)
        run.end_epoch(epoch, **found, **carried, **without_network)
    if rank() == 0:
        draw_coloured(run.folder / "coloured.png", run)
    run.finish()


if __name__ == "__main__":
    main()
