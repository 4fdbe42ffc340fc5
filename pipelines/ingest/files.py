"""Names and globs as the files that they stand for."""

from __future__ import annotations

import difflib
import glob
import os
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path

ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def expand(patterns: Iterable[str], data: Path) -> list[str]:
    """The files' names in reading order; ValueError names what is missing, what can't be read, and the nearest names."""
    names: dict[str, str] = {}  # by the file itself: one that has several names is read once, by its first
    faults = []
    for pattern in patterns:
        found = {name for name in _matches(pattern, data) if (data / name).is_file()}
        if not found:
            faults.append(_nothing_found(data, pattern))
        for name in sorted(found, key=_natural_order):
            if names.setdefault(os.path.realpath(data / name), name) == name and (fault := _unreadable(data / name)):
                faults.append(f"{name}: {fault}")
    if faults:
        raise ValueError("; ".join(faults))
    return list(names.values())


def template_columns(template: str) -> list[str]:
    """The columns that a template such as "{title}: {text}" names; ValueError where its braces don't match."""
    return [
        name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, name, spec, conversion in string.Formatter().parse(template)
        if name is not None
    ]


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
    """`root` and each folder below that isn't hidden, relative to it: by its own name, or by a link's where it has no other there."""
    entered = set()
    tops = [""]
    for top in tops:  # grows by the links, which so come after all that can be reached without them
        for path, below, _ in os.walk(root / top):
            if (itself := os.path.realpath(path)) in entered:
                below.clear()
                continue
            entered.add(itself)
            below[:] = sorted(name for name in below if not name.startswith("."))
            folder = os.path.relpath(path, root)
            yield folder if folder != "." else ""
            tops += [os.path.join(folder, name) for name in below if os.path.islink(os.path.join(path, name))]


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _nothing_found(data: Path, pattern: str) -> str:
    if not data.is_dir() and not os.path.isabs(pattern):
        return f"files: the data folder {data} doesn't exist; set `data` to the folder that has {pattern!r}"
    folder = data / pattern
    if folder.is_dir():
        return f"files: {pattern!r} is a folder; want files, for instance {pattern.rstrip('/') + '/*'!r}"
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
    name = path.name.lower()
    if name.endswith(ARCHIVES):
        return "an archive of files; unpack it first"
    if name.endswith(".zst"):
        return "zstd isn't read; recompress it, for instance with `zstd -dc FILE.zst | xz > FILE.xz`"
    if not os.access(path, os.R_OK):
        return "no permission to read it; check its mode and owner"
    return None
