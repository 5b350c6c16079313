"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction.
Zbontar, Jing, Misra, LeCun, Deny, ICML 2021. https://arxiv.org/abs/2103.03230
Official code: https://github.com/facebookresearch/barlowtwins

Idea. Take two random views of each image (crops with changed colours) and correlate every
dimension of the embeddings of one view with every dimension of those of the other, over the images
of a batch. Pulling the diagonal of this matrix towards 1 makes the embedding independent of the
view. Pulling the rest towards 0 makes its dimensions say different things. Together the two goals
keep the network from collapse, where all images get the same embedding. Nothing else is needed for
that: no negatives (views of other images to be told apart), no second network, no stopped gradient.

Notation. N images in the global batch, n = N / processes on this process; x1, x2 (n, 3, H, W) two
views of each (A and B in the paper); h = f(x) representation, kept for later use; z = g(h) (n, D)
projection, thrown away after training, each of its dimensions normalised to mean 0 and variance 1
over the N images, separately for each view. Cross-correlation matrix C (D, D) (Eq. 2) and loss
(Eq. 1):

    C_ij = 1/N sum over images b of z1_bi z2_bj
    L    = sum over i of (1 - C_ii)^2 + lambda sum over i and j != i of C_ij^2

Run.
    python methods/barlow_twins.py                            two CPU cores, 2 minutes
    python methods/barlow_twins.py --recipe cifar10           one GPU
    torchrun --nproc_per_node 8 methods/barlow_twins.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.

Reached. On emoji after 32 epochs, 131 s on two CPU cores: kNN 51.4 % (untrained 50.8, raw pixels
53.9); linear 56.3 % (untrained 53.3, raw pixels 54.1); mean of 6 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The gradient is exact on any number of processes | official code: 1/W of it on W GPUs,
       because its all_reduce does not propagate gradients. LARS hides the factor for weight
       matrices, but not for biases and batch-norm. Their official learning rate, 0.024 of that of
       the weights, belongs to 16 to 32 GPUs, so ours must be as many times smaller: --bias-lr.
    2. Residual branches do not start at zero, so that all methods start from the same network |
       official code: zero.
    3. The learning rate ends at 0 | paper: at a thousandth of its peak.
    4. The blur kernel is a tenth of the side, as in BYOL | official code: Pillow's blur.
    5. The correlation is computed in float32 | official code: in float16.
    6. The recipe "paper" follows the text of the paper | official code's defaults: lambda 0.0051,
       weight decay 1e-6.
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import ARCHS, Loader, Run, backbone, fail, join_processes, load_data, parse
from kernels.collectives import all_reduce_sum, distribute
from kernels.views import (Crop, color_jitter, gaussian_blur, normalize, random_flip,
                           random_grayscale, solarize)

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def barlow_twins(c, lambda_):
    """Eq. 1. Returns a scalar: 0 if c is the identity, D if all dimensions are constant (c = 0).

    c: (D, D) cross-correlation matrix of the global batch, Eq. 2."""
    diagonal = c.diagonal()
    invariance = (1 - diagonal).square().sum()
    redundancy = (c - torch.diag(diagonal)).square().sum()
    return invariance + lambda_ * redundancy


# The network.


class BarlowTwins(nn.Module):
    def __init__(self, arch, size, dim):
        super().__init__()
        self.backbone = backbone(arch, size)
        # section 2.2: three layers of equal width
        self.projector = nn.Sequential(
            nn.Linear(self.backbone.out_dim, dim, bias=False),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            nn.Linear(dim, dim, bias=False),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            nn.Linear(dim, dim, bias=False),
        )
        # the denominator of Eq. 2: mean and biased variance, over the global batch
        self.normalize = nn.BatchNorm1d(dim, affine=False)

    def forward(self, x1, x2):
        # One view after the other: all batch statistics are of a single view, as in the paper.
        z1 = self.projector(self.backbone(x1))  # (n, D)
        z2 = self.projector(self.backbone(x2))  # (n, D)
        return self.normalize(z1.float()), self.normalize(z2.float())


# The views.


def views(args):
    """BYOL's recipe. The two views differ in the probability of blur, and only the second is
    solarised."""

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
    return [(crop, augmentation(args.blur1, 0.0)), (crop, augmentation(args.blur2, 0.2))]


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a view, pixels"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (64, 256, 2048, "images per step, over all processes"),
    "epochs": (32, 200, 1000, "passes over the training images"),
    "warmup": (2.0, 2.0, 10.0, "epochs of linear learning-rate warm-up"),
    # 4.0, 20 times the paper's: in the 2,500 steps of emoji, LARS needs long ones
    "lr": (4.0, 2.0, 0.2, "learning rate per 256 images, of weights"),
    # the paper's 0.024 divided by 16 GPUs, see difference 1
    "bias_lr": (0.0015, 0.0015, 0.0015, "learning rate of biases and batch-norm, a share of --lr"),
    "weight_decay": (1e-6, 1e-6, 1.5e-6, "on weights, not on biases or batch-norm"),
    # By chance alone N images show correlations of about 1 / sqrt(N) in all D^2 pairs: small
    # batches need a small D. The fewer pairs there are, the more each counts: lambda grows.
    "dim": (128, 2048, 8192, "dimensions of z; width of the projector's layers", "[1, inf)"),
    "lambda_": (0.04, 0.0051, 0.005, "weight of the correlations off the diagonal"),
    "blur1": (0.0, 0.0, 1.0, "probability of Gaussian blur in the first view", "[0, 1]"),
    "blur2": (0.0, 0.0, 0.1, "probability of Gaussian blur in the second view", "[0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    # The blur's kernel has a tenth of the side in pixels: below 20 it would change nothing.
    if max(args.blur1, args.blur2) > 0 and args.size < 20:
        fail(f"--blur1 {args.blur1:g} --blur2 {args.blur2:g}: views of {args.size} pixels are too "
             "small to blur; choose 0 for both, or --size 20 or more")
    return args


class LARS(torch.optim.Optimizer):
    """SGD with momentum in which the step of each weight matrix is scaled to a fixed fraction of
    the matrix's norm (You et al. 2017, https://arxiv.org/abs/1708.03888). Biases and batch-norm
    parameters take plain SGD steps without weight decay. As in the official code of BYOL and Barlow
    Twins, the learning rate multiplies what comes out of the momentum buffer."""

    def __init__(self, params, lr, weight_decay, momentum=0.9, trust=0.001):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:  # frozen
                    continue
                update = w.grad
                if w.ndim > 1:
                    update = update + group["weight_decay"] * w
                    w_norm = w.norm()
                    u_norm = update.norm()
                    usable = (w_norm > 0) & (u_norm > 0)
                    update = update * torch.where(usable, group["trust"] * w_norm / u_norm, 1.0)
                buffer = self.state[w].setdefault("momentum", torch.zeros_like(w))
                buffer.mul_(group["momentum"]).add_(update)
                w.sub_(buffer * group["lr"])


def learning_rate(step, args, steps_per_epoch):  # copy of: methods/simclr.py::learning_rate
    """Base rate x batch / 256, linear warm-up, then cosine to 0. `step` counts from 0 over the
    whole run."""
    peak = args.lr * args.batch / 256
    warmup = args.warmup * steps_per_epoch
    total = args.epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / warmup
    angle = math.pi * (step - warmup) / (total - warmup)
    return peak * 0.5 * (1 + math.cos(angle))


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = BarlowTwins(args.arch, args.size, args.dim).to(device)
    weights = [w for w in model.parameters() if w.ndim > 1]
    biases = [w for w in model.parameters() if w.ndim == 1]  # and the scales of batch-norm
    groups = [{"params": weights}, {"params": biases}]
    optimizer = LARS(groups, lr=0.0, weight_decay=args.weight_decay)
    # If every dimension is constant, C is 0 and each entry of the diagonal costs 1.
    state = {"optimizer": optimizer}
    run = Run("barlow_twins", args, data, loader, model, state, ("collapsed", args.dim))
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.param_groups[1]["lr"] = lr * args.bias_lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z1, z2 = wrapped(x1, x2)  # (n, D) each, normalised over the global batch

            # Each process adds its images' share to the matrix, so all have the same loss.
            # all_reduce_sum passes gradients to every process, and DistributedDataParallel averages
            # them: exactly the gradient of one process with all N images.
            c = all_reduce_sum(z1.T @ z2) / args.batch  # (D, D)
            loss = barlow_twins(c, args.lambda_)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
