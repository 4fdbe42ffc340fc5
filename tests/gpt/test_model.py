from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt.model import (
    GPT,
    Attention,
    Block,
    FeedForward,
    RewardModel,
    count_parameters,
    flops_per_token,
    load_model,
    load_reward_model,
    rotary_angles,
    rotate,
    save_model,
    sinusoids,
    with_dropout,
)
from gpt.settings import PRESETS, GPTConfig

VOCAB = 50
FAMILIES = pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano", "transformer-nano"])


def configured(preset: str, **changes) -> GPTConfig:
    return GPTConfig(**{**PRESETS[preset].model_dump(), **changes}, vocab_size=VOCAB)


def new(preset: str, seed: int = 1, **changes) -> GPT:
    return GPT(configured(preset, **changes), torch.Generator().manual_seed(seed)).eval()


def drawn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_tokens(rows: int, n: int) -> Tensor:
    return torch.randint(VOCAB, (rows, n), generator=torch.Generator().manual_seed(3))


def layer_of(preset: str, kind: str, **changes):
    """A sub-layer whose weights are large enough to matter."""
    layer = getattr(new(preset, **changes).blocks[0], kind)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.5 * drawn(*parameter.shape, seed=number))
    return layer


def attention_by_definition(layer: Attention, x: Tensor, head_dim: int, rotary: bool) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of each head over the current and earlier positions. Vaswani et al. 2017, eq. 1."""
    groups = layer.n_head // layer.n_kv_head
    rows = []
    for sequence in x:
        merged = sequence @ layer.qkv.weight.T + (layer.qkv.bias if layer.qkv.bias is not None else 0.0)
        parts = [merged[:, start : start + head_dim] for start in range(0, merged.shape[1], head_dim)]
        heads = []
        for head in range(layer.n_head):
            q, k, v = parts[head], parts[layer.n_head + head // groups], parts[layer.n_head + layer.n_kv_head + head // groups]
            if rotary:
                q, k = rotated_by_definition(q), rotated_by_definition(k)
            places = []
            for t in range(len(sequence)):
                scores = torch.stack([q[t] @ k[s] / math.sqrt(head_dim) for s in range(t + 1)])
                shares = scores.exp() / scores.exp().sum()
                places.append(sum(shares[s] * v[s] for s in range(t + 1)))
            heads.append(torch.stack(places))
        joined = torch.cat(heads, dim=1)
        rows.append(joined @ layer.project.weight.T + (layer.project.bias if layer.project.bias is not None else 0.0))
    return torch.stack(rows)


def rotated_by_definition(x: Tensor) -> Tensor:
    """Pair i at position t is a complex number, multiplied by e^(i t 10000^(-2 i / D)). Su et al. 2021, eq. 12 and 14."""
    x = x.detach()
    n, head_dim = x.shape
    half = head_dim // 2
    rows = []
    for t in range(n):
        pairs = [
            complex(x[t, i], x[t, i + half]) * complex(math.cos(a), math.sin(a))
            for i in range(half)
            for a in [t * 10000 ** (-2 * i / head_dim)]
        ]
        rows.append([z.real for z in pairs] + [z.imag for z in pairs])
    return torch.tensor(rows)


@pytest.mark.parametrize(("preset", "kv_heads"), [("gpt2-nano", 4), ("gpt2-nano", 2), ("gpt2-nano", 1), ("llama-nano", 2)])
def test_attention_equals_its_formula_written_out(preset, kv_heads):
    layer = layer_of(preset, "attention", n_head=4, n_kv_head=kv_heads)
    x = drawn(2, 7, 32)
    rotary = preset == "llama-nano"
    angles = rotary_angles(torch.arange(7)[None], 8) if rotary else None
    torch.testing.assert_close(layer(x, angles), attention_by_definition(layer, x, 8, rotary), rtol=1e-4, atol=1e-4)


def test_rotation_multiplies_complex_numbers():
    x = drawn(9, 6)
    turned = rotate(x[None, None], rotary_angles(torch.arange(9)[None], 6))[0, 0]
    torch.testing.assert_close(turned, rotated_by_definition(x), rtol=1e-5, atol=1e-5)


def test_rotated_scores_depend_only_on_the_distance():
    q, k = drawn(1, 1, 1, 6), drawn(1, 1, 1, 6, seed=4)

    def score(q_place: int, k_place: int) -> float:
        return (
            (rotate(q, rotary_angles(torch.tensor([[q_place]]), 6)) * rotate(k, rotary_angles(torch.tensor([[k_place]]), 6))).sum().item()
        )

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_sinusoids_equal_the_papers():
    table = sinusoids(torch.tensor([[0, 3]]), 4)[0]
    assert table[0].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert table[1].tolist() == pytest.approx([math.sin(3), math.cos(3), math.sin(3 / 100), math.cos(3 / 100)])


@pytest.mark.parametrize(
    ("preset", "formula"),
    [
        ("gpt2-nano", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("transformer-nano", lambda x: x.clamp(min=0)),
        ("llama-nano", lambda x: x[..., :88] / (1 + (-x[..., :88]).exp()) * x[..., 88:]),  # 8/3 * 32 rounded up to 88
    ],
)
def test_feed_forward_equals_its_formula_written_out(preset, formula):
    layer: FeedForward = layer_of(preset, "feed_forward")
    x = drawn(3, 32)
    torch.testing.assert_close(layer(x), layer.down(formula(layer.up(x))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_normalises_before_or_after_each_sub_layer(norm_first):
    block: Block = new("gpt2-nano", norm_first=norm_first).blocks[0]
    x = drawn(2, 5, 32)

    def normalised(y: Tensor) -> Tensor:
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    if norm_first:
        middle = x + block.attention(normalised(x))
        expected = middle + block.feed_forward(normalised(middle))
    else:
        middle = normalised(x + block.attention(x))
        expected = normalised(middle + block.feed_forward(middle))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@FAMILIES
def test_no_token_sees_what_comes_after_it(preset):
    model = new(preset)
    token_ids = some_tokens(1, 20)
    changed = token_ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % VOCAB
    before, after = model(token_ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@FAMILIES
def test_padding_on_the_right_changes_nothing(preset):
    model = new(preset)
    token_ids = some_tokens(2, 12)
    padded = torch.cat([token_ids, torch.full((2, 9), VOCAB - 1)], dim=1)
    torch.testing.assert_close(model(padded)[:, :12], model(token_ids), rtol=1e-5, atol=1e-5)


@FAMILIES
def test_the_order_of_the_tokens_matters(preset):
    model = new(preset)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.mul_(20.0)  # initial weights attend to all positions almost evenly
    one, two = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[2, 1, 3]]))
    assert not torch.allclose(one[:, -1], two[:, -1], atol=1e-4)


@FAMILIES
def test_dropout_acts_only_in_training(preset):
    model = new(preset, dropout=0.5)
    token_ids = some_tokens(2, 10)
    assert torch.equal(model(token_ids), model(token_ids))
    model.train()
    assert not torch.equal(model(token_ids), model(token_ids))


def test_the_2017_paper_scales_embeddings_by_the_root_of_their_width():
    model = new("transformer-nano")
    embedded = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: embedded.append(inputs[0]))
    model(torch.tensor([[7]]))
    expected = math.sqrt(32) * model.token_embedding.weight[7] + torch.tensor([0.0, 1.0]).repeat(16)
    torch.testing.assert_close(embedded[0][0, 0], expected)


def test_a_sequence_longer_than_the_window_is_refused():
    with pytest.raises(ValueError, match="expected at most seq_len = 32 tokens, found 33"):
        new("gpt2-nano")(some_tokens(1, 33))


def test_weights_are_initialised_as_in_gpt_2():
    model = new("gpt2-tiny")
    block = model.blocks[0]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.attention.project.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)  # 4 layers add 8 times
    assert block.feed_forward.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert block.attention.qkv.bias.abs().max() == 0
    assert block.attention_norm.weight.tolist() == [1.0] * 128


def test_initial_weights_depend_only_on_the_generator_and_leave_the_global_one_untouched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = new("gpt2-nano", seed=1), new("gpt2-nano", seed=1), new("gpt2-nano", seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.token_embedding.weight, other.token_embedding.weight)


def test_gpt2_124m_has_its_published_number_of_parameters():
    # The smallest model of Radford et al., with 50,257 tokens, has 124,439,808 parameters.
    config = GPTConfig(**PRESETS["gpt2-124m"].model_dump(), vocab_size=50257)
    assert count_parameters(GPT(config)) == 124_439_808
    assert flops_per_token(config) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


@FAMILIES
def test_a_saved_model_loads_as_the_same_model(preset, tmp_path):
    model = new(preset)
    save_model(tmp_path, model.config, dict(model.named_parameters()))
    loaded = load_model(tmp_path)
    token_ids = some_tokens(2, 10)
    assert loaded.config == model.config
    assert torch.equal(loaded(token_ids), model(token_ids))
    assert not loaded.training


def test_a_tied_weight_is_stored_once_and_stays_tied(tmp_path):
    model = new("gpt2-nano")
    save_model(tmp_path, model.config, dict(model.named_parameters()))
    assert "output.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    assert loaded.output.weight is loaded.token_embedding.weight


def test_saving_twice_gives_the_same_bytes(tmp_path):
    model = new("llama-nano")
    for name in ("a", "b"):
        save_model(tmp_path / name, model.config, dict(model.named_parameters()))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda weights: weights.pop("final_norm.bias"), r"final_norm\.bias is missing"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra is unknown"),
        (
            lambda weights: weights.update({"final_norm.bias": torch.zeros(31)}),
            r"final_norm\.bias: .*, found \(torch\.float32, \(31,\)\)",
        ),
        (
            lambda weights: weights.update({"final_norm.bias": torch.zeros(32).half()}),
            r"final_norm\.bias: .*, found \(torch\.float16, ",
        ),
    ],
)
def test_weights_that_do_not_match_their_config_are_named(change, complaint, tmp_path):
    model = new("gpt2-nano")
    save_model(tmp_path, model.config, dict(model.named_parameters()))
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=complaint):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        save_model(tmp_path / "again", model.config, weights)


def test_a_reward_model_has_its_policys_trunk_and_a_score_at_every_position(tmp_path):
    policy = new("gpt2-tiny")
    model = RewardModel.from_policy(policy, torch.Generator().manual_seed(1)).requires_grad_(False)
    token_ids = torch.arange(10)[None]
    assert torch.equal(model.hidden_states(token_ids), policy.hidden_states(token_ids))
    scores = model(token_ids)
    assert scores.shape == (1, 10)
    assert scores[0, 3] == pytest.approx(float(model.hidden_states(token_ids)[0, 3] @ model.output.weight[0]), abs=1e-5)
    assert float(model.output.weight.std()) == pytest.approx(129**-0.5, rel=0.2)  # n_embd = 128
    assert model.output.weight.data_ptr() != model.token_embedding.weight.data_ptr()

    save_model(tmp_path, model.config, dict(model.named_parameters()), RewardModel)
    assert torch.equal(load_reward_model(tmp_path)(token_ids), scores)
    with pytest.raises(ValueError, match=r"output\.weight is unknown"):
        load_model(tmp_path)


def test_a_copy_with_another_dropout_has_the_same_weights_and_leaves_the_original_unchanged():
    policy = new("gpt2-nano").eval()
    model = RewardModel.from_policy(policy, torch.Generator().manual_seed(1)).eval()
    for original in (policy, model):
        copy = with_dropout(original, 0.5)
        assert type(copy) is type(original)
        assert copy.config == original.config.model_copy(update={"dropout": 0.5})
        assert {module.p for module in copy.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}
        assert {module.p for module in original.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
        assert torch.equal(copy.eval()(some_tokens(2, 10)), original(some_tokens(2, 10)))
        assert copy.token_embedding.weight is not original.token_embedding.weight


def test_a_config_with_an_unknown_key_is_refused(tmp_path):
    model = new("gpt2-nano")
    save_model(tmp_path, model.config, dict(model.named_parameters()))
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "n_layers": 3}))
    with pytest.raises(ValueError, match="n_layers"):
        load_model(tmp_path)
