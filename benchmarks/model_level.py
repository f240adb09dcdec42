"""Times whole models: per cent that adapters add, and adapters against full fine-tuning."""

import contextlib
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from adapterkern.bench.built import failure
from adapterkern.bench.results import ModelRow, Timing
from adapterkern.bench.timing import CudaTimer, Subject, WallTimer, nothing
from benchmarks import models
from benchmarks.attention import RefuseMasks
from benchmarks.models import MissingPackageError, Spec

EXECUTIONS = ("eager", "graph")


def measure_model(
    spec: Spec,
    mode: str,
    execution: str,
    timer: WallTimer | CudaTimer,
    dtype: torch.dtype,
    seconds: float,
    variants: Sequence[str] | None = None,
) -> list[ModelRow]:
    """Time all variants in turn, a row for each; a variant that fails costs its own row alone.

    forward: evaluation without gradients. decode: the same for one token after a prompt of the
    whole sequence. step: forward, backward from a given gradient of the last hidden state down to
    the embedded input, and AdamW on the parameters that are trained; the plain model trains none,
    full fine-tuning all, the embedding included.

    A GPU's events time it: a graph with the host ahead, eager models with the gaps in which the GPU
    waits for the host.

    Raises:
        LostDeviceError: the GPU fails whatever is asked of it.
    """
    names = variants or models.variants(spec)
    names = [name for name in names if mode == "step" or name != "full"]
    rows = {name: ModelRow(spec.name, name, mode, execution) for name in names}
    subjects: dict[str, Subject] = {}
    device = timer.device if isinstance(timer, CudaTimer) else torch.device("cpu")
    with timer.session(), contextlib.ExitStack() as patches:
        for name, row in rows.items():
            try:
                subjects[name] = _subject(spec, name, row, timer, device, dtype, patches)
            except Exception as error:  # recorded in the row; the others are still measured
                _record(row, error)
                timer.raise_if_lost(error, name)
        timings = _timed(subjects, execution, timer, seconds)
    for name, subject in subjects.items():
        if subject.failure is not None:
            _record(rows[name], subject.failure)
        elif subject.late:
            rows[name].note = "launches included, the host was behind the GPU"
    for name, timing in timings.items():
        rows[name].milliseconds = _in_milliseconds(timing)
    if device.type == "cuda":  # a CPU tells nothing of what a GPU pays
        _overheads(rows)
    subjects.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return list(rows.values())


def _subject(
    spec: Spec,
    name: str,
    row: ModelRow,
    timer: WallTimer | CudaTimer,
    device: torch.device,
    dtype: torch.dtype,
    patches: contextlib.ExitStack,
) -> Subject:
    if row.execution == "graph" and not isinstance(timer, CudaTimer):
        raise MissingPackageError("CUDA graphs need a GPU")
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
    model = models.build(spec, name, device, dtype)
    patches.enter_context(models.patched(model, name))
    trained = [p for p in model.parameters() if p.requires_grad]
    row.parameters = sum(p.numel() for p in model.parameters())
    row.trained = sum(p.numel() for p in trained)
    call = _call(spec, model, trained, row, device, dtype)
    with RefuseMasks():
        call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):  # the optimizer's state is made in the first step
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        row.peak_bytes = torch.cuda.max_memory_allocated(device) - before
    if row.execution == "graph" and isinstance(timer, CudaTimer):
        graph, _ = timer.capture(Subject([call], least_calls=1))
        return Subject([graph.replay], produce=call)  # keeps what the graph reads alive
    return Subject([call])


def _call(
    spec: Spec,
    model: nn.Module,
    trained: list[nn.Parameter],
    row: ModelRow,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], Any]:
    embedded = models.embedder(spec, model, device, dtype)
    if row.mode != "step":
        model.eval()
        options: dict[str, Any] = {}
        if row.mode == "decode":
            options = {"past_key_values": models.past_of(model, embedded()), "use_cache": True}
            embedded = models.embedder(spec, model, device, dtype, tokens=1)

        def forward() -> Any:
            with torch.no_grad():
                return model(inputs_embeds=embedded(), **options)

        return forward
    model.train()
    dy = torch.randn_like(embedded())
    on_gpu = device.type == "cuda"
    optimizer = None
    if trained:
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=on_gpu, capturable=on_gpu)

    def step() -> None:
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        x = embedded()
        if not x.requires_grad:
            x.requires_grad_()
        out = model(inputs_embeds=x)
        out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        torch.autograd.backward(out, dy)  # no loss, whose own passes would dilute the overhead
        if optimizer is not None:
            optimizer.step()

    return step


def _timed(
    subjects: dict[str, Subject], execution: str, timer: WallTimer | CudaTimer, seconds: float
) -> dict[str, Timing]:
    """Return the microseconds of one call of each."""
    if not isinstance(timer, CudaTimer):
        return timer.measure("eager", subjects, seconds)

    def sample(_name: str, subject: Subject) -> float:
        call = subject.calls[0]
        if execution == "graph":
            return timer.between_events(subject, nothing, call)
        return timer.with_gaps(call)

    return timer.interleave(subjects, sample, seconds)


def _in_milliseconds(timing: Timing) -> Timing:
    raw = tuple(round(sample / 1e3, 6) for sample in timing.raw)
    quantiles = timing.p20 / 1e3, timing.p50 / 1e3, timing.p80 / 1e3
    return Timing(*quantiles, timing.samples, raw)


def _overheads(rows: dict[str, ModelRow]) -> None:
    """Fill in per cent over the plain model, which is frozen and passes gradients on."""
    plain = rows.get("plain")
    if plain is None or plain.milliseconds is None:
        return
    for name, row in rows.items():
        if name != "plain" and row.milliseconds is not None:
            row.overhead_percent = 100 * (row.milliseconds.p50 / plain.milliseconds.p50 - 1)


def _record(row: ModelRow, error: Exception) -> None:
    if isinstance(error, MissingPackageError):
        row.status, row.note = "unavailable", str(error)
    else:
        row.status, row.note = failure(error)
