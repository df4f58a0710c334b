"""Gold answers in the columns of data sets: stated, in the last box of a solution, or behind GSM8K's `####`."""

import math
import re
from typing import Any

from ..rows import RowError, shown, text_column

ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's calculator: 48/2 = <<48/2=24>>24
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # or an escaped character, which may be a brace that does not count
BOX = re.compile(r"\\(?:boxed|fbox)\s*")


def stated(row: dict[str, Any], column: str) -> str:
    """The gold answer that is the column itself: text, or a number (27.0 is 27). RowError for anything else."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text_column(row, column).strip()
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"column {column!r} is {shown(value)}: give a finite number, or text")
    return str(int(value)) if value == int(value) else repr(value)


def boxed(row: dict[str, Any], column: str) -> str:
    """The gold answer in the last `\\boxed{...}` of a solution. RowError where that is not there, or not whole."""
    content = last_box(text_column(row, column))
    if not content:
        raise RowError(f"column {column!r} ends without a whole \\boxed{{...}}: box the final answer")
    return content


def after_hashes(row: dict[str, Any], column: str) -> str:
    """The gold answer behind the last `####` of a solution, without thousands separators and dollar signs."""
    _, marker, end = text_column(row, column).rpartition("####")
    gold = THOUSANDS.sub("", end.replace("\\$", "").replace("$", "")).strip()
    if not marker or not gold:
        raise RowError(f"column {column!r} has nothing behind '####': end it with '#### answer'")
    return gold


def any_form(row: dict[str, Any], column: str) -> str:
    """The gold answer in one of the forms above; a text of several lines must say which part of it is the answer."""
    value = row.get(column)
    if isinstance(value, str) and "####" in value:
        return after_hashes(row, column)
    if isinstance(value, str) and BOX.search(value):
        return boxed(row, column)
    gold = stated(row, column)
    if "\n" in gold:
        raise RowError(f"column {column!r} has several lines and no answer in \\boxed{{}} or behind '####': give one")
    return gold


def last_box(text: str) -> str | None:
    """What the last `\\boxed{...}` of `text` holds; None where there is none, or the last one is not closed."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 0
    if text[start : start + 1] != "{":  # LaTeX boxes one token then: \boxed 2
        bare = re.match(r"[^\s{}$\\]+", text[start:])
        return bare.group().rstrip(".,;") if bare else None
    for brace in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if not depth:
            return text[start + 1 : brace.start()].strip()
    return None


def worked_solution(text: str, gold: str) -> str | None:
    """The worked solution in `text`, its answer boxed; None where it has no answer, so is no worked solution.

    Of GSM8K's form the calculator's annotations are taken out, and the line behind `####` becomes a boxed `gold`.
    """
    worked, marker, _ = text.rpartition("####")
    if marker:
        return f"{ANNOTATION.sub('', worked).strip()}\nThe answer is $\\boxed{{{gold}}}$."
    return text.strip() if last_box(text) else None
