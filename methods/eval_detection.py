"""Detection: find every object of a scene, say what it is, and draw a box around it.
Measure: Lin et al., Microsoft COCO, ECCV 2014. https://arxiv.org/abs/1405.0312
Official code of the measure: https://github.com/cocodataset/cocoapi
Detector: Tian, Shen, Chen, He, FCOS, ICCV 2019. https://arxiv.org/abs/1904.01355

Idea. A detector is a network that finds objects. It is built upon the maps of another network, its
trunk: the trunk's features before they are pooled. Torchvision's FCOS asks of each place of a map:
is this the middle of an object, of which shape, and how far away are the four sides of its box? It
is trained on the 1,000 rendered scenes of the data set `solids` and tested on 250 with other
textures. Frozen, a trunk does not change; fine-tuned, all its weights and the statistics of its
batch-norm do. The untrained trunk is treated in the same way; fine-tuned, it starts from scratch.
The baseline of raw pixels, which cannot be fine-tuned, has one map: the image, averaged to at most
32 x 32, with the colours of the 7 x 7 pixels around each place.

Notation. The trunk's maps are those of ALL stages of a ResNet, or the patches of a ViT after four
evenly spaced blocks. Each is standardised per channel, reduced to 64 channels by a 1x1 convolution,
and averaged or enlarged to 12 x 12 places; their sum is one map. Two branches of two 3x3
convolutions read it. FCOS resizes the scenes for the trunk bilinearly; all other evaluations use an
antialiased bicubic filter. The score of a box is the root of: the probability of the shape x how
near the place is to the middle of the object. Of two boxes of a shape that overlap by more than 0.6
the one with the higher score is kept (torchvision's defaults).

The measure is COCO's. The overlap of two boxes is the area that they share / the area that they
cover together (intersection over union). In each image the boxes that were found come in the order
of their scores, the best first. Each takes one true box of its shape: of those that no other box
has taken, and whose overlap with it is at least a threshold t, the one with the largest overlap.
Then it is right. If there is no such box, it is wrong. Over all images, again the best score first,

    precision = right / found so far          recall = right / true boxes
    AP(t)     = mean over 101 recalls r = 0, 0.01, ..., 1 of the highest precision at recall >= r

    ap50, ap75  AP(0.5) and AP(0.75), averaged over the shapes, in percent
    ap          the mean over t = 0.5, 0.55, ..., 0.95

Run.
    python methods/eval_detection.py runs/simclr-emoji-0
    python methods/eval_detection.py runs/*-emoji-* --no-finetune
    python methods/eval_detection.py runs/*-emoji-* --steps 2000
It writes results.jsonl and boxes.png into --out, by default runs/eval_detection. What is in
results.jsonl is not measured again. A training that diverges ends the script without a table: give
the other runs alone to continue, or lower rates to measure anew.
Most default runs take about three minutes of one CPU core, networks with larger maps (jigsaw,
counting, context_prediction) seven, a ViT twenty, so choose --size 48 for it.

Differs from the papers. (This file | FCOS.)
    1. One map of 64 channels, two convolutions in a branch | five maps of 256 channels, four.
    2. Adam, 500 steps of 16 scenes, rates not tuned | SGD, 90,000 steps of 16 photographs.
    3. Torchvision's: distances from the corner of a place, generalised IoU, places near the middle
       of an object, the root of the score | from its middle, IoU, all places in a box, no root.
"""

import copy
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import Results, candidates, join_processes, parse, print0, replace_file
from kernels.collectives import fail, world
from kernels.maps import MapHead, fit, maps, settings_of, ways_to_use
from kernels.readers import load_solids
from kernels.views import MEAN, STD

KIND = "evaluation"  # the tests ask for what is due to each kind
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # boxes of one image: of each shape in the measure, of all from the detector

# The measure.


def overlaps(boxes, others):
    """Intersection over union of boxes (n, 4) and others (m, 4), x0, y0, x1, y1 -> (n, m)."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = (high - low).clip(0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    other_area = (others[:, 2:] - others[:, :2]).prod(1)
    return shared / (area[:, None] + other_area - shared)


def right_boxes(boxes, scores, truth):
    """Which of the boxes of one shape that were found in one image are right. boxes (n, 4), scores
    (n,), truth (m, 4). Returns of the best MOST of them, the best first, the scores (n,) and
    whether each is right at each threshold, bool (n, 10)."""
    order = np.argsort(-scores, kind="stable")[:MOST]
    overlap = overlaps(boxes[order], truth)
    right = np.zeros((len(order), len(THRESHOLDS)), bool)
    for t, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(truth), bool)
        for i, row in enumerate(overlap):
            reached = np.flatnonzero(free & (row >= threshold))
            if len(reached):
                # Of equal overlaps the last, as COCO's code.
                best = reached[row[reached] == row[reached].max()][-1]
                free[best] = False
                right[i, t] = True
    return scores[order], right


def average_precision(scores, right, count):
    """AP of one shape at one threshold. scores, right: (n,), of all images; count: true boxes."""
    order = np.argsort(-scores, kind="stable")
    hits = right[order].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    place = np.searchsorted(hits / count, RECALLS)  # of the first box that reaches the recall
    return np.append(highest, 0)[place].mean()  # 0 where the recall is never reached


def coco_scores(found, truth, shapes):
    """found: per image a dict of arrays: boxes (n, 4), scores (n,), labels (n,); truth: the same
    without scores. labels: 1 to shapes. Returns ap, ap50, ap75 in percent, and the ap of each
    shape, -1 and not in the means if the truth has none of it. Exits with a one-line message if no
    image has a true box."""
    ap = np.full((shapes, len(THRESHOLDS)), np.nan)
    for label in range(1, shapes + 1):
        scores = []
        right = []
        count = 0
        for image, true in zip(found, truth):
            mine = image["labels"] == label
            # Numbers of 64 bits, as in COCO's code.
            boxes = image["boxes"][mine].astype(float)
            true_boxes = true["boxes"][true["labels"] == label].astype(float)
            ordered, of_image = right_boxes(boxes, image["scores"][mine], true_boxes)
            scores.append(ordered)
            right.append(of_image)
            count += len(true_boxes)
        if count:
            scores = np.concatenate(scores)
            for t, of_threshold in enumerate(np.concatenate(right).T):
                ap[label - 1, t] = average_precision(scores, of_threshold, count)
    if np.isnan(ap).all():
        fail("no image has a true box: there is nothing to find")
    ap *= 100
    return {
        "ap": np.nanmean(ap),
        "ap50": np.nanmean(ap[:, 0]),
        "ap75": np.nanmean(ap[:, 5]),
        "ap_of_shapes": np.nan_to_num(ap.mean(1), nan=-1).tolist(),
    }


# The evaluation.

SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "seed": (0, "seed of the untrained network, of the detector, and of the order of scenes"),
    "data": ("solids", "the scenes", ("solids",)),
    "size": (96, "side to which the scenes are resized for the network, pixels", "[24, inf)"),
    "finetune": (True, "also train all weights"),
    "batch": (16, "scenes per step", "[1, 1000]"),
    "steps": (500, "training steps of the detector", "[1, inf)"),
    "lr_head": (2e-3, "learning rate of the detector at its highest"),
    "lr_trunk": (1e-3, "the same of a trunk that is fine-tuned"),
}
GRID = 12  # places of the detector's map along a side
CHANNELS = 64  # of this map
CONVS = 2  # in each of the detector's branches
LOWEST_SCORE = 0.01  # of a box that is kept: in AP weak ones count, too
SHOWN = 6  # test scenes in the picture
DIVERGED = "are infinite or not a number: choose lower rates (--lr-head, --lr-trunk)"


class OneMap(nn.Module):
    """Normalised images -> one map (n, CHANNELS, GRID, GRID) for the detector, read off the maps of
    a network. A frozen network stays in evaluation mode and gets no gradient."""

    out_channels = CHANNELS  # FCOS asks for it

    def __init__(self, network, size, frozen):
        super().__init__()
        self.network = network
        self.frozen = frozen
        with torch.no_grad():
            found = maps(network, torch.zeros(1, 3, size, size))
        widths = [x.shape[1] for x in found]
        self.reduce = MapHead(widths, CHANNELS, GRID)

    def train(self, mode=True):
        super().train(mode)
        self.network.train(mode and not self.frozen)
        return self

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found = maps(self.network, x)
        if self.frozen and not all(stage.isfinite().all() for stage in found):
            fail("some maps of this network are infinite or not a number: leave it out")
        return self.reduce(found)


def detector(network, size, frozen, shapes):
    """Torchvision's FCOS with one map instead of five, on a trunk: a network whose input is a list
    of images, each (3, H, W) in [0, 1]. shapes: how many there are."""
    one_map = OneMap(network, size, frozen)
    classes = 1 + shapes  # 0 is not used
    return FCOS(
        one_map,
        num_classes=classes,
        min_size=size,
        max_size=size,
        image_mean=MEAN,
        image_std=STD,
        size_divisible=1,
        # It has no anchors: this is the side of a place, the unit of distances. Torchvision rounds
        # half of it, so it must be even.
        anchor_generator=AnchorGenerator(((size // GRID,),), ((1.0,),)),
        head=FCOSHead(CHANNELS, 1, classes, num_convs=CONVS),
        score_thresh=LOWEST_SCORE,
        detections_per_img=MOST,
    )


def train_and_test(candidate, frozen, train, test, settings, device):
    """Trains a detector on the training scenes. Returns what it finds in each test scene, a dict of
    arrays: boxes (n, 4) in pixels of the scene, scores (n,), labels (n,)."""
    torch.manual_seed(settings["head_seed"])
    network = candidate.network.cpu()  # OneMap() asks it for the number of its channels
    if not frozen:
        network = copy.deepcopy(network).requires_grad_(True)
    model = detector(network, candidate.size, frozen, len(train.names) - 1)
    model = model.to(device, memory_format=torch.channels_last).train()
    images = train.images.to(device).float() / 255
    truth = []
    for boxes, labels in zip(train.boxes, train.labels):
        truth.append({"boxes": boxes.to(device), "labels": labels.to(device)})

    def loss(index):
        losses = model([images[i] for i in index], [truth[i] for i in index])
        return sum(losses.values())  # of the shape, the box, and how near its middle is

    # The 1x1 convolutions that read the maps are new, as the detector is.
    head = [*model.backbone.reduce.parameters(), *model.head.parameters()]
    trunk = [] if frozen else network.parameters()
    fit(loss, head, trunk, len(images), settings)

    model.eval()
    # A box whose score is not a number would be left out in silence.
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        fail(f"some weights of the detector {DIVERGED}")
    found = []
    with torch.no_grad():
        for part in test.images.to(device).split(50):
            found += model(list(part.float() / 255))
    arrays = []
    for image in found:
        if not all(part.isfinite().all() for part in image.values()):
            fail(f"some boxes or scores {DIVERGED}")
        arrays.append({name: part.cpu().numpy() for name, part in image.items()})
    return arrays


def best_boxes(found, truth):
    """For the picture: as many of the boxes found in an image as it has objects, those with the
    best scores, [(x0, y0, x1, y1, label), ...]."""
    order = np.argsort(-found["scores"], kind="stable")[: len(truth["labels"])]
    rows = np.concatenate([found["boxes"], found["labels"][:, None]], 1)
    return rows[order].round(2).tolist()


def table(results):
    """{network and mode: scores} as text, one line each."""
    width = max(map(len, results)) + 2
    names = ("ap", "ap50", "ap75")
    lines = [" " * width + "".join(f"{name:>9}" for name in names)]
    for heading, found in results.items():
        lines.append(f"{heading:{width}}" + "".join(f"{found[name]:9.1f}" for name in names))
    return "\n".join(lines)


def draw_boxes(path, shown, scenes, steps):
    """The first scenes with their true boxes, and below the best that were found after this many
    training steps. shown: {heading: per scene [(x0, y0, x1, y1, label), ...]}."""
    from matplotlib.figure import Figure  # here, so --help need not wait for it
    from matplotlib.patches import Rectangle

    truth = []
    for boxes, labels in zip(scenes.boxes[:SHOWN], scenes.labels):
        truth.append(torch.cat([boxes, labels[:, None]], 1).tolist())
    rows = {"true boxes": truth, **shown}
    columns = len(truth)
    size = (1.9 * columns + 2, 1.9 * len(rows) + 1.1)
    figure = Figure(size, dpi=90, layout="constrained")
    figure.suptitle(
        f"{columns} test scenes: their true boxes, and the boxes that a detector on each network "
        f"finds after {steps} training steps:\n"
        "as many as there are objects, those with the best scores. One colour per shape."
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    shapes = []
    for label, name in enumerate(scenes.names[1:], 1):  # 0 is the background
        box = Rectangle((0, 0), 1, 1, fill=False, lw=2)
        box.set(edgecolor=f"C{label}", label=name)
        shapes.append(box)
    figure.legend(handles=shapes, loc="outside lower center", ncols=len(shapes))
    for line, (heading, found) in zip(grid, rows.items()):
        name = textwrap.fill(heading, 24, break_on_hyphens=False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, image, boxes in zip(line, scenes.images, found):
            side = image.shape[1]
            picture = image.permute(1, 2, 0).numpy()
            axes.imshow(picture, extent=(0, side, side, 0))
            axes.set(xticks=[], yticks=[])
            for x0, y0, x1, y1, label in boxes:
                # On a wider white one, so that a box is seen on any ground.
                for width, colour in ((3.5, "white"), (2, f"C{int(label)}")):
                    box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False)
                    box.set(linewidth=width, edgecolor=colour)
                    axes.add_patch(box)
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv, runs="folders of finished runs, or their backbone.pt")
    device = join_processes(args.seed)
    if world() > 1:
        fail("this script runs in one process: start it with python, not with torchrun")
    if args.size % (2 * GRID):
        fail(f"--size {args.size}: choose a multiple of {2 * GRID}, twice the places of its map")
    train = load_solids("train")
    test = load_solids("test")
    results = Results("eval_detection", args, device)
    numbers = [GRID, CHANNELS, CONVS, LOWEST_SCORE, MOST]
    truth = []
    for boxes, labels in zip(test.boxes, test.labels):
        truth.append({"boxes": boxes.numpy(), "labels": labels.numpy()})
    measured = {}
    for trunk, mode in ways_to_use(candidates(args), args.finetune):
        settings = settings_of(args, mode, train, test, detector=numbers)

        def measure():
            found = train_and_test(trunk, mode == "frozen", train, test, settings, device)
            scores = coco_scores(found, truth, len(test.names) - 1)
            return scores | {"shown": list(map(best_boxes, found[:SHOWN], truth))}

        heading = f"{trunk.name}, {mode}"
        measured[heading] = results.measure(f"detection, {mode}", trunk, measure, **settings)

    folder = results.folder
    shown = {heading: found["shown"] for heading, found in measured.items()}
    draw_boxes(folder / "boxes.png", shown, test, args.steps)
    print0(f"\nafter {args.steps} training steps\n{table(measured)}")
    print0(f"\n{folder}: boxes.png, results.jsonl")


if __name__ == "__main__":
    main()
