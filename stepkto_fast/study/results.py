"""The study's result files: one JSON file a run, one for each M_0, in the order of problems that all runs share.

    {results}/{stage}/{difficulty}/{name}/seed_{n}.json
    {results}/initial/{difficulty}/seed_{n}.json

What a solution or a set of samples gave is kept a character a problem, so that any two runs of a difficulty can be
compared problem by problem.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..atomic import replacing
from ..errors import RunError
from ..rollout import Rollout

VERSION = 1
INITIAL = "initial"
STAGES = ("search", "main", "ablations")
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def greedy_record(solutions: Sequence[Rollout]) -> dict[str, Any]:
    """One greedy solution a problem, judged (step_labels), as the file has it.

    right: 1 or 0 a problem. first_error: the number of the first wrong step, from 1, 0 where there is none. steps: how
    many there are. Both in base 36, the last digit standing for everything beyond. tokens: mean completion length.
    """
    return {
        "right": "".join(str(int(r.label)) for r in solutions),
        "first_error": "".join(digit(first_error(r.step_labels)) for r in solutions),
        "steps": "".join(digit(len(r.step_labels)) for r in solutions),
        "tokens": sum(len(r.completion_ids) for r in solutions) / len(solutions),
    }


def samples_record(right: Sequence[int], majority: Sequence[bool], k: int) -> dict[str, Any]:
    """k samples a problem: how many are right (base 36), and whether the majority's answer is."""
    return {
        "k": k,
        "samples_right": "".join(map(digit, right)),
        "majority_right": "".join(str(int(hit)) for hit in majority),
    }


def first_error(step_labels: Sequence[int]) -> int:
    """The number of the first wrong step, from 1; 0 where none is wrong."""
    return step_labels.index(0) + 1 if 0 in step_labels else 0


def digit(number: int) -> str:
    return DIGITS[min(number, len(DIGITS) - 1)]


def write_result(result: dict[str, Any], path: Path) -> None:
    """Writes a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps({"version": VERSION} | result, indent=1, allow_nan=False) + "\n", "utf-8")


def load(folder: Path) -> list[dict]:
    """The results below `folder`, checked, in the order of their names; each with its `file`.

    M_0's own evaluations are of stage `initial`. Raises RunError, which names the file, for one that is damaged, of
    another version, not where it belongs, or of other problems than those of its stage and difficulty.
    """
    found: list[dict] = []
    problems: dict[tuple, tuple[int, Path]] = {}
    for path in sorted(folder.rglob("seed_*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            _check(record, path.relative_to(folder).with_suffix("").parts)
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise RunError(f"{path} is no result of the study: {reason}. Delete it and run the study again") from error
        for name, greedy in _evaluations(record):
            kind = "validation" if record["stage"] == "search" else name
            count = len(greedy["right"])
            expected, first = problems.setdefault((kind, record["difficulty"]), (count, path))
            if count != expected:
                raise RunError(
                    f"{path} has {count} {kind} problems, {first} has {expected}: delete the one that is of another "
                    "study and run the study again"
                )
        found.append(record | {"file": str(path)})
    return found


def _check(record: Any, place: tuple[str, ...]) -> None:
    if not isinstance(record, dict):
        raise ValueError("it holds no JSON object")
    if record.get("version") != VERSION:
        raise ValueError(f"its version is {record.get('version')!r}, not {VERSION}")
    if "stage" not in record:
        record |= {"stage": INITIAL, "name": INITIAL}
    names = [record["stage"], record["difficulty"], record["name"], f"seed_{record['seed']}"]
    if record["stage"] == INITIAL:
        del names[2]
    elif record["stage"] not in STAGES:
        raise ValueError(f"stage {record['stage']!r} is none of {', '.join(STAGES)}")
    if tuple(map(str, names)) != place:
        raise ValueError(f"it says that it is {'/'.join(map(str, names))}")
    str(record["weights" if record["stage"] == INITIAL else "initial_weights"])
    if record["stage"] != INITIAL:
        if not isinstance(record["overrides"], dict) or not isinstance(record["rollouts"], list):
            raise ValueError("its overrides are no object, or its rollouts no list")
        if not record["greedy"] and "failed" not in record:
            raise ValueError("it has no evaluation")
        float(record["cpu_seconds"])
        if len(record["iterations"]) != len(record["greedy"]):
            raise ValueError(f"{len(record['iterations'])} iterations with {len(record['greedy'])} evaluations")
    if not isinstance(record["recipe"], dict):
        raise ValueError("its recipe is no object")
    for _, greedy in _evaluations(record):
        _check_greedy(greedy)
    for samples in sampled(record).values():
        _check_samples(samples)


def _evaluations(record: dict) -> list[tuple[str, dict]]:
    """The greedy evaluations of a result, each with which problems it is of."""
    of_samples = [(name, samples["greedy"]) for name, samples in sampled(record).items()]
    return [*(("test", greedy) for greedy in record.get("greedy", [])), *of_samples]


def sampled(record: dict) -> dict[str, dict]:
    """The evaluations of a result that have samples, by the problems they are of."""
    holder = record if record["stage"] == INITIAL else record.get("final", {})
    return {name: holder[name] for name in ("test", "shifted") if name in holder or record["stage"] == INITIAL}


def _check_greedy(greedy: dict) -> None:
    right, first, steps = (digits(greedy[key]) for key in ("right", "first_error", "steps"))
    if not 0 < len(right) == len(first) == len(steps):
        raise ValueError(f"an evaluation of {len(right)}, {len(first)} and {len(steps)} problems")
    if (right > 1).any() or (first > steps).any():
        raise ValueError("an evaluation with a digit that is out of range")
    float(greedy["tokens"])


def _check_samples(samples: dict) -> None:
    problems, k = len(samples["greedy"]["right"]), samples["k"]
    right, majority = digits(samples["samples_right"]), digits(samples["majority_right"])
    if not len(right) == len(majority) == problems:
        raise ValueError(f"samples of {len(right)} and {len(majority)} problems, not {problems}")
    if (right > k).any() or (majority > 1).any():
        raise ValueError("samples with a digit that is out of range")


def counting(records: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """The results that count, M_0's own among them; and those that do not, since the M_0 of their seed is another one
    by now: runs are compared from the same M_0 alone."""
    initial = {(r["difficulty"], r["seed"]): r["weights"] for r in records if r["stage"] == INITIAL}
    counts: list[dict] = []
    stale: list[dict] = []
    for r in records:
        same = r["stage"] == INITIAL or initial.get((r["difficulty"], r["seed"])) == r["initial_weights"]
        (counts if same else stale).append(r)
    return counts, stale


def digits(text: str) -> NDArray[np.int64]:
    """One base-36 digit a problem as numbers: (problems,)."""
    return np.array([int(x, 36) for x in text], dtype=np.int64)
