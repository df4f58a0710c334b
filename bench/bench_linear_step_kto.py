"""linear_step_kto, head and objective as one op, against Liger's KTO loss: without and with the reference's pass."""

import pytest
from bench_linear_logp import CHIEF, LARGE, PEAKED, QUICK
from head_inputs import Shape
from measure import DTYPES, Case, large
from registry import OPS
from replay import replay

NAMES = ("linear_step_kto", "linear_step_kto with its reference")


def objective(shape: Shape, dtype: str, op: str, compiled: bool = True) -> list[Case]:
    """The reference backend on the small shape alone: it is nobody's rival, and slow."""
    return [
        Case("objective", op, shape._replace(dtype=DTYPES[dtype]), PEAKED, True, name)
        for name, provider in OPS[op].providers.items()
        if (compiled or not provider.compiles) and (shape is QUICK or not name.startswith("ours, reference"))
    ]


EXACT = "linear_step_kto_exact"
CASES = [
    *(case for op in NAMES for case in objective(QUICK, "bf16", op, compiled=False)),
    *objective(QUICK, "bf16", EXACT),
    *(case for op in NAMES for case in objective(CHIEF, "bf16", op)),
]
LARGER = [(CHIEF, "fp32"), *((LARGE, dtype) for dtype in DTYPES)]
FOR_GOALS = [case for shape, dtype in LARGER for op in NAMES for case in objective(shape, dtype, op)]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("case", [*CASES, *large(FOR_GOALS)], ids=lambda case: case.id)
def test_linear_step_kto(timed, case):
    timed(case)
