"""CUDA's driver by ctypes, on a library of known answers, and the peak of the memory from it."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adapterkern.bench import driver, environment


def library(attributes, nodes=0, code=0):
    """libcuda.so.1 as ctypes sees it: numbers by value, results by reference."""

    def get_device(device, ordinal):
        device._obj.value = 40 + ordinal.value
        return code

    def get_attribute(value, attribute, device):
        value._obj.value = attributes[attribute.value]
        return code if device.value == 40 else 101  # CUDA_ERROR_INVALID_DEVICE

    def get_nodes(graph, array, count):
        assert (graph.value, array) == (0xABC, None)
        count._obj.value = nodes
        return code

    return SimpleNamespace(
        cuInit=lambda flags: 0,
        cuDeviceGet=get_device,
        cuDeviceGetAttribute=get_attribute,
        cuGraphGetNodes=get_nodes,
    )


@pytest.fixture
def installed(monkeypatch):
    def install(*arguments, **options):
        found = library(*arguments, **options)
        monkeypatch.setattr(driver, "_library", lambda: found)

    return install


def test_nodes_are_counted_by_the_driver(installed):
    installed({}, nodes=7)
    assert driver.graph_nodes(0xABC) == 7
    installed({}, nodes=7, code=400)
    with pytest.raises(RuntimeError, match="cuGraphGetNodes gave CUresult 400, not 0"):
        driver.graph_nodes(0xABC)


@pytest.mark.parametrize(
    ("mhz", "bits", "peak"),
    [(2619, 5120, 3.352e12), (3201, 6144, 4.917e12)],  # H100 and H200
)
def test_the_peak_bandwidth_is_two_transfers_a_clock_over_the_whole_bus(
    installed, monkeypatch, mhz, bits, peak
):
    installed({36: mhz * 1000, 37: bits})
    assert environment.peak_bandwidth(torch.device("cuda", 0)) == pytest.approx(peak, rel=1e-3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert environment.peak_bandwidth(torch.device("cuda")) == pytest.approx(peak, rel=1e-3)


def test_a_peak_that_the_driver_does_not_tell_is_unknown(installed, monkeypatch):
    installed({36: 0, 37: 5120})  # as some virtual GPUs answer
    assert environment.peak_bandwidth(torch.device("cuda", 0)) is None
    installed({36: 2619000, 37: 5120}, code=3)
    assert environment.peak_bandwidth(torch.device("cuda", 0)) is None

    def absent():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver, "_library", absent)
    assert environment.peak_bandwidth(torch.device("cuda", 0)) is None
    assert environment.peak_bandwidth(torch.device("cpu")) is None


def test_the_numbers_are_those_of_cudas_header():
    """So are the declarations, where a header is: a change of either would read other memory."""
    triton = pytest.importorskip("triton", reason="triton, which carries cuda.h, is not installed")
    header = Path(triton.__file__).parent / "backends/nvidia/include/cuda.h"
    if not header.exists():
        pytest.skip(f"no {header}")
    text = " ".join(header.read_text().split())
    for name, value in (
        ("MEMORY_CLOCK_RATE", driver.MEMORY_CLOCK_RATE),
        ("GLOBAL_MEMORY_BUS_WIDTH", driver.MEMORY_BUS_WIDTH),
    ):
        found = re.search(rf"CU_DEVICE_ATTRIBUTE_{name} = (\d+)", text)
        assert int(found[1]) == value
    for declared in (
        "cuGraphGetNodes(CUgraph hGraph, CUgraphNode *nodes, size_t *numNodes)",
        "cuDeviceGetAttribute(int *pi, CUdevice_attribute attrib, CUdevice dev)",
        "cuDeviceGet(CUdevice *device, int ordinal)",
    ):
        assert f"CUresult CUDAAPI {declared};" in text
        name = declared.partition("(")[0]
        assert f"#define {name} {name}_v" not in text  # no later version under this name
