"""BYOL: Bootstrap Your Own Latent, A New Approach to Self-Supervised Learning.
Grill, Strub, Altche, Tallec, Richemond, Buchatskaya, Doersch, Avila Pires, Guo, Gheshlaghi Azar,
Piot, Kavukcuoglu, Munos, Valko, NeurIPS 2020. https://arxiv.org/abs/2006.07733
Official code (JAX): https://github.com/google-deepmind/deepmind-research/tree/master/byol

Idea. Two networks look at two random views of the same image (crops with changed colours). From
one view, the online network predicts what the target network makes of the other. The target is a
slowly moving average of the online network and gets no gradient; as the online network improves, so
does what it has to predict. There are no negatives, that is, no other images to be told apart. The
loss would be 0 if all outputs were the same, but in practice the predictor and the moving target
prevent such a collapse.

Notation. N images in the global batch, n = N / processes on this process; x1, x2 (n, 3, H, W) two
views of each. Online network theta: h = f(x) (n, D) representation (y in the paper), kept for later
use; g(h) its projection; p = q(g(h)) (n, d) prediction. Target network xi, without a predictor:
z = g_xi(f_xi(x)) (n, d), z' in the paper. L is averaged over images; k counts the steps, K of them:

    l(p, z) = || p / |p| - z / |z| ||^2 = 2 - 2 cos(p, z),    L = l(p1, z2) + l(p2, z1)     (Eq. 2)
    xi <- tau xi + (1 - tau) theta,    tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2     (Eq. 1)

A random target (section 3; tau = 1 in Table 5a). In the experiment that led the authors to BYOL,
the target keeps its random initial weights. Predicting it gave 18.8 % on ImageNet, where such a
random network itself gives 1.4 %. --target random repeats this: in the final table, "random init"
is an untrained network like the target, "byol" the network that learned to predict it.

A middle layer as target (not in the paper). With --target mid, z is the output of a middle stage of
the target's backbone, averaged over places, after a batch-norm without scale and offset. --stage 1
is the nearest to the pixels and asks for the least invariance. With --tau-base 1 it stays random.

Batch-norm of the target uses the statistics of the current batch. The moving average covers its
weights, biases, scales and offsets, but not its running statistics. This follows the official code.

Run.
    python methods/byol.py                                    two CPU cores, 5 to 11 minutes
    python methods/byol.py --target mid --stage 1             a middle layer as target
    python methods/byol.py --recipe cifar10                   one GPU
    torchrun --nproc_per_node 8 methods/byol.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.

Reached. On emoji after 52 epochs, 290 s on two CPU cores: kNN 53.4 % (untrained 50.8, raw pixels
53.9); linear 57.7 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. Colour operations are torchvision's. Brightness is multiplied | official code: added.
       Contrast about the mean grey level | official code: about the mean of each channel.
       Saturation by blending with grey | official code: by scaling the saturation of HSV.
    2. The blur reflects the borders | official code: pads with zeros.
    3. A crop that does not fit is drawn anew; resizing is antialiased | official code: it is cut;
       not antialiased.
    4. Weights start as PyTorch's layers do | official code: from a truncated normal. Residual
       branches do not start at zero; the official README says that the paper's did not either |
       official code: at zero.
    5. No classifier during training | official code: one on labels, which passes no gradient back.
    6. The first step of the warm-up has a rate above 0 | official code: 0.
    7. In the columns emoji and cifar10: SGD with weight decay on all parameters, and no blur, whose
       kernel would have only 3 taps at 32 pixels | paper: LARS, and blur.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import ARCHS, VITS, Loader, Run, backbone, fail, join_processes, load_data, parse
from kernels.collectives import distribute
from kernels.views import (Crop, color_jitter, gaussian_blur, normalize, random_flip,
                           random_grayscale, solarize)

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def regression_loss(p, z):
    """l of Eq. 2, averaged over the n images of one process: from 0 to 4. Returns a scalar.

    p: (n, d) predictions, z: (n, d) what they should be, up to scale; z gets no gradient."""
    return 2 - 2 * F.cosine_similarity(p, z.detach(), dim=1).mean()


# The network.


def mlp(width, hidden, dim):
    """Projector and predictor: one hidden layer with batch-norm, none at the output."""
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, dim, bias=False),
    )


def up_to(net, stage):
    """The layers of a ResNet up to a stage, 1 to 4, and the mean over places: images (n, 3, H, W)
    -> (n, C). The layers are shared with the network."""
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    layers = [net.conv1, net.bn1, net.relu, net.maxpool, *stages[:stage]]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class BYOL(nn.Module):
    """stage: that of the target's backbone that is predicted, or None for its projection."""

    def __init__(self, arch, size, hidden, dim, head_norm, stage=None):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim

        def projector():
            head = mlp(width, hidden, dim)
            if head_norm:
                head.append(nn.BatchNorm1d(dim, affine=False))
            return head

        self.projector = projector()
        outputs = dim
        if stage:
            outputs = width // 2 ** (4 - stage)  # each stage is twice as wide as the one before
        self.predictor = mlp(dim, hidden, outputs)  # without it the outputs collapse (Table 5b)

        # Not a copy: as in the official code, the target starts from random weights of its own.
        target = backbone(arch, size)
        if stage:
            norm = nn.BatchNorm1d(outputs, affine=False)
            self.target = nn.Sequential(up_to(target, stage), norm)
        else:
            self.target = nn.Sequential(target, projector())
        self.target.requires_grad_(False)

    def forward(self, x1, x2):
        # One view after the other, so that batch statistics are always those of one view.
        p1 = self.predict(x1)  # (n, d)
        p2 = self.predict(x2)
        with torch.no_grad():
            z1 = self.target(x1)  # (n, d)
            z2 = self.target(x2)
        return p1, p2, z1, z2

    def predict(self, x):
        h = self.backbone(x)  # (n, D)
        return self.predictor(self.projector(h))


@torch.no_grad()
def ema_update(target, online, m):  # copy of: methods/moco.py::ema_update
    """target parameters <- m target + (1 - m) online. Buffers (batch statistics) are not averaged:
    each network keeps its own."""
    for t, o in zip(target.parameters(), online.parameters(), strict=True):
        t.lerp_(o, 1 - m)


# The views.


def views(args):
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
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a view, pixels"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    # 64, so that emoji's run has four thousand steps for the target to follow
    "batch": (64, 512, 4096, "images per step, over all processes"),
    "epochs": (52, 200, 1000, "passes over the training images"),
    "warmup": (2.0, 2.0, 10.0, "epochs of linear learning-rate warm-up"),
    "optimizer": ("sgd", "sgd", "lars", "SGD with momentum, or LARS", ("sgd", "lars")),
    "lr": (0.1, 0.03, 0.2, "learning rate per 256 images"),
    "weight_decay": (5e-4, 5e-4, 1.5e-6, "on all parameters; with LARS on weights only"),
    "target": ("ema", "ema", "ema", "moving average, its random start, or a middle stage of the "
               "moving average", ("ema", "random", "mid")),
    "stage": (3, 3, 3, "stage of a ResNet that --target mid predicts", "[1, 4]"),
    "tau_base": (0.99, 0.99, 0.996, "momentum of the target at the first step", "[0, 1]"),
    "hidden": (1024, 4096, 4096, "hidden units of projector and predictor", "[1, inf)"),
    "dim": (256, 256, 256, "dimensions of projection and prediction", "[1, inf)"),
    "head_norm": (False, False, False, "batch-norm at the end of the projectors, as in SimSiam"),
    "min_crop": (0.2, 0.2, 0.08, "smallest crop, share of the area", "(0, 1]"),
    "blur1": (0.0, 0.0, 1.0, "probability of blur in the first view", "[0, 1]"),
    "blur2": (0.0, 0.0, 0.1, "probability of blur in the second view", "[0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.target != "mid" and args.stage != 3:
        fail(f"--stage {args.stage} is only used with --target mid: add it, or leave --stage out")
    if args.target == "mid" and args.arch in VITS:
        fail(f"--target mid needs the stages of a ResNet: --arch {args.arch} has none; choose "
             "--arch resnet18, for example")
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


def target_decay(step, args, steps_per_epoch):
    """tau of Eq. 1: from tau_base at step 0 to 1 at the end of the run."""
    total = args.epochs * steps_per_epoch
    cosine = math.cos(math.pi * step / total)
    return 1 - (1 - args.tau_base) * (cosine + 1) / 2


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    stage = args.stage if args.target == "mid" else None
    model = BYOL(args.arch, args.size, args.hidden, args.dim, args.head_norm, stage)
    model = model.to(device)
    # The target follows backbone and projector, or only the layers up to the stage.
    online = nn.Sequential(model.backbone, model.projector)
    if stage:
        online = up_to(model.backbone, stage)
    weights = [w for w in model.parameters() if w.requires_grad]
    kind = LARS if args.optimizer == "lars" else torch.optim.SGD
    optimizer = kind(weights, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run = Run("byol", args, data, loader, model, {"optimizer": optimizer})
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                p1, p2, z1, z2 = wrapped(x1, x2)  # (n, d) each

            # L, the mean over the images of this process; DistributedDataParallel averages the
            # gradients.
            loss1 = regression_loss(p1.float(), z2.float())
            loss2 = regression_loss(p2.float(), z1.float())
            loss = loss1 + loss2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            if args.target != "random":
                ema_update(model.target, online, target_decay(step, args, loader.steps))
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
