"""The artifact types, which stages use in their signatures.

An artifact is a folder with a manifest, and its digest is the manifest's. Each class is one artifact type and a contract: which files the
folder contains and which metadata its manifest contains, at least. Who made it, when and where is in the action record, never here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Artifact:
    """`Documents(path=Path(".../artifacts/6b1f..."), digest="6b1f...", metadata={"documents": 812, ...})`."""

    kind: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    """Files that the folder must contain."""
    required: ClassVar[dict[str, Any]] = {}
    """Metadata that the manifest must contain, each with an example value."""
    path: Path
    digest: str
    metadata: dict[str, Any] = field(default_factory=dict)


class Records(Artifact):
    """What ingest makes: `train.jsonl` and `held_out.jsonl` with one record per line, and `rejects.jsonl`."""

    files = ("train.jsonl", "held_out.jsonl")

    def records(self, split: str) -> Iterator[dict[str, Any]]:
        with open(self.path / f"{split}.jsonl", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


class Documents(Records):
    """Texts: `{"text", "source", ...fields}`."""

    kind = "documents"
    required: ClassVar[dict[str, Any]] = {"train": {"documents": 3, "bytes": 120}, "held_out": {"documents": 1, "bytes": 40}}

    def texts(self, split: str) -> Iterator[str]:
        for record in self.records(split):
            yield record["text"]


class Conversations(Records):
    """`{"messages": [{"role", "content"}, ...], "source", ...fields}`.

    The roles are system (only first), then user and assistant in turn; the last message is an assistant's.
    """

    kind = "conversations"
    required: ClassVar[dict[str, Any]] = {"train": {"conversations": 3}, "held_out": {"conversations": 1}}


class Preferences(Records):
    """Pairs: `{"prompt": [messages], "chosen": "...", "rejected": "...", "source", ...fields}`; a prompt ends with a user's message."""

    kind = "preferences"
    required: ClassVar[dict[str, Any]] = {"train": {"pairs": 3}, "held_out": {"pairs": 1}}


class Ratings(Records):
    """Rated responses: `{"prompt": [messages], "response": "...", "score": 0.0 to 1.0, "source", ...fields}`."""

    kind = "ratings"
    required: ClassVar[dict[str, Any]] = {"train": {"ratings": 3}, "held_out": {"ratings": 1}}


class Prompts(Records):
    """Prompts to answer: `{"prompt": [messages], "reference": "..." or null, "source", ...fields}`."""

    kind = "prompts"
    required: ClassVar[dict[str, Any]] = {"train": {"prompts": 3}, "held_out": {"prompts": 1}}


class Tokenizer(Artifact):
    """`tokenizer.json`, which `gpt.tokenizer` reads."""

    kind = "tokenizer"
    files = ("tokenizer.json",)
    required: ClassVar[dict[str, Any]] = {"vocab_size": 4096}


class Tokens(Artifact):
    """`train.bin` and `held_out.bin` (little-endian unsigned integers, `metadata["dtype"]`), and the `tokenizer.json` that made them."""

    kind = "tokens"
    files = ("train.bin", "held_out.bin", "tokenizer.json")
    required: ClassVar[dict[str, Any]] = {"dtype": "uint16", "vocab_size": 4096, "tokenizer": "6b1f..."}


class Model(Artifact):
    """`model.safetensors` (fp32), `config.json` (GPTConfig) and `tokenizer.json`; `metadata["role"]` is policy or reward."""

    kind = "model"
    files = ("model.safetensors", "config.json", "tokenizer.json")
    required: ClassVar[dict[str, Any]] = {"role": "policy", "tokenizer": "6b1f..."}


class Report(Artifact):
    """`report.json`: an evaluation's figures and samples."""

    kind = "report"
    files = ("report.json",)


class HfCheckpoint(Artifact):
    """A folder that `transformers` opens without custom code."""

    kind = "hf_checkpoint"
    files = ("config.json",)


KINDS: dict[str, type[Artifact]] = {
    kind.kind: kind for kind in (Documents, Conversations, Preferences, Ratings, Prompts, Tokenizer, Tokens, Model, Report, HfCheckpoint)
}
