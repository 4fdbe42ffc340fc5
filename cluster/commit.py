"""The write protocol: a folder without a manifest does not exist, and a folder with one is complete.

Files and folders are made under a temporary name beside their final one, flushed to disk, and renamed. Checkpoints and the
store both write through here. Leaves out object stores, which have no rename: there the manifest is written last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_TEMPORARY = re.compile(r".+\.tmp-[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class FileEntry:
    """`FileEntry("weights/model.safetensors", 1234, "9f86...")`: one file of a committed folder."""

    path: str
    """Relative to the folder, with forward slashes."""
    bytes: int
    sha256: str


def temporary_for(path: Path) -> Path:
    """A new name beside `path` that `is_temporary` recognises."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def is_temporary(path: Path) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None


def leftovers(folder: Path) -> list[Path]:
    """The temporary files and folders that interrupted writers left directly in `folder`. No writer may be alive."""
    return sorted(path for path in folder.iterdir() if is_temporary(path)) if folder.is_dir() else []


def remove(path: Path) -> None:
    """Delete a file or folder. A folder disappears at once, never file by file under its own name."""
    if path.is_dir() and not path.is_symlink():
        trash = path if is_temporary(path) else temporary_for(path)
        if trash != path:
            os.rename(path, trash)
            fsync_folder(path.parent)
        shutil.rmtree(trash)
    else:
        path.unlink(missing_ok=True)


def canonical_json(value: Any) -> bytes:
    """The form in which a manifest is written and hashed: sorted keys, UTF-8, no NaN, a newline at the end."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_file(path: Path, data: bytes, *, if_absent: bool = False) -> bool:
    """Write a file atomically. With `if_absent`, leave an existing file unchanged and return False."""
    temporary = temporary_for(path)
    try:
        _write_flushed(temporary, data)
        if if_absent:
            try:
                os.link(temporary, path)
            except FileExistsError:
                # After a lost answer, NFS repeats the request, which then finds the link that it made itself.
                if temporary.stat().st_nlink == 1:
                    return False
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return True


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path) -> list[FileEntry]:
    """Every file below `folder`, sorted by path. Rejects links, devices, and names that a committed folder ignores."""
    entries = []
    for relative, path in _all_files(folder):
        if relative == MANIFEST:
            raise ValueError(f"{path} has the name of the manifest, which is written when the folder is committed; rename the file")
        if is_temporary(path):
            raise ValueError(f"{path} has a name of the form X.tmp-Y, which marks leftovers of interrupted writers; rename the file")
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError(f"{path} is a link or a device, but an artifact holds only regular files; copy the file itself there")
        entries.append(FileEntry(relative, path.stat().st_size, sha256_file(path)))
    return entries


def check(folder: Path, entries: list[FileEntry], *, only: Container[str] | None = None) -> list[str]:
    """How `folder` differs from what was committed, in words; an empty list if it is intact.

    `only` names the files whose bytes are read; missing and extra files are found in any case.
    """
    present = dict(_files(folder))
    problems = []
    for entry in entries:
        path = present.pop(entry.path, None)
        if path is None:
            problems.append(f"{entry.path} is missing")
        elif not stat.S_ISREG(path.lstat().st_mode):
            problems.append(f"{entry.path} is a link or a device, not a file")
        elif (size := path.stat().st_size) != entry.bytes:
            problems.append(f"{entry.path} has {size:,} bytes, expected {entry.bytes:,}")
        elif (only is None or entry.path in only) and (found := sha256_file(path)) != entry.sha256:
            problems.append(f"{entry.path} has sha256 {found[:12]}, expected {entry.sha256[:12]}")
    problems += [f"{extra} is not in the manifest" for extra in present]
    return problems


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a committed folder; None if there is none, ValueError if it can't be read."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is not JSON ({error}); it was damaged after it was written") from error
    if not isinstance(manifest, dict):
        raise ValueError(
            f"expected a JSON object in {folder / MANIFEST}, found a {type(manifest).__name__}; it was damaged after it was written"
        )
    return manifest


def commit_folder(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Turn `temporary` into `final` atomically; if `final` is already committed, only remove `temporary`."""
    if (final / MANIFEST).exists():
        remove(temporary)
        return
    if final.exists():
        remove(final)
    for _, path in _files(temporary):
        fsync_file(path)
    for parent, _, _ in os.walk(temporary):
        fsync_folder(Path(parent))
    _write_flushed(temporary / MANIFEST, canonical_json(manifest))
    fsync_folder(temporary)
    try:
        os.rename(temporary, final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not (final / MANIFEST).exists():
            raise
        remove(temporary)
    fsync_folder(final.parent)


def fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut: a rename is durable only once its folder is flushed."""
    fsync_file(folder)


def _write_flushed(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for relative, path in _all_files(folder):
        if relative != MANIFEST and not is_temporary(path):  # leftovers of interrupted writers don't count
            yield relative, path


def _all_files(folder: Path) -> Iterator[tuple[str, Path]]:
    found = []
    for parent, folders, names in os.walk(folder):
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        found += [Path(parent, name) for name in [*names, *linked]]
    for path in sorted(found, key=lambda path: path.relative_to(folder).as_posix()):
        yield path.relative_to(folder).as_posix(), path
