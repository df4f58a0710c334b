"""Packages and the optional C++ extension; everything else is in pyproject.toml.

`stepkto_kernels` lives in kernels/torch-ext, where a Kernel Hub project keeps its package, and is imported
from the top level. Without torch, a compiler or CMake at build time the install succeeds without the C++
kernels, and `python -m stepkto_kernels` says what is missing.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_EXT = "kernels/torch-ext"
LIBRARY = "libstepkto_native.so"


class CMakeBuild(build_ext):
    """Builds the one shared library with CMake, into the package; torch loads it, Python does not."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        try:
            self.cmake(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            reason = f"{type(error).__name__}: {error}"
            print(f"warning: C++ kernels not built ({reason}); the others work without them", file=sys.stderr)

    def cmake(self, library: Path) -> None:
        import torch
        from torch.utils import cpp_extension

        build = (ROOT / self.build_temp / "stepkto_native").resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT.resolve()),
            "-B",
            str(build),
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            f"-DTORCH_INCLUDE_DIRS={';'.join(cpp_extension.include_paths())}",
            f"-DTORCH_LIBRARY_DIRS={';'.join(cpp_extension.library_paths())}",
            f"-DTORCH_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ]
        # a cache from another torch, or another place, is worse than none
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        # not over the old file: a running process may have it mapped
        library.unlink(missing_ok=True)
        shutil.copy2(build / LIBRARY, library)


setup(
    packages=[*find_packages(TORCH_EXT), *find_packages(include=["stepkto_fast", "stepkto_fast.*"])],
    package_dir={"stepkto_kernels": f"{TORCH_EXT}/stepkto_kernels", "stepkto_fast": "stepkto_fast"},
    package_data={"stepkto_kernels": ["*.md", "*/*.md", "py.typed"], "stepkto_fast": ["*.jinja", "tasks/*.jsonl"]},
    ext_modules=[Extension("stepkto_kernels.native_library", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
