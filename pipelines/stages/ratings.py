"""Ratings: responses that somebody scored."""

from __future__ import annotations

import math
from typing import Any

from pydantic import model_validator

from pipelines.artifacts import Ratings
from pipelines.ingest.dialogue_settings import DialogueConfig, DialogueSettings
from pipelines.ingest.dialogues import to_ratings
from pipelines.ingest.gather import gather
from pipelines.stage import StageContext


class RatingsConfig(DialogueConfig):
    kind = "ratings"
    score_range: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest possible score. Scores are moved to 0 to 1, and one outside is a bad record. A score of true is the
    highest, of false the lowest."""

    @model_validator(mode="after")
    def _range_has_an_inside(self) -> RatingsConfig:
        lowest, highest = self.score_range
        if not lowest < highest or not math.isfinite(highest - lowest):
            raise ValueError(f"score_range = {list(self.score_range)}: expected the lowest score, then the highest")
        return self


def ratings(config: RatingsConfig, stage: StageContext) -> Ratings:
    """Turn every record into a rated response, or count it under the reason why not."""

    def to_content(columns: dict[str, Any], source: DialogueSettings) -> list[dict[str, Any]]:
        return to_ratings(columns, source, config.score_range)

    return stage.publish(Ratings, **gather(config, stage, to_content, "ratings", columns=config.columns_read))
