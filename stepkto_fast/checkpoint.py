"""Weights and optimizer in a checkpoint's folder, from one rank or from several, for one rank or for several.

model.safetensors ...   a whole policy, as save_pretrained writes it
adapters/               beside it: the adapters that live through the run (`lora_merge: end`) and are merged in it
model.safetensors, optimizer.safetensors   in the middle of an update: what one rank trains
shards/                                    the same from several ranks, by torch.distributed.checkpoint
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import merged_state
from .ranks import is_main
from .sharding import is_sharded, load_sharded

WEIGHTS, OPTIMIZER, SHARDS, ADAPTERS = "model.safetensors", "optimizer.safetensors", "shards", "adapters"


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Model and tokenizer in the form that transformers and vLLM load. `state`: tensors instead of the model's own."""
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def has_adapters(model: PreTrainedModel) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def plain_state(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """What `save_pretrained` shall write for a sharded model or one with adapters, None for a plain one.

    A collective where the model is sharded: rank 0 gets all tensors, whole, merged and on the CPU, the others get none.
    """
    if not (is_sharded(model) or has_adapters(model)):
        return None
    gathered = {}
    for name, tensor in merged_state(model):
        if is_main():
            gathered[name] = tensor.cpu()
    # Once gathered, tied weights share no memory any more, by which transformers would know that it writes one of them.
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tensor for name, tensor in gathered.items() if tied.get(name) not in gathered}


def save_trained(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes what one rank trains, with its optimizer."""
    # Tied weights share memory, which safetensors refuses: each name gets its own copy.
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in _trained(model).items()}
    save_file(weights, folder / WEIGHTS)
    save_file(
        {
            f"{index}.{name}": tensor.contiguous()
            for index, entries in optimizer.state_dict()["state"].items()
            for name, tensor in entries.items()
        },
        folder / OPTIMIZER,
    )


def load_trained(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Puts back what `save_trained` or `sharding.save_sharded` wrote, on one rank or several.

    Raises ValueError, or what safetensors raises, for damaged files and another model's.
    """
    if (folder / SHARDS).is_dir():
        load_sharded(model, optimizer, folder / SHARDS)
        return
    saved, own = load_file(folder / WEIGHTS), _trained(model)
    if set(saved) != set(own):
        raise ValueError("it holds other tensors than the model trains")
    model.load_state_dict({name: _as(own[name], tensor) for name, tensor in saved.items()}, strict=False)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / OPTIMIZER).items():
        index, name = key.split(".")
        like = parameters[int(index)]
        state.setdefault(int(index), {})[name] = _as(like, tensor) if tensor.shape == like.shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state without frozen parameters: those are in the checkpoint that the iteration began with."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _as(like: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, which every rank has read, cut into shards as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
