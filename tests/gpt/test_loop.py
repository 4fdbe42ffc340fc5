from __future__ import annotations

import pickle

import pytest

from gpt.loop import Trained, log_is_due, save_or_stop
from gpt.settings import TrainSettings


def settings(**changes: int) -> TrainSettings:
    return TrainSettings(**{**dict(steps=7, global_batch_size=2, lr=1e-3, log_every=3, checkpoint_every=2), **changes})


def test_metrics_are_logged_every_few_steps_and_after_the_last_one():
    assert [finished for finished in range(1, 8) if log_is_due(settings(), finished)] == [3, 6, 7]


@pytest.mark.parametrize(("save_last", "saved"), [(True, [2, 4, 6, 7]), (False, [2, 4, 6])])
def test_a_checkpoint_is_saved_every_few_steps_and_after_the_last_one_only_if_asked(make_rank, save_last, saved):
    rank = make_rank()
    assert not any(save_or_stop(rank, settings(), finished, save_last=save_last) for finished in range(1, 8))
    assert rank.saved == saved


def test_a_last_step_at_which_a_checkpoint_is_due_is_saved_once_or_not_at_all(make_rank):
    for save_last, saved in ((True, [2, 4]), (False, [2])):
        rank = make_rank(str(save_last))
        assert not any(save_or_stop(rank, settings(steps=4), finished, save_last=save_last) for finished in range(1, 5))
        assert rank.saved == saved


def test_a_stop_saves_the_step_at_which_it_is_noticed_and_is_ignored_after_the_last_step(make_rank):
    rank = make_rank(stop_after=3)
    assert [save_or_stop(rank, settings(), finished) for finished in (1, 2, 3)] == [False, False, True]
    assert rank.saved == [2, 3]
    last = make_rank("last", stop_after=1)
    assert not save_or_stop(last, settings(), 7)


def test_a_result_survives_pickling():
    trained = Trained({"role": "policy", "steps": 7}, figures={"reward/score_mean": 0.5})
    assert pickle.loads(pickle.dumps(trained)) == trained
