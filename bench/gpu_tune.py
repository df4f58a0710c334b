"""Sweeps the block shapes of the matrix kernels: `python bench/gpu_tune.py` on a GPU; see README.md here.

`--compile-only --chip 90` needs none: it compiles every candidate as it would run, and keeps in tune_candidates.json
which spill, exceed shared memory or fail to compile; a run on a GPU leaves those out. There a candidate takes the place
of its module's `config`, the whole forward or backward runs, and CUDA events around the launches of that one kernel,
added over the chunks of a call, time it. The host is kept ahead of the device, so that they hold no launch overhead.
"""

import argparse
import contextlib
import faulthandler
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import gpu
import gpu_tune_measure
import head_inputs
import providers
import torch
from gpu_tune_candidates import FILE, KERNELS, candidates, compile_only
from stepkto_kernels import triton_backend

HERE = Path(__file__).resolve().parent
HANGS = 100.0  # seconds after which what is timed counts as hanging
COMPILING = 0.35  # of the budget: until then candidates are compiled side by side
BACKWARD = ("pair", "weight", "hidden")


class Ahead:
    """Compiles candidates in processes of their own while the inputs are made."""

    def __init__(self, jobs: list[tuple[str, tuple[int, ...]]], shape: head_inputs.Shape, device: torch.device):
        workers = min(8, max(1, (os.cpu_count() or 2) // 2))
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        self.jobs = [self.pool.submit(gpu_tune_measure.compile_ahead, *job, shape, str(device)) for job in jobs]

    def wait(self, seconds: float) -> str:
        done, late = wait(self.jobs, timeout=max(0.0, seconds))
        failed = [error for job in done if isinstance(error := job.exception(), Exception)]
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        first = f", the first: {type(failed[0]).__name__}: {providers.one_line(failed[0])}" if failed else ""
        return f"{len(done) - len(failed)} candidates compiled ahead, {len(late)} too late, {len(failed)} failed{first}"


def known(path: Path, chip: int) -> dict[tuple, str]:
    """Why the compiler left candidates out."""
    records = json.loads(path.read_text())["candidates"] if path.exists() else []
    return {(each["kernel"], tuple(each["values"])): each["wrong"] for each in records if each["chip"] == chip}


class Sweep:
    """One process's share of the work; what the JSON holds already is not done again."""

    def __init__(self, arguments: argparse.Namespace, results: gpu.Results, clock: Any = None):
        self.arguments, self.results, self.data = arguments, results, results.data
        self.device = torch.device(arguments.device)
        self.clock = clock or gpu_tune_measure.Clock(self.device)
        self.shape = head_inputs.SHAPES[arguments.shape]
        self.names = [name for name in KERNELS if name.split()[0] in arguments.kernels]
        if running := self.data.pop("running", None):
            self.record(**running, status="failed", reason="hung, or its process died")

    def record(self, **item) -> None:
        self.data["items"].append(item)
        self.data["running"] = None
        self.results.save()

    @contextlib.contextmanager
    def watched(self, **running):
        self.data["running"] = running or None
        self.results.save()
        if self.clock.cuda:
            faulthandler.dump_traceback_later(HANGS, exit=True)
        yield
        faulthandler.cancel_dump_traceback_later()
        if self.clock.cuda:
            try:
                torch.cuda.synchronize()
            except Exception as error:  # such an error stays with the process
                print(f"the device is lost: {providers.one_line(error)}", flush=True)
                os._exit(gpu.STOPPED)

    def plan(self, names: list[str]) -> list[tuple[str, tuple[int, ...], bool, str]]:
        """Shipped ones first, then one of each kernel in turn: (kernel, values, whether shipped, why left out)."""
        chip = triton_backend.chip(torch.empty(0, device=self.device))
        wrong, softcap = known(self.arguments.candidates, chip), self.shape.softcap is not None
        columns = [
            [(name, values, n == 0, wrong.get((name, values), "") if n else "") for n, values in enumerate(found)]
            for name in names
            if (found := candidates(name, chip, softcap, self.arguments.most))
        ]
        return [each for row in itertools.zip_longest(*columns) for each in row if each is not None]

    def backward(self, inputs: str, problem: Any) -> dict[str, float]:
        found = self.data["backward"].setdefault(inputs, {})
        operations = gpu_tune_measure.work(problem, None)
        for name in ("parts", "workspaces"):
            if name in found:
                continue
            found[name] = []  # once is enough, should it end the process
            with self.watched():
                try:
                    if name == "parts":
                        found[name], found["operations"] = gpu_tune_measure.parts(problem, self.clock)
                    else:
                        found[name] = gpu_tune_measure.workspaces(problem, self.clock)
                except Exception as error:
                    found[f"{name} failed"] = f"{type(error).__name__}: {providers.one_line(error)}"
                    print(inputs, name, found[f"{name} failed"], flush=True)
            self.results.save()
        return operations | found.get("operations", {})

    def run(self, deadline: float) -> None:
        make, levels = head_inputs.Maker(self.device), self.arguments.inputs
        ahead = None
        if self.clock.cuda:
            done = {(item["kernel"], tuple(item["values"])) for item in self.data["items"]}
            jobs = [(name, values) for name, values, _, wrong in self.plan(self.names) if not wrong]
            jobs = [job for job in jobs if job not in done]
            ahead = Ahead(jobs, self.shape, self.device)
        until = time.time() + COMPILING * (deadline - time.time())
        for n, inputs in enumerate(levels):
            problem = gpu_tune_measure.Problem(make(self.shape, inputs))
            if ahead:
                print(ahead.wait(until - time.time()), flush=True)
                ahead = None
            stop = time.time() + (deadline - time.time()) / (len(levels) - n)
            operations = self.backward(inputs, problem)
            wanted: dict[str, tuple] = {}
            done = {(i["kernel"], tuple(i["values"])) for i in self.data["items"] if i["inputs"] == inputs}
            # the forward and linear_logp_kl take as long on any inputs
            for name, values, shipped, wrong in self.plan([x for x in self.names if n == 0 or x in BACKWARD]):
                item = {"inputs": inputs, "kernel": name, "values": list(values), "shipped": shipped}
                if (name, values) in done:
                    continue
                if wrong or time.time() > stop:
                    facts: dict[str, Any] = {"status": "left out", "reason": wrong or "no time was left"}
                else:
                    with self.watched(**item):
                        facts = gpu_tune_measure.attempt(name, values, problem, self.clock, wanted)
                    if facts["status"] == "ok" and name in operations:
                        facts["tflops"] = operations[name] / facts["ms"] / 1e9
                self.record(**item, **facts)
                print(line(item | facts), flush=True)
            del problem, wanted


def line(item: dict) -> str:
    text = f"  {item['kernel']:<12}{'x'.join(map(str, item['values'])):<24}{'shipped' * item['shipped']:<8}"
    if item["status"] != "ok":
        return f"{text}{item['status']}: {item['reason']}"
    rate = f"  {item['tflops']:6.1f} TFLOP/s" if "tflops" in item else ""
    return f"{text}{item['ms']:9.3f} ms{rate}  {item['n_regs']} regs, {item['n_spills']} spilled"


def table(data: dict) -> str:
    lines = []
    for inputs in dict.fromkeys([*data["backward"], *(item["inputs"] for item in data["items"])]):
        for name, kernel in KERNELS.items():
            items = [i for i in data["items"] if (i["inputs"], i["kernel"]) == (inputs, name)]
            timed = sorted((i for i in items if i["status"] == "ok"), key=lambda i: i["ms"])
            shipped = next((i["ms"] for i in timed if i["shipped"]), None)
            lines += [f"\n{name} at {inputs}: {', '.join(kernel.fields)}"] if items else []
            for i in timed + [i for i in items if i["status"] != "ok"]:
                gain = f", {shipped / i['ms']:.3f} times the shipped speed" if shipped and "ms" in i else ""
                lines.append(line(i) + (f"  <- best{gain}" if i in timed[:1] else ""))
        found = data["backward"].get(inputs, {})
        lines.append(f"\nbackward at {inputs}")
        for row in found.get("parts", []):
            rate = f"  {row['tflops']:6.1f} TFLOP/s" if "tflops" in row else ""
            lines.append(f"  {row['part']:<40}{row['ms']:9.3f} ms{rate}")
        for row in found.get("workspaces", []):
            peak = "" if row.get("peak_mib") is None else f", peak {row['peak_mib']:.0f} MiB"
            took = row.get("reason") or f"{row['ms']:9.3f} ms, host {row['host_ms']:.3f} ms{peak}"
            lines.append(f"  a workspace of {row['bytes'] + ' bytes':<25}{took}")
    return "\n".join(lines)


def main(words: list[str] | None = None, clock: Any = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kernels = ("forward", *BACKWARD, "kl")
    parser.add_argument("--shape", default="trl", choices=list(head_inputs.SHAPES))
    parser.add_argument("--inputs", nargs="+", default=[gpu.CHIEF, "flat"])
    parser.add_argument("--kernels", nargs="+", default=list(kernels), choices=kernels)
    parser.add_argument("--budget-seconds", type=float, default=300)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with TRITON_INTERPRET=1")
    parser.add_argument("--commit", help="where the tree is a copy without its history")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run into --out has measured")
    parser.add_argument("--most", type=int, help="candidates of each kernel")
    parser.add_argument("--candidates", type=Path, default=FILE, help="what the compiler found")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--chip", type=int, default=90, choices=list(triton_backend.CHIPS), help="with --compile-only")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of the process that measures
    words = sys.argv[1:] if words is None else words
    arguments = parser.parse_args(words)
    if arguments.compile_only:
        names = [name for name in KERNELS if name.split()[0] in arguments.kernels]
        compile_only(names, arguments.chip, arguments.candidates, arguments.most)
        return 0
    facts = gpu.machine(arguments.device, arguments.commit)
    path = arguments.out / f"tune-{facts['gpu'].lower().replace(' ', '-')}.json"
    deadline = arguments.until or time.time() + arguments.budget_seconds
    if arguments.until is None:
        results = gpu.Results(path, fresh=not arguments.resume)
        results.data |= {"machine": facts, "shape": arguments.shape}
        results.data.setdefault("backward", {})
        results.save()
    if arguments.until or arguments.device == "cpu":
        Sweep(arguments, gpu.Results(path), clock).run(deadline)
        if arguments.until:
            return 0
    else:  # one that dies or hangs costs what it was at
        command = [sys.executable, str(Path(__file__).resolve()), *words, "--until", str(deadline)]
        before = None
        while time.time() < deadline and before != (before := path.read_text()) and subprocess.call(command) != 0:
            print("its process died; the next one goes on behind it", flush=True)
    data = gpu.Results(path).data
    text = table(data)
    path.with_suffix(".txt").write_text(text + "\n")
    print(f"{path}\n{text}")
    return 0 if any(item["status"] == "ok" for item in data["items"]) else 1


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
