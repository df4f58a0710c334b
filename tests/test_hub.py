"""The package as a Kernel Hub project: its description is true, and Hugging Face's `kernels` loads what it makes."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "kernels"
PACKAGE = PROJECT / "torch-ext" / "stepkto_kernels"
LIBRARY = PACKAGE / "libstepkto_native.so"
BUILD = tomllib.loads((PROJECT / "build.toml").read_text(encoding="utf-8"))
REPOSITORY = BUILD["general"]["hub"]["repo-id"]

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the C++ library is not built here")


def hugging_face_kernels() -> str | None:
    """Its version; the folder of that name in this repository has none."""
    try:
        return importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


needs_kernels = pytest.mark.skipif(
    hugging_face_kernels() is None, reason="needs Hugging Face's loader: pip install 'kernels>=0.17,<0.18'"
)

# What each of the processes below calls `check` with: the values and gradients of a copy against fp64 torch.
CHECK = """
    import sys
    from pathlib import Path
    import torch

    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16), torch.randn(50, 16) / 4
    target = torch.randint(50, (9,))

    def plain(hidden, weight):
        return (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]

    def results(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        logp = function(*leaves)
        return [logp.detach(), *torch.autograd.grad(logp.sum(), leaves)]

    truth = results(plain, torch.float64)
    # as good as torch in the same dtype, which rounds as often; the 4 is for another order of sums
    allowed = [4 * (a - b).abs().max() for a, b in zip(results(plain, torch.float32), truth)]

    def check(copy, wrap=lambda function: function):
        found = results(wrap(lambda hidden, weight: copy.linear_logp(hidden, weight, target)), torch.float32)
        for got, exact, most in zip(found, truth, allowed, strict=True):
            assert (got - exact).abs().max() <= most, copy
        return found
"""


def run(code: str, where: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHECK) + textwrap.dedent(code)],
        cwd=where, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """What `make hub` writes, in a folder of its own."""
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, str(PROJECT / "hub.py"), "--out", str(folder / "build")], check=True)
    return folder


@pytest.fixture(scope="module")
def other_build(tree, tmp_path_factory) -> Path:
    """The same kernels, built from sources that differ in a comment."""
    sources = tmp_path_factory.mktemp("sources")
    shutil.copytree(PROJECT, sources / "kernels", ignore=shutil.ignore_patterns("build", "__pycache__"))
    with (sources / "kernels" / "torch-ext" / "stepkto_kernels" / "checks.py").open("a") as file:
        file.write("# another build\n")
    subprocess.run([sys.executable, str(sources / "kernels" / "hub.py")], check=True)
    return sources / "kernels"


def metadata(tree: Path) -> dict[str, dict]:
    return {file.parent.name: json.loads(file.read_text()) for file in tree.glob("build/*/metadata.json")}


def compiled(tree: Path) -> str:
    (name,) = {*metadata(tree)} - {"torch-cpu", "torch-cuda"}
    return name


def test_build_toml_and_cmake_name_the_sources_that_exist():
    sections = [BUILD["torch"], *BUILD["kernel"].values()]
    named = {source for section in sections for source in section["src"]}
    there = {f"csrc/{file.name}" for file in (PROJECT / "csrc").iterdir()}
    assert named == there
    cmake = re.findall(r"\$\{CSRC\}/(\w+\.cpp)", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(f"csrc/{name}" for name in cmake) == sorted(name for name in there if name.endswith(".cpp"))


def test_the_card_names_the_public_functions():
    import stepkto_kernels

    card = (PROJECT / "CARD.md").read_text(encoding="utf-8")
    functions = {name for name in stepkto_kernels.__all__ if name.islower()}
    section = card.split("## Functions")[1].split("\n\n")[1]
    assert set(re.findall(r"`([a-z_]+)`", section)) == functions
    front, body = card.removeprefix("---\n").split("\n---\n")
    assert "library_name: kernels" in front
    assert f"license: {BUILD['general']['license']}" in front
    assert "{{" in body  # kernel-builder fills in the repository and the version, and so does hub.py


def test_the_tree_has_no_unfilled_card_and_no_bytecode(tree):
    card = (tree / "build" / "CARD.md").read_text(encoding="utf-8")
    assert f'get_kernel("{REPOSITORY}", version=1)' in card
    assert "{{" not in card
    assert not list(tree.rglob("*.pyc"))


def test_ids_tell_builds_apart(tree, other_build):
    found = [each["id"] for folder in (tree, other_build) for each in metadata(folder).values()]
    assert len(found) == len(set(found))
    assert all(name.isidentifier() for name in found)


@needs_kernels
def test_build_toml_and_metadata_are_valid_to_hugging_face(tree):
    from kernels._rust import Backend, Build, Digest, Metadata

    assert Build.open(PROJECT).general.backends == [Backend.CPU]
    for name, written in metadata(tree).items():
        read = Metadata.read_from_file(tree / "build" / name / "metadata.json")
        assert (read.id, str(read.name), read.version) == (written["id"], "stepkto-kernels", 1)
        assert str(read.backend.backend_type) == ("cuda" if name == "torch-cuda" else "cpu")
        read.digest.validate(Digest.hash_variant(read.digest.algorithm, tree / "build" / name))


@needs_kernels
@needs_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch prefers torch-cuda")
def test_the_loader_takes_the_compiled_variant(tree):
    code = """
        import kernels
        copy = kernels.get_local_kernel(Path("."))
        check(copy)
        print(Path(copy.__file__).parent.name, copy.__name__, copy.native.missing())
        names = [str(node.target) for node in torch.fx.experimental.proxy_tensor.make_fx(
            lambda hidden: copy.linear_logp(hidden, weight, target))(hidden).graph.nodes]
        assert f"{copy.__name__}.linear_logp_forward.default" in names, names
    """
    name = compiled(tree)
    assert run(code, tree).split() == [name, metadata(tree)[name]["id"], "None"]


@needs_kernels
def test_the_override_of_get_kernel(tree):
    code = f"""
        import kernels
        copy = kernels.get_kernel({REPOSITORY!r}, version=1)
        check(copy)
        print(copy.__file__)
    """
    printed = run(code, tree.parent, LOCAL_KERNELS=f"{REPOSITORY}={tree}")
    assert Path(printed.strip()).is_relative_to(tree / "build")


@needs_kernels
@pytest.mark.parametrize("name", ["torch-cpu", "torch-cuda"])
def test_variants_of_python_alone(tree, name):
    code = f"""
        import kernels
        copy = kernels.get_local_kernel(Path({name!r}))
        check(copy)
        print(copy.__name__, copy.native.missing())
    """
    printed = run(code, tree / "build")
    assert printed.startswith(metadata(tree)[name]["id"] + " libstepkto_native.so was not built")


@needs_kernels
@needs_library
def test_copies_side_by_side(tree, other_build):
    """The installed package, two builds from the Hub and one of them again from elsewhere: each has ops and C++
    functions of its own, the last those of its twin."""
    name = compiled(tree)
    twin = tree / "elsewhere" / name
    shutil.copytree(tree / "build" / name, twin, dirs_exist_ok=True)
    folders = [str(folder) for folder in (tree / "build" / name, other_build / "build" / name, twin)]
    code = f"""
        import kernels
        import stepkto_kernels

        loaded = [kernels.get_local_kernel(Path(folder)) for folder in {folders}]
        for copy in (stepkto_kernels, *loaded):
            for backend in ("native", "reference"):
                with copy.backend(backend):
                    first = check(copy)
                    again = check(copy, lambda function: torch.compile(function, fullgraph=True))
                    assert all(map(torch.equal, first, again))
            arguments = (hidden, weight, target, None, 1.0, None, 1.0, -100, 0.0, True)
            torch.library.opcheck(getattr(torch.ops, copy.__name__).linear_logp_forward, arguments)
        with stepkto_kernels.backend("native"):
            installed = check(stepkto_kernels)
        with loaded[0].backend("native"):
            assert all(map(torch.equal, installed, check(loaded[0])))
        modules = [sys.modules[f"{{copy.__name__}}.native"] for copy in (stepkto_kernels, *loaded)]
        print(*(str(module.functions().linear_logp.default).split(".")[0] for module in modules))
    """
    first, second = (metadata(folder)[name]["id"] for folder in (tree, other_build))
    assert run(code, tree).split() == ["stepkto_kernels", first, second, first]


@needs_kernels
def test_in_this_repository_the_name_kernels_is_hugging_face_s():
    printed = run("import kernels; print(kernels.__version__)", ROOT)
    assert printed.split() == [hugging_face_kernels()]


def test_the_package_needs_no_loader(tmp_path):
    run("sys.modules['kernels'] = None\nimport stepkto_kernels\ncheck(stepkto_kernels)", tmp_path)


@needs_library
def test_one_library_registers_under_every_name_once(tmp_path):
    code = f"""
        import ctypes
        register = ctypes.CDLL({str(LIBRARY)!r}).stepkto_register
        register.argtypes, register.restype = [ctypes.c_char_p], ctypes.c_char_p
        assert [register(name) for name in (b"one", b"two", b"one")] == [None] * 3
        assert torch.ops.one.native_instruction_set() == torch.ops.two.native_instruction_set()
        torch.library.define("taken::native_reference_points", "(Tensor values) -> Tensor")
        print(register(b"taken").decode())
        assert not hasattr(torch.ops.taken, "native_instruction_set")
    """
    assert "taken::native_reference_points" in run(code, tmp_path)


@needs_library
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_the_library_shows_one_name():
    listed = subprocess.run(["nm", "-D", "--defined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in listed.stdout.splitlines() if "stepkto" in line] == ["stepkto_register"]
    assert not [line for line in listed.stdout.splitlines() if line.split()[-2] == "u"]  # unique in the process


@pytest.mark.usefixtures("compiler")
def test_a_module_as_kernel_builder_builds_it(tmp_path):
    """The sources and flags of build.toml alone make a Python module; with it and kernel-builder's own `_ops.py` in
    the place of ours the package has its C++ functions, registered as the module is imported."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("needs the headers of Python")
    from torch.utils import cpp_extension

    name = "_stepkto_kernels_cpu_test"
    package = tmp_path / name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_ops.py").write_text(
        f"import torch\nfrom . import {name}\n\nops = torch.ops.{name}\n\n\n"
        f'def add_op_namespace_prefix(op_name):\n    return f"{name}::{{op_name}}"\n'
    )
    (tmp_path / "registration.h").write_text(
        "#include <Python.h>\n"
        "#define TORCH_LIBRARY_EXPAND(name, m) TORCH_LIBRARY(name, m)\n"
        f"#define REGISTER_EXTENSION(name) PyMODINIT_FUNC PyInit_{name}() {{ \\\n"
        f'  static PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{name}", nullptr, 0, nullptr}}; \\\n'
        "  return PyModule_Create(&module); }\n"
    )
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    includes = [f"-I{tmp_path}", f"-I{sysconfig.get_path('include')}"]
    includes += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    jobs, objects = [], []
    for section in (BUILD["torch"], *BUILD["kernel"].values()):
        for source in section["src"]:
            if source.endswith(".cpp"):
                objects.append(str(tmp_path / Path(source).with_suffix(".o").name))
                flags = [*section.get("cxx-flags", []), f"-DTORCH_EXTENSION_NAME={name}", "-std=c++20", "-fPIC", "-O0"]
                jobs.append([compiler, "-c", str(PROJECT / source), "-o", objects[-1], *flags, *includes])
    link = [compiler, "-shared", *objects, "-o", str(package / f"{name}.abi3.so")]
    link += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]

    def succeed(command):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(succeed, jobs))
    succeed(link)
    code = f"""
        import {name} as copy
        with copy.backend("native"):
            check(copy)
        print(copy.native.functions().linear_logp.default)
    """
    printed = run(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert printed.strip() == f"{name}.native_linear_logp.default"
