"""Mathematics with a checkable answer: the data sets people train on, a shipped sample, one's own files, the prompt.

`problems` reads the question, the gold answer and (where there is one) a worked solution of every row; whether a gold
parses is the answer checker's to say. `prompt` asks a model for numbered steps and a boxed answer.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import RunError
from ..rows import Row, RowError, column_names, local_path, read_rows, text_column
from .gold import after_hashes, any_form, boxed, stated, worked_solution

INSTRUCTION = 'Solve this in numbered steps, one a line ("Step 1: ..."), and put the final answer in \\boxed{}.'
SAMPLE = Path(__file__).with_name("math_sample.jsonl")


@dataclass(frozen=True)
class Problem:
    """A question, its gold answer as LaTeX or a number, and where it stands ("file:line", "name[split]:row").

    solution: a worked solution with a boxed answer, where the data set has one.
    """

    question: str
    answer: str
    solution: str | None
    source: str


# ---- data sets ----


@dataclass(frozen=True)
class Schema:
    """Where a data set has what. Of several columns the first that a row has counts.

    path: the name on the hub, or a file; configs: its configurations, all of them read; train_split, test_split: what
    is read where no split is asked for, None where the data set has none for it. gold: columns and how to read them.
    """

    path: str
    question: tuple[str, ...]
    gold: tuple[tuple[str, Callable[[dict[str, Any], str], str]], ...]
    solution: tuple[str, ...] = ("solution",)
    configs: tuple[str | None, ...] = ("default",)
    train_split: str | None = "train"
    test_split: str | None = "test"


SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip
KNOWN = {
    "sample": Schema(str(SAMPLE), ("problem",), (("answer", stated),)),
    "math": Schema("EleutherAI/hendrycks_math", ("problem",), (("solution", boxed),), configs=SUBJECTS),
    "math-500": Schema("HuggingFaceH4/MATH-500", ("problem",), (("answer", stated),), train_split=None),
    "gsm8k": Schema("openai/gsm8k", ("question",), (("answer", after_hashes),), ("answer",), configs=("main",)),
    "numinamath-cot": Schema("AI-MO/NuminaMath-CoT", ("problem",), (("solution", boxed),)),
    "amc23": Schema("math-ai/amc23", ("question",), (("answer", stated),), (), train_split=None),
    "aime24": Schema(
        "HuggingFaceH4/aime_2024", ("problem",), (("answer", stated),), train_split=None, test_split="train"
    ),
}
# Of a file, or a data set of another name: the usual names of columns, or those that are given.
QUESTION_COLUMNS = ("problem", "question", "prompt")
GOLD_COLUMNS = (("answer", any_form), ("solution", boxed))


def problems(
    source: str,
    *,
    split: str | None = None,
    purpose: str = "train",
    question_column: str | None = None,
    answer_column: str | None = None,
) -> tuple[list[Problem], list[str]]:
    """The problems of `source`, and what was wrong with the rows left out: "file:row: column ...: what and remedy".

    source: a name of `KNOWN`, or the hub's name of one; a file or folder; else a name on the hub, whose columns must
    be given. split: none takes the data set's split for the purpose ("train" or "test"); of other sources the only
    one. question_column, answer_column: of sources that are not known by name.

    Of problems with the same question (but for spacing) the first is kept.

    Raises:
        RunError: no such source or split, a column that no row has, or no usable row.
    """
    schema = _schema(source, question_column, answer_column)
    found: dict[str, Problem] = {}
    complaints: list[str] = []
    columns: set[str] = set()
    for where, row, complaint in _rows(source, schema, split, purpose):
        if row is None:
            complaints.append(f"{where}: {complaint}")
            continue
        columns.update(row)
        try:
            problem = _problem(row, schema, where)
        except RowError as error:
            complaints.append(f"{where}: {error}")
            continue
        first = found.setdefault(" ".join(problem.question.split()), problem)
        if first is not problem:
            differs = "" if first.answer == problem.answer else ", with another answer"
            complaints.append(f"{where}: repeats the question of {first.source}{differs}; the first is kept")
    if columns:
        _require(source, schema, schema.question, columns, "question_column")
        _require(source, schema, [column for column, _ in schema.gold], columns, "answer_column")
    if not found:
        raise RunError(f"{source!r} holds no usable problem; first complaint: {(complaints or ['it is empty'])[0]}")
    return list(found.values()), complaints


def _schema(source: str, question_column: str | None, answer_column: str | None) -> Schema:
    known = {**{schema.path.lower(): schema for schema in KNOWN.values()}, **KNOWN}
    if source.lower() in known:
        return known[source.lower()]
    if not local_path(source).exists() and not (question_column and answer_column):
        meant = difflib.get_close_matches(source.lower(), known, n=1)
        raise RunError(
            f"{source!r} is neither a file here nor a data set known by name ({', '.join(KNOWN)})"
            + (f"; did you mean {meant[0]!r}?" if meant else "")
            + ". For another data set on the hub set question_column and answer_column"
        )
    question = (question_column,) if question_column else QUESTION_COLUMNS
    gold = ((answer_column, any_form),) if answer_column else GOLD_COLUMNS
    return Schema(source, question, gold, configs=(None,), train_split=None, test_split=None)


def _rows(source: str, schema: Schema, split: str | None, purpose: str) -> Iterator[Row]:
    """The rows of the split, of every configuration."""
    if schema.configs == (None,):
        return read_rows(source, split=split)
    split = split or {"train": schema.train_split, "test": schema.test_split}[purpose]
    if split is None:
        raise RunError(
            f"{source!r} is a benchmark without a split to train on: give another data set, or set train_split to "
            f"{schema.test_split!r} to train on it all the same"
        )
    return _sample_rows(split) if schema.path == str(SAMPLE) else _hub_rows(schema, split)


def _sample_rows(split: str) -> Iterator[Row]:
    """Of the sample every row names its split."""
    rows = [
        (where, row, complaint) for where, row, complaint in read_rows(str(SAMPLE)) if row and row["split"] == split
    ]
    if not rows:
        raise RunError(f"'sample' has no split {split!r}: name train or test")
    return iter(rows)


def _hub_rows(schema: Schema, split: str) -> Iterator[Row]:
    try:
        for config in schema.configs:
            prefix = f"{config} of " if len(schema.configs) > 1 else ""
            for where, row, complaint in read_rows(schema.path, split=split, config=config):
                yield prefix + where, row, complaint
    except RunError as error:
        columns = ", ".join((*schema.question, *(column for column, _ in schema.gold)))
        raise RunError(
            f"{error}. Where the hub is out of reach, or HF_HUB_OFFLINE is set and the cache lacks the data set, give "
            f"a local file with the columns {columns}"
        ) from error


def _problem(row: dict[str, Any], schema: Schema, where: str) -> Problem:
    column = next((name for name in schema.question if name in row), schema.question[0])
    question = text_column(row, column).strip()
    column, gold_of = next(((name, how) for name, how in schema.gold if name in row), schema.gold[0])
    gold = gold_of(row, column)
    text = next((row[name] for name in (*schema.solution, column) if isinstance(row.get(name), str)), "")
    return Problem(question, gold, worked_solution(text, gold), where)


def _require(source: str, schema: Schema, names: Sequence[str], columns: set[str], key: str) -> None:
    if columns.isdisjoint(names):
        known = schema.configs != (None,)
        remedy = "it is not what it was: give a local file" if known else f"set {key} to one of them"
        raise RunError(
            f"{source!r} has no column {' or '.join(map(repr, names))}; it has {column_names(columns)}: {remedy}"
        )


# ---- the prompt ----

TEMPLATE_REMEDY = "mend chat_template.jinja in the model's directory, or take it away for plain prompts"


@dataclass(frozen=True)
class Prompt:
    """The text of a prompt. Where it is `templated` it holds its special tokens; else the tokenizer is to add them."""

    text: str
    templated: bool


def prompt(
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    instruction: str = INSTRUCTION,
) -> Prompt:
    """The prompt that asks `question`, in the tokenizer's chat template, or as plain text where it has none.

    instruction stands behind the question ("": none). A template that rejects the system role, or leaves it out, gets
    the system prompt in front of the user's message.

    Raises:
        RunError: the template fails on a message of the user, or does not repeat the question.
    """
    found = asked(question, tokenizer, system_prompt=system_prompt, instruction=instruction)
    if isinstance(found, str):
        return Prompt(found, templated=False)
    return Prompt(_render(tokenizer, found), templated=True)


def asked(
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    instruction: str = INSTRUCTION,
) -> str | list[dict[str, str]]:
    """What `prompt` renders: chat messages that the tokenizer's template takes, or plain text where it has none."""
    text = f"{question}\n\n{instruction}" if instruction else question
    with_system = f"{system_prompt}\n\n{text}" if system_prompt else text
    if not tokenizer.chat_template:
        return with_system + "\n"
    rendered = ""
    if system_prompt:
        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": text}]
        with suppress(Exception):  # a template is a program: it may raise anything
            rendered = _render(tokenizer, messages)
    if not system_prompt or system_prompt.strip() not in rendered:
        messages = [{"role": "user", "content": with_system}]
        try:
            rendered = _render(tokenizer, messages)
        except Exception as error:
            raise RunError(
                f"the tokenizer's chat template fails on a message with the role 'user' ({type(error).__name__}: "
                f"{error}); {TEMPLATE_REMEDY}"
            ) from error
    if question.strip() not in rendered:
        raise RunError(
            f"the tokenizer's chat template leaves out or changes a message with the role 'user'; {TEMPLATE_REMEDY}"
        )
    return messages


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
