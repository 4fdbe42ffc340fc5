from __future__ import annotations

import lzma
import math
import random

import numpy as np
import pytest
import torch

from gpt.evaluation import bits_per_byte, held_out_nats, ppmd_bits_per_byte, xz_bits_per_byte
from gpt.model import GPT
from gpt.settings import PRESETS, GPTConfig

VOCAB = 20
MODEL = GPT(GPTConfig(**{**PRESETS["gpt2-nano"].model_dump(), "seq_len": 8}, vocab_size=VOCAB), torch.Generator().manual_seed(1)).eval()
with torch.no_grad():
    MODEL.token_embedding.weight.mul_(20.0)
DOCUMENT = 19


def by_definition(tokens: list[int], stride: int) -> float:
    """Score every token with all the context that its window has. Windows after the first start at multiples of the stride."""
    text = [DOCUMENT, *tokens]
    nats = 0.0
    for place in range(1, len(text)):
        window = 0 if place <= 8 else -(-(place - 8) // stride)
        context = torch.tensor([text[window * stride : place]])
        nats -= MODEL(context)[0, -1].log_softmax(-1)[text[place]].item()
    return nats


@pytest.mark.parametrize("n", [1, 7, 8, 9, 12, 13, 30])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_each_token_is_scored_once_with_the_context_that_its_window_gives(n, stride):
    drawn = random.Random(n)
    tokens = [drawn.randrange(VOCAB) for _ in range(n)]
    nats, count = held_out_nats(MODEL, np.array([DOCUMENT, *tokens], np.uint16), stride=stride, micro_batch_size=3)
    assert count == n
    assert nats == pytest.approx(by_definition(tokens, stride), rel=1e-5)


def test_the_default_stride_is_half_a_window():
    tokens = np.arange(31, dtype=np.uint16) % VOCAB
    assert held_out_nats(MODEL, tokens) == held_out_nats(MODEL, tokens, stride=4)


def test_a_stride_that_would_skip_tokens_is_refused():
    with pytest.raises(ValueError, match="expected stride from 1 to seq_len = 8, found 9"):
        held_out_nats(MODEL, np.arange(9, dtype=np.uint16), stride=9)


def test_8_bytes_for_16_bits_of_information_are_2_bits_per_byte():
    assert bits_per_byte(16 * math.log(2), 8) == pytest.approx(2.0)


def test_no_held_out_bytes_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="set hold_out in the ingest stage"):
        bits_per_byte(1.0, 0)


def test_xz_is_measured_by_the_size_of_its_file():
    text = b"to be or not to be " * 20
    chunks = [text[:7], b"", text[7:]]
    assert xz_bits_per_byte(chunks) == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def test_ppmd_needs_almost_nothing_for_a_text_that_it_has_read_before():
    drawn = random.Random(1)
    text = bytes(drawn.choices(b"abcdefgh ", k=3000))
    other = bytes(drawn.choices(b"abcdefgh ", k=3000))
    assert ppmd_bits_per_byte(lambda: [text], lambda: [text[:1000], text[1000:]]) < 0.7
    assert 3.0 < ppmd_bits_per_byte(lambda: [other], lambda: [text]) < 3.8  # 9 equally likely letters: log2 9 = 3.17 bits
