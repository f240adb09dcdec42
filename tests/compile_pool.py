"""Compiles for GPUs that are not here, in processes of their own; a `compiled` fixture's body."""

import os
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path

import pytest


def few_or_all(few: object, every: object) -> list:
    """Parameters of a fixture: the default run compiles a few cases, the thorough one all."""
    return [
        pytest.param(few, id="few"),
        pytest.param(every, id="all", marks=pytest.mark.thorough),
    ]


def outcomes_of_each(function: Callable, cases: Sequence, folder: Path, chunk: int = 1) -> dict:
    """Map each case to what `function` returns for it; `folder` is Triton's cache meanwhile."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    processes = min(os.cpu_count() or 1, -(-len(cases) // 4))  # one costs as much as a few cases
    try:
        with get_context("spawn").Pool(processes) as pool:
            return dict(zip(cases, pool.map(function, cases, chunksize=chunk), strict=True))
    finally:
        del os.environ["TRITON_CACHE_DIR"]
