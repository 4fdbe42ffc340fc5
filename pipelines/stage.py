"""What a stage is given: `StageContext`, the one argument through which it reaches the machines and the store.

`pipelines.run.execute.Context` is what a stage gets; it is in no key, so an edit there reruns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

from gpt.settings import Settings
from pipelines.artifacts import Artifact, Model

A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True)
class Source:
    """A file of the outside world that a stage reads; its content is part of the stage's key."""

    name: str
    """How records and rejects call it: relative to the pipeline's `data`."""
    path: Path
    sha256: str = ""
    part: int = 0
    """Which of a mixture's sources named it."""


class StageConfig(Settings):
    """Base of every kind's Config."""

    def sources(self, data: Path) -> list[Source]:
        """The outside files that this stage will read, in order; ValueError says what is missing. `data` is the pipeline's data folder."""
        return []


class StageFailure(Exception):
    """A failure that a person can mend: its message is printed as it is, without a traceback."""


def require_role(model: Model, role: str, wanted: str) -> None:
    """StageFailure where the model has another role; `wanted` says who wants which: "sft wants a policy, such as pretrain makes"."""
    if model.metadata["role"] != role:
        raise StageFailure(f"model {model.digest[:12]} has the role {model.metadata['role']}; {wanted}")


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
    """The stage's side of the line."""

    seed: int
    output: Path
    """An empty folder; `publish` makes an artifact of what is in it."""
    device: str
    """"cuda" for a stage that holds a GPU, else "cpu"; a gang's ranks have their own."""
    sources: list[Source]
    """What `config.sources` named, with the content's sha256 that the key holds."""

    def open(self, source: Source) -> BinaryIO:
        """Open a source; the bytes read are hashed, and the stage fails if they are not those that were planned."""
        ...

    def function(self, reference: str) -> Callable[..., Any]:
        """What a setting of type `UserFunction` names: `stage.function(config.reward)`. Other processes can import it, so it may be handed
        to `gang` and pickled. ValueError where no such setting has this value.
        """
        ...

    def progress(self, done: int, total: int, unit: str) -> None:
        """How far the stage is, for people."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """A point of a curve (names are area/name_unit)."""
        ...

    def figure(self, name: str, value: float) -> None:
        """A number for the action record, the tables and the gates: `eval/bits_per_byte`."""
        ...

    def gang(self, function: Callable[..., dict[str, Any] | None], *arguments: Any) -> dict[str, Any]:
        """Run `function(rank, *arguments)` on every rank of this stage's gang; what rank 0 returned."""
        ...

    def publish(self, kind: type[A], **metadata: Any) -> A:
        """Freeze `output` as an artifact of this kind. Metadata is part of its digest: no clocks, places or makers."""
        ...
