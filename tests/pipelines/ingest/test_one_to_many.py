"""A row becomes one record, several or none, as the stage's function decides."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.ingest.gather import gather
from pipelines.stage import StageFailure
from pipelines.stages.ingest import IngestConfig

from .conftest import FakeStage, rejects


def sentences(columns: dict[str, Any], _: object) -> Iterator[dict[str, Any]]:
    """Yield the sentences of a text; a text without a full stop is bad."""
    for sentence in columns["text"].split(" ")[:-1]:
        yield {"text": sentence}
    if not columns["text"].endswith(" ."):
        raise ValueError("no full stop")


@pytest.fixture
def gathered(data: Path, output: Path):
    def run(to_content: Any, text: str, **settings: Any) -> tuple[dict[str, Any], list[str]]:
        (data / "a.txt").write_text(text)
        config = IngestConfig(source="text", unit="line", files=["a.txt"], **settings)
        metadata = gather(config, FakeStage(output, config.sources(data)), to_content, "documents")
        return metadata, (output / "train.jsonl").read_text().splitlines()

    return run


def test_each_record_of_a_row_is_a_record_of_its_own(gathered):
    metadata, lines = gathered(sentences, "one two .\nthree two .\n")
    assert lines == [f'{{"text": "{word}", "source": "a.txt"}}' for word in ("one", "two", "three")]
    assert metadata["train"] == {"documents": 3, "bytes": 11}
    assert metadata["records"] == {"read": 2, "bad": 0, "empty": 0, "short": 0, "duplicate": 1, "left_by_weight": 0}


def test_no_record_of_a_bad_row_is_kept(gathered, output):
    metadata, lines = gathered(sentences, "one two\nthree .\n", on_bad_record="skip", max_bad_share=0.5)
    assert lines == ['{"text": "three", "source": "a.txt"}']
    assert (metadata["records"]["bad"], [each["reason"] for each in rejects(output)]) == (1, ["no full stop"])


@pytest.mark.parametrize("nothing", [None, []])
def test_a_row_that_is_left_out_is_counted_but_is_not_bad(gathered, nothing):
    metadata, lines = gathered(lambda columns, _: {"text": "b"} if columns["text"] == "b" else nothing, "a\nb\na\n")
    assert lines == ['{"text": "b", "source": "a.txt"}']
    assert metadata["records"] == {"read": 3, "bad": 0, "empty": 0, "short": 0, "duplicate": 0, "left_by_weight": 0, "left_out": 2}


def test_a_stage_that_leaves_out_every_row_reports_how_many(gathered):
    with pytest.raises(StageFailure, match=r"no train documents are left \(records: 2 read, .* 2 left_out;"):
        gathered(lambda *_: None, "a\nb\n")
