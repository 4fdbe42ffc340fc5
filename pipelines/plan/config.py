"""The pipeline file as frozen models. Every fault is found before any work, and all of them are told at once.

Settings of a kind are checked by `graph.py`, once it knows the kind; this module reads the file, applies `--set`, and turns
what pydantic found into sentences: the place, the value found, what was wanted.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from cluster.metric_names import check_metric_name
from gpt.settings import Operational, Settings

M = TypeVar("M", bound=BaseModel)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
TRACKING = re.compile(r"sqlite|https?://[^\s/:][^\s/]*(/\S*)?|sqlite:///.+|(postgresql|mysql|mssql)(\+\w+)?://.+")
SECRET = re.compile(r"(access_token|auth_token|secret|password|api_key|credential)s?$", re.IGNORECASE)
UNION_BRANCH = re.compile(r"str|int|float|bool|.*\[.*|[A-Z]\w*(Config|Settings)")
"""pydantic puts the tag of a union's branch between the names of a location; those are no part of the file."""

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes in a command line or a file's name that are not UTF-8."""
TOO_DEEP = "is nested too deeply to be read"
WANTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "a table"),
}
"""What was wanted, in TOML's words, by pydantic's type of an error."""
BOUNDS = {"greater_than": "more than", "greater_than_equal": "at least", "less_than": "less than", "less_than_equal": "at most"}


@dataclass(frozen=True)
class Fault:
    """One thing that a person must mend: `Fault("stages.pretrain.lr", "is 'fast', wanted a number")`."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class ConfigError(Exception):
    """All faults of a pipeline file."""

    def __init__(self, path: Path | str, faults: list[Fault]) -> None:
        super().__init__(path, faults)
        self.path = path
        self.faults = faults

    def __str__(self) -> str:
        count = "one fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        return "\n".join([f"{self.path}: {count}; no stage was started.", *(f"  {fault}" for fault in self.faults)])


class StoreConfig(Settings):
    root: str = ".gptline"
    """A folder, relative to the working directory."""

    @field_validator("root")
    @classmethod
    def _root_is_a_folder(cls, value: str) -> str:
        if "://" in value or value.startswith("file:"):
            raise ValueError(f"is {value!r}; a store is a folder, on this machine or on one that all nodes share")
        return value


class TrackingConfig(Settings):
    uri: str = "sqlite"
    """"sqlite": a file inside the store; or the address of an MLflow server: http://mlflow.example:5000; or of a database."""

    @field_validator("uri")
    @classmethod
    def _uri_is_one_that_mlflow_takes(cls, value: str) -> str:
        try:
            known = TRACKING.fullmatch(value) and urlsplit(value).port != 0
        except ValueError:  # what stands where a port should
            known = False
        if not known:
            raise ValueError(
                f"is {value!r}, wanted 'sqlite' (a file inside the store), a server such as 'http://mlflow.example:5000', "
                "or a database such as 'sqlite:////data/mlflow.db'"
            )
        return value


class ClusterConfig(Settings):
    address: str = "local"
    """"local": a Ray of this run's own; or the address of a cluster: "auto", "10.0.0.5:6379"."""


class Resources(Settings):
    """What a stage holds while it runs. None of it changes the result beyond rounding, so none of it is in the key."""

    cpus: Operational[int] = Field(default=1, ge=1)
    """Of a stage that computes by itself."""
    gpus: Operational[int] = Field(default=0, ge=0, le=1)
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
    """`Gate(figure="eval/pair_accuracy", min=0.65)`: a stage whose figure is less is made and kept, but what reads it is not made."""

    figure: str
    """A figure of the stage, or a curve whose last value counts."""
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
            raise ValueError("has no bound; wanted min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min:.15g} is more than max = {self.max:.15g}; nothing would pass")
        return self

    def passes(self, value: float) -> bool:
        """What is no number passes no bound."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def wanted(self) -> str:
        bounds = [f"{word} {bound:.15g}" for word, bound in (("at least", self.min), ("at most", self.max)) if bound is not None]
        return " and ".join(bounds)


class PipelineFile(Settings):
    pipeline: str
    about: str = ""
    """What it makes, of what, and how long that takes where: said at the start, where no earlier run can tell."""
    seed: int = Field(default=0, ge=0)
    data: str = "."
    """What relative source files are relative to; itself relative to this file."""
    strict_environment: bool = False
    """True: versions of the interpreter and of torch, deepspeed and so on are part of every key."""
    store: StoreConfig = StoreConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    stages: dict[str, dict[str, Any]] = Field(min_length=1)

    @field_validator("pipeline")
    @classmethod
    def _pipeline_is_a_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("wanted a name of letters, digits, '_' and '-', up to 64 of them")
        return value

    def about_itself(self) -> str:
        return f"{self.pipeline}: {self.about}" if self.about else ""


@dataclass(frozen=True)
class Loaded:
    """A pipeline file with its overrides applied."""

    path: Path
    file: PipelineFile
    faults: list[Fault]
    """What is wrong outside of the stages: `graph.build` tells it together with the stages' own faults."""

    def data(self) -> Path:
        return (self.path.parent / self.file.data).resolve()


def load(path: Path, overrides: Iterable[str] = ()) -> Loaded:
    """Read a pipeline file; ConfigError lists every fault that can be seen without knowing the kinds."""
    if HALF_CHARACTER.search(real := os.path.realpath(path)):
        raise ConfigError(path, [Fault("file", f"its path {real!r} is not UTF-8 and can't be recorded; rename it")])
    if path.exists() and not path.is_file():
        raise ConfigError(path, [Fault("file", "is no regular file; wanted a pipeline file such as configs/quickstart.toml")])
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.toml")] if path.parent.is_dir() else [])
        raise ConfigError(path, [Fault("file", f"there is no such file{_did_you_mean(near)}")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, [Fault("file", f"can't be read: {error}")]) from None
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, [Fault("TOML", f"can't be parsed: {error}")]) from None
    faults = [fault for override in overrides for fault in _apply(raw, override)]
    try:
        secrets = list(_secrets(raw, ""))
    except RecursionError:
        raise ConfigError(path, [Fault("file", TOO_DEEP)]) from None
    file, found = validate(PipelineFile, raw, "")
    faults += found + secrets
    if file is None:  # go on with what can be read, so that the stages' faults are told too
        wrong = {fault.where.split(".")[0] for fault in found}
        file, found = validate(PipelineFile, {"pipeline": "unnamed", **{name: raw[name] for name in raw.keys() - wrong}}, "")
    if file is None:
        raise ConfigError(path, faults)
    if HALF_CHARACTER.search(root := os.path.realpath(os.path.expanduser(file.store.root))):
        faults.append(Fault("store.root", f"its path {root!r} is not UTF-8 and can't be recorded; rename it"))
    for name in file.stages:
        if not NAME.fullmatch(name):
            faults.append(Fault(f"stages.{name}", "a stage's name is made of letters, digits, '_' and '-'"))
    return Loaded(path.resolve(), file, faults)


def validate(model: type[M], values: Any, where: str) -> tuple[M | None, list[Fault]]:
    """An instance of `model`, or every fault in `values` as a sentence."""
    try:
        # As strict JSON: `true` and "3" are no numbers, and yet a list can become a tuple and a string a Path.
        return model.model_validate_json(json.dumps(values, default=str), strict=True), []
    except ValidationError as error:
        return None, [_fault(model, each, where) for each in error.errors(include_url=False)]
    except (Exception, SystemExit) as error:  # a validator may be anyone's code
        return None, [Fault(where, f"its settings can't be checked: {type(error).__name__}: {error}")]


def _fault(model: type[BaseModel], error: Any, where: str) -> Fault:
    location = [str(part) for part in error["loc"] if not UNION_BRANCH.fullmatch(str(part))]
    place = ".".join([*([where] if where else []), *location]) or "file"
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known)
        return Fault(place, f"unknown key{_did_you_mean(near) or '; known here: ' + ', '.join(sorted(known))}")
    if error["type"] == "json_invalid":
        return Fault(place, TOO_DEEP)
    if error["type"] == "missing":
        return Fault(place, "is missing")
    if error["type"] == "value_error":
        return Fault(place, error["msg"].removeprefix("Value error, "))
    if error["type"] in BOUNDS:
        (bound,) = error["ctx"].values()
        return Fault(place, f"is {error['input']}, wanted {BOUNDS[error['type']]} {bound}")
    wanted = WANTED.get(error["type"]) or error["msg"].removeprefix("Input should be ").replace("a valid ", "a ")
    return Fault(place, f"is {error['input']!r}, wanted {wanted}")


def _fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
        model = _model_in(model)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _model_in(annotation: Any) -> Any:
    """The settings class inside an annotation such as `list[SourceSettings] | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple, dict, typing.Annotated):
        for each in typing.get_args(annotation):
            found = _model_in(each)
            if isinstance(found, type) and issubclass(found, BaseModel):
                return found
    return annotation


def _did_you_mean(near: list[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""


def _apply(raw: dict[str, Any], override: str) -> list[Fault]:
    """`stages.pretrain.lr=3e-4`: set one value. A value that isn't TOML is taken as a string."""
    if HALF_CHARACTER.search(override):
        return [Fault(f"--set {override!r}", "is not UTF-8 and can't be recorded; wanted text")]
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        return [Fault(f"--set {override}", "wanted NAME=VALUE, for example --set stages.pretrain.lr=3e-4")]
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table: Any = raw
    parts = name.strip().split(".")
    if parts[0] not in PipelineFile.model_fields and parts[0] in raw.get("stages", {}):
        return [Fault(f"--set {override}", f"did you mean --set stages.{override}?")]
    for depth, part in enumerate(parts[:-1]):
        if parts[0] == "stages" and depth == 1 and part not in table:
            near = difflib.get_close_matches(part, list(table))
            return [Fault(f"--set {override}", f"there is no stage {part!r}{_did_you_mean(near) or '; there are: ' + ', '.join(table)}")]
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return [Fault(f"--set {override}", f"{'.'.join(parts[: depth + 1])} is a value, not a table")]
    table[parts[-1]] = value
    return []


def _secrets(value: Any, where: str) -> Iterable[Fault]:
    """Configs are recorded and shown: a secret has no place in one."""
    if isinstance(value, dict):
        for name, each in value.items():
            place = f"{where}.{name}" if where else name
            if SECRET.search(name) and isinstance(each, str):
                yield Fault(place, "looks like a secret; configs are recorded and shown, so keep it in the environment")
            yield from _secrets(each, place)
    elif isinstance(value, str) and re.search(r"://[^/@\s]+:[^/@\s]+@", value):
        yield Fault(where, "holds a password in an address; keep it in the environment (MLFLOW_TRACKING_PASSWORD)")
