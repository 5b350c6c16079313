"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning, versions 1 and 2.
v1: He, Fan, Wu, Xie, Girshick, CVPR 2020. https://arxiv.org/abs/1911.05722
v2: Improved Baselines with Momentum Contrastive Learning. Chen, Fan, Girshick, He, 2020.
https://arxiv.org/abs/2003.04297
Official code: https://github.com/facebookresearch/moco (emptied in 2026; see commit 132aea9)

Idea. Two random views of an image (crops with changed colours) are encoded: one as a query, the
other as a key. The query must pick out its key among the keys of many other images, the negatives.
These wait in a queue of the last K keys, so a small batch still meets many of them. Old and new
keys stay comparable because the encoder that makes them, the key encoder, changes slowly: it is a
moving average of the query encoder and gets no gradient.

Notation. N images in the global batch, n = N / processes on this process; x1, x2 (n, 3, H, W) two
views of each; f = projector(backbone(.)), of which the backbone is kept for later use; q = f_q(x1)
and k = f_k(x2) (n, d), L2-normalised; queue (K, d) with rows k_j; tau temperature; m momentum.
The loss is the mean over queries of Eq. 1; in each step the parameters of f_k follow those of f_q
by Eq. 2:

    L = -log  exp(q . k / tau) / [exp(q . k / tau) + sum over j of exp(q . k_j / tau)]       (1)
    theta_k <- m theta_k + (1 - m) theta_q                                                   (2)

Shuffling batch-norm (section 3.3). If a query and its key were normalised with the same batch
statistics, while the keys in the queue come from other batches, the statistics alone would reveal
the right key. The loss would fall without anything being learned. The paper therefore normalises
the images of each GPU separately, and shuffles the images among the GPUs for the keys only. Ours
divides the global batch into groups of --group images, each normalised with its own statistics; a
random permutation decides the groups of the keys. The numbers do not depend on the processes. If
each of several processes holds whole groups, it is done as in the paper: images are shuffled, keys
are brought back, and batch-norm communicates nothing. Otherwise the images stay where they are, and
batch-norm sums its statistics over processes: with several, many small messages in each step.

Run.
    python methods/moco.py                                    two CPU cores, 2 minutes
    python methods/moco.py --recipe cifar10                   one GPU
    torchrun --nproc_per_node 8 methods/moco.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.

Reached. On emoji after 36 epochs, 104 s on two CPU cores: kNN 56.1 % (untrained 50.8, raw pixels
53.9); linear 57.9 % (untrained 53.3, raw pixels 54.1); mean of 6 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. Batch-norm works on groups, see above; the running statistics, which the evaluation uses, are
       the mean over groups | official code: those of the first GPU.
    2. The cosine schedule of v2 changes the learning rate at every step | official code: once per
       epoch.
    3. Crops: bicubic with antialiasing | official code: bilinear. Blur: a kernel of a tenth of the
       side | official code: PIL's approximation of a Gaussian.
    4. The head ends in a batch-norm without scale and offset, as in MoCo v3, because on emoji the
       paper's head learns nothing | paper, and our other columns: none (--no-head-norm).
    5. The column cifar10 has the sizes, schedule and crops of the official CIFAR-10 demo, and the
       head of v2 | official demo: a linear head.
"""

import copy
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import ARCHS, Loader, Run, backbone, fail, join_processes, load_data, parse, print0
from kernels import implementation
from kernels.collectives import all_reduce_sum, distribute, gather, world
from kernels.infonce import moco_loss  # info_nce below, fused
from kernels.views import (METHOD, Crop, color_jitter, denormalize, gaussian_blur, normalize,
                           random_flip, random_grayscale)

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def info_nce(q, k, queue, tau):
    """Eq. 1, averaged over the n queries of one process. Returns a scalar, in nats.

    q, k (n, d), queue (K, d): L2-normalised; row i of k is the positive of row i of q, and the
    queue holds the negatives of all. k and queue get no gradient."""
    positive = (q * k.detach()).sum(1, keepdim=True)  # (n, 1)
    negative = q @ queue.detach().T  # (n, K)
    logits = torch.cat([positive, negative], 1) / tau  # (n, 1 + K)
    first = torch.zeros(len(q), dtype=torch.long, device=q.device)  # the positive is column 0
    return F.cross_entropy(logits, first)


# The network.


class SplitBatchNorm(_NormBase):
    """Batch-norm of (n, C, H, W) in which each group of images of the global batch is normalised
    with its own statistics. A group may be spread over processes; set_groups says which image
    belongs to which. In eval mode, and in its parameters and buffers, like nn.BatchNorm2d; but not
    a subclass of that, which distribute() would turn into batch-norm over all images."""

    group_size = None  # or the size of the groups, if each process holds whole groups, in order

    def forward(self, x):
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        if self.group_size:
            return self.normalise_whole_groups(x)

        # Autocast would do the matrix products in bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            dtype = x.dtype
            member = self.member  # (n, G), float32
            images = self.images  # (G, 1)
            x = x.to(member.dtype)

            # Mean and variance of each group, of its images on all processes.
            mean = all_reduce_sum(member.T @ x.mean((2, 3))) / images  # (G, C)
            x = x - (member @ mean)[:, :, None, None]
            squares = x.square().mean((2, 3))  # (n, C)
            variance = all_reduce_sum(member.T @ squares) / images  # (G, C)
            with torch.no_grad():
                count = images * x.shape[2] * x.shape[3]
                unbiased = variance * count / (count - 1)
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.mean(0), self.momentum)
                self.running_var.lerp_(unbiased.mean(0), self.momentum)

            # Each image is scaled by the deviation of its group.
            scale = member @ torch.rsqrt(variance + self.eps)  # (n, C)
            scale = scale * self.weight
            bias = self.bias[:, None, None]
            x = torch.addcmul(bias, x, scale[:, :, None, None])
        return x.to(dtype)

    def normalise_whole_groups(self, x):
        """Ordinary batch-norm of one group after another, without communication. The running
        statistics are those of this process's groups until average_statistics is called."""
        groups = x.split(self.group_size)
        # Each group moves its own copy of the running statistics; the mean over groups is kept.
        means = self.running_mean.repeat(len(groups), 1)  # (groups of this process, C)
        variances = self.running_var.repeat(len(groups), 1)
        normalised = []
        for images, mean, var in zip(groups, means, variances):
            y = F.batch_norm(
                images, mean, var, self.weight, self.bias,
                training=True, momentum=self.momentum, eps=self.eps,
            )
            normalised.append(y)
        self.num_batches_tracked += 1
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return torch.cat(normalised)


@torch.no_grad()
def average_statistics(module):
    """After normalise_whole_groups: the running statistics of every SplitBatchNorm in the module
    become the means over the groups of all processes, by one message for all layers."""
    layers = [m for m in module.modules() if isinstance(m, SplitBatchNorm)]
    own = [m.running_mean for m in layers] + [m.running_var for m in layers]
    mean = all_reduce_sum(torch.cat(own)) / world()
    for buffer, value in zip(own, mean.split([len(buffer) for buffer in own])):
        buffer.copy_(value)


def shuffle(x, order, rows):
    """Shuffling batch-norm: the images x (n, ...) of each process -> those whose places are the
    rows of this process, in the order of their places. order (N,): the place of each image of the
    global batch. As in the official code, all images travel to all processes."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x)
    everyone = torch.cat(parts)  # (N, ...)
    return everyone[order.argsort()[rows].to(x.device)]


def group_members(order, size):
    """Which image is in which group: float (N, G), 1 where the image is in the group, else 0.

    order (N,): a permutation, the place of each image of the global batch. The first `size` places
    are the first group, and so on; if `size` does not divide N, groups are larger."""
    groups = max(1, len(order) // size)
    return F.one_hot(order * groups // len(order), groups).float()


def set_groups(module, member):
    """Tells every SplitBatchNorm in the module the groups of this process's images: (n, G)."""
    images = all_reduce_sum(member.sum(0))[:, None]  # (G, 1): the size of each group
    for layer in module.modules():
        if isinstance(layer, SplitBatchNorm):
            layer.member = member
            layer.images = images


class MoCo(nn.Module):
    def __init__(self, arch, size, dim, K, version, head_norm=True, group_size=None):
        super().__init__()
        self.backbone = backbone(arch, size)
        for layer in self.backbone.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__ = SplitBatchNorm  # the same parameters and buffers

        # v1: a linear head; v2: an MLP with one hidden layer.
        width = self.backbone.out_dim
        head = nn.Linear(width, dim)
        if version == "v2":
            head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), head)
        if head_norm:  # difference 4; over the same groups, without scale and offset
            to_maps = nn.Unflatten(1, (dim, 1, 1))
            norm = SplitBatchNorm(dim).requires_grad_(False)
            head = nn.Sequential(head, to_maps, norm, nn.Flatten())
        self.projector = head
        for layer in self.modules():
            if isinstance(layer, SplitBatchNorm):
                layer.group_size = group_size  # the copy in the key encoder has it, too

        encoder = nn.Sequential(self.backbone, self.projector)
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(K, dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # see enqueue

    def forward(self, x1, x2, member_q=None, member_k=None):
        if member_q is not None:  # not needed for whole groups
            set_groups(self.backbone, member_q)
            set_groups(self.projector, member_q)
            set_groups(self.key_encoder, member_k)
        h = self.backbone(x1)  # (n, D)
        with torch.no_grad():
            k = self.key_encoder(x2)  # (n, d)
        return self.projector(h), k


@torch.no_grad()
def ema_update(target, online, m):
    """target parameters <- m target + (1 - m) online. Buffers (batch statistics) are not averaged:
    each network keeps its own."""
    for t, o in zip(target.parameters(), online.parameters(), strict=True):
        t.lerp_(o, 1 - m)


@torch.no_grad()
def enqueue(queue, oldest, keys):
    """Replaces the N oldest rows of the queue (l, ...) by keys (N, ...), those of all processes, so
    that every process holds the same queue. It is a ring buffer: `oldest` is the next row to
    overwrite. N may be any number up to l."""
    count = torch.arange(len(keys), device=queue.device)
    queue[(oldest + count) % len(queue)] = keys
    oldest.copy_((oldest + len(keys)) % len(queue))


# The views.


def views(args):
    """Both views follow the same recipe, with independent draws. v1: that of Wu et al. 2018
    (https://arxiv.org/abs/1805.01978); v2 adds blur and changes the hue less."""

    def augment_v1(x, rand):
        x = random_grayscale(x, rand, p=0.2)
        x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4)
        x = random_flip(x, rand)
        return normalize(x)

    def augment_v2(x, rand):
        x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
        x = random_grayscale(x, rand, p=0.2)
        x = gaussian_blur(x, rand, p=args.blur, sigma=(0.1, 2.0))
        x = random_flip(x, rand)
        return normalize(x)

    augment = augment_v1 if args.version == "v1" else augment_v2
    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment), (crop, augment)]


def show(first_views):
    """The columns of views.png."""
    x1, x2 = first_views
    return {"query": denormalize(x1), "key": denormalize(x2)}


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper-v1", "paper", "which column gives the defaults"),
    "version": ("v2", "v2", "v1", "v2", "head, views and schedule of this version", ("v1", "v2")),
    "size": (32, 32, 224, 224, "side of a view, pixels"),
    "arch": ("resnet14", "resnet18", "resnet50", "resnet50", "the backbone", ARCHS),
    "batch": (256, 512, 256, 256, "images per step, over all processes"),
    "epochs": (36, 200, 200, 200, "passes over the training images; v2 also 800"),
    # 0.12, four times the paper's: emoji has only a few hundred steps
    "lr": (0.12, 0.03, 0.03, 0.03, "learning rate per 256 images"),
    "weight_decay": (1e-4, 5e-4, 1e-4, 1e-4, "on all parameters"),
    "tau": (0.2, 0.1, 0.07, 0.2, "temperature; below 0.006 the loss overflows", "[0.006, inf)"),
    "dim": (128, 128, 128, 128, "dimensions of a query and a key", "[1, inf)"),
    # 0.99: 0.999 is an average over a thousand steps, more than emoji has
    "m": (0.99, 0.99, 0.999, 0.999, "momentum of the key encoder", "[0, 1]"),
    "queue": (2048, 4096, 65536, 65536, "keys in the queue, K"),
    "group": (32, 64, 32, 32, "images that share batch statistics", "[2, inf)"),
    # difference 4
    "head_norm": (True, False, False, False, "batch-norm at the end of the head"),
    "min_crop": (0.2, 0.08, 0.2, 0.2, "smallest crop, share of the area", "(0, 1]"),
    "blur": (0.0, 0.0, 0.0, 0.5, "probability of Gaussian blur, only in v2", "[0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.queue < args.batch:
        fail(f"--queue {args.queue}: choose at least the {args.batch} keys of a step (--batch)")
    if args.version == "v1" and args.blur:
        fail(f"--blur {args.blur:g}: the views of --version v1 have no blur, choose 0")
    return args


def learning_rate(step, args, steps_per_epoch):
    """Base rate x batch / 256, without warm-up. v1: a tenth after 60 % of the steps and a hundredth
    after 80 %, the paper's epochs 120 and 160 of 200; v2: cosine to 0. `step` counts from 0 over
    the whole run."""
    peak = args.lr * args.batch / 256
    total = args.epochs * steps_per_epoch
    if args.version == "v1":
        drops = (step >= 0.6 * total) + (step >= 0.8 * total)
        return peak * 0.1**drops
    return peak * 0.5 * (1 + math.cos(math.pi * step / total))


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)

    # With several processes that hold whole groups, the images of the keys are shuffled.
    whole = world() > 1 and args.batch // world() % args.group == 0
    group_size = args.group if whole else None
    model = MoCo(
        args.arch, args.size, args.dim, args.queue, args.version, args.head_norm, group_size
    )
    model.to(device)
    encoder = nn.Sequential(model.backbone, model.projector)  # of the queries
    decay = args.weight_decay
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0, momentum=0.9, weight_decay=decay)
    # If all embeddings are the same, the key is one of 1 + K equal candidates.
    collapsed = math.log(1 + args.queue)
    state = {"optimizer": optimizer}
    run = Run("moco", args, data, loader, model, state, ("collapsed", collapsed), show)
    print0(f"the loss is computed by: {implementation(device, args.dim)}")
    if args.batch < 2 * args.group:
        print0(
            f"warning: --batch {args.batch} is one group of --group {args.group}: shuffling has no "
            "effect"
        )
    wrapped = distribute(model, device, args.compile)

    # The groups of the queries follow the order of the batch and are always the same.
    member_q = member_k = None
    if not whole:
        in_order = torch.arange(args.batch)
        member_q = group_members(in_order, args.group)[loader.rows].to(device)  # (n, G)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            ema_update(model.key_encoder, encoder, args.m)

            # A random permutation, the same in all processes, decides the groups of the keys.
            rand = loader.random(epoch, step, 0, METHOD)
            shuffled = torch.from_numpy(rand.generator.permutation(args.batch))
            if whole:
                x2 = shuffle(x2, shuffled, loader.rows)
            else:
                member_k = group_members(shuffled, args.group)[loader.rows].to(device)  # (n, G)

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                q, k = wrapped(x1, x2, member_q, member_k)  # (n, d) both
            q = F.normalize(q.float(), dim=1)
            k = F.normalize(k.float(), dim=1)
            keys = gather(k)  # (N, d)
            if whole:  # back into the order of the batch
                keys = keys[shuffled.to(device)]
                k = keys[loader.rows]

            # info_nce, fused: it never stores the (n, 1 + K) logits. It is the mean over the
            # queries of this process; DistributedDataParallel averages the gradients.
            loss = moco_loss(q, k, model.queue, args.tau)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # After the loss: a query must not meet its own key twice.
            enqueue(model.queue, model.oldest, keys)
            if whole:
                average_statistics(model)
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
