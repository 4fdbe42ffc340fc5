"""The tokenizer stage: settings that are refused while the file is read, and a vocabulary that comes out too small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gpt.tokenizer import MIN_VOCAB_SIZE
from pipelines.artifacts import Documents, Tokenizer
from pipelines.stages.tokenizer import TokenizerConfig, tokenizer


class Bench:
    """The part of StageContext that tokenizer uses."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.notes: list[str] = []
        self.shown: list[tuple[int, int, str]] = []

    def progress(self, done: int, total: int, unit: str) -> None:
        self.shown.append((done, total, unit))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def publish(self, kind: type[Tokenizer], **metadata: Any) -> Tokenizer:
        return kind(self.output, "0" * 64, metadata)


@pytest.mark.parametrize(
    ("vocab_size", "notes"),
    [
        # "abab" has the merges ab and abab, so 264 tokens are all there are.
        (264, []),
        (280, []),
        (1_000_000, ["the vocabulary has 264 tokens instead of vocab_size = 1,000,000: "]),
    ],
)
def test_a_vocabulary_far_below_the_requested_size_is_reported(tmp_path: Path, vocab_size: int, notes: list[str]) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "abab"}) + "\n")
    bench = Bench(tmp_path)
    documents = Documents(tmp_path, "d" * 64, {"train": {"documents": 1}})
    made = tokenizer(TokenizerConfig(vocab_size=vocab_size), [documents], bench)  # type: ignore[arg-type]
    assert made.metadata["vocab_size"] == 264
    assert bench.shown == [(1, 1, "documents"), (1, 1, "documents read, learning merges")]
    assert [note[: len(start)] for note, start in zip(bench.notes, notes, strict=True)] == notes


def test_a_vocabulary_too_small_for_all_bytes_is_refused_as_a_setting() -> None:
    with pytest.raises(ValidationError, match="vocab_size = 261 is less than 262: 256 bytes and 6 special tokens; raise it"):
        TokenizerConfig(vocab_size=MIN_VOCAB_SIZE - 1)
    assert TokenizerConfig(vocab_size=MIN_VOCAB_SIZE).vocab_size == 262


def test_the_setting_is_checked_without_loading_the_tokenizers_library() -> None:
    code = (
        "import sys; from pipelines.stages.tokenizer import TokenizerConfig as T; T(vocab_size=300); assert 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
