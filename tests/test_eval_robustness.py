"""methods/eval_robustness.py: each corruption by values that one can compute by hand, or against
PIL and torch; the classifier is that of the linear probe; no drawing of the artist that is left out
trains it; it continues after a kill; what it cannot measure ends in one sentence."""

import io
import math

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, call_main, tiny_data
from PIL import Image
from test_eval_features import write_run

from common import (
    Candidate,
    backbone,
    candidates,
    evaluate,
    linear_classifier,
    load_data,
    read_lines,
)
from methods import eval_robustness
from methods.eval_robustness import (
    ARTISTS,
    CORRUPTIONS,
    Corrupted,
    corrupt,
    leave_one_out,
    mean_relative_loss,
    only_readable,
    robustness,
)

DATA = tiny_data(40, 16)
IMAGES = DATA.test.images.pixels  # (16, 3, 32, 32)


def uniform(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def apply(name, x, strength, seed=0):
    generators = [np.random.default_rng([seed, i]) for i in range(len(x))]
    return CORRUPTIONS[name][0](x, strength, generators)


# -------- The mean relative loss ------------------------------------------------------------------


def test_mean_relative_loss_by_hand():
    # losses of 50 %, 25 %, 0 % and -25 % of 40
    assert mean_relative_loss(40.0, {"a": [20.0, 30.0], "b": [40.0, 50.0]}) == 12.5
    assert mean_relative_loss(40.0, {"a": [40.0] * 3}) == 0
    assert mean_relative_loss(40.0, {"a": [0.0], "b": [0.0]}) == 100
    assert math.isnan(mean_relative_loss(0.0, {"a": [1.0]}))


# -------- The corruptions -------------------------------------------------------------------------

NEUTRAL = {
    "noise": 0.0,
    "blur": 1e-3,  # a kernel whose neighbours weigh exp(-500,000)
    "contrast": 1.0,
    "brightness": 0.0,
    "pixelation": 1.0,
    "rotation": 0.0,
    "occlusion": 0.0,
}


def test_frames_that_are_not_square_end_in_one_sentence(capsys):
    images = torch.zeros(2, 3, 6, 8, dtype=torch.uint8)
    with pytest.raises(SystemExit):
        corrupt(images, [0, 1], "noise", 0.1, 0)
    assert capsys.readouterr().err.startswith("error: the corruptions need square images")


@pytest.mark.parametrize("name", NEUTRAL)
def test_strength_nothing_changes_nothing(name):
    assert torch.equal(corrupt(IMAGES, range(16), name, NEUTRAL[name], 0), IMAGES)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_stronger_changes_more(name):
    """More and more of an image is changed, by each of the three strengths."""
    strengths = CORRUPTIONS[name][1]
    x = IMAGES.float()
    changes = []
    for strength in strengths:
        y = corrupt(IMAGES, range(16), name, strength, 0)
        assert y.dtype == torch.uint8 and y.shape == x.shape
        changes.append((y - x).square().mean().item())
    assert len(strengths) == 3 and 0 < changes[0] < changes[1] < changes[2]


def test_noise_has_its_mean_and_deviation():
    x = torch.full((20, 3, 32, 32), 0.5)
    y = apply("noise", x, 0.1) - x
    count = y.numel()
    # five standard errors of a mean and of a deviation
    assert abs(y.mean()) < 5 * 0.1 / count**0.5
    assert abs(y.std() - 0.1) < 5 * 0.1 / (2 * count) ** 0.5
    # independent: of images, of channels, of neighbours
    for a, b in ((y[0], y[1]), (y[:, 0], y[:, 1]), (y[..., 1:], y[..., :-1])):
        correlation = (a * b).mean() / 0.01
        assert abs(correlation) < 5 / a.numel() ** 0.5
    # the same noise at all strengths
    assert torch.allclose(apply("noise", x, 0.2) - x, 2 * y, atol=1e-6)


def test_blur_of_a_point_is_a_bell():
    x = torch.zeros(1, 3, 33, 33)
    x[:, :, 16, 16] = 1
    y = apply("blur", x, 2.0 * 32 / 33)[0, 0]  # two pixels
    assert y.sum() == pytest.approx(1, abs=1e-5)
    bell = math.exp(-(9 + 4) / (2 * 2**2)) / (2 * math.pi * 2**2)  # at (3, 2) from the centre
    assert y[19, 18] == pytest.approx(bell, rel=0.02)  # cut off at 6 pixels: 0.3 % per axis
    assert y[16, 16 + 7] == 0
    # twice the side, twice the pixels
    wide = apply("blur", uniform(2, 3, 64, 64), 1.0)
    assert wide.shape == (2, 3, 64, 64)
    assert apply("blur", uniform(2, 3, 4, 4), 9.0).isfinite().all()  # a tiny image


def test_contrast_keeps_the_mean_of_each_channel():
    x = uniform(4, 3, 8, 8)
    y = apply("contrast", x, 0.3)
    assert torch.allclose(y.mean((2, 3)), x.mean((2, 3)), atol=1e-6)
    assert torch.allclose(y.std((2, 3)), 0.3 * x.std((2, 3)), atol=1e-6)
    pair = torch.tensor([0.2, 0.6]).view(1, 1, 1, 2)
    assert torch.allclose(apply("contrast", pair, 0.5).flatten(), torch.tensor([0.3, 0.5]))


def test_brightness_is_added_and_cut_off():
    x = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    y = corrupt(x.expand(1, 3, 2, 2), [0], "brightness", 0.2, 0)
    assert y[0, 0].flatten().tolist() == [51, 151, 251, 255]  # 0.2 is 51 of 255


def test_pixelation_averages_blocks():
    x = uniform(2, 3, 8, 8)
    y = apply("pixelation", x, 0.25)
    for row in range(8):
        for column in range(8):
            top, left = row // 4 * 4, column // 4 * 4
            block = x[:, :, top : top + 4, left : left + 4].mean((2, 3))
            assert torch.allclose(y[:, :, row, column], block, atol=1e-6)
    assert apply("pixelation", uniform(1, 3, 28, 28), 0.375).shape == (1, 3, 28, 28)
    assert apply("pixelation", x, 0.01).std((2, 3)).max() < 1e-6  # one pixel is left


@pytest.mark.parametrize("quality", [10, 50, 100])
def test_jpeg_equals_that_of_pil(quality):
    y = corrupt(IMAGES, range(16), "jpeg", quality, 0)
    for image, found in zip(IMAGES, y):
        stored = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stored, "JPEG", quality=quality)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(Image.open(stored)))


def test_rotation_by_quarter_turns_and_small_angles():
    x = uniform(12, 3, 9, 9)
    y = apply("rotation", x, 90)
    turns = []
    for image, found in zip(x, y):
        found_left, found_right = [
            torch.allclose(found, torch.rot90(image, k, (1, 2)), atol=1e-5) for k in (1, -1)
        ]
        assert found_left != found_right
        turns.append(found_left)
    assert 0 < sum(turns) < 12  # both directions
    # An image that rises to the right by 1 per pixel rises by cos and sin of the angle.
    ramp = torch.arange(33.0).expand(1, 3, 33, 33)
    turned = apply("rotation", ramp, 10)[0, 0]
    assert turned[16, 17] - turned[16, 16] == pytest.approx(math.cos(math.radians(10)), abs=1e-4)
    assert abs(turned[17, 16] - turned[16, 16]) == pytest.approx(math.sin(math.radians(10)), 1e-3)
    # White stays white: the border is continued.
    assert torch.allclose(apply("rotation", torch.ones(2, 3, 8, 8), 20), torch.ones(()), atol=1e-6)


@pytest.mark.parametrize("part, side", [(0.25, 8), (0.375, 12), (0.5, 16), (1.0, 32)])
def test_occlusion_covers_one_grey_square(part, side):
    x = torch.ones(40, 3, 32, 32)
    y = apply("occlusion", x, part)
    covered = y != 1
    assert (y[covered] == 0.5).all()
    assert (covered.sum((1, 2, 3)) == 3 * side**2).all()
    corners = set()
    for image in covered:
        rows = image[0].any(1).nonzero()[:, 0]
        columns = image[0].any(0).nonzero()[:, 0]
        assert len(rows) == len(columns) == side
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == side - 1  # no gap
        corners.add((rows[0].item(), columns[0].item()))
    assert len(corners) > 20 or part == 1
    assert max(max(corner) for corner in corners) <= 32 - side


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_in_every_batch(name):
    """Its random numbers belong to its index and the seed."""
    strength = CORRUPTIONS[name][1][1]
    reader = Corrupted(DATA.test.images, name, strength, seed=3)
    assert len(reader) == 16
    ((whole, broken),) = reader.whole(torch.arange(16), 32)
    assert broken == []
    part = torch.tensor([11, 2, 2])
    ((some, _),) = reader.whole(part, 32)
    assert torch.equal(some, whole[part])
    ((other, _),) = Corrupted(DATA.test.images, name, strength, seed=4).whole(torch.arange(16), 32)
    assert torch.equal(other, whole) != (name in ("noise", "rotation", "occlusion"))


def test_batches_of_the_reader_keep_their_indices():
    """More images than a batch of the reader holds, 256."""
    images = torch.full((300, 3, 4, 4), 128, dtype=torch.uint8)
    reader = Corrupted(type(DATA.test.images)(images), "noise", 0.2, seed=0)
    batches = [batch for batch, _ in reader.whole(torch.arange(300), 4)]
    assert [len(batch) for batch in batches] == [256, 44]
    assert torch.equal(batches[1], corrupt(images[:44], range(256, 300), "noise", 0.2, 0))


# -------- An artist left out ----------------------------------------------------------------------


def test_artists_are_those_of_the_data():
    with np.load(ROOT / "tests" / "data" / "emoji.npz") as file:
        assert tuple(file["drawings"]) == ARTISTS


def test_no_drawing_of_the_artist_who_is_left_out_trains(monkeypatch):
    """Features that are the artist's number: the training set lacks it, the test set is it."""
    seen = []

    def spy(bank, labels, groups):
        seen.append((set(bank[:, 0].tolist()), len(bank), len(labels), len(groups)))

        def classify(test):
            seen.append((set(test[:, 0].tolist()), len(test)))
            return torch.full((len(test),), 3)

        return classify

    monkeypatch.setattr(eval_robustness, "linear_classifier", spy)
    bank = DATA.bank.drawing[:, None].float()
    test = DATA.test.drawing[:, None].float()
    split = DATA.test._replace(labels=torch.where(DATA.test.drawing == 2, 3, 1))
    found = leave_one_out(bank, DATA.bank, test, split)
    assert found == {"twemoji": 0, "noto": 0, "fluent-3d": 100, "fluent-flat": 0}
    for artist in range(4):
        assert seen[2 * artist] == ({0, 1, 2, 3} - {artist}, 30, 30, 30)
        assert seen[2 * artist + 1] == ({artist}, 4)


# -------- The script ------------------------------------------------------------------------------

def run_script(*flags, data=DATA, draw=False, **patches):
    """main() of the script, and the lines of results.jsonl."""
    patches.setdefault("with_kmeans", lambda found, *_: found)
    if not draw:
        patches["draw_curves"] = patches["draw_corruptions"] = lambda *_: None
    found = call_main("eval_robustness", *flags, "--workers", 0, data=data, **patches)
    found.rows = read_lines(flags[flags.index("--out") + 1] / "results.jsonl")
    return found


def few(monkeypatch):
    """Leaves three of the corruptions, for tests that are not about them. Returns them."""
    some = {name: CORRUPTIONS[name] for name in ("noise", "contrast", "jpeg")}
    monkeypatch.setattr(eval_robustness, "CORRUPTIONS", some)
    return some


def test_values_table_and_pictures(tmp_path, monkeypatch):
    some = few(monkeypatch)
    net = write_run(tmp_path / "simclr-emoji-0", arch="resnet14", size=8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    file = (tmp_path / "simclr-emoji-0" / "backbone.pt").read_bytes()
    loaded = []

    def spy(candidate, *args):
        loaded.append(candidate.network)
        return robustness(candidate, *args)

    out = tmp_path / "out"
    patches = {"robustness": spy, "candidates": only_the_run}
    found = run_script(tmp_path / "simclr-emoji-0", "--out", out, draw=True, **patches)
    assert found.code == 0, found.err

    # the network is as it was, batch-norm included
    assert (tmp_path / "simclr-emoji-0" / "backbone.pt").read_bytes() == file
    for name, value in loaded[0].state_dict().items():
        assert torch.equal(value, before[name]), name

    (row,) = found.rows
    assert row["settings"]["strengths"] == {name: list(row[1]) for name, row in some.items()}
    assert row["settings"]["corruption_seed"] == 0 and row["settings"]["images"] == [40, 16]
    result = row["result"]
    net.to(memory_format=torch.channels_last)
    assert result["clean"] == evaluate(net, DATA, 8, CPU)["linear"]
    assert list(result["corrupted"]) == list(some)
    assert result["relative_loss"] == mean_relative_loss(result["clean"], result["corrupted"])
    assert sum(result["artist_known"].values()) / 4 == pytest.approx(result["clean"])

    # the first strength of jpeg, from the images to the accuracy
    images = corrupt(IMAGES, range(16), "jpeg", 50, 0)
    data = DATA._replace(test=DATA.test._replace(images=type(DATA.test.images)(images)))
    assert result["corrupted"]["jpeg"][0] == evaluate(net, data, 8, CPU)["linear"]

    # the tables: a mean over strengths per corruption, then the artists
    lines = found.out.splitlines()
    heads = [i for i, line in enumerate(lines) if line.split()[:1] in (["clean"], ["twemoji"])]
    numbers = lines[heads[0] + 1].removeprefix("simclr-emoji-0").split()
    assert lines[heads[0]].split() == ["clean", *some, "mean", "loss"]
    corrupted = sum(map(sum, result["corrupted"].values())) / (3 * len(some))
    assert numbers[-2] == f"{corrupted:.1f}"
    assert numbers[0] == f"{result['clean']:.1f}"
    assert numbers[-1] == f"{result['relative_loss']:.1f}"
    assert numbers[1] == f"{sum(result['corrupted']['noise']) / 3:.1f}"
    numbers = lines[heads[1] + 1].removeprefix("simclr-emoji-0").split()
    assert numbers[:4] == [f"{result['artist_new'][name]:.1f}" for name in ARTISTS]
    assert numbers[4] == f"{sum(result['artist_new'].values()) / 4:.1f}"
    for name in ("robustness.png", "corruptions.png"):
        assert np.asarray(Image.open(out / name).convert("RGB")).std() > 10
        assert name in lines[-1]


@pytest.mark.parametrize("side, pixels", [(8, (1000, 460)), (224, (2000, 920))])
def test_the_picture_of_a_folder_shows_the_images_that_were_evaluated(tmp_path, side, pixels):
    """As large as they were, and large ones not much smaller; not of any size."""
    for word in ("a", "b"):
        for split in ("train", "val"):
            (tmp_path / "data" / split / word).mkdir(parents=True)
            image = Image.fromarray(np.full((300, 260, 3), 90, np.uint8))
            image.save(tmp_path / "data" / split / word / "0.png")
    data = load_data(str(tmp_path / "data"), "", CPU)
    asked = []
    reader = data.test.images
    whole = reader.whole
    reader.whole = lambda index, size: asked.append(size) or whole(index, size)
    eval_robustness.draw_corruptions(tmp_path / "corruptions.png", data, side, 0)
    assert asked == [side] and Image.open(tmp_path / "corruptions.png").size == pixels


def test_the_picture_has_a_line_per_network_from_clean_to_strong(tmp_path, drawn):
    found = {
        name: {
            "clean": 60.0 + i,
            "corrupted": {word: [50.0 + i, 40.0, 30.0 + j] for j, word in enumerate(CORRUPTIONS)},
        }
        for i, name in enumerate(("raw pixels", "untrained x", "a"))
    }
    eval_robustness.draw_curves(tmp_path / "x.png", found)
    for j, (axes, word) in enumerate(zip(drawn[0].axes, CORRUPTIONS, strict=True)):
        assert axes.get_title() == word
        assert axes.get_xticklabels()[0].get_text() == "clean"
        for i, (line, name) in enumerate(zip(axes.lines, found, strict=True)):
            assert line.get_label() == name
            assert list(line.get_ydata()) == [60.0 + i, 50.0 + i, 40.0, 30.0 + j]
            assert line.get_linestyle() == ("-" if name == "a" else "--")


def test_continues_and_keeps_seeds_apart(tmp_path, monkeypatch):
    few(monkeypatch)
    write_run(tmp_path / "a")
    calls = []

    def quick(candidate, data, device, args):
        if len(calls) == 2:
            raise InterruptedError
        calls.append(candidate.name)
        return {"clean": 50.0, "corrupted": {"noise": [40.0]}, "relative_loss": 20.0 + args.seed}

    flags = [tmp_path / "a", "--out", tmp_path / "out"]
    patches = {"robustness": quick, "with_kmeans": eval_robustness.with_kmeans}
    with pytest.raises(InterruptedError):
        run_script(*flags, **patches)
    assert calls == ["k-means, 8 px", "raw pixels, 8 px"]
    calls.clear()
    found = run_script(*flags, **patches)
    assert calls == ["untrained vit_micro, 8 px", "a"]
    assert found.out.count("already measured") == 2
    calls.clear()
    assert run_script(*flags, **patches).rows == found.rows and calls == []
    with pytest.raises(InterruptedError):  # other noise: measured anew, from the first one on
        run_script(*flags, "--seed", 1, **patches)
    assert calls == ["k-means, 8 px", "raw pixels, 8 px"]


def of_processes(folder, out):
    with pytest.MonkeyPatch.context() as patch:
        few(patch)
        found = run_script(folder, "--out", out, candidates=only_the_run)
    assert found.code == 0, found.err
    return found.out


@pytest.mark.thorough
def test_several_processes_give_the_same_numbers(processes, tmp_path, monkeypatch):
    few(monkeypatch)
    write_run(tmp_path / "a")
    alone = run_script(tmp_path / "a", "--out", tmp_path / "one", candidates=only_the_run)
    texts = processes(2, of_processes, tmp_path / "a", tmp_path / "two")
    together = read_lines(tmp_path / "two" / "results.jsonl")
    assert [row["result"] for row in together] == [row["result"] for row in alone.rows]
    assert "known" in texts[0] and not texts[1]


class Spoiled(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x.flatten(1)[:, :5] * 0 + self.value


def test_what_cannot_be_measured_ends_in_one_sentence(tmp_path, monkeypatch):
    few(monkeypatch)
    write_run(tmp_path / "a")
    flags = [tmp_path / "a", "--out", tmp_path / "out"]
    unlabelled = DATA._replace(train=DATA.train._replace(labels=None), test=None)
    found = run_script(*flags, data=unlabelled)
    assert found.code == 1 and found.err.count("\n") == 1
    assert found.err.startswith("error: --data emoji: a probe needs labels")
    found = run_script(*flags, candidates=spoiled(math.nan))
    assert found.code == 1 and found.err.count("\n") == 1
    assert found.err.startswith("error: some features are infinite or not a number")


def test_collapsed_features_lose_nothing(tmp_path, monkeypatch):
    """All images give the same features: the most frequent label is right as often as before. If it
    is never right, the loss is not defined."""
    some = few(monkeypatch)
    write_run(tmp_path / "a")
    found = run_script(tmp_path / "a", "--out", tmp_path / "out", candidates=spoiled(1.0))
    assert found.code == 0, found.err
    (row,) = found.rows
    most = DATA.bank.labels.bincount().argmax()
    clean = 100 * (DATA.test.labels == most).double().mean().item()
    assert row["result"]["clean"] == clean
    assert row["result"]["corrupted"] == dict.fromkeys(some, [clean] * 3)
    assert clean > 0 == row["result"]["relative_loss"]

    wrong = torch.full_like(DATA.test.labels, (most + 1) % 9)
    data = DATA._replace(test=DATA.test._replace(labels=wrong))
    flags = [tmp_path / "a", "--out", tmp_path / "none"]
    found = run_script(*flags, data=data, candidates=spoiled(1.0))
    assert found.code == 0, found.err
    assert found.rows[0]["result"]["relative_loss"] is None
    assert "NaN" not in (tmp_path / "none" / "results.jsonl").read_text()
    line = next(line for line in found.out.splitlines() if line.startswith("a  "))
    assert line.split() == ["a", *["0.0"] * 5, "-"]


def test_one_class_and_a_class_with_one_image(tmp_path, monkeypatch):
    """One class is always right. A class with one training image spoils nothing."""
    few(monkeypatch)
    write_run(tmp_path / "a")

    def result(name, bank_labels, test_labels):
        bank = DATA.bank._replace(labels=bank_labels)
        test = DATA.test._replace(labels=test_labels)
        data = DATA._replace(bank=bank, test=test)
        flags = [tmp_path / "a", "--out", tmp_path / name]
        found = run_script(*flags, data=data, candidates=only_the_run)
        assert found.code == 0, found.err
        return found.rows[0]["result"]

    found = result("one", 0 * DATA.bank.labels, 0 * DATA.test.labels)
    assert found["clean"] == 100 and found["relative_loss"] == 0
    assert set(found["artist_new"].values()) == {100}
    labels = DATA.bank.labels.clone()
    labels[0] = 9  # nothing else has this label
    found = result("rare", labels, DATA.test.labels)
    assert 0 < found["clean"] < 100 and found["relative_loss"] is not None


def test_one_training_image_is_too_few(tmp_path, monkeypatch):
    few(monkeypatch)
    write_run(tmp_path / "a")
    flags = [tmp_path / "a", "--out", tmp_path / "out"]
    found = run_script(*flags, data=tiny_data(1, 16), candidates=only_the_run)
    assert found.code == 1 and found.err.count("\n") == 1 and not found.rows
    assert found.err.startswith("error: tiny: two training images with labels are needed")


def test_images_that_cannot_be_read_are_left_out_everywhere():
    """Of the features, the labels and the artists."""
    readable = torch.arange(16) % 4 > 0
    x, kept = only_readable(torch.arange(16.0)[:, None], DATA.test, readable)
    assert x[:, 0].tolist() == [i for i in range(16) if i % 4]
    for name in ("labels", "emoji", "drawing"):
        assert torch.equal(getattr(kept, name), getattr(DATA.test, name)[readable])
    bare = DATA.test._replace(emoji=None, drawing=None)
    assert only_readable(torch.zeros(16, 1), bare, readable)[1].emoji is None


def test_an_artist_without_test_images_is_not_defined(tmp_path, monkeypatch):
    few(monkeypatch)
    write_run(tmp_path / "a")
    test = DATA.test
    kept = (test.drawing != 2).nonzero()[:, 0]
    numbers = [part[kept] for part in (test.labels, test.emoji, test.drawing)]
    data = DATA._replace(test=type(test)(test.images.part(kept), *numbers))
    flags = [tmp_path / "a", "--out", tmp_path / "out"]
    found = run_script(*flags, data=data, candidates=only_the_run)
    assert found.code == 0, found.err
    for kind in ("artist_known", "artist_new"):
        values = found.rows[0]["result"][kind]
        assert [name for name in ARTISTS if values[name] is None] == ["fluent-3d"]
    lines = [line.split() for line in found.out.splitlines() if line.startswith("a  ")]
    assert [i for i, word in enumerate(lines[1]) if word == "-"] == [3, 5, 6]  # it, and the means


def test_test_labels_choose_nothing(monkeypatch):
    """Other labels of the test images: the same classifier is fitted."""
    few(monkeypatch)
    args = eval_robustness.get_args(["a", "--workers", "0"])
    net = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten())
    answers = []

    def spy(*sets):
        classify = linear_classifier(*sets)

        def kept(x):
            answers.append(classify(x))
            return answers[-1]

        return kept

    monkeypatch.setattr(eval_robustness, "linear_classifier", spy)
    candidate = Candidate("a", net, "tiny", 32, {})
    for labels in (DATA.test.labels, DATA.test.labels.flip(0)):
        data = DATA._replace(test=DATA.test._replace(labels=labels))
        robustness(candidate, data, CPU, args)
    half = len(answers) // 2
    assert half == 1 + 3 * 3 + 4  # clean, corrupted, each artist
    assert all(torch.equal(*pair) for pair in zip(answers[:half], answers[half:]))


def only_the_run(args):
    """candidates() without the baselines, for tests that are not about them."""
    return candidates(args)[-1:]


def spoiled(value):
    """candidates() with one run, whose features are all the same value."""
    return lambda args: [only_the_run(args)[0]._replace(network=Spoiled(value))]


def test_images_without_artists(tmp_path, monkeypatch):
    few(monkeypatch)
    write_run(tmp_path / "a", size=28)
    data = load_data("fashion", "", CPU)
    chosen = torch.arange(60)
    splits = []
    for split in (data.bank, data.test):
        splits.append(split._replace(images=split.images.part(chosen), labels=split.labels[:60]))
    small = data._replace(train=splits[0], bank=splits[0], test=splits[1])
    found = run_script(
        tmp_path / "a", "--out", tmp_path / "out", data=small, candidates=only_the_run
    )
    assert found.code == 0, found.err
    assert set(found.rows[0]["result"]) == {"clean", "corrupted", "relative_loss"}
    assert "by artist" not in found.out


def test_network_at_another_size(tmp_path, monkeypatch):
    """Images are corrupted at their own size; the network sees them at its own."""
    few(monkeypatch)
    seen = set()
    net = backbone("resnet14", 16)
    net.register_forward_pre_hook(lambda net, inputs: seen.add(inputs[0].shape[2:]))
    write_run(tmp_path / "a", arch="resnet14", size=16)
    args = eval_robustness.get_args([str(tmp_path / "a"), "--workers", "0"])
    candidate = only_the_run(args)[0]._replace(network=net, size=24)
    eval_robustness.robustness(candidate, DATA, CPU, args)
    assert seen == {(24, 24)}
