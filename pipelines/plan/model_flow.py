"""Roles, chat formats and tokenizers of models, followed along the graph before anything runs.

A kind states in its module what it needs of its models and what it makes: `MODELS = Models(needs={"policy": "policy"}, makes="policy")`.
What is certain is checked while the file is read; the rest (a user's own kind, an artifact that doesn't exist yet) is left to the stage,
which checks the artifacts that it is given. A tokenizer passes from what a stage reads to what it makes, and our kinds take only one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.artifacts import Model, Tokenizer, Tokens
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
class Traits:
    """What is known of an artifact; None where that is unknown."""

    role: Role | None = None
    chat: bool | None = None
    tokenizer: TokenizerId | None = None


def traits_of(digest: str, kind: str, metadata: Mapping[str, Any]) -> Traits:
    """The traits of an artifact in the store."""
    tokenizer = digest if kind == Tokenizer.kind else metadata.get("tokenizer")
    known = TokenizerId("digest", tokenizer, f"tokenizer {tokenizer[:12]}") if isinstance(tokenizer, str) else None
    if kind != Model.kind:
        return Traits(tokenizer=known)
    return Traits(metadata.get("role"), bool(metadata.get("chat_format")), known)


def model_faults(stages: Mapping[str, Reader], settings: Mapping[str, Any], outside: Mapping[str, Traits]) -> list[Fault]:
    """Check what is known of models and tokenizers along the graph.

    `stages` are in order, `settings` has what is in their keys, and `outside` has the traits of references that aren't stages and of
    stages that an artifact replaces.
    """
    known = dict(outside)
    recipes: dict[str, str] = {}
    faults: list[Fault] = []
    for name, stage in stages.items():
        recipes[name] = _recipe(stage, settings[name], recipes)
        if stage.kind.file is not None or name in outside:  # a user's kind may do anything; a replaced stage reads nothing
            known.setdefault(name, Traits())
            continue
        faults += _role_faults(stage, known) + _tokenizer_faults(stage, known)
        models = stage.kind.models or Models()
        known[name] = Traits(models.makes, models.makes_chat, _tokenizer_made(stage, known, recipes))
    return faults


def _role_faults(stage: Reader, known: Mapping[str, Traits]) -> list[Fault]:
    models = stage.kind.models or Models()
    faults = []
    for parameter, role in models.needs.items():
        for reference in stage.inputs.get(parameter, ()):
            found = known.get(reference, Traits())
            where = f"stages.{stage.name}.inputs.{parameter}"
            if found.role not in (None, role):
                faults.append(Fault(where, f"{reference!r} is a {_shown(found.role)}, expected a {_shown(role)}"))
            elif parameter in models.needs_chat and found.chat is False:
                faults.append(
                    Fault(where, f"{reference!r} has no chat format, so it can't end a turn; expected a policy that an sft stage made")
                )
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


def _recipe(stage: Reader, settings: Mapping[str, Any], recipes: Mapping[str, str]) -> str:
    """What a stage's key is made of, as far as the file says it: stages of one recipe make the same artifact."""
    # a tokenizer of bytes is the same whatever text it was given
    inputs = {} if settings.get("algorithm") == "bytes" else stage.inputs
    above = {name: [recipes[each] if names_stage(each) else each for each in references] for name, references in inputs.items()}
    return json.dumps([stage.kind.uses, settings, above], sort_keys=True)


def _shown(role: str | None) -> str:
    return "reward model" if role == "reward" else str(role)
