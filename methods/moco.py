"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning, versions 1 and 2.
v1: He, Fan, Wu, Xie, Girshick, CVPR 2020. https://arxiv.org/abs/1911.05722
v2: Chen, Fan, Girshick, He, 2020, Improved Baselines with Momentum Contrastive Learning. https://arxiv.org/abs/2003.04297
Official code: https://github.com/facebookresearch/moco (emptied in 2026; complete at commit 132aea9)

Idea. A query must pick out the key of its own image, encoded from another view, among the keys of many other images. Those
come from a queue of the last K keys, so that a small batch still meets many negatives. Keys stay comparable while the query
encoder learns because they are made by a slowly moving average of it, the key encoder, which gets no gradient.

Notation. N images of the global batch, n = N / processes of them on this one; x1, x2 (n, 3, H, W) two views of each;
f = projector(backbone(.)); q = f_q(x1), k = f_k(x2), both (n, d) and L2-normalised; queue (K, d); tau temperature; m momentum.
The loss is the mean over images of Eq. 1; the parameters of f_k follow those of f_q by Eq. 2, and get no gradient:

    L = -log  exp(q.k / tau) / [exp(q.k / tau) + sum over the K keys k_j of the queue of exp(q.k_j / tau)]               (1)
    theta_k <- m theta_k + (1 - m) theta_q                                                                               (2)

Shuffling batch-norm (section 3.3). Were a query and its key normalised by the statistics of the same images, and the queue's
keys by those of others, the statistics alone would tell which key belongs to the query: the loss would fall and nothing be
learned. The paper normalises each GPU's images by themselves, and shuffles the images among the GPUs for the keys only, so
that a query and its key are normalised among different images. Here a layer has the same effect on any number of processes,
one included: the global batch is split into groups of --group images, each normalised by its own statistics, and a random
permutation decides the groups of the keys. Rather than images, group numbers are shuffled; the statistics are summed over
processes. With eight processes and --group a process's share, this is the paper's computation.

Run.
    python methods/moco.py                                                two CPU cores, 2 minutes: emoji, 32 pixels
    python methods/moco.py --data cifar10 --arch resnet18 --batch 512 --epochs 200 --lr 0.03 --weight-decay 5e-4 \
        --tau 0.1 --queue 4096 --group 64 --no-head-norm                  one GPU, in size as the official CIFAR-10 demo
    torchrun --nproc_per_node 8 methods/moco.py --data IMAGENET --size 224 --arch resnet50 --batch 256 --epochs 200 \
        --lr 0.03 --m 0.999 --queue 65536 --no-head-norm --blur 0.5       eight GPUs, the recipe of v2; v1: add --recipe v1
--batch counts the images of all processes together. Results: the table in README.md.

Differs from the paper.
    1. Shuffling batch-norm splits the global batch into groups instead of GPUs, see above. The running statistics are the mean
       over the groups; the official code keeps those of the first GPU.
    2. v2's cosine falls every step; the official code changes the learning rate once an epoch.
    3. Crops are resized by bicubic interpolation, in the official code by bilinear; the blur kernel is a tenth of the side.
    4. The head ends in a batch-norm without scale and offset, as MoCo v3's does. Without it, in the few hundred steps that
       five thousand images allow, all queries of a step move away from the older keys of the queue together, in one direction,
       and nothing is learned: on emoji the loss falls a little, then rises to log(1 + K). --no-head-norm is the paper's head;
       the commands for larger data use it.
    5. Defaults are scaled to 32-pixel images and minutes of training; --help gives the paper's values.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common.py is found from any working directory
from common import (Crop, Loader, Run, all_reduce_sum, backbone, color_jitter, distribute, fail, gather, gaussian_blur,
                    load_data, normalize, print0, random_flip, random_grayscale, start)
from kernels import path
from kernels.infonce import moco_loss  # info_nce below, without ever storing the (n, 1 + K) logits


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="emoji", help="emoji, fashion, fashion-mnist, cifar10, cifar100, stl10 or a folder")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=32, help="side of a view, pixels (paper: 224)")
    p.add_argument("--arch", default="resnet14", help="resnet14, resnet18, resnet34 or resnet50 (paper: resnet50)")
    p.add_argument("--recipe", default="v2", choices=["v1", "v2"], help="decides head, views, schedule and temperature")
    p.add_argument("--batch", type=int, default=256, help="images a step, over all processes (paper: 256)")
    p.add_argument("--epochs", type=int, default=36, help="passes over the training images (paper: 200; v2 also 800)")
    p.add_argument("--lr", type=float, default=0.12, help="learning rate per 256 images (paper: 0.03)")
    p.add_argument("--weight-decay", type=float, default=1e-4, help="on all parameters (paper: 1e-4; CIFAR-10 demo: 5e-4)")
    p.add_argument("--tau", type=float, default=None, help="temperature (paper, and if not given: 0.07 in v1, 0.2 in v2)")
    p.add_argument("--m", type=float, default=0.99, help="momentum of the key encoder (paper: 0.999; CIFAR-10 demo: 0.99)")
    p.add_argument("--queue", type=int, default=2048, help="keys in the queue, K (paper: 65536; CIFAR-10 demo: 4096)")
    p.add_argument("--group", type=int, default=32, help="images that share batch statistics (paper: 32, a GPU's share)")
    p.add_argument("--head-norm", action=argparse.BooleanOptionalAction, default=True,
                   help="batch-norm without scale and offset at the end of the head (paper: none)")
    p.add_argument("--blur", type=float, default=0.0, help="probability of Gaussian blur in v2 (paper: 0.5; CIFAR-10 demo: 0)")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and the views")
    p.add_argument("--eval-every", type=int, default=5, help="epochs between kNN evaluations")
    p.add_argument("--out", default=None, help="run folder (default: runs/moco-DATA-SEED); a run found there is continued")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = p.parse_args()
    if args.tau is None:
        args.tau = 0.07 if args.recipe == "v1" else 0.2
    if args.queue < args.batch:
        fail(f"--queue {args.queue}: choose at least the {args.batch} keys that a step adds (--batch)")
    if args.tau < 0.006:
        fail(f"--tau {args.tau}: choose at least 0.006, below which the loss's powers overflow")
    if args.group < 2:
        fail(f"--group {args.group}: batch statistics need 2 images at least")
    return args


def views(args):
    """The same recipe for both views, independent draws. v1: that of Wu et al. 2018; v2 adds blur, milder hue."""
    def augment_v1(x, rand):
        x = random_grayscale(x, rand, p=0.2)
        x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4)
        return normalize(random_flip(x, rand))

    def augment_v2(x, rand):
        x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
        x = random_grayscale(x, rand, p=0.2)
        x = gaussian_blur(x, rand, p=args.blur, sigma=(0.1, 2.0))
        return normalize(random_flip(x, rand))

    view = Crop(args.size, scale=(0.2, 1.0)), augment_v1 if args.recipe == "v1" else augment_v2
    return [view, view]


class SplitBatchNorm(_NormBase):
    """Batch-norm of (n, C, H, W) in which each group of images of the global batch is normalised by its own statistics.
    `member` (n, G), set before the call: 1 where the image belongs to the group, else 0. A group may be spread over
    processes. In eval mode, and in its parameters and buffers, like nn.BatchNorm2d; but no subclass of that, which
    distribute() would turn into batch-norm over all images."""

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        with torch.autocast(x.device.type, enabled=False):  # which would do the matrix products in bfloat16
            dtype, x, member = x.dtype, x.to(self.member.dtype), self.member  # float32
            images = all_reduce_sum(member.sum(0))[:, None]  # (G, 1)
            mean = all_reduce_sum(member.T @ x.mean((2, 3))) / images  # (G, C)
            x = x - (member @ mean)[:, :, None, None]
            variance = all_reduce_sum(member.T @ x.square().mean((2, 3))) / images  # (G, C)
            with torch.no_grad():
                count = images * x.shape[2] * x.shape[3]
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.mean(0), self.momentum)
                self.running_var.lerp_((variance * count / (count - 1)).mean(0), self.momentum)
            scale = member @ torch.rsqrt(variance + self.eps) * self.weight  # (n, C)
            return torch.addcmul(self.bias[:, None, None], x, scale[:, :, None, None]).to(dtype)


def group_members(order, size):
    """order (N,): a permutation, the place of each image of the global batch. Returns float (N, G): 1 where the image is in the
    group, else 0. The first `size` places are the first group, and so on; if size does not divide N, groups get larger."""
    groups = max(1, len(order) // size)
    return F.one_hot(order * groups // len(order), groups).float()


class MoCo(nn.Module):
    def __init__(self, arch, size, dim, K, recipe, head_norm=True):
        super().__init__()
        self.backbone = backbone(arch, size)
        for layer in self.backbone.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__ = SplitBatchNorm  # the same parameters and buffers, another forward
        width = self.backbone.out_dim
        self.projector = nn.Linear(width, dim)
        if recipe == "v2":
            self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), self.projector)
        if head_norm:  # difference 4; over the same groups, without scale and offset
            norm = SplitBatchNorm(dim).requires_grad_(False)
            self.projector = nn.Sequential(self.projector, nn.Unflatten(1, (dim, 1, 1)), norm, nn.Flatten())
        self.key_encoder = copy.deepcopy(nn.Sequential(self.backbone, self.projector)).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(K, dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # the row of the queue that is replaced next

    def forward(self, x1, x2, member_q, member_k):
        for encoder, member in (((self.backbone, self.projector), member_q), (self.key_encoder, member_k)):
            for layer in (layer for part in encoder for layer in part.modules()):
                if isinstance(layer, SplitBatchNorm):
                    layer.member = member
        h = self.backbone(x1)  # (n, D)
        with torch.no_grad():
            k = self.key_encoder(x2)
        return self.projector(h), k  # (n, d) both


def info_nce(q, k, queue, tau):
    """Eq. 1, averaged over the n queries. Returns a scalar, in nats. k and queue get no gradient.

    q, k: (n, d), queue: (K, d), rows L2-normalised. Row i of k is the positive of row i of q; all share the negatives."""
    positive = (q * k.detach()).sum(1, keepdim=True)  # (n, 1)
    logits = torch.cat([positive, q @ queue.detach().T], 1) / tau  # (n, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))  # the positive is column 0


@torch.no_grad()
def ema_update(target, online, m):
    """target parameters <- m target + (1 - m) online. Buffers (batch statistics) stay each network's own."""
    for t, o in zip(target.parameters(), online.parameters(), strict=True):
        t.lerp_(o, 1 - m)


@torch.no_grad()
def enqueue(queue, oldest, keys):
    """Replaces the N oldest rows of the queue (l, ...) by keys (N, ...), those of all processes, so that the queue is the same
    on each. It is a ring: `oldest` is where the next ones go, and any N up to l will do."""
    rows = (oldest + torch.arange(len(keys), device=queue.device)) % len(queue)
    queue[rows] = keys
    oldest.copy_((oldest + len(keys)) % len(queue))


def learning_rate(step, args, steps):
    """Base rate x batch / 256, without warm-up. v1: a tenth after 60 % of the steps and a hundredth after 80 % (the paper's
    epochs 120 and 160 of 200); v2: cosine to 0. step counts from 0, `steps` are those of an epoch."""
    peak, total = args.lr * args.batch / 256, args.epochs * steps
    if args.recipe == "v1":
        return peak * 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))
    return peak * 0.5 * (1 + math.cos(math.pi * step / total))


def main():
    args = get_args()
    device = start(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = MoCo(args.arch, args.size, 128, args.queue, args.recipe, args.head_norm)
    encoder = nn.Sequential(model.backbone, model.projector)  # of queries
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run = Run("moco", args, data, loader, model, {"optimizer": optimizer}, collapse=math.log(1 + args.queue))
    print0(f"loss: {path(device)}")
    if args.batch < 2 * args.group:
        print0(f"warning: --batch {args.batch} is one group of --group {args.group}: shuffling has no effect")
    network = distribute(model, device, args.compile)
    in_order = torch.arange(args.batch)

    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            ema_update(model.key_encoder, encoder, args.m)
            shuffled = torch.from_numpy(np.random.default_rng([args.seed, epoch, step, 0, 4]).permutation(args.batch))
            members = [group_members(order, args.group)[loader.rows].to(device) for order in (in_order, shuffled)]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                q, k = network(x1, x2, *members)  # (n, d) both
            q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
            # The mean over this process's queries; DistributedDataParallel averages the gradients of the processes.
            loss = moco_loss(*(x.half() if device.type == "cuda" else x for x in (q, k, model.queue)), args.tau)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            enqueue(model.queue, model.oldest, gather(k))  # after the loss: a query must not meet its own key twice
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
