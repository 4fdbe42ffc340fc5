"""How well a model predicts text it has not seen: the exact held-out loss, and what general compressors need for the same bytes.

Bits per byte make models with different tokenizers comparable, with each other and with compressors. Nothing here holds a whole corpus
in memory: token ids may be mapped from a file, and text arrives in chunks. Gao et al. 2020 (The Pile), section 3.1.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Iterable
from itertools import chain

import numpy as np
import torch

from gpt.batching import HeldOutWindows, held_out_batch
from gpt.model import GPT

PPMD_ORDER = 6
PPMD_MEMORY_BYTES = 256 << 20


@torch.no_grad()
def held_out_nats(
    model: GPT,
    tokens: np.ndarray,
    *,
    stride: int | None = None,
    micro_batch_size: int = 16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, int]:
    """Return the nats that the model needs for all of `tokens` (n,) but the first, and how many those are.

    The first token is only context: put <|document|> there, so that the first one of the text is scored too. Each token is scored once,
    by windows that overlap. `stride` is how many tokens a window scores; None: half of seq_len.
    """
    assert not model.training, "call model.eval() before an evaluation"
    seq_len = model.config.seq_len
    device = model.token_embedding.weight.device
    windows = HeldOutWindows([len(tokens)], seq_len, stride or max(1, seq_len // 2))
    nats, count = 0.0, 0
    for first in range(0, len(windows), micro_batch_size):
        batch = held_out_batch([tokens], windows[first : first + micro_batch_size], seq_len).to(device)
        hidden = model.hidden_states(batch.token_ids)[batch.loss_mask]  # (scored, C)
        logits = model.output(hidden).float()  # (scored, V)
        nats += torch.nn.functional.cross_entropy(logits, batch.targets[batch.loss_mask], reduction="none").double().sum().item()
        count += len(hidden)
        on_progress(count, len(tokens) - 1)
    assert count == len(tokens) - 1, f"scored {count} of {len(tokens) - 1} tokens"
    return nats, count


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Divide by `n_bytes`, the UTF-8 bytes of the documents' text.

    The nats include those for end-of-document tokens, which add no bytes, so this is slightly more than a pure model of bytes needs.
    """
    if n_bytes < 1:
        raise ValueError("there are no held-out bytes to divide by; set hold_out in the ingest stage")
    return nats / math.log(2) / n_bytes


def xz_bits_per_byte(held_out: Iterable[bytes]) -> float:
    """What `xz -9e` needs for this text by itself."""
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    n_bytes = size = 0
    for chunk in held_out:
        n_bytes += len(chunk)
        size += len(compressor.compress(chunk))
    return 8 * (size + len(compressor.flush())) / n_bytes


def ppmd_bits_per_byte(train: Callable[[], Iterable[bytes]], held_out: Callable[[], Iterable[bytes]]) -> float:
    """What a statistical coder needs for the held-out text after the training text: by how much its output grows. Shkarin 2002 (PPMd).

    Both are functions that begin to read their text, since the training text is read twice.
    """
    train_size, n_train_bytes = _ppmd(train())
    size, n_bytes = _ppmd(chain(train(), held_out()))
    return 8 * (size - train_size) / (n_bytes - n_train_bytes)


def _ppmd(text: Iterable[bytes]) -> tuple[int, int]:
    """A text's size in bytes, compressed and uncompressed."""
    import pyppmd

    encoder = pyppmd.Ppmd8Encoder(PPMD_ORDER, PPMD_MEMORY_BYTES)
    n_bytes = size = 0
    for chunk in text:
        n_bytes += len(chunk)
        size += len(encoder.encode(chunk))
    return size + len(encoder.flush()), n_bytes
