"""Liger's fused KTO loss and ours in its place: the same loss, class weights, and log-probabilities kept in fp32."""

import torch
from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss as LigersKTOLoss

# The line to change: this was `from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss`.
from stepkto_fast.integrations.liger import LigerFusedLinearKTOLoss

REQUIRES = ("liger-kernel",)

COMPLETIONS, TOKENS, HIDDEN, VOCABULARY = 8, 96, 64, 8000


def build_batch(dtype: torch.dtype) -> dict:
    """Hidden states and heads of a policy and of a reference near it; half of the positions are prompt or padding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(COMPLETIONS, TOKENS, HIDDEN), normal(VOCABULARY, HIDDEN) / 2
    target = torch.randint(VOCABULARY, (COMPLETIONS, TOKENS), generator=generator)
    target[:, : TOKENS // 4] = -100
    target[:, -TOKENS // 4 :] = -100
    return {
        "_input": hidden.to(dtype).requires_grad_(),
        "lin_weight": weight.to(dtype).requires_grad_(),
        "target": target,
        "preference_labels": torch.arange(COMPLETIONS) % 4 == 0,
        "ref_input": (hidden + normal(*hidden.shape) / 50).to(dtype),
        "ref_weight": (weight + normal(*weight.shape) / 100).to(dtype),
        "kl": torch.tensor(0.5),
    }


def main() -> None:
    ours = LigerFusedLinearKTOLoss(beta=0.1, use_ref_model=True)
    theirs = LigersKTOLoss(beta=0.1, use_ref_model=True, compiled=False)

    batch = build_batch(torch.float32)
    loss, (chosen_logps, rejected_logps, *_) = ours(**batch)
    loss.backward()
    print(f"fp32: loss {loss:.7f} of ours, {theirs(**batch)[0]:.7f} of Liger's")
    print(f"sums of log-probabilities: {chosen_logps:.2f} of chosen, {rejected_logps:.2f} of rejected completions")

    batch = build_batch(torch.bfloat16)
    exact = ours(**{k: x.detach().double() if x.is_floating_point() else x for k, x in batch.items()})
    for name, function in (("ours", ours), ("Liger's", theirs)):
        loss, metrics = function(**batch)
        print(f"bf16, {name}: off by {abs(loss - exact[0]):.1e} in the loss, {abs(metrics[0] - exact[1][0]):.1e} nats")

    balanced = LigerFusedLinearKTOLoss(beta=0.1, use_ref_model=True, desirable_weight=3.0, undesirable_weight=1.0)
    print(f"desirable_weight 3, which Liger's class does not have: {balanced(**build_batch(torch.float32))[0]:.7f}")


if __name__ == "__main__":
    main()
