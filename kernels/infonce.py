"""InfoNCE without the matrix of logits, for the three shapes it has in self-supervised learning.
van den Oord, Li, Vinyals 2018 (CPC), https://arxiv.org/abs/1807.03748, Eq. 4; Chen et al. 2020 (SimCLR), Eq. 1,
https://arxiv.org/abs/2002.05709; Radford et al. 2021 (CLIP), figure 3, https://arxiv.org/abs/2103.00020; He et al. 2020
(MoCo), Eq. 1, https://arxiv.org/abs/1911.05722

    simclr_loss(z1, z2, temperature, group)     2N anchors, each against the 2N - 1 others; its other view is the positive
    clip_loss(x, y, scale, group)               x against all y and y against all x, averaged; scale may be learned
    moco_loss(q, k, queue, temperature)         each q against its own k and the whole queue; only q gets a gradient

Notation. x (R, D) this process's anchors, y (C, D) the candidates of all processes, rows of length 1; a = scale = 1 /
temperature; s_ij = x_i . y_j; t (R, D) the positives. SimCLR's anchor i meets itself in column first + i, the others nowhere.

    lse_i = log sum over j != self of exp(a s_ij)       p_ij = exp(a s_ij - lse_i)       L = mean over i of lse_i - a x_i . t_i

Forward, as plain loops over tiles of the logits that never leave the chip:

    for a block of rows i:  m = -inf, l = 0
        for a block of columns j:  s = a x_i y_j^T;  new = max(m, max s);  l = l exp(m - new) + sum exp(s - new);  m = new
    lse_i = m + log l
where a <= 43, exp(a s) neither overflows nor vanishes for |s| <= 1, and the maximum is left out. Elsewhere the kernel rounds
it to a whole power of two, so that exp(m - new) only shifts bits and each logit costs one power. MoCo keeps one more sum,
o_i = sum_j p_ij y_j: it is the gradient already, so that the queue is read once.

Backward. An anchor is also a candidate of others. Row i of the gradient of the GLOBAL mean takes both parts, and needs no more
than this process's rows and the lse of all: no atomic additions, no communication. For SimCLR, where s is symmetric, and CLIP,
where the second lse is that of the other direction (and w = 1 / 2, else 1):

    dL/dx_i = w a / R [sum_j (exp(a s_ij - lse_i) + exp(a s_ij - lse_j)) y_j - 2 t_i]        dL/da = sum_i x_i . dL/dx_i / (2 a)
One power gives both terms: e = exp(a s), times (exp(-lse_i) + exp(-lse_j)); where a > 43, e = exp(a s / 2), and the squares of
e exp(-lse_i / 2) and e exp(-lse_j / 2). The last equation holds because L depends on a and x, y by the products a s_ij alone.

Why fused: bytes moved for M = 2N = 8192, D = 128, counted, not measured. Plain PyTorch reads or writes an (M, M) float32 matrix
about 12 times, 3.2 GB; here each block of rows reads all candidates, 2 MB, which stay in the cache. FLOPs: 6 M^2 D in both.

Distributed contract. Each process holds equally many rows. Gathered: the embeddings and the lse, (C, D) and (C,) numbers. The
value is the mean over this process's anchors; the gradients are such that the AVERAGE over processes, which
DistributedDataParallel takes, is the gradient of the global mean loss, for every parameter and the scale. Who sums gradients
instead must divide by the number of processes. The order of the candidates is that of the processes, z1 before z2 in each.

Limits. Rows must have length 1, processes equally many rows, a <= 170: checked under torch.autograd.set_detect_anomaly, not
else. Kernels: float16 and bfloat16 on CUDA, D up to 256, float32 sums. Float16 has TF32's digits and unit rows fit its range:
prefer it to bfloat16. Everything else takes the PyTorch path, which works through blocks of rows, in float32 (float64 for
float64); on CUDA its products of float16 and bfloat16 are cuBLAS's, summed in float32. On a CPU, clip_loss on one process
finds its gradients along with the loss, as moco_loss does everywhere, and holds three blocks; calling operators takes about
0.1 ms there, which shows below some 200 rows. Deterministic: no atomics, sums in a fixed order. First
derivatives only. Measured speed: not run on a GPU.
"""

import torch
import torch.distributed as dist
from torch import Tensor, library

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this machine: the PyTorch path runs everywhere
    triton = None

LOG2E = 1.4426950408889634  # exp(x) = 2^(x LOG2E): powers of 2 are one instruction on a GPU
NARROW = 43.0  # the largest scale for which exp(scale s) needs no maximum in float32: 2 x 43 x LOG2E < 126
WIDEST = 170.0  # the same for exp(scale s / 2)
# Tiles for D up to 128, and up to 256: as large as fits the registers, and so small that two programs share a processor.
LSE_TILES = [dict(BM=64, BN=128, num_warps=4, num_stages=3), dict(BM=128, BN=128, num_warps=8, num_stages=2)]
MEAN_TILES = [dict(BM=64, BN=128, num_warps=4, num_stages=3), dict(BM=64, BN=64, num_warps=4, num_stages=2)]
PULL_TILES = [dict(BM=64, BN=128, num_warps=4, num_stages=2), dict(BM=64, BN=64, num_warps=4, num_stages=2)]
UNIT = 1024.0  # probabilities are multiplied by it before they become float16, or 1 / 65536 would lose its digits


# The specifications, for one process.

def simclr_reference(z1, z2, temperature):
    z = torch.cat([z1, z2])  # (2N, D)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return (logits.logsumexp(1) - (z * torch.cat([z2, z1])).sum(1) / temperature).mean()


def clip_reference(x, y, scale):
    logits = scale * x @ y.T  # (N, N)
    return (logits.logsumexp(1) / 2 + logits.logsumexp(0) / 2 - logits.diagonal()).mean()


def moco_reference(q, k, queue, temperature):
    candidates = torch.cat([(q * k.detach()).sum(1, keepdim=True), q @ queue.detach().T], 1) / temperature  # (n, 1 + K)
    return (candidates.logsumexp(1) - candidates[:, 0]).mean()


# The PyTorch path: a block of rows at a time.

def factors(*rows):
    """float16 and bfloat16 stay what they are on a GPU, for its tensor cores, and become float32 elsewhere."""
    return [x if x.is_cuda else x.to(math_dtype(x)) for x in rows]


def product(a, b):
    """a @ b, summed in float32 or more."""
    if b.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a @ b


def row_blocks(x, y):
    """(slice of rows, logits without scale) of blocks that hold 2 MB (on a GPU 256 MB), whatever the number of candidates."""
    step = max(1, 2 ** (26 if x.is_cuda else 19) // len(y))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        yield rows, product(x[rows], y.T)


def lse_torch(x, y, scale, wide, first):
    out = x.new_empty(len(x), dtype=math_dtype(x))
    for rows, s in row_blocks(*factors(x, y)):
        s *= scale
        s.diagonal(first + rows.start).fill_(-torch.inf)  # where an anchor meets itself; empty beyond the columns
        out[rows] = s.logsumexp(1) if wide else s.exp_().sum(1).log_()
    return out


def mean_torch(q, queue, scale):
    lse, mean = q.new_empty(len(q), dtype=math_dtype(q)), q.new_empty(q.shape, dtype=math_dtype(q))
    q, queue = factors(q, queue)
    for rows, s in row_blocks(q, queue):
        top = s.amax(1, keepdim=True)
        total = s.sub_(top).mul_(scale).exp_().sum(1, keepdim=True)
        mean[rows] = product(s.mul_(UNIT), queue) / (UNIT * total)
        lse[rows] = (top * scale + total.log())[:, 0]
    return lse, mean


def pull_torch(x, y, lse_x, lse_y, scale, wide, first):
    out = x.new_empty(x.shape, dtype=math_dtype(x))
    x, y = factors(x, y)
    half = 0.5 if wide else 1.0
    wx, wy = (UNIT**half * torch.exp(-half * lse) for lse in (lse_x[:, None], lse_y))
    for rows, s in row_blocks(x, y):
        e = s.mul_(half * scale).exp_()
        g = (e * wx[rows]).square_().add_(e.mul_(wy).square_()) if wide else e.mul_(wx[rows] + wy)
        g.diagonal(first + rows.start).fill_(0.0)
        out[rows] = product(g, y)
    return out.div_(UNIT)


if triton is not None:
    TO2 = tl.constexpr(LOG2E)
    GAIN = tl.constexpr(UNIT)
    ROUND = tl.constexpr(1.5 * 2**23)  # x + ROUND has no binary digits left behind the point, so that it holds x rounded

    @triton.jit
    def span(C, per, own, BM: tl.constexpr, BN: tl.constexpr):
        """The tiles of columns [low, high) of this program's split; those of the diagonal are [a, b), and the last one may be
        ragged: it and they need masks. own: the column in which the first row meets itself."""
        low = tl.program_id(1) * per
        high = tl.minimum(low + per, tl.cdiv(C, BN))
        a = tl.minimum(tl.maximum(own // BN, low), high - 1)
        b = tl.minimum(tl.maximum((own + BM - 1) // BN + 1, a), high - 1)
        return low, a, b, high

    @triton.jit
    def tile(x, y, n, itself, C, low, a, b, high, D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):
        """-> of the n-th tile with masks, or without: its columns (BN,), candidates (BN, D), products with x (BM, BN), and
        where these count."""
        j = tl.where(n < b - a, a + n, high - 1) if MASKED else tl.where(n < a - low, low + n, b + n - (a - low))
        column = j * BN + tl.arange(0, BN)
        at = y + column[:, None].to(tl.int64) * D + tl.arange(0, D)[None, :]
        yj = tl.load(at, mask=column[:, None] < C, other=0.0) if MASKED else tl.load(at)
        counts = (column[None, :] != itself[:, None]) & (column[None, :] < C)
        return column, yj, tl.dot(x, tl.trans(yj), input_precision="ieee"), counts

    @triton.jit
    def lse_kernel(x, y, scale, lse, mean, R, C, first, per, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   WIDE: tl.constexpr, MEAN: tl.constexpr):
        """x (R, D), y (C, D), scale () read; lse (splits, R), and if MEAN mean (splits, R, D), written. A program owns BM rows
        and `per` tiles of BN columns."""
        row, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
        low, a, b, high = span(C, per, first + tl.program_id(0) * BM, BM, BN)
        xi = tl.load(x + row[:, None].to(tl.int64) * D + d[None, :], mask=row[:, None] < R, other=0.0)
        scale2 = tl.load(scale) * TO2
        top, total = tl.full((BM,), ROUND - 1024, tl.float32), tl.zeros((BM,), tl.float32)
        sums = tl.zeros((BM, D if MEAN else 1), tl.float32)
        for MASKED in tl.static_range(2):
            for n in range(0, b - a + 1 if MASKED else a - low + high - 1 - b):
                column, yj, s, counts = tile(xi, y, n, first + row, C, low, a, b, high, D, BN, MASKED)
                s = tl.where(counts, s * scale2, -float("inf")) if MASKED else s * scale2
                if WIDE:
                    new = tl.maximum(top, tl.max(s, 1) + ROUND)
                    # 2^(top - new), an integer power: its bits are made by shifting, which leaves one exp2 for each logit
                    shrink = tl.maximum(top.to(tl.int32, bitcast=True) - new.to(tl.int32, bitcast=True) + 127, 0) << 23
                    shrink = shrink.to(tl.float32, bitcast=True)
                    e = tl.exp2(s - (new - ROUND)[:, None])
                    total = total * shrink + tl.sum(e, 1)
                    if MEAN:
                        sums = tl.dot((e * GAIN).to(yj.dtype), yj, sums * shrink[:, None], input_precision="ieee")
                    top = new
                else:
                    total += tl.sum(tl.exp2(s), 1)
        out = tl.program_id(1) * R + row
        tl.store(lse + out, ((top - ROUND if WIDE else 0.0) + tl.log2(total)) / TO2, mask=row < R)
        if MEAN:
            tl.store(mean + out[:, None].to(tl.int64) * D + d[None, :], sums / (total * GAIN)[:, None], mask=row[:, None] < R)

    @triton.jit
    def pull_kernel(x, y, wx, wy, scale, out, R, C, first, per, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    WIDE: tl.constexpr):
        """x (R, D), y (C, D), scale () read, and wx (R,), wy (C,): UNIT exp(-lse), or the square root of that if WIDE. Written:
        out (splits, R, D), UNIT sum_j (exp(a s_ij - lse_i) + exp(a s_ij - lse_j)) y_j over the columns of the split."""
        row, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
        low, a, b, high = span(C, per, first + tl.program_id(0) * BM, BM, BN)
        xi = tl.load(x + row[:, None].to(tl.int64) * D + d[None, :], mask=row[:, None] < R, other=0.0)
        wi = tl.load(wx + row, mask=row < R, other=0.0)[:, None]
        scale2 = tl.load(scale) * (TO2 / 2 if WIDE else TO2)
        sums = tl.zeros((BM, D), tl.float32)
        for MASKED in tl.static_range(2):
            for n in range(0, b - a + 1 if MASKED else a - low + high - 1 - b):
                column, yj, s, counts = tile(xi, y, n, first + row, C, low, a, b, high, D, BN, MASKED)
                wj = (tl.load(wy + column, mask=column < C, other=0.0) if MASKED else tl.load(wy + column))[None, :]
                e = tl.exp2(s * scale2)
                g = e * wi * (e * wi) + e * wj * (e * wj) if WIDE else e * (wi + wj)
                g = tl.where(counts, g, 0.0) if MASKED else g
                sums = tl.dot(g.to(yj.dtype), yj, sums, input_precision="ieee")
        at = (tl.program_id(1) * R + row)[:, None].to(tl.int64) * D + d[None, :]
        tl.store(out + at, sums, mask=row[:, None] < R)


def math_dtype(*tensors):
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def use_kernel(x):
    return triton is not None and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and x.shape[1] <= 256


def plan(x, y, BM, BN):
    """-> ((blocks of rows, splits of the columns), tiles in a split): two programs for each processor of the GPU."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1  # 1: the interpreter
    blocks, tiles = triton.cdiv(len(x), BM), triton.cdiv(len(y), BN)
    per = triton.cdiv(tiles, max(1, 2 * processors // blocks))
    return (blocks, triton.cdiv(tiles, per)), per


def launch(kernel, grid, x, y, *arguments, BM, BN, num_warps, num_stages, **constants):
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[grid](x, y, *arguments, D=x.shape[1], BM=BM, BN=BN, num_warps=num_warps, num_stages=num_stages, **constants)


def padded(x):
    """x with zeros added up to a power of 2 of at least 16 columns, as tl.dot wants them; they change no product."""
    return torch.nn.functional.pad(x, (0, max(16, triton.next_power_of_2(x.shape[1])) - x.shape[1]))


# The operators that torch.compile and autograd see. Collectives stay outside. wide: scale may exceed NARROW.

@library.custom_op("ssl_kernels::infonce_lse", mutates_args=())
def lse_op(x: Tensor, y: Tensor, scale: Tensor, wide: bool, first: int) -> Tensor:
    """-> (R,): log sum_j exp(scale s_ij), j != first + i."""
    if not use_kernel(x):
        return lse_torch(x, y, scale, wide, first)
    x, y = padded(x), padded(y)
    tiles = LSE_TILES[x.shape[1] > 128]
    grid, per = plan(x, y, tiles["BM"], tiles["BN"])
    lse = x.new_empty(grid[1], len(x), dtype=torch.float32)
    launch(lse_kernel, grid, x, y, scale, lse, lse, len(x), len(y), first, per, WIDE=wide, MEAN=False, **tiles)
    return lse.logsumexp(0)


def lse_and_mean(q, queue, scale):
    """-> lse (R,), and sum_j p_ij y_j (R, D)."""
    if not use_kernel(q):
        return mean_torch(q, queue, scale)
    x, y = padded(q), padded(queue)
    tiles = MEAN_TILES[x.shape[1] > 128]
    grid, per = plan(x, y, tiles["BM"], tiles["BN"])
    lse = x.new_empty(grid[1], len(x), dtype=torch.float32)
    mean = x.new_empty(*lse.shape, x.shape[1], dtype=torch.float32)
    launch(lse_kernel, grid, x, y, scale, lse, mean, len(x), len(y), len(y), per, WIDE=True, MEAN=True, **tiles)
    total = lse.logsumexp(0)
    return total, ((lse - total).exp()[:, :, None] * mean).sum(0)[:, :q.shape[1]].contiguous()


@library.custom_op("ssl_kernels::infonce_pull", mutates_args=())
def pull_op(x: Tensor, y: Tensor, lse_x: Tensor, lse_y: Tensor, scale: Tensor, wide: bool, first: int) -> Tensor:
    """-> (R, D): sum_j (exp(scale s_ij - lse_x_i) + exp(scale s_ij - lse_y_j)) y_j."""
    if not use_kernel(x):
        return pull_torch(x, y, lse_x, lse_y, scale, wide, first)
    D, half = x.shape[1], 0.5 if wide else 1.0
    x, y = padded(x), padded(y)
    wx, wy = (UNIT**half * torch.exp(-half * lse) for lse in (lse_x, lse_y))
    tiles = PULL_TILES[x.shape[1] > 128]
    grid, per = plan(x, y, tiles["BM"], tiles["BN"])
    out = x.new_empty(grid[1], *x.shape, dtype=torch.float32)
    launch(pull_kernel, grid, x, y, wx, wy, scale, out, len(x), len(y), first, per, WIDE=wide, **tiles)
    return (out.sum(0)[:, :D] / UNIT).contiguous()


@library.custom_op("ssl_kernels::infonce", mutates_args=())
def contrast_op(x: Tensor, y: Tensor, target: Tensor, lse_x: Tensor, lse_y: Tensor, scale: Tensor, wide: bool, first: int,
                weight: float) -> Tensor:
    """-> (): weight times the mean over rows of lse_x - scale x . target. lse_y and y are for the backward."""
    losses = lse_x - scale * (x.to(lse_x.dtype) * target).sum(1)  # (R,)
    return weight * losses.clamp(min=0).mean()  # below 0 only by rounding: this product and lse_x sum in different orders


def contrast_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def contrast_backward(ctx, grad):
    x, y, target, lse_x, lse_y, scale = ctx.saved_tensors
    wide, first, weight = ctx.options
    with torch.autocast(x.device.type, enabled=False):
        dx = (pull_op(x, y, lse_x, lse_y, scale, wide, first) - 2 * target) * (grad * weight / len(x))
    dscale = (dx * x).sum() / 2 if ctx.needs_input_grad[5] else None
    return (dx * scale).to(x.dtype), None, None, None, None, dscale, None, None, None


@library.custom_op("ssl_kernels::infonce_moco", mutates_args=())
def moco_op(q: Tensor, k: Tensor, queue: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """-> loss (), and its gradient to q (n, D)."""
    lse, mean = lse_and_mean(q, queue, scale)
    positive = scale * (q.to(lse.dtype) * k).sum(1)
    total = torch.logaddexp(lse, positive)
    p = (positive - total).exp()[:, None]  # (n, 1), of the positive
    return (total - positive).mean(), ((lse - total).exp()[:, None] * mean + (p - 1) * k) * (scale / len(q))


@library.custom_op("ssl_kernels::infonce_clip", mutates_args=())
def clip_op(x: Tensor, y: Tensor, scale: Tensor, gradients: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CLIP on a CPU where one process has all rows: both directions take the same logits, a block of rows at a time.
    -> loss (), and its gradients to x, y and scale, without rows if not asked for."""
    N, x, y = len(x), *factors(x, y)
    lse_y, loss, dx, dy = x.new_full((N,), -torch.inf), 0.0, torch.empty_like(x), torch.zeros_like(y)
    positive = x.new_empty(N)
    for rows, s in row_blocks(x * scale, y):
        if len(s) < N or not gradients:
            lse_y = torch.logaddexp(lse_y, s.logsumexp(0))
        if not gradients:
            positive[rows] = s.diagonal(rows.start)
            loss += (s.logsumexp(1) - positive[rows]).clamp(min=0).sum()
    if not gradients:
        return (loss + (lse_y - positive).clamp(min=0).sum()) / (2 * N), dx[:0], dy[:0], scale.clone()
    for rows, s in row_blocks(x * scale, y) if len(s) < N else [(rows, s)]:  # where one block was enough, it is still there
        p = s.log_softmax(1)
        q = s.sub_(lse_y) if len(s) < N else s.log_softmax(0)
        loss -= p.diagonal(rows.start).sum() + q.diagonal(rows.start).clamp(max=0).sum()
        g = p.exp_().add_(q.exp_())  # (rows, N)
        g.diagonal(rows.start).sub_(2)
        dx[rows] = g @ y
        dy.addmm_(g.T, x[rows])
    dx, dy = dx / (2 * N), dy / (2 * N)
    return loss / (2 * N), dx * scale, dy * scale, (dx * x).sum()


def keep_gradients(ctx, inputs, output):
    """For operators that return the loss and its gradients to their first inputs."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype for x, _ in zip(inputs, output[1:])]
    ctx.others = len(inputs) - len(ctx.dtypes)


def scale_gradients(ctx, grad, *second):
    if any(g is not None for g in second):
        no_second_derivative(ctx)
    return *((x * grad).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes)), *[None] * ctx.others


def no_second_derivative(ctx, *grads):
    raise RuntimeError("the InfoNCE losses have no second derivative; use simclr_reference, clip_reference or moco_reference")


lse_op.register_fake(lambda x, *_: x.new_empty(x.shape[0], dtype=math_dtype(x)))
pull_op.register_fake(lambda x, *_: x.new_empty(x.shape, dtype=math_dtype(x)))
contrast_op.register_fake(lambda x, y, target, lse, *_: lse.new_empty(()))
moco_op.register_fake(lambda q, k, queue, scale: (scale.new_empty(()), scale.new_empty(q.shape)))
clip_op.register_fake(lambda x, y, scale, gradients: tuple(
    scale.new_empty(shape) for shape in ((), (len(x) * gradients, x.shape[1]), (len(y) * gradients, y.shape[1]), ())))
contrast_op.register_autograd(contrast_backward, setup_context=contrast_setup)
moco_op.register_autograd(scale_gradients, setup_context=keep_gradients)
clip_op.register_autograd(scale_gradients, setup_context=keep_gradients)
pull_op.register_autograd(no_second_derivative)


def processes(group):
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def debugging():
    return not torch.compiler.is_compiling() and torch.is_anomaly_enabled()


def gather(x, group):
    """-> (processes x n, ...) in the order of the processes, without gradient; and the first row of this one. All must hold
    equally many rows, which only debugging compares: it costs a round of messages."""
    x = x.detach()
    if processes(group) == 1:
        return x, 0
    if debugging():
        rows = [None] * processes(group)
        dist.all_gather_object(rows, len(x), group)
        if len(set(rows)) > 1:
            raise ValueError(f"all processes must hold equally many rows, not {rows}")
    parts = [torch.empty_like(x) for _ in range(processes(group))]
    dist.all_gather(parts, x, group)
    return torch.cat(parts), dist.get_rank(group) * len(x)


def check(**matrices):
    """The matrices (rows, D) of one dtype, device and D, the first two with equally many rows, made contiguous."""
    one = next(iter(matrices.values()))
    for name, x in matrices.items():
        if not isinstance(x, Tensor) or x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a float16, bfloat16, float32 or float64 tensor, not {found}")
        if x.ndim != 2 or 0 in x.shape or x.shape[1] != one.shape[1]:
            raise ValueError(f"{', '.join(matrices)} must have shape (rows, D) with one D, but {name} is {tuple(x.shape)}")
        if x.dtype != one.dtype or x.device != one.device:
            raise ValueError(f"{', '.join(matrices)} must have one dtype and device, but {name} is {x.dtype} on {x.device}")
        if debugging() and ((x.detach().float().norm(dim=1) - 1).abs() > 0.02).any():
            raise ValueError(f"the rows of {name} must have length 1: use torch.nn.functional.normalize")
    a, b = list(matrices)[:2]
    if len(matrices[a]) != len(matrices[b]):
        raise ValueError(f"{a} and {b} must have the same number of rows, not {len(matrices[a])} and {len(matrices[b])}")
    return [x.contiguous() for x in matrices.values()]


def inverse(temperature, x):
    """1 / temperature as a tensor () beside x, and whether it exceeds NARROW."""
    if isinstance(temperature, Tensor) or not 1 / WIDEST <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number, at least {1 / WIDEST:.4f}, not {temperature}")
    return torch.full((), 1 / temperature, dtype=math_dtype(x), device=x.device), 1 / temperature > NARROW


def simclr_loss(z1, z2, temperature, group=None):
    """NT-Xent (SimCLR, Eq. 1) of two views (n, D) of n images, rows of length 1: the mean over the 2n anchors of this process,
    against the views of all processes. A scalar in nats, float32 (float64 for float64). ValueError or TypeError: see check."""
    z1, z2 = check(z1=z1, z2=z2)
    scale, wide = inverse(temperature, z1)
    with torch.autocast(z1.device.type, enabled=False):
        x = torch.cat([z1, z2])  # (2n, D)
        y, first = gather(x, group)  # (2N, D)
        lse = lse_op(x.detach(), y, scale, wide, first)
        target = torch.cat([z2, z1]).detach()
        return contrast_op(x, y, target, lse, gather(lse, group)[0], scale, wide, first, 1.0)


def clip_loss(x, y, scale, group=None):
    """CLIP's symmetric loss of n pairs (n, D), rows of length 1, against those of all processes: the mean of both directions,
    in nats. scale: the logits' factor, a tensor () that may be learned (at most 170; CLIP clamps it to 100), or a number."""
    x, y = check(x=x, y=y)
    if not isinstance(scale, Tensor) and not abs(scale) <= WIDEST:
        raise ValueError(f"scale must be at most {WIDEST:.0f}, not {scale}")
    scale = scale if isinstance(scale, Tensor) else torch.tensor(float(scale), dtype=math_dtype(x))
    if scale.ndim or not scale.is_floating_point():
        raise ValueError(f"scale must be one floating-point number, not {scale.dtype} of shape {tuple(scale.shape)}")
    if debugging() and not scale.abs() <= WIDEST:
        raise ValueError(f"scale must be at most {WIDEST:.0f}, not {scale.item()}")
    scale = scale.to(x.device, math_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        if processes(group) == 1 and not use_kernel(x) and not x.is_cuda:
            return clip_op(x, y, scale, torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, scale)))[0]
        (all_x, _), (all_y, _) = gather(x, group), gather(y, group)  # (N, D)
        nobody = len(all_x)  # no row meets itself
        lse_x = lse_op(x.detach(), all_y, scale.detach(), True, nobody)
        lse_y = lse_op(y.detach(), all_x, scale.detach(), True, nobody)
        return (contrast_op(x, all_y, y.detach(), lse_x, gather(lse_y, group)[0], scale, True, nobody, 0.5)
                + contrast_op(y, all_x, x.detach(), lse_y, gather(lse_x, group)[0], scale, True, nobody, 0.5))


def moco_loss(q, k, queue, temperature):
    """MoCo's loss (Eq. 1) of queries q (n, D) with positives k (n, D) and shared negatives queue (K, D), rows of length 1: the
    mean over this process's queries, in nats. Gradient to q only. Communicates nothing."""
    q, k, queue = check(q=q, k=k, queue=queue)
    scale, _ = inverse(temperature, q)
    with torch.autocast(q.device.type, enabled=False):
        return moco_op(q, k.detach(), queue.detach(), scale)[0]
