"""Steps as a partition of generated token ids."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from stepkto_fast import segmentation
from stepkto_fast.errors import RunError
from stepkto_fast.policy import build_tokenizer
from stepkto_fast.segmentation import (
    LINES,
    STYLES,
    step_boundaries,
    step_ends,
    step_statistics,
    step_style,
    step_texts,
    style_warning,
)

TEXT = "Step 1: 3 + 4 = 7\nStep 2: 7 * 2 = 4\nAnswer: \\boxed{ 4 }"


@pytest.fixture(scope="module")
def words():
    return build_tokenizer([TEXT, "a b c ."])


@pytest.fixture(scope="module")
def pieces():
    """Byte-level tokens, some of which straddle a line break."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ċ", "b"), ("a", "Ċ"), ("Ċ", "Ġ"), ("aĊ", "b")]
    vocabulary = {t: n for n, t in enumerate(["<eos>", *alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def fallback():
    """Tokens of SentencePiece's kind: what has no token of its own is spelt in bytes, line breaks among it."""
    words = ["<unk>", "<s>", "</s>", "<step>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abStep1:.#*", "ки", "▁a"]
    vocabulary = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        additional_special_tokens=["<step>"],
    )  # fmt: skip


def style_of(name, pattern=r"\n"):
    return step_style(name, pattern if name == "regex" else None)


def steps_of(text, name, pattern=None):
    ends = step_boundaries(text, step_style(name, pattern))
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_steps_end_with_their_line_and_eos_belongs_to_the_last(words):
    ids = [*encode(words, TEXT), words.eos_token_id]
    ends = step_ends(ids, words)
    assert ends == [7, 14, len(ids)]
    assert step_texts(ids, ends, words) == TEXT.splitlines(keepends=True)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("c", ["c"]),
        ("c\n", ["c\n"]),
        ("c\n\n\nc", ["c\n\n\n", "c"]),
        ("\n\nc\nc", ["\n\nc\n", "c"]),
        ("\n\n", ["\n\n"]),
        ("c\n  \n d", ["c\n  \n ", "d"]),
        ("cc\nbc", ["cc\nb", "c"]),  # "\nb" is one token: it stays with the step in which it starts
        ("c\nb", ["c\nb"]),  # and a step that has no token of its own is none
        ("é\n漢字\n!", ["é\n", "漢字\n", "!"]),
    ],
)
def test_separators_and_straddling_tokens(pieces, text, steps):
    ids = encode(pieces, text)
    ends = step_ends(ids, pieces)
    assert step_texts(ids, ends, pieces) == steps


@given(text=st.text(alphabet="ab c\né漢", max_size=40), eos=st.booleans(), cut=st.integers(0, 5))
def test_spans_partition_every_completion(pieces, text, eos, cut):
    ids = encode(pieces, text)
    ids = ids[: len(ids) - cut] + [pieces.eos_token_id] * eos  # cut: a multi-byte character may be left unfinished
    ends = step_ends(ids, pieces)
    assert ends == sorted(set(ends))
    assert (ends[-1] == len(ids) and ends[0] > 0) if ids else ends == []


def test_special_tokens_in_the_middle_stay_visible(words):
    """A checker that could not see them would take a broken step for a clean one."""
    ids = encode(words, "Step 1: 3 + 4 = 7\n")
    broken = [*ids[:3], words.pad_token_id, *ids[3:], words.eos_token_id]
    assert step_texts(broken, step_ends(broken, words), words) == ["Step 1: 3 +<pad> 4 = 7\n"]


def test_an_empty_completion_has_no_step(words):
    assert step_ends([], words) == []
    assert step_texts([], [], words) == []
    assert step_ends([words.eos_token_id], words) == [1]


SOLUTIONS = {
    "lines": ["3 + 4 = 7\n", "7 * 2 = 4\n\n", "Answer: 4"],
    "blank_line": ["First,\n3 + 4 = 7.\n \n", "Then 7 * 2 = 4.\r\n\r\n", "So 4."],
    "step": [
        "Let us see.\nStep 1: 3 + 4 = 7, as in step 9.\n", "**Step 2**\nStep 2.5 is none\n", "Step 3. so\n\n",
        "  ### step 4 adds\n", "**Step 5:** so\n", "Step 6 (check)\n", "Step 7\nSteps 8 and Step 9\nAnswer: 4\n",
    ],
    "heading": ["Well.\n# Solution\n\n## Step 1: add\n#hashtag\n", "## Then\n7 # 2\n", "## Answer\n### 4\n", "### 5"],
    "numbered": ["We add:\n1. 3 + 4 = 7\n   1. nested\n", "2) 1.5 and\n3.5 too\n", "(3) so\n", "**4.** 4\n2004. no"],
    "shepherd": ["Step 1: 3 + 4 = 7 ки\n", "Step 2: яблоки, кит, 7 * 2 = 4 ки\n", "So 4 ки"],
}  # fmt: skip


@pytest.mark.parametrize("name", SOLUTIONS)
def test_each_style_finds_its_steps(name, pieces):
    steps, text = SOLUTIONS[name], "".join(SOLUTIONS[name])
    assert steps_of(text, name) == steps
    ids = [*encode(pieces, text), pieces.eos_token_id]
    ends = step_ends(ids, pieces, step_style(name))
    assert len(ends) == len(steps)
    assert ends[-1] == len(ids)


@pytest.mark.parametrize(
    ("name", "text", "steps"),
    [
        ("step", "and so 7.\nStep 2: 4\nStep 3: 5", ["and so 7.\n", "Step 2: 4\n", "Step 3: 5"]),
        ("step", "Sure.\nStep 1: 7\n", ["Sure.\nStep 1: 7\n"]),
        ("step", "no mark\nat all", ["no mark\nat all"]),
        ("numbered", "the rest\n2. a\n3. b", ["the rest\n", "2. a\n", "3. b"]),
        ("heading", "# A\n## B\n### C\nc", ["# A\n## B\n", "### C\nc"]),
        ("heading", "## A\n\n## B\n# C", ["## A\n\n", "## B\n", "# C"]),
        ("shepherd", " ки ки\na ки ки b", [" ки ки\na ки ки ", "b"]),
        ("blank_line", "\n\n \na\n\n", ["\n\n \na\n\n"]),
        ("lines", "", []),
    ],
)
def test_texts_with_few_or_unusual_marks(name, text, steps):
    assert steps_of(text, name) == steps


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        (";+ ?", ["a; ", "b;;", "c"]),
        (r"(?=\bc)", ["a; b;;", "c"]),
        ("z", ["a; b;;c"]),
        ("; |;", ["a; ", "b;;", "c"]),
    ],
)
def test_a_pattern_ends_a_step_and_a_lookahead_opens_one(pattern, steps):
    assert steps_of("a; b;;c", "regex", pattern) == steps


def test_a_pattern_matches_at_lines():
    assert steps_of("Claim 1\na Claim b\nClaim 2", "regex", "(?=^Claim )") == ["Claim 1\na Claim b\n", "Claim 2"]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [(text, name) for name, steps in SOLUTIONS.items() if (text := "".join(steps)) and name != "lines"]
    + [("a\nb\nStep 1: c", "lines"), ("one", "lines")],
)
def test_auto_is_the_first_style_that_finds_two_steps(pieces, text, chosen):
    assert steps_of(text, "auto") == steps_of(text, chosen)
    ids = encode(pieces, text)
    assert step_ends(ids, pieces, step_style("auto")) == step_ends(ids, pieces, step_style(chosen))


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("regex", None, "needs step_pattern"),
        ("regex", "(", "step_pattern '\\(' is no regular expression"),
        ("regex", "x*", "step_pattern 'x\\*' matches the empty text"),
        ("regex", "^", "matches the empty text"),
        ("step", "x", "step_pattern is read with step_style regex only"),
        ("steps", None, "step_style 'steps' is unknown; did you mean 'step'"),
    ],
)
def test_a_style_that_cannot_be_names_its_key(name, pattern, message):
    with pytest.raises(RunError, match=message):
        step_style(name, pattern)


def test_a_pattern_that_backtracks_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(segmentation, "PATTERN_SECONDS", 0.05)
    with pytest.raises(RunError, match=r"step_pattern .* took over .* repeats inside repeats"):
        step_boundaries("x" * 60, step_style("regex", r"(x|xx|x)+\1y|(\w+\w+)+;"))


TEXTS = st.lists(
    st.sampled_from(
        [
            "\n",
            "\n\n",
            " ",
            "a",
            "é",
            "漢",
            "Step 1:",
            "Step 2.",
            "## ",
            "# ",
            "1. ",
            "(2) ",
            "**",
            " ки\n",
            "\r\n",
            "\x1c",
        ]
    ),
    max_size=20,
).map("".join)


@given(text=TEXTS, name=st.sampled_from(STYLES))
def test_boundaries_partition_every_text(text, name):
    ends = step_boundaries(text, style_of(name))
    assert ends == sorted(set(ends))
    assert ends[-1:] == ([len(text)] if text else [])
    if text.strip():
        assert all(text[a:b].strip() for a, b in zip([0, *ends], ends, strict=False))


@given(data=st.data(), name=st.sampled_from(STYLES))
def test_spans_partition_random_token_ids(pieces, fallback, data, name):
    """Special tokens, bytes that are no characters, ids that the tokenizer does not know."""
    tokenizer = data.draw(st.sampled_from([pieces, fallback]))
    marks = tokenizer("\n\nStep 1: a ки\n## a\n1. b")["input_ids"]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2) | st.sampled_from(marks), max_size=60))
    ends = step_ends(ids, tokenizer, style_of(name))
    assert ends == sorted(set(ends))
    assert (ends[-1] == len(ids) and ends[0] > 0) if ids else ends == []


@given(text=TEXTS, name=st.sampled_from(STYLES))
def test_a_step_ends_with_the_token_in_which_its_last_character_starts(fallback, text, name):
    """One byte or known word a token: the ends in tokens are the tokens that start before the ends in characters."""
    ids = encode(fallback, text)
    texts = step_texts(ids, step_ends(ids, fallback, style_of(name)), fallback)
    expected = step_boundaries(text, style_of(name))
    whole = "".join(texts)
    assert whole == text
    assert [t for t in texts if t.strip()] == texts or not text.strip()
    ends = [sum(map(len, texts[: n + 1])) for n in range(len(texts))]
    assert len(ends) == len(expected)
    # "ки" and its blanks may share no token, "▁a" takes one blank with it.
    assert all(0 <= b - a <= 1 for a, b in zip(ends, expected, strict=True))


def reference_ends(ids, tokenizer):
    """Lines the slow way: each token starts where the text of those before it ends."""
    starts = [len(tokenizer.decode(ids[:n], skip_special_tokens=True).rstrip("�")) for n in range(len(ids))]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    cuts = [m.end() for m in re.finditer(r"\n\s*", text) if text[: m.start()].strip() and text[m.end() :].strip()]
    ends = sorted({sum(start < cut for start in starts) for cut in cuts} - {0, len(ids)})
    return [*ends, len(ids)] if ids else []


@given(text=st.text(alphabet="ab c\né漢😀", max_size=30), where=st.integers(0, 200))
def test_lines_are_the_default_and_read_over_special_tokens(pieces, text, where):
    ids = encode(pieces, text)
    ids.insert(where % (len(ids) + 1), pieces.eos_token_id)
    assert step_ends(ids, pieces) == step_ends(ids, pieces, LINES) == reference_ends(ids, pieces)


def test_invalid_bytes_break_neither_the_characters_around_them_nor_the_run(fallback):
    """A byte that is no character may change how valid ones before it are decoded; the tokenizer then gives up."""
    a, line, byte = fallback.convert_tokens_to_ids(["a", "<0x0A>", "<0x85>"])
    assert step_ends([a, line, byte, a, line, a], fallback) == [2, 5, 6]
    assert step_ends([a, line, *[byte] * 500, a, line, a], fallback) == [2, 504, 505]
    many = segmentation.MAX_HELD + 1
    assert step_ends([a, *[byte] * many, line, a], fallback) == [many + 2, many + 3], "given up, then read anew"
    assert step_ends([a, *[byte] * (many - 1), line, a], fallback) == [many + 2], "part of what is no UTF-8"


def test_a_special_token_may_separate_steps(fallback):
    a, mark, end = fallback.convert_tokens_to_ids(["a", "<step>", "</s>"])
    style = step_style("regex", "<step>")
    assert step_ends([a, mark, a, mark, end], fallback, style) == [2, 5]
    assert step_ends([a, mark, a, mark, mark, a, end, end], fallback, style) == [2, 5, 8]
    assert step_ends([a, mark, a], fallback) == [3]


@pytest.fixture
def solved(rollouts):
    """Completions of one line and of several."""
    single = replace(rollouts[0], completion="Step 1: a\n", step_ends=[4])
    double = replace(rollouts[0], completion="1. a\n2. b", step_ends=[1, 4])
    return [single] * 3 + [double] + [replace(single, completion="", step_ends=[])]


def test_statistics_count_steps_and_their_tokens(solved):
    found = step_statistics(solved)
    shares = found.pop("single_step_share_by_style")
    assert found == {
        "completions": 4, "steps": 5, "steps_mean": 1.25, "steps_median": 1.0, "steps_max": 2,
        "step_tokens_mean": 16 / 5, "step_tokens_p95": 4.0, "single_step_share": 0.75,
    }  # fmt: skip
    assert shares == {
        name: 0.75 if name in ("lines", "numbered", "auto") else 1.0 for name in STYLES if name != "regex"
    }
    several = step_statistics(solved[2:])
    assert (several["single_step_share"], several["single_step_share_by_style"]) == (0.5, {})
    assert step_statistics([])["steps_mean"] is None


def test_the_warning_names_the_share_and_the_styles_that_find_more(solved):
    assert style_warning(step_statistics(solved[:4] * 4), "step") is None, "16 completions are too few"
    assert style_warning(step_statistics(solved[2:4] * 10), "step") is None, "half is not over half"
    mixed = [solved[0]] * 11 + [replace(solved[3], step_ends=[4])] * 9
    text = style_warning(step_statistics(mixed), "step")
    assert "step_style step finds a single step in 100% of 20 completions" in text
    assert "auto does in 55%, lines does in 55%, numbered does in 55%" in text
    assert "no other style finds more" in style_warning(step_statistics(solved[:1] * 20), "step")
    assert style_warning(step_statistics([]), "lines") is None
