"""Maps: what a network knows of each place of an image, before its features are pooled; a head that
reads a linear function of them at each place; and how heads and networks are trained on scenes.

    images uint8 (n, 3, H, W) --prepare--> (n, 3, size, size) --maps--> [(n, channels, h, w), ...]
                              --MapHead--> (n, channels, side, side)

The maps are those of ALL stages: of a ResNet the first layer's and those of layer1 to layer4, of a
vision transformer the patches after four evenly spaced blocks; of a network that sees each patch of
an image by itself, one map of what it finds in them. Stacked they are the hypercolumn of
Hariharan et al., CVPR 2015 (https://arxiv.org/abs/1411.5752).
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from kernels.collectives import fail
from kernels.views import normalize


def prepare(images, size):
    """uint8 (n, 3, H, W) -> what a network is shown, (n, 3, size, size): whole images, resized to a
    square, whatever their shape, and normalised."""
    x = images.float().div_(255)
    if x.shape[2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
        x.clamp_(0, 1)  # bicubic overshoots
    return normalize(x).contiguous(memory_format=torch.channels_last)


def maps(network, x):
    """The maps of a backbone (common.py) for images x (n, 3, H, W), a list of (n, channels, h, w).
    The baseline of raw pixels, which has no weights, gives the colours of the 7 x 7 pixels around
    each place of the averaged image: (n, 147, h, w). The caller sets eval or train mode."""
    if hasattr(network, "maps"):  # a network of patches (methods/cpc.py)
        return network.maps(x)

    if hasattr(network, "layer4"):  # a ResNet
        x = network.relu(network.bn1(network.conv1(x)))
        found = [x]
        x = network.maxpool(x)
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = stage(x)
            found.append(x)
        return found

    if hasattr(network, "blocks"):  # a vision transformer
        side = network.first_layer.stride[0]
        grid = (x.shape[2] // side, x.shape[3] // side)
        ends = [len(network.blocks) * quarter // 4 for quarter in (1, 2, 3, 4)]
        found = []
        x = network.embed(x)  # (n, 1 + L, D)
        for depth, block in enumerate(network.blocks, 1):
            x = block(x)
            if depth in ends:
                # The last norm for every block, as in DINO's code; without the class token.
                patches = network.norm(x)[:, 1:].mT  # (n, D, L)
                found.append(patches.unflatten(2, grid))
        return found

    if list(network.parameters()):
        fail("the maps of this network are not known: choose a run with a ResNet or a ViT")
    x = network(x)
    return [F.unfold(x, 7, padding=3).unflatten(2, x.shape[2:])]


# One network's maps of training and of test scenes serve all tasks.
@functools.lru_cache(maxsize=2)
@torch.no_grad()
def all_maps(network, images, size, device):
    """The maps of all images (N, 3, H, W) uint8, a list of (N, channels, h, w) in float16."""
    batches = [maps(network, prepare(part.to(device), size)) for part in images.split(50)]
    found = [torch.cat([x.half() for x in stage]) for stage in zip(*batches)]
    if not all(x.isfinite().all() for x in found):
        fail("some maps are not finite, or above 65,504 (float16): leave this network out")
    return found


def map_source(frozen, network, images, size, device):
    """Returns a function: indices of images (n,) -> their maps, a list of (n, channels, h, w). The
    maps of a frozen network are made once, for all images."""
    if frozen:
        known = all_maps(network, images, size, device)
        return lambda index: [x[index] for x in known]
    return lambda index: maps(network, prepare(images[index].to(device), size))


class MapHead(nn.Module):
    """Maps -> (n, channels, side, side): a 1x1 convolution of all maps together, resized to `side`.
    Each map is first standardised per channel. The convolution comes before the maps are resized:
    both are linear, so their order does not matter, and one of few channels is less work.

    start: what the head answers everywhere before it is trained, (channels,), with weights of 0;
    None: random weights, for a layer inside a larger head."""

    def __init__(self, widths, channels, side, start=None):
        super().__init__()
        self.side = side
        self.norms = nn.ModuleList([nn.BatchNorm2d(width, affine=False) for width in widths])
        self.convs = nn.ModuleList([nn.Conv2d(width, channels, 1, bias=False) for width in widths])
        self.bias = nn.Parameter(torch.zeros(channels) if start is None else start.clone())
        if start is not None:
            for conv in self.convs:
                nn.init.zeros_(conv.weight)

    def forward(self, maps):
        output = self.bias[:, None, None]
        for norm, conv, x in zip(self.norms, self.convs, maps):
            read = conv(norm(x.float()))  # (n, channels, h, w)
            rows = resizing(read.shape[2], self.side).to(read)
            columns = resizing(read.shape[3], self.side).to(read)
            wide = read @ columns.T  # (n, channels, h, side)
            output = output + (wide.mT @ rows.T).mT
        return output


def resizing(size, side):
    """The matrix (side, size) of bilinear resizing, antialiased: a smaller map is made of means,
    not of single places. Two small products of matrices take a fifth of the time of
    F.interpolate."""
    unit = torch.eye(size)[None, None]
    return F.interpolate(unit, (side, size), mode="bilinear", antialias=True)[0, 0]


@torch.no_grad()
def answers(task, head, source, count):
    """What a trained head says of `count` images whose maps `source` gives: (count, channels, side,
    side) on the CPU. Exits with a one-line message if an answer for the task is not finite."""
    head.eval()
    output = torch.cat([head(source(part)) for part in torch.arange(count).split(50)]).cpu()
    if not output.isfinite().all():
        fail(
            f"some answers for {task} are infinite or not a number: "
            "choose lower rates (--lr-head, --lr-trunk)"
        )
    return output


def ways_to_use(candidates, finetune):
    """Pairs (candidate, "frozen"), then those with weights again, (candidate, "fine-tuned")."""
    ways = [(each, "frozen") for each in candidates]
    if finetune:
        trained = [each for each in candidates if list(each.network.parameters())]
        ways += [(each, "fine-tuned") for each in trained]
    return ways


def settings_of(args, way, train, test, **more):
    """What a result depends on besides the network, for fit() and for results.jsonl. args: the
    flags of a script; way: "frozen" or "fine-tuned"; train, test: the scenes."""
    return {
        "steps": args.steps,
        "lr_head": args.lr_head,
        "batch": args.batch,
        "head_seed": args.seed,
        "scenes": [len(train.images), len(test.images)],
        **more,
        "lr_trunk": args.lr_trunk if way == "fine-tuned" else 0,
    }


def schedule(step, steps):
    """The learning rate of a step, counted from 0, as a part of the highest rate: it rises for a
    tenth of the steps, then falls by a cosine that would reach 0 in step `steps`."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def fit(loss_of, head, trunk, count, settings):
    """Trains the weights of a head and of a trunk (none, if it is frozen) by Adam. Each step draws
    indices (batch,) of `count` scenes and takes the gradient of loss_of(indices). settings: of
    settings_of(); head_seed is for the order of the scenes, lr_head and lr_trunk are the highest
    learning rates. Exits with a one-line message if the loss is not finite."""
    optimizer = torch.optim.Adam([{"params": list(head)}, {"params": list(trunk)}])
    rates = settings["lr_head"], settings["lr_trunk"]
    steps = settings["steps"]
    generator = np.random.default_rng(settings["head_seed"])
    for step in tqdm(range(steps), leave=False, disable=None):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule(step, steps)
        index = generator.choice(count, settings["batch"], replace=False)
        loss = loss_of(torch.from_numpy(index))
        if not loss.isfinite():
            fail(f"the loss is {loss.item()}: choose lower rates (--lr-head, --lr-trunk)")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
