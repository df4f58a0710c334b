"""Packed batches: layout, and the same logits and gradients as one sequence at a time."""

import copy
from fractions import Fraction
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_fast import attention
from stepkto_fast.attention import NAME, packed_attention
from stepkto_fast.packing import micro_batches, micro_batches_of_ranks, pack, split_over_ranks
from stepkto_fast.policy import head, hidden_states
from stepkto_fast.rollout import Rollout

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def rollout(prompt: int, completion: int, ends=None) -> Rollout:
    ids = list(range(3, 3 + prompt + completion))
    return Rollout(0, 0, "", ids[:prompt], "x", ids[prompt:], [], True, [], ends or [completion])


def test_layout():
    batch = pack([rollout(2, 3, [1, 3]), rollout(1, 1)])
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch.cu_trunk.tolist() == [0, 5, 7]
    assert batch.rows.tolist() == [1, 2, 3, 5], (
        "the prompt's last token predicts first, the last token predicts nothing"
    )
    assert batch.target.tolist() == [5, 6, 7, 4]
    assert batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.cu_steps.tolist() == [0, 1, 3, 4]
    assert batch.step_labels.tolist() == [-1, -1, -1]
    assert (batch.cu_seqlens.dtype, batch.cu_steps.dtype) == (torch.int32, torch.int32)


@pytest.mark.parametrize("bad", [rollout(0, 2), rollout(2, 0, [0]), rollout(2, 3, [2])])
def test_what_cannot_be_packed_is_named(bad):
    with pytest.raises(ValueError, match=r"rollouts\[1\].*needs a prompt, at least one token, and steps"):
        pack([rollout(1, 1), bad])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=20), st.integers(1, 40))
def test_micro_batches_keep_order_and_budget(shapes, budget):
    rollouts = [rollout(*shape) for shape in shapes]
    groups = list(micro_batches(rollouts, budget))
    assert [r for g in groups for r in g] == rollouts
    for group in groups:
        assert len(group) == 1 or sum(map(len, group)) <= budget
    for left, right in pairwise(groups):
        assert sum(map(len, left)) + len(right[0]) > budget, "no micro-batch is smaller than it needs to be"


SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 90)), max_size=30)


@given(SHAPES, st.integers(1, 6))
def test_ranks_share_all_rollouts_evenly(shapes, ranks):
    rollouts = [rollout(*shape) for shape in shapes]
    shares = split_over_ranks(rollouts, ranks)
    assert len(shares) == ranks
    assert sorted(index for share in shares for index in share) == list(range(len(rollouts)))
    assert all(share == sorted(share) for share in shares)
    assert shares == split_over_ranks(copy.deepcopy(rollouts), ranks)
    tokens = [sum(len(rollouts[index]) for index in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(map(len, rollouts), default=0)
    assert ranks > len(rollouts) or all(shares), "no rank is idle where there is work for all"


@given(st.lists(st.integers(2, 60), min_size=1, max_size=7), st.integers(1, 3))
def test_no_split_is_much_better(lengths, ranks):
    """Graham's bound, against all splits."""
    shares = split_over_ranks([rollout(1, length - 1) for length in lengths], ranks)
    fullest = max(sum(lengths[index] for index in share) for share in shares)
    best = min(
        max(sum(n for n, at in zip(lengths, places, strict=True) if at == rank) for rank in range(ranks))
        for places in product(range(ranks), repeat=len(lengths))
    )
    assert fullest <= (Fraction(4, 3) - Fraction(1, 3 * ranks)) * best


@given(SHAPES, st.integers(1, 6), st.integers(1, 200))
def test_every_rank_has_as_many_micro_batches(shapes, ranks, budget):
    rollouts = [rollout(*shape) for shape in shapes]
    split = micro_batches_of_ranks(rollouts, ranks, budget)
    assert len({len(groups) for groups in split}) == 1
    for groups, share in zip(split, split_over_ranks(rollouts, ranks), strict=True):
        assert [index for group in groups for index in group] == share
        packed = [[rollouts[index] for index in group] for group in groups if group]
        assert packed == list(micro_batches([rollouts[index] for index in share], budget))
    if ranks == 1:
        assert [] not in split[0], "one rank waits for nobody"


def test_importance_weights_lie_beside_the_tokens():
    weighted = rollout(2, 3)
    weighted.importance = [0.5, 2.0, 1.5]
    assert pack([rollout(1, 1), rollout(2, 2)]).importance is None
    batch = pack([rollout(1, 2), weighted]).to(torch.device("cpu"))
    assert batch.importance.tolist() == [1.0, 1.0, 0.5, 2.0, 1.5]
    assert batch.importance.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_packed_equals_one_by_one(device, kv_heads):
    """Logits and every gradient agree to 1e-5 of their size with unpacked SDPA runs of the same model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=kv_heads, max_position_embeddings=64,
    )  # fmt: skip
    packed = LlamaForCausalLM(config).to(device)
    packed.set_attn_implementation(NAME)
    alone = copy.deepcopy(packed)
    alone.set_attn_implementation("sdpa")
    rollouts = [rollout(3, 7), rollout(1, 1), rollout(9, 2), rollout(2, 20)]
    batch = pack(rollouts).to(torch.device(device))

    logits = hidden_states(packed, batch) @ packed.lm_head.weight.T
    expected = torch.cat(
        [
            alone(torch.tensor([[*r.prompt_ids, *r.completion_ids]], device=device)).logits[
                0, len(r.prompt_ids) - 1 : -1
            ]
            for r in rollouts
        ]
    )
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, mine), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(
            mine.grad, other.grad, atol=1e-5 * scale, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the varlen kernels need a GPU")
def test_under_autocast_a_gpu_takes_the_varlen_kernel(model, rollouts, monkeypatch):
    calls = []
    real = attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *args: calls.append(args[0].dtype) or real(*args))
    batch, model = pack(rollouts).to(torch.device("cuda")), model.cuda()
    exact = hidden_states(model, batch)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        rounded = hidden_states(model, batch)
    assert calls == [torch.bfloat16] * model.config.num_hidden_layers
    torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.1)


def test_no_sequence_touches_another(model, rollouts):
    """Other contents in one packed sequence change no bit of the others' states."""
    few = rollouts[:4]
    before = hidden_states(model, pack(few))
    other = copy.deepcopy(few)
    other[1].completion_ids = [5] * len(few[1].completion_ids)
    other[1].prompt_ids = [7] * len(few[1].prompt_ids)
    after = hidden_states(model, pack(other))
    sizes = [len(r.completion_ids) for r in few]
    same = [torch.equal(a, b) for a, b in zip(before.split(sizes), after.split(sizes), strict=True)]
    assert same == [True, False, True, True]


def test_packed_attention_refuses_what_it_would_get_wrong(model):
    with pytest.raises(ValueError, match="needs packed inputs"):
        model(torch.tensor([[3, 4, 5]]))
    batch = pack([rollout(2, 2)])
    q = torch.zeros(1, 1, 4, 8)
    for extra in ({"softcap": 50.0}, {"s_aux": torch.zeros(1)}):
        with pytest.raises(ValueError, match="softcaps and attention sinks"):
            packed_attention(None, q, q, q, None, **batch.model_inputs, **extra)
    with pytest.raises(ValueError, match="sliding-window"):
        packed_attention(None, q, q, q, None, **batch.model_inputs, sliding_window=3)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention dropout"):
        hidden_states(model.train(), pack([rollout(2, 2)]))


def test_head_finds_scale_bias_and_softcap(model):
    assert head(model) == {"weight": model.lm_head.weight, "bias": None, "logit_scale": 1.0, "softcap": None}
    model.config.logit_scale, model.config.final_logit_softcapping = 0.25, 30.0
    assert (head(model)["logit_scale"], head(model)["softcap"]) == (0.25, 30.0)
    model.config.logit_scale, model.config.logits_scaling = None, 8.0  # granite divides
    assert head(model)["logit_scale"] == 0.125
