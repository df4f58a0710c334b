"""bench/gpu.py on the CPU at tiny shapes: its truths, its inputs, what it does with providers that fail, its files."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import stepkto_kernels as sk
import torch
from stepkto_kernels.linear_logp import reference as linear_logp_truth

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import gpu  # noqa: E402
import gpu_figures  # noqa: E402
import gpu_measure  # noqa: E402
import head_inputs  # noqa: E402
import providers  # noqa: E402
import step_kto_inputs  # noqa: E402
from stopwatch import CLEAR  # noqa: E402

CPU = torch.device("cpu")
TINY = head_inputs.SHAPES["tiny"]


@pytest.fixture(scope="module")
def make():
    return head_inputs.Maker(CPU)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_truths_agree_with_autograd(make, softcap):
    plain = make(TINY, "peaked 1.0")
    x = head_inputs.Inputs(TINY._replace(softcap=softcap), "x", plain.hidden, plain.weight)
    leaves = [x.hidden.double().requires_grad_(), x.weight.double().requires_grad_()]
    logp, entropy = linear_logp_truth.linear_logp_entropy(*leaves, x.target, softcap=softcap)
    torch.testing.assert_close(x.truth.logp, logp.detach())
    torch.testing.assert_close(x.truth.entropy, entropy.detach())
    gradients = torch.autograd.grad((logp * x.slope.double()).sum(), leaves)
    assert x.gradient_error(x.slope, *gradients) < 1e-12
    assert x.gradient_error(x.slope, gradients[0], 1.1 * gradients[1]) == pytest.approx(0.1)


def test_kl_and_objective_agree_with_our_ops_in_fp64(make):
    x = make(TINY, "peaked 1.0")
    doubled = [t.double() for t in (x.hidden, x.weight, x.ref_hidden, x.weight)]
    out = sk.linear_logp_kl(*doubled, x.target)
    torch.testing.assert_close(x.kl, out.kl)
    ref = x.ref_truth.logp
    loss, slope = x.objective(ref, beta=0.3)
    logp = out.logp.detach().requires_grad_()
    mine = sk.step_kto(logp, ref, **x.batch, beta=0.3).loss
    assert mine.item() == pytest.approx(loss)
    torch.testing.assert_close(torch.autograd.grad(mine, logp)[0], slope)


@pytest.mark.parametrize("name", ["peaked 0.3", "peaked 1.0", "peaked 2.0", "scattered 1.0"])
def test_peaked_inputs_have_the_entropy_in_their_name(make, name):
    x = make(TINY, name)
    assert x.truth.entropy.mean().item() == pytest.approx(float(name.split()[1]), rel=0.05)
    assert make(TINY, name) is x
    # targets are drawn from the model: their mean surprise is about its entropy
    assert -x.truth.logp.mean().item() == pytest.approx(x.truth.entropy.mean().item(), rel=0.5, abs=0.2)


def test_flat_inputs_are_flat(make):
    assert make(TINY, "flat").truth.entropy.mean() > 0.97 * torch.tensor(float(TINY.v)).log()


def attempt(make, name, shape="tiny", **patches):
    tokens = step_kto_inputs.Tokens(CPU, n=400, completion=40, step=10)
    entry = gpu.Entry(shape, "flat", name, gradients=True)
    return gpu_measure.attempt(entry, make, lambda: tokens, gpu_measure.Clock(CPU))


def test_failures_are_recorded_with_their_reason(make, monkeypatch):
    def absent(x, gradients):
        import a_package_that_nobody_has  # noqa: F401

    def out_of_memory(x, gradients):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")

    def off_by_a_half(x, gradients):
        call = providers.PROVIDERS["ours"].start(x, gradients)
        return lambda: call()._replace(value=call().value - 0.7)

    def wrong_gradients(x, gradients):
        call = providers.PROVIDERS["ours"].start(x, gradients)
        return lambda: call()._replace(dweight=torch.full_like(x.weight, torch.nan))

    for function in (absent, out_of_memory, off_by_a_half, wrong_gradients):
        provider = providers.Provider(function.__name__, function)
        monkeypatch.setitem(providers.PROVIDERS, function.__name__, provider)
    found = {name: attempt(make, name) for name in ("absent", "out_of_memory", "off_by_a_half", "wrong_gradients")}
    assert found["absent"]["status"] == "not available"
    assert "a_package_that_nobody_has" in found["absent"]["reason"]
    assert found["out_of_memory"]["status"] == "failed"
    assert found["out_of_memory"]["reason"].startswith("OutOfMemoryError: CUDA out of memory. Tried")
    assert found["off_by_a_half"]["status"] == found["wrong_gradients"]["status"] == "wrong"
    assert "value error" in found["off_by_a_half"]["reason"]
    assert "gradient error" in found["wrong_gradients"]["reason"]
    assert not any("median_ms" in facts for facts in found.values())
    assert attempt(make, "ours")["status"] == "ok"


def test_step_kto_alone_is_checked_and_timed(make):
    for name in ("ours", "plain torch", "large copy", "copy of its bytes"):
        facts = attempt(make, name, shape="step_kto")
        assert facts["status"] == "ok", facts
        assert facts["gb_per_s"] > 0
    assert attempt(make, "ours, as a CUDA graph", shape="step_kto")["status"] == "not available"


def test_what_a_backward_dropped_is_recorded(make, monkeypatch):
    record = SimpleNamespace(rho=torch.tensor(0.25), dropped_max=0.5, dropped_mean=0.125, path="routed")
    monkeypatch.setattr(sk, "watch", lambda: contextlib.nullcontext([record]), raising=False)
    facts = attempt(make, "ours")
    assert {name: facts[name] for name in ("rho", "dropped_max", "dropped_mean", "path")} == {
        "rho": 0.25,
        "dropped_max": 0.5,
        "dropped_mean": 0.125,
        "path": "routed",
    }
    assert "rho" not in attempt(make, "full logits")


def test_events_and_memory_of_a_gpu(make, monkeypatch):
    """With torch.cuda's clock and allocator played by numbers: rounds between events, gradients not counted."""
    now, order = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            now[0] += 2.0
            self.at = now[0]

        def elapsed_time(self, other):
            return other.at - self.at

    found = providers.Found(None, torch.zeros(2**18), torch.zeros(2**19))
    for name, value in (
        ("Event", Event),
        ("synchronize", lambda: order.append("wait")),
        ("reset_peak_memory_stats", lambda: order.append("reset")),
        ("memory_allocated", lambda: 5 * 2**20),
        ("max_memory_allocated", lambda: 15 * 2**20),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    clock = gpu_measure.Clock(CPU)
    clock.cuda = True
    timed = clock.time(lambda: order.append("call"), seconds=0.02)
    assert timed == {"median_ms": 2.0, "q1_ms": 2.0, "q3_ms": 2.0, "iqr_ms": 0.0, "rounds": 10}
    assert order == ["call"] * 2 + ["wait"] + ["call"] * 10 + ["wait"]
    assert gpu_measure.peak(lambda: found, clock) == 10 - 3


def test_a_run_goes_on_after_processes_that_die_or_hang(tmp_path, monkeypatch):
    """A measuring process of plain Python stands in: it dies at its first item, hangs at its second."""
    script = tmp_path / "measure.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(BENCH)!r})\n"
        "import gpu, os, pathlib\n"
        "path, device, deadline, *shapes = sys.argv[1:]\n"
        "results = gpu.Results(pathlib.Path(path))\n"
        "for entry in gpu.plan(shapes):\n"
        "    count = len(results.data['items'])\n"
        "    if entry.key in {gpu.key_of(item) for item in results.data['items']}: continue\n"
        "    if gpu.gave_up(results.data, entry): results.finish(entry, status='failed', reason='again'); continue\n"
        "    results.begin(entry, 0.3)\n"
        "    if count == 0: os._exit(3)\n"
        "    if count == 1: time.sleep(60)\n"
        "    results.finish(entry, status='ok', median_ms=1.0)\n"
    )
    monkeypatch.setattr(gpu, "MEASURE", script)
    path = tmp_path / "cpu.json"
    gpu.watch(SimpleNamespace(shapes=["tiny"], device="cpu", budget_seconds=30), path)
    items = gpu.Results(path).data["items"]
    assert [i["status"] for i in items[:3]] == ["failed", "failed", "ok"]
    assert "died with status 3" in items[0]["reason"]
    assert "longer than 0 s" in items[1]["reason"]
    assert [gpu.key_of(i) for i in items] == [e.key for e in gpu.plan(["tiny"])]


def test_what_no_time_was_left_for_is_recorded(tmp_path):
    path = tmp_path / "cpu.json"
    gpu.watch(SimpleNamespace(shapes=["trl"], device="cpu", budget_seconds=-1), path)
    items = gpu.Results(path).data["items"]
    assert len(items) == len(gpu.plan(["trl"]))
    assert {i["status"] for i in items} == {"not reached"}
    assert "not reached" in gpu_figures.table({"machine": {}, "items": items})


def test_the_plan_starts_with_what_is_worth_most():
    first = gpu.plan(["all"])
    assert [e.provider for e in first[:4]] == ["bare 2NDV", "bare 6NDV", "bare 8NDV", "ours"]
    assert {e.shape for e in first} == set(head_inputs.SHAPES) - {"tiny"} | {"step_kto"}
    known = providers.PROVIDERS | step_kto_inputs.PROVIDERS
    assert {e.provider for e in gpu.plan(["all", "lm", "tiny"])} <= set(known)
    with pytest.raises(SystemExit, match="unknown shapes nonsense"):
        gpu.plan(["nonsense"])


def item(shape, inputs, provider, which, ms, **facts):
    sizes = {"n": 8192, "d": 4096, "v": 151936, "entropy": 0.3, "peak_mib": 20.0, "peak_share_bf16": 0.01}
    return {"shape": shape, "inputs": inputs, "provider": provider, "pass": which, "status": "ok"} | sizes | {
        "median_ms": ms, "gradient_error": 1e-3, **facts
    }  # fmt: skip


def test_goals_table_and_figures_of_a_json(tmp_path):
    both, forward = "forward+backward", "forward"
    items = [
        item("trl", "flat", "bare 2NDV", forward, 14.0),
        item("trl", "flat", "bare 6NDV", both, 42.0),
        item("trl", "flat", "bare 8NDV", both, 56.0),
        item("trl", "flat", "ours", forward, 16.0),
        item("trl", "flat", "ours", both, 60.0, rho=1.0, entropy=11.8),
        item("trl", "flat", "ours, exact", both, 80.0),
        item("trl", "flat", "TRL", both, 200.0),
        item("trl", "peaked 0.3", "ours", both, 20.0, rho=0.08),
        item("liger", "flat", "ours, linear_step_kto", both, 10.0),
        item("liger", "flat", "Liger KTO", both, 50.0),
        {"shape": "trl", "inputs": "flat", "provider": "x", "pass": both, "status": "failed", "reason": "because"},
    ]
    data = {"machine": {"gpu": "Test GPU", "torch": "2", "date": "today"}, "items": items}
    status = [goal["status"] for goal in gpu_figures.goals(data)]
    assert status == ["met", "met", "met", "met", "missed", "not measured", "met"]
    path = tmp_path / "test-gpu.json"
    path.write_text(json.dumps(data))
    command = [sys.executable, str(BENCH / "gpu.py"), "--figures", str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "strongest peer, TRL" in out
    assert "strongest peer, Liger KTO" in out
    assert "x: failed: because" in out
    drawn = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in drawn] == [f"test-gpu-{n}.png" for n in ("memory", "rho", "times-flat", "times-peaked")]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 5000 for p in drawn)


def test_a_whole_run_on_the_cpu(tmp_path):
    command = [sys.executable, str(BENCH / "gpu.py"), "--device", "cpu", "--shapes", "tiny", "--out", str(tmp_path)]
    run = subprocess.run([*command, "--commit", "abc"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    data = json.loads((tmp_path / "cpu.json").read_text())
    assert data["running"] is None
    assert data["machine"]["commit"] == "abc"
    assert data["machine"]["torch"] == torch.__version__
    assert "triton" in data["machine"]
    assert [gpu.key_of(i) for i in data["items"]] == [e.key for e in gpu.plan(["tiny"])]
    for one in data["items"]:
        if one["provider"].startswith(("ours", "bare", "full logits")):
            assert one["status"] == "ok", one
            assert one["median_ms"] > 0
            assert one["iqr_ms"] >= 0
            assert one["rounds"] >= 3
            assert one["tflops"] > 0
            assert one["entropy"] > 0
            assert len(one["entropy_quantiles"]) == 3
        else:
            assert one["status"] in ("ok", "not available"), one
            assert one["status"] == "ok" or one["reason"]
        if one["provider"].startswith("ours"):
            assert one["backend"] in ("reference", "native")
            assert one["value_error"] < 1e-3
    assert "NOT MEASURED" in run.stdout
    assert "cpu-times-flat.png" in run.stdout
    assert len(list(tmp_path.glob("*.png"))) == 3 + CLEAR.exists()  # the peak memory of a call is known on Linux
