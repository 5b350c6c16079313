"""kernels/bench.py: all ways to compute a case agree, its rows, and the table made from them.

Times are not tested.
"""

import itertools
import weakref

import pytest
import torch

from kernels import bench

CPU = torch.device("cpu")
SMALL = [
    bench.simclr_case(64, 32),
    bench.clip_case(64, 128),
    bench.moco_case(8, 100, 32),
    bench.bank_case(8, 100, 32),
    bench.sinkhorn_case(20, 30, torch.float32),
    bench.potentials_case(20, 30, torch.float32),
    bench.assignment_case(20, 30, torch.float32),
    *bench.mae_cases(2, torch.float32, D=8, decoder=6),
]
FIELDS = "device driver torch triton date commit package memory_mb unit"


def keys(rows):
    return [(row["op"], row["who"]) for row in rows]


def test_rows_of_ours_and_of_the_plain_formula(tmp_path):
    """Both agree in every case, value and gradients, and their rows have what the table needs."""
    assert bench.run(SMALL, CPU, tmp_path / "rows.jsonl") == []
    rows = bench.read(tmp_path / "rows.jsonl")
    wanted = [(case.op, who) for case in SMALL for who in ("ours", "eager")]
    assert set(keys(rows)) == set(wanted)

    for row in rows:
        # Float32 rounds exponents of 10 to 20 by 1e-6, and the least of the losses is 1.4e-3; a
        # wrong formula is off by 1e-2.
        assert row["value_error"] < 1e-3, row
        if row["op"] in ("random_masking", "sinkhorn", "sinkhorn_potentials"):
            assert row["gradient_error"] is None, row
        else:
            assert row["gradient_error"] < 1e-3, row
        assert row["ms"] > 0 and row["rate"] > 0 and row["share"] is None
        assert row["type"] == "cpu"
        assert row["repeatable"] is True
        assert set(FIELDS.split()) <= set(row)

    lines = bench.table(rows, [], SMALL).splitlines()
    assert lines[0] == "GPU: not run"
    assert sum(line.startswith("| ") for line in lines) == 1 + len(SMALL)
    rest = "".join(lines[1:])
    assert "not run" not in rest and rows[0]["device"] in rest


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", SMALL[:4], ids=lambda case: case.op)
def test_other_ways(case):
    """They multiply in bf16, with errors of 2^-9 in each logit. Logits reach 10, or 14
    (clip): 0.03 in the loss."""
    inputs = case.inputs(CPU)
    want = case.ways["ours"](*inputs).item()
    assert case.ways["eager bf16"](*inputs).item() == pytest.approx(want, abs=0.03)

    flex = {
        "simclr_loss": bench.flex_simclr,
        "clip_loss": bench.flex_clip,
        "moco_loss": bench.flex_moco,
        "bank_loss": bench.flex_bank,
    }
    detached = [x.detach() for x in inputs]
    assert flex[case.op](*detached).item() == pytest.approx(want, abs=0.03)


@pytest.mark.parametrize(
    "op, who, module",
    [
        ("simclr_loss", "lightly", "lightly.loss.ntx_ent_loss"),
        ("sinkhorn", "lightly", "lightly.loss.swav_loss"),
        ("clip_loss", "open_clip", "open_clip.loss"),
    ],
)
def test_packages_that_run_on_a_cpu(op, who, module):
    """They agree with ours: losses to the digits of float32, assignments relatively (of 30
    prototypes, they are 0.03 on average)."""
    pytest.importorskip(module)
    case = next(case for case in SMALL if case.op == op)
    inputs = case.inputs(CPU)
    theirs = case.ways[who](*inputs)
    ours = case.ways["ours"](*inputs)
    rtol = 1e-4 if op == "sinkhorn" else 0
    torch.testing.assert_close(theirs, ours, rtol=rtol, atol=1e-5)


def test_scores_in_float16_do_not_overflow_in_lightly():
    """exp(1 / 0.05) = 5e8 exceeds float16."""
    pytest.importorskip("lightly.loss.swav_loss")
    case = bench.sinkhorn_case(20, 30)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20, 30, generator=generator).half()
    theirs = case.ways["lightly"](scores)
    torch.testing.assert_close(theirs, case.ways["ours"](scores), rtol=1e-3, atol=1e-6)


def off(way):
    """The same, off by a hundredth: values, and gradients if there are any."""
    return lambda *inputs: 1.01 * way(*inputs)


@pytest.mark.parametrize(
    "case",
    [case for case in SMALL if case.op not in ("random_masking", "sinkhorn_potentials")],
    ids=lambda case: case.op,
)
def test_errors_are_from_the_plain_formula(case):
    """A wrong kernel shows, even if its PyTorch path is as wrong. Ours takes the place of the plain
    formula only where that would not fit."""
    ways = {"ours": off(case.ways["ours"]), "eager": case.ways["eager"]}
    case = case._replace(ways=case.ways | ways)
    fits = (case.elements, "eager", "ours")
    does_not_fit = (2**40, "ours", "eager")
    for elements, right, wrong in (fits, does_not_fit):
        errors = {}
        for row in bench.measure(case._replace(elements=elements), ways, CPU, None):
            both = (row["value_error"], row["gradient_error"])
            errors[row["who"]] = [error for error in both if error]
        assert max(errors[right], default=0) < 1e-3, errors
        assert min(errors[wrong]) == pytest.approx(0.01, rel=0.1), errors


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.op)
def test_plain_formulas_in_float64_are_exact(case):
    """No step of them goes through float32. Otherwise errors would be measured from something as
    inexact as what is measured."""
    inputs = []
    for x in case.inputs(CPU):
        inputs.append(x.detach().double() if x.is_floating_point() else x)
    ours = case.view(case.ways["ours"](*inputs), *inputs)
    plain = case.view(case.ways["eager"](*inputs), *inputs)
    assert plain.dtype == torch.float64 and bench.relative(ours, plain) < 1e-11
    if case.op == "masked_patch_mse":
        assert inputs[1].dtype == torch.uint8  # pixels stay uint8


def test_the_formula_fits_where_it_is_used():
    """It fits by far for all of CPU_CASES. For 2^30 logits on a GPU with 80 GB at most 48 bytes per
    logit were counted."""
    assert max(64 * case.elements for case in bench.CPU_CASES) * 2 < 2**32
    above = {f"{case.op} {case.size}" for case in bench.GPU_CASES if 64 * case.elements > 80e9}
    wanted = {"sinkhorn B=32768 K=65536", "sinkhorn_potentials B=32768 K=65536"}
    for D in (128, 256, 512, 1024):
        wanted |= {f"simclr_loss M=65536 D={D}", f"clip_loss N=65536 D={D}"}
    assert above == wanted


def test_repeatable():
    """Bits decide, in any part of a result: values, and gradients, of which some are missing."""
    case = SMALL[2]
    count = itertools.count()

    def with_noise(noise):
        return lambda *x: case.ways["eager"](*x) + noise * next(count)

    def always_zero(q, k, queue):  # only the gradient differs from call to call
        return (q - q.detach()).sum() * next(count)

    def repeatable(way):
        (row,) = bench.measure(case, {"ours": way}, CPU, None)
        return row["repeatable"]

    assert repeatable(with_noise(0.0)) is True
    assert repeatable(with_noise(1e-3)) is False
    assert repeatable(always_zero) is False


def test_identical():
    """Results may be nested."""
    a = torch.zeros(2, 3)
    nan = torch.full((2,), torch.nan)
    same = ((a.clone(), nan.clone()), [None, a.clone().T])
    assert bench.identical(((a, nan), [None, a.T]), same)
    for b in (-a, a + 1e-30):
        assert not bench.identical((a, a), (a, b))
        assert not bench.identical([None, a.half()], [None, (b * 1e25).half()])


def test_memory_of_a_known_size():
    """16 MB that are written and freed within the call. Other memory of the process may come and
    go, 4 MB at most."""

    def run():
        return torch.ones(4 * 2**20).sum().item()

    found, result = bench.peak_memory(run, CPU)
    assert result == 4 * 2**20
    assert found is None or found == pytest.approx(16.8, abs=4)


def test_a_failed_way_leaves_no_memory_behind():
    """Even if the exception holds itself, and so its frames and their tensors: the next way needs
    the room."""
    held = []

    def broken(*inputs):
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        error = RuntimeError("too little memory")
        error.itself = error
        raise error

    def after(*inputs):
        assert held and held[0]() is None
        return SMALL[0].ways["eager"](*inputs)

    ways = {"eager": broken, "compile": after}
    first, second = bench.measure(SMALL[0], ways, CPU, None)
    assert first["error"] == "RuntimeError: too little memory"
    assert "error" not in second
    assert len(held) == 1  # it is not tried again


def test_too_little_memory_for_what_all_ways_need(tmp_path):
    """That is recorded for each of them, and the run goes on."""

    def too_large(device):
        raise torch.OutOfMemoryError("much")

    path = tmp_path / "rows.jsonl"
    cases = [SMALL[0]._replace(inputs=too_large), SMALL[1]]
    (failed,) = bench.run(cases, CPU, path)
    assert (failed["who"], failed["error"]) == ("ours", "OutOfMemoryError: much")
    outcomes = [(row["op"], "error" in row) for row in bench.read(path)]
    assert outcomes == [("simclr_loss", True)] * 2 + [("clip_loss", False)] * 2


def one_broken_way(monkeypatch, who):
    """Makes CPU_CASES one case in which this way fails, except in float64, for exactly()."""
    case = SMALL[2]
    inputs = case.inputs(CPU)

    def broken(*x):
        if x[0].dtype == torch.float32:
            raise RuntimeError("out of luck\nand more")
        return case.ways[who](*x)

    ways = case.ways | {who: broken}
    cases = [case._replace(ways=ways, inputs=lambda device: inputs)]
    monkeypatch.setattr(bench, "CPU_CASES", cases)


@pytest.fixture
def on_cpu(tmp_path, monkeypatch):
    """main() measures on the CPU; -> the file of its results."""
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["bench.py", "--out", str(file)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return file


def test_failure_of_a_package_is_recorded_only(on_cpu, monkeypatch, capsys):
    one_broken_way(monkeypatch, "eager")
    bench.main()
    out = capsys.readouterr().out
    assert "PyTorch path" in out and "RuntimeError: out of luck\n" in out


def test_failure_of_ours_is_recorded_and_the_exit_code(on_cpu, monkeypatch, capsys):
    one_broken_way(monkeypatch, "ours")
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "RuntimeError: out of luck\n" in printed.out
    assert "moco_loss B=8 K=100 D=32: RuntimeError: out of luck" in printed.err


def test_no_folder_or_no_json(tmp_path, monkeypatch, capsys):
    """Without the folder nothing is measured."""
    file = tmp_path / "none" / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["bench.py", "--out", str(file)])
    with pytest.raises(SystemExit):
        bench.main()
    assert "there is no folder" in capsys.readouterr().err

    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n{broken\n")
    with pytest.raises(SystemExit):
        bench.read(file)
    assert "line 2: not a row of results" in capsys.readouterr().err


def line_of_simclr(table):
    (line,) = [line for line in table.splitlines() if line.startswith("| simclr_loss")]
    return line


def test_table_without_rows(tmp_path):
    assert bench.read(tmp_path / "none") == []
    lines = bench.table([]).splitlines()
    lines = [line for line in lines if line.startswith("| ") and not line.startswith("| kernel")]
    assert len(lines) == len(bench.GPU_CASES) + len(bench.CPU_CASES)
    assert all("not run" in line for line in lines)


def test_every_kernel_has_a_line_on_both_devices():
    """Also before it has been measured: then the line says so, beside the lines of others."""
    ops = {case.op for case in bench.GPU_CASES}
    assert ops == {case.op for case in bench.CPU_CASES} == {case.op for case in SMALL}

    about = {"device": "a device", "who": "ours", "ms": 2.0}
    for kind, cases in (("cuda", bench.GPU_CASES), ("cpu", bench.CPU_CASES)):
        rows = [about | {"type": kind, "op": c.op, "size": c.size} for c in cases]
        rows = [row for row in rows if row["op"] != "bank_loss"]
        lines = bench.device_table("a device", rows, cases, bench.COLUMNS[kind])
        banks = [line for line in lines if line.startswith("| bank_loss")]
        assert banks and len(lines) == 5 + len(cases)
        assert all(line.split(" | ")[2] == "not run" for line in banks)
        others = [line for line in lines if line.startswith("| moco_loss")]
        assert all(line.split(" | ")[2] == "2" for line in others)


def test_table_by_hand():
    case = bench.simclr_case(64, 32)
    about = {"type": "cuda", "device": "H200", "date": "today"}

    def row(who, **fields):
        return {"op": case.op, "size": case.size, "who": who} | about | fields

    ours = {"ms": 2.0, "rate": 456.7, "share": 0.5, "memory_mb": 3.0}
    ours |= {"value_error": 1e-6, "gradient_error": 2e-6}
    rows = [
        row("ours", ms=99.0),
        row("ours", **ours),
        row("eager", ms=8.0),
        row("compile", error="OutOfMemoryError: much"),
        row("memeff", ms=4.0),
        row("lightly", ms=3.0),
        row("inf_cl", error="ImportError: it"),
    ]
    line = line_of_simclr(bench.table(rows, [case], []))
    start = "| simclr_loss | M=64 D=32 | 2 | 457 | 0.5 | 3 | 1e-06, 2e-06"
    assert line == f"{start} | - | 8 | not run | out of memory | 3, lightly |"

    # The rows above are older than the field "repeatable".
    for repeatable, word in ((True, "yes"), (False, "no")):
        newer = [row("ours", **ours, repeatable=repeatable), row("max-autotune", ms=2.5)]
        line = line_of_simclr(bench.table(rows + newer, [case], []))
        assert line == f"{start} | {word} | 8 | not run | out of memory | 2.5, max-autotune |"

    on_cpu = [row | {"type": "cpu", "device": "a CPU"} for row in rows]
    table = bench.table(on_cpu, [], [case])
    line = line_of_simclr(table)
    assert line == "| simclr_loss | M=64 D=32 | 2 | 8 | 0.25 | 3 | - | 1e-06, 2e-06 | - |"
    assert "a CPU: date today" in table and "H200" not in table


def test_sizes():
    """A row is found by its kernel and size: sizes are unique, and all rows of a CPU are still
    in the table."""
    every_way = {way for _, ways in bench.STAGES for way in ways}
    for cases in (bench.GPU_CASES, bench.CPU_CASES, SMALL):
        assert len({(case.op, case.size) for case in cases}) == len(cases)
        assert all(set(case.ways) <= every_way for case in cases)

    recorded = set()
    for row in bench.read(bench.RESULTS):
        if row["type"] == "cpu":
            recorded.add((row["op"], row["size"]))
    assert recorded <= {(case.op, case.size) for case in bench.CPU_CASES}

    dtypes = {}
    for case in bench.GPU_CASES:
        if case.op == "sinkhorn" and case.size.startswith("B=4096 K=3000"):
            dtypes[case.size] = case.inputs(CPU)[0].dtype
    assert dtypes == {"B=4096 K=3000": torch.float16, "B=4096 K=3000 fp32": torch.float32}


def test_random_embeddings():
    """All cosines have mean 0 and variance 1 / D, also those of a pair. Where embeddings are not
    random, pairs are alike."""
    case = bench.simclr_case(512, 64, random=True)
    assert case.size == "M=512 D=64 random"
    x, y = [x.detach() for x in case.inputs(CPU)]
    assert x.norm(dim=1).sub(1).abs().max() < 1e-5
    for cosines in (x @ x.T - torch.eye(256), (x * y).sum(1)):
        assert abs(cosines.mean()) < 0.02
        assert cosines.std() == pytest.approx(1 / 8, rel=0.15)

    x, y, _ = bench.clip_case(256, 64).inputs(CPU)
    assert (x * y).sum(1).mean() > 0.8


def test_order_of_measuring(monkeypatch):
    """Stage by stage, and in each the first sizes first; packages if they are installed;
    max-autotune for the first size of each function."""
    installed = {"open_clip_torch": "3", "inf-cl": "1"}
    monkeypatch.setattr(bench, "version", installed.get)
    limits = [seconds for seconds, _ in bench.STAGES]
    stages = []
    by_stage = [[], [], [], []]
    for seconds, case, ways in bench.plan(bench.GPU_CASES, gpu=True):
        stage = limits.index(seconds)
        stages.append(stage)
        by_stage[stage].append((case, set(ways)))
    assert stages == sorted(stages) and set(stages) == {0, 1, 2, 3}

    first = {}
    for case in bench.GPU_CASES:
        first.setdefault(case.op, case.size)
    for stage in (0, 2, 3):
        begin = by_stage[stage][: len(first)]
        assert [(case.op, case.size) for case, _ in begin] == list(first.items())

    ours, packages, compiled, autotuned = by_stage
    assert len(ours) == len(compiled) == len(bench.GPU_CASES)
    assert len(autotuned) == len(first)
    assert all(ways == {"max-autotune"} for _, ways in autotuned)
    assert {case.op for case, _ in packages} == {"clip_loss"}
    of_size = [ways for case, ways in packages if case.size == "N=8192 D=128"]
    assert of_size == [{"open_clip", "inf_cl"}]

    on_cpu = [set(ways) for _, _, ways in bench.plan(bench.CPU_CASES, gpu=False)]
    assert on_cpu == [{"ours", "eager"}] * len(bench.CPU_CASES)


def test_nothing_begins_after_its_time(monkeypatch, tmp_path, capsys):
    case = SMALL[0]
    late = [
        (-1.0, case, {"ours": case.ways["ours"]}),
        (600.0, case, {"eager": case.ways["eager"]}),
    ]
    monkeypatch.setattr(bench, "plan", lambda cases, gpu: late)
    bench.run(SMALL, CPU, tmp_path / "rows.jsonl")
    assert keys(bench.read(tmp_path / "rows.jsonl")) == [("simclr_loss", "eager")]
    assert "no time left for simclr_loss M=64 D=32: ours" in capsys.readouterr().out


def test_versions_of_packages(tmp_path, monkeypatch):
    """A row names the version of the package that computed it. A package may be listed under
    another name than its module has."""
    case = SMALL[1]
    plain = case.ways["eager"]
    planned = [(600.0, case, {"eager": plain, "open_clip": plain})]
    monkeypatch.setattr(bench, "version", lambda name: f"{name} 3.0")
    monkeypatch.setattr(bench, "plan", lambda cases, gpu: planned)
    bench.run(SMALL, CPU, tmp_path / "rows.jsonl")
    packages = [row["package"] for row in bench.read(tmp_path / "rows.jsonl")]
    assert packages == [None, "open_clip_torch 3.0"]


def test_help(program):
    text = " ".join(program("kernels/bench.py", "--help").stdout.split())
    assert "results.jsonl" in text and "Measures the kernels beside plain PyTorch" in text
