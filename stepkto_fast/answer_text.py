"""Answers as text: where they stand in a completion or a solution, and the plain numbers among them.

Everything here takes time linear in the length of what it reads, for that is whatever a model wrote.
"""

import re
from decimal import Decimal
from fractions import Fraction

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
# A brace, an escaped character (which may be a brace that does not count), or a box. TeX boxes what follows without
# braces too; a word there is prose about \boxed, and a number that the text breaks off in may be a part of one only.
BRACE = re.compile(
    r"\\(?:boxed|fbox)\s*\{"
    r"|\\(?:boxed|fbox)[ \t]*(?P<bare>[-+.(\[]{0,3}(?:[0-9]|(?<![A-Za-z])[A-Z](?![A-Za-z]))[^\s{}$\\]*)(?=[\s{}$\\])"
    r"|\\.|[{}]",
    re.DOTALL,
)
STATEMENT = re.compile(r"\banswer\b\**\s*(?:is\b|:|=)[\s:*]*", re.IGNORECASE)
STATEMENT_END = re.compile(r"\.(?:[\s*]|$)|\n")

DELIMITER = re.compile(r"(\\\\)|\\?\$|\\[()\[\]]")  # a line break of a matrix is none, though a bracket may follow
SEPARATOR = re.compile(r"(?<=[0-9])(?:\\[,!:; ]|\{,\}(?:\\!)?|,\\!)(?=[0-9]{3}(?![0-9]))")
MIXED = re.compile(r"([+-]?[0-9]+)\s+([0-9]+)/([0-9]+)")
DECIMAL = re.compile(r"[+-]?(?:(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)(?:\.[0-9]+)?|\.[0-9]+)")
FRACTION = re.compile(r"([+-]?)(?:\\[dtc]?frac\{([0-9]+)\}\{([0-9]+)\}|\\[dtc]?frac([0-9])([0-9])|([0-9]+)/([0-9]+))")
# 2e-5 is left out, for it is also 2e - 5; nobody writes 1e - 5, 1.5e3 or 2e-05 for anything but a number.
SCIENTIFIC = re.compile(
    r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|1)[eE][+-]?[0-9]{1,3}|[+-]?[0-9]+(?:E[+-]?|e|e[+-]0)[0-9]{1,2}"
)
MAX_DIGITS = 100

WORDS = re.compile(r"\(?[A-Za-z][A-Za-z'\u2019/(),;:! -]*")
WORD = re.compile(r"[A-Za-z]+")
PERCENT = re.compile(r"\s*per ?cent\b")
# Others of two letters next to a number may be a product of variables.
SHORT_WORDS = re.compile("[ckm]m|[km]g|ml|ft|lb|oz|hr|[ap]m|i[nfs]|o[fn]|a[st]|so", re.IGNORECASE)
# Words after a number that make it another one, add one, or take it back.
NOT_A_UNIT = re.compile(
    r"\b(?:and|or|to|by|over|out|plus|minus|divided|multiplied|squared|cubed|factorial|modulo|mod|remainder"
    r"|pi|theta|alpha|beta|sqrt|root|sin|cos|tan|log|ln|exp|not|no|wrong|incorrect"
    r"|hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?|(?:hundred|thousand|[mbtr]+illion)(?:th)?s?"
    r"|dozens?|zero|ones?|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\b",
    re.IGNORECASE,
)


# ---- where the answer stands ----


def extract_answer(completion: str, finished: bool = True) -> str | None:
    r"""The answer that `completion` states, None where it states none.

    The last `\boxed{...}` or `\fbox{...}` that is closed and not empty. Without one, and only if the completion is
    `finished`: what follows `####` in the last line, or the last "answer is", "answer:" or "answer =", up to the end
    of that sentence. There a number that only words follow is the answer without them: 18 of "18 dollars a day".
    """
    for span in reversed(_boxes(completion, finished)):
        if span and (content := completion[slice(*span)].strip()):
            return content
    statement = _statement(completion) if finished else None
    return statement and leading_number(statement)


def last_box(text: str) -> str | None:
    """What the last `\\boxed{...}` of `text` holds; None where there is none, or the last one is not closed."""
    boxes = _boxes(text, finished=True)
    return text[slice(*boxes[-1])].strip() if boxes and boxes[-1] else None


def _boxes(text: str, finished: bool) -> list[tuple[int, int] | None]:
    """Where the content of each box begins and ends, in the order of their beginnings; None for one that is open."""
    found: list[tuple[int, int] | None] = []
    opened: list[tuple[int, int | None]] = []  # where, and which box it is
    for match in BRACE.finditer(text + "\n" if finished else text):
        token = match.group()
        if bare := match["bare"]:
            found.append((match.start("bare"), match.start("bare") + len(bare.rstrip(".,;:*"))))
        elif token[-1] == "{" and token != r"\{":
            boxed = len(token) > 1
            opened.append((match.end(), len(found) if boxed else None))
            found += [None] * boxed
        elif token == "}" and opened:
            begin, box = opened.pop()
            if box is not None:
                found[box] = begin, match.start()
    return found


def _statement(text: str) -> str | None:
    last_line = text.rstrip().rpartition("\n")[2].strip()
    if re.match("####[^#]", last_line):
        return last_line[4:].strip() or None
    starts = [match.end() for match in STATEMENT.finditer(text)]
    if not starts:
        return None
    end = STATEMENT_END.search(text, starts[-1])
    return text[starts[-1] : end.start() if end else None].strip(" \t*") or None


def leading_number(text: str) -> str:
    """`text` without the words behind its number, such as a unit; all of it where it is more than number and words."""
    number, space, words = text.partition(" ")
    if MIXED.match(text):
        fraction, space, words = words.lstrip().partition(" ")
        number = f"{number} {fraction}"
    number = number.lstrip("*").rstrip("*,;:!")
    value = normalised(number.removesuffix("%").removesuffix("\\"))
    if not space or not (MIXED.fullmatch(number) or plain_number(value)):
        return text
    if percent := PERCENT.match(words):
        number, words = f"{number} percent", words[percent.end() :]
    words = words.strip(" *")
    if words and not WORDS.fullmatch(words):
        return text
    found = WORD.findall(words.removeprefix("a "))
    known = all(len(word) > 2 or SHORT_WORDS.fullmatch(word) for word in found[:1])
    # A single letter is a variable, except an article, and what follows an apostrophe.
    known = known and all(len(word) > 1 or word in "as" for word in found[1:])
    return number if known and not NOT_A_UNIT.search(words) else text


# ---- plain numbers ----


def fixed_point(text: str) -> str:
    """A number in scientific notation written out; other text as it is. To math-verify 1.5e3 is a product with e."""
    if len(text) > MAX_DIGITS or not SCIENTIFIC.fullmatch(text):
        return text
    number = f"{Decimal(text):f}"
    return number if len(number) <= MAX_DIGITS else text


def normalised(answer: str) -> str:
    """`answer` without delimiters, separators of thousands that are not commas, a full stop, and exponents of ten."""
    text = SEPARATOR.sub("", DELIMITER.sub(r"\1", answer)).strip()
    if MIXED.fullmatch(text):
        return MIXED.sub(r"\1\\frac{\2}{\3}", text)
    return fixed_point(text.rstrip(".").rstrip())


def plain_number(text: str) -> tuple[Fraction, bool] | None:
    """The value of an integer, decimal or simple fraction, and whether it is no decimal; None for all other text."""
    if len(text) > MAX_DIGITS:
        return None
    if DECIMAL.fullmatch(text):
        return Fraction(text.replace(",", "")), "." not in text
    if match := FRACTION.fullmatch(text):
        above, below = (int(x) for x in match.groups()[1:] if x is not None)
        return (Fraction(above, below) * (-1 if match[1] == "-" else 1), True) if below else None
    return None
