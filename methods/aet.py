"""AET: AET vs. AED: Unsupervised Representation Learning by Auto-Encoding Transformations.
Zhang, Qi, Wang, Luo, CVPR 2019. https://arxiv.org/abs/1901.04596
Official code: https://github.com/maple-research-lab/AET

Idea. Show the network an image and the same image transformed, and ask for the parameters of the
transformation. To tell how something was moved, turned and distorted, its features must say where
its parts are, before and after. An auto-encoder would have to paint the image; here the
transformation is decoded. RotNet's question, which of four turns it was, is a part of this one.

Notation. N images in the global batch, n = N / processes on this process; x (n, 3, H, W) images;
t(x) the same images transformed; theta (n, P) the parameters of t, normalised; h = f(x) (n, D)
representation, kept for later use; theta_hat (n, P) the estimate, by layers that are thrown away
after training. Eq. 1 and 2:

    L = mean over images and parameters of  (theta_hat(f(x), f(t(x))) - theta)^2

The parameters, in coordinates (u, v) in which the image is the square from 0 to 1:

    projective   P = 8: of the homography that says which point of x is seen at (u, v) of t(x),
                 ((a u + b v + c) / w, (d u + e v + f) / w),   w = g u + h v + 1
    affine       P = 6: cosine and sine of the angle, shift to the right and down, scale, shear

The dotted line is the loss of a network that always answers with the mean of the parameters.

Run.
    python methods/aet.py                                     one CPU core, about 14 minutes
    python methods/aet.py --recipe cifar10                    one GPU
    torchrun --nproc_per_node 8 methods/aet.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.
The run folder also gets restored.png: test images, transformed, and back by the estimate.

Reached. On emoji after 90 epochs, 863 s on one busy core: kNN 53.4 % (untrained 51.0, raw pixels
53.9); linear 56.2 % (untrained 53.8, raw pixels 54.1); mean of 4 runs. Other recipes: not run.

What to expect. On emoji the decoder learns shift and scale (a quarter of their variance is left),
the angle only roughly (for half of the images it is wrong by more than 40 degrees), the shear not
at all. With --transform projective a linear probe gains nothing (tests/results/LOG.md).

Differs from the paper. (This file | the paper, or the official code.)
    1. The network is a ResNet or ViT, whose last features are kept. Two hidden layers with
       batch-norm compare those of the two images | official code: Network-in-Network or AlexNet.
       One linear layer compares their last features, but earlier ones are kept.
    2. Homographies are normalised as in the official code for ImageNet: every number has about unit
       variance | official code, CIFAR-10: g and h are divided by nearly three times as much, so
       they count less in the loss. Affine parameters: as in the official code | paper: the entries
       of the matrix.
    3. With --fill border what lies beyond the image repeats its border (detail leaves streaks that
       tell half as much), because the outline of a grey filling shows the transformation of any
       image up to a quarter turn | grey, as the column `paper` has it.
    4. Corners and affine shifts are moved by any number of pixels | whole numbers. The centre of
       zooms and turns is that of the image | half a pixel beside it. Only t(x) is resampled. How
       soft it is tells half of the variance of an affine scale, even of images with as much detail
       at every scale; nothing is done about it, as in the official code.
    5. The loss is the mean of squares, as in the official code | paper: half of their sum.
    6. Crops are random resized crops | shifts by up to four pixels on CIFAR-10, random squares on
       ImageNet. The learning rate falls to zero by a cosine, after a warm-up | in steps.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (ARCHS, Loader, Run, backbone, first_batch, join_processes, load_data, parse,
                    save_grid)
from kernels.collectives import distribute, rank, world
from kernels.views import (AUGMENT, BatchRandom, Crop, denormalize, normalize, random_flip,
                           whole_image)

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def transformation_loss(estimate, theta):
    """Eq. 1 and 2: mean squared error of the normalised parameters, both (n, P)."""
    return F.mse_loss(estimate, theta)


# The network.

PARAMETERS = {"projective": 8, "affine": 6}


class AET(nn.Module):
    def __init__(self, arch, size, parameters):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        self.decoder = nn.Sequential(
            nn.Linear(2 * width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, parameters),
        )

    def forward(self, x, tx):
        # One pass for each, with batch statistics of its own, as in the official code.
        before = self.backbone(x)  # (n, D)
        after = self.backbone(tx)  # (n, D)
        return self.decoder(torch.cat([before, after], 1))  # (n, P)


# The views.

MEAN = (0.0, 0.0, 0.5, 0.0, 0.0, 0.5, 0.014, 0.014)  # of the homographies
STD = (0.75, 0.75, 0.53, 0.75, 0.75, 0.53, 0.17, 0.17)
# (u, v) of the corners, clockwise from the top left
CORNERS = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
ZOOM = 0.8, 1.2  # of the corners of a homography
SHIFT = 0.2  # of affine transformations, share of the side
SCALE = 0.3  # from 0.7 to 1.3
SHEAR = math.radians(30)


def draw_parameters(rand, args):
    """Normalised parameters theta (n, P), on the CPU. These are the first numbers that the
    augmentation draws, so the training loop can draw them again."""
    if args.transform == "projective":
        return draw_homographies(rand, args.shift)
    angle = rand.uniform(-math.pi, math.pi, columns=(1,))
    others = rand.uniform(-1, 1, columns=(4,))  # shifts, scale and shear, normalised
    return torch.cat([angle.cos(), angle.sin(), others], 1)


def draw_homographies(rand, shift):
    """Normalised parameters (n, 8). The corners of the image move away from its centre or towards
    it, by a common factor. Zero to three quarter turns then bring each to the place of another.
    Finally each moves by itself, by up to `shift` of the side in both directions."""
    turns = rand.uniform(0, 4).long()  # (n,)
    zoom = rand.uniform(*ZOOM, columns=(1, 1))
    moves = rand.uniform(-shift, shift, columns=(4, 2))

    corners = torch.tensor(CORNERS)  # (4, 2)
    order = (torch.arange(4) + turns[:, None]) % 4  # (n, 4)
    seen = 0.5 + zoom * (corners[order] - 0.5) + moves  # (n, 4, 2)
    theta = homography(seen.double(), corners.double())
    theta = (theta - theta.new_tensor(MEAN)) / theta.new_tensor(STD)
    return theta.to(seen)


def homography(points, targets):
    """The eight numbers a, ..., h, (n, 8), that send each of the four points (n, 4, 2) to its
    target (4, 2): a u + b v + c = u' (g u + h v + 1), and the same for v'."""
    u2, v2 = targets.expand_as(points).unbind(2)
    plain = F.pad(points, (0, 1), value=1.0)  # (n, 4, 3): u, v, 1
    zeros = torch.zeros_like(plain)
    for_u = torch.cat([plain, zeros, -u2[:, :, None] * points], 2)  # (n, 4, 8)
    for_v = torch.cat([zeros, plain, -v2[:, :, None] * points], 2)
    system = torch.cat([for_u, for_v], 1)  # (n, 8, 8)
    return torch.linalg.solve(system, torch.cat([u2, v2], 1))


def to_matrix(theta):
    """Normalised parameters (n, 8) or (n, 6) -> matrices (n, 3, 3) which say, for homogeneous
    coordinates (u, v, 1) of t(x), where in x this point comes from."""
    if theta.shape[1] == 8:
        numbers = theta * theta.new_tensor(STD) + theta.new_tensor(MEAN)
        return F.pad(numbers, (0, 1), value=1.0).unflatten(1, (3, 3))

    cos, sin, _, _, scale, shear = theta.unbind(1)
    angle = torch.atan2(sin, cos)
    skewed = angle + SHEAR * shear

    # Where t moves a point: a linear map around the centre, then the shift.
    linear = [angle.cos(), -skewed.sin(), angle.sin(), skewed.cos()]
    linear = torch.stack(linear, 1).unflatten(1, (2, 2))
    linear = linear * (1 + SCALE * scale).view(-1, 1, 1)  # (n, 2, 2)
    shift = SHIFT * theta[:, 2:4, None]  # (n, 2, 1)
    centre = theta.new_full((2, 1), 0.5)

    # The way back.
    back = torch.linalg.pinv(linear)  # an estimate may have no inverse
    upper = torch.cat([back, centre - back @ (centre + shift)], 2)  # (n, 2, 3)
    last = theta.new_tensor([0.0, 0.0, 1.0]).expand(len(theta), 1, 3)
    return torch.cat([upper, last], 1)


def warp(x, matrix, fill):
    """Images x (n, 3, H, H) in [0, 1], sampled at the points to which the matrices (n, 3, 3) send
    the pixels' centres, bilinearly. fill: "border" or "grey", for what lies beyond the image."""
    n, _, H, _ = x.shape
    centre = (torch.arange(H, device=x.device, dtype=x.dtype) + 0.5) / H
    v, u = torch.meshgrid(centre, centre, indexing="ij")
    points = torch.stack([u, v, torch.ones_like(u)]).flatten(1)  # (3, H H)
    points = matrix.to(x) @ points  # (n, 3, H H)

    # Coordinates from -1 to 1, as grid_sample wants them.
    grid = 2 * points[:, :2] / points[:, 2:] - 1
    grid = grid.mT.reshape(n, H, H, 2)
    if fill == "border":
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return F.grid_sample(x - 0.5, grid, align_corners=False) + 0.5


def views(args):
    """Crop and flip, then the image as it is and transformed. The flip must come first: of two
    images of which only one is mirrored no transformation tells."""

    def augment(x, rand):
        matrix = to_matrix(draw_parameters(rand, args))
        x = random_flip(x, rand)
        transformed = warp(x, matrix, args.fill)
        return torch.stack([normalize(x), normalize(transformed)], 1)  # (n, 2, 3, H, W)

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a view, pixels", "[2, inf)"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    "batch": (128, 512, 768, "images per step, over all processes; each also transformed"),
    "epochs": (90, 400, 200, "passes over the training images; official code, CIFAR-10: 1500"),
    "warmup": (1.0, 5.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (0.04, 0.05, 0.0033, "learning rate per 256 images"),
    "weight_decay": (5e-4, 5e-4, 5e-4, "on all parameters"),
    "transform": ("affine", *["projective"] * 2, "what moves an image", tuple(PARAMETERS)),
    # from 0.15 on, with the smallest zoom of 0.8, a homography may fold the image
    "shift": (*[0.125] * 3, "moves a corner of a homography, share of the side", "[0, 0.14]"),
    # the paper's grey shows the outline of the image, which tells all but quarter turns
    "fill": ("border", "border", "grey", "what lies beyond the image", ("border", "grey")),
    "min_crop": (0.5, 0.5, 0.5, "smallest crop, share of the image's area", "(0, 1]"),
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


def show(views):
    """For views.png: what is compared."""
    x, transformed = views[0].unbind(1)  # (n, 3, H, W) each
    return {"x": denormalize(x), "t(x)": denormalize(transformed)}


def constant_loss(args):
    """The loss of a network that always answers with the mean of the parameters: their variance."""
    theta = draw_parameters(BatchRandom([0], 10_000), args)
    return theta.var(0).mean().item()


@torch.no_grad()
def draw_restored(path, run):
    """Twelve test images: as they are, transformed, and transformed back by the estimate."""
    args = run.args
    split = run.data.test or run.data.bank
    view = whole_image(args.size, lambda x, rand: x)
    (x,) = first_batch(split, [view], 12 * world(), args.seed, run.device)  # (12, 3, H, W)
    theta = draw_parameters(BatchRandom([args.seed], len(x)), args)
    transformed = warp(x, to_matrix(theta), args.fill)

    run.model.eval()
    estimate = run.model(normalize(x), normalize(transformed))  # (12, P)
    run.model.train()
    way_back = torch.linalg.pinv(to_matrix(estimate.double()))
    restored = warp(transformed, way_back, args.fill)

    rows = list(zip(x, transformed, restored))
    note = f"{run.name}: images, transformed, and back by the estimate"
    save_grid(path, rows, ["x", "t(x)", "restored"], note=note)


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = AET(args.arch, args.size, PARAMETERS[args.transform]).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=0.0,
        momentum=0.9,
        nesterov=True,
        weight_decay=args.weight_decay,
    )
    state = {"optimizer": optimizer}
    reference = "the mean of the parameters", constant_loss(args)
    run = Run("aet", args, data, loader, model, state, reference, show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (pair,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            x, transformed = pair.unbind(1)  # (n, 3, H, W) each
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                estimate = wrapped(x, transformed)  # (n, P)

            # The numbers by which augment() transformed the images of view 0 in this step.
            rand = loader.random(epoch, step % loader.steps, 0, AUGMENT)
            theta = draw_parameters(rand, args).to(device, non_blocking=True)

            # The mean over the images of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N images.
            loss = transformation_loss(estimate.float(), theta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    if rank() == 0:
        draw_restored(run.folder / "restored.png", run)
    run.finish()


if __name__ == "__main__":
    main()
