"""The way of all ingest stages: which records stay, which are held out, how often each is written, and what becomes of bad ones.

    rows --> records (made by the stage, checked) --> filters (empty, short, duplicate) --> held_out.jsonl
                |                                                                      `--> train.jsonl, by weight
                `--> rejects.jsonl

Every decision about a record depends on its own content and the seed only, so adding records moves none of the others (except with
`last`, which is about order), and stages that hold out by the same field hold out the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pipelines.artifacts import SPLITS
from pipelines.ingest.reader import Reader
from pipelines.ingest.records import ToContent, to_records
from pipelines.ingest.rows import Reject
from pipelines.ingest.sieve import Rejects, Sieve
from pipelines.ingest.splits import Splits
from pipelines.stage import StageContext, StageFailure


def gather(
    config: Any,
    stage: StageContext,
    to_content: ToContent,
    unit: str,
    min_chars: int = 1,
    columns: Callable[[Any], Iterable[str] | None] | None = None,
) -> dict[str, Any]:
    """Write `train.jsonl`, `held_out.jsonl` and `rejects.jsonl` into `stage.output`; return the artifact's metadata.

    `config` is an IngestSettings. `to_content(columns, part)` returns the content of a row's record, a list of several, or None to leave
    the row out; it raises ValueError with the reason where the row can't be used. `unit` is what the metadata calls a record.
    `columns(part)` names the columns or paths that `to_content` reads, so that no others are read of a Parquet file. Without it, or where
    it returns None, all are read.
    """
    reader = Reader(stage, config)
    sieve = Sieve(min_chars=min_chars, deduplicate=config.deduplicate)
    rejects = Rejects(stage.output / "rejects.jsonl", on_bad_record=config.on_bad_record, max_bad_share=config.max_bad_share)
    splits = Splits(stage.output, config.hold_out, stage.seed, unit, stage.progress)
    by = config.hold_out.by if config.hold_out else "record"
    left_out = 0
    with rejects, splits:
        for index, part in enumerate(config.parts()):
            asked = columns(part) if columns else None
            if asked is not None:
                asked = [*asked, *part.fields, *([by] if by not in ("record", "source") else [])]
            with splits.source(part):
                for row in reader.rows(part, index, asked):
                    records = [row] if isinstance(row, Reject) else list(to_records(row, part, by, config.max_record_bytes, to_content))
                    left_out += not records
                    for record in records:
                        if isinstance(record, Reject):
                            rejects.add(record)
                        elif sieve.passes(record):
                            splits.add(record)
    rejects.check(reader.records)
    counts = {"read": reader.records, "bad": rejects.count, **sieve.dropped, "left_by_weight": splits.left_by_weight}
    if left_out:
        counts["left_out"] = left_out
    summary = splits.summary()
    for split in SPLITS if config.hold_out else ("train",):
        if not summary[split][unit]:
            raise StageFailure(_nothing_left(split, unit, counts, reader.empty_files, rejects.reasons(), splits.drawn_from()))
    return {**summary, "records": counts, "empty_files": reader.empty_files, "replaced_characters": reader.replaced_characters}


def _nothing_left(split: str, unit: str, counts: dict[str, int], empty_files: int, reasons: str, drawn_from: str) -> str:
    settings = "files, their columns and min_chars" if unit == "documents" else "files and their columns"
    advice = f"look at {settings}" if split == "train" else "give hold_out a larger share, or another field or seed"
    found = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    bad = f"; bad ones by reason: {reasons}" if reasons else ""
    drawn = f"; drawn from {drawn_from}" if drawn_from else ""
    return f"no {split} {unit} are left (records: {found}; {empty_files:,} empty files{drawn}{bad}); {advice}"
