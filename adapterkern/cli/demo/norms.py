"""The demo's adapters with what follows them, residual and norm, in their pass."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adapterkern.cli.demo.checks import (
    GRADIENT_TOLERANCE,
    Ways,
    adapter_gradients,
    eager_adapters,
    fused_backend,
    longest_rows,
    times_in_turn,
)
from adapterkern.cli.demo.corpus import Task
from adapterkern.cli.demo.findings import Check, StepTime
from adapterkern.cli.demo.model import TextClassifier, adapters_of
from adapterkern.cli.demo.training import Encoded
from adapterkern.integrations.transformers import fuse_norms, unfuse_norms
from adapterkern.parity import metric


@contextmanager
def norms_in_the_pass(model: TextClassifier) -> Iterator[int]:
    """Within the block adapters run in one pass with the add and the norm behind them; yields how
    many do. None in a model whose blocks are not known, nor where adapters sit beside a block."""
    try:
        report = fuse_norms(model.encoder)
    except ValueError:  # it finds no place, which it tells before it changes anything
        yield 0
        return
    try:
        yield sum(row.fused and row.follows != "add" for row in report.rows)
    finally:
        unfuse_norms(model.encoder)


@contextmanager
def _reference_by_name(model: TextClassifier, data: Encoded) -> Iterator[None]:
    """Within the block every adapter that the reference runs names it: under "auto" the reference
    leaves the norm to torch, and torch would be compared with itself."""
    backend = fused_backend(model, data)
    adapters = adapters_of(model.encoder) if backend == "reference" else []
    before = [adapter.backend for adapter in adapters]
    for adapter in adapters:
        adapter.backend = backend
    try:
        yield
    finally:
        for adapter, name in zip(adapters, before, strict=True):
            adapter.backend = name


def check_norms(model: TextClassifier, task: Task, data: Encoded, batch_size: int) -> Check | None:
    """Loss and adapter gradients of one real batch, the norm in the adapters' pass against the norm
    as a layer; None for a model with no norm behind its adapters."""
    model.encoder.set_adapter(task.name)
    model.eval()  # in training there is dropout between adapter and norm
    rows = longest_rows(data, batch_size)
    apart = _results(model, task, data, rows)
    with norms_in_the_pass(model) as count, _reference_by_name(model, data):
        together = _results(model, task, data, rows)
    if not count:
        return None
    errors = {name: metric(together[name], apart[name]) for name in apart}
    worst = max(errors, key=errors.__getitem__)
    return Check(
        "the norm in the adapter's pass gives what it gives as a layer",
        all(error <= GRADIENT_TOLERANCE for error in errors.values()),  # false for NaN too
        f"{count} of {len(adapters_of(model.encoder))} adapters; loss and {len(errors) - 1} "
        f"gradients, largest relative RMS error {errors[worst]:.1e} "
        f"(tolerance {GRADIENT_TOLERANCE:.0e})",
        {"errors": errors, "tolerance": GRADIENT_TOLERANCE, "adapters": count},
    )


def time_forwards(
    model: TextClassifier, task: Task, data: Encoded, batch_size: int, repeats: int
) -> list[StepTime]:
    """Median time of a batch's logits without gradients: with the norm in the adapters' pass,
    fused, and eager, in turn. Nothing for a model with no norm behind its adapters."""
    model.encoder.set_adapter(task.name)
    model.eval()
    with norms_in_the_pass(model) as count:
        if not count:
            return []
    ids, mask, _ = data.batch(longest_rows(data, batch_size))

    def forward(autocast: AbstractContextManager) -> None:
        with torch.no_grad(), autocast:
            model(task.name, ids, mask)

    ways: Ways = {
        "norm_ms": lambda: norms_in_the_pass(model),
        "fused_ms": nullcontext,
        "eager_ms": lambda: eager_adapters(model),
    }
    backend_under = partial(fused_backend, model, data)
    return times_in_turn("forwards", forward, ways, StepTime, backend_under, ids, repeats)


def _results(
    model: TextClassifier, task: Task, data: Encoded, rows: list[int]
) -> dict[str, Tensor]:
    ids, mask, targets = data.batch(rows)
    with torch.no_grad():
        loss = cross_entropy(model(task.name, ids, mask), targets)
    return {"loss": loss, **adapter_gradients(model, task, data, rows)}
