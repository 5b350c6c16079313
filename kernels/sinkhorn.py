"""Sinkhorn's assignment of samples to prototypes, the target in SwAV and DINOv2, and the cross-entropy with it.
Caron et al. (SwAV), NeurIPS 2020, https://arxiv.org/abs/2006.09882, section 3.1; Oquab et al. (DINOv2), TMLR 2024,
https://arxiv.org/abs/2304.07193, section 4. Official code: distributed_sinkhorn in main_swav.py of
https://github.com/facebookresearch/swav, sinkhorn_knopp_teacher in https://github.com/facebookresearch/dinov2

    sinkhorn(scores, epsilon, iterations, group)                   Q (B, K), every row a distribution over the prototypes
    sinkhorn_potentials(scores, epsilon, iterations, group)        log_u (B,), log_v (K,), from which Q follows
    assignment_cross_entropy(student_logits, teacher_scores, log_u, log_v, temperature, epsilon)   without building Q

Notation. s (B, K) scores of B samples for K prototypes, i a sample, j a prototype, z (B, K) the student's logits. From
exp(s / epsilon), the official loop scales the columns to equal sums, then the rows to sum 1, `iterations` times in turn:

    q_ij = u_i exp(s_ij / epsilon) v_j = exp(log_u_i + s_ij / epsilon + log_v_j)
    L = -mean over i of sum over j of q_ij log softmax(z_i / temperature)_j

Forward, as plain loops; constant factors of v do not matter, since u takes them up:

    log_v_j = -log sum_i exp(s_ij / epsilon), with a running maximum for each j           reads s once
    iterations - 1 times:                                                                 reads s once each time
        for i < B:  p_i = softmax over j of (s_ij / epsilon + log_v_j);  c_j += p_ij
        log_v_j -= log c_j
    log_u_i = -log sum_j exp(s_ij / epsilon + log_v_j)                                    reads s once

This is exact, and no sum overflows or vanishes, whatever the scores: c_j >= 1 / K, because before the rows are scaled to sum
1 every column sums to 1 and thus no row to more than K. The official loop takes exp(s / epsilon) as it is, which overflows
in float32 above 88 epsilon. Subtracting each row's maximum is no cure: the first column sums weigh all rows by u_i = 1, so
after finitely many iterations the result differs. One shift for all rows of all processes is exact, as is one per column.

Why fused: bytes moved for each score in 16 bits, counted from the code, not measured. The official loop: 162, of which 6
for .float(), 8 each for / epsilon, exp, / sum and * B, 4 for the sum, and 40 for each of 3 iterations. Here: 8 for the
potentials, 4 readings, and 4 more to write Q. Rows above K = 16384 do not fit in the registers of a block: there each of the
later column sums takes two readings, 12 bytes in all.

Backward. The assignment is a target, as in the official code: no gradient flows to scores, log_u or log_v. The pass that
computes the loss also writes the bracket, in the dtype of z; backward multiplies it by the rest.

    dL/dz_ij = [m_i softmax(z_i / temperature)_j - q_ij] / (temperature B),   m_i = sum_j q_ij, 1 up to rounding

Distributed contract. Each process holds its own rows; their numbers may differ or be 0. Column sums run over the rows of all
processes of `group` (None: the default group if torch.distributed is initialised, else this process alone). Communicated:
all_reduce of a maximum of K numbers once, and of a sum of K numbers once for each iteration; the global B is not needed.
All processes call with the same K, epsilon and iterations; each gets Q and log_u of its own rows, all the same log_v. The
loss communicates nothing. It is the mean over this process's rows: where all have equally many, the average that
DistributedDataParallel takes is the gradient of the global mean.

Limits. Inputs are float16, bfloat16 or float32, computed in float32, or float64, computed in float64 by PyTorch. Scores must
be finite, which is not checked. Deterministic: no atomics, partial sums are added in a fixed order. First derivatives only.
The kernels are for CUDA devices, and compiled for every K. Other devices and installations without Triton take the PyTorch
path, which also needs B x K numbers for the potentials. Measured speed: not run on a GPU.
"""

import torch
import torch.distributed as dist
from torch import Tensor, library

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this machine: the PyTorch path runs everywhere
    triton = None

LOG2E = 1.4426950408889634  # exp(x) = 2^(x LOG2E): powers of 2 are one instruction on a GPU, and faster on a CPU
UNIT = 4096.0  # the bracket is stored times 2^12: 1 / 65536, a uniform softmax, would lose its digits in float16
WIDE = 16384  # the longest row that is held in registers


def sinkhorn_reference(scores, epsilon=0.05, iterations=3, group=None):
    """The specification: the official loop with one shift for all processes. In float32 weak rows or columns underflow."""
    s = scores.detach().to(math_dtype(scores)) / epsilon
    Q = torch.exp(s - all_reduce(s.max(), "MAX", group))  # (B, K)
    Q = Q / all_reduce(Q.sum(), "SUM", group)
    for _ in range(iterations):  # the official code also divides by K and B here, which the next division cancels
        Q = Q / all_reduce(Q.sum(0), "SUM", group)  # the same weight for each prototype
        Q = Q / Q.sum(1, keepdim=True)  # and for each sample
    return Q


def assignment_cross_entropy_reference(z, scores, log_u, log_v, temperature=0.1, epsilon=0.05):
    Q = torch.exp(log_u[:, None] + scores.to(log_u.dtype) / epsilon + log_v)  # (B, K)
    return -(Q * (z.to(log_u.dtype) / temperature).log_softmax(1)).sum(1).mean()


def math_dtype(*tensors):
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def all_reduce(x, op, group):
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, getattr(dist.ReduceOp, op), group)
    return x


# The PyTorch path.

def solve_torch(scores, epsilon, iterations, group, assign):
    """-> Q (B, K) if assign, else log_u (B,); log_v (K,). Stores e_ij = exp(x_ij - m_i), x_ij = s_ij / epsilon + log_v_j and
    m_i = max_j x_ij. At first log_v_j = -max_i s_ij / epsilon, over all processes: every column has a 1 in some row with
    m_i = 0, every row has a 1, so no sum vanishes. Further sums are products of e with u or v. One iteration changes these
    by factors of B and K at most: after 3 of them what underflowed in e is still negligible, then e is made anew."""
    (B, K), scale = scores.shape, LOG2E / epsilon
    top = scores.amax(0) if B else scores.new_full((K,), -torch.inf)
    log_v, u = -all_reduce(top.to(math_dtype(scores)), "MAX", group) / epsilon, None
    for done in range(0, iterations, 3):
        e = torch.add(log_v * LOG2E, scores, alpha=scale)  # (B, K); in place from here on
        m = e.amax(1)
        e.sub_(m[:, None]).exp2_()
        u = torch.exp2(m) if u is None else 1 / e.sum(1)  # at first all rows weigh the same, which m_i has hidden
        for _ in range(min(iterations - done, 3)):
            v = 1 / all_reduce(e.T @ u, "SUM", group)
            u = 1 / (e @ v)
        log_v = log_v + v.log()
    shift = log_v.mean()
    return e.mul_(v).mul_(u[:, None]) if assign else u.log() - m / LOG2E + shift, log_v - shift


def cross_entropy_torch(z, s, log_u, log_v, temperature, epsilon):
    """-> loss (B,), residual (B, K): the bracket times UNIT, in the dtype of z."""
    loss, residual = log_u.new_empty(len(z)), torch.empty_like(z)
    step = max(1, 2**17 // z.shape[1])  # rows that stay in a core's cache
    for r in (slice(i, i + step) for i in range(0, len(z), step)):
        q = torch.add(log_v * LOG2E, s[r], alpha=LOG2E / epsilon).add_(log_u[r, None] * LOG2E).exp2_()  # (b, K)
        x = z[r].to(loss.dtype)
        x = (x - x.amax(1, keepdim=True)).mul_(LOG2E / temperature)  # before the products: as exact as the differences
        mass, dot = q.sum(1, keepdim=True), (q * x).sum(1)
        total = x.exp2_().sum(1, keepdim=True)
        loss[r] = (total.log2() * mass)[:, 0].sub_(dot) / LOG2E
        residual[r] = x.mul_(mass / total).sub_(q).mul_(UNIT)
    return loss, residual


# The kernels. K is a compile-time constant, so that rows known to be multiples of 16 bytes are read 16 bytes at a time;
# offsets of rows are int64, since B K may exceed 2^31. u2, v2, z2 and sum2 are logarithms of base 2.

if triton:
    TO2 = tl.constexpr(LOG2E)
    GAIN = tl.constexpr(UNIT)
    FLOOR = tl.constexpr(-1e38)  # stands for -inf where two of them would be subtracted

    @triton.jit
    def take(pointer, index, inside, scale, other=0.0):
        return tl.load(pointer + index, mask=inside, other=other).to(tl.float32) * scale

    @triton.jit
    def online(top, total, x, scale):
        """Adds x to total = sum of 2^(scale (x - top)), top the maximum so far. One power: one of the two terms is 2^0."""
        d = tl.exp2(-tl.abs(x - top) * scale)
        return tl.maximum(top, x), tl.where(x > top, total * d + 1, total + d)

    @triton.jit
    def columns_kernel(s, log_u, partial, B, scale, K: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr):
        """s (B, K), log_u (B,) read; partial (chunks, K) written: log sum_i exp(s_ij / epsilon + log_u_i). A program owns COLS
        columns of a chunk of CHUNK rows, of which it visits 8 at a time."""
        j = tl.program_id(0) * COLS + tl.arange(0, COLS)
        top, total = tl.full((8, COLS), FLOOR, tl.float32), tl.zeros((8, COLS), tl.float32)
        for start in range(0, CHUNK, 8):
            i = (tl.program_id(1) * CHUNK + start + tl.arange(0, 8))[:, None]
            x = take(s, i.to(tl.int64) * K + j[None, :], (i < B) & (j < K)[None, :], scale)
            top, total = online(top, total, x + take(log_u, i, i < B, TO2, FLOOR), 1.0)
        m = tl.max(top, 0)
        sum2 = m + tl.log2(tl.sum(total * tl.exp2(top - m[None, :]), 0))
        tl.store(partial + tl.program_id(1) * K + j, sum2 / TO2, mask=j < K)

    @triton.jit
    def visit_kernel(s, log_v, partial, B, scale, K: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
        """s (B, K), log_v (K,) read; partial (programs, K) written: sum_i p_ij over every num_programs-th row. A program holds
        log_v, one whole row and the sums in registers, while its next rows are on their way."""
        j = tl.arange(0, BLOCK)
        v2, columns = take(log_v, j, j < K, TO2, -float("inf")), tl.zeros((BLOCK,), tl.float32)
        first = tl.program_id(0).to(tl.int64)
        for n in tl.range(0, tl.cdiv(B - tl.program_id(0), tl.num_programs(0)), num_stages=STAGES):
            x = take(s, (first + n * tl.num_programs(0)) * K + j, j < K, scale) + v2
            e = tl.exp2(x - tl.max(x, 0))
            columns += e * (1 / tl.sum(e, 0))
        tl.store(partial + first * K + j, columns, mask=j < K)

    @triton.jit
    def rows_kernel(s, log_v, out, scale, K: tl.constexpr, BLOCK: tl.constexpr, ASSIGN: tl.constexpr):
        """s (B, K), log_v (K,) read; out written: (B, K) p if ASSIGN, else log_u (B,). A program owns one row."""
        row = tl.program_id(0).to(tl.int64) * K
        top, total = tl.full((BLOCK,), FLOOR, tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            j = start + tl.arange(0, BLOCK)
            x = take(s, row + j, j < K, scale) + take(log_v, j, j < K, TO2, FLOOR)
            top, total = online(top, total, x, 1.0)
        m = tl.max(top, 0)
        sum2 = m + tl.log2(tl.sum(total * tl.exp2(top - m), 0))
        if ASSIGN:
            for start in range(0, K, BLOCK):  # the row is in a cache now
                j = start + tl.arange(0, BLOCK)
                p = tl.exp2(take(s, row + j, j < K, scale) + (take(log_v, j, j < K, TO2) - sum2))
                tl.store(out + row + j, p, mask=j < K)
        else:
            tl.store(out + tl.program_id(0), -sum2 / TO2)

    @triton.jit
    def cross_entropy_kernel(z, s, log_u, log_v, loss, residual, z_scale, s_scale, K: tl.constexpr, BLOCK: tl.constexpr):
        """z, s (B, K), log_u (B,), log_v (K,) read; loss (B,), residual (B, K) written. A program owns one row."""
        row = tl.program_id(0).to(tl.int64) * K
        u2 = tl.load(log_u + tl.program_id(0)) * TO2
        top, total = tl.full((BLOCK,), FLOOR, tl.float32), tl.zeros((BLOCK,), tl.float32)
        masses, losses = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            j = start + tl.arange(0, BLOCK)
            masses += tl.exp2(take(s, row + j, j < K, s_scale) + (take(log_v, j, j < K, TO2, FLOOR) + u2))
            top, total = online(top, total, take(z, row + j, j < K, 1.0, FLOOR), z_scale)
        m, mass = tl.max(top, 0), tl.sum(masses, 0)
        sum2 = tl.log2(tl.sum(total * tl.exp2((top - m) * z_scale), 0))
        for start in range(0, K, BLOCK):  # both rows are in a cache now
            j = start + tl.arange(0, BLOCK)
            q = tl.exp2(take(s, row + j, j < K, s_scale) + (take(log_v, j, j < K, TO2, FLOOR) + u2))
            log2_p = (take(z, row + j, j < K, 1.0) - m) * z_scale - sum2  # m before the product: as exact as the differences
            losses -= q * log2_p
            tl.store(residual + row + j, (tl.exp2(log2_p) * mass - q) * GAIN, mask=j < K)
        tl.store(loss + tl.program_id(0), tl.sum(losses, 0) / TO2)


def use_kernel(*tensors):
    return triton is not None and all(t.is_cuda and t.dtype != torch.float64 for t in tensors)


def launch(kernel, grid, *args, num_warps=4, **constants):
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        kernel[grid](*args, num_warps=num_warps, **constants)


# The operators that torch.compile and autograd see. Collectives stay outside.

@library.custom_op("ssl_kernels::sinkhorn_columns", mutates_args=())
def columns_op(s: Tensor, log_v: Tensor | None, epsilon: float) -> Tensor:
    """-> (K,): log sum_i exp(s_ij / epsilon) if log_v is None, else sum_i p_ij."""
    (B, K), scale = s.shape, LOG2E / epsilon
    if log_v is not None and K <= WIDE:
        gpu = torch.cuda.get_device_properties(s.device) if s.is_cuda else None  # None: the interpreter
        processors, shared = (gpu.multi_processor_count, gpu.shared_memory_per_block_optin) if gpu else (1, 0)
        block = max(256, triton.next_power_of_2(K))
        # As many programs as run at a time, 32 columns a thread; 8 rows at least for each, to keep the partial sums few.
        programs, warps = min(processors * WIDE // block, triton.cdiv(B, 8)), max(4, block // 1024)
        stages = 3 if 2 * block * s.element_size() + 1024 <= shared else 2  # 3: two rows on their way to shared memory
        partial = s.new_empty(programs, K, dtype=torch.float32)
        launch(visit_kernel, (programs,), s, log_v, partial, B, scale, K=K, BLOCK=block, STAGES=stages, num_warps=warps)
        return partial.sum(0)
    log_u = s.new_zeros(B, dtype=torch.float32) if log_v is None else rows_op(s, log_v, epsilon, False)
    grid = triton.cdiv(K, 256), triton.cdiv(B, 128)
    partial = s.new_empty(grid[1], K, dtype=torch.float32)
    launch(columns_kernel, grid, s, log_u, partial, B, scale, K=K, CHUNK=128, COLS=256)
    log_sums = torch.logsumexp(partial, 0)
    return log_sums if log_v is None else torch.exp(log_sums + log_v)


@library.custom_op("ssl_kernels::sinkhorn_rows", mutates_args=())
def rows_op(s: Tensor, log_v: Tensor, epsilon: float, assign: bool) -> Tensor:
    """-> p (B, K) if assign, else log_u (B,)."""
    out = s.new_empty(s.shape if assign else len(s), dtype=torch.float32)
    launch(rows_kernel, (len(s),), s, log_v, out, LOG2E / epsilon, K=s.shape[1], BLOCK=1024, ASSIGN=assign)
    return out


@library.custom_op("ssl_kernels::assignment_cross_entropy", mutates_args=())
def cross_entropy_op(z: Tensor, s: Tensor, log_u: Tensor, log_v: Tensor, temperature: float,
                     epsilon: float) -> tuple[Tensor, Tensor]:
    if not use_kernel(z, s):
        return cross_entropy_torch(z, s, log_u, log_v, temperature, epsilon)
    out, scales = (torch.empty_like(log_u), torch.empty_like(z)), (LOG2E / temperature, LOG2E / epsilon)
    launch(cross_entropy_kernel, (len(z),), z, s, log_u, log_v, *out, *scales, K=z.shape[1], BLOCK=1024)
    return out


@library.custom_op("ssl_kernels::assignment_cross_entropy_backward", mutates_args=())
def backward_op(grad: Tensor, residual: Tensor, temperature: float) -> Tensor:
    return torch.mul(residual, grad[:, None] / (UNIT * temperature), out=torch.empty_like(residual))


def keep_residual(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the residual is never differentiated: no (B, K) zeros for it
    ctx.save_for_backward(output[1])
    ctx.temperature = inputs[4]


def backward(ctx, grad, _):
    dz = None if grad is None else backward_op(grad, *ctx.saved_tensors, ctx.temperature)
    return dz, None, None, None, None, None


def no_second_derivative(ctx, grad):
    raise RuntimeError("assignment_cross_entropy has no second derivative; write the loss in plain PyTorch if you need one")


columns_op.register_fake(lambda s, log_v, epsilon: s.new_empty(s.shape[1], dtype=torch.float32))
rows_op.register_fake(lambda s, log_v, epsilon, assign: s.new_empty(s.shape if assign else s.shape[:1], dtype=torch.float32))
cross_entropy_op.register_fake(lambda z, s, log_u, *_: (torch.empty_like(log_u), torch.empty_like(z)))
backward_op.register_fake(lambda grad, residual, temperature: torch.empty_like(residual))
cross_entropy_op.register_autograd(backward, setup_context=keep_residual)
backward_op.register_autograd(no_second_derivative)


def check(name, x, shape=None):
    """x (B, K), or of the given shape, made contiguous."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a float16, bfloat16, float32 or float64 tensor, not {found}")
    if x.shape != shape if shape else x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must have shape {tuple(shape) if shape else '(B, K), K > 0'}, not {tuple(x.shape)}")
    return x.contiguous()


def solve(scores, epsilon, iterations, group, assign):
    """-> Q (B, K) if assign, else log_u (B,); log_v (K,), of mean 0."""
    scores = check("scores", scores).detach()
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"epsilon must be positive and iterations at least 1, not {epsilon} and {iterations}")
    if not use_kernel(scores):
        with torch.autocast(scores.device.type, enabled=False):
            return solve_torch(scores, epsilon, iterations, group, assign)
    local = columns_op(scores, None, epsilon)  # (K,), -inf without rows
    top = all_reduce(local.clone(), "MAX", group)
    log_v = -top - all_reduce(torch.exp(local - top), "SUM", group).log()
    log_v = log_v - log_v.mean()  # keeps its digits: each iteration would add log(B / K)
    for _ in range(iterations - 1):
        log_v = log_v - all_reduce(columns_op(scores, log_v, epsilon), "SUM", group).log()
        log_v = log_v - log_v.mean()
    return rows_op(scores, log_v, epsilon, assign), log_v


def sinkhorn(scores, epsilon=0.05, iterations=3, group=None):
    """scores (B, K), this process's rows -> Q (B, K) in float32 (float64 for float64 scores), rows of sum 1, no gradient."""
    return solve(scores, epsilon, iterations, group, assign=True)[0]


def sinkhorn_potentials(scores, epsilon=0.05, iterations=3, group=None):
    """The same as log_u (B,) and log_v (K,), logarithms because u and v themselves overflow."""
    return solve(scores, epsilon, iterations, group, assign=False)


def assignment_cross_entropy(student_logits, teacher_scores, log_u, log_v, temperature=0.1, epsilon=0.05):
    """Mean over the rows of -sum_j q_ij log softmax(student_logits_i / temperature)_j, a scalar in nats, where log_u and log_v
    come from sinkhorn_potentials(teacher_scores, epsilon). Both matrices (B, K). Gradient to student_logits only."""
    z, s = check("student_logits", student_logits), check("teacher_scores", teacher_scores, student_logits.shape).detach()
    log_u, log_v = check("log_u", log_u, s.shape[:1]), check("log_v", log_v, s.shape[1:])
    if not temperature > 0 or not epsilon > 0:
        raise ValueError(f"temperature and epsilon must be positive, not {temperature} and {epsilon}")
    if len({t.device for t in (z, s, log_u, log_v)}) > 1:
        raise ValueError(f"all tensors must be on one device, not on {z.device}, {s.device}, {log_u.device}, {log_v.device}")
    log_u, log_v = (t.detach().to(math_dtype(z, s)) for t in (log_u, log_v))
    return cross_entropy_op(z, s, log_u, log_v, temperature, epsilon)[0].mean()
