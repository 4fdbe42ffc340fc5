"""The pipeline file's stages as a checked graph, read off the signatures of their kinds.

A kind is a function: `def sft(config: SftConfig, policy: Model, conversations: Conversations, stage: StageContext) -> Model`.
The parameter that is a Settings class is its config, the one that is a StageContext its way to the machines; of the others the name is
the input's name and the annotation the artifact's kind; `list[...]` takes several, `| None` is optional; the return annotation is what
it makes. Anyone's function serves as well: `uses = "./clean.py:clean"` names a file beside the TOML, and so does a setting of type
`UserFunction`: `reward = "./reward.py:score"`.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpt.settings import OPERATIONAL, Settings, TrainSettings
from pipelines.plan.code import Code
from pipelines.plan.config import ConfigError, Fault, Gate, Loaded, Resources, validate
from pipelines.plan.environment import ROOT
from pipelines.plan.kinds import Input, Kind, load_kind
from pipelines.plan.references import IMPORTS, HfFolder, StageName, names_hf_folder, parse, stages_in
from pipelines.plan.user_code import UserCode, read_user_code
from pipelines.stage import Source, StageConfig


@dataclass(frozen=True)
class Stage:
    """One table of the pipeline file, checked."""

    name: str
    kind: Kind
    config: Settings
    inputs: dict[str, list[str]]
    """Parameter name to references: a stage's name, sha256:..., run:<id>/<stage>, model:<pipeline>@newest."""
    resources: Resources
    sources: list[Source] = field(default_factory=list)
    user_code: list[UserCode] = field(default_factory=list)
    """All in one folder."""
    gates: list[Gate] = field(default_factory=list)
    """In no key: they say who may read what the stage makes, not what that is."""

    def user_folder(self) -> Path | None:
        """Where its user code lies."""
        return self.user_code[0].file.parent if self.user_code else None

    def upstream(self) -> list[str]:
        return stages_in(self.inputs)

    def semantic(self) -> dict[str, Any]:
        """The settings that are in the key."""
        return self.config.model_dump(mode="json", exclude=_operational_names(type(self.config)))

    def operational(self) -> dict[str, Any]:
        """The settings that are not, resources among them."""
        chosen = self.config.model_dump(mode="json", include=_operational_names(type(self.config)))
        resources = ("ranks", "cpus_per_rank", "gpus_per_rank") if self.kind.trains() else ("cpus",)
        return chosen | {name: getattr(self.resources, name) for name in resources}


@dataclass(frozen=True)
class Graph:
    loaded: Loaded
    stages: dict[str, Stage]
    """In an order in which every stage follows what it reads."""
    use: dict[str, str] = field(default_factory=dict)
    """Stage to the reference that stands in for what it makes, and that only the store can tell."""
    replaced: frozenset[str] = frozenset()
    """What stages would have read in whose place a folder is imported."""

    def last(self) -> list[str]:
        """The stages that no other reads."""
        read = {name for stage in self.stages.values() for name in stage.upstream()} | self.replaced
        return [name for name in self.stages if name not in read]

    def needed(self, names: Collection[str], given: Collection[str] = ()) -> set[str]:
        """These stages and what they read, directly or not; what a `given` stage reads is not needed for it."""
        found = set(names)
        for stage in reversed(list(self.stages.values())):
            if stage.name in found and stage.name not in given:
                found.update(stage.upstream())
        return found

    def user_folder(self) -> Path:
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
    for draft in drafts.values():
        faults += _check_inputs(draft, drafts, {**loaded.file.stages, **drafts})
    faults += _check_files(drafts)
    order, cycle = _order(drafts)
    if cycle:
        faults.append(Fault("stages", f"{' reads '.join(cycle)}: a cycle; one of these inputs must come from elsewhere"))
    if faults:
        raise ConfigError(loaded.path, faults)
    stages = {name: drafts[name].stage() for name in order}
    return Graph(loaded, stages, {name: each for name, each in use.items() if name not in folders}, replaced)


@dataclass(frozen=True)
class _Draft:
    """A stage as far as its table can be read: its inputs are checked even where its settings are wrong."""

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
        kind = load_kind(str(uses), loaded.path.parent)
    except ValueError as error:
        return None, [*faults, Fault(f"{where}.uses", str(error))]
    config, found = validate(kind.config, table, where)
    faults += found
    if config is not None:
        config, found = _as_recorded(config, where)
        faults += found
    user_code, found = read_user_code(kind.user_code(), config, loaded.path.parent, where)
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
        return {}, [Fault(where, f"is {value!r}, wanted a table: inputs = {{ tokens = ['tokenize'] }}")]
    references, faults = {}, []
    for parameter, each in value.items():
        items = each if isinstance(each, list) else [each]
        if all(isinstance(item, str) for item in items):
            references[parameter] = items
        else:
            faults.append(Fault(f"{where}.{parameter}", f"is {each!r}, wanted a reference or a list of references"))
    return references, faults


def _read_gates(value: Any, where: str) -> tuple[list[Gate], list[Fault]]:
    """One table or a list of them."""
    places = {f"{where}.{index}": each for index, each in enumerate(value)} if isinstance(value, list) else {where: value}
    read = [validate(Gate, each, place) for place, each in places.items()]
    return [gate for gate, _ in read if gate], [fault for _, found in read for fault in found]


def _as_recorded(config: Settings, where: str) -> tuple[Settings, list[Fault]]:
    """A config as a worker will read it: as JSON, which keys and records have too. A default may be no value of its own setting."""
    faults = []
    for name in type(config).model_fields:
        try:
            config.model_dump(mode="json", include={name}, warnings=False)
        except Exception as error:
            faults.append(Fault(f"{where}.{name}", f"is {getattr(config, name)!r}, which can't be recorded as JSON: {error}"))
    if faults:
        return config, faults
    again, faults = validate(type(config), config.model_dump(mode="json", warnings=False), where)
    return again or config, faults


def _read_sources(config: StageConfig, data: Path, where: str) -> tuple[list[Source], list[Fault]]:
    """The files that a config names, or why they can't be read; `sources` may be anyone's code."""
    try:
        sources = list(config.sources(data))
    except ValueError as error:
        return [], [Fault(where, str(error))]
    except (Exception, SystemExit) as error:
        return [], [Fault(where, f"its sources can't be told: {type(error).__name__}: {error}")]
    wrong = [each for each in sources if not (isinstance(each, Source) and isinstance(each.path, Path))]
    if wrong:
        return [], [Fault(where, f"its sources hold {wrong[0]!r}; wanted Source(name, path) with a Path")]
    if len({source.name for source in sources}) < len(sources):
        return [], [Fault(where, "two of its sources have one name; the key could not tell them apart")]
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
    """Put stages that import the folder, and are named after it, in the place of every hf:<folder>: a tokenizer, or that and a model."""
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
            told = len(faults)
            table["inputs"] = {"tokenizer": add("tokenizer", reference, where)}
            del faults[told:]  # the model's own sources tell what is wrong with the tokenizer's too
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
            faults.append(Fault(f"--use {name}={reference}", f"is a model or a tokenizer; {name} makes {made}"))
    for draft in list(drafts.values()):
        for parameter, references in draft.inputs.items():
            wanted = draft.kind.inputs.get(parameter)
            if wanted is not None and any(map(names_hf_folder, references)) and (kind := wanted.artifact.kind) in IMPORTS:
                where = f"stages.{draft.name}.inputs.{parameter}"
                draft.inputs[parameter] = [add(kind, each, where) if names_hf_folder(each) else each for each in references]
    return faults


def _free_name(folder: Path, taken: Collection[str]) -> str:
    """hf-<the folder's name>, with a number where that or its tokenizer's name is taken."""
    stem = "hf-" + re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name)[:40]
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not {name, f"{name}-tokenizer"} & set(taken))


def _check_inputs(stage: _Draft, stages: dict[str, _Draft], tables: dict[str, Any]) -> list[Fault]:
    faults = []
    where = f"stages.{stage.name}.inputs"
    for parameter, references in stage.inputs.items():
        wanted = stage.kind.inputs.get(parameter)
        if wanted is None:
            near = difflib.get_close_matches(parameter, stage.kind.inputs)
            known = ", ".join(f"{name} ({each})" for name, each in stage.kind.inputs.items()) or "nothing"
            hint = f"did you mean {near[0]!r}?" if near else f"{stage.kind.uses} takes {known}"
            faults.append(Fault(f"{where}.{parameter}", f"unknown input; {hint}"))
            continue
        if not references:
            faults.append(Fault(f"{where}.{parameter}", "is an empty list; name at least one"))
        if len(references) > 1 and not wanted.many:
            faults.append(
                Fault(f"{where}.{parameter}", f"has {len(references)} references; {stage.kind.uses} takes one {wanted.artifact.kind}")
            )
        for reference in references:
            fault = _check_reference(reference, wanted, stages, tables)
            if fault:
                faults.append(Fault(f"{where}.{parameter}", fault))
    for parameter, wanted in stage.kind.inputs.items():
        if parameter not in stage.inputs and not wanted.optional:
            fitting = [each.name for each in stages.values() if issubclass(each.kind.output, wanted.artifact) and each is not stage]
            hint = f"{parameter} = ['{fitting[0]}'] would fit" if fitting else f"no stage here makes {wanted.artifact.kind}"
            faults.append(Fault(f"{where}.{parameter}", f"is missing; {stage.kind.uses} needs {wanted}; {hint}"))
    return faults


def _check_files(stages: dict[str, _Draft]) -> list[Fault]:
    """A user's files are imported by their names, on every machine: two files of one name would be taken for each other."""
    faults: dict[str, str] = {}  # what is wrong to the first place that it was met at
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
                    faults.setdefault(f"{file} and {known[name]} have one name; call one something else", where)
    return [Fault(where, what) for what, where in faults.items()]


def _check_reference(reference: str, wanted: Input, stages: dict[str, _Draft], tables: dict[str, Any]) -> str | None:
    try:
        parsed = parse(reference)
    except ValueError as error:
        return str(error)
    if not isinstance(parsed, StageName):
        # a folder that can be imported was replaced by a stage before; which artifact another reference stands for, the store answers
        return f"{reference!r} is a model or a tokenizer, expected {wanted.artifact.kind}" if isinstance(parsed, HfFolder) else None
    if reference not in tables:
        near = difflib.get_close_matches(reference, tables)
        return f"there is no stage {reference!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(tables)}")
    if reference in stages and not issubclass(stages[reference].kind.output, wanted.artifact):
        return f"{reference!r} makes {stages[reference].kind.output.kind}, wanted {wanted.artifact.kind}"
    return None


def _order(stages: dict[str, _Draft]) -> tuple[list[str], list[str]]:
    """Stages after what they read, in the file's order where that leaves a choice; or a cycle's names, the first one twice."""
    order: list[str] = []
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in order:
            return []
        if name in path:
            return [*path[path.index(name) :], name]
        path.append(name)
        for above in stages[name].upstream():
            if above in stages and (cycle := visit(above)):
                return cycle
        path.pop()
        order.append(name)
        return []

    for name in stages:
        if cycle := visit(name):
            return order, cycle
    return order, []
