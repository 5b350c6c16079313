"""InfoNCE without the matrix of logits, for the four shapes it has in self-supervised learning.

van den Oord, Li, Vinyals 2018 (CPC), Eq. 4: https://arxiv.org/abs/1807.03748
Chen et al. 2020 (SimCLR), Eq. 1: https://arxiv.org/abs/2002.05709
Radford et al. 2021 (CLIP), Figure 3: https://arxiv.org/abs/2103.00020
He et al. 2020 (MoCo), Eq. 1: https://arxiv.org/abs/1911.05722
Wu et al. 2018 (InstDisc), Eq. 2: https://arxiv.org/abs/1805.01978

    simclr_loss(z1, z2, temperature, group)   2N anchors, each against the 2N - 1 others; the
                                              positive is the other view of the same image
    clip_loss(x, y, scale, group)             each x against all y and each y against all x,
                                              averaged; the scale may be learned
    moco_loss(q, k, queue, temperature)       each q against its own k and the whole queue;
                                              only q gets a gradient
    bank_loss(q, bank, own, temperature)      each q against a bank that holds its own row, too;
                                              only q gets a gradient

Notation. x (R, D) are the anchors of this process, y (C, D) the candidates of all processes; every
row has length 1. a = scale = 1 / temperature, s_ij = x_i . y_j, and t (R, D) are the positives.
In SimCLR anchor i is itself candidate first + i, which must be masked; in CLIP and MoCo no anchor
is among the candidates. In bank_loss the positive of anchor i is candidate own_i, which is masked:
what is left are the negatives, and the loss is that of MoCo.

    lse_i = log sum over j != self of exp(a s_ij)          L = mean over i of lse_i - a x_i . t_i
    p_ij = exp(a s_ij - lse_i)

Forward, as plain loops over tiles of the logits, which never leave the chip. The kernels below
number their steps in the same way; lse_kernel_simple is these lines, lse_kernel the fast form.

    for each block of rows i:
        top = -inf, total = 0
        for each block of columns j:
            1. s = a x_i y_j^T
            2. new = max(top, max of s)
            3. total = total exp(top - new) + sum of exp(s - new);  top = new
        4. lse_i = top + log(total)

Where a <= 43, exp(a s) neither overflows nor vanishes for |s| <= 1, and the fast kernel needs no
maximum. Above, it rounds the maximum of log2(e) a s to a whole number. Then exp(top - new) only
shifts bits, and each logit costs one power. MoCo keeps one more sum, o_i = sum_j p_ij y_j. It is
already the gradient, so the queue is read only once. The same holds for bank_loss.

Backward. An anchor is also a candidate of other anchors. Row i of the gradient of the GLOBAL mean
has both parts, and needs only the rows of this process and the lse of all processes: no atomic
additions, no communication. In SimCLR s is symmetric; in CLIP lse_j is that of the other direction.

    dL/dx_i = w a / R [sum_j (exp(a s_ij - lse_i) + exp(a s_ij - lse_j)) y_j - 2 t_i]
    dL/da = sum_i x_i . dL/dx_i / (2 a)                              w = 1/2 in CLIP, 1 in SimCLR

    for each block of rows i:
        sums = 0
        for each block of columns j:
            1. s = x_i y_j^T
            2. e = exp(a s);  g = e exp(-lse_i) + e exp(-lse_j)
            3. sums = sums + g y_j

One power per logit gives both terms of g. Where a > 43, e is exp(a s / 2), and g is the sum of the
squares of e exp(-lse_i / 2) and e exp(-lse_j / 2). The formula for dL/da holds because L depends on
a, x and y only through the products a s_ij.

On a GPU step 3 rounds g to the 16 bits of y. Between views that agree g is almost 2, and of the
small difference to the 2 in front of t_i nothing would be left. So there the sums leave out the
positives, which then enter in float32, with the weight exp(-loss_i) - 1 + exp(-loss_t) - 1.

Why fused. Bytes for M = 2N = 8192 and D = 128, counted, not measured: plain PyTorch reads or writes
a float32 matrix (M, M) about 12 times, 3.2 GB. Here each block of rows reads all candidates, 2 MB,
which stay in the cache. Both need 6 M^2 D FLOPs.

Distributed contract. Every process holds the same number of rows. The embeddings (C, D) and the lse
(C,) are gathered. The value is the mean over the anchors of this process. The AVERAGE of the
gradients over the processes, which DistributedDataParallel takes, is the gradient of the global
mean loss, for every parameter and for the scale. If you sum gradients instead of averaging them,
divide by the number of processes. Candidates are ordered by process, z1 before z2 in each.

Limits. Rows have length 1, a <= 170, and all processes hold equally many rows. The length is
checked, see require_unit_rows. A scale that is a tensor, MoCo's queue, the rows of a bank and the
numbers of rows on other processes are checked only under torch.autograd.set_detect_anomaly. First
derivatives only. Deterministic: no atomics, sums in a fixed order. Measured speed: not run on a
GPU.

Give rows in float32: on CUDA they are rounded to float16 inside, whose range and digits suit unit
rows, but the gradient is float32, because in float16 most of it would become 0 once the views of an
image agree. It is the gradient at the rounded rows. Rows given in float16 or bfloat16 get theirs in
that dtype, as autograd wants it.

The kernels run on CUDA for D up to 256, and sum in float32. Everything else takes the PyTorch path,
which goes through blocks of rows in float32 (in float64 for float64); on CUDA its products of 16
bits are those of cuBLAS, summed in float32. moco_loss and bank_loss compute their gradients along
with the loss; on a CPU with one process clip_loss does so too, and holds three blocks. Calling
operators takes about 0.1 ms on a CPU, which is noticeable below about 200 rows.
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
MAX_SCALE_PLAIN = 43.0  # up to it exp(scale s) needs no maximum in float32: 2 x 43 x LOG2E < 126
MAX_SCALE = 170.0  # up to it the same holds for exp(scale s / 2)
UNIT_TOLERANCE = 0.02  # F.normalize in bfloat16 changes the length of a row by up to 0.01
NOT_UNIT = "InfoNCE needs rows of length 1: normalise first, F.normalize(z, dim=1)"

# Probabilities are multiplied by it before they become float16, or 1 / 65536 would lose its digits.
FP16_GAIN = 1024.0

# Tiles for D up to 128, and for D up to 256: as large as registers allow while two programs still
# fit on one multiprocessor.
LSE_TILES = [
    dict(BM=64, BN=128, num_warps=4, num_stages=3),
    dict(BM=128, BN=128, num_warps=8, num_stages=2),
]
MEAN_TILES = [
    dict(BM=64, BN=128, num_warps=4, num_stages=3),
    dict(BM=64, BN=64, num_warps=4, num_stages=2),
]
BANK_TILES = [  # of the mean with OWN, which needs more registers
    dict(BM=64, BN=128, num_warps=4, num_stages=3),
    dict(BM=64, BN=32, num_warps=4, num_stages=2),
]
GRAD_TILES = [
    dict(BM=64, BN=128, num_warps=4, num_stages=2),
    dict(BM=64, BN=64, num_warps=4, num_stages=2),
]
SIMPLE_TILES = dict(BM=64, BN=64, num_warps=4, num_stages=2)


# -------- 1. The specifications, for one process --------------------------------------------------


def simclr_reference(z1, z2, temperature):
    """SimCLR Eq. 1, averaged over the 2N anchors. z1, z2: (N, D)."""
    z = torch.cat([z1, z2])  # (2N, D)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # (2N, 2N)
    positive = (z * torch.cat([z2, z1])).sum(1) / temperature  # (2N,)
    return (logits.logsumexp(1) - positive).mean()


def clip_reference(x, y, scale):
    """CLIP, Figure 3. x, y: (N, D)."""
    logits = scale * x @ y.T  # (N, N)
    lse = logits.logsumexp(1) / 2 + logits.logsumexp(0) / 2  # (N,)
    return (lse - logits.diagonal()).mean()


def moco_reference(q, k, queue, temperature):
    """MoCo Eq. 1. q, k: (n, D); queue: (K, D)."""
    positive = (q * k.detach()).sum(1, keepdim=True)  # (n, 1)
    negatives = q @ queue.detach().T  # (n, K)
    logits = torch.cat([positive, negatives], 1) / temperature  # (n, 1 + K)
    return (logits.logsumexp(1) - logits[:, 0]).mean()


def bank_reference(q, bank, own, temperature):
    """InstDisc Eq. 2: -log P(own_i | q_i). q: (n, D); bank: (M, D); own: (n,)."""
    logits = q @ bank.detach().T / temperature  # (n, M)
    positive = logits.gather(1, own[:, None])[:, 0]  # (n,)
    return (logits.logsumexp(1) - positive).mean()


# -------- 2. The PyTorch path: one block of rows at a time ----------------------------------------


def math_dtype(*tensors):
    """The dtype of sums and losses."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def on_gpu(x):
    """A function, so that tests can take the branches for GPUs on a CPU."""
    return x.is_cuda


def rounded(x):
    """Rows as they enter products: on a GPU float32 becomes float16, for its tensor cores."""
    return x.half() if on_gpu(x) and x.dtype == torch.float32 else x


def factors(*rows):
    """float16 and bfloat16 stay what they are on a GPU, for its tensor cores; on a CPU they become
    float32."""
    return [x if x.is_cuda else x.to(math_dtype(x)) for x in rows]


def product(a, b):
    """a @ b, summed in float32 or float64."""
    if b.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a @ b


def rows_per_block(x, y):
    """So many rows that their logits take 2 MB (256 MB on a GPU), for any number of candidates."""
    return max(1, 2 ** (26 if x.is_cuda else 19) // len(y))


def row_blocks(x, y):
    """Yields (slice of rows, their products x y^T, without scale), block by block."""
    step = rows_per_block(x, y)
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        yield rows, product(x[rows], y.T)


def lse_torch(x, y, scale, large_scale, first):
    """The PyTorch form of lse_op."""
    lse = x.new_empty(len(x), dtype=math_dtype(x))
    x, y = factors(x, y)
    for rows, s in row_blocks(x, y):
        s *= scale
        # where an anchor meets itself; this diagonal is empty if it lies beyond the columns
        s.diagonal(first + rows.start).fill_(-torch.inf)
        if large_scale:
            lse[rows] = s.logsumexp(1)
        else:
            lse[rows] = s.exp_().sum(1).log_()
    return lse


def mean_torch(q, queue, scale, own=None):
    """The PyTorch form of lse_and_mean."""
    lse = q.new_empty(len(q), dtype=math_dtype(q))
    mean = q.new_empty(q.shape, dtype=math_dtype(q))
    q, queue = factors(q, queue)
    for rows, s in row_blocks(q, queue):
        if own is not None:
            # not -inf: where there is no other row, s - top would be inf - inf
            s.scatter_(1, own[rows, None], -1e30)
        top = s.amax(1, keepdim=True)
        total = s.sub_(top).mul_(scale).exp_().sum(1, keepdim=True)
        mean[rows] = product(s.mul_(FP16_GAIN), queue) / (FP16_GAIN * total)
        lse[rows] = (top * scale + total.log())[:, 0]
    return lse, mean


def grad_weights(lse, large_scale):
    """FP16_GAIN exp(-lse), or the square root of it."""
    half = 0.5 if large_scale else 1.0
    return FP16_GAIN**half * torch.exp(-half * lse)


def grad_torch(x, y, lse_x, lse_y, scale, large_scale, first):
    """The PyTorch form of grad_op."""
    out = x.new_empty(x.shape, dtype=math_dtype(x))
    x, y = factors(x, y)
    wx = grad_weights(lse_x[:, None], large_scale)  # (R, 1)
    wy = grad_weights(lse_y, large_scale)  # (C,)
    half = 0.5 if large_scale else 1.0

    for rows, s in row_blocks(x, y):
        e = s.mul_(half * scale).exp_()
        if large_scale:
            g = (e * wx[rows]).square_()
            g.add_(e.mul_(wy).square_())
        else:
            g = e.mul_(wx[rows] + wy)
        g.diagonal(first + rows.start).fill_(0.0)
        out[rows] = product(g, y)
    return out.div_(FP16_GAIN)


# -------- 3. The kernels --------------------------------------------------------------------------

if triton is not None:
    # Kernels may use numbers from outside only in this form.
    TL_LOG2E = tl.constexpr(LOG2E)
    TL_FP16_GAIN = tl.constexpr(FP16_GAIN)
    # In float32, x + ROUND has no binary digits left behind the point: it holds x, rounded.
    ROUND = tl.constexpr(1.5 * 2**23)

    @triton.jit
    def addresses(ptr, row, D: tl.constexpr):
        """Where the rows `row` (n,) of a matrix with D columns lie in memory -> (n, D)."""
        # Row r of the matrix follows row r - 1 in memory, so that element (r, d) lies r * D + d
        # elements after the first one. row[:, None] is a column of n row numbers, d[None, :] a row
        # of D column numbers, and their sum is an (n, D) block of such distances. int64, because
        # r * D exceeds 2^31 in a matrix of 17 million rows and 128 columns.
        d = tl.arange(0, D)
        return ptr + row[:, None].to(tl.int64) * D + d[None, :]

    @triton.jit
    def lse_kernel_simple(
        x_ptr, y_ptr, scale_ptr, lse_ptr, R, C, first,
        D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ):
        """Version 1 of lse_kernel, to be read first: the plain loops of "Forward" above.

        Reads x (R, D), y (C, D) and scale (); writes lse (R,). A program owns BM rows of x and goes
        through all of y, BN rows at a time.
        """
        # The last program may have rows beyond the end: they are read as 0 and never written.
        row = tl.program_id(0) * BM + tl.arange(0, BM)  # (BM,)
        x_at = addresses(x_ptr, row, D)  # (BM, D)
        x = tl.load(x_at, mask=row[:, None] < R, other=0.0)
        scale = tl.load(scale_ptr)

        # Not -inf: for a row that has no candidate at all, top - new would be inf - inf.
        top = tl.full((BM,), -1e30, tl.float32)
        total = tl.zeros((BM,), tl.float32)

        for start in range(0, C, BN):
            column = start + tl.arange(0, BN)  # (BN,)
            y_at = addresses(y_ptr, column, D)  # (BN, D)
            y = tl.load(y_at, mask=column[:, None] < C, other=0.0)

            # 1. the logits of this tile; what does not count becomes -inf, and exp(-inf) = 0
            s = scale * tl.dot(x, tl.trans(y), input_precision="ieee")  # (BM, BN)
            others = column[None, :] != first + row[:, None]
            counts = others & (column[None, :] < C)
            s = tl.where(counts, s, -float("inf"))

            # 2. the largest logit of each row so far
            new = tl.maximum(top, tl.max(s, 1))

            # 3. rescale the old sum to the new maximum, add the powers of this tile
            e = tl.exp(s - new[:, None])
            total = total * tl.exp(top - new) + tl.sum(e, 1)
            top = new

        # 4. undo the shift
        tl.store(lse_ptr + row, top + tl.log(total), mask=row < R)

    # What the fast kernels do beyond version 1:
    # - The columns are split among several programs, for otherwise a few rows against many columns
    #   would leave most of the GPU idle. PyTorch then combines the results of the splits.
    # - Only the tiles that need masks have them: those of the diagonal, and the last tile. With
    #   OWN, where any tile may need one, all have that of the own column.
    # - Powers of 2 instead of e.

    @triton.jit
    def split_of_columns(C, per_split, own, BM: tl.constexpr, BN: tl.constexpr):
        """The tiles of BN columns that this program goes through, [low, high). Those in which its
        rows meet themselves are [own_low, own_high). They and the last tile, which may be ragged,
        need masks. own: the column in which the first of the BM rows meets itself."""
        low = tl.program_id(1) * per_split
        high = tl.minimum(low + per_split, tl.cdiv(C, BN))
        own_low = tl.minimum(tl.maximum(own // BN, low), high - 1)
        own_end = (own + BM - 1) // BN + 1
        own_high = tl.minimum(tl.maximum(own_end, own_low), high - 1)

        plain_tiles = own_low - low + high - 1 - own_high
        masked_tiles = own_high - own_low + 1
        return low, own_low, own_high, high, plain_tiles, masked_tiles

    @triton.jit
    def tile_index(n, low, own_low, own_high, high, MASKED: tl.constexpr):
        """The n-th tile with masks, or the n-th without."""
        if MASKED:  # those of the diagonal, [own_low, own_high), then the last one
            j = tl.where(n < own_high - own_low, own_low + n, high - 1)
        else:  # all others: [low, own_low), then [own_high, high - 1)
            j = low + n
            j = tl.where(j < own_low, j, j + (own_high - own_low))
        return j

    @triton.jit
    def load_tile(y_ptr, column, C, D: tl.constexpr, MASKED: tl.constexpr):
        """The candidates `column` (BN,) -> (BN, D)."""
        at = addresses(y_ptr, column, D)
        if MASKED:
            y = tl.load(at, mask=column[:, None] < C, other=0.0)
        else:
            y = tl.load(at)
        return y

    @triton.jit
    def shrink_factor(top, new):
        """2^(top - new) of whole numbers, both stored with ROUND added.

        The last bits of such a float count in steps of 1, like those of an integer. The difference
        of the bit patterns is therefore top - new. A float32 keeps its exponent, plus 127, above 23
        other bits, so shifting puts it in place: no power is computed.
        """
        top_bits = top.to(tl.int32, bitcast=True)
        new_bits = new.to(tl.int32, bitcast=True)
        bits = tl.maximum(top_bits - new_bits + 127, 0) << 23
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def lse_kernel(
        x_ptr, y_ptr, scale_ptr, own_ptr, lse_ptr, mean_ptr, R, C, first, per_split,
        D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        LARGE_SCALE: tl.constexpr, MEAN: tl.constexpr, OWN: tl.constexpr,
    ):
        """lse_i, and with MEAN also sum_j p_ij y_j, over the columns of each split.

        Reads x (R, D), y (C, D) and scale (); writes lse (splits, R) and mean (splits, R, D). A
        program owns BM rows and `per_split` tiles of BN columns. With OWN it reads own (R,), too:
        row i meets itself in column own_i; first = C then says that there is no diagonal.
        """
        # The rows and the tiles of this program.
        row = tl.program_id(0) * BM + tl.arange(0, BM)  # (BM,)
        own = first + tl.program_id(0) * BM
        low, own_low, own_high, high, plain_tiles, masked_tiles = split_of_columns(
            C, per_split, own, BM, BN
        )
        x_at = addresses(x_ptr, row, D)  # (BM, D)
        x = tl.load(x_at, mask=row[:, None] < R, other=0.0)
        if OWN:
            itself = tl.load(own_ptr + row, mask=row < R, other=0)  # (BM,)
        else:
            itself = first + row
        scale2 = tl.load(scale_ptr) * TL_LOG2E  # exp(scale s) = 2^(scale2 s)

        top = tl.full((BM,), ROUND - 1024, tl.float32)  # the maximum so far, rounded, plus ROUND
        total = tl.zeros((BM,), tl.float32)
        sums = tl.zeros((BM, D if MEAN else 1), tl.float32)

        # Two loops, made when the kernel is compiled: the tiles without masks, then the others.
        for MASKED in tl.static_range(2):
            for n in range(masked_tiles if MASKED else plain_tiles):
                j = tile_index(n, low, own_low, own_high, high, MASKED)
                column = j * BN + tl.arange(0, BN)  # (BN,)
                y = load_tile(y_ptr, column, C, D, MASKED)  # (BN, D)

                # an anchor never meets itself (unused without masks, and then not compiled)
                counts = column[None, :] != itself[:, None]  # (BM, BN)
                if MASKED:
                    counts = counts & (column[None, :] < C)

                # 1. the logits of this tile, for powers of 2
                s = tl.dot(x, tl.trans(y), input_precision="ieee") * scale2  # (BM, BN)
                if MASKED or OWN:
                    s = tl.where(counts, s, -float("inf"))

                if LARGE_SCALE:
                    # 2. the new maximum, rounded to a whole number
                    new = tl.maximum(top, tl.max(s, 1) + ROUND)

                    # 3. rescale the old sums to the new maximum, add the powers of this tile
                    shrink = shrink_factor(top, new)
                    e = tl.exp2(s - (new - ROUND)[:, None])
                    total = total * shrink + tl.sum(e, 1)
                    if MEAN:
                        p = (e * TL_FP16_GAIN).to(y.dtype)
                        sums = tl.dot(p, y, sums * shrink[:, None], input_precision="ieee")
                    top = new
                else:
                    # 2. and 3. without a maximum
                    total += tl.sum(tl.exp2(s), 1)

        if OWN:
            # The own column may be the only one of a split: a weight of almost 0, instead of 0 / 0.
            total = tl.where(total == 0, 1e-37, total)

        # 4. undo the shift, and go back from powers of 2 to powers of e
        lse2 = tl.log2(total)
        if LARGE_SCALE:
            lse2 = (top - ROUND) + lse2
        out = tl.program_id(1) * R + row  # rows of (splits x R)
        tl.store(lse_ptr + out, lse2 / TL_LOG2E, mask=row < R)
        if MEAN:
            mean = sums / (total * TL_FP16_GAIN)[:, None]
            tl.store(addresses(mean_ptr, out, D), mean, mask=row[:, None] < R)

    @triton.jit
    def grad_kernel(
        x_ptr, y_ptr, wx_ptr, wy_ptr, scale_ptr, out_ptr, R, C, first, per_split,
        D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LARGE_SCALE: tl.constexpr,
    ):
        """FP16_GAIN sum_j (exp(a s_ij - lse_i) + exp(a s_ij - lse_j)) y_j over the columns of each
        split: the plain loops of "Backward" above.

        Reads x (R, D), y (C, D), scale (), and wx (R,), wy (C,): FP16_GAIN exp(-lse), or its square
        root if LARGE_SCALE. Writes out (splits, R, D).
        """
        # The rows and the tiles of this program.
        row = tl.program_id(0) * BM + tl.arange(0, BM)  # (BM,)
        own = first + tl.program_id(0) * BM
        low, own_low, own_high, high, plain_tiles, masked_tiles = split_of_columns(
            C, per_split, own, BM, BN
        )
        x_at = addresses(x_ptr, row, D)  # (BM, D)
        x = tl.load(x_at, mask=row[:, None] < R, other=0.0)
        wi = tl.load(wx_ptr + row, mask=row < R, other=0.0)[:, None]  # (BM, 1)
        scale2 = tl.load(scale_ptr) * (TL_LOG2E / 2 if LARGE_SCALE else TL_LOG2E)
        sums = tl.zeros((BM, D), tl.float32)

        # Two loops, made when the kernel is compiled: the tiles without masks, then the others.
        for MASKED in tl.static_range(2):
            for n in range(masked_tiles if MASKED else plain_tiles):
                j = tile_index(n, low, own_low, own_high, high, MASKED)
                column = j * BN + tl.arange(0, BN)  # (BN,)
                y = load_tile(y_ptr, column, C, D, MASKED)  # (BN, D)

                # an anchor never meets itself (unused without masks, and then not compiled)
                others = column[None, :] != first + row[:, None]
                counts = others & (column[None, :] < C)  # (BM, BN)

                # 1. the cosines of this tile
                s = tl.dot(x, tl.trans(y), input_precision="ieee")  # (BM, BN)

                # 2. both probabilities of each pair, from one power
                if MASKED:
                    wj = tl.load(wy_ptr + column, mask=column < C, other=0.0)[None, :]
                else:
                    wj = tl.load(wy_ptr + column)[None, :]  # (1, BN)
                e = tl.exp2(s * scale2)
                if LARGE_SCALE:
                    g = (e * wi) * (e * wi) + (e * wj) * (e * wj)
                else:
                    g = e * (wi + wj)
                if MASKED:
                    g = tl.where(counts, g, 0.0)

                # 3. add the candidates, weighted by them
                sums = tl.dot(g.to(y.dtype), y, sums, input_precision="ieee")

        out = tl.program_id(1) * R + row  # rows of (splits x R)
        tl.store(addresses(out_ptr, out, D), sums, mask=row[:, None] < R)


def use_kernel(x):
    sixteen_bits = x.dtype in (torch.float16, torch.bfloat16)
    return triton is not None and x.is_cuda and sixteen_bits and x.shape[1] <= 256


def plan(x, y, BM, BN):
    """-> ((blocks of rows, splits of the columns), tiles per split): two programs per processor of
    the GPU."""
    processors = 1  # as the interpreter has
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    blocks = triton.cdiv(len(x), BM)
    tiles = triton.cdiv(len(y), BN)
    per_split = triton.cdiv(tiles, max(1, 2 * processors // blocks))
    return (blocks, triton.cdiv(tiles, per_split)), per_split


def launch(kernel, grid, x, *arguments, **constants):
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[grid](x, *arguments, D=x.shape[1], **constants)


def padded(x):
    """x with columns of zeros added up to a power of 2 of at least 16, which tl.dot needs. They
    change no product. x itself if it has that many."""
    columns = max(16, triton.next_power_of_2(x.shape[1]))
    if columns == x.shape[1]:
        return x.contiguous()
    return torch.nn.functional.pad(x, (0, columns - x.shape[1]))


def lse_simple(x, y, scale, first):
    """lse_op by lse_kernel_simple, for any scale: for tests, and to compare the speed with."""
    x, y = padded(x), padded(y)
    lse = x.new_empty(len(x), dtype=torch.float32)
    grid = (triton.cdiv(len(x), SIMPLE_TILES["BM"]),)
    sizes = (len(x), len(y), first)
    launch(lse_kernel_simple, grid, x, y, scale, lse, *sizes, **SIMPLE_TILES)
    return lse


# -------- 4. The operators that torch.compile and autograd see; collectives stay outside ----------
# large_scale: the scale may exceed MAX_SCALE_PLAIN.


def not_unit(x):
    """-> bool (): some row has another length than 1. Allowed are the rounding to 16 bits, and rows
    of zeros, which F.normalize makes of zeros in float32. NaN is left to show in the loss."""
    length = torch.linalg.vector_norm(x, dim=1, dtype=math_dtype(x))  # (rows,)
    return ((length * (length - 1)).abs() > UNIT_TOLERANCE).any()


def require_unit_rows(*matrices):
    """ValueError on a CPU. On CUDA the check does not wait for the GPU: a wrong row stops the
    program with a failed assertion of the device, which prints the same sentence."""
    for x in matrices:
        if x.is_cuda:
            torch._assert_async(~not_unit(x), NOT_UNIT)
        elif not_unit(x):
            raise ValueError(NOT_UNIT)


@library.custom_op("ssl_kernels::infonce_lse", mutates_args=())
def lse_op(x: Tensor, y: Tensor, scale: Tensor, large_scale: bool, first: int) -> Tensor:
    """-> (R,): log sum_j exp(scale s_ij), j != first + i. Checks the rows of x: those of y are
    checked by the processes that hold them."""
    require_unit_rows(x)
    if not use_kernel(x):
        return lse_torch(x, y, scale, large_scale, first)

    x, y = padded(x), padded(y)
    tiles = LSE_TILES[x.shape[1] > 128]
    grid, per_split = plan(x, y, tiles["BM"], tiles["BN"])
    lse = x.new_empty(grid[1], len(x), dtype=torch.float32)
    sizes = (len(x), len(y), first, per_split)
    options = dict(LARGE_SCALE=large_scale, MEAN=False, OWN=False, **tiles)
    launch(lse_kernel, grid, x, y, scale, lse, lse, lse, *sizes, **options)
    return lse.logsumexp(0)


@lse_op.register_fake
def lse_fake(x, y, scale, large_scale, first):
    return x.new_empty(x.shape[0], dtype=math_dtype(x))


def lse_and_mean(q, queue, scale, own=None):
    """-> lse (R,), and sum_j p_ij y_j (R, D); over j != own_i, if own (R,) is given. Right for rows
    of any length. Where no j is left, exp(lse) is 0."""
    if not use_kernel(q):
        return mean_torch(q, queue, scale, own)

    x, y = padded(q), padded(queue)
    tiles = (MEAN_TILES if own is None else BANK_TILES)[x.shape[1] > 128]
    grid, per_split = plan(x, y, tiles["BM"], tiles["BN"])
    lse = x.new_empty(grid[1], len(x), dtype=torch.float32)
    mean = x.new_empty(*lse.shape, x.shape[1], dtype=torch.float32)
    sizes = (len(x), len(y), len(y), per_split)  # first = len(y): no row meets itself
    options = dict(LARGE_SCALE=True, MEAN=True, OWN=own is not None, **tiles)
    own = lse if own is None else own.int()
    launch(lse_kernel, grid, x, y, scale, own, lse, mean, *sizes, **options)

    total = lse.logsumexp(0)
    share = (lse - total).exp()[:, :, None]  # (splits, R, 1)
    return total, (share * mean).sum(0)[:, : q.shape[1]].contiguous()


@library.custom_op("ssl_kernels::infonce_grad", mutates_args=())
def grad_op(
    x: Tensor,
    y: Tensor,
    lse_x: Tensor,
    lse_y: Tensor,
    scale: Tensor,
    large_scale: bool,
    first: int,
) -> Tensor:
    """-> (R, D): sum_j (exp(scale s_ij - lse_x_i) + exp(scale s_ij - lse_y_j)) y_j."""
    if not use_kernel(x):
        return grad_torch(x, y, lse_x, lse_y, scale, large_scale, first)

    D = x.shape[1]
    x, y = padded(x), padded(y)
    wx = grad_weights(lse_x, large_scale)
    wy = grad_weights(lse_y, large_scale)
    tiles = GRAD_TILES[x.shape[1] > 128]
    grid, per_split = plan(x, y, tiles["BM"], tiles["BN"])
    out = x.new_empty(grid[1], *x.shape, dtype=torch.float32)
    sizes = (len(x), len(y), first, per_split)
    options = dict(LARGE_SCALE=large_scale, **tiles)
    launch(grad_kernel, grid, x, y, wx, wy, scale, out, *sizes, **options)
    return (out.sum(0)[:, :D] / FP16_GAIN).contiguous()


@grad_op.register_fake
def grad_fake(x, y, lse_x, lse_y, scale, large_scale, first):
    return x.new_empty(x.shape, dtype=math_dtype(x))


def sums_without_positives(x, y, lse_x, lse_y, scale, large_scale, first, views):
    """-> (R, D): grad_op, but its sums leave out the positives, too. It can leave out one candidate
    of each row, so it takes each view of the anchors with each view of the candidates. In all of
    these pairs of views, the row of an anchor is also that of its image among the candidates."""
    n = len(x) // views
    by_view = y.unflatten(0, (-1, views, n)).unbind(1)  # (processes, n, D) of each view
    lse_by_view = lse_y.unflatten(0, (-1, views, n)).unbind(1)
    candidates = [y_b.flatten(0, 1) for y_b in by_view]  # (N, D)
    lse_candidates = [lse_b.flatten() for lse_b in lse_by_view]

    sums = []
    options = (scale, large_scale, first // views)
    for x_a, lse_a in zip(x.split(n), lse_x.split(n)):
        parts = [
            grad_op(x_a, y_b, lse_a, lse_b, *options)
            for y_b, lse_b in zip(candidates, lse_candidates)
        ]
        sums.append(sum(parts))
    return torch.cat(sums)  # the views one after the other


@library.custom_op("ssl_kernels::infonce", mutates_args=())
def contrast_op(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    lse_x: Tensor,
    lse_y: Tensor,
    scale: Tensor,
    large_scale: bool,
    first: int,
    views: int,
    weight: float,
) -> Tensor:
    """-> (): weight times the mean over rows of lse_x - scale x . target. The rest is for the
    backward: y and lse_y, in which the rows of this process begin at first; and views, 2 if they
    hold two views of the images one after the other, as in SimCLR, 1 in CLIP.

    y and target are rounded, see `rounded`; x, which gets the gradient, is not yet."""
    x = x.to(y.dtype)
    losses = lse_x - scale * (x.to(lse_x.dtype) * target).sum(1)  # (R,)
    # below 0 only by rounding: this product and lse_x sum in different orders
    return weight * losses.clamp(min=0).mean()


@contrast_op.register_fake
def contrast_fake(x, y, target, lse_x, lse_y, scale, large_scale, first, views, weight):
    return lse_x.new_empty(())


def contrast_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def contrast_backward(ctx, grad):
    x, y, target, lse_x, lse_y, scale = ctx.saved_tensors
    large_scale, first, views, weight = ctx.options
    dtype = x.dtype
    x = x.to(y.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if on_gpu(x):  # see "On a GPU" above
            sums = sums_without_positives(x, y, lse_x, lse_y, scale, large_scale, first, views)
            positive = scale * (x.to(lse_x.dtype) * target).sum(1)  # (R,)
            own = lse_y[first : first + len(x)]
            lse_t = own.roll(len(x) // views)  # of the positives, as anchors
            p_i = (positive - lse_x).clamp(max=0)  # logarithms of probabilities
            p_t = (positive - lse_t).clamp(max=0)
            dx = sums + (p_i.expm1() + p_t.expm1())[:, None] * target
        else:
            itself = first if views == 2 else len(y)
            sums = grad_op(x, y, lse_x, lse_y, scale, large_scale, itself)
            dx = sums - 2 * target
        dx = dx * (grad * weight / len(x))  # still without the factor scale
    dscale = (dx * x).sum() / 2 if ctx.needs_input_grad[5] else None
    dx = (dx * scale).to(dtype)
    return dx, None, None, None, None, dscale, None, None, None, None


@library.custom_op("ssl_kernels::infonce_moco", mutates_args=())
def moco_op(
    q: Tensor, k: Tensor, queue: Tensor, scale: Tensor, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> loss (), and its gradient to q (n, D). own (n,): the rows of the queue that are k, if it
    holds them, too."""
    require_unit_rows(q, k)
    q, k, queue = rounded(q), rounded(k), rounded(queue)
    lse, mean = lse_and_mean(q, queue, scale, own)
    positive = scale * (q.to(lse.dtype) * k).sum(1)
    total = torch.logaddexp(lse, positive)

    p_positive = (positive - total).exp()[:, None]  # (n, 1)
    p_queue = (lse - total).exp()[:, None]  # (n, 1), of the whole queue
    gradient = (p_queue * mean + (p_positive - 1) * k) * (scale / len(q))
    return (total - positive).mean(), gradient


@moco_op.register_fake
def moco_fake(q, k, queue, scale, own):
    return scale.new_empty(()), scale.new_empty(q.shape)


@library.custom_op("ssl_kernels::infonce_clip", mutates_args=())
def clip_op(
    x: Tensor, y: Tensor, scale: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CLIP on a CPU where one process has all rows: both directions take the same logits.
    -> loss (), and its gradients to x, y and scale, the first two without rows if not asked for."""
    require_unit_rows(x, y)
    x, y = factors(x, y)
    if gradients:
        return clip_value_and_gradients(x, y, scale)
    loss = clip_value(x, y, scale)
    dx = torch.empty_like(x[:0])
    dy = torch.empty_like(y[:0])
    return loss, dx, dy, torch.zeros_like(scale)


@clip_op.register_fake
def clip_fake(x, y, scale, gradients):
    dx = scale.new_empty(len(x) * gradients, x.shape[1])
    dy = scale.new_empty(len(y) * gradients, y.shape[1])
    return scale.new_empty(()), dx, dy, scale.new_empty(())


def clip_value(x, y, scale):
    N = len(x)
    loss = 0.0
    positive = x.new_empty(N)
    lse_y = x.new_full((N,), -torch.inf)
    for rows, s in row_blocks(x * scale, y):
        positive[rows] = s.diagonal(rows.start)
        loss += (s.logsumexp(1) - positive[rows]).clamp(min=0).sum()
        lse_y = torch.logaddexp(lse_y, s.logsumexp(0))
    loss += (lse_y - positive).clamp(min=0).sum()
    return loss / (2 * N)


def clip_value_and_gradients(x, y, scale):
    N = len(x)
    scaled = x * scale
    one_block = rows_per_block(scaled, y) >= N

    # The direction from y to x needs whole columns: if they are cut into blocks, their lse first.
    lse_y = x.new_full((N,), -torch.inf)
    if not one_block:
        for _, s in row_blocks(scaled, y):
            lse_y = torch.logaddexp(lse_y, s.logsumexp(0))

    loss = 0.0
    dx = torch.empty_like(x)
    dy = torch.zeros_like(y)
    for rows, s in row_blocks(scaled, y):
        log_p = s.log_softmax(1)
        log_q = s.log_softmax(0) if one_block else s.sub_(lse_y)
        of_p = log_p.diagonal(rows.start).sum()
        of_q = log_q.diagonal(rows.start).clamp(max=0).sum()
        loss -= of_p + of_q

        g = log_p.exp_().add_(log_q.exp_())  # (rows, N)
        g.diagonal(rows.start).sub_(2)
        dx[rows] = g @ y
        dy.addmm_(g.T, x[rows])

    dx = dx / (2 * N)
    dy = dy / (2 * N)
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
    pairs = zip(ctx.saved_tensors, ctx.dtypes)
    gradients = [(x * grad).to(dtype) for x, dtype in pairs]
    return *gradients, *[None] * ctx.others


def no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "the InfoNCE losses have no second derivative; "
        "use simclr_reference, clip_reference, moco_reference or bank_reference"
    )


contrast_op.register_autograd(contrast_backward, setup_context=contrast_setup)
moco_op.register_autograd(scale_gradients, setup_context=keep_gradients)
clip_op.register_autograd(scale_gradients, setup_context=keep_gradients)
grad_op.register_autograd(no_second_derivative)


# -------- 5. The losses ---------------------------------------------------------------------------


def processes(group):
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def debugging():
    return not torch.compiler.is_compiling() and torch.is_anomaly_enabled()


def all_gather_detached(x, group):
    """-> (processes x n, ...) in the order of the processes, without gradient; and where the rows
    of this process begin. That each process holds n rows is checked only when debugging, because it
    costs a round of messages."""
    x = x.detach()
    if processes(group) == 1:
        return x, 0

    if debugging():
        rows = [None] * processes(group)
        dist.all_gather_object(rows, len(x), group)
        if len(set(rows)) > 1:
            raise ValueError(f"all processes must hold equally many rows, not {rows}")

    gathered = x.new_empty(processes(group) * len(x), *x.shape[1:])
    # The second name is that of older versions of torch; the newer ones warn of it.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, x, group)
    return gathered, dist.get_rank(group) * len(x)


def checked(**matrices):
    """The matrices (rows, D), made contiguous. TypeError or ValueError unless they have one dtype,
    device and D."""
    names = ", ".join(matrices)
    one = next(iter(matrices.values()))
    for name, x in matrices.items():
        allowed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if not isinstance(x, Tensor) or x.dtype not in allowed:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{name} must be a float16, bfloat16, float32 or float64 tensor, not {kind}"
            )
        if x.ndim != 2 or 0 in x.shape or x.shape[1] != one.shape[1]:
            raise ValueError(
                f"{names} must have shape (rows, D) with one D, but {name} is {tuple(x.shape)}"
            )
        if x.dtype != one.dtype or x.device != one.device:
            raise ValueError(
                f"{names} must have one dtype and device, but {name} is {x.dtype} on {x.device}"
            )
        if debugging() and not_unit(x.detach()):
            raise ValueError(
                f"the rows of {name} must have length 1: normalise first, F.normalize(z, dim=1)"
            )
    return [x.contiguous() for x in matrices.values()]


def require_one_length(**pair):
    """ValueError unless both tensors have equally many rows."""
    a, b = pair
    rows = [len(x) for x in pair.values()]
    if rows[0] != rows[1]:
        raise ValueError(
            f"{a} and {b} must have the same number of rows, not {rows[0]} and {rows[1]}"
        )


def inverse(temperature, x):
    """-> scale = 1 / temperature as a tensor () on the device of x; and large_scale."""
    least = 1 / MAX_SCALE
    if isinstance(temperature, Tensor) or not least <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number, at least {least:.4f}, not {temperature}")
    scale = torch.full((), 1 / temperature, dtype=math_dtype(x), device=x.device)
    return scale, 1 / temperature > MAX_SCALE_PLAIN


def simclr_loss(z1, z2, temperature, group=None):
    """NT-Xent, SimCLR Eq. 1: the mean over the 2n anchors of this process, against the views of all
    processes, in nats.

    z1, z2: (n, D), row i of both from image i, rows of length 1; float16, bfloat16, float32 or
        float64. Both get a gradient.
    temperature: a number, at least 1 / 170.
    group: the processes that contrast their rows; None: all of them.
    Returns a scalar, float32 (float64 for float64).
    Raises TypeError or ValueError if an argument is not as said above. Of rows on CUDA the program
    ends with a failed assertion of the device; torch.autograd.set_detect_anomaly(True) makes it a
    ValueError that names the argument.
    """
    z1, z2 = checked(z1=z1, z2=z2)
    require_one_length(z1=z1, z2=z2)
    scale, large_scale = inverse(temperature, z1)
    with torch.autocast(z1.device.type, enabled=False):
        x = torch.cat([z1, z2])  # (2n, D)
        rows = rounded(x.detach())
        target = rows.roll(len(z1), 0)  # the other view of each
        y, first = all_gather_detached(rows, group)  # (2N, D)
        lse = lse_op(rows, y, scale, large_scale, first)
        all_lse, _ = all_gather_detached(lse, group)  # (2N,)
        return contrast_op(x, y, target, lse, all_lse, scale, large_scale, first, 2, 1.0)


def clip_loss(x, y, scale, group=None):
    """CLIP, Figure 3: the mean of both directions over the n pairs of this process, against those
    of all processes, in nats.

    x, y: (n, D), row i of both from pair i, rows of length 1; float16, bfloat16, float32 or
        float64. Both get a gradient.
    scale: the factor of the logits, at most 170 (CLIP clamps it to 100); a number, or a floating
        tensor (), which gets a gradient. Whether a tensor is at most 170 is checked only under
        torch.autograd.set_detect_anomaly.
    group, result and errors: as for simclr_loss.
    """
    x, y = checked(x=x, y=y)
    require_one_length(x=x, y=y)
    if not isinstance(scale, Tensor):
        if not abs(scale) <= MAX_SCALE:
            raise ValueError(f"scale must be at most {MAX_SCALE:.0f}, not {scale}")
        scale = torch.tensor(float(scale), dtype=math_dtype(x))
    if scale.ndim or not scale.is_floating_point():
        shape = tuple(scale.shape)
        raise ValueError(
            f"scale must be one floating-point number, not {scale.dtype} of shape {shape}"
        )
    if debugging() and not scale.abs() <= MAX_SCALE:
        raise ValueError(f"scale must be at most {MAX_SCALE:.0f}, not {scale.item()}")
    scale = scale.to(x.device, math_dtype(x))

    with torch.autocast(x.device.type, enabled=False):
        if processes(group) == 1 and not on_gpu(x):
            wanted = any(t.requires_grad for t in (x, y, scale))
            return clip_op(x, y, scale, torch.is_grad_enabled() and wanted)[0]

        rows_x = rounded(x.detach())
        rows_y = rounded(y.detach())
        all_x, first = all_gather_detached(rows_x, group)  # (N, D)
        all_y, _ = all_gather_detached(rows_y, group)
        nobody = len(all_x)  # no row meets itself
        lse_x = lse_op(rows_x, all_y, scale.detach(), True, nobody)  # (n,)
        lse_y = lse_op(rows_y, all_x, scale.detach(), True, nobody)
        all_lse_y, _ = all_gather_detached(lse_y, group)  # (N,)
        all_lse_x, _ = all_gather_detached(lse_x, group)

        options = (scale, True, first, 1, 0.5)
        loss_x = contrast_op(x, all_y, rows_y, lse_x, all_lse_y, *options)
        loss_y = contrast_op(y, all_x, rows_x, lse_y, all_lse_x, *options)
        return loss_x + loss_y


def moco_loss(q, k, queue, temperature):
    """MoCo Eq. 1: the mean over the n queries of this process, in nats. Communicates nothing.

    q, k: (n, D), each query and its positive, rows of length 1; only q gets a gradient.
    queue: (K, D), the negatives of all queries: keys of earlier calls. To save a second reading of
        the queue, the length of its rows is checked only under torch.autograd.set_detect_anomaly;
        the loss is that of Eq. 1 for any length.
    temperature, dtypes, result and errors: as for simclr_loss.
    """
    q, k, queue = checked(q=q, k=k, queue=queue)
    require_one_length(q=q, k=k)
    scale, _ = inverse(temperature, q)
    with torch.autocast(q.device.type, enabled=False):
        return moco_op(q, k.detach(), queue.detach(), scale, None)[0]


def bank_loss(q, bank, own, temperature):
    """InstDisc, Eq. 2: each query must name its own row of the bank. The mean over the n queries of
    -log P(own_i | q_i), in nats. Communicates nothing.

    q: (n, D), rows of length 1. Only q gets a gradient: not for CPC, whose candidates learn, too.
    bank: (M, D), rows of all images, or the keys of all processes. The length of all but the own
        rows is checked only under torch.autograd.set_detect_anomaly; the loss is right for any.
        A bank in float32 on CUDA is copied to float16 in each call.
    own: (n,), int64, the row that belongs to each query. Two queries may have the same one.
    temperature, dtypes, result and errors: as for simclr_loss. Of a row that does not exist:
        IndexError on a CPU, a failed assertion of the device on CUDA.
    """
    if not isinstance(own, Tensor) or own.dtype != torch.int64 or own.ndim != 1:
        raise TypeError(f"own must be an int64 tensor of shape (n,), not {own}")
    q, bank = checked(q=q, bank=bank)
    require_one_length(q=q, own=own)
    scale, _ = inverse(temperature, q)
    bank = bank.detach()
    k = bank.index_select(0, own)  # (n, D)
    with torch.autocast(q.device.type, enabled=False):
        return moco_op(q, k, bank, scale, own)[0]
