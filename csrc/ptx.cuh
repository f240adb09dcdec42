// Every PTX instruction of the kernels, wrapped once, the type of TF32 operands, and the
// declaration of dynamic shared memory.
//
// tests/emulator holds a twin of this file and of launch.cuh for the host compiler. So no kernel
// may use inline assembly, `extern __shared__` or `<<<>>>` itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Declares dynamic shared memory as bytes, aligned as the swizzled tiles of wgmma need it.
#define ADAPTERKERN_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

// A function for rare cases, kept out of line: their code would fill the loops that call it.
#define ADAPTERKERN_RARE __noinline__

namespace adapterkern {

// Large tiles need the 227 KB of shared memory that a block has on compute capability 9.0 and 10.x.
// The PTX that 10.x runs serves 12.x too, which has 99 KB: only code for 9.0 alone has no small
// ones.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasLargeTiles = true;
#else
constexpr bool kHasLargeTiles = false;
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasSmallTiles = false;
#else
constexpr bool kHasSmallTiles = true;
#endif

// Clusters need compute capability 9.0. Where this is false their wrappers must not be called: a
// kernel tests it with `if constexpr` and otherwise traps, for it should not have been launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// Warpgroups multiply by wgmma on compute capability 9.0 alone; otherwise as with clusters.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

// A float32 element whose products run in TF32; the product rounds it to 10 bits.
struct TFloat32 {
  float value;
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same address, which the compiler from here on knows to be in global memory, if it is not
// null.
__device__ __forceinline__ void* to_global(void* pointer) {
  return __cvta_global_to_generic(__cvta_generic_to_global(pointer));
}

// st.global: stores words at an address that is a multiple of their size.
__device__ __forceinline__ void store_global(void* to, const uint32_t (&words)[1]) {
  asm volatile("st.global.b32 [%0], %1;\n" ::"l"(__cvta_generic_to_global(to)), "r"(words[0])
               : "memory");
}

__device__ __forceinline__ void store_global(void* to, const uint32_t (&words)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};\n" ::"l"(__cvta_generic_to_global(to)),
               "r"(words[0]), "r"(words[1])
               : "memory");
}

__device__ __forceinline__ void store_global(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(to)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// cp.async: copies 16 bytes from global to shared memory, both 16-byte aligned; those from `bytes`
// on are not read and become zeros. Completes at the copy_async_wait of its group. Bypasses L1.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most `kPending` of this thread's latest groups are incomplete.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ldmatrix: four 8 x 8 matrices of 16-bit elements. Lane 8 i + j gives the address of row j of
// matrix i; every lane gets elements [lane / 4][2 (lane % 4) + {0, 1}] of each.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same for the transposed matrices: elements [2 (lane % 4) + {0, 1}][lane / 4].
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// mma.sync m16n8k16, d += a b with float32 sums. With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g, g + 8, g, g + 8 at columns 2t + {0, 1}, the latter two 8 columns on;
//   b: rows 2t + {0, 1}, and 8 rows on, of column g;
//   d: columns 2t, 2t + 1 of row g, then of row g + 8.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1, __nv_bfloat16 /* element type */) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1, __half /* element type */) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// cvt: returns the bits of `value` rounded to TF32, ties away from zero; mma.sync would truncate.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

// mma.sync m16n8k8, d += a b with float32 sums. With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g, g + 8, g, g + 8 at column t, the latter two 4 columns on;
//   b: row t, and 4 rows on, of column g;
//   d: as above.
__device__ __forceinline__ void mma_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Ends the kernel with an error.
__device__ __forceinline__ void trap() { asm volatile("trap;\n"); }

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ int cluster_size() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
  return size;
}

// Waits for every thread of every block of the cluster. Their earlier writes to shared memory
// are visible after it; a block must not exit while others still use its shared memory.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// Returns the address in block `rank` of the cluster that corresponds to `shared` in this block.
__device__ __forceinline__ uint32_t remote_address(const void* shared, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n"
               : "=r"(address)
               : "r"(shared_address(shared)), "r"(rank));
  return address;
}

// v = the 16 bytes at `shared`, aligned to 16 bytes, in block `rank`.
__device__ __forceinline__ void load_remote_16(float (&v)[4], const float* shared, int rank) {
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(remote_address(shared, rank))
               : "memory");
}

// Stores `v` at `shared` in block `rank`.
__device__ __forceinline__ void store_remote_16(void* shared, const uint32_t (&v)[4], int rank) {
  asm volatile(
      "st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(remote_address(shared, rank)),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
      : "memory");
}

// A barrier in shared memory (mbarrier). Each of its phases ends when as many threads as it was
// made for have arrived, and all bytes that they expect; what was written before is visible to
// those that wait for its end.
struct alignas(8) Barrier {
  uint64_t state;
};

// Makes a barrier for so many arrivals, by one thread, which then calls barriers_made; others use
// it after a barrier of the block or cluster.
__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void barriers_made() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives for this thread once all of its copies so far have landed.
__device__ __forceinline__ void copy_async_arrive(Barrier* barrier) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(shared_address(barrier))
      : "memory");
}

// Arrives, and makes this phase wait for so many bytes of store_async, which may have come already.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Returns whether the latest phase of this parity has ended. Phases count from 0; before the first
// one has ended, the one of parity 1 counts as ended.
__device__ __forceinline__ bool barrier_passed(Barrier* barrier, int parity) {
  uint32_t passed;
  asm volatile(
      "{\n"
      ".reg .pred passed;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 passed, [%1], %2;\n"
      "selp.u32 %0, 1, 0, passed;\n"
      "}\n"
      : "=r"(passed)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return passed != 0;
}

__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  while (!barrier_passed(barrier, parity)) {
  }
}

// Lets wgmma, which reads shared memory through the asynchronous proxy, see what this thread wrote
// there, or waited for.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Keeps the compiler from moving what reads or writes these registers across this place: it does
// not know that wgmma changes them until the wait.
__device__ __forceinline__ void hold(float (&d)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Orders the sums of a warpgroup, four warps, before its next wgmma.
__device__ __forceinline__ void warpgroup_fence(float (&d)[32]) {
  hold(d);
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

// Waits for every wgmma of this warpgroup; until then its sums must not be touched.
__device__ __forceinline__ void warpgroup_wait(float (&d)[32]) {
  asm volatile(
      "wgmma.commit_group.sync.aligned;\n"
      "wgmma.wait_group.sync.aligned 0;\n" ::
          : "memory");
  hold(d);
}

// wgmma m64n64k16, d += a b with float32 sums; `a` [64, 16] and `b` [16, 64] are described where
// they lie in shared memory (operand_at), contiguous along k, or b along its columns if
// kTransposed. Warp w of the group holds rows 16 w ... of d, and a lane of each 8 columns what
// mma_16x8x16 gives it.
#define ADAPTERKERN_WGMMA(type)                                                                    \
  asm volatile(                                                                                    \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                  \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "    \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, "   \
      "%34;\n"                                                                                     \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                         \
      : "l"(a), "l"(b), "n"(kTransposed))

template <bool kTransposed>
__device__ __forceinline__ void wgmma_64x64x16(float (&d)[32], uint64_t a, uint64_t b,
                                               __nv_bfloat16 /* element type */) {
  ADAPTERKERN_WGMMA("bf16");
}

template <bool kTransposed>
__device__ __forceinline__ void wgmma_64x64x16(float (&d)[32], uint64_t a, uint64_t b,
                                               __half /* element type */) {
  ADAPTERKERN_WGMMA("f16");
}
#undef ADAPTERKERN_WGMMA

// st.async: stores words at an address of a block of the cluster, which may be this one but not the
// only one; a barrier there counts their bytes when they have landed. Addresses are those that
// remote_address returns.
__device__ __forceinline__ void store_async(uint32_t to, const uint32_t (&v)[2], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];\n" ::
          "r"(to),
      "r"(v[0]), "r"(v[1]), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void store_async(uint32_t to, const uint32_t (&v)[4], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];\n" ::"r"(to),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(barrier)
      : "memory");
}

}  // namespace adapterkern
