"""Videos: what a network knows of what moves, and whether it finds a thing again in later frames.
Mask propagation: Jabri, Owens, Efros, NeurIPS 2020. https://arxiv.org/abs/2006.14613
Our settings are near those of DINO: Caron et al., ICCV 2021. https://arxiv.org/abs/2104.14294
J and F: Pont-Tuset et al., the 2017 DAVIS challenge. https://arxiv.org/abs/1704.00675
Their code: https://github.com/davisvideochallenge/davis2017-evaluation

Idea. In the film `movers` all is known of a clip: the mask of its emoji in every frame, how it
moves, where it is and how far it is turned. As in the benchmark DAVIS, the mask of the first frame
is given and is copied to the later ones: each place of a frame takes the values of those places of
earlier frames that have the most similar features. This needs no training. The other answers are
read from the frozen features by linear rules. For the film `bunny` it is known which animals each
shot shows.

Notation. Frames of --mask-size pixels go through the network. One of its maps (kernels/maps.py),
brought to g x g places, gives each place a feature of length 1. A place of frame t is compared with
the places within --radius of it, in the first frame and in the --previous frames before t. s_i is
their inner product. The sum is over the --nearest places i with the largest s_i:

    value(place) = sum over i of  softmax(s_i / temperature)  value(i)

A pixel belongs to the object if its value is above the middle between the least and the greatest of
its frame. Each network uses the map with the best J on --choose training clips. J and F are means
over the frames after the first (DAVIS: without the last one, too). The columns of the results:

    J         region: intersection / union of mask and truth, in percent
    F         boundary: 2 P R / (P + R), in percent. A pixel of one boundary is right if the other
              boundary is at most 0.8 % of the diagonal away, rounded up to one pixel, 1.5 %. P is
              the share of right pixels of the mask's boundary, R that of the true one
    motion    one of 8: accuracy of a linear probe on features of --frames frames, side by side
    category  of the emoji, one of 9: as above, on the mean of these features
    position  mean distance of the answer from the emoji's centre, in pixels of 48. From features of
              a single frame by ridge regression (linear, with weight decay)
    angle     mean error of how far the emoji is turned, in degrees: as above, from sine and cosine.
              Upright in most motions: no network in the results is clearly better than a constant
    subject   rabbit, rodents, neither or mixed: a linear probe on frames of the shots of bunny
    shot_r1   how often, of the first frames of all shots, the one most similar to the last frame of
              a test shot is of the same shot, in percent; shot_r5: one of the five most similar

Three baselines stand beside the networks. "no network" leaves the first mask in its place and
answers with the most frequent class and the mean pose (shots: 0, all are equally similar). Raw
pixels are the colours of 7 x 7 pixels around a place of the frame averaged to 32 x 32 (masks), else
the frame averaged to 16 x 16. The third is untrained.

Run.
    python methods/eval_video.py runs/video_colorization-movers-0
    python methods/eval_video.py runs/*-movers-* --only masks
The folder --out, runs/eval_video, gets results.jsonl, masks.png and masks, those in this picture.

Differs from DINO's code. (This file | that code.)
    1. Frames of 96 pixels, the 3 last ones, places up to 6 of 24 away, the map that is best on
       training clips, the covered share of a place | 480, 7, 12 of 30, the last block, in or out.
"""

import functools
import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (Candidate, Results, candidates, embed, join_processes, linear_probe, parse,
                    print0, print_files, replace_file)
from kernels.clips import load_bunny
from kernels.collectives import fail, world
from kernels.maps import maps, prepare
from kernels.movers import load_movers, render
from kernels.propagation import as_masks, region, share, visible

KIND = "evaluation"  # the tests ask for what is due to each kind

# The measure.


def contour(mask):
    """The boundary of masks (N, H, W) bool, as in the code of DAVIS: the pixels that differ from
    their neighbour to the right, the one below, or the one diagonally between these two."""
    padded = F.pad(mask.float(), (0, 1, 0, 1), mode="replicate")
    mean = F.avg_pool2d(padded, 2, stride=1)  # of a pixel and these three
    return (mean > 0) & (mean < 1)


def around(pixels, reach):
    """The pixels (N, H, W) bool and all within `reach` of them."""
    line = torch.arange(-reach, reach + 1)
    disk = line[:, None] ** 2 + line**2 <= reach**2
    disk = disk.float()[None, None]
    count = F.conv2d(pixels[:, None].float(), disk, padding=reach)
    return count[:, 0] > 0.5


def boundary(predicted, truth, tolerance=0.008):
    """F of each frame, (N,). Masks (N, H, W) bool; tolerance: as a share of the diagonal."""
    reach = math.ceil(tolerance * math.hypot(*truth.shape[1:]))
    found = contour(predicted)
    true = contour(truth)
    precision = share(found & around(true, reach), found)
    recall = share(true & around(found, reach), true)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def mask_scores(predicted, truth):
    """Masks (n, T, H, W) bool -> J and F in percent, over all frames after the first."""
    pair = [masks[:, 1:].flatten(0, 1) for masks in (predicted, truth)]
    j = 100 * region(*pair).mean().item()
    f = 100 * boundary(*pair).mean().item()
    return {"J": j, "F": f, "J&F": (j + f) / 2}


def propagate(features, first, radius, previous, nearest, temperature):
    """Copies the values of the first frame to the later ones, by the similarity of features.

    features: (n, T, C, g, g); first: (n, g, g) -> values (n, T, g, g)"""
    side = features.shape[3]
    f = F.normalize(features.flatten(3), dim=2)  # (n, T, C, P)
    line = torch.arange(side, device=f.device)
    places = torch.cartesian_prod(line, line)  # (P, 2)
    far = (places[:, None] - places).abs().amax(2) > radius  # (P, P)

    values = [first.flatten(1)]  # (n, P) of each frame
    for t in range(1, f.shape[1]):
        # Similarities to the places of the first frame and of the previous ones.
        earlier = sorted({0, *range(max(0, t - previous), t)})
        s = [
            (f[:, t].mT @ f[:, frame]).masked_fill(far, -torch.inf)  # (n, P, P)
            for frame in earlier
        ]
        s = torch.cat(s, 2)  # (n, P, all their places)

        # The weighted mean of the values of the most similar places.
        best, index = s.topk(nearest, 2)  # (n, P, nearest)
        weight = (best / temperature).softmax(2)
        known = torch.cat([values[frame] for frame in earlier], 1)
        known = known[:, None].expand(s.shape).gather(2, index)
        values.append((weight * known).sum(2))

    return torch.stack(values, 1).unflatten(2, (side, side))


def ridge(x, y, test):
    """Linear regression with weight decay, features (N, D), answers (N, K) -> answers for the test
    features. For each answer the decay is chosen that has the least error on training rows, each
    left out alone: other frames of its clip remain, so the decay is rather too small."""
    from sklearn.linear_model import RidgeCV  # here, so --help need not wait for it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    decays = 10.0 ** np.arange(-2, 7)
    rule = make_pipeline(StandardScaler(), RidgeCV(decays, alpha_per_target=True))
    rule.fit(x.double().numpy(), y.double().numpy())
    return torch.from_numpy(rule.predict(test.double().numpy()))


def pose_scores(predicted, truth):
    """Rows of x, y in pixels and sine and cosine of an angle -> mean errors in pixels and degrees.
    """
    distance = (predicted[:, :2] - truth[:, :2]).norm(dim=1)
    angle = torch.atan2(predicted[:, 2], predicted[:, 3])
    turn = angle - torch.atan2(truth[:, 2], truth[:, 3])
    turn = turn.remainder(2 * math.pi)
    # The shorter way round.
    apart = torch.minimum(turn, 2 * math.pi - turn).rad2deg()
    return {"position": distance.mean().item(), "angle": apart.mean().item()}


def shot_scores(last, first):
    """last (n, D), first (N, D): features of frames; the same row is the same shot. In percent, how
    often the first frame of the same shot is one of the k most similar. If another one is equally
    similar, it ranks before it."""
    similar = F.normalize(last, dim=1) @ F.normalize(first, dim=1).T  # (n, N)
    rank = (similar >= similar.diag()[:, None]).sum(1)  # 1 is best: itself alone
    scores = {}
    for k in (1, 5):
        scores[f"shot_r{k}"] = 100 * (rank <= k).double().mean().item()
    return scores


# The evaluation.

TASKS = {  # {task: the film that it is asked of}
    "masks": "movers", "motion": "movers", "category": "movers", "pose": "movers",
    "subject": "bunny", "shots": "bunny",
}  # fmt: skip
COLUMNS = ("J", "F", "J&F", "motion", "category", "position", "angle", "subject", "shot_r1",
           "shot_r5")
SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "data": ("films", "the embedded films, movers and bunny", ("films",)),
    "size": (0, "side to which frames are resized, pixels; 0: that of the training", "[0, inf)"),
    "only": ("all", "which task", ("all", *TASKS)),
    "train_clips": (1500, "training clips of movers", "[20, inf)"),
    "test_clips": (500, "test clips of movers", "[2, inf)"),
    "frames": (4, "frames of a clip or shot whose features are used", "[2, 12]"),
    "mask_clips": (60, "test clips in which masks are copied", "[2, inf)"),
    "choose": (12, "training clips on which the map is chosen", "[1, inf)"),
    "mask_size": (96, "side of the frames in which masks are copied, pixels", "[8, inf)"),
    "grid": (24, "g, places along a side", "[4, inf)"),
    "radius": (6, "how many places away similar ones are looked for", "[1, inf)"),
    "previous": (3, "how many of the last frames are looked at, beside the first", "[1, inf)"),
    "nearest": (5, "how many similar places are copied", "[1, 9]"),
    "temperature": (0.1, "of the similarities", "(0, inf)"),
}
# What a result depends on, beside the size.
NUMBERS = [name for name in SETTINGS if name not in ("recipe", "data", "size", "only")]
SHOWN = 2  # clips in masks.png


@functools.cache
def film_of(film, split, count):
    """The first `count` Clips of movers, or the Shots of bunny."""
    return render(load_movers(split), range(count)) if film == "movers" else load_bunny(split)


def spaced(length, count):
    """`count` places from 0 to length - 1, the first and the last among them."""
    return np.linspace(0, length - 1, count).round().astype(int).tolist()


@functools.lru_cache(maxsize=2)  # for all tasks of a film, of training and test clips
def features(network, film, split, count, frames, size, device):
    """(N, T, D) on the CPU, of evenly spaced frames of each clip. No network: zeros."""
    clips = film_of(film, split, count).frames
    chosen = torch.cat([clip[spaced(len(clip), frames)] for clip in clips])  # (N T, 3, H, W)
    if network is None:
        return torch.zeros(len(chosen), 1).unflatten(0, (-1, frames))
    if not list(network.parameters()):  # raw pixels
        # Four frames side by side would have 12,288 numbers at 32 x 32.
        network = nn.AdaptiveAvgPool2d(min(16, size))
    parts = []
    for part in chosen.split(256):
        x = prepare(part.to(device), size)
        parts.append(embed(network, x).cpu())
    x = torch.cat(parts)
    if not x.isfinite().all():
        fail("some features are infinite or not a number: leave this network out")
    return x.unflatten(0, (-1, frames))


def read(task, network, size, args, device):
    """Scores of all tasks but masks."""
    film = TASKS[task]
    known = []
    for split, count in (("train", args.train_clips), ("test", args.test_clips)):
        found = features(network, film, split, count, args.frames, size, device)
        known += [found, film_of(film, split, count)]

    # x, z: features (N, T, D) of training and of test clips; train, test: what is known of these.
    x, train, z, test = known
    if task == "shots":
        first = torch.cat([z, x])[:, 0]
        return shot_scores(z[:, -1], first)
    if task == "pose":
        known = poses(train, args.frames)
        found = ridge(x.flatten(0, 1), known, z.flatten(0, 1))
        return pose_scores(found, poses(test, args.frames))
    return {task: probe(task, x, train, z, test)}


def probe(task, x, train, z, test):
    """Accuracy of a linear probe that tells motion, category or subject."""
    groups = None  # near copies, which stay together when the probe chooses its weight decay
    if task == "subject":  # of a frame: that of its shot
        frames = x.shape[1]
        x, z = x.flatten(0, 1), z.flatten(0, 1)
        labels = [shots.labels.repeat_interleave(frames) for shots in (train, test)]
        groups = train.blocks.repeat_interleave(frames)
    else:
        # The parts of Clips are named as the tasks.
        labels = [getattr(clips, task)[:, 0] for clips in (train, test)]
        if task == "motion":  # of a clip: its frames side by side
            x, z = x.flatten(1), z.flatten(1)
        else:  # of a clip: the mean of its frames
            x, z = x.mean(1), z.mean(1)
            groups = train.identity[:, 0]
    # The probe overwrites its features, but the next task uses them, too.
    return linear_probe(x.clone(), labels[0], z.clone(), labels[1], groups)


def poses(clips, frames):
    """x, y, sine and cosine of the angle of the emoji in evenly spaced frames: (N T, 4)."""
    chosen = spaced(clips.pose.shape[1], frames)
    pose = clips.pose[:, chosen, 0].flatten(0, 1)
    x, y, angle, _ = pose.unbind(1)
    return torch.stack([x, y, angle.sin(), angle.cos()], 1)


@torch.no_grad()
def copied(network, clips, args, device, only=None):
    """{number of a map: predicted masks (n, T, H, W)}, of all maps or of one."""
    truth = clips.masks > 0
    grid = args.grid, args.grid
    predicted = {}
    for some in torch.arange(len(truth)).split(6):  # six clips at a time, to save memory
        first = F.adaptive_avg_pool2d(truth[some, 0].float(), grid).to(device)
        frames = clips.frames[some].flatten(0, 1).to(device)
        for number, x in enumerate(maps(network, prepare(frames, args.mask_size))):
            if only is not None and number != only:
                continue
            if not x.isfinite().all():
                fail("some maps are infinite or not a number: leave this network out")

            # To g x g places: a small map is enlarged, a large one is averaged.
            if x.shape[2] < args.grid:
                x = F.interpolate(x, grid, mode="bilinear")
            x = F.adaptive_avg_pool2d(x, grid).unflatten(0, (len(some), -1))
            values = propagate(
                x, first, args.radius, args.previous, args.nearest, args.temperature
            )
            found = as_masks(values, truth.shape[3]).cpu()
            predicted.setdefault(number, []).append(found)
    return {number: torch.cat(parts) for number, parts in predicted.items()}


def masks(network, args, device):
    """Predicted masks of the test clips (n, T, H, W), and their scores."""
    test = visible(film_of("movers", "test", args.test_clips), args.mask_clips)
    truth = test.masks > 0
    if network is None:  # the first mask stays where it is
        predicted = truth[:, :1].expand_as(truth)
        return predicted, mask_scores(predicted, truth)

    # The map of the network that is best on training clips.
    train = visible(film_of("movers", "train", args.train_clips), args.choose)
    on_train = {}
    for number, predicted in copied(network, train, args, device).items():
        on_train[number] = mask_scores(predicted, train.masks > 0)["J"]
    best = max(on_train, key=on_train.get)

    predicted = copied(network, test, args, device, best)[best]
    about = {"map": best, "J_on_train": [*on_train.values()]}
    return predicted, mask_scores(predicted, truth) | about


def table(results):  # copy of: methods/eval_dense.py::table
    """{network and mode: scores} as text, one line each."""
    width = max(map(len, results)) + 2
    columns = [name for name in COLUMNS if any(name in found for found in results.values())]
    lines = [" " * width + "".join(f"{name:>14}" for name in columns)]
    for heading, found in results.items():
        line = f"{heading:{width}}"
        for value in map(found.get, columns):
            line += f"{'-' if value is None else format(value, '.3g'):>14}"
        lines.append(line)
    return "\n".join(lines)


def draw_masks(path, predicted, clips):
    """One row for the truth and one for each network: frames of some clips, in which all but the
    object is pale. predicted: {heading: masks (SHOWN, T, H, W)}."""
    from matplotlib.figure import Figure

    times = spaced(clips.frames.shape[1], 6)
    columns = [(clip, t) for clip in range(len(clips.frames)) for t in times]
    rows = {"the truth": clips.masks > 0, **predicted}
    size = 1.1 * len(columns) + 2.5, 1.1 * len(rows) + 0.8
    figure = Figure(size, layout="constrained")
    figure.suptitle(
        "The mask of the first frame is given and copied to the later ones. What does not belong "
        "to the object is pale."
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (heading, found) in zip(grid, rows.items()):
        line[0].set_ylabel(heading, rotation=0, ha="right")
        for axes, (clip, t) in zip(line, columns):
            axes.set(xticks=[], yticks=[])
            frame = clips.frames[clip, t].permute(1, 2, 0) / 255
            pale = 0.75 + 0.25 * frame.mean(2, keepdim=True)
            inside = found[clip, t][:, :, None]
            axes.imshow(frame.where(inside, pale).numpy())
    for axes, (_, t) in zip(grid[0], columns):
        axes.set_title(f"frame {t + 1}", fontsize=8)
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv, runs="folders of finished runs, or their backbone.pt")
    device = join_processes(args.seed)
    if world() > 1:
        fail("this script runs in one process: start it with python, not with torchrun")
    tasks = TASKS if args.only == "all" else [args.only]
    networks = [Candidate("no network", None, args.data, args.size, {}), *candidates(args)]
    results = Results("eval_video", args, device)
    folder = results.folder
    (folder / "masks").mkdir(exist_ok=True)
    settings = {name: getattr(args, name) for name in NUMBERS}

    measured = {}  # {name: scores}
    shown = {}  # {name: masks of the first clips}
    for candidate in networks:
        name = candidate.name
        network = candidate.network
        if network is not None:
            network.to(device, memory_format=torch.channels_last)  # as in training
        measured[name] = {}
        # New weights, or other settings, have masks of their own.
        about = candidate.about.get("weights") or candidate.about.get("seed")
        about = f"{about} {settings}"
        digest = hashlib.sha256(about.encode()).hexdigest()[:8]
        file = folder / "masks" / f"{name.replace('/', '-')}, {digest}.npy"

        def measure(task):
            if task != "masks":
                return read(task, network, candidate.size, args, device)
            predicted, scores = masks(network, args, device)
            replace_file(file, lambda part: np.save(part, predicted[:SHOWN].numpy()))
            return scores

        # results.measure calls measure, unless results.jsonl has the result already.
        for task in tasks:
            job = candidate._replace(data=TASKS[task])
            function = functools.partial(measure, task)
            measured[name] |= results.measure(task, job, function, **settings)
        if file.exists():
            shown[name] = torch.from_numpy(np.load(file))

    if "masks" in tasks:
        clips = visible(film_of("movers", "test", args.test_clips), args.mask_clips)
        draw_masks(folder / "masks.png", shown, clips.part(slice(SHOWN)))
    print0(f"\n{table(measured)}")
    print0("")
    print_files(folder)


if __name__ == "__main__":
    main()
