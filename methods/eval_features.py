"""Frozen features: what the trained networks of some runs know, compared on one data set.
kNN: Wu, Xiong, Yu, Lin, CVPR 2018, section 3.4. https://arxiv.org/abs/1805.01978
Linear SVM: Goyal, Mahajan, Gupta, Misra, ICCV 2019. https://arxiv.org/abs/1905.01235
Its code: https://github.com/facebookresearch/fair_self_supervision_benchmark
K-means features: Coates, Lee, Ng, AISTATS 2011. https://proceedings.mlr.press/v15/coates11a.html
Effective rank: Garrido et al., ICML 2023. https://arxiv.org/abs/2210.02885
Alignment and uniformity: Wang, Isola, ICML 2020. https://arxiv.org/abs/2005.10242

Idea. A network is frozen and turns every image into a vector, its features. If simple rules can
read the labels off the features, training has put this knowledge there. Three baselines are
measured in the same way: raw pixels, k-means features, which are learned from small patches without
a network, and the same network before training (its batch-norms as initialised). What a run learned
is only what it has beyond these three. Another data set than that of the training (--data) shows
whether the features are of use elsewhere.

Notation. The training images with their labels are the bank; the test images are the queries and
choose nothing. Accuracies are in percent.

    knn20, knn200   the 20 or 200 bank images with the most similar features (cosine s) vote for
                    their labels with weights exp(s / 0.07)
    linear          linear probe: logistic regression on the features, solved to convergence; its
                    weight decay is chosen on a fifth of the bank
    svm             mean average precision of one linear SVM per class, as Goyal et al. do it: it
                    sorts the test images, and those of its class should come first
    retrieval1, 5   on emoji only: how often one of the 1 or 5 nearest test drawings by other
                    artists shows the same emoji
    rankme          how many dimensions the features of the test images use: exp(entropy of the
                    singular values). It grows with the width: compare networks of one width
    params          numbers in the weights, in millions
    mflops          millions of additions and multiplications per image, two per multiply-add
    images/s        speed of the machine that measured it, 64 images at a time
    train s         seconds of the training, as the run recorded them
    train TFLOPs    operations of the whole training, in 10^12, counted as mflops
    peak GB         most memory of the run, evaluations included

knn20, knn200, linear, retrieval and rankme come from evaluate() in common.py, which prints them at
the end of every run (there with at most --bank images).

Run.
    python methods/eval_features.py runs/simclr-emoji-0 runs/rotnet-emoji-0
    python methods/eval_features.py runs/*-emoji-* --data fashion --only svm
    torchrun --nproc_per_node 8 methods/eval_features.py runs/simclr-imagenet-0 --only features
It writes results.jsonl and curves.png into --out, by default runs/eval_features. What is in
results.jsonl is not measured again. It also holds feature_std, alignment and uniformity, each
class's average precision and cost. A "-" stands for a number that is not defined or was not
recorded.

Differs from the official code of the SVMs. (This file | that code.)
    1. The network's own features, one class per image | maps of each layer, several classes.
    2. Seven costs are tried | 26. Solved to convergence | at most 2,000 rounds.
    3. Cross-validation takes average_precision below | scikit-learn's, which does not take the
       highest precision at a larger recall. Equal scores are taken together | as sorted.
    4. On emoji all drawings of an emoji are in one fold | folds of single images.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (Candidate, Results, Split, candidates, embed, evaluate, features,
                    join_processes, labelled_features, load_data, parse, pixels,
                    principal_directions, print0, print_files, replace_file, share)
from kernels.collectives import fail, leave_processes, rank
from kernels.cost import network_cost
from kernels.kmeans import ABOUT, PATCH, KMeansFeatures, fit_kmeans

KIND = "evaluation"  # the tests ask for what is due to each kind

# The measure.


def average_precision(scores, positive):
    """Area under the curve of precision against recall, as on PASCAL VOC since 2010 and in the
    official code: the precision at a recall is the highest at this or any larger recall. Images
    with equal scores are taken together, so their order does not matter.

    scores (N,) float; positive (N,) bool. Returns a number from 0 to 1, NaN without positives."""
    if not positive.any():
        return math.nan
    scores, order = scores.sort(descending=True)
    hits = positive[order].double().cumsum(0)  # (N,): positives among the first 1, 2, ... images
    count = torch.arange(1, len(scores) + 1, device=scores.device)

    # A threshold lies only where the score falls.
    falls = F.pad(scores.diff() < 0, (0, 1), value=True)
    precision = (hits / count)[falls]
    recall = (hits / hits[-1])[falls]
    highest = precision.flip(0).cummax(0).values.flip(0)
    steps = recall.diff(prepend=recall.new_zeros(1))
    return (highest * steps).sum().item()


def fit_svm(x, sign, cost, variance, start):
    """One SVM per class (Goyal et al. 2019): weights (C, D), the minimum over each row w of

        1/2 ||w||^2 + cost * sum over images i of a_i max(0, 1 - s_i w . x_i)^2

    x (N, D): features and a 1 for the bias, rotated so that the columns are decorrelated. sign
    (N, C): s, 1 for images of the class, which have a = 2, and -1 for others, which have a = 1.
    variance (D,): the mean squares of the columns of x. start (C, D): where L-BFGS begins.
    scikit-learn's LinearSVC minimises the same function, one class at a time and ten times
    slower."""
    decay = 1 / (2 * cost * len(x))
    # Near the inverse root of the curvature, so that all directions converge at one pace.
    scale = (variance + decay).rsqrt()
    scaled = x * scale
    a = (1.5 + 0.5 * sign) / len(x)  # divided by N, as the decay is
    weight = (start / scale).double().requires_grad_()
    solver = torch.optim.LBFGS(
        [weight],
        max_iter=500,
        tolerance_grad=1e-4,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective():
        solver.zero_grad()
        missing = (1 - sign * F.linear(scaled, weight.float())).clamp(min=0)
        loss = (a * missing.square()).double().sum()
        loss = loss + decay * (weight * scale).square().sum()
        loss.backward()
        return loss.detach()

    solver.step(objective)
    return (weight.detach() * scale).float()


# The official code tries 26 costs: the powers of ten from 1e-7 to 100, and 0.5^4 to 0.5^19. No
# class of emoji or fashion chose less than 0.1; on fashion half of them chose 100, the largest.
COSTS = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0)


def svm(bank, labels, test, test_labels, groups):
    """Mean average precision in percent, and per class the average precision and the cost. The cost
    of a class is the one of COSTS with the best average precision in three-fold cross-validation on
    the bank; every fold has its share of each class, and whole groups (near copies). A class with
    one group gets a cost by chance.

    bank, test (N, D); labels (N,) int64; groups (N,) int64 or None. Classes that have no test image
    are left out of the mean."""
    # Length 1, a 1 for the bias, and decorrelated: a rotation changes no solution.
    bank = unit_with_bias(bank)
    test = unit_with_bias(test)
    variance, rotation = principal_directions(bank)
    bank = bank @ rotation
    test = test @ rotation
    classes = torch.arange(labels.max() + 1, device=labels.device)
    sign = torch.where(labels[:, None] == classes, 1.0, -1.0)

    # Deal the groups, sorted by class, to the three folds in turn.
    groups = torch.arange(len(labels), device=labels.device) if groups is None else groups
    names, group_of_image = groups.unique(return_inverse=True)
    if len(names) < 2:
        fail("all training images show the same thing: no cost of an SVM can be chosen on them")
    label_of_group = torch.zeros_like(names).scatter_(0, group_of_image, labels)
    fold = torch.empty_like(names)
    turn = torch.arange(len(names), device=names.device) % 3
    fold[label_of_group.argsort(stable=True)] = turn
    fold = fold[group_of_image]  # (N,)

    # From small to large costs, each from the last solution.
    summed = torch.zeros(len(COSTS), len(classes))  # average precision, over the folds
    for held in (fold == 0, fold == 1, fold == 2):
        train = bank[~held]
        weight = bank.new_zeros(len(classes), bank.shape[1])
        for i, cost in enumerate(COSTS):
            weight = fit_svm(train, sign[~held], cost, variance, weight)
            # A fold without the class has no precision: 0, whatever the cost.
            summed[i] += precisions(bank[held], weight, sign[held] > 0).nan_to_num()
    best = summed.argmax(0)  # (C,)

    weight = bank.new_zeros(len(classes), bank.shape[1])
    chosen = weight.clone()
    for i, cost in enumerate(COSTS):
        weight = fit_svm(bank, sign, cost, variance, weight)
        chosen[best == i] = weight[best == i]
    on_test = 100 * precisions(test, chosen, test_labels[:, None] == classes)
    return {
        "svm": on_test.nanmean().item(),
        "precisions": [None if math.isnan(p) else p for p in on_test.tolist()],
        "costs": [COSTS[i] for i in best],
    }


def unit_with_bias(x):
    """(N, D) -> (N, D + 1)"""
    x = x.float()
    x = x / (x.norm(dim=1, keepdim=True) + 1e-5)
    return F.pad(x, (0, 1), value=1.0)


def precisions(x, weight, positive):
    """Average precision of each class: x (N, D), weight (C, D), positive (N, C) bool -> (C,)."""
    scores = F.linear(x, weight)
    pairs = zip(scores.T, positive.T)
    return torch.tensor([average_precision(*pair) for pair in pairs])


def measure_cost(network, size, device):
    """network_cost, and images per second of this machine: the best of three batches of 64."""
    x = torch.zeros(64, 3, size, size, device=device)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        embed(network, x).sum().item()  # a GPU has finished when the number is here
        seconds.append(time.perf_counter() - began)
    fastest = min(seconds[1:])  # the first one is for what happens only once
    return network_cost(network, size) | {"images_per_s": len(x) / fastest}


# The evaluation.

TABLES = (
    ("knn20", "knn200", "linear", "svm", "retrieval1", "retrieval5", "rankme"),
    ("params", "mflops", "images/s", "train s", "train TFLOPs", "peak GB"),
)
PARTS = ("all", "features", "svm", "cost")
SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "seed": (0, "seed of the untrained network and of the k-means features"),
    "data": ("", "data set or folder of images; if not given, that of the training"),
    "size": (0, "side of the images, pixels; 0: that of the training", "[0, inf)"),
    "only": ("all", "what is measured", PARTS),
}


def get_args(argv=None):
    return parse(__doc__, SETTINGS, argv, runs="folders of finished runs, or their backbone.pt")


def table(results, columns):
    """{name: {column: number, text or None}} as text, one line per name; columns that no name has
    are left out; "" if none is left."""
    width = max(len(name) for name in results) + 2
    columns = [c for c in columns if any(c in found for found in results.values())]
    if not columns:
        return ""
    lines = [" " * width + "".join(f"{column:>13}" for column in columns)]
    for name, found in results.items():
        words = []
        for column in columns:
            value = found.get(column)
            if not isinstance(value, str):
                value = "-" if value is None else f"{value:.1f}"
            words.append(value)
        lines.append(f"{name:{width}}" + "".join(f"{word:>13}" for word in words))
    return "\n".join(lines)


def columns_of(measured, lines):
    """What was measured of a network, {protocol: result}, as {column: number, text or None}. lines:
    of the metrics.jsonl of its run."""
    columns = {**measured.get("features", {}), **measured.get("svm", {})}
    if "cost" in measured:
        cost = measured["cost"]
        columns["params"] = f"{cost['parameters'] / 1e6:.2f}"
        columns["mflops"] = cost["flops"] / 1e6
        columns["images/s"] = f"{cost['images_per_s']:.0f}"
        last = lines[-1] if lines else {}  # a finished run ends with what it cost
        flops = last.get("train_flops")
        columns["train s"] = last.get("train_seconds")
        columns["train TFLOPs"] = flops / 1e12 if flops else None
        columns["peak GB"] = last.get("peak_memory_gb")
    return columns


def knn_curve(lines):
    """The lines of a metrics.jsonl -> [(epoch, kNN accuracy), ...], from the untrained network at
    epoch 0 to the evaluation at the end; [] if there is none, as without labels."""
    if not lines or "knn20" not in lines[-1].get("evaluation", {}):
        return []
    points = [(0, lines[-1]["random_init"]["knn20"])]
    points += [(line["epoch"] + 1, line["knn20"]) for line in lines if "knn20" in line]
    end = lines[0]["settings"]["epochs"]
    return [*points, (end, lines[-1]["evaluation"]["knn20"])]


def spread(heights, gap):
    """Moves numbers up, as little as this takes, until they are `gap` apart. Returns them in the
    given order."""
    places = list(heights)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for below, i in zip(order, order[1:]):
        places[i] = max(places[i], places[below] + gap)
    return places


def name_lines(axes, lines, right):
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


def draw_curves(path, runs):
    """kNN accuracy by epoch, measured during training, of all runs; names at the ends of lines."""
    from matplotlib.figure import Figure  # here, so --help need not wait for it

    curves = {run.name: knn_curve(run.lines) for run in runs}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return
    figure = Figure((7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="epoch", ylabel="%", title="kNN accuracy (k = 20) on the data of the training")
    axes.spines[["top", "right"]].set_visible(False)
    lines = {}
    for name, points in curves.items():
        (lines[name],) = axes.plot(*zip(*points), marker=".")
    name_lines(axes, lines, 1.02 * axes.get_xlim()[1])
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def with_kmeans(found, sets, args, device):
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
    found = candidates(args)
    names = dict.fromkeys(candidate.data for candidate in found)
    sets = {name: load_data(name, args.root, device) for name in names}
    for name, data in sets.items():
        if not data.test and args.only == "svm":
            fail(f"--only svm: {name} has no labels; choose another --data or --only")
        if not data.test:
            print0(f"{name} has no labels: what needs none is measured")
    results = Results("eval_features", args, device)

    tables = {name: {} for name in sets}
    for candidate in with_kmeans(found, sets, args, device):
        data = sets[candidate.data]
        network = candidate.network.to(device, memory_format=torch.channels_last)  # as in training
        inputs = network, data, candidate.size, device, args.workers
        functions = {
            "features": lambda: evaluate(*inputs),
            "svm": lambda: share(svm, *labelled_features(*inputs)),
            "cost": lambda: measure_cost(network, candidate.size, device),
        }
        images = [len(split.images) for split in (data.bank, data.test) if split]
        measured = {}
        for protocol, function in functions.items():
            possible = data.test or protocol in ("features", "cost")
            settings = {"images": images} | ({"costs": COSTS} if protocol == "svm" else {})
            if possible and args.only in ("all", protocol):
                measured[protocol] = results.measure(protocol, candidate, function, **settings)
        tables[candidate.data][candidate.name] = columns_of(measured, candidate.lines)

    folder = results.folder
    if rank() == 0:
        draw_curves(folder / "curves.png", [run for run in found if run.lines])
    for name, rows in tables.items():
        texts = [table(rows, columns) for columns in TABLES]
        print0("\n".join([f"\n{name}", *filter(None, texts)]))
    print0("")
    print_files(folder)
    leave_processes()


if __name__ == "__main__":
    main()
