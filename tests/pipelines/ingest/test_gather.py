"""What ingest offers a user's own stage: rows that become no record or several, counted reasons, and the rows themselves."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.ingest import Reader, Reject, Row, gather
from pipelines.stage import StageFailure
from pipelines.stages.ingest import IngestConfig

from .conftest import FakeStage, rejects


@pytest.fixture
def gathered(data: Path, output: Path):
    def run(rows: list[dict[str, Any]], to_content: Any, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        (data / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = IngestConfig(source="json", files=["a.jsonl"], **settings)
        metadata = gather(config, FakeStage(output, config.sources(data)), to_content, "documents")
        return [json.loads(line) for line in (output / "train.jsonl").open()], metadata

    return run


def test_a_row_may_become_several_records_or_none(gathered):
    rows = [{"replies": ["a", "b"]}, {"replies": None}, {"replies": []}, {"replies": ["c"]}]
    records, metadata = gathered(rows, lambda columns, _: columns["replies"] and [{"text": reply} for reply in columns["replies"]])
    assert [record["text"] for record in records] == ["a", "b", "c"]
    assert metadata["documents"] == 3
    assert metadata["records"] == {
        "read": 4,
        "bad": 0,
        "empty": 0,
        "short": 0,
        "duplicate": 0,
        "left_by_weight": 0,
        "left_out": 2,
    }


def test_one_of_a_rows_records_can_be_bad_and_a_generator_may_fail_in_the_middle(gathered, output):
    def to_content(columns: dict[str, Any], _: Any) -> Any:
        for reply in columns["replies"]:
            if reply == "oops":
                raise ValueError("a reply is 'oops'")
            yield {"text": reply}

    rows = [{"replies": ["a", "x\0"]}, {"replies": ["b", "oops"]}, {"replies": ["c"]}]
    records, metadata = gathered(rows, to_content, on_bad_record="skip", max_bad_share=1.0)
    assert [record["text"] for record in records] == ["a", "c"]
    assert [(each["line"], each["reason"]) for each in rejects(output)] == [(1, "a NUL character"), (2, "a reply is 'oops'")]
    assert metadata["records"]["bad"] == 2


def test_reasons_are_counted_and_the_most_frequent_are_shown_when_a_stage_fails(gathered, output):
    def to_content(columns: dict[str, Any], _: Any) -> dict[str, Any]:
        raise ValueError(columns["reason"])

    reasons = ["score is '7', expected 0 to 5", "score is '8', expected 0 to 5", "score is '9', expected 0 to 5", "no answer", "no answer"]
    rows = [{"reason": reason} for reason in [*reasons, "odd", "strange"]]
    with pytest.raises(StageFailure) as failed:
        gathered(rows, to_content, on_bad_record="skip", max_bad_share=1.0)
    assert str(failed.value) == (
        "no train documents are left (records: 7 read, 7 bad, 0 empty, 0 short, 0 duplicate, 0 left_by_weight; 0 empty files; "
        "bad ones by reason: 3 x score is '7', expected 0 to 5 (a.jsonl, line 1, column 1 (byte 0)); "
        "2 x no answer (a.jsonl, line 4, column 1 (byte 132)); 1 x odd "
        "(a.jsonl, line 6, column 1 (byte 180)); 1 for other reasons); look at files, their columns and min_chars"
    )
    assert len(rejects(output)) == 7


def test_too_many_bad_records_fail_with_their_reasons(gathered):
    def to_content(columns: dict[str, Any], _: Any) -> dict[str, Any]:
        if columns["text"] == "bad":
            raise ValueError("it is bad")
        return columns

    rows = [{"text": "good"}, {"text": "bad"}, {"text": "bad"}]
    with pytest.raises(StageFailure, match=r"2 of 3 records are bad, .* By reason: 2 x it is bad \(a.jsonl, line 2, .*Fix them, or raise"):
        gathered(rows, to_content, on_bad_record="skip", max_bad_share=0.5)


def test_a_users_own_loop_reads_rows_and_rejects_with_their_places(data, output):
    (data / "a.jsonl").write_text('{"text": "a", "n": 1}\noops\n')
    config = IngestConfig(source="json", files=["a.jsonl"])
    reader = Reader(FakeStage(output, config.sources(data)), config)
    row, reject = reader.rows(config)
    assert isinstance(row, Row)
    assert isinstance(reject, Reject)
    assert (row.columns, row.place.line, reject.place.line, reader.records) == ({"text": "a", "n": 1}, 1, 2, 2)


def test_a_field_of_the_name_of_a_records_own_key_is_a_bad_record(gathered):
    rows = [{"text": "a", "verse": 1}]
    with pytest.raises(StageFailure, match="fields names 'verse', which is a key of every record already; remove it"):
        gathered(rows, lambda columns, _: {"text": columns["text"], "verse": "one"}, fields=["verse"])


def test_an_empty_side_says_what_it_was_drawn_from(gathered):
    rows = [{"text": f"line {number}", "book": "a" if number < 9 else "b"} for number in range(20)]
    with pytest.raises(
        StageFailure, match=r"no held_out documents are left \(records: 20 read, .*; drawn from 2 values of book\); give hold_out"
    ):
        gathered(rows, lambda columns, _: {"text": columns["text"]}, hold_out={"share": 0.01, "by": "book"})
