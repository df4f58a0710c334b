"""Step-KTO for users of TRL: rows with labels of steps and of outcomes go in, a trained policy comes out.

The rows are worked sums, some of whose steps multiply where they should add. A script that uses KTOTrainer needs the
import, the two names, and the columns "completions" (the steps) and "labels" (right, wrong, or None: nobody knows).
"""

import copy
import os
import random
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback

from stepkto_fast.integrations.trl_trainer import StepKTOConfig, StepKTOTrainer
from stepkto_fast.policy import build_policy, build_tokenizer

REQUIRES = ("trl",)
STEPS = 30


def worked_sum(rng: random.Random) -> dict:
    """a + b + c in two steps; a wrong step multiplies, and makes the answer wrong. One label in four is missing."""
    a, b, c = (rng.randrange(1, 5) for _ in range(3))
    right = [rng.random() < 0.6, rng.random() < 0.6]
    first = a + b if right[0] else a * b
    second = first + c if right[1] else first * c
    steps = [f" Step 1: {a} {'+' if right[0] else '*'} {b} = {first}"]
    steps += [f"Step 2: {first} {'+' if right[1] else '*'} {c} = {second}"]
    return {
        "prompt": f"{a} + {b} + {c} = ?\n",
        "completions": steps,
        "labels": [None if rng.random() < 0.25 else label for label in right],
        "label": second == a + b + c,
    }


def main() -> None:
    disable_progress_bars()
    rng = random.Random(0)
    rows = [worked_sum(rng) for _ in range(480)]
    tokenizer = build_tokenizer([row["prompt"] + "\n".join(row["completions"]) for row in rows])
    model = build_policy(tokenizer, hidden_size=64, layers=2, heads=2, max_length=64, seed=0)

    folder = tempfile.TemporaryDirectory()
    trainer = StepKTOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=StepKTOConfig(
            output_dir=folder.name, beta=0.1, step_beta=0.3, learning_rate=2e-3, max_steps=STEPS,
            per_device_train_batch_size=8, gradient_accumulation_steps=2, class_weights="balanced",
            eval_strategy="steps", eval_steps=5, eval_on_start=True, save_strategy="no",
            use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows[:400]),
        eval_dataset=Dataset.from_list(rows[400:]),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    print("on held-out rows:")
    print("step  outcome loss  step loss  log-ratio of right minus wrong steps (nats)")
    for log in trainer.state.log_history:
        if "eval_loss" in log:
            gap = log["eval_step_rewards/margins"] / trainer.args.step_beta
            print(f"{log['step']:4d}  {log['eval_outcome_loss']:12.3f}  {log['eval_step_loss']:9.3f}  {gap:9.2f}")


if __name__ == "__main__":
    main()
