"""Two gloo processes: DDP, FSDP2 and DTensor against one; the distributed example."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

LIBC = ctypes.CDLL(None)
ROOT = Path(__file__).parents[1]
TIMEOUT = 400  # seconds, of about 15 on an idle machine


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def end_with_the_parent():
    """In a new process: the kernel ends it where this one is killed (PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGTERM)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run tests/distributed_worker.py, whose processes meet at a file: no port can be taken."""
    folder = tmp_path_factory.mktemp("gloo")
    worker = Path(__file__).with_name("distributed_worker.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder)],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=end_with_the_parent,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return torch.load(folder / "results.pt")


@pytest.mark.thorough
def test_ddp_gives_the_gradients_and_weights_of_one_process(results):
    assert results["ddp"]["size"] > 0.01
    assert results["ddp"]["gradients"] < 1e-6
    assert results["ddp"]["weights"] < 1e-5


def test_fsdp_gives_the_gradients_and_weights_of_one_process(results):
    assert results["fsdp"]["gradients"] < 1e-6
    assert results["fsdp"]["weights"] < 1e-5


def test_fsdp_in_bfloat16_is_as_good_as_eager_there(results):
    found = results["fsdp_bf16"]
    assert found["output"] == "torch.bfloat16"
    assert found["stored"] == {"torch.float32"}
    assert 0 < found["ours"] < 2 * found["eager"] + 1e-4


def test_the_older_fsdp_starts_a_model_from_the_meta_device_at_the_identity(results):
    assert results["first_fsdp_from_meta"]["identity"]
    assert results["first_fsdp_from_meta"]["down"] == pytest.approx((3 * 16) ** -0.5, rel=0.3)


def test_dtensor_runs_as_plain_operations_and_is_right(results):
    found = results["dtensor"]
    assert found["plain"]
    assert "tensor_subclass" in found["features"]
    assert found["placements"] == "(Shard(dim=0),)"
    assert found["y"] < 1e-6
    assert found["gradients"] < 1e-5


def test_a_bank_under_ddp_gives_the_gradients_and_weights_of_one_process(results):
    found = results["bank_ddp"]
    assert found["size"] > 0.01
    assert found["gradients"] < 1e-6
    assert found["weights"] < 1e-5
    assert found["idle"] == []  # in no batch of any process: no gradient


def test_a_bank_under_fsdp_gives_the_gradients_and_weights_of_one_process(results):
    found = results["bank_fsdp"]
    assert found["size"] > 0.01
    assert found["gradients"] < 1e-6
    assert found["weights"] < 1e-5
    assert len(found["idle"]) == 5  # zeros, for every process waits for them


def test_fsdp_refuses_adapters_narrower_than_their_bank(results):
    assert "contiguous" in results["bank_fsdp_narrow"]


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["DDP", "FSDP2"])
def test_distributed_example_learns_its_task(method):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    options = ["--steps", "101"] + (["--fsdp"] if method == "FSDP2" else [])
    process = subprocess.Popen(
        [*command, str(ROOT / "examples/train_distributed.py"), *options],
        env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_the_parent,
    )
    late = threading.Timer(TIMEOUT, os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    try:
        said = ""
        while "held-out accuracy" not in said and (line := process.stdout.readline()):
            said += line
        # Now and then gloo's threads keep a process from ending, after all is done and said.
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert process.wait(timeout=60) == 0, said + process.stdout.read()
    finally:
        late.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
    assert f"{method} over 2 processes (gloo), training 4.1%" in said
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 3
    assert losses[-1] < 0.2 * losses[0]
    assert float(re.search(r"held-out accuracy ([\d.]+)", said)[1]) > 0.95
