"""patch_lm_head on a Llama of transformers: the loss it had, log-probabilities besides, and no logits."""

import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_fast import patch_lm_head, unpatch_lm_head

REQUIRES = ("transformers",)

VOCABULARY, ROWS, TOKENS, PROMPT = 32_000, 4, 256, 128


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2 * TOKENS, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step(model: LlamaForCausalLM, batch: dict) -> tuple[float, torch.Tensor, float]:
    """(loss, the embedding's gradient, seconds) of a forward and a backward, the second of two."""
    for _ in range(2):
        model.zero_grad()
        began = time.perf_counter()
        output = model(**batch)
        output.loss.backward()
    return output.loss.item(), model.get_input_embeddings().weight.grad.clone(), time.perf_counter() - began


def main() -> None:
    model = build_model()
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS))
    labels = ids.clone()
    labels[:, :PROMPT] = -100  # prompts are not scored
    batch = {"input_ids": ids, "labels": labels}
    before = peak_mib()

    patch_lm_head(model)  # the one line to add; it verifies what it will compute, and refuses what it does not know

    loss, gradient, seconds = step(model, batch)
    patched_mib = peak_mib() - before
    with torch.no_grad():
        output = model(**batch, output_entropy=True)
    print(f"log_probs {tuple(output.log_probs.shape)}, entropy {tuple(output.entropy.shape)}, logits {output.logits}")
    scored = output.log_probs[:, PROMPT - 1 :]
    print(f"mean log-probability of the completions: {scored.mean():.4f} nats")
    print(f"generate as before: {model.generate(ids[:1, :8], max_new_tokens=4, do_sample=False)[0, 8:].tolist()}")

    unpatch_lm_head(model)  # for the comparison
    own_loss, own_gradient, own_seconds = step(model, batch)
    own_mib = peak_mib() - before
    print(f"loss {loss:.6f} patched, {own_loss:.6f} of the model's own forward")
    difference = (gradient - own_gradient).abs().max() / own_gradient.abs().max()
    print(f"largest difference of the embedding's gradients: {difference:.1e} of the largest of them")
    print(f"forward and backward: {seconds:.2f} s patched, {own_seconds:.2f} s not")
    print(f"memory they added: {patched_mib:.0f} MiB patched, {own_mib:.0f} MiB not")


if __name__ == "__main__":
    main()
