"""Export a gpt2-* model as a folder that `transformers` opens as GPT2LMHeadModel, and import such a folder as a model of ours.

Logits and token ids are equal both ways. Files are written and read directly, without transformers. Left out: other architectures.
`gpt.hf_folder` checks which folders can be read and which models can be exported.

An assistant's folder has a chat template that yields the ids of `gpt.chat`. A template renders a conversation as one string, and in a
string anyone can spell a special token. There the special tokens therefore have names that nobody types, with MARK before ours, so that a
message that spells "<|end|>" stays text, as it does here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.chat import ROLES
from gpt.hf_folder import TOKENIZER, check_exportable, read_config, weight_files
from gpt.model import GPT, load_model, save_model, save_tensors
from gpt.settings import GPTConfig
from gpt.tokenizer import Tokenizer, read_gpt2, special_text

# transformers' GPT-2 uses Conv1D, which stores a linear layer's weight as (in, out).
_BLOCK = {
    "attention_norm": ("ln_1", False),
    "attention.qkv": ("attn.c_attn", True),
    "attention.project": ("attn.c_proj", True),
    "feed_forward_norm": ("ln_2", False),
    "feed_forward.up": ("mlp.c_fc", True),
    "feed_forward.down": ("mlp.c_proj", True),
}
MARK = "\ufdd0"
"""A noncharacter, which Unicode reserves for use inside a program and keeps out of interchanged text (chapter 23.7)."""
CHAT_TEMPLATE = """\
{#- U+FDD0 makes a token of the name that follows: "<|end|>" alone is text, also in a message. -#}
{%- for message in messages %}
    {%- if message.role not in ROLES %}
        {{- raise_exception("role '" + message.role + "' is unknown; wanted " + ROLES | join(", ")) }}
    {%- endif %}
    {%- if "\\ufdd0<|" in message.content %}
        {{- raise_exception("a message holds U+FDD0 before <|, which stands for special tokens here; leave that character out") }}
    {%- endif %}
    {{- "\\ufdd0<|" + message.role + "|>" + message.content + "\\ufdd0<|end|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "\\ufdd0<|assistant|>" }}
{%- endif %}
""".replace("ROLES", json.dumps(ROLES))
_MASK = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
"""The causal mask, which older versions saved with the weights."""


def write_checkpoint(model_folder: Path, folder: Path, *, chat: bool = False) -> None:
    """`export_gpt2` of a model artifact's folder."""
    export_gpt2(load_model(model_folder), Tokenizer.load(model_folder / TOKENIZER), folder, chat=chat)


def export_gpt2(model: GPT, tokenizer: Tokenizer, folder: Path, *, chat: bool = False) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    With `chat`, for a model that speaks in turns, also chat_template.jinja; its generated text then ends at <|end|>.
    """
    check_exportable(model.config)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"expected a tokenizer of {model.config.vocab_size:,} tokens, as the model has, found {tokenizer.vocab_size:,}; "
            "use the tokenizer.json beside the model's weights"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", _weights(model))
    document, end, pad = (tokenizer.special[name] for name in ("document", "end", "pad"))
    _write(folder / "config.json", _config(model.config, document, end if chat else document, pad))
    ends = [end, document] if chat else document
    _write(folder / "generation_config.json", {"bos_token_id": document, "eos_token_id": ends, "pad_token_id": pad})
    tokenizer.save(folder / TOKENIZER)
    if chat:
        (folder / TOKENIZER).write_text(_marked((folder / TOKENIZER).read_text(encoding="utf-8"), tokenizer), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    mark = MARK if chat else ""
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.seq_len,
            "clean_up_tokenization_spaces": False,
            "bos_token": mark + special_text("document"),
            "eos_token": mark + special_text("end" if chat else "document"),
            "pad_token": mark + special_text("pad"),
            # Without this, transformers looks for the tokens above in text; ours never come from text.
            "split_special_tokens": not chat,
        },
    )


def _marked(definition: str, tokenizer: Tokenizer) -> str:
    """A tokenizer.json that reads our special tokens with MARK before their names, and decodes them without it."""
    content = json.loads(definition)
    names = {special_text(name): token_id for name, token_id in tokenizer.special.items()}
    content["model"]["vocab"] = {MARK + text if text in names else text: token_id for text, token_id in content["model"]["vocab"].items()}
    exact = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [
        {"id": token_id, "content": MARK + text, **exact} for text, token_id in sorted(names.items(), key=lambda item: item[1])
    ]
    unmark = {"type": "Replace", "pattern": {"String": MARK + "<|"}, "content": "<|"}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], unmark]}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def read_tokenizer(definition: str) -> tuple[Tokenizer, int]:
    """Apply `read_gpt2` to a tokenizer.json that may come from an exported assistant."""
    return read_gpt2(definition.replace(MARK + "<|", "<|"))


def is_assistant(folder: Path) -> bool:
    """Whether the folder is an assistant that `export_gpt2` wrote: only there do special tokens have marked names."""
    return MARK + special_text("end") in json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))["model"]["vocab"]


def _config(config: GPTConfig, begin_id: int, end_id: int, pad_id: int) -> dict[str, Any]:
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
        "bos_token_id": begin_id,
        "eos_token_id": end_id,
        "pad_token_id": pad_id,
        "dtype": "float32",
    }


def read_checkpoint(folder: Path, output: Path) -> int:
    """Write our model.safetensors (fp32), config.json and tokenizer.json to `output`, and return the number of parameters.

    Ordinary tokens keep their ids and rows, and those of <|endoftext|> become <|document|>'s (`read_gpt2`). Rows beyond the tokenizer's
    ids, as in padded vocabularies, are dropped; each new special token gets the mean of all rows. ValueError says what cannot be read or
    is not implemented.
    """
    config = read_config(folder)
    tokenizer, known = read_tokenizer((folder / TOKENIZER).read_text(encoding="utf-8"))
    if known > config.vocab_size:
        raise ValueError(
            f"expected at most {config.vocab_size:,} tokens in {TOKENIZER}, as many as the model has rows, found {known:,}; "
            "take both from one checkpoint"
        )
    weights = _read_weights(folder, config)
    for name in weights.keys() & {"token_embedding.weight", "output.weight"}:
        rows = weights[name][:known]  # (V, C)
        mean = rows.mean(dim=0, keepdim=True, dtype=torch.float64).to(rows.dtype)
        weights[name] = torch.cat([rows, mean.expand(tokenizer.vocab_size - known, -1)])
    save_model(output, config.model_copy(update={"vocab_size": tokenizer.vocab_size}), weights)
    tokenizer.save(output / TOKENIZER)
    return sum(weight.numel() for weight in weights.values())


def _read_weights(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """Read the weights in fp32 under our names; ValueError lists what is missing, unknown or of another shape, under theirs."""
    found = _their_weights(folder)
    problems: list[str] = []
    if config.tied and "lm_head.weight" in found:
        output = found.pop("lm_head.weight")
        if not torch.equal(output, found.get("transformer.wte.weight", output)):
            problems.append("lm_head.weight differs from wte.weight, although config.json ties them (tie_word_embeddings)")
    names = _names(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}
    expected = {theirs: shapes[ours][::-1] if transposed else shapes[ours] for ours, (theirs, transposed) in names.items()}
    problems += [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if tuple(found[name].shape) != expected[name]:
            problems.append(f"{name}: expected shape {expected[name]}, found {tuple(found[name].shape)}")
        if found[name].dtype not in (torch.float32, torch.float16, torch.bfloat16):
            problems.append(f"{name}: expected float32, float16 or bfloat16, found {found[name].dtype}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the weights do not match the GPT-2 that config.json describes: {'; '.join(sorted(problems)[:5])}{more}")
    return {
        ours: (found[theirs].T if transposed else found[theirs]).to(torch.float32).contiguous()
        for ours, (theirs, transposed) in names.items()
    }


def _their_weights(folder: Path) -> dict[str, Tensor]:
    """The weights as stored, named as in GPT2LMHeadModel, without the masks."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        if not file.endswith(".safetensors"):
            continue
        try:
            part = load_file(folder / file)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
        for name, weight in part.items():
            # A GPT2Model that was saved without its head names its weights without the prefix.
            full_name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            if full_name in found:
                raise ValueError(f"found {full_name} twice, the second time in {file}")
            if not _MASK.fullmatch(full_name):
                found[full_name] = weight
    return found


def _names(config: GPTConfig) -> dict[str, tuple[str, bool]]:
    """Map our parameters' names, biases included, to theirs and to whether theirs is stored transposed."""
    names = {"token_embedding.weight": ("transformer.wte.weight", False), "position_embedding.weight": ("transformer.wpe.weight", False)}
    if not config.tied:
        names["output.weight"] = ("lm_head.weight", False)
    layers = {"final_norm": ("transformer.ln_f", False)}
    for number in range(config.n_layer):
        for name, (their_name, transposed) in _BLOCK.items():
            layers[f"blocks.{number}.{name}"] = (f"transformer.h.{number}.{their_name}", transposed)
    for name, (their_name, transposed) in layers.items():
        names[f"{name}.weight"] = (f"{their_name}.weight", transposed)
        names[f"{name}.bias"] = (f"{their_name}.bias", False)
    return names


def _weights(model: GPT) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    theirs = {}
    for name, (their_name, transposed) in _names(model.config).items():
        if name in ours:
            weight = ours[name].T if transposed else ours[name]
        else:  # theirs always has biases; for a model without them they are zeros
            weight = torch.zeros(len(ours[name.removesuffix("bias") + "weight"]))
        theirs[their_name] = weight.to(torch.float32).contiguous()
    return theirs


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
