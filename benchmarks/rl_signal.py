"""Measure how much of a policy gradient is signal, by comparing the gradients from two halves of the responses to the same questions.

    python -m benchmarks.rl_signal run:RUN/sft run:RUN/prompts [run:RUN/reward_model] --store .gptline

A policy answers `--questions` questions `--responses` times each. Half of the answers to every question give one estimate of the policy
gradient, the rest give another; their cosine c is the share of signal in an estimate's squared length. So if estimates from n answers agree
by c, n (1 - c) / c answers have as much signal as noise. An answer's advantage is its reward less the mean of the others to its question
(Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"); the reward is the reward model's score, or 1 for the right answer
and 0 otherwise. For comparison, the same cosine for supervised learning: between the gradients of the right answers to two halves of the
questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from gpt.batching import padded
from gpt.chat import encode_prompt
from gpt.losses import chosen_logprobs, reinforce_loss
from gpt.model import GPT, load_model
from gpt.random_streams import permutation, stream_seed
from gpt.reward_scorer import RewardScorer
from gpt.sampling import sample
from gpt.tokenizer import Tokenizer
from pipelines.plan.resolve import resolve
from pipelines.store.store import Store

CUT_OFF_SCORE = -1.0
"""The score of a response without an end; RL's setting is `missing_end_score`."""
ROWS = 64
DEVICE = torch.device("cpu")

Row = tuple[list[int], list[int]]
"""The tokens of a prompt, and those of a response with its end token."""


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards (questions, responses) -> each reward less the mean of the others to its question."""
    n = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * n / (n - 1)


def responses_needed(cosine: float, n: int) -> float | None:
    """How many responses have as much signal as noise, if two estimates from `n` agree by `cosine`; None if they don't agree."""
    return n * (1 - cosine) / cosine if cosine > 0 else None


def gradient(model: GPT, rows: Sequence[Row], worth: Tensor, pad: int) -> Tensor:
    """The gradient (parameters,) of the mean over rows of worth (rows,) times the response's log-probability."""
    model.zero_grad()
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS]
        tokens = padded([[*prompt, *response] for prompt, response in part], pad)  # (B, T + 1)
        places = torch.arange(tokens.shape[1] - 1)  # (T,) positions of targets
        begins = torch.tensor([len(prompt) - 1 for prompt, _ in part])[:, None]  # (B, 1)
        ends = begins + torch.tensor([len(response) for _, response in part])[:, None]  # (B, 1)
        keep = (places >= begins) & (places < ends)  # (B, T)
        logprobs = chosen_logprobs(model(tokens[:, :-1]), tokens[:, 1:], temperature=1.0)  # (B, T)
        advantages = worth[first : first + ROWS, None].expand_as(logprobs)  # (B, T)
        reinforce_loss(logprobs, advantages, keep=keep, global_count=len(rows)).backward()
    return -torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def cosine(one: Tensor, other: Tensor) -> float:
    """The cosine of two gradients; 0 if one of them is zero, as when no answer was right."""
    length = float(one.norm() * other.norm())
    return float(one @ other) / length if length else 0.0


def measure(
    policy: Path, prompts: Sequence[dict[str, Any]], scorer: RewardScorer | None, *, responses: int, max_tokens: int
) -> dict[str, float]:
    """The cosines by source of the reward: `reward_model`, `right_answer`, and `supervised`."""
    model, tokenizer = load_model(policy).eval(), Tokenizer.load(policy / "tokenizer.json")
    end, pad = tokenizer.special["end"], tokenizer.special["pad"]
    rows: list[Row] = []
    right: list[float] = []
    scores: list[Tensor] = []
    for number, record in enumerate(prompts):
        asked = [encode_prompt(tokenizer, record["prompt"])] * responses
        streams = [stream_seed(1, "rl_signal", number, each) for each in range(responses)]
        with torch.no_grad():
            sampled = sample(model, asked, streams=streams, max_tokens=max_tokens, temperature=1.0, stop_ids=(end,))
        answers = [each.token_ids for each in sampled]
        rows += zip(asked, answers, strict=True)
        ended = torch.tensor([each.stopped for each in sampled])
        right += [each.stopped and tokenizer.decode(each.token_ids[:-1]).strip() == record["reference"].strip() for each in sampled]
        if scorer is not None:
            scores.append(torch.where(ended, scorer.scores(asked, answers), CUT_OFF_SCORE))
    rewards = {"right_answer": torch.tensor(right, dtype=torch.float32)} | ({"reward_model": torch.cat(scores)} if scores else {})
    is_first = torch.arange(len(rows)) % responses < responses // 2
    cosines = {}
    for name, each in rewards.items():
        worth = leave_one_out(each.view(-1, responses)).flatten()
        halves = [torch.nonzero(chosen).flatten().tolist() for chosen in (is_first, ~is_first)]
        cosines[name] = cosine(*(gradient(model, [rows[row] for row in half], worth[half], pad) for half in halves))
    taught = [(encode_prompt(tokenizer, each["prompt"]), [*tokenizer.encode(each["reference"]), end]) for each in prompts]
    middle = len(taught) // 2
    cosines["supervised"] = cosine(*(gradient(model, half, torch.ones(len(half)), pad) for half in (taught[:middle], taught[middle:])))
    return cosines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy")
    parser.add_argument("prompts", help="with references")
    parser.add_argument("reward_model", nargs="?")
    parser.add_argument("--store", type=Path, default=Path(".gptline"))
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--responses", type=int, default=8, help="per question; an even number")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    given = parser.parse_args(arguments)
    store = Store(given.store)
    policy, prompts = (store.artifact(resolve(store, each)) for each in (given.policy, given.prompts))
    scorer = None
    if given.reward_model:
        judge = store.artifact(resolve(store, given.reward_model))
        scorer = RewardScorer(judge.path, judge.metadata["score_mean"], judge.metadata["score_std"], DEVICE)
    records = list(prompts.records("train"))
    order = permutation(stream_seed(1, "rl_signal"), len(records)).tolist()[: given.questions]
    asked = [records[place] for place in order]
    cosines = measure(policy.path, asked, scorer, responses=given.responses, max_tokens=given.max_tokens)
    n = len(asked) * given.responses // 2
    for name, each in cosines.items():
        compared = f"{len(asked) // 2} answers" if name == "supervised" else f"{n} responses"
        print(f"{name:12}  cosine of two estimates from {compared} each: {each:+.3f}")
    needed = responses_needed(cosines["right_answer"], n)
    row = report.result(
        "rl_signal", unit="responses", device=DEVICE, ours=needed, cosines=cosines, questions=len(asked), responses_in_each_half=n
    )
    print(f"written to {report.write(given.out, row)}")


if __name__ == "__main__":
    main()
