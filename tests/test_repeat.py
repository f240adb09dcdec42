"""A call's host work is repeated only where that is right: a stand-in language copies memory."""

import ctypes
import functools
import gc
import weakref

import pytest
import torch

from adapterkern.backends import repeat
from adapterkern.backends.repeat import STREAM, Recording, Repeats


class Copies(Recording):
    """A language whose one kernel copies bytes."""

    def launch(self, source, target, nbytes, stream):
        arguments = (source.data_ptr(), target.data_ptr(), nbytes, stream)
        move(*arguments)
        if not self._keeps:
            return
        slots = [self.slot(address) for address in arguments[:2]]
        self.step(move, (*slots, nbytes, STREAM))


def move(source, target, nbytes, stream):
    ctypes.memmove(target, source, nbytes)
    streams.append(stream)


streams: list[int] = []


@pytest.fixture
def repeats():
    """Its `runs` counts how often `code` below ran instead of being repeated."""
    streams.clear()
    made = Repeats(Copies)
    made.runs = 0
    return made


def copy(repeats, x, other, stream=3, options=(), through=None):
    """x and `other` copied into new tensors, x through scratch memory."""

    def code(recording):
        repeats.runs += 1
        room = recording.own(through(x) if through else torch.empty_like(x))
        results = [recording.own(t.new_empty(t.shape)) for t in (x, other)]
        recording.launch(x, room, x.nbytes, stream)
        recording.launch(room, results[0], x.nbytes, stream)
        recording.launch(other, results[1], other.nbytes, stream)
        return *results, None

    return repeats.run((x, None, other), options, stream, code)


def repeated(repeats):
    """How many kinds of calls are repeated."""
    return sum(isinstance(known, repeat.Repeat) for known in repeats._known.values())


def test_a_repetition_reads_and_writes_the_memory_of_its_own_call(repeats):
    kept = []
    for call in range(4):
        x, other = torch.randn(5, 4), torch.randn(7)
        first, second, absent = copy(repeats, x, other, stream=call)
        kept.append((x, first))
        assert torch.equal(first, x)
        assert torch.equal(second, other)
        assert absent is None
    assert repeats.runs == 2
    assert streams == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(torch.equal(x, result) for x, result in kept)  # no result was written again


@pytest.mark.parametrize(
    "change",
    [
        lambda x, other: (x[1:], other[1:]),
        lambda x, other: (x.T.contiguous(), other),
        lambda x, other: (torch.randn(5, 8)[:, ::2], other),
        lambda x, other: (x.view(torch.int32), other),
        lambda x, other: (x.view(-1)[1:17].view(4, 4), other),
        lambda x, other: (x.clone(), x),
        lambda x, other: (x, x),
    ],
    ids=["sizes", "shape", "strides", "dtype", "address", "size-of-one", "one-tensor-twice"],
)
def test_another_kind_of_call_is_run_and_not_repeated(repeats, change):
    parts = torch.randn(5, 4), torch.randn(7)
    for _ in range(2):
        copy(repeats, *parts)
        copy(repeats, *change(*parts))
        copy(repeats, *parts, options=("another",))
    assert repeats.runs == 6
    copy(repeats, *change(*parts))
    copy(repeats, *parts)
    assert repeats.runs == 6


def test_tensors_of_one_address_are_told_apart_when_they_no_longer_share_it(repeats):
    x = torch.randn(5, 4)
    for _ in range(3):
        first, second, _ = copy(repeats, x, torch.zeros_like(x))
        assert torch.equal(first, x)
        assert not second.any()
        first, second, _ = copy(repeats, x, x)
        assert torch.equal(second, x)


def test_a_call_that_copies_first_is_run_every_time(repeats):
    for _ in range(3):
        x = torch.randn(4, 5).T
        (first,) = repeats.run((x,), (), 0, functools.partial(copied, x))
        assert torch.equal(first, x)
    assert repeated(repeats) == 0


def copied(x, recording):
    contiguous = x.contiguous()
    result = recording.own(torch.empty(x.shape))
    recording.launch(contiguous, result, x.nbytes, 0)
    return (result,)


def each_copied(tensors, recording):
    results = [recording.own(torch.empty(t.shape)) for t in tensors]
    for tensor, result in zip(tensors, results, strict=True):
        recording.launch(tensor, result, tensor.nbytes, 0)
    return results


def test_which_of_three_tensors_are_one_is_told_apart(repeats):
    x, other = torch.randn(4), torch.randn(4)
    calls = [(x, x, other), (x, other, other), (x, other, x), (x, other, torch.randn(4))]
    for tensors in calls * 3:
        results = repeats.run(tensors, (), 0, functools.partial(each_copied, tensors))
        assert all(torch.equal(t, r) for t, r in zip(tensors, results, strict=True))
    assert len(repeats._known) == len(calls)
    assert repeated(repeats) == len(calls)


@pytest.mark.parametrize("owned", [False, True])
def test_a_result_is_new_memory(repeats, owned):
    """One that is an input, or two that are one, cannot be made anew by a layout."""
    x = torch.randn(5)

    def code(recording):
        result = recording.own(torch.empty(5)) if owned else x
        return result, result

    for _ in range(3):
        repeats.run((x,), (), 0, code)
    assert repeated(repeats) == 0


@pytest.mark.parametrize("view", [lambda room: room[:4], lambda room: room[4:]])
def test_memory_in_two_pieces_is_not_made_twice(repeats, view):
    x = torch.randn(4)

    def code(recording):
        room, result = recording.own(torch.empty(8)), recording.own(torch.empty(4))
        recording.launch(x, recording.own(view(room)), 16, 0)
        recording.launch(view(room), result, 16, 0)
        return (result,)

    for _ in range(3):
        repeats.run((x,), (), 0, code)
    assert repeated(repeats) == 0


def test_padded_rows_are_padded_to_the_end(repeats):
    """A kernel may read and write whole rows, the last one's padding too."""
    x = torch.randn(3, 8)

    def code(recording):
        result = recording.own(torch.empty(3, 8)[:, :5])
        recording.launch(x, result, x.nbytes, 0)
        return (result,)

    for _ in range(3):
        (result,) = repeats.run((x,), (), 0, code)
        assert torch.equal(result, x[:, :5])
        assert result.stride() == (8, 1)
        assert result.untyped_storage().nbytes() == x.nbytes
    assert repeated(repeats) == 1


def test_parts_of_scratch_memory_keep_their_place(repeats):
    x = torch.arange(8.0)

    def code(recording):
        room, result = recording.own(torch.empty(16)), recording.own(torch.empty(8))
        recording.launch(x, room[8:], 32, 0)
        recording.launch(room[8:], room, 32, 0)
        recording.launch(room, result, 32, 0)
        return (result,)

    for _ in range(3):
        (result,) = repeats.run((x,), (), 0, code)
        assert torch.equal(result, x)
    assert repeated(repeats) == 1


def test_scratch_memory_is_one_piece_without_overlap(repeats, monkeypatch):
    """Every part begins at a multiple of 256 bytes and ends before the next one begins."""
    x, sizes = torch.zeros(4), (3, 64, 65, 1)

    def code(recording):
        for size in sizes:
            recording.launch(x, recording.own(torch.empty(size)), 4, 0)
        return (None,)

    for _ in range(2):
        repeats.run((x,), (), 0, code)
    targets = []
    monkeypatch.setattr(ctypes, "memmove", lambda target, source, size: targets.append(target))
    repeats.run((x,), (), 0, code)
    assert [target - targets[0] for target in targets] == [0, 256, 512, 1024]


def test_memory_that_is_not_aligned_is_not_given_to_a_kernel_that_was_made_for_it(
    repeats, monkeypatch
):
    parts = torch.randn(4), torch.randn(4)
    for _ in range(3):
        copy(repeats, *parts)
    assert repeats.runs == 2
    monkeypatch.setattr(repeat.Layout, "make", lambda layout, x: torch.empty(5)[1:])
    first, _, _ = copy(repeats, *parts)
    assert repeats.runs == 3
    assert torch.equal(first, parts[0])


def test_first_memory_that_is_not_aligned_is_not_remembered(repeats):
    for _ in range(4):
        copy(repeats, torch.randn(4), torch.randn(4), through=lambda x: torch.empty(5)[1:])
    assert repeats.runs == 4


def test_what_a_step_holds_lives_until_it_is_forgotten(repeats):
    class Binary:
        pass

    def code(recording):
        binary = Binary()
        seen.append(weakref.ref(binary))
        recording.step(max, (1, 2), binary)
        return (None,)

    seen: list[weakref.ref] = []
    for _ in range(2):
        repeats.run((torch.zeros(1),), (), 0, code)
    gc.collect()
    assert [binary() is not None for binary in seen] == [False, True]
    repeats.clear()
    gc.collect()
    assert seen[1]() is None


def test_a_call_that_raises_is_not_remembered(repeats):
    def code(recording):
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        repeats.run((torch.zeros(1),), (), 0, code)
    assert not repeats._known


def test_few_kinds_are_kept(repeats, monkeypatch):
    monkeypatch.setattr(repeat, "_MOST_KINDS", 3)
    for size in range(1, 8):
        for _ in range(2):
            copy(repeats, torch.randn(size), torch.randn(4))
        assert len(repeats._known) <= 3
    assert repeats.runs == 14


class Scaled(Recording):
    """A language that hands a number on, as it is or computed from the call's."""

    def launch(self, number):
        numbers.append(number)
        if self._keeps:
            self.step(lambda number, _: numbers.append(number), (number, 0))


numbers: list[float] = []


@pytest.mark.parametrize("derived", [False, True])
def test_a_scale_is_that_of_the_moment_even_where_it_was_computed_with(derived):
    numbers.clear()
    repeats, runs = Repeats(Scaled), []

    def code(recording):
        runs.append(scale)
        y = recording.own(torch.empty(4))
        recording.launch(scale + 1 if derived else scale)
        return (y,)

    wanted = [0.5, 0.5, 0.25, 3.0, 0.5]
    for scale in wanted:
        repeats.run((torch.zeros(4),), ("scaled",), 0, code, scale)
    assert numbers == [scale + 1 if derived else scale for scale in wanted]
    assert len(runs) == (5 if derived else 2)
    assert len(repeats._known) == 1


def test_other_numbers_of_a_launch_without_a_scale_are_kept():
    numbers.clear()
    repeats, runs = Repeats(Scaled), []

    def code(recording):
        runs.append(1)
        y = recording.own(torch.empty(4))
        recording.launch(2.0)
        return (y,)

    for _ in range(4):
        repeats.run((torch.zeros(4),), (), 0, code)
    assert numbers == [2.0] * 4
    assert len(runs) == 2
