"""LLaMA-Factory's KTO log-probs on our head, beside those from logits: the same sums, without the logits.

In a script in the place of `llamafactory-cli train`:

    from llamafactory.train.tuner import run_exp
    from stepkto_fast.integrations.llamafactory import patch

    patch()
    run_exp()

LLaMA-Factory wants other versions of transformers and trl than our lock has. So this calls the forward that `patch()`
puts into its `CustomKTOTrainer`, as the trainer calls it.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_fast.integrations import llamafactory

REQUIRES = ("transformers",)

BATCH, LENGTH, PROMPT = 8, 96, 40


def from_logits(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the trainer computes by itself: sums of log-probs from logits at every position."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    labels = batch["labels"][:, 1:]
    logp = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logp * (labels != -100)).sum(1)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16_000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    input_ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH))
    labels = input_ids.clone()
    labels[:, :PROMPT] = -100
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}
    logps = from_logits(model, batch)
    (grad,) = torch.autograd.grad(logps.mean(), model.lm_head.weight)
    _, our_logps, our_means = llamafactory.forward(None, model, batch)
    (our_grad,) = torch.autograd.grad(our_logps.mean(), model.lm_head.weight)
    megabytes = 4 * BATCH * LENGTH * config.vocab_size / 2**20
    print(f"logits not made: {megabytes:.0f} MiB in fp32, and as much again for each copy of them")
    print(f"sums of log-probs: mean {our_logps.mean():.3f}, from logits {logps.mean():.3f}")
    print(f"                   largest difference {(our_logps - logps).abs().max():.1e}")
    print(f"per token:         mean {our_means.mean():.4f} nats")
    worst = (our_grad - grad).abs().max() / grad.abs().max()
    print(f"gradient of the head: largest difference {worst:.1e} of its largest entry")


if __name__ == "__main__":
    main()
