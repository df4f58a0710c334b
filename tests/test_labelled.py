"""Labelled completions in each published format, their bad rows, and the rollouts that are made of them."""

import copy
import json
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from stepkto_fast.errors import RunError
from stepkto_fast.labelled import labelled_rollouts, read_labelled
from stepkto_fast.rollout import read_rollouts, write_rollouts
from stepkto_fast.segmentation import step_style

STEPWISE = {"prompt": "3 + 4?", "completions": ["3 + 4 = 7", "It is 8"], "labels": [True, False], "label": False}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(question):
    return [{"role": "user", "content": question}]


def write(path, rows):
    """A file of one row a line; bytes are lines as they are."""
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
    return str(path)


def converted(tmp_path, *rows, **options):
    """The rows without their places."""
    found = read_labelled(write(tmp_path / "x.jsonl", rows), **options)
    assert found.complaints == []
    assert found.read == len(rows)
    return [{k: v for k, v in row.items() if k != "where"} for row in found.rows]


def complaint(tmp_path, row, good, **options):
    """The complaint about `row`, which stands between two good ones that are read all the same."""
    path = write(tmp_path / "x.jsonl", [good, row, good])
    found = read_labelled(path, **options)
    assert {row["where"] for row in found.rows} == {f"{path}:1", f"{path}:3"}
    assert found.read == 3
    (only,) = found.complaints
    assert only.startswith(f"{path}:2: ")
    return only.removeprefix(f"{path}:2: ")


def rated(text, rating, flagged=None):
    return {"text": text, "rating": rating, "flagged": flagged}


def judged(*completions, chosen=0, human=None):
    return {"completions": list(completions) or None, "human_completion": human, "chosen_completion": chosen}


def prm800k(*steps, finish="solution", **question):
    """A line of PRM800K, with all the keys of one."""
    phase2 = "pre_generated_steps" in question
    return {
        "labeler": "00000000-0000-0000-0000-000000000000",
        "timestamp": "2022-07-17T16:56:51.323252",
        "generation": 9 if phase2 else None,
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": {"problem": "How many legs have 3 cats?", "ground_truth_answer": "12", **question},
        "label": {"steps": list(steps), "total_time": 1000, "finish_reason": finish},
    }


SHEPHERD = {
    "input": "A box holds 6 eggs. How many do 4 hold? Step 1: 6 * 4 = <<6*4=24>>24. ки\nStep 2: The answer is: 24 ки",
    "label": "A box holds 6 eggs. How many do 4 hold? Step 1: 6 * 4 = <<6*4=24>>24. +\nStep 2: The answer is: 24 -",
    "task": "GSM8K",
}
BENCH = {
    "id": "gsm8k-17",
    "generator": "a-model",
    "problem": "What is 2 * 3 + 1?",
    "steps": ["2 * 3 = 6.", "6 + 1 = 8.", "So \\boxed{8}."],
    "final_answer_correct": False,
    "label": 1,
}
UNPAIRED = {"prompt": "2 + 2?", "completion": "2 + 2 = 4\n\nSo 4", "label": True}
PRM800K = prm800k(judged(rated("a", 1)))


def test_stepwise_rows_stay_as_they_are(tmp_path):
    chat = {**STEPWISE, "prompt": [{"role": "system", "content": "Add."}, *user("3 + 4?")], "labels": [None, True]}
    outcome_unknown = {k: v for k, v in STEPWISE.items() if k != "label"}
    rows = [STEPWISE, chat, {**outcome_unknown, "label": None}, {**STEPWISE, "subset": "sums", "more": 1}]
    assert converted(tmp_path, *rows) == [STEPWISE, chat, outcome_unknown, {**STEPWISE, "subset": "sums"}]


def test_parquet_has_the_same_rows(tmp_path):
    path = tmp_path / "x.parquet"
    rows = [{**STEPWISE, "prompt": user("3 + 4?")}, {**STEPWISE, "prompt": user("3?"), "labels": [None, True]}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert read_labelled(str(path)).rows == [{**row, "where": f"{path}:{n}"} for n, row in enumerate(rows)]


def test_unpaired_rows_keep_their_text(tmp_path):
    message = {**UNPAIRED, "completion": [{"role": "assistant", "content": UNPAIRED["completion"]}]}
    assert converted(tmp_path, UNPAIRED, message) == [UNPAIRED, UNPAIRED]


def test_prm800k_phase_1_gives_the_path_and_its_alternatives(tmp_path):
    human = {"text": "3 * 4 = 12", "rating": None, "source": "human", "flagged": False, "corrected_rating": None}
    line = prm800k(
        judged(rated("Count.", -1), rated("A cat has 4 legs.", 1), rated("Cats!", 0), chosen=1),
        judged(rated("3 + 4 = 7", -1), rated("3 * 4 = 11", None), chosen=None, human=human),
        judged(rated("Look back.", 0), rated("Flagged.", -1, flagged=True)),
        judged(rated("# Answer\n\n12", 1)),
    )
    prompt, path = user("How many legs have 3 cats?"), ["A cat has 4 legs.", "3 * 4 = 12", "Look back.", "# Answer\n\n12"]
    assert converted(tmp_path, line) == [
        {"prompt": prompt, "completions": path, "labels": [True] * 4, "label": True},
        {"prompt": prompt, "completions": ["Count."], "labels": [False]},
        {"prompt": prompt, "completions": ["Cats!"], "labels": [True]},
        {"prompt": prompt, "completions": [path[0], "3 + 4 = 7"], "labels": [None, False]},
    ]
    assert [r["labels"] for r in converted(tmp_path, line, neutral="incorrect")] == [
        [True, True, False, True], [False], [False], [None, False],
    ]  # fmt: skip
    assert [r["labels"] for r in converted(tmp_path, line, neutral="unlabelled")] == [
        [True, True, None, True], [False], [None, False],
    ]  # fmt: skip
    human["corrected_rating"] = -1
    assert converted(tmp_path, line)[0]["labels"] == [True, False, True, True]


def test_prm800k_phase_2_stops_at_the_first_error_and_the_solution_goes_on(tmp_path):
    steps = ["Cats have legs.", "Each has 3.", "3 * 3 = 9", "# Answer\n\n9"]
    first, error = judged(rated(steps[0], 0)), judged(rated(steps[1], -1), rated("Each has 4.", 1), chosen=None)
    question = {"pre_generated_steps": steps, "pre_generated_answer": "9", "pre_generated_verifier_score": 0.1}
    path, other = converted(tmp_path, prm800k(first, error, finish="found_error", **question))
    assert path["completions"] == steps
    assert path["labels"] == [True, False, None, None]
    assert path["label"] is False
    assert other == {"prompt": path["prompt"], "completions": [steps[0], "Each has 4."], "labels": [None, True]}


@pytest.mark.parametrize(
    ("finish", "answer", "others", "outcome"),
    [
        ("found_error", "9", {}, False),
        ("found_error", " 12 ", {}, True),  # a right answer behind a wrong step
        ("found_error", None, {}, None),
        ("found_error", "9", {"pre_generated_steps": ["other", "steps"]}, None),  # the answer of another solution
        ("solution", "12.0", {}, True),
        ("give_up", "12", {}, True),
        ("give_up", "9", {}, None),
    ],
)
def test_prm800k_outcomes(tmp_path, finish, answer, others, outcome):
    question = {"pre_generated_steps": ["a", "b"], "pre_generated_answer": answer, **others}
    (row,) = converted(tmp_path, prm800k(judged(rated("a", 1)), finish=finish, **question))
    assert row.get("label") is outcome
    assert row["completions"] == (["a"] if others else ["a", "b"])


def test_prm800k_steps_that_nobody_labelled_end_the_path(tmp_path):
    (row,) = converted(tmp_path, prm800k(judged(rated("a", 1)), judged(chosen=None), finish="give_up"))
    assert row == {"prompt": user("How many legs have 3 cats?"), "completions": ["a"], "labels": [True]}


def test_math_shepherd_is_split_at_its_tags(tmp_path):
    odd = {
        "input": "How many are 2 and 2? 2 + 2 = 5 ки The answer is: 5 ки",
        "label": "How many are 2 and 2? 2 + 2 = 5 - The answer is: 5 -",
        "task": None,
    }
    unfinished = {"input": "Q? Step 1: a ки\nStep 2: b", "label": "Q? Step 1: a +\nStep 2: b"}
    quoting = {"input": 'Say "Step 1: x"? Step 1: y ки', "label": 'Say "Step 1: x"? Step 1: y +'}
    assert converted(tmp_path, SHEPHERD, odd, unfinished, quoting) == [
        {
            "prompt": user("A box holds 6 eggs. How many do 4 hold?"),
            "completions": ["Step 1: 6 * 4 = <<6*4=24>>24.", "Step 2: The answer is: 24"],
            "labels": [True, False],
            "label": False,
            "subset": "GSM8K",
        },
        {
            "prompt": user("How many are 2 and 2?"),
            "completions": ["2 + 2 = 5", "The answer is: 5"],
            "labels": [False, False],
            "label": False,
        },
        {"prompt": user("Q?"), "completions": ["Step 1: a", "Step 2: b"], "labels": [True, None]},
        {"prompt": user('Say "Step 1: x"?'), "completions": ["Step 1: y"], "labels": [True], "label": True},
    ]


def test_processbench_labels_end_at_the_first_error(tmp_path):
    rows = [{**BENCH, "label": label, "final_answer_correct": label == -1} for label in (-1, 0, 1, 2)]
    found = converted(tmp_path, *rows)
    assert found[0] == {
        "prompt": user(BENCH["problem"]), "completions": BENCH["steps"], "labels": [True] * 3, "label": True,
        "subset": "gsm8k",
    }  # fmt: skip
    assert [r["labels"] for r in found[1:]] == [[False, None, None], [True, False, None], [True, True, False]]
    assert [r["label"] for r in found[1:]] == [False] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": ...}, "column 'completions' is missing, which stepwise has: the row has label, labels, prompt"),
        ({"labels": [True]}, "column 'labels' has 1 labels for 2 completions"),
        ({"labels": [True, 1]}, "column 'labels' mixes bool and int"),
        ({"labels": ["yes", 0]}, "column 'labels' mixes int and str"),
        ({"labels": [1, 0]}, "column 'labels' holds int"),
        ({"labels": ["+", "-"]}, "column 'labels' holds str"),
        ({"labels": [0.5, None]}, "column 'labels' holds float"),
        ({"labels": "+-"}, "column 'labels' is str '\\+-': give a list"),
        ({"labels": None}, "column 'labels' is NoneType None"),
        ({"label": 0}, "column 'label' is int 0"),
        ({"label": "true"}, "column 'label' is str 'true'"),
        ({"completions": []}, r"column 'completions' is list \[\]"),
        ({"completions": "a\nb"}, r"column 'completions' is str 'a\\nb'"),
        ({"completions": ["a", " "]}, "column 'completions' has an empty step 1"),
        ({"completions": ["a", 4]}, "column 'completions' has int 4 as step 1"),
        ({"prompt": ""}, "column 'prompt' is str ''"),
        ({"prompt": 5}, "column 'prompt' is int 5"),
        ({"prompt": []}, r"column 'prompt' is list \[\]"),
        ({"prompt": ["hello"]}, r"column 'prompt\[0\]' is str 'hello': give an object"),
        ({"prompt": [{"role": "human", "content": "a"}]}, r"column 'prompt\[0\].role' is str 'human': give system, "),
        ({"prompt": [{"content": "a"}]}, r"column 'prompt\[0\].role' is NoneType"),
        ({"prompt": [*user("a"), {"role": "assistant"}]}, r"column 'prompt\[1\].content' is missing"),
        ({"prompt": user("  ")}, r"column 'prompt\[0\].content' is empty"),
        ({"prompt": user([{"type": "image"}])}, r"column 'prompt\[0\].content' is list"),
    ],
)
def test_bad_stepwise_rows_are_named(tmp_path, change, message):
    row = {k: v for k, v in {**STEPWISE, **change}.items() if v is not ...}
    assert pytest.raises(AssertionError, match=message) if not message else True
    said = complaint(tmp_path, row, STEPWISE)
    assert __import__("re").match(message, said), said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"prompt": "\xff"}', "is not UTF-8"),
        (b"{", "is not JSON"),
        ({}, "column 'prompt' is missing, which stepwise has: the row has none"),
    ],
)
def test_lines_that_are_no_rows_are_named(tmp_path, row, message):
    assert complaint(tmp_path, row, STEPWISE).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion": " "}, "column 'completion' is empty"),
        ({"completion": ["a"]}, "column 'completion' is list"),
        ({"completion": user("a")}, "column 'completion' is a message with the role str 'user'"),
        ({"completion": [{"role": "assistant", "content": None}]}, "column 'completion' is NoneType"),
        ({"label": None}, "column 'label' is NoneType"),
        ({"label": 1}, "column 'label' is int 1"),
        ({"labels": [2]}, "column 'labels' holds int"),
        ({"prompt": [{"role": "bot", "content": "a"}]}, "column 'prompt[0].role' is str 'bot'"),
    ],
)
def test_bad_unpaired_rows_are_named(tmp_path, change, message):
    assert complaint(tmp_path, {**UNPAIRED, **change}, UNPAIRED).startswith(message)


def step(**change):
    return {**judged(rated("a", 1)), **change}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PRM800K, "question": "q"}, "column 'question' is str 'q': give an object"),
        ({**PRM800K, "question": {"ground_truth_answer": "1"}}, "column 'question.problem' is missing"),
        ({**PRM800K, "label": True}, "column 'label' is bool True: give an object"),
        (prm800k(), "column 'label.steps' is list []"),
        (prm800k(judged(rated("a", 2))), "column 'label.steps[0].completions[0].rating' is int 2: give -1, 0, 1"),
        (prm800k(judged(rated("a", True))), "column 'label.steps[0].completions[0].rating' is bool True"),
        (prm800k(step(), judged(rated("", 1))), "column 'label.steps[1].completions[0].text' is empty"),
        (prm800k(step(chosen_completion=1)), "column 'label.steps[0].chosen_completion' is int 1 of 1"),
        (prm800k(step(chosen_completion="0")), "column 'label.steps[0].chosen_completion' is str '0' of 1"),
        (prm800k(step(completions="a")), "column 'label.steps[0].completions' is str 'a': give a list"),
        (prm800k(step(chosen_completion=None), step()), "column 'label.steps[0]' has no chosen_completion"),
        (prm800k(judged(chosen=None)), "column 'label.steps[0]' has no chosen_completion"),
        (prm800k(step(), finish="bad_problem"), "column 'label.finish_reason' is 'bad_problem'"),
        (prm800k(step(), pre_generated_steps=["a", ""]), "column 'question.pre_generated_steps' has an empty step 1"),
    ],
)
def test_bad_prm800k_rows_are_named(tmp_path, row, message):
    assert complaint(tmp_path, row, PRM800K).startswith(message)


@pytest.mark.parametrize(
    ("text", "signs", "message"),
    [
        ("Q? Step 1: a ки", "Q! Step 1: a +", "columns 'input' and 'label' differ before tag 1"),
        ("Q? Step 1: a ки b ки", "Q? Step 1: a + c -", "columns 'input' and 'label' differ before tag 2"),
        ("Q? Step 1: a ки", "Q? Step 1: a 0", "columns 'input' and 'label' differ before tag 1"),
        ("Q? Step 1: a ки", "Q? Step 1: a + b -", "columns 'input' and 'label' differ behind tag 1"),
        ("Q? Step 1: a", "Q? Step 1: a", "column 'input' has no tag ки"),
        ("Q? A? a ки", "Q? A? a +", "column 'input' has no 'Step 1:' before the first tag"),
        ("Q ки Step 1: a ки", "Q + Step 1: a +", "column 'input' has no 'Step 1:' before the first tag"),
        ("Q? Step 1: a ки ки", "Q? Step 1: a + -", "column 'input' has an empty step 1"),
        (" Step 1: a ки", " Step 1: a +", "column 'input' has no question before its first step"),
        ("Q? Step 1: a ки", True, "column 'label' is bool True"),
    ],
)
def test_bad_math_shepherd_rows_are_named(tmp_path, text, signs, message):
    assert complaint(tmp_path, {"input": text, "label": signs, "task": "MATH"}, SHEPHERD).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, "column 'label' is int 3 for 3 steps"),
        ({"label": -2}, "column 'label' is int -2"),
        ({"label": True}, "column 'label' is bool True"),
        ({"label": "1"}, "column 'label' is str '1'"),
        ({"final_answer_correct": "no"}, "column 'final_answer_correct' is str 'no'"),
        ({"steps": []}, "column 'steps' is list []"),
        ({"problem": 7}, "column 'problem' is int 7"),
    ],
)
def test_bad_processbench_rows_are_named(tmp_path, change, message):
    assert complaint(tmp_path, {**BENCH, **change}, BENCH).startswith(message)


def test_the_format_is_told_by_the_columns(tmp_path):
    lines = {"stepwise": STEPWISE, "unpaired": UNPAIRED, "prm800k": PRM800K, "math_shepherd": SHEPHERD}
    for name, row in {**lines, "processbench": BENCH}.items():
        path = write(tmp_path / "x.jsonl", [b"not a row", {"other": 1}, row])
        found = read_labelled(path)
        assert (found.format, found.read, len(found.complaints)) == (name, 3, 2)
        assert found.rows == read_labelled(path, format=name).rows != []
    path = write(tmp_path / "x.jsonl", [{"text": "a", "score": 1}, STEPWISE])
    assert read_labelled(path).format == "stepwise"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a", "score": 1}], {}, "has the columns score, text, which no format fits. Known are stepwise: prompt"),
        ([b"x"], {}, r"jsonl:1: is not JSON.*, which no format fits. Known are .*processbench: problem, steps, label"),
        ([], {}, "has no row, which no format fits"),
        ([{**STEPWISE, **UNPAIRED}], {}, "jsonl:1 fits the formats stepwise and unpaired: name the one"),
        ([UNPAIRED], {"format": "stepwise"}, r"no row that can be used as stepwise, of 1; the first complaint: .*:1: col"),
        ([STEPWISE], {"format": "prm"}, "format 'prm' is not known: give auto, stepwise"),
        ([STEPWISE], {"neutral": "bad"}, "neutral 'bad' is not known"),
    ],
)
def test_a_source_without_usable_rows_is_an_error(tmp_path, rows, options, message):
    with pytest.raises(RunError, match=message):
        read_labelled(write(tmp_path / "x.jsonl", rows), **options)


@pytest.fixture(scope="module")
def pieces():
    """Byte-level tokens, some of which straddle a line break."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ċ", "b"), ("a", "Ċ"), ("c", "d"), ("Ġ", "c")]
    vocabulary = {t: n for n, t in enumerate(["<eos>", *alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def words():
    """A token a word; what stands between words has none."""
    tokenizer = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1, "a": 2, "b": 3, "xy": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def assert_partition(r):
    assert r.step_ends == sorted(set(r.step_ends))
    assert r.step_ends[0] > 0
    assert r.step_ends[-1] == len(r.completion_ids)
    assert len(r.step_ends) == len(r.step_labels) == len(r.steps)
    assert "".join(r.steps) == r.completion


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data(), separator=st.sampled_from(["\n", "\n\n", " ", "\n \n"]))
def test_steps_partition_the_completion(pieces, words, data, separator):
    steps = data.draw(st.lists(st.text("abcdxy é漢\n", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=5))
    labels = data.draw(st.lists(st.sampled_from([True, False, None]), min_size=len(steps), max_size=len(steps)))
    row = {"prompt": "cc", "completions": steps, "labels": labels}
    prompt = user("cc")
    for tokenizer in (pieces, words):
        ((one, chat), complaints) = labelled_rollouts(
            [row, {**row, "prompt": prompt, "label": True}], tokenizer, separator=separator
        )
        assert complaints == []
        for r in (one, chat):
            assert_partition(r)
            assert r.completion == separator.join(steps)
            assert r.step_labels == [{True: 1, False: 0, None: -1}[label] for label in labels]
            whole = ("cc" if r is one else "cc\n") + r.completion + "<eos>"
            assert r.prompt_ids + r.completion_ids == tokenizer(whole)["input_ids"]
            assert len(r.completion_ids) == len(tokenizer(r.completion + "<eos>")["input_ids"])
        for r in (one, chat):  # a step's tokens lie in its text, but for one that straddles its end
            begin = 0
            for end, text in zip(r.step_ends, r.steps, strict=True):
                assert tokenizer.decode(r.completion_ids[begin:end]).removesuffix("<eos>").replace(" ", "") == (
                    "".join(text.split(" ")) if tokenizer is pieces else tokenizer.decode(tokenizer(text)["input_ids"])
                ).replace(" ", "")
                begin = end
