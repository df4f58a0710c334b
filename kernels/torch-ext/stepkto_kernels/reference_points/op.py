"""reference_points: registration with torch.library, and the public function."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, triton_backend
from ..registration import op
from . import eager, native

backends.register("reference_points", "reference", eager.reference_points_forward)
backends.register("reference_points", "native", native.reference_points_forward)
backends.register(
    "reference_points", "triton", triton_backend.later("reference_points.triton_forward", "reference_points_forward")
)


class ReferencePoints(NamedTuple):
    """What one rank adds to the two reference points: 0-d fp32 tensors (fp64 for fp64 values), without
    gradient.

    All four are sums: all-reduce `torch.stack(points)` and rebuild with `ReferencePoints(*reduced)`.
    """

    outcome_sum: Tensor  # of the values, in nats
    outcome_count: Tensor  # completions
    step_sum: Tensor  # of the values, in nats
    step_count: Tensor  # steps

    def means(self) -> tuple[Tensor, Tensor]:
        """(mean over completions, flat mean over steps), unclamped, for the log; 0 where there are none."""
        return self.outcome_sum / self.outcome_count.clamp(min=1), self.step_sum / self.step_count.clamp(min=1)

    def points(self) -> tuple[Tensor, Tensor]:
        """(z, z_s): the means, then clamped at 0."""
        z, z_s = self.means()
        return z.clamp(min=0), z_s.clamp(min=0)


def check_boundaries(cu_seqlens: Tensor, cu_steps: Tensor, name: str, values: Tensor) -> None:
    for cu_name, cu, letter in (("cu_seqlens", cu_seqlens, "B+1"), ("cu_steps", cu_steps, "S+1")):
        checks.tensor(cu_name, cu, (torch.int32,), (letter, None))
        if cu.shape[0] == 0:
            raise ValueError(f"{cu_name} has shape (0,); expected ({letter},), at least the leading 0")
        checks.same_device(cu_name, cu, name, values)


@op
def reference_points_forward(
    values: Tensor, cu_seqlens: Tensor, cu_steps: Tensor, validate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = backends.choose("reference_points", values)
    if validate:
        checks.packing_values(len(values), cu_seqlens, cu_steps)
    return kernel.forward(values, cu_seqlens, cu_steps)


@reference_points_forward.register_fake
def _(values, cu_seqlens, cu_steps, validate):
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return tuple(values.new_empty((), dtype=dtype) for _ in range(4))


def reference_points(values: Tensor, cu_seqlens: Tensor, cu_steps: Tensor) -> ReferencePoints:
    """Sums and counts behind the reference points z (mean over completions) and z_s (flat mean over steps).

    Args:
        values: (N,) floating, in nats: per-token KL, or log-ratios d. Detached.
        cu_seqlens: (B+1,) int32 and cu_steps: (S+1,) int32: boundaries over the N tokens, from 0, strictly
            ascending, to N; every sequence boundary is a step boundary. On CPU tensors this is checked.

    Returns:
        ReferencePoints; `.points()` gives (z, z_s), after any all-reduce of the four numbers.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or boundary; the message names the argument.
        RuntimeError: the backend chosen by name cannot run this op.

    Our reading of Step-KTO (arXiv 2501.10799) on top of KTO (arXiv 2402.01306).
    """
    checks.tensor("values", values, checks.FLOATS, ("N", None))
    check_boundaries(cu_seqlens, cu_steps, "values", values)
    validate = values.device.type == "cpu"
    return ReferencePoints(*reference_points_forward(values.detach(), cu_seqlens, cu_steps, validate))
