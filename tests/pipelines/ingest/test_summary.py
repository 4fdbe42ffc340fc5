"""One line summarises what ingest made, from metadata of any version."""

import json

import pytest

from pipelines.ingest.summary import summary_of


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        (
            {
                "train": {"pairs": 687},
                "held_out": {"pairs": 73},
                "records": {"read": 999, "bad": 163, "empty": 0, "short": 0, "duplicate": 76, "left_by_weight": 0},
            },
            "760 pairs (73 held out; 163 bad, 76 duplicates)",
        ),
        ({"train": {"documents": 1200}, "held_out": {"documents": 0}, "records": {"read": 1200, "bad": 0}}, "1,200 documents"),
        ({"train": {"prompts": 3}, "held_out": {"prompts": 1}}, "4 prompts (1 held out)"),
        (
            {"train": {"ratings": 3}, "held_out": {"ratings": 0}, "records": {"bad": 1, "left_out": 2}},
            "3 ratings (1 bad, 2 left out by the stage)",
        ),
        ({"vocab_size": 4096}, ""),
        ({"train": 3}, ""),
        ({}, ""),
    ],
)
def test_a_row_counts_the_records_and_what_was_left_out(metadata, line):
    assert summary_of(metadata) == line


def test_a_held_out_share_far_from_the_requested_one_is_reported(ingested):
    # one of five books has 92 of 100 records, so whichever side it is on, the share is far from a half
    books = ["long"] * 92 + ["a", "a", "b", "b", "c", "c", "d", "d"]
    rows = "".join(json.dumps({"text": f"text {number}", "book": book}) + "\n" for number, book in enumerate(books)).encode()
    result = ingested({"a.jsonl": rows}, source="json", hold_out={"share": 0.5, "by": "book"})
    held_out = len(result.texts("held_out"))
    assert abs(held_out - 50) > 40
    assert result.metadata("hold_out") == {"asked": 0.5, "by": "book", "share": held_out / 100, "groups": 5}
    assert summary_of(result.documents.metadata) == (
        f"100 documents ({held_out} held out); held out {held_out} % of the records, asked for 50 %, drawn from 5 values of book"
    )


def test_a_share_near_the_requested_one_is_not_mentioned(ingested):
    rows = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(1000)).encode()
    assert "hold_out" not in ingested({"a.jsonl": rows}, source="json", hold_out={"share": 0.1}).documents.metadata
