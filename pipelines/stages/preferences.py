"""Preferences: a prompt and two responses, one of which somebody preferred."""

from __future__ import annotations

from pipelines.artifacts import Preferences
from pipelines.ingest.dialogue_settings import DialogueConfig, PairSource, WeightedPairSource
from pipelines.ingest.gather import gather
from pipelines.ingest.pairs import to_pairs
from pipelines.stage import StageContext


class PreferencesConfig(DialogueConfig, PairSource):
    kind = "preferences"
    mixture: tuple[WeightedPairSource, ...] = ()
    """Several sources instead of the inline one."""


def preferences(config: PreferencesConfig, stage: StageContext) -> Preferences:
    """Turn every record into a pair, or several where it holds more than two responses, or count it under the reason why not."""
    return stage.publish(Preferences, **gather(config, stage, to_pairs, "pairs", columns=config.columns_read))
