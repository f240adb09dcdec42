"""Many adapters of the demo's model in one batch, through banks, against a run for each adapter."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapterkern.cli.demo.checks import GRADIENT_TOLERANCE, Ways, longest_rows, times_in_turn
from adapterkern.cli.demo.findings import Check, MixedTime
from adapterkern.cli.demo.model import TextClassifier, adapters_of
from adapterkern.cli.demo.training import Encoded
from adapterkern.grouped.routing import AdapterRouting
from adapterkern.integrations.peft import BottleneckConfig, BottleneckLinear
from adapterkern.modules.adapter_bank import AdapterBank
from adapterkern.modules.explain import explain
from adapterkern.parity import metric

ADAPTERS = 8  # the trained ones, and random ones
TEXTS = 2  # for each adapter, and as many without one


class MixedBatch:
    """Texts of which each takes its own adapter, and some none; `open_mixed_batch` makes one.

    Where an adapter sits in the model there is a bank with the same weights, put in place by
    `banks_in_place`. They share a routing.
    """

    def __init__(self, model: TextClassifier, names: list[str], data: Encoded) -> None:
        self.model = model.eval()  # in training there is dropout between a layer and its adapter
        self.rows = {
            name: list(range(TEXTS * place, TEXTS * (place + 1)))
            for place, name in enumerate([*names, None])
        }
        self.names = [name for name, rows in self.rows.items() for _ in rows]
        self.ids, self.mask, _ = data.batch(longest_rows(data, len(self.names)))
        self.device = data.device
        layers = [m for m in model.encoder.modules() if isinstance(m, BottleneckLinear)]
        self.banks = {layer: _bank_of(layer, names) for layer in layers}
        self.are_in_place = False
        self._read: dict[nn.Module, Tensor] = {}  # what the FFN reads whose adapters are beside it
        self._routings: dict[int, AdapterRouting] = {}  # by tokens of a text, for one run

    @contextmanager
    def banks_in_place(self) -> Iterator[None]:
        """Within the block the banks run, and PEFT's adapters do not."""
        hooks = [
            layer.register_forward_hook(partial(self._adapt, bank))
            for layer, bank in self.banks.items()
        ]
        for layer in self.banks:
            if layer.reads is not None and layer.parallel:
                reader = layer.reads[0]
                hooks.append(reader.register_forward_pre_hook(partial(self._keep, layer)))
        self.are_in_place = True
        try:
            with self.model.encoder.disable_adapter():
                yield
        finally:
            self.are_in_place = False
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def features(self) -> Tensor:
        """[B, H]: in one run where the banks are in place, otherwise in a run for each adapter."""
        if self.are_in_place:
            self._routings.clear()
            return self.model.features(self.ids, self.mask)
        return torch.cat([self._switched_to(name) for name in self.rows])

    def backend(self, dtype: torch.dtype | None = None) -> str:
        """The backend that runs the banks, under autocast to `dtype`."""
        bank = next(iter(self.banks.values()))
        x = torch.empty(self.ids.numel(), bank.hidden_size, device=self.device, dtype=dtype)
        with torch.no_grad():
            return explain(bank, x, self._routing_for(bank, x)).backend

    def _switched_to(self, name: str | None) -> Tensor:
        encoder, rows = self.model.encoder, self.rows[name]
        if name is not None:
            encoder.set_adapter(name)
        with encoder.disable_adapter() if name is None else nullcontext():
            return self.model.features(self.ids[rows], self.mask[rows])

    def _adapt(self, bank: AdapterBank, layer: nn.Module, _: Any, y: Tensor) -> Tensor:
        routing = self._routing_for(bank, y)
        if layer in self._read:
            return bank(self._read.pop(layer), routing, residual=y)
        return bank(y, routing)

    def _keep(self, layer: nn.Module, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._read[layer] = args[0]

    def _routing_for(self, bank: AdapterBank, y: Tensor) -> AdapterRouting:
        """Made at the first place: in some models others have more tokens, or fewer, by padding or
        pooling of their own."""
        tokens = y.shape[:-1].numel() // len(self.names)
        if tokens not in self._routings:
            made = AdapterRouting(tokens * len(self.names), bank.slots, device=y.device)
            self._routings[tokens] = made.update(bank.ids(self.names), seq_len=tokens)
        return self._routings[tokens]


@contextmanager
def open_mixed_batch(model: TextClassifier, data: Encoded) -> Iterator[MixedBatch]:
    """A batch of the longest texts for the model's adapters and, within the block, random ones,
    narrower than these or as wide."""
    encoder = model.encoder
    active, trained = encoder.active_adapter, list(encoder.peft_config)
    width, like = adapters_of(encoder)[0].bottleneck_size, encoder.peft_config[trained[0]]
    added = [f"random_{number}" for number in range(1, ADAPTERS - len(trained) + 1)]
    try:
        for place, name in enumerate(added):
            size = max(1, width // (1 + place % 3))
            config = BottleneckConfig(
                bottleneck_size=size, init="bert", placement=like.placement, scaling=like.scaling
            )
            encoder.add_adapter(name, config)
        yield MixedBatch(model, [*trained, *added], data)
    finally:
        encoder.set_adapter(active)  # PEFT warns of an active adapter that goes
        for name in added:
            if name in encoder.peft_config:
                encoder.delete_adapter(name)


def check_mixed(batch: MixedBatch) -> Check:
    """What every text gets in the mixed batch, against a run of its adapter alone."""
    switched = batch.features()
    with batch.banks_in_place():
        mixed = batch.features()
    errors = {str(n): metric(mixed[rows], switched[rows]) for n, rows in batch.rows.items()}
    worst = max(errors, key=errors.__getitem__)
    backend = batch.backend()
    return Check(
        "a mixed batch gives each text what its adapter alone gives",
        all(error <= GRADIENT_TOLERANCE for error in errors.values()),  # false for NaN too
        f"{len(batch.rows) - 1} adapters, trained and random, and none, {TEXTS} texts each; "
        f"largest relative RMS error {errors[worst]:.1e} (tolerance {GRADIENT_TOLERANCE:.0e})",
        {"errors": errors, "tolerance": GRADIENT_TOLERANCE, "backend": backend},
    )


def time_mixed(batch: MixedBatch, repeats: int) -> list[MixedTime]:
    """Median time of a mixed batch, and of a run for each adapter with its part of the batch, in
    turn."""

    def run(autocast: AbstractContextManager) -> None:
        with autocast:
            batch.features()

    ways: Ways = {"mixed_ms": batch.banks_in_place, "switched_ms": nullcontext}
    made = partial(MixedTime, runs=len(batch.rows))
    return times_in_turn("mixed batches", run, ways, made, batch.backend, batch.ids, repeats)


def _bank_of(layer: Any, names: list[str]) -> AdapterBank:
    """A bank with copies of a layer's adapters."""
    adapters = [layer.bottleneck_adapter[name] for name in names]
    weight = adapters[0].up_proj.weight
    bank = AdapterBank(
        adapters[0].hidden_size, max(a.bottleneck_size for a in adapters), len(names),
        activation=adapters[0].activation, device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    for name, adapter in zip(names, adapters, strict=True):
        bank.add(name, adapter)
    return bank
