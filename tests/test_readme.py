"""What README.md says: its Python runs, its sentences about the results follow from the rows, and
what is generated is what the rows say."""

import copy
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, SCRIPTS, arguments, call_main, kind_of, light, short, tiny_data
from PIL import Image

import common
from kernels import kmeans

README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "tests/results/EVALUATIONS.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "tests/results/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------- Python ----------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder with what README's Python expects: a folder of images, a finished run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for i, image in enumerate(tiny_data(96).train.images.pixels):
        folder = tmp_path / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    run = tmp_path / "runs" / "simclr-emoji-0"
    run.mkdir(parents=True)
    weights = common.backbone("resnet14", 32).state_dict()
    saved = {"method": "simclr", "arch": "resnet14", "size": 32, "data": "emoji"}
    torch.save({**saved, "weights": weights}, run / "backbone.pt")
    return tmp_path


def run_snippet(text):
    text = text.replace("PATH/TO/THIS/PROJECT", str(ROOT)).replace("PATH/TO/FOLDER", "images")
    names = {}
    exec(compile(text, "README.md", "exec"), names)
    return names


def test_a_method_copied_into_a_loop_of_ones_own_trains(elsewhere):
    assert len(SNIPPETS) == 2
    assert len(SNIPPETS[0].splitlines()) <= 32
    names = run_snippet(SNIPPETS[0])
    assert names["loss"].isfinite() and 0 < names["loss"] < 10
    # backward has reached the first layer, and the optimiser has moved it
    assert names["f"].conv1.weight.grad.abs().max() > 0


def test_own_images_through_views_and_a_trained_network(elsewhere):
    names = run_snippet(SNIPPETS[1])
    assert names["x1"].shape == names["x2"].shape == (100, 3, 32, 32)
    assert (names["x1"] - names["x2"]).abs().max() > 0.1
    assert names["h"].shape == (100, names["net"].out_dim) == (100, 768)
    assert names["h"].isfinite().all() and not names["h"].requires_grad


# -------- Results ---------------------------------------------------------------------------------


def test_pages_and_docstrings_are_generated_from_the_rows(report):
    report.main(["--check"])  # exits with an error if not


def test_a_wrong_number_on_a_page_is_found(report, tmp_path, monkeypatch, capsys):
    for name in report.PAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text().replace("54.1", "99.9"))
    monkeypatch.setattr(report, "PAGES", dict.fromkeys(report.PAGES, tmp_path))
    with pytest.raises(SystemExit) as stop:
        report.main(["--check"])
    assert stop.value.code == 1
    assert "README.md differs from the rows" in capsys.readouterr().err


def test_every_file_has_a_family_and_every_run_a_picture(report):
    """Of what has rows: what its network is shown, at most 40 kB, and a run with seed 0."""
    files = [name for family in report.FAMILIES.values() for name in family]
    assert sorted(files) == [name for name in SCRIPTS if kind_of(name) != "evaluation"]
    for name, runs in report.headline(report.read_rows()).items():
        picture = ROOT / "tests" / "results" / "views" / f"{name}.png"
        assert picture.stat().st_size < 40_000, name
        assert min(Image.open(picture).size) > 60, name
        assert 0 in {run["settings"]["seed"] for run in runs}, name


def means(runs, part):
    keys = runs[0][part].keys()
    return {key: statistics.mean(run[part][key] for run in runs) for key in keys}


def test_sentences_about_the_results(report):
    """Which methods are not above raw pixels and two points above their untrained network by linear
    accuracy, as means; which reach raw pixels in R@1; how many are below their untrained network;
    ten minutes at most on two cores; no run at the defaults has collapsed."""
    rows = report.read_rows()

    def parts(runs):
        return [means(runs, part) for part in ("evaluation", "random_init", "pixels")]

    behind = {True: [], False: []}  # learns from films: methods
    for name, runs in report.at_home(rows).items():
        after, before, raw = parts(runs)
        if after["linear"] < max(raw["linear"], before["linear"] + 2):
            behind[report.home(name) in report.FILMS].append(name)
        assert report.fastest(runs) < (1200 if report.on_one_core(runs) else 600), name
    reach = []
    below = []
    for name, runs in report.headline(rows).items():
        after, before, raw = parts(runs)
        if after["retrieval1"] >= raw["retrieval1"]:
            reach.append(name)
        if after["retrieval1"] < before["retrieval1"]:
            below.append(name)
    text = " ".join(README.split())
    for names in behind.values():
        assert f"but for {', '.join(sorted(names))} (" in text
    assert f"Only {' and '.join(sorted(reach))} reach" in text
    assert f"{len(below)} methods are below their own untrained network" in text
    for row in [row for runs in report.headline(rows).values() for row in runs]:
        for key in ("feature_std", "rankme"):
            assert row["evaluation"][key] > row["random_init"][key], row["command"]


STANDARD_ERROR = 2.3  # points, of an accuracy on the test images of emoji
OF_A_DIFFERENCE = 1.6  # of that between two networks


@pytest.mark.thorough
def test_the_standard_errors():
    """By the bootstrap over the emoji of the test set, of kNN and the linear probe: those of raw
    pixels and of the untrained network, and that of their difference on the same emoji."""
    data = common.load_data("emoji", "", CPU)
    names, member = data.test.emoji.unique(return_inverse=True)
    drawn = np.random.default_rng(0).integers(len(names), size=(2000, len(names)))

    def error(right):  # (emoji,): how many of the four drawings
        return 25 * right[torch.from_numpy(drawn)].mean(1).std().item()

    torch.manual_seed(0)
    neighbours = []
    probes = []
    for network in (common.pixels(32), common.backbone("resnet14", 32)):
        bank, _ = common.features(network, data.bank, 32, CPU)
        test, _ = common.features(network, data.test, 32, CPU)
        labels = data.bank.labels
        found = []
        for number in range(len(names)):
            of_it = member == number
            found.append(common.knn(bank, labels, test[of_it], data.test.labels[of_it], 20) / 25)
        neighbours.append(torch.tensor(found, dtype=torch.float64))
        classify = common.linear_classifier(bank, labels, data.bank.emoji)
        right = (classify(test) == data.test.labels).double()
        probes.append(torch.zeros(len(names), dtype=torch.float64).scatter_add_(0, member, right))
    for a, b in (neighbours, probes):
        assert error(a) == pytest.approx(STANDARD_ERROR, abs=0.15)
        assert error(b) == pytest.approx(STANDARD_ERROR, abs=0.15)
        assert error(a - b) == pytest.approx(OF_A_DIFFERENCE, abs=0.15)


def test_sentences_about_the_standard_error():
    words = (
        f"the standard error is about {STANDARD_ERROR} points (bootstrap over the 315 emoji of the "
        "test set, whose four drawings are alike), of a difference between two networks about "
        f"{OF_A_DIFFERENCE}"
    )
    for text in (README, PAGE):
        text = " ".join(text.split())
        assert words.lower() in text.lower()
        assert f"below about {2 * OF_A_DIFFERENCE:.0f} points" in text  # two standard errors
    log = " ".join((ROOT / "tests/results/LOG.md").read_text().split())
    assert f"less than the standard error of a difference, {OF_A_DIFFERENCE}." in log


def test_sentences_about_the_seed_of_the_untrained_network(report):
    """The evaluations have that of seed 0; the rows have three."""
    runs = report.headline(report.read_rows())["simclr"]
    found = {run["settings"]["seed"]: run["random_init"]["linear"] for run in runs}
    lucky, *others = [f"{found[seed]:.1f}" for seed in range(3)]
    assert found[0] > max(found[1], found[2])
    words = f"it has {lucky} by the linear probe, with seeds 1 and 2 {' and '.join(others)}."
    assert words in " ".join(PAGE.split())
    line = next(line for line in report.short_table(report.read_rows()) if "untrained res" in line)
    assert f"| {statistics.mean(found.values()):.1f} ± " in line and line.endswith("| 3 |")


def test_sentences_about_the_ranking_of_pretext_tasks(report):
    """They hold for the orders by linear accuracy and by its gain."""
    from scipy.stats import spearmanr

    found = report.ranking(report.read_rows())
    for column in (0, 1):
        ours = {name: numbers[column] for name, numbers in found.items()}
        assert spearmanr(list(ours.values()), [report.VOC[name] for name in ours]).pvalue > 0.05
        order = sorted(ours, key=ours.get)
        assert "counting" in order[3:7]  # in the middle
        steps = [ours[b] - ours[a] for a, b in zip(order, order[1:])]
        assert statistics.median(steps) < OF_A_DIFFERENCE
    painting = {"colorization", "color_proxy", "context_encoder", "split_brain"}
    assert order[-1] in painting
    assert sorted(report.VOC, key=report.VOC.get)[-2] == "counting"
    pretext = {"exemplar", "aet"} | report.VOC.keys()
    assert pretext == report.FAMILIES["Pretext tasks"].keys()


@pytest.fixture(scope="module")
def section():
    """What EVALUATIONS.md says about its tables, in one line."""
    text = PAGE[PAGE.index("## What the tables say") : PAGE.index("## Features, frozen")]
    return " ".join(text.split())


@pytest.fixture(scope="module")
def measured(report):
    """{table: what evaluations.jsonl holds of the networks in it}"""
    evaluations = report.evaluations
    return evaluations.networks_of(evaluations.read_rows(), report.FAMILIES["Video"])


UNTRAINED = "untrained resnet14, 32 px"
RAW = "raw pixels, 32 px"


def test_captions_of_the_evaluations(report, measured):
    """What the captions of EVALUATIONS.md and a docstring say in numbers."""
    evaluations = report.evaluations
    networks = measured["features"]
    page = " ".join(PAGE.split())

    # Always answering the most frequent class of the training images.
    with np.load(ROOT / "tests" / "data" / "emoji.npz") as file:
        most = np.bincount(file["train_labels"]).argmax()
        share = 100 * np.mean(file["test_labels"] == most)
        count = len(file["train_labels"])
    clean = [evaluations.mean(networks, name, "robustness", "clean") for name in networks]
    clean = [number for number in clean if number is not None]
    low, high = [100 * (a - share) / a for a in (min(clean), max(clean))]
    assert f"the most frequent class would lose {low:.0f} to {high:.0f}." in page
    words = f"{share:.1f} %, so of an accuracy of {min(clean):.0f} to {max(clean):.0f} % this "
    words += f"loses only {low:.0f} to {high:.0f}."
    doc = " ".join((ROOT / "methods" / "eval_robustness.py").read_text().split())
    assert words in doc

    # Fine-tuning: a linear probe is better than C = 1; 300 steps are few.
    more = []
    for protocols in networks.values():
        probes = protocols.get("fine-tuning 0.01", {})
        fixed = protocols.get("few", {})
        for run in probes.keys() & fixed.keys():
            both = (probes[run], "frozen"), (fixed[run], "1 %/accuracies")
            best, other = [evaluations.draws(*place) for place in both]
            more.append(statistics.mean(best) - statistics.mean(other))
    assert statistics.median(more) > 1 and round(max(more)) == 7
    assert "most often better than a fixed one, by up to seven points." in page
    assert f"300 steps of 128 images are {300 * 128 / count:.1f} epochs with all labels" in page
    losses = [evaluations.mean(networks, name, "fine-tuning 1.0", "loss") for name in networks]
    least = min(loss for loss in losses if loss is not None)
    assert f"the loss of the last one is {least:.2f} or more" in page
    scratch = networks[UNTRAINED]["fine-tuning 1.0"][None, 0]  # seed 0, on two machines
    assert {f"{result['tuned']:.1f}" for result in scratch} == {"58.3", "56.3"}
    assert "two machines trained a network from scratch to 58.3 and 56.3" in page

    # Normals: heads on frozen maps against one answer for all pixels of objects.
    known = measured["normals"]
    errors = {n: evaluations.mean(known, n, "normals, frozen", "object_angle") for n in known}
    errors = {name: error for name, error in errors.items() if error is not None}
    assert min(errors, key=errors.get) == "no network" and len(errors) > 20
    assert 'on objects no frozen network reaches "no network"' in page
    errors = {n: evaluations.mean(known, n, "normals, frozen", "all_angle") for n in known}
    errors = {name: error for name, error in errors.items() if error is not None}
    worse = [name for name in errors if errors[name] > errors["no network"] and "**" in name]
    assert len(worse) <= 1 and "over all pixels nearly all of them do" in page

    # Keypoints: where points lie in boxes, against heat maps.
    known = measured["keypoints"]
    for measure in ("pck_0.1", "auc"):
        places = [(name, way) for name in known for way in ("frozen", "fine-tuned")]
        scores = {p: evaluations.mean(known, p[0], f"keypoints, {p[1]}", measure) for p in places}
        scores = {place: score for place, score in scores.items() if score is not None}
        assert max(scores, key=scores.get) == ("no network", "frozen") and len(scores) > 40
    assert "No trained network, frozen or fine-tuned, beats this guess" in page


def test_the_same_commands_measure_everything(tmp_path):
    """README.md and EVALUATIONS.md have one command. In a folder with runs on emoji and one on a
    film every script gets the runs that it can measure. One that fails, here eval_few.py, does not
    keep the others from running."""
    (command,), other = [
        re.findall(r"```bash\n(bash .*battery.sh.*)\n", text) for text in (README, PAGE)
    ]
    assert other == [command]
    runs = ("sim clr-mae-0", "mae-emoji-0", "multitask-movers-0", "eval_features")
    for name in runs:
        (tmp_path / "runs" / name).mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\n(IFS="|"; echo "$*")\n[[ $1 != *eval_few.py ]]\n')
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = command.replace("tests/results/battery.sh", f"'{ROOT}/tests/results/battery.sh'")
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": env}
    done = subprocess.run(["bash", "-c", command], **options)
    assert done.returncode == 1 and not done.stderr
    calls = [line.replace("runs/", "").split("|") for line in done.stdout.splitlines()]
    assert all(Path(name).is_file() for name, *_ in calls)
    images = ["mae-emoji-0", "sim clr-mae-0"]
    expected = [
        ["eval_video.py", "multitask-movers-0"],
        ["eval_features.py", "multitask-movers-0", "--data", "fashion"],
        ["eval_features.py", "multitask-movers-0", "--data", "emoji"],
        ["eval_features.py", *images, "--data", "fashion"],
    ]
    for name in ("features", "few", "layers", "finetune", "geometry", "robustness"):
        expected.append([f"eval_{name}.py", *images])
    for name in ("eval_dense.py", "eval_detection.py"):
        expected.append([name, "mae-emoji-0", "--size", "48"])
        expected.append([name, "sim clr-mae-0"])
    assert [[Path(name).name, *words] for name, *words in calls] == expected
    names = [name for name in SCRIPTS if kind_of(name) == "evaluation"]
    assert {words[0] for words in expected} == {f"{name}.py" for name in names}

    python.write_text("#!/bin/bash\n")
    assert subprocess.run(["bash", "-c", command], **options).returncode == 0
    for name in runs:
        (tmp_path / "runs" / name).rmdir()
    done = subprocess.run(["bash", "-c", command], **options)
    assert done.returncode == 2 and done.stderr.startswith("give the folders of finished runs")


def test_the_readme_has_six_sentences_whose_numbers_are_those_of_the_page():
    short = README.split("<!-- worth -->")[1].split("<!-- /worth -->")[0]
    says = " ".join(PAGE.split("<!-- says -->")[1].split("<!-- /says -->")[0].split())
    sentences = [" ".join(text.split()) for text in short.split("\n- ")[1:]]
    assert len(sentences) == 6
    for text in sentences:
        assert text.endswith(".") and ". " not in text
        for number in re.findall(r"[+-]?\d+\.\d+(?: ± \d+\.\d+)?", text):
            assert number in says, (number, text)
    depth, _, mae, scenes, _, _ = sentences
    early, count = re.search(r"(\d+) of (\d+) trained ResNets", depth).groups()
    assert f"Here {early} of {count} trained ResNets are best after layer1 or layer2" in says
    assert mae in says
    count, *better = re.findall(r"\d+", scenes)
    parts = (
        "networks segment better than the same",
        "detect better (AP",
        "segment better than from scratch",
        "detect better (from",
    )
    for number, words in zip(better, parts, strict=True):
        assert f"{number} of {count} {words}" in says


def test_rows_of_kmeans_features_are_of_the_fit_that_is_described(report):
    """Not of an earlier one: both would be averaged."""
    rows = [row for row in report.evaluations.read_rows() if row["network"].startswith("k-means")]
    assert len(rows) > 40 and {row["weights"] for row in rows} == {kmeans.ABOUT}


def test_eleven_methods_went_through_every_evaluation_with_three_seeds(report):
    evaluations = report.evaluations
    done = {
        (row["method"], row["seed"], row["data"], evaluations.protocol(row))
        for row in evaluations.read_rows()
        if "method" in row and not row.get("variant")
    }
    names = "features svm cost few robustness clusters spectrum lidar smoothness tsne"
    names = names.split() + [f"fine-tuning {part}" for part in evaluations.SHARES.values()]
    due = [("emoji", name) for name in names] + [("fashion", name) for name in ("features", "svm")]
    for task in evaluations.SCENES:
        due += [("solids", f"{task}, {how}") for how in ("frozen", "fine-tuned")]
    methods = "barlow_twins byol colorization dino jigsaw mae moco rotnet simclr simsiam swav"
    for method in methods.split():
        layers = evaluations.BLOCKS if method == "mae" else evaluations.LAYERS
        of_layers = [("emoji", f"linear probe of {layer}") for layer in layers]
        for seed in range(3):
            assert not {(method, seed, *place) for place in due + of_layers} - done


def test_the_minutes_of_the_evaluations(report):
    """Of most runs on emoji: the median over the networks at their defaults, on one core."""
    kinds = {"fine-tuning": "fine", "detection": "detection", "segmentation": "dense"}
    kinds |= {"normals": "dense", "depth": "dense", "keypoints": "dense"}
    seconds = {}
    for row in report.evaluations.read_rows():
        usual = row["data"] in ("emoji", "solids") and not row.get("variant")
        if "method" in row and usual and row["device"].endswith(report.ONE_CORE):
            kind = kinds.get(row["protocol"].split(",")[0], "rest")
            if row["settings"].get("draw", 0) == 0:
                of_kind = seconds.setdefault(kind, {})
                of_kind[row["network"]] = of_kind.get(row["network"], 0) + row["seconds"]
    minutes = {kind: statistics.median(found.values()) / 60 for kind, found in seconds.items()}
    minutes["fine"] *= 3  # draws
    text = " ".join(README.split())
    words = "need four for fine-tuning, three each for detection and for the dense tasks, two for"
    assert f"{words} all the rest" in text
    expected = {"fine": 4, "detection": 3, "dense": 3, "rest": 2}
    for kind, number in expected.items():
        assert minutes[kind] == pytest.approx(number, abs=0.75), kind


# Their rows are older than the evaluations, for which the same commands were run once more.
TRAINED_AGAIN = {
    *("simclr", "moco", "swav", "barlow_twins", "byol", "simsiam", "dino", "mae"),
    *("rotnet", "jigsaw", "colorization"),
}


def test_what_is_evaluated_is_what_the_rows_have(report):
    """An evaluation of a default run is of the run in the rows, not of one with older defaults: its
    linear accuracy is the same."""
    known = {}
    for row in filter(report.is_default, report.read_rows()):
        key = row["method"], row["settings"]["seed"], row["settings"]["data"]
        known.setdefault(key, set()).add(row["evaluation"]["linear"])
    compared = 0
    for row in report.evaluations.read_rows():
        key = row.get("method"), row.get("seed"), row["data"]
        usual = row["protocol"] == "features" and not row.get("variant")
        if usual and key in known and key[0] not in TRAINED_AGAIN:
            assert any(abs(row["result"]["linear"] - x) < 1e-3 for x in known[key]), key
            compared += 1
    assert compared > 15


def test_sentences_about_videos(report, measured, section):
    """Motions and masks of the best methods; which methods are below raw pixels by motion; that no
    features tell the angle."""
    evaluations = report.evaluations
    networks = measured["video"]

    def number(name, *place):
        return f"{evaluations.mean(networks, f'**{name}**', *place):.1f}"

    def best(*place):
        trained = [name.strip("*") for name in networks if name.endswith("**")]  # at the defaults
        return sorted(trained, key=lambda name: -float(number(name, *place)))[:3]

    a, b, c = best("motion", "motion")
    x, y, z = (number(name, "motion", "motion") for name in (a, b, c))
    assert f"of {a} for {x} % of the clips, of {b} for {y}, of {c} for {z} (untrained" in section
    a, b, c = best("masks", "J")
    x, y, z = (number(name, "masks", "J") for name in (a, b, c))
    assert f"by {x} % ({a}), {y} ({b}) and {z} ({c}); untrained" in section
    for place in (("motion", "motion"), ("masks", "J")):
        for name in (UNTRAINED, RAW):
            assert f"{evaluations.mean(networks, name, *place):.1f}" in section, (name, place)
    copied = number("video_colorization", "masks", "J")
    before = "untrained resnet14 of video_colorization, 48 px"
    before = f"{evaluations.mean(networks, before, 'masks', 'J'):.1f}"
    assert f"carry, has {copied} (untrained {before}), less than raw pixels" in section
    assert float(copied) < evaluations.mean(networks, RAW, "masks", "J")

    motion = {n.strip("*"): evaluations.mean(networks, n, "motion", "motion") for n in networks}
    below = {n for n in report.FAMILIES["Video"] if n in motion and motion[n] < motion[RAW]}
    assert below == {"odd_one_out", "tracking_triplet", "video_colorization", "egomotion"}
    for name in below:
        assert f"{name} ({motion[name]:.1f})" in section
    pair, three = [
        motion[f"multitask** `--tasks position,{more}`"] for more in ("motion", "colour,exemplar")
    ]
    position = motion["multitask** `--tasks position`"]
    categories = [
        evaluations.mean(networks, f"**multitask** `--tasks {tasks}`", "category", "category")
        for tasks in ("position", "position,motion")
    ]
    words = f"position alone tells {position:.1f} % of the motions (and {categories[0]:.1f} % of "
    words += f"the categories), on position and motion {pair:.1f} ({categories[1]:.1f}), on all "
    words += f"four tasks, its default, {motion['multitask']:.1f}, on all but motion {three:.1f} "
    assert words in section
    assert f"arrow_of_time ({motion['arrow_of_time']:.1f})" in section
    assert three < motion["multitask"] < pair
    runs = report.at_home(report.read_rows())["tracking_triplet"]
    assert means(runs, "evaluation")["linear"] > means(runs, "pixels")["linear"] + 2
    assert means(runs, "evaluation")["linear"] > means(runs, "random_init")["linear"] + 2

    constant = evaluations.mean(networks, "no network", "pose", "angle")
    for name in networks:
        assert evaluations.mean(networks, name, "pose", "angle") > constant - 1, name


def test_masks_of_an_evaluation_become_a_picture(report, tmp_path, monkeypatch):
    """It shows as many networks as there are."""
    from methods import eval_video

    clips = SimpleNamespace(
        frames=torch.zeros(3, 6, 3, 48, 48, dtype=torch.uint8),
        masks=torch.ones(3, 6, 48, 48, dtype=torch.uint8),
    )
    clips.part = lambda index: clips
    monkeypatch.setattr(eval_video, "film_of", lambda *_: clips)
    shown = {}
    monkeypatch.setattr(eval_video, "draw_masks", lambda path, found, part: shown.update(found))
    monkeypatch.setattr(report, "save_small", lambda *args, **options: None)
    Image.new("RGB", (100, 60)).save(tmp_path / "masks.png")
    for name in ("no network", "shuffle_and_learn-tripod-0"):
        np.save(tmp_path / f"{name}, 0a1b2c3d.npy", np.ones((2, 6, 48, 48), bool))
    report.draw_masks(tmp_path, tmp_path / "masks.png")
    assert list(shown) == ["no network", "shuffle_and_learn"]
    assert all(masks.shape == (2, 6, 48, 48) for masks in shown.values())


def test_the_command_of_every_row_gives_the_settings_of_the_row(report):
    """It runs today, and does what was recorded."""
    for row in report.read_rows():
        script, *flags = row["command"].split()
        assert script == f"methods/{row['method']}.py"
        settings = vars(arguments(row["method"], *flags))
        recorded = dict(row["settings"])
        recorded.pop("train_images")
        recorded.pop("eval_every")
        assert recorded == {name: settings[name] for name in recorded}, row["command"]
        assert recorded.keys() >= set(report.defaults(row["method"]))


# -------- The report ------------------------------------------------------------------------------


def another(row, linear=None, **settings):
    """A row with other settings, and another accuracy if it is given."""
    row = copy.deepcopy(row)
    row["settings"] |= settings
    if linear is not None:
        row["evaluation"]["linear"] = linear
    return row


@pytest.fixture(scope="module")
def drlim(report):
    """A run of DrLIM at its defaults, with seed 0."""
    runs = report.chosen(report.read_rows(), "drlim")
    return next(run for run in runs if run["settings"]["seed"] == 0)


def test_runs_with_labels_are_told_apart(report, drlim):
    """In every table by their name; they change nothing of the default line; of each kind of
    positives the longest training stands in the short table."""
    rows = [
        drlim,
        another(drlim, 73.0, positives="labels", epochs=10),
        another(drlim, 72.0, positives="labels", margin=1.0),
        another(drlim, 68.0, positives="drawings"),
    ]
    assert [report.is_supervised(row) for row in rows] == [False, True, True, True]
    assert report.headline(rows) == {"drlim": [drlim]}
    labelled = report.with_labels(rows)
    assert labelled == {("drlim", "labels"): [rows[2]], ("drlim", "drawings"): [rows[3]]}

    full = "\n".join(report.full_table(rows, "emoji"))
    assert "| **drlim** `--positives drawings` (with labels), resnet14 |" in full
    assert full.count("(with labels)") == 2 * 3  # two tables
    short = report.short_table(rows)
    heading = short.index("| *with labels:* |  |  |  |  |  |  |")
    assert short.index(next(line for line in short if line.startswith("| **drlim** |"))) < heading
    assert short[heading + 1].startswith("| **drlim** `--positives drawings` (with labels) |")
    assert "`--margin 1.0 --positives labels` (with labels) | 55.2 | 72.0" in short[heading + 2]
    assert any(x.startswith("| *with labels:* | not run |") for x in report.short_table([drlim]))


def test_a_run_with_labels_has_a_folder_and_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*short("drlim", epochs=1), "--positives", "labels"]
    run = call_main("drlim", *flags, **light("drlim"))
    assert run.code == 0, run.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("drlim-labels-") and folder.name.endswith("-0")
    assert "\ndrlim-labels " in run.out


def test_evaluations_of_other_settings_have_own_lines(report, tmp_path, monkeypatch, drlim):
    """Other seeds are averaged; runs with labels, other epochs or other data are not."""
    evaluations = report.evaluations
    monkeypatch.setattr(evaluations, "ROWS", tmp_path / "evaluations.jsonl")
    usual = drlim["settings"]
    runs = [(usual, 60.0), (usual | {"seed": 1}, 62.0), (usual | {"positives": "labels"}, 80.0)]
    runs += [(usual | {"epochs": 7}, 50.0), (usual | {"data": "fashion"}, 40.0)]
    lines = []
    for i, (settings, linear) in enumerate(runs):
        row = {"protocol": "features", "network": f"run{i}", "method": "drlim"}
        row["seed"] = settings["seed"]
        row["weights"] = f"{i:016x}"
        row |= {"data": "emoji", "settings": {"size": 32}, "training": settings}
        lines.append(row | {"result": {"linear": linear}})
    # a row that was recorded without its variant is one of a default run
    old = row | {"network": "old", "weights": "old", "seed": 2, "result": {"linear": 61.0}}
    evaluations.ROWS.write_text(json.dumps(old) + "\n")
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations.add(results, report.variant)

    rows = evaluations.read_rows()
    assert not any("training" in row for row in rows[1:])
    found = evaluations.collect(rows)
    numbers = {n: evaluations.numbers(part["features"], "linear") for n, part in found.items()}
    assert numbers == {
        "**drlim**": [61.0, 60.0, 62.0],
        "**drlim** `--positives labels` (with labels)": [80.0],
        "**drlim** `--epochs 7`": [50.0],
        "**drlim** `--data fashion`": [40.0],
    }


def row_of(method, protocol, result, seed=0, data="emoji", size=32, **more):
    """A row of evaluations.jsonl; without a method that of the untrained network."""
    row = {"protocol": protocol, "network": more.pop("network", UNTRAINED), "seed": seed}
    row |= {"data": data, "arch": "resnet14", "variant": more.pop("variant", "")}
    if method:
        row |= {"method": method, "weights": f"{method} {seed} {row['variant']}"}
    return row | {"settings": {"size": size, **more}, "result": result}


def test_draws_of_one_run_and_runs_are_told_apart(report):
    """Several runs: mean ± deviation of their means. One run: that of its draws."""
    evaluations = report.evaluations
    rows = []
    for seed, draw, tuned in ((0, 0, 50.0), (0, 1, 54.0), (1, 0, 60.0)):
        rows.append(row_of("byol", "fine-tuning", {"tuned": tuned}, seed, part=0.1, draw=draw))
    rows.append(row_of("byol", "few", {"1": {"accuracies": [10.0, 12.0]}}))
    rows.append(row_of("byol", "few", {"1": {"accuracies": [20.0, 20.0]}}, seed=1))
    runs = evaluations.collect(rows)["**byol**"]
    assert evaluations.numbers(runs["fine-tuning 0.1"], "tuned") == [52.0, 60.0]
    assert evaluations.cell(runs["fine-tuning 0.1"], "tuned", ".1f") == "56.0 ± 5.7"
    assert evaluations.cell(runs["few"], "1/accuracies", ".1f") == "15.5 ± 6.4"
    runs = evaluations.collect(rows[:2])["**byol**"]
    assert evaluations.cell(runs["fine-tuning 0.1"], "tuned", ".1f") == "52.0 ± 2.8"
    runs = evaluations.collect([rows[0], rows[0]])["**byol**"]  # they do not differ
    assert evaluations.cell(runs["fine-tuning 0.1"], "tuned", ".1f") == "50.0"
    runs = evaluations.collect(rows[3:4])["**byol**"]
    assert evaluations.cell(runs["few"], "1/accuracies", ".2f") == "11.00 ± 1.41"

    # two trainings with one seed: their difference is no deviation over draws
    twice = [rows[0], rows[1], copy.deepcopy(rows[0])]
    twice[2]["weights"] = "other"
    twice[2]["result"]["tuned"] = 90.0
    runs = evaluations.collect(twice)["**byol**"]
    assert evaluations.cell(runs["fine-tuning 0.1"], "tuned", ".1f") == "71.0 ± 2.8"
    runs = evaluations.collect(twice[1:])["**byol**"]
    assert evaluations.cell(runs["fine-tuning 0.1"], "tuned", ".1f") == "72.0"

    # k-means' own deviation over its seeds, until there are two runs
    both = [row_of("byol", "clusters", {"nmi": 3.0 + i, "nmi_std": 0.4}, seed=i) for i in (0, 1)]
    runs = evaluations.collect(both[:1])["**byol**"]
    assert evaluations.cell(runs["clusters"], "nmi", ".1f") == "3.0 ± 0.4"
    runs = evaluations.collect(both)["**byol**"]
    assert evaluations.cell(runs["clusters"], "nmi", ".1f") == "3.5 ± 0.7"


def test_a_rescaled_network_is_not_taken_for_the_run_itself(report):
    settings = {"data": "emoji", "seed": 3}
    assert report.variant("rotnet", settings) == ""
    assert report.variant("rotnet", settings | {"rescaled": True}) == "rescaled"


def test_a_predictor_stands_beside_the_accuracy_of_the_same_weights(report):
    """Of two trainings by one command LiDAR was measured of the second, whose linear accuracy only
    fine-tuning with all labels knows."""
    protocols = {
        "features": {("a", 0): [{"linear": 60.0}]},
        "fine-tuning 1.0": {("b", 0): [{"frozen": 50.0}, {"frozen": 52.0}]},
        "lidar": {("b", 0): [{"lidar": 100.0}], ("c", 1): [{"lidar": 7.0}]},
        "spectrum": {("a", 0): [{"rankme": 30.0}]},
    }
    beside = report.evaluations.beside_linear
    assert beside(protocols, "lidar", "lidar") == (100.0, 51.0)
    assert beside(protocols, "spectrum", "rankme") == (30.0, 60.0)
    assert beside(protocols, "smoothness", "lipschitz") == ()


def test_what_a_seed_changes(report):
    """By hand: with means 2, 6 and 10, and 1 above and below, the mean squares are 2 x 32 / 2 = 32
    between methods and 2 within, and the variance of the methods is (32 - 2) / 2 = 15."""
    evaluations = report.evaluations
    rows = []
    for method, mean in (("byol", 2.0), ("swav", 6.0), ("nat", 10.0)):
        for seed, step in enumerate((-1, 1)):
            rows.append(row_of(method, "features", {"linear": mean + step}, seed))
    rows.append(row_of("dino", "features", {"linear": 90.0}))  # one run says nothing here
    networks = {name: evaluations.collect(rows) for name in evaluations.TABLES}

    found = evaluations.repeatability(networks)
    assert list(found) == ["linear probe", "fashion (linear probe)"]
    found = found["linear probe"]
    assert found[:3] == pytest.approx((2**0.5, 15**0.5, 15 / 17))
    assert (found.methods, found.runs) == (3, 6)
    # F = 16; quantiles of F with 2 and 3 degrees of freedom: 16.04 (97.5 %) and 1 / 39.17 (2.5 %).
    low, high = 16 / 16.04, 16 * 39.17
    ends = [max(0, (ratio - 1) / (ratio + 1)) for ratio in (low, high)]
    assert found[3:5] == pytest.approx(ends, abs=1e-3)
    line = evaluations.repeatability_table(networks)[1][0]
    assert line[:4] == ["linear probe", "1.4", "3.9", "0.88"] and line[5:] == [3, 6]
    assert report.sentences.seeds(networks) is None  # of fewer than five methods

    for method in ("moco", "simsiam"):
        rows += [row_of(method, "features", {"linear": 6.0 + seed}, seed) for seed in (0, 1)]
    networks = {name: evaluations.collect(rows) for name in evaluations.TABLES}
    found = evaluations.repeatability(networks)["linear probe"]
    text = report.sentences.seeds(networks)
    assert f"{found.over_seeds:.1f} points over seeds and of {found.between:.1f} between 5" in text


def test_a_predictor_that_was_not_measured_says_so(report):
    evaluations = report.evaluations
    rows = []
    for i, method in enumerate(("byol", "moco", "swav", "simclr", "rotnet")):
        rows.append(row_of(method, "features", {"knn20": 10.0 + i, "linear": 20.0 + i * i}))
    networks = evaluations.collect(rows)
    assert set(evaluations.predictors(networks)) == set(evaluations.PREDICTORS)
    lines = {line[0]: line[1:] for line in evaluations.predictor_table(networks)[1]}
    assert lines["LiDAR"] == ["no", "not measured", "", 0, ""]
    assert lines["kNN accuracy"] == ["yes", "+1.00", "+1.00 to +1.00", 5, "+1.00 (5)"]
    # Those with a network of their own are left out of the last column.
    own = row_of(None, "features", {"linear": 1.0}, network="untrained resnet14 of byol, 32 px")
    found = evaluations.predictors(evaluations.collect([*rows, own]))["kNN accuracy"]
    assert found.methods == 5 and found.of_same == 4 and found.same is None

    # The sentence is of those that need no labels.
    for i, row in enumerate(list(rows)):
        spectrum = {"rankme": float(i % 2), "exponent": 3.0 + i}
        rows.append(row | {"protocol": "spectrum", "result": spectrum})
    text = report.sentences.predictors({"features": evaluations.collect(rows)})
    assert "5 methods: the exponent of the spectrum +1.00 (+1.00 to +1.00). Of RankMe the" in text
    assert "With labels, for comparison: the kNN accuracy +1.00 (+1.00 to +1.00)." in text


def test_the_size_of_an_evaluation_stands_in_the_name_if_there_are_several(report):
    rows = [
        row_of("byol", "features", {"linear": 1.0}),
        row_of("byol", "few", {"linear": 1.0}),
        row_of("byol", "features", {"linear": 2.0}, size=64),
        row_of("jigsaw", "features", {"linear": 3.0}, size=48),
        row_of("mae", "depth, frozen", {"rmse": 4.0}, data="solids", size=96, head_seed=0),
        row_of("mae", "depth, frozen", {"rmse": 6.0}, 1, data="solids", size=96, head_seed=1),
        row_of("mae", "depth, frozen", {"rmse": 5.0}, data="solids", size=48, steps=7),
    ]
    names = ["**byol**", "**byol**", "**byol**, 64 px", "**jigsaw**", *["**mae**, 96 px"] * 2]
    assert report.evaluations.full_names(rows) == [*names, "**mae**, 48 px"]
    longer = rows[4] | {"settings": {"size": 96, "head_seed": 0, "steps": 9}}
    shorter = rows[4] | {"settings": {"size": 96, "head_seed": 0, "steps": 7}}
    found = report.evaluations.full_names([shorter, longer])
    assert found == ["**mae**, 96 px", "**mae**, 96 px, steps 9"]


def test_blocks_of_evaluations(report, tmp_path, monkeypatch):
    """The constant answer, ViTs, films on still images, sets of tasks."""
    evaluations = report.evaluations
    monkeypatch.setattr(evaluations, "ROWS", tmp_path / "evaluations.jsonl")

    def blocks(rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        evaluations.ROWS.write_text(text)
        return evaluations.blocks(report.markdown, report.FAMILIES["Video"])

    start = report.evaluations.SCENE_START
    rows = [
        row_of(None, "normals, constant", {"object_angle": 60.0}, network="no network"),
        row_of(None, "normals, frozen", {"object_angle": 40.0}, network=start),
        row_of(None, "normals, fine-tuned", {"object_angle": 35.0}, network=start),
        row_of("byol", "normals, frozen", {"object_angle": 26.0, "object_11.25": 7.5}, size=96),
        row_of("nat", "normals, frozen", {"object_angle": 41.0}, size=96),
        row_of("byol", "normals, fine-tuned", {"object_angle": 25.0}, size=96),
    ]
    rows = [row | {"data": "solids"} for row in rows]
    found = blocks(rows)
    assert found["eval_normals"][2] == "| no network | 1 | 60.0 |  |  |  |  |  |  |  |  |  |  |  |"
    line = found["eval_normals"][4]
    assert line.startswith("| **byol**, 96 px | 1 | 26.0 |  | 7.5 |  |  |  | 25.0 |")
    assert found["eval_depth"] == ["Not run."]
    task = "| normals, mean angle on objects, degrees | "
    assert found["eval_scenes"][2:] == [
        f"{task}frozen | 60.0 | 40.0 | 40.0 | 33.5 | 1 of 2 | 26.0, byol |",
        f"{task}fine-tuned |  | 35.0 | 35.0 | 25.0 | 1 of 1 | 25.0, byol |",
    ]

    raw = row_of(None, "linear probe of pixels", {"linear": 51.0}, network=RAW)
    assert blocks([raw])["eval_layers_vit"] == ["Not run."]
    block = row_of("mae", "linear probe of block2", {"linear": 52.0})
    assert blocks([raw, block])["eval_layers_vit"][3] == "| **mae** | 1 |  |  | 52.0 |  |  |  |  |"

    scores = {"knn20": 40.0, "linear": 41.0}
    rows = [row_of(method, "features", scores) for method in (None, "egomotion", "byol")]
    rows.append(row_of("byol", "features", {"linear": 42.0}, variant="--data movers"))

    def names(block):
        return [line.split(" | ")[0].strip("| ") for line in blocks(rows)[block][2:]]

    assert names("eval_stills") == [UNTRAINED, "**egomotion**", "**byol** `--data movers`"]
    assert names("eval_features") == [UNTRAINED, "**byol**"]
    assert "| **egomotion** | 1 | 40.0 | 41.0 |  |  |" in blocks(rows)["eval_stills"]

    tasks = {"category": 50.0}
    all_four = row_of("multitask", "category", tasks, data="movers")
    pair = all_four | {"variant": "--tasks position,motion", "result": {"category": 45.0}}
    assert blocks([all_four])["eval_multitask"] == ["Not run."]
    lines = blocks([all_four, pair])["eval_multitask"]
    assert lines[2:] == ["| P+M | 1 | 45.0 |  |  |  |", "| all | 1 | 50.0 |  |  |  |"]


def fine_tuning(values, draws):
    """Rows of fine-tuning with 1 % and 10 % of the labels. values: {method, None for the untrained
    network: (frozen, tuned)}, of a draw the draw's number more."""
    rows = []
    for part in (0.01, 0.1):
        for method, (frozen, tuned) in values.items():
            for draw in range(draws):
                result = {"frozen": frozen + draw, "tuned": tuned + draw}
                seed = draw if method is None else 0
                rows.append(row_of(method, "fine-tuning", result, seed, part=part, draw=draw))
    return rows


def test_the_sentence_about_fine_tuning_and_its_table(report):
    evaluations = report.evaluations
    assert evaluations.gain_table([])[1] == []
    values = {None: (30.0, 40.0), "mae": (45.0, 41.0), "swav": (36.0, 38.0)}

    text = report.sentences.tuned
    # The draws differ by a constant: all differences between networks are exact.
    rows = fine_tuning(values, 3)
    assert "over 3 draws of labels, order and initial weights; 2 methods with " in text(rows)
    assert "from scratch: -0.5 ± 0.0 (1 %) and -0.5 ± 0.0 (10 %). Fine-tuned minus" in text(rows)
    words = "frozen features: -1.0 ± 0.0 (1 %) and -1.0 ± 0.0 (10 %); the same of networks from "
    words += "scratch and their untrained features: +10.0 ± 0.0 (1 %) and +10.0 ± 0.0 (10 %)."
    assert text(rows).endswith(words)
    heads, (one_percent, ten_percent) = evaluations.gain_table(rows)
    expected = ["-0.5 ± 0.0", "-1.0 ± 0.0", "+10.0 ± 0.0", 2]
    assert one_percent == ["1 %", *expected] and ten_percent == ["10 %", *expected]
    assert len(heads) == len(one_percent)
    with_all = [row | {"settings": row["settings"] | {"part": 1.0}} for row in rows]
    networks = {"finetune": evaluations.collect(evaluations.rows_of("finetune", with_all, ()))}
    words = "with all labels, fine-tuning adds -4.0 points to its linear probe, +2.0 to +2.0 to "
    words += "those of 1 methods that compare views, and +10.0 to that of MAE's network untrained."
    sides = {"methods that compare views": ["swav", "byol"]}
    assert words in report.sentences.mae(networks, sides)
    assert report.sentences.mae(networks, {"methods that compare views": []}) is None

    # With 1 % the gain is 2, 3 and 4 points larger than with all labels.
    more = [row for row in rows if row["settings"]["part"] == 0.01 and "method" in row]
    for row in more:
        row["result"]["tuned"] += 2 + row["settings"]["draw"]
    words = f"with 1 % minus that with all is +3.0 ± {4.303 / 3**0.5:.1f}. With all labels the "
    assert words in text(rows + with_all[len(rows) // 2 :])
    for row in more:
        row["result"]["tuned"] -= 2 + row["settings"]["draw"]

    # One draw in which the network from scratch is better.
    rows[0]["result"]["tuned"] += 5
    step, error = -0.5 - 5 / 3, 4.303 * 5 / 3
    assert evaluations.gain_table(rows)[1][0][1] == f"{step:+.1f} ± {error:.1f}"
    # A network with one draw is left out, if others have three.
    rows = fine_tuning({None: (30.0, 40.0), "mae": (45.0, 41.0)}, 3)
    rows += fine_tuning({"swav": (36.0, 90.0)}, 1)
    expected = ["1 %", "+1.0 ± 0.0", "-4.0 ± 0.0", "+10.0 ± 0.0", 1]
    assert evaluations.gain_table(rows)[1][0] == expected
    one = fine_tuning(values, 1)
    assert text(one) is None and evaluations.gain_table(one)[1] == []


def test_the_uncertainty_of_a_difference(report):
    """Student's t of the differences, draw by draw; 4.303 is its 97.5 % quantile for 2 degrees."""
    difference = report.evaluations.difference
    a, b = {0: 50.0, 1: 52.0, 2: 57.0, 7: 99.0}, {0: 49.0, 1: 49.0, 2: 52.0, 9: 0.0}
    mean, half = difference(a, b)
    assert mean == 3 and half == pytest.approx(4.303 * 2 / math.sqrt(3), rel=1e-3)
    assert difference({0: 50.0, 1: 52.0}, b) == (2.0, math.inf)


def test_gains_and_means_of_an_evaluation(report):
    """What fine-tuning gains over the frozen features; the mean of all corrupted accuracies."""
    evaluations = report.evaluations
    rows = fine_tuning({"byol": (45.0, 41.0)}, 2)
    rows[1]["result"]["tuned"] += 2
    rows += [row_of(None, "fine-tuning", {"frozen": 30.0, "tuned": None}, part=0.01, draw=0)]
    networks = evaluations.collect(evaluations.rows_of("finetune", rows, ()))
    lines = evaluations.table(networks, evaluations.TABLES["finetune"])
    assert lines[0][1:5] == [1, "30.0", "", ""]
    assert lines[1][2:5] == ["45.5 ± 0.7", "42.5 ± 2.1", "-3.0 ± 1.4"]
    result = {"corrupted": {"noise": [10.0, 20.0], "blur": [30.0, 40.0]}}
    assert evaluations.value(result, "corrupted/mean") == 25
    assert evaluations.value(result, "corrupted/blur/mean") == 35


def test_a_row_with_more_settings_replaces_an_older_one(report):
    """Constants of a script became settings of its results later."""
    replaces = report.evaluations.replaces
    old = row_of(None, "svm", {"svm": 1.0}, images=[5020, 1260])
    new = row_of(None, "svm", {"svm": 2.0}, images=[5020, 1260], costs=[1.0, 10.0])
    assert replaces(new, old) and replaces(new, new) and not replaces(old, new)
    assert not replaces(new, old | {"seed": 1}) and not replaces(new, old | {"protocol": "cost"})
    assert not replaces(new, row_of(None, "svm", {}, images=[5020, 1260], costs=[1.0]))


def known(report, rows):
    """Of some rows, with the network that methods share: {table: networks}."""
    return report.evaluations.networks_of(rows, ("egomotion",))


def test_sentences_about_baselines_and_the_best(report):
    """The best method, what stands beside it, and the mean gain over each one's own start."""
    own = "untrained resnet14 of nat, 32 px"
    values = [(None, RAW, 40.0), (None, UNTRAINED, 46.0), (None, own, 50.0)]
    values += [("byol", None, 49.0), ("nat", None, 55.0), ("egomotion", None, 99.0)]
    protocols = {
        "robustness": lambda x: {
            "artist_new": [x, x], "relative_loss": 60 - x, "corrupted": {"noise": [x - 1, x + 1]},
        },
        "few": lambda x: {"1 %": {"accuracies": [x - 20]}, "10 %": {"accuracies": [x]}},
        "cost": lambda x: {"flops": x * 1e6},
    }  # fmt: skip
    rows = [
        row_of(method, protocol, result(x), **({"network": name} if name else {}))
        for method, name, x in [*values, (None, "k-means, 32 px", 48.0)]
        for protocol, result in protocols.items()
    ]
    networks = known(report, rows)
    sentences = report.sentences
    beside = "the untrained network 46.0, raw pixels 40.0, k-means features 48.0."
    text = sentences.artist(networks)
    assert f"percent: the best, nat 55.0; {beside} The methods have on average 4.0 points" in text
    text = sentences.few(networks)
    assert f"With 10 %: the best, nat 55.0; {beside}" in text
    assert "With 1 %: the best, nat 35.0;" in text
    assert "have on average 4.0 and 4.0 points more" in text
    text = sentences.corruptions(networks)
    assert "nat loses least, 5.0 % of its accuracy, byol most, 11.0 %; the untrained" in text
    assert f"left: the best, nat 55.0; {beside} The network decides, too: untrained ones" in text
    assert "lose 10.0 to 14.0 %." in text
    text = sentences.cost(networks)
    assert text.endswith("share 46.0, the dearest, nat 55.0, k-means features 48.0.")


def test_a_run_is_compared_with_the_untrained_network_of_its_seed(report):
    """With all its seeds, if that one was not measured."""
    rows = [row_of(None, "features", {"linear": x}, seed) for seed, x in enumerate((50.0, 40.0))]
    for method, x, seed in (("byol", 51.0, 0), ("swav", 43.0, 1), ("nat", 60.0, 7)):
        rows.append(row_of(method, "features", {"linear": x}, seed))
    found = report.sentences.over_untrained(report.evaluations.collect(rows), "features", "linear")
    assert found == pytest.approx((1 + 3 + 15) / 3)


def test_the_sentence_about_depth(report):
    """Falls from the best stage to the last, beside those of the same networks untrained."""
    stages = report.evaluations.LAYERS
    values = {"rotnet": (50, 57, 56, 55, 53), "byol": (50, 52, 53, 55, 54)}
    values[None] = 40, 47, 45, 44, 41
    rows = [
        row_of(method, f"linear probe of {stage}", {"linear": x})
        for method, numbers in values.items()
        for stage, x in zip(stages, numbers)
    ]
    families = {"pretext tasks": ["rotnet", "jigsaw"], "methods that compare views": ["byol"]}
    text = report.sentences.depth(known(report, rows), families)
    assert "Here 1 of 2 trained ResNets are best after layer1 or layer2" in text
    words = "falls by 4.0 points (1 pretext tasks) and 1.0 points (1 methods that compare views) on"
    assert f"{words} average (± standard error over the methods), in the same networks" in text
    assert "untrained by 6.0 and 6.0." in text
    words = "training adds 10.0 and 10.0 points at the first stage, 12.0 and 13.0 at the last."
    assert words in text
    assert text.endswith("But untrained networks fall more, so the fall is no evidence of this.")
    for row in rows:
        if "method" not in row:
            row["result"] = {"linear": 40.0}
    text = report.sentences.depth(known(report, rows), families)
    assert "untrained by 0.0 and 0.0." in text and "specialise" not in text


def test_the_sentence_about_scenes(report):
    """How many networks are better than untrained; where a guess is better than all of them."""
    start = report.evaluations.SCENE_START
    measures = {"segmentation": "miou", "normals": "object_angle", "depth": "rmse",
                "keypoints": "pck_0.1", "detection": "ap"}  # fmt: skip
    values = {None: (20.0, 20.0), "byol": (26.0, 30.0), "nat": (19.0, 28.0)}  # frozen, fine-tuned
    rows = []
    for task, key in measures.items():
        for method, numbers in values.items():
            network = {} if method else {"network": start}
            for how, number in zip(("frozen", "fine-tuned"), numbers):
                rows.append(row_of(method, f"{task}, {how}", {key: number}, size=96, **network))
        guess = {"normals": 1.0, "keypoints": 27.0}.get(task)
        if guess is not None:
            rows.append(row_of(None, f"{task}, constant", {key: guess}, network="no network"))
    # One that saw the scenes at another size is not compared.
    own = "untrained vit_mini of mae made for 32, 48 px"
    for network in ({}, {"network": own}):
        method = None if network else "mae"
        rows.append(row_of(method, "segmentation, frozen", {"miou": 90.0}, size=48, **network))
    rows = [row | {"data": "solids"} for row in rows]
    text = report.sentences.scenes(known(report, rows))
    assert "Frozen, 1 of 2 networks segment better than the same networks untrained (mean" in text
    words = "(mean IoU from 20.0 to 22.5, on average) and 1 of 2 detect better (AP from 20.0 to "
    assert f"{words}22.5). With all weights trained, 2 of 2 segment better than from " in text
    assert "scratch (from 20.0 to 29.0) and 2 of 2 detect better (from 20.0 to 29.0)." in text
    words = "beats every frozen network for normals and keypoints and every fine-tuned network "
    assert f"A guess from the training scenes {words}for normals:" in text
    assert report.sentences.scenes(known(report, rows[:4])) is None


def test_the_sentence_about_other_data(report):
    """Of those that learned from emoji the worst and the best on fashion."""
    values = {"nat": 70.0, "byol": 80.5, "mae": 75.0, None: 65.0}
    rows = []
    for method, x in values.items():
        rows.append(row_of(method, "features", {"linear": x}, data="fashion"))
        rows.append(row_of(method, "svm", {"svm": x + 1}, data="fashion"))
    rows.append(row_of(None, "features", {"linear": 74.0}, data="fashion", network=RAW))
    own = row_of("dino", "features", {"linear": 99.0}, data="fashion", variant="--data fashion")
    text = report.sentences.fashion(known(report, [*rows, own]))
    words = "from 70.0 (nat) to 80.5 (byol); the untrained network 65.0, raw pixels 74.0. 2 of 3"
    assert words in text
    assert "mean average precision in percent: from 71.0 (nat) to 81.5 (byol)" in text


def test_the_sentence_about_agreement(report):
    """One evaluation ranks the methods as the linear probe does, one the other way round."""
    evaluations = report.evaluations
    rows = []
    for i, method in enumerate(("byol", "nat", "dino", "moco", "swav")):
        rows += [
            row_of(method, "features", {"linear": 50.0 + i, "knn20": 60.0 - i}),
            row_of(method, "svm", {"svm": 50.0 + i}),
            row_of(method, "few", {"1 %": {"accuracies": [30.0 + (i - 2) ** 2]}}),
            row_of(method, "clusters", {"accuracy": 20.0 + 2 * i % 5}),
            row_of(method, "robustness", {"artist_new": [40.0 + 3 * i % 5]}),
            row_of(method, "fine-tuning", {"tuned": 40.0 + i, "frozen": 40.0}, part=1.0, draw=0),
            row_of(method, "features", {"linear": 70.0 + i}, data="fashion"),
        ]
        dense = {"segmentation, frozen": "miou", "segmentation, fine-tuned": "miou",
                 "depth, frozen": "rmse", "normals, frozen": "object_angle"}  # fmt: skip
        for protocol, key in dense.items():
            result = {key: 10.0 + i}  # of errors less is better
            rows.append(row_of(method, protocol, result, data="solids", size=96))
    pairs, count = evaluations.agreement(known(report, rows))
    probe = "linear probe"
    assert count == 5 and pairs["kNN", probe] == pairs[probe, "kNN"] == pytest.approx(-1)
    assert pairs["SVM", probe] == pairs["segmentation (frozen)", probe] == pytest.approx(1)
    assert pairs["depth (frozen)", probe] == pairs["normals (frozen)", probe] == pytest.approx(-1)
    heads, lines = evaluations.agreement_table(known(report, rows))
    assert heads[:3] == ["5 methods", "1 kNN", "2 linear probe"] and len(lines) == 11
    assert lines[0][:3] == ["2 linear probe", "-1.00", ""]
    text = report.sentences.agreement(known(report, rows))
    assert "Over 5 methods the ranking by the linear probe is most like" in text
    rank = pairs["cluster accuracy", probe]
    words = f"Over 5 methods the rank correlation is {rank:+.2f} (99.6 % interval -1.00 to +1.00)"
    assert text.endswith(f"{words}: so few methods cannot tell.")

    def told(low, high):
        found = evaluations.Predictor(0.4, low, high, 5, None, 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluations, "predictors", lambda _: {"cluster accuracy": found})
            return report.sentences.agreement(known(report, rows))

    assert told(0.1, 0.9).endswith("(99.6 % interval +0.10 to +0.90): here they rank partly alike.")
    assert told(-0.9, -0.1).endswith("-0.10): they do not.")
    found = evaluations.Predictor(*[None] * 3, 4, None, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluations, "predictors", lambda _: {"cluster accuracy": found})
        assert report.sentences.agreement(known(report, rows)).endswith("may be chance.")
    assert report.sentences.agreement(known(report, rows[:30])) is None


def test_what_counts_as_the_same_network(report):
    """Some methods build the shared network in a function of their own; its weights are the same.
    Two trainings with one seed are one run; rows that are equal to the last digit stand once."""
    evaluations = report.evaluations
    for method in evaluations.SHARE_IT:
        module = importlib.import_module(f"methods.{method}")
        found = []
        for build in (module.backbone, common.backbone):
            torch.manual_seed(0)
            found.append(build("resnet14", 32).state_dict())
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[1]), method
    names = [row["network"] for row in evaluations.read_rows()]
    assert not any(re.search(evaluations.SHARED_START, name) for name in names)
    lines = [json.loads(line) for line in evaluations.ROWS.read_text().splitlines()]
    assert len(lines) > len(names)

    rows = [row_of("byol", "features", {"linear": x}, 0) for x in (50.0, 54.0)]
    rows[1]["weights"] = "trained again"
    rows.append(row_of("byol", "features", {"linear": 58.0}, 1))
    runs = evaluations.collect(rows)["**byol**"]["features"]
    assert evaluations.numbers(runs, "linear") == [52.0, 58.0]
    (line,) = evaluations.table({"**byol**": {"features": runs}}, evaluations.TABLES["features"])
    assert line[:4] == ["**byol**", 2, "", "55.0 ± 4.2"]


def test_the_table_of_costs(report):
    """What is known of the runs at the defaults; more than one run: means, the most memory."""
    (byol, *_) = report.chosen(report.read_rows(), "byol")
    runs = [
        byol | {"train_flops": flops, "peak_memory_gb": memory, "train_seconds": 90.0}
        for flops, memory in ((2e12, 1.0), (4e12, 1.26), (None, None))
    ]
    lines = report.cost_table(runs)
    assert len(lines) == 3
    cells = lines[2].strip("| ").split(" | ")
    assert cells[:2] == ["**byol**", "90"] and cells[3:5] == ["3", "1.3"]
    assert report.cost_table([]) == ["not run"]


def test_what_the_video_methods_answer(report):
    """Held-out accuracy beside guessing, a rule, and the control, in percent."""
    rows = report.read_rows()
    (colours,), (arrow,) = [
        report.chosen(rows, name)[:1] for name in ("video_colorization", "arrow_of_time")
    ]
    colours["pretext"] = {"held_out": 0.8, "most_frequent": 0.5, "same_place": 0.6}
    arrow["pretext"] = {"held_out": 0.9, "control": 0.51}
    plain = another(arrow)
    del plain["pretext"]
    lines = report.question_table([plain, arrow, colours])
    rule = "75, larger differences come first"
    assert lines[2] == f"| **arrow_of_time** | movers | 90.0 | 50.0 | {rule} | 51.0 | 1 |"
    assert "| 80.0 | – | 60.0, the colour of the same place before; 50.0, the most" in lines[3]
    colours["pretext"] |= {"masks": 0.7, "masks_stay": 0.2, "masks_raw": 0.4}
    (line,) = report.question_table([colours])[2:]
    assert "| 80.0; masks carried: J 70.0 | –" in line
    assert "frequent colour; masks: left in place 20.0, by the lightness of patches 40.0 |" in line
    arrow["pretext"] = {"held_out_position": 0.3, "held_out_motion": 0.6}
    assert "| movers | position 30.0; motion 60.0 |" in report.question_table([arrow])[2]
    assert report.question_table([plain]) == ["not run"]


def test_the_mean_of_curves_that_were_measured_at_other_times(report):
    """At the shares of the longest curve; its end is the mean of the ends."""
    longer = [[0, 50], [10, 52], [20, 56]]
    shorter = [[0, 52], [40, 60]]
    assert report.mean_curve([longer, shorter]) == [(0, 51), (15, 54), (30, 58)]
    assert report.mean_curve([shorter]) == [(0, 52), (40, 60)]
    for runs in report.headline(report.read_rows()).values():
        time, height = report.mean_curve([run["curve"] for run in runs])[-1]
        assert time == pytest.approx(statistics.mean(run["train_seconds"] for run in runs))
        assert height == pytest.approx(report.mean(runs, "evaluation", "knn20"))


def test_years_are_drawn_at_one_budget_as_soon_as_all_have_it(report, tmp_path, drlim, monkeypatch):
    """The points are the means of the runs that were as long as BUDGET says, in the order of the
    papers' years; to the right of it, hollow, what labels give."""
    from matplotlib.axes import Axes

    drawn = []  # (place, mean, deviation, hollow)

    def errorbar(axes, place, height, deviation, markerfacecolor=None, **style):
        drawn.append((place, height, deviation, markerfacecolor == "white"))

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    rows = report.read_rows()
    best = report.headline(rows)
    assert report.BUDGET.keys() == {m for f in report.COMPARE_VIEWS for m in report.FAMILIES[f]}
    equal = []
    for method, (epochs, _) in report.BUDGET.items():
        equal.append(another(best[method][0], 40.0, epochs=epochs))
        equal.append(another(best[method][0], 43.0, epochs=epochs, seed=1))
    budget = {method: epochs for method, (epochs, _) in report.BUDGET.items()}
    usual = [row for row in rows if row["settings"]["epochs"] != budget.get(row["method"])]
    labels = another(drlim, 70.0, epochs=budget["drlim"], positives="labels")
    assert report.equal_budget([*usual, *equal[2:]]) == {}
    assert report.years_words([*usual, *equal[2:]]) != report.years_words([*usual, *equal])

    report.draw_years([*usual, *equal, labels], tmp_path / "years.png")
    count = len(report.BUDGET)
    deviation = pytest.approx(statistics.stdev([40, 43]))
    assert drawn[:count] == [(place, 41.5, deviation, False) for place in range(count)]
    order = sorted(report.BUDGET, key=lambda method: report.about(method)[1])
    assert drawn[count:] == [(pytest.approx(order.index("drlim") + 0.2), 70.0, 0, True)]

    drawn.clear()
    report.draw_years(usual, tmp_path / "years.png")
    best = report.headline(usual)
    left = best.keys() & budget.keys()
    shown = [height for _, height, _, hollow in drawn if not hollow]
    assert sorted(shown) == sorted(report.mean(best[m], "evaluation", "linear") for m in left)


def test_the_equal_budget_is_equal(report):
    """Four minutes by the times of one epoch, and these agree with the rows of the same machine:
    the fastest run took no longer than beside another training, which is up to a third more."""
    rows = [row for row in report.read_rows() if row["device"] == "AMD EPYC, AVX512, 1 threads"]
    compared = 0
    for method, (epochs, seconds) in report.BUDGET.items():
        assert abs(epochs * seconds - 240) < 20, method
        found = report.chosen(rows, method, epochs=epochs)
        times = [run["train_seconds"] / epochs for run in found]
        if times:
            assert 0.95 < min(times) / seconds < 1.33, (method, min(times))
            compared += 1
    assert compared >= 9


def test_tables_of_comparisons(report):
    """PIRL beside the longest runs of its tasks, BYOL's targets; what does not exist is not run."""
    rows = report.read_rows()
    (jigsaw, *_), (byol, *_) = report.chosen(rows, "jigsaw"), report.chosen(rows, "byol")
    jigsaw["random_init"]["linear"] = 50.0
    byol["random_init"]["linear"] = 50.0
    runs = ((51, 16), (52, 20), (53, 28))
    rows = [another(jigsaw, linear, epochs=epochs) for linear, epochs in runs]
    lines = report.pirl_table(rows)[:7]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "pirl `--transform jigsaw`",
        "pirl `--transform rotation`",
        "pirl `--transform both`",
        "jigsaw `--epochs 28`",
        "rotnet, as many minutes",
    ]
    assert "| 53.0 | 50.0 | +3.0 |" in lines[5]
    assert [line.count("not run") for line in lines[2:]] == [6, 6, 6, 0, 6]

    mid = [another(byol, 50 + stage, target="mid", stage=stage) for stage in (1, 3)]
    lines = report.mid_table(mid)
    assert [line.count("not run") for line in lines[2:]] == [6, 6, 0, 6, 0, 6]
    assert "| 53.0 | 50.0 | +3.0 |" in lines[6]
    assert report.changed(mid[1]) == "--stage 3 --target mid"
    assert report.changed(byol) == ""


def test_the_table_of_first_weights(report):
    rows = report.chosen(report.read_rows(), "magic_init")[:2]
    for row in rows:
        row.pop("table", None)
    assert report.magic_table(rows) == ["not run"]
    for row, linear in zip(rows, (54.0, 56.0)):
        row["table"] = {"He": {"knn20": 50.0, "linear": 53.0}, "pca": {"knn20": 51.0}}
        row["table"]["pca"]["linear"] = linear
    lines = report.magic_table(rows)
    assert lines[0] == "| filters | kNN | linear | runs |"
    assert lines[3] == "| pca | 51.0 ± 0.0 | 55.0 ± 1.4 | 2 |"


def test_what_is_kept_of_a_run(report, tmp_path, monkeypatch, drlim):
    """Of its gradients the largest of each piece, its table, its points in the plane."""
    assert report.peaks([1.0, 3.0, 2.0, 5.0, 4.00006], pieces=2) == [3.0, 5.0]
    assert report.peaks([1.0, 2.00006]) == [1.0, 2.0]
    assert len(report.peaks([0.1] * 9999)) == 200

    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "ROWS", tmp_path / "rows.jsonl")
    start = ("method", "command", "commit", "device", "world_size", "settings")
    plane = another(drlim, data="fashion", dim=2)
    lines = [
        {name: plane[name] for name in start},
        {"step": 0, "first_gradient": 0.25},
        {"step": 1, "first_gradient": 0.75, "seconds": 3.0, "knn20": 40.0, "held_out": 0.5},
        {"step": 2, "held_out": 0.75, "control": 0.5, "loss": 1.0},
        {name: drlim[name] for name in ("evaluation", "pixels", "random_init", "train_seconds")},
    ]
    lines[-1]["table"] = {"He": {"linear": 1.0}}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (30, 20), "red").save(tmp_path / "points.png")
    report.add([tmp_path])
    (row,) = report.read_rows()
    assert row["first_gradient"] == [0.25, 0.75]
    assert row["table"] == {"He": {"linear": 1.0}}
    assert row["pretext"] == {"held_out": 0.75, "control": 0.5}
    assert row["curve"][1] == [3.0, 40.0] and len(row["curve"]) == 3
    assert Image.open(tmp_path / "drlim_points.png").size == (30, 20)
    assert not (tmp_path / "views").exists()
    assert report.picture("drlim_points.png")[0].endswith("(drlim_points.png)")
    assert report.picture("instability.png") == ["not run"]


def test_the_sentence_about_the_instability(report):
    """In the recorded runs the accuracies end close together, and no gradient is a peak."""
    rows = [row for row in report.read_rows() if row["method"] == "moco_v3"]
    rows = [row for row in rows if row["settings"]["arch"] == "vit_micro"]
    frozen, trained = sorted(rows, key=lambda row: row["settings"]["train_patches"])
    assert {row["settings"]["epochs"] for row in rows} == {12}
    assert {row["settings"]["batch"] for row in rows} == {256}
    assert abs(frozen["evaluation"]["knn20"] - trained["evaluation"]["knn20"]) < 1
    gradients = trained["first_gradient"]
    later = gradients[len(gradients) // 12 :]
    assert max(later) < 2 * statistics.median(later)
    page = (ROOT / "tests" / "results" / "README.md").read_text()
    assert "256 images and 12 epochs" in page
    assert "no gradient is more than\ntwice as large" in page


def test_the_instability_is_drawn_if_both_kinds_of_runs_exist(report, tmp_path):
    row = report.chosen(report.read_rows(), "moco_v3")[0]
    frozen = another(row, arch="vit_micro", train_patches=False)
    frozen.pop("first_gradient", None)
    trained = another(frozen, train_patches=True) | {"first_gradient": [0.1, 0.5, 0.2]}
    path = tmp_path / "instability.png"
    report.draw_instability([row, frozen], path)
    assert not path.exists()
    report.draw_instability([row, frozen, trained], path)
    assert path.stat().st_size > 10_000
