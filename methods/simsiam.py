"""SimSiam: Exploring Simple Siamese Representation Learning.
Chen, He, CVPR 2021. https://arxiv.org/abs/2011.10566
Official code: https://github.com/facebookresearch/simsiam

Idea. One network sees two views of an image. A small predictor on the one side tries to give what the network gives on the
other, whose output is held constant: no gradient flows into it. There are neither negatives nor a second, slowly moving
network. Equal outputs for all images would be the best solution, and stopping the gradient is what keeps training from it.

Notation. N images of the global batch, n = N / processes of them on this one; x1, x2 (n, 3, H, W) two views of each; backbone
h (n, .) representation, projector z (n, d), the paper's f is both of them; p = predictor(z) (n, d), the paper's h. Negative
cosine (Eq. 1) and loss (Eq. 4), averaged over images:

    D(p, z) = - p / |p| . z / |z|        L = 1/2 D(p1, stopgrad(z2)) + 1/2 D(p2, stopgrad(z1))

Run.
    python methods/simsiam.py                                             two CPU cores, 7 minutes: emoji, 32 pixels
    python methods/simsiam.py --data cifar10 --arch resnet18 --dim 2048 --batch 512 --epochs 800 --lr 0.03 \
        --weight-decay 5e-4                                                                                         one GPU
    torchrun --nproc_per_node 8 methods/simsiam.py --data IMAGENET --size 224 --arch resnet50 --dim 2048 --batch 512 \
        --epochs 100 --lr 0.05 --weight-decay 1e-4 --blur 0.5 --workers 12              eight GPUs, the paper's recipe
--batch counts the images of all processes together. Results: the table in README.md.

Has it collapsed? The loss cannot tell: it goes to its least value, -1, in a good network as in a collapsed one. After every
epoch the standard deviation of z / |z| over images is printed (section 4.1, Fig. 2): 1 / sqrt(d) if the outputs are spread
evenly, 0 if they are all the same. On emoji it does not collapse (README's RankMe). There the rate decides: with a quarter of
it, 0.1, and five times the weight decay, linear accuracy after 64 epochs is 1.0 above the untrained network's (two seeds), and
after 128 epochs 1.7 (one seed; rows in README.md). The default's 6,240 steps are few beside the 250,000 of the paper's shortest
training, 100 epochs of ImageNet.

Differs from the paper.
    1. The residual branches do not start at zero, so that all methods start from the same network.
    2. The learning rate changes every step; in the official code once an epoch.
    3. Crops are resized by bicubic interpolation, in the official code by bilinear; the blur kernel is a tenth of the side.
    4. The projector has three layers on all data; the paper's for CIFAR-10 has two.
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
from common import (Crop, Loader, Run, backbone, color_jitter, distribute, gather, gaussian_blur, load_data, normalize,
                    random_flip, random_grayscale, rank, start)


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="emoji", help="emoji, fashion, fashion-mnist, cifar10, cifar100, stl10 or a folder")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=32, help="side of a view, pixels (paper: 224)")
    p.add_argument("--arch", default="resnet14", help="resnet14, resnet18, resnet34 or resnet50 (paper: resnet50)")
    p.add_argument("--batch", type=int, default=64, help="images a step, over all processes (paper: 512)")
    p.add_argument("--epochs", type=int, default=80, help="passes over the training images (paper: 100 to 800)")
    p.add_argument("--warmup", type=float, default=0, help="epochs of linear learning-rate warm-up (paper: 0)")
    p.add_argument("--lr", type=float, default=0.4, help="learning rate per 256 images (paper: 0.05; CIFAR-10: 0.03)")
    p.add_argument("--weight-decay", type=float, default=1e-4, help="on all parameters (paper: 1e-4; CIFAR-10: 5e-4)")
    p.add_argument("--dim", type=int, default=512, help="dimensions of z and p; the predictor has a quarter (paper: 2048)")
    p.add_argument("--blur", type=float, default=0.0, help="probability of Gaussian blur (paper: 0.5; CIFAR-10: 0)")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and the views")
    p.add_argument("--eval-every", type=int, default=16, help="epochs between kNN evaluations")
    p.add_argument("--out", default=None, help="run folder (default: runs/simsiam-DATA-SEED); a run found there is continued")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    return p.parse_args()


def views(args):
    """The recipe of MoCo v2 for both views, independent draws."""
    def augment(x, rand):
        x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
        x = random_grayscale(x, rand, p=0.2)
        x = gaussian_blur(x, rand, p=args.blur, sigma=(0.1, 2.0))
        return normalize(random_flip(x, rand))

    crop = Crop(args.size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    return [(crop, augment), (crop, augment)]


class SimSiam(nn.Module):
    def __init__(self, arch, size, dim):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        self.projector = nn.Sequential(  # section 3: batch-norm at the output too; without scale and offset, as official
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim, affine=False))
        self.predictor = nn.Sequential(  # a bottleneck; batch-norm at its output would make training unstable (Table 3)
            nn.Linear(dim, dim // 4, bias=False), nn.BatchNorm1d(dim // 4), nn.ReLU(),
            nn.Linear(dim // 4, dim))

    def forward(self, x1, x2):
        # One view after the other, so that all batch statistics are of one view, as in the official code.
        z1, z2 = (self.projector(self.backbone(x)) for x in (x1, x2))  # (n, d) both
        return self.predictor(z1), self.predictor(z2), z1, z2  # (n, d) each


def negative_cosine(p, z):
    """Eq. 1 with stopgrad(z), Eq. 3, averaged over the n images: from -1 to 1. Returns a scalar.

    p: (n, d) predictions, z: (n, d) what they should be, up to scale; z gets no gradient."""
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


def spread(z):
    """Section 4.1: standard deviation of z / |z| over the N images, mean over dimensions. z: (N, d). Returns a scalar: about
    1 / sqrt(d) if the directions are spread evenly, 0 if they are all the same."""
    return F.normalize(z, dim=1).std(0, correction=0).mean()


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
    model = SimSiam(args.arch, args.size, args.dim)
    encoder = nn.Sequential(model.backbone, model.projector)
    optimizer = torch.optim.SGD([{"params": encoder.parameters()}, {"params": model.predictor.parameters()}],
                                lr=args.lr * args.batch / 256, momentum=0.9, weight_decay=args.weight_decay)
    run = Run("simsiam", args, data, loader, model, {"optimizer": optimizer}, collapse=-1.0)
    network = distribute(model, device, args.compile)

    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            # The predictor's rate, group 1, stays at its peak, so that it keeps up with the newest z (section 4.2).
            optimizer.param_groups[0]["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                p1, p2, z1, z2 = network(x1, x2)  # (n, d) each
            p1, p2, z1, z2 = p1.float(), p2.float(), z1.float(), z2.float()
            # The mean over this process's images; DistributedDataParallel averages the gradients of the processes.
            loss = (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
        z = gather(z1.detach())  # (N, d)
        if rank() == 0:
            run.bar.write(f"standard deviation of z / |z|: {spread(z):.4f}; spread evenly {args.dim ** -0.5:.4f}, collapsed 0")
    run.finish()


if __name__ == "__main__":
    main()
