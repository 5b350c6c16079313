"""What the evaluations show, in words: a paragraph per topic for tests/results/EVALUATIONS.md and,
by short(), a sentence each of six topics for README.md. Their numbers are those of the tables.

report.py calls blocks(). The functions below make words from the networks that were measured,
{table: {network: ...}}, see evaluations.collect(); None leaves them out.
"""

import statistics
import textwrap
from typing import NamedTuple

import evaluations
from evaluations import at_defaults, mean

UNTRAINED = "untrained resnet14, 32 px"
RAW = "raw pixels, 32 px"
KMEANS = "k-means, 32 px"
BASELINES = {"the untrained network": UNTRAINED, "raw pixels": RAW, "k-means features": KMEANS}


def start(name, networks):
    """The untrained network of a trained one: its own, or the one that most methods share."""
    return evaluations.own_start(name, networks) or UNTRAINED


def numbers_of(networks, *place):
    """{network: a number, the mean over its runs}, of those that were measured."""
    found = {name: mean(networks, name, *place) for name in networks}
    return {name: number for name, number in found.items() if number is not None}


def by_method(by_network):
    """{method: its number}, of the networks at their defaults."""
    return {n.split("**")[1]: number for n, number in by_network.items() if at_defaults(n)}


def over_untrained(networks, *place):
    """By how much the mean of the methods is above that of the same networks untrained."""
    known = numbers_of(networks, *place)
    pairs = [
        evaluations.beside_start(networks, name, start(name, known), *place)
        for name in known
        if at_defaults(name)
    ]
    return statistics.mean(trained - untrained for trained, untrained in filter(None, pairs))


def highest(numbers):
    """{method: number} -> "exemplar 58.3" """
    best = max(numbers, key=numbers.get)
    return f"{best} {numbers[best]:.1f}"


def baselines(by_network):
    """"the untrained network 46.7, raw pixels 39.9, k-means features 55.7", as far as known."""
    known = {word: by_network[name] for word, name in BASELINES.items() if name in by_network}
    return ", ".join(f"{word} {number:.1f}" for word, number in known.items())


def listed(words):
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def artist(networks):
    place = networks["features"], "robustness", "artist_new/mean"
    found = numbers_of(*place)
    return (
        "**A new artist.** A probe learns from three artists and is tested on the fourth. Its "
        f"accuracy in percent: the best, {highest(by_method(found))}; {baselines(found)}. The "
        f"methods have on average {over_untrained(*place):.1f} points more than the same networks "
        "untrained. The probe has never seen the fourth style; the networks have, without labels."
    )


def fall(accuracies):
    """In points, from the best stage to the last."""
    return max(accuracies) - accuracies[-1]


def best_early(found):
    """How many of the trained ResNets are best after layer1 or layer2, and how many there are.
    found: {network: its accuracy after each stage}"""
    best = []  # stage of each trained ResNet
    for name, accuracies in found.items():
        if at_defaults(name) and len(accuracies) == len(evaluations.LAYERS):
            best.append(evaluations.LAYERS[accuracies.index(max(accuracies))])
    return sum(stage in ("layer1", "layer2") for stage in best), len(best)


class Falls(NamedTuple):
    """Of one kind of methods: its networks, how many points their accuracy falls from the best
    stage to the last, on average, the standard error of this mean over the methods (None: of one),
    and how many points that of the same networks untrained falls."""

    names: list
    trained: float
    error: float | None
    untrained: float


def untrained_stages(networks, found):
    """{trained ResNet: the accuracies of the same network untrained, with the same seeds}"""
    result = {}
    for name in found:
        if at_defaults(name) and len(found[name]) == len(evaluations.LAYERS):
            seeds = evaluations.seeds_of(networks, name, "linear probe of stem")
            place = start(name, found), seeds
            result[name] = evaluations.accuracies_of_stages(networks, *place)
    return result


def falls(networks, found, sides):
    """{kind of methods: Falls}. sides: {"pretext tasks" or the like: its methods}."""
    before = untrained_stages(networks, found)
    result = {}
    for kind, methods in sides.items():
        names = [f"**{method}**" for method in methods if f"**{method}**" in found]
        trained = [fall(found[name]) for name in names]
        error = statistics.stdev(trained) / len(names) ** 0.5 if len(names) > 1 else None
        untrained = statistics.mean(fall(before[name]) for name in names)
        result[kind] = Falls(names, statistics.mean(trained), error, untrained)
    return result


def depth(networks, sides):
    """sides: those of falls()."""
    found = evaluations.stage_accuracies(networks["features"])
    early, count = best_early(found)
    kinds = falls(networks["features"], found, sides)
    before = untrained_stages(networks["features"], found)
    added = [[], []]  # by training, at the first and at the last stage
    words = []
    for kind, (names, trained, error, _) in kinds.items():
        spread = "" if error is None else f" ± {error:.1f}"
        words.append(f"{trained:.1f}{spread} points ({len(names)} {kind})")
        for stage, steps in zip((0, -1), added):
            step = [found[name][stage] - before[name][stage] for name in names]
            steps.append(f"{statistics.mean(step):.1f}")
    text = (
        "**Depth.** Several papers find that after pretext tasks the last layers do worse than the "
        "middle ones, and that after methods that compare views they do not. Here "
        f"{early} of {count} trained ResNets are best after layer1 or layer2 of the "
        f"four (chosen on the test images). From the best stage to the last, accuracy falls by "
        f"{listed(words)} on average (± standard error over the methods), in the same networks "
        f"untrained by {listed([f'{it.untrained:.1f}' for it in kinds.values()])}."
    )
    first, last = map(listed, added)
    text += f" In the same order, training adds {first} points at the first stage, {last} at the "
    text += "last."
    if all(it.untrained > it.trained for it in kinds.values()):
        text += (
            " The usual explanation is that the last layers specialise in the task of the "
            "training. But untrained networks fall more, so the fall is no evidence of this."
        )
    return text


def few(networks):
    words = []
    steps = []
    for share in ("1 %", "10 %"):
        place = networks["features"], "few", f"{share}/accuracies"
        found = numbers_of(*place)
        words.append(f"With {share}: the best, {highest(by_method(found))}; {baselines(found)}.")
        steps.append(f"{over_untrained(*place):.1f}")
    return (
        "**Few labels.** Accuracy in percent of a logistic regression with C = 1 (the linear "
        "probe, which tunes its weight decay, is most often better with 1 %). "
        f"{' '.join(words)} The methods have on average {listed(steps)} points more than the same "
        "networks untrained."
    )


def tuned(rows):
    """rows: of fine-tuning."""
    gains, draws = evaluations.gains(rows)
    if not gains:
        return None
    count = max(gain.networks for gain in gains.values())

    def numbers(estimates):
        """ "+2.4 ± 3.1 (1 %)" and so on"""
        texts = [f"{x:+.1f} ± {half:.1f} ({share})" for share, (x, half) in estimates.items()]
        return listed(texts)

    scratch = {share: gain.over_scratch for share, gain in gains.items()}
    frozen = {share: gain.over_frozen for share, gain in gains.items()}
    untrained = {share: gain.scratch_over_frozen for share, gain in gains.items()}
    words = ""
    if "all" in gains:
        step, half = evaluations.few_minus_all(rows)
        words = (
            " The papers find most with few labels; here the gain with 1 % minus that with all is "
            f"{step:+.1f} ± {half:.1f}. With all labels the interval is too narrow, because the "
            "draws have the same images, and the training is short: perhaps pretrained networks "
            "learn faster and end no better."
        )
    return (
        f"**Fine-tuning**, with 1 %, 10 % or all of the labels (95 % intervals over {draws} draws "
        f"of labels, order and initial weights; {count} methods with the same network). In points, "
        f"fine-tuned minus trained from scratch: {numbers(scratch)}.{words} Fine-tuned minus a "
        f"linear probe of the frozen features: {numbers(frozen)}; the same of networks from "
        f"scratch and their untrained features: {numbers(untrained)}."
    )


def mae(networks, sides):
    """Of which it is said that it gains most by fine-tuning. None if this was not measured."""
    found = numbers_of(networks["finetune"], "fine-tuning 1.0", "gain")
    methods = by_method(found)
    views = [methods[name] for name in sides["methods that compare views"] if name in methods]
    if "mae" not in methods or not views:
        return None
    runs = evaluations.numbers(networks["finetune"]["**mae**"]["fine-tuning 1.0"], "gain")
    spread = f" ± {statistics.stdev(runs):.1f} ({len(runs)} seeds)" if len(runs) > 1 else ""
    return (
        "**MAE**, which in its paper gains more by fine-tuning than contrastive methods: with all "
        f"labels, fine-tuning adds {methods['mae']:+.1f}{spread} points to its linear probe, "
        f"{min(views):+.1f} to {max(views):+.1f} to those of {len(views)} methods that compare "
        f"views, and {found[start('mae', found)]:+.1f} to that of MAE's network untrained."
    )


def corruptions(networks):
    loss = numbers_of(networks["features"], "robustness", "relative_loss")
    left = numbers_of(networks["features"], "robustness", "corrupted/mean")
    methods = by_method(loss)
    least, most = [pick(methods, key=methods.get) for pick in (min, max)]
    untrained = [number for name, number in loss.items() if name.startswith("untrained")]
    return (
        f"**Corruptions.** Of the trained networks {least} loses least, {methods[least]:.1f} % of "
        f"its accuracy, {most} most, {methods[most]:.1f} %; {baselines(loss)}. The accuracy that "
        f"is left: the best, {highest(by_method(left))}; {baselines(left)}. The network decides, "
        f"too: untrained ones lose {min(untrained):.1f} to {max(untrained):.1f} %. And many "
        "methods train with the changes of brightness and contrast that are asked for here."
    )


def scenes(networks):
    """Rendered scenes: how many networks are better than the same ones untrained."""
    found = {}
    for task in evaluations.SCENES:
        for how in ("frozen", "fine-tuned"):
            found[task, how] = evaluations.scene(networks, task, how)
    if None in found.values():
        return None

    def words(task, how):
        it = found[task, how]
        return f"{it.better} of {it.networks}", f"{it.untrained:.1f} to {it.trained:.1f}"

    (a, iou), (b, ap) = [words(task, "frozen") for task in ("segmentation", "detection")]
    (c, tuned_iou), (d, tuned_ap) = [
        words(task, "fine-tuned") for task in ("segmentation", "detection")
    ]
    text = (
        f"**Dense tasks and detection.** Frozen, {a} networks segment better than the same "
        f"networks untrained (mean IoU from {iou}, on average) and {b} detect better (AP from "
        f"{ap}). With all weights trained, {c} segment better than from scratch (from {tuned_iou}) "
        f"and {d} detect better (from {tuned_ap}). Most of these comparisons are with the same "
        "untrained network, so they are not independent. mae's network, which saw the scenes at 48 "
        "pixels, all others at 96, is left out."
    )
    guesses = []
    for how in ("frozen", "fine-tuned"):
        beaten = [task for task in evaluations.SCENES if found[task, how].constant_wins]
        if beaten:
            guesses.append(f"every {how} network for {listed(beaten)}")
    if guesses:
        text += (
            f" A guess from the training scenes beats {listed(guesses)}: the mean normal of "
            "objects (the networks learn mostly from the floor), the usual places of points in a "
            "box."
        )
    return text


def fashion(networks):
    """How networks that learned from emoji do on fashion: the worst and the best."""
    words = []
    for measured, key, what in (
        ("features", "linear", "By the linear probe, accuracy in percent"),
        ("svm", "svm", "By linear SVMs, mean average precision in percent"),
    ):
        found = numbers_of(networks["fashion"], measured, key)
        ranked = sorted((number, name) for name, number in by_method(found).items())
        if len(ranked) < 2:
            return None
        ends = [f"{number:.1f} ({name})" for number, name in (ranked[0], ranked[-1])]
        above = sum(number > found.get(RAW, 0) for number, _ in ranked)
        words.append(
            f"{what}: from {' to '.join(ends)}; {baselines(found)}. {above} of {len(ranked)} "
            "networks have more than raw pixels."
        )
    error = (80 * 20 / 2000) ** 0.5  # percent: of 2,000 images, of which 80 % are right
    return (
        "**Other data.** Networks that learned from emoji, on the grey clothes of fashion (10,000 "
        f"training and 2,000 test images of Fashion-MNIST). {' '.join(words)} The standard error "
        f"of an accuracy of 80 % is {error:.1f} here."
    )


def cost(networks):
    found = numbers_of(networks["features"], "cost", "flops")
    millions = {name: number / 1e6 for name, number in found.items()}
    return (
        "**Cost.** Additions and multiplications for an image, in millions: the network that most "
        f"methods share {millions[UNTRAINED]:.1f}, the dearest, {highest(by_method(millions))}, "
        f"k-means features {millions[KMEANS]:.1f}."
    )


def best_stage(networks):
    """Which method has after which of its stages the highest accuracy: its name, the stage and the
    accuracy."""
    found = evaluations.stage_accuracies(networks["features"])
    ranked = [
        (accuracy, name.split("**")[1], stage)
        for name, accuracies in found.items()
        if at_defaults(name) and len(accuracies) == len(evaluations.LAYERS)
        for stage, accuracy in zip(evaluations.LAYERS, accuracies)
    ]
    most, name, stage = max(ranked)
    return name, stage, most


def baseline(networks, linear_of_results):
    """linear_of_results: {method: the mean linear accuracy of its runs under Results}."""
    best, stage, most = best_stage(networks)
    earlier = f"Earlier stages are better: {best} has {most:.1f} after {stage}, the most of "
    earlier += "all (chosen on the test images)."
    old = numbers_of(networks["features"], "features", "linear")[KMEANS]
    svm = numbers_of(networks["features"], "svm", "svm")
    clothes = numbers_of(networks["fashion"], "features", "linear")
    return (
        "**An old baseline.** K-means features of image patches (Coates and Ng 2011), 1,024 "
        f"numbers per image (most networks have 768). Linear probe: {old:.1f} % (the best method "
        f"by the mean of its runs under Results, {highest(linear_of_results)}). SVMs: "
        f"{svm[KMEANS]:.1f} mAP (the best, "
        f"{highest(by_method(svm))}). On fashion k-means of its own patches has "
        f"{clothes[KMEANS]:.1f} % by the linear probe, raw pixels {clothes[RAW]:.1f}, the best of "
        f"the networks that learned from emoji, {highest(by_method(clothes))}. {earlier}"
    )


def predictors(networks):
    found = evaluations.predictors(networks["features"])
    found = {name: number for name, number in found.items() if number.rank is not None}
    free = [name for name in found if name not in evaluations.WITH_LABELS]
    clear = [name for name in free if found[name].low > 0 or found[name].high < 0]

    def words(name):
        it = found[name]
        return f"the {name} {it.rank:+.2f} ({it.low:+.2f} to {it.high:+.2f})"

    unclear = listed([name for name in free if name not in clear])
    text = "**What predicts linear accuracy without labels?** By rank correlation over "
    text += f"{max(found[name].methods for name in free)} methods: "
    if clear:
        text += f"{listed([words(name) for name in clear])}. Of {unclear} the interval contains 0"
    else:
        text += f"nothing for certain. The intervals of {unclear} all contain 0"
    return (
        f"{text} (RankMe's authors compare runs of one method). With labels, for comparison: "
        f"{words('kNN accuracy')}. The intervals are of 99.6 %, so that all twelve of the table "
        "hold at once with about 95 %; so few methods make them wide."
    )


def agreement(networks):
    pairs, count = evaluations.agreement(networks)
    probe = "linear probe"
    found = {a: rank for (a, b), rank in pairs.items() if b == probe and a != probe}
    if not found:
        return None
    ranked = sorted(found, key=found.get)
    first, second, last = [f"{n} {found[n]:+.2f}" for n in (ranked[-1], ranked[-2], ranked[0])]
    text = (
        f"**Do the evaluations agree?** Over {count} methods the ranking by the linear probe is "
        f"most like those by {first} and {second}, least like that by {last}: rank correlations. "
        f"Among {len(found)}, one below about 0.5 may be chance."
    )
    clusters = evaluations.predictors(networks["features"])["cluster accuracy"]
    if clusters.rank is None:
        return text
    if clusters.low > 0:
        verdict = "here they rank partly alike"
    else:
        verdict = "they do not" if clusters.high < 0 else "so few methods cannot tell"
    return (
        f"{text} Do clusters rank methods as the linear probe does? Several papers find that they "
        f"do not. Over {clusters.methods} methods the rank correlation is {clusters.rank:+.2f} "
        f"(99.6 % interval {clusters.low:+.2f} to {clusters.high:+.2f}): {verdict}."
    )


def seeds(networks):
    found = evaluations.repeatability(networks)
    probe = found.get("linear probe")
    if probe is None or probe.methods < 5:
        return None
    clear = [name for name, it in found.items() if it.low > 0.75]
    unclear = sum(it.low == 0 for it in found.values())
    text = (
        f"**Seeds.** Linear accuracy has a standard deviation of {probe.over_seeds:.1f} points "
        f"over seeds and of {probe.between:.1f} between {probe.methods} methods with the same "
        f"network: its reliability is {probe.value:.2f} ({probe.low:.2f} to {probe.high:.2f}), 1 "
        "if one run of each method tells how they rank."
    )
    if clear:
        text += f" The whole interval is above 0.75 for {listed(clear)}."
    if unclear:
        text += f" For {unclear} of {len(found)} measures it may be 0: so few runs cannot tell."
    return text


def blocks(sides, videos, linear_of_results):
    """{block of a page: its lines}. sides: {kind of methods: the methods}; videos: the methods that
    learn from films; linear_of_results: {method: the mean linear accuracy of its runs}."""
    rows = evaluations.read_rows()
    networks = evaluations.networks_of(rows, videos)
    tuned_rows = evaluations.rows_of("finetune", rows, videos)
    paragraphs = [
        artist(networks),
        depth(networks, sides),
        few(networks),
        tuned(tuned_rows),
        mae(networks, sides),
        corruptions(networks),
        scenes(networks),
        fashion(networks),
        cost(networks),
        baseline(networks, linear_of_results),
        predictors(networks),
        agreement(networks),
        seeds(networks),
    ]
    six = short(networks, tuned_rows, sides, linear_of_results)
    return {"says": lines_of(paragraphs), "worth": lines_of(six)}


def short(networks, rows, sides, linear_of_results):
    """One sentence for each of six topics. rows: of fine-tuning."""
    found = evaluations.stage_accuracies(networks["features"])
    early, count = best_early(found)
    kinds = falls(networks["features"], found, sides)
    lost = [f"{kind} lose {it.trained:.1f}" for kind, it in kinds.items()]
    lost_before = [f"{it.untrained:.1f}" for it in kinds.values()]
    gains, draws = evaluations.gains(rows)
    steps = []
    for share, gain in gains.items():
        step, half = gain.over_scratch
        steps.append(f"{step:+.1f} ± {half:.1f} with {share}")
    few_minus_all, half = evaluations.few_minus_all(rows)
    best, stage, most = best_stage(networks)
    segment, detect, segment_tuned, detect_tuned = [
        f"{evaluations.scene(networks, task, how).better}"
        for how in ("frozen", "fine-tuned")
        for task in ("segmentation", "detection")
    ]
    scenes = evaluations.scene(networks, "segmentation", "frozen").networks
    predictors = evaluations.predictors(networks["features"])
    clusters = predictors.pop("cluster accuracy")
    clear = [
        name
        for name, it in predictors.items()
        if name not in evaluations.WITH_LABELS and (it.low > 0 or it.high < 0)
    ]
    free = len(predictors) - len(evaluations.WITH_LABELS & predictors.keys())
    predicts = f"only {listed(clear)} predicts" if clear else "none predicts"
    old = numbers_of(networks["features"], "features", "linear")[KMEANS]
    return [
        f"**Depth**: {early} of {count} trained ResNets are best after layer1 or layer2 of four; "
        f"from the best stage (chosen on the test images) to the last {listed(lost)} points, the "
        f"same networks untrained {listed(lost_before)}.",
        f"**Fine-tuning** minus training from scratch is, in points, {listed(steps)} of the labels "
        f"({gain.networks} methods, 95 % intervals over {draws} draws of labels and weights); the "
        "papers find most with few labels, here the gain with 1 % minus that with all is "
        f"{few_minus_all:+.1f} ± {half:.1f}.",
        mae(networks, sides),
        f"**Scenes**: of {scenes} trained networks {segment} segment and {detect} detect better "
        f"than the same ones untrained if they are frozen, {segment_tuned} and {detect_tuned} if "
        "all weights are trained.",
        "**Rankings**: of the methods those by clusters and by the linear probe have a rank "
        f"correlation of {clusters.rank:+.2f} ({clusters.low:+.2f} to {clusters.high:+.2f}), and "
        f"of {free} measures that need no labels {predicts} linear accuracy for certain (intervals "
        "of 99.6 %, since twelve are looked at).",
        "**An old baseline**: k-means features of image patches (Coates and Ng 2011) have "
        f"{old:.1f} % by the linear probe, the last layer of the best method, "
        f"{highest(linear_of_results)}, the best of all layers, {stage} of {best}, {most:.1f} "
        "(chosen on the test images).",
    ]


def lines_of(texts):
    lines = []
    for text in texts:
        if text:
            lines += textwrap.wrap(f"- {text}", 100, subsequent_indent="  ", break_on_hyphens=False)
    return lines
