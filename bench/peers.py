"""The peers, each by its own public function, with the options at which it is fastest for per-token log-probabilities.

Written against trl 1.16.0, liger-kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels 0.6.5, verl 0.9.1 and torch
2.13.0, as pinned in pyproject.toml and the Makefile. For want of a GPU these never ran here: QuACK, cut-cross-entropy's
Triton kernel, Liger's ("Liger cross-entropy", and "Liger scaled cross-entropy" other than its fallback), and verl but
for fp32 in Triton's interpreter. They are written against the sources, and checked like everyone before they count.

Our reference backend under torch.compile is not among them. Through `linear_logp` the compiler sees one opaque op; of
the functions behind it, torch 2.13 leaves the graph at every `nonzero`, so that the loops over tiles run as they do
without it. What a compiler can do with plain torch is "full logits, torch.compile" (the slow truth of linear_logp but
for ignored rows) and, in bounded memory, "chunked logits, torch.compile".
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import types
from collections.abc import Callable

import torch
from head_inputs import Inputs, Shape, capped
from providers import BETA, provider, require, unreferenced_point
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROWS = 1024  # whose logits "chunked logits, torch.compile" holds at a time


@functools.lru_cache(maxsize=1)
def forget_other_shapes(shape: Shape, device: torch.device) -> None:
    """Makes torch.compile start afresh when the shape changes: it would answer a second one with kernels for any shape,
    and a ninth variant not at all. Providers of one shape keep what they compiled, since they are timed in turns."""
    torch.compiler.reset()


def require_compiler(device: torch.device) -> None:
    if device.type == "cpu":
        found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
        require(found is not None, "torch.compile needs a C++ compiler on a CPU")


def start_compiler(x: Inputs) -> None:
    require_compiler(x.device)
    forget_other_shapes(x.shape, x.device)


def trl_outputs(x: Inputs, *outputs: str) -> Callable:
    """TRL's function: log-probabilities, and those of its other outputs that are asked for."""
    from trl.kernels import ChunkedLogProbFunction

    try:
        from trl.trainer import utils
    except (ImportError, RuntimeError):  # the latter from TRL's lazy modules
        # the backward imports one function from there, which does nothing without DeepSpeed; the module itself
        # needs packages that a benchmark does not
        utils = types.ModuleType("trl.trainer.utils")
        vars(utils)["maybe_gather_lm_head_ctx"] = lambda *parameters: contextlib.nullcontext()
        sys.modules["trl.trainer.utils"] = utils
    chunk = getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768)
    return lambda h, w: ChunkedLogProbFunction.apply(h, w, None, x.target, 1.0, chunk, x.shape.softcap, 1.0, outputs)


@provider("TRL")
def trl(x):
    function = trl_outputs(x)
    return lambda h, w: function(h, w)[0]


@provider("TRL with entropy", kind="entropy")
def trl_with_entropy(x):
    function = trl_outputs(x, "entropy")
    return lambda h, w: function(h, w)[:2]


@provider("TRL with all outputs", kind="stats")
def trl_with_stats(x):
    return trl_outputs(x, "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def liger_kto(x: Inputs, reference: bool, compiled: bool) -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    require(x.shape.softcap is None, "it has no softcap")
    n, d, completion = x.shape.n, x.shape.d, x.shape.completion
    require(n % completion == 0, "it needs completions of one length")
    if compiled:
        start_compiler(x)
    loss = LigerFusedLinearKTOLoss(beta=BETA, compiled=compiled, use_ref_model=reference)
    target = x.target.view(-1, completion)
    point = torch.tensor(0.0 if reference else unreferenced_point(x), device=x.device)
    others = {"preference_labels": x.batch["labels"], "kl": point}
    if reference:
        others |= {"ref_input": x.ref_hidden.view(-1, completion, d), "ref_weight": x.weight}
    return lambda h, w: loss(h.view(-1, completion, d), w, target, **others)[0]


@provider("Liger KTO, compiled", kind="kto", compiles=True)
def liger_kto_compiled(x):
    return liger_kto(x, reference=False, compiled=True)


@provider("Liger KTO", kind="kto")
def liger_kto_plain(x):
    return liger_kto(x, reference=False, compiled=False)


@provider("Liger KTO with its reference", kind="kto with reference")
def liger_kto_with_reference(x):
    return liger_kto(x, reference=True, compiled=False)


@provider("Liger KTO with its reference, compiled", kind="kto with reference", compiles=True)
def liger_kto_with_reference_compiled(x):
    return liger_kto(x, reference=True, compiled=True)


@provider("Liger cross-entropy", kind="mean")
def liger_cross_entropy(x):
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    require(x.device.type == "cuda", "its Triton kernel needs a GPU")
    loss = LigerFusedLinearCrossEntropyLoss(softcap=x.shape.softcap)
    return lambda h, w: loss(w, h, x.target)


@provider("Liger scaled cross-entropy")
def liger_scaled(x):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Loss

    require(x.shape.softcap is None, "it has no softcap")
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"  # its check makes the host wait; ours is off, too
    return lambda h, w: -Loss.apply(h, w, x.target)


@provider("Liger scaled cross-entropy, fallback")
def liger_scaled_fallback(x):
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    require(x.shape.softcap is None, "it has no softcap")
    require(x.device.type == "cuda", "off Hopper it is what Liger scaled cross-entropy runs by itself")
    function = module._FusedLinearPPOFallbackFunction  # what Liger runs off Hopper: plain torch in chunks
    return lambda h, w: -function.apply(h, w, x.target, 1.0, -100, False)


@provider("cut-cross-entropy")
def cut_cross_entropy(x):
    from cut_cross_entropy import linear_cross_entropy

    require(x.device.type == "cuda", "its Triton kernel needs a GPU")
    return lambda h, w: -linear_cross_entropy(h, w, x.target, softcap=x.shape.softcap, reduction="none")


@provider("cut-cross-entropy, torch.compile", compiles=True)
def cut_cross_entropy_compiled(x):
    """Its way where its Triton kernel does not run: the full logits. It compiles by itself, for any shape."""
    from cut_cross_entropy import linear_cross_entropy

    start_compiler(x)
    options = {"softcap": x.shape.softcap, "reduction": "none", "impl": "torch_compile"}
    return lambda h, w: -linear_cross_entropy(h, w, x.target, **options)


@provider("QuACK", kind="mean", compiles=True)  # CuTe kernels, and several of each to choose from, at its first call
def quack(x):
    """Its defaults: the fused pipeline on Hopper where V is a multiple of 128, else logits in chunks of 4096 rows."""
    needed = "its CuTe kernels need a Hopper or Blackwell GPU"
    require(x.device.type == "cuda", needed)
    require(torch.cuda.get_device_capability(x.device) >= (9, 0), needed)
    require(x.shape.softcap is None, "it has no softcap")
    require(x.hidden.dtype in (torch.bfloat16, torch.float16), "its kernels need 16-bit inputs")
    require(not any(size % 8 for size in (x.shape.n, x.shape.d, x.shape.v)), "it needs sizes that are multiples of 8")
    # a TypeError where nvidia-cutlass-dsl lies in a folder of another name than site-packages
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, w: chunked_linear_cross_entropy(h, w, x.target)


def without_init(*packages: str) -> None:
    """Makes the modules in these packages importable without what the packages' own __init__ needs."""
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"No module named {name!r}")
        sys.modules[name] = importlib.util.module_from_spec(spec)


@provider("verl")
def verl(x):
    """fp32 log-probabilities, not negated, beside entropies whose slopes are 0; gradients in the inputs' dtype."""
    require(x.device.type == "cuda", "its Triton kernel needs a GPU")
    require(x.shape.softcap is None, "it has no softcap")
    require(x.shape.d % 128 == 0, "it needs hidden states whose size is a multiple of 128")
    try:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    except ImportError:  # of Ray, tensordict, Hydra and others, which verl's trainers need and its kernel does not
        without_init("verl", "verl.utils")
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    return lambda h, w: linear_cross_entropy(h, w, x.target, 1.0, "none")[0]  # temperature, reduction: no keywords


def torch_linear_cross_entropy(x: Inputs, **options) -> Callable:
    require(hasattr(F, "linear_cross_entropy"), f"torch {torch.__version__} has no linear_cross_entropy")
    require(x.shape.softcap is None, "it has no softcap")
    return functools.partial(F.linear_cross_entropy, target=x.target, **options)


@provider("torch linear_cross_entropy")
def torch_reference(x):
    function = torch_linear_cross_entropy(x, reduction="none")
    return lambda h, w: -function(h, w)


@provider("torch linear_cross_entropy, chunked", kind="mean")
def torch_chunked(x):
    require(hasattr(torch.nn, "LinearCrossEntropyOptions"), f"torch {torch.__version__} has no chunking option")
    return torch_linear_cross_entropy(x, options=torch.nn.LinearCrossEntropyOptions())


def full_logits(h, w, target, softcap):
    logits = capped(h @ w.T, softcap)
    return torch.log_softmax(logits.float(), -1).gather(1, target[:, None]).squeeze(1)


@provider("full logits")
def naive(x):
    return lambda h, w: full_logits(h, w, x.target, x.shape.softcap)


@provider("full logits, torch.compile", compiles=True)
def naive_compiled(x):
    start_compiler(x)
    compiled = torch.compile(full_logits, dynamic=False, fullgraph=True)
    return lambda h, w: compiled(h, w, x.target, x.shape.softcap)


@provider("chunked logits, torch.compile", compiles=True)
def chunked_compiled(x):
    """What plain torch gives without a library: ROWS rows of logits at a time, computed again in the backward."""
    start_compiler(x)
    compiled = torch.compile(full_logits, dynamic=False, fullgraph=True)

    def function(h, w):
        rows = zip(h.split(ROWS), x.target.split(ROWS), strict=True)
        return torch.cat([checkpoint(compiled, h_n, w, t_n, x.shape.softcap, use_reentrant=False) for h_n, t_n in rows])

    return function
