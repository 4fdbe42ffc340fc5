"""Choose the checkpoint to resume from: the step folders of a stage's attempts, read and verified without torch.

A stage's work folder holds one folder per start of its gang, `work/<key>/<series>.<start>/step-00000500/`. A series is one
attempt that a person requested; it never reads another series. Writing is in `cluster/rank_checkpoint.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import commit

SCHEMA = "gptline-checkpoint-1"
_STEP = re.compile(r"step-(\d{8,})")
_SETTINGS = {"world_size": "ranks", "engine": "engine", "zero_stage": "zero_stage", "precision": "precision"}


@dataclass(frozen=True)
class Checkpoint:
    """A committed step folder; `newest_checkpoint` has verified its files."""

    folder: Path
    step: int
    """Number of finished steps when it was written."""
    manifest: Mapping[str, Any]

    def entries(self) -> list[commit.FileEntry]:
        return [commit.FileEntry(**file) for file in self.manifest["files"]]

    def fits(self, identity: Mapping[str, Any]) -> str | None:
        """Why a gang of this identity can't load it, as a sentence; None if it can."""
        found = self.manifest["identity"]
        differ = [key for key in _SETTINGS if key in identity and found.get(key) != identity[key]]
        if not differ:
            return None
        made, requested = _describe(found, differ), _describe(identity, differ)
        return (
            f"the checkpoint at step {self.step} was made with {made}, but this run asks for {requested} and can't load it; "
            f"set {made} to resume, or rebuild the stage from step 0"
        )


def _describe(identity: Mapping[str, Any], keys: Iterable[str]) -> str:
    """ "engine = torch": without zero_stage for an engine that has none, since a user can't set that."""
    return ", ".join(f"{_SETTINGS[key]} = {identity[key]}" for key in keys if identity.get(key) is not None)


def step_folder(attempt: Path, step: int) -> Path:
    return attempt / f"step-{step:08d}"


def attempts(work: Path, series: int) -> list[Path]:
    """The folders of a series' starts so far, oldest first."""
    found = []
    for path in work.iterdir() if work.is_dir() else []:
        head, _, start = path.name.partition(".")
        if head == str(series) and start.isdecimal() and path.is_dir():
            found.append((int(start), path))
    return [path for _, path in sorted(found)]


def new_attempt(work: Path, series: int) -> Path:
    """Make the folder of a series' next start."""
    earlier = attempts(work, series)
    start = int(earlier[-1].name.partition(".")[2]) + 1 if earlier else 1
    folder = work / f"{series}.{start}"
    folder.mkdir(parents=True)
    return folder


def newest_checkpoint(folders: Iterable[Path], *, verify: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint in these attempts' folders, and a sentence for each newer one that was skipped.

    `verify=False` trusts the manifests and doesn't read the files: enough to plan a resume, not to load.
    """
    skipped: list[str] = []
    for step, folder in _newest_first(folders):
        try:
            manifest = commit.read_manifest(folder)
            if manifest is None:
                skipped.append(f"skipped the checkpoint {folder}: it has no manifest, so it was never finished")
                continue
            checkpoint = Checkpoint(folder, step, manifest)
            entries = checkpoint.entries()
            if manifest["schema"] != SCHEMA or manifest["step"] != step or not isinstance(manifest["identity"], dict):
                raise ValueError(f"expected schema {SCHEMA!r}, step {step}; found {manifest['schema']!r}, step {manifest['step']!r}")
        except (ValueError, KeyError, TypeError) as error:
            skipped.append(f"skipped the checkpoint {folder}: its manifest can't be read ({error})")
            continue
        problems = commit.check(folder, entries) if verify else []
        if not problems:
            return checkpoint, skipped
        skipped.append(f"skipped the checkpoint {folder}: it is damaged ({'; '.join(problems)})")
    return None, skipped


def prune(attempt: Path, *, keep: int) -> None:
    """Delete the older step folders of one attempt; the newest `keep` stay."""
    for _, folder in _newest_first([attempt])[keep:]:
        commit.remove(folder)


def _newest_first(folders: Iterable[Path]) -> list[tuple[int, Path]]:
    found = []
    for order, attempt in enumerate(folders):
        for path in attempt.iterdir() if attempt.is_dir() else []:
            if match := _STEP.fullmatch(path.name):
                found.append((int(match[1]), order, path))
    return [(step, path) for step, _, path in sorted(found, key=lambda item: item[:2], reverse=True)]
