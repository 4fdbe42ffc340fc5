from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import FakeRank, Killed, RankOfTwo, as_two_ranks
from safetensors.torch import load_file

from gpt.chat import encode_prompt, encode_response
from gpt.folders import read_records
from gpt.loop import Trained
from gpt.model import GPT, RewardModel, load_config, load_model, load_reward_model, save_model
from gpt.random_streams import stream_seed
from gpt.reward import (
    Pair,
    Rating,
    all_scores,
    read_items,
    train,
)
from gpt.reward_scorer import RewardScorer
from gpt.settings import GPTConfig, RewardSettings
from gpt.tokenizer import byte_tokenizer
from gpt.torch_engine import TorchEngine

CPU = torch.device("cpu")
TOKENIZER = byte_tokenizer()
SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=16, seq_len=16, dropout=0.1, vocab_size=TOKENIZER.vocab_size)
LETTERS = "cdefghijklmn"


def settings(**changes) -> RewardSettings:
    base = dict(steps=5, global_batch_size=4, lr=1e-2, warmup_steps=1, checkpoint_every=2, eval_every=2, log_every=2)
    return RewardSettings(**{**base, **changes})


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def pair(prompt: str, chosen: str, rejected: str, **fields) -> dict[str, Any]:
    return {"prompt": asked(prompt), "chosen": chosen, "rejected": rejected, "source": "test", **fields}


def rating(prompt: str, response: str, score: float) -> dict[str, Any]:
    return {"prompt": asked(prompt), "response": response, "score": score, "source": "test"}


PAIRS = [pair(letter, "aa", "bb") for letter in LETTERS]
RATINGS = [rating(letter, *rated) for letter in LETTERS for rated in (("aa", 1.0), ("bb", 0.0))]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    folder = tmp_path / "policy"
    save_model(folder, SHAPE, dict(GPT(SHAPE, torch.Generator().manual_seed(1)).named_parameters()))
    TOKENIZER.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def make_records(tmp_path: Path) -> Callable[..., Path]:
    """Make the folder of a preferences or ratings artifact."""

    def make(train: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]] = (), name: str = "records") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for split, records in (("train", train), ("held_out", held_out)):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    return make


def saved_reward_model(folder: Path) -> RewardModel:
    """Save an untrained reward model to a folder and return it."""
    generator = torch.Generator().manual_seed(2)
    model = RewardModel.from_policy(GPT(SHAPE, generator), generator).eval()
    save_model(folder, SHAPE, dict(model.named_parameters()), RewardModel)
    return model


def conversation(prompt: str, response: str) -> list[int]:
    return [*encode_prompt(TOKENIZER, asked(prompt)), *encode_response(TOKENIZER, response)]


@torch.no_grad()
def slow_score(model: RewardModel, token_ids: list[int]) -> float:
    """Score a row by itself, without padding."""
    return model(torch.tensor([token_ids]))[0, -1].item()


def test_a_preference_for_a_over_b_is_learned_and_generalises_to_unseen_prompts(policy, make_records, make_rank, tmp_path):
    held_out = [pair(letter, "aa", "bb", kind="seen in training") for letter in "cd"]
    held_out += [pair(letter, "aa", "bb", kind="New!") for letter in "xyz"]
    rank = make_rank()
    trained = train(rank, settings(steps=40), policy, [make_records(PAIRS, held_out)], [], 1, tmp_path / "model")

    assert trained.figures == {"eval/pair_accuracy": 1.0, "eval/pair_accuracy_new": 1.0, "eval/pair_accuracy_seen_in_training": 1.0}
    assert rank.curve("val/loss")[40] < 0.05 < 0.2 < rank.curve("val/loss")[2]
    model = load_reward_model(tmp_path / "model")
    assert slow_score(model, conversation("w", "aa")) > slow_score(model, conversation("w", "bb")) + 2
    assert trained.metadata["role"] == "reward"
    assert trained.metadata["steps"] == 40
    assert trained.metadata["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert trained.metadata["train"] == {"pairs": 12, "ratings": 0, "too_long": 0, "alike": 0}
    assert trained.metadata["held_out"] == {"pairs": 5, "ratings": 0, "too_long": 0, "alike": 0}
    assert (tmp_path / "model" / "tokenizer.json").read_text() == (policy / "tokenizer.json").read_text()


def test_ratings_are_learned_as_log_odds(policy, make_records, make_rank, tmp_path):
    held_out = [rating(letter, *rated) for letter in "xyz" for rated in (("aa", 0.9), ("bb", 0.2))]
    trained = train(make_rank(), settings(steps=40), policy, [], [make_records(RATINGS, held_out)], 1, tmp_path / "model")
    assert trained.figures == {"eval/rating_auc": 1.0}
    model = load_reward_model(tmp_path / "model")
    assert slow_score(model, conversation("w", "aa")) > 1 > -1 > slow_score(model, conversation("w", "bb"))


def test_pairs_and_ratings_are_learned_from_together(policy, make_records, make_rank, tmp_path):
    # The pairs prefer "aa" to "bb", and the ratings prefer "ee" to "ff": neither contains the other's preference.
    rated = [rating(letter, *each) for letter in LETTERS for each in (("ee", 1.0), ("ff", 0.0))]
    pairs, ratings = make_records(PAIRS, PAIRS, "pairs"), make_records(rated, rated, "ratings")
    rank = make_rank()
    trained = train(rank, settings(steps=80), policy, [pairs], [ratings], 1, tmp_path / "model")
    assert trained.figures == {"eval/pair_accuracy": 1.0, "eval/rating_auc": 1.0}
    assert trained.metadata["train"] == {"pairs": 12, "ratings": 24, "too_long": 0, "alike": 0}
    assert rank.curve("val/loss")[80] < 0.2


def test_a_run_stopped_after_any_step_ends_in_the_same_bits_and_the_same_curve(policy, make_records, make_rank, tmp_path):
    pairs, ratings = make_records(PAIRS, PAIRS[:3], "pairs"), make_records(RATINGS, RATINGS[:3], "ratings")

    def run(name: str, stop_after: int | None = None):
        rank = make_rank(name, stop_after)
        return rank, train(rank, settings(micro_batch_size=2), policy, [pairs], [ratings], 1, tmp_path / name)

    whole, whole_metadata = run("whole")
    for stop_after in range(1, 5):
        name = f"stopped_after_{stop_after}"
        first, nothing = run(name, stop_after)
        assert nothing is None
        assert first.saved[-1] == stop_after
        assert not (tmp_path / name).exists()
        second, metadata = run(name)
        assert metadata == whole_metadata
        ours, theirs = (load_file(tmp_path / each / "model.safetensors") for each in (name, "whole"))
        assert all(torch.equal(ours[weight], theirs[weight]) for weight in theirs), stop_after
        for metric in ("train/loss", "val/loss", "train/lr", "train/grad_norm"):
            assert {**first.curve(metric), **second.curve(metric)} == whole.curve(metric), (stop_after, metric)


def test_a_run_killed_in_its_last_evaluation_repeats_no_step_and_ends_in_the_same_bits(policy, make_records, make_rank, tmp_path):
    pairs, ratings = make_records(PAIRS, PAIRS[:3], "pairs"), make_records(RATINGS, RATINGS[:3], "ratings")

    whole, first, second = make_rank("whole"), make_rank("killed"), make_rank("killed")
    first.killed_in = ("evaluate", 5)

    def run(rank: FakeRank) -> Trained | None:
        return train(rank, settings(), policy, [pairs], [ratings], 1, tmp_path / rank.folder.name)

    metadata_of_whole = run(whole)
    with pytest.raises(Killed):
        run(first)
    assert first.saved == [2, 4, 5]
    assert run(second) == metadata_of_whole
    assert "step" not in second.sections
    for metric in ("train/loss", "val/loss", "train/lr", "train/grad_norm"):
        assert not first.curve(metric).keys() & second.curve(metric).keys()
        assert first.curve(metric) | second.curve(metric) == whole.curve(metric), metric
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_logged_and_when(policy, make_records, make_rank, tmp_path):
    rank = make_rank()
    train(rank, settings(), policy, [make_records(PAIRS, PAIRS)], [], 1, tmp_path / "model")
    assert sorted(rank.curve("train/loss")) == sorted(rank.curve("train/tokens_per_s")) == [2, 4, 5]
    assert sorted(rank.curve("val/loss")) == [2, 4, 5]
    assert rank.saved == [2, 4, 5]
    assert set(rank.sections) == {"start", "encode", "step", "checkpoint", "evaluate"}
    # A step has 4 pairs of 2 * (4 + 3) tokens: <|user|>, a letter, <|end|>, <|assistant|>, two letters, <|end|>.
    for step, per_second in rank.curve("train/tokens_per_s").items():
        assert per_second * rank.curve("time/step_s")[step] == pytest.approx(4 * 2 * 7)


def test_validation_loss_is_the_mean_over_held_out_pairs_and_ratings(policy, make_records, make_rank, tmp_path):
    pairs, ratings = make_records(PAIRS, [pair("x", "aa", "b")], "pairs"), make_records([], [rating("x", "aaaa", 0.25)], "ratings")
    rank = make_rank()
    train(rank, settings(centering_coef=1.0), policy, [pairs], [ratings], 1, tmp_path / "model")
    model = load_reward_model(tmp_path / "model")
    chosen, rejected, rated = (torch.tensor(slow_score(model, conversation("x", text))) for text in ("aa", "b", "aaaa"))
    of_pair = -(chosen - rejected).sigmoid().log()  # whatever centering_coef is
    of_rating = -0.25 * rated.sigmoid().log() - 0.75 * (1 - rated.sigmoid()).log()
    assert rank.curve("val/loss")[5] == pytest.approx(((of_pair + of_rating) / 2).item(), rel=1e-4)


def test_the_centering_term_is_logged_separately_and_its_weight_changes_only_the_model(policy, make_records, make_rank, tmp_path):
    pairs, ratings = make_records([pair("x", "aa", "b")], name="pairs"), make_records([rating("x", "aaaa", 0.25)], name="ratings")
    ends = {}
    for coef in (0.0, 5.0):
        rank = make_rank(str(coef))
        config = settings(steps=1, warmup_steps=0, global_batch_size=2, micro_batch_size=1, dropout=0.0, centering_coef=coef)
        train(rank, config, policy, [pairs], [ratings], 1, tmp_path / str(coef))
        ends[coef] = rank.curve("train/loss")[1], rank.curve("train/centering")[1], load_reward_model(tmp_path / str(coef)).output.weight
    assert ends[0.0][:2] == ends[5.0][:2]
    assert not torch.equal(ends[0.0][2], ends[5.0][2])
    first = RewardModel.from_policy(load_model(policy), torch.Generator().manual_seed(stream_seed(1, "reward head")))
    chosen, rejected = (slow_score(first.eval(), conversation("x", text)) for text in ("aa", "b"))
    assert ends[0.0][1] == pytest.approx((chosen + rejected) ** 2 / 2, rel=1e-4)  # of two items, one is a pair


def test_without_held_out_items_there_is_no_validation_loss_and_no_figure(policy, make_records, make_rank, tmp_path):
    rank = make_rank()
    trained = train(rank, settings(), policy, [make_records(PAIRS)], [], 1, tmp_path / "model")
    assert rank.curve("val/loss") == {}
    assert trained.figures == {}


def test_the_metadata_has_the_mean_and_the_deviation_of_all_training_scores(policy, make_records, make_rank, tmp_path):
    pairs = [pair("q", "a" * n, "b" * n) for n in range(1, 10)]
    ratings = [rating("q", "c" * n, n / 10) for n in range(1, 10)]
    trained = train(
        make_rank(), settings(), policy, [make_records(pairs, name="pairs")], [make_records(ratings, name="ratings")], 1, tmp_path / "model"
    )
    model = load_reward_model(tmp_path / "model")
    scores = [slow_score(model, conversation("q", letter * n)) for letter in "abc" for n in range(1, 10)]
    assert trained.metadata["score_mean"] == pytest.approx(statistics.fmean(scores), rel=1e-5)
    assert trained.metadata["score_std"] == pytest.approx(statistics.pstdev(scores), rel=1e-5)


def test_the_score_statistics_of_a_bf16_training_are_those_of_its_fp32_model(policy, make_records, make_rank, tmp_path):
    texts = ["a" * n for n in range(1, 10)]
    pairs, ratings = make_records(PAIRS, PAIRS, "pairs"), make_records([rating("q", text, len(text) / 10) for text in texts], (), "ratings")
    trained = train(make_rank(), settings(precision="bf16"), policy, [pairs], [ratings], 1, tmp_path / "model")
    scorer = RewardScorer(tmp_path / "model", mean=0.0, std=1.0, device=CPU)

    def raw(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        encoded = [encode_prompt(TOKENIZER, asked(prompt)) for prompt in prompts], [encode_response(TOKENIZER, each) for each in responses]
        return scorer.scores(*encoded).double()

    of_pairs = raw([*LETTERS, *LETTERS], ["aa"] * 12 + ["bb"] * 12)
    scores = torch.cat([of_pairs, raw(["q"] * 9, texts)])
    assert trained.metadata["score_mean"] == pytest.approx(scores.mean().item(), rel=0, abs=1e-6)
    assert trained.metadata["score_std"] == pytest.approx(scores.std(correction=0).item(), rel=0, abs=1e-6)
    assert trained.figures["eval/pair_accuracy"] == (of_pairs[:12] > of_pairs[12:]).double().mean()


def test_equal_scores_are_refused_because_they_rank_nothing(policy, make_records, make_rank, tmp_path):
    with pytest.raises(ValueError, match="the scores are equal: over 1 training responses"):
        train(make_rank(), settings(), policy, [], [make_records([rating("q", "a", 1.0)])], 1, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_diverged_training_fails_before_it_saves_a_checkpoint_of_that_step(policy, make_records, make_rank, tmp_path):
    rank = make_rank()
    config = settings(steps=20, lr=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(ValueError, match=r"the gradient norm of step \d+ is (nan|inf)") as caught:
        train(rank, config, policy, [make_records(PAIRS)], [], 1, tmp_path / "model")
    assert rank.saved == list(range(1, int(str(caught.value).split()[5])))
    assert not (tmp_path / "model").exists()


def test_records_that_are_too_long_or_have_equal_responses_are_left_out_and_counted(make_records):
    # A prompt and a response have 4 special tokens, which leaves 12 of 16 for text.
    fits, too_long = "a" * 11, "a" * 12
    pairs = make_records([pair("q", fits, "b"), pair("q", too_long, "b"), pair("q", "b", too_long), pair("q", "a", "a")], name="pairs")
    ratings = make_records([rating("q", fits, 0.5), rating("long prompts", "a", 0.5)], name="ratings")
    items, counts = read_items(TOKENIZER, read_records([pairs], "train"), read_records([ratings], "train"), 16)
    assert items == [Pair(conversation("q", fits), conversation("q", "b")), Rating(conversation("q", fits), 0.5)]
    assert counts == {"pairs": 1, "ratings": 1, "too_long": 3, "alike": 1}
    assert len(conversation("q", fits)) == 16


def test_records_that_are_left_out_are_reported(policy, make_records, make_rank, tmp_path):
    rank, records = make_rank(), make_records([*PAIRS, pair("q", "a" * 100, "b"), pair("q", "a", "a")])
    train(rank, settings(), policy, [records], [], 1, tmp_path / "model")
    assert rank.warnings == [
        f"2 of {len(PAIRS) + 2} training records are left out: 1 are longer than the policy's seq_len = 16 tokens, and 1 are pairs of "
        "equal responses"
    ]


def test_encoding_before_the_first_step_and_scoring_after_the_last_one_are_reported(policy, make_records, make_rank, tmp_path):
    rank = make_rank()
    pairs, ratings = make_records(PAIRS[:6], PAIRS[:2], name="pairs"), make_records(RATINGS[:4], name="ratings")
    train(rank, settings(eval_every=100), policy, [pairs], [ratings], 1, tmp_path / "model")
    last = [shown for shown in rank.shown if shown[0] == shown[1]]
    encoded = [(6, 6, "pairs encoded"), (4, 4, "ratings encoded"), (2, 2, "pairs encoded")]
    # Two held-out pairs have 4 responses, and are scored for val/loss and for the figures; 6 pairs and 4 ratings have 16.
    assert last == [*encoded, *[(4, 4, "responses scored")] * 2, (16, 16, "responses scored")]


def test_records_that_are_all_unusable_are_refused_with_their_counts(policy, make_records, make_rank, tmp_path):
    records = make_records([pair("q", "a" * 12, "b"), pair("q", "a", "a")])
    with pytest.raises(ValueError, match="1 are longer than the policy's seq_len = 16 tokens, and 1 are pairs of equal responses"):
        train(make_rank(), settings(), policy, [records], [], 1, tmp_path / "model")


def test_one_step_moves_every_weight(policy, make_records, make_rank, tmp_path):
    # Pairs determine only differences, so by themselves they would not move the head's bias.
    pairs = make_records([pair("q" * 9, "a", "b")], name="pairs")
    ratings = make_records([rating("q" * 9, "ab", 1.0)], name="ratings")
    config = settings(steps=1, warmup_steps=0, global_batch_size=2, weight_decay=0.0)
    train(make_rank(), config, policy, [pairs], [ratings], 1, tmp_path / "after")
    before = load_file(policy / "model.safetensors")
    after = load_file(tmp_path / "after" / "model.safetensors")
    assert {name for name in after if name not in before} == {"output.weight", "output.bias"}
    for name, tensor in before.items():
        assert not torch.equal(after[name], tensor), name
    assert after["output.bias"].item() == pytest.approx(1e-2, rel=1e-3)  # Adam's first step from 0, upwards because the response was good


def test_a_dropout_set_for_this_stage_does_not_reach_later_ones(policy, make_records, make_rank, tmp_path):
    pairs = make_records(PAIRS)
    for name, dropout in (("own", None), ("same", 0.1), ("other", 0.5)):
        train(make_rank(name), settings(dropout=dropout), policy, [pairs], [], 1, tmp_path / name)
        assert load_config(tmp_path / name) == SHAPE
    own, same, other = (load_file(tmp_path / name / "model.safetensors")["output.weight"] for name in ("own", "same", "other"))
    assert torch.equal(own, same)
    assert not torch.equal(own, other)


def test_recomputing_activations_changes_nothing(policy, make_records, make_rank, tmp_path):
    pairs = make_records(PAIRS)
    for recompute in (False, True):
        config = settings(activation_checkpointing=recompute)
        train(make_rank(str(recompute)), config, policy, [pairs], [], 1, tmp_path / str(recompute))
    kept, recomputed = (load_file(tmp_path / name / "model.safetensors") for name in ("False", "True"))
    torch.testing.assert_close(recomputed["output.weight"], kept["output.weight"], rtol=0, atol=1e-6)


def test_micro_batches_do_not_change_the_loss_of_a_step(policy, make_records, make_rank, tmp_path):
    pairs, ratings = make_records(PAIRS, name="pairs"), make_records(RATINGS, name="ratings")
    ends = {}
    for size in (4, 2, 1):
        config = settings(dropout=0.0, micro_batch_size=size, eps=1e-3, log_every=1)
        rank = make_rank(str(size))
        train(rank, config, policy, [pairs], [ratings], 1, tmp_path / str(size))
        ends[size] = rank.curve("train/loss"), rank.curve("train/grad_norm"), load_file(tmp_path / str(size) / "model.safetensors")
    for size in (2, 1):
        for whole, split in zip(ends[4][:2], ends[size][:2], strict=True):
            assert list(split.values()) == pytest.approx(list(whole.values()), rel=1e-4)
        for name, tensor in ends[4][2].items():
            torch.testing.assert_close(ends[size][2][name], tensor, rtol=0, atol=2e-5)


def train_and_score(rank: Any, folder: Path, scored: Path, output: Path) -> tuple[Trained, torch.Tensor]:
    """Train, then score 40 conversations with given weights in 3 passes, the last of which leaves one of two ranks without work."""
    config = settings(dropout=0.0, eps=1e-3, log_every=1)
    trained = train(rank, config, folder / "policy", [folder / "pairs"], [folder / "ratings"], 1, output)
    engine = TorchEngine(load_reward_model(scored), [{"params": load_reward_model(scored).parameters()}], config, device=CPU)
    rows = [conversation("q", "ab" * (1 + n % 4) + "c" * (n % 3)) for n in range(40)]
    return trained, all_scores(rank, config, engine, rows)


def train_and_score_as_two(rank: int, folder: str) -> None:
    both = RankOfTwo(rank, Path(folder))
    trained, scores = train_and_score(both, Path(folder), Path(folder) / "scored", Path(folder) / "both")
    if rank == 0:
        torch.save(((trained.metadata, trained.figures), scores, list(both.curve("train/loss").values())), Path(folder) / "of_two.pt")


def test_two_ranks_change_training_only_by_rounding_and_the_scores_of_given_weights_not_at_all(policy, make_records, make_rank, tmp_path):
    make_records(PAIRS, PAIRS[:5], "pairs")
    make_records(RATINGS, RATINGS[:5], "ratings")
    saved_reward_model(tmp_path / "scored")
    single = make_rank()
    trained, scores = train_and_score(single, tmp_path, tmp_path / "scored", tmp_path / "single")
    as_two_ranks(train_and_score_as_two, tmp_path)
    (metadata_of_two, figures_of_two), scores_of_two, losses = torch.load(tmp_path / "of_two.pt")
    assert torch.equal(scores_of_two, scores)
    assert losses == pytest.approx(list(single.curve("train/loss").values()), rel=1e-5)
    assert figures_of_two == trained.figures
    for name in ("score_mean", "score_std"):
        assert metadata_of_two[name] == pytest.approx(trained.metadata[name], abs=2e-5)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("single", "both"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-5)
