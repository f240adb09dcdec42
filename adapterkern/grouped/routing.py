"""`AdapterRouting`: which adapter each token of a batch takes."""

import itertools
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkern import _torch
from adapterkern.backends import NAMES, get
from adapterkern.grouped.call import TILE
from adapterkern.validation import name_of


class AdapterRouting:
    """The slot of every token of a batch, sorted so that one launch serves all adapters.

    Args:
        max_tokens: the most tokens of a batch.
        slots: S, the number of adapters that can be named, as the bank has.
        device: of the buffers; None: torch's default device.

    Attributes:
        token_slots: [max_tokens] int32, the slot of each token, -1 for none.
        order: [max_tokens + S * 63] int32, the tokens by slot: group after group, in each the
            tokens in their own order. A group begins at a multiple of 64, that of the tokens
            without an adapter comes last; -1 fills up.
        tiles: [ceil(len(order) / 64), 3] int32, the parts of `order` that share one adapter: the
            slot (S: no adapter, -1: nothing), the first place in `order`, the number of tokens.
        slot_offsets: [S + 2] int32, where the group of each slot begins in `order`, then that of
            the tokens without an adapter, then the end of that.
        num_tokens: of the last update; T, or max_tokens where only the device knows T.
        used: the slots that tokens take, where the host knows them, else None. Where only the
            device knows which sequences are empty, those that they alone name are among them.

    The four buffers are made once and rewritten in full at every `update`, on the device and
    without waiting for it, so that a CUDA graph that was captured with them stays valid. The sort
    is stable: equal ids give equal bits. An update before the backward of an earlier call makes
    that backward an error, and one of a checkpoint wrong, for that runs the forward again: give
    each batch that waits for its backward a routing of its own.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size below 1.

    Source: the counting sort is that of Knuth, The Art of Computer Programming 3, 5.2.
    """

    def __init__(
        self, max_tokens: int, slots: int, *, device: torch.device | str | None = None
    ) -> None:
        sizes: dict[str, Any] = {"max_tokens": max_tokens, "slots": slots}
        for name, size in sizes.items():
            if not _is_integer(size):
                raise TypeError(f"{name} must be an integer, got {size!r}.")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        self.max_tokens, self.slots = int(max_tokens), int(slots)
        room = max_tokens + slots * (TILE - 1)
        if room >= 2**31:
            raise ValueError(
                f"max_tokens + 63 * slots must be below 2^31, got {room}.\n"
                "  hint: a routing is for one batch, not for a whole corpus."
            )
        shapes = ((max_tokens,), (room,), (-(-room // TILE), 3), (slots + 2,))
        self.token_slots, self.order, self.tiles, self.slot_offsets = (
            torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes
        )
        self.num_tokens = 0
        self.used: tuple[int, ...] | None = ()
        self._ragged = False  # whether the device alone knows how many tokens there are
        self._captured = False  # whether a CUDA graph holds the last update
        self._sort(torch.empty(0, dtype=torch.int32, device=self.device))

    @property
    def device(self) -> torch.device:
        """The device of the buffers."""
        return self.order.device

    def buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """token_slots, order, tiles and slot_offsets."""
        return self.token_slots, self.order, self.tiles, self.slot_offsets

    def update(
        self,
        ids: Sequence[int] | Tensor,
        *,
        seq_len: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> "AdapterRouting":
        """Route the tokens of the next batch.

        Args:
            ids: integers, the slot of each token, or of each sequence with one of the next two; -1
                for no adapter. On a GPU they stay there, and what is out of range takes no adapter;
                elsewhere it is an error.
            seq_len: the tokens of each sequence.
            cu_seqlens: [B + 1], where each of B sequences begins in the batch, and where the last
                one ends. On a GPU the number of tokens is not known to the host: x may then have up
                to max_tokens, and what is beyond the last sequence takes no adapter.

        Returns:
            The routing itself.

        Raises:
            TypeError: ids are no integers, or seq_len is none.
            ValueError: an id is out of range, there are more tokens than max_tokens, or seq_len and
                cu_seqlens are both given or do not fit ids.
        """
        found = _as_ids(ids)
        if seq_len is not None and cu_seqlens is not None:
            raise ValueError("seq_len and cu_seqlens both say how long sequences are; give one.")
        if found.is_meta and self.device.type != "meta":
            raise ValueError(
                f"ids are on the meta device and have no values; this routing is on {self.device}."
            )
        used, there = self._checked(found), found
        if not found.is_cpu and found.dtype == torch.int64:
            there = found.clamp(-1, self.slots)  # what int32 does not hold would become a slot
        tokens = self._of_tokens(_sent(there, self.device, torch.int32), seq_len, cu_seqlens)
        count = _count(tokens)
        self._check_room(count)
        self.used, self.num_tokens = _taken(used, found, seq_len, cu_seqlens), count
        self._ragged = cu_seqlens is not None and not cu_seqlens.is_cpu
        self._captured = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._sort(tokens)
        return self

    def check_tokens(self, num_tokens: int) -> None:
        """Refuse an x of another number of tokens than the last update was for.

        Raises:
            ValueError: the numbers differ.
        """
        fits = num_tokens <= self.num_tokens if self._ragged else num_tokens == self.num_tokens
        if not fits:
            raise ValueError(
                f"x must have the {self.num_tokens} tokens of the last routing.update, got "
                f"{num_tokens}.\n  hint: update(ids) takes one id a token; with seq_len or "
                "cu_seqlens one a sequence."
            )

    def used_slots(self) -> tuple[int, ...]:
        """The slots that tokens take; where only the device knows them, this waits for it."""
        if self.used is not None:
            return self.used
        starts = self.slot_offsets.tolist()
        used = tuple(s for s in range(self.slots) if starts[s + 1] > starts[s])
        if not self._captured:  # a CUDA graph changes them whenever it runs
            self.used = used
        return used

    def __repr__(self) -> str:
        return (
            f"AdapterRouting(max_tokens={self.max_tokens}, slots={self.slots}, "
            f"num_tokens={self.num_tokens}, device={str(self.device)!r})"
        )

    def _checked(self, ids: Tensor) -> tuple[int, ...] | None:
        """The slots among ids, where the host has these; any, where nothing has."""
        if _is_traced(ids) or ids.is_meta:
            return tuple(range(self.slots))
        if not ids.is_cpu:
            return None
        named = ids.unique().tolist()
        wrong = [i for i in named if not -1 <= i < self.slots]
        if wrong:
            raise ValueError(
                f"ids must be slots from 0 to {self.slots - 1}, or -1 for no adapter, got "
                f"{', '.join(map(str, wrong[:5]))}.\n  hint: bank.ids(names) gives them."
            )
        return tuple(i for i in named if i >= 0)

    def _check_room(self, count: int, of: str = "") -> None:
        if count > self.max_tokens:
            raise ValueError(
                f"this routing is for at most {self.max_tokens} tokens, got {count}{of}.\n"
                f"  hint: AdapterRouting(max_tokens={count}, slots={self.slots})."
            )

    def _of_tokens(self, ids: Tensor, seq_len: Any, bounds: Any) -> Tensor:
        """The id of each token."""
        if seq_len is not None:
            if not _is_integer(seq_len):
                raise TypeError(f"seq_len must be an integer, got {seq_len!r}.")
            if seq_len < 0:
                raise ValueError(f"seq_len must be at least 0, got {seq_len}.")
            sequences = _count(ids)  # before memory is asked for
            self._check_room(sequences * int(seq_len), f", in {sequences} sequences of {seq_len}")
            return ids.repeat_interleave(int(seq_len))
        if bounds is None:
            return ids
        _check_bounds(bounds, _count(ids))
        count = self.max_tokens
        if bounds.is_cpu and not _is_traced(bounds):
            ends = bounds.tolist()
            if ends[0] != 0 or any(a > b for a, b in itertools.pairwise(ends)):
                raise ValueError(
                    f"cu_seqlens must begin with 0 and not fall, got {ends[:8]}.\n"
                    "  hint: it has the sums of lengths, as in F.pad(lengths.cumsum(0), (1, 0))."
                )
            count = ends[-1]
            self._check_room(count)
        tokens = torch.arange(count, device=self.device)
        bounds = _sent(bounds, self.device, torch.int64)
        sequence = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)
        known = torch.cat([ids, ids.new_full((1,), -1)])  # beyond the last sequence
        return known[sequence]

    def _sort(self, ids: Tensor) -> None:
        router = _router(self.device, self.slots)
        if router is None:
            sort_tokens(ids, self.slots, *self.buffers())
            return
        router.route(ids, self.buffers())
        for buffer in self.buffers():  # which autograd has not seen change
            torch.autograd.graph.increment_version(buffer)


def _router(device: torch.device, slots: int) -> Any:
    """The backend that sorts so many slots in one kernel on this device, if one does."""
    for name in NAMES:
        backend = get(name)
        fits = backend.devices is None or device.type in backend.devices
        if fits and slots <= backend.most_routed_slots and backend.unavailable_reason() is None:
            return backend
    return None


def _is_traced(ids: Tensor) -> bool:
    """Whether the values of ids are those of no batch, or of one of many to come."""
    tracing = torch.compiler.is_compiling() or _torch.jit_is_tracing()
    return tracing or type(ids) is not Tensor


def _taken(
    named: tuple[int, ...] | None, ids: Tensor, seq_len: int | None, bounds: Tensor | None
) -> tuple[int, ...] | None:
    """Of the slots that sequences name, those that tokens take: an empty sequence has none."""
    if seq_len == 0:
        return ()
    if not named or bounds is None or not bounds.is_cpu or ids.is_meta:
        return named
    if _is_traced(ids) or _is_traced(bounds):
        return named
    ends = bounds.tolist()
    filled = (i for i, a, b in zip(ids.tolist(), ends, ends[1:], strict=False) if a < b)
    return tuple(sorted({i for i in filled if i >= 0}))


def _sent(integers: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """On the device, without waiting for what that has still to do."""
    if not integers.is_cpu or device.type == "cpu":
        return integers.to(device, dtype)
    # Pinned memory is read when the device comes to it, and may be of another batch by then; a copy
    # is not pinned. A CUDA graph would read that copy when it runs: so there it stays an error.
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return integers.to(dtype, copy=True).to(device, non_blocking=not captured)


def _count(tokens: Tensor) -> int:
    """How many there are. Not `len`: torch.export would hold it fast, as torch.jit.trace does."""
    if torch.compiler.is_compiling() or not _torch.jit_is_tracing():
        return tokens.shape[0]
    with _torch.jit_tracing_paused():
        return tokens.shape[0]


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and value is not True and value is not False


def _as_ids(ids: Any) -> Tensor:
    """The ids as a vector of integers."""
    if isinstance(ids, Tensor):
        _check_integers("ids", ids)
        return ids.reshape(-1)
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise TypeError(f"ids must be integers, got {ids!r}.\n  hint: bank.ids(names) gives them.")
    listed = list(ids)
    if not all(map(_is_integer, listed)):
        raise TypeError(
            f"ids must be integers, got {listed[:8]!r}.\n  hint: bank.ids(names) gives them."
        )
    most = torch.iinfo(torch.int64).max  # no routing has as many slots; the range is told later
    return torch.tensor(
        [max(-most, min(int(i), most)) for i in listed], dtype=torch.int64, device="cpu"
    )


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got a tensor of {name_of(tensor.dtype)}.")


def _check_bounds(bounds: Any, sequences: int) -> None:
    if not isinstance(bounds, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(bounds).__name__}.")
    _check_integers("cu_seqlens", bounds)
    if bounds.shape != (sequences + 1,):
        raise ValueError(
            f"cu_seqlens must have shape [{sequences + 1}] for {sequences} sequences, got "
            f"{list(bounds.shape)}.\n  hint: it begins with 0 and ends with the tokens."
        )


def sort_tokens(
    ids: Tensor, slots: int, token_slots: Tensor, order: Tensor, tiles: Tensor, slot_offsets: Tensor
) -> None:
    """Fill the buffers for ids [T], in operations whose shapes do not depend on their values."""
    device, count = ids.device, _count(ids)
    group = torch.where((ids < 0) | (ids >= slots), slots, ids).long()  # the last: no adapter
    token_slots.fill_(-1)
    token_slots[:count] = torch.where(group == slots, -1, group)
    counts = torch.zeros(slots + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, group, torch.ones_like(group))
    filled = torch.div(counts + TILE - 1, TILE, rounding_mode="floor") * TILE
    filled[slots] = counts[slots]
    ends = filled.cumsum(0)
    starts = ends - filled
    slot_offsets[: slots + 1] = starts
    slot_offsets[slots + 1] = ends[slots]
    tokens = torch.argsort(group, stable=True)
    groups = group[tokens]
    first = counts.cumsum(0) - counts
    place = torch.arange(count, device=device) - first[groups] + starts[groups]
    order.fill_(-1)
    order[place] = tokens.to(order.dtype)
    of_group = torch.div(filled + TILE - 1, TILE, rounding_mode="floor")
    last_tile = of_group.cumsum(0)
    tile = torch.arange(tiles.shape[0], device=device)
    owner = torch.searchsorted(last_tile, tile, right=True)
    exists = owner <= slots
    owner = owner.clamp(max=slots)
    before = (tile - (last_tile - of_group)[owner]) * TILE
    rows = (counts[owner] - before).clamp(min=0, max=TILE)
    tiles[:, 0] = torch.where(exists, owner, -1)
    tiles[:, 1] = torch.where(exists, starts[owner] + before, 0)
    tiles[:, 2] = torch.where(exists, rows, 0)
