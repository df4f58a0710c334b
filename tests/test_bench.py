"""The bench's own machinery: who takes turns, what is checked before it is timed, formulas, inputs, and a run of it."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import bench_entropy
import bench_linear_logp
import bench_linear_logp_kl
import bench_linear_step_kto
import bench_reference_points
import bench_scaling
import bench_step_kto
import head_inputs
import language_model
import measure
import providers
import registry
import tables
from measure import Case
from replay import Replay
from stopwatch import CLEAR, Stopwatch

BENCH = Path(bench_entropy.__file__).parent
CPU = torch.device("cpu")
TINY = head_inputs.SHAPES["tiny"]
SUITES = (
    bench_entropy,
    bench_linear_logp,
    bench_linear_logp_kl,
    bench_linear_step_kto,
    bench_reference_points,
    bench_scaling,
    bench_step_kto,
)


def test_a_replay_reads_as_the_durations_that_were_loaded():
    replay = Replay()
    for seconds in ([0.5, 0.25], [2.0]):
        replay.load(seconds)
        found = []
        for _ in seconds:
            start = replay()
            found.append(replay() - start)
        assert found == pytest.approx(seconds)
    replay()
    with pytest.raises(IndexError):
        replay()


def test_rounds_take_turns_and_every_turn_begins_with_another(monkeypatch):
    order = []
    watch = Stopwatch(CPU)
    calls = [lambda name=name: order.append(name) for name in "abc"]
    found = watch.interleaved(calls, [3, 1, 2])
    assert "".join(order) == "abc" + "ca" + "a"  # b has had its one round, c its two
    assert [len(seconds) for seconds in found] == [3, 1, 2]
    assert watch.interleaved([], []) == []


@pytest.mark.skipif(not CLEAR.exists(), reason="only Linux tells the peak memory of a call")
def test_the_peak_of_a_call_is_what_it_held_at_once():
    watch = Stopwatch(CPU)

    def call(size: int) -> torch.Tensor:
        first = torch.ones(size, dtype=torch.uint8)
        second = first + 1
        del first
        return second

    call(48 << 20)  # its memory may stay with the allocator, and must count again
    for size in (48 << 20, 4 << 20):
        peak, _, found = watch.peak(lambda size=size: call(size))
        assert found.nbytes == size
        assert abs(peak - 2 * size) < 1 << 20  # the kernel counts pages in batches


def logp_case(provider: str, gradients: bool = True) -> Case:
    return Case("head", "linear_logp", TINY, "peaked 1.0", gradients, provider)


def test_what_is_wrong_is_not_timed_and_what_is_missing_says_why(monkeypatch):
    op = registry.OPS["linear_logp"]
    good = op.providers["full logits"]

    def off(x, gradients):
        call = good.start(x, gradients)
        return lambda: call()._replace(value=call().value + 1)

    def broken(x, gradients):
        call = good.start(x, gradients)
        return lambda: call()._replace(dweight=call().dweight * float("nan"))

    def raises(x, gradients):
        raise KeyError("no such thing")

    changed = {"TRL": off, "QuACK": broken, "verl": raises, "ours, reference, exact": off}
    for name, start in changed.items():
        monkeypatch.setitem(op.providers, name, good._replace(name=name, start=start))
    names = ("full logits", "ours, reference", "ours, triton", *changed)
    said = []
    found = measure.measure([logp_case(name) for name in names], CPU, said.append)
    wrong = "not timed, as it is wrong here: "
    assert found["TRL"].skipped.startswith(f"{wrong}value error 1")
    assert found["QuACK"].skipped == f"{wrong}gradient error nan beyond 0.12"
    assert found["ours, reference, exact"].failed.startswith(f"{wrong}value error 1")
    assert found["verl"].failed == "KeyError: 'no such thing'"
    assert "CUDA" in found["ours, triton"].skipped or "GPU" in found["ours, triton"].skipped
    assert not any(found[name].seconds for name in (*changed, "ours, triton"))
    assert "7 providers" in said[0]
    ours, peer = found["ours, reference"], found["full logits"]
    assert ours.facts["of_best_peer"] == statistics.median(peer.seconds) / statistics.median(ours.seconds)
    assert "of_best_peer" not in peer.facts
    assert ours.facts["value_error"] < 1e-5 < peer.facts["value_error"]  # bf16 logits against fp32 ones
    lines = tables.text([found[name].facts | {"ms": 1.0, "spread": 0.1} for name in ("full logits", "ours, reference")])
    assert len(lines) == 3
    assert "x peer" in lines[0]


@pytest.mark.parametrize("name", ["linear_logp", "linear_logp_entropy", "linear_logp_stats", "linear_logp_kl"])
@pytest.mark.parametrize("gradients", [False, True])
def test_operations_are_those_of_plain_torch(name, gradients):
    op = registry.OPS[name]
    x = head_inputs.Maker(CPU)(TINY, "peaked 1.0")
    call = op.providers["full logits"].start(x, gradients)
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == op.operations(TINY, gradients)
    leaves = sum(x.nbytes for x in (x.hidden, x.weight)) * (2 if name == "linear_logp_kl" else 1)
    assert op.bytes(TINY, False) == leaves + (
        len(x.target) * {"linear_logp": 4, "linear_logp_entropy": 8, "linear_logp_stats": 17}.get(name, 12)
    )
    assert op.bytes(TINY, True) > op.bytes(TINY, False)


@pytest.mark.parametrize("name", [name for name, op in registry.OPS.items() if op.products[1]])
def test_every_backend_of_every_head_op_is_right_or_says_why(name):
    cases = [
        Case("head", name, TINY, "peaked 1.0", True, provider) for provider in registry.OPS[name].providers
        if provider.startswith("ours")
    ]  # fmt: skip
    found = measure.measure(cases, CPU, lambda line: None)
    assert {n for n, each in found.items() if each.failed} == set()
    assert found[next(n for n in found if n.startswith("ours, reference"))].seconds


@pytest.mark.parametrize("name", ["step_kto", "reference_points"])
def test_ops_bound_by_bytes_are_checked_too(name):
    shape = head_inputs.Shape("few", 4000, 0, 0, completion=400, dtype="float32")
    cases = [Case(name, name, shape, "tokens", True, provider) for provider in registry.OPS[name].providers]
    eager = [case for case in cases if "torch.compile" not in case.provider]
    found = measure.measure(eager, CPU, lambda line: None)
    assert {n for n, each in found.items() if each.failed} == set()
    assert found["ours, reference"].facts["gb_per_s"] > 0
    assert found["plain torch"].facts["value_error"] < 1e-5
    wrong = providers.Found([torch.tensor(0.0), torch.tensor(1.0)], None, None)
    x = registry.inputs_of(registry.OPS[name], shape, "tokens", CPU)
    if name == "reference_points":
        assert registry.points_errors(x, None, wrong)[0] > 0.01


def test_cases_have_names_of_their_own_and_providers_that_exist():
    cases = [case for suite in SUITES for case in (*suite.CASES, *getattr(suite, "FOR_GOALS", ()))]
    for suite in SUITES:
        ids = [case.id for case in (*suite.CASES, *getattr(suite, "FOR_GOALS", ()))]
        assert len(ids) == len(set(ids))
    assert {case.provider for case in cases} <= {name for op in registry.OPS.values() for name in op.providers}
    quick = [case for case in cases if "quick" in case.id]
    assert {case.op for case in quick} >= {"linear_logp", "linear_step_kto", "linear_logp_kl", "step_kto"}
    assert {registry.role(case.provider) for case in cases} == {"ours", "bare", "torch", "peer"}


def test_the_language_model_is_trained_once_and_sharpened_to_a_level(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make = head_inputs.Maker(CPU, "tiny")
    plain = make(TINY, "real")
    monkeypatch.setattr(language_model, "train", None)  # from the cache from now on
    fp32 = make(TINY._replace(dtype="float32"), "real 1.0")
    assert plain.shape.v == fp32.shape.v == 512
    assert fp32.hidden.dtype == torch.float32
    assert fp32.truth.entropy.mean().item() == pytest.approx(1.0, rel=0.1)
    assert plain.truth.entropy.mean().item() > 2
    assert [path.suffix for path in (tmp_path / "stepkto-fast").iterdir()] == [".safetensors"]


def test_a_run_writes_what_was_timed_and_what_was_not(tmp_path):
    """The suite itself, in a process of its own: durations, facts and reasons arrive in pytest-benchmark's JSON."""
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "pytest", str(BENCH / "bench_reference_points.py"), "--benchmark-only", "-q",
               "-k", "quick and not compile", f"--benchmark-json={path}", "-p", "no:cacheprovider"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(path.read_text())
    rows = {bench["extra_info"]["provider"]: bench for bench in found["benchmarks"]}
    assert {"plain torch", "ours, reference", "copy of its bytes"} <= set(rows)
    for row in rows.values():
        assert len(row["stats"]["data"]) == row["stats"]["rounds"] >= 1
        assert row["extra_info"]["gb_per_s"] == pytest.approx(
            row["extra_info"]["bytes"] / row["stats"]["median"] / 1e9, rel=1e-3
        )
    assert any("triton" in why for why in found["not_timed"].values())
    assert found["machine_info"]["torch"] == torch.__version__
    assert "reference_points - quick 16000 tokens fp32 - tokens - forward: 5 providers" in done.stdout
