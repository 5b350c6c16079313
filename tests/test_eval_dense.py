"""methods/eval_dense.py: its scores against scikit-learn and by hand; a head learns what the maps
hold and nothing else; a frozen network is left as it was; it continues after a kill."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, call_main, noise
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from test_eval_features import write_run

import common
from common import Candidate, backbone, pixels, read_lines
from kernels.maps import MapHead, fit, maps, prepare, resizing, schedule
from kernels.readers import Scenes, load_solids
from methods import eval_dense
from methods.eval_dense import (
    FRACTIONS,
    constant,
    constant_scores,
    depth_scores,
    heat_of_boxes,
    keypoint_scores,
    loss_of,
    normal_scores,
    pck_scores,
    peaks,
    pixels_around,
    point_errors,
    segmentation_scores,
    targets,
    train_and_test,
)

SHAPES = ("background", "sphere", "box", "cylinder", "cone")
SHAPES += ("torus", "capsule", "octahedron", "cross")


# -------- Scenes ----------------------------------------------------------------------------------


def make_scenes(count, seed=0, side=16):
    """Scenes of one flat square each, whose colour tells the shape, and of which the normal and the
    depth follow. Its corners are the keypoints; the sky is the top row."""
    rng = np.random.default_rng(seed)
    images = np.full((count, 3, side, side), 120)
    classes = np.zeros((count, side, side), int)
    depth = np.full((count, side, side), 8.0)
    normals = np.zeros((count, 3, side, side))
    normals[:, 1] = -1
    keypoints = np.zeros((count, 4, 9, 3))
    keypoints[:, :, :, 2] = -1
    boxes = []
    labels = []
    for i in range(count):
        x, y = rng.integers(1, side - 7, 2)
        width = int(rng.integers(5, 7))
        label = int(rng.integers(1, 4))
        rows = slice(y, y + width)
        columns = slice(x, x + width)
        images[i, :, rows, columns] = 0
        images[i, label - 1, rows, columns] = 250
        classes[i, rows, columns] = label
        depth[i, rows, columns] = 2.0 + label
        normals[i, :, rows, columns] = np.array([0.6, 0, -0.8])[:, None, None]
        keypoints[i, 0, 0] = x + width / 2, y + width / 2, 1
        for k, (a, b) in enumerate(((0, 0), (0, 1), (1, 0)), 1):
            keypoints[i, 0, k] = x + a * (width - 1) + 0.5, y + b * (width - 1) + 0.5, 1
        keypoints[i, 0, 4] = x + width, y + width, 0  # hidden
        boxes.append(torch.tensor([[x, y, x + width, y + width]]).float())
        labels.append(torch.tensor([label]))
    depth[:, 0] = 0
    normals[:, :, 0] = 0
    none = [torch.ones(1, dtype=torch.int64)] * count
    tensors = [torch.from_numpy(array) for array in (images, classes, depth, normals, keypoints)]
    return Scenes(
        images=tensors[0].byte(),
        instances=(tensors[1] > 0).byte(),
        classes=tensors[1].byte(),
        depth=tensors[2].float(),
        normals=tensors[3].float(),
        boxes=boxes,
        labels=labels,
        areas=none,
        whole=none,
        keypoints=tensors[4].float(),
        names=SHAPES,
    )


TRAIN = make_scenes(40)
TEST = make_scenes(12, seed=1)


# -------- Segmentation ----------------------------------------------------------------------------


def test_intersection_over_union_equals_scikit_learn():
    from sklearn.metrics import jaccard_score

    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.integers(0, 5, (3, 6, 7)))
    other = torch.from_numpy(rng.integers(0, 5, (3, 6, 7)))
    predicted = torch.where(noise(3, 6, 7) > 0, truth, other)
    scores = segmentation_scores(predicted, truth.byte(), 5)
    expected = jaccard_score(truth.flatten(), predicted.flatten(), average=None)
    assert scores["iou"] == pytest.approx(100 * expected)
    assert scores["miou"] == pytest.approx(100 * expected.mean())
    assert segmentation_scores(truth, truth, 5)["miou"] == pytest.approx(100)


def test_intersection_over_union_by_hand():
    """Two pixels of class 1, one found, one false alarm: 1 / 3. Class 2 is only predicted: 0. Class
    3 is nowhere: -1, and not in the mean."""
    truth = torch.tensor([[[0, 1, 1, 0, 0]]])
    predicted = torch.tensor([[[0, 1, 0, 1, 2]]])
    scores = segmentation_scores(predicted, truth, 4)
    assert scores["iou"] == pytest.approx([100 / 4, 100 / 3, 0, -1])
    assert scores["miou"] == pytest.approx((100 / 4 + 100 / 3) / 3)


# -------- Normals and depth -----------------------------------------------------------------------


def turned(degrees):
    """A unit vector that many degrees from the z axis."""
    return torch.tensor([math.sin(math.radians(degrees)), 0, math.cos(math.radians(degrees))])


def test_angles_by_hand():
    degrees = [0, 5, 11.25, 22, 29, 60, 180]
    truth = turned(0).expand(len(degrees), 3).T[None, :, None].clone()  # (1, 3, 1, 7)
    predicted = torch.stack([3 * turned(d) for d in degrees], 1)[None, :, None]  # any length
    scores = normal_scores(predicted, truth, "all")
    assert scores["all_angle"] == pytest.approx(sum(degrees) / 7, abs=1e-3)
    assert scores["all_median"] == pytest.approx(22, abs=1e-3)
    assert scores["all_22.5"] == pytest.approx(400 / 7)
    assert scores["all_30"] == pytest.approx(500 / 7)


def test_pixels_without_a_surface_count_in_neither_normals_nor_depth():
    truth = turned(0)[None, :, None, None].repeat(1, 1, 1, 4)
    truth[..., 2:] = 0
    predicted = turned(90)[None, :, None, None].repeat(1, 1, 1, 4)
    predicted[..., 0] = turned(0)[None, :, None]
    assert normal_scores(predicted, truth, "all")["all_angle"] == pytest.approx(45)
    assert normal_scores(predicted, 0 * truth, "all") == {}

    truth = torch.tensor([[[2.0, 4.0, 0.0]]])
    predicted = torch.tensor([[[3.0, 2.0, 99.0]]])
    assert math.isnan(depth_scores(predicted, 0 * truth)["rmse"])  # null in results.jsonl
    scores = depth_scores(predicted, truth)
    assert scores["rmse"] == pytest.approx(math.sqrt((1 + 4) / 2))
    assert scores["abs_rel"] == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_normals_at_their_limits():
    truth = F.normalize(noise(2, 3, 5, 5), dim=1)
    perfect = normal_scores(truth, truth, "all")
    assert perfect["all_angle"] < 1e-5 and perfect["all_11.25"] == 100
    assert normal_scores(-truth, truth, "all")["all_angle"] == pytest.approx(180, abs=1e-5)
    assert normal_scores(0 * truth, truth, "all")["all_angle"] == pytest.approx(90)  # no direction


def test_normals_of_objects_leave_out_the_floor():
    """The truth but for the floor, which is turned by 90 degrees."""
    on_objects = TEST.classes[:, None] > 0
    output = torch.where(on_objects, TEST.normals, TEST.normals[:, [1, 0, 2]])
    found = eval_dense.scores("normals", output, TEST)
    assert found["object_angle"] < 1e-3 and found["object_11.25"] == 100
    valid = TEST.normals.any(1)
    share = (valid & ~on_objects[:, 0]).sum() / valid.sum()
    assert found["all_angle"] == pytest.approx(90 * share.item(), abs=1e-3)
    assert found["all_median"] == pytest.approx(90) and found["object_median"] < 1e-3


# -------- Keypoints -------------------------------------------------------------------------------


def test_pck_by_hand():
    """Of four points one is exact, one at exactly 0.1, one at 0.15, one far away."""
    errors = torch.tensor([0.0, 0.1, 0.15, 3.0], dtype=torch.float64)
    scores = pck_scores(errors)
    assert scores["pck"] == [25.0] * 10 + [50.0] * 5 + [75.0] * 6
    assert scores["pck_0.1"] == 50
    steps = [25] * 9 + [37.5] + [50] * 4 + [62.5] + [75] * 5  # trapezoids between 21 fractions
    assert scores["auc"] == pytest.approx(sum(steps) / 20)
    assert len(FRACTIONS) == 21 and FRACTIONS[-1] == 0.2
    assert pck_scores(torch.zeros(3))["auc"] == pytest.approx(100)
    assert pck_scores(torch.full((3,), math.inf))["auc"] == 0


def test_points_are_paired_one_to_one():
    """The first prediction is near both true points; each still gets one. By the nearest alone both
    would be right."""
    truth = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    predicted = torch.tensor([[0.0, 1.0], [4.0, 3.0]])
    assert point_errors(predicted, truth).tolist() == [1.0, 4.0]
    assert point_errors(predicted.flip(0), truth).tolist() == [1.0, 4.0]


def heights(*points):
    """A map of logits (12, 12), -9 but for the points (x, y, logit)."""
    heat = torch.full((12, 12), -9.0)
    for x, y, logit in points:
        heat[y, x] = logit
    return heat


def test_peaks_by_hand():
    """(5, 4) is 2 pixels from a higher one; (1, 10) is the third pixel below the box."""
    heat = heights((3, 2, 90), (5, 4, 40), (6, 2, 20), (6, 6, 60), (1, 10, 99))
    box = torch.tensor([1.0, 1.0, 8.0, 8.0])
    before = heat.clone()
    expected = torch.tensor([[3.5, 2.5], [6.5, 6.5], [6.5, 2.5]])
    torch.testing.assert_close(peaks(heat, box, 2), expected[:2])
    torch.testing.assert_close(peaks(heat, box, 3)[2:, 0], torch.tensor([5.5]))  # drawn by (5, 4)
    assert torch.equal(heat, before)
    flat = torch.ones(12, 12)
    assert peaks(flat, torch.tensor([4.0, 4.0, 6.0, 5.0]), 9).shape == (9, 2)  # more than fit


def test_a_peak_is_the_centre_of_mass_around_the_highest_pixel():
    """Of two pixels with weights 3 and 1: a quarter of the way to the lower one. Peaks may lie
    MARGIN pixels outside of a box, but not outside of the image."""
    heat = heights((6, 6, math.log(3) + 30), (7, 6, 30))
    box = torch.tensor([3.0, 3.0, 9.0, 9.0])
    torch.testing.assert_close(peaks(heat, box, 1), torch.tensor([[6.75, 6.5]]))
    for x, y in ((1, 1), (10, 1), (1, 10), (10, 10)):
        found = peaks(heights((x, y, 50)), box, 1)
        torch.testing.assert_close(found, torch.tensor([[x + 0.5, y + 0.5]]))
    assert peaks(heights((0, 5, 50)), box, 1)[0, 0] > 1  # the third pixel to the left
    inside, centres = pixels_around(torch.tensor([0.0, 1.0, 3.0, 4.0]), 5)
    assert inside.sum() == 25 and centres[:6].tolist() == [
        [0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [3.5, 0.5], [4.5, 0.5], [0.5, 1.5]
    ]  # fmt: skip
    assert pixels_around(torch.tensor([0.0, 0.0, 1.0, 1.0]), 12)[0][:3, :3].all()
    assert pixels_around(torch.tensor([0.0, 0.0, 1.0, 1.0]), 12)[0].sum() == 9


def test_true_heat_maps_score_high_and_flat_ones_little():
    heat = targets("keypoints", TEST)
    assert heat.shape == (12, 4, 16, 16) and (heat[:, 1:] == -1).all()  # one object per scene
    inside = heat[:, 0] >= 0
    for scene, (x0, y0, x1, y1) in enumerate(torch.cat(TEST.boxes).int().tolist()):
        box = torch.zeros(16, 16, dtype=torch.bool)
        box[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = True
        assert torch.equal(inside[scene], box)
    assert heat[:, 0].clamp(min=0).sum((1, 2)).allclose(torch.ones(12))
    assert keypoint_scores(as_logits(heat), TEST)["pck_0.1"] == 100
    assert keypoint_scores(0 * heat[:, :1], TEST)["auc"] < 50


def as_logits(heat):
    """Distributions (N, objects, H, W) -> the logits of one map per scene, (N, 1, H, W)."""
    return heat.amax(1, keepdim=True).clamp(min=1e-12).log()


def test_a_map_per_object_is_read_in_the_box_of_the_object():
    """Two objects in one box: of one map per scene both get the peaks of the first."""
    keypoints = torch.full((1, 4, 9, 3), -1.0)
    keypoints[0, 0, 1] = torch.tensor([3.5, 3.5, 1.0])
    keypoints[0, 1, 1] = torch.tensor([9.5, 9.5, 1.0])
    boxes = [torch.tensor([[1.0, 1.0, 12.0, 12.0]] * 2)]
    scenes = TEST._replace(keypoints=keypoints, boxes=boxes, classes=TEST.classes[:1])
    heat = torch.zeros(1, 4, 16, 16)
    heat[0, 0, 3, 3] = heat[0, 1, 9, 9] = 100.0
    assert keypoint_scores(heat, scenes)["pck"] == [100.0] * 21
    assert keypoint_scores(heat[:, :1], scenes)["pck_0.1"] == 50.0


def test_without_a_network_points_lie_where_those_of_other_boxes_do():
    """In TRAIN and TEST at three corners of each box."""
    heat = heat_of_boxes(TRAIN, TEST)
    assert heat.shape == (12, 4, 16, 16)
    for scene, number, box, points in TEST.visible_points():
        inside, centres = pixels_around(box, 16)
        logits = heat[scene, number]
        assert (logits[inside] != 0).all() and (logits[~inside] == 0).all()
        best = centres[logits[inside].argmax()]
        assert (points - best).norm(dim=1).min() < 1
    found = constant_scores("keypoints", TRAIN, TEST)
    assert found == keypoint_scores(heat, TEST) and found["pck_0.1"] > 90
    other = TRAIN._replace(keypoints=TRAIN.keypoints + torch.tensor([3.0, 3.0, 0.0]))
    assert constant_scores("keypoints", other, TEST)["pck_0.1"] < found["pck_0.1"]


def test_what_can_be_reached_in_the_embedded_scenes():
    """The numbers of the docstring: of the true heat maps, without a network, and the share of the
    floor."""
    train = load_solids("train")
    test = load_solids("test")
    text = " ".join(eval_dense.__doc__.split())

    found = keypoint_scores(as_logits(targets("keypoints", test)), test)
    assert f"pck_0.1 {found['pck_0.1']:.1f} and auc {found['auc']:.1f}" in text
    assert found["pck_0.1"] > 93 and found["auc"] > 88

    found = constant_scores("keypoints", train, test)
    assert f"pck_0.1 {found['pck_0.1']:.1f} and auc {found['auc']:.1f}" in text

    floor = (test.classes == 0)[test.depth > 0].double().mean()
    assert f"floor, {100 * floor:.0f} % of the pixels" in text


def test_without_visible_points_there_are_no_numbers():
    """"-" in the table; the loss has nothing to learn from."""
    hidden = TEST._replace(keypoints=TEST.keypoints * torch.tensor([1.0, 1.0, 0.0]))
    assert keypoint_scores(torch.zeros(12, 1, 16, 16), hidden) == {}
    assert eval_dense.scores("keypoints", torch.zeros(12, 1, 16, 16), hidden) == {}
    lines = eval_dense.table({"a": {}, "b": {"auc": 5.0}}).splitlines()
    assert lines[1].split() == ["a", "-"]


def test_visible_points_leave_out_centres_and_hidden_ones():
    found = list(TEST.visible_points())
    assert [scene for scene, *_ in found] == list(range(12))
    assert all(points.shape == (3, 2) for *_, points in found)


# -------- Maps and the head -----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet14", "resnet18", "vit_micro", "vit_mini"])
def test_maps_end_in_what_the_network_returns(arch):
    """The last map, pooled as the network pools it, is its feature; another size works too."""
    torch.manual_seed(0)
    network = backbone(arch, 16, **({"pool": "mean"} if arch.startswith("vit") else {})).eval()
    with torch.no_grad():
        for size in (16, 24):
            x = noise(2, 3, size, size, dtype=torch.float32)
            found = maps(network, x)
            torch.testing.assert_close(found[-1].mean((2, 3)), network(x))
    assert len(found) == (4 if arch.startswith("vit") else 5)


def test_raw_pixels_are_the_colours_around():
    x = noise(1, 3, 9, 9)
    (found,) = maps(pixels(9), x)
    assert found.shape == (1, 147, 9, 9)
    around = found[0, :, 4, 5].view(3, 7, 7)
    assert torch.equal(around, x[0, :, 1:8, 2:9])
    assert found[0, :, 0, 0].view(3, 7, 7)[:, :3].abs().max() == 0  # beyond the border


def test_resizing_is_bilinear_and_a_smaller_map_is_made_of_means():
    for size, side in ((3, 8), (12, 12), (8, 4), (48, 12)):
        x = noise(2, 3, size, size, dtype=torch.float32)
        matrix = resizing(size, side)
        expected = F.interpolate(x, side, mode="bilinear", antialias=True)
        torch.testing.assert_close(matrix @ x @ matrix.T, expected, rtol=1e-5, atol=1e-6)
        if side >= size:
            plain = F.interpolate(x, side, mode="bilinear")
            torch.testing.assert_close(expected, plain, rtol=1e-5, atol=1e-6)
    assert (resizing(48, 12) > 0).any(0).all()  # every place of the larger map counts


def test_head_is_a_1x1_convolution_of_the_stacked_maps():
    """As if the standardised maps had been enlarged first, stacked, and then read."""
    torch.manual_seed(0)
    found = [noise(4, c, s, s, dtype=torch.float32) * 3 + 1 for c, s in ((2, 8), (5, 3))]
    head = MapHead([2, 5], 3, 8)
    torch.nn.init.normal_(head.bias)
    stacked = []
    for x in found:
        variance = x.var((0, 2, 3), False, keepdim=True)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (variance + 1e-5).sqrt()
        stacked.append(F.interpolate(x, 8, mode="bilinear"))
    weight = torch.cat([conv.weight for conv in head.convs], 1)
    expected = F.conv2d(torch.cat(stacked, 1), weight, head.bias)
    torch.testing.assert_close(head(found), expected, rtol=1e-4, atol=1e-5)


def test_prepared_images_are_those_of_the_evaluation():
    """As in common.features: the whole image, resized by the antialiased bicubic filter."""
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    split = common.Split(common.InMemory(TEST.images))
    for size in (16, 24, 8):
        common.features(Spy(), split, size, CPU)
        assert torch.equal(seen[-1], prepare(TEST.images, size))


# -------- What a head learns ----------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A network without weights, as raw pixels are: its map is what `look` makes of the images."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def forward(self, x):
        return self.look(x)


def candidate(network, size=16):
    return Candidate("a", network, "solids", size, {})


def settings(steps, lr, **changes):
    rates = {"lr_head": lr, "lr_trunk": lr}
    return {"steps": steps, **rates, "batch": 8, "head_seed": 0, **changes}


def output(task, network, frozen=True, steps=60, lr=0.06, test=TEST, **changes):
    how = settings(steps, lr, **changes)
    return train_and_test(candidate(network), task, frozen, TRAIN, test, how, CPU)


def result(task, *args, **options):
    return eval_dense.scores(task, output(task, *args, **options), TEST)


@pytest.mark.parametrize("task", ["segmentation", "normals", "depth"])
def test_a_map_that_holds_the_answer_is_read_and_an_empty_one_gives_the_constant(task):
    """The colours of these scenes tell shape, normal and depth. A map of zeros leaves the head at
    its start, which is the best constant."""
    best = {"segmentation": "miou", "normals": "all_angle", "depth": "rmse"}[task]
    nothing = constant_scores(task, TRAIN, TEST)
    empty = result(task, Fixed(lambda x: 0 * x))
    told = result(task, Fixed(lambda x: x))
    assert empty[best] == pytest.approx(nothing[best], rel=0.02)
    if task == "segmentation":
        assert told["object_iou"] > 95 and told["miou"] > 95
    else:
        assert told[best] < 0.5 * nothing[best]


def test_constants_by_hand():
    normals = torch.zeros(1, 3, 1, 4)
    normals[0, :, 0, 0] = turned(0)
    normals[0, :, 0, 1] = turned(90)
    expected = (turned(0) + turned(90)) / 2
    assert constant("normals", normals).tolist() == pytest.approx(expected.tolist())
    assert constant("depth", torch.tensor([[[[2.0, 4.0, 0.0]]]])).tolist() == [3.0]
    counts = [3, 0, 1, 0, 0, 0, 0, 0, 0]
    start = constant("segmentation", torch.tensor([[[0, 0, 0, 2]]]))
    assert start.tolist() == pytest.approx([math.log(count + 1) / 2 for count in counts])
    assert constant("keypoints", targets("keypoints", TEST)).tolist() == [0]


def test_each_measure_has_a_constant_that_is_good_for_it():
    """Normals and depths of TRAIN and TEST: floor (0, -1, 0) and 8; objects (0.6, 0, -0.8) and 3, 4
    or 5. No other constant has a lower abs_rel, on the scenes by which it is chosen."""
    found = constant_scores("normals", TRAIN, TEST)
    assert found["object_angle"] == pytest.approx(0, abs=1e-3) and found["all_angle"] > 5
    output = torch.tensor([0.6, 0, -0.8])[:, None, None].expand(12, 3, 16, 16)
    assert eval_dense.scores("normals", output, TEST)["all_angle"] > found["all_angle"]

    found = constant_scores("segmentation", TRAIN, TEST)
    area = (TEST.classes > 0).double().mean().item()
    assert found["object_iou"] == pytest.approx(100 * area)  # any shape everywhere
    assert found["miou"] == pytest.approx(100 * (1 - area) / 4)  # background, of four classes

    found = constant_scores("depth", TRAIN, TRAIN)
    answers = torch.linspace(2, 9, 71)[:, None, None, None].expand(71, 40, 16, 16)
    tried = [depth_scores(answer, TRAIN.depth) for answer in answers]
    assert found["abs_rel"] <= min(scores["abs_rel"] for scores in tried) + 1e-9
    assert found["rmse"] <= min(scores["rmse"] for scores in tried)

    # Not nearer to the median: weights 1/d. Of one object of depth 2 and two of depth 9 it is 2.
    scenes = TEST._replace(depth=torch.tensor([[[2.0, 9.0, 9.0]]]), classes=torch.zeros(1, 1, 3))
    assert constant_scores("depth", scenes, scenes)["abs_rel"] == pytest.approx(2 * (7 / 9) / 3)


def test_shapes_are_weighted_by_the_root_of_their_frequency():
    """Shares of 15/16 and 1/16, about the counts 15 + 1 and 0 + 1 of two classes: weights 1 to 4.
    The least loss of a constant answer is at the constant with which the head starts."""
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[0, 0, 0] = 1
    start = torch.tensor([15.0, 1.0]).log() / 2
    output = torch.zeros(1, 2, 4, 4)
    output[:, 1] = 2.0
    light, heavy = 15**-0.5, 1.0
    wrong, right = math.log(1 + math.exp(2)), math.log(1 + math.exp(-2))
    expected = (15 * light * wrong + heavy * right) / (15 * light + heavy)
    assert loss_of("segmentation", output, target, start).item() == pytest.approx(expected)

    free = start.clone().requires_grad_()
    loss_of("segmentation", free[:, None, None].expand(1, 2, 4, 4), target, start).backward()
    assert free.grad.abs().max() < 1e-6


def test_losses_are_least_at_the_truth():
    """And do not look at pixels without a surface."""
    for task in ("normals", "depth"):
        target = targets(task, TEST)
        valid = target.any(1, keepdim=True)
        assert loss_of(task, target, target, None).item() == pytest.approx(0, abs=1e-6)
        elsewhere = torch.where(valid, target, torch.full_like(target, 7.0))
        assert loss_of(task, elsewhere, target, None).item() == pytest.approx(0, abs=1e-6)
        assert loss_of(task, target + 1, target, None) > 0.01
    target = targets("segmentation", TEST)
    sure = 50 * F.one_hot(target, 9).permute(0, 3, 1, 2).float()
    assert loss_of("segmentation", sure, target, torch.zeros(9)).item() < 1e-6

    # Heat maps: the cross-entropy of a distribution with itself is its entropy; nothing outside of
    # a box matters, and objects without points count in nothing.
    heat = targets("keypoints", TEST)
    output = heat[:, :1].clamp(min=1e-12).log()
    entropy = -(heat[:, 0].clamp(min=0) * output[:, 0]).sum((1, 2))
    found = loss_of("keypoints", output, heat, None)
    assert found.item() == pytest.approx(entropy.mean().item(), rel=1e-4)
    elsewhere = torch.where(heat[:, :1] >= 0, output, 30.0)
    assert loss_of("keypoints", elsewhere, heat, None) == found
    assert loss_of("keypoints", output, torch.full_like(heat, -1), None) == 0


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_a_frozen_network_is_left_as_it_was_and_a_fine_tuned_one_is_a_copy(arch):
    """To the last bit, with the running statistics of batch-norm."""
    torch.manual_seed(0)
    network = backbone(arch, 16).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    outputs = []
    for frozen in (True, False):
        outputs.append(output("normals", network, frozen, steps=6))
        after = network.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items()), frozen
        assert not network.training
        assert all(p.grad is None for p in network.parameters())
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert torch.equal(output("normals", network, True, steps=6), outputs[0])  # repeats


def test_the_rates_of_head_and_trunk(monkeypatch):
    """They rise for a tenth of the steps and fall by a cosine; Adam's betas do not change. A head
    or trunk with rate 0 stays where it is."""
    seen = []

    class Spy(torch.optim.Adam):
        def step(self):
            seen.append([(group["lr"], *group["betas"]) for group in self.param_groups])
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Spy)
    head, trunk = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    how = settings(20, 0) | {"lr_head": 0.4, "lr_trunk": 0.0}
    fit(lambda index: (head + trunk).sum(), [head], [trunk], 40, how)
    assert trunk.item() == 0 and head.item() < 0
    shares = [0.5, 1] + [(1 + math.cos(math.pi * i / 18)) / 2 for i in range(18)]
    assert [rate for (rate, *_), _ in seen] == pytest.approx([0.4 * share for share in shares])
    assert {tuple(betas) for groups in seen for _, *betas in groups} == {(0.9, 0.999)}

    fit(lambda index: (head + trunk).sum(), [head], [trunk], 40, how | {"lr_trunk": 0.1})
    assert trunk.item() < 0
    for steps in (1, 2, 9, 10, 11):  # of one step the rate is the highest
        rates = [schedule(step, steps) for step in range(steps)]
        assert rates[0] == 1 and min(rates) > 0


@pytest.mark.thorough
def test_fine_tuning_fits_more_than_a_head_on_frozen_maps():
    """Of the scenes that it was trained on: it has the same head, and all other weights, too."""
    network = backbone("resnet14", 16).eval()
    miou = {}
    for frozen in (True, False):
        how = settings(150, 3e-3)
        job = (candidate(network), "segmentation", frozen, TRAIN, TRAIN, how, CPU)
        miou[frozen] = eval_dense.scores("segmentation", train_and_test(*job), TRAIN)["miou"]
    assert miou[False] > miou[True], miou


def relabelled(scenes):
    """The scenes with labels that are all wrong: those of other scenes, in other shapes."""
    turned = {
        name: getattr(scenes, name).flip(0)
        for name in ("instances", "depth", "normals", "keypoints")
    }
    labels = [9 - label for label in scenes.labels[::-1]]
    classes = (9 - scenes.classes.flip(0)) * (scenes.classes.flip(0) > 0)
    return scenes._replace(boxes=scenes.boxes[::-1], labels=labels, classes=classes, **turned)


def test_the_test_scenes_choose_nothing():
    """Neither their labels nor their number changes a prediction."""
    network = backbone("resnet14", 16).eval()
    alone = TEST._replace(images=TEST.images[:3])
    for task in eval_dense.TASKS:
        first = output(task, network, steps=3)
        assert torch.equal(output(task, network, steps=3, test=relabelled(TEST)), first)
        torch.testing.assert_close(output(task, network, steps=3, test=alone), first[:3])
    tuned = [output("depth", network, False, 2, test=test) for test in (TEST, relabelled(TEST))]
    assert torch.equal(*tuned)


class LastStep(torch.optim.Adam):
    """Diverges after the loss of a step is known. For test_eval_detection.py, too."""

    def step(self):
        super().step()
        self.param_groups[0]["params"][0].data.fill_(math.nan)


@pytest.mark.parametrize("steps", [1, 5])
def test_maps_or_answers_that_are_not_finite_end_in_one_sentence(capsys, monkeypatch, steps):
    """Of one step the loss is finite."""
    with pytest.raises(SystemExit):
        output("depth", Fixed(lambda x: x / 0))
    assert "not finite" in capsys.readouterr().err
    if steps == 1:
        monkeypatch.setattr(torch.optim, "Adam", LastStep)
    with pytest.raises(SystemExit):
        output("depth", Fixed(lambda x: x), lr=1e30, steps=steps)
    error = capsys.readouterr().err
    words = "some answers for depth are infinite or not a number" if steps == 1 else "the loss is"
    assert error.startswith(f"error: {words}")
    assert "--lr-head, --lr-trunk" in error and error.count("\n") == 1


# -------- The script ------------------------------------------------------------------------------

QUICK = ["--size", 16, "--steps", 1, "--batch", 4, "--workers", 0]


def run_script(*flags, **patches):
    """main() on the scenes of this file, and the lines of results.jsonl."""
    patches["load_solids"] = lambda split: {"train": TRAIN, "test": TEST}[split]
    patches.setdefault("draw_pck", lambda *_: None)
    patches.setdefault("draw_scenes", lambda *_: None)
    found = call_main_without_data(*flags, *QUICK, **patches)
    found.rows = read_lines(flags[flags.index("--out") + 1] / "results.jsonl")
    return found


def call_main_without_data(*flags, **patches):
    """call_main replaces load_data, which this script does not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_dense, "load_data", None, raising=False)
        return call_main("eval_dense", *flags, **patches)


def test_a_line_per_network_task_and_mode(tmp_path):
    write_run(tmp_path / "a", arch="vit_micro", size=16)
    drawn = {}
    found = run_script(
        tmp_path / "a",
        "--out",
        tmp_path / "out",
        draw_pck=eval_dense.draw_pck,
        draw_scenes=lambda path, tasks, outputs, *_: drawn.update(outputs),
    )
    assert found.code == 0, found.err
    tasks = ["segmentation", "normals", "depth", "keypoints"]
    untrained = "untrained vit_micro, 16 px"
    expected = [("no network", "constant"), ("raw pixels, 16 px", "frozen")]
    expected += [(name, mode) for mode in ("frozen", "fine-tuned") for name in (untrained, "a")]
    lines = [(row["network"], *reversed(row["protocol"].split(", "))) for row in found.rows]
    assert lines == [(*pair, task) for pair in expected for task in tasks]

    row = found.rows[-1]
    assert row["settings"] == {
        "size": 16,
        "steps": 1,
        "lr_head": 3e-3,
        "batch": 4,
        "head_seed": 0,
        "scenes": [40, 12],
        "points": [21, 0.2, 2, 2],
        "lr_trunk": 1e-3,
    }
    rates = {row["protocol"].split(", ")[1]: row["settings"]["lr_trunk"] for row in found.rows}
    assert rates == {"constant": 0, "frozen": 0, "fine-tuned": 1e-3}
    assert row["seed"] == 3 and row["data"] == "solids" and "commit" in row

    # one table per task: one line per network and mode
    names = [f"{name}, {mode}" for name, mode in expected]
    out = found.out.splitlines()
    for task, columns in zip(tasks, (2, 7, 2, 2)):
        start = out.index(f"{task}, after 1 training steps")
        assert len(out[start + 1].split()) == columns
        lines = out[start + 2 : start + 8]
        assert all(line.startswith(f"{name}  ") for line, name in zip(lines, names))
        assert not out[start + 8]
    assert lines[0].split()[-1] == f"{found.rows[3]['result']['auc']:.3g}"  # no network
    assert lines[-1].split()[-1] == f"{found.rows[-1]['result']['auc']:.3g}"
    assert set(drawn) == set(names[1:]) and drawn["a, frozen"]["normals"].shape == (2, 3, 16, 16)
    assert (tmp_path / "out" / "pck.png").stat().st_size > 5000


def test_flags_choose_task_and_mode(tmp_path):
    write_run(tmp_path / "a", arch="vit_micro", size=16)
    flags = [tmp_path / "a", "--out", tmp_path / "out", "--only", "depth"]
    found = run_script(*flags, "--no-finetune", draw_scenes=eval_dense.draw_scenes)
    assert [row["protocol"] for row in found.rows] == ["depth, constant"] + ["depth, frozen"] * 3
    assert "rmse" in found.out and "miou" not in found.out
    assert (tmp_path / "out" / "scenes.png").stat().st_size > 5000


def test_the_picture_says_what_its_colours_are(tmp_path, drawn):
    for tasks in (list(eval_dense.TASKS), ["depth"]):
        eval_dense.draw_scenes(tmp_path / "scenes.png", tasks, {}, TEST, 7)
    everything, depth = drawn
    (legend,) = everything.legends
    assert [text.get_text() for text in legend.get_texts()] == list(TEST.names)
    colours = [to_rgb(handle.get_color()) for handle in legend.legend_handles]
    assert colours == list(colormaps["tab10"].colors[:9])
    assert depth.legends == []
    assert all("after 7 training steps" in figure.get_suptitle() for figure in drawn)


def test_the_picture_of_keypoints_has_the_curves_of_all_networks(tmp_path, drawn):
    curves = {"a, frozen": list(range(21)), "a, fine-tuned": list(range(1, 22))}
    results = {name: {"pck": curve} for name, curve in curves.items()}
    eval_dense.draw_pck(tmp_path / "pck.png", results | {"a, frozen, depth": {"rmse": 1.0}})
    (axes,) = drawn[0].axes
    for line, (name, curve) in zip(axes.lines, curves.items(), strict=True):
        assert line.get_label() == name and list(line.get_ydata()) == curve
        assert list(line.get_xdata()) == pytest.approx([i / 100 for i in range(21)])
        assert line.get_linestyle() == ("--" if name.endswith("frozen") else "-")


class Stop(Exception):
    pass


def test_continues_after_a_kill_and_measures_nothing_twice(tmp_path):
    write_run(tmp_path / "a", arch="vit_micro", size=16)
    flags = [tmp_path / "a", "--out", tmp_path / "out", "--only", "normals"]
    asked = []

    def stopping(candidate, *others):
        if len(asked) == 2:
            raise Stop
        asked.append(candidate.name)
        return train_and_test(candidate, *others)

    with pytest.raises(Stop):
        run_script(*flags, train_and_test=stopping)
    asked.clear()
    drawn = {}

    def draw(path, tasks, outputs, *_):
        drawn.update(outputs)

    def counting(*args):
        asked.append(args[0].name)
        return train_and_test(*args)

    found = run_script(*flags, train_and_test=counting, draw_scenes=draw)
    assert asked == ["a", "untrained vit_micro, 16 px", "a"]
    assert len(found.rows) == 6 and found.out.count("already measured") == 3
    assert all(set(found) == {"normals"} for found in drawn.values()) and len(drawn) == 5

    # what was not changed is not measured again
    asked.clear()
    again = run_script(*flags, train_and_test=counting)
    assert asked == [] and again.rows == found.rows

    # another head; of the runs, too: the outputs of both are kept, and each shows its own
    first = {heading: found["normals"] for heading, found in drawn.items()}
    run_script(*flags, "--seed", 1, train_and_test=counting, draw_scenes=draw)
    assert len(asked) == 5
    name = "a, frozen"
    assert not torch.equal(drawn[name]["normals"], first[name])
    run_script(*flags, train_and_test=counting, draw_scenes=draw)
    assert len(asked) == 5 and torch.equal(drawn[name]["normals"], first[name])

    # the rate of a trunk matters where it is trained, the window of peaks for all
    asked.clear()
    run_script(*flags, "--lr-trunk", 0.1, train_and_test=counting)
    assert asked == ["untrained vit_micro, 16 px", "a"]
    run_script(*flags, train_and_test=counting, WINDOW=1)
    assert len(asked) == 2 + 5


def test_the_table_of_what_is_not_defined():
    lines = eval_dense.table({"a": {"rmse": None, "abs_rel": 0.25}, "b": {"rmse": 2.0}})
    assert [line.split() for line in lines.splitlines()] == [
        ["rmse", "abs_rel"], ["a", "-", "0.25"], ["b", "2", "-"]
    ]


def test_refusals(tmp_path):
    write_run(tmp_path / "a", arch="vit_micro", size=16)

    def refusal(*flags, **patches):
        found = call_main_without_data(tmp_path / "a", *flags, **patches)
        assert found.code == 1 and found.err.startswith("error: ") and found.err.count("\n") == 1
        return found.err

    assert "--only" in refusal("--only", "colours")
    assert "--data" in refusal("--data", "emoji")
    assert "--size 30: choose a multiple of 4" in refusal("--size", 30)
    assert "--batch 1001: choose" in refusal("--batch", 1001)
    assert "one process" in refusal(world=lambda: 2)
