"""Input checks. Those of types, dtypes, shapes and scalars are static: they run in Python before an op is
called, also while torch.compile traces. Those that read data (`*_values`) run inside the op, at run time.

Legend of the names in this package's function bodies: N packed scored tokens, n a block of them, D hidden
size, V vocabulary, v a tile of it, B completions, S steps. `h_ND` has shape (N, D).
"""

import sys
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INFINITY = float("inf")
LARGEST = sys.float_info.max  # Python's integers go on beyond it


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], *shape: tuple[str, int | None]) -> None:
    """`shape` holds one (letter, size or None) per dimension."""

    def expected() -> str:
        letters = ", ".join(letter if size is None else f"{letter}={size}" for letter, size in shape)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"expected a {kinds} tensor of shape ({letters})"

    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; {expected()}")
    if value.dim() != len(shape) or any(
        size is not None and value.shape[i] != size for i, (_, size) in enumerate(shape)
    ):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; {expected()}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype} and shape {tuple(value.shape)}; {expected()}")


def whole(name: str, value: Any) -> None:
    """Neither sharded nor an empty stand-in for what is."""
    if hasattr(value, "device_mesh"):
        raise ValueError(
            f"{name} is a DTensor of shape {tuple(value.shape)} with placements {tuple(value.placements)}; expected a "
            "plain tensor: pass its .full_tensor(), or use linear_logp_parallel for a head sharded by vocabulary"
        )
    if hasattr(value, "ds_id") and value.numel() == 0:
        raise ValueError(
            f"{name} is empty, since DeepSpeed ZeRO-3 holds its shards; call this, and its backward, within "
            "deepspeed.zero.GatheredParameters"
        )


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} is on {value.device}; expected {other.device}, where {other_name} is"
        )


def scalar(name: str, value: object, low: float = -INFINITY, low_allowed: bool = False) -> None:
    """A finite number above `low`, or equal to it where `low_allowed`."""
    expected = "a finite number" if low == -INFINITY else f"a finite number {'>=' if low_allowed else '>'} {low:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")
    if not (low < value <= LARGEST or (low_allowed and value == low)) or value < -LARGEST:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def integer(name: str, value: object) -> None:
    """An int that ops can take."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected an int of 64 bits")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value!r}; expected an int of 64 bits")


def choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def boolean_or_none(name: str, value: object) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected True, False or None")


def target_values(target_N: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong_N = ((target_N < 0) | (target_N >= vocabulary)) & (target_N != ignore_index)
    if wrong_N.any():
        n = int(wrong_N.nonzero()[0])
        raise ValueError(
            f"target of shape {tuple(target_N.shape)} holds {int(target_N[n])} at position {n}; "
            f"expected values in [0, V={vocabulary}) or ignore_index={ignore_index}"
        )


def packing_values(tokens: int, cu_seqlens: Tensor, cu_steps: Tensor) -> None:
    for name, cu in (("cu_seqlens", cu_seqlens), ("cu_steps", cu_steps)):
        where = f"{name} of shape {tuple(cu.shape)}"
        if int(cu[0]) != 0:
            raise ValueError(f"{where} starts at {int(cu[0])}; expected 0")
        falls = cu[1:] <= cu[:-1]
        if falls.any():
            i = int(falls.nonzero()[0])
            raise ValueError(
                f"{where} holds {int(cu[i])}, {int(cu[i + 1])} at positions {i}, {i + 1}; expected strictly "
                "ascending boundaries"
            )
        if int(cu[-1]) != tokens:
            raise ValueError(f"{where} ends at {int(cu[-1])}; expected the number of tokens, N={tokens}")
    cu_steps, cu_seqlens = cu_steps.contiguous(), cu_seqlens.contiguous()  # else searchsorted warns
    nearest = cu_steps[torch.searchsorted(cu_steps, cu_seqlens).clamp(max=len(cu_steps) - 1)]
    if (nearest != cu_seqlens).any():
        i = int((nearest != cu_seqlens).nonzero()[0])
        raise ValueError(
            f"cu_steps of shape {tuple(cu_steps.shape)} lacks the sequence boundary {int(cu_seqlens[i])} "
            f"(cu_seqlens[{i}]); expected every sequence boundary to be a step boundary too"
        )


def step_label_values(step_labels_S: Tensor) -> None:
    wrong_S = (step_labels_S < -1) | (step_labels_S > 1)
    if wrong_S.any():
        h = int(wrong_S.nonzero()[0])
        raise ValueError(
            f"step_labels of shape {tuple(step_labels_S.shape)} holds {int(step_labels_S[h])} at position "
            f"{h}; expected 1 (correct), 0 (incorrect) or -1 (unlabelled)"
        )
