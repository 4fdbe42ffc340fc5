"""Roles, chat formats, tokenizers and shapes of models, followed along the graph before anything runs.

A kind states in its module what it needs of its models and what it makes: `MODELS = Models(needs={"policy": "policy"}, makes="policy")`.
What is certain is checked while the file is read; the rest (a user's own kind, an artifact that doesn't exist yet) is left to the stage,
which checks the artifacts that it is given. A tokenizer passes from what a stage reads to what it makes, and our kinds take only one. So
does a model's shape, which a pretrain stage sets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import ValidationError

from gpt.hf_folder import check_exportable
from gpt.settings import GPTConfig, ModelShape, PretrainSettings, Settings
from pipelines.artifacts import HfCheckpoint, Model, Tokenizer, Tokens
from pipelines.plan.config import Fault
from pipelines.plan.inputs import Reader
from pipelines.plan.references import IMPORTS, names_stage
from pipelines.stage import Models, Role


@dataclass(frozen=True)
class TokenizerId:
    """What identifies a tokenizer: two of one kind are the same tokenizer if they are equal, two of different kinds can't be compared."""

    kind: Literal["digest", "recipe"]
    """A recipe is what the file says of how the tokenizer is made."""
    value: str
    name: str = field(compare=False)
    """For messages."""


@dataclass(frozen=True)
class KnownShape:
    """A model's shape and where it was set: "stages.pretrain (preset = 'llama-nano')", or the artifact that has it."""

    shape: ModelShape
    source: str


@dataclass(frozen=True)
class Traits:
    """What is known of an artifact; None where that is unknown."""

    role: Role | None = None
    chat: bool | None = None
    tokenizer: TokenizerId | None = None
    shape: KnownShape | None = None


class CheckedStage(Reader, Protocol):
    """A stage whose settings are valid."""

    @property
    def config(self) -> Settings: ...
    def semantic(self) -> dict[str, Any]: ...


def traits_of(digest: str, kind: str, metadata: Mapping[str, Any], config: bytes | None) -> Traits:
    """The traits of an artifact in the store; `config` is a model's config.json."""
    tokenizer = digest if kind == Tokenizer.kind else metadata.get("tokenizer")
    known = TokenizerId("digest", tokenizer, f"tokenizer {tokenizer[:12]}") if isinstance(tokenizer, str) else None
    if kind != Model.kind:
        return Traits(tokenizer=known)
    try:
        shape = KnownShape(GPTConfig.model_validate_json(config or b""), f"artifact {digest[:12]}")
    except ValidationError:
        shape = None  # the stage that loads it says what is wrong
    return Traits(metadata.get("role"), bool(metadata.get("chat_format")), known, shape)


def model_faults(stages: Mapping[str, CheckedStage], outside: Mapping[str, Traits]) -> list[Fault]:
    """Check what is known of models and tokenizers along the graph.

    `stages` are in order, and `outside` has the traits of references that aren't stages and of stages that an artifact replaces.
    """
    known = dict(outside)
    recipes: dict[str, str] = {}
    faults: list[Fault] = []
    for name, stage in stages.items():
        recipes[name] = _recipe(stage, recipes)
        if stage.kind.file is not None or name in outside:  # a user's kind may do anything; a replaced stage reads nothing
            known.setdefault(name, Traits())
            continue
        faults += _role_faults(stage, known) + _tokenizer_faults(stage, known) + _shape_faults(stage, known)
        models = stage.kind.models or Models()
        known[name] = Traits(models.makes, models.makes_chat, _tokenizer_made(stage, known, recipes), _shape_made(stage, known))
    return faults


def _role_faults(stage: Reader, known: Mapping[str, Traits]) -> list[Fault]:
    models = stage.kind.models or Models()
    exported: Mapping[str, Role] = dict.fromkeys(_models_read(stage), "policy") if issubclass(stage.kind.output, HfCheckpoint) else {}
    faults = []
    for parameter, role in {**exported, **models.needs}.items():
        for reference in stage.inputs.get(parameter, ()):
            found = known.get(reference, Traits())
            where = f"stages.{stage.name}.inputs.{parameter}"
            fitting = [
                f", such as {name!r}"
                for name, each in known.items()
                if names_stage(name) and each.role == role and (each.chat or parameter not in models.needs_chat)
            ]
            hint = fitting[-1] if fitting else ""
            if found.role not in (None, role):
                faults.append(Fault(where, f"{reference!r} is a {_shown(found.role)}, expected a {_shown(role)}{hint}"))
            elif parameter in models.needs_chat and found.chat is False:
                expected = f"expected a policy that an sft stage made{hint}"
                faults.append(Fault(where, f"{reference!r} has no chat format, so it can't end a turn; {expected}"))
    return faults


def _tokenizer_faults(stage: Reader, known: Mapping[str, Traits]) -> list[Fault]:
    first: dict[str, tuple[str, TokenizerId]] = {}
    """Kind of id to the first reference whose tokenizer is known so."""
    faults = []
    for parameter, reference in _carriers(stage):
        tokenizer = known.get(reference, Traits()).tokenizer
        if tokenizer is None:
            continue
        other, expected = first.setdefault(tokenizer.kind, (reference, tokenizer))
        if tokenizer != expected:
            faults.append(
                Fault(
                    f"stages.{stage.name}.inputs.{parameter}",
                    f"{reference!r} has {tokenizer.name}, but {other!r} has {expected.name}; expected one tokenizer for all inputs of "
                    f"{stage.kind.uses}",
                )
            )
    return faults


def _shape_faults(stage: CheckedStage, known: Mapping[str, Traits]) -> list[Fault]:
    """Models of a shape that a stage can't export, or can't train further."""
    faults = []
    for parameter in _models_read(stage):
        for reference in stage.inputs.get(parameter, ()):
            found = known.get(reference, Traits()).shape
            where = f"stages.{stage.name}.inputs.{parameter}"
            if found is None:
                continue
            if issubclass(stage.kind.output, HfCheckpoint):
                try:
                    check_exportable(found.shape)
                except ValueError as error:
                    remedy = f"use a model of such a preset, or drop the export: --set stages.{stage.name}=false"
                    faults.append(Fault(where, f"{reference!r} has the shape of {found.source}; {error}; {remedy}"))
            if isinstance(stage.config, PretrainSettings) and (differing := _differing(stage.config.shape(), found.shape)):
                faults.append(
                    Fault(
                        where,
                        f"{reference!r} has the shape of {found.source}: {differing}; set the same shape here, or start without a model",
                    )
                )
    return faults


def _differing(expected: ModelShape, found: ModelShape) -> str:
    """How two shapes differ: "expected n_layer = 2, found 4". Dropout may differ, since it is no part of the weights."""
    names = [name for name in ModelShape.model_fields if name != "dropout" and getattr(expected, name) != getattr(found, name)]
    return "; ".join(f"expected {name} = {getattr(expected, name)!r}, found {getattr(found, name)!r}" for name in names)


def _shape_made(stage: CheckedStage, known: Mapping[str, Traits]) -> KnownShape | None:
    if isinstance(stage.config, PretrainSettings):
        return KnownShape(stage.config.shape(), f"stages.{stage.name} (preset = {stage.config.preset!r})")
    if not issubclass(stage.kind.output, Model):
        return None
    first = next((reference for parameter in _models_read(stage) for reference in stage.inputs.get(parameter, ())), "")
    return known.get(first, Traits()).shape


def _models_read(stage: Reader) -> list[str]:
    """The parameters that take a model; the first one is what a training stage starts from."""
    return [name for name, each in stage.kind.inputs.items() if issubclass(each.artifact, Model)]


def _tokenizer_made(stage: Reader, known: Mapping[str, Traits], recipes: Mapping[str, str]) -> TokenizerId | None:
    if issubclass(stage.kind.output, Tokenizer):
        if stage.kind.uses == IMPORTS["tokenizer"]:
            return None  # it may be one that was made here and exported
        return TokenizerId("recipe", recipes[stage.name], f"the tokenizer of stage {stage.name!r}")
    if not issubclass(stage.kind.output, Tokens | Model):
        return None
    found = [known.get(reference, Traits()).tokenizer for _, reference in _carriers(stage)]
    return next((each for each in found if each), None)


def _carriers(stage: Reader) -> list[tuple[str, str]]:
    """The inputs that have or are a tokenizer: parameter and reference."""
    inputs = {name: each for name, each in stage.kind.inputs.items() if issubclass(each.artifact, Tokenizer | Tokens | Model)}
    return [(name, reference) for name in inputs for reference in stage.inputs.get(name, ())]


def _recipe(stage: CheckedStage, recipes: Mapping[str, str]) -> str:
    """What a stage's key is made of, as far as the file says it: stages of one recipe make the same artifact."""
    settings = stage.semantic()
    # a tokenizer of bytes is the same whatever text it was given
    inputs = {} if settings.get("algorithm") == "bytes" else stage.inputs
    above = {name: [recipes[each] if names_stage(each) else each for each in references] for name, references in inputs.items()}
    return json.dumps([stage.kind.uses, settings, above], sort_keys=True)


def _shown(role: str | None) -> str:
    return "reward model" if role == "reward" else str(role)
