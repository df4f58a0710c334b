"""The study's page, its figures and the README's section, from the result files.

    python -m stepkto_fast.study.page [results folder] [docs folder]

Every number is computed from the results, and every word that judges follows from an interval. What has not been run
yet is said to be missing, and comparisons that need it are left out.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..atomic import replacing
from ..command import run_command
from ..errors import RunError
from .findings import COMMAND, FAMILY, IMAGES, Page, answer, compare, sentence
from .pictures import pictures
from .plan import FAMILIES, Family, is_current
from .results import INITIAL, counting, load, sampled
from .sections import SECTIONS
from .statistics import RESAMPLES, Study
from .words import capital, counted, listed, paragraph

SAMPLES = 8  # a problem: what Maj@8 and Pass@8 are of


def page_text(study: Study, images: Mapping[str, str], family: Family = FAMILY) -> str:
    """docs/study.md; `images` names those figures that exist."""
    page = Page(study, family, images)
    lines = [
        f"<!-- Generated: change nothing here, but run {COMMAND}.page -->",
        "",
        "# Study: does stepwise feedback win?",
        "",
        *(line for section in SECTIONS for line in section(page)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def readme_block(
    study: Study,
    image: str | None = "docs/images/study-main.png",
    link: str = "docs/study.md",
    family: Family = FAMILY,
) -> str:
    """The main figure and what it says. `image` and `link`: the figure, if there is one, and the page, seen from the
    README."""
    page = Page(study, family, {})
    said = [
        "Does feedback on steps (`step_kto`) win over feedback on answers alone (`kto`), on a synthetic arithmetic "
        f"task with a small model? **{answer(page, 'step_kto', 'kto')}**",
        "With the step labels of a PRM head in place of an exact checker (`step_kto_prm`)? "
        f"{answer(page, 'step_kto_prm', 'kto')}",
    ]
    if both := compare(page, "step_kto", "step_only"):
        said.append(f"And the step loss alone (`step_only`)? {capital(sentence(both, 'step_kto', 'step_only'))}.")
    kinds = {"main": "of arms", "ablations": "of ablations", "search": "of the search for settings"}
    runs = {stage: [r for r in study.records if r["stage"] == stage] for stage in kinds}
    counts = []
    for stage, of in runs.items():
        if of:
            failed = sum("failed" in r for r in of)
            counts.append(f"{counted(len(of), 'run')} {kinds[stage]}" + (f", {failed} failed," if failed else ""))
    problems = sorted({len(r["greedy"][0]["right"]) for r in runs["main"] if r["greedy"]})
    if problems:
        said.append(
            f"{listed(counts)}, on {listed(f'{n:,}' for n in problems)} test problems, with intervals and advice: "
            f"[study]({link})."
        )
    else:
        said.append(f"No arm has run yet: [study]({link}).")
    return "\n".join([*([f"![{IMAGES['main']}]({image})", ""] if image else []), *paragraph(" ".join(said))[:-1]])


def section(text: str, inner: str, path: Path) -> str:
    """The text with what stands between the study's two markers replaced; without any markers as it is."""
    start, end = "<!-- study: start -->", "<!-- study: end -->"
    if start not in text and end not in text:
        return text
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise RunError(f"{path}: write {start} and {end} once each, in this order")
    before, rest = text.split(start)
    return before + "\n".join([start, inner, end]) + rest.split(end)[1]


def texts(study: Study, docs: Path, image_folder: Path, family: Family = FAMILY) -> dict[Path, str]:
    """study.md in `docs`, and the README beside `docs` where it has the study's markers, as they should be."""
    files = {name: image_folder / f"study-{name}.png" for name in pictures(study, family)}
    path, readme = docs / "study.md", docs.parent / "README.md"
    found = {path: page_text(study, {name: _relative(file, docs) for name, file in files.items()}, family)}
    if readme.is_file():
        before = readme.read_text(encoding="utf-8")
        image = _relative(files["main"], readme.parent) if "main" in files else None
        inner = readme_block(study, image, _relative(path, readme.parent), family)
        after = section(before, inner, readme)
        if after != before:
            found[readme] = after
    return found


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def write_page(
    results: Path, docs: Path, image_folder: Path, resamples: int = RESAMPLES, family: Family | None = None,
    every: bool = False,
) -> Path:  # fmt: skip
    """Writes docs/study.md, its figures and the README's section, and returns the page's path. Without a `family` the
    results' difficulties tell it. Results of settings that the family has no more are left out, unless `every` is set.

    Images called study-*.png that are not of these results are deleted from `image_folder`.

    Raises RunError for a folder without results, a damaged result file, or a README with one marker only.
    """
    if not results.is_dir():
        raise RunError(f"{results} holds no result of the study: run {COMMAND} first, or name another folder")
    records = counting(load(results))[0]
    if family is None:
        family = _family(records)
    records = [
        r for r in records if (r["seed"] in family.seeds if r["stage"] == INITIAL else every or is_current(family, r))
    ]
    for record in records:
        for samples in sampled(record).values():
            if samples["k"] != SAMPLES:
                raise RunError(f"{record['file']} has {samples['k']} samples a problem: the page is of {SAMPLES}")
    study = Study(records, resamples)
    written = texts(study, docs, image_folder, family)
    drawn = {image_folder / f"study-{name}.png": draw() for name, draw in pictures(study, family).items()}
    for folder in (docs, image_folder):
        folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(image_folder.glob("study-*.png")):
        if old not in drawn:
            old.unlink()
    for path, content in {**drawn, **{path: text.encode() for path, text in written.items()}}.items():
        with replacing(path) as unfinished:
            unfinished.write_bytes(content)
    return docs / "study.md"


def _family(records: Sequence[dict]) -> Family:
    """The first family that has a difficulty of the results."""
    found = {r["difficulty"] for r in records}
    return next((f for f in FAMILIES.values() if found & set(f.difficulties)), FAMILY)


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    if len(arguments) > 2 or any(x.startswith("-") for x in arguments):
        sys.stderr.write(f"usage: {COMMAND}.page [results folder] [docs folder]\n")
        return 2
    results = Path(arguments[0]) if arguments else Path("docs/study/results")
    docs = Path(arguments[1]) if len(arguments) > 1 else Path("docs")

    def draw() -> None:
        sys.stdout.write(f"{write_page(results, docs, docs / 'images')}\n")

    return run_command(draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
