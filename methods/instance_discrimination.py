"""InstDisc: Unsupervised Feature Learning via Non-Parametric Instance Discrimination.
Wu, Xiong, Yu, Lin, CVPR 2018. https://arxiv.org/abs/1805.01978
Official code: https://github.com/zhirongw/lemniscate.pytorch

Idea. Every image is a class of its own, and the network learns to say which image it sees. A usual
classifier would have a weight vector for each image and compare images with these vectors, never
with each other. Here an embedding of the image itself from earlier epochs takes the place of its
weight vector. A memory bank keeps them, one row for each image. To be recognised, a view must be
close to the earlier views of its image and far from all other images. Similar images are the
hardest to tell apart, so they stay near each other.

Notation. M training images, N of them in the global batch, n = N / processes on this process;
x (n, 3, H, W) one view of each; h = f(x) (n, D) representation, kept for later use; v = g(h) (n, d)
embedding, L2-normalised; bank (M, d) with rows m_i; tau temperature. i is the image that v shows.
The network gives this image the probability (Eq. 2)

    P(i | v) = exp(m_i . v / tau) / Z,    Z = sum over j of exp(m_j . v / tau)

There are two losses, both averaged over images. The softmax names the image among all M.
Noise-contrastive estimation (NCE, Eq. 4 to 7) looks at 1 + K rows: that of image i, and those of K
others, drawn anew for each view. For each row by itself it asks: is this the row of the view's own
image? p is the probability of yes. Its Z is no sum but a constant, estimated from the first batch:

    softmax:  L = -log P(i | v)
    nce:      L = -log p(i, v) - sum over K others j of log(1 - p(j, v)),    p = P / (P + K / M)

The proximal term (Eq. 9) slows the embeddings down: it adds lambda ||v - m_i||^2. After the step
the bank learns them, with momentum mu: m_i <- mu m_i + (1 - mu) v, back to length 1.

Run.
    python methods/instance_discrimination.py                 one CPU core, about 6 minutes
    python methods/instance_discrimination.py --recipe cifar10       one GPU
    torchrun --nproc_per_node 8 methods/instance_discrimination.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.
After the last epoch, bank_knn in metrics.jsonl is kNN as in section 3.4 of the paper: embeddings of
test images against the bank. retrieval.png shows some of them with their nearest rows.

Reached. On emoji after 70 epochs, 340 s on one busy core: kNN 59.5 % (untrained 50.8, raw pixels
53.9); linear 59.4 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The K others never include the image itself. They are drawn from the M - 1 other images, but
       the formula of p keeps 1 / M | paper and official code: they are drawn from all M.
    2. The bank's momentum mu and the proximal term are two flags | paper: the term, with mu = 0;
       official code: mu = 0.5, without the term, as in our columns emoji and cifar10.
    3. The bank begins with random unit vectors | official code: random numbers, of varying length.
    4. The learning rate falls to zero by a cosine, after a warm-up where --warmup asks for one |
       official code: divided by ten at epochs 120 and 160 of 200, on CIFAR-10 every 40 epochs from
       the 80th (by a function whose call is commented out).
    5. On emoji the head ends in a batch-norm without scale and offset, as in MoCo v3 | paper, and
       our other columns: none (--no-head-norm).
    6. On emoji half of the views are mirrored and hues change less | official code: mirrored on
       ImageNet, not on CIFAR-10; hues by up to 0.4 of a turn.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (ARCHS, Loader, Run, backbone, fail, features, join_processes, knn, load_data,
                    parse, print0, save_grid)
from kernels import implementation
from kernels.collectives import all_reduce_sum, distribute, gather, rank, world
from kernels.infonce import bank_loss  # softmax_loss below, fused
from kernels.views import METHOD, Crop, color_jitter, normalize, random_flip, random_grayscale

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def softmax_loss(v, bank, index, tau):
    """-log P(i | v), averaged over the n views, with the exact Z. Returns a scalar, in nats.

    v: (n, d) embeddings; bank: (M, d) rows of all images; index (n,): which image each view shows.
    """
    if v.device.type != "cpu":
        # The fused loss gives the same as the two lines below without storing the (n, M) logits,
        # with ImageNet 1.3 GB for 256 views.
        return bank_loss(v, bank, index, tau)
    logits = v @ bank.T / tau  # (n, M)
    return F.cross_entropy(logits, index)


def nce_loss(logits, Z, M):
    """Noise-contrastive estimation (Wu et al. 2018, Eq. 7), averaged over the n views: is a row of
    the bank that of the view's own image, or one of K that were drawn at random? Returns a scalar,
    in nats.

    logits: (n, 1 + K) products m . v / tau with the own row, then with the K others; Z: the
    constant in P = exp(logit) / Z; M: the number of images, each drawn with probability 1 / M."""
    K = logits.shape[1] - 1
    # P / (P + K / M) is the sigmoid of log P - log(K / M).
    evidence = logits - torch.log(Z * K / M)
    own, others = evidence.split([1, K], 1)
    losses = -F.logsigmoid(own).sum(1) - F.logsigmoid(-others).sum(1)  # (n,)
    return losses.mean()


def proximal_term(v, rows):
    """Eq. 9: the squared distance of the embeddings v (n, d) from their rows of the bank."""
    return (v - rows).square().sum(1).mean()


# The network.


class InstDisc(nn.Module):
    def __init__(self, arch, size, dim, images, head_norm=True):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.head = nn.Sequential(nn.Linear(self.backbone.out_dim, dim, bias=not head_norm))
        if head_norm:  # difference 5
            self.head.append(nn.BatchNorm1d(dim, affine=False))
        self.register_buffer("bank", F.normalize(torch.randn(images, dim), dim=1))  # (M, d)
        self.register_buffer("Z", torch.ones(()))  # for nce; estimated in the first step

    def forward(self, x):
        h = self.backbone(x)  # (n, D)
        return F.normalize(self.head(h).float(), dim=1)  # (n, d)


def draw_others(rand, count, index, images):
    """Indices (n, count) of other images for each image `index` (n,), uniform over all but it."""
    u = rand.uniform(columns=(count,)).to(index.device, non_blocking=True)
    others = (u * (images - 1)).long().clamp(max=images - 2)  # rounding may reach images - 1
    return others + (others >= index[:, None])  # steps over the image itself


def compare(v, bank, index, others, tau):
    """Logits (n, 1 + K) of the embeddings v (n, d): with the own row of the bank, then others."""
    candidates = torch.cat([index[:, None], others], 1)  # (n, 1 + K)
    return torch.einsum("nd,nkd->nk", v, bank[candidates]) / tau


@torch.no_grad()
def update_bank(bank, index, v, mu):
    """The rows `index` (N,) move towards the embeddings v (N, d) of the images of all processes, so
    every process holds the same bank. If a file is broken, another is read in its place, so an
    image may stand twice in a batch: its first view counts."""
    first = (index[:, None] == index).int().argmax(1)
    rows = mu * bank[index] + (1 - mu) * v[first]
    bank[index] = F.normalize(rows, dim=1)


# The views.


def views(args):
    """One view per image: crop, grey, colour jitter, flip."""

    def augment(x, rand):
        x = random_grayscale(x, rand, p=0.2)
        x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.4, hue=args.hue)
        x = random_flip(x, rand, p=args.flip)
        return normalize(x)

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a view, pixels"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (256, 128, 256, "images per step, over all processes"),
    "epochs": (70, 200, 200, "passes over the training images"),
    "warmup": (2.0, 0.0, 0.0, "epochs of linear learning-rate warm-up"),
    # for the softmax; on emoji the rate of --loss nce is not tuned
    "lr": (0.02, 0.06, 0.03, "learning rate per 256 images"),
    "weight_decay": (1e-4, 5e-4, 1e-4, "on all parameters"),
    "loss": ("softmax", "softmax", "nce", "softmax over all images, or NCE with K others",
             ("softmax", "nce")),
    "negatives": (1024, 4096, 4096, "K, other images per view, with --loss nce", "[1, inf)"),
    # e^(1 / tau), by which Z is estimated, must stay finite
    "tau": (0.1, 0.1, 0.07, "temperature of the logits", "[0.02, inf)"),
    "dim": (128, 128, 128, "dimensions of an embedding", "[1, inf)"),
    # difference 5
    "head_norm": (True, False, False, "batch-norm at the end of the head"),
    "bank_momentum": (0.5, 0.5, 0.0, "mu, how much of its row the bank keeps", "[0, 1]"),
    # 30 in the column `paper`: not verified
    "proximal": (0.0, 0.0, 30.0, "lambda, weight of the proximal term"),
    "min_crop": (0.2, 0.2, 0.2, "smallest crop, share of the image's area", "(0, 1]"),
    "hue": (0.1, 0.4, 0.4, "strength of the jitter of the hue", "[0, 0.5]"),
    "flip": (0.5, 0.0, 0.5, "probability of a horizontal flip", "[0, 1]"),
}


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


def loss_of_chance(args, images):
    """The loss of a network that cannot tell images apart: P = 1 / M for each."""
    if args.loss == "softmax":
        return math.log(images)
    K = args.negatives
    return math.log(K + 1) + K * math.log1p(1 / K)


def draw_retrieval(path, run):
    """Section 3.4: each of the 200 rows of the bank with the largest cosine s to the embedding of a
    test image votes for its label with exp(s / tau). Shows ten test images with the training images
    of their nearest rows. Prints and returns the accuracy in percent; None without labels, and in
    all processes but one. Every process must call it."""
    args = run.args
    train, test = run.data.train, run.data.test
    if test is None or train.labels is None:
        return None
    v, readable = features(run.model, test, args.size, run.device, args.workers)  # (tests, d)
    if rank() > 0:
        return None

    bank = run.model.bank
    labels = train.labels.to(run.device)
    test_labels = test.labels.to(run.device)
    accuracy = knn(bank, labels, v[readable], test_labels[readable], 200, args.tau)
    print0(f"kNN of embeddings against the bank (k 200, tau {args.tau:g}): {accuracy:.1f} %")

    queries = np.random.default_rng(0).permutation(len(v))[:10]
    queries = torch.from_numpy(queries).to(run.device)
    cosines = v[queries] @ bank.T  # (10, M)
    nearest = cosines.topk(min(8, len(bank)), 1).indices  # (10, 8)
    right = labels[nearest] == test_labels[queries][:, None]
    green = F.pad(right, (1, 0)).cpu()  # the test image itself has no frame

    shown = []
    for split, index in ((test, queries[:, None]), (train, nearest)):
        parts = split.images.whole(index.flatten().cpu(), args.size)
        images = torch.cat([part.cpu() for part, _ in parts]) / 255
        shown.append(images.unflatten(0, index.shape))
    rows = torch.cat(shown, 1)  # (10, 1 + 8, 3, H, W)
    columns = ["test image", *map(str, range(1, rows.shape[1]))]
    note = "test images, and those of the nearest rows of the bank; green: the same label"
    save_grid(path, rows, columns, green, note)
    return accuracy


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.loss == "softmax" and args.negatives not in SETTINGS["negatives"]:
        fail(f"--negatives {args.negatives}: only --loss nce draws other images")
    return args


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    images = loader.count
    model = InstDisc(args.arch, args.size, args.dim, images, args.head_norm)
    model.to(device)
    weights = model.parameters()
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    chance = loss_of_chance(args, images)
    state = {"optimizer": optimizer}
    run = Run("instance_discrimination", args, data, loader, model, state, ("chance", chance))
    if args.loss == "softmax":
        print0(f"the loss is computed by: {implementation(device, args.dim)}")
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                v = wrapped(x)  # (n, d)

            # The mean over the images of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N images.
            index = loader.index  # (n,)
            if args.loss == "softmax":
                loss = softmax_loss(v, model.bank, index, args.tau)
            else:
                rand = loader.random(epoch, step, 0, METHOD)
                others = draw_others(rand, args.negatives, index, images)
                logits = compare(v, model.bank, index, others, args.tau)  # (n, 1 + K)
                if step == 0:
                    mean = all_reduce_sum(logits.detach().exp().mean()) / world()
                    model.Z.copy_(images * mean)
                loss = nce_loss(logits, model.Z, images)
            loss = loss + args.proximal * proximal_term(v, model.bank[index])

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # After the loss: a view must not meet itself.
            update_bank(model.bank, gather(index), gather(v.detach()), args.bank_momentum)
            run.log(loss, lr)

        more = {}
        if epoch + 1 == args.epochs:
            with run.not_training():
                accuracy = draw_retrieval(run.folder / "retrieval.png", run)
            if accuracy is not None:
                more["bank_knn"] = accuracy
        run.end_epoch(epoch, **more)
    run.finish()


if __name__ == "__main__":
    main()
