"""What training reads from artifacts' folders and writes to one: records, and the trained model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt.engine import Rank
from gpt.model import GPT, save_model
from gpt.settings import GPTConfig

RECORDS_PER_SECTION = 1000


def read_records(folders: Sequence[Path], split: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a split ("train", "held_out"), one folder after the other."""
    for folder in folders:
        with open(folder / f"{split}.jsonl", encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def records_in_sections(rank: Rank, folders: Sequence[Path], split: str, unit: str, deadline_s: float) -> Iterator[dict[str, Any]]:
    """Yield the records of a split, with a deadline for every 1,000 of them rather than for all. `unit` names them: "conversations".

    What the caller does with a record counts towards its section, so encoding may take hours as long as it moves on.
    """
    with rank.section("encode", deadline_s):
        total = sum(map(_count_lines, (folder / f"{split}.jsonl" for folder in folders)))
    records = read_records(folders, split)
    for first in range(0, total, RECORDS_PER_SECTION):
        with rank.section("encode", deadline_s):
            for done, record in enumerate(islice(records, RECORDS_PER_SECTION), start=first + 1):
                yield record
                rank.progress(done, total, f"{unit} encoded")


def _count_lines(path: Path) -> int:
    with open(path, "rb") as lines:
        return sum(1 for _ in lines)


def save_trained(
    rank: Rank, weights: Mapping[str, Tensor], config: GPTConfig, tokenizer: Path, output: Path, model_class: type[GPT] = GPT
) -> None:
    """Write a model artifact's files on rank 0: an engine's full weights, their configuration, and the tokenizer.json of their tokens."""
    if rank.rank == 0:
        save_model(output, config, weights, model_class)
        shutil.copyfile(tokenizer, output / "tokenizer.json")
