"""Rows of data sets, as values and as bytes, through every reader: each is a row or a complaint, and a file as a whole
at most a RunError. What comes out can be tokenised, and its steps partition it.
"""

import gzip
import json
import sys
from pathlib import Path

import fuzzing
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from stepkto_fast.errors import RunError
from stepkto_fast.labelled import labelled_rollouts, read_labelled
from stepkto_fast.labelled_formats import FORMATS
from stepkto_fast.policy import build_byte_tokenizer
from stepkto_fast.segmentation import STYLES, step_style
from stepkto_fast.tasks import arithmetic, math

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FOLDER = Path()  # each part of a fuzzer has a working directory of its own
SAID = [
    "What is 1 + 1?", "Step 1: 1 + 1 = 2 ки\nStep 2: \\boxed{2} ки", "Step 1: 1 + 1 = 2 +\nStep 2: \\boxed{2} -",
    "so 2", "\\boxed{2}", "\\boxed{", "#### 2", "####", "2", "1e400", "-0.0", "solution", "found_error",
    "bad_problem", "user", "assistant", "system", "Compute left to right, modulo 10: 3 + 4 * 2", "", " ", "\n", "\0",
    "\u202e", "<eos>", "\ud800", "😀", "\ufeff", "x" * 2500,
]  # fmt: skip
NAMES = sorted(
    {name for known in FORMATS.values() for name in known.columns}
    | {
        "solution", "answer", "subset", "task", "id", "final_answer_correct", "chosen_completion", "human_completion",
        "finish_reason", "pre_generated_steps", "pre_generated_answer", "ground_truth_answer", "rating", "text", "role",
        "content", "flagged", "corrected_rating", "tools", "chat_template_kwargs", "chosen", "where", "", "steps",
    }
)  # fmt: skip
TEXTS = st.sampled_from(SAID) | st.text(max_size=12)
SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 5) | st.sampled_from([2**63, -(2**70), 10**30, 1.5, -0.0, 1e308])
    | st.floats() | TEXTS
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | TEXTS, inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "bad"]), "content": TEXTS}),
    max_size=3,
)
STEPS = st.lists(TEXTS, max_size=4)
LABELS = st.lists(st.booleans() | st.none(), max_size=4)
RATED = st.fixed_dictionaries({}, optional={"text": TEXTS, "rating": st.integers(-2, 2) | SCALARS, "flagged": SCALARS})
RATED_STEP = st.fixed_dictionaries(
    {},
    optional={
        "completions": st.lists(RATED, max_size=3) | VALUES,
        "chosen_completion": st.integers(-1, 3) | st.none() | VALUES,
        "human_completion": st.none() | TEXTS | RATED | VALUES,
    },
)
KNOWN_ROWS = {
    "stepwise": {"prompt": TEXTS | MESSAGES, "completions": STEPS, "labels": LABELS, "label": st.booleans()},
    "unpaired": {"prompt": TEXTS | MESSAGES, "completion": TEXTS | MESSAGES, "label": st.booleans(), "labels": LABELS},
    "prm800k": {
        "question": st.fixed_dictionaries(
            {"problem": TEXTS}, optional={"pre_generated_steps": STEPS, "ground_truth_answer": TEXTS,
                                          "pre_generated_answer": TEXTS},
        ),
        "label": st.fixed_dictionaries({"steps": st.lists(RATED_STEP, max_size=3)}, optional={"finish_reason": TEXTS}),
    },
    "math_shepherd": {"input": TEXTS, "label": TEXTS, "task": VALUES},
    "processbench": {"problem": TEXTS, "steps": STEPS, "label": st.integers(-2, 4), "final_answer_correct": SCALARS},
    "problem": {"problem": TEXTS, "question": TEXTS, "answer": SCALARS, "solution": TEXTS, "prompt": TEXTS},
}  # fmt: skip


@st.composite
def rows(draw):
    """A row of a known format with any column changed, taken out or put in; or no row at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    row = draw(st.fixed_dictionaries(KNOWN_ROWS[draw(st.sampled_from(sorted(KNOWN_ROWS)))]))
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*row, *NAMES]))
        if draw(st.booleans()):
            row[name] = draw(VALUES)
        else:
            row.pop(name, None)
    return row


def tokenizer(chat):
    made = build_byte_tokenizer(SAID[:6], vocabulary=300)
    made.chat_template = TEMPLATE if chat else None
    return made


TOKENIZERS = [tokenizer(chat=False), tokenizer(chat=True)]


def read_every_way(path, format, neutral, style, chat, max_length):
    """Every reader of the loop on one file."""
    try:
        found = read_labelled(str(path), format=format, neutral=neutral)
    except RunError as error:
        readable(str(error))
    else:
        assert len(found.complaints) <= found.read
        assert 0 <= found.skipped <= found.read
        pieces = step_style(style, r"\n" if style == "regex" else None)
        rollouts, complaints = labelled_rollouts(
            found.rows, TOKENIZERS[chat], max_length=max_length, style=pieces, on_note=readable
        )
        assert len(rollouts) + len(complaints) == len(found.rows)
        for r in rollouts:
            assert r.step_ends == sorted(set(r.step_ends))
            assert r.step_ends[-1] == len(r.completion_ids)
            assert len(r.step_labels) == len(r.step_ends) == len(r.steps)
            assert "".join(r.steps) == r.completion
        for text in (*found.complaints, *complaints):
            readable(text)
    for read in (math.problems, arithmetic.read_problems):
        try:
            problems, complaints = read(str(path))
        except RunError as error:
            readable(str(error))
        else:
            assert problems
            for text in complaints:
                readable(text)


def readable(text):
    """A message that a terminal can show: of Unicode, and not the whole row."""
    text.encode()
    assert len(text) < 2000


READERS = {
    "format": st.sampled_from(["auto", *FORMATS]), "neutral": st.sampled_from(["correct", "incorrect", "unlabelled"]),
    "style": st.sampled_from(STYLES), "chat": st.booleans(), "max_length": st.none() | st.integers(1, 40),
}  # fmt: skip


def check_json_lines(found, ending, **how):
    fuzzing.diary.note((found, ending, how))
    lines = [json.dumps(row) for row in found]
    path = FOLDER / f"rows.{ending}"
    if ending == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif ending == "json":
        path.write_text(f"[{','.join(lines)}]", encoding="utf-8")
    else:
        path.write_text("\n".join(lines), encoding="utf-8")
    read_every_way(path, **how)


def check_parquet(found, **how):
    fuzzing.diary.note((found, how))
    try:
        table = pa.Table.from_pylist([row for row in found if isinstance(row, dict)])
        path = FOLDER / "rows.parquet"
        pq.write_table(table, path)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
        return  # what Arrow has no type for cannot be in a file of its own
    read_every_way(path, **how)


def check_csv(found, **how):
    fuzzing.diary.note((found, how))
    path = FOLDER / "rows.csv"
    path.write_bytes("\n".join(found).encode("utf-8", "surrogatepass"))
    read_every_way(path, **how)


def one_input(data):
    """Bytes as a file of any kind: the first byte says which."""
    endings = ("jsonl", "json", "csv", "parquet", "jsonl.gz")
    path = FOLDER / f"bytes.{endings[data[0] % len(endings)] if data else 'jsonl'}"
    path.write_bytes(data[1:])
    read_every_way(path, "auto", "correct", "auto", chat=False, max_length=None)


LINE = json.dumps({"prompt": "What is 1 + 1?", "completions": ["a", "b"], "labels": [True, None], "label": True})
CORPUS = [
    b"\0" + LINE.encode(), b"\1[" + LINE.encode() + b"]", b"\2prompt,completion,label\n1,2,true",
    b'\0{"problem": "1 + 1", "answer": "2"}', b"\4" + gzip.compress(LINE.encode()),
    b'\0{"question": {"problem": "q"}, "label": {"steps": [{"completions": [{"text": "a", "rating": 1}]}]}}',
]  # fmt: skip

if __name__ == "__main__":
    many = st.lists(rows(), min_size=1, max_size=4)
    sys.exit(
        fuzzing.main(
            __file__,
            {
                check_json_lines: {"found": many, "ending": st.sampled_from(["jsonl", "json", "jsonl.gz"]), **READERS},
                check_parquet: {"found": many, **READERS},
                check_csv: {
                    "found": st.lists(st.sampled_from(["problem,answer", '"a', 'q,"2"', "q,2", "x,y,z", ""]) | TEXTS),
                    **READERS,
                },
            },
            has_bytes=True,
        )
    )
