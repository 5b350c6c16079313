"""Geometry of features: clusters, spectrum, dimension, smoothness and maps of trained networks.
Adjusted mutual information: Vinh, Epps, Bailey, JMLR 2010.
https://www.jmlr.org/papers/v11/vinh10a.html
Exponent of the spectrum: Agrawal et al., NeurIPS 2022. https://openreview.net/forum?id=ii9X4vtZGTZ
TwoNN: Facco et al., Scientific Reports 2017. https://doi.org/10.1038/s41598-017-11873-y
LiDAR: Thilak et al., 2023. https://arxiv.org/abs/2312.04000
Straight paths: Henaff et al., Nature Neuroscience 2019. https://doi.org/10.1038/s41593-019-0377-4
t-SNE: van der Maaten, Hinton, JMLR 2008. https://www.jmlr.org/papers/v9/vandermaaten08a.html

Idea. Accuracy tells what a network knows; geometry tells how it keeps it. Do images of one class
lie together although no label was shown? How many directions do the features use, and do they
repeat each other? Do the features change smoothly when an image is turned, moved or darkened?
Labels are used only to judge the clusters and to colour the maps.

Notation. x (N, D) features of N test images; l_1 >= l_2 >= ... the eigenvalues of their covariance,
which are the variances along their principal directions. --only chooses what is measured:

    clusters    k-means on features of length 1, with K = number of classes and (_3k) 3 K clusters;
                mean and standard deviation of five seeds, in percent:
                nmi, ami    how much the cluster of an image tells about its label (mutual
                            information), normalised; adjusted, so that random clusters have 0
                ari         on how many pairs of images both agree, adjusted (Rand index)
                accuracy    each class gets the one cluster that suits it, in the best assignment;
                            share of images in the cluster of their class. With 3 K clusters, the
                            images of 2 K clusters count as wrong
    spectrum    exponent        a of l_i ~ i^-a, fitted to i = 11 to 100, at most to half of the l_i
                                that are not 0, so 11 to 64 for 128 features
                participation   (sum l)^2 / sum l^2: how many directions hold most variance
                twonn           dimension d of the curved surface on which the features lie: the
                                distances r1 < r2 of an image to the two nearest others follow
                                P(r2 / r1 > m) = m^-d
                lidar           exp(entropy of the eigenvalues of W^-1 B): how many directions tell
                                images apart in spite of random views. W: covariance of the views of
                                an image; B: covariance of the images' mean features
                correlation     mean |correlation| of two columns, less that of shuffled columns
                rankme, alignment, uniformity: as in the results of every run
    smoothness  lipschitz       ||J(x)|| mean ||x - x'|| / mean ||f(x) - f(x')||: how much the
                                features change under the worst small change of pixels (largest
                                singular value of the Jacobian J), relative to how much they change
                                from one image to another. 1 for raw pixels; larger is less smooth
                rotation, shift, brightness   sum ||f(x_k+1) - f(x_k)|| / ||f(x_end) - f(x_0)||
                                while an image is turned, moved or darkened: 1 is a straight line
    tsne        maps in which near neighbours stay near; distances between groups mean nothing

Run.
    python methods/eval_geometry.py runs/simclr-emoji-0 runs/rotnet-emoji-0
    python methods/eval_geometry.py runs/* --only smoothness
    python methods/eval_geometry.py runs/* --data fashion --out runs/geometry-fashion
It writes results.jsonl, spectrum-DATA.png and tsne-DATA-category.png into --out, by default
runs/eval_geometry. A "-" in a table stands for a number that is not defined, as the exponent is not
if all features are equal. What is in results.jsonl is not measured again, so a command that was
stopped continues.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (EMBEDDED, HERE, Results, candidates, collapse_panel, embed, features,
                    first_batch, flip_and_normalize, join_processes, load_data, parse, print0,
                    print_files, replace_file, thin)
from kernels.collectives import fail, world
from kernels.views import Crop, normalize, whole_image

KIND = "evaluation"  # the tests ask for what is due to each kind

# The measure.


def participation(values):
    """(sum l)^2 / sum l^2 of eigenvalues (D,): 1 for one direction, D for D equal ones."""
    return values.sum() ** 2 / values.square().sum()


def exponent(values):
    """a of l_i ~ i^-a by least squares on logarithms, for ranks 11 to 100, or to half of the
    eigenvalues (D,) that are not 0; nan if these are fewer than 26."""
    last = min(100, int((values > 1e-9 * values[0]).sum()) // 2)
    if last < 13:
        return math.nan
    log_rank = np.log(np.arange(11, last + 1))
    log_value = values[10:last].log().numpy()
    return -np.polyfit(log_rank, log_value, 1)[0]


def eigenvalues(x):
    """The variances of features (N, D) along their principal directions: (min(N, D),) float64,
    descending."""
    deviations = torch.linalg.svdvals(x - x.mean(0)).double()
    return deviations.square() / (len(x) - 1)


def twonn(x):
    """Intrinsic dimension of features (N, D), from a line through 0 fitted to -log P(r2 / r1 > m)
    against log m, without the tenth of the largest ratios, as in the paper. Equal features count
    once; nan if fewer than ten are left, or if all ratios are 1."""
    x = torch.unique(x, dim=0)
    if len(x) < 10:
        return math.nan

    # The faster way by products of matrices is wrong for near neighbours: it gives distances of 0.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    r1, r2 = distances.topk(2, largest=False).values.double().T
    kept = len(x) * 9 // 10
    log_m = (r2 / r1).log().sort().values[:kept]
    share = torch.arange(1, kept + 1).double() / len(x)  # of images with at most this ratio
    minus_log_p = -torch.log1p(-share)
    return (log_m @ minus_log_p) / (log_m @ log_m)


def correlation(x):
    """Mean |correlation| of two different columns of (N, D), less what it is by chance: that of
    the same columns, each in a random order. Constant columns are left out; nan if fewer than two
    are left."""
    x = x[:, x.amax(0) > x.amin(0)].double().numpy()
    if x.shape[1] < 2:
        return math.nan
    shuffled = np.random.default_rng(0).permuted(x, axis=0)
    return mean_correlation(x) - mean_correlation(shuffled)


def mean_correlation(x):
    c = np.abs(np.corrcoef(x, rowvar=False))
    return (c.sum() - len(c)) / (c.size - len(c))  # without the ones of the diagonal


def lidar(views):
    """LiDAR of features of random views, (views, n, D): 1 to min(n - 1, D); nan if the views of an
    image are all equal. To the diagonal of W, a ten-thousandth of its mean is added | paper: a
    constant, with which the scale of the features would matter. 0 log 0 is 0 | paper: a small
    number is added to each eigenvalue's share."""
    count, n, _ = views.shape
    means = views.mean(0)  # (n, D)
    between = (means - means.mean(0)).double() / math.sqrt(n - 1)
    within = (views - means).flatten(0, 1)
    within = (within.T @ within).double() / (n * (count - 1))  # (D, D): W
    within.diagonal().add_(1e-4 * within.diagonal().mean())

    # W = L L^T. The eigenvalues of W^-1 B are the squared singular values of L^-1 between^T.
    lower, failed = torch.linalg.cholesky_ex(within)
    if failed:
        return math.nan
    half = torch.linalg.solve_triangular(lower, between.T, upper=False)  # (D, n)
    values = torch.linalg.eigvalsh(half.T @ half).clamp(min=0)
    return torch.special.entr(values / values.sum()).sum().exp()


def largest_singular_value(f, x, rounds=10):
    """Of the Jacobian J of f at each image of x (n, 3, H, W), by power iteration on J^T J: (n,). f
    treats each image by itself. Ten rounds come within about 3 % of the limit, from below."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator).to(x)
    x = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the faster kernels of attention have no second derivative
        h = f(x)  # (n, D)
        u = torch.zeros_like(h, requires_grad=True)
        (pulled,) = torch.autograd.grad(h, x, u, create_graph=True)  # J^T u, whose gradient is J

        for _ in range(rounds):
            v = F.normalize(v.flatten(1), dim=1).view_as(x)
            (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)  # J v
            (v,) = torch.autograd.grad(h, x, pushed, retain_graph=True)  # J^T J v
    return pushed.norm(dim=1)


def path_ratio(points):
    """Length of paths (steps, n, D) over the distance between their ends: (n,), 1 for a straight
    line, nan where nothing moves."""
    steps = points.diff(dim=0).norm(dim=2)
    return steps.sum(0) / (points[-1] - points[0]).norm(dim=1)


def rotated(images, degrees):
    """Images (n, 3, S, S), turned about the centre. The border continues outwards."""
    side = images.shape[3]
    wide = F.pad(images, [side // 4] * 4, "replicate")
    turned = TF.rotate(wide, degrees, TF.InterpolationMode.BILINEAR)
    return TF.center_crop(turned, [side, side])


def shifted(images, pixels):
    """Images (n, 3, S, S), moved to the right by whole pixels. The border continues outwards."""
    return F.pad(images, [pixels, -pixels, 0, 0], "replicate")


def paths(images):
    """{what is done: steps}, each step the images (n, 3, H, W) in [0, 1]: turned by 30 degrees,
    moved by a quarter of the side, darkened to a half."""
    pixels = math.ceil(images.shape[3] / 32)
    return {
        "rotation": (rotated(images, degrees) for degrees in range(0, 31, 2)),
        "shift": (shifted(images, k * pixels) for k in range(9)),
        "brightness": (images * (1 - k / 32) for k in range(17)),
    }


def smoothness(network, images):
    """Of a network in eval mode at images (n, 3, S, S) in [0, 1]: the mean of the largest singular
    value of its Jacobian, as it is and relative to the distances of images and of their features;
    medians of the ratios of paths."""
    x = normalize(images)
    largest = largest_singular_value(lambda x: network(x).flatten(1), x)
    between_images = F.pdist(x.flatten(1)).mean()
    between_features = F.pdist(embed(network, x)).mean()
    result = {
        "singular_value": largest.mean(),
        "lipschitz": largest.mean() * between_images / between_features,
    }
    for name, steps in paths(images).items():
        points = torch.stack([embed(network, normalize(step)) for step in steps])
        result[name] = path_ratio(points).nanmedian()
    return result


def spectrum(x, drawing, network, views):
    """Of features (N, D), and of random views of images: a list of batches. drawing: (N,) or None.
    twonn is measured for each artist and averaged: the four drawings of an emoji lie close together
    and would lower it."""
    values = eigenvalues(x)
    shares = values / values.sum().clamp(min=1e-30)  # of the variance; 0 if all is equal
    artists = [x]
    if drawing is not None:
        artists = [x[(drawing == i).cpu()] for i in drawing.unique()]
    views = torch.stack([embed(network, view).cpu() for view in views])
    return {
        "exponent": exponent(values),
        "participation": participation(values),
        "twonn": np.mean([twonn(part) for part in artists]),
        "lidar": lidar(views),
        "correlation": correlation(x),
        **collapse_panel(x, *views[:2]),
        "shares": shares.numpy().round(9).tolist(),
    }


def agreement(clusters, labels):
    """Of clusters with labels, both (N,) integers: nmi, ami, ari and accuracy, at most 1."""
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics

    counts = metrics.cluster.contingency_matrix(labels, clusters)  # (classes, clusters)
    pairs = linear_sum_assignment(counts, maximize=True)
    return {
        "nmi": metrics.normalized_mutual_info_score(labels, clusters),
        "ami": metrics.adjusted_mutual_info_score(labels, clusters),
        "ari": metrics.adjusted_rand_score(labels, clusters),
        "accuracy": counts[pairs].sum() / len(labels),
    }


def clusters(x, labels):
    """Agreement of the k-means clusters of features (N, D) with labels (N,), in percent: mean
    and standard deviation over five seeds, one start (k-means++) each."""
    from sklearn.cluster import KMeans

    x = F.normalize(x, dim=1).numpy()
    labels = labels.cpu().numpy()
    classes = len(np.unique(labels))
    scores = {}
    for ending, k in (("", classes), ("_3k", 3 * classes)):
        for seed in range(5):
            kmeans = KMeans(k, random_state=seed)
            for name, score in agreement(kmeans.fit_predict(x), labels).items():
                scores.setdefault(name + ending, []).append(score)

    result = {}
    for name, values in scores.items():
        result[name] = 100 * np.mean(values)
        result[f"{name}_std"] = 100 * np.std(values, ddof=1)
    return result


def tsne(x):
    """t-SNE of features (N, D) of length 1: points (N, 2), none if the features are all equal."""
    from sklearn.manifold import TSNE

    x = F.normalize(x, dim=1).numpy()
    if np.ptp(x, axis=0).max() < 1e-6:
        return {"points": []}
    perplexity = min(30, (len(x) - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=0).fit_transform(x)
    return {"points": points.astype(float).round(1).tolist()}


# The evaluation.

UNLABELLED = ("spectrum", "smoothness")
PROTOCOLS = ("clusters", *UNLABELLED, "tsne")
SCORES = ("nmi", "ami", "ari", "accuracy")
COLUMNS = {
    "clusters": (*SCORES, *(f"{score}_3k" for score in SCORES)),
    "spectrum": ("exponent", "participation", "twonn", "lidar", "rankme", "correlation",
                 "alignment", "uniformity"),
    "smoothness": ("lipschitz", "rotation", "shift", "brightness"),
}
SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "seed": (0, "seed of the untrained network"),
    "data": ("", "data set or folder of images; if not given, that of the training"),
    "size": (0, "side of the images, pixels; 0: that of the training", "[0, inf)"),
    "only": ("all", "what is measured", ("all", *PROTOCOLS)),
    "images": (2000, "test images at most; 0: all"),
    "views": (8, "random views of each of 1024 images for LiDAR; paper: 50", "[2, inf)"),
    "probes": (64, "images at most at which smoothness is measured", "[2, inf)"),
}


def choose_protocols(name, split, chosen):
    """What can be measured on this data. Without enough labels, clusters and maps are left out, or
    refused if nothing else is asked for."""
    count = len(split.images)
    if count < 10:
        fail(f"--data {name}: {count} images to evaluate; their geometry needs at least 10")
    classes = 0 if split.labels is None else len(split.labels.unique())
    enough = 2 <= classes <= count / 3  # k-means makes three clusters per class
    if enough or chosen in UNLABELLED:
        return PROTOCOLS if chosen == "all" else (chosen,)

    note = (
        f"clusters and tsne on {name} need labels of two or more classes, and three images per "
        f"class, not {count} images of {classes} classes"
    )
    if chosen != "all":
        fail(note)
    print0(f"left out: {note}")
    return UNLABELLED


def measure(candidate, split, measured, results):
    """Adds the results of one network to measured, {protocol: {name: result}}."""
    args = results.args
    device = results.device
    size = candidate.size
    network = candidate.network.to(device, memory_format=torch.channels_last)  # as in training
    x, readable = features(network, split, size, device, args.workers)
    x = x.float().cpu()
    if not readable.all():
        fail(f"--data {candidate.data}: remove the images that cannot be read")
    rounding = 1e-6 * x.abs().max()
    if (x - x[0]).abs().max() <= rounding:
        x = x[:1].repeat(len(x), 1)  # equal to the last bit

    def shown(views, count):
        return first_batch(split, views, count, 0, device)

    crop = Crop(size, scale=(0.2, 1.0)), flip_and_normalize  # as in the results of every run
    crops = [crop] * args.views
    whole = whole_image(size, lambda images, rand: images)
    jobs = {
        "clusters": lambda: clusters(x, split.labels),
        "spectrum": lambda: spectrum(x, split.drawing, network, shown(crops, 1024)),
        "smoothness": lambda: smoothness(network, *shown([whole], args.probes)),
        "tsne": lambda: tsne(x),
    }
    settings = {"images": len(x), "views": args.views, "probes": args.probes}
    for name, rows in measured.items():
        rows[candidate.name] = results.measure(name, candidate, jobs[name], **settings)


def table(results, columns):
    """{name: result} as text, one line per name."""
    width = max(len(name) for name in results) + 2
    lines = [" " * width + "".join(f"{column:>14}" for column in columns)]
    for name, result in results.items():
        words = [number(result[column], result.get(f"{column}_std")) for column in columns]
        lines.append(f"{name:{width}}" + "".join(f"{word:>14}" for word in words))
    return "\n".join(lines)


def number(value, deviation=None):
    if value is None:
        return "-"
    return f"{value:.4g}" if deviation is None else f"{value:.1f} ± {deviation:.1f}"


def draw_spectrum(path, results):
    """The spectra of all networks and their exponents. Networks whose names begin with the same
    word, as the runs of one method, have one colour."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # here, so --help need not wait for it

    figure = Figure((9, 3 + 0.17 * len(results)), dpi=110, layout="constrained")
    axes = figure.subplots()
    title = "Spectrum of the features' covariance"
    axes.set(title=title, xscale="log", yscale="log", ylim=(1e-7, 1))
    axes.set(xlabel="rank i of the principal direction", ylabel="its share of the variance")
    kinds = {}
    for name, result in results.items():
        shares = result["shares"]
        kind = kinds.setdefault(name.split("-")[0], len(kinds))
        label = f"{name}: {number(result['exponent'])}"
        color = colormaps["tab20"](kind % 20)
        axes.plot(range(1, len(shares) + 1), shares, color=color, label=label)
    figure.legend(loc="outside right upper", fontsize=8, title="exponent a of i^-a, from i = 11")
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def draw_maps(path, results, numbers, names, word):
    """The t-SNE maps of all networks side by side. numbers (N,): places in `names`, by which the
    points are coloured."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(4, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure((2.6 * columns + 1.8, 2.7 * rows + 0.5), dpi=110, layout="constrained")
    figure.suptitle(f"t-SNE of the features of test images; colours: {word}")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    palette = colormaps["turbo"].resampled(len(names))
    for axes, (name, result) in zip(panels, results.items()):
        points = result["points"]
        axes.set_title(name if points else f"{name}: all features are equal", fontsize=8)
        if points:
            axes.scatter(*zip(*points), s=4, lw=0, c=palette(numbers))

    for i, name in enumerate(names):
        panels[0].scatter([], [], color=palette(i), label=name)
    if len(names) <= 20:
        figure.legend(loc="outside right upper", fontsize=8)
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def colourings(data, split):
    """Of the points of a map: yields what a colour means, numbers (N,), a name for each number."""
    parts = ("category", split.labels, "categories"), ("artist", split.drawing, "drawings")
    for word, numbers, part in parts:
        if numbers is not None:
            names = range(int(numbers.max()) + 1)
            if data in EMBEDDED:
                names = np.load(HERE / "tests" / "data" / f"{data}.npz")[part]
            yield word, numbers.cpu().numpy(), names


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv, runs="folders of finished runs, or their backbone.pt")
    device = join_processes(args.seed)
    if world() > 1:
        fail("this takes a minute per network on one process: start it with python, not torchrun")
    found = candidates(args)
    results = Results("eval_geometry", args, device)
    for name in dict.fromkeys(candidate.data for candidate in found):
        data = load_data(name, args.root, device)
        split = thin(data.test or data.bank, args.images)
        protocols = choose_protocols(name, split, args.only)
        measured = {protocol: {} for protocol in protocols}
        for candidate in found:
            if candidate.data == name:
                measure(candidate, split, measured, results)

        folder = results.folder
        for protocol, rows in measured.items():
            if protocol in COLUMNS:
                print0(f"\n{name}, {protocol}\n{table(rows, COLUMNS[protocol])}")
        if "spectrum" in protocols:
            draw_spectrum(folder / f"spectrum-{data.name}.png", measured["spectrum"])
        if "tsne" in protocols:
            for word, numbers, names in colourings(data.name, split):
                path = folder / f"tsne-{data.name}-{word}.png"
                draw_maps(path, measured["tsne"], numbers, names, word)
    print0("")
    print_files(folder)


if __name__ == "__main__":
    main()
