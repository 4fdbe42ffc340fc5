"""The tokenizer stage's settings are refused while the file is read, before anything upstream has run."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from gpt.tokenizer import MIN_VOCAB_SIZE
from pipelines.stages.tokenizer import TokenizerConfig


def test_a_vocabulary_that_cannot_hold_all_bytes_is_refused_as_a_setting() -> None:
    with pytest.raises(ValidationError, match="vocab_size = 261 is less than 262: 256 bytes and 6 special tokens; ask for more"):
        TokenizerConfig(vocab_size=MIN_VOCAB_SIZE - 1)
    assert TokenizerConfig(vocab_size=MIN_VOCAB_SIZE).vocab_size == 262


def test_the_setting_is_checked_without_the_library_of_tokenizers() -> None:
    code = (
        "import sys; from pipelines.stages.tokenizer import TokenizerConfig as T; T(vocab_size=300); assert 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
