"""Few labels: what frozen features are worth when only some of the images have labels.
Few labels per class: Goyal, Mahajan, Gupta, Misra, ICCV 2019. https://arxiv.org/abs/1905.01235
1 % and 10 % of the labels: Chen et al., ICML 2020, section 6. https://arxiv.org/abs/2002.05709
K-means features, a baseline: kernels/kmeans.py.

Idea. Self-supervised training needs images without labels; the labels come later, and they cost
work. So the question is how many of them a classifier needs on the features of a network whose
weights do not change any more. Raw pixels, k-means features (learned from small patches without a
network) and the same network before training are measured in the same way.

Notation. Of the training images (the bank) only a few have labels: 1, 2, 5, 10 or 20 per class, or
1 % or 10 % of each class. A class with fewer images gives all it has, every class at least one.
Five draws, the same for all networks; of each draw the smaller set is a part of the larger.
Drawings of one emoji count as different images. Accuracies on all test images, in percent: mean and
deviation over the draws, which says nothing of other test images or trainings.

With one label per class nothing is left to choose a weight decay on. So the classifier is not the
linear probe of the other scripts but always the logistic regression of scikit-learn with its
default, C = 1:

    minimum over w, b of   1/2 ||w||^2 + sum over the labelled images of their cross-entropy

Each of the D features is standardised with the mean and deviation of all bank images (this needs no
label) and divided by sqrt(D). An image then has a mean squared length of 1, whatever D is, so that
C = 1 means the same for every network; with dead channels it is shorter, and C = 1 holds such a
network back more. One C for all favours networks for which it happens to be right: with 1 % of the
labels a tuned probe has up to seven points more (methods/eval_finetune.py). With two classes this
is scikit-learn's C = 2.

Run.
    python methods/eval_few.py runs/simclr-emoji-0
    python methods/eval_few.py runs/simclr-emoji-0 runs/rotnet-emoji-0 --data fashion
    torchrun --nproc_per_node 8 methods/eval_few.py runs/simclr-imagenet-0
It writes results.jsonl, with the accuracy of each draw, and few.png into --out, by default
runs/eval_few. What is in results.jsonl is not measured again, so a command that was stopped
continues.

Differs from the papers. (This file | Goyal et al. with their code; Chen et al.)
    1. Logistic regression, C = 1 | SVMs; their cost is the best one on the test images.
    2. 1 to 20 labels per class, nested | 1 to 96 per class, each number drawn anew.
    3. The network's own features | the maps of several layers.
    4. 1 % and 10 %: frozen features | all weights are trained (methods/eval_finetune.py).
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (Candidate, Results, Split, candidates, features, fit_logistic, join_processes,
                    labelled_features, load_data, parse, pixels, print0, print_files, replace_file,
                    share)
from kernels.collectives import fail, leave_processes, rank
from kernels.kmeans import ABOUT, PATCH, KMeansFeatures, fit_kmeans

KIND = "evaluation"  # the tests ask for what is due to each kind

# The measure.

BUDGETS = {"1": 1, "2": 2, "5": 5, "10": 10, "20": 20, "1 %": 0.01, "10 %": 0.1}
DRAWS = 5
C = 1.0


def draw_labels(labels, budget, draw):
    """Indices of the images whose labels are known. budget >= 1: that many images of each class, or
    all it has. budget < 1: that share of each class, at least one. draw: the seed; of one draw the
    smaller sets are parts of the larger. labels (N,) int64, on the CPU."""
    order = torch.from_numpy(np.random.default_rng(draw).permutation(len(labels)))
    chosen = []
    for label in labels.unique():
        images = order[labels[order] == label]
        count = budget if budget >= 1 else max(1, round(budget * len(images)))
        chosen.append(images[:count])
    return torch.cat(chosen)


def few_labels(bank, labels, test, test_labels):
    """Accuracies in percent with few labels: {budget: {images, accuracies, mean, deviation}}, where
    images counts those with a label. The classifier is described at the top of this file. bank,
    test: features (N, D), (M, D); labels, test_labels: (N,), (M,) int64."""
    mean = bank.float().mean(0)
    scale = (bank.float().std(0) + 1e-6) * bank.shape[1] ** 0.5
    test = (test.float() - mean) / scale
    labels = labels.cpu()
    result = {}
    for name, budget in BUDGETS.items():
        accuracies = []
        for draw in range(DRAWS):
            chosen = draw_labels(labels, budget, draw)
            x = (bank[chosen.to(bank.device)].float() - mean) / scale
            y = labels[chosen].to(bank.device)

            # The best weights are linear combinations of the n images: min(n, D) coordinates.
            u, s, v = torch.linalg.svd(x, full_matrices=False)
            classes = int(labels.max()) + 1
            start = x.new_zeros(classes, len(s)), x.new_zeros(classes)
            variance = s.square() / len(x)
            weight, bias = fit_logistic(u * s, y, variance, 1 / (C * len(x)), *start)
            right = F.linear(test, weight @ v, bias).argmax(1) == test_labels
            accuracies.append(100 * right.double().mean().item())
        result[name] = {
            "images": len(chosen),
            "accuracies": accuracies,
            "mean": float(np.mean(accuracies)),
            "deviation": float(np.std(accuracies, ddof=1)),
        }
    return result


# The evaluation.

SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "seed": (0, "seed of the untrained network and of the k-means features"),
    "data": ("", "data set or folder of images; if not given, that of the training"),
    "size": (0, "side of the images, pixels; 0: that of the training", "[0, inf)"),
}


def table(results):
    """{network: what few_labels returned} as text: mean and deviation, one line per network."""
    width = max(len(name) for name in results) + 2
    budgets = [b if "%" in b else f"{b} per class" for b in BUDGETS]
    lines = [" " * width + "".join(f"{budget:>14}" for budget in budgets)]
    for name, found in results.items():
        numbers = [f"{p['mean']:.1f} +- {p['deviation']:.1f}" for p in found.values()]
        lines.append(f"{name:{width}}" + "".join(f"{number:>14}" for number in numbers))
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


def draw_few(path, few):
    """Accuracy against labels. few: {data set: {network: what few_labels returned}}."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    height = max(4.5, 0.25 * max(map(len, few.values())))  # of a panel: the names need room
    figure = Figure((8, height * len(few)), dpi=110, layout="constrained")
    panels = figure.subplots(len(few), squeeze=False)[:, 0]
    for axes, (data, results) in zip(panels, few.items()):
        axes.set(
            xscale="log",
            xlabel="labels (solid: 1 to 20 per class; dashed: 1 % and 10 % of each class)",
            ylabel="accuracy on the test images, %",
            title=f"{Path(data).name}, few labels: mean and deviation of five draws",
        )
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        axes.spines[["top", "right"]].set_visible(False)
        lines = {}
        for name, found in results.items():
            points = [(p["images"], p["mean"], p["deviation"]) for p in found.values()]
            options = {"marker": "o", "markersize": 3, "capsize": 2, "linewidth": 1}
            line = axes.errorbar(*zip(*points[:5]), **options)[0]
            options |= {"color": line.get_color(), "linestyle": "--"}
            lines[name] = axes.errorbar(*zip(*points[5:]), **options)[0]
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.1, high * 1.1)  # all parts of a small set may be the same images
        name_lines(axes, lines, 1.2 * high)
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
    args = parse(__doc__, SETTINGS, argv, runs="folders of finished runs, or their backbone.pt")
    device = join_processes(args.seed)
    found = candidates(args)
    names = dict.fromkeys(candidate.data for candidate in found)
    sets = {name: load_data(name, args.root, device) for name in names}
    for name, data in sets.items():
        if not data.test:
            fail(f"{name} has no labels: choose another --data, or methods/eval_features.py")
    results = Results("eval_few", args, device)

    tables = {name: {} for name in sets}
    for candidate in with_kmeans(found, sets, args, device):
        data = sets[candidate.data]
        network = candidate.network.to(device, memory_format=torch.channels_last)  # as in training

        def measure():
            known = labelled_features(network, data, candidate.size, device, args.workers)
            return share(few_labels, *known[:4])

        images = [len(data.bank.images), len(data.test.images)]
        settings = {"images": images, "budgets": BUDGETS, "draws": DRAWS, "C": C}
        measured = results.measure("few", candidate, measure, **settings)
        tables[candidate.data][candidate.name] = measured

    folder = results.folder
    if rank() == 0:
        draw_few(folder / "few.png", tables)
    for name, measured in tables.items():
        print0(f"\n{name}\n{table(measured)}")
    print0("")
    print_files(folder)
    leave_processes()


if __name__ == "__main__":
    main()
