"""methods/eval_video.py: J and F by hand and against a search over all pairs of pixels; masks are
copied by features alone; the rules read what the features hold; it continues after a kill."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, call_main, noise
from scipy import ndimage
from sklearn.linear_model import Ridge
from test_eval_features import write_run

from common import Candidate, backbone, candidates, pixels, read_lines
from kernels.clips import Shots
from kernels.movers import Clips
from kernels.propagation import as_masks, region, visible
from methods import eval_video
from methods.eval_video import (
    boundary,
    contour,
    copied,
    mask_scores,
    pose_scores,
    poses,
    propagate,
    ridge,
    shot_scores,
    spaced,
)


def square(side, top, left, height, width):
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, top : top + height, left : left + width] = True
    return mask


def blobs(count, side, seed):
    return F.avg_pool2d(noise(count, side + 4, side + 4, seed=seed), 5, stride=1) > 0.05


# -------- J and F ---------------------------------------------------------------------------------


def test_region_by_hand():
    """4 x 4 and 4 x 4 pixels share 2 x 4: 8 of 24. Nothing and nothing: 1."""
    a, b = square(10, 1, 1, 4, 4), square(10, 3, 1, 4, 4)
    nothing = torch.zeros_like(a)
    assert region(a, b).item() == pytest.approx(8 / 24)
    assert region(a, a).item() == 1 and region(a, nothing).item() == 0
    assert region(nothing, nothing).item() == 1
    both = torch.cat([a, nothing]), torch.cat([b, nothing])
    assert region(*both).tolist() == pytest.approx([1 / 3, 1])


def test_contour_by_hand():
    """As in the code of DAVIS, it begins half a pixel above and to the left of the object. At the
    border of the frame nothing differs."""
    found = contour(square(5, 1, 1, 2, 2))[0].int().tolist()
    assert found == [
        [1, 1, 1, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    found = contour(square(4, 2, 2, 2, 2))[0].int().tolist()
    assert found == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert not contour(torch.ones(1, 4, 4, dtype=torch.bool)).any()


def by_the_definition(mask):
    """The official rules: compared with the pixel to the right, below, and below to the right; in
    the last row only to the right, in the last column only below."""
    side = len(mask)
    found = np.zeros_like(mask)
    for y in range(side):
        for x in range(side):
            last_row, last_column = y == side - 1, x == side - 1
            others = [] if last_column else [mask[y, x + 1]]
            others += [] if last_row else [mask[y + 1, x]]
            others += [] if last_row or last_column else [mask[y + 1, x + 1]]
            found[y, x] = any(mask[y, x] != other for other in others)
    return found


def test_boundary_equals_a_search_over_all_pairs():
    for side, tolerance in ((48, 0.008), (30, 0.04)):
        a, b = blobs(4, side, 0), blobs(4, side, 1)
        reach = math.ceil(tolerance * math.hypot(side, side))
        expected = []
        for one, other in zip(a.numpy(), b.numpy()):
            edges = [by_the_definition(mask) for mask in (one, other)]
            assert np.array_equal(contour(torch.from_numpy(one)[None])[0].numpy(), edges[0])
            away = [ndimage.distance_transform_edt(~edge) for edge in edges]
            precision = (away[1][edges[0]] <= reach).mean()
            recall = (away[0][edges[1]] <= reach).mean()
            expected.append(2 * precision * recall / (precision + recall))
        assert boundary(a, b, tolerance).tolist() == pytest.approx(expected)
        assert 0.1 < min(expected) < 0.99


def test_boundary_by_hand():
    """One pixel of shift is within the tolerance of a frame of 48 pixels, two are not: then of the
    boundary only parts of the sides that lie in the direction of the shift are met."""
    truth = square(48, 10, 10, 12, 12)
    assert boundary(truth, truth).item() == 1
    assert boundary(square(48, 11, 10, 12, 12), truth).item() == 1
    far = boundary(square(48, 12, 10, 12, 12), truth).item()
    # Each boundary is the rim of 13 x 13 pixels, 48. Shifted by 2, the two upright sides share 11
    # pixels each and have one more at their ends that is next to the other's; so have the upper and
    # the lower side, where they meet the other's upright ones, one on each side.
    assert far == pytest.approx((2 * 11 + 2 + 2) / 48)
    assert boundary(square(48, 30, 30, 6, 6), truth).item() == 0
    nothing = torch.zeros_like(truth)
    assert boundary(nothing, truth).item() == boundary(truth, nothing).item() == 0
    assert boundary(nothing, nothing).item() == 1


def test_precision_and_recall_are_not_the_same():
    """Half of the object, exactly: all of its own outer boundary is right, but much is missing."""
    truth, half = square(48, 10, 10, 20, 20), square(48, 10, 10, 20, 10)
    found, true = contour(half)[0].sum().item(), contour(truth)[0].sum().item()
    assert (found, true) == (2 * 21 + 2 * 9, 80)
    # Of the half's 60 pixels the inner side is wrong, without its two ends that touch the outline
    # and one more at each end, which is next to it: 60 - 17. Of the true 80 the half of the outline
    # is met, and one more pixel at each end.
    p, r = (60 - 17) / 60, (21 + 2 * 10 + 2) / 80
    assert boundary(half, truth).item() == pytest.approx(2 * p * r / (p + r))


def test_scores_are_over_the_frames_after_the_first():
    truth = torch.cat([square(48, 8, 8, 10, 10)] * 3)[None]
    predicted = truth.clone()
    predicted[0, 0] = False
    assert mask_scores(predicted, truth) == {"J": 100, "F": 100, "J&F": 100}
    predicted[0, 2] = False
    assert mask_scores(predicted, truth) == pytest.approx({"J": 50, "F": 50, "J&F": 50})


# -------- Masks over time -------------------------------------------------------------------------

HOW = {"radius": 3, "previous": 2, "nearest": 1, "temperature": 0.1}


def moving_codes(frames=5, side=8, step=1):
    """A feature of its own for each place, which all move to the right together: (1, T, C, g, g).
    What enters from the left is new."""
    codes = torch.eye(side * (side + step * frames)).view(-1, side, side + step * frames)
    found = []
    for t in range(frames):
        start = step * (frames - t)
        found.append(codes[:, :, start : start + side])
    return torch.stack(found)[None]


def test_values_move_with_their_features():
    """A square that moves by one place per frame is followed, whatever the length of the features;
    left in place it would be lost."""
    first = square(8, 2, 1, 3, 2).float()
    values = propagate(7.5 * moving_codes(), first, **HOW)
    assert values.shape == (1, 5, 8, 8)
    for t in range(5):
        expected = square(8, 2, 1 + t, 3, 2)[0].float()
        torch.testing.assert_close(values[0, t], expected, rtol=0, atol=1e-3)


def test_a_thing_is_not_found_beyond_the_radius():
    """It jumps by 4 places: with a radius of 3 its place takes from others, with 4 it is found. Of
    two equal things the near one is taken."""
    features = moving_codes(frames=2, step=4)
    first = square(8, 2, 1, 3, 2).float()
    expected = square(8, 2, 5, 3, 2)[0].float()
    near = propagate(features, first, **{**HOW, "radius": 4})[0, 1]
    torch.testing.assert_close(near, expected, rtol=0, atol=1e-3)
    assert propagate(features, first, **HOW)[0, 1][2:5, 5:7].max() < 0.5


def plain_propagation(features, first, radius, previous, nearest, temperature):
    """The formula, one place at a time."""
    n, T, _, g, _ = features.shape
    values = torch.zeros(n, T, g, g, dtype=torch.float64)
    values[:, 0] = first
    f = features / features.norm(dim=2, keepdim=True)
    for i in range(n):
        for t in range(1, T):
            frames = [0] + [s for s in range(t - previous, t) if s > 0]
            for y in range(g):
                for x in range(g):
                    pairs = []
                    for s in frames:
                        for v in range(max(0, y - radius), min(g, y + radius + 1)):
                            for u in range(max(0, x - radius), min(g, x + radius + 1)):
                                score = f[i, t, :, y, x] @ f[i, s, :, v, u]
                                pairs.append((score.item(), values[i, s, v, u].item()))
                    pairs.sort(reverse=True)
                    weights = [math.exp(score / temperature) for score, _ in pairs[:nearest]]
                    total = sum(w * value for w, (_, value) in zip(weights, pairs))
                    values[i, t, y, x] = total / sum(weights)
    return values


def test_propagation_is_the_formula():
    features = noise(2, 5, 6, 5, 5)
    first = (noise(2, 5, 5, seed=1) > 0).double()
    how = {"radius": 2, "previous": 2, "nearest": 4, "temperature": 0.3}
    expected = plain_propagation(features, first, **how)
    torch.testing.assert_close(propagate(features, first, **how), expected, rtol=1e-10, atol=1e-10)


def test_masks_are_above_the_middle():
    """Of the least and the greatest value: a mask that has become faint is still one."""
    values = torch.zeros(1, 1, 4, 4)
    values[0, 0, 1:3, 1:3] = 0.2
    found = as_masks(values, 8)
    assert found.shape == (1, 1, 8, 8) and found.dtype == torch.bool
    assert torch.equal(found[0], square(8, 2, 2, 4, 4) & found[0]) and found.sum() >= 12
    assert not as_masks(torch.zeros(1, 1, 4, 4), 8).any()


# -------- Films -----------------------------------------------------------------------------------


def make_clips(count, seed=0):
    """Clips as those of movers: a coloured square (its colour is the category) moves to the right
    or down (the motion) over noise."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(90, 110, (count, 12, 3, 48, 48), np.uint8)
    masks = np.zeros((count, 12, 48, 48), np.uint8)
    pose = np.zeros((count, 12, 1, 4))
    motion = rng.integers(0, 2, count)
    category = rng.integers(0, 3, count)
    for i in range(count):
        left, top = rng.integers(0, 12, 2)
        for t in range(12):
            x, y = left + 2 * t * (motion[i] == 0), top + 2 * t * (motion[i] == 1)
            frames[i, t, category[i], y : y + 12, x : x + 12] = 240
            masks[i, t, y : y + 12, x : x + 12] = 1
            pose[i, t, 0] = x + 6, y + 6, 0.1 * t, 0.25
    return Clips(
        frames=torch.from_numpy(frames),
        masks=torch.from_numpy(masks),
        pose=torch.from_numpy(pose).float(),
        identity=torch.arange(count)[:, None] // 2,
        category=torch.from_numpy(category)[:, None],
        motion=torch.from_numpy(motion)[:, None],
        camera=torch.zeros(count, 2),
    )


def make_shots(count, seed=0):
    """Shots of one colour each, darker from frame to frame; red is another subject than blue."""
    rng = np.random.default_rng(seed)
    frames = []
    for i in range(count):
        colour = rng.uniform(60, 250, 3)
        colour[2 * (i % 2)] = 0
        levels = np.linspace(1, 0.8, int(rng.integers(6, 14)))
        shot = levels[:, None] * colour  # (T, 3)
        frames.append(torch.from_numpy(shot).byte()[:, :, None, None].repeat(1, 1, 18, 32))
    labels = torch.arange(count) % 2
    numbers = torch.arange(count)
    names = ("rabbit", "rodents")
    return Shots(frames, [], labels, labels > 0, numbers, numbers // 4, names)


FILMS = {
    "movers": {"train": make_clips(150), "test": make_clips(20, seed=1)},
    "bunny": {"train": make_shots(24), "test": make_shots(8, seed=1)},
}


def film_of(film, split, count):
    clips = FILMS[film][split]
    return clips.part(slice(count)) if film == "movers" else clips


@pytest.fixture(autouse=True)
def films(monkeypatch):
    monkeypatch.setattr(eval_video, "film_of", film_of)
    eval_video.features.cache_clear()


class Colours(torch.nn.Module):
    """A network with a weight, whose features are the frame in 4 x 4 pixels."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * F.adaptive_avg_pool2d(x, 4)


FLAGS = ["--train-clips", 150, "--test-clips", 20, "--mask-clips", 5, "--choose", 2, "--grid", 12]
FLAGS += ["--mask-size", 24, "--radius", 3]


def arguments(*flags):
    words = [str(flag) for flag in ("run", *FLAGS, *flags)]
    return eval_video.parse(eval_video.__doc__, eval_video.SETTINGS, words, runs="runs")


def read(task, network, *flags):
    return eval_video.read(task, network, 16, arguments(*flags), CPU)


def test_places_are_spaced_from_first_to_last():
    assert spaced(12, 4) == [0, 4, 7, 11] and spaced(12, 2) == [0, 11]
    assert spaced(8, 8) == [*range(8)]


def test_what_the_features_hold_is_read_and_nothing_gives_the_constant():
    """Frames in 4 x 4 pixels tell motion, category and place; zeros give the most frequent class of
    the training clips, and the mean pose."""
    train, test = FILMS["movers"]["train"], FILMS["movers"]["test"]
    for task in ("motion", "category"):
        labels = getattr(train, task)[:, 0]
        share = (getattr(test, task)[:, 0] == labels.bincount().argmax()).double().mean().item()
        assert read(task, None) == {task: pytest.approx(100 * share)}
        assert read(task, Colours())[task] >= 85 > 100 * share + 20
    nothing = read("pose", None)
    truth = poses(test, 4)
    mean = poses(train, 4).mean(0)
    distance = (truth[:, :2] - mean[:2]).norm(dim=1).mean().item()
    assert nothing["position"] == pytest.approx(distance, rel=1e-4)
    found = read("pose", Colours())
    assert found["position"] < 0.3 * nothing["position"] and found["angle"] < nothing["angle"]


def test_shots():
    assert read("subject", Colours())["subject"] == 100
    assert read("subject", None)["subject"] == 50
    assert read("shots", Colours())["shot_r5"] == 100
    # all are as similar as the right one
    assert read("shots", None) == {"shot_r1": 0, "shot_r5": 0}


def test_shot_scores_by_hand():
    """The second question finds two others that are nearer than its own."""
    first = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.9, 0.5], [-0.95, 0.3]]), dim=1)
    last = torch.tensor([[2.0, 0.1], [-3.0, 1.2]])
    assert shot_scores(last, first) == {"shot_r1": 50, "shot_r5": 100}


def test_ridge_is_that_of_scikit_learn_with_the_best_decay():
    """Each answer has a decay of its own, that of the least error if each row in turn is left out:
    one is a linear function, the other nearly noise."""
    x, test = 3 * noise(200, 30) + 1, noise(50, 30, seed=2)
    y = torch.stack([x @ noise(30, seed=3), x[:, 0] + 10 * noise(200, seed=4)], 1)
    found = ridge(x, y, test)

    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    test = (test - x.mean(0)) / x.std(0, correction=0)
    chosen = []
    for column in (0, 1):
        errors = {}
        for decay in (10.0**power for power in range(-2, 7)):
            inverse = (scaled.T @ scaled + decay * torch.eye(30)).inverse()
            hat = scaled @ inverse @ scaled.T + 1 / 200
            error = (y[:, column] - hat @ y[:, column]) / (1 - hat.diag())
            errors[decay] = error.square().mean().item()
        chosen.append(min(errors, key=errors.get))
        rule = Ridge(chosen[-1]).fit(scaled.numpy(), y[:, column].numpy())
        expected = torch.from_numpy(rule.predict(test.numpy()))
        torch.testing.assert_close(found[:, column], expected, rtol=1e-6, atol=1e-6)
    assert chosen[0] < 1 < chosen[1]


def test_pose_scores_by_hand():
    """3 and 4 pixels beside: 5. From 170 to -170 degrees it is 20, whatever the length."""
    angles = torch.tensor([170.0, -170.0, 30.0, 30.0]).deg2rad()
    rows = torch.stack([torch.zeros(4), torch.zeros(4), angles.sin(), angles.cos()], 1)
    rows[0] *= 0.3
    rows[0, :2] = torch.tensor([3.0, 4.0])
    found = pose_scores(rows[::2], rows[1::2])
    assert found == pytest.approx({"position": 2.5, "angle": 10}, abs=1e-4)


def test_poses_are_those_of_the_frames():
    clips = FILMS["movers"]["test"]
    found = poses(clips, 4).view(20, 4, 4)
    torch.testing.assert_close(found[3, 2, :2], clips.pose[3, 7, 0, :2])
    assert torch.atan2(found[3, 2, 2], found[3, 2, 3]).item() == pytest.approx(0.7, abs=1e-5)


# -------- Masks of networks -----------------------------------------------------------------------


def test_masks_follow_colours_and_the_best_map_is_chosen_on_training_clips():
    """Raw pixels find the coloured square in every frame. Of two maps, one of noise, the better is
    taken; no network leaves the mask where it is."""
    args = arguments()
    predicted, found = eval_video.masks(pixels(24), args, CPU)
    assert predicted.shape == (5, 12, 48, 48) and found["J"] > 60 and found["map"] == 0
    stay, left = eval_video.masks(None, args, CPU)
    assert torch.equal(stay[:, 7], stay[:, 0]) and left["J"] < 40 and "map" not in left
    assert left == mask_scores(stay, FILMS["movers"]["test"].masks[:5] > 0)

    def two_maps(network, x):
        return [noise(len(x), 6, 12, 12, dtype=torch.float32), F.adaptive_avg_pool2d(x, 12)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_video, "maps", two_maps)
        _, found = eval_video.masks(pixels(24), args, CPU)
    assert found["map"] == 1 and found["J_on_train"][0] < found["J_on_train"][1]


@pytest.mark.parametrize("arch, count", [("resnet14", 5), ("vit_micro", 4)])
def test_all_maps_are_brought_to_the_grid(arch, count):
    network = backbone(arch, 16).eval()
    clips = FILMS["movers"]["test"].part(slice(8))  # more than a batch
    found = copied(network, clips, arguments(), CPU)
    assert list(found) == list(range(count))
    assert all(masks.shape == (8, 12, 48, 48) for masks in found.values())
    few = copied(network, clips.part(slice(6, 8)), arguments(), CPU, only=2)
    assert list(few) == [2]
    assert (few[2] == found[2][6:]).float().mean() > 0.999  # each clip by itself


def test_only_clips_whose_object_is_seen_at_first():
    clips = make_clips(6)
    clips.masks[[0, 3], 0] = 0
    clips.masks[3, 0, :9, :11] = 1  # 99 pixels
    found = visible(clips, 3)
    assert torch.equal(found.frames, clips.frames[[1, 2, 4]])


# -------- The script ------------------------------------------------------------------------------


def run_script(*flags, **patches):
    """main() on the films of this file, and the lines of results.jsonl; without the probe, which
    takes longest."""
    patches.setdefault("draw_masks", lambda *_: None)
    patches["linear_probe"] = lambda *_: 50.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_video, "load_data", None, raising=False)  # which call_main replaces
        found = call_main("eval_video", *flags, *FLAGS, "--workers", 0, **patches)
    found.rows = read_lines(flags[flags.index("--out") + 1] / "results.jsonl")
    return found


def test_a_line_per_network_and_task(tmp_path):
    write_run(tmp_path / "a", arch="vit_micro", size=8)
    drawn = {}
    out = tmp_path / "out"
    draw_masks = eval_video.draw_masks

    def draw(path, predicted, clips):
        drawn.update(predicted)
        draw_masks(path, predicted, clips)

    found = run_script(tmp_path / "a", "--out", out, "--frames", 2, draw_masks=draw)
    assert found.code == 0, found.err
    names = ["no network", "raw pixels, 8 px", "untrained vit_micro, 8 px", "a"]
    tasks = ["masks", "motion", "category", "pose", "subject", "shots"]
    expected = [(name, task) for name in names for task in tasks]
    assert [(row["network"], row["protocol"]) for row in found.rows] == expected
    films = {row["protocol"]: row["data"] for row in found.rows}
    assert films["pose"] == "movers" and films["shots"] == "bunny"
    row = found.rows[-6]
    assert row["seed"] == 3 and row["settings"]["mask_clips"] == 5 and row["settings"]["size"] == 8

    table = [line for line in found.out.splitlines() if re.match(r"a +\d", line)]
    assert len(table) == 1 and len(table[0].split()) == 11  # all columns
    assert f"{row['result']['J']:.3g}" in table[0].split()
    assert list(drawn) == names and drawn["a"].shape == (2, 12, 48, 48)
    assert (out / "masks.png").stat().st_size > 5000


class Stop(Exception):
    pass


def test_continues_after_a_kill_and_measures_nothing_twice(tmp_path):
    write_run(tmp_path / "a", arch="vit_micro", size=16)
    flags = [tmp_path / "a", "--out", tmp_path / "out", "--only", "masks"]
    masks = eval_video.masks
    asked = []

    def counting(network, *others):
        if len(asked) == stop:
            raise Stop
        asked.append(network)
        return masks(network, *others)

    stop = 2
    with pytest.raises(Stop):
        run_script(*flags, masks=counting)
    stop = None
    asked.clear()
    drawn = {}
    draw = {"draw_masks": lambda path, predicted, clips: drawn.update(predicted)}
    found = run_script(*flags, masks=counting, **draw)
    assert len(asked) == 2 and found.out.count("already measured") == 2
    assert [row["protocol"] for row in found.rows] == ["masks"] * 4 and len(drawn) == 4
    assert "motion" not in found.out


def test_refusals(tmp_path):
    write_run(tmp_path / "a", arch="vit_micro", size=16)

    def refusal(*flags, **patches):
        found = run_script(tmp_path / "a", "--out", tmp_path / "out", *flags, **patches)
        assert found.code == 1 and found.err.startswith("error: ") and found.err.count("\n") == 1
        assert not found.rows
        return found.err

    assert "--only" in refusal("--only", "colours")
    assert "--data" in refusal("--data", "emoji")
    assert "--frames 13" in refusal("--frames", 13)
    assert "one process" in refusal(world=lambda: 2)


@pytest.mark.parametrize("task", ["shots", "masks"])
def test_features_that_are_not_numbers_are_refused(task, tmp_path, capsys):
    """nan >= nan is false, so the right shot would always rank first."""
    write_run(tmp_path / "a", arch="vit_micro", size=16)

    def spoiled(args):
        (run,) = [each for each in candidates(args) if each.name == "a"]
        with torch.no_grad():
            run.network.norm.weight.fill_(math.nan)
        return [run]

    flags = ["--only", task, "--out", tmp_path / "out"]
    found = run_script(tmp_path / "a", *flags, candidates=spoiled)
    assert found.code == 1
    assert "are infinite or not a number: leave this network out" in found.err
    assert [row["network"] for row in found.rows] == ["no network"]


def test_each_seed_of_an_untrained_network_has_masks_of_its_own(tmp_path):
    write_run(tmp_path / "a", arch="vit_micro", size=16)
    flags = ["--only", "masks", "--out", tmp_path / "out"]
    for seed in (0, 1):
        found = run_script(tmp_path / "a", *flags, "--seed", seed, draw_masks=lambda *_: None)
        assert found.code == 0, found.err
    names = [path.name.split(",")[0] for path in (tmp_path / "out" / "masks").iterdir()]
    assert names.count("untrained vit_micro") == 2 and names.count("a") == 1


def test_a_frozen_network_is_left_as_it_was():
    network = backbone("resnet14", 16).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    candidate = Candidate("a", network, "movers", 16, {})
    read("pose", candidate.network)
    copied(network, FILMS["movers"]["test"].part(slice(2)), arguments(), CPU)
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not network.training and all(p.grad is None for p in network.parameters())
