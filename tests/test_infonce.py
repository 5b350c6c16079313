"""InfoNCE: the kernels (interpreted where there is no GPU) and the PyTorch path against the formulas, one process and many."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from aot import SHARED_LIMIT, Spec, compile_ahead
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import infonce, path
from kernels.infonce import clip_loss, clip_reference, moco_loss, moco_reference, padded, simclr_loss, simclr_reference
from methods.moco import info_nce
from methods.simclr import nt_xent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSES = ("simclr", "clip", "moco")


def unit(*shape, seed=0, dtype=torch.float64, near=None):
    """Rows of length 1; beside those of `near`, if given, as two views of one image are."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = F.normalize(x if near is None else near + 0.5 * F.normalize(x, dim=1), dim=1)
    return x.to(dtype)


def inputs(loss, n, D, tau, C=None, dtype=torch.float64):
    """What the loss takes that may have a gradient, and what it takes beside that."""
    a = unit(n, D, seed=1)
    b = unit(n, D, seed=2, near=a)
    if loss == "simclr":
        return [a.to(dtype), b.to(dtype)], [tau]
    if loss == "clip":
        return [a.to(dtype), b.to(dtype), torch.tensor(1 / tau, dtype=torch.float64).to(infonce.math_dtype(a.to(dtype)))], []
    return [a.to(dtype)], [b.to(dtype), unit(C or n, D, seed=3, dtype=dtype), tau]


def value_and_gradients(function, tensors, rest):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*tensors, *rest)
    loss.backward()
    return [loss.detach(), *(x.grad for x in tensors)]


def pick(loss, reference=False):
    return getattr(infonce, f"{loss}_{'reference' if reference else 'loss'}")


# The references are the formulas of the methods' files, and differentiable as they should be.

@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_references_are_the_formulas_of_the_methods(tau):
    a, b, queue = unit(9, 16, seed=1), unit(9, 16, seed=2), unit(31, 16, seed=3)
    torch.testing.assert_close(simclr_reference(a, b, tau), nt_xent(a, b, tau), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moco_reference(a, b, queue, tau), info_nce(a, b, queue, tau), rtol=1e-12, atol=1e-12)
    logits = a @ b.T / tau
    both = (F.cross_entropy(logits, torch.arange(9)) + F.cross_entropy(logits.T, torch.arange(9))) / 2
    torch.testing.assert_close(clip_reference(a, b, 1 / tau), both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_references_pass_gradcheck(loss):
    tensors, rest = inputs(loss, 5, 6, 0.3)
    assert torch.autograd.gradcheck(lambda *x: pick(loss, reference=True)(*x, *rest), [x.requires_grad_() for x in tensors])


def test_by_hand():
    """Two images with orthogonal embeddings, equal views: each anchor has one candidate at cosine 1 and two at 0."""
    z = torch.eye(2, dtype=torch.float64)
    exact = torch.tensor(1 + 2 * torch.e**-2, dtype=torch.float64).log()  # -log e^2 / (e^2 + 2 e^0)
    torch.testing.assert_close(simclr_loss(z, z, 0.5), exact)
    exact = torch.tensor(1 + torch.e**-2, dtype=torch.float64).log()
    torch.testing.assert_close(clip_loss(z, z, 2.0), exact)
    torch.testing.assert_close(moco_loss(z, z, z.flip(0)[:1], 0.5), (exact + torch.tensor(2.0).double().log()) / 2)


# The PyTorch path, in float64.

@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tau", [0.01, 0.0234, 0.1, 1.0])  # both forms of the powers: 1 / 0.0234 is just below 43
@pytest.mark.parametrize("n, D, C", [(1, 3, 1), (7, 16, 1), (13, 20, 57)])
def test_pytorch_path_equals_the_reference(loss, tau, n, D, C):
    tensors, rest = inputs(loss, n, D, tau, C)
    exact = value_and_gradients(pick(loss, reference=True), tensors, rest)
    found = value_and_gradients(pick(loss), tensors, rest)
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-11)  # float64 rounding, times a condition of 1 / tau


@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_of_rows_change_nothing(loss, monkeypatch):
    tensors, rest = inputs(loss, 13, 20, 0.1, 57)
    whole = value_and_gradients(pick(loss), tensors, rest)

    def little(x, y):
        for start in range(0, len(x), 3):
            yield slice(start, min(start + 3, len(x))), x[start:start + 3] @ y.T
    monkeypatch.setattr(infonce, "row_blocks", little)
    for a, b in zip(whole, value_and_gradients(pick(loss), tensors, rest), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cublas", [False, True])
def test_pytorch_path_of_16_bits(monkeypatch, loss, tau, dtype, cublas):
    """Gradients within the rounding of their dtype. cublas: as on a GPU, whose products of such numbers are summed in float32;
    weights are rounded for them, too. On a CPU, CLIP has a path of its own, without them."""
    if cublas and DEVICE == "cpu":
        if loss == "clip":
            pytest.skip("needs a GPU")
        monkeypatch.setattr(infonce, "factors", lambda *rows: list(rows))
        monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: (a.to(out_dtype) @ b.to(out_dtype)) if a.dtype == b.dtype
                            else pytest.fail("cuBLAS wants one dtype"))
    tensors, rest = inputs(loss, 13, 300, tau, 57, dtype=dtype)  # 300 numbers: too many for the kernels
    if cublas:
        tensors, rest = [[x.to(DEVICE) if torch.is_tensor(x) else x for x in part] for part in (tensors, rest)]
    exact = value_and_gradients(pick(loss, reference=True), *([x.double() if torch.is_tensor(x) else x for x in part]
                                                              for part in (tensors, rest)))
    found = value_and_gradients(pick(loss), tensors, rest)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0, atol=4 * 2**-23 / tau)  # roundings of a logit in float32
    for x, f, e in zip(tensors, found[1:], exact[1:], strict=True):
        assert f.dtype == x.dtype
        # of the gradient; with cublas of the probabilities, in sums that are at most 1 / (tau n), or 1 for the scale
        step = torch.finfo(dtype).eps * (2 / (tau * 13) if x.ndim else 2) * (1 if cublas else 0)
        assert (f - e).abs().max() <= torch.finfo(x.dtype).eps * e.abs().max() + step + 4 * 2**-23 / tau**2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_of_the_pytorch_path_on_a_gpu(dtype):
    """With fake tensors, which are only checked, as if a GPU were there: cuBLAS's operator takes them, and sums in float32."""
    with FakeTensorMode():
        x, y = (torch.empty(n, 512, dtype=dtype, device="cuda") for n in (300, 900))
        scale, products = torch.full((), 10.0, device="cuda"), [product for _, product in infonce.row_blocks(x, y)]
        assert {(p.dtype, p.device.type) for p in products} == {(torch.float32, "cuda")}
        for wide in (False, True):
            lse_x, lse_y = infonce.lse_torch(x, y, scale, wide, 0), infonce.lse_torch(y, x, scale, wide, 900)
            pull = infonce.pull_torch(x, y, lse_x, lse_y, scale, wide, 0)
            assert (lse_x.dtype, pull.dtype, pull.shape, pull.device.type) == (torch.float32, torch.float32, x.shape, "cuda")
        assert [out.dtype for out in infonce.mean_torch(x, y, scale)] == [torch.float32] * 2


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes."""
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                LargestTensor.largest = max(LargestTensor.largest, x.numel())
        return out


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_does_not_grow_with_the_square_of_the_batch(loss):
    """2^19 logits at a time, or one row of them; all at once they would be 2^23 and more."""
    tensors, rest = inputs(loss, 3000, 16, 0.1, 3000, dtype=torch.float32)
    LargestTensor.largest = 0
    with LargestTensor():
        value_and_gradients(pick(loss), tensors, rest)
    assert 0 < LargestTensor.largest <= 2**19


# The kernels.

@pytest.fixture
def kernels(monkeypatch):
    """Kernels also for CPU tensors, by Triton's interpreter, with tiles so small that a few rows make several of them."""
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        monkeypatch.setattr(infonce, "use_kernel", lambda x: True)
        little = [dict(BM=32, BN=16, num_warps=4, num_stages=2)] * 2
        for name in ("LSE_TILES", "MEAN_TILES", "PULL_TILES"):
            monkeypatch.setattr(infonce, name, little)
    return monkeypatch


CASES = [(1, 16, 5), (33, 20, 64), (49, 130, 70)]  # ragged rows, columns and widths


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize("n, D, C", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE == "cuda"))
def test_kernel_is_as_exact_as_plain_pytorch(kernels, loss, tau, n, D, C, dtype):
    """Against float64 on the same, rounded, inputs: at most twice the error of plain PyTorch at the working precision, which is
    float32 for values and, for gradients, float32 rounded to the inputs' dtype once more. The absolute term is four roundings:
    for values of a logit, up to 1 / tau in float32; for gradients of a probability, by the dtype of the inputs (as float32 has
    it, by its logit), in a sum of probabilities times unit rows, times 1 / (tau n); for the scale's, without this factor."""
    tensors, rest = inputs(loss, n, D, tau, C, dtype=dtype)
    tensors, rest = [[x.to(DEVICE) if torch.is_tensor(x) else x for x in part] for part in (tensors, rest)]

    def cast(part, to):
        return [x.to(to) if torch.is_tensor(x) else x for x in part]
    exact = value_and_gradients(pick(loss, reference=True), cast(tensors, torch.float64), cast(rest, torch.float64))
    plain = value_and_gradients(pick(loss, reference=True), cast(tensors, torch.float32), cast(rest, torch.float32))
    found = value_and_gradients(pick(loss), tensors, rest)
    of_a_logit = 4 * torch.finfo(torch.float32).eps / tau
    assert found[0].dtype == torch.float32
    assert (found[0] - exact[0]).abs() <= 2 * (plain[0] - exact[0]).abs() + of_a_logit
    of_a_probability = max(4 * torch.finfo(dtype).eps, of_a_logit)
    for x, f, p, e in zip(tensors, found[1:], plain[1:], exact[1:], strict=True):
        assert f.dtype == x.dtype and f.shape == x.shape
        small = of_a_probability / (tau * n) if x.ndim else of_a_probability
        assert (f - e).abs().max() <= 2 * (p.to(x.dtype) - e).abs().max() + small


@pytest.mark.parametrize("processors", [1, 7])
def test_splits_of_the_columns(kernels, processors):
    """The same numbers from any number of splits, with the diagonal in the first, a middle or the last one."""
    x, y = unit(48, 16, seed=1, dtype=torch.float32), unit(200, 16, seed=2, dtype=torch.float32)
    plan = infonce.plan
    kernels.setattr(infonce, "plan", lambda x, y, BM, BN: (
        (-(-len(x) // BM), -(-(-(-len(y) // BN)) // max(1, -(-len(y) // BN) // processors))),
        max(1, -(-len(y) // BN) // processors)))
    scale = torch.tensor(10.0)
    for first, wide in itertools.product((0, 70, 152, 200), (False, True)):
        lse = infonce.lse_torch(x, y, scale, wide, first)
        torch.testing.assert_close(infonce.lse_op(x, y, scale, wide, first), lse, rtol=1e-6, atol=1e-6)
        lse_y = infonce.lse_torch(y, x, scale, wide, len(x))
        pull = infonce.pull_torch(x, y, lse, lse_y, scale, wide, first)
        torch.testing.assert_close(infonce.pull_op(x, y, lse, lse_y, scale, wide, first), pull, rtol=1e-5, atol=1e-6)
    for found, exact in zip(infonce.lse_and_mean(x, y, scale), infonce.mean_torch(x, y, scale), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    assert plan(x, y, 32, 16)[0][0] == 2


@pytest.mark.parametrize("loss", LOSSES)
def test_two_runs_are_equal_bit_for_bit(kernels, loss):
    tensors, rest = inputs(loss, 33, 20, 0.1, 64, dtype=torch.float16)
    tensors, rest = [[x.to(DEVICE) if torch.is_tensor(x) else x for x in part] for part in (tensors, rest)]
    one, two = (value_and_gradients(pick(loss), tensors, rest) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_collapsed_and_opposite_embeddings_are_finite(kernels, loss, tau):
    """All rows equal: the loss is that of a guess, log of the number of candidates."""
    tensors, rest = inputs(loss, 8, 16, tau, 8, dtype=torch.float16)
    one = unit(1, 16, dtype=torch.float16).to(DEVICE)
    same = [one.expand(8, 16).clone().to(DEVICE) if x.ndim else x.to(DEVICE) for x in tensors]
    beside = [one.expand(8, 16).clone() if torch.is_tensor(x) else x for x in rest]
    found = value_and_gradients(pick(loss), same, beside)
    # float16 rounds the length of the rows: the logits of the positives and of the others have the same error
    assert abs(found[0].item() - torch.tensor({"simclr": 15.0, "clip": 8.0, "moco": 9.0}[loss]).log().item()) < 1e-4 / tau
    assert all(x.isfinite().all() for x in found)
    if loss != "moco":
        found = value_and_gradients(pick(loss), [same[0], -same[1], *same[2:]], beside)
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_loss_is_negative(loss, dtype):
    """Equal views, far from all others, at temperature 0.01: the loss vanishes, and its rounding must not go below 0."""
    for seed in range(20):
        x = unit(8, 128, seed=seed, dtype=dtype)
        arguments = {"simclr": (x, x, 0.01), "clip": (x, x, 100.0), "moco": (x, x, unit(8, 128, seed=99, dtype=dtype), 0.01)}
        assert pick(loss)(*arguments[loss]) >= 0


# Many processes.

def on_process(loss, tensors, rest):
    """This process's share of the rows -> its loss and the gradients, which are still to be averaged over processes."""
    import torch.distributed as dist
    n = len(tensors[0]) // dist.get_world_size()
    rows = slice(dist.get_rank() * n, (dist.get_rank() + 1) * n)

    def share(part, mine):
        return [x[rows] if torch.is_tensor(x) and x.ndim and mine(i) else x for i, x in enumerate(part)]
    return value_and_gradients(pick(loss), share(tensors, lambda i: True), share(rest, lambda i: loss == "moco" and i == 0))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_average_over_processes_is_the_global_loss_and_gradient(processes, world, loss, tau):
    tensors, rest = inputs(loss, 6, 16, tau, 11)
    exact = value_and_gradients(pick(loss, reference=True), tensors, rest)
    found = processes(world, on_process, loss, tensors, rest)
    torch.testing.assert_close(sum(f[0] for f in found) / world, exact[0], rtol=1e-12, atol=1e-12)
    for i, x in enumerate(tensors, 1):  # DistributedDataParallel divides by world
        total = torch.cat([f[i] for f in found]) / world if x.ndim else sum(f[i] for f in found) / world
        torch.testing.assert_close(total, exact[i], rtol=1e-11, atol=1e-11)


def in_a_group(loss, tensors, rest):
    """The same on a group of processes 1 and 2 of three; process 0 has a group of its own."""
    import torch.distributed as dist
    groups = [dist.new_group(ranks) for ranks in ([0], [1, 2])]
    mine = groups[dist.get_rank() > 0]
    rows = slice(None) if dist.get_rank() == 0 else slice(3 * dist.get_rank() - 3, 3 * dist.get_rank())
    return value_and_gradients(lambda *x: pick(loss)(*x, group=mine), [x[rows] if x.ndim else x for x in tensors], rest)


@pytest.mark.parametrize("loss", ["simclr", "clip"])
def test_a_group_of_processes(processes, loss):
    tensors, rest = inputs(loss, 6, 16, 0.1)
    exact = value_and_gradients(pick(loss, reference=True), tensors, rest)
    alone, *pair = processes(3, in_a_group, loss, tensors, rest)
    for i, e in enumerate(exact):
        torch.testing.assert_close(alone[i], e, rtol=1e-11, atol=1e-11)
        found = torch.cat([f[i] for f in pair]) / 2 if e.ndim else (pair[0][i] + pair[1][i]) / 2
        torch.testing.assert_close(found, e, rtol=1e-11, atol=1e-11)


class Towers(torch.nn.Module):
    """Two projections and a learned scale, as CLIP has them, returning the loss."""
    def __init__(self):
        super().__init__()
        self.x, self.y = (torch.nn.Linear(5, 16, bias=False, dtype=torch.float64) for _ in range(2))
        self.log_scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        for i, p in enumerate(self.parameters()):
            p.data = unit(16, 5, seed=i) if p.ndim else p.data

    def forward(self, a, b):
        return clip_loss(F.normalize(self.x(a), dim=1), F.normalize(self.y(b), dim=1), self.log_scale.exp())


def step_under_ddp(a, b):
    """Gradients after DistributedDataParallel has averaged them."""
    import torch.distributed as dist
    rows = slice(dist.get_rank() * 3, dist.get_rank() * 3 + 3)
    model = torch.nn.parallel.DistributedDataParallel(Towers())
    model(a[rows], b[rows]).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("world", [2, 3])
def test_every_parameter_and_the_scale_under_ddp(processes, world):
    """Different data on each process; features, weights and the scale get what one process with all data gives them."""
    a, b, whole = unit(3 * world, 5, seed=8), unit(3 * world, 5, seed=9), Towers()
    whole(a, b).backward()
    for found in processes(world, step_under_ddp, a, b):
        for f, p in zip(found, whole.parameters(), strict=True):
            assert p.grad.abs().max() > 1e-3
            torch.testing.assert_close(f, p.grad, rtol=1e-11, atol=1e-12)


def unequal_rows():
    import torch.distributed as dist
    z = unit(3 + dist.get_rank(), 16)  # of two views
    with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match=r"equally many rows, not \[6, 8\]"):
        simclr_loss(z, z, 0.1)


def test_unequal_rows_are_found_when_debugging(processes):
    processes(2, unequal_rows)


# Integration.

def compiled_on_process(loss, tensors, rest):
    compiled = torch.compile(pick(loss), fullgraph=True, backend="aot_eager")
    import torch.distributed as dist
    rows = slice(dist.get_rank() * 3, dist.get_rank() * 3 + 3)
    part = [x[rows] if x.ndim else x for x in tensors]
    return value_and_gradients(compiled, part, rest), value_and_gradients(pick(loss), part, rest)


@pytest.mark.parametrize("loss", ["simclr", "clip"])
def test_compile_in_one_graph_with_two_processes(processes, loss):
    """The collectives, too, are in the graph."""
    for found, plain in processes(2, compiled_on_process, loss, *inputs(loss, 6, 16, 0.1, dtype=torch.float32)):
        for f, e in zip(found, plain, strict=True):
            torch.testing.assert_close(f, e)


def test_without_triton():
    """A machine that has none takes the PyTorch path, and says so."""
    code = """import sys; sys.modules["triton"] = None
import torch; from kernels import infonce, mae_mask, path, sinkhorn
z = torch.eye(4)
print(infonce.simclr_loss(z, z, 1.0).item(), sinkhorn.sinkhorn(z).sum().item(), mae_mask.random_masking(2, 4, 1)[0].shape)
print(path(torch.device("cuda")))"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=infonce.__file__.rsplit("/", 2)[0])
    assert "triton is not installed" in found.stdout, found.stderr


@pytest.mark.parametrize("loss", LOSSES)
def test_compile_in_one_graph(loss):
    tensors, rest = inputs(loss, 8, 16, 0.1, 12, dtype=torch.float32)
    compiled = torch.compile(pick(loss), fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(compiled, tensors, rest), value_and_gradients(pick(loss), tensors, rest), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(loss):
    tensors, rest = inputs(loss, 8, 16, 0.1, 12, dtype=torch.float32)
    plain = value_and_gradients(pick(loss), tensors, rest)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, value_and_gradients(pick(loss), tensors, rest), strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_operators_pass_torchs_own_check(loss):
    """Fake tensors, registration of autograd and schema, by opcheck of PyTorch."""
    x, y, scale = unit(6, 16, dtype=torch.float32), unit(9, 16, seed=1, dtype=torch.float32), torch.tensor(10.0)
    lse_x, lse_y = torch.full((6,), 5.0), torch.full((9,), 5.0)
    x.requires_grad_()
    checks = {"simclr": [(infonce.lse_op, (x.detach(), y, scale, False, 9)),
                         (infonce.contrast_op, (x, y, y[:6], lse_x, lse_y, scale.requires_grad_(), False, 9, 1.0))],
              "clip": [(infonce.pull_op, (x.detach(), y, lse_x, lse_y, scale.detach(), True, 9)),
                       (infonce.clip_op, (x, y[:6], scale, True)),
                       (infonce.clip_op, (x.detach(), y[:6], scale.detach(), False))],
              "moco": [(infonce.moco_op, (x, y[:6], y, scale.detach()))]}
    for operator, arguments in checks[loss]:
        library.opcheck(operator, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivative_is_refused(loss):
    tensors, rest = inputs(loss, 4, 16, 0.1)
    tensors = [x.requires_grad_() for x in tensors]
    gradient, *_ = torch.autograd.grad(pick(loss)(*tensors, *rest), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("call, error, words", [
    (lambda z: simclr_loss(z, z.numpy(), 0.1), TypeError, "z2 must be"),
    (lambda z: simclr_loss(z, z.long(), 0.1), TypeError, "z2 must be"),
    (lambda z: simclr_loss(z, z[:3], 0.1), ValueError, "same number of rows"),
    (lambda z: simclr_loss(z, z[:, :3], 0.1), ValueError, "shape"),
    (lambda z: simclr_loss(z[:0], z[:0], 0.1), ValueError, "shape"),
    (lambda z: simclr_loss(z, z.double(), 0.1), ValueError, "one dtype"),
    (lambda z: simclr_loss(z, z, 0.0), ValueError, "temperature must be"),
    (lambda z: simclr_loss(z, z, float("nan")), ValueError, "temperature must be"),
    (lambda z: clip_loss(z, z, torch.ones(2)), ValueError, "scale must be"),
    (lambda z: clip_loss(z, z, torch.tensor(3)), ValueError, "scale must be one floating-point"),
    (lambda z: clip_loss(z, z, 171), ValueError, "scale must be at most 170, not 171"),
    (lambda z: simclr_loss(z, z, torch.tensor(0.1)), ValueError, "temperature must be a number"),
    (lambda z: moco_loss(z, z[:2], z, 0.1), ValueError, "same number of rows"),
    (lambda z: moco_loss(z, z, z[None], 0.1), ValueError, "queue"),
])
def test_bad_input_is_one_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call(unit(4, 8, dtype=torch.float32))


def test_rows_not_normalised_and_a_great_scale_are_found_when_debugging():
    z = unit(4, 8, dtype=torch.float32)
    with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match="rows of z2 must have length 1"):
        simclr_loss(z, 2 * z, 0.1)
    with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match="scale must be at most 170, not 171"):
        clip_loss(z, z, torch.tensor(171.0))


def test_against_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    a, b = unit(12, 16, seed=1), unit(12, 16, seed=2)
    other = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.1))

    def ours(x, y):  # it normalises inside, so that its gradient has no part along the embedding
        return simclr_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), 0.1)

    for f, e in zip(value_and_gradients(ours, [a, b], []), value_and_gradients(other, [a, b], []), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


def test_padding_adds_zeros_only():
    x = unit(3, 20)
    assert padded(x).shape == (3, 32) and torch.equal(padded(x)[:, :20], x) and not padded(x)[:, 20:].any()
    assert padded(x[:, :16]).shape == (3, 16) and padded(x[:, :3]).shape == (3, 16)


# Machine code, without a GPU.

def compiled_kernels():
    for arch, wide, large in itertools.product((80, 90), (False, True), (0, 1)):
        for kind in ("*fp16", "*bf16") if arch == 90 and not large else ("*fp16",):
            D, rows, sizes = (128, 256)[large], {"x": kind, "y": kind}, dict.fromkeys(("R", "C", "first", "per"), "i32")
            for mean in (False, True) if wide else (False,):
                tiles = dict((infonce.MEAN_TILES if mean else infonce.LSE_TILES)[large])
                yield Spec("kernels.infonce", "lse_kernel",
                           {**rows, "scale": "*fp32", "lse": "*fp32", "mean": "*fp32", **sizes},
                           {"D": D, "BM": tiles["BM"], "BN": tiles["BN"], "WIDE": wide, "MEAN": mean}, arch,
                           tiles["num_warps"], tiles["num_stages"])
            tiles = infonce.PULL_TILES[large]
            yield Spec("kernels.infonce", "pull_kernel",
                       {**rows, "wx": "*fp32", "wy": "*fp32", "scale": "*fp32", "out": "*fp32", **sizes},
                       {"D": D, "BM": tiles["BM"], "BN": tiles["BN"], "WIDE": wide}, arch, tiles["num_warps"],
                       tiles["num_stages"])


def test_machine_code():
    """No register is spilled, the shared memory can be had, products run on tensor cores, and a logit costs one power of two:
    the online maximum adds none."""
    pytest.importorskip("triton")
    specs = list(compiled_kernels())
    for spec, report in zip(specs, compile_ahead(specs), strict=True):
        assert report.stack == 0, spec
        assert report.shared <= SHARED_LIMIT[spec.arch], spec
        assert report.count("HGMMA" if spec.arch == 90 else "HMMA") > 0, spec
        assert spec.arch == 80 or report.count("HMMA") == 0, spec
        elements = spec.constexprs["BM"] * spec.constexprs["BN"] / (32 * spec.num_warps)  # of a tile, for each thread
        assert len(report.loops) == 2, spec  # over the tiles without masks, and with them
        for loop in range(2):
            assert report.count("MUFU.EX2", loop) == elements, spec


@pytest.mark.parametrize("n", [5, 900])  # one block of logits, and two
@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_clip_without_gradients_is_the_same_value(n, tau):
    (x, y, scale), _ = inputs("clip", n, 16, tau)
    exact = clip_reference(x, y, scale)
    torch.testing.assert_close(clip_loss(x, y, scale), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(clip_loss(x, y, 1 / tau), exact, rtol=1e-12, atol=1e-12)  # a number
    torch.testing.assert_close(clip_loss(x.requires_grad_(), y, scale), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [1, 2])
def test_gradient_of_a_scale_of_zero(processes, world):
    """All candidates count alike: the loss is log n, and falls with the scale."""
    tensors, _ = inputs("clip", 6, 16, 0.1)
    tensors[2] = torch.zeros((), dtype=torch.float64)
    exact = value_and_gradients(clip_reference, tensors, [])
    found = processes(world, on_process, "clip", tensors, [])
    assert exact[3] < 0
    torch.testing.assert_close(sum(f[3] for f in found) / world, exact[3], rtol=1e-12, atol=1e-12)


def test_which_path_runs_is_said():
    assert "need a CUDA device" in path(torch.device("cpu"))
    assert "up to 256 dimensions, not 512" in path(torch.device("cuda"), 512)
    pytest.importorskip("triton")
    assert path(torch.device("cuda"), 256).startswith("Triton ")
