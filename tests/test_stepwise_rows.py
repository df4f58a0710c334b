"""Rows of TRL's dataset formats as token ids: steps partition them, wherever tokens begin and rows are cut."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from stepkto_fast.policy import build_tokenizer
from stepkto_fast.segmentation import step_ends
from stepkto_fast.stepwise_rows import tokenize_row

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def words():
    return build_tokenizer(["Question: Step 1: Answer: done a b c d + =", " Step 2: 1 2 3 4 7 + =\n", "Step 1: p"])


@pytest.fixture(scope="module")
def pieces():
    """Byte-level tokens, some of which straddle a line break, and a mark that the tokenizer adds at the start."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ċ", "b"), ("a", "Ċ"), ("c", "d")]
    vocabulary = {t: n for n, t in enumerate(["<bos>", "<eos>", *alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", chat_template=TEMPLATE
    )


def tokenized(tokenizer, completions=None, prompt="p", label=True, **rest):
    options = {k: rest.pop(k) for k in ("step_separator", "max_length", "after_first_error") if k in rest}
    row = {"prompt": prompt, "label": label, **({"completions": completions} if completions else {}), **rest}
    return tokenize_row(row, 7, dataset="train", tokenizer=tokenizer, **options)


def texts(tokenizer, row):
    begins = [0, *row["step_ends"]]
    return [tokenizer.decode(row["completion_ids"][a:b]) for a, b in zip(begins, row["step_ends"], strict=False)]


def assert_partition(row):
    ends = row["step_ends"]
    assert ends == sorted(set(ends))
    assert ends[0] > 0
    assert ends[-1] == len(row["completion_ids"])
    assert len(ends) == len(row["step_labels"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    steps=st.lists(st.text("cde é漢", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=5),
    separator=st.sampled_from(["\n", "\n\n", " ", "xyz"]),
)
def test_spans_partition_the_completion_into_its_steps(pieces, steps, separator):
    row = tokenized(pieces, steps, labels=[True] * len(steps), step_separator=separator)
    assert_partition(row)
    assert texts(pieces, row) == [*(s + separator for s in steps[:-1]), steps[-1] + "<eos>"]
    whole = pieces("p" + separator.join(steps) + "<eos>")["input_ids"]
    assert row["prompt_ids"] + row["completion_ids"] == whole


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (["c", "be"], ["c\nb", "e<eos>"]),  # "\nb" starts with the separator, which ends the first step
        (["a", "c"], ["a\n", "c<eos>"]),
        (["a\n", "c"], ["a\n\n", "c<eos>"]),
    ],
)
def test_a_token_belongs_to_the_step_in_which_it_starts(pieces, steps, expected):
    row = tokenized(pieces, steps)
    assert_partition(row)
    assert texts(pieces, row) == expected


def test_a_step_without_a_token_of_its_own_is_refused(pieces):
    with pytest.raises(ValueError, match=r"row 7 of the train dataset: no token starts in step 1.*separator"):
        tokenized(pieces, ["c", "d", "e"], step_separator="")
    with pytest.raises(ValueError, match=r"row 7 of the train dataset: no token starts in step 1"):
        tokenized(pieces, ["c", "d"], step_separator="")  # there is only the end-of-sequence token


def test_a_token_across_the_prompts_end_goes_to_the_first_step_with_a_warning(pieces):
    said = []
    for prompt in ("eepc", "pc"):
        with pytest.warns(UserWarning, match="train dataset is tokenised otherwise .* 'c', is taken out") as warned:
            row = tokenized(pieces, ["d", "e"], prompt=prompt)
        said += [str(warning.message) for warning in warned]
    assert len(set(said)) == 1  # which Python then says once
    assert texts(pieces, row) == ["cd\n", "e<eos>"]
    assert pieces.decode(row["prompt_ids"]) == "<bos>p"


def test_marks_that_a_tokenizer_adds_belong_where_they_stand(pieces):
    ending = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(pieces.backend_tokenizer.to_str()), eos_token="<eos>"
    )
    marks = [("<bos>", 0), ("<eos>", 1)]
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=marks)
    for last in ("e", "<eos>"):
        with pytest.warns(UserWarning, match="'<eos>', is taken out of the prompt"):
            row = tokenized(ending, ["dd", last])
        assert_partition(row)
        assert texts(ending, row) == ["dd\n", last + "<eos>" * (2 if last == "e" else 1)]


def test_prompts_of_messages_take_the_chat_template(pieces):
    prompt = [{"role": "user", "content": "e\nd"}]
    row = tokenized(pieces, ["d", "e"], prompt=prompt, labels=[True, None])
    assert pieces.decode(row["prompt_ids"]) == "<user>e\nd<eos><assistant>"
    assert texts(pieces, row) == ["d\n", "e<eos>"]
    assert row["step_labels"] == [1, -1]
    message = [{"role": "assistant", "content": "d\ne"}]
    one = tokenized(pieces, prompt=prompt, completion=message)
    assert (one["completion_ids"], one["step_ends"], one["step_labels"]) == (row["completion_ids"], [4], [-1])
    echo = copy.deepcopy(pieces)  # the completion once more, in the prompt and behind itself
    echo.chat_template = TEMPLATE + "{% if not add_generation_prompt %}d\ne{% endif %}"
    both = tokenized(echo, ["d", "e"], prompt=[{"role": "user", "content": "d\ne"}])
    assert texts(echo, both) == ["d\n", "e<eos>d\ne"]
    lines = copy.deepcopy(pieces)
    lines.chat_template = TEMPLATE.replace("{{ eos_token }}", "{{ eos_token }}\n")  # as ChatML has it
    assert texts(lines, tokenized(lines, ["d", "e"], prompt=prompt)) == ["d\n", "e<eos>\n"]
    stripping = copy.deepcopy(pieces)
    stripping.chat_template = TEMPLATE.replace("m.content", "m.content | trim")
    with pytest.raises(ValueError, match=r"row 7 .* chat template changes the completion"):
        tokenized(stripping, ["d", "e "], prompt=prompt)


def test_a_completion_is_one_step_or_a_step_a_line(words):
    text = " Step 1: 1 + 2 = 3\nStep 2: 3 + 4 = 7"
    one = tokenized(words, completion=text)
    assert one["step_ends"] == [len(one["completion_ids"])]
    assert one["step_labels"] == [-1]
    lines = tokenized(words, completion=text, labels=[True, False])
    joined = tokenized(words, text.split("\n"), labels=[True, False])
    assert lines == joined
    with pytest.raises(ValueError, match="row 7 of the train dataset has 1 labels for 2 steps"):
        tokenized(words, completion=text, labels=[True])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text("ae \n", min_size=1, max_size=14).filter(str.strip))
def test_lines_are_those_of_the_engines_segmentation(pieces, text):
    ends = step_ends(pieces("p" + text + "<eos>")["input_ids"][2:], pieces)
    row = tokenized(pieces, completion=text, labels=[True] * len(ends))
    assert_partition(row)
    assert row["step_ends"] == ends


def test_truncation_cuts_steps_off_and_takes_the_label_of_the_one_it_cuts(words):
    steps, labels = [" Step 1: 1 + 2 = 3", "Step 2: 3 + 4 = 7", "Answer: done"], [True, False, True]
    full = tokenized(words, steps, labels=labels)
    first, second, whole = full["step_ends"]
    head = len(full["prompt_ids"])
    for room in range(1, whole + 2):
        row = tokenized(words, steps, labels=labels, max_length=head + room)
        assert_partition(row)
        assert row["completion_ids"] == full["completion_ids"][:room]
        kept = sum(end <= room for end in full["step_ends"])
        assert row["step_labels"][:kept] == [1, 0, 1][:kept]
        assert row["step_labels"][kept:] == ([-1] if room < whole and room not in (first, second) else [])
    assert tokenized(words, steps, labels=labels, max_length=head)["completion_ids"] == []


def test_labels_behind_the_first_error_may_be_masked(words):
    steps, labels = ["a", "b", "c", "d"], [True, False, True, False]
    assert tokenized(words, steps, labels=labels)["step_labels"] == [1, 0, 1, 0]
    assert tokenized(words, steps, labels=labels, after_first_error="mask")["step_labels"] == [1, 0, -1, -1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [True]}, "has 1 labels for 2 steps"),
        ({"labels": [True, 1]}, r"has labels\[1\] 1"),
        ({"labels": [0.5, None]}, r"has labels\[0\] 0.5"),
        ({"label": 1}, "has label 1"),
        ({"label": None}, "has label None"),
        ({"completions": []}, r"has completions \[\]"),
        ({"completions": ["a", " "]}, r"has completions \['a', ' '\]"),
        ({"completions": None, "completion": ""}, "has completion ''"),
        ({"prompt": ""}, "has prompt ''"),
        ({"prompt": []}, r"has prompt \[\]"),
        ({"chosen": "a"}, "unpair_preference_dataset"),
    ],
)
def test_bad_rows_are_refused_by_number(words, change, message):
    row = {"prompt": "Question: 1", "completions": ["a", "b"], "labels": [True, None], "label": True, **change}
    with pytest.raises(ValueError, match=f"row 7 of the train dataset.*{message}"):
        tokenize_row(row, 7, dataset="train", tokenizer=words)
