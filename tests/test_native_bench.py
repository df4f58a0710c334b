"""bench/native_table.py on a JSON made by hand: what is met, what is missed, and what nobody measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import native_table  # noqa: E402
from native_table import BOTH, FORWARD  # noqa: E402

MACHINE = {
    "processor": "Test CPU",
    "torch": "2",
    "torch_threads": 2,
    "packages": {"trl": "1.16.0", "liger-kernel": None},
}
PEAKED = "peaked 0.3"


def bench(who, seconds, suite="native", **extra):
    return {
        "fullname": f"bench/bench_{suite}.py::test_it[{who}]",
        "params": {"who": who},
        "stats": {"median": seconds, "rounds": 3},
        "extra_info": extra,
    }


def head(who, seconds, way=BOTH, inputs=PEAKED, shape="32k", dtype="bf16", **extra):
    facts = {
        "shape": shape,
        "size": "(2048, 1024, 32768)",
        "dtype": dtype,
        "inputs": inputs,
        "way": way,
        "entropy": 0.3,
    }
    return bench(who, seconds, **facts, **extra)


PLANTED = {"inputs": "planted", "way": "filter_eps 0.00195"}


def results(rho=0.05):
    return {
        "machine_info": MACHINE,
        "commit_info": {"id": "abc", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "not_timed": {"one": "Skipped: no TRL", "two": "Skipped: no TRL"},
        "benchmarks": [
            head("bare products", 0.4, FORWARD),
            head("ours, native", 0.3, FORWARD, logp_error=2e-6, peak_share=0.01),
            head("bare products", 1.0),
            head("ours, native", 0.4, rho=rho, path="routed", logp_error=3e-6, gradient_error=1e-3, peak_share=0.06),
            head("ours, native, exact", 1.4, logp_error=3e-6),
            head("ours, native, linear_step_kto", 0.4, value_error=1.0),
            head("ours, native, linear_step_kto with its reference", 0.8),
            head("torch linear_cross_entropy", 1.3),
            head("Liger KTO", 2.0),
            head("Liger KTO, compiled", 0.7),
            head("Liger KTO with its reference", 1.6),
            head("bare products", 1.0, inputs="flat"),
            head("ours, native", 1.6, inputs="flat", rho=1.0, path="dense"),
            bench("ours, native", 0.0123, suite="step_kto", shape="(500, 100, 20)", dtype="fp32"),
            bench("ours, native", 0.5, suite="training_step", shape="goal", dtype="fp32", **PLANTED),
            bench("ours, reference", 1.1, suite="training_step", shape="goal", dtype="fp32", **PLANTED),
        ],
    }


def goals(data):
    return native_table.goals(native_table.Rows.of(data))


def test_goals_are_met_missed_or_not_measured():
    found = goals(results())
    assert [(g.status, g.found) for g in found[:9]] == [
        ("met", pytest.approx(0.75)),  # forward
        ("met", pytest.approx(0.4)),  # at rho <= 0.1
        ("met", pytest.approx(1.4)),  # exact
        ("missed", pytest.approx(1.6)),  # flat
        ("met", pytest.approx(3.25)),  # torch
        ("missed", pytest.approx(1.75)),  # Liger, by its compiled form
        ("met", pytest.approx(2.0)),  # Liger with its reference, exactly
        ("not measured", None),  # TRL
        ("met", 3e-6),
    ]
    assert {g.status for g in found[9:-3]} == {"not measured"}
    assert len(found) == 4 * 9 + 3
    assert [(g.status, g.found) for g in found[-3:]] == [
        ("missed", pytest.approx(12.3)),
        ("not measured", None),
        ("met", pytest.approx(2.2)),
    ]


def test_what_leaves_more_to_visit_says_nothing_of_sparse_goals():
    status = [g.status for g in goals(results(rho=0.2))[:9]]
    assert status == ["met", "not measured", "met", "missed", *["not measured"] * 4, "met"]
    unknown = results()
    del next(b for b in unknown["benchmarks"] if "rho" in b["extra_info"])["extra_info"]["rho"]
    assert goals(unknown)[1].status == "not measured"


def test_table_and_figure_are_written_beside_the_first_json(tmp_path):
    whole = results()
    first, second = whole | {"benchmarks": whole["benchmarks"][:6]}, whole | {"benchmarks": whole["benchmarks"][6:]}
    paths = tmp_path / "cpu.json", tmp_path / "more.json"
    for path, data in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(data))
    command = [sys.executable, str(BENCH / "native_table.py")]
    out = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=True).stdout
    assert "MISSED       32k bf16: flat inputs, over the bare products: 1.6" in out
    text = (tmp_path / "cpu.md").read_text()
    for line in (
        "# Test CPU, 2 threads",
        "| 32k bf16: forward and backward, rho <= 0.1, over the bare products (rho 0.050) | at most 0.5 | 0.4 | met |",
        "## 32k (2048, 1024, 32768) bf16, peaked 0.3 (0.30 nats), forward and backward",
        "| ours, native | 400.0 | 3 | 0.40 | 1.00 | 0.050 |  |  | routed | 3.0e-06 | 1.0e-03 |  | 6.0% |",
        "- Skipped: no TRL (2)",
    ):
        assert line in text.splitlines(), line
    assert "trl 1.16.0; Python" in text
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    second["commit_info"] = {"id": "def"}
    paths[1].write_text(json.dumps(second))
    refused = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "different machines or commits" in refused.stderr
