"""Shared by the tests.

    train(name, *flags, world=1)   runs main() of a method in memory, in one or several processes
    call_main(name, *flags)        runs main() with a run folder, as a user would
    arguments(name, *flags)        the parsed flags of a method
    noise, tiny_data               inputs
    processes, program             gloo processes that stay alive; a script as a program

Kernels run under Triton's interpreter where there is no GPU (it is read when a kernel is decorated,
so it is set first).
"""

import contextlib
import datetime
import functools
import hashlib
import importlib
import io
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # several processes share the cores; small tensors gain nothing

import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torchvision.utils import save_image  # noqa: E402

import common  # noqa: E402
from common import Data, InMemory, Split, load_data  # noqa: E402
from kernels.clips import rendered  # noqa: E402
from kernels.collectives import rank  # noqa: E402
from kernels.views import BatchRandom  # noqa: E402

CPU = torch.device("cpu")


def source(name):
    return (ROOT / "methods" / f"{name}.py").read_text()


def kind_of(name):
    return re.search(r'^KIND = "(\w+)"', source(name), re.MULTILINE)[1]


SCRIPTS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))
# An initialisation takes no steps, and it needs values, of which the meta device has none.
METHODS = [name for name in SCRIPTS if kind_of(name) not in ("evaluation", "initialisation")]
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
FIRST_OF_ITS_KIND = {kind_of(name): name for name in reversed(METHODS)}.values()


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="also run the tests that take longer")


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: takes longer; runs with --thorough only")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("thorough") and not config.getoption("--thorough"):
            item.add_marker(pytest.mark.skip(reason="takes longer; run with --thorough"))


# -------- Inputs ----------------------------------------------------------------------------------


def noise(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers, the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


@functools.cache
def tiny_data(train=24, test=12):
    """Data of some embedded emoji, spread over the categories, each with all of its drawings."""

    def cut(split, count):
        names = split.emoji.unique()
        names = names[np.random.default_rng(0).permutation(len(names))[:count]]
        chosen = torch.isin(split.emoji, names).nonzero()[:count, 0]
        numbers = [split.labels[chosen], split.emoji[chosen], split.drawing[chosen]]
        return Split(InMemory(split.images.pixels[chosen].clone()), *numbers)

    data = load_data("emoji", "", CPU)
    bank = cut(data.train, train)
    return Data("tiny", bank, bank, cut(data.test, test))


@functools.cache
def tiny_clips(train=24, test=12):
    """Data of some clips of `movers`."""
    train, test = (Split(*rendered(s, n, CPU)) for s, n in (("train", train), ("test", test)))
    return Data("tiny", train, train, test)


def tiny(name):
    """What a method learns from in the tests."""
    return tiny_clips() if kind_of(name) == "video" else tiny_data()


def write_images(folder, count):
    """Plain PNG files without labels: their evaluation takes a moment."""
    folder.mkdir()
    for i, image in enumerate(tiny_data(count).train.images.pixels):
        save_image(image / 255, folder / f"{i:03}.png")
    return folder


# -------- Running a method ------------------------------------------------------------------------


def method(name):
    return importlib.import_module(f"methods.{name}")


def arguments(name, *flags):
    """The namespace of a method's flags, checked as main() checks them."""
    module = method(name)
    argv = [str(flag) for flag in flags]
    if hasattr(module, "get_args"):  # files that check more than parse does
        return module.get_args(argv)
    return common.parse(module.__doc__, module.SETTINGS, argv)


# Settings of a short run: two epochs of two steps, in which a queue is in use and overrun.
SHORT = {
    "size": 16,
    "batch": 12,
    "epochs": 2,
    "warmup": 1,
    "hidden": 64,
    "dim": 32,
    "outputs": 64,
    "perms": 8,
    "tile": 4,
    "seeds": 24,
    "patch": 4,
    "gap": 1,
    "jitter": 0,
    "permute": 1,
    "queue": 20,
    "queue_from": 0,
    "hard_from": 1,
}


def short(name, **changes):
    """The flags of a short run of a method on tiny_data(): SHORT with changes, as far as the method
    has such settings."""
    values = {key: value for key, value in SHORT.items() if key in method(name).SETTINGS} | changes
    flags = ["--workers", 0]
    for key, value in values.items():
        flags += [common.flag_of(key), value]
    return flags


class Shell(common.ResNet):
    """torchvision's ResNet without values. common.backbone gives resnet14 new layers: most of the
    time that it takes is spent on the values of those that it replaces."""

    def __init__(self, *args):
        with torch.device("meta"):
            super().__init__(*args)


def light_backbone(*args, make=common.backbone, **options):
    """common.backbone, or what a method makes of it, in less time, with other initial values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "ResNet", Shell)
        return make(*args, **options)


def light(name):
    """Patches for call_main and train."""
    own = getattr(method(name), "backbone", None)
    return {"backbone": functools.partial(light_backbone, make=own)} if own else {}


def call_main(name, *flags, data=None, **patches):
    """main() of a method with these flags, on the data given; patches replace names of the method
    file. Returns the exit code (0 if main returned), stdout and stderr."""
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method(name), "load_data", lambda *_: data or tiny(name))
        for attribute, value in patches.items():
            patch.setattr(method(name), attribute, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                method(name).main([str(flag) for flag in flags])
            except SystemExit as error:
                code = error.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


class Recorder(common.Run):
    """A Run that keeps everything in memory: it evaluates and writes nothing. `latest` is the last
    one; `before_step` may be replaced to look at the model before each step and after the last."""

    def resume(self):
        type(self).latest = self
        self.losses = []
        self.more = []
        self.gradients = []  # of each step: {parameter: gradient}
        self.looks = []
        self.folder.mkdir(parents=True, exist_ok=True)  # for what a method may draw
        self.look()

    def look(self):
        """For tests that follow the state: appends what `spy(model)` returns."""
        if type(self).spy:
            self.looks.append(type(self).spy(self.model))

    spy = None

    def log(self, loss, lr, **more):
        self.losses.append(loss.detach())
        self.more.append({"lr": lr, **more})
        self.gradients.append(
            {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        )
        self.look()
        self.step += 1
        self.row = {"loss": 0.0, "images_per_s": 0.0}
        self.words = {}

    def end_epoch(self, epoch, **more):
        pass

    def finish(self):
        pass


def flat(state):
    """A tree of dicts and lists -> {path: tensor or number}."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    leaves = {}
    for key, value in items:
        below = flat(value) if isinstance(value, dict | list | tuple) else {"": value}
        leaves |= {f"{key}/{path}".rstrip("/"): leaf for path, leaf in below.items()}
    return leaves


def digest(state):
    """A hash of a flat state."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        tensor = torch.is_tensor(value)
        content = value.contiguous().numpy().tobytes() if tensor else repr(value).encode()
        total.update(name.encode() + content)
    return total.hexdigest()


def assert_close_states(state, expected, **tolerance):
    """Flat states with the same keys; names, flags and None are equal, numbers close."""
    assert state.keys() == expected.keys()
    for key, value in state.items():
        if value is None or isinstance(value, str | bool):
            assert value == expected[key], key
        else:
            found, other = torch.as_tensor(value), torch.as_tensor(expected[key])
            text = functools.partial("{}: {}".format, key)
            torch.testing.assert_close(found, other, msg=text, **tolerance)


def double_precision(patch):
    """Everything in float64: what a file makes float32 by .float() becomes float64; the random
    numbers stay the same."""
    uniform = BatchRandom.uniform

    def in_double(self, *args, **options):
        return uniform(self, *args, **options).double()

    patch.setattr(BatchRandom, "uniform", in_double)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)


def train_here(name, flags, data, double, patches, spy):
    """One process of `train`."""
    data = data or tiny(name)  # before the numbers become float64
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(Recorder, "spy", spy)
        try:
            if double:
                double_precision(patch)
            flags = ["--workers", 0, *flags, "--out", folder]
            result = call_main(name, *flags, data=data, Run=Recorder, **patches)
        finally:
            torch.set_default_dtype(torch.float32)
        pictures = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert result.code == 0, result.err
    run = Recorder.latest
    state = flat({key: part.state_dict() for key, part in run.state.items()})
    index, views = run.loader.first_shown
    return SimpleNamespace(
        losses=torch.stack(run.losses),
        gradients=run.gradients if rank() == 0 else None,
        state=state if rank() == 0 else None,
        digest=digest(state),
        shown=views[0],
        index=index,
        more=run.more,
        looks=run.looks,
        args=run.args,
        pictures=pictures,
        out=result.out,
    )


@pytest.fixture
def train(request):
    """train(name, *flags, world=1, data=None, double=True, spy=None, **patches) runs main() of a
    method in `world` processes, in float64 unless double=False, on tiny_data() if no data is given.
    It evaluates nothing and writes only what the method itself draws.

    Returns a namespace: losses (steps,), the mean over the processes; gradients, a list with
    {parameter: gradient} for each step; state, flat {path: value} of model and optimiser at the
    end, equal in all processes to the last bit; shown, the first view of the first step, of all
    processes together; more: what run.log was given; looks: what spy(model) returned before the
    first step and after each, a module-level function; pictures {file name: bytes}; out: stdout."""

    def run(name, *flags, world=1, data=None, double=True, spy=None, **patches):
        job = (name, list(flags), data, double, patches, spy)
        if world == 1:
            return train_here(*job)
        results = request.getfixturevalue("processes")(world, train_here, *job)
        first = results[0]
        assert len({result.digest for result in results}) == 1, "the processes differ"
        first.losses = torch.stack([result.losses for result in results]).mean(0)
        shown = [result.shown for result in results]
        assert (shown[0][0] - shown[1][0]).abs().max() > 0.1, "each process has its own images"
        first.shown = torch.cat(shown)
        return first

    return run


# -------- Several processes, and programs ---------------------------------------------------------


def worker(pipe, paths):
    """A process of the pool: receives (rank, world, rendezvous file, function, arguments) and sends
    what the function returned."""
    import torch
    import torch.distributed as dist

    sys.path[:0] = paths
    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        rank, world, file, function, args = job
        outcome = "not connected"
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{file}",
                rank=rank,
                world_size=world,
                # for a process that waits in vain for a failed one
                timeout=datetime.timedelta(seconds=120),
            )
            outcome = "failed"
            pipe.send(("passed", function(*args)))
        except BaseException:
            pipe.send((outcome, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def answer(pipe):
    """(outcome, result) of a process of the pool. Gloo gives up after 120 s, so one that is silent
    for longer hangs. It is not tried again: it may be the code under test."""
    try:
        return pipe.recv() if pipe.poll(300) else ("failed", "no answer within 300 s")
    except EOFError:
        return "failed", "the process has died"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test draws with matplotlib, which are not saved."""
    from matplotlib.figure import Figure  # here, because few tests draw

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: figures.append(figure))
    return figures


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """processes(world, function, *args): calls a module-level function in `world` gloo processes
    and returns their results in the order of the ranks. The processes are started once and kept,
    because importing torch is slow."""
    context = torch.multiprocessing.get_context("spawn")
    folder = tmp_path_factory.mktemp("gloo")
    pool = []
    calls = []

    def attempt(world, function, *args):
        while len(pool) < world:
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, sys.path[:2]), daemon=True)
            process.start()
            theirs.close()  # so that the death of the process is the end of the pipe
            pool.append((process, ours))
        calls.append(folder / f"rendezvous{len(calls)}")
        for place, (_, pipe) in enumerate(pool[:world]):
            pipe.send((place, world, str(calls[-1]), function, args))
        answers = [answer(pipe) for _, pipe in pool[:world]]
        if any(outcome != "passed" for outcome, _ in answers):
            # their processes may be unable to form another group
            for process, _ in pool:
                process.kill()
            pool.clear()
        return answers

    def call(world, function, *args):
        answers = attempt(world, function, *args)
        if any(outcome == "not connected" for outcome, _ in answers):
            # gloo's sockets, not the code under test: once more
            answers = attempt(world, function, *args)
        wrong = [
            f"process {place} of {world} {outcome}:\n{answer}"
            for place, (outcome, answer) in enumerate(answers)
            if outcome != "passed"
        ]
        assert not wrong, "\n".join(wrong)
        return [answer for _, answer in answers]

    yield call
    for process, pipe in pool:
        pipe.send(None)
        process.join(10)


@pytest.fixture
def program(tmp_path):
    """program("methods/simclr.py", "--epochs", 1): runs a script of the project (or, with
    processes=2, torchrun of it) from an empty folder that is not the project's. Returns the
    finished process; its text output is in stdout and stderr."""

    def run(script, *flags, processes=0, check=True, cwd=tmp_path, timeout=300, **environment):
        launcher = [sys.executable]
        if processes:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc_per_node", str(processes)]
        found = subprocess.run(
            [*launcher, str(ROOT / script), *map(str, flags)],
            cwd=cwd,
            text=True,
            capture_output=True,
            env={**os.environ, **environment},
            timeout=timeout,
        )
        assert not check or found.returncode == 0, found.stdout + found.stderr
        return found

    return run
