from __future__ import annotations

from typing import Any

from gpt.rl.experience import update_rows
from gpt.settings import RlSettings


def settings(**changes: Any) -> RlSettings:
    base = dict(steps=2, prompts_per_step=4, responses_per_prompt=2, global_batch_size=4, max_response_tokens=8, lr=1e-2)
    return RlSettings(**{**base, **changes})


def test_an_epoch_visits_every_rollout_once_in_its_own_order():
    first, second = update_rows(settings(ppo_epochs=2), seed=1, step=3)
    for updates in (first, second):
        assert [len(update) for update in updates] == [4, 4]
        assert sorted(row for update in updates for row in update) == list(range(8))
    assert first != second
    assert [first] != update_rows(settings(), seed=1, step=4)
