"""BYOL: Bootstrap Your Own Latent, A New Approach to Self-Supervised Learning.
Grill, Strub, Altche, Tallec, Richemond, Buchatskaya, Doersch, Avila Pires, Guo, Gheshlaghi Azar, Piot, Kavukcuoglu, Munos,
Valko, NeurIPS 2020. https://arxiv.org/abs/2006.07733
Official code (JAX): https://github.com/google-deepmind/deepmind-research/tree/master/byol

Idea. From one view of an image, an online network predicts what a target network makes of another view. The target is a
slowly moving average of the online network and gets no gradient; as the online network improves, so does what it predicts.
There are no negatives: were all outputs the same, the loss would be 0, but in practice the predictor and the moving target
prevent that.

Notation. N images of the global batch, n = N / processes of them on this one; x1, x2 (n, 3, H, W) two views of each. Online
network theta: h = f(x) (n, D) representation (y in the paper), g(h) its projection, p = q(g(h)) (n, d) prediction. Target
network xi, which has no predictor: z = g_xi(f_xi(x)) (n, d), the paper's z'. Target update (Eq. 1), loss of a pair (Eq. 2) and
of both, averaged over images:

    xi <- tau xi + (1 - tau) theta                               tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2 at step k of K
    l(p, z) = || p / |p| - z / |z| ||^2 = 2 - 2 cos(p, z)        L = l(p1, z2) + l(p2, z1)

Run.
    python methods/byol.py                                                two CPU cores, 5 to 11 minutes: emoji, 32 pixels
    python methods/byol.py --data cifar10 --arch resnet18 --head 4096 256 0 --batch 512 --epochs 200 --lr 0.03   one GPU
    torchrun --nproc_per_node 8 methods/byol.py --data IMAGENET --size 224 --arch resnet50 --head 4096 256 0 --min-crop 0.08 \
        --batch 4096 --epochs 1000 --warmup 10 --optimizer lars --lr 0.2 --weight-decay 1.5e-6 --tau-base 0.996 --blur 1 0.1 \
        --workers 12
    python methods/byol.py --target random                                the paper's experiment of a fixed random target
The third is the paper's recipe for eight GPUs. --batch counts the images of all processes together. Results: the table in
README.md.

Notes. The experiment that led the authors to BYOL (section 3; tau = 1 in Table 5a): a target that keeps its random initial
weights for ever. Predicting it gave 18.8 % on ImageNet, where such a random network itself gives 1.4 %. `--target random`
repeats it: in the table printed at the end, "random init" is a network like that target, "byol" what predicting one taught.
On emoji, seed 0, it teaches next to nothing: linear accuracy 50.8 (untrained 55.2), kNN 52.4 (51.8), R@1 55.2 (61.7); the
moving average has 56.9, 52.8 and 64.1 with this seed, and 57.7, 53.4 and 64.3 as the mean of three.

Batch-norm of the target: train mode, by the statistics of its own batch; the moving average covers weights, biases, and
batch-norm's scales and offsets, but not its running statistics. So it is in the official code. Were the projectors to end in a
batch-norm without scale and offset, as SimSiam's does (--head 1024 256 1), targets would vary over a batch by force. The moving
average is as good with it as without; but predicting a random target then does teach something (rows in README.md).

Differs from the paper.
    1. Colour operations are torchvision's: brightness is multiplied, the official code adds; contrast turns around the mean
       grey level, there around each channel's own mean; saturation blends with the grey image, there it scales that of HSV.
       Blur reflects the borders, there they are padded with zeros. A crop that does not fit is drawn anew, there it is cut.
    2. Weights start as PyTorch's do, in the official code from a truncated normal. Residual branches do not start at zero; so
       it was for the paper's results, says the README of the official code, whose branches do start at zero.
    3. The official code also trains a linear classifier on the labels, without gradient to the network, to watch progress.
    4. No blur by default: at 32 pixels its kernel, a tenth of the side, has but 3 taps, and detail is scarce. Solarization
       treats each pixel by itself, at any size, and is the paper's.
    5. SGD with momentum, and weight decay on all parameters, unless --optimizer lars is given. The warm-up's first step has a
       rate above 0, in the official code 0.
    6. Defaults are scaled to 32-pixel images and minutes of training; --help gives the paper's values.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common.py is found from any working directory
from common import (Crop, Loader, Run, backbone, color_jitter, distribute, fail, gaussian_blur, load_data, normalize,
                    random_flip, random_grayscale, solarize, start)


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="emoji", help="emoji, fashion, fashion-mnist, cifar10, cifar100, stl10 or a folder")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=32, help="side of a view, pixels (paper: 224)")
    p.add_argument("--arch", default="resnet14", help="resnet14, resnet18, resnet34 or resnet50 (paper: resnet50)")
    p.add_argument("--batch", type=int, default=64, help="images a step, over all processes (paper: 4096)")
    p.add_argument("--epochs", type=int, default=52, help="passes over the training images (paper: 1000)")
    p.add_argument("--warmup", type=float, default=2, help="epochs of linear learning-rate warm-up (paper: 10)")
    p.add_argument("--optimizer", default="sgd", choices=["sgd", "lars"], help="lars: the paper's, with its --lr of 0.2")
    p.add_argument("--lr", type=float, default=0.1, help="learning rate per 256 images (paper, with LARS: 0.2)")
    p.add_argument("--weight-decay", type=float, default=5e-4, help="on all parameters; lars: weights (paper: 1.5e-6)")
    p.add_argument("--target", default="ema", choices=["ema", "random"], help="moving average, or fixed at its random start")
    p.add_argument("--tau-base", type=float, default=0.99, help="momentum of the target, at first (paper: 0.996 or 0.99)")
    p.add_argument("--head", type=int, nargs=3, default=[1024, 256, 0], metavar=("HIDDEN", "DIM", "NORM"),
                   help="hidden units, output; NORM 1: batch-norm at the projector's output, 0: none (paper: 4096 256 0)")
    p.add_argument("--min-crop", type=float, default=0.2, help="smallest crop, share of the area (paper: 0.08)")
    p.add_argument("--blur", type=float, nargs=2, default=[0.0, 0.0], help="probability of blur in each view (paper: 1 0.1)")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and the views")
    p.add_argument("--eval-every", type=int, default=13, help="epochs between kNN evaluations")
    p.add_argument("--out", default=None, help="run folder (default: runs/byol-DATA-SEED); a run found there is continued")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = p.parse_args()
    if args.head[2] not in (0, 1):
        fail(f"--head {' '.join(map(str, args.head))}: the third number is 1 (batch-norm at the end of the projector) or 0")
    return args


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

    crop = Crop(args.size, scale=(args.min_crop, 1.0), ratio=(3 / 4, 4 / 3))
    return [(crop, augmentation(args.blur[0], 0.0)), (crop, augmentation(args.blur[1], 0.2))]


def mlp(width, hidden, dim):
    """One hidden layer with batch-norm, none at the output: projector and predictor."""
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim, bias=False))


class BYOL(nn.Module):
    def __init__(self, arch, size, hidden, dim, norm):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim

        def projector():
            head = mlp(width, hidden, dim)
            return head.append(nn.BatchNorm1d(dim, affine=False)) if norm else head

        self.projector = projector()
        self.predictor = mlp(dim, hidden, dim)  # without it the paper's outputs collapse (Table 5b)
        # Not a copy: as in the official code the target starts from random weights of its own.
        self.target = nn.Sequential(backbone(arch, size), projector()).requires_grad_(False)

    def forward(self, x1, x2):
        # One view after the other, so that all batch statistics are of one view, as in the official code.
        p1, p2 = (self.predictor(self.projector(self.backbone(x))) for x in (x1, x2))  # (n, d) both
        with torch.no_grad():
            z1, z2 = (self.target(x) for x in (x1, x2))  # (n, d) both
        return p1, p2, z1, z2


def regression_loss(p, z):
    """Eq. 2, averaged over the n images: 2 - 2 cos(p, z), from 0 to 4; L adds two of them. Returns a scalar.

    p: (n, d) predictions, z: (n, d) what they should be, up to scale; z gets no gradient."""
    return 2 - 2 * F.cosine_similarity(p, z.detach(), dim=1).mean()


@torch.no_grad()
def ema_update(target, online, m):  # copy of: methods/moco.py::ema_update
    """target parameters <- m target + (1 - m) online. Buffers (batch statistics) stay each network's own."""
    for t, o in zip(target.parameters(), online.parameters(), strict=True):
        t.lerp_(o, 1 - m)


def target_decay(step, args, steps):
    """tau of Eq. 1: from tau_base at step 0 to 1 at the end. `steps` are those of an epoch."""
    return 1 - (1 - args.tau_base) * (math.cos(math.pi * step / (args.epochs * steps)) + 1) / 2


class LARS(torch.optim.Optimizer):  # copy of: methods/barlow_twins.py::LARS
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
    model = BYOL(args.arch, args.size, *args.head)
    online = nn.Sequential(model.backbone, model.projector)  # what the target is the average of
    weights = [w for w in model.parameters() if w.requires_grad]
    kind = {"sgd": torch.optim.SGD, "lars": LARS}[args.optimizer]
    optimizer = kind(weights, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run = Run("byol", args, data, loader, model, {"optimizer": optimizer})
    network = distribute(model, device, args.compile)

    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                p1, p2, z1, z2 = network(x1, x2)  # (n, d) each
            p1, p2, z1, z2 = p1.float(), p2.float(), z1.float(), z2.float()
            # The mean over this process's images; DistributedDataParallel averages the gradients of the processes.
            loss = regression_loss(p1, z2) + regression_loss(p2, z1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if args.target == "ema":
                ema_update(model.target, online, target_decay(step, args, loader.steps))
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
