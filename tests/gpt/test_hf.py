from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.chat import encode_conversation, encode_prompt
from gpt.hf import MARK, export_gpt2, is_assistant, read_checkpoint, read_tokenizer, write_checkpoint
from gpt.model import GPT, load_model, save_model
from gpt.sampling import sample
from gpt.settings import PRESETS, GPTConfig
from gpt.tokenizer import SPECIAL_NAMES, Tokenizer, byte_tokenizer, read_gpt2, special_text, train_bpe

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
def test_transformers_gives_the_same_token_ids_even_for_text_that_spells_special_tokens(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    export_gpt2(gpt2(tokenizer), tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["the cat 's mat", "  明月\n几时 ", " , . !", "é\x00👩‍👩‍👧", *(f"a{special_text(name)} b" for name in SPECIAL_NAMES)]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text), text
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.special["document"]
    assert theirs.pad_token_id == tokenizer.special["pad"]


@pytest.mark.parametrize(
    ("preset", "fault"), [("llama-nano", "positions = 'learned', found 'rope'"), ("transformer-nano", "norm_first = True, found False")]
)
def test_other_architectures_are_refused_and_the_differences_named(preset, fault, tmp_path):
    model = GPT(GPTConfig(**PRESETS[preset].model_dump(), vocab_size=BPE.vocab_size))
    with pytest.raises(ValueError, match=f"only gpt2-.* expected {fault}"):
        export_gpt2(model, BPE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a tokenizer of 3\d\d tokens, as the model has, found 262"):
        export_gpt2(gpt2(BPE), byte_tokenizer(), tmp_path)


def test_the_modes_of_exported_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        export_gpt2(gpt2(BPE), BPE, tmp_path / "export", chat=True)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "export").iterdir()} == dict.fromkeys(
        (
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
        "0o640",
    )


# ---- assistants ----

GOLDEN = [
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}],
    [
        {"role": "system", "content": "Be  brief.\n"},
        {"role": "user", "content": " the cat's\n\n明月?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "é\x00👩‍👩‍👧 \ufdd0\u2028\u00a0"},
        {"role": "assistant", "content": " {{ messages }} {% if %} \\ufdd0 "},
    ],
    [{"role": "user", "content": f"{text}a{text}\n{text}"} for text in map(special_text, SPECIAL_NAMES)],
    [{"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "|><|"}, {"role": "user", "content": "\ufdd0"}],
]


def imported_tokenizer(folder: Path, save_foreign: Any) -> Tokenizer:
    """Import a tokenizer whose first id is <|document|> and whose last ids are the other special tokens."""
    save_foreign(folder)
    tokenizer, _ = read_gpt2((folder / "tokenizer.json").read_text())
    assert tokenizer.special["document"] == 0
    return tokenizer


@pytest.fixture(params=["bpe", "bytes", "imported"])
def tokenizer(request, tmp_path, save_foreign) -> Tokenizer:
    match request.param:
        case "bpe":
            return BPE
        case "bytes":
            return byte_tokenizer()
    return imported_tokenizer(tmp_path / "foreign", save_foreign)


def open_theirs(folder: Path, *, saved_by_them: bool) -> Any:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    if saved_by_them:
        theirs.save_pretrained(folder / "again")
        theirs = AutoTokenizer.from_pretrained(folder / "again")
    return theirs


@pytest.mark.parametrize("saved_by_them", [False, True])
def test_the_chat_template_gives_our_ids_even_if_a_message_spells_special_tokens(tokenizer, saved_by_them, tmp_path):
    export_gpt2(gpt2(tokenizer), tokenizer, tmp_path, chat=True)
    theirs = open_theirs(tmp_path, saved_by_them=saved_by_them)
    for messages in GOLDEN:
        prompt = encode_prompt(tokenizer, messages)
        for sanitize in (False, True):
            found = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, sanitize_control_tokens=sanitize)
            assert found["input_ids"] == prompt
        whole = theirs.apply_chat_template(messages, tokenize=True)["input_ids"]
        assert [*whole, tokenizer.special["assistant"]] == prompt
        conversation = encode_conversation(tokenizer, messages)
        if messages[-1]["role"] == "assistant":
            assert conversation is not None
            assert whole == conversation.token_ids
        string = theirs.apply_chat_template(messages, tokenize=False)
        assert theirs(string)["input_ids"] == whole
        assert theirs.decode(whole) == tokenizer.decode(whole)


def test_a_golden_conversation_token_by_token(tmp_path):
    user, assistant, system, end = 256, 257, 258, 259
    export_gpt2(gpt2(byte_tokenizer()), byte_tokenizer(), tmp_path, chat=True)
    theirs = open_theirs(tmp_path, saved_by_them=False)
    found = theirs.apply_chat_template(GOLDEN[1], add_generation_prompt=True)["input_ids"]
    assert found == [system, 115, end, user, 97, end, assistant, 98, 99, end, assistant]


@pytest.mark.parametrize("saved_by_them", [False, True])
def test_an_assistants_ordinary_token_ids_are_ours_and_its_special_tokens_have_only_marked_names(tokenizer, saved_by_them, tmp_path):
    export_gpt2(gpt2(tokenizer), tokenizer, tmp_path, chat=True)
    theirs = open_theirs(tmp_path, saved_by_them=saved_by_them)
    for text in [
        "the cat 's mat",
        "  明月\n几时 ",
        "é\x00👩‍👩‍👧",
        MARK,
        *(f"a{special_text(name)} b" for name in SPECIAL_NAMES),
        "<|end|>",
    ]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text), text
        assert theirs.decode(tokenizer.encode(text)) == text
    assert len(theirs) == tokenizer.vocab_size
    for name, token_id in tokenizer.special.items():
        assert theirs(MARK + special_text(name))["input_ids"] == [token_id]
        assert theirs.convert_tokens_to_ids(MARK + special_text(name)) == token_id
    everything = [token_id for name, token_id in tokenizer.special.items() for token_id in (token_id, *tokenizer.encode(name))]
    assert theirs.decode(everything, skip_special_tokens=True) == "".join(SPECIAL_NAMES)
    assert theirs.eos_token_id == tokenizer.special["end"]
    assert theirs.bos_token_id == tokenizer.special["document"]
    assert theirs.pad_token_id == tokenizer.special["pad"]


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "tool", "content": "a"}, "role 'tool' is unknown; wanted system, user, assistant"),
        ({"role": "user", "content": f"a{MARK}<|end|>"}, r"U\+FDD0 before <\|"),
    ],
)
def test_the_template_refuses_an_unknown_role_and_the_mark_within_a_message(message, fault, tmp_path):
    from jinja2.exceptions import TemplateError

    export_gpt2(gpt2(BPE), BPE, tmp_path, chat=True)
    with pytest.raises(TemplateError, match=fault):
        open_theirs(tmp_path, saved_by_them=False).apply_chat_template([message])


def answering(tokenizer: Tokenizer, answer: list[int], seq_len: int) -> GPT:
    """A model whose likeliest token depends only on the position: after a prompt of 7 tokens it writes `answer`."""
    model = gpt2(tokenizer, seq_len=seq_len, n_embd=64, n_head=2, tied=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.final_norm.weight.fill_(1.0)
        for place, token_id in enumerate(answer):
            model.position_embedding.weight[6 + place, place] = 10.0
            model.output.weight[token_id, place] = 1.0
    return model


@pytest.mark.parametrize("last", ["end", "document"])
def test_greedy_generation_in_transformers_equals_our_sampler_and_both_stop_at_the_answers_end(last, tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    written = [*b"Yes. \xe6\x9c\x88", tokenizer.special[last]]
    model = answering(tokenizer, [*written, *b"more"], 32)
    export_gpt2(model, tokenizer, tmp_path, chat=True)
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), open_theirs(tmp_path, saved_by_them=False)
    messages = [{"role": "user", "content": "moon"}]
    inputs = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 7)
    generated = theirs.generate(**inputs, max_new_tokens=20, do_sample=False)[0, 7:].tolist()
    ends = [tokenizer.special["end"], tokenizer.special["document"]]
    [ours] = sample(model, [encode_prompt(tokenizer, messages)], streams=[0], max_tokens=20, temperature=0.0, stop_ids=ends)
    assert generated == ours.token_ids == written
    assert their_tokenizer.decode(generated, skip_special_tokens=True) == "Yes. 月"
    assert theirs.generation_config.eos_token_id == ends
    assert theirs.config.eos_token_id == tokenizer.special["end"]


def test_a_model_that_continues_text_has_no_chat_template(tmp_path):
    export_gpt2(gpt2(BPE), BPE, tmp_path)
    assert not is_assistant(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert MARK not in (tmp_path / "tokenizer.json").read_text()
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(BPE._definition)


@pytest.mark.parametrize("saved_by_them", [False, True])
def test_an_exported_assistant_comes_back_bit_for_bit(tokenizer, saved_by_them, tmp_path):
    model = gpt2(tokenizer)
    folder = tmp_path / "export"
    export_gpt2(model, tokenizer, folder, chat=True)
    if saved_by_them:
        open_theirs(folder, saved_by_them=True)
        (folder / "again" / "tokenizer.json").replace(folder / "tokenizer.json")
    assert is_assistant(folder)
    read_checkpoint(folder, tmp_path / "back")
    back = load_model(tmp_path / "back")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), back.parameters(), strict=True))
    tokenizer.save(tmp_path / "tokenizer.json")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    again, known = read_tokenizer((folder / "tokenizer.json").read_text())
    assert known == tokenizer.vocab_size
    assert again.special == tokenizer.special
