"""Watching objects move: Learning Features by Watching Objects Move.
Pathak, Girshick, Dollar, Darrell, Hariharan, CVPR 2017. https://arxiv.org/abs/1612.06370
Official code (the trained networks; no training): https://github.com/pathak22/unsupervised-video

Idea. What moves together belongs together. In a video, motion tells which pixels belong to an
object: those that move differently from the rest of the scene. This answer is used as a label: the
network is shown a single frame, in which nothing moves, and must find the object. To do so, it has
to know what objects look like. Later it finds them in photographs, too.

Notation. N frames in the global batch, n = N / processes on this process; x (n, 3, H, W). flow:
by how many pixels each pixel moves until the next frame (the optical flow); camera: the median of
the flow over the frame, which is the motion of the background. The label y of a pixel is

    motion = ||flow - camera||,   y = 1 where motion > high,  0 where motion < low,  else unknown

h = f(x) (n, D) representation, kept for later use; a (n, S, S) logits of a mask, from the last map
of f before it is pooled, by two layers that are thrown away after training. A frame in which fewer
than a share `least` of the pixels have y = 1 is left out: nothing has moved in it.

    L = mean over frames that count of  1/2 mean over {y = 1} of log(1 + exp(-a))
                                      + 1/2 mean over {y = 0} of log(1 + exp(a))

Object and background weigh the same, whatever their sizes; unknown pixels teach nothing. A network
that always answers 1/2 has the loss log 2.

Run.
    python methods/watching_objects_move.py                   one CPU core, about 2 minutes
    python methods/watching_objects_move.py --noise 0.5       a flow with errors of half a pixel
    torchrun --nproc_per_node 8 methods/watching_objects_move.py --recipe paper --data movers
--batch counts the clips of all processes together.
The network sees one frame of each. held_out is the overlap of the predicted and the exact mask in
test frames, as the share of their union (IoU); a square in the middle of the frame has 0.19 at its
best size. The run folder also gets masks.png.

Reached. On movers after 30 epochs, 110 s on one busy core: kNN 49.5 % (untrained 34.0, raw pixels
34.4); linear 53.7 % (untrained 40.4, raw pixels 40.5); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The flow is the exact one of synthetic clips, with errors added by --noise, and a threshold
       makes labels of it | the flow is estimated in videos, and a clustering of superpixels (uNLC)
       improves the labels. Both have a third label, "unknown".
    2. The network sees a whole scene in a random crop | paper: a box around the labelled object,
       with a random shift and size, so that the object is not always in its middle.
    3. Object and background are balanced in the loss, since objects cover a twelfth of a frame |
       paper: they fill a large part of the box.
    4. Only frames without a moving object are left out | paper: also those in which more than 80 %
       moves, or in which the frame's border does.
    5. The network is a ResNet or ViT, and the mask has half the side of the frame, at most 56, from
       at most 7 x 7 places | paper: AlexNet; code: a linear layer from all places of its last map
       to the mask, as here.
    6. AdamW with warm-up and cosine | paper: SGD with momentum.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import (ARCHS, Loader, Run, Split, fail, first_batch, held_out, join_processes,
                    load_data, parse, save_grid)
from kernels.clips import VideosInMemory
from kernels.collectives import all_reduce_sum, distribute, rank, world
from kernels.maps import maps
from kernels.views import (ClipCrop, Crop, as_clips, as_tall, color_jitter, denormalize, normalize,
                           random_flip)

KIND = "video"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def mask_loss(logits, label, least):
    """The equation above. Returns the loss of each frame, (n,) in nats, and which frames count,
    (n,) 1 or 0.

    logits: (n, S, S); label: (n, S, S) in [0, 1], where a value between 1/4 and 3/4 is unknown."""
    moves = (label > 0.75).to(logits)
    rests = (label < 0.25).to(logits)
    of_object = mean_where(moves, F.softplus(-logits))
    of_background = mean_where(rests, F.softplus(logits))
    share = moves.mean((1, 2))
    counts = (share >= least) & (share > 0)
    return (of_object + of_background) / 2, counts.to(logits)


def mean_where(mask, values):
    """The mean of each image's values where mask is 1; both (n, S, S)."""
    total = (mask * values).sum((1, 2))
    return total / mask.sum((1, 2)).clamp(min=1)


def motion(flow):
    """How fast each pixel moves relative to the background: (..., 2, H, W) -> (..., H, W)."""
    camera = flow.flatten(-2).median(-1).values
    return (flow - camera[..., None, None]).norm(dim=-3)


def overlap(output):
    """Intersection by union of the predicted and the exact mask, the mean over frames. A scalar
    tensor. output: that of MotionMasks."""
    logits, answers = output
    predicted = logits > 0
    exact = answers[:, 1] > 0.5
    both = (predicted & exact).sum((1, 2))
    either = (predicted | exact).sum((1, 2))
    return (both / either.clamp(min=1)).mean()


# The network.


def backbone(arch, size):  # copy of: methods/context_encoder.py::backbone
    """common.backbone. The feature of a ViT is the mean of its patches, which are what is used."""
    return common.backbone(arch, size, pool="mean")


class MotionMasks(nn.Module):
    def __init__(self, arch, size, width=128):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.side = min(size // 2, 56)  # of a mask, in pixels
        self.reduce = nn.Sequential(
            nn.Conv2d(self.backbone.out_dim, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        places = self.last_map_size(size)
        self.mask = nn.Linear(width * places, self.side**2)  # every place sees all others

    @torch.no_grad()
    def last_map_size(self, size):
        """How many places the last map has, found with an empty image."""
        weight = self.backbone.first_layer.weight
        empty = weight.new_zeros(1, 3, size, size)
        self.backbone.eval()
        last = self.last_map(empty)
        self.backbone.train()
        return last[0, 0].numel()

    def last_map(self, x):
        """(n, D, h, w), averaged to at most 7 x 7 places: the layer after it grows with each."""
        last = maps(self.backbone, x)[-1]
        return F.adaptive_avg_pool2d(last, 7) if last.shape[3] > 7 else last

    def forward(self, x):
        """Frames, each after its label, x (n, 2, 3, H, W) -> logits (n, S, S) of the frame alone;
        and for the loss label and exact mask, (n, 2, S, S)."""
        label, frame = x.unbind(1)
        answers = F.adaptive_avg_pool2d(label[:, :2], self.side)
        last = self.last_map(frame)
        logits = self.mask(self.reduce(last).flatten(1))  # (n, S S)
        return logits.unflatten(1, (self.side, self.side)), answers


# The views.


def labelled(split, args):
    """A split of videos with labels from their motion. Each video of T frames becomes a new one of
    2 (T - 1) pictures: first the labels of frames 1 to T - 1, then these frames (the last one has
    no flow). Two pictures that are T - 1 apart are a label and its frame; taken as one clip they
    get the same crop.

    Channel 0 of a label is y, 1/2 where unknown; channel 1 is the exact mask, only for `overlap`
    and the picture; channel 2 is empty."""
    truth = getattr(split.images, "truth", None)  # images and files have none
    if truth is None:
        fail(f"--data {args.data}: the flow of these videos is not known; choose movers or tripod")
    generator = torch.Generator().manual_seed(args.seed)
    films = []
    for start in range(0, len(split.images), 100):  # the flow of all would take a gigabyte
        part = truth.part(slice(start, start + 100))
        flow = part.flow
        if args.noise:
            flow = flow + args.noise * errors(flow.shape, generator).to(flow)
        speed = motion(flow)  # (m, T - 1, H, W)
        y = 0.5 * (speed > args.high) + 0.5 * (speed >= args.low)
        exact = (part.masks[:, :-1] > 0).to(y)
        label = torch.stack([y, exact, 0 * y], 2)  # (m, T - 1, 3, H, W)
        label = (255 * label).round().byte()
        film = torch.cat([label, part.frames[:, :-1]], 1)
        films.append(film.flatten(0, 1))
    lengths = [film.shape[1]] * len(split.images)
    return Split(VideosInMemory(torch.cat(films), lengths))


def errors(shape, generator):
    """Errors of an estimated flow (m, T - 1, 2, H, W): normal numbers on a grid of 6 x 6 places,
    and linear between them, since neighbours are wrong together."""
    coarse = torch.randn(*shape[:3], 6, 6, generator=generator).flatten(0, 1)
    fine = F.interpolate(coarse, shape[3:], mode="bilinear")
    return fine.unflatten(0, shape[:2])


def views(args, stride):
    """The label and its frame: the same crop and flip, and other colours of the frame."""

    def augment(x, rand):
        x = as_clips(random_flip(as_tall(x), rand), 2)
        label, frame = x.unbind(1)
        frame = color_jitter(frame, rand, 0.4, 0.4, 0.4, 0.0)
        return torch.stack([label, normalize(frame)], 1)

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(ClipCrop(crop, 2, stride), augment)]


def plain_views(args, stride):
    """The whole frame as it is, to measure and to show."""

    def augment(x, rand):
        return torch.stack([x[:, 0], normalize(x[:, 1])], 1)

    whole = Crop(args.size, scale=(1, 1), ratio=(1, 1))
    return [(ClipCrop(whole, 2, stride), augment)]


# Training.

SETTINGS = {
    "recipe": ("movers", "paper", "which column gives the defaults"),
    "size": (32, 224, "side of a frame, pixels", "[2, inf)"),
    "arch": ("resnet14", "resnet18", "the backbone", ARCHS),
    "low": (0.5, 0.5, "motion below which a pixel is background, pixels per frame"),
    "high": (1.0, 1.0, "motion above which it belongs to an object, pixels per frame"),
    "least": (0.02, 0.1, "share of pixels that must move for a frame to count", "[0, 1]"),
    "noise": (0.0, 0.0, "standard deviation of the flow's errors, pixels per frame"),
    "batch": (64, 32, "clips per step, over all processes"),
    "epochs": (30, 100, "passes over the training clips"),
    "warmup": (1.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (4e-3, 1e-3, "learning rate per 256 clips"),
    "weight_decay": (0.05, 5e-4, "on all parameters"),
    "min_crop": (0.5, 0.5, "smallest crop, share of a frame's area", "(0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.low > args.high:
        fail(f"--low {args.low:g}, --high {args.high:g}: choose a --low of at most --high")
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
    """For views.png: the frame, and its label, grey where unknown."""
    (x,) = views  # (n, 2, 3, H, W)
    label = x[:, 0, :1].expand(-1, 3, -1, -1)
    return {"frame": denormalize(x[:, 1]), "label": label}


@torch.no_grad()
def draw_masks(path, run, split, plain):
    """Eight test frames, their labels, and the predicted and the exact masks."""
    (x,) = first_batch(split, plain, 8 * world(), run.args.seed, run.device)  # (8, 2, 3, H, W)
    run.model.eval()
    logits, answers = run.model(x)
    run.model.train()

    label, exact = answers.unbind(1)  # (8, S, S)
    masks = torch.stack([label, logits.sigmoid(), exact])
    masks = masks[:, :, None].expand(-1, -1, 3, -1, -1)
    rows = list(zip(denormalize(x[:, 1]), *masks))
    note = f"{run.name}: test frames, and where the object is; grey labels are unknown"
    save_grid(path, rows, ["frame", "label", "predicted", "exact"], note=note)


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    train = labelled(data.train, args)
    test = labelled(data.test, args)
    stride = int(train.images.lengths[0]) // 2  # from a label to its frame
    settings = (args.batch, args.seed, device, args.workers)
    plain = plain_views(args, stride)
    loader = Loader(train, views(args, stride), *settings)
    model = MotionMasks(args.arch, args.size).to(device)

    # In one kernel (fused), since the network is small: one by one, the parameters' updates would
    # take a tenth of the step.
    decay = args.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=decay, fused=True)
    state = {"optimizer": optimizer}
    name = "watching_objects_move"
    chance = ("chance", math.log(2))
    run = Run(name, args, data, loader, model, state, chance, show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits, answers = wrapped(x)  # (n, S, S), (n, 2, S, S)
            losses, counts = mask_loss(logits.float(), answers[:, 0].float(), args.least)

            # The mean over the frames that count on all processes. DistributedDataParallel divides
            # the gradients by the number of processes, so multiply by it.
            total = all_reduce_sum(counts.sum())
            loss = world() * (losses * counts).sum() / total.clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, counted=counts.mean())
        with run.not_training():
            found = held_out(model, test, (plain, *settings), overlap)
        run.end_epoch(epoch, **found)
    if rank() == 0:
        draw_masks(run.folder / "masks.png", run, test, plain)
    run.finish()


if __name__ == "__main__":
    main()
