"""Packed Step-KTO for users of TRL: `StepKTOTrainer`, a `KTOTrainer` that also learns from labels of single steps.

    from stepkto_fast.integrations.trl_trainer import StepKTOConfig, StepKTOTrainer

    StepKTOTrainer("Qwen/Qwen3-0.6B", args=StepKTOConfig("out", step_beta=0.5), train_dataset=rows).train()

The rows are those of `stepwise_rows`, the objective that of docs/objective.md. What is not as in `KTOTrainer`:

- Completions lie side by side in one row of tokens, without padding; prompts do not reach the LM head. The model's
  attention is set to `stepkto_packed` for that: before you generate with it, call `set_attn_implementation("sdpa")`.
- Means are over the whole optimizer batch. Loss and gradient do not depend on how `gradient_accumulation_steps`,
  `per_device_train_batch_size` and the number of processes share it out. (Of a stream, transformers takes no step for
  micro-batches left over at the end of an epoch and adds their gradient to the next one.) Evaluation means are over
  the whole data set (on several processes, with the rows that accelerate repeats to fill the last batch).
- Reference points come from earlier batches or are 0, so a batch of one and any order of rows will do. `kl` and
  `step_kl` are logged as they are before they are clamped at 0.
- Logits are never formed: there are no `logits/*` and `entropy` metrics.
- Rows without room for a completion within `max_length` are dropped with a warning; steps behind it are lost, and a
  step that it cuts in two loses its label.
"""

import json
import math
import warnings
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from stepkto_kernels import StepKTOOutput
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..objective import LaggedPoints, balance
from ..packing import PackedBatch
from ..rollout import UNLABELLED
from ..stepwise_rows import COLUMNS, collate, tokenize_row
from . import require
from .packed_forward import add_packed_forward
from .trl import SUPPORTED

require("trl", SUPPORTED, "stepkto_fast.integrations.trl_trainer")

from trl import KTOTrainer  # noqa: E402
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402
from trl.trainer.utils import get_config_model_id, global_then_local_main_first, use_adapter  # noqa: E402

from .trl_config import WEIGHTS, StepKTOConfig  # noqa: E402

POINTS_FILE = "reference_points.json"  # in a checkpoint, beside the optimizer's state


class StepKTOTrainer(KTOTrainer):
    """`KTOTrainer` with the packed Step-KTO objective; its arguments, but for the collator and `compute_metrics`.

    Metrics have TRL's names, and `step_` before them where they are of steps: `rewards/chosen` (of right ones),
    `rewards/rejected`, `rewards/margins`, `logps/chosen`, `logps/rejected`, `kl`; and `outcome_loss`, `step_loss`.

    Raises:
        ValueError: a row that is not as `stepwise_rows` says (named by its number); no labelled step in the training
            rows but a step_weight; a model, adapter or launcher that cannot work with packing.
        TypeError: args is not a `StepKTOConfig`.
    """

    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "kto", "step-kto"]  # noqa: RUF012
    _name = "Step-KTO"
    _paper = {  # noqa: RUF012
        "title": "Step-KTO: Optimizing Mathematical Reasoning through Stepwise Binary Feedback",
        "id": "2501.10799",
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: StepKTOConfig | None = None,
        data_collator: None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        **others: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = StepKTOConfig(f"{name.split('/')[-1]}-Step-KTO")
        if not isinstance(args, StepKTOConfig):
            raise TypeError(f"args is a {type(args).__name__}; expected a StepKTOConfig")
        if data_collator is not None:
            raise ValueError("data_collator does not work with packed completions: leave it None")
        if compute_metrics is not None:
            raise ValueError("compute_metrics reads logits, which are never formed: leave it None")
        self.lagged = LaggedPoints()
        self._packs = False
        self._sums: dict[str, Tensor | None] = {"train": None, "eval": None}
        # KTOTrainer prepares mismatched pairs, and asks for larger batches in a fixed order, for a reference point of
        # its own; this loss it knows to have none.
        loss_type, args.loss_type = args.loss_type, "apo_zero_unpaired"
        try:
            super().__init__(
                model,
                ref_model,
                args,
                partial(collate, with_reference=args.precompute_ref_log_probs),
                train_dataset,
                eval_dataset,
                processing_class,
                None,
                **others,
            )
        finally:
            args.loss_type = loss_type
        self.loss_type = loss_type
        self._use_packed_forwards()
        if self.aux_loss_enabled:
            raise ValueError("router_aux_loss_coef does not work with packed completions: set it to 0")
        self._weights = {name: getattr(args, name) for name in WEIGHTS}
        if args.class_weights == "balanced":
            self._weights = _balanced_weights(self.train_dataset)

    def _use_packed_forwards(self) -> None:
        """Once, and before the reference's log-probs are precomputed, which is within KTOTrainer's __init__."""
        if self._packs:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("DeepSpeed and FSDP are not supported yet: launch with plain data parallelism (DDP)")
        for model in (self.model, self.ref_model):
            if model is not None:
                add_packed_forward(model)
        self._packs = True

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        first = next(iter(dataset))
        if "step_ends" in first:
            return dataset
        if not getattr(processing_class, "is_fast", False) or processing_class.eos_token is None:
            raise ValueError(
                f"processing_class is a {type(processing_class).__name__}; expected a fast tokenizer with an eos_token"
            )
        ints = Sequence(Value("int32"))
        names = {"dataset": dataset_name, "tokenizer": processing_class}
        options = {name: getattr(args, name) for name in ("step_separator", "max_length", "after_first_error")}
        mapped = isinstance(dataset, Dataset)  # the others take neither of these
        how = {"num_proc": args.dataset_num_proc} if mapped else {}
        with global_then_local_main_first():
            prepared = dataset.map(
                tokenize_row, with_indices=True, remove_columns=list(first), fn_kwargs={**names, **options},
                features=Features({**dict.fromkeys(COLUMNS[:4], ints), "label": Value("bool")}), **how,
            )  # fmt: skip
            kept = prepared.filter(_has_room, **how)
        if mapped:
            if len(kept) < len(prepared):
                warnings.warn(
                    f"dropped {len(prepared) - len(kept)} of {len(prepared)} rows of the {dataset_name} dataset, whose "
                    f"prompts leave no room for a completion: raise max_length ({args.max_length})",
                    stacklevel=2,
                )
            if dataset_name == "train" and args.step_weight > 0:
                _check_step_labels(kept)
        return kept

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    @torch.no_grad()
    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise ValueError("precompute_ref_log_probs needs rows that can be counted: give a Dataset, or set it False")
        if "ref_logps" in dataset.column_names:
            return dataset
        self._use_packed_forwards()
        lengths = [len(ids) for ids in dataset["completion_ids"]]
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = range(rank, len(lengths), ranks)
        parts = [torch.zeros(0, device=self.accelerator.device)]
        for begin in range(0, len(mine), batch_size):
            batch = collate([dataset[n] for n in mine[begin : begin + batch_size]])["packed"]
            parts.append(self._reference_logps(batch.to(self.accelerator.device)))
        row = self.accelerator.pad_across_processes(torch.cat(parts))
        found: list[list[float]] = [[] for _ in lengths]
        for other, values in enumerate(self.accelerator.gather(row[None]).cpu()):
            theirs = range(other, len(lengths), ranks)
            sizes = [lengths[n] for n in theirs]
            for n, logps in zip(theirs, values[: sum(sizes)].split(sizes), strict=True):
                found[n] = logps.tolist()
        return dataset.add_column("ref_logps", found)

    @torch.no_grad()
    def _reference_logps(self, batch: PackedBatch) -> Tensor:
        """(N,) fp32 in nats: of ref_model, of the adapter's frozen copy, or of the model without its adapter."""
        model = self.ref_model or self.model
        with ExitStack() as contexts:
            if self.ref_model is None and is_peft_model(model):
                frozen = "ref" if "ref" in model.peft_config else None
                contexts.enter_context(use_adapter(model, frozen))
            options = self.args.gradient_checkpointing_kwargs
            contexts.enter_context(disable_gradient_checkpointing(self.model, options))
            contexts.enter_context(self.accelerator.autocast())
            return model(packed=batch)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """(2,) completions and supervised completions of the optimizer batch, on all processes, over their number."""
        self._sums["train"] = None
        if not batch_samples:
            return None
        counts = torch.stack([batch["counts"] for batch in batch_samples]).sum(0).to(device)
        return self.accelerator.reduce(counts, "sum").clamp(min=1) / self.accelerator.num_processes

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = inputs["packed"].to(self.accelerator.device)
        own = inputs["counts"].to(self.accelerator.device)
        counts = own.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if not self.precompute_ref_logps:
            batch = replace(batch, ref_logp=self._reference_logps(batch))
        # Through the wrapped model's forward, for DDP reduces gradients in the backward of nothing else.
        output = model(packed=batch, objective=self._objective(counts))
        mode = "train" if self.model.training else "eval"
        sums, before = _batch_sums(output, batch, counts, own), self._sums[mode]
        self._sums[mode] = sums if before is None else before + sums
        return (output.loss, output) if return_outputs else output.loss

    def _points(self) -> tuple[float, float]:
        return (self.lagged.outcome, self.lagged.step) if self.args.reference_points == "lagged" else (0.0, 0.0)

    def _objective(self, counts: Tensor) -> dict[str, Any]:
        """The options of `linear_step_kto` that are not tensors of the batch. Labels are masked by `tokenize_row`."""
        args, (z, z_s) = self.args, self._points()
        return {
            "kl": max(z, 0.0), "step_kl": max(z_s, 0.0), "beta": args.beta, "step_beta": args.step_beta,
            "outcome_weight": args.outcome_weight, "step_weight": args.step_weight,
            "step_reduction": args.step_reduction, "loss_type": self.loss_type,
            "filter_eps": "auto" if args.filter_eps is None else args.filter_eps,
            "num_completions": counts[0], "num_supervised": counts[1], **self._weights,
        }  # fmt: skip

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # the optimizer batch is complete
            self._finish("train")
        return loss

    def _finish(self, mode: str) -> float:
        """Metrics of what `mode` has summed up, and in training the next lagged points. Returns the loss."""
        sums, self._sums[mode] = self._sums[mode], None
        tokens, supervised, outcome, step, *rest = self.accelerator.reduce(sums, "sum").tolist()
        outcome_loss, step_loss = outcome / rest[0], step / max(supervised, 1)
        z, z_s = self._points()
        metrics = {"outcome_loss": outcome_loss, "step_loss": step_loss, "kl": z, "step_kl": z_s}
        parts = ("", self.args.beta, rest[2:8]), ("step_", self.args.step_beta, rest[10:16])
        for prefix, beta, both in parts:
            for name, (count, ratio, logp) in (("chosen", both[:3]), ("rejected", both[3:])):
                if count:
                    metrics[f"{prefix}rewards/{name}"] = beta * ratio / count
                    metrics[f"{prefix}logps/{name}"] = logp / count
            if both[0] and both[3]:
                chosen, rejected = (metrics[f"{prefix}rewards/{name}"] for name in ("chosen", "rejected"))
                metrics[f"{prefix}rewards/margins"] = chosen - rejected
        if mode == "train":
            means = rest[1] / rest[0], rest[9] / rest[8]
            if all(map(math.isfinite, means)):  # a batch that overflowed, whose step fp16's scaler skips, does not stay
                self.lagged.update(*means)
            self._total_train_tokens += int(tokens)
            if not supervised and self.args.step_weight > 0 and not isinstance(self.train_dataset, Dataset):
                warnings.warn("an optimizer batch has no labelled step: its step loss is 0", stacklevel=2)
        for name, value in {**metrics, "num_tokens": float(self._total_train_tokens)}.items():
            self._metrics[mode][name].append(value)
        return self.args.outcome_weight * outcome_loss + self.args.step_weight * step_loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return super().prediction_step(model, inputs, True, ignore_keys)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._sums["eval"] = None
        self._metrics["eval"].clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        # The mean over batches' losses would weigh steps by how the batches happen to be cut.
        output.metrics[f"{metric_key_prefix}_loss"] = self._finish("eval")
        return output

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            points = {"outcome": self.lagged.outcome, "step": self.lagged.step}
            (Path(output_dir) / POINTS_FILE).write_text(json.dumps(points), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.args.reference_points != "lagged":
            return
        path = Path(checkpoint) / POINTS_FILE
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} holds no {POINTS_FILE}, it is no StepKTOTrainer's: start from its weights instead "
                "(model=...), or set reference_points='zero'"
            )
        self.lagged = LaggedPoints(**json.loads(path.read_text(encoding="utf-8")))


def _has_room(row: dict[str, Any]) -> bool:
    return len(row["completion_ids"]) > 0


def _check_step_labels(dataset: Dataset) -> None:
    """Step labels that teach nothing are said aloud: they look like training that works."""
    found = {label for labels in dataset["step_labels"] for label in labels} - {UNLABELLED}
    if not found:
        raise ValueError("no step of the train dataset has a label: give labels, or set step_weight=0 for KTO")
    if len(found) == 1:
        warnings.warn(
            f"all labelled steps of the train dataset are {'right' if found == {1} else 'wrong'}: they can only be "
            "pushed one way; check how the labels were made",
            stacklevel=2,
        )


def _balanced_weights(dataset: Dataset | IterableDataset) -> dict[str, float]:
    if not isinstance(dataset, Dataset):
        raise ValueError("class_weights='balanced' needs rows that can be counted: give a Dataset, or set it to 'none'")
    labels = list(dataset["label"])
    steps = [label for row in dataset["step_labels"] for label in row]
    both = *balance(sum(labels), len(labels) - sum(labels)), *balance(steps.count(1), steps.count(0))
    return dict(zip(WEIGHTS, both, strict=True))


@torch.no_grad()
def _batch_sums(output: StepKTOOutput, batch: PackedBatch, counts: Tensor, own: Tensor) -> Tensor:
    """(20,) fp64: what metrics are made of, in sums that add up over micro-batches and processes.

    Trunk tokens, supervised completions, outcome loss, step loss; then, of completions and of steps: their number, the
    sum of their log-ratios, and of the right and of the wrong ones number, sum of log-ratios, sum of log-probs.
    """
    parts = [output.logp.new_tensor(sum(batch.lengths)), own[1], output.outcome_loss * counts[0]]
    parts.append(output.step_loss * counts[1])
    running = nn.functional.pad(output.logp.double().cumsum(0), (1, 0))
    for ratios, ends, labels in (
        (output.log_ratios, batch.cu_seqlens, batch.labels.to(torch.int8)),
        (output.step_log_ratios, batch.cu_steps, batch.step_labels),
    ):
        logps = running[ends.long()].diff()
        parts += [ratios.new_tensor(len(ratios)), ratios.double().sum()]
        for wanted in (1, 0):
            has = (labels == wanted).double()
            parts += [has.sum(), (has * ratios).sum(), (has * logps).sum()]
    return torch.stack([part.double() for part in parts])
