"""RotNet: Unsupervised Representation Learning by Predicting Image Rotations.
Gidaris, Singh, Komodakis, ICLR 2018. https://arxiv.org/abs/1803.07728
Official code: https://github.com/gidariss/FeatureLearningRotNet

Idea. Turn every image by 0, 90, 180 and 270 degrees and ask the network which turn it was. Nobody can tell without
recognising what is in the picture and which way up such things usually stand, so the features that answer the question are
useful elsewhere. The turns are exact (no interpolation), so they leave no trace other than the content.

Notation. N images of the global batch, n = N / processes of them on this one; x (n, 4, 3, H, W) the four turns g(X | y) of
each, y = 0..3 for 0, 90, 180, 270 degrees counter-clockwise; h = f(x) (4n, D) representation; logits (4n, 4). Eq. 2 and 3:

    L = mean over images of  -1/4  sum over y of  log softmax(logits(g(X | y)))[y]                     chance: log 4 = 1.386

Run.
    python methods/rotnet.py                                              two CPU cores, 1 to 3 minutes: emoji, 32 pixels
    python methods/rotnet.py --data cifar10 --arch resnet18 --batch 128 --epochs 200                            one GPU
    torchrun --nproc_per_node 8 methods/rotnet.py --data IMAGENET --size 224 --arch resnet50 --batch 256 \
        --epochs 100 --min-crop 0.08 --workers 12                                                             eight GPUs
--batch counts the images of all processes together; the network sees four times as many. Results: the table in README.md.

Differs from the paper.
    1. The network is a ResNet and, before the classifier, two hidden layers that are thrown away. The paper uses
       Network-in-Network (CIFAR-10; it keeps the features of block 2 of 4) and AlexNet (ImageNet; middle layers are best):
       the last layers know about turns rather than things, and the hidden layers take their place.
    2. Crops are random resized crops on every data set; on CIFAR-10 the official code shifts by up to four pixels.
    3. Learning rate: cosine to zero with a warm-up; the official code divides it by five at epochs 60, 120 and 160 of 200.
    4. Inputs are normalised by ImageNet's mean and standard deviation on every data set.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common.py is found from any working directory
from common import Crop, Loader, Run, backbone, distribute, load_data, normalize, random_flip, start


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="emoji", help="emoji, fashion, fashion-mnist, cifar10, cifar100, stl10 or a folder")
    p.add_argument("--root", default="data", help="folder for downloaded data sets")
    p.add_argument("--size", type=int, default=32, help="side of a view, pixels (paper: 32 on CIFAR-10, 224 on ImageNet)")
    p.add_argument("--arch", default="resnet14", help="resnet14, resnet18, resnet34 or resnet50 (paper: NIN, AlexNet)")
    p.add_argument("--batch", type=int, default=128, help="images a step, over all processes; each turned 4 times (paper: 128)")
    p.add_argument("--epochs", type=int, default=12, help="passes over the training images (paper: 200; ImageNet: 30)")
    p.add_argument("--warmup", type=float, default=1, help="epochs of linear learning-rate warm-up (paper: 0)")
    p.add_argument("--lr", type=float, default=0.2, help="learning rate per 256 images (paper: 0.1 at 128)")
    p.add_argument("--weight-decay", type=float, default=5e-4, help="on all parameters (paper: 5e-4)")
    p.add_argument("--min-crop", type=float, default=0.5, help="smallest crop, share of the area (paper: 0.08 on ImageNet)")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and the views")
    p.add_argument("--eval-every", type=int, default=5, help="epochs between kNN evaluations")
    p.add_argument("--out", default=None, help="run folder (default: runs/rotnet-DATA-SEED); a run found there is continued")
    p.add_argument("--workers", type=int, default=4, help="processes that decode the images of a folder")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    return p.parse_args()


def views(args):
    """Crop and flip, then all four turns. The flip must come first: after a turn it would make 90 and 270 degrees the same
    question, because flip(rot90(x)) = rot270(flip(x))."""
    def augment(x, rand):
        x = normalize(random_flip(x, rand))
        return torch.stack([torch.rot90(x, turns, dims=(2, 3)) for turns in range(4)], dim=1)  # (n, 4, 3, H, W)

    return [(Crop(args.size, scale=(args.min_crop, 1.0)), augment)]


class RotNet(nn.Module):
    def __init__(self, arch, size):
        super().__init__()
        self.backbone = backbone(arch, size)
        width = self.backbone.out_dim
        self.classifier = nn.Sequential(  # two hidden layers, in place of the paper's two last convolutional blocks
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, 4))

    def forward(self, x):
        h = self.backbone(x)  # (4n, D)
        return self.classifier(h)  # (4n, 4)


def rotation_loss(logits):
    """Eq. 2 and 3: cross-entropy of the turn, in nats. logits (4n, 4), rows in the order image 0 turned by 0, 90, 180, 270
    degrees, image 1 turned by 0, ..., as (n, 4, ...).flatten(0, 1) lays them out."""
    turns = torch.arange(4, device=logits.device).repeat(len(logits) // 4)  # (4n,): 0 1 2 3 0 1 2 3 ...
    return F.cross_entropy(logits, turns)


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
    model = RotNet(args.arch, args.size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
    run = Run("rotnet", args, data, loader, model, {"optimizer": optimizer}, collapse=math.log(4))
    network = distribute(model, device, args.compile)

    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = network(x.flatten(0, 1))  # (4n, 4); all four turns in one pass, so they share batch statistics
            # The mean over this process's images; DistributedDataParallel averages the gradients of the processes.
            loss = rotation_loss(logits.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        run.end_epoch(epoch)
    run.finish()


if __name__ == "__main__":
    main()
