"""TRL's trainers on our kernels, without a change to them.

    from stepkto_fast.integrations.trl import patch

    patch()
    KTOTrainer(...).train()

The KTO, DPO, SFT, GRPO and RLOO trainers, and those of `trl.experimental` that build on them, score tokens in one
place: the fused LM head of `trl.trainer.utils.add_fused_lm_head`, which calls `trl.kernels.ChunkedLogProbFunction`.
`patch()` puts `ChunkedLogProbFunction` of this module there. The names are looked up at every forward, so trainers that
were made before are served too. Distillation compares two whole distributions with a function of its own, which stays.

What is not as in TRL:

- Logits are kept in fp32 also where the inputs have 16 bits; TRL rounds each of them to 16.
- In 16 bits the backward may drop the share `filter_eps` of a token's probability mass; 0 drops nothing.
- On a CPU, TRL scores every position, prompts and padding included, and then writes 0 over those without a label. With
  the patch it scores only those with a label there too, as it does by itself on a GPU. The results are the same.
- Under ZeRO-3 TRL gathers the head once for the forward and again for the backward. We keep what the forward gathered:
  one collective less, and one whole head in memory until the backward has run.
- A gradient of the head is rounded once to the dtype that it was multiplied in (under autocast, 16 bits), as that of
  `torch.nn.functional.linear` is.
"""

import inspect
from functools import cache
from typing import Any, Literal

import torch
from stepkto_kernels import linear_logp, linear_logp_entropy, linear_logp_stats
from torch import Tensor

from . import require

SUPPORTED = "==1.16.*"
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class ChunkedLogProbFunction:
    """Stands in for `trl.kernels.ChunkedLogProbFunction`: the same call, the same results."""

    filter_eps: float | Literal["auto"] = "auto"

    @classmethod
    def apply(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> Outputs:
        """Log-probability of each target under a linear head, and of its distribution what `outputs` names.

        The logits are `z = logit_scale * (hidden @ weight.T + bias)`, then `c * tanh(z / c)` with the softcap c, then
        `z / temperature`. Products have autocast's dtype under autocast, else that of hidden; weight and bias are cast.

        Args:
            hidden: (N, D) fp32, bf16, fp16 or fp64.
            weight: (V, D), the whole LM head: under ZeRO-3, within `trl.trainer.utils.maybe_gather_lm_head_ctx`.
            bias: (V,) or None.
            targets: (N,) int64 in [0, V); -100 gives 0 and no gradient.
            temperature: positive.
            chunk_size: accepted for TRL's sake; our tiles have sizes of their own.
            final_logit_softcapping: positive, or None.
            logit_scale: finite.
            outputs: what to return beside the log-probability, of `OPTIONAL_OUTPUTS` ("log_probs" is allowed).

        Returns:
            (logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), each (N,), in nats, or None where not asked
            for: fp32 (fp64 for fp64 inputs), but for `is_top1`, bool. The first two are differentiable once.

        Raises:
            ValueError, TypeError: a wrong shape, dtype, device or value; the message names the argument.
        """
        unknown = [name for name in outputs if name not in ("log_probs", *OPTIONAL_OUTPUTS)]
        if unknown:
            raise ValueError(f"outputs holds {unknown}; expected names among {('log_probs', *OPTIONAL_OUTPUTS)}")
        if weight.numel() == 0:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; expected (V, D). A head that ZeRO-3 has partitioned looks "
                "so: call this within trl.trainer.utils.maybe_gather_lm_head_ctx(weight, bias)"
            )
        device = hidden.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        head = hidden.to(dtype), _kept(weight, dtype), targets
        options: dict[str, Any] = {
            "bias": None if bias is None else _kept(bias, dtype),
            "logit_scale": logit_scale,
            "softcap": final_logit_softcapping,
            "temperature": temperature,
            "filter_eps": cls.filter_eps,
        }
        if any(name in outputs for name in OPTIONAL_OUTPUTS[1:]):
            stats = linear_logp_stats(*head, **options)
            entropy, log_sum_sq_probs, mean_logits, is_top1 = (
                getattr(stats, name) if name in outputs else None for name in OPTIONAL_OUTPUTS
            )
            return stats.logp, entropy, log_sum_sq_probs, mean_logits, is_top1
        if "entropy" in outputs:
            return *linear_logp_entropy(*head, **options), None, None, None
        return linear_logp(*head, **options), None, None, None, None


def _kept(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter as it is now. ZeRO-3 takes the data from a parameter when its gather context ends, before the
    backward; a view still holds them."""
    cast = parameter.to(dtype)
    return parameter.view_as(parameter) if cast is parameter else cast


@cache
def _function(filter_eps: float | Literal["auto"]) -> type[ChunkedLogProbFunction]:
    if filter_eps == ChunkedLogProbFunction.filter_eps:
        return ChunkedLogProbFunction
    return type("ChunkedLogProbFunction", (ChunkedLogProbFunction,), {"filter_eps": filter_eps})


def _scores_labelled_only(device: torch.device) -> bool:
    """Stands in for what the fused head asks, whether to leave positions without a label out.

    TRL answers no on a CPU for the sake of devices that compile anew for each number of tokens; a CPU does not.
    """
    from trl.kernels.chunked_logprob import _use_triton

    return device.type == "cpu" or _use_triton(device)


_FUNCTION_NAMES = (
    ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction"),
    ("trl.kernels", "ChunkedLogProbFunction"),
    ("trl.trainer.utils", "_ChunkedLogProbFunction"),
)
_QUESTION_NAME = ("trl.trainer.utils", "_use_triton")

_Names = dict[tuple[str, str], Any]
_theirs: _Names = {}  # what TRL's names held before the first patch, while one is in place


class Patch:
    """A patch in place. Leaving it as a context puts back what was there before it, another patch included."""

    def __init__(self, before: _Names):
        self._before = before

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *raised: object) -> None:
        _assign(self._before)
        if self._before == _theirs:
            _theirs.clear()


def patch(*, filter_eps: float | Literal["auto"] = "auto") -> Patch:
    """Make TRL's trainers score tokens with `ChunkedLogProbFunction` of this module.

    Takes effect with the call, for this process, until `unpatch()`; or as a context manager, `with patch():`, until the
    context ends. Calling it again changes nothing but `filter_eps`.

    Args:
        filter_eps: the share of a token's non-target probability mass whose gradient the backward may drop, in [0, 1).
            0 is exact; "auto" is 0 for fp32 and fp64 and 2^-9 for 16-bit inputs.

    Raises:
        ImportError: TRL is missing or of a version other than `SUPPORTED`, or what is to be replaced does not look as
            it does there (another patch may have been first). Nothing is then changed.
        ValueError: filter_eps is out of range.
    """
    require("trl", SUPPORTED, "stepkto_fast.integrations.trl")
    if filter_eps != "auto" and (isinstance(filter_eps, str | bool) or not 0 <= filter_eps < 1):
        raise ValueError(f"filter_eps is {filter_eps!r}; expected 'auto' or a number in [0, 1)")
    before = _found()
    _theirs.update({} if _theirs else before)
    _assign({**dict.fromkeys(_FUNCTION_NAMES, _function(filter_eps)), _QUESTION_NAME: _scores_labelled_only})
    return Patch(before)


def unpatch() -> None:
    """Put TRL's own functions back, however often `patch()` was called. Without a patch it does nothing."""
    _assign(_theirs)
    _theirs.clear()


def _modules() -> dict[str, Any]:
    import trl.kernels
    import trl.kernels.chunked_logprob
    import trl.trainer.utils

    return {module.__name__: module for module in (trl.kernels, trl.kernels.chunked_logprob, trl.trainer.utils)}


def _assign(names: _Names) -> None:
    for (module, name), value in names.items():
        setattr(_modules()[module], name, value)


def _found() -> _Names:
    """What TRL's names hold, which must be its own functions as we know them, or ours."""
    modules = _modules()
    kernel = modules["trl.kernels.chunked_logprob"]
    names = (*_FUNCTION_NAMES, _QUESTION_NAME)
    found = {(module, name): getattr(modules[module], name, None) for module, name in names}
    function = found[_FUNCTION_NAMES[0]]
    ours = isinstance(function, type) and issubclass(function, ChunkedLogProbFunction)
    for module, name in _FUNCTION_NAMES:
        if found[module, name] is not function or not (ours or _takes_what_ours_takes(function)):
            raise _unexpected(f"{module}.{name}", found[module, name])
    question = _scores_labelled_only if ours else getattr(kernel, "_use_triton", None)
    if found[_QUESTION_NAME] is not question or not callable(question):
        raise _unexpected(".".join(_QUESTION_NAME), found[_QUESTION_NAME])
    if getattr(kernel, "OPTIONAL_OUTPUTS", None) != OPTIONAL_OUTPUTS:
        raise _unexpected("trl.kernels.chunked_logprob.OPTIONAL_OUTPUTS", getattr(kernel, "OPTIONAL_OUTPUTS", None))
    return found


def _takes_what_ours_takes(function: object) -> bool:
    def shape(parameters: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in parameters.values()]

    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        return False
    _ctx, *theirs = shape(inspect.signature(function.forward).parameters)
    return theirs == shape(inspect.signature(ChunkedLogProbFunction.apply).parameters)


def _unexpected(name: str, value: object) -> ImportError:
    return ImportError(
        f"{name} is {value!r}, which is not what TRL {SUPPORTED} has there: nothing was patched. If another package "
        "patches it, use one of the two; if TRL changed it, install a supported version"
    )
