from __future__ import annotations

import pytest
import torch

from gpt.hf import export_gpt2, write_checkpoint
from gpt.model import GPT, save_model
from gpt.settings import PRESETS, GPTConfig
from gpt.tokenizer import SPECIAL_NAMES, byte_tokenizer, special_text, train_bpe

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


@pytest.mark.parametrize(("tied", "bias"), [(True, True), (False, True), (True, False)])
def test_transformers_computes_the_same_logits(tied, bias, tmp_path):
    from transformers import AutoModelForCausalLM

    model = gpt2(BPE, tied=tied, bias=bias, n_hidden=40, dropout=0.1)
    save_model(tmp_path / "model", model.config, dict(model.named_parameters()))
    BPE.save(tmp_path / "model" / "tokenizer.json")
    write_checkpoint(tmp_path / "model", tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    token_ids = torch.randint(BPE.vocab_size, (2, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(token_ids).logits, model(token_ids), rtol=1e-5, atol=1e-5)
    assert theirs.generation_config.eos_token_id == BPE.special["document"]


@pytest.mark.parametrize("tokenizer", [BPE, byte_tokenizer()], ids=["bpe", "bytes"])
def test_transformers_gives_the_same_token_ids_also_for_text_that_spells_special_tokens(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    export_gpt2(gpt2(tokenizer), tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["the cat 's mat", "  明月\n几时 ", " , . !", "é\x00👩‍👩‍👧", *(f"a{special_text(name)} b" for name in SPECIAL_NAMES)]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text), text
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.special["document"]
    assert theirs.pad_token_id == tokenizer.special["pad"]


@pytest.mark.parametrize(("preset", "fault"), [("llama-nano", "positions = 'rope'"), ("transformer-nano", "norm_first = False")])
def test_other_architectures_are_refused_with_what_differs(preset, fault, tmp_path):
    model = GPT(GPTConfig(**PRESETS[preset].model_dump(), vocab_size=BPE.vocab_size))
    with pytest.raises(ValueError, match=f"{fault}.* only gpt2-"):
        export_gpt2(model, BPE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_not_the_model_s_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has 262 tokens, the model 3"):
        export_gpt2(gpt2(BPE), byte_tokenizer(), tmp_path)
