"""linear_logp, its entropy and stats: every backend of ours, plain torch and every peer beside the bare products."""

import pytest
import torch
from head_inputs import SHAPES, Shape
from measure import DTYPES, Case, large
from registry import BARE, OPS
from replay import replay

QUICK = Shape("quick", 256, 512, 8192, completion=64)
CUDA = torch.cuda.is_available()
MIDDLE = SHAPES["liger"] if CUDA else Shape("16k", 1024, 512, 16384, completion=128)
CHIEF = SHAPES["trl"] if CUDA else Shape("32k", 2048, 1024, 32768)
LARGE = SHAPES["llama3"] if CUDA else Shape("152k", 4096, 896, 151936)
PEAKED = "peaked 0.6"
OURS = ("ours, native", "ours, triton")
EXACT = ("ours, native, exact", "ours, triton, exact")
STRONG = ("TRL", "torch linear_cross_entropy", "cut-cross-entropy, torch.compile")
EVERYONE = tuple(OPS["linear_logp"].providers)


def head(shape: Shape, dtype: str, inputs: str, gradients: bool, names: tuple[str, ...]) -> list[Case]:
    return [Case("head", "linear_logp", shape._replace(dtype=DTYPES[dtype]), inputs, gradients, name) for name in names]


def others(shape: Shape) -> list[Case]:
    ops = "linear_logp_entropy", "linear_logp_stats"
    return [Case("head", op, shape, PEAKED, True, name) for op in ops for name in OPS[op].providers]


EAGER = tuple(name for name in EVERYONE if not OPS["linear_logp"].providers[name].compiles)
CHUNKED = "torch linear_cross_entropy, chunked"  # the slowest of all, for its memory
RIVALS = tuple(name for name in EVERYONE if not name.startswith("ours, reference") and name != CHUNKED)
CASES = [
    *head(QUICK, "bf16", PEAKED, False, (BARE, *OURS, *STRONG[:2])),
    *head(QUICK, "bf16", PEAKED, True, EVERYONE),
    *head(QUICK, "fp32", PEAKED, True, EAGER),
    *others(QUICK),
    *head(MIDDLE, "fp32", PEAKED, True, (BARE, *OURS, *EXACT, *STRONG)),
    *head(CHIEF, "bf16", PEAKED, True, RIVALS),
    *head(CHIEF, "bf16", PEAKED, False, (BARE, *OURS, STRONG[1])),
    *head(CHIEF, "bf16", "flat", True, (BARE, *OURS)),
]
FOR_GOALS = head(CHIEF, "bf16", PEAKED, True, (CHUNKED,))
for shape, dtype in ((CHIEF, "fp32"), (LARGE, "bf16"), (LARGE, "fp32")):
    FOR_GOALS += head(shape, dtype, PEAKED, True, (BARE, *OURS, *EXACT, *STRONG))
    FOR_GOALS += head(shape, dtype, PEAKED, False, (BARE, *OURS))
    FOR_GOALS += head(shape, dtype, "flat", True, (BARE, *OURS))


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("case", [*CASES, *large(FOR_GOALS)], ids=lambda case: case.id)
def test_linear_logp(timed, case):
    timed(case)
