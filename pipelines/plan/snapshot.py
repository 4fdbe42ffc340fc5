"""The code of a run, frozen: our packages and the user's own files, as an artifact that the workers import from.

    <snapshot>/pipelines, gpt, cluster          our packages
    <snapshot>/user/...                         the user's files that the stages reach, as they lie beside the TOML
    <snapshot>/gptline_user_<stem>.py           a shim for each, so that ranks can import what a stage's task hands them by name

An edit during a run changes neither what it does nor what is recorded. With --inline alone stages run from the working tree: one whose code
was edited meanwhile is refused.
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
    artifact: Artifact
    references: dict[str, str]
    """What names the user's code in the pipeline file, to the same relative to `user`: "../mine/a.py:b" to "./outside-0/a.py:b"."""
    places: dict[str, str]
    """Stage to the folder of its user code, relative to `user`; only stages that have some."""

    @property
    def path(self) -> Path:
        return self.artifact.path

    @property
    def user(self) -> Path:
        return self.path / "user"

    def user_folders(self) -> dict[str, Path]:
        return {stage: self.user / place for stage, place in self.places.items()}


def freeze(graph: Graph, store: Store) -> Snapshot:
    """Copy the code into the store; the same code is the same snapshot."""
    folder = store.new_folder()
    for package in PACKAGES:
        _copy(sorted((ROOT / package).rglob("*.py")), ROOT, folder)
    references: dict[str, str] = {}
    of_stage: dict[str, str] = {}
    places: dict[Path, Path] = {}
    for stage in graph.stages.values():
        home = stage.user_folder()
        if home is None:
            continue
        # a folder outside the TOML's gets a place of its own, numbered in the order of the stages
        inside = home.is_relative_to(graph.user_folder())
        place = places.setdefault(home, home.relative_to(graph.user_folder()) if inside else Path(f"outside-{len(places)}"))
        _copy(Code(ROOT, home).files([each.entry() for each in stage.user_code]), home, folder / "user" / place)
        of_stage[stage.name] = place.as_posix()
        for each in stage.user_code:
            name = (place / each.file.name).as_posix()
            (folder / f"{USER_MODULE}{each.file.stem}.py").write_text(_SHIM.format(file=name))
            references[each.reference] = f"./{name}:{each.entry()[1]}"
    return Snapshot(store.publish(folder, "code", {}), references, of_stage)


def _copy(files: Iterable[Path], base: Path, target: Path) -> None:
    for file in files:
        place = target / file.relative_to(base)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
