"""Fine-tuning: how much training before helps when few, some or all images have labels.
SimCLR: Chen, Kornblith, Norouzi, Hinton, ICML 2020. https://arxiv.org/abs/2002.05709
SwAV: Caron et al., NeurIPS 2020. https://arxiv.org/abs/2006.09882
Official code of SwAV: https://github.com/facebookresearch/swav

Idea. Labels are expensive, images are not. A network that was trained without labels gets a linear
classifier on top, the head, and then all weights are trained together with the labels of 1 %, 10 %
or all of the images. This is compared with the same network from scratch, that is from random
initial weights, with the same labels and steps; and with the frozen linear probe, which trains only
a linear classifier on unchanged features; raw pixels and k-means features have only such a probe.
The papers find that training before is worth most where labels are few.

Notation. h = f(x) (n, D) features of the network, the trunk; W (C, D), b the head; y (n,) labels;
T steps, counted by t from 0. The loss is the cross-entropy, and both learning rates fall to 0:

    L     = mean over the batch of -log softmax(W h + b)[y]
    lr(t) = lr(0) x (1 + cos(pi t / T)) / 2

lr(0) is larger for the head, which starts near 0, than for a trained trunk. The labelled images
have the proportions of the classes in the whole set, with at least one per class. The subsets of a
draw are nested: those of 1 % are among those of 10 %. The number of a draw is the seed of
everything in it: labelled images, head, order, crops and flips, and from scratch the initial
weights. The first draw is --seed: with --seed 1 --draws 1 for a run of seed 1, and so on, the
deviation over runs contains all of these. In training, batch-norm uses the statistics of the batch.
Accuracies are in percent, on plain test images, which choose nothing.

Limits. The trunk's rates were chosen on SimCLR's network and on one from scratch, with half of the
steps (see SETTINGS), so they favour SimCLR and ResNets. With all labels of emoji 300 steps are 7.6
epochs, after which nothing has converged: "tuned" then measures how fast a network learns as well.
The frozen probe chooses its weight decay on a fifth of the labelled images: noisy if they are few.

Run.
    python methods/eval_finetune.py runs/simclr-emoji-0 runs/rotnet-emoji-0
    python methods/eval_finetune.py runs/*-emoji-* --data fashion --draws 1
    python methods/eval_finetune.py runs/simclr-emoji-0 --steps 800 --lr-trunk 0.002
It writes results.jsonl and finetune.png (accuracy against labels) into --out, by default
runs/eval_finetune. What is in results.jsonl is not measured again, so a command that was stopped
continues. On emoji, with two cores of an Intel Xeon, the first run takes six minutes with all that
stands beside it, another one three; networks that see several tiles of an image (jigsaw, cpc,
context_prediction) take six to ten times as long and mae's, a transformer, sixteen times.

Differs from the papers. (This file | SimCLR, SwAV.)
    1. AdamW without weight decay, which trains ResNets and vision transformers alike | SGD with
       momentum 0.9, trunk 0.01 and head 0.2 for 10 % of the labels (SwAV).
    2. The same number of steps for every part of the labels | epochs: 20 (SwAV); 60 for 1 % and 30
       for 10 % (SimCLR).
    3. The rates fall by a cosine | times 0.2 after 12 and 16 of 20 epochs (SwAV).
    4. Three draws of the labelled images | one published list.
    5. Crops of at least a fifth of the image | of at least 0.08 of it (SwAV).
    6. The network after the last step | after the epoch that is best on the test images (SwAV).
"""

import copy
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (Candidate, Loader, Results, Split, baselines, candidates, features,
                    flip_and_normalize, join_processes, linear_probe, load_data, only, parse,
                    pixels, print0, print_files, replace_file, share)
from kernels.collectives import fail, world
from kernels.kmeans import ABOUT, PATCH, KMeansFeatures, fit_kmeans
from kernels.views import Crop

KIND = "evaluation"  # the tests ask for what is due to each kind
PARTS = (0.01, 0.1, 1.0)  # of the labels

# The measure.


def learning_rate(peak, step, steps):
    """The equation above."""
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


def labelled_part(labels, part, draw):
    """Indices (n,) int64, ascending, of the images whose labels are given: of each class its share,
    rounded, and at least one. Subsets of the same draw are nested. labels: (N,) int64."""
    generator = np.random.default_rng(draw)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0].cpu()
        order = generator.permutation(len(members))
        count = max(1, round(part * len(members)))
        chosen.append(members[order[:count]])
    return torch.cat(chosen).sort().values


def with_head(network, classes, draw):
    """A copy of the network, all of whose weights can be trained, and a linear head of small random
    weights: images (n, 3, H, W) -> logits (n, classes)."""
    trunk = copy.deepcopy(network).requires_grad_(True)
    head = nn.Linear(network.out_dim, classes)
    generator = torch.Generator().manual_seed(draw)
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    return nn.Sequential(trunk, nn.Flatten(1), head)


def parameter_groups(model, lr_trunk, lr_head):
    """For an optimiser: the weights of the trunk and those of the head, each with its rate."""
    trunk, _, head = model
    return [
        {"params": list(trunk.parameters()), "lr": lr_trunk},
        {"params": list(head.parameters()), "lr": lr_head},
    ]


# The evaluation.

SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "seed": (0, "the first draw, and seed of the k-means features"),
    "data": ("", "data set or folder of images; if not given, that of the training"),
    "size": (0, "side of the images, pixels; 0: that of the training", "[0, inf)"),
    "steps": (300, "steps of every fine-tuning", "[1, inf)"),
    "batch": (128, "images per step; all labelled ones if there are fewer"),
    # Chosen without test images: trained with 10 % of the labels of four fifths of the bank, tested
    # on the other fifth; 150 steps, head 0.01. Accuracy by the trunk's rate:
    #                   1e-4   3e-4   1e-3   3e-3
    #     SimCLR's      46.3   47.2   49.2   49.2   (frozen: 47.2; SGD of 0.02, head 0.2: 44.9)
    #     from scratch         44.8   45.7   45.1   (frozen: 46.3)
    "lr_trunk": (1e-3, "learning rate of the network at the first step"),
    "lr_scratch": (1e-3, "the same for a network that was not trained before"),
    "lr_head": (1e-2, "learning rate of the head at the first step"),
    "crop": (0.2, "smallest area of a random crop", "(0, 1]"),
    "draws": (3, "draws of the labelled images", "[1, inf)"),
}


def get_args(argv=None):  # copy of: methods/eval_features.py::get_args
    return parse(__doc__, SETTINGS, argv, runs="folders of finished runs, or their backbone.pt")


def is_trained(candidate):
    return "method" in candidate.about  # it is a run, not a baseline


def fine_tune(candidate, split, classes, draw, device, args):
    """Trains a copy of the network, with a head, on all images of a split. Returns the model and
    the loss of the last step."""
    model = with_head(candidate.network, classes, draw)
    model.to(device, memory_format=torch.channels_last).train()
    lr_trunk = args.lr_trunk if is_trained(candidate) else args.lr_scratch
    groups = parameter_groups(model, lr_trunk, args.lr_head)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]

    view = Crop(candidate.size, scale=(args.crop, 1.0)), flip_and_normalize
    batch = min(args.batch, len(split.images))
    loader = Loader(split, [view], batch, draw, device, args.workers)
    bar = tqdm(total=args.steps, leave=False, disable=None)
    for epoch in range(math.ceil(args.steps / loader.steps)):
        for step, (x,) in loader(epoch):
            if step == args.steps:
                break
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = learning_rate(peak, step, args.steps)

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), split.labels[loader.index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()

    bar.close()
    loader.reader.stream = None  # of files: ends the processes that decode them
    if not loss.isfinite():
        fail(f"{candidate.name}: the loss is {loss.item()}: choose lower learning rates")
    return model, loss.item()


@functools.lru_cache(maxsize=1)  # all parts of the labels, and the draws of a run, share them
def frozen_features(network, data, size, device, workers):
    """features() of the bank and of the test images."""
    network.to(device, memory_format=torch.channels_last)  # as in training
    how = size, device, workers
    return [features(network, split, *how) for split in (data.bank, data.test)]


@functools.lru_cache(maxsize=len(PARTS))  # with all labels the draws have this in common
def frozen_accuracy(network, data, part, draw, *how):
    """Accuracy of the linear probe of frozen features, which sees one part of the labels. how:
    size, device, workers."""
    (bank, bank_readable), (test, readable) = frozen_features(network, data, *how)
    index = labelled_part(data.bank.labels, part, draw).to(bank.device)
    index = only(index, bank_readable[index])
    if len(index) < 2:
        fail(f"{data.name}: two training images with labels are needed")
    labels, test_labels = (split.labels.to(bank.device) for split in (data.bank, data.test))
    emoji = data.bank.emoji
    groups = None if emoji is None else emoji.to(bank.device)[index]
    # Indices copy: the probe overwrites what it is given.
    return linear_probe(bank[index], labels[index], test[readable], test_labels[readable], groups)


def measure(candidate, data, part, draw, device, args):
    """What a line of results.jsonl holds: accuracies with the labels of one draw. tuned is None
    for raw pixels and k-means features, which are no networks."""
    print0(f"  draw {draw - args.seed + 1} of {args.draws}, {part:.0%} of the labels")
    index = labelled_part(data.bank.labels, part, draw)
    if len(index) < 2:
        fail(f"{part:.0%} of the labels is one image: at least two are needed")
    how = candidate.size, device, args.workers
    first = args.seed if part == 1 else draw  # with all labels the draws do not differ
    frozen = frozen_accuracy(candidate.network, data, part, first, *how)
    result = {"labels": len(index), "frozen": frozen, "tuned": None}

    if "arch" in candidate.about:  # a network, trained or not
        labels = data.bank.labels[index].to(device)
        split = Split(data.bank.images.part(index), labels)
        classes = int(data.bank.labels.max()) + 1
        model, loss = fine_tune(candidate, split, classes, draw, device, args)
        logits, readable = features(model, data.test, *how)
        right = logits[readable].argmax(1) == data.test.labels.to(device)[readable]
        result["tuned"] = 100 * right.double().mean().item()
        result["loss"] = loss
    return result


def summary(lines):
    """The results of one network, {(part, draw): result}, as {part: {"frozen" or "tuned": (mean,
    deviation over the draws)}}; the deviation of one draw is nan."""
    found = {}
    for part in PARTS:
        of_part = [result for (p, _), result in lines.items() if p == part]
        found[part] = {"labels": of_part[0]["labels"]}
        for kind in ("frozen", "tuned"):
            values = [result[kind] for result in of_part if result[kind] is not None]
            if values:
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
                found[part][kind] = float(np.mean(values)), deviation
    return found


def table(summaries):
    """{network: its summary()} as text, one line per network."""
    width = max(len(name) for name in summaries)
    first = next(iter(summaries.values()))
    heads = [f"{f'{part:.0%} frozen':>16}{'tuned':>14}" for part in first]
    lines = [" " * width + "".join(heads)]
    for name, found in summaries.items():
        line = f"{name:{width}}"
        for row in found.values():
            line += f"{cell(row.get('frozen')):>16}{cell(row.get('tuned')):>14}"
        lines.append(line)
    labels = ", ".join(f"{part:.0%}: {row['labels']}" for part, row in first.items())
    note = "frozen: linear probe; tuned: all weights trained, from scratch if untrained"
    return "\n".join([*lines, f"{note}\nmean ± deviation over draws, if several; labels {labels}"])


def cell(numbers):
    if numbers is None:
        return "-"
    mean, deviation = numbers
    return f"{mean:.1f}" if math.isnan(deviation) else f"{mean:.1f} ± {deviation:.1f}"


def draw_curves(path, summaries, scratch, draws):
    """Accuracy against labels: one panel per run, with three lines. scratch: {run: the name of the
    same network untrained}. draws: how many draws of the labelled images the numbers are of."""
    from matplotlib.figure import Figure  # here, so --help need not wait for it

    columns = min(4, len(scratch))
    rows = math.ceil(len(scratch) / columns)
    figure = Figure((3 + 2.7 * columns, 1 + 2.8 * rows), dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (run, untrained) in zip(grid.flat, scratch.items()):
        lines = (
            ("fine-tuned", summaries[run], "tuned", "o-"),
            ("from scratch", summaries[untrained], "tuned", "s--"),
            ("frozen, linear probe", summaries[run], "frozen", "^:"),
        )
        for name, found, kind, style in lines:
            labels = [row["labels"] for row in found.values()]
            means = [row[kind][0] for row in found.values()]
            deviations = np.nan_to_num([row[kind][1] for row in found.values()])
            axes.errorbar(labels, means, deviations, fmt=style, markersize=4, capsize=2, label=name)
        axes.set(title=run, xscale="log", xlabel="labelled images")
        axes.set_xticks(labels, labels)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(scratch) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy, %")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    words = f"mean and deviation over {draws} draws of the labelled images"
    if draws == 1:
        words = "one draw of the labelled images"
    figure.suptitle(f"What training before is worth when few images have labels\n{words}")
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def with_kmeans(found, sets, args, device):  # copy of: methods/eval_features.py::with_kmeans
    """The candidates, and first the k-means features of their data sets and sizes, which are fitted
    to 1,000 images of the bank without labels."""
    baselines = []
    for name, size in dict.fromkeys((candidate.data, candidate.size) for candidate in found):
        if size < PATCH:
            print0(f"no k-means features: {size} pixels are less than a patch of {PATCH}")
            continue
        images = sets[name].bank.images
        # Another stream than that of eval_few.py's draws: they would label these very images.
        some = np.random.default_rng([args.seed, 1]).permutation(len(images))[:1000]
        some = Split(images.part(torch.from_numpy(some)))
        x, readable = features(pixels(size), some, size, device, args.workers)
        x = x if x is None else x[readable]  # process 0 has them
        network = KMeansFeatures(*share(fit_kmeans, x, args.seed))
        about = {"seed": args.seed, "weights": ABOUT}
        baselines.append(Candidate(f"k-means, {size} px", network, name, size, about))
    return [*baselines, *found]


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    if world() > 1:
        fail("eval_finetune runs in one process: start it with python instead of torchrun")
    found = candidates(args)
    names = dict.fromkeys(candidate.data for candidate in found)
    sets = {name: load_data(name, args.root, device) for name in names}
    for name, data in sets.items():
        if data.test is None:
            fail(f"--data {name}: labels are needed; give images in folders of their classes")
    results = Results("eval_finetune", args, device)

    settings = {name: getattr(args, name) for name in ("steps", "batch", "lr_head", "crop")}
    runs = [candidate for candidate in found if is_trained(candidate)]
    scratch = {run.name: baselines(run, args.seed)[1].name for run in runs}
    owners = {(scratch[run.name], run.data): run for run in runs}  # a run of that architecture
    summaries = {name: {} for name in sets}
    for candidate in with_kmeans(found, sets, args, device):
        data = sets[candidate.data]
        owner = owners.get((candidate.name, candidate.data))
        settings["lr_trunk"] = args.lr_trunk if is_trained(candidate) else args.lr_scratch
        lines = {}
        for draw in range(args.seed, args.seed + args.draws):
            if owner:  # from scratch: each draw has its own initial weights
                candidate = baselines(owner, draw)[1]
            for part in PARTS:
                lines[part, draw] = results.measure(
                    "fine-tuning",
                    candidate,
                    lambda: measure(candidate, data, part, draw, device, args),
                    part=part,
                    draw=draw,
                    images=[len(split.images) for split in (data.bank, data.test)],
                    **settings,
                )
        summaries[candidate.data][candidate.name] = summary(lines)

    folder = results.folder
    for name, measured in summaries.items():
        own = {run.name: scratch[run.name] for run in runs if run.data == name}
        ending = f"-{Path(name).name}.png" if len(summaries) > 1 else ".png"
        draw_curves(folder / f"finetune{ending}", measured, own, args.draws)
        print0(f"\n{name}\n{table(measured)}")
    print0("")
    print_files(folder)


if __name__ == "__main__":
    main()
