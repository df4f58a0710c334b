"""Step-KTO with what an OpenRLHF trainer has at hand: per-token log-probs and masks over (B, T), and step labels.

In an OpenRLHF trainer the log-probs come from its actor, on our head after one line:

    from stepkto_fast.integrations.openrlhf import StepKTOLoss, use_linear_logp
    use_linear_logp(actor)
    logp = actor(sequences, action_mask, attention_mask=attention_mask)

OpenRLHF itself needs an NVIDIA GPU (deepspeed, flash-attn). So here the log-probs are made from logits, in the form in
which its actor returns them, and a few steps of training show the loss module.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_fast.integrations.openrlhf import StepKTOLoss

REQUIRES = ("transformers",)

VOCABULARY, PROMPT, STEPS, STEP_LENGTH = 64, 4, 3, 5
ACTIONS = STEPS * STEP_LENGTH


def build_batch(completions: int) -> dict[str, torch.Tensor]:
    """Random completions of three steps. A step of small tokens is right; a completion is right if its last step is."""
    sequences = torch.randint(3, VOCABULARY, (completions, PROMPT + ACTIONS))
    small = torch.rand(completions, STEPS) < 0.5
    steps = sequences[:, PROMPT:].view(completions, STEPS, STEP_LENGTH)
    steps.copy_(torch.where(small[..., None], steps % 30 + 3, steps % 30 + 33))
    step_labels = torch.full((completions, ACTIONS), -100)
    step_labels[:, STEP_LENGTH - 1 :: STEP_LENGTH] = small.long()
    return {"sequences": sequences, "labels": small[:, -1].clone(), "step_labels": step_labels}


def action_log_probs(model: LlamaForCausalLM, sequences: torch.Tensor) -> torch.Tensor:
    log_p = model(sequences).logits[:, :-1].log_softmax(-1)
    return log_p.gather(-1, sequences[:, 1:, None])[..., 0][:, -ACTIONS:]


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    actor = LlamaForCausalLM(config)
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict(actor.state_dict())
    loss_fn = StepKTOLoss(beta=0.3, step_beta=0.5)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=2e-3)
    for step in range(15):
        batch = build_batch(16)
        sequences = batch.pop("sequences")
        with torch.no_grad():
            reference_log_probs = action_log_probs(reference, sequences)
        log_probs = action_log_probs(actor, sequences)
        output = loss_fn(log_probs, reference_log_probs, action_mask=torch.ones_like(log_probs), **batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if step % 7 == 0:
            right = batch["step_labels"][batch["step_labels"] >= 0] == 1
            ratios = output.step_log_ratios
            print(
                f"step {step:2}: loss {output.loss.item():.4f}, mean log-ratio of right steps "
                f"{ratios[right].mean():+.3f}, of wrong ones {ratios[~right].mean():+.3f}"
            )
    try:
        loss_fn(
            log_probs, reference_log_probs, torch.ones_like(log_probs), batch["labels"], batch["step_labels"] * 0 - 100
        )
    except ValueError as error:
        print(f"labels lost on the way: {error}")


if __name__ == "__main__":
    main()
