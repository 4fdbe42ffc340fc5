"""Ratings: responses that somebody scored."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from pipelines.artifacts import Ratings
from pipelines.ingest.dialogues import DialogueConfig, DialogueSettings, to_rating
from pipelines.records import gather
from pipelines.stage import StageContext


class RatingsConfig(DialogueConfig):
    score_range: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest score that there can be; scores are moved to 0 to 1, and one outside is a bad record."""

    @model_validator(mode="after")
    def _range_has_an_inside(self) -> RatingsConfig:
        if not self.score_range[0] < self.score_range[1]:
            raise ValueError(f"score_range = {list(self.score_range)}: wanted the lowest score, then the highest")
        return self


def ratings(config: RatingsConfig, stage: StageContext) -> Ratings:
    """Every record becomes a rated response, or is counted under the reason why not."""

    def to_content(columns: dict[str, Any], source: DialogueSettings) -> dict[str, Any]:
        return to_rating(columns, source, config.score_range)

    return stage.publish(Ratings, **gather(config, stage, to_content, "ratings"))
