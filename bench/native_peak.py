"""Peak memory of the C++ head kernels beyond inputs and gradients, at the goals' shapes, each in a process of its own.

    python bench/native_peak.py --out bench/results/<machine>-memory.json [--shapes 32k,152k]

The peak is the process's highest resident size during a call (VmHWM, reset before it), less what was resident before
and less the gradients that the call returns; Linux only. A first call warms up: thread pools, compiled products. glibc
would keep freed memory and hand it out again unseen, or touch it again as if it were new: blocks of 64 KiB and more are
mapped and unmapped one by one here (M_MMAP_THRESHOLD). In a process that runs many providers what they left behind
cannot be told from what a call needs, which is why bench_native.py's column is rough for anything that needs little.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from bench_native import CLEAR, DTYPES, GOALS, PEAKED, memory
from conftest import processor
from head_inputs import Maker
from safetensors.torch import load_file, save_file
from stepkto_kernels import backend, linear_logp, watch

M_MMAP_THRESHOLD = -3
LIMIT = 0.05  # of the logits


def measured(path: str, filter_eps: float) -> dict:
    """In the child: the facts of one forward and backward."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    x = load_file(path)
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    slope = torch.full((len(hidden),), 1.0 / len(hidden))

    def call() -> tuple[torch.Tensor, ...]:
        with backend("native"):
            logp = linear_logp(hidden, weight, x["target"], filter_eps=filter_eps)
        return torch.autograd.grad(logp, (hidden, weight), slope)

    with watch() as calls:
        call()
    gc.collect()
    CLEAR.write_text("5")
    before = memory("VmRSS")
    gradients = call()
    extra = memory("VmHWM") - before - sum(g.nbytes for g in gradients)
    logits = len(hidden) * len(weight)
    shares = {"share": extra / (logits * hidden.itemsize), "share_fp32": extra / (logits * 4)}
    return {"path": calls[0].path, "rho": calls[0].rho, "megabytes": extra / 1e6} | shares


def rows(names: list[str]) -> list[dict]:
    found, make = [], Maker(torch.device("cpu"))
    for shape in (shape for shape in GOALS if shape.name in names):
        for label, dtype in DTYPES.items():
            x = make(shape._replace(dtype=dtype), PEAKED)
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "inputs.safetensors")
                save_file({name: getattr(x, name).contiguous() for name in ("hidden", "weight", "target")}, path)
                for filter_eps in (2.0**-9, 0.0):
                    command = [sys.executable, __file__, "--child", path, str(filter_eps)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    facts = {"shape": shape.name, "dtype": label, "filter_eps": filter_eps}
                    found.append(facts | json.loads(done.stdout))
                    print("  ".join(f"{k} {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in found[-1].items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", default=",".join(shape.name for shape in GOALS))
    parser.add_argument("--child", nargs=2, metavar=("FILE", "FILTER_EPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measured(arguments.child[0], float(arguments.child[1]))))
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = {"processor": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    found = rows(arguments.shapes.split(","))
    for row in found:
        status = "met" if row["share"] < LIMIT else "MISSED"
        print(f"{row['shape']} {row['dtype']} {row['path']}: {status}, over the logits in {row['dtype']}")
    if arguments.out:
        result = {"machine": machine, "commit": commit, "when": datetime.now(UTC).isoformat(), "rows": found}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
