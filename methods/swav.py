"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments.
Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, NeurIPS 2020. https://arxiv.org/abs/2006.09882
Official code: https://github.com/facebookresearch/swav

Idea. The views of an image (random crops with changed colours) are assigned to prototypes, learned
directions that act as cluster centres, such that all prototypes get the same share of a batch. Each
view must then predict the assignment of another view of its image. Equal shares rule out collapse,
where all images get the same output, so no negatives (other images to be told apart) are needed.
Small crops, which are cheap, only predict: from a part of the image the assignment of the whole.

Notation. N images in the global batch, n = N / processes on this process; V views of each, 2 large
and V - 2 small; h = f(x) (n, D) representation, kept for later use; z = g(h) / |g(h)| (n, d)
projection, thrown away after training; prototypes C (K, d), rows of length 1; scores s_v = z_v C^T
(n, K). q_i (n, K): assignments of the large view i, found from the scores of all processes and of a
queue of past z by Sinkhorn's iterations (kernels/sinkhorn.py), without gradient. tau, epsilon:
temperatures of predictions and assignments; H entropy. Loss (Eqs. 2 and 6, a sum in the paper) and
Q (Eq. 3), whose rows have sum 1 and whose columns have equal sums (3 iterations):

    l(s, q) = -mean over images of sum_k q_k log softmax(s / tau)_k
    L       = mean over i = 1, 2 and v != i of l(s_v, q_i)
    Q       = argmax over Q of sum_bk Q_bk s_bk + epsilon H(Q)

Run.
    python methods/swav.py                                    two CPU cores, 2 to 5 minutes
    python methods/swav.py --recipe cifar10                   one GPU
    torchrun --nproc_per_node 8 methods/swav.py --recipe paper --data IMAGENET
--batch counts the images of all processes together. `--recipe batch256` is the paper's recipe for
small batches, with a queue.

Reached. On emoji after 20 epochs, 106 s on two CPU cores: kNN 55.0 % (untrained 50.8, raw pixels
53.9); linear 56.5 % (untrained 53.3, raw pixels 54.1); mean of 6 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. LARS adapts the steps of weight matrices alone and divides by |gradient + decay w|. Biases
       and batch-norm take plain SGD steps at the full rate, without decay | official code: LARC
       adapts and decays them, too, and divides by |gradient| + decay |w|. The recipes emoji and
       cifar10 use AdamW.
    2. The learning rate ends at 0; its warm-up starts near 0 | paper: ends at a thousandth of the
       peak | official code: the warm-up for large batches starts at 0.3.
    3. The queue is filled from the start, thus full when it is first used | official code: it
       begins to fill then, and each process has a queue of its own images.
    4. Batch-norm is synchronised over all processes | official code, batch 4096: over groups of 8
       GPUs, 512 images.
    5. Prototypes have no weight decay, which would hardly matter: after each step their length is
       reset to 1 | official code: decays them. They are frozen in the first epoch, as in the paper
       | official code: for as many steps as an epoch of ImageNet has.
    6. Inputs are divided by a deviation of 0.229 for red; crops are resized by bicubic
       interpolation; the blur kernel is a tenth of the side | official code: 0.228; bilinear;
       Pillow's blur.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (ARCHS, VITS, Loader, Run, backbone, fail, join_processes, load_data, parse,
                    patch_side, print0)
from kernels import implementation
from kernels.collectives import distribute, gather, rank, world
from kernels.sinkhorn import assignment_cross_entropy, sinkhorn_potentials
from kernels.views import (Crop, color_jitter, denormalize, gaussian_blur, normalize, random_flip,
                           random_grayscale)

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def swapped_prediction(scores, assignments, tau):
    """The loss L, a scalar in nats: each view predicts the assignment of each large one but itself.

    scores: (V, n, K), large views first; assignments: (2, n, K) of the large views."""
    log_p = F.log_softmax(scores / tau, dim=2)  # (V, n, K)
    terms = []
    for i, q in enumerate(assignments):
        for v in range(len(scores)):
            if v != i:
                terms.append(-(q * log_p[v]).sum(1).mean())
    return sum(terms) / len(terms)


def fused_swapped_prediction(scores, queued, tau, epsilon):
    """swapped_prediction with the assignments by Sinkhorn, which are never stored.

    scores: (V, n, K). queued: (2, l, K), scores of this process's share of the queue, which take
    part in the assignment and predict nothing; l = 0: no queue."""
    terms = []
    for i in range(2):
        # The assignment of view i, over the rows of all processes.
        assigned = torch.cat([scores[i].detach(), queued[i]])  # (n + l, K)
        log_u, log_v = sinkhorn_potentials(assigned, epsilon)  # (n + l,), (K,)
        log_u = log_u[: len(scores[i])]  # (n,)

        # All other views predict it.
        for v in range(len(scores)):
            if v != i:
                term = assignment_cross_entropy(scores[v], scores[i], log_u, log_v, tau, epsilon)
                terms.append(term)
    return sum(terms) / len(terms)


# The network.


class SwAV(nn.Module):
    def __init__(self, arch, size, dim, K, length):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        # the hidden layer is as wide as h: 2048 for resnet50, as in the official code
        self.projector = nn.Sequential(
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, dim),
        )
        self.prototypes = nn.Linear(dim, K, bias=False)
        normalize_prototypes(self.prototypes.weight)
        # z of the large views of the newest images, and the row that is replaced next
        self.register_buffer("queue", torch.zeros(length, 2, dim))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))

    def forward(self, crops):
        """crops: the two large ones (n, 3, S, S), then the small ones (n, 3, s, s). Returns z
        (V, n, d) and scores (V, n, K)."""
        # One pass per size through the backbone, one for all through the projector.
        h = self.backbone(torch.cat(crops[:2]))  # (2n, D)
        if len(crops) > 2:
            small = self.backbone(torch.cat(crops[2:]))
            h = torch.cat([h, small])  # (V n, D)
        z = self.projector(h)  # (V n, d)

        # exp(score / epsilon) needs the digits of float32.
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.to(self.prototypes.weight.dtype), dim=1)
            scores = self.prototypes(z)  # (V n, K)
        z = z.unflatten(0, (len(crops), -1))  # (V, n, d)
        return z, scores.unflatten(0, (len(crops), -1))


@torch.no_grad()
def normalize_prototypes(C):
    """Sets every row of the prototypes C (K, d) to length 1."""
    C.copy_(F.normalize(C, dim=1))


@torch.no_grad()
def enqueue(queue, oldest, keys):  # copy of: methods/moco.py::enqueue
    """Replaces the N oldest rows of the queue (l, ...) by keys (N, ...), those of all processes, so
    that every process holds the same queue. It is a ring buffer: `oldest` is the next row to
    overwrite. N may be any number up to l."""
    count = torch.arange(len(keys), device=queue.device)
    queue[(oldest + count) % len(queue)] = keys
    oldest.copy_((oldest + len(keys)) % len(queue))


# The views.


def views(args):
    """Two large and some small crops (multi-crop), all with SimCLR's flip, colour jitter, grey and
    blur (appendix A.2)."""

    def augment(x, rand):
        s = args.strength
        x = random_flip(x, rand)
        x = color_jitter(x, rand, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
        x = random_grayscale(x, rand, p=0.2)
        x = gaussian_blur(x, rand, p=args.blur, sigma=(0.1, 2.0))
        return normalize(x)

    large = Crop(args.size, scale=(args.large_scale, 1.0))
    small = Crop(args.small_size, scale=(args.small_scale, args.large_scale))
    return [(large, augment)] * 2 + [(small, augment)] * args.small_crops


def name_crops(crops):  # copy of: methods/dino.py::name_crops
    """The crops of views.png, with their headings."""
    shown = {}
    for v, crop in enumerate(crops):
        heading = f"large {v + 1}" if v < 2 else f"small {v - 1}"
        shown[heading] = denormalize(crop)
    return shown


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "batch256", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, 224, "side of a large crop, pixels"),
    "arch": ("resnet14", "resnet18", "resnet50", "resnet50", "the backbone", ARCHS),
    "batch": (128, 512, 256, 4096, "images per step, over all processes"),
    "epochs": (20, 200, 200, 800, "passes over the training images; paper: 100 to 800"),
    "warmup": (2.0, 2.0, 0.0, 10.0, "epochs of linear learning-rate warm-up"),
    "optimizer": ("adam", "adam", "lars", "lars", "AdamW or LARS", ("adam", "lars")),
    "lr": (2e-3, 5e-4, 0.6, 0.3, "learning rate per 256 images; LARS needs larger ones"),
    "weight_decay": (1e-6, 1e-6, 1e-6, 1e-6, "not on prototypes; LARS: nor biases or batch-norm"),
    "tau": (0.1, 0.1, 0.1, 0.1, "temperature of the predictions", "(0, inf)"),
    # An untrained network spreads an image over about 110 of 300 prototypes with 0.05 (exponential
    # of the assignment's entropy), over 6 with 0.01: sharp assignments help when time is short.
    # The official README, too, advises a lower value against a loss stuck at log K.
    "epsilon": (0.01, 0.05, 0.05, 0.05, "softness of the assignments", "(0, inf)"),
    "dim": (128, 128, 128, 128, "dimensions d of the projection z", "[1, inf)"),
    "prototypes": (300, 1000, 3000, 3000, "number K of prototypes", "[1, inf)"),
    "queue": (0, 0, 3840, 0, "past images that take part in the assignment; 0: no queue"),
    "queue_from": (0, 0, 15, 0, "epochs before the queue is used"),
    "small_crops": (2, 2, 6, 6, "number of small crops"),
    "small_size": (20, 20, 96, 96, "side of a small crop, pixels", "[1, inf)"),
    "small_scale": (0.1, 0.1, 0.05, 0.05, "least share of the image's area in a small crop",
                    "(0, 1]"),
    "large_scale": (0.3, 0.3, 0.14, 0.14, "least share in a large crop, and largest in a small one",
                    "(0, 1]"),
    "strength": (0.5, 0.5, 1.0, 1.0, "strength s of the colour jitter, as in SimCLR", "[0, 1.25]"),
    "blur": (0.0, 0.0, 0.5, 0.5, "probability of Gaussian blur", "[0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if 0 < args.queue < args.batch:
        fail(f"--queue {args.queue}: choose at least the {args.batch} images that a step adds "
             "(--batch), or 0 for no queue")
    if args.small_scale > args.large_scale:
        fail(f"--small-scale {args.small_scale:g}: choose at most --large-scale, "
             f"which is {args.large_scale:g}")
    if args.arch in VITS and args.small_crops and args.small_size % patch_side(args.size):
        fail(f"--small-size {args.small_size}: choose a multiple of {patch_side(args.size)}, "
             "the side of a patch")

    # The blur's kernel has a tenth of the side in pixels: below 20 it would change nothing.
    smallest = min(args.size, args.small_size) if args.small_crops else args.size
    if args.blur > 0 and smallest < 20:
        fail(f"--blur {args.blur:g}: crops of {smallest} pixels are too small to blur; choose "
             "--blur 0, or 20 and more for --size and --small-size")
    return args


class LARS(torch.optim.Optimizer):  # copy of: methods/barlow_twins.py::LARS
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
    model = SwAV(args.arch, args.size, args.dim, args.prototypes, args.queue)
    model = model.to(device)
    C = model.prototypes.weight  # (K, d)
    encoder = nn.Sequential(model.backbone, model.projector)
    groups = [{"params": encoder.parameters()}, {"params": [C], "weight_decay": 0.0}]
    kind = torch.optim.AdamW if args.optimizer == "adam" else LARS
    optimizer = kind(groups, lr=0.0, weight_decay=args.weight_decay)
    # If all images have the same scores, assignments and best predictions are uniform.
    collapsed = "collapsed", math.log(args.prototypes)
    state = {"optimizer": optimizer}
    run = Run("swav", args, data, loader, model, state, collapsed, name_crops)
    print0(f"assignment: {implementation(device)}")
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, crops in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z, scores = wrapped(crops)  # (V, n, d), (V, n, K)

            # The queue is used from its epoch on, once it is full. It is the same in every process:
            # each scores its share of the rows, so that every image counts once.
            share = model.queue[:0]  # (l, 2, d)
            if epoch >= args.queue_from and step * args.batch >= args.queue:
                share = model.queue.tensor_split(world())[rank()]
            queued = share.transpose(0, 1) @ C.detach().T  # (2, l, K)

            # swapped_prediction, fused. It is the mean over the images of this process;
            # DistributedDataParallel averages the gradients of the processes.
            loss = fused_swapped_prediction(scores, queued, args.tau, args.epsilon)
            optimizer.zero_grad()
            loss.backward()
            if epoch == 0:  # the prototypes are frozen
                C.grad = None
            optimizer.step()
            normalize_prototypes(C)

            if args.queue:
                newest = z[:2].detach().transpose(0, 1)  # (n, 2, d)
                enqueue(model.queue, model.oldest, gather(newest))
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
