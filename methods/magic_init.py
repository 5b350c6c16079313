"""Magic init: Data-dependent Initializations of Convolutional Neural Networks.
Krähenbühl, Doersch, Donahue, Darrell, ICLR 2016. https://arxiv.org/abs/1511.06856
Official code (Caffe): https://github.com/philkr/magic_init

Idea. How far does a network come without any training, if its first weights are chosen with a look
at the data? Within each layer, every channel gets the same mean and spread on real images, so that
none is always or never active. Between layers, the weights are scaled such that all layers learn at
the same relative speed once training starts. The filters themselves may be random, or the principal
directions (PCA) of what the layer sees, or its typical patches, found by k-means: groups of similar
patches, each with a centre. Each pretext task of its time was compared with this, and the networks
of other methods were rescaled by it before they were compared.

Notation. Layers l = 1 ... L, each a convolution with weights W_l and the batch-norm after it; on N
real images, b_lc is the output of channel c of the convolution and a_lc that of the batch-norm,
before the ReLU; dW_l the gradient of W_l if standard normal noise is put on the network's output;
r_l the relative speed: how large a gradient step is beside the weights.

    within layers, in the order in which the image passes them:
        W_lc <- W_lc / std(b_lc),   then an offset such that  mean(a_lc) = beta = 0.1
    between layers:
        r_l = sqrt(mean(dW_l^2) / mean(W_l^2)),   W_l <- W_l sqrt(r_l / geometric mean of all r)

Run.
    python methods/magic_init.py                              one CPU core, half a minute
    python methods/magic_init.py --run runs/rotnet-emoji-0    rescales the network of a run
    torchrun --nproc_per_node 8 methods/magic_init.py --recipe paper --data IMAGENET
--batch counts the images of all processes together: those whose statistics are used. At the end a
table, also in metrics.jsonl, compares He's weights with all three kinds of filters; backbone.pt has
the kind that --filters names. filters.png shows filters of the first layer. With --run the folder
RUN-rescaled gets a backbone.pt with the features of the run; only its layers' speeds are changed.

Reached. On emoji after 0 epochs, 30 s on one busy core: kNN 55.0 % (untrained 50.8, raw pixels
53.9); linear 54.4 % (untrained 53.3, raw pixels 54.1); mean of 3 runs. Other recipes: not run.

What to expect. Means of three seeds on emoji, linear / kNN: He 53.3 / 50.8, rescaled 48.4 / 52.2,
PCA 48.4 / 50.2, k-means 54.4 / 55.0. The calibrated statistics lose (Difference 1): with --beta 0
rescaled weights, which are He's with nothing else changed, have 46.7 / 50.1.

Differs from the paper. (This file | the paper, or the official code.)
    1. The network is a ResNet, whose layers end in a batch-norm | official code: AlexNet and others
       without; it warns of batch-norm and of branches. Our batch-norm takes the offset and, as its
       running statistics, those of the initial images. In training it cancels the division by
       std(b_lc): of the step within layers only the offset is left. In evaluation He's batch-norm
       has mean 0, variance 1, so He against rescaled compares calibrated statistics with none.
    2. Batch-norm makes the output independent of the scale of W_l. One round of the step between
       layers is therefore exact, and it changes no feature | official code: up to ten rounds, with
       biases and outputs rescaled along the way. Gradients pass through the batch's statistics.
    3. Filters are found on patches of the layer's input | official code: on outputs of random
       filters, which hold the same. Directions with less than a millionth of the largest variance
       are dropped | official code: a sum of squares below 1e-6; it adds 0.001 to the others.
    4. Some layers, the stem of resnet14 among them, have more filters than their input has
       directions. PCA fills the rest with random mixtures of them, whitened | official code: zeros.
"""

import copy
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (RESNETS, Loader, Run, backbone, draw_views, fail, join_processes,
                    load_backbone, load_data, parse, print0, read_lines, save_grid, save_tensors,
                    write_lines)
from kernels.collectives import all_reduce_sum, gather, leave_processes, rank
from kernels.views import normalize, whole_image

KIND = "initialisation"  # nothing is trained; the tests ask for what is due to each kind

# The initialisation.


def layers(net):
    """[(convolution, the batch-norm after it), ...] of a ResNet. They alternate, in the shortcuts
    beside its blocks, too."""
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    found = [module for module in net.modules() if isinstance(module, kinds)]
    return list(zip(found[::2], found[1::2], strict=True))


@torch.no_grad()
def within_layers(net, x, filters, beta, seed):
    """Each channel gets the mean beta and the deviation 1 on the images x (N, 3, S, S), and if
    `filters` is pca or kmeans each layer new filters. One pass: a layer is treated when the images
    reach it, so its input comes from layers that are ready."""
    rng = np.random.default_rng(seed)
    handles = []
    for conv, norm in layers(net):

        def treat(conv, inputs, output, norm=norm):
            if filters != "rescaled":
                conv.weight.copy_(new_filters(conv, inputs[0], filters, rng))
                output = F.conv2d(inputs[0], conv.weight, None, conv.stride, conv.padding)
            std, mean = torch.std_mean(output, (0, 2, 3), correction=0)  # (out,) each
            std = std.clamp(min=1e-6)  # of a channel that is constant

            # The output gets the deviation 1. The batch-norm takes the statistics of the images as
            # its running ones, and adds the offset beta. The next layer sees the new output.
            conv.weight.div_(std.view(-1, 1, 1, 1))
            norm.running_mean.copy_(mean / std)
            norm.running_var.fill_(1)
            norm.weight.fill_(1)
            norm.bias.fill_(beta)
            return output / std.view(-1, 1, 1)

        handles.append(conv.register_forward_hook(treat))
    net.eval()(x)
    for handle in handles:
        handle.remove()


def new_filters(conv, x, kind, rng, most=10_000):
    """Filters (out, in, k, k) from the patches that a convolution sees in its input x. Of more than
    `most` patches some are used; where there are fewer than filters, or all are the same, the
    filters are random."""
    patches = F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride)
    patches = patches.transpose(1, 2).flatten(0, 1)  # (M, D), D = in k k
    chosen = np.sort(rng.permutation(len(patches))[:most])
    patches = patches[torch.from_numpy(chosen).to(x.device)]
    patches = patches.double() - patches.mean(0)
    out = len(conv.weight)
    if len(patches) < out or not patches.any():  # too few, or all the same: plain images
        return torch.from_numpy(rng.standard_normal(conv.weight.shape)).to(x)

    # Whitening: the leading directions (D, K), each divided by its deviation.
    covariance = patches.T @ patches / len(patches)
    variance, directions = torch.linalg.eigh(covariance)  # from the least to the largest
    usable = (variance > 1e-6 * variance[-1]).sum()
    count = min(out, int(usable))
    whitening = directions[:, -count:] / variance[-count:].sqrt()

    if kind == "pca":
        mixtures = rng.standard_normal((out - count, count))
        mixtures = torch.from_numpy(mixtures).to(x.device)
        weight = torch.cat([whitening.T, mixtures @ whitening.T])
    else:
        white = F.normalize(patches @ whitening, dim=1)  # (M, K): long ones shall not decide
        weight = typical(white, out, rng) @ whitening.T
    return weight.view_as(conv.weight).to(x)


def typical(white, count, rng):
    """The centres (count, K) of k-means of unit vectors (M, K)."""
    from sklearn.cluster import MiniBatchKMeans  # here, so --help need not wait for it

    seed = int(rng.integers(2**31))
    kmeans = MiniBatchKMeans(count, batch_size=10 * count, n_init=1, random_state=seed)
    kmeans.fit(white.cpu().numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(white)


def speeds(net, x, seed):
    """r (L,) of all layers in a training step on x, with noise as the gradient of the features."""
    net = copy.deepcopy(net).train().requires_grad_()  # its running statistics will change
    h = net(x)  # (N, D)
    noise = np.random.default_rng(seed).standard_normal(h.shape)
    h.backward(torch.from_numpy(noise).to(h))
    found = []
    for conv, _ in layers(net):
        gradient = conv.weight.grad.square().mean()
        weight = conv.weight.detach().square().mean()
        found.append((gradient / weight).sqrt())
    return torch.stack(found)


@torch.no_grad()
def between_layers(net, x, seed):
    """All layers get the speed that is the geometric mean of their speeds. The batch-norm follows
    the scale of its input, so the features stay as they are."""
    with torch.enable_grad():
        r = speeds(net, x, seed)
    scales = (r / r.log().mean().exp()).sqrt()
    for (conv, norm), scale in zip(layers(net), scales):
        conv.weight.mul_(scale)
        norm.running_mean.mul_(scale)
        norm.running_var.mul_(scale.square())


# The views.


def views(args):
    """The whole image, in colour, as the evaluation sees it."""
    return [whole_image(args.size, lambda x, rand: normalize(x))]


# The run.

FILTERS = ("rescaled", "pca", "kmeans")
SETTINGS = {
    "recipe": ("emoji", "paper", "which column gives the defaults"),
    "size": (32, 224, "side of an image, pixels", "[2, inf)"),
    "arch": ("resnet14", "resnet50", "the backbone", RESNETS),
    "batch": (1000, 160, "images whose statistics are used, over all processes"),
    "filters": ("kmeans", "kmeans", "random ones, PCA or k-means, in backbone.pt", FILTERS),
    "beta": (0.1, 0.1, "mean of each channel before the ReLU", "(-inf, inf)"),
    "run": ("", "", "rescale the network of this finished run, and initialise none"),
    # so that a run folder is that of the other methods
    "epochs": (0, 0, "passes over the training images: there is no training", "[0, 0]"),
}


def draw_filters(path, networks, shown=12):
    """Filters of the first layer, one row per kind, each between its least and largest number. So
    the rescaled ones would look like He's, and are left out."""
    networks = {name: net for name, net in networks.items() if name != "rescaled"}
    rows = []
    for net in networks.values():
        weight = net.first_layer.weight.detach()  # (out, 3, k, k)
        # Of PCA these are the leading directions; filters after them are random mixtures.
        count = min(len(weight), weight[0].numel())
        weight = weight[count - shown : count]
        low = weight.amin((1, 2, 3), keepdim=True)
        high = weight.amax((1, 2, 3), keepdim=True)
        rows.append((weight - low) / (high - low))
    columns = [str(i + 1) for i in range(len(rows[0]))]
    note = f"{len(columns)} filters of the first layer; from the top: {', '.join(networks)}"
    save_grid(path, rows, columns, note=note)


def initial_images(args, data, device):
    """The images whose statistics are used, the same in every process (N, 3, S, S); the loader."""
    loader = Loader(data.train, views(args), args.batch, args.seed, device, args.workers)
    _, (x,) = next(loader(0))
    return gather(x), loader


def spread(r):
    """How many times as fast as the slowest layer the fastest one learns."""
    return (r.max() / r.min()).item()


def compare(run, networks, x):
    """Prints one line per network: its evaluation and the spread of its speeds. Returns {filters:
    {column: number}}."""
    heads = ("knn20", "knn200", "linear", "retrieval1", "retrieval5", "rankme", "speeds")
    run.measure_baselines()
    found = {"He": dict(run.baselines["random_init"])}
    for name in FILTERS:
        print0(f"evaluating: {name}")
        found[name] = run.evaluate(networks[name])
    for name, net in networks.items():
        found[name]["speeds"] = spread(speeds(net, x, run.args.seed))

    heads = [head for head in heads if head in found["He"]]  # fewer without labels
    print0(f"{'filters':14}" + "".join(f"{head:>11}" for head in heads))
    for name, row in found.items():
        print0(f"{name:14}" + "".join(f"{row[head]:11.1f}" for head in heads))
    print0("speeds: of the layer that learns fastest, relative to the slowest\n")
    return found


def rescale(args, device):
    """--run: the network of a run with equal speeds, in a folder of its own."""
    net = load_backbone(args.run)
    if net.arch not in RESNETS:
        fail(f"--run {args.run}: {net.arch} has no batch-norm; give a run with a ResNet")
    folder = Path(args.run)
    folder = folder if folder.is_dir() else folder.parent
    out = Path(args.out.replace("METHOD-DATA-SEED", f"{folder.resolve().name}-rescaled"))
    if (out / "backbone.pt").exists():
        fail(f"--out {out}: holds a network already; choose another folder")

    # Its own images, at the size at which it was trained.
    metrics = folder / "metrics.jsonl"
    lines = read_lines(metrics)
    source = lines[0]["settings"]["data"] if lines else net.data
    data = load_data(source, args.root, device)
    args.size = net.size
    net.to(device)
    x, _ = initial_images(args, data, device)
    before = spread(speeds(net, x, args.seed))
    between_layers(net, x, args.seed)
    after = spread(speeds(net, x, args.seed))

    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        about = {name: getattr(net, name) for name in ("method", "data", "arch", "size")}
        save_tensors(out / "backbone.pt", {**about, "weights": net.state_dict()})
        if lines:  # "rescaled": so that nobody takes it for the run itself
            lines[0]["settings"]["rescaled"] = True
            write_lines(out / "metrics.jsonl", lines)
    text = f"the fastest layer learnt {before:.1f} times as fast as the slowest, now {after:.1f}"
    print0(f"{out}: {text}")
    leave_processes()


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    device = join_processes(args.seed)
    if args.run:
        rescale(args, device)
        return
    data = load_data(args.data, args.root, device)
    x, loader = initial_images(args, data, device)
    net = backbone(args.arch, args.size)
    model = nn.Sequential(OrderedDict(backbone=net)).to(device)
    run = Run("magic_init", args, data, loader, model, {})

    # What was interrupted begins again: until its end the run folder has the first weights alone.
    table = None
    if not (run.folder / "backbone.pt").exists():
        began = time.perf_counter()
        networks = {"He": copy.deepcopy(net)}
        for filters in FILTERS:
            networks[filters] = copy.deepcopy(net)
            within_layers(networks[filters], x, filters, args.beta, args.seed)
            between_layers(networks[filters], x, args.seed)

            # All processes take the weights of process 0: rounding might make theirs differ.
            for tensor in networks[filters].state_dict().values():
                tensor.copy_(all_reduce_sum(tensor * (rank() == 0)))
        run.seconds = time.perf_counter() - began
        net.load_state_dict(networks[args.filters].state_dict())

        table = compare(run, networks, x)
        if rank() == 0:
            draw_views(run.folder / "views.png", run)
            draw_filters(run.folder / "filters.png", networks)
    run.finish(table=table)


if __name__ == "__main__":
    main()
