"""methods/eval_features.py: its numbers are those of evaluate(); its SVMs are scikit-learn's; it
continues after a kill, and refuses wrong files in one sentence, before anything is measured."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import PIL
import pytest
import torch
from conftest import CPU, ROOT, call_main, noise, tiny_data
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.svm import LinearSVC
from torch import nn

import methods.simclr
from common import backbone, evaluate, load_data, pixels, print0, read_lines
from methods.eval_features import (
    COSTS,
    average_precision,
    fit_svm,
    knn_curve,
    spread,
    svm,
)

DATA = tiny_data(40, 16)


def write_run(folder, seed=3, arch="vit_micro", size=8, method="simclr", epochs=2):
    """A finished run: an untrained network and a short metrics.jsonl."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    net = backbone(arch, size)
    saved = {"method": method, "arch": arch, "size": size, "data": "emoji"}
    torch.save({**saved, "weights": net.state_dict()}, folder / "backbone.pt")
    lines = [
        {"method": method, "settings": {"data": "emoji", "seed": seed, "epochs": epochs}},
        {"step": 0, "epoch": 0, "loss": 2.0, "knn20": 41.0},
        {"evaluation": {"knn20": 44.0}, "pixels": {"knn20": 30.0}, "random_init": {"knn20": 40.0}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return net


def quick(network, data, size, device, workers=0):
    """evaluate() without the linear probe, which takes longest."""
    return evaluate(network, data, size, device, workers, only_knn=True)


def run_script(*flags, data=DATA, evaluate=quick, draw=False, kmeans=False, **patches):
    """main() of the script, and the lines of results.jsonl. Only `features`, and not of k-means, if
    nothing else is asked for."""
    patches["evaluate"] = evaluate
    if "--only" not in flags:
        flags = [*flags, "--only", "features"]
    if not kmeans:
        patches["with_kmeans"] = lambda found, *_: found
    if not draw:
        patches["draw_curves"] = lambda *_: None
    found = call_main("eval_features", *flags, "--workers", 0, data=data, **patches)
    out = flags[flags.index("--out") + 1]
    found.rows = read_lines(out / "results.jsonl")
    return found


class Counter:
    """Counts the evaluations, and stops before one of them, as a kill would."""

    def __init__(self, stop_at=None):
        self.sizes = []
        self.stop_at = stop_at

    def __call__(self, network, data, size, *args):
        if len(self.sizes) == self.stop_at:
            raise InterruptedError
        self.sizes.append(size)
        return quick(network, data, size, *args)


def no_evaluation(*args):
    raise AssertionError("measured something before it looked at all files")


# -------- What is measured ------------------------------------------------------------------------


def test_values_are_those_of_evaluate(tmp_path):
    first = write_run(tmp_path / "simclr-emoji-0")
    second = write_run(tmp_path / "rotnet-emoji-1", seed=4, method="rotnet")
    torch.manual_seed(0)
    networks = {
        "raw pixels, 8 px": pixels(8),
        "untrained vit_micro, 8 px": backbone("vit_micro", 8),
        "simclr-emoji-0": first,
        "rotnet-emoji-1": second,
    }
    expected = {}
    for name, network in networks.items():
        network.to(memory_format=torch.channels_last)  # as in training
        expected[name] = evaluate(network, DATA, 8, CPU)

    asked = []
    folders = [tmp_path / "simclr-emoji-0", tmp_path / "rotnet-emoji-1" / "backbone.pt"]
    out = tmp_path / "out"

    def load(*args):
        asked.append(args[0])
        return DATA

    found = run_script(*folders, "--out", out, evaluate=evaluate, draw=True, load_data=load)
    assert found.code == 0, found.err
    assert asked == ["emoji"]  # what both were trained on, loaded once
    # one untrained network for both: the methods share it
    assert [row["network"] for row in found.rows] == list(expected)
    for row in found.rows:
        assert row["result"] == expected[row["network"]], row["network"]

    # the table: a line per network, the columns in the order of the head
    lines = found.out.splitlines()
    columns = ["knn20", "knn200", "linear", "retrieval1", "retrieval5", "rankme"]
    head = next(i for i, line in enumerate(lines) if line.split() == columns)
    for line, row in zip(lines[head + 1 :], found.rows):
        assert line.startswith(row["network"])
        numbers = [float(word) for word in line.removeprefix(row["network"]).split()]
        assert numbers == [round(row["result"][column], 1) for column in columns]

    # what a line records
    row = found.rows[2]
    assert row["protocol"] == "features" and row["data"] == "emoji" and row["seed"] == 3
    assert row["settings"] == {"size": 8, "images": [40, 16]} and row["training"]["epochs"] == 2
    packages = {"python", "numpy", "torch", "torchvision", "scikit-learn", "scipy", "pillow"}
    assert set(row["versions"]) == packages and row["versions"]["torch"] == torch.__version__
    assert row["versions"]["pillow"] == PIL.__version__ and "commit" in row
    assert row["command"].startswith(f"methods/eval_features.py {folders[0]} {folders[1]} --out")
    assert found.rows[1]["seed"] == 0
    assert (out / "curves.png").stat().st_size > 5000


def test_another_size_and_a_network_of_its_own(tmp_path, monkeypatch):
    """A method that makes its backbone itself is compared with its own untrained network."""

    def own(arch, size):
        net = backbone(arch, size)
        net.conv1.register_forward_pre_hook(lambda conv, inputs: (inputs[0].flip(1),))
        return net

    monkeypatch.setattr(methods.simclr, "backbone", own)
    write_run(tmp_path / "a", arch="resnet14")
    counter = Counter()
    found = run_script(tmp_path / "a", "--size", 16, "--out", tmp_path / "out", evaluate=counter)
    names = [row["network"] for row in found.rows]
    assert names == ["raw pixels, 16 px", "untrained resnet14 of simclr made for 8, 16 px", "a"]
    assert counter.sizes == [16, 16, 16]
    torch.manual_seed(0)
    assert found.rows[1]["result"] == quick(own("resnet14", 8), DATA, 16, CPU)


def test_vit_at_another_size_and_images_without_labels(tmp_path):
    net = write_run(tmp_path / "a")
    unlabelled = DATA._replace(train=DATA.train._replace(labels=None), test=None)
    unlabelled = unlabelled._replace(bank=unlabelled.train)
    flags = [tmp_path / "a", "--size", 12, "--out", tmp_path / "out"]
    found = run_script(*flags, data=unlabelled, evaluate=evaluate)
    assert found.code == 0, found.err
    assert "rankme" in found.out and "knn20" not in found.out
    assert found.rows[2]["result"] == pytest.approx(evaluate(net, unlabelled, 12, CPU), rel=1e-5)


def of_two_processes(folder, out):
    found = run_script(folder, "--out", out)
    assert found.code == 0, found.err
    return found.out


@pytest.mark.thorough
def test_several_processes_write_one_file_with_the_same_numbers(processes, tmp_path):
    write_run(tmp_path / "a")
    alone = run_script(tmp_path / "a", "--out", tmp_path / "one").rows
    texts = processes(2, of_two_processes, tmp_path / "a", tmp_path / "two")
    together = read_lines(tmp_path / "two" / "results.jsonl")
    assert len(together) == 3 and texts[0] and not texts[1]
    for row, other in zip(alone, together):
        assert row["network"] == other["network"]
        assert other["result"] == row["result"]


# -------- Continuing ------------------------------------------------------------------------------


def test_continues_after_a_kill_and_measures_nothing_twice(tmp_path):
    write_run(tmp_path / "a")
    out = tmp_path / "out"
    with pytest.raises(InterruptedError):
        run_script(tmp_path / "a", "--out", out, evaluate=Counter(stop_at=2))
    whole = (out / "results.jsonl").read_text()
    assert whole.count("\n") == 2
    (out / "results.jsonl").write_text(whole + '{"protocol": "fea')  # cut short by the kill

    counter = Counter()
    found = run_script(tmp_path / "a", "--out", out, evaluate=counter)
    assert len(counter.sizes) == 1 and len(found.rows) == 3
    assert (out / "results.jsonl").read_text().startswith(whole)
    assert found.out.count(": already measured") == 2 and found.out.count(", features\n") == 1
    again = run_script(tmp_path / "a", "--out", out, evaluate=no_evaluation)
    assert again.code == 0 and again.rows == found.rows
    assert again.out.splitlines()[-6:] == found.out.splitlines()[-6:]  # the same table


def test_other_data_sizes_seeds_and_weights_are_kept_apart(tmp_path):
    write_run(tmp_path / "a")
    flags = [tmp_path / "a", "--out", tmp_path / "out"]

    def measured(*more, data=DATA):
        counter = Counter()
        found = run_script(*flags, *more, data=data, evaluate=counter)
        assert found.code == 0, found.err
        return len(counter.sizes)

    assert measured() == 3
    assert measured("--seed", 1) == 1  # another untrained network
    assert measured("--size", 12) == 3
    assert measured("--data", "fashion") == 3
    assert measured(data=tiny_data(40, 12)) == 3  # the same name, other images
    shutil.rmtree(tmp_path / "a")
    write_run(tmp_path / "a", seed=5)  # a new run in the same folder
    assert measured() == 1
    assert measured() == 0 and measured("--size", 12, "--seed", 1) == 2


def test_other_costs_of_the_svms_are_measured_anew(tmp_path):
    """They belong to the measurement of an SVM, and of nothing else."""
    write_run(tmp_path / "a")
    calls = []

    def quick_svm(*sets):
        calls.append(len(calls))
        return {"svm": 50.0}

    def measured(only, **changed):
        calls.clear()
        flags = [tmp_path / "a", "--only", only, "--out", tmp_path / "out"]
        counter = Counter()
        found = run_script(*flags, evaluate=counter, svm=quick_svm, **changed)
        assert found.code == 0, found.err
        return len(calls) + len(counter.sizes)

    assert [measured("svm"), measured("svm"), measured("svm", COSTS=(1.0,))] == [3, 0, 3]
    assert [measured("features"), measured("features", COSTS=(2.0,))] == [3, 0]


def test_files_that_cannot_be_read_are_left_out(tmp_path):
    """A folder of red, green and blue images, of each half of which two files are broken: all
    others are right, as neighbours, by the probe and by the SVMs. The features of a broken file are
    those of a black image, which can be right for one label only."""
    write_run(tmp_path / "a", arch="resnet14")
    rng = np.random.default_rng(0)
    for half, count in (("train", 8), ("val", 3)):
        for channel, label in enumerate(("red", "green", "blue")):
            folder = tmp_path / "images" / half / label
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(60, size=(8, 8, 3), dtype=np.uint8)
                image[:, :, channel] += 180
                Image.fromarray(image).save(folder / f"{i}.png")
            if label != "blue":
                (folder / "0.png").write_text("no picture")
    flags = [tmp_path / "a", "--only", "all", "--out", tmp_path / "out"]
    data = load_data(str(tmp_path / "images"), "", CPU)
    found = run_script(*flags, data=data, evaluate=evaluate)
    assert found.code == 0, found.err
    assert found.err.count("left out, cannot be used") == 4
    for row in found.rows:
        assert row["settings"]["images"] == [24, 9]
        for name in ("knn20", "linear", "svm"):
            assert row["result"].get(name, 100) == 100, (row["network"], name)
    assert {row["protocol"] for row in found.rows} == {"features", "svm", "cost"}


@pytest.mark.parametrize(
    ("script", "flags", "pictures"),
    [
        ("eval_few", [], ["few.png"]),
        ("eval_layers", [], ["layers.png"]),
        ("eval_finetune", ["--steps", 2, "--draws", 1], ["finetune.png"]),
        (
            "eval_geometry",
            ["--views", 2, "--probes", 3],
            ["spectrum-images.png", "tsne-images-category.png"],
        ),
        ("eval_robustness", [], ["corruptions.png", "robustness.png"]),
    ],
)
def test_the_other_scripts_take_any_folder(script, flags, pictures, tmp_path):
    """Here of red, green and blue images that are larger than the network's."""
    for half, count in (("train", 6), ("val", 5)):
        for label in range(3):
            folder = tmp_path / "images" / half / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                image = np.random.default_rng([i, label, count]).integers(0, 99, (20, 24, 3))
                image[..., label] += 120
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
    write_run(tmp_path / "a")
    out = tmp_path / "out"
    data = load_data(str(tmp_path / "images"), "", CPU)
    flags = [tmp_path / "a", "--data", tmp_path / "images", "--out", out, "--workers", 0, *flags]
    found = call_main(script, *flags, data=data)
    assert found.code == 0, found.err
    assert all((out / name).stat().st_size > 5000 for name in pictures)
    rows = read_lines(out / "results.jsonl")
    networks = {row["network"] for row in rows}
    assert {"a", "raw pixels, 8 px", "untrained vit_micro, 8 px"} <= networks
    assert {row["data"] for row in rows} == {str(tmp_path / "images")}


def test_two_folders_of_one_name(tmp_path):
    write_run(tmp_path / "here" / "a")
    write_run(tmp_path / "there" / "a", seed=4)
    folders = [tmp_path / "here" / "a", tmp_path / "there" / "a", tmp_path / "here" / "a"]
    found = run_script(*folders, "--out", tmp_path / "out")
    assert [row["network"] for row in found.rows[2:]] == ["a", str(folders[1])]
    assert found.rows[2]["weights"] != found.rows[3]["weights"]


# -------- The SVMs --------------------------------------------------------------------------------


def test_average_precision_by_hand():
    """Sorted: right, wrong, right, wrong, right. Precision 1, 1/2, 2/3, 1/2, 3/5 at recall 1/3,
    1/3, 2/3, 2/3, 1; the highest at this or a larger recall: 1, 2/3, 2/3, 3/5, 3/5."""
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    positive = torch.tensor([True, True, True, False, False])
    assert average_precision(scores, positive) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # after a tie of one right and one wrong image: 1/2 or 2/3, not 1
    tied = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.3])
    assert average_precision(tied, positive) == pytest.approx((2 / 3 + 2 / 3 + 3 / 5) / 3)
    assert average_precision(torch.zeros(5), positive) == pytest.approx(3 / 5)
    assert average_precision(positive.float(), positive) == 1
    assert math.isnan(average_precision(scores, torch.zeros(5, dtype=torch.bool)))
    assert math.isnan(average_precision(scores[:0], positive[:0]))


@pytest.mark.parametrize("levels", [3, 1000])
def test_average_precision_and_scikit_learns(levels):
    """scikit-learn takes the precision itself: ours is the area below its curve after each
    precision has become the highest at this or a larger recall. Both take ties together."""
    scores = (noise(200) * levels).round()
    positive = noise(200, seed=1) + 0.5 * scores / levels > 0.8
    precision, recall, _ = precision_recall_curve(positive, scores)  # by falling recall
    highest = np.maximum.accumulate(precision)
    area = -np.sum(np.diff(recall) * highest[:-1])
    found = average_precision(scores, positive)
    assert found == pytest.approx(area, abs=1e-12)
    theirs = average_precision_score(positive, scores)
    assert theirs - 1e-12 < found < theirs + 0.1
    if levels == 1000:
        assert found > theirs + 1e-3
    else:  # the order of equal scores does not matter
        order = torch.randperm(200)
        assert average_precision(scores[order], positive[order]) == pytest.approx(found, abs=1e-12)


def by_sklearn(x, positive, cost):
    """The official settings, but to convergence: for so few images `dual` is only slower."""
    weights = {True: 2, False: 1}
    solver = LinearSVC(C=cost, class_weight=weights, dual=False, tol=1e-9, max_iter=10_000)
    return solver.fit(x.double().numpy(), positive.numpy())


def clusters(count=90, classes=3, seed=0):
    """Features (N, 6) of overlapping classes, and labels that are not equally frequent."""
    labels = torch.arange(count) % (classes + 1) % classes
    centres = noise(classes, 6, seed=seed + 1, dtype=torch.float32)
    return 3 + 0.7 * centres[labels] + noise(count, 6, seed=seed, dtype=torch.float32), labels


@pytest.mark.parametrize("cost", [0.01, 1.0, 100.0])
def test_svm_is_that_of_scikit_learn(cost):
    x, labels = clusters()
    x = nn.functional.normalize(x, dim=1)
    positive = labels[:, None] == torch.arange(3)
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    variance, rotation = torch.linalg.eigh(ones.T @ ones / len(x))
    sign = torch.where(positive, 1.0, -1.0)
    weight = fit_svm(ones @ rotation, sign, cost, variance.clamp(min=0), torch.zeros(3, 7))
    scores = ones @ rotation @ weight.T
    for c in range(3):
        theirs = by_sklearn(x, positive[:, c], cost).decision_function(x.double().numpy())
        # scores are of the order of 1
        assert np.abs(scores[:, c].numpy() - theirs).max() < 5e-3


def test_costs_and_precisions_are_those_of_scikit_learn():
    """The protocol with LinearSVC, class by class; groups of three images, each in one fold."""
    x, labels = clusters()
    test, test_labels = clusters(seed=0)[0] + 0.3, labels
    groups = torch.arange(len(x)) // 3 * 3 + labels * 1000  # images of one class
    found = svm(x, labels, test, test_labels, groups)

    def unit(x):
        return x / (x.norm(dim=1, keepdim=True) + 1e-5)

    names = groups.unique()
    own = torch.tensor([labels[groups == name][0] for name in names])
    fold = torch.empty(len(x), dtype=torch.int64)
    for turn, i in enumerate(own.argsort(stable=True)):
        fold[groups == names[i]] = turn % 3
    for c in range(3):
        positive = labels == c
        means = []
        for cost in COSTS:
            values = []
            for k in range(3):
                fitted = by_sklearn(unit(x[fold != k]), positive[fold != k], cost)
                scores = fitted.decision_function(unit(x[fold == k]).double().numpy())
                values.append(average_precision(torch.from_numpy(scores), positive[fold == k]))
            means.append(np.mean(values))
        chosen = means[COSTS.index(found["costs"][c])]
        assert chosen > max(means) - 2e-3  # near equals may be swapped by rounding
        fitted = by_sklearn(unit(x), positive, found["costs"][c])
        scores = torch.from_numpy(fitted.decision_function(unit(test).double().numpy()))
        value = 100 * average_precision(scores, test_labels == c)
        assert found["precisions"][c] == pytest.approx(value, abs=0.5)
    assert found["svm"] == pytest.approx(np.mean(found["precisions"]), abs=1e-4)
    assert min(found["precisions"]) > 40 and max(found["precisions"]) < 100


def test_what_changes_no_svm():
    """Test labels choose nothing; the length of a feature vector does not matter."""
    x, labels = clusters(60)
    found = svm(x, labels, x, labels, None)
    assert svm(x, labels, x, labels.flip(0), None)["costs"] == found["costs"]
    scaled = x * torch.linspace(0.5, 20, len(x))[:, None]
    assert svm(scaled, labels, x, labels, None)["svm"] == pytest.approx(found["svm"], abs=0.1)
    perfect = nn.functional.one_hot(labels).float()
    assert svm(perfect, labels, perfect, labels, None)["svm"] == 100


def test_degenerate_features_and_classes_have_defined_precisions():
    x, labels = clusters(30)
    constant = svm(torch.ones(30, 4), labels, torch.ones(9, 4), torch.arange(9) % 3, None)
    assert constant["precisions"] == pytest.approx([100 / 3] * 3)
    assert svm(torch.zeros(30, 4), labels, torch.zeros(9, 4), torch.arange(9) % 3, None) == constant
    # a class with one bank image and no test image, and one with two
    labels[:4] = torch.tensor([3, 4, 4, 0])
    rare = svm(x, labels, x[4:], labels[4:], None)
    assert rare["precisions"][3:] == [None, None] and 0 < rare["svm"] <= 100
    one = svm(x, torch.zeros(30, dtype=torch.int64), x, torch.zeros(30, dtype=torch.int64), None)
    assert one["precisions"] == [100]
    two = svm(x[:2], torch.tensor([0, 1]), x[:2], torch.tensor([0, 1]), None)
    assert two["svm"] == 100


@pytest.mark.parametrize("images, groups", [(1, None), (30, torch.zeros(30, dtype=torch.int64))])
def test_svm_of_one_image_or_one_group_is_refused(images, groups, capsys):
    x, labels = clusters(30)
    with pytest.raises(SystemExit):
        svm(x[:images], labels[:images], x, labels, groups)
    error = capsys.readouterr().err
    assert error.startswith("error: all training images show the same thing")
    assert error.count("\n") == 1


def test_svm_without_a_test_image_of_a_known_class_is_not_defined():
    x, labels = clusters(30)
    found = svm(x, labels, x, labels + 9, None)
    assert math.isnan(found["svm"]) and found["precisions"] == [None] * 3


# -------- All parts -------------------------------------------------------------------------------


def test_all_parts_of_a_run(tmp_path):
    """One line per part and network, one table for accuracies and one for costs; the network stays
    as it was, a second call measures nothing."""
    write_run(tmp_path / "a", arch="resnet14")
    metrics = tmp_path / "a" / "metrics.jsonl"
    costs = '}, "train_seconds": 61.5, "train_flops": 3.4e12, "peak_memory_gb": 0.71, "pixels"'
    metrics.write_text(metrics.read_text().replace('}, "pixels"', costs))
    seen = []

    def watched(network, *args):
        seen.append((network, {k: v.clone() for k, v in network.state_dict().items()}))
        return quick(network, *args)

    flags = [tmp_path / "a", "--only", "all", "--out", tmp_path / "out"]
    found = run_script(*flags, kmeans=True, evaluate=watched)
    assert found.code == 0, found.err
    names = ["k-means, 8 px", "raw pixels, 8 px", "untrained resnet14, 8 px", "a"]
    parts = ("features", "svm", "cost")
    rows = [(row["network"], row["protocol"]) for row in found.rows]
    assert rows == [(name, part) for name in names for part in parts]
    for network, state in seen:
        for key, value in network.state_dict().items():
            assert torch.equal(value, state[key]), key
        assert not any(p.grad is not None for p in network.parameters())

    assert found.rows[0]["seed"] == 0 and "256 centroids" in found.rows[0]["weights"]
    cost = found.rows[-1]["result"]
    assert cost["images_per_s"] > 0 and cost["parameters"] > 1e6
    last = [line for line in found.out.splitlines() if line.startswith("a  ")]
    assert len(last) == 2
    svm_column = float(last[0].split()[3])
    assert svm_column == round(found.rows[-2]["result"]["svm"], 1)
    assert last[1].split()[1:3] == ["1.13", f"{cost['flops'] / 1e6:.1f}"]
    assert last[1].split()[-3:] == ["61.5", "3.4", "0.7"]
    raw = [line for line in found.out.splitlines() if line.startswith("raw pixels, 8 px  ")]
    assert raw[1].split()[-3:] == ["-"] * 3  # it was not trained
    again = run_script(*flags, kmeans=True, evaluate=no_evaluation)
    assert again.rows == found.rows and again.out.splitlines()[-14:] == found.out.splitlines()[-14:]


def svm_of_two_processes(folder, out):
    found = run_script(folder, "--out", out, "--only", "svm", kmeans=True)
    assert found.code == 0, found.err


@pytest.mark.thorough
def test_svm_of_two_processes(processes, tmp_path):
    write_run(tmp_path / "a")
    alone = run_script(tmp_path / "a", "--out", tmp_path / "one", "--only", "svm", kmeans=True)
    processes(2, svm_of_two_processes, tmp_path / "a", tmp_path / "two")
    together = read_lines(tmp_path / "two" / "results.jsonl")
    assert len(together) == 4
    for row, other in zip(alone.rows, together):
        assert row["network"] == other["network"]
        # batches of other sizes round differently
        assert other["result"]["svm"] == pytest.approx(row["result"]["svm"], abs=1)


def test_without_labels(tmp_path):
    write_run(tmp_path / "a")
    unlabelled = DATA._replace(train=DATA.train._replace(labels=None), test=None)
    unlabelled = unlabelled._replace(bank=unlabelled.train)
    flags = [tmp_path / "a", "--out", tmp_path / "out"]
    found = run_script(*flags, "--only", "svm", data=unlabelled)
    assert found.code == 1 and found.err.startswith("error: --only svm: emoji has no labels")
    found = run_script(*flags, "--only", "all", data=unlabelled, evaluate=evaluate)
    assert "emoji has no labels: what needs none is measured" in found.out
    assert {row["protocol"] for row in found.rows} == {"features", "cost"}


# -------- Refusals --------------------------------------------------------------------------------


def refusal(*flags):
    """The one sentence with which the script ends, before anything is measured."""
    found = call_main("eval_features", *flags, evaluate=no_evaluation)
    assert found.code == 1 and found.err.startswith("error: ") and found.err.count("\n") == 1
    return found.err


def spoil_backbone(path, how):
    """Damages a backbone.pt. Returns how the sentence about it begins."""
    whole = path.read_bytes()
    if how in ("text", "empty", "cut"):
        path.write_bytes({"text": b"no weights", "empty": b"", "cut": whole[:1000]}[how])
    else:
        saved = torch.load(path)
        if how == "nan":
            saved["weights"]["norm.bias"][3] = math.nan
        others = {
            "tensor": torch.zeros(3),
            "checkpoint": {"state": {}, "step": 3},
            "resnet14": {**saved, "arch": "resnet14"},  # the weights of another network
            "nan": saved,
        }
        torch.save(others[how], path)
    if how == "nan":
        return f"{path}: a weight is NaN or infinite"
    return f"{path} is not the backbone.pt of a run ("


def test_runs_that_are_not_finished_or_damaged_are_left_out(tmp_path, monkeypatch):
    """They are named at the start, and again at the end of the program, on one line each."""
    at_end = []
    monkeypatch.setattr("common.atexit.register", lambda *call: at_end.append(call))
    write_run(tmp_path / "a")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text('{"method": "simclr"}\n')
    (tmp_path / "empty").mkdir()
    begins = [f"{tmp_path / name}/backbone.pt: no such file" for name in ("begun", "empty")]
    for how in ("cut", "nan"):
        write_run(tmp_path / how)
        begins.append(spoil_backbone(tmp_path / how / "backbone.pt", how))
    write_run(tmp_path / "line")
    metrics = tmp_path / "line" / "metrics.jsonl"
    metrics.write_text('{"settings": {"da\n{"step": 1, "loss": 2.0}\n')
    begins.append(f"{metrics}: its first line is damaged")

    folders = [tmp_path / name for name in ("begun", "empty", "cut", "nan", "line")]
    found = run_script(*folders[:2], tmp_path / "a", *folders[2:], "--out", tmp_path / "out")
    assert found.code == 0 and len(found.rows) == 3 and found.rows[2]["network"] == "a"
    lines = found.out.splitlines()[:5]
    assert all(line.startswith(f"left out: {begin}") for line, begin in zip(lines, begins))
    assert at_end == [(print0, "\n" + "\n".join(lines))]

    for left in (folders[:1], folders[3:], folders):
        words = refusal(*left)
        assert words.count("; ") >= len(left) - 1
        assert all(f"{folder}/" in words for folder in left)
    assert len(at_end) == 1  # the error is the last line


def test_the_program_ends_with_what_was_left_out(tmp_path):
    write_run(tmp_path / "a", arch="resnet14")
    (tmp_path / "begun").mkdir()
    words = [tmp_path / "a", tmp_path / "begun", "--only", "cost", "--out", tmp_path / "out"]
    script = [sys.executable, ROOT / "methods" / "eval_features.py"]
    done = subprocess.run([*script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"left out: {tmp_path}/begun/backbone.pt")
    assert lines[-1] == lines[0] and lines[-3].startswith(f"{tmp_path / 'out'}: ")


def test_the_folder_of_a_training_is_no_folder_for_results(tmp_path):
    write_run(tmp_path / "a")
    before = sorted(tmp_path.glob("a/*"))
    words = refusal(tmp_path / "a", "--out", tmp_path / "a")
    assert words.startswith(f"error: --out {tmp_path / 'a'}: a training wrote this folder")
    assert sorted(tmp_path.glob("a/*")) == before


def test_what_does_not_exist_or_is_not_named_is_refused(tmp_path):
    write_run(tmp_path / "a")
    assert f"{tmp_path / 'b'}: no such folder" in refusal(tmp_path / "a", tmp_path / "b")
    assert "RUN" in refusal()


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # a tensor by name
@pytest.mark.parametrize("how", ["text", "empty", "cut", "tensor", "checkpoint", "resnet14", "nan"])
def test_damaged_file_is_refused_before_anything_is_measured(tmp_path, how):
    write_run(tmp_path / "a")
    begin = spoil_backbone(tmp_path / "a" / "backbone.pt", how)
    assert refusal(tmp_path / "a").startswith(f"error: {begin}")


def test_metrics_without_their_first_line_are_refused(tmp_path):
    write_run(tmp_path / "a")
    metrics = tmp_path / "a" / "metrics.jsonl"
    metrics.write_text('{"settings": {"da\n{"step": 1, "loss": 2.0}\n')  # cut in a crash
    assert refusal(tmp_path / "a").startswith(f"error: {metrics}: its first line is damaged")


def test_a_side_that_no_patches_fill_is_refused(tmp_path):
    write_run(tmp_path / "a", arch="resnet14")
    write_run(tmp_path / "vit")
    words = refusal(tmp_path / "a", tmp_path / "vit", "--size", 30)
    assert words.startswith("error: --size 30: choose a multiple of 4, the side of a patch")


# -------- The picture -----------------------------------------------------------------------------


def test_knn_curve():
    first = {"settings": {"epochs": 6}}
    rows = [{"epoch": e, "loss": 1.0, "knn20": 50.0 + e} for e in (1, 3)]
    last = {"evaluation": {"knn20": 57.0}, "random_init": {"knn20": 48.0}}
    curve = [(0, 48.0), (2, 51.0), (4, 53.0), (6, 57.0)]
    assert knn_curve([first, rows[0], {"epoch": 2, "loss": 1.0}, rows[1], last]) == curve
    assert knn_curve([]) == knn_curve([first, *rows]) == []
    assert knn_curve([first, {"evaluation": {"rankme": 3.0}}]) == []


def test_spread():
    assert spread([5.0, 1.0, 1.5, 1.6], 1.0) == [5.0, 1.0, 2.0, 3.0]
    assert spread([2.0, 2.0], 0.5) == [2.0, 2.5]
    heights = noise(20).tolist()
    places = sorted(spread(heights, 0.3))
    assert all(b - a > 0.3 - 1e-9 for a, b in zip(places, places[1:]))
