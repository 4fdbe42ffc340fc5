"""A `transformers` folder of a GPT-2, before its weights are read: which files make it, and which GPTConfig it means.

No torch: `gptline plan` reads this much. Left out: vocab.json and merges.txt without a tokenizer.json, pickled weights, and what
tokenizer_config.json says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt.settings import GPTConfig

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_positions": "seq_len", "vocab_size": "vocab_size"}
"""Their names to ours."""
HELD: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
"""Settings that change the maths, and the values that our model holds; first what transformers takes where none is given."""


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the files that make the model: settings, weights (with their index where they are in parts), tokenizer.

    ValueError lists all that is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    names, faults = [CONFIG], []
    for find in (weight_files, tokenizer_files):
        try:
            names += find(folder)
        except ValueError as error:
            faults.append(str(error))
    faults = [f"there is no {folder / name}" for name in names if not (folder / name).is_file()] + faults
    if faults:
        raise ValueError("; ".join(faults))
    return names


def weight_files(folder: Path) -> list[str]:
    """`model.safetensors`, or the index and the parts that it names."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        parts = _read_json(folder / INDEX).get("weight_map")
        if not (isinstance(parts, dict) and parts and all(isinstance(name, str) and Path(name).name == name for name in parts.values())):
            raise ValueError(f"{folder / INDEX} has no weight_map that names files beside it")
        return [INDEX, *sorted(set(parts.values()))]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ValueError(
            f"the weights in {folder} are pickled ({pickled[0]}), and a pickle runs code when it is opened; where you trust it, convert it "
            "with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)"
        )
    raise ValueError(f"there is no {folder / WEIGHTS}")


def tokenizer_files(folder: Path) -> list[str]:
    """`tokenizer.json` alone; ValueError says how to come by one."""
    if (folder / TOKENIZER).is_file():
        return [TOKENIZER]
    if (folder / "vocab.json").is_file():
        raise ValueError(
            f"there is no {folder / TOKENIZER}, only vocab.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)"
        )
    raise ValueError(f"there is no {folder / TOKENIZER}")


def read_config(folder: Path) -> GPTConfig:
    """What config.json means in our words, `vocab_size` as it is there; ValueError lists all that our model does otherwise.

    `dropout` is their resid_pdrop: who trains further sets his own.
    """
    content = _read_json(folder / CONFIG)
    if content.get("model_type") != "gpt2":
        raise ValueError(f"{folder / CONFIG} has model_type = {json.dumps(content.get('model_type'))}; only gpt2 can be imported")
    faults = [
        f"{name} = {json.dumps(content[name])} (wanted {' or '.join(map(json.dumps, held))})"
        for name, held in HELD.items()
        if name in content and content[name] not in held
    ]
    sizes: dict[str, Any] = {ours: content.get(theirs) for theirs, ours in SIZES.items()}
    for theirs, ours in SIZES.items():
        if not (isinstance(sizes[ours], int) and sizes[ours] > 0):
            faults.append(f"{theirs} = {json.dumps(sizes[ours])} (wanted a whole number above 0)")
    n_inner = content.get("n_inner")
    try:
        if not faults:
            return GPTConfig(
                **sizes,
                # None is how a stage that trains further asks for the usual width
                n_hidden=None if n_inner == 4 * content["n_embd"] else n_inner,
                dropout=content.get("resid_pdrop", 0.1),
                tied=content.get("tie_word_embeddings", True),
            )
    except ValidationError as error:
        faults += [": ".join([*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")]) for each in error.errors()]
    raise ValueError(f"{folder / CONFIG} describes a GPT-2 that our model can't be: {'; '.join(faults)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content
