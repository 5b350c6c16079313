"""Random masking of patch tokens, and the loss on hidden patches, of masked autoencoders (MAE).

Paper. He, Chen, Xie, Li, Dollar, Girshick, CVPR 2022. https://arxiv.org/abs/2111.06377, section 3.
Official code. models_mae.py of https://github.com/facebookresearch/mae

    random_masking(batch, tokens, keep, generator, noise)
        -> ids_keep, ids_restore, mask: which tokens each image keeps
    gather_tokens(x, ids_keep)
        -> the encoder's input: the kept tokens only
    restore_tokens(x, ids_restore, mask_token, pos)
        -> the decoder's input: all tokens, the mask token in place of hidden ones, plus positions
    masked_patch_mse(pred, images, mask, patch, normalize)
        -> the mean squared error in pixels, over the hidden patches

Notation. B images of L patches (tokens), of which K are kept; D is the width of a token; a patch
has p x p pixels, or P = 3 p^2 numbers. Every image gets its own random order of its tokens, and
keeps the first K. As in the official code, ids_keep (B, K) holds the kept tokens in that order,
ids_restore (B, L) the place of each token in that order, and mask (B, L) is 0 where a token is
kept and 1 where it is hidden.

Forward, as plain loops over b < B, i < L, k < K, from noise (B, L):

    masking    place = how many j have noise[b, j] < noise[b, i], or equal noise and j < i
               ids_restore[b, i] = place;  mask[b, i] = (place >= K)
               if place < K:  ids_keep[b, place] = i
    gather     y[b, k] = x[b, ids_keep[b, k]]
    restore    k = ids_restore[b, i];  y[b, i] = (x[b, k] if k < K else mask_token) + pos[i]
    loss       t = the P numbers of patch i of image b, in the order (row, column, colour)
               t = (t - mean(t)) / sqrt(var(t) + 1e-6) if normalize, with the unbiased variance
               r[b, i] = pred[b, i] - t
               loss = sum over b, i of mask[b, i] mean(r[b, i]^2), divided by sum(mask)

Backward, where g is the gradient that arrives:

    gather     dx[b, i] = g[b, k] if ids_keep[b, k] = i for some k, else 0
    restore    dx[b, k] = g[b, i] if ids_restore[b, i] = k
               dmask_token = sum of all other g[b, i];  dpos[i] = sum_b g[b, i]
    loss       dpred[b, i] = r[b, i] 2 g mask[b, i] / (P sum(mask))
               The pass that computes the loss writes this for g = 1.

Why fused. All of this only moves bytes. GB moved at B = 4096, L = 196, K = 49, in bfloat16, with
D = 768 in the encoder and 512 in the decoder, p = 16; images are uint8 for ours and float32 for
the official code. Counted from the code, not measured:

                         official    ours    what the official code moves in addition
    gather, forward         3.1       0.6    an int64 index of B x K x D
    restore, forward       13.8       1.0    an int64 index of B x L x D, and three copies of the
                                             decoder's input
    loss and gradient      33         2.6    the images as patches, copies of the target, and
                                             everything for visible patches too

The backward of the loss multiplies dpred by g in place. That moves 2.5 GB more, or nothing if g is
1, as it is when the loss itself is differentiated. In float16 the factor 2 / (P sum(mask)), about
1e-9, would turn dpred into 0; so for float16 that factor, too, is applied in the backward.

Distributed contract. Nothing is communicated; the loss is the mean over the hidden patches of this
process. If all processes hide equally many, the average that DistributedDataParallel takes over
processes equals the loss of the global batch, and so does its gradient.

Limits. Inputs in float16, bfloat16 and float32 are computed in float32; those in float64 are
computed in float64, by PyTorch. Images may also be uint8, meaning value / 255. Results are
deterministic: there are no atomics. Only first derivatives exist. Ids must be distinct and in
range, which is not checked on a GPU. If nothing is hidden the loss is nan, as in the official code.
The kernels run on CUDA devices, the PyTorch path (*_reference) on others and without Triton. A loss
that a kernel computed can be differentiated only once, because its gradient is finished in place.
Speed on a GPU: not measured yet.
"""

import torch
from torch import Tensor, library

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this machine: the PyTorch path runs everywhere
    triton = None

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)


# The specification in PyTorch, which also runs where the kernels do not.


def random_masking_reference(noise, keep):
    """noise (B, L) -> ids_keep (B, keep), ids_restore (B, L), mask (B, L)."""
    order = noise.argsort(dim=1, stable=True)  # (B, L), the tokens in their random order

    # The inverse permutation, for which the official code sorts a second time.
    places = torch.arange(noise.shape[1], device=noise.device).expand_as(order)
    ids_restore = torch.empty_like(order).scatter_(1, order, places)

    return order[:, :keep].contiguous(), ids_restore, (ids_restore >= keep).float()


def flat_ids(ids, N):
    """ids (B, K) of rows of x (B, N, D) -> (B K,), the ids of the same rows in x.flatten(0, 1).

    This is one index per row; the official code has one per number."""
    if ids.device.type == "cpu" and ids.numel() > 0:
        low, high = ids.min(), ids.max()
        if low < 0 or high >= N:
            raise IndexError(f"ids must be from 0 to {N - 1}, these are from {low} to {high}")
    first = torch.arange(0, len(ids) * N, N, device=ids.device)  # (B,), row 0 of each sample
    return (ids + first[:, None]).flatten()


def gather_tokens_reference(x, ids_keep):
    """x (B, L, D), ids_keep (B, K) -> (B, K, D)."""
    B, L, D = x.shape
    rows = x.flatten(0, 1)  # (B L, D)
    return rows.index_select(0, flat_ids(ids_keep, L)).view(B, -1, D)


def restore_tokens_reference(x, ids_restore, mask_token, pos):
    """x (B, K, D), ids_restore (B, L), mask_token (D,), pos (L, D) -> (B, L, D)."""
    B, K, D = x.shape
    table = torch.cat([x, mask_token.expand(B, 1, D)], 1)  # (B, K + 1, D), row K: the mask token
    return gather_tokens_reference(table, ids_restore.clamp(max=K)) + pos


def take_backward_reference(grad, ids, N, dtype):
    """grad (B, K, D), ids (B, K) -> dx (B, N, D); the gradient of the mask token (D,).

    Gather takes K <= N rows of x. Restore takes all N rows of x, and K - N times the mask token."""
    B, K, D = grad.shape
    count = max(N, K)
    placed = grad.new_zeros(B, count, D)
    rows = placed.flatten(0, 1)  # (B count, D), the same memory
    rows.index_copy_(0, flat_ids(ids, count), grad.flatten(0, 1))

    dx = placed[:, :N].to(dtype).contiguous()
    dtoken = placed[:, N:].sum((0, 1))
    return dx, dtoken


def patch_mse_reference(pred, images, patch, normalize):
    """-> mean(r^2) (B, L) of every patch; r = pred - t (B, L, P), in float32 or float64."""
    B, _, H, W = images.shape
    t = images.reshape(B, 3, H // patch, patch, W // patch, patch)
    t = t.permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, 3)
    t = t.reshape(pred.shape)  # (B, L, P)
    t = t.to(torch.promote_types(pred.dtype, torch.float32))
    if images.dtype == torch.uint8:
        t = t / 255

    if normalize:
        mean = t.mean(-1, keepdim=True)
        var = t.var(-1, keepdim=True)
        t = (t - mean) / (var + 1e-6).sqrt()

    r = pred - t
    return r.square().mean(-1), r


# The kernels.
#
# Programs. A launch such as masking_kernel[B, 4](...) runs B x 4 programs, copies of the function
# that differ only in tl.program_id(0) < B and tl.program_id(1) < 4. Each program works on vectors
# and tiles; the sizes of these are known when the kernel is compiled (tl.constexpr).
#
# Addresses. A kernel gets the address of the first number of each tensor: noise_ptr for noise.
# Tensors are stored row by row, so noise[b, i] lies at noise_ptr + b * L + i. If i is a vector of
# numbers, such as tl.arange(0, ROWS), this is a vector of addresses, which one tl.load reads at
# once; [:, None] and [None, :] make tiles of addresses in the same way. Sizes of vectors must be
# powers of 2, so the last ones reach beyond the tensor: where the mask is false nothing is read or
# written, and tl.load returns `other`.
#
# int64. tl.program_id and tl.arange are int32, and b * L * D may exceed 2^31. So the number of the
# sample, b, is converted before it is multiplied. Within a sample int32 is enough.
#
# Widths are compile-time constants: if rows are known to be multiples of 16 bytes, they are moved
# 16 bytes at a time.

if triton:

    @triton.jit
    def masking_kernel(
        noise_ptr,
        ids_keep_ptr,
        ids_restore_ptr,
        mask_ptr,
        L,
        keep,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
    ):
        """The loop "masking", of one sample: the place of every token in the random order.

        Reads noise (B, L); writes ids_keep (B, keep), ids_restore (B, L) and mask (B, L). A program
        owns ROWS tokens. The place of a token is the number of tokens before it. To count these
        takes L comparisons per token, all in registers; for some hundred tokens that is faster than
        to sort them."""
        # 1. The tokens of this program: i of sample b. The last program may have tokens beyond L.
        b = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        noise_i = tl.load(noise_ptr + b * L + i, mask=i < L, other=0.0)
        noise_i = noise_i[:, None]  # (ROWS, 1)

        counts = tl.zeros((ROWS, COLS), tl.int32)
        for start in range(0, L, COLS):
            # 2. The next COLS tokens j of the sample. Beyond L there is infinity, which comes
            #    before no token.
            j = start + tl.arange(0, COLS)
            noise_j = tl.load(noise_ptr + b * L + j, mask=j < L, other=float("inf"))
            noise_j = noise_j[None, :]  # (1, COLS)

            # 3. Compare every i with every j: a tile (ROWS, COLS), true where j comes before i.
            first_of_equals = (noise_j == noise_i) & (j[None, :] < i[:, None])
            before = (noise_j < noise_i) | first_of_equals
            counts += before.to(tl.int32)

        # 4. place = how many j come before i
        place = tl.sum(counts, 1)  # (ROWS,)

        # 5. Write what belongs to token i at [b, i] ...
        tl.store(ids_restore_ptr + b * L + i, place, mask=i < L)
        hidden = (place >= keep).to(tl.float32)
        tl.store(mask_ptr + b * L + i, hidden, mask=i < L)

        # 6. ... and i itself at [b, place], if it is kept. Places differ, so no two programs
        #    write to the same address.
        kept = (i < L) & (place < keep)
        tl.store(ids_keep_ptr + b * keep + place, i, mask=kept)

    @triton.jit
    def take_kernel(
        x_ptr,
        ids_ptr,
        token_ptr,
        pos_ptr,
        out_ptr,
        N,
        K,
        x_stride,
        D: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
    ):
        """The loops "gather" and "restore": out[b, k] = x[b, ids[b, k]], plus pos[k] for restore.

        Reads x (B, N, D), whose samples are x_stride numbers apart, ids (B, K), token (D,) and
        pos (K, D); writes out (B, K, D). Where ids[b, k] >= N the token takes the place of x. For
        gather, token_ptr and pos_ptr are None. A program owns a tile (ROWS, COLS) of a sample."""
        # 1. The tile of this program: rows k and columns d of sample b.
        b = tl.program_id(0).to(tl.int64)
        k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        d = tl.program_id(2) * COLS + tl.arange(0, COLS)
        inside = (k < K)[:, None] & (d < D)[None, :]

        # 2. Which rows of x they are, and whether they are rows of x at all.
        row = tl.load(ids_ptr + b * K + k, mask=k < K, other=N)
        row = row.to(tl.int32)
        taken = (row < N)[:, None]

        # 3. y = x[b, row]
        x_offset = row[:, None] * D + d[None, :]
        y = tl.load(x_ptr + b * x_stride + x_offset, mask=inside & taken, other=0.0)

        # 4. Restore: the token where nothing was taken, and the positions.
        offset = k[:, None] * D + d[None, :]
        if token_ptr is not None:
            token = tl.load(token_ptr + d, mask=d < D, other=0.0)
            token = token.to(tl.float32)[None, :]
            pos = tl.load(pos_ptr + offset, mask=inside, other=0.0)
            y = tl.where(taken, y.to(tl.float32), token)
            y += pos.to(tl.float32)

        tl.store(out_ptr + b * K * D + offset, y, mask=inside)

    @triton.jit
    def take_backward_kernel(
        grad_ptr,
        ids_ptr,
        dx_ptr,
        dtoken_ptr,
        N,
        K,
        g_stride,
        D: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
    ):
        """The backward of take_kernel: dx[b, ids[b, k]] = grad[b, k] where ids[b, k] < N.

        Reads grad (B, K, D), whose samples are g_stride numbers apart, and ids (B, K); writes
        dx (B, N, D) and, in float32, dtoken (B, D): the sum of all other rows of grad, which is a
        sample's share of the mask token's gradient. A program owns COLS columns of a sample."""
        b = tl.program_id(0).to(tl.int64)
        d = tl.program_id(2) * COLS + tl.arange(0, COLS)
        total = tl.zeros((ROWS, COLS), tl.float32)

        for start in range(0, K, ROWS):
            # 1. The next ROWS rows of grad, and where each belongs.
            k = start + tl.arange(0, ROWS)
            inside = (k < K)[:, None] & (d < D)[None, :]
            row = tl.load(ids_ptr + b * K + k, mask=k < K, other=N)
            row = row.to(tl.int32)
            taken = (row < N)[:, None]
            g_offset = k[:, None] * D + d[None, :]
            g = tl.load(grad_ptr + b * g_stride + g_offset, mask=inside, other=0.0)

            # 2. To its row of dx, or to the token.
            dx_offset = row[:, None] * D + d[None, :]
            tl.store(dx_ptr + b * N * D + dx_offset, g, mask=inside & taken)
            total += tl.where(taken, 0.0, g.to(tl.float32))

        tl.store(dtoken_ptr + b * D + d, tl.sum(total, 0), mask=d < D)

    @triton.jit
    def patch_mse_kernel(
        pred_ptr,
        images_ptr,
        mask_ptr,
        gain_ptr,
        losses_ptr,
        dpred_ptr,
        H,
        W,
        pred_stride,
        PATCH: tl.constexpr,
        BLOCK: tl.constexpr,
        NORMALIZE: tl.constexpr,
    ):
        """The loop "loss" for each patch: losses (B, L) = mean(r^2), dpred (B, L, P) = gain mask r.

        Reads pred (B, L, P), whose samples are pred_stride numbers apart, images (B, 3, H, W),
        mask (B, L) and gain (). Where a patch is visible the loss is 0, in float32. A program owns
        one row of patches of a sample, and takes one patch at a time."""
        # 1. The row of patches of this program.
        P: tl.constexpr = 3 * PATCH * PATCH
        b = tl.program_id(0).to(tl.int64)
        across = W // PATCH
        L = H // PATCH * across

        # 2. Where the numbers of a patch lie in the image. In the patch they are in the order
        #    e = (row PATCH + column) 3 + colour, in the image (colour H + row) W + column.
        e = tl.arange(0, BLOCK)
        inside = e < P
        row = tl.program_id(1) * PATCH + e // (3 * PATCH)
        pixel = (e % 3 * H + row) * W + e // 3 % PATCH  # for the first patch of the row

        for column in range(across):
            i = tl.program_id(1) * across + column
            hidden = tl.load(mask_ptr + b * L + i).to(tl.float32)
            r = tl.zeros((BLOCK,), tl.float32)
            loss = 0.0
            if hidden != 0:  # visible patches are not read
                # 3. The target t and the prediction.
                image_ptr = images_ptr + b * 3 * H * W
                t = tl.load(image_ptr + (pixel + column * PATCH), mask=inside, other=0)
                t = t.to(tl.float32)
                r = tl.load(pred_ptr + b * pred_stride + (i * P + e), mask=inside, other=0.0)
                r = r.to(tl.float32)
                if images_ptr.dtype.element_ty == tl.uint8:
                    t = t / 255

                # 4. Mean 0 and variance 1, with the unbiased variance; 0 beyond P.
                if NORMALIZE:
                    t = tl.where(inside, t - tl.sum(t, 0) / P, 0.0)
                    var = tl.sum(t * t, 0) / (P - 1)
                    t = t / tl.sqrt(var + 1e-6)

                # 5. r = pred - t, which is 0 beyond P, and mean(r^2).
                r -= t
                loss = tl.sum(r * r, 0) / P

            # 6. The gradient and the loss of this patch, or 0 for a visible one.
            out = dpred_ptr + b * L * P + (i * P + e)
            tl.store(out, r * (tl.load(gain_ptr) * hidden), mask=inside)
            tl.store(losses_ptr + b * L + i, loss)

    @triton.jit
    def finish_kernel(x_ptr, factor_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
        """x (B, N) *= factor (), in place, if that is not 1. A program owns 4 BLOCK numbers."""
        factor = tl.load(factor_ptr)
        if factor != 1:
            for n in range(4):
                i = (4 * tl.program_id(1) + n) * BLOCK + tl.arange(0, BLOCK)
                address = x_ptr + tl.program_id(0).to(tl.int64) * N + i
                x = tl.load(address, mask=i < N).to(tl.float32)
                tl.store(address, x * factor, mask=i < N)


def use_kernel(*tensors):
    """Whether the kernels take these tensors, some of which may be None."""
    given = [t for t in tensors if t is not None]
    return triton is not None and all(t.is_cuda and t.dtype != torch.float64 for t in given)


def launch(kernel, B, tokens, width, *args):
    """Covers (tokens, width) of each of B samples by tiles of 4096 numbers, 32 per thread."""
    cols = min(256, triton.next_power_of_2(width))
    rows = 4096 // cols
    grid = (B, triton.cdiv(tokens, rows), triton.cdiv(width, cols))
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        kernel[grid](*args, ROWS=rows, COLS=cols)


def dense_rows(x):
    """x (B, N, D) with the rows of a sample one after the other; copied only if they are not.

    The samples themselves may be further apart, as they are in x[:, 1:]."""
    if x.stride(2) == 1 and x.stride(1) == x.shape[2]:
        return x
    return x.contiguous()


# The operators that torch.compile and autograd see. Each is followed by its "fake", which tells
# torch.compile the shapes and dtypes of the results.


def no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "kernels/mae_mask.py has first derivatives only; "
        "for second ones write its formulas in PyTorch"
    )


# Masking.


@library.custom_op("ssl_kernels::random_masking", mutates_args=())
def masking_op(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """noise (B, L) -> ids_keep (B, keep), ids_restore (B, L), mask (B, L)."""
    if not use_kernel(noise):
        return random_masking_reference(noise, keep)
    B, L = noise.shape
    ids_keep, ids_restore, mask = masking_fake(noise, keep)
    with torch.cuda.device_of(noise):
        masking_kernel[B, triton.cdiv(L, 64)](
            noise, ids_keep, ids_restore, mask, L, keep, ROWS=64, COLS=16, num_warps=2
        )
    return ids_keep, ids_restore, mask


@masking_op.register_fake
def masking_fake(noise, keep):
    ids_keep = noise.new_empty(len(noise), keep, dtype=torch.int64)
    ids_restore = noise.new_empty(noise.shape, dtype=torch.int64)
    mask = noise.new_empty(noise.shape, dtype=torch.float32)
    return ids_keep, ids_restore, mask


# Gather and restore.


@library.custom_op("ssl_kernels::take_tokens", mutates_args=())
def take_op(
    x: Tensor, ids: Tensor, token: Tensor | None, pos: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x (B, N, D), ids (B, K) -> (B, K, D) in dtype. token and pos are None for gather."""
    if not use_kernel(x, token, pos):
        if token is None:
            return gather_tokens_reference(x, ids)
        return restore_tokens_reference(x, ids, token, pos)
    B, N, D = x.shape
    K = ids.shape[1]
    x = dense_rows(x)
    out = x.new_empty(B, K, D, dtype=dtype)
    arguments = (x, ids, token, pos, out, N, K, x.stride(0), D)
    launch(take_kernel, B, K, D, *arguments)
    return out


@take_op.register_fake
def take_fake(x, ids, token, pos, dtype):
    return x.new_empty(*ids.shape, x.shape[2], dtype=dtype)


@library.custom_op("ssl_kernels::take_tokens_backward", mutates_args=())
def take_backward_op(
    grad: Tensor, ids: Tensor, N: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """grad (B, K, D), ids (B, K) -> dx (B, N, D) in dtype; the gradient of the mask token (D,)."""
    if not use_kernel(grad):
        return take_backward_reference(grad, ids, N, dtype)
    B, K, D = grad.shape
    grad = dense_rows(grad)

    # Gather leaves rows of dx untouched, which are 0; restore writes every row.
    make = torch.zeros if K < N else torch.empty
    dx = make(B, N, D, dtype=dtype, device=grad.device)

    dtoken = grad.new_empty(B, D, dtype=torch.float32)
    arguments = (grad, ids, dx, dtoken, N, K, grad.stride(0), D)
    launch(take_backward_kernel, B, 1, D, *arguments)
    return dx, dtoken.sum(0, dtype=grad.dtype)


@take_backward_op.register_fake
def take_backward_fake(grad, ids, N, dtype):
    dx = grad.new_empty(len(grad), N, grad.shape[2], dtype=dtype)
    return dx, grad.new_empty(grad.shape[2])


def take_setup(ctx, inputs, output):
    """What autograd keeps from forward to backward."""
    x, ids, *_ = inputs
    ctx.save_for_backward(ids)
    ctx.N = x.shape[1]
    ctx.dtype = x.dtype


def take_backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    _, _, token_needs_it, pos_needs_it, _ = ctx.needs_input_grad
    dx, dtoken = take_backward_op(grad, ids, ctx.N, ctx.dtype)

    # MAE's positions are fixed. If they are learned, their gradient reads grad once more.
    dpos = grad.sum(0) if pos_needs_it else None
    return dx, None, dtoken if token_needs_it else None, dpos, None


take_op.register_autograd(take_backward, setup_context=take_setup)
take_backward_op.register_autograd(no_second_derivative)


# The loss.


@library.custom_op("ssl_kernels::patch_mse", mutates_args=())
def mse_op(
    pred: Tensor, images: Tensor, mask: Tensor, patch: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss (); dpred (B, L, P) in the dtype of pred; the factor () that dpred still lacks."""
    hidden = mask.sum(dtype=torch.promote_types(pred.dtype, torch.float32))  # ()
    gain = 2 / pred.shape[2] * (1 / hidden)
    rest = torch.ones_like(hidden)
    if pred.dtype == torch.float16:  # dpred would be 0
        gain, rest = rest, gain

    if use_kernel(pred):
        losses, dpred = launch_patch_mse(pred, images, mask, gain, patch, normalize)
    else:
        losses, r = patch_mse_reference(pred, images, patch, normalize)
        weight = gain * mask.to(r.dtype)  # (B, L)
        dpred = r.mul_(weight[..., None]).to(pred.dtype)
    return (losses * mask).sum(dtype=hidden.dtype) / hidden, dpred, rest


def launch_patch_mse(pred, images, mask, gain, patch, normalize):
    """-> losses (B, L) in float32; dpred (B, L, P) in the dtype of pred."""
    B, L, P = pred.shape
    H, W = images.shape[2:]
    pred = dense_rows(pred)
    losses = pred.new_empty(B, L, dtype=torch.float32)
    dpred = pred.new_empty(B, L, P)

    block = triton.next_power_of_2(P)
    warps = min(16, max(1, block // 256))
    with torch.cuda.device_of(pred):
        patch_mse_kernel[B, H // patch](
            pred,
            images,
            mask,
            gain,
            losses,
            dpred,
            H,
            W,
            pred.stride(0),
            PATCH=patch,
            BLOCK=block,
            NORMALIZE=normalize,
            num_warps=warps,
        )
    return losses, dpred


@mse_op.register_fake
def mse_fake(pred, images, mask, patch, normalize):
    loss = pred.new_empty((), dtype=torch.promote_types(pred.dtype, torch.float32))
    return loss, pred.new_empty(pred.shape), loss.clone()


def mse_setup(ctx, inputs, output):
    """What autograd keeps from forward to backward."""
    _, dpred, rest = output
    ctx.save_for_backward(dpred, rest)
    ctx.set_materialize_grads(False)  # no zeros for the gradient of dpred, which nobody asks for


def mse_backward(ctx, g, g_dpred, g_rest):
    if g_dpred is not None or g_rest is not None:
        no_second_derivative(ctx)
    if g is None:
        return None, None, None, None, None
    dpred, rest = ctx.saved_tensors
    factor = g * rest

    # If autograd records the backward, this is to be differentiated again: not in place, and the
    # check above will refuse it.
    if not use_kernel(dpred) or torch.is_grad_enabled():
        finished = (dpred.to(factor.dtype) * factor).to(dpred.dtype)
        return finished, None, None, None, None

    finish_op(dpred, factor)
    return dpred.detach(), None, None, None, None


mse_op.register_autograd(mse_backward, setup_context=mse_setup)


@library.custom_op("ssl_kernels::patch_mse_finish", mutates_args=("dpred",))
def finish_op(dpred: Tensor, factor: Tensor) -> None:
    """dpred *= factor, in place."""
    N = dpred[0].numel()
    grid = (len(dpred), triton.cdiv(N, 4 * 4096))
    with torch.cuda.device_of(dpred):
        finish_kernel[grid](dpred, factor, N, BLOCK=4096)


@finish_op.register_fake
def finish_fake(dpred, factor):
    return None


# The functions to call.


def check(**arguments):
    """Raises an error unless shapes, dtypes and devices of the tensors go together.

    name=(tensor, letters of its shape, dtypes): sizes with equal letters must be equal, and all
    tensors must be on the device of the first."""
    sizes = {}
    first = next(iter(arguments))
    device = arguments[first][0].device

    for name, (x, letters, dtypes) in arguments.items():
        fits = x.ndim == len(letters)
        if fits:
            for letter, size in zip(letters, x.shape):
                fits = fits and sizes.setdefault(letter, size) == size
        if not fits:
            wanted = ", ".join(letters)
            raise ValueError(
                f"{name} must be ({wanted}), with {sizes} so far, but is {tuple(x.shape)}"
            )
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be one of {dtypes}, but is {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, but {first} on {device}")


def random_masking(batch, tokens, keep, generator=None, noise=None):
    """Which tokens each image keeps: section 3 of the paper, random_masking of the official code.

    batch images of `tokens` tokens, of which 1 <= keep <= tokens are kept: those with the least
    noise. The noise is drawn with `generator`, on its device, or given: (batch, tokens), finite, in
    float16, bfloat16, float32 or float64.

    -> ids_keep (batch, keep) int64, ids_restore (batch, tokens) int64, and mask (batch, tokens)
    float32, which is 0 where a token is kept and 1 where it is hidden.

    ValueError if keep is out of range, noise has another shape, or generator and noise are both
    given; TypeError for noise of another dtype."""
    if not 0 < keep <= tokens:
        raise ValueError(f"keep must be from 1 to tokens = {tokens}, got {keep}")
    if noise is None:
        device = generator.device if generator else None
        noise = torch.rand(batch, tokens, generator=generator, device=device)
    elif generator is not None or noise.shape != (batch, tokens):
        raise ValueError(f"give either a generator or noise of shape ({batch}, {tokens})")
    check(noise=(noise, "BL", FLOATS))
    return masking_op(noise.contiguous(), keep)


def gather_tokens(x, ids_keep):
    """The encoder's input: x (B, L, D), ids_keep (B, K) -> (B, K, D), the kept tokens.

    x in float16, bfloat16, float32 or float64; ids_keep in int32 or int64, from 0 to L - 1.
    Differentiable in x, once. Add a class token afterwards.

    ValueError if shapes or devices do not match, TypeError for another dtype, IndexError for ids
    out of range (on a CPU)."""
    check(x=(x, "BLD", FLOATS), ids_keep=(ids_keep, "BK", INTS))
    if ids_keep.shape[1] > x.shape[1]:
        raise ValueError(f"{ids_keep.shape[1]} tokens cannot be kept out of {x.shape[1]}")
    return take_op(x, ids_keep.contiguous(), None, None, x.dtype)


def restore_tokens(x, ids_restore, mask_token, pos):
    """The decoder's input: all tokens, with the mask token in place of the hidden ones.

    x (B, K, D), ids_restore (B, L), mask_token (D,), pos (L, D) -> (B, L, D). Kept tokens return to
    their places, the mask token takes all others, and positions are added. ids_restore is int32 or
    int64, the others are float16, bfloat16, float32 or float64; the result has the dtype of
    x + mask_token + pos. Differentiable in x, mask_token and pos, once. Split a class token off
    before (x[:, 1:] is not copied) and add it afterwards.

    ValueError if shapes or devices do not match, TypeError for another dtype."""
    check(
        x=(x, "BKD", FLOATS),
        ids_restore=(ids_restore, "BL", INTS),
        mask_token=(mask_token, "D", FLOATS),
        pos=(pos, "LD", FLOATS),
    )
    if x.shape[1] > len(pos):
        raise ValueError(f"x has {x.shape[1]} tokens, more than the {len(pos)} of ids_restore")
    dtype = torch.promote_types(x.dtype, mask_token.dtype)
    dtype = torch.promote_types(dtype, pos.dtype)
    return take_op(x, ids_restore.contiguous(), mask_token.contiguous(), pos.contiguous(), dtype)


def masked_patch_mse(pred, images, mask, patch, normalize=True):
    """MAE's loss, section 3 of the paper: the mean squared error over the hidden patches.

    pred (B, L, P) and mask (B, L), 1 where hidden, in float16, bfloat16, float32 or float64; images
    (B, 3, H, W) in these dtypes or uint8, meaning value / 255; patch, the side p of a patch in
    pixels; normalize, whether each patch of the target gets mean 0 and variance 1. The
    L = H/p W/p patches are in reading order. The official code normalises its images by colour,
    which changes the target: pass such images to get exactly the same.

    -> the loss, a scalar, in float32 (float64 for float64 pred). Differentiable in pred, once.
    Split a class token off before (pred[:, 1:] is not copied).

    ValueError if shapes or devices do not match, TypeError for another dtype."""
    check(
        pred=(pred, "BLP", FLOATS),
        images=(images, "BCHW", (torch.uint8, *FLOATS)),
        mask=(mask, "BL", FLOATS),
    )
    _, C, H, W = images.shape
    wanted = (H // patch * (W // patch), 3 * patch * patch)  # L, P
    if C != 3 or H % patch or W % patch or pred.shape[1:] != wanted:
        raise ValueError(
            f"images {tuple(images.shape)} cannot be 3 colours in patches of {patch} x {patch} "
            f"pixels that pred {tuple(pred.shape)} describes: (B, H/p W/p, 3 p p) is needed"
        )
    loss, _, _ = mse_op(pred, images.contiguous(), mask.contiguous(), patch, normalize)
    return loss
