"""Tests with the byte tokenizer: "a" is 97, a character is a token, and the special tokens follow after 255."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankOfTwo, as_two_ranks
from safetensors.torch import load_file
from small import END, TOKENIZER, Always, ShareOfA, one_update, settings

from gpt.chat import encode_prompt
from gpt.model import GPT, RewardModel, load_config, load_model
from gpt.random_streams import stream_seed
from gpt.reward_scorer import value_model
from gpt.rl.experience import update_rows
from gpt.rl.figures import FIGURES
from gpt.rl.loop import train
from gpt.sampling import sample
from gpt.settings import RlSettings
from gpt.torch_engine import TorchEngine

CLOCKS = ("time/", "rollout/tokens_per_s")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TorchEngine, float, dict[str, torch.Tensor]]]:
    """Record the engine, the learning rate and the gradients of every step that any engine takes."""
    recorded: list[tuple[TorchEngine, float, dict[str, torch.Tensor]]] = []
    step = TorchEngine.step

    def recording(self: TorchEngine, lr: float) -> float:
        recorded.append((self, lr, {name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None}))
        return step(self, lr)

    monkeypatch.setattr(TorchEngine, "step", recording)
    return recorded


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logged(rank: Any) -> dict[tuple[str, int], float]:
    """All logged points except those that depend on a clock."""
    return {(name, step): value for name, step, value in rank.points if not name.startswith(CLOCKS)}


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_the_policy_learns_to_write_rewarded_responses(algorithm, make_rank, policy, prompts, tmp_path):
    # At first one letter in four is an a. A response of only a, with an end, scores 1.
    rank = make_rank()
    config = settings(algorithm=algorithm, steps=12, prompts_per_step=16, responses_per_prompt=4, global_batch_size=64, kl_coef=0.01)
    train(rank, config, policy, [prompts], [ShareOfA()], 1, tmp_path / "model")
    assert rank.warnings == []
    score = rank.curve("reward/score_mean")
    assert score[1] < 0.3
    assert score[12] > 0.8
    assert rank.curve("rollout/kl_k1_nats_per_response")[12] > 1.0


def test_a_run_stopped_at_any_point_ends_in_the_same_bits_and_the_same_curves(make_rank, policy, prompts, tmp_path):
    config = settings(steps=3, ppo_epochs=2, max_response_tokens=5, checkpoint_every=2)

    def run(name: str, stop_after: int | None = None):
        rank = make_rank(name, stop_after)
        metadata = train(rank, config, policy, [prompts], [ShareOfA()], 1, tmp_path / name)
        return rank, metadata

    whole, metadata = run("whole")
    last = whole._engines["value"].full_weights()
    # The loop checks for a stop between rollout and updates, and after the updates of all steps but the last.
    for stop_after, saved in ((1, []), (2, [1]), (3, [1]), (4, [2]), (5, [2, 2])):
        name = f"stopped_{stop_after}"
        first, nothing = run(name, stop_after)
        assert nothing is None
        assert first.saved == saved
        second, again = run(name)
        assert again == metadata
        assert {**logged(first), **logged(second)} == logged(whole), stop_after
        for weight, tensor in weights(tmp_path / "whole").items():
            assert torch.equal(weights(tmp_path / name)[weight], tensor), (stop_after, weight)
        for weight, tensor in second._engines["value"].full_weights().items():
            assert torch.equal(last[weight], tensor), (stop_after, weight)


def test_a_run_that_failed_after_its_last_step_resumes_with_that_steps_figures(make_rank, policy, prompts, tmp_path):
    config = settings(checkpoint_every=1)
    (tmp_path / "file").touch()  # so nothing can be written below it
    with pytest.raises(OSError, match="file"):
        train(make_rank(), config, policy, [prompts], [ShareOfA()], 1, tmp_path / "file" / "model")
    resumed, whole = make_rank(), make_rank("whole")
    trained = train(resumed, config, policy, [prompts], [ShareOfA()], 1, tmp_path / "model")
    assert trained == train(whole, config, policy, [prompts], [ShareOfA()], 1, tmp_path / "whole")
    assert trained.figures["reward/score_mean"] == whole.curve("reward/score_mean")[2]


@pytest.mark.parametrize(("precision", "mismatch"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_before_the_first_update_every_ratio_is_1_and_the_policy_equals_its_reference(
    precision, mismatch, make_rank, policy, prompts, tmp_path
):
    # Responses of unequal length, micro-batches with different padding, and a policy that was trained with dropout.
    rank = make_rank()
    config = settings(temperature=0.7, micro_batch_size=2, ppo_epochs=2, precision=precision)
    train(rank, config, policy, [prompts], [ShareOfA()], 1, tmp_path / "model")
    assert rank.curve("train/ratio_first") == {1: 0.0, 2: 0.0}
    assert rank.curve("rollout/kl_k1_nats_per_response")[1] == 0.0
    assert rank.curve("rollout/kl_k3_nats_per_token")[1] == 0.0
    assert rank.curve("rollout/kl_k3_nats_per_token")[2] > 1e-4
    assert rank.curve("train/approx_kl")[1] > 1e-4  # of the second update
    assert 0 < max(rank.curve("rollout/logprob_mismatch").values()) < mismatch


def test_both_sides_of_a_ratio_are_read_in_the_same_micro_batches(make_rank, policy, prompts, monkeypatch, tmp_path):
    # A CPU may round the same way in another layout; a GPU does not.
    read: dict[tuple[type, bool], list[torch.Tensor]] = {}
    call = TorchEngine.__call__

    def recording(self: TorchEngine, token_ids: torch.Tensor) -> torch.Tensor:
        read.setdefault((type(self.module), torch.is_grad_enabled()), []).append(token_ids)
        return call(self, token_ids)

    monkeypatch.setattr(TorchEngine, "__call__", recording)
    train(make_rank(), settings(steps=1, micro_batch_size=2, ppo_epochs=2), policy, [prompts], [ShareOfA()], 1, tmp_path / "model")
    for model in (GPT, RewardModel):
        before, learned_from = read[model, False], read[model, True]
        assert (len(before), len(learned_from)) == (4, 8)
        for first, second in zip(before, learned_from[:4], strict=True):
            assert torch.equal(first, second)


def test_nothing_is_clipped_on_policy(make_rank, policy, prompts, tmp_path):
    rank = make_rank()
    train(rank, one_update(), policy, [prompts], [ShareOfA()], 1, tmp_path / "model")
    assert rank.curve("train/clip_fraction")[1] == rank.curve("train/approx_kl")[1] == 0.0


def responses_by_definition(model: GPT, texts: Sequence[str], config: RlSettings, step: int = 0) -> list[tuple[list[int], list[int]]]:
    """Sample each response by itself, and return it with its prompt."""
    pairs = []
    for place, text in enumerate(texts):
        prompt = encode_prompt(TOKENIZER, [{"role": "user", "content": text}])
        for number in range(config.responses_per_prompt):
            stream = stream_seed(1, "sample", step, place, number)
            limits = dict(max_tokens=config.max_response_tokens, temperature=config.temperature)
            [response] = sample(model, [prompt], streams=[stream], stop_ids=[END], **limits)
            pairs.append((prompt, response.token_ids))
    return pairs


@pytest.mark.parametrize(("algorithm", "size"), [("reinforce", 8), ("ppo", 8), ("ppo", 4)])
def test_the_first_gradients_equal_their_definition(algorithm, size, make_rank, policy, make_prompts, reward_model, steps, tmp_path):
    # One response at a time, without padding. Policy: -A log p at every token, where A = score - V, minus its mean, divided by its
    # deviation. PPO's first update is the same, since a ratio of 1 is not clipped. Value model, with lambda 1: (V - score)^2 / 2.
    config = settings(algorithm=algorithm, global_batch_size=size, temperature=0.8, micro_batch_size=2, max_response_tokens=5)
    if algorithm == "ppo":
        config = config.model_copy(update={"gae_lambda": 1.0})
    train(make_rank(), config, policy, [make_prompts("x")], [ShareOfA(), reward_model], 1, tmp_path / "model")
    model, value = load_model(policy), value_model(reward_model.folder, reward_model.mean, reward_model.std)
    logprobs, values, scores, of_row = [], [], [], []
    for row, (prompt, response) in enumerate(responses_by_definition(model, ["x"] * 4, config)):
        text = torch.tensor([[*prompt, *response]])
        score = response[:-1].count(97) / max(1, len(response) - 1) + value(text)[0, -1].item() if response[-1] == END else -1.0
        for place in range(len(prompt), len(prompt) + len(response)):
            logprobs.append((model(text[:, :place])[0, -1] / 0.8).log_softmax(-1)[text[0, place]])
            values.append(value(text[:, :place])[0, -1])
            scores.append(score)
            of_row.append(row)
    assert -1.0 in scores  # one was cut off
    expected = torch.stack(values).detach() if algorithm == "ppo" else 0.0
    advantages = torch.tensor(scores) - expected
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    in_first_update = torch.tensor([row in update_rows(config, seed=1, step=0)[0][0] for row in of_row])
    losses = {"policy": -(torch.stack(logprobs) * advantages)[in_first_update].mean()}
    if algorithm == "ppo":
        losses["value"] = (torch.stack(values) - torch.tensor(scores)).square()[in_first_update].mean() / 2
    for (_, _, gradients), (name, loss), learner in zip(steps, losses.items(), (model, value), strict=False):
        for (weight, _), gradient in zip(learner.named_parameters(), torch.autograd.grad(loss, list(learner.parameters())), strict=True):
            torch.testing.assert_close(gradients[weight], gradient, rtol=1e-3, atol=3e-6, msg=f"{name} {weight}")


def test_all_samples_of_a_prompt_differ_even_if_a_step_has_the_prompt_twice(make_rank, policy, make_prompts, tmp_path):
    scorer = ShareOfA()
    train(make_rank(), one_update(), policy, [make_prompts("x")], [scorer], 1, tmp_path / "model")
    assert len({rollout.text for rollout in scorer.seen}) >= 4  # of 8 responses, except those that were cut off


def trained(rank: Any, policy: Path, prompts: Path, output: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Policy and value model after two steps. The large eps keeps rounding in a gradient near 0 from reversing a step."""
    train(rank, settings(steps=2, ppo_epochs=2, eps=1e-3, **changes), policy, [prompts], [ShareOfA()], 1, output)
    value = {f"value {name}": tensor for name, tensor in rank._engines["value"].full_weights().items()}
    return value | {f"policy {name}": tensor for name, tensor in rank._engines["policy"].full_weights().items()}


def trained_by_two(rank: int, folder: str, policy: str, prompts: str) -> None:
    both = RankOfTwo(rank, Path(folder))
    weights = trained(both, Path(policy), Path(prompts), Path(folder) / str(rank))
    assert both.curve("train/ratio_first") == {1: 0.0, 2: 0.0}
    if rank == 0:
        torch.save(weights, Path(folder) / "of_two.pt")


def test_micro_batches_and_ranks_change_policy_and_value_model_only_by_rounding(make_rank, policy, prompts, tmp_path):
    whole = trained(make_rank("whole"), policy, prompts, tmp_path / "whole")
    others = [trained(make_rank(str(n)), policy, prompts, tmp_path / str(n), micro_batch_size=n) for n in (2, 1)]
    as_two_ranks(trained_by_two, tmp_path, policy, prompts)
    others.append(torch.load(tmp_path / "of_two.pt"))
    before = load_model(policy).token_embedding.weight
    assert (whole["policy token_embedding.weight"] - before).abs().max() > 1e-2
    for split in others:
        for name, tensor in whole.items():
            torch.testing.assert_close(split[name], tensor, rtol=0, atol=5e-6, msg=name)


def test_one_update_moves_every_weight_of_policy_and_value_model(make_rank, policy, prompts, reward_model, tmp_path):
    rank = make_rank()
    train(rank, one_update(), policy, [prompts], [reward_model], 1, tmp_path / "model")
    before = {"policy": load_model(policy), "value": RewardModel.from_policy(load_model(policy), torch.Generator().manual_seed(5))}
    for engine, model in before.items():
        after = rank._engines[engine].full_weights()
        for name, parameter in model.named_parameters():
            assert not torch.equal(after[name], parameter), (engine, name)


def test_the_value_model_starts_from_the_reward_model(make_rank, policy, prompts, reward_model, tmp_path):
    rank = make_rank(stop_after=1)  # after the first rollout, before an update
    assert train(rank, settings(), policy, [prompts], [Always(0.0), reward_model], 1, tmp_path / "model") is None
    head = rank._engines["value"].full_weights()["output.weight"]
    assert torch.equal(head, weights(tmp_path / "reward")["output.weight"] / 2.0)


def test_without_a_reward_model_the_first_values_are_0(make_rank, policy, prompts, tmp_path):
    rank = make_rank(stop_after=1)
    train(rank, settings(), policy, [prompts], [ShareOfA()], 1, tmp_path / "model")
    value = rank._engines["value"].full_weights()
    assert value["output.weight"].abs().max() == value["output.bias"].abs().max() == 0.0
    assert torch.equal(value["token_embedding.weight"], load_model(policy).token_embedding.weight)


def test_the_policy_does_not_change_while_the_value_model_warms_up(make_rank, policy, prompts, steps, tmp_path):
    rank = make_rank()
    config = settings(steps=3, global_batch_size=8, value_warmup_steps=2, value_lr=3e-3)
    train(rank, config, policy, [prompts], [ShareOfA()], 1, tmp_path / "model")
    names = {id(engine): name for name, engine in rank._engines.items()}
    assert [(names[id(engine)], lr) for engine, lr, _ in steps] == [("value", 3e-3)] * 2 + [("policy", 1e-2), ("value", 3e-3)]
    assert rank.curve("rollout/kl_k3_nats_per_token") == {1: 0.0, 2: 0.0, 3: 0.0}
    assert sorted(rank.curve("train/value_loss")) == [1, 2, 3]
    assert sorted(rank.curve("train/loss")) == sorted(rank.curve("train/lr")) == [3]


def test_without_a_kl_coefficient_there_is_no_reference_policy(make_rank, policy, prompts, tmp_path):
    rank = make_rank()
    train(rank, settings(kl_coef=0.0), policy, [prompts], [ShareOfA()], 1, tmp_path / "model")
    assert rank.curve("rollout/kl_k1_nats_per_response") == {}
    assert rank.curve("reward/total_mean") == pytest.approx(rank.curve("reward/score_mean"))


def test_an_entropy_bonus_raises_the_entropy(make_rank, policy, prompts, tmp_path):
    rank = make_rank()
    config = settings(steps=4, global_batch_size=8, algorithm="reinforce", entropy_coef=1.0, missing_end_score=0.0)
    train(rank, config, policy, [prompts], [Always(0.0)], 1, tmp_path / "model")
    entropy = rank.curve("train/entropy")
    assert entropy[4] > entropy[1] + 0.5


@pytest.mark.parametrize("broken", [GPT, RewardModel])
def test_a_non_finite_gradient_of_either_model_ends_the_run(broken, make_rank, policy, prompts, monkeypatch, tmp_path):
    monkeypatch.setattr(TorchEngine, "step", lambda self, lr: float("nan") if type(self.module) is broken else 1.0)
    with pytest.raises(ValueError, match="the gradient norm of step 1 is nan"):
        train(make_rank(), settings(), policy, [prompts], [ShareOfA()], 1, tmp_path / "model")


def test_the_artifact_is_the_policy_with_its_own_dropout_and_tokenizer(make_rank, policy, prompts, tmp_path):
    rank = make_rank()
    trained = train(rank, settings(), policy, [prompts], [ShareOfA()], 1, tmp_path / "model")
    n_parameters = sum(p.numel() for p in load_model(policy).parameters())
    counts = {"rollouts": 16, "prompts": {"train": 6, "too_long": 0}}
    assert trained.metadata == {"role": "policy", "chat_format": "gptline-1", "parameters": n_parameters, "steps": 2, **counts}
    assert trained.figures == {name: rank.curve(name)[2] for name in FIGURES}
    assert load_config(tmp_path / "model") == load_config(policy)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (policy / "tokenizer.json").read_bytes()
    for name, tensor in weights(policy).items():
        assert not torch.equal(weights(tmp_path / "model")[name], tensor), name
