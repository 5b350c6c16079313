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

import hashlib
import importlib
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import (ViT, barrier, commit, device_name, evaluate, fail, join_processes,
                    load_backbone, load_data, new_backbone, parse, pixels,
                    print0, rank, read_lines, replace_file, versions)

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


class Candidate(NamedTuple):
    """A network to evaluate. about: what else its line in results.jsonl says."""

    name: str
    network: nn.Module
    data: str
    size: int
    about: dict
    lines: list = []  # of its metrics.jsonl


def finished_runs(args):
    """The trained networks. A folder without a finished run is left out; if nothing is left, or a
    file is damaged, the program ends before anything is measured."""
    files = []
    unfinished = []
    for path in map(Path, args.runs):
        if not path.exists():
            fail(f"{path}: no such folder")
        file = path / "backbone.pt" if path.is_dir() else path
        if file.is_file():
            files.append(file)
        else:
            unfinished.append(str(path))
    if not files:
        fail(f"no finished run in {', '.join(unfinished)}: a run writes its backbone.pt at the end")
    for path in unfinished:
        print0(f"left out, no finished run: {path}")

    # A run is called after its folder; a second folder of that name by its path.
    runs = {}
    for file in dict.fromkeys(files):
        run = read_run(file, args)
        if run.name in runs:
            run = run._replace(name=str(file.parent))
        runs[run.name] = run
    return list(runs.values())


def read_run(file, args):
    """The network in a backbone.pt, with what the metrics.jsonl beside it says of its training."""
    network = load_backbone(file)
    lines = read_lines(file.with_name("metrics.jsonl"))
    settings = lines[0]["settings"] if lines else {}
    size = args.size or network.size
    if isinstance(network, ViT) and size % network.first_layer.stride[0]:
        side = network.first_layer.stride[0]
        fail(f"--size {size}: choose a multiple of {side}, the side of a patch of {file}")
    about = {
        "method": network.method,
        "arch": network.arch,
        "seed": settings.get("seed"),
        "weights": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        "training": settings,
    }
    # A folder of images is recorded by its path in metrics.jsonl, by its name in backbone.pt.
    data = args.data or settings.get("data", network.data)
    return Candidate(file.resolve().parent.name, network, data, size, about, lines)


def baselines(run, seed):
    """Raw pixels, and the network of a run before training. Most methods share the networks of
    common.py; those of a method with its own bear its name."""
    torch.manual_seed(seed)
    method, arch, trained_size = run.network.method, run.network.arch, run.network.size
    network = new_backbone(method, arch, trained_size).eval()
    module = importlib.import_module(f"methods.{method}")
    shared = getattr(module, "backbone", common.backbone) is common.backbone
    name = f"untrained {arch}" if shared else f"untrained {arch} of {method}"
    if run.size != trained_size:
        name += f" made for {trained_size}"
    about = {"arch": arch, "seed": seed}
    return [
        Candidate(f"raw pixels, {run.size} px", pixels(run.size), run.data, run.size, {}),
        Candidate(f"{name}, {run.size} px", network, run.data, run.size, about),
    ]


def identity(row):
    """What makes two lines of results.jsonl the same measurement."""
    names = ("protocol", "network", "weights", "seed", "data", "images", "settings")
    return [row.get(name) for name in names]


def measure(candidate, data, rows, path, args, device):
    """The result for one network: from the lines of results.jsonl, or measured and appended."""
    row = {
        "protocol": "features",
        "network": candidate.name,
        **candidate.about,
        "data": candidate.data,
        "images": [len(split.images) for split in (data.bank, data.test) if split],
        "settings": {"size": candidate.size},
    }
    place = f"{candidate.name} on {candidate.data}"
    for earlier in rows:
        if identity(earlier) == identity(row):
            print0(f"{place}: already measured")
            return earlier["result"]

    print0(f"{place}: evaluating")
    began = time.perf_counter()
    network = candidate.network.to(device, memory_format=torch.channels_last)  # as in training
    row |= {
        "result": evaluate(network, data, candidate.size, device, args.workers),
        "seconds": round(time.perf_counter() - began, 1),
        "command": " ".join(["methods/eval_features.py", *args.argv]),
        "commit": commit(),
        "versions": versions(),
        "device": device_name(device),
    }
    rows.append(row)
    if rank() == 0:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    return row["result"]


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
    runs = finished_runs(args)
    names = dict.fromkeys(run.data for run in runs)
    sets = {name: load_data(name, args.root, device) for name in names}

    # Results of an earlier command; a line that a kill cut short is dropped.
    folder = Path(args.out or "runs/eval_features")
    path = folder / "results.jsonl"
    rows = read_lines(path)
    barrier()  # every process has read before process 0 writes
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        replace_file(path, lambda file: file.write(text.encode()))

    # Raw pixels and untrained networks once each, then the runs.
    candidates = {}
    for run in runs:
        for candidate in baselines(run, args.seed):
            candidates.setdefault((candidate.name, candidate.data), candidate)
    results = {name: {} for name in sets}
    for candidate in [*candidates.values(), *runs]:
        data = sets[candidate.data]
        result = measure(candidate, data, rows, path, args, device)
        results[candidate.data][candidate.name] = result

    if rank() == 0:
        draw_curves(folder / "curves.png", runs)
    for name, found in results.items():
        print0(f"\n{name}\n{table(found)}")
    print0(f"\n{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
