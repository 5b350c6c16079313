"""Frozen features: what the trained networks of some runs know, compared on one data set.
kNN: Wu, Xiong, Yu, Lin, CVPR 2018, section 3.4. https://arxiv.org/abs/1805.01978
Effective rank: Garrido et al., ICML 2023. https://arxiv.org/abs/2210.02885
Alignment and uniformity: Wang, Isola, ICML 2020. https://arxiv.org/abs/2005.10242

Idea. A network is frozen, which means that none of its weights changes any more, and turns every
image into a vector, its features. If simple rules can read the labels off the features, training
has put this knowledge there. Raw pixels and the same network before training are measured in the
same way: only what a run has more than both is what it learned. Another data set than that of the
training (--data) shows whether the features are of use elsewhere.

Notation. The training images with their labels are the bank; the test images are the questions.
Accuracies are in percent. It is the protocol of the table at the end of every run, evaluate() in
common.py:

    knn20, knn200   the 20 or 200 bank images with the most similar features (cosine s) vote for
                    their labels with weights exp(s / 0.07)
    linear          linear probe: logistic regression on the features, solved to convergence; its
                    weight decay is chosen on a fifth of the bank
    retrieval1, 5   on emoji only: how often one of the 1 or 5 nearest drawings by other artists
                    shows the same emoji
    rankme          how many dimensions the features use: exp(entropy of the singular values)

results.jsonl has these and the rest of the collapse panel (feature_std, alignment, uniformity).

Run.
    python methods/eval_features.py runs/simclr-emoji-0 runs/rotnet-emoji-0
    python methods/eval_features.py runs/* --data fashion
    torchrun --nproc_per_node 8 methods/eval_features.py runs/simclr-imagenet-0
It writes results.jsonl and curves.png into --out, by default runs/eval_features. What is in
results.jsonl is not measured again, so a command that was stopped continues.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (Results, candidates, evaluate, join_processes, load_data, parse, print0,
                    replace_file)
from kernels.collectives import rank

KIND = "evaluation"  # the tests ask for what is due to each kind
COLUMNS = ("knn20", "knn200", "linear", "retrieval1", "retrieval5", "rankme")

# The measure.


def table(results):
    """{name: what evaluate() returned} as text, one line per name."""
    width = max(len(name) for name in results) + 2
    first = next(iter(results.values()))
    columns = [name for name in COLUMNS if name in first]
    lines = [" " * width + "".join(f"{column:>11}" for column in columns)]
    for name, found in results.items():
        numbers = [f"{found[column]:11.1f}" for column in columns]
        lines.append(f"{name:{width}}" + "".join(numbers))
    return "\n".join(lines)


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


# The evaluation.

SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "data": ("", "data set or folder of images; if not given, that of the training"),
    "size": (0, "side of the images, pixels; 0: that of the training", "[0, inf)"),
}


def get_args(argv=None):
    return parse(__doc__, SETTINGS, argv, runs="folders of finished runs, or their backbone.pt")


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
    accuracies = [accuracy for points in curves.values() for _, accuracy in points]
    gap = max(1, max(accuracies) - min(accuracies)) / 20  # about the height of a word
    heights = spread([points[-1][1] for points in curves.values()], gap)
    right = max(points[-1][0] for points in curves.values())
    for (name, points), height in zip(curves.items(), heights):
        (line,) = axes.plot(*zip(*points), marker=".")
        axes.annotate(
            f" {name}  {points[-1][1]:.1f}",
            points[-1],
            (1.02 * right, height),
            color=line.get_color(),
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "lw": 0.5},
        )
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    found = candidates(args)
    names = dict.fromkeys(candidate.data for candidate in found)
    sets = {name: load_data(name, args.root, device) for name in names}
    results = Results("eval_features", args, device)

    tables = {name: {} for name in sets}
    for candidate in found:
        data = sets[candidate.data]
        network = candidate.network.to(device, memory_format=torch.channels_last)  # as in training
        measured = results.measure(
            "features",
            candidate,
            lambda: evaluate(network, data, candidate.size, device, args.workers),
            images=[len(split.images) for split in (data.bank, data.test) if split],
        )
        tables[candidate.data][candidate.name] = measured

    folder = results.folder
    if rank() == 0:
        draw_curves(folder / "curves.png", [run for run in found if run.lines])
    for name, measured in tables.items():
        print0(f"\n{name}\n{table(measured)}")
    print0(f"\n{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
