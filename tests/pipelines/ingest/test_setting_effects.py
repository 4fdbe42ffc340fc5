"""Every setting of ingest has an effect: a value other than the default changes the key and the output, or is refused.

Each format has one small data folder on which every setting that the format accepts makes a difference.
"""

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from gpt.settings import OPERATIONAL
from pipelines.ingest.settings import Format
from pipelines.stage import StageFailure
from pipelines.stages.ingest import IngestConfig, ingest

from .conftest import FakeStage

ROWS = [
    {"text": "one", "body": "first", "book": "a"},
    {"text": "two two", "body": "second", "book": "a"},
    {"text": "one", "body": "third", "book": "b"},
    {"text": '"quoted"', "body": "fourth", "book": "b"},
]
CHANGED: dict[str, Any] = {
    "source": None,
    "files": ["b.data"],
    "follow_links": True,
    "license": "MIT",
    "encoding": "latin-1",
    "unit": "line",
    "text": "body",
    "fields": ["book"],
    "records": "data",
    "delimiter": ";",
    "quotes": "none",
    "columns": ["text", "body", "book"],
    "max_record_bytes": 2,
    "encoding_errors": "replace",
    "max_growth": 1,
    "mixture": None,
    "hold_out": {"share": 0.5},
    "deduplicate": False,
    "on_bad_record": "skip",
    "max_bad_share": 1.0,
    "min_chars": 6,
}
"""A value other than the default for each setting. `source` and `mixture` decide which others exist, and have tests of their own."""
NEEDS = {"max_bad_share": {"on_bad_record": "skip"}}
"""Settings that have an effect only beside another one, and are refused without it."""


def content(source: str) -> bytes:
    """Return records with a duplicate among them and, if the format is text, one that isn't UTF-8."""
    match source:
        case "text":
            return b"one\nt\xffo\none\n"
        case "json":
            return (
                b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
                + b'{"text": "t\xffo", "body": "x", "book": "c", "data": [{"text": "in"}]}'
            )
        case "csv":
            rows = ["text,body,book", *(f"{row['text']},{row['body']},{row['book']}" for row in ROWS)]
            return "\n".join(rows).encode() + b"\nt\xffo,x,c\n"
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"text": "x\0", "body": "x", "book": "c"}]), file)
    return file.getvalue()


@pytest.fixture
def outcome(tmp_path: Path):
    """Run a config on a format's folder; return checksums of its files and its metadata, or its failure."""
    made = 0

    def run(source: str, settings: dict[str, Any]) -> Any:
        nonlocal made
        made += 1
        data, output = tmp_path / source, tmp_path / f"output-{made}"
        output.mkdir()
        if not data.exists():
            data.mkdir()
            (data / "a.data").write_bytes(content(source))
            (data / "b.data").write_bytes(b"" if source == "parquet" else b"text\n")
            (data / "big.gz").write_bytes(gzip.compress(b'"' + b"x" * 17 * 2**20 + b'"'))
            (tmp_path / f"{source}.out").write_bytes(content(source))
            (data / "link.data").symlink_to(tmp_path / f"{source}.out")
        config = IngestConfig.model_validate(settings)
        try:
            documents = ingest(config, FakeStage(output, config.sources(data)))
        except (StageFailure, ValueError) as error:
            return str(error)
        return [zlib.crc32(path.read_bytes()) for path in sorted(output.iterdir())], documents.metadata

    return run


def refusal(settings: dict[str, Any]) -> str:
    try:
        IngestConfig.model_validate(settings)
    except ValidationError as error:
        return str(error)
    return ""


def settings_for(name: str, source: str) -> dict[str, Any]:
    """Return settings with which a change of `name` makes a difference."""
    base: dict[str, Any] = {"source": source, "files": ["a.data"], **NEEDS.get(name, {})}
    if name in ("deduplicate", "min_chars", "hold_out", "license", "fields", "text", "max_record_bytes", "unit", "quotes", "columns"):
        base |= {"on_bad_record": "skip", "max_bad_share": 1.0}
    if name == "follow_links":
        base["files"] = ["link.data"]
    if name == "max_growth":
        base |= {"files": ["big.gz"], "max_record_bytes": 2**25, "max_growth": 200}
    if source == "text" and name != "unit":
        base["unit"] = "line"
    if name == "unit":
        base["encoding_errors"] = "replace"
    return base


@pytest.mark.parametrize("source", get_args(Format))
@pytest.mark.parametrize("name", [name for name in IngestConfig.model_fields if name not in ("source", "mixture")])
def test_a_setting_changes_the_key_and_the_output_or_is_refused(outcome, name, source):
    assert name in CHANGED, f"{name} is a new setting: give it a value here"
    assert OPERATIONAL not in IngestConfig.model_fields[name].metadata
    base = settings_for(name, source)
    changed = {**base, name: CHANGED[name]}
    if message := refusal(changed):
        assert f"{name} = " in message
        assert "has no effect" in message
        return
    config = IngestConfig.model_validate(changed)
    before = IngestConfig.model_validate(base)
    assert config.model_dump() != before.model_dump()  # the key holds the dump without operational fields, of which there are none
    assert outcome(source, changed) != outcome(source, base)


@pytest.mark.parametrize(
    ("source", "without_effect"),
    [
        ("text", {"text", "fields", "records", "delimiter", "quotes", "columns"}),
        ("json", {"unit", "delimiter", "quotes", "columns"}),
        ("csv", {"unit", "records"}),
        ("parquet", {"unit", "encoding", "encoding_errors", "records", "delimiter", "quotes", "columns"}),
    ],
)
def test_each_format_refuses_exactly_the_settings_without_an_effect_on_it(source, without_effect):
    alone = {
        name: {"source": source, "files": ["a"], **NEEDS.get(name, {}), name: value} for name, value in CHANGED.items() if value is not None
    }
    refused = {name: message for name, settings in alone.items() if (message := refusal(settings))}
    assert all(f"{name} = " in message for name, message in refused.items())
    assert set(refused) == without_effect


def test_max_bad_share_without_skipping_is_refused():
    with pytest.raises(ValidationError, match=r'max_bad_share = 0.5 has no effect with on_bad_record = "fail"; remove it'):
        IngestConfig(source="json", files=["a"], max_bad_share=0.5)


@pytest.mark.parametrize("encoding", ["gbkk", "hex", "idna", "unicode_escape", ""])
def test_an_unknown_or_unsuitable_encoding_is_refused(encoding):
    with pytest.raises(ValidationError, match=f"is {encoding!r}, which Python has no text encoding for"):
        IngestConfig(source="text", files=["a"], encoding=encoding)


@pytest.mark.parametrize(("name", "value"), [("columns", ["a", "b", "a"]), ("fields", ["a", "b", "a"])])
def test_a_duplicate_name_in_a_list_is_refused(name, value):
    with pytest.raises(ValidationError, match="has 'a' twice, expected distinct names"):
        IngestConfig.model_validate({"source": "csv", "files": ["a"], name: value})


@pytest.mark.parametrize("path", ["", ".", "a.", ".a", "a..b"])
def test_a_path_to_the_records_has_keys_between_its_dots(path):
    with pytest.raises(ValidationError, match="expected keys with dots between them"):
        IngestConfig(source="json", files=["a"], records=path)
