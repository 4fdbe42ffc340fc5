"""Ingest: outside text becomes documents, checked, deduplicated, weighted and split, with nothing lost in silence.

`pipelines.ingest` finds the records, their text, and decides about each.
"""

from __future__ import annotations

from pydantic import Field

from pipelines.artifacts import Documents
from pipelines.ingest.documents import WeightedSource, to_text
from pipelines.ingest.gather import gather
from pipelines.ingest.settings import IngestSettings, SourceSettings
from pipelines.stage import StageConfig, StageContext


class IngestConfig(IngestSettings, StageConfig, SourceSettings):
    """One source, its keys inline, or a mixture of several: `[[stages.documents.mixture]]` with the same keys and a `weight` each."""

    mixture: tuple[WeightedSource, ...] = ()
    """Several sources, instead of the inline one."""
    min_chars: int = Field(default=1, ge=1)
    """Drop shorter documents."""


def ingest(config: IngestConfig, stage: StageContext) -> Documents:
    """Every record becomes a document, or is counted under the reason why not."""
    return stage.publish(Documents, **gather(config, stage, to_text, "documents", config.min_chars))
