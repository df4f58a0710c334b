"""Memory of a run on one device, phase by phase, from the model's shape and the recipe. Predicted, not measured."""

from dataclasses import dataclass, replace

from .hardware import GIB, Rates
from .model_shape import ModelShape
from .prm import CACHED_BYTES, TOKENS_A_STEP
from .recipe import Recipe, needs_seed
from .sampler_transformers import BATCH

# An optimizer step is four of them: a micro-batch's forward, its backward through the head and through the layers.
PHASES = ("sampling", "PRM head", "log-probs", "forward", "LM head", "backward", "optimizer")
PASSES = ("forward", "LM head", "backward")
UPDATE = (*PASSES, "optimizer")
VOCAB_TILE = 128  # of the head's kernels
WORKSPACE_BYTES = 2**27  # gradients of logits, on a GPU
CPU_WORKSPACE_BYTES = 2**26  # the same on a CPU, at most
STORED_BYTES = 2**28  # the most that an exact backward's forward keeps
CPU_KV_BYTES = GIB  # of vLLM on a CPU
ELSEWHERE = 0.9  # vLLM's own share of a GPU that it has for itself


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
    wanted = recipe.prm_audit or recipe.label_source in ("head", "consensus")
    return samples_seed_set(recipe) or (recipe.prm is None and recipe.prm_dataset is not None and wanted)


def samples_seed_set(recipe: Recipe) -> bool:
    """Whether the run samples a seed set for a PRM head: one that labels, or, for task arithmetic, one that is only
    audited."""
    given = recipe.prm is not None or recipe.prm_dataset is not None or recipe.label_source == "dataset"
    return needs_seed(recipe) or (recipe.task == "arithmetic" and recipe.prm_audit and not given)


def trained_parameters(recipe: Recipe, shape: ModelShape) -> int:
    """Parameters that the update moves: all, or with LoRA the adapters, and the head where it is trained too."""
    if not recipe.lora_rank:
        return shape.parameters
    return shape.adapter_parameters(recipe.lora_rank) + recipe.lora_train_head * shape.head_parameters


def trains_head(recipe: Recipe) -> bool:
    """Whether the LM head's weight needs a gradient."""
    return not recipe.lora_rank or recipe.lora_train_head


def micro_batch_tokens(recipe: Recipe) -> int:
    """Trunk tokens of the largest micro-batch: a completion longer than the limit goes alone."""
    return max(recipe.max_tokens_per_micro_batch, recipe.context_length)


def engines(recipe: Recipe, rates: Rates) -> int:
    """How many copies of the model sample: one a rank, those under Ray, or the server's."""
    if not uses_vllm(recipe) or recipe.vllm_mode == "colocate":
        return rates.ranks
    return recipe.ray_engines if recipe.vllm_mode == "ray" else rates.server_gpus


def cache(recipe: Recipe, shape: ModelShape, rates: Rates) -> Cache:
    """What is left of vLLM's share for keys and values; for transformers' generate, one batch of the longest."""
    token_bytes = shape.kv_bytes(recipe.bf16 and uses_vllm(recipe))
    weights = float(shape.parameters * (2 if recipe.bf16 else 4))
    if not uses_vllm(recipe):
        return Cache(BATCH * recipe.context_length, token_bytes, 4.0 * shape.parameters)
    if rates.gpu == "cpu":
        return Cache(CPU_KV_BYTES / token_bytes, token_bytes, weights)
    share = recipe.vllm_memory if recipe.vllm_mode == "colocate" else ELSEWHERE
    room = share * rates.memory - weights - rates.engine_reserve_gib * GIB
    return Cache(max(0.0, room) / token_bytes, token_bytes, weights)


def memory(recipe: Recipe, shape: ModelShape, rates: Rates) -> list[Item]:
    """Everything that takes memory of one device, largest contributors with their formulas. With several ranks
    weights, gradients and moments are cut into as many parts; activations are a rank's own micro-batch's."""
    P, trained, n = shape.parameters, trained_parameters(recipe, shape), rates.ranks
    share = f" / {n} ranks" if n > 1 else ""
    items = [
        Item("policy", 4 * P / n, PHASES, f"4 P{share}: fp32 weights"),
        Item("reserve", rates.reserve_gib * GIB, PHASES, "reserve_gib"),
    ]
    offline, one_model = recipe.label_source == "dataset", recipe.lora_rank and recipe.lora_merge == "end"
    if not offline:
        if not one_model:
            note = f"4 P{share}: fp32, for the PRM trunk, KL and reference initial"
            items.append(Item("M_0", 4 * P / n, PHASES, note))
        items += [*_engine(recipe, shape, rates), *_prm(recipe, shape, rates)]
    if recipe.reference_points in ("exact", "mismatched") and (offline or recipe.reference == "previous"):
        items.append(Item("reference copy", 4 * P / n, UPDATE, f"4 P{share}: reference_points exact or mismatched"))
    if recipe.lora_rank:
        when = PHASES if one_model else UPDATE
        items.append(Item("adapters", 4 * trained / n, when, f"4 P_trained{share}: fp32"))
    items += [
        Item("gradients", 4 * trained / n, UPDATE, f"4 P_trained{share}: fp32"),
        Item("AdamW moments", 8 * trained / n, UPDATE, f"8 P_trained{share}: fp32"),
    ]
    if rates.gpu != "cpu":
        note = f"4 P_trained{share}: the multi-tensor form's square roots"
        items.append(Item("AdamW temporary", 4 * trained / n, ("optimizer",), note))
    items += _gathered(recipe, shape) if n > 1 else _copies(recipe, shape)
    return [*items, *_activations(recipe, shape, rates), *_head(recipe, shape, rates)]


def _copies(recipe: Recipe, shape: ModelShape) -> list[Item]:
    """Weights in bf16, which autocast keeps until a forward's end, and autograd until the backward has used them."""
    if not recipe.bf16:
        return []
    copies, note = 2 * shape.linear_parameters, "2 P_projections: autocast keeps them"
    if not recipe.gradient_checkpointing:
        return [Item("bf16 copies", copies, ("PRM head", "log-probs", *PASSES), note)]
    layer = Item("bf16 copies", 2 * shape.layer_parameters, ("backward",), "of the layer that is computed again")
    return [Item("bf16 copies", copies, ("PRM head", "log-probs", "forward"), note), layer]


def _gathered(recipe: Recipe, shape: ModelShape) -> list[Item]:
    """What FSDP holds whole: the layer at work and the next, the head. (In bf16 the gathered head is the bf16 copy that
    the head's own item counts; the embeddings are whole only before there are activations.)"""
    size, passes = 2 if recipe.bf16 else 4, ("PRM head", "log-probs", *PASSES)
    layers = 2 * shape.layer_parameters
    items = [Item("gathered layers", size * layers, passes, "two layers, the one at work and the next")]
    if not recipe.bf16:
        items.append(Item("gathered head", 4 * shape.head_parameters, ("log-probs", "forward", "LM head"), "4 V D"))
    if not recipe.lora_rank:
        note = "of two layers, on their way to the ranks that keep them"
        items.append(Item("whole gradients", (size + 4) * layers, ("backward",), note))
    return items


def kept_bytes(recipe: Recipe, shape: ModelShape, rates: Rates, lora_rank: int) -> float:
    """Bytes a trunk token that a forward keeps for its backward: the layers, and the final norm with its output."""
    layer = _layer_bytes(recipe, shape, rates, lora_rank)
    return shape.num_layers * (4 * shape.hidden_size if recipe.gradient_checkpointing else layer) + (
        12 * shape.hidden_size
    )


def _layer_bytes(recipe: Recipe, shape: ModelShape, rates: Rates, lora_rank: int) -> float:
    varlen = recipe.bf16 and rates.gpu != "cpu"
    return shape.activation_bytes(bf16=recipe.bf16, lora_rank=lora_rank, varlen=varlen)


def _activations(recipe: Recipe, shape: ModelShape, rates: Rates) -> list[Item]:
    """Of one micro-batch. The layers' backward is at its height in the last layer, when the final norm and the head
    have freed theirs."""
    T, D, size = micro_batch_tokens(recipe), shape.hidden_size, 2 if recipe.bf16 else 4
    kept, layer = (f(recipe, shape, rates, recipe.lora_rank) for f in (kept_bytes, _layer_bytes))
    passing = T * (12 * D + 3 * size * shape.intermediate_size)
    height = shape.backward_bytes(
        bf16=recipe.bf16, lora_rank=recipe.lora_rank, checkpointing=recipe.gradient_checkpointing
    )
    how = "each layer's input alone" if recipe.gradient_checkpointing else "no checkpointing"
    items = [
        Item("activations (forward)", passing, ("log-probs",), "of one layer"),
        Item("activations", T * kept, ("forward", "LM head"), f"{kept / 1e3:,.0f} kB a token, {T} tokens, {how}"),
        Item("activations", T * (kept - 12 * D), ("backward",), "the same without the final norm"),
        Item("gradients of activations", T * height, ("backward",), f"{height / 1e3:,.0f} kB a token, of one layer"),
    ]
    if recipe.gradient_checkpointing:
        again = T * (layer - 4 * D)
        items.append(Item("activations again", again, ("backward",), "of one layer, computed a second time"))
    if not recipe.lora_rank:
        weight = (6 if recipe.bf16 else 4) * D * shape.intermediate_size
        items.append(Item("gradient of a weight", weight, ("backward",), "before it is added to the others"))
    return items


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
    if recipe.vllm_mode != "colocate":
        return []
    if rates.gpu == "cpu":
        return [Item("vLLM", held.weight_bytes + CPU_KV_BYTES, PHASES, "weights and 1 GiB of KV cache")]
    when = tuple(phase for phase in PHASES if phase not in UPDATE) if recipe.vllm_sleep else PHASES
    return [Item("vLLM", recipe.vllm_memory * rates.memory, when, "vllm_memory x the device's memory")]


def _prm(recipe: Recipe, shape: ModelShape, rates: Rates) -> list[Item]:
    """The PRM's trunk where it is one of its own, and what fitting the head takes. The head itself is negligible."""
    P, trunk = shape.parameters, shape.parameters - (0 if shape.tied else shape.head_parameters)
    n = rates.ranks
    if recipe.prm is not None:
        note = "4 P: of the PRM in prm, taken to be as large as the policy"
        return [Item("PRM trunk", 4 * P, PHASES, note)]
    if not fits_head(recipe):
        return []
    fitting = ("PRM head",)
    items = [Item("PRM features", 2 * CACHED_BYTES, fitting, "the cache, and a copy of it for mean and deviation")]
    if recipe.prm_trunk == "trained":
        kept = TOKENS_A_STEP * kept_bytes(replace(recipe, gradient_checkpointing=False), shape, rates, 0)
        items += [
            Item("PRM activations", kept, fitting, f"of {TOKENS_A_STEP} tokens"),
            Item("PRM trunk", 4 * P / n, PHASES, "4 P: prm_trunk trained"),
            Item("PRM trunk, the next", 4 * P / n, fitting, "4 P: the last one is still there"),
            Item("PRM gradients, moments", 16 * trunk / n, fitting, "16 P_trunk: gradients, AdamW and its temporary"),
        ]
    return items


def _head(recipe: Recipe, shape: ModelShape, rates: Rates) -> list[Item]:
    """The LM head through the kernels, if all of a micro-batch's tokens are scored (the README of linear_logp)."""
    tokens, cpu = micro_batch_tokens(recipe), rates.gpu == "cpu"
    D, V, size = shape.hidden_size, shape.vocab_size, 2 if recipe.bf16 else 4
    tile_lse = 4 * tokens * -(-V // VOCAB_TILE)
    forward = 4 * tokens * D + tile_lse + ((size * tokens * D + size * V * D) if recipe.bf16 else 0)
    # On a CPU 1/40 of the logits where every tile is visited, and no list.
    workspace = min(CPU_WORKSPACE_BYTES, size * tokens * V / 40) if cpu else WORKSPACE_BYTES + tile_lse / 4
    carried = 1 if cpu else 2  # of dhidden in bf16, beside its fp32 form for the trunk
    backward = forward + workspace + size * tokens * D + ((carried + 4) * tokens * D if recipe.bf16 else 0)
    if trains_head(recipe):
        backward += ((size + 4) if recipe.bf16 else 4) * V * D
    if recipe.filter_eps == 0 and recipe.bf16 and 2 * tokens * V <= STORED_BYTES:
        backward += 2 * tokens * V
    return [
        Item("LM head", forward, ("log-probs", "forward"), "states, tile_lse: N V / 32, a bf16 copy of W"),
        Item("LM head", backward, ("LM head",), "the same, workspace, dhidden, dW"),
    ]
