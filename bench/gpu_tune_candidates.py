"""The candidates of gpu_tune.py: which block shapes it tries, and what the compiler makes of them, without a GPU."""

import contextlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from stepkto_kernels.linear_logp import triton_backward, triton_forward
from stepkto_kernels.linear_logp_kl import triton_forward as triton_kl
from stepkto_kernels.triton_backend import CHIPS

HERE = Path(__file__).resolve().parent
FILE = HERE / "tune_candidates.json"


class Kernel(NamedTuple):
    module: Any
    function: str
    call: str  # of Problem, that launches it
    labels: tuple[str, ...]  # of the compilations that a candidate has to pass, TMA where the chip has it
    fields: tuple[str, ...]  # of config(...)
    candidates: tuple[tuple[int, ...], ...]  # what looks best comes first


BOTH_HEADS = (
    (64, 128, 64, 8, 2, 4, 4), (128, 128, 64, 8, 1, 8, 3), (64, 128, 64, 8, 2, 4, 3), (64, 128, 128, 8, 1, 8, 3),
    (128, 128, 64, 8, 1, 8, 4), (64, 128, 64, 8, 2, 8, 3), (64, 128, 64, 16, 1, 8, 4), (128, 128, 64, 8, 1, 16, 3),
    (64, 128, 128, 8, 1, 8, 2), (64, 128, 64, 8, 1, 4, 4),
)  # fmt: skip
SHAPE = triton_forward.Config._fields
KERNELS = {
    "forward": Kernel(triton_forward, "linear_logp_tiles", "forward", ("bf16",), SHAPE, (
        (128, 256, 64, 8, 1, 8, 3), (256, 128, 64, 8, 1, 8, 4), (128, 128, 64, 8, 2, 4, 3), (128, 256, 64, 8, 1, 8, 4),
        (256, 128, 64, 16, 1, 8, 3), (256, 128, 128, 8, 1, 8, 2), (128, 128, 64, 8, 2, 8, 3),
        (256, 128, 64, 32, 1, 8, 3), (128, 256, 64, 16, 1, 8, 3), (128, 128, 128, 8, 1, 8, 3),
        (128, 128, 64, 8, 1, 8, 4), (64, 256, 64, 8, 2, 4, 2), (128, 128, 32, 8, 2, 4, 6), (256, 128, 64, 4, 1, 8, 3),
    )),
    "pair": Kernel(triton_backward, "pair_gradients", "backward", ("bf16",),
        ("pair_d", "pair_warps", "pair_stages"), (
        (128, 8, 3), (64, 8, 5), (64, 4, 4), (64, 8, 3), (128, 8, 2), (64, 4, 3), (32, 8, 6), (64, 8, 6), (128, 4, 3),
        (32, 4, 6), (64, 8, 2),
    )),
    "weight": Kernel(triton_backward, "weight_gradients", "backward", ("bf16",),
        ("weight_r", "weight_d", "weight_warps", "weight_stages"), (
        (64, 256, 8, 5), (64, 128, 8, 5), (64, 256, 8, 2), (128, 256, 8, 2), (128, 128, 8, 3), (64, 128, 4, 5),
        (32, 256, 8, 7), (64, 128, 8, 7), (128, 128, 8, 5), (64, 128, 8, 3), (32, 256, 8, 5), (64, 128, 4, 3),
        (64, 256, 8, 7), (32, 128, 8, 7),
    )),
    # Loads whose addresses are loaded take stages too: a buffer more costs two of them above, three here (see the KiB).
    # Only of several chunks, with a remainder; a backward of one chunk (hidden_d) is too small to matter.
    "hidden": Kernel(triton_backward, "hidden_gradients", "backward", ("bf16 remainder", "bf16 later remainder"),
        ("hidden_v", "hidden_d_of_chunks", "hidden_warps", "hidden_stages"), (
        (64, 128, 8, 7), (64, 64, 4, 7), (128, 128, 8, 3), (64, 128, 8, 10), (128, 64, 8, 7), (64, 64, 8, 7),
        (128, 128, 8, 7), (64, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (32, 128, 8, 7), (64, 64, 4, 10),
        (128, 128, 8, 2), (64, 256, 8, 3), (64, 128, 4, 3),
    )),
    "kl": Kernel(triton_kl, "linear_logp_kl_tiles", "two_heads", ("bf16",), SHAPE, BOTH_HEADS),
    "kl one head": Kernel(triton_kl, "linear_logp_kl_tiles", "one_head", ("bf16 one head",), SHAPE, BOTH_HEADS),
}  # fmt: skip


def candidates(name: str, chip: int, softcap: bool = False, most: int | None = None) -> list[tuple[int, ...]]:
    """The shipped values first."""
    kernel = KERNELS[name]
    extra = (softcap,) if name == "forward" else ()
    config = kernel.module.config(chip, torch.bfloat16, *extra)
    shipped = tuple(getattr(config, field) for field in kernel.fields)
    return list(dict.fromkeys([shipped, *kernel.candidates]))[:most]


@contextlib.contextmanager
def replaced(module: Any, **values):
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def configured(kernel: Kernel, values: tuple[int, ...]):
    shipped, fields = kernel.module.config, dict(zip(kernel.fields, values, strict=True))
    return replaced(kernel.module, config=lambda *arguments: shipped(*arguments)._replace(**fields))


def inspected(name: str, values: tuple[int, ...], chip: int) -> dict:
    """What ptxas makes of a candidate, and why it is left out, if it is."""
    sys.path.insert(0, str(HERE.parent / "kernels"))
    import aot

    kernel, facts, reasons = KERNELS[name], {"regs": 0, "spills": 0, "kib": 0.0}, []
    try:
        with configured(kernel, values):
            every = kernel.module.compilations(chip)
        found = {each.label: each for each in every if each.kernel.__name__ == kernel.function}
        for label in kernel.labels:
            each = found.get(f"{label} tma", found[label])
            row, wrong = aot.inspect(each._replace(label="-"), chip)
            reasons += wrong
            regs, spills, kib = row.split()[5:8]
            facts = {name: max(facts[name], float(x)) for name, x in (("regs", regs), ("spills", spills), ("kib", kib))}
    except Exception as error:  # whatever a candidate does, the next one is compiled
        reasons.append(f"{type(error).__name__}: {str(error).splitlines()[:1]}")
    config = dict(zip(kernel.fields, values, strict=True))
    side_by_side, warps = config.get("per_multiprocessor", 1), next(v for k, v in config.items() if "warps" in k)
    rounded = -(-facts["regs"] // 8) * 8
    if side_by_side * max(rounded * 32 * warps / 65536, (facts["kib"] + 1) / (CHIPS[chip] + 1)) > 1:
        reasons.append(f"{side_by_side} do not fit side by side")
    facts = {"regs": int(facts["regs"]), "spills": int(facts["spills"]), "kib": facts["kib"]}
    return {"chip": chip, "kernel": name, "values": list(values), **facts, "wrong": "; ".join(dict.fromkeys(reasons))}


def compile_only(names: list[str], chip: int, path: Path, most: int | None) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    jobs = [(name, values, chip) for name in names for values in candidates(name, chip, most=most)]
    known = json.loads(path.read_text())["candidates"] if path.exists() else []
    records = [each for each in known if each["chip"] != chip or each["kernel"] not in names]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for each in pool.map(inspected, *zip(*jobs, strict=True)):
            records.append(each | {"triton": triton.__version__})
            shape = "x".join(map(str, each["values"]))
            print(
                f"{each['kernel']:<12} {chip:>3} {shape:<22} {each['regs']:>4} regs {each['spills']:>6} spilled "
                f"{each['kib']:>6.1f} KiB  {each['wrong']}",
                flush=True,
            )
    lines = ",\n".join(json.dumps(each) for each in records)
    path.write_text(f'{{"candidates": [\n{lines}\n]}}\n')
