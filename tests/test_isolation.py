"""With the reference points fixed, what one packed sequence holds changes no bit of another's log-probs or gradients.

Promised: for packings of the same lengths, whatever the changed sequence holds (other tokens, labels and steps,
activations that overflow, NaN), with `filter_eps` 0. When a sequence's length changes, the matrices of the trunk and
the head have other shapes, and a library may then sum a row in another order: the others agree to rounding, and to the
last bit where the products are the same.
"""

from dataclasses import replace

import pytest
import torch
from on_backends import where_it_runs
from stepkto_kernels import backend, linear_step_kto

from stepkto_fast.objective import autocast
from stepkto_fast.packing import pack
from stepkto_fast.policy import head, hidden_states
from stepkto_fast.recipe import Recipe

BACKENDS = [where_it_runs("linear_step_kto", name) for name in ("reference", "native", "triton")]
POINTS = {"kl": 0.3, "step_kl": 0.1, "num_completions": 8, "num_supervised": 8}


def parts(model, rollouts, bf16):
    """Of each sequence: log-probs, gradients of the states before the head, and of what enters the trunk."""
    batch, entered = pack(rollouts), []

    def keep(module, arguments, output):
        entered.append(output)
        output.retain_grad()

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with autocast(model, Recipe(bf16=bf16)):
            hidden = hidden_states(model, batch)
            hidden.retain_grad()
            output = linear_step_kto(
                hidden, target=batch.target, ref_logp=batch.ref_logp, cu_seqlens=batch.cu_seqlens,
                cu_steps=batch.cu_steps, labels=batch.labels, step_labels=batch.step_labels, filter_eps=0.0,
                **POINTS, **head(model),
            )  # fmt: skip
        output.loss.backward()
    finally:
        hook.remove()
    model.zero_grad()
    scored, trunk = batch.cu_seqlens.diff().tolist(), batch.cu_trunk.diff().tolist()
    return list(zip(output.logp.split(scored), hidden.grad.split(scored), entered[0].grad[0].split(trunk), strict=True))


def other_tokens(r, tokenizer):
    """The same lengths with everything else different: tokens, labels, steps."""
    shift = len(tokenizer) // 2
    completion = [(n + shift) % len(tokenizer) for n in r.completion_ids]
    ends = [1, len(completion)] if len(completion) > 1 else [1]
    return replace(
        r, completion_ids=completion, prompt_ids=[(n + shift) % len(tokenizer) for n in r.prompt_ids],
        label=not r.label, step_ends=ends, step_labels=[0] * len(ends), ref_logps=[-50.0] * len(completion),
    )  # fmt: skip


def spoiled(r, tokenizer):
    """A token whose embedding is not a sane number, from the first position on."""
    return replace(r, prompt_ids=[tokenizer.unk_token_id, *r.prompt_ids[1:]])


def assert_same(before, after, changed):
    for n, (one, other) in enumerate(zip(before, after, strict=True)):
        if n != changed:
            for name, x, y in zip(
                ("log-probs", "gradients of the states", "gradients of the inputs"), one, other, strict=True
            ):
                assert x.isfinite().all()
                assert torch.equal(x, y), f"{name} of sequence {n} changed with sequence {changed}"


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("size", "changed"), [(2, 0), (5, 4), (12, 3)])
def test_what_a_sequence_holds_reaches_no_other(model, tokenizer, rollouts, name, bf16, size, changed):
    packed = rollouts[size : 2 * size]
    with backend(name):
        before = parts(model, packed, bf16)
        packed[changed] = other_tokens(packed[changed], tokenizer)
        after = parts(model, packed, bf16)
    assert not torch.equal(before[changed][0], after[changed][0])
    assert before[changed][2].abs().sum() > 0
    assert_same(before, after, changed)


@pytest.mark.parametrize("value", [1e4, 1e38, float("inf"), float("nan")])
@pytest.mark.parametrize("name", BACKENDS)
def test_activations_that_overflow_reach_no_other(model, tokenizer, rollouts, name, value):
    packed, changed = rollouts[:6], 2
    with backend(name):
        before = parts(model, packed, bf16=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.unk_token_id] = value
        packed[changed] = spoiled(packed[changed], tokenizer)
        after = parts(model, packed, bf16=False)
    assert not torch.equal(before[changed][0], after[changed][0])
    assert_same(before, after, changed)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_sequence_of_another_length_moves_others_by_rounding_alone(model, rollouts, name):
    packed = rollouts[:6]
    longer = [*packed[:2], rollouts[20], *packed[3:]]
    assert len(longer[2]) != len(packed[2])
    with backend(name):
        before, after = parts(model, packed, bf16=False), parts(model, longer, bf16=False)
    for n in {0, 1, 3, 4, 5}:
        for x, y in zip(before[n], after[n], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
