"""A model sharded over the ranks by FSDP2, its LM head as DTensors, and its checkpoints.

Every rank holds an equal share of each tensor's rows, of its gradient and of its optimizer state. The decoder gathers
one layer at a time, for its forward and again for its backward. The LM head's forward never runs: the kernels take its
weight, which `whole` gathers, so that one head is in memory for each model that a kernel reads. Gradients are summed
over the ranks, not averaged: the loss of every micro-batch already divides by the whole batch's counts.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from transformers import PreTrainedModel

from .errors import RunError
from .ranks import gather, size

MODEL, OPTIMIZER = "model.", "optimizer."  # prefixes of a sharded checkpoint's tensors


# ---- models ----


def shard(model: PreTrainedModel, *, bf16: bool, device: torch.device | None = None) -> None:
    """Shards `model` over all ranks, in place; nothing with one rank. Adapters, if any, must be in it already.

    Every rank gives the same model. `device` is where the shards go (None: where the model is), so that a model that
    no GPU could hold is sharded from the CPU. With `bf16` the layers are gathered in bf16, for `torch.autocast`;
    embedding, final norm and all that is stored stay as they are, and gradients are summed as they are stored.
    Tied embeddings stay tied. Raises RunError where transformers does not say what the model's layers are.
    """
    if size() == 1:
        return
    mesh = init_device_mesh((device or model.device).type, (size(),))
    decoder, embedding = model.get_decoder(), model.get_input_embeddings()
    layers = [m for m in decoder.modules() if type(m).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise RunError(f"{type(model).__name__} does not say what its layers are, so that it runs on one rank only")
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    outside = [
        (module, name, parameter, names.get(parameter))
        for module in _without(model, decoder)
        for name, parameter in module.named_parameters(recurse=False)
    ]
    # Autocast keeps the residual stream in fp32 on one rank: inputs are not cast here either.
    low = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=low if bf16 else MixedPrecisionPolicy())
    # The embedding goes before the head is gathered: where the two are tied, one is in memory at a time.
    fully_shard(embedding, mesh=mesh, reshard_after_forward=True)
    embedding.set_unshard_in_backward(False)
    # The root too: `parameters()` after a forward without a backward must give shards.
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    sharded: dict[Tensor, nn.Parameter] = {}
    for module, name, parameter, tied in outside:
        if tied is not None:
            setattr(module, name, decoder.get_parameter(tied))
            continue
        if parameter not in sharded:
            sharded[parameter] = nn.Parameter(_own_rows(parameter, mesh), requires_grad=parameter.requires_grad)
        setattr(module, name, sharded[parameter])


def _without(model: nn.Module, part: nn.Module) -> list[nn.Module]:
    inside = set(part.modules())
    return [module for module in model.modules() if module not in inside]


def _own_rows(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows of a tensor that is the same on all ranks, without the memory of the others."""
    rank, rows = mesh.get_local_rank(), tensor.detach().chunk(mesh.size())
    mine = rows[rank] if rank < len(rows) else tensor.detach()[:0]
    return DTensor.from_local(
        mine.to(mesh.device_type, copy=True, memory_format=torch.contiguous_format), mesh, [Shard(0)],
        run_check=False, shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was here."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, on every rank: a collective. A plain tensor as it is.

    Differentiable: the gradients of all ranks are summed into the shards, in the dtype of the shards. Under autocast
    what is not fp64 is gathered in autocast's dtype, in which it is going to be used.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    kind, dtype = tensor.device.type, tensor.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    everywhere = tensor.redistribute(placements=[Replicate()], forward_dtype=dtype, backward_dtype=tensor.dtype)
    return everywhere.to_local(grad_placements=[Partial()])


@torch.no_grad()
def full_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's state, every tensor whole, one at a time, on every rank: a collective for each.

    Names and values are those of the unsharded model's `state_dict`. Tied names come one after the other and share one
    tensor, as they do there.
    """
    state = model.state_dict(keep_vars=True)
    names: dict[Tensor, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(tensor, []).append(name)
    for tensor, same in names.items():
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        yield from ((name, gathered) for name in same)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients so that their joint 2-norm is at most `max_norm`; returns the norm before. A collective.

    One rank: `torch.nn.utils.clip_grad_norm_`, to the bit.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


# ---- checkpoints ----


def save_sharded(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes what is trained of `model`, its buffers and the optimizer's state to `folder`: a collective.

    Every rank writes its own rows to one safetensors file; nothing is pickled. `folder` must be empty or not there.
    Raises RunError, on all ranks, where the disk refuses.
    """
    if any(gather(folder.is_dir() and any(folder.iterdir()))):
        raise RunError(f"checkpoint folder {folder} is not empty: files of two checkpoints would mix; delete it")
    # Each file says in its header which rows it holds, so that no index, which would be a pickle, is written.
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _run_errors(f"cannot write checkpoint {folder}: make room or give rights there, then --resume true"):
        checkpoint.save(_trained_state(model) | _optimizer_state(model, optimizer), storage_writer=writer)


def load_sharded(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Puts back what `save_sharded` wrote, from any number of ranks to any number of ranks: a collective.

    Raises RunError, on all ranks, where files are missing or damaged or of another model; then the model and the
    optimizer may hold parts of it.
    """
    reader = checkpoint.HuggingFaceStorageReader(str(folder))
    complaint = f"checkpoint {folder} is damaged; delete it to go back to the one before"
    with _run_errors(complaint):
        saved: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
        state = _trained_state(model)
        wrong = {name for name in saved if name.startswith(MODEL)} ^ set(state)
        if wrong:
            raise ValueError(f"it holds other tensors than the model trains: {sorted(wrong)[:3]}")
        parameters = dict(model.named_parameters())
        for name in saved.keys() - state.keys():
            owner, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
            parameter, shape, dtype = parameters[owner], saved[name].size, saved[name].properties.dtype
            # Moments are cut as their parameter is, counters are not cut.
            matches = shape == parameter.shape
            state[name] = torch.zeros_like(parameter, dtype=dtype) if matches else torch.zeros(shape, dtype=dtype)
            optimizer.state[parameter][key] = state[name]
        for name, tensor in state.items():
            # Rows that no file has would be left as they are, without a word.
            rows = sum(chunk.sizes.numel() for chunk in saved[name].chunks)
            if saved[name].size != tensor.shape or rows != tensor.numel():
                raise ValueError(f"tensor {name} is not whole")
    with _run_errors(complaint):
        checkpoint.load(state, storage_reader=reader)


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters, tied ones once, and buffers. The tensors share memory with the model's."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in every}
    return {MODEL + name: tensor for name, tensor in (trained | buffers).items()}


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{OPTIMIZER}{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


@contextmanager
def _run_errors(complaint: str) -> Iterator[None]:
    """What goes wrong with files on any rank is a RunError on all of them."""
    error: BaseException | None = None
    try:
        with warnings.catch_warnings():  # one process that reads several ranks' files is what is wanted
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    # CheckpointException is no Exception: torch.distributed.checkpoint raises it on every rank for any rank's failure.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, checkpoint.CheckpointException) as caught:
        error = caught
    reasons = [reason for reason in gather(None if error is None else _reason(error)) if reason is not None]
    if reasons:
        raise RunError(f"{complaint} ({reasons[0]})") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, checkpoint.CheckpointException):
        rank, (first, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {first}"
    return str(error)
