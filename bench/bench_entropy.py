"""The head on inputs from flat to peaked: how rho and the speed-up follow the entropy.

`peaked X` at X nats (head_inputs.py), `real X` and `real` (language_model.py) on the shape that this model has.
"""

import pytest
from bench_linear_logp import MIDDLE
from head_inputs import Shape
from measure import Case
from registry import BARE
from replay import replay

LEVELS = ("0.1", "0.3", "0.6", "1.0", "2.0", "5.0")
NAMES = (
    BARE, "ours, native", "ours, triton", "ours, native, exact", "TRL", "torch linear_cross_entropy",
    "cut-cross-entropy, torch.compile",
)  # fmt: skip
REAL = Shape("lm", 0, 0, 0)  # it brings its own
CASES = [
    Case("entropy", "linear_logp", shape, inputs, True, name)
    for shape, family in ((MIDDLE, "peaked"), (REAL, "real"))
    for inputs in (*(f"{family} {level}" for level in LEVELS), "flat" if shape is MIDDLE else "real")
    for name in NAMES
]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_entropy(timed, case):
    timed(case)
