"""The resolved pipeline: every default filled in, overrides applied, what the file extends merged into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipelines.plan.graph import Graph


def resolved(graph: Graph) -> dict[str, Any]:
    """The pipeline as a document, as runs record it; its `data` is still relative to the file that wrote it."""
    file = graph.loaded.file.model_dump(mode="json")
    file["stages"] = {
        name: {
            "uses": stage.kind.uses,
            "inputs": stage.inputs,
            **stage.config.model_dump(mode="json"),
            "resources": stage.resources.model_dump(mode="json"),
            **({"gate": [gate.model_dump(mode="json") for gate in stage.gates]} if stage.gates else {}),
        }
        for name, stage in graph.stages.items()
    }
    return file


def saved_in(folder: Path, graph: Graph) -> dict[str, Any]:
    """The document that `run` accepts and that plans to the same keys, if it is saved in `folder` (see `home`)."""
    return {**resolved(graph), "data": os.path.relpath(graph.loaded.data(), folder)}


def home(graph: Graph) -> Path:
    """The folder from which the user's functions are found as the file names them, which is part of their stages' keys.

    ValueError if there is none: a file and one that it extends name functions in two folders.
    """
    folders = {graph.loaded.folder(name): name for name, stage in graph.stages.items() if stage.user_code}
    if len(folders) > 1:
        named = ", ".join(f"{name} in {folder}" for folder, name in folders.items())
        raise ValueError(f"one file can't name functions relative to {len(folders)} folders: {named}; put the pipeline files side by side")
    return next(iter(folders), graph.user_folder())
