"""Keeps the recorded results and writes what README.md shows of them, so that no number there is typed by hand.

    python tests/results/report.py add runs/simclr-emoji-0 ...      appends finished runs to rows.jsonl, one row a run
    python tests/results/report.py                                  rewrites README's tables and draws knn.png from the rows
    python tests/results/report.py --check                          fails if README's tables are not those of the rows

A row holds what metrics.jsonl of the run folder says: command, commit, versions, device, settings, training seconds, the
evaluation beside its two baselines, and kNN accuracy over time. Rows of equal settings, whatever the seed, form one entry.
"""

import argparse
import ast
import importlib
import json
import re
import statistics
import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from common import table
from kernels import bench

ROWS, README = HERE / "rows.jsonl", ROOT / "README.md"
FACTS = {  # file -> the idea in at most ten words, and the paper's own figure with its setting
    "barlow_twins": ("dimensions agree between views, not with each other", "73.2 % ImageNet linear, ResNet-50, 1000 epochs"),
    "byol": ("predict a slowly moving average's view; no negatives", "74.3 % ImageNet linear, ResNet-50, 1000 epochs"),
    "colorization": ("what colours does this grey image have?", "65.6 % mAP VOC 2007 classification, AlexNet"),
    "dino": ("a student matches its own moving average across crops", "77.0 % ImageNet linear, ViT-S/16, 800 epochs"),
    "jigsaw": ("in which order were the nine tiles shuffled?", "67.6 % mAP VOC 2007 classification, AlexNet"),
    "mae": ("paint the three quarters of the patches that are hidden", "73.5 % ImageNet linear, ViT-L, 800 epochs"),
    "moco": ("a key among a queue of thousands of others", "71.1 % ImageNet linear, ResNet-50, v2, 800 epochs"),
    "rotnet": ("which of four ways was the image turned?", "91.2 % CIFAR-10, NIN, conv classifier on block 2"),
    "simclr": ("two views of an image attract, other images repel", "69.3 % ImageNet linear, ResNet-50, 1000 epochs"),
    "simsiam": ("predict the other view; its gradient is stopped", "71.3 % ImageNet linear, ResNet-50, 800 epochs"),
    "swav": ("predict the cluster of another view; clusters equally filled", "75.3 % ImageNet linear, ResNet-50, 800 epochs"),
}


def read_rows():
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def add(folders):
    """Appends the finished runs in these folders; a run recorded before with the same settings is replaced."""
    rows = read_rows()
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if "evaluation" not in lines[-1]:
            sys.exit(f"error: {folder} holds no finished run: run its command again to complete it")
        first, last = lines[0], lines[-1]
        curve = [[0, last["random_init"]["knn20"]]] + [[row["seconds"], row["knn20"]] for row in lines if "knn20" in row]
        row = {**first, **last, "curve": [*curve, [last["train_seconds"], last["evaluation"]["knn20"]]]}
        rows = [r for r in rows if any(r[k] != row[k] for k in ("method", "settings", "world_size", "device"))] + [row]
    rows.sort(key=lambda r: (r["method"], r["settings"]["data"], r["settings"]["epochs"], r["settings"]["seed"]))
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def entries(rows):
    """[[row of each run], ...]: runs that differ by nothing but the seed, the device, and how often they were looked at."""
    groups = {}
    for row in rows:
        settings = {k: v for k, v in row["settings"].items() if k not in ("seed", "eval_every")}
        groups.setdefault((row["method"], json.dumps(settings, sort_keys=True)), []).append(row)
    return list(groups.values())


def by_device(runs):
    """{device: its runs}, the fastest first."""
    devices = {device: [run for run in runs if run["device"] == device] for device in {run["device"] for run in runs}}
    return dict(sorted(devices.items(), key=lambda item: seconds(item[1])))


def seconds(runs):
    return statistics.mean(run["train_seconds"] for run in runs)


def defaults(row):
    with mock.patch.object(sys, "argv", [row["method"]]):  # no flags
        return vars(importlib.import_module(f"methods.{row['method']}").get_args())


def is_default(row):
    """Whether the run had today's defaults, on whatever data."""
    free = {"data", "eval_every", "seed", "out", "root", "workers", "compile"}
    return all(row["settings"].get(name, "?") == value for name, value in defaults(row).items() if name not in free)


def label(row):
    """'**swav** `--optimizer lars`, resnet14': the flags that are not today's defaults, but for those of other columns and
    those that change no result; a flag that is newer than the row has a question mark."""
    flags = []
    elsewhere = {"data", "arch", "batch", "epochs", "eval_every", "seed", "out", "root", "workers", "compile"}
    for name, default in defaults(row).items():
        value = default if name in elsewhere else row["settings"].get(name, "?")
        if value != default:
            words = [] if value is True else value if isinstance(value, list) else [value]
            flags.append(" ".join(map(str, [f"--{name.replace('_', '-')}", *words])))
    flags = f" `{' '.join(sorted(flags))}`" if flags else ""
    return f"**{row['method']}**{flags}, {row['settings']['arch']}"


def spread(runs, part, key):
    """'59.2 ± 0.4' over the runs, without the spread for one run or none to report."""
    values = [run[part][key] for run in runs if key in run[part]]
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def method_table():
    """One line per file in methods/: paper, idea, length, the paper's own figure."""
    lines = ["| file | paper | idea | lines | the paper's figure |", "|---|---|---|---|---|"]
    for path in sorted((ROOT / "methods").glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())).splitlines()
        text = " ".join(doc[1:])  # the list of authors may take more than one line
        year, link = re.search(r"\b(?:19|20)\d\d\b", text)[0], re.search(r"https://arxiv\.org/\S+", text)[0]
        idea, figure = FACTS.get(path.stem, ("", ""))
        lines.append(f"| [{path.name}](methods/{path.name}) | [{doc[0].split(':')[0]}]({link}), {year} | {idea} | "
                     f"{len(path.read_text().splitlines())} | {figure} |")
    return lines


def result_table(rows, data):
    """The measured figures on one data set, accuracies in percent, beside raw pixels and the untrained networks."""
    runs = [e for e in entries(rows) if e[0]["settings"]["data"] == data]
    retrieval = any("retrieval1" in e[0]["evaluation"] for e in runs)
    heads = {"knn20": "kNN, k = 20", "knn200": "kNN, k = 200", "linear": "linear"}
    heads |= {"retrieval1": "retrieval R@1", "retrieval5": "R@5"} if retrieval else {}
    heads |= {"rankme": "RankMe"}
    before = {"knn20": "untrained kNN, k = 20", "linear": "untrained linear"}
    before |= {"retrieval1": "untrained R@1"} if retrieval else {}
    before |= {"rankme": "untrained RankMe"}
    heading = ["features", *heads.values(), *before.values(), "epochs × batch, runs", "training time", "hardware", "commit"]
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    if runs:
        figures = [spread(runs[0][:1], "pixels", k) for k in heads] + [""] * (len(before) + 4)
        lines.append("| raw pixels | " + " | ".join(figures) + " |")
    for e in sorted(runs, key=lambda e: -statistics.mean(run["evaluation"]["linear"] for run in e)):
        s, devices = e[0]["settings"], by_device(e)
        commits = ", ".join(sorted({str(run["commit"])[:8] for run in e}))
        figures = [spread(e, "evaluation", k) for k in heads] + [spread(e, "random_init", k) for k in before]
        lines.append(f"| {label(e[0])} | " + " | ".join(figures) + f" | {s['epochs']} × {s['batch']}, {len(e)} | "
                     f"{', '.join(f'{seconds(runs):.0f} s' for runs in devices.values())} | {'; '.join(devices)} | {commits} |")
    done = {e[0]["method"] for e in runs}
    for path in sorted((ROOT / "methods").glob("*.py")):
        if path.stem not in done:
            lines.append(f"| {path.stem} | " + "not run | " * len(heads) + "| " * (len(before) + 3) + "|")
    return lines


def quick_start(rows):
    """What the default command prints at its end, from the last recorded run with seed 0."""
    runs = [r for r in rows if r["method"] == "simclr" and r["settings"]["data"] == "emoji" and r["settings"]["seed"] == 0]
    return ["```", *table(runs[-1], "simclr").splitlines(), "```"] if runs else ["not run"]


def kernel_table():
    """What kernels/bench.py has measured; for GPUs only a line as long as there is nothing."""
    rows = bench.read(bench.RESULTS)
    return bench.table(rows, bench.GPU_CASES if any(row["type"] == "cuda" for row in rows) else ()).splitlines()


def readme(rows):
    """README's text with every block between <!-- NAME --> and <!-- /NAME --> made anew."""
    blocks = {"quickstart": quick_start(rows), "methods": method_table(), "emoji": result_table(rows, "emoji"),
              "fashion": result_table(rows, "fashion"), "kernels": kernel_table()}
    text = README.read_text()
    for name, lines in blocks.items():
        text, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                              lambda m: m[1] + "\n".join(["", *lines, "", ""]) + m[2], text, flags=re.S)
        if count != 1:
            sys.exit(f"error: README.md must hold one block <!-- {name} --> ... <!-- /{name} -->")
    return text


def draw(rows, path):
    """kNN accuracy against training time on emoji: a line a method at its defaults, the mean of its runs on the fastest device;
    thin lines are the runs themselves."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    figure = Figure((9, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="training time, s (hardware: see the table)", ylabel="kNN accuracy, % (k = 20)",
             title="emoji, from scratch")
    runs = [e for e in entries(rows) if e[0]["settings"]["data"] == "emoji" and is_default(e[0])]
    for e, color in zip(runs, map(colormaps["tab20"], range(20))):
        curves = [run["curve"] for run in next(iter(by_device(e).values()))]
        for curve in curves:
            axes.plot(*zip(*curve), color=color, alpha=0.3, linewidth=0.8)
        mean = [(statistics.mean(p[0] for p in points), statistics.mean(p[1] for p in points)) for points in zip(*curves)]
        name = f"{e[0]['method']}, {e[0]['settings']['epochs']} epochs"
        axes.plot(*zip(*mean), color=color, marker="o", markersize=3, label=name)
    if runs:
        axes.axhline(runs[0][0]["pixels"]["knn20"], color="gray", linestyle="--", label="raw pixels")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the lines, which may end anywhere
    figure.savefig(path)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("add", nargs="*", help="the word add, then the folders of finished runs to record")
    p.add_argument("--check", action="store_true", help="change nothing; fail if README's tables are not those of the rows")
    args = p.parse_args()
    if args.add and (args.add[0] != "add" or len(args.add) < 2):
        sys.exit("error: give nothing, or the word add and the folders of finished runs")
    if args.add:
        add([Path(folder) for folder in args.add[1:]])
    text = readme(read_rows())
    if args.check:
        sys.exit(None if text == README.read_text() else "error: README.md differs from the rows: run tests/results/report.py")
    README.write_text(text)
    draw(read_rows(), HERE / "knn.png")


if __name__ == "__main__":
    main()
