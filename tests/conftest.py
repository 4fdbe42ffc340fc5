"""Fixtures for all tests: unit tests reach no network and write nothing into the home folder."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("gptline", deadline=None)  # an example's duration says more about the machine than about the code
settings.load_profile("gptline")

# Ray runs workers with niceness 15, so other tests would starve ranks; and with a longer wait Ray reports the true cause of a death.
os.environ |= {"RAY_worker_niceness": "0", "RAY_timeout_ms_task_wait_for_death_info": "10000"}

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell ignores Ctrl-C for tests that it runs in the background, and every process started here would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give workers whole modules, whose fixtures are costly, and all of tests/cluster to one: a process keeps Ray's first token mode."""
    from xdist.scheduler import LoadScopeScheduling

    class Modules(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return "tests/cluster" if module.startswith("tests/cluster/") else module

    return Modules(config, log)


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest) -> None:
    """Forbid sockets in unit tests; slow tests may use the loopback interface."""
    from pytest_socket import disable_socket, socket_allow_hosts

    if request.node.get_closest_marker("slow") is None and request.node.get_closest_marker("gpu") is None:
        disable_socket(allow_unix_socket=True)
    else:
        socket_allow_hosts(["127.0.0.1", "::1", "localhost"], allow_unix_socket=True)


@pytest.fixture(autouse=True)
def no_flush_to_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: no unit test can see the effect of a power cut, and waiting for the disk would take a third of their time."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(autouse=True)
def forget_user_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Unload modules that a test wrote and imported, since the next test may have others of the same names."""
    yield
    written = f"{tmp_path_factory.getbasetemp()}/"
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(written):
            del sys.modules[name]
    sys.path[:] = [each for each in sys.path if not each.startswith(written)]


@pytest.fixture
def store(tmp_path: Path):  # type: ignore[no-untyped-def]
    from pipelines.store.store import Store

    root = tmp_path / "store"
    root.mkdir()
    return Store(root)


@pytest.fixture(scope="session")
def save_foreign() -> Callable[..., tuple[Any, Any]]:
    """`model, tokenizer = save_foreign(folder)`: a GPT-2 that is not ours, saved by transformers."""

    def save(folder: Path, *, added: tuple[str, ...] = ("<|endoftext|>",), rows: int = 300, shards: str = "1GB", **changes: Any):
        """Random weights, and a BPE tokenizer of 270 tokens (id 0 is <|endoftext|>). `changes` are GPT2Config's."""
        import tokenizers
        import torch
        from tokenizers import decoders, models, pre_tokenizers, trainers
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

        learned = tokenizers.Tokenizer(models.BPE())
        learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        learned.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=list(added), initial_alphabet=alphabet, show_progress=False)
        learned.train_from_iterator(["the cat sat on the mat, that hat and the other hat"] * 3, trainer)
        PreTrainedTokenizerFast(tokenizer_object=learned, eos_token=added[0]).save_pretrained(folder)
        torch.manual_seed(1)
        sizes = dict(vocab_size=rows, n_positions=32, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
        model = GPT2LMHeadModel(GPT2Config(**(sizes | changes))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))  # no bias stays 0
        model.save_pretrained(folder, max_shard_size=shards)
        return model, PreTrainedTokenizerFast.from_pretrained(folder)

    return save
