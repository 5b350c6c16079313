"""Killed and resumed: a run that is killed at any moment and started again ends with the weights of
one that was not, bit for bit; for every method, also with another number of processes; and what is
refused, and what is kept, when things go wrong."""

import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    CPU,
    EVERY_METHOD,
    FIRST_OF_ITS_KIND,
    METHODS,
    ROOT,
    assert_close_states,
    call_main,
    double_precision,
    flat,
    light,
    method,
    short,
    tiny,
    tiny_data,
    write_images,
)

import common
from common import InMemory, Split, read_lines, replace_file

# 24 images: two steps per epoch
FLAGS = ["--batch", 12, "--epochs", 3, "--size", 16, "--eval-every", 1, "--workers", 0]
RESULTS = {"knn20": 50.0, "knn200": 40.0, "linear": 60.0}
SAME = {"rtol": 1e-9, "atol": 1e-9}  # see test_distributed.py


def checkpoint(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def rows(folder):
    return [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def marks(folder):
    """What distinguishes the lines of metrics.jsonl: the first has settings, the last the
    evaluation."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line).keys() & {"settings", "evaluation"} for line in lines]


def assert_same_run(found, expected, steps):
    """Two run folders: all state, and the loss and rate of each step, once and in order, are the
    same bit for bit."""
    ours = checkpoint(found)
    theirs = checkpoint(expected)
    assert ours["settings"] == theirs["settings"] and ours["step"] == theirs["step"] == steps
    ours = flat(ours["state"])
    theirs = flat(theirs["state"])
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        same = torch.equal(value, theirs[key]) if torch.is_tensor(value) else value == theirs[key]
        assert same, key

    columns = ("step", "epoch", "loss", "lr", "knn20")
    kept = [[row.get(column) for column in columns] for row in rows(found)]
    assert kept == [[row.get(column) for column in columns] for row in rows(expected)]
    assert [row[0] for row in kept] == list(range(steps))
    assert marks(found) == [{"settings"}, *[set()] * steps, {"evaluation"}]


# -------- SIGKILL ---------------------------------------------------------------------------------

# Where a process kills itself: the function of common.py (or torch.save), before or after its n-th
# call.
KILLS = {
    "before the first checkpoint": ("Run.save", "before", 1),
    "while the baselines are measured": ("knn", "before", 3),
    "in an epoch, its losses not yet written": ("Run.log", "after", 1),
    "between the losses and the checkpoint of an epoch": ("Run.save", "before", 1),
    "while the checkpoint is being written": ("torch.save", "half", 1),
    "after the checkpoint": ("Run.save", "after", 1),
    "while kNN is measured after an epoch": ("knn", "before", 1),
    "while the run is evaluated at its end": ("linear_probe", "before", 1),
    "while the backbone is being written": ("torch.save", "half", 1),
    "after the evaluation, before the last picture": ("draw_curve", "before", 1),
}


def kill_at(patch, where, when, n):
    owner, _, name = where.rpartition(".")
    owner = {"Run": common.Run, "torch": torch, "": common}[owner]
    real = getattr(owner, name)
    calls = []

    def kill(*args, **options):
        calls.append(None)
        if len(calls) == n and when == "half":
            args[1].write(b"half a checkpoint")
            args[1].flush()
        if len(calls) == n and when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **options)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    patch.setattr(owner, name, kill)


def life(name, flags, data, kill, save_every):
    """A process that runs main() of a method, and kills itself on the way if told so."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # A probe of all pixels takes seconds.
        patch.setattr(common, "pixels", lambda size, bank: torch.nn.AdaptiveAvgPool2d(8))
        patch.setattr(common, "SAVE_EVERY", save_every)
        if kill:
            kill_at(patch, *kill)
        found = call_main(name, *flags, data=data, **light(name))
    sys.stderr.write(found.err)
    sys.exit(found.code)


@pytest.fixture(scope="module")
def live():
    """live(name, flags, kill): a life in a process of its own, forked by a server that has imported
    torch; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "matplotlib.figure", "pytest"])

    def run(name, flags, kill=None, data=None, save_every=180):
        process = context.Process(target=life, args=(name, flags, data, kill, save_every))
        process.start()
        process.join(300)
        return process.exitcode

    return run


def test_killed_at_any_point_a_run_ends_as_if_nothing_had_happened(live, tmp_path):
    """One run is killed ten times, each time at another point, and started again; then half of its
    last line is lost, as by a kill in the middle of writing it. The other is left alone."""
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    assert live("simclr", [*FLAGS, "--out", whole]) == 0
    for point, kill in KILLS.items():
        assert live("simclr", [*FLAGS, "--out", killed], kill) == -signal.SIGKILL, point
        if (killed / "last.pt").exists():
            assert checkpoint(killed)["step"] in (0, 2, 4, 6), point  # loads: never half a file
        else:
            assert point == "before the first checkpoint"
    assert_same_run(killed, whole, 6)
    text = (killed / "metrics.jsonl").read_text()
    (killed / "metrics.jsonl").write_text(text[:-40])
    assert live("simclr", [*FLAGS, "--out", killed]) == 0
    assert_same_run(killed, whole, 6)

    last = [read_lines(folder / "metrics.jsonl")[-1] for folder in (killed, whole)]
    times = [line.pop("train_seconds") for line in last]
    assert all(line.pop("peak_memory_gb") > 0 for line in last)
    assert all(line.pop("images_per_s") > 0 for line in last)
    assert last[0] == last[1] and min(times) > 0
    for name in ("views.png", "neighbours.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    nets = [common.load_backbone(folder).state_dict() for folder in (killed, whole)]
    assert all(torch.equal(value, nets[1][key]) for key, value in nets[0].items())
    assert (killed / "curve.png").exists()


def test_checkpoints_inside_an_epoch(live, tmp_path):
    """Saved every few minutes, in this test at each tenth step: killed in the 16th of the 24 steps
    of an epoch, the run goes on from the 10th, in the middle of the order of the images."""
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    flags = ["--batch", 2, "--epochs", 1, "--warmup", 1, "--size", 16, "--workers", 0, "--out"]
    data = tiny_data(48)
    assert live("simclr", [*flags, whole], data=data) == 0
    kill = ("Run.log", "after", 16)
    assert live("simclr", [*flags, killed], kill, data, save_every=0) == -signal.SIGKILL
    assert checkpoint(killed)["step"] == 10 and len(rows(killed)) == 10
    assert live("simclr", [*flags, killed], data=data) == 0
    assert_same_run(killed, whole, 24)


def test_kill_of_a_command_as_a_user_types_it(tmp_path):
    """From outside, with processes that decode the images of a folder: killed after the first
    epoch, then started again."""
    images = write_images(tmp_path / "images", 48)
    flags = ["--data", images, "--batch", 12, "--epochs", 3, "--size", 16, "--workers", 1, "--out"]

    def command(folder):
        return [sys.executable, ROOT / "methods" / "simclr.py", *map(str, flags), folder]

    process = subprocess.Popen(
        command(tmp_path / "killed"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    for line in process.stdout:
        if line.startswith("epoch 1/3"):
            process.kill()
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run(
        command(tmp_path / "killed"), capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert again.returncode == 0 and "continuing after step" in again.stdout, again.stderr
    assert again.stderr == ""  # no worker of an earlier loader complains
    data = common.load_data(str(images), "", CPU)
    found = call_main("simclr", *flags, tmp_path / "whole", data=data)
    assert found.code == 0, found.err
    assert_same_run(tmp_path / "killed", tmp_path / "whole", 12)


# -------- Every method ----------------------------------------------------------------------------


class Stop(Exception):
    pass


def quick(patch):
    """Evaluation and pictures replaced by nothing: only the training counts."""
    patch.setattr(common, "evaluate", lambda *args, **options: dict(RESULTS))
    for name in ("draw_views", "draw_curve", "draw_neighbours"):
        patch.setattr(common, name, lambda *args: None)


def stopping(after):
    """A Run that saves after this many steps, as it does every few minutes, and then stops; never
    if `after` is None."""

    class Stopping(common.Run):
        def log(self, loss, lr, **more):
            super().log(loss, lr, **more)
            if self.step == after:
                self.flush()
                self.save()
                raise Stop

    return Stopping


def run_until(name, flags, after, double=False):
    tiny(name)  # made before the numbers become float64
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        try:
            if double:
                double_precision(patch)
            found = call_main(name, *flags, Run=stopping(after), **light(name))
            assert found.code == 0, found.err
        except Stop:
            pass
        finally:
            torch.set_default_dtype(torch.float32)


def assert_resumes(name, after, folder, *more):
    """A run that stops after so many steps and is started again. The process goes on with other
    random states."""
    flags = [*short(name), *more, "--out"]
    run_until(name, [*flags, folder / "whole"], None)
    for stop in (after, None):
        run_until(name, [*flags, folder / "parts"], stop)
        torch.rand(7)
    assert_same_run(folder / "parts", folder / "whole", 4)


@EVERY_METHOD
def test_resumed_in_the_middle_of_an_epoch_every_method_ends_the_same(name, tmp_path):
    """Model (teachers, queues, centres), optimiser and losses, bit for bit."""
    assert_resumes(name, 3, tmp_path)


@pytest.mark.parametrize("name", ["instance_discrimination", "pirl"])
def test_the_constant_of_nce_comes_from_the_checkpoint(name, tmp_path):
    """Z is estimated in the first step only, after which this run stops."""
    assert_resumes(name, 1, tmp_path, "--loss", "nce", "--negatives", 8)


SOME_THOROUGH = [
    name if name in FIRST_OF_ITS_KIND else pytest.param(name, marks=pytest.mark.thorough)
    for name in METHODS
]


@pytest.mark.parametrize("name", SOME_THOROUGH)
def test_resumed_with_another_number_of_processes(processes, name, tmp_path):
    """Three steps by one process, one by two. In float64, to the rounding of other orders of
    summation. That a resumed run is the same, and that the state does not depend on the number of
    processes, is tested for every method; both together for one of each kind, unless thorough tests
    are asked for."""
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    flags = [*short(name), "--out"]
    processes(1, run_until, name, [*flags, whole], None, True)
    processes(1, run_until, name, [*flags, parts], 3, True)
    processes(2, run_until, name, [*flags, parts], None, True)
    ours, theirs = [flat(checkpoint(folder)["state"]) for folder in (parts, whole)]
    assert_close_states(ours, theirs, **SAME)
    assert len(rows(parts)) == 4
    losses = [[row["loss"] for row in rows(folder)] for folder in (parts, whole)]
    torch.testing.assert_close(*losses, **SAME)


# -------- Torchrun restarts a run -----------------------------------------------------------------

DYING = """
import os, runpy, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import common
log, script, marker = common.Run.log, sys.argv[1], Path(sys.argv[2])
def dying(self, loss, lr, **more):
    log(self, loss, lr, **more)
    if self.step == 7 and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
common.Run.log = dying
sys.argv[:] = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""


def two_processes(flags, images):
    found = call_main("simclr", *flags, data=common.load_data(images, "", CPU))
    return found.code


@pytest.mark.thorough
def test_torchrun_restarts_after_a_worker_was_killed(processes, tmp_path):
    """Process 1 of 2 dies by SIGKILL in the second epoch, torchrun starts both again, and the run
    ends, bit for bit, as one of two processes without the accident."""
    images = write_images(tmp_path / "images", 48)
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(ROOT)))
    flags = ["--data", images, "--batch", 12, "--epochs", 3, "--size", 16, "--workers", 0, "--out"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", 2, "--max-restarts", 1]
    command += [script, ROOT / "methods" / "simclr.py", tmp_path / "died", *flags]
    command += [tmp_path / "restarted"]
    found = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert (tmp_path / "died").exists() and "continuing after step 4 of 12" in found.stdout
    assert processes(2, two_processes, [*flags, tmp_path / "whole"], str(images)) == [0, 0]
    assert_same_run(tmp_path / "restarted", tmp_path / "whole", 12)


# -------- What goes wrong -------------------------------------------------------------------------


def test_replace_file_is_all_or_nothing(tmp_path, capsys):
    """A write that fails half-way leaves the old file, nothing beside it, and one sentence; who has
    it open keeps reading the old one."""
    path = tmp_path / "last.pt"
    replace_file(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"new and br")
        raise OSError("no space left on device")

    with pytest.raises(SystemExit) as stop:
        replace_file(path, half)
    text = f"error: {path} cannot be written (no space left on device); what was saved before"
    assert stop.value.code == 1 and capsys.readouterr().err == f"{text} is kept\n"
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    with open(path, "rb") as reader:
        replace_file(path, lambda file: file.write(b"new"))
        assert reader.read() == b"old" and path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_read_lines_drops_a_last_line_that_was_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [{"a": 1}, {"b": {"c": 2}}]
    assert read_lines(path) == []
    text = "".join(json.dumps(line) + "\n" for line in whole)
    for cut in range(len(text) + 1):  # killed after any character
        path.write_text(text[:cut])
        complete = [line for line in text[:cut].split("\n") if line.count("{") == line.count("}")]
        assert read_lines(path) == [json.loads(line) for line in complete if line]


@pytest.fixture
def quick_run(monkeypatch, tmp_path):
    """quick_run(*flags, Run=...): a run of RotNet, of two steps per epoch, in one folder."""
    quick(monkeypatch)
    fixed = [*short("rotnet"), "--out", tmp_path / "run"]
    return lambda *flags, **patches: call_main(
        "rotnet", *fixed, *flags, **{**light("rotnet"), **patches}
    )


def test_loss_that_is_not_finite_stops_the_run(quick_run, tmp_path):
    """In the second epoch: one sentence with step, learning rate and advice, exit code 1, and the
    state after the first epoch stays. The step is the first bad one, though losses are fetched
    together."""

    class Diverging(common.Run):
        def log(self, loss, lr, **more):
            Diverging.latest = self
            super().log(loss if self.step < 3 else loss * math.nan, lr, **more)

    found = quick_run(Run=Diverging)
    assert found.code == 1 and found.err.count("\n") == 1
    rate = method("rotnet").learning_rate(3, Diverging.latest.args, 2)
    words = ("the loss is nan at step 3", f"learning rate {rate:.3g}", "lower --lr")
    assert all(part in found.err for part in (*words, str(tmp_path / "run" / "last.pt")))
    assert checkpoint(tmp_path / "run")["step"] == 2 and len(rows(tmp_path / "run")) == 2
    again = quick_run()  # the same settings go on from this state
    assert again.code == 0 and "continuing after step 2 of 4" in again.out
    assert len(rows(tmp_path / "run")) == 4


def test_divergence_of_a_real_run(quick_run, tmp_path):
    """A rate of 1e30: after the first step the weights are huge, then the loss is not a number. The
    initial state is kept."""
    found = quick_run("--lr", 1e30, "--warmup", 0)
    assert found.code == 1 and "lower --lr" in found.err and found.err.count("\n") == 1
    saved = checkpoint(tmp_path / "run")
    assert saved["step"] == 0
    assert all(value.isfinite().all() for value in saved["state"]["model"].values())


def test_weights_that_are_not_finite_are_never_saved(quick_run, tmp_path):
    """The loss of the last step of an epoch is computed before its update, so it does not show that
    the update was bad."""

    class Broken(common.Run):
        def log(self, loss, lr, **more):
            super().log(loss, lr, **more)
            if self.step == 4:
                next(self.model.parameters()).data[0] = math.inf

    found = quick_run(Run=Broken)
    assert found.code == 1 and "lower --lr" in found.err
    assert "a weight is no longer finite after step 3" in found.err
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_features_that_are_not_finite_cost_no_training(quick_run, tmp_path, monkeypatch):
    """The epoch before them is kept, so the same command goes on behind it."""

    stub = common.evaluate

    def refuse(*args):
        only_knn = args[-1]
        if only_knn:
            common.fail("some features are infinite or not a number")
        return stub(*args)

    with monkeypatch.context() as patch:
        patch.setattr(common, "evaluate", refuse)
        found = quick_run("--eval-every", 1)
    assert found.code == 1 and found.err.count("\n") == 1
    assert checkpoint(tmp_path / "run")["step"] == 2
    steps = [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")[1:]]
    assert steps == [0, 1]
    assert quick_run("--eval-every", 1).code == 0


class OneBad(common.Run):
    """The loss of process 1 is not a number in step 3."""

    def log(self, loss, lr, **more):
        bad = common.rank() == 1 and self.step == 3
        super().log(loss * math.nan if bad else loss, lr, **more)


def one_bad_process(out):
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        for variable in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(variable, "2")
        patch.setenv("RANK", str(common.rank()))  # as torchrun sets it
        found = call_main("rotnet", *short("rotnet"), "--out", out, Run=OneBad, **light("rotnet"))
    return found.code, found.err


def test_loss_of_one_process_stops_all(processes, tmp_path):
    """With one message, since the mean over processes is what is checked."""
    (code, text), (other, silent) = processes(2, one_bad_process, tmp_path / "run")
    assert code == other == 1 and "at step 3" in text and not silent
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_run_of_other_settings_is_refused(quick_run, tmp_path):
    assert quick_run().code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    changes = [("--lr", 0.3, "now 0.3"), ("--seed", 1, "seed 0, now 1")]
    for flag, value, words in [*changes, ("--epochs", 3, "epochs 2, now 3")]:
        found = quick_run(flag, value)
        assert found.code == 1 and found.err.count("\n") == 1
        assert words in found.err and "another folder with --out" in found.err
    found = quick_run(data=tiny_data(30))  # other images under the same name
    assert found.code == 1 and "train_images 24, now 30" in found.err
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert after == before
    for flags in (["--workers", 2], ["--root", tmp_path]):  # what does not change the result
        assert quick_run(*flags).code == 0


def test_settings_are_refused_before_the_first_checkpoint_too(quick_run, tmp_path):
    """metrics.jsonl is written before last.pt: a run killed while its baselines are measured is
    recognised by it."""
    assert quick_run().code == 0
    (tmp_path / "run" / "last.pt").unlink()
    found = quick_run("--seed", 1)
    assert found.code == 1 and "seed 0, now 1" in found.err


@pytest.mark.parametrize("spoil", ["empty", "cut", "text", "other"])
def test_damaged_checkpoint_is_named_and_kept(quick_run, tmp_path, spoil):
    """Checkpoints are written whole or not at all; a disk may still lose one."""
    assert quick_run().code == 0
    last = tmp_path / "run" / "last.pt"
    contents = {"empty": b"", "cut": last.read_bytes()[:1000], "text": b"no weights"}
    torch.save([1], tmp_path / "other.pt")
    contents["other"] = (tmp_path / "other.pt").read_bytes()
    last.write_bytes(contents[spoil])
    found = quick_run()
    assert found.code == 1 and f"{last} is damaged (" in found.err
    assert found.err.count("\n") == 1
    assert last.read_bytes() == contents[spoil]


def test_folder_of_another_method_is_refused(quick_run, tmp_path):
    assert quick_run().code == 0
    found = call_main("simclr", *short("simclr"), "--out", tmp_path / "run", **light("simclr"))
    assert found.code == 1 and "another folder with --out" in found.err


def test_time_of_evaluation_is_not_training_time(monkeypatch, quick_run, tmp_path):
    """Evaluations of two seconds each by a clock that only they and the steps move."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(*args, **options):
        now[0] += 2
        return dict(RESULTS)

    class Ticking(common.Run):
        def log(self, loss, lr, **more):
            now[0] += 0.5
            super().log(loss, lr, **more)

    monkeypatch.setattr(common, "evaluate", slow)
    assert quick_run("--eval-every", 1, Run=Ticking).code == 0
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["train_seconds"] == 4 * 0.5
    assert [row["images_per_s"] for row in rows(tmp_path / "run")] == [24.0] * 4


@pytest.mark.parametrize("name", [name for name in METHODS if hasattr(method(name), "held_out")])
def test_time_of_the_held_out_question_is_not_training_time(name, tmp_path, monkeypatch):
    """It takes a thousand seconds by the clock, and everything else real time."""
    late = [0.0]
    real = time.perf_counter
    held_out = method(name).held_out

    def slow(*args):
        late[0] += 1000
        return held_out(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: real() + late[0])
    patches = {"held_out": slow, **light(name)}
    assert call_main(name, *short(name, epochs=1), "--out", tmp_path / "run", **patches).code == 0
    assert late[0] >= 1000
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["train_seconds"] < 1000


def test_the_same_folder_written_differently_continues(quick_run, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert quick_run("--data", "base").code == 0
    for other in ("./base", "base/", tmp_path / "base"):
        assert quick_run("--data", other).code == 0, other
    found = quick_run("--data", "case")
    assert found.code == 1 and f"data {tmp_path / 'base'}, now case" in found.err


def test_a_checkpoint_that_cannot_be_opened_may_be_sound(quick_run, tmp_path, monkeypatch):
    """Of another user, or on a disk that is away for a moment: never advised to be removed."""
    assert quick_run().code == 0

    def load(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", load)
    found = quick_run()
    last = tmp_path / "run" / "last.pt"
    assert found.code == 1 and "remove" not in found.err and found.err.count("\n") == 1
    assert found.err.startswith(f"error: {last} cannot be opened (Permission denied)")
    assert last.exists()


def test_torn_lines_do_not_stop_a_run_from_continuing(quick_run, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    with pytest.raises(Stop):
        quick_run(Run=stopping(3))
    lines = metrics.read_bytes().splitlines(True)
    metrics.write_bytes(b"".join([*lines[:2], lines[2][:9] + b"\n", b"\0\0\xff\n", *lines[2:]]))
    assert quick_run().code == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]
    assert marks(tmp_path / "run") == [{"settings"}, *[set()] * 4, {"evaluation"}]


def test_baselines_of_a_large_bank_come_after_the_training(quick_run, tmp_path, monkeypatch):
    """So the first step need not wait for them. The untrained weights are kept in last.pt for them,
    also over a restart."""
    tiny = tiny_data()
    many = Split(InMemory(torch.zeros(1, 3, 8, 8, dtype=torch.uint8).expand(10_001, -1, -1, -1)))
    many = many._replace(labels=torch.arange(10_001) % 9)
    data = tiny._replace(bank=many)
    seen = []

    def evaluate(network, *args, **options):
        weights = network.state_dict().get("conv1.weight")
        seen.append("pixels" if weights is None else weights.clone())
        return dict(RESULTS)

    monkeypatch.setattr(common, "evaluate", evaluate)
    with pytest.raises(Stop):
        quick_run("--eval-every", 2, data=data, Run=stopping(3))
    assert not seen
    assert quick_run("--eval-every", 2, data=data).code == 0
    first, untrained, trained = seen  # no kNN after the last epoch
    assert first == "pixels" and (untrained - trained).abs().max() > 0
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["pixels"] == last["random_init"] == last["evaluation"] == RESULTS
    first = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["evaluated_on"] == {"bank": 10_001, "test": 12}
    seen.clear()
    assert quick_run("--out", tmp_path / "early").code == 0  # few images: before the training
    assert seen[0] == "pixels" and torch.equal(seen[1], untrained)
