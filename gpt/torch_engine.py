"""The plain Engine: only torch, no sharding. `--inline` uses it, and tests compare the sharded engine with it.

fp32 masters; bf16 and fp16 by autocast; AdamW; gradients are summed over ranks by one all-reduce per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from gpt.settings import TrainSettings

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILE = "torch_engine.pt"


class TorchEngine:
    """With `world_size` > 1, torch's process group must exist and all ranks must start with the same weights."""

    def __init__(
        self,
        model: nn.Module,
        parameter_groups: Sequence[Mapping[str, Any]],
        settings: TrainSettings,
        *,
        device: torch.device,
        world_size: int = 1,
    ) -> None:
        if settings.precision == "fp16" and device.type == "cpu":
            raise ValueError('precision = "fp16" needs a GPU, and this rank has only a CPU; set "bf16" or "fp32"')
        self.module = model.to(device)
        self._device = device
        self._world_size = world_size
        self._max_grad_norm = settings.max_grad_norm
        self._autocast = AUTOCAST[settings.precision]
        self._optimizer = torch.optim.AdamW(
            [dict(group) for group in parameter_groups],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
        # Without it, small gradients would vanish in fp16. Disabled, it passes everything through.
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._read(self.module, *args, **kwargs)

    def frozen(self, model: nn.Module) -> Callable[..., Any]:
        return partial(self._read, model.to(self._device).eval().requires_grad_(False))

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, lr: float) -> float:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._world_size > 1:
            _sum_over_ranks(gradients)
        self._scaler.unscale_(self._optimizer)
        grad_norm = nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return float(grad_norm)

    def full_weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in self.module.named_parameters()}

    def save(self, folder: Path) -> None:
        """Write the state on rank 0 only, since all ranks hold the same."""
        if self._world_size == 1 or torch.distributed.get_rank() == 0:
            state = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}
            torch.save(state, folder / FILE)

    def load(self, folder: Path) -> None:
        state = torch.load(folder / FILE, map_location=self._device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _read(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast != torch.float32):
            return model(*args, **kwargs)


def _sum_over_ranks(gradients: Sequence[Tensor]) -> None:
    """Sum in place, as one message."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))
