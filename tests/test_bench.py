"""kernels/bench.py: all ways to compute a case agree, its rows, and the table made from them. Times are not tested."""

import itertools
import weakref

import pytest
import torch

from kernels import bench

CPU = torch.device("cpu")
SMALL = [bench.simclr_case(64, 32), bench.clip_case(64, 128), bench.moco_case(8, 100, 32),
         *(of(20, 30, torch.float32) for of in (bench.sinkhorn_case, bench.potentials_case, bench.assignment_case)),
         *bench.mae_cases(2, torch.float32, D=8, decoder=6)]


def test_rows_of_ours_and_of_the_plain_formula(tmp_path):
    """Both agree in every case, value and gradients, and each is a row with all that the table needs."""
    assert bench.run(SMALL, CPU, tmp_path / "rows.jsonl") == []
    rows = bench.read(tmp_path / "rows.jsonl")
    assert {(row["op"], row["who"]) for row in rows} == {(case.op, who) for case in SMALL for who in ("ours", "eager")}
    for row in rows:
        # Float32 rounds exponents of 10 to 20 by 1e-6, and the least of the losses is 1.4e-3; a wrong formula is off by 1e-2.
        assert row["value_error"] < 1e-3 and (row["gradient_error"] is None or row["gradient_error"] < 1e-3), row
        assert (row["gradient_error"] is None) == (row["op"] in ("random_masking", "sinkhorn", "sinkhorn_potentials"))
        assert row["ms"] > 0 and row["rate"] > 0 and row["share"] is None and row["type"] == "cpu"
        assert row["repeatable"] is True
        assert {"device", "driver", "torch", "triton", "date", "commit", "package", "memory_mb", "unit"} <= set(row)
    lines = bench.table(rows, [], SMALL).splitlines()
    assert lines[0] == "GPU: not run" and sum(line.startswith("| ") for line in lines) == 1 + len(SMALL)
    assert "not run" not in "".join(lines[1:]) and rows[0]["device"] in "".join(lines)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", SMALL[:3], ids=lambda case: case.op)
def test_other_ways(case):
    """They multiply in bf16, with errors of 2^-9 in each logit, up to 10 (simclr, moco) or 14 (clip): 0.03 in the loss."""
    inputs = case.inputs(CPU)
    want = case.ways["ours"](*inputs).item()
    assert case.ways["eager bf16"](*inputs).item() == pytest.approx(want, abs=0.03)
    flex = {"simclr_loss": bench.flex_simclr, "clip_loss": bench.flex_clip, "moco_loss": bench.flex_moco}[case.op]
    assert flex(*(x.detach() for x in inputs)).item() == pytest.approx(want, abs=0.03)


def test_on_a_gpu_our_losses_get_rows_in_float16():
    class OnGPU:
        is_cuda, dtype = True, torch.float32

        def __init__(self, ndim):
            self.ndim = ndim

        def half(self):
            return "float16"

    seen, scale = [], OnGPU(0)
    bench.halved(lambda *x: seen.extend(x))(OnGPU(2), scale)
    assert seen == ["float16", scale]
    z = torch.zeros(2, 3)
    assert bench.halved(lambda x: x)(z) is z


@pytest.mark.parametrize("op, who, module", [("simclr_loss", "lightly", "lightly.loss.ntx_ent_loss"),
                                             ("sinkhorn", "lightly", "lightly.loss.swav_loss"),
                                             ("clip_loss", "open_clip", "open_clip.loss")])
def test_packages_that_run_on_a_cpu(op, who, module):
    """They agree with ours: losses to the digits of float32, assignments (of 30 prototypes, 0.03 on average) relatively."""
    pytest.importorskip(module)
    case = next(case for case in SMALL if case.op == op)
    inputs = case.inputs(CPU)
    torch.testing.assert_close(case.ways[who](*inputs), case.ways["ours"](*inputs), rtol=1e-4 * (op == "sinkhorn"), atol=1e-5)


def test_scores_in_float16_do_not_overflow_in_lightly():
    """exp(1 / 0.05) = 5e8 exceeds float16."""
    pytest.importorskip("lightly.loss.swav_loss")
    case = bench.sinkhorn_case(20, 30)
    scores = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)).half()
    torch.testing.assert_close(case.ways["lightly"](scores), case.ways["ours"](scores), rtol=1e-3, atol=1e-6)


def off(way):
    """The same, off by a hundredth: values, and gradients if there are any."""
    return lambda *inputs: 1.01 * way(*inputs)


@pytest.mark.parametrize("case", [case for case in SMALL if case.op not in ("random_masking", "sinkhorn_potentials")],
                         ids=lambda case: case.op)
def test_errors_are_from_the_plain_formula(case):
    """A wrong kernel shows, even if its PyTorch path is as wrong. Ours takes its place only where it would not fit."""
    case = case._replace(ways=case.ways | {"ours": off(case.ways["ours"])})
    for elements, right, wrong in ((case.elements, "eager", "ours"), (2**40, "ours", "eager")):
        rows = bench.measure(case._replace(elements=elements), {who: case.ways[who] for who in ("ours", "eager")}, CPU, None)
        errors = {row["who"]: [row[kind + "_error"] for kind in ("value", "gradient") if row[kind + "_error"]] for row in rows}
        assert max(errors[right], default=0) < 1e-3 and min(errors[wrong]) == pytest.approx(0.01, rel=0.1), errors


def test_plain_formulas_in_float64_are_exact():
    """No step of them goes through float32, or else the errors would be from something as inexact as what is measured."""
    for case in SMALL:
        inputs = [x.detach().double() if x.is_floating_point() else x for x in case.inputs(CPU)]
        found = [case.view(case.ways[who](*inputs), *inputs) for who in ("ours", "eager")]
        assert found[1].dtype == torch.float64 and bench.relative(*found) < 1e-11, case.op
    assert case.op == "masked_patch_mse" and inputs[1].dtype == torch.uint8  # whose pixels stay uint8


def test_the_formula_fits_where_it_is_used():
    """All of CPU_CASES by far. 2^30 logits on a GPU with 80 GB: 48 bytes for each were counted at most."""
    assert max(64 * case.elements for case in bench.CPU_CASES) * 2 < 2**32
    above = {f"{case.op} {case.size}" for case in bench.GPU_CASES if 64 * case.elements > 80e9}
    assert above == {*(f"simclr_loss M=65536 D={D}" for D in (128, 256, 512, 1024)), "sinkhorn B=32768 K=65536",
                     *(f"clip_loss N=65536 D={D}" for D in (128, 256, 512, 1024)), "sinkhorn_potentials B=32768 K=65536"}


def test_repeatable():
    """Bits decide, in any part of a result: values, gradients, of which some are missing, and nested ones."""
    case, count = SMALL[2], itertools.count()
    for noise, want in ((0.0, True), (1e-3, False)):
        way = lambda *x: case.ways["eager"](*x) + noise * next(count)  # noqa: E731
        row, = bench.measure(case, {"ours": way}, CPU, None)
        assert row["repeatable"] is want
    way = lambda q, k, queue: (q - q.detach()).sum() * next(count)  # noqa: E731  the value is always 0
    row, = bench.measure(case, {"ours": way}, CPU, None)
    assert row["repeatable"] is False
    a, nan = torch.zeros(2, 3), torch.full((2,), torch.nan)
    assert bench.identical(((a, nan), [None, a.T]), ((a.clone(), nan.clone()), [None, a.clone().T]))
    for b in (-a, a + 1e-30):
        assert not bench.identical((a, a), (a, b)) and not bench.identical([None, a.half()], [None, (b * 1e25).half()])


def test_memory_of_a_known_size():
    """16 MB that are written and freed within the call; other memory of the process may come and go, 4 MB at most."""
    found, result = bench.peak_memory(lambda: torch.ones(4 * 2**20).sum().item(), CPU)
    assert result == 4 * 2**20 and (found is None or found == pytest.approx(16.8, abs=4))


def test_a_failed_way_leaves_no_memory_behind():
    """Even if the exception holds itself, and so its frames and their tensors: the next way needs the room."""
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

    first, second = bench.measure(SMALL[0], {"eager": broken, "compile": after}, CPU, None)
    assert first["error"] == "RuntimeError: too little memory" and "error" not in second
    assert len(held) == 1  # it is not tried again


def test_too_little_memory_for_what_all_ways_need(tmp_path):
    """Each of them is recorded so, and the run goes on."""
    def too_large(device):
        raise torch.OutOfMemoryError("much")
    rows = tmp_path / "rows.jsonl"
    failed = bench.run([SMALL[0]._replace(inputs=too_large), SMALL[1]], CPU, rows)
    assert [(row["who"], row["error"]) for row in failed] == [("ours", "OutOfMemoryError: much")]
    assert [(row["op"], "error" in row) for row in bench.read(rows)] == [("simclr_loss", True)] * 2 + [("clip_loss", False)] * 2


def test_failures(tmp_path, monkeypatch, capsys):
    """One of ours is recorded, told and the exit code; one of another is recorded only. No folder: nothing is measured."""
    def broken(*inputs):
        raise RuntimeError("out of luck\nand more")
    case, file = SMALL[2], tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["bench.py", "--out", str(file)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for who, code in (("eager", None), ("ours", 1)):
        inputs = case.inputs(CPU)
        right = case.ways[who]  # still there for float64
        ways = case.ways | {who: lambda *x: broken() if x[0].dtype == torch.float32 else right(*x)}
        monkeypatch.setattr(bench, "CPU_CASES", [case._replace(ways=ways, inputs=lambda device: inputs)])
        if code:
            with pytest.raises(SystemExit) as stop:
                bench.main()
            assert stop.value.code == code and "moco_loss B=8 K=100 D=32: RuntimeError: out of luck" in capsys.readouterr().err
        else:
            bench.main()
            out = capsys.readouterr().out
            assert "PyTorch path" in out and "RuntimeError: out of luck\n" in out
    monkeypatch.setattr("sys.argv", ["bench.py", "--out", str(tmp_path / "none" / "rows.jsonl")])
    with pytest.raises(SystemExit):
        bench.main()
    assert "there is no folder" in capsys.readouterr().err
    file.write_text("{}\n{broken\n")
    with pytest.raises(SystemExit):
        bench.read(file)
    assert "line 2: not a row of results" in capsys.readouterr().err


def test_table_by_hand(tmp_path):
    case = bench.simclr_case(64, 32)
    assert bench.read(tmp_path / "none") == []
    lines = bench.table([]).splitlines()
    cases = [line for line in lines if line.startswith("| ") and not line.startswith("| kernel")]
    assert len(cases) == len(bench.GPU_CASES) + len(bench.CPU_CASES) and all("not run" in line for line in cases)

    def row(who, **fields):
        return {"op": case.op, "size": case.size, "who": who, "type": "cuda", "device": "H200", "date": "today"} | fields
    ours = {"ms": 2.0, "rate": 456.7, "share": 0.5, "memory_mb": 3.0, "value_error": 1e-6, "gradient_error": 2e-6}
    rows = [row("ours", ms=99.0), row("ours", **ours), row("eager", ms=8.0), row("compile", error="OutOfMemoryError: much"),
            row("memeff", ms=4.0), row("lightly", ms=3.0), row("inf_cl", error="ImportError: it")]
    line, = [line for line in bench.table(rows, [case], []).splitlines() if line.startswith("| simclr_loss")]
    start = "| simclr_loss | M=64 D=32 | 2 | 457 | 0.5 | 3 | 1e-06, 2e-06"
    assert line == f"{start} | - | 8 | not run | out of memory | 3, lightly |"
    for repeatable, word in ((True, "yes"), (False, "no")):  # the rows above are older than this field
        newer = [row("ours", **ours, repeatable=repeatable), row("max-autotune", ms=2.5)]
        line, = [line for line in bench.table(rows + newer, [case], []).splitlines() if line.startswith("| simclr_loss")]
        assert line == f"{start} | {word} | 8 | not run | out of memory | 2.5, max-autotune |"
    cpu = [r | {"type": "cpu", "device": "a CPU"} for r in rows]
    line, = [line for line in bench.table(cpu, [], [case]).splitlines() if line.startswith("| simclr_loss")]
    assert line == "| simclr_loss | M=64 D=32 | 2 | 8 | 0.25 | 3 | - | 1e-06, 2e-06 | - |"
    assert "a CPU: date today" in bench.table(cpu, [], [case]) and "H200" not in bench.table(cpu, [], [case])


def test_sizes():
    """A row is found by its kernel and size: sizes are unique, and those of the CPU are still the recorded ones."""
    for cases in (bench.GPU_CASES, bench.CPU_CASES, SMALL):
        assert len({(case.op, case.size) for case in cases}) == len(cases)
        assert all(who in {way for _, ways in bench.STAGES for way in ways} for case in cases for who in case.ways)
    recorded = {(row["op"], row["size"]) for row in bench.read(bench.RESULTS) if row["type"] == "cpu"}
    assert {(case.op, case.size) for case in bench.CPU_CASES} <= recorded
    scores = {case.size: case.inputs(CPU)[0].dtype for case in bench.GPU_CASES if case.op == "sinkhorn" and "=3000" in case.size
              and "=4096" in case.size}
    assert scores == {"B=4096 K=3000": torch.float16, "B=4096 K=3000 fp32": torch.float32}


def test_random_embeddings():
    """All cosines have mean 0 and variance 1 / D, those of a pair, too. Where they are not random, pairs are alike."""
    x, y = (x.detach() for x in bench.simclr_case(512, 64, random=True).inputs(CPU))
    assert x.norm(dim=1).sub(1).abs().max() < 1e-5
    for cosines in (x @ x.T - torch.eye(256), (x * y).sum(1)):
        assert abs(cosines.mean()) < 0.02 and cosines.std() == pytest.approx(1 / 8, rel=0.15)
    assert bench.simclr_case(512, 64, random=True).size == "M=512 D=64 random"
    x, y = bench.clip_case(256, 64).inputs(CPU)[:2]
    assert (x * y).sum(1).mean() > 0.8


def test_order_of_measuring(monkeypatch):
    """Stage by stage, the first sizes first; packages where installed; max-autotune for the first size of each function."""
    monkeypatch.setattr(bench, "version", lambda name: {"open_clip_torch": "3", "inf-cl": "1"}.get(name))
    found = list(bench.plan(bench.GPU_CASES, gpu=True))
    stages = [[seconds for seconds, _ in bench.STAGES].index(seconds) for seconds, *_ in found]
    assert stages == sorted(stages) and set(stages) == {0, 1, 2, 3}
    first = {}
    for case in bench.GPU_CASES:
        first.setdefault(case.op, case.size)
    by_stage = [[(case, ways) for at, (_, case, ways) in zip(stages, found) if at == stage] for stage in range(4)]
    for stage in (0, 2, 3):
        assert [(case.op, case.size) for case, _ in by_stage[stage][:len(first)]] == list(first.items())
    assert [len(cases) for cases in by_stage[::2]] == [len(bench.GPU_CASES)] * 2 and len(by_stage[3]) == len(first)
    assert {case.op for case, _ in by_stage[1]} == {"clip_loss"}
    assert [set(ways) for case, ways in by_stage[1] if case.size == "N=8192 D=128"] == [{"open_clip", "inf_cl"}]
    assert all(set(ways) == {"max-autotune"} for _, ways in by_stage[3])
    assert [set(ways) for _, _, ways in bench.plan(bench.CPU_CASES, gpu=False)] == [{"ours", "eager"}] * len(bench.CPU_CASES)


def test_nothing_begins_after_its_time(monkeypatch, tmp_path, capsys):
    late = [(seconds, SMALL[0], {who: SMALL[0].ways[who]}) for seconds, who in ((-1.0, "ours"), (600.0, "eager"))]
    monkeypatch.setattr(bench, "plan", lambda cases, gpu: late)
    bench.run(SMALL, CPU, tmp_path / "rows.jsonl")
    assert [row["who"] for row in bench.read(tmp_path / "rows.jsonl")] == ["eager"]
    assert "no time left for simclr_loss M=64 D=32: ours" in capsys.readouterr().out


def test_versions_of_packages(tmp_path, monkeypatch):
    """A row names the version of the package that computed it, which may be listed under another name than its module's."""
    monkeypatch.setattr(bench, "version", lambda name: f"{name} 3.0")
    monkeypatch.setattr(bench, "plan", lambda cases, gpu: [(600.0, SMALL[1], dict.fromkeys(("eager", "open_clip"),
                                                                                         SMALL[1].ways["eager"]))])
    bench.run(SMALL, CPU, tmp_path / "rows.jsonl")
    assert [row["package"] for row in bench.read(tmp_path / "rows.jsonl")] == [None, "open_clip_torch 3.0"]


def test_help(program):
    text = " ".join(program("kernels/bench.py", "--help").stdout.split())
    assert "results.jsonl" in text and "Measures the kernels beside plain PyTorch" in text
