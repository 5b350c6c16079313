"""Keeps the recorded results and writes what is shown of them, so that no number is typed by hand.

    python tests/results/report.py add runs/simclr-emoji-0 ...    records finished runs
    python tests/results/report.py add runs/eval_features ...     and what evaluations found
    python tests/results/report.py                                writes what is shown of the rows
    python tests/results/report.py --check                        fails if it differs from the rows

rows.jsonl has one row per run, as metrics.jsonl of its folder has it: command, commit, versions,
device, settings, training seconds, the evaluation beside its two baselines, and kNN accuracy over
time. Rows with the same settings, whatever the seed, form one entry. evaluations.jsonl holds what
the eval_*.py scripts measured of runs (see evaluations.py). From the rows are made: the tables of
README.md and of tests/results/README.md, the line "Reached." in the docstring of each method and
the minutes of its first command, and the pictures knn.png, years.png, plane.png, layers.png and
instability.png. A recorded run also leaves a picture of what its network is shown, views/NAME.png;
SimCLR's default run the picture at the top of README.md, neighbours.png; a run of DrLIM in the
plane drlim_points.png; that of video_colorization coloured.png; the folder of eval_video.py
masks.png.
"""

import argparse
import ast
import importlib
import json
import re
import statistics
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
import evaluations
import sentences

import common
from kernels import bench

ROWS = HERE / "rows.jsonl"
PAGES = dict.fromkeys(  # pages with blocks, and the root of their paths
    ("README.md", "tests/results/README.md", "tests/results/EVALUATIONS.md"), ROOT
)
TASKS = ("position", "colour", "exemplar", "motion")  # of multitask
PRETEXT = (  # of held-out clips
    "held_out",
    *[f"held_out_{task}" for task in TASKS],
    "control",
    "most_frequent",
    "same_place",
    "masks",
    "masks_stay",
    "masks_raw",
)
FREE = {"data", "arch", "batch", "epochs", "seed", "eval_every"}  # have columns, or change nothing
FILMS = evaluations.FILMS
FAMILIES = {  # family -> {file: (the idea in a few words, the paper's own number)}
    "Pretext tasks": {
        "exemplar": (
            "every patch is a class, of which the network sees transformed copies",
            "74.2 % STL-10, large network, linear SVM",
        ),
        "context_prediction": (
            "where does the second patch lie, seen from the first?",
            "65.3 % mAP VOC 2007 classification, AlexNet",
        ),
        "context_encoder": (
            "paint the part of the image that was cut out",
            "56.5 % mAP VOC 2007 classification, AlexNet",
        ),
        "rotnet": (
            "by which of four angles was the image turned?",
            "91.2 % CIFAR-10, NIN, conv classifier on block 2",
        ),
        "jigsaw": (
            "in which order were the nine tiles shuffled?",
            "67.6 % mAP VOC 2007 classification, AlexNet",
        ),
        "colorization": (
            "what colours does this grey image have?",
            "65.6 % mAP VOC 2007 classification, AlexNet",
        ),
        "color_proxy": (
            "hue and chroma at a few places of a grey image",
            "65.9 % mAP VOC 2007 classification, AlexNet",
        ),
        "split_brain": (
            "one half predicts the colours from the lightness, the other half the reverse",
            "67.1 % mAP VOC 2007 classification, AlexNet",
        ),
        "aet": (
            "by which transformation does one image become the other?",
            "92.2 % CIFAR-10, NIN, conv classifier",
        ),
        "counting": (
            "what the quarters of an image hold adds up to what the whole holds",
            "67.7 % mAP VOC 2007 classification, AlexNet",
        ),
        "nat": (
            "every image gets a random point as its target; they may exchange",
            "65.3 % mAP VOC 2007 classification, AlexNet",
        ),
        "magic_init": (
            "no training: first weights that suit the data",
            "56.6 % mAP VOC 2007 classification, AlexNet",
        ),
    },
    "Metric learning": {
        "drlim": (
            "two views attract like springs, others repel within a margin",
            "a map of digits and camera positions; no accuracy is given",
        ),
        "triplet": (
            "a view is nearer to its partner than to another image, by a margin",
            "99.63 % LFW face verification, with labels",
        ),
        "lifted_structure": (
            "each pair of partners against all other images of the batch",
            "62.1 % R@1 Stanford Online Products, with labels",
        ),
        "n_pair": (
            "one partner among N, by inner products and a softmax",
            "67.7 % R@1 Stanford Online Products, with labels",
        ),
    },
    "Contrastive": {
        "cpc": (
            "rows of patches predict the rows below, among all patches of the batch",
            "48.7 % ImageNet linear, ResNet-101",
        ),
        "instance_discrimination": (
            "every image is a class; a memory bank keeps an embedding of each",
            "54.0 % ImageNet linear, ResNet-50",
        ),
        "alignment_uniformity": (
            "views of an image lie together, all images spread over the sphere",
            "67.7 % ImageNet linear, ResNet-50, MoCo's setting",
        ),
        "pirl": (
            "a puzzle has the embedding that a memory bank keeps of its image",
            "63.6 % ImageNet linear, ResNet-50, 800 epochs",
        ),
        "simclr": (
            "two views of an image attract, other images repel",
            "69.3 % ImageNet linear, ResNet-50, 1000 epochs",
        ),
        "moco": (
            "find the matching key in a queue of thousands",
            "71.1 % ImageNet linear, ResNet-50, v2, 800 epochs",
        ),
        "moco_v3": (
            "find the matching key in the batch, without a queue",
            "76.7 % ImageNet linear, ViT-B, 300 epochs",
        ),
    },
    "Clustering and decorrelation": {
        "swav": (
            "predict the cluster of another view; clusters equally filled",
            "75.3 % ImageNet linear, ResNet-50, 800 epochs",
        ),
        "barlow_twins": (
            "each dimension agrees between views; different ones are uncorrelated",
            "73.2 % ImageNet linear, ResNet-50, 1000 epochs",
        ),
    },
    "Distillation": {
        "byol": (
            "predict the output of a slowly moving average of itself",
            "74.3 % ImageNet linear, ResNet-50, 1000 epochs",
        ),
        "simsiam": (
            "predict the output for the other view, which gets no gradient",
            "71.3 % ImageNet linear, ResNet-50, 800 epochs",
        ),
        "dino": (
            "a student matches its own moving average across crops",
            "77.0 % ImageNet linear, ViT-S/16, 800 epochs",
        ),
    },
    "Masked images": {
        "mae": (
            "paint the three quarters of the patches that are hidden",
            "73.5 % ImageNet linear, ViT-L, 800 epochs",
        ),
    },
    "Video": {
        "shuffle_and_learn": (
            "were these three frames filmed in this order?",
            "50.2 % UCF101, 18.1 % HMDB51, fine-tuned",
        ),
        "odd_one_out": (
            "in which of six pieces of a video were the frames shuffled?",
            "60.3 % UCF101, fine-tuned",
        ),
        "arrow_of_time": (
            "does the video run forwards or backwards?",
            "86.3 % UCF101 from optical flow, fine-tuned",
        ),
        "egomotion": (
            "how did the camera move between two frames?",
            "54.2 % mAP VOC 2007 classification, 20,000 images",
        ),
        "tracking_triplet": (
            "a tracked patch resembles itself, frames later, more than other patches",
            "47.4 % mAP VOC 2007 detection, AlexNet",
        ),
        "video_colorization": (
            "which place of an earlier frame has the colour of this one?",
            "34.6 J, 32.7 F on DAVIS 2017",
        ),
        "watching_objects_move": (
            "which pixels of a still frame would move?",
            "52.2 % mAP VOC 2007 detection, AlexNet",
        ),
        "multitask": (
            "four pretext tasks at once, one shared trunk",
            "69.3 % top-5 ImageNet linear, ResNet-101",
        ),
    },
}


# For years.png: how many epochs each method is trained, and the seconds of one epoch on one core of
# an AMD EPYC with AVX-512 (tests/bench_steps.py, one thread, nothing else running). Together about
# four minutes; the default itself where it is near.
BUDGET = {
    "drlim": (30, 7.9),
    "triplet": (30, 8.5),
    "lifted_structure": (30, 8.2),
    "n_pair": (33, 7.3),
    "cpc": (5, 46.3),
    "instance_discrimination": (70, 3.7),
    "alignment_uniformity": (36, 7.1),
    "pirl": (17, 13.8),
    "simclr": (30, 7.4),
    "moco": (36, 6.8),
    "moco_v3": (26, 9.4),
    "swav": (18, 13.4),
    "barlow_twins": (29, 8.2),
    "byol": (18, 13.3),
    "simsiam": (25, 9.5),
    "dino": (17, 13.8),
}

# Mean average precision, %, on PASCAL VOC 2007 classification of AlexNets all of whose layers were
# fine-tuned, as the paper of RotNet lists them. 79.9 with ImageNet's labels, 53.3 untrained.
VOC = {
    "magic_init": 56.6,
    "context_encoder": 56.5,
    "context_prediction": 65.3,
    "nat": 65.3,
    "colorization": 65.6,
    "color_proxy": 65.9,
    "split_brain": 67.1,
    "jigsaw": 67.6,
    "counting": 67.7,
    "rotnet": 73.0,
}

# What the accuracies of the video methods on their own questions stand beside, in percent:
# guessing, and on some films a rule without a network. The docstrings of the files have the rules,
# their tests measure them.
GUESSES = {
    "shuffle_and_learn": 50,
    "odd_one_out": 100 / 6,
    "arrow_of_time": 50,
    "egomotion": 100 / 7,
    "tracking_triplet": 50,
}
RULES = {
    ("shuffle_and_learn", "movers"): "93, the middle frame is between the others",
    ("shuffle_and_learn", "tripod"): "75, the middle frame is between the others",
    ("odd_one_out", "movers"): "78, the steepest edges",
    ("odd_one_out", "tripod"): "40, the steepest edges",
    ("arrow_of_time", "movers"): "75, larger differences come first",
    ("arrow_of_time", "tripod"): "87, larger differences come first",
    ("watching_objects_move", "movers"): "19, a square in the middle",
    ("multitask", "movers"): "position 12.5 by guessing; colour 40, grey; exemplar 50 by guessing; "
    "motion 8, everything moves",
}

PICTURES = {  # that may not exist yet -> what they show
    "masks.png": "The mask of the first frame copied to later ones by the features of each network",
    "coloured.png": "Grey frames of videos with colours copied from earlier frames",
    "drlim_points.png": "Test images of Fashion-MNIST as points in the plane",
    "instability.png": "kNN accuracy and gradients of MoCo v3 with a ViT over the epochs",
}


# -------- Rows ------------------------------------------------------------------------------------


def read_rows():
    return common.read_lines(ROWS)


def add(folders):
    """Appends the finished runs in these folders, and the results of eval_*.py scripts. A run that
    was recorded before with the same settings, on the same device, is replaced."""
    rows = read_rows()
    for folder in folders:
        if (folder / "results.jsonl").exists():
            evaluations.add(folder / "results.jsonl", variant)
            if (folder / "masks").exists():
                draw_masks(folder / "masks", HERE / "masks.png")
            continue
        lines = common.read_lines(folder / "metrics.jsonl")
        if not lines or "evaluation" not in lines[-1]:
            common.fail(f"{folder} holds no finished run: run its command again to complete it")
        first, last = lines[0], lines[-1]
        curve = [[0, last["random_init"]["knn20"]]]
        curve += [[line["seconds"], line["knn20"]] for line in lines if "knn20" in line]
        curve.append([last["train_seconds"], last["evaluation"]["knn20"]])
        row = {**first, **last, "curve": curve}
        gradients = [line["first_gradient"] for line in lines if "first_gradient" in line]
        if gradients:
            row["first_gradient"] = peaks(gradients)
        for line in lines:
            if "bank_knn" in line:
                row["bank_knn"] = line["bank_knn"]
            if any(name in line for name in PRETEXT):
                row["pretext"] = {name: line[name] for name in PRETEXT if name in line}
        same = ("method", "settings", "world_size", "device")
        rows = [r for r in rows if any(r[key] != row[key] for key in same)] + [row]
        keep_pictures(folder, row)

    def place(row):
        settings = row["settings"]
        return row["method"], settings["data"], settings["epochs"], settings["seed"]

    rows.sort(key=place)
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def peaks(values, pieces=200):
    """The largest of each of the pieces of a long list, in four digits."""
    parts = np.array_split(values, min(pieces, len(values)))
    return [float(f"{max(part):.4g}") for part in parts]


def entries(rows):
    """[[row of each run], ...]: runs that differ by nothing but the seed, the device, and how often
    they were looked at."""
    groups = {}
    for row in rows:
        free = ("seed", "eval_every")
        settings = {name: v for name, v in row["settings"].items() if name not in free}
        key = row["method"], json.dumps(settings, sort_keys=True)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def by_device(runs):
    """{device: its runs}, the fastest first."""
    devices = {}
    for run in runs:
        devices.setdefault(run["device"], []).append(run)
    return dict(sorted(devices.items(), key=lambda item: seconds(item[1])))


ONE_CORE = " 1 threads"  # how such a device ends; other programs used the machine as well


def seconds(runs):
    """Training seconds of runs on one device: their mean; on one core, where other programs slow
    each run as they please, the least."""
    found = [run["train_seconds"] for run in runs]
    return min(found) if runs[0]["device"].endswith(ONE_CORE) else statistics.mean(found)


def fastest(runs):
    """Training seconds on the fastest device."""
    return seconds(next(iter(by_device(runs).values())))


def on_one_core(runs):
    """Whether the fastest device was one core."""
    return next(iter(by_device(runs))).endswith(ONE_CORE)


def minutes(runs):
    return f"{fastest(runs) / 60:.1f}" + (" (one core)" if on_one_core(runs) else "")


def defaults(method):
    """{setting: today's default} of a method's first column."""
    settings = importlib.import_module(f"methods.{method}").SETTINGS
    return {name: row[0] for name, row in settings.items() if name != "recipe"}


def home(method):
    """The data set that a method's defaults learn from."""
    return importlib.import_module(f"methods.{method}").SETTINGS["recipe"][0]


def is_default(row, **other):
    """Whether the run had today's defaults, but for `other` settings, on whatever data."""
    free = {"data", "eval_every", "seed"}
    wanted = defaults(row["method"]) | other
    return all(row["settings"].get(name) == v for name, v in wanted.items() if name not in free)


def chosen(rows, method, **other):
    """The runs of a method on its own data, at its defaults but for `other` settings."""
    rows = [row for row in rows if row["method"] == method]
    rows = [row for row in rows if row["settings"]["data"] == home(method)]
    return [row for row in rows if is_default(row, **other)]


def changed(row, free=FREE):
    """The flags that are not today's defaults, like "--optimizer lars", without those that have
    columns of their own or change no result."""
    flags = []
    settings = row["settings"]
    for name, default in sorted(defaults(row["method"]).items()):
        value = settings.get(name, default)
        counts = name == "stage" and settings.get("target") == "mid"  # BYOL: shown in any case
        if name in free or value == default and not counts:
            continue
        flag = common.flag_of(name)
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags.append(f"{flag} {value}")
    return " ".join(flags)


def variant(method, settings):
    """All flags by which a run differs from the default run of a method, but for the seed."""
    flags = changed({"method": method, "settings": settings}, free=("seed", "eval_every"))
    if settings.get("rescaled"):  # by methods/magic_init.py --run
        flags = f"{flags} rescaled".strip()
    data = settings.get("data", home(method))
    return flags if data == home(method) else f"--data {data} {flags}".strip()


def is_supervised(row):
    """Whether labels, or what an image draws, decided which images are similar."""
    return row["settings"].get("positives", "views") != "views"


def with_labels(rows, data="emoji"):
    """{(method, kind of positives): its longest runs}, of the supervised runs."""
    rows = [row for row in rows if is_supervised(row) and row["settings"]["data"] == data]
    found = {}
    for runs in sorted(entries(rows), key=lambda runs: runs[0]["settings"]["epochs"]):
        found[runs[0]["method"], runs[0]["settings"]["positives"]] = runs
    return found


def title(row):
    """The name of a run in a table, with its flags."""
    flags = changed(row)
    name = f"**{row['method']}**" + (f" `{flags}`" if flags else "")
    return name + (" (with labels)" if is_supervised(row) else "")


# -------- Pictures --------------------------------------------------------------------------------


def keep_pictures(folder, row):
    """Of default runs with seed 0: views/NAME.png, what the network is shown; of SimCLR
    neighbours.png, and of video_colorization coloured.png. Of DrLIM in the plane drlim_points.png.
    """
    method = row["method"]
    settings = row["settings"]
    if settings["seed"] != 0 or is_supervised(row):
        return
    if method == "drlim" and settings["dim"] == 2:
        save_small(Image.open(folder / "points.png"), HERE / "drlim_points.png")
    if not is_default(row) or settings["data"] != home(method):
        return
    if method == "magic_init":
        picture = some_filters(folder)
    else:
        picture = some_rows(folder / "views.png", 2)
    (HERE / "views").mkdir(exist_ok=True)
    save_small(picture, HERE / "views" / f"{method}.png", width=420)
    if method == "simclr":
        draw_neighbours(folder, HERE / "neighbours.png")
    if method == "video_colorization":
        save_small(some_rows(folder / "coloured.png", 4), HERE / "coloured.png")


def some_rows(path, rows):
    """The headings and the first rows of a picture by common.save_grid."""
    picture = Image.open(path).convert("RGB")
    picture = picture.crop((0, 0, picture.width, 26 + rows * 72))  # 26 above, 72 per row
    right = ImageOps.invert(picture).getbbox()[2]  # the note below may be wider than the images
    return picture.crop((0, 0, min(right + 8, picture.width), picture.height))


def save_small(picture, path, width=900):
    """Saves a picture, at most as wide as that, with few colours."""
    picture = picture.convert("RGB")
    if picture.width > width:
        height = round(picture.height * width / picture.width)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    picture.quantize(128).save(path, optimize=True)


def draw_masks(folder, path):
    """Of the masks that eval_video.py keeps those of one clip, for baselines and three methods."""
    from methods import eval_video

    baselines = ("no network", "raw pixels, 32 px", "untrained resnet14, 32 px")
    methods = ("shuffle_and_learn", "watching_objects_move", "video_colorization")
    names = dict(zip(baselines, baselines)) | {m: f"{m}-{home(m)}-0" for m in methods}
    found = {}
    for name, start in names.items():
        for file in folder.glob(f"{start}, *.npy"):
            found[name] = torch.from_numpy(np.load(file))
    counts = [eval_video.SETTINGS[name][0] for name in ("test_clips", "mask_clips")]
    clips = eval_video.visible(eval_video.film_of("movers", "test", counts[0]), counts[1])
    eval_video.draw_masks(path, found, clips.part(slice(1)))
    picture = Image.open(path)
    picture = picture.crop((0, 24, *picture.size))  # without the title, which is wider
    save_small(picture, path, width=700)


def some_filters(folder, names=("He", "PCA", "k-means")):
    """The first filters of each kind in Magic init's filters.png, named."""
    filters = Image.open(folder / "filters.png").convert("RGB")
    width = 4 * 72 + 24
    picture = Image.new("RGB", (width + 64, len(names) * 72), "white")
    picture.paste(filters.crop((0, 22, width, 22 + picture.height)), (64, 0))
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(names):
        draw.text((4, 36 + 72 * i), name, "black", ImageFont.load_default(size=13), anchor="lm")
    return picture


@torch.no_grad()
def draw_neighbours(folder, path, queries=8, shown=5):
    """The same test images, each with its nearest drawings by other artists, as raw pixels, the
    untrained network and the trained one find them."""
    from matplotlib.figure import Figure

    device = torch.device("cpu")
    trained = common.load_backbone(folder)
    torch.manual_seed(0)
    untrained = common.new_backbone(trained.method, trained.arch, trained.size)
    split = common.load_data(trained.data, "data", device).test
    networks = {
        "raw pixels": common.pixels(trained.size),
        "the same network, untrained": untrained.to(memory_format=torch.channels_last),
        "after SimCLR": trained,
    }

    figure = Figure((11, 5.2), dpi=100)
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.89, bottom=0.06, wspace=0.05)
    sample = torch.from_numpy(common.np.random.default_rng(1).permutation(len(split.labels)))
    for panel, (name, network) in zip(panels, networks.items()):
        x, _ = common.features(network, split, trained.size, device)
        nearest = common.across_drawings(x, split.drawing, shown)
        found = common.retrieval(x, split.emoji, split.drawing, shown)
        grid = torch.cat([sample[:queries, None], nearest[sample[:queries]]], 1)
        draw_grid(panel, split, grid)
        found = f"the same emoji among the nearest {shown}: {found:.1f} %"
        panel.set_title(f"{name}\n{found}", fontsize=10)
    text = "test images, each with its nearest drawings by other artists; green: the same emoji"
    figure.supxlabel(text, fontsize=10)
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def draw_grid(axes, split, grid):
    """Images at the places grid (rows, columns), the first column apart; green frames for the same
    emoji as in the first column."""
    axes.axis("off")
    rows, columns = grid.shape
    axes.set(xlim=(-0.1, columns + 0.3), ylim=(rows, -0.1))
    for r in range(rows):
        for c in range(columns):
            x = c + (0.2 if c else 0)
            image = split.images.pixels[grid[r, c]].permute(1, 2, 0).numpy()
            axes.imshow(image, extent=(x + 0.06, x + 0.94, r + 0.94, r + 0.06))
            if c and split.emoji[grid[r, c]] == split.emoji[grid[r, 0]]:
                frame = {"fill": False, "edgecolor": "green", "linewidth": 2.5}
                axes.add_patch(rectangle(x + 0.02, r + 0.02, **frame))


def rectangle(x, y, **style):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 0.96, 0.96, **style)


def draw_curves(rows, path):
    """kNN accuracy against training time on emoji: for each method at its defaults the mean of its
    runs on the fastest device, labelled at its end; dashed if that was one busy core."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure((10, 7), dpi=100)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.07, right=0.8, top=0.94, bottom=0.08)
    axes.set(
        xlabel="training time, seconds on two CPU cores; dashed: on one busy core",
        ylabel="kNN accuracy, % (k = 20)",
        title="emoji, from scratch, at the defaults of each file",
    )
    ends = []
    best = headline(rows)
    for i, (method, e) in enumerate(best.items()):
        color = colormaps["tab20"](2 * i % 20 + i // 10 % 2)
        points = mean_curve([run["curve"] for run in next(iter(by_device(e).values()))])
        shorter = fastest(e) / points[-1][0]  # the seconds that the tables have
        points = [(time * shorter, height) for time, height in points]
        style = "--" if on_one_core(e) else "-"
        axes.plot(*zip(*points), style, color=color, linewidth=1.6, marker="o", markersize=3)
        ends.append((*points[-1], method, color))
    if best:
        pixels = mean(next(iter(best.values())), "pixels", "knn20")
        axes.axhline(pixels, color="gray", linestyle=":")
        axes.text(axes.get_xlim()[1], pixels, "raw pixels ", color="gray", ha="right", va="bottom")
    name_points(axes, ends)
    figure.savefig(path)


def mean_curve(curves):
    """The mean of curves [[seconds, accuracy], ...], which may have been measured at other times:
    at equal shares of their training, those of the curve with the most points."""
    longest = max(curves, key=len)
    shares = np.array([time for time, _ in longest]) / longest[-1][0]
    times = np.mean([shares * curve[-1][0] for curve in curves], axis=0)
    heights = [np.interp(shares * curve[-1][0], *zip(*curve)) for curve in curves]
    return list(zip(times.tolist(), np.mean(heights, axis=0).tolist()))


def name_points(axes, points):
    """Writes the names of points beside the axes, evenly spaced and in the order of their heights,
    each with a thin line to its point. points: [(x, y, name, color), ...]."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    space = 0.03 * (right - left)
    for rank, (x, y, name, color) in enumerate(sorted(points, key=lambda point: point[1])):
        height = low + (high - low) * (rank + 0.5) / len(points)
        line = [x, right, right + space], [y, height, height]
        axes.plot(*line, color=color, linewidth=0.5, alpha=0.6, clip_on=False)
        axes.text(right + 1.3 * space, height, name, color=color, va="center", fontsize=9)
    axes.set(xlim=(left, right), ylim=(low, high))


COMPARE_VIEWS = ("Metric learning", "Contrastive", "Clustering and decorrelation", "Distillation")


def equal_budget(rows):
    """{method: its runs that were trained as long as BUDGET says}; {} if a method has none."""
    found = {method: chosen(rows, method, epochs=epochs) for method, (epochs, _) in BUDGET.items()}
    return found if all(found.values()) else {}


def is_usual(row):
    """Whether the network is that of most: a ResNet-14 that sees whole images of 32 pixels."""
    return (row["settings"]["arch"], row["settings"]["size"]) == ("resnet14", 32)


def draw_years(rows, path):
    """Linear accuracy on emoji of the methods that compare views, in the order of their papers: the
    mean of the runs, and their spread. Trained for four minutes each as soon as there are such
    runs of all, until then at the defaults. Hollow: with labels, as many epochs. Lines: raw pixels
    and the untrained network that most have; of another network these are short marks."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    equal = equal_budget(rows)
    best = equal or headline(rows)
    families = {m: family for family in COMPARE_VIEWS for m in FAMILIES[family]}
    methods = sorted([m for m in families if m in best], key=when)
    missing = [m for m in families if m not in best]
    epochs = {method: best[method][0]["settings"]["epochs"] for method in methods}
    labelled = [r for r in rows if r["settings"]["epochs"] == epochs.get(r["method"])]

    figure = Figure((9, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel("linear accuracy, %")
    budget = "four minutes of training on one core" if equal else "at the defaults of each file"
    axes.set_title(f"emoji, from scratch, {budget}")
    if missing:
        axes.set_xlabel("\n".join(textwrap.wrap(f"not run: {', '.join(missing)}", 90)), fontsize=8)

    def draw(place, runs, **style):
        values = [run["evaluation"]["linear"] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else 0
        color = colormaps["tab10"](COMPARE_VIEWS.index(families[runs[0]["method"]]))
        axes.errorbar(place, statistics.mean(values), deviation, color=color, capsize=3, **style)

    for place, method in enumerate(methods):
        draw(place, best[method], fmt="o")
    markers = {"labels": "o", "drawings": "s"}
    kinds = {}  # kind of positives -> how far to the right
    for (method, kind), runs in with_labels(labelled).items():
        shift = kinds.setdefault(kind, 0.2 * (len(kinds) + 1))
        draw(methods.index(method) + shift, runs, fmt=markers[kind], markerfacecolor="white")
    names = [f"{about(method)[1]} {method}" for method in methods]
    axes.set_xticks(range(len(methods)), names, rotation=35, ha="right")

    for number, family in enumerate(COMPARE_VIEWS):
        axes.plot([], [], "o", color=colormaps["tab10"](number), label=family)
    for kind in kinds:
        style = {"color": "black", "markerfacecolor": "white", "label": f"with {kind}"}
        axes.plot([], [], markers[kind], **style)
    usual = [run for method in methods for run in best[method] if is_usual(run)]
    for part, style, name in (("pixels", "--", "raw pixels"), ("random_init", ":", "untrained")):
        axes.axhline(mean(usual, part, "linear"), color="gray", linestyle=style, label=name)
        for place, method in enumerate(methods):
            if not is_usual(best[method][0]):
                height = mean(best[method], part, "linear")
                axes.hlines(height, place - 0.3, place + 0.3, color="gray", linestyle=style)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def draw_plane(rows, path):
    """Alignment against uniformity of the features of the methods that compare views, on emoji:
    large and with names at their defaults, small with other settings, hollow with labels. Colour:
    linear accuracy."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    best = headline(rows)
    methods = [m for family in COMPARE_VIEWS for m in FAMILIES[family] if m in best]
    usual = [run for method in methods for run in best[method]]
    other = [row for row in rows if row["method"] in methods and row not in usual]
    other = [row for row in other if row["settings"]["data"] == "emoji"]
    groups = {
        "at the defaults": usual,
        "other settings": [row for row in other if not is_supervised(row)],
        "with labels": [row for row in other if is_supervised(row)],
    }

    figure = Figure((10, 5), dpi=100)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.07, right=0.68, top=0.92, bottom=0.11)
    axes.set(
        xlabel="uniformity; further left: images are spread more evenly over the sphere",
        ylabel="alignment; further down: views of an image are nearer",
        title="features of each run on emoji, and of the same networks untrained",
    )

    def places(runs, part):
        return [[run[part][key] for run in runs] for key in ("uniformity", "alignment")]

    for part, marker, name in (("pixels", "x", "raw pixels"), ("random_init", "+", "untrained")):
        axes.plot(*places(usual, part), "k" + marker, label=name)
    linear = [row["evaluation"]["linear"] for row in usual + other]
    scale = ScalarMappable(Normalize(min(linear), max(linear)), "viridis")
    for name, runs in groups.items():
        if not runs:
            continue
        colors = scale.to_rgba([run["evaluation"]["linear"] for run in runs])
        style = {"s": 10 if name == "other settings" else 30, "edgecolors": colors, "label": name}
        style["facecolors"] = "none" if name == "with labels" else colors
        axes.scatter(*places(runs, "evaluation"), **style)
    figure.colorbar(scale, figure.add_axes((0.9, 0.11, 0.02, 0.81)), label="linear accuracy, %")
    means = [map(statistics.mean, places(best[method], "evaluation")) for method in methods]
    name_points(axes, [(*point, method, "black") for point, method in zip(means, methods)])
    axes.legend(loc="lower left", fontsize=9, ncols=2)
    figure.savefig(path)


def draw_layers(path):
    """Linear accuracy after each stage of a ResNet, of all methods that eval_layers.py has measured
    at their defaults, the pretext tasks and the methods that compare views; their mean, and that of
    the same networks untrained."""
    from matplotlib.figure import Figure

    stages = evaluations.LAYERS
    rows = evaluations.rows_of("features", evaluations.read_rows(), FAMILIES["Video"])
    networks = evaluations.collect(rows)
    found = evaluations.stage_accuracies(networks)
    found = {name: line for name, line in found.items() if len(line) == len(stages)}
    figure = Figure((13, 5.5), dpi=90)
    panels = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.05, right=0.86, top=0.93, bottom=0.11, wspace=0.42)
    panels[0].set_ylabel("linear accuracy, %")
    drawn = [f"**{method}**" for methods in sides().values() for method in methods]
    drawn = [name for name in (*drawn, sentences.UNTRAINED) if name in found]
    before = sentences.untrained_stages(networks, found)
    heights = [height for name in drawn for height in found[name]]
    panels[0].set_ylim(min(heights) - 0.5, max(heights) + 1.5)  # room for the legend
    for axes, (heading, methods) in zip(panels, sides().items()):
        axes.set_title(f"{heading[0].upper()}{heading[1:]}, emoji", fontsize=11)
        axes.set_xlabel("after stage, averaged to about 800 features")
        axes.tick_params(labelleft=True)
        names = [f"**{method}**" for method in methods if f"**{method}**" in found]
        ends = []
        for name in names:
            axes.plot(stages, found[name], color="0.75", linewidth=1)
            ends.append((len(stages) - 1, found[name][-1], name.strip("*"), "0.45"))
        groups = (
            ("trained, mean", found, "tab:blue", "o-"),
            ("the same networks untrained, mean", before, "black", "s--"),
        )
        for label, lines, color, style in groups:
            means = [statistics.mean(column) for column in zip(*[lines[n] for n in names])]
            axes.plot(stages, means, style, color=color, linewidth=2, markersize=5, label=label)
        axes.legend(loc="upper right", fontsize=9)
        name_points(axes, ends)
    figure.savefig(path)


def sides():
    """{kind of methods: those methods}, which the literature compares by depth."""
    return {
        "pretext tasks": FAMILIES["Pretext tasks"],
        "methods that compare views": [m for family in COMPARE_VIEWS for m in FAMILIES[family]],
    }


def draw_instability(rows, path):
    """MoCo v3 with a ViT whose patch projection is frozen or trained: kNN accuracy over the epochs,
    and the largest gradient of the projection in each piece of the training. Only if there are
    runs of both kinds."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["method"] == "moco_v3"]
    rows = [row for row in rows if row["settings"]["arch"] == "vit_micro"]
    if len({row["settings"]["train_patches"] for row in rows}) < 2:
        return
    figure = Figure((9, 5.5), dpi=90, layout="constrained")
    accuracy, gradient = figure.subplots(2, 1, sharex=True)
    accuracy.set(ylabel="kNN accuracy, % (k = 20)", title="MoCo v3, vit_micro, emoji")
    gradient.set(xlabel="epoch", ylabel="largest gradient\nof the patch projection", yscale="log")
    names = {False: "frozen patch projection", True: "trained patch projection"}
    for row in rows:
        settings = row["settings"]
        epochs = settings["epochs"]
        trained = settings["train_patches"]
        style = {"color": "tab:red" if trained else "tab:blue", "linewidth": 1.2}
        heights = [height for _, height in row["curve"]]
        times = [min(i * settings["eval_every"], epochs) for i in range(len(heights))]
        accuracy.plot(times, heights, **style, label=names.pop(trained, None))
        values = row.get("first_gradient", [])
        middles = [(i + 0.5) * epochs / len(values) for i in range(len(values))]
        gradient.plot(middles, values, **style)
    accuracy.legend()
    figure.savefig(path)


# -------- Tables ----------------------------------------------------------------------------------


def spread(runs, part, key):
    """"59.2 ± 0.4" over the runs; without the spread for one run, a dash for none."""
    values = [run[part][key] for run in runs if key in run[part]]
    if not values:
        return "–"
    text = f"{statistics.mean(values):.1f}"
    return text + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def mean(runs, part, key):
    return statistics.mean(run[part][key] for run in runs)


def markdown(heads, lines):
    table = [heads, ["---"] * len(heads), *lines]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in table]


def headline(rows, data="emoji"):
    """{method: its runs at the defaults}, of the methods whose defaults learn from `data`."""
    runs = [e for e in entries(rows) if e[0]["settings"]["data"] == data and is_default(e[0])]
    return {e[0]["method"]: e for e in runs if home(e[0]["method"]) == data}


def at_home(rows):
    """{method: its runs at the defaults}, of all methods."""
    found = headline(rows)
    for film in FILMS:
        found |= headline(rows, film)
    return found


def about(method):
    """Name, year and link of a method's paper, from its docstring."""
    source = (ROOT / "methods" / f"{method}.py").read_text()
    lines = ast.get_docstring(ast.parse(source)).splitlines()
    text = " ".join(lines[1:])  # the list of authors may take more than one line
    year = re.search(r"\b(?:19|20)\d\d\b", text)[0]
    link = re.search(r"https://\S+", text)[0]
    return lines[0].split(":")[0], year, link


def when(method):
    """The year of its paper, then the number of arXiv, which begins with year and month."""
    _, year, link = about(method)
    number = re.search(r"arxiv.org/abs/(\S+)", link)
    return year, number[1] if number else ""


def about_films(files, best):
    """Lines above a table of methods that learn from videos: from which, and how raw pixels do, at
    32 pixels and at the size of each method that has another."""
    parts = []
    for film in FILMS:
        names = [m for m in files if home(m) == film]
        runs = [best[m] for m in names if m in best]
        usual = [some for some in runs if some[0]["settings"]["size"] == 32]
        if usual:
            words = [f"{mean(usual[0], 'pixels', 'linear'):.1f}"]
            for some in runs:
                if some not in usual:
                    pixels = mean(some, "pixels", "linear")
                    words.append(f"at the size of {some[0]['method']} {pixels:.1f}")
            parts.append(f"of `{film}` for {', '.join(names)} (raw pixels {'; '.join(words)})")
    text = "These learn from films. Their accuracy is that of telling what a single frame shows, "
    text += f"{'; '.join(parts)}."
    return [*textwrap.wrap(text, 100), ""] if parts else []


def method_table(rows):
    """One block per family, the oldest paper first: what the network is shown, the file, the idea,
    how far it came."""
    best = at_home(rows)
    lines = []
    for family, files in FAMILIES.items():
        lines += ["", f"**{family}**", ""]
        lines += about_films(files, best)
        cells = []
        for method in sorted(files, key=lambda name: about(name)[1]):
            name, year, link = about(method)
            idea, _ = files[method]
            runs = best.get(method)
            numbers = ["not run", "not run"]
            if runs:
                linear = f"{mean(runs, 'evaluation', 'linear'):.1f}"
                before = f"{mean(runs, 'random_init', 'linear'):.1f}"
                numbers = [f"{linear} ({before})", minutes(runs)]
            picture = f"![{method}](tests/results/views/{method}.png)" if runs else ""
            file = f"[{method}.py](methods/{method}.py)<br>[{name}]({link}), {year}"
            cells.append([picture, file, idea, *numbers])
        heads = ["what the network is shown", "file, paper", "idea"]
        heads += ["linear (untrained)", "minutes"]
        lines += markdown(heads, cells)
    return lines[1:]


def best_stages():
    """{name: the stage of the network that is best for a linear probe of the test images, and its
    accuracy}, as far as eval_layers.py has measured it."""
    rows = evaluations.rows_of("features", evaluations.read_rows(), FAMILIES["Video"])
    networks = evaluations.collect(rows)
    found = {}
    for name in networks:
        heights = {}
        for stage in evaluations.LAYERS:
            heights[stage] = evaluations.mean(networks, name, f"linear probe of {stage}", "linear")
        if None not in heights.values():
            best = max(heights, key=heights.get)
            found[name] = f"{best}: {heights[best]:.1f}"
    return found


def short_table(rows):
    """The defaults on emoji, seven columns, the best linear accuracy first."""
    best = headline(rows)
    ordered = sorted(best.values(), key=lambda runs: -mean(runs, "evaluation", "linear"))
    heads = ["features", "kNN", "linear", "R@1", "best stage", "minutes", "runs"]
    stages = best_stages()
    if not ordered:
        return ["not run"]
    keys = ("knn20", "linear", "retrieval1")
    raw = [spread(ordered[0][:1], "pixels", key) for key in keys]
    lines = [["raw pixels", *raw, "", "", ""]]
    for name, arch in (("untrained resnet14", "resnet14"), ("untrained vit_mini", "vit_mini")):
        plain = ("simclr", "moco", "mae")  # whose networks see the image as it is
        runs = [run for m in plain for run in best.get(m, []) if run["settings"]["arch"] == arch]
        runs = list({run["settings"]["seed"]: run for run in runs}.values())  # one network per seed
        if runs:
            numbers = [spread(runs, "random_init", key) for key in keys]
            stage = stages.get(f"{name}, 32 px", "")
            lines.append([name, *numbers, stage, "", len(runs)])
    for runs in ordered:
        numbers = [spread(runs, "evaluation", key) for key in keys]
        name = f"**{runs[0]['method']}**"
        lines.append([name, *numbers, stages.get(name, ""), minutes(runs), len(runs)])
    missing = [m for files in FAMILIES.values() for m in files if m not in best]
    missing = [m for m in missing if home(m) == "emoji"]
    lines += [[m, *["not run"] * 6] for m in missing]
    labelled = with_labels(rows)
    lines.append(["*with labels:*", *["" if labelled else "not run"] * 6])
    for _, runs in sorted(labelled.items()):
        numbers = [spread(runs, "evaluation", key) for key in keys]
        lines.append([title(runs[0]), *numbers, "", minutes(runs), len(runs)])
    words = (
        "The last lines, with labels, are not self-supervised: for each method and kind of "
        "`--positives` the longest training. They say what labels would give."
    )
    return [*markdown(heads, lines), "", *textwrap.wrap(words, 100)]


def full_table(rows, data):
    """Everything that was measured on one data set, in two tables: the trained networks beside raw
    pixels; and, of the same runs, the untrained networks, the budget and the machines."""
    runs = [e for e in entries(rows) if e[0]["settings"]["data"] == data]
    if not runs:
        return ["not run"]
    runs = sorted(runs, key=lambda e: -mean(e, "evaluation", "linear"))
    heads = {"knn20": "kNN, k = 20", "knn200": "kNN, k = 200", "linear": "linear"}
    if any("retrieval1" in e[0]["evaluation"] for e in runs):
        heads |= {"retrieval1": "R@1", "retrieval5": "R@5"}
    heads |= {"rankme": "RankMe"}
    before = {key: head for key, head in heads.items() if key not in ("knn200", "retrieval5")}

    trained = [["raw pixels", *[spread(runs[0][:1], "pixels", key) for key in heads], "", ""]]
    other = []
    for e in runs:
        settings = e[0]["settings"]
        name = f"{title(e[0])}, {settings['arch']}"
        seeds = sorted(run["settings"]["seed"] for run in e)
        size = f"{settings['epochs']} × {settings['batch']}"
        numbers = [spread(e, "evaluation", key) for key in heads]
        trained.append([name, *numbers, size, ", ".join(str(seed) for seed in seeds)])

        numbers = [spread(e, "random_init", key) for key in before]
        machines = by_device(e).items()
        where = "; ".join(f"{device}: {seconds(runs):.0f} s" for device, runs in machines)
        commits = ", ".join(sorted({str(run["commit"])[:8] for run in e}))
        other.append([name, *numbers, size, where, commits])

    done = {e[0]["method"] for e in runs}
    missing = [m for files in FAMILIES.values() for m in files if m not in done]
    if data in FILMS:
        missing = [m for m in missing if home(m) == data]
    else:
        missing = [m for m in missing if home(m) not in FILMS]
    return [
        *markdown(["features", *heads.values(), "epochs × batch", "seeds"], trained),
        *(["", f"Not run: {', '.join(sorted(missing))}."] if missing else []),
        "",
        "Of the same runs: the network before training, the budget, the seconds of the training.",
        "",
        *markdown(["run", *before.values(), "epochs × batch", "seconds", "commits"], other),
    ]


def cost_table(rows):
    """What the training of each file cost at its defaults, and how fast its network is afterwards.
    """
    speeds = evaluations.collect([r for r in evaluations.read_rows() if r["protocol"] == "cost"])
    lines = []
    for method, runs in at_home(rows).items():
        memory = [run["peak_memory_gb"] for run in runs if run.get("peak_memory_gb")]
        memory = f"{max(memory):.1f}" if memory else ""
        cores = "one" if on_one_core(runs) else "two"
        speed = evaluations.mean(speeds, f"**{method}**", "cost", "images_per_s")
        speed = f"{speed:,.0f}" if speed else ""
        lines.append([f"**{method}**", f"{fastest(runs):,.0f}", cores, tflops(runs), memory, speed])
    heads = ["file", "training, s", "cores", "training, TFLOPs", "peak memory, GB", "images/s"]
    return markdown(heads, sorted(lines)) if lines else ["not run"]


def question_table(rows):
    """How often the video methods answer their own questions on held-out clips."""
    lines = []
    for runs in entries([row for row in rows if "pretext" in row]):
        found = [{"pretext": {k: 100 * v for k, v in run["pretext"].items()}} for run in runs]
        numbers = {key: spread(found, "pretext", key) for key in PRETEXT}
        method, film = runs[0]["method"], runs[0]["settings"]["data"]
        guess = f"{GUESSES[method]:.1f}" if method in GUESSES else "–"
        rule = RULES.get((method, film), "–")
        if method == "video_colorization":
            rule = f"{numbers['same_place']}, the colour of the same place before; "
            rule += f"{numbers['most_frequent']}, the most frequent colour"
        right, control = numbers["held_out"], numbers["control"]
        if numbers["masks"] != "–":
            right += f"; masks carried: J {numbers['masks']}"
            rule += f"; masks: left in place {numbers['masks_stay']}, by the lightness of patches "
            rule += numbers["masks_raw"]
        if right == "–":
            parts = {task: numbers[f"held_out_{task}"] for task in TASKS}
            right = "; ".join(f"{t} {number}" for t, number in parts.items() if number != "–")
        lines.append([title(runs[0]), film, right, guess, rule, control, len(runs)])
    heads = ["run", "film", "held out", "guessing", "a rule without a network", "control", "runs"]
    return markdown(heads, lines) if lines else ["not run"]


def bank_words(rows):
    """The accuracy that the paper of InstDisc reports."""
    found = [row for row in chosen(rows, "instance_discrimination") if "bank_knn" in row]
    if not found:
        return ["not run"]
    own = spread([{"bank": {"knn": row["bank_knn"]}} for row in found], "bank", "knn")
    words = (
        f"instance_discrimination: kNN as in its paper, by the embeddings in the memory bank (k = "
        f"200), {own} %; by the features (k = 200), {spread(found, 'evaluation', 'knn200')} %; "
        f"runs: {len(found)}."
    )
    return textwrap.wrap(words, 100)


def gain(runs):
    """Points of linear accuracy over the untrained network."""
    return mean(runs, "evaluation", "linear") - mean(runs, "random_init", "linear")


def ranking(rows):
    """Of the pretext tasks with a number on VOC: {method: (linear accuracy, gain, VOC)}."""
    best = headline(rows)
    return {
        name: (mean(best[name], "evaluation", "linear"), gain(best[name]), VOC[name])
        for name in VOC
        if name in best
    }


def ranking_table(rows):
    """The pretext tasks in the order of our linear accuracy, with their place by the gain over the
    untrained network and by VOC."""
    from scipy.stats import rankdata, spearmanr

    found = ranking(rows)
    if len(found) < 3:
        return ["not run"]
    numbers = np.array(list(found.values()))  # (methods, 3)
    places = rankdata(-numbers, "min", axis=0).astype(int)
    lines = []
    for i in np.argsort(-numbers[:, 0]):
        cells = [(f"{numbers[i, c]:.1f}", places[i, c]) for c in range(3)]
        lines.append([list(found)[i], *[cell for pair in cells for cell in pair]])
    heads = ["method", "linear, emoji", "place", "gain", "place", "VOC 2007, mAP", "place"]

    words = []
    for column, name in enumerate(("the linear accuracy", "the gain")):
        test = spearmanr(numbers[:, column], numbers[:, 2])
        words.append(f"with {name} {test.statistic:.2f} (p = {test.pvalue:.2f})")
    words = f"Rank correlation of VOC, {len(found)} methods: {', '.join(words)}."
    return [*markdown(heads, lines), "", words]


def tflops(runs):
    """10^12 operations of a training, as text; of runs that were recorded before operations were
    counted nothing."""
    counted = [run["train_flops"] for run in runs if run.get("train_flops")]
    return f"{statistics.mean(counted) / 1e12:,.0f}" if counted else ""


def compare(named):
    """A table of {name: runs}, of those with seed 0, with the gain over the same network untrained.
    Operations do not depend on the seed."""
    heads = ["run", "kNN", "linear", "untrained, linear", "gain", "minutes", "TFLOPs"]
    lines = []
    for name, runs in named.items():
        first = [run for run in runs if run["settings"]["seed"] == 0]
        if not first:
            lines.append([name, *["not run"] * 6])
            continue
        numbers = [spread(first, "evaluation", key) for key in ("knn20", "linear")]
        numbers += [spread(first, "random_init", "linear"), f"{gain(first):+.1f}"]
        lines.append([name, *numbers, minutes(first), tflops(runs)])
    return markdown(heads, lines)


def pirl_table(rows):
    """PIRL beside its transformations as pretext tasks, for which the longest runs count."""
    named = {}
    for transform in ("jigsaw", "rotation", "both"):
        named[f"pirl `--transform {transform}`"] = chosen(rows, "pirl", transform=transform)
    for method in ("jigsaw", "rotnet"):
        usual = defaults(method)["epochs"]
        epochs = {row["settings"]["epochs"] for row in rows if row["method"] == method}
        longer = [n for n in epochs if n > usual and chosen(rows, method, epochs=n)]
        most = max(longer, default=None)
        name = f"{method} `--epochs {most}`" if most else f"{method}, as many minutes"
        named[name] = chosen(rows, method, epochs=most)
    words = (
        "Seed 0 (TFLOPs: operations of the training, in 10^12). Compare the gains over the "
        "untrained network, because jigsaw is measured at 48 pixels. The two pretext tasks were "
        "trained longer than by default, with no fewer operations than PIRL. Minutes are of "
        "different machines."
    )
    return [*compare(named), "", *textwrap.wrap(words, 100)]


def mid_table(rows):
    """BYOL with targets from the middle of the network."""
    named = {f"`--target {name}`": chosen(rows, "byol", target=name) for name in ("ema", "random")}
    for stage in range(1, 5):
        flags = f"`--target mid --stage {stage}`"
        named[flags] = chosen(rows, "byol", target="mid", stage=stage)
    return compare(named)


def magic_table(rows):
    """The kinds of first filters that a run of Magic init compares, means over the runs."""
    tables = [row["table"] for row in chosen(rows, "magic_init") if row.get("table")]
    if not tables:
        return ["not run"]
    keys = [key for key in ("knn20", "linear", "speeds") if key in tables[0]["He"]]
    heads = {"knn20": "kNN", "linear": "linear", "speeds": "fastest layer / slowest"}
    lines = []
    for kind in tables[0]:
        runs = [{"table": table[kind]} for table in tables]
        lines.append([kind, *[spread(runs, "table", key) for key in keys], len(runs)])
    return markdown(["filters", *[heads[key] for key in keys], "runs"], lines)


def years_words(rows):
    """What must be known of years.png besides its title."""
    if not equal_budget(rows):
        return ["Each file has a budget of its own (the minutes above)."]
    words = (
        "All had about the same budget: four minutes on one core of an AMD EPYC with nothing else "
        "running, by the seconds of an epoch that were measured there (BUDGET in "
        "tests/results/report.py). So most had other epochs than by default, and a method that "
        "needs long to begin suffers most."
    )
    single = [runs[0] for runs in equal_budget(rows).values() if len(runs) == 1]
    if single:
        start = mean([run for run in single if is_usual(run)], "random_init", "linear")
        words += (
            f" A point without a bar is one run with seed 0, whose untrained network has "
            f"{start:.1f}; the dotted line is a mean of seeds."
        )
    return textwrap.wrap(words, 100)


def picture(name):
    """A picture that is on the page of all results as soon as it exists."""
    words = PICTURES[name]
    return [f"![{words}]({name})"] if (HERE / name).exists() else ["not run"]


def papers_table():
    """The papers' own numbers, which are of other networks, data and budgets."""
    lines = []
    for files in FAMILIES.values():
        lines += [[method, number] for method, (_, number) in files.items()]
    return markdown(["method", "the paper's number"], sorted(lines))


def quick_start(rows):
    """What the default command prints at its end, from the last recorded run with seed 0."""
    runs = [r for r in headline(rows).get("simclr", []) if r["settings"]["seed"] == 0]
    return ["```", *common.table(runs[-1], "simclr").splitlines(), "```"] if runs else ["not run"]


def kernel_table():
    """What kernels/bench.py has measured; for GPUs only a line as long as there is nothing."""
    rows = bench.read(bench.RESULTS)
    on_gpu = any(row["type"] == "cuda" for row in rows)
    return bench.table(rows, bench.GPU_CASES if on_gpu else ()).splitlines()


def what_evaluations_say(rows):
    """The blocks of sentences.py."""
    linear = {name: mean(runs, "evaluation", "linear") for name, runs in headline(rows).items()}
    return sentences.blocks(sides(), FAMILIES["Video"], linear)


def reached(runs):
    """The docstring's paragraph: what the defaults reached, and what was not measured."""
    if not runs:
        return "Reached. Not run."
    keys = {"kNN": "knn20", "linear": "linear"}
    words = []
    for name, key in keys.items():
        number = mean(runs, "evaluation", key)
        baselines = f"untrained {mean(runs, 'random_init', key):.1f}"
        baselines += f", raw pixels {mean(runs, 'pixels', key):.1f}"
        words.append(f"{name} {number:.1f} % ({baselines})")
    data = runs[0]["settings"]["data"]
    epochs = runs[0]["settings"]["epochs"]
    where = "one busy core" if on_one_core(runs) else "two CPU cores"
    count = f"mean of {len(runs)} runs" if len(runs) > 1 else "one run"
    return (
        f"Reached. On {data} after {epochs} epochs, {fastest(runs):.0f} s on {where}: "
        f"{'; '.join(words)}; {count}. Other recipes: not run."
    )


# -------- Writing ---------------------------------------------------------------------------------


def pages(rows):
    """{path: its text with all that is generated made anew}."""
    blocks = {
        "quickstart": quick_start(rows),
        "methods": method_table(rows),
        "results": short_table(rows),
        "emoji": full_table(rows, "emoji"),
        "fashion": full_table(rows, "fashion"),
        "movers": full_table(rows, "movers"),
        "tripod": full_table(rows, "tripod"),
        "bunny": full_table(rows, "bunny"),
        "cost": cost_table(rows),
        "questions": question_table(rows),
        "bank": bank_words(rows),
        "ranking": ranking_table(rows),
        "years": years_words(rows),
        "pirl": pirl_table(rows),
        "mid": mid_table(rows),
        "magic": magic_table(rows),
        **{name.removesuffix(".png"): picture(name) for name in PICTURES},
        "papers": papers_table(),
        "kernels": kernel_table(),
        **evaluations.blocks(markdown, FAMILIES["Video"]),
        **what_evaluations_say(rows),
    }
    texts = {}
    used = []
    for name, root in PAGES.items():
        text = (root / name).read_text()
        for block, lines in blocks.items():
            pattern = rf"(<!-- {block} -->\n).*?(<!-- /{block} -->)"
            new = "\n".join(["", *lines, "", ""])
            text, count = re.subn(pattern, lambda m: m[1] + new + m[2], text, flags=re.S)
            used += [block] * count
        texts[root / name] = text
    if sorted(used) != sorted(blocks):
        common.fail(f"each of {', '.join(blocks)} must be one block <!-- NAME --> on a page")

    best = at_home(rows)
    for method in [m for files in FAMILIES.values() for m in files]:
        path = ROOT / "methods" / f"{method}.py"
        runs = best.get(method)
        lines = textwrap.fill(reached(runs), 100, break_on_hyphens=False)
        text = re.sub(r"^Reached\. .*?(?=\n\n)", lambda _: lines, path.read_text(), 1, re.S | re.M)
        if runs and on_one_core(runs):
            duration = f"one CPU core, about {fastest(runs) / 60:.0f} minutes"
            text = re.sub("one CPU core, about [0-9]+ minutes", duration, text, count=1)
        texts[path] = text
    return texts


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("add", nargs="*", help="the word add, then the folders of finished runs")
    p.add_argument("--check", action="store_true", help="change nothing; fail if a page differs")
    args = p.parse_args(argv)
    if args.add and (args.add[0] != "add" or len(args.add) < 2):
        common.fail("give nothing, or the word add and the folders of finished runs")
    if args.add:
        add([Path(folder) for folder in args.add[1:]])

    rows = read_rows()
    if not args.check:
        draw_curves(rows, HERE / "knn.png")
        draw_years(rows, HERE / "years.png")
        draw_plane(rows, HERE / "plane.png")
        draw_layers(HERE / "layers.png")
        draw_instability(rows, HERE / "instability.png")
    for path, text in pages(rows).items():
        if args.check and text != path.read_text():
            common.fail(f"{path.name} differs from the rows: run tests/results/report.py")
        if not args.check:
            path.write_text(text)


if __name__ == "__main__":
    main()
