"""Choosing a backend: by context manager, by environment variable, automatically; and what each choice may
refuse."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import stepkto_kernels
import torch
from stepkto_kernels import backend, backends, linear_logp, native, step_kto, triton_backend
from test_step_kto import needs_native, random_batch

HEAD = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64)


@pytest.fixture
def calls(monkeypatch):
    """The backends that step_kto and linear_logp really run on, in order."""
    seen = []

    def spy(name, function):
        def wrapped(*arguments):
            seen.append(name)
            return function(*arguments)

        return function and wrapped

    for op in ("step_kto", "linear_logp"):
        for name, kernel in backends._KERNELS[op].items():
            monkeypatch.setitem(
                backends._KERNELS[op],
                name,
                backends.Kernel(spy(name, kernel.forward), spy(f"{name} backward", kernel.backward)),
            )
    return seen


def test_every_public_op_is_registered():
    functions = {name for name in stepkto_kernels.__all__ if name.startswith(("linear", "step", "reference"))}
    assert functions == set(backends.ops())
    assert all(backends.why_not(op, "reference") is None for op in backends.ops())


@needs_native
def test_auto_takes_the_fastest_that_is_there(calls, monkeypatch):
    step_kto(**random_batch())
    assert calls == ["native"]
    monkeypatch.setattr(native, "missing", lambda: "not built")
    step_kto(**random_batch())
    assert calls == ["native", "reference"]


def test_environment_variable(calls, monkeypatch):
    monkeypatch.setenv("STEPKTO_BACKEND", "reference")
    step_kto(**random_batch())
    assert calls == ["reference"]
    monkeypatch.setenv("STEPKTO_BACKEND", "")
    assert backends.requested() == "auto"
    monkeypatch.setenv("STEPKTO_BACKEND", "fastest")
    with pytest.raises(
        ValueError, match="STEPKTO_BACKEND is 'fastest'; expected one of auto, reference, native, triton"
    ):
        step_kto(**random_batch())


def test_context_manager_takes_precedence_nests_and_is_undone_by_errors(calls, monkeypatch):
    monkeypatch.setenv("STEPKTO_BACKEND", "triton")
    with backend("reference"):
        with pytest.raises(ZeroDivisionError), backend("native"):
            raise ZeroDivisionError
        step_kto(**random_batch())
    assert calls == ["reference"]
    with pytest.raises(RuntimeError, match="backend 'triton' lacks step_kto"):
        step_kto(**random_batch())
    with backend("auto"):
        assert backends.requested() == "auto"


def test_unknown_name():
    with (
        pytest.raises(ValueError, match="backend name is 'cuda'; expected one of auto, reference, native, triton"),
        backend("cuda"),
    ):
        pass


def test_a_backend_chosen_by_name_refuses_an_op_it_lacks(monkeypatch):
    monkeypatch.delitem(backends._KERNELS["linear_logp"], "triton")
    with backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' lacks linear_logp: no triton kernel"):
        linear_logp(*HEAD)


def test_triton_refuses_with_the_remedy_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_backend, "_lowest_capability_here", lambda: None)
    with backend("triton"):
        with pytest.raises(
            RuntimeError, match=r"'triton' lacks linear_logp: torch sees no CUDA GPU.*TRITON_INTERPRET=1"
        ):
            linear_logp(*HEAD)
        monkeypatch.setattr(triton_backend, "_lowest_capability_here", lambda: (7, 5))
        with pytest.raises(RuntimeError, match=r"compute capability 7\.5; 8\.0 \(A100\) or later"):
            linear_logp(*HEAD)
        monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match="triton is not installed; pip install triton"):
            linear_logp(*HEAD)


def test_triton_refuses_tensors_it_cannot_take(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_backend, "_lowest_capability_here", lambda: (9, 0))
    with backend("triton"):
        with pytest.raises(RuntimeError, match="it runs on CUDA tensors and this call's are on cpu"):
            linear_logp(*HEAD)
        with pytest.raises(RuntimeError, match="it computes in float32 and this call's tensors are float64"):
            linear_logp(HEAD[0].double(), HEAD[1].double(), HEAD[2])
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(
            RuntimeError, match="under TRITON_INTERPRET=1 it runs on CPU tensors and this call's are on meta"
        ):
            backends.choose("linear_logp", torch.zeros(1, device="meta"))


def test_auto_never_takes_the_interpreter_and_falls_back_for_fp64(calls, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(native, "missing", lambda: "not built")
    linear_logp(*HEAD)
    assert calls == ["reference"]
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(triton_backend, "_lowest_capability_here", lambda: (9, 0))
    reference = backends._KERNELS["linear_logp"]["reference"]
    cuda = [SimpleNamespace(dtype=dtype, device=torch.device("cuda")) for dtype in (torch.float64, torch.float32)]
    assert backends.choose("linear_logp", cuda[0]) is reference
    assert backends.choose("linear_logp", cuda[1]) is backends._KERNELS["linear_logp"]["triton"]


def test_native_refuses_with_the_remedy_when_it_is_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libstepkto_native.so")
    monkeypatch.setattr(native, "missing", native.missing.__wrapped__)
    with (
        backend("native"),
        pytest.raises(RuntimeError, match=r"libstepkto_native\.so was not built.*pip install"),
    ):
        step_kto(**random_batch())
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert "install a C++ compiler (g++ or clang++), cmake" in native.missing()


def test_native_says_so_when_the_library_does_not_load(monkeypatch, tmp_path):
    library = tmp_path / "libstepkto_native.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", library)
    reason = native.missing.__wrapped__()
    assert "does not load under torch" in reason
    assert "rebuild" in reason


def test_native_refuses_other_devices():
    if native.missing() is not None:
        pytest.skip(native.missing())
    with (
        backend("native"),
        pytest.raises(RuntimeError, match="it runs on CPU tensors and this call's are on meta"),
    ):
        backends.choose("step_kto", torch.zeros(1, device="meta"))


def test_the_backward_follows_its_forward(calls):
    hidden = HEAD[0].clone().requires_grad_()
    with backend("reference"):
        logp = linear_logp(hidden, *HEAD[1:])
    with backend("triton"):  # a GPU is needed, so this would raise if the choice were made now
        logp.sum().backward()
    assert calls == ["reference", "reference backward"]


def test_compiled_code_reads_the_choice_when_it_runs(calls):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(hidden):
        return linear_logp(hidden, *HEAD[1:]).sum()

    hidden = HEAD[0].clone().requires_grad_()
    with backend("reference"):
        function(hidden).backward()
    assert calls == ["reference", "reference backward"]
    with backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' lacks linear_logp"):
        function(hidden)
    loss = function(hidden)
    with backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' lacks linear_logp"):
        loss.backward()


def test_the_choice_is_per_thread():
    seen = []
    with backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_command_prints_the_table(name, monkeypatch):
    monkeypatch.setenv("STEPKTO_BACKEND", name)
    done = subprocess.run([sys.executable, "-m", "stepkto_kernels"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert f"STEPKTO_BACKEND={name}" in lines[0]
    assert lines[2].split() == ["op", "reference", "native", "triton"]
    table = {line.split()[0]: line.split()[1:] for line in lines[3 : 3 + len(backends.ops())]}
    assert set(table) == set(backends.ops())
    assert all(cells[0] == "yes" for cells in table.values())
    built, here = ("-" if backends.why_not("linear_logp", each) else "yes" for each in ("native", "triton"))
    assert table["linear_logp"] == ["yes", built, here]
    assert (built == "yes") != ("native: libstepkto_native.so" in done.stdout)
    assert (here == "yes") != ("triton: torch sees no CUDA GPU" in done.stdout)
