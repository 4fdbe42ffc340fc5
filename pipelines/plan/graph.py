"""The stages of a pipeline file as a checked graph.

`build` reads each table against its kind's signature (`kinds.py`), checks what the stages read of each other (`inputs.py`,
`model_flow.py`), and reports all faults of the file at once. A config value's way: `config.load` reads the TOML, `_read_stage` hands the
stage's table to `validate`, which makes the kind's Settings of it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel

from gpt.settings import OPERATIONAL, Settings, TrainSettings
from pipelines.plan.code import Code
from pipelines.plan.config import Fault, Gate, Loaded, Resources, validate
from pipelines.plan.environment import ROOT
from pipelines.plan.faults import shown
from pipelines.plan.inputs import check_inputs, order_of
from pipelines.plan.kinds import Kind, load_kind
from pipelines.plan.model_flow import Traits, model_faults
from pipelines.plan.references import IMPORTS, names_hf_folder, names_stage, stages_in
from pipelines.plan.user_code import UserCode, read_user_code
from pipelines.stage import Source, StageConfig

TABLE_KEYS = ("uses", "inputs", "resources", "gate")
"""What a stage's table may have beside its kind's settings."""


@dataclass(frozen=True)
class Stage:
    """A checked table of the pipeline file."""

    name: str
    kind: Kind
    config: Settings
    inputs: dict[str, list[str]]
    """Parameter name to references, in the forms of `references.py`."""
    resources: Resources
    sources: list[Source] = field(default_factory=list)
    user_code: list[UserCode] = field(default_factory=list)
    """The user's own functions that it names, all in one folder."""
    gates: list[Gate] = field(default_factory=list)
    """Not in the key: gates decide whether other stages may read the output, not what it is."""

    def user_folder(self) -> Path | None:
        """The folder of its user code."""
        return self.user_code[0].file.parent if self.user_code else None

    def upstream(self) -> list[str]:
        """The stages that it reads."""
        return stages_in(self.inputs)

    def semantic(self) -> dict[str, Any]:
        """The settings that are in the key."""
        return self.config.model_dump(mode="json", exclude=_operational_names(type(self.config)))

    def operational(self) -> dict[str, Any]:
        """The settings that are not in the key, including resources."""
        chosen = self.config.model_dump(mode="json", include=_operational_names(type(self.config)))
        resources = ("ranks", "cpus_per_rank", "gpus_per_rank") if self.kind.trains() else ("cpus",)
        return chosen | {name: getattr(self.resources, name) for name in resources}


@dataclass(frozen=True)
class Graph:
    loaded: Loaded
    stages: dict[str, Stage]
    """In an order in which every stage comes after those that it reads."""
    use: dict[str, str] = field(default_factory=dict)
    """Stage to the reference whose artifact replaces its output; the store resolves it. Folders are not here: stages import them."""
    replaced: frozenset[str] = frozenset()
    """The stages that were read only by stages which an imported folder replaced."""

    def last(self) -> list[str]:
        """The stages that no other stage reads."""
        read = {name for stage in self.stages.values() for name in stage.upstream()} | self.replaced
        return [name for name in self.stages if name not in read]

    def needed(self, names: Collection[str], given: Collection[str] = ()) -> set[str]:
        """These stages and all that they read, directly or not. A `given` stage needs nothing: its output is given."""
        found = set(names)
        for stage in reversed(list(self.stages.values())):
            if stage.name in found and stage.name not in given:
                found.update(stage.upstream())
        return found

    def model_faults(self, outside: Mapping[str, Traits]) -> list[Fault]:
        """Faults in what models and tokenizers are used for; `outside` is what is known of artifacts that no stage here makes."""
        return model_faults(self.stages, outside)

    def outside(self) -> list[str]:
        """The references of all stages that are not stages."""
        found = (each for stage in self.stages.values() for references in stage.inputs.values() for each in references)
        return [each for each in dict.fromkeys(found) if not names_stage(each)]

    def user_folder(self) -> Path:
        """The folder of the pipeline file."""
        return self.loaded.path.parent


def build(loaded: Loaded, use: Mapping[str, str] = MappingProxyType({})) -> Graph:
    """Check every stage against its kind; ConfigError lists all faults of the file. `use` is stage to reference, from --use."""
    faults = list(loaded.faults)
    drafts: dict[str, _Draft] = {}
    for name, table in loaded.file.stages.items():
        draft, found = _read_stage(name, dict(table), loaded)
        faults += found
        if draft is not None:
            drafts[name] = draft
    folders = {name: reference for name, reference in use.items() if names_hf_folder(reference) and name in drafts}
    replaced = frozenset(each for name in folders for each in drafts[name].upstream())
    faults += _add_imports(drafts, folders, loaded)
    unreadable = {fault.where for fault in faults}
    for draft in drafts.values():
        found = check_inputs(draft, drafts, {**loaded.file.stages, **drafts}, loaded.dropped)
        faults += [each for each in found if unreadable.isdisjoint((each.where, f"stages.{draft.name}.inputs"))]
    faults += _check_files(drafts)
    order, cycle = order_of(drafts)
    if cycle:
        faults.append(Fault(f"stages.{cycle[0]}.inputs", f"{' reads '.join(cycle)}: a cycle; one of these inputs must come from elsewhere"))
    if faults:
        raise loaded.error(faults)
    stages = {name: drafts[name].stage() for name in order}
    graph = Graph(loaded, stages, {name: each for name, each in use.items() if name not in folders}, replaced)
    if faults := graph.model_faults(dict.fromkeys(graph.use, Traits())):
        raise loaded.error(faults)
    return graph


@dataclass(frozen=True)
class _Draft:
    """A stage as far as its table can be read: its inputs are checked even if its settings are wrong."""

    name: str
    kind: Kind
    inputs: dict[str, list[str]]
    config: Settings | None
    resources: Resources | None
    sources: list[Source]
    user_code: list[UserCode]
    gates: list[Gate]

    def upstream(self) -> list[str]:
        return stages_in(self.inputs)

    def stage(self) -> Stage:
        assert self.config is not None
        assert self.resources is not None
        return Stage(self.name, self.kind, self.config, self.inputs, self.resources, self.sources, self.user_code, self.gates)


def _operational_names(model: type[Settings]) -> set[str]:
    return {name for name, each in model.model_fields.items() if OPERATIONAL in each.metadata}


def _read_stage(name: str, table: dict[str, Any], loaded: Loaded) -> tuple[_Draft | None, list[Fault]]:
    where = f"stages.{name}"
    uses = table.pop("uses", name)
    inputs, faults = _read_inputs(table.pop("inputs", {}), f"{where}.inputs")
    resources, found = validate(Resources, table.pop("resources", {}), f"{where}.resources")
    faults += found
    gates, found = _read_gates(table.pop("gate", []), f"{where}.gate")
    faults += found
    try:
        kind = load_kind(str(uses), loaded.folder(name))
    except ValueError as error:
        return None, [*faults, Fault(f"{where}.uses", str(error))]
    config, found = validate(kind.config, table, where, TABLE_KEYS)
    faults += found
    if config is not None:
        config, found = _as_recorded(config, where)
        faults += found
    user_code, found = read_user_code(kind.user_code(), config, loaded.folder(name), where)
    faults += found
    sources: list[Source] = []
    if isinstance(config, StageConfig):
        sources, found = _read_sources(config, loaded.data(), where)
        faults += found
    if isinstance(config, TrainSettings) and resources is not None:
        faults += _check_training(where, config, resources)
    return _Draft(name, kind, inputs, config, resources, sources, user_code, gates), faults


def _read_inputs(value: Any, where: str) -> tuple[dict[str, list[str]], list[Fault]]:
    if not isinstance(value, dict):
        return {}, [Fault(where, f"expected a table, such as inputs = {{ tokens = ['tokenize'] }}, found {shown(value)}")]
    references, faults = {}, []
    for parameter, each in value.items():
        items = each if isinstance(each, list) else [each]
        if all(isinstance(item, str) for item in items):
            references[parameter] = items
        else:
            faults.append(Fault(f"{where}.{parameter}", f"expected a reference or a list of references, found {shown(each)}"))
    return references, faults


def _read_gates(value: Any, where: str) -> tuple[list[Gate], list[Fault]]:
    """Read one gate or a list of them."""
    places = {f"{where}.{index}": each for index, each in enumerate(value)} if isinstance(value, list) else {where: value}
    read = [validate(Gate, each, place) for place, each in places.items()]
    return [gate for gate, _ in read if gate], [fault for _, found in read for fault in found]


def _as_recorded(config: Settings, where: str) -> tuple[Settings, list[Fault]]:
    """Return a config as a worker will read it from JSON, the form that keys and records hold. A default may not fit its own setting."""
    excluded = (
        "has Field(exclude=True), so it would reach neither the key nor the worker; "
        "remove that (a field that can't change the result may be Operational)"
    )
    faults = [Fault(f"{where}.{name}", excluded) for name in _excluded(type(config), set())]
    for name in type(config).model_fields:
        try:
            config.model_dump(mode="json", include={name}, warnings=False)
        except Exception as error:
            faults.append(Fault(f"{where}.{name}", f"is {getattr(config, name)!r}, which can't be recorded as JSON: {error}"))
    if faults:
        return config, faults
    again, faults = validate(type(config), config.model_dump(mode="json", warnings=False), where)
    return again or config, faults


def _excluded(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """Yield the fields that pydantic leaves out of a dump, also of models inside."""
    seen.add(model)
    for name, field_info in model.model_fields.items():
        if field_info.exclude or getattr(field_info, "exclude_if", None):
            yield name
        for inner in _models_in(field_info.annotation):
            if inner not in seen:
                yield from (f"{name}.{each}" for each in _excluded(inner, seen))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for each in get_args(annotation) for model in _models_in(each)]


def _read_sources(config: StageConfig, data: Path, where: str) -> tuple[list[Source], list[Fault]]:
    """Return the files that a config names, or why they can't be read; `sources` may be a user's code."""
    try:
        sources = list(config.sources(data))
    except ValueError as error:
        setting, colon, what = str(error).partition(": ")
        return [], [Fault(f"{where}.{setting}", what) if colon and setting in type(config).model_fields else Fault(where, str(error))]
    except (Exception, SystemExit) as error:
        return [], [Fault(where, f"its sources() failed: {type(error).__name__}: {error}")]
    wrong = [each for each in sources if not (isinstance(each, Source) and isinstance(each.path, Path))]
    if wrong:
        return [], [Fault(where, f"its sources() returned {wrong[0]!r}, expected Source(name, path) with a Path")]
    if len({source.name for source in sources}) < len(sources):
        return [], [Fault(where, "two of its sources have the same name, so its key can't distinguish them")]
    unreadable = [source for source in sources if not (source.path.is_file() and os.access(source.path, os.R_OK))]
    return sources, [Fault(where, f"there is no readable file {source.path}") for source in unreadable]


def _check_training(where: str, config: TrainSettings, resources: Resources) -> list[Fault]:
    faults = []
    try:
        config.gradient_accumulation_steps(resources.ranks)
    except ValueError as error:
        faults.append(Fault(where, str(error)))
    if config.precision == "fp16" and not resources.gpus_per_rank:
        faults.append(Fault(f"{where}.precision", "is 'fp16', which needs a GPU: set resources.gpus_per_rank = 1, or precision = 'bf16'"))
    if config.engine == "torch" and config.offload:
        faults.append(Fault(f"{where}.offload", "is true, which only engine = 'deepspeed' can do"))
    return faults


def _add_imports(drafts: dict[str, _Draft], use: Mapping[str, str], loaded: Loaded) -> list[Fault]:
    """Replace every hf:<folder> by stages that import it: a tokenizer, or a tokenizer and a model, named after the folder."""
    faults: list[Fault] = []
    names: dict[Path, str] = {}

    def add(kind: str, reference: str, where: str, name: str = "") -> str:
        folder = reference.removeprefix("hf:")
        path = Path(os.path.abspath(loaded.data() / Path(folder).expanduser()))
        if path not in names:
            names[path] = _free_name(path, {*loaded.file.stages, *drafts})
        if not name:
            name = names[path] if kind == "model" else f"{names[path]}-tokenizer"
            if name in drafts:
                return name
        table: dict[str, Any] = {"uses": IMPORTS[kind], "folder": folder}
        if kind == "model":
            before = len(faults)
            table["inputs"] = {"tokenizer": add("tokenizer", reference, where)}
            del faults[before:]  # the model's own sources report what is wrong with the tokenizer's too
        draft, found = _read_stage(name, table, loaded)
        assert draft is not None
        drafts[name] = draft
        faults.extend(Fault(where, fault.what) for fault in found)
        return name

    for name, reference in use.items():
        made = drafts[name].kind.output.kind
        if made in IMPORTS:
            add(made, reference, f"--use {name}={reference}", name)
        else:
            faults.append(Fault(f"--use {name}={reference}", f"is a model or a tokenizer, but {name} makes {made}"))
    for draft in list(drafts.values()):
        for parameter, references in draft.inputs.items():
            expected = draft.kind.inputs.get(parameter)
            if expected is not None and any(map(names_hf_folder, references)) and (kind := expected.artifact.kind) in IMPORTS:
                where = f"stages.{draft.name}.inputs.{parameter}"
                draft.inputs[parameter] = [add(kind, each, where) if names_hf_folder(each) else each for each in references]
    return faults


def _free_name(folder: Path, taken: Collection[str]) -> str:
    """Return hf-<the folder's name>, with a number if that name or its tokenizer's is taken."""
    stem = "hf-" + re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name)[:40]
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not {name, f"{name}-tokenizer"} & set(taken))


def _check_files(stages: dict[str, _Draft]) -> list[Fault]:
    """Refuse two user files of one name: they are imported by their names, on every machine, so one would be taken for the other."""
    faults: dict[str, str] = {}  # fault to the setting where it was found first
    known: dict[str, Path] = {}
    for stage in stages.values():
        for each in stage.user_code:
            where, folder = f"stages.{stage.name}.{each.setting}", each.file.parent
            try:
                files = Code(ROOT, folder).files([each.entry()])
            except ValueError as error:
                faults.setdefault(str(error), where)
                continue
            for file in files:
                name = file.relative_to(folder).as_posix()
                if known.setdefault(name, file) != file:
                    faults.setdefault(f"{file} and {known[name]} have the same name; rename one", where)
    return [Fault(where, what) for what, where in faults.items()]
