"""Steps as a partition of generated token ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from stepkto_fast.policy import build_tokenizer
from stepkto_fast.segmentation import step_ends, step_texts

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
