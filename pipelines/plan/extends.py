"""Read a pipeline file and the files that it extends, as one document that knows where each setting was written.

`extends = "base.toml"` names one file, relative to the one that has it; that file may extend another. Tables are merged key by key,
anything else (a list too) is replaced, and `stages.NAME = false` drops a stage of the base. What a relative path means does not change:
`data` is relative to the file that wrote it (to the first file of the chain if none did), and so are a stage's `./file.py:function`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.plan.faults import TOO_DEEP, ConfigError, Fault, Origin, did_you_mean, shown
from pipelines.plan.toml_lines import Path as KeyPath
from pipelines.plan.toml_lines import lines_of

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes in a command line or a file's name that are not UTF-8."""
TOML_LINE = re.compile(r" \(at line (\d+), column (\d+)\)$")
LFS_POINTER = "version https://git-lfs.github.com/spec/"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
REMEDIES = {
    "Cannot overwrite a value": "this key is set a second time, keep one of the two",
    "Cannot declare": "this table is begun a second time, keep one of the two",
    "Invalid value": 'expected "text" in quotes, a number, true, false, a list or a table',
    "Expected newline": "expected one setting on a line, and text in quotes",
    "Expected '='": "expected NAME = VALUE",
    "Invalid statement": "expected NAME = VALUE, [a table's header] or # a comment",
}
"""What to do, by how a message of `tomllib` begins."""
HTML = ("<!doctype html", "<html")


@dataclass
class Merged:
    """A pipeline file's document, with what it extends underneath."""

    base: Path
    """The first file of the chain, which extends nothing."""
    values: dict[str, Any]
    faults: list[Fault] = field(default_factory=list)
    _origins: dict[KeyPath, Origin] = field(default_factory=dict)
    dropped: dict[str, Origin] = field(default_factory=dict)
    """Stage to where it is dropped."""

    def drop(self, stage: str, origin: Origin | None) -> None:
        """Forget a stage's lines, which are no longer in `values`."""
        self.replace(("stages", stage), {})
        if origin is not None:
            self.dropped[stage] = origin

    def replace(self, path: KeyPath, origins: dict[KeyPath, Origin]) -> None:
        """Forget where `path` and what is below it were written; take these origins instead."""
        self._origins = {each: origin for each, origin in self._origins.items() if each[: len(path)] != path}
        self._origins |= origins

    def add(self, origins: dict[KeyPath, Origin]) -> None:
        self._origins |= origins

    def origins(self) -> dict[str, Origin]:
        """Origins by dotted name. Two keys may have one dotted name, since a quoted key may hold a dot: neither is listed."""
        names = [".".join(map(str, path)) for path in self._origins]
        count = Counter(names)
        return {name: origin for name, origin in zip(names, self._origins.values(), strict=True) if count[name] == 1}


def read_merged(path: Path) -> Merged:
    """The document of a pipeline file and those that it extends; ConfigError if one of them can't be read."""
    chain = _chain(path)
    base, values, origins = chain[-1]
    merged = Merged(base, values, [], origins)
    for file, above, found in reversed(chain[:-1]):
        _merge(merged, merged.values, above, (), found, file.name)
    merged.values.pop("extends", None)
    return merged


def _chain(path: Path) -> list[tuple[Path, dict[str, Any], dict[KeyPath, Origin]]]:
    """The file, the file that it extends, and so on."""
    chain: list[tuple[Path, dict[str, Any], dict[KeyPath, Origin]]] = []
    names: list[str] = []
    file, name, extending = path, path.name, None
    while True:
        values, lines = _read(file, path, extending)
        chain.append((file, values, {each: Origin(file.resolve(), name, line) for each, line in lines.items()}))
        names.append(name)
        if "extends" not in values:
            return chain
        extends = values["extends"]
        extending = Origin(file.resolve(), name, lines.get(("extends",)))
        if not isinstance(extends, str) or not extends:
            raise ConfigError(path, [Fault("extends", f"expected the name of a pipeline file, found {shown(extends)}", extending)])
        file = file.parent / Path(extends).expanduser()
        name = os.path.relpath(file, path.parent)
        if file.resolve() in [known.resolve() for known, _, _ in chain]:
            cycle = " extends ".join([*names, name])
            raise ConfigError(path, [Fault("extends", f"{cycle}: a cycle; one of these files must extend nothing", extending)])


def _read(file: Path, path: Path, extending: Origin | None) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """A file's document and the lines of its keys. `path` is the pipeline file, `extending` where it or another names this one."""
    where, subject = ("file", "") if extending is None else ("extends", f"{file} ")
    if HALF_CHARACTER.search(real := os.path.realpath(file)):
        raise ConfigError(path, [Fault(where, f"its path {real!r} is not UTF-8 and can't be recorded; rename it", extending)])
    if file.exists() and not file.is_file():
        expected = "expected a pipeline file such as configs/quickstart.toml"
        raise ConfigError(path, [Fault(where, f"{subject}is not a regular file; {expected}", extending)])
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        beside = [each.name for each in file.parent.glob("*.toml") if each.is_file()] if file.parent.is_dir() else []
        missing = f"there is no file {file}" if extending else "there is no such file"
        near = f"; it is a link to {os.readlink(file)}, which does not exist" if file.is_symlink() else did_you_mean(file.name, beside)
        raise ConfigError(path, [Fault(where, f"{missing}{near}", extending)]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(path, [_not_utf8(error, Origin(file.resolve(), os.path.relpath(file, path.parent)))]) from None
    except OSError as error:
        raise ConfigError(path, [Fault(where, f"{subject}can't be read: {error.strerror}; make it readable", extending)]) from None
    if text.startswith(LFS_POINTER):
        raise ConfigError(path, [Fault(where, f"{subject}is a Git LFS pointer, not the file itself; run `git lfs pull`", extending)])
    if text.lstrip()[:20].lower().startswith(HTML):
        raise ConfigError(path, [Fault(where, f"{subject}is an HTML page, not TOML; download the file itself", extending)])
    try:
        return tomllib.loads(text), lines_of(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, [_not_toml(error, text, Origin(file.resolve(), os.path.relpath(file, path.parent)))]) from None


def _not_utf8(error: UnicodeDecodeError, origin: Origin) -> Fault:
    line = error.object[: error.start].count(b"\n") + 1
    found = "UTF-16" if error.object.startswith(UTF16) else f"the byte 0x{error.object[error.start]:02x}"
    return Fault("file", f"expected UTF-8, found {found}; save the file as UTF-8", replace(origin, line=line))


def _not_toml(error: Exception, text: str, origin: Origin) -> Fault:
    """What `tomllib` found, with what to do about it."""
    if isinstance(error, RecursionError):
        return Fault("file", TOO_DEEP, origin)
    message, column = str(error), ""
    if found := TOML_LINE.search(message):
        message, column, origin = message[: found.start()], f" (column {found[2]})", replace(origin, line=int(found[1]))
    remedy = next((f"; {each}" for words, each in REMEDIES.items() if message.startswith(words)), "")
    if "\r" in text and "\n" not in text:
        remedy = "; its lines end with CR only, save it with LF or CR LF"
    return Fault("TOML", f"can't be parsed: {message}{column}{remedy}", origin)


def _merge(merged: Merged, below: dict[str, Any], above: dict[str, Any], path: KeyPath, origins: dict[KeyPath, Origin], file: str) -> None:
    """Put the table `above`, which stands at `path` of `file`, over the table `below`."""
    for name, value in above.items():
        here = (*path, name)
        inside = {each: origin for each, origin in origins.items() if each[: len(here)] == here}
        if path == ("stages",) and value is False:
            if name not in below:
                hint = did_you_mean(name, below) or f"; there are {', '.join(below)}"
                merged.faults.append(
                    Fault(f"stages.{name}", f"there is no such stage to drop in what {file} extends{hint}", origins.get(here))
                )
            below.pop(name, None)
            merged.drop(name, origins.get(here))
        elif isinstance(value, dict) and isinstance(below.get(name), dict):
            if here in origins:
                merged.add({here: origins[here]})
            _merge(merged, below[name], value, here, inside, file)
        else:
            below[name] = value
            merged.replace(here, inside)
