"""methods/eval_few.py: nested draws of labels, and scikit-learn's logistic regression on them."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import CPU, call_main, noise, tiny_data
from PIL import Image
from sklearn.linear_model import LogisticRegression
from test_eval_features import write_run

from common import candidates, fit_logistic, labelled_features, load_data, pixels, read_lines
from methods import eval_few
from methods.eval_few import BUDGETS, draw_labels, few_labels

DATA = tiny_data(40, 16)


def test_draws_are_nested_and_have_their_share_of_each_class():
    labels = torch.tensor([0] * 230 + [1] * 30 + [2] * 3)[torch.randperm(263)]
    counts = {"1": (1, 1, 1), "5": (5, 5, 3), "20": (20, 20, 3)}
    counts |= {"1 %": (2, 1, 1), "10 %": (23, 3, 1)}
    for draw in range(3):
        sets = {name: draw_labels(labels, BUDGETS[name], draw) for name in BUDGETS}
        for name, expected in counts.items():
            assert tuple(labels[sets[name]].bincount().tolist()) == expected
            assert len(sets[name].unique()) == len(sets[name])
        for chain in (("1", "2", "5", "10", "20"), ("1", "1 %", "10 %")):
            for small, large in zip(chain, chain[1:]):
                assert set(sets[small].tolist()) <= set(sets[large].tolist())
        assert torch.equal(sets["5"], draw_labels(labels, 5, draw))
    assert not torch.equal(draw_labels(labels, 5, 0), draw_labels(labels, 5, 1))


def test_accuracies_are_those_of_scikit_learn():
    labels = torch.arange(150) % 4 % 3
    centres = noise(3, 40, seed=1, dtype=torch.float32)
    bank = 5 + 0.6 * centres[labels] + noise(150, 40, dtype=torch.float32)
    bank[:, 3] *= 100
    test = 5 + 0.6 * centres[labels] + noise(150, 40, seed=2, dtype=torch.float32)
    test[:, 3] *= 100
    before = bank.clone(), test.clone()
    found = few_labels(bank, labels, test, labels)
    assert torch.equal(bank, before[0]) and torch.equal(test, before[1])
    assert list(found) == list(BUDGETS)

    mean, std = bank.mean(0), bank.std(0)
    x, z = [(part - mean) / std / 40**0.5 for part in (bank, test)]
    assert x.square().sum(1).mean().item() == pytest.approx(1, abs=0.01)
    for name, budget in BUDGETS.items():
        accuracies = []
        for draw in range(5):
            chosen = draw_labels(labels, budget, draw)
            solver = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000)
            solver.fit(x[chosen].numpy(), labels[chosen].numpy())
            accuracies.append(100 * solver.score(z.numpy(), labels.numpy()))
        # of 150 images one may lie on the border
        assert found[name]["accuracies"] == pytest.approx(accuracies, abs=0.7)
        values = found[name]["accuracies"]
        assert found[name]["mean"] == pytest.approx(np.mean(values))
        assert found[name]["deviation"] == pytest.approx(np.std(values, ddof=1))
        assert found[name]["images"] == len(chosen)
    assert found["20"]["mean"] > found["1"]["mean"] + 5


def test_degenerate_features():
    """Constant features: one class for all images. One-hot features: all right from one label."""
    labels = torch.arange(30) % 3
    found = few_labels(torch.ones(30, 4), labels, torch.ones(9, 4), labels[:9])
    assert {name: part["mean"] for name, part in found.items()} == dict.fromkeys(
        BUDGETS, pytest.approx(100 / 3)
    )
    perfect = torch.nn.functional.one_hot(labels).float()
    found = few_labels(perfect, labels, perfect, labels)
    assert all(part["accuracies"] == [100.0] * 5 for part in found.values())
    one = few_labels(perfect, 0 * labels, perfect, 0 * labels)  # there is one class
    assert all(part["accuracies"] == [100.0] * 5 for part in one.values())
    # a class that has one image
    labels[:3] = torch.tensor([0, 1, 3])
    assert few_labels(perfect, labels, perfect, labels)["20"]["images"] == 30


def test_a_set_with_one_image_per_class_is_drawn(tmp_path):
    """All parts of the labels are then the same images."""
    labels = torch.arange(4)
    found = few_labels(torch.eye(4), labels, torch.eye(4), labels)
    eval_few.draw_few(tmp_path / "few.png", {"small": {"eye": found}})
    assert (tmp_path / "few.png").stat().st_size > 5000


def test_the_picture_shows_mean_and_deviation_against_labels(tmp_path, drawn):
    """Solid: labels per class; dashed: parts of all labels."""
    images = (9, 18, 45, 90, 180, 50, 500)
    found = {
        name: {"images": count, "mean": 30.0 + count / 10, "deviation": 1.5}
        for name, count in zip(BUDGETS, images)
    }
    eval_few.draw_few(tmp_path / "few.png", {"small": {"a": found}})
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    solid, dashed = [bars[0] for bars in axes.containers]
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert [*solid.get_xdata(), *dashed.get_xdata()] == list(images)
    expected = [30.0 + count / 10 for count in images]
    assert [*solid.get_ydata(), *dashed.get_ydata()] == expected
    for bars, heights in zip(axes.containers, (expected[:5], expected[5:])):
        ends = [line[:, 1].tolist() for line in bars[2][0].get_segments()]
        assert ends == [[height - 1.5, height + 1.5] for height in heights]


def test_test_labels_choose_nothing(monkeypatch):
    """Other test images, and other labels of them, leave all weights as they are."""
    fits = []

    def spy(*args):
        fits.append(fit_logistic(*args)[0])
        return fit_logistic(*args)

    monkeypatch.setattr(eval_few, "fit_logistic", spy)
    monkeypatch.setattr(eval_few, "BUDGETS", {"2": 2})
    labels = torch.arange(30) % 3
    bank = noise(30, 4, dtype=torch.float32)
    few_labels(bank, labels, bank, labels)
    few_labels(bank, labels, bank[:9] + 1, labels[:9].flip(0))
    half = len(fits) // 2
    assert half == 5  # draws
    assert all(torch.equal(*pair) for pair in zip(fits[:half], fits[half:]))


def run_script(*flags, data=DATA, **patches):
    found = call_main("eval_few", *flags, "--workers", 0, data=data, **patches)
    out = flags[flags.index("--out") + 1]
    found.rows = read_lines(out / "results.jsonl")
    return found


def test_run(tmp_path):
    """One line per network, after a kill in the middle; a second call measures nothing; the network
    stays as it was, batch-norm included; the picture is there."""
    net = write_run(tmp_path / "a", arch="resnet14")
    out = tmp_path / "out"
    loaded = []
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def stopping(bank, *args):
        if len(read_lines(out / "results.jsonl")) == 2:
            raise InterruptedError
        return few_labels(bank, *args)

    def watched(args):
        loaded.extend(candidates(args))
        return loaded

    with pytest.raises(InterruptedError):
        run_script(tmp_path / "a", "--out", out, few_labels=stopping)
    found = run_script(tmp_path / "a", "--out", out, candidates=watched)
    assert found.code == 0, found.err
    assert found.out.count("already measured") == 2
    for name, value in loaded[-1].network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not loaded[-1].network.training
    names = ["k-means, 8 px", "raw pixels, 8 px", "untrained resnet14, 8 px", "a"]
    assert [row["network"] for row in found.rows] == names
    assert {row["protocol"] for row in found.rows} == {"few"}
    known = labelled_features(pixels(8), DATA, 8, CPU, 0)
    assert found.rows[1]["result"] == json.loads(json.dumps(few_labels(*known[:4])))
    net.to(memory_format=torch.channels_last)  # as in training
    known = labelled_features(net, DATA, 8, CPU, 0)
    assert found.rows[3]["result"]["1"]["accuracies"] == few_labels(*known[:4])["1"]["accuracies"]

    lines = found.out.splitlines()
    head = next(i for i, line in enumerate(lines) if "1 per class" in line)
    settings = {"size": 8, "images": [40, 16], "budgets": BUDGETS, "draws": 5, "C": 1.0}
    assert found.rows[3]["settings"] == settings
    part = found.rows[3]["result"]["10 %"]
    assert lines[head + 4].startswith("a ")
    assert lines[head + 4].endswith(f" {part['mean']:.1f} +- {part['deviation']:.1f}")
    assert (out / "few.png").stat().st_size > 5000
    again = run_script(tmp_path / "a", "--out", out, few_labels=None)
    assert again.rows == found.rows and again.out.splitlines()[-6:] == lines[-6:]


def test_other_draws_budgets_and_costs_are_measured_anew(tmp_path):
    """What few_labels depends on belongs to a measurement."""
    write_run(tmp_path / "a")
    calls = []

    def quick(*sets):
        calls.append(len(calls))
        return {name: {"images": 1, "mean": 5.0, "deviation": 1.0} for name in eval_few.BUDGETS}

    patches = {"few_labels": quick, "with_kmeans": as_given, "draw_few": lambda *_: None}

    def measured(**changed):
        calls.clear()
        found = run_script(tmp_path / "a", "--out", tmp_path / "out", **patches, **changed)
        assert found.code == 0, found.err
        return len(calls)

    assert [measured(), measured()] == [3, 0]
    assert [measured(C=2.0), measured(DRAWS=4), measured(BUDGETS={"1": 1})] == [3, 3, 3]


def test_dead_features_shorten_all_others(monkeypatch):
    """The mean squared length is the share of the features that vary."""
    seen = []

    def spy(x, *args):
        seen.append(x)
        return fit_logistic(x, *args)

    monkeypatch.setattr(eval_few, "fit_logistic", spy)
    monkeypatch.setattr(eval_few, "BUDGETS", {"all": 100})
    labels = torch.arange(50) % 3
    bank = noise(50, 10, dtype=torch.float32)
    bank[:, :4] = 3
    few_labels(bank, labels, bank, labels)
    assert seen[0].square().sum(1).mean().item() == pytest.approx(0.6, rel=0.03)  # 49 / 50 of it


def of_two_processes(folder, out):
    found = run_script(folder, "--out", out)
    assert found.code == 0, found.err


@pytest.mark.thorough
def test_two_processes(processes, tmp_path):
    write_run(tmp_path / "a")
    alone = run_script(tmp_path / "a", "--out", tmp_path / "one")
    processes(2, of_two_processes, tmp_path / "a", tmp_path / "two")
    together = read_lines(tmp_path / "two" / "results.jsonl")
    assert len(together) == 4
    for row, other in zip(alone.rows, together):
        for name, part in row["result"].items():
            # one of 16 images may lie on the border
            assert other["result"][name]["mean"] == pytest.approx(part["mean"], abs=100 / 16 / 5)


def test_refusals(tmp_path):
    write_run(tmp_path / "a")
    unlabelled = DATA._replace(train=DATA.train._replace(labels=None), test=None)
    found = run_script(tmp_path / "a", "--out", tmp_path / "out", data=unlabelled)
    assert found.code == 1 and found.err.startswith("error: emoji has no labels")
    assert found.err.count("\n") == 1 and not found.rows

    saved = torch.load(tmp_path / "a" / "backbone.pt")
    saved["weights"]["norm.bias"][3] = math.inf
    torch.save(saved, tmp_path / "a" / "backbone.pt")
    found = run_script(tmp_path / "a", "--out", tmp_path / "out")
    assert found.code == 1 and "a/backbone.pt: a weight is NaN or infinite" in found.err


def test_one_image_is_too_few(tmp_path):
    write_run(tmp_path / "a")
    alone = tiny_data(1, 16)
    found = run_script(tmp_path / "a", "--out", tmp_path / "out", data=alone, with_kmeans=as_given)
    assert found.code == 1 and found.err.count("\n") == 1
    assert found.err.startswith("error: tiny: two training images with labels are needed")


def test_no_test_image_that_can_be_read(tmp_path):
    """One clear sentence instead of an accuracy of no images."""
    write_run(tmp_path / "a", arch="resnet14")
    for half in ("train", "val"):
        for label in ("red", "green"):
            folder = tmp_path / "images" / half / label
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    data = load_data(str(tmp_path / "images"), "", CPU)
    for file in (tmp_path / "images" / "val").glob("*/*.png"):
        file.write_text("no picture")
    flags = [tmp_path / "a", "--out", tmp_path / "out"]
    found = run_script(*flags, data=data, with_kmeans=as_given)
    assert found.code == 1 and not found.rows
    words = "none of 6 images for the evaluation can be read: replace these files"
    assert found.err.endswith(f"error: {words}\n")


def as_given(found, *_):
    """In place of with_kmeans."""
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_end_in_one_sentence(tmp_path, value):
    """Though all weights are finite."""
    write_run(tmp_path / "a")

    def spoiled(args):
        run = candidates(args)[-1]
        network = torch.nn.Sequential(run.network, torch.nn.Threshold(1e9, value))
        return [run._replace(network=network)]

    patches = {"candidates": spoiled, "with_kmeans": as_given}
    found = run_script(tmp_path / "a", "--out", tmp_path / "out", **patches)
    assert found.code == 1 and found.err.count("\n") == 1 and not found.rows
    assert found.err.startswith("error: some features are infinite or not a number")
