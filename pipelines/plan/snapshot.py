"""The code of a run, frozen: our packages and the user's own files in an artifact, from which the workers import.

    <snapshot>/pipelines, gpt, cluster          our packages
    <snapshot>/user/...                         the user's files that the stages reach, laid out as beside the TOML
    <snapshot>/gptline_user_<stem>.py           a shim for each, so that ranks can import by name what a stage's task hands them

So an edit during a run changes neither what the run does nor what it records. Only with --inline do stages run from the working tree; the
result of a stage whose code was edited meanwhile is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines.artifacts import Artifact
from pipelines.plan.code import PACKAGES, Code
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import Graph
from pipelines.plan.user_code import USER_MODULE
from pipelines.store.store import Store

_SHIM = """import sys
from pathlib import Path

_file = Path(__file__).parent / "user" / {file!r}
sys.path.append(str(_file.parent))
__file__ = str(_file)
exec(compile(_file.read_bytes(), str(_file), "exec"))
"""


@dataclass(frozen=True)
class Snapshot:
    """The frozen code of one run."""

    artifact: Artifact
    references: dict[str, str]
    """Reference to user code in the pipeline file, to the same code relative to `user`: "../mine/a.py:b" to "./outside-0/a.py:b"."""
    folders: dict[str, str]
    """Stage to the folder of its user code, relative to `user`; only stages that have user code."""

    @property
    def path(self) -> Path:
        return self.artifact.path

    @property
    def user(self) -> Path:
        return self.path / "user"

    def user_folders(self) -> dict[str, Path]:
        return {stage: self.user / folder for stage, folder in self.folders.items()}


def freeze(graph: Graph, store: Store) -> Snapshot:
    """Copy the code into the store; the same code gives the same snapshot."""
    folder = store.new_folder()
    for package in PACKAGES:
        _copy(sorted((ROOT / package).rglob("*.py")), ROOT, folder)
    references: dict[str, str] = {}
    of_stage: dict[str, str] = {}
    relative: dict[Path, Path] = {}
    """Folder of user code to the same relative to `user`."""
    for stage in graph.stages.values():
        home = stage.user_folder()
        if home is None:
            continue
        # folders outside the TOML's are numbered in the order of the stages
        inside = home.is_relative_to(graph.user_folder())
        below = relative.setdefault(home, home.relative_to(graph.user_folder()) if inside else Path(f"outside-{len(relative)}"))
        _copy(Code(ROOT, home).files([each.entry() for each in stage.user_code]), home, folder / "user" / below)
        of_stage[stage.name] = below.as_posix()
        for each in stage.user_code:
            name = (below / each.file.name).as_posix()
            (folder / f"{USER_MODULE}{each.file.stem}.py").write_text(_SHIM.format(file=name))
            references[each.reference] = f"./{name}:{each.entry()[1]}"
    return Snapshot(store.publish(folder, "code", {}), references, of_stage)


def _copy(files: Iterable[Path], base: Path, target: Path) -> None:
    for file in files:
        copy = target / file.relative_to(base)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
