"""What a network and its training cost, in floating-point operations: each addition and each
multiplication of a convolution or a product of matrices counts as one. Normalisation, activations
and the operators of this folder (InfoNCE, Sinkhorn) count nothing. So a network has the same number
on every machine; a training has not, if its loss is such an operator on GPUs only.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop,
    sdpa_flop,
)

from kernels.collectives import world

aten = torch.ops.aten


def cpu_attention_flop(query, key, value, *args, **kwargs):
    return sdpa_flop(query, key, value)


def cpu_attention_backward_flop(grad, query, key, value, *args, **kwargs):
    return sdpa_backward_flop(grad, query, key, value)


def convolution_backward_flop(grad, x, weight, *args, out_val, **kwargs):
    """The gradient of x, and that of the weights, each cost as much as the forward pass."""
    transposed = args[4]
    once = conv_flop_count(x.shape, weight.shape, grad.shape, transposed)
    return once * sum(gradient is not None for gradient in out_val[:2])


# torch does not know the kernels of attention for CPUs, and forgets groups of channels where a
# convolution goes backwards.
FORMULAS = {
    **flop_registry,
    aten.convolution_backward: convolution_backward_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_attention_backward_flop,
}


class FlopCounter(TorchDispatchMode):
    """Counts the operations between start() and stop(), those of backward passes too, in `flops`;
    of one step only. What is computed stays the same, to the last bit."""

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.counting = False

    def start(self):
        """Does nothing if a step has been counted."""
        if not self.flops:
            self.counting = True
            self.__enter__()

    def stop(self):
        """Does nothing if it is not counting."""
        if self.counting:
            self.counting = False
            self.__exit__(None, None, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        formula = FORMULAS.get(getattr(function, "_overloadpacket", None))
        if formula:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


@torch.no_grad()
def network_cost(network, size):
    """{"parameters": the numbers in its weights, "flops": of one image}. The network is
    used in eval mode, and left as it was."""
    some = next(network.parameters(), torch.zeros(1))
    training = network.training
    network.eval()
    counter = FlopCounter()
    counter.start()
    network(some.new_zeros(1, 3, size, size))
    counter.stop()
    network.train(training)
    parameters = sum(weight.numel() for weight in network.parameters())
    return {"parameters": parameters, "flops": counter.flops}


def run_cost(run):
    """network_cost of the backbone of a Run (common.py); train_flops, those of the first step times
    processes and steps, None if they were not counted, as with --compile; and the mean speed of the
    training."""
    counted = run.counter.flops * world() * run.total
    speed = run.total * run.args.batch / run.seconds if run.seconds else 0.0
    return {
        **network_cost(run.model.backbone, run.args.size),
        "train_flops": counted or None,
        "images_per_s": round(speed, 1),
    }
