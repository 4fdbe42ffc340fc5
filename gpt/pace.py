"""How fast a loop goes."""

from __future__ import annotations


class Pace:
    """The steps since the last log: `pace.add(tokens=512, seconds=0.5)` after each of them, `**pace.metrics()` when they are logged."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._tokens = 0

    def add(self, *, tokens: int, seconds: float) -> None:
        """A step of all ranks' tokens."""
        self._seconds.append(seconds)
        self._tokens += tokens

    def metrics(self) -> dict[str, float]:
        """Of at least one step; the next ones are counted anew."""
        total_s = sum(self._seconds)
        metrics = {"train/tokens_per_s": self._tokens / total_s, "time/step_s": total_s / len(self._seconds)}
        self._seconds, self._tokens = [], 0
        return metrics
