"""The policy: a causal language model from transformers, its packed forward, and where its head is.

`build_policy` makes the small Llama of the embedded task with a tokenizer of its own; `load_policy` reads any
directory that `save_pretrained` wrote. Both use the packed attention.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .attention import NAME
from .errors import RunError
from .packing import PackedBatch
from .sharding import whole

# Step markers are one token each; a space belongs to the word behind it, so decoding gives the very text back.
WORD_PATTERN = r" ?(?:Step \d+:|\\boxed\{|[A-Za-z]+[:,.]?|\d+:?|\S)|\n"


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose vocabulary is every word of `texts`, whose decoding is exact."""
    splitter = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_byte_tokenizer(texts: Iterable[str], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`: any text is made of its tokens, and decoding is exact."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def build_policy(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    max_length: int,
    seed: int,
) -> PreTrainedModel:
    """A freshly initialised Llama, fp32, vocabulary padded to a multiple of 8."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=max_length,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(NAME)
    return model


def load_policy(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (fp32) and tokenizer of a local directory or a hub name; safetensors only, no remote code.

    Raises RunError when it is not there or not a causal language model.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise RunError(f"model {path!r} has no config.json: give a directory that save_pretrained wrote")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=NAME, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(f"cannot load model {path!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise RunError(f"the tokenizer of {path!r} has no eos_token: completions could never end")
    return model, tokenizer


def decoder_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The states (T, D) behind the batch's trunk tokens; each has read its own token and those before it."""
    return model.get_decoder()(**batch.model_inputs).last_hidden_state[0]


def hidden_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The states (N, D) that predict the batch's scored tokens. Prompt rows stop here, before the LM head."""
    return decoder_states(model, batch).index_select(0, batch.rows)


def head(model: PreTrainedModel) -> dict:
    """The LM head as keyword arguments of the kernels: weight, bias, logit_scale, softcap.

    The weight (V, D) is the one in use: with LoRA adapters on the head W + scale * B @ A, differentiable in A and B.
    Where it is sharded over ranks, it is gathered, and its gradient summed into the shards.
    """
    output, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    bias = getattr(output, "bias", None)
    return {
        "weight": weight_in_use(output), "bias": None if bias is None else whole(bias), "logit_scale": scale,
        "softcap": getattr(config, "final_logit_softcapping", None),
    }  # fmt: skip


def weight_in_use(output: Any) -> Tensor:
    """The weight (V, D) of an LM head, whole: with LoRA adapters on it W + scale * B @ A, else W."""
    if not hasattr(output, "lora_A") or output.disable_adapters:
        return whole(output.weight)
    with torch.autocast(output.weight.device.type, enabled=False):  # a product of fp32 weights, as when it is merged
        weight = whole(output.weight)
        for name in output.active_adapters:
            a, b = whole(output.lora_A[name].weight), whole(output.lora_B[name].weight)
            weight = torch.addmm(weight, b, a, alpha=output.scaling[name])
    return weight
