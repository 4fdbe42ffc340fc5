"""The record of one execution of a stage: what went in, what came out, who ran it, where and how."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from cluster.events import Curves
from gpt.settings import Settings

SCHEMA = 1


class Action(Settings):
    """One execution of a stage that published an artifact. Lineage is the graph of these records.

    Versions of gptline read each other's records: unknown fields are ignored.
    """

    model_config = ConfigDict(
        extra="ignore",
        ser_json_inf_nan="constants",  # a loss of NaN is recorded as NaN
        serialize_by_alias=True,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=True,
    )

    schema_number: int = Field(default=SCHEMA, alias="schema")  # pydantic has a method called `schema`
    """Raised when the meaning of a field changes."""
    key: str
    number: int = 0
    """Assigned by the store: 1 for the first execution under a key, then one more for each rerun."""
    pipeline: str
    stage: str
    kind: str
    """Name of the function that ran: `pretrain`, or `python_docs.py:documents`."""
    run: str
    leaves: dict[str, Any]
    """What the key is the digest of: `config.lr`, `input.tokens.0`, `code.gpt.model:GPT`, `source.books/a.jsonl`."""
    inputs: dict[str, list[str]]
    """Parameter name to the digests passed to it."""
    output: str
    output_kind: str
    figures: dict[str, float] = Field(default_factory=dict)
    curves: Curves = Field(default_factory=dict)
    operational: dict[str, Any] = Field(default_factory=dict)
    """Settings outside the key that it ran with: ranks, micro_batch_size, zero_stage."""
    versions: dict[str, str] = Field(default_factory=dict)
    restarts: int = 0
    resumed_from_step: int | None = None
    forced: bool = False
    started_ms: int
    seconds: float
    host: str
    user: str
    pid: int

    def sources(self) -> dict[str, str]:
        """Name of each outside file that the stage read, to its sha256."""
        return {name.removeprefix("source."): str(sha256) for name, sha256 in self.leaves.items() if name.startswith("source.")}
