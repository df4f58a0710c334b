"""Packing: completions of any length side by side in one row of tokens, with no padding anywhere.

Only rows that predict a completion token reach the LM head; prompts go through the trunk alone.
"""

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, fields, replace
from itertools import accumulate, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from .rollout import Rollout

Item = TypeVar("Item", bound=Sized)


@dataclass
class PackedBatch:
    """B completions in T trunk tokens, N of them scored, in S steps.

    input_ids, position_ids (1, T) int64 and cu_trunk (B + 1,) int32: the trunk's row; lengths: B ints.
    rows (N,) int64: which trunk positions predict the scored tokens; target (N,) int64: those tokens.
    cu_seqlens (B + 1,), cu_steps (S + 1,) int32: boundaries over the N rows. labels (B,) bool; step_labels (S,) int8.
    ref_logp (N,) fp32: the reference's log-probs in nats (zeros where the rollouts carry none).
    importance (N,) fp32: weights of the tokens' gradients; None where no rollout carries any.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_trunk: Tensor
    rows: Tensor
    target: Tensor
    cu_seqlens: Tensor
    cu_steps: Tensor
    labels: Tensor
    step_labels: Tensor
    ref_logp: Tensor
    lengths: list[int]
    importance: Tensor | None = None

    @property
    def model_inputs(self) -> dict:
        """Keyword arguments of a decoder's forward."""
        return {
            "input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False,
            "cu_seq_lens_q": self.cu_trunk, "cu_seq_lens_k": self.cu_trunk, "lengths": self.lengths,
            "max_length_q": max(self.lengths), "max_length_k": max(self.lengths),
        }  # fmt: skip

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        entries = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in entries.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def pack(rollouts: Sequence[Rollout]) -> PackedBatch:
    """One packed batch of all `rollouts`, in their order. Each needs a prompt token, a completion token and a step.

    Raises ValueError naming the first rollout that lacks one, or whose steps do not partition its completion.
    """
    for index, r in enumerate(rollouts):
        if not r.prompt_ids or not r.completion_ids or not r.step_ends or r.step_ends[-1] != len(r.completion_ids):
            raise ValueError(
                f"rollouts[{index}] (problem {r.problem_id}, sample {r.sample}) has {len(r.prompt_ids)} prompt and "
                f"{len(r.completion_ids)} completion tokens and step ends {r.step_ends}: each completion needs a "
                "prompt, at least one token, and steps that end with it"
            )
    lengths = [len(r) for r in rollouts]
    starts = [0, *accumulate(lengths)]
    scored = [0, *accumulate(len(r.completion_ids) for r in rollouts)]
    int64, int32 = torch.int64, torch.int32
    return PackedBatch(
        input_ids=torch.tensor([t for r in rollouts for t in (*r.prompt_ids, *r.completion_ids)], dtype=int64)[None],
        position_ids=torch.tensor([n for length in lengths for n in range(length)], dtype=int64)[None],
        cu_trunk=torch.tensor(starts, dtype=int32),
        # Position p - 1 (the prompt's last) predicts the first completion token; the last token predicts nothing.
        rows=torch.tensor(
            [
                n
                for start, r in zip(starts, rollouts, strict=False)
                for n in range(start + len(r.prompt_ids) - 1, start + len(r) - 1)
            ],
            dtype=int64,
        ),
        target=torch.tensor([t for r in rollouts for t in r.completion_ids], dtype=int64),
        cu_seqlens=torch.tensor(scored, dtype=int32),
        cu_steps=torch.tensor(
            [0, *(s + e for s, r in zip(scored, rollouts, strict=False) for e in r.step_ends)], dtype=int32
        ),
        labels=torch.tensor([r.label for r in rollouts], dtype=torch.bool),
        step_labels=torch.tensor(
            [x for r in rollouts for x in (r.step_labels or [-1] * len(r.step_ends))], dtype=torch.int8
        ),
        ref_logp=torch.tensor([x for r in rollouts for x in (r.ref_logps or [0.0] * len(r.completion_ids))]),
        lengths=lengths,
        importance=_importance(rollouts),
    )


def _importance(rollouts: Sequence[Rollout]) -> Tensor | None:
    if not any(r.importance for r in rollouts):
        return None
    return torch.tensor([w for r in rollouts for w in (r.importance or [1.0] * len(r.completion_ids))])


def micro_batches(rollouts: Sequence[Item], max_tokens: int) -> Iterator[list[Item]]:
    """Runs of `rollouts` (or of other things with a length in trunk tokens), in order, of at most `max_tokens` trunk
    tokens each (a longer one goes alone)."""
    run: list[Item] = []
    total = 0
    for rollout in rollouts:
        if run and total + len(rollout) > max_tokens:
            yield run
            run, total = [], 0
        run.append(rollout)
        total += len(rollout)
    if run:
        yield run


def split_over_ranks(rollouts: Sequence[Sized], ranks: int) -> list[list[int]]:
    """The indices of each rank's rollouts, ascending, balanced by trunk tokens; the same on every rank.

    The longest first, each to the rank with the fewest tokens so far (of several such, the one with the fewest
    rollouts, then the first). The fullest rank then has at most 4/3 - 1/(3 * ranks) times the tokens that the best
    split would give its fullest (Graham 1969, Bounds on multiprocessing timing anomalies), and no two ranks differ by
    more tokens than the longest rollout has.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(rollouts)), key=lambda k: (-len(rollouts[k]), k)):
        least = min(range(ranks), key=lambda rank: (tokens[rank], len(shares[rank]), rank))
        shares[least].append(index)
        tokens[least] += len(rollouts[index])
    return [sorted(share) for share in shares]


def micro_batches_of_ranks(rollouts: Sequence[Sized], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """For each rank its micro-batches, as indices of `rollouts`: its share of `split_over_ranks`, cut by `max_tokens`.

    Every rank has as many as the others, so that their collectives match; the missing ones are empty.
    """
    groups = []
    for share in split_over_ranks(rollouts, ranks):
        rest = iter(share)
        sizes = [len(run) for run in micro_batches([rollouts[index] for index in share], max_tokens)]
        groups.append([list(islice(rest, count)) for count in sizes])
    most = max(map(len, groups))
    return [own + [[]] * (most - len(own)) for own in groups]
