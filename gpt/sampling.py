"""Continuing prompts: a batched sampler with a cache of keys and values, and the same for one prompt as a stream.

Each sequence draws from a stream of its own, one uniform number per token, through the inverse distribution function. So
its text depends on no neighbour in the batch, but for draws within rounding of a boundary. What a model reads when a
text has outgrown its seq_len is a function of the text's length alone (`context_start`), for the same reason.

Left out: top-k and top-p. The probability of what was drawn is then exactly the model's at that temperature.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt.model import GPT, Cache
from gpt.random_streams import uniforms


@dataclass
class Response:
    """What was drawn after one prompt: `Response(token_ids=[72, 105, 259], logprobs=[-1.2, -0.4, -0.1], stopped=True)`."""

    token_ids: list[int] = field(default_factory=list)
    """With the stop token, where one was drawn."""
    logprobs: list[float] = field(default_factory=list)
    """Of each token, in nats, under the distribution that it was drawn from."""
    stopped: bool = False
    """False: it was cut off after `max_tokens`."""


def sample(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    streams: Sequence[int],
    max_tokens: int,
    temperature: float,
    stop_ids: Collection[int] = (),
) -> list[Response]:
    """One response per prompt. `streams[i]` is prompt i's own: `stream_seed(seed, "sample", step, prompt, sample)`.

    Temperature 0 takes the likeliest token each time.
    """
    responses = [Response() for _ in prompts]
    for row, token_id, logprob in _draws(model, prompts, streams, max_tokens, temperature, stop_ids):
        responses[row].token_ids.append(token_id)
        responses[row].logprobs.append(logprob)
        responses[row].stopped = token_id in stop_ids
    return responses


def sample_stream(
    model: GPT, prompt: Sequence[int], *, stream: int, max_tokens: int, temperature: float, stop_ids: Collection[int] = ()
) -> Iterator[int]:
    """The tokens of `sample` for this one prompt, as they are drawn."""
    for _, token_id, _ in _draws(model, [prompt], [stream], max_tokens, temperature, stop_ids):
        yield token_id


def sample_token(logits: Tensor, draws: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse distribution function: logits (B, V), draws (B,) in [0, 1) -> token ids (B,) and their logprobs (B,)."""
    # In fp64, so that the running sum over a large vocabulary doesn't decide.
    logprobs = (logits.double() / (temperature or 1.0)).log_softmax(dim=-1)  # (B, V)
    if temperature == 0.0:
        token_ids = logits.argmax(dim=-1)
    else:
        cumulative = logprobs.exp().cumsum(dim=-1)
        token_ids = torch.searchsorted(cumulative, draws[:, None], right=True).squeeze(-1)
        token_ids = token_ids.clamp(max=logits.shape[-1] - 1)  # the last sum may round below 1
    return token_ids, logprobs.gather(-1, token_ids[:, None]).squeeze(-1)


def context_start(n_tokens: int, seq_len: int) -> int:
    """First token that the model reads of a text of `n_tokens`: 0 while it fits, then the oldest half window is dropped at a time."""
    dropped_at_once = seq_len - seq_len // 2
    overflow = max(0, n_tokens - seq_len)
    return -(-overflow // dropped_at_once) * dropped_at_once


def _draws(
    model: GPT, prompts: Sequence[Sequence[int]], streams: Sequence[int], max_tokens: int, temperature: float, stop_ids: Collection[int]
) -> Iterator[tuple[int, int, float]]:
    """(row, token id, logprob) as they are drawn; a row ends with a stop token or with its `max_tokens`-th token."""
    assert not model.training, "sampling wants model.eval(): dropout would change the probabilities"
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row + 1} of {len(prompts)} is empty; begin it with a token, such as <|document|>")
    if not prompts or not max_tokens:
        return
    device = model.token_embedding.weight.device
    draws = torch.stack([torch.from_numpy(uniforms(stream, max_tokens)) for stream in streams]).to(device)  # (B, max_tokens)
    texts = [list(prompt) for prompt in prompts]
    rows = list(range(len(prompts)))  # those still being written; rows[i] is the cache's row i
    longest = max(len(text) for text in texts) + max_tokens
    logits, cache = _read(model, [texts[row] for row in rows], min(longest, model.config.seq_len))
    for place in range(max_tokens):
        drawn, logprobs = sample_token(logits, draws[rows, place], temperature=temperature)
        for row, token_id, logprob in zip(rows, drawn.tolist(), logprobs.tolist(), strict=True):
            texts[row].append(token_id)
            yield row, token_id, logprob
        going = [i for i, row in enumerate(rows) if texts[row][-1] not in stop_ids]
        if place + 1 == max_tokens or not going:
            return
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            cache.keep(going)
        logits = _read_last(model, cache, [texts[row] for row in rows])


@torch.no_grad()
def _read(model: GPT, texts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Cache]:
    """Read texts from their context's start: logits (B, V) after the last token of each, and the cache of `room` tokens to go on with."""
    seq_len = model.config.seq_len
    device = model.token_embedding.weight.device
    contexts = [text[context_start(len(text), seq_len) :] for text in texts]
    lengths = [len(context) for context in contexts]
    token_ids = torch.zeros(len(texts), max(lengths), dtype=torch.int64)
    for i, context in enumerate(contexts):
        token_ids[i, : lengths[i]] = torch.tensor(context)
    cache = Cache(model.config.model_copy(update={"seq_len": room}), len(texts), device, model.token_embedding.weight.dtype)
    hidden = model.hidden_states(token_ids.to(device), cache)  # (B, T, C)
    cache.lengths = lengths
    last = torch.tensor(lengths, device=device) - 1
    return model.output(hidden[torch.arange(len(texts), device=device), last]), cache


@torch.no_grad()
def _read_last(model: GPT, cache: Cache, texts: Sequence[Sequence[int]]) -> Tensor:
    """Read each text's newest token, or its context afresh where the cache is full: logits (B, V)."""
    seq_len = model.config.seq_len
    full = [i for i, length in enumerate(cache.lengths) if length == seq_len]
    fresh_logits = None
    if full:
        fresh_logits, fresh = _read(model, [texts[i] for i in full], seq_len)
        # The pass below reads one token in every row: here the last again, which writes the same keys to the same place.
        fresh.lengths = [length - 1 for length in fresh.lengths]
        cache.put(full, fresh)
    newest = torch.tensor([[text[-1]] for text in texts], device=model.token_embedding.weight.device)  # (B, 1)
    logits = model(newest, cache)[:, -1]
    if fresh_logits is not None:
        logits[full] = fresh_logits
    return logits
