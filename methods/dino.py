"""DINO: Emerging Properties in Self-Supervised Vision Transformers.
Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin, ICCV 2021.
https://arxiv.org/abs/2104.14294
Official code: https://github.com/facebookresearch/dino

Idea. A student network looks at any crop of an image, large or small, and predicts what a teacher
network says about a large crop of it. The teacher is a slowly moving average of the student. Both
could agree on the same output for every image (collapse); two opposite forces on the teacher's
output prevent it: centring, so that no output dimension wins for all images, and sharpening, a low
temperature, so that the output is not uniform. In a ViT (vision transformer: an image is cut into
patches that attend to each other) the attention then follows objects: attention.png.

Notation. N images in the global batch, n = N / processes on this process; V views of each, two
large and V - 2 small; g_s, g_t the outputs (n, K) of student and teacher, each a backbone followed
by a head; C (K,) centre; tau_s, tau_t temperatures; m momentum, called lambda in the paper.
P_t = softmax((g_t(x) - C) / tau_t) and P_s = softmax(g_s(x) / tau_s) are distributions over the K
dimensions; theta_s and theta_t are the weights. L is the mean, over the large views i and all views
v != i, of the cross-entropy (Eq. 3 is the sum); the centre follows Eq. 4:

    L       = mean over i, v of  -sum_k P_t(x_i)_k log P_s(x_v)_k
    C       <- 0.9 C + 0.1 mean of g_t over the two large views of all N images
    theta_t <- m theta_t + (1 - m) theta_s

As in the paper, the teacher's backbone is what is evaluated and saved; for a ViT the feature is the
class token.

Run.
    python methods/dino.py                                    two CPU cores, 4 to 10 minutes
    python methods/dino.py --recipe cifar10                   one GPU
    torchrun --nproc_per_node 8 methods/dino.py --recipe paper --data IMAGENET
--batch counts the images of all processes together. For the official 100-epoch run, add --batch 512
--tau-t 0.04 to the last command.

Reached. On emoji after 40 epochs, 236 s on two CPU cores: kNN 53.2 % (untrained 50.8, raw pixels
53.9); linear 56.6 % (untrained 53.3, raw pixels 54.1); mean of 6 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The blur kernel is a tenth of the view's side wide, so views below 20 pixels cannot be
       blurred | official code: Pillow's blur, for any side.
    2. A ResNet is trained by the same AdamW, on the same crops, as a ViT | official code: SGD with
       a weight decay of 1e-4, on other crops.
    3. The learning rate falls to 0 | official code: to 1e-6. The rows of the last layer always have
       length 1 | official code: for vit_small this can be switched off (--norm_last_layer).
    4. Position embeddings are interpolated to the grid of a small crop exactly | official code:
       adds 0.1 to the size of that grid, which changes the features by 0.3 %.
    5. The defaults are for minutes: a ResNet, batch-norm in the head, a sharper and faster teacher;
       the patches of a ViT have 4 pixels for images up to 48, 8 up to 96.
"""

import copy
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (ARCHS, VITS, Loader, Run, backbone, fail, first_batch, init_normal,
                    join_processes, load_data, parse, patch_side, save_grid)
from kernels.collectives import all_reduce_sum, distribute, rank, world
from kernels.views import (METHOD, Crop, color_jitter, denormalize, gaussian_blur, normalize,
                           random_flip, random_grayscale, solarize, whole_image)

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def dino_loss(student, teacher, center, tau_s, tau_t):
    """L, a scalar in nats. Only the student gets a gradient.

    student: (V, n, K), the large views first. teacher: (2, n, K), the large views. center: (K,)."""
    P_t = ((teacher.detach() - center) / tau_t).softmax(2)  # (2, n, K)
    log_P_s = F.log_softmax(student / tau_s, dim=2)  # (V, n, K)
    terms = []
    for i in range(2):
        for v in range(len(student)):
            if v != i:
                terms.append(-(P_t[i] * log_P_s[v]).sum(1).mean())
    return sum(terms) / len(terms)


@torch.no_grad()
def update_center(center, mean, momentum):
    """Eq. 4: center (K,) <- momentum center + (1 - momentum) mean, where mean (K,) is that of the
    teacher's outputs over the global batch."""
    center.lerp_(mean, 1 - momentum)


# The network.


class Head(nn.Module):
    """Section 3.1 and appendix C: three layers, L2-normalisation, and a linear layer with rows of
    length 1. Features (n, D) -> outputs (n, K), which are cosines."""

    def __init__(self, dim, hidden, outputs, norm, bottleneck=256):
        super().__init__()

        def hidden_layer(width):
            norm_layer = [nn.BatchNorm1d(hidden)] if norm else []
            return [nn.Linear(width, hidden), *norm_layer, nn.GELU()]

        first = hidden_layer(dim)
        second = hidden_layer(hidden)
        self.mlp = nn.Sequential(*first, *second, nn.Linear(hidden, bottleneck))
        self.apply(init_normal)
        self.last_layer = nn.Linear(bottleneck, outputs, bias=False)

    def forward(self, h):
        z = self.mlp(h)  # (n, bottleneck)
        # In full precision: the softmax of the loss divides these cosines by tau_t.
        with torch.autocast(z.device.type, enabled=False):
            w = F.normalize(self.last_layer.weight, dim=1)
            return F.normalize(z.to(w.dtype), dim=1) @ w.T


class DINO(nn.Module):
    def __init__(self, arch, size, hidden, outputs, head_norm, drop_path=0.0):
        super().__init__()
        network = backbone(arch, size, drop_path=drop_path)
        head = Head(network.out_dim, hidden, outputs, head_norm)
        self.student = nn.ModuleDict({"backbone": network, "head": head})
        # The teacher starts as the student. It is never given the numbers u that drop path needs.
        self.backbone = copy.deepcopy(network).requires_grad_(False)
        self.head = copy.deepcopy(head).requires_grad_(False)
        self.register_buffer("center", torch.zeros(outputs))

    def forward(self, crops, u=None):
        """crops: two large (n, 3, S, S), then small ones (n, 3, s, s). u (V, n, depth, 2): uniform
        numbers for drop path, None for none. Returns g_s (V, n, K) of all, g_t (2, n, K) of the
        large crops."""
        # The student: one pass per size, then the head for all crops together.
        h = self.features(crops[:2], None if u is None else u[:2])  # (2n, D)
        if len(crops) > 2:
            small = self.features(crops[2:], None if u is None else u[2:])
            h = torch.cat([h, small])  # (V n, D)
        student = self.student["head"](h)

        # The teacher sees the large crops only.
        with torch.no_grad():
            teacher = self.head(self.backbone(torch.cat(crops[:2])))  # (2n, K)
        student = student.unflatten(0, (len(crops), -1))
        return student, teacher.unflatten(0, (2, -1))

    def features(self, crops, u):
        """The student's features of crops of one size, one after the other."""
        x = torch.cat(crops)
        if u is None:  # always so for a ResNet
            return self.student["backbone"](x)
        return self.student["backbone"](x, u.flatten(0, 1))


# The views.


def views(args):
    """Section 3.2: two large and some small crops (multi-crop) with the distortions of BYOL. Only
    the second large one is solarised, with probability 0.2."""

    def distort(x, rand, blur, solar=0.0):
        x = random_flip(x, rand)
        x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
        x = random_grayscale(x, rand, p=0.2)
        x = gaussian_blur(x, rand, p=blur, sigma=(0.1, 2.0))
        x = solarize(x, rand, p=solar)
        return normalize(x)

    large = Crop(args.size, scale=(args.large_scale, 1.0))
    small = Crop(args.small_size, scale=(args.small_scale, args.large_scale))
    first = large, partial(distort, blur=args.blur1)
    second = large, partial(distort, blur=args.blur2, solar=0.2)
    others = small, partial(distort, blur=args.blur_small)
    return [first, second] + [others] * args.small_crops


def name_crops(crops):
    """The crops of views.png, with their headings."""
    shown = {}
    for v, crop in enumerate(crops):
        heading = f"large {v + 1}" if v < 2 else f"small {v - 1}"
        shown[heading] = denormalize(crop)
    return shown


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a large crop, pixels"),
    # in minutes a ResNet learns more than a ViT
    "arch": ("resnet14", "resnet18", "vit_small", "the backbone", ARCHS),
    "batch": (128, 512, 1024, "images per step, over all processes"),
    "epochs": (40, 200, 100, "passes over the training images; paper: 100 to 800"),
    "warmup": (2.0, 2.0, 10.0, "epochs of linear learning-rate warm-up"),
    "lr": (2e-3, 5e-4, 5e-4, "learning rate per 256 images"),
    "weight_decay": (0.04, 0.04, 0.04, "at the first step, on weights, not on biases or norms"),
    "weight_decay_end": (0.4, 0.4, 0.4, "weight decay at the last step; a cosine leads to it"),
    "drop_path": (0.0, 0.0, 0.1, "chance to skip the student's last ViT block (stochastic depth); "
                  "it grows linearly from 0 at the first block", "[0, 1)"),
    # 0.98 moves the teacher five times as fast as 0.996: a short run has few steps
    "m": (0.98, 0.99, 0.996, "momentum of the teacher; it rises to 1 by a cosine", "[0, 1]"),
    # 0.02: sharper than in the paper, so that it differs from uniform within a short run
    "tau_t": (0.02, 0.02, 0.07, "temperature of the teacher after its warm-up", "(0, inf)"),
    "tau_t_start": (0.02, 0.02, 0.04, "temperature of the teacher in the first epoch", "(0, inf)"),
    "tau_t_warmup": (0, 0, 30, "epochs in which it goes from the first to the last value"),
    "hidden": (512, 512, 2048, "hidden units of the head", "[1, inf)"),
    "outputs": (256, 256, 65536, "K, output dimensions of the head", "[1, inf)"),
    "head_norm": (True, True, False, "batch-norm in the head"),
    "small_crops": (2, 2, 8, "number of small crops"),
    "small_size": (16, 16, 96, "side of a small crop, pixels", "[1, inf)"),
    "small_scale": (0.15, 0.15, 0.05, "least share of the image's area in a small crop", "(0, 1]"),
    "large_scale": (0.4, 0.4, 0.4, "least share in a large crop, and largest in a small", "(0, 1]"),
    "blur1": (0.0, 0.0, 1.0, "probability of blur in the first large crop", "[0, 1]"),
    "blur2": (0.0, 0.0, 0.1, "probability of blur in the second large crop", "[0, 1]"),
    "blur_small": (0.0, 0.0, 0.5, "probability of blur in the small crops", "[0, 1]"),
}
TAU_S = 0.1  # the student's temperature
CENTER_MOMENTUM = 0.9
MAX_GRAD_NORM = 3.0  # largest norm of the gradient of one parameter
# Colours of attention.png, from 0 to 1: five of matplotlib's viridis.
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.small_scale > args.large_scale:
        fail(f"--small-scale {args.small_scale:g}: choose at most --large-scale, "
             f"which is {args.large_scale:g}")
    if args.arch in VITS and args.small_crops and args.small_size % patch_side(args.size):
        fail(f"--small-size {args.small_size}: choose a multiple of {patch_side(args.size)}, "
             "the side of a patch")
    if args.drop_path and args.arch not in VITS:
        fail(f"--drop-path {args.drop_path:g} needs a vision transformer: choose --drop-path 0, or "
             f"--arch {', '.join(VITS)}")

    # The blur's kernel has a tenth of the side in pixels: below 20 it would change nothing.
    if args.blur_small and args.small_crops and args.small_size < 20:
        fail(f"--blur-small {args.blur_small:g}: crops of {args.small_size} pixels are too small "
             "to blur; choose --blur-small 0, or --small-size 20 or more")
    if max(args.blur1, args.blur2) and args.size < 20:
        fail(f"--blur1 {args.blur1:g} --blur2 {args.blur2:g}: crops of {args.size} pixels are too "
             "small to blur; choose 0 for both, or --size 20 or more")
    return args


@torch.no_grad()
def ema_update(target, online, m):  # copy of: methods/moco.py::ema_update
    """target parameters <- m target + (1 - m) online. Buffers (batch statistics) are not averaged:
    each network keeps its own."""
    for t, o in zip(target.parameters(), online.parameters(), strict=True):
        t.lerp_(o, 1 - m)


def cosine(first, last, progress):
    """From `first` at progress 0 to `last` at 1, along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def teacher_temperature(epoch, first, last, epochs):
    """From `first` in epoch 0 to `last` in epoch `epochs` - 1, along a line; then `last`."""
    if epoch >= epochs:
        return last
    return first + (last - first) * epoch / max(1, epochs - 1)


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


def overlay(images, maps):
    """The colours of maps (n, heads, H, H), numbers from 0 to 1, over the grey images (n, 3, H, H):
    (n, heads, 3, H, H)."""
    colors = torch.tensor(VIRIDIS, device=maps.device) / 255  # (5, 3)
    place = maps * 4
    low = place.long().clamp(max=3)  # the colour below; the one above is next to it
    part = (place - low)[..., None]
    shade = torch.lerp(colors[low], colors[low + 1], part)  # (n, heads, H, H, 3)
    grey = images.mean(1)[:, None, None]  # (n, 1, 1, H, H)
    return 0.65 * shade.movedim(4, 2) + 0.35 * grey


def draw_attention(path, run):
    """Eight test images, each followed by one map per head: the attention of the class token in the
    last block, relative to its largest value."""
    split = run.data.test or run.data.bank
    view = whole_image(run.args.size, lambda x, rand: normalize(x))
    count = 8 * world()
    (x,) = first_batch(split, [view], count, run.args.seed, run.device)
    maps = run.model.backbone.attention(x).float()  # (8, heads, grid, grid)
    maps = maps / maps.amax((2, 3), keepdim=True)
    maps = F.interpolate(maps, x.shape[2:])  # (8, heads, H, H)

    images = denormalize(x)
    rows = [[image, *heads] for image, heads in zip(images, overlay(images, maps))]
    columns = ["image", *[f"head {h + 1}" for h in range(maps.shape[1])]]
    note = "yellow: the patches that the class token looks at, violet: those it does not"
    save_grid(path, rows, columns, note=note)


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = DINO(args.arch, args.size, args.hidden, args.outputs, args.head_norm, args.drop_path)
    model.to(device)
    teacher = nn.ModuleDict({"backbone": model.backbone, "head": model.head})
    matrices = [w for w in model.student.parameters() if w.ndim > 1]
    biases_and_norms = [w for w in model.student.parameters() if w.ndim == 1]
    groups = [{"params": matrices}, {"params": biases_and_norms}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
    # If all outputs are the same, the centre takes their value and P_t is uniform: L >= log K.
    collapsed = math.log(args.outputs)
    state = {"optimizer": optimizer}
    run = Run("dino", args, data, loader, model, state, ("collapsed", collapsed), name_crops)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        tau_t = teacher_temperature(epoch, args.tau_t_start, args.tau_t, args.tau_t_warmup)
        for step, crops in loader(epoch, run.step):
            progress = step / (args.epochs * loader.steps)
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            decay = cosine(args.weight_decay, args.weight_decay_end, progress)
            optimizer.param_groups[0]["weight_decay"] = decay  # of the matrices

            # Drop path: numbers for each image, crop, block and branch.
            u = None
            if args.drop_path:
                rand = loader.random(epoch, step, 0, METHOD)
                u = rand.uniform(columns=(len(crops), len(model.backbone.blocks), 2))
                u = u.transpose(0, 1).to(device, non_blocking=True)  # (V, n, depth, 2)

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                g_s, g_t = wrapped(crops, u)  # (V, n, K), (2, n, K)

            # The mean over the images of this process; DistributedDataParallel averages the
            # gradients of the processes.
            loss = dino_loss(g_s, g_t, model.center, TAU_S, tau_t)
            optimizer.zero_grad()
            loss.backward()
            for w in model.student.parameters():
                nn.utils.clip_grad_norm_(w, MAX_GRAD_NORM)  # each by itself, as officially
            if epoch == 0:  # the last layer is frozen in the first epoch, as in the paper
                model.student["head"].last_layer.weight.grad = None
            optimizer.step()

            # The centre and the teacher follow after the update.
            mean = all_reduce_sum(g_t.mean((0, 1))) / world()  # (K,)
            update_center(model.center, mean, CENTER_MOMENTUM)
            ema_update(teacher, model.student, cosine(args.m, 1.0, progress))
            run.log(loss, lr)
        run.end_epoch(epoch)
    if args.arch in VITS and rank() == 0:
        draw_attention(run.folder / "attention.png", run)
    run.finish()


if __name__ == "__main__":
    main()
