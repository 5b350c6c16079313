"""InfoNCE: the kernels (interpreted where there is no GPU) and the PyTorch path against the
formulas, on one process and on several."""

import itertools
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from aot import SHARED_LIMIT, Spec, compile_ahead
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import implementation, infonce
from kernels.infonce import (
    bank_loss,
    bank_reference,
    clip_loss,
    clip_reference,
    moco_loss,
    moco_reference,
    padded,
    simclr_loss,
    simclr_reference,
)
from methods.instance_discrimination import softmax_loss
from methods.moco import info_nce
from methods.moco_v3 import ctr
from methods.simclr import nt_xent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSES = ("simclr", "clip", "moco", "bank")


def unit(*shape, seed=0, dtype=torch.float64, near=None):
    """Rows of length 1; close to those of `near`, if given, like two views of one image."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if near is not None:
        x = near + 0.5 * F.normalize(x, dim=1)
    return F.normalize(x, dim=1).to(dtype)


def inputs(loss, n, D, tau, C=None, dtype=torch.float64):
    """The arguments of the loss that may have a gradient, and its other arguments."""
    a = unit(n, D, seed=1)
    b = unit(n, D, seed=2, near=a).to(dtype)
    a = a.to(dtype)
    if loss == "simclr":
        return [a, b], [tau]
    if loss == "clip":
        scale = torch.tensor(1 / tau, dtype=torch.float64)
        return [a, b, scale.to(infonce.math_dtype(a))], []
    others = unit(C or n, D, seed=3, dtype=dtype)
    if loss == "moco":
        return [a], [b, others, tau]
    # The own rows of the queries stand anywhere among the others, in no order; the first two
    # queries share one.
    places = torch.randperm(n + len(others), generator=torch.Generator().manual_seed(4))
    own = places[:n].clone()
    own[1:2] = own[0]
    return [a], [torch.cat([b, others])[places.argsort()], own, tau]


def aligned(n, D, cosine):
    """Two views of n images, with this cosine between the two."""
    a = unit(n, D, seed=1)
    b = unit(n, D, seed=2)
    across = F.normalize(b - (a * b).sum(1, keepdim=True) * a, dim=1)
    return a, cosine * a + (1 - cosine**2) ** 0.5 * across


def relative(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def moved(part, to):
    """The tensors of a list on a device or in a dtype; numbers, and indices as to their dtype, stay
    as they are."""

    def move(x):
        floating = torch.is_tensor(x) and x.is_floating_point()
        index = torch.is_tensor(x) and not isinstance(to, torch.dtype)
        return x.to(to) if floating or index else x

    return [move(x) for x in part]


def value_and_gradients(function, tensors, rest):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*tensors, *rest)
    loss.backward()
    return [loss.detach(), *(x.grad for x in tensors)]


def pick(loss):
    return getattr(infonce, f"{loss}_loss")


def pick_reference(loss):
    return getattr(infonce, f"{loss}_reference")


# The references are the formulas of the methods' files, and differentiable as they should be.


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_references_are_the_formulas_of_the_methods(tau):
    a = unit(9, 16, seed=1)
    b = unit(9, 16, seed=2)
    queue = unit(31, 16, seed=3)
    close = dict(rtol=1e-12, atol=1e-12)

    assert_close(simclr_reference(a, b, tau), nt_xent(a, b, tau), **close)
    assert_close(moco_reference(a, b, queue, tau), info_nce(a, b, queue, tau), **close)
    own = torch.tensor([30, 2, 2, 0, 17, 5, 6, 29, 1])
    exact = bank_reference(a, queue, own, tau)
    assert_close(exact, softmax_loss(a, queue, own, tau), **close)
    assert_close(exact, ctr(a, queue, own, tau) / (2 * tau), **close)

    logits = a @ b.T / tau
    from_a = F.cross_entropy(logits, torch.arange(9))
    from_b = F.cross_entropy(logits.T, torch.arange(9))
    assert_close(clip_reference(a, b, 1 / tau), (from_a + from_b) / 2, **close)


@pytest.mark.parametrize("loss", LOSSES)
def test_references_pass_gradcheck(loss):
    tensors, rest = inputs(loss, 5, 6, 0.3)
    tensors = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: pick_reference(loss)(*x, *rest), tensors)


def test_by_hand():
    """Two images with orthogonal embeddings and equal views: each anchor has one candidate at
    cosine 1 and two at 0."""
    z = torch.eye(2, dtype=torch.float64)

    exact = torch.tensor(1 + 2 * torch.e**-2, dtype=torch.float64).log()  # -log e^2 / (e^2 + 2 e^0)
    assert_close(simclr_loss(z, z, 0.5), exact)

    exact = torch.tensor(1 + torch.e**-2, dtype=torch.float64).log()
    assert_close(clip_loss(z, z, 2.0), exact)

    log_2 = torch.tensor(2.0, dtype=torch.float64).log()
    assert_close(moco_loss(z, z, z.flip(0)[:1], 0.5), (exact + log_2) / 2)

    # the first row is right for the first query, and the wrong one for the second
    assert_close(bank_loss(z, z, torch.tensor([0, 0]), 0.5), exact + 1)


# The PyTorch path, in float64.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tau", [0.01, 0.0234, 0.1, 1.0])  # 1 / 0.0234 is just below 43
@pytest.mark.parametrize("n, D, C", [(1, 3, 1), (7, 16, 1), (13, 20, 57)])
def test_pytorch_path_equals_the_reference(loss, tau, n, D, C):
    """Both forms of the powers. Error: float64 rounding, times a condition of 1 / tau."""
    tensors, rest = inputs(loss, n, D, tau, C)
    exact = value_and_gradients(pick_reference(loss), tensors, rest)
    found = value_and_gradients(pick(loss), tensors, rest)
    for f, e in zip(found, exact, strict=True):
        assert_close(f, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_of_rows_change_nothing(loss, monkeypatch):
    tensors, rest = inputs(loss, 13, 20, 0.1, 57)
    whole = value_and_gradients(pick(loss), tensors, rest)
    monkeypatch.setattr(infonce, "rows_per_block", lambda x, y: 3)
    assert [len(s) for _, s in infonce.row_blocks(tensors[0], tensors[0])] == [3, 3, 3, 3, 1]
    blocks = value_and_gradients(pick(loss), tensors, rest)
    for a, b in zip(whole, blocks, strict=True):
        assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The branches for GPUs, also for CPU tensors: float32 rows are rounded."""
    monkeypatch.setattr(infonce, "on_gpu", lambda x: True)


@pytest.fixture
def cublas(monkeypatch, as_on_a_gpu):
    """The PyTorch path as on a GPU, whose products of 16 bits are summed in float32; the weights
    are rounded for them, too."""
    monkeypatch.setattr(infonce, "use_kernel", lambda x: False)

    def mm(a, b, out_dtype):
        assert a.dtype == b.dtype, "cuBLAS wants one dtype"
        return a.to(out_dtype) @ b.to(out_dtype)

    if DEVICE == "cpu":
        monkeypatch.setattr(infonce, "factors", lambda *rows: list(rows))
        monkeypatch.setattr(torch, "mm", mm)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cublas", [False, True])
def test_pytorch_path_of_16_bits(request, loss, tau, dtype, cublas):
    """Gradients within the rounding of their dtype; on a CPU, and as on a GPU."""
    if cublas:
        request.getfixturevalue("cublas")

    tensors, rest = inputs(loss, 13, 300, tau, 57, dtype=dtype)  # D = 300: not for the kernels
    if cublas:
        tensors = moved(tensors, DEVICE)
        rest = moved(rest, DEVICE)
    exact_inputs = moved(tensors, torch.float64), moved(rest, torch.float64)
    exact = value_and_gradients(pick_reference(loss), *exact_inputs)
    found = value_and_gradients(pick(loss), tensors, rest)

    # the value: roundings of a logit in float32
    assert found[0].dtype == torch.float32
    assert_close(found[0].double(), exact[0], rtol=0, atol=4 * 2**-23 / tau)

    # the gradients: their own rounding; with cublas also that of the probabilities, in sums that
    # are at most 1 / (tau n), or 1 for the scale
    for x, f, e in zip(tensors, found[1:], exact[1:], strict=True):
        assert f.dtype == x.dtype
        step = torch.finfo(dtype).eps * (2 / (tau * 13) if x.ndim else 2) * (1 if cublas else 0)
        rounding = torch.finfo(x.dtype).eps * e.abs().max()
        assert (f - e).abs().max() <= rounding + step + 4 * 2**-23 / tau**2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_of_the_pytorch_path_on_a_gpu(dtype):
    """With fake tensors, which are only checked, as if a GPU were there: cuBLAS's operator takes
    them, and sums in float32."""
    with FakeTensorMode():
        x = torch.empty(300, 512, dtype=dtype, device="cuda")
        y = torch.empty(900, 512, dtype=dtype, device="cuda")
        scale = torch.full((), 10.0, device="cuda")

        products = [product for _, product in infonce.row_blocks(x, y)]
        assert {(p.dtype, p.device.type) for p in products} == {(torch.float32, "cuda")}

        for large_scale in (False, True):
            lse_x = infonce.lse_torch(x, y, scale, large_scale, 0)
            lse_y = infonce.lse_torch(y, x, scale, large_scale, 900)
            grad = infonce.grad_torch(x, y, lse_x, lse_y, scale, large_scale, 0)
            assert lse_x.dtype == grad.dtype == torch.float32
            assert (grad.shape, grad.device.type) == (x.shape, "cuda")
        assert [out.dtype for out in infonce.mean_torch(x, y, scale)] == [torch.float32] * 2


def test_types_of_float32_rows_on_a_gpu(monkeypatch):
    """Fake tensors again, on one of two processes: float32 rows travel as float16 and get a float32
    gradient; rows given in float16 get theirs in float16."""
    sent = []

    def all_gather(out, x, group):
        assert out.shape == (2 * len(x), *x.shape[1:]) and out.dtype == x.dtype
        sent.append(x.dtype)

    monkeypatch.setattr(infonce, "processes", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    for name in ("all_gather_single", "all_gather_into_tensor"):  # of new and old versions of torch
        monkeypatch.setattr(dist, name, all_gather, raising=False)
    half, single = torch.float16, torch.float32

    with FakeTensorMode():
        for D, dtype in itertools.product((128, 512), (half, single)):
            x = torch.empty(30, D, dtype=dtype, device="cuda")
            sent.clear()
            assert simclr_loss(x, x, 0.1).dtype == single
            assert sent == [half, single]  # the rows and their lse
            sent.clear()
            assert clip_loss(x, x, 10.0).dtype == single
            assert sent == [half, half, single, single]
            scale = x.new_full((), 10.0, dtype=single)
            value, gradient = infonce.moco_op(x, x, x, scale, None)
            assert value.dtype == gradient.dtype == single

            # autograd cannot be asked without a GPU
            y = torch.empty(120, D, dtype=half, device="cuda")
            lse = y.new_empty(120, dtype=single)
            scale = lse.new_full((), 10.0)
            for views in (1, 2):
                ctx = SimpleNamespace(
                    saved_tensors=(x, y, y[:30], lse[:30], lse, scale),
                    options=(False, 30, views, 1.0),
                    needs_input_grad=[True] * 6,
                )
                gradients = infonce.contrast_backward(ctx, lse.new_empty(()))
                assert (gradients[0].dtype, gradients[0].shape) == (dtype, x.shape)
                assert (gradients[5].dtype, gradients[5].shape) == (single, ())


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


@pytest.mark.parametrize("n", [5, 900])  # one block of logits, and two
@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_clip_without_gradients_is_the_same_value(n, tau):
    (x, y, scale), _ = inputs("clip", n, 16, tau)
    exact = clip_reference(x, y, scale)
    close = dict(rtol=1e-12, atol=1e-12)
    assert_close(clip_loss(x, y, scale), exact, **close)
    assert_close(clip_loss(x, y, 1 / tau), exact, **close)  # a number
    assert_close(clip_loss(x.requires_grad_(), y, scale), exact, **close)


# The kernels.


@pytest.fixture
def kernels(monkeypatch):
    """Kernels also for CPU tensors, by Triton's interpreter, with tiles so small that a few rows
    make several of them."""
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        monkeypatch.setattr(infonce, "on_gpu", lambda x: True)
        monkeypatch.setattr(infonce, "use_kernel", lambda x: True)
        # float32 is not rounded, for it shows errors that float16 hides
        monkeypatch.setattr(infonce, "rounded", lambda x: x)
        little = dict(BM=32, BN=16, num_warps=4, num_stages=2)
        for name in ("LSE_TILES", "MEAN_TILES", "BANK_TILES", "GRAD_TILES"):
            monkeypatch.setattr(infonce, name, [little] * 2)
        monkeypatch.setattr(infonce, "SIMPLE_TILES", little)
    return monkeypatch


CASES = [(1, 16, 5), (33, 20, 64), (49, 130, 70)]  # ragged rows, columns and widths
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE == "cuda")


@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize("R, D, C", CASES)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_kernels_and_pytorch_find_the_log_sum_exp(kernels, tau, R, D, C, diagonal, dtype):
    """lse_kernel_simple, lse_kernel and lse_torch against the formula in float64, on the same
    rounded inputs. Error: four roundings of a logit, which is at most 1 / tau, in float32."""
    x = unit(R, D, seed=1, dtype=dtype).to(DEVICE)
    y = unit(C, D, seed=2, dtype=dtype).to(DEVICE)
    scale = torch.tensor(1 / tau, device=DEVICE)
    first = C - R if diagonal else C  # the last row meets itself in the last column, or none does

    logits = scale.double() * x.double() @ y.double().T
    logits.diagonal(first).fill_(-torch.inf)
    exact = logits.logsumexp(1)

    large_scale = 1 / tau > infonce.MAX_SCALE_PLAIN
    found = {
        "lse_kernel_simple": infonce.lse_simple(x, y, scale, first),
        "lse_kernel": infonce.lse_op(x, y, scale, large_scale, first),
        "lse_kernel with a maximum": infonce.lse_op(x, y, scale, True, first),
        "lse_torch": infonce.lse_torch(x, y, scale, large_scale, first),
    }
    for name, lse in found.items():
        assert lse.dtype == torch.float32
        error = (lse - exact).abs().max()
        assert error <= 4 * torch.finfo(torch.float32).eps / tau, name


def test_simple_kernel_of_a_row_without_candidates_is_minus_infinity(kernels):
    x = unit(1, 16, dtype=torch.float32).to(DEVICE)
    lse = infonce.lse_simple(x, x, torch.tensor(10.0, device=DEVICE), 0)
    assert lse.item() == -torch.inf


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize("n, D, C", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_is_as_exact_as_plain_pytorch(kernels, loss, tau, n, D, C, dtype):
    """Against float64 on the same inputs, rounded as they enter products: at most twice the error
    of plain PyTorch at the working precision, which is float32 for values and, for gradients,
    float32 rounded to the inputs' dtype once more. The absolute term is four roundings: for values
    of a logit, up to 1 / tau in float32; for gradients of a probability, by the dtype in which the
    inputs enter products (as float32 has it, by its logit), in a sum of probabilities times unit
    rows, times 1 / (tau n); for the gradient of the scale, without this factor."""
    tensors, rest = inputs(loss, n, D, tau, C, dtype=dtype)
    tensors = moved(tensors, DEVICE)
    rest = moved(rest, DEVICE)

    def entering(part):
        return [infonce.rounded(x) if torch.is_tensor(x) and x.ndim else x for x in part]

    def reference_in(to):
        inside = moved(entering(tensors), to), moved(entering(rest), to)
        return value_and_gradients(pick_reference(loss), *inside)

    exact = reference_in(torch.float64)
    plain = reference_in(torch.float32)
    found = value_and_gradients(pick(loss), tensors, rest)

    of_a_logit = 4 * torch.finfo(torch.float32).eps / tau
    assert found[0].dtype == torch.float32
    assert (found[0] - exact[0]).abs() <= 2 * (plain[0] - exact[0]).abs() + of_a_logit

    of_a_probability = max(4 * torch.finfo(entering(tensors)[0].dtype).eps, of_a_logit)
    for x, f, p, e in zip(tensors, found[1:], plain[1:], exact[1:], strict=True):
        assert f.dtype == x.dtype and f.shape == x.shape
        small = of_a_probability / (tau * n) if x.ndim else of_a_probability
        assert (f - e).abs().max() <= 2 * (p.to(x.dtype) - e).abs().max() + small


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tau, bound", [(0.05, 0.1), (0.1, 0.002)])
@pytest.mark.parametrize("path, n, D", [
    ("kernels", 64, 32),
    ("cublas", 256, 32),
    pytest.param("cublas", 2048, 128, marks=pytest.mark.thorough),
])  # fmt: skip
def test_float32_rows_get_a_true_gradient(request, monkeypatch, loss, tau, bound, path, n, D):
    """Against float64 without any rounding, of views with a cosine of 0.96. At temperature 0.05 the
    loss, and so 1 minus the probability of a positive, is 5e-5 to 5e-4: less than a step of
    float16, and less than 100 roundings of a logit of 20 in float32, the error that is left."""
    rounded = infonce.rounded
    request.getfixturevalue(path)
    monkeypatch.setattr(infonce, "rounded", rounded)  # float32, too

    a, b = aligned(n, D, 0.96)
    tensors, rest = {
        "simclr": ([a, b], [tau]),
        "clip": ([a, b], [1 / tau]),
        "moco": ([a], [b, unit(2 * n, D, seed=3), tau]),
        "bank": ([a], [torch.cat([unit(n, D, seed=3), b]), torch.arange(n, 2 * n), tau]),
    }[loss]
    exact = value_and_gradients(pick_reference(loss), tensors, rest)
    tensors = moved(moved(tensors, torch.float32), DEVICE)
    rest = moved(moved(rest, torch.float32), DEVICE)
    found = value_and_gradients(pick(loss), tensors, rest)
    for f, e in zip(found[1:], exact[1:], strict=True):
        assert f.dtype == torch.float32
        assert relative(f.cpu(), e) < bound

    if n == 2048 and tau == 0.05:  # a gradient in float16 is far worse: a third of it is 0
        tensors = moved(tensors, torch.float16)
        rest = moved(rest, torch.float16)
        _, in_float16, *_ = value_and_gradients(pick(loss), tensors, rest)
        assert (in_float16 == 0).double().mean() > 0.2
        assert relative(in_float16.cpu(), exact[1]) > 5 * relative(found[1].cpu(), exact[1])


@pytest.mark.parametrize("processors", [pytest.param(1, marks=pytest.mark.thorough), 7])
def test_splits_of_the_columns(kernels, processors):
    """The same numbers from any number of splits, with the diagonal in the first, a middle or the
    last one."""
    x = unit(48, 16, seed=1, dtype=torch.float32)
    y = unit(200, 16, seed=2, dtype=torch.float32)
    scale = torch.tensor(10.0)
    assert infonce.plan(x, y, 32, 16)[0][0] == 2

    def plan(x, y, BM, BN):
        tiles = -(-len(y) // BN)
        per_split = max(1, tiles // processors)
        return (-(-len(x) // BM), -(-tiles // per_split)), per_split

    kernels.setattr(infonce, "plan", plan)
    for first, large_scale in itertools.product((0, 70, 152, 200), (False, True)):
        lse = infonce.lse_torch(x, y, scale, large_scale, first)
        found = infonce.lse_op(x, y, scale, large_scale, first)
        assert_close(found, lse, rtol=1e-6, atol=1e-6)

        lse_y = infonce.lse_torch(y, x, scale, large_scale, len(x))
        arguments = (x, y, lse, lse_y, scale, large_scale, first)
        exact = infonce.grad_torch(*arguments)
        assert_close(infonce.grad_op(*arguments), exact, rtol=1e-5, atol=1e-6)

    lse, mean = infonce.lse_and_mean(x, y, scale)
    exact_lse, exact_mean = infonce.mean_torch(x, y, scale)
    assert_close(lse, exact_lse, rtol=1e-6, atol=1e-6)
    assert_close(mean, exact_mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("D, C", [(16, 33), (130, 65)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_split_without_any_other_column(kernels, D, C, dtype):
    """One tile of 16 columns per split, and the last one has a single column: the own one of some
    rows. To the others it counts. Against the formula, and with the weight of such a split."""
    if DEVICE == "cuda":
        pytest.skip("tiles of 16 columns are not used on a GPU")
    kernels.setattr(infonce, "plan", lambda x, y, BM, BN: ((-(-len(x) // BM), -(-len(y) // BN)), 1))
    q = unit(40, D, seed=1, dtype=dtype)
    bank = unit(C, D, seed=2, dtype=dtype)
    own = torch.arange(40) % 3 * (C - 1) // 2  # the first, the middle and the last row
    scale = torch.tensor(10.0)

    logits = 10 * q.double() @ bank.double().T
    logits.scatter_(1, own[:, None], -torch.inf)
    lse, mean = infonce.lse_and_mean(q, bank, scale, own)
    # four roundings of a logit of 10, and of a probability as it enters the product
    step = 4 * torch.finfo(torch.float32).eps * 10
    assert_close(lse.double(), logits.logsumexp(1), rtol=0, atol=step)
    step = max(step, 4 * torch.finfo(dtype).eps)
    assert_close(mean.double(), logits.softmax(1) @ bank.double(), rtol=0, atol=step)


def one_row(dtype):
    """Two queries, and a bank that has only the row of both."""
    q = unit(2, 16, dtype=dtype).to(DEVICE)
    own = torch.zeros(2, dtype=torch.long, device=DEVICE)
    value, gradient = value_and_gradients(bank_loss, [q], [q[:1].clone(), own, 0.01])
    assert value == 0 and gradient.shape == q.shape and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_bank_of_one_row_costs_nothing(dtype):
    one_row(dtype)


def test_kernel_of_a_bank_of_one_row(kernels):
    for dtype in DTYPES:
        one_row(dtype)


@pytest.mark.parametrize("loss", LOSSES)
def test_two_runs_are_equal_bit_for_bit(kernels, loss):
    tensors, rest = inputs(loss, 33, 20, 0.1, 64, dtype=torch.float16)
    tensors = moved(tensors, DEVICE)
    rest = moved(rest, DEVICE)
    one = value_and_gradients(pick(loss), tensors, rest)
    two = value_and_gradients(pick(loss), tensors, rest)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_collapsed_and_opposite_embeddings_are_finite(kernels, loss, tau):
    """All rows equal: the loss is that of a guess, log of the number of candidates."""
    tensors, rest = inputs(loss, 8, 16, tau, 8, dtype=torch.float16)
    one = unit(1, 16, dtype=torch.float16).to(DEVICE)
    same = [one.expand(8, 16).clone() if x.ndim else x.to(DEVICE) for x in tensors]
    for i, x in enumerate(moved(rest, DEVICE)):
        rows = torch.is_tensor(x) and x.ndim == 2
        rest[i] = one.expand(x.shape).clone() if rows else x
    found = value_and_gradients(pick(loss), same, rest)

    # float16 rounds the length of the rows: the logits of the positives and of the others have the
    # same error
    candidates = {"simclr": 15.0, "clip": 8.0, "moco": 9.0, "bank": 16.0}
    guess = torch.tensor(candidates[loss]).log()
    assert abs(found[0].item() - guess.item()) < 1e-4 / tau
    assert all(x.isfinite().all() for x in found)

    if loss in ("simclr", "clip"):
        found = value_and_gradients(pick(loss), [same[0], -same[1], *same[2:]], rest)
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_loss_is_negative(loss, dtype):
    """Equal views, far from all others, at temperature 0.01: the loss vanishes, and its rounding
    must not go below 0."""
    for seed in range(20):
        x = unit(8, 128, seed=seed, dtype=dtype)
        arguments = {
            "simclr": (x, x, 0.01),
            "clip": (x, x, 100.0),
            "moco": (x, x, unit(8, 128, seed=99, dtype=dtype), 0.01),
            "bank": (x, x, torch.arange(8), 0.01),
        }
        assert pick(loss)(*arguments[loss]) >= 0


# Several processes.


def on_process(loss, tensors, rest):
    """The loss of this process's share of the rows, and the gradients, which are still to be
    averaged over processes."""
    n = len(tensors[0]) // dist.get_world_size()
    rows = slice(dist.get_rank() * n, (dist.get_rank() + 1) * n)
    tensors = [x[rows] if x.ndim else x for x in tensors]
    if loss == "moco":  # the keys are shared out, the queue is not
        rest = [rest[0][rows], *rest[1:]]
    if loss == "bank":  # it is the same on all processes
        rest = [rest[0], rest[1][rows], rest[2]]
    return value_and_gradients(pick(loss), tensors, rest)


def on_process_with_gpu(*arguments):
    """The same by the branches for GPUs, which take the positives apart."""
    with mock.patch.object(infonce, "on_gpu", lambda x: True):
        return on_process(*arguments)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize("run", [on_process, on_process_with_gpu])
def test_average_over_processes_is_the_global_loss_and_gradient(processes, world, loss, tau, run):
    tensors, rest = inputs(loss, 6, 16, tau, 11)
    exact = value_and_gradients(pick_reference(loss), tensors, rest)
    found = processes(world, run, loss, tensors, rest)
    assert_close(sum(f[0] for f in found) / world, exact[0], rtol=1e-12, atol=1e-12)
    for i, x in enumerate(tensors, 1):
        parts = [f[i] for f in found]
        total = torch.cat(parts) if x.ndim else sum(parts)
        # DistributedDataParallel divides by world
        assert_close(total / world, exact[i], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("world", [1, 2])
def test_gradient_of_a_scale_of_zero(processes, world):
    """All candidates count alike: the loss is log n, and falls with the scale."""
    tensors, _ = inputs("clip", 6, 16, 0.1)
    tensors[2] = torch.zeros((), dtype=torch.float64)
    exact = value_and_gradients(clip_reference, tensors, [])
    found = processes(world, on_process, "clip", tensors, [])
    assert exact[3] < 0
    assert_close(sum(f[3] for f in found) / world, exact[3], rtol=1e-12, atol=1e-12)


def in_a_group(loss, tensors, rest):
    """The same on a group of processes 1 and 2 of three; process 0 has a group of its own."""
    alone = dist.new_group([0])
    pair = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        group = alone
        rows = slice(None)
    else:
        group = pair
        rows = slice(3 * dist.get_rank() - 3, 3 * dist.get_rank())
    tensors = [x[rows] if x.ndim else x for x in tensors]
    return value_and_gradients(lambda *x: pick(loss)(*x, group=group), tensors, rest)


@pytest.mark.parametrize("loss", ["simclr", "clip"])
def test_a_group_of_processes(processes, loss):
    tensors, rest = inputs(loss, 6, 16, 0.1)
    exact = value_and_gradients(pick_reference(loss), tensors, rest)
    alone, one, two = processes(3, in_a_group, loss, tensors, rest)
    for i, e in enumerate(exact):
        assert_close(alone[i], e, rtol=1e-11, atol=1e-11)
        total = torch.cat([one[i], two[i]]) if e.ndim else one[i] + two[i]
        assert_close(total / 2, e, rtol=1e-11, atol=1e-11)


class Towers(torch.nn.Module):
    """Two projections and a learned scale, as CLIP has them, returning the loss."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Linear(5, 16, bias=False, dtype=torch.float64)
        self.y = torch.nn.Linear(5, 16, bias=False, dtype=torch.float64)
        self.log_scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        for i, p in enumerate(self.parameters()):
            p.data = unit(16, 5, seed=i) if p.ndim else p.data

    def forward(self, a, b):
        x = F.normalize(self.x(a), dim=1)
        y = F.normalize(self.y(b), dim=1)
        return clip_loss(x, y, self.log_scale.exp())


def step_under_ddp(a, b):
    """Gradients after DistributedDataParallel has averaged them."""
    rows = slice(dist.get_rank() * 3, dist.get_rank() * 3 + 3)
    model = torch.nn.parallel.DistributedDataParallel(Towers())
    model(a[rows], b[rows]).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("world", [2, 3])
def test_every_parameter_and_the_scale_under_ddp(processes, world):
    """Different data on each process; features, weights and the scale get what one process with
    all data gives them."""
    a = unit(3 * world, 5, seed=8)
    b = unit(3 * world, 5, seed=9)
    whole = Towers()
    whole(a, b).backward()
    for found in processes(world, step_under_ddp, a, b):
        for f, p in zip(found, whole.parameters(), strict=True):
            assert p.grad.abs().max() > 1e-3
            assert_close(f, p.grad, rtol=1e-11, atol=1e-12)


def unequal_rows():
    z = unit(3 + dist.get_rank(), 16)  # of two views
    sentence = r"equally many rows, not \[6, 8\]"
    with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match=sentence):
        simclr_loss(z, z, 0.1)


def test_unequal_rows_are_found_when_debugging(processes):
    processes(2, unequal_rows)


# Integration.


def compiled_on_process(loss, tensors, rest):
    compiled = torch.compile(pick(loss), fullgraph=True, backend="aot_eager")
    rows = slice(dist.get_rank() * 3, dist.get_rank() * 3 + 3)
    part = [x[rows] if x.ndim else x for x in tensors]
    return value_and_gradients(compiled, part, rest), value_and_gradients(pick(loss), part, rest)


def compiled_on_process_with_gpu(*arguments):
    with mock.patch.object(infonce, "on_gpu", lambda x: True):
        return compiled_on_process(*arguments)


@pytest.mark.parametrize("loss, run", [
    ("simclr", compiled_on_process),
    ("clip", compiled_on_process),
    ("simclr", compiled_on_process_with_gpu),
])  # fmt: skip
def test_compile_in_one_graph_with_two_processes(processes, loss, run):
    """The collectives, too, are in the graph."""
    tensors, rest = inputs(loss, 6, 16, 0.1, dtype=torch.float32)
    for found, plain in processes(2, run, loss, tensors, rest):
        for f, e in zip(found, plain, strict=True):
            assert_close(f, e)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gpu", [False, True])
def test_compile_in_one_graph(request, loss, gpu):
    if gpu:
        request.getfixturevalue("as_on_a_gpu")
    tensors, rest = inputs(loss, 8, 16, 0.1, 12, dtype=torch.float32)
    compiled = torch.compile(pick(loss), fullgraph=True, backend="aot_eager")
    found = value_and_gradients(compiled, tensors, rest)
    plain = value_and_gradients(pick(loss), tensors, rest)
    for a, b in zip(found, plain, strict=True):
        assert_close(a, b)

    # the check of the rows is in the graph, with its own error
    with pytest.raises(ValueError, match="rows of length 1: normalise first"):
        compiled(2 * tensors[0], *tensors[1:], *rest)


def test_without_triton():
    """A machine that has none takes the PyTorch path, and says so."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from kernels import implementation, infonce, mae_mask, sinkhorn
z = torch.eye(4)
print(infonce.simclr_loss(z, z, 1.0).item())
print(sinkhorn.sinkhorn(z).sum().item())
print(mae_mask.random_masking(2, 4, 1)[0].shape)
print(implementation(torch.device("cuda")))
"""
    root = infonce.__file__.rsplit("/", 2)[0]
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert "triton is not installed" in found.stdout, found.stderr


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(loss):
    tensors, rest = inputs(loss, 8, 16, 0.1, 12, dtype=torch.float32)
    plain = value_and_gradients(pick(loss), tensors, rest)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(pick(loss), tensors, rest)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_operators_pass_torchs_own_check(loss):
    """Fake tensors, registration of autograd and schema, by opcheck of PyTorch."""
    x = unit(6, 16, dtype=torch.float32).requires_grad_()
    y = unit(9, 16, seed=1, dtype=torch.float32)
    lse_x = torch.full((6,), 5.0)
    lse_y = torch.full((9,), 5.0)
    scale = torch.tensor(10.0)
    learned = scale.clone().requires_grad_()
    checks = {
        "simclr": [
            (infonce.lse_op, (x.detach(), y, scale, False, 9)),
            (infonce.contrast_op, (x, y, y[:6], lse_x, lse_y, learned, False, 0, 2, 1.0)),
        ],
        "clip": [
            (infonce.grad_op, (x.detach(), y, lse_x, lse_y, scale, True, 9)),
            (infonce.clip_op, (x, y[:6], learned, True)),
            (infonce.clip_op, (x.detach(), y[:6], scale, False)),
        ],
        "moco": [(infonce.moco_op, (x, y[:6], y, scale, None))],
        "bank": [(infonce.moco_op, (x, y[:6], y, scale, torch.arange(6)))],
    }
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, arguments in checks[loss]:
        library.opcheck(operator, arguments, test_utils=utils)


@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivative_is_refused(loss):
    tensors, rest = inputs(loss, 4, 16, 0.1)
    tensors = [x.requires_grad_() for x in tensors]
    value = pick(loss)(*tensors, *rest)
    gradient, *_ = torch.autograd.grad(value, tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.square().sum().backward()


# What the losses refuse.


@pytest.mark.parametrize("call, error, words", [
    (lambda z: simclr_loss(z, z.numpy(), 0.1), TypeError, "z2 must be"),
    (lambda z: simclr_loss(z, z.long(), 0.1), TypeError, "z2 must be"),
    (lambda z: simclr_loss(z, z[:3], 0.1), ValueError, "same number of rows"),
    (lambda z: simclr_loss(z, z[:, :3], 0.1), ValueError, "shape"),
    (lambda z: simclr_loss(z[:0], z[:0], 0.1), ValueError, "shape"),
    (lambda z: simclr_loss(z, z.double(), 0.1), ValueError, "one dtype"),
    (lambda z: simclr_loss(z, z, 0.0), ValueError, "temperature must be"),
    (lambda z: simclr_loss(z, z, float("nan")), ValueError, "temperature must be"),
    (lambda z: simclr_loss(z, z, torch.tensor(0.1)), ValueError, "temperature must be a number"),
    (lambda z: clip_loss(z, z, torch.ones(2)), ValueError, "scale must be"),
    (lambda z: clip_loss(z, z, torch.tensor(3)), ValueError, "scale must be one floating-point"),
    (lambda z: clip_loss(z, z, 171), ValueError, "scale must be at most 170, not 171"),
    (lambda z: moco_loss(z, z[:2], z, 0.1), ValueError, "same number of rows"),
    (lambda z: moco_loss(z, z, z[None], 0.1), ValueError, "queue"),
    (lambda z: bank_loss(z, z, [0, 1, 2, 3], 0.1), TypeError, "own must be an int64 tensor"),
    (lambda z: bank_loss(z, z, torch.ones(4), 0.1), TypeError, "own must be an int64 tensor"),
    (lambda z: bank_loss(z, z, torch.arange(3), 0.1), ValueError, "q and own must have the same"),
    (lambda z: bank_loss(z, z, torch.arange(1, 5), 0.1), IndexError, "out of range"),
    (lambda z: bank_loss(z, z, torch.arange(4) - 1, 0.1), IndexError, "out of range"),
    (lambda z: bank_loss(z, z[:, :3], torch.arange(4), 0.1), ValueError, "bank is"),
    (lambda z: bank_loss(z, z, torch.arange(4), 0.001), ValueError, "temperature must be"),
])  # fmt: skip
def test_bad_input_is_one_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call(unit(4, 8, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("call", [
    lambda z, wrong: simclr_loss(wrong, z, 0.1),
    lambda z, wrong: simclr_loss(z, wrong, 0.1),
    lambda z, wrong: clip_loss(wrong, z, 10.0),
    lambda z, wrong: clip_loss(z.clone().requires_grad_(), wrong, 10.0),
    lambda z, wrong: moco_loss(wrong, z, z, 0.1),
    lambda z, wrong: moco_loss(z, wrong, z, 0.1),
    lambda z, wrong: bank_loss(wrong, z, torch.arange(6), 0.1),
    lambda z, wrong: bank_loss(z, wrong, torch.arange(6), 0.1),
])  # fmt: skip
def test_rows_that_are_not_normalised_are_refused(call, dtype):
    """One row of many is enough; too long or too short."""
    sentence = r"rows of length 1: normalise first, F.normalize\(z, dim=1\)"
    z = unit(6, 8, dtype=dtype)
    for factor in (2.0, 1.05, 0.9, 0.1, 1000.0):
        wrong = z.clone()
        wrong[3] *= factor
        with pytest.raises(ValueError, match=sentence):
            call(z, wrong)


def test_the_example_that_gave_infinity():
    z = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="normalise first"):
        simclr_loss(z, z + 0.1, 0.1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("D", [2, 128, 8192])
def test_rounded_rows_and_rows_of_zeros_are_allowed(loss, dtype, D):
    """Rows that are normalised and then rounded, or normalised in 16 bits; and a row of zeros,
    which is what F.normalize makes of zeros."""
    tensors, rest = inputs(loss, 64, D, 0.1, dtype=dtype)
    assert pick(loss)(*tensors, *rest).isfinite()

    x = F.normalize(37 * tensors[0], dim=1)  # all steps in dtype
    x[1] = F.normalize(torch.zeros(1, D), dim=1)
    assert not x[1].any()
    value, *gradients = value_and_gradients(pick(loss), [x, *tensors[1:]], rest)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in gradients)


def test_nan_is_left_to_show_in_the_loss():
    """A run that has diverged must not be told to normalise."""
    z = unit(4, 8)
    broken = z.clone()
    broken[2, 3] = torch.nan
    assert simclr_loss(broken, z, 0.1).isnan()
    assert clip_loss(broken, z, 10.0).isnan()
    assert moco_loss(broken, z, z, 0.1).isnan()
    assert bank_loss(broken, z, torch.arange(4), 0.1).isnan()
    assert bank_loss(z[:2], broken, torch.arange(2), 0.1).isnan()


def test_kernel_leaves_nan_to_show_in_the_loss(kernels):
    z = unit(4, 16, dtype=torch.float32).to(DEVICE)
    own = torch.arange(2, device=DEVICE)
    broken = z.clone()
    broken[2, 3] = torch.nan
    assert bank_loss(z[:2], z, own, 0.1).isfinite()
    assert bank_loss(z[:2], broken, own, 0.1).isnan()


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_moco_and_bank_are_right_for_rows_of_any_length(factor):
    """The queue is not checked, nor are the rows of a bank that no query has. Error: float64
    rounding of logits up to 50."""
    tensors, (k, queue, tau) = inputs("moco", 6, 16, 0.1, 11)
    rest = [k, factor * queue, tau]
    exact = value_and_gradients(moco_reference, tensors, rest)
    found = value_and_gradients(moco_loss, tensors, rest)
    for f, e in zip(found, exact, strict=True):
        assert_close(f, e, rtol=1e-11, atol=1e-11)

    tensors, (bank, own, tau) = inputs("bank", 6, 16, 0.1, 11)
    others = torch.ones(len(bank), dtype=torch.bool)
    others[own] = False
    bank[others] *= factor
    exact = value_and_gradients(bank_reference, tensors, [bank, own, tau])
    found = value_and_gradients(bank_loss, tensors, [bank, own, tau])
    for f, e in zip(found, exact, strict=True):
        assert_close(f, e, rtol=1e-11, atol=1e-11)


def test_kernel_of_moco_is_right_for_a_queue_of_any_length(kernels):
    x = unit(33, 16, seed=1, dtype=torch.float32).to(DEVICE)
    queue = 5 * unit(70, 16, seed=2, dtype=torch.float32).to(DEVICE)
    scale = torch.tensor(10.0, device=DEVICE)
    lse, mean = infonce.lse_and_mean(x, queue, scale)
    exact_lse, exact_mean = infonce.mean_torch(x, queue, scale)
    assert_close(lse, exact_lse, rtol=1e-6, atol=1e-6)
    assert_close(mean, exact_mean, rtol=1e-4, atol=1e-4)  # a logit of 50 is rounded by 4e-6


def test_the_check_of_rows_on_a_gpu_does_not_wait(monkeypatch):
    """With fake tensors, whose values cannot be asked for: to wait would raise an error. The
    assertion of the device gets the sentence; shown with its form for CPUs."""
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda *arguments: asserted.append(arguments))
    with FakeTensorMode():
        x = torch.empty(30, 16, dtype=torch.float16, device="cuda")
        infonce.require_unit_rows(x, x)
    assert [sentence for _, sentence in asserted] == [infonce.NOT_UNIT] * 2
    assert all((ok.dtype, ok.shape) == (torch.bool, ()) for ok, _ in asserted)
    monkeypatch.undo()

    z = unit(4, 8)
    torch._assert_async(~infonce.not_unit(z), infonce.NOT_UNIT)
    with pytest.raises(RuntimeError, match="normalise first"):
        torch._assert_async(~infonce.not_unit(2 * z), infonce.NOT_UNIT)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_wrong_row_on_a_gpu_ends_the_program_with_the_sentence():
    """In a process of its own, because a failed assertion of the device cannot be survived."""
    code = """
import torch
from kernels.infonce import simclr_loss
z = torch.randn(64, 128, device="cuda", dtype=torch.float16)
print(simclr_loss(z, z, 0.1).item())
"""
    root = infonce.__file__.rsplit("/", 2)[0]
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert found.returncode != 0
    assert infonce.NOT_UNIT in found.stderr


def test_when_debugging_the_argument_is_named_and_a_great_scale_is_found():
    z = unit(4, 8, dtype=torch.float32)
    with torch.autograd.set_detect_anomaly(True):
        with pytest.raises(ValueError, match="rows of z2 must have length 1"):
            simclr_loss(z, 2 * z, 0.1)
        with pytest.raises(ValueError, match="rows of queue must have length 1"):
            moco_loss(z, z, 2 * z, 0.1)
        with pytest.raises(ValueError, match="rows of bank must have length 1"):
            bank_loss(z, torch.cat([z, 2 * z]), torch.arange(4), 0.1)
        with pytest.raises(ValueError, match="scale must be at most 170, not 171"):
            clip_loss(z, z, torch.tensor(171.0))


def test_against_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    a = unit(12, 16, seed=1)
    b = unit(12, 16, seed=2)
    other = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.1))

    def ours(x, y):  # theirs normalises inside: its gradient has no part along the embedding
        return simclr_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), 0.1)

    found = value_and_gradients(ours, [a, b], [])
    exact = value_and_gradients(other, [a, b], [])
    for f, e in zip(found, exact, strict=True):
        assert_close(f, e, rtol=1e-9, atol=1e-9)


def test_padding_adds_zeros_only():
    x = unit(3, 20)
    assert padded(x).shape == (3, 32)
    assert torch.equal(padded(x)[:, :20], x)
    assert not padded(x)[:, 20:].any()
    wide = x[:, :16].contiguous()
    assert padded(wide) is wide  # nothing to add, nothing copied
    assert padded(x[:, :3]).shape == (3, 16)


# Machine code, without a GPU.

SIZES = dict.fromkeys(("R", "C", "first"), "i32")
NUMBERS = "*fp32"


def spec_of(kernel, kind, D, tiles, arch, pointers, sizes, **constants):
    signature = {"x_ptr": kind, "y_ptr": kind, **dict.fromkeys(pointers, NUMBERS), **sizes}
    constants = {"D": D, "BM": tiles["BM"], "BN": tiles["BN"], **constants}
    launch = (arch, tiles["num_warps"], tiles["num_stages"])
    return Spec("kernels.infonce", kernel, signature, constants, *launch)


def simple_kernel(arch):
    pointers = ("scale_ptr", "lse_ptr")
    tiles = infonce.SIMPLE_TILES
    return spec_of("lse_kernel_simple", "*fp16", 128, tiles, arch, pointers, SIZES)


def compiled_kernels(arch):
    """Every choice of constants that a launch can make, in float16; bfloat16 for some."""
    sizes = {**SIZES, "per_split": "i32"}
    for large_scale, wide_rows in itertools.product((False, True), (0, 1)):
        D = (128, 256)[wide_rows]
        for kind in ("*fp16", "*bf16") if arch == 90 and not wide_rows else ("*fp16",):
            for mean in (False, True) if large_scale else (False,):
                pointers = ("scale_ptr", "lse_ptr", "mean_ptr")
                for own in (False, True) if mean else (False,):
                    name = "BANK_TILES" if own else "MEAN_TILES" if mean else "LSE_TILES"
                    tiles = getattr(infonce, name)[wide_rows]
                    types = sizes | {"own_ptr": "*i32" if own else NUMBERS}
                    options = dict(LARGE_SCALE=large_scale, MEAN=mean, OWN=own)
                    yield spec_of("lse_kernel", kind, D, tiles, arch, pointers, types, **options)

            tiles = infonce.GRAD_TILES[wide_rows]
            pointers = ("wx_ptr", "wy_ptr", "scale_ptr", "out_ptr")
            options = dict(LARGE_SCALE=large_scale)
            yield spec_of("grad_kernel", kind, D, tiles, arch, pointers, sizes, **options)


@pytest.mark.thorough
@pytest.mark.parametrize("arch", [90, 80])
def test_machine_code(arch):
    """No register is spilled, the shared memory can be had, products run on tensor cores, and a
    logit costs one power of two: the online maximum adds none."""
    pytest.importorskip("triton")
    specs = [simple_kernel(arch), *compiled_kernels(arch)]
    for spec, report in zip(specs, compile_ahead(specs), strict=True):
        assert report.stack == 0, spec
        assert report.shared <= SHARED_LIMIT[arch], spec
        assert report.count("HGMMA" if arch == 90 else "HMMA") > 0, spec
        assert arch == 80 or report.count("HMMA") == 0, spec
        if spec.kernel == "lse_kernel_simple":
            continue  # it may be slow

        assert len(report.loops) == 2, spec  # over the tiles without masks, and with them
        threads = 32 * spec.num_warps
        per_thread = spec.constexprs["BM"] * spec.constexprs["BN"] / threads
        for loop in range(2):
            assert report.count("MUFU.EX2", loop) == per_thread, spec


def test_implementation_says_what_runs():
    assert "need a CUDA device" in implementation(torch.device("cpu"))
    assert "up to 256 dimensions, not 512" in implementation(torch.device("cuda"), 512)
    pytest.importorskip("triton")
    assert implementation(torch.device("cuda"), 256).startswith("Triton ")
