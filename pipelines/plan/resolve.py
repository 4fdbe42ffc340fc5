"""The digest that a reference stands for, according to the store."""

from __future__ import annotations

from pathlib import Path

from gpt.hf_folder import checkpoint_files
from pipelines.plan.references import IMPORTS, Digest, HfFolder, ModelAlias, RunStage, parse_artifact
from pipelines.store.events import StageEnded
from pipelines.store.journal import read_journal
from pipelines.store.store import Store

DIGITS = 64
"""Of a whole digest."""


def resolve(store: Store, reference: str) -> str:
    """Return the digest that a reference stands for; ValueError says what the store has instead."""
    match parse_artifact(reference):
        case Digest(prefix):
            return _by_prefix(store, reference, prefix)
        case RunStage(run, stage):
            return _by_run(store, reference, run, stage)
        case ModelAlias(pipeline, alias):
            return _by_alias(store, reference, pipeline, alias)
        case HfFolder(folder):
            return _imported(store, Path(folder).expanduser())


def _by_prefix(store: Store, reference: str, prefix: str) -> str:
    if len(prefix) == DIGITS and store.manifest(prefix) is not None:
        return prefix  # without a look at the store's other artifacts
    found = store.digests(prefix)
    if not found:
        raise ValueError(f"{reference!r} is not in the store {store}; `gptline plan` and the run's page show digests")
    if len(found) > 1:
        raise ValueError(f"{reference!r} fits {len(found)} artifacts: {', '.join(each[:16] for each in found)}; give more digits")
    return found[0]


def _by_run(store: Store, reference: str, run: str, stage: str) -> str:
    ended = [each for each in read_journal(store, run) if isinstance(each, StageEnded) and each.output]
    for event in reversed(ended):
        if event.stage == stage:
            return event.output
    if run not in store.runs():
        newest = ", ".join(store.runs()[-3:])
        raise ValueError(f"{reference!r}: there is no run {run!r}; the store {store} has " + (f"{newest}" if newest else "no runs yet"))
    made = ", ".join(each.stage for each in ended) or "none"
    raise ValueError(f"{reference!r}: that run has no output of a stage {stage!r}; its stages with an output: {made}")


def _by_alias(store: Store, reference: str, pipeline: str, alias: str) -> str:
    if digest := store.alias(pipeline, alias):
        return digest
    known = ", ".join(f"model:{name}@{alias}" for name, alias in store.aliases()) or "none yet"
    raise ValueError(f"{reference!r}: there is no such model; the store has {known}")


def _imported(store: Store, folder: Path) -> str:
    """Find the model that was imported from a folder's files as they are now."""
    names = checkpoint_files(folder)
    now = dict(zip(names, store.content_sha256([(folder / name).absolute() for name in names]), strict=True))
    for action in store.index.readers(now.values()):
        read = {Path(name).name: digest for name, digest in action.sources().items()}
        if action.kind == IMPORTS["model"] and read == now:
            return action.output
    raise ValueError(
        f"{folder} has not been imported into the store {store} in its present state; "
        "name it in a pipeline's inputs or with --use, and run that"
    )
