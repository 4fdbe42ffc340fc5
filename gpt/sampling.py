"""Continue prompts: a batched sampler with a key-value cache, and the same for one prompt as a stream.

Each sequence draws from its own stream, one uniform number per token, through the inverse distribution function. Its text therefore
does not depend on its neighbours in the batch, except for draws within rounding of a boundary. For the same reason, what the model reads
of a text that exceeds seq_len depends only on the text's length (`context_start`).

Left out: top-k and top-p. Without them, the probability of a draw is exactly the model's at that temperature.
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
    """What was sampled after a prompt: `Response(token_ids=[72, 105, 259], logprobs=[-1.2, -0.4, -0.1], stopped=True)`."""

    token_ids: list[int] = field(default_factory=list)
    """Includes the stop token if one was drawn."""
    logprobs: list[float] = field(default_factory=list)
    """Each token's logprob in nats under the distribution that it was drawn from."""
    stopped: bool = False
    """True: it ended with a stop token. False: it was cut off after `max_tokens`."""


def sample(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    streams: Sequence[int],
    max_tokens: int,
    temperature: float,
    stop_ids: Collection[int] = (),
) -> list[Response]:
    """Sample one response per prompt. `streams[i]` is the seed of prompt i's stream: `stream_seed(seed, "sample", step, prompt, sample)`.

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
    """Yield the tokens that `sample` would return for this prompt, as they are drawn."""
    for _, token_id, _ in _draws(model, [prompt], [stream], max_tokens, temperature, stop_ids):
        yield token_id


def sample_token(logits: Tensor, draws: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Apply the inverse distribution function: logits (B, V), draws (B,) in [0, 1) -> token ids (B,) and their logprobs (B,)."""
    # In fp64, so that rounding in the running sum over a large vocabulary does not decide.
    logprobs = (logits.double() / (temperature or 1.0)).log_softmax(dim=-1)  # (B, V)
    if temperature == 0.0:
        token_ids = logits.argmax(dim=-1)
    else:
        cumulative = logprobs.exp().cumsum(dim=-1)
        token_ids = torch.searchsorted(cumulative, draws[:, None], right=True).squeeze(-1)
        token_ids = token_ids.clamp(max=logits.shape[-1] - 1)  # the last sum may round below 1
    return token_ids, logprobs.gather(-1, token_ids[:, None]).squeeze(-1)


def context_start(n_tokens: int, seq_len: int) -> int:
    """The first token that the model reads of a text of `n_tokens`: 0 while it fits, then half a window is dropped at a time."""
    dropped = seq_len - seq_len // 2
    overflow = max(0, n_tokens - seq_len)
    return -(-overflow // dropped) * dropped


def _draws(
    model: GPT, prompts: Sequence[Sequence[int]], streams: Sequence[int], max_tokens: int, temperature: float, stop_ids: Collection[int]
) -> Iterator[tuple[int, int, float]]:
    """Yield (row, token id, logprob) as they are drawn. A row ends with a stop token or with its `max_tokens`-th token."""
    assert not model.training, "call model.eval() before sampling: dropout would change the probabilities"
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row + 1} of {len(prompts)} is empty; start it with a token, such as <|document|>")
    if not prompts or not max_tokens:
        return
    device = model.token_embedding.weight.device
    draws = torch.stack([torch.from_numpy(uniforms(stream, max_tokens)) for stream in streams]).to(device)  # (B, max_tokens)
    texts = [list(prompt) for prompt in prompts]
    rows = list(range(len(prompts)))  # prompts that are still being continued; rows[i] is the cache's row i
    longest = max(len(text) for text in texts) + max_tokens
    logits, cache = _read(model, [texts[row] for row in rows], min(longest, model.config.seq_len))
    for position in range(max_tokens):
        drawn, logprobs = sample_token(logits, draws[rows, position], temperature=temperature)
        for row, token_id, logprob in zip(rows, drawn.tolist(), logprobs.tolist(), strict=True):
            texts[row].append(token_id)
            yield row, token_id, logprob
        unfinished = [i for i, row in enumerate(rows) if texts[row][-1] not in stop_ids]
        if position + 1 == max_tokens or not unfinished:
            return
        if len(unfinished) < len(rows):
            rows = [rows[i] for i in unfinished]
            cache.keep(unfinished)
        logits = _read_last(model, cache, [texts[row] for row in rows])


@torch.no_grad()
def _read(model: GPT, texts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Cache]:
    """Read texts from the start of their contexts: logits (B, V) after each one's last token, and a cache with room for `room` tokens."""
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
    """Read each text's newest token, or all of its context again where the cache is full: logits (B, V)."""
    seq_len = model.config.seq_len
    full = [i for i, length in enumerate(cache.lengths) if length == seq_len]
    fresh_logits = None
    if full:
        fresh_logits, fresh = _read(model, [texts[i] for i in full], seq_len)
        # The pass below reads one token in every row. In these rows it repeats the last one, which writes the same keys again.
        fresh.lengths = [length - 1 for length in fresh.lengths]
        cache.put(full, fresh)
    newest = torch.tensor([[text[-1]] for text in texts], device=model.token_embedding.weight.device)  # (B, 1)
    logits = model(newest, cache)[:, -1]
    if fresh_logits is not None:
        logits[full] = fresh_logits
    return logits
