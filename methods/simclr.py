"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations.
Chen, Kornblith, Norouzi, Hinton, ICML 2020. https://arxiv.org/abs/2002.05709
Official code (TensorFlow): https://github.com/google-research/simclr

Idea. Two random views of the same image (crops with changed colours) should have similar
embeddings, and views of different images dissimilar ones. Each view must pick out its partner among
all other 2N - 1 views of the batch, so the other images are the negatives. Strong cropping and
colour distortion destroy the easy cues, so that what the two views still share is mostly their
content.

Notation. N images in the global batch, n = N / processes on this process; x1, x2 (n, 3, H, W) two
views of each; h = f(x) (n, D) representation, kept for later use; z = g(h) (n, d) projection,
thrown away after training; tau temperature. For the 2N normalised projections, s_ij = z_i . z_j,
and i, j two views of one image (Eq. 1):

    l(i, j) = -log  exp(s_ij / tau) / sum over k != i of exp(s_ik / tau)
    L       = mean of l over all 2N ordered pairs

Run.
    python methods/simclr.py                                  two CPU cores, 2 to 5 minutes
    python methods/simclr.py --recipe cifar10                 one GPU
    torchrun --nproc_per_node 8 methods/simclr.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.

Reached. On emoji after 30 epochs, 92 s on two CPU cores: kNN 59.0 % (untrained 50.8, raw pixels
53.9); linear 60.4 % (untrained 53.3, raw pixels 54.1); mean of 6 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. Inputs are normalised by ImageNet's mean and standard deviation | official code: in [0, 1].
    2. The loss is the paper's mean over 2N | official code: the sum of the two directions, twice
       ours. LARS rescales the gradient, so the factor matters only for weight decay, biases and
       batch-norm.
    3. Colour operations are torchvision's: contrast about the mean grey level, saturation by
       blending with grey | official code: TensorFlow's; in its first version, brightness is added.
    4. The blur reflects the borders | official code: pads with zeros.
    5. A crop that does not fit is drawn again, up to ten times, as in torchvision | official code:
       up to 100 times, and it covers at least a tenth of the image; resized without antialiasing.
    6. The last batch-norm of a residual branch starts at scale 1, as in all methods here; the
       projector starts as PyTorch's layers do | official code: 0; a standard deviation of 0.01.
    7. Weight decay in the paper: 1e-6 | official code's default: 1e-4. CIFAR-10's rate, 1 per 256
       images, is the official README's.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import ARCHS, Loader, Run, backbone, join_processes, load_data, parse, print0
from kernels import implementation
from kernels.collectives import distribute
from kernels.infonce import simclr_loss  # nt_xent below, fused
from kernels.views import (Crop, color_jitter, gaussian_blur, normalize, random_flip,
                           random_grayscale)

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def nt_xent(z1, z2, tau):
    """NT-Xent, Eq. 1, averaged over all 2N views that are given; each is once the anchor, the one
    that must find its partner. Returns a scalar, in nats.

    z1, z2: (N, d) L2-normalised; row k of both comes from image k."""
    z = torch.cat([z1, z2])  # (2N, d)
    logits = z @ z.T / tau  # (2N, 2N): s_ij / tau
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = logits.masked_fill(itself, -torch.inf)  # the sum is over k != i
    positive = torch.arange(len(z), device=z.device).roll(len(z1))  # N, N + 1, ..., 0, 1, ...
    return F.cross_entropy(logits, positive)


# The network.


class SimCLR(nn.Module):
    def __init__(self, arch, size, dim):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        # section 2.1: one hidden layer; batch-norm after both layers, as in the official code
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, dim, bias=False),
            nn.BatchNorm1d(dim),
        )
        self.projector[-1].bias.requires_grad_(False)  # official: a scale, but no offset

    def forward(self, x):
        h = self.backbone(x)  # (n, D)
        return self.projector(h)  # (n, d)


# The views.


def views(args):
    """Appendix A: random crop, flip, colour jitter, grey, blur. Both views follow the same recipe,
    with independent draws."""

    def augment(x, rand):
        s = args.strength
        x = random_flip(x, rand)
        x = color_jitter(x, rand, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
        x = random_grayscale(x, rand, p=0.2)
        x = gaussian_blur(x, rand, p=args.blur, sigma=(0.1, 2.0))
        return normalize(x)

    crop = Crop(args.size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    return [(crop, augment), (crop, augment)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a view, pixels"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (256, 512, 4096, "images per step, over all processes"),
    "epochs": (30, 200, 100, "passes over the training images; paper: 100 to 1000"),
    "warmup": (2.0, 10.0, 10.0, "epochs of linear learning-rate warm-up"),
    # 4.0, 13 times the paper's: with only a few hundred steps, LARS needs large ones
    "lr": (4.0, 1.0, 0.3, "learning rate per 256 images"),
    "weight_decay": (1e-4, 1e-4, 1e-6, "on weights, not on biases or batch-norm"),
    "tau": (0.1, 0.5, 0.1, "temperature; below 0.006 the loss overflows", "[0.006, inf)"),
    "dim": (128, 128, 128, "dimensions of the projection z", "[1, inf)"),
    "strength": (0.5, 0.5, 1.0, "strength s of the colour jitter, appendix A", "[0, 1.25]"),
    "blur": (0.0, 0.0, 0.5, "probability of Gaussian blur", "[0, 1]"),
}


class LARS(torch.optim.Optimizer):
    """SGD with momentum in which the step of each weight matrix is scaled to a fixed fraction of
    the matrix's norm (You et al. 2017, https://arxiv.org/abs/1708.03888). Biases and batch-norm
    parameters take plain SGD steps without weight decay. As in the official SimCLR code, the
    learning rate multiplies the gradient before it enters the momentum buffer."""

    def __init__(self, params, lr, weight_decay, momentum=0.9, trust=0.001):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                update = w.grad
                ratio = 1.0
                if w.ndim > 1:
                    update = update + group["weight_decay"] * w
                    w_norm = w.norm()
                    u_norm = update.norm()
                    usable = (w_norm > 0) & (u_norm > 0)
                    ratio = torch.where(usable, group["trust"] * w_norm / u_norm, 1.0)
                buffer = self.state[w].setdefault("momentum", torch.zeros_like(w))
                buffer.mul_(group["momentum"]).add_(update * (group["lr"] * ratio))
                w.sub_(buffer)


def learning_rate(step, args, steps_per_epoch):
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
    args = parse(__doc__, SETTINGS, argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = SimCLR(args.arch, args.size, args.dim).to(device)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = LARS(weights, lr=0.0, weight_decay=args.weight_decay)
    # If all projections are the same, each partner is one of 2N - 1 equal candidates.
    collapsed = math.log(2 * args.batch - 1)
    state = {"optimizer": optimizer}
    run = Run("simclr", args, data, loader, model, state, ("collapsed", collapsed))
    print0(f"the loss is computed by: {implementation(device, args.dim)}")
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # One pass for both views, so that they share the batch statistics.
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z = wrapped(torch.cat([x1, x2]))  # (2n, d)
            z = F.normalize(z.float(), dim=1)
            z1, z2 = z.chunk(2)  # (n, d) each

            # nt_xent, fused: it never stores the (2N, 2N) logits. It is the mean over the 2n
            # anchors of this process, against the candidates of all; DistributedDataParallel
            # averages the gradients: exactly the gradient of one process with all N images.
            loss = simclr_loss(z1, z2, args.tau)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
