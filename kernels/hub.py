"""`make hub`: the package as Hugging Face's `kernels` loads it, one folder per build variant in kernels/build/.

`torch-cpu` and `torch-cuda` are Python alone: torch, and Triton on GPUs, for every version of torch. Where the C++
library is built there is also a variant for this torch and processor that has it, and that CPU builds of torch prefer.
This needs torch, and the `kernels` package only to load what it writes.
"""

import argparse
import base64
import hashlib
import json
import platform
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).parent
LIBRARY = "libstepkto_native.so"
PYTHON_ONLY = ("cpu", "cuda")


def compiled_variant() -> str:
    """The name of the variant that has a C++ library for CPU tensors, built against the torch that runs here."""
    major, minor = torch.__version__.split(".")[:2]
    system, machine = platform.system().lower(), platform.machine().replace("arm64", "aarch64")
    abi = "" if system != "linux" else "cxx11-" if torch.compiled_with_cxx11_abi() else "cxx98-"
    return f"torch{major}{minor}-{abi}cpu-{machine}-{system}"


def digests(variant: Path) -> dict[str, str]:
    """The SHA-256 of every file, in base64, by its path."""
    return {
        file.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in sorted(variant.rglob("*"))
        if file.is_file()
    }


def assemble(variant: Path, package: Path, general: dict[str, Any], backend: str, library: Path | None) -> None:
    """One variant, in the place of what was there. Its id, which is the name it is imported under and the namespace
    of its ops, tells its contents: builds that differ can be loaded side by side."""
    shutil.rmtree(variant, ignore_errors=True)
    for source in package.rglob("*.py"):
        target = variant / source.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    if library:
        shutil.copyfile(library, variant / LIBRARY)
    files = digests(variant)
    contents = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    metadata = {
        "name": general["name"],
        "id": f"_{package.name}_{backend}_{contents[:10]}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PROJECT / "build", help="the folder that gets the variants")
    options = parser.parse_args()
    general = tomllib.loads((PROJECT / "build.toml").read_text(encoding="utf-8"))["general"]
    package = PROJECT / "torch-ext" / general["name"].replace("-", "_")
    for backend in PYTHON_ONLY:
        assemble(options.out / f"torch-{backend}", package, general, backend, library=None)
        print(options.out / f"torch-{backend}")
    compiled = options.out / compiled_variant()
    if (package / LIBRARY).exists():
        assemble(compiled, package, general, "cpu", package / LIBRARY)
        print(compiled)
    else:
        shutil.rmtree(compiled, ignore_errors=True)  # of an earlier build
        print(f"not {compiled.name}: build {LIBRARY} first (python setup.py build_ext --inplace)", file=sys.stderr)
    values = {"repo_id": general["hub"]["repo-id"], "version": str(general["version"])}
    card = (PROJECT / "CARD.md").read_text(encoding="utf-8")
    card = re.sub(r"\{\{ ?(\w+) ?\}\}", lambda found: values[found[1]], card)
    (options.out / "CARD.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
