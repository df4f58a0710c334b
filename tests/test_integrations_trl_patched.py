"""TRL's trainers on our kernels: the losses, metrics and gradients that they have without them."""

import copy
import math

import pytest
import torch

pytest.importorskip("trl", reason="needs trl")

import trl.trainer.utils
from datasets import Dataset
from test_integrations_trl import Plain
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stepkto_fast.integrations import trl as adapter
from stepkto_fast.integrations.trl import OPTIONAL_OUTPUTS, patch

VOCABULARY = 97


@pytest.fixture(scope="module")
def words():
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(3, 97))])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def build_model(tie_word_embeddings=False):
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=tie_word_embeddings,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # distributions that are not flat
    return model


def text(rng, low, high):
    return " ".join(f"w{3 + int(n)}" for n in torch.randint(0, 94, (int(torch.randint(low, high, (), generator=rng)),),
                                                            generator=rng))  # fmt: skip


def rows(columns, count):
    rng = torch.Generator().manual_seed(11)
    return Dataset.from_list(
        [{c: n % 2 == 0 if c == "label" else text(rng, 3, 9) for c in columns} for n in range(count)]
    )


SETTINGS = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False,
    "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
}  # fmt: skip


def recording(trainer_class):
    class Recording(trainer_class):
        def training_step(self, *arguments, **options):
            loss = super().training_step(*arguments, **options)
            self.losses = [*getattr(self, "losses", []), float(loss)]
            return loss

    return Recording


def kto(words, folder, model=None, steps=20, **options):
    model = build_model() if model is None else model
    settings = trl.KTOConfig(output_dir=str(folder), max_steps=steps, max_length=None, **SETTINGS)
    if "peft_config" not in options:
        options["ref_model"] = copy.deepcopy(model)
    trainer = recording(trl.KTOTrainer)(
        model=model, args=settings, train_dataset=rows(("prompt", "completion", "label"), 4 * steps),
        processing_class=words, **options,
    )  # fmt: skip
    trainer.train()
    return trainer


def dpo(words, folder):
    model = build_model()
    trainer = recording(trl.DPOTrainer)(
        model=model, ref_model=copy.deepcopy(model), processing_class=words,
        args=trl.DPOConfig(output_dir=str(folder), max_steps=4, **SETTINGS),
        train_dataset=rows(("prompt", "chosen", "rejected"), 16),
    )  # fmt: skip
    trainer.train()
    return trainer


def sft(words, folder):
    trainer = recording(trl.SFTTrainer)(
        model=build_model(tie_word_embeddings=True), processing_class=words,
        args=trl.SFTConfig(output_dir=str(folder), max_steps=4, **SETTINGS),
        train_dataset=rows(("prompt", "completion"), 16),
    )  # fmt: skip
    trainer.train()
    return trainer


def lengths(completions, **_):
    return [len(set(text.split())) / 8 for text in completions]


def grpo(words, folder, steps=2):
    settings = trl.GRPOConfig(
        output_dir=str(folder), max_steps=steps, num_generations=4, max_completion_length=8, temperature=0.7,
        **SETTINGS,
    )  # fmt: skip
    trainer = recording(trl.GRPOTrainer)(
        model=build_model(), reward_funcs=lengths, processing_class=words, args=settings,
        train_dataset=rows(("prompt",), 8),
    )  # fmt: skip
    if steps:
        trainer.train()
    return trainer


def rloo(words, folder):
    settings = trl.RLOOConfig(
        output_dir=str(folder), max_steps=2, num_generations=4, max_completion_length=8, temperature=0.7, beta=0.0,
        **SETTINGS,
    )  # fmt: skip
    trainer = recording(trl.RLOOTrainer)(
        model=build_model(), reward_funcs=lengths, processing_class=words, args=settings,
        train_dataset=rows(("prompt",), 8),
    )  # fmt: skip
    trainer.train()
    return trainer


def assert_losses_within_budget(train, monkeypatch):
    """Both train in fp32 from the same weights on the same batches; the truth is the same training with whole logits
    in fp64 and everything else as it is. Rounding errors of one size, which training carries along: ours may be up to
    4 times TRL's, over a floor of some roundings of a loss."""
    theirs = train().losses
    with patch():
        ours = train().losses
    with monkeypatch.context() as swapped:
        swapped.setattr("trl.trainer.utils._ChunkedLogProbFunction", Plain)
        exact = train().losses
    assert len(ours) == len(exact)
    assert len(set(exact)) > 1, "the loss must move"
    error, allowed = (max(abs(a - b) for a, b in zip(found, exact, strict=True)) for found in (ours, theirs))
    floor = 16 * torch.finfo(torch.float32).eps * max(1, *map(abs, exact))
    assert error <= 4 * allowed + floor, f"error {error:.3g}, TRL's {allowed:.3g}"


def test_kto_reaches_the_same_losses(words, tmp_path, monkeypatch):
    assert_losses_within_budget(lambda: kto(words, tmp_path), monkeypatch)


@pytest.mark.parametrize("train", [dpo, sft])
def test_preference_and_supervised_training_reach_the_same_losses(train, words, tmp_path, monkeypatch):
    assert_losses_within_budget(lambda: train(words, tmp_path), monkeypatch)


def test_kto_reports_the_same_metrics(words, tmp_path):
    def metrics():
        return kto(words, tmp_path, steps=2).state.log_history[-1]

    theirs = metrics()
    with patch():
        ours = metrics()
    assert {"entropy", "logits/chosen", "logps/chosen", "rewards/margins", "kl"} <= set(ours)
    for name, value in theirs.items():
        if not name.endswith(("_runtime", "_per_second")):
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("train", [grpo, rloo])
def test_online_trainers_run_on_ours(train, words, tmp_path, monkeypatch):
    calls = []
    kernel = adapter.linear_logp_entropy

    def counted(*arguments, temperature, **options):
        calls.append(temperature)
        return kernel(*arguments, temperature=temperature, **options)

    monkeypatch.setattr(adapter, "linear_logp_entropy", counted)
    with patch():
        trainer = train(words, tmp_path)
    assert set(calls) == {0.7}
    assert len(trainer.losses) == 2
    assert all(map(math.isfinite, trainer.losses))
    untrained = dict(build_model().named_parameters())
    assert any(not torch.equal(p, untrained[name]) for name, p in trainer.model.named_parameters())


def test_grpo_scores_at_its_temperature(words, tmp_path):
    """Log-probabilities and entropies of completions belong to the distribution they were sampled from."""
    trainer = grpo(words, tmp_path, steps=0)
    ids = torch.randint(3, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, 8:] = 0, 0
    with patch(), torch.no_grad():
        logp, entropy, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 4, compute_entropy=True)
    with torch.no_grad():
        z = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -5:-1].double() / 0.7
    log_p = z.log_softmax(-1)
    labelled = mask[:, -4:]
    exact = log_p.gather(-1, ids[:, -4:, None])[..., 0] * labelled, -(log_p.exp() * log_p).sum(-1) * labelled
    eps = torch.finfo(torch.float32).eps
    for found, expected in zip((logp, entropy), exact, strict=True):
        # the logits themselves are fp32 in both: a few roundings of the largest
        assert (found - expected).abs().max() <= 8 * eps * z.abs().max()
    assert not torch.allclose(exact[0], (0.7 * z).log_softmax(-1).gather(-1, ids[:, -4:, None])[..., 0] * labelled)


def test_positions_without_a_label_are_not_scored_on_a_cpu(monkeypatch):
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :7] = -100
    labels[1, 10:] = -100

    def score():
        """(what the head returns, the number of positions it scored)."""
        model, function, scored = build_model(), trl.trainer.utils._ChunkedLogProbFunction, []
        trl.trainer.add_fused_lm_head(model, outputs=("log_probs", *OPTIONAL_OUTPUTS))

        class Counting:
            @staticmethod
            def apply(hidden, *arguments):
                scored.append(len(hidden))
                return function.apply(hidden, *arguments)

        with monkeypatch.context() as spied:
            spied.setattr("trl.trainer.utils._ChunkedLogProbFunction", Counting)
            return model(input_ids=ids, labels=labels, fused_lm_head=True), scored

    theirs, scored = score()
    assert scored == [2 * 11]
    with patch():
        ours, scored = score()
    assert scored == [5 + 3]
    for field in ("loss", "log_probs", *OPTIONAL_OUTPUTS):
        torch.testing.assert_close(ours[field], theirs[field], rtol=1e-5, atol=1e-5)


def test_a_batch_without_a_label_gives_a_differentiable_zero():
    model = build_model()
    trl.trainer.add_fused_lm_head(model, outputs=("log_probs", *OPTIONAL_OUTPUTS))
    with patch():
        output = model(
            input_ids=torch.full((2, 5), 7), labels=torch.full((2, 5), -100), num_items_in_batch=3, fused_lm_head=True
        )
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())


def test_other_devices_are_asked_as_before(monkeypatch):
    monkeypatch.setattr("trl.kernels.chunked_logprob._use_triton", lambda device: device.type == "xpu")
    assert adapter._scores_labelled_only(torch.device("cpu"))
    assert adapter._scores_labelled_only(torch.device("xpu"))
    assert not adapter._scores_labelled_only(torch.device("meta"))


# --- LoRA: the reference is the model without its adapter -----------------------------------------------------------


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def test_under_lora_the_reference_is_not_ignored(lora, words, tmp_path):
    """An adapter that is not zero sets policy and reference apart from the first step: rewards cannot be 0."""
    with patch():
        trainer = kto(words, tmp_path, steps=1, peft_config=lora)
    first = trainer.state.log_history[-1]
    assert abs(first["rewards/chosen"]) > 1e-4
    assert abs(first["rewards/rejected"]) > 1e-4
    head = trainer.model.get_base_model().lm_head.weight
    assert head.grad is None
    assert torch.equal(head, build_model().lm_head.weight)


def test_under_lora_kto_reaches_the_same_losses(lora, words, tmp_path, monkeypatch):
    assert_losses_within_budget(lambda: kto(words, tmp_path, steps=6, peft_config=copy.deepcopy(lora)), monkeypatch)
