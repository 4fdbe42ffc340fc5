from __future__ import annotations

from typing import Any

import pytest

from gpt.settings import ModelShape, PretrainSettings, RlSettings


def pretrain(**changes: Any) -> PretrainSettings:
    return PretrainSettings(
        **{**dict(preset="gpt2-nano", n_layer=1, n_embd=16, seq_len=8, steps=7, global_batch_size=4, lr=1e-2), **changes}
    )


def rl(**changes: Any) -> RlSettings:
    base = dict(steps=2, prompts_per_step=4, responses_per_prompt=2, global_batch_size=4, max_response_tokens=8, lr=1e-2)
    return RlSettings(**{**base, **changes})


def test_settings_override_the_presets_values():
    shape = pretrain(dropout=0.1, tied=False).shape()
    assert shape == ModelShape(n_layer=1, n_head=2, n_embd=16, seq_len=8, dropout=0.1, tied=False)


def test_every_field_of_a_shape_can_be_set_for_pretraining():
    assert set(ModelShape.model_fields) <= set(PretrainSettings.model_fields)


def test_a_misspelt_preset_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"unknown preset 'gpt-nano'; expected one of gpt2-nano, .*\. Did you mean 'gpt2-nano'\?"):
        pretrain(preset="gpt-nano")


def test_an_impossible_shape_is_refused_when_the_settings_are_read():
    with pytest.raises(ValueError, match="n_embd = 15 is not a multiple of n_head = 2"):
        pretrain(n_embd=15)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value_warmup_steps": 2}, "value_warmup_steps = 2 leaves the policy none of steps = 2 to learn in; lower .*, or raise steps"),
        ({"value_warmup_steps": 5}, "value_warmup_steps = 5 leaves the policy none of steps = 2"),
        ({"algorithm": "reinforce", "clip_eps": 0.1}, 'clip_eps = 0.1 would have no effect with algorithm = "reinforce"; remove it'),
        ({"algorithm": "reinforce", "value_lr": 0.1, "gae_lambda": 0.9}, "value_lr = 0.1 and gae_lambda = 0.9 would .*; remove them"),
        (
            {"algorithm": "reinforce", "value_clip_eps": 0.1, "value_warmup_steps": 1},
            "value_clip_eps = 0.1 and value_warmup_steps = 1 would",
        ),
        ({"eval_every": 5}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_leave_nothing_to_learn_or_have_no_effect_are_refused(changes, words):
    size = 8 if changes.get("algorithm") == "reinforce" else 4
    with pytest.raises(ValueError, match=words):
        rl(global_batch_size=size, **changes)
