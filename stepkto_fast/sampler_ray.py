"""Rollouts by several vLLM engines under Ray, on one node or many: prompts are split, weights go to all.

Each engine is a Ray actor with a `VLLMSampler` in its process; Ray places them where it has room. Rank 0 starts them
and hands over weights, which lie in Ray's object store once; every rank samples on engines of its own.
"""

import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts: nothing is sent to its makers

import ray
from ray.exceptions import GetTimeoutError, RayError
from safetensors import torch as safetensors
from torch import Tensor
from transformers import PreTrainedModel

from . import ranks
from .adapters import merged_state
from .errors import RunError
from .recipe import Recipe
from .sampler import Sample, no_progress, spread_seed, token_limits
from .watchdog import watchdog
from .weight_parts import parts

STORE_BYTES = 1 << 28  # of the object store of a Ray on this machine, besides what the weights take
POLL = 0.5  # seconds between looks at how far the engines are
REMEDY = "look at the nodes (`ray status`), then continue with --resume true"


class Engine:
    """The actor: one VLLMSampler. `done` is answered while `sample` works."""

    def __init__(self, recipe: Recipe, directory: Path, context_length: int, eos: int, prefix_caching: bool):
        from .sampler_vllm import VLLMSampler

        self._sampler = VLLMSampler(recipe, directory, context_length, eos, prefix_caching=prefix_caching)
        self._done = 0

    def load(self, stored: Sequence[ray.ObjectRef]) -> None:
        """Loads weights from the object store, where they lie as safetensors, a part at a time."""

        def named() -> Iterator[tuple[str, Tensor]]:
            for part in stored:
                yield from safetensors.load(ray.get(part)).items()

        self._sampler.load(named())

    def sample(self, prompts: Sequence[list[int]], **arguments: Any) -> list[list[Sample]]:
        def on_progress(done: int, total: int) -> None:
            self._done = done

        samples = self._sampler.sample(prompts, on_progress=on_progress, **arguments)
        self._done = 0  # the next call has finished none before it begins
        return samples

    @ray.method(concurrency_group="watch")
    def done(self) -> int:
        """Samples finished in the `sample` call that is under way."""
        return self._done


class RaySampler:
    """`recipe.ray_engines` engines, shared out among the ranks."""

    name = "vLLM under Ray"

    def __init__(
        self, recipe: Recipe, directory: Path, context_length: int, eos_token_id: int, *, weight_bytes: int,
        prefix_caching: bool = False,
    ):  # fmt: skip
        """Joins the cluster at `recipe.ray_address`, or starts Ray on this machine, and starts the engines there.

        Every node must see the model in `directory` (any weights: `sync` brings the real ones); the real ones take
        `weight_bytes`. Raises RunError where Ray or the engines do not start.
        """
        if recipe.ray_engines < ranks.size():
            raise RunError(f"ray_engines is {recipe.ray_engines} for {ranks.size()} ranks: give at least one a rank")
        self._recipe, self._engines = recipe, []
        self._joined = not ray.is_initialized()
        namespace = ranks.from_main(lambda: f"stepkto_fast-{uuid.uuid4().hex}")
        address = ranks.from_main(lambda: _join(recipe, namespace, weight_bytes))
        if not ranks.is_main():
            _join(replace(recipe, ray_address=address), namespace, weight_bytes)
        names = [f"engine_{k}" for k in range(recipe.ray_engines)]
        if ranks.is_main():
            actor: Any = ray.remote(concurrency_groups={"watch": 1})(Engine)  # type: ignore[call-overload]  # documented, but not in its overloads
            resources = {"num_cpus": 1, "num_gpus": 1 if ray.cluster_resources().get("GPU") else 0}
            self._engines = [
                actor.options(name=name, namespace=namespace, **resources).remote(
                    recipe, directory.resolve(), context_length, eos_token_id, prefix_caching
                )
                for name in names
            ]
        ranks.from_main(self._wait_until_ready)
        if not ranks.is_main():
            self._engines = [ray.get_actor(name, namespace=namespace) for name in names]
        self._own = range(ranks.rank(), recipe.ray_engines, ranks.size())

    def _wait_until_ready(self) -> None:
        free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
        try:
            for k, engine in enumerate(self._engines):
                self._get(engine.done.remote(), k)
        except RunError as error:
            self.close()
            raise RunError(
                f"{error}. Each of the {len(self._engines)} engines takes a CPU, and a GPU where Ray has any; free "
                f"were {free}. Every node needs this package, vLLM, and the model under the same path"
            ) from error

    def sync(self, model: PreTrainedModel) -> None:
        """Hands the policy's weights to all engines. A collective under torchrun."""
        named = merged_state(model)
        stored, failed = [], None
        if ranks.is_main():
            for part in parts(named):
                try:
                    stored.append(ray.put(safetensors.save(part)))
                except RayError as error:  # a full store: the other ranks must get all tensors first
                    failed = failed or RunError(f"Ray cannot store the policy's weights ({_reason(error)}): {REMEDY}")
        else:
            deque(named, maxlen=0)  # to its end: every tensor is a collective
        ranks.from_main(lambda: self._load(stored, failed))

    def _load(self, stored: list[ray.ObjectRef], failed: RunError | None) -> None:
        if failed is not None:
            raise failed
        for k, loaded in enumerate([engine.load.remote(stored) for engine in self._engines]):
            self._get(loaded, k)

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int,
        temperature: float,
        max_tokens: int | Sequence[int],
        seed: int,
        on_progress: Callable[[int, int], None] = no_progress,
    ) -> list[list[Sample]]:
        limits, share = token_limits(max_tokens, len(prompts)), len(self._own)
        bounds = [len(prompts) * place // share for place in range(share + 1)]
        running: dict[ray.ObjectRef, tuple[int, int]] = {}  # what an engine works on: its place in _own, its number
        for place, k in enumerate(self._own):
            part = slice(bounds[place], bounds[place + 1])
            if prompts[part]:
                work = self._engines[k].sample.remote(
                    list(prompts[part]), n=n, temperature=temperature, max_tokens=limits[part],
                    seed=spread_seed(seed, place),
                )  # fmt: skip
                running[work] = place, k
        found: dict[int, list[list[Sample]]] = {}
        total, done, moved = n * len(prompts), -1, time.monotonic()
        while running:
            for work in ray.wait(list(running), timeout=POLL)[0]:
                place, k = running.pop(work)
                found[place] = self._get(work, k)
            now = n * sum(map(len, found.values())) + self._finished([k for _, k in running.values()])
            if now > done:
                done, moved = now, time.monotonic()
                on_progress(done, total)
            elif time.monotonic() - moved > self._recipe.vllm_timeout:
                stuck = ", ".join(str(k) for _, k in running.values())
                raise RunError(
                    f"vLLM engines under Ray (number {stuck}) have finished no sample for "
                    f"{self._recipe.vllm_timeout:g} s: {REMEDY}, or raise vllm_timeout"
                )
        return [samples for place in sorted(found) for samples in found[place]]

    def _finished(self, busy: Sequence[int]) -> int:
        """The samples that busy engines have finished of what they work on; those that do not answer count for 0."""
        asked = {self._engines[k].done.remote(): k for k in busy}
        if not asked:
            return 0
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL)
        return sum(self._get(answer, asked[answer]) for answer in answered)

    def _get(self, answer: ray.ObjectRef, k: int) -> Any:
        """What engine `k` answers; RunError where it has failed, died, or does not answer in time."""
        try:
            return ray.get(answer, timeout=self._recipe.vllm_timeout)
        except GetTimeoutError as error:
            raise RunError(
                f"vLLM engine {k} under Ray has not answered for {self._recipe.vllm_timeout:g} s (vllm_timeout): "
                f"{REMEDY}, or raise vllm_timeout"
            ) from error
        except RayError as error:
            raise RunError(f"vLLM engine {k} under Ray has failed ({_reason(error)}): {REMEDY}") from error

    def sleep(self) -> None:
        """Nothing: the engines have GPUs of their own."""

    def close(self) -> None:
        """Ends the engines, which rank 0 has started, and leaves Ray where this sampler joined or started it."""
        if ray.is_initialized():
            for engine in self._engines if ranks.is_main() else ():
                ray.kill(engine)
            if self._joined:
                ray.shutdown()
        self._engines = []


def _join(recipe: Recipe, namespace: str, weight_bytes: int) -> str:
    """Joins or starts Ray where this process has not; returns Ray's address. `namespace` is for this run's engines."""
    # Left to itself a Ray on this machine starts a process for every core and takes a third of the memory.
    alone: dict[str, Any] = {
        "num_cpus": recipe.ray_engines,
        "object_store_memory": STORE_BYTES + 2 * weight_bytes,
        "include_dashboard": False,
    }
    try:
        if not ray.is_initialized():
            # Ray itself waits for minutes where nobody answers.
            with watchdog(recipe.vllm_timeout, f"Ray, while joining {recipe.ray_address or 'one of this machine'}"):
                ray.init(
                    recipe.ray_address or "local", namespace=namespace, log_to_driver=False,
                    **({} if recipe.ray_address else alone),
                )  # fmt: skip
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise RunError(
            f"Ray does not start or answer ({_reason(error)}): ray_address is {recipe.ray_address!r}; give what "
            "`ray start --head` prints, or none for a Ray on this machine. A cluster that asks for a token wants "
            "RAY_AUTH_MODE=token in the environment, and its token in ~/.ray/auth_token"
        ) from error
    return ray.get_runtime_context().gcs_address


def _reason(error: BaseException) -> str:
    """The last line of what Ray says: the ones before it are a traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
