"""YAML text and command lines into the recipe and the planner: a Recipe, a RunError that a terminal can show, or the
usage that --help asks for; nothing else.
"""

import contextlib
import io
import sys
from dataclasses import asdict, fields
from pathlib import Path

import fuzzing
import yaml
from hypothesis import strategies as st

from stepkto_fast import planner
from stepkto_fast.errors import RunError
from stepkto_fast.hardware import Rates
from stepkto_fast.recipe import Recipe, parse_recipe, write_recipe
from stepkto_fast.settings import parse_settings

FOLDER = Path()  # each part of a fuzzer has a working directory of its own
KEYS = [f.name for f in fields(Recipe)]
RATES = [f.name for f in fields(Rates)]
CHOICES = [
    "auto", "vllm", "transformers", "math", "arithmetic", "server", "colocate", "ray", "regex", "lines", "dataset",
    "monte_carlo", "head", "checker", "consensus", "exact", "lagged", "mismatched", "apo_zero_unpaired", "none",
    "trained", "initial", "h200", "cpu", "true", "false", "True", "yes", "1", "0", "-1", "1e3", "1e-300", "nan", "inf",
    "-inf", "1e400", "0x10", "1_000", "10" * 20, "9" * 5000, "[", "(?P<", "\\n", "", " ", "\0", "\u202e", "😀", "~",
    "{a: 1}", "- 1", "!!python/object/apply:os.system [true]", "&a", "*a", "a: b: c", "\t", "--", "-", "=", "@file",
    "%(prog)s", "null", "tests", "/dev/null", "../..", "http://127.0.0.1:9", "$(true)", "`true`",
]  # fmt: skip
TEXTS = st.sampled_from(CHOICES) | st.text(max_size=8) | st.integers(-3, 300).map(str) | st.floats().map(str)
VALUES = TEXTS | st.integers() | st.floats() | st.booleans() | st.none() | st.dates() | st.lists(TEXTS, max_size=2)
NAMES = st.sampled_from(KEYS) | st.sampled_from(RATES) | TEXTS
WORDS = st.lists(
    st.one_of(
        NAMES.map("--{}".format),
        NAMES.map(lambda name: "--" + name.replace("_", "-")),
        NAMES.map("--no_{}".format),
        st.tuples(NAMES, TEXTS).map(lambda pair: f"--{pair[0]}={pair[1]}"),
        TEXTS,
        st.sampled_from(["-h", "--he", "--plan", "--output"]),
    ),
    max_size=5,
)
PAIRS = st.lists(st.tuples(st.sampled_from(KEYS), TEXTS).map(lambda pair: [f"--{pair[0]}", pair[1]]), max_size=4).map(
    lambda pairs: [word for pair in pairs for word in pair]
)
CONTENTS = st.dictionaries(NAMES | VALUES.filter(lambda value: not isinstance(value, list)), VALUES, max_size=4).map(
    lambda content: yaml.safe_dump(content, allow_unicode=True)
)


def shown(text):
    """What goes to a terminal, which may know ASCII only but is given no half characters."""
    assert len(text) < 40_000
    return text.encode()


def tried(words):
    """The recipe of a command line, or None."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        try:
            recipe = parse_recipe(list(words))
        except RunError as error:
            shown(str(error))
            return None
        except SystemExit as left:
            if left.code or "usage" not in out.getvalue():
                raise AssertionError(f"left with {left.code!r}") from left
            return None
    assert isinstance(recipe, Recipe)
    return recipe


def check_command_line(words):
    fuzzing.diary.note(words)
    tried(words)


def check_reads_back(words):
    """What is written for a resumed run is the recipe again."""
    fuzzing.diary.note(words)
    recipe = tried(words)
    if recipe is not None:
        path = FOLDER / "config.yaml"
        write_recipe(recipe, path)
        again = parse_recipe([str(path)])
        assert repr(asdict(again)) == repr(asdict(recipe))


def check_file(content, words):
    fuzzing.diary.note((content, words))
    path = FOLDER / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    tried([str(path), *words])


def check_plan(words, rates):
    """The planner, of recipes whose model's shape needs no file."""
    fuzzing.diary.note((words, rates))
    if "--model" in words:
        return
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            code = planner.main([*words, *rates])
        except SystemExit as left:
            if left.code:
                raise AssertionError(f"left with {left.code!r}") from left
            return
    assert code in (0, 1)
    shown(out.getvalue())
    assert "Traceback" not in told.getvalue()


def one_input(data):
    """Bytes as a recipe file."""
    path = FOLDER / "bytes.yaml"
    path.write_bytes(data)
    tried([str(path)])
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(RunError):
        parse_settings(Rates, [str(path)], "fuzz")


CORPUS = [b"name: a\nseed: 1\nlearning_rate: 1.0e-3\nbf16: true\n", b"steps: [1, 2]", b"{seed: 0x10, name: !!str 3}"]

if __name__ == "__main__":
    rates = st.lists(st.tuples(st.sampled_from(RATES), TEXTS), max_size=3).map(
        lambda pairs: [word for name, value in pairs for word in (f"--{name}", value)]
    )
    sys.exit(
        fuzzing.main(
            __file__,
            {
                check_command_line: {"words": WORDS},
                check_reads_back: {"words": PAIRS},
                check_file: {"content": CONTENTS | st.text(max_size=30), "words": PAIRS},
                check_plan: {"words": PAIRS, "rates": rates},
            },
            has_bytes=True,
        )
    )
