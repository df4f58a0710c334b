"""`make aot`: compiles every Triton kernel in every shipped configuration for every supported chip, with no GPU.

Prints registers, spills, shared memory and the tensor-core instructions of each, and fails on a spill, on more shared
memory than the chip gives a block, and on a matrix kernel without tensor-core instructions.
"""

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # a kernel defined under the interpreter cannot be compiled

import triton
from stepkto_kernels.triton_backend import CHIPS, Compilation
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = (
    "linear_logp.triton_forward",
    "linear_logp.triton_route",
    "linear_logp.triton_backward",
    "linear_logp_kl.triton_forward",
    "reference_points.triton_forward",
    "step_kto.triton_forward",
)
COPIES = {"cp.async.bulk.tensor": "TMA", "cp.async": "cp.async"}
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)")


def compiled(each: Compilation, chip: int) -> Any:
    """Pointers, and integers marked ":16", count as divisible by 16: what the launcher finds for real tensors."""
    names = each.kernel.arg_names
    signature = {name: "constexpr" if name in each.constants else each.signature[name] for name in names}
    aligned = [n for n, name in enumerate(names) if signature[name].startswith("*") or signature[name].endswith(":16")]
    source = ASTSource(
        fn=each.kernel,
        signature={name: kind.removesuffix(":16") for name, kind in signature.items()},
        constexprs={(names.index(name),): value for name, value in each.constants.items()},
        attrs={(n,): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": each.num_warps, "num_stages": each.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack, local and static shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def inspect(each: Compilation, chip: int) -> tuple[str, list[str]]:
    """A row of the table, and what is wrong with this kernel."""
    kernel = compiled(each, chip)
    found = resources(kernel.asm["cubin"])
    spilled = found["STACK"] + found["LOCAL"]
    shared = (kernel.metadata.shared + found.get("SHARED", 0)) / 1024
    cores = Counter(TENSOR_CORE.findall(kernel.asm["ptx"]))
    copies = (
        "TMA" if "cp.async.bulk.tensor" in kernel.asm["ptx"] else "cp.async" if "cp.async" in kernel.asm["ptx"] else ""
    )
    wrong = []
    if spilled:
        wrong.append(f"{spilled} bytes of registers spill")
    if shared > CHIPS[chip]:
        wrong.append(f"{shared:.0f} KiB of shared memory, the chip gives {CHIPS[chip]}")
    if each.matrix and not cores:
        wrong.append("no tensor-core instruction")
    row = (
        f"{each.kernel.__name__:<24} {each.label:<28} {chip:>4} {each.num_warps:>5} {each.num_stages:>6} "
        f"{found['REG']:>5} {spilled:>6} {shared:>7.1f}  {copies:<9} {' '.join(cores) or '-'}"
    )
    return row, wrong


def inspect_all(module: str, chip: int, only: str) -> list[tuple[str, list[str]]]:
    """The rows of one module for one chip, each with its problems."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    found = []
    for each in importlib.import_module(f"stepkto_kernels.{module}").compilations(chip):
        if only in f"{each.kernel.__name__} {each.label}":
            row, wrong = inspect(each, chip)
            problems = [f"{each.kernel.__name__} ({each.label}) for {chip}: {reason}" for reason in wrong]
            found.append((row + "".join(f"  <- {reason}" for reason in wrong), problems))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=int, nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--only", default="", help="kernels and configurations whose names contain this text")
    options = parser.parse_args()
    print(
        f"triton {triton.__version__}\n{'kernel':<24} {'configuration':<28} {'chip':>4} {'warps':>5} {'stages':>6} "
        f"{'regs':>5} {'spills':>6} {'KiB':>7}  {'copies':<9} tensor cores"
    )
    failures, count = [], 0
    jobs = [(module, chip, options.only) for module in MODULES for chip in options.chips]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(inspect_all, *zip(*jobs, strict=True)):
            for row, problems in found:
                print(row, flush=True)
                failures += problems
                count += 1
    if failures:
        sys.exit("\n".join(["", f"{len(failures)} problems:", *failures]))
    print(f"{count} kernels: no spill, shared memory within every chip, tensor cores wherever matrices are multiplied")


if __name__ == "__main__":
    main()
