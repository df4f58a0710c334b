"""linear_logp_kl, both models' log-probs and the exact KL in one pass: no peer has it, so plain torch is the rival."""

import pytest
from bench_linear_logp import MIDDLE, PEAKED, QUICK
from measure import Case
from registry import OPS
from replay import replay

CASES = [
    *(Case("kl", "linear_logp_kl", QUICK, PEAKED, True, name) for name in OPS["linear_logp_kl"].providers),
    *(
        Case("kl", op, MIDDLE, PEAKED, True, name)
        for op in ("linear_logp_kl", "linear_step_kto_exact")
        for name in OPS[op].providers
    ),
]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_linear_logp_kl(timed, case):
    timed(case)
