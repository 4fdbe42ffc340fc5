"""Every setting of the four kinds of dialogue, in each format and source: changed, it changes what comes out, or it is refused.

For each kind, format and source there are a few records on which every setting that is admitted makes a difference.
"""

import csv
import gzip
import io
import itertools
import json
import zlib
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from gpt.settings import OPERATIONAL
from pipelines.ingest.dialogue_settings import OF_A_FORMAT, DialogueConfig, Format
from pipelines.ingest.settings import Format as SourceFormat
from pipelines.stage import StageFailure
from pipelines.stages.conversations import ConversationsConfig, conversations
from pipelines.stages.preferences import PreferencesConfig, preferences
from pipelines.stages.prompts import PromptsConfig, prompts
from pipelines.stages.ratings import RatingsConfig, ratings

from .conftest import FakeStage

KINDS: dict[str, tuple[type[DialogueConfig], Any]] = {
    "conversations": (ConversationsConfig, conversations),
    "preferences": (PreferencesConfig, preferences),
    "ratings": (RatingsConfig, ratings),
    "prompts": (PromptsConfig, prompts),
}
CHANGED: dict[str, Any] = {
    "source": None,
    "mixture": None,
    "format": None,
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
    "columns": ["a", "b", "c", "d", "e", "f"],
    "max_record_bytes": 2,
    "encoding_errors": "replace",
    "max_growth": 1,
    "hold_out": {"share": 0.5},
    "deduplicate": False,
    "on_bad_record": "fail",
    "max_bad_share": 0.0,
    "keys": None,
    "roles": {"narrator": "user"},
    "system": "Be brief.",
    "join_turns": True,
    "markers": {"Q:": "user", "A:": "assistant"},
    "replies": "all",
    "ignore": ["tools"],
    "labels": {"a": 1},
    "pairs": "all",
    "score_range": [0, 5],
}
"""A value of each setting that isn't its default. `source`, `format` and `mixture` say which of the others there are."""


WORDS = ["one", "one", 'a, "b"', *(f"question {number}" for number in range(8))]


def rows(kind: str, format: str, *, typed: bool = False) -> list[dict[str, Any]]:
    """Records, of which some are bad by default: two messages of one role in a row, an unknown role, tools. Typed: all have one schema."""
    return [
        *(record(kind, format, [{"role": "user", "content": words}], answer_in_messages=typed) for words in WORDS),
        record(kind, format, [{"role": "user", "content": "two"}, {"role": "user", "content": "turns"}], answer_in_messages=True),
        record(kind, format, [{"role": "narrator", "content": "Once"}], answer_in_messages=True),
        record(kind, format, [{"role": "user", "content": "tools"}], answer_in_messages=typed) | {"tools": "add"},
    ]


def record(kind: str, format: str, asked: list[dict[str, str]], *, answer_in_messages: bool = False) -> dict[str, Any]:
    good = {"role": "assistant", "content": f"Re: {asked[0]['content']}"}
    turns = [*asked, good] if kind == "conversations" else asked
    answer = [*asked, good] if answer_in_messages else good["content"]
    spoken = "".join(f"{'Assistant' if turn is good else 'Human'}: {turn['content']}\n\n" for turn in turns)
    replies = [{"text": text, "role": "assistant", "rank": rank} for rank, text in enumerate(["Best.", "Better.", "Good."])]
    replies[1]["replies"] = [{"text": "Why?", "role": "user", "replies": [{"text": "So.", "role": "assistant"}]}]
    for turn in reversed(asked):
        replies = [{"text": turn["content"], "role": turn["role"], "replies": replies}]
    where: dict[str, dict[str, Any]] = {
        "messages": {"messages": turns},
        "sharegpt": {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in turns]},
        "alpaca": {"instruction": asked[0]["content"], "output": answer},
        "plain": {"prompt": asked[0]["content"], "response": answer},
        "transcript": {"text": spoken},
        "tree": {"prompt": replies[0]},
    }
    answers = {"chosen": answer, "rejected": "No.", "response": answer, "score": 1, "reference": answer}
    return answers | where[format] | {"book": asked[0]["content"][:1], "tools": ""}


def content(kind: str, format: str, source: str) -> bytes:
    """The records as a file; where the source has bytes, one of them isn't UTF-8."""
    found = rows(kind, format)
    match source:
        case "text":
            lines = [str(row["text"]).replace("\n\n", " ") if format == "transcript" else str(row["prompt"]) for row in found]
            return "\n".join(lines).encode() + b"\nHuman: t\xffo Assistant: t\xffo\n"
        case "json":
            return b"".join(json.dumps(row).encode() + b"\n" for row in found) + b'{"tools": "t\xffo"}'
    if source == "parquet":
        kept = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(kind, format, typed=True)), kept)
        return kept.getvalue()
    flat = [{key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in found]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue().encode() + b"t\xffo" + b"," * (len(flat[0]) - 1) + b"\n"


@pytest.fixture
def outcome(tmp_path: Path):
    """What a config makes of a folder: the bytes of its files and its metadata, or its failure."""
    made = 0

    def run(kind: str, format: str, source: str, settings: dict[str, Any]) -> Any:
        nonlocal made
        made += 1
        data, output = tmp_path / "data", tmp_path / f"output-{made}"
        output.mkdir()
        if not data.exists():
            data.mkdir()
            (data / "a.data").write_bytes(content(kind, format, source))
            (data / "b.data").write_bytes(b"" if source == "parquet" else b"text\n")
            if "max_growth" in settings:
                (data / "big.gz").write_bytes(gzip.compress(b'"' + b"x" * 17 * 2**20 + b'"', compresslevel=1))
            (tmp_path / "outside").write_bytes(content(kind, format, source))
            (data / "link.data").symlink_to(tmp_path / "outside")
        config_class, function = KINDS[kind]
        config = config_class.model_validate(settings)
        try:
            artifact = function(config, FakeStage(output, config.sources(data)))
        except (StageFailure, ValueError) as error:
            return str(error)
        return [zlib.crc32(path.read_bytes()) for path in sorted(output.iterdir())], artifact.metadata

    return run


def settings_for(name: str, format: str, source: str) -> dict[str, Any]:
    """Settings beside which a change of `name` shows."""
    base: dict[str, Any] = {"format": format, "source": source, "files": ["a.data"], "on_bad_record": "skip", "max_bad_share": 1.0}
    if name == "on_bad_record":
        del base["max_bad_share"]
    if name == "follow_links":
        base["files"] = ["link.data"]
    if name == "max_growth":
        base |= {"files": ["big.gz"], "max_record_bytes": 2**25, "max_growth": 200}
    if name == "unit":
        base["encoding_errors"] = "replace"
    elif source == "text":
        base["unit"] = "line"
    if source == "text" and format == "transcript":
        base["markers"] = {"Human:": "user", "Assistant:": "assistant"}  # the usual ones have a blank line in them
    return base


def changed(name: str, kind: str, format: str, source: str) -> Any:
    if name == "keys":
        return {next(iter(OF_A_FORMAT[format])): "other"}  # type: ignore[index]
    if name == "columns":
        return [*list(rows(kind, format)[0])[1:], "last"]
    return CHANGED[name]


def refusal(kind: str, settings: dict[str, Any]) -> str:
    try:
        KINDS[kind][0].model_validate(settings)
    except ValidationError as error:
        return str(error)
    return ""


OF_DIALOGUES = ("keys", "roles", "system", "join_turns", "markers", "replies", "ignore", "labels", "pairs", "score_range")
SHARED = [name for name in CHANGED if name not in OF_DIALOGUES and CHANGED[name] is not None]
CASES = [
    *itertools.product(KINDS, get_args(Format), get_args(SourceFormat), OF_DIALOGUES),
    *itertools.product(KINDS, ["transcript"], get_args(SourceFormat), SHARED),
]


def test_every_setting_of_every_kind_is_tried():
    assert {name for config, _ in KINDS.values() for name in config.model_fields} == set(CHANGED)


@pytest.mark.parametrize(("kind", "format", "source", "name"), CASES)
def test_a_setting_changes_the_key_and_the_output_or_is_refused(outcome, kind, format, source, name):
    config_class, _ = KINDS[kind]
    base = settings_for(name, format, source)
    if refusal(kind, base) or name not in config_class.model_fields:
        return  # this kind has no such source or format, or no such setting: a test below says which
    assert OPERATIONAL not in config_class.model_fields[name].metadata
    settings = {**base, name: changed(name, kind, format, source)}
    if message := refusal(kind, settings):
        assert f"{name}" in message
        assert "has no effect" in message
        return
    assert config_class.model_validate(settings).model_dump() != config_class.model_validate(base).model_dump()
    before, after = outcome(kind, format, source, base), outcome(kind, format, source, settings)
    assert after != before
    if name not in ("max_growth", "follow_links", "on_bad_record", "unit"):
        assert not isinstance(before, str), before


def test_the_sources_and_formats_that_a_kind_has():
    base = {"files": ["a"]}
    refused = {
        (kind, format, source)
        for kind, format, source in itertools.product(KINDS, get_args(Format), get_args(SourceFormat))
        if refusal(kind, {**base, "format": format, "source": source})
    }
    text = {(kind, format, "text") for kind, format in itertools.product(KINDS, get_args(Format))}
    trees = {*((kind, "tree", "csv") for kind in KINDS), *(("ratings", "tree", source) for source in get_args(SourceFormat))}
    assert refused == (text | trees) - {(kind, "transcript", "text") for kind in ("conversations", "prompts")} - {
        ("prompts", "plain", "text")
    }
