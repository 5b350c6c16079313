"""Measures the kernels beside plain PyTorch and other packages, and prints their table.

    python kernels/bench.py     on a CUDA GPU, within 10 minutes; without one, the CPU path

Every measurement becomes a row of kernels/results.jsonl (or --out FILE), with device, driver,
versions, date and commit; the table shows the last row of each kind, and "not run" where there is
none. On a GPU ours and plain PyTorch are measured first, at all sizes, then other packages, then
torch.compile, and last its "max-autotune" for the first size of each function. Every stage takes
the first sizes first.

Time        Milliseconds of the value (forward), and of value and gradient together (ms); backward
            is the difference. GPU: the median of triton.testing.do_bench, which empties the L2
            cache before each call. CPU: the least of 15 calls; the implementations take turns, so
            that other programs disturb all alike.
Rate        Work / ms, where the work is one number for all implementations of a case:
                simclr_loss   6 M^2 D FLOPs, M = 2 N: the logits; in the backward the logits again,
                              and the product of their weights with z
                clip_loss     10 N^2 D FLOPs: the logits; for each of two gradients the logits again
                              and a product. This is the least without stored logits or atomic
                              additions; with stored logits 6 N^2 D are enough
                moco_loss     4 B K D FLOPs: the logits, and the weighted mean of the keys, which is
                              the gradient
                bank_loss     4 B M D FLOPs: the same, of the M rows of a bank
                others        bytes: inputs read once and results written once; Sinkhorn reads the
                              scores once more than it has iterations
Share       The rate divided by that of multiplying two 8192 x 8192 fp16 matrices, or of copying
            1 GiB, measured in the same run.
Memory      MB at the peak of value and gradient, in addition to the inputs.
Error       norm(difference) / norm of the value, and of the worst gradient, compared with the plain
            formula in fp64 on equal inputs. The formula may not fit into memory. Where 64 bytes per
            logit, score or number in the tokens exceed the memory of the GPU (on a CPU 4 GB), our
            PyTorch path in fp64 takes its place: with 80 GB at M, N = 65536, and for Sinkhorn at
            32768 x 65536.
Repeatable  Whether a second call with the same inputs gives the same bits, value and all gradients.

Inputs. Embeddings are unit vectors in fp32 (ours rounds them to fp16 on a GPU), around 1000
centres, with the two of a pair closer to each other, as they are after some training; "random" ones
are independent.
Scores are fp16 on a GPU, unless the size says "fp32", and fp32 on a CPU.

The kernels of sinkhorn.py move more bytes than the work counts, so even at full speed their share
stays below 100 %. With fp16 scores it can reach 67 % above K = 16384, where a row does not fit in
registers, with and without Q. assignment_cross_entropy can reach 60 %, because its backward reads
what the forward wrote, or 43 % at large K, where the forward reads its inputs from memory twice.
"""

import argparse
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

# The package kernels is found from any working directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernels import implementation
from kernels.collectives import fail
from kernels.infonce import (
    bank_loss,
    bank_reference,
    clip_loss,
    clip_reference,
    moco_loss,
    moco_reference,
    simclr_loss,
    simclr_reference,
)
from kernels.mae_mask import gather_tokens, masked_patch_mse, random_masking, restore_tokens
from kernels.provenance import commit, device_name
from kernels.sinkhorn import (
    assignment_cross_entropy,
    assignment_cross_entropy_reference,
    sinkhorn,
    sinkhorn_potentials,
)

RESULTS = Path(__file__).with_name("results.jsonl")

TAU = 0.1  # temperature of SimCLR, MoCo, InstDisc and SwAV
SCALE = 1 / 0.07  # of CLIP, where training starts
EPSILON = 0.05
ITERATIONS = 3
PATCH = 16  # pixels

# A way to compute a case -> the package that it needs; it runs if the package is installed.
PACKAGES = {
    "lightly": "lightly",
    "open_clip": "open_clip_torch",
    "memeff": "memeff",
    "inf_cl": "inf-cl",
    "cut_cross_entropy": "cut-cross-entropy",
    "liger_kernel": "liger-kernel",
}

# (seconds, ways): these ways of all cases are measured before the next stage. None begins when more
# seconds have passed since the start, so that the other stages get their time, and a run ends
# within 10 minutes.
STAGES = [
    (540, ("ours", "eager", "eager bf16")),
    (390, tuple(PACKAGES)),
    (460, ("compile", "flex_attention")),  # these take seconds to compile
    (510, ("max-autotune",)),  # takes up to a minute
]


class Case(NamedTuple):
    """One function at one size.

    ways: name of a way, as in STAGES -> the function of the inputs that computes it.
    inputs: device -> tensors. The gradients of those that require them are measured, too.
    work, unit: what a call does; the unit of work / time is TFLOP/s or GB/s.
    elements: of the largest tensor in the plain formula.
    view: (result, *inputs) -> the tensor that is compared."""

    op: str
    size: str
    work: int
    unit: str
    elements: int
    inputs: Callable
    ways: dict
    view: Callable = lambda out, *inputs: out


# -------- 1. The formulas of official code, in plain PyTorch --------------------------------------
# Those of the contrastive losses are the references in infonce.py.


def plain_sinkhorn(scores):
    """The loop of SwAV (section 3.1) as DINOv2 runs it, with no shift against overflow.

    In fp32, or in fp64 for fp64 scores."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    Q = torch.exp(scores.to(dtype) / EPSILON).T  # (prototypes, samples)
    Q /= Q.sum()
    for _ in range(ITERATIONS):
        Q /= Q.sum(1, keepdim=True)
        Q /= Q.shape[0]
        Q /= Q.sum(0, keepdim=True)
        Q /= Q.shape[1]
    return (Q * Q.shape[1]).T


def plain_masking(noise, keep):
    ids_shuffle = noise.argsort(1)
    ids_restore = ids_shuffle.argsort(1)
    mask = torch.ones_like(noise)
    mask[:, :keep] = 0
    return ids_shuffle[:, :keep], ids_restore, mask.gather(1, ids_restore)


def plain_gather(x, ids_keep):
    return x.gather(1, ids_keep[..., None].repeat(1, 1, x.shape[2]))


def plain_restore(x, ids_restore, mask_token, pos):
    hidden = ids_restore.shape[1] - x.shape[1]
    x = torch.cat([x, mask_token.repeat(len(x), hidden, 1)], 1)
    return plain_gather(x, ids_restore) + pos


def plain_mse(pred, images, mask):
    B, _, H, W = images.shape
    dtype = torch.promote_types(pred.dtype, torch.float32)
    target = images / pred.new_full((), 255, dtype=dtype)  # in fp64 if pred is

    # (B, L, P): patches, with their numbers in the order (row, column, colour)
    target = target.reshape(B, 3, H // PATCH, PATCH, W // PATCH, PATCH)
    target = target.permute(0, 2, 4, 3, 5, 1)
    target = target.flatten(3).flatten(1, 2)

    mean = target.mean(-1, keepdim=True)
    var = target.var(-1, keepdim=True)
    target = (target - mean) / (var + 1e-6).sqrt()
    loss = (pred - target).square().mean(-1)  # (B, L)
    return (loss * mask).sum() / mask.sum()


# -------- 2. Other ways to the same numbers -------------------------------------------------------


def autocast(plain):
    """plain, under autocast to bf16."""

    def run(*inputs):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return plain(*inputs)

    return run


def compiled(plain, mode=None):
    """torch.compile, put off until the first call. Shapes are static: a program per case."""
    program = functools.cache(lambda: torch.compile(plain, dynamic=False, mode=mode))
    return lambda *inputs: program()(*inputs)


def by_compiler(plain):
    return {
        "compile": compiled(plain),
        "max-autotune": compiled(plain, "max-autotune-no-cudagraphs"),
    }


def exclude_itself(score, b, h, i, j):
    """For flex_attention: row i does not attend to itself."""
    return torch.where(i == j, -torch.inf, score)


def flex_lse(q, k, scale, score_mod=None):
    """log sum_j exp(scale q_i . k_j), (rows,): attention of which only the normaliser is used.

    q and k are multiplied in bf16."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    q = q.bfloat16()[None, None]  # (1, 1, rows, D): one sample, one head
    k = k.bfloat16()[None, None]
    request = AuxRequest(lse=True)
    _, aux = flex_attention(q, k, k, score_mod, scale=scale, return_aux=request)
    return aux.lse[0, 0]


def flex_simclr(z1, z2):
    z = torch.cat([z1, z2])
    lse = flex_lse(z, z, 1 / TAU, exclude_itself)
    return lse.mean() - (z1 * z2).sum(1).mean() / TAU


def flex_clip(x, y, scale):
    lse_x = flex_lse(scale * x, y, 1.0)
    lse_y = flex_lse(scale * y, x, 1.0)
    positive = scale * (x * y).sum(1).mean()
    return (lse_x + lse_y).mean() / 2 - positive


def flex_moco(q, k, queue):
    positive = (q * k).sum(1) / TAU
    negatives = flex_lse(q, queue, 1 / TAU)
    return (torch.logaddexp(negatives, positive) - positive).mean()


def flex_bank(q, bank, own):
    positive = (q * bank[own]).sum(1) / TAU
    return (flex_lse(q, bank, 1 / TAU) - positive).mean()


def lightly_simclr(z1, z2):
    from lightly.loss.ntx_ent_loss import NTXentLoss

    return NTXentLoss(TAU)(z1, z2)


def lightly_sinkhorn(scores):
    """In fp32, because it computes exp(scores / epsilon), which overflows in fp16."""
    from lightly.loss import swav_loss

    return swav_loss.sinkhorn(scores.float(), ITERATIONS, EPSILON)


def open_clip(x, y, scale):
    from open_clip.loss import ClipLoss

    return ClipLoss()(x, y, scale)


def memeff(x, y, scale):
    """Its scale is a number, which gets no gradient."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(1 / SCALE, normalized_inputs=True, stable=False)
    return loss(x.bfloat16(), y.bfloat16())


def both_directions(one_direction):
    """CLIP's loss from a cross-entropy of scaled features (N, D), weights (N, D), classes (N,)."""

    def run(x, y, scale):
        target = torch.arange(len(x), device=x.device)
        loss_x = one_direction(scale * x, y, target)
        loss_y = one_direction(scale * y, x, target)
        return (loss_x + loss_y) / 2

    return run


def inf_cl(features, weights, target):
    """In fp32, multiplied as TF32."""
    from inf_cl import cal_flash_loss

    return cal_flash_loss(features, weights, target, head_dim=128).mean()


def cut_cross_entropy(features, weights, target):
    """filter_eps=None: no gradient is skipped."""
    from cut_cross_entropy import linear_cross_entropy

    features = features.bfloat16()
    return linear_cross_entropy(features, weights.bfloat16(), target, filter_eps=None)


def liger_kernel(features, weights, target):
    from liger_kernel.transformers import fused_linear_cross_entropy

    loss = fused_linear_cross_entropy.LigerFusedLinearCrossEntropyLoss()
    return loss(weights.bfloat16(), features.bfloat16(), target)


# -------- 3. Inputs -------------------------------------------------------------------------------


def draw(device, *shape, seed=0):
    """Normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)


def pairs(device, n, D, random=False):
    """Two unit vectors (n, D) for each of n images.

    They are near the vector of the image, which is near one of 1000 centres; or just random."""
    image = 0
    if not random:
        generator = torch.Generator(device).manual_seed(1)
        centre = torch.randint(1000, (n,), generator=generator, device=device)
        centres = draw(device, 1000, D, seed=2)
        image = centres[centre] + 0.7 * draw(device, n, D, seed=3)  # (n, D)
    first = image + 0.5 * draw(device, n, D, seed=4)
    second = image + 0.5 * draw(device, n, D, seed=5)
    return F.normalize(first, dim=1), F.normalize(second, dim=1)


def prototype_scores(device, B, K, dtype):
    """(B, K), the cosines of samples and prototypes."""
    samples, _ = pairs(device, B, 256)
    prototypes = F.normalize(draw(device, K, 256), dim=1)
    return (samples @ prototypes.T).to(dtype)


def distinct_noise(device, B, L):
    """Noise (B, L) with distinct numbers in each image; equal ones have no order of their own."""
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.rand(B, L, generator=generator, device=device)
    return noise.argsort(1) / L


# -------- 4. Cases --------------------------------------------------------------------------------


def contrastive(op, size, D, elements, flops, inputs, ours, plain, flex, packages):
    """A case of a contrastive loss. flops: per logit and dimension.

    "eager bf16" and the compiled ones multiply in bf16, eager in fp32. Attention takes rows of up
    to 256 numbers."""
    half = autocast(plain)
    ways = {"ours": ours, "eager": plain, "eager bf16": half}
    ways |= by_compiler(half)
    ways |= packages
    if D <= 256:
        ways["flex_attention"] = compiled(flex)
    return Case(op, size, flops * elements * D, "TFLOP/s", elements, inputs, ways)


def simclr_case(M, D, random=False):
    """SimCLR: M = 2 N views."""

    def inputs(device):
        return [z.requires_grad_() for z in pairs(device, M // 2, D, random)]

    return contrastive(
        op="simclr_loss",
        size=f"M={M} D={D}{' random' if random else ''}",
        D=D,
        elements=M**2,
        flops=6,
        inputs=inputs,
        ours=lambda *z: simclr_loss(*z, TAU),
        plain=lambda *z: simclr_reference(*z, TAU),
        flex=flex_simclr,
        packages={"lightly": lightly_simclr},
    )


def clip_case(N, D, random=False):
    """CLIP: N images and N texts."""

    def inputs(device):
        x, y = pairs(device, N, D, random)
        scale = torch.tensor(SCALE, device=device)
        return [t.requires_grad_() for t in (x, y, scale)]

    packages = {
        "open_clip": open_clip,
        "memeff": memeff,
        "cut_cross_entropy": both_directions(cut_cross_entropy),
        "liger_kernel": both_directions(liger_kernel),
    }
    if N % 64 == 0 and D % 128 == 0:  # its kernel for the keys reads beyond the end otherwise
        packages["inf_cl"] = both_directions(inf_cl)

    return contrastive(
        op="clip_loss",
        size=f"N={N} D={D}{' random' if random else ''}",
        D=D,
        elements=N**2,
        flops=10,
        inputs=inputs,
        ours=clip_loss,
        plain=clip_reference,
        flex=flex_clip,
        packages=packages,
    )


def moco_case(B, K, D):
    """MoCo: B queries, and a queue of K keys."""

    def inputs(device):
        q, k = pairs(device, B + K, D)
        queries = q[:B].clone().requires_grad_()
        return queries, k[:B].clone(), k[B:].clone()

    return contrastive(
        op="moco_loss",
        size=f"B={B} K={K} D={D}",
        D=D,
        elements=B * K,
        flops=4,
        inputs=inputs,
        ours=lambda *x: moco_loss(*x, TAU),
        plain=lambda *x: moco_reference(*x, TAU),
        flex=flex_moco,
        packages={},
    )


def bank_case(B, M, D):
    """InstDisc: B queries, and a memory bank of M rows."""

    def inputs(device):
        views, bank = pairs(device, M, D)
        own = torch.arange(B, device=device) * (M // B)
        return views[own].requires_grad_(), bank, own

    return contrastive(
        op="bank_loss",
        size=f"B={B} M={M} D={D}",
        D=D,
        elements=B * M,
        flops=4,
        inputs=inputs,
        ours=lambda *x: bank_loss(*x, TAU),
        plain=lambda *x: bank_reference(*x, TAU),
        flex=flex_bank,
        packages={},
    )


def sinkhorn_case(B, K, dtype=torch.float16):
    """The assignment of B samples to K prototypes."""
    ways = {
        "ours": lambda s: sinkhorn(s, EPSILON, ITERATIONS),
        "eager": plain_sinkhorn,
        "lightly": lightly_sinkhorn,
    }
    return Case(
        op="sinkhorn",
        size=f"B={B} K={K}",
        work=B * K * ((ITERATIONS + 1) * dtype.itemsize + 4),  # Q is fp32
        unit="GB/s",
        elements=B * K,
        inputs=lambda device: [prototype_scores(device, B, K, dtype)],
        ways=ways | by_compiler(plain_sinkhorn),
        # Every score acts on these rows; the differences of all would take too much memory.
        view=lambda Q, s: Q[:512],
    )


def potentials_case(B, K, dtype=torch.float16):
    """The potentials alone, beside other implementations, which have to build the assignment."""

    def first_rows(out, s):
        if isinstance(out, torch.Tensor):
            return out[:512]
        log_u, log_v = out
        log_u = log_u[:512, None].double()
        x = s[:512].double() / EPSILON
        return (log_u + x + log_v.double()).exp()

    case = sinkhorn_case(B, K, dtype)
    ours = {"ours": lambda s: sinkhorn_potentials(s, EPSILON, ITERATIONS)}
    return case._replace(
        op="sinkhorn_potentials",
        work=B * K * (ITERATIONS + 1) * dtype.itemsize,
        view=first_rows,
        ways=case.ways | ours,
    )


def assignment_case(B, K, dtype=torch.float16):
    """The cross-entropy; all ways rebuild the assignment from scores and potentials."""

    def inputs(device):
        s = prototype_scores(device, B, K, dtype)
        student = s + 0.1 * draw(device, B, K).to(dtype)
        log_u, log_v = sinkhorn_potentials(s, EPSILON, ITERATIONS)
        return student.requires_grad_(), s, log_u, log_v

    def ours(z, s, log_u, log_v):
        return assignment_cross_entropy(z, s, log_u, log_v, TAU, EPSILON)

    def plain(z, s, log_u, log_v):
        return assignment_cross_entropy_reference(z, s, log_u, log_v, TAU, EPSILON)

    return Case(
        op="assignment_cross_entropy",
        size=f"B={B} K={K}",
        work=3 * B * K * dtype.itemsize,
        unit="GB/s",
        elements=B * K,
        inputs=inputs,
        ways={"ours": ours, "eager": plain} | by_compiler(plain),
    )


def mae_cases(B, dtype=torch.bfloat16, L=196, K=49, D=768, decoder=512):
    """The functions of mae_mask.py for ViT-B at 224 pixels, with three quarters hidden.

    L tokens, of which K are kept; D and decoder are the widths of a token in encoder and decoder;
    P is the number of numbers in a patch."""
    P = 3 * PATCH**2
    size = dtype.itemsize

    def case(op, work, inputs, ours, plain, view=lambda out, *inputs: out):
        """work: bytes per image."""
        ways = {"ours": ours, "eager": plain} | by_compiler(plain)
        return Case(op, f"B={B}", B * work, "GB/s", B * L * D, inputs, ways, view)

    def leaf(device, *shape, seed=0):
        return draw(device, *shape, seed=seed).to(dtype).requires_grad_()

    def masking_inputs(device):
        return [distinct_noise(device, B, L)]

    def gather_inputs(device):
        ids_keep, _, _ = plain_masking(distinct_noise(device, B, L), K)
        return [leaf(device, B, L, D), ids_keep]

    def restore_inputs(device):
        _, ids_restore, _ = plain_masking(distinct_noise(device, B, L), K)
        x = leaf(device, B, K, decoder)
        mask_token = leaf(device, decoder, seed=1)
        pos = leaf(device, L, decoder, seed=2).detach()
        return [x, ids_restore, mask_token, pos]

    def mse_inputs(device):
        _, _, mask = plain_masking(distinct_noise(device, B, L), K)
        images = 120 + 40 * draw(device, B, 3, 14 * PATCH, 14 * PATCH, seed=1)
        images = images.clamp(0, 255).byte()
        return [leaf(device, B, L, P), images, mask]

    masking = case(
        "random_masking",
        4 * L + 8 * K + 8 * L + 4 * L,  # noise read; ids_keep, ids_restore and mask written
        masking_inputs,
        ours=lambda noise: random_masking(B, L, K, noise=noise),
        plain=lambda noise: plain_masking(noise, K),
        view=lambda out, noise: torch.cat(out, 1),
    )
    gather = case(
        "gather_tokens",
        (2 * K + K + L) * D * size,  # forward reads and writes K rows, backward reads K, writes L
        gather_inputs,
        ours=gather_tokens,
        plain=plain_gather,
    )
    restore = case(
        "restore_tokens",
        2 * (K + L) * decoder * size,  # forward reads K rows and writes L, backward the reverse
        restore_inputs,
        ours=restore_tokens,
        plain=plain_restore,
    )
    mse = case(
        "masked_patch_mse",
        (L - K) * P * (size + 1) + L * P * size,  # hidden patches and pixels read, gradient written
        mse_inputs,
        ours=lambda pred, images, mask: masked_patch_mse(pred, images, mask, PATCH),
        plain=plain_mse,
    )
    return [masking, gather, restore, mse]


# Sizes on a GPU, the most important ones first.
SIMCLR_SIZES = [  # M, D, whether embeddings are random
    (8192, 128), (32768, 128), (65536, 128), (8192, 256), (32768, 256), (65536, 256), (4096, 128),
    (8192, 128, True), (8192, 512), (8192, 1024), (32768, 512), (8186, 96), (4096, 256),
    (4096, 512), (4096, 1024), (32768, 1024), (65536, 512), (65536, 1024),
]  # fmt: skip
CLIP_SIZES = [  # N, D, whether embeddings are random
    (8192, 128), (32768, 128), (65536, 128), (32768, 256), (8192, 512), (8192, 1024), (4093, 96),
    (8192, 128, True), (8192, 256), (65536, 256), (4096, 128), (4096, 256), (4096, 512),
    (4096, 1024), (32768, 512), (32768, 1024), (65536, 512), (65536, 1024),
]  # fmt: skip
MOCO_SIZES = [  # B, K, D
    (4096, 65536, 128), (1024, 65536, 128), (256, 65536, 128),
    (4096, 65536, 256), (1024, 65536, 256), (256, 65536, 256),
]  # fmt: skip
# B, M, D: the memory bank of ImageNet, and the keys of a batch of MoCo v3
BANK_SIZES = [(256, 1281167, 128), (4096, 4096, 256)]
SINKHORN_SIZES = [  # B, K
    (4096, 65536), (4096, 16384), (4096, 3000), (32768, 3000), (32768, 65536), (8192, 65536),
    (8192, 16384), (8192, 3000), (32768, 16384),
]  # fmt: skip
SINKHORN_SIZES_FP32 = [(4096, 65536), (4096, 3000)]
ASSIGNMENT_SIZES = [(4096, 65536), (4096, 16384)]
MAE_SIZES = [4096, 1024, 256]  # B


def gpu_cases():
    cases = [simclr_case(*size) for size in SIMCLR_SIZES]
    cases += [clip_case(*size) for size in CLIP_SIZES]
    cases += [moco_case(*size) for size in MOCO_SIZES]
    cases += [bank_case(*size) for size in BANK_SIZES]
    for make in (sinkhorn_case, potentials_case):
        cases += [make(B, K) for B, K in SINKHORN_SIZES]
    for make in (sinkhorn_case, potentials_case):
        for B, K in SINKHORN_SIZES_FP32:
            case = make(B, K, torch.float32)
            cases.append(case._replace(size=f"{case.size} fp32"))
    cases += [assignment_case(B, K) for B, K in ASSIGNMENT_SIZES]
    for B in MAE_SIZES:
        cases += mae_cases(B)
    return cases


def cpu_cases():
    """Two sizes of each, to show how time and memory grow, and a small one of CLIP."""
    cases = [simclr_case(M, 128) for M in (2048, 4096)]
    cases += [clip_case(N, 128) for N in (256, 2048, 4096)]
    cases += [moco_case(256, K, 128) for K in (8192, 16384)]
    cases += [bank_case(256, M, 128) for M in (8192, 16384)]
    for make in (sinkhorn_case, potentials_case, assignment_case):
        cases += [make(B, 3000, torch.float32) for B in (512, 1024)]
    for B in (16, 32):
        cases += mae_cases(B, torch.float32)
    return cases


GPU_CASES = gpu_cases()
CPU_CASES = cpu_cases()


# -------- 5. Measuring ----------------------------------------------------------------------------


def arriving(out):
    """The gradient that arrives at a result: 1 at a loss, else normal numbers.

    The numbers are the same in every dtype."""
    if out.ndim == 0:
        return torch.ones_like(out)
    generator = torch.Generator(out.device).manual_seed(0)
    numbers = torch.randn(out.shape, generator=generator, device=out.device)
    return numbers.bfloat16().to(out.dtype)


def value_and_gradients(way, inputs, g=None):
    """-> way(*inputs); the gradients of the inputs that require one. g arrives at the result."""
    leaves = [x for x in inputs if x.requires_grad]
    for x in leaves:
        x.grad = None
    out = way(*inputs)
    if leaves:
        out.backward(arriving(out) if g is None else g)
    return out, [x.grad for x in leaves]


def in_float64(x):
    if not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def exactly(case, inputs, device):
    """-> the value in fp64 (the part that is compared); the gradients.

    They are those of the plain formula, which is independent of ours, wherever it fits."""
    memory = 2**32
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    way = case.ways["eager" if 64 * case.elements <= memory else "ours"]

    doubles = [in_float64(x) for x in inputs]
    out, gradients = value_and_gradients(way, doubles)
    value = case.view(out, *doubles).detach().clone()  # a copy, so that the whole can be freed
    return value, gradients


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def identical(a, b):
    """Whether two results, which may be nested, hold the same bits, also those of nan and -0.0."""
    if isinstance(a, (tuple, list)):
        return all(map(identical, a, b))
    if a is None:
        return b is None
    bits = getattr(torch, f"int{8 * a.element_size()}")
    return torch.equal(a.detach().view(bits), b.detach().view(bits))


def resident_memory(name):
    """Bytes of this process, on Linux: "VmRSS" now, or "VmHWM" at its peak."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\s+(\d+) kB", text)[1]) * 1024


def peak_memory(run, device):
    """-> MB that run() needs in addition to what is allocated, None if unknown; its result."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6, result

    try:
        # Memory that was freed but is still held would be used again without being counted.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident_memory("VmRSS")
    except (OSError, AttributeError):
        return None, run()
    result = run()
    return (resident_memory("VmHWM") - before) / 1e6, result


def milliseconds(run, device):
    """The time of run(): on a GPU the median of many calls, on a CPU that of one."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=10, rep=50, return_mode="median")
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def check(case, way, inputs, exact, exact_gradients, device):
    """-> errors, memory and repeatability, as fields of a row; the gradient that arrives."""
    first = value_and_gradients(way, inputs)
    out, gradients = first
    value_error = relative(case.view(out, *inputs).detach(), exact)
    gradient_errors = []
    for found, wanted in zip(gradients, exact_gradients):
        if found is not None:  # memeff's scale has none
            gradient_errors.append(relative(found, wanted))

    # The first results are still held: to use their memory again would not be counted.
    g = arriving(out) if gradients else None
    memory, second = peak_memory(lambda: value_and_gradients(way, inputs, g), device)

    fields = {
        "value_error": value_error,
        "gradient_error": max(gradient_errors, default=None),
        "memory_mb": memory,
        "repeatable": identical(first, second),
    }
    return fields, g


def times(way, inputs, g, device):
    """-> [milliseconds of the value, and if there are gradients, of value and gradients]."""
    found = [milliseconds(lambda: way(*inputs), device)]
    if g is not None:
        found.append(milliseconds(lambda: value_and_gradients(way, inputs, g), device))
    return found


def reason(error):
    """The first line of an exception."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def free_memory():
    """Frees what a failed call has allocated.

    Call this when its exception is gone: the traceback holds the tensors of the call, and may be
    part of a cycle."""
    gc.collect()
    torch.cuda.empty_cache()


def measure(case, ways, device, peaks):
    """-> a row for each of the ways; that of one that fails has an "error" instead of times."""
    rows = {who: {"op": case.op, "size": case.size, "who": who} for who in ways}
    try:
        inputs = case.inputs(device)
        exact, exact_gradients = exactly(case, inputs, device)
    except torch.OutOfMemoryError as error:  # then nothing can be measured
        return [row | {"error": reason(error)} for row in rows.values()]
    torch.cuda.empty_cache()  # otherwise the memory that fp64 needed stays in pieces

    # The ways take turns.
    g = {}  # way -> the gradient that arrives
    best = {}  # way -> its least times
    for turn in range(1 if device.type == "cuda" else 15):
        for who, way in ways.items():
            if "error" in rows[who]:
                continue
            try:
                if turn == 0:
                    fields, g[who] = check(case, way, inputs, exact, exact_gradients, device)
                    rows[who] |= fields
                found = times(way, inputs, g[who], device)
                best[who] = list(map(min, found, best.get(who, found)))
            except Exception as error:  # a package failed, or there was too little memory
                rows[who]["error"] = reason(error)
            if "error" in rows[who]:
                free_memory()

    for who, row in rows.items():
        if "error" not in row:
            row |= speed(case, best[who], peaks)
    return list(rows.values())


def speed(case, best, peaks):
    """The fields of a row that follow from its times, and from what the device reaches at best."""
    forward, ms = best[0], best[-1]
    fields = {"ms": ms}
    if len(best) == 2:
        fields |= {"forward_ms": forward, "backward_ms": ms - forward}
    per_ms = {"TFLOP/s": 1e9, "GB/s": 1e6}[case.unit]
    fields["rate"] = case.work / ms / per_ms
    fields["unit"] = case.unit
    fields["share"] = fields["rate"] / peaks[case.unit] if peaks else None
    return fields


def rates_of_device(device):
    """What a GPU reaches at best: TFLOP/s of a large product, GB/s of a large copy."""
    a = draw(device, 8192, 8192).half()
    product = milliseconds(lambda: a @ a, device)
    x, y = torch.empty(2, 2**30, dtype=torch.uint8, device=device)
    copy = milliseconds(lambda: y.copy_(x), device)
    return {
        "TFLOP/s": 2 * 8192**3 / product / 1e9,
        "GB/s": 2 * 2**30 / copy / 1e6,
    }


def version(package):
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version():
    """The version of the GPU's driver, or None."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    return output.split("\n")[0]


def environment(device):
    """The fields that all rows of a run share."""
    return {
        "type": device.type,
        "device": device_name(device),
        "driver": driver_version() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def plan(cases, gpu):
    """Yields (seconds, case, ways) in the order of measuring.

    On a CPU there is one stage, which may take any time."""
    sizes = {}  # function -> its sizes, the most important one first
    for case in cases:
        sizes.setdefault(case.op, []).append(case.size)
    by_importance = sorted(cases, key=lambda case: sizes[case.op].index(case.size))

    stages = STAGES if gpu else [(float("inf"), ("ours", "eager"))]
    for seconds, stage in stages:
        runnable = [who for who in stage if who not in PACKAGES or version(PACKAGES[who])]
        for case in by_importance:
            ways = {who: case.ways[who] for who in runnable if who in case.ways}
            if "max-autotune" in ways and case.size != sizes[case.op][0]:
                continue
            if ways:
                yield seconds, case, ways


def run(cases, device, path):
    """Measures the cases and appends the rows to path. -> the rows of ours that failed."""
    about = environment(device)
    start = time.monotonic()
    peaks = rates_of_device(device) if device.type == "cuda" else None
    failed = []

    for seconds, case, ways in plan(cases, device.type == "cuda"):
        if time.monotonic() - start > seconds:
            print(f"no time left for {case.op} {case.size}: {', '.join(ways)}", flush=True)
            continue
        torch._dynamo.reset()  # otherwise the 9th program of a function would run uncompiled
        for row in measure(case, ways, device, peaks):
            who = row["who"]
            if who == "ours" and "error" in row:
                failed.append(row)
            package = version(PACKAGES[who]) if who in PACKAGES else None
            with path.open("a") as file:
                file.write(json.dumps(row | about | {"package": package}) + "\n")
            outcome = row["error"] if "error" in row else f"{row['ms']:.4g} ms"
            print(row["op"], row["size"], who, outcome, flush=True)
    return failed


# -------- 6. The table ----------------------------------------------------------------------------

# Title, whose row, its fields. "other" is the fastest of the ways without a column of their own.
COLUMNS = {
    "cuda": [
        ("ms", "ours", "ms"),
        ("TFLOP/s or GB/s", "ours", "rate"),
        ("share", "ours", "share"),
        ("MB", "ours", "memory_mb"),
        ("error: value, gradient", "ours", "value_error", "gradient_error"),
        ("repeatable", "ours", "repeatable"),
        ("eager ms", "eager", "ms"),
        ("eager bf16 ms", "eager bf16", "ms"),
        ("compile ms", "compile", "ms"),
        ("fastest other ms", "other", "ms", "who"),
    ],
    "cpu": [
        ("ms", "ours", "ms"),
        ("plain ms", "eager", "ms"),
        ("ours / plain", "ours", "over_eager"),
        ("MB", "ours", "memory_mb"),
        ("plain MB", "eager", "memory_mb"),
        ("error: value, gradient", "ours", "value_error", "gradient_error"),
        ("repeatable", "ours", "repeatable"),
    ],
}


def read(path):
    """The rows of a results file; none if there is no file."""
    if not path.exists():
        return []
    rows = []
    for i, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            fail(f"{path}, line {i}: not a row of results (JSON); remove that line")
    return rows


def written(value):
    """A value as the table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.3g}"


def cell(row, *fields):
    """These fields of a row as the table shows them."""
    if row is None:
        return "not run"
    if "error" in row:
        return "out of memory" if "OutOfMemory" in row["error"] else "failed"
    present = [row[field] for field in fields if row.get(field) is not None]
    return ", ".join(map(written, present)) or "-"


def table_line(case, found, columns):
    """The line of a case. found: (op, size, who) -> its last row on the device."""
    rows = {}  # who -> row
    for (op, size, who), row in found.items():
        if (op, size) == (case.op, case.size):
            rows[who] = row

    shown = [who for _, who, *_ in COLUMNS["cuda"]]
    rest = [row for who, row in rows.items() if who not in shown and "ms" in row]
    rows["other"] = min(rest, key=lambda row: row["ms"], default=None)

    if "ms" in rows.get("ours", {}) and "ms" in rows.get("eager", {}):
        ratio = rows["ours"]["ms"] / rows["eager"]["ms"]
        rows["ours"] = rows["ours"] | {"over_eager": ratio}

    cells = [cell(rows.get(who), *fields) for _, who, *fields in columns]
    return f"| {' | '.join([case.op, case.size, *cells])} |"


def device_table(device, rows, cases, columns):
    """Lines of Markdown: what the device is, and a table with one line per case."""
    found = {}  # the last row counts
    for row in rows:
        if row["device"] == device:
            found[row["op"], row["size"], row["who"]] = row

    about = []
    if found:
        last = list(found.values())[-1]
        for field in ("driver", "torch", "triton", "date", "commit"):
            if last.get(field):
                about.append(f"{field} {last[field]}")
    lines = [f"{device}: {', '.join(about) or 'not run'}", ""]

    if cases:
        head = ["kernel", "size", *(title for title, *_ in columns)]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [table_line(case, found, columns) for case in cases]
        lines.append("")
    return lines


def table(rows, gpu_cases=GPU_CASES, cpu_cases=CPU_CASES):
    """Markdown: a table per device, and one that says "not run" if no GPU, or no CPU, has rows."""
    lines = []
    for kind, nothing, cases in (("cuda", "GPU", gpu_cases), ("cpu", "CPU", cpu_cases)):
        of_kind = [row for row in rows if row["type"] == kind]
        devices = dict.fromkeys(row["device"] for row in of_kind)  # in their order
        for device in devices or [nothing]:
            lines += device_table(device, of_kind, cases, COLUMNS[kind])
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="file of the results, to which rows are appended (default: %(default)s)",
    )
    args = p.parse_args()
    if not args.out.parent.is_dir():
        fail(f"--out {args.out}: there is no folder {args.out.parent}")

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    print(implementation(device), flush=True)
    failed = run(GPU_CASES if gpu else CPU_CASES, device, args.out)
    print(table(read(args.out)))
    if failed:
        fail("; ".join(f"{row['op']} {row['size']}: {row['error']}" for row in failed))


if __name__ == "__main__":
    main()
