from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.batching import (
    HeldOutWindows,
    ShuffledRows,
    TrainingBatches,
    Window,
    evenly,
    held_out_batch,
    micro_batch_rows,
    open_tokens,
    padded,
)
from gpt.random_streams import permutation, stream_seed


def batches(*lengths: int, seq_len: int = 4, global_batch_size: int = 3, seed: int = 1) -> TrainingBatches:
    """File f holds the tokens 1000 f, 1000 f + 1, ..., so that a token tells its position."""
    files = [np.arange(1000 * file, 1000 * file + n, dtype=np.uint16) for file, n in enumerate(lengths)]
    return TrainingBatches(files, seq_len=seq_len, global_batch_size=global_batch_size, seed=seed)


def test_targets_are_the_tokens_shifted_by_one():
    batch = batches(30).micro_batch(0, range(3))
    assert batch.token_ids.shape == batch.targets.shape == batch.loss_mask.shape == (3, 4)
    assert (batch.targets == batch.token_ids + 1).all()
    assert batch.loss_mask.all()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(5, 60), min_size=1, max_size=3),
    global_batch_size=st.integers(1, 7),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_an_epoch_visits_every_window_once_and_no_two_overlap(lengths, global_batch_size, seed, epoch):
    data = batches(*lengths, global_batch_size=global_batch_size, seed=seed)
    n = data.windows_per_epoch()
    places = [divmod(place, global_batch_size) for place in range(epoch * n, (epoch + 1) * n)]
    begun = sorted(data.window(step, row) for step, row in places)
    seen = Counter((file, start + i) for file, start in begun for i in range(4))
    assert set(seen.values()) == {1}
    assert all(start in range(lengths[file] - 4) for file, start in begun)
    assert {file for file, _ in begun} == set(range(len(lengths)))
    for file, length in enumerate(lengths):
        # Everything except the room for the offset, which is at most two windows minus a token.
        assert sum(f == file for f, _ in begun) == max(1, (length - 4) // 4)


def test_epochs_differ_in_order_and_in_window_offsets():
    data = batches(100, global_batch_size=1)
    n = data.windows_per_epoch()
    epochs = [[data.window(step, 0)[1] for step in range(e * n, (e + 1) * n)] for e in range(6)]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert {min(epoch) for epoch in epochs} == {0, 1, 2, 3}


def test_a_step_does_not_depend_on_which_steps_were_read_before_it():
    whole = batches(60)
    in_order = [whole.micro_batch(step, range(3)).token_ids for step in range(20)]
    resumed = batches(60)
    for step in (19, 3, 11):
        assert (resumed.micro_batch(step, range(3)).token_ids == in_order[step]).all()


@pytest.mark.parametrize(("world_size", "passes"), [(1, 1), (1, 4), (2, 1), (2, 3), (4, 3), (12, 1)])
def test_ranks_and_micro_batches_partition_the_same_global_batch(world_size, passes):
    rows = [row for rank in range(world_size) for part in micro_batch_rows(rank, world_size, 12, passes) for row in part]
    assert rows == list(range(12))


def test_the_order_of_a_seed_never_changes():
    # Checkpoints depend on these numbers: a run that resumes under another version must see the same rows.
    assert stream_seed(1, "order", 0) == 954623460253835154
    assert permutation(stream_seed(1, "order", 0), 8).tolist() == [0, 7, 6, 3, 5, 4, 1, 2]


def test_streams_of_different_names_differ():
    names = [("a",), ("b",), ("a", 1), ("a", "1"), ("a1",), ("a", 1, 2), ("a", 12)]
    assert len({stream_seed(seed, *name) for name in names for seed in (1, 2)}) == 14
    assert all(0 <= stream_seed(seed, "x") < 2**63 for seed in range(50))


def test_a_file_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match=r"training tokens 2 of 2: expected at least one window of seq_len \+ 1 = 5 tokens, found 4"):
        batches(9, 4)


def test_a_file_of_exactly_one_window_is_read_whole():
    assert batches(5).micro_batch(7, range(1)).token_ids.tolist() == [[0, 1, 2, 3]]


def test_a_token_outside_the_vocabulary_is_named_with_its_position(tmp_path):
    np.array([1, 2, 30, 4], "<u2").tofile(tmp_path / "train.bin")
    assert open_tokens(tmp_path / "train.bin", "uint16", 31).tolist() == [1, 2, 30, 4]
    with pytest.raises(ValueError, match=r"train\.bin: expected the tokenizer's ids 0 to 29, found 30 at token 2"):
        open_tokens(tmp_path / "train.bin", "uint16", 30)


def test_a_file_that_ends_within_a_token_is_refused(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="expected uint16 tokens of 2 bytes each, found 3 bytes"):
        open_tokens(tmp_path / "train.bin", "uint16", 300)


def test_an_empty_file_has_no_tokens(tmp_path):
    (tmp_path / "held_out.bin").touch()
    assert len(open_tokens(tmp_path / "held_out.bin", "uint32", 300)) == 0


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=3), stride=st.integers(1, 6))
def test_held_out_windows_score_every_token_except_a_files_first_once(lengths, stride):
    windows = HeldOutWindows(lengths, 6, stride)
    scored = Counter((w.file, place) for w in windows for place in range(w.score_from, w.stop))
    assert scored == Counter((file, place) for file, n in enumerate(lengths) for place in range(1, n))
    assert all(w.stop - w.start <= 7 for w in windows)
    assert all(w.score_from - w.start >= 7 - stride for w in windows if w.start)


def test_held_out_windows_are_computed_when_asked_for():
    windows = HeldOutWindows([0, 10**15, 3], 1000, 500)
    assert len(windows) == 1 + (10**15 - 1001) // 500 + 1 + 1  # the first scores 1,000 tokens, each later one 500; one for the last file
    assert windows[0] == Window(1, 0, 1, 1001)
    assert windows[1:3] == [Window(1, 500, 1001, 1501), Window(1, 1000, 1501, 2001)]
    assert windows[len(windows) - 1] == Window(2, 0, 1, 3)


def test_only_the_tokens_that_a_window_scores_count_in_its_row():
    tokens = np.arange(10, 20)
    windows = HeldOutWindows([10], 4, 2)
    batch = held_out_batch([tokens], windows, 4)
    assert batch.targets[batch.loss_mask].tolist() == list(range(11, 20))
    assert batch.token_ids[0].tolist() == [10, 11, 12, 13]
    assert batch.targets[1].tolist() == [13, 14, 15, 16]
    assert batch.loss_mask[1].tolist() == [False, False, True, True]


def test_shuffled_rows_visit_every_example_once_per_epoch_and_a_batch_may_span_two_epochs():
    rows = ShuffledRows(5, batch_size=2, seed=1, name="test")
    drawn = [row for step in range(5) for row in rows.of_step(step)]  # 10 of them: two epochs of 5
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]
    assert drawn[:5] != drawn[5:]
    assert rows.of_step(3) == ShuffledRows(5, batch_size=2, seed=1, name="test").of_step(3)


def test_rows_of_unequal_length_are_padded_on_the_right():
    assert padded([[1, 2, 3], [4]], pad_id=9).tolist() == [[1, 2, 3], [4, 9, 9]]


def test_evenly_selects_evenly_spaced_items_from_the_first_on_or_all_if_there_are_too_few():
    assert evenly("abcdef", 3) == ["a", "c", "e"]
    assert evenly("abcde", 3) == ["a", "b", "d"]  # indices 0, 5 / 3 and 10 / 3, rounded down
    assert evenly("ab", 3) == ["a", "b"]
    assert evenly("", 3) == []
