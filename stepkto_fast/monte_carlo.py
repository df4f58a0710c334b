"""Monte-Carlo step labels: a step is worth what the policy can still make of it.

From the end of each step the policy continues K times. The step's value is the share of these continuations whose
whole completion has the right answer; hard labels call a step right when any of them has, soft labels when a share of
`mc_threshold` has (Wang et al. 2024, Math-Shepherd, arXiv 2312.08935, hard and soft estimation). Where continuations
and a PRM head disagree, `consensus` leaves the step unlabelled (Zhang et al. 2025, arXiv 2501.07301).

The end of a finished completion leaves nothing to continue: the last step's value is the rollout's own outcome. So it
is where a truncated rollout has no token left to spend and yet its answer; without one the step that was cut off stays
unlabelled. A step that ends beyond max_completion_length with more
behind it, which only completions from elsewhere have, cannot be tried and stays unlabelled.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from . import ranks
from .answers import Verdict
from .rollout import UNLABELLED, Rollout
from .sampler import Sampler, no_progress
from .sampling_shards import Shard, digest, keep_shard, over_ranks, shard_seed

CHUNK = 2048  # continuations that an interrupted run may have to sample again
# (problem ids, completions, whether they finished) -> a verdict each
Judge = Callable[[Sequence[int], Sequence[str], Sequence[bool]], Sequence[Verdict]]


class Settings(Protocol):
    """What this module reads of a recipe."""

    @property
    def mc_continuations(self) -> int: ...
    @property
    def mc_labels(self) -> str: ...
    @property
    def mc_threshold(self) -> float: ...
    @property
    def mc_temperature(self) -> float: ...
    @property
    def max_completion_length(self) -> int: ...


@dataclass(frozen=True)
class Prefix:
    """A completion up to the end of a step, the tokens that may follow, and the (rollout, step) pairs that share it."""

    problem_id: int
    prompt_ids: list[int]
    completion_ids: list[int]
    room: int
    places: list[tuple[int, int]]


@dataclass(frozen=True)
class Cost:
    """What sampling will take. steps: those to continue from; prefixes: different ones among them, each sampled once.

    tokens_expected takes each continuation to be as long as what follows the step in the rollouts themselves;
    tokens_at_most takes it to the limit. seconds: for the expected tokens, None without a rate.
    """

    steps: int
    prefixes: int
    continuations: int
    tokens_expected: int
    tokens_at_most: int
    seconds: float | None

    def text(self) -> str:
        """One line for the terminal."""
        line = (
            f"continuing from {self.prefixes:,} different ends of steps ({self.steps:,} in all): "
            f"{self.continuations:,} continuations, about {self.tokens_expected:,} tokens, "
            f"at most {self.tokens_at_most:,}"
        )
        return line if self.seconds is None else f"{line}; about {_duration(self.seconds)}"


@dataclass
class Work:
    """What `monte_carlo_values` did, in a resumed run as in an undisturbed one but for the last two fields.

    tokens: sampled ones. unverified: continuations whose outcome is not known. unlabelled: steps without a value.
    reused: chunks read from earlier work. damaged: chunk files that were of no use and were sampled again.
    """

    continuations: int = 0
    tokens: int = 0
    unverified: int = 0
    unlabelled: int = 0
    reused: int = 0
    damaged: int = 0


def estimate_cost(rollouts: Sequence[Rollout], settings: Settings, *, tokens_per_second: float | None = None) -> Cost:
    """What labelling the steps of `rollouts` takes; `tokens_per_second`: the rate at which the engine samples."""
    k = settings.mc_continuations
    steps, prefixes, expected, most = 0, 0, 0.0, 0
    for p in _prefixes(rollouts, settings):
        steps += len(p.places)
        prefixes += 1
        behind = [len(rollouts[place].completion_ids) - len(p.completion_ids) for place, _ in p.places]
        expected += k * min(sum(behind) / len(behind), p.room)
        most += k * p.room
    seconds = expected / tokens_per_second if tokens_per_second else None
    return Cost(steps, prefixes, k * prefixes, round(expected), most, seconds)


def monte_carlo_values(
    rollouts: Sequence[Rollout], sampler: Sampler, judge: Judge, tokenizer: PreTrainedTokenizerBase,
    settings: Settings, *, seed: int, folder: Path, weights: str = "",
    on_progress: Callable[[int, int], None] = no_progress,
) -> Work:  # fmt: skip
    """Fills `step_values` of each rollout: the share of right continuations of each step, nan where none is known.

    Continuations are sampled in chunks of whole problems, each with a seed of its own and kept in `folder`, so that an
    interrupted call can be repeated, with the same values in the end to the last bit. A chunk file that is damaged, or
    of other rollouts, settings, weights or another seed, is sampled again. `sampler` must hold the policy that
    `weights` stands for (`weights_digest`; may be empty where `folder` is for one policy alone). Chunks are shared out
    among ranks. `on_progress(done, total)` counts the continuations of this rank.
    """
    for r in rollouts:
        r.step_values = _values_without_sampling(r)
    own = islice(_chunks(_prefixes(rollouts, settings), settings), ranks.rank(), None, ranks.size())
    total, done = settings.mc_continuations * sum(map(len, own)), 0

    def work_on(number: int, prefixes: list[Prefix]) -> tuple[list[list[tuple[int, int]]], Shard[list[_Counts]]]:
        nonlocal done
        chunk_seed = shard_seed(seed, number)
        chunk = keep_shard(
            folder / f"chunk_{number}.parquet", _digest(prefixes, settings, chunk_seed, weights), _SCHEMA,
            make=lambda: _sample_chunk(
                prefixes, sampler, judge, tokenizer, settings, chunk_seed, lambda n, _: on_progress(done + n, total)
            ),
            to_table=lambda counts: _table(prefixes, rollouts, counts),
            from_table=lambda table: _counts_of(table, prefixes, settings),
        )  # fmt: skip
        done += settings.mc_continuations * len(prefixes)
        on_progress(done, total)
        return [p.places for p in prefixes], chunk

    work = Work()
    for places, chunk in over_ranks(_chunks(_prefixes(rollouts, settings), settings), work_on):
        work.reused += chunk.reused
        work.damaged += chunk.damaged
        for shared, c in zip(places, chunk.value, strict=True):
            for place, step in shared:
                rollouts[place].step_values[step] = c.right / c.verified if c.verified else math.nan
            work.continuations += c.total
            work.tokens += c.tokens
            work.unverified += c.total - c.verified
    work.unlabelled = sum(math.isnan(value) for r in rollouts for value in r.step_values)
    return work


def labels_of(values: Sequence[float], settings: Settings) -> list[int]:
    """A label for each value: 1 right, 0 wrong, -1 (unlabelled) for nan.

    mc_labels hard: right when any continuation was; soft: when a share of at least mc_threshold was.
    """
    if settings.mc_labels == "hard":
        return [UNLABELLED if math.isnan(v) else int(v > 0) for v in values]
    # Values come back from a rollouts file rounded to fp32: a share that is the threshold must stay at it.
    return [UNLABELLED if math.isnan(v) else int(v >= settings.mc_threshold - 1e-6) for v in values]


def consensus(mc_labels: Sequence[int], head_labels: Sequence[int]) -> list[int]:
    """The label where both sources have the same one, -1 (unlabelled) elsewhere; ValueError for unequal lengths."""
    return [a if a == b else UNLABELLED for a, b in zip(mc_labels, head_labels, strict=True)]


def agreement(mc_labels: Sequence[int], head_labels: Sequence[int]) -> dict:
    """How far the two sources agree; ValueError for unequal lengths.

    kept: share of all steps that `consensus` labels. kappa: Cohen's (1960), over the steps that both label. Then counts
    of steps. Shares that are not defined (no step; one class only) are None.
    """
    pairs = list(zip(mc_labels, head_labels, strict=True))
    both_right, both_wrong = pairs.count((1, 1)), pairs.count((0, 0))
    only_mc, only_head = pairs.count((1, 0)), pairs.count((0, 1))
    n = both_right + both_wrong + only_mc + only_head
    # n^2 times the agreement to be expected of independent sources with these shares of right steps
    chance = (both_right + only_mc) * (both_right + only_head) + (both_wrong + only_mc) * (both_wrong + only_head)
    return {
        "kept": (both_right + both_wrong) / len(pairs) if pairs else None,
        "kappa": (n * (both_right + both_wrong) - chance) / (n * n - chance) if n * n > chance else None,
        "both_right": both_right,
        "both_wrong": both_wrong,
        "only_monte_carlo_right": only_mc,
        "only_head_right": only_head,
        "unlabelled": len(pairs) - n,
    }


# ---- what is to be sampled ----


def _values_without_sampling(r: Rollout) -> list[float]:
    """nan for each step but the last, which has the rollout's own outcome; what was cut off is not wrong for that."""
    own = float(r.label) if r.verified and (r.finished or r.label) else math.nan
    return [*([math.nan] * (len(r.step_ends) - 1)), own][: len(r.step_ends)]


def _prefixes(rollouts: Sequence[Rollout], settings: Settings) -> Iterator[Prefix]:
    """The different prefixes to continue from, problem by problem, each directly before those that begin with it."""
    problems: dict[int, list[int]] = {}
    for place, r in enumerate(rollouts):
        problems.setdefault(r.problem_id, []).append(place)
    for problem_id, members in problems.items():
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
        for place in members:
            r = rollouts[place]
            for step, end in enumerate(r.step_ends[:-1] if r.finished else r.step_ends):
                if end < settings.max_completion_length:
                    key = tuple(r.prompt_ids), tuple(r.completion_ids[:end])
                    found.setdefault(key, []).append((place, step))
        for prompt, completion in sorted(found):
            room = settings.max_completion_length - len(completion)
            yield Prefix(problem_id, list(prompt), list(completion), room, found[prompt, completion])


def _chunks(prefixes: Iterator[Prefix], settings: Settings) -> Iterator[list[Prefix]]:
    """Whole problems, together at most CHUNK continuations; a problem with more is a chunk of its own."""
    chunk: list[Prefix] = []
    problem: list[Prefix] = []
    for p in prefixes:
        if problem and p.problem_id != problem[0].problem_id:
            chunk, problem = [*chunk, *problem], []
        if chunk and (len(chunk) + len(problem) + 1) * settings.mc_continuations > CHUNK:
            yield chunk
            chunk = []
        problem.append(p)
    if chunk or problem:
        yield [*chunk, *problem]


# ---- one chunk ----


@dataclass(frozen=True)
class _Counts:
    """Of the continuations of one prefix: right ones, ones whose outcome is known, all; and their tokens."""

    right: int
    verified: int
    total: int
    tokens: int


def _sample_chunk(
    prefixes: Sequence[Prefix], sampler: Sampler, judge: Judge, tokenizer: PreTrainedTokenizerBase,
    settings: Settings, seed: int, on_progress: Callable[[int, int], None],
) -> list[_Counts]:  # fmt: skip
    drawn = sampler.sample(
        [p.prompt_ids + p.completion_ids for p in prefixes], n=settings.mc_continuations,
        temperature=settings.mc_temperature, max_tokens=[p.room for p in prefixes], seed=seed, on_progress=on_progress,
    )  # fmt: skip
    every = [(p, s) for p, samples in zip(prefixes, drawn, strict=True) for s in samples]
    whole = [p.completion_ids + s.token_ids for p, s in every]
    # Decoded as one: pieces decoded apart lose spaces and characters at their seams.
    texts = tokenizer.batch_decode(
        [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in whole], skip_special_tokens=False
    )
    verdicts = judge([p.problem_id for p, _ in every], texts, [s.finished for _, s in every])
    if len(verdicts) != len(every):
        raise ValueError(f"the judge gave {len(verdicts)} verdicts on {len(every)} completions")
    counts = []
    for k, samples in enumerate(drawn):
        own = verdicts[k * len(samples) : (k + 1) * len(samples)]
        right, verified = sum(v.right and v.verified for v in own), sum(v.verified for v in own)
        counts.append(_Counts(right, verified, len(own), sum(len(s.token_ids) for s in samples)))
    return counts


_SCHEMA = pa.schema(
    {
        "problem_id": pa.int64(), "rollout": pa.int64(), "sample": pa.int32(), "step": pa.int32(),
        "right": pa.int32(), "verified": pa.int32(), "total": pa.int32(), "tokens": pa.int64(),
    }
)  # fmt: skip


def _digest(prefixes: Sequence[Prefix], settings: Settings, seed: int, weights: str) -> str:
    """Of everything that decides what is sampled."""
    drawn = settings.mc_continuations, settings.mc_temperature, settings.max_completion_length, seed, weights
    return digest([drawn, *((p.problem_id, p.prompt_ids, p.completion_ids, p.places) for p in prefixes)])


def _table(prefixes: Sequence[Prefix], rollouts: Sequence[Rollout], counts: Sequence[_Counts]) -> pa.Table:
    """One row a prefix, named by the first (rollout, step) that has it."""
    rows = []
    for p, c in zip(prefixes, counts, strict=True):
        place, step = p.places[0]
        rows.append(
            {"problem_id": p.problem_id, "rollout": place, "sample": rollouts[place].sample, "step": step, **vars(c)}
        )
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _counts_of(table: pa.Table, prefixes: Sequence[Prefix], settings: Settings) -> list[_Counts] | None:
    """The counts of a finished chunk; None where the table is not what `_table` would give for these prefixes."""
    rows = table.to_pylist()
    if [(row["rollout"], row["step"]) for row in rows] != [p.places[0] for p in prefixes]:
        return None
    if any(None in row.values() for row in rows):
        return None
    counts = [_Counts(row["right"], row["verified"], row["total"], row["tokens"]) for row in rows]
    whole = all(0 <= c.right <= c.verified <= c.total == settings.mc_continuations <= c.tokens for c in counts)
    return counts if whole else None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
