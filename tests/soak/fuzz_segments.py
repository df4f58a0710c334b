"""Texts and token ids in every style: steps partition the completion, and the steps' texts are the decoded text."""

import sys

import fuzzing
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from stepkto_fast.errors import RunError
from stepkto_fast.policy import build_byte_tokenizer, build_tokenizer
from stepkto_fast.segmentation import STYLES, step_boundaries, step_ends, step_style, step_texts

MARKS = [
    "\n", "\n\n", "\r\n", " ", "\t", "Step 1:", "step 2.", "**Step 3**", "## Step 4\n", "STEP 1", "# ",
    "### a\n#### b", "1. ", "2) ", "(3) ", "9999. ", "ки", " ки\n", "кит", "> ", "*_", "\u2028", "\x1c", "\x85", "\0",
    "é", "漢", "😀", "\u0301", "\u200d", "Answer: \\boxed{4}", "a", "b c", "<eos>", "<pad>", "<0x0A>",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(MARKS) | st.text(max_size=3), max_size=25).map("".join)
PATTERNS = st.sampled_from([r"\n", r"(?=^Step)", r"[.!?]\s", r"\b\w", r"(a|b)+", "<eos>", r".", r"\s+"])
HOWS = st.tuples(st.sampled_from(STYLES), PATTERNS)


def fallback_tokenizer():
    """Of SentencePiece's kind: what has no token of its own is spelt in bytes."""
    words = ["<unk>", "<s>", "</s>", "<step>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abStep1:.#*", "ки", "▁a"]
    tokenizer = Tokenizer(BPE({w: n for n, w in enumerate(words)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<step>"]
    )


TOKENIZERS = {
    "bytes": build_byte_tokenizer(["".join(MARKS) * 3, "Step 1: a\n\nStep 2: b\n"], vocabulary=400),
    "words": build_tokenizer([" ".join(MARKS), "Step 1: 3 + 4 = 7\nAnswer: \\boxed{ 7 }"]),
    "fallback": fallback_tokenizer(),
}


def style(how):
    name, pattern = how
    return step_style(name, pattern if name == "regex" else None)


def check_text(text, how):
    """Boundaries of characters."""
    fuzzing.diary.note((text, how))
    ends = step_boundaries(text, style(how))
    assert ends == sorted(set(ends))
    assert ends[-1:] == ([len(text)] if text else [])
    steps = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert "".join(steps) == text
    assert all(step.strip() for step in steps) or not text.strip()


def partition(ids, tokenizer, how):
    ends = step_ends(ids, tokenizer, style(how))
    assert ends == sorted(set(ends))
    assert (ends[-1] == len(ids) and ends[0] > 0) if ids else ends == []
    return ends


def check_encoded(text, name, how, eos):
    """The texts of the steps, of token ids that encode a text, are that text; cut within characters or not."""
    fuzzing.diary.note((text, name, how, eos))
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ended = [*ids, tokenizer.eos_token_id] if eos else ids
    ends = partition(ended, tokenizer, how)
    whole = ids[:-1] if not eos and ids and ids[-1] == tokenizer.eos_token_id else ids
    assert "".join(step_texts(ended, ends, tokenizer)) == tokenizer.decode(whole)


def check_ids(ids, name, how):
    """Ids that no text has: special ones, bytes that are no characters, numbers that the tokenizer does not know."""
    fuzzing.diary.note((ids, name, how))
    tokenizer = TOKENIZERS[name]
    ids = [n % (len(tokenizer) + 3) for n in ids]
    ends = partition(ids, tokenizer, how)
    assert len(step_texts(ids, ends, tokenizer)) == len(ends)


def check_pattern(pattern, text):
    """A pattern of one's own: a RunError, or a style that partitions; never a hang."""
    fuzzing.diary.note((pattern, text))
    try:
        found = step_style("regex", pattern)
        ends = step_boundaries(text, found)
    except RunError:
        return
    assert ends[-1:] == ([len(text)] if text else [])


def one_input(data):
    """Bytes as token ids, and as text."""
    if len(data) < 2:
        return
    how = (STYLES[data[0] % len(STYLES)], r"\n")
    name = list(TOKENIZERS)[data[1] % len(TOKENIZERS)]
    check_text(data[2:].decode("utf-8", "replace"), how)
    check_ids([int.from_bytes(data[n : n + 2]) for n in range(2, len(data), 2)], name, how)
    check_encoded(data[2:].decode("utf-8", "ignore"), name, how, eos=bool(data[1] & 128))


CORPUS = [
    bytes([n, n]) + text.encode()
    for n in range(8)
    for text in ("Step 1: a\nStep 2: b", "1. a\n\n2. b ки", "# a\n\n## b")
]
PIECES = st.sampled_from(
    ["(", ")", "[", "]", "*", "+", "?", "{2,}", "|", "\\b", "\\n", "^", "$", ".", "a", "(?=", "(?R)", "(?i)"]
)

if __name__ == "__main__":
    names = st.sampled_from(sorted(TOKENIZERS))
    sys.exit(
        fuzzing.main(
            __file__,
            {
                check_text: {"text": TEXTS | st.text(), "how": HOWS},
                check_encoded: {"text": TEXTS, "name": names, "how": HOWS, "eos": st.booleans()},
                check_ids: {"ids": st.lists(st.integers(0, 3000), max_size=60), "name": names, "how": HOWS},
                check_pattern: {"pattern": st.lists(PIECES, max_size=8).map("".join), "text": TEXTS},
            },
            has_bytes=True,
        )
    )
