"""Every file in methods/, found by its path: its shape, its flags, three steps on a stand-in for a
GPU, and a tiny run of main() with all that a run folder holds. What is due depends on the KIND of a
file, so a new file of any kind needs no new code here."""

import ast
import contextlib
import functools
import inspect
import io
import json
import math
import re
import shlex
import sys
import tokenize
from typing import NamedTuple

import copies
import numpy as np
import pytest
import torch
from conftest import (
    EVERY_METHOD,
    FIRST_OF_ITS_KIND,
    METHODS,
    ROOT,
    SCRIPTS,
    SHORT,
    Recorder,
    arguments,
    call_main,
    kind_of,
    light,
    method,
    short,
    source,
    tiny,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
from common import Data, InMemory, Split, flag_of
from kernels.clips import VideosInMemory

SOME_THOROUGH = [  # one of each kind in the ordinary suite
    name if name in FIRST_OF_ITS_KIND else pytest.param(name, marks=pytest.mark.thorough)
    for name in METHODS
]
EVERY_SCRIPT = pytest.mark.parametrize("name", SCRIPTS)
METHOD_TOKENS = 3400  # the most that a file may hold
COMMON_TOKENS = 13_000
LINE_TOKENS = 28


class Due(NamedTuple):
    """What a file of a kind must have. optional: sections that may be missing."""

    settings: tuple = ("size", "arch", "batch", "epochs", "lr")
    sections: tuple = ("The loss.", "The network.", "The views.", "Training.")
    optional: tuple = ()
    parts: tuple = ("Idea. ", "Notation. ", "Run.\n", "Reached. ", "Differs from the paper. (")


KINDS = {
    "image": Due(),
    "metric": Due(),
    "video": Due(),
    "sound": Due(settings=("batch", "epochs", "lr")),
    "generative": Due(settings=("batch", "epochs", "lr"), optional=("The views.",)),
    "words": Due(settings=("batch", "epochs", "lr"), optional=("The views.",)),
    "initialisation": Due(
        settings=("size", "arch", "batch"),
        sections=("The initialisation.", "The views.", "The run."),
    ),
    "evaluation": Due(
        settings=(),
        sections=("The measure.", "The evaluation."),
        parts=("Idea. ", "Notation. ", "Run.\n"),
    ),
}


# -------- The shape of a file ---------------------------------------------------------------------


def test_every_file_is_of_a_known_kind():
    assert {name: kind_of(name) for name in SCRIPTS if kind_of(name) not in KINDS} == {}


def definitions(tree):
    return [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def tokens(text):
    """{line: tokens of code that begin there}, without comments, docstrings, newlines and indents.
    An f-string counts as one: since Python 3.12 tokenize splits it into its parts."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            if ast.get_docstring(node) is not None:
                docstrings.add((node.body[0].lineno, node.body[0].col_offset))
    layout = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER"}

    count = {}
    depth = 0  # of f-strings inside f-strings
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_END":
            depth -= 1
        elif depth == 0 and kind not in layout and token.start not in docstrings:
            count[token.start[0]] = count.get(token.start[0], 0) + 1
        if kind == "FSTRING_START":
            depth += 1
    return count


def table_lines(text):
    """The lines of tables: assignments of a dict, list or tuple to a CONSTANT, and long imports."""
    lines = set()
    for node in ast.parse(text).body:
        constant = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()
        if constant and isinstance(node.value, ast.Dict | ast.List | ast.Tuple):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def test_tokens_are_counted_as_one_would():
    text = '"""Doc."""\nx = f"{a!r:>{width}} {f(\'b\')}" "c"  # comment\n\n'
    text += 'def f(b):\n    """Doc."""\n'
    assert tokens(text) == {2: 4, 4: 6}


@EVERY_SCRIPT
def test_file_is_short(name):
    assert sum(tokens(source(name)).values()) <= METHOD_TOKENS


def test_common_is_short():
    assert sum(tokens((ROOT / "common.py").read_text()).values()) <= COMMON_TOKENS


@pytest.mark.parametrize("file", ["common.py", *(f"methods/{name}.py" for name in SCRIPTS)])
def test_lines_are_short(file):
    """One line, one thought. (The columns of all files are counted in test_repo.py.)"""
    text = (ROOT / file).read_text()
    tables = table_lines(text)
    assert {n: k for n, k in tokens(text).items() if k > LINE_TOKENS and n not in tables} == {}


@EVERY_SCRIPT
def test_docstring_has_its_parts_in_order(name):
    """Title; links, on arXiv or elsewhere; the parts of the kind; differences, numbered."""
    text = ast.get_docstring(ast.parse(source(name)))
    due = KINDS[kind_of(name)].parts
    patterns = [r"\A[^\n:]+: [^\n]+[.?]$", "https://", *[f"^{re.escape(part)}" for part in due]]
    found = [re.search(pattern, text, re.MULTILINE) for pattern in patterns]
    assert all(found), [pattern for pattern, match in zip(patterns, found) if not match]
    places = [match.start() for match in found]
    assert places == sorted(places)
    if kind_of(name) == "image":
        assert re.search(r"^Official code", text[: places[2]], re.MULTILINE)
    if kind_of(name) != "evaluation":
        run = text[places[4] : places[5]]
        words = r"^--batch counts the (?:images|clips) of all\s+processes\s+together\b"
        assert re.search(words, run, re.MULTILINE)
        numbers = re.findall(r"^    (\d+)\. ", text[places[-1] :], re.MULTILINE)
        assert numbers == [str(i + 1) for i in range(len(numbers))] and numbers
    assert not re.search(r"\b(FACTOR|TODO|FIXME|XXX)\b", source(name))  # still to be written


@EVERY_SCRIPT
def test_sections_are_in_order(name):
    """The loss comes first of all code, near the top, main() last; at top level nothing but
    imports, the line that finds common.py, and constants: importing a file has no effect."""
    text = source(name)
    due = KINDS[kind_of(name)]
    sections = re.findall(r"^# ([A-Z][a-z]*(?: [a-z]+)*\.)$", text, re.MULTILINE)
    wanted = [part for part in due.sections if part in sections or part not in due.optional]
    assert sections == wanted

    tree = ast.parse(text)
    parts = definitions(tree)
    assert parts[-1].name == "main" and ast.unparse(parts[-1].args) == "argv=None"
    first = text.splitlines().index(f"# {due.sections[0]}") + 1
    assert first < parts[0].lineno and parts[0].lineno < 80
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    main()"

    finds_common = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign
    for node in tree.body[1:-1]:
        line = ast.unparse(node)
        assert isinstance(node, kinds) or line == finds_common, line
        assert not isinstance(node, ast.Assign) or re.match(r"[A-Z_\d]+ = ", line), line
    constants = [node for node in tree.body if isinstance(node, ast.Assign)]
    assert ast.unparse(constants[0]).startswith("KIND = ")


@EVERY_SCRIPT
def test_imports(name):
    """The standard library and what requirements.txt has, common and kernels; never another method;
    all at the top, except those that take long: a user who asks for --help need not wait."""
    tree = ast.parse(source(name))
    allowed = {*sys.stdlib_module_names, "numpy", "torch", "torchvision", "einops"}
    allowed |= {"PIL", "tqdm", "common", "kernels"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module] if isinstance(node, ast.ImportFrom) else names
            wanted = allowed if node in tree.body else {"matplotlib", "scipy", "sklearn"}
            assert {module.split(".")[0] for module in modules} <= wanted, ast.unparse(node)


def imported_from_common(name):
    names = set()
    for node in ast.parse(source(name)).body:
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            names |= {alias.name for alias in node.names}
    return names


def test_common_holds_nothing_that_one_method_alone_uses():
    """Except augmentations, functions of (x, rand): a recipe may be the only one to use one of
    them. What common.py itself or a reader by README.md uses is at home there; the rest must be
    imported by two scripts."""
    tree = ast.parse((ROOT / "common.py").read_text())
    users = {name: imported_from_common(name) for name in SCRIPTS}
    quoted = (ROOT / "README.md").read_text()
    names_in = {}
    for part in tree.body:
        names_in[part] = {n.id for n in ast.walk(part) if isinstance(n, ast.Name)}
    for node in definitions(tree):
        arguments_of = node.args.args[:2] if isinstance(node, ast.FunctionDef) else []
        if [argument.arg for argument in arguments_of] == ["x", "rand"]:
            continue
        by_common = any(node.name in names_in[part] for part in tree.body if part is not node)
        by_scripts = [name for name, names in users.items() if node.name in names]
        by_readers = f"{node.name}(" in quoted
        assert by_common or by_readers or len(by_scripts) >= 2, f"{node.name}: {by_scripts}"


# -------- Copies ----------------------------------------------------------------------------------


def test_copies_equal_their_originals():
    """To the letter. `python tests/copies.py --fix` mends them."""
    assert copies.check(ROOT) == []


ORIGINAL = '''
@torch.no_grad()
def f(x):
    """Doc."""
    return x + 1  # one


def g(x):
    return x
'''


@pytest.fixture
def project(tmp_path):
    """project(a=..., b=...): a project of such method files; its root."""

    def write(**texts):
        (tmp_path / "methods").mkdir(exist_ok=True)
        for name, text in texts.items():
            (tmp_path / "methods" / f"{name}.py").write_text(text)
        return tmp_path

    return write


def test_copies_are_found_and_mended(project, capsys):
    """Decorators, docstring and comments belong to a copy; the rest of the file stays as it is."""
    old = "X = 1\n\n\ndef f(x):  # copy of: methods/a.py::f\n    return x + 2\n\n\nY = 2\n"
    root = project(a=ORIGINAL, b=old)
    with pytest.raises(SystemExit) as stop:
        copies.main([], root)
    assert stop.value.code == 1
    assert capsys.readouterr().out == "methods/b.py: f differs from methods/a.py::f\n"

    with pytest.raises(SystemExit) as stop:
        copies.main(["--fix"], root)
    assert stop.value.code == 0
    assert "written: methods/b.py::f\n" in capsys.readouterr().out
    copy = '@torch.no_grad()\ndef f(x):  # copy of: methods/a.py::f\n    """Doc."""\n'
    new = f"X = 1\n\n\n{copy}    return x + 1  # one\n\n\nY = 2\n"
    assert (root / "methods" / "b.py").read_text() == new
    assert (root / "methods" / "a.py").read_text() == ORIGINAL
    assert copies.check(root) == copies.fix(root) == []


@pytest.mark.parametrize(
    "text, words",
    [
        ("def g(y):  # copy of: methods/a.py::h\n    pass\n", "a.py::h, which does not exist"),
        ("def g(y):  # copy of: methods/b.py::g\n    pass\n", "b.py::g, which does not exist"),
        ("def g(y):\n    pass  # copy of: methods/a.py::g\n", "must end the first line"),
        ('def g(x):\n    """Other words."""\n    return x\n', "is equal to methods/a.py::g"),
    ],
)
def test_marks_that_are_wrong_or_missing(project, text, words):
    (problem,) = copies.check(project(a=ORIGINAL, b=text))
    assert problem.startswith("methods/b.py: ") and words in problem


def test_copy_of_a_copy_is_refused(project):
    copy = "def g(x):  # copy of: methods/a.py::g\n    return x\n"
    (problem,) = copies.check(project(a=ORIGINAL, b=copy, c=copy.replace("/a.py", "/b.py")))
    assert problem.startswith("methods/c.py: ") and "a copy itself" in problem


# -------- Flags -----------------------------------------------------------------------------------


def columns(name):
    return method(name).SETTINGS["recipe"][:-1]


def numbers(name):
    """[(setting, its interval)] of the settings that are numbers."""
    count = len(columns(name))
    found = []
    for setting, row in method(name).SETTINGS.items():
        allowed = row[-1] if len(row) > count + 1 else common.RANGES.get(setting, "[0, inf)")
        if isinstance(row[0], int | float) and not isinstance(row[0], bool):
            found.append((setting, allowed))
    return found


@EVERY_SCRIPT
def test_settings(name):
    """The rows have one value per column, help in words, perhaps what is allowed; they are used.
    The columns go from an embedded data set to the paper."""
    settings = method(name).SETTINGS
    assert list(settings)[0] == "recipe"
    if kind_of(name) != "evaluation":
        assert columns(name)[0] in common.EMBEDDED and columns(name)[-1] == "paper"
    assert set(KINDS[kind_of(name)].settings) <= set(settings)
    count = len(columns(name))
    text = source(name) + (ROOT / "common.py").read_text()
    if "settings_of(" in text:  # which reads the flags of a training on scenes
        text += (ROOT / "kernels" / "maps.py").read_text()
    for setting, row in settings.items():
        values = row[:count]
        assert len(row) in (count + 1, count + 2), setting
        assert all(isinstance(value, str | int | float) for value in values), setting
        assert len({isinstance(value, str | bool) for value in values}) == 1, setting
        assert len(row[count].split()) >= 2, f"{setting} is not explained"
        assert setting == "recipe" or re.search(rf"\bargs\.{setting}\b", text), f"unused: {setting}"


@EVERY_METHOD
def test_every_column_is_accepted(name):
    for place, column in enumerate(columns(name)):
        args = arguments(name, "--recipe", column, "--data", "emoji")
        for setting, row in method(name).SETTINGS.items():
            assert getattr(args, setting) == (column if setting == "recipe" else row[place])


@EVERY_SCRIPT
def test_help(name, monkeypatch, capsys):
    """Needs neither a network nor a GPU, and shows every flag."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for a GPU"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected to a network"))
    with pytest.raises(SystemExit) as stop:
        method(name).main(["--help"])
    text = capsys.readouterr().out
    assert not stop.value.code
    due = ["--data", "--seed", "--root", *map(flag_of, method(name).SETTINGS)]
    if len(columns(name)) == 1:  # nothing to choose
        due.remove("--recipe")
    assert [flag for flag in due if not re.search(rf"^  {flag}[ ,]", text, re.MULTILINE)] == []


def test_help_of_the_program(program, tmp_path):
    """As a user calls it: from another folder, with no GPU visible; it leaves nothing behind."""
    found = program("methods/simclr.py", "--help", CUDA_VISIBLE_DEVICES="")
    assert "--tau" in found.stdout and not found.stderr and not list(tmp_path.iterdir())


def below(interval):
    """A number that lies under an interval, "[0, 1]" or "(0, inf)"."""
    low = float(interval[1:-1].split(",")[0])
    return low if interval[0] == "(" else low - 1


def assert_refused(name, flags, words, capsys):
    """In one sentence, before anything else happens."""
    with pytest.raises(SystemExit) as stop:
        arguments(name, *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1, error
    assert words in error


@EVERY_METHOD
def test_what_makes_no_sense_is_refused(name, capsys):
    """In one sentence: numbers below their intervals, a long warm-up, a wrong flag or recipe."""
    for setting, interval in numbers(name):
        number = below(interval)
        words = str(round(number)) if isinstance(method(name).SETTINGS[setting][0], int) else number
        assert_refused(name, [flag_of(setting), words], f"{flag_of(setting)} ", capsys)
    if "warmup" in method(name).SETTINGS:
        assert_refused(name, ["--epochs", 2, "--warmup", 3], "--warmup 3: choose", capsys)
    assert_refused(name, ["--no-such-flag", 1], "--no-such-flag: no such flag", capsys)
    noun = "videos" if kind_of(name) == "video" else "images"
    assert_refused(name, ["--recipe", "paper"], f"--recipe paper needs {noun}", capsys)


def commands(name):
    """The commands of the docstring, as lists of words; two spaces end a command."""
    text = ast.get_docstring(ast.parse(source(name)))
    found = re.findall(r"^ +((?:python|torchrun) .*?)(?:  .*)?$", text, re.MULTILINE)
    return [shlex.split(command) for command in found]


@EVERY_METHOD
def test_commands_of_the_docstring(name):
    """One without a flag, for two CPU cores; one with, for a GPU; the paper's, for many. (That
    their flags are accepted is tested in test_repo.py.)"""
    script = f"methods/{name}.py"
    found = commands(name)
    assert len(found) >= 3 and all(script in command for command in found)
    assert found[0] == ["python", script]
    assert found[1][:2] == ["python", script] and len(found[1]) > 2
    paper = " ".join(found[-1])
    assert paper.startswith(f"torchrun --nproc_per_node 8 {script} --recipe paper --data ")
    assert len(paper.split()) == 8  # short


# -------- A stand-in for a GPU --------------------------------------------------------------------

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Raises where an operation mixes the CPU with the device, as a GPU would. (The meta device
    does so by itself in some operations, in a matrix product it does not.) The shape of a result is
    computed once for the same operation on the same shapes: the meta device takes its time."""

    known = {}  # operation and shapes -> shape, stride and type of a new tensor, or None: the first

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if torch.is_tensor(leaf)]
        copies_values = operation.name().startswith(("aten::copy_", "aten::_to_copy"))
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        if len(devices) > 1 and not copies_values:
            raise RuntimeError(f"{operation.name()} mixes tensors on {sorted(devices)}")
        if not tensors or not all(tensor.is_meta for tensor in tensors):
            return operation(*args, **kwargs)

        key = (operation, *[about(leaf) if torch.is_tensor(leaf) else leaf for leaf in leaves])
        if key in self.known:
            made = self.known[key]
            return torch.empty_strided(*made[:2], dtype=made[2], device=META) if made else args[0]
        result = operation(*args, **kwargs)
        returns = operation._schema.returns
        if torch.is_tensor(result) and len(returns) == 1:
            if returns[0].alias_info is None:
                self.known[key] = about(result)
            elif result is args[0]:  # in place
                self.known[key] = None
        return result


def about(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype


def meta_data(name):
    """The tiny data of a method on the meta device: shapes without values."""

    def move(split):
        numbers = [None if part is None else part.to(META) for part in split[1:]]
        return Split(reader(split.images), *numbers)

    def reader(images):
        if isinstance(images, InMemory):
            return InMemory(images.pixels.to(META))
        truth = type(images.truth)(*[part.to(META) for part in images.truth])
        return VideosInMemory(images.frames.to(META), images.lengths, truth)

    data = tiny(name)
    bank = move(data.train)
    return Data(data.name, bank, bank, move(data.test))


# What reads values before the training or between epochs, or runs on the CPU by its nature
# (the Hungarian method): other functions in their places.
READS_VALUES = {
    "count_colours": lambda loader, bins: torch.ones(len(bins), device=META),
    "refuse_grey": lambda loader: None,
    "held_out": lambda *_: {},
    "carried_masks": lambda *_: {},
    "positive_names": lambda positives, split: torch.arange(len(split.images)),
    "assign": lambda z, c: torch.arange(len(z), device=META),
    "mine": lambda split, args: split,
}


def on_meta(name, *flags, **patches):
    """main() on the meta device: network, images and optimiser have shapes, but no values. What on
    a GPU would fail, or would wait for the GPU in every step, raises: a tensor left on the CPU,
    .item(), .cpu(), a boolean index. Random numbers are drawn on the CPU, as always; pictures are
    not drawn, since they need values. Returns the Recorder."""
    first = torch.zeros(1, dtype=torch.long), [torch.zeros(1, 3, 8, 8)]
    shown = property(lambda self: first, lambda self, value: None)
    patches["join_processes"] = lambda seed: torch.manual_seed(seed) and META
    for attribute, value in vars(method(name)).items():
        if attribute in READS_VALUES:
            patches[attribute] = READS_VALUES[attribute]
        elif attribute.startswith("draw_") and "path" in inspect.signature(value).parameters:
            patches[attribute] = lambda *args, **options: None  # pictures
    adamw = torch.optim.AdamW  # in one fused kernel it refuses the meta device
    with pytest.MonkeyPatch.context() as patch, OneDevice():
        patch.setattr(torch.optim, "AdamW", lambda *args, fused=None, **more: adamw(*args, **more))
        patch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
        patch.setattr(common.Loader, "first_shown", shown, raising=False)
        patch.setattr(VideosInMemory, "check", lambda *_: None)  # the paper's clips are longer
        patches = {"Run": Recorder, **light(name), **patches}
        result = call_main(name, *flags, data=meta_data(name), **patches)
    assert result.code == 0, result.err
    run = Recorder.latest
    assert all(loss.device == META for loss in run.losses)
    assert all(value.device == META for value in run.model.state_dict().values())
    return run


@EVERY_METHOD
def test_three_steps_on_a_stand_in_for_a_gpu(name, tmp_path):
    """One step in each of three epochs, so that what changes between epochs is seen, too."""
    run = on_meta(name, *short(name, batch=16, epochs=3), "--out", tmp_path)
    assert len(run.losses) == 3


@pytest.mark.parametrize(
    "command",
    [
        "instance_discrimination --loss nce",
        "pirl --loss nce",
        "pirl --transform both",
        "byol --target mid",
        "context_encoder --mask center",
        "context_encoder --adv-weight 0",
        "split_brain --loss regression",
        "aet --transform affine",
        "context_prediction --color drop",
        "moco_v3 --arch vit_micro --train-patches",
        "lifted_structure --no-smooth",
    ],
)
def test_what_the_defaults_leave_out_on_a_stand_in_for_a_gpu(command, tmp_path):
    name, *flags = command.split()
    run = on_meta(name, *short(name, batch=16, epochs=1), *flags, "--out", tmp_path)
    assert len(run.losses) == 1


def loss_with(trouble):
    def loss(z1, z2, tau):
        trouble(z1)
        return (z1 * z2).sum()

    return loss


@pytest.mark.parametrize(
    "trouble",
    [
        lambda z: z.sum().item(),
        lambda z: z.cpu(),
        lambda z: z[z > 0],
        lambda z: z @ torch.ones(z.shape[1], 2),
        lambda z: z[torch.arange(3)],
        lambda z: print("large") if z.norm() > 1 else None,
    ],
    ids=["item", "cpu", "boolean index", "matrix on the CPU", "index on the CPU", "if"],
)
def test_the_stand_in_notices(trouble, tmp_path):
    with pytest.raises((RuntimeError, NotImplementedError)):
        on_meta("simclr", *short("simclr"), "--out", tmp_path, simclr_loss=loss_with(trouble))


def test_the_stand_in_notices_a_network_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(method("simclr").SimCLR, "to", lambda self, device: self)
    with pytest.raises(RuntimeError):
        on_meta("simclr", *short("simclr"), "--out", tmp_path, distribute=lambda model, *_: model)


class Stop(Exception):
    pass


class OneStep(Recorder):
    def log(self, loss, lr, **more):
        super().log(loss, lr, **more)
        raise Stop


def without_values(*args, make, **options):
    """A method's network without its initial values, which take seconds for a large network."""
    with META:
        return make(*args, **options)


def few_seeds(name):
    """The default's seed patches do not find room in 24 images."""
    return ["--seeds", SHORT["seeds"]] if "seeds" in method(name).SETTINGS else []


def one_step(name, flags, folder):
    """A step of 8 images on the meta device. Returns whether these flags are accepted."""
    own = getattr(method(name), "backbone", None)
    patches = {"backbone": functools.partial(without_values, make=own)} if own else {}
    flags = [*flags, "--data", "emoji", "--batch", 8, "--workers", 0, "--out", folder]
    flags += few_seeds(name)
    try:
        arguments(name, *flags)
    except SystemExit:
        return False
    with pytest.raises(Stop):
        on_meta(name, *flags, Run=OneStep, **patches)
    return True


@pytest.mark.parametrize("name", SOME_THOROUGH)
def test_every_column_trains_a_step(name, tmp_path):
    """With the column's network and image size, the paper's included: shapes without values."""
    for column in columns(name)[1:]:
        assert one_step(name, ["--recipe", column], tmp_path)


@EVERY_METHOD
def test_the_other_family_of_networks_trains_a_step_or_is_refused(name, tmp_path):
    """A vision transformer where the default is a ResNet, and the other way round. It is refused by
    the flags' check or not at all."""
    if "arch" in method(name).SETTINGS:
        default = arguments(name).arch
        other = "resnet14" if default in common.VITS else "vit_micro"
        one_step(name, ["--arch", other], tmp_path)


@pytest.mark.thorough
@EVERY_METHOD
def test_every_column_trains_a_step_with_values(name, tmp_path):
    """One step of four images with a small network of the column's family."""
    data = tiny(name)
    if kind_of(name) == "video":  # four times as long, for the paper's clips
        videos = data.train.images
        frames = videos.frames.unflatten(0, (len(videos), -1)).repeat(1, 4, 1, 1, 1).flatten(0, 1)
        longer = VideosInMemory(frames, 4 * videos.lengths, videos.truth)
        data = data._replace(train=data.train._replace(images=longer))
    for column in columns(name):
        flags = ["--recipe", column, "--data", "emoji", "--batch", 4]
        flags += ["--workers", 0, "--out", tmp_path, *few_seeds(name)]
        if "arch" in method(name).SETTINGS:
            vit = arguments(name, *flags).arch in common.VITS
            flags += ["--arch", "vit_micro" if vit else "resnet14"]
        with pytest.raises(Stop):
            call_main(name, *flags, data=data, Run=OneStep)
        assert OneStep.latest.losses[0].isfinite()


# -------- A tiny run ------------------------------------------------------------------------------


PICTURE = (ROOT / "tests" / "results" / "neighbours.png").read_bytes()  # any picture


class Watched(common.Run):
    """A Run that looks at the gradients after every step."""

    def __init__(self, name, args, data, loader, model, *others, **options):
        super().__init__(name, args, data, loader, model, *others, **options)
        type(self).latest = self
        self.begin = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.learns = set()
        self.bad = set()

    def log(self, loss, lr, **more):
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                if not p.requires_grad or not p.grad.isfinite().all():
                    self.bad.add(name)
                if p.grad.abs().max() > 0:
                    self.learns.add(name)
        super().log(loss, lr, **more)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@EVERY_METHOD
def test_tiny_run(name, tmp_path):
    """Two epochs of two steps with everything around them; then the same command once more, and one
    with other settings."""
    folder = tmp_path / "deep" / "run"
    flags = [*short(name), "--eval-every", 1, "--out", folder]
    with pytest.MonkeyPatch.context() as patch:
        # What takes seconds and is the same for all: the probe, on all pixels too, and the curves.
        patch.setattr(common, "pixels", lambda *_: torch.nn.AdaptiveAvgPool2d(8))
        if name not in FIRST_OF_ITS_KIND:
            patch.setattr(common, "linear_probe", lambda *args, **options: 50.0)
            patch.setattr(common, "draw_curve", lambda path, run: path.write_bytes(PICTURE))
        first = call_main(name, *flags, Run=Watched, **light(name))
        assert first.code == 0, first.err
        run = Watched.latest
        left = files(folder)
        check_metrics(name, flags, left["metrics.jsonl"].decode())
        check_checkpoint(run, folder)
        check_pictures(first.out, left)
        check_gradients(run)
        assert not [file for file in left if file.endswith(".part")]  # half written

        words = ["knn20", "linear", "raw pixels", "random init", name]
        words += ["retrieval1"] if tiny(name).test.emoji is not None else []
        assert "epoch 2/2" in first.out and all(word in first.out for word in words)
        second = call_main(name, *flags, **light(name))
        assert second.code == 0 and all(word in second.out for word in words)
        assert not re.search("epoch|evaluating|continuing", second.out)
        assert files(folder) == left

        other = call_main(name, *flags, "--epochs", 3, "--seed", 7, **light(name))
        assert other.code == 1 and other.err.startswith("error: ") and other.err.count("\n") == 1
        for word in ("epochs 2, now 3", "seed 0, now 7", "--out"):
            assert word in other.err
        assert files(folder) == left


def check_metrics(name, flags, text):
    first, *rows, last = (json.loads(line) for line in text.splitlines())
    about = {"method", "command", "commit", "versions", "device", "world_size", "settings"}
    assert set(first) == about | {"evaluated_on"}
    assert first["method"] == name and first["world_size"] == 1
    assert first["command"] == " ".join([f"methods/{name}.py", *map(str, flags)])
    assert {"python", "torch", "torchvision", "numpy"} <= set(first["versions"])
    settings = first["settings"]
    assert settings["seed"] == 0 and settings["train_images"] == 24
    assert {*method(name).SETTINGS, "data", "eval_every"} - {"recipe"} <= set(settings)

    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["epoch"] for row in rows] == [0, 0, 1, 1]
    for row in rows:
        assert {"step", "epoch", "loss", "lr", "images_per_s"} <= set(row)
        assert math.isfinite(row["loss"]) and row["lr"] > 0 and row["images_per_s"] > 0
    assert len({row["loss"] for row in rows}) == 4  # it moves
    assert 0 <= rows[1]["knn20"] <= 100
    assert "knn20" not in rows[3]  # after the last epoch comes the whole evaluation

    results = ("evaluation", "random_init", "pixels")
    costs = {"parameters", "flops", "train_flops", "images_per_s"}
    costs |= {"train_seconds", "peak_memory_gb"}
    assert set(last) == {*results, *costs, "unreadable_files"}
    assert all(last[cost] > 0 for cost in costs)
    accuracies = {"knn20", "knn200", "linear"}
    if tiny(name).test.emoji is not None:
        accuracies |= {"retrieval1", "retrieval5"}
    panel = {"feature_std", "feature_std_isotropic", "rankme", "alignment", "uniformity"}
    for result in (last[part] for part in results):
        assert set(result) == accuracies | panel
        assert all(0 <= result[key] <= 100 for key in accuracies)
        assert all(math.isfinite(value) for value in result.values())
    assert last["evaluation"] != last["random_init"] and last["train_seconds"] > 0


def check_checkpoint(run, folder):
    """last.pt holds all state; backbone.pt gives the trained network back."""
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert set(saved) == {"state", "settings", "baselines", "step", "seconds", "flops"}
    assert saved["step"] == 4
    assert set(saved["state"]) == {"model", *run.state} and "optimizer" in saved["state"]
    assert list(saved["state"]["model"]) == list(run.model.state_dict())

    net = common.load_backbone(folder)
    features = net(torch.zeros(2, 3, net.size, net.size)).flatten(1)
    assert features.shape == (2, net.out_dim) and features.isfinite().all()
    weights = net.state_dict()
    for key, value in run.model.backbone.state_dict().items():
        assert torch.equal(weights[key], value)


def check_pictures(out, left):
    pictures = [name for name in left if name.endswith(".png")]
    assert {"views.png", "curve.png", "neighbours.png"} <= set(pictures)
    for name in pictures:
        assert name in out
        picture = np.asarray(Image.open(io.BytesIO(left[name])).convert("RGB"))
        assert min(picture.shape[:2]) >= 64 and picture.std() > 1, name


def check_gradients(run):
    """Every trainable parameter gets a gradient that is finite at every step and not 0 at some, and
    moves (one that no optimiser knows of would stay); others do neither."""
    parameters = dict(run.model.named_parameters())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert run.bad == set()
    assert run.learns == trained
    still = {name for name, p in parameters.items() if torch.equal(p, run.begin[name])}
    assert trained & still == set()
