"""common.parse: a table of settings becomes flags; what is wrong is refused in one sentence."""

import sys

import pytest

from common import flag_of, parse

DOC = """Title: of a method.
More."""
SETTINGS = {
    "recipe": ("emoji", "cifar10", "paper", "the column of defaults"),
    "size": (32, 32, 224, "side of a view, pixels"),
    "arch": (
        "resnet14",
        "resnet18",
        "resnet50",
        "the backbone",
        ("resnet14", "resnet18", "resnet50"),
    ),
    "batch": (256, 512, 4096, "images per step"),
    "epochs": (30, 200, 100, "passes over the images"),
    "warmup": (2.0, 10.0, 10.0, "epochs of warm-up"),
    "lr": (4.0, 1.0, 0.3, "learning rate, 100% of it"),
    "lambda_": (0.5, 0.5, 0.005, "weight of a term", "(0, 1]"),
    "queue_from": (0, 5, 10, "epoch from which the queue is used", "[0, 50)"),
    "head_norm": (False, True, True, "batch-norm in the head"),
}


def args_of(*words):
    return parse(DOC, SETTINGS, [*words])


def refusal(capsys, *words, settings=SETTINGS, **options):
    """The one sentence with which the call ends the program with exit code 1."""
    with pytest.raises(SystemExit) as stop:
        parse(DOC, settings, [*words], **options)
    captured = capsys.readouterr()
    assert stop.value.code == 1 and not captured.out
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


# -------- Columns and values ----------------------------------------------------------------------


@pytest.mark.parametrize("place, column", list(enumerate(SETTINGS["recipe"][:-1])))
def test_a_recipe_gives_the_defaults_of_its_column(place, column):
    args = args_of("--recipe", column, "--data", "fashion")
    assert args.recipe == column
    for name, row in SETTINGS.items():
        if name != "recipe":
            assert getattr(args, name) == row[place], name
            assert type(getattr(args, name)) is type(row[place]), name


def test_the_first_column_is_the_default_and_a_flag_beats_its_column():
    args = args_of()
    assert args.recipe == "emoji" and args.lr == 4.0 and args.batch == 256
    args = args_of("--lr", "2", "--recipe", "cifar10", "--batch=64", "--head-norm")
    assert (args.lr, args.batch, args.head_norm) == (2.0, 64, True) and args.epochs == 200
    assert args.argv == ["--lr", "2", "--recipe", "cifar10", "--batch=64", "--head-norm"]


def test_one_column_is_enough():
    settings = {"recipe": ("paper", "the column"), "k": (3, "neighbours", "[1, inf)")}
    args = parse(DOC, settings, [])
    assert args.recipe == "paper" and args.k == 3 and args.data == ""
    assert not hasattr(args, "epochs") and not hasattr(args, "compile")  # nothing is trained
    assert not hasattr(args, "eval_every")


def test_flags_of_every_run():
    args = args_of()
    assert (args.seed, args.root, args.workers, args.compile) == (0, "data", 4, False)
    assert args.out == "runs/METHOD-DATA-SEED"
    assert args_of("--compile", "--no-head-norm", "--recipe", "cifar10").compile is True
    assert args_of("--recipe", "cifar10", "--no-head-norm").head_norm is False


def test_a_column_named_after_a_data_set_sets_it():
    assert args_of().data == "emoji"
    assert args_of("--recipe", "cifar10").data == "cifar10"
    assert args_of("--recipe", "cifar10", "--data", "emoji").data == "emoji"
    assert args_of("--recipe", "paper", "--data", "folder").data == "folder"


def test_evaluations_are_a_sixth_of_the_epochs_apart():
    assert args_of().eval_every == 5
    assert args_of("--epochs", "3").eval_every == 1
    assert args_of("--eval-every", "7").eval_every == 7


def test_a_reserved_word_as_a_name():
    assert args_of("--lambda", "0.25").lambda_ == 0.25
    assert flag_of("lambda_") == "--lambda" and flag_of("queue_from") == "--queue-from"


def test_no_list_means_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--lr", "3"])
    assert parse(DOC, SETTINGS).lr == 3.0
    assert parse(DOC, SETTINGS, []).lr == 4.0  # an empty list is a list


def test_numbers_in_the_list_are_words():
    args = args_of("--lr", 0.5, "--batch", 8)
    assert (args.lr, args.batch) == (0.5, 8) and args.argv == ["--lr", "0.5", "--batch", "8"]


def test_runs_are_named_beside_the_flags(capsys):
    settings = {"recipe": ("paper", "the column"), "k": (3, "neighbours")}
    args = parse(DOC, settings, ["a", "b", "--k", "5"], runs="run folders")
    assert args.runs == ["a", "b"] and args.k == 5
    assert "RUN" in refusal(capsys, "--k", "5", settings=settings, runs="run folders")
    assert "a: no such flag" in refusal(capsys, "a", settings=settings)


# -------- What is refused -------------------------------------------------------------------------

LESS_WARMUP = "choose more epochs or a shorter warm-up, 0 for a trial"
REFUSED = [
    (["--lr", "-1"], "--lr -1: choose at least 0"),
    (["--lr=-0.5"], "--lr -0.5: choose at least 0"),
    (["--lr", "nan"], "--lr nan: choose at least 0"),
    (["--size", "0"], "--size 0: choose at least 1"),
    (["--batch", "1"], "--batch 1: choose at least 2"),
    (["--epochs", "0"], "--epochs 0: choose at least 1"),
    (["--workers", "-1"], "--workers -1: choose at least 0"),
    (["--lambda", "0"], "--lambda 0: choose more than 0 and at most 1"),
    (["--lambda", "1.5"], "--lambda 1.5: choose more than 0 and at most 1"),
    (["--queue-from", "50"], "--queue-from 50: choose at least 0 and less than 50"),
    (["--warmup", "31"], f"--epochs 30, --warmup 31: {LESS_WARMUP}"),
    (["--epochs", "1"], f"--epochs 1, --warmup 2: {LESS_WARMUP}"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    (["--batch", "1.5"], "--batch: invalid int value: '1.5'"),
    (["--lr"], "--lr: expected one argument"),
    (["--lrr", "1"], "--lrr: no such flag; see --lr"),
    (["--queue_from", "1"], "--queue_from: no such flag; see --queue-from"),
    (["--qeue-from=1"], "--qeue-from: no such flag; see --queue-from"),
    (["--zzzzzz"], "--zzzzzz: no such flag; see --help"),
    (["--slr", "1"], "--slr: no such flag; see --lr"),
    (["--stir", "1"], "--stir: no such flag; see --help"),  # too unlike --lr
    (["--batc", "4"], "--batc: no such flag; see --batch"),  # no abbreviations
    (["--lambda_", "1"], "--lambda_: no such flag; see --lambda"),
]


def test_the_papers_recipe_needs_images(capsys):
    words = "--recipe paper needs images: --data FOLDER, or the name of a data set"
    assert refusal(capsys, "--recipe", "paper") == words


def test_a_method_may_learn_from_videos_and_images(capsys):
    """By the first column it would need videos."""
    settings = SETTINGS | {"recipe": ("movers", "cifar10", "paper", "the column of defaults")}
    words = refusal(capsys, "--recipe", "paper", settings=settings)
    assert words.startswith("--recipe paper needs videos: ")
    assert parse(DOC, settings, ["--recipe", "cifar10", "--data", "x"]).data == "x"
    both = {"settings": settings, "learns_from": "videos or images"}
    words = refusal(capsys, "--recipe", "paper", **both)
    assert words.startswith("--recipe paper needs videos or images: ")
    assert parse(DOC, argv=["--recipe", "cifar10"], **both).data == "cifar10"


@pytest.mark.parametrize("words, message", REFUSED)
def test_what_makes_no_sense_is_refused_with_one_sentence(words, message, capsys):
    assert refusal(capsys, *words) == message


ENDS = {"lambda_": 1.0, "queue_from": 0, "lr": 0.0, "warmup": 30.0, "batch": 2}


@pytest.mark.parametrize("name", ENDS)
def test_the_ends_of_an_interval_are_allowed(name):
    assert getattr(args_of(flag_of(name), ENDS[name]), name) == ENDS[name]


CHOICES = {"--arch": SETTINGS["arch"][-1], "--recipe": SETTINGS["recipe"][:-1]}


@pytest.mark.parametrize("flag", CHOICES)
def test_a_name_that_is_not_among_the_choices(flag, capsys):
    words = refusal(capsys, flag, "nosuch")
    assert words.startswith(f"{flag}: invalid choice: 'nosuch'")
    assert all(name in words for name in CHOICES[flag])


# -------- Help ------------------------------------------------------------------------------------

IN_HELP = [
    "the column of defaults",
    "--batch BATCH images per step (256 | 512 | 4096)",
    "learning rate, 100% of it (4 | 1 | 0.3)",
    "--head-norm, --no-head-norm batch-norm in the head (False | True | True)",
    "resnet14, resnet18, resnet50 (resnet14 | resnet18 | resnet50)",
    "augmentation (0)",  # of --seed: where all columns agree, the value once
    "or a folder of images",  # of --data: recipes named after a data set need not say it
    "In brackets: the default, or that of each recipe, emoji | cifar10 | paper.",
]


def test_help_shows_all_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # of the terminal, so that no line is broken
    with pytest.raises(SystemExit) as stop:
        args_of("--help")
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert "Title: of a method." in text and "More." not in text
    for words in IN_HELP:
        assert words in text, words
    assert "None" not in text
    for name in SETTINGS:
        assert f"{flag_of(name)} " in text or f"{flag_of(name)}," in text
