"""Random masking of patch tokens, and the loss on the hidden patches, of masked autoencoders (MAE).
He, Chen, Xie, Li, Dollar, Girshick, CVPR 2022. https://arxiv.org/abs/2111.06377, section 3
Official code: https://github.com/facebookresearch/mae, models_mae.py

    random_masking(batch, tokens, keep, generator, noise)      ids_keep, ids_restore, mask: what each image keeps
    gather_tokens(x, ids_keep)                                 the encoder's input: the kept tokens only
    restore_tokens(x, ids_restore, mask_token, pos)            the decoder's: all, mask token where hidden, positions added
    masked_patch_mse(pred, images, mask, patch, normalize)     mean squared error in pixels, on the hidden patches only

Notation. B images of L patches (tokens), K of them kept; D width of a token; patches of p x p pixels, P = 3 p^2 numbers.
Every image has its own random order of its tokens, and the first K are kept. As in the official code, ids_keep (B, K) holds
the kept tokens in that order, ids_restore (B, L) the place of each token in that order, mask (B, L) 0 keep, 1 remove.

Forward, as plain loops over b < B, i < L, k < K, from noise (B, L):
    masking    ids_restore[b, i] = how many j have noise[b, j] < noise[b, i], or equal noise and j < i;  ids_keep[b, that] = i
    gather     y[b, k] = x[b, ids_keep[b, k]]
    restore    k = ids_restore[b, i];  y[b, i] = (x[b, k] if k < K else mask_token) + pos[i]
    loss       t = the P numbers of patch i of image b, in the order (row, column, colour)
               t = (t - mean(t)) / sqrt(var(t) + 1e-6) if normalize, with the unbiased variance
               r[b, i] = pred[b, i] - t;  loss = sum over b, i of mask[b, i] mean(r[b, i]^2), divided by sum(mask)

Backward, g being the gradient that arrives:
    gather     dx[b, i] = g[b, k] if ids_keep[b, k] = i for some k, else 0
    restore    dx[b, k] = g[b, i] if ids_restore[b, i] = k;  dmask_token = sum of all other g[b, i];  dpos[i] = sum_b g[b, i]
    loss       dpred[b, i] = r[b, i] 2 g mask[b, i] / (P sum(mask)), written for g = 1 by the pass that computes the loss

Why fused. All of this only moves bytes. GB at B = 4096, L = 196, K = 49, bfloat16, D = 768 in the encoder and 512 in the
decoder, p = 16, images uint8 here and float32 there; counted from the code, not measured:
                        official code    here    what the official code also moves
    gather, forward          3.1          0.6    an int64 index of B x K x D
    restore, forward        13.8          1.0    an int64 index of B x L x D, three copies of the decoder's input
    loss, and gradient      33            2.6    the images as patches, copies of the target, all about visible patches
The backward of the loss multiplies dpred by g in place, which moves 2.5 more, and nothing where g is 1: where the loss is what
is differentiated. In float16 2 / (P sum(mask)), about 1e-9, would make dpred 0: there it is left to the backward, too.

Distributed contract. Nothing is communicated; the loss is the mean over the hidden patches of this process. Where all hide
equally many, the average that DistributedDataParallel takes over processes is that over the global batch, with its gradient.

Limits. float16, bfloat16 and float32, computed in float32, or float64, computed in float64 by PyTorch; images also uint8,
meaning value / 255. Deterministic: no atomics. First derivatives only. Ids must be distinct and in range, which is not
checked on a GPU. With nothing hidden the loss is nan, as in the official code. The kernels run on CUDA devices; the PyTorch
path (*_reference) on others and without Triton. A loss that a kernel computed can be differentiated only once: its gradient
is finished in place. Measured speed: not run on a GPU.
"""

import torch
from torch import Tensor, library

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this machine: the PyTorch path runs everywhere
    triton = None


# The specification in PyTorch, which also runs where the kernels do not.

def random_masking_reference(noise, keep):
    order = noise.argsort(dim=1, stable=True)  # (B, L), token k of the order; its inverse is sorted for in the official code
    places = torch.arange(noise.shape[1], device=noise.device).expand_as(order)
    ids_restore = torch.empty_like(order).scatter_(1, order, places)
    return order[:, :keep].contiguous(), ids_restore, (ids_restore >= keep).float()


def flat(ids, N):
    """ids (B, K) of rows of x (B, N, D) -> (B K,), ids in x.flatten(0, 1): one index per row, not per element."""
    if ids.device.type == "cpu" and ids.numel() and not (0 <= ids.min() and ids.max() < N):
        raise IndexError(f"ids must be from 0 to {N - 1}, these are from {ids.min()} to {ids.max()}")
    return (ids + torch.arange(0, len(ids) * N, N, device=ids.device)[:, None]).flatten()


def gather_tokens_reference(x, ids_keep):
    B, L, D = x.shape
    return x.flatten(0, 1).index_select(0, flat(ids_keep, L)).view(B, -1, D)


def restore_tokens_reference(x, ids_restore, mask_token, pos):
    B, K, D = x.shape
    table = torch.cat([x, mask_token.expand(B, 1, D)], 1)  # (B, K + 1, D): row K is the mask token
    return gather_tokens_reference(table, ids_restore.clamp(max=K)) + pos  # (B, L, D)


def take_backward_reference(grad, ids, N, dtype):
    """Gradients of x (B, N, D) and of the mask token (D,). Gather takes K of N > K rows; restore N of N and L - N tokens."""
    B, K, D = grad.shape
    placed = grad.new_zeros(B, max(N, K), D)
    placed.flatten(0, 1).index_copy_(0, flat(ids, max(N, K)), grad.flatten(0, 1))
    return placed[:, :N].to(dtype).contiguous(), placed[:, N:].sum((0, 1))


def patch_mse_reference(pred, images, patch, normalize):
    """-> mean(r^2) (B, L) of every patch; r = pred - t (B, L, P), in float32 or more."""
    B, _, H, W = images.shape
    t = images.reshape(B, 3, H // patch, patch, W // patch, patch).permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, 3)
    t = t.reshape(pred.shape).to(torch.promote_types(pred.dtype, torch.float32))
    if images.dtype == torch.uint8:
        t = t / 255
    if normalize:
        t = (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True) + 1e-6).sqrt()
    r = pred - t
    return r.square().mean(-1), r


# Kernels. A program works on one sample, b: on a tile of ROWS tokens and COLS columns, or on a row of patches. Offsets of a
# sample are int64, since B L D may exceed 2^31; within a sample int32 will do. Widths are compile-time constants: where rows
# are known to be multiples of 16 bytes, they move 16 bytes at a time.

if triton:
    @triton.jit
    def masking_kernel(noise, ids_keep, ids_restore, mask, L, keep, ROWS: tl.constexpr, COLS: tl.constexpr):
        """noise (B, L) read; ids_keep (B, keep), ids_restore, mask (B, L) written. A token's place is the number of those
        before it: to count them, L^2 comparisons in registers, is faster for an image than to sort."""
        b = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        mine, counts = tl.load(noise + b * L + i, mask=i < L, other=0.0)[:, None], tl.zeros((ROWS, COLS), tl.int32)
        for start in range(0, L, COLS):
            j = start + tl.arange(0, COLS)
            other = tl.load(noise + b * L + j, mask=j < L, other=float("inf"))[None, :]
            counts += ((other < mine) | ((other == mine) & (j[None, :] < i[:, None]))).to(tl.int32)
        place = tl.sum(counts, 1)
        tl.store(ids_restore + b * L + i, place, mask=i < L)
        tl.store(mask + b * L + i, (place >= keep).to(tl.float32), mask=i < L)
        tl.store(ids_keep + b * keep + place, i, mask=(i < L) & (place < keep))

    @triton.jit
    def take_kernel(x, ids, token, pos, out, N, K, x_stride, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
        """x (B, N, D), samples x_stride apart, ids (B, K), token (D,), pos (K, D) read; out (B, K, D) written:
        out[b, k] = x[b, ids[b, k]], or token where that is N or more, plus pos[k]. Both may be None: gather needs neither."""
        b = tl.program_id(0).to(tl.int64)
        k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        d = tl.program_id(2) * COLS + tl.arange(0, COLS)
        inside = (k < K)[:, None] & (d < D)[None, :]
        row = tl.load(ids + b * K + k, mask=k < K, other=N).to(tl.int32)
        taken = (row < N)[:, None]
        y = tl.load(x + b * x_stride + (row[:, None] * D + d[None, :]), mask=inside & taken, other=0.0)
        if token is not None:
            t = tl.load(token + d, mask=d < D, other=0.0).to(tl.float32)
            s = tl.load(pos + (k[:, None] * D + d[None, :]), mask=inside, other=0.0).to(tl.float32)
            y = tl.where(taken, y.to(tl.float32), t[None, :]) + s
        tl.store(out + b * K * D + (k[:, None] * D + d[None, :]), y, mask=inside)

    @triton.jit
    def take_backward_kernel(grad, ids, dx, dtoken, N, K, g_stride, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
        """grad (B, K, D), samples g_stride apart, ids (B, K) read; dx (B, N, D), dtoken (B, D) float32 written: a row of
        grad goes to its place in dx or is added to dtoken, this sample's share of the mask token's gradient."""
        b = tl.program_id(0).to(tl.int64)
        d = tl.program_id(2) * COLS + tl.arange(0, COLS)
        total = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, K, ROWS):
            k = start + tl.arange(0, ROWS)
            inside = (k < K)[:, None] & (d < D)[None, :]
            row = tl.load(ids + b * K + k, mask=k < K, other=N).to(tl.int32)
            taken = (row < N)[:, None]
            g = tl.load(grad + b * g_stride + (k[:, None] * D + d[None, :]), mask=inside, other=0.0)
            tl.store(dx + b * N * D + (row[:, None] * D + d[None, :]), g, mask=inside & taken)
            total += tl.where(taken, 0.0, g.to(tl.float32))
        tl.store(dtoken + b * D + d, tl.sum(total, 0), mask=d < D)

    @triton.jit
    def patch_mse_kernel(pred, images, mask, gain, losses, dpred, H, W, pred_stride, PATCH: tl.constexpr, BLOCK: tl.constexpr,
                         NORMALIZE: tl.constexpr):
        """pred (B, L, P), samples pred_stride apart, images (B, 3, H, W), mask (B, L), gain () read; losses (B, L) float32,
        mean(r^2) or 0, and dpred (B, L, P), gain mask r, written. A program works on one row of patches, a patch at a time."""
        P: tl.constexpr = 3 * PATCH * PATCH
        b = tl.program_id(0).to(tl.int64)
        across = W // PATCH
        L = H // PATCH * across
        e = tl.arange(0, BLOCK)  # = (row PATCH + column) 3 + colour: the order of the numbers in a patch
        inside = e < P
        pixel = (e % 3 * H + tl.program_id(1) * PATCH + e // (3 * PATCH)) * W + e // 3 % PATCH  # in the row's first patch
        for column in range(across):
            i = tl.program_id(1) * across + column
            hidden, r, loss = tl.load(mask + b * L + i).to(tl.float32), tl.zeros((BLOCK,), tl.float32), 0.0
            if hidden != 0:  # visible patches are not read
                t = tl.load(images + b * 3 * H * W + (pixel + column * PATCH), mask=inside, other=0).to(tl.float32)
                r = tl.load(pred + b * pred_stride + (i * P + e), mask=inside, other=0.0).to(tl.float32)
                if images.dtype.element_ty == tl.uint8:
                    t = t / 255
                if NORMALIZE:
                    t = tl.where(inside, t - tl.sum(t, 0) / P, 0.0)
                    t = t / tl.sqrt(tl.sum(t * t, 0) / (P - 1) + 1e-6)
                r -= t  # 0 beyond P
                loss = tl.sum(r * r, 0) / P
            tl.store(dpred + b * L * P + (i * P + e), r * (tl.load(gain) * hidden), mask=inside)
            tl.store(losses + b * L + i, loss)

    @triton.jit
    def finish_kernel(x, factor, N: tl.constexpr, BLOCK: tl.constexpr):
        """x (B, N) times factor (), in place, if that is not 1. A program works on 4 BLOCK numbers of a sample."""
        f = tl.load(factor)
        if f != 1:
            for n in range(4):
                i = (4 * tl.program_id(1) + n) * BLOCK + tl.arange(0, BLOCK)
                at = x + tl.program_id(0).to(tl.int64) * N + i
                tl.store(at, tl.load(at, mask=i < N).to(tl.float32) * f, mask=i < N)


def use_kernel(*tensors):
    return triton is not None and all(t is None or t.is_cuda and t.dtype != torch.float64 for t in tensors)


def launch(kernel, B, tokens, width, *args):
    """Covers (tokens, width) of each of B samples by tiles of 4096 numbers, 32 for each thread."""
    cols = min(256, triton.next_power_of_2(width))
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        kernel[B, triton.cdiv(tokens, 4096 // cols), triton.cdiv(width, cols)](*args, ROWS=4096 // cols, COLS=cols)


def dense(x):
    """x (B, N, D), copied only where a sample's rows do not follow each other; samples may lie apart, as in x[:, 1:]."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


# Operators, as torch.compile and autograd see them.

@library.custom_op("ssl_kernels::random_masking", mutates_args=())
def masking_op(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    if not use_kernel(noise):
        return random_masking_reference(noise, keep)
    B, L = noise.shape
    ids_restore, mask = noise.new_empty(B, L, dtype=torch.int64), noise.new_empty(B, L, dtype=torch.float32)
    ids_keep = noise.new_empty(B, keep, dtype=torch.int64)
    with torch.cuda.device_of(noise):
        masking_kernel[B, triton.cdiv(L, 64)](noise, ids_keep, ids_restore, mask, L, keep, ROWS=64, COLS=16, num_warps=2)
    return ids_keep, ids_restore, mask


@library.custom_op("ssl_kernels::take_tokens", mutates_args=())
def take_op(x: Tensor, ids: Tensor, token: Tensor | None, pos: Tensor | None, dtype: torch.dtype) -> Tensor:
    if not use_kernel(x, token, pos):
        return gather_tokens_reference(x, ids) if token is None else restore_tokens_reference(x, ids, token, pos)
    (B, N, D), K, x = x.shape, ids.shape[1], dense(x)
    out = x.new_empty(B, K, D, dtype=dtype)
    launch(take_kernel, B, K, D, x, ids, token, pos, out, N, K, x.stride(0), D)
    return out


@library.custom_op("ssl_kernels::take_tokens_backward", mutates_args=())
def take_backward_op(grad: Tensor, ids: Tensor, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if not use_kernel(grad):
        return take_backward_reference(grad, ids, N, dtype)
    (B, K, D), grad = grad.shape, dense(grad)
    dx = (torch.zeros if K < N else torch.empty)(B, N, D, dtype=dtype, device=grad.device)  # restore writes every row
    dtoken = grad.new_empty(B, D, dtype=torch.float32)
    launch(take_backward_kernel, B, 1, D, grad, ids, dx, dtoken, N, K, grad.stride(0), D)
    return dx, dtoken.sum(0, dtype=grad.dtype)


def take_setup(ctx, inputs, output):
    x, ids, *_ = inputs
    ctx.save_for_backward(ids)
    ctx.N, ctx.dtype = x.shape[1], x.dtype


def take_backward(ctx, grad):
    dx, dtoken = take_backward_op(grad, *ctx.saved_tensors, ctx.N, ctx.dtype)
    _, _, token, pos, _ = ctx.needs_input_grad
    # MAE's positions are fixed. Where they are learned, their gradient reads grad once more.
    return dx, None, dtoken if token else None, grad.sum(0) if pos else None, None


@library.custom_op("ssl_kernels::patch_mse", mutates_args=())
def mse_op(pred: Tensor, images: Tensor, mask: Tensor, patch: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss (); dpred (B, L, P) in the dtype of pred, without the factor rest (); that."""
    hidden = mask.sum(dtype=torch.promote_types(pred.dtype, torch.float32))
    gain, one = 2 / pred.shape[2] * (1 / hidden), torch.ones_like(hidden)
    gain, rest = (one, gain) if pred.dtype == torch.float16 else (gain, one)
    if use_kernel(pred):
        (B, L, P), (H, W), block, pred = pred.shape, images.shape[2:], triton.next_power_of_2(pred.shape[2]), dense(pred)
        losses, dpred = pred.new_empty(B, L, dtype=torch.float32), pred.new_empty(B, L, P)
        with torch.cuda.device_of(pred):
            patch_mse_kernel[B, H // patch](pred, images, mask, gain, losses, dpred, H, W, pred.stride(0), patch, block,
                                            normalize, num_warps=min(16, max(1, block // 256)))
    else:
        losses, r = patch_mse_reference(pred, images, patch, normalize)
        dpred = r.mul_((gain * mask.to(r.dtype))[..., None]).to(pred.dtype)
    return (losses * mask).sum(dtype=hidden.dtype) / hidden, dpred, rest


def mse_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for the gradient of dpred, which nobody asks for


def mse_backward(ctx, g, *second):
    if any(x is not None for x in second):
        no_second_derivative(ctx)
    if g is None:
        return (None,) * 5
    dpred, rest = ctx.saved_tensors
    factor = g * rest
    if not use_kernel(dpred) or torch.is_grad_enabled():  # to be differentiated again, which the lines above refuse
        return (dpred.to(factor.dtype) * factor).to(dpred.dtype), None, None, None, None
    finish_op(dpred, factor)
    return dpred.detach(), None, None, None, None


@library.custom_op("ssl_kernels::patch_mse_finish", mutates_args=("dpred",))
def finish_op(dpred: Tensor, factor: Tensor) -> None:
    N = dpred[0].numel()
    with torch.cuda.device_of(dpred):
        finish_kernel[len(dpred), triton.cdiv(N, 4 * 4096)](dpred, factor, N, 4096)


def no_second_derivative(ctx, *grads):
    raise RuntimeError("kernels/mae_mask.py has first derivatives only; for second ones write its formulas in PyTorch")


take_op.register_fake(lambda x, ids, token, pos, dtype: x.new_empty(*ids.shape, x.shape[2], dtype=dtype))
take_backward_op.register_fake(lambda grad, ids, N, dtype: (
    grad.new_empty(len(grad), N, grad.shape[2], dtype=dtype), grad.new_empty(grad.shape[2])))
mse_op.register_fake(lambda pred, images, mask, patch, normalize: (
    loss := pred.new_empty((), dtype=torch.promote_types(pred.dtype, torch.float32)), pred.new_empty(pred.shape), loss.clone()))
finish_op.register_fake(lambda dpred, factor: None)
masking_op.register_fake(lambda noise, keep: (
    noise.new_empty(len(noise), keep, dtype=torch.int64), noise.new_empty(noise.shape, dtype=torch.int64),
    noise.new_empty(noise.shape, dtype=torch.float32)))
take_op.register_autograd(take_backward, setup_context=take_setup)
mse_op.register_autograd(mse_backward, setup_context=mse_setup)
take_backward_op.register_autograd(no_second_derivative)


# Public functions.

FLOATS, INTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64), (torch.int32, torch.int64)


def check(**arguments):
    """name=(tensor, letters of its shape, dtypes): equal letters must have equal sizes, all tensors one device."""
    sizes, device = {}, next(iter(arguments.values()))[0].device
    for name, (x, shape, dtypes) in arguments.items():
        if x.ndim != len(shape) or any(sizes.setdefault(letter, n) != n for letter, n in zip(shape, x.shape)):
            raise ValueError(f"{name} must be ({', '.join(shape)}), with {sizes} so far, but is {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be one of {dtypes}, but is {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, but {next(iter(arguments))} on {device}")


def random_masking(batch, tokens, keep, generator=None, noise=None):
    """ids_keep (batch, keep) int64, ids_restore (batch, tokens) int64, mask (batch, tokens) float32: 0 keep, 1 remove.

    The noise is drawn with `generator`, on its device, or given (batch, tokens), finite; the smallest are kept."""
    if not 0 < keep <= tokens:
        raise ValueError(f"keep must be from 1 to tokens = {tokens}, got {keep}")
    if noise is None:
        noise = torch.rand(batch, tokens, generator=generator, device=generator.device if generator else None)
    elif generator is not None or noise.shape != (batch, tokens):
        raise ValueError(f"give either a generator or noise of shape ({batch}, {tokens})")
    check(noise=(noise, "BL", FLOATS))
    return masking_op(noise.contiguous(), keep)


def gather_tokens(x, ids_keep):
    """x (B, L, D), ids_keep (B, K) -> (B, K, D), the kept tokens. Differentiable in x. A class token is added afterwards."""
    check(x=(x, "BLD", FLOATS), ids_keep=(ids_keep, "BK", INTS))
    if ids_keep.shape[1] > x.shape[1]:
        raise ValueError(f"{ids_keep.shape[1]} tokens cannot be kept out of {x.shape[1]}")
    return take_op(x, ids_keep.contiguous(), None, None, x.dtype)


def restore_tokens(x, ids_restore, mask_token, pos):
    """x (B, K, D), ids_restore (B, L), mask_token (D,), pos (L, D) -> (B, L, D), in the dtype of x + mask_token + pos.

    Differentiable in x, mask_token and pos. Split a class token off before (x[:, 1:] is not copied) and add it afterwards."""
    check(x=(x, "BKD", FLOATS), ids_restore=(ids_restore, "BL", INTS), mask_token=(mask_token, "D", FLOATS),
          pos=(pos, "LD", FLOATS))
    if x.shape[1] > len(pos):
        raise ValueError(f"x has {x.shape[1]} tokens, more than the {len(pos)} of ids_restore")
    dtype = torch.promote_types(torch.promote_types(x.dtype, mask_token.dtype), pos.dtype)
    return take_op(x, ids_restore.contiguous(), mask_token.contiguous(), pos.contiguous(), dtype)


def masked_patch_mse(pred, images, mask, patch, normalize=True):
    """pred (B, L, P), images (B, 3, H, W), mask (B, L) -> the loss, a scalar in float32 or more. Differentiable in pred.

    The L = H/p W/p patches are in reading order. The official code's images are normalised by colour, which changes the
    target: for exactly that, pass such images. Split a class token off before (pred[:, 1:] is not copied)."""
    check(pred=(pred, "BLP", FLOATS), images=(images, "BCHW", (torch.uint8, *FLOATS)), mask=(mask, "BL", FLOATS))
    _, C, H, W = images.shape
    if C != 3 or H % patch or W % patch or pred.shape[1:] != (H // patch * (W // patch), 3 * patch * patch):
        raise ValueError(f"images {tuple(images.shape)} cannot be 3 colours in patches of {patch} x {patch} pixels that pred "
                         f"{tuple(pred.shape)} describes: (B, H/p W/p, 3 p p) is needed")
    return mse_op(pred, images.contiguous(), mask.contiguous(), patch, normalize)[0]
