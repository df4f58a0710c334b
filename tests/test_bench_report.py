"""bench/report.py on JSON made by hand: the goals, the page, the README's section, and files that it refuses."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import goals  # noqa: E402
import report  # noqa: E402
import report_figures  # noqa: E402
import report_rows  # noqa: E402
from report_rows import BOTH, FORWARD  # noqa: E402

pytest.importorskip("matplotlib")

MACHINE = {"processor": "Test CPU", "torch": "2.13", "torch_threads": 2, "packages": {"trl": "1.16.0", "verl": None}}
SIZES = {"n": 2048, "d": 1024, "v": 32768}
KTO, WITH = "ours, native, linear_step_kto", " with its reference"


def role(provider):
    bare = provider in ("bare products", "copy of its bytes")
    plain = provider.startswith(("full logits", "plain torch"))
    return "ours" if provider.startswith("ours") else "bare" if bare else "torch" if plain else "peer"


def bench(suite, provider, seconds, **facts):
    facts = {"suite": suite, "provider": provider, "role": role(provider), "dtype": "bf16", "shape": "32k"} | facts
    return {
        "fullname": f"bench/bench_{suite}.py::test_it[{' - '.join(map(str, facts.values()))} - {provider}]",
        "stats": {"median": seconds, "iqr": 0.01 * seconds, "rounds": 3},
        "extra_info": facts,
    }


def head(provider, seconds, suite="head", op="linear_logp", **facts):
    facts = {"inputs": "peaked 0.6", "way": BOTH, "entropy": 0.57} | SIZES | facts
    return bench(suite, provider, seconds, op=op, **facts)


def heads(rho=0.05):
    return [
        head("bare products", 0.4, way=FORWARD),
        head("ours, native", 0.3, way=FORWARD, value_error=2e-6, peak_share=0.01),
        head("bare products", 0.4, way=FORWARD, dtype="fp32"),
        head("ours, native", 0.6, way=FORWARD, dtype="fp32"),
        head("bare products", 1.0, tflops=0.4),
        head("ours, native", 0.4, rho=rho, value_error=3e-6, gradient_error=1e-3, peak_share=0.06, peak_bytes=8.05e6),
        head("ours, native, exact", 1.4, value_error=3e-6),
        head("torch linear_cross_entropy", 1.3, value_error=0.18),
        head("bare products", 1.0, inputs="flat", entropy=10.2),
        head("ours, native", 1.6, inputs="flat", entropy=10.2, rho=1.0),
    ]


def objectives(rho=0.05):
    op = "linear_step_kto"
    return [
        head(KTO, 0.4, "objective", op, rho=rho),
        head("Liger KTO", 2.0, "objective", op),
        head("Liger KTO, compiled", 0.7, "objective", op),
        head(KTO + WITH, 0.8, "objective", op + WITH, rho=rho),
        head(f"Liger KTO{WITH}", 1.6, "objective", op + WITH),
    ]


def levels():
    def level(inputs, entropy, rho, ours, peer):
        facts = {"inputs": inputs, "entropy": entropy}
        mine = head("ours, native", ours, "entropy", rho=rho, **facts)
        return [mine, *(head(name, s, "entropy", **facts) for name, s in (("bare products", 1.0), ("TRL", peer)))]

    return [*level("peaked 0.3", 0.3, 0.04, 0.4, 2.0), *level("flat", 9.7, 1.0, 1.5, 1.2), *level("real", 3, 0.2, 1, 2)]


def scalings():
    found = []
    for axis, seconds, name in (("n", 0.1, "ours, native"), ("n", 0.4, "TRL"), ("d", 0.1, "ours, native")):
        for factor in (1, 2):
            facts = {
                axis: factor * SIZES[axis],
                "axis": axis,
                "value": factor * SIZES[axis],
                "peak_bytes": 1e6 * factor,
            }
            found.append(head(name, factor * seconds, "scaling", **facts))
    largest = {"n": 131072, "budget_bytes": 2**30, "limited_by": "memory", "tried": 262144}
    return [*found, head("ours, native", 2.0, "largest", **largest)]


def loops():
    step = {"op": "step", "shape": "goal", "tokens": 1000}
    speeds = {"ours, Step-KTO": 1000, "ours, reference backend": 400, "TRL KTOTrainer": 100}
    speeds |= {"TRL KTOTrainer, Liger": 160, "TRL KTOTrainer, apo_zero_unpaired": 125}
    factors = {"ours, Step-KTO": 1000, "dense backward": 500, "padded": 625}
    return [
        *(bench("end_to_end", name, 1000 / s, tokens_per_s=s, **step) for name, s in speeds.items()),
        *(bench("factors", name, 1000 / s, tokens_per_s=s, **step) for name, s in factors.items()),
        *(bench("end_to_end", name, 1.0, tokens_per_s=1, **step | {"shape": "quick"}) for name in speeds),
        bench("rollout", "ours, vLLM", 2.0, note="batches | of 8", **step),
    ]


def tokens(suite="step_kto", ours=0.0123):
    facts = {"op": suite, "dtype": "fp32", "shape": "1M in 50,000 steps", "n": 1_000_000}
    pairs = (("copy of its bytes", 0.001, 12.0), ("ours, native", ours, 1.0), ("plain torch", 0.02, 0.6))
    return [bench(suite, name, seconds, gb_per_s=rate, **facts) for name, seconds, rate in pairs]


def results(*benches, **others):
    commit = {"id": "0123456789abcdef", "dirty": False}
    whole = {"machine_info": MACHINE, "commit_info": commit, "datetime": "2026-01-02T03:04:05"}
    return whole | {"benchmarks": list(benches)} | others


def everything():
    missing = {
        "bench_head.py::test_it[32k - bf16 - verl]": "Skipped: verl: needs a GPU",
        "bench_head.py::test_it[32k - fp32 - verl]": "Skipped: verl: needs a GPU",
        "bench_head.py::test_it[32k - QuACK]": "needs a GPU",
        "bench_end_to_end.py::test_it[goal-bf16-vLLM, fast]": "needs a GPU",
        "bench_head.py::test_it[32k - TRL]": "TRL: error in /some/where/else/peers.py: a < b",
    }
    suites = heads(), objectives(), levels(), scalings(), loops(), tokens(), tokens("reference_points")
    return results(*(bench for suite in suites for bench in suite), not_timed=missing)


def store(path, data):
    path.write_text(json.dumps(data))
    return path


def goals_of(tmp_path, *benches):
    found = goals.cpu(report_rows.read([store(tmp_path / "goals.json", results(*benches))]).rows)
    return {goal.text.partition(":")[0]: goal for goal in found}


def test_goals_are_met_missed_or_not_measured_by_the_worst_case(tmp_path):
    found = list(goals_of(tmp_path, *heads(), *objectives(), *loops(), *tokens()).values())
    assert [(g.status, next(iter(g.found.values()), None)) for g in found] == [
        ("missed", pytest.approx(1.5)),  # forward: met in bf16, missed in fp32
        ("met", pytest.approx(0.4)),  # at rho of 0.1 or less
        ("met", pytest.approx(1.4)),  # exact
        ("missed", pytest.approx(1.6)),  # flat
        ("met", pytest.approx(3.25)),  # torch
        ("missed", pytest.approx(1.75)),  # Liger, by its compiled form
        ("met", pytest.approx(2.0)),  # Liger with its reference, exactly
        ("not measured", None),  # TRL in bf16
        ("not measured", None),  # and fp32
        ("met", 3e-6),
        ("missed", pytest.approx(6.0)),  # memory, in per cent
        ("missed", pytest.approx(12.3)),
        ("met", pytest.approx(2.5)),  # the reference backend
        ("missed", pytest.approx(6.25)),  # TRL's trainer, by its fastest configuration
    ]
    assert list(found[0].found.items()) == [
        ("32k fp32, peaked 0.6", pytest.approx(1.5)),
        ("32k bf16, peaked 0.6", pytest.approx(0.75)),
    ]
    assert found[0].missing == ["152k bf16", "152k fp32"]
    assert list(found[-1].found.values()) == pytest.approx([6.25, 8.0, 10.0])


def test_paragraphs_explain_only_what_their_status_is_about(tmp_path):
    missed = goals_of(tmp_path, *heads())["flat inputs, where everything is visited"].paragraph()
    assert missed.startswith(
        "**Missed: flat inputs, where everything is visited: at most 1.5 of the bare products' time.**"
    )
    assert "1.60 (32k bf16, flat). Logits that are not stored are multiplied twice" in missed
    assert missed.endswith("Not measured: 32k fp32, flat, 152k bf16, flat, 152k fp32, flat.")
    met = goals_of(tmp_path, head("bare products", 2.0, inputs="flat"), head("ours, native", 1.6, inputs="flat"))
    assert "multiplied twice" not in met["flat inputs, where everything is visited"].paragraph()
    assert (
        goals_of(tmp_path, *heads())["step_kto of a million tokens in 50,000 steps"]
        .paragraph()
        .endswith(
            "**Not measured: step_kto of a million tokens in 50,000 steps: at most 10 ms.** This run has no such rows."
        )
    )


@pytest.mark.parametrize("rho", [0.2, None])
def test_what_leaves_more_to_visit_says_nothing_of_sparse_goals(tmp_path, rho):
    status = [goal.status for goal in goals_of(tmp_path, *heads(rho), *objectives(rho)).values()]
    assert status[:7] == ["missed", "not measured", "met", "missed", *["not measured"] * 3]


def test_goals_on_a_gpu_are_those_of_its_own_script(tmp_path):
    assert {(goal.status, goal.why) for goal in goals.gpu(tmp_path)} == {("not measured", "No GPU run is stored")}
    item = {"status": "ok", "shape": "trl", "pass": "forward", "inputs": "flat"}
    items = [item | {"provider": "bare 2NDV", "median_ms": 9.0}, item | {"provider": "ours", "median_ms": 10.0}]
    store(tmp_path / "nvidia-test.json", {"machine": {"gpu": "Test GPU"}, "items": items})
    first, second, *_ = goals.gpu(tmp_path)
    assert (first.status, first.found, second.why) == ("met", {"flat": 0.9}, "That run has no such items")
    (tmp_path / "nvidia-test.json").write_text("{")
    with pytest.raises(report_rows.ResultsError, match=r"nvidia-test\.json is not JSON"):
        goals.gpu(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (0.0, "0"), (7, "7"), (1.0, "1.00"), (9.999, "10.0"), (0.07101, "0.0710"), (44702.1, "44,700"),
        (1e-5, "1.00e-05"), (131072, "131,000"), (-0.5, "-0.500"),
    ],
)  # fmt: skip
def test_three_digits(value, text):
    assert report_rows.digits(value) == text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The report of everything."""
    folder = tmp_path_factory.mktemp("report")
    path = store(folder / "cpu.json", everything())
    assert report.main([str(path), "--out", str(folder / "out")]) == 0
    return folder / "out"


def squeezed(text):
    """Its lines, however wide their columns are."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_page_says_what_was_measured(whole):
    text = (whole / "benchmarks.md").read_text()
    assert text.startswith("<!-- Generated: change nothing here, but run python bench/report.py cpu.json -->")
    for line in (
        "# Benchmarks: Test CPU, 2 threads",
        "- Versions: torch 2.13, trl 1.16.0",
        "- Commit 0123456789ab, 2026-01-02",
        "- 32k (N, D, V = 2048, 1024, 32768), bf16: 400 ms; 0.400 of the bare products' time; 3.25 times as fast as "
        "the best peer, torch linear_cross_entropy; rho 0.0500",
        "### `linear_logp`: 32k (N, D, V = 2048, 1024, 32768), bf16, peaked 0.6 (0.570 nats), forward and backward",
        "| **ours, native** | 400 | 1.00 | | 0.400 | 1.00 | 3.25 | 0.0500 | 3.00e-06 | 0.00100 | 8.05 | 6.00 |",
        "| bare products | 1,000 | 1.00 | 0.400 | 1.00 | 2.50 | | | | | | |",
        "| ours, native, exact | 1,400 | 1.00 | | 1.40 | 3.50 | 0.929 | | 3.00e-06 | | | |",
        "In bf16 ours is slower than the best peer on flat (0.800).",
        "| flat | 2048, 1024, 32768 | 9.70 | 1.00 | 1,500 | 1,000 | 1.50 | 0.800 | TRL |",
        "| ours, native | bf16 | 131,072 | 1.00 | memory | 262,144 | 2,000 |",
        "### `step_kto`: 1M in 50,000 steps, 1,000,000 tokens, fp32",
        "| **ours, native** | 12.3 | 1.00 | 1.00 | 12.3 | 1.63 |",
        "| dense backward | 500 | 2.00 | 2.00 | 2,000 | 1.00 |",
        "| padded | 625 | 0.800 | 1.60 | 1,600 | 1.00 |",
        "| ours, vLLM | 500 | 2,000 | 1.00 | batches \\| of 8 |",
        "### On this machine: 6 met, 6 missed, 2 not measured",
        "- verl; QuACK; vLLM, fast: needs a GPU",
        "- TRL: error in peers.py: a &lt; b",
    ):
        assert line in squeezed(text), line
    # what others need is folded, and every image that is named is there
    assert text.index("<details><summary>3 more") < text.index("(10.2 nats), forward and backward")
    named = {line.rpartition("(")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert named == {path.name for path in whole.glob("*.png")} - {"bench-readme.png"}
    assert len(named) == 7


def test_figures_are_small_pngs(whole):
    for path in whole.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000, path.name


def test_neither_exact_nor_reference_stand_for_ours(tmp_path):
    names = {"ours, reference, x": 1.0, KTO + WITH: 3.0, "ours, native, exact": 2.0, "TRL": 0.5}
    path = store(tmp_path / "rows.json", results(*(head(name, seconds) for name, seconds in names.items())))
    rows = report_rows.read([path]).rows
    assert report_rows.chief_of(rows)["provider"] == KTO + WITH
    assert report_rows.chief_of(rows.where(provider="ours, native, exact"))["ms"] == 2000.0
    assert report_rows.chief_of(rows.where(provider="TRL")) is None


def test_labels_keep_apart():
    assert report_figures.apart([0.5, 0.5, 0.1], 0.2) == pytest.approx([0.5, 0.7, 0.1])
    placed = report_figures.apart([0.95, 1.0, 0.9], 0.1)
    assert placed == pytest.approx([0.9, 1.0, 0.8])


MARKED = "before\n<!-- benchmarks: start -->\nold\n<!-- benchmarks: end -->\nafter\n"


def test_readme_changes_between_its_markers_only(tmp_path):
    data = report_rows.read([store(tmp_path / "cpu.json", everything())])
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    found = report.generate(data, tmp_path / "docs", readme).texts[readme]
    assert found.startswith("before\n<!-- benchmarks: start -->\nForward and backward at N, D, V = 2048, 1024, 32768")
    assert found.endswith("<!-- benchmarks: end -->\nafter\n")
    assert "old" not in found
    for line in (
        "| | bf16, ms |",
        "| **ours, native** | 400 |",
        "| torch linear_cross_entropy | 1,300 (3.25x) |",
        "| Liger KTO | 700 (1.75x) |",
        "Training from end to end, tokens/s with Step-KTO: 1,000 (bf16), 10.0 times TRL KTOTrainer, 6.25 times TRL "
        "KTOTrainer, Liger.",
        "![Forward and backward of the LM head by provider](docs/bench-readme.png)",
        "[All figures, what they mean and how to run them again](docs/benchmarks.md). Of the goals on this machine: "
        "6 met, 6 missed, 2 not measured.",
    ):
        assert line in squeezed(found), line
    readme.write_text("no markers\n")
    assert report.generate(data, tmp_path / "docs", readme).texts[readme] == "no markers\n"


@pytest.mark.parametrize(
    "benches",
    [
        [*tokens()],
        [head("TRL", 1.0)],
        [head("ours, native", 1.0, "kl", "linear_logp_kl")],
        [head("ours, native", 1.0, "entropy")],
        [{"fullname": "x", "stats": {"median": 1.0}, "extra_info": {"suite": "head", "provider": "ours"}}],
        [*heads(), {"fullname": "other", "stats": {"median": 1.0}, "extra_info": {}}],
        [head(name, 1.0, shape="quick") for name in ("ours, native", "TRL")],
    ],
)  # fmt: skip
def test_any_part_of_a_run_makes_a_report(tmp_path, benches):
    path = store(tmp_path / "part.json", results(*benches))
    (tmp_path / "README.md").write_text(MARKED)
    assert report.main([str(path), "--out", str(tmp_path / "out"), "--readme", str(tmp_path / "README.md")]) == 0
    assert "## The goals" in (tmp_path / "out" / "benchmarks.md").read_text()


def test_files_of_a_machine_with_a_gpu_have_names_of_their_own(tmp_path):
    path = store(tmp_path / "gpu.json", results(*heads(), machine_info=MACHINE | {"gpu": "Test GPU"}))
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"benchmarks-gpu.md", "bench-gpu-head.png", "bench-gpu-readme.png"}
    assert "# Benchmarks: Test GPU" in (tmp_path / "out" / "benchmarks-gpu.md").read_text()


def test_files_of_one_run_are_read_as_one(tmp_path):
    old, new = head("ours, native", 0.9), head("ours, native", 0.4)
    identity = old["fullname"].removeprefix("bench/")
    first = store(tmp_path / "a.json", results(old, head("TRL", 1.0), not_timed={"b.py::c": "no", "d.py::e": "why"}))
    other = head("TRL", 2.0, dtype="fp32") | {"fullname": "bench/b.py::c"}
    second = store(tmp_path / "b.json", results(new | {"fullname": identity}, other))
    found = report_rows.read([first, second])
    assert [row["ms"] for row in found.rows] == [400.0, 1000.0, 2000.0]
    assert found.not_timed == {"d.py::e": "why"}


OTHER = {"commit": {"commit_info": {"id": "fedcba"}}, "torch": {"machine_info": MACHINE | {"torch": "2.12"}}}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (None, "second.json: No such file"),
        ("{", "second.json is not JSON"),
        ("[]", "second.json is JSON, but not pytest-benchmark's"),
        (json.dumps({"items": []}), "second.json is JSON, but not pytest-benchmark's"),
        (json.dumps(results(*heads(), **OTHER["commit"])), "second.json and first.json differ in commit"),
        (json.dumps(results(*heads(), **OTHER["torch"])), "second.json and first.json differ in torch"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_overwrites_nothing(tmp_path, capsys, second, message):
    first = store(tmp_path / "first.json", results(*heads()))
    if second is not None:
        (tmp_path / "second.json").write_text(second)
    page = tmp_path / "benchmarks.md"
    page.write_text("as it was")
    assert report.main([str(first), str(tmp_path / "second.json"), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert page.read_text() == "as it was"
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("readme", ["<!-- benchmarks: start -->\n", MARKED + MARKED])
def test_broken_markers_and_empty_runs_are_refused(tmp_path, capsys, readme):
    path = store(tmp_path / "cpu.json", results(*heads()))
    (tmp_path / "README.md").write_text(readme)
    assert report.main([str(path), "--out", str(tmp_path), "--readme", str(tmp_path / "README.md")]) == 1
    assert "README.md: write <!-- benchmarks: start -->" in capsys.readouterr().err
    store(path, results())
    assert report.main([str(path), "--out", str(tmp_path)]) == 1
    assert "cpu.json holds no benchmarks" in capsys.readouterr().err


def test_check_knows_a_stale_page(whole, tmp_path, capsys):
    path = store(tmp_path / "cpu.json", everything())
    arguments = ["--check", str(path), "--out", str(tmp_path / "out")]
    assert report.main(arguments) == 1  # there is none
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    page = tmp_path / "out" / "benchmarks.md"
    page.write_text((whole / "benchmarks.md").read_text())
    assert report.main(arguments) == 0
    page.write_text(page.read_text() + "by hand\n")
    assert report.main(arguments) == 1
    assert "benchmarks.md is not what these results give" in capsys.readouterr().err
    assert page.read_text().endswith("by hand\n")
