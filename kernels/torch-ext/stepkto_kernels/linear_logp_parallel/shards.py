"""What a rank holds of a head: its shard as plain tensors, its group, and where its rows lie in the vocabulary."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks


class Operands(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    group: Any


def local_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Any) -> Operands:
    """Plain tensors and their process group, from plain tensors with a group or from DTensors, whose mesh is one."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if isinstance(weight, DTensor):
        if tuple(weight.placements) != (Shard(0),):
            raise ValueError(
                f"weight is a DTensor with placements {tuple(weight.placements)}; expected Shard(0), the vocabulary, "
                "over a mesh of one dimension. With more dimensions pass weight.to_local(grad_placements=...) and the "
                "group of the sharded one"
            )
        of_mesh = weight.device_mesh.get_group()
        if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(of_mesh):
            raise ValueError(
                f"group holds the ranks {dist.get_process_group_ranks(group)} and weight's mesh "
                f"{dist.get_process_group_ranks(of_mesh)}; leave group out for a DTensor"
            )
        if bias is not None and not (isinstance(bias, DTensor) and bias.placements == weight.placements):
            found = f"a DTensor with placements {bias.placements}" if isinstance(bias, DTensor) else "a plain tensor"
            raise ValueError(f"bias is {found}; expected weight's placements {weight.placements}")
        weight, bias, group = weight.to_local(), None if bias is None else bias.to_local(), of_mesh
    elif isinstance(bias, DTensor):
        raise ValueError("bias is a DTensor and weight a plain tensor; expected the same of both")
    if isinstance(hidden, DTensor):
        if any(placement != Replicate() for placement in hidden.placements):
            raise ValueError(
                f"hidden is a DTensor with placements {tuple(hidden.placements)}; expected Replicate(): every rank "
                "scores the same tokens (redistribute it first)"
            )
        hidden = hidden.to_local(grad_placements=hidden.placements)
    if group is None:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} is a plain tensor and group is None; pass the process group over "
            "which the vocabulary is sharded, or a DTensor (for a whole head: linear_logp)"
        )
    return Operands(hidden, weight, bias, group)


def gathered(x: Tensor, group: Any) -> Tensor:
    """(ranks, *shape): `x` of every rank of the group, in its order."""
    found = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(found.unbind()), x.contiguous(), group=group)
    return found


def place(target: Tensor, rows: int, ignore_index: int, validate: bool, group: Any) -> Tensor:
    """(N,) the row of this rank's shard that is each target; -1 where ignored, -2 where another rank has it."""
    hash_N = target * torch.arange(1, len(target) + 1, device=target.device)
    mine = torch.stack((target.new_tensor(rows), target.new_tensor(len(target)), hash_N.sum()))
    of_ranks = gathered(mine, group)
    if validate:
        if (of_ranks[:, 1:] != of_ranks[0, 1:]).any():
            raise ValueError(
                f"target holds {of_ranks[:, 1].tolist()} tokens on the ranks of the group, and not the same ones; "
                "expected the same on all: only the head is sharded (a head that FSDP shards over ranks with other "
                "tokens is to be gathered, then linear_logp)"
            )
        checks.target_values(target, int(of_ranks[:, 0].sum()), ignore_index)
    first = of_ranks[: dist.get_rank(group), 0].sum()
    row_N = target - first
    row_N = torch.where((row_N >= 0) & (row_N < rows), row_N, -2)
    return torch.where(target == ignore_index, -1, row_N)
