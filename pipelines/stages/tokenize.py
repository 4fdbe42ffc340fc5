"""Tokenize: the documents of each split become one flat array of token ids, with <|document|> after each document."""

from __future__ import annotations

import shutil

from pydantic import Field

from gpt.settings import Operational
from pipelines.artifacts import SPLITS, Documents, Tokenizer, Tokens
from pipelines.stage import StageConfig, StageContext


class TokenizeConfig(StageConfig):
    documents_per_batch: Operational[int] = Field(default=256, ge=1)
    """Most documents that are encoded together; long ones are fewer."""


def tokenize(config: TokenizeConfig, documents: list[Documents], tokenizer: Tokenizer, stage: StageContext) -> Tokens:
    """Ids are little-endian unsigned integers, of 16 bits if the vocabulary allows it, else 32."""
    import numpy as np

    from gpt.tokenizer import Tokenizer as Encoder

    encoder = Encoder.load(tokenizer.path / "tokenizer.json")
    dtype = np.dtype("<u2" if encoder.vocab_size <= 1 << 16 else "<u4")
    total = sum(each.metadata[split]["documents"] for each in documents for split in SPLITS)
    done = 0
    counts = {}
    for split in SPLITS:
        tokens = n_documents = n_bytes = 0
        with open(stage.output / f"{split}.bin", "wb") as file:
            for each in documents:
                for text, token_ids in encoder.encode_stream(each.texts(split), config.documents_per_batch):
                    row = np.array([*token_ids, encoder.special["document"]], dtype=dtype)
                    row.tofile(file)
                    tokens += len(row)
                    n_documents += 1
                    n_bytes += len(text.encode())
                    done += 1
                    stage.progress(done, total, "documents")
        counts[split] = {"tokens": tokens, "documents": n_documents, "bytes": n_bytes}
    shutil.copyfile(tokenizer.path / "tokenizer.json", stage.output / "tokenizer.json")
    return stage.publish(Tokens, **counts, dtype=dtype.name, vocab_size=encoder.vocab_size, tokenizer=tokenizer.digest)
