"""Export: a gpt2-* model as a folder that `transformers` opens as GPT2LMHeadModel, with equal logits and equal token ids.

Writes the files directly, so that it needs no transformers. Left out: other architectures, and import.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.model import GPT, load_model
from gpt.settings import GPTConfig
from gpt.tokenizer import Tokenizer, special_text

# In transformers' GPT-2, Conv1D keeps a linear layer's weight as (in, out).
_BLOCK = {
    "attention_norm": ("ln_1", False),
    "attention.qkv": ("attn.c_attn", True),
    "attention.project": ("attn.c_proj", True),
    "feed_forward_norm": ("ln_2", False),
    "feed_forward.up": ("mlp.c_fc", True),
    "feed_forward.down": ("mlp.c_proj", True),
}


def write_checkpoint(model_folder: Path, folder: Path) -> None:
    """`export_gpt2` of a model artifact's folder."""
    export_gpt2(load_model(model_folder), Tokenizer.load(model_folder / "tokenizer.json"), folder)


def export_gpt2(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
    from safetensors.torch import save_file

    _refuse_what_gpt2_is_not(model.config)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {model.config.vocab_size:,}; "
            "take the tokenizer.json that lies beside the model's weights"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(model), folder / "model.safetensors", {"format": "pt"})
    tokenizer.save(folder / "tokenizer.json")
    document, pad = tokenizer.special["document"], tokenizer.special["pad"]
    _write(folder / "config.json", _config(model.config, document, pad))
    _write(folder / "generation_config.json", {"bos_token_id": document, "eos_token_id": document, "pad_token_id": pad})
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.seq_len,
            "clean_up_tokenization_spaces": False,
            "bos_token": special_text("document"),
            "eos_token": special_text("document"),
            "pad_token": special_text("pad"),
            # A token that has a role is looked for in texts, unless this is set: ours never come from text.
            "split_special_tokens": True,
        },
    )


def _config(config: GPTConfig, document_id: int, pad_id: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.seq_len,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.hidden(),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tied,
        "bos_token_id": document_id,
        "eos_token_id": document_id,
        "pad_token_id": pad_id,
        "dtype": "float32",
    }


def _weights(model: GPT) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    theirs = {
        "transformer.wte.weight": ours["token_embedding.weight"],
        "transformer.wpe.weight": ours["position_embedding.weight"],
    }
    if not model.config.tied:
        theirs["lm_head.weight"] = ours["output.weight"]
    layers = {"final_norm": ("transformer.ln_f", False)}
    for number in range(model.config.n_layer):
        for name, (their_name, transposed) in _BLOCK.items():
            layers[f"blocks.{number}.{name}"] = (f"transformer.h.{number}.{their_name}", transposed)
    for name, (their_name, transposed) in layers.items():
        weight = ours[f"{name}.weight"]
        theirs[f"{their_name}.weight"] = weight.T if transposed else weight
        # Theirs always has biases: a model without them has zeros there.
        theirs[f"{their_name}.bias"] = ours.get(f"{name}.bias", torch.zeros(len(weight)))
    return {name: weight.to(torch.float32).contiguous() for name, weight in theirs.items()}


def _refuse_what_gpt2_is_not(config: GPTConfig) -> None:
    wanted = {"positions": "learned", "norm": "layernorm", "norm_first": True, "activation": "gelu"}
    found = {name: getattr(config, name) for name in wanted}
    differing = [f"{name} = {found[name]!r} (GPT-2: {wanted[name]!r})" for name in wanted if found[name] != wanted[name]]
    if config.kv_heads() != config.n_head:
        differing.append(f"n_kv_head = {config.n_kv_head} (GPT-2: as many as n_head = {config.n_head})")
    if differing:
        raise ValueError(f"this model is no GPT-2: {', '.join(differing)}; only gpt2-* presets can be exported to transformers")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
