"""What a pipeline file and the command line may write where an artifact is expected.

    tokenize                          the stage of that name, in the same file
    sha256:1f0c93ab                   an artifact, by at least 8 digits of its digest; on the command line `1f0c93ab27d4` will do
    run:20261122-192002-gsm-0a1f/sft  what a stage of a run made or reused
    model:gsm@newest                  what an alias points to
    hf:~/models/tiny                  a folder in the format of Hugging Face, imported

`parse` returns one of the classes below. Which artifact a reference stands for is answered by `resolve`, which has the store.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ARTIFACTS = "sha256:<at least 8 digits>, run:<id>/<stage>, model:<pipeline>@newest or hf:<folder>"
REFERENCES = f"a stage's name, {ARTIFACTS}"
IMPORTS = {"model": "import_hf", "tokenizer": "import_hf_tokenizer"}
"""Artifact type to the stage kind that imports it from hf:<folder>."""

_BARE_DIGEST = re.compile(r"[0-9a-f]{12,64}")


@dataclass(frozen=True)
class StageName:
    name: str


@dataclass(frozen=True)
class Digest:
    prefix: str
    """At least 8 hexadecimal digits of the digest, from its start."""


@dataclass(frozen=True)
class RunStage:
    run: str
    stage: str


@dataclass(frozen=True)
class ModelAlias:
    pipeline: str
    alias: str


@dataclass(frozen=True)
class HfFolder:
    folder: str
    """As written: relative to the pipeline's data folder, or with ~."""


ArtifactReference = Digest | RunStage | ModelAlias | HfFolder
Reference = StageName | ArtifactReference

_FORMS: list[tuple[re.Pattern[str], type[Digest] | type[RunStage] | type[ModelAlias] | type[HfFolder]]] = [
    (re.compile(r"sha256:([0-9a-f]{8,64})"), Digest),
    (re.compile(r"run:([A-Za-z0-9_.-]+)/([A-Za-z0-9_-]+)"), RunStage),
    (re.compile(r"model:([A-Za-z0-9_-]+)@([A-Za-z0-9_-]+)"), ModelAlias),
    (re.compile(r"hf:(.+)"), HfFolder),
]


def parse(text: str) -> Reference:
    """Read a reference of a pipeline file, where a word without a colon names a stage; ValueError if it has none of the forms."""
    if names_stage(text):
        return StageName(text)
    for form, reference in _FORMS:
        if match := form.fullmatch(text):
            return reference(*match.groups())
    raise ValueError(f"{text!r} is not a reference; expected {REFERENCES}")


def parse_artifact(text: str) -> ArtifactReference:
    """Read a reference of the command line, where there are no stages, and a digest needs no "sha256:"."""
    if _BARE_DIGEST.fullmatch(text):
        return Digest(text)
    try:
        reference = parse(text)
    except ValueError:
        reference = StageName(text)
    if isinstance(reference, StageName):
        raise ValueError(f"{text!r} does not name an artifact; expected {ARTIFACTS}")
    return reference


def names_stage(text: str) -> bool:
    """Whether a reference is a stage's name rather than something that only the store or a folder can answer."""
    return ":" not in text


def names_hf_folder(text: str) -> bool:
    """Whether a reference is hf:<folder>."""
    return not names_stage(text) and bool(_FORMS[-1][0].fullmatch(text))


def stages_in(inputs: Mapping[str, Iterable[str]]) -> list[str]:
    """The stages that a stage's inputs name."""
    return [each for references in inputs.values() for each in references if names_stage(each)]
