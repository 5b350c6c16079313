"""Shared by the tests: import paths, a small thread budget, gloo processes that stay alive, and running a program as its
user would. Kernels run under Triton's interpreter where there is no GPU (read when a kernel is decorated, so set first)."""

import datetime
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # several processes share the cores, and small tensors gain nothing from threads

import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


def worker(pipe, paths):
    """A process of the pool: receives (rank, world, rendezvous file, function, arguments), returns what it returned."""
    import torch
    import torch.distributed as dist
    sys.path[:0] = paths
    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        rank, world, file, function, args = job
        outcome = "not connected"
        try:
            dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world,
                                    timeout=datetime.timedelta(seconds=120))  # a process that waits in vain for a failed one
            outcome = "failed"
            pipe.send(("passed", function(*args)))
        except BaseException:
            pipe.send((outcome, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def answer(pipe):
    """(outcome, result) of a process of the pool. Gloo gives up after 120 s, so one that is silent for longer hangs. Not
    tried again: it may be the code under test."""
    try:
        return pipe.recv() if pipe.poll(300) else ("failed", "no answer within 300 s")
    except EOFError:
        return "failed", "the process has died"


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """processes(world, function, *args): calls a module-level function in `world` gloo processes and returns their results in
    the order of the ranks. The processes are started once and kept, because importing torch is slow."""
    context, pool, folder, calls = torch.multiprocessing.get_context("spawn"), [], tmp_path_factory.mktemp("gloo"), []

    def attempt(world, function, *args):
        while len(pool) < world:
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, sys.path[:2]), daemon=True)
            process.start()
            theirs.close()  # so that the death of the process is the end of the pipe
            pool.append((process, ours))
        calls.append(folder / f"rendezvous{len(calls)}")
        for rank, (_, pipe) in enumerate(pool[:world]):
            pipe.send((rank, world, str(calls[-1]), function, args))
        answers = [answer(pipe) for _, pipe in pool[:world]]
        if any(outcome != "passed" for outcome, _ in answers):  # their processes may be unable to form another group
            for process, _ in pool:
                process.kill()
            pool.clear()
        return answers

    def call(world, function, *args):
        answers = attempt(world, function, *args)
        if any(outcome == "not connected" for outcome, _ in answers):  # gloo's sockets, not the code under test: once more
            answers = attempt(world, function, *args)
        wrong = [f"process {rank} of {world} {outcome}:\n{answer}" for rank, (outcome, answer) in enumerate(answers)
                 if outcome != "passed"]
        assert not wrong, "\n".join(wrong)
        return [answer for _, answer in answers]

    yield call
    for process, pipe in pool:
        pipe.send(None)
        process.join(10)


@pytest.fixture
def program(tmp_path):
    """program("methods/simclr.py", "--epochs", 1): runs a script of the project (or, with processes=2, torchrun of it) from an
    empty folder that is not the project's, and returns the finished process; its text output is in stdout and stderr."""
    def run(script, *flags, processes=0, check=True, cwd=tmp_path, **environment):
        launcher = [sys.executable]
        if processes:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        found = subprocess.run([*launcher, str(ROOT / script), *map(str, flags)], cwd=cwd, text=True, capture_output=True,
                               env={**os.environ, **environment}, timeout=300)
        assert not check or found.returncode == 0, found.stdout + found.stderr
        return found
    return run
