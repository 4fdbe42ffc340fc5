from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from gpt.tokenizer import (
    MAX_BATCH_CHARS,
    MAX_TRAINED_WORD_BYTES,
    MIN_VOCAB_SIZE,
    SPECIAL_NAMES,
    Tokenizer,
    byte_tokenizer,
    special_text,
    train_bpe,
    training_words,
)

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "明月几时有，把酒问青天。" * 3, "<|end|> " * 50]
BPE = train_bpe(TEXTS, 300)
BYTES = byte_tokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])


@BOTH
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_decodes_to_the_same_bytes(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(token_ids) == text.encode()
    assert tokenizer.decode(token_ids) == text


@BOTH
@pytest.mark.parametrize("text", ["", " ", "\r\n\t", "  two  spaces ", "\x00", "\ufeffBOM", "👩‍👩‍👧 ñ ﷽", "a" * 5000])
def test_awkward_texts_decode_to_themselves(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@BOTH
@pytest.mark.parametrize("name", SPECIAL_NAMES)
def test_text_that_spells_a_special_token_never_becomes_one(tokenizer, name):
    text = f"a{special_text(name)}b {special_text(name)}"
    token_ids = tokenizer.encode(text)
    assert not set(token_ids) & set(tokenizer.special.values())
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.encode_batch([text]) == [token_ids]


def test_a_byte_is_its_own_id_and_the_special_tokens_come_last():
    assert BYTES.encode("aé") == [97, 0xC3, 0xA9]
    assert BYTES.vocab_size == 262
    assert BYTES.special == {"user": 256, "assistant": 257, "system": 258, "end": 259, "document": 260, "pad": 261}
    assert BPE.encode("b") == [98]
    assert sorted(BPE.special.values()) == list(range(294, 300))


def test_the_first_merge_is_the_most_frequent_pair():
    # "aa" is in "aab" twice as often as "cc" in "ccb".
    tokenizer = train_bpe(["aab aab ccb"], MIN_VOCAB_SIZE + 1)
    assert tokenizer.decode_bytes([256]) == b"aa"
    assert tokenizer.encode("aacc") == [256, 99, 99]


def test_a_vocabulary_has_the_requested_size_or_as_many_tokens_as_the_text_yields():
    assert BPE.vocab_size == 300
    assert train_bpe(["ab ab"], 1000).vocab_size == MIN_VOCAB_SIZE + 2  # "ab", " ab"


@pytest.mark.parametrize(
    "word", ["acgt" * 50_000, "明月" * 30_000, "=" * 10_000, " " * 10_000], ids=["letters", "chinese", "signs", "spaces"]
)
def test_words_to_learn_from_are_cut_at_the_limit_without_losing_a_byte(word):
    # Learning takes time quadratic in a word's length, so this bounds it: 200,000 letters are 196 words.
    words = [text for text, _ in training_words().pre_tokenize_str(f"a {word}")]
    assert max(map(len, words)) == MAX_TRAINED_WORD_BYTES
    assert sum(map(len, words)) == len(f"a {word}".encode())
    assert len(words) <= len(word.encode()) // MAX_TRAINED_WORD_BYTES + 3


def test_words_up_to_the_limit_are_split_by_gpt2s_pattern_only():
    text = "The cat's 123 mats,\n\n  月几时有 " + "x" * (MAX_TRAINED_WORD_BYTES - 1)  # and the space before
    assert training_words().pre_tokenize_str(text) == pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)


def test_a_stream_of_texts_is_encoded_in_batches_and_in_order(monkeypatch):
    sizes: list[int] = []
    encode_batch = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: (sizes.append(len(texts)), encode_batch(self, texts))[1])
    assert list(BPE.encode_stream(iter(TEXTS), 3)) == [(text, BPE.encode(text)) for text in TEXTS]
    assert [size for size in sizes if size] == [3, 1]


def test_a_batch_of_long_texts_has_fewer_of_them(monkeypatch):
    sizes: list[int] = []
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: (sizes.append(len(texts)), [[0]] * len(texts))[1])
    texts = ["a" * (MAX_BATCH_CHARS // 2)] * 5 + ["a" * MAX_BATCH_CHARS] * 2
    assert [text for text, _ in BPE.encode_stream(texts, 256)] == texts
    assert [size for size in sizes if size] == [2, 2, 2, 1]


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"expected vocab_size of at least 262, .*, found 100"):
        train_bpe(TEXTS, 100)


def test_the_same_texts_give_the_same_file_whatever_the_number_of_threads(tmp_path):
    program = """
import sys
from pathlib import Path
from gpt.tokenizer import train_bpe
train_bpe([f"w{i % 97} x{i % 31}y" for i in range(3000)], 500).save(Path(sys.argv[1]))
"""
    files = []
    for threads in ("1", "2", "7"):
        path = tmp_path / threads
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        subprocess.run([sys.executable, "-c", program, path], env=environment, check=True)
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_a_saved_tokenizer_loads_as_the_same_tokenizer(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert loaded.encode("the cat") == BPE.encode("the cat")


def test_a_tokenizer_without_the_special_tokens_is_refused():
    import tokenizers
    from tokenizers import models

    with pytest.raises(ValueError, match=r"expected the special tokens <\|user\|>, .* use a tokenizer\.json that the tokenizer stage made"):
        Tokenizer(tokenizers.Tokenizer(models.BPE()).to_str())


@BOTH
def test_a_batch_is_encoded_like_each_text_by_itself(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_a_stream_returns_a_character_with_its_last_byte():
    stream = BYTES.stream()
    assert [stream.feed(byte) for byte in "月a".encode()] == ["", "", "月", "a"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_a_stream_fed_token_by_token_returns_the_whole_text(text):
    stream = BPE.stream()
    assert "".join(stream.feed(token_id) for token_id in BPE.encode(text)) == text


def test_a_text_that_ends_within_a_character_shows_no_part_of_it():
    broken = BYTES.encode("青天")[:-1]
    assert BYTES.stream().feed(*broken) == "青"
    assert BYTES.decode(broken) == "青\ufffd"


def test_importing_the_tokenizer_imports_neither_torch_nor_transformers():
    program = "import sys, gpt.tokenizer; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True)
