"""The policy read as another model that it was, without a second copy of what they share."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from .policy import weight_in_use
from .sharding import is_sharded, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
else:
    Model = object  # a view has no tensors of its own, which nn.Module would collect


class View(Model):
    """What is read of a model: its decoder and embeddings, which can be called, and its head, all as constants."""

    def __init__(self, policy: PreTrainedModel):
        self._policy = policy

    def _in_use(self) -> AbstractContextManager[None]:
        """Within the block the policy is the model that is viewed."""
        raise NotImplementedError

    @property
    def config(self) -> PreTrainedConfig:
        return self._policy.config

    @property
    def device(self) -> torch.device:
        return self._policy.device

    def get_decoder(self) -> Any:
        return Part(self, self._policy.get_decoder())

    def get_input_embeddings(self) -> Any:
        return Part(self, self._policy.get_input_embeddings())


class Part:
    """A module of the policy, called as the one of the model that is viewed."""

    def __init__(self, view: View, module: nn.Module):
        self._view, self._module = view, module

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._view._in_use():
            return self._module(*args, **kwargs)

    def state_dict(self) -> dict[str, Tensor]:
        """What the view's own `state_dict` has of the module."""
        found = next(name for name, module in self._view._policy.named_modules() if module is self._module)
        state = self._view.state_dict()
        return {name.removeprefix(f"{found}."): t for name, t in state.items() if name.startswith(f"{found}.")}


class AsItIs(View):
    """The policy as it is now, however it is trained later. Kept are copies of what is trained, and nothing else."""

    def __init__(self, policy: PreTrainedModel):
        super().__init__(policy)
        self._kept = [(p, p.detach().clone()) for p in policy.parameters() if p.requires_grad]

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, kept in self._kept:
            if isinstance(parameter, DTensor):  # FSDP gathers from the memory that it knows
                now = parameter.detach().clone()
                parameter.copy_(kept)
                kept.copy_(now)
            else:
                parameter.data, kept.data = kept.data, parameter.data
        torch.clear_autocast_cache()  # its casts are kept by parameter, whatever memory that has now

    def get_output_embeddings(self) -> Any:
        output = self._policy.get_output_embeddings()
        bias = getattr(output, "bias", None)
        with torch.no_grad(), self._in_use():
            # Detached, it keeps the memory of the copy when the policy gets its own back.
            weight = weight_in_use(output).detach()
            return SimpleNamespace(weight=weight, bias=None if bias is None else whole(bias).detach())


def frozen(policy: PreTrainedModel) -> PreTrainedModel:
    """The policy as it is now: a copy, or a view where most of it is frozen or sharded."""
    if is_sharded(policy) or not all(parameter.requires_grad for parameter in policy.parameters()):
        return AsItIs(policy)
    return copy.deepcopy(policy).requires_grad_(False)
