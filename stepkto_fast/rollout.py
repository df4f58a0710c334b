"""A rollout: one sampled completion with everything the update, the report and a reader may ask of it.

Rollouts are stored as one parquet file an iteration; reading one back gives the same numbers to the last bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .atomic import replacing
from .errors import RunError

UNLABELLED = -1
ROWS = 4096  # of a row group: what is held twice while a file is written


@dataclass
class Rollout:
    """One completion. Token lists are in token order; `step_*` lists have one entry a step.

    step_ends: token counts at which the steps end (a partition of completion_ids).
    label: outcome. step_labels: what training sees (1, 0, -1 unlabelled); checker_labels: what the exact checker
    says (-1 where the task has none), for audits only (unless it is the label source). step_probs: the PRM head's
    probability of "right".
    step_values: the share of right ones among continuations from the end of each step (empty where none were sampled).
    answer: the final answer as found in the completion. verified: whether the outcome is known; an answer that could
    not be compared has label False and verified False.
    logps: the sampler's log-probs of the tokens, ref_logps: the trainer's, of the reference, in nats.
    importance: weights of the tokens' gradients (empty: 1 for all).
    """

    problem_id: int
    sample: int
    prompt: str
    prompt_ids: list[int]
    completion: str
    completion_ids: list[int]
    logps: list[float]
    finished: bool
    steps: list[str] = field(default_factory=list)
    step_ends: list[int] = field(default_factory=list)
    label: bool = False
    step_labels: list[int] = field(default_factory=list)
    step_probs: list[float] = field(default_factory=list)
    checker_labels: list[int] = field(default_factory=list)
    ref_logps: list[float] = field(default_factory=list)
    step_values: list[float] = field(default_factory=list)
    verified: bool = True
    answer: str | None = None
    importance: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """Tokens that go through the trunk: prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


_TEXTS, _INTS, _FLOATS = pa.list_(pa.string()), pa.list_(pa.int32()), pa.list_(pa.float32())
SCHEMA = pa.schema(
    {
        "problem_id": pa.int64(), "sample": pa.int32(), "prompt": pa.string(), "prompt_ids": _INTS,
        "completion": pa.string(), "completion_ids": _INTS, "logps": _FLOATS, "finished": pa.bool_(),
        "steps": _TEXTS, "step_ends": _INTS, "label": pa.bool_(), "step_labels": pa.list_(pa.int8()),
        "step_probs": _FLOATS, "checker_labels": pa.list_(pa.int8()), "ref_logps": _FLOATS,
        "step_values": _FLOATS, "verified": pa.bool_(), "answer": pa.string(),
        "importance": _FLOATS,
    }
)  # fmt: skip
assert SCHEMA.names == [f.name for f in fields(Rollout)]


def write_rollouts(rollouts: Sequence[Rollout], path: Path) -> None:
    """Writes `rollouts` to a parquet file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, pq.ParquetWriter(unfinished, SCHEMA, write_page_checksum=True) as writer:
        for start in range(0, len(rollouts), ROWS):
            writer.write_table(rollouts_table(rollouts[start : start + ROWS]))


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a parquet file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        pq.write_table(table, unfinished, write_page_checksum=True)


def read_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of a file written by `write_rollouts`; RunError when it cannot be read."""
    try:
        table = pq.read_table(path, schema=SCHEMA, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise RunError(
            f"cannot read the rollouts in {path}: {error}; delete the file, and the checkpoints of this iteration's "
            "update (checkpoints/iteration_*_step_*), to sample them again"
        ) from error
    return rollouts_of(table)


def rollouts_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """One row a rollout, of `SCHEMA`."""
    return pa.Table.from_pylist([vars(r) for r in rollouts], schema=SCHEMA)


def rollouts_of(table: pa.Table) -> list[Rollout]:
    """The rollouts of a table of `SCHEMA`."""
    return [Rollout(**row) for row in table.to_pylist()]
