"""Rows of any data set: JSONL, JSON, CSV and parquet files, folders of them, saved `datasets`, names on the hub.

Every row comes with the place it was read from. A bad row is a complaint and the next ones go on; only a source that
is not there, or cannot be read as a whole, is an error. What stands in a row is data: nothing of it is run.
"""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import RunError

Row = tuple[str, dict[str, Any] | None, str | None]

BATCH = 1000  # rows of a table that are Python objects at one time
SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?:ing|uation)?(?![a-z])")
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "state.json"}  # of `datasets`, beside the data
LFS_POINTER = b"version https://git-lfs"


class RowError(ValueError):
    """A row that cannot be used. The message names the column, and the remedy; the reader adds the row's place."""


def read_rows(source: str, *, split: str | None = None, config: str | None = None) -> Iterator[Row]:
    """The rows of `source`, one at a time: (where, row, complaint), of which exactly one of the last two is None.

    source: a file (.jsonl, .jsonl.gz, .json, .csv, .parquet); a folder of such files, or one that
    `Dataset.save_to_disk` wrote; else a name that `datasets.load_dataset` takes (as a folder with `config` does).
    split: of a folder or a name with several splits; a file has none. config: the configuration ("subset") on the hub.

    where: "file:line" of JSONL and CSV, from 1 (a quoted CSV field may span lines: the row's last one);
    "file:row" or "name[split]:row" of others, from 0 as their libraries index. The complaint does not repeat it.

    Raises:
        RunError: there is no such source, or split; or the source cannot be read, or not to its end.
    """
    path = local_path(source)
    if path.is_file():
        if split or config:
            raise RunError(f"{source} is one file and has no splits or configurations: leave {split or config!r} out")
        return _file_rows(path)
    if path.is_dir() and config is None:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _dataset_rows(source, split, partial(_saved, path, split))
        files = _data_files(path, split)
        return (row for file in files for row in _file_rows(file))
    if not path.exists() and (source.startswith((".", "/", "~")) or _suffix(path) in READERS):
        raise RunError(f"{source} does not exist: give a file, a folder, or the name of a data set on the hub")
    name = str(path) if path.is_dir() else source
    return _dataset_rows(source, split, partial(_datasets().load_dataset, name, config, split=split))


def local_path(source: str) -> Path:
    """`source` as a path, whether or not something is there; RunError where the system does not say."""
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be read, ~nobody
        raise RunError(f"{source[:200]!r} cannot be looked up: {error.args[-1]}; give another path or name") from error
    return path


def text_column(row: dict[str, Any], column: str, within: str = "") -> str:
    """The text in `column`; RowError where there is no such column, or something else in it, or nothing.

    within: what to put before the column's name in messages, for a row that is itself a column ("question.").
    """
    if column not in row:
        raise RowError(f"column '{within}{column}' is missing: there are {column_names(row)}")
    value = row[column]
    if not isinstance(value, str):
        raise RowError(f"column '{within}{column}' is {shown(value)}: give a text")
    if not value.strip():
        raise RowError(f"column '{within}{column}' is empty: give a text")
    return value


def shown(value: Any, width: int = 60) -> str:
    """A value and its type for a message, cut to `width` characters."""
    text = repr(value if not isinstance(value, str) else value[:width])  # the repr of a long text is long
    return f"{type(value).__name__} {text if len(text) <= width else text[:width] + '...'}"


def column_names(columns: Iterable[Any], most: int = 20, width: int = 40) -> str:
    """Names of columns for a message, in their order: `most` of them, each cut to `width` characters.

    What a terminal would not show but do (escape sequences, changes of direction) is spelt out.
    """
    found = sorted(str(column) for column in columns)
    cut = [name if len(name) <= width else name[:width] + "..." for name in found[:most]]
    cut = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in name) for name in cut]
    more = [f"and {len(found) - most} more"] if len(found) > most else []
    return ", ".join(cut + more) or "none"


def _datasets() -> Any:
    import datasets  # takes a second to import: only where it is needed

    return datasets


def _suffix(path: Path) -> str:
    return "".join(path.suffixes[-2:]).lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _data_files(folder: Path, split: str | None) -> list[Path]:
    """The folder's data files in order of name; of `split`, where their names or folders tell splits apart."""
    files = sorted(p for p in folder.rglob("*") if _suffix(p) in READERS and p.name not in DESCRIPTIONS)
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not files:
        raise RunError(f"{folder} holds no data file ({', '.join(READERS)}): give another folder, or a file")
    of_split: dict[str, list[Path]] = {}
    for file in files:
        found = SPLIT.findall(str(file.relative_to(folder)).lower())
        of_split.setdefault(found[-1] if found else "", []).append(file)
    if split is None and len(of_split) > 1:
        known = ", ".join(sorted(name for name in of_split if name) or [f.name for f in files])
        raise RunError(f"{folder} holds several splits ({known}): name one as the split, or give one file")
    if split is None or split in of_split:
        return files if split is None else of_split[split]
    word = re.compile(rf"(?<![a-z]){re.escape(split.lower())}(?![a-z])")
    chosen = [file for file in files if word.search(str(file.relative_to(folder)).lower())]
    if not chosen:
        raise RunError(f"{folder} holds no file of the split {split!r}: {', '.join(f.name for f in files[:10])}")
    return chosen


def _file_rows(path: Path) -> Iterator[Row]:
    if _suffix(path) not in READERS:
        raise RunError(f"{path} has an ending that is not known: name it {', '.join(READERS)} for what it holds")
    return _readable(path)


def _readable(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise RunError(f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in its repository")
        yield from READERS[_suffix(path)](path)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise RunError(
            f"{path} cannot be read, or not to its end: {error}. It may be cut off or damaged: fetch it again"
        ) from error


def _json_lines(path: Path) -> Iterator[Row]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield (f"{path}:{number}", *_parsed(line))


def _parsed(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8: {error.reason} at byte {error.start + 1} of the line; save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"is not JSON: {error}; give one object a line"
    return _checked(row, b"NaN" in line or b"Infinity" in line or b"\\ud" in line.lower())


def _checked(row: Any, suspicious: bool) -> tuple[dict[str, Any] | None, str | None]:
    """The row, where it is an object of what JSON has; `suspicious`: its text may hold more than that."""
    if not isinstance(row, dict):
        return None, f"is not an object but {shown(row)}: give columns and their values"
    for column, value in row.items() if suspicious else ():
        try:
            json.dumps([column, value], allow_nan=False, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return None, f"column {shown(column)} holds half of a surrogate pair, which is no text: mend the escape"
        except ValueError:
            return None, f"column {column!r} holds NaN or Infinity, which JSON does not have: give null or a number"
    return row, None


def _json_file(path: Path) -> Iterator[Row]:
    """A list of objects; or an object a line, as many files of this name on the hub are."""
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start != b"[":
        yield from _json_lines(path)
        return
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # invalid UTF-8 is a ValueError as well
        raise RunError(f"{path} is not JSON: {error}; mend it, or give an object a line as .jsonl") from error
    items.reverse()
    for number in range(len(items)):
        yield (f"{path}:{number}", *_checked(items.pop(), True))


def _csv_file(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KB is for fields, not solutions
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield f"{path}:{reader.line_num}", None, f"is not CSV: {error}"
                continue
            if row is None:
                return
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                given = sum(v is not None for k, v in row.items() if k is not None) + len(row.get(None) or [])
                expected = len(reader.fieldnames or [])
                yield where, None, f"has {given} fields, the header {expected}: quote the fields that hold commas"
            elif bad := [k for k, v in row.items() if any("\ud800" <= c <= "\udfff" for c in k + v)]:
                yield where, None, f"column {bad[0]!r} is not UTF-8: save the file as UTF-8"
            else:
                yield where, row, None


def _parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        yield from _table_rows(str(path), file.iter_batches(batch_size=BATCH))


def _saved(folder: Path, split: str | None) -> Any:
    """The `Dataset` or `DatasetDict` in a folder that `save_to_disk` wrote, or the split of it."""
    found = _datasets().load_from_disk(str(folder))
    splits = list(found) if isinstance(found, dict) else [str(found.split)] if found.split else []
    if split is not None and split not in splits:
        raise RunError(f"{folder} has no split {split!r}, but {', '.join(splits) or 'none'}: name one that it has")
    return found[split] if split is not None and isinstance(found, dict) else found


def _dataset_rows(source: str, split: str | None, load: Callable[[], Any]) -> Iterator[Row]:
    """The rows of what `load()` gives: a `Dataset`, or a `DatasetDict` with one split."""
    from datasets.exceptions import DatasetsError

    try:
        found = load()
        if isinstance(found, dict):
            if len(found) != 1:
                raise RunError(f"{source} has the splits {', '.join(found)}: name one")
            found = next(iter(found.values()))
        name = f"{source}[{split or found.split}]" if split or found.split else source
        yield from _table_rows(name, found.with_format("arrow").iter(BATCH))
    except (OSError, ValueError, RuntimeError, EOFError, DatasetsError, pa.ArrowException) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"{source} cannot be loaded: {type(error).__name__}: {error}. Check the name, the split and the "
            "configuration, and that the hub is in reach or the data in its cache"
        ) from error


def _table_rows(name: str, batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in range(batch.num_rows):
            one = batch.slice(row, 1)
            try:
                yield f"{name}:{number}", one.to_pylist()[0], None
            except UnicodeDecodeError:
                yield f"{name}:{number}", None, f"column {_not_utf8(one)!r} is not UTF-8: write it again as UTF-8"
            number += 1


def _not_utf8(row: Any) -> str:
    """Which column of a table with one row does not decode."""
    for column in row.schema.names:
        try:
            row.column(column).to_pylist()
        except UnicodeDecodeError:
            return column
    return "?"


READERS = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_file,
    ".csv": _csv_file,
    ".parquet": _parquet,
}
