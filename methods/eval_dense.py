"""Dense tasks: what a network knows at each place of an image, not of the image as a whole.
Hypercolumns: Hariharan, Arbelaez, Girshick, Malik, CVPR 2015. https://arxiv.org/abs/1411.5752
Surface normals: Fouhey, Gupta, Hebert, ICCV 2013. https://doi.org/10.1109/ICCV.2013.421
Depth: Eigen, Puhrsch, Fergus, NeurIPS 2014. https://arxiv.org/abs/1406.2283
Keypoints: Yang, Ramanan, TPAMI 2013. https://doi.org/10.1109/TPAMI.2012.261

Idea. Features of a whole image tell what is seen, but not where. Four tasks ask for an answer at
every pixel of the scenes of the data set `solids`: 1,000 rendered scenes to train on, and 250 with
other textures to test. A head that looks at one place only (a 1x1 convolution) reads the answer off
the maps of a network, its features before they are pooled. Frozen, the network does not change, so
the maps themselves must hold the answer. Fine-tuned, all weights are trained together with the
head. The untrained network is treated in the same way; to fine-tune it is to train from scratch.

Notation. The maps are those of ALL stages of a ResNet (its first layer, then layer1 to layer4), or
the patches of a ViT after four evenly spaced blocks; of raw pixels, averaged to 32 x 32, the
colours of the 7 x 7 around each. The head standardises each map per channel (batch-norm without
scale and offset) and adds what it reads off each, enlarged to the 48 x 48 pixels of a scene. Over
all test pixels, for normals and depth without those that show no surface (the sky):

    segmentation  the shape at a pixel, one of 8, or the background. miou: intersection / union of
                  each of these 9 classes, in percent, averaged over the classes; object_iou:
                  that of all objects, whatever their shapes
    normals       the direction of the surface, a unit vector n, by angle = arccos(n . n_true):
                  mean, median, and the percentage within 11.25, 22.5 and 30 degrees;
                  object_angle: the mean over the pixels of objects, without the floor
    depth         rmse = sqrt(mean (d - d_true)^2); abs_rel = mean |d - d_true| / d_true
    keypoints     corners and tips of solids, as the peaks of a heat map. Each object's box and its
                  number n of visible points are given; the n highest peaks in the box are paired
                  with the points, one to one, by least total distance. pck: the percentage of
                  points whose peak is no further than a fraction of the longer side of the box;
                  auc: its mean over the fractions from 0 to 0.2

The row "no network" gives one answer for all pixels, the best for the training scenes; for normals
their mean. A "-" in the table stands for a number that was not measured or is not defined.

Run.
    python methods/eval_dense.py runs/simclr-emoji-0
    python methods/eval_dense.py runs/* --no-finetune
    python methods/eval_dense.py runs/* --only normals
It writes results.jsonl, scenes.png and pck.png into --out, by default runs/eval_dense, and the
folder outputs, the answers from which scenes.png is drawn. What is in results.jsonl is not
measured again. For a ViT choose --size 48: with 96 pixels it has four times as many patches, and
training all of its weights takes six times as long.
"""

import copy
import functools
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import Candidate, Results, candidates, join_processes, parse, print0, replace_file
from kernels.collectives import fail, world
from kernels.maps import MapHead, all_maps, maps, prepare
from kernels.readers import load_solids

KIND = "evaluation"  # the tests ask for what is due to each kind
FRACTIONS = torch.linspace(0, 0.2, 21, dtype=torch.float64)  # of the longer side of a box

# The measure.


def segmentation_scores(predicted, truth, classes):
    """Intersection over union of each class, over all pixels together, and its mean, in percent.
    A class that neither has is -1, and left out of the mean. predicted, truth: (N, H, W) ints."""
    pairs = classes * truth.long() + predicted.long()
    counts = pairs.flatten().bincount(minlength=classes**2).view(classes, classes).double()
    shared = counts.diag()
    either = counts.sum(0) + counts.sum(1) - shared
    iou = 100 * shared / either  # nan for a class that neither has
    return {"miou": iou.nanmean().item(), "iou": iou.nan_to_num(-1).tolist()}


def normal_scores(predicted, truth):
    """Angles in degrees over all valid pixels: mean, median, and the percentage within limits.
    {} if there is none. predicted: (N, 3, H, W) of any length; truth: unit vectors, 0 where there
    is no surface."""
    valid = truth.any(1)  # (N, H, W)
    cosine = F.cosine_similarity(predicted.double(), truth.double(), dim=1)[valid]
    angle = cosine.clamp(-1, 1).arccos().rad2deg()
    if not len(angle):
        return {}
    scores = {"mean_angle": angle.mean().item(), "median_angle": angle.quantile(0.5).item()}
    for limit in (11.25, 22.5, 30):
        scores[f"within_{limit}"] = 100 * (angle <= limit).double().mean().item()
    return scores


def depth_scores(predicted, truth):
    """Errors over all valid pixels: rmse in units of the scene, abs_rel a ratio.
    predicted, truth: (N, H, W); truth is 0 where there is no surface."""
    valid = truth > 0
    true = truth[valid].double()
    error = predicted[valid].double() - true
    relative = error.abs() / true
    rmse = error.square().mean().sqrt()
    return {"rmse": rmse.item(), "abs_rel": relative.mean().item()}


def point_errors(predicted, truth):
    """The distances (n,) of true points (n, 2) from predicted ones (n, 2), in pairs of one each,
    those of least total distance."""
    from scipy.optimize import linear_sum_assignment  # here, so --help need not wait for it

    apart = (truth[:, None].double() - predicted.double()).norm(dim=2)  # (n, n)
    return apart[linear_sum_assignment(apart.numpy())]


def pck_scores(errors):
    """Errors (n,), as fractions of the side of a box -> pck, the percentage that is at most each of
    FRACTIONS; auc, the area under it by trapezoids, 100 at best; and its value at 0.1."""
    curve = 100 * (errors[:, None] <= FRACTIONS + 1e-9).double().mean(0)
    area = torch.trapezoid(curve, FRACTIONS) / FRACTIONS[-1]
    return {
        "pck": curve.tolist(),
        "pck_0.1": curve[10].item(),
        "auc": area.item(),
    }


def peaks(heat, box, count):
    """The highest pixel of a map (H, W) in a box x0, y0, x1, y1, then the highest that is more than
    2 pixels from it, and so on. Returns their centres, x and y, (count, 2)."""
    x0, y0, x1, y1 = box.int().tolist()
    rest = heat[y0:y1, x0:x1].clone()
    found = []
    for _ in range(count):
        row, column = divmod(rest.argmax().item(), x1 - x0)
        found.append((x0 + column + 0.5, y0 + row + 0.5))
        top = max(0, row - 2)
        left = max(0, column - 2)
        rest[top : row + 3, left : column + 3] = -torch.inf
    return torch.tensor(found)


def visible_points(scenes):
    """Yields for each object that has some: scene, its number in it, box (4,), visible points
    (n, 2). The centre, an object's first keypoint, is left out: the box gives it away."""
    for scene, boxes in enumerate(scenes.boxes):
        for number, box in enumerate(boxes):
            points = scenes.keypoints[scene, number, 1:]  # (8, 3): x, y, state
            points = points[points[:, 2] == 1, :2]
            if len(points):
                yield scene, number, box, points


def keypoint_scores(heat, scenes):
    """pck_scores of the peaks of heat maps (N, H, W) in the boxes of all objects."""
    errors = []
    for scene, _, box, points in visible_points(scenes):
        found = peaks(heat[scene], box, len(points))
        side = (box[2:] - box[:2]).max().double()
        errors.append(point_errors(found, points) / side)
    return pck_scores(torch.cat(errors))


def scores(task, output, scenes):
    """What a head's output (N, channels, H, W) for some scenes is worth: a dict."""
    if task == "segmentation":
        shapes = output.argmax(1)
        found = segmentation_scores(shapes, scenes.classes, output.shape[1])
        of_two = segmentation_scores(shapes > 0, scenes.classes > 0, 2)
        return found | {"object_iou": of_two["iou"][1]}
    if task == "normals":
        found = normal_scores(output, scenes.normals)
        on_objects = scenes.normals * (scenes.classes[:, None] > 0)
        return found | {"object_angle": normal_scores(output, on_objects).get("mean_angle")}
    if task == "depth":
        return depth_scores(output[:, 0], scenes.depth)
    return keypoint_scores(output[:, 0], scenes)


# The evaluation.

TASKS = {"segmentation": 9, "normals": 3, "depth": 1, "keypoints": 1}  # channels of the output
COLUMNS = ("miou", "object_iou", "mean_angle", "median_angle", "object_angle", "within_11.25",
           "within_22.5", "within_30", "rmse", "abs_rel", "pck_0.1", "auc")
SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "seed": (0, "seed of the untrained network, of the head, and of the order of scenes"),
    "data": ("solids", "the scenes", ("solids",)),
    "size": (96, "side to which the scenes are resized for the network, pixels", "[1, inf)"),
    "only": ("all", "which task", ("all", *TASKS)),
    "finetune": (True, "also train all weights, anew for each task"),
    "batch": (16, "scenes per step"),
    "steps": (200, "training steps for each task", "[1, inf)"),
    "lr": (3e-3, "learning rate of AdamW at its highest"),
}
SHOWN = 2  # test scenes in the pictures


def targets(task, scenes):
    """What the head is trained for: a tensor, one row per scene."""
    if task == "segmentation":
        return scenes.classes.long()  # (N, H, W)
    if task == "normals":
        return scenes.normals  # (N, 3, H, W)
    if task == "depth":
        return scenes.depth[:, None]  # (N, 1, H, W)

    # For each object a distribution over its box, Gaussians (sigma 1) at its visible points; -1
    # outside the box, and everywhere if the object has no points.
    heat = torch.full(
        (*scenes.keypoints.shape[:2], *scenes.images.shape[2:]),
        -1.0,
    )
    for scene, number, box, points in visible_points(scenes):
        x0, y0, x1, y1 = box.int().tolist()
        x = torch.arange(x0, x1) + 0.5 - points[:, :1]  # (n, width of the box)
        y = torch.arange(y0, y1) + 0.5 - points[:, 1:]
        near = torch.exp(-y.square() / 2)
        near = near.T @ torch.exp(-x.square() / 2)
        heat[scene, number, y0:y1, x0:x1] = near / near.sum()
    return heat


def constant(task, target):
    """The output (channels,) for all pixels that has the least loss; of heat maps 0."""
    if task == "keypoints":
        return torch.zeros(TASKS[task])
    if task == "segmentation":
        counts = target.flatten().bincount(minlength=TASKS[task])
        # The best logits when a class weighs 1 / sqrt(its share); + 1: a shape may be missing.
        return (counts + 1).log() / 2
    valid = target.any(1)
    return target.sum((0, 2, 3)) / valid.sum()


def loss_of(task, output, target, start):
    """start: the best constant output. A shape with a share f of the pixels has weight 1/sqrt(f):
    without it, nearly all pixels would be called background, which most of them are."""
    if task == "segmentation":
        return F.cross_entropy(output, target, (-start).exp())
    if task == "keypoints":  # a softmax over the pixels of each box
        inside = target >= 0  # (n, objects, H, W)
        given = inside.any(3).any(2)
        heat = output.where(inside, -1e4)[given].flatten(1)
        truth = target[given].clamp(min=0).flatten(1)
        total = F.cross_entropy(heat, truth, reduction="sum")
        return total / given.sum().clamp(min=1)
    valid = target.any(1)
    if task == "normals":
        return 1 - F.cosine_similarity(output, target, dim=1)[valid].mean()
    return F.mse_loss(output[:, 0][valid], target[:, 0][valid])


@functools.lru_cache(maxsize=2)  # kept for all tasks, of training and of test scenes
def frozen_maps(*args):
    return all_maps(*args)


def reader(frozen, network, images, size, device):
    """A function of the numbers of some images that gives their maps."""
    if frozen:
        known = frozen_maps(network, images, size, device)
        return lambda index: [x[index] for x in known]
    return lambda index: maps(network, prepare(images[index].to(device), size))


def fit(see, head, weights, task, target, start, settings):
    """Trains weights by AdamW; the rate rises for a tenth of the steps, then falls to 0.
    see(index): the maps of the scenes with these numbers."""
    steps, lr = settings["steps"], settings["lr"]
    optimizer = torch.optim.AdamW(weights, lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    generator = np.random.default_rng(settings["head_seed"])
    for _ in tqdm(range(steps), task, leave=False, disable=None):
        index = generator.choice(len(target), settings["batch"], replace=False)
        index = torch.from_numpy(index)
        loss = loss_of(task, head(see(index)), target[index], start)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def train_and_test(candidate, task, mode, train, test, settings, device):
    """Trains a head on the training scenes. Returns its output for the test scenes, (N, channels,
    H, W). A frozen network is left as it was; a fine-tuned one is a copy."""
    target = targets(task, train).to(device)
    start = constant(task, target)
    side = train.images.shape[3]
    if mode == "constant":
        shape = len(test.images), len(start), side, side
        return start.cpu()[:, None, None].expand(shape)

    network = candidate.network.to(device, memory_format=torch.channels_last)  # as in training
    frozen = mode == "frozen"
    if not frozen:
        network = copy.deepcopy(network)
    see = reader(frozen, network, train.images, candidate.size, device)
    with torch.no_grad():
        widths = [x.shape[1] for x in see([0])]

    torch.manual_seed(settings["head_seed"])
    head = MapHead(widths, len(start), side, start).to(device)
    weights = [*head.parameters()]
    if not frozen:
        weights += network.train().requires_grad_(True).parameters()
    fit(see, head, weights, task, target, start, settings)

    network.eval()
    head.eval()
    see = reader(frozen, network, test.images, candidate.size, device)
    with torch.no_grad():
        parts = torch.arange(len(test.images)).split(50)
        output = torch.cat([head(see(part)) for part in parts]).cpu()
    if not output.isfinite().all():
        fail(f"some answers for {task} are infinite or not a number: choose a lower --lr")
    return output


def table(results):
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


def paint(axes, task, output, scenes, i):
    """Draws what an output (channels, H, W), or the truth in the form of targets(), says of a
    scene."""
    picture = scenes.images[i].permute(1, 2, 0) // 2 + 127  # pale, under the keypoints
    limits = {}
    if task == "segmentation":
        picture = output.argmax(0) if output.ndim == 3 else output
        limits = {"cmap": "tab10", "vmin": 0, "vmax": 9}
    elif task == "normals":
        turn = torch.tensor([1, -1, -1])[:, None, None]  # a surface that faces us is blue
        normals = F.normalize(output, dim=0) * turn
        picture = (1 + normals).permute(1, 2, 0) / 2
    elif task == "depth":
        picture = output[0].where(scenes.depth[i] > 0, torch.nan)
        limits = {"vmin": 2, "vmax": 10}
    else:
        for scene, _, box, points in visible_points(scenes):
            if scene == i:
                points = peaks(output.amax(0), box, len(points))
                axes.plot(*(points.T - 0.5), "o", markersize=3)
    axes.imshow(picture.numpy(), **limits)


def draw_scenes(path, tasks, outputs, scenes):
    """The first scenes, the truth, and below what each network says. outputs: {heading: {task:
    (SHOWN, channels, H, W)}}."""
    from matplotlib.figure import Figure  # here, so --help need not wait for it

    columns = [(task, i) for task in tasks for i in range(SHOWN)]
    truth = {task: targets(task, scenes) for task in tasks}
    rows = {"scene": {}, "truth": truth, **outputs}
    figure = Figure((1.3 * len(columns) + 3, 1.3 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(
        "Test scenes, the true answers, and what a head on the maps of each network answers.\n"
        "One colour per shape. Normals: blue faces the camera, green is up. Depth: yellow is far."
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (heading, found) in zip(grid, rows.items()):
        line[0].set_ylabel(heading, rotation=0, ha="right")
        for axes, (task, i) in zip(line, columns):
            axes.set(xticks=[], yticks=[])
            if heading == "scene":
                axes.imshow(scenes.images[i].permute(1, 2, 0).numpy())
                axes.set_title(task)
            elif task in found:
                paint(axes, task, found[task][i], scenes, i)
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def draw_pck(path, results):
    """The percentage of keypoints found over the distance allowed, a line per network and mode."""
    from matplotlib.figure import Figure

    figure = Figure((8, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set(
        title="Corners and tips found in the test scenes (dashed: frozen)",
        xlabel="distance allowed, as a fraction of the longer side of the object's box",
        ylabel="keypoints found, %",
    )
    for heading, found in results.items():
        if "pck" in found:
            style = "--" if heading.endswith("frozen") else "-"
            axes.plot(FRACTIONS, found["pck"], style, label=heading)
    figure.legend(loc="outside right center", fontsize=7)
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv, runs="folders of finished runs, or their backbone.pt")
    device = join_processes(args.seed)
    if world() > 1:
        fail("this script runs in one process: start it with python, not with torchrun")
    train = load_solids("train")
    test = load_solids("test")
    if args.batch > len(train.images):
        fail(f"--batch {args.batch}: choose at most {len(train.images)}, the training scenes")
    found = candidates(args)
    results = Results("eval_dense", args, device)
    folder = results.folder
    (folder / "outputs").mkdir(exist_ok=True)

    jobs = [(Candidate("no network", None, args.data, args.size, {}), "constant")]
    jobs += [(candidate, "frozen") for candidate in found]
    if args.finetune:  # all but raw pixels, which have no weights
        jobs += [(each, "fine-tuned") for each in found if list(each.network.parameters())]
    settings = {
        "steps": args.steps,
        "lr": args.lr,
        "batch": args.batch,
        "head_seed": args.seed,
        "scenes": [len(train.images), len(test.images)],
    }

    tasks = TASKS if args.only == "all" else [args.only]
    measured = {}  # {network and mode: scores}
    outputs = {}  # {network and mode: {task: outputs for the first scenes}}
    for candidate, mode in jobs:
        heading = f"{candidate.name}, {mode}"
        measured[heading] = {}
        outputs[heading] = {}
        for task in tasks:
            # New weights, or other settings, have outputs of their own.
            name = f"{task} {heading} {candidate.about} {settings} {args.size} {args.seed}"
            file = folder / "outputs" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npy"

            def measure():
                output = train_and_test(candidate, task, mode, train, test, settings, device)
                replace_file(file, lambda part: np.save(part, output[:SHOWN].numpy()))
                return scores(task, output, test)

            measured[heading] |= results.measure(f"{task}, {mode}", candidate, measure, **settings)
            if file.exists():
                outputs[heading][task] = torch.from_numpy(np.load(file))

    draw_scenes(folder / "scenes.png", tasks, outputs, test)
    draw_pck(folder / "pck.png", measured)
    print0(f"\n{table(measured)}\n\n{folder}: pck.png, results.jsonl, scenes.png")


if __name__ == "__main__":
    main()
