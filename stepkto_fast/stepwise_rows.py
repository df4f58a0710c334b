"""Rows of TRL's dataset formats as token ids whose steps are spans of them, and their collation into a packed batch.

A row is `{"prompt", "completions": [step, ...], "labels": [bool or null, ...], "label": bool}`: TRL's stepwise
supervision with the outcome beside it. Or `{"prompt", "completion", "label"}`, TRL's unpaired preference: one step
without a label; with `"labels"` too, a step a line, as `stepkto_fast.segmentation` has it. Prompts are strings or
chat messages.

A completion is tokenised once, as a whole and behind its prompt. A token belongs to the step in which it starts: a
separator to the step that it ends, the end-of-sequence token (and what a chat template adds) to the last step.
"""

import json
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .objective import seen_labels
from .packing import pack
from .rollout import UNLABELLED, Rollout
from .segmentation import step_boundaries

COLUMNS = ("prompt_ids", "completion_ids", "step_ends", "step_labels", "label", "ref_logps")


def tokenize_row(
    row: dict[str, Any],
    index: int,
    *,
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    step_separator: str = "\n",
    max_length: int | None = None,
    after_first_error: str = "keep",
) -> dict[str, Any]:
    """Token ids and steps of one row; `index` and `dataset` name it in errors.

    A row longer than `max_length` (prompt and completion, in tokens) loses what is behind it: the steps there, and the
    label of a step that is cut in two, for it was given to the whole step. Where the prompt leaves no room,
    `completion_ids` is empty.

    Returns:
        prompt_ids, completion_ids: lists of token ids; step_ends: ascending token counts at which the steps end, the
        last one `len(completion_ids)`; step_labels: 1, 0 or -1 (unlabelled); label: bool.

    Raises:
        ValueError: the row lacks something, or has labels that are not what they should be; names the row.
    """
    found = spans(
        row,
        f"row {index} of the {dataset} dataset",
        tokenizer=tokenizer,
        step_separator=step_separator,
        max_length=max_length,
        after_first_error=after_first_error,
    )
    if found.taken_out:
        warnings.warn(
            # without the row's number: the same text is said once
            f"a prompt of the {dataset} dataset is tokenised otherwise alone than before its completion. What differs, "
            f"{found.taken_out!r}, is taken out of the prompt, as in KTOTrainer: end prompts where a token ends",
            stacklevel=2,
        )
    return {
        "prompt_ids": found.prompt_ids,
        "completion_ids": found.completion_ids,
        "step_ends": found.step_ends,
        "step_labels": found.step_labels,
        "label": row["label"],
    }


@dataclass
class Spans:
    """A tokenised row, as `tokenize_row` has it, and its text.

    starts: where each token of the completion starts, in characters of `text`, also of those that `max_length` has
    cut off; a token that straddles the prompt's end starts below 0, and what a template adds at `len(text)` or behind.
    taken_out: the end of the prompt that is tokenised otherwise before the completion, and so counts to it; mostly "".
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    step_ends: list[int]
    step_labels: list[int]
    text: str
    starts: list[int]
    taken_out: str


def spans(
    row: dict[str, Any],
    where: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    step_separator: str = "\n",
    max_length: int | None = None,
    after_first_error: str = "keep",
    end_at_eos: bool = False,
) -> Spans:
    """As `tokenize_row`, with the row's name for errors, `where`, and the text that the tokens stand for.

    end_at_eos: leaves out what a chat template writes behind the end-of-sequence token that follows the text (ChatML: a
    line break), which no sampled completion has.
    """
    labels = _labels(row, where)
    text, characters = _text(row, where, step_separator, labels is not None)
    if labels is None:
        labels = [UNLABELLED] * len(characters)
    if len(labels) != len(characters):
        raise ValueError(
            f"{where} has {len(labels)} labels for {len(characters)} steps: give one a step (null: unlabelled)"
        )
    prompt_ids, completion_ids, starts, taken_out = _encode(row, where, text, tokenizer)
    if end_at_eos:
        marks = (n for n, token in enumerate(completion_ids) if token == tokenizer.eos_token_id)
        end = next((n + 1 for n in marks if starts[n] >= len(text)), len(starts))
        completion_ids, starts = completion_ids[:end], starts[:end]
    steps = [bisect_right(characters[:-1], start) for start in starts]
    written = [step for step, start in zip(steps, starts, strict=True) if start < len(text)]  # not the mark at the end
    empty = set(range(len(characters))) - set(written)
    if empty:
        raise ValueError(
            f"{where}: no token starts in step {min(empty)}, what is before has swallowed it: join the two, or choose "
            f"another step_separator than {step_separator!r}"
        )
    ends = [bisect_right(steps, step) for step in range(len(characters))]
    labels = seen_labels(labels, after_first_error)
    room = len(completion_ids) if max_length is None else max_length - len(prompt_ids)
    if room < len(completion_ids):
        completion_ids = completion_ids[: max(room, 0)]
        whole = [end for end in ends if end <= len(completion_ids)]
        cut = [len(completion_ids)] if len(completion_ids) > (whole[-1] if whole else 0) else []
        ends, labels = whole + cut, labels[: len(whole)] + [UNLABELLED] * len(cut)
    return Spans(prompt_ids, completion_ids, ends, labels, text, starts, taken_out)


def _text(row: dict[str, Any], where: str, separator: str, labelled: bool) -> tuple[str, list[int]]:
    """The completion, and the character counts at which its steps end."""
    if "chosen" in row or "rejected" in row:
        raise ValueError(f"{where} is a pair (chosen, rejected): unpair it with trl.unpair_preference_dataset")
    if not row.get("prompt"):
        raise ValueError(f"{where} has prompt {row.get('prompt')!r}: give a text or a list of messages")
    steps = row.get("completions")
    if steps is not None:
        if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
            raise ValueError(f"{where} has completions {steps!r}: give a list of steps, each a text that is not empty")
        return separator.join(steps), list(accumulate(len(step) + len(separator) for step in steps))
    text = row.get("completion")
    if isinstance(text, list) and len(text) == 1 and text[0].get("role") == "assistant":
        text = text[0].get("content")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{where} has completion {row.get('completion')!r}: give a text or one message of the assistant, not empty"
        )
    if not labelled:
        return text, [len(text)]
    return text, step_boundaries(text)


def _labels(row: dict[str, Any], where: str) -> list[int] | None:
    if not isinstance(row.get("label"), bool):
        raise ValueError(f"{where} has label {row.get('label')!r}: give true or false, whether its outcome is right")
    labels = row.get("labels")
    if labels is None:
        return None
    for step, label in enumerate(labels):
        if label is not None and not isinstance(label, bool):
            raise ValueError(f"{where} has labels[{step}] {label!r}: give true, false, or null for an unlabelled step")
    return [UNLABELLED if label is None else int(label) for label in labels]


def _encode(
    row: dict[str, Any], where: str, text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], list[int], str]:
    """Ids of the prompt and of the completion, where each of the latter starts, in characters of `text`, and what of
    the prompt's end is tokenised otherwise alone."""
    prompt = row["prompt"]
    chat = not isinstance(prompt, str)
    if chat:
        tools = row.get("tools")
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})
        }  # fmt: skip
        answer = {"role": "assistant", "content": text}
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template([*prompt, answer], tokenize=False, **options)
        # where the prompt ends: not at the same text within the prompt, or behind it
        begin = whole.find(text, max(0, _shared(before, whole) - len(text) + 1))
        if whole.startswith(before + text):
            begin = len(before)
        if begin < 0:
            raise ValueError(
                f"{where}: the chat template changes the completion, so its steps cannot be found in it: give steps "
                "without blanks at either end, or prompt and completion as plain text"
            )
    else:
        end = tokenizer.eos_token
        before, begin = prompt, len(prompt)
        whole = prompt + text + ("" if text.endswith(end) else end)
    prompt_ids = tokenizer(before, add_special_tokens=not chat)["input_ids"]
    encoded = tokenizer(whole, add_special_tokens=not chat, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    shared = _shared(prompt_ids, ids)
    if not shared or shared == len(ids):
        raise ValueError(f"{where} has {shared} prompt and {len(ids) - shared} completion tokens: give at least 1 each")
    # Tokens that a tokenizer adds have the empty span (0, 0): they belong where they stand.
    starts = accumulate((start for start, _ in encoded["offset_mapping"][shared:]), max)
    return ids[:shared], ids[shared:], [start - begin for start in starts], tokenizer.decode(prompt_ids[shared:])


def _shared(one: Sequence, other: Sequence) -> int:
    """How many items the two have in common from the start."""
    both = enumerate(zip(one, other, strict=False))
    return next((n for n, (x, y) in both if x != y), min(len(one), len(other)))


def collate(rows: Sequence[dict[str, Any]], with_reference: bool = False) -> dict[str, Any]:
    """One packed batch of rows that `tokenize_row` made; `with_reference` all need their `ref_logps`, or ValueError.

    label: (B,) bool; input_ids: (1, T) int64, prompts and completions side by side; counts: (2,) fp32, completions and
    those of them with a labelled step; packed: the `PackedBatch`, with the rows' `ref_logps` where they have them.
    """
    if with_reference and any(row.get("ref_logps") is None for row in rows):
        raise ValueError(
            "rows without ref_logps: precompute_ref_log_probs does so for the train and eval datasets that the trainer "
            "is made with; give others the column, or set it False"
        )
    rollouts = [
        Rollout(
            problem_id=0, sample=n, prompt="", prompt_ids=row["prompt_ids"], completion="",
            completion_ids=row["completion_ids"], logps=[], finished=True, step_ends=row["step_ends"],
            label=row["label"], step_labels=row["step_labels"], ref_logps=row.get("ref_logps") or [],
        )
        for n, row in enumerate(rows)
    ]  # fmt: skip
    packed = pack(rollouts)
    supervised = sum(any(label != UNLABELLED for label in r.step_labels) for r in rollouts)
    # The labels come first: transformers takes the first tensor's length for the batch size.
    return {
        "label": packed.labels,
        "input_ids": packed.input_ids,
        "counts": torch.tensor([len(rollouts), supervised], dtype=torch.float32),
        "packed": packed,
    }
