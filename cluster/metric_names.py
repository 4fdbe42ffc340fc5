"""What a metric may be called: the one rule for ranks, stages and gates. In a file of its own, since `cluster/rank.py` needs torch."""

from __future__ import annotations

import re

METRIC_NAME = re.compile(r"(data|train|val|eval|rollout|reward|time|system)/[a-z0-9_]+")


def check_metric_name(name: str) -> None:
    """ValueError here, where the name is given, and not later and elsewhere from MLflow."""
    if not METRIC_NAME.fullmatch(name):
        raise ValueError(f"metric name {name!r}: want area/name_unit in lower case, e.g. 'time/step_s' ({METRIC_NAME.pattern})")
