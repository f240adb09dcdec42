"""`AdapterBanks`: the banks of a whole model, and which adapters its next batch takes."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor

from adapterkern.grouped.routing import AdapterRouting
from adapterkern.modules.adapter_bank import AdapterBank, in_graph
from adapterkern.modules.bottleneck import BottleneckAdapter
from adapterkern.validation import given_tensors

KEPT = 8  # routings of a route: what a batch needs, not every length of a long generation
Taken = str | tuple[str | None, ...] | AdapterRouting | None


class AdapterBanks(Mapping[str, AdapterBank]):
    """The banks that `insert_banks` has put into a model, by the names of the modules they follow.

        banks.add("fr", bottleneck_size=48)  # at every place, the identity until it is trained
        banks.load("de", "de.pt")            # what banks.save("de", "de.pt") wrote
        banks.route(["fr", None, "de"])      # an adapter, or none, for each sequence
        y = model(batch_of_three)
        banks.route("fr")                    # one for all
        banks.route(None)                    # the base model, as at the start

    What `route` says holds until it is called again, in every thread. A backward under gradient
    checkpointing runs the forward again, with what is routed by then; other backwards keep their
    own. A copy of the model has a route of its own: `copy.deepcopy((model, banks))` gives both, and
    `model.banks = banks` lets them travel together.
    """

    def __init__(self, banks: Mapping[str, AdapterBank], route: "Route") -> None:
        self._banks, self._route = dict(banks), route

    def __getitem__(self, place: str) -> AdapterBank:
        """The bank behind the module of that name.

        Raises:
            KeyError: there is none.
        """
        if place not in self._banks:
            raise KeyError(
                f"no bank at {place!r}; its places are {', '.join(self)}, its adapters "
                f"{', '.join(self.names) or 'none'}, which banks.adapters(name) gives."
            )
        return self._banks[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._banks)

    def __len__(self) -> int:
        return len(self._banks)

    def __repr__(self) -> str:
        return f"AdapterBanks({len(self)} places, adapters: {', '.join(self.names) or 'none'})"

    @property
    def names(self) -> list[str]:
        """The adapters that any place has, the oldest first."""
        return list(dict.fromkeys(name for bank in self.values() for name in bank.names))

    def adapters(self, name: str) -> dict[str, BottleneckAdapter]:
        """The adapters of that name by place, to be trained or frozen.

        Raises:
            KeyError: no place has one.
        """
        self._check_known([name])
        return {place: bank[name] for place, bank in self.items() if name in bank}

    def add(
        self,
        name: str,
        adapters: Mapping[str, BottleneckAdapter | Mapping[str, Tensor]] | None = None,
        **options: Any,
    ) -> dict[str, BottleneckAdapter]:
        """Add an adapter to the model: to all places or to none.

        Args:
            name: a new one.
            adapters: copied, by place: `BottleneckAdapter`s or their state dicts, as `adapters` and
                `integrations.peft.adapters_in` give them. A place that is left out adapts nothing
                under that name. None: new adapters at every place.
            options: of new ones, those of `BottleneckAdapter`: bottleneck_size (H / 16 units if not
                given), scaling, init.

        Returns:
            The adapters as the banks have them, by place.

        Raises:
            TypeError: adapters are no mapping, or there are options beside them.
            ValueError: a place is unknown or there is none; or, naming the place, as
                `AdapterBank.add`.
        """
        if adapters is None:
            adapters = {place: _new_adapter(bank, options) for place, bank in self.items()}
        elif options:
            raise TypeError(f"only new adapters take {', '.join(options)}; these are given.")
        elif not isinstance(adapters, Mapping):
            raise TypeError(
                f"adapters must be a dict of them by place, got {type(adapters).__name__}."
            )
        unknown = [repr(place) for place in adapters if place not in self]
        if unknown or not adapters:
            raise ValueError(
                f"adapters must be given by places of the model, got {', '.join(unknown) or '{}'}."
                f"\n  hint: its places are {', '.join(self)}"
            )
        made: dict[str, BottleneckAdapter] = {}
        try:
            for place, adapter in adapters.items():
                made[place] = self[place].add(name, adapter)
        except BaseException as error:
            for taken_back in made:
                self[taken_back].remove(name)
            if isinstance(error, TypeError | ValueError):
                raise type(error)(f"at {place}: {error}") from None
            raise
        return made

    def save(self, name: str, file: str | os.PathLike | IO[bytes]) -> None:
        """Write an adapter into a file, with activation and scaling; `load` reads it.

        Raises:
            KeyError: no place has one.
        """
        torch.save(
            {
                place: {
                    "activation": adapter.activation,
                    "scaling": None if isinstance(adapter.scaling, Tensor) else adapter.scaling,
                    "weights": adapter.state_dict(),
                }
                for place, adapter in self.adapters(name).items()
            },
            file,
        )

    def load(self, name: str, file: str | os.PathLike | IO[bytes]) -> dict[str, BottleneckAdapter]:
        """Add an adapter of that name from a file that `save` wrote, of any name.

        Places are names within the model that `insert_banks` was given, so that is to be the same.

        Returns, Raises:
            As `add`; a ValueError also where the file is no such file.
        """
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            adapters = {place: _saved_adapter(**facts) for place, facts in saved.items()}
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"{file} must be a file that AdapterBanks.save wrote: "
                f"{type(error).__name__}: {str(error).splitlines()[0]}."
            ) from error
        return self.add(name, adapters)

    def remove(self, name: str) -> None:
        """Free the slots of an adapter at every place.

        Raises:
            KeyError: no place has one.
            ValueError: the model is routed to it, or as `AdapterBank.remove`.
        """
        places = self.adapters(name)
        if self._route.takes(name, [self[place] for place in places]):
            raise ValueError(
                f"adapter {name!r} is in use: the model is routed to it.\n"
                "  hint: banks.route(None) first, or update its routing without it."
            )
        for place in places:
            self[place].check_unused(name)
        for place in places:
            self[place].remove(name)

    def route(self, names: Sequence[str | None] | str | AdapterRouting | None) -> None:
        """Say which adapters the next batches take, until the next call.

        Args:
            names: a list with a name or None for each sequence, where hidden states are [B, L, H],
                or have the tokens of B sequences of one length one after another, as [B L, H];
                beams count as sequences. A single name: of all sequences. None: the base model
                alone. Or a routing of your own, which you update with `ids` of these banks: for
                packed sequences, for layers that see a part of the tokens or the sequences behind
                the tokens, for CUDA graphs, which read its buffers, and for torch.compile, which
                compiles again for every other list of names.

        Raises:
            TypeError: it is nothing of these.
            KeyError: no place has an adapter of that name.
        """
        taken: Taken
        if names is None or isinstance(names, str | AdapterRouting):
            taken = names
        elif isinstance(names, Sequence):
            taken = tuple(names)
        else:
            raise TypeError(
                "names must be a list of names, one name, None or an AdapterRouting, got "
                f"{names!r}."
            )
        if not isinstance(taken, AdapterRouting):
            of_batch = taken if isinstance(taken, tuple) else (taken,)
            self._check_known([name for name in of_batch if name is not None])
        self._route.set(taken)

    def ids(self, names: Iterable[str | None]) -> Tensor:
        """The slots of adapters, for a routing of your own: int32, -1 for None.

        Raises:
            KeyError: a place has no adapter of that name.
            ValueError: an adapter has not the same slot at every place.
            TypeError: names is a single string, or no list.
        """
        if isinstance(names, str):
            raise TypeError(f"names must be a list of names, got {names!r}.")
        listed = list(names)
        wanted = [name for name in listed if name is not None]
        self._check_known(wanted)
        for place, bank in self.items():
            lacking = [name for name in wanted if name not in bank]
            if lacking:
                raise KeyError(
                    f"adapter {lacking[0]!r} is not at {place}, and a routing needs it at every "
                    "place; banks.route(names) does not."
                )
        if len({tuple(bank.slots_of(listed)) for bank in self.values()}) > 1:
            raise ValueError(
                "a routing serves places where every adapter has the same slot, and these have not "
                f"the same for {', '.join(dict.fromkeys(map(str, listed)))}.\n"
                "  hint: banks.route(names) serves them; or add and remove at all places alike."
            )
        return next(iter(self.values())).ids(listed)

    def _check_known(self, names: Iterable[Any]) -> None:
        there = self.names
        unknown = dict.fromkeys(repr(name) for name in names if name not in there)
        if unknown:
            raise KeyError(
                f"unknown adapters: {', '.join(unknown)} (these banks have "
                f"{', '.join(there) or 'none'})."
            )


class Route:
    """What the banks of a model share: the adapters that its batch takes."""

    def __init__(self) -> None:
        self.set(None)

    def set(self, taken: Taken) -> None:
        # Routings by slots and number of tokens, in both of which layers may differ, and the steps
        # of a generation in the latter. Every route makes its own, for an earlier batch that waits
        # for its backward needs its own as they were. In one tuple, as threads read both.
        self._now: tuple[Taken, dict[tuple, AdapterRouting]] = taken, {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_now": (self._now[0], {})}

    def takes(self, name: str, banks: Iterable[AdapterBank]) -> bool:
        """Whether a batch takes the adapter of this name, which these banks have."""
        taken, _ = self._now
        if isinstance(taken, AdapterRouting):
            return any(bank.slots_of([name])[0] in taken.used_slots() for bank in banks)
        return name in taken if isinstance(taken, tuple) else name == taken

    def is_base(self) -> bool:
        """Whether the base model runs alone."""
        return self._now[0] is None

    def run(self, bank: AdapterBank, x: Tensor) -> Tensor:
        """The hidden states behind a bank."""
        taken, routings = self._now
        if taken is None:
            return x
        if isinstance(taken, str):
            return bank[taken](x) if taken in bank else x
        if not isinstance(taken, AdapterRouting):
            taken = _routing_of(taken, routings, bank, x)
        return bank(x, taken)


def _routing_of(
    names: tuple[str | None, ...], routings: dict[tuple, AdapterRouting], bank: AdapterBank,
    x: Tensor,
) -> AdapterRouting:  # fmt: skip
    """The routing of these names for this bank and the tokens of x, kept for the next layer."""
    given_tensors({"x": x}, ())  # which refuses what has no shape
    sequences, tokens = len(names), x.shape[:-1].numel()
    fits = x.shape[0] == sequences if x.dim() > 2 else tokens % (sequences or tokens + 1) == 0
    if not fits:
        raise ValueError(
            f"banks.route was given names of {sequences} sequences, which must be those of the "
            f"hidden states, [B, L, H] or [B L, H], got {list(x.shape)}.\n"
            "  hint: name each sequence of this batch, beams too; or route one name, or None."
        )
    slots = tuple(bank.slots_of(names))
    key = slots, bank.slots, tokens, x.device
    if key in routings:
        return routings[key]
    with torch.inference_mode(False):  # the next batch may train
        routing = AdapterRouting(max(tokens, 1), bank.slots, device=x.device)
        routing.update(slots, seq_len=tokens // max(sequences, 1))
    # What a graph makes is not there outside of it, and torch's fake tensors have no values.
    if not in_graph(x) and type(routing.order) is Tensor:
        routings[key] = routing
        for oldest in list(routings)[:-KEPT]:
            routings.pop(oldest, None)
    return routing


def _new_adapter(bank: AdapterBank, options: dict[str, Any]) -> BottleneckAdapter:
    of_bank: dict[str, Any] = {
        "activation": bank.activation,
        "bias": bank.down_biases is not None,
        "device": bank.down_weights.device,
        "dtype": bank.down_weights.dtype,
    }
    return BottleneckAdapter(bank.hidden_size, **of_bank | options)


def _saved_adapter(
    activation: str, scaling: float | None, weights: dict[str, Tensor]
) -> BottleneckAdapter:
    units, hidden_size = weights["down_proj.weight"].shape
    adapter = BottleneckAdapter(
        hidden_size, units, activation=activation, bias="down_proj.bias" in weights,
        scaling="learned" if scaling is None else scaling, device="meta",
    )  # fmt: skip
    adapter.load_state_dict(weights, assign=True)
    return adapter
