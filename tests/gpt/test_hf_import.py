"""Import: a `transformers` folder becomes a model of ours, or is refused with what differs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.hf import export_gpt2, read_checkpoint
from gpt.hf_folder import checkpoint_files, read_config
from gpt.model import GPT, load_model
from gpt.settings import PRESETS, GPTConfig
from gpt.tokenizer import Tokenizer, byte_tokenizer, read_gpt2, train_bpe

BPE = train_bpe(["the cat sat on the mat", "明月几时有，把酒问青天。"], 300)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def gpt2(tokenizer, **changes) -> GPT:
    config = GPTConfig(**{**PRESETS["gpt2-nano"].model_dump(), **changes}, vocab_size=tokenizer.vocab_size)
    model = GPT(config, torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))  # no bias stays 0
    return model


TEXTS = ["the cat sat on the mat", " the  mat's\n\ncat!", "é 明月\x00 123", ""]


def edit_json(path: Path, edit: Any) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Any) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({name: weight.contiguous() for name, weight in edit(weights).items()}, folder / "model.safetensors")


@pytest.mark.parametrize("tokenizer", [BPE, byte_tokenizer()], ids=["bpe", "bytes"])
@pytest.mark.parametrize("changes", [{}, {"tied": False, "n_hidden": 40, "dropout": 0.1}], ids=["tied", "untied"])
def test_an_exported_model_comes_back_bit_for_bit(tokenizer, changes, tmp_path):
    model = gpt2(tokenizer, **changes)
    export_gpt2(model, tokenizer, tmp_path / "export")
    n_parameters = read_checkpoint(tmp_path / "export", tmp_path / "back")
    back = load_model(tmp_path / "back")
    assert back.config == model.config
    assert n_parameters == sum(parameter.numel() for parameter in model.parameters())
    for (name, parameter), (_, again) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(parameter, again), name
    tokenizer.save(tmp_path / "tokenizer.json")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "shards"),
    [({}, "1GB"), ({}, "4KB"), ({"tie_word_embeddings": False, "n_inner": 20}, "1GB")],
    ids=["tied", "shards", "untied"],
)
def test_a_model_from_transformers_is_imported_with_equal_ids_and_logits(changes, shards, tmp_path, save_foreign):
    theirs, their_tokenizer = save_foreign(tmp_path / "foreign", shards=shards, **changes)
    assert (tmp_path / "foreign" / "model.safetensors").exists() == (shards == "1GB")
    read_checkpoint(tmp_path / "foreign", tmp_path / "ours")
    ours, tokenizer = load_model(tmp_path / "ours"), Tokenizer.load(tmp_path / "ours" / "tokenizer.json")
    assert tokenizer.vocab_size == ours.config.vocab_size == 270 + 5  # 5 of our 6 special tokens are new; rows 270 to 299 were padding
    for text in TEXTS:
        assert tokenizer.encode(text) == their_tokenizer(text)["input_ids"], text
        assert tokenizer.decode(tokenizer.encode(text)) == text
        token_ids = torch.tensor([[0, *tokenizer.encode(text)]])  # <|endoftext|> first
        with torch.no_grad():
            torch.testing.assert_close(ours(token_ids)[..., :270], theirs(token_ids).logits[..., :270], rtol=1e-5, atol=1e-5)


def test_endoftext_becomes_document_and_new_special_tokens_get_the_mean_of_all_rows(tmp_path, save_foreign):
    theirs, _ = save_foreign(tmp_path / "foreign", tie_word_embeddings=False)
    read_checkpoint(tmp_path / "foreign", tmp_path / "ours")
    ours, tokenizer = load_model(tmp_path / "ours"), Tokenizer.load(tmp_path / "ours" / "tokenizer.json")
    assert tokenizer.special == {"document": 0, "user": 270, "assistant": 271, "system": 272, "end": 273, "pad": 274}
    assert 0 not in tokenizer.encode("a<|endoftext|>b")
    for rows, before in ((ours.token_embedding.weight, theirs.transformer.wte.weight), (ours.output.weight, theirs.lm_head.weight)):
        assert torch.equal(rows[:270], before[:270])
        torch.testing.assert_close(rows[270:], before[:270].mean(0).expand(5, -1))


def test_a_tokenizers_special_tokens_are_kept_and_its_other_added_tokens_become_ordinary_entries(tmp_path, save_foreign):
    save_foreign(tmp_path / "foreign", added=("<|endoftext|>", "<|user|>", "<|document|>", "[PAD] é"))
    tokenizer, known = read_gpt2((tmp_path / "foreign" / "tokenizer.json").read_text())
    assert known == 270
    assert tokenizer.special == {"user": 1, "document": 2, "assistant": 270, "system": 271, "end": 272, "pad": 273}
    assert tokenizer.decode([0, 3]) == "<|endoftext|>[PAD] é"
    assert not {0, 1, 2, 3} & set(tokenizer.encode("<|endoftext|><|user|><|document|>[PAD] é"))


def test_an_imported_tokenizer_of_262_ids_in_another_order_is_not_mistaken_for_bytes():
    # "!" is byte 33 and id 0 here: GPT-2's own order of the bytes.
    content = json.loads(byte_tokenizer()._definition)
    vocab = content["model"]["vocab"]
    vocab["!"], vocab["Ā"] = vocab["Ā"], vocab["!"]  # bytes 33 and 0
    tokenizer, known = read_gpt2(json.dumps(content))
    assert tokenizer.vocab_size == known == 262
    assert tokenizer.encode("a!") == [97, 0]
    assert tokenizer.encode_batch(["!\x00"]) == [[0, 33]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_without_prefix_and_with_old_masks_can_be_read(dtype, tmp_path, save_foreign):
    theirs, _ = save_foreign(tmp_path)

    def as_gpt2_model(weights):
        masks = {"h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool), "h.1.attn.masked_bias": torch.tensor(-1e4)}
        return {name.removeprefix("transformer."): weight.to(dtype) for name, weight in weights.items()} | masks

    edit_weights(tmp_path, as_gpt2_model)
    read_checkpoint(tmp_path, tmp_path / "ours")
    rounded = theirs.transformer.h[1].mlp.c_fc.weight.to(dtype).float()
    assert torch.equal(load_model(tmp_path / "ours").blocks[1].feed_forward.up.weight, rounded.T)


def test_all_settings_that_our_model_does_not_implement_are_listed_at_once(tmp_path, save_foreign):
    changes = {
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-6,
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "add_cross_attention": True,
        "n_positions": None,
    }
    save_foreign(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(changes))
    with pytest.raises(ValueError, match="does not implement") as raised:
        read_checkpoint(tmp_path, tmp_path / "ours")
    for name, value in changes.items():
        assert re.search(rf"expected {name} [^;]*, found {json.dumps(value)}", str(raised.value)), name
    assert 'expected activation_function = "gelu_new" or "gelu_pytorch_tanh", found "gelu"' in str(raised.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, 'expected model_type = "gpt2", found "llama"; no other'),
        ({"n_head": 3}, "n_embd = 8 is not a multiple of n_head = 3"),
        ({"n_inner": -1}, "n_hidden: .*greater than or equal to 1"),
        ({"n_layer": 1}, "5 more|transformer.h.1.* is unknown"),
        ({"n_inner": 7}, r"transformer.h.0.mlp.c_fc.bias: expected shape \(7,\), found \(32,\)"),
        ({"vocab_size": 269}, "expected at most 269 tokens in tokenizer.json, as many as the model has rows, found 270"),
    ],
)
def test_a_config_that_describes_something_else_is_refused(change, message, tmp_path, save_foreign):
    save_foreign(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(change))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path, tmp_path / "ours")


def test_settings_that_an_old_config_leaves_out_have_gpt2s_values(tmp_path, save_foreign):
    save_foreign(tmp_path)
    before = read_config(tmp_path)
    kept = {"model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head"}
    edit_json(tmp_path / "config.json", lambda config: [config.pop(name) for name in config.keys() - kept])
    assert read_config(tmp_path) == before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "transformer.ln_f.bias"}, "transformer.ln_f.bias is missing"),
        (lambda w: w | {"score.weight": torch.zeros(2, 8)}, "transformer.score.weight is unknown"),
        (lambda w: w | {"transformer.wpe.weight": torch.zeros(16, 8)}, r"wpe.weight: expected shape \(32, 8\), found \(16, 8\)"),
        (lambda w: w | {"transformer.ln_f.bias": torch.zeros(8, dtype=torch.int8)}, "ln_f.bias: expected float32, .*, found torch.int8"),
        (lambda w: w | {"lm_head.weight": torch.zeros(300, 8)}, "lm_head.weight differs from wte.weight"),
        (lambda w: w | {"wpe.weight": torch.zeros(32, 8)}, "found transformer.wpe.weight twice"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "tied", "twice"],
)
def test_weights_of_another_model_are_refused_and_named(edit, message, tmp_path, save_foreign):
    save_foreign(tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path, tmp_path / "ours")


def test_damaged_weights_are_refused(tmp_path, save_foreign):
    save_foreign(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read as safetensors"):
        read_checkpoint(tmp_path, tmp_path / "ours")


def merge_to_the_end(content: dict[str, Any]) -> None:
    content["model"]["vocab"] |= {"<|endof": 270, "text|>": 271}
    content["model"]["merges"].append(["<|endof", "text|>"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(normalizer={"type": "NFC"}), "expected no normalizer, found NFC"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "expected only ByteLevel as pre_tokenizer, found Whitespace"),
        (lambda c: c.update(pre_tokenizer=None), "expected only ByteLevel as pre_tokenizer, found none"),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space = false, found true"),
        (lambda c: c["pre_tokenizer"].update(use_regex=False), "use_regex = true, .*, found false"),
        (lambda c: c["model"].update(dropout=0.1), "expected no model.dropout, found 0.1"),
        (lambda c: c["model"].update(ignore_merges=True), "expected no model.ignore_merges, found true"),
        (lambda c: c["model"]["vocab"].update({"x x": 270}), "1 of its tokens are not spelled in bytes, such as 'x x'"),
        (lambda c: c["model"]["vocab"].update({"xx": 300}), "do not have the ids 0 to 270"),
        (lambda c: c["model"]["vocab"].update({"aa": c["model"]["vocab"].pop("Ā")}), "no token for 1 of the 256 bytes"),
        (lambda c: c["added_tokens"].append({**c["added_tokens"][0], "id": 270, "content": "\n"}), "spells the same text as token"),
        (merge_to_the_end, r"a merge leads to '<\|endoftext\|>'"),
        (
            lambda c: c.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
            "expected byte-level BPE like GPT-2's, found WordLevel",
        ),
        (lambda c: c.pop("model"), "cannot be read"),
    ],
)
def test_a_tokenizer_that_our_format_cannot_express_is_refused(edit, message, tmp_path, save_foreign):
    save_foreign(tmp_path)
    edit_json(tmp_path / "tokenizer.json", edit)
    with pytest.raises(ValueError, match=f"this tokenizer.json.*{message}"):
        read_checkpoint(tmp_path, tmp_path / "ours")


def test_the_files_of_a_checkpoint_are_its_config_weights_and_tokenizer(tmp_path, save_foreign):
    save_foreign(tmp_path / "whole")
    assert checkpoint_files(tmp_path / "whole") == ["config.json", "model.safetensors", "tokenizer.json"]
    save_foreign(tmp_path / "parts", shards="4KB")
    parts = [f"model-0000{part}-of-00004.safetensors" for part in (1, 2, 3, 4)]
    assert checkpoint_files(tmp_path / "parts") == ["config.json", "model.safetensors.index.json", *parts, "tokenizer.json"]
    (tmp_path / "parts" / parts[1]).unlink()
    (tmp_path / "parts" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"/{parts[1]} is missing; .*/tokenizer.json is missing"):
        checkpoint_files(tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors.index.json").write_text('{"weight_map": {"transformer.wte.weight": "../other.safetensors"}}')
    with pytest.raises(ValueError, match="no weight_map that names files beside it"):
        checkpoint_files(tmp_path / "parts")


def test_pickled_weights_and_a_tokenizer_in_two_files_are_refused_with_a_remedy(tmp_path):
    for name in ("pytorch_model.bin", "vocab.json", "merges.txt", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model.bin\).*safe_serialization=True.*only vocab.json; make one"):
        checkpoint_files(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"/config.json is missing; .*/model.safetensors is missing; .*/tokenizer.json is missing"):
        checkpoint_files(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"/nowhere is not a folder"):
        checkpoint_files(tmp_path / "nowhere")
