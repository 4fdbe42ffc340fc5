"""Stage kinds, read from the signatures of their functions.

A kind is a function: `def sft(config: SftConfig, policy: Model, conversations: Conversations, stage: StageContext) -> Model`.
The parameter annotated with a Settings class is its config, the one annotated StageContext is its access to the machines, and every other
parameter is an input: its name is the input's name, its annotation the artifact type. `list[...]` takes several artifacts, `| None` makes
the input optional, and the return annotation is what the kind makes. Our kinds are the files of `pipelines/stages`; a user's own function
works as well: `uses = "./clean.py:clean"`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt.settings import Settings, TrainSettings
from pipelines.artifacts import Artifact
from pipelines.plan.environment import ROOT
from pipelines.plan.user_code import UserCode, load_function
from pipelines.stage import Models, StageConfig, StageContext

ENGINES = {"torch": "gpt.torch_engine:TorchEngine", "deepspeed": "cluster.deepspeed_engine:DeepSpeedEngine"}
"""The engines that a training stage may run on. The gang loads one by its name; the code of both is in the key of every training stage."""


class NoConfig(StageConfig):
    """The settings of a kind that has none."""


@dataclass(frozen=True)
class Input:
    """What a kind takes for one parameter."""

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
    """The user's file that defines it; None for our own kinds."""
    models: Models | None = None
    """What it needs of its models and what it makes, if its module says so in `MODELS`."""

    def trains(self) -> bool:
        """Whether it hands a function to a gang: such a kind's config has the settings of a training loop."""
        return issubclass(self.config, TrainSettings)

    def name(self) -> str:
        """The function's name in its module."""
        return self.uses.rpartition(":")[2]

    def user_code(self) -> UserCode | None:
        """The user's function that it is; None for our own kinds."""
        return UserCode("uses", self.uses, self.file) if self.file else None

    def entries(self) -> list[tuple[str, str]]:
        """Module and name of the definitions from which `Code` starts: the function and, if it trains, the engines."""
        user_code = self.user_code()
        function = user_code.entry() if user_code else (self.function.__module__, self.name())
        engines = [tuple(engine.split(":")) for engine in ENGINES.values()] if self.trains() else []
        return [function, *engines]  # type: ignore[list-item]


def known_kinds() -> list[str]:
    """The names of our own kinds."""
    return sorted(each.stem for each in (ROOT / "pipelines" / "stages").glob("*.py") if each.stem != "__init__")


def load_kind(uses: str, folder: Path) -> Kind:
    """Return the kind that `uses` names; ValueError says what is wrong with it. A user's file is executed, as an import is."""
    if ":" in uses:
        function, file = load_function(uses, folder)
        return read_signature(uses, function, file)
    known = known_kinds()
    if uses not in known:
        near = difflib.get_close_matches(uses, known)
        hint = f"did you mean {near[0]!r}?" if near else f"the kinds are {', '.join(known)}; name your own function as './file.py:function'"
        raise ValueError(f"there is no stage kind {uses!r}; {hint}")
    module = importlib.import_module(f"pipelines.stages.{uses}")
    return replace(read_signature(uses, getattr(module, uses), None), models=getattr(module, "MODELS", None))


def read_signature(uses: str, function: Callable[..., Any], file: Path | None) -> Kind:
    """Read a kind from its function's signature; ValueError names the parameter or annotation that doesn't fit."""
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
                f"{uses!r}: parameter {name!r} of {function.__name__} can't be passed by name, but a kind's parameters are; "
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
                "expected a Settings class, StageContext, or an artifact type: Documents, list[Documents], Model | None"
            )
    for role, found in (("Settings class", list(configs)), ("StageContext", contexts)):
        if len(found) > 1:
            raise ValueError(f"{uses!r}: {function.__name__} has {len(found)} parameters with a {role}: {', '.join(found)}; expected one")
    output = hints.get("return")
    if not (isinstance(output, type) and issubclass(output, Artifact)):
        raise ValueError(
            f"{uses!r}: {function.__name__} is annotated to return {output!r}, expected the artifact type that it makes: `-> Documents`"
        )
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
