"""Attention over packed sequences that never crosses them, under the name transformers finds it by.

Importing this module registers `stepkto_packed` with transformers' attention interface. A model built with
`attn_implementation="stepkto_packed"` takes one row of packed tokens plus `cu_seq_lens_q` (B + 1 boundaries). The
kernel behind it: flash-attn's varlen function where installed, torch's own `varlen_attn` on CUDA otherwise, one SDPA
call a sequence on a CPU (so no sequence can change a bit of another's result).
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "stepkto_packed"

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention within each packed sequence.

    query (1, H, T, d), key and value (1, H_kv, T, d); `cu_seq_lens_q` (B + 1,) int32, `max_length_q` int and
    `lengths` (list of B ints) come through the model's keyword arguments. Returns ((1, T, H, d), None).
    Sliding windows, attention softcaps, sinks and dropout are refused with a ValueError, not ignored.
    """
    lengths = kwargs.get("lengths")
    if attention_mask is not None:
        raise ValueError(f"attention {NAME!r} has no masks, and {type(module).__name__} makes one of its own")
    if lengths is None:
        raise ValueError(
            f"attention {NAME!r} needs packed inputs: pass PackedBatch.model_inputs, or load the model with 'sdpa'"
        )
    if kwargs.get("sliding_window") is not None and max(lengths) > kwargs["sliding_window"]:
        raise ValueError(f"sliding-window attention is not packed yet, and a sequence has {max(lengths)} tokens")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("attention softcaps and attention sinks are not supported by the packed attention yet")
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported: set attention_dropout to 0 in the config")
    if torch.is_autocast_enabled(query.device.type):  # the rotary embedding leaves query and key in fp32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):  # the varlen kernels are 16-bit only
        return _varlen(query, key, value, scaling, kwargs["cu_seq_lens_q"], kwargs["max_length_q"]), None
    pieces = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _varlen(query, key, value, scaling, cu_seqlens, longest):
    q_THd, k_THd, v_THd = (x[0].transpose(0, 1) for x in (query, key, value))
    if flash_attn_varlen_func is not None:
        packed = flash_attn_varlen_func(
            q_THd, k_THd, v_THd, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scaling, causal=True
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        groups = q_THd.shape[1] // k_THd.shape[1]
        k_THd, v_THd = (x.repeat_interleave(groups, dim=1) for x in (k_THd, v_THd))
        packed = varlen_attn(
            q_THd, k_THd, v_THd, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=(-1, 0)
        )
    return packed[None]


def _no_mask(*args, **kwargs):
    """Boundaries say it all: no T x T mask is built."""
    return None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
