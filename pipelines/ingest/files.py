"""Names and globs as the files that they stand for."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".7z", ".rar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def expand(patterns: Iterable[str], data: Path, *, follow_links: bool = False) -> list[str]:
    """The files' names in reading order; ValueError names what is missing, what can't be read, and the nearest names.

    Unless `follow_links`, a link that leads out of the data folder is refused: a data set that somebody else packed could otherwise
    read any file of this machine. A pattern that is absolute, or that climbs by "..", names its own folder instead.
    """
    names: dict[str, str] = {}  # by the file itself: one that has several names is read once, by its first
    faults = []
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        found = {name for name in _matches(pattern, data) if (data / name).is_file()}
        if not found:
            faults.append(_nothing_found(data, pattern))
        inside = _boundary(pattern, data)
        for name in sorted(found, key=natural_order):
            real = os.path.realpath(data / name)
            if names.setdefault(real, name) != name:
                continue
            if not follow_links and not Path(real).is_relative_to(inside):
                faults.append(
                    f"{name}: a link that leads out of {inside}, to {real}; set follow_links = true if it may be read, or name that file"
                )
            elif fault := _unreadable(data / name):
                faults.append(f"{name}: {fault}")
    if faults:
        raise ValueError("; ".join(faults))
    return list(names.values())


def _boundary(pattern: str, data: Path) -> str:
    """The folder that a pattern's files must be in: the data folder, or the one that an absolute or climbing pattern names."""
    literal = glob.escape(pattern) == pattern
    named = os.path.normpath(data / (pattern if literal else re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]))
    root = os.path.normpath(data)
    return os.path.realpath(root if Path(named).is_relative_to(root) else named)


def _matches(pattern: str, root: Path) -> Iterator[str]:
    """As `glob` has it, but `**` enters a folder once: there are 2^40 paths through two links to their own folder."""
    stars = re.search(r"(?:^|(?<=/))\*\*(?:/+|$)", pattern)
    if stars is None:
        yield from glob.iglob(pattern, root_dir=root)
        return
    before, after = pattern[: stars.start()], pattern[stars.end() :] or "*"
    for top in glob.iglob(before, root_dir=root) if before else [""]:
        for folder in _folders(root / top):
            for name in _matches(after, root / top / folder):
                yield os.path.join(top, folder, name)


def _folders(root: Path) -> Iterator[str]:
    """`root` and each folder below it that isn't hidden, relative to `root`, each once; under a link's name only if it has no other."""
    entered = set()
    tops = [""]
    for top in tops:  # grows by the links, which therefore come after everything that can be reached without them
        for path, below, _ in os.walk(root / top):
            if (itself := os.path.realpath(path)) in entered:
                below.clear()
                continue
            entered.add(itself)
            below[:] = sorted(name for name in below if not name.startswith("."))
            folder = os.path.relpath(path, root)
            yield folder if folder != "." else ""
            tops += [os.path.join(folder, name) for name in below if os.path.islink(os.path.join(path, name))]


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _nothing_found(data: Path, pattern: str) -> str:
    if not data.is_dir() and not os.path.isabs(pattern):
        return f"files: the data folder {data} doesn't exist; set `data` to the folder that has {pattern!r}"
    folder = data / pattern
    if os.path.islink(folder) and not folder.exists():
        return f"files: {pattern!r} is a link to {os.readlink(folder)}, which doesn't exist"
    if folder.is_file():
        return f"files: {pattern!r} is a pattern, because of its brackets or stars; {glob.escape(pattern)!r} is the file of that very name"
    if folder.exists() and not folder.is_dir():
        return f"files: {pattern!r} is no regular file; copy what it gives into one"
    if folder.is_dir():
        return f"files: {pattern!r} is a folder, expected files, for instance {pattern.rstrip('/') + '/*'!r}"
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    nearest = difflib.get_close_matches(Path(pattern).name, there, n=3, cutoff=0.3) or there[:3]
    return f"files: nothing matches {pattern!r} in {data}; {folder} has {', '.join(nearest) or 'no files'}"


def _unreadable(path: Path) -> str | None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8, and no record could hold it; rename it"
    if path.name.lower().endswith(ARCHIVES):
        return "an archive of files, which isn't read; unpack it first (zip archives are read)"
    if not os.access(path, os.R_OK):
        return "no permission to read it; check its mode and owner"
    return None
