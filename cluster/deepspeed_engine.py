"""gpt's Engine on DeepSpeed: ZeRO 0 to 3, fp32, bf16 and fp16, offload; the one file that speaks DeepSpeed's keys.

Accumulation is unmanaged: a loop makes as many passes as it likes, and `step` is the boundary. Rajbhandari et al. 2020 (ZeRO).
Leaves out pipelines, tensor parallelism and a change of world size between saving and loading.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

_TAG = "state"


class DeepSpeedEngine:
    def __init__(
        self,
        model: nn.Module,
        parameter_groups: Sequence[Mapping[str, Any]],
        settings: Any,
        *,
        device: torch.device,
        world_size: int = 1,
    ) -> None:
        """`settings` are gpt's TrainSettings. With `world_size` > 1 torch.distributed stands already; all ranks bring equal weights."""
        if settings.precision == "fp16" and device.type == "cpu":
            raise ValueError('precision = "fp16" needs a GPU, and this rank computes on the CPU; take "bf16" or "fp32"')
        if settings.offload and settings.zero_stage == 0:
            raise ValueError("offload = true needs zero_stage 1, 2 or 3, found 0; raise zero_stage or leave offload out")
        deepspeed = _import_deepspeed(device)
        _stand_alone(device, world_size)
        self._device = device
        self._world_size = world_size
        self._max_grad_norm = settings.max_grad_norm
        self._norm = 0.0
        optimizer = torch.optim.AdamW(
            [dict(group) for group in parameter_groups],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
        )
        with _quietly():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=_config(settings))
        self.module: nn.Module = self._engine.module
        # ZeRO 0 in fp32 clips without telling the norm.
        self._engine.clip_fp32_gradients = self._clip
        self._files = _files(deepspeed)
        self._engine.checkpoint_engine = self._files
        # A copy of DeepSpeed's conversion script in every checkpoint would be one more file to verify.
        self._engine._copy_recovery_script = lambda path: None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def frozen(self, model: nn.Module) -> Callable[..., Any]:
        from deepspeed.runtime.torch_autocast import autocast_if_enabled

        # Sharded, the learning model computes in weights that were cast; unsharded in fp32 ones under autocast.
        dtype = next(self.module.parameters()).dtype
        model = model.to(self._device, dtype).eval().requires_grad_(False)

        def read(*args: Any, **kwargs: Any) -> Any:
            with autocast_if_enabled(self._engine):
                return model(*args, **kwargs)

        return read

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks and a loop's loss is its part of a sum: scaled once, the average is the sum.
        self._engine.backward(loss * self._world_size)

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else self._norm

    def full_weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.module.named_parameters():
            master = safe_get_full_fp32_param(parameter)
            if master is None:
                master = _unsharded(parameter)
            weights[name] = master.detach().to("cpu", torch.float32, copy=True)
        return weights

    def save(self, folder: Path) -> None:
        self._files.errors.clear()
        # The scaler of unsharded fp16 is the one piece of state that DeepSpeed leaves out of its files.
        scaler = self._engine.torch_autocast_z0_gradscaler
        client_state = {"grad_scaler": scaler.state_dict()} if scaler is not None else {}
        self._engine.save_checkpoint(str(folder), tag=_TAG, client_state=client_state, save_latest=False)
        if self._files.errors:
            raise self._files.errors[0]

    def load(self, folder: Path) -> None:
        """Into a fresh engine of the same world size and ZeRO stage. DeepSpeed unpickles: the caller has verified the files."""
        path, client_state = None, {}
        # DeepSpeed itself fails by a bare assert, or by a pair of Nones and a warning.
        if (folder / _TAG).is_dir():
            with _quietly():
                path, client_state = self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=True)
        if path is None:
            raise ValueError(f"{folder} holds no state that DeepSpeed can load; it was made by another engine, or not wholly written")
        if self._engine.torch_autocast_z0_gradscaler is not None:
            self._engine.torch_autocast_z0_gradscaler.load_state_dict(client_state["grad_scaler"])

    def _clip(self) -> None:
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        self._norm = float(nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))


def _config(settings: Any) -> dict[str, Any]:
    stage = settings.zero_stage
    config: dict[str, Any] = {
        # Demanded, and without meaning here: the loop counts its sequences and passes itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Overlapping would reduce in an order that depends on timing, and unmanaged accumulation allows it in part only.
        "zero_optimization": {"stage": stage, "overlap_comm": False},
    }
    if settings.precision != "fp32" and stage == 0:
        # Unsharded bf16 would accumulate gradients in bf16 and keep its masters to itself: autocast has fp32 for both.
        config["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[settings.precision]}
    elif settings.precision != "fp32":
        config[settings.precision] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if settings.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed reads it, and only it, to find its device.
    os.environ.setdefault("LOCAL_RANK", "0")
    # Its autotuner, which nobody here calls, would import MLflow: longer than all the rest of it.
    with _absent("mlflow"):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Found compatible, this op is compiled with g++ at the first use; gloo serves without it. Set whole, since the first look at
    # the table makes DeepSpeed link test programs to fill it in.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # It calls collectives by names that torch 2.13 announces to rename, at every step.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    return deepspeed


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Who tries to import it does without, unless this process has it already."""
    had = sys.modules.setdefault(module, None)  # type: ignore[arg-type]  # as the import system knows a module that isn't there
    try:
        yield
    finally:
        if had is None:
            del sys.modules[module]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Parts of DeepSpeed print their memory use, whatever the level of its logger."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _stand_alone(device: torch.device, world_size: int) -> None:
    """DeepSpeed wants a process group even for one process: one that opens no port."""
    if dist.is_initialized():
        return
    assert world_size == 1, "a rank of many needs torch.distributed first"
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _unsharded(parameter: nn.Parameter) -> Tensor:
    """A parameter that no optimizer owns; under ZeRO 3 it is sharded nevertheless."""
    if not hasattr(parameter, "ds_id"):
        return parameter
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _files(deepspeed: Any) -> Any:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class Files(TorchCheckpointEngine):
        """Keeps a failed write until DeepSpeed's barriers are behind: raised between two, it would leave the other ranks waiting."""

        def __init__(self) -> None:
            super().__init__()
            self.zipfile_serialization = True
            self.errors: list[Exception] = []

        def save(self, state_dict: Any, path: str) -> None:
            try:
                super().save(state_dict, path)
            except Exception as error:
                self.errors.append(error)

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            try:
                os.makedirs(path, exist_ok=exist_ok)
            except OSError as error:
                self.errors.append(error)

    return Files()
