"""Times every op on a GPU beside the bare products and the peers: `python bench/gpu.py`; see README.md here.

One process plans and watches, another measures: one that dies (an illegal address leaves its CUDA context unusable) or
hangs costs the item it was at, which is recorded with the reason, and the next one goes on behind it.
"""

import argparse
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import gpu_figures

HERE = Path(__file__).resolve().parent
MEASURE = HERE / "gpu_measure.py"
CHIEF = "peaked 0.3"  # the level nearest to published entropies of rollouts
SECONDS = 0.8  # of timed rounds an item
STOPPED = 17  # the exit status of a process whose device is lost
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl", "nvidia-cutlass-dsl")
PACKAGES = (*PEERS, "transformers", "tokenizers")


class Entry(NamedTuple):
    """One measurement: a provider on inputs of a shape, forward alone or with its backward."""

    shape: str
    inputs: str
    provider: str
    gradients: bool

    @property
    def key(self) -> str:
        return f"{self.shape}/{self.inputs}/{self.provider}/{'both' if self.gradients else 'forward'}"


def entries(shape: str, inputs: str, forward: str = "", both: str = "") -> list[Entry]:
    """Names between semicolons; what stands in both lists is timed both ways."""
    names = {False: [n.strip() for n in forward.split(";")], True: [n.strip() for n in both.split(";")]}
    order = dict.fromkeys(names[False] + names[True])
    return [Entry(shape, inputs, n, g) for n in order for g in (False, True) if n and n in names[g]]


ONES = "ours; TRL; cut-cross-entropy; Liger scaled cross-entropy; torch linear_cross_entropy"
ALL = (
    "ours; ours, exact; TRL; full logits; Liger cross-entropy; Liger scaled cross-entropy; cut-cross-entropy; "
    "QuACK; verl; Liger scaled cross-entropy, fallback; torch linear_cross_entropy; torch linear_cross_entropy, chunked"
)
KTO = (
    "ours, linear_step_kto; ours, linear_step_kto after the reference's linear_logp; ours, linear_step_kto_exact; "
    "Liger KTO; Liger KTO with its reference"
)
OBJECTIVE = "large copy; copy of its bytes; ours; ours, as a CUDA graph; plain torch; plain torch, as a CUDA graph"


def head(shape: str) -> list[Entry]:
    """The suite of a shape whose place in the order is late."""
    few = "bare 6NDV; ours; ours, exact; TRL; cut-cross-entropy; Liger cross-entropy; Liger scaled cross-entropy"
    return [
        *entries(shape, CHIEF, both="ours; cut-cross-entropy"),
        *entries(shape, "flat", forward="bare 2NDV; ours", both=few),
    ]


def plan(shapes: list[str]) -> list[Entry]:
    """What is worth most comes first: the budget may end anywhere."""
    levels = ["peaked 0.1", "peaked 1.0", "peaked 0.6", "peaked 2.0", "peaked 4.0"]
    products = {"forward": "bare 2NDV", "both": "bare 6NDV; bare 8NDV"}
    blocks = [
        entries("trl", "flat", **products),
        entries("trl", "flat", forward=ONES + "; full logits", both=ALL),
        entries("trl", CHIEF, **products),
        entries("trl", CHIEF, forward="ours", both=ALL),
        *(entries("trl", level, both="ours; cut-cross-entropy") for level in levels),
        entries("trl", "scattered 0.3", both="ours"),
        entries("step_kto", "tokens", both=OBJECTIVE),
        entries("liger", CHIEF, both="bare 6NDV; bare 8NDV; " + KTO),
        entries("liger", CHIEF, both="Liger KTO, compiled; Liger KTO with its reference, compiled"),
        entries("liger", "flat", both="bare 6NDV; " + KTO),
        entries(
            "trl",
            CHIEF,
            forward="ours, linear_logp_kl; ours, linear_logp_kl with one head",
            both="ours, linear_logp_kl; ours, linear_step_kto; ours, linear_step_kto_exact",
        ),
        *(head(shape) for shape in ("llama3", "gemma2", "0.5b", "v131072")),
        entries(
            "trl",
            "flat",
            both="full logits, torch.compile; chunked logits, torch.compile; cut-cross-entropy, torch.compile",
        ),
        entries("lm", "real", forward="bare 2NDV; ours", both="bare 6NDV; " + ALL),
        entries("tiny", "flat", **products),
        entries("tiny", "flat", forward=ONES, both=ALL + "; " + KTO),
        entries("tiny", "peaked 0.6", forward="ours; ours, linear_logp_kl", both="bare 6NDV; ours; ours, exact; TRL"),
        entries("tiny", "peaked 2.0", both="ours"),
    ]
    every = list(dict.fromkeys(entry for block in blocks for entry in block))
    chosen = {"trl", "step_kto", "liger", "llama3", "gemma2", "0.5b", "v131072"} if "all" in shapes else set()
    unknown = set(shapes) - {"all"} - {entry.shape for entry in every}
    if unknown:
        raise SystemExit(f"unknown shapes {', '.join(sorted(unknown))}: all, or of {sorted({e.shape for e in every})}")
    return [entry for entry in every if entry.shape in chosen | set(shapes)]


class Results:
    """The JSON on disk, complete after every item."""

    def __init__(self, path: Path, fresh: bool = False):
        self.path = path
        self.data: dict[str, Any] = {"machine": {}, "items": [], "running": None}
        if path.exists() and not fresh:
            self.data = json.loads(path.read_text())

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1))
        os.replace(temporary, self.path)

    def begin(self, entry: Entry, limit: float) -> None:
        self.data["running"] = {"entry": list(entry), "since": time.time(), "limit": limit}
        self.save()

    def finish(self, entry: Entry, **found) -> dict:
        item = {
            "shape": entry.shape,
            "inputs": entry.inputs,
            "provider": entry.provider,
            "pass": "forward+backward" if entry.gradients else "forward",
            **found,
        }
        self.data["items"] = [i for i in self.data["items"] if key_of(i) != entry.key] + [item]
        self.data["running"] = None
        self.save()
        return item


def key_of(item: dict) -> str:
    return Entry(item["shape"], item["inputs"], item["provider"], item["pass"] != "forward").key


def gave_up(data: dict, entry: Entry) -> str | None:
    """Why a provider that hung or killed its process is left alone: peers after once, ours after twice."""
    fatal = [i for i in data["items"] if i.get("fatal") and i["provider"] == entry.provider]
    return fatal[-1]["reason"] if len(fatal) >= (2 if entry.provider.startswith("ours") else 1) else None


@functools.cache
def ask_nvidia(fields: str) -> str | None:
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0].strip() if answer.stdout else None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def machine(device: str, known_commit: str | None) -> dict:
    sources = sorted((HERE.parent / "kernels" / "torch-ext").rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    try:
        found = commit()
    except OSError:
        found = None
    return {
        "gpu": (ask_nvidia("name") or "GPU") if device == "cuda" else "cpu",
        "driver": ask_nvidia("driver_version") if device == "cuda" else None,
        "state": ask_nvidia("clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit")
        if device == "cuda"
        else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", *PACKAGES)},
        "commit": known_commit or found,
        "kernels_sha256": digest[:16],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def watch(arguments: argparse.Namespace, path: Path) -> None:
    """Starts measuring processes until the plan is done or the time is up."""
    every = plan(arguments.shapes)
    deadline = time.time() + arguments.budget_seconds
    command = [sys.executable, str(MEASURE), str(path), arguments.device, str(deadline)]
    fruitless = 0
    while fruitless < 2 and time.time() < deadline:
        before = len(Results(path).data["items"])
        process = subprocess.Popen([*command, *arguments.shapes])
        reason, started = "", time.time()
        while process.poll() is None and not reason:
            time.sleep(0.2)
            running = Results(path).data["running"]
            since, limit = (running["since"], running["limit"]) if running else (started, arguments.budget_seconds + 60)
            if time.time() > since + limit:
                reason = f"took longer than {limit:.0f} s"
            elif time.time() > deadline + 30:
                reason = "ran when the time was up"
        if process.poll() is None:
            process.kill()
        status = process.wait()
        results = Results(path)
        running = results.data["running"]
        if running:
            reason = reason or f"its process died with status {status}"
            results.finish(Entry(*running["entry"]), status="failed", reason=reason, fatal=True)
            print(f"{Entry(*running['entry']).key}: {reason}", flush=True)
        if status == 0:
            break
        fruitless = fruitless + 1 if len(Results(path).data["items"]) == before else 0
    results = Results(path)
    done = {key_of(item) for item in results.data["items"]}
    reason = "no time was left" if time.time() >= deadline else "the measuring process did not start"
    for entry in every:
        if entry.key not in done:
            results.finish(entry, status="not reached", reason=reason)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", default="all", help="all, or names with commas between; lm is not among all")
    parser.add_argument("--budget-seconds", type=float, default=400)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--commit", help="where the tree is a copy without its history")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run into --out has measured")
    parser.add_argument("--figures", type=Path, help="only draw the figures of this JSON and print its table")
    arguments = parser.parse_args()
    arguments.shapes = [name for name in arguments.shapes.split(",") if name]
    path = arguments.figures
    if path is None:
        facts = machine(arguments.device, arguments.commit)
        path = arguments.out / f"{facts['gpu'].lower().replace(' ', '-')}.json"
        results = Results(path, fresh=not arguments.resume)
        results.data["machine"], results.data["running"] = facts, None
        results.data["items"] = [item for item in results.data["items"] if item["status"] == "ok"]
        results.save()
        watch(arguments, path)
        results = Results(path)
        if arguments.device == "cuda":
            ask_nvidia.cache_clear()
            results.data["machine"]["state_after"] = ask_nvidia("clocks.sm,clocks.mem,temperature.gpu,power.draw")
        results.data["goals"] = gpu_figures.goals(results.data)
        results.save()
    data = json.loads(path.read_text())
    try:
        files = [path, *gpu_figures.draw(data, path)]
    except Exception as error:  # matplotlib may be missing, and a figure is not worth the table
        files = [path]
        print(f"no figures: {type(error).__name__}: {error}")
    table = gpu_figures.table(data)
    path.with_suffix(".txt").write_text(table + "\n")
    print("\n".join([*(str(name) for name in files), table]))
    return 0 if any(item["status"] == "ok" for item in data["items"]) else 1


if __name__ == "__main__":
    sys.exit(main())
