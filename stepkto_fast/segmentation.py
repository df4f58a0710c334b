"""Steps of a completion as spans of its own token ids: always a partition, never from re-tokenised text.

A step ends with the line that holds it: the boundary is behind a run of line breaks, blank lines belong to the step
before them (leading ones to the first). A token belongs to the step in which it starts, so a separator fused with
the next word stays with the step it ends, and the end-of-sequence token with the last step.
"""

import re
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

BOUNDARY = re.compile(r"\n+\s*")


def step_ends(completion_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where each step of `completion_ids` ends: ascending token counts, the last one `len(completion_ids)`.

    An empty completion has no step: [].
    """
    stream, text, starts = DecodeStream(skip_special_tokens=True), "", []
    for token in completion_ids:
        starts.append(len(text))
        text += stream.step(tokenizer.backend_tokenizer, token) or ""
    ends: list[int] = []
    for match in BOUNDARY.finditer(text):
        if not text[: match.start()].strip() or match.end() == len(text):
            continue
        first_after = next((n for n, start in enumerate(starts) if start >= match.end()), len(starts))
        if first_after > (ends[-1] if ends else 0):
            ends.append(first_after)
    if completion_ids and (not ends or ends[-1] < len(completion_ids)):
        ends.append(len(completion_ids))
    return ends


def step_texts(completion_ids: Sequence[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each step, without the end-of-sequence token that ends the completion.

    Any other special token stays visible, so that no checker takes a step with one in it for a clean one.
    """
    ids = list(completion_ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    starts = [0, *ends][: len(ends)]
    pieces = [ids[a:b] for a, b in zip(starts, ends, strict=True)]
    return [str(text) for text in tokenizer.batch_decode(pieces, skip_special_tokens=False)] if pieces else []
