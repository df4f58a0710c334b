"""Every op has its parts, and the package builds and installs with and without tools."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import stepkto_kernels
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kernels" / "torch-ext" / "stepkto_kernels"
needs_tools = pytest.mark.usefixtures("compiler")


def test_every_op_has_its_folder_truth_derivation_and_test():
    folders = sorted(path.parent.name for path in PACKAGE.glob("*/op.py"))
    heads = "linear_logp", "linear_logp_kl", "linear_logp_parallel", "linear_logp_stats", "linear_step_kto"
    assert folders == [*heads, "reference_points", "step_kto"]
    for name in folders:
        for file in ("README.md", "reference.py", "op.py"):
            assert (PACKAGE / name / file).exists(), f"{name}/{file}"
        assert (ROOT / "tests" / f"test_{name}.py").exists()


def test_public_names_exist():
    assert all(hasattr(stepkto_kernels, name) for name in stepkto_kernels.__all__)
    assert all(getattr(stepkto_kernels, name).__doc__ for name in stepkto_kernels.__all__)


def copy_of_the_sources(destination):
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, destination)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build")
    for name in ("kernels", "stepkto_fast"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, destination / name, ignore=ignored)
    return destination


def build_in_place(root, environment=None):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=root, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@needs_tools
def test_a_wheel_holds_the_package_and_a_library_that_loads(tmp_path):
    root = copy_of_the_sources(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-wwheels", "."],
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = (root / "wheels").glob("stepkto_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    installed = tmp_path / "installed"
    assert (installed / "stepkto_kernels" / "libstepkto_native.so").exists()
    assert (installed / "stepkto_kernels" / "step_kto" / "README.md").exists()
    assert (installed / "stepkto_fast" / "tasks" / "math_sample.jsonl").exists()
    assert not (installed / "kernels").exists()
    code = "import stepkto_kernels as k; print(k.__file__); print(k.native.missing())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=installed, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(installed), "PATH": ""},
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(installed / "stepkto_kernels" / "__init__.py"), "None"]


def test_without_tools_the_build_still_succeeds(tmp_path):
    root = copy_of_the_sources(tmp_path)
    done = build_in_place(root, environment={"PATH": str(tmp_path), "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert "C++ kernels not built" in done.stderr
    assert not list(root.rglob("*.so"))


@needs_tools
def test_a_compile_error_does_not_fail_the_install(tmp_path):
    root = copy_of_the_sources(tmp_path)
    (root / "kernels" / "csrc" / "step_kto.cpp").write_text("this is not C++")
    done = build_in_place(root)
    assert done.returncode == 0, done.stderr
    assert "C++ kernels not built (CalledProcessError" in done.stderr


def test_the_native_library_uses_the_threads_of_torch():
    library = PACKAGE / "libstepkto_native.so"
    if not library.exists() or not shutil.which("ldd"):
        pytest.skip("the library is not built here, or there is no ldd")
    linked = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    assert "omp" not in linked  # a second OpenMP runtime would not know torch.set_num_threads
    assert str(Path(torch.__file__).parent) not in linked
