"""Dataclasses of settings, and how command line and YAML file set them."""

import argparse
import difflib
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from .errors import RunError

Settings = TypeVar("Settings", bound=Any)
LARGEST = 2.0**63  # no setting means anything beyond it, and integers of 64 bits end there


def setting(default: Any, help: str) -> Any:
    """A field of such a dataclass. `help` is what `--help` and docs/settings.md say of it."""
    return field(default=default, metadata={"help": help})


def parse_settings(kind: type[Settings], argv: list[str], module: str) -> Settings:
    """The dataclass `kind` from `[file.yaml] [--key value ...]`, the command line over the file over the defaults.

    Raises RunError naming the file and key of anything unknown; prints usage and exits for `--help`. `module` is what
    `python -m` was given.
    """
    known = [f.name for f in fields(kind)]
    file_arguments: list[str] = []
    if argv and not argv[0].startswith("-"):
        file_arguments, argv = _read_yaml(Path(argv[0]), known), argv[1:]
    for word in argv:
        key = word[2:].split("=")[0].replace("-", "_")
        if word.startswith("--") and key not in {*known, *(f"no_{name}" for name in known), "help"}:
            raise RunError(f"unknown option --{key}{_suggestion(key, known)}")
    usage = "%(prog)s [file.yaml] [--key value ...]"
    parser = HfArgumentParser(kind, prog=f"python -m {module}", usage=usage, exit_on_error=False)
    try:
        (settings,) = parser.parse_args_into_dataclasses([*file_arguments, *argv], look_for_args_file=False)
    except (argparse.ArgumentError, ValueError) as error:
        raise RunError(f"{error}") from error
    for key in known:
        value = getattr(settings, key)
        if isinstance(value, int | float) and not abs(value) < LARGEST:
            raise RunError(f"{key} is {str(value)[:40]}: give a number below {LARGEST:g}")
    return settings


def _read_yaml(path: Path, known: list[str]) -> list[str]:
    """The settings of a recipe file as command-line words, so that both go through one parser."""
    try:
        if not path.is_file():
            raise RunError(f"recipe file {str(path)[:500]!r} does not exist")
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of the 99th month is a ValueError
        raise RunError(f"recipe file {path} is not YAML: {error}") from error
    except OSError as error:
        raise RunError(f"recipe file {str(path)[:500]!r} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise RunError(f"recipe file {path} holds a {type(content).__name__}: write one 'key: value' a line")
    words: list[str] = []
    for key, value in content.items():
        if key not in known:
            raise RunError(f"{path}: unknown key {key!r}{_suggestion(str(key), known)}")
        if isinstance(value, (dict, list)):
            raise RunError(f"{path}: key {key!r} holds a {type(value).__name__}, expected one value")
        if value is not None:
            words += [f"--{key}", str(value)]
    return words


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; --help lists the keys"
