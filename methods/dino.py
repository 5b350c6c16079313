"""DINO: Emerging Properties in Self-Supervised Vision Transformers.
Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin, ICCV 2021. https://arxiv.org/abs/2104.14294
Official code: https://github.com/facebookresearch/dino

Idea. A student predicts, from any crop of an image, what a teacher says of a large crop of it; the teacher is a slowly moving
average of the student. Two forces on the teacher's output keep both from collapse: centring, so that no output dimension wins
for all images, and sharpening, a low temperature, so that it is not uniform. Attention of a ViT then follows objects.

Notation. N images of the global batch, n = N / processes of them on this one; V views of each, two large and V - 2 small;
g_s, g_t trunk and head of student and teacher, with outputs (n, K); C (K,) centre; tau_s, tau_t temperatures; m momentum.
P_t = softmax((g_t(x) - C) / tau_t) and P_s = softmax(g_s(x) / tau_s) are distributions over the K dimensions; then (Eqs. 3, 4)

    L = mean over the large views i and all views v != i of  -sum_k P_t(x_i)_k log P_s(x_v)_k        (Eq. 3 is the sum)
    C <- 0.9 C + 0.1 mean of g_t over the two large views of all N images        theta_t <- m theta_t + (1 - m) theta_s
m is the paper's lambda. As there, the teacher's trunk is evaluated and saved: model.backbone. A ViT's feature: its class token.

Run.
    python methods/dino.py                                                two CPU cores, 4 to 10 minutes: emoji, 32 pixels
    python methods/dino.py --data cifar10 --arch resnet18 --batch 512 --epochs 200 --lr 5e-4 --m 0.99
    torchrun --nproc_per_node 8 methods/dino.py --data IMAGENET --size 224 --arch vit_small --batch 512 --epochs 100 --lr 5e-4 \
        --warmup 10 --m .996 --tau-t .04 .04 0 --head 2048 65536 0 --small 8 96 --scale .05 .4 --blur 1 .1 .5 --workers 12
The second is for one GPU, the third the official 100-epoch run for eight. --batch counts the images of all processes together.
Of a ViT (vision transformer), attention.png shows where each head of the last block looks. Results: the table in README.md.

Differs from the paper.
    1. No stochastic depth in the student (official code: 0.1). The blur kernel is size / 10.
    2. A ResNet is trained by the same AdamW as a ViT; officially by SGD with a weight decay of 1e-4, on other crops.
    3. The learning rate falls to 0, officially to 1e-6. Rows of the last layer have length 1 (norm_last_layer; not vit_small).
    4. Positions are resized to a small crop's patches (official code: and 0.1 more). Patches: 4 pixels for images up to 48.
    5. Defaults are for minutes: a ResNet (a ViT: see README); batch-norm in the head (off there); a sharper, faster teacher.
"""

import argparse
import copy
import math
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common.py is found from any working directory
from common import (Crop, Loader, Run, all_reduce_sum, color_jitter, distribute, fail, gaussian_blur, load_data,
                    normalize, random_flip, random_grayscale, rank, save_grid, solarize, start, world)
from common import backbone as resnet

ARCHS = {"vit_micro": (96, 4, 3), "vit_mini": (128, 6, 4), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6),
         "vit_base": (768, 12, 12)}  # width, blocks and heads; vit_micro is sized for two CPU cores
TAU_S, CENTER_MOMENTUM, CLIP = 0.1, 0.9, 3.0  # as in the official code; CLIP: largest norm of a parameter's gradient


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="emoji", help="emoji, fashion, fashion-mnist, cifar10, cifar100, stl10 or a folder")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=32, help="side of a large view, pixels (paper: 224)")
    p.add_argument("--arch", default="resnet14", choices=[*(f"resnet{d}" for d in (14, 18, 34, 50)), *ARCHS],
                   help="the trunk (paper: vit_small)")
    p.add_argument("--batch", type=int, default=128, help="images a step, over all processes (paper: 1024)")
    p.add_argument("--epochs", type=int, default=40, help="passes over the training images (paper: 100 to 800)")
    p.add_argument("--warmup", type=float, default=2, help="epochs of linear learning-rate warm-up (paper: 10)")
    p.add_argument("--lr", type=float, default=2e-3, help="learning rate per 256 images (paper: 5e-4)")
    p.add_argument("--weight-decay", type=float, nargs=2, default=[0.04, 0.4], help="at the first, the last step (paper: same)")
    p.add_argument("--m", type=float, default=0.98, help="momentum of the teacher, rising to 1 by a cosine (paper: 0.996)")
    p.add_argument("--tau-t", type=float, nargs=3, default=[0.02, 0.02, 0], metavar=("FIRST", "LAST", "EPOCHS"),
                   help="temperature of the teacher: from FIRST to LAST over EPOCHS, then LAST (paper: 0.04 0.07 30)")
    p.add_argument("--head", type=int, nargs=3, default=[512, 256, 1], metavar=("HIDDEN", "K", "NORM"),
                   help="hidden units, outputs, batch-norm in the hidden layers 0 or 1 (paper: 2048 65536 0)")
    p.add_argument("--small", type=int, nargs=2, default=[2, 16], help="number and side, pixels, of small crops (code: 8 96)")
    p.add_argument("--scale", type=float, nargs=2, default=[0.15, 0.4], metavar=("LEAST", "BOUND"), help="share of the image's "
                   "area: small crops from LEAST to BOUND, large ones from BOUND to 1 (code: 0.05 0.4)")
    p.add_argument("--blur", type=float, nargs=3, default=[0.0] * 3, help="its rate in large 1, 2, small (code: 1 .1 .5)")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and the views")
    p.add_argument("--eval-every", type=int, default=8, help="epochs between kNN evaluations")
    p.add_argument("--out", default=None, help="run folder (default: runs/dino-DATA-SEED); a run found there is continued")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = p.parse_args()
    if args.arch in ARCHS and args.small[0] and args.small[1] % patch_side(args.size):
        fail(f"--small {args.small[1]} pixels: choose a multiple of {patch_side(args.size)}, the side of a patch")
    return args


def views(args):
    """Two large views and some small ones with BYOL's distortions (section 3.2); only the second is solarised, at times."""
    def distort(x, rand, blur, solar=0.0):
        x = random_flip(x, rand)
        x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
        x = random_grayscale(x, rand, p=0.2)
        x = gaussian_blur(x, rand, p=blur, sigma=(0.1, 2.0))
        return normalize(solarize(x, rand, p=solar))

    (number, side), (least, bound), (blur1, blur2, blur) = args.small, args.scale, args.blur
    large, small = Crop(args.size, scale=(bound, 1.0)), Crop(side, scale=(least, bound))
    return [(large, partial(distort, blur=blur1)), (large, partial(distort, blur=blur2, solar=0.2)),
            *number * [(small, partial(distort, blur=blur))]]


def patch_side(size):  # copy of: methods/mae.py::patch_side
    """Pixels: 4 for images of up to 48 pixels, 8 up to 96, above 16 as in the paper: 7 patches along a side or more."""
    p = 4 if size <= 48 else 8 if size <= 96 else 16
    if size < p or size % p:
        fail(f"--size {size}: choose a multiple of {p}, the side of a patch")
    return p


class Block(nn.Module):  # copy of: methods/mae.py::Block
    """Transformer block of a ViT, its parameters named as in timm: tokens (n, T, dim) -> (n, T, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)  # all four (n, heads, T, dim / heads)
        x = x + self.attn["proj"](y.transpose(1, 2).flatten(2))  # (n, T, dim)
        return x + self.mlp(self.norm2(x))


def init_weights(module):
    """Linear layers: normal weights of deviation 0.02, biases 0. The convolution of the patches keeps PyTorch's values."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) with learned positions: images of any size that is a
    multiple of a patch's -> class token (n, out_dim). Its parameters are named as in the official code and in timm."""

    def __init__(self, arch, size):
        super().__init__()
        p, (dim, depth, heads) = patch_side(size), ARCHS[arch]
        self.grid, self.out_dim = size // p, dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, p, p)})
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + self.grid**2, dim), std=0.02))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)

    def tokens(self, x):
        """x (n, 3, H, W) -> the first block's input (n, 1 + L, dim), class token first; positions are resized to fit."""
        x = self.patch_embed["proj"](x)  # (n, dim, H / p, W / p)
        first, positions = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if x.shape[2:] != (self.grid, self.grid):
            positions = positions.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (1, dim, grid, grid)
            positions = F.interpolate(positions, x.shape[2:], mode="bicubic").flatten(2).transpose(1, 2)  # (1, L, dim)
        x = x.flatten(2).transpose(1, 2) + positions
        return torch.cat([(self.cls_token + first).expand(len(x), -1, -1), x], 1)

    def forward(self, x):
        return self.norm(self.blocks(self.tokens(x)))[:, 0]  # (n, dim)

    @torch.no_grad()
    def attention(self, x):
        """x (n, 3, S, S) -> (n, heads, S / p, S / p): attention of the class token to the patches in the last block."""
        last = self.blocks[-1]
        x = last.norm1(self.blocks[:-1](self.tokens(x)))  # (n, 1 + L, dim)
        q, k, _ = last.attn["qkv"](x).unflatten(2, (3, last.heads, -1)).permute(2, 0, 3, 1, 4)  # (n, heads, 1 + L, .)
        weights = (q[:, :, :1] @ k.mT / q.shape[3] ** 0.5).softmax(3)[:, :, 0, 1:]  # (n, heads, L)
        return weights.unflatten(2, (math.isqrt(x.shape[1]), -1))


def backbone(arch, size):
    """The trunk, with out_dim: a ViT of this file or a ResNet of common.py, images (n, 3, size, size) -> (n, out_dim)."""
    return ViT(arch, size) if arch in ARCHS else resnet(arch, size)


class Head(nn.Module):
    """Section 3.1, appendix C: three layers, L2-normalisation, a linear layer whose rows are normalised. (n, D) -> (n, K)."""

    def __init__(self, dim, hidden, K, norm, bottleneck=256):
        super().__init__()
        first, second = ([nn.Linear(d, hidden), *bool(norm) * [nn.BatchNorm1d(hidden)], nn.GELU()] for d in (dim, hidden))
        self.mlp = nn.Sequential(*first, *second, nn.Linear(hidden, bottleneck))
        self.apply(init_weights)
        self.last_layer = nn.Linear(bottleneck, K, bias=False)

    def forward(self, h):
        z = self.mlp(h)
        with torch.autocast(z.device.type, enabled=False):  # the softmax divides these cosines by tau_t
            w = F.normalize(self.last_layer.weight, dim=1)
            return F.normalize(z.to(w.dtype), dim=1) @ w.T


class DINO(nn.Module):
    def __init__(self, arch, size, hidden, K, norm):
        super().__init__()
        trunk = backbone(arch, size)
        self.student = nn.ModuleDict({"backbone": trunk, "head": Head(trunk.out_dim, hidden, K, norm)})
        self.backbone = copy.deepcopy(trunk).requires_grad_(False)  # the teacher's
        self.head = copy.deepcopy(self.student["head"]).requires_grad_(False)
        self.register_buffer("center", torch.zeros(K))

    def forward(self, crops):
        """crops: two large (n, 3, S, S), then small ones (n, 3, s, s) -> g_s (V, n, K) of all, g_t (2, n, K) of the large."""
        h = [self.student["backbone"](torch.cat(same)) for same in (crops[:2], crops[2:]) if same]  # a pass for each size
        student = self.student["head"](torch.cat(h))  # (V n, K)
        with torch.no_grad():
            teacher = self.head(self.backbone(torch.cat(crops[:2])))  # (2 n, K)
        return student.unflatten(0, (len(crops), -1)), teacher.unflatten(0, (2, -1))


def dino_loss(student, teacher, center, tau_s, tau_t):
    """L, a scalar in nats. student (V, n, K), large views first; teacher (2, n, K); center (K,). Gradient to student alone."""
    P_t = ((teacher.detach() - center) / tau_t).softmax(2)
    log_P_s = F.log_softmax(student / tau_s, dim=2)
    terms = [-(P_t[i] * log_P_s[v]).sum(1).mean() for i in range(2) for v in range(len(student)) if v != i]
    return sum(terms) / len(terms)


@torch.no_grad()
def update_center(center, mean, momentum):
    """Eq. 4: center (K,) <- momentum center + (1 - momentum) mean of the teacher's outputs over the global batch."""
    center.lerp_(mean, 1 - momentum)


@torch.no_grad()
def ema_update(target, online, m):  # copy of: methods/moco.py::ema_update
    """target parameters <- m target + (1 - m) online. Buffers (batch statistics) stay each network's own."""
    for t, o in zip(target.parameters(), online.parameters(), strict=True):
        t.lerp_(o, 1 - m)


def cosine(first, last, progress):
    """From `first` at progress 0 to `last` at 1, along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def teacher_temperature(epoch, first, last, epochs):
    """From `first` in epoch 0 to `last` in epoch `epochs` - 1, along a line; then `last`."""
    return last if epoch >= epochs else first + (last - first) * epoch / max(1, epochs - 1)


def learning_rate(step, args, steps):  # copy of: methods/simclr.py::learning_rate
    """Base rate x batch / 256, linear warm-up, then cosine to 0. step counts from 0, `steps` are those of an epoch."""
    peak, warmup, total = args.lr * args.batch / 256, args.warmup * steps, args.epochs * steps
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def draw_attention(path, run):
    """Eight test images, each followed by one map a head: white where the class token's attention is largest."""
    split, whole = run.data.test or run.data.bank, (Crop(run.args.size, scale=(1, 1), ratio=(1, 1)), lambda x, rand: x)
    _, (x,) = next(Loader(split, [whole], min(8, len(split.images) // world()) * world(), run.args.seed, run.device)(0))
    maps = run.model.backbone.attention(normalize(x)).float()
    maps = (maps / maps.amax((2, 3), keepdim=True)).unsqueeze(2).expand(-1, -1, 3, -1, -1)  # (8, heads, 3, grid, grid)
    save_grid(path, [[image, *heads] for image, heads in zip(x, maps)])


def main():
    args = get_args()
    device = start(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = DINO(args.arch, args.size, *args.head)
    teacher = nn.ModuleDict({"backbone": model.backbone, "head": model.head})
    optimizer = torch.optim.AdamW([{"params": [w for w in model.student.parameters() if (w.ndim == 1) == plain],
                                    "weight_decay": 0.0} for plain in (False, True)], lr=0.0)  # plain: biases and norms
    run = Run("dino", args, data, loader, model, {"optimizer": optimizer}, collapse=math.log(args.head[1]))
    network = distribute(model, device, args.compile)

    for epoch in range(run.step // loader.steps, args.epochs):
        tau_t = teacher_temperature(epoch, *args.tau_t)
        for step, crops in loader(epoch, run.step):
            progress, lr = step / (args.epochs * loader.steps), learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.param_groups[0]["weight_decay"] = cosine(*args.weight_decay, progress)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                g_s, g_t = network(crops)  # (V, n, K), (2, n, K)
            # The mean over this process's images; DistributedDataParallel averages the gradients of the processes.
            loss = dino_loss(g_s, g_t, model.center, TAU_S, tau_t)
            optimizer.zero_grad()
            loss.backward()
            for w in model.student.parameters():
                nn.utils.clip_grad_norm_(w, CLIP)  # each by itself, as in the official code
            if epoch == 0:  # the last layer is frozen
                model.student["head"].last_layer.weight.grad = None
            optimizer.step()
            update_center(model.center, all_reduce_sum(g_t.mean((0, 1))) / world(), CENTER_MOMENTUM)
            ema_update(teacher, model.student, cosine(args.m, 1.0, progress))
            run.log(loss, lr)
        run.end_epoch(epoch)
    if args.arch in ARCHS and rank() == 0:
        draw_attention(run.folder / "attention.png", run)
    run.finish()


if __name__ == "__main__":
    main()
