"""Text to token ids and back: byte-level BPE, or plain bytes, both as one `tokenizer.json`.

Ids 0 to 255 are the bytes, then come the merges in the order they were learned, then the special tokens. A special token is a vocabulary
entry that no merge leads to, so text that spells "<|end|>" cannot become one, whichever library opens the file; code that needs the token
uses `tokenizer.special["end"]`. An imported tokenizer keeps its own order of ids.

Left out: normalisation of any kind (every text decodes to the same bytes), and sampling of segmentations.
Sennrich et al. 2016 (BPE, arXiv:1508.07909); Radford et al. 2019 (bytes as the alphabet, and the pattern that splits words).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

SPECIAL_NAMES = ("user", "assistant", "system", "end", "document", "pad")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_NAMES)
MAX_TRAINED_WORD_BYTES = 1024
"""Longer unbroken words are cut into pieces of this size while merges are learned, since that takes time quadratic in a word's length.
Only tokens longer than this are lost by it."""
MAX_BATCH_CHARS = 1 << 20
"""A batch of texts is full at this size; a longer text is a batch by itself. Encoding takes up to 150 bytes of memory a character."""


class Tokenizer:
    """`Tokenizer.load(folder / "tokenizer.json").encode("To be")`."""

    def __init__(self, definition: str) -> None:
        """Read the text of a `tokenizer.json` that this module wrote."""
        self._definition = definition
        self._backend = tokenizers.Tokenizer.from_str(definition)
        vocab = self._backend.get_vocab(with_added_tokens=True)
        missing = [special_text(name) for name in SPECIAL_NAMES if special_text(name) not in vocab]
        if missing:
            raise ValueError(
                f"expected the special tokens {', '.join(missing)}, found none of them among {len(vocab):,} tokens; "
                "use a tokenizer.json that the tokenizer stage made"
            )
        self.special = {name: vocab[special_text(name)] for name in SPECIAL_NAMES}
        """Ids of the special tokens by name: `special["end"]` is the id of <|end|>."""
        byte_of = {char: byte for byte, char in enumerate(byte_chars())}
        self._bytes = [b""] * len(vocab)
        for token, token_id in vocab.items():
            self._bytes[token_id] = bytes(byte_of[char] for char in token)
        self.ids_are_bytes = self.vocab_size == MIN_VOCAB_SIZE and self._bytes[:256] == [bytes([byte]) for byte in range(256)]
        """There are no merges, so a text's ids are its bytes."""

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        return cls(path.read_text(encoding="utf-8"))

    def save(self, path: Path) -> None:
        path.write_text(self._definition, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """The number of ids, special tokens included."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        if self.ids_are_bytes:
            return list(text.encode())
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, on all cores."""
        if self.ids_are_bytes:
            return [self.encode(text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_stream(self, texts: Iterable[str], batch_size: int) -> Iterator[tuple[str, list[int]]]:
        """Yield each text with its ids, encoding at most `batch_size` texts at a time, fewer if they are long."""
        batch: list[str] = []
        n_chars = 0
        for text in texts:
            batch.append(text)
            n_chars += len(text)
            if len(batch) == batch_size or n_chars >= MAX_BATCH_CHARS:
                yield from zip(batch, self.encode_batch(batch), strict=True)
                batch, n_chars = [], 0
        yield from zip(batch, self.encode_batch(batch), strict=True)

    def decode_bytes(self, token_ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[token_id] for token_id in token_ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Invert `encode`. Bytes that are not UTF-8, which a model may write, become U+FFFD."""
        return self.decode_bytes(token_ids).decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        return TextStream(self)


class TextStream:
    """Decodes token by token for display: a character is returned once its last byte has arrived, never in part."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, *token_ids: int) -> str:
        """Return the characters that these tokens complete. A character that the text ends within is never returned."""
        return self._decoder.decode(self._tokenizer.decode_bytes(token_ids))


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose tokens are bytes: `encode("a")` is [97]."""
    return _from_merges([])


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges. The same texts in the same order give the same file. A small text may have fewer merges to learn than requested."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"expected vocab_size of at least {MIN_VOCAB_SIZE}, for 256 bytes and {len(SPECIAL_NAMES)} special tokens, found {vocab_size}; "
            'raise it, or use the "bytes" tokenizer'
        )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = training_words()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL_NAMES), initial_alphabet=byte_chars(), show_progress=False)
    learner.train_from_iterator(texts, trainer)
    return _from_merges([(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]])


def training_words() -> pre_tokenizers.PreTokenizer:
    """How text is split into words to learn merges from: by GPT-2's pattern, then at MAX_TRAINED_WORD_BYTES."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.FixedLength(length=MAX_TRAINED_WORD_BYTES)]
    )


def read_gpt2(definition: str) -> tuple[Tokenizer, int]:
    """Convert a GPT-2's `tokenizer.json`. Also return how many ids that file has; those keep their tokens.

    Its <|endoftext|> becomes our <|document|> with the same id, and special tokens that it lacks get ids at the end. Its added tokens
    become ordinary entries that no text leads to: there "<|endoftext|>" inside a text is one token, here it is spelled out. What its
    post_processor puts around a text is left out. ValueError lists everything that our format cannot express.
    """
    try:
        content = json.loads(tokenizers.Tokenizer.from_str(definition).to_str())  # whichever version wrote it, in today's form
    except Exception as error:
        raise ValueError(f"this tokenizer.json cannot be read: {error}") from error
    if content["model"]["type"] != "BPE":
        raise ValueError(f"this tokenizer.json: expected byte-level BPE like GPT-2's, found {content['model']['type']}")
    vocab: dict[str, int] = content["model"]["vocab"]
    merges = [(left, right) for left, right in content["model"]["merges"]]
    problems = _differences_from_gpt2(content)
    for added in content["added_tokens"]:
        text, token_id = added["content"], added["id"]
        vocab.pop(text, None)
        if vocab.setdefault(_spelled(text), token_id) != token_id:
            problems.append(f"its added token {text!r} ({token_id}) spells the same text as token {vocab[_spelled(text)]}")
    if "<|endoftext|>" in vocab and special_text("document") not in vocab:
        vocab[special_text("document")] = vocab.pop("<|endoftext|>")
    known = len(vocab)
    if sorted(vocab.values()) != list(range(known)):
        problems.append(f"its {known:,} tokens do not have the ids 0 to {known - 1:,}, each once")
    alphabet = set(byte_chars())
    if lacking := alphabet - vocab.keys():
        problems.append(f"it has no token for {len(lacking)} of the 256 bytes, so parts of texts would be lost")
    if foreign := [token for token in vocab if not alphabet.issuperset(token)]:
        problems.append(f"{len(foreign)} of its tokens are not spelled in bytes, such as {foreign[0]!r}")
    special = {"<|endoftext|>", *map(special_text, SPECIAL_NAMES)}
    problems += [f"a merge leads to {left + right!r}, which no text may become" for left, right in merges if left + right in special]
    if problems:
        raise ValueError(f"this tokenizer.json cannot be imported: {'; '.join(problems)}; only byte-level BPE like GPT-2's can")
    for name in SPECIAL_NAMES:
        vocab.setdefault(special_text(name), len(vocab))
    return _from_vocab(dict(sorted(vocab.items(), key=lambda item: item[1])), merges), known


def _differences_from_gpt2(content: dict[str, Any]) -> list[str]:
    """List the steps before and within merging that neither GPT-2's tokenizer nor our format has."""
    problems = []
    normalizer, splitting, model = content["normalizer"], content["pre_tokenizer"] or {"type": "none"}, content["model"]
    if normalizer is not None:
        problems.append(f"expected no normalizer, found {normalizer['type']}")
    if splitting["type"] != "ByteLevel":
        problems.append(f"expected only ByteLevel as pre_tokenizer, found {splitting['type']}")
    elif splitting["add_prefix_space"]:
        problems.append("expected pre_tokenizer.add_prefix_space = false, found true")
    elif model["merges"] and not splitting["use_regex"]:
        problems.append("expected pre_tokenizer.use_regex = true, which is GPT-2's pattern, found false")
    names = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return problems + [f"expected no model.{name}, found {json.dumps(model[name])}" for name in names if model[name]]


def special_text(name: str) -> str:
    return f"<|{name}|>"


def byte_chars() -> list[str]:
    """GPT-2's printable character for each byte: the Latin-1 character if that is visible, else the next free one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    free = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(free)) for byte in range(256)]


def _from_merges(merges: list[tuple[str, str]]) -> Tokenizer:
    # Two merges may spell the same token; its first occurrence determines its id.
    tokens = dict.fromkeys([*byte_chars(), *(left + right for left, right in merges)])
    # No merge crosses the boundaries that GPT-2's pattern finds in "<|end|>", between letters and punctuation.
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
