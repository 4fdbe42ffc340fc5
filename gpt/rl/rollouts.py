"""Rollouts: the policy responds to a step's prompts, and its responses are scored. Each rank samples a share; all end up with the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.batching import Batch, padded
from gpt.chat import encode_prompt
from gpt.engine import Rank
from gpt.folders import records_in_sections
from gpt.model import GPT
from gpt.random_streams import stream_seed
from gpt.rl.scoring import Rollout, Scorer, count_failures, total_scores
from gpt.sampling import Response, sample
from gpt.settings import RlSettings
from gpt.tokenizer import Tokenizer

SAMPLED_AT_ONCE = 64
"""Responses that a rank samples together. The keys and values of each take 75 MB for GPT-2's 1,024 tokens in fp32."""


@dataclass(frozen=True)
class Prompt:
    record: Mapping[str, Any]
    token_ids: list[int]


@dataclass(frozen=True)
class Rollouts:
    """Everything that a step sampled: on the CPU, the same on every rank, in the order of the step's prompts."""

    # what the policy read and wrote
    tokens: Batch
    """Whole rows; True in its loss_mask = the policy wrote the target."""
    sampler_logprobs: Tensor
    """(B, T), the targets' logprobs when they were sampled; 0 where the policy did not write the target."""
    # what it is worth
    scores: Tensor
    """(B,)"""
    stopped: Tensor
    """(B,) True = the policy ended the response itself; False = it was cut off."""
    n_failed: int
    """Responses that a scorer could not score."""


def read_prompts(rank: Rank, config: RlSettings, tokenizer: Tokenizer, folders: Sequence[Path], seq_len: int) -> tuple[list[Prompt], int]:
    """Encode the training prompts that leave room for a response, and count the others; ValueError if all are too long."""
    usable, n_too_long = [], 0
    for record in records_in_sections(rank, folders, "train", "prompts", config.start_deadline_s):
        token_ids = encode_prompt(tokenizer, record["prompt"])
        if len(token_ids) <= seq_len - config.max_response_tokens:
            usable.append(Prompt(record, token_ids))
        else:
            n_too_long += 1
    room = f"room for max_response_tokens = {config.max_response_tokens} within the models' seq_len = {seq_len}"
    if not usable:
        raise ValueError(
            f"no prompt in {' and '.join(map(str, folders))} can be used: none of {n_too_long} leaves {room}; use shorter prompts, "
            "a lower max_response_tokens, or models with a longer seq_len"
        )
    if n_too_long:
        rank.warn(f"{n_too_long} of {n_too_long + len(usable)} prompts are left out: they leave no {room}")
    return usable, n_too_long


def roll_out(
    rank: Rank,
    config: RlSettings,
    sampler: GPT,
    tokenizer: Tokenizer,
    scorers: Sequence[Scorer],
    prompts: Sequence[Prompt],
    seed: int,
    step: int,
) -> Rollouts:
    """Sample and score one response to each prompt."""
    own = range(rank.rank, len(prompts), rank.world_size)
    responses = _sample_own(config, sampler, prompts, own, tokenizer.special["end"], seed, step)
    # Each row is written by one rank and is 0 on the others, so that the sums over ranks are exact.
    shape = (len(prompts), config.max_response_tokens)
    token_ids = torch.zeros(shape, dtype=torch.int64)
    logprobs = torch.zeros(shape, dtype=torch.float32)
    lengths = torch.zeros(len(prompts), dtype=torch.int64)
    stopped = torch.zeros(len(prompts), dtype=torch.int64)
    scores = torch.zeros(len(prompts), dtype=torch.float32)
    finished: dict[int, Rollout] = {}
    for row, response in zip(own, responses, strict=True):
        lengths[row] = len(response.token_ids)
        token_ids[row, : lengths[row]] = torch.tensor(response.token_ids)
        logprobs[row, : lengths[row]] = torch.tensor(response.logprobs)
        stopped[row] = response.stopped
        scores[row] = config.missing_end_score
        if response.stopped:
            text = tokenizer.decode(response.token_ids[:-1])
            finished[row] = Rollout(prompts[row].record, prompts[row].token_ids, response.token_ids, text)
    failures: list[str] = []
    if finished:
        scores[list(finished)], failures = total_scores(config, scorers, list(finished.values()))
    token_ids, logprobs, lengths, stopped, scores = (rank.all_sum(each) for each in (token_ids, logprobs, lengths, stopped, scores))
    n_failed = count_failures(rank, config, failures, step)

    tokens = _whole_rows(prompts, token_ids, lengths, tokenizer.special["pad"])
    sampler_logprobs = torch.zeros(tokens.targets.shape)  # (B, T)
    sampler_logprobs[tokens.loss_mask] = logprobs[torch.arange(config.max_response_tokens) < lengths[:, None]]
    return Rollouts(tokens, sampler_logprobs, scores, stopped.bool(), n_failed)


def nothing_to_learn(config: RlSettings, rollouts: Rollouts, step: int) -> str | None:
    """Say why no response of this step is better than another, or return None if some are."""
    n_responses = len(rollouts.scores)
    if not rollouts.stopped.any():
        return (
            f"all {n_responses} responses of step {step + 1} were cut off at max_response_tokens = {config.max_response_tokens}, "
            "so none was scored: raise max_response_tokens, or start from a policy that has learned to end its responses"
        )
    if (rollouts.scores == rollouts.scores[0]).all():
        return (
            f"all {n_responses} responses of step {step + 1} got the same score, {rollouts.scores[0].item():g}, so there is nothing to "
            "learn from them. If this continues, the scorers do not tell responses apart, or the prompts are too easy or too hard"
        )
    return None


def _sample_own(
    config: RlSettings, sampler: GPT, prompts: Sequence[Prompt], own: range, end_id: int, seed: int, step: int
) -> list[Response]:
    # A stream is named by the prompt's position in the step, not in the file: with few prompts, a step has some of them twice.
    streams = [stream_seed(seed, "sample", step, *divmod(row, config.responses_per_prompt)) for row in own]
    responses: list[Response] = []
    for first in range(0, len(own), SAMPLED_AT_ONCE):
        at_once = slice(first, first + SAMPLED_AT_ONCE)
        responses += sample(
            sampler,
            [prompts[row].token_ids for row in own[at_once]],
            streams=streams[at_once],
            max_tokens=config.max_response_tokens,
            temperature=config.temperature,
            stop_ids=[end_id],
        )
    return responses


def _whole_rows(prompts: Sequence[Prompt], response_ids: Tensor, lengths: Tensor, pad_id: int) -> Batch:
    """Append each response to its prompt: response_ids (B, max_response_tokens), of which the first `lengths` (B,) are real."""
    rows = [[*prompt.token_ids, *response_ids[row, : lengths[row]].tolist()] for row, prompt in enumerate(prompts)]
    padded_rows = padded(rows, pad_id)  # (B, T + 1)
    positions = torch.arange(padded_rows.shape[1])  # (T + 1,)
    starts = torch.tensor([len(prompt.token_ids) for prompt in prompts])[:, None]  # (B, 1)
    written = (positions >= starts) & (positions < starts + lengths[:, None])  # (B, T + 1)
    return Batch(padded_rows[:, :-1], padded_rows[:, 1:], written[:, 1:])
