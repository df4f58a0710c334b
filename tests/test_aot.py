"""The ahead-of-time gate: it covers every kernel that is launched, and each of its three checks can fail."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
from on_backends import INTERPRETING

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "torch-ext" / "stepkto_kernels"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETING, reason="kernels defined under the interpreter cannot be compiled"),
]


@pytest.fixture(scope="module")
def aot():
    spec = importlib.util.spec_from_file_location("aot", ROOT / "kernels" / "aot.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["aot"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["aot"]


def launched():
    """Names that the package launches, as in `kernel[grid](...)`."""
    for path in KERNELS.rglob("triton_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                yield node.func.value.id


@pytest.mark.parametrize("chip", [80, 89, 90, 100, 120])
def test_every_launched_kernel_is_compiled_for_every_chip(aot, chip):
    assert chip in aot.CHIPS
    shipped = {
        each.kernel.__name__
        for module in aot.MODULES
        for each in importlib.import_module(f"stepkto_kernels.{module}").compilations(chip)
    }
    assert shipped == set(launched())


@pytest.fixture
def matrix_kernel():
    from stepkto_kernels.linear_logp import triton_forward

    shipped = triton_forward.compilations(90)
    return next(each for each in shipped if each.matrix and each.label == "bf16 tma")


def test_a_good_kernel_passes(aot, matrix_kernel):
    row, wrong = aot.inspect(matrix_kernel, 90)
    assert wrong == []
    assert "wgmma" in row
    assert "TMA" in row


def test_too_much_shared_memory_fails(aot, matrix_kernel, monkeypatch):
    monkeypatch.setitem(aot.CHIPS, 90, 100)
    _, wrong = aot.inspect(matrix_kernel, 90)
    assert len(wrong) == 1
    assert "KiB of shared memory, the chip gives 100" in wrong[0]


def test_spills_fail(aot, matrix_kernel):
    wide = matrix_kernel._replace(constants=matrix_kernel.constants | {"BLOCK_V": 256})
    wide.signature["weight"] = "tensordesc<bf16[256, 64]>"
    _, wrong = aot.inspect(wide, 90)
    assert any("registers spill" in reason for reason in wrong)


def test_a_matrix_kernel_without_tensor_cores_fails(aot):
    from stepkto_kernels.linear_logp import triton_forward

    rows = next(each for each in triton_forward.compilations(90) if not each.matrix and "fp32" in each.label)
    _, wrong = aot.inspect(rows._replace(matrix=True), 90)
    assert wrong == ["no tensor-core instruction"]
