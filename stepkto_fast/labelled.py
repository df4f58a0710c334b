"""Labelled completions that were not sampled here: read from any data set, and made into rollouts.

Formats and the conventions of their conversion: docs/data.md.
"""

import json
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .errors import RunError
from .labelled_formats import FORMATS, Neutral
from .rollout import Rollout
from .rows import Row, RowError, column_names, read_rows
from .segmentation import StepStyle, step_boundaries
from .stepwise_rows import Spans, spans

LOOKED_AT = 100  # rows from whose columns a format is told


@dataclass
class Labelled:
    """What `read_labelled` found.

    rows: `{"prompt", "completions": [step], "labels": [bool or None]}` with `label`: bool where the outcome is known,
    or `{"prompt", "completion", "label"}`, not cut into steps yet; and `subset` where the source names one, `where` the
    row was read. complaints: one for each row that was left out. read: rows of the source. format: its format.
    """

    rows: list[dict[str, Any]]
    complaints: list[str]
    read: int
    format: str

    @property
    def skipped(self) -> int:
        """Rows of the source that gave nothing. (A row of PRM800K gives several.)"""
        return self.read - len({row["where"] for row in self.rows})


def read_labelled(
    source: str, *, format: str = "auto", split: str | None = None, neutral: Neutral = "correct"
) -> Labelled:
    """Labelled rows of `source` (as `read_rows` takes it) in the one shape that training reads.

    format: "stepwise", "unpaired", "prm800k", "math_shepherd", "processbench"; "auto" tells it by the columns.
    neutral: what PRM800K's rating 0 makes of a step.

    Raises:
        RunError: the source cannot be read, its format cannot be told, or no row of it can be used.
    """
    if format not in ("auto", *FORMATS):
        raise RunError(f"format {format!r} is not known: give auto, {', '.join(FORMATS)}")
    if neutral not in ("correct", "incorrect", "unlabelled"):
        raise RunError(f"neutral {neutral!r} is not known: give correct, incorrect or unlabelled")
    entries = read_rows(source, split=split)
    if format == "auto":
        format, entries = _told(source, entries)
    columns, convert = FORMATS[format]
    found = Labelled([], [], 0, format)
    for where, row, complaint in entries:
        found.read += 1
        try:
            if row is None:
                raise RowError(complaint)
            for column in columns:
                if column not in row:
                    raise RowError(f"column {column!r} is missing, which {format} has: the row has {column_names(row)}")
            found.rows += [{**made, "where": where} for made in convert(row, neutral)]
        except RowError as error:
            found.complaints.append(f"{where}: {error}")
    if not found.rows:
        first = f"; the first complaint: {found.complaints[0]}" if found.complaints else ""
        raise RunError(f"{source} has no row that can be used as {format}, of {found.read}{first}")
    return found


def _told(source: str, entries: Iterator[Row]) -> tuple[str, Iterator[Row]]:
    """The format that the columns of the first rows fit, and all the rows."""
    seen: list[Row] = []
    for entry in entries:
        seen.append(entry)
        row = entry[1]
        fitting = [name for name, known in FORMATS.items() if row is not None and set(known.columns) <= row.keys()]
        if len(fitting) == 1:
            return fitting[0], chain(seen, entries)
        if fitting:
            raise RunError(f"{entry[0]} fits the formats {' and '.join(fitting)}: name the one to read {source} as")
        if len(seen) == LOOKED_AT:
            break
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, (columns, _) in FORMATS.items())
    first = next((f"the columns {column_names(row)}" for _, row, _ in seen if row is not None), None)
    complaint = next((f"{where}: {complaint}" for where, _, complaint in seen if complaint), "no row")
    raise RunError(f"{source} has {first or complaint}, which no format fits. Known are {known}")


def labelled_rollouts(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    separator: str = "\n",
    max_length: int | None = None,
    style: StepStyle | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = warnings.warn,
) -> tuple[list[Rollout], list[str]]:
    """Rollouts of the rows that `read_labelled` gives, and a complaint for each row that cannot be one.

    Rows with one prompt share `problem_id`; `sample` counts them. Steps are spans of the completion's token ids, which
    is tokenised once, behind its prompt; `"".join(steps) == completion`. `step_labels`: 1, 0 or -1 (unlabelled). A row
    without `label` has `verified` False. There are no `logps`: nothing was sampled.

    separator: what stands between the steps of a row. style: how a row with one `completion` is cut into steps (none:
    at line breaks). max_length: of prompt and completion, in tokens; what is behind is cut off, as is the label of a
    step that loses a part, and such a rollout has `finished` False. Completions end with the end-of-sequence token, as
    sampled ones do: what a chat template writes behind it is left out. on_note: gets one text where prompts end within
    a token.

    Messages need a chat template; a question alone, without one, is a line before the completion.
    """
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise RunError(f"{type(tokenizer).__name__} {tokenizer.name_or_path}: give a fast tokenizer with an eos_token")
    problems: dict[str, int] = {}
    samples: Counter[int] = Counter()
    rollouts: list[Rollout] = []
    complaints: list[str] = []
    taken_out: list[tuple[str, str]] = []
    for n, row in enumerate(rows):
        on_progress(n, len(rows))
        where = row.get("where", f"row {n}")
        try:
            found = spans(
                {**row, "prompt": _plain(row["prompt"], tokenizer), "label": row.get("label", False)},
                where,
                tokenizer=tokenizer,
                step_separator=separator,
                max_length=max_length,
                end_at_eos=True,
            )
        except (ValueError, TemplateError) as error:
            complaints.append(str(error) if str(error).startswith(where) else f"{where}: column 'prompt': {error}")
            continue
        if not found.completion_ids:
            complaints.append(
                f"{where}: column 'prompt' has {len(found.prompt_ids)} tokens, which leaves none of {max_length} for "
                "the completion: allow for longer ones"
            )
            continue
        if found.taken_out:
            taken_out.append((where, found.taken_out))
        if "completion" in row and "labels" not in row:
            found.step_ends = _ends(found, style)
            found.step_labels = [-1] * len(found.step_ends)
        key = json.dumps(row["prompt"], sort_keys=True)
        rollout = _rollout(found, row, problems.setdefault(key, len(problems)), tokenizer)
        rollout.sample = samples[rollout.problem_id]
        samples[rollout.problem_id] += 1
        rollouts.append(rollout)
    on_progress(len(rows), len(rows))
    if taken_out:
        first, text = taken_out[0]
        on_note(
            f"prompts that are tokenised otherwise alone than before their completion: {len(taken_out)}, the first in "
            f"{first}. What differs, there {text!r}, is taken out of the prompt: end prompts where a token ends"
        )
    return rollouts, complaints


def _plain(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The prompt as the tokenizer can take it: without a chat template, a question is a line of text."""
    if isinstance(prompt, str) or tokenizer.chat_template:
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"] + "\n"
    raise ValueError("messages, but the tokenizer has no chat template: give a text, or a model that has one")


def _ends(found: Spans, style: StepStyle | None) -> list[int]:
    """Token counts at which the steps end that `style` finds in the text."""
    starts = found.starts[: len(found.completion_ids)]
    inner = {bisect_left(starts, boundary) for boundary in step_boundaries(found.text, style)[:-1]}
    return sorted(inner - {0} | {len(starts)})


def _rollout(found: Spans, row: dict[str, Any], problem: int, tokenizer: PreTrainedTokenizerBase) -> Rollout:
    # Tokens of the prompt's end that were taken out of it start below 0; behind the last token, the text ends.
    starts = [*(max(start, 0) for start in found.starts), len(found.text)]
    bounds = [0, *(starts[end] for end in found.step_ends)]
    steps = [found.text[a:b] for a, b in pairwise(bounds)]
    return Rollout(
        problem_id=problem,
        sample=0,
        prompt=row["prompt"] if isinstance(row["prompt"], str) else tokenizer.decode(found.prompt_ids),
        prompt_ids=found.prompt_ids,
        completion="".join(steps),
        completion_ids=found.completion_ids,
        logps=[],
        finished=len(found.completion_ids) == len(found.starts),
        steps=steps,
        step_ends=found.step_ends,
        label=row.get("label", False),
        step_labels=found.step_labels,
        verified="label" in row,
    )
