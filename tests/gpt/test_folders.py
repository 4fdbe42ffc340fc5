from __future__ import annotations

from pathlib import Path

import torch

from gpt.folders import read_records, save_trained
from gpt.model import GPT, load_model
from gpt.settings import GPTConfig

CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=4, seq_len=4, vocab_size=8)


def test_records_come_folder_by_folder_line_by_line_of_the_split_alone(tmp_path: Path):
    for name, lines in (("one", '{"a": 1}\n{"a": "\u00e9\u2028"}\n'), ("two", '{"a": 3}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(lines, encoding="utf-8")
        (tmp_path / name / "held_out.jsonl").write_text("")
    folders = [tmp_path / "two", tmp_path / "one"]
    assert list(read_records(folders, "train")) == [{"a": 3}, {"a": 1}, {"a": "\u00e9\u2028"}]
    assert list(read_records(folders, "held_out")) == []


def test_of_all_ranks_the_first_alone_writes_the_model_and_its_tokenizer(make_rank, tmp_path: Path):
    model = GPT(CONFIG, torch.Generator().manual_seed(1))
    weights = dict(model.named_parameters())
    (tmp_path / "words.json").write_text("{}")
    rank = make_rank()
    rank.rank = 1
    save_trained(rank, weights, CONFIG, tmp_path / "words.json", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    rank.rank = 0
    save_trained(rank, weights, CONFIG, tmp_path / "words.json", tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    assert torch.equal(load_model(tmp_path / "model").output.weight, model.output.weight)
