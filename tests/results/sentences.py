"""What the evaluations show, in sentences: those of tests/results/EVALUATIONS.md, and six of them
in README.md. They are made from the numbers of the tables, so that they cannot contradict them.

report.py calls blocks(). A sentence of which nothing was measured is left out.
"""

import statistics
import textwrap

import evaluations
from evaluations import at_defaults, mean, own_start

UNTRAINED = "untrained resnet14, 32 px"
RAW = "raw pixels, 32 px"
KMEANS = "k-means, 32 px"
BESIDE = {"the untrained network": UNTRAINED, "raw pixels": RAW, "k-means features": KMEANS}
STAGES = evaluations.LAYERS  # of a ResNet
BLOCKS = tuple(f"block{i}" for i in range(1, 7))  # of a ViT
ON_README = ("depth", "tuned", "scenes", "agreement", "predictors", "baseline")


def of_all(networks, *place):
    """{network: a number, the mean over its runs}, of those that were measured."""
    found = {name: mean(networks, name, *place) for name in networks}
    return {name: number for name, number in found.items() if number is not None}


def trained(found):
    """{method: its number} of what of_all() found, at the defaults."""
    return {name.split("**")[1]: number for name, number in found.items() if at_defaults(name)}


def highest(found):
    """"exemplar, 58.3" of {method: number}."""
    best = max(found, key=found.get)
    return f"{best}, {found[best]:.1f}"


def gains(found):
    """{method: by how much it is better than its own network untrained} of what of_all() found."""
    steps = {}
    for name, number in found.items():
        start = own_start(name, found) or UNTRAINED
        if at_defaults(name) and start in found:
            steps[name] = number - found[start]
    return steps


def beside(found, form=".1f"):
    """"the untrained network 46.7, raw pixels 39.9, k-means features 55.7", as far as known."""
    known = {word: found[name] for word, name in BESIDE.items() if name in found}
    return ", ".join(f"{word} {number:{form}}" for word, number in known.items())


def artist(networks):
    found = of_all(networks["features"], "robustness", "artist_new/mean")
    steps = gains(found)
    return (
        "**A new artist.** A probe learns from three artists and is tested on the fourth. Its "
        f"accuracy in percent: {highest(trained(found))}; {beside(found)}. On average {len(steps)} "
        f"methods have {statistics.mean(steps.values()):.1f} points more than the same networks "
        "untrained. The probe has never seen the fourth style; the networks have, without labels."
    )


def heights(networks):
    """{network: its linear accuracy after each stage}, of those that were measured."""
    found = {}
    for layers in (STAGES, BLOCKS):
        for name in networks:
            places = [f"linear probe of {layer}" for layer in layers]
            numbers = [mean(networks, name, place, "linear") for place in places]
            if None not in numbers:
                found[name] = numbers
    return found


def depth(networks, families):
    """families: {"pretext tasks" or the like: its methods}."""
    found = heights(networks["features"])
    resnets = [x for name, x in found.items() if at_defaults(name) and len(x) == len(STAGES)]
    early = sum(x.index(max(x)) in (1, 2) for x in resnets)
    lost = []
    words = []
    for what, methods in families.items():
        names = [f"**{method}**" for method in methods if f"**{method}**" in found]
        starts = [own_start(name, found) or UNTRAINED for name in names]
        both = [[max(found[n]) - found[n][-1] for n in group] for group in (names, starts)]
        lost.append([statistics.mean(falls) for falls in both])
        words.append(f"{lost[-1][0]:.1f} points (mean of {len(names)} {what})")
    text = (
        f"**Depth.** {early} of {len(resnets)} trained ResNets are best at layer1 or layer2, "
        "chosen on the test images. From the best stage to the last, linear accuracy falls by "
        f"{' and '.join(words)}. In the same networks untrained it falls by "
        f"{' and '.join(f'{before:.1f}' for _, before in lost)}"
    )
    if all(before > after for after, before in lost):
        text += ", which is more: the fall alone does not say that the last layers specialise"
    return text + "."


def few(networks):
    words = []
    steps = []
    for share in ("1 %", "10 %"):
        found = of_all(networks["features"], "few", f"{share}/accuracies")
        words.append(f"With {share} of the labels: {highest(trained(found))}; {beside(found)}.")
        steps.append(f"{statistics.mean(gains(found).values()):.1f}")
    return (
        f"**Few labels** (logistic regression, C = 1; percent). {' '.join(words)} On average the "
        f"methods have {' and '.join(steps)} points more than the same networks untrained."
    )


def tuned(networks, rows):
    """rows: of fine-tuning."""
    steps, draws = evaluations.gain_steps(rows)
    if not steps:
        return None
    over = {share: f"{step:.1f} ± {error:.1f}" for share, ((step, error), _, _) in steps.items()}
    probe = {share: f"{step:+.1f} ± {error:.1f}" for share, (_, (step, error), _) in steps.items()}
    count = max(count for *_, count in steps.values())
    text = (
        f"**Fine-tuning** ({count} networks, {draws} draws of the labels; ± is half of a 95 % "
        f"interval over the draws). With {several(over, 'of the labels')} pretrained networks are "
        f"better than the same networks from scratch by {several(over.values())} points on "
        "average. The papers find most with few labels; so few draws cannot tell. Fine-tuning "
        f"minus a linear probe of the frozen features: {several(probe.values())}."
    )
    found = trained(of_all(networks["finetune"], "fine-tuning 1.0", "gain"))
    if "mae" in found:
        best = max(found, key=found.get)
        text += (
            " MAE, which in its paper gains more by fine-tuning than contrastive methods do, gains "
            f"{found['mae']:.1f} with all labels; most gains {best}, {found[best]:.1f}."
        )
    return text


def several(words, ending=""):
    """"1 %, 10 % and all of the labels" """
    *first, last = words
    text = f"{', '.join(first)} and {last}" if first else last
    return f"{text} {ending}".strip()


def corruptions(networks):
    loss = of_all(networks["features"], "robustness", "relative_loss")
    left = of_all(networks["features"], "robustness", "corrupted/mean")
    of_methods = trained(loss)
    least, most = [pick(of_methods, key=of_methods.get) for pick in (min, max)]
    return (
        f"**Corruptions.** Of the trained networks {least} loses least, {of_methods[least]:.1f} % "
        f"of its accuracy, {most} most, {of_methods[most]:.1f} %; {beside(loss)}. The accuracy "
        f"that is left is highest for {highest(trained(left))}; {beside(left)}."
    )


def scenes(networks):
    """Rendered scenes: how many networks are better than the same ones untrained, and where one
    answer for all pixels or boxes is better than every network."""
    counts = {}  # (task, how): (better, all, mean of the untrained, mean of the trained)
    beaten = {"frozen": [], "fine-tuned": []}  # tasks
    for task in evaluations.SCENES:
        measured, path, _ = list(evaluations.TABLES[task].values())[0]
        sign = -1 if task in evaluations.ERRORS else 1
        answer = mean(networks[task], "no network", measured, path)
        for how in beaten:
            pairs = evaluations.on_scenes(networks[task], task, how)
            if not pairs:
                return None
            better = sum(a > b for a, b in pairs.values())
            after, before = map(statistics.mean, zip(*pairs.values()))
            counts[task, how] = f"{better} of {len(pairs)}", f"{before:.1f} to {after:.1f}"
            best = max(sign * number for number, _ in pairs.values())
            if answer is not None and sign * answer > best:
                beaten[how].append(task)

    (a, iou), (b, ap) = [counts[task, "frozen"] for task in ("segmentation", "detection")]
    (c, tuned_iou), (d, tuned_ap) = [
        counts[task, "fine-tuned"] for task in ("segmentation", "detection")
    ]
    text = (
        f"**Dense tasks and detection.** Frozen, {a} networks segment better than the same "
        f"networks untrained (mean IoU from {iou}, on average) and {b} detect better (AP from "
        f"{ap}). With all weights trained {c} segment better than from scratch (from {tuned_iou}) "
        f"and {d} detect better (from {tuned_ap}). Most methods share one untrained network, so "
        "these numbers are not independent."
    )
    guesses = [
        f"every {how} network for {several(tasks)}" for how, tasks in beaten.items() if tasks
    ]
    if guesses:
        text += f" But one guess for all pixels or boxes is better than {several(guesses)}."
    return text


def fashion(networks):
    """How networks that learned from emoji do on fashion: the worst and the best."""
    words = []
    for measured, key, what in (
        ("features", "linear", "By the linear probe (accuracy in percent)"),
        ("svm", "svm", "By linear SVMs (mean average precision)"),
    ):
        found = of_all(networks["fashion"], measured, key)
        ranked = sorted((number, name) for name, number in trained(found).items())
        if len(ranked) < 2:
            return None
        ends = [f"{number:.1f} ({name})" for number, name in (ranked[0], ranked[-1])]
        above = sum(number > found.get(RAW, 0) for number, _ in ranked)
        words.append(
            f"{what}: from {' to '.join(ends)}; {beside(found)}. {above} of {len(ranked)} networks "
            "are better than raw pixels."
        )
    return (
        "**Other data.** Networks that learned from emoji, on the grey clothes of fashion (10,000 "
        f"training and 2,000 test images of Fashion-MNIST). {' '.join(words)}"
    )


def cost(networks):
    found = of_all(networks["features"], "cost", "flops")
    millions = {name: number / 1e6 for name, number in found.items()}
    return (
        f"**Cost.** An image costs the network that most methods share {millions[UNTRAINED]:.1f} "
        "million additions and multiplications, the dearest one (of "
        f"{highest(trained(millions))}), k-means features {millions[KMEANS]:.1f}."
    )


def baseline(networks, linear):
    """linear: {method: the mean linear accuracy of its runs}."""
    old = of_all(networks["features"], "features", "linear")[KMEANS]
    by_svm = of_all(networks["features"], "svm", "svm")
    elsewhere = of_all(networks["fashion"], "features", "linear")
    return (
        "**An old baseline.** K-means features of patches (Coates and Ng 2011), without a network, "
        f"have {old:.1f} % by the linear probe (the best method, as a mean of its runs: "
        f"{highest(linear)}), {by_svm[KMEANS]:.1f} mAP by SVMs ({highest(trained(by_svm))}), and "
        f"by the linear probe on fashion {elsewhere[KMEANS]:.1f} ({highest(trained(elsewhere))}). "
        "Minutes of training on 5,000 small images are very little."
    )


def predictors(networks):
    lines = evaluations.predictors(networks["features"])
    lines = [line for line in lines if line[2] != "not measured" and line[1] == "no"]
    clear = [line for line in lines if line[3][0] == line[3].split(" to ")[1][0]]
    names = [f"the {name} ({rank}; {interval})" for name, _, rank, interval, *_ in clear]
    rest = several([line[0] for line in lines if line not in clear])
    return (
        f"**What predicts linear accuracy without labels?** Over {max(line[4] for line in lines)} "
        f"methods the interval of the rank correlation excludes 0 for {several(names or ['none'])}."
        f" For {rest} so few methods cannot tell (RankMe's authors compare runs of one method)."
    )


def agreement(networks):
    heads, lines = evaluations.agreement(networks)
    if not lines:
        return None
    probe = [line[0].split(" ", 1)[1] for line in lines].index("linear probe")
    found = {}
    for i, (name, *cells) in enumerate(lines):
        if i != probe:
            found[name.split(" ", 1)[1]] = float(cells[probe] if i > probe else lines[probe][i + 1])
    ranked = sorted(found, key=found.get)
    words = [f"{name} ({found[name]:+.2f})" for name in (ranked[-1], ranked[-2], ranked[0])]
    return (
        f"**Do the evaluations agree?** Over {heads[0]} the ranking by the linear probe is most "
        f"like those of {words[0]} and {words[1]}, least like that of {words[2]} (rank "
        "correlations). That of k-means clusters with the linear probe is "
        f"{found['cluster accuracy']:+.2f}."
    )


def seeds(networks):
    heads, lines = evaluations.repeatability(networks)
    lines = {line[0]: dict(zip(heads, line)) for line in lines}
    probe = lines.get("linear probe")
    if probe is None or probe["methods"] < 5:
        return None
    ranked = sorted(lines, key=lambda name: float(lines[name]["reliability"]))
    words = [f"{name} ({lines[name]['reliability']})" for name in ranked]
    return (
        "**Seeds.** The linear accuracy of networks that were trained with other seeds deviates "
        f"by {probe['over seeds']} points, that of {probe['methods']} methods with the same "
        f"network by {probe['between methods']} beyond that. The ranking by single runs is most "
        f"reliable for {words[-1]} and {words[-2]}, least for {words[0]} and {words[1]}."
    )


def blocks(families, videos, linear):
    """{block of a page: its lines}. families: {kind of methods: the methods}; videos: those that
    learn from films; linear: {method: the mean linear accuracy of its runs}."""
    rows = evaluations.read_rows()
    networks = evaluations.networks_of(rows, videos)
    bullets = {
        "artist": artist(networks),
        "depth": depth(networks, families),
        "few": few(networks),
        "tuned": tuned(networks, evaluations.rows_of("finetune", rows, videos)),
        "corruptions": corruptions(networks),
        "baseline": baseline(networks, linear),
        "cost": cost(networks),
        "scenes": scenes(networks),
        "fashion": fashion(networks),
        "seeds": seeds(networks),
        "agreement": agreement(networks),
        "predictors": predictors(networks),
    }
    return {"says": lines_of(bullets), "worth": lines_of({n: bullets[n] for n in ON_README})}


def lines_of(bullets):
    lines = []
    for text in bullets.values():
        if text:
            lines += textwrap.wrap(f"- {text}", 100, subsequent_indent="  ", break_on_hyphens=False)
    return lines
