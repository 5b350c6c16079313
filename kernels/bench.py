"""Measures the kernels beside plain PyTorch and other packages, and prints the kernel table of README.md.

    python kernels/bench.py     on a CUDA GPU, within 10 minutes; without one the CPU path beside the plain formula

Every measurement becomes a row of kernels/results.jsonl (or --out FILE), with device, driver, versions, date and commit; in the
table the last row counts. What has no row reads "not run". On a GPU ours and plain PyTorch come first, at all sizes, then other
packages, then torch.compile, and its "max-autotune" for the first size of each function; in each stage the first sizes first.

Time    milliseconds of the value (forward) and of value and gradient (both); backward is their difference. GPU: the median of
        triton.testing.do_bench, which empties the L2 cache before each call. CPU: the least of 15 calls, in which the
        implementations take turns, so that other programs disturb all alike.
Rate    work / time, of both where there is a gradient. The work is one number for all implementations of a case:
            simclr_loss    6 M^2 D FLOPs, M = 2 N: logits; in the backward logits again, and their weights times z
            clip_loss     10 N^2 D FLOPs: logits; for each of two gradients logits again, and a product. The least without
                          storing logits or adding atomically; with stored logits 6 N^2 D would do
            moco_loss      4 B K D FLOPs: logits, and the weighted mean of the keys, which is the gradient
            others        bytes: inputs read once, results written once; Sinkhorn reads scores once more than it iterates
Share   rate / that of multiplying two 8192 x 8192 fp16 matrices, or of copying 1 GiB, measured in the same run.
Memory  MB at the peak of both, above the inputs.
Error   norm of the difference / norm, of the value and of the worst gradient, from the plain formula in fp64 on equal inputs.
        Where 64 bytes for each of its logits, scores or numbers of tokens exceed the memory of the GPU (on a CPU 4 GB), from
        our PyTorch path in fp64, because the formula may not fit: with 80 GB at M, N = 65536 and in Sinkhorn at 32768 x 65536.
Repeatable  whether a second call with the same inputs gives the same bits, value and all gradients.

Embeddings are unit vectors, fp32 (for ours on a GPU: fp16), around 1000 centres, the two of a pair closer to each other, as
after some training; "random" ones are independent. Scores are fp16 on a GPU, unless the size says "fp32", and fp32 on a CPU.
The kernels move more bytes than are counted here for Sinkhorn above K = 16384: there the share is at most 67 %, with Q 75 %.
"""

import argparse
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import itertools
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common.py is found from any working directory
from common import commit, device_name, fail
from kernels import path as implementation
from kernels.infonce import clip_loss, clip_reference, moco_loss, moco_reference, simclr_loss, simclr_reference
from kernels.mae_mask import gather_tokens, masked_patch_mse, random_masking, restore_tokens
from kernels.sinkhorn import assignment_cross_entropy, assignment_cross_entropy_reference, sinkhorn, sinkhorn_potentials

RESULTS = Path(__file__).with_name("results.jsonl")
TAU, SCALE, EPSILON, ITERATIONS, PATCH = 0.1, 1 / 0.07, 0.05, 3, 16

PACKAGES = {"lightly": "lightly", "open_clip": "open_clip_torch", "memeff": "memeff", "inf_cl": "inf-cl",
            "cut_cross_entropy": "cut-cross-entropy", "liger_kernel": "liger-kernel"}  # way -> package, run where installed
STAGES = [  # (seconds, ways): all cases by these ways before the next stage; none begins when more seconds have passed, so
    (540, ("ours", "eager", "eager bf16")),  # that time is left for the others, and a run ends within 10 minutes
    (390, tuple(PACKAGES)),
    (460, ("compile", "flex_attention")),  # take seconds to compile
    (510, ("max-autotune",))]  # takes up to a minute


class Case(NamedTuple):
    """One function at one size. ways: names in STAGES -> functions of the inputs, which compute it."""
    op: str
    size: str
    work: int
    unit: str  # of work / time: TFLOP/s or GB/s
    elements: int  # of the largest tensor in the plain formula
    inputs: Callable  # device -> tensors; the gradients of those that require them are measured, too
    ways: dict
    view: Callable = lambda out, *inputs: out  # the tensor in a result that is compared


# -------- 1. The formulas of official code, in plain PyTorch; those of the losses of infonce.py are its references -----------

def plain_sinkhorn(scores):
    """The loop of SwAV (section 3.1) as DINOv2 runs it: in fp32 (fp64 for fp64), without a shift against overflow."""
    Q = torch.exp(scores.to(torch.promote_types(scores.dtype, torch.float32)) / EPSILON).T  # (prototypes, samples)
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
    hidden = mask_token.repeat(len(x), ids_restore.shape[1] - x.shape[1], 1)
    return torch.cat([x, hidden], 1).gather(1, ids_restore[..., None].repeat(1, 1, x.shape[2])) + pos

def plain_mse(pred, images, mask):
    B, _, H, W = images.shape
    target = images / pred.new_full((), 255, dtype=torch.promote_types(pred.dtype, torch.float32))  # in fp64 beside fp64
    target = target.reshape(B, 3, H // PATCH, PATCH, W // PATCH, PATCH)
    target = target.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, L, P): row, column, colour of a patch
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


# -------- 2. Other ways to the same numbers -------------------------------------------------------------------------------

def autocast(plain):
    def run(*inputs):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return plain(*inputs)
    return run

def compiled(plain, mode=None):
    """torch.compile, put off until the first call. Static shapes: each case is a program of its own."""
    program = functools.cache(lambda: torch.compile(plain, dynamic=False, mode=mode))
    return lambda *inputs: program()(*inputs)

def by_compiler(plain):
    return {"compile": compiled(plain), "max-autotune": compiled(plain, "max-autotune-no-cudagraphs")}

def others(score, b, h, i, j):
    return torch.where(i == j, -torch.inf, score)

def flex_lse(q, k, scale, score_mod=None):
    """log sum_j exp(scale q_i . k_j), (rows,), of q and k in bf16: attention of which only the normaliser is used."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention
    q, k = q.bfloat16()[None, None], k.bfloat16()[None, None]  # (1, 1, rows, D): one sample, one head
    return flex_attention(q, k, k, score_mod, scale=scale, return_aux=AuxRequest(lse=True))[1].lse[0, 0]

def flex_simclr(z1, z2):
    z = torch.cat([z1, z2])
    return flex_lse(z, z, 1 / TAU, others).mean() - (z1 * z2).sum(1).mean() / TAU

def flex_clip(x, y, scale):
    return (flex_lse(scale * x, y, 1.0) + flex_lse(scale * y, x, 1.0)).mean() / 2 - scale * (x * y).sum(1).mean()

def flex_moco(q, k, queue):
    positive = (q * k).sum(1) / TAU
    return (torch.logaddexp(flex_lse(q, queue, 1 / TAU), positive) - positive).mean()

def lightly_simclr(z1, z2):
    from lightly.loss.ntx_ent_loss import NTXentLoss
    return NTXentLoss(TAU)(z1, z2)

def lightly_sinkhorn(scores):  # in fp32, since it takes exponentials as they are, which overflow in fp16
    from lightly.loss import swav_loss
    return swav_loss.sinkhorn(scores.float(), ITERATIONS, EPSILON)

def open_clip(x, y, scale):
    from open_clip.loss import ClipLoss
    return ClipLoss()(x, y, scale)

def memeff(x, y, scale):  # its scale is a number that gets no gradient
    from memeff import MemoryEfficientCLIPLoss
    return MemoryEfficientCLIPLoss(1 / SCALE, normalized_inputs=True, stable=False)(x.bfloat16(), y.bfloat16())

def both_directions(one_direction):
    """CLIP's loss from a cross-entropy of scaled features (N, D), class weights (N, D) and classes (N,)."""
    def run(x, y, scale):
        target = torch.arange(len(x), device=x.device)
        return (one_direction(scale * x, y, target) + one_direction(scale * y, x, target)) / 2
    return run

def inf_cl(features, weights, target):  # fp32, multiplied as TF32
    from inf_cl import cal_flash_loss
    return cal_flash_loss(features, weights, target, head_dim=128).mean()

def cut_cross_entropy(features, weights, target):
    from cut_cross_entropy import linear_cross_entropy
    return linear_cross_entropy(features.bfloat16(), weights.bfloat16(), target, filter_eps=None)  # None: skip no gradient

def liger_kernel(features, weights, target):
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    return LigerFusedLinearCrossEntropyLoss()(weights.bfloat16(), features.bfloat16(), target)


# -------- 3. Cases ---------------------------------------------------------------------------------------------------------

def draw(device, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)

def pairs(device, n, D, random=False):
    """Two unit vectors (n, D) for each of n images: near the image, which is near one of 1000 centres; or just random ones."""
    image = 0
    if not random:
        centre = torch.randint(1000, (n,), generator=torch.Generator(device).manual_seed(1), device=device)
        image = draw(device, 1000, D, seed=2)[centre] + 0.7 * draw(device, n, D, seed=3)
    return [F.normalize(image + 0.5 * draw(device, n, D, seed=seed), dim=1) for seed in (4, 5)]

def halved(loss):
    """Our loss as the methods call it: on a GPU with rows in float16, for which the kernels are."""
    return lambda *x: loss(*(t.half() if t.is_cuda and t.ndim and t.dtype == torch.float32 else t for t in x))

def contrastive(op, size, D, elements, flops, inputs, ours, plain, flex, packages):
    """flops: for each logit and dimension. "eager bf16" and the compiled ones multiply in bf16, eager in fp32. Attention does
    not take rows above 256."""
    half = autocast(plain)
    ways = {"ours": halved(ours), "eager": plain, "eager bf16": half, **by_compiler(half), **packages}
    return Case(op, size, flops * elements * D, "TFLOP/s", elements, inputs,
                ways | ({"flex_attention": compiled(flex)} if D <= 256 else {}))

def simclr_case(M, D, random=False):
    return contrastive("simclr_loss", f"M={M} D={D}{' random' * random}", D, M**2, 6,
                       lambda device: [z.requires_grad_() for z in pairs(device, M // 2, D, random)],
                       lambda *z: simclr_loss(*z, TAU), lambda *z: simclr_reference(*z, TAU), flex_simclr,
                       {"lightly": lightly_simclr})

def clip_case(N, D, random=False):
    def inputs(device):
        return [x.requires_grad_() for x in (*pairs(device, N, D, random), torch.tensor(SCALE, device=device))]
    packages = {"open_clip": open_clip, "memeff": memeff, "cut_cross_entropy": both_directions(cut_cross_entropy),
                "liger_kernel": both_directions(liger_kernel)}
    if N % 64 == 0 and D % 128 == 0:  # its kernel for the keys reads beyond the end otherwise
        packages["inf_cl"] = both_directions(inf_cl)
    return contrastive("clip_loss", f"N={N} D={D}{' random' * random}", D, N**2, 10, inputs, clip_loss, clip_reference,
                       flex_clip, packages)

def moco_case(B, K, D):
    def inputs(device):
        q, k = pairs(device, B + K, D)
        return q[:B].clone().requires_grad_(), k[:B].clone(), k[B:].clone()
    return contrastive("moco_loss", f"B={B} K={K} D={D}", D, B * K, 4, inputs, lambda *x: moco_loss(*x, TAU),
                       lambda *x: moco_reference(*x, TAU), flex_moco, {})

def prototype_scores(device, B, K, dtype):
    """(B, K) cosines of samples with prototypes."""
    return (pairs(device, B, 256)[0] @ F.normalize(draw(device, K, 256), dim=1).T).to(dtype)

def sinkhorn_case(B, K, dtype=torch.float16):
    return Case("sinkhorn", f"B={B} K={K}", B * K * ((ITERATIONS + 1) * dtype.itemsize + 4), "GB/s", B * K,
                lambda device: [prototype_scores(device, B, K, dtype)],
                {"ours": lambda s: sinkhorn(s, EPSILON, ITERATIONS), "eager": plain_sinkhorn,
                 "lightly": lightly_sinkhorn, **by_compiler(plain_sinkhorn)},
                lambda Q, s: Q[:512])  # every score acts on these rows, and differences of all would take too much memory

def potentials_case(B, K, dtype=torch.float16):
    """Beside the potentials alone, the others have to build the assignment."""
    def first_rows(out, s):
        if isinstance(out, torch.Tensor):
            return out[:512]
        log_u, log_v = out[0].double(), out[1].double()
        return (log_u[:512, None] + s[:512].double() / EPSILON + log_v).exp()
    case = sinkhorn_case(B, K, dtype)
    return case._replace(op="sinkhorn_potentials", work=B * K * (ITERATIONS + 1) * dtype.itemsize, view=first_rows,
                         ways=case.ways | {"ours": lambda s: sinkhorn_potentials(s, EPSILON, ITERATIONS)})

def assignment_case(B, K, dtype=torch.float16):
    """All rebuild the assignment from scores and potentials."""
    def inputs(device):
        s = prototype_scores(device, B, K, dtype)
        student = s + 0.1 * draw(device, B, K).to(dtype)
        return student.requires_grad_(), s, *sinkhorn_potentials(s, EPSILON, ITERATIONS)
    plain = functools.partial(assignment_cross_entropy_reference, temperature=TAU, epsilon=EPSILON)
    return Case("assignment_cross_entropy", f"B={B} K={K}", 3 * B * K * dtype.itemsize, "GB/s", B * K, inputs,
                {"ours": lambda z, s, log_u, log_v: assignment_cross_entropy(z, s, log_u, log_v, TAU, EPSILON),
                 "eager": plain, **by_compiler(plain)})

def mae_cases(B, dtype=torch.bfloat16, L=196, K=49, D=768, decoder=512, P=3 * PATCH**2):
    """ViT-B at 224 pixels, three quarters hidden: L tokens, K kept, widths of encoder and decoder, numbers in a patch."""
    def noise(device):  # each image's numbers differ, because others may put equal ones into another order
        return torch.rand(B, L, generator=torch.Generator(device).manual_seed(0), device=device).argsort(1) / L
    def leaf(device, *shape, seed=0):
        return draw(device, *shape, seed=seed).to(dtype).requires_grad_()
    def images(device):
        return (120 + 40 * draw(device, B, 3, 14 * PATCH, 14 * PATCH, seed=1)).clamp(0, 255).byte()
    def case(op, numbers, inputs, ours, plain, view=lambda out, *inputs: out):
        return Case(op, f"B={B}", B * numbers, "GB/s", B * L * D, inputs, {"ours": ours, "eager": plain, **by_compiler(plain)},
                    view)
    size = dtype.itemsize
    return [
        case("random_masking", 4 * L + 8 * K + 8 * L + 4 * L, lambda d: [noise(d)], lambda x: random_masking(B, L, K, noise=x),
             lambda x: plain_masking(x, K), lambda out, x: torch.cat(out, 1)),
        case("gather_tokens", (2 * K + K + L) * D * size,  # forward reads and writes K rows, backward reads K and writes L
             lambda d: [leaf(d, B, L, D), plain_masking(noise(d), K)[0]], gather_tokens, plain_gather),
        case("restore_tokens", 2 * (K + L) * decoder * size,
             lambda d: [leaf(d, B, K, decoder), plain_masking(noise(d), K)[1], leaf(d, decoder, seed=1),
                        leaf(d, L, decoder, seed=2).detach()], restore_tokens, plain_restore),
        case("masked_patch_mse", (L - K) * P * (size + 1) + L * P * size,  # hidden patches and pixels read, gradient written
             lambda d: [leaf(d, B, L, P), images(d), plain_masking(noise(d), K)[2]],
             lambda pred, x, mask: masked_patch_mse(pred, x, mask, PATCH), plain_mse)]


GPU_CASES = [  # of each function the most important sizes first
    *(simclr_case(M, D, *random) for M, D, *random in [
        (8192, 128), (32768, 128), (65536, 128), (8192, 256), (32768, 256), (65536, 256), (4096, 128), (8192, 128, True),
        (8192, 512), (8192, 1024), (32768, 512), (8186, 96), (4096, 256), (4096, 512), (4096, 1024), (32768, 1024),
        (65536, 512), (65536, 1024)]),
    *(clip_case(N, D, *random) for N, D, *random in [
        (8192, 128), (32768, 128), (65536, 128), (32768, 256), (8192, 512), (8192, 1024), (4093, 96), (8192, 128, True),
        (8192, 256), (65536, 256), (4096, 128), (4096, 256), (4096, 512), (4096, 1024), (32768, 512), (32768, 1024),
        (65536, 512), (65536, 1024)]),
    *(moco_case(B, 65536, D) for D in (128, 256) for B in (4096, 1024, 256)),
    *(of(B, K) for of in (sinkhorn_case, potentials_case)
      for B, K in [(4096, 65536), (4096, 16384), (4096, 3000), (32768, 3000), (32768, 65536), (8192, 65536), (8192, 16384),
                   (8192, 3000), (32768, 16384)]),
    *(of(4096, K, torch.float32)._replace(size=f"B=4096 K={K} fp32") for of in (sinkhorn_case, potentials_case)
      for K in (65536, 3000)),
    assignment_case(4096, 65536), assignment_case(4096, 16384),
    *(case for B in (4096, 1024, 256) for case in mae_cases(B))]
CPU_CASES = [  # two sizes of each, so that the growth of time and memory shows, and a small one of CLIP
    *(simclr_case(M, 128) for M in (2048, 4096)), *(clip_case(N, 128) for N in (256, 2048, 4096)),
    *(moco_case(256, K, 128) for K in (8192, 16384)),
    *(of(B, 3000, torch.float32) for of in (sinkhorn_case, potentials_case, assignment_case) for B in (512, 1024)),
    *(case for B in (16, 32) for case in mae_cases(B, torch.float32))]


# -------- 4. Measuring -----------------------------------------------------------------------------------------------------

def arriving(out):
    """The gradient that arrives at a result: 1 at a loss, else normal numbers, the same in every dtype."""
    numbers = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(0), device=out.device)
    return torch.ones_like(out) if out.ndim == 0 else numbers.bfloat16().to(out.dtype)

def value_and_gradients(way, inputs, g=None):
    leaves = [x for x in inputs if x.requires_grad]
    for x in leaves:
        x.grad = None
    out = way(*inputs)
    if leaves:
        out.backward(arriving(out) if g is None else g)
    return out, [x.grad for x in leaves]

def exactly(case, inputs, device):
    """The value (what is compared of it) and the gradients in fp64, of the plain formula where it fits: independent of ours."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**32
    doubles = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    out, gradients = value_and_gradients(case.ways["eager" if 64 * case.elements <= memory else "ours"], doubles)
    return case.view(out, *doubles).detach().clone(), gradients  # a copy, so that the whole can go

def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()

def identical(a, b):
    """Whether two results, which may be nested, hold the same bits; those of nan and -0.0 are compared as well."""
    if isinstance(a, (tuple, list)):
        return all(map(identical, a, b))
    if a is None:
        return b is None
    bits = getattr(torch, f"int{8 * a.element_size()}")
    return torch.equal(a.detach().view(bits), b.detach().view(bits))

def peak_memory(run, device):
    """MB that run() needs on top of what is allocated, None where that cannot be found out; and what it returned."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6, result
    def kilobytes(name):  # Linux keeps account of the memory that a process holds
        return int(re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but is still held would be used again without being counted
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
        before = kilobytes("VmRSS")
    except (OSError, AttributeError):
        return None, run()
    result = run()
    return (kilobytes("VmHWM") - before) * 1024 / 1e6, result

def milliseconds(run, device):
    """Of run(): on a GPU the median of many calls, on a CPU of one."""
    if device.type == "cuda":
        from triton.testing import do_bench
        return do_bench(run, warmup=10, rep=50, return_mode="median")
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)

def check(case, way, inputs, exact, exact_gradients, device):
    """Errors, memory and repeatability of a row, and the gradient that arrives at the value."""
    out, gradients = first = value_and_gradients(way, inputs)
    errors = [relative(a, b) for a, b in zip(gradients, exact_gradients) if a is not None]  # memeff's scale has none
    errors = {"value_error": relative(case.view(out, *inputs).detach(), exact), "gradient_error": max(errors, default=None)}
    g = arriving(out) if gradients else None
    # The first results are still held: to use their memory again would not be counted.
    memory, second = peak_memory(lambda: value_and_gradients(way, inputs, g), device)
    return errors | {"memory_mb": memory, "repeatable": identical(first, second)}, g

def reason(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]

def free_memory():
    """Call it where the exception of a failed call is gone: its traceback, perhaps in a cycle, holds that call's tensors."""
    gc.collect()
    torch.cuda.empty_cache()

def measure(case, ways, device, peaks):
    """A row for each of the ways, with the "error" of one that fails."""
    rows, g, best = {who: {"op": case.op, "size": case.size, "who": who} for who in ways}, {}, {}
    try:
        inputs = case.inputs(device)
        exact, exact_gradients = exactly(case, inputs, device)
    except torch.OutOfMemoryError as error:  # without these nothing can be measured
        return [row | {"error": reason(error)} for row in rows.values()]
    torch.cuda.empty_cache()  # or else what fp64 needed is left in pieces
    for turn, (who, way) in itertools.product(range(1 if device.type == "cuda" else 15), ways.items()):
        row = rows[who]
        if "error" in row:
            continue
        try:
            if turn == 0:
                found, g[who] = check(case, way, inputs, exact, exact_gradients, device)
                row |= found
            runs = [lambda: way(*inputs)] + [lambda: value_and_gradients(way, inputs, g[who])] * bool(exact_gradients)
            times = [milliseconds(run, device) for run in runs]
            best[who] = [min(pair) for pair in zip(times, best.get(who, times))]
        except Exception as error:  # a package of others, or too little memory: the table says so
            row["error"] = reason(error)
        if "error" in row:
            free_memory()
    for row in [row for row in rows.values() if "error" not in row]:
        forward, row["ms"] = best[row["who"]][0], best[row["who"]][-1]
        row |= {"forward_ms": forward, "backward_ms": row["ms"] - forward} if exact_gradients else {}
        row |= {"rate": case.work / row["ms"] / {"TFLOP/s": 1e9, "GB/s": 1e6}[case.unit], "unit": case.unit}
        row["share"] = row["rate"] / peaks[case.unit] if peaks else None
    return list(rows.values())

def rates_of_device(device):
    """What a GPU reaches at best: TFLOP/s of a large product, GB/s of a large copy."""
    a, (x, y) = draw(device, 8192, 8192).half(), torch.empty(2, 2**30, dtype=torch.uint8, device=device)
    product, copy = milliseconds(lambda: a @ a, device), milliseconds(lambda: y.copy_(x), device)
    return {"TFLOP/s": 2 * 8192**3 / product / 1e9, "GB/s": 2 * 2**30 / copy / 1e6}

def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

def environment(device):
    """The fields that all rows of a run share."""
    driver, command = None, ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        driver = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    return {"type": device.type, "device": device_name(device), "driver": driver, "torch": torch.__version__,
            "triton": version("triton"), "date": datetime.date.today().isoformat(), "commit": commit()}

def plan(cases, gpu):
    """(seconds, case, ways) in the order of measuring. On a CPU there is one stage, which may take any time."""
    sizes = {op: [case.size for case in cases if case.op == op] for op in {case.op for case in cases}}
    for seconds, stage in STAGES if gpu else [(float("inf"), ("ours", "eager"))]:
        stage = [who for who in stage if who not in PACKAGES or version(PACKAGES[who])]
        for case in sorted(cases, key=lambda case: sizes[case.op].index(case.size)):
            ways = {who: case.ways[who] for who in stage if who in case.ways}
            if ways and ("max-autotune" not in ways or case.size == sizes[case.op][0]):
                yield seconds, case, ways

def run(cases, device, path):
    """Measures the cases and appends the rows to path. Returns our own rows that failed."""
    about, start, failed = environment(device), time.monotonic(), []
    peaks = rates_of_device(device) if device.type == "cuda" else None
    for seconds, case, ways in plan(cases, device.type == "cuda"):
        if time.monotonic() - start > seconds:
            print(f"no time left for {case.op} {case.size}: {', '.join(ways)}", flush=True)
            continue
        torch._dynamo.reset()  # or else the 9th program of one function would silently run uncompiled
        for row in measure(case, ways, device, peaks):
            failed += [row] if row["who"] == "ours" and "error" in row else []
            package = {"package": version(PACKAGES[row["who"]]) if row["who"] in PACKAGES else None}
            with path.open("a") as file:
                file.write(json.dumps(row | about | package) + "\n")
            print(row["op"], row["size"], row["who"], row.get("error") or f"{row['ms']:.4g} ms", flush=True)
    return failed


# -------- 5. The table -----------------------------------------------------------------------------------------------------

COLUMNS = {  # title, whose row, its fields
    "cuda": [("ms", "ours", "ms"), ("TFLOP/s or GB/s", "ours", "rate"), ("share", "ours", "share"),
             ("MB", "ours", "memory_mb"), ("error: value, gradient", "ours", "value_error", "gradient_error"),
             ("repeatable", "ours", "repeatable"), ("eager ms", "eager", "ms"), ("eager bf16 ms", "eager bf16", "ms"),
             ("compile ms", "compile", "ms"), ("fastest other ms", "other", "ms", "who")],
    "cpu": [("ms", "ours", "ms"), ("plain ms", "eager", "ms"), ("ours / plain", "ours", "over_eager"),
            ("MB", "ours", "memory_mb"), ("plain MB", "eager", "memory_mb"),
            ("error: value, gradient", "ours", "value_error", "gradient_error"), ("repeatable", "ours", "repeatable")]}

def read(path):
    """The rows of a results file, none if there is no file."""
    rows = []
    for i, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            fail(f"{path}, line {i}: not a row of results (JSON); remove that line")
    return rows

def cell(row, *fields):
    if row is None:
        return "not run"
    if "error" in row:
        return "out of memory" if "OutOfMemory" in row["error"] else "failed"
    def written(value):
        return ("no", "yes")[value] if isinstance(value, bool) else value if isinstance(value, str) else f"{value:.3g}"
    return ", ".join(written(row[field]) for field in fields if row.get(field) is not None) or "-"

def table(rows, gpu_cases=GPU_CASES, cpu_cases=CPU_CASES):
    """Markdown: for each device a line for each case, from its last rows. Without any GPU, or CPU, one that was not run."""
    lines = []
    for kind, nothing, cases in (("cuda", "GPU", gpu_cases), ("cpu", "CPU", cpu_cases)):
        head, mine = ["kernel", "size", *(title for title, *_ in COLUMNS[kind])], [row for row in rows if row["type"] == kind]
        for device in dict.fromkeys(row["device"] for row in mine) or [nothing]:
            found = {(row["op"], row["size"], row["who"]): row for row in mine if row["device"] == device}
            about = list(found.values())[-1] if found else {}
            about = [f"{field} {about[field]}" for field in ("driver", "torch", "triton", "date", "commit") if about.get(field)]
            lines += [f"{device}: {', '.join(about) or 'not run'}", ""]
            lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"] if cases else []
            for case in cases:
                by = {who: row for (op, size, who), row in found.items() if (op, size) == (case.op, case.size)}
                shown = [who for _, who, *_ in COLUMNS["cuda"]]
                rest = [row for who, row in by.items() if who not in shown and "ms" in row]
                by["other"] = min(rest, key=lambda row: row["ms"], default=None)
                if all("ms" in by.get(who, {}) for who in ("ours", "eager")):
                    by["ours"] = by["ours"] | {"over_eager": by["ours"]["ms"] / by["eager"]["ms"]}
                cells = [cell(by.get(who), *fields) for _, who, *fields in COLUMNS[kind]]
                lines.append(f"| {' | '.join([case.op, case.size, *cells])} |")
            lines += [""] if cases else []
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=RESULTS, help="file of the results, rows are appended (default: %(default)s)")
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
