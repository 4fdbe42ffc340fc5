"""How fast a loop runs."""

from __future__ import annotations


class Pace:
    """The steps since the last log: call `pace.add(tokens=512, seconds=0.5)` after each step, and log `**pace.metrics()`."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._tokens = 0

    def add(self, *, tokens: int, seconds: float) -> None:
        """Count a step; `tokens` are those of all ranks."""
        self._seconds.append(seconds)
        self._tokens += tokens

    def metrics(self) -> dict[str, float]:
        """Average over the steps since the last call, at least one."""
        total_s = sum(self._seconds)
        metrics = {"train/tokens_per_s": self._tokens / total_s, "time/step_s": total_s / len(self._seconds)}
        self._seconds, self._tokens = [], 0
        return metrics
