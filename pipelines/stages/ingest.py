"""Ingest: outside text becomes documents, checked, deduplicated, weighted and split; whatever is left out is counted.

`pipelines.ingest` reads the files and decides about each record.
"""

from __future__ import annotations

from pydantic import Field

from pipelines.artifacts import Documents
from pipelines.ingest.documents import WeightedSource, columns_of_text, to_text
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
    """Turn every record into a document, or count it under the reason why not."""
    return stage.publish(Documents, **gather(config, stage, to_text, "documents", config.min_chars, columns_of_text))
