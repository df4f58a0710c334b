"""patch_lm_head: log-probabilities, loss and gradients against the model's own logits, and what it refuses."""

import copy
import subprocess
import sys
import warnings

import pytest
import stepkto_kernels
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from stepkto_fast import patch_lm_head, unpatch_lm_head
from stepkto_fast.integrations import transformers as integration
from stepkto_fast.integrations.lm_head import FAMILIES

V, T = 67, 11
TINY = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
# Softcaps small and scales large enough to matter at the size of these models' logits.
MODELS = {
    "llama": ("LlamaConfig", {}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 2.0, "tie_word_embeddings": True}),
    "gemma2 untied": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 8, "final_logit_softcapping": 3.0, "tie_word_embeddings": True}),
    "gemma3_text uncapped": ("Gemma3TextConfig", {"head_dim": 8, "tie_word_embeddings": True}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 0.3, "tie_word_embeddings": True}),
    "cohere": ("CohereConfig", {"logit_scale": 2.5, "tie_word_embeddings": True}),
    "cohere2": ("Cohere2Config", {"logit_scale": 2.5, "tie_word_embeddings": True}),
}


def build(config="LlamaConfig", *, seed=0, size=4.0, **options):
    """A random model in eval mode, its matrices enlarged so that its distributions are not flat."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**TINY | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(size if parameter.ndim > 1 else 1)
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def batch(rows=3, seed=1):
    """Inputs padded on the right, the prompt's labels and the padding's ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, T), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for i in range(rows):
        labels[i, : 2 + i] = -100
        mask[i, T - 2 * i :] = 0
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def expected(model, inputs, labels, temperature=1.0):
    """(log_probs, entropy, loss) in fp64 from the logits of the model's own forward."""
    logits = model(**inputs).logits[:, :-1].double() / temperature
    logp, scored = logits.log_softmax(-1), labels[:, 1:] != -100
    per_token = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * scored
    return per_token, -(logp.exp() * logp).sum(-1) * scored, -per_token.sum() / scored.sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, right, rtol):
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        # Relative to the largest: sums cancel in the small ones.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=rtol * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_in_fp64(name):
    config, options = MODELS[name]
    model = build(config, **options).double()
    inputs, labels = batch()
    right, right_entropy, right_loss = expected(model, inputs, labels)
    right_gradients = gradients(model, right_loss)
    patch_lm_head(model)
    output = model(**inputs, labels=labels, output_entropy=True)
    assert output.logits is None
    assert output.log_probs.dtype == torch.float64
    torch.testing.assert_close(output.log_probs, right)
    torch.testing.assert_close(output.entropy, right_entropy)
    torch.testing.assert_close(output.loss, right_loss)
    assert not output.log_probs[labels[:, 1:] == -100].any()
    # RoPE is fp32 in transformers whatever the model's dtype, the same in both; the rest is fp64.
    assert_same_gradients(gradients(model, output.loss), right_gradients, 1e-9)


def test_every_family_is_tested_and_no_other_is_taken_unverified():
    assert {build(config, **options).config.model_type for config, options in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_in_bf16_is_nearer_than_its_own_logits(name):
    config, options = MODELS[name]
    model = build(config, **options).bfloat16()
    inputs, labels = batch(rows=8)
    hidden = model.base_model(**inputs).last_hidden_state[:, :-1].double()
    patch_lm_head(model, filter_eps=0.0)
    found = model(**inputs, labels=labels)
    with torch.no_grad():
        head, scored = model.get_output_embeddings(), labels[:, 1:] != -100
        logits = hidden @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
        scale, cap = getattr(model, integration.PATCH).logits
        logits = scale * logits if cap is None else cap * torch.tanh(scale * logits / cap)
        right = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * scored
        rounded = expected(model, inputs, labels)[0]
    assert (found.log_probs - right).abs().max() < (rounded - right).abs().max() / 10


def test_fp32_loss_and_gradients_are_those_of_transformers():
    model = build()
    inputs, labels = batch()
    right = model(**inputs, labels=labels)
    right_gradients = gradients(model, right.loss)
    patch_lm_head(model)
    found = model(**inputs, labels=labels)
    torch.testing.assert_close(found.loss, right.loss, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, found.loss), right_gradients, 1e-5)


@pytest.mark.parametrize("count", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_num_items_in_batch(count):
    model = build()
    inputs, labels = batch()
    right = model(**inputs, labels=labels, num_items_in_batch=count).loss
    patch_lm_head(model)
    found = model(**inputs, labels=labels, num_items_in_batch=count).loss
    torch.testing.assert_close(found, right, rtol=1e-6, atol=0)


def test_shift_labels_are_not_shifted_again():
    model = build()
    inputs, labels = batch()
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    right = model(**inputs, labels=labels, shift_labels=shifted).loss
    patch_lm_head(model)
    from_labels = model(**inputs, labels=labels)
    for arguments in ({"shift_labels": shifted}, {"labels": labels, "shift_labels": shifted}):
        found = model(**inputs, **arguments)
        assert found.log_probs.shape == (3, T)
        assert torch.equal(found.log_probs[:, :-1], from_labels.log_probs)
        torch.testing.assert_close(found.loss, right, rtol=1e-6, atol=0)


def test_temperature():
    model = build().double()
    inputs, labels = batch()
    right, entropy, loss = expected(model, inputs, labels, temperature=0.6)
    patch_lm_head(model, temperature=0.6)
    found = model(**inputs, labels=labels, output_entropy=True)
    torch.testing.assert_close((found.log_probs, found.entropy, found.loss), (right, entropy, loss))


def test_entropy_is_absent_unless_asked_for_and_differentiable():
    model = build().double()
    inputs, labels = batch()
    right = gradients(model, expected(model, inputs, labels)[1].sum())
    patch_lm_head(model)
    assert model(**inputs, labels=labels).entropy is None
    found = gradients(model, model(**inputs, labels=labels, output_entropy=True).entropy.sum())
    assert_same_gradients(found, right, 1e-9)
    with pytest.raises(ValueError, match="output_entropy needs labels"):
        model(**inputs, output_entropy=True)


def test_another_ignore_index():
    model = build()
    inputs, labels = batch()
    labels[labels == 5] = 6
    other = labels.masked_fill(labels == -100, 5)
    right = model(**inputs, labels=other, ignore_index=5).loss
    patch_lm_head(model)
    torch.testing.assert_close(model(**inputs, labels=other, ignore_index=5).loss, right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_generation_and_logits_are_as_before_while_patched_and_after(name):
    config, options = MODELS[name]
    model = build(config, **options)
    inputs, labels = batch()
    inputs = {"input_ids": inputs["input_ids"]}

    def results():
        return model.generate(**inputs, max_new_tokens=8, do_sample=False), model(**inputs).logits

    before, loss = results(), model(**inputs, labels=labels).loss
    patch_lm_head(model)
    patched = results()
    unpatch_lm_head(model)
    after = results()
    for found in (patched, after):
        assert all(torch.equal(a, b) for a, b in zip(before, found, strict=True))
    output = model(**inputs, labels=labels)
    assert torch.equal(output.loss, loss)
    assert output.logits is not None
    assert "forward" not in vars(model)


def test_only_labelled_positions_reach_the_head(monkeypatch):
    shapes = []

    def recording(hidden, *args, filter_eps, **options):
        shapes.append(tuple(hidden.shape))
        assert filter_eps == 0.25
        return stepkto_kernels.linear_logp(hidden, *args, filter_eps=filter_eps, **options)

    model = build()
    inputs, labels = batch()
    patch_lm_head(model, filter_eps=0.25)
    monkeypatch.setattr(integration, "linear_logp", recording)
    model(**inputs, labels=labels)
    assert shapes == [((labels[:, 1:] != -100).sum(), 32)]


def test_no_logits_are_made_or_kept():
    model = build(vocab_size=4099)
    inputs, _ = batch(rows=8)
    labels = inputs["input_ids"]
    largest, wide = labels.numel() * 4099 // 2, []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor) and x.numel() > largest:
                    wide.append((function, tuple(x.shape)))
            return result

    with Recorder():
        model(**inputs, labels=labels).loss.backward()
    assert wide  # it sees the logits of the model's own forward
    patch_lm_head(model)
    wide.clear()
    kept = []
    with Recorder(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        model(**inputs, labels=labels).loss.backward()
    assert not wide
    assert max(kept) <= largest


def test_without_a_label_the_loss_is_zero_with_a_graph():
    model = build()
    inputs, labels = batch()
    patch_lm_head(model)
    output = model(**inputs, labels=torch.full_like(labels, -100), output_entropy=True)
    assert output.loss == 0
    assert not output.log_probs.any()
    assert not any(g.any() for g in gradients(model, output.loss + output.entropy.sum()).values())


def test_under_gradient_checkpointing():
    model = build().double()
    inputs, labels = batch()
    patch_lm_head(model)
    right = gradients(model, model(**inputs, labels=labels).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_same_gradients(gradients(model, model(**inputs, labels=labels).loss), right, 1e-12)


def test_under_autocast():
    model = build()
    inputs, labels = batch()
    right = expected(model, inputs, labels)[2]
    patch_lm_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs, labels=labels)
    assert found.log_probs.dtype == torch.float32
    # Two layers whose inputs are rounded to 8 bits each, on a loss of about 8.
    assert abs(found.loss - right) < 0.05 * right
    assert all(g.isfinite().all() for g in gradients(model, found.loss).values())


def test_torch_compile():
    model = build()
    inputs, labels = batch()
    patch_lm_head(model)
    right = gradients(model, model(**inputs, labels=labels).loss)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(**inputs, labels=labels)
    assert_same_gradients(gradients(model, found.loss), right, 1e-5)
    assert compiled(**inputs).logits.shape == (3, T, V)


def test_arguments_by_position():
    model = build()
    inputs, labels = batch()
    patch_lm_head(model)
    right = model(**inputs, labels=labels)
    found = model(inputs["input_ids"], inputs["attention_mask"], None, None, None, labels)
    assert torch.equal(found.log_probs, right.log_probs)
    assert torch.equal(model(inputs["input_ids"]).logits, model(input_ids=inputs["input_ids"]).logits)
    with pytest.raises(TypeError, match="positional arguments"):
        model(inputs["input_ids"], input_ids=inputs["input_ids"], labels=labels)


def test_inputs_embeds_and_what_else_the_backbone_returns():
    model = build(attn_implementation="eager")
    inputs, labels = batch()
    patch_lm_head(model)
    right = model(**inputs, labels=labels)
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    found = model(
        **embedded, attention_mask=inputs["attention_mask"], labels=labels,
        output_hidden_states=True, output_attentions=True, use_cache=True,
    )  # fmt: skip
    torch.testing.assert_close(found.loss, right.loss, rtol=1e-6, atol=0)
    assert len(found.hidden_states) == 3
    assert len(found.attentions) == 2
    assert found.past_key_values.get_seq_length() == T
    assert right.past_key_values is None


def test_a_tuple_where_one_is_asked_for():
    model = build()
    inputs, labels = batch()
    patch_lm_head(model)
    right = model(**inputs, labels=labels)
    loss, log_probs = model(**inputs, labels=labels, return_dict=False)
    assert torch.equal(loss, right.loss)
    assert torch.equal(log_probs, right.log_probs)


def test_verification_leaves_the_model_as_it_was():
    model = build("PhiConfig", resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.lm_head.eval()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    random_state = torch.get_rng_state()
    patch_lm_head(model)
    assert model.training
    assert not model.lm_head.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert not model.base_model._forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_deep_copy_has_a_head_of_its_own():
    model = build()
    inputs, labels = batch()
    patch_lm_head(model)
    before = model(**inputs, labels=labels).loss
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert torch.equal(model(**inputs, labels=labels).loss, before)
    fresh = build()
    fresh.load_state_dict(twin.state_dict())
    right = fresh(**inputs, labels=labels)
    torch.testing.assert_close(twin(**inputs, labels=labels).loss, right.loss, rtol=1e-6, atol=0)
    assert torch.equal(twin(**inputs).logits, right.logits)


def test_a_head_that_is_replaced_later_is_used():
    model = build()
    inputs, labels = batch()
    patch_lm_head(model)
    model.resize_token_embeddings(V + 9, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    right = expected(model, inputs, labels)[0]
    torch.testing.assert_close(model(**inputs, labels=labels).log_probs.double(), right, rtol=1e-5, atol=1e-5)


def test_a_forward_replaced_before_is_kept():
    model = build()
    inputs, labels = batch()
    calls, own = [], model.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = counting
    patch_lm_head(model)
    calls.clear()
    model(**inputs)
    assert len(calls) == 1
    assert model(**inputs, labels=labels).logits is None
    unpatch_lm_head(model)
    assert model.forward is counting


def test_patching_and_unpatching_twice_is_refused():
    model = build()
    with pytest.raises(ValueError, match="not patched"):
        unpatch_lm_head(model)
    patch_lm_head(model)
    with pytest.raises(ValueError, match="patched already"):
        patch_lm_head(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ValueError, match="replaced after"):
        unpatch_lm_head(model)
    model.forward = ours
    unpatch_lm_head(model)
    patch_lm_head(model)


class Scaled(transformers.LlamaForCausalLM):
    """Logits that no attribute of the config tells of."""

    change = staticmethod(lambda logits: 1.5 * logits)

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids, attention_mask, **kwargs)
        output.logits = self.change(output.logits)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


def changed(change):
    kind = type("Changed", (Scaled,), {"change": staticmethod(change)})
    torch.manual_seed(0)
    return kind(transformers.LlamaConfig(**TINY))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda z: 1.02 * z, id="scale"),
        pytest.param(lambda z: 50 * torch.tanh(z / 50), id="softcap"),
        pytest.param(lambda z: z + torch.linspace(0, 3, V), id="bias"),
        pytest.param(lambda z: z.masked_fill(torch.arange(V) > 60, -1e4), id="mask"),
    ],
)
def test_logits_that_are_changed_unknown_to_us_are_refused(change):
    with pytest.raises(ValueError, match="other logits than expected"):
        patch_lm_head(changed(change))
    patch_lm_head(changed(lambda z: z))


def test_a_softcap_shows_though_the_logits_are_small():
    model = changed(lambda z: 50 * torch.tanh(z / 50))
    logits = model(torch.arange(8)[None]).logits
    assert logits.abs().max() < 1
    assert (50 * torch.atanh(logits / 50) - logits).abs().max() < 1e-4  # what it does to them as they are
    with pytest.raises(ValueError, match="other logits than expected"):
        patch_lm_head(model)


@pytest.mark.parametrize(
    ("config", "options", "found"),
    [
        ("HyperCLOVAXConfig", {"logits_scaling": 0.5}, "'logits_scaling': 0.5"),
        ("RecurrentGemmaConfig", {"lru_width": 32, "logits_soft_cap": 30.0}, "'logits_soft_cap': 30.0"),
        ("FalconH1Config", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4}, "'lm_head_multiplier'"),
    ],
)
def test_families_that_do_something_else_are_refused_with_what_tells_of_it(config, options, found):
    with pytest.raises(ValueError, match=f"other logits than expected.*{found}"):
        patch_lm_head(build(config, **options))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (
            "MiniCPM3Config",
            {"dim_model_base": 8, "num_key_value_heads": 4},
        ),  # divides the hidden states, not the logits
        ("MixtralConfig", {}),
        ("StableLmConfig", {}),
    ],
)
def test_families_of_which_we_know_nothing_are_taken_if_their_logits_are_right(config, options):
    model = build(config, **options)
    assert model.config.model_type not in FAMILIES
    inputs, labels = batch()
    right, _, loss = expected(model, inputs, labels)
    patch_lm_head(model)
    found = model(**inputs, labels=labels)
    # Both have fp32 logits of a size of about 10.
    torch.testing.assert_close(found.log_probs.double(), right, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss.double(), loss, rtol=0, atol=1e-5)


def test_a_config_that_both_multiplies_and_divides_is_refused():
    model = build()
    model.config.logit_scale = model.config.logits_scaling = 2.0
    with pytest.raises(ValueError, match=r"logit_scale=2\.0 and logits_scaling=2\.0"):
        patch_lm_head(model)


def test_another_loss_is_refused():
    model = build()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: (
        2 * cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))
    )
    with pytest.raises(ValueError, match="the loss is"):
        patch_lm_head(model)


def test_a_backbone_that_the_model_does_not_use_is_refused():
    model = build()
    model.base_model_prefix = "twin"
    model.twin = copy.deepcopy(model.model)
    with pytest.raises(ValueError, match="backbone ran 0 times"):
        patch_lm_head(model)


def test_zero_logits_prove_nothing():
    model = build()
    nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(ValueError, match="largest of the logits is 0"):
        patch_lm_head(model)


class LowRank(nn.Module):
    """As PEFT's: the layer, and something added to its result."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.down = layer, nn.Linear(layer.in_features, 2)
        self.up = nn.Linear(2, layer.out_features)

    weight = property(lambda self: self.base_layer.weight)
    bias = None

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Quantised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


def low_rank(model):
    model.lm_head = LowRank(model.lm_head)


def quantised(model):
    head = Quantised(32, V, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)


def replaced(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * forward(x)


def offloaded(model):
    model.lm_head.to("meta")


def emptied(model):
    model.lm_head.weight = nn.Parameter(torch.empty(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (low_rank, "is a .*LowRank; expected a torch.nn.Linear"),
        (quantised, "is a .*Quantised; expected a torch.nn.Linear"),
        (hooked, "has forward hooks"),
        (replaced, "has a forward of its own"),
        (offloaded, "weight.* is on the meta device"),
        (emptied, "weight.* is empty"),
    ],
)
def test_heads_that_are_not_their_weight_are_refused_when_patching_and_when_called(change, message):
    model = build()
    change(model)
    with pytest.raises(ValueError, match=message):
        patch_lm_head(model)
    model = build()
    inputs, labels = batch()
    patch_lm_head(model)
    change(model)
    with pytest.raises(ValueError, match=message):
        model(**inputs, labels=labels)


@pytest.mark.parametrize("tied", [False, True])
def test_under_fsdp(one_rank, tied):
    model = build(tie_word_embeddings=tied)
    inputs, labels = batch()
    patch_lm_head(model)
    output = model(**inputs, labels=labels)
    right = gradients(model, output.loss)
    for layer in model.model.layers:
        torch.distributed.fsdp.fully_shard(layer, mesh=one_rank)
    torch.distributed.fsdp.fully_shard(model, mesh=one_rank)
    assert isinstance(model.lm_head.weight, torch.distributed.tensor.DTensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # FSDP warns of views, whose hooks an operation in place would lose
        found = model(**inputs, labels=labels)
    assert torch.equal(found.log_probs, output.log_probs)
    assert_same_gradients({k: g.full_tensor() for k, g in gradients(model, found.loss).items()}, right, 1e-6)


def test_sharded_models_are_not_verified_and_sharded_heads_are_refused(one_rank):
    fully_shard, inputs_and_labels = torch.distributed.fsdp.fully_shard, batch()
    model = fully_shard(build(), mesh=one_rank)
    with pytest.raises(ValueError, match=r"is a DTensor, so .* cannot be verified"):
        patch_lm_head(model)
    patch_lm_head(model, verify=False)
    assert model(**inputs_and_labels[0], labels=inputs_and_labels[1]).loss.isfinite()
    model = build()
    patch_lm_head(model)
    fully_shard(model.lm_head, mesh=one_rank)
    with pytest.raises(ValueError, match="FSDP on the root"):
        model(**inputs_and_labels[0], labels=inputs_and_labels[1])
    model = build()
    patch_lm_head(model)
    torch.distributed.tensor.distribute_module(model.lm_head, one_rank)
    with pytest.raises(ValueError, match="is a DTensor; expected a whole tensor"):
        model(**inputs_and_labels[0], labels=inputs_and_labels[1])


def test_with_the_hooks_of_accelerate():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate, whose hooks these are, is missing")
    model = build()
    inputs, labels = batch()
    right = expected(model, inputs, labels)[0]
    for module in (model, model.model, model.lm_head):  # as dispatch_model does
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    patch_lm_head(model)
    torch.testing.assert_close(model(**inputs, labels=labels).log_probs.double(), right, rtol=1e-5, atol=1e-5)
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(ValueError, match="on the meta device"):
        model(**inputs, labels=labels)


def test_lora_that_wraps_the_patched_model():
    peft = pytest.importorskip("peft", reason="peft, whose LoRA this is, is missing")
    inputs, labels = batch()

    def wrapped(*modules):
        model = build()
        patch_lm_head(model)
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(modules), init_lora_weights=False))

    lora = wrapped("q_proj", "v_proj")
    right, _, loss = expected(lora, inputs, labels)
    right_gradients = gradients(lora, loss)
    found = lora(**inputs, labels=labels)
    torch.testing.assert_close(found.log_probs.double(), right, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(lora, found.loss), right_gradients, 1e-4)
    on_head = wrapped("q_proj", "lm_head")
    with pytest.raises(ValueError, match="no LoRA on it"):
        on_head(**inputs, labels=labels)
    assert on_head(**inputs).logits.shape == (3, T, V)


def test_models_without_weights_are_refused_unless_of_a_tested_family():
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
        unknown = transformers.StableLmForCausalLM(transformers.StableLmConfig(**TINY))
        other_code = Scaled(transformers.LlamaConfig(**TINY))
    with pytest.raises(ValueError, match=r"on the meta device, so .* cannot be verified.*verify=False"):
        patch_lm_head(llama)
    for model in (unknown, other_code):
        with pytest.raises(ValueError, match=r"verify=False with .*expected one of transformers' own llama"):
            patch_lm_head(model, verify=False)
    patch_lm_head(llama, verify=False)
    trained = build()
    llama.to_empty(device="cpu").load_state_dict(trained.state_dict())
    for module in llama.modules():  # buffers that are in no state_dict
        if hasattr(module, "inv_freq"):
            module.inv_freq = module.original_inv_freq = trained.model.rotary_emb.inv_freq
    inputs, labels = batch()
    right = expected(trained, inputs, labels)[0]
    torch.testing.assert_close(llama(**inputs, labels=labels).log_probs.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits_to_keep": 3}, "logits_to_keep"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"labels": torch.zeros(3, T + 1, dtype=torch.int64)}, "labels has shape"),
        ({"shift_labels": torch.zeros(3, T - 1, dtype=torch.int64)}, "shift_labels has shape"),
    ],
)
def test_calls_that_would_give_something_else_are_refused(arguments, message):
    model = build()
    inputs, labels = batch()
    patch_lm_head(model)
    with pytest.raises(ValueError, match=message):
        model(**inputs | {"labels": labels} | arguments)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="before it is wrapped"):
        patch_lm_head(nn.DataParallel(build()))
    with pytest.raises(ValueError, match="temperature is 0"):
        patch_lm_head(build(), temperature=0)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": V}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(ValueError, match="no decoder with a head"):
        patch_lm_head(t5)


def test_trainer_takes_the_same_steps(tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate, which is missing")
    generator = torch.Generator().manual_seed(3)
    rows = []
    for n in range(16):
        ids = torch.randint(3, V, (T,), generator=generator)
        rows.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(T) < n % 7, -100)})

    def train(model):
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2, report_to=[],
            learning_rate=1e-2, use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, optim="sgd",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.evaluate()["eval_loss"], {k: v.clone() for k, v in model.state_dict().items()}

    plain, patched = build(), build()
    patch_lm_head(patched)
    losses, evaluated, weights = train(plain)
    found_losses, found_evaluated, found_weights = train(patched)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert found_evaluated == pytest.approx(evaluated, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(found_weights[name], weight, rtol=1e-4, atol=1e-5)


def test_the_package_is_importable_without_transformers():
    code = """
import sys
import stepkto_fast
assert "transformers" not in sys.modules
stepkto_fast.patch_lm_head
assert "transformers" in sys.modules
try:
    stepkto_fast.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
