"""mlflow_notes.py: the texts that MLflow shows of a run."""

from __future__ import annotations

import pytest

from pipelines.observe.mlflow_notes import source_name


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("gptline run configs/small/line.toml", "gptline run line.toml"),
        (
            "gptline run configs/line.toml --set tracking.uri=http://127.0.0.1:5000 --set pretrain.lr=0.1",
            "gptline run line.toml --set tracking.uri=127.0.0.1:5000 --set pretrain.lr=0.1",
        ),
        ("gptline run line.toml --set data=books/", "gptline run line.toml --set data=books"),
        ("gptline run 'my files/line.toml'", "gptline run line.toml"),
        ("gptline run 'unfinished/line.toml", "gptline run line.toml"),
        ("", ""),
    ],
)
def test_the_source_of_a_run_has_no_slash_since_mlflow_shows_only_what_follows_the_last_one(command: str, expected: str) -> None:
    assert source_name(command) == expected
    assert "/" not in source_name(command)
