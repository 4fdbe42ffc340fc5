"""The pipeline file as frozen models: its own tables, and how it is read and checked.

`graph.py` checks the settings of each stage, once it knows the stage's kind. Every fault is found before any work starts, and all of them
are reported at once. `extends.py` reads the file and those that it extends; this module applies `--set` and checks what is outside of the
stages.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from cluster.metric_names import check_metric_name
from gpt.settings import Operational, Settings
from pipelines.plan.extends import HALF_CHARACTER, Merged, read_merged
from pipelines.plan.faults import TOO_DEEP, ConfigError, Fault, Origin, did_you_mean, validate
from pipelines.plan.toml_lines import is_one_value

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
TRACKING = re.compile(r"sqlite|https?://[^\s/:][^\s/]*(/\S*)?|sqlite:///.+|(postgresql|mysql|mssql)(\+\w+)?://.+")
SECRET = re.compile(r"(access_token|auth_token|secret|password|api_key|credential)s?$", re.IGNORECASE)
SECRET_IN_ADDRESS = re.compile(r"://[^/@\s]+:[^/@\s]+@|://\S*[?&](\w*(token|secret|password|api_key))=[^&\s]", re.IGNORECASE)
USER_CODE = re.compile(r".*\.py:\w+")
"""A setting's value that names a function in a user's file."""
NO_STAGES = "expected at least one table, such as [stages.documents], found none"
DATABASE_FILE = "sqlite:///"


class StoreConfig(Settings):
    """Where artifacts, action records and runs are kept."""

    root: str = ".gptline"
    """A folder, relative to the working directory; ~ is your home folder."""

    @field_validator("root")
    @classmethod
    def _root_is_a_folder(cls, value: str) -> str:
        if not value or "://" in value or value.startswith("file:"):
            raise ValueError(f"expected a folder, on this machine or on storage that all nodes share, found {value!r}")
        return value


class TrackingConfig(Settings):
    """Which MLflow shows the runs."""

    uri: str = "sqlite"
    """"sqlite", a file inside the store; or the address of an MLflow server, http://mlflow.example:5000, or of a database."""

    @field_validator("uri")
    @classmethod
    def _uri_is_one_that_mlflow_takes(cls, value: str) -> str:
        try:
            known = TRACKING.fullmatch(value) and urlsplit(value).port != 0
        except ValueError:  # the port is not a number, or out of range
            known = False
        if not known:
            raise ValueError(
                "expected 'sqlite' (a file inside the store), a server such as 'http://mlflow.example:5000', "
                f"or a database such as 'sqlite:////data/mlflow.db', found {value!r}"
            )
        if value.startswith(f"{DATABASE_FILE}~"):
            return DATABASE_FILE + os.path.expanduser(value.removeprefix(DATABASE_FILE))
        return value


class ClusterConfig(Settings):
    """Which Ray cluster runs the stages."""

    address: str = "local"
    """"local", a Ray that this run starts for itself; or the address of a cluster: "auto", "10.0.0.5:6379"."""

    @field_validator("address")
    @classmethod
    def _address_is_plain(cls, value: str) -> str:
        if "@" in value or "?" in value:
            raise ValueError("expected HOST:PORT, found a user or a query; addresses are recorded, so keep a token in RAY_AUTH_TOKEN")
        port = value.rpartition(":")[2]
        if ":" in value and port.isdecimal() and not 0 < int(port) < 2**16:
            raise ValueError(f"expected a port from 1 to 65535, found {port} in {value!r}")
        return value


class Resources(Settings):
    """What a stage holds while it runs. None of it changes the result beyond rounding, so none of it is in the key."""

    cpus: Operational[int] = Field(default=1, ge=1)
    """CPUs of a stage that runs in one process."""
    gpus: Operational[int] = Field(default=0, ge=0, le=1)
    """GPUs of a stage that runs in one process."""
    ranks: Operational[int] = Field(default=1, ge=1)
    """Processes of a training stage's gang."""
    cpus_per_rank: Operational[int] = Field(default=1, ge=1)
    gpus_per_rank: Operational[int] = Field(default=0, ge=0, le=1)
    memory_gib: Operational[float | None] = Field(default=None, gt=0)
    """Host memory of the stage, or of each rank."""
    accelerator: Operational[str | None] = None
    """Ray's accelerator type, such as "H100"."""
    labels: Operational[dict[str, str]] = Field(default_factory=dict)
    """Ray node labels that a node must have."""


class Gate(Settings):
    """A bound on a figure: `{ figure = "eval/pair_accuracy", min = 0.65 }`. A stage whose figure is lower is built and kept, but the
    stages that read it don't run.
    """

    figure: str
    """A figure of the stage, or a curve, whose last value counts."""
    min: float | None = None
    max: float | None = None

    @field_validator("figure")
    @classmethod
    def _figure_is_a_metric(cls, value: str) -> str:
        check_metric_name(value)
        return value

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> Gate:
        if self.min is None and self.max is None:
            raise ValueError("has no bound; expected min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min:.15g} is more than max = {self.max:.15g}; no value would pass")
        return self

    def passes(self, value: float) -> bool:
        """NaN fails every bound."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def bounds(self) -> str:
        """The bounds in words: "at least 0.65 and at most 1"."""
        bounds = [f"{side} {bound:.15g}" for side, bound in (("at least", self.min), ("at most", self.max)) if bound is not None]
        return " and ".join(bounds)


class PipelineFile(Settings):
    """The keys and tables of a pipeline file."""

    pipeline: str
    """The pipeline's name: letters, digits, "_" and "-". Its runs, models and forecasts go by it."""
    extends: str = Field(default="", exclude=True)
    """Another pipeline file, relative to this one. This file's tables are merged into it key by key; a list replaces a list, and
    `stages.NAME = false` drops a stage."""
    about: str = ""
    """What the pipeline makes, of what, and how long that takes on which machine. Shown at the start while there is no earlier run."""
    seed: int = Field(default=0, ge=0)
    """Every random number of the pipeline follows from it."""
    data: str = "."
    """The folder that relative source files are in; itself relative to the file that sets it; ~ is your home folder."""
    strict_environment: bool = False
    """True: versions of the interpreter and of torch, deepspeed and so on are part of every key."""
    store: StoreConfig = StoreConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    stages: dict[str, dict[str, Any]]
    """A table per stage: `uses` (its kind, if the table's name is not the kind's), `inputs`, `resources`, `gate`, and the kind's
    settings."""

    @field_validator("pipeline")
    @classmethod
    def _pipeline_is_a_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(f"expected a name of letters, digits, '_' and '-', up to 64 of them, found {value!r}")
        return value

    @field_validator("stages")
    @classmethod
    def _there_are_stages(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value:
            raise ValueError(NO_STAGES)
        return value

    def about_itself(self) -> str:
        return f"{self.pipeline}: {self.about}" if self.about else ""


@dataclass(frozen=True)
class Loaded:
    """A pipeline file, merged with what it extends, with its overrides applied."""

    path: Path
    file: PipelineFile
    faults: list[Fault]
    """What is wrong outside of the stages: `graph.build` reports it together with the stages' own faults."""
    base: Path
    """The first file of the chain of `extends`; `path` for a file that extends nothing."""
    origins: dict[str, Origin]
    """Dotted name to where it was written."""
    dropped: dict[str, Origin]
    """Stage of a file that is extended to where it is dropped."""

    def data(self) -> Path:
        """The folder of relative source files."""
        written = self.origins.get("data")
        home = self.base.parent if written is None else written.file.parent
        return (home / Path(self.file.data).expanduser()).resolve()

    def folder(self, stage: str) -> Path:
        """The folder that the user's functions in a stage's table are relative to: that of the file which names them."""
        table = self.file.stages.get(stage, {})
        files = [self.origins[name].file for name in _user_code(table, f"stages.{stage}") if name in self.origins]
        return files[0].parent if files else self.path.parent

    def error(self, faults: Iterable[Fault]) -> ConfigError:
        """These faults, each with the line that it comes from."""
        return ConfigError(self.path, _located(faults, self.origins))


def load(path: Path, overrides: Iterable[str] = ()) -> Loaded:
    """Read a pipeline file; ConfigError lists every fault that can be seen without knowing the kinds."""
    merged = read_merged(path)
    raw = merged.values
    faults = merged.faults + [fault for override in overrides for fault in _apply(merged, path, override)]
    origins = merged.origins()
    try:
        secrets = list(_secrets(raw, ""))
    except RecursionError:
        raise ConfigError(path, [Fault("file", TOO_DEEP)]) from None
    file, found = validate(PipelineFile, raw, "")
    faults += [Fault("stages", NO_STAGES) if fault == Fault("stages", "is missing") else fault for fault in found] + secrets
    if file is None:  # go on with what can be read, so that the stages' faults are reported too
        wrong = {fault.where.split(".")[0] for fault in found}
        file, found = validate(PipelineFile, {"pipeline": "unnamed", **{name: raw[name] for name in raw.keys() - wrong}}, "")
    if file is None:
        raise ConfigError(path, _located(faults, origins))
    root = os.path.realpath(os.path.expanduser(file.store.root))
    if os.path.exists(root) and not os.path.isdir(root):
        faults.append(Fault("store.root", f"expected a folder, or a name for a new one, found the file {file.store.root!r}"))
    if HALF_CHARACTER.search(root):
        faults.append(Fault("store.root", f"its path {root!r} is not UTF-8 and can't be recorded; rename it"))
    for name, table in file.stages.items():
        if not NAME.fullmatch(name):
            faults.append(Fault(f"stages.{name}", f"expected a stage's name of letters, digits, '_' and '-', found {name!r}"))
        faults += _two_folders(table, f"stages.{name}", origins)
    return Loaded(path.resolve(), file, faults, merged.base.resolve(), origins, merged.dropped)


def _located(faults: Iterable[Fault], origins: dict[str, Origin]) -> list[Fault]:
    return [fault if fault.origin else replace(fault, origin=_origin(fault.where, origins)) for fault in faults]


def _origin(where: str, origins: dict[str, Origin]) -> Origin | None:
    """Where a setting was written, or else what is inside of it, or the table that it is missing from."""
    while where:
        inside = (origin for name, origin in origins.items() if name.startswith(f"{where}."))
        if (origin := origins.get(where) or next(inside, None)) is not None:
            return origin
        where = where.rpartition(".")[0]
    return None


def _user_code(value: Any, where: str) -> Iterator[str]:
    """The dotted names of the settings that name a function in a user's file."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _user_code(each, f"{where}.{name}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _user_code(each, f"{where}.{index}")
    elif isinstance(value, str) and USER_CODE.fullmatch(value):
        yield where


def _two_folders(table: dict[str, Any], where: str, origins: dict[str, Origin]) -> list[Fault]:
    """A stage's own code is imported from one folder, so one file, or several side by side, must name it."""
    written = {name: origins[name] for name in _user_code(table, where) if name in origins}
    folders = {origin.file.parent: name for name, origin in written.items()}
    if len(folders) < 2:
        return []
    named = " and ".join(f"{name} in {folder}" for folder, name in folders.items())
    return [Fault(where, f"files in {len(folders)} folders name its functions ({named}); set them in pipeline files of one folder")]


def _apply(merged: Merged, path: Path, override: str) -> list[Fault]:
    """`stages.pretrain.lr=3e-4`: set one value. What isn't one TOML value from beginning to end is taken as a string."""
    raw = merged.values
    if HALF_CHARACTER.search(override):
        return [Fault(f"--set {override!r}", "expected text, found bytes that are not UTF-8 and can't be recorded")]
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        return [Fault(f"--set {override}", "expected NAME=VALUE, for example --set stages.pretrain.lr=3e-4")]
    value = tomllib.loads(f"value = {text}")["value"] if is_one_value(text) else text
    table: Any = raw
    parts = name.strip().split(".")
    if parts[0] not in PipelineFile.model_fields and parts[0] in raw.get("stages", {}):
        return [Fault(f"--set {override}", f"did you mean --set stages.{override}?")]
    for depth, part in enumerate(parts[:-1]):
        if parts[0] == "stages" and depth == 1 and part not in table:
            hint = did_you_mean(part, table) or f"; there are: {', '.join(table)}"
            return [Fault(f"--set {override}", f"there is no stage {part!r}{hint}")]
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return [Fault(f"--set {override}", f"{'.'.join(parts[: depth + 1])} is a value, not a table")]
    origin = Origin(path.resolve(), path.name, override=override)
    if parts[0] == "extends":
        return [Fault(f"--set {override}", "a file's base can't be set here; write `extends` into the file")]
    if parts[0] == "stages" and len(parts) == 2 and value is False:
        if parts[1] not in table:
            hint = did_you_mean(parts[1], table) or f"; there are: {', '.join(table)}"
            return [Fault(f"--set {override}", f"there is no stage {parts[1]!r} to drop{hint}")]
        del table[parts[1]]
        merged.drop(parts[1], origin)
        return []
    table[parts[-1]] = value
    merged.replace(tuple(parts), {tuple(parts): origin})
    return []


def _secrets(value: Any, where: str) -> Iterable[Fault]:
    """Secrets in a config, which is recorded and shown."""
    if isinstance(value, dict):
        for name, each in value.items():
            full = f"{where}.{name}" if where else name
            if SECRET.search(name) and isinstance(each, str):
                yield Fault(full, "looks like a secret; configs are recorded and shown, so keep it in the environment")
            yield from _secrets(each, full)
    elif isinstance(value, str) and SECRET_IN_ADDRESS.search(value):
        yield Fault(where, "holds a password or a token in an address; keep it in the environment (MLFLOW_TRACKING_PASSWORD)")
