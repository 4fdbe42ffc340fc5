"""The rule for metric names, for ranks, stages and gates. It has its own file because `cluster/rank.py` needs torch."""

from __future__ import annotations

import re

METRIC_NAME = re.compile(r"(data|train|val|eval|rollout|reward|time|system)/[a-z0-9_]+")


def check_metric_name(name: str) -> None:
    """Raise ValueError where the name is given, rather than later from MLflow."""
    if not METRIC_NAME.fullmatch(name):
        raise ValueError(f"metric name {name!r}: expected area/name_unit in lower case, e.g. 'time/step_s' ({METRIC_NAME.pattern})")
