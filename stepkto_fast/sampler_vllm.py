"""Rollouts by vLLM in this process: weights are handed over in memory, log-probs come back with the tokens."""

import contextlib
import io
import os
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import ranks
from .adapters import merged_state, save_adapters
from .errors import RunError
from .recipe import Recipe
from .sampler import Sample, no_progress, token_limits
from .watchdog import watchdog

# Read when vllm is imported: one process (so that weights can be handed over), no network, no chatter.
for _name, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)

# E402: the variables above must be set before anything of vllm is imported.
import vllm  # noqa: E402
import vllm.v1.engine.core  # noqa: E402
from tqdm import tqdm  # noqa: E402
from vllm.config.lora import MaxLoRARanks  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402


def _relay(on_progress: Callable[[int, int], None]) -> type[tqdm]:
    """A bar that draws nothing and passes the count of finished samples on: the only progress vLLM reports."""

    class Relay(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float = 1) -> bool | None:
            changed = super().update(n)
            on_progress(int(self.n), int(self.total))
            return changed

    return Relay


class VLLMSampler:
    """A vLLM engine inside the trainer's process.

    It is awake from its start, and again from each `sync`, until `sleep`. Under torchrun every rank has an engine of
    its own, which waits for no other but while it starts. What goes wrong in vLLM is a RunError; a call that hangs ends
    the process (`watchdog`).
    """

    name = "vllm"

    def __init__(
        self, recipe: Recipe, directory: Path, context_length: int, eos_token_id: int, *, prefix_caching: bool = False,
        log: Path | None = None,
    ):  # fmt: skip
        """Starts the engine on the model in `directory`: any weights, which the first `sync` replaces; but M_0's with
        `lora_sync: adapters`, which brings adapters alone.

        `prefix_caching` lets the prompts of one `sample` call share the work on what they begin with. `log` takes what
        is known of a failure.
        """
        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        self._recipe, self._eos, self._prefix_caching, self._log = recipe, eos_token_id, prefix_caching, log
        self._asleep, self._syncs = False, 0
        self._adapters: tempfile.TemporaryDirectory | None = None  # what the engine samples with, besides M_0
        cuda = torch.cuda.is_available()
        settings: dict[str, Any] = {}
        if recipe.lora_sync == "adapters":
            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _room(recipe.lora_rank)}
        if recipe.vllm_sleep and cuda:
            settings["enable_sleep_mode"] = True
        if ranks.size() > 1:
            # The ranks' process group serves vLLM as well: each rank is an engine of tensor-parallel size 1 in it.
            settings["distributed_executor_backend"] = "external_launcher"
            # An engine that ends would end the process group, which is not its own.
            vllm.v1.engine.core.cleanup_dist_env_and_memory = lambda: None
        with watchdog(recipe.vllm_timeout, "vLLM, while it starts", log):
            self._llm: Any = vllm.LLM(
                model=str(directory),
                max_model_len=context_length,
                dtype="bfloat16" if recipe.bf16 else "float32",
                hf_overrides={"head_dtype": "float32"},  # the trainer never rounds logits to 16 bits either
                seed=recipe.seed,
                skip_tokenizer_init=True,
                trust_remote_code=False,
                enforce_eager=True,
                enable_prefix_caching=prefix_caching,
                # On a CPU vLLM caches blocks of 128 tokens if not told otherwise: longer than most prompts and steps.
                block_size=32 if prefix_caching and not cuda else None,
                logprobs_mode="processed_logprobs",
                gpu_memory_utilization=recipe.vllm_memory,
                disable_log_stats=True,
                **settings,
            )
        torch.set_num_threads = set_threads  # on a CPU vLLM puts a function in its place that does nothing
        torch.set_num_threads(threads)

    def sync(self, model: PreTrainedModel) -> None:
        """Hands over the policy's weights, merged and in memory; or its adapters, by way of a folder. Wakes the engine.

        A collective where the policy is sharded.
        """
        if self._recipe.lora_sync != "adapters":
            self.load(merged_state(model))
            return
        folder = tempfile.TemporaryDirectory(prefix="stepkto_fast-adapters-")
        save_adapters(model, Path(folder.name))
        self._fill(lambda alive: self._load_adapters(folder))

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hands over weights by the plain model's names, one at a time. Wakes the engine."""
        self._fill(lambda alive: self._load_weights(_each_reported(weights, alive)))

    def _fill(self, write: Callable[[Callable[[], None]], None]) -> None:
        with self._engine("while taking the policy's weights") as alive:
            # Weights are written into memory that is there, and caches get theirs only then: both at once may not fit.
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            write(alive)
            self._llm.reset_prefix_cache()
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False

    def _load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    def _load_adapters(self, folder: tempfile.TemporaryDirectory) -> None:
        """Each sync brings adapters with a number of their own: those of a known number would not be read again."""
        try:
            self._llm.llm_engine.add_lora(self._lora_request(self._syncs + 1, folder.name))
        except ValueError as error:
            raise RunError(f"vLLM does not take these adapters ({error}): set lora_sync to merged") from error
        self._syncs += 1
        if self._adapters is not None:
            self._adapters.cleanup()
        self._adapters = folder

    @staticmethod
    def _lora_request(number: int, folder: str) -> LoRARequest:
        return LoRARequest(f"policy-{number}", number, folder)

    def sleep(self) -> None:
        """Frees the engine's memory with `recipe.vllm_sleep`; `sync` must follow before the next `sample`.

        Weights that come anew are dropped; M_0's, to which only adapters come, are kept in the CPU's memory. Without a
        GPU nothing is freed, and all else is the same.
        """
        if not self._recipe.vllm_sleep or self._asleep:
            return
        with self._engine("while falling asleep"):
            self._llm.sleep(level=1 if self._recipe.lora_sync == "adapters" else 2)
            self._asleep = True

    def close(self) -> None:
        """Ends the engine and frees its memory, the GPU's too."""
        if self._adapters is not None:
            self._adapters.cleanup()
        if self._llm is not None:
            with watchdog(self._recipe.vllm_timeout, "vLLM, while it ends", self._log):
                self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    @contextlib.contextmanager
    def _engine(self, doing: str) -> Iterator[Callable[[], None]]:
        """Around all that is asked of vLLM. What it raises is a RunError; what hangs ends the process, unless it calls
        what the block is given within `recipe.vllm_timeout` seconds."""
        try:
            with watchdog(self._recipe.vllm_timeout, f"vLLM, {doing}", self._log) as alive:
                yield alive
        except (RunError, torch.distributed.DistError):  # the latter: a rank that is gone, not the engine
            raise
        except Exception as error:
            more = ""
            if self._log is not None:
                with open(self._log, "a", encoding="utf-8") as file:
                    traceback.print_exc(file=file)
                more = f"; {self._log} says more"
            raise RunError(
                f"vLLM failed {doing} ({type(error).__name__}: {error}){more}. Continue with --resume true, which "
                "starts a new engine"
            ) from error

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
        limits = token_limits(max_tokens, len(prompts))
        if self._asleep:
            raise RuntimeError("the engine sleeps: sync must come before sample")
        parameters = [
            vllm.SamplingParams(
                n=n, temperature=temperature, max_tokens=limit, detokenize=False,
                stop_token_ids=[self._eos], logprobs=None if temperature == 0 else 0,
            )
            for limit in limits
        ]  # fmt: skip
        lora = self._lora_request(self._syncs, self._adapters.name) if self._adapters is not None else None
        with self._engine("while sampling") as alive:
            # A sample's last bits must not depend on what earlier calls left in the cache.
            if self._prefix_caching and not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not reset its prefix cache: it takes requests to be still running")
            # In one process vLLM draws from torch's global generator; a generator for each request would be far slower.
            with (
                torch.random.fork_rng(devices=range(torch.cuda.device_count())),
                _steps_reported(self._llm.llm_engine, alive),
            ):
                torch.manual_seed(seed)
                outputs = self._llm.generate(
                    [{"prompt_token_ids": p} for p in prompts],
                    parameters,
                    use_tqdm=_relay(on_progress),
                    lora_request=lora,
                )
        return [
            [
                Sample(
                    token_ids=list(c.token_ids),
                    logps=[entry[t].logprob for t, entry in zip(c.token_ids, c.logprobs or [], strict=False)],
                    finished=c.finish_reason == "stop",
                )
                for c in output.outputs
            ]
            for output in outputs
        ]


def _each_reported(weights: Iterable[tuple[str, Tensor]], alive: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
    """The same weights; calls `alive` with each."""
    for named in weights:
        alive()
        yield named


@contextlib.contextmanager
def _steps_reported(engine: Any, alive: Callable[[], None]) -> Iterator[None]:
    """Calls `alive` with every step of the engine: a token of every request, however long they take to finish."""
    step = engine.step

    def reported() -> Any:
        alive()
        return step()

    engine.step = reported
    try:
        yield
    finally:
        engine.step = step


def _room(rank: int) -> int:
    """The smallest rank of adapters that vLLM has room for and that is at least `rank`."""
    ranks_of_vllm = [r for r in get_args(MaxLoRARanks) if r >= rank]
    if not ranks_of_vllm:
        raise RunError(f"lora_rank {rank} is above what vLLM's adapters may have: set lora_sync to merged")
    return min(ranks_of_vllm)
