"""Measures where the time of a training step goes, for every method, at the defaults of its file.

    python tests/bench_steps.py                                   all methods, on the GPU if there is one, else on all cores
    python tests/bench_steps.py simclr --batch 512 --steps 50     one of them; the same for 4096

Columns, in percent of the step: `data`, the views, made on the device; `forward` and `backward` of the networks, a teacher's
forward included; `loss`, forward and backward; `update`, the rest: targets, masks, groups of images, optimiser, moving
averages, queue, logging. `outside` is what is neither forward nor backward of the networks. Each boundary between two parts
waits for the device, so on a GPU a step takes a little longer here than in training. The method's own main() runs, with its
baselines left out, and the first steps are not counted.
"""

import argparse
import importlib
import platform
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common.py is found from any working directory
import common

METHODS = sorted(path.stem for path in (common.HERE / "methods").glob("*.py"))
PARTS = ("data", "forward", "loss", "backward", "update")
WARMUP = 5  # steps


class Enough(Exception):
    """Ends main() after the steps that were asked for."""


class Clock:
    """Seconds by part. The time since the last call of `switch` belongs to the part that then ends."""

    def __init__(self):
        self.seconds, self.part, self.since = dict.fromkeys(PARTS, 0.0), "update", time.perf_counter()

    def switch(self, part):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        self.part, self.since = part, now


def tensors(value):
    """The tensors of a network's output, which may be in tuples and lists."""
    return [value] if torch.is_tensor(value) else [t for part in value for t in tensors(part)]


def measure(name, steps, batch, out):
    """(global batch, {part: seconds a step}) of a method at its defaults, on emoji."""
    module, clock, images = importlib.import_module(f"methods.{name}"), Clock(), []
    batches, distribute, backward, log = common.Loader.__call__, module.distribute, torch.Tensor.backward, common.Run.log

    def timed_batches(loader, *args):
        images[:] = [loader.batch]
        each = batches(loader, *args)
        while True:
            clock.switch("data")
            found = next(each, None)
            clock.switch("update")
            if found is None:
                return
            yield found

    def timed_network(*args):
        network = distribute(*args)
        network.register_forward_pre_hook(lambda *_: clock.switch("forward"))

        def done(_, __, output):
            for tensor in tensors(output):
                if tensor.requires_grad:  # its gradient is where the loss's backward ends and the network's begins
                    tensor.register_hook(lambda _: clock.switch("backward"))
            clock.switch("loss")
        network.register_forward_hook(done)
        return network

    def timed_backward(*args, **kwargs):
        backward(*args, **kwargs)
        clock.switch("update")

    def counted_log(run, *args):
        log(run, *args)
        clock.switch("update")
        if run.step == WARMUP:
            clock.seconds = dict.fromkeys(PARTS, 0.0)
        if run.step == WARMUP + steps:
            raise Enough

    baseline = dict.fromkeys(("knn20", "knn200", "linear"), 0.0)
    flags = ["--epochs", 10_000, "--out", f"{out}/{name}", "--eval-every", 10_000, *(["--batch", batch] if batch else [])]
    with ExitStack() as stack:
        for target, attribute, new in ((common.Loader, "__call__", timed_batches), (module, "distribute", timed_network),
                                       (torch.Tensor, "backward", timed_backward), (common.Run, "log", counted_log),
                                       (common, "evaluate", lambda *_: baseline), (common, "print0", lambda *_: None),
                                       (module, "print0", lambda *_: None), (sys, "argv", [name, *map(str, flags)])):
            if hasattr(target, attribute):  # not every method prints
                stack.enter_context(patch.object(target, attribute, new))
        try:
            module.main()
        except Enough:
            return images[0], {part: seconds / steps for part, seconds in clock.seconds.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("methods", nargs="*", default=METHODS, help=f"{', '.join(METHODS)} (default: all)")
    p.add_argument("--batch", type=int, default=None, help="images a step (default: each method's own)")
    p.add_argument("--steps", type=int, default=20, help="steps that are measured")
    args = p.parse_args()
    if unknown := sorted(set(args.methods) - set(METHODS)):
        sys.exit(f"{unknown[0]}: choose among {', '.join(METHODS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{common.device_name(device)}; Python {platform.python_version()}, torch {torch.__version__}\n"
          f"{'method':15}{'batch':>6}{'ms/step':>9}{'images/s':>10}"
          + "".join(f"{part:>10}" for part in (*PARTS, "outside")))
    with tempfile.TemporaryDirectory() as out:
        for name in args.methods:
            batch, seconds = measure(name, args.steps, args.batch, out)
            total = sum(seconds.values())
            shares = {part: 100 * s / total for part, s in seconds.items()}
            outside = 100 - shares["forward"] - shares["backward"]
            print(f"{name:15}{batch:6}{1000 * total:9.0f}{batch / total:10.0f}"
                  + "".join(f"{shares[part]:9.1f}%" for part in PARTS) + f"{outside:9.1f}%", flush=True)


if __name__ == "__main__":
    main()
