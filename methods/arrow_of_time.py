"""Arrow of Time: Learning and Using the Arrow of Time.
Wei, Lim, Zisserman, Freeman, CVPR 2018.
https://openaccess.thecvf.com/content_cvpr_2018/html/Wei_Learning_and_Using_CVPR_2018_paper.html
Official code (Torch 7): https://github.com/donglaiw/AoT_TCAM

Idea. Play a video forwards or backwards and ask which it is. Things fall, come to rest and break;
the opposite is not seen. So the network must notice what moves and know how it usually does. It is
shown motion rather than pictures: differences between neighbouring frames, from several moments of
the clip. The network encodes each moment by itself; a second, small network compares them.

Notation. N clips in the global batch, n = N / processes on this process; v(t) the frames of a clip,
d(t) = v(t + 1) - v(t); T moments t_1 < ... < t_T. The network is shown each clip twice:

    x+ = (d(t_1), ..., d(t_T)) forwards,    x- = (-d(t_T), ..., -d(t_1)) backwards,

which are the differences of the film that runs backwards. f(d) (D, g, g) maps of the network, whose
mean over the places is the representation, kept for later use; a(x) the logit of "forwards", by a
network on the T maps together (late fusion) that is thrown away after training:

    L = mean over clips of  1/2 log(1 + exp(-a(x+))) + 1/2 log(1 + exp(a(x-)))

A network that guesses has the loss log 2 = 0.693. Where nothing moves, no network can do better. In
movers motion dies away. So a simple rule is right for 75 % of the clips (87 % in tripod, where the
camera stands still): the film begins where the differences are larger. Only accuracy above this
shows knowledge of how things move. In the run below, 91 % of the held-out clips are right.

Run.
    python methods/arrow_of_time.py                           one CPU core, about 7 minutes
    python methods/arrow_of_time.py --recipe bunny            the embedded film
    torchrun --nproc_per_node 8 methods/arrow_of_time.py --recipe paper --data VIDEOS
--batch counts the clips of all processes together.
The network sees T differences of each clip, in both directions. The evaluation shows it pictures,
which it has never seen. With movers or tripod the run also prints `control`, the accuracy on clips
in which no energy is lost, 51 % in the run below. More than chance would show that something else
tells the direction.

Reached. On movers after 16 epochs, 431 s on one busy core: kNN 46.2 % (untrained 34.0, raw pixels
34.4); linear 50.8 % (untrained 40.4, raw pixels 40.6); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. A moment is the difference of two frames in colour | paper: optical flow of several frames.
    2. The network is a ResNet or ViT, the one on top has a 1x1 and a 3x3 convolution | official
       code: VGG-16 with batch-norm up to conv5, then two 3x3 convolutions with dropout.
    3. Each clip is shown in both directions in the same step | official code: in one of them.
    4. Nothing is cut off, no camera is stabilised | paper: black borders and motions of the camera
       are removed; they would give the direction away.
    5. Crops have random sizes, and colours change a little, all frames alike | official code: crops
       of one size at five places.
    6. AdamW with warm-up and cosine | official code: SGD, with the rate 0.01 in the first epoch and
       0.001 after it.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import ARCHS, Loader, Run, Split, ViT, held_out, join_processes, load_data, parse
from kernels.clips import VideosInMemory
from kernels.collectives import distribute, fail
from kernels.movers import FRAMES, load_movers, render
from kernels.views import (ClipCrop, Crop, as_clips, as_tall, color_jitter, denormalize,
                           normalize, random_flip)

KIND = "video"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def arrow_loss(logits):
    """Logistic loss of both directions of each clip. Returns a scalar, in nats.

    logits: (n, 2) a of the clip forwards and backwards; above 0 the answer is "forwards"."""
    forwards, backwards = logits.unbind(1)
    losses = F.softplus(-forwards) + F.softplus(backwards)  # (n,)
    return losses.mean() / 2


def accuracy(logits):
    """Share of right answers: guesses are right for 1/2, and so is one answer for all. A
    scalar tensor."""
    forwards, backwards = logits.unbind(1)
    right = torch.stack([forwards > 0, backwards <= 0])
    return right.float().mean()


# The network.


def backbone(arch, size):  # copy of: methods/context_encoder.py::backbone
    """common.backbone. The feature of a ViT is the mean of its patches, which are what is used."""
    return common.backbone(arch, size, pool="mean")


def last_map(net, x):  # copy of: methods/context_encoder.py::last_map
    """The map (n, D, g, g) whose mean over the places is the feature."""
    if isinstance(net, ViT):
        patches = net.tokens(x)[:, 1:].transpose(1, 2)  # (n, D, L)
        return patches.unflatten(2, (net.grid, net.grid))
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


class ArrowOfTime(nn.Module):
    def __init__(self, arch, size, moments, hidden):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.fusion = nn.Sequential(
            nn.Conv2d(moments * self.backbone.out_dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(hidden, 1),
        )

    def forward(self, x):
        """Differences of each clip, forwards and backwards (n, 2, T, 3, H, W) -> (n, 2)."""
        moments = x.shape[2]
        # Both directions in one batch: they are normalised by the same statistics.
        maps = last_map(self.backbone, x.flatten(0, 2))  # (2 n T, D, g, g)
        together = maps.unflatten(0, (-1, moments)).flatten(1, 2)  # (2n, T D, g, g)
        return self.fusion(together).view(-1, 2)


# The views.


def two_frames(args):
    """The frames from which the differences of the T moments are made, evenly spread over the clip:
    (2, T) int64, the earlier and the later ones."""
    first = torch.linspace(0, args.frames - 2, args.moments).round().long()
    return torch.stack([first, first + 1])


def both_directions(earlier, later):
    """Frames (n, T, 3, H, W) -> differences (n, 2, T, 3, H, W) of the clip and of the clip that
    runs backwards. Both are made of the same frames, so only the order can tell which is which."""
    forwards = later - earlier
    backwards = -forwards.flip(1)
    return torch.stack([forwards, backwards], 1)


def views(args):
    """Crop, flip and colours of the clip, then its differences, shown around grey."""
    chosen = two_frames(args).flatten()  # (2T,)

    def augment(x, rand):
        x = as_tall(x[:, chosen.to(x.device)])  # one draw for all frames of a clip
        x = color_jitter(random_flip(x, rand), rand, 0.4, 0.4, 0.4, 0.0)
        earlier, later = as_clips(x, 2 * args.moments).chunk(2, dim=1)  # (n, T, 3, H, W) each
        return normalize(0.5 + both_directions(earlier, later))  # (n, 2, T, 3, H, W)

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(ClipCrop(crop, args.frames, args.stride), augment)]


# Training.

SETTINGS = {
    "recipe": ("movers", "bunny", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a frame, pixels"),
    "arch": ("resnet14", "resnet14", "resnet18", "the backbone", ARCHS),
    "frames": (10, 10, 21, "frames of a clip, from which the moments are taken", "[2, 48]"),
    "stride": (1, 1, 1, "show every n-th frame, of 12 per second", "[1, inf)"),
    "moments": (3, 3, 2, "moments T of a clip at which the network looks", "[1, inf)"),
    "batch": (64, 32, 96, "clips per step, over all processes; each in both directions"),
    "epochs": (16, 80, 20, "passes over the training clips"),
    "warmup": (1.0, 5.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (4e-3, 4e-3, 2.7e-3, "learning rate per 256 clips"),
    "weight_decay": (0.05, 0.05, 5e-4, "on all parameters"),
    "hidden": (256, 256, 1024, "channels of the network on top", "[1, inf)"),
    "min_crop": (0.5, 0.5, 0.5, "smallest crop, share of a frame's area", "(0, 1]"),
}


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
    """For views.png: the differences of both directions."""
    (x,) = views  # (n, 2, T, 3, H, W)
    found = {}
    for direction, name in enumerate(("forwards", "reversed")):
        for moment in range(x.shape[2]):
            found[f"{name} {moment + 1}"] = denormalize(x[:, direction, moment])
    return found


def reversible_clips(name, count, device):
    """Held-out clips of `movers` or `tripod` in which no energy is lost and no emoji changes by
    itself: played backwards they are as likely. A Split without labels."""
    how = {"still": True, "lossless": True, "tripod": name == "tripod"}
    clips = render(load_movers("test", device), range(count), **how)
    return Split(VideosInMemory(clips.frames.flatten(0, 1), [FRAMES] * count))


def measure(model, data, control, settings):
    """{"held_out": the accuracy on held-out clips, "control": that on the reversible ones}."""
    found = held_out(model, data.test, settings, accuracy)
    if control:
        found["control"] = held_out(model, control, settings, accuracy)["held_out"]
    return found


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.moments >= args.frames:
        fail(
            f"--moments {args.moments}: {args.frames} frames have {args.frames - 1} differences; "
            "choose fewer moments or more frames"
        )
    return args


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    control = None
    if data.name in ("movers", "tripod"):
        control = reversible_clips(data.name, len(data.test.images), device)
    settings = (views(args), args.batch, args.seed, device, args.workers)
    loader = Loader(data.train, *settings)
    model = ArrowOfTime(args.arch, args.size, args.moments, args.hidden).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    state = {"optimizer": optimizer}
    chance = "chance", math.log(2)
    run = Run("arrow_of_time", args, data, loader, model, state, chance, show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = wrapped(x).float()  # (n, 2)

            # The mean over the clips of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N clips.
            loss = arrow_loss(logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, accuracy=accuracy(logits))
        with run.not_training():
            found = measure(model, data, control, settings)
        run.end_epoch(epoch, **found)
    run.finish()


if __name__ == "__main__":
    main()
