"""Killed and resumed: a run that is killed at any moment and started again ends with the weights of one that was not, bit for
bit; for every method, also with another number of processes; and what is refused, and what is kept, when things go wrong."""

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
from test_distributed import SAME, assert_close_states, double_precision, flat, write_images
from test_methods import EVERY_METHOD, METHODS, ROOT, call_main, method, tiny_data

import common
from common import read_lines, replace_file

FLAGS = ["--batch", 12, "--epochs", 3, "--eval-every", 1, "--workers", 0]  # 48 images: four steps an epoch
RESULTS = {"knn20": 50.0, "knn200": 40.0, "linear": 60.0}


def checkpoint(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def rows(folder):
    return [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def assert_same_run(found, expected, steps):
    """Two run folders: all state, and the loss and rate of each step, once and in order, are the same bit for bit."""
    here, there = checkpoint(found), checkpoint(expected)
    assert here["settings"] == there["settings"] and here["step"] == there["step"] == steps
    here, there = flat(here["state"]), flat(there["state"])
    assert here.keys() == there.keys()
    for key, value in here.items():
        assert torch.equal(value, there[key]) if torch.is_tensor(value) else value == there[key], key
    what, other = ([[row.get(key) for key in ("step", "epoch", "loss", "lr", "knn20")] for row in rows(folder)]
                   for folder in (found, expected))
    assert what == other and [row[0] for row in what] == list(range(steps))
    assert [json.loads(line).keys() & {"settings", "evaluation"} for line in lines_of(found)] == [
        {"settings"}, *[set()] * steps, {"evaluation"}]


def lines_of(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


# -------- SIGKILL -------------------------------------------------------------------------------------------------------------

KILLS = {  # where a process kills itself: the function of common.py (or torch.save), before or after its n-th call
    "while the baselines are measured": ("knn", "before", 3),
    "in an epoch, its losses not yet written": ("Run.log", "after", 3),
    "between the losses and the checkpoint of an epoch": ("Run.save", "before", 1),
    "while the checkpoint is being written": ("torch.save", "half", 1),
    "after the checkpoint": ("Run.save", "after", 1),
    "while kNN is measured after an epoch": ("knn", "before", 1),
    "while the run is evaluated at its end": ("linear_probe", "before", 1),
    "while the backbone is being written": ("torch.save", "half", 1),
    "after the evaluation, before the last picture": ("draw_curve", "before", 1),
}


def kill_at(patch, where, when, n):
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

    owner = {"Run": common.Run, "torch": torch}.get(where.split(".")[0], common)
    calls, real = [], getattr(owner, where.split(".")[-1])
    patch.setattr(owner, where.split(".")[-1], kill)


def life(name, flags, data, kill, save_every):
    """A process that runs main() of a method, and kills itself on the way if told so."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "pixels", lambda size: torch.nn.AdaptiveAvgPool2d(8))  # a probe of 3072 pixels takes seconds
        patch.setattr(common, "SAVE_EVERY", save_every)
        if kill:
            kill_at(patch, *kill)
        found = call_main(name, *flags, data=data)
    sys.stderr.write(found.err)
    sys.exit(found.code)


@pytest.fixture(scope="module")
def live():
    """live(name, flags, kill): a life in a process of its own, forked by a server that has imported torch; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "matplotlib.figure", "pytest"])

    def run(name, flags, kill=None, data=None, save_every=180):
        process = context.Process(target=life, args=(name, flags, data, kill, save_every))
        process.start()
        process.join(300)
        return process.exitcode
    return run


def test_killed_at_any_point_a_run_ends_as_if_nothing_had_happened(live, tmp_path):
    """One run is killed nine times, each time at another point, and started again; then half of its last line is lost, as by a
    kill in the middle of writing it. The other is left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert live("simclr", [*FLAGS, "--out", whole]) == 0
    for point, kill in KILLS.items():
        assert live("simclr", [*FLAGS, "--out", killed], kill) == -signal.SIGKILL, point
        if (killed / "last.pt").exists():
            assert checkpoint(killed)["step"] in (0, 4, 8, 12), point  # loads: never half a file
        else:
            assert point == "while the baselines are measured"
    assert_same_run(killed, whole, 12)
    text = (killed / "metrics.jsonl").read_text()
    (killed / "metrics.jsonl").write_text(text[:-40])
    assert live("simclr", [*FLAGS, "--out", killed]) == 0
    assert_same_run(killed, whole, 12)
    a, b = (read_lines(folder / "metrics.jsonl")[-1] for folder in (killed, whole))
    assert {k: v for k, v in a.items() if k != "train_seconds"} == {k: v for k, v in b.items() if k != "train_seconds"}
    for name in ("views.png", "neighbours.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    backbones = [torch.load(folder / "backbone.pt", weights_only=True) for folder in (killed, whole)]
    assert all(torch.equal(value, backbones[1][key]) for key, value in backbones[0].items())
    assert (killed / "curve.png").exists()


def test_checkpoints_inside_an_epoch(live, tmp_path):
    """Saved every few minutes, here at each tenth step: killed in the 16th of the 24 steps of an epoch, the run goes on from
    the 10th, in the middle of the order of the images."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--batch", 2, "--epochs", 1, "--workers", 0, "--out"]
    assert live("simclr", [*flags, whole]) == 0
    assert live("simclr", [*flags, killed], ("Run.log", "after", 16), save_every=0) == -signal.SIGKILL
    assert checkpoint(killed)["step"] == 10 and len(rows(killed)) == 10
    assert live("simclr", [*flags, killed]) == 0
    assert_same_run(killed, whole, 24)


def test_kill_of_a_command_as_a_user_types_it(tmp_path):
    """From outside, with processes that decode the images of a folder: killed after the first epoch, then started again."""
    images, out = write_images(tmp_path / "images", 48), [tmp_path / "killed", tmp_path / "whole"]

    def command(folder):
        flags = ["--data", images, "--batch", 12, "--epochs", 3, "--workers", 1, "--out", folder]
        return [sys.executable, str(ROOT / "methods" / "simclr.py"), *map(str, flags)]

    process = subprocess.Popen(command(out[0]), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 1/3"):
            process.kill()
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run(command(out[0]), capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert again.returncode == 0 and "continuing after step" in again.stdout, again.stdout + again.stderr
    assert again.stderr == ""  # no worker of an earlier loader complains
    found = call_main("simclr", *command(out[1])[2:], data=common.load_data(str(images), "", torch.device("cpu")))
    assert found.code == 0, found.err
    assert_same_run(*out, 12)


# -------- Every method --------------------------------------------------------------------------------------------------------

class Stop(Exception):
    pass


def quick(patch):
    """Evaluation and pictures replaced by nothing: here only the training counts."""
    patch.setattr(common, "evaluate", lambda *args, **options: dict(RESULTS))
    for name in ("draw_views", "draw_curve", "draw_neighbours"):
        patch.setattr(common, name, lambda *args: None)


def stopping(after):
    """A Run that saves after this many steps, as it does every few minutes, and then stops; never if `after` is None."""
    class Stopping(common.Run):
        def log(self, loss, lr):
            super().log(loss, lr)
            if self.step == after:
                self.flush()
                self.save()
                raise Stop
    return Stopping


def run_until(name, flags, after, data, double=False):
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        try:
            if double:
                double_precision(patch)
            found = call_main(name, *flags, data=data, Run=stopping(after))
            assert found.code == 0, found.err
        except Stop:
            pass
        finally:
            torch.set_default_dtype(torch.float32)


QUEUES = {"moco": ("--queue", 20, "--group", 4), "swav": ("--queue", 20, 0)}  # in use, overrun, and moco's keys shuffled


@EVERY_METHOD
def test_resumed_in_the_middle_of_an_epoch_every_method_ends_the_same(name, tmp_path):
    """Model (teachers, queues, centres), optimiser and losses, bit for bit. The process goes on with other random states."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--batch", 12, "--epochs", 2, "--workers", 0, *QUEUES.get(name, ()), "--out"]
    run_until(name, [*flags, whole], None, tiny_data())
    for after in (5, None):
        run_until(name, [*flags, parts], after, tiny_data())
        torch.rand(7)
    assert_same_run(parts, whole, 8)


@pytest.mark.parametrize("name", [m if m in ("simclr", "moco") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_resumed_with_another_number_of_processes(processes, name, tmp_path):
    """Three steps by one process, one by two. In float64, to the rounding of other orders of summation: see SAME. That a
    resumed run is the same, and that the state does not depend on the number of processes, is tested for every method; both
    together only for two, unless slow tests are asked for."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--batch", 6, "--epochs", 2, "--workers", 0, "--out"]
    processes(1, run_until, name, [*flags, whole], None, tiny_data(12), True)
    processes(1, run_until, name, [*flags, parts], 3, tiny_data(12), True)
    processes(2, run_until, name, [*flags, parts], None, tiny_data(12), True)
    here, there = (flat(checkpoint(folder)["state"]) for folder in (parts, whole))
    assert_close_states(here, there)
    assert len(rows(parts)) == 4
    torch.testing.assert_close([row["loss"] for row in rows(parts)], [row["loss"] for row in rows(whole)], **SAME)


# -------- Torchrun restarts a run ---------------------------------------------------------------------------------------------

DYING = """
import os, runpy, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import common
log, script, marker = common.Run.log, sys.argv[1], Path(sys.argv[2])
def dying(self, loss, lr):
    log(self, loss, lr)
    if self.step == 7 and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
common.Run.log = dying
sys.argv[:] = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""


def two_processes(flags, images):
    found = call_main("simclr", *flags, data=common.load_data(images, "", torch.device("cpu")))
    return found.code


@pytest.mark.slow
def test_torchrun_restarts_after_a_worker_was_killed(processes, tmp_path):
    """Process 1 of 2 dies by SIGKILL in the second epoch, torchrun starts both again, and the run ends, bit for bit, as one of
    two processes without the accident."""
    images, script = write_images(tmp_path / "images", 48), tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(ROOT)))
    flags = ["--data", images, "--batch", 12, "--epochs", 3, "--workers", 0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--max-restarts", 1,
               script, ROOT / "methods" / "simclr.py", tmp_path / "died", *flags, "--out", tmp_path / "restarted"]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (tmp_path / "died").exists() and "continuing after step 4 of 12" in found.stdout
    assert processes(2, two_processes, [*flags, "--out", tmp_path / "whole"], str(images)) == [0, 0]
    assert_same_run(tmp_path / "restarted", tmp_path / "whole", 12)


# -------- What goes wrong -----------------------------------------------------------------------------------------------------

def test_replace_file_is_all_or_nothing(tmp_path):
    """A write that fails half-way leaves the old file; a reader that has it open keeps reading the old one."""
    path = tmp_path / "last.pt"
    replace_file(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"new and br")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        replace_file(path, half)
    assert path.read_bytes() == b"old"
    with open(path, "rb") as reader:
        replace_file(path, lambda file: file.write(b"new"))
        assert reader.read() == b"old" and path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_read_lines_drops_a_last_line_that_was_cut_short(tmp_path):
    path, whole = tmp_path / "metrics.jsonl", [{"a": 1}, {"b": {"c": 2}}]
    assert read_lines(path) == []
    text = "".join(json.dumps(line) + "\n" for line in whole)
    for cut in range(len(text) + 1):  # killed after any character; a line counts when its end is there
        path.write_text(text[:cut])
        assert read_lines(path) == whole[:text[:cut].count("\n")]


@pytest.fixture
def short(monkeypatch, tmp_path):
    """short(*flags, Run=...): a quick run of RotNet, of four steps an epoch, in one folder."""
    quick(monkeypatch)
    fixed = ["--batch", 12, "--epochs", 2, "--out", tmp_path / "run"]
    return lambda *flags, **patches: call_main("rotnet", *fixed, *flags, **patches)


def test_loss_that_is_not_finite_stops_the_run(short, tmp_path):
    """In the second epoch: one sentence with step, learning rate and advice, exit code 1, and the state
    after the first epoch stays. The step is the first bad one, though losses are fetched together."""
    class Diverging(common.Run):
        def log(self, loss, lr):
            Diverging.latest = self
            super().log(loss if self.step < 6 else loss * math.nan, lr)
    found = short(Run=Diverging)
    assert found.code == 1 and found.err.count("\n") == 1
    rate = method("rotnet").learning_rate(6, Diverging.latest.args, 4)
    for words in ("the loss is nan at step 6", f"learning rate {rate:.3g}", "lower --lr", str(tmp_path / "run" / "last.pt")):
        assert words in found.err
    assert checkpoint(tmp_path / "run")["step"] == 4 and len(rows(tmp_path / "run")) == 4
    again = short()  # the same settings go on from there
    assert again.code == 0 and "continuing after step 4 of 8" in again.out and len(rows(tmp_path / "run")) == 8


def test_divergence_of_a_real_run(short, tmp_path):
    """A rate of 1e30: after the first step the weights are huge, then the loss is not a number. The initial state is kept."""
    found = short("--lr", 1e30, "--warmup", 0)
    assert found.code == 1 and "lower --lr" in found.err and found.err.count("\n") == 1
    saved = checkpoint(tmp_path / "run")
    assert saved["step"] == 0 and all(value.isfinite().all() for value in saved["state"]["model"].values())


def test_weights_that_are_not_finite_are_never_saved(short, tmp_path):
    """The loss of the last step of an epoch is computed before its update, so it does not show that the update was bad."""
    class Broken(common.Run):
        def log(self, loss, lr):
            super().log(loss, lr)
            if self.step == 8:
                next(self.model.parameters()).data[0] = math.inf
    found = short(Run=Broken)
    assert found.code == 1 and "a weight is no longer finite after step 7" in found.err and "lower --lr" in found.err
    assert checkpoint(tmp_path / "run")["step"] == 4


def one_bad_process(out, data):
    class Bad(common.Run):
        def log(self, loss, lr):
            super().log(loss * math.nan if common.rank() == 1 and self.step == 5 else loss, lr)
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        patch.setenv("RANK", str(common.rank()))  # as torchrun sets it
        found = call_main("rotnet", "--batch", 12, "--epochs", 2, "--out", out, data=data, Run=Bad)
    return found.code, found.err


def test_loss_of_one_process_stops_all(processes, tmp_path):
    """With one message, since the mean over processes is what is checked."""
    (code, text), (other, silent) = processes(2, one_bad_process, tmp_path / "run", tiny_data())
    assert code == other == 1 and "at step 5" in text and not silent
    assert checkpoint(tmp_path / "run")["step"] == 4


def test_run_of_other_settings_is_refused(short, tmp_path):
    assert short().code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for flag, value, words in (("--lr", 0.3, "now 0.3"), ("--seed", 1, "seed 0, now 1"), ("--epochs", 3, "epochs 2, now 3")):
        found = short(flag, value)
        assert found.code == 1 and words in found.err and "choose another --out" in found.err and found.err.count("\n") == 1
    found = short(data=tiny_data(60))  # other images under the same name
    assert found.code == 1 and "train_images 48, now 60" in found.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    for flags in (["--workers", 2], ["--root", tmp_path]):  # what does not change the result may change
        assert short(*flags).code == 0


def test_settings_are_refused_before_the_first_checkpoint_too(short, tmp_path):
    """metrics.jsonl is there before last.pt: a run killed while its baselines are measured is recognised by it."""
    assert short().code == 0
    (tmp_path / "run" / "last.pt").unlink()
    found = short("--seed", 1)
    assert found.code == 1 and "seed 0, now 1" in found.err


@pytest.mark.parametrize("spoil", ["empty", "cut", "text"])
def test_damaged_checkpoint_is_named_and_kept(short, tmp_path, spoil):
    """Checkpoints are written whole or not at all; a disk may still lose one."""
    assert short().code == 0
    last = tmp_path / "run" / "last.pt"
    last.write_bytes({"empty": b"", "cut": last.read_bytes()[:1000], "text": b"no weights"}[spoil])
    before = last.read_bytes()
    found = short()
    assert found.code == 1 and f"{last} cannot be read (" in found.err and found.err.count("\n") == 1
    assert last.read_bytes() == before


def test_folder_of_another_method_is_refused(short, tmp_path):
    assert short().code == 0
    found = call_main("simclr", "--batch", 12, "--epochs", 2, "--out", tmp_path / "run")
    assert found.code == 1 and "choose another --out" in found.err


def test_time_of_evaluation_is_not_training_time(monkeypatch, short, tmp_path):
    """Five evaluations of two seconds each by a clock that only they move."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(*args, **options):
        now[0] += 2
        return dict(RESULTS)

    class Ticking(common.Run):
        def log(self, loss, lr):
            now[0] += 0.5
            super().log(loss, lr)
    monkeypatch.setattr(common, "evaluate", slow)
    assert short("--eval-every", 1, Run=Ticking).code == 0
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["train_seconds"] == 8 * 0.5
    assert [row["images_per_s"] for row in rows(tmp_path / "run")] == [24.0] * 8
