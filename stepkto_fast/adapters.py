"""LoRA: low-rank adapters in the policy, and what the policy is with them, without them, and merged.

With `lora_merge: iteration` an update trains fresh adapters, which are merged into the weights at its end; sampler,
checkpoints and evaluation only ever see merged weights. With `lora_merge: end` one set of adapters lives through the
run: M_t is M_0 with adapters, and M_0 is the policy without them. In both cases the reference costs no second model.

The LM head is frozen, adapted (`lora_target` takes it in: its weight in use is W + scale * B @ A), or trained in full
(`lora_train_head`). A head that is tied to the embeddings can only be frozen: a change of it would change them, too.
"""

import copy
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from .errors import RunError
from .policy_views import View
from .recipe import Recipe
from .sharding import whole

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"  # PEFT's name of the only adapter
WEIGHTS = "adapter_model.safetensors"  # PEFT's


def require_adapters(recipe: Recipe) -> None:
    """RunError when the package that `lora_rank` needs is not installed."""
    if recipe.lora_rank and importlib.util.find_spec("peft") is None:
        raise RunError(f"lora_rank {recipe.lora_rank} needs peft: pip install 'stepkto-fast[lora]', or --lora_rank 0")


def add_adapters(policy: PreTrainedModel, recipe: Recipe, seed: int) -> Callable[[], None]:
    """Puts adapters of one iteration into `policy`, as `attach_adapters`; nothing without LoRA, or where adapters live
    through the run.

    Returns what merges them into the weights and takes them out again.
    """
    if not recipe.lora_rank or recipe.lora_merge == "end":
        return lambda: None
    adapted = _attach(policy, recipe, seed)

    def merge() -> None:
        adapted.merge_and_unload()
        policy.requires_grad_(True)

    return merge


def attach_adapters(policy: PreTrainedModel, recipe: Recipe, seed: int) -> None:
    """Puts adapters of `recipe.lora_rank` into `policy`, which change nothing yet, and freezes all else.

    Raises RunError where `recipe.lora_target` names no module, where a head that is tied to the embeddings would be
    trained, and where the head would be both adapted and trained in full.
    """
    _attach(policy, recipe, seed)


def _attach(policy: PreTrainedModel, recipe: Recipe, seed: int) -> "PeftModel":
    from peft import LoraConfig, get_peft_model

    output, embedding = policy.get_output_embeddings(), policy.get_input_embeddings()
    names = {module: name for name, module in policy.named_modules()}
    tied = output.weight is embedding.weight
    target = recipe.lora_target
    adapted = target != "all-linear" and re.fullmatch(target, names[output]) is not None
    if recipe.lora_train_head and adapted:
        raise RunError(f"lora_train_head trains the LM head in full, and lora_target {target!r} adapts it: drop one")
    if tied and recipe.lora_train_head:
        raise RunError(
            "lora_train_head: this model ties its LM head to the embeddings, and training one would untie them; set "
            "lora_train_head to false, or lora_rank to 0 to train both"
        )
    if tied and (adapted or (target != "all-linear" and re.fullmatch(target, names[embedding]))):
        raise RunError(
            f"lora_target {target!r} takes in the LM head or the embeddings, which this model ties: merged adapters "
            "of one would change the other; leave them out"
        )
    config = LoraConfig(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=target, task_type="CAUSAL_LM",
        modules_to_save=[names[output]] if recipe.lora_train_head else None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            return get_peft_model(policy, config)
        except ValueError as error:
            raise RunError(f"lora_target {target!r}: {error}") from error


def count_parameters(policy: PreTrainedModel) -> int:
    """Parameters of the policy without its adapters."""
    return sum(p.numel() for p in policy.parameters()) - sum(p.numel() for p in _adapter_parameters(policy).values())


# ---- the policy without its adapters ----


@contextmanager
def without_adapters(policy: PreTrainedModel) -> Iterator[None]:
    """Within the block the policy is what it was before the adapters came, to the bit, its head included.

    What is trained stays marked as trained: FSDP looks at the marks when it first gathers a layer.
    """
    layers = _peft_layers(policy)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def mark() -> None:
        for parameter in trained:
            parameter.requires_grad_(True)

    for layer in layers.values():
        layer.enable_adapters(False)
    mark()
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)
        mark()


class WithoutAdapters(View):
    """The policy without its adapters, as a model to read: M_0 where they live through the run."""

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with without_adapters(self._policy):
            yield

    def get_output_embeddings(self) -> nn.Module:
        return _base(self._policy.get_output_embeddings())

    def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]  # no prefix, no destination
        """The tensors under the names of the plain model, sharded where they are."""
        return {name: tensor for name, tensor, _ in _plain_tensors(self._policy, merged=False)}

    def save_pretrained(self, folder: Path | str) -> None:  # type: ignore[override]  # one form
        """A collective where the policy is sharded."""
        self._policy.save_pretrained(folder, state_dict={n: whole(t).detach() for n, t in self.state_dict().items()})


def _peft_layers(policy: PreTrainedModel) -> dict[str, Any]:
    """The modules that PEFT put in the place of others, by name."""
    if not hasattr(policy, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return {
        name: module
        for name, module in policy.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }


def _base(module: Any) -> nn.Module:
    """What was in a module's place before PEFT came."""
    inside = dict(module.named_children())
    return inside.get("base_layer", inside.get("original_module", module))


# ---- the policy merged ----


@torch.no_grad()
def merged_state(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the plain model's state with adapters merged, W + scale * B @ A, one tensor at a time.

    The policy stays as it is, and no second copy of its weights comes to be unless the caller keeps one. In fp32 on one
    rank the values are PEFT's own merged ones, to the bit. A collective for each tensor where the policy is sharded.
    Also for a policy without adapters: its own state.
    """
    for name, tensor, layer in _plain_tensors(policy, merged=True):
        value = whole(tensor).detach()
        yield name, value if layer is None else value + _delta(layer)


def _plain_tensors(policy: PreTrainedModel, *, merged: bool) -> Iterator[tuple[str, Tensor, Any]]:
    """For each tensor of the plain model its name, its value, and the layer whose adapter is to be added to it, if any.

    Not `merged`, everything is as it was before the adapters came.
    """
    layers = _peft_layers(policy)
    for name, tensor in policy.state_dict().items():
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if owner is None:
            yield name, tensor, None
            continue
        part, _, key = name.removeprefix(f"{owner}.").partition(".")
        if part == "base_layer":
            yield f"{owner}.{key}", tensor, layers[owner] if merged and key == "weight" else None
        elif part == ("modules_to_save" if merged else "original_module"):
            yield f"{owner}.{key.removeprefix(f'{ADAPTER}.')}", tensor, None


def _delta(layer: Any) -> Tensor:
    """What an adapter adds to its layer's weight."""
    if not any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        return layer.get_delta_weight(ADAPTER)
    if ADAPTER not in layer.lora_A:
        raise RunError(f"an adapted {type(layer).__name__} cannot be merged while sharded: leave it out of lora_target")
    return (whole(layer.lora_B[ADAPTER].weight) @ whole(layer.lora_A[ADAPTER].weight)) * layer.scaling[ADAPTER]


# ---- adapters on the disk, as PEFT has them ----


def save_adapters(policy: PreTrainedModel, folder: Path | None) -> None:
    """Writes the adapters, and the LM head where it is trained, so that `PeftModel.from_pretrained` reads them.

    A collective where the policy is sharded; a rank that gives None takes part in it and writes nothing.
    """
    tensors = {_saved_name(name): whole(p.detach()) for name, p in _adapter_parameters(policy).items()}
    if folder is None:
        return
    config = copy.copy(policy.peft_config[ADAPTER])
    # Where the base lies is not the adapters' business: its name may be a path of this machine.
    config.inference_mode, config.base_model_name_or_path = True, None
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # of a set: the same file for the same adapters
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    config.save_pretrained(str(folder))


@torch.no_grad()
def load_adapters(policy: PreTrainedModel, folder: Path) -> None:
    """Puts what `save_adapters` wrote into the policy, which has such adapters attached, sharded or not.

    Raises RunError where the file is missing, damaged, or of other adapters.
    """
    own = {_saved_name(name): parameter for name, parameter in _adapter_parameters(policy).items()}
    path = folder / WEIGHTS
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"adapters {path} cannot be read ({error}): give a folder that holds them whole") from error
    wrong = sorted(saved.keys() ^ own.keys()) or sorted(n for n in own if own[n].shape != saved[n].shape)
    if wrong:
        raise RunError(
            f"{path} holds other adapters than the policy has, first at {wrong[0]}: give the lora_rank, lora_target "
            "and lora_train_head that they were trained with"
        )
    for name, parameter in own.items():
        value = saved[name].to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):  # every rank has read the whole tensor: nothing is sent
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def _adapter_parameters(policy: PreTrainedModel) -> dict[str, nn.Parameter]:
    layers = tuple(f"{name}." for name in _peft_layers(policy))
    inside = re.compile(rf"\.(lora_\w+|modules_to_save)\.{ADAPTER}\b")
    return {n: p for n, p in policy.named_parameters() if n.startswith(layers) and inside.search(n)}


def _saved_name(name: str) -> str:
    """PEFT's name on the disk of an adapter's parameter."""
    name = re.sub(rf"\.modules_to_save\.{ADAPTER}\b", "", name)
    return "base_model.model." + re.sub(rf"\.(lora_\w+)\.{ADAPTER}\b", r".\1", name)
