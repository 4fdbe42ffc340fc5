"""Tokenizer: learn byte-level BPE merges from the training split, or use plain bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import field_validator, model_validator

from gpt.settings import Size
from pipelines.artifacts import Documents, Tokenizer
from pipelines.stage import StageConfig, StageContext

# Equals gpt.tokenizer.MIN_VOCAB_SIZE, whose module loads a library that no plan needs; a test compares the two.
SMALLEST_VOCAB_SIZE = 262
SMALL_SHARE = 0.9
"""A vocabulary below this share of the requested size is reported."""


class TokenizerConfig(StageConfig):
    algorithm: Literal["bpe", "bytes"] = "bpe"
    """"bytes" learns nothing: each byte is a token."""
    vocab_size: Size | None = None
    """Number of tokens, including the 256 bytes and the special tokens. Required for "bpe", and only for it."""

    @field_validator("vocab_size")
    @classmethod
    def _bytes_and_special_tokens_fit(cls, vocab_size: int | None) -> int | None:
        if vocab_size is not None and vocab_size < SMALLEST_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size = {vocab_size} is less than {SMALLEST_VOCAB_SIZE}: 256 bytes and {SMALLEST_VOCAB_SIZE - 256} special tokens; "
                'raise it, or set algorithm = "bytes"'
            )
        return vocab_size

    @model_validator(mode="after")
    def _size_goes_with_bpe(self) -> TokenizerConfig:
        if (self.algorithm == "bpe") != (self.vocab_size is not None):
            problem = "vocab_size is missing" if self.algorithm == "bpe" else f"vocab_size = {self.vocab_size} has no effect"
            raise ValueError(f'{problem} with algorithm = "{self.algorithm}"')
        return self


def tokenizer(config: TokenizerConfig, documents: list[Documents], stage: StageContext) -> Tokenizer:
    """Learn from the training split only: held-out text must stay unseen."""
    from gpt.tokenizer import byte_tokenizer, train_bpe

    total = sum(each.metadata["train"]["documents"] for each in documents)

    def texts() -> Iterator[str]:
        done = 0
        for each in documents:
            for text in each.texts("train"):
                yield text
                done += 1
                stage.progress(done, total, "documents")
        stage.progress(total, total, "documents read, learning merges")

    if config.algorithm == "bytes" or config.vocab_size is None:
        learned = byte_tokenizer()
    else:
        learned = train_bpe(texts(), config.vocab_size)
        if learned.vocab_size < SMALL_SHARE * config.vocab_size:
            stage.note(
                f"the vocabulary has {learned.vocab_size:,} tokens instead of vocab_size = {config.vocab_size:,}: the training text has no "
                "more pairs to merge; lower vocab_size, or add text"
            )
    learned.save(stage.output / "tokenizer.json")
    return stage.publish(Tokenizer, algorithm=config.algorithm, vocab_size=learned.vocab_size)
