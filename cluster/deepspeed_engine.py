"""gpt's Engine on DeepSpeed: ZeRO 0 to 3, fp32, bf16 and fp16, offload; the only file that uses DeepSpeed's config keys.

Accumulation is unmanaged: a loop runs any number of passes, and `step` ends the accumulation. Rajbhandari et al. 2020 (ZeRO).
Leaves out pipeline and tensor parallelism, and a change of world size between saving and loading.
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
        """`settings` are gpt's TrainSettings. With `world_size` > 1, torch.distributed is initialised and all ranks pass equal weights."""
        if settings.precision == "fp16" and device.type == "cpu":
            raise ValueError('precision = "fp16" needs a GPU, but this rank runs on the CPU; set precision to "bf16" or "fp32"')
        if settings.offload and settings.zero_stage == 0:
            raise ValueError("offload = true needs zero_stage 1, 2 or 3, found 0; raise zero_stage or remove offload")
        deepspeed = _import_deepspeed(device)
        _init_single_process_group(device, world_size)
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
        with _silenced():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=_config(settings))
        self.module: nn.Module = self._engine.module
        # ZeRO 0 in fp32 clips without reporting the norm.
        self._engine.clip_fp32_gradients = self._clip
        self._files = _files(deepspeed)
        self._engine.checkpoint_engine = self._files
        # DeepSpeed would copy its conversion script into every checkpoint: one more file to verify.
        self._engine._copy_recovery_script = lambda path: None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def frozen(self, model: nn.Module) -> Callable[..., Any]:
        from deepspeed.runtime.torch_autocast import autocast_if_enabled

        # Under ZeRO 1 to 3 the trained model computes with weights that were cast; under ZeRO 0, with fp32 weights under autocast.
        dtype = next(self.module.parameters()).dtype
        model = model.to(self._device, dtype).eval().requires_grad_(False)

        def read(*args: Any, **kwargs: Any) -> Any:
            with autocast_if_enabled(self._engine):
                return model(*args, **kwargs)

        return read

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks, but a loop's loss is its part of a sum: scaled by the world size, the average is the sum.
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
        # Under ZeRO 0 in fp16, the loss scaler is the only state that DeepSpeed doesn't save.
        scaler = self._engine.torch_autocast_z0_gradscaler
        client_state = {"grad_scaler": scaler.state_dict()} if scaler is not None else {}
        self._engine.save_checkpoint(str(folder), tag=_TAG, client_state=client_state, save_latest=False)
        if self._files.errors:
            raise self._files.errors[0]

    def load(self, folder: Path) -> None:
        """Load into a new engine of the same world size and ZeRO stage. DeepSpeed unpickles, so the caller verifies the files first."""
        path, client_state = None, {}
        # DeepSpeed itself would fail with a bare assert, or return a pair of Nones with a warning.
        if (folder / _TAG).is_dir():
            with _silenced():
                path, client_state = self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=True)
        if path is None:
            raise ValueError(f"{folder} holds no state that DeepSpeed can load; it was written by another engine or is incomplete")
        if self._engine.torch_autocast_z0_gradscaler is not None:
            self._engine.torch_autocast_z0_gradscaler.load_state_dict(client_state["grad_scaler"])

    def _clip(self) -> None:
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        self._norm = float(nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))


def _config(settings: Any) -> dict[str, Any]:
    stage = settings.zero_stage
    config: dict[str, Any] = {
        # Required but without effect: the loop counts its sequences and passes itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Overlapped communication would reduce in an order that depends on timing; unmanaged accumulation supports it only in part.
        "zero_optimization": {"stage": stage, "overlap_comm": False},
    }
    if settings.precision != "fp32" and stage == 0:
        # DeepSpeed's own bf16 without ZeRO accumulates gradients in bf16 and hides its masters; autocast has fp32 for both.
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
    # The only variable from which DeepSpeed finds its device.
    os.environ.setdefault("LOCAL_RANK", "0")
    # Its autotuner, which is not used here, would import MLflow, which takes longer than all the rest.
    with _hidden("mlflow"):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # If DeepSpeed finds this op compatible, it compiles it with g++ at the first use; gloo works without it. The whole table is
    # replaced because reading it makes DeepSpeed link test programs to fill it in.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # At every step it calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    return deepspeed


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Make imports of `module` fail, unless this process has imported it already."""
    loaded = sys.modules.setdefault(module, None)  # type: ignore[arg-type]  # the import system's mark for a missing module
    try:
        yield
    finally:
        if loaded is None:
            del sys.modules[module]


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Drop what DeepSpeed prints: parts of it report memory use whatever the level of its logger."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _init_single_process_group(device: torch.device, world_size: int) -> None:
    """Make the process group that DeepSpeed needs even for one process, without opening a port."""
    if dist.is_initialized():
        return
    assert world_size == 1, "several ranks need torch.distributed first"
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _unsharded(parameter: nn.Parameter) -> Tensor:
    """The whole value of a parameter that no optimizer owns; ZeRO 3 shards even those."""
    if not hasattr(parameter, "ds_id"):
        return parameter
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _files(deepspeed: Any) -> Any:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class Files(TorchCheckpointEngine):
        """Records failed writes: raised between two of DeepSpeed's barriers, they would leave the other ranks waiting."""

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
