"""What the fuzzers share: rounds of hypothesis, then of atheris where it is installed, each for its part of the time.

    python tests/soak/fuzz_X.py MINUTES [--seed N]

Every part runs in a process of its own that writes down each input before it is tried, so that a crash or a hang has
a name too. The exit code is 1 when something was found; what was found is printed, minimised where hypothesis did it.
Failures become tests in tests/test_fuzz_corpus.py.
"""

import argparse
import faulthandler
import importlib.util
import os
import random
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = 300  # of a property, before the next one has its turn
HANG_SECONDS = 60.0  # beyond which one input counts as a hang
GRACE_SECONDS = 300.0  # beyond its time that a part may take, to minimise what it found
SHOWN = 10_000  # characters of an input

Properties = Mapping[Callable, Mapping[str, SearchStrategy]]


class Diary:
    """The input that is being tried, in a file that outlives a crash."""

    def __init__(self, path: str | None):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600) if path else None

    def note(self, tried: object) -> None:
        """Writes the input down, and has the process end with a traceback where it takes too long."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, repr(tried)[:SHOWN].encode("utf-8", "backslashreplace"), 0)
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)


diary = Diary(os.environ.get("FUZZ_DIARY"))


def main(file: str, properties: Properties, has_bytes: bool = False) -> int:
    """The command line of the fuzzer `file`. 0 when nothing was found.

    properties: functions, and what hypothesis is to give each of them. has_bytes: whether the file also has
    `one_input(data: bytes)` and `CORPUS`, a list of bytes to start from, for atheris.
    """
    arguments = _arguments(file)
    if os.environ.get("FUZZ_DIARY"):
        return _rounds(properties, 60 * arguments.minutes, arguments.seed)
    parts = [[file]]
    if has_bytes:
        if importlib.util.find_spec("atheris"):
            parts.append([__file__, file])
        else:
            print("atheris is not installed: hypothesis gets all the time (pip install 'stepkto-fast[soak]')")
    codes = [_part(command, arguments.minutes / len(parts), arguments.seed) for command in parts]
    return int(any(codes))


def _arguments(file: str, words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"fuzzes for MINUTES: {Path(file).stem}")
    parser.add_argument("minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1, 2**31))
    return parser.parse_args(words)


def _part(command: list[str], minutes: float, number: int) -> int:
    """One part in a process of its own; 0 when nothing was found."""
    name = f"{Path(command[-1]).stem} ({'atheris' if len(command) > 1 else 'hypothesis'}, seed {number})"
    print(f"{name}: {minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        notes = Path(folder) / "diary"
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"FUZZ_DIARY": str(notes), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, *(str(Path(word).resolve()) for word in command), str(minutes), "--seed", str(number)]
        try:
            code = subprocess.run(
                words, env=environment, cwd=folder, check=False, timeout=60 * minutes + GRACE_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        if code and notes.exists():
            print(f"{name}: the last input was\n{notes.read_text(errors='replace')}")
    print(f"{name}: {'nothing found' if not code else f'ended with code {code}'}", flush=True)
    return code


def _rounds(properties: Properties, seconds: float, number: int) -> int:
    """Each property in turn, with fresh seeds, until the time is over; one that fails is told and not tried again."""
    end = time.monotonic() + seconds
    rng, left, rounds, failed = random.Random(number), list(properties), 0, 0
    while left and time.monotonic() < end:
        for check in list(left):
            drawn = rng.randrange(2**31)
            limits = settings(
                max_examples=EXAMPLES, deadline=None, database=None, derandomize=False, print_blob=True,
                suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
            )  # fmt: skip
            try:
                seed(drawn)(limits(given(**properties[check])(check)))()
            except Exception:
                text = traceback.format_exc()
                print(text if len(text) < 4 * SHOWN else f"{text[: 2 * SHOWN]}\n...\n{text[-2 * SHOWN :]}")
                print(f"FOUND by {check.__name__}, seed {drawn}", flush=True)
                left.remove(check)
                failed += 1
            rounds += 1
            if time.monotonic() > end:
                break
    faulthandler.cancel_dump_traceback_later()
    print(f"{rounds} rounds of up to {EXAMPLES} examples; {failed} properties failed", flush=True)
    return int(failed > 0)


def bytes_main(file: str, words: list[str]) -> None:
    """libFuzzer's loop over the `one_input` of the fuzzer `file`, guided by the engine's branches; ends the process."""
    import atheris

    arguments = _arguments(file, words)
    with atheris.instrument_imports(include=["stepkto_fast"]):
        found = runpy.run_path(file)
    folder = Path("corpus")
    folder.mkdir()
    for n, data in enumerate(found["CORPUS"]):
        (folder / str(n)).write_bytes(data)

    def tried(data: bytes) -> None:
        diary.note(data)
        found["one_input"](data)

    options = [
        f"-max_total_time={60 * arguments.minutes:.0f}", f"-seed={arguments.seed}", "-max_len=4000",
        "-rss_limit_mb=4000", f"-timeout={HANG_SECONDS:.0f}", "-print_final_stats=1", "-verbosity=0",
    ]  # fmt: skip
    atheris.Setup([file, *options, str(folder)], tried)
    atheris.Fuzz()


if __name__ == "__main__":
    bytes_main(sys.argv[1], sys.argv[2:])
