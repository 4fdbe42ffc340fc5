"""The settings of ingest: which files are read, in which format, and what happens to their records."""

from __future__ import annotations

import codecs
import json
import os
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from gpt.settings import Settings
from pipelines.ingest import templates
from pipelines.ingest.files import expand
from pipelines.stage import Source

Format = Literal["text", "json", "csv", "parquet"]

WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "text": ("text", "fields", "records", "delimiter", "quotes", "columns"),
    "json": ("unit", "delimiter", "quotes", "columns"),
    "csv": ("unit", "records"),
    "parquet": ("unit", "encoding", "records", "delimiter", "quotes", "columns"),
}
"""The settings of a source that its format has no use for."""


NOT_FOR_FILES = ("idna", "punycode", "unicode-escape", "raw-unicode-escape", "utf-7")
"""Text encodings of Python's that no file of text is in."""


class ReadSettings(Settings):
    """Settings that apply to every source of a stage."""

    max_record_bytes: int = Field(default=16 * 2**20, ge=1)
    """A longer record, or text file read as one document, is a bad record."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What happens to bytes that the encoding doesn't have: "strict" makes a bad record, "replace" puts U+FFFD and counts them."""
    max_growth: int = Field(default=100, ge=1)
    """How many times its size a compressed file may grow to; up to 16 MiB it always may. A file that grows further stops the stage."""


class SourceSettings(Settings):
    """Files of one format, and how their columns become documents.

    `SourceSettings(source="json", files=("books/*.jsonl",), license="CC0-1.0", text="text", fields=("book",))`
    """

    source: Format | None = None
    """The format. "json" is one JSON object after another (JSON lines, or over several lines) or one array, told apart by the first
    byte. Files whose names end with .gz, .bz2, .xz or .zst are decompressed; of a .zip, every member is read."""
    files: tuple[str, ...] = ()
    """Names or globs, relative to the pipeline's `data`; `**` goes through folders. Read in this order; the files of a glob by name, 2
    before 10."""
    follow_links: bool = False
    """Whether links that lead out of the data folder are followed."""
    license: str | None = None
    """SPDX identifier, carried into every record and the artifact's metadata."""
    encoding: str = "utf-8"
    """How text, JSON and CSV are encoded: "gbk", "latin-1", "utf-16" or any other encoding that Python knows."""
    unit: Literal["file", "paragraph", "line"] = "file"
    """source = "text": what one document is. A paragraph ends at a blank line."""
    text: str | tuple[str, ...] = "text"
    """Where a document's text is: a column, several columns (joined by newlines), or a template such as "{title}\\n{paragraphs}".
    `meta.title` and `turns.*.text` are paths into a column, unless a column has that very name; a name that ends with ? may be missing,
    and leaves empty what holds it. A list of texts is joined by newlines, null is empty. Among several columns and in templates, other
    values are written as in JSON: 7, 0.5, true."""
    fields: tuple[str, ...] = ()
    """Further columns, or paths into them, that are kept in the record under the same name."""
    records: str | None = None
    """source = "json": where in each document the list of records is, for example "data.examples"."""
    delimiter: str = ","
    """source = "csv": the character between two columns."""
    quotes: Literal["standard", "none"] | None = None
    """source = "csv": "standard" is RFC 4180: a field in double quotes may contain delimiters and newlines, and a quote inside it is
    doubled. "none" takes quotes as ordinary characters. Unset: "none" where the delimiter is a tab, since TSV is published without
    quoting far more often than not, otherwise "standard"."""
    columns: tuple[str, ...] = ()
    """source = "csv": the columns' names, for a file without a header."""

    @field_validator("delimiter")
    @classmethod
    def _delimiter_is_one_character(cls, value: str) -> str:
        if len(value) != 1 or value in '"\r\n\0':
            raise ValueError(f'is {value!r}, expected one character that is neither a quote nor a line end, such as ";" or "\\t"')
        return value

    @field_validator("columns", "fields")
    @classmethod
    def _names_are_distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"has {twice[0]!r} twice, expected distinct names")
        return names

    @field_validator("encoding")
    @classmethod
    def _encoding_exists(cls, name: str) -> str:
        try:
            "".encode(name)
            "a".encode(name).decode(name)
            if codecs.lookup(name).name.replace("_", "-") in NOT_FOR_FILES:
                raise LookupError
        except (LookupError, UnicodeError, ValueError):
            raise ValueError(f'is {name!r}, which Python has no text encoding for; expected for example "gbk" or "latin-1"') from None
        return name

    @field_validator("records")
    @classmethod
    def _records_is_a_path(cls, path: str | None) -> str | None:
        if path is not None and not all(path.split(".")):
            raise ValueError(f'is {path!r}, expected keys with dots between them, such as "data.examples"')
        return path

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> SourceSettings:
        for key in WITHOUT_EFFECT.get(self.source or "", ()):
            if getattr(self, key) != SourceSettings.model_fields[key].default:
                raise ValueError(f'{key} = {getattr(self, key)!r} has no effect with source = "{self.source}"; remove it')
        return self

    @model_validator(mode="after")
    def _columns_are_named(self) -> SourceSettings:
        if not self.text:
            raise ValueError(f"text = {self.text!r} is empty, expected a column, several columns, or a template")
        for expression in templates.expressions(self.text):
            try:
                templates.check(expression)
            except ValueError as error:
                raise ValueError(f"text: {error}") from None
        if taken := sorted({"text", "source", "license"} & set(self.fields)):
            raise ValueError(f"fields = {list(self.fields)}: {taken[0]!r} is a key of every record already; remove it")
        return self

    def dialect(self) -> Literal["standard", "none"]:
        """What quotes mean in this source."""
        return self.quotes or ("none" if self.delimiter == "\t" else "standard")

    def expand(self, data: Path) -> list[str]:
        """The files' names in reading order; ValueError names what is missing, what can't be read, and the nearest names."""
        return expand(self.files, data, follow_links=self.follow_links)


class HoldOut(Settings):
    """Which records are kept from training: `HoldOut(share=0.02, by="book")` or `HoldOut(last=0.1)`.

    There is one rule for all stages: records with equal values of `by` are on the same side, and the side depends on the value, the
    pipeline's seed and `share` only. A value that is a text counts as its characters, anything else as its JSON. So a question is held
    out alike wherever it comes from: as the column "question" of documents, or as what the first user's message says in dialogues.
    """

    share: float | None = Field(default=None, gt=0, lt=1)
    """Expected share of records (or of the values of `by`), drawn by a hash of the content and the pipeline's seed."""
    by: str = "record"
    """What stays together: "record" (equal content), "source" (a file), or the records that have one value in this column or path.
    "prompt" is what the first user's message says in conversations, preferences, ratings and prompts; in ingest it is the column of that
    name, and the same words are on the same side in both."""
    last: float | None = Field(default=None, gt=0, lt=1)
    """The last share of each source's bytes, in reading order. A text file read as one document is split at that place."""

    @model_validator(mode="after")
    def _one_way(self) -> HoldOut:
        if (self.share is None) == (self.last is None):
            raise ValueError(f"hold_out expects either share or last, found share = {self.share} and last = {self.last}")
        if self.last is not None and self.by != "record":
            raise ValueError(f"hold_out.by = {self.by!r} has no effect with last; remove it, or give share instead of last")
        return self


class Weighted(Settings):
    """One source of a mixture."""

    weight: float = Field(default=1.0, gt=0, le=100)
    """How many times each training record is written. 2.0: twice, the whole source again after itself. 0.5: half of the records, drawn by
    a hash of the content. 2.5: all twice, and half of them a third time. Held-out records are written once whatever the weight, so that
    changing weights doesn't change them."""


class IngestSettings(ReadSettings):
    """Settings that all ingest stages share. A stage's config adds those of one source, inline, and `mixture`, several sources."""

    drawn_by: ClassVar[tuple[str, ...]] = ()
    """What a record can be held out by that is no column."""
    mixture: tuple[Any, ...] = ()
    hold_out: HoldOut | None = None
    """Which records are kept from training. None: all records are for training."""
    deduplicate: bool = True
    """Keep the first of the records whose content is equal (by sha256), over all sources. Takes about 100 bytes of memory a record."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """Stop at the first record that can't be used, or continue without it. Either way it is listed in `rejects.jsonl`.
    A Parquet file that can't be read, and a CSV file whose header can't be, always stops the stage."""
    max_bad_share: float = Field(default=0.001, ge=0, le=1)
    """on_bad_record = "skip": the highest share of bad records that is accepted."""

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
                raise ValueError(
                    f"expected source (text, json, csv or parquet) and files, found source = {part.source}, files = {part.files}"
                )
        return self

    @model_validator(mode="after")
    def _stage_settings_have_an_effect(self) -> IngestSettings:
        if self.on_bad_record == "fail" and self.max_bad_share != IngestSettings.model_fields["max_bad_share"].default:
            raise ValueError(
                f'max_bad_share = {self.max_bad_share} has no effect with on_bad_record = "fail"; remove it, or set on_bad_record = "skip"'
            )
        if self.encoding_errors != "strict" and all(part.source == "parquet" for part in self.parts()):
            raise ValueError(f'encoding_errors = "{self.encoding_errors}" has no effect with source = "parquet"; remove it')
        return self

    @model_validator(mode="after")
    def _text_files_have_no_columns(self) -> IngestSettings:
        by = self.hold_out.by if self.hold_out else "record"
        drawn = ("record", "source", *self.drawn_by)
        if by not in drawn and any(part.source == "text" for part in self.parts()):
            raise ValueError(f'hold_out.by = {by!r}: source = "text" has no columns; expected {" or ".join(map(json.dumps, drawn))}')
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
