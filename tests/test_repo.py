"""The project as a whole: every quoted command is accepted, one of each kind runs; the layout, what
the requirements list, imports without effects, without triton, and under an old Python."""

import argparse
import ast
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import (
    METHODS,
    ROOT,
    SCRIPTS,
    arguments,
    call_main,
    kind_of,
    light,
    method,
    short,
    tiny_clips,
)

import common

TOOLS = ["kernels/bench.py", "tests/bench_views.py", "tests/bench_steps.py", "tests/copies.py"]
TOOLS.append("tests/bench_scale.py")
PROGRAMS = [*(f"methods/{name}.py" for name in SCRIPTS), *TOOLS, "tests/results/report.py"]
README = (ROOT / "README.md").read_text()


def tracked():
    """The files that git has or would take, as paths inside the project."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git repository")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts():
    binary = (".npz", ".png")
    return {name: (ROOT / name).read_text() for name in tracked() if not name.endswith(binary)}


def load(script, root=ROOT):
    """A script as a module, without running its main()."""
    if script.startswith(("methods", "kernels")):
        return importlib.import_module(script.removesuffix(".py").replace("/", "."))
    spec = importlib.util.spec_from_file_location(Path(script).stem, root / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------- Quoted commands -------------------------------------------------------------------------

COMMAND = re.compile(
    r"(?:\bpython3? |\btorchrun (?:--nproc_per_node (\d+) ))((?:[\w.]+/)*\w+\.py)((?: [^\s`#]+)*)"
)


def quoted():
    """(where, processes, script, [argument, ...]) of every command in README.md and in the
    docstrings of the scripts. A command goes on after a backslash; two spaces, a comment or a
    backquote end it."""
    sources = {"README.md": README}
    for script in PROGRAMS:
        sources[script] = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    for where, text in sources.items():
        text = re.sub(r" ?\\\n\s*", " ", text)
        for processes, script, words in COMMAND.findall(text):
            yield where, int(processes or 1), script, shlex.split(words)


QUOTED = list(quoted())


class Parsed(Exception):
    """Leaves main() as soon as it has parsed its arguments."""


def leave(*args, **options):
    raise Parsed


def test_commands_are_quoted_where_they_are_expected():
    assert {where for where, *_ in QUOTED} == {"README.md", *PROGRAMS}  # else some were missed
    assert all((ROOT / script).is_file() for _, _, script, _ in QUOTED)


@pytest.mark.parametrize(
    "where, processes, script, words",
    QUOTED,
    ids=[f"{where}:{Path(c).stem} {' '.join(words)}"[:70] for where, _, c, words in QUOTED],
)
def test_quoted_flags_are_accepted(monkeypatch, where, processes, script, words):
    """By the script's own main(), and what a training script is told can be built."""
    if not script.startswith("methods/"):
        original = argparse.ArgumentParser.parse_args

        def parse_args(self, *args):
            original(self, *args)
            raise Parsed

        monkeypatch.setattr(sys, "argv", [script, *words])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed):  # argparse would end the program, with exit code 2
            load(script).main()
        return

    name = Path(script).stem
    monkeypatch.setattr(method(name), "join_processes", leave)
    with pytest.raises((Parsed, SystemExit)) as end:
        method(name).main(words)
    if "--help" in words:
        assert end.value.code == 0
        return
    assert end.type is Parsed
    if kind_of(name) == "evaluation":
        return
    args = arguments(name, *words)
    assert args.batch % processes == 0
    folders = ("IMAGENET", "VIDEOS", "PATH/TO/FOLDER", "PATH/TO/IMAGENET")
    assert args.data in (*common.EMBEDDED, *common.DOWNLOADED, *folders)
    if hasattr(args, "arch"):
        backbone = getattr(method(name), "backbone", common.backbone)
        with torch.device("meta"):  # shapes only
            assert list(backbone(args.arch, args.size).parameters())


def test_commands_run_from_training_to_the_pages(capsys, tmp_path):
    """One of each kind, one after the other, in a copy of the project: train, evaluate on another
    set, record, write the pages, compare."""
    for name in tracked():
        target = tmp_path / "project" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    run = tmp_path / "project" / "runs" / "simclr-emoji-0"
    data = common.load_data("emoji", "", torch.device("cpu"))
    small = [cut(data.train, 64), cut(data.train, 64), cut(data.test, 32)]
    small = common.Data("emoji", *small)
    with pytest.MonkeyPatch.context() as patch:
        # What takes seconds.
        patch.setattr(common, "pixels", lambda *_: torch.nn.AdaptiveAvgPool2d(8))
        trained = call_main(
            "simclr", *short("simclr"), "--out", run, data=small, **light("simclr")
        )
        assert trained.code == 0, trained.err
        for name in ("metrics.jsonl", "views.png", "curve.png", "neighbours.png", "backbone.pt"):
            assert (run / name).is_file() and f"`{name}`" in README
        out = tmp_path / "evaluated"
        flags = [run, "--data", "fashion", "--out", out]
        evaluated = call_main("eval_features", *flags, data=small)
        assert evaluated.code == 0, evaluated.err
    assert "simclr-emoji-0" in evaluated.out and list(out.iterdir())

    report = load("tests/results/report.py", tmp_path / "project")
    before = len(report.read_rows())
    report.main(["add", str(run)])
    rows = report.read_rows()
    assert len(rows) == before + 1
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert any(row["evaluation"] == line["evaluation"] for row in rows)
    report.main(["--check"])
    page = tmp_path / "project" / "README.md"
    page.write_text(re.sub(r"\| *\d+\.\d", "| 99.9", page.read_text()))
    with pytest.raises(SystemExit) as stop:
        report.main(["--check"])
    assert stop.value.code and "README.md differs" in f"{stop.value.code} {capsys.readouterr().err}"


def cut(split, count):
    """`count` images of a split, spread over it."""
    chosen = torch.arange(count) * (len(split.images) // count)
    return common.Split(
        common.InMemory(split.images.pixels[chosen]), *[part[chosen] for part in split[1:]]
    )


def test_bench_views_runs(monkeypatch, capsys):
    module = load("tests/bench_views.py")
    cases = {"32 px": (32, 32, 8, 4, 0.0), "224 px, PIL's blur": (48, 40, 4, 2, 0.5)}
    monkeypatch.setattr(module, "CASES", cases)
    monkeypatch.setattr(module, "STEP", (16, 8, 4))
    monkeypatch.setattr(sys, "argv", ["bench_views.py", "--threads", "1", "--repeats", "1"])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and torch.__version__ in lines[0]
    for line in lines[2:4] + lines[5:]:
        ours, theirs, ratio = re.search(r"(\d+) +(\d+) +([\d.]+)x", line).groups()
        assert int(ours) > 0 and int(theirs) > 0 and float(ratio) > 0


def test_bench_steps_runs(monkeypatch, capsys):
    module = load("tests/bench_steps.py")
    names = ["simclr", "moco", "video_colorization"]  # the last one asks for batches of its own
    monkeypatch.setattr(method("video_colorization"), "load_data", lambda *_: tiny_clips())
    monkeypatch.setattr(sys, "argv", ["bench_steps.py", *names, "--batch", "8", "--steps", "2"])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and [line.split()[0] for line in lines[1:]] == ["method", *names]
    for line in lines[2:]:
        batch, ms, speed, *shares = [float(word.rstrip("%")) for word in line.split()[1:]]
        assert batch == 8 and ms > 0
        assert abs(speed * ms / 8000 - 1) < 0.2  # both are rounded to whole numbers
        assert all(share > 0 for share in shares) and abs(sum(shares[:-1]) - 100) < 0.3
        assert abs(shares[0] + shares[2] + shares[4] - shares[5]) < 0.3


def test_bench_of_kernels_prints_its_table(monkeypatch, capsys, tmp_path):
    module = load("kernels/bench.py")
    monkeypatch.setattr(module, "run", lambda *args: [])  # measures nothing, so nothing fails
    monkeypatch.setattr(sys, "argv", ["bench.py", "--out", str(tmp_path / "results.jsonl")])
    module.main()
    assert "| kernel | size |" in capsys.readouterr().out


def test_the_test_command_of_the_readme_is_what_ci_runs():
    command = next(line for line in README.splitlines() if "pytest" in line)
    script = (ROOT / ".ci" / "run").read_text()
    assert "grep -m 1 'pytest' README.md" in script  # the first such line, nothing else
    assert "--thorough" in script
    made, installed, tested = [shlex.split(part) for part in command.split("&&")]
    assert made == ["python3", "-m", "venv", ".venv"]
    assert installed == [".venv/bin/pip", "install", "-r", "requirements.txt"]
    assert tested[:3] == [".venv/bin/python", "-m", "pytest"] and tested[-1] == "tests"
    assert "--thorough" not in tested
    assert f"```bash\n{command}\n```" in README  # a line of its own, to copy


# -------- Layout and text -------------------------------------------------------------------------


def test_layout():
    names = tracked()
    allowed = {"README.md", "requirements.txt", "methods", "common.py", "kernels", "tests"}
    allowed |= {".ci", ".gitignore", "LICENSE"}
    assert {name.split("/")[0] for name in names} == allowed
    methods = [name for name in names if name.startswith("methods/")]
    assert all(name.endswith(".py") and name.count("/") == 1 for name in methods)
    arrays = [ROOT / name for name in names if name.endswith(".npz")]
    assert sum(path.stat().st_size for path in arrays) <= 32e6  # bytes


def test_lines_have_at_most_100_columns():
    config = tomllib.loads((ROOT / ".ci" / "ruff.toml").read_text())
    assert config["line-length"] == 100
    long = []
    for name, text in texts().items():
        if name.endswith((".py", ".sh", ".toml", "run")):
            lines = enumerate(text.splitlines(), 1)
            long += [f"{name}:{number}" for number, line in lines if len(line) > 100]
    assert not long


# What only its authors' machines know, or what is of no use to a reader. Written in two parts, so
# as not to be found here.
FORBIDDEN = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "py" + "pi.org", "python" + "hosted"]
FORBIDDEN += ["npm" + "js.org", "issue" + " #"]


def test_text_names_no_machine_and_no_package_host():
    found = []
    for name, text in texts().items():
        found += [f"{name}: {word}" for word in FORBIDDEN if word.lower() in text.lower()]
    assert not found


def test_links_inside_the_project_exist():
    missing = []
    for name in (name for name in tracked() if name.endswith(".md")):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text()):
            outside = link.startswith(("http://", "https://", "mailto:"))
            if not outside and not ((ROOT / name).parent / link).exists():
                missing.append(f"{name}: {link}")
    assert not missing


def imported(text):
    """The packages that a Python text imports."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return {name.split(".")[0] for name in names}


def test_requirements_list_what_is_imported():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    parsed = [
        re.fullmatch(r"([a-z-]+)((?:[<>=!]=?[\d.]+,?)+)(; .+)?", line) for line in lines if line
    ]
    assert all(parsed), lines
    listed = {match[1] for match in parsed}
    packages = {"PIL": "pillow", "sklearn": "scikit-learn"}  # imported name -> package
    used = {}
    for name, text in texts().items():
        if name.endswith(".py") and name != "tests/data/build.py":  # says itself what it needs
            for module in imported(text):
                used.setdefault(packages.get(module, module), name)
    own = {"common", "methods", "kernels", *(p.stem for p in (ROOT / "tests").rglob("*.py"))}
    # scipy comes with scikit-learn; kernels/bench.py compares with packages if they are installed
    own |= {"scipy", "lightly", "open_clip", "memeff", "inf_cl", "cut_cross_entropy"}
    own |= {"liger_kernel", "pytorch_metric_learning", "timm"}
    own |= {"av"}  # for folders of videos only; a sentence asks for it
    others = set(used) - set(sys.stdlib_module_names) - own - listed
    assert {package: used[package] for package in others} == {}
    assert {"torch", "torchvision", "triton", "pytest"} <= listed


# -------- Importing -------------------------------------------------------------------------------

MODULES = ["common", "kernels"]
MODULES += [f"kernels.{path.stem}" for path in sorted((ROOT / "kernels").glob("[a-z]*.py"))]
MODULES += [f"methods.{name}" for name in SCRIPTS]


def run_python(text, folder):
    """A program of its own, because the modules are already loaded here."""
    command = [sys.executable, "-c", text]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_importing_has_no_side_effects(tmp_path):
    program = f"""
import os, random, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch, torchvision
def state():
    generators = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    settings = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    return (generators, random.getstate(), settings, dict(os.environ), os.getcwd(),
            torch.are_deterministic_algorithms_enabled(), torch.distributed.is_initialized())
before = state()
for name in {MODULES!r}:
    __import__(name)
    assert state() == before, name
    assert not torch.cuda.is_initialized(), name
"""
    assert run_python(program, tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_everything_imports_and_trains_without_triton(tmp_path):
    """As on a machine for which triton is not made."""
    program = f"""
import sys
sys.modules["triton"] = None  # `import triton` raises ImportError
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
for name in {MODULES!r}:
    if name != "kernels.bench":  # measures the kernels
        __import__(name)
from conftest import Recorder, call_main, short
found = call_main("simclr", *short("simclr", batch=24, epochs=1), "--out", "run", Run=Recorder)
assert found.code == 0, found.err
print(len(Recorder.latest.losses), bool(Recorder.latest.losses[0].isfinite()))
"""
    assert run_python(program, tmp_path) == "1 True\n"


def test_an_old_python_is_refused_with_one_sentence(monkeypatch, capsys):
    """Before anything is imported that it may not have; and it can read the file so far."""
    text = (ROOT / "common.py").read_text()
    check = "sys.exit(f"
    first = text[: text.index("\n\n", text.index(check))]
    assert imported(first) == {"sys"}
    ast.parse(text, feature_version=(3, 8))
    exec(first, {})
    monkeypatch.setattr(sys, "version_info", (3, 10, 14, "final", 0))
    monkeypatch.setattr(sys, "version", "3.10.14 (main)")
    with pytest.raises(SystemExit) as stop:
        exec(first, {})
    sentence = f"{stop.value.code}"
    assert sentence == "error: this project needs Python 3.11 or newer, not 3.10.14"


def test_every_method_has_what_evaluation_needs():
    for name in METHODS:
        assert callable(method(name).main), name
        if kind_of(name) in ("image", "metric", "video"):
            assert callable(method(name).views), name
