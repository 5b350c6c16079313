"""Sinkhorn's assignment of samples to prototypes, the target in SwAV and DINOv2, and its loss.

Papers. Caron et al. (SwAV), NeurIPS 2020, https://arxiv.org/abs/2006.09882, section 3.1.
Oquab et al. (DINOv2), TMLR 2024, https://arxiv.org/abs/2304.07193, section 4.
Official code. distributed_sinkhorn in main_swav.py of https://github.com/facebookresearch/swav,
sinkhorn_knopp_teacher in https://github.com/facebookresearch/dinov2

    sinkhorn(scores, epsilon, iterations, group)
        -> Q (B, K), in which every row is a distribution over the prototypes
    sinkhorn_potentials(scores, epsilon, iterations, group)
        -> log_u (B,) and log_v (K,), from which Q follows
    assignment_cross_entropy(student_logits, teacher_scores, log_u, log_v, temperature, epsilon)
        -> the loss, computed without building Q

Notation. s (B, K) are the scores of B samples for K prototypes; i is a sample, j a prototype;
z (B, K) are the student's logits. The official loop starts from exp(s / epsilon). `iterations`
times it scales the columns to equal sums and then the rows to sum 1:

    q_ij = u_i exp(s_ij / epsilon) v_j = exp(log_u_i + s_ij / epsilon + log_v_j)
    L = -mean over i of sum over j of q_ij log softmax(z_i / temperature)_j

Forward, as plain loops. A constant factor of v does not matter, because u cancels it.

    A.  log_v_j = -log sum_i exp(s_ij / epsilon)                                columns_kernel
    B.  iterations - 1 times:                                                   visit_kernel
            for i < B:  p_i = softmax over j of (s_ij / epsilon + log_v_j);  c_j += p_ij
            log_v_j -= log c_j
    C.  log_u_i = -log sum_j exp(s_ij / epsilon + log_v_j)                      rows_kernel
    D.  q_ij = exp(log_u_i + s_ij / epsilon + log_v_j)                          rows_kernel
    E.  L and dL/dz from z, s, log_u and log_v                                  cross_entropy_kernel

This is exact, and no sum overflows or vanishes, whatever the scores are. In particular
c_j >= 1 / K: before the rows are scaled to sum 1 every column sums to 1, so no row sums to more
than K. The official loop computes exp(s / epsilon) as it stands, which overflows in float32 if
s > 88 epsilon. Subtracting the maximum of each row does not help: in the first column sums all rows
have the weight u_i = 1, so after finitely many iterations the result would be different. One shift
for all rows of all processes is exact, and so is one shift per column.

Why fused. Bytes moved per score by 3 iterations, if scores and logits have 16 bits; counted from
the code, not measured. The official loop moves 162: 6 for .float(), 8 each for / epsilon, exp,
/ sum and * B, 4 for the sum, and 40 per iteration.

                                  K = 3000    K = 16384    K = 65536
    sinkhorn_potentials               8            8           12
    sinkhorn                         12           14           18      4 of them write Q in float32
    assignment_cross_entropy          6           10           10
    its backward                      4            4            4

The potentials need 4 readings of s: loop A one, loop B two, loop C one. Rows longer than MAX_ROW =
16384 do not fit in the registers of a block, and then loop B reads s twice per iteration. Loops D
and E read their rows a second time. They find them in the L2 cache only if the rows of all running
programs fit there together. An H100 has 50 MB of L2 and runs about 10 programs on each of its 132
multiprocessors. In loop D these hold 8 MB of scores for K = 3000, but 173 MB for K = 65536; loop E
reads two matrices. The table counts second readings for K = 16384 and 65536 as coming from memory.

Backward. The assignment is a target, as in the official code: no gradient flows to scores, log_u or
log_v. The pass that computes the loss also writes the bracket below, in the dtype of z, and
backward multiplies it by the remaining factors.

    dL/dz_ij = [m_i softmax(z_i / temperature)_j - q_ij] / (temperature B)
    m_i = sum_j q_ij, which is 1 up to rounding

Distributed contract. Each process holds its own rows; the numbers of rows may differ or be 0.
Column sums run over the rows of all processes of `group`. If group is None, that is the default
group if torch.distributed is initialised, and else this process alone. Communicated are one
all_reduce of a maximum of K numbers, and one all_reduce of a sum of K numbers per iteration; the
global B is not needed. All processes must call with the same K, epsilon and iterations. Each gets Q
and log_u for its own rows, and all get the same log_v. The loss communicates nothing: it is the
mean over this process's rows. If all processes have equally many rows, the average that
DistributedDataParallel takes is the gradient of the global mean.

Limits. Inputs in float16, bfloat16 and float32 are computed in float32; those in float64 are
computed in float64, by PyTorch. Scores must be finite, which is not checked. Results are
deterministic: there are no atomics, and partial sums are added in a fixed order. Only first
derivatives exist. The kernels run on CUDA devices and are compiled for every K. Other devices, and
installations without Triton, use the PyTorch path, which needs B x K numbers of memory for the
potentials too. Speed on a GPU: not measured yet.
"""

import torch
import torch.distributed as dist
from torch import Tensor, library

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this machine: the PyTorch path runs everywhere
    triton = None

# exp(x) = 2^(x LOG2E). A power of 2 is one instruction on a GPU, and faster than exp on a CPU.
LOG2E = 1.4426950408889634

# The bracket of the gradient is stored times 2^12. A uniform softmax over K = 65536 is 1 / 65536,
# which is subnormal in float16 and would lose its digits.
FP16_GAIN = 4096.0

# The longest row that visit_kernel holds in registers.
MAX_ROW = 16384

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# The specification.


def sinkhorn_reference(scores, epsilon=0.05, iterations=3, group=None):
    """scores (B, K) -> Q (B, K): the official loop, with one shift for all processes.

    In float32 weak rows or columns underflow. The official code also divides by K and by B in each
    iteration, which the next division cancels."""
    s = scores.detach().to(math_dtype(scores)) / epsilon
    Q = torch.exp(s - all_reduce(s.max(), "MAX", group))  # (B, K)
    Q = Q / all_reduce(Q.sum(), "SUM", group)

    for _ in range(iterations):
        Q = Q / all_reduce(Q.sum(0), "SUM", group)  # every prototype gets the same weight
        Q = Q / Q.sum(1, keepdim=True)  # every sample has weight 1
    return Q


def assignment_cross_entropy_reference(z, scores, log_u, log_v, temperature=0.1, epsilon=0.05):
    """The arguments of assignment_cross_entropy -> the loss, a scalar. Builds Q."""
    s = scores.to(log_u.dtype)
    Q = torch.exp(log_u[:, None] + s / epsilon + log_v)  # (B, K)
    log_p = (z.to(log_u.dtype) / temperature).log_softmax(1)  # (B, K)
    return -(Q * log_p).sum(1).mean()


def math_dtype(*tensors):
    """The dtype to compute in: float64 if one of the tensors has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def all_reduce(x, op, group):
    """Replaces x by its "SUM" or "MAX" over the processes of the group, in place, and returns x."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, getattr(dist.ReduceOp, op), group)
    return x


# The PyTorch path.


def solve_torch(scores, epsilon, iterations, group, assign):
    """-> a pair: Q (B, K) if assign, else log_u (B,); and log_v (K,), of mean 0.

    Let x_ij = s_ij / epsilon + log_v_j and m_i = max_j x_ij. The matrix e_ij = exp(x_ij - m_i) is
    stored, and sums over rows or columns become products of e with v or u.

    Why no sum vanishes: at first log_v_j = -max_i s_ij / epsilon, over all processes. So every
    column of e has a 1, in some row with m_i = 0, and every row has a 1. One iteration changes row
    and column sums by factors of at most B and K. What underflowed in e is therefore still
    negligible after 3 iterations, and then e is computed anew."""
    B, K = scores.shape
    scale = LOG2E / epsilon

    # log_v_j = -max_i s_ij / epsilon. A process without rows takes part with -inf.
    top = scores.amax(0) if B else scores.new_full((K,), -torch.inf)  # (K,)
    top = all_reduce(top.to(math_dtype(scores)), "MAX", group)
    log_v = -top / epsilon

    u = None
    for done in range(0, iterations, 3):
        # e = 2^(x - m), in place to save memory.
        e = torch.add(log_v * LOG2E, scores, alpha=scale)  # (B, K)
        m = e.amax(1)  # (B,)
        e.sub_(m[:, None]).exp2_()

        # In the first column sums all rows have weight 1. That is 2^m in terms of e.
        u = torch.exp2(m) if u is None else 1 / e.sum(1)  # (B,)
        for _ in range(min(iterations - done, 3)):
            v = 1 / all_reduce(e.T @ u, "SUM", group)  # (K,)
            u = 1 / (e @ v)
        log_v = log_v + v.log()

    shift = log_v.mean()
    if assign:
        return e.mul_(v).mul_(u[:, None]), log_v - shift
    return u.log() - m / LOG2E + shift, log_v - shift


def cross_entropy_torch(z, s, log_u, log_v, temperature, epsilon):
    """-> loss (B,); residual (B, K): the bracket times FP16_GAIN, in the dtype of z."""
    loss = log_u.new_empty(len(z))
    residual = torch.empty_like(z)

    step = max(1, 2**17 // z.shape[1])  # so many rows stay in the cache of a core
    for start in range(0, len(z), step):
        rows = slice(start, start + step)

        # The target, from its potentials.
        q = torch.add(log_v * LOG2E, s[rows], alpha=LOG2E / epsilon)  # (b, K)
        q.add_(log_u[rows, None] * LOG2E).exp2_()
        mass = q.sum(1, keepdim=True)  # (b, 1)

        # The student's logits as powers of 2. To subtract the maximum before scaling is more exact.
        x = z[rows].to(loss.dtype)
        x = (x - x.amax(1, keepdim=True)).mul_(LOG2E / temperature)
        dot = (q * x).sum(1)  # (b,)
        x.exp2_()
        total = x.sum(1, keepdim=True)  # (b, 1)

        loss[rows] = (total.log2() * mass)[:, 0].sub_(dot) / LOG2E
        residual[rows] = x.mul_(mass / total).sub_(q).mul_(FP16_GAIN)
    return loss, residual


# The kernels.
#
# Addresses. A kernel gets the address of the first number of each tensor: s_ptr for s. Matrices are
# stored row by row, so s_ij lies at s_ptr + i * K + j. If j = tl.arange(0, BLOCK), a vector of
# column numbers, this is a vector of addresses, and one tl.load reads BLOCK numbers at once. BLOCK
# must be a power of 2; where the mask is false, beyond the end of the row, nothing is read and
# tl.load returns `other`.
#
# int64. tl.program_id and tl.arange are int32, so i * K would silently wrap around if B K exceeds
# 2^31, as 65536 x 65536 does. The number of the row is therefore converted before it is multiplied.
#
# K is a compile-time constant: if a row is known to be a multiple of 16 bytes, its numbers are read
# 16 bytes at a time. Logarithms in the kernels are of base 2: u2, v2, log2_sum and log2_p.

if triton:
    # Kernels may use a global number only if it is a tl.constexpr.
    TL_LOG2E = tl.constexpr(LOG2E)
    TL_FP16_GAIN = tl.constexpr(FP16_GAIN)
    FLOOR = tl.constexpr(-1e38)  # stands for -inf, of which the difference of two would be nan

    @triton.jit
    def load_scaled(pointer, offset, inside, scale, other=0.0):
        """-> the numbers at pointer + offset in float32, `other` where not inside, times scale."""
        x = tl.load(pointer + offset, mask=inside, other=other)
        return x.to(tl.float32) * scale

    @triton.jit
    def online_sum(top, total, x, scale):
        """Adds x to a running sum: total = sum of 2^(scale (x - top)), top = the largest x so far.

        If x is the new maximum, total is multiplied by 2^(scale (top - x)) and x adds 2^0 = 1; else
        x adds 2^(scale (x - top)). Both cases need one power, of the same exponent."""
        power = tl.exp2(-tl.abs(x - top) * scale)
        new_top = tl.maximum(top, x)
        total = tl.where(x > top, total * power + 1, total + power)
        return new_top, total

    @triton.jit
    def columns_kernel(
        s_ptr,
        log_u_ptr,
        partial_ptr,
        B,
        scale,
        K: tl.constexpr,
        CHUNK: tl.constexpr,
        COLS: tl.constexpr,
    ):
        """Loop A: partial (chunks, K) = log sum of exp(s_ij / epsilon + log_u_i), i in the chunk.

        Reads s (B, K) and log_u (B,); scale = LOG2E / epsilon. A program owns COLS columns of a
        chunk of CHUNK rows, and takes 8 of these rows at a time."""
        # 1. The columns of this program, and for each a running sum of every 8th row.
        j = tl.program_id(0) * COLS + tl.arange(0, COLS)
        top = tl.full((8, COLS), FLOOR, tl.float32)
        total = tl.zeros((8, COLS), tl.float32)

        for start in range(0, CHUNK, 8):
            # 2. The scores of the next 8 rows, a tile (8, COLS).
            i = tl.program_id(1) * CHUNK + start + tl.arange(0, 8)
            i = i[:, None]  # (8, 1)
            offset = i.to(tl.int64) * K + j[None, :]  # (8, COLS)
            inside = (i < B) & (j < K)[None, :]
            x = load_scaled(s_ptr, offset, inside, scale)

            # 3. Add exp(s_ij / epsilon + log_u_i). A row beyond B adds 2^FLOOR = 0.
            x += load_scaled(log_u_ptr, i, i < B, TL_LOG2E, FLOOR)
            top, total = online_sum(top, total, x, 1.0)

        # 4. Combine the 8 running sums of each column, relative to the largest maximum.
        m = tl.max(top, 0)
        total_of_8 = tl.sum(total * tl.exp2(top - m[None, :]), 0)
        log2_sum = m + tl.log2(total_of_8)

        # 5. One row of `partial` per chunk: small enough for an offset in int32.
        out = partial_ptr + tl.program_id(1) * K + j
        tl.store(out, log2_sum / TL_LOG2E, mask=j < K)

    @triton.jit
    def visit_kernel(
        s_ptr,
        log_v_ptr,
        partial_ptr,
        B,
        scale,
        K: tl.constexpr,
        BLOCK: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        """Loop B: partial (programs, K) = sum of p_ij over the rows i of a program.

        Reads s (B, K) and log_v (K,). A program takes every num_programs-th row. It holds log_v,
        one whole row and the sums in registers, while the next rows are on their way (STAGES)."""
        # 1. log_v, with -inf beyond K so that p is 0 there, and the sums c_j.
        j = tl.arange(0, BLOCK)
        v2 = load_scaled(log_v_ptr, j, j < K, TL_LOG2E, -float("inf"))
        columns = tl.zeros((BLOCK,), tl.float32)

        first = tl.program_id(0).to(tl.int64)
        rows = tl.cdiv(B - tl.program_id(0), tl.num_programs(0))
        for n in tl.range(0, rows, num_stages=STAGES):
            # 2. x_j = s_ij / epsilon + log_v_j, of row i = first + n * num_programs.
            i = first + n * tl.num_programs(0)
            x = load_scaled(s_ptr, i * K + j, j < K, scale)
            x += v2

            # 3. c_j += softmax(x)_j
            e = tl.exp2(x - tl.max(x, 0))
            columns += e * (1 / tl.sum(e, 0))

        tl.store(partial_ptr + first * K + j, columns, mask=j < K)

    @triton.jit
    def rows_kernel(
        s_ptr,
        log_v_ptr,
        out_ptr,
        scale,
        K: tl.constexpr,
        BLOCK: tl.constexpr,
        ASSIGN: tl.constexpr,
    ):
        """Loop C: log_u_i = -log sum_j exp(s_ij / epsilon + log_v_j). If ASSIGN, loop D as well.

        Reads s (B, K) and log_v (K,); scale = LOG2E / epsilon. Writes out: log_u (B,), or Q (B, K)
        if ASSIGN. A program owns one row, through which it goes in steps of BLOCK columns."""
        # 1. The row of this program: B programs are launched, and program_id is the number of this
        #    one. Row i starts at s_ptr + i * K.
        i = tl.program_id(0)
        row = i.to(tl.int64) * K

        # 2. BLOCK running sums: the first one for the columns 0, BLOCK, 2 BLOCK, ..., the next for
        #    1, 1 + BLOCK, ... Each has its own maximum, so they need not be compared until step 5.
        top = tl.full((BLOCK,), FLOOR, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)

        for start in range(0, K, BLOCK):
            # 3. x_j = (s_ij / epsilon + log_v_j) LOG2E for the next BLOCK columns. Beyond K, FLOOR
            #    takes the place of log_v, so that 2^x is 0.
            j = start + tl.arange(0, BLOCK)
            x = load_scaled(s_ptr, row + j, j < K, scale)
            x += load_scaled(log_v_ptr, j, j < K, TL_LOG2E, FLOOR)

            # 4. Add 2^x_j = exp(s_ij / epsilon + log_v_j) to the running sums.
            top, total = online_sum(top, total, x, 1.0)

        # 5. Combine the running sums, relative to the maximum of the whole row:
        #    log2 sum_j 2^x_j = m + log2 sum of total 2^(top - m)
        m = tl.max(top, 0)
        total_of_row = tl.sum(total * tl.exp2(top - m), 0)
        log2_sum = m + tl.log2(total_of_row)

        if ASSIGN:
            # 6. q_ij = 2^(x_j - log2_sum), for which the row is read again: from the L2 cache if
            #    the rows of all running programs fit there, else from memory.
            for start in range(0, K, BLOCK):
                j = start + tl.arange(0, BLOCK)
                x = load_scaled(s_ptr, row + j, j < K, scale)
                v2 = load_scaled(log_v_ptr, j, j < K, TL_LOG2E)
                q = tl.exp2(x + (v2 - log2_sum))
                tl.store(out_ptr + row + j, q, mask=j < K)
        else:
            # 6. log_u_i, a natural logarithm again.
            tl.store(out_ptr + i, -log2_sum / TL_LOG2E)

    @triton.jit
    def cross_entropy_kernel(
        z_ptr,
        s_ptr,
        log_u_ptr,
        log_v_ptr,
        loss_ptr,
        residual_ptr,
        z_scale,
        s_scale,
        K: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Loop E: loss (B,) and residual (B, K), the bracket of the gradient times FP16_GAIN.

        Reads z, s (B, K), log_u (B,) and log_v (K,); z_scale = LOG2E / temperature, s_scale =
        LOG2E / epsilon. A program owns one row, as in rows_kernel."""
        # 1. The row of this program, and BLOCK running sums: of 2^(z z_scale), of q, of the loss.
        row = tl.program_id(0).to(tl.int64) * K
        u2 = tl.load(log_u_ptr + tl.program_id(0)) * TL_LOG2E
        top = tl.full((BLOCK,), FLOOR, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        masses = tl.zeros((BLOCK,), tl.float32)
        losses = tl.zeros((BLOCK,), tl.float32)

        for start in range(0, K, BLOCK):
            # 2. The target's mass, sum_j q_ij.
            j = start + tl.arange(0, BLOCK)
            x = load_scaled(s_ptr, row + j, j < K, s_scale)
            v2 = load_scaled(log_v_ptr, j, j < K, TL_LOG2E, FLOOR)
            masses += tl.exp2(x + (v2 + u2))

            # 3. The softmax's denominator.
            z = load_scaled(z_ptr, row + j, j < K, 1.0, FLOOR)
            top, total = online_sum(top, total, z, z_scale)

        # 4. Combine the running sums, as in rows_kernel.
        m = tl.max(top, 0)
        mass = tl.sum(masses, 0)
        total_of_row = tl.sum(total * tl.exp2((top - m) * z_scale), 0)
        log2_sum = tl.log2(total_of_row)

        # 5. Both rows again: from the L2 cache if those of all running programs fit there, else
        #    from memory.
        for start in range(0, K, BLOCK):
            j = start + tl.arange(0, BLOCK)
            x = load_scaled(s_ptr, row + j, j < K, s_scale)
            v2 = load_scaled(log_v_ptr, j, j < K, TL_LOG2E, FLOOR)
            q = tl.exp2(x + (v2 + u2))

            # 6. log softmax. To subtract the maximum before scaling is more exact.
            z = load_scaled(z_ptr, row + j, j < K, 1.0)
            log2_p = (z - m) * z_scale - log2_sum

            # 7. The loss and the bracket of its gradient.
            losses -= q * log2_p
            bracket = tl.exp2(log2_p) * mass - q
            tl.store(residual_ptr + row + j, bracket * TL_FP16_GAIN, mask=j < K)

        tl.store(loss_ptr + tl.program_id(0), tl.sum(losses, 0) / TL_LOG2E)


def use_kernel(*tensors):
    """Whether the kernels take these tensors."""
    return triton is not None and all(t.is_cuda and t.dtype != torch.float64 for t in tensors)


def launch(kernel, grid, *args, num_warps=4, **constants):
    """Runs grid[0] x grid[1] programs on the device of the first argument."""
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        kernel[grid](*args, num_warps=num_warps, **constants)


def log_column_sums(s, log_u, epsilon):
    """s (B, K), log_u (B,) -> (K,): log sum_i exp(s_ij / epsilon + log_u_i). Reads s once."""
    B, K = s.shape
    grid = (triton.cdiv(K, 256), triton.cdiv(B, 128))
    partial = s.new_empty(grid[1], K, dtype=torch.float32)
    launch(
        columns_kernel,
        grid,
        s,
        log_u,
        partial,
        B,
        LOG2E / epsilon,
        K=K,
        CHUNK=128,
        COLS=256,
    )
    return torch.logsumexp(partial, 0)


def softmax_column_sums(s, log_v, epsilon):
    """s (B, K), log_v (K,) -> (K,): sum_i p_ij, for K up to MAX_ROW. Reads s once."""
    B, K = s.shape
    processors, shared = 1, 0  # for the interpreter
    if s.is_cuda:
        gpu = torch.cuda.get_device_properties(s.device)
        processors = gpu.multi_processor_count
        shared = gpu.shared_memory_per_block_optin  # bytes

    # 32 columns per thread.
    block = max(256, triton.next_power_of_2(K))
    warps = max(4, block // 1024)

    # As many programs as run at a time, but at least 8 rows for each, to keep the partial sums few.
    programs = min(processors * MAX_ROW // block, triton.cdiv(B, 8))

    # 3 stages: two rows are on their way to shared memory, if they fit there.
    stages = 3 if 2 * block * s.element_size() + 1024 <= shared else 2

    partial = s.new_empty(programs, K, dtype=torch.float32)
    launch(
        visit_kernel,
        (programs,),
        s,
        log_v,
        partial,
        B,
        LOG2E / epsilon,
        K=K,
        BLOCK=block,
        STAGES=stages,
        num_warps=warps,
    )
    return partial.sum(0)


# The operators that torch.compile and autograd see. Collectives stay outside. Each is followed by
# its "fake", which tells torch.compile the shapes and dtypes of the results.


@library.custom_op("ssl_kernels::sinkhorn_columns", mutates_args=())
def columns_op(s: Tensor, log_v: Tensor | None, epsilon: float) -> Tensor:
    """-> (K,): log sum_i exp(s_ij / epsilon) if log_v is None, else sum_i p_ij."""
    if log_v is None:
        return log_column_sums(s, s.new_zeros(len(s), dtype=torch.float32), epsilon)
    if s.shape[1] <= MAX_ROW:
        return softmax_column_sums(s, log_v, epsilon)

    # A row does not fit in the registers: one reading for log_u and one for the sums.
    log_u = rows_op(s, log_v, epsilon, False)
    return torch.exp(log_column_sums(s, log_u, epsilon) + log_v)


@columns_op.register_fake
def columns_fake(s, log_v, epsilon):
    return s.new_empty(s.shape[1], dtype=torch.float32)


@library.custom_op("ssl_kernels::sinkhorn_rows", mutates_args=())
def rows_op(s: Tensor, log_v: Tensor, epsilon: float, assign: bool) -> Tensor:
    """-> Q (B, K) if assign, else log_u (B,)."""
    out = rows_fake(s, log_v, epsilon, assign)
    launch(
        rows_kernel,
        (len(s),),
        s,
        log_v,
        out,
        LOG2E / epsilon,
        K=s.shape[1],
        BLOCK=1024,
        ASSIGN=assign,
    )
    return out


@rows_op.register_fake
def rows_fake(s, log_v, epsilon, assign):
    return s.new_empty(s.shape if assign else s.shape[:1], dtype=torch.float32)


@library.custom_op("ssl_kernels::assignment_cross_entropy", mutates_args=())
def cross_entropy_op(
    z: Tensor,
    s: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    temperature: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """-> loss (B,); residual (B, K): the bracket times FP16_GAIN, in the dtype of z."""
    if not use_kernel(z, s):
        return cross_entropy_torch(z, s, log_u, log_v, temperature, epsilon)
    loss = torch.empty_like(log_u)
    residual = torch.empty_like(z)
    launch(
        cross_entropy_kernel,
        (len(z),),
        z,
        s,
        log_u,
        log_v,
        loss,
        residual,
        LOG2E / temperature,
        LOG2E / epsilon,
        K=z.shape[1],
        BLOCK=1024,
    )
    return loss, residual


@cross_entropy_op.register_fake
def cross_entropy_fake(z, s, log_u, log_v, temperature, epsilon):
    return torch.empty_like(log_u), torch.empty_like(z)


@library.custom_op("ssl_kernels::assignment_cross_entropy_backward", mutates_args=())
def backward_op(grad: Tensor, residual: Tensor, temperature: float) -> Tensor:
    """grad (B,), that of each row's loss; residual (B, K) -> dz (B, K)."""
    factor = grad[:, None] / (FP16_GAIN * temperature)  # (B, 1)
    return torch.mul(residual, factor, out=torch.empty_like(residual))


@backward_op.register_fake
def backward_fake(grad, residual, temperature):
    return torch.empty_like(residual)


def keep_residual(ctx, inputs, output):
    """What autograd keeps from forward to backward."""
    ctx.set_materialize_grads(False)  # the residual is never differentiated: no (B, K) zeros for it
    ctx.save_for_backward(output[1])
    ctx.temperature = inputs[4]


def backward(ctx, grad_loss, grad_residual):
    dz = None
    if grad_loss is not None:
        (residual,) = ctx.saved_tensors
        dz = backward_op(grad_loss, residual, ctx.temperature)
    return dz, None, None, None, None, None


def no_second_derivative(ctx, grad):
    raise RuntimeError(
        "assignment_cross_entropy has no second derivative; "
        "write the loss in plain PyTorch if you need one"
    )


cross_entropy_op.register_autograd(backward, setup_context=keep_residual)
backward_op.register_autograd(no_second_derivative)


# The functions to call.


def check(name, x, shape=None):
    """-> x, contiguous. An error unless it is a float tensor (B, K), or of the given shape."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a float16, bfloat16, float32 or float64 tensor, not {what}"
        )
    if shape is None:
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{name} must have shape (B, K), K > 0, not {tuple(x.shape)}")
    elif x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(x.shape)}")
    return x.contiguous()


def solve(scores, epsilon, iterations, group, assign):
    """-> a pair: Q (B, K) if assign, else log_u (B,); and log_v (K,), of mean 0."""
    scores = check("scores", scores).detach()
    if not epsilon > 0 or iterations < 1:
        raise ValueError(
            "epsilon must be positive and iterations at least 1, "
            f"not {epsilon} and {iterations}"
        )
    if not use_kernel(scores):
        with torch.autocast(scores.device.type, enabled=False):
            return solve_torch(scores, epsilon, iterations, group, assign)

    # A. Combine the sums of all processes, relative to the largest.
    local = columns_op(scores, None, epsilon)  # (K,), -inf if this process has no rows
    top = all_reduce(local.clone(), "MAX", group)
    log_v = -top - all_reduce(torch.exp(local - top), "SUM", group).log()

    # Mean 0 keeps the digits of log_v: otherwise each iteration would add log(B / K).
    log_v = log_v - log_v.mean()

    # B. The column sums of the softmax over each row.
    for _ in range(iterations - 1):
        sums = all_reduce(columns_op(scores, log_v, epsilon), "SUM", group)
        log_v = log_v - sums.log()
        log_v = log_v - log_v.mean()

    # C, and D if assign.
    return rows_op(scores, log_v, epsilon, assign), log_v


def sinkhorn(scores, epsilon=0.05, iterations=3, group=None):
    """The assignment Q of SwAV, Eqs. 3 to 5 of the paper, by a fixed number of iterations.

    scores (B, K), this process's rows, in float16, bfloat16, float32 or float64; epsilon > 0 in the
    unit of the scores; iterations >= 1; group, the processes whose rows are assigned together.

    -> Q (B, K) in float32 (float64 for float64 scores), without gradient. Every row sums to 1.

    TypeError for another dtype; ValueError for another shape, epsilon <= 0 or iterations < 1."""
    Q, _ = solve(scores, epsilon, iterations, group, assign=True)
    return Q


def sinkhorn_potentials(scores, epsilon=0.05, iterations=3, group=None):
    """The assignment of sinkhorn() as log_u (B,) and log_v (K,), which need less memory than Q.

    q_ij = exp(log_u_i + s_ij / epsilon + log_v_j). Both are natural logarithms, because u and v
    themselves can overflow; log_v has mean 0. Arguments, dtypes and errors are as in sinkhorn()."""
    return solve(scores, epsilon, iterations, group, assign=False)


def assignment_cross_entropy(
    student_logits, teacher_scores, log_u, log_v, temperature=0.1, epsilon=0.05
):
    """SwAV's loss, Eq. 2 of the paper: mean over i of -sum_j q_ij log softmax(z_i / temperature)_j.

    student_logits z and teacher_scores s (B, K), in float16, bfloat16, float32 or float64; log_u
    (B,) and log_v (K,) from sinkhorn_potentials(teacher_scores, epsilon), with the same epsilon;
    temperature > 0 in the unit of the logits.

    -> the loss, a scalar in nats, in float32 (float64 if an input matrix is). The gradient flows to
    student_logits only, in their dtype; a second derivative is a RuntimeError.

    TypeError for another dtype; ValueError if shapes do not match, temperature or epsilon is not
    positive, or the tensors are on different devices."""
    z = check("student_logits", student_logits)
    s = check("teacher_scores", teacher_scores, student_logits.shape).detach()
    log_u = check("log_u", log_u, s.shape[:1])
    log_v = check("log_v", log_v, s.shape[1:])

    if not temperature > 0 or not epsilon > 0:
        raise ValueError(
            f"temperature and epsilon must be positive, not {temperature} and {epsilon}"
        )
    devices = [t.device for t in (z, s, log_u, log_v)]
    if len(set(devices)) > 1:
        raise ValueError(
            f"all tensors must be on one device, not on {', '.join(map(str, devices))}"
        )

    dtype = math_dtype(z, s)
    log_u = log_u.detach().to(dtype)
    log_v = log_v.detach().to(dtype)
    loss, _ = cross_entropy_op(z, s, log_u, log_v, temperature, epsilon)
    return loss.mean()
