"""The supervised start that makes M_0: next-token training on demonstrations, packed, through the same head kernel."""

import random
from collections.abc import Callable

import torch
from stepkto_kernels import linear_logp
from transformers import PreTrainedModel, get_scheduler

from .packing import pack
from .policy import head, hidden_states
from .rollout import Rollout
from .task import Demonstrations, Task


def examples(task: Task, shown: Demonstrations) -> list[Rollout]:
    """One solution of each problem as a rollout of one step, ending with the end-of-sequence token."""
    tokenizer, found = shown.tokenizer, []
    for n, (problem, text) in enumerate(shown.pairs):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        prompt, prompt_ids = task.prompt(problem, tokenizer)
        found.append(Rollout(n, 0, prompt, prompt_ids, text, ids, [], True, [text], [len(ids)]))
    return found


def fine_tune(
    model: PreTrainedModel,
    shown: list[Rollout],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: str,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains `model` in place on `shown`, `steps` AdamW steps with linear decay; `on_step(step, loss in nats)`."""
    rng = random.Random(f"fine_tune {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=max(1, steps // 20), num_training_steps=steps)
    model.train()
    for step in range(steps):
        batch = pack(rng.sample(shown, min(batch_size, len(shown)))).to(model.device)
        loss = -linear_logp(hidden_states(model, batch), target=batch.target, **head(model)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step + 1, float(loss.detach()))
    model.eval()
