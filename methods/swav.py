"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments.
Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, NeurIPS 2020. https://arxiv.org/abs/2006.09882
Official code: https://github.com/facebookresearch/swav

Idea. Views of a batch are assigned to prototypes, learned directions, under the constraint that all prototypes get the same
share of the batch; then every view must predict the assignment of another view of its image. The equal shares rule out that
all images look the same, so no negatives are needed. Small crops, which are cheap, only predict: from a part, the whole.

Notation. N images of the global batch, n = N / processes of them on this one; V views of each, two large and V - 2 small;
h = f(x) (n, D) representation; z = g(h) / ||g(h)|| (n, d) projection; prototypes C (K, d), rows of length 1; scores
s_v = z_v C^T (n, K). Assignments q_i (n, K) of the two large views i, from the scores of all processes and of a queue of
past z, by Sinkhorn's iterations (kernels/sinkhorn.py), without gradient. tau temperature of the predictions, epsilon that of
the assignments, H(Q) their entropy. Loss (Eqs. 2 and 6, there a sum) and Q (Eq. 3):

    l(s, q) = -mean over images of sum_k q_k log softmax(s / tau)_k        L = mean over i = 1, 2 and v != i of l(s_v, q_i)
    Q = argmax over Q of sum_bk Q_bk s_bk + epsilon H(Q), the columns of Q with equal sums (3 iterations), the rows with sum 1

Run.
    python methods/swav.py                                                two CPU cores, 2 to 5 minutes: emoji, 32 pixels
    python methods/swav.py --data cifar10 --arch resnet18 --batch 512 --epochs 200 --lr 5e-4 --prototypes 1000 --epsilon 0.05
    torchrun --nproc_per_node 8 methods/swav.py --data IMAGENET --size 224 --arch resnet50 --batch 256 --epochs 200 \
        --optimizer lars --lr 0.6 --warmup 0 --small 6 96 --scale 0.05 0.14 --prototypes 3000 --epsilon 0.05 \
        --queue 3840 15 --distort 1 0.5 --workers 12
The second is for one GPU, the third the paper's small-batch recipe, for eight. --batch counts the images of all processes
together. Results: the table in README.md.

Sharp assignments help when time is short: those of an untrained network spread an image over about 110 of 300 prototypes (the
exponential of the entropy) with the paper's epsilon, 0.05, and over 6 with 0.01. The official README, too, advises a lower
epsilon against a loss stuck at log K.

Differs from the paper.
    1. AdamW unless --optimizer lars is given. The official LARC adapts the steps of biases and batch-norm parameters, too,
       and decays them; it divides by |gradient| + decay |w|, here by |gradient + decay w|. The learning rate falls to 0, in
       the paper to a thousandth of its peak; the official warm-up for large batches starts at 0.3, here near 0.
    2. The queue is filled from the start, so that it is full when it is first used. The official code begins to fill it at
       that epoch, and each process there has a queue of its own images.
    3. The hidden layer of g is as wide as h: 2048 for resnet50, as in the official code.
    4. The prototypes have no weight decay, which would change next to nothing, as their length is reset to 1 after every step.
       They are frozen in the first epoch, as in the paper; officially for as many steps as an epoch of ImageNet has.
    5. Inputs are divided by a standard deviation of 0.229 for red (official code: 0.228). Crops are resized by bicubic
       interpolation, in the official code by bilinear; the blur kernel is a tenth of the side.
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
from common import (Crop, Loader, Run, backbone, color_jitter, distribute, fail, gather, gaussian_blur, load_data, normalize,
                    print0, random_flip, random_grayscale, rank, start, world)
from kernels import path
from kernels.sinkhorn import assignment_cross_entropy, sinkhorn_potentials

TAU, DIM = 0.1, 128  # temperature and d, the paper's
WEIGHT_DECAY = 1e-6  # the paper's; never on prototypes, with LARS not on biases and batch-norm either


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="emoji", help="emoji, fashion, fashion-mnist, cifar10, cifar100, stl10 or a folder")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=32, help="side of a large view, pixels (paper: 224)")
    p.add_argument("--arch", default="resnet14", help="resnet14, resnet18, resnet34 or resnet50 (paper: resnet50)")
    p.add_argument("--batch", type=int, default=128, help="images a step, over all processes (paper: 4096 or 256)")
    p.add_argument("--epochs", type=int, default=20, help="passes over the training images (paper: 100 to 800)")
    p.add_argument("--warmup", type=float, default=2, help="epochs of linear learning-rate warm-up (paper: 10; batch 256: 0)")
    p.add_argument("--optimizer", default="adam", choices=["adam", "lars"], help="AdamW, or the paper's (other --lr)")
    p.add_argument("--lr", type=float, default=2e-3, help="learning rate per 256 images (paper, LARS: 0.3; batch 256: 0.6)")
    p.add_argument("--small", type=int, nargs=2, default=[2, 20], help="number and side, pixels, of small crops (paper: 6 96)")
    p.add_argument("--scale", type=float, nargs=2, default=[0.1, 0.3], metavar=("LEAST", "BOUND"), help="share of the image's "
                   "area: small crops from LEAST to BOUND, large ones from BOUND to 1 (paper: 0.05 0.14)")
    p.add_argument("--prototypes", type=int, default=300, help="number of prototypes, K (paper: 3000)")
    p.add_argument("--epsilon", type=float, default=0.01, help="softness of the assignments (paper: 0.05; on collapse 0.03)")
    p.add_argument("--queue", type=int, nargs=2, default=[0, 0], metavar=("LENGTH", "EPOCH"), help="images in the queue and "
                   "epochs before it is used; 0 0: none (paper: none; batch 256: 3840 15)")
    p.add_argument("--distort", type=float, nargs=2, default=[0.5, 0.0], metavar=("STRENGTH", "BLUR"), help="of the colour "
                   "jitter; probability of Gaussian blur (paper: 1 0.5)")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and the views")
    p.add_argument("--eval-every", type=int, default=5, help="epochs between kNN evaluations")
    p.add_argument("--out", default=None, help="run folder (default: runs/swav-DATA-SEED); a run found there is continued")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = p.parse_args()
    if args.epsilon <= 0:
        fail(f"--epsilon {args.epsilon}: choose a number above 0")
    if args.queue[0] < 0 or 0 < args.queue[0] < args.batch:
        fail(f"--queue {args.queue[0]}: choose at least the {args.batch} images that a step adds (--batch), or 0 for no queue")
    return args


def views(args):
    """Two large and some small crops, all with SimCLR's flip, colour jitter, grey and blur (appendix A.2)."""
    strength, blur = args.distort

    def augment(x, rand):
        x = random_flip(x, rand)
        s = strength
        x = color_jitter(x, rand, brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8)
        x = random_grayscale(x, rand, p=0.2)
        x = gaussian_blur(x, rand, p=blur, sigma=(0.1, 2.0))
        return normalize(x)

    (number, side), (least, bound) = args.small, args.scale
    return 2 * [(Crop(args.size, scale=(bound, 1.0)), augment)] + number * [(Crop(side, scale=(least, bound)), augment)]


class SwAV(nn.Module):
    def __init__(self, arch, size, dim, K, length):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        self.projector = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, dim))
        self.prototypes = nn.Linear(dim, K, bias=False)
        normalize_prototypes(self.prototypes.weight)
        self.register_buffer("queue", torch.zeros(length, 2, dim))  # z of the large views of the newest images
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # the row of the queue that is replaced next

    def forward(self, crops):
        """crops: the two large ones (n, 3, S, S), then the small ones (n, 3, s, s) -> z (V, n, d), scores (V, n, K)."""
        h = [self.backbone(torch.cat(same)) for same in (crops[:2], crops[2:]) if same]  # a pass for each size
        z = self.projector(torch.cat(h))  # (V n, d)
        with torch.autocast(z.device.type, enabled=False):  # exp(score / epsilon) needs the digits of float32
            z = F.normalize(z.to(self.prototypes.weight.dtype), dim=1)
            scores = self.prototypes(z)
        return z.unflatten(0, (len(crops), -1)), scores.unflatten(0, (len(crops), -1))


def swapped_prediction(scores, assignments, tau):
    """The loss L, a scalar in nats. scores (V, n, K), large views first; assignments (2, n, K), those of the large views. Every
    view predicts the assignment of each large one but its own."""
    log_p = F.log_softmax(scores / tau, dim=2)
    terms = [-(q * log_p[v]).sum(1).mean() for i, q in enumerate(assignments) for v in range(len(scores)) if v != i]
    return sum(terms) / len(terms)


def fused_swapped_prediction(scores, queued, tau, epsilon):
    """swapped_prediction with the assignments by Sinkhorn, which are never stored. scores (V, n, K); queued (2, l, K): scores
    of this process's share of the queue, which take part in the assignment and predict nothing; l = 0: no queue."""
    terms = []
    for i in range(2):
        assigned = torch.cat([scores[i].detach(), queued[i]])  # (n + l, K)
        log_u, log_v = sinkhorn_potentials(assigned, epsilon)  # over the rows of all processes
        terms += [assignment_cross_entropy(scores[v], scores[i], log_u[:len(scores[i])], log_v, tau, epsilon)
                  for v in range(len(scores)) if v != i]
    return sum(terms) / len(terms)


@torch.no_grad()
def normalize_prototypes(C):
    """Sets every row of the prototypes C (K, d) to length 1."""
    C.copy_(F.normalize(C, dim=1))


@torch.no_grad()
def enqueue(queue, oldest, keys):  # copy of: methods/moco.py::enqueue
    """Replaces the N oldest rows of the queue (l, ...) by keys (N, ...), those of all processes, so that the queue is the same
    on each. It is a ring: `oldest` is where the next ones go, and any N up to l will do."""
    rows = (oldest + torch.arange(len(keys), device=queue.device)) % len(queue)
    queue[rows] = keys
    oldest.copy_((oldest + len(keys)) % len(queue))


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
    length, first_epoch = args.queue
    model = SwAV(args.arch, args.size, DIM, args.prototypes, length)
    C = model.prototypes.weight  # (K, d)
    encoder = nn.Sequential(model.backbone, model.projector)
    groups = [{"params": encoder.parameters()}, {"params": [C], "weight_decay": 0.0}]
    optimizer = {"adam": torch.optim.AdamW, "lars": LARS}[args.optimizer](groups, lr=0.0, weight_decay=WEIGHT_DECAY)
    run = Run("swav", args, data, loader, model, {"optimizer": optimizer}, collapse=math.log(args.prototypes))
    print0(f"assignment: {path(device)}")
    network = distribute(model, device, args.compile)

    for epoch in range(run.step // loader.steps, args.epochs):
        for step, crops in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z, scores = network(crops)  # (V, n, d), (V, n, K)
            # The queue is the same everywhere: each process scores its share, so that every image counts once.
            use = epoch >= first_epoch and step * args.batch >= length
            share = model.queue.tensor_split(world())[rank()] if use else model.queue[:0]  # (l, 2, d)
            queued = share.transpose(0, 1) @ C.detach().T  # (2, l, K)
            # The mean over this process's images; DistributedDataParallel averages the gradients of the processes.
            loss = fused_swapped_prediction(scores, queued, TAU, args.epsilon)
            optimizer.zero_grad()
            loss.backward()
            if epoch == 0:  # the prototypes are frozen
                C.grad = None
            optimizer.step()
            normalize_prototypes(C)
            if length:
                enqueue(model.queue, model.oldest, gather(z[:2].detach().transpose(0, 1)))  # (N, 2, d)
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
