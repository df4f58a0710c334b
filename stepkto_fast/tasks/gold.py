"""Gold answers in the columns of data sets: stated, in the last box of a solution, or behind GSM8K's `####`."""

import math
import re
from decimal import Decimal
from typing import Any

from ..answer_text import BOX, fixed_point, last_box
from ..rows import RowError, shown, text_column

ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's calculator: 48/2 = <<48/2=24>>24
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def stated(row: dict[str, Any], column: str) -> str:
    """The gold answer that is the column itself: text, or a number (27.0 is 27). RowError for anything else."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return fixed_point(text_column(row, column).strip())
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"column {column!r} is {shown(value)}: give a finite number, or text")
    # str(1e-05) is in scientific notation, which is no number in LaTeX.
    return f"{Decimal(str(value)).normalize() + 0:f}" if isinstance(value, float) else str(value)


def boxed(row: dict[str, Any], column: str) -> str:
    """The gold answer in the last `\\boxed{...}` of a solution. RowError where that is not there, or not whole."""
    content = last_box(text_column(row, column))
    if not content:
        raise RowError(f"column {column!r} ends without a whole \\boxed{{...}}: box the final answer")
    return fixed_point(content)


def after_hashes(row: dict[str, Any], column: str) -> str:
    """The gold answer behind the last `####` of a solution, without thousands separators and dollar signs."""
    _, marker, end = text_column(row, column).rpartition("####")
    gold = THOUSANDS.sub("", end.replace("\\$", "").replace("$", "")).strip()
    if not marker or not gold:
        raise RowError(f"column {column!r} has nothing behind '####': end it with '#### answer'")
    return fixed_point(gold)


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


def worked_solution(text: str, gold: str) -> str | None:
    """The worked solution in `text`, its answer boxed; None where it has no answer, so is no worked solution.

    Of GSM8K's form the calculator's annotations are taken out, and the line behind `####` becomes a boxed `gold`.
    """
    worked, marker, _ = text.rpartition("####")
    if marker:
        return f"{ANNOTATION.sub('', worked).strip()}\nThe answer is $\\boxed{{{gold}}}$."
    return text.strip() if last_box(text) else None
