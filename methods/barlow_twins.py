"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction.
Zbontar, Jing, Misra, LeCun, Deny, ICML 2021. https://arxiv.org/abs/2103.03230
Official code: https://github.com/facebookresearch/barlowtwins

Idea. Correlate every dimension of the projections of one view with every dimension of those of another view of the same
images. Pulling the diagonal of that matrix towards 1 makes the projection independent of the view; pulling the rest towards 0
makes its dimensions say different things, so that they cannot all become constant. No negatives, no second network, no
stop-gradient: nothing but the two goals keeps the network from collapse.

Notation. N images of the global batch, n = N / processes of them on this one; x1, x2 (n, 3, H, W) two views of each, the
paper's A and B; h = f(x) (n, .) representation; z = g(h) (n, D) projection, of which each dimension is normalised to mean 0 and
variance 1 over the N images, each view by itself. lamb is the paper's lambda. Cross-correlation matrix C (D, D) (Eq. 2) and
loss (Eq. 1):

    C_ij = 1/N sum over images b of z1_bi z2_bj        L = sum over i of (1 - C_ii)^2 + lamb sum over i, j != i of C_ij^2

Run.
    python methods/barlow_twins.py                                        two CPU cores, 2 minutes: emoji, 32 pixels
    python methods/barlow_twins.py --data cifar10 --arch resnet18 --dim 2048 --lambda 0.0051 --batch 256 --epochs 200 \
        --lr 2                                                                                                  one GPU
    torchrun --nproc_per_node 8 methods/barlow_twins.py --data IMAGENET --size 224 --arch resnet50 --dim 8192 --lambda 0.0051 \
        --batch 2048 --epochs 300 --warmup 10 --lr 0.2 --blur 1 0.1 --workers 12           eight GPUs, the recipe of the code
--batch counts the images of all processes together. Results: the table in README.md.

Differs from the paper.
    1. On W GPUs the official code's gradient is 1/W of the loss's, because its all_reduce of C passes none back; here it is
       exact on any number of processes. LARS divides by the gradient's norm, so that only weight decay, biases and batch-norm
       parameters notice: their official rate, tuned on 16 to 32 GPUs, is W times too high here; hence the lower --bias-lr.
    2. The residual branches do not start at zero, so that all methods start from the same network.
    3. The learning rate ends at 0; in the paper at a thousandth of its peak.
    4. Gaussian blur has a kernel of a tenth of the side, as BYOL's; the official code calls Pillow's.
    5. Defaults are scaled to 32-pixel images and minutes of training; --help gives the paper's values. D is small,
       because by chance alone N images show correlations of about 1 / sqrt(N) in D^2 pairs; lamb grows as D falls.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common.py is found from any working directory
from common import (Crop, Loader, Run, all_reduce_sum, backbone, color_jitter, distribute, gaussian_blur, load_data,
                    normalize, random_flip, random_grayscale, solarize, start)


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="emoji", help="emoji, fashion, fashion-mnist, cifar10, cifar100, stl10 or a folder")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=32, help="side of a view, pixels (paper: 224)")
    p.add_argument("--arch", default="resnet14", help="resnet14, resnet18, resnet34 or resnet50 (paper: resnet50)")
    p.add_argument("--batch", type=int, default=64, help="images a step, over all processes (paper: 2048)")
    p.add_argument("--epochs", type=int, default=32, help="passes over the training images (paper: 1000)")
    p.add_argument("--warmup", type=float, default=2, help="epochs of linear learning-rate warm-up (paper: 10)")
    p.add_argument("--lr", type=float, default=4.0, help="learning rate per 256 images, of weights (paper: 0.2)")
    p.add_argument("--bias-lr", type=float, default=0.0015, help="share of --lr for biases, batch-norm (paper: 0.024, see 1)")
    p.add_argument("--weight-decay", type=float, default=1e-6, help="on weights, not biases or batch-norm (paper: 1.5e-6)")
    p.add_argument("--lambda", dest="lamb", type=float, default=0.04, help="weight off the diagonal (paper: .005; code: .0051)")
    p.add_argument("--dim", type=int, default=128, help="width of the three layers of the projector (paper: 8192)")
    p.add_argument("--blur", type=float, nargs=2, default=[0.0, 0.0], help="probability of blur in each view (paper: 1 0.1)")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and the views")
    p.add_argument("--eval-every", type=int, default=8, help="epochs between kNN evaluations")
    p.add_argument("--out", default=None,
                   help="run folder (default: runs/barlow_twins-DATA-SEED); a run found there is continued")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    return p.parse_args()


def views(args):
    """BYOL's recipe: both views alike but for the probability of blur, and for solarization, in the second view alone."""
    def augmentation(blur, solarized):
        def augment(x, rand):
            x = random_flip(x, rand)
            x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
            x = random_grayscale(x, rand, p=0.2)
            x = gaussian_blur(x, rand, p=blur, sigma=(0.1, 2.0))
            x = solarize(x, rand, p=solarized)
            return normalize(x)
        return augment

    crop = Crop(args.size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    return [(crop, augmentation(args.blur[0], 0.0)), (crop, augmentation(args.blur[1], 0.2))]


class BarlowTwins(nn.Module):
    def __init__(self, arch, size, dim):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.projector = nn.Sequential(  # section 2.2: three layers of equal width
            nn.Linear(self.backbone.out_dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(),
            nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(),
            nn.Linear(dim, dim, bias=False))
        self.normalize = nn.BatchNorm1d(dim, affine=False)  # the denominator of Eq. 2: biased variance, over the global batch

    def forward(self, x1, x2):
        # One view after the other, so that all batch statistics are of one view, as the paper's.
        z1, z2 = (self.projector(self.backbone(x)) for x in (x1, x2))  # (n, D) both
        return self.normalize(z1.float()), self.normalize(z2.float())


def barlow_twins(c, lamb):
    """Eq. 1. c: (D, D) cross-correlation matrix of the global batch, Eq. 2. Returns a scalar: 0 if c is the identity, D if all
    dimensions are constant (c = 0)."""
    diagonal = c.diagonal()
    invariance = (1 - diagonal).square().sum()
    redundancy = (c - torch.diag(diagonal)).square().sum()
    return invariance + lamb * redundancy


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step, for every weight matrix, has a length relative to that of the matrix (You et al. 2017,
    https://arxiv.org/abs/1708.03888). Biases and batch-norm parameters take plain SGD steps without weight decay. As in the
    official code of BYOL and Barlow Twins, the learning rate multiplies what comes out of the momentum buffer."""

    def __init__(self, params, lr, weight_decay, momentum=0.9, trust=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:  # frozen
                    continue
                update = w.grad
                if w.ndim > 1:
                    update = update + group["weight_decay"] * w
                    w_norm, u_norm = w.norm(), update.norm()
                    update = update * torch.where((w_norm > 0) & (u_norm > 0), group["trust"] * w_norm / u_norm, 1.0)
                buffer = self.state[w].setdefault("momentum", torch.zeros_like(w))
                buffer.mul_(group["momentum"]).add_(update)
                w.sub_(buffer * group["lr"])


def learning_rate(step, args, steps):  # copy of: methods/simclr.py::learning_rate
    """Base rate x batch / 256, linear warm-up, then cosine to 0. step counts from 0, `steps` are those of an epoch."""
    peak, warmup, total = args.lr * args.batch / 256, args.warmup * steps, args.epochs * steps
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def main():
    args = get_args()
    device = start(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = BarlowTwins(args.arch, args.size, args.dim)
    weights = {"params": [w for w in model.parameters() if w.ndim > 1]}
    biases = {"params": [w for w in model.parameters() if w.ndim == 1]}  # and batch-norm's scales
    optimizer = LARS([weights, biases], lr=0.0, weight_decay=args.weight_decay)
    run = Run("barlow_twins", args, data, loader, model, {"optimizer": optimizer}, collapse=args.dim)
    network = distribute(model, device, args.compile)

    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group, share in zip(optimizer.param_groups, (1, args.bias_lr)):
                group["lr"] = lr * share
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z1, z2 = network(x1, x2)  # (n, D) both, normalised over the global batch
            # Each process adds its images' share to the matrix of all, so that all have the same loss. all_reduce_sum passes
            # the gradient back from every process and DistributedDataParallel averages: exactly that of one process with all N.
            c = all_reduce_sum(z1.T @ z2) / args.batch  # (D, D)
            loss = barlow_twins(c, args.lamb)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
