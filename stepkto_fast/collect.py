"""Sampling turned into rollouts: completions with their outcome, their steps, their labels and reference log-probs."""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import ranks
from .errors import RunError
from .objective import log_probs
from .recipe import Recipe
from .rollout import SCHEMA, Rollout, rollouts_of, rollouts_table
from .sampler import Sampler, context_length, no_progress, sync_tolerance
from .sampling_shards import Shard, digest, keep_shard, over_ranks, shard_seed
from .segmentation import step_ends, step_style, step_texts
from .task import Task

SHARD = 512  # prompts of a shard where the recipe does not say


@dataclass(frozen=True)
class Asked:
    """A problem with its prompt as tokens."""

    problem_id: int
    problem: Any  # as the task has it
    prompt: str
    prompt_ids: list[int]


def ask(
    task: Task,
    problems: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    recipe: Recipe,
) -> tuple[list[Asked], list[str]]:
    """Problems with tokenised prompts, and what was wrong with those left out: too long, or with unknown words.

    Raises RunError when none is left.
    """
    longest = context_length(recipe, model)
    room = longest - recipe.max_completion_length
    asked, complaints = [], []
    for n, problem in enumerate(problems):
        text, ids = task.prompt(problem, tokenizer)
        if len(ids) > room:
            complaints.append(
                f"prompt {n}, {task.place(problem)}: {len(ids)} tokens, context_length "
                f"{recipe.context_length} (the model's: {model.config.max_position_embeddings}) and "
                f"max_completion_length {recipe.max_completion_length} leave {room}; "
                "lower the latter or raise the former"
            )
        elif tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            complaints.append(
                f"prompt {n}, {task.place(problem)}: has words that the model's tokenizer does not know; "
                "give a model trained on such prompts"
            )
        else:
            asked.append(Asked(n, problem, text, ids))
    if not asked:
        raise RunError(f"no prompt of {len(problems)} can be used; first complaint: {complaints[0]}")
    return asked, complaints


def shard_size(recipe: Recipe, prompts: int) -> int:
    """How many prompts are sampled, judged and stored together; at most so many that every rank has some."""
    return recipe.rollout_shard_size or max(1, min(SHARD, math.ceil(prompts / ranks.size())))


def sample_rollouts(
    sampler: Sampler, task: Task, asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *,
    n: int, temperature: float, seed: int, on_progress: Callable[[int, int], None] = no_progress,
    folder: Path | None = None, weights: str = "", say: Callable[[str], None] = lambda text: None,
) -> list[Rollout]:  # fmt: skip
    """n completions of each problem, segmented, judged by the task (label, verified, answer, checker_labels).

    Prompts are sampled in shards (`shard_size`), each with a seed of its own where there are several, and shared out
    among ranks; every rank returns all rollouts, in the problems' order. With a `folder` each shard is stored there
    once it is judged, and read back by a call that is repeated, with the same rollouts to the last bit. A shard file
    that is damaged, or of other problems, settings, weights or another seed, is sampled again, and `say` is told.
    `weights` stands for the policy that the sampler holds (`weights_digest`). `on_progress(done, total)` counts the
    samples of this rank.
    """
    jobs = _shard_jobs(
        sampler, task, asked, tokenizer, recipe, n, temperature, seed, folder, weights, on_progress
    )  # fmt: skip
    found = over_ranks(jobs, lambda _, job: job())
    if damaged := sum(shard.damaged for shard in found):
        say(f"{damaged} of {len(found)} shards in {folder} were damaged or of other work, and sampled again")
    return [r for shard in found for r in shard.value]


def sample_ahead(
    sampler: Sampler, task: Task, asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *,
    n: int, temperature: float, seed: int, folder: Path, weights: str,
) -> None:  # fmt: skip
    """This rank's shards of what a later `sample_rollouts` with these arguments returns. No rank waits for another."""
    jobs = _shard_jobs(
        sampler, task, asked, tokenizer, recipe, n, temperature, seed, folder, weights, no_progress
    )  # fmt: skip
    for job in jobs[ranks.rank() :: ranks.size()]:
        job()


def _shard_jobs(
    sampler: Sampler, task: Task, asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, recipe: Recipe,
    n: int, temperature: float, seed: int, folder: Path | None, weights: str, on_progress: Callable[[int, int], None],
) -> list[Callable[[], Shard[list[Rollout]]]]:  # fmt: skip
    """What makes or reads each shard, in the order of the problems."""
    size = shard_size(recipe, len(asked))
    shards = [asked[start : start + size] for start in range(0, len(asked), size)]
    total, done = n * sum(map(len, shards[ranks.rank() :: ranks.size()])), 0

    def work_on(number: int, mine: Sequence[Asked]) -> Shard[list[Rollout]]:
        nonlocal done
        own_seed = seed if len(shards) == 1 else shard_seed(seed, number)
        expected = [(a.problem_id, k) for a in mine for k in range(n)]
        shard = keep_shard(
            folder / f"shard_{number}.parquet" if folder else None,
            _digest(task, mine, recipe, (n, temperature, own_seed, weights)) if folder else "", SCHEMA,
            make=lambda: _sample_shard(
                sampler, task, mine, tokenizer, recipe, n, temperature, own_seed,
                lambda finished, _: on_progress(done + finished, total),
            ),
            to_table=rollouts_table,
            from_table=lambda table: _rollouts_if_whole(table, expected),
        )  # fmt: skip
        done += n * len(mine)
        on_progress(done, total)
        return shard

    return [partial(work_on, number, mine) for number, mine in enumerate(shards)]


def _sample_shard(
    sampler: Sampler, task: Task, asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, recipe: Recipe,
    n: int, temperature: float, seed: int, on_progress: Callable[[int, int], None],
) -> list[Rollout]:  # fmt: skip
    samples = sampler.sample(
        [a.prompt_ids for a in asked],
        n=n,
        temperature=temperature,
        max_tokens=recipe.max_completion_length,
        seed=seed,
        on_progress=on_progress,
    )
    style = step_style(recipe.step_style, recipe.step_pattern)
    rollouts, problems = [], []
    for a, drawn in zip(asked, samples, strict=True):
        for k, s in enumerate(drawn):
            ends = step_ends(s.token_ids, tokenizer, style)
            steps = step_texts(s.token_ids, ends, tokenizer)
            # Files hold log-probs in fp32: what is used at once must not differ from what is read back.
            logps = array("f", s.logps).tolist()
            r = Rollout(a.problem_id, k, a.prompt, a.prompt_ids, "".join(steps), s.token_ids, logps, s.finished)
            r.step_ends, r.steps = ends, steps
            r.checker_labels = task.check_steps(a.problem, steps)
            rollouts.append(r)
            problems.append(a.problem)
    judged = task.judge(problems, [r.completion for r in rollouts], [r.finished for r in rollouts])
    for r, verdict in zip(rollouts, judged, strict=True):
        r.label, r.verified, r.answer = verdict.right, verdict.verified, verdict.answer
    return rollouts


def _digest(task: Task, asked: Sequence[Asked], recipe: Recipe, drawn: tuple) -> str:
    """Of everything that decides what a shard holds; `drawn` is what the recipe does not say."""
    how = task.name, recipe.max_completion_length, recipe.step_style, recipe.step_pattern, drawn
    return digest([how, *((a.problem_id, a.prompt, a.prompt_ids, task.answer(a.problem)) for a in asked)])


def _rollouts_if_whole(table: pa.Table, expected: list[tuple[int, int]]) -> list[Rollout] | None:
    """The rollouts of a table, None unless they are of the (problem, sample) pairs expected."""
    found = list(zip(table["problem_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
    return rollouts_of(table) if found == expected else None


def has_text(r: Rollout) -> bool:
    """Whether there is more to a completion than the end-of-sequence token, which is no step."""
    return bool(r.step_ends and r.completion.strip())


def usable(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts to learn from: with text and a known outcome."""
    return [r for r in rollouts if has_text(r) and r.verified]


def check_sync(model: PreTrainedModel, rollouts: Sequence[Rollout], recipe: Recipe) -> tuple[list[torch.Tensor], float]:
    """The model's own log-probs of what the engine sampled, and the largest |difference| to the engine's, in nats.

    Raises RunError past the tolerance: then the engine samples from other weights than the trainer holds.
    """
    recomputed = log_probs(model, rollouts, recipe)
    sampled = torch.tensor([logp for r in rollouts for logp in r.logps])
    differences = (torch.cat(recomputed) - sampled).abs()
    tolerance = sync_tolerance(recipe)
    if not differences.max() <= tolerance:  # a nan fails, too
        raise RunError(
            f"weight sync failed: the engine's log-probs differ from the trainer's by up to {differences.max():.2e} "
            f"nats ({differences.mean():.1e} on average), tolerance {tolerance:.0e} (weight_sync_tolerance). The "
            "engine holds other weights, or samples at another temperature or precision. In bf16, rounding alone can "
            "exceed the tolerance on small models; the average then stays small, and the tolerance may be raised"
        )
    return recomputed, float(differences.max())
