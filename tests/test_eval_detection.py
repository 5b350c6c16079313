"""methods/eval_detection.py: its AP is COCO's, box by box and against pycocotools; the detector
learns; a frozen trunk is left as it was; what is not finite ends in one sentence; the script
continues after a kill."""

import contextlib
import copy
import io
import math

import numpy as np
import pytest
import torch
from conftest import CPU, call_main
from test_eval_dense import TEST, TRAIN, LastStep, relabelled
from test_eval_features import write_run

from common import Candidate, backbone, pixels, read_lines
from methods import eval_detection
from methods.eval_detection import (
    average_precision,
    best_boxes,
    coco_scores,
    overlaps,
    right_boxes,
    train_and_test,
)

# -------- The measure by hand ---------------------------------------------------------------------


def array(*rows):
    return np.array(rows, float).reshape(-1, 4)


def test_overlaps_by_hand():
    """Two squares of 4 x 4 that share 2 x 4; one inside the other; apart; touching."""
    boxes = array((0, 0, 4, 4))
    others = array((2, 0, 6, 4), (1, 1, 3, 3), (9, 9, 10, 10), (4, 0, 8, 4), (0, 0, 4, 4))
    assert overlaps(boxes, others).tolist() == [[8 / 24, 4 / 16, 0, 0, 1]]
    assert overlaps(boxes[:0], others).shape == (0, 5)
    assert overlaps(others, boxes[:0]).shape == (5, 0)


def test_each_true_box_is_taken_once_by_the_best_score():
    """The second box overlaps more than the first, but comes later. The third finds nothing."""
    truth = array((0, 0, 10, 10))
    boxes = array((0, 0, 10, 10), (0, 0, 10, 8), (20, 20, 30, 30))
    scores, right = right_boxes(boxes, np.array([0.5, 0.9, 0.8]), truth)
    assert scores.tolist() == [0.9, 0.8, 0.5]
    assert right[:, 0].tolist() == [True, False, False]  # 0.5: the overlap of the first is 0.8
    assert right[:, 7].tolist() == [False, False, True]  # 0.85: now the exact one is right
    assert right[:, 6].tolist() == [True, False, False]  # 0.8: exactly the threshold counts


def test_average_precision_by_hand():
    """Right, wrong, right of 4 true boxes: recall 1/4 with precision 1, 2/4 with precision 2/3. So
    the recalls 0 to 0.25 (26 of 101) have 1, those to 0.50 (25) have 2/3, the others 0."""
    scores = np.array([0.9, 0.7, 0.8])
    right = np.array([True, True, False])
    expected = (26 + 25 * 2 / 3) / 101
    assert average_precision(scores, right, 4) == pytest.approx(expected)
    assert average_precision(scores[:0], right[:0], 4) == 0
    assert average_precision(scores, np.ones(3, bool), 3) == pytest.approx(1)


def boxes_of(*rows):
    """Rows (label, score, x0, y0, x1, y1) -> a dict of arrays."""
    rows = np.array(rows, float).reshape(-1, 6)
    return {"labels": rows[:, 0].astype(int), "scores": rows[:, 1], "boxes": rows[:, 2:]}


def test_perfect_and_empty_predictions():
    truth = [boxes_of((1, 0, 0, 0, 5, 5), (2, 0, 3, 3, 9, 9)), boxes_of()]
    found = [boxes_of((1, 0.9, 0, 0, 5, 5), (2, 0.8, 3, 3, 9, 9)), boxes_of()]
    scores = coco_scores(found, truth, 3)
    assert [scores[name] for name in ("ap", "ap50", "ap75")] == pytest.approx([100] * 3)
    assert scores["ap_of_shapes"] == pytest.approx([100, 100, -1])
    assert coco_scores([boxes_of(), boxes_of()], truth, 3)["ap"] == 0
    # a false alarm in an image without objects, above all others: precision is 1/2 at every recall
    alarm = [found[0], boxes_of((1, 0.99, 0, 0, 5, 5))]
    assert coco_scores(alarm, truth, 3)["ap_of_shapes"] == pytest.approx([50, 100, -1])


def test_nothing_to_find_ends_in_one_sentence(capsys):
    with pytest.raises(SystemExit):
        coco_scores([boxes_of((1, 0.9, 0, 0, 5, 5))], [boxes_of()], 3)
    assert "no image has a true box" in capsys.readouterr().err


# -------- The measure against pycocotools ---------------------------------------------------------


def of_pycocotools(found, truth, shapes):
    reason = "needs the optional package pycocotools"
    coco = pytest.importorskip("pycocotools.coco", reason=reason)
    cocoeval = pytest.importorskip("pycocotools.cocoeval", reason=reason)

    def listed(images):
        rows = []
        for i, image in enumerate(images):
            for box, label, score in zip(image["boxes"], image["labels"], image["scores"]):
                x0, y0, x1, y1 = box.tolist()
                size = x1 - x0, y1 - y0
                row = {"image_id": i, "category_id": int(label), "bbox": [x0, y0, *size]}
                row |= {"score": float(score), "area": math.prod(size), "iscrowd": 0}
                rows.append(row | {"id": len(rows) + 1})
        return rows

    with contextlib.redirect_stdout(io.StringIO()):
        true = coco.COCO()
        true.dataset = {
            "images": [{"id": i} for i in range(len(truth))],
            "categories": [{"id": label} for label in range(1, shapes + 1)],
            "annotations": listed(truth),
        }
        true.createIndex()
        guess = coco.COCO()
        guess.dataset = true.dataset | {"annotations": listed(found)}
        guess.createIndex()
        run = cocoeval.COCOeval(true, guess, "bbox")
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 2]  # thresholds, recalls, shapes
    precision[precision == -1] = np.nan
    return 100 * precision.mean(1).T  # (shapes, thresholds)


def crowd(seed, images=12, most=6, shapes=3, copies=4, steps=8, side=24):
    """Random true boxes on a coarse grid, so that overlaps tie, and boxes near them with scores of
    a few values, so that scores tie, too. Some images have no object, some no box found, and the
    last shape is nowhere."""
    rng = np.random.default_rng(seed)
    found = []
    truth = []
    for i in range(images):
        true_rows = []
        found_rows = []
        for _ in range(0 if i % 5 == 0 else int(rng.integers(0, most + 1))):
            low = rng.integers(0, side - 8, 2)
            size = rng.integers(3, 9, 2)
            label = int(rng.integers(1, shapes))
            true_rows.append((label, 0, *low, *(low + size)))
            for _ in range(int(rng.integers(0, copies + 1))):
                moved = low + rng.integers(-1, 2, 2)
                end = moved + np.maximum(1, size + rng.integers(-1, 2, 2))
                other = label if rng.random() < 0.8 else int(rng.integers(1, shapes + 1))
                found_rows.append((other, rng.integers(1, steps) / steps, *moved, *end))
        for _ in range(int(rng.integers(0, 3))):
            low = rng.integers(0, side - 8, 2)
            label = int(rng.integers(1, shapes + 1))
            found_rows.append((label, rng.integers(1, steps) / steps, *low, *(low + 5)))
        truth.append(boxes_of(*true_rows))
        found.append(boxes_of(*(found_rows if i % 7 else [])))
    return found, truth


def assert_equal_to_pycocotools(found, truth, shapes):
    expected = of_pycocotools(found, truth, shapes)
    scores = coco_scores(found, truth, shapes)
    assert scores["ap"] == pytest.approx(np.nanmean(expected), abs=1e-9)
    assert scores["ap50"] == pytest.approx(np.nanmean(expected[:, 0]), abs=1e-9)
    assert scores["ap75"] == pytest.approx(np.nanmean(expected[:, 5]), abs=1e-9)
    of_shapes = np.nan_to_num(expected.mean(1), nan=-1)
    assert scores["ap_of_shapes"] == pytest.approx(of_shapes, abs=1e-9)
    return scores


CROWDED = {"seed": 7, "images": 4, "most": 60, "shapes": 2, "copies": 9, "steps": 1000}


def test_ap_equals_stored_numbers_of_pycocotools():
    """Of version 2.0.11, for who does not have it: of a crowd with ties, and of a crowded one."""
    found = coco_scores(*crowd(0), 3)
    assert [found[name] for name in ("ap", "ap50", "ap75")] == pytest.approx(
        [12.166267231214425, 34.362969626451736, 6.3736779083313735], abs=1e-9
    )
    expected = [12.244940840237868, 12.087593622190987, -1]
    assert found["ap_of_shapes"] == pytest.approx(expected, abs=1e-9)

    found = coco_scores(*crowd(**CROWDED), 2)
    assert [found[name] for name in ("ap", "ap50", "ap75")] == pytest.approx(
        [17.88632806570285, 51.8946733913299, 9.881447615662674], abs=1e-9
    )


@pytest.mark.parametrize("seed", range(6))
def test_ap_equals_pycocotools_with_ties(seed):
    scores = assert_equal_to_pycocotools(*crowd(seed), 3)
    assert 1 < scores["ap"] < 99 and scores["ap_of_shapes"][2] == -1


def test_ap_equals_pycocotools_in_crowded_scenes():
    """Up to 60 true boxes that overlap, and more boxes found of one shape than COCO counts."""
    found, truth = crowd(**CROWDED)
    assert max(len(image["scores"]) for image in found) > 150
    assert_equal_to_pycocotools(found, truth, 2)


def test_ap_equals_pycocotools_on_random_floats():
    """Boxes as a detector gives them, in float32, with scores that differ."""
    found, truth = crowd(8, images=20, steps=10**6)
    rng = np.random.default_rng(0)
    for image in found:
        moved = image["boxes"] + rng.normal(0, 0.3, image["boxes"].shape)
        image["boxes"] = moved.astype(np.float32)
        image["scores"] = image["scores"].astype(np.float32)
    assert_equal_to_pycocotools(found, truth, 3)


def test_ap_does_not_depend_on_the_order_of_boxes_or_on_the_scale_of_scores():
    found, truth = crowd(9, steps=10**6)
    scores = coco_scores(found, truth, 3)
    turned = [{name: part[::-1] for name, part in image.items()} for image in found]
    assert coco_scores(turned, truth, 3) == scores
    scaled = [image | {"scores": image["scores"] ** 3 / 7} for image in found]
    assert coco_scores(scaled, truth, 3) == scores


# -------- The detector ----------------------------------------------------------------------------


def candidate(network, size=24):
    return Candidate("a", network, "solids", size, {})


def find(network, frozen, steps=2, lr=0.003, test=TEST, size=24):
    settings = {"steps": steps, "lr_head": lr, "lr_trunk": lr, "batch": 4, "head_seed": 0}
    return train_and_test(candidate(network, size), frozen, TRAIN, test, settings, CPU)


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_a_frozen_trunk_is_left_as_it_was_and_a_fine_tuned_one_is_a_copy(arch):
    """To the last bit, with the running statistics of batch-norm."""
    torch.manual_seed(0)
    network = backbone(arch, 24).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for frozen in (True, False):
        found = find(network, frozen)
        after = network.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items()), frozen
        assert not network.training
        assert all(p.grad is None for p in network.parameters())
    assert len(found) == len(TEST.images)
    for image in found:
        assert image["boxes"].shape == (len(image["scores"]), 4) and len(image["labels"]) <= 100
        assert (image["boxes"] >= 0).all() and (image["boxes"] <= 16).all()
        assert ((image["labels"] >= 0) & (image["labels"] <= 8)).all()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_network_that_an_earlier_detector_left_on_a_gpu_is_used(frozen, monkeypatch):
    """The device meta stands for the GPU."""
    torch.manual_seed(0)
    network = backbone("resnet14", 24).eval()
    found = find(network, frozen)
    on_gpu = copy.deepcopy(network).to("meta")
    monkeypatch.setattr(on_gpu, "cpu", lambda: network, raising=False)
    again = find(on_gpu, frozen)
    for one, other in zip(found, again):
        assert np.array_equal(one["boxes"], other["boxes"])


def test_a_fine_tuned_trunk_moves_and_a_frozen_one_gets_no_gradient(monkeypatch):
    """All weights of the trunk but those after its last map; the trunk is in training mode."""
    kept = []
    make = eval_detection.detector
    monkeypatch.setattr(
        eval_detection, "detector", lambda *args: kept.append(make(*args)) or kept[-1]
    )
    torch.manual_seed(0)
    network = backbone("resnet14", 16).eval()
    for frozen in (True, False):
        find(network, frozen, steps=1)
        trunk = kept[-1].backbone.train()
        assert trunk.network.training != frozen and trunk.reduce.training
        for name, weight in trunk.network.named_parameters():
            if frozen:
                assert weight.grad is None
            else:
                assert weight.grad is not None and weight.grad.isfinite().all(), name


def test_boxes_are_in_pixels_of_the_scene_at_any_size():
    """Images are resized for the network, and the boxes back."""
    network = backbone("resnet14", 16).eval()
    for size in (24, 48):
        found = find(network, True, steps=1, lr=0.0, size=size)
        assert max(image["boxes"].max(initial=0) for image in found) <= 16


def test_the_test_scenes_choose_nothing():
    """Neither their labels nor their number changes what is found."""
    torch.manual_seed(0)
    network = backbone("resnet14", 16).eval()
    alone = TEST._replace(images=TEST.images[:5])
    for frozen in (True, False):
        first = find(network, frozen)
        again = find(network, frozen, test=relabelled(TEST))
        for image, same in zip(first, again, strict=True):
            assert all(np.array_equal(image[name], same[name]) for name in image)
        fewer = find(network, frozen, test=alone)
        for image, same in zip(first[:5], fewer, strict=True):
            assert image["scores"] == pytest.approx(same["scores"], abs=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_detector_that_diverges_ends_in_one_sentence(steps, capsys, monkeypatch):
    """Of one step the loss is finite."""
    torch.manual_seed(0)
    if steps == 1:
        monkeypatch.setattr(torch.optim, "Adam", LastStep)
    with pytest.raises(SystemExit):
        find(backbone("resnet14", 16).eval(), False, steps=steps, lr=1e30)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "--lr-head, --lr-trunk" in error


def test_frozen_maps_that_are_not_finite_end_in_one_sentence(capsys):
    """No learning rate would help, so none is named."""
    network = backbone("vit_micro", 24).eval()
    torch.nn.init.constant_(network.norm.weight, math.nan)
    with pytest.raises(SystemExit):
        find(network, True, steps=1)
    error = capsys.readouterr().err
    words = "error: some maps of this network are infinite or not a number: leave it out"
    assert error.startswith(words)


def test_maps_that_are_constant_and_raw_pixels_can_be_read(monkeypatch):
    """The detector finds boxes in every image: by constant maps the same ones, by pixels others."""
    monkeypatch.setattr(eval_detection, "LOWEST_SCORE", 1e-6)
    network = backbone("vit_micro", 24).eval()
    for weight in network.parameters():
        torch.nn.init.zeros_(weight)
    constant, by_pixels = [find(trunk, True) for trunk in (network, pixels(24))]
    assert all(len(image["boxes"]) for image in constant + by_pixels)
    scores = [image["scores"].max() for image in constant]
    assert scores == pytest.approx([scores[0]] * len(TEST.images))
    assert len({float(image["scores"].max()) for image in by_pixels}) > 1


def test_boxes_and_scores_that_are_not_finite_end_in_one_sentence(monkeypatch, capsys):
    """Though all weights are finite."""
    real = eval_detection.detector

    def spoiled(*args):
        model = real(*args)
        model.register_forward_hook(lambda module, inputs, found: found and spoil(module, found))
        return model

    def spoil(module, found):
        if not module.training:
            found[0]["scores"] = torch.full_like(found[0]["scores"], math.nan)
            found[0]["boxes"] = torch.ones(1, 4) / 0
        return found

    monkeypatch.setattr(eval_detection, "detector", spoiled)
    with pytest.raises(SystemExit):
        find(backbone("vit_micro", 24).eval(), True, steps=1)
    error = capsys.readouterr().err
    assert error.startswith("error: some boxes or scores are infinite or not a number")


@pytest.mark.parametrize("size", [24, 72, 96])
def test_the_unit_of_distances_is_the_side_of_a_place(size):
    """Torchvision rounds half of a side, so of the odd ones it takes others: 4 for 3 and 5."""
    model = eval_detection.detector(backbone("resnet14", 16).eval(), size, True, 8)
    model.anchor_generator.set_cell_anchors(torch.float32, CPU)
    (box,) = model.anchor_generator.cell_anchors[0].tolist()
    assert box[2] - box[0] == box[3] - box[1] == size / 12


@pytest.mark.thorough
def test_the_detector_learns_scenes_whose_colours_tell_the_shape():
    torch.manual_seed(0)
    network = backbone("resnet14", 16).eval()
    truth = [
        {"boxes": boxes.numpy(), "labels": labels.numpy()}
        for boxes, labels in zip(TEST.boxes, TEST.labels)
    ]
    before = coco_scores(find(network, False, steps=1, lr=0.0), truth, 8)
    after = coco_scores(find(network, False, steps=200), truth, 8)
    assert before["ap50"] < 5 and after["ap50"] > 50


def test_best_boxes_are_as_many_as_objects():
    found = boxes_of((1, 0.2, 0, 0, 1, 1), (2, 0.9, 2, 2, 3, 3), (3, 0.5, 4, 4, 5.126, 5))
    truth = boxes_of((1, 0, 0, 0, 1, 1), (1, 0, 0, 0, 2, 2))
    assert best_boxes(found, truth) == [[2, 2, 3, 3, 2], [4, 4, 5.13, 5, 3]]
    assert best_boxes(boxes_of(), truth) == [] == best_boxes(found, boxes_of())


# -------- The script ------------------------------------------------------------------------------

QUICK = ["--size", 24, "--steps", 1, "--batch", 4, "--workers", 0]


def run_script(*flags, **patches):
    """main() on the scenes of test_eval_dense.py, and the lines of results.jsonl."""
    patches["load_solids"] = lambda split: {"train": TRAIN, "test": TEST}[split]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_detection, "load_data", None, raising=False)
        found = call_main("eval_detection", *flags, *QUICK, **patches)
    if "--out" in flags:
        found.rows = read_lines(flags[flags.index("--out") + 1] / "results.jsonl")
    return found


def test_a_line_per_network_and_mode_and_nothing_is_measured_twice(tmp_path):
    """Though a kill comes in the middle."""
    write_run(tmp_path / "a", arch="vit_micro", size=24)
    flags = [tmp_path / "a", "--out", tmp_path / "out"]

    def stopping(trunk, frozen, *others):
        if not frozen:
            raise InterruptedError
        return train_and_test(trunk, frozen, *others)

    with pytest.raises(InterruptedError):
        run_script(*flags, train_and_test=stopping)
    found = run_script(*flags)
    assert found.code == 0, found.err
    assert found.out.count("already measured") == 3
    names = ["raw pixels, 24 px", "untrained vit_micro, 24 px", "a"]
    expected = [(name, "frozen") for name in names] + [(name, "fine-tuned") for name in names[1:]]
    assert [(row["network"], row["protocol"].split(", ")[1]) for row in found.rows] == expected
    row = found.rows[-1]
    settings = {"steps": 1, "lr_head": 2e-3, "lr_trunk": 1e-3, "batch": 4, "head_seed": 0}
    settings |= {"scenes": [40, 12], "detector": [12, 64, 2, 0.01, 100]}
    assert row["settings"] == {"size": 24, **settings} and row["seed"] == 3
    assert set(row["result"]) == {"ap", "ap50", "ap75", "ap_of_shapes", "shown"}
    assert [len(boxes) for boxes in row["result"]["shown"]] == [1] * 6  # one object per scene
    lines = found.out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == ["ap", "ap50", "ap75"])
    assert lines[head - 1] == "after 1 training steps"
    assert lines[head + 5].startswith("a, fine-tuned ")
    assert (tmp_path / "out" / "boxes.png").stat().st_size > 5000

    def never(*args):
        raise AssertionError("measured again")

    drawn = {}
    patches = {"train_and_test": never, "draw_boxes": lambda path, shown, *_: drawn.update(shown)}
    again = run_script(*flags, **patches)
    assert again.rows == found.rows and again.out.count("already measured") == 5
    assert drawn["a, fine-tuned"] == row["result"]["shown"] and len(drawn) == 5
    more = run_script(*flags, "--no-finetune", **patches)
    assert more.out.count("already measured") == 3

    # the rate of a trunk matters where it is trained, the sizes of the detector for all
    more = run_script(*flags, "--lr-trunk", 0.1)
    assert more.out.count("already measured") == 3 and len(more.rows) == 7
    more = run_script(*flags, "--no-finetune", CONVS=1)
    assert more.out.count("already measured") == 0 and len(more.rows) == 10


def test_the_picture_says_what_its_colours_are(tmp_path, drawn):
    eval_detection.draw_boxes(tmp_path / "boxes.png", {}, TEST, 7)
    (figure,) = drawn
    (legend,) = figure.legends
    shapes = [text.get_text() for text in legend.get_texts()]
    assert shapes == list(TEST.names[1:]) and "after 7 training steps" in figure.get_suptitle()
    colours = [handle.get_edgecolor() for handle in legend.legend_handles]
    for axes, labels in zip(figure.axes, TEST.labels):
        found = [box.get_edgecolor() for box in axes.patches]
        assert found[1::2] == [colours[label - 1] for label in labels]
    assert figure.axes[0].get_ylabel() == "true boxes"


def test_refusals(tmp_path):
    write_run(tmp_path / "a", arch="vit_micro", size=24)
    for flags, words in (
        (["--data", "emoji"], "--data"),
        (["--size", 36], "--size 36: choose a multiple of 24"),
        (["--steps", 0], "--steps 0: choose at least 1"),
        (["--batch", 1001], "--batch 1001: choose"),
    ):
        found = call_main_raw(tmp_path / "a", *flags)
        assert found.code == 1 and found.err.count("\n") == 1 and words in found.err
    found = call_main_raw(tmp_path / "a", world=lambda: 2)
    assert found.code == 1 and "one process" in found.err


def call_main_raw(*flags, **patches):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_detection, "load_data", None, raising=False)
        return call_main("eval_detection", *flags, **patches)
