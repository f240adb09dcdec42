"""The demo's checks of the trained model: switching, reloading, gradients, cost of a step."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adapterkern.activations import ACTIVATIONS
from adapterkern.cli.demo.corpus import Task
from adapterkern.cli.demo.findings import Check, StepTime
from adapterkern.cli.demo.model import MAX_LENGTH, TextClassifier, load_task
from adapterkern.cli.demo.progress import Progress
from adapterkern.cli.demo.recipes import RECIPES
from adapterkern.cli.demo.training import Encoded, logits_of, optimizer_for
from adapterkern.modules.bottleneck import BottleneckAdapter
from adapterkern.modules.explain import explain
from adapterkern.parity import metric

# Both paths sum in float32 in different orders, through a whole model and back. Measured: about
# 1e-6; a wrong term in the backward shows as 1e-2 or more.
GRADIENT_TOLERANCE = 1e-5
Ways = dict[str, Callable[[], AbstractContextManager]]
Time = TypeVar("Time")  # StepTime or MixedTime


def check_switching(
    model: TextClassifier, held_out: dict[Task, Encoded], recorded: dict[Task, Tensor]
) -> Check:
    """Each task's logits, recorded when its training ended, come back bit for bit, twice over."""
    differing = []
    for _ in range(2):
        for task, data in held_out.items():
            model.encoder.set_adapter(task.name)
            if not torch.equal(logits_of(model, task, data), recorded[task]):
                differing.append(task.name)
    texts = len(next(iter(held_out.values())))
    detail = f"{texts} held-out texts for each task, switched back and forth twice"
    if differing:
        detail = f"other logits than after training for {', '.join(sorted(set(differing)))}"
    return Check(
        "switching adapters gives back each task's logits, bit for bit", not differing, detail
    )


def check_reload(
    folders: dict[Task, Path],
    source: str,
    held_out: dict[Task, Encoded],
    recorded: dict[Task, Tensor],
) -> Check:
    """Each saved adapter, loaded into a fresh base model, gives the recorded logits bit for bit."""
    differing = []
    for task, folder in folders.items():
        fresh = load_task(folder, source, held_out[task].device)
        if not torch.equal(logits_of(fresh, task, held_out[task]), recorded[task]):
            differing.append(task.name)
    detail = f"{' and '.join(task.name for task in folders)}, each into a base model of its own"
    if differing:
        detail = f"other logits than before saving for {', '.join(differing)}"
    return Check(
        "saved adapters reload into a fresh base model, bit for bit", not differing, detail
    )


def check_gradients(model: TextClassifier, task: Task, data: Encoded, batch_size: int) -> Check:
    """All adapter gradients of one real batch on the trained model: adapterkern's backward against
    autograd over separate operations."""
    model.encoder.set_adapter(task.name)
    model.eval()  # no dropout: both paths see the same function
    rows = longest_rows(data, batch_size)
    fused = adapter_gradients(model, task, data, rows)
    with eager_adapters(model):
        eager = adapter_gradients(model, task, data, rows)
    errors = {name: metric(fused[name], eager[name]) for name in eager}
    worst = max(errors, key=errors.__getitem__)
    passed = all(error <= GRADIENT_TOLERANCE for error in errors.values())  # false for NaN too
    return Check(
        "the adapters' gradients are those of autograd",
        passed,
        f"{_what_ran(fused_backend(model, data), data.device)} against autograd; {len(errors)} "
        f"tensors, largest relative RMS error {errors[worst]:.1e} (tolerance "
        f"{GRADIENT_TOLERANCE:.0e})",
        {"errors": errors, "tolerance": GRADIENT_TOLERANCE},
    )


def _what_ran(backend: str, device: torch.device) -> str:
    if backend == "reference":
        where = "this CPU" if device.type == "cpu" else "this GPU"
        return f"adapterkern's hand-written backward (plain PyTorch on {where})"
    return f"adapterkern's {backend} kernels"


@contextmanager
def eager_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Within the block every adapter runs as separate torch operations with autograd."""
    adapters = [module for module in model.modules() if isinstance(module, BottleneckAdapter)]
    for adapter in adapters:
        adapter.forward = partial(_eager_forward, adapter)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for adapter in adapters:
            del adapter.forward


def fused_backend(model: torch.nn.Module, data: Encoded, dtype: torch.dtype | None = None) -> str:
    """The backend that runs the adapters for a batch of these texts, under autocast to `dtype`."""
    adapter = next(module for module in model.modules() if isinstance(module, BottleneckAdapter))
    with _autocast(data.device, dtype):
        x = torch.empty(MAX_LENGTH, adapter.hidden_size, device=data.device, dtype=dtype)
        return explain(adapter, x).backend


def time_steps(
    model: TextClassifier, task: Task, data: Encoded, batch_size: int, repeats: int
) -> list[StepTime]:
    """Median time of a training step, fused and eager in turn: float32, on a GPU bfloat16 as well.

    The steps are real and change the model; call this last. A speed claim needs a GPU and a fused
    kernel: elsewhere the same reference runs as an operation of its own, or in its parts.
    """
    model.encoder.set_adapter(task.name)
    model.train()
    optimizer = optimizer_for(model, task, RECIPES["adapters"])
    ids, mask, targets = data.batch(longest_rows(data, batch_size))

    def step(autocast: AbstractContextManager) -> None:
        with autocast:
            loss = cross_entropy(model(task.name, ids, mask), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    ways: Ways = {"fused_ms": nullcontext, "eager_ms": lambda: eager_adapters(model)}
    backend_under = partial(fused_backend, model, data)
    return times_in_turn("training steps", step, ways, StepTime, backend_under, ids, repeats)


def times_in_turn(
    what: str,
    run: Callable[[AbstractContextManager], None],
    ways: Ways,
    made: Callable[..., Time],
    backend_under: Callable[[torch.dtype | None], str],
    ids: Tensor,
    repeats: int,
) -> list[Time]:
    """Median times of `run`, in each of `ways` in turn: float32, on a GPU bfloat16 as well.

    Args:
        what: is timed, for the progress.
        run: gets the autocast under which the model is to be called.
        ways: by field of what is `made`, a context in which its time is taken.
        backend_under: which backend runs the adapters, under autocast to this dtype.
        ids: [B, L], the batch.
    """
    is_gpu = ids.is_cuda
    results = []
    for dtype in (None, torch.bfloat16) if is_gpu else (None,):
        times: dict[str, list[float]] = {field: [] for field in ways}
        with Progress(f"timing {what}", (repeats + 1) * len(ways)) as progress:
            for _ in range(repeats + 1):
                for field, way in ways.items():
                    with way():
                        _wait(ids.device)
                        start = time.perf_counter()
                        run(_autocast(ids.device, dtype))
                        _wait(ids.device)
                        times[field].append(time.perf_counter() - start)
                    progress.advance()
        backend = backend_under(dtype)
        results.append(
            made(
                dtype="float32" if dtype is None else "bfloat16 autocast",
                tokens=list(ids.shape),
                backend=backend,
                repeats=repeats,
                is_speed_claim=is_gpu and backend != "reference",
                **{  # the first one warms up
                    field: 1e3 * statistics.median(taken[1:]) for field, taken in times.items()
                },
            )
        )
    return results


def longest_rows(data: Encoded, size: int) -> list[int]:
    """The rows of the `size` longest texts: a batch with hardly any padding."""
    return sorted(range(len(data)), key=lambda row: -len(data.ids[row]))[:size]


def adapter_gradients(
    model: TextClassifier, task: Task, data: Encoded, rows: list[int]
) -> dict[str, Tensor]:
    """The gradients of a batch's loss, by the names of the encoder's parameters."""
    ids, mask, targets = data.batch(rows)
    names, parameters = zip(
        *((n, p) for n, p in model.encoder.named_parameters() if p.requires_grad), strict=True
    )
    loss = cross_entropy(model(task.name, ids, mask), targets)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def _eager_forward(adapter: BottleneckAdapter, x: Tensor, residual: Tensor | None = None) -> Tensor:
    activation = ACTIVATIONS[adapter.activation].value
    to_add = x if residual is None else residual  # an adapter beside its FFN is given one
    return to_add + adapter.scaling * adapter.up_proj(activation(adapter.down_proj(x)))


def _autocast(device: torch.device, dtype: torch.dtype | None):
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
