"""kernels/sinkhorn.py: assignments and cross-entropy of both implementations, PyTorch and Triton.

Both are compared with the official loop in float64; Triton is interpreted where there is no GPU.
Then the operators in autograd, torch.compile and several processes, and the machine code.
"""

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
EXACT = {"rtol": 0, "atol": 1e-12}  # float64: roundings of 1e-16 at exponents up to a few hundred
ROUNDING = 2**-24  # of float32, relative: half a unit in the last place

# The kernels mark padding by -1e38. The interpreter warns when it becomes -inf.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning:triton")


@pytest.fixture(params=["pytorch", "triton"])
def way(request, monkeypatch):
    """Runs a test with each implementation; float64 is always computed by PyTorch."""
    choose(request.param, monkeypatch.setattr)
    return request.param


def choose(way, setattr=setattr):
    if way == "triton":
        pytest.importorskip("triton")

    def use_kernel(*tensors):
        return way == "triton" and all(t.dtype != torch.float64 for t in tensors)

    setattr(sk, "use_kernel", use_kernel)


def thorough(*values):
    """A parameter set that repeats what others test already."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def scores(B, K, seed=0, dtype=torch.float64, spread=0.3):
    """(B, K), like cosines of samples and prototypes; rows and columns differ in their level."""
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(B, K, generator=g)
    s = s + torch.randn(B, 1, generator=g)
    s = s + torch.randn(1, K, generator=g)
    return (spread * s).to(dtype).to(DEVICE)


def scores_by_hand(**options):
    """exp(s / 0.1) = [[1, 2], [3, 4]]"""
    return 0.1 * torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=DEVICE, **options).log()


def official(s, epsilon, iterations, dtype=torch.float64):
    """distributed_sinkhorn of main_swav.py for one process: s (B, K) -> Q (B, K)."""
    Q = torch.exp(s.to(dtype) / epsilon).T  # (K, B)
    Q /= Q.sum()
    r = 1 / Q.shape[0]  # the wanted sum of a row
    c = 1 / Q.shape[1]
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


def from_potentials(s, epsilon, log_u, log_v):
    """Q (B, K), in float64."""
    x = s.double() / epsilon
    return (log_u[:, None].double() + x + log_v.double()).exp()


def allowed(s, epsilon):
    """The absolute error allowed for assignments (at most 1) in float32.

    An exponent s / epsilon is rounded when it is scaled to powers of 2, when log_v is added and
    when log_u is. These are as large, and rounded once each. In all 5 roundings, relative to Q."""
    return 5 * ROUNDING * (1 + s.abs().max().item() / epsilon)


# -------- Assignments -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-15), (torch.float32, 1e-6)])
def test_by_hand(way, dtype, tolerance):
    """exp(s / epsilon) = [[1, 2], [3, 4]]. The columns become [[1/4, 1/3], [3/4, 2/3]], the rows
    [[3, 4] / 7, [9, 8] / 17]. Then once more."""
    s = scores_by_hand(dtype=dtype)
    once = sinkhorn(s, 0.1, 1).tolist()
    assert once[0] == pytest.approx([3 / 7, 4 / 7], abs=tolerance)
    assert once[1] == pytest.approx([9 / 17, 8 / 17], abs=tolerance)
    twice = sinkhorn(s, 0.1, 2).tolist()
    assert twice[0] == pytest.approx([31 / 69, 38 / 69], abs=tolerance)
    assert twice[1] == pytest.approx([93 / 169, 76 / 169], abs=tolerance)


SIZES = [(1, 1), (1, 6), (6, 1), (5, 9), (31, 12)]  # B, K


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("B, K", SIZES)
def test_float64_is_the_official_loop(B, K, iterations):
    s = scores(B, K)
    want = official(s, 0.1, iterations)
    torch.testing.assert_close(logarithmic(s, 0.1, iterations), want, **EXACT)  # the test's own two
    torch.testing.assert_close(sinkhorn_reference(s, 0.1, iterations), want, **EXACT)
    torch.testing.assert_close(sinkhorn(s, 0.1, iterations), want, **EXACT)

    log_u, log_v = sinkhorn_potentials(s, 0.1, iterations)
    torch.testing.assert_close(from_potentials(s, 0.1, log_u, log_v), want, **EXACT)
    assert log_u.shape == (B,) and log_v.shape == (K,)
    assert abs(log_v.mean()) < 1e-12


@pytest.mark.parametrize(
    "B, K, iterations, dtype",
    [
        (1, 1, 3, torch.float32),
        (3, 700, 3, torch.float16),
        thorough(130, 6, 2, torch.bfloat16),
        thorough(20, 300, 3, torch.float32),
        thorough(20, 257, 1, torch.float16),
        (9, 33, 5, torch.bfloat16),
    ],
    ids=str,
)
def test_error_at_most_twice_that_of_the_plain_loop(way, B, K, iterations, dtype):
    s = scores(B, K, dtype=dtype)
    exact = official(s, 0.05, iterations)
    plain = official(s, 0.05, iterations, torch.float32)
    plain_error = (plain - exact).abs().max().item()
    limit = 2 * plain_error + allowed(s, 0.05)

    Q = sinkhorn(s, 0.05, iterations)
    assert Q.dtype == torch.float32 and not Q.requires_grad
    assert (Q - exact).abs().max() <= limit

    log_u, log_v = sinkhorn_potentials(s, 0.05, iterations)
    assert log_u.dtype == log_v.dtype == torch.float32
    assert (from_potentials(s, 0.05, log_u, log_v) - exact).abs().max() <= limit


def test_column_sums_of_several_chunks(monkeypatch):
    """130 rows are one chunk of columns_kernel and two rows of the next."""
    choose("triton", monkeypatch.setattr)
    s = scores(130, 6, dtype=torch.bfloat16)
    log_u = scores(130, 1, seed=1, dtype=torch.float32)[:, 0]
    sums = sk.log_column_sums(s, log_u, 0.05)
    exact = (s.double() / 0.05 + log_u[:, None].double()).logsumexp(0)
    assert (sums - exact).abs().max() <= allowed(s, 0.05)


def test_two_runs_agree_bit_by_bit(way):
    s = scores(5, 30, dtype=torch.float16)
    assert torch.equal(sinkhorn(s), sinkhorn(s))
    assert all(map(torch.equal, sinkhorn_potentials(s), sinkhorn_potentials(s)))


@pytest.mark.parametrize(
    "B, K, max_row",
    [
        (20, 300, 256),
        thorough(130, 9, 8),
        thorough(3, 16500, sk.MAX_ROW),
        thorough(9, 16384, sk.MAX_ROW),
    ],
)
def test_rows_longer_than_the_registers(monkeypatch, B, K, max_row):
    """Above MAX_ROW the later column sums take two readings; at MAX_ROW they still take one."""
    choose("triton", monkeypatch.setattr)
    monkeypatch.setattr(sk, "MAX_ROW", max_row)
    s = scores(B, K, dtype=torch.float16)
    error = sinkhorn(s, 0.05, 2) - official(s, 0.05, 2)
    assert error.abs().max() <= allowed(s, 0.05)


def test_not_contiguous(way):
    s = scores(4, 6, dtype=torch.float32)
    for view in (s.T, s[:, ::2]):
        copy = view.clone(memory_format=torch.contiguous_format)
        assert torch.equal(sinkhorn(view), sinkhorn(copy))


@pytest.mark.parametrize("iterations", [thorough(1), 3])
def test_sums(way, iterations):
    """Rows sum to 1. Before they were scaled to that for the last time, all columns had the same
    sum: with v as it is, and u as one iteration less leaves it (1 before the first)."""
    s = scores(11, 40, dtype=torch.float32)
    rounding = allowed(scores(11, 40), 0.05)
    rows = sinkhorn(s, 0.05, iterations).sum(1)
    torch.testing.assert_close(rows, torch.ones(11, device=DEVICE), rtol=0, atol=rounding)

    _, log_v = sinkhorn_potentials(s, 0.05, iterations)
    log_u = s.new_zeros(11)
    if iterations > 1:
        log_u, _ = sinkhorn_potentials(s, 0.05, iterations - 1)
    exponents = log_u[:, None].double() + s.double() / 0.05 + log_v.double()
    columns = exponents.logsumexp(0)
    assert columns.max() - columns.min() <= 2 * rounding


def test_what_may_be_shifted(way):
    """All scores may be shifted, and all of a column, since v takes it up at once. A row may not:
    the first column sums weigh all rows alike."""
    s = (scores(6, 17) * 64).round() / 64  # shifts by whole numbers are then exact in float32
    for dtype in (torch.float64, torch.float32):
        x = s.to(dtype)
        Q = sinkhorn(x, 0.05)
        columns = x + torch.arange(17, device=DEVICE) % 5
        atol = 2 * allowed(columns, 0.05) if dtype == torch.float32 else 1e-12
        for shifted in (x + 4, columns):
            torch.testing.assert_close(sinkhorn(shifted, 0.05), Q, rtol=0, atol=atol)
        rows = x + torch.arange(6, device=DEVICE)[:, None] % 5 / 8
        assert (sinkhorn(rows, 0.05) - Q).abs().max() > 0.1


@pytest.mark.parametrize("spread", [thorough(3.0), thorough(30.0), 1000.0])
def test_scores_that_overflow_the_official_loop(way, spread):
    """exp overflows in float32 above 88.7; these exponents reach 200 to 60000."""
    s = scores(9, 30, dtype=torch.float32, spread=spread)
    exact = logarithmic(s, 0.05, 3)
    assert not official(s, 0.05, 3, torch.float32).isfinite().all()

    log_u, log_v = sinkhorn_potentials(s)
    assert log_u.isfinite().all() and log_v.isfinite().all()
    Q = sinkhorn(s)
    rounding = allowed(s, 0.05)
    assert (Q - exact).abs().max() <= rounding
    torch.testing.assert_close(Q.sum(1), torch.ones(9, device=DEVICE), rtol=0, atol=rounding)
    assert (sinkhorn(s.double()) - exact).abs().max() < 1e-9


@pytest.mark.parametrize("value", [0.0, 7.0, -3e4])
def test_equal_scores_give_the_uniform_assignment(way, value):
    s = torch.full((6, 10), value, device=DEVICE)
    uniform = torch.full((6, 10), 0.1, device=DEVICE)
    torch.testing.assert_close(sinkhorn(s), uniform, rtol=0, atol=allowed(s, 0.05))


# -------- Cross-entropy with the assignment -------------------------------------------------------


def test_cross_entropy_by_hand(way):
    """Equal logits cost log K whatever the target is. Then the target [3, 4] / 7, [9, 8] / 17 (as
    above) and the softmax [1, 3] / 4 for both rows."""
    s = scores_by_hand()
    log_u, log_v = sinkhorn_potentials(s, 0.1, 1)
    z = torch.full((2, 2), 5.0, device=DEVICE)
    loss = assignment_cross_entropy(z, s, log_u, log_v, 0.1, 0.1)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)

    second = 0.2 * math.log(3)  # softmax([0, second] / 0.2) = [1, 3] / 4
    z = torch.tensor([[0.0, second], [1.0, 1.0 + second]], device=DEVICE, requires_grad=True)
    loss = assignment_cross_entropy(z, s, log_u, log_v, 0.2, 0.1)
    loss.backward()

    def row_loss(q):
        return q * math.log(4) + (1 - q) * math.log(4 / 3)

    want = (row_loss(3 / 7) + row_loss(9 / 17)) / 2
    assert loss.item() == pytest.approx(want, abs=1e-6)

    # (softmax - q) / (temperature B), in units of 1 / 0.4
    softmax = torch.tensor([1 / 4, 3 / 4])
    q = torch.tensor([[3 / 7, 4 / 7], [9 / 17, 8 / 17]])
    torch.testing.assert_close(0.4 * z.grad.cpu(), softmax - q, rtol=0, atol=1e-6)


def test_gradcheck_and_what_gets_no_gradient():
    s = scores(4, 6)
    z = scores(4, 6, seed=1).requires_grad_()
    log_u, log_v = sinkhorn_potentials(s, 0.1)

    def loss(z, s=s, log_u=log_u, log_v=log_v):
        return assignment_cross_entropy(z, s, log_u, log_v, 0.3, 0.1)

    assert torch.autograd.gradcheck(loss, z)

    targets = [t.clone().requires_grad_() for t in (s, log_u, log_v)]
    loss(z, *targets).backward()
    assert all(t.grad is None for t in targets) and z.grad is not None
    assert not any(t.requires_grad for t in sinkhorn_potentials(targets[0]))

    reference = assignment_cross_entropy_reference(z, s, log_u, log_v, 0.3, 0.1)
    torch.testing.assert_close(loss(z), reference, **EXACT)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "B, K, z_dtype, s_dtype",
    [
        (1, 1, F32, F32),
        (1, 1, F16, F16),
        (1, 1, BF16, BF16),
        (1, 1, F32, F16),
        thorough(8, 300, F32, F32),
        thorough(8, 300, F16, F16),
        (8, 300, BF16, BF16),
        thorough(8, 300, F32, F16),
        thorough(3, 2500, F32, F32),
        (3, 2500, F16, F16),
        thorough(3, 2500, BF16, BF16),
        thorough(3, 2500, F32, F16),
    ],
    ids=str,
)
def test_cross_entropy_error_at_most_twice_that_of_plain(way, B, K, z_dtype, s_dtype):
    s = scores(B, K, dtype=s_dtype)
    log_u, log_v = sinkhorn_potentials(s)
    student = scores(B, K, seed=2, dtype=z_dtype)

    def value_and_gradient(function, dtype):
        z = student.detach().to(dtype).requires_grad_()
        math_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        loss = function(z, s, log_u.to(math_dtype), log_v.to(math_dtype), 0.1, 0.05)
        loss.backward()
        return loss.double(), z.grad

    exact, exact_grad = value_and_gradient(assignment_cross_entropy_reference, torch.float64)
    plain, plain_grad = value_and_gradient(assignment_cross_entropy_reference, z_dtype)
    loss, grad = value_and_gradient(assignment_cross_entropy, z_dtype)
    assert loss.dtype == torch.float64 and grad.dtype == z_dtype

    # The absolute term is that of assignments, for a sum of terms q x with x = z / temperature up
    # to the same size.
    rounding = allowed(s, 0.05)
    size = student.abs().max().item() / 0.1 + math.log(K)
    plain_error = (plain - exact).abs()
    assert (loss - exact).abs() <= 2 * plain_error + rounding * (1 + size)

    # The gradient is rounded to the dtype of z twice, the plain one once. Triton's interpreter
    # truncates to bfloat16 where a GPU rounds: the first of the two is then as large as 2^-7.
    truncates = (way, z_dtype, DEVICE.type) == ("triton", torch.bfloat16, "cpu")
    cut = 2**-7 if truncates else 0
    error = (grad.double() - exact_grad).norm()
    plain_error = (plain_grad.double() - exact_grad).norm()
    assert error <= 2 * plain_error + cut * exact_grad.norm() + rounding / (0.1 * B)

    _, again = value_and_gradient(assignment_cross_entropy, z_dtype)
    assert torch.equal(again, grad)


def test_small_gradients_keep_their_digits_in_float16(way):
    """Each of K = 16384 equal logits has softmax 2^-14 and a gradient of that size, so the bracket
    as such would be subnormal. The loss is scaled, as it is in training with float16."""
    B, K = 2, 16384
    s = scores(B, K, spread=0.1).half()
    log_u, log_v = sinkhorn_potentials(s.double())
    z = torch.zeros(B, K, dtype=torch.float16, device=DEVICE, requires_grad=True)
    loss = assignment_cross_entropy(z, s, log_u, log_v)
    (loss * 2**12).backward()

    q = from_potentials(s, 0.05, log_u, log_v)
    exact = (1 / K - q) / (0.1 * B) * 2**12
    error = (z.grad.double() - exact).norm()
    assert error <= 2 * 2**-11 * exact.norm()  # two roundings to float16, each 2^-11 at most


# -------- Autograd, autocast, torch.compile -------------------------------------------------------


def step(z, s):
    log_u, log_v = sinkhorn_potentials(s, 0.05, 3)
    loss = assignment_cross_entropy(z, s, log_u, log_v, 0.1, 0.05)
    return loss + sinkhorn(s, 0.05, 3).square().mean()


@pytest.mark.parametrize("way", ["pytorch", thorough("triton")], indirect=True)
def test_compile_and_autocast(way):
    """The whole step is one graph; aot_eager traces all that the default backend does, without
    generating machine code. The operators compute in float32 whatever autocast says."""
    s = scores(6, 11, dtype=torch.float32)
    z = scores(6, 11, seed=3, dtype=torch.float32).requires_grad_()
    want = step(z, s)
    (grad,) = torch.autograd.grad(want, z)

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(z, s)
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-6)
    (compiled_grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(compiled_grad, grad, rtol=0, atol=1e-6)

    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = step(z, s)
    assert torch.equal(cast, want)
    (cast_grad,) = torch.autograd.grad(cast, z)
    assert torch.equal(cast_grad, grad)


def test_operators_pass_opcheck(way):
    """The checks that PyTorch itself has for operators: schemas, fake tensors, autograd."""
    z = scores(4, 7, 0, torch.float32)
    s = scores(4, 7, 1, torch.float32)
    log_u, log_v = sinkhorn_potentials(s)
    tests = ("test_schema", "test_faketensor")
    library.opcheck(
        sk.cross_entropy_op,
        (z.clone().requires_grad_(), s, log_u, log_v, 0.1, 0.05),
        test_utils=(*tests, "test_autograd_registration"),
    )
    if way == "triton":
        library.opcheck(sk.rows_op, (s, log_v, 0.05, True), test_utils=tests)
        library.opcheck(sk.columns_op, (s, log_v, 0.05), test_utils=tests)


def test_second_derivative_is_an_error(way):
    s = scores(3, 5, dtype=torch.float32)
    z = scores(3, 5, seed=1, dtype=torch.float32).requires_grad_()
    loss = assignment_cross_entropy(z, s, *sinkhorn_potentials(s))
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_bad_scores():
    s = scores(3, 5, dtype=torch.float32)
    with pytest.raises(TypeError, match="scores must be a float16, .* not torch.int64"):
        sinkhorn(s.long())
    with pytest.raises(TypeError, match="scores must be .* not list"):
        sinkhorn([1.0])
    with pytest.raises(ValueError, match=r"scores must have shape \(B, K\), K > 0, not \(3,\)"):
        sinkhorn(s[:, 0])
    with pytest.raises(ValueError, match=r"not \(3, 0\)"):
        sinkhorn(s[:, :0])
    message = "epsilon must be positive and iterations at least 1, not 0 and 3"
    with pytest.raises(ValueError, match=message):
        sinkhorn(s, 0)
    with pytest.raises(ValueError, match="not 0.05 and 0"):
        sinkhorn_potentials(s, 0.05, 0)


def test_bad_logits_and_potentials():
    s = scores(3, 5, dtype=torch.float32)
    log_u, log_v = sinkhorn_potentials(s)
    message = r"teacher_scores must have shape \(3, 4\), not \(3, 5\)"
    with pytest.raises(ValueError, match=message):
        assignment_cross_entropy(s[:, :4], s, log_u, log_v)
    with pytest.raises(ValueError, match=r"log_u must have shape \(3,\), not \(5,\)"):
        assignment_cross_entropy(s, s, log_v, log_u)
    message = "temperature and epsilon must be positive, not -1 and 0.05"
    with pytest.raises(ValueError, match=message):
        assignment_cross_entropy(s, s, log_u, log_v, -1)
    with pytest.raises(ValueError, match="on one device"):
        assignment_cross_entropy(s.to("meta"), s, log_u, log_v)


# -------- Several processes -----------------------------------------------------------------------


def in_process(way, s, sizes, dtype):
    """Rank r has sizes[r] rows of s (B, K), and a student of its own.

    -> Q, log_u, log_v, loss, its gradient."""
    choose(way)
    rank = dist.get_rank()
    start = sum(sizes[:rank])
    s = s[start : start + sizes[rank]].to(dtype)
    log_u, log_v = sinkhorn_potentials(s, 0.05, 4)
    z = s.sin().requires_grad_()
    loss = assignment_cross_entropy(z, s, log_u, log_v)
    loss.backward()
    return sinkhorn(s, 0.05, 4), log_u, log_v, loss.detach(), z.grad


@pytest.mark.parametrize(
    "sizes",
    [
        (4, 4),
        (9, 0),
        thorough((9,)),
        thorough((5, 4)),
        thorough((3, 3, 3)),
        thorough((2, 0, 7)),
    ],
    ids=str,
)
def test_processes_with_different_rows_equal_one(processes, sizes):
    s = scores(sum(sizes), 14).cpu()
    want = logarithmic(s, 0.05, 4)

    ways = [("pytorch", torch.float64, 1e-12)]
    if DEVICE.type == "cpu":  # gloo processes have CPU tensors, for kernels if interpreted
        ways.append(("triton", torch.float32, allowed(s, 0.05)))
    for way, dtype, atol in ways:
        results = processes(len(sizes), in_process, way, s, sizes, dtype)
        Q = torch.cat([result[0] for result in results]).double()
        log_u = torch.cat([result[1] for result in results])
        log_v = results[0][2]
        torch.testing.assert_close(Q, want, rtol=0, atol=atol)
        rebuilt = from_potentials(s, 0.05, log_u, log_v)
        torch.testing.assert_close(rebuilt, want, rtol=0, atol=atol)
        assert all(torch.equal(result[2], log_v) for result in results)

    if len(set(sizes)) > 1:
        return

    # With equally many rows, the average over processes is the gradient of the mean over all rows.
    z = s.sin().requires_grad_()
    log_u, log_v = sinkhorn_potentials(s, 0.05, 4)
    loss = assignment_cross_entropy_reference(z, s, log_u, log_v, 0.1, 0.05)
    loss.backward()
    results = processes(len(sizes), in_process, "pytorch", s, sizes, torch.float64)
    mean = torch.stack([result[3] for result in results]).mean()
    grad = torch.cat([result[4] for result in results]) / len(sizes)
    torch.testing.assert_close(mean, loss.detach(), **EXACT)
    torch.testing.assert_close(grad, z.grad, **EXACT)


def in_group(s, groups):
    """Each rank has 3 rows, and assigns them within its group."""
    rank = dist.get_rank()
    made = [dist.new_group(ranks) for ranks in groups]  # by all ranks, as new_group wants it
    (mine,) = [group for ranks, group in zip(groups, made) if rank in ranks]
    return sinkhorn(s[3 * rank :][:3], group=mine)


@pytest.mark.parametrize("groups", [[[0], [1]], thorough([[0, 1], [2]])], ids=str)
def test_group(processes, groups):
    world = sum(map(len, groups))
    s = scores(3 * world, 5).cpu()
    Q = torch.cat(processes(world, in_group, s, groups))
    for ranks in groups:
        rows = slice(3 * ranks[0], 3 * ranks[-1] + 3)
        torch.testing.assert_close(Q[rows], official(s[rows], 0.05, 3), **EXACT)


def test_lightly_agrees():
    lightly = pytest.importorskip("lightly.loss.swav_loss")
    s = scores(12, 20)
    theirs = lightly.sinkhorn(s.clone(), iterations=3, epsilon=0.05, gather_distributed=False)
    torch.testing.assert_close(sinkhorn(s), theirs, **EXACT)


# -------- The machine code, which needs no GPU ----------------------------------------------------


def visit_code(kind, K):
    """kernel, types of its arguments, constants, warps; numbers of an iteration, powers of each."""
    block = max(256, 1 << (K - 1).bit_length())
    types = {"s": f"*{kind}", "log_v": "*fp32", "partial": "*fp32", "B": "i32", "scale": "fp32"}
    constants = {"K": K, "BLOCK": block, "STAGES": 3}
    return "visit_kernel", types, constants, max(4, block // 1024), block, [1]


def columns_code(kind, K):
    types = {"s": f"*{kind}", "log_u": "*fp32", "partial": "*fp32", "B": "i32", "scale": "fp32"}
    constants = {"K": K, "CHUNK": 128, "COLS": 256}
    return "columns_kernel", types, constants, 4, 8 * 256, [1]


def rows_code(kind, K, assign):
    types = {"s": f"*{kind}", "log_v": "*fp32", "out": "*fp32", "scale": "fp32"}
    constants = {"K": K, "BLOCK": 1024, "ASSIGN": assign}
    return "rows_kernel", types, constants, 4, 1024, [1, 1] if assign else [1]


def cross_entropy_code(kind, K):
    types = {"z": f"*{kind}", "s": f"*{kind}", "log_u": "*fp32", "log_v": "*fp32", "loss": "*fp32"}
    types |= {"residual": f"*{kind}", "z_scale": "fp32", "s_scale": "fp32"}
    constants = {"K": K, "BLOCK": 1024}
    return "cross_entropy_kernel", types, constants, 4, 1024, [2, 2]  # target and softmax


CODES = {
    "visit fp16 3000": visit_code("fp16", 3000),
    "visit fp32 16384": visit_code("fp32", 16384),
    "columns": columns_code("fp16", 3000),
    "rows, assign": rows_code("fp16", 3000, True),
    "rows": rows_code("fp16", 3000, False),
    "cross-entropy": cross_entropy_code("fp16", 3000),
}


@pytest.mark.parametrize(
    "arch, names",
    [
        (90, ["visit fp16 3000", "rows, assign"]),
        thorough(80, list(CODES)),
        thorough(90, list(CODES)),
    ],
    ids=["H100, two", "A100, all", "H100, all"],
)
def test_machine_code(arch, names):
    """Nothing is spilled, shared memory suffices, each score costs as many powers of 2 (MUFU.EX2)
    as the formulas need in that reading, and numbers move 16 bytes at a time. Loops are those over
    parts of a row, or over rows."""
    pytest.importorskip("triton")
    from aot import SHARED_LIMIT, Spec, compile_ahead

    specs = []
    for name in names:
        kernel, types, constants, warps, _, _ = CODES[name]
        pointers = {key: f"{key}_ptr" for key, kind in types.items() if kind[0] == "*"}
        signature = {pointers.get(key, key): kind for key, kind in types.items()}
        specs.append(Spec("kernels.sinkhorn", kernel, signature, constants, arch, warps))

    for name, report in zip(names, compile_ahead(specs)):
        kernel, _, _, warps, numbers, powers = CODES[name]
        assert report.stack == 0 and report.shared <= SHARED_LIMIT[arch], name

        # Powers of a thread in each loop.
        wanted = [n * numbers // (32 * warps) for n in powers]
        loops = range(len(report.loops))
        assert [report.count("MUFU.EX2", loop) for loop in loops] == wanted, name

        # Copies to shared memory are asynchronous in visit_kernel; other kernels read directly.
        copy = "LDGSTS" if kernel == "visit_kernel" else "LDG"
        for loop in loops:
            wide = report.count(copy + ".128", loop)
            assert wide > 0, name
            # In the loop of columns_kernel there is also log_u, one number per row.
            assert kernel == "columns_kernel" or report.count(copy, loop) == wide, name
