"""The store: artifacts by digest, actions by key, leases, runs. Shared objects are written through the five calls of a backend.

    artifacts/<digest>/<file>, manifest.json      what was built         (the manifest comes last: without it the artifact does not exist)
    actions/<key>/<number>.json                   how it was built       (the newest is reused, older ones stay for lineage)
    index/...                                     which actions made and used an artifact, see `index.py`
    latest/<pipeline>/<stage>.json                the action that a stage used last: what `plan` compares with
    aliases/<name>/<alias>.json                   what model:<name>@<alias> means: the newest model of a pipeline
    leases/<name>/<generation>.json               who works on a key or drives a run
    runs/<run>/...                                one folder per run, see `runs.py`
    work/<key>/..., tmp/...                       checkpoints of unfinished training, folders of unfinished artifacts: plain files

Order never depends on clocks: numbers are assigned by `put_if_absent`. These do not go through the backend: `work/` and `tmp/`, an
artifact's files when they are read, the names of the runs (listing everything below `runs/` would walk through every journal), and
`machine_file`s: MLflow's database, locks and logs, the config of a submitted run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.commit import FileEntry, canonical_json, check, describe, sha256_file
from pipelines.artifacts import KINDS, Artifact
from pipelines.stage import StageFailure
from pipelines.store.action import SCHEMA, Action
from pipelines.store.backend import Backend, FolderBackend
from pipelines.store.index import ActionIndex
from pipelines.store.processes import machine_id, start_ticks

_RECORD = re.compile(r"/(\d{6})\.json$")
_RACY_S = 2.0
_ABANDONED_S = 7 * 24 * 3600.0
"""A folder in `tmp/` that nobody wrote to for this long is abandoned, whichever machine it came from."""


class Store:
    """`Store(Path(".gptline"))`; in messages it is called by its folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.backend: Backend = FolderBackend(self.root)
        self.index = ActionIndex(self)

    def __str__(self) -> str:
        return str(self.root)

    def create(self) -> None:
        """Make the store's folder unless it exists; only its owner can read a new one."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def machine_file(self, name: str) -> Path:
        """The path of a file that belongs to this machine's processes and not to the shared store: a database, a lock, a log."""
        return self.root / name

    # ---- artifacts ----

    def new_folder(self) -> Path:
        """Make an empty folder to write an artifact in."""
        folder = self.root / "tmp" / f"{machine_id()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        folder.mkdir(parents=True)
        return folder

    def artifact_folder(self, digest: str) -> Path:
        """Where an artifact's files are read."""
        return self.root / "artifacts" / digest

    def publish(self, folder: Path, kind: str, metadata: dict[str, Any]) -> Artifact:
        """Move a folder's files into the store and freeze them under their digest.

        The same bytes published twice are one artifact, and publishing repairs an artifact that was damaged.
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
        if self.damage(digest) is not None:
            for file in files:
                self.backend.put(f"{name}/{file.path}", folder / file.path)
            self.backend.put(f"{name}/manifest.json", data)
        shutil.rmtree(folder, ignore_errors=True)
        return self.artifact(digest)

    def manifest(self, digest: str) -> dict[str, Any] | None:
        """The artifact's manifest; None if there is no such artifact or its manifest is damaged."""
        data = self.backend.get(f"artifacts/{digest}/manifest.json")
        try:
            manifest = None if data is None else json.loads(data)
        except ValueError:
            return None
        return manifest if isinstance(manifest, dict) and "files" in manifest else None

    def artifact(self, digest: str, kind: type[Artifact] | None = None) -> Artifact:
        """The artifact as an instance of `kind`, which may be a user's own class; by default of our class for its type."""
        manifest = self.manifest(digest)
        if manifest is None:
            raise StageFailure(f"artifact sha256:{digest[:12]} is not in the store {self}: it was deleted, or belongs to another store")
        chosen = kind or KINDS.get(manifest["kind"], Artifact)
        return chosen(self.artifact_folder(digest), digest, manifest["metadata"])

    def kind_of(self, digest: str) -> str:
        """The artifact's type. ValueError if there is no such artifact."""
        manifest = self.manifest(digest)
        if manifest is None:
            raise ValueError(f"artifact sha256:{digest[:12]} is not in the store {self}")
        return str(manifest["kind"])

    def read(self, digest: str, name: str) -> bytes | None:
        """One file of an artifact; None if it has no such file."""
        return self.backend.get(f"artifacts/{digest}/{name}")

    def damage(self, digest: str) -> str | None:
        """Why an artifact can't be reused, or None. It compares only the files' sizes, which is cheap enough for every plan."""
        manifest = self.manifest(digest)
        if manifest is None:
            return f"its artifact {digest[:12]} is gone"
        for file in manifest["files"]:
            path = self.artifact_folder(digest) / file["path"]
            found = path.stat().st_size if path.is_file() else None
            if found != file["bytes"]:
                what = "is gone" if found is None else f"has {found:,} bytes, expected {file['bytes']:,}"
                return f"its artifact {digest[:12]} is damaged: {file['path']} {what}"
        return None

    def verify(self, digest: str) -> list[str]:
        """Problems found by reading every byte of an artifact again."""
        manifest = self.manifest(digest)
        if manifest is None:
            return [f"artifact {digest[:12]} has no manifest"]
        return check(self.artifact_folder(digest), [FileEntry(**file) for file in manifest["files"]])

    def digests(self, beginning: str = "") -> list[str]:
        """The artifacts whose digest begins so."""
        names = self.backend.list(f"artifacts/{beginning}")
        return [name.split("/")[1] for name in names if name.count("/") == 2 and name.endswith("/manifest.json")]

    # ---- actions ----

    def action_numbers(self, key: str) -> list[int]:
        names = [_RECORD.search(name) for name in self.backend.list(f"actions/{key}/")]
        return sorted(int(name[1]) for name in names if name)

    def actions(self, key: str) -> list[Action]:
        """The readable records under a key, oldest first."""
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
        """Every readable record. This reads the whole store; to find makers and users of an artifact, ask `index`."""
        for name in self.backend.list("actions/"):
            data = self.backend.get(name) if _RECORD.search(name) else None
            if data is not None:
                with contextlib.suppress(ValueError):  # a damaged record
                    yield Action.model_validate_json(data)

    def record(self, action: Action) -> Action:
        """Write an action under the next free number of its key."""
        self.index.add(action)  # first: an entry without a record is ignored, a record without an entry would not be found
        number = max(self.action_numbers(action.key), default=0)
        while True:
            number += 1
            numbered = action.model_copy(update={"number": number})
            if self.backend.put_if_absent(f"actions/{action.key}/{number:06d}.json", numbered.model_dump_json().encode()):
                return numbered

    # ---- pointers ----

    def note_latest(self, pipeline: str, stage: str, action: Action) -> None:
        self.backend.put(f"latest/{pipeline}/{stage}.json", canonical_json({"key": action.key, "number": action.number}))

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

    def set_alias(self, name: str, alias: str, digest: str) -> None:
        """Let `model:<name>@<alias>` mean this artifact from now on."""
        self.backend.put(f"aliases/{name}/{alias}.json", canonical_json({"digest": digest}))

    def alias(self, name: str, alias: str) -> str | None:
        """The digest that `model:<name>@<alias>` means."""
        data = self.backend.get(f"aliases/{name}/{alias}.json")
        return None if data is None else str(json.loads(data)["digest"])

    def aliases(self) -> list[tuple[str, str]]:
        """Every (name, alias)."""
        names = [name.split("/") for name in self.backend.list("aliases/")]
        return [(name, file.removesuffix(".json")) for _, name, file in names]

    # ---- runs, work and sources ----

    def runs(self) -> list[str]:
        """Ids of the runs, oldest first: an id begins with the second it started in, and its last part with the 256th of that second."""
        top = self.root / "runs"
        names = [entry.name for entry in top.iterdir() if entry.is_dir()] if top.is_dir() else []
        return sorted(names, key=lambda name: (name[: len("20261122-192002")], name.rpartition("-")[2], name))

    def work(self, key: str) -> Path:
        """The folder of the checkpoints of a key's unfinished attempts."""
        return self.root / "work" / key

    def remove_work(self, key: str) -> None:
        shutil.rmtree(self.work(key), ignore_errors=True)

    def sweep(self) -> None:
        """Remove the unfinished folders of this machine's dead processes, and those of other machines that were abandoned long ago."""
        for folder in (self.root / "tmp").glob("*-*-*"):
            machine, pid, _ = folder.name.rsplit("-", 2)
            abandoned = start_ticks(int(pid)) is None if machine == machine_id() else time.time() - _written_s(folder) > _ABANDONED_S
            if abandoned:
                shutil.rmtree(folder, ignore_errors=True)

    def content_sha256(self, paths: list[Path]) -> list[str]:
        """Digests of outside files. A file whose size, times and inode have not changed is not read again."""
        cache_name = "cache/content.json"
        known = json.loads(self.backend.get(cache_name) or b"{}")
        digests, changed = [], False
        for path in paths:
            stat = path.stat()
            stamp = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
            entry = known.get(str(path))
            if entry is None or entry[0] != stamp:
                entry = [stamp, sha256_file(path)]
                if time.time() - stat.st_mtime > _RACY_S:  # a file just written may change again within one tick of its clock
                    known[str(path)] = entry
                    changed = True
            digests.append(entry[1])
        if changed and self.root.is_dir():
            with contextlib.suppress(OSError):  # a plan also works on a read-only store
                self.backend.put(cache_name, json.dumps(known, sort_keys=True).encode())
        return digests


def _written_s(folder: Path) -> float:
    """When something in a folder was last written, in seconds since 1970."""
    newest_s = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # its writer is alive
            newest_s = max(newest_s, path.stat().st_mtime)
    return newest_s
