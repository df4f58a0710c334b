"""The peers, each by its own public function, with the options at which it is fastest for per-token log-probabilities.

Written against trl 1.16, liger-kernel 0.8.5, cut-cross-entropy 25.1.1 and torch 2.13.
"""

import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable

import torch
from head_inputs import Inputs, capped
from providers import BETA, provider, require, unreferenced_point
from torch.nn import functional as F


@provider("TRL")
def trl(x):
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
    return lambda h, w: ChunkedLogProbFunction.apply(h, w, None, x.target, 1.0, chunk, x.shape.softcap, 1.0, ())[0]


def liger_kto(x: Inputs, reference: bool, compiled: bool) -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    require(x.shape.softcap is None, "it has no softcap")
    n, d, completion = x.shape.n, x.shape.d, x.shape.completion
    require(n % completion == 0, "it needs completions of one length")
    loss = LigerFusedLinearKTOLoss(beta=BETA, compiled=compiled, use_ref_model=reference)
    target = x.target.view(-1, completion)
    point = torch.tensor(0.0 if reference else unreferenced_point(x), device=x.device)
    others = {"preference_labels": x.batch["labels"], "kl": point}
    if reference:
        others |= {"ref_input": x.ref_hidden.view(-1, completion, d), "ref_weight": x.weight}
    return lambda h, w: loss(h.view(-1, completion, d), w, target, **others)[0]


@provider("Liger KTO, compiled", kind="kto", compiles=True)
def liger_kto_compiled(x):
    return liger_kto(x, reference=False, compiled=x.device.type == "cuda")


@provider("Liger KTO", kind="kto")
def liger_kto_plain(x):
    return liger_kto(x, reference=False, compiled=False)


@provider("Liger KTO with its reference", kind="kto with reference")
def liger_kto_with_reference(x):
    return liger_kto(x, reference=True, compiled=False)


@provider("Liger KTO with its reference, compiled", kind="kto with reference", compiles=True)
def liger_kto_with_reference_compiled(x):
    return liger_kto(x, reference=True, compiled=x.device.type == "cuda")


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
    function = module._FusedLinearPPOFallbackFunction  # what Liger runs off Hopper: plain torch in chunks
    return lambda h, w: -function.apply(h, w, x.target, 1.0, -100, False)


@provider("cut-cross-entropy")
def cut_cross_entropy(x):
    from cut_cross_entropy import linear_cross_entropy

    require(x.device.type == "cuda", "its Triton kernel needs a GPU")
    return lambda h, w: -linear_cross_entropy(h, w, x.target, softcap=x.shape.softcap, reduction="none")


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
    require(x.device.type == "cuda", "timed on a GPU only")
    compiled = torch.compile(full_logits, dynamic=False)
    return lambda h, w: compiled(h, w, x.target, x.shape.softcap)
