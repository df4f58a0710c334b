"""reference_points, the baselines of the value function, against plain torch and the copy of its 4 bytes a token."""

import pytest
from bench_step_kto import MILLION, SHORT
from measure import Case
from registry import OPS
from replay import replay

CASES = [
    Case("reference_points", "reference_points", shape, "tokens", False, name)
    for shape in (SHORT, MILLION)
    for name in OPS["reference_points"].providers
]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_reference_points(timed, case):
    timed(case)
