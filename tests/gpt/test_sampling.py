from __future__ import annotations

import math

import pytest
import torch

from gpt.model import GPT, Cache
from gpt.random_streams import stream_seed, uniforms
from gpt.sampling import context_start, sample, sample_stream, sample_token
from gpt.settings import PRESETS, GPTConfig

VOCAB = 50
FAMILIES = pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano", "transformer-nano"])


def small_model(preset: str, **changes) -> GPT:
    config = GPTConfig(**{**PRESETS[preset].model_dump(), "seq_len": 16, **changes}, vocab_size=VOCAB)
    model = GPT(config, torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # sharper distributions, so that a bug would change the text
    return model


def by_definition(model: GPT, prompt: list[int], stream: int, max_tokens: int, temperature: float, stop_ids=()) -> list[int]:
    """Sample without cache or batch, one token at a time."""
    text = list(prompt)
    for draw in uniforms(stream, max_tokens):
        context = torch.tensor([text[context_start(len(text), model.config.seq_len) :]])
        cumulative = (model(context)[0, -1].double() / temperature).softmax(-1).cumsum(-1)
        text.append(int((cumulative <= draw).sum()))
        if text[-1] in stop_ids:
            break
    return text[len(prompt) :]


@FAMILIES
def test_reading_in_pieces_with_the_cache_equals_reading_at_once(preset):
    model = small_model(preset)
    token_ids = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(2))
    cache = Cache(model.config, 3)
    pieces = [model(piece, cache) for piece in token_ids.split([5, 1, 7, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(token_ids), rtol=0, atol=2e-5)


@FAMILIES
def test_prompts_of_unequal_length_continue_as_each_would_by_itself_even_beyond_the_window(preset):
    model = small_model(preset)
    prompts = [[1], [2, 3, 4, 5, 6], list(range(15)), list(range(40)), [7] * 16]
    streams = [stream_seed(1, "sample", 0, i, 0) for i in range(5)]
    together = sample(model, prompts, streams=streams, max_tokens=30, temperature=0.8)
    for prompt, stream, response in zip(prompts, streams, together, strict=True):
        assert response.token_ids == by_definition(model, prompt, stream, 30, 0.8)
        assert not response.stopped


def test_the_cache_has_room_for_the_tokens_that_may_be_written_and_no_more(monkeypatch):
    # A prompt of 3 tokens and 5 more need room for 8 of the window's 16; 14 more would need 17.
    rooms: list[int] = []

    def noting(config: GPTConfig, *sizes: object) -> Cache:
        rooms.append(config.seq_len)
        return Cache(config, *sizes)

    monkeypatch.setattr("gpt.sampling.Cache", noting)
    for max_tokens in (5, 14):
        sample(small_model("gpt2-nano"), [[1, 2, 3], [4]], streams=[1, 2], max_tokens=max_tokens, temperature=0.8)
    assert rooms[0] == 8
    assert set(rooms[1:]) == {16}


def test_a_response_ends_with_its_stop_token_while_others_continue():
    model = small_model("gpt2-nano")
    streams = list(range(8))
    stop_ids = set(range(0, VOCAB, 7))
    responses = sample(model, [[1, 2]] * 8, streams=streams, max_tokens=25, temperature=1.0, stop_ids=stop_ids)
    assert len({len(response.token_ids) for response in responses}) > 1
    for stream, response in zip(streams, responses, strict=True):
        assert response.token_ids == by_definition(model, [1, 2], stream, 25, 1.0, stop_ids)
        assert response.stopped == (response.token_ids[-1] in stop_ids)
        assert not stop_ids & set(response.token_ids[:-1])


def test_a_stream_gives_the_same_tokens_one_by_one():
    model = small_model("llama-nano")
    [response] = sample(model, [[3, 1]], streams=[9], max_tokens=20, temperature=1.0)
    assert list(sample_stream(model, [3, 1], stream=9, max_tokens=20, temperature=1.0)) == response.token_ids


def test_the_logprobs_are_those_of_a_full_forward_pass_at_the_same_temperature():
    model = small_model("gpt2-nano")
    [response] = sample(model, [[1, 2, 3]], streams=[4], max_tokens=10, temperature=0.7)
    text = torch.tensor([[1, 2, 3, *response.token_ids]])
    logprobs = (model(text[:, :-1]) / 0.7).log_softmax(-1).gather(-1, text[:, 1:, None])[0, 2:, 0]
    assert response.logprobs == pytest.approx(logprobs.tolist(), abs=1e-5)


def test_temperature_0_takes_the_likeliest_token():
    model = small_model("gpt2-nano")
    responses = sample(model, [[1, 2, 3]] * 2, streams=[1, 2], max_tokens=3, temperature=0.0)
    assert responses[0].token_ids == responses[1].token_ids
    assert responses[0].token_ids[0] == int(model(torch.tensor([[1, 2, 3]]))[0, -1].argmax())


def test_a_draw_selects_the_token_whose_part_of_the_unit_interval_it_falls_in():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(5, 3)
    token_ids, logprobs = sample_token(logits, torch.tensor([0.0, 0.49, 0.51, 0.74, 0.99], dtype=torch.float64), temperature=1.0)
    assert token_ids.tolist() == [0, 0, 1, 1, 2]
    assert logprobs.tolist() == pytest.approx([math.log(p) for p in (0.5, 0.5, 0.25, 0.25, 0.25)])


def test_a_text_longer_than_the_window_drops_half_a_window_at_a_time():
    assert [context_start(n, 4) for n in range(1, 10)] == [0, 0, 0, 0, 2, 2, 4, 4, 6]
    assert [context_start(n, 1) for n in range(1, 4)] == [0, 1, 2]


def test_the_uniforms_of_a_stream_are_reproducible_and_evenly_distributed():
    draws = uniforms(stream_seed(1, "sample", 0), 4000)
    assert (draws[:10] == uniforms(stream_seed(1, "sample", 0), 10)).all()
    assert 0 <= draws.min() < 0.01 < 0.99 < draws.max() < 1
    assert draws.mean() == pytest.approx(0.5, abs=0.02)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt 2 of 2 is empty"):
        sample(small_model("gpt2-nano"), [[1], []], streams=[1, 2], max_tokens=1, temperature=1.0)
