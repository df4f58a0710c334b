"""The page of all settings, from their dataclasses: `python -m stepkto_fast.settings_page > docs/settings.md`."""

import sys
from dataclasses import Field, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .eval import EvalSettings
from .eval_prm import PRMEvaluation
from .hardware import Rates
from .recipe import Recipe
from .study.__main__ import StudySettings
from .train_prm import PRMTraining

HEADER = ["| key | values | default | what it is |", "|---|---|---|---|"]
INTRODUCTION = """# Settings

Every key of every command, with its default. A YAML file holds them as `key: value`, the command line as `--key value`;
the command line wins. An unknown key is refused, with the one that was meant. This page is generated: `make docs`.
"""


@dataclass(frozen=True)
class Command:
    """A command and its settings. `sections`: first key of each section -> its title, in the dataclass's order.

    Settings that are inherited stand under the command they belong to; `note` says so.
    """

    title: str
    usage: str
    settings: type
    sections: dict[str, str]
    note: str = ""

    def fields(self) -> list[Field]:
        return [f for f in fields(self.settings) if f.name in self.settings.__annotations__]


COMMANDS = (
    Command(
        "The training loop", "python -m stepkto_fast.train [recipe.yaml] [--key value ...]", Recipe,
        {
            "name": "The run", "task": "Problems", "model": "Policy", "engine": "Rollouts",
            "step_style": "Steps and their labels", "prm": "PRM head", "objective": "Objective", "lora_rank": "Update",
            "save_steps": "Records",
        },
    ),
    Command(
        "Fitting a PRM head", "python -m stepkto_fast.train_prm [file.yaml] [--key value ...]", PRMTraining,
        {"model": "Model and data", "calibration_share": "Parts of the data", "prm_pooling": "Head and fit"},
    ),
    Command(
        "Evaluating a PRM head", "python -m stepkto_fast.eval_prm [file.yaml] [--key value ...]", PRMEvaluation, {}
    ),
    Command(
        "Evaluating a model", "python -m stepkto_fast.eval [file.yaml] --model DIR [--key value ...]", EvalSettings, {},
        "All keys of the training loop, of which it looks at those of problems, model, sampling and steps; and",
    ),
    Command("The study", "python -m stepkto_fast.study [file.yaml] [--key value ...]", StudySettings, {}),
    Command(
        "The planner", "python -m stepkto_fast.train [recipe.yaml] --plan [--key value ...]", Rates,
        {
            "gpu": "The device", "gpus": "Several GPUs", "utilisation": "Rates",
            "max_sequences": "What a run looks like",
            "kept_pairs": "The LM head's filter", "disk_gb": "Disk and reserves",
        },
    ),
)  # fmt: skip


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([INTRODUCTION, *(part for command in COMMANDS for part in _command(command))])


def _command(command: Command) -> list[str]:
    types = get_type_hints(command.settings)
    parts = [f"## {command.title}\n", f"    {command.usage}\n", *([f"{command.note}\n"] if command.note else [])]
    rows: list[str] = []
    for f in command.fields():
        if f.name in command.sections or not rows:
            parts += [*rows, ""] if rows else []
            title = command.sections.get(f.name)
            rows = ([f"### {title}\n"] if title else []) + [
                "| key | values | default | what it is |",
                "|---|---|---|---|",
            ]
        rows.append(f"| `{f.name}` | {_values(types[f.name])} | {_default(f)} | {_cell(f.metadata['help'])} |")
    return [*parts, *rows, ""]


def _values(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    options = [option for option in get_args(kind) if option is not type(None)]
    if options:
        return " or ".join(_values(option) for option in options)
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return names[kind]


def _default(f: Field) -> str:
    if f.default is None:
        return "none"
    if f.default == "":
        return "empty"
    shown = str(f.default).lower() if isinstance(f.default, bool) else str(f.default)
    return f"`{shown.encode('unicode_escape').decode()}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
