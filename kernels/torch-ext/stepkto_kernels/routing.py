"""What backwards left out, on request: nothing is read from the device unless someone looks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """One backward of a head. Fields are 0-d tensors on its device; properties read them, and so wait for it."""

    rho_tensor: Tensor
    rho_blocks_tensor: Tensor
    dropped_max_tensor: Tensor
    dropped_mean_tensor: Tensor
    dense_tensor: Tensor

    @property
    def rho(self) -> float:
        """Share of the (live token, vocabulary tile) pairs that were visited; dW costs this share of a dense one."""
        return float(self.rho_tensor)

    @property
    def rho_blocks(self) -> float:
        """What dhidden costs of a dense one: on a GPU the share of (block of 128 live tokens, tile) pairs, on a CPU
        rho again."""
        return float(self.rho_blocks_tensor)

    @property
    def dropped_max(self) -> float:
        """Largest share of a token's non-target mass that was left out; never above filter_eps. With an entropy
        gradient a tile's mass counts |log P + H| + log(tile width) times."""
        return float(self.dropped_max_tensor)

    @property
    def dropped_mean(self) -> float:
        """Mean of that share over the live tokens."""
        return float(self.dropped_mean_tensor)

    @property
    def path(self) -> str:
        """ "dense" where nothing was left out because too little could have been, else "routed"."""
        return "dense" if self.dense_tensor else "routed"


_watchers: list[list[Routing]] = []  # of all threads: autograd runs backwards on its own


@contextmanager
def watch() -> Iterator[list[Routing]]:
    """Collect a `Routing` of each backward in the `with` block that chose among vocabulary tiles, in order.

    The reference backend leaves nothing out and records nothing. Not for code inside torch.compile or CUDA graphs:
    look at eager calls of the same data.
    """
    found: list[Routing] = []
    _watchers.append(found)
    try:
        yield found
    finally:
        _watchers[:] = [each for each in _watchers if each is not found]


def watching() -> bool:
    return bool(_watchers)


def record(found: Routing) -> None:
    for each in _watchers:
        each.append(found)
