"""`AdapterBanks`: the banks of a whole model, and which adapters its next batch takes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkern.grouped.routing import AdapterRouting
from adapterkern.modules.adapter_bank import AdapterBank
from adapterkern.modules.bottleneck import BottleneckAdapter

Taken = str | tuple[str | None, ...] | AdapterRouting | None


class AdapterBanks(Mapping[str, AdapterBank]):
    """The banks that `insert_banks` has put into a model, by the names of the modules they follow.

        banks.add("fr", bottleneck_size=48)  # at every place, the identity until it is trained
        banks.add("de", saved)               # {place: adapter}, also of a part of the places
        banks.route(["fr", None, "de"])      # an adapter, or none, for each sequence
        y = model(batch_of_three)
        banks.route("fr")                    # one for all
        banks.route(None)                    # the base model, as at the start

    What `route` says holds until it is called again, in every thread. A backward under gradient
    checkpointing runs the forward again, with what is routed by then; other backwards keep their
    own. A copy of the model has a route of its own: `copy.deepcopy((model, banks))` gives both.
    """

    def __init__(self, banks: Mapping[str, AdapterBank], route: "Route") -> None:
        self._banks, self._route = dict(banks), route

    def __getitem__(self, place: str) -> AdapterBank:
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
        """The adapters of that name by place, to be trained, frozen or saved; `add` takes them.

            torch.save({p: a.state_dict() for p, a in banks.adapters("fr").items()}, "fr.pt")

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
            options: of new ones, as `bottleneck_size`, `scaling` and `init` of `BottleneckAdapter`.

        Returns:
            The adapters as the banks have them, by place.

        Raises:
            TypeError: adapters are no mapping, or are given together with options.
            ValueError: a place is unknown or there is none; or, naming the place, as
                `AdapterBank.add`.
        """
        if adapters is None:
            adapters = {place: _new_adapter(bank, options) for place, bank in self.items()}
        elif options:
            raise TypeError(
                f"options are those of new adapters, got {', '.join(options)} and adapters."
            )
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
        except (TypeError, ValueError) as error:
            for taken_back in made:
                self[taken_back].remove(name)
            raise type(error)(f"at {place}: {error}") from None
        return made

    def remove(self, name: str) -> None:
        """Free the slots of an adapter at every place.

        Raises:
            KeyError: no place has one.
            ValueError: the model is routed to it.
        """
        places = self.adapters(name)
        if self._route.names(name):
            raise ValueError(
                f"adapter {name!r} is in use: the model is routed to it.\n"
                "  hint: banks.route(None) first."
            )
        for place in places:
            self[place].check_unused(name)
        for place in places:
            self[place].remove(name)

    def route(self, names: Iterable[str | None] | str | AdapterRouting | None) -> None:
        """Say which adapters the next batches take, until the next call.

        Args:
            names: a name or None for each sequence, where hidden states are [B, L, H], or have the
                tokens of B sequences of one length one after another, as [B L, H]; beams count as
                sequences. A single name: of all sequences. None: the base model alone. Or a routing
                of your own, which you update with `ids` of these banks: for packed sequences, for
                CUDA graphs, which read its buffers, and for torch.compile, which compiles again for
                every other list of names.

        Raises:
            TypeError: it is nothing of these.
            KeyError: no place has an adapter of that name.
        """
        taken: Taken
        if names is None or isinstance(names, str | AdapterRouting):
            taken = names
        elif isinstance(names, Iterable):
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
        listed = names if isinstance(names, str) else list(names)  # which each bank refuses
        first, *others = (bank.ids(listed) for bank in self.values())
        if any(not torch.equal(first, other) for other in others):
            raise ValueError(
                "a routing serves places where every adapter has the same slot, and these have not "
                f"the same for {', '.join(dict.fromkeys(map(str, listed)))}.\n"
                "  hint: banks.route(names) serves them; or add and remove at all places alike."
            )
        return first

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
        self.taken: Taken = None
        # One for each layout of slots and number of tokens, since layers may differ in both, and so
        # do the steps of a generation. New ones at every `set`, for an earlier batch that waits for
        # its backward needs its own as they were.
        self._routings: dict[tuple, AdapterRouting] = {}

    def set(self, taken: Taken) -> None:
        self.taken, self._routings = taken, {}

    def names(self, name: str) -> bool:
        """Whether a batch takes this adapter; the routings of a user are asked by the banks."""
        return name in self.taken if isinstance(self.taken, tuple) else name == self.taken

    def run(self, bank: AdapterBank, x: Tensor) -> Tensor:
        taken = self.taken
        if taken is None:
            return x
        if isinstance(taken, str):
            return bank[taken](x) if taken in bank else x
        return bank(x, taken if isinstance(taken, AdapterRouting) else self._routing_of(bank, x))

    def _routing_of(self, bank: AdapterBank, x: Tensor) -> AdapterRouting:
        assert isinstance(self.taken, tuple)
        sequences, tokens = len(self.taken), x.shape[:-1].numel()
        if (x.dim() > 2 and x.shape[0] != sequences) or tokens % max(sequences, 1):
            raise ValueError(
                f"banks.route was given names of {sequences} sequences, which must be those of the "
                f"hidden states, [B, L, H] or [B L, H], got {list(x.shape)}.\n"
                "  hint: name each sequence of this batch, beams too; or route one name, or None."
            )
        slots = tuple(bank.slots_of(self.taken))
        key = slots, bank.slots, tokens, x.device
        if key not in self._routings:
            routing = AdapterRouting(max(tokens, 1), bank.slots, device=x.device)
            self._routings[key] = routing.update(slots, seq_len=tokens // max(sequences, 1))
        return self._routings[key]


def _new_adapter(bank: AdapterBank, options: dict[str, Any]) -> BottleneckAdapter:
    weights = bank.down_weights
    of_bank: dict[str, Any] = {"activation": bank.activation, "bias": bank.down_biases is not None}
    return BottleneckAdapter(
        bank.hidden_size, device=weights.device, dtype=weights.dtype, **of_bank | options
    )
