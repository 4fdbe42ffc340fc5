"""What a stage's author imports: `StageConfig`, and `StageContext`, the argument through which a stage reaches machines and store.

The runner passes an implementation of StageContext that is part of no stage's key, so an edit there reruns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

from gpt.settings import Settings
from pipelines.artifacts import Artifact, Model

A = TypeVar("A", bound=Artifact)
R = TypeVar("R")


@dataclass(frozen=True)
class Source:
    """A file outside the store that a stage reads. Its content is part of the stage's key."""

    name: str
    """Its name in records and rejects, relative to the pipeline's `data`."""
    path: Path
    sha256: str = ""
    part: int = 0
    """Index of the mixture's source that named it."""


class StageConfig(Settings):
    """Base class of every stage kind's Config."""

    def sources(self, data: Path) -> list[Source]:
        """List the outside files that this stage will read, in order. ValueError says what is missing; `data` is the data folder."""
        return []


class StageFailure(Exception):
    """A failure that the user can fix. Its message is printed as it is, without a traceback."""


def require_role(model: Model, role: str, reason: str) -> None:
    """Raise StageFailure if the model has another role. `reason` names the input: "sft trains a policy, such as pretrain makes"."""
    if model.metadata["role"] != role:
        raise StageFailure(f"model {model.digest[:12]}: expected role {role}, found {model.metadata['role']}; {reason}")


def require_same_tokenizer(first: Artifact, *others: Artifact) -> None:
    """Raise StageFailure unless the tokenizer of every other model or tokens artifact is that of the first."""
    expected = first.metadata["tokenizer"]
    for other in others:
        found = other.metadata["tokenizer"]
        if found != expected:
            raise StageFailure(
                f"{other.kind} {other.digest[:12]}: expected tokenizer {expected[:12]}, the one of {first.kind} {first.digest[:12]}, "
                f"found {found[:12]}; token ids mean nothing under another tokenizer, so rebuild one of the two with the other's"
            )


Role = Literal["policy", "reward"]


@dataclass(frozen=True)
class Models:
    """What a kind needs of its models and what it makes, for checks while the pipeline file is read: the module's `MODELS`.

    `Models(needs={"policy": "policy", "reward_model": "reward"}, needs_chat=("policy",), makes="policy", makes_chat=True)`
    """

    needs: Mapping[str, Role] = field(default_factory=dict)
    """Input to the role that its model must have."""
    needs_chat: tuple[str, ...] = ()
    """Inputs whose model must have a chat format."""
    makes: Role | None = None
    makes_chat: bool | None = None
    """Whether what it makes has a chat format; None if that depends."""


class StageContext(Protocol):
    """What a stage may ask of the runner."""

    seed: int
    output: Path
    """A folder, empty at first. `publish` turns its content into an artifact."""
    device: str
    """"cuda" for a stage that holds a GPU, else "cpu"; a gang's ranks have their own device."""
    sources: list[Source]
    """What `config.sources` listed, each with its content's sha256, which is part of the key."""

    def open(self, source: Source) -> BinaryIO:
        """Open a source. The bytes read are hashed, and the stage fails if they differ from those that were planned."""
        ...

    def function(self, reference: str) -> Callable[..., Any]:
        """Load the function that a setting of type `UserFunction` names: `stage.function(config.reward)`. Other processes can import it,
        so it may be pickled and passed to `gang`. ValueError if no such setting has this value.
        """
        ...

    def progress(self, done: int, total: int, unit: str) -> None:
        """Show how far the stage is. This is also where a stage that was asked to stop ends."""
        ...

    def note(self, text: str) -> None:
        """Show a sentence to the user, for example that something was left out."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record a point of a curve for each metric (names are area/name_unit)."""
        ...

    def figure(self, name: str, value: float) -> None:
        """Record a number for the action record, the tables and the gates: `eval/bits_per_byte`."""
        ...

    def gang(self, function: Callable[..., R | None], *arguments: Any) -> R:
        """Run `function(rank, *arguments)` on every rank of this stage's gang, and return what rank 0 returned.

        The function returns None if and only if it was stopped; anything else must be picklable.
        """
        ...

    def publish(self, kind: type[A], **metadata: Any) -> A:
        """Freeze `output` as an artifact of this type. Metadata is part of its digest, so it holds no clocks, paths or host names."""
        ...
