from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest
import torch
from ranks import FakeRank, Killed
from safetensors.torch import load_file

from gpt.loop import Trained, check_grad_norm
from gpt.model import GPT, load_model, parameter_groups, save_model
from gpt.pretrain import train
from gpt.settings import PRESETS, GPTConfig, PretrainSettings

VOCAB = 16


def settings(**changes) -> PretrainSettings:
    base = dict(preset="gpt2-nano", n_layer=1, n_embd=16, seq_len=8, dropout=0.1, steps=7, global_batch_size=4, lr=1e-2, warmup_steps=2)
    return PretrainSettings(**{**base, "checkpoint_every": 3, "eval_every": 3, "log_every": 2, **changes})


def sequence(n: int, seed: int = 0) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(VOCAB) for _ in range(n)]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_model_learns_a_repeating_text_far_below_its_unigram_entropy(make_rank, make_tokens, tmp_path):
    # All 16 tokens are equally frequent: ln 16 = 2.77 nats. The next token is certain: 0 nats.
    tokens = make_tokens(list(range(VOCAB)) * 40, list(range(VOCAB)) * 3)
    rank = make_rank()
    trained = train(rank, settings(steps=120, dropout=0.0), [tokens], "uint16", VOCAB, None, 1, tmp_path / "model")

    val_loss = rank.curve("val/loss")
    assert val_loss[120] < 0.3 < math.log(VOCAB) - 0.1 < rank.curve("train/loss")[2]
    n_parameters = sum(p.numel() for p in load_model(tmp_path / "model").parameters())
    assert trained.metadata == {"role": "policy", "parameters": n_parameters, "steps": 120, "tokens_seen": 120 * 4 * 8}
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"


def test_a_run_stopped_after_any_step_ends_in_the_same_bits_and_the_same_curve(make_rank, make_tokens, tmp_path):
    tokens = make_tokens(sequence(100), sequence(40, seed=1))

    def run(name: str, stop_after: int | None = None):
        rank = make_rank(name, stop_after)
        return rank, train(rank, settings(), [tokens], "uint16", VOCAB, None, 1, tmp_path / name)

    whole, _ = run("whole")
    for stop_after in range(1, 7):
        name = f"stopped_after_{stop_after}"
        first, nothing = run(name, stop_after)
        assert nothing is None
        assert first.saved[-1] == stop_after
        assert not (tmp_path / name).exists()
        second, metadata = run(name)
        assert metadata is not None
        for weight, tensor in final_weights(tmp_path / "whole").items():
            assert torch.equal(final_weights(tmp_path / name)[weight], tensor), (stop_after, weight)
        for metric in ("train/loss", "val/loss", "train/lr", "train/grad_norm"):
            assert {**first.curve(metric), **second.curve(metric)} == whole.curve(metric), (stop_after, metric)


def test_a_run_killed_in_its_last_evaluation_repeats_no_step_and_ends_in_the_same_bits(make_rank, make_tokens, tmp_path):
    tokens = make_tokens(sequence(100), sequence(40, seed=1))

    whole, first, second = make_rank("whole"), make_rank("killed"), make_rank("killed")
    first.killed_in = ("evaluate", 7)

    def run(rank: FakeRank) -> Trained | None:
        return train(rank, settings(), [tokens], "uint16", VOCAB, None, 1, tmp_path / rank.folder.name)

    metadata_of_whole = run(whole)
    with pytest.raises(Killed):
        run(first)
    assert first.saved == [3, 6, 7]
    assert run(second) == metadata_of_whole
    assert "step" not in second.sections
    for metric in ("train/loss", "val/loss", "train/lr", "train/grad_norm"):
        assert not first.curve(metric).keys() & second.curve(metric).keys()
        assert first.curve(metric) | second.curve(metric) == whole.curve(metric), metric
    one, two = (final_weights(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_seed_gives_other_weights(make_rank, make_tokens, tmp_path):
    tokens = make_tokens(sequence(100))
    for seed in (1, 2):
        train(make_rank(str(seed)), settings(), [tokens], "uint16", VOCAB, None, seed, tmp_path / str(seed))
    one, two = final_weights(tmp_path / "1"), final_weights(tmp_path / "2")
    assert all(not torch.equal(one[name], two[name]) for name in one)


def test_micro_batches_change_the_final_weights_only_by_rounding(make_rank, make_tokens, tmp_path):
    tokens = make_tokens(sequence(100))
    ends = []
    for size in (4, 2, 1):
        config = settings(dropout=0.0, micro_batch_size=size)
        train(make_rank(str(size)), config, [tokens], "uint16", VOCAB, None, 1, tmp_path / str(size))
        ends.append(final_weights(tmp_path / str(size)))
    for other in ends[1:]:
        for name, tensor in ends[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=2e-5)


def test_recomputing_activations_changes_nothing(make_rank, make_tokens, tmp_path):
    tokens = make_tokens(sequence(100))
    for recompute in (False, True):
        config = settings(activation_checkpointing=recompute)
        train(make_rank(str(recompute)), config, [tokens], "uint16", VOCAB, None, 1, tmp_path / str(recompute))
    kept, recomputed = final_weights(tmp_path / "False"), final_weights(tmp_path / "True")
    for name, tensor in kept.items():
        torch.testing.assert_close(recomputed[name], tensor, rtol=0, atol=1e-6)


def test_what_is_logged_and_when(make_rank, make_tokens, tmp_path):
    rank = make_rank()
    train(rank, settings(), [make_tokens(sequence(100), sequence(40))], "uint16", VOCAB, None, 1, tmp_path / "model")
    assert sorted(rank.curve("train/loss")) == [2, 4, 6, 7]
    assert sorted(rank.curve("val/loss")) == [3, 6, 7]
    assert rank.saved == [3, 6, 7]
    assert rank.curve("train/lr")[2] == pytest.approx(1e-2 * 2 / 3)
    assert set(rank.sections) == {"start", "step", "checkpoint", "evaluate"}


def test_without_held_out_tokens_there_is_no_validation_loss(make_rank, make_tokens, tmp_path):
    rank = make_rank()
    train(rank, settings(), [make_tokens(sequence(100))], "uint16", VOCAB, None, 1, tmp_path / "model")
    assert rank.curve("val/loss") == {}
    assert "evaluate" not in rank.sections


def test_validation_loss_is_the_mean_over_all_held_out_tokens_when_they_are_few(make_rank, make_tokens, tmp_path):
    held_out = sequence(30)  # windows of 8, 8, 8 and 5 targets
    rank = make_rank()
    train(rank, settings(), [make_tokens(sequence(100), held_out)], "uint16", VOCAB, None, 1, tmp_path / "model")
    model = load_model(tmp_path / "model")
    nats = 0.0
    for start in (0, 8, 16, 24):
        window = torch.tensor([held_out[start : start + 9]])
        logprobs = model(window[:, :-1]).log_softmax(-1)
        nats -= logprobs.gather(-1, window[:, 1:, None]).sum().item()
    assert rank.curve("val/loss")[7] == pytest.approx(nats / 29, rel=1e-5)


def test_training_can_start_from_a_saved_model(make_rank, make_tokens, tmp_path):
    tokens = make_tokens(list(range(VOCAB)) * 40, list(range(VOCAB)) * 3)
    train(make_rank("first"), settings(steps=120, dropout=0.0), [tokens], "uint16", VOCAB, None, 1, tmp_path / "first")
    rank = make_rank("second")
    config = settings(steps=1, dropout=0.1, lr=1e-5, warmup_steps=0)  # another dropout is allowed
    train(rank, config, [tokens], "uint16", VOCAB, tmp_path / "first", 2, tmp_path / "second")
    assert rank.curve("val/loss")[1] < 0.3
    assert load_model(tmp_path / "second").config.dropout == 0.1


def test_a_model_of_another_shape_is_refused_with_both_shapes(make_rank, make_tokens, tmp_path):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, seq_len=8, vocab_size=VOCAB)
    model = GPT(config, torch.Generator().manual_seed(1))
    save_model(tmp_path / "other", config, dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"expected n_layer = 1, found n_layer = 2\."):
        train(make_rank(), settings(), [make_tokens(sequence(100))], "uint16", VOCAB, tmp_path / "other", 1, tmp_path / "model")


def test_bf16_training_learns_and_its_artifact_is_fp32(make_rank, make_tokens, tmp_path):
    tokens = make_tokens(list(range(VOCAB)) * 40, list(range(VOCAB)) * 3)
    rank = make_rank()
    train(rank, settings(steps=120, dropout=0.0, precision="bf16"), [tokens], "uint16", VOCAB, None, 1, tmp_path / "model")
    assert rank.curve("val/loss")[120] < 0.3
    assert {tensor.dtype for tensor in final_weights(tmp_path / "model").values()} == {torch.float32}


@pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano", "transformer-nano"])
def test_one_step_moves_every_weight(preset, make_rank, make_tokens, tmp_path):
    config = PretrainSettings(preset=preset, steps=1, global_batch_size=2, lr=1e-2)
    model_config = GPTConfig(**PRESETS[preset].model_dump(), vocab_size=VOCAB)
    before = GPT(model_config, torch.Generator().manual_seed(3))
    save_model(tmp_path / "before", model_config, dict(before.named_parameters()))
    train(make_rank(), config, [make_tokens(sequence(200))], "uint16", VOCAB, tmp_path / "before", 1, tmp_path / "after")
    after = final_weights(tmp_path / "after")
    for name, parameter in before.named_parameters():
        assert not torch.equal(after[name], parameter), name


def test_weight_decay_applies_to_matrices_but_not_to_vectors():
    model = GPT(GPTConfig(**PRESETS["gpt2-nano"].model_dump(), vocab_size=VOCAB))
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_a_diverged_training_fails_before_it_saves_a_checkpoint_of_that_step(make_rank, make_tokens, tmp_path):
    rank = make_rank()
    config = settings(lr=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(ValueError, match=r"the gradient norm of step (\d+) is (nan|inf): .* Lower lr \(now 1e\+30\) or ") as caught:
        train(rank, config, [make_tokens(sequence(100))], "uint16", VOCAB, None, 1, tmp_path / "model")
    (diverged_at,) = re.findall(r"norm of step (\d+)", str(caught.value))
    assert rank.saved == list(range(1, int(diverged_at)))
    assert not (tmp_path / "model").exists()


def test_a_non_finite_weight_fails_the_first_step(make_rank, make_tokens, tmp_path):
    config = GPTConfig(**settings().shape().model_dump(), vocab_size=VOCAB)
    weights = dict(GPT(config, torch.Generator().manual_seed(1)).named_parameters())
    with torch.no_grad():
        next(iter(weights.values()))[:] = math.inf
    save_model(tmp_path / "spoilt", config, weights)
    with pytest.raises(ValueError, match="the gradient norm of step 1 is nan"):
        train(make_rank(), settings(), [make_tokens(sequence(100))], "uint16", VOCAB, tmp_path / "spoilt", 1, tmp_path / "model")


def test_fp16_may_skip_steps_whose_gradients_overflow():
    check_grad_norm(math.inf, 1, settings(precision="fp16"))
    check_grad_norm(1e30, 1, settings(precision="bf16"))
    for precision in ("fp32", "bf16"):
        with pytest.raises(ValueError, match="the gradient norm of step 1 is inf"):
            check_grad_norm(math.inf, 1, settings(precision=precision))
