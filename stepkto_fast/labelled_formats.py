"""From the published formats of labelled completions to rows of stepwise supervision (docs/data.md).

A converter takes one row of its format and gives rows `{"prompt", "completions", "labels"}`, with `label` where the
outcome is known and `subset` where the row names one; or, of unpaired preference, `{"prompt", "completion", "label"}`.
What it cannot use is a `RowError` that names the column. Questions of the mathematics data sets become one message of
the user.
"""

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from .rows import RowError, shown, text_column

Neutral = Literal["correct", "incorrect", "unlabelled"]
Row = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
TAG = "ки"  # Math-Shepherd's mark behind each step
FIRST_STEP = re.compile(r"step 1:", re.IGNORECASE)


class Format(NamedTuple):
    """What a format is known by, and who converts a row of it."""

    columns: tuple[str, ...]
    convert: Callable[[Row, Neutral], list[Row]]


def _stepwise(row: Row, neutral: Neutral) -> list[Row]:
    prompt = _prompt(row["prompt"])
    steps = _steps(row["completions"], "completions")
    labels = _step_labels(row["labels"])
    if len(labels) != len(steps):
        raise RowError(f"column 'labels' has {len(labels)} labels for {len(steps)} completions: give one a step")
    outcome = row.get("label")
    if outcome is not None and not isinstance(outcome, bool):
        raise RowError(f"column 'label' is {shown(outcome)}: give true, false, or null where it is unknown")
    return [_made(prompt, steps, labels, outcome, row.get("subset"))]


def _unpaired(row: Row, neutral: Neutral) -> list[Row]:
    completion = row["completion"]
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        role = completion[0].get("role")
        if role != "assistant":
            raise RowError(f"column 'completion' is a message with the role {shown(role)}: give the assistant's")
        completion = completion[0].get("content")
    if not isinstance(completion, str):
        raise RowError(f"column 'completion' is {shown(completion)}: give a text or one message of the assistant")
    if not completion.strip():
        raise RowError("column 'completion' is empty: give a text")
    if not isinstance(row["label"], bool):
        raise RowError(f"column 'label' is {shown(row['label'])}: give true or false")
    labels = {} if row.get("labels") is None else {"labels": _step_labels(row["labels"])}
    return [{"prompt": _prompt(row["prompt"]), "completion": completion, **labels, "label": row["label"]}]


def _prm800k(row: Row, neutral: Neutral) -> list[Row]:
    """The path that was labelled, first, and a row for each alternative of one of its steps.

    A rating counts once: in rows of alternatives only the last step is labelled.
    """
    question, label = (_object(row[column], column) for column in ("question", "label"))
    prompt = _question(text_column(question, "problem", "question."))
    if label.get("finish_reason") == "bad_problem":
        raise RowError("column 'label.finish_reason' is 'bad_problem', the labeler found the problem broken: left out")
    ratings = {1: True, -1: False, 0: {"correct": True, "incorrect": False, "unlabelled": None}[neutral], None: None}
    path: list[str] = []
    labels: list[bool | None] = []
    others: list[Row] = []
    labelled = _list(label.get("steps"), "label.steps")
    for n, step in enumerate(labelled):
        name, last = f"label.steps[{n}]", n == len(labelled) - 1
        step = _object(step, name)
        given = _list(step["completions"], f"{name}.completions") if step.get("completions") else []
        rated = [_rated(completion, f"{name}.completions[{k}]", ratings) for k, completion in enumerate(given)]
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        if chosen is None and human is None and not (last and rated):
            if not last or not path:
                raise RowError(
                    f"column '{name}' has no chosen_completion and no human_completion: mend or drop the row"
                )
            break
        if chosen is None and human is not None:
            human = human if isinstance(human, dict) else {"text": human}
            corrected = human.get("corrected_rating")
            path_step = _rated({**human, "rating": 1 if corrected is None else corrected}, name, ratings)
        else:
            # Where labelling ended in a step without a choice, the first completion is the solution's own.
            chosen = 0 if chosen is None else chosen
            if type(chosen) is not int or not 0 <= chosen < len(rated):
                raise RowError(f"column '{name}.chosen_completion' is {shown(chosen)} of {len(rated)} completions")
            path_step = rated[chosen]
        for k, (text, judged) in enumerate(rated):
            if k != chosen and judged is not None:
                others.append(_made(prompt, [*path, text], [None] * len(path) + [judged]))
        path.append(path_step[0])
        labels.append(path_step[1])
    whole = question.get("pre_generated_steps")
    complete = isinstance(whole, list) and whole[: len(path)] == path
    if complete:  # phase 2 stops at the first error: the solution goes on, without labels
        path = _steps(whole, "question.pre_generated_steps")
        labels += [None] * (len(path) - len(labels))
    return [_made(prompt, path, labels, _prm800k_outcome(question, label, complete)), *others]


def _prm800k_outcome(question: Row, label: Row, complete: bool) -> bool | None:
    """Whether the answer is right: the labeler's word, else the two answers as text; None where neither tells."""
    if label.get("finish_reason") == "solution":
        return True
    given, gold = question.get("pre_generated_answer"), question.get("ground_truth_answer")
    if not complete or not isinstance(given, str) or not isinstance(gold, str):
        return None
    if given.strip() == gold.strip():
        return True
    return False if label.get("finish_reason") == "found_error" else None


def _rated(completion: Any, name: str, ratings: dict[int | None, bool | None]) -> tuple[str, bool | None]:
    completion = _object(completion, name)
    text, rating = text_column(completion, "text", f"{name}."), completion.get("rating")
    if rating is not None and (type(rating) is not int or rating not in ratings):
        raise RowError(f"column '{name}.rating' is {shown(rating)}: give -1, 0, 1 or null")
    return text, None if completion.get("flagged") else ratings[rating]


def _math_shepherd(row: Row, neutral: Neutral) -> list[Row]:
    text, signs = text_column(row, "input"), text_column(row, "label")
    pieces = text.split(TAG)
    labels: list[bool | None] = []
    at = 0
    for n, piece in enumerate(pieces[:-1]):
        sign = signs[at + len(piece) : at + len(piece) + 1]
        if not signs.startswith(piece, at) or sign not in ("+", "-"):
            raise RowError(
                f"columns 'input' and 'label' differ before tag {n + 1}: give one text, with + or - for {TAG}"
            )
        labels.append(sign == "+")
        at += len(piece) + 1
    if signs[at:].strip() != pieces[-1].strip():
        raise RowError(f"columns 'input' and 'label' differ behind tag {len(labels)}: give one text")
    if not labels:
        raise RowError(f"column 'input' has no tag {TAG} behind a step: give it, or another format")
    marks = list(FIRST_STEP.finditer(pieces[0]))
    begin = marks[-1].start() if marks else pieces[0].find("?") + 1
    if not marks and pieces[0].count("?") != 1:
        raise RowError("column 'input' has no 'Step 1:' before the first tag: question and step cannot be told apart")
    steps = [pieces[0][begin:], *pieces[1:-1]]
    if pieces[-1].strip():  # text behind the last tag was not labelled
        steps.append(pieces[-1])
        labels.append(None)
    steps = _steps([step.strip() for step in steps], "input")
    if not pieces[0][:begin].strip():
        raise RowError("column 'input' has no question before its first step: give one")
    # The last step is labelled by its own answer: continuations from a finished solution have nothing to add.
    return [_made(_question(pieces[0][:begin].strip()), steps, labels, labels[-1], row.get("task"))]


def _processbench(row: Row, neutral: Neutral) -> list[Row]:
    prompt = _question(text_column(row, "problem"))
    steps, error = _steps(row["steps"], "steps"), row["label"]
    if type(error) is not int or not -1 <= error < len(steps):
        raise RowError(
            f"column 'label' is {shown(error)} for {len(steps)} steps: give the first wrong one, from 0, or -1 for none"
        )
    outcome = row.get("final_answer_correct")
    if outcome is not None and not isinstance(outcome, bool):
        raise RowError(f"column 'final_answer_correct' is {shown(outcome)}: give true or false")
    right = len(steps) if error == -1 else error
    labels = [True if n < right else False if n == right else None for n in range(len(steps))]
    name = row.get("id")
    subset = name.rpartition("-")[0] if isinstance(name, str) else None
    return [_made(prompt, steps, labels, outcome, subset)]


FORMATS = {
    "stepwise": Format(("prompt", "completions", "labels"), _stepwise),
    "unpaired": Format(("prompt", "completion", "label"), _unpaired),
    "prm800k": Format(("question", "label"), _prm800k),
    "math_shepherd": Format(("input", "label"), _math_shepherd),
    "processbench": Format(("problem", "steps", "label"), _processbench),
}


def _made(
    prompt: Any, steps: list[str], labels: list[bool | None], outcome: bool | None = None, subset: Any = None
) -> Row:
    row = {"prompt": prompt, "completions": steps, "labels": labels}
    if outcome is not None:
        row["label"] = outcome
    return {**row, "subset": subset} if isinstance(subset, str) and subset else row


def _question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _object(value: Any, column: str) -> Row:
    if not isinstance(value, dict):
        raise RowError(f"column '{column}' is {shown(value)}: give an object")
    return value


def _list(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowError(f"column '{column}' is {shown(value)}: give a list that is not empty")
    return value


def _steps(value: Any, column: str) -> list[str]:
    for n, step in enumerate(_list(value, column)):
        if not isinstance(step, str):
            raise RowError(f"column '{column}' has {shown(step)} as step {n}: give a text")
        if not step.strip():
            raise RowError(f"column '{column}' has an empty step {n}: give a text, or join it with the one before")
    return list(value)


def _step_labels(value: Any) -> list[bool | None]:
    if not isinstance(value, list):
        raise RowError(f"column 'labels' is {shown(value)}: give a list with true, false or null for each step")
    kinds = sorted({type(label).__name__ for label in value if label is not None})
    if kinds not in ([], ["bool"]):
        mixed = f"mixes {' and '.join(kinds)}" if len(kinds) > 1 else f"holds {kinds[0]}"
        raise RowError(f"column 'labels' {mixed}: give true, false or null for each step")
    return list(value)


def _prompt(value: Any) -> Any:
    """A text, or messages of known roles with a text each."""
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not value:
        raise RowError(f"column 'prompt' is {shown(value)}: give a text or a list of messages, not empty")
    for n, message in enumerate(value):
        message = _object(message, f"prompt[{n}]")
        if message.get("role") not in ROLES:
            raise RowError(f"column 'prompt[{n}].role' is {shown(message.get('role'))}: give {', '.join(ROLES)}")
        text_column(message, "content", f"prompt[{n}].")
    return value
