"""The mathematics task: the shipped sample, the data sets of the hub in their own columns, bad rows, and prompts."""

import json
import re
from itertools import pairwise

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from math_verify import parse, verify
from sympy import Float, I, simplify
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stepkto_fast.answer_text import extract_answer, last_box
from stepkto_fast.errors import RunError
from stepkto_fast.tasks import math
from stepkto_fast.tasks.gold import worked_solution
from stepkto_fast.tasks.math import INSTRUCTION, KNOWN, SAMPLE, problems, prompt

# ---- the sample ----


def sample_rows() -> list[dict]:
    return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


def value(latex: str):
    parsed = parse(f"${latex}$", parsing_timeout=None)[0]
    return parsed.subs({letter: I for letter in parsed.free_symbols if letter.name == "i"})


def test_the_sample_has_the_schema_of_math():
    rows = sample_rows()
    assert [r["split"] for r in rows] == ["train"] * 24 + ["test"] * 6
    assert len({r["problem"] for r in rows}) == 30
    for r in rows:
        assert r.keys() == {"problem", "level", "type", "solution", "answer", "split"}
        assert re.fullmatch("Level [1-5]", r["level"])
        assert last_box(r["solution"]) == r["answer"]
        *steps, last = r["solution"].splitlines()
        assert 3 <= len(steps) <= 6
        assert [s.split(": ")[0] for s in steps] == [f"Step {n}" for n in range(1, len(steps) + 1)]
        assert last == f"The answer is $\\boxed{{{r['answer']}}}$."
        assert len(r["solution"].split()) <= 60
    assert len({r["type"] for r in rows}) == 7
    assert len({r["level"] for r in rows}) == 5


@pytest.mark.parametrize("row", sample_rows(), ids=lambda r: r["answer"])
def test_every_gold_of_the_sample_parses_and_agrees_with_its_box(row):
    gold = parse(f"${row['answer']}$", parsing_timeout=None)
    assert gold
    assert verify(gold, parse(row["solution"], parsing_timeout=None), timeout_seconds=None)


def test_every_equation_of_numbers_in_the_samples_solutions_is_true():
    checked = 0
    for r in sample_rows():
        for equation in re.findall(r"\$([^$]*=[^$]*)\$", r["solution"]):
            if "pmatrix" in equation or re.search(r"(?<![a-z\\])[a-hj-z](?![a-z])", equation):
                continue  # it holds for one value of its letter only
            sides = [value(side) for side in equation.split("=")]
            for left, right in pairwise(sides):
                assert simplify(left - right) == 0, equation
            checked += 1
    assert checked > 40


def test_the_sample_is_read_by_split():
    train, complaints = problems("sample")
    test, more = problems("sample", purpose="test")
    assert (len(train), len(test), complaints, more) == (24, 6, [], [])
    assert not {p.question for p in train} & {p.question for p in test}
    assert test == problems("sample", split="test")[0]
    assert train[0].source == f"{SAMPLE}:1"
    with pytest.raises(RunError, match="no split 'validation': name train or test"):
        problems("sample", split="validation")


# ---- data sets of the hub, in their own columns ----

# What the data sets' cards say: name, configuration, split, columns. The rows are ours.
HUB = {
    "math": (
        "EleutherAI/hendrycks_math",
        math.SUBJECTS,
        "train",
        {
            "problem": "Twice a number is $8$. Find it.",
            "level": "Level 1",
            "type": "Algebra",
            "solution": "We have $2x = 8$, so $x = \\boxed{8/2}$, that is $\\boxed{4}$.",
        },
        ("4", "We have $2x = 8$, so $x = \\boxed{8/2}$, that is $\\boxed{4}$."),
    ),
    "math-500": (
        "HuggingFaceH4/MATH-500",
        ("default",),
        "test",
        {
            "problem": "Halve $3$.",
            "solution": "It is $\\boxed{\\frac{3}{2}}$.",
            "answer": "\\frac{3}{2}",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": "test/prealgebra/1.json",
        },
        ("\\frac{3}{2}", "It is $\\boxed{\\frac{3}{2}}$."),
    ),
    "gsm8k": (
        "openai/gsm8k",
        ("main",),
        "train",
        {
            "question": "A van holds 600 jars. How much do 2 full vans of jars at 3 dollars cost?",
            "answer": "Two vans hold 2*600 = <<2*600=1200>>1200 jars.\n"
            "They cost 3*1200 = <<3*1200=3600>>3600.\n#### $3,600",
        },
        (
            "3600",
            "Two vans hold 2*600 = 1200 jars.\nThey cost 3*1200 = 3600.\nThe answer is $\\boxed{3600}$.",
        ),
    ),
    "numinamath-cot": (
        "AI-MO/NuminaMath-CoT",
        ("default",),
        "train",
        {
            "source": "ours",
            "problem": "Solve $x^2 = x$ for $x > 0$.",
            "solution": "Divide by $x$: \\[ \\boxed{x = 1} \\]",
            "messages": [{"content": "Solve $x^2 = x$ for $x > 0$.", "role": "user"}],
        },
        ("x = 1", "Divide by $x$: \\[ \\boxed{x = 1} \\]"),
    ),
    "amc23": (
        "math-ai/amc23",
        ("default",),
        "test",
        {"id": 0, "question": "What is $20 + 7$?", "answer": 27.0, "url": "https://example.org"},
        ("27", None),
    ),
    "aime24": (
        "HuggingFaceH4/aime_2024",
        ("default",),
        "train",
        {
            "id": 60,
            "problem": "What is $5^2$?",
            "solution": "It is 25.",
            "answer": "025",
            "url": "https://example.org",
            "year": "2024",
        },
        ("025", None),
    ),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The data sets as folders with the hub's names, which `load_dataset` takes before it asks the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for path, configs, split, row, _ in HUB.values():
        card = ["---", "configs:"]
        for config in configs:
            data = datasets.Dataset.from_list([row, {**row, "problem" if "problem" in row else "question": config}])
            data.to_parquet(tmp_path / path / config / f"{split}-00000-of-00001.parquet")
            card += [f"- config_name: {config}", "  data_files:"]
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
        (tmp_path / path / "README.md").write_text("\n".join([*card, "---"]))


@pytest.mark.parametrize("name", [*HUB, "HuggingFaceH4/MATH-500"])
def test_a_data_set_of_the_hub_is_read_in_its_own_columns(hub, name):
    path, configs, split, row, (gold, solution) = HUB[name.split("/")[-1].lower()]
    found, complaints = problems(name, split=split)
    assert found[0].question == (row.get("problem") or row["question"])
    assert (found[0].answer, found[0].solution) == (gold, solution)
    assert found[0].source == ("algebra of " if name == "math" else "") + f"{path}[{split}]:0"
    assert {p.question for p in found} == {found[0].question, *configs}, "every configuration is read"
    repeats = len(configs) - 1
    assert len(complaints) == repeats
    assert all(f"repeats the question of {found[0].source}; the first is kept" in c for c in complaints)


def test_the_hub_is_asked_for_the_documented_names(monkeypatch):
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        (row,) = (row for p, _, _, row, _ in HUB.values() if p == path)
        return datasets.Dataset.from_list([row], split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in HUB:
        if KNOWN[name].train_split:
            problems(name, purpose="train")
        problems(name, purpose="test")
    subjects = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
    assert asked == [
        *(("EleutherAI/hendrycks_math", subject, split) for split in ("train", "test") for subject in subjects.split()),
        ("HuggingFaceH4/MATH-500", "default", "test"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("AI-MO/NuminaMath-CoT", "default", "train"),
        ("AI-MO/NuminaMath-CoT", "default", "test"),
        ("math-ai/amc23", "default", "test"),
        ("HuggingFaceH4/aime_2024", "default", "train"),
    ]


def test_what_cannot_be_loaded_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"did you mean 'gsm8k'.*set question_column and answer_column"):
        problems("gsm-8k")
    with pytest.raises(RunError, match=r"openai/gsm8k cannot be loaded.*HF_HUB_OFFLINE.*columns question, answer"):
        problems("gsm8k")
    with pytest.raises(RunError, match="'amc23' is a benchmark without a split to train on"):
        problems("amc23")
    with pytest.raises(RunError, match="nobody/nothing cannot be loaded"):
        problems("nobody/nothing", question_column="q", answer_column="a")


# ---- files of one's own ----


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_needs_no_schema_where_its_columns_have_the_usual_names(tmp_path, kind):
    rows = [
        {"question": " One?\n", "answer": " 1 "},
        {"question": "Two thousand?", "answer": "It is <<2*1000=2000>>2000.\n#### 2,000"},
        {"question": "A half?", "answer": "so \\boxed{\\frac{1}{2}}"},
    ]
    path = tmp_path / f"mine.{kind}"
    if kind == "jsonl":
        written(path, [*rows, {"prompt": "Four?", "solution": "\\boxed{\\{4\\}}"}, {"problem": "Five?", "answer": 5.5}])
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    found, complaints = problems(str(path))
    assert not complaints
    assert [p.answer for p in found] == ["1", "2000", "\\frac{1}{2}", "\\{4\\}", "5.5"][: len(found)]
    assert len(found) == (5 if kind == "jsonl" else 3)
    assert found[0].question == "One?"
    assert found[0].solution is None
    assert found[1].solution == "It is 2000.\nThe answer is $\\boxed{2000}$."


def test_columns_of_other_names_are_set(tmp_path):
    path = written(tmp_path / "mine.jsonl", [{"aufgabe": "Wie viel ist $1 + 1$?", "ergebnis": 2}])
    with pytest.raises(
        RunError, match=r"no column 'problem' or 'question' or 'prompt'; it has aufgabe, ergebnis.*set q"
    ):
        problems(path)
    with pytest.raises(RunError, match=r"no column 'answer' or 'solution'.*set answer_column"):
        problems(path, question_column="aufgabe")
    with pytest.raises(RunError, match=r"no column 'answr'.*set answer_column"):
        problems(path, question_column="aufgabe", answer_column="answr")
    found, _ = problems(path, question_column="aufgabe", answer_column="ergebnis")
    assert [(p.question, p.answer) for p in found] == [("Wie viel ist $1 + 1$?", "2")]
    beside, _ = problems("sample", question_column="aufgabe", answer_column="ergebnis")
    assert beside == problems("sample")[0], "they are not for the data sets whose columns are known"


def test_a_known_data_set_with_other_columns_than_documented_is_named(hub, tmp_path):
    changed = tmp_path / "openai/gsm8k/main/train-00000-of-00001.parquet"
    datasets.Dataset.from_list([{"query": "1 + 1?", "answer": "#### 2"}]).to_parquet(changed)
    with pytest.raises(RunError, match=r"'gsm8k' has no column 'question'; it has answer, query.*give a local file"):
        problems("gsm8k")


BAD = [
    ({"answer": "1"}, "column 'problem' is missing"),
    ({"problem": ["a", "list"], "answer": "1"}, "column 'problem' is list"),
    ({"problem": " \n", "answer": "1"}, "column 'problem' is empty"),
    ({"problem": "No gold?"}, "column 'answer' is missing"),
    ({"problem": "A list?", "answer": ["1"]}, "column 'answer' is list"),
    ({"problem": "A truth?", "answer": True}, "column 'answer' is bool"),
    ({"problem": "Nothing?", "answer": None}, "column 'answer' is NoneType"),
    ({"problem": "Empty?", "answer": ""}, "column 'answer' is empty"),
    ({"problem": "No box?", "solution": "It is 4."}, "column 'solution' ends without a whole \\boxed{...}"),
    ({"problem": "Cut off?", "solution": "\\boxed{3} or \\boxed{\\frac{1}{"}, "column 'solution' ends without a whole"),
    ({"problem": "Empty box?", "solution": "\\boxed{ }"}, "column 'solution' ends without a whole"),
    ({"problem": "No hashes' answer?", "answer": "It is 4.\n#### "}, "column 'answer' has nothing behind '####'"),
    ({"problem": "Which line?", "answer": "It is 4,\nI think."}, "column 'answer' has several lines"),
]


def test_bad_rows_are_named_and_the_others_go_on(tmp_path):
    rows = [row for row, _ in BAD]
    path = written(
        tmp_path / "mine.jsonl", [{"problem": "First?", "answer": 1}, *rows, {"problem": "Last?", "answer": 2}]
    )
    with open(path, "ab") as file:
        file.write(b'{"problem": "\xff", "answer": "1"}\n')
    found, complaints = problems(path)
    assert [p.answer for p in found] == ["1", "2"]
    assert len(complaints) == len(BAD) + 1
    for number, (complaint, (_, why)) in enumerate(zip(complaints, BAD, strict=False), start=2):
        assert complaint.startswith(f"{path}:{number}: {why}")
    assert "is not UTF-8" in complaints[-1]


def test_a_file_without_a_usable_row_is_an_error(tmp_path):
    with pytest.raises(RunError, match=r"no usable problem; first complaint: .*:1: column 'answer' is empty"):
        problems(written(tmp_path / "a.jsonl", [{"problem": "x", "answer": ""}]))
    with pytest.raises(RunError, match=r"it is empty"):
        problems(written(tmp_path / "b.jsonl", []))


def test_infinite_golds_of_parquet_are_refused(tmp_path):
    rows = {"problem": ["a", "b", "c"], "answer": [1.0, float("inf"), float("nan")]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "mine.parquet")
    found, complaints = problems(str(tmp_path / "mine.parquet"))
    assert [p.answer for p in found] == ["1"]
    assert len(complaints) == 2
    assert "column 'answer' is float inf: give a finite number" in complaints[0]


def test_the_first_of_repeated_questions_is_kept(tmp_path):
    rows = [("Q one?", 1), ("Q  one? ", 1), ("Q two?", 2), ("Q one?", 3)]
    path = written(tmp_path / "mine.jsonl", [{"question": q, "answer": a} for q, a in rows])
    found, complaints = problems(path)
    assert [(p.question, p.answer) for p in found] == [("Q one?", "1"), ("Q two?", "2")]
    assert complaints == [
        f"{path}:2: repeats the question of {path}:1; the first is kept",
        f"{path}:4: repeats the question of {path}:1, with another answer; the first is kept",
    ]


# ---- golds ----

CONTENTS = st.recursive(
    st.text(alphabet="x1+ \n,$", max_size=6),
    lambda inner: st.lists(
        st.one_of(inner, inner.map(lambda s: f"{{{s}}}"), st.sampled_from([r"\{", r"\}", r"\\", r"\frac{1}{2}"])),
        max_size=4,
    ).map("".join),
    max_leaves=6,
)


@given(CONTENTS, st.text(alphabet="ab} .$\n\\", max_size=8))
def test_the_last_box_is_found_with_every_brace_in_it(content, after):
    assert last_box(f"first \\boxed{{7}} then \\boxed{{{content}}}{after}") == content.strip()


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (27.0, "27"), (-0.0, "0"), (2.5, "2.5"), (1e-05, "0.00001"), (-1.25e-7, "-0.000000125"), (1e23, "1" + "0" * 23),
        (7, "7"), (0.1, "0.1"), ("1.5e3", "1500"), ("2E-4", "0.0002"), (" 1e-5 ", "0.00001"), ("2e - 5", "2e - 5"),
        ("x^2", "x^2"), ("#### 1.5e3", "1500"), ("\\boxed{2.5E-4}", "0.00025"),
    ],
)  # fmt: skip
def test_golds_are_in_fixed_point(tmp_path, value, gold):
    (found,), _ = problems(written(tmp_path / "mine.jsonl", [{"question": "q", "answer": value}]))
    assert found.answer == gold
    if isinstance(value, float):
        assert verify(parse(f"${gold}$", parsing_timeout=None), Float(value), timeout_seconds=None)


def test_a_completion_and_a_solution_are_read_alike():
    for text in (r"$\boxed 3$", r"\boxed 3.", r"\boxed{3}", r"\fbox{\boxed{3}}", r"\boxed{4}, \boxed3 }"):
        assert last_box(text) == extract_answer(text) == "3"


def test_other_ways_to_box():
    assert last_box("It is $\\boxed 5$.") == "5"
    assert last_box("It is \\boxed 5.") == "5"
    assert last_box("It is \\fbox{6}.") == "6"
    assert last_box("It is \\boxed{\\text{(A)}\\ 7}") == "\\text{(A)}\\ 7"
    assert last_box("No box") is None
    assert last_box("\\boxed") is None
    assert worked_solution("No box", "1") is None


# ---- prompts ----

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
SILENT = CHATML.replace("in messages", "in messages if m['role'] == 'user'")


def templated(template: str | None) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<|im_start|>")
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {name: templated(t) for name, t in [("chatml", CHATML), ("no_system", NO_SYSTEM), ("plain", None)]}


def test_a_chat_template_gets_the_question_the_instruction_and_the_system_prompt():
    asked = prompt("What is $1 + 1$?", TOKENIZERS["chatml"], system_prompt="Be brief.")
    assert asked.templated
    assert asked.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nWhat is $1 + 1$?\n\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "Step 1:" in INSTRUCTION
    assert "\\boxed{}" in INSTRUCTION


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT], ids=["rejects", "drops"])
def test_a_template_without_a_system_role_gets_its_text_in_front_of_the_question(template):
    asked = prompt("Why?", templated(template), system_prompt="Be brief.", instruction="Box it.")
    assert asked.text == "<|im_start|>user\nBe brief.\n\nWhy?\n\nBox it.<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_template_the_prompt_is_plain_text():
    asked = prompt("Why?", TOKENIZERS["plain"])
    assert (asked.text, asked.templated) == (f"Why?\n\n{INSTRUCTION}\n", False)
    assert prompt("Why?", TOKENIZERS["plain"], system_prompt="Be brief.", instruction="").text == "Be brief.\n\nWhy?\n"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{{ raise_exception('only assistants here') }}",
            "fails on a message with the role 'user'.*only assistants here",
        ),
        ("{% for %}", "fails on a message with the role 'user'.*TemplateSyntaxError"),
        ("{{ messages[7]['content'] + 1 }}", "fails on a message with the role 'user'"),
        ("Hello", "leaves out or changes a message with the role 'user'"),
    ],
)
@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_a_template_that_fails_is_an_error_with_a_remedy(template, why, system_prompt):
    with pytest.raises(RunError, match=f"(?s){why}.*mend chat_template.jinja"):
        prompt("Why?", templated(template), system_prompt=system_prompt)


@given(question=st.text(min_size=1).filter(str.strip), system=st.sampled_from([None, "Be brief."]))
def test_the_prompt_holds_the_question_verbatim(question, system):
    for tokenizer in TOKENIZERS.values():
        text = prompt(question, tokenizer, system_prompt=system).text
        assert f"{question}\n\n{INSTRUCTION}" in text
        assert (system or "") in text
