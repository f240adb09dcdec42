"""Stand-ins for a search without a GPU: compilers that answer at once, a timer with a script."""

import contextlib
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from adapterkern.backends.triton import tuned
from adapterkern.backends.triton.launch_config import Device, LaunchConfig, Problem
from adapterkern.backends.triton.tuned import Entry
from adapterkern.bench.timing import WallTimer, interleave

H200 = Device(num_sms=132, shared_memory=227 * 1024)
TILES = LaunchConfig(128, 64, 64, 8, 3)


def entry_of(tokens, hidden=1024, bottleneck=64, form="row_block", arithmetic=(False, False), **k):
    kernels = (replace(TILES, **k),) * (2 if form == "split" else 1)
    return Entry(Problem(tokens, hidden, bottleneck, *arithmetic), form, kernels)


class AtOnce:
    """Takes the place of `Compilers`. answer: Work -> a problem or None."""

    def __init__(self, answer=lambda _work: None):
        self.answer, self.works, self.urgent = answer, [], []

    def submit(self, work, priority=1):
        self.works.append(work)
        self.urgent.append(priority == 0)
        future = Future()
        future.set_result(self.answer(work))
        return future

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        pass


class Scripted(WallTimer):
    """Gives the entry of each call a time of the script's."""

    device = torch.device("cpu")

    def __init__(self, script):
        self.script, self.timed = script, set()

    def measure(self, kind, subjects, seconds):
        def sample(name, subject):
            taken = []

            def noted(entry):
                taken.append(entry)
                return contextlib.nullcontext()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tuned, "forced", noted)
                subject.calls[0]()
            self.timed.add(taken[0])
            return self.script(taken[0])

        return interleave(subjects, sample, seconds)
