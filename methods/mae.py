"""MAE: Masked Autoencoders Are Scalable Vision Learners.
He, Chen, Xie, Li, Dollar, Girshick, CVPR 2022. https://arxiv.org/abs/2111.06377
Official code: https://github.com/facebookresearch/mae

Idea. Hide three quarters of an image's patches and predict their pixels from the rest: so much that copying the neighbours
will not do, one must know what the picture shows. The encoder, a vision transformer (ViT), gets the visible patches alone,
a quarter of the work; a small decoder, thrown away after training, does the drawing.

Notation. N images of the global batch, n = N / processes of them on this one; x (n, 3, H, W) images; L = (H / p)^2 patches of
p x p pixels, K of them visible, P = 3 p^2 numbers in each; D width of the encoder, d of the decoder, whose output is
pred (n, L, P). With t_i the pixels of patch i, less their mean and divided by their deviation (a variant in section 3):

    loss = mean over the hidden patches i of all images of  1/P ||pred_i - t_i||^2       0 costs (P - 1) / P, or 0 if flat

Masks (section 4.1, Figure 6, Table 1f), each image its own: `random` patches; `block`, BEiT's blocks (arXiv 2106.08254);
`grid`, all but one of every 2 x 2 patches. The paper's linear probe of ViT-L with --raw-pixels: 73.5, 63.9, 66.0 %.

Run.
    python methods/mae.py                                                 two CPU cores, 5 minutes: emoji, 32 pixels
    python methods/mae.py --data cifar10 --arch vit_tiny --decoder-dim 192 --decoder-depth 4 --batch 512 --epochs 400 \
        --lr 5e-4 --warmup 20                                             one GPU
    torchrun --nproc_per_node 8 methods/mae.py --data IMAGENET --size 224 --arch vit_base --decoder-dim 512 \
        --decoder-depth 8 --batch 4096 --epochs 800 --warmup 40 --lr 1.5e-4 --workers 12    eight GPUs, the paper's recipe
--batch counts the images of all processes together. Pictures: reconstruction.png. Results: the table in README.md.

Differs from the paper.
    1. Features are the mean of the patch tokens; the official code probes the class token, and appendix A.1 finds both alike.
    2. `block` tries 40 blocks an image, as large as BEiT's in proportion, and hides what then is missing at random; the paper
       does not say how it hides equally many in each image. `grid`: which of the four is visible is drawn for each image.
    3. The biases of the patches' embedding start at 0; in the official code at PyTorch's small random values.
    4. Defaults are scaled to small images and minutes of training (see --help), p too: 4 up to 48 pixels, 8 up to 96, else 16.
"""

import argparse
import math
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common.py is found from any working directory
from common import (MEAN, STD, Crop, Loader, Run, distribute, fail, load_data, normalize, print0, random_flip, rank,
                    save_grid, start, world)
from kernels import path
from kernels.mae_mask import gather_tokens, masked_patch_mse, random_masking, restore_tokens  # masked_patch_mse: mae_loss below

ARCHS = {"vit_mini": (128, 6, 4), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12),
         "vit_large": (1024, 24, 16)}  # the encoder's width, blocks and heads; vit_mini is sized for two CPU cores


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="emoji", help="emoji, fashion, fashion-mnist, cifar10, cifar100, stl10 or a folder")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=32, help="side of a view, pixels (paper: 224)")
    p.add_argument("--arch", default="vit_mini", help=f"encoder: {', '.join(ARCHS)} (paper: vit_base, vit_large, vit_huge)")
    p.add_argument("--mask", default="random", choices=["random", "block", "grid"], help="how it is drawn (paper: random)")
    p.add_argument("--mask-ratio", type=float, default=0.75, help="share of the patches that is hidden (paper: 0.75)")
    p.add_argument("--raw-pixels", action="store_true", help="predict pixels not normalised by patch (paper, Table 1d: worse)")
    p.add_argument("--decoder-dim", type=int, default=64, help="width of the decoder, a multiple of 32 (paper: 512)")
    p.add_argument("--decoder-depth", type=int, default=2, help="blocks of the decoder (paper: 8)")
    p.add_argument("--batch", type=int, default=64, help="images a step, over all processes (paper: 4096)")
    p.add_argument("--epochs", type=int, default=40, help="passes over the training images (paper: 800, also 1600)")
    p.add_argument("--warmup", type=float, default=3, help="epochs of linear learning-rate warm-up (paper: 40)")
    p.add_argument("--lr", type=float, default=4e-3, help="learning rate per 256 images (paper: 1.5e-4)")
    p.add_argument("--weight-decay", type=float, default=0.05, help="on weights, not biases or layer-norm (paper: 0.05)")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images, the views and the masks")
    p.add_argument("--eval-every", type=int, default=20, help="epochs between kNN evaluations")
    p.add_argument("--out", default=None, help="run folder (default: runs/mae-DATA-SEED); a run found there is continued")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = p.parse_args()
    grid, keep = grid_and_keep(args)
    if not 0 < keep < grid**2 or args.mask == "grid" and (4 * keep != grid**2 or grid % 2):
        fail(f"--mask {args.mask} --mask-ratio {args.mask_ratio} leaves {keep} of {grid} x {grid} patches visible: choose 1 to "
             f"{grid**2 - 1}; a grid leaves a quarter (--mask-ratio 0.75), an even number along a side")
    if args.decoder_dim < 32 or args.decoder_dim % 32:
        fail(f"--decoder-dim {args.decoder_dim}: choose a multiple of 32, the width of an attention head")
    return args


def views(args):
    """Section 4.1 and appendix A.1: random crop and flip alone. The masks are drawn in main(): the loss needs them too."""
    return [(Crop(args.size, scale=(0.2, 1.0)), lambda x, rand: normalize(random_flip(x, rand)))]


def patch_side(size):
    """Pixels: 4 for images of up to 48 pixels, 8 up to 96, above 16 as in the paper: 7 patches along a side or more."""
    p = 4 if size <= 48 else 8 if size <= 96 else 16
    if size < p or size % p:
        fail(f"--size {size}: choose a multiple of {p}, the side of a patch")
    return p


def grid_and_keep(args):
    """Patches along a side, and how many stay visible, K: rounded down, as in the official code."""
    grid = args.size // patch_side(args.size)
    return grid, int(grid**2 * (1 - args.mask_ratio))


def draw_masks(args, rand, device):
    """ids_keep (n, K), ids_restore (n, L), mask (n, L) on the device: see random_masking. That keeps the patches with the
    smallest noise, so adding 1 to a patch's noise hides it, and what is missing is chosen at random."""
    grid, keep = grid_and_keep(args)
    noise = rand.uniform(columns=(grid**2,))
    if args.mask == "block":
        noise += block_masks(rand.uniform(columns=(40, 4)), grid, grid**2 - keep)
    if args.mask == "grid":
        visible = torch.arange(grid) % 2 == (2 * rand.uniform(columns=(2, 1))).long()  # (n, 2, grid): every other row, column
        noise += ~(visible[:, 0, :, None] & visible[:, 1, None, :]).flatten(1)
    return random_masking(*noise.shape, keep, noise=noise.to(device, non_blocking=True))


def block_masks(u, grid, hide):
    """Uniform u (n, tries, 4) -> boolean (n, L), True where hidden, at most `hide` a row. BEiT's Algorithm 1, all images at
    once: each try draws a block of at least 16/196 of the image and of aspect 0.3 to 1/0.3, and hides it if it fits."""
    hidden, cell = torch.zeros(len(u), grid, grid, dtype=torch.bool), torch.arange(grid)
    least = 16 / 196 * grid**2
    for area, aspect, top, left in u.permute(1, 2, 0):  # (n,) each
        missing = hide - hidden.sum((1, 2))
        area = least + area * (missing - least)
        aspect = 0.3 ** (1 - 2 * aspect)  # log-uniform
        h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        top, left = (top * (grid - h + 1)).floor(), (left * (grid - w + 1)).floor()
        rows, columns = ((start[:, None] <= cell) & (cell < (start + side)[:, None]) for start, side in ((top, h), (left, w)))
        new = rows[:, :, None] & columns[:, None, :] & ~hidden  # (n, grid, grid)
        hidden |= new & ((h < grid) & (w < grid) & (new.sum((1, 2)) <= missing))[:, None, None]
    return hidden.flatten(1)


class Block(nn.Module):
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


def sincos_positions(grid, dim):
    """Fixed positions (1, 1 + grid^2, dim): 0 for the class token, then in reading order. Half of the numbers encode the
    column, half the row: sines, then cosines, of frequencies from 1 to nearly 1/10000 (Vaswani et al. 2017, section 3.5)."""
    angle = torch.arange(grid)[:, None] * 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # (grid, dim / 2)
    positions = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], 1)  # (grid^2, dim)
    return F.pad(positions, (0, 0, 1, 0))[None].float()


def init_weights(module):
    """Xavier uniform weights, those of the convolution that embeds patches as if it were a linear layer; biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): images (n, 3, size, size) -> features (n, out_dim). Its
    parameters are named as in the official code and in timm; vit_base and vit_large at 224 pixels load published weights."""

    def __init__(self, arch, size):
        super().__init__()
        if arch not in ARCHS:
            fail(f"--arch {arch}: choose {', '.join(ARCHS)}")
        p, (dim, depth, heads) = patch_side(size), ARCHS[arch]
        self.size, self.out_dim = size, dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, p, p)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(size // p, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)

    def tokens(self, x, ids_keep=None):
        """x (n, 3, size, size), ids_keep (n, K) the visible patches, None for all L -> (n, 1 + K, D), class token first."""
        if x.shape[2:] != (self.size, self.size):
            fail(f"this ViT is for images of {self.size} x {self.size} pixels, not {tuple(x.shape[2:])}: see --size")
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]  # (n, L, D)
        if ids_keep is not None:
            x = gather_tokens(x, ids_keep)  # (n, K, D): the encoder knows nothing of the hidden patches
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # (n, 1 + K, D)
        return self.norm(self.blocks(x))

    def forward(self, x):
        return self.tokens(x)[:, 1:].mean(1)  # (n, D)


backbone = ViT  # backbone(arch, size), as in common.py: what is evaluated and saved


class MAE(nn.Module):
    def __init__(self, arch, size, decoder_dim, decoder_depth):
        super().__init__()
        self.backbone = backbone(arch, size)
        p = patch_side(size)
        self.decoder_embed = nn.Linear(self.backbone.out_dim, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        self.register_buffer("decoder_pos_embed", sincos_positions(size // p, decoder_dim))
        self.decoder_blocks = nn.Sequential(*(Block(decoder_dim, decoder_dim // 32) for _ in range(decoder_depth)))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * p**2)
        self.apply(init_weights)

    def forward(self, x, ids_keep, ids_restore):
        y = self.decoder_embed(self.backbone.tokens(x, ids_keep))  # (n, 1 + K, d)
        patches = restore_tokens(y[:, 1:], ids_restore, self.mask_token.flatten(), self.decoder_pos_embed[0, 1:])  # (n, L, d)
        y = torch.cat([y[:, :1], patches], 1)  # (n, 1 + L, d)
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(y)[:, 1:]))  # (n, L, P)


def patchify(x, p):
    """(n, 3, H, W) -> (n, L, P): patches in reading order, the numbers of each in the order (row, column, colour)."""
    return rearrange(x, "n c (row p) (column q) -> n (row column) (p q c)", p=p, q=p)


def unpatchify(t, p):
    """(n, L, P) -> (n, 3, H, H), the inverse of patchify for square images."""
    return rearrange(t, "n (row column) (p q c) -> n c (row p) (column q)", p=p, q=p, row=math.isqrt(t.shape[1]))


def mae_loss(pred, x, mask, p, normalize=True):
    """Mean squared error over the hidden patches, section 3: a scalar. The loop calls masked_patch_mse, which is the same but
    does not read visible patches. pred (n, L, P), x (n, 3, H, W) the images, mask (n, L) 1 where hidden, p pixels."""
    t = patchify(x, p)  # (n, L, P)
    if normalize:
        t = (t - t.mean(2, keepdim=True)) / (t.var(2, keepdim=True) + 1e-6).sqrt()
    return ((pred - t).square().mean(2) * mask).sum() / mask.sum()


def learning_rate(step, args, steps):  # copy of: methods/simclr.py::learning_rate
    """Base rate x batch / 256, linear warm-up, then cosine to 0. step counts from 0, `steps` are those of an epoch."""
    peak, warmup, total = args.lr * args.batch / 256, args.warmup * steps, args.epochs * steps
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@torch.no_grad()
def draw_reconstructions(path, run):
    """A picture of twelve images held out, four a row: what the encoder sees, the reconstruction, the image. A prediction of
    normalised pixels lacks the mean and the contrast of each patch, which are taken from the image."""
    args, split, p = run.args, run.data.test or run.data.bank, patch_side(run.args.size)
    whole = Crop(args.size, scale=(1, 1), ratio=(1, 1)), lambda x, rand: normalize(x)
    loader = Loader(split, [whole], min(12, len(split.images) // world()) * world(), args.seed, run.device)
    _, (x,) = next(loader(0))  # (12, 3, H, W) on each process
    t, (ids_keep, ids_restore, mask) = patchify(x, p), draw_masks(args, loader.random(0, 0, 0, 4), run.device)
    pred, mask = run.model(x, ids_keep, ids_restore), mask[:, :, None]
    if not args.raw_pixels:
        pred = pred * (t.var(2, keepdim=True) + 1e-6).sqrt() + t.mean(2, keepdim=True)
    shown = torch.stack([unpatchify(t * (1 - mask), p), unpatchify(torch.lerp(t, pred, mask), p), x], 1)  # (n, 3, 3, H, W)
    mean, std = (torch.tensor(v, device=run.device).view(3, 1, 1) for v in (MEAN, STD))
    save_grid(path, [list(row.flatten(0, 1)) for row in (shown * std + mean).clamp(0, 1).split(4)])


def main():
    args = get_args()
    device = start(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = MAE(args.arch, args.size, args.decoder_dim, args.decoder_depth)
    groups = [{"params": [w for w in model.parameters() if w.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [w for w in model.parameters() if w.ndim == 1], "weight_decay": 0.0}]  # biases, layer-norm
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    run = Run("mae", args, data, loader, model, {"optimizer": optimizer})
    print0(f"masking: {path(device)}")
    network = distribute(model, device, args.compile)

    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            ids_keep, ids_restore, mask = draw_masks(args, loader.random(epoch, step, 0, 4), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                pred = network(x, ids_keep, ids_restore)  # (n, L, P)
            # The mean over this process's hidden patches, equally many on each; DistributedDataParallel averages the gradients.
            loss = masked_patch_mse(pred.float(), x, mask, patch_side(args.size), normalize=not args.raw_pixels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    if rank() == 0:
        draw_reconstructions(run.folder / "reconstruction.png", run)
    run.finish()


if __name__ == "__main__":
    main()
