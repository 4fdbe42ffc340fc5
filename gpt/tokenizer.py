"""Text to token ids and back: byte-level BPE, or plain bytes, both as one `tokenizer.json`.

The ids: 0 to 255 are the bytes, then the merges in the order they were learned, then the special tokens. A special token
is an entry of the vocabulary that no merge leads to, so text that spells "<|end|>" can't become one, whoever opens the
file: whoever wants the token says `tokenizer.special["end"]`. An imported tokenizer keeps its own order of ids.

Left out: normalisation of any kind (every text comes back byte for byte), and sampling of segmentations.
Sennrich et al. 2016 (BPE, arXiv:1508.07909); Radford et al. 2019 (bytes as the alphabet, and the pattern that splits words).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

SPECIAL_NAMES = ("user", "assistant", "system", "end", "document", "pad")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_NAMES)


class Tokenizer:
    """`Tokenizer.load(folder / "tokenizer.json").encode("To be")`."""

    def __init__(self, definition: str) -> None:
        """`definition` is the text of a `tokenizer.json` that this module wrote."""
        self._definition = definition
        self._backend = tokenizers.Tokenizer.from_str(definition)
        vocab = self._backend.get_vocab(with_added_tokens=True)
        missing = [special_text(name) for name in SPECIAL_NAMES if special_text(name) not in vocab]
        if missing:
            raise ValueError(
                f"this tokenizer has no {', '.join(missing)} among its {len(vocab):,} tokens; "
                "take a tokenizer.json that the tokenizer stage made"
            )
        self.special = {name: vocab[special_text(name)] for name in SPECIAL_NAMES}
        """The ids of <|user|> and so on, by name."""
        byte_of = {char: byte for byte, char in enumerate(byte_chars())}
        self._bytes = [b""] * len(vocab)
        for token, token_id in vocab.items():
            self._bytes[token_id] = bytes(byte_of[char] for char in token)
        self.ids_are_bytes = self.vocab_size == MIN_VOCAB_SIZE and self._bytes[:256] == [bytes([byte]) for byte in range(256)]
        """Nothing to merge: a text's ids are its bytes."""

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        return cls(path.read_text(encoding="utf-8"))

    def save(self, path: Path) -> None:
        path.write_text(self._definition, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """All ids, the special ones included."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        if self.ids_are_bytes:
            return list(text.encode())
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode` of each, on all cores."""
        if self.ids_are_bytes:
            return [self.encode(text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode_bytes(self, token_ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[token_id] for token_id in token_ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """What `encode` was given; bytes that are no UTF-8, as a model may write them, become U+FFFD."""
        return self.decode_bytes(token_ids).decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        return TextStream(self)


class TextStream:
    """Decodes token by token, for people: a character comes out once its last byte is there, and never in part."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, *token_ids: int) -> str:
        """The characters that these tokens complete. A character that the text breaks off in never comes out."""
        return self._decoder.decode(self._tokenizer.decode_bytes(token_ids))


def byte_tokenizer() -> Tokenizer:
    """A byte is a token: `encode("a")` is [97]."""
    return _from_merges([])


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The same texts in the same order give the same file. A small text may have fewer merges to learn than were asked for."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size = {vocab_size} is less than {MIN_VOCAB_SIZE}: 256 bytes and {len(SPECIAL_NAMES)} special tokens; "
            'ask for more, or for the "bytes" tokenizer'
        )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL_NAMES), initial_alphabet=byte_chars(), show_progress=False)
    learner.train_from_iterator(texts, trainer)
    return _from_merges([(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]])


def read_gpt2(definition: str) -> tuple[Tokenizer, int]:
    """The tokenizer of a GPT-2's `tokenizer.json`, and how many ids that file has: those keep their tokens.

    Its <|endoftext|> becomes our <|document|>, under the same id; special tokens that it lacks get ids at the end. Its added tokens
    become plain entries that no text leads to: there "<|endoftext|>" inside a text is one token, here it is spelled out. What it puts
    around a text (its post_processor) is left out. ValueError lists all that can't be done in our format.
    """
    try:
        content = json.loads(tokenizers.Tokenizer.from_str(definition).to_str())  # whichever version wrote it: today's form
    except Exception as error:
        raise ValueError(f"this tokenizer.json can't be read: {error}") from error
    if content["model"]["type"] != "BPE":
        raise ValueError(f"this tokenizer.json is {content['model']['type']}; only byte-level BPE, as GPT-2's, can be imported")
    vocab: dict[str, int] = content["model"]["vocab"]
    merges = [(left, right) for left, right in content["model"]["merges"]]
    faults = _what_gpt2_does_otherwise(content)
    for added in content["added_tokens"]:
        text, token_id = added["content"], added["id"]
        vocab.pop(text, None)
        if vocab.setdefault(_spelled(text), token_id) != token_id:
            faults.append(f"its added token {text!r} ({token_id}) spells the same text as token {vocab[_spelled(text)]}")
    if "<|endoftext|>" in vocab and special_text("document") not in vocab:
        vocab[special_text("document")] = vocab.pop("<|endoftext|>")
    known = len(vocab)
    if sorted(vocab.values()) != list(range(known)):
        faults.append(f"its {known:,} tokens don't have the ids 0 to {known - 1:,}, each once")
    alphabet = set(byte_chars())
    if lacking := alphabet - vocab.keys():
        faults.append(f"it has no token for {len(lacking)} of the 256 bytes, so that it would lose parts of texts")
    if foreign := [token for token in vocab if not alphabet.issuperset(token)]:
        faults.append(f"{len(foreign)} of its tokens are not spelled in bytes, such as {foreign[0]!r}")
    special = {"<|endoftext|>", *map(special_text, SPECIAL_NAMES)}
    faults += [f"a merge leads to {left + right!r}, which no text may" for left, right in merges if left + right in special]
    if faults:
        raise ValueError(f"this tokenizer.json can't be imported: {'; '.join(faults)}; only byte-level BPE, as GPT-2's, can")
    for name in SPECIAL_NAMES:
        vocab.setdefault(special_text(name), len(vocab))
    return _from_vocab(dict(sorted(vocab.items(), key=lambda item: item[1])), merges), known


def _what_gpt2_does_otherwise(content: dict[str, Any]) -> list[str]:
    """Steps before and inside the merging that our format does not have, as GPT-2's has not."""
    faults = []
    normalizer, splitting, model = content["normalizer"], content["pre_tokenizer"] or {"type": "none"}, content["model"]
    if normalizer is not None:
        faults.append(f"its normalizer is {normalizer['type']}, wanted none")
    if splitting["type"] != "ByteLevel":
        faults.append(f"its pre_tokenizer is {splitting['type']}, wanted ByteLevel alone")
    elif splitting["add_prefix_space"]:
        faults.append("its pre_tokenizer has add_prefix_space = true, wanted false")
    elif model["merges"] and not splitting["use_regex"]:
        faults.append("its pre_tokenizer has use_regex = false, wanted true: GPT-2's pattern")
    names = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return faults + [f"its model has {name} = {json.dumps(model[name])}, wanted none" for name in names if model[name]]


def special_text(name: str) -> str:
    return f"<|{name}|>"


def byte_chars() -> list[str]:
    """GPT-2's printable character for each byte: its own where Latin-1 can show it, else the next free one from U+0100 on."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    free = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(free)) for byte in range(256)]


def _from_merges(merges: list[tuple[str, str]]) -> Tokenizer:
    # Two merges may spell the same token, so a token is numbered where it is met first.
    tokens = dict.fromkeys([*byte_chars(), *(left + right for left, right in merges)])
    # No merge crosses the boundaries that GPT-2's pattern sees in "<|end|>": letters and signs are apart.
    assert not any(special_text(name) in tokens for name in SPECIAL_NAMES)
    tokens |= dict.fromkeys(special_text(name) for name in SPECIAL_NAMES)
    return _from_vocab({token: token_id for token_id, token in enumerate(tokens)}, merges)


def _spelled(text: str) -> str:
    chars = byte_chars()
    return "".join(chars[byte] for byte in text.encode())


def _from_vocab(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    definition: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": bool(merges)},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(merge) for merge in merges],
        },
    }
    return Tokenizer(json.dumps(definition, ensure_ascii=False, indent=1) + "\n")
