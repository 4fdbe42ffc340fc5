"""What an ingest stage can be told: which files, in which format, and what becomes of their records."""

from __future__ import annotations

import os
import re
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gpt.settings import Settings
from pipelines.ingest.files import expand, template_columns
from pipelines.stage import Source


class ReadSettings(Settings):
    """What holds for every source."""

    max_record_bytes: int = Field(default=16 * 2**20, ge=1)
    """A longer record, or text file read as one document, is a bad record."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What invalid UTF-8 becomes: a bad record, or U+FFFD, counted."""


class SourceSettings(Settings):
    """Files of one format and how their columns become documents.

    `SourceSettings(source="json", files=("books/*.jsonl",), license="CC0-1.0", text="text", fields=("book",))`
    """

    source: Literal["text", "json", "csv", "parquet"] | None = None
    """Format. "json" is JSON lines or one JSON array, told apart by the first byte. .gz, .bz2 and .xz are decompressed."""
    files: tuple[str, ...] = ()
    """Names or globs, relative to the pipeline's `data`; `**` goes through folders. Read in this order,
    the files of a glob by name, 2 before 10."""
    license: str | None = None
    """SPDX identifier, carried into every record and the artifact's metadata."""
    unit: Literal["file", "paragraph", "line"] = "file"
    """source = "text": what one document is; a paragraph ends at a blank line."""
    text: str | tuple[str, ...] = "text"
    """Where a document's text is: a column, several columns (joined by newlines), or a template such as "{title}\\n{paragraphs}".
    A list of texts is joined by newlines; null counts as empty."""
    fields: tuple[str, ...] = ()
    """Further columns, kept in the record."""
    delimiter: str = ","
    """source = "csv": the one character that stands between two columns."""
    columns: tuple[str, ...] = ()
    """source = "csv": the columns' names, where the file has no header."""

    @field_validator("delimiter")
    @classmethod
    def _delimiter_can_part_columns(cls, value: str) -> str:
        if len(value) != 1 or value in '"\r\n\0':
            raise ValueError(f'is {value!r}, wanted one character that is no quote and no end of a line, such as ";" or "\\t"')
        return value

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> SourceSettings:
        without_effect = {
            "text": ("text", "fields", "delimiter", "columns"),
            "json": ("unit", "delimiter", "columns"),
            "csv": ("unit",),
            "parquet": ("unit", "delimiter", "columns"),
        }
        for key in without_effect.get(self.source or "", ()):
            if getattr(self, key) != SourceSettings.model_fields[key].default:
                raise ValueError(f'{key} = {getattr(self, key)!r} has no effect with source = "{self.source}"; remove it')
        return self

    @model_validator(mode="after")
    def _columns_are_named(self) -> SourceSettings:
        if isinstance(self.text, str) and "{" in self.text:
            for name in template_columns(self.text):
                if not name or re.search(r"[.\[\]!:]", name):
                    raise ValueError(f"text = {self.text!r}: {{{name}}} isn't a column's name alone; want, for instance, '{{title}}'")
        if taken := sorted({"text", "source", "license"} & set(self.fields)):
            raise ValueError(f"fields = {list(self.fields)}: {taken[0]!r} is a key of every record already; remove it")
        return self

    def expand(self, data: Path) -> list[str]:
        """The files' names in reading order; ValueError names what is missing, what can't be read, and the nearest names."""
        return expand(self.files, data)


class HoldOut(Settings):
    """Which records are kept from training: `HoldOut(share=0.02, by="book")` or `HoldOut(last=0.1)`."""

    share: float | None = Field(default=None, gt=0, lt=1)
    """Expected share of records (or of field values), drawn by a hash of the content and the pipeline's seed."""
    by: str = "record"
    """What stays together: "record" (equal content), "source" (a file), "prompt" (what the first user's message says), or a column, all
    records of one value."""
    last: float | None = Field(default=None, gt=0, lt=1)
    """The last share of each source's bytes, in reading order. A text file read as one document is split at that place."""

    @model_validator(mode="after")
    def _one_way(self) -> HoldOut:
        if (self.share is None) == (self.last is None):
            raise ValueError(f"hold_out wants either share or last, found share = {self.share} and last = {self.last}")
        if self.last is not None and self.by != "record":
            raise ValueError(f"hold_out.by = {self.by!r} has no effect with last; remove it, or give share instead of last")
        return self


class Weighted(Settings):
    """One source of a mixture."""

    weight: float = Field(default=1.0, gt=0, le=100)
    """How often each training record stands in the output. 2.0: twice, the source as a whole again after itself.
    0.5: half of them, drawn by a hash of the content. 2.5: all twice, and half of them a third time. Held-out records stand once,
    whatever the weight, so that a change of weights leaves them as they are."""


class IngestSettings(ReadSettings):
    """What all ingest kinds share. A kind's config adds the keys of one source, inline, and `mixture`, several of them."""

    mixture: tuple[Any, ...] = ()
    hold_out: HoldOut | None = None
    """Which records are kept from training. None: no held-out ones."""
    deduplicate: bool = True
    """Keep one of the records whose content is equal (by sha256), the first; over all sources."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """Stop at the first record that can't be used, or go on without it. Either way it is listed in `rejects.jsonl`.
    A CSV or Parquet file that can't be read at all always stops the stage."""
    max_bad_share: float = Field(default=0.001, ge=0, le=1)
    """With on_bad_record = "skip": the highest share of bad records that is let pass."""

    @model_validator(mode="after")
    def _one_source_or_a_mixture(self) -> IngestSettings:
        fields = self._part().model_fields
        inline = [
            key for key, field in fields.items() if key != "weight" and getattr(self, key) != field.get_default(call_default_factory=True)
        ]
        if self.mixture and inline:
            raise ValueError(f"{inline[0]} stands beside mixture; move it into the sources of the mixture")
        for part in self.parts():
            if part.source is None or not part.files:
                raise ValueError(f"want source (text, json, csv or parquet) and files, found source = {part.source}, files = {part.files}")
        return self

    def parts(self) -> tuple[Any, ...]:
        """The sources: those of the mixture, or the inline one."""
        part = self._part()
        return self.mixture or (part(**{key: getattr(self, key) for key in part.model_fields if key != "weight"}),)

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

    @classmethod
    def _part(cls) -> type[Any]:
        """The settings of one source: what `mixture` is a tuple of."""
        (part, _) = typing.get_args(cls.model_fields["mixture"].annotation)
        return part
