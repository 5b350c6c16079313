"""SimSiam: Exploring Simple Siamese Representation Learning.
Chen, He, CVPR 2021. https://arxiv.org/abs/2011.10566
Official code: https://github.com/facebookresearch/simsiam

Idea. One network sees two random views of an image (crops with changed colours). From its output
for one view a small predictor guesses its output for the other, which is held constant: no gradient
flows into it. There are neither negatives (other images to be told apart) nor a second, slowly
moving network. The same output for all images (collapse) would be the best solution; stopping the
gradient is what keeps training away from it.

Notation. N images in the global batch, n = N / processes on this process; x1, x2 (n, 3, H, W) two
views of each; h (n, D) representation from the backbone, kept for later use; z (n, d) projection of
h (f in the paper is backbone and projector); p = predictor(z) (n, d), called h in the paper.
Negative cosine (Eq. 1) and loss (Eq. 4), averaged over images:

    D(p, z) = - p / |p| . z / |z|
    L       = 1/2 D(p1, stopgrad(z2)) + 1/2 D(p2, stopgrad(z1))

Has it collapsed? The loss cannot tell: it approaches its least value, -1, in a good network as in a
collapsed one. Therefore `spread` is printed beside it, the standard deviation of z / |z| over the
images (section 4.1, Fig. 2): 1 / sqrt(d) if the outputs are spread evenly, 0 if all are the same.

Run.
    python methods/simsiam.py                                 two CPU cores, 7 minutes
    python methods/simsiam.py --recipe cifar10                one GPU
    torchrun --nproc_per_node 8 methods/simsiam.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.

Reached. On emoji after 80 epochs, 384 s on two CPU cores: kNN 56.1 % (untrained 50.8, raw pixels
53.9); linear 57.9 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. Residual branches do not start at zero, so that all methods start from the same network |
       official code: zero.
    2. The learning rate changes after every step | official code: after every epoch.
    3. Crops are resized by bicubic interpolation | official code: bilinear.
    4. The blur kernel is a tenth of the side | official code: Pillow's blur.
    5. The projector has three layers on all data | paper: two on CIFAR-10.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import ARCHS, Loader, Run, backbone, fail, join_processes, load_data, parse
from kernels.collectives import distribute, gather
from kernels.views import (Crop, color_jitter, gaussian_blur, normalize, random_flip,
                           random_grayscale)

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def negative_cosine(p, z):
    """Eq. 1 with stopgrad(z), Eq. 3, averaged over the n images. Returns a scalar from -1 to 1.

    p: (n, d) predictions; z: (n, d) what they should be, up to scale. z gets no gradient."""
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


def spread(z):
    """Section 4.1: the standard deviation of z / |z| over the N images, its mean over dimensions.
    z: (N, d). Returns a scalar."""
    return F.normalize(z, dim=1).std(0, correction=0).mean()


# The network.


class SimSiam(nn.Module):
    def __init__(self, arch, size, dim):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        # section 3: batch-norm at the output too; without scale and offset, as in the official code
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, dim, bias=False),
            nn.BatchNorm1d(dim, affine=False),
        )
        # a bottleneck; batch-norm at its output would make training unstable (Table 3)
        self.predictor = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False),
            nn.BatchNorm1d(dim // 4),
            nn.ReLU(),
            nn.Linear(dim // 4, dim),
        )

    def forward(self, x1, x2):
        # One view after the other: all batch statistics are of a single view (official code).
        z1 = self.projector(self.backbone(x1))  # (n, d)
        z2 = self.projector(self.backbone(x2))  # (n, d)
        return self.predictor(z1), self.predictor(z2), z1, z2  # (n, d) each


# The views.


def views(args):
    """MoCo v2's random crop, colour jitter, grey, blur and flip. Both views follow the same recipe,
    with independent draws."""

    def augment(x, rand):
        x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
        x = random_grayscale(x, rand, p=0.2)
        x = gaussian_blur(x, rand, p=args.blur, sigma=(0.1, 2.0))
        x = random_flip(x, rand)
        return normalize(x)

    crop = Crop(args.size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    return [(crop, augment), (crop, augment)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a view, pixels"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (64, 512, 512, "images per step, over all processes"),
    "epochs": (80, 800, 100, "passes over the training images; paper: 100 to 800"),
    "warmup": (0.0, 0.0, 0.0, "epochs of linear learning-rate warm-up"),
    # 0.4, 8 times the paper's: the 6,240 steps of emoji are few beside at least 250,000
    "lr": (0.4, 0.03, 0.05, "learning rate per 256 images"),
    "weight_decay": (1e-4, 5e-4, 1e-4, "on all parameters"),
    "dim": (512, 2048, 2048, "dimensions d of z and p; the predictor has d / 4", "[4, inf)"),
    "blur": (0.0, 0.0, 0.5, "probability of Gaussian blur", "[0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    # The blur's kernel has a tenth of the side in pixels: below 20 it would change nothing.
    if args.blur > 0 and args.size < 20:
        fail(f"--blur {args.blur:g}: views of {args.size} pixels are too small to blur; choose "
             "--blur 0, or --size 20 or more")
    return args


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
    model = SimSiam(args.arch, args.size, args.dim).to(device)
    encoder = nn.Sequential(model.backbone, model.projector)
    groups = [{"params": encoder.parameters()}, {"params": model.predictor.parameters()}]
    peak = args.lr * args.batch / 256
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9, weight_decay=args.weight_decay)
    state = {"optimizer": optimizer}
    run = Run("simsiam", args, data, loader, model, state, ("collapsed", -1.0))
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            # Only the encoder's rate falls. The predictor's, of group 1, stays at its peak, so that
            # it keeps up with the newest z (section 4.2).
            lr = learning_rate(step, args, loader.steps)
            optimizer.param_groups[0]["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                p1, p2, z1, z2 = wrapped(x1, x2)  # (n, d) each
            first = negative_cosine(p1.float(), z2.float())
            second = negative_cosine(p2.float(), z1.float())

            # The mean over the images of this process; DistributedDataParallel averages the
            # gradients of the processes.
            loss = (first + second) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            z = gather(z1.detach().float())  # (N, d)
            run.log(loss, lr, spread=spread(z))
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
