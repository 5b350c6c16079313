"""The project as a whole: every quoted command works, the layout, what the requirements list, and imports without effects."""

import argparse
import ast
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import common
from common import Data, Split

ROOT = common.HERE
METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))
SCRIPTS = ["common.py", *(f"methods/{name}.py" for name in METHODS), "kernels/bench.py", "tests/bench_views.py",
           "tests/bench_steps.py", "tests/results/report.py"]
README = (ROOT / "README.md").read_text()


def tracked():
    """The files that git has or would take, as paths inside the project."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git repository")
    found = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout
    return [name for name in found.split("\0") if name and (ROOT / name).is_file()]


def texts():
    return {name: (ROOT / name).read_text() for name in tracked() if not name.endswith((".npz", ".png"))}


def load(script):
    """A script as a module, without running its main()."""
    if script.startswith(("methods", "kernels", "common")):
        return importlib.import_module(script.removesuffix(".py").replace("/", "."))
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------- Quoted commands -------------------------------------------------------------------------------------------------

COMMAND = re.compile(r"(?:\bpython3? |\btorchrun (?:--nproc_per_node (\d+) ))((?:[\w.]+/)*\w+\.py)((?: [^\s`#]+)*)")


def quoted():
    """(where, processes, script, [argument, ...]) of every command in README.md and in the docstrings of the scripts. A
    command goes on after a backslash; two spaces, a comment or a backquote end it."""
    sources = {"README.md": README} | {s: ast.get_docstring(ast.parse((ROOT / s).read_text())) for s in SCRIPTS}
    for where, text in sources.items():
        for processes, script, arguments in COMMAND.findall(re.sub(r" ?\\\n\s*", " ", text)):
            yield where, int(processes or 1), script, shlex.split(arguments)


QUOTED = list(quoted())


class Parsed(Exception):
    """Leaves main() as soon as it has parsed its arguments."""


def test_commands_are_quoted_where_they_are_expected():
    assert {where for where, *_ in QUOTED} == {"README.md", *SCRIPTS}  # else the pattern above has missed some
    assert all((ROOT / script).is_file() for _, _, script, _ in QUOTED)
    for name in METHODS:  # plain, and by torchrun
        assert {p > 1 for where, p, script, _ in QUOTED if where == script == f"methods/{name}.py"} == {True, False}, name


@pytest.mark.parametrize("where, processes, script, arguments", QUOTED,
                         ids=[f"{where}:{Path(c).stem} {' '.join(a)}"[:70] for where, _, c, a in QUOTED])
def test_quoted_flags_are_those_of_the_script(monkeypatch, where, processes, script, arguments):
    """The script's own parser takes them; and what a training script is told can be built."""
    def parse(self, *args):
        original(self, *args)
        raise Parsed
    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    module = load(script)
    if not script.startswith("methods/"):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsed):  # argparse would end the program, with exit code 2
            module.main()
        return
    args = module.get_args()  # and whatever it checks itself
    assert args.batch % processes == 0
    assert args.data in (*common.EMBEDDED, *common.DOWNLOADED, "IMAGENET", "PATH/TO/FOLDER", "PATH/TO/IMAGENET")
    with torch.device("meta"):  # shapes only
        assert list(module.backbone(args.arch, args.size).parameters())


@pytest.fixture
def little(monkeypatch):
    """little(module): its load_data gives 64 training and 32 test images of the set that it is asked for."""
    def cut(*args):
        data = load_data(*args)
        train, test = (Split(*(None if p is None else p[::len(p) // n][:n] for p in split))
                       for split, n in ((data.train, 64), (data.test, 32)))
        return Data(data.name, train, train, test)
    load_data = common.load_data
    return lambda module: monkeypatch.setattr(module, "load_data", cut)


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    return module.main()


def test_quoted_commands_run_from_training_to_the_readme(monkeypatch, capsys, tmp_path, little):
    """One of each kind, shortened, one after the other: train, evaluate on another set, record, write the tables, compare."""
    simclr, report = load("methods/simclr.py"), load("tests/results/report.py")
    little(simclr)
    little(common)
    run = tmp_path / "runs" / "simclr-emoji-0"
    call(monkeypatch, simclr, "--epochs", 1, "--warmup", 0, "--batch", 32, "--size", 16, "--out", run)
    shown = capsys.readouterr().out
    expected = ("metrics.jsonl", "views.png", "curve.png", "neighbours.png", "backbone.pt", "last.pt")
    assert all((run / name).is_file() and f"`{name}`" in README for name in expected) and "raw pixels" in shown

    call(monkeypatch, common, run / "backbone.pt", "--data", "fashion")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() == {"pixels", "random_init", "evaluation"}

    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(README)
    call(monkeypatch, report, "add", run)
    written, lines = (tmp_path / "README.md").read_text(), (run / "metrics.jsonl").read_text().splitlines()
    figure = f"{json.loads(lines[-1])['evaluation']['linear']:.1f}"
    for block in ("quickstart", "emoji"):  # the block shows what this run reached
        assert figure in re.search(f"<!-- {block} -->(.*)<!-- /{block} -->", written, re.S)[1]
    assert "| **simclr** `--size 16 --warmup 0.0`, resnet14 |" in written  # what differs from the defaults
    row = report.read_rows()[0]
    del row["settings"]["tau"]  # as if the flag were newer than the row
    assert report.label(row) == "**simclr** `--size 16 --tau ? --warmup 0.0`, resnet14"
    assert (tmp_path / "knn.png").is_file()
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, report, "--check")
    assert caught.value.code is None
    (tmp_path / "README.md").write_text(written.replace(figure, "99.9"))
    with pytest.raises(SystemExit, match="README.md differs"):
        call(monkeypatch, report, "--check")


def test_bench_views_runs(monkeypatch, capsys):
    module = load("tests/bench_views.py")
    monkeypatch.setattr(module, "CASES", {"32 px": (32, 32, 8, 4, 0.0), "224 px, PIL's blur": (48, 40, 4, 2, 0.5)})
    call(monkeypatch, module, "--threads", 1, "--repeats", 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and torch.__version__ in lines[0]
    for line in lines[2:]:
        ours, theirs, ratio = re.search(r"(\d+) +(\d+) +([\d.]+)x$", line).groups()
        assert int(ours) > 0 and int(theirs) > 0 and float(ratio) > 0


def test_bench_steps_runs(monkeypatch, capsys):
    module = load("tests/bench_steps.py")
    call(monkeypatch, module, "simclr", "moco", "--batch", 8, "--steps", 2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and [line.split()[0] for line in lines[1:]] == ["method", "simclr", "moco"]
    for line in lines[2:]:
        batch, ms, speed, *shares = (float(word.rstrip("%")) for word in line.split()[1:])
        assert batch == 8 and ms > 0 and abs(speed * ms / 8000 - 1) < 0.2  # both are rounded to whole numbers
        assert all(share > 0 for share in shares) and abs(sum(shares[:-1]) - 100) < 0.3
        assert abs(shares[0] + shares[2] + shares[4] - shares[5]) < 0.3


def test_bench_of_kernels_prints_its_table(monkeypatch, capsys, tmp_path):
    module = load("kernels/bench.py")
    monkeypatch.setattr(module, "run", lambda *args: [])  # measures nothing, so that nothing fails
    call(monkeypatch, module, "--out", tmp_path / "results.jsonl")
    assert "| kernel | size |" in capsys.readouterr().out


def test_readme_is_generated_from_the_recorded_rows(monkeypatch):
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, load("tests/results/report.py"), "--check")
    assert caught.value.code is None


def test_the_recorded_runs_show_what_the_readme_says_of_them():
    """Of every method at its defaults, three seeds at least: linear accuracy above raw pixels and two points above the
    untrained network, as means; 10 minutes at most, the mean on the fastest machine. Of all runs: no collapsed features."""
    report = load("tests/results/report.py")
    entries = [e for e in report.entries(report.read_rows())
               if e[0]["settings"]["data"] == "emoji" and report.is_default(e[0])]
    assert sorted(e[0]["method"] for e in entries) == METHODS
    for e in entries:
        linear, pixels, before = (statistics.mean(run[part]["linear"] for run in e)
                                  for part in ("evaluation", "pixels", "random_init"))
        assert {run["settings"]["seed"] for run in e} == {0, 1, 2}, e[0]["method"]
        assert linear > pixels and linear > before + 2, e[0]["method"]
        assert report.seconds(next(iter(report.by_device(e).values()))) < 600, e[0]["method"]
    for row in report.read_rows():
        assert all(row["evaluation"][key] > row["random_init"][key] for key in ("feature_std", "rankme")), row["command"]


def test_the_test_command_of_the_readme_is_what_ci_runs():
    command = next(line for line in README.splitlines() if "pytest" in line)
    assert "grep -m 1 'pytest' README.md" in (ROOT / ".ci" / "run").read_text()  # the first such line, nothing else
    made, installed, tested = (shlex.split(part) for part in command.split("&&"))  # sets up all that it needs
    assert made == ["python3", "-m", "venv", ".venv"] and installed == [".venv/bin/pip", "install", "-r", "requirements.txt"]
    assert tested[:3] == [".venv/bin/python", "-m", "pytest"] and tested[-1] == "tests" and "--slow" not in tested
    assert f"```bash\n{command}\n```" in README  # a line of its own, to copy


def test_python_that_the_readme_quotes():
    statements = re.findall(r"`(from methods\.\w+ import [^`]+)`", README)
    assert statements
    for statement in statements:
        exec(statement, {})


# -------- Layout and text -------------------------------------------------------------------------------------------------

def test_layout():
    allowed = {"README.md", "requirements.txt", "methods", "common.py", "kernels", "tests", ".ci", ".gitignore", "LICENSE"}
    assert {name.split("/")[0] for name in tracked()} == allowed
    assert all(name.endswith(".py") and name.count("/") == 1 for name in tracked() if name.startswith("methods/"))
    assert sum((ROOT / name).stat().st_size for name in tracked() if name.endswith(".npz")) <= 16e6  # bytes


def test_lengths():
    assert len((ROOT / "common.py").read_text().splitlines()) < 900
    limit = tomllib.loads((ROOT / ".ci" / "ruff.toml").read_text())["line-length"]
    assert limit == 128
    long = [f"{name}:{number}" for name, text in texts().items() if name.endswith((".py", ".sh", ".toml", "run"))
            for number, line in enumerate(text.splitlines(), 1) if len(line) > limit]
    assert not long


# What only its authors' machines know, or what is of no use to a reader. Written in two parts, so as not to be found here.
FORBIDDEN = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "py" + "pi.org", "python" + "hosted", "npm" + "js.org",
             "issue" + " #"]


def test_text_names_no_machine_and_no_package_host():
    found = [f"{name}: {word}" for name, text in texts().items() for word in FORBIDDEN if word.lower() in text.lower()]
    assert not found


def test_links_inside_the_project_exist():
    missing = []
    for name in (name for name in tracked() if name.endswith(".md")):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text()):
            if not link.startswith(("http://", "https://", "mailto:")) and not ((ROOT / name).parent / link).exists():
                missing.append(f"{name}: {link}")
    assert not missing


def test_requirements_list_what_is_imported():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    parsed = [re.fullmatch(r"([a-z-]+)((?:[<>=!]=?[\d.]+,?)+)(; .+)?", line) for line in lines if line]
    assert all(parsed), lines
    listed = {m[1] for m in parsed}
    packages = {"PIL": "pillow", "sklearn": "scikit-learn"}  # imported name -> package, where they differ
    used = {}
    for name, text in texts().items():
        if name.endswith(".py") and name != "tests/data/build.py":  # says itself what it needs
            for node in ast.walk(ast.parse(text)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                    [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
                for module in (n.split(".")[0] for n in names):
                    used.setdefault(packages.get(module, module), name)
    own = {"common", "methods", "kernels", "conftest", *(p.stem for p in (ROOT / "tests").glob("*.py"))}
    # scipy comes with scikit-learn; kernels/bench.py compares with packages if they are there
    compared = {"lightly", "open_clip", "memeff", "inf_cl", "cut_cross_entropy", "liger_kernel"}
    assert set(used) - set(sys.stdlib_module_names) - own - compared - {"scipy"} <= listed
    assert {"torch", "torchvision", "triton", "pytest"} <= listed


# -------- Importing ---------------------------------------------------------------------------------------------------------

def test_every_method_has_what_evaluation_needs():
    for name in METHODS:
        module = load(f"methods/{name}.py")
        assert callable(module.backbone) and callable(module.get_args) and callable(module.views), name


def test_importing_has_no_side_effects(tmp_path):
    """In a program of its own, because the modules are loaded here already."""
    modules = ["common", "kernels", *(f"kernels.{p.stem}" for p in sorted((ROOT / "kernels").glob("[a-z]*.py"))),
               *(f"methods.{name}" for name in METHODS)]
    program = f"""
import os, random, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch, torchvision
def state():
    return (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ), torch.are_deterministic_algorithms_enabled(),
            torch.distributed.is_initialized(), os.getcwd())
before = state()
for name in {modules!r}:
    __import__(name)
    assert state() == before, name
    assert not torch.cuda.is_initialized(), name
"""
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout == "", found.stdout + found.stderr
    assert not list(tmp_path.iterdir())
