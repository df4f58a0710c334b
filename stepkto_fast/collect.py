"""Sampling turned into rollouts: completions with their outcome, their steps, their labels and reference log-probs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import RunError
from .objective import log_probs
from .recipe import Recipe
from .rollout import Rollout
from .sampler import Sampler, context_length, no_progress
from .segmentation import step_ends, step_style, step_texts
from .task import Task


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


def sample_rollouts(
    sampler: Sampler, task: Task, asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *,
    n: int, temperature: float, seed: int, on_progress: Callable[[int, int], None] = no_progress,
) -> list[Rollout]:  # fmt: skip
    """n completions of each problem, segmented, judged by the task (label, verified, answer, checker_labels)."""
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
            r = Rollout(a.problem_id, k, a.prompt, a.prompt_ids, "".join(steps), s.token_ids, s.logps, s.finished)
            r.step_ends, r.steps = ends, steps
            r.checker_labels = task.check_steps(a.problem, steps)
            rollouts.append(r)
            problems.append(a.problem)
    judged = task.judge(problems, [r.completion for r in rollouts], [r.finished for r in rollouts])
    for r, verdict in zip(rollouts, judged, strict=True):
        r.label, r.verified, r.answer = verdict.right, verdict.verified, verdict.answer
    return rollouts


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
    tolerance = recipe.weight_sync_tolerance or (5e-2 if recipe.bf16 else 1e-3)
    if not differences.max() <= tolerance:  # a nan fails, too
        raise RunError(
            f"weight sync failed: the engine's log-probs differ from the trainer's by up to {differences.max():.2e} "
            f"nats ({differences.mean():.1e} on average), tolerance {tolerance:.0e} (weight_sync_tolerance). The "
            "engine holds other weights, or samples at another temperature or precision. In bf16, rounding alone can "
            "exceed the tolerance on small models; the average then stays small, and the tolerance may be raised"
        )
    return recomputed, float(differences.max())
