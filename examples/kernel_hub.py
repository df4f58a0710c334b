"""The kernels as Hugging Face's `kernels` package loads them, beside the installed ones in one process.

`make hub` assembles the builds; here they go to a temporary folder. A script of your own needs the line with
`get_local_kernel`, or `kernels.get_kernel` of a repository that someone has published.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import stepkto_kernels
import torch

import kernels

REQUIRES = ("kernels",)

PROJECT = Path(__file__).resolve().parents[1] / "kernels"


def main() -> None:
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(32, 64), torch.randn(1000, 64), torch.randint(1000, (32,))
    with tempfile.TemporaryDirectory() as folder:
        builds = Path(folder) / "build"
        subprocess.run([sys.executable, str(PROJECT / "hub.py"), "--out", str(builds)], check=True)
        from_hub = kernels.get_local_kernel(Path(folder))
        logp = from_hub.linear_logp(hidden, weight, target)
    installed = stepkto_kernels.linear_logp(hidden, weight, target)
    print(f"loaded as {from_hub.__name__}, beside {stepkto_kernels.__name__}")
    print(f"mean log-probability: {logp.mean():.6f} and {installed.mean():.6f} nats")


if __name__ == "__main__":
    main()
