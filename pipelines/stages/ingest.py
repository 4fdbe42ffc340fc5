"""Ingest: outside text becomes documents, checked, deduplicated, weighted and split, with nothing lost in silence.

`pipelines.reading` finds the records, `pipelines.documents` decides about each.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipelines.artifacts import SPLITS, Documents
from pipelines.documents import HoldOut, Rejects, Sieve, Splits, WeightedSource, to_document
from pipelines.reading import Reader, ReadSettings, Reject, SourceSettings
from pipelines.stage import Source, StageConfig, StageContext, StageFailure


class IngestConfig(StageConfig, ReadSettings, SourceSettings):
    """One source, its keys inline, or a mixture of several: `[[stages.documents.mixture]]` with the same keys and a `weight` each."""

    mixture: tuple[WeightedSource, ...] = ()
    """Several sources, instead of the inline one."""
    hold_out: HoldOut | None = None
    """Which documents are kept from training. None: no held-out documents."""
    deduplicate: bool = True
    """Keep one document of those whose text is equal (by sha256), the first; over all sources."""
    min_chars: int = Field(default=1, ge=1)
    """Drop shorter documents."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """Stop at the first record that can't be used, or go on without it. Either way it is listed in `rejects.jsonl`.
    A CSV or Parquet file that can't be read at all always stops the stage."""
    max_bad_share: float = Field(default=0.001, ge=0, le=1)
    """With on_bad_record = "skip": the highest share of bad records that is let pass."""

    @model_validator(mode="after")
    def _one_source_or_a_mixture(self) -> IngestConfig:
        inline = [key for key, field in SourceSettings.model_fields.items() if getattr(self, key) != field.default]
        if self.mixture and inline:
            raise ValueError(f"{inline[0]} stands beside mixture; move it into the sources of the mixture")
        for part in self.mixture or (self,):
            if part.source is None or not part.files:
                raise ValueError(f"want source (text, json, csv or parquet) and files, found source = {part.source}, files = {part.files}")
        return self

    def parts(self) -> tuple[WeightedSource, ...]:
        return self.mixture or (WeightedSource(**{key: getattr(self, key) for key in SourceSettings.model_fields}),)

    def sources(self, data: Path) -> list[Source]:
        """The files of all parts, in reading order; ValueError for what is missing, unreadable or in two parts."""
        found: dict[str, Source] = {}
        faults = []
        for part, settings in enumerate(self.parts()):
            try:
                names = settings.expand(data)
            except ValueError as error:
                faults.append(str(error))
                continue
            faults += [f"{name} is in two sources of the mixture; leave it in one, with a higher weight" for name in names if name in found]
            found |= {name: Source(name, Path(os.path.abspath(data / name)), part=part) for name in names}
        if faults:
            raise ValueError("; ".join(faults))
        return list(found.values())


def ingest(config: IngestConfig, stage: StageContext) -> Documents:
    """Every record becomes a document, or is counted under the reason why not."""
    reader = Reader(stage, config)
    sieve = Sieve(min_chars=config.min_chars, deduplicate=config.deduplicate)
    rejects = Rejects(stage.output / "rejects.jsonl", on_bad_record=config.on_bad_record, max_bad_share=config.max_bad_share)
    splits = Splits(stage.output, config.hold_out, stage.seed)
    with rejects, splits:
        for index, part in enumerate(config.parts()):
            with splits.source(part):
                for row in reader.rows(part, index):
                    document = row if isinstance(row, Reject) else to_document(row, part, config.hold_out, config.max_record_bytes)
                    if isinstance(document, Reject):
                        rejects.add(document)
                    elif sieve.passes(document):
                        splits.add(document)
    rejects.check(reader.records)
    counts = {"read": reader.records, "bad": rejects.count, **sieve.dropped, "left_by_weight": splits.left_by_weight}
    summary = splits.summary()
    for split in SPLITS if config.hold_out else ("train",):
        if not summary[split]["documents"]:
            raise StageFailure(_nothing_left(split, counts, reader.empty_files))
    return stage.publish(
        Documents, **summary, records=counts, empty_files=reader.empty_files, replaced_characters=reader.replaced_characters
    )


def _nothing_left(split: str, counts: dict[str, int], empty_files: int) -> str:
    advice = "look at files, text and min_chars" if split == "train" else "give hold_out a larger share, or another field or seed"
    found = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f"no {split} document is left (records: {found}; {empty_files:,} empty files); {advice}"
