"""The pipeline file's stages as a checked graph, read off the signatures of their kinds.

A kind is a function: `def sft(config: SftConfig, policy: Model, conversations: Conversations, stage: StageContext) -> Model`.
The parameter that is a Settings class is its config, the one that is a StageContext its way to the machines; of the others the name is
the input's name and the annotation the artifact's kind; `list[...]` takes several, `| None` is optional; the return annotation is what
it makes. Anyone's function serves as well: `uses = "./clean.py:clean"` names a file beside the TOML, and so does a setting of type
`UserFunction`: `reward = "./reward.py:score"`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import itertools
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpt.settings import OPERATIONAL, Settings, TrainSettings, UserFunction
from pipelines.artifacts import Artifact
from pipelines.plan.code import PACKAGES, Code
from pipelines.plan.config import Fault, Gate, Loaded, Resources, validate
from pipelines.stage import Source, StageConfig, StageContext

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds our packages."""

DIGEST = re.compile(r"sha256:([0-9a-f]{8,64})")
RUN_STAGE = re.compile(r"run:([A-Za-z0-9_.-]+)/([A-Za-z0-9_-]+)")
MODEL_ALIAS = re.compile(r"model:([A-Za-z0-9_-]+)@([A-Za-z0-9_-]+)")
BARE_DIGEST = re.compile(r"([0-9a-f]{12,64})")
HF_FOLDER = re.compile(r"hf:(.+)")
USER_MODULE = "gptline_user_"
"""What a user's file is called as a module begins so."""
ARTIFACTS = "sha256:<at least 8 digits>, run:<id>/<stage>, model:<pipeline>@newest or hf:<folder>"
REFERENCES = f"a stage's name, {ARTIFACTS}"
ENGINES = {"torch": "gpt.torch_engine:TorchEngine", "deepspeed": "cluster.deepspeed_engine:DeepSpeedEngine"}
"""The engines that a training stage may run on: by name for the gang, and all of them in the key of every training stage."""
IMPORTS = {"model": "import_hf", "tokenizer": "import_hf_tokenizer"}
"""The kinds that hf:<folder> stands for, by the artifact that is wanted of it."""


class NoConfig(StageConfig):
    """The settings of a kind that has none."""


@dataclass(frozen=True)
class Input:
    """What a kind takes under one parameter's name."""

    artifact: type[Artifact]
    many: bool
    optional: bool

    def __str__(self) -> str:
        return f"{'several ' if self.many else ''}{self.artifact.kind}{', optional' if self.optional else ''}"


@dataclass(frozen=True)
class Kind:
    """A stage's function and what its signature says."""

    uses: str
    function: Callable[..., Artifact]
    config: type[Settings]
    config_parameter: str | None
    stage_parameter: str | None
    inputs: dict[str, Input]
    output: type[Artifact]
    file: Path | None
    """A user's own file; None for ours."""

    def trains(self) -> bool:
        """True for kinds that hand a function to a gang: their config has a loop's settings."""
        return issubclass(self.config, TrainSettings)

    def name(self) -> str:
        """What the function is called in its module."""
        return self.uses.rpartition(":")[2]

    def entry(self) -> tuple[str, str]:
        """Module and name, as `fingerprint` follows them. A user's module is known by its file's stem."""
        return (self.file.stem if self.file else self.function.__module__, self.name())

    def entries(self) -> list[tuple[str, str]]:
        """What the key's code starts from: the function, and for a training kind the engines too."""
        engines = [tuple(engine.split(":")) for engine in ENGINES.values()] if self.trains() else []
        return [self.entry(), *engines]  # type: ignore[list-item]


@dataclass(frozen=True)
class UserCode:
    """A function of the user's own that a stage's table names: `UserCode("reward", "./reward.py:score", Path("/line/reward.py"))`."""

    setting: str
    """What names it: "uses", or a setting of type `UserFunction`."""
    reference: str
    file: Path

    def entry(self) -> tuple[str, str]:
        """Module and name, as `fingerprint` follows them."""
        return self.file.stem, self.reference.rpartition(":")[2]


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
        return [each for references in self.inputs.values() for each in references if ":" not in each]

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
    folders = {name: reference for name, reference in use.items() if HF_FOLDER.fullmatch(reference) and name in drafts}
    replaced = frozenset(each for name in folders for each in drafts[name].upstream())
    faults += _add_imports(drafts, folders, loaded)
    for draft in drafts.values():
        faults += _check_inputs(draft, drafts, {**loaded.file.stages, **drafts})
    faults += _check_files(drafts)
    order, cycle = _order(drafts)
    if cycle:
        faults.append(Fault("stages", f"{' reads '.join(cycle)}: a cycle; one of these inputs must come from elsewhere"))
    if faults:
        raise loaded.error(faults)
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
        return [each for references in self.inputs.values() for each in references if ":" not in each]

    def stage(self) -> Stage:
        assert self.config is not None
        assert self.resources is not None
        return Stage(self.name, self.kind, self.config, self.inputs, self.resources, self.sources, self.user_code, self.gates)


def load_kind(uses: str, folder: Path) -> Kind:
    """The kind that `uses` names; ValueError says what is wrong with it. A user's file is executed, as an import is."""
    if ":" not in uses:
        known = sorted(each.stem for each in (ROOT / "pipelines" / "stages").glob("*.py") if each.stem != "__init__")
        if uses not in known:
            near = difflib.get_close_matches(uses, known)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}; your own function is './file.py:function'"
            raise ValueError(f"no kind is called {uses!r}; {hint}")
        module = importlib.import_module(f"pipelines.stages.{uses}")
        return read_signature(uses, getattr(module, uses), None)
    function, file = load_function(uses, folder)
    return read_signature(uses, function, file)


def load_function(reference: str, folder: Path) -> tuple[types.FunctionType, Path]:
    """The user's function that "./file.py:function" names, and its file, executed as an import is; ValueError says what is wrong."""
    path, colon, name = reference.rpartition(":")
    if not colon:
        raise ValueError(f"is {reference!r}, wanted a function of your own, such as './file.py:function'")
    file = (folder / path).resolve()
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"{reference!r}: there is no Python file {file}")
    if file.stem in PACKAGES:
        raise ValueError(f"{reference!r}: {file.name} has the name of a package of gptline; call the file something else")
    module = load_user_module(file)
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        known = [name for name, each in vars(module).items() if inspect.isfunction(each) and each.__module__ == module.__name__]
        what = "class" if inspect.isclass(function) else type(function).__name__
        found = f"no function {name!r}" if function is None else f"{name!r} ({what}), which is no function"
        raise ValueError(f"{reference!r}: {path} has {found}; it has {', '.join(known) or 'none'}")
    return function, file


def load_user_module(file: Path) -> types.ModuleType:
    """Import a file that is no part of the project, under a name that can shadow nobody's."""
    name = f"{USER_MODULE}{file.stem}"
    module = sys.modules.get(name)
    if module is not None and module.__file__ == str(file):
        return module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last: its neighbours can be imported, and shadow nothing
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):  # no fault of the file
            raise
        raise ValueError(f"{file} can't be imported: {type(error).__name__}: {error}") from error
    return module


def read_signature(uses: str, function: Callable[..., Any], file: Path | None) -> Kind:
    """What a kind's signature says; ValueError names the parameter that says nothing."""
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # an annotation may be any expression
        raise ValueError(
            f"{uses!r}: an annotation can't be resolved: {type(error).__name__}: {error}; import what it names at the top of the file"
        ) from error
    contexts: list[str] = []
    configs: dict[str, type[Settings]] = {}
    inputs: dict[str, Input] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name)
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(
                f"{uses!r}: parameter {name!r} of {function.__name__} can't be given by its name, as a kind's parameters are; "
                "remove the '*' before it or the '/' after it"
            )
        if hint is StageContext:
            contexts.append(name)
        elif isinstance(hint, type) and issubclass(hint, Settings):
            configs[name] = hint
        elif (read := _read_input(hint)) is not None:
            inputs[name] = read
        else:
            raise ValueError(
                f"{uses!r}: parameter {name!r} of {function.__name__} is annotated {hint!r}; "
                "wanted a Settings class, StageContext, or a kind of pipelines.artifacts: Documents, list[Documents], Model | None"
            )
    for what, found in (("Settings class", list(configs)), ("StageContext", contexts)):
        if len(found) > 1:
            raise ValueError(f"{uses!r}: {function.__name__} has {len(found)} parameters with a {what}: {', '.join(found)}; a kind has one")
    output = hints.get("return")
    if not (isinstance(output, type) and issubclass(output, Artifact)):
        raise ValueError(f"{uses!r}: {function.__name__} must say which artifact it returns, such as `-> Documents`; it says {output!r}")
    config_parameter, config = next(iter(configs.items()), (None, NoConfig))
    return Kind(uses, function, config, config_parameter, next(iter(contexts), None), inputs, output, file)


def _read_input(hint: Any) -> Input | None:
    optional = many = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [each for each in typing.get_args(hint) if each is not type(None)]
        if len(rest) != 1:
            return None
        optional, hint = True, rest[0]
    if typing.get_origin(hint) is list and typing.get_args(hint):
        many, hint = True, typing.get_args(hint)[0]
    return Input(hint, many, optional) if isinstance(hint, type) and issubclass(hint, Artifact) else None


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
    config, found = validate(kind.config, table, where)
    faults += found
    if config is not None:
        config, found = _as_recorded(config, where)
        faults += found
    user_code, found = _read_user_code(kind, config, loaded.folder(name), where)
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


def _read_user_code(kind: Kind, config: Settings | None, folder: Path, where: str) -> tuple[list[UserCode], list[Fault]]:
    found = [UserCode("uses", kind.uses, kind.file)] if kind.file else []
    faults = []
    for setting, reference in _user_functions(config, ""):
        try:
            function, file = load_function(reference, folder)
        except ValueError as error:
            faults.append(Fault(f"{where}.{setting}", str(error)))
            continue
        module = f"{USER_MODULE}{file.stem}"
        if function.__module__ != module or getattr(sys.modules[module], function.__qualname__, None) is not function:
            found_there = f"{function.__module__.removeprefix(USER_MODULE)}.{function.__qualname__}"
            wanted = f"wanted a `def` at the top of {file.name}, which other processes import by its name"
            faults.append(Fault(f"{where}.{setting}", f"{reference!r} is {found_there}; {wanted}"))
            continue
        found.append(UserCode(setting, reference, file))
    for each in found[1:]:
        if each.file.parent != found[0].file.parent:
            faults.append(
                Fault(
                    f"{where}.{each.setting}",
                    f"{each.reference!r} and {found[0].reference!r} lie in two folders; a stage's own code is imported from one: "
                    "put the files side by side",
                )
            )
    return found, faults


def _user_functions(value: Any, setting: str) -> Iterator[tuple[str, str]]:
    """The settings of type `UserFunction`, at any depth: ("reward", "./reward.py:score")."""
    if isinstance(value, UserFunction):
        yield setting, str(value)
    elif isinstance(value, Settings | dict):
        for name, each in value if isinstance(value, Settings) else value.items():  # dict(settings) fails on a setting called `keys`
            yield from _user_functions(each, f"{setting}.{name}" if setting else str(name))
    elif isinstance(value, list | tuple | set | frozenset):
        for index, each in enumerate(value):
            yield from _user_functions(each, f"{setting}.{index}")


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
            if wanted is not None and any(map(HF_FOLDER.fullmatch, references)) and (kind := wanted.artifact.kind) in IMPORTS:
                where = f"stages.{draft.name}.inputs.{parameter}"
                draft.inputs[parameter] = [add(kind, each, where) if HF_FOLDER.fullmatch(each) else each for each in references]
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
    if ":" in reference:
        if any(form.fullmatch(reference) for form in (DIGEST, RUN_STAGE, MODEL_ALIAS)):
            return None  # which artifact it is, the store tells
        if HF_FOLDER.fullmatch(reference):
            return f"{reference!r} is a model or a tokenizer, wanted {wanted.artifact.kind}"
        return f"{reference!r} is no reference; wanted {REFERENCES}"
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
