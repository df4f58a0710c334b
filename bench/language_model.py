"""Hidden states of a real, if small, language model, trained on the source of Python's standard library.

A byte-level BPE tokenizer (package `tokenizers`), a transformer, a minute or two of AdamW; then the states, the head
and the next tokens of held-out text. The result is kept in the user's cache folder: it is trained once a machine.

`real` is this model as it is: its entropy is that of a model this weak, far above a trained policy's. `real X` are the
same states multiplied by the one factor that brings the mean entropy to X nats, with targets drawn from what results:
the order of the vocabulary, the neighbours that share words and the spread of the sharpness from token to token are
those of a text, the level is that of rollouts. A sharpened weak model is not a strong one, so figures state rho.
"""

import hashlib
import itertools
import math
import os
import platform
import random
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import stepkto_kernels as sk
import torch
from head_inputs import Inputs, Shape, mean_entropy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


class Size(NamedTuple):
    text: int  # characters
    vocabulary: int
    width: int
    layers: int
    batch: int
    length: int
    tokens: int  # of the inputs
    steps: int


SIZES = {
    "cuda": Size(30_000_000, 65536, 1024, 8, 32, 512, 8192, 700),
    "cpu": Size(12_000_000, 16384, 256, 3, 8, 256, 2048, 110),
    "tiny": Size(300_000, 512, 64, 1, 4, 64, 96, 10),
}
COMPLETION = {"cuda": 512, "cpu": 256, "tiny": 24}


def source_files(size: int) -> list[str]:
    """Texts of the standard library in an order that is the same everywhere, `size` characters together."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in folder.rglob("*.py") if "-packages" not in str(path.relative_to(folder)))
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


def next_token_loss(model: Model, hidden: Tensor, target: Tensor) -> Tensor:
    """On a CPU by this project's own head, in bf16: it trains the model twice as far in the time that there is."""
    if hidden.device.type == "cpu":
        return -sk.linear_logp(hidden.bfloat16(), model.head.weight.bfloat16(), target).mean()
    with torch.autocast(hidden.device.type, torch.bfloat16):
        logits = model.head(hidden)
    return F.cross_entropy(logits.float(), target)


def train(size: Size, device: torch.device) -> dict[str, Tensor]:
    """`hidden` (N, D) and `weight` (V, D) in fp32, and the `target` ids (N,) that follow in the text."""
    start = time.monotonic()
    files = token_ids(source_files(size.text), size.vocabulary)
    stream = torch.tensor(list(itertools.chain.from_iterable(files)), dtype=torch.int64)
    held = -(-size.tokens // size.length) * size.length + 1
    training, test = stream[:-held].to(device), stream[-held:].to(device)
    prepared = time.monotonic() - start
    torch.manual_seed(0)
    model = Model(size, size.vocabulary).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    offsets = torch.arange(size.length + 1, device=device)
    start, loss = time.monotonic(), torch.zeros(())
    for step in range(size.steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (1 - 0.95 * step / size.steps)
        starts = torch.randint(len(training) - size.length, (size.batch, 1), device=device)
        ids = training[starts + offsets]
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model(ids[:, :-1]).flatten(0, 1)
        loss = next_token_loss(model, hidden, ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        hidden = model(test[:-1].view(-1, size.length)).flatten(0, 1)[: size.tokens]
    seen = size.steps * size.batch * size.length
    spent = f"{prepared:.0f} s of text, {time.monotonic() - start:.0f} s of training"
    print(f"language model: {spent}, {size.steps} steps, {seen / 1e6:.2f}M tokens, loss {loss.item():.2f}")
    weight = model.head.weight.detach()
    return {"hidden": hidden.float(), "weight": weight.float(), "target": test[1:][: size.tokens].clone()}


def cache_file(size: Size, device: torch.device) -> Path:
    known = *size, device.type, platform.python_version(), torch.__version__, Path(__file__).read_text()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepkto-fast"
    return folder / f"language-model-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.safetensors"


def states(size: Size, device: torch.device) -> dict[str, Tensor]:
    """Those of `train`, from the cache where they are."""
    path = cache_file(size, device)
    if not path.exists():
        found = train(size, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file({name: tensor.cpu().contiguous() for name, tensor in found.items()}, temporary)
        os.replace(temporary, path)
    return {name: tensor.to(device) for name, tensor in load_file(path).items()}


def real_inputs(device: torch.device, dtype: str = "bfloat16", level: float | None = None, size: str = "") -> Inputs:
    """The model's own states, or those sharpened (or flattened) to a mean entropy of `level` nats."""
    known = size or device.type
    found = states(SIZES[known], device)
    hidden, weight = found["hidden"], found["weight"].to(getattr(torch, dtype))
    shape = Shape("lm", *hidden.shape, len(weight), completion=COMPLETION[known], dtype=dtype)
    if level is None:
        return Inputs(shape, "real", hidden.to(weight.dtype), weight, found["target"])
    some = hidden[:: max(1, len(hidden) // 512)]
    low, high = math.log(0.01), math.log(100)
    for _ in range(14):
        middle = (low + high) / 2
        entropy = mean_entropy((math.exp(middle) * some).to(weight.dtype), weight, None)
        low, high = (middle, high) if entropy > level else (low, middle)
    return Inputs(shape, f"real {level}", (math.exp(low) * hidden).to(weight.dtype), weight)
