"""How well a model predicts text it has not seen: the exact held-out loss, and what general compressors need for the same bytes.

Bits per byte compare models of any tokenizer with each other and with compressors. Gao et al. 2020 (The Pile), section 3.1.
"""

from __future__ import annotations

import lzma
import math

import numpy as np
import torch

from gpt.batching import held_out_batch, held_out_windows
from gpt.model import GPT

PPMD_ORDER = 6
PPMD_MEMORY_BYTES = 256 << 20


@torch.no_grad()
def held_out_nats(
    model: GPT, token_ids: np.ndarray, *, document_id: int, stride: int | None = None, micro_batch_size: int = 16
) -> tuple[float, int]:
    """The nats that the model needs for token_ids (n,), and n: each is scored once, with half a window before it where there is one.

    `stride` is how many tokens a window scores; None: half of seq_len. The text is read as if a document had ended just
    before it, so its first token is scored too.
    """
    assert not model.training, "an evaluation wants model.eval()"
    seq_len = model.config.seq_len
    device = model.token_embedding.weight.device
    files = [np.concatenate([[document_id], token_ids])]
    windows = held_out_windows([len(files[0])], seq_len, stride or max(1, seq_len // 2))
    nats, count = 0.0, 0
    for first in range(0, len(windows), micro_batch_size):
        batch = held_out_batch(files, windows[first : first + micro_batch_size], seq_len).to(device)
        hidden = model.hidden_states(batch.token_ids)[batch.loss_mask]  # (scored, C)
        logits = model.output(hidden).float()  # (scored, V)
        nats += torch.nn.functional.cross_entropy(logits, batch.targets[batch.loss_mask], reduction="none").double().sum().item()
        count += len(hidden)
    assert count == len(token_ids), f"scored {count} of {len(token_ids)} tokens"
    return nats, count


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """`n_bytes` counts the documents' UTF-8 bytes alone.

    The nats include those for the end-of-document tokens, which add no bytes: a little more than a model of the bytes needs.
    """
    if n_bytes < 1:
        raise ValueError("there are no held-out bytes to divide by; hold out some documents at ingest")
    return nats / math.log(2) / n_bytes


def xz_bits_per_byte(held_out: bytes) -> float:
    """What `xz -9e` needs for this text alone."""
    return 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out)


def ppmd_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """What a statistical coder needs that has read the training text first: how much longer its output gets. Shkarin 2002 (PPMd)."""
    return 8 * (_ppmd_size(train + held_out) - _ppmd_size(train)) / len(held_out)


def _ppmd_size(text: bytes) -> int:
    import pyppmd

    return len(pyppmd.compress(text, max_order=PPMD_ORDER, mem_size=PPMD_MEMORY_BYTES))
