// Each wrapper of ptx.cuh, and each product of products.cuh and resident.cuh, alone in a kernel of
// one warp or warpgroup a block.
// Compiles with the emulator's twin of ptx.cuh and with nvcc, so that both can be held to the same
// numbers.
#include <cstring>

#include "launch.cuh"
#include "products.cuh"
#include "resident.cuh"

namespace adapterkern {
namespace {

struct WrapperParams {
  const void* a;
  const void* b;
  void* out;
};

// Lane i copies i % 17 of the i-th 16 bytes in a first group, and all 16 in a second one.
__global__ void copy_async_kernel(const __grid_constant__ WrapperParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int lane = threadIdx.x;
  const char* from = static_cast<const char*>(params.a) + 16 * lane;
  char* out = static_cast<char*>(params.out) + 16 * lane;
  copy_async_16(shared + 16 * lane, from, lane % 17);
  copy_async_commit();
  copy_async_16(shared + 16 * (lane + 32), from, 16);
  copy_async_commit();
  copy_async_wait<1>();
  __syncwarp();
  for (int i = 0; i < 16; ++i) out[i] = shared[16 * lane + i];
  copy_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 16; ++i) out[512 + i] = shared[16 * (lane + 32) + i];
}

// a: four 8 x 8 matrices of 16 bits, one after the other; out: [32, 4] of 32 bits.
template <bool kTransposed>
__global__ void load_matrices_kernel(const __grid_constant__ WrapperParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  const int lane = threadIdx.x;
  for (int i = 0; i < 16; ++i) {
    shared[16 * lane + i] = static_cast<const unsigned char*>(params.a)[16 * lane + i];
  }
  __syncwarp();
  uint32_t fragment[4];
  if (kTransposed) {
    load_matrices_transposed(fragment, shared + 16 * lane);
  } else {
    load_matrices(fragment, shared + 16 * lane);
  }
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(params.out)[4 * lane + i] = fragment[i];
}

__device__ __forceinline__ uint32_t pair(const uint16_t* low, const uint16_t* high) {
  return *low | static_cast<uint32_t>(*high) << 16;
}

// out [16, 8] float32 += a [16, 16] b [16, 8], the fragments put together by hand.
template <typename Half>
__global__ void mma_kernel(const __grid_constant__ WrapperParams params) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto* a = static_cast<const uint16_t*>(params.a);
  const auto* b = static_cast<const uint16_t*>(params.b);
  float* out = static_cast<float*>(params.out);
  uint32_t fragment_a[4], fragment_b[2];
  for (int part = 0; part < 4; ++part) {
    const uint16_t* from = a + (g + part % 2 * 8) * 16 + 2 * t + part / 2 * 8;
    fragment_a[part] = pair(from, from + 1);
  }
  for (int part = 0; part < 2; ++part) {
    const uint16_t* from = b + (2 * t + part * 8) * 8 + g;
    fragment_b[part] = pair(from, from + 8);
  }
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = out[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_16x8x16(d, fragment_a, fragment_b[0], fragment_b[1], Half());
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// out = the bits of a, rounded to TF32.
__global__ void to_tf32_kernel(const __grid_constant__ WrapperParams params) {
  const float* a = static_cast<const float*>(params.a);
  static_cast<uint32_t*>(params.out)[threadIdx.x] = to_tf32(a[threadIdx.x]);
}

// out [16, 8] float32 += a [16, 8] b [8, 8].
__global__ void mma_tf32_kernel(const __grid_constant__ WrapperParams params) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float* a = static_cast<const float*>(params.a);
  const float* b = static_cast<const float*>(params.b);
  float* out = static_cast<float*>(params.out);
  uint32_t fragment_a[4], fragment_b[2];
  for (int part = 0; part < 4; ++part) {
    fragment_a[part] = to_tf32(a[(g + part % 2 * 8) * 8 + t + part / 2 * 4]);
  }
  for (int part = 0; part < 2; ++part) fragment_b[part] = to_tf32(b[(t + part * 4) * 8 + g]);
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = out[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_16x8x8(d, fragment_a, fragment_b[0], fragment_b[1]);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// Every block holds its 32 x 4 floats of a [size, 32, 4], and stores those of the next block into
// the block after that. out [size, 33, 4] receives what was stored into each block, then the
// block's rank and the number of blocks.
__global__ void cluster_kernel(const __grid_constant__ WrapperParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  if constexpr (kHasClusters) {
    const int rank = cluster_rank(), size = cluster_size(), lane = threadIdx.x;
    float* held = reinterpret_cast<float*>(shared) + 4 * lane;
    float* given = held + 4 * kWarpSize;
    const float* a = static_cast<const float*>(params.a) + 4 * (rank * kWarpSize + lane);
    float* out = static_cast<float*>(params.out) + 4 * rank * (kWarpSize + 1);
    for (int i = 0; i < 4; ++i) held[i] = a[i];
    cluster_barrier();
    float v[4];
    load_remote_16(v, held, (rank + 1) % size);
    uint32_t words[4];
    memcpy(words, v, sizeof(words));
    store_remote_16(given, words, (rank + 2) % size);
    cluster_barrier();
    for (int i = 0; i < 4; ++i) out[4 * lane + i] = given[i];
    out[4 * kWarpSize] = static_cast<float>(rank);
    out[4 * kWarpSize + 1] = static_cast<float>(size);
  }
}

// out [16, 32] float32 = a [16, 64] b [64, 32], each or both given transposed.
template <typename Scalar, bool kTransposedA, bool kTransposedB>
__global__ void multiply_kernel(const __grid_constant__ WrapperParams params) {
  constexpr int kRows = 16, kDepth = 64, kColumns = 32;
  constexpr int kAcrossA = kTransposedA ? kRows : kDepth;
  constexpr int kAcrossB = kTransposedB ? kDepth : kColumns;
  constexpr int kDownA = kTransposedA ? kDepth : kRows, kDownB = kTransposedB ? kColumns : kDepth;
  ADAPTERKERN_SHARED_MEMORY(shared);
  Scalar* a = reinterpret_cast<Scalar*>(shared);
  Scalar* b = reinterpret_cast<Scalar*>(shared + tile_bytes<Scalar>(kDownA, kAcrossA));
  const View given_a{const_cast<void*>(params.a), kDTypeOf<Scalar>, kAcrossA};
  const View given_b{const_cast<void*>(params.b), kDTypeOf<Scalar>, kAcrossB};
  const Matrix whole_a{given_a, kDownA, kAcrossA}, whole_b{given_b, kDownB, kAcrossB};
  load_tile<kDownA, kAcrossA, kWarpSize>(a, whole_a, 0, 0, Unchanged());
  load_tile<kDownB, kAcrossB, kWarpSize>(b, whole_b, 0, 0, Unchanged());
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  float acc[kColumns / 8][4];
  clear(acc);
  multiply<kDepth, kTransposedA, kTransposedB>(acc, a, kAcrossA + kPadding<Scalar>, b,
                                               kAcrossB + kPadding<Scalar>);
  store_product(static_cast<float*>(params.out), kColumns, acc);
}

__global__ void shuffle_kernel(const __grid_constant__ WrapperParams params) {
  const float* a = static_cast<const float*>(params.a);
  static_cast<float*>(params.out)[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFF, a[threadIdx.x], 5);
}

// out [64, 64] float32 = a [64, 64] b [64, 64] by one warpgroup, b given transposed or not.
template <typename Half, bool kTransposed>
__global__ void warpgroup_kernel(const __grid_constant__ WrapperParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  if constexpr (kHasWarpgroups) {
    Half* tiles[2] = {reinterpret_cast<Half*>(shared),
                      reinterpret_cast<Half*>(shared + kTileBytes)};
    const void* given[2] = {params.a, params.b};
    for (int i = 0; i < 2; ++i) {
      const View view{const_cast<void*>(given[i]), kDTypeOf<Half>, kTileSide};
      copy_swizzled<4 * kWarpSize>(tiles[i], Matrix{view, kTileSide, kTileSide}, 0, 0, threadIdx.x);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    float acc[32] = {};
    multiply_tiles<kTransposed>(acc, tiles[0], tiles[1]);
    const LanePairs pairs;
    pairs.for_each([&](int i, int which, int column) {
      float* out = static_cast<float*>(params.out) + (pairs.row + 8 * which) * kTileSide + column;
      out[0] = acc[i];
      out[1] = acc[i + 1];
    });
  }
}

// Every block of a cluster sends its 4 x 32 floats of a [size, 32, 4] to the next one, in words of
// 8 and of 16 bytes, and stores what it received in out [size, 32, 4].
__global__ void store_async_kernel(const __grid_constant__ WrapperParams params) {
  ADAPTERKERN_SHARED_MEMORY(shared);
  if constexpr (kHasWarpgroups) {
    const int rank = cluster_rank(), size = cluster_size(), lane = threadIdx.x;
    auto* barrier = reinterpret_cast<Barrier*>(shared);
    unsigned char* received = shared + 1024 + 16 * lane;
    if (lane == 0) {
      barrier_init(barrier, 1);
      barriers_made();
    }
    cluster_barrier();
    uint32_t words[4];
    memcpy(words, static_cast<const float*>(params.a) + 4 * (rank * kWarpSize + lane), 16);
    const int next = (rank + 1) % size;
    const uint32_t to = remote_address(received, next), counts = remote_address(barrier, next);
    if (lane % 2 == 0) {
      store_async(to, words, counts);
    } else {
      store_async(to, {words[0], words[1]}, counts);
      store_async(to + 8, {words[2], words[3]}, counts);
    }
    if (lane == 0) barrier_expect(barrier, 16 * kWarpSize);
    barrier_wait(barrier, 0);
    memcpy(static_cast<float*>(params.out) + 4 * (rank * kWarpSize + lane), received, 16);
    cluster_barrier();
  }
}

template <typename Scalar>
auto multiply_of(bool transposed_a, bool transposed_b) {
  if (transposed_a) {
    return transposed_b ? multiply_kernel<Scalar, true, true>
                        : multiply_kernel<Scalar, true, false>;
  }
  return transposed_b ? multiply_kernel<Scalar, false, true>
                      : multiply_kernel<Scalar, false, false>;
}

using Kernel = void (*)(WrapperParams);

Kernel find(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("copy_async")) return copy_async_kernel;
  if (is("load_matrices")) return load_matrices_kernel<false>;
  if (is("load_matrices_transposed")) return load_matrices_kernel<true>;
  if (is("mma bfloat16")) return mma_kernel<__nv_bfloat16>;
  if (is("mma float16")) return mma_kernel<__half>;
  if (is("shuffle")) return shuffle_kernel;
  if (is("to_tf32")) return to_tf32_kernel;
  if (is("mma tf32")) return mma_tf32_kernel;
  if (is("cluster")) return cluster_kernel;
  if (is("store_async")) return store_async_kernel;
  if (is("warpgroup bfloat16")) return warpgroup_kernel<__nv_bfloat16, false>;
  if (is("warpgroup bfloat16 b^T")) return warpgroup_kernel<__nv_bfloat16, true>;
  if (is("warpgroup float16")) return warpgroup_kernel<__half, false>;
  if (is("warpgroup float16 b^T")) return warpgroup_kernel<__half, true>;
  const bool transposed_a = std::strstr(name, "a^T") != nullptr;
  const bool transposed_b = std::strstr(name, "b^T") != nullptr;
  if (std::strstr(name, "bfloat16")) return multiply_of<__nv_bfloat16>(transposed_a, transposed_b);
  if (std::strstr(name, "float16")) return multiply_of<__half>(transposed_a, transposed_b);
  if (std::strstr(name, "tf32")) return multiply_of<TFloat32>(transposed_a, transposed_b);
  return multiply_of<float>(transposed_a, transposed_b);
}

}  // namespace
}  // namespace adapterkern

extern "C" int run_wrapper(const char* name, const void* a, const void* b, void* out) {
  constexpr int kSharedBytes = 24 * 1024;
  const bool of_blocks = std::strcmp(name, "cluster") == 0 || std::strcmp(name, "store_async") == 0;
  const unsigned blocks = of_blocks ? 4 : 1;
  const int threads = std::strstr(name, "warpgroup") != nullptr ? 128 : 32;
  return adapterkern::launch(adapterkern::find(name), dim3(blocks), threads, kSharedBytes,
                             adapterkern::WrapperParams{a, b, out}, nullptr, blocks);
}
