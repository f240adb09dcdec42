// Misuses that the emulator has to report, one kernel each.
#include <cstring>

#include "launch.cuh"
#include "ptx.cuh"

namespace adapterkern {
namespace {

struct MisuseParams {
  const void* data;
};

void misaligned_copy(MisuseParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  copy_async_16(shared + 8, params.data, 16);
}

void misaligned_source(MisuseParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  copy_async_16(shared, static_cast<const char*>(params.data) + 4, 16);
}

void copy_past_the_end(MisuseParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  copy_async_16(shared + 1024, params.data, 16);
}

void misaligned_matrix(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  uint32_t fragment[4];
  load_matrices(fragment, shared + 4);
}

void matrix_past_the_end(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  uint32_t fragment[4];
  load_matrices_transposed(fragment, shared + 1024 - 8 * threadIdx.x / 31);
}

void store_past_the_end(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  if (threadIdx.x == 3) shared[1024] = 1;
}

void store_before_the_start(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  shared[-1] = 1;
}

void lanes_apart(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  uint32_t fragment[4];
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    load_matrices(fragment, shared);
  }
}

void half_a_warp(MisuseParams) {
  if (threadIdx.x < 16) __syncwarp();
}

void barrier_and_warp(MisuseParams) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

void remote_past_the_end(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  float v[4];
  load_remote_16(v, reinterpret_cast<float*>(shared + 1024), 0);
}

void remote_misaligned(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const uint32_t v[4] = {};
  store_remote_16(shared + 4, v, 0);
}

void remote_block_of_another_cluster(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  float v[4];
  load_remote_16(v, reinterpret_cast<float*>(shared), 2);
}

// Block 0 may be gone when the others read it.
void remote_block_has_ended(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  if (cluster_rank() == 0) return;
  for (int i = 0; i < 100; ++i) __syncthreads();
  float v[4];
  load_remote_16(v, reinterpret_cast<float*>(shared), 0);
}

// Of barriers, and of the products of warpgroups.
void barrier_that_was_not_made(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  barrier_arrive(reinterpret_cast<Barrier*>(shared));
}

void phase_that_never_ends(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  auto* barrier = reinterpret_cast<Barrier*>(shared);
  if (threadIdx.x == 0) barrier_init(barrier, 65);
  __syncthreads();
  barrier_arrive(barrier);
  barrier_wait(barrier, 0);
}

void bytes_that_never_come(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  auto* barrier = reinterpret_cast<Barrier*>(shared);
  if (threadIdx.x == 0) barrier_init(barrier, 64);
  __syncthreads();
  barrier_expect(barrier, threadIdx.x == 0 ? 16 : 0);
  barrier_wait(barrier, 0);
}

void store_async_without_a_cluster(MisuseParams) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  auto* barrier = reinterpret_cast<Barrier*>(shared);
  if (threadIdx.x == 0) barrier_init(barrier, 1);
  __syncthreads();
  store_async(remote_address(shared + 16, 0), {1, 2}, remote_address(barrier, 0));
}

template <bool kFencesCopies, bool kFencesSums>
void product(MisuseParams params, uint64_t descriptor) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  for (unsigned i = threadIdx.x; i < 512; i += 64) {
    copy_async_16(shared + 16 * i, params.data, 0);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  if (kFencesCopies) fence_async_proxy();
  float sums[32] = {};
  if (kFencesSums) warpgroup_fence(sums);
  wgmma_64x64x16<false>(sums, descriptor, descriptor, __nv_bfloat16());
  warpgroup_wait(sums);
}

constexpr uint64_t kSwizzled = 1ull << 62 | 64ull << 32;

void copies_not_fenced(MisuseParams params) { product<false, true>(params, kSwizzled); }
void sums_not_fenced(MisuseParams params) { product<true, false>(params, kSwizzled); }
void operand_without_swizzle(MisuseParams params) { product<true, true>(params, 64ull << 32); }
void operand_across_rows(MisuseParams params) { product<true, true>(params, kSwizzled | 7); }
void operand_past_the_end(MisuseParams params) { product<true, true>(params, kSwizzled | 1 << 13); }

void block_and_cluster(MisuseParams) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    cluster_barrier();
  }
}

}  // namespace
}  // namespace adapterkern

// Every kernel runs as `blocks` blocks in clusters of two, or as one block.
extern "C" const char* run_misuse(const char* name, const void* data, int threads, int shared_bytes,
                                  unsigned seed, unsigned blocks) {
  using namespace adapterkern;
  const struct {
    const char* name;
    void (*kernel)(MisuseParams);
  } kernels[] = {
      {"misaligned_copy", misaligned_copy},
      {"misaligned_source", misaligned_source},
      {"copy_past_the_end", copy_past_the_end},
      {"misaligned_matrix", misaligned_matrix},
      {"matrix_past_the_end", matrix_past_the_end},
      {"store_past_the_end", store_past_the_end},
      {"store_before_the_start", store_before_the_start},
      {"lanes_apart", lanes_apart},
      {"half_a_warp", half_a_warp},
      {"barrier_and_warp", barrier_and_warp},
      {"remote_past_the_end", remote_past_the_end},
      {"remote_misaligned", remote_misaligned},
      {"remote_block_of_another_cluster", remote_block_of_another_cluster},
      {"remote_block_has_ended", remote_block_has_ended},
      {"block_and_cluster", block_and_cluster},
      {"barrier_that_was_not_made", barrier_that_was_not_made},
      {"phase_that_never_ends", phase_that_never_ends},
      {"bytes_that_never_come", bytes_that_never_come},
      {"store_async_without_a_cluster", store_async_without_a_cluster},
      {"copies_not_fenced", copies_not_fenced},
      {"sums_not_fenced", sums_not_fenced},
      {"operand_without_swizzle", operand_without_swizzle},
      {"operand_across_rows", operand_across_rows},
      {"operand_past_the_end", operand_past_the_end},
  };
  emulator::seed = seed;
  for (const auto& each : kernels) {
    if (std::strcmp(each.name, name) != 0) continue;
    const cudaError_t error = launch(each.kernel, dim3(blocks), threads, shared_bytes,
                                     MisuseParams{data}, nullptr, blocks == 1 ? 1 : 2);
    return error == cudaSuccess ? nullptr : launch_error.c_str();
  }
  return "no such kernel";
}
