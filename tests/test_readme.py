"""What README.md says: its Python runs, its sentences about the results follow from the rows, and
what is generated is what the rows say."""

import importlib.util
import re
import statistics
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, arguments, kind_of, tiny_data
from PIL import Image

import common

README = (ROOT / "README.md").read_text()
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
    ten minutes at most on two cores; no run has collapsed."""
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
    for row in [row for row in rows if kind_of(row["method"]) != "video"]:
        for key in ("feature_std", "rankme"):
            assert row["evaluation"][key] > row["random_init"][key], row["command"]


def test_sentences_about_the_evaluations(report):
    """The numbers of the section Evaluate are those of evaluations.jsonl."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Evaluate") : text.index("## Read a file")]
    evaluations = report.evaluations
    rows = evaluations.read_rows()
    networks = evaluations.collect([row for row in rows if row["data"] == "emoji"])
    of_videos = evaluations.collect([row for row in rows if row["data"] == "movers"])
    untrained, raw = "untrained resnet14, 32 px", "raw pixels, 32 px"
    quoted = {
        ("robustness", "artist_new.mean"): (
            "**exemplar**", "**alignment_uniformity**", "**simclr**", untrained, raw,
        ),
        ("robustness", "relative_loss"): ("**simclr**", "**color_proxy**", untrained, raw),
        ("few", "1 %.mean"): (untrained, "**simclr**", "**swav**", "**drlim**"),
        ("few", "10 %.mean"): ("**split_brain**", "untrained resnet14 of split_brain, 32 px"),
        ("features", "linear"): ("k-means, 32 px",),
    }
    for layer in ("layer1", "layer4"):
        names = ("**jigsaw**", "**rotnet**", "**colorization**", "**simclr**", "**swav**")
        quoted[f"linear probe of {layer}", "linear"] = names
    for (protocol, path), names in quoted.items():
        for name in names:
            (number,) = evaluations.numbers(networks[name][protocol], path)
            assert f"{number:.1f}" in section, (name, protocol)
    for protocol in ("motion", "masks"):
        films = ("watching_objects_move", "shuffle_and_learn", "arrow_of_time")
        for name in (*[f"**{film}**" for film in films], untrained, raw):
            part = "J" if protocol == "masks" else protocol
            (number,) = evaluations.numbers(of_videos[name][protocol], part)
            assert f"{number:.1f}" in section, (name, protocol)

    linear = {}
    for name, protocols in networks.items():
        (linear[name],) = evaluations.numbers(protocols["features"], "linear")
    trained = {name: x for name, x in linear.items() if name.startswith("**")}
    more = sorted(name.strip("*") for name, x in trained.items() if x > linear["k-means, 32 px"])
    assert f"Only {', '.join(more)} have more" in " ".join(section.split())
    later = []
    for name in trained:
        protocols = networks[name]
        stages = [f"linear probe of {layer}" for layer in evaluations.LAYERS]
        if stages[0] in protocols:
            found = [protocols[stage][0]["linear"] for stage in stages]
            if max(found) not in found[1:3]:
                assert max(found) == found[3], name
                later.append(name.strip("*"))
    assert f"but for {' and '.join(sorted(later))}, whose third" in " ".join(section.split())
    clear = [line[0] for line in evaluations.predictors(networks) if line[2][0] == line[2][9]]
    assert f"excludes 0: {', '.join(clear[:-1])} and {clear[-1]}." in " ".join(section.split())
    assert not {"RankMe", "alignment", "uniformity"} & set(clear)


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
