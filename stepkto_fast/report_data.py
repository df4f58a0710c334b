"""What a run directory says, checked and typed, for `stepkto_fast.report`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from .errors import RunError

SOLUTION = pa.schema(
    {
        "problem_id": pa.int64(),
        "prompt": pa.string(),
        "answer": pa.string(),
        "steps": pa.list_(pa.string()),
        "label": pa.bool_(),
        "step_labels": pa.list_(pa.int8()),
        "step_probs": pa.list_(pa.float32()),
    }
)


@dataclass(frozen=True)
class Solution:
    """One greedy completion of a held-out problem with verdicts on its steps; None where nobody judged a step.

    `probabilities` holds the PRM head's probability, in [0, 1], that each step is right; None where it did not score.
    """

    problem_id: int
    prompt: str
    answer: str
    steps: tuple[str, ...]
    right: bool
    step_right: tuple[bool | None, ...]
    probabilities: tuple[float | None, ...]

    @property
    def state(self) -> str:
        """`clean` (right, no step found wrong), `flawed` (right, with a wrong step) or `wrong` (wrong answer)."""
        if not self.right:
            return "wrong"
        return "flawed" if False in self.step_right else "clean"


@dataclass(frozen=True)
class Run:
    """A run directory as read. An absent optional file leaves its field None or empty.

    `training` has one record for each optimizer step, ascending; `solutions` maps an iteration to its held-out
    completions, the same problems in the same order for each; `truncated_lines` is 1 when the last line of
    metrics.jsonl is cut off, as in a run that was stopped, and was left out.
    """

    summary: dict[str, Any]
    iterations: list[dict[str, Any]]
    training: list[dict[str, Any]]
    solutions: dict[int, list[Solution]]
    config: str | None
    truncated_lines: int
    summary_path: Path
    metrics_path: Path

    def rates(self, key: str) -> list[float | None]:
        """The values of `key` by iteration, M_0 first; None where undefined. Raises RunError on a non-number."""
        return [number(r, key, f"{self.summary_path}, iterations[{i}]") for i, r in enumerate(self.iterations)]


def number(record: Mapping[str, Any], key: str, where: str) -> float | None:
    """`record[key]` as a float; None when absent, null or not finite. Raises RunError on anything else."""
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RunError(f"{where}: {key!r} is {value!r}, not a number; write a number, or null where undefined")
    return float(value) if math.isfinite(value) else None


def mapping(record: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """`record[key]` as a JSON object; empty when absent or null. Raises RunError on anything else."""
    value = record.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RunError(f"{where}: {key!r} is {value!r}, not a JSON object; write an object, or leave the key out")
    return value


def read_run(run_dir: str | Path) -> Run:
    """Read a run directory.

    Only `summary.json` must exist. Raises RunError naming the file, the row or key, and the remedy when a file that
    does exist cannot be understood.
    """
    root = Path(run_dir)
    summary_path = root / "summary.json"
    summary, iterations = _summary(summary_path)
    training, truncated = _training(root / "metrics.jsonl")
    config_path = root / "config.yaml"
    return Run(
        summary=summary,
        iterations=iterations,
        training=training,
        solutions=_evaluations(root / "evaluations", [r["iteration"] for r in iterations]),
        config=config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else None,
        truncated_lines=truncated,
        summary_path=summary_path,
        metrics_path=root / "metrics.jsonl",
    )


def _summary(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not path.is_file():
        raise RunError(f"{path} does not exist; give the directory of a run that has finished at least M_0")
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}); restore it or run the training again") from error
    iterations = summary.get("iterations") if isinstance(summary, dict) else None
    if not isinstance(iterations, list) or not iterations:
        raise RunError(f"{path}: 'iterations' must be a list with at least M_0; run the training again")
    for index, record in enumerate(iterations):
        iteration = record.get("iteration") if isinstance(record, dict) else None
        if isinstance(iteration, bool) or not isinstance(iteration, int) or iteration < 0:
            raise RunError(f"{path}, iterations[{index}]: 'iteration' must be 0, 1, ...; got {iteration!r}; set it")
    return summary, sorted(iterations, key=lambda record: record["iteration"])


def _training(path: Path) -> tuple[list[dict[str, Any]], int]:
    if not path.is_file():
        return [], 0
    lines = [(row, line) for row, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    by_step: dict[int, dict[str, Any]] = {}
    for position, (row, line) in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError as error:
            if position == len(lines) - 1:
                return [by_step[step] for step in sorted(by_step)], 1
            raise RunError(f"{path}, line {row} is not JSON ({error}); delete that line") from error
        if not isinstance(record, dict) or "loss" not in record:
            continue
        if not isinstance(record.get("step"), int) or not isinstance(record.get("iteration"), int):
            raise RunError(f"{path}, line {row}: a line with 'loss' needs whole 'step' and 'iteration'; delete it")
        by_step[record["step"]] = record  # of a step that was written again, the later line counts
    return [by_step[step] for step in sorted(by_step)], 0


def _evaluations(folder: Path, iterations: list[int]) -> dict[int, list[Solution]]:
    solutions: dict[int, list[Solution]] = {}
    for iteration in iterations:
        path = folder / f"iteration_{iteration}.parquet"
        if not path.is_file():
            continue
        rows = _solutions(path)
        for first in list(solutions.values())[:1]:
            if [s.problem_id for s in rows] != [s.problem_id for s in first]:
                raise RunError(f"{path}: its 'problem_id's are not those of the first file; delete one of the two")
        if rows:
            solutions[iteration] = rows
    return solutions


def _solutions(path: Path) -> list[Solution]:
    try:
        names = pyarrow.parquet.read_schema(path).names
        if missing := [column for column in SOLUTION.names if column not in names]:
            raise RunError(f"{path}: no column {missing[0]!r}; delete the file to leave its solutions out")
        records = pyarrow.parquet.read_table(path, columns=SOLUTION.names).cast(SOLUTION).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}); delete it to leave its solutions out") from error
    return [_solution(record, f"{path}, row {row}") for row, record in enumerate(records)]


def _solution(record: dict[str, Any], where: str) -> Solution:
    steps, labels, probabilities = record["steps"], record["step_labels"], record["step_probs"]
    for key in ("problem_id", "steps", "label", "step_labels"):
        if record[key] is None:
            raise RunError(f"{where}: {key!r} is null; delete the file to leave its solutions out")
    if probabilities is None:
        probabilities = [None] * len(steps)
    if not len(steps) == len(labels) == len(probabilities):
        raise RunError(
            f"{where}: {len(steps)} 'steps', {len(labels)} 'step_labels' and {len(probabilities)} 'step_probs'; "
            "they must have one length; delete the file to leave its solutions out"
        )
    return Solution(
        problem_id=record["problem_id"],
        prompt=record["prompt"] or "",
        answer=record["answer"] or "",
        steps=tuple(step or "" for step in steps),
        right=bool(record["label"]),
        step_right=tuple(None if label is None or label < 0 else label == 1 for label in labels),
        probabilities=tuple(p if p is not None and math.isfinite(p) else None for p in probabilities),
    )
