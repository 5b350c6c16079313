"""kernels/sinkhorn.py: assignments and cross-entropy of both implementations, PyTorch and Triton (interpreted where there is no
GPU), against the official loop in float64; the operators in autograd, torch.compile and several processes; the machine code."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import library

import kernels.sinkhorn as sk
from kernels.sinkhorn import (
    assignment_cross_entropy,
    assignment_cross_entropy_reference,
    sinkhorn,
    sinkhorn_potentials,
    sinkhorn_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = {"rtol": 0, "atol": 1e-12}  # float64: some roundings of 1e-16 at exponents up to a few hundred
ROUNDING = 2**-24  # of float32, relative, half a unit in the last place
# The kernels mark padding by -1e38, which the interpreter notices when it becomes -inf.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning:triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["pytorch", "triton"])
def way(request, monkeypatch):
    """Runs a test with each implementation; float64 is always computed by PyTorch."""
    choose(request.param, monkeypatch.setattr)
    return request.param


def choose(way, setattr=setattr):
    if way == "triton":
        pytest.importorskip("triton")
    setattr(sk, "use_kernel", lambda *tensors: way == "triton" and all(t.dtype != torch.float64 for t in tensors))


def scores(B, K, seed=0, dtype=torch.float64, spread=0.3):
    """(B, K), like cosines of samples and prototypes; rows and columns differ in their level."""
    g = torch.Generator().manual_seed(seed)
    s = spread * (torch.randn(B, K, generator=g) + torch.randn(B, 1, generator=g) + torch.randn(1, K, generator=g))
    return s.to(dtype).to(DEVICE)


def official(s, epsilon, iterations, dtype=torch.float64):
    """distributed_sinkhorn of main_swav.py for one process: s (B, K) -> Q (B, K). r and c are the wanted sums."""
    Q = torch.exp(s.to(dtype) / epsilon).T  # (K, B)
    Q /= Q.sum()
    r, c = 1 / Q.shape[0], 1 / Q.shape[1]
    for _ in range(iterations):
        Q *= (r / Q.sum(1))[:, None]
        Q *= (c / Q.sum(0))[None, :]
    return (Q / Q.sum(0)).T


def logarithmic(s, epsilon, iterations):
    """The same in logarithms, in float64: for scores that overflow otherwise."""
    x = s.double() / epsilon
    for _ in range(iterations):
        x = x - x.logsumexp(0)
        x = x - x.logsumexp(1, keepdim=True)
    return x.exp()


def allowed(s, epsilon):
    """The absolute term for assignments (at most 1) in float32: an exponent s / epsilon is rounded when it is scaled to powers
    of 2, when log_v, and when log_u is added, which are as large, and once for each of them: 5 roundings, relative to Q."""
    return 5 * ROUNDING * (1 + s.abs().max().item() / epsilon)


# -------- Assignments --------------------------------------------------------------------------------------------------

def test_by_hand(way):
    """exp(s / epsilon) = [[1, 2], [3, 4]]. Columns: [[1/4, 1/3], [3/4, 2/3]]; rows: [[3, 4] / 7, [9, 8] / 17]. Once more."""
    for dtype, tolerance in [(torch.float64, 1e-15), (torch.float32, 1e-6)]:
        s = 0.1 * torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype, device=DEVICE).log()
        once, twice = (sinkhorn(s, 0.1, n).tolist() for n in (1, 2))
        assert once == [pytest.approx([3 / 7, 4 / 7], abs=tolerance), pytest.approx([9 / 17, 8 / 17], abs=tolerance)]
        assert twice == [pytest.approx([31 / 69, 38 / 69], abs=tolerance), pytest.approx([93 / 169, 76 / 169], abs=tolerance)]


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("B, K", [(1, 1), (1, 6), (6, 1), (5, 9), (31, 12)])
def test_float64_is_the_official_loop(B, K, iterations):
    s = scores(B, K)
    want = official(s, 0.1, iterations)
    torch.testing.assert_close(logarithmic(s, 0.1, iterations), want, **EXACT)  # the test's own two agree
    torch.testing.assert_close(sinkhorn_reference(s, 0.1, iterations), want, **EXACT)
    torch.testing.assert_close(sinkhorn(s, 0.1, iterations), want, **EXACT)
    log_u, log_v = sinkhorn_potentials(s, 0.1, iterations)
    torch.testing.assert_close((log_u[:, None] + s / 0.1 + log_v).exp(), want, **EXACT)
    assert log_u.shape == (B,) and log_v.shape == (K,) and abs(log_v.mean()) < 1e-12


@pytest.mark.parametrize("B, K, iterations, dtype", [
    (1, 1, 3, torch.float32), (3, 700, 3, torch.float16), (130, 6, 2, torch.bfloat16), (20, 300, 3, torch.float32),
    (20, 257, 1, torch.float16), (9, 33, 5, torch.bfloat16)], ids=str)
def test_error_at_most_twice_that_of_the_plain_loop(way, B, K, iterations, dtype):
    s = scores(B, K, dtype=dtype)
    exact, plain = official(s, 0.05, iterations), official(s, 0.05, iterations, torch.float32)
    limit = 2 * (plain - exact).abs().max().item() + allowed(s, 0.05)
    Q, (log_u, log_v) = sinkhorn(s, 0.05, iterations), sinkhorn_potentials(s, 0.05, iterations)
    assert Q.dtype == log_u.dtype == log_v.dtype == torch.float32 and not Q.requires_grad
    assert (Q - exact).abs().max() <= limit
    assert ((log_u[:, None].double() + s.double() / 0.05 + log_v.double()).exp() - exact).abs().max() <= limit


def test_two_runs_agree_bit_by_bit(way):
    s = scores(20, 30, dtype=torch.float16)
    assert torch.equal(sinkhorn(s), sinkhorn(s))
    assert all(map(torch.equal, sinkhorn_potentials(s), sinkhorn_potentials(s)))


@pytest.mark.parametrize("B, K, wide", [(130, 9, 8), (20, 300, 256), *(
    pytest.param(B, K, sk.WIDE, marks=pytest.mark.slow) for B, K in [(3, 16500), (9, 16384)])])
def test_rows_longer_than_the_registers(monkeypatch, B, K, wide):
    """Above WIDE the later column sums take two readings; at WIDE they still take one."""
    choose("triton", monkeypatch.setattr)
    monkeypatch.setattr(sk, "WIDE", wide)
    s = scores(B, K, dtype=torch.float16)
    assert (sinkhorn(s, 0.05, 2) - official(s, 0.05, 2)).abs().max() <= allowed(s, 0.05)


def test_not_contiguous(way):
    s = scores(7, 12, dtype=torch.float32)
    for view in (s.T, s[:, ::2]):
        assert torch.equal(sinkhorn(view), sinkhorn(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("iterations", [1, 3])
def test_sums(way, iterations):
    """Rows sum to 1. Before they were scaled to that for the last time, all columns had the same sum: with v as it is and u as
    one iteration less leaves it (1 before the first)."""
    s, rounding = scores(23, 40, dtype=torch.float32), allowed(scores(23, 40), 0.05)
    torch.testing.assert_close(sinkhorn(s, 0.05, iterations).sum(1), torch.ones(23, device=DEVICE), rtol=0, atol=rounding)
    log_v = sinkhorn_potentials(s, 0.05, iterations)[1].double()
    log_u = sinkhorn_potentials(s, 0.05, iterations - 1)[0].double() if iterations > 1 else s.new_zeros(23)
    columns = (log_u[:, None] + s.double() / 0.05 + log_v).logsumexp(0)
    assert columns.max() - columns.min() <= 2 * rounding


def test_what_may_be_shifted(way):
    """All scores, and all of a column, since v takes it up at once; not a row: the first column sums weigh rows alike."""
    s = (scores(10, 17) * 64).round() / 64  # multiples of 1/64, so that the shifts by whole numbers are exact in float32
    for dtype, epsilon in [(torch.float64, 0.05), (torch.float32, 0.05)]:
        x = s.to(dtype)
        columns = x + torch.arange(17, device=DEVICE) % 5
        atol = 2 * allowed(columns, epsilon) if dtype == torch.float32 else 1e-12
        for shifted in (x + 4, columns):
            torch.testing.assert_close(sinkhorn(shifted, epsilon), sinkhorn(x, epsilon), rtol=0, atol=atol)
        rows = x + torch.arange(10, device=DEVICE)[:, None] % 5 / 8
        assert (sinkhorn(rows, epsilon) - sinkhorn(x, epsilon)).abs().max() > 0.1


@pytest.mark.parametrize("spread", [3.0, 30.0, 1000.0])
def test_scores_that_overflow_the_official_loop(way, spread):
    """exp overflows in float32 above 88.7, these exponents reach 200 to 60000."""
    s = scores(21, 30, dtype=torch.float32, spread=spread)
    exact = logarithmic(s, 0.05, 3)
    assert not official(s, 0.05, 3, torch.float32).isfinite().all()
    Q, (log_u, log_v) = sinkhorn(s), sinkhorn_potentials(s)
    assert log_u.isfinite().all() and log_v.isfinite().all()
    assert (Q - exact).abs().max() <= allowed(s, 0.05)
    torch.testing.assert_close(Q.sum(1), torch.ones(21, device=DEVICE), rtol=0, atol=allowed(s, 0.05))
    assert (sinkhorn(s.double()) - exact).abs().max() < 1e-9


@pytest.mark.parametrize("value", [0.0, 7.0, -3e4])
def test_equal_scores_give_the_uniform_assignment(way, value):
    s = torch.full((6, 10), value, device=DEVICE)
    torch.testing.assert_close(sinkhorn(s), torch.full((6, 10), 0.1, device=DEVICE), rtol=0, atol=allowed(s, 0.05))


# -------- Cross-entropy with the assignment ----------------------------------------------------------------------------

def test_cross_entropy_by_hand(way):
    """Equal logits: log K whatever the target. Target [3, 4] / 7, [9, 8] / 17 (above) and softmax [1, 3] / 4 for both rows."""
    s = 0.1 * torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=DEVICE).log()
    potentials = sinkhorn_potentials(s, 0.1, 1)
    equal = assignment_cross_entropy(torch.full((2, 2), 5.0, device=DEVICE), s, *potentials, 0.1, 0.1)
    assert equal.item() == pytest.approx(math.log(2), abs=1e-6)
    z = torch.tensor([[0.0, 0.2 * math.log(3)], [1.0, 1.0 + 0.2 * math.log(3)]], device=DEVICE, requires_grad=True)
    loss = assignment_cross_entropy(z, s, *potentials, 0.2, 0.1)
    loss.backward()
    first, second = (q * math.log(4) + (1 - q) * math.log(4 / 3) for q in (3 / 7, 9 / 17))
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-6)
    # (softmax - q) / (temperature B), in units of 1 / 0.4
    bracket = torch.tensor([[1 / 4 - 3 / 7, 3 / 4 - 4 / 7], [1 / 4 - 9 / 17, 3 / 4 - 8 / 17]])
    torch.testing.assert_close(0.4 * z.grad.cpu(), bracket, rtol=0, atol=1e-6)


def test_gradcheck_and_what_gets_no_gradient():
    s, z = scores(4, 6), scores(4, 6, seed=1).requires_grad_()
    log_u, log_v = sinkhorn_potentials(s, 0.1)
    assert torch.autograd.gradcheck(lambda z: assignment_cross_entropy(z, s, log_u, log_v, 0.3, 0.1), z)
    targets = [t.clone().requires_grad_() for t in (s, log_u, log_v)]
    assignment_cross_entropy(z, *targets, 0.3, 0.1).backward()
    assert all(t.grad is None for t in targets) and z.grad is not None
    assert not any(t.requires_grad for t in sinkhorn_potentials(targets[0]))
    torch.testing.assert_close(assignment_cross_entropy(z, s, log_u, log_v, 0.3, 0.1),
                               assignment_cross_entropy_reference(z, s, log_u, log_v, 0.3, 0.1), **EXACT)


@pytest.mark.parametrize("z_dtype, s_dtype", [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("B, K", [(1, 1), (3, 2500), (8, 300)])
def test_cross_entropy_error_at_most_twice_that_of_plain(way, B, K, z_dtype, s_dtype):
    s = scores(B, K, dtype=s_dtype)
    log_u, log_v = sinkhorn_potentials(s)
    student = scores(B, K, seed=2, dtype=z_dtype)

    def value_and_gradient(function, dtype):
        z = student.detach().to(dtype).requires_grad_()
        p = (t.to(torch.float64 if dtype == torch.float64 else torch.float32) for t in (log_u, log_v))
        loss = function(z, s, *p, 0.1, 0.05)
        loss.backward()
        return loss.double(), z.grad

    exact, exact_grad = value_and_gradient(assignment_cross_entropy_reference, torch.float64)
    plain, plain_grad = value_and_gradient(assignment_cross_entropy_reference, z_dtype)
    loss, grad = value_and_gradient(assignment_cross_entropy, z_dtype)
    assert loss.dtype == torch.float64 and grad.dtype == z_dtype
    # The absolute term as for assignments, of a sum of terms q x with x = z / temperature up to the same size.
    size = student.abs().max().item() / 0.1 + math.log(K)
    assert (loss - exact).abs() <= 2 * (plain - exact).abs() + allowed(s, 0.05) * (1 + size)
    # The gradient is rounded to the dtype of z twice, the plain one once. Triton's interpreter cuts bfloat16 off where a GPU
    # rounds it: the first of the two is then as large as 2^-7.
    cut = 2**-7 if (way, z_dtype, DEVICE.type) == ("triton", torch.bfloat16, "cpu") else 0
    error, plain_error = ((g.double() - exact_grad).norm() for g in (grad, plain_grad))
    assert error <= 2 * plain_error + cut * exact_grad.norm() + allowed(s, 0.05) / (0.1 * B)
    assert torch.equal(value_and_gradient(assignment_cross_entropy, z_dtype)[1], grad)


def test_small_gradients_keep_their_digits_in_float16(way):
    """Of K = 16384 equal logits each has softmax 2^-14 and a gradient of that size: the bracket as such would be subnormal. The
    loss is scaled, as it is in training with float16."""
    B, K = 2, 16384
    s = scores(B, K, spread=0.1).half()
    log_u, log_v = sinkhorn_potentials(s.double())
    z = torch.zeros(B, K, dtype=torch.float16, device=DEVICE, requires_grad=True)
    (assignment_cross_entropy(z, s, log_u, log_v) * 2**12).backward()
    q = (log_u[:, None] + s.double() / 0.05 + log_v).exp()
    exact = (1 / K - q) / (0.1 * B) * 2**12
    assert (z.grad.double() - exact).norm() <= 2 * 2**-11 * exact.norm()  # two roundings to float16, each 2^-11 at most


# -------- Autograd, autocast, torch.compile -----------------------------------------------------------------------------

def step(z, s):
    log_u, log_v = sinkhorn_potentials(s, 0.05, 3)
    return assignment_cross_entropy(z, s, log_u, log_v, 0.1, 0.05) + sinkhorn(s, 0.05, 3).square().mean()


def test_compile_and_autocast(way):
    """The whole step is one graph; aot_eager traces all that the default backend does, without generating machine code. The
    operators compute in float32 whatever autocast says."""
    s = scores(6, 11, dtype=torch.float32)
    z = scores(6, 11, seed=3, dtype=torch.float32).requires_grad_()
    want = step(z, s)
    grad, = torch.autograd.grad(want, z)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(z, s)
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], grad, rtol=0, atol=1e-6)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = step(z, s)
    assert torch.equal(cast, want) and torch.equal(torch.autograd.grad(cast, z)[0], grad)


def test_operators_pass_opcheck(way):
    """The checks that PyTorch itself has for operators: schemas, fake tensors, autograd registration."""
    z, s = (scores(4, 7, seed, torch.float32) for seed in (0, 1))
    log_u, log_v = sinkhorn_potentials(s)
    library.opcheck(sk.cross_entropy_op, (z.clone().requires_grad_(), s, log_u, log_v, 0.1, 0.05),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    if way == "triton":
        library.opcheck(sk.rows_op, (s, log_v, 0.05, True), test_utils=("test_schema", "test_faketensor"))
        library.opcheck(sk.columns_op, (s, log_v, 0.05), test_utils=("test_schema", "test_faketensor"))


def test_second_derivative_is_an_error(way):
    s, z = scores(3, 5, dtype=torch.float32), scores(3, 5, seed=1, dtype=torch.float32).requires_grad_()
    loss = assignment_cross_entropy(z, s, *sinkhorn_potentials(s))
    grad, = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_bad_input():
    s = scores(3, 5, dtype=torch.float32)
    log_u, log_v = sinkhorn_potentials(s)
    for error, message, call in [
            (TypeError, "scores must be a float16, .* not torch.int64", lambda: sinkhorn(s.long())),
            (TypeError, "scores must be .* not list", lambda: sinkhorn([1.0])),
            (ValueError, r"scores must have shape \(B, K\), K > 0, not \(3,\)", lambda: sinkhorn(s[:, 0])),
            (ValueError, r"not \(3, 0\)", lambda: sinkhorn(s[:, :0])),
            (ValueError, "epsilon must be positive and iterations at least 1, not 0 and 3", lambda: sinkhorn(s, 0)),
            (ValueError, "not 0.05 and 0", lambda: sinkhorn_potentials(s, 0.05, 0)),
            (ValueError, r"teacher_scores must have shape \(3, 4\), not \(3, 5\)",
             lambda: assignment_cross_entropy(s[:, :4], s, log_u, log_v)),
            (ValueError, r"log_u must have shape \(3,\), not \(5,\)", lambda: assignment_cross_entropy(s, s, log_v, log_u)),
            (ValueError, "temperature and epsilon must be positive, not -1 and 0.05",
             lambda: assignment_cross_entropy(s, s, log_u, log_v, -1)),
            (ValueError, "on one device", lambda: assignment_cross_entropy(s.to("meta"), s, log_u, log_v))]:
        with pytest.raises(error, match=message):
            call()


# -------- Several processes ----------------------------------------------------------------------------------------------

def in_process(way, s, sizes, dtype):
    """Rank r has sizes[r] rows of s (B, K), and a student of its own. -> Q, log_u, log_v, loss, its gradient."""
    choose(way)
    rank, start = dist.get_rank(), sum(sizes[:dist.get_rank()])
    s = s[start:start + sizes[rank]].to(dtype)
    log_u, log_v = sinkhorn_potentials(s, 0.05, 4)
    z = s.sin().requires_grad_()
    loss = assignment_cross_entropy(z, s, log_u, log_v)
    loss.backward()
    return sinkhorn(s, 0.05, 4), log_u, log_v, loss.detach(), z.grad


@pytest.mark.parametrize("sizes", [(9,), (5, 4), (9, 0), (3, 3, 3), (2, 0, 7)], ids=str)
def test_processes_with_different_rows_equal_one(processes, sizes):
    s = scores(9, 14).cpu()
    want = logarithmic(s, 0.05, 4)
    for way, dtype, atol in [("pytorch", torch.float64, 1e-12), ("triton", torch.float32, allowed(s, 0.05))]:
        if way == "triton" and DEVICE.type == "cuda":
            continue  # gloo processes have CPU tensors, which kernels take only where they are interpreted
        rows = processes(len(sizes), in_process, way, s, sizes, dtype)
        Q, log_u = (torch.cat([row[i] for row in rows]).double() for i in (0, 1))
        torch.testing.assert_close(Q, want, rtol=0, atol=atol)
        torch.testing.assert_close((log_u[:, None] + s / 0.05 + rows[0][2]).exp().double(), want, rtol=0, atol=atol)
        assert all(torch.equal(row[2], rows[0][2]) for row in rows)
    if len(set(sizes)) == 1:  # the average over processes is then the gradient of the mean over all rows
        z = s.sin().requires_grad_()
        loss = assignment_cross_entropy_reference(z, s, *sinkhorn_potentials(s, 0.05, 4), 0.1, 0.05)
        loss.backward()
        rows = processes(len(sizes), in_process, "pytorch", s, sizes, torch.float64)
        torch.testing.assert_close(sum(row[3] for row in rows) / len(rows), loss.detach(), **EXACT)
        torch.testing.assert_close(torch.cat([row[4] for row in rows]) / len(rows), z.grad, **EXACT)


def in_group(s):
    """Ranks 0 and 1 form a group, rank 2 one of its own; each has 3 rows."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    return sinkhorn(s[3 * dist.get_rank():][:3], group=groups[dist.get_rank() // 2])


def test_group(processes):
    s = scores(9, 5).cpu()
    Q = torch.cat(processes(3, in_group, s))
    torch.testing.assert_close(Q[:6], official(s[:6], 0.05, 3), **EXACT)
    torch.testing.assert_close(Q[6:], official(s[6:], 0.05, 3), **EXACT)


def test_lightly_agrees():
    lightly = pytest.importorskip("lightly.loss.swav_loss")
    s = scores(12, 20)
    torch.testing.assert_close(sinkhorn(s), lightly.sinkhorn(s.clone(), iterations=3, epsilon=0.05, gather_distributed=False),
                               **EXACT)


# -------- The machine code, which needs no GPU -------------------------------------------------------------------------------

def test_machine_code():
    """For A100 and H100: nothing is spilled, shared memory suffices, each score costs as many powers of 2 (MUFU.EX2) as the
    formulas need in that reading, and numbers move 16 bytes at a time. Loops are those over parts of a row, or over rows."""
    pytest.importorskip("triton")
    from aot import SHARED_LIMIT, Spec, compile_ahead
    specs, wanted = [], []

    def add(kernel, types, constants, warps, numbers, powers, arch):
        signature = dict(zip(types.split()[::2], types.split()[1::2]))
        specs.append(Spec("kernels.sinkhorn", kernel, signature, constants, arch, warps))
        wanted.append([powers * numbers // (32 * warps)] if isinstance(powers, int) else
                      [p * numbers // (32 * warps) for p in powers])  # of a thread, in each loop

    for arch in (80, 90):
        for kind, K in (("fp16", 3000), ("fp32", 16384)):
            block = max(256, 1 << (K - 1).bit_length())
            add("visit_kernel", f"s *{kind} log_v *fp32 partial *fp32 B i32 scale fp32",
                {"K": K, "BLOCK": block, "STAGES": 3}, max(4, block // 1024), block, 1, arch)
        kind, K = "fp16", 3000
        add("columns_kernel", f"s *{kind} log_u *fp32 partial *fp32 B i32 scale fp32",
            {"K": K, "CHUNK": 128, "COLS": 256}, 4, 8 * 256, 1, arch)
        for assign, powers in ((True, [1, 1]), (False, [1])):
            add("rows_kernel", f"s *{kind} log_v *fp32 out *fp32 scale fp32",
                {"K": K, "BLOCK": 1024, "ASSIGN": assign}, 4, 1024, powers, arch)
        add("cross_entropy_kernel", f"z *{kind} s *{kind} log_u *fp32 log_v *fp32 loss *fp32 residual *{kind} z_scale fp32 "
            "s_scale fp32", {"K": K, "BLOCK": 1024}, 4, 1024, [2, 2], arch)  # target and softmax, in either reading
    for spec, report, powers in zip(specs, compile_ahead(specs), wanted):
        assert report.stack == 0 and report.shared <= SHARED_LIMIT[spec.arch], spec
        assert [report.count("MUFU.EX2", loop) for loop in range(len(report.loops))] == powers, spec
        copies = "LDGSTS" if spec.kernel == "visit_kernel" else "LDG"  # asynchronous to shared memory, or direct
        for loop in range(len(report.loops)):
            assert report.count(copies + ".128", loop) > 0, spec
            # Beside those: log_u in the columns' loop, one number for a row.
            assert spec.kernel == "columns_kernel" or report.count(copies, loop) == report.count(copies + ".128", loop), spec
