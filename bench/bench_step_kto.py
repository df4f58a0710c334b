"""step_kto alone, with its slopes, against plain torch and the time that its 12 bytes a token take to copy."""

import pytest
from head_inputs import Shape
from measure import Case
from registry import OPS
from replay import replay

MILLION = Shape("1M in 50,000 steps", 1_000_000, 0, 0, completion=2000, dtype="float32")
SHORT = Shape("quick", 16_000, 0, 0, completion=400, dtype="float32")
CASES = [
    Case("step_kto", "step_kto", shape, "tokens", True, name)
    for shape in (SHORT, MILLION)
    for name in OPS["step_kto"].providers
]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_step_kto(timed, case):
    timed(case)
