"""bench/gpu_tune.py without a GPU: its candidates are compiled, and its timing runs in Triton's interpreter."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_backends import INTERPRETING

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import gpu_tune  # noqa: E402
import gpu_tune_candidates  # noqa: E402
import gpu_tune_measure  # noqa: E402
import head_inputs  # noqa: E402

compiling = pytest.mark.skipif(INTERPRETING, reason="kernels defined under the interpreter cannot be compiled")
interpreting = pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1, or a GPU and bench/gpu_tune.py")
KERNELS = gpu_tune_candidates.KERNELS


class FakeClock:
    """Every mark is a millisecond after the last."""

    cuda = False

    def __init__(self):
        self.now = self.begun = 0

    def begin(self):
        self.begun += 1

    def mark(self):
        self.now += 1
        return self.now

    def wait(self):
        pass

    def between(self, start, stop):
        return float(stop - start)


@compiling
def test_candidates_are_compiled_without_a_gpu(tmp_path):
    path = tmp_path / "found.json"
    other = {"chip": 80, "kernel": "weight", "values": [1], "wrong": "kept from an earlier run"}
    path.write_text(json.dumps({"candidates": [other]}))
    options = ["--kernels", "weight", "--most", "2", "--chip", "90", "--candidates", str(path)]
    command = [sys.executable, str(BENCH / "gpu_tune.py"), "--compile-only", *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    before, shipped, second = json.loads(path.read_text())["candidates"]
    assert before == other
    assert tuple(shipped["values"]) == gpu_tune_candidates.candidates("weight", 90)[0]
    others = [each for each in KERNELS["weight"].candidates if each != tuple(shipped["values"])]
    assert tuple(second["values"]) == others[0]
    assert shipped["wrong"] == "" and 100 < shipped["regs"] < 256 and shipped["spills"] == 0 and shipped["kib"] > 50  # noqa: PT018
    assert run.stdout.count(" KiB") == 2


@compiling
def test_a_candidate_that_cannot_be_compiled_is_left_out():
    found = gpu_tune_candidates.inspected("weight", (64, 48, 8, 3), 90)
    assert "power of 2" in found["wrong"] or "Error" in found["wrong"]


@compiling
def test_a_candidate_is_compiled_ahead_and_nothing_is_launched(monkeypatch):
    """With a driver that only names a chip: a launch would need more."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    compiled = []
    warmup = triton.JITFunction.warmup

    def recorded(kernel, *arguments, **options):
        compiled.append((kernel.__name__, options["BLOCK_R"], options["BLOCK_D"], options["num_stages"]))
        return warmup(kernel, *arguments, **options)

    monkeypatch.setattr(triton.JITFunction, "warmup", recorded)
    monkeypatch.setattr(gpu_tune_measure.triton_backward, "WORKSPACE_BYTES", 2**16)
    shape = head_inputs.Shape("mini", 256, 64, 1024)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    gpu_tune_measure.compile_ahead("weight", (32, 64, 4, 2), shape, "cpu")
    assert len(compiled) > 2  # every chunk: its number is an argument, of which Triton specialises 0 and 1
    assert set(compiled) == {("weight_gradients", 32, 64, 2)}
    assert isinstance(gpu_tune_measure.triton_backward.list_rows, triton.JITFunction)


def test_what_the_committed_candidates_say():
    """Every shipped configuration for the H200 passes, and so does something to compare it with."""
    wrong = gpu_tune.known(gpu_tune_candidates.FILE, 90)
    for name in KERNELS:
        listed = gpu_tune_candidates.candidates(name, 90)
        assert wrong[name, listed[0]] == "", name
        assert sum(wrong.get((name, values)) == "" for values in listed) >= 4, name
        assert set(listed) == {values for kernel, values in wrong if kernel == name}, f"{name}: run --compile-only"


def test_events_of_a_gpu(monkeypatch):
    """With torch.cuda's clock played by numbers."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("mark")
            self.at = len(order)

        def elapsed_time(self, other):
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    clock = gpu_tune_measure.Clock(torch.device("cpu"))
    clock.cuda = True
    clock.begin()
    marks = clock.mark(), clock.mark()
    clock.wait()
    assert clock.between(*marks) == 1.0
    assert order == ["sleep", "mark", "mark", "wait"]


def test_a_difference_that_is_not_a_number_is_seen():
    a, b = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    for gradients in (False, True):
        assert not gpu_tune_measure.difference((a, b), (a, a), gradients) <= 1
        assert gpu_tune_measure.difference((a, a), (a, a), gradients) == 0
    assert gpu_tune_measure.difference((a, 1.5 * a), (a, a), True) == pytest.approx(0.5)


def test_the_table_marks_the_best():
    item = {"inputs": "flat", "kernel": "pair", "status": "ok", "n_regs": 9, "n_spills": 0, "tflops": 5.0}
    items = [
        item | {"values": [64, 8, 4], "shipped": True, "ms": 3.0},
        item | {"values": [64, 8, 5], "shipped": False, "ms": 2.0},
        item | {"values": [64, 8, 6], "shipped": False, "status": "failed", "reason": "because"},
    ]
    text = gpu_tune.table({"items": items, "backward": {}})
    best = next(line for line in text.splitlines() if "<- best" in line)
    assert "64x8x5" in best
    assert best.endswith("1.500 times the shipped speed")
    assert "failed: because" in text


@interpreting
def test_the_timing_runs_in_tritons_interpreter(tmp_path, monkeypatch):
    """The spy, the checks, candidates that fail or are wrong, what the compiler left out, and the JSON."""
    monkeypatch.setitem(head_inputs.SHAPES, "mini", head_inputs.Shape("mini", 20, 32, 200))
    good = {
        "forward": (32, 128, 32, 8, 1, 8, 2),
        "pair": (32, 8, 2),
        "weight": (32, 32, 8, 2),
        "hidden": (64, 32, 8, 2),
    }
    good["kl"] = good["kl one head"] = (32, 128, 32, 4, 2, 8, 2)
    bad = {"weight": (32, 48, 8, 2), "kl": (32, 256, 32, 4, 1, 8, 2), "pair": (16, 8, 2)}
    for name, kernel in KERNELS.items():
        tried = (good[name], bad[name]) if name in bad else (good[name],)
        monkeypatch.setitem(KERNELS, name, kernel._replace(candidates=tried))
    known = tmp_path / "known.json"
    spilling = {"chip": 90, "kernel": "pair", "values": bad["pair"], "wrong": "7 bytes of registers spill"}
    known.write_text(json.dumps({"candidates": [spilling]}))
    monkeypatch.setattr(gpu_tune_measure, "SECONDS", 0.0)
    monkeypatch.setattr(gpu_tune_measure, "ROUNDS", 1)
    monkeypatch.setattr(gpu_tune_measure, "WORKSPACES", (15, 25))
    monkeypatch.setattr(gpu_tune_measure.gpu_measure.Clock, "time", lambda *_: {"median_ms": 4.0})
    words = ["--device", "cpu", "--shape", "mini", "--inputs", "peaked 1.0", "flat", "--out", str(tmp_path)]
    clock = FakeClock()
    assert gpu_tune.main([*words, "--candidates", str(known), "--commit", "abc"], clock) == 0
    assert clock.begun > 0
    data = json.loads((tmp_path / "tune-cpu.json").read_text())
    assert data["machine"]["commit"] == "abc"
    assert data["running"] is None
    found = {(i["inputs"], i["kernel"], tuple(i["values"])): i for i in data["items"]}
    for name in KERNELS:
        item = found["peaked 1.0", name, good[name]]
        assert item["status"] == "ok", item
        assert item["ms"] == 1.0  # one launch a call, a mark before and after it
        assert item["tflops"] > 0
        shipped = [i for i in data["items"] if i["kernel"] == name and i["shipped"]]
        assert [i["status"] for i in shipped] == ["ok"] * (2 if name in gpu_tune.BACKWARD else 1)
        assert shipped[0]["difference"] == 0
    assert found["peaked 1.0", "weight", bad["weight"]]["status"] == "failed"
    assert found["peaked 1.0", "kl", bad["kl"]]["status"] == "wrong"
    assert found["peaked 1.0", "pair", bad["pair"]]["reason"] == "7 bytes of registers spill"
    parts = {row["part"]: row for row in data["backward"]["flat"]["parts"]}
    assert parts["0 empty of 1 chunks"]["ms"] == 0
    assert parts["weight_gradients"]["ms"] == parts["list_rows"]["ms"] == 1.0
    assert parts["hidden_gradients"]["tflops"] > 0
    assert [row["bytes"] for row in data["backward"]["flat"]["workspaces"]] == ["2^15", "2^25"]
    assert "<- best" in (tmp_path / "tune-cpu.txt").read_text()

    # what was at work when a process died is recorded, and with --resume nothing is measured twice
    last = data["items"].pop()
    data["running"] = {name: last[name] for name in ("inputs", "kernel", "values", "shipped")}
    (tmp_path / "tune-cpu.json").write_text(json.dumps(data))
    begun = clock.begun
    gpu_tune.main([*words, "--candidates", str(known), "--resume"], clock)
    again = json.loads((tmp_path / "tune-cpu.json").read_text())
    assert again["items"][-1] | {"reason": ""} == data["running"] | {"status": "failed", "reason": ""}
    assert again["items"][:-1] == data["items"]
    assert clock.begun == begun
