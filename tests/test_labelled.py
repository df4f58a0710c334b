"""Labelled completions in each published format, their bad rows, and the rollouts that are made of them."""

import copy
import json
import re

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
    prompt, path = (
        user("How many legs have 3 cats?"),
        ["A cat has 4 legs.", "3 * 4 = 12", "Look back.", "# Answer\n\n12"],
    )
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
        (
            {"completions": ...},
            "column 'completions' is missing, which stepwise has: the row has label, labels, prompt",
        ),
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
    said = complaint(tmp_path, row, STEPWISE)
    assert re.match(message, said), said


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
        (
            [{"text": "a", "score": 1}],
            {},
            "has the columns score, text, which no format fits. Known are stepwise: prompt",
        ),
        ([b"x"], {}, r"jsonl:1: is not JSON.*, which no format fits. Known are .*processbench: problem, steps, label"),
        ([], {}, "has no row, which no format fits"),
        ([{**STEPWISE, **UNPAIRED}], {}, "jsonl:1 fits the formats stepwise and unpaired: name the one"),
        (
            [UNPAIRED],
            {"format": "stepwise"},
            r"no row that can be used as stepwise, of 1; the first complaint: .*:1: col",
        ),
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
    merges = [("Ċ", "Ċ"), ("Ċ", "b"), ("a", "Ċ"), ("d", "y"), ("c", "d"), ("Ġ", "c")]
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


@pytest.mark.filterwarnings("ignore:prompts that are tokenised otherwise")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(data=st.data(), separator=st.sampled_from(["\n", "\n\n", " ", "\n \n"]))
def test_steps_partition_the_completion(pieces, words, data, separator):
    # These have no token of their own where a separator swallows them, and are refused.
    texts = st.text("abcdxy é漢\n", min_size=1, max_size=6).filter(lambda s: s.strip() and s not in ("b", "c"))
    steps = data.draw(st.lists(texts, min_size=1, max_size=5))
    labels = data.draw(st.lists(st.sampled_from([True, False, None]), min_size=len(steps), max_size=len(steps)))
    for tokenizer, before in ((pieces, "xx"), (words, "xx ")):
        row = {"prompt": before, "completions": steps, "labels": labels}
        rollouts, complaints = labelled_rollouts([row, {**row, "prompt": user("xx")}], tokenizer, separator=separator)
        assert complaints == []
        for r, prompt in zip(rollouts, (before, "xx\n"), strict=True):
            assert_partition(r)
            assert r.completion == separator.join(steps)
            assert r.step_labels == [{True: 1, False: 0, None: -1}[label] for label in labels]
            assert r.prompt_ids + r.completion_ids == tokenizer(prompt + r.completion + "<eos>")["input_ids"]
        first, begin = rollouts[0], 0
        for end, text in zip(first.step_ends, first.steps, strict=True):
            ids = [token for token in first.completion_ids[begin:end] if token != tokenizer.eos_token_id]
            assert tokenizer.decode(ids) == text if tokenizer is pieces else ids == tokenizer(text)["input_ids"]
            begin = end


def test_a_token_that_straddles_a_boundary_is_in_the_step_in_which_it_starts(pieces):
    row = {"prompt": "x", "completions": ["x", "bx"], "labels": [True, False], "label": True}
    ((r,), _) = labelled_rollouts([row], pieces)
    assert [pieces.decode(ids) for ids in (r.completion_ids[: r.step_ends[0]], r.completion_ids[r.step_ends[0] :])] == [
        "x\nb", "x<eos>",
    ]  # fmt: skip
    assert r.steps == ["x\nb", "x"]


def test_rollouts_of_one_prompt_are_samples_of_one_problem(words, tmp_path):
    one, other = {**STEPWISE, "prompt": "a "}, {**STEPWISE, "prompt": user("a"), "label": True}
    unknown = {k: v for k, v in one.items() if k != "label"}
    rollouts, complaints = labelled_rollouts([one, other, unknown, other], words)
    assert complaints == []
    assert [(r.problem_id, r.sample) for r in rollouts] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [(r.label, r.verified) for r in rollouts] == [(False, True), (True, True), (False, False), (True, True)]
    assert [r.prompt for r in rollouts] == ["a ", "a", "a ", "a"]
    assert all(r.finished and r.completion_ids[-1] == words.eos_token_id and r.logps == [] for r in rollouts)
    write_rollouts(rollouts, tmp_path / "x.parquet")
    assert read_rollouts(tmp_path / "x.parquet") == rollouts


def test_what_is_too_long_is_cut_or_named(words):
    row = {"prompt": "a b ", "completions": ["a b", "b xy a"], "labels": [True, False], "label": True}
    ((whole,), _) = labelled_rollouts([row], words, max_length=8)
    assert (whole.finished, whole.step_ends, whole.step_labels) == (True, [2, 6], [1, 0])
    ((cut,), complaints) = labelled_rollouts([row], words, max_length=6)
    assert_partition(cut)
    assert complaints == []
    assert (cut.finished, cut.step_ends, cut.step_labels) == (False, [2, 4], [1, -1])
    assert cut.completion == "a b\nb xy "
    rollouts, complaints = labelled_rollouts([{**row, "where": "f:3"}], words, max_length=2)
    assert (rollouts, complaints) == (
        [], ["f:3: column 'prompt' has 2 tokens, which leaves none of 2 for the completion: allow for longer ones"]
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:prompts that are tokenised otherwise")
def test_tokens_across_the_prompts_end_have_no_text_of_it(pieces, words):
    row = {"prompt": "xcd", "completion": "yx", "label": True}
    ((whole,), _) = labelled_rollouts([row], pieces)
    assert pieces.convert_ids_to_tokens(whole.completion_ids) == ["c", "dy", "x", "<eos>"]
    assert (whole.completion, whole.steps) == ("yx", ["yx"])
    ((cut,), _) = labelled_rollouts([row], pieces, max_length=2)
    assert (cut.completion, cut.step_ends) == ("", [1])
    glued = {"prompt": "q", "completion": "a\nb", "label": True}  # "qa" is one unknown word, as "q" is
    ((r,), _) = labelled_rollouts([glued], words)
    assert_partition(r)
    assert (r.completion, r.step_ends) == ("a\nb", [2])


def test_unpaired_completions_are_cut_by_the_style(words):
    row = {"prompt": "x ", "completion": "a b\n\nb a\nxy ки a\n", "label": True}
    ((lines,), _) = labelled_rollouts([row], words)
    assert lines.steps == ["a b\n\n", "b a\n", "xy ки a\n"]
    ((blank,), _) = labelled_rollouts([row], words, style=step_style("blank_line"))
    assert blank.steps == ["a b\n\n", "b a\nxy ки a\n"]
    ((labelled,), _) = labelled_rollouts([{**row, "labels": [True, None, False]}], words)
    assert (labelled.steps, labelled.step_labels) == (lines.steps, [1, -1, 0])
    for r in (lines, blank, labelled):
        assert_partition(r)
    assert lines.step_labels == [-1] * 3


def test_messages_take_the_chat_template(pieces):
    chat = copy.deepcopy(pieces)
    chat.chat_template = TEMPLATE
    row = {**STEPWISE, "prompt": [{"role": "system", "content": "Add."}, *user("3 + 4?")], "where": "f:1"}
    ((r,), complaints) = labelled_rollouts([row], chat)
    assert complaints == []
    assert r.prompt == chat.decode(r.prompt_ids) == "<system>Add.<eos><user>3 + 4?<eos><assistant>"
    assert_partition(r)
    assert r.completion == "3 + 4 = 7\nIt is 8"
    refused = {**row, "prompt": [*user("a"), {"role": "tool", "content": "b"}], "where": "f:2"}
    assert labelled_rollouts([refused], chat) == ([], ["f:2: column 'prompt': no tools here"])
    assert labelled_rollouts([row], pieces)[1] == [
        "f:1: column 'prompt': messages, but the tokenizer has no chat template: give a text, or a model that has one"
    ]


def test_completions_end_as_sampled_ones_do(pieces):
    """ChatML ends a message with the end-of-sequence token and a line break: nobody samples the latter."""
    chat = copy.deepcopy(pieces)
    chat.chat_template = TEMPLATE.replace("{{ eos_token }}", "{{ eos_token }}\n")
    row = {**STEPWISE, "prompt": user("3 + 4?"), "labels": [True, False]}
    sampled = pieces("3 + 4 = 7\nIt is 8<eos>")["input_ids"]
    ((r,), _) = labelled_rollouts([row], chat)
    assert_partition(r)
    assert (r.completion_ids, r.finished, r.step_labels) == (sampled, True, [1, 0])
    assert r.completion == "3 + 4 = 7\nIt is 8"
    length = len(r)
    for room, whole in ((length, True), (length - 1, False)):
        ((cut,), _) = labelled_rollouts([row], chat, max_length=room)
        assert_partition(cut)
        assert (cut.finished, cut.step_labels) == (whole, [1, 0 if whole else -1])
        assert cut.completion_ids == sampled[: None if whole else -1]
    unpaired = {"prompt": user("3 + 4?"), "completion": "3 + 4 = 7\nIt is 8", "label": False}
    ((lines,), _) = labelled_rollouts([unpaired], chat)
    assert (lines.completion_ids, lines.step_ends) == (sampled, r.step_ends)
    quoted = {**row, "completions": ["x<eos>x", "x"]}  # the mark within the text ends nothing
    ((r,), _) = labelled_rollouts([quoted], chat)
    assert_partition(r)
    assert (r.completion, r.completion_ids) == ("x<eos>x\nx", pieces("x<eos>x\nx<eos>")["input_ids"])


def test_prompts_that_end_within_a_token_are_told_once(pieces):
    rows = [{"prompt": f"x{end}", "completion": "yx", "label": True, "where": f"f:{n}"} for n, end in enumerate("adbd")]
    notes = []
    _, complaints = labelled_rollouts(rows, pieces, on_note=notes.append)
    assert complaints == []
    (note,) = notes
    assert "their completion: 2, the first in f:1. What differs, there 'd', is taken out" in note
    with pytest.warns(UserWarning, match="tokenised otherwise alone"):
        labelled_rollouts(rows, pieces)
    labelled_rollouts([rows[0]], pieces, on_note=notes.append)
    assert len(notes) == 1


def test_skipped_rows_are_rows_of_the_source(tmp_path):
    several = prm800k(judged(rated("a", 1), rated("b", -1), rated("c", -1)))
    found = read_labelled(write(tmp_path / "x.jsonl", [several, b"not a row", several, {"label": 1}]), format="prm800k")
    assert len(found.rows) == 6
    assert (found.read, found.skipped) == (4, 2)


def test_rows_that_tokens_cannot_follow_are_named_and_the_others_kept(words):
    swallowed = {"prompt": "x ", "completions": ["a", "b"], "labels": [None, None], "where": "f:2"}
    miscounted = {**UNPAIRED, "labels": [True], "where": "f:3"}
    rollouts, complaints = labelled_rollouts([STEPWISE, swallowed, miscounted, STEPWISE], words, separator="")
    assert [(r.problem_id, r.sample) for r in rollouts] == [(0, 0), (0, 1)]
    assert complaints[0].startswith("f:2: no token starts in step 1")
    assert complaints[1].startswith("f:3 has 1 labels for 2 steps")


def test_progress_is_told(words):
    said = []
    labelled_rollouts([STEPWISE] * 3, words, on_progress=lambda done, total: said.append((done, total)))
    assert said == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_tokenizer_without_an_end_is_refused(pieces):
    endless = copy.deepcopy(pieces)
    endless.eos_token = None
    with pytest.raises(RunError, match="give a fast tokenizer with an eos_token"):
        labelled_rollouts([STEPWISE], endless)
