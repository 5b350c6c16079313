"""Every file in methods/, found by its path, so that a new one is tested without new tests: the shape of the file, its flags,
marked copies, the commands of its docstring, and a tiny run of main() with all that a run folder must hold."""

import argparse
import ast
import contextlib
import functools
import importlib
import io
import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import Data, Split, load_data

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
SHARED = ("data", "root", "size", "arch", "batch", "epochs", "lr", "seed", "eval_every", "out", "workers", "compile")
TINY = ("--batch", 12, "--epochs", 2, "--eval-every", 1)  # 48 images: four steps an epoch


# -------- Running a method in this process ------------------------------------------------------------------------------------

@functools.cache
def tiny_data(train=48, test=24):
    """Data of some embedded emoji, evenly spread over the categories, each with all of its drawings."""
    def cut(split, count):
        names = split.emoji.unique()
        names = names[np.random.default_rng(0).permutation(len(names))[:count]]  # more than enough: each has several drawings
        chosen = torch.isin(split.emoji, names).nonzero()[:count, 0]
        return Split(*(part[chosen].clone() for part in split))

    data = load_data("emoji", "", torch.device("cpu"))
    bank = cut(data.train, train)
    return Data("tiny", bank, bank, cut(data.test, test))


def method(name):
    return importlib.import_module(f"methods.{name}")


def call_main(name, *flags, data=None, **patches):
    """main() of a method with these flags, on the data given; patches replace names that the method file imports. Returns the
    exit code (0 if main returned), stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        patch.setattr(method(name), "load_data", lambda *_: data or tiny_data())
        for attribute, value in patches.items():
            patch.setattr(method(name), attribute, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                method(name).main()
            except SystemExit as error:
                code = error.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


class Recorder(common.Run):
    """A Run that keeps the losses in memory; it reads, evaluates and writes nothing. `latest` is the last one."""

    def resume(self):
        type(self).latest, self.losses = self, []
        self.folder.mkdir(parents=True, exist_ok=True)  # for what a method may draw

    def log(self, loss, lr):
        self.losses.append(loss.detach())
        self.step += 1

    def end_epoch(self, epoch):
        pass

    def finish(self):
        pass


# -------- The shape of a file -------------------------------------------------------------------------------------------------

def source(name):
    return (ROOT / "methods" / f"{name}.py").read_text()


def definitions(tree):
    return [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@EVERY_METHOD
def test_file_is_short(name):
    lines = source(name).splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 128


def test_common_is_short():
    lines = (ROOT / "common.py").read_text().splitlines()
    assert len(lines) < 900 and max(map(len, lines)) <= 128


@EVERY_METHOD
def test_docstring_has_its_parts_in_order(name):
    text = ast.get_docstring(ast.parse(source(name)))
    parts = [r"\A[^\n:]+: [^\n]+\.$", r"^[^\n]+ https://arxiv\.org/abs/\d{4}\.\d{4,5}$", r"^Official code[^\n:]*: https://",
             r"^Idea\. ", r"^Notation\. ", r"^Run\.$", r"--batch counts\s+the\s+images\s+of\s+all\s+processes\s+together",
             r"^Differs from the paper\.$"]
    found = [re.search(part, text, re.MULTILINE) for part in parts]
    assert all(found), [part for part, match in zip(parts, found) if not match]
    places = [match.start() for match in found]
    assert places == sorted(places)
    numbers = re.findall(r"^    (\d+)\. ", text[places[-1]:], re.MULTILINE)
    assert numbers == [str(i + 1) for i in range(len(numbers))] and numbers
    assert not re.search(r"\b(FACTOR|TODO|FIXME|XXX)\b", source(name))  # a figure or a sentence still to be written


@EVERY_METHOD
def test_sections_are_in_order(name):
    """get_args, views, then classes and functions in any order, learning_rate, pictures, main, and the guard; at top level
    nothing but imports, the line that finds common.py, and constants: importing a method has no effect and needs nothing."""
    tree = ast.parse(source(name))
    names = [node.name for node in definitions(tree)]
    assert names[0] == "get_args" and names[-1] == "main"
    classes = [node for node in definitions(tree) if isinstance(node, ast.ClassDef)]
    model = [node.name for node in classes if re.search(r"self\.backbone\b.* = ", ast.unparse(node))]
    assert len(model) == 1, "one class has the backbone"
    pictures = [n for n in names if n.startswith("draw_") and n not in ("draw_masks", "draw_puzzles")]
    order = ["get_args", "views", model[0], "learning_rate", *pictures, "main"]
    assert [n for n in names if n in order] == order
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    main()"
    for node in tree.body[1:-1]:
        line = ast.unparse(node)
        assert isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign) or (
            line == "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"), line
        assert not isinstance(node, ast.Assign) or re.match(r"[A-Z_, ]+ = |backbone = [A-Z]", line), line


@EVERY_METHOD
def test_imports(name):
    """The standard library, numpy, torch and torchvision, common and kernels; never another method; all at the top."""
    tree = ast.parse(source(name))
    allowed = {*sys.stdlib_module_names, "numpy", "torch", "torchvision", "einops", "common", "kernels"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert node in tree.body, ast.unparse(node)
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {module.split(".")[0] for module in modules} <= allowed, ast.unparse(node)


def imported_from_common(name):
    return {alias.name for node in ast.parse(source(name)).body if isinstance(node, ast.ImportFrom) and node.module == "common"
            for alias in node.names}


@pytest.mark.skipif(len(METHODS) < 4, reason="with few methods, one may be the first of several to use a function")
def test_common_holds_nothing_that_one_method_alone_uses():
    """But for the augmentation primitives, functions of (x, rand): a recipe may be the only one to use one of them. What
    common.py itself uses is at home there; the rest must be imported by two methods."""
    tree = ast.parse((ROOT / "common.py").read_text())
    users = {name: imported_from_common(name) for name in METHODS}
    for node in definitions(tree):
        if isinstance(node, ast.FunctionDef) and [a.arg for a in node.args.args[:2]] == ["x", "rand"]:
            continue
        by_common = any(isinstance(n, ast.Name) and n.id == node.name for other in tree.body if other is not node
                        for n in ast.walk(other))
        by_methods = [name for name, names in users.items() if node.name in names]
        assert by_common or len(by_methods) >= 2, f"{node.name} is used by {by_methods} alone"


# -------- Copies --------------------------------------------------------------------------------------------------------------

MARK = re.compile(r"^(?:def|class) (\w+).*# copy of: methods/(\w+)\.py::(\w+)$", re.MULTILINE)


def without_docstring(node):
    node = ast.parse(ast.unparse(node)).body[0]
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return ast.dump(node)


def test_marked_copies_equal_their_originals():
    """To the letter, docstring included; comments may differ."""
    for name in METHODS:
        here = {node.name: node for node in definitions(ast.parse(source(name)))}
        assert source(name).count("# copy of:") == len(MARK.findall(source(name))), f"{name}: a mark is not on a definition"
        for copy, other, original in MARK.findall(source(name)):
            there = {node.name: node for node in definitions(ast.parse(source(other)))}
            assert other != name and original in there, f"{name}: {copy} is marked as a copy of what is not there"
            assert original not in [c for c, _, _ in MARK.findall(source(other))], f"{name}: {copy} is a copy of a copy"
            assert ast.dump(here[copy]) == ast.dump(there[original]), f"{name}: {copy} differs from {other}'s {original}"


def test_copies_are_marked():
    """Functions and classes of the same name and body, docstrings aside, in two files: all but one carry the mark."""
    found = {}
    for name in METHODS:
        marked = [copy for copy, _, _ in MARK.findall(source(name))]
        for node in definitions(ast.parse(source(name))):
            if node.name not in marked:
                found.setdefault((node.name, without_docstring(node)), []).append(name)
    assert {function: files for (function, _), files in found.items() if len(files) > 1} == {}


# -------- Flags ---------------------------------------------------------------------------------------------------------------

def parse(name, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        return method(name).get_args()


def flags_of(name):
    """{destination: action} of all flags but --help."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        real = argparse.ArgumentParser.parse_args
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *args: found.append(self) or real(self, *args))
        parse(name)
    return {action.dest: action for action in found[0]._actions if action.dest != "help"}


@EVERY_METHOD
def test_help(name, monkeypatch, capsys):
    """Needs neither a network nor a GPU, and explains every flag."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("--help looked for a GPU"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("--help connected to a network"))
    with pytest.raises(SystemExit) as stop:
        parse(name, "--help")
    text = capsys.readouterr().out
    assert not stop.value.code and all(f"--{flag.replace('_', '-')}" in text for flag in SHARED)


def test_help_of_the_program(program, tmp_path):
    """As a user calls it: from another folder, with no GPU visible; it leaves nothing behind."""
    found = program("methods/simclr.py", "--help", CUDA_VISIBLE_DEVICES="")
    assert "--tau" in found.stdout and not found.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, flags, words", [
    *((name, "--batch 1", "--batch 1: choose") for name in METHODS),
    *((name, "--size 0", "--size") for name in METHODS),
    ("simclr", "--tau 0.001", "--tau 0.001: choose at least"), ("moco", "--tau 0.001", "--tau 0.001: choose at least"),
    ("swav", "--epsilon 0", "--epsilon 0.0: choose"), ("swav", "--queue -1 0", "--queue -1: choose"),
    ("swav", "--small 2 0", "--small"), ("dino", "--small 2 0", "--small"), ("jigsaw", "--shift -1", "--shift -1: choose"),
    ("jigsaw", "--tile 0", "--tile 0"), ("colorization", "--temperature 0", "--temperature 0.0: choose")])
def test_a_flag_that_makes_no_sense_ends_in_one_sentence_before_anything_is_written(name, flags, words, monkeypatch, capsys,
                                                                                    tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"methods.{name}").main()
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and error.startswith("error: ") and words in error and "\n" not in error
    assert not list(tmp_path.iterdir())


@EVERY_METHOD
def test_flags(name):
    flags, pattern = flags_of(name), flags_of("simclr")
    assert len(flags) <= 20 and set(SHARED) <= set(flags)
    assert all(len((action.help or "").split()) >= 2 for action in flags.values())
    assert flags["data"].help.startswith("emoji, ") and "or a folder" in flags["data"].help
    for flag in ("root", "eval_every", "workers", "compile"):
        assert flags[flag].help == pattern[flag].help
    assert flags["out"].help.startswith(f"run folder (default: runs/{name}-DATA-SEED)") and "continued" in flags["out"].help
    assert flags["seed"].help.startswith("of the weights, the order of the images")
    for flag in ("batch", "lr"):  # what a rate or a batch means is the same everywhere; the recipe may add to it
        assert flags[flag].help.startswith(pattern[flag].help.split(" (")[0])
    for flag in ("size", "arch", "batch", "epochs", "lr"):
        assert "paper" in flags[flag].help, f"--{flag} does not name the paper's value"
    assert flags["data"].default == "emoji" and flags["out"].default is None and flags["seed"].default == 0


@EVERY_METHOD
def test_every_flag_is_used(name):
    text = source(name) + (ROOT / "common.py").read_text()
    assert [flag for flag in flags_of(name) if not re.search(rf"\bargs\.{flag}\b", text)] == []


def commands(name):
    """The commands of the docstring, as lists of words."""
    text = ast.get_docstring(ast.parse(source(name))).replace("\\\n", " ")
    found = re.findall(r"^ +((?:python|torchrun) .*?)(?:   .*)?$", re.sub(r"\n? {9,}--", " --", text), re.MULTILINE)
    return [shlex.split(command) for command in found]


@EVERY_METHOD
def test_commands_of_the_docstring(name):
    """One for two CPU cores, without a flag; one for a GPU; one for many. Their flags are accepted."""
    found, script = commands(name), f"methods/{name}.py"
    assert found[0] == ["python", script] and any(c[:2] == ["python", script] and len(c) > 2 for c in found)
    assert any(c[:4] == ["torchrun", "--nproc_per_node", "8", script] for c in found) and all(script in c for c in found)
    for command in found:
        args = parse(name, *command[command.index(script) + 1:])
        assert command[0] == "python" or args.batch % 8 == 0


@EVERY_METHOD
@pytest.mark.parametrize("launcher", ["python", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_recipes_of_the_docstring_run(name, launcher, tmp_path):
    """One step of four images with the file's default network. The recipes for several GPUs have large heads and images; they
    run only if slow tests are asked for."""
    smaller = ["--arch", parse(name).arch, "--batch", 4, "--epochs", 1, "--workers", 0, "--out", tmp_path]
    for command in commands(name)[1:]:
        if command[0] == launcher:
            flags = command[command.index(f"methods/{name}.py") + 1:]
            result = call_main(name, *flags, *smaller, data=tiny_data(4), Run=Recorder)
            assert result.code == 0, f"{' '.join(command)}: {result.err}"
            assert len(Recorder.latest.losses) == 1 and Recorder.latest.losses[0].isfinite()


# -------- A tiny run ----------------------------------------------------------------------------------------------------------

class Watched(common.Run):
    """A Run that looks at the gradients after every step."""

    def __init__(self, name, args, data, loader, model, state, collapse=None):
        super().__init__(name, args, data, loader, model, state, collapse)
        type(self).latest, self.begin = self, {n: p.detach().clone() for n, p in model.named_parameters()}
        self.learns, self.bad = set(), set()

    def log(self, loss, lr):
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                self.bad |= {name} if not p.requires_grad or not p.grad.isfinite().all() else set()
                self.learns |= {name} if p.grad.abs().max() > 0 else set()
        super().log(loss, lr)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tmp_path_factory):
    """A run of two epochs of four steps, and the same command once more."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param) / "deep" / "run"
    watched = type("WatchedOnce", (Watched,), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "pixels", lambda size: torch.nn.AdaptiveAvgPool2d(8))  # the probe of 3072 pixels takes seconds
        first = call_main(name, *TINY, "--out", folder, Run=watched)
        assert first.code == 0, first.err
        run, left = watched.latest, files(folder)
        second = call_main(name, *TINY, "--out", folder, Run=watched)
    return SimpleNamespace(name=name, folder=folder, run=run, first=first, left=left, second=second)


def test_metrics(finished):
    first, *rows, last = (json.loads(line) for line in finished.left["metrics.jsonl"].decode().splitlines())
    assert set(first) == {"method", "command", "commit", "versions", "device", "world_size", "settings"}
    assert first["method"] == finished.name and first["world_size"] == 1
    assert first["command"].startswith(f"methods/{finished.name}.py --batch 12 --epochs 2")
    assert {"python", "torch", "torchvision", "numpy"} <= set(first["versions"])
    assert first["settings"]["seed"] == 0 and first["settings"]["train_images"] == 48
    assert set(flags_of(finished.name)) - {"out", "root", "workers", "compile"} < set(first["settings"])

    assert [row["step"] for row in rows] == list(range(8)) and [row["epoch"] for row in rows] == [0] * 4 + [1] * 4
    for row in rows:
        assert {"step", "epoch", "loss", "lr", "images_per_s"} <= set(row)
        assert math.isfinite(row["loss"]) and row["lr"] > 0 and row["images_per_s"] > 0
    assert len({row["loss"] for row in rows}) == 8  # it moves
    assert 0 <= rows[3]["knn20"] <= 100 and "knn20" not in rows[7]  # after the last epoch comes the whole evaluation

    assert set(last) == {"evaluation", "random_init", "pixels", "train_seconds", "unreadable_files"}
    accuracies = {"knn20", "knn200", "linear", "retrieval1", "retrieval5"}
    panel = {"feature_std", "feature_std_isotropic", "rankme", "alignment", "uniformity"}
    for results in (last["evaluation"], last["random_init"], last["pixels"]):
        assert set(results) == accuracies | panel and all(0 <= results[key] <= 100 for key in accuracies)
        assert all(math.isfinite(value) for value in results.values())
    assert last["evaluation"] != last["random_init"] and last["train_seconds"] > 0


def test_backbone_loads_into_a_new_one(finished):
    args = finished.run.args
    saved = torch.load(finished.folder / "backbone.pt", weights_only=True)
    network = method(finished.name).backbone(args.arch, args.size)
    network.load_state_dict(saved, strict=True)
    features = network.eval()(torch.zeros(2, 3, args.size, args.size)).flatten(1)
    assert features.shape == (2, network.out_dim) and features.isfinite().all()
    for key, value in finished.run.model.backbone.state_dict().items():
        assert torch.equal(saved[key], value)


def test_checkpoint_holds_everything(finished):
    saved = torch.load(finished.folder / "last.pt", weights_only=True)
    assert set(saved) == {"state", "settings", "baselines", "step", "seconds"} and saved["step"] == 8
    assert set(saved["state"]) == {"model", *finished.run.state} and "optimizer" in saved["state"]
    assert list(saved["state"]["model"]) == list(finished.run.model.state_dict())


def test_pictures(finished):
    own = {"mae": ["reconstruction.png"], "colorization": ["colorized.png"]}.get(finished.name, [])  # dino's: test_dino.py
    for name in ("views.png", "curve.png", "neighbours.png", *own):
        assert name in finished.first.out
        picture = np.asarray(Image.open(io.BytesIO(finished.left[name])).convert("RGB"))
        assert min(picture.shape[:2]) >= 64 and picture.std() > 1, name


def test_no_half_written_file_is_left(finished):
    assert not [name for name in finished.left if name.endswith(".part")]


def test_gradients(finished):
    """Every trainable parameter gets a gradient that is finite at every step and not 0 at some; others get none."""
    parameters = dict(finished.run.model.named_parameters())
    assert finished.run.bad == set()
    assert {name for name, p in parameters.items() if p.requires_grad} == finished.run.learns


def test_every_trainable_parameter_moves(finished):
    """A parameter that no optimiser knows of would stay."""
    still = {name for name, p in finished.run.model.named_parameters() if torch.equal(p, finished.run.begin[name])}
    assert {name for name, p in finished.run.model.named_parameters() if p.requires_grad} & still == set()


def test_table_at_the_end(finished):
    for text in (finished.first.out, finished.second.out):
        assert all(word in text for word in ("knn20", "linear", "retrieval1", "raw pixels", "random init", finished.name))
    assert "epoch 2/2" in finished.first.out


def test_finished_run_only_shows_its_table_again(finished):
    assert finished.second.code == 0 and "continuing after step 8 of 8" in finished.second.out
    assert "epoch" not in finished.second.out and "evaluating" not in finished.second.out
    again = files(finished.folder)
    assert {name: again[name] for name in finished.left} == finished.left


def test_other_settings_are_refused(finished):
    """With one sentence that names what differs and what to do, before anything is written."""
    found = call_main(finished.name, *TINY, "--epochs", 3, "--seed", 7, "--out", finished.folder)
    assert found.code == 1 and "epochs 2, now 3" in found.err and "seed 0, now 7" in found.err and "--out" in found.err
    assert found.err.startswith("error: ") and found.err.count("\n") == 1
    assert {name: files(finished.folder)[name] for name in finished.left} == finished.left
