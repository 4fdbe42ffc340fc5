"""One decoder for the whole field, from the 2017 paper's layers to Llama's, chosen by `GPTConfig`; and its file on disk.

Shape letters of `gpt/`: B batch, T time, C n_embd, H heads, K key and value heads, D head_dim, V vocab.

Left out: encoder and cross-attention, mixtures of experts, sliding windows, masks between the documents of one window.
Vaswani et al. 2017 (arXiv:1706.03762), Radford et al. 2019 (GPT-2), Su et al. 2021 (rotary positions, arXiv:2104.09864),
Shazeer 2020 (SwiGLU, arXiv:2002.05202), Ainslie et al. 2023 (grouped queries, arXiv:2305.13245).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt.settings import GPTConfig, ModelShape

INIT_STD = 0.02

M = TypeVar("M", bound="GPT")


class GPT(nn.Module):
    """`GPT(config, generator)(token_ids)` maps (B, T) to logits (B, T, V).

    Without a `generator` the weights are uninitialised memory, for a caller that fills them in at once.
    """

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.token_embedding = _empty(nn.Embedding, config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.position_embedding = _empty(nn.Embedding, config.seq_len, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = _norm(config) if config.norm_first else nn.Identity()
        # A separate module even when tied, since ZeRO-3 gathers a module's weights only when that module is called.
        self.output = _empty(nn.Linear, config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.token_embedding.weight
        if generator is not None:
            self._initialise(generator)

    def forward(self, token_ids: Tensor, cache: Cache | None = None) -> Tensor:
        return self.output(self.hidden_states(token_ids, cache))  # (B, T, V)

    def hidden_states(self, token_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) -> (B, T, C), the output layer's input. With a cache, `token_ids` continue the tokens that its rows hold."""
        n_new = token_ids.shape[1]
        n_before = 0 if cache is None else cache.longest()
        if n_before + n_new > self.config.seq_len:
            raise ValueError(
                f"expected at most seq_len = {self.config.seq_len} tokens, found {n_before + n_new}; "
                "pass only the last ones, or train with a longer seq_len"
            )
        if cache is None:
            positions = torch.arange(n_new, device=token_ids.device)[None]  # (1, T)
        else:
            positions = cache.begin(n_new)  # (B, T)
        x = self.token_embedding(token_ids)  # (B, T, C)
        rotation = None
        match self.config.positions:
            case "learned":
                x = x + self.position_embedding(positions)
            case "sinusoidal":
                # The paper scales the embedding so that the positions don't dominate it (section 3.4).
                x = x * math.sqrt(self.config.n_embd) + sinusoids(positions, self.config.n_embd).to(x.dtype)
            case "rope":
                rotation = rotary_angles(positions, self.config.head_dim())
        x = self.dropout(x)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rotation, cache, use_reentrant=False)
            else:
                x = block(x, rotation, cache)
        return self.final_norm(x)

    def _initialise(self, generator: torch.Generator) -> None:
        """Initialise as GPT-2 does: normal, with layers that add to the residual stream scaled by 1/sqrt(number of additions)."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                into_residual = name.endswith(("attention.project.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=residual_std if into_residual else INIT_STD, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)


class RewardModel(GPT):
    """The same trunk with a score instead of the vocabulary: (B, T) -> raw scores (B, T), whose unit training determines.

    A conversation's score is read at its end token. A value model is of this class too, and is read at every token.
    """

    def __init__(self, config: GPTConfig) -> None:
        """Leave the weights uninitialised; `from_policy` and `load_reward_model` fill them in."""
        super().__init__(config)
        self.output = _empty(nn.Linear, config.n_embd, 1)

    @classmethod
    def from_policy(cls, policy: GPT, generator: torch.Generator) -> RewardModel:
        """Combine a policy's trunk with a head drawn from N(0, 1/(C + 1)), bias 0. Ziegler et al. 2019 (arXiv:1909.08593), section 2.1."""
        model = cls(policy.config)
        trunk = {name: weight for name, weight in policy.state_dict().items() if not name.startswith("output.")}
        model.load_state_dict(trunk, strict=False)
        nn.init.normal_(model.output.weight, std=(policy.config.n_embd + 1) ** -0.5, generator=generator)
        nn.init.zeros_(model.output.bias)
        return model

    def forward(self, token_ids: Tensor, cache: Cache | None = None) -> Tensor:
        return self.output(self.hidden_states(token_ids, cache)).squeeze(-1)  # (B, T)


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream, normalised before (GPT-2) or after (2017)."""

    def __init__(self, config: ModelShape, layer: int) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention_norm = _norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), rotation, cache))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, rotation, cache)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Attention(nn.Module):
    """Causal self-attention; each key and value head serves H / K query heads."""

    def __init__(self, config: ModelShape, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.n_kv_head = config.kv_heads()
        self.dropout = config.dropout
        self.qkv = _empty(nn.Linear, config.n_embd, (self.n_head + 2 * self.n_kv_head) * config.head_dim(), bias=config.bias)
        self.project = _empty(nn.Linear, config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rotation: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (self.n_head + 2 * self.n_kv_head, -1)).transpose(1, 2)  # (B, H + 2 K, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        attention_mask = None
        if cache is not None:
            k, v, attention_mask = cache.extend(self.layer, k, v)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=attention_mask is None,
            enable_gqa=self.n_kv_head < self.n_head,
        )  # (B, H, T, D)
        return self.project(mixed.transpose(1, 2).flatten(2))  # (B, T, C)


class FeedForward(nn.Module):
    def __init__(self, config: ModelShape) -> None:
        super().__init__()
        self.activation = config.activation
        width = config.hidden() * (2 if config.activation == "swiglu" else 1)
        self.up = _empty(nn.Linear, config.n_embd, width, bias=config.bias)
        self.down = _empty(nn.Linear, config.hidden(), config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        match self.activation:
            case "gelu":
                hidden = F.gelu(hidden, approximate="tanh")
            case "relu":
                hidden = F.relu(hidden)
            case "swiglu":
                gate, hidden = hidden.chunk(2, dim=-1)
                hidden = F.silu(gate) * hidden
        return self.down(hidden)


class Cache:
    """Keys and values of the tokens that each row has read: row b holds `lengths[b]` tokens, so a later pass reads only new ones.

    Rows are padded on the right. Entries beyond a row's length are never attended to and get overwritten. So prompts of different
    lengths can be read in one pass, after which the caller sets `lengths` to the true ones.
    """

    def __init__(self, config: ModelShape, batch_size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        shape = (batch_size, config.kv_heads(), config.seq_len, config.head_dim())
        # Zeros, not uninitialised memory: a masked entry still contributes 0 * its value, and 0 * NaN is NaN.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.lengths = [0] * batch_size

    def longest(self) -> int:
        return max(self.lengths)

    def begin(self, n_new: int) -> Tensor:
        """Prepare for the next pass, and return the positions (B, T) of its tokens."""
        device = self.keys[0].device
        self._end = self.longest() + n_new
        self._positions = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(n_new, device=device)  # (B, T)
        self._attention_mask = torch.arange(self._end, device=device) <= self._positions[:, None, :, None]  # (B, 1, T, end)
        self.lengths = [length + n_new for length in self.lengths]
        return self._positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store this pass's k and v (B, K, T, D). Return all that its queries may read (B, K, end, D), and their attention mask."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (B, 1)
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            stored[rows, :, self._positions] = new.transpose(1, 2).to(stored.dtype)
        keys = self.keys[layer][:, :, : self._end].to(k.dtype)
        return keys, self.values[layer][:, :, : self._end].to(v.dtype), self._attention_mask

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.lengths = [self.lengths[row] for row in rows]

    def put(self, rows: Sequence[int], other: Cache) -> None:
        """Replace these rows by those of `other`, in order."""
        for stored, new in ((self.keys, other.keys), (self.values, other.values)):
            for layer in range(len(stored)):
                stored[layer][rows] = new[layer]
        for row, length in zip(rows, other.lengths, strict=True):
            self.lengths[row] = length


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Overwrite the model's weights with these, named as in `model.named_parameters()`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def with_dropout(model: M, dropout: float) -> M:
    """Copy the model, with another dropout."""
    copy = type(model)(model.config.model_copy(update={"dropout": dropout}))
    copy.load_state_dict(model.state_dict())
    return copy


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """(B, T) -> (B, T, C): sin in even channels, cos in odd ones. Vaswani et al. 2017, section 3.5."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=positions.device) / width)  # (C / 2,)
    angles = positions[..., None] * rates  # (B, T, C / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width]


def rotary_angles(positions: Tensor, head_dim: int) -> Tensor:
    """(B, T) -> (B, 1, T, D / 2), in radians. Su et al. 2021, eq. 15."""
    # Computed at every pass: a buffer would be rounded along with the weights when an engine casts the model to bf16.
    rates = 10000.0 ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)  # (D / 2,)
    return positions[:, None, :, None] * rates


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of (B, H, T, D) by their angles, in fp32. Su et al. 2021, eq. 34, with Llama's pairing."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for torch's optimizers: weight decay on matrices and embeddings, none on biases and norms."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def count_parameters(model: nn.Module) -> int:
    """Count the parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: GPTConfig) -> int:
    """One forward and backward pass: 6 N + 12 L C T, where N excludes lookup tables. Chowdhery et al. 2022, appendix B."""
    n_parameters = count_parameters(GPT(config))
    n_lookup = config.seq_len * config.n_embd if config.positions == "learned" else 0
    if not config.tied:
        n_lookup += config.vocab_size * config.n_embd
    return 6 * (n_parameters - n_lookup) + 12 * config.n_layer * config.n_embd * config.seq_len


def save_model(folder: Path, config: GPTConfig, weights: Mapping[str, Tensor], model_class: type[GPT] = GPT) -> None:
    """Write `model.safetensors` and `config.json`. `weights` are fp32, named as in `model.named_parameters()`, tied ones only once."""
    _check_weights(f"the weights for {folder}", model_class(config), weights)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file whose mode follows the umask, like any other file."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, {"format": "pt"})  # replaces the file by a private one, 0600
    path.chmod(mode)


def load_config(folder: Path) -> GPTConfig:
    return GPTConfig.model_validate_json((folder / "config.json").read_text(encoding="utf-8"))


def load_model(folder: Path) -> GPT:
    """Load the policy that `save_model` wrote to a folder, in fp32 on the CPU and in evaluation mode."""
    return _load(GPT, folder)


def load_reward_model(folder: Path) -> RewardModel:
    """Load a reward model like `load_model`. Its scores are raw: the manifest has their mean and deviation."""
    return _load(RewardModel, folder)


def _load(model_class: type[M], folder: Path) -> M:
    from safetensors.torch import load_file

    model = model_class(load_config(folder))
    path = folder / "model.safetensors"
    weights = load_file(path)
    _check_weights(f"the weights in {path}", model, weights)
    set_weights(model, weights)
    return model.eval()


def _check_weights(source: str, model: GPT, weights: Mapping[str, Tensor]) -> None:
    expected = {name: (torch.float32, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    differing = [name for name in expected if name in found and found[name] != expected[name]]
    problems += [f"{name}: expected {expected[name]}, found {found[name]}" for name in differing]
    if problems:
        raise ValueError(
            f"{source} do not match the model that config.json describes: {'; '.join(problems[:5])}"
            f"{f'; and {len(problems) - 5} more' if len(problems) > 5 else ''}. Use config.json and model.safetensors from one folder"
        )


def _norm(config: ModelShape) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


def _empty(module_class: type[nn.Module], *sizes: int, **options: bool) -> Any:
    # Torch's own initialisation would draw from the global generator, only to be overwritten.
    return nn.utils.skip_init(module_class, *sizes, **options)
