"""The losses for torchtune and torchtitan: one model trained on each, as their recipe and trainer call them.

torchtune, in the recipe's YAML:

    loss:
      _component_: stepkto_fast.integrations.torchtune.linear_cross_entropy_loss

torchtitan, in a model's config registry:

    loss=stepkto_fast.integrations.torchtitan.loss_config(),

Neither needs to be installed for this: the model below has what the two look at, an output projection and a switch that
makes the model return hidden states.
"""

import torch
from torch import nn

from stepkto_fast.integrations import torchtitan, torchtune

REQUIRES = ()

VOCABULARY, WIDTH = 512, 64


class Model(nn.Module):
    """Predicts each token from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.LayerNorm(WIDTH))
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.skip_output_layer = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(self.tokens(tokens))
        return hidden if self.skip_output_layer else self.output(hidden)


def train(name: str, model: Model, loss_of) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(60):
        tokens = torch.randint(0, VOCABULARY, (16, 32), generator=generator)
        targets = (3 * tokens + 1) % VOCABULARY
        targets[:, :8] = -100  # a prompt
        loss = loss_of(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{name:28}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


def main() -> None:
    plain = Model()
    from_logits = train(
        "logits and F.cross_entropy",
        plain,
        lambda tokens, targets: nn.functional.cross_entropy(plain(tokens).flatten(0, 1), targets.flatten()),
    )

    tuned = Model()
    tune_loss = torchtune.LinearCrossEntropyLoss()
    tune_loss.set_model_output(tuned)
    as_torchtune = train("as torchtune calls it", tuned, lambda tokens, targets: tune_loss(tuned(tokens), targets))

    titan = Model()
    titan.skip_output_layer = True
    titan_loss = torchtitan.LinearCrossEntropyLoss()
    titan_loss.set_lm_head(titan.output)
    as_torchtitan = train(
        "as torchtitan calls it",
        titan,
        lambda tokens, targets: titan_loss(titan(tokens), targets, torch.sum(targets != -100))[0],
    )
    for name, losses in (("torchtune", as_torchtune), ("torchtitan", as_torchtitan)):
        worst = max(abs(a - b) for a, b in zip(losses, from_logits, strict=True))
        print(f"largest difference of the loss in 60 steps, {name}: {worst:.1e}")


if __name__ == "__main__":
    main()
