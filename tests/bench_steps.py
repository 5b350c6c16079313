"""Measures where the time of a training step goes, for every method, at the defaults of its file.

    python tests/bench_steps.py            all methods, on the GPU if there is one, else on the CPU
    python tests/bench_steps.py simclr --batch 512 --steps 50

`per s` counts the images per second, or the clips where a method learns from videos. The other
columns are in percent of the step: `data`, the views, made on the device; `forward` and `backward`
of the networks, a teacher's forward included; `loss`, forward and backward; `update`, the rest:
targets, masks, groups of images, optimiser, moving averages, queue, logging. `outside` is what is
neither forward nor backward of the networks. Each boundary between two parts waits for the device,
so on a GPU a step takes a little longer here than in training. The method's own main() runs,
without its baselines and pictures, and the first steps are not counted.
"""

import argparse
import importlib
import platform
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from kernels.provenance import device_name

PARTS = ("data", "forward", "loss", "backward", "update")
WARMUP = 5  # steps


def trains(path):
    """Whether a file in methods/ trains a network; others evaluate one."""
    return re.search(r'^KIND = "(?!evaluation|initialisation)', path.read_text(), re.MULTILINE)


METHODS = sorted(path.stem for path in (common.HERE / "methods").glob("*.py") if trains(path))


class Enough(Exception):
    """Ends main() after the steps that were asked for."""


class Clock:
    """Seconds by part. The time since the last call of `switch` belongs to the part that then
    ends."""

    def __init__(self):
        self.part = "update"
        self.since = time.perf_counter()
        self.reset()

    def reset(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def switch(self, part):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        self.part = part
        self.since = now


def tensors(value):
    """The tensors of a network's output, which may be in tuples and lists."""
    return [value] if torch.is_tensor(value) else [t for part in value for t in tensors(part)]


def measure(name, steps, batch, out):
    """(global batch, {part: seconds per step}) of a method at its defaults, on its default data."""
    module = importlib.import_module(f"methods.{name}")
    clock = Clock()
    batch_sizes = []
    call = common.Loader.__call__
    distribute = module.distribute
    backward = torch.Tensor.backward
    log = common.Run.log

    def timed_batches(loader, *args, **options):
        batch_sizes.append(loader.batch)
        batches = call(loader, *args, **options)
        while True:
            clock.switch("data")
            found = next(batches, None)
            clock.switch("update")
            if found is None:
                return
            yield found

    def timed_network(*args):
        network = distribute(*args)
        network.register_forward_pre_hook(lambda *_: clock.switch("forward"))

        def done(_, __, output):
            for tensor in tensors(output):
                # its gradient is where the loss's backward ends and the network's begins
                if tensor.requires_grad:
                    tensor.register_hook(lambda _: clock.switch("backward"))
            clock.switch("loss")

        network.register_forward_hook(done)
        return network

    def timed_backward(*args, **options):
        backward(*args, **options)
        clock.switch("update")

    def counted_log(run, *args, **more):
        log(run, *args, **more)
        clock.switch("update")
        if run.step == WARMUP:
            clock.reset()
        if run.step == WARMUP + steps:
            raise Enough

    # A run folder that has its picture of the views already: none is drawn while time is measured.
    folder = Path(out) / name
    folder.mkdir()
    (folder / "views.png").touch()
    flags = ["--epochs", 10_000, "--eval-every", 10_000, "--out", folder]
    if batch:
        flags += ["--batch", batch]
    baseline = dict.fromkeys(("knn20", "knn200", "linear"), 0.0)
    patches = [
        (common.Loader, "__call__", timed_batches),
        (module, "distribute", timed_network),
        (torch.Tensor, "backward", timed_backward),
        (common.Run, "log", counted_log),
        (common, "evaluate", lambda *_: baseline),
        (common, "print0", lambda *_: None),
        (module, "print0", lambda *_: None),
    ]
    with ExitStack() as stack:
        for target, attribute, new in patches:
            if hasattr(target, attribute):  # not every method prints
                stack.enter_context(patch.object(target, attribute, new))
        try:
            module.main(flags)
        except Enough:
            return batch_sizes[-1], {part: s / steps for part, s in clock.seconds.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("methods", nargs="*", default=METHODS, help=f"{', '.join(METHODS)}; default all")
    p.add_argument("--batch", type=int, help="images or clips per step; default each method's own")
    p.add_argument("--steps", type=int, default=20, help="steps that are measured; default 20")
    args = p.parse_args()
    unknown = sorted(set(args.methods) - set(METHODS))
    if unknown:
        sys.exit(f"error: {unknown[0]}: choose among {', '.join(METHODS)}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = device_name(device)
    print(f"{name}; Python {platform.python_version()}, torch {torch.__version__}")
    heads = "".join(f"{part:>10}" for part in (*PARTS, "outside"))
    print(f"{'method':23}{'batch':>6}{'ms/step':>9}{'per s':>10}{heads}")
    with tempfile.TemporaryDirectory() as out:
        for name in args.methods:
            batch, seconds = measure(name, args.steps, args.batch, out)
            total = sum(seconds.values())
            shares = {part: 100 * s / total for part, s in seconds.items()}
            shares["outside"] = 100 - shares["forward"] - shares["backward"]
            numbers = "".join(f"{share:9.1f}%" for share in shares.values())
            line = f"{name:23}{batch:6}{1000 * total:9.0f}{batch / total:10.0f}{numbers}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
