"""One training on several processes: how they join and speak, sums and gathers with exact
gradients, and batch-norm over all images.

Each process holds n rows of the global batch of N = n world. A loss that is a mean over N must have
the same value and gradient on any number of processes. torch.distributed's all_reduce and
all_gather pass no gradient back; these do, on GPUs and CPUs:

    all_reduce_sum(x)   y = sum over r of x_r on every process      dL/dx_r = sum over s of dL_s/dy
    gather(x)           y = [x_0; x_1; ...] on every process        dL/dx_r = its rows of the same

where L_s is the loss of process s. DistributedDataParallel then averages over processes, so a loss
that every process computes in full, or as a mean over its own rows, has the gradient that one
process with the whole batch has (tests/test_distributed.py).
"""

import atexit
import datetime
import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def fail(message, only_first=True):
    """Exits with a one-line message on stderr and code 1. By default only process 0 prints it."""
    if os.environ.get("RANK", "0") == "0" or not only_first:
        warn(f"error: {message}")
    sys.exit(1)


def warn(text):
    print(text, file=sys.stderr, flush=True)


def barrier():
    if world() > 1:
        dist.barrier()


def print0(*words):
    """Prints in process 0 only. A full disk behind the output does not end a run."""
    if rank() == 0:
        try:
            print(*words, flush=True)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            warn(f"warning: cannot print: {error.strerror}")


def join_processes(seed):
    """Joins torchrun's group of processes, if there is one (nccl on GPUs, gloo on CPUs), seeds the
    initial weights, and returns the device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        place = int(os.environ.get("LOCAL_RANK", 0))
        if place >= torch.cuda.device_count():
            fail(f"LOCAL_RANK is {place}: start one process per GPU", only_first=False)
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True

    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in needed if name in os.environ]
    if "RANK" in given or "WORLD_SIZE" in given:
        if len(given) < 4:
            fail(
                f"of torchrun's variables only {', '.join(given)} are set: start the program with "
                "torchrun, or unset them",
                only_first=False,
            )
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        fail("srun has started several tasks that do not know of each other: let each run torchrun")
    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        join_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)  # the same weights in every process
    return device


def join_group(backend):
    """Waits for the other processes, which torchrun's variables describe."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        warn("waiting for the other processes: are all started, with the same MASTER_ADDR?")
    try:
        store, place, count = next(dist.rendezvous("env://"))
        # torchrun reuses the store after a restart; a new prefix hides stale addresses
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        patience = datetime.timedelta(hours=2)
        dist.init_process_group(backend, None, patience, count, place, store)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        fail(f"the processes cannot join by torchrun's variables ({reason})", only_first=False)
    # torch 2.11 may hang at exit if DistributedDataParallel holds the last reference
    atexit.register([dist.group.WORLD].clear)


def leave_processes():
    """The end of a program: nothing more is said to other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


class AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):  # every process used the sum, so its gradient is the sum of theirs
        return AllReduceSum.forward(None, grad)


def all_reduce_sum(x):
    """Sum over processes, with the gradient that torch.distributed.all_reduce lacks."""
    return AllReduceSum.apply(x) if world() > 1 else x


class AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        blocks = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(blocks, x)
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx, grad):  # every process used all rows; this one gets the sum for its own
        return AllReduceSum.forward(None, grad).chunk(world())[rank()]


def gather(x):
    """(n, ...) on each process -> (world * n, ...) on all, in the order of the processes, which is
    that of the global batch.

    The gradient is exact: if each process returns the mean loss of its own rows, the average over
    processes that DistributedDataParallel takes is the gradient of the mean loss of the global
    batch."""
    return AllGather.apply(x.contiguous()) if world() > 1 else x


class SyncBatchNorm(_BatchNorm):
    """Batch-norm over the images of all processes on any device (torch's own needs GPUs). The mean
    comes first, then the variance around it, so no precision is lost; the gradient runs through
    both sums."""

    def forward(self, x):
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1] * world()

        mean = all_reduce_sum(x.sum(dims)) / count
        x = x - mean.view(shape)
        variance = all_reduce_sum(x.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)

        x = x * torch.rsqrt(variance + self.eps).view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x


def distribute(model, device, compile=False):
    """The model as the loop calls it: on the device in channels_last, and with several processes
    also with synchronised batch-norm and DistributedDataParallel around it. Its parameters stay the
    same objects: optimise, save and evaluate those of the model."""
    model.to(device, memory_format=torch.channels_last)
    if world() > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world() > 1:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = SyncBatchNorm  # the same parameters and buffers
    if world() > 1:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            # torch 2.14 renames broadcast_buffers
            model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    # Around DistributedDataParallel, so that gradients can travel while others are computed.
    return torch.compile(model) if compile else model
