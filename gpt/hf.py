"""To and from `transformers`: a gpt2-* model as a folder that it opens as GPT2LMHeadModel, and such a folder as a model of ours.

Both ways with equal logits and equal token ids, and without transformers: the files are written and read directly. Left out: other
architectures. Which folders can be read says `gpt.hf_folder`.

An assistant's folder has a chat template, whose ids are those of `gpt.chat`. A template makes one string of a conversation, and what is
a token in a string is so for whoever wrote it. So there the special tokens have names that nobody types, MARK before our own:
a message that spells "<|end|>" stays text, as here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.chat import ROLES
from gpt.hf_folder import TOKENIZER, read_config, weight_files
from gpt.model import GPT, load_model, save_model
from gpt.settings import GPTConfig
from gpt.tokenizer import Tokenizer, read_gpt2, special_text

# In transformers' GPT-2, Conv1D keeps a linear layer's weight as (in, out).
_BLOCK = {
    "attention_norm": ("ln_1", False),
    "attention.qkv": ("attn.c_attn", True),
    "attention.project": ("attn.c_proj", True),
    "feed_forward_norm": ("ln_2", False),
    "feed_forward.up": ("mlp.c_fc", True),
    "feed_forward.down": ("mlp.c_proj", True),
}
MARK = "\ufdd0"
"""A noncharacter, which Unicode keeps for a program's inner use and out of texts that are interchanged (chapter 23.7)."""
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

    Of a model that speaks in turns (`chat`) also chat_template.jinja; what it generates then ends with <|end|>.
    """
    from safetensors.torch import save_file

    _refuse_what_gpt2_is_not(model.config)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {model.config.vocab_size:,}; "
            "take the tokenizer.json that lies beside the model's weights"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(model), folder / "model.safetensors", {"format": "pt"})
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
            # A token that has a role is looked for in texts, unless this is set: ours never come from text.
            "split_special_tokens": not chat,
        },
    )


def _marked(definition: str, tokenizer: Tokenizer) -> str:
    """A tokenizer.json that knows our special tokens where MARK stands before their names, and shows them without it."""
    content = json.loads(definition)
    names = {special_text(name): token_id for name, token_id in tokenizer.special.items()}
    content["model"]["vocab"] = {MARK + text if text in names else text: token_id for text, token_id in content["model"]["vocab"].items()}
    as_it_stands = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [
        {"id": token_id, "content": MARK + text, **as_it_stands} for text, token_id in sorted(names.items(), key=lambda item: item[1])
    ]
    shown = {"type": "Replace", "pattern": {"String": MARK + "<|"}, "content": "<|"}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], shown]}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def read_tokenizer(definition: str) -> tuple[Tokenizer, int]:
    """`read_gpt2` of a tokenizer.json which may be that of an assistant of ours."""
    return read_gpt2(definition.replace(MARK + "<|", "<|"))


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
    """Write model.safetensors (fp32), config.json and tokenizer.json of ours to `output`; the number of parameters.

    Ordinary tokens keep their ids and rows, and <|endoftext|>'s become those of <|document|> (`read_gpt2`). Rows beyond the tokenizer's
    ids, as padded vocabularies have them, are dropped; each special token that is new has the mean of all rows. ValueError says what
    can't be read or can't be ours.
    """
    config = read_config(folder)
    tokenizer, known = read_tokenizer((folder / TOKENIZER).read_text(encoding="utf-8"))
    if known > config.vocab_size:
        raise ValueError(f"{TOKENIZER} has {known:,} tokens, the model rows for {config.vocab_size:,}; take both from one checkpoint")
    weights = _read_weights(folder, config)
    for name in weights.keys() & {"token_embedding.weight", "output.weight"}:
        rows = weights[name][:known]  # (V, C)
        mean = rows.mean(dim=0, keepdim=True, dtype=torch.float64).to(rows.dtype)
        weights[name] = torch.cat([rows, mean.expand(tokenizer.vocab_size - known, -1)])
    save_model(output, config.model_copy(update={"vocab_size": tokenizer.vocab_size}), weights)
    tokenizer.save(output / TOKENIZER)
    return sum(weight.numel() for weight in weights.values())


def _read_weights(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """In fp32 and by our names; ValueError lists what is missing, unknown or of another shape, by theirs."""
    found = _their_weights(folder)
    faults: list[str] = []
    if config.tied and "lm_head.weight" in found:
        output = found.pop("lm_head.weight")
        if not torch.equal(output, found.get("transformer.wte.weight", output)):
            faults.append("lm_head.weight differs from wte.weight, though config.json ties them (tie_word_embeddings)")
    names = _names(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}
    wanted = {theirs: shapes[ours][::-1] if transposed else shapes[ours] for ours, (theirs, transposed) in names.items()}
    faults += [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is unknown" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        if tuple(found[name].shape) != wanted[name]:
            faults.append(f"{name} is of shape {tuple(found[name].shape)}, wanted {wanted[name]}")
        if found[name].dtype not in (torch.float32, torch.float16, torch.bfloat16):
            faults.append(f"{name} is {found[name].dtype}, wanted float32, float16 or bfloat16")
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"the weights are not those of the GPT-2 that config.json describes: {'; '.join(sorted(faults)[:5])}{more}")
    return {
        ours: (found[theirs].T if transposed else found[theirs]).to(torch.float32).contiguous()
        for ours, (theirs, transposed) in names.items()
    }


def _their_weights(folder: Path) -> dict[str, Tensor]:
    """As they are on disk, named as in GPT2LMHeadModel; without the masks."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        if not file.endswith(".safetensors"):
            continue
        try:
            part = load_file(folder / file)
        except SafetensorError as error:
            raise ValueError(f"{file} can't be read as safetensors: {error}") from error
        for name, weight in part.items():
            # A GPT2Model that was saved without its head names its weights without the prefix.
            full_name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            if full_name in found:
                raise ValueError(f"{full_name} is there twice, the second time in {file}")
            if not _MASK.fullmatch(full_name):
                found[full_name] = weight
    return found


def _names(config: GPTConfig) -> dict[str, tuple[str, bool]]:
    """Our parameters' names to theirs, biases included, and whether theirs lies transposed."""
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
        else:  # theirs always has biases: a model without them has zeros there
            weight = torch.zeros(len(ours[name.removesuffix("bias") + "weight"]))
        theirs[their_name] = weight.to(torch.float32).contiguous()
    return theirs


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
