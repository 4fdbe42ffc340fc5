"""The config of a submitted run: written into the store, so that the job reads what was meant when it was submitted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipelines.plan.config import Fault
from pipelines.plan.graph import Graph
from pipelines.plan.snapshot import Snapshot
from pipelines.plan.toml_writer import write_toml
from pipelines.store.store import Store


def not_freezable(graph: Graph) -> list[Fault]:
    """The user's files that a job would read as they are when it runs, not as they were when it was submitted."""
    return [
        Fault(
            f"stages.{stage.name}.{each.setting}",
            f"found the absolute path {each.reference!r}, which a job would read later, perhaps edited; "
            f"expected a path relative to the folder of {graph.loaded.path.name}",
        )
        for stage in graph.stages.values()
        for each in stage.user_code
        if os.path.isabs(each.reference)
    ]


def freeze_config(graph: Graph, store: Store, snapshot: Snapshot, folder: Path) -> Path:
    """Write the config with its overrides below `folder`, and the user's files beside it as they lie beside the original.

    What names a user's file is part of the key, so it must stay as written: if names begin with ../, as many folders of the original's
    own path are recreated below `folder`.
    """
    targets = {  # two folders may be named alike, by a pipeline file and by one that it extends
        (os.path.normpath(os.path.dirname(each.reference.rpartition(":")[0])), frozen)
        for name, frozen in snapshot.user_folders().items()
        for each in graph.stages[name].user_code
    }
    up = max((target.split(os.sep).count(os.pardir) for target, _ in targets), default=0)
    above = ["_"] * up + list(graph.user_folder().parts[1:])
    home = folder.joinpath(*above[len(above) - up :])
    home.mkdir(parents=True)
    for target, frozen in sorted(targets):
        shutil.copytree(frozen, home / target, dirs_exist_ok=True)
    file = graph.loaded.file.model_dump(mode="json")
    file["store"]["root"] = str(store)
    file["data"] = str(graph.loaded.data())
    file["cluster"]["address"] = "auto"
    file["tracking"]["uri"] = _absolute(file["tracking"]["uri"])
    config = home / graph.loaded.path.name
    config.write_text(write_toml(file), encoding="utf-8")
    return config


def _absolute(uri: str) -> str:
    """A database file's address, wherever it is opened from."""
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{Path(path).absolute()}"
