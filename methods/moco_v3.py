"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers.
Chen, Xie, He, ICCV 2021. https://arxiv.org/abs/2104.02057
Official code: https://github.com/facebookresearch/moco-v3

Idea. Two random views of an image (crops with changed colours) are encoded: one as a query, the
other as a key. The query must pick out its key among the keys of all images of the batch. Batches
are large, so the queue of old keys that the first two versions of MoCo kept is not needed. The keys
come from the momentum encoder, a slowly moving average of the query encoder that gets no gradient.
Only the queries pass through a further small network, the predictor.
The paper is about vision transformers (ViT: an image is cut into patches that attend to each
other). Their training can be unstable unnoticed: at times the accuracy dips and recovers, and it
ends some points lower than in a stable run. The dips begin with a sudden large gradient in the
first layer, which projects each patch of pixels to a token. So this layer keeps its random weights.

Notation. N images in the global batch, n = N / processes on this process; x1, x2 (n, 3, H, W) two
views of each; h = f(x) (n, D) representation, kept for later use; query q = predictor(projector(h))
(n, d); key k (n, d), from the momentum encoder, which has a backbone and a projector. q and k are
L2-normalised; tau is the temperature. q1 and k1 come from x1, q2 and k2 from x2. L is averaged over
the images i (Eq. 1 and Algorithm 1). theta_q and theta_k are the weights of the two encoders, those
of the predictor left out; m is the momentum, m_0 at the start; s counts the steps from 0, S is the
number of all steps:

    ctr(q, k) = -2 tau log  exp(q_i . k_i / tau) / sum over j = 1 .. N of exp(q_i . k_j / tau)
    L         = ctr(q1, k2) + ctr(q2, k1)
    theta_k  <- m theta_k + (1 - m) theta_q,    m = 1 - (1 - m_0) (1 + cos(pi s / S)) / 2

The projector has three layers with a ViT, two with a ResNet. The feature h of a ViT is its class
token, and its positions are fixed sines and cosines.

Run.
    python methods/moco_v3.py                                 one CPU core, about 8 minutes
    python methods/moco_v3.py --arch vit_micro --train-patches
    python methods/moco_v3.py --recipe cifar10                one GPU
    torchrun --nproc_per_node 8 methods/moco_v3.py --recipe paper --data IMAGENET
--batch counts the images of all processes together. `--recipe paper-resnet` is the ResNet-50 of the
paper. --train-patches trains the patch projection, too. Then, and with a ResNet, metrics.jsonl has
first_gradient, the largest gradient of the first layer in each step. In the paper (Figure 4) its
peaks come just before the dips.

Reached. On emoji after 36 epochs, 455 s on one busy core: kNN 54.9 % (untrained 50.8, raw pixels
53.9); linear 57.1 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. vit_small has 6 attention heads, as in DeiT and DINO | paper: 12.
    2. The side of a patch is 4 pixels for images of up to 48, 8 up to 96, else 16 | paper: 16.
    3. Residual branches of a ResNet do not start at zero, so that all methods start from the same
       network | official code: at zero.
    4. The predictor of a ResNet ends without batch-norm, as in the official code | paper: all
       layers of both heads have one.
    5. The first step of the warm-up has a rate above 0 | official code: 0. Crops: bicubic, with
       antialiasing | bilinear. Blur: a kernel of a tenth of the side | PIL's approximation.
    6. In the columns emoji and cifar10 there is no blur: at 32 pixels its kernel would have only 3
       values. On emoji AdamW trains a ResNet | paper: LARS does.
"""

import copy
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import ARCHS, VITS, Loader, Run, fail, join_processes, load_data, parse, print0
from kernels import implementation
from kernels.collectives import distribute, gather
from kernels.infonce import bank_loss  # ctr / (2 tau) below, fused
from kernels.views import (Crop, color_jitter, gaussian_blur, normalize, random_flip,
                           random_grayscale, solarize)

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def ctr(q, k, own, tau):
    """2 tau times InfoNCE, averaged over the n queries of one process. Returns a scalar.

    q (n, d), k (N, d): L2-normalised; k are the keys of all processes and get no gradient. own
    (n,): the row of k that belongs to each query. The factor 2 tau keeps the size of the gradient
    about the same for any tau."""
    if q.device.type != "cpu":
        # The two lines below, fused: it never stores the (n, N) logits.
        return 2 * tau * bank_loss(q, k, own, tau)
    logits = q @ k.detach().T / tau  # (n, N)
    return 2 * tau * F.cross_entropy(logits, own)


# The network.


@torch.no_grad()
def backbone(arch, size):
    """common.backbone. A ViT has fixed positions and the initial weights of the official code: a
    class token close to 0, and Xavier's for the three matrices that make queries, keys and values.
    """
    if arch not in VITS:
        return common.backbone(arch, size)
    net = common.backbone(arch, size, positions="sincos")
    nn.init.normal_(net.cls_token, std=1e-6)
    for block in net.blocks:
        for weight in block.attn["qkv"].weight.split(net.out_dim):
            nn.init.xavier_uniform_(weight)
    return net


def mlp(widths, last_norm=True):
    """A projector or predictor: linear layers from width to width, with batch-norm and ReLU between
    them. If last_norm, a batch-norm without scale and offset comes at the end."""
    layers = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after)]
        layers.append(nn.ReLU())
    layers = layers[:-2]  # no batch-norm and ReLU after the last linear layer
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


class MoCoV3(nn.Module):
    def __init__(self, arch, size, hidden, dim, train_patches=False):
        super().__init__()
        vit = arch in VITS
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        hiddens = [hidden, hidden] if vit else [hidden]
        self.projector = mlp([width, *hiddens, dim])
        self.predictor = mlp([dim, hidden, dim], last_norm=vit)

        encoder = nn.Sequential(self.backbone, self.projector)
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        if vit and not train_patches:
            # The patch projection keeps its random weights.
            self.backbone.first_layer.requires_grad_(False)

    def forward(self, x1, x2):
        # One view after the other, so that batch statistics are always those of one view.
        q1 = self.query(x1)  # (n, d)
        q2 = self.query(x2)
        with torch.no_grad():
            k1 = self.key_encoder(x1)  # (n, d)
            k2 = self.key_encoder(x2)
        return q1, q2, k1, k2

    def query(self, x):
        h = self.backbone(x)  # (n, D)
        return self.predictor(self.projector(h))


@torch.no_grad()
def ema_update(target, online, m):  # copy of: methods/moco.py::ema_update
    """target parameters <- m target + (1 - m) online. Buffers (batch statistics) are not averaged:
    each network keeps its own."""
    for t, o in zip(target.parameters(), online.parameters(), strict=True):
        t.lerp_(o, 1 - m)


# The views.


def views(args):  # copy of: methods/byol.py::views
    """The two views follow the same recipe but for the probability of blur, and for solarization,
    which inverts bright pixels, in the second view only."""

    def augmentation(blur, solarized):
        def augment(x, rand):
            x = random_flip(x, rand)
            x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
            x = random_grayscale(x, rand, p=0.2)
            x = gaussian_blur(x, rand, p=blur, sigma=(0.1, 2.0))
            x = solarize(x, rand, p=solarized)
            return normalize(x)

        return augment

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    first = augmentation(args.blur1, solarized=0.0)
    second = augmentation(args.blur2, solarized=0.2)
    return [(crop, first), (crop, second)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper-resnet", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, 224, "side of a view, pixels"),
    "arch": ("resnet14", "resnet18", "resnet50", "vit_small", "the backbone", ARCHS),
    "train_patches": (False, False, False, False, "train the patch projection of a ViT, too"),
    "batch": (256, 256, 4096, 4096, "images per step, over all processes"),
    "epochs": (36, 1000, 100, 300, "passes over the training images"),
    "warmup": (2.0, 10.0, 10.0, 40.0, "epochs of linear learning-rate warm-up"),
    "optimizer": ("adamw", "lars", "lars", "adamw", "AdamW or LARS", ("adamw", "lars")),
    # 1e-3, seven times that of the paper's ViT: emoji has only a few hundred steps
    "lr": (1e-3, 0.3, 0.6, 1.5e-4, "learning rate per 256 images"),
    "weight_decay": (0.1, 1e-6, 1e-6, 0.1, "on all parameters; with LARS on weights only"),
    "tau": (0.2, 0.2, 1.0, 0.2, "temperature; least value on GPUs: 0.006", "[0.006, inf)"),
    "m": (0.99, 0.99, 0.99, 0.99, "momentum at the first step; it rises to 1", "[0, 1]"),
    "hidden": (512, 4096, 4096, 4096, "hidden units of projector and predictor", "[1, inf)"),
    "dim": (128, 256, 256, 256, "dimensions of a query and a key", "[1, inf)"),
    "min_crop": (0.2, 0.2, 0.2, 0.08, "smallest crop, share of the area", "(0, 1]"),
    "blur1": (0.0, 0.0, 1.0, 1.0, "probability of blur in the first view", "[0, 1]"),
    "blur2": (0.0, 0.0, 0.1, 0.1, "probability of blur in the second view", "[0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.train_patches and args.arch not in VITS:
        fail(f"--train-patches needs a vision transformer: choose --arch {', '.join(VITS)}, or "
             "leave the flag out")
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


def momentum(step, args, steps_per_epoch):
    """m: from --m at step 0 to 1 at the end of the run, along half a cosine."""
    total = args.epochs * steps_per_epoch
    cosine = math.cos(math.pi * step / total)
    return 1 - (1 - args.m) * (1 + cosine) / 2


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = MoCoV3(args.arch, args.size, args.hidden, args.dim, args.train_patches)
    model.to(device)
    encoder = nn.Sequential(model.backbone, model.projector)  # the keys' encoder follows these two
    weights = [w for w in model.parameters() if w.requires_grad]
    kind = LARS if args.optimizer == "lars" else torch.optim.AdamW
    optimizer = kind(weights, lr=0.0, weight_decay=args.weight_decay)
    # If all embeddings are the same, each key is one of N equal candidates: 2 tau log N, twice.
    collapsed = 4 * args.tau * math.log(args.batch)
    state = {"optimizer": optimizer}
    run = Run("moco_v3", args, data, loader, model, state, ("collapsed", collapsed))
    print0(f"the loss is computed by: {implementation(device, args.dim)}")
    wrapped = distribute(model, device, args.compile)
    # The queries of this process belong to these rows of the keys of all processes.
    own = torch.arange(args.batch, device=device)[loader.rows]  # (n,)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            ema_update(model.key_encoder, encoder, momentum(step, args, loader.steps))

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                embeddings = wrapped(x1, x2)
            q1, q2, k1, k2 = [F.normalize(z.float(), dim=1) for z in embeddings]  # (n, d) each

            # The mean over the queries of this process, against the keys of all processes;
            # DistributedDataParallel averages the gradients.
            loss1 = ctr(q1, gather(k2), own, args.tau)
            loss2 = ctr(q2, gather(k1), own, args.tau)
            loss = loss1 + loss2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            # The frozen patch projection has no gradient.
            gradient = model.backbone.first_layer.weight.grad
            more = {} if gradient is None else {"first_gradient": gradient.abs().max()}
            run.log(loss, lr, **more)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
