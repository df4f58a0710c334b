"""Step-KTO in a plain PyTorch loop: twenty steps of a tiny Llama, with `stepkto_kernels` and nothing else of ours."""

import torch
from stepkto_kernels import linear_logp, linear_step_kto
from transformers import LlamaConfig, LlamaForCausalLM

REQUIRES = ("transformers",)

VOCABULARY, PROMPT, STEP_LENGTH, STEPS = 64, 4, 5, 3
COMPLETIONS, COMPLETION = 16, STEPS * STEP_LENGTH


def build_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids (B, L), small (B, STEPS) bool): random completions, whose steps are of small tokens or of large."""
    input_ids = torch.randint(3, VOCABULARY, (COMPLETIONS, PROMPT + COMPLETION))
    small = torch.rand(COMPLETIONS, STEPS) < 0.5
    steps = input_ids[:, PROMPT:].view(COMPLETIONS, STEPS, STEP_LENGTH)
    steps.copy_(torch.where(small[..., None], steps % 30 + 3, steps % 30 + 33))
    return input_ids, small


def states(model: LlamaForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """(N, D): the hidden states that predict the completions' tokens, one completion behind the other."""
    return model.model(input_ids).last_hidden_state[:, PROMPT - 1 : -1].flatten(0, 1)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    # boundaries of completions and of steps over the N tokens
    cu_seqlens = torch.arange(0, COMPLETIONS * COMPLETION + 1, COMPLETION, dtype=torch.int32)
    cu_steps = torch.arange(0, COMPLETIONS * COMPLETION + 1, STEP_LENGTH, dtype=torch.int32)
    for n in range(20):
        input_ids, small = build_batch()
        target = input_ids[:, PROMPT:].flatten()
        with torch.no_grad():
            ref_logp = linear_logp(states(reference, input_ids), reference.lm_head.weight, target)
        output = linear_step_kto(
            states(policy, input_ids), policy.lm_head.weight, target, ref_logp, cu_seqlens, cu_steps,
            labels=small[:, -1], step_labels=small.flatten().to(torch.int8), beta=0.3, step_beta=0.5,
        )  # fmt: skip
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if n % 19 == 0:
            right = small.flatten()
            print(
                f"step {n:2}: loss {output.loss.item():.4f} (outcome {output.outcome_loss:.4f}, steps "
                f"{output.step_loss:.4f}), mean log-ratio of right steps {output.step_log_ratios[right].mean():+.3f}, "
                f"of wrong ones {output.step_log_ratios[~right].mean():+.3f}"
            )


if __name__ == "__main__":
    main()
