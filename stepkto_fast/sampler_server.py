"""Rollouts by a vLLM server, on this host or another: sampling by its completions API, weights by one of two ways.

`sync` writes the policy's weights as safetensors where trainer and server both see them and has the server load them,
or sends them from GPU to GPU (`vllm_sync: nccl`). Each sync gives the server's weights a version of their own, which is
asked for after every call: samples of a server that was restarted, or that another run has handed its weights to, are
never used.
"""

import json
import shlex
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from . import ranks
from .adapters import merged_state
from .atomic import replacing
from .errors import RunError
from .objective import log_probs
from .recipe import Recipe
from .rollout import Rollout
from .sampler import Sample, no_progress, spread_seed, sync_tolerance, token_limits
from .vllm_server import AnsweredError, RefusedError, VLLMServer, malformed, parse_choices
from .weight_parts import parts

SAMPLES_AT_ONCE = 512  # that the server is asked for; it queues what it cannot hold
PROBE_TOKENS = 8  # of the prompt and of the completion that prove a sync


class ServerSampler:
    """Samples from `vllm serve`. Under torchrun every rank samples there, and rank 0 hands over the weights."""

    name = "a vLLM server"

    def __init__(
        self, recipe: Recipe, directory: Path, weights: Path, context_length: int, eos_token_id: int, vocabulary: int,
        *, prefix_caching: bool = False,
    ):  # fmt: skip
        """Checks that the server at `recipe.vllm_server_url` serves what the recipe needs.

        directory: the model that the server should have been started on, for the message that says how. weights: the
        folder for weights on their way, which the server must see under the same path. Raises RunError with the
        command to start the server with where none answers, or one that is set up otherwise.
        """
        assert recipe.vllm_server_url is not None
        self._recipe, self._eos, self._vocabulary = recipe, eos_token_id, vocabulary
        self._server = VLLMServer(recipe.vllm_server_url, recipe.vllm_timeout)
        self._weights, self._version = weights.resolve(), ""
        self._transfer: Any = None
        command = serve_command(self._server, recipe, directory, context_length, prefix_caching=prefix_caching)
        try:
            self._model = self._check(context_length)
        except RunError as error:
            raise RunError(f"{error}. The command for this run:\n  {command}") from error
        if ranks.is_main():
            shutil.rmtree(self._weights, ignore_errors=True)  # what a killed run left
        if recipe.vllm_sync == "nccl":
            from .weight_transfer import NCCLTransfer

            self._transfer = NCCLTransfer(self._server, recipe.vllm_timeout)

    def _check(self, context_length: int) -> str:
        """The name under which the model is served."""
        url = self._server.url
        try:
            everything = self._server.get("/server_info?config_format=json")["vllm_config"]
            settings, transfer = everything["model_config"], everything["weight_transfer_config"] or {}
            served = self._server.get("/v1/models")["data"][0]["id"]
            head = (settings["hf_overrides"] or {}).get("head_dtype")
            found = {
                "--logprobs-mode": settings["logprobs_mode"],
                "--dtype": str(settings["dtype"]).removeprefix("torch."),
                "--hf-overrides": json.dumps({"head_dtype": head}),
                "--generation-config": settings["generation_config"],
                "--weight-transfer-config": json.dumps({"backend": transfer.get("backend")}),
                "--skip-tokenizer-init": settings["skip_tokenizer_init"],
            }
            length = int(settings["max_model_len"])
        except RefusedError as error:
            raise RunError(
                f"{error}. Its development endpoints are off: VLLM_SERVER_DEV_MODE=1 turns them on"
            ) from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise malformed(f"its settings have no {error}") from error
        for option, value in {**_options(self._recipe), "--skip-tokenizer-init": True}.items():
            if found[option] != value:
                raise RunError(
                    f"the vLLM server {self._server.url} has {option} {found[option]}, this run needs {value}"
                )
        if length < context_length:
            raise RunError(f"the vLLM server {url} has --max-model-len {length}, context_length needs {context_length}")
        self._check_vocabulary(served)
        return served

    def _check_vocabulary(self, served: str) -> None:
        """The last id must be one to the server, the one behind it none: the server only says which ids it refuses."""
        wrong = f"the vLLM server {self._server.url} serves a model whose vocabulary is not of {self._vocabulary} ids"
        ask = {"model": served, "prompt": [0], "max_tokens": 1}
        try:
            self._server.post("/v1/completions", {**ask, "stop_token_ids": [self._vocabulary - 1]})
        except RefusedError as error:
            raise RunError(f"{wrong} ({error})") from error
        try:
            self._server.post("/v1/completions", {**ask, "stop_token_ids": [self._vocabulary]})
        except RefusedError:
            return
        raise RunError(wrong)

    def sync(self, model: PreTrainedModel) -> None:
        """Hands the policy's weights to the server and proves that it holds them. A collective under torchrun.

        Raises RunError where the server cannot load them, or then gives other log-probs than the trainer.
        """
        self._version = ranks.from_main(lambda: uuid.uuid4().hex)
        # From here on another run's samples of this server are refused, whatever becomes of this sync.
        ranks.from_main(lambda: self._mark(f"{self._version}, on its way"))
        if self._transfer is None:
            self._reload(model)
        else:
            self._transfer.send(model)
        probe = ranks.from_main(self._probe)
        own = log_probs(model, [probe], self._recipe)[0]
        difference = float((own - torch.tensor(probe.logps)).abs().max())
        if not difference <= sync_tolerance(self._recipe):  # a nan fails, too
            raise RunError(
                f"weight sync failed: the log-probs of the vLLM server {self._server.url} differ from the trainer's by "
                f"up to {difference:.2e} nats, tolerance {sync_tolerance(self._recipe):.0e} (weight_sync_tolerance). "
                "It serves a model of another kind or precision: start it on this run's own model"
            )

    def _reload(self, model: PreTrainedModel) -> None:
        """Has the server load the policy's weights from a folder. A collective under torchrun."""
        folder = self._weights / self._version
        named, failed = merged_state(model), None
        if ranks.is_main():
            failed = _write(named, folder)
        else:
            deque(named, maxlen=0)  # to its end: every tensor is a collective
        try:
            ranks.from_main(lambda: self._load(folder, failed))
        finally:
            if ranks.is_main():
                shutil.rmtree(folder, ignore_errors=True)

    def _load(self, folder: Path, failed: RunError | None) -> None:
        if failed is not None:
            raise failed
        try:
            self._server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        except AnsweredError as error:
            raise RunError(
                f"{error}. It was to load the weights in {folder}: both hosts must see output_dir under one path"
            ) from error

    def _mark(self, version: str) -> None:
        self._server.post("/update_weight_version", {"new_version": version})

    def _probe(self) -> Rollout:
        """Marks what the server holds now as this sync's weights; returns what it samples with them."""
        if self._server.post("/reset_prefix_cache") != {"success": True}:
            raise RunError(
                f"the vLLM server {self._server.url} did not reset its prefix cache: somebody else's requests are "
                "running. A run needs a server of its own"
            )
        self._mark(self._version)
        prompt = [k * (self._vocabulary - 1) // PROBE_TOKENS for k in range(PROBE_TOKENS)]
        [[s]] = self.sample([prompt], n=1, temperature=self._recipe.temperature, max_tokens=PROBE_TOKENS, seed=0)
        return Rollout(0, 0, "", prompt, "", s.token_ids, s.logps, s.finished, step_ends=[len(s.token_ids)])

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
        for k, prompt in enumerate(prompts):
            if any(not 0 <= x < self._vocabulary for x in prompt):  # they would end the server's engine
                raise ValueError(f"prompt {k} has token ids outside of 0 to {self._vocabulary - 1}")
        bodies = [
            {
                "model": self._model, "prompt": prompt, "n": n, "temperature": temperature, "max_tokens": limit,
                "seed": spread_seed(seed, k), "stop_token_ids": [self._eos], "return_token_ids": True,
                **({"logprobs": 0, "return_tokens_as_token_ids": True} if temperature else {}),
            }
            for k, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]  # fmt: skip
        samples: list[list[Sample]] = [[] for _ in prompts]
        done = 0

        def on_answer(k: int, answer: Any) -> None:
            nonlocal done
            samples[k] = parse_choices(
                answer, n=n, limit=limits[k], vocabulary=self._vocabulary, eos=self._eos, with_logps=bool(temperature)
            )
            done += n
            on_progress(done, n * len(prompts))

        at_once = max(1, SAMPLES_AT_ONCE // n)
        self._server.post_each("/v1/completions", bodies, at_once=at_once, on_answer=on_answer)
        if self._server.get("/weight_info") != {"weight_version": self._version}:
            raise RunError(
                f"the vLLM server {self._server.url} no longer holds the weights of this run's last sync: it was "
                "restarted, or another run uses it. Give each run a server of its own, and continue with --resume true"
            )
        return samples

    def sleep(self) -> None:
        """Nothing: the server has memory of its own."""

    def close(self) -> None:
        """Deletes the folder for weights, or leaves the server's NCCL group; who started the server stops it."""
        if self._transfer is not None:
            self._transfer.close()
        if ranks.is_main():
            shutil.rmtree(self._weights, ignore_errors=True)


def serve_command(
    server: VLLMServer, recipe: Recipe, directory: Path, context_length: int, *, prefix_caching: bool
) -> str:
    """The shell command that starts the server for this run, to be shown."""
    words = ["vllm", "serve", str(directory.resolve()), "--host", str(server.host), "--port", str(server.port or 80)]
    words += ["--max-model-len", str(context_length)]
    for option, value in _options(recipe).items():
        words += [option, str(value)]
    words += ["--skip-tokenizer-init", "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching"]
    return f"VLLM_SERVER_DEV_MODE=1 {shlex.join(words)}"


def _options(recipe: Recipe) -> dict[str, str]:
    """What the samples' log-probs depend on, and what the sync wants."""
    return {
        "--dtype": "bfloat16" if recipe.bf16 else "float32",
        "--hf-overrides": json.dumps({"head_dtype": "float32"}),  # the trainer never rounds logits to 16 bits either
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",  # none of the model's own sampling defaults
        **({"--weight-transfer-config": json.dumps({"backend": "nccl"})} if recipe.vllm_sync == "nccl" else {}),
    }


def _write(named: Iterable[tuple[str, Tensor]], folder: Path) -> RunError | None:
    """Writes tensors to safetensors files in `folder`.

    What the disk refuses is returned, once `named` is at its end: other ranks take part in every tensor of it.
    """
    failed = None
    for number, part in enumerate(parts(named)):
        if failed is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(folder / f"model-{number:05d}.safetensors") as unfinished:
                    save_file(part, unfinished)
            except OSError as error:
                failed = RunError(f"cannot write the weights for the vLLM server: {error}")
    return failed
