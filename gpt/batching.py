"""Which tokens a step sees, computed by index arithmetic: `batch = f(seed, step)`, so the step is the data position.

Token files are flat arrays on disk. An epoch cuts each into windows from a random offset and visits every window once, in random order.
Ranks and micro-batches are slices of the same global batch; they never change which rows a step sees.

Left out: masks between the documents of a window (attention crosses their boundary), and packing to fill windows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from gpt.random_streams import permutation, stream_seed

SCAN_TOKENS = 1 << 24

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """A micro-batch: all (B, T). `targets` are `token_ids` shifted by one; True in `loss_mask` = counts."""

    token_ids: Tensor
    targets: Tensor
    loss_mask: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.token_ids.to(device), self.targets.to(device), self.loss_mask.to(device))


def open_tokens(path: Path, dtype: str, vocab_size: int) -> np.ndarray:
    """Map a file of little-endian unsigned integers ("uint16", "uint32") as (n,), and check it once against the vocabulary."""
    unit = np.dtype(dtype).newbyteorder("<")
    n_bytes = path.stat().st_size
    if n_bytes % unit.itemsize:
        raise ValueError(
            f"{path}: expected {dtype} tokens of {unit.itemsize} bytes each, found {n_bytes} bytes; rebuild the tokens artifact"
        )
    if not n_bytes:
        return np.empty(0, unit)  # an empty file can't be mapped
    tokens = np.memmap(path, unit, mode="r")
    for start in range(0, len(tokens), SCAN_TOKENS):
        block = tokens[start : start + SCAN_TOKENS]
        if block.max() >= vocab_size:
            position = start + int(np.argmax(block >= vocab_size))
            raise ValueError(
                f"{path}: expected the tokenizer's ids 0 to {vocab_size - 1}, found {tokens[position]} at token {position:,}; "
                "use the tokenizer and the tokens of the same artifact"
            )
    return tokens


class TrainingBatches:
    """`TrainingBatches([tokens], seq_len=128, global_batch_size=32, seed=1).micro_batch(step, rows)` for any step, in any order."""

    def __init__(self, files: Sequence[np.ndarray], *, seq_len: int, global_batch_size: int, seed: int) -> None:
        for number, tokens in enumerate(files):
            if len(tokens) < seq_len + 1:
                raise ValueError(
                    f"training tokens {number + 1} of {len(files)}: expected at least one window of seq_len + 1 = {seq_len + 1} tokens, "
                    f"found {len(tokens)}; add text, or lower seq_len"
                )
        self._files = files
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._seed = seed
        # One window less than would fit, which leaves room for the epoch's offset and makes all epochs equally long.
        n_windows = [max(1, (len(tokens) - seq_len) // seq_len) for tokens in files]
        self._first_window = [0, *accumulate(n_windows)]
        self._order = lru_cache(maxsize=2)(self._draw_order)  # a step may straddle two epochs

    def windows_per_epoch(self) -> int:
        return self._first_window[-1]

    def window(self, step: int, row: int) -> tuple[int, int]:
        """Where a row of the step's global batch starts: its file, and the first token within it."""
        epoch, index = divmod(step * self._global_batch_size + row, self.windows_per_epoch())
        order, offsets = self._order(epoch)
        window = int(order[index])
        file = bisect_right(self._first_window, window) - 1
        return file, offsets[file] + (window - self._first_window[file]) * self._seq_len

    def micro_batch(self, step: int, rows: range) -> Batch:
        """Return these rows of the step's global batch."""
        windows = [self.window(step, row) for row in rows]
        tokens = np.stack([self._files[file][start : start + self._seq_len + 1] for file, start in windows])
        token_ids = torch.from_numpy(tokens.astype(np.int64))  # (B, T + 1)
        return Batch(token_ids[:, :-1], token_ids[:, 1:], torch.ones(len(rows), self._seq_len, dtype=torch.bool))

    def _draw_order(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Draw the epoch's order of all windows, and where in each file the first window starts."""
        offsets = []
        for file, tokens in enumerate(self._files):
            n_windows = self._first_window[file + 1] - self._first_window[file]
            spare = len(tokens) - 1 - n_windows * self._seq_len
            offsets.append(stream_seed(self._seed, "offset", epoch, file) % (min(spare, self._seq_len - 1) + 1))
        return permutation(stream_seed(self._seed, "order", epoch), self.windows_per_epoch()), offsets


def micro_batch_rows(rank: int, world_size: int, global_batch_size: int, gradient_accumulation_steps: int) -> list[range]:
    """The rows of the global batch that a rank computes, one range per micro-step: consecutive slices of its share."""
    share = global_batch_size // world_size
    size = share // gradient_accumulation_steps
    first = rank * share
    return [range(first + micro_step * size, first + (micro_step + 1) * size) for micro_step in range(gradient_accumulation_steps)]


@dataclass(frozen=True)
class Window:
    """A held-out window, which reads `tokens[start : stop - 1]` and scores the targets `tokens[score_from : stop]`."""

    file: int
    start: int
    score_from: int
    stop: int


class HeldOutWindows(Sequence[Window]):
    """Windows that score every token except a file's first once, with at least seq_len - stride tokens of context if there are as many.

    They are computed when they are asked for, so their number costs no memory.
    """

    def __init__(self, n_tokens: Sequence[int], seq_len: int, stride: int) -> None:
        if not 1 <= stride <= seq_len:
            raise ValueError(f"expected stride from 1 to seq_len = {seq_len}, found {stride}: tokens between windows would never be scored")
        self._n_tokens, self._seq_len, self._stride = n_tokens, seq_len, stride
        # A file's first window scores seq_len tokens, each later one `stride` of them.
        n_windows = [1 + max(0, -(-(n - 1 - seq_len) // stride)) if n > 1 else 0 for n in n_tokens]
        self._first_window = [0, *accumulate(n_windows)]

    def __len__(self) -> int:
        return self._first_window[-1]

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect_right(self._first_window, index) - 1
        start = (index - self._first_window[file]) * self._stride
        score_from = start + 1 + (self._seq_len - self._stride if start else 0)
        return Window(file, start, score_from, min(start + self._seq_len + 1, self._n_tokens[file]))


def held_out_batch(files: Sequence[np.ndarray], windows: Sequence[Window], seq_len: int) -> Batch:
    """Rows padded on the right to seq_len. Padding does not count, nor do tokens that another window scores."""
    token_ids = torch.zeros(len(windows), seq_len + 1, dtype=torch.int64)
    loss_mask = torch.zeros(len(windows), seq_len, dtype=torch.bool)
    for row, window in enumerate(windows):
        tokens = files[window.file][window.start : window.stop].astype(np.int64)
        token_ids[row, : len(tokens)] = torch.from_numpy(tokens)
        loss_mask[row, window.score_from - window.start - 1 : len(tokens) - 1] = True
    return Batch(token_ids[:, :-1], token_ids[:, 1:], loss_mask)


class ShuffledRows:
    """Which of n examples a step sees. Every epoch has each of them once, in its own random order.

    `ShuffledRows(1000, batch_size=16, seed=1, name="sft").of_step(7)` are 16 numbers below 1,000.
    """

    def __init__(self, n: int, *, batch_size: int, seed: int, name: str) -> None:
        self._n = n
        self._batch_size = batch_size
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(stream_seed(seed, name, epoch), n))

    def of_step(self, step: int) -> list[int]:
        positions = (divmod(step * self._batch_size + row, self._n) for row in range(self._batch_size))
        return [int(self._order(epoch)[index]) for epoch, index in positions]


def evenly(items: Sequence[T], at_most: int) -> list[T]:
    """Select at most this many items, evenly spaced: `evenly("abcdef", 3)` is a, c, e."""
    n = min(len(items), at_most)
    return [items[i * len(items) // n] for i in range(n)]


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Token ids of unequal length as (B, T), padded on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], dtype=torch.int64)
