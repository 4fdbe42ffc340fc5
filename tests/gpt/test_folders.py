from __future__ import annotations

from pathlib import Path

import torch

from gpt.folders import RECORDS_PER_SECTION, read_records, records_in_sections, save_trained
from gpt.model import GPT, load_model
from gpt.settings import GPTConfig

CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=4, seq_len=4, vocab_size=8)


def test_only_the_splits_records_are_read_folder_by_folder_and_line_by_line(tmp_path: Path):
    for name, lines in (("one", '{"a": 1}\n{"a": "\u00e9\u2028"}\n'), ("two", '{"a": 3}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(lines, encoding="utf-8")
        (tmp_path / name / "held_out.jsonl").write_text("")
    folders = [tmp_path / "two", tmp_path / "one"]
    assert list(read_records(folders, "train")) == [{"a": 3}, {"a": 1}, {"a": "\u00e9\u2028"}]
    assert list(read_records(folders, "held_out")) == []


def test_only_rank_0_writes_the_model_and_its_tokenizer(make_rank, tmp_path: Path):
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


def test_every_thousand_records_have_a_deadline_of_their_own(make_rank, tmp_path: Path):
    for name, n in (("one", RECORDS_PER_SECTION + 1), ("two", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(f'{{"n": {number}}}\n' for number in range(n)))
    folders = [tmp_path / "one", tmp_path / "two"]
    rank = make_rank()
    sections_at = [len(rank.sections) for _ in records_in_sections(rank, folders, "train", "pairs", 60.0)]
    assert sections_at == [2] * RECORDS_PER_SECTION + [3] * 6  # the first one counts the records
    assert set(rank.sections) == {"encode"}
    assert list(records_in_sections(make_rank("again"), folders, "train", "pairs", 60.0)) == list(read_records(folders, "train"))


def test_each_record_is_reported_once_its_reader_has_encoded_it(make_rank, tmp_path: Path):
    (tmp_path / "held_out.jsonl").write_text('{"n": 1}\n{"n": 2}')  # the last line may lack its end
    rank = make_rank()
    shown_at = [len(rank.shown) for _ in records_in_sections(rank, [tmp_path], "held_out", "pairs", 60.0)]
    assert shown_at == [0, 1]
    assert rank.shown == [(1, 2, "pairs encoded"), (2, 2, "pairs encoded")]


def test_a_split_without_records_reports_nothing(make_rank, tmp_path: Path):
    (tmp_path / "held_out.jsonl").touch()
    rank = make_rank()
    assert list(records_in_sections(rank, [tmp_path], "held_out", "pairs", 60.0)) == []
    assert rank.shown == []
