"""Every random number of the line comes from a stream with a name; nothing draws from ambient state.

A stream is named by the seed and by what it is for: `stream_seed(seed, "dropout", step, rank, micro_step)`.
What step 500 draws therefore depends on no step before it, and a resumed run needs no generator's state restored.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) for the stream of this name; different names are independent for all that we can tell."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def permutation(stream: int, n: int) -> np.ndarray:
    """An order of 0 .. n - 1, (n,) int64."""
    # Raw bits and a stable sort: numpy promises those across versions, but not what Generator.permutation draws.
    return np.argsort(np.random.Philox(key=stream).random_raw(n), kind="stable")


def uniforms(stream: int, n: int) -> np.ndarray:
    """The stream's first n draws from [0, 1), (n,) float64."""
    return (np.random.Philox(key=stream).random_raw(n) >> np.uint64(11)) * 2.0**-53
