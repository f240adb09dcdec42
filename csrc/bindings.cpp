// Python bindings of the CUDA backend: the module adapterkern._cuda.
//
// Pointers and streams cross as integers, so nothing here depends on torch. Python owns every check
// and allocation; a binding sets the device, releases the GIL, launches on the given stream and
// turns a CUDA error into an exception.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "backward.h"
#include "facts.h"
#include "forward.h"
#include "grouped_forward.h"
#include "probe.h"
#include "registry.h"

namespace py = pybind11;

namespace adapterkern {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(what + " failed: " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

// Makes `device` current for its lifetime and restores the caller's device afterwards. The runtime
// then makes a context on the caller's device if there was none, so the backend sets the device
// itself, with torch, which does not.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) {
      check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// The highest CUDA version that the installed driver supports, as 1000 * major + 10 * minor; 0
// without a driver.
int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

// Returns (count, error name, error text); a machine without GPUs is not an error here.
py::tuple device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return py::make_tuple(error == cudaSuccess ? count : 0, cudaGetErrorName(error),
                        cudaGetErrorString(error));
}

// Bytes of shared memory that one block may ask for.
int shared_memory(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return bytes;
}

// The compiled architectures, in nvcc's names: "sm_80" is machine code, "compute_90" is PTX.
py::tuple archs() { return py::tuple(py::str(ADAPTERKERN_ARCHS).attr("split")()); }

py::tuple kernels() {
  py::tuple names(kKernels.size());
  size_t index = 0;
  for (const char* name : kKernels) names[index++] = py::str(name);
  return names;
}

// Returns (panel, most stages, row blocks, tiles of many adapters, clusters, gradients, resident),
// the facts in the order of facts.h.
py::tuple facts() {
  const Facts all = launch_facts();
  const auto listed = [](const std::vector<RowBlockFacts>& shapes) {
    py::list list;
    for (const RowBlockFacts& f : shapes) {
      list.append(py::make_tuple(f.half, f.width, f.large, f.tokens, f.threads, f.blocks_per_sm,
                                 f.least_bytes, f.in_bytes, f.out_bytes, f.added_bytes,
                                 f.beside_bytes));
    }
    return list;
  };
  py::list clusters, gradients;
  for (const ClusterFacts& f : all.clusters) {
    clusters.append(py::make_tuple(f.width, f.tokens, f.threads, f.panel_bytes, f.beside_bytes,
                                   f.norm_panel_bytes, f.norm_beside_bytes));
  }
  for (const GradientFacts& f : all.gradients) {
    gradients.append(py::make_tuple(f.half, f.units, f.features, f.stage_bytes));
  }
  const ResidentFacts& r = all.resident;
  return py::make_tuple(
      all.panel, all.most_stages, listed(all.row_blocks), listed(all.grouped), clusters, gradients,
      py::make_tuple(r.width, r.tokens, r.threads, r.tile_bytes, r.panel_bytes, r.beside_bytes,
                     r.slots_in, r.slots_out, r.slots_out_beside));
}

void probe(uintptr_t out, int device, uintptr_t stream) {
  const py::gil_scoped_release no_gil;
  const DeviceGuard guard(device);
  check(launch_probe(reinterpret_cast<int*>(out), reinterpret_cast<cudaStream_t>(stream)),
        "probe_kernel");
}

int clusters(int device, int size, int threads, int shared_bytes) {
  const DeviceGuard guard(device);
  int fitting = 0;
  check(clusters_that_fit(size, threads, shared_bytes, &fitting),
        "clusters of " + std::to_string(size) + " blocks with " + std::to_string(shared_bytes) +
            " bytes each");
  return fitting;
}

// Unpacks the struct that adapterkern/backends/cuda/params.py packed.
template <typename Params>
Params unpack(const py::bytes& packed) {
  const std::string_view bytes = packed;
  if (bytes.size() != sizeof(Params)) {
    throw std::invalid_argument("expected the " + std::to_string(sizeof(Params)) +
                                " bytes of the struct in csrc/params.h, got " +
                                std::to_string(bytes.size()));
  }
  Params params;
  std::memcpy(&params, bytes.data(), sizeof(Params));
  return params;
}

template <typename Params>
void run(cudaError_t (*launch)(const Params&, cudaStream_t), const char* name,
         const py::bytes& packed, int device, uintptr_t stream) {
  const Params params = unpack<Params>(packed);
  const py::gil_scoped_release no_gil;
  const DeviceGuard guard(device);
  const cudaError_t error = launch(params, reinterpret_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return;
  check(error, std::string(name) + " for T = " + std::to_string(params.num_tokens) +
                   ", H = " + std::to_string(params.hidden_size) +
                   ", R = " + std::to_string(params.bottleneck_size));
}

void forward(const py::bytes& packed, int device, uintptr_t stream) {
  run(launch_forward, "bottleneck_fwd", packed, device, stream);
}

void backward(const py::bytes& packed, int device, uintptr_t stream) {
  run(launch_backward, "bottleneck_bwd", packed, device, stream);
}

void grouped_forward(const py::bytes& packed, int device, uintptr_t stream) {
  run(launch_grouped_forward, "bottleneck_grouped", packed, device, stream);
}

}  // namespace
}  // namespace adapterkern

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  using namespace adapterkern;
  m.doc() = "CUDA kernels of adapterkern; loaded by adapterkern.backends.cuda.extension.";
  m.attr("RUNTIME_VERSION") = CUDART_VERSION;
  m.def("archs", &archs, "Compiled architectures: sm_* is machine code, compute_* is PTX.");
  m.def("kernels", &kernels, "Names of the adapter kernels in this build.");
  m.def("driver_version", &driver_version, "1000 * major + 10 * minor; 0 without a driver.");
  m.def("device_count", &device_count, "(count, error name, error text).");
  m.def("shared_memory", &shared_memory, py::arg("device"),
        "Bytes of shared memory that one block may ask for.");
  m.def("facts", &facts, "What a plan of launches has to know of the kernels; see csrc/facts.h.");
  m.def("probe", &probe, py::arg("out"), py::arg("device"), py::arg("stream"),
        "Run the probe kernel: int32[2] at the address `out` becomes (__CUDA_ARCH__, is it \"a\" "
        "code).");
  m.def("clusters", &clusters, py::arg("device"), py::arg("size"), py::arg("threads"),
        py::arg("shared_bytes"), "Clusters of `size` such blocks that can run at once.");
  m.def("forward", &forward, py::arg("packed"), py::arg("device"), py::arg("stream"),
        "Launch the forward kernels; `packed` holds the bytes of ForwardParams.");
  m.def("backward", &backward, py::arg("packed"), py::arg("device"), py::arg("stream"),
        "Launch the backward kernels; `packed` holds the bytes of BackwardParams.");
  m.def("grouped_forward", &grouped_forward, py::arg("packed"), py::arg("device"),
        py::arg("stream"),
        "Launch the forward kernels of many adapters; `packed` holds the bytes of "
        "GroupedForwardParams.");
}
