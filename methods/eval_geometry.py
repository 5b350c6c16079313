"""Geometry of features: clusters, spectrum, dimension, smoothness and maps of trained networks.
Adjusted mutual information: Vinh et al., JMLR 2010. https://www.jmlr.org/papers/v11/vinh10a.html
Exponent of the spectrum: Agrawal et al., NeurIPS 2022. https://openreview.net/forum?id=ii9X4vtZGTZ
TwoNN: Facco et al., Scientific Reports 2017. https://doi.org/10.1038/s41598-017-11873-y
LiDAR: Thilak et al., 2023. https://arxiv.org/abs/2312.04000
Straight paths: Henaff et al., Nature Neuroscience 2019. https://doi.org/10.1038/s41593-019-0377-4
t-SNE: van der Maaten, Hinton, JMLR 2008. https://www.jmlr.org/papers/v9/vandermaaten08a.html

Idea. Accuracy tells what a network knows; geometry tells how it keeps it. Do images of one class
lie together although no label was shown? How many directions do the features use, and do they
repeat each other? Do the features change smoothly when an image is turned, moved or darkened?
Raw pixels and the networks before training show what training has changed. Labels are used only to
judge the clusters and to colour the maps. K-means features, a baseline of accuracy, have no row.

Notation. x (N, D) features of N test images (without labels: of the images); l_1 >= l_2 >= ... the
eigenvalues of their covariance, the variances along their principal directions. The words on the
left are choices of --only, the indented ones columns. Only those of clusters are better if larger.

    clusters    k-means on features of length 1, with K = number of classes and, in columns that end
                in _3k, 3 K clusters; mean and standard deviation of five seeds, in percent:
                nmi, ami, ari, accuracy   how well clusters agree with labels: see agreement().
                                Random clusters have 0 by ami and ari only
    spectrum    exponent        a of l_i ~ i^-a, how fast the variances fall: see exponent()
                participation   (sum l)^2 / sum l^2: how many directions hold most variance
                twonn           dimension of the surface on which the features lie: see twonn()
                correlation     mean |correlation| of two columns, less that of shuffled columns
                rankme, alignment, uniformity   explained at collapse_panel() in common.py
    lidar       how many directions tell images apart although the views differ, not how well:
                exp(entropy of the eigenvalues of W^-1 B), W the covariance of the views of an
                image, B that of the images: see lidar(). Noise has a high value, too
    smoothness  lipschitz       mean ||J(x)|| * mean ||x - x'|| / mean ||f(x) - f(x')||, over images
                                x and pairs x, x', J the Jacobian of f: a mean, not the largest
                rotation, shift, brightness   sum over k of ||f(x_k+1) - f(x_k)||, divided by
                                ||f(x_end) - f(x_0)||, while an image is turned, moved or darkened:
                                1 is a straight line; large for nearly invariant networks, too
                rotation_path, ...   that sum over mean ||f(x) - f(x')||: for these it is small
    tsne        maps in which near neighbours stay near; distances between groups mean nothing

Run.
    python methods/eval_geometry.py runs/simclr-emoji-0 runs/rotnet-emoji-0
    python methods/eval_geometry.py runs/*-emoji-* --only smoothness
    python methods/eval_geometry.py runs/*-emoji-* --data fashion --out runs/geometry-fashion
It writes results.jsonl, spectrum-DATA.png, tsne-DATA-category.png and, of drawings,
tsne-DATA-artist.png into --out, by default runs/eval_geometry. A "-" is a number that is not
defined. What is in results.jsonl is not measured again. An unreadable image ends the script.

Differs from the papers. (This file | the paper.)
    1. LiDAR: the noise of the views, W / q, is subtracted from B | it counts as information.
    2. LiDAR: a part of W's mean variance is added to its diagonal | a constant, on which the result
       depends if features are rescaled. 0 log 0 is 0 | each share plus a small number.
    3. TwoNN: the mean over the artists, if there are drawings | all images.
    4. Exponent: ranks 11 to 100 weigh the same | code: ranks from 4 on, rank i weighs 1 / i.
    5. Straight paths: length over distance of the ends | mean angle between successive steps.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (EMBEDDED, HERE, Loader, Results, candidates, collapse_panel, embed, features,
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
    """How fast the variances fall: a of l_i ~ i^-a, by least squares on the logarithms of
    eigenvalues (D,). i^-a is fitted from the 11th on, since the first ones follow no power law, to
    the 100th (or half of those above 0); nan if fewer than 26 are above 0. A large a: few
    directions matter."""
    # Below 1e-9 float32 gives noise; the last half is bent by the finite number of images.
    last = min(100, int((values > 1e-9 * values[0]).sum()) // 2)
    if last < 13:  # fewer than three points: no line
        return math.nan
    log_rank = np.log(np.arange(11, last + 1))
    log_value = values[10:last].log().numpy()
    return -np.polyfit(log_rank, log_value, 1)[0]


def eigenvalues(x):
    """The variances of features (N, D) along their principal directions: (min(N, D),) float64,
    descending."""
    deviations = torch.linalg.svdvals(x - x.mean(0)).double()
    return deviations**2 / (len(x) - 1)


def twonn(x):
    """The number of dimensions d of the surface on which features (N, D) lie, from the distances
    r1 < r2 of each image to its two nearest neighbours: P(r2 / r1 > m) = m^-d. d is the slope of a
    line through 0, fitted to -log P against log m, without the tenth of the largest ratios, as in
    the paper. Equal features count once; nan if fewer than ten are left, or if all ratios are 1.

    It is too low if there are few images for the dimension: for 315 Gaussian points, as many as the
    test images of one artist on emoji, in 10, 15 and 20 dimensions it is 9.2, 12.9 and 16.0 on
    average."""
    x = torch.unique(x, dim=0)
    if len(x) < 10:
        return math.nan

    # The faster way by products of matrices is wrong for near neighbours: it gives distances of 0.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    r1, r2 = distances.topk(2, largest=False).values.double().T
    kept = len(x) * 9 // 10
    log_m = (r2 / r1).log().sort().values[:kept]
    # Of the N ratios a share k / N is at most as large as the k-th smallest.
    share = torch.arange(1, kept + 1).double() / len(x)
    minus_log_p = -torch.log1p(-share)
    return (log_m @ minus_log_p) / (log_m @ log_m)


def correlation(x):
    """Mean |correlation| of two different columns of (N, D), less what it is by chance: that of
    the same columns, each in a random order. Constant columns are left out; nan if fewer than two
    are left."""
    x = x[:, x.amax(0) > x.amin(0)].double().numpy()
    count = x.shape[1]
    if count < 2:
        return math.nan
    shuffled = np.random.default_rng(0).permuted(x, axis=0)
    real, chance = [
        np.abs(np.corrcoef(columns, rowvar=False)).sum()
        for columns in (x, shuffled)
    ]
    return (real - chance) / (count * (count - 1))  # the ones of the diagonals cancel


def lidar(views):
    """LiDAR of features of q random views of n images (q, n, D): exp(entropy of the eigenvalues of
    W^-1 B), 1 to min(n - 1, D). W: covariance of an image's views around their mean, averaged over
    the images. A ten-thousandth of W's mean variance is added to its diagonal so that it can be
    inverted. B: covariance of the images' means, less this W / q, without eigenvalues below 0.

    W / q is the noise of a mean of q views. It would give all directions an eigenvalue of 1 / q: if
    600 images differ along 20 of 192 directions, as much as the views of an image do, lidar() finds
    24 directions from 50 views and 39 from 8, the paper's formula 39 and 100. Features without
    information about images have a high value all the same, a third of all directions, since noise
    has no preferred one.

    nan if the views of an image are all equal, or if no eigenvalue is above 0."""
    q, n, _ = views.shape
    means = views.mean(0)  # (n, D)
    root_of_between = (means - means.mean(0)).double() / math.sqrt(n - 1)  # (n, D)
    deviations = (views - means).flatten(0, 1)  # (q n, D)
    within = (deviations.T @ deviations).double() / (n * (q - 1))  # (D, D): W
    within.diagonal().add_(1e-4 * within.diagonal().mean())

    # With W = L L^T, the squared singular values of L^-1 root^T are the eigenvalues of W^-1 times
    # the covariance of the means. Less W / q, they are smaller by 1 / q.
    lower, failed = torch.linalg.cholesky_ex(within)
    if failed:
        return math.nan
    whitened = torch.linalg.solve_triangular(lower, root_of_between.T, upper=False)  # (D, n)
    values = torch.linalg.eigvalsh(whitened.T @ whitened)
    values = (values - 1 / q).clamp(min=0)
    return torch.special.entr(values / values.sum()).sum().exp()


def largest_singular_value(f, x, rounds):
    """The largest singular value (n,) of f's Jacobian J at each image of x (n, 3, H, W), by power
    iteration on J^T J. f must treat every image by itself: one gradient then holds all images' J.
    Ten rounds give somewhat too little, 0.94 to 1.00 of the value after 100 rounds."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator).to(x)
    x = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the faster kernels of attention have no second derivative
        # J^T u is linear in u, so its gradient with respect to u, in the direction v, is J v.
        h = f(x).flatten(1)  # (n, D)
        u = torch.zeros_like(h, requires_grad=True)
        (jt_u,) = torch.autograd.grad(h, x, u, create_graph=True)

        for _ in range(rounds):
            v = F.normalize(v.flatten(1), dim=1).view_as(x)
            (j_v,) = torch.autograd.grad(jt_u, u, v, retain_graph=True)
            (v,) = torch.autograd.grad(h, x, j_v, retain_graph=True)  # J^T J v
    return j_v.norm(dim=1)


def path_lengths(points):
    """Lengths of paths (steps, n, D): as they are (n,), and over the distance between their ends
    (n,), which is 1 for a straight line and nan where nothing moves."""
    length = points.diff(dim=0).norm(dim=2).sum(0)
    return length, length / (points[-1] - points[0]).norm(dim=1)


def rotated(images, degrees):
    """Images (n, 3, S, S), turned about the centre. The border continues outwards."""
    side = images.shape[3]
    wide = F.pad(images, [side // 4] * 4, "replicate")
    turned = TF.rotate(wide, degrees, TF.InterpolationMode.BILINEAR)
    return TF.center_crop(turned, side)


def shifted(images, pixels):
    """Images (n, 3, S, S), moved to the right by whole pixels. The border continues outwards."""
    # A negative number cuts pixels off.
    return F.pad(images, [pixels, -pixels, 0, 0], "replicate")


def paths(images):
    """{name of the change: generator of its steps}, each step the images (n, 3, H, W) in [0, 1]:
    turned by up to 30 degrees, moved in eight steps of equal whole pixels by a quarter of the side
    (of 48 pixels by a third, so compare shifts of one size), darkened to a half."""
    pixels = math.ceil(images.shape[3] / 32)
    return {
        "rotation": (rotated(images, degrees) for degrees in range(0, 31, 2)),
        "shift": (shifted(images, k * pixels) for k in range(9)),
        "brightness": (images * (1 - k / 32) for k in range(17)),
    }


def smoothness(network, images):
    """Measures how smoothly a network in eval mode changes at images (n, 3, S, S) in [0, 1].

    singular_value, lipschitz: how much the features change under the worst small change of pixels,
    as it is (mean of the largest singular value of the Jacobian), and relative to how much they
    change from one image to another: 1 for raw pixels up to a side of 32 (larger images are
    averaged to 32). Larger is less smooth.

    rotation, ...: median length of the path of an image's features, over the distance of its ends.
    1 is a straight line. A large number means a curved path, or a network that is nearly invariant:
    its path may end where it began. rotation_path, ... tell the two apart: over the mean distance
    between the features of two images, the paths of an invariant network are short."""
    x = normalize(images)
    largest = largest_singular_value(network, x, ROUNDS).mean()
    between_images = F.pdist(x.flatten(1)).mean()
    between_features = F.pdist(embed(network, x)).mean()
    result = {
        "singular_value": largest,
        "lipschitz": largest * between_images / between_features,
    }
    for name, steps in paths(images).items():
        embedded = torch.stack([embed(network, normalize(step)) for step in steps])
        length, ratio = path_lengths(embedded)
        result[name] = ratio.nanmedian()
        result[f"{name}_path"] = length.median() / between_features
    return result


def spectrum(x, drawing, x1, x2):
    """Spectrum, dimension and rank of features (N, D). drawing: (N,) or None. x1, x2 (M, D): of two
    random views of M images."""
    values = eigenvalues(x)
    shares = values / values.sum().clamp(min=1e-30)  # of the variance; 0 if all is equal
    groups = [x]
    if drawing is not None:
        # Of all drawings the nearest ones would be the same emoji by the other artists.
        groups = [x[(drawing == i).cpu()] for i in drawing.unique()]
    return {
        "exponent": exponent(values),
        "participation": participation(values),
        "twonn": np.mean([twonn(group) for group in groups]),
        "correlation": correlation(x),
        **collapse_panel(x, x1, x2),
        "shares": shares.round(decimals=9).tolist(),
    }


def agreement(assigned, labels):
    """How well clusters agree with labels, both (N,) integers, at most 1.

    nmi: the mutual information of cluster and label, divided by the mean of their entropies: 1 if
    they agree. Random clusters have more than 0; ami is corrected for this. ari: the share of pairs
    of images that both put together, or both put apart, corrected in the same way. accuracy: each
    class gets the one cluster that suits it, in the best assignment; share of images in the cluster
    of their class. One cluster for all has the share of the largest class, and with 3 K clusters
    the images of 2 K clusters count as wrong."""
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics

    counts = metrics.cluster.contingency_matrix(labels, assigned)  # (classes, clusters)
    pairs = linear_sum_assignment(counts, maximize=True)
    return {
        "nmi": metrics.normalized_mutual_info_score(labels, assigned),
        "ami": metrics.adjusted_mutual_info_score(labels, assigned),
        "ari": metrics.adjusted_rand_score(labels, assigned),
        "accuracy": counts[pairs].sum() / len(labels),
    }


def clusters(x, labels):
    """Agreement of the k-means clusters of features (N, D) with labels (N,), in percent: mean
    and standard deviation over the seeds, one start (k-means++) each."""
    from sklearn.cluster import KMeans

    x = F.normalize(x, dim=1).numpy()
    labels = labels.cpu().numpy()
    classes = len(np.unique(labels))
    scores = {}
    for ending, k in (("", classes), ("_3k", 3 * classes)):
        for seed in range(SEEDS):
            assigned = KMeans(k, random_state=seed).fit_predict(x)
            for name, score in agreement(assigned, labels).items():
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
    if np.ptp(x, 0).max() < 1e-6:
        return {"points": []}
    # scikit-learn's usual value, which must be less than the number of images.
    perplexity = min(30, (len(x) - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=0).fit_transform(x)
    return {"points": points.astype(float).round(1).tolist()}


# The evaluation.

SEEDS = 5  # of k-means: 0 to 4
ROUNDS = 10  # of the power iteration
UNLABELLED = ("spectrum", "lidar", "smoothness")
PROTOCOLS = ("clusters", *UNLABELLED, "tsne")
COLUMNS = {
    "clusters": ("nmi", "ami", "ari", "accuracy", "nmi_3k", "ami_3k", "ari_3k", "accuracy_3k"),
    "spectrum": ("exponent", "participation", "twonn", "rankme", "correlation", "alignment",
                 "uniformity"),
    "lidar": ("lidar",),
    "smoothness": ("lipschitz", "rotation", "shift", "brightness", "rotation_path",
                   "shift_path", "brightness_path"),
}
SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "seed": (0, "seed of the untrained network"),
    "data": ("", "data set or folder of images; if not given, that of the training"),
    "size": (0, "side of the images, pixels; 0: that of the training", "[0, inf)"),
    "only": ("all", "what is measured", ("all", *PROTOCOLS)),
    "images": (2000, "test images at most; 0: all"),
    "views": (50, "random views of each image for LiDAR", "[2, 1000]"),
    "probes": (64, "images at most at which smoothness is measured", "[2, inf)"),
}


def choose_protocols(name, split, chosen):
    """Tells what can be measured on this data. Without enough labels, clusters and maps are left
    out, or refused if nothing else is asked for."""
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
    # Of a collapsed network the measures would describe rounding errors: its features are made
    # exactly equal, and for views and paths a network takes its place that answers 0 everywhere.
    if x.std(0).max() <= 1e-6 * x.abs().max():
        x = torch.ones_like(x)
        network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Hardshrink(math.inf))

    def embed_views(count):
        """Features of random views, (count, n, D), on the CPU. A batch of images has 2,048 views at
        most, and a last incomplete batch is left out. Two views of up to 1,024 images are those of
        the results of every run."""
        view = Crop(size, scale=(0.2, 1.0)), flip_and_normalize
        batch = min(2048 // count, len(x))
        loader = Loader(split, [view] * count, batch, 0, device, args.workers)
        found = [
            torch.stack([embed(network, images).cpu() for images in views])
            for _, views in loader(epoch=0)
        ]
        return torch.cat(found, 1)

    whole = whole_image(size, lambda images, rand: images)
    jobs = {
        "clusters": lambda: clusters(x, split.labels),
        "spectrum": lambda: spectrum(x, split.drawing, *embed_views(2)),
        "lidar": lambda: {"lidar": lidar(embed_views(args.views))},
        "smoothness": lambda: smoothness(
            network, *first_batch(split, [whole], args.probes, 0, device)
        ),
        "tsne": lambda: tsne(x),
    }
    settings = {
        "clusters": {"clusters_per_class": [1, 3], "seeds": SEEDS},
        "lidar": {"views": args.views},
        "smoothness": {"probes": args.probes, "rounds": ROUNDS},
    }
    for name, rows in measured.items():
        rows[candidate.name] = results.measure(
            name, candidate, jobs[name], images=len(x), **settings.get(name, {})
        )


def table(results, columns):
    """{name: result} as text, one line per name."""
    width = max(map(len, results)) + 2
    lines = [" " * width + "".join(f"{column:>16}" for column in columns)]
    for name, result in results.items():
        words = [number(result[column], result.get(f"{column}_std")) for column in columns]
        lines.append(f"{name:{width}}" + "".join(f"{word:>16}" for word in words))
    return "\n".join(lines)


def number(value, deviation=None):
    if value is None:
        return "-"
    return f"{value:.4g}" if deviation is None else f"{value:.1f} ± {deviation:.1f}"


def draw_spectrum(path, results):
    """Draws the spectra of all networks, with their exponents."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # here, so --help need not wait for it

    figure = Figure((9, 3 + 0.17 * len(results)), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set(
        title="Spectrum of the features' covariance",
        xlabel="rank i of the principal direction",
        ylabel="its share of the variance",
        ylim=(1e-7, 1),
    )
    axes.set_prop_cycle(color=colormaps["tab20"].colors)
    for name, result in results.items():
        shares = result["shares"]
        axes.loglog(
            range(1, len(shares) + 1), shares, label=f"{name}: {number(result['exponent'])}"
        )
    figure.legend(loc="outside right upper", fontsize=8, title="exponent a of i^-a, from i = 11")
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def draw_maps(path, results, numbers, names, word):
    """Draws the t-SNE maps of all networks side by side. numbers (N,): places in `names`, by which
    the points are coloured. word: what the names are."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(4, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure((2.6 * columns + 1.8, 2.7 * rows + 0.5), dpi=110, layout="constrained")
    figure.suptitle(f"t-SNE of the features of test images, one colour per {word}")
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


def map_labels(data, split):
    """Yields the ways to colour a map: what a colour stands for, the number of each point's colour
    (N,), a name for each number."""
    for word, numbers, part in (
        ("category", split.labels, "categories"),
        ("artist", split.drawing, "drawings"),
    ):
        if numbers is not None:
            names = range(int(numbers.max()) + 1)
            if data in EMBEDDED:
                # tripod shows the clips of movers, with another camera.
                names = np.load(
                    HERE / f"tests/data/{data.replace('tripod', 'movers')}.npz"
                ).get(part, names)
            yield word, numbers.cpu().numpy(), names


def main(argv=None):
    args = parse(__doc__, SETTINGS, argv, runs="folders of finished runs, or their backbone.pt")
    device = join_processes(args.seed)
    if world() > 1:
        fail("eval_geometry runs in one process: start it with python instead of torchrun")
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
            for word, numbers, names in map_labels(name, split):
                path = folder / f"tsne-{data.name}-{word}.png"
                draw_maps(path, measured["tsne"], numbers, names, word)
    print0("")
    print_files(folder)


if __name__ == "__main__":
    main()
