"""A full disk at every moment at which data are forced to it, and random damage to files of a run that was cut.

    python tests/soak/faults.py [DAMAGES] [--seed N]

After each fault the run is resumed and held against an undisturbed one. The exit code is 1 when one differs.
"""

import argparse
import contextlib
import errno
import io
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_faults import flip, halve, interrupted, result, resume, run

KINDS = {"half of it gone": halve, "one bit flipped": flip, "deleted": Path.unlink}
FILES = ["checkpoints/iteration_1/*", "checkpoints/iteration_1_step_1/*", "rollouts/iteration_1.parquet"]


def quietly(action, *arguments):
    """(exit code, what went to the terminal); a traceback is an exit code of its own."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = action(*arguments)
        except Exception as error:
            return 70, f"{said.getvalue()}\n{error!r}"
    return code, said.getvalue()


def disk_full_at(folder, nth):
    """The exit code of a resume whose nth fsync finds the disk full, and whether it came so far."""
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        return *quietly(resume, folder), len(calls) >= nth


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("damages", nargs="?", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(argv)
    console, rng = Console(highlight=False), random.Random(settings.seed)
    injected, survived, lost = Counter(), Counter(), []

    def judge(kind, folder, code, said):
        injected[kind] += 1
        if code == 0 and result(folder) == undisturbed:
            survived[kind] += 1
        else:
            lost.append(f"{kind}: exit code {code}, {said[-500:]}")

    with tempfile.TemporaryDirectory() as top:
        whole, cut, folder = (Path(top) / name for name in ("whole", "cut", "run"))
        code, said = quietly(run, whole)
        if code:
            console.print(said, markup=False)
            return 1
        undisturbed = result(whole)
        with pytest.MonkeyPatch.context() as patch:
            quietly(interrupted, patch, cut, 5)
        nth, more = 1, True
        while more:
            shutil.copytree(cut, folder)
            code, said, more = disk_full_at(folder, nth)
            if more:
                if code != 1 or "No space left on device" not in said or list(folder.rglob(".unfinished-*")):
                    lost.append(f"full disk at fsync {nth}: exit code {code}, {said[-500:]}")
                judge("full disk", folder, *quietly(resume, folder))
            shutil.rmtree(folder)
            nth += 1
        for _ in range(settings.damages):
            shutil.copytree(cut, folder)
            places = sorted(p for pattern in FILES for p in folder.glob(pattern) if p.is_file())
            # Without its manifest a checkpoint is taken as it is: an older version's has none.
            kind, path = rng.choice(list(KINDS)), rng.choice([p for p in places if p.name != "manifest.json"])
            KINDS[kind](path)
            judge(f"{path.parent.name.split('_step')[0]}: {kind}", folder, *quietly(resume, folder))
            shutil.rmtree(folder)
    table = Table("fault", "injected", "survived")
    for kind, times in sorted(injected.items()):
        table.add_row(kind, str(times), str(survived[kind]))
    console.print(table)
    for text in lost:
        console.print(text, markup=False)
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
