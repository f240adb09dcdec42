"""The host work of a call, done once: later calls like it fill in addresses and launch.

What a backend decides in Python (plans, grids, strides, flags) follows from the options of a call
and from the layout of its tensors. `Repeats` keys on all of that. The second call of a kind runs
the backend's own code as the first did, but tells a `Recording` of the memory that it makes and of
its launches; the next ones make the same memory and launch with the same arguments but for
addresses and the stream. All layers of the same sizes share one recording.

A recording that does not know where an address comes from is not kept, as after a copy of a tensor
with gaps: such calls run the backend's code every time, and are right all the same.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from adapterkern.backends.base import allow_tf32
from adapterkern.spec import AdapterCall, options_but_scale

ALIGNMENT = 16  # bytes: Triton compiles one kernel for addresses that divide by it, one for others
_SCRATCH_ALIGNMENT = 256  # bytes, as cudaMalloc gives at least
_MOST_KINDS = 1024  # known; a process that sees more kinds of calls records some of them again
_SEEN, _ORDINARY = "seen", "ordinary"  # once, and not to be repeated

Results = Sequence[Any]  # tensors and None


class Slot(NamedTuple):
    """Stands for a value that differs from call to call: entry `number` of its `table` (inputs,
    made, stream or scale), for addresses `offset` bytes further on.
    """

    table: str
    number: int = 0
    offset: int = 0


STREAM = Slot("stream")
SCALE = Slot("scale")


class Option(NamedTuple):
    """A float that a launch takes from the options of the call, and not from its scale."""

    value: float


class Layout(NamedTuple):
    """A tensor at the start of its storage, which has `elements` where they are more than it spans:
    rows that are padded are padded to the end of the last one.
    """

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    elements: int | None

    @staticmethod
    def of(tensor: Tensor) -> "Layout":
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in pairs)
        held = tensor.untyped_storage().nbytes() // tensor.itemsize
        elements = None if held <= span else held
        return Layout(tensor.shape, tensor.stride(), tensor.dtype, elements)

    def make(self, x: Tensor) -> Tensor:
        """A new tensor like it on the device of x."""
        size, stride, dtype, elements = self
        if elements is None:
            return x.new_empty_strided(size, stride, dtype=dtype)
        return x.new_empty(elements, dtype=dtype).as_strided(size, stride)


class Repeat:
    """The launches of one kind of call, ready for the addresses of the next one."""

    def __init__(
        self,
        results: list[Layout | None],
        offsets: list[int],
        scratch: int,
        constants: list[Any],
        steps: list[tuple[Callable, itemgetter]],
    ) -> None:
        self._results, self._offsets, self._scratch = results, offsets, scratch
        self._constants, self._steps = constants, steps

    def __call__(
        self, x: Tensor, addresses: list[int], stream: int, scale: float
    ) -> Results | None:
        """Launch, and return the results; None where new memory is not aligned as the first was."""
        results = [None if layout is None else layout.make(x) for layout in self._results]
        made = [0 if tensor is None else tensor.data_ptr() for tensor in results]
        if self._scratch:  # one piece for all that does not outlive the call
            scratch = x.new_empty(self._scratch, dtype=torch.uint8)
            start = scratch.data_ptr()
            made += [start + offset for offset in self._offsets]
        if not _aligned(made):
            return None
        values = (*addresses, *made, stream, scale, *self._constants)
        for launch, pick in self._steps:
            launch(*pick(values))
        return results


class Recording:
    """Notes what a backend's code does for one call. `addresses` are those of the call's tensors.

    Subclasses add how their language launches. keeps: whether a `Repeat` is to come of it. scale:
    the call's; a launch that takes it gets this very object, by which it is known.
    """

    def __init__(self, addresses: Sequence[int], keeps: bool = True, scale: float = 1.0) -> None:
        self._num_inputs, self._keeps, self._scale = len(addresses), keeps, scale
        self._slots = {a: Slot("inputs", i) for i, a in enumerate(addresses) if a}
        self._made: list[Tensor] = []  # alive, so that no address is given to two
        self._steps: list[tuple[Callable, list]] = []
        self._held: list[Any] = []

    def own(self, tensor: Tensor | None) -> Any:
        """Note memory that was made for this call; a repetition makes it anew."""
        if tensor is None or tensor.numel() == 0 or not self._keeps:
            return tensor
        address = tensor.data_ptr()
        if tensor.storage_offset() > 0 or address in self._slots:
            self._keeps = False  # a part or a second view of other memory
        self._slots[address] = Slot("made", len(self._made))
        self._made.append(tensor)
        return tensor

    def slot(self, address: int) -> Slot | int:
        """What stands for an address in a repetition; 0 is nothing, in each."""
        if address == 0 or address in self._slots:
            return self._slots.get(address, 0)
        for index, tensor in enumerate(self._made):
            offset = address - tensor.data_ptr()
            if 0 < offset < tensor.untyped_storage().nbytes():
                return Slot("made", index, offset)
        self._keeps = False  # a copy, which a repetition would not make
        return 0

    def step(self, launch: Callable, arguments: Sequence[Any], held: Any = None) -> None:
        """Note that `launch(*arguments)` has run. held: what must live as long as it may run."""
        assert len(arguments) > 1  # with one alone, itemgetter gives no tuple
        given = list(arguments)
        if self._scale != 1.0:
            given = [SCALE if argument is self._scale else argument for argument in given]
            if any(isinstance(argument, float) for argument in given):
                self._keeps = False  # what another scale makes of it is not known
        self._steps.append((launch, given))
        self._held.append(held)

    def finish(self, results: Results) -> Repeat | None:
        """The repetition of what ran, None where the run cannot be repeated."""
        if not self._keeps:
            return None
        places = [None if r is None else self._slots.get(r.data_ptr()) for r in results]
        returned = {place.number for place in places if place is not None and place.table == "made"}
        if len(returned) < sum(result is not None for result in results):
            return None
        if not _aligned([tensor.data_ptr() for tensor in self._made]):
            return None
        starts, scratch = {}, 0
        for index, tensor in enumerate(self._made):
            if index not in returned:
                starts[index] = scratch
                pieces = -(-tensor.untyped_storage().nbytes() // _SCRATCH_ALIGNMENT)
                scratch += pieces * _SCRATCH_ALIGNMENT
        used = {a for _, given in self._steps for a in given if isinstance(a, Slot)}
        inner = sorted(s for s in used if s.table == "made" and s not in places)
        if any(slot.number in returned for slot in inner):
            return None  # the inside of a result, which is no scratch memory
        offsets = [starts[slot.number] + slot.offset for slot in inner]
        inputs = [Slot("inputs", index) for index in range(self._num_inputs)]
        order = [*inputs, *places, *inner, STREAM, SCALE]  # of the values of a repetition
        position = {slot: index for index, slot in enumerate(order)}
        constants: list[Any] = []

        def index_of(argument: Any) -> int:
            if isinstance(argument, Slot):
                return position[argument]
            constants.append(argument.value if isinstance(argument, Option) else argument)
            return len(order) + len(constants) - 1

        steps = [(launch, itemgetter(*map(index_of, given))) for launch, given in self._steps]
        layouts = [None if result is None else Layout.of(result) for result in results]
        return Repeat(layouts, offsets, scratch, constants + self._held, steps)


Kind = TypeVar("Kind", bound=Recording)


class Repeats(Generic[Kind]):
    """The repetitions of one backend, by all that its code reads of a call."""

    def __init__(self, recording: type[Kind]) -> None:
        self._recording = recording
        self._known: dict[tuple, Repeat | str] = {}

    def run(
        self,
        inputs: tuple[Tensor | None, ...],
        options: tuple,
        stream: int,
        code: Callable[[Kind], Results],
        scale: float = 1.0,
    ) -> Results:
        """Repeat what `code` did for an earlier call of this kind, or run it.

        Args:
            inputs: all tensors that the launches read, x first, on one device.
            options: all else that `code` reads, and what it takes from the process. Values that
                compare equal must mean the same.
            stream: that of the launches.
            scale: handed to launches as it is, if at all.
            code: returns tensors that it owns (`Recording.own`), or None; the same at every call
                of this kind.
        """
        addresses = [0 if t is None else t.data_ptr() for t in inputs]
        layouts = [None if t is None else (t.shape, t.stride(), t.dtype) for t in inputs]
        x: Any = inputs[0]
        key = options, x.device, _pattern(addresses), *layouts
        known = self._known.get(key)
        if isinstance(known, Repeat):
            results = known(x, addresses, stream, scale)
            if results is not None:
                return results
        # To note a call takes as long as the call: not for one that comes once, as some number of
        # tokens may.
        recording = self._recording(addresses, known is _SEEN, scale)
        results = code(recording)
        if known is _SEEN:
            self._known[key] = recording.finish(results) or _ORDINARY
        elif known is None:
            if len(self._known) >= _MOST_KINDS:
                self._known.clear()
            self._known[key] = _SEEN
        return results

    def clear(self) -> None:
        """Forget every recording, when something changes that no key holds."""
        self._known.clear()


def options_of(call: AdapterCall) -> tuple:
    """All that the launches of a call depend on beside its tensors, what a backend adds, and the
    scale, which a schedule may change at every call: of it, whether there is one.
    """
    tf32 = call.compute_dtype == torch.float32 and allow_tf32()
    return tf32, call.scale == 1.0, options_but_scale(call)


def _aligned(addresses: list[int]) -> bool:
    """Whether all divide by `ALIGNMENT`, at a third of the time of all() over a generator."""
    bits = 0
    for address in addresses:
        bits |= address
    return bits % ALIGNMENT == 0


def _pattern(addresses: list[int]) -> tuple:
    """Which tensors are aligned, and which begin at the same address: a recording knows its tensors
    by that. Nearly always all are and none do, which is the empty tuple.
    """
    absent = addresses.count(0)
    if _aligned(addresses) and len({*addresses}) == len(addresses) - max(0, absent - 1):
        return ()
    return tuple((address % ALIGNMENT == 0, addresses.index(address)) for address in addresses)
