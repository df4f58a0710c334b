"""Steps of a completion as spans of its own token ids: always a partition, never from re-tokenised text.

A token belongs to the step in which it starts, so a separator fused with the next word stays with the step it ends,
and the end-of-sequence token with the last step. Blank lines belong to the step before them (leading ones to the
first), and what has no text beside separators is no step of its own.

A style says where a step ends:

    lines       behind a run of line breaks (the default)
    blank_line  behind a blank line
    step        before a line that begins with "Step 3:", "**Step 3**", "Step 3." or "## Step 3"
    heading     before a Markdown heading; a title directly above a deeper heading belongs to that one's step
    numbered    before a line that begins with "1.", "2)" or "(3)", indented by at most two spaces
    shepherd    behind the tag "ки"
    regex       behind each match of a pattern of one's own
    auto        per completion: the first of AUTO that finds two steps or more, else lines

With the styles that end a step before a mark, text before the first mark joins the first step, so that the step
called 1 is the first; where the first mark has a number above 1, that text is a step of its own.
"""

import difflib
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from .errors import RunError
from .rollout import Rollout

# Repeats of blanks are bounded, so that a line of nothing but blanks is not read once for each of them.
_OPENING = {
    "step": re.compile(
        r"^[ \t>]{0,8}(?P<heading>#{1,6}[ \t]{0,4})?[*_]{0,3}[ \t]{0,4}step[ \t]{0,4}#?(?P<number>\d{1,4})[a-z]?"
        r"(?(heading)\b|(?=[ \t]{0,4}(?:[:)(*_\u2013\u2014-]|\.(?!\d)|\r?$)))",
        re.MULTILINE | re.IGNORECASE,
    ),
    "heading": re.compile(
        r"^ {0,3}(?P<level>#{1,6})[ \t]+\S[^\n]*(?:\s*\n {0,3}(?P=level)#{1,5}[ \t]+\S[^\n]*)?", re.MULTILINE
    ),
    "numbered": re.compile(
        r"^ {0,2}(?:#{1,6}[ \t]{1,4})?[*_]{0,3}\(?(?P<number>\d{1,3})[.)](?=[ \t*_]|\r?$)", re.MULTILINE
    ),
}
_ENDING = {
    "lines": re.compile(r"\n+\s*"),
    "blank_line": re.compile(r"\n\s*\n\s*"),
    "shepherd": re.compile(r"(?<![^\W\d_])ки(?![^\W\d_])\s*"),
}
AUTO = ("shepherd", "step", "heading", "numbered", "blank_line")
STYLES = ("lines", "step", "heading", "blank_line", "numbered", "shepherd", "regex", "auto")
PATTERN_SECONDS = 5.0  # for one completion: a pattern of one's own may backtrack without end
MAX_HELD = 32  # tokens without a valid character between them, eight times what the longest character needs


@dataclass(frozen=True)
class StepStyle:
    """A style by its name; `pattern` (compiled by the package `regex`) for the style regex only."""

    name: str
    pattern: Any = None


LINES = StepStyle("lines")


def step_style(name: str, pattern: str | None = None) -> StepStyle:
    """The style `name`, one of STYLES; `pattern` is the regular expression of the style regex.

    The pattern is searched for with `^` and `$` at every line. A match belongs to the step that it ends; a lookahead,
    such as `(?=^Claim )`, lets the match open the next step instead.

    Raises:
        RunError: unknown name; a pattern that is missing, not wanted, does not compile, or matches the empty text.
    """
    if name not in STYLES:
        close = difflib.get_close_matches(name, STYLES, n=1)
        raise RunError(
            f"step_style {name!r} is unknown{f'; did you mean {close[0]!r}?' if close else ''}: one of "
            f"{', '.join(STYLES)}"
        )
    if name != "regex":
        if pattern is not None:
            raise RunError(f"step_pattern is read with step_style regex only, not with {name}: remove it")
        return StepStyle(name)
    if not pattern:
        raise RunError("step_style regex needs step_pattern: give the regular expression that ends a step")
    try:
        compiled = regex.compile(pattern, regex.MULTILINE)
        empty = compiled.search("", timeout=PATTERN_SECONDS)
    except (regex.error, TimeoutError) as error:
        raise RunError(f"step_pattern {pattern!r} is no regular expression that can be used: {error}") from error
    if empty is not None:
        raise RunError(f"step_pattern {pattern!r} matches the empty text: let it match at least one character")
    return StepStyle(name, compiled)


def step_boundaries(text: str, style: StepStyle | None = None) -> list[int]:
    """Where each step of `text` ends: ascending character counts, the last one `len(text)`; "" has no step: [].

    Raises RunError where the pattern of the style regex takes longer than PATTERN_SECONDS.
    """
    return [*_inner_boundaries(text, style or LINES), len(text)] if text else []


def step_ends(
    completion_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, style: StepStyle | None = None
) -> list[int]:
    """Where each step of `completion_ids` ends: ascending token counts, the last one `len(completion_ids)`.

    An empty completion has no step: []. Special tokens are read over, other than with the styles shepherd and regex,
    whose separator may be one; those at the end of the completion always belong to the last step.
    """
    style = style or LINES
    text, starts = _read(completion_ids, tokenizer, special_tokens=style.name in ("shepherd", "regex"))
    ends: list[int] = []
    for boundary in _inner_boundaries(text, style):
        first_after = bisect_left(starts, boundary)
        if first_after > (ends[-1] if ends else 0):
            ends.append(first_after)
    if completion_ids and (not ends or ends[-1] < len(completion_ids)):
        ends.append(len(completion_ids))
    return ends


def step_texts(completion_ids: Sequence[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each step, without the end-of-sequence token that ends the completion.

    Any other special token stays visible, so that no checker takes a step with one in it for a clean one.
    """
    ids = list(completion_ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    starts = [0, *ends][: len(ends)]
    pieces = [ids[a:b] for a, b in zip(starts, ends, strict=True)]
    return [str(text) for text in tokenizer.batch_decode(pieces, skip_special_tokens=False)] if pieces else []


def step_statistics(rollouts: Sequence[Rollout]) -> dict:
    """How many steps the completions have and how long those are, in tokens; completions without a token are left out.

    `single_step_share_by_style` is filled only where over half of the completions have one step: the share that each
    style that needs no pattern leaves with one, on the same texts. Numbers are None where there is no completion.
    """
    segmented = [r for r in rollouts if r.step_ends]
    counts = np.array([len(r.step_ends) for r in segmented])
    lengths = np.concatenate([np.diff(r.step_ends, prepend=0) for r in segmented]) if segmented else np.array([])
    single = float((counts == 1).mean()) if segmented else None
    by_style = {}
    if single is not None and single > 0.5:
        for style in (StepStyle(name) for name in STYLES if name != "regex"):
            alone = sum(len(step_boundaries(r.completion, style)) <= 1 for r in segmented)
            by_style[style.name] = alone / len(segmented)
    return {
        "completions": len(segmented),
        "steps": int(counts.sum()),
        "steps_mean": float(counts.mean()) if segmented else None,
        "steps_median": float(np.median(counts)) if segmented else None,
        "steps_max": int(counts.max()) if segmented else None,
        "step_tokens_mean": float(lengths.mean()) if segmented else None,
        "step_tokens_p95": float(np.percentile(lengths, 95)) if segmented else None,
        "single_step_share": single,
        "single_step_share_by_style": by_style,
    }


def style_warning(statistics: dict, style_name: str) -> str | None:
    """A warning where over half of at least 20 completions have one step: `style_name`, the share, and which styles
    would find more in the same texts. `statistics` is what `step_statistics` returned."""
    share, count = statistics["single_step_share"], statistics["completions"]
    if count < 20 or share <= 0.5:
        return None
    better = sorted(
        (s, n) for n, s in statistics["single_step_share_by_style"].items() if n != style_name and s < share
    )
    text = f"step_style {style_name} finds a single step in {share:.0%} of {count} completions"
    if not better:
        return f"{text}, and no other style finds more: ask for steps in the instruction, or give a step_pattern"
    return f"{text}; in the same texts " + ", ".join(f"{name} does in {s:.0%}" for s, name in better[:3])


def _inner_boundaries(text: str, style: StepStyle) -> list[int]:
    """Character counts at which all steps but the last end: text stands before, between and behind them."""
    if style.name == "auto":
        for name in AUTO:
            if found := _inner_boundaries(text, StepStyle(name)):
                return found
        return _inner_boundaries(text, LINES)
    ends: list[int] = []
    begin = 0
    for start, end in _separators(text, style):
        if text[begin:start].strip():
            ends.append(end)
        elif ends:
            ends[-1] = end
        begin = end
    if ends and not text[ends[-1] :].strip():
        ends.pop()
    return ends


def _separators(text: str, style: StepStyle) -> Iterable[tuple[int, int]]:
    """Where the separators begin and end, in characters; those before a mark are empty."""
    if style.name in _ENDING:
        return (match.span() for match in _ENDING[style.name].finditer(text))
    if style.name == "regex":
        return _matches(text, style)
    marks = list(_OPENING[style.name].finditer(text))
    if marks and int(marks[0].groupdict().get("number") or 1) <= 1:
        del marks[0]
    return ((mark.start(), mark.start()) for mark in marks)


def _matches(text: str, style: StepStyle) -> list[tuple[int, int]]:
    try:
        return [match.span() for match in style.pattern.finditer(text, timeout=PATTERN_SECONDS)]
    except TimeoutError as error:
        raise RunError(
            f"step_pattern {style.pattern.pattern!r} took over {PATTERN_SECONDS:.0f} s on a completion of {len(text)} "
            f"characters that begins {text[:60]!r}: rewrite it without repeats inside repeats"
        ) from error


def _read(
    completion_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, special_tokens: bool
) -> tuple[str, list[int]]:
    """The text of the completion, and where in it each token starts, in characters; linear in the length.

    Tokens that are part of one character start together. With `special_tokens` those within the text have theirs.
    """
    backend = tokenizer.backend_tokenizer
    special = {n for n, token in backend.get_added_tokens_decoder().items() if token.special}
    tail = len(completion_ids)
    while tail and completion_ids[tail - 1] in special:
        tail -= 1
    stream, pieces, starts, length = DecodeStream(), [], [], 0
    held: list[int] = []
    for position, token in enumerate(completion_ids):
        starts.append(length)
        if token in special and (not special_tokens or position >= tail):
            continue
        held.append(token)
        try:
            piece = stream.step(backend, token)
        except Exception as error:  # tokenizers has no class of its own for it
            if "Invalid prefix" not in str(error):
                raise
            piece = None
            broken = True
        else:
            broken = len(held) > MAX_HELD
        if broken:
            # Bytes that are no UTF-8: an invalid byte may change how the valid ones before it are decoded, and a
            # stream that waits for the end of a character reads all that it holds again with every token.
            stream, piece = DecodeStream(), backend.decode(held, skip_special_tokens=False)
        if piece or broken:
            held = []
            pieces.append(piece or "")
            length += len(pieces[-1])
    return "".join(pieces), starts
