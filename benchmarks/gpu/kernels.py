"""Compiles before there is a GPU what Triton would compile in the checks and measurements of a run.

Triton finds its kernels in a cache by names that hash its own files, so this runs under the GPU
machine's Python, torch and Triton. It makes the calls of the parity grid and of the measured cases
on CPU tensors, up to their launches; the cache is TRITON_CACHE_DIR's, as always.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from adapterkern import dispatch, parity
from adapterkern.backends import get
from adapterkern.backends.triton.backend import TritonBackend
from adapterkern.backends.triton.compile_only import Launch, compile_only
from adapterkern.backends.triton.launch_config import Device
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.measure import outputs_of
from adapterkern.bench.providers import PROVIDERS
from benchmarks import tasks
from benchmarks.gpu import machine, stages

CAPABILITY = 90
H200 = Device(132, shared_memory=227 * 1024, l2=60 * 2**20)  # some norms ask how much L2 there is
Call = Callable[[], object]


def main() -> int:
    """Compile a shard; print Triton's key."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shard", type=int)
    parser.add_argument("shards", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    with on_h200() as launches:
        for name, call in [*checks(), *measurements()][arguments.shard :: arguments.shards]:
            try:
                call()
            except Exception as error:  # the compiler raises anything
                failed += 1
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            launches.clear()  # they hold the tensors of their arguments
    print(machine.triton_key())
    return 1 if failed else 0


@contextlib.contextmanager
def on_h200() -> Iterator[list[Launch]]:
    """Within the block the triton backend takes CPU tensors for an H200's."""
    with (
        mock.patch.object(TritonBackend, "devices", frozenset({"cpu"})),
        mock.patch.object(TritonBackend, "unavailable_reason", return_value=None),
        mock.patch.object(dispatch, "_decisions", {}),
        compile_only(CAPABILITY, H200) as launches,
    ):
        yield launches


def checks() -> Iterator[tuple[str, Call]]:
    """Yield the name and the call of every case that `adapterkern check` runs on a GPU."""
    backend = get("triton")
    declared = backend.dtypes, backend.activations, "default", False, backend.features
    for case in (*parity.grid(*declared), *parity.grouped_cases(*declared)):
        yield str(case), lambda case=case: parity.differing_bits(case, "triton", runs=1)


def measurements() -> Iterator[tuple[str, Call]]:
    """Yield the name and the call of every adapter that `verify` and `report` measure."""
    steps = [step for stage in ("verify", "report") for step in stages.steps(stage)]
    measured = [task for step in steps if isinstance(step, stages.Measure) for task in step.tasks]
    for task in measured:
        if task.request["do"] == "adapter":
            yield task.name, lambda request=task.request: _measured(request)


def _measured(request: dict) -> None:
    case = BenchCase(**request["case"])
    with tasks.allowing_tf32() if request.get("tf32") else contextlib.nullcontext():
        inputs = case.draw(torch.device("cpu"))
        outputs_of(PROVIDERS["triton"].build(case, inputs), case, inputs)


if __name__ == "__main__":
    sys.exit(main())
