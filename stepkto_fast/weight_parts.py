"""A policy's weights on their way to engines in other processes: named tensors in parts of bounded size."""

from collections.abc import Iterable, Iterator

from torch import Tensor

PART_BYTES = 1 << 30


def parts(named: Iterable[tuple[str, Tensor]], limit: int = PART_BYTES) -> Iterator[dict[str, Tensor]]:
    """Copies of the tensors on the CPU, in their order, at most `limit` bytes together (or one tensor).

    Tied weights share memory, which safetensors refuses: each name gets a copy of its own.
    """
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named:
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    if part:
        yield part
