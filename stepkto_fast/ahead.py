"""Rollouts of the next iteration, sampled while this one's update runs (`max_staleness: 1`).

The engine keeps the weights M_t while the trainer moves on to M_{t+1}. What it samples lies in shards, which the next
iteration reads; a run that is killed loses one of them at most. The step to M_{t+1} is stored once all of them are.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from .collect import sample_ahead
from .sampling_shards import SHARDS, weights_digest
from .setup_run import Session, derived_seed


def staleness(s: Session, iteration: int) -> int:
    """By how many iterations the rollouts of an iteration are older than its policy."""
    return min(s.recipe.max_staleness, iteration)


def rollout_shards(s: Session, iteration: int) -> Path:
    """Where the shards of an iteration's rollouts lie."""
    return s.run.rollouts / SHARDS / f"iteration_{iteration}" / "rollouts"


@contextmanager
def while_updating(s: Session, policy: PreTrainedModel) -> Iterator[None]:
    """Around the update of `policy`: the engine samples the next iteration's rollouts, or sleeps where it has nothing
    to do. Leaving the block waits for the engine and raises what went wrong there."""
    following = s.progress.iteration + 1
    if not s.recipe.max_staleness or following == s.recipe.iterations:
        s.sampler.sleep()
        yield
        return
    s.progress.ahead = weights = weights_digest(policy)
    failures: list[BaseException] = []
    start, end = time.monotonic(), 0.0

    def sample() -> None:
        nonlocal end
        try:
            sample_ahead(
                s.sampler, s.task, s.train[following], s.tokenizer, s.recipe, n=s.recipe.num_generations,
                temperature=s.recipe.temperature, seed=derived_seed(s.recipe, "rollout", following),
                folder=rollout_shards(s, following), weights=weights,
            )  # fmt: skip
        except BaseException as failure:
            failures.append(failure)
        end = time.monotonic()

    # A daemon: a run that fails in its update ends at once, not when the engine is done.
    thread = threading.Thread(target=sample, name="rollouts ahead", daemon=True)
    thread.start()
    yield
    text = f"waiting for the rollouts of M_{following - 1} that M_{following} learns from"
    with s.recorder.phase("rollout_ahead", text):
        thread.join()
    if failures:
        raise failures[0]
    s.progress.seconds_beside += end - start
