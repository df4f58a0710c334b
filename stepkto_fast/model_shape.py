"""Shapes of causal language models without their weights: parameters, activations, KV cache, operations.

Written for the decoder that Llama, Mistral and Qwen2 share: RMS norms, grouped-query attention with rotary positions,
a gated MLP. `docs/planning.md` has the formulas in one place.
"""

from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig

from .errors import RunError
from .recipe import Recipe

BUILT_VOCABULARY = 128  # of a built model, about: its tokenizer is made of the problems' words


@dataclass(frozen=True)
class ModelShape:
    """What counts and bytes follow from. `biases`: how many of a layer's projections have one, as (outputs) below."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False

    @property
    def queries(self) -> int:
        """Width of all query heads together, H * d."""
        return self.num_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key (or value) heads together, H_kv * d."""
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's seven projections: q, k, v, o, gate, up, down."""
        D, F = self.hidden_size, self.intermediate_size
        return [(D, self.queries), (D, self.keys), (D, self.keys), (self.queries, D), (D, F), (D, F), (F, D)]

    @property
    def linear_parameters(self) -> int:
        """Weights of all projections of the trunk: what a token is multiplied with."""
        return self.num_layers * sum(n * m for n, m in self.linears)

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's projections."""
        return self.linear_parameters // self.num_layers

    @property
    def head_parameters(self) -> int:
        """V * D of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Exact count; tied weights count once."""
        D = self.hidden_size
        biases = self.qkv_bias * (self.queries + 2 * self.keys) + self.output_bias * D
        biases += self.mlp_bias * (2 * self.intermediate_size + D)
        norms = self.num_layers * 2 * D + D
        return (
            self.linear_parameters + self.num_layers * biases + norms + self.head_parameters * (1 if self.tied else 2)
        )

    def adapter_parameters(self, rank: int) -> int:
        """LoRA on every projection of the trunk (`all-linear`, which leaves the LM head out): r (inputs + outputs)."""
        return self.num_layers * sum(rank * (n + m) for n, m in self.linears)

    def activation_bytes(self, *, bf16: bool, lora_rank: int = 0, varlen: bool = True) -> float:
        """Bytes a token and layer that autograd keeps for the backward, without gradient checkpointing.

        fp32 weights; with `bf16` under autocast, which casts a projection's input anew for each projection.
        `varlen`: torch's varlen attention on a GPU, for which grouped keys and values are repeated; else one SDPA call
        a sequence, whose outputs are copied into one row.
        """
        D, F, size = self.hidden_size, self.intermediate_size, 2 if bf16 else 4
        norms = 2 * (4 * D + 4)  # the residual stream (fp32) and 1 / RMS
        if not lora_rank:
            norms += 2 * 4 * D  # normalised, for the gradient of a norm's weight
        inputs = size * D * (5 if bf16 else 2)  # of q, k, v, gate, up; in fp32 the same tensor serves several
        attention = size * 2 * self.queries + 4 * self.num_heads  # q, the output, log-sum-exp
        attention += size * 2 * (self.queries if varlen else self.keys) + (0 if varlen else size * self.queries)
        mlp = size * 4 * F  # gate, its SiLU, up, their product
        return norms + inputs + attention + mlp + size * lora_rank * len(self.linears)

    def backward_bytes(self, *, bf16: bool, lora_rank: int = 0, checkpointing: bool = False) -> float:
        """Bytes a token that the layers' backward takes at its height beside what forwards kept, weights' gradients
        apart: the gradients around the last MLP's product and of the residual stream, cosines and sines."""
        D, F, size = self.hidden_size, self.intermediate_size, 2 if bf16 else 4
        most = 2 * size * F + 4 * D  # three gradients of width F, less the product, which is no longer needed
        if bf16 and lora_rank:
            # The down projection's forward: PEFT casts its input to fp32, autocast that to bf16 again.
            most = 6 * F + 14 * D
        if not checkpointing:
            most = max(most, 24 * D)  # the final norm's backward, in fp32
        return most + 8 * self.head_dim

    def kv_bytes(self, bf16: bool) -> int:
        """Bytes of KV cache a token."""
        return self.num_layers * 2 * self.keys * (2 if bf16 else 4)

    def forward_flops(self, length: float) -> float:
        """Operations a token of the trunk's forward (a backward is twice that), in a sequence of `length` tokens:
        2 per weight, and for causal attention half of the 4 H d a pair of positions."""
        return 2 * self.linear_parameters + self.num_layers * 2 * self.queries * length


LLAMA_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256, tied=False)
QWEN_1_5B = ModelShape(1536, 28, 12, 2, 128, 8960, 151936, tied=True, qkv_bias=True)
# Public shapes of models whose config needs a network or an agreement to read.
KNOWN = {
    "meta-llama/Llama-3.1-8B": LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "Qwen/Qwen2.5-1.5B": QWEN_1_5B,
    "Qwen/Qwen2.5-1.5B-Instruct": QWEN_1_5B,
    "Qwen/Qwen2.5-Math-1.5B": QWEN_1_5B,
    "Qwen/Qwen2.5-Math-1.5B-Instruct": QWEN_1_5B,
}


def shape_of(recipe: Recipe) -> ModelShape:
    """The shape of the recipe's model: a built one, one of `KNOWN`, or what its config.json says (a directory, or a
    hub name where the hub can be reached). RunError where there is none or its architecture is another one."""
    if recipe.model is None:
        D, H = recipe.hidden_size, recipe.num_heads
        return ModelShape(D, recipe.num_layers, H, H, D // H, 2 * D, BUILT_VOCABULARY, tied=False)
    if recipe.model in KNOWN:
        return KNOWN[recipe.model]
    try:
        config = AutoConfig.from_pretrained(recipe.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read the config of model {recipe.model!r} ({str(error).splitlines()[0]}): give a directory with a "
            f"config.json, or one of {', '.join(KNOWN)}, whose shapes are known without a network"
        ) from error
    return shape_of_config(config, recipe.model)


def shape_of_config(config: PretrainedConfig, name: str) -> ModelShape:
    """The shape that a transformers config describes; RunError for an architecture that the formulas do not fit."""
    if config.model_type not in ("llama", "mistral", "qwen2"):
        raise RunError(f"model {name!r} is a {config.model_type}: plans are made for llama, mistral and qwen2 only")
    qkv_bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
    return ModelShape(
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads or config.num_attention_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        config.intermediate_size,
        config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=qkv_bias,
        output_bias=config.model_type == "llama" and qkv_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
    )
