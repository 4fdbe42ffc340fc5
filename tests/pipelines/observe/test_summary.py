"""summary.py says in a few words how much an artifact holds."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.observe.summary import summary, summary_of
from pipelines.store.store import Store

PAIRS = {
    "pairs": 760, "bytes": 81_000, "empty_files": 0, "replaced_characters": 0,
    "train": {"pairs": 687, "bytes": 73_000}, "held_out": {"pairs": 73, "bytes": 8_000},
    "records": {"read": 999, "bad": 163, "duplicate": 76, "empty": 0, "short": 0, "left_by_weight": 0},
    "licenses": {"unknown": {"pairs": 760, "bytes": 81_000}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "metadata", "expected"),
    [
        ("preferences", PAIRS, "760 pairs (73 held out; 163 bad, 76 duplicates)"),
        ("documents", {"documents": 1, "train": {"documents": 1}, "records": {"read": 1}}, "1 document"),
        ("documents", {"documents": 9, "train": {"documents": 9}, "records": {"short": 1, "duplicate": 1}, "empty_files": 2},
         "9 documents (1 too short, 1 duplicate, 2 empty files)"),
        ("documents", {"documents": 9, "train": {"documents": 9}, "records": {"read": 11, "my_own_reason": 2}},
         "9 documents (2 my own reason)"),
        ("prompts", {"train": {"prompts": 3}, "held_out": {"prompts": 1}}, "4 prompts (1 held out)"),
        ("ratings", {"train": {"ratings": 3}, "held_out": {"ratings": 0}, "records": {"bad": 1, "left_out": 2}},
         "3 ratings (1 bad, 2 left out by the stage)"),
        ("documents", {"train": {"documents": 8}, "held_out": {"documents": 92},
                       "hold_out": {"asked": 0.5, "by": "book", "share": 0.92, "groups": 5}},
         "100 documents (92 held out); held out 92 % of the records, asked for 50 %, drawn from 5 values of book"),
        ("documents", {"documents": 1812, "bytes": 20_000_000}, "1,812 documents"),
        ("tokens", {"train": {"tokens": 1465}, "held_out": {"tokens": 1335}, "vocab_size": 280}, "2,800 tokens (1,335 held out)"),
        ("tokenizer", {"algorithm": "bpe", "vocab_size": 280}, "280 tokens, bpe"),
        ("model", {"role": "policy", "parameters": 1_074_304, "steps": 800}, "1,074,304 parameters, 800 steps"),
        ("model", {"parameters": 34_944, "steps": 2, "conversations": {"train": 8, "too_long": 1, "cut": 0}},
         "34,944 parameters, 2 steps, 8 conversations (1 too long)"),
        ("model", {"parameters": 34_977, "train": {"pairs": 7, "ratings": 9, "too_long": 2, "alike": 0}},
         "34,977 parameters, 7 pairs and 9 ratings (2 too long)"),
        ("report", {"questions": 1, "too_long": 0}, "1 question"),
        ("code", {}, ""),
        ("letters", {"letters": 3, "of": "words", "whole": True}, "3 letters"),
    ],
)  # fmt: skip
def test_a_summary_names_what_there_is_and_what_was_left_out(kind: str, metadata: dict[str, Any], expected: str) -> None:
    assert summary(kind, metadata) == expected


@pytest.mark.parametrize("value", [None, "many", [1], {"pairs": "many"}, -1.5])
def test_odd_values_in_a_users_own_metadata_do_no_harm(value: Any) -> None:
    for kind in ("preferences", "model", "tokens", "tokenizer", "report", "my own"):
        for name in ("train", "held_out", "records", "conversations", "parameters", "replaced_characters", "pairs"):
            assert isinstance(summary(kind, PAIRS | {name: value}), str)


def test_an_artifact_that_is_gone_has_an_empty_summary(store: Store) -> None:
    folder = store.new_folder()
    (folder / "train.jsonl").write_text("{}")
    pairs = store.publish(folder, "preferences", PAIRS)
    assert summary_of(store, pairs.digest) == "760 pairs (73 held out; 163 bad, 76 duplicates)"
    assert summary_of(store, "0" * 64) == ""
