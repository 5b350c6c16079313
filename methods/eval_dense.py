"""Dense tasks: what a network knows at each place of an image, not of the image as a whole.
Hypercolumns: Hariharan, Arbelaez, Girshick, Malik, CVPR 2015. https://arxiv.org/abs/1411.5752
Surface normals: Fouhey, Gupta, Hebert, ICCV 2013. https://doi.org/10.1109/ICCV.2013.421
Depth: Eigen, Puhrsch, Fergus, NeurIPS 2014. https://arxiv.org/abs/1406.2283
Keypoints: Yang, Ramanan, TPAMI 2013. https://doi.org/10.1109/TPAMI.2012.261

Idea. Features of a whole image tell what is seen, but not where. Four tasks ask for an answer at
every pixel of rendered scenes, the data set `solids`: 1,000 to train on, 250 with other textures to
test. A linear head that looks at one place (a 1x1 convolution) reads the answer off the maps of a
network, its features before they are pooled. Frozen, the network does not change, so the maps
themselves must hold the answer. Fine-tuned, all its weights and the statistics of its batch-norm
change; the untrained network then starts from scratch.

Notation. The maps are those of ALL stages of a ResNet (its first layer, then layer1 to layer4), or
the patches of a ViT after four evenly spaced blocks. Networks of patches (cpc) have one map. For
raw pixels it is the image, averaged to at most 32 x 32, with the colours of the 7 x 7 pixels around
each place; k-means features have no maps. The head standardises each map per channel (batch-norm
without scale and offset), resizes what it reads off each to the 48 x 48 pixels of a scene, and adds
it. Scenes are enlarged so that the maps have places enough; most networks were made for smaller
images. Scores are over all pixels of all test scenes; sky has no normal and no depth.

    segmentation  The shape at a pixel, one of 8, or the background. miou: intersection / union,
                  percent, the mean of these 9 classes; object_iou: that of objects of any shape.
    normals       The direction of the surface, a unit vector n. The error is arccos(n . n_true).
                  angle: its mean in degrees; median; 11.25, 22.5, 30: the percentage of pixels with
                  at most this error. object_ is over the pixels of objects, all_ over all. The flat
                  floor, 78 % of the pixels, decides all_, the losses and depth: compare by object_.
    depth         The depth d along the optical axis, where objects are about 1 wide.
                  rmse = sqrt(mean (d - d_true)^2); abs_rel = mean |d - d_true| / d_true.
    keypoints     Corners and tips of solids, by a heat map. For each object its box and the number
                  n of its visible points are given. The n highest peaks in and around this box are
                  the answer, paired with the points so that the sum of distances is least. The
                  error of a pair is its distance / the longer side of the box. pck_0.1: percentage
                  of points whose error is at most 0.1; auc: its mean over limits from 0 to 0.2.
                  The true maps, merged per scene, have pck_0.1 94.0 and auc 89.0: boxes overlap.

The row "no network" gives one answer for all pixels that is good for the training scenes: for miou
background, for object_iou any shape; for all_ the mean normal, for object_ that of objects; for
rmse the mean depth, for abs_rel the depth of least mean relative error. For keypoints it gives one
answer for all boxes, where points lie in those of the training scenes: pck_0.1 20.1 and auc 19.3.
The learning rates were not tuned here; --lr-trunk is that of eval_finetune.py.

Run.
    python methods/eval_dense.py runs/simclr-emoji-0
    python methods/eval_dense.py runs/*-emoji-* --only normals --no-finetune
It writes results.jsonl, scenes.png, pck.png and, to draw them from, outputs/ into --out, by default
runs/eval_dense. What is in results.jsonl is not measured again. Most default runs take two or three
minutes of one CPU core, networks with larger maps (jigsaw, counting, context_prediction) eight, a
ViT fifteen, so choose --size 48 for it.

Differs from the papers. (This file | the paper.)
    1. Keypoints: without names, paired by least distance, their number known | named joints.
    2. Depth: squared error | a scale-invariant error of logarithms.
"""

import copy
import hashlib
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import Candidate, Results, candidates, join_processes, parse, print0, replace_file
from kernels.collectives import fail, world
from kernels.maps import MapHead, answers, fit, map_source, settings_of, ways_to_use
from kernels.readers import load_solids

KIND = "evaluation"  # the tests ask for what is due to each kind
FRACTIONS = torch.linspace(0, 0.2, 21, dtype=torch.float64)  # of the longer side of a box
WINDOW = 2  # pixels: the next peak lies outside the 5 x 5 pixels around one
MARGIN = 2  # pixels around a box: a third of the points lie just outside their box

# The measure.


def segmentation_scores(predicted, truth, classes):
    """Intersection over union of each class, over all pixels together, and its mean, in percent.
    A class that neither has is -1, and left out of the mean. predicted, truth: (N, H, W) ints."""
    # One number per pair (true, predicted): counting them gives the confusion matrix.
    pairs = classes * truth.long() + predicted.long()
    counts = pairs.flatten().bincount(minlength=classes**2).view(classes, classes).double()
    shared = counts.diag()
    either = counts.sum(0) + counts.sum(1) - shared
    iou = 100 * shared / either  # nan for a class that neither has
    return {"miou": iou.nanmean().item(), "iou": iou.nan_to_num(-1).tolist()}


def normal_scores(predicted, truth, pixels):
    """Angles in degrees over all valid pixels: mean, median, and the percentage within limits; {}
    if there is no such pixel. predicted: (N, 3, H, W) of any length; truth: unit vectors, 0 where
    there is no surface. pixels: "all" or "object", with which the names begin."""
    valid = truth.any(1)  # (N, H, W)
    cosine = F.cosine_similarity(predicted.double(), truth.double(), dim=1)[valid]
    angle = cosine.clamp(-1, 1).arccos().rad2deg()
    if not len(angle):
        return {}
    found = {f"{pixels}_angle": angle.mean().item()}
    found[f"{pixels}_median"] = angle.quantile(0.5).item()
    for limit in (11.25, 22.5, 30):
        found[f"{pixels}_{limit}"] = 100 * (angle <= limit).double().mean().item()
    return found


def depth_scores(predicted, truth):
    """Errors over all valid pixels: rmse in units of the scene, abs_rel a ratio.
    predicted, truth: (N, H, W); truth is 0 where there is no surface."""
    valid = truth > 0
    true = truth[valid].double()
    error = predicted[valid].double() - true
    return {
        "rmse": error.square().mean().sqrt().item(),
        "abs_rel": (error.abs() / true).mean().item(),
    }


def point_errors(predicted, truth):
    """The distances (n,) of true points (n, 2) from predicted ones (n, 2), in pairs of one each,
    those of least total distance."""
    from scipy.optimize import linear_sum_assignment  # here, so --help need not wait for it

    apart = (truth[:, None].double() - predicted.double()).norm(dim=2)  # (n, n)
    return apart[linear_sum_assignment(apart.numpy())]


def pck_scores(errors):
    """Errors (n,), as fractions of the side of a box -> pck: the percentage that is at most each of
    FRACTIONS, a curve; auc: the area under it by trapezoids, 100 at best; pck_0.1: the curve at
    0.1."""
    curve = 100 * (errors[:, None] <= FRACTIONS + 1e-9).double().mean(0)  # 1e-9: 0.1 counts at 0.1
    area = torch.trapezoid(curve, FRACTIONS) / FRACTIONS[-1]
    return {
        "pck": curve.tolist(),
        "pck_0.1": curve[10].item(),  # FRACTIONS[10] is 0.1
        "auc": area.item(),
    }


def pixels_around(box, side):
    """The pixels of a box x0, y0, x1, y1 (4,), with MARGIN more on each side, in an image: a mask
    (side, side), and the centres of the k pixels in it, x and y, (k, 2)."""
    axis = torch.arange(side) + 0.5
    centres = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2)
    after = centres > box[:2] - MARGIN
    inside = (after & (centres < box[2:] + MARGIN)).all(2)
    return inside, centres[inside]


def peaks(heat, box, count):
    """The highest pixel of a map of logits (H, H) in and around a box (4,), then the highest
    outside the 5 x 5 pixels around it, and so on. Each is refined to the centre of mass of
    exp(heat) over its 5 x 5 pixels. Returns x and y in pixels, (count, 2); in a box too small for
    so many, its first pixel again."""
    inside, centres = pixels_around(box, len(heat))
    logits = heat[inside]  # (k,)
    rest = logits.clone()
    found = []
    for _ in range(count):
        highest = centres[rest.argmax()]
        near = (centres - highest).abs().amax(1) <= WINDOW
        mass = logits[near].softmax(0)
        found.append(mass @ centres[near])
        rest[near] = -torch.inf
    return torch.stack(found)


def keypoint_scores(heat, scenes):
    """pck_scores of the peaks in the boxes of all objects; {} if no object has a visible point.
    heat: logits, one map per scene (N, 1, H, W) or one per object (N, objects, H, W)."""
    errors = []
    for scene, number, box, points in scenes.visible_points():
        # One map per scene: the number modulo 1 is 0.
        found = peaks(heat[scene, number % heat.shape[1]], box, len(points))
        side = (box[2:] - box[:2]).max().double()
        errors.append(point_errors(found, points) / side)
    return pck_scores(torch.cat(errors)) if errors else {}


def scores(task, output, scenes):
    """What a head's output (N, channels, H, W) for some scenes is worth: a dict."""
    if task == "segmentation":
        shapes = output.argmax(1)
        by_shape = segmentation_scores(shapes, scenes.classes, output.shape[1])
        object_or_not = segmentation_scores(shapes > 0, scenes.classes > 0, 2)
        return by_shape | {"object_iou": object_or_not["iou"][1]}
    if task == "normals":
        everywhere = normal_scores(output, scenes.normals, "all")
        on_objects = scenes.normals * (scenes.classes[:, None] > 0)
        return everywhere | normal_scores(output, on_objects, "object")
    if task == "depth":
        return depth_scores(output[:, 0], scenes.depth)
    return keypoint_scores(output, scenes)


# The evaluation.

TASKS = {"segmentation": 9, "normals": 3, "depth": 1, "keypoints": 1}  # channels of the output
COLUMNS = ("miou", "object_iou", "all_angle", "all_median", "object_angle", "object_median",
           "object_11.25", "object_22.5", "object_30", "rmse", "abs_rel", "pck_0.1", "auc")
SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "seed": (0, "seed of the untrained network and of the order of scenes"),
    "data": ("solids", "the scenes", ("solids",)),
    "size": (96, "side to which the scenes are resized for the network, pixels", "[1, inf)"),
    "only": ("all", "which task", ("all", *TASKS)),
    "finetune": (True, "also train all weights, anew for each task"),
    "batch": (16, "scenes per step", "[1, 1000]"),
    "steps": (200, "training steps for each task", "[1, inf)"),
    "lr_head": (3e-3, "learning rate of the head at its highest"),
    "lr_trunk": (1e-3, "the same of a network that is fine-tuned"),
}
SHOWN = 2  # test scenes in the pictures
# Standard deviation of where a point lies in a box, as a part of its sides. On a fifth of the
# training scenes 0.01, 0.02, 0.03, 0.05 and 0.08 have pck_0.1 16.3, 19.5, 20.5, 17.8 and 18.4.
# results.jsonl does not hold it: after a change choose another --out.
SPREAD = 0.03


def targets(task, scenes):
    """What the head is trained for: a tensor, one row per scene."""
    if task == "segmentation":
        return scenes.classes.long()  # (N, H, W)
    if task == "normals":
        return scenes.normals  # (N, 3, H, W)
    if task == "depth":
        return scenes.depth[:, None]  # (N, 1, H, W)

    # For each object a distribution over the pixels in and around its box, Gaussians (sigma one
    # pixel) at its visible points; -1 elsewhere, and everywhere if the object has no points.
    heat = torch.full(
        (*scenes.keypoints.shape[:2], *scenes.classes.shape[1:]), -1.0
    )
    for scene, number, box, points in scenes.visible_points():
        inside, centres = pixels_around(box, heat.shape[3])
        squared = (centres[:, None] - points).square().sum(2)  # distances (k, n)
        density = torch.exp(-squared / 2).sum(1)
        heat[scene, number][inside] = density / density.sum()
    return heat


def constant(task, target):
    """The output (channels,) for all pixels that has the least loss; of heat maps 0."""
    if task == "keypoints":
        return torch.zeros(TASKS[task])
    if task == "segmentation":
        # A class with n pixels and weight n^-1/2 pulls like n^1/2 pixels, so the best logit is
        # log(n)/2; n + 1, since a shape may be missing.
        counts = target.flatten().bincount(minlength=TASKS[task])
        return (counts + 1).log() / 2
    return target.sum((0, 2, 3)) / target.any(1).sum()  # over the pixels that are valid


def heat_of_boxes(train, test):
    """Where points lie in a box, whatever is in it: logits, one map per object of the test scenes
    (N, objects, H, W). They are those of a density, a sum of Gaussians at the first 1,000 points of
    the training scenes, in boxes of side 1."""

    def place(box, points):
        return (points - box[:2]) / (box[2:] - box[:2])

    known = torch.cat([place(box, points) for *_, box, points in train.visible_points()])
    heat = torch.zeros_like(targets("keypoints", test))  # of their shape
    for scene, number, box, _ in test.visible_points():
        inside, centres = pixels_around(box, heat.shape[3])
        apart = torch.cdist(place(box, centres), known[:1000]) / SPREAD
        heat[scene, number][inside] = (-apart.square() / 2).logsumexp(1)
    return heat


def constant_scores(task, train, test):
    """The scores of the row "no network": one answer for all pixels of the test scenes, for each
    measure one that is good for the training scenes; for keypoints one answer for all boxes."""
    if task == "keypoints":
        return keypoint_scores(heat_of_boxes(train, test), test)
    target = targets(task, train)
    constants = {"": constant(task, target)}  # {prefix: answer}; a later one replaces the first
    if task == "segmentation":
        constants["object"] = torch.arange(9)  # logits of the last shape everywhere
    elif task == "normals":
        constants["object"] = constant(task, target * (train.classes[:, None] > 0))
    else:
        # The error |answer - d| / d is least at the median in which d has weight 1/d.
        depth = target[target > 0].double().sort().values
        weight = (1 / depth).cumsum(0)
        constants["abs_rel"] = depth[weight >= weight[-1] / 2][:1]

    found = {}
    for prefix, answer in constants.items():
        output = answer.expand(*test.classes.shape, -1).movedim(3, 1)
        measured = scores(task, output, test)
        found |= {name: measured[name] for name in measured if name.startswith(prefix)}
    return found


def loss_of(task, output, target, start):
    """The loss of a batch. Shapes that are rare weigh more, or nearly everything would be called
    background. output: (n, channels, H, W); target: rows of targets(); start: constant()'s."""
    if task == "segmentation":
        # start is log(count + 1) / 2, so the weight is one over the root of a shape's pixels.
        return F.cross_entropy(output, target, (-start).exp())
    if task == "keypoints":  # a softmax over the pixels of each box
        truth = target.flatten(2)  # (n, objects, H W)
        inside = truth >= 0
        heat = output.flatten(2).where(inside, -1e4)  # -1e4: outside a box the softmax is 0
        total = -(truth.clamp(min=0) * heat.log_softmax(2)).sum()
        return total / inside.any(2).sum().clamp(min=1)
    if task == "normals":
        return 1 - F.cosine_similarity(output, target, dim=1)[target.any(1)].mean()
    return F.mse_loss(output[target > 0], target[target > 0])


def train_and_test(candidate, task, frozen, train, test, settings, device):
    """Trains a head on the training scenes. Returns its output for the test scenes, (N, channels,
    H, W). A frozen network is left as it was; a fine-tuned one is a copy."""
    target = targets(task, train).to(device)
    start = constant(task, target)
    side = train.images.shape[3]
    network = candidate.network.to(device, memory_format=torch.channels_last)  # as in training
    if not frozen:
        network = copy.deepcopy(network).requires_grad_(True)
    source = map_source(frozen, network, train.images, candidate.size, device)
    widths = [x.shape[1] for x in source([0])]  # still in eval mode: no statistics change

    head = MapHead(widths, len(start), side, start).to(device)
    trunk = [] if frozen else network.train().parameters()

    def loss(index):
        return loss_of(task, head(source(index)), target[index], start)

    fit(loss, head.parameters(), trunk, len(target), settings)

    network.eval()
    source = map_source(frozen, network, test.images, candidate.size, device)
    return answers(task, head, source, len(test.images))


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
    limits = {}
    if task == "segmentation":
        picture = output.argmax(0) if output.ndim == 3 else output
        limits = {"cmap": "tab10", "vmin": 0, "vmax": 9}
    elif task == "normals":
        normals = F.normalize(output, dim=0).permute(1, 2, 0)
        # A surface that faces us is blue.
        picture = (1 + normals * torch.tensor([1, -1, -1])) / 2
    elif task == "depth":
        picture = output[0].where(scenes.depth[i] > 0, torch.nan)
        limits = {"vmin": 2, "vmax": 12}  # in units of the scene
    else:
        # Half as strong and brighter, so that the points stand out.
        picture = scenes.images[i].permute(1, 2, 0) // 2 + 127
        for scene, _, box, points in scenes.visible_points():
            if scene == i:
                if len(output) == 1:  # an answer; the truth has one map per object
                    points = peaks(output[0], box, len(points))
                # For imshow the centre of the first pixel is 0, for points 0.5.
                axes.plot(*(points.T - 0.5), "o", markersize=3)
    axes.imshow(picture.numpy(), **limits)


def draw_scenes(path, tasks, outputs, scenes, steps):
    """The first scenes, the truth, and below what each network says after this many training
    steps. outputs: {heading: {task: (SHOWN, channels, H, W)}}."""
    from matplotlib.figure import Figure  # here, so --help need not wait for it

    columns = [(task, i) for task in tasks for i in range(SHOWN)]
    rows = {"scene": {}, "truth": {task: targets(task, scenes) for task in tasks}, **outputs}
    figure = Figure((15, 1.3 * len(rows) + 1.2), layout="constrained")
    figure.suptitle(
        f"{SHOWN} test scenes, one column each per task: the scene, the truth, and what a head on "
        f"the maps of each network answers after {steps} training steps.\n"
        "Normals: blue faces the camera, green is up. Depth: dark is near, yellow is far. Sky has "
        "neither. Keypoints: one colour per object."
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    if "segmentation" in tasks:  # the colours of a legend are those of tab10 in their order
        for name in scenes.names:
            grid[0, 0].plot([], "s", label=name)
        figure.legend(title="segmentation", loc="outside lower center", ncols=9)
    for line, (heading, found) in zip(grid, rows.items()):
        line[0].set_ylabel(
            textwrap.fill(heading, 24, break_on_hyphens=False), rotation=0, ha="right", va="center"
        )
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

    figure = Figure((11, 9), dpi=110, layout="constrained")
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
    found = candidates(args)
    results = Results("eval_dense", args, device)
    folder = results.folder
    (folder / "outputs").mkdir(exist_ok=True)

    # What is measured: the constant, every frozen network, then those with weights, fine-tuned.
    nothing = Candidate("no network", None, args.data, args.size, {})
    jobs = [(nothing, "constant"), *ways_to_use(found, args.finetune)]
    points = [len(FRACTIONS), FRACTIONS[-1].item(), WINDOW, MARGIN]

    tasks = TASKS if args.only == "all" else [args.only]
    measured = {task: {} for task in tasks}  # {task: {network and mode: scores}}
    outputs = {}  # {network and mode: {task: outputs for the first scenes}}
    for candidate, mode in jobs:
        heading = f"{candidate.name}, {mode}"
        settings = settings_of(args, mode, train, test, points=points)
        for task in tasks:
            # The file's name holds all that changes an output, so two settings never share one.
            name = f"{task} {heading} {candidate.about} {settings} {args.size} {args.seed}"
            file = folder / "outputs" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.pt"

            def measure():
                if mode == "constant":
                    return constant_scores(task, train, test)
                output = train_and_test(
                    candidate, task, mode == "frozen", train, test, settings, device
                )
                replace_file(file, lambda part: torch.save(output[:SHOWN].clone(), part))
                return scores(task, output, test)

            measured[task][heading] = results.measure(
                f"{task}, {mode}", candidate, measure, **settings
            )
            if file.exists():
                outputs.setdefault(heading, {})[task] = torch.load(file, weights_only=True)

    draw_scenes(folder / "scenes.png", tasks, outputs, test, args.steps)
    if "keypoints" in measured:
        draw_pck(folder / "pck.png", measured["keypoints"])
    for task, of_task in measured.items():
        print0(f"\n{task}, after {args.steps} training steps\n{table(of_task)}")
    print0(f"\n{folder}: results.jsonl and the pictures")


if __name__ == "__main__":
    main()
