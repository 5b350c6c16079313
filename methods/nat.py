"""NAT: Unsupervised Learning by Predicting Noise (Noise As Targets).
Bojanowski, Joulin, ICML 2017. https://arxiv.org/abs/1704.05310
Official code (Lua Torch): https://github.com/facebookresearch/noise-as-targets

Idea. Every image gets a random point on a sphere as its target, and the network learns to send the
image there. The points never change, but the images may exchange theirs: in each batch, the targets
are dealt out anew so that each image gets one close to where the network sends it. Similar images
come to similar features, so they end up with neighbouring targets, although no label says what is
similar. All features cannot become the same, because the targets cover the whole sphere and each
belongs to one image alone.

Notation. M training images, N of them in the global batch, n = N / processes on this process;
x (n, 3, H, W) one view of each; h = f(x) (n, D) representation, kept for later use; z = g(h) (n, d)
embedding, L2-normalised, thrown away after training; C (M, d) targets, random unit vectors; label
(M,) a permutation: row label[k] of C is the target of image k, c (N, d) are those of the batch.

    L     = mean over images of  ||z_i - c_i||^2  =  mean of  2 - 2 z_i . c_i
    label : in every --permute-th epoch the targets of a batch are permuted by the P that maximises
            sum over i of  z_i . c_P(i),  found by the Hungarian method

If all embeddings are equal, no exchange helps and the loss is about 2. While training works, the
loss is lower in epochs with an exchange, where each image is offered a near target, than in the
others, where the network must remember.

Run.
    python methods/nat.py                                     one CPU core, about 4 minutes
    python methods/nat.py --recipe cifar10                    one GPU
    torchrun --nproc_per_node 8 methods/nat.py --recipe paper --data IMAGENET
--batch counts the images of all processes together.

Reached. On emoji after 36 epochs, 224 s on one busy core: kNN 52.2 % (untrained 49.9, raw pixels
53.9); linear 55.3 % (untrained 52.1, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. The network is a ResNet or ViT, followed by two hidden layers with batch-norm | paper:
       AlexNet with batch-norm, of which the two hidden layers are a part, with dropout between.
    2. The backbone looks at two image gradients, as in the paper, so that it cannot sort images by
       their colours; the untrained baseline does the same, the raw pixels are in colour. Beyond the
       border the outermost pixels are repeated | official code: zeros, which draw a frame.
    3. The loss is a mean over images | official code: a sum over the batch, so its learning rate
       0.01 is 2.56 here, for 256 images.
    4. The learning rate falls to zero by a cosine, after a warm-up where --warmup asks for one |
       official code: constant.
    5. Views are random resized crops, half of them mirrored | official code: squares of 224 pixels
       from an image of which the shorter side has 256, half of them mirrored. They are normalised
       by ImageNet's mean and deviation | official code: each by its own.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import ARCHS, Loader, Run, join_processes, load_data, parse
from kernels.collectives import all_reduce_sum, distribute, gather, rank
from kernels.views import Crop, denormalize, normalize, random_flip

KIND = "image"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def nat_loss(z, c):
    """The mean squared distance from the target. Returns a scalar between 0 and 4.

    z, c: (n, d) embeddings and their targets, both L2-normalised."""
    return (z - c).square().sum(1).mean()


def assign(z, c):
    """order (N,): image i gets target order[i]. Of all assignments this one has the largest sum of
    z_i . c_order[i], which for unit vectors is the smallest sum of squared distances. The Hungarian
    method finds it on the CPU, so a GPU waits for it."""
    from scipy.optimize import linear_sum_assignment  # here, so --help need not wait for it

    scores = z @ c.T  # (N, N)
    scores = scores.nan_to_num()  # of a run that diverges; its loss will end it with a sentence
    _, order = linear_sum_assignment(scores.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(z.device)


# The network.


def gradients(x):
    """Sobel filters: normalised images (n, 3, H, W) -> (n, 2, H, W), how fast the mean of the three
    channels grows from left to right, and from top to bottom."""
    smooth = torch.tensor([1.0, 2.0, 1.0]).to(x)
    slope = torch.tensor([-1.0, 0.0, 1.0]).to(x)
    across = torch.outer(smooth, slope)
    filters = torch.stack([across, across.T])[:, None]  # (2, 1, 3, 3)
    grey = x.mean(1, keepdim=True)  # (n, 1, H, W)
    grey = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(grey, filters)


def backbone(arch, size):
    """common.backbone that looks at the gradients of its input. Its third channel stays empty, so
    the weights have the shapes of the other methods'."""
    net = common.backbone(arch, size)

    def see_gradients(layer, inputs):
        both = gradients(inputs[0].float())  # (n, 2, H, W)
        return F.pad(both, (0, 0, 0, 0, 0, 1))  # (n, 3, H, W)

    net.first_layer.register_forward_pre_hook(see_gradients)
    return net


class NAT(nn.Module):
    def __init__(self, arch, size, hidden, dim, images):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.head = nn.Sequential(
            nn.Linear(self.backbone.out_dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, dim),
        )
        targets = F.normalize(torch.randn(images, dim), dim=1)
        self.register_buffer("targets", targets)  # C (M, d), never changed
        self.register_buffer("label", torch.randperm(images))  # (M,)

    def forward(self, x):
        h = self.backbone(x)  # (n, D)
        return self.head(h)  # (n, d)

    @torch.no_grad()
    def exchange(self, z, index):
        """The images `index` (N,) of a global batch, which the network sends to z (N, d), exchange
        their targets. Returns the share of them that got another one. If a file is broken, another
        is read in its place, so an image may stand twice in a batch: its first view counts."""
        first = (index[:, None] == index).int().argmax(1)  # (N,) where each image stands first
        repeated = first != torch.arange(len(index), device=index.device)
        old = self.label[index]  # (N,)

        # One more dimension, so long that later views get only the targets of later views.
        apart = 2 * len(index) ** 0.5 * repeated.to(z)[:, None]
        z = torch.cat([z, apart], 1)
        targets = torch.cat([self.targets[old], apart], 1)

        # Process 0 finds the assignment for all, so that rounding cannot make them differ.
        new = torch.zeros_like(old)
        if rank() == 0:
            new = old[assign(z, targets)]
        new = all_reduce_sum(new)[first]
        self.label[index] = new
        return (new != old).float().mean()


# The views.


def views(args):
    """A random crop and flip, in colour: the network itself looks at the gradients alone."""

    def augment(x, rand):
        x = random_flip(x, rand)
        return normalize(x)

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(crop, augment)]


# Training.

SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a view, pixels", "[2, inf)"),
    "arch": ("resnet14", "resnet18", "resnet50", "the backbone", ARCHS),
    # 64 instead of 256: four times as many steps per epoch, and 5,000 images give few
    "batch": (64, 256, 256, "images per step, over all processes; they exchange their targets"),
    "epochs": (36, 200, 100, "passes over the training images"),
    "warmup": (1.0, 1.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (0.4, 0.4, 2.56, "learning rate per 256 images"),
    "momentum": (0.9, 0.9, 0.0, "of SGD", "[0, 1)"),
    "weight_decay": (1e-4, 1e-4, 0.0, "on all parameters"),
    "permute": (3, 3, 3, "targets are exchanged in every so many epochs", "[1, inf)"),
    "hidden": (512, 1024, 4096, "units of the two hidden layers of the head", "[1, inf)"),
    # the paper's take 10 GB for ImageNet
    "dim": (64, 128, 2048, "dimensions d of the targets", "[2, inf)"),
    "min_crop": (0.3, 0.3, 0.77, "smallest crop, share of the image's area", "(0, 1]"),
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
    """For views.png: the view, and its two gradients; grey where nothing changes."""
    (x,) = views  # (n, 3, H, W)
    grey = 0.5 + gradients(x) / 16
    across, down = grey.clamp(0, 1).split(1, 1)  # (n, 1, H, W) each
    shown = {"view": denormalize(x), "across": across, "down": down}
    return {name: images.expand_as(x) for name, images in shown.items()}


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    model = NAT(args.arch, args.size, args.hidden, args.dim, loader.count)
    model.to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=0.0,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )
    state = {"optimizer": optimizer}
    run = Run("nat", args, data, loader, model, state, ("collapsed", 2.0), show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z = wrapped(x)  # (n, d)
            z = F.normalize(z.float(), dim=1)

            # The images of the global batch exchange their targets, before the loss looks at them.
            index = loader.index  # (n,)
            moved = 0.0
            if epoch % args.permute == 0:
                moved = model.exchange(gather(z.detach()), gather(index))
            c = model.targets[model.label[index]]  # (n, d)

            # The mean over the images of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N images.
            loss = nat_loss(z, c)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, moved=moved)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
