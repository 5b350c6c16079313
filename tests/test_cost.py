"""kernels/cost.py: operations by hand and against torch's own counter; counting changes no bit of a
training; what a run writes of its cost, on one process and on two, after a kill, and compiled."""

import pytest
import torch
from conftest import Recorder, call_main, light, noise, short
from test_resume import quick, run_until
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import common
from common import backbone, pixels, read_lines
from kernels.cost import FlopCounter, network_cost


def counted(function):
    counter = FlopCounter()
    counter.start()
    function()
    counter.stop()
    return counter.flops


# -------- Operations ------------------------------------------------------------------------------


def test_network_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1, bias=False), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(5 * 16, 7))
    expected = 2 * 3 * 3 * 3 * 5 * 4 * 4 + 2 * 80 * 7  # 4x4 places; additions count too
    assert network_cost(net, 8) == {"parameters": 135 + 567, "flops": expected}
    assert network_cost(pixels(8), 8) == {"parameters": 0, "flops": 0}


def test_vit_has_its_attention():
    """T = 5 tokens of width 96 (8 pixels, patches of 4), four blocks."""
    net = backbone("vit_micro", 8)
    tokens, dim = 5, 96
    block = 2 * tokens * 12 * dim**2 + 2 * 2 * tokens**2 * dim  # linear layers; QK and its sum of V
    assert network_cost(net, 8)["flops"] == 4 * block + 2 * 4 * (3 * 16) * dim


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_backwards_costs_twice_as_much_as_forwards(groups):
    """Its own gradient and that of its weights; groups of channels see only their own."""
    net = nn.Conv2d(8, 16, 3, groups=groups, bias=False)
    x = noise(2, 8, 5, 5, dtype=torch.float32).requires_grad_()
    forward = 2 * 2 * 9 * (8 // groups) * 16 * 3 * 3
    assert counted(lambda: net(x)) == forward
    assert counted(lambda: net(x).sum().backward()) == 3 * forward


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_left_as_it_was(training):
    net = backbone("resnet14", 8).train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    network_cost(net, 8)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training == training and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_forward_and_backward_are_those_of_torchs_counter(arch):
    """Torch counts attention on a CPU only as products of matrices, whose backward pass has four
    products. The kernel for CPUs computes the first product again: five."""
    net = backbone(arch, 8)
    x = noise(2, 3, 8, 8, dtype=torch.float32)

    def step():
        net(x).square().sum().backward()

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as theirs:
        step()
    again = 4 * 2 * 2 * 5**2 * 96 if arch == "vit_micro" else 0  # blocks, images
    assert counted(step) == theirs.get_total_flops() + again


def test_stop_without_start_and_twice():
    counter = FlopCounter()
    counter.stop()
    counter.start()
    torch.ones(2, 3) @ torch.ones(3, 4)
    counter.stop()
    counter.stop()
    torch.ones(2, 3) @ torch.ones(3, 4)
    assert counter.flops == 2 * 2 * 3 * 4


# -------- Runs ------------------------------------------------------------------------------------


class Counted(Recorder):
    """A Recorder that counts as a Run does."""

    def resume(self):
        super().resume()
        self.loader.counter = self.counter

    def log(self, *args, **more):
        self.counter.stop()
        super().log(*args, **more)


def trained(kind, folder, name, arch):
    flags = [*short(name, arch=arch), "--out", folder]
    found = call_main(name, *flags, Run=kind, **light(name))
    assert found.code == 0, found.err
    return kind.latest


@pytest.mark.parametrize("name, arch", [("simclr", "resnet14"), ("mae", "vit_micro")])
def test_counting_changes_no_bit_of_a_training(tmp_path, name, arch):
    plain = trained(Recorder, tmp_path / "a", name, arch)
    run = trained(Counted, tmp_path / "b", name, arch)
    assert run.counter.flops > 0 == plain.counter.flops
    for loss, other in zip(run.losses, plain.losses, strict=True):
        assert torch.equal(loss, other)
    state = plain.model.state_dict()
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, state[key]), key


def last_line(folder):
    return read_lines(folder / "metrics.jsonl")[-1]


class Kept(common.Run):
    def resume(self):
        Kept.latest = self
        super().resume()


def whole_run(folder, *flags):
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        flags = [*short("rotnet"), "--out", folder, *flags]
        found = call_main("rotnet", *flags, Run=Kept, **light("rotnet"))
    assert found.code == 0, found.err
    return Kept.latest


def test_a_run_writes_its_cost(tmp_path):
    """RotNet shows a batch of 12 images in four turns. A backward pass has two products for each of
    the forward pass, but none for the gradient of the images."""
    run = whole_run(tmp_path / "a")
    line = last_line(tmp_path / "a")
    cost = network_cost(run.model.backbone, 16)
    assert {name: line[name] for name in cost} == cost
    assert line["images_per_s"] == pytest.approx(4 * 12 / run.seconds, abs=0.06)
    with FlopCounterMode(display=False) as forward:
        run.model(torch.zeros(48, 3, 16, 16))
    stem = 48 * 2 * 27 * 32 * 8 * 8  # a convolution of 3x3 pixels, to 32 channels at 8x8 places
    assert line["train_flops"] == 4 * (3 * forward.get_total_flops() - stem)


def test_a_resumed_run_knows_what_was_counted(tmp_path):
    """Three steps, then one in a new process: as much as all four in one."""
    flags = [*short("rotnet"), "--out"]
    run_until("rotnet", [*flags, tmp_path / "whole"], None)
    for after in (3, None):
        run_until("rotnet", [*flags, tmp_path / "parts"], after)
    whole = last_line(tmp_path / "whole")["train_flops"]
    assert last_line(tmp_path / "parts")["train_flops"] == whole > 0

    # also where nothing is left to train
    text = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "whole" / "metrics.jsonl").write_text("\n".join(text[:-1]) + "\n")
    run_until("rotnet", [*flags, tmp_path / "whole"], None)
    line = last_line(tmp_path / "whole")
    assert line["train_flops"] == whole and line["flops"] > 0 and line["images_per_s"] > 0


def test_what_is_compiled_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **options: None)
    monkeypatch.setattr(torch, "compile", lambda model, *args, **options: model)
    whole_run(tmp_path / "a", "--compile")
    assert last_line(tmp_path / "a")["train_flops"] is None


def run_of_processes(folder):
    whole_run(folder)


@pytest.mark.thorough
def test_processes_count_together(processes, tmp_path):
    """Two processes, each with half of the images."""
    whole_run(tmp_path / "one")
    processes(2, run_of_processes, tmp_path / "two")
    lines = [last_line(tmp_path / name) for name in ("one", "two")]
    assert lines[0]["train_flops"] == lines[1]["train_flops"] > 0
