"""The recipe: every setting of a run and its default.

The defaults are the embedded recipe `demo`. Names follow transformers' and TRL's training arguments where those have
one. `python -m stepkto_fast.train --help` prints them all.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import yaml

from .atomic import replacing
from .errors import RunError
from .settings import parse_settings, setting


@dataclass
class Recipe:
    """One run of the loop. Rates are fractions of 1, log-probs and KL are in nats, lengths in tokens."""

    name: str = setting("demo", "name of the recipe, shown in the report")
    output_dir: str = setting("runs/demo", "run directory")
    resume: bool = setting(False, "continue the run in output_dir from its newest checkpoint")
    overwrite: bool = setting(False, "replace a run that is already in output_dir")
    seed: int = setting(0, "seed of everything: problems, model, sampling, order")

    # problems
    task: Literal["arithmetic", "math"] = setting("arithmetic", "what the problems are and who checks them")
    level: Literal["chain", "nested", "words"] = setting("chain", "style of the generated problems")
    min_operations: int = setting(4, "fewest operations of a generated problem")
    max_operations: int = setting(6, "most operations of a generated problem")
    train_dataset: str | None = setting(
        None,
        "training problems: a file, or for task math a dataset's name (docs/tasks.md); none: arithmetic generates "
        "them, math takes its sample",
    )
    test_dataset: str | None = setting(None, "held-out problems, in the same way")
    train_split: str | None = setting(None, "split of train_dataset; none: the one that the dataset is known for")
    test_split: str | None = setting(None, "split of test_dataset, in the same way")
    question_column: str | None = setting(None, "column of the question (task math); none: as the dataset is known")
    answer_column: str | None = setting(None, "column of the gold answer (task math); none: as the dataset is known")
    num_prompts: int = setting(500, "training problems of each iteration: fresh ones, or drawn anew from train_dataset")
    num_test_problems: int = setting(500, "held-out problems of every evaluation; of test_dataset, at most so many")
    system_prompt: str | None = setting(
        None, "system message (task math); in front of the question where the model has no such role"
    )
    instruction: str | None = setting(None, "text behind each question (task math); none: asks for numbered steps")
    answer_workers: int = setting(2, "processes that compare answers (task math)")
    answer_timeout: float = setting(5.0, "seconds after which an answer counts as unverified (task math)")

    # policy
    model: str | None = setting(None, "model to train: a save_pretrained directory or a hub name; none: build M_0 here")
    hidden_size: int = setting(128, "hidden size of the built model")
    num_layers: int = setting(3, "layers of the built model")
    num_heads: int = setting(4, "attention heads of the built model")
    context_length: int = setting(256, "longest sequence, prompt and completion, in tokens")
    warm_start_steps: int = setting(500, "supervised steps that make M_0 of a built model")
    warm_start_batch_size: int = setting(64, "demonstrations a supervised step")
    warm_start_learning_rate: float = setting(2e-3, "peak learning rate of the supervised steps")
    misconceptions: float = setting(0.3, "share of the arithmetic facts that the demonstrations teach wrong")
    misconception_rate: float = setting(0.6, "how often such a fact is written wrong")
    slip_rate: float = setting(0.04, "how often any other step is written wrong")

    # rollouts
    engine: Literal["auto", "vllm", "transformers"] = setting("auto", "who samples; auto: vllm where installed")
    num_generations: int = setting(8, "completions sampled for each prompt")
    temperature: float = setting(1.0, "sampling temperature; log-probs are taken at it everywhere")
    max_completion_length: int = setting(64, "longest completion, in tokens")
    num_eval_generations: int = setting(8, "completions for each held-out problem, for Maj@k")
    weight_sync_tolerance: float | None = setting(
        None,
        "largest allowed difference of sampled and recomputed log-probs; none: 1e-3 in fp32, 5e-2 in bf16",
    )
    rollout_shard_size: int | None = setting(
        None,
        "prompts that are sampled and stored together: what a killed run loses at most; none: 512, or fewer where "
        "every rank then has some",
    )
    vllm_memory: float = setting(0.3, "share of the GPU's memory for vLLM")
    vllm_mode: Literal["colocate", "server", "ray"] = setting(
        "colocate", "where vLLM runs: in the trainer's own process, behind vllm_server_url, or in Ray actors"
    )
    vllm_sleep: bool = setting(False, "free vLLM's memory while the trainer works (vllm_mode: colocate, on a GPU)")
    vllm_server_url: str | None = setting(None, "http://host:port of `vllm serve` (vllm_mode: server)")
    vllm_sync: Literal["reload", "nccl"] = setting(
        "reload",
        "how weights reach the server: by a folder that both hosts see, or from GPU to GPU (vllm_mode: server)",
    )
    vllm_timeout: float = setting(600.0, "seconds after which an engine that does not answer has failed")
    ray_address: str | None = setting(None, "Ray cluster to join; none: one on this machine (vllm_mode: ray)")
    ray_engines: int = setting(2, "vLLM engines under Ray")
    max_staleness: Literal[0, 1] = setting(
        0,
        "iterations by which rollouts may be older than the policy: with 1 the next iteration's are sampled while the "
        "update runs",
    )
    importance_correction: Literal["none", "token", "sequence"] = setting(
        "none", "weights gradients by how likely the trained policy finds what was sampled: a token or a completion"
    )
    importance_cap: float = setting(2.0, "largest weight of the importance correction")

    # steps and their labels
    step_style: Literal["lines", "step", "heading", "blank_line", "numbered", "shepherd", "regex", "auto"] = setting(
        "lines", "how completions are cut into steps (docs/evaluation.md)"
    )
    step_pattern: str | None = setting(None, "regular expression of what separates steps (step_style: regex)")
    label_source: Literal["head", "monte_carlo", "consensus", "dataset", "checker"] = setting(
        "head",
        "who labels the steps of rollouts: the PRM head, continuations from each step, both where they agree, nobody "
        "(offline: labelled_dataset takes the place of rollouts), or the task's exact checker",
    )
    labelled_dataset: str | None = setting(None, "labelled completions to train on offline (label_source: dataset)")
    labelled_format: Literal["auto", "stepwise", "unpaired", "prm800k", "math_shepherd", "processbench"] = setting(
        "auto", "format of labelled_dataset and prm_dataset (docs/data.md)"
    )
    labelled_split: str | None = setting(None, "split of labelled_dataset and prm_dataset")
    labelled_neutral: Literal["correct", "incorrect", "unlabelled"] = setting(
        "correct", "what PRM800K's rating 0 means"
    )
    mc_continuations: int = setting(8, "continuations from each step's end (label_source: monte_carlo, consensus)")
    mc_labels: Literal["hard", "soft"] = setting(
        "hard", "hard: a step is right when any continuation is; soft: when a share of mc_threshold is"
    )
    mc_threshold: float = setting(0.5, "share of right continuations from which a step is right (mc_labels: soft)")
    mc_temperature: float = setting(1.0, "temperature of the continuations")
    step_label_noise: float = setting(
        0.0, "share of the step labels that are flipped before the update sees them, to study what wrong labels do"
    )

    # PRM head
    prm: str | None = setting(None, "directory of a PRM head that train_prm wrote, instead of fitting one here")
    prm_dataset: str | None = setting(None, "step-labelled dataset that the head is fitted on, instead of a seed set")
    prm_audit: bool = setting(
        True, "fit a PRM head to audit it, where labels come from elsewhere; false: only where labels come from it"
    )
    prm_labels: Literal["checker", "monte_carlo"] = setting("checker", "who labels the steps of the head's seed set")
    prm_pooling: Literal["attention", "last"] = setting(
        "attention", "attention: over the step's tokens; last: a linear layer on its last token's hidden state"
    )
    prm_class_weights: Literal["balanced", "none"] = setting(
        "none", "balanced: right and wrong steps weigh the same in the head's loss"
    )
    prm_trunk: Literal["policy", "initial", "trained"] = setting(
        "initial",
        "whose hidden states the PRM head reads: the current policy's (detached, refitted each iteration), M_0's "
        "(frozen, fitted once), or a copy of the policy's that the head's gradient trains (refitted each iteration)",
    )
    prm_seed_problems: int = setting(400, "labelled seed problems that the PRM head is fitted on")
    prm_seed_generations: int = setting(6, "M_0's completions for each seed problem")
    prm_seed_temperature: float = setting(1.5, "temperature of half of them, for mistakes that M_0 seldom makes")
    prm_epochs: int = setting(16, "passes over the seed set for each fit")
    prm_learning_rate: float = setting(2e-3, "peak learning rate of the head")
    prm_trunk_learning_rate: float = setting(1e-4, "learning rate of the trunk's copy (prm_trunk: trained)")

    # objective
    objective: Literal["step_kto", "rft", "dpo"] = setting(
        "step_kto",
        "what the update learns from: outcomes and steps, right completions alone (rejection-sampling fine-tuning), or "
        "pairs of a right and a wrong completion (docs/objective.md)",
    )
    beta: float = setting(
        12.5,
        "temperature of the outcome value function, by docs/study.md for the demo's model (KTO's paper and our recipes "
        "for large ones have 0.1); objective dpo: of the pairs' log-ratios",
    )
    step_beta: float = setting(12.5, "temperature of the step value function, chosen as beta")
    outcome_weight: float = setting(1.0, "weight of the outcome loss")
    step_weight: float = setting(1.0, "weight of the step loss; 0 is outcome-only KTO")
    step_reduction: Literal["mean", "sum"] = setting("mean", "over a completion's labelled steps")
    after_first_error: Literal["keep", "mask"] = setting("keep", "what becomes of steps behind the first wrong one")
    loss_type: Literal["kto", "apo_zero_unpaired"] = setting("kto", "value function")
    class_weights: Literal["balanced", "none"] = setting(
        "balanced",
        "balanced: right and wrong weigh the same in each iteration, for outcomes and for steps; none: as set below",
    )
    desirable_weight: float = setting(1.0, "weight of right answers (class_weights: none)")
    undesirable_weight: float = setting(1.0, "weight of wrong answers (class_weights: none)")
    step_desirable_weight: float = setting(1.0, "weight of right steps (class_weights: none)")
    step_undesirable_weight: float = setting(1.0, "weight of wrong steps (class_weights: none)")
    reference: Literal["previous", "initial"] = setting("previous", "the model the ratios are against: M_t or M_0")
    reference_points: Literal["zero", "lagged", "exact", "mismatched"] = setting("zero", "estimator of z and z_s")
    filter_eps: float | None = setting(None, "share of a token's gradient mass that may be dropped; none: auto")

    # update
    lora_rank: int = setting(0, "rank of LoRA adapters, merged after each iteration; 0: all weights are trained")
    lora_alpha: int = setting(32, "LoRA's scale: adapters count lora_alpha / lora_rank")
    lora_target: str = setting("all-linear", "modules with adapters: a regular expression or all-linear")
    lora_train_head: bool = setting(False, "train the LM head in full beside the adapters")
    lora_merge: Literal["iteration", "end"] = setting(
        "iteration",
        "when adapters are merged into the weights: after each iteration, or at the end of the run (one set of "
        "adapters; M_0 is the model without them, so no second one is held)",
    )
    lora_sync: Literal["merged", "adapters"] = setting(
        "merged", "what vLLM gets: merged weights, or the adapters alone (lora_merge: end)"
    )
    iterations: int = setting(3, "iterations M_0 -> M_1 -> ...")
    num_train_epochs: int = setting(1, "passes over an iteration's rollouts")
    train_batch_size: int = setting(64, "completions an optimizer step")
    max_tokens_per_micro_batch: int = setting(
        8192,
        "trunk tokens of a packed micro-batch; 0: as many as the planner fits into memory; halved when memory runs out",
    )
    gradient_checkpointing: bool = setting(
        False,
        "keep only each layer's input for the backward and compute the rest again: less memory, a third more time",
    )
    learning_rate: float = setting(1e-4, "peak learning rate")
    lr_scheduler_type: Literal["linear", "constant", "cosine"] = setting("linear", "schedule within an iteration")
    warmup_steps: int = setting(4, "warm-up steps of each iteration")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    adam_beta1: float = setting(0.9, "AdamW's beta1")
    adam_beta2: float = setting(0.95, "AdamW's beta2")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    bf16: bool = setting(False, "run trunk and engine in bf16 (weights and optimizer stay fp32)")
    device: str | None = setting(None, "cpu or cuda; none: cuda where there is one")
    deterministic: bool = setting(False, "only algorithms that give the same bits in every run (slower on a GPU)")
    distributed_timeout: float = setting(
        1800.0, "seconds after which a rank that waits for the others fails (torchrun)"
    )

    # watchdogs
    watch: Literal["warn", "stop", "off"] = setting(
        "warn", "what follows when log-ratios, KL, labels or rewards look wrong (docs/faults.md)"
    )
    watch_log_ratio: float = setting(50.0, "largest |log-ratio| of a completion in nats that looks right")
    watch_kl: float = setting(20.0, "largest mean KL from M_0 in nats a completion that looks right")

    # records
    save_steps: int = setting(25, "optimizer steps between checkpoints within an iteration")
    logging_steps: int = setting(1, "optimizer steps between log lines")
    report_to: Literal["tensorboard", "wandb", "none"] = setting(
        "tensorboard", "where scalars go besides metrics.jsonl"
    )

    def __post_init__(self) -> None:
        positive = (
            "num_prompts num_test_problems num_generations num_eval_generations max_completion_length iterations "
            "num_train_epochs train_batch_size save_steps logging_steps prm_epochs "
            "prm_seed_generations hidden_size num_layers num_heads min_operations warm_start_steps "
            "warm_start_batch_size answer_workers mc_continuations lora_alpha context_length ray_engines"
        )
        for key in positive.split():
            if getattr(self, key) < 1:
                raise RunError(f"{key} is {getattr(self, key)}: give at least 1")
        if self.prm_seed_problems < 10:
            raise RunError(f"prm_seed_problems is {self.prm_seed_problems}: calibration needs at least 10")
        for key in (
            "temperature",
            "prm_seed_temperature",
            "learning_rate",
            "beta",
            "step_beta",
            "answer_timeout",
            "mc_temperature",
            "vllm_timeout",
            "distributed_timeout",
            "importance_cap",
            "watch_log_ratio",
            "watch_kl",
            "max_grad_norm",
            "prm_learning_rate",
            "prm_trunk_learning_rate",
            "warm_start_learning_rate",
        ):
            if not getattr(self, key) > 0:
                raise RunError(f"{key} is {getattr(self, key)}: give a positive one")
        for key in (
            "desirable_weight",
            "undesirable_weight",
            "step_desirable_weight",
            "step_undesirable_weight",
            "outcome_weight",
            "step_weight",
            "weight_decay",
            "warmup_steps",
        ):
            if not getattr(self, key) >= 0:
                raise RunError(f"{key} is {getattr(self, key)}: give 0 or more")
        for key in ("adam_beta1", "adam_beta2", "filter_eps"):
            if getattr(self, key) is not None and not 0 <= getattr(self, key) < 1:
                raise RunError(f"{key} is {getattr(self, key)}: give a number from 0 to below 1")
        for key in ("misconceptions", "misconception_rate", "slip_rate", "step_label_noise"):
            if not 0 <= getattr(self, key) <= 1:
                raise RunError(f"{key} is {getattr(self, key)}: give a share from 0 to 1")
        if not 0 < self.mc_threshold <= 1:
            raise RunError(f"mc_threshold is {self.mc_threshold}: give a share above 0, up to 1")
        if self.hidden_size % (2 * self.num_heads):
            raise RunError(f"hidden_size {self.hidden_size} must be a multiple of twice num_heads ({self.num_heads})")
        if self.max_operations < self.min_operations:
            raise RunError(f"max_operations {self.max_operations} is below min_operations {self.min_operations}")
        if self.max_tokens_per_micro_batch < 0:
            raise RunError(
                f"max_tokens_per_micro_batch is {self.max_tokens_per_micro_batch}: give at least 1, or 0 for as many "
                "as fit"
            )
        if self.rollout_shard_size is not None and self.rollout_shard_size < 1:
            raise RunError(f"rollout_shard_size is {self.rollout_shard_size}: give at least 1")
        if (self.vllm_mode == "server") != (self.vllm_server_url is not None):
            raise RunError(
                f"vllm_mode is {self.vllm_mode!r} and vllm_server_url {self.vllm_server_url!r}: a server takes both, "
                "vllm_mode server and its address"
            )
        if self.vllm_sync == "nccl" and self.vllm_mode != "server":
            raise RunError(f"vllm_sync nccl sends weights to a server, and vllm_mode is {self.vllm_mode!r}: set server")
        if self.vllm_mode != "colocate" and self.engine == "transformers":
            raise RunError(f"vllm_mode {self.vllm_mode} is vLLM's, and engine is transformers: drop one of the two")
        if not self.lora_rank and (self.lora_train_head or self.lora_merge == "end"):
            raise RunError(
                f"lora_train_head is {self.lora_train_head} and lora_merge {self.lora_merge!r}, and lora_rank 0 trains "
                "all weights: set lora_rank, or leave the other two as they are by default"
            )
        if self.lora_merge == "end" and self.prm_trunk == "trained":
            raise RunError("prm_trunk trained copies a policy whose adapters live through the run: set it to initial")
        if self.ray_address is not None and self.vllm_mode != "ray":
            raise RunError(f"ray_address {self.ray_address!r} is for vllm_mode ray, not {self.vllm_mode}")
        if self.lora_sync == "adapters" and self.max_staleness:
            raise RunError(
                "lora_sync adapters cannot bring back older weights: set it to merged, or max_staleness to 0"
            )
        if self.label_source == "dataset" and (self.max_staleness or self.importance_correction != "none"):
            raise RunError(
                "label_source dataset trains on completions that no engine sampled: set max_staleness to 0 and "
                "importance_correction to none"
            )
        if self.lora_sync == "adapters" and not (self.lora_rank and self.lora_merge == "end"):
            raise RunError("lora_sync adapters hands one set of adapters to vLLM: set lora_rank, and lora_merge to end")
        if self.lora_sync == "adapters" and self.lora_train_head:
            raise RunError("lora_sync adapters cannot carry a trained LM head: set lora_sync to merged")
        if self.lora_rank < 0:
            raise RunError(f"lora_rank is {self.lora_rank}: give 0 to train all weights, or the adapters' rank")
        if (self.step_style == "regex") != (self.step_pattern is not None):
            raise RunError(
                f"step_style is {self.step_style!r} and step_pattern {self.step_pattern!r}: the style regex takes a "
                "pattern, the others take none"
            )
        if (self.label_source == "dataset") != (self.labelled_dataset is not None):
            raise RunError(
                f"label_source is {self.label_source!r} and labelled_dataset {self.labelled_dataset!r}: offline "
                "training takes both, label_source dataset and the dataset"
            )
        if self.loss_type == "apo_zero_unpaired" and self.reference_points != "zero":
            raise RunError("loss_type apo_zero_unpaired has no reference point: set reference_points to zero")
        if self.objective != "step_kto":
            self._require_baseline()
        if self.reference_points == "mismatched" and self.train_batch_size <= self.num_generations:
            raise RunError(
                f"reference_points mismatched needs completions of several prompts in a batch: raise train_batch_size "
                f"({self.train_batch_size}) well above num_generations ({self.num_generations})"
            )

    def _require_baseline(self) -> None:
        """RunError for settings of Step-KTO that contradict another objective."""
        for key, only in (("reference_points", "zero"), ("importance_correction", "none"), ("loss_type", "kto")):
            if getattr(self, key) != only:
                raise RunError(
                    f"{key} is {getattr(self, key)!r} and objective {self.objective!r}, which has none: set {key} to "
                    f"{only}, or objective to step_kto"
                )
        if self.objective == "dpo" and self.train_batch_size < 2:
            raise RunError(
                f"objective dpo learns from pairs, and train_batch_size is {self.train_batch_size}: give at least 2"
            )


def needs_seed(recipe: Recipe) -> bool:
    """Whether labels come from a PRM head that is fitted on samples of the run's own problems."""
    return recipe.label_source in ("head", "consensus") and recipe.prm is None and recipe.prm_dataset is None


def parse_recipe(argv: list[str]) -> Recipe:
    """The recipe of `python -m stepkto_fast.train [recipe.yaml] [--key value ...]`; as `parse_settings`."""
    return parse_settings(Recipe, argv, "stepkto_fast.train")


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved settings as YAML that `parse_recipe` reads back."""
    settings = asdict(recipe)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != settings:  # a control character that YAML takes for the end of a line
        text = yaml.safe_dump(settings, sort_keys=False)
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
