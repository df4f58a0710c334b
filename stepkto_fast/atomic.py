"""Files and folders written whole or not at all, and found out where the disk damaged them later.

What is written goes under another name beside its target, is forced to the disk, and takes the target's place by a
rename, which is forced to the disk as well: after a crash or a power cut the target is the old or the new one, never
half of either. A folder carries a manifest of its files' lengths and checksums.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED, REPLACED, DAMAGED = ".unfinished-", ".replaced-", ".damaged-"
MANIFEST = "manifest.json"
CHUNK = 1 << 22  # bytes that are checksummed together


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; once the block ends well, what was written takes the place of `path`.

    Where it does not end well, what was written is deleted: a full disk gets its space back. What the disk refuses is
    an OSError that names `path`.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        with naming(path):
            yield unfinished
            sync(unfinished)
            os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As `replacing`, for a folder, which is empty when the block begins."""
    try:
        with naming(path):
            unfinished = begin_folder(path)
            yield unfinished
            finish_folder(unfinished, path)
    except BaseException:
        shutil.rmtree(path.with_name(UNFINISHED + path.name), ignore_errors=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes errors of the disk name `path`: writes know no name, and libraries in Rust raise errors of their own."""
    try:
        yield
    except OSError as error:
        if error.filename is None or UNFINISHED in str(error.filename):
            error.filename, error.filename2 = str(path), None
        raise
    except Exception as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def begin_folder(path: Path) -> Path:
    """The empty folder in which what will be `path` is gathered."""
    unfinished = path.with_name(UNFINISHED + path.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def finish_folder(unfinished: Path, path: Path) -> None:
    """Forces `unfinished` to the disk and renames it to `path`.

    A folder that is there already stays until the new one is whole; `recover` puts it back where the process ended
    between the two renames.
    """
    for place in unfinished.rglob("*"):
        sync(place)
    sync(unfinished)
    replaced = path.with_name(REPLACED + path.name)
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(path, replaced)
    try:
        os.replace(unfinished, path)
    except OSError:
        if replaced.exists():
            os.replace(replaced, path)
        raise
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Deletes a folder that may be killed half-way: under a name at which nobody takes it for whole."""
    gone = path.with_name(UNFINISHED + path.name)
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def recover(folder: Path) -> None:
    """Ends in `folder` what a killed process left: replaced folders go back or away, unfinished work is deleted."""
    for replaced in folder.glob(f"{REPLACED}*"):
        target = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if target.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, target)
    for leftover in folder.glob(f"{UNFINISHED}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def set_aside(path: Path) -> Path:
    """Renames a damaged file or folder to a free name beside it, which is returned; nothing is deleted."""
    number, aside = 1, path.with_name(DAMAGED + path.name)
    while aside.exists():
        number += 1
        aside = path.with_name(f"{DAMAGED}{number}-{path.name}")
    os.replace(path, aside)
    return aside


def hold(folder: Path) -> bool:
    """Holds a folder until this process ends, however it ends; False when another process holds it."""
    # A lock of the process, not of the open file: no child inherits it, and holding the folder twice is no conflict.
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        # Any other error: a file system without locks, where nobody is known to hold it.
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def sync(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems do not sync folders: they keep names by themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


# ---- manifests ----


def fingerprint(path: Path) -> dict[str, int]:
    """A file's length in bytes and its CRC-32."""
    total, crc = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            total, crc = total + len(chunk), zlib.crc32(chunk, crc)
    return {"bytes": total, "crc32": crc}


def write_manifest(folder: Path, needs: Iterable[Path] = (), **facts: int) -> None:
    """Writes manifest.json: `fingerprint` of each file of `folder` and of the files outside that it `needs`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    content = {
        **facts,
        "files": {p.relative_to(folder).as_posix(): fingerprint(p) for p in files},
        "needs": {os.path.relpath(p, folder): fingerprint(p) for p in needs},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict | None:
    """What `write_manifest` wrote; None where there is none. ValueError where it is damaged."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    parts = [content.get(key) for key in ("files", "needs")] if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) and all(_is_fingerprint(x) for x in part.values()) for part in parts):
        raise ValueError(f"{MANIFEST} is not a manifest")
    return content


def _is_fingerprint(found: object) -> bool:
    return isinstance(found, dict) and set(found) == {"bytes", "crc32"}


def damage(folder: Path, part: str = "files") -> list[tuple[Path, str]]:
    """What is no longer as the manifest says, among its `files` or its `needs`: (path, what is wrong with it).

    Nothing for a folder without a manifest, which an older version wrote.
    """
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return [(folder / MANIFEST, f"it cannot be read: {error}")] if part == "files" else []
    found = []
    for name, expected in (manifest or {part: {}})[part].items():
        path = Path(os.path.normpath(folder / name))
        try:
            actual = fingerprint(path)
        except OSError as error:
            found.append((path, "it is missing" if error.errno == errno.ENOENT else f"it cannot be read: {error}"))
            continue
        if actual["bytes"] != expected["bytes"]:
            found.append((path, f"it has {actual['bytes']} bytes, not {expected['bytes']}"))
        elif actual != expected:
            found.append((path, "its checksum is another one"))
    return found
