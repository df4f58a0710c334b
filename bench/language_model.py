"""Hidden states of a real, if small, language model: trained here and now on the Python source that this machine has.

A byte-level BPE tokenizer (package `tokenizers`) with 65,536 entries, a transformer of 8 layers and width 1024, about a
minute of AdamW; then the states, head and next tokens of held-out files. Its entropies are those of a model this weak,
far above a trained policy's: what it adds is a real text's order of the vocabulary and its neighbours that share words.
"""

import itertools
import random
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import torch
from head_inputs import Inputs, Shape
from torch import Tensor, nn
from torch.nn import functional as F


class Size(NamedTuple):
    text: int  # bytes
    vocabulary: int
    width: int
    layers: int
    batch: int
    length: int
    tokens: int  # of the inputs
    seconds: float


REAL = Size(60_000_000, 65536, 1024, 8, 32, 512, 8192, 70.0)
TINY = Size(300_000, 512, 64, 1, 4, 64, 96, 1.0)


def source_files(size: int) -> list[str]:
    folders = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")}
    paths = sorted({path for folder in folders for path in Path(folder).rglob("*.py")})
    random.Random(0).shuffle(paths)
    texts, total = [], 0
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        texts.append(text)
        total += len(text)
        if total >= size:
            break
    return texts


def token_ids(texts: list[str], vocabulary: int) -> list[list[int]]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts[: max(1, len(texts) // 3)], trainer)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


class Model(nn.Module):
    def __init__(self, size: Size, vocabulary: int):
        super().__init__()
        self.token = nn.Embedding(vocabulary, size.width)
        self.place = nn.Embedding(size.length, size.width)
        layer = nn.TransformerEncoderLayer(
            size.width, max(1, size.width // 64), 4 * size.width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True, bias=False,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, size.layers, norm=nn.RMSNorm(size.width), enable_nested_tensor=False)
        self.head = nn.Linear(size.width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """The hidden states before the head."""
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=ids.device)
        x = self.token(ids) + self.place(torch.arange(length, device=ids.device))
        return self.layers(x, mask=mask, is_causal=True)


def real_inputs(device: torch.device, tiny: bool = False) -> Inputs:
    size = TINY if tiny else REAL
    start = time.monotonic()
    files = token_ids(source_files(size.text), size.vocabulary)
    vocabulary = size.vocabulary
    stream = torch.tensor(list(itertools.chain.from_iterable(files)), dtype=torch.int64)
    held = -(-size.tokens // size.length) * size.length + 1
    train, test = stream[:-held].to(device), stream[-held:].to(device)
    prepared = time.monotonic() - start
    torch.manual_seed(0)
    model = Model(size, vocabulary).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    offsets = torch.arange(size.length + 1, device=device)
    start, steps, loss = time.monotonic(), 0, torch.zeros(())
    while (spent := (time.monotonic() - start) / size.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (steps + 1) / 100) * (1 - 0.95 * spent)
        starts = torch.randint(len(train) - size.length, (size.batch, 1), device=device)
        ids = train[starts + offsets]
        with torch.autocast(device.type, torch.bfloat16):
            logits = model.head(model(ids[:, :-1]))
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        del logits
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 10 == 0:
            loss.item()  # or the host would run minutes ahead of its clock
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        hidden = model(test[:-1].view(-1, size.length)).flatten(0, 1)[: size.tokens]
    shape = Shape("lm", size.tokens, size.width, vocabulary, completion=size.length)
    seen = steps * size.batch * size.length
    print(f"language model: {prepared:.0f} s of text, {steps} steps, {seen / 1e6:.1f}M tokens, loss {loss.item():.2f}")
    weight = model.head.weight.detach().to(torch.bfloat16)
    return Inputs(shape, "text", hidden.to(torch.bfloat16), weight, test[1:][: size.tokens].clone())
