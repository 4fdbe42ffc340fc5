"""Tests with the byte tokenizer: "a" is 97, a character is a token, and the special tokens follow after 255."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from ranks import FakeRank, Killed
from safetensors.torch import load_file

import gpt.sft
from gpt.batching import padded
from gpt.chat import encode_conversation, encode_prompt, encode_response
from gpt.loop import Trained
from gpt.model import GPT, load_config, load_model, save_model
from gpt.random_streams import stream_seed
from gpt.sampling import sample
from gpt.settings import PRESETS, GPTConfig, SftSettings
from gpt.sft import conversation_batch, train
from gpt.tokenizer import byte_tokenizer
from gpt.torch_engine import TorchEngine

USER, ASSISTANT, END, PAD = 256, 257, 259, 261
TOKENIZER = byte_tokenizer()
UNEQUAL = [("a", "b"), ("cd", "efg"), ("h", "ijklmnop"), ("qrs", "tuvwx")]  # 2, 4, 9 and 6 tokens count


def conversation(*texts: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def settings(**changes) -> SftSettings:
    base = dict(steps=7, global_batch_size=4, lr=1e-2, warmup_steps=2, checkpoint_every=3, eval_every=3, log_every=2)
    return SftSettings(**{**base, **changes})


def one_step(**changes) -> SftSettings:
    return settings(steps=1, warmup_steps=0, weight_decay=0.0, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def make_policy(tmp_path: Path) -> Callable[..., Path]:
    """Make a policy's folder."""

    def make(preset: str = "gpt2-nano", **changes: object) -> Path:
        config = GPTConfig(**{**PRESETS[preset].model_dump(), "seq_len": 24, "vocab_size": TOKENIZER.vocab_size, **changes})
        folder = tmp_path / "policy"
        save_model(folder, config, dict(GPT(config, torch.Generator().manual_seed(1)).named_parameters()))
        TOKENIZER.save(folder / "tokenizer.json")
        return folder

    return make


@pytest.fixture
def make_conversations(tmp_path: Path) -> Callable[..., Path]:
    """Make a conversations artifact's folder."""

    def make(train: Sequence[Sequence[str]], held_out: Sequence[Sequence[str]] = (), name: str = "conversations") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for split, texts in (("train", train), ("held_out", held_out)):
            lines = (json.dumps({"messages": conversation(*each), "source": "test"}) + "\n" for each in texts)
            (folder / f"{split}.jsonl").write_text("".join(lines))
        return folder

    return make


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Record the gradients of every step that any engine takes."""
    recorded: list[dict[str, torch.Tensor]] = []
    step = TorchEngine.step

    def recording(engine: TorchEngine, lr: float) -> float:
        recorded.append({name: parameter.grad.clone() for name, parameter in engine.module.named_parameters()})
        return step(engine, lr)

    monkeypatch.setattr(TorchEngine, "step", recording)
    return recorded


def nats(model: GPT, *texts: str) -> tuple[float, int]:
    """The nats of the assistant's tokens, ends included, and their number, by definition, one token at a time."""
    total, count, token_ids = 0.0, 0, []
    for place, text in enumerate(texts):
        token_ids.append(ASSISTANT if place % 2 else USER)
        for token in [*text.encode(), END]:
            if place % 2:
                total -= model(torch.tensor([token_ids]))[0, -1].log_softmax(-1)[token].item()
                count += 1
            token_ids.append(token)
    return total, count


def test_an_answer_of_three_tokens_has_four_counting_targets_the_last_of_which_is_its_end_token():
    encoded = encode_conversation(TOKENIZER, conversation("a", "bcd"))
    batch = conversation_batch([encoded], PAD)
    assert batch.token_ids.tolist() == [[USER, 97, END, ASSISTANT, 98, 99, 100]]
    assert batch.targets.tolist() == [[97, END, ASSISTANT, 98, 99, 100, END]]
    assert batch.loss_mask.tolist() == [[False, False, False, True, True, True, True]]


def test_a_shorter_conversation_is_padded_on_the_right_and_the_padding_never_counts():
    encoded = [encode_conversation(TOKENIZER, conversation("a", answer)) for answer in ("", "bc")]
    batch = conversation_batch(encoded, PAD)
    assert batch.token_ids.tolist() == [[USER, 97, END, ASSISTANT, END, PAD], [USER, 97, END, ASSISTANT, 98, 99]]
    assert batch.targets.tolist() == [[97, END, ASSISTANT, END, PAD, PAD], [97, END, ASSISTANT, 98, 99, END]]
    assert batch.loss_mask.tolist() == [[False, False, False, True, False, False], [False, False, False, True, True, True]]


def test_the_loss_is_the_mean_over_the_assistants_tokens_of_all_turns(make_rank, make_policy, make_conversations, tmp_path):
    texts = [("a", "bc", "d", "e"), ("f", "ghij")]  # 3 + 2 and 5 tokens count
    policy = make_policy()
    by_definition = [nats(load_model(policy), *each) for each in texts]
    assert [count for _, count in by_definition] == [5, 5]
    rank = make_rank()
    train(rank, one_step(global_batch_size=2), policy, [make_conversations(texts)], 1, tmp_path / "model")
    assert rank.curve("train/loss")[1] == pytest.approx(sum(total for total, _ in by_definition) / 10, rel=1e-5)


def test_splitting_a_step_over_micro_batches_and_ranks_changes_its_gradients_only_by_rounding(
    gradients, make_rank, make_policy, make_conversations, tmp_path
):
    # 2, 4, 9 and 6 counting tokens: a mean of means would weigh them differently.
    policy, conversations = make_policy(), make_conversations(UNEQUAL, UNEQUAL[:3])

    def run(name: str, number: int, world_size: int, micro_batch_size: int) -> dict[str, float]:
        rank = make_rank(name)
        rank.rank, rank.world_size = number, world_size
        # These ranks sum nothing, so val/loss after the step needs weights that the step hardly changed.
        config = one_step(lr=1e-9, micro_batch_size=micro_batch_size)
        train(rank, config, policy, [conversations], 1, tmp_path / "model")
        return {metric: rank.curve(metric)[1] for metric in ("train/loss", "val/loss")}

    whole = run("whole", 0, 1, 4)
    reference = gradients.pop()
    for world_size, micro_batch_size in [(1, 2), (1, 1), (2, 2), (2, 1), (4, 1)]:
        losses = [run(f"{world_size}-{micro_batch_size}-{number}", number, world_size, micro_batch_size) for number in range(world_size)]
        for name, gradient in reference.items():
            total = sum(of_rank[name] for of_rank in gradients)
            torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-7)
        for metric in whole:
            assert sum(of_rank[metric] for of_rank in losses) == pytest.approx(whole[metric], rel=1e-5)
        gradients.clear()


def test_more_padding_changes_no_gradient(gradients, monkeypatch, make_rank, make_policy, make_conversations, tmp_path):
    policy, conversations = make_policy(), make_conversations(UNEQUAL)
    train(make_rank("as it is"), one_step(), policy, [conversations], 1, tmp_path / "model")

    def more_padded(rows: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
        return padded([*rows, [0] * (max(map(len, rows)) + 5)], pad_id)[:-1]

    monkeypatch.setattr(gpt.sft, "padded", more_padded)
    train(make_rank("padded"), one_step(), policy, [conversations], 1, tmp_path / "model")
    as_it_is, longer = gradients
    for name, gradient in as_it_is.items():
        torch.testing.assert_close(longer[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_policy_learns_four_answers_and_where_each_ends(make_rank, make_policy, make_conversations, tmp_path):
    texts = [("a", "one"), ("b", "two, too"), ("c", "x"), ("d", "")]
    rank = make_rank()
    config = settings(steps=80, eval_every=100)
    train(rank, config, make_policy(), [make_conversations(texts)], 1, tmp_path / "model")
    prompts = [encode_prompt(TOKENIZER, conversation(question)) for question, _ in texts]
    streams = [stream_seed(1, "test", number) for number in range(4)]
    responses = sample(load_model(tmp_path / "model"), prompts, streams=streams, max_tokens=12, temperature=0.0, stop_ids=(END,))
    assert [response.token_ids for response in responses] == [encode_response(TOKENIZER, answer) for _, answer in texts]
    assert all(response.stopped for response in responses)


def test_a_run_stopped_after_any_step_ends_in_the_same_bits_and_the_same_curve(make_rank, make_policy, make_conversations, tmp_path):
    policy, conversations = make_policy(dropout=0.1), make_conversations(UNEQUAL + UNEQUAL[:1], UNEQUAL[:3])

    def run(name: str, stop_after: int | None = None):
        rank = make_rank(name, stop_after)
        return rank, train(rank, settings(micro_batch_size=2), policy, [conversations], 1, tmp_path / name)

    whole, metadata_of_whole = run("whole")
    for stop_after in range(1, 7):
        name = f"stopped_after_{stop_after}"
        first, nothing = run(name, stop_after)
        assert nothing is None
        assert first.saved[-1] == stop_after
        assert not (tmp_path / name).exists()
        second, metadata = run(name)
        assert metadata == metadata_of_whole
        for weight, tensor in weights(tmp_path / "whole").items():
            assert torch.equal(weights(tmp_path / name)[weight], tensor), (stop_after, weight)
        for metric in ("train/loss", "val/loss", "train/lr", "train/grad_norm"):
            assert {**first.curve(metric), **second.curve(metric)} == whole.curve(metric), (stop_after, metric)


def test_a_run_killed_in_its_last_evaluation_repeats_no_step_and_ends_in_the_same_bits(
    make_rank, make_policy, make_conversations, tmp_path
):
    policy, conversations = make_policy(dropout=0.1), make_conversations(UNEQUAL, UNEQUAL[:3])

    whole, first, second = make_rank("whole"), make_rank("killed"), make_rank("killed")
    first.killed_in = ("evaluate", 7)

    def run(rank: FakeRank) -> Trained | None:
        return train(rank, settings(), policy, [conversations], 1, tmp_path / rank.folder.name)

    metadata_of_whole = run(whole)
    with pytest.raises(Killed):
        run(first)
    assert first.saved == [3, 6, 7]
    assert run(second) == metadata_of_whole
    assert "step" not in second.sections
    for metric in ("train/loss", "val/loss", "train/lr", "train/grad_norm"):
        assert not first.curve(metric).keys() & second.curve(metric).keys()
        assert first.curve(metric) | second.curve(metric) == whole.curve(metric), metric
    one, two = (weights(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano", "transformer-nano"])
def test_one_step_without_weight_decay_moves_every_weight(preset, make_rank, make_policy, make_conversations, tmp_path):
    policy = make_policy(preset)
    train(make_rank(), one_step(), policy, [make_conversations(UNEQUAL)], 1, tmp_path / "model")
    before, after = weights(policy), weights(tmp_path / "model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert not torch.equal(after[name], tensor), name


def test_what_is_logged_and_when_and_the_metadata_of_the_model(make_rank, make_policy, make_conversations, tmp_path):
    # With seq_len 11 a model reads 11 tokens and predicts a 12th. ("a", "bcd") has 8; a second turn ("e", "f") makes it 15, and it is cut;
    # ("a", "bcdefgh") has 12, and fits; ("a", "bcdefghi") has 13, and does not.
    policy = make_policy(seq_len=11)
    conversations = [
        make_conversations([("a", "bcd", "e", "f"), ("a", "bcdefghi")], [("a", "b")], name="one"),
        make_conversations([("a", "bcdefgh")], name="two"),
    ]
    rank = make_rank()
    trained = train(rank, settings(steps=6, global_batch_size=2), policy, conversations, 1, tmp_path / "model")
    # 6 steps of 2 conversations see both of them 6 times: 6 * (4 + 8) = 72 tokens that count.
    assert trained.metadata == {
        "role": "policy",
        "parameters": sum(parameter.numel() for parameter in load_model(policy).parameters()),
        "steps": 6,
        "tokens_trained": 72,
        "conversations": {"train": 2, "cut": 1, "too_long": 1},
    }
    assert rank.warnings == [
        "of 3 conversations, 1 are cut after the last answer that ends within the policy's seq_len + 1 = 12 tokens, and 1 are left out "
        "because even their first answer does not"
    ]
    assert (tmp_path / "model" / "tokenizer.json").read_text() == (policy / "tokenizer.json").read_text()
    assert sorted(rank.curve("train/loss")) == [2, 4, 6]
    assert sorted(rank.curve("val/loss")) == [3, 6]
    assert rank.saved == [3, 6]
    assert rank.curve("train/lr")[2] == pytest.approx(1e-2 * 2 / 3)
    for step in (2, 4, 6):  # both conversations in every step: 12 tokens
        assert rank.curve("train/tokens_per_s")[step] == pytest.approx(12 / rank.curve("time/step_s")[step])
    assert set(rank.sections) == {"start", "encode", "step", "checkpoint", "evaluate"}
    assert rank.shown == [(done, 3, "conversations encoded") for done in (1, 2, 3)] + [(1, 1, "conversations encoded")]


def test_conversations_of_which_none_fits_are_refused(make_rank, make_policy, make_conversations, tmp_path):
    conversations = make_conversations([("a", "bcdefghi"), ("a", "bcdefghij")])
    message = r"in none of 2 does the first answer end within the policy's seq_len \+ 1 = 12 tokens; use shorter conversations"
    with pytest.raises(ValueError, match=message):
        train(make_rank(), settings(), make_policy(seq_len=11), [conversations], 1, tmp_path / "model")


def test_without_held_out_conversations_that_fit_there_is_no_validation_loss(make_rank, make_policy, make_conversations, tmp_path):
    conversations = make_conversations([("a", "b")], [("a", "bcdefghi")])
    rank = make_rank()
    assert train(rank, settings(), make_policy(seq_len=11), [conversations], 1, tmp_path / "model") is not None
    assert rank.curve("val/loss") == {}
    assert "evaluate" not in rank.sections


@pytest.mark.parametrize(("eval_conversations", "expected_rows"), [(256, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 1, 2])])
def test_validation_loss_is_the_mean_over_the_tokens_of_the_chosen_conversations(
    eval_conversations, expected_rows, make_rank, make_policy, make_conversations, tmp_path
):
    rank = make_rank()
    config = one_step(eval_conversations=eval_conversations, micro_batch_size=1)
    train(rank, config, make_policy(dropout=0.5), [make_conversations([("a", "b")], UNEQUAL)], 1, tmp_path / "model")
    by_definition = [nats(load_model(tmp_path / "model"), *UNEQUAL[row]) for row in expected_rows]
    expected = sum(total for total, _ in by_definition) / sum(count for _, count in by_definition)
    assert rank.curve("val/loss")[1] == pytest.approx(expected, rel=1e-5)


def test_folders_are_read_one_after_the_other(make_rank, make_policy, make_conversations, tmp_path):
    policy = make_policy()
    whole = [make_conversations(UNEQUAL, name="whole")]
    parts = [make_conversations(UNEQUAL[:1], name="first"), make_conversations(UNEQUAL[1:], name="rest")]
    for name, folders in (("whole", whole), ("parts", parts)):
        train(make_rank(name), settings(global_batch_size=2), policy, folders, 1, tmp_path / f"model of {name}")
    one, other = weights(tmp_path / "model of whole"), weights(tmp_path / "model of parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_seed_gives_other_weights(make_rank, make_policy, make_conversations, tmp_path):
    policy, conversations = make_policy(), make_conversations(UNEQUAL)
    for seed in (1, 2):
        train(make_rank(str(seed)), settings(global_batch_size=1), policy, [conversations], seed, tmp_path / str(seed))
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(not torch.equal(one[name], two[name]) for name in one)


def test_a_dropout_set_for_this_stage_overrides_the_policys_only_during_training(make_rank, make_policy, make_conversations, tmp_path):
    policy, conversations = make_policy(dropout=0.3), make_conversations(UNEQUAL)
    losses = {}
    for dropout in (None, 0.3, 0.0):
        rank = make_rank(str(dropout))
        train(rank, one_step(dropout=dropout), policy, [conversations], 1, tmp_path / "model")
        losses[dropout] = rank.curve("train/loss")[1]
        assert load_config(tmp_path / "model").dropout == 0.3
    by_definition = [nats(load_model(policy), *each) for each in UNEQUAL]
    assert losses[0.0] == pytest.approx(sum(total for total, _ in by_definition) / 21, rel=1e-5)
    assert losses[None] == losses[0.3] != losses[0.0]


def test_recomputing_activations_changes_nothing(monkeypatch, make_rank, make_policy, make_conversations, tmp_path):
    policy, conversations = make_policy(dropout=0.1), make_conversations(UNEQUAL)
    recomputed: list[bool] = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda model, *inputs: (recomputed.append(model.activation_checkpointing), forward(model, *inputs))[1]
    )
    for recompute in (False, True):
        config = settings(activation_checkpointing=recompute)
        train(make_rank(str(recompute)), config, policy, [conversations], 1, tmp_path / str(recompute))
    assert recomputed == [False] * 7 + [True] * 7
    for name, tensor in weights(tmp_path / "False").items():
        torch.testing.assert_close(weights(tmp_path / "True")[name], tensor, rtol=0, atol=1e-6)


def test_a_diverged_training_fails_with_advice_before_it_saves(make_rank, make_policy, make_conversations, tmp_path):
    rank = make_rank()
    config = settings(lr=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(ValueError, match=r"the gradient norm of step 2 is nan: .* Lower lr"):
        train(rank, config, make_policy(), [make_conversations(UNEQUAL)], 1, tmp_path / "model")
    assert rank.saved == [1]


def test_bf16_training_learns_and_its_artifact_is_fp32(make_rank, make_policy, make_conversations, tmp_path):
    rank = make_rank()
    conversations = make_conversations([("a", "one")], [("a", "one")])
    train(rank, settings(steps=40, precision="bf16"), make_policy(), [conversations], 1, tmp_path / "model")
    assert rank.curve("val/loss")[40] < 0.3 < rank.curve("train/loss")[2]
    assert {tensor.dtype for tensor in weights(tmp_path / "model").values()} == {torch.float32}
