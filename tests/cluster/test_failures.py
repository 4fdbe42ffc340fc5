"""Which rank is to blame for a lost start, and in which words."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from cluster.failures import GangFailure, blocking_ranks, crash_log, describe_death, hang_of, loss_of, raised

IN_COLLECTIVE, ELSEWHERE = 'File "distributed_c10d.py" in all_reduce', 'File "loop.py" in _strike'
LABEL = "rank 1 (pid 4711, node n1)"


def test_the_ranks_outside_the_collective_block_those_inside_whether_late_or_not() -> None:
    assert blocking_ranks([0, 1], {0: IN_COLLECTIVE, 1: ELSEWHERE}) == [1]
    assert blocking_ranks([0], {0: IN_COLLECTIVE, 1: ELSEWHERE}) == [1]
    assert blocking_ranks([0, 1], {0: ELSEWHERE, 1: ELSEWHERE}) == [0, 1]
    assert blocking_ranks([0, 1], {0: IN_COLLECTIVE, 1: IN_COLLECTIVE}) == [0, 1]


def test_a_hang_names_the_blocking_rank_and_the_late_one_that_it_blocks() -> None:
    loss = hang_of([0], {0: IN_COLLECTIVE, 1: ELSEWHERE}, [0, 1], ["rank 0", "rank 1"], "step", 60.0, 7)
    assert (loss.rank, loss.cause, loss.retriable) == (1, "deadline", True)
    assert loss.sentence == "rank 1 kept rank 0 from finishing section 'step' within 60 s at step 7"
    assert loss.traceback == f"rank 0:\n{IN_COLLECTIVE}\nrank 1:\n{ELSEWHERE}"


def test_an_exception_is_not_retried_and_a_lost_connection_is(tmp_path: Path) -> None:
    log = crash_log(tmp_path, 1)
    own = loss_of(1, LABEL, raised(ValueError("no\nend")), step=5, crash_log=log)
    assert (own.cause, own.retriable) == ("exception", False)
    assert own.sentence == f"{LABEL} raised at step 5: ValueError: no end"
    lost = loss_of(1, LABEL, raised(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed")), step=5, crash_log=log)
    assert (lost.cause, lost.retriable) == ("connection", True)
    assert lost.sentence.startswith(f"{LABEL} lost its connection to the other ranks at step 5: RuntimeError: [gloo")


def test_a_lost_connection_is_found_below_another_exception() -> None:
    error = ValueError("the batch was not read")
    error.__cause__ = torch.distributed.DistNetworkError("peer closed")
    assert (raised(error).summary, raised(error).lost_connection) == ("ValueError: the batch was not read", True)


def test_a_dead_actor_without_a_crash_log_was_killed_and_one_with_it_crashed(tmp_path: Path) -> None:
    import ray  # not while tests are collected: Ray keeps the token mode that it finds when it is first imported

    log = crash_log(tmp_path, 1)
    killed = loss_of(1, LABEL, ray.exceptions.ActorDiedError(), step=70, crash_log=log)
    assert killed.sentence == f"{LABEL} was killed by SIGKILL at step 70"
    log.write_text("Fatal Python error: Segmentation fault\n\nCurrent thread ...\n")
    crashed = loss_of(1, LABEL, ray.exceptions.ActorDiedError(), step=70, crash_log=log)
    assert crashed.sentence == f"{LABEL} crashed (Fatal Python error: Segmentation fault) at step 70"


def test_a_death_is_described_as_the_end_of_a_sentence() -> None:
    import ray

    assert describe_death(ray.exceptions.NodeDiedError("node 4f is gone\nmore")) == "was lost with its node (node 4f is gone)"
    memory = describe_death(ray.exceptions.OutOfMemoryError("95 % used"))
    assert memory == "was ended by Ray's memory monitor, as its node ran out of memory: use fewer ranks or set memory_gib (95 % used)"
    assert describe_death(ConnectionError("")) == "was lost: ConnectionError: ConnectionError"


def test_a_gang_failure_survives_pickling_with_all_its_fields() -> None:
    copy = pickle.loads(pickle.dumps(GangFailure("pretrain: rank 1 raised", 1, "exception", "Traceback ...")))
    assert (str(copy), copy.rank, copy.cause, copy.traceback) == ("pretrain: rank 1 raised", 1, "exception", "Traceback ...")
