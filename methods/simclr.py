"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations.
Chen, Kornblith, Norouzi, Hinton, ICML 2020. https://arxiv.org/abs/2002.05709
Official code (TensorFlow): https://github.com/google-research/simclr

Idea. Two random views of the same image should have similar embeddings, and views of different images dissimilar ones.
Each view must pick out its partner among all other 2N - 1 views of the batch, so the other images are the negatives, and
strong augmentation (crop and colour) leaves meaning as the only thing the two views share.

Notation. N images of the global batch, n = N / processes of them on this one; x1, x2 (n, 3, H, W) two views of each;
h = f(x) (n, D) representation, kept for later use; z = g(h) (n, d) projection, thrown away after training; tau temperature.
For the 2N normalised projections, s_ij = z_i . z_j, and i, j two views of one image (Eq. 1):

    l(i, j) = -log  exp(s_ij / tau) / sum over k != i of exp(s_ik / tau)         L = mean of l over all 2N ordered pairs

Run.
    python methods/simclr.py                                              two CPU cores, 2 to 5 minutes: emoji, 32 pixels
    python methods/simclr.py --data cifar10 --arch resnet18 --batch 512 --epochs 200 --lr 0.5 --tau 0.5   one GPU
    torchrun --nproc_per_node 8 methods/simclr.py --data IMAGENET --size 224 --arch resnet50 --batch 4096 --epochs 100 \
        --lr 0.3 --warmup 10 --weight-decay 1e-6 --strength 1 --blur 0.5 --workers 12    eight GPUs, the paper's recipe
--batch counts the images of all processes together. Results: the table in README.md.

Differs from the paper.
    1. Inputs are normalised by ImageNet's mean and standard deviation; the official code feeds pixels in [0, 1].
    2. The loss is the paper's mean over 2N; the official code adds the means of the two directions, twice as much. LARS
       divides by the gradient's norm, so that only weight decay, biases and batch-norm notice.
    3. Colour operations are torchvision's (as in most reimplementations): contrast around the mean grey level, saturation
       by blending with grey; TensorFlow's differ slightly, and the official version 1 adds brightness, instead of multiplying
       by it. Blur reflects the borders, officially they are padded with zeros. Crops: torchvision's ten tries, not 100.
    4. Residual branches do not start at zero, so that all methods start from the same network; the projector starts as
       PyTorch's layers do, officially from a normal distribution of deviation 0.01.
    5. Defaults are scaled to 32-pixel images and minutes of training; --help gives the paper's values.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common.py is found from any working directory
from common import (Crop, Loader, Run, backbone, color_jitter, distribute, fail, gaussian_blur, load_data, normalize, print0,
                    random_flip, random_grayscale, start)
from kernels import path
from kernels.infonce import simclr_loss


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="emoji", help="emoji, fashion, fashion-mnist, cifar10, cifar100, stl10 or a folder")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=32, help="side of a view, pixels (paper: 224)")
    p.add_argument("--arch", default="resnet14", help="resnet14, resnet18, resnet34 or resnet50 (paper: resnet50)")
    p.add_argument("--batch", type=int, default=256, help="images a step, over all processes (paper: 4096)")
    p.add_argument("--epochs", type=int, default=30, help="passes over the training images (paper: 100 to 1000)")
    p.add_argument("--warmup", type=float, default=2, help="epochs of linear learning-rate warm-up (paper: 10)")
    p.add_argument("--lr", type=float, default=4.0, help="learning rate per 256 images (paper: 0.3; CIFAR-10: 0.5)")
    p.add_argument("--weight-decay", type=float, default=1e-4, help="on weights, not biases or batch-norm (paper: 1e-6)")
    p.add_argument("--tau", type=float, default=0.1, help="temperature of the loss (paper: 0.1; CIFAR-10: 0.5)")
    p.add_argument("--dim", type=int, default=128, help="dimensions of the projection z (paper: 128)")
    p.add_argument("--strength", type=float, default=0.5, help="of the colour jitter, s in appendix A (paper: 1; CIFAR: 0.5)")
    p.add_argument("--blur", type=float, default=0.0, help="probability of Gaussian blur (paper: 0.5; CIFAR-10: 0)")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and the views")
    p.add_argument("--eval-every", type=int, default=5, help="epochs between kNN evaluations")
    p.add_argument("--out", default=None, help="run folder (default: runs/simclr-DATA-SEED); a run found there is continued")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = p.parse_args()
    if args.tau < 0.006:
        fail(f"--tau {args.tau}: choose at least 0.006, below which the loss's powers overflow")
    return args


def views(args):
    """Appendix A: random crop, flip, colour jitter, grey, blur; the same recipe for both views, independent draws."""
    def augment(x, rand):
        x = random_flip(x, rand)
        s = args.strength
        x = color_jitter(x, rand, brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8)
        x = random_grayscale(x, rand, p=0.2)
        x = gaussian_blur(x, rand, p=args.blur, sigma=(0.1, 2.0))
        return normalize(x)

    crop = Crop(args.size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    return [(crop, augment), (crop, augment)]


class SimCLR(nn.Module):
    def __init__(self, arch, size, dim):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        self.projector = nn.Sequential(  # section 2.1: one hidden layer; batch-norm after both, as in the official code
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim))
        self.projector[-1].bias.requires_grad_(False)  # the official code's last batch-norm has a scale but no offset

    def forward(self, x):
        h = self.backbone(x)  # (n, D)
        return self.projector(h)  # (n, d)


def nt_xent(z1, z2, tau):
    """NT-Xent, Eq. 1, averaged over the 2N anchors of one process. Returns a scalar, in nats.

    z1, z2: (N, d) L2-normalised, row k of both from image k. The training loop calls simclr_loss, which is this formula
    without ever storing the (2N, 2N) logits, and over the candidates of all processes."""
    z = torch.cat([z1, z2])  # (2N, d)
    logits = z @ z.T / tau  # (2N, 2N): s_ij / tau
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)  # the sum is over k != i
    positive = torch.arange(len(z), device=z.device).roll(len(z1))  # row i's other view: N, N + 1, ..., 0, 1, ...
    return F.cross_entropy(logits, positive)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step, for every weight matrix, has a length relative to that of the matrix (You et al. 2017,
    https://arxiv.org/abs/1708.03888). Biases and batch-norm parameters take plain SGD steps without weight decay. As in the
    official SimCLR code, the learning rate multiplies the gradient before it enters the momentum buffer."""

    def __init__(self, params, lr, weight_decay, momentum=0.9, trust=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                update, ratio = w.grad, 1.0
                if w.ndim > 1:
                    update = update + group["weight_decay"] * w
                    w_norm, u_norm = w.norm(), update.norm()
                    ratio = torch.where((w_norm > 0) & (u_norm > 0), group["trust"] * w_norm / u_norm, 1.0)
                buffer = self.state[w].setdefault("momentum", torch.zeros_like(w))
                buffer.mul_(group["momentum"]).add_(update * (group["lr"] * ratio))
                w.sub_(buffer)


def learning_rate(step, args, steps):
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
    model = SimCLR(args.arch, args.size, args.dim)
    optimizer = LARS([w for w in model.parameters() if w.requires_grad], lr=0.0, weight_decay=args.weight_decay)
    run = Run("simclr", args, data, loader, model, {"optimizer": optimizer}, collapse=math.log(2 * args.batch - 1))
    print0(f"loss: {path(device, args.dim)}")
    network = distribute(model, device, args.compile)

    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z = network(torch.cat([x1, x2]))  # (2n, d); one pass, so both views share the batch statistics
            z = F.normalize(z.float(), dim=1)
            if device.type == "cuda":
                z = z.half()  # for the tensor cores; a unit vector keeps 11 bits in float16, 8 in bfloat16
            z1, z2 = z.chunk(2)  # (n, d) each
            # The mean over this process's 2n anchors, against the candidates of all; DistributedDataParallel averages the
            # gradients of the processes: exactly the gradient of one process with all N images.
            loss = simclr_loss(z1, z2, args.tau)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
