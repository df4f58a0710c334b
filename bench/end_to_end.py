"""One Step-KTO iteration of a small Llama, by our loop and by TRL's KTOTrainer: the processes that do the work.

    python bench/end_to_end.py --provider "ours, Step-KTO" --shape goal --dtype bf16 --json

bench_end_to_end.py keeps such a process for each provider and asks them in turns for one step, over a socket.

Model and rollouts are those of planted.py. bf16 is autocast for both, with weights and optimizer in fp32.

A step is what one batch of rollouts costs, each used once as in an online loop: the reference's log-probs, loss and
gradients, clipping, AdamW. TRL's is driven by its own `trainer.train()`, from one `on_step_end` to the next: data
loading, collation and logging are in it, the tokenization of the dataset is not (our rollouts are tokens already).
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from planted import PAD, SIZES, SPECIAL, Size, batch, count_tokens, policy, prompts, reference, rotated
from registry import UnsupportedError
from stepkto_kernels import backend, backends, linear_logp, step_kto, watch
from stopwatch import ADAPTED, CLEAR, FRESH, allocator, resident
from torch import Tensor
from transformers import LlamaForCausalLM

from stepkto_fast.objective import accumulate_gradients, autocast, class_weights, log_probs
from stepkto_fast.packing import pack
from stepkto_fast.policy import head, hidden_states
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import UNLABELLED, Rollout

BETA = 0.1
LEARNING_RATE = 1e-7  # every step then does the same work: a policy that moves on leaves tokens without a coefficient
SPARSE = 2.0**-9  # the filter_eps of fp32, whose "auto" leaves out nothing
GENERATIONS = 4  # sampled completions of each prompt


# --- ours, and ours with its features off -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """One way to take a step. The defaults are the loop's; everything else is a feature off."""

    objective: str = "step"  # "outcome": no step loss; "kto": and TRL's estimate of KL, by two more forwards
    packed: bool = True
    grouped: bool = False  # TRL's micro-batches, each with its own estimate of KL; padded batches always are
    every_row: bool = False  # prompts and padding through the head too (padded)
    exact: bool = False  # filter_eps 0
    head: str = "native"  # or "reference", or "TRL": its ChunkedLogProbFunction (padded)

    @property
    def truth(self) -> "Ours":
        """The way to the same loss and gradient that the others are compared with, in fp32."""
        grouped = self.objective == "kto" and (self.grouped or not self.packed)
        return Ours(self.objective, grouped=grouped, exact=True, head="reference")

    @property
    def name(self) -> str:
        return " ".join([self.objective, *(["grouped"] if self.grouped else [])])

    @property
    def backend(self) -> str:
        return "reference" if self.head == "reference" else "native"

    def recipe(self, dtype: str) -> Recipe:
        return Recipe(
            bf16=dtype == "bf16", filter_eps=0.0 if self.exact else None if dtype == "bf16" else SPARSE, beta=BETA,
            step_beta=BETA, step_weight=float(self.objective == "step"), class_weights="none",
            learning_rate=LEARNING_RATE, max_tokens_per_micro_batch=1 << 20,
        )  # fmt: skip


@dataclass(frozen=True)
class Trl:
    """One configuration of TRL's KTOTrainer."""

    objective: str = "kto"  # "outcome": its loss_type apo_zero_unpaired, which needs no estimate of KL
    precomputed: bool = False
    liger: bool = False

    @property
    def truth(self) -> Ours:
        return Ours(self.objective, packed=False).truth


@dataclass(frozen=True)
class Engine:
    """Who samples."""

    engine: str


STEP_KTO, OUTCOME_ONLY = "ours, Step-KTO", "ours, outcome only"
COMPARED: dict[str, Ours | Trl] = {
    STEP_KTO: Ours(),
    OUTCOME_ONLY: Ours("outcome"),
    "ours, Step-KTO, exact": Ours(exact=True),
    "ours, reference backend": Ours(head="reference"),
    "TRL KTOTrainer": Trl(),
    "TRL KTOTrainer, precomputed reference": Trl(precomputed=True),
    "TRL KTOTrainer, apo_zero_unpaired": Trl("outcome"),
    "TRL KTOTrainer, Liger": Trl(liger=True),
}
# Each row has one feature less than the row above it; the first is ours, the last TRL's trainer.
TABLE: dict[str, Ours | Trl] = {
    STEP_KTO: COMPARED[STEP_KTO],
    "without step loss": COMPARED[OUTCOME_ONLY],
    "with TRL's KL: 4 forwards": Ours("kto"),
    "dense backward": Ours("kto", exact=True),
    "padded": Ours("kto", exact=True, packed=False),
    "prompts and padding in the head": Ours("kto", exact=True, packed=False, every_row=True),
    "TRL's head function": Ours("kto", exact=True, packed=False, every_row=True, head="TRL"),
    "TRL KTOTrainer": COMPARED["TRL KTOTrainer"],
}
ROLLOUT = {"ours, vLLM": Engine("vllm"), "transformers generate": Engine("transformers")}
TRUTH = "truth"
PROVIDERS: dict[str, Ours | Trl | Engine] = {**COMPARED, **TABLE, **ROLLOUT}


def padded(rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded on the right, and the mask of what is no padding."""
    width = max(len(r) for r in rollouts)
    ids = torch.tensor([[*r.prompt_ids, *r.completion_ids, *[PAD] * (width - len(r))] for r in rollouts])
    return ids, torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rollouts])


def padded_logps(
    model: LlamaForCausalLM, rollouts: list[Rollout], way: Ours, recipe: Recipe, metrics: bool = False
) -> Tensor:
    """The log-probs (N,) of the completion tokens, one completion after the other, by a padded forward of the trunk.
    `metrics`: TRL's function also computes the entropies and mean logits that its trainer logs."""
    ids, mask = padded(rollouts)
    states = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    hidden, target = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    width = ids.shape[1] - 1
    scored = torch.tensor(
        [n * width + p for n, r in enumerate(rollouts) for p in range(len(r.prompt_ids) - 1, len(r) - 1)]
    )
    if not way.every_row:
        hidden, target = hidden.index_select(0, scored), target.index_select(0, scored)
    if way.head == "TRL":
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer import utils

        outputs = ("entropy", "mean_logits") if metrics else ()
        chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        weight = model.get_output_embeddings().weight
        logp = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, chunk, None, 1.0, outputs)[0]
    else:
        logp = linear_logp(
            hidden, target=target, temperature=recipe.temperature, filter_eps=filter_eps(recipe), **head(model)
        )
    return logp.index_select(0, scored) if way.every_row else logp


def completion_logps(
    model: LlamaForCausalLM, rollouts: list[Rollout], way: Ours, recipe: Recipe, metrics: bool = False
) -> Tensor:
    """The log-probs (N,) of the completion tokens, one completion after the other."""
    with autocast(model, recipe):
        if not way.packed:
            return padded_logps(model, rollouts, way, recipe, metrics)
        b = pack(rollouts)
        return linear_logp(
            hidden_states(model, b), target=b.target, temperature=recipe.temperature, filter_eps=filter_eps(recipe),
            **head(model),
        )  # fmt: skip


def filter_eps(recipe: Recipe) -> Any:
    return "auto" if recipe.filter_eps is None else recipe.filter_eps


def sums(logp: Tensor, rollouts: list[Rollout]) -> Tensor:
    return torch.stack([x.sum() for x in logp.split([len(r.completion_ids) for r in rollouts])])


def loop_step(
    model: LlamaForCausalLM, frozen: LlamaForCausalLM, rollouts: list[Rollout], recipe: Recipe, way: Ours
) -> float:
    """Adds the gradient as the loop does, reference log-probs included, and returns the loss. For "kto" the reference
    point is TRL's, of the whole batch."""
    z = 0.0
    if way.objective == "kto":
        pairs = rotated(rollouts)
        both = [sums(torch.cat(log_probs(each, pairs, recipe)), pairs) for each in (model, frozen)]
        z = float((both[0] - both[1]).mean())
    logps = log_probs(frozen, rollouts, recipe)
    scored = [replace(r, ref_logps=x.tolist()) for r, x in zip(rollouts, logps, strict=True)]
    return accumulate_gradients(model, scored, recipe, class_weights(rollouts, recipe), (z, 0.0)).loss


def grouped_step(
    model: LlamaForCausalLM, frozen: LlamaForCausalLM, rollouts: list[Rollout], recipe: Recipe, way: Ours, count: int
) -> float:
    """The same in micro-batches of `count` completions, each with its own estimate of KL."""
    supervised = sum(any(x != UNLABELLED for x in r.step_labels) for r in rollouts)
    total = 0.0
    for start in range(0, len(rollouts), count):
        group, z = rollouts[start : start + count], 0.0
        with torch.no_grad():
            if way.objective == "kto":
                pairs = rotated(group)
                both = [sums(completion_logps(each, pairs, way, recipe), pairs) for each in (model, frozen)]
                z = float((both[0] - both[1]).mean())
            ref_logp = completion_logps(frozen, group, way, recipe)
        b = pack(group)
        logp = completion_logps(model, group, way, recipe, metrics=True)
        loss = step_kto(
            logp, ref_logp, b.cu_seqlens, b.cu_steps, b.labels, b.step_labels, kl=max(z, 0.0), beta=recipe.beta,
            step_beta=recipe.step_beta, outcome_weight=recipe.outcome_weight, step_weight=recipe.step_weight,
            num_completions=len(rollouts), num_supervised=max(supervised, 1),
        ).loss  # fmt: skip
        loss.backward()
        total += float(loss.detach())
    return total


def ours(way: Ours, size: Size, dtype: str) -> Callable[[], dict]:
    """A call that takes one step on a model of its own; returns the loss, and the gradient's norm before it."""
    for op in ("linear_logp", "step_kto"):
        if reason := backends.why_not(op, way.backend):
            raise UnsupportedError(f"{op}, {way.backend}: {reason}")
    model, frozen, rollouts, recipe = policy(size), reference(size), batch(size), way.recipe(dtype)
    if not way.packed:
        for each in (model, frozen):
            each.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(recipe.adam_beta1, recipe.adam_beta2),
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    passes, micro_batches = Passes(model, frozen), 1
    gradients = partial(loop_step, model, frozen, rollouts, recipe, way)
    if way.grouped or not way.packed:
        gradients = partial(grouped_step, model, frozen, rollouts, recipe, way, size.per_device)
        micro_batches = -(-len(rollouts) // size.per_device)

    def step() -> dict:
        passes.clear()
        with backend(way.backend):
            loss = gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "gradient_norm": norm} | passes.facts(micro_batches)

    return step


def truths(size: Size) -> dict:
    """Loss and gradient's norm of a first step to each objective, by the reference backend in fp32."""
    ways = {way.truth.name: way.truth for way in PROVIDERS.values() if not isinstance(way, Engine)}
    return {name: ours(way, size, "fp32")() for name, way in ways.items()}


class Passes:
    """Counts what goes through the trunks of some models."""

    def __init__(self, *models: LlamaForCausalLM):
        self.clear()
        for model in models:
            model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls += 1
        self.positions += kwargs["input_ids"].numel()

    def clear(self) -> None:
        self.calls = self.positions = 0

    def facts(self, micro_batches: int = 1) -> dict:
        return {"forwards": self.calls / micro_batches, "trunk_positions": self.positions}


# --- TRL --------------------------------------------------------------------------------------------------------------


def tokenizer(size: Size) -> Any:
    """One word a token, so that TRL's tokenization gives the very ids back."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(f"t{n}" for n in range(SPECIAL, size.vocabulary))]
    inner = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def dataset(size: Size, copies: int) -> Any:
    """The batch as TRL reads it, again and again: it trains through a dataset in order, one batch a step."""
    from datasets import Dataset

    rollouts, words = batch(size), tokenizer(size).convert_ids_to_tokens(range(size.vocabulary))
    text = {
        "prompt": [" ".join(words[t] for t in r.prompt_ids) for r in rollouts],
        "completion": ["".join(f" {words[t]}" for t in r.completion_ids) for r in rollouts],
        "label": [r.label for r in rollouts],
    }
    return Dataset.from_dict({name: column * copies for name, column in text.items()})


def train(way: Trl, size: Size, dtype: str, clock: "Clock") -> None:
    """TRL's KTOTrainer, at the settings that suit a CPU: no gradient checkpointing, its own fused AdamW, the fastest
    micro-batch."""
    from transformers import TrainerCallback
    from trl import KTOConfig, KTOTrainer

    model, frozen = policy(size), reference(size)
    for each in (model, frozen):
        each.set_attn_implementation("sdpa")
    passes = Passes(model, frozen)
    micro_batches = -(-size.problems * size.samples // size.per_device)
    copies = 1 if way.precomputed else 8

    class Trainer(KTOTrainer):
        """Tells its losses, the norm of the first step's gradient, and what the precomputation takes for a batch."""

        losses: list[float]
        norm = precompute_s = 0.0
        precomputing = 0  # positions

        def _precompute_ref_logps(self, *arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            found = super()._precompute_ref_logps(*arguments, **options)
            self.precompute_s = (time.perf_counter() - start) / copies
            self.passes = passes.facts(micro_batches * copies)
            return found

        def training_step(self, *arguments: Any, **options: Any) -> Tensor:
            loss = super().training_step(*arguments, **options)
            self.losses.append(float(loss))
            if self.state.global_step == 0:
                gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                self.norm = float(torch.nn.utils.get_total_norm(gradients))
            return loss

    class Boundaries(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            self.begin()

        def begin(self) -> None:
            passes.clear()
            trainer.losses = []
            clock.begin()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            facts = {"loss": sum(trainer.losses), "gradient_norm": trainer.norm} | passes.facts(micro_batches)
            facts["micro_batches"] = micro_batches
            if way.precomputed:
                facts |= {"precompute_s": trainer.precompute_s, "before_s": trainer.precompute_s}
                facts["forwards"] += trainer.passes["forwards"]
                facts["trunk_positions"] += trainer.passes["trunk_positions"] // copies
            clock.end(facts)
            self.begin()

    with tempfile.TemporaryDirectory() as folder:
        config = KTOConfig(
            output_dir=folder, use_cpu=True, bf16=dtype == "bf16", gradient_checkpointing=False, max_steps=1000,
            per_device_train_batch_size=size.per_device, gradient_accumulation_steps=micro_batches, max_length=None,
            beta=BETA, loss_type="apo_zero_unpaired" if way.objective == "outcome" else "kto",
            precompute_ref_log_probs=way.precomputed, use_liger_kernel=way.liger, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", adam_beta2=Recipe.adam_beta2, max_grad_norm=Recipe.max_grad_norm,
            report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model=model, ref_model=frozen, args=config, train_dataset=dataset(size, copies),
            processing_class=tokenizer(size), callbacks=[Boundaries()],
        )  # fmt: skip
        try:
            trainer.train()
        except RuntimeError as error:
            if not way.liger:
                raise
            raise UnsupportedError(f"Liger's layers are Triton kernels, which need a GPU: {one_line(error)}") from error


# --- sampling ---------------------------------------------------------------------------------------------------------


def sampler(way: Engine, size: Size, dtype: str) -> Callable[[], dict]:
    """A call that samples as the loop does; the same samples every time."""
    from stepkto_fast.sampler import open_sampler

    model, words = policy(size).eval(), tokenizer(size)
    recipe = Recipe(engine=way.engine, bf16=dtype == "bf16", context_length=model.config.max_position_embeddings)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name)
    model.save_pretrained(path)
    words.save_pretrained(path)
    if way.engine == "transformers" and recipe.bf16:
        model = model.to(torch.bfloat16)  # as vLLM does; the loop would sample with its fp32 weights
    engine = open_sampler(recipe, model, words, path, path / "engine.log")
    if way.engine == "vllm":
        engine.sync(model)
    asked = prompts(size)

    def step() -> dict:
        drawn = engine.sample(asked, n=GENERATIONS, temperature=1.0, max_tokens=size.generated, seed=0)
        samples = [sample for group in drawn for sample in group]
        return {"tokens": sum(len(s.token_ids) for s in samples), "finished": sum(s.finished for s in samples)}

    step.folder = folder  # type: ignore[attr-defined]  # lives as long as the sampler
    return step


# --- the conversation with the parent ---------------------------------------------------------------------------------


class FinishedError(Exception):
    """The parent wants no more steps."""


class Clock:
    """Takes the time of what happens between `begin`, which waits for a request, and `end`, which answers it.

    Requests are "check" (the first step, whose routing is watched), "memory" and "step". The first two also tell the
    peak: the highest resident size less what was resident when the step began; None where the system does not say. For
    it every block of 64 KiB and more is mapped afresh: glibc would hand out again, unseen, what it had kept.
    """

    def __init__(self, requests: Iterator[str], answer: Callable[[dict], None]):
        self.requests, self.answer = requests, answer

    def begin(self) -> None:
        request = next(self.requests, "quit")
        if request == "quit":
            raise FinishedError
        self.peaks = request != "step" and CLEAR.exists()
        allocator(FRESH if self.peaks else ADAPTED)
        if self.peaks:
            gc.collect()
            trim()
            CLEAR.write_text("5")
            self.resident = resident("VmRSS")
        self.watching = watch() if request == "check" else contextlib.nullcontext([])
        self.calls = self.watching.__enter__()
        self.start = time.perf_counter()

    def end(self, facts: dict) -> None:
        seconds = time.perf_counter() - self.start
        self.watching.__exit__(None, None, None)
        found = {"seconds": seconds + facts.pop("before_s", 0.0), **facts}
        found["peak_bytes"] = max(0, resident("VmHWM") - self.resident) if self.peaks else None
        if self.calls:
            found |= {"rho": self.calls[0].rho, "path": self.calls[0].path}
        self.answer(found)


def trim() -> None:
    """Hands what glibc keeps back to the system."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def work(name: str, size: Size, dtype: str, clock: Clock) -> None:
    """Takes steps until `clock` says that it is enough."""
    if name == TRUTH:
        clock.begin()
        clock.end(truths(size))
        return
    way = PROVIDERS[name]
    if isinstance(way, Trl):
        train(way, size, dtype, clock)
        return
    step = ours(way, size, dtype) if isinstance(way, Ours) else sampler(way, size, dtype)
    while True:
        clock.begin()
        clock.end(step())


def serve(name: str, size: Size, dtype: str, requests: IO[str], answers: IO[str]) -> None:
    """Answers requests, one JSON a line, until there are no more or a step fails."""

    def answer(found: dict) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        work(name, size, dtype, Clock(map(str.strip, requests), answer))
    except FinishedError:
        pass
    except (ImportError, UnsupportedError) as error:
        answer({"skipped": one_line(error)})
    except Exception as error:
        answer({"failed": f"{type(error).__name__}: {one_line(error)}"})
        raise


def one_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Nursery:
    """A process that has imported what all providers need and forks one for each: imports take longer than most steps.

    It has never computed anything, so there are no threads that a fork would lose. The parent's requests come over a
    socket: "start", with a socket and a file for stderr, is answered by the process id, "wait" by the exit code.
    """

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, "--nursery", str(theirs.fileno())]
            found_here = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=found_here
            )

    def ask(self, request: list, files: Sequence[int] = ()) -> int:
        socket.send_fds(self.socket, [json.dumps(request).encode()], files)
        answer = self.socket.recv(64)
        if not answer:
            raise RuntimeError(f"the process that forks the others ended with code {self.process.wait()}")
        return int(answer)

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


def nurse(descriptor: int) -> None:
    """The nursery's own side. Whatever a provider's libraries print goes to its stderr."""
    with socket.socket(fileno=descriptor) as parent:
        while True:
            message, files, *_ = socket.recv_fds(parent, 4096, 2)
            if not message:
                return
            kind, *rest = json.loads(message)
            if kind == "wait":
                answer = os.waitstatus_to_exitcode(os.waitpid(rest[0], 0)[1])
            else:
                answer = os.fork()
                if not answer:
                    parent.close()
                    os._exit(forked(*rest, *files))
                for each in files:
                    os.close(each)
            parent.send(str(answer).encode())


def forked(name: str, shape: str, dtype: str, conversation: int, stderr: int) -> int:
    for standard in (1, 2):
        os.dup2(stderr, standard)
    try:
        with socket.socket(fileno=conversation) as parent, parent.makefile("r") as asked, parent.makefile("w") as told:
            serve(name, SIZES[shape], dtype, asked, told)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


class Child:
    """A process that takes one step a request."""

    def __init__(self, nursery: Nursery, name: str, shape: str, dtype: str):
        self.nursery = nursery
        self.stderr: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.pid = nursery.ask(["start", name, shape, dtype], [theirs.fileno(), self.stderr.fileno()])
        self.answers = self.socket.makefile("r")

    def ask(self, request: str) -> dict:
        """The answer, or {"skipped": reason} or {"failed": reason}, also where the process died."""
        line = ""
        # One that has failed before it was asked has ended, but said why first: what it said can still be read.
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(f"{request}\n".encode())
        with contextlib.suppress(ConnectionError):
            line = self.answers.readline()
        if line:
            return json.loads(line)
        code = self.nursery.ask(["wait", self.pid])
        self.pid = 0
        self.stderr.seek(0)
        last = next((text for text in reversed(self.stderr.read().splitlines()) if text.strip()), "it printed nothing")
        return {"failed": f"the process ended with code {code}: {last.strip()}"}

    def close(self) -> None:
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(b"quit\n")
        self.answers.close()
        self.socket.close()
        if self.pid:
            self.nursery.ask(["wait", self.pid])
        self.stderr.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--provider", default=STEP_KTO, choices=list(PROVIDERS))
    parser.add_argument("--shape", default="goal", choices=list(SIZES))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=3, help="timed steps, after one that warms up and one for memory")
    parser.add_argument("--per-device", type=int, help="completions of TRL's micro-batch")
    parser.add_argument("--json", action="store_true", help="one JSON for all steps instead of a line each")
    parser.add_argument("--nursery", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.nursery is not None:
        nurse(given.nursery)
        return
    size = SIZES[given.shape]
    if given.per_device:
        size = size._replace(per_device=given.per_device)
    found: list[dict] = []
    requests = iter(["check", "memory", *["step"] * given.rounds])
    with contextlib.suppress(FinishedError):
        work(given.provider, size, given.dtype, Clock(requests, found.append if given.json else print))
    if given.json:
        print(json.dumps({"tokens": count_tokens(batch(size)), "steps": found}, indent=1))


if __name__ == "__main__":
    main()
