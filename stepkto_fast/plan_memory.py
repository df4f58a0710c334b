"""Memory of a run on one device, phase by phase, from the model's shape and the recipe. Predicted, not measured."""

from dataclasses import dataclass

from .hardware import GIB, Rates
from .model_shape import ModelShape
from .prm import CACHED_BYTES, TOKENS_A_STEP
from .recipe import Recipe, needs_seed
from .sampler_transformers import BATCH

PHASES = ("sampling", "PRM head", "log-probs", "backward", "optimizer")
VOCAB_TILE = 128  # of the head's kernels
WORKSPACE_BYTES = 2**27  # gradients of logits, on a GPU
STORED_BYTES = 2**28  # the most that an exact backward's forward keeps
CPU_KV_BYTES = GIB  # of vLLM on a CPU


@dataclass(frozen=True)
class Item:
    """Something that takes memory: bytes, the phases in which it is there, and where the number comes from."""

    name: str
    amount: float
    phases: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Cache:
    """The engine's KV cache: tokens it has room for, bytes a token, and bytes of the engine's weights."""

    tokens: float
    token_bytes: int
    weight_bytes: float

    def sequences(self, length: float) -> int:
        """How many sequences of `length` tokens fit at once."""
        return max(0, int(self.tokens // length))


def uses_vllm(recipe: Recipe) -> bool:
    """Whether the run samples by vLLM. `auto` counts as vLLM: the plan may be made on a machine without it."""
    return recipe.engine != "transformers" and recipe.label_source != "dataset"


def fits_head(recipe: Recipe) -> bool:
    """Whether the run fits a PRM head, on a seed set or on prm_dataset."""
    return recipe.prm is None and (needs_seed(recipe) or recipe.prm_dataset is not None)


def trained_parameters(recipe: Recipe, shape: ModelShape) -> int:
    """Parameters that the update moves: all, or with LoRA the adapters."""
    return shape.adapter_parameters(recipe.lora_rank) if recipe.lora_rank else shape.parameters


def micro_batch_tokens(recipe: Recipe) -> int:
    """Trunk tokens of the largest micro-batch: a completion longer than the limit goes alone."""
    return max(recipe.max_tokens_per_micro_batch, recipe.context_length)


def cache(recipe: Recipe, shape: ModelShape, rates: Rates) -> Cache:
    """What is left of vLLM's share for keys and values; for transformers' generate, one batch of the longest."""
    token_bytes = shape.kv_bytes(recipe.bf16 and uses_vllm(recipe))
    weights = float(shape.parameters * (2 if recipe.bf16 else 4))
    if not uses_vllm(recipe):
        return Cache(BATCH * recipe.context_length, token_bytes, 4.0 * shape.parameters)
    if rates.gpu == "cpu":
        return Cache(CPU_KV_BYTES / token_bytes, token_bytes, weights)
    room = recipe.vllm_memory * rates.memory - weights - rates.engine_reserve_gib * GIB
    return Cache(max(0.0, room) / token_bytes, token_bytes, weights)


def memory(recipe: Recipe, shape: ModelShape, rates: Rates) -> list[Item]:
    """Everything that takes memory, largest contributors with their formulas."""
    P, trained = shape.parameters, trained_parameters(recipe, shape)
    T = micro_batch_tokens(recipe)
    update = ("backward", "optimizer")
    items = [
        Item("policy", 4 * P, PHASES, "4 P: fp32 weights"),
        Item("reserve", rates.reserve_gib * GIB, PHASES, "reserve_gib"),
    ]
    offline = recipe.label_source == "dataset"
    if not offline:
        items += [
            Item("M_0", 4 * P, PHASES, "4 P: fp32, for the PRM trunk, KL and reference initial"),
            *_engine(recipe, shape, rates),
            *_prm(recipe, shape, rates),
        ]
    if recipe.reference_points in ("exact", "mismatched") and (offline or recipe.reference == "previous"):
        items.append(Item("reference copy", 4 * P, update, "4 P: reference_points exact or mismatched"))
    if recipe.lora_rank:
        items.append(Item("adapters", 4 * trained, update, "4 P_adapters: fp32"))
    items += [
        Item("gradients", 4 * trained, update, "4 P_trained: fp32"),
        Item("AdamW moments", 8 * trained, update, "8 P_trained: fp32"),
    ]
    if rates.gpu != "cpu":
        note = "4 P_trained: the multi-tensor form's square roots"
        items.append(Item("AdamW temporary", 4 * trained, ("optimizer",), note))
    if recipe.bf16:
        copies = 2 * shape.linear_parameters
        phases = ("PRM head", "log-probs", "backward")
        items.append(Item("bf16 copies", copies, phases, "2 P_projections: autocast keeps them"))
    per_token = kept_bytes(recipe, shape, rates, recipe.lora_rank)
    note = f"{per_token / 1e3:,.0f} kB a token, {T} tokens, no checkpointing"
    passing = T * (12 * shape.hidden_size + 3 * (2 if recipe.bf16 else 4) * shape.intermediate_size)
    items += [
        Item("activations", T * per_token, ("backward",), note),
        Item("activations (forward)", passing, ("log-probs",), "of one layer"),
        *_head(recipe, shape, T),
    ]
    return items


def kept_bytes(recipe: Recipe, shape: ModelShape, rates: Rates, lora_rank: int) -> float:
    """Bytes a trunk token that a forward keeps for its backward: the layers, and the final norm with its output."""
    varlen = recipe.bf16 and rates.gpu != "cpu"
    layer = shape.activation_bytes(bf16=recipe.bf16, lora_rank=lora_rank, varlen=varlen)
    return shape.num_layers * layer + 12 * shape.hidden_size


def peak(items: list[Item]) -> dict[str, float]:
    """Bytes of each phase."""
    return {phase: sum(item.amount for item in items if phase in item.phases) for phase in PHASES}


def _engine(recipe: Recipe, shape: ModelShape, rates: Rates) -> list[Item]:
    held = cache(recipe, shape, rates)
    if not uses_vllm(recipe):
        V, c = shape.vocab_size, recipe.max_completion_length
        return [
            Item("KV cache", held.tokens * held.token_bytes, ("sampling",), f"{BATCH} rows of context_length tokens"),
            Item("scores", 3 * 4 * BATCH * V * c, ("sampling",), f"12 x {BATCH} V max_completion_length: all logits"),
        ]
    if rates.gpu == "cpu":
        return [Item("vLLM", held.weight_bytes + CPU_KV_BYTES, PHASES, "weights and 1 GiB of KV cache")]
    return [Item("vLLM", recipe.vllm_memory * rates.memory, PHASES, "vllm_memory x the device's memory")]


def _prm(recipe: Recipe, shape: ModelShape, rates: Rates) -> list[Item]:
    """The PRM's trunk where it is one of its own, and what fitting the head takes. The head itself is negligible."""
    P, trunk = shape.parameters, shape.parameters - (0 if shape.tied else shape.head_parameters)
    if recipe.prm is not None:
        return [Item("PRM trunk", 4 * P, PHASES, "4 P: of the PRM in prm, taken to be as large as the policy")]
    if not fits_head(recipe):
        return []
    fitting = ("PRM head",)
    items = [Item("PRM features", 2 * CACHED_BYTES, fitting, "the cache, and a copy of it for mean and deviation")]
    if recipe.prm_trunk == "trained":
        kept = TOKENS_A_STEP * kept_bytes(recipe, shape, rates, 0)
        items += [
            Item("PRM activations", kept, fitting, f"of {TOKENS_A_STEP} tokens"),
            Item("PRM trunk", 4 * P, PHASES, "4 P: prm_trunk trained"),
            Item("PRM trunk, the next", 4 * P, fitting, "4 P: the last one is still there"),
            Item("PRM gradients, moments", 16 * trunk, fitting, "16 P_trunk: gradients, AdamW and its temporary"),
        ]
    return items


def _head(recipe: Recipe, shape: ModelShape, tokens: int) -> list[Item]:
    """The LM head through the kernels, if all of a micro-batch's tokens are scored (the README of linear_logp)."""
    D, V, size = shape.hidden_size, shape.vocab_size, 2 if recipe.bf16 else 4
    tile_lse = 4 * tokens * -(-V // VOCAB_TILE)
    forward = 4 * tokens * D + tile_lse + ((size * tokens * D + size * V * D) if recipe.bf16 else 0)
    backward = forward + WORKSPACE_BYTES + tile_lse / 4 + size * tokens * D + (2 + 4) * tokens * D
    if not recipe.lora_rank:
        backward += (size + 4) * V * D
    if recipe.filter_eps == 0 and recipe.bf16 and 2 * tokens * V <= STORED_BYTES:
        backward += 2 * tokens * V
    return [
        Item("LM head", forward, ("log-probs",), "states, tile_lse: N V / 32, a bf16 copy of W"),
        Item("LM head", backward, ("backward",), "the same, 128 MiB of workspace, dhidden, dW"),
    ]
