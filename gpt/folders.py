"""What training reads from artifacts' folders and what it leaves in one: records, and the trained model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt.engine import Rank
from gpt.model import GPT, save_model
from gpt.settings import GPTConfig


def read_records(folders: Sequence[Path], split: str) -> Iterator[dict[str, Any]]:
    """Those of the split ("train", "held_out"), one folder after the other."""
    for folder in folders:
        with open(folder / f"{split}.jsonl", encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def save_trained(
    rank: Rank, weights: Mapping[str, Tensor], config: GPTConfig, tokenizer: Path, output: Path, kind: type[GPT] = GPT
) -> None:
    """A model artifact's files, by rank 0: an engine's full weights, what shape they have, and the tokenizer.json of their tokens."""
    if rank.rank == 0:
        save_model(output, config, weights, kind)
        shutil.copyfile(tokenizer, output / "tokenizer.json")
