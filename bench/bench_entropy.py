"""The head on inputs from flat to peaked: how rho and the speed-up follow the entropy.

`peaked X` at X nats (head_inputs.py), `real X` and `real` (language_model.py) on the shape that this model has.
"""

import pytest
from bench_linear_logp import CUDA, MIDDLE
from head_inputs import Shape
from language_model import SIZES
from measure import Case
from registry import BARE
from replay import replay

LEVELS = ("0.1", "0.3", "0.6", "1.0", "2.0", "5.0")
OURS = ("ours, native", "ours, triton", "ours, native, exact")
STRONG = ("torch linear_cross_entropy", "cut-cross-entropy, torch.compile")  # others are far behind at every entropy
MODEL = SIZES["cuda" if CUDA else "cpu"]
REAL = Shape("lm", MODEL.tokens, MODEL.width, MODEL.vocabulary)
INPUTS = [(MIDDLE, name) for name in (*(f"peaked {level}" for level in LEVELS), "flat")]
INPUTS += [(REAL, name) for name in ("real 0.1", "real 0.3", "real 1.0", "real 2.0", "real")]
CASES = [
    Case("entropy", "linear_logp", shape, inputs, True, name)
    for shape, inputs in INPUTS
    for name in (BARE, *OURS, *STRONG)
]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_entropy(timed, case):
    timed(case)
