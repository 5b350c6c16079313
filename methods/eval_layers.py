"""Every layer: what each layer of a trained network knows, by a linear probe.
Zhang, Isola, Efros, ECCV 2016, section 3.2. https://arxiv.org/abs/1603.08511
Goyal, Mahajan, Gupta, Misra, ICCV 2019, section 6. https://arxiv.org/abs/1905.01235

Idea. The last layers of a network serve the task that it was trained for. If this task is far from
recognising things (which of four turns, which permutation of tiles), the features in the middle may
be of more use than the last ones. So a linear classifier reads the labels off every layer, in the
trained network and in the same network before training. The weights do not change any more.

Notation. A layer outputs a map of C channels at H x W places. Early maps are large and have few
channels, late ones are small and have many. For a fair comparison all get about the same number of
features, F (--features): the map is averaged to h x w places, h w C features, with

    h = sqrt(F / C) and w = F / (C h), rounded, at least 1 and at most H and W

F is 800, about the width of the last layer at 32 pixels: resnet14 gets 800, 864, 768, 768 and 768.
At 224 pixels F = 9000 gives resnet50 the sizes of Goyal et al., 9216, 9216, 8192, 9216 and 8192
(and needs about 75 GB in process 0). A layer of more than F channels gets one place and all of
them.

    ResNet   stem (after its ReLU, before max-pooling), layer1 ... layer4
    ViT      block1 ... blockN: the patch tokens are the map, and the class token is put beside it
    pixels   the image itself as a map of three channels, the baseline

CPC's network sees each patch of an image by itself, so a layer outputs a map of each patch.
The mean of these maps over the patches is the layer's map. It is smaller than that of an image: at
48 pixels a patch has 16, and layer3 of resnet14 one place, so 384 features.

The probe is linear_probe() in common.py: logistic regression, whose weight decay is chosen on a
fifth of the training images. Accuracies on the test images, in percent: who takes the best layer of
a row has chosen it on them, which is a little optimistic. The last layer may differ from `linear`
in a run's table: there the network normalises (ViT) and pools its features itself. A network whose
layers are not known is left out, k-means features, which have none, too.

Run.
    python methods/eval_layers.py runs/simclr-emoji-0
    python methods/eval_layers.py runs/simclr-emoji-0 runs/rotnet-emoji-0 --data fashion
    torchrun --nproc_per_node 8 methods/eval_layers.py runs/simclr-imagenet-0 --features 9000
It writes results.jsonl and layers.png into --out, by default runs/eval_layers. What is in
results.jsonl is not measured again, so a command that was stopped continues.

Differs from the papers. (This file | Zhang et al.; Goyal et al.)
    1. Averages over rectangles | average pooling with a fixed window.
    2. Each feature is standardised, solved to convergence | batch-norm per channel, SGD on
       augmented images.
    3. About 800 features on the data of the training | about 9,000, on ImageNet or Places.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (ResNet, Results, ViT, candidates, join_processes, labelled_features,
                    linear_probe, load_data, parse, print0, print_files, replace_file, share)
from kernels.collectives import fail, leave_processes, rank

KIND = "evaluation"  # the tests ask for what is due to each kind

# The measure.


def average(x, target):
    """A map (n, C, H, W), or tokens (n, 1 + H H, C) with the class token first, averaged to about
    `target` features per image, F above: (n, h w C), and C more of the class token."""
    class_token = []
    if x.ndim == 3:
        class_token = [x[:, 0]]
        side = math.isqrt(x.shape[1] - 1)
        x = x[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    places = target / x.shape[1]  # that the map may keep
    h = min(x.shape[2], max(1, round(math.sqrt(places))))
    w = min(x.shape[3], max(1, round(places / h)))
    x = F.adaptive_avg_pool2d(x, (h, w)).flatten(1)
    return torch.cat([x, *class_token], 1)


class Layer(nn.Module):
    """One layer of a network as a network: normalised images -> the features that `average` makes
    of its output. module: a part of the network."""

    def __init__(self, network, module, target):
        super().__init__()
        self.network = network
        self.module = module
        self.target = target
        self.train(network.training)  # embed() brings the network back into this mode

    def forward(self, x):
        found = []

        def keep(module, inputs, output):
            if len(output) > len(x):  # a row per patch, those of an image one after the other
                output = output.unflatten(0, (len(x), -1)).mean(1)
            found.append(average(output, self.target))

        handle = self.module.register_forward_hook(keep)
        self.network(x)
        handle.remove()
        return found[0]


def layers(network):
    """{name of a layer: module}, from the image to the features; {} if they are not known."""
    if hasattr(network, "encode"):  # a network of patches (methods/cpc.py)
        network = network.net
    if isinstance(network, ResNet):
        stages = {f"layer{i}": getattr(network, f"layer{i}") for i in (1, 2, 3, 4)}
        return {"stem": network.relu, **stages}  # the blocks have a ReLU of their own
    if isinstance(network, ViT):
        return {f"block{i}": block for i, block in enumerate(network.blocks, 1)}
    if not list(network.parameters()):
        return {"pixels": nn.Identity()}
    return {}


def probe(bank, labels, test, test_labels, groups):
    """{"linear": accuracy of a linear probe in percent, "features": D}. See labelled_features in
    common.py."""
    linear = linear_probe(bank, labels, test, test_labels, groups)
    return {"linear": linear, "features": bank.shape[1]}


# The evaluation.

SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "seed": (0, "seed of the untrained network"),
    "data": ("", "data set or folder of images; if not given, that of the training"),
    "size": (0, "side of the images, pixels; 0: that of the training", "[0, inf)"),
    "features": (800, "features per layer, about; 9000 in the papers, at 224 pixels", "[1, inf)"),
}


def table(results):
    """{network: {layer: accuracy}} as text: one line per network, one column per layer."""
    width = max(len(name) for name in results) + 2
    columns = list(dict.fromkeys(layer for found in results.values() for layer in found))
    lines = [" " * width + "".join(f"{column:>9}" for column in columns)]
    for name, found in results.items():
        words = [f"{found[column]:.1f}" if column in found else "" for column in columns]
        lines.append(f"{name:{width}}" + "".join(f"{word:>9}" for word in words))
    return "\n".join(lines)


def spread(heights, gap):  # copy of: methods/eval_features.py::spread
    """Moves numbers up, as little as this takes, until they are `gap` apart. Returns them in the
    given order."""
    places = list(heights)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for below, i in zip(order, order[1:]):
        places[i] = max(places[i], places[below] + gap)
    return places


def name_lines(axes, lines, right):  # copy of: methods/eval_features.py::name_lines
    """Writes the names of lines at their ends, in their colours, at the place `right` of the
    horizontal axis. lines: {name: matplotlib's line}."""
    ends = [line.get_xydata()[-1] for line in lines.values()]
    low, high = axes.get_ylim()
    gap = (high - low) / max(20, len(lines))  # a twentieth is about the height of a word
    heights = spread([height for _, height in ends], gap)
    above = max(0, max(heights) - high)  # the whole list moves down by what would leave the axes
    for (name, line), end, height in zip(lines.items(), ends, heights):
        color = line.get_color()
        axes.annotate(
            f" {name}  {end[1]:.1f}",
            end,
            (right, height - above),
            color=color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "relpos": (0, 0.5)},
        )


def draw_layers(path, tables):
    """Accuracy against depth: one panel per data set and kind of network; raw pixels are a dotted
    line, untrained networks are dashed. tables: {data set: {network: {layer: accuracy}}}. Without
    a network there is no picture."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # here, so --help need not wait for it

    panels = {}
    for data, results in tables.items():
        for name, found in results.items():
            panels.setdefault((data, tuple(found)), {})[name] = list(found.values())
    raw = {data: panels.pop((data, ("pixels",)), {}) for data in tables}
    if not panels:
        return
    height = max(4, 0.25 * max(map(len, panels.values())))  # of a panel: the names need room
    figure = Figure((8, height * len(panels)), dpi=110, layout="constrained")
    subplots = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, ((data, names), results) in zip(subplots, panels.items()):
        lines = {}
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        for name, (accuracy,) in raw[data].items():
            ends = (0, len(names) - 1)
            (lines[name],) = axes.plot(ends, (accuracy, accuracy), color="gray", linestyle=":")
        for name, accuracies in results.items():
            style = "o--" if name.startswith("untrained") else "o-"
            (lines[name],) = axes.plot(accuracies, style, markersize=4)
        axes.set(
            xlabel="layer, from the image to the features",
            ylabel="linear accuracy, %",
            title=f"{Path(data).name}: what each layer knows",
            xticks=range(len(names)),
            xticklabels=names,
        )
        axes.spines[["top", "right"]].set_visible(False)
        name_lines(axes, lines, axes.get_xlim()[1])
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv, runs="folders of finished runs, or their backbone.pt")
    device = join_processes(args.seed)
    found = candidates(args)
    names = dict.fromkeys(candidate.data for candidate in found)
    sets = {name: load_data(name, args.root, device) for name in names}
    for name, data in sets.items():
        if not data.test:
            fail(f"{name} has no labels: choose another --data, or methods/eval_features.py")
    results = Results("eval_layers", args, device)

    tables = {name: {} for name in sets}
    for candidate in found:
        data = sets[candidate.data]
        network = candidate.network.to(device, memory_format=torch.channels_last)  # as in training
        place = data, candidate.size, device, args.workers
        images = [len(data.bank.images), len(data.test.images)]
        accuracies = {}
        for layer, module in layers(network).items():
            # Of raw pixels the image at full size, not the baseline's averaged one.
            whole = module if layer == "pixels" else network
            part = Layer(whole, module, args.features)
            measured = results.measure(
                f"linear probe of {layer}",
                candidate,
                lambda: share(probe, *labelled_features(part, *place)),
                images=images,
                features=args.features,
            )
            accuracies[layer] = measured["linear"]
        if accuracies:
            tables[candidate.data][candidate.name] = accuracies
        else:
            print0(f"{candidate.name}: left out, its layers are not known")

    folder = results.folder
    if rank() == 0:
        draw_layers(folder / "layers.png", tables)
    for name, measured in tables.items():
        print0(f"\n{name}\n{table(measured)}")
    print0("")
    print_files(folder)
    leave_processes()


if __name__ == "__main__":
    main()
