"""The store: artifacts by digest, actions by key, leases, runs. What is shared is written through five calls to a backend.

    artifacts/<digest>/<file>, manifest.json      what was made          (the manifest comes last: without it nothing exists)
    actions/<key>/<number>.json                   how it was made        (the newest is reused, the older ones stay for lineage)
    latest/<pipeline>/<stage>.json                which action a stage used last: what `plan` compares with
    aliases/<name>/<alias>.json                   what model:<name>@<alias> means: the newest model of a pipeline
    leases/<name>/<generation>.json               who works on a key or drives a run
    runs/<run>/...                                frozen config, journal, page
    work/<key>/..., tmp/...                       checkpoints of unfinished training, folders of unfinished artifacts: plain files

Nothing here orders by clocks: numbers are given out by `put_if_absent`. Not through the backend go `work/` and `tmp/`, the files of an
artifact when they are read, the names of the runs (to list all below `runs/` would be to walk through every journal), and what belongs to
one machine: MLflow's database, locks and logs, the config of a submitted run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pydantic import ConfigDict, Field

from cluster.commit import FileEntry, canonical_json, check, describe, fsync_folder, sha256_file, write_file
from gpt.settings import Settings
from pipelines.artifacts import KINDS, Artifact
from pipelines.stage import StageFailure

SCHEMA = 1
RECORD = re.compile(r"/(\d{6})\.json$")
RACY_S = 2.0
FORGOTTEN_S = 7 * 24 * 3600.0
"""After so long without a write a folder in `tmp/` is nobody's, whoever made it."""


class Backend(Protocol):
    """Where the store's objects lie. Names are relative POSIX paths; every call is atomic for its one object."""

    def get(self, name: str) -> bytes | None: ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """False, and nothing is written, if there is such an object already."""
        ...

    def put(self, name: str, data: bytes | Path) -> None:
        """Write or replace; a Path is a file that the backend may move in."""
        ...

    def list(self, prefix: str) -> list[str]:
        """All names below the folder `prefix`, sorted."""
        ...

    def delete(self, name: str) -> None: ...


class FolderBackend:
    """A folder on a local or shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return write_file(self._made(name), data, if_absent=True)

    def put(self, name: str, data: bytes | Path) -> None:
        path = self._made(name)
        if isinstance(data, bytes):
            write_file(path, data)
            return
        with open(data, "rb") as file:
            os.fsync(file.fileno())
        os.replace(data, path)
        fsync_folder(path.parent)

    def list(self, prefix: str) -> list[str]:
        def failed(error: OSError) -> None:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise error  # left alone, os.walk would show what it can't read as empty

        top = self.root / prefix
        names = []
        for folder, _, files in os.walk(top, onerror=failed):
            names += [os.path.relpath(os.path.join(folder, file), self.root) for file in files if ".tmp-" not in file]
        return sorted(names)

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def _made(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Action(Settings):
    """One making of an artifact: what went in, what came out, who, where, how. Lineage is the graph of these.

    Older and newer versions of gptline read each other's: a field that one does not know is passed over.
    """

    model_config = ConfigDict(
        extra="ignore",
        ser_json_inf_nan="constants",  # a loss that is no number is recorded as it was
        serialize_by_alias=True,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=True,
    )

    schema_number: int = Field(default=SCHEMA, alias="schema")  # pydantic has a method of that name
    """Goes up when a field's meaning changes."""
    key: str
    number: int = 0
    """Given by the store: 1 for the key's first making, one more for each rerun."""
    pipeline: str
    stage: str
    kind: str
    """Name of the function that ran: `pretrain`, or `python_docs.py:documents`."""
    run: str
    leaves: dict[str, Any]
    """What the key is made of: `config.lr`, `input.tokens.0`, `code.gpt.model:GPT`, `source.books/a.jsonl`."""
    inputs: dict[str, list[str]]
    """Parameter name to the digests it was given."""
    output: str
    output_kind: str
    figures: dict[str, float] = Field(default_factory=dict)
    curves: dict[str, list[tuple[int, float, int]]] = Field(default_factory=dict)
    """Metric name to (step, value, time in ms since 1970)."""
    operational: dict[str, Any] = Field(default_factory=dict)
    """Settings outside the key with which it was made: ranks, micro_batch_size, zero_stage."""
    versions: dict[str, str] = Field(default_factory=dict)
    restarts: int = 0
    resumed_from_step: int | None = None
    forced: bool = False
    started_ms: int
    seconds: float
    host: str
    user: str
    pid: int


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.backend: Backend = FolderBackend(self.root)

    # ---- artifacts ----

    def new_folder(self) -> Path:
        """An empty folder of the store's own, to write an artifact in."""
        folder = self.root / "tmp" / f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        folder.mkdir(parents=True)
        return folder

    def publish(self, folder: Path, kind: str, metadata: dict[str, Any]) -> Artifact:
        """Move a folder's files in and freeze them under their digest.

        The same bytes published twice are one artifact; one that was damaged meanwhile is whole again.
        """
        try:
            files = describe(folder)
        except ValueError as error:
            raise StageFailure(str(error)) from error
        manifest = {
            "schema": SCHEMA,
            "kind": kind,
            "files": [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in files],
            "metadata": metadata,
        }
        data = canonical_json(manifest)
        digest = hashlib.sha256(data).hexdigest()
        name = f"artifacts/{digest}"
        if self.intact(digest) is not None:
            for file in files:
                self.backend.put(f"{name}/{file.path}", folder / file.path)
            self.backend.put(f"{name}/manifest.json", data)
        shutil.rmtree(folder, ignore_errors=True)
        return self.artifact(digest)

    def manifest(self, digest: str) -> dict[str, Any] | None:
        data = self.backend.get(f"artifacts/{digest}/manifest.json")
        try:
            manifest = None if data is None else json.loads(data)
        except ValueError:
            return None
        return manifest if isinstance(manifest, dict) and "files" in manifest else None  # a damaged one is none

    def artifact(self, digest: str, kind: type[Artifact] | None = None) -> Artifact:
        """As an instance of `kind`, which a signature names and which may be a user's own; else of the class that ours has for it."""
        manifest = self.manifest(digest)
        if manifest is None:
            raise StageFailure(f"artifact sha256:{digest[:12]} is not in the store {self.root}: it was deleted, or is another store's")
        chosen = kind or KINDS.get(manifest["kind"], Artifact)
        return chosen(self.root / "artifacts" / digest, digest, manifest["metadata"])

    def kind_of(self, digest: str) -> str:
        """ValueError where there is no such artifact."""
        manifest = self.manifest(digest)
        if manifest is None:
            raise ValueError(f"artifact sha256:{digest[:12]} is not in the store {self.root}")
        return str(manifest["kind"])

    def intact(self, digest: str) -> str | None:
        """Why an artifact can't be reused (a file is gone or has another size), or None. Sizes only: cheap enough for every plan."""
        manifest = self.manifest(digest)
        if manifest is None:
            return f"its artifact {digest[:12]} is gone"
        for file in manifest["files"]:
            path = self.root / "artifacts" / digest / file["path"]
            found = path.stat().st_size if path.is_file() else None
            if found != file["bytes"]:
                what = "is gone" if found is None else f"has {found:,} bytes instead of {file['bytes']:,}"
                return f"its artifact {digest[:12]} is damaged: {file['path']} {what}"
        return None

    def verify(self, digest: str) -> list[str]:
        """Problems found when every byte is read again."""
        manifest = self.manifest(digest)
        if manifest is None:
            return [f"artifact {digest[:12]} has no manifest"]
        return check(self.root / "artifacts" / digest, [FileEntry(**file) for file in manifest["files"]])

    def digests(self) -> list[str]:
        return [name.split("/")[1] for name in self.backend.list("artifacts") if name.count("/") == 2 and name.endswith("/manifest.json")]

    # ---- actions ----

    def action_numbers(self, key: str) -> list[int]:
        names = [RECORD.search(name) for name in self.backend.list(f"actions/{key}")]
        return sorted(int(name[1]) for name in names if name)

    def actions(self, key: str) -> list[Action]:
        """Oldest first, those whose record can be read."""
        found = []
        for number in self.action_numbers(key):
            with contextlib.suppress(ValueError):
                found.append(self.action(key, number))
        return found

    def action(self, key: str, number: int) -> Action:
        data = self.backend.get(f"actions/{key}/{number:06d}.json")
        if data is None:
            raise KeyError(f"no action {number} of key {key}")
        return Action.model_validate_json(data)

    def all_actions(self) -> Iterator[Action]:
        for name in self.backend.list("actions"):
            data = self.backend.get(name) if RECORD.search(name) else None
            if data is not None:
                with contextlib.suppress(ValueError):  # a damaged record speaks of nothing
                    yield Action.model_validate_json(data)

    def record(self, action: Action) -> Action:
        """Write an action down under the next free number of its key."""
        number = max(self.action_numbers(action.key), default=0)
        while True:
            number += 1
            numbered = action.model_copy(update={"number": number})
            if self.backend.put_if_absent(f"actions/{action.key}/{number:06d}.json", numbered.model_dump_json().encode()):
                return numbered

    def note_latest(self, pipeline: str, stage: str, key: str, number: int) -> None:
        self.backend.put(f"latest/{pipeline}/{stage}.json", canonical_json({"key": key, "number": number}))

    def latest(self, pipeline: str, stage: str) -> Action | None:
        """The action that this pipeline's stage used last."""
        data = self.backend.get(f"latest/{pipeline}/{stage}.json")
        if data is None:
            return None
        try:
            pointer = json.loads(data)
            return self.action(pointer["key"], pointer["number"])
        except (KeyError, ValueError, TypeError):
            return None

    def point(self, name: str, alias: str, digest: str) -> None:
        """Let `model:<name>@<alias>` mean this artifact from now on."""
        self.backend.put(f"aliases/{name}/{alias}.json", canonical_json({"digest": digest}))

    def pointed(self, name: str, alias: str) -> str | None:
        data = self.backend.get(f"aliases/{name}/{alias}.json")
        return None if data is None else str(json.loads(data)["digest"])

    # ---- runs and the rest ----

    def runs(self) -> list[str]:
        """Ids, oldest first: they begin with the second, and their last part with its 256th."""
        top = self.root / "runs"
        names = [entry.name for entry in top.iterdir() if entry.is_dir()] if top.is_dir() else []
        return sorted(names, key=lambda name: (name[: len("20261122-192002")], name.rpartition("-")[2], name))

    def work(self, key: str) -> Path:
        """Where the checkpoints of a key's unfinished attempts lie."""
        return self.root / "work" / key

    def sweep(self) -> None:
        """Remove what killed processes of this machine left half-written, and what another's, which can't be looked up, left long ago."""
        for folder in (self.root / "tmp").glob("*-*-*"):
            machine, pid, _ = folder.name.rsplit("-", 2)
            abandoned = born(int(pid)) is None if machine == _machine() else time.time() - _written_s(folder) > FORGOTTEN_S
            if abandoned:
                shutil.rmtree(folder, ignore_errors=True)

    def content_sha256(self, paths: list[Path]) -> list[str]:
        """Digests of outside files; a file whose size, times and inode are as they were is not read again."""
        cache_name = "cache/content.json"
        known = json.loads(self.backend.get(cache_name) or b"{}")
        digests, changed = [], False
        for path in paths:
            stat = path.stat()
            stamp = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
            entry = known.get(str(path))
            if entry is None or entry[0] != stamp:
                entry = [stamp, sha256_file(path)]
                if time.time() - stat.st_mtime > RACY_S:  # a file just written may change again within one tick of its clock
                    known[str(path)] = entry
                    changed = True
            digests.append(entry[1])
        if changed and self.root.is_dir():
            with contextlib.suppress(OSError):  # a store that can only be read serves a plan as well
                self.backend.put(cache_name, json.dumps(known, sort_keys=True).encode())
        return digests


def boot_id() -> str:
    """Of this machine since it was started: clones of one machine have one host name, and never this."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_space() -> str:
    """In which numbering of processes this one has its pid: two containers of one machine number theirs apart."""
    return os.readlink("/proc/self/ns/pid").removeprefix("pid:[").removesuffix("]")


def _machine() -> str:
    """Where a number of a process means what it means here."""
    return f"{socket.gethostname()}-{boot_id()}-{pid_space()}"


def _written_s(folder: Path) -> float:
    """When something was last written in a folder, in s since 1970."""
    newest_s = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # its writer lives
            newest_s = max(newest_s, path.stat().st_mtime)
    return newest_s


def born(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; None when there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]
