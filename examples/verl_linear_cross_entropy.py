"""verl's fused forward on our kernel: log-probs and entropies of a tiny Llama without logits, beside those from logits.

With verl installed this is verl's own forward for `use_fused_kernels: True`, `impl_backend: triton`, after

    from stepkto_fast.integrations.verl import patch
    patch()

Without it, the same call is made here with the model's hidden states.
"""

import importlib.util

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_fast.integrations.verl import linear_cross_entropy, patch

REQUIRES = ("transformers",)

TEMPERATURE = 1.5


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5001, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def fused(model: LlamaForCausalLM, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs, entropies), each (T,), by verl's forward where verl is installed."""
    if importlib.util.find_spec("verl") is None:
        hidden = model.model(input_ids).last_hidden_state
        labels = input_ids.roll(-1, -1)
        return linear_cross_entropy(hidden, model.lm_head.weight, labels, TEMPERATURE, "none")
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    patch()
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="triton")
    output = model(input_ids=input_ids, temperature=TEMPERATURE, return_dict=True)
    return output.log_probs, output.entropy


def main() -> None:
    model = build_model()
    input_ids = torch.randint(0, model.config.vocab_size, (1, 300))
    log_p = (model(input_ids).logits / TEMPERATURE).log_softmax(-1)[0]
    expected = log_p.gather(-1, input_ids.roll(-1, -1)[0, :, None])[:, 0]
    expected_entropy = -(log_p.exp() * log_p).sum(-1)
    log_probs, entropy = fused(model, input_ids)
    (-log_probs.mean() - 0.01 * entropy.mean()).backward()
    print(f"log-probs:  mean {log_probs.mean():.4f}, largest {log_probs.max():.4f}")
    print(f"            largest difference from logits {(log_probs - expected).abs().max():.1e}")
    print(f"entropies:  mean {entropy.mean():.4f} nats")
    print(f"            largest difference from logits {(entropy - expected_entropy).abs().max():.1e}")
    print(
        f"gradient of the head: {tuple(model.lm_head.weight.grad.shape)}, norm {model.lm_head.weight.grad.norm():.4f}"
    )


if __name__ == "__main__":
    main()
