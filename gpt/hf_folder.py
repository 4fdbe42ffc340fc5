"""A `transformers` folder of a GPT-2 without its weights: which files it consists of, and which GPTConfig it describes.

No torch, since `gptline plan` reads this much. Left out: vocab.json and merges.txt without a tokenizer.json, pickled weights, and
tokenizer_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt.settings import GPTConfig, ModelShape

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_positions": "seq_len", "vocab_size": "vocab_size"}
"""Names in transformers to ours."""
IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
"""Settings that change the maths, with the values that our model implements; the first is the default of transformers."""


def checkpoint_files(folder: Path) -> list[str]:
    """List the files that make up the model: settings, weights (with their index if they are sharded), tokenizer.

    ValueError lists everything that is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    names, problems = [CONFIG], []
    for find in (weight_files, tokenizer_files):
        try:
            names += find(folder)
        except ValueError as error:
            problems.append(str(error))
    problems = [f"{folder / name} is missing" for name in names if not (folder / name).is_file()] + problems
    if problems:
        raise ValueError("; ".join(problems))
    return names


def weight_files(folder: Path) -> list[str]:
    """`model.safetensors`, or the index and the shards that it names."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        shards = _read_json(folder / INDEX).get("weight_map")
        if not (isinstance(shards, dict) and shards and all(isinstance(name, str) and Path(name).name == name for name in shards.values())):
            raise ValueError(f"{folder / INDEX} has no weight_map that names files beside it")
        return [INDEX, *sorted(set(shards.values()))]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ValueError(
            f"the weights in {folder} are pickled ({pickled[0]}), and opening a pickle runs code; if you trust it, convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)"
        )
    raise ValueError(f"{folder / WEIGHTS} is missing")


def tokenizer_files(folder: Path) -> list[str]:
    """Only `tokenizer.json`; ValueError says how to make one."""
    if (folder / TOKENIZER).is_file():
        return [TOKENIZER]
    if (folder / "vocab.json").is_file():
        raise ValueError(
            f"{folder / TOKENIZER} is missing, found only vocab.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)"
        )
    raise ValueError(f"{folder / TOKENIZER} is missing")


def read_config(folder: Path) -> GPTConfig:
    """Translate config.json into a GPTConfig with the same `vocab_size`; ValueError lists everything that our model does differently.

    `dropout` becomes its resid_pdrop; a stage that trains further sets its own.
    """
    content = _read_json(folder / CONFIG)
    if content.get("model_type") != "gpt2":
        raise ValueError(
            f'{folder / CONFIG}: expected model_type = "gpt2", found {json.dumps(content.get("model_type"))}; no other can be imported'
        )
    problems = [
        f"expected {name} = {' or '.join(map(json.dumps, implemented))}, found {json.dumps(content[name])}"
        for name, implemented in IMPLEMENTED.items()
        if name in content and content[name] not in implemented
    ]
    sizes: dict[str, Any] = {ours: content.get(theirs) for theirs, ours in SIZES.items()}
    for theirs, ours in SIZES.items():
        if not (isinstance(sizes[ours], int) and sizes[ours] > 0):
            problems.append(f"expected {theirs} to be a whole number above 0, found {json.dumps(sizes[ours])}")
    n_inner = content.get("n_inner")
    try:
        if not problems:
            return GPTConfig(
                **sizes,
                # None, as in our presets: a stage that trains further compares shapes
                n_hidden=None if n_inner == 4 * content["n_embd"] else n_inner,
                dropout=content.get("resid_pdrop", 0.1),
                tied=content.get("tie_word_embeddings", True),
            )
    except ValidationError as error:
        problems += [": ".join([*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")]) for each in error.errors()]
    raise ValueError(f"{folder / CONFIG} describes a GPT-2 that our model does not implement: {'; '.join(problems)}")


def check_exportable(shape: ModelShape) -> None:
    """Raise ValueError if `transformers` cannot open such a model as a GPT-2. It needs no weights, so it can run before training."""
    expected = {"positions": "learned", "norm": "layernorm", "norm_first": True, "activation": "gelu", "n_kv_head": shape.n_head}
    found = {**{name: getattr(shape, name) for name in expected}, "n_kv_head": shape.kv_heads()}
    differing = [f"{name} = {expected[name]!r}, found {found[name]!r}" for name in expected if found[name] != expected[name]]
    if differing:
        raise ValueError(f"only gpt2-* presets can be exported to transformers: expected {'; expected '.join(differing)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content
