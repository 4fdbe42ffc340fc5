"""Every random number of a pipeline comes from a named stream; nothing draws from ambient state.

A stream is named by the seed and its purpose: `stream_seed(seed, "dropout", step, rank, micro_step)`. What step 500 draws therefore
depends on no earlier step, and a resumed run has no generator state to restore.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream_seed(seed: int, *names: str | int) -> int:
    """Return a seed in [0, 2^63) for the stream with this name. Streams with different names are independent, as far as anyone can tell."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def permutation(stream: int, n: int) -> np.ndarray:
    """Return a random order of 0 .. n - 1, (n,) int64."""
    # Raw bits and a stable sort, which numpy keeps the same across versions, unlike Generator.permutation.
    return np.argsort(np.random.Philox(key=stream).random_raw(n), kind="stable")


def uniforms(stream: int, n: int) -> np.ndarray:
    """Return the stream's first n draws from [0, 1), (n,) float64."""
    return (np.random.Philox(key=stream).random_raw(n) >> np.uint64(11)) * 2.0**-53
