// The twin of csrc/ptx.cuh: every PTX instruction of the kernels, on the host.
#pragma once

#include "emulator.h"
#include "half_types.h"
#include "warpgroup.h"

#define ADAPTERKERN_SHARED_MEMORY(name) unsigned char* const name = emulator::block->shared
#define ADAPTERKERN_RARE

namespace adapterkern {

constexpr bool kHasClusters = true, kHasLargeTiles = true, kHasSmallTiles = true;
constexpr bool kHasWarpgroups = true;

struct TFloat32 {
  float value;
};

inline void* to_global(void* pointer) { return pointer; }

template <int n>
inline void store_global(void* to, const uint32_t (&words)[n]) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(words) != 0) {
    emulator::fail("store_global: misaligned address in global memory");
  }
  std::memcpy(to, words, sizeof(words));
}

inline void copy_async_16(void* shared, const void* global, int bytes) {
  emulator::check_shared(shared, 16, 16, "copy_async_16");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    emulator::fail("copy_async_16: misaligned address in global memory");
  }
  if (bytes < 0 || bytes > 16) emulator::fail("copy_async_16: not 0 to 16 bytes");
  const emulator::Copy copy{shared, global, bytes};
  if (emulator::cluster->eager_copies) return carry_out(copy, *emulator::block);
  emulator::current().open.push_back(copy);
}

inline void copy_async_commit() {
  emulator::Thread& mine = emulator::current();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

template <int kPending>
inline void copy_async_wait() {
  auto& groups = emulator::current().groups;
  while (groups.size() > kPending) {
    for (const emulator::Copy& copy : groups.front()) carry_out(copy, *emulator::block);
    groups.erase(groups.begin());
  }
}

struct MatrixLane {
  const void* row;
  uint32_t* out;
};

inline uint16_t matrix_element(MatrixLane** lanes, int matrix, int row, int column) {
  uint16_t element;
  const auto* from = static_cast<const char*>(lanes[8 * matrix + row]->row);
  std::memcpy(&element, from + 2 * column, 2);
  return element;
}

template <bool kTransposed>
inline void load_matrices_as(uint32_t (&out)[4], const void* row, const char* name) {
  emulator::check_shared(row, 16, 16, name);
  MatrixLane mine{row, out};
  emulator::warp_operation(name, mine, [](MatrixLane** lanes) {
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t pair[2];
        for (int i = 0; i < 2; ++i) {
          pair[i] = kTransposed ? matrix_element(lanes, matrix, 2 * t + i, g)
                                : matrix_element(lanes, matrix, g, 2 * t + i);
        }
        lanes[lane]->out[matrix] = pair[0] | pair[1] << 16;
      }
    }
  });
}

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  load_matrices_as<false>(out, row, "load_matrices");
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  load_matrices_as<true>(out, row, "load_matrices_transposed");
}

inline float widen(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float widen(uint16_t bits, __half) { return __half2float({bits}); }

struct MmaLane {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename Half>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  MmaLane mine{d, a, {b0, b1}};
  emulator::warp_operation("mma_16x8x16", mine, [](MmaLane** lanes) {
    float left[16][16], right[8][16];
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 2; ++i) {
        for (int part = 0; part < 4; ++part) {
          left[g + part % 2 * 8][2 * t + i + part / 2 * 8] =
              widen(static_cast<uint16_t>(lanes[lane]->a[part] >> 16 * i), Half());
        }
        for (int part = 0; part < 2; ++part) {
          right[g][2 * t + i + part * 8] =
              widen(static_cast<uint16_t>(lanes[lane]->b[part] >> 16 * i), Half());
        }
      }
    }
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[g + i / 2 * 8][k] * right[2 * t + i % 2][k];
        lanes[lane]->d[i] += sum;
      }
    }
  });
}

template <bool kTransposed, typename Half>
inline void wgmma_64x64x16(float (&d)[32], uint64_t a, uint64_t b, Half) {
  emulator::warpgroup_product(d, a, b, kTransposed,
                              [](uint16_t bits) { return widen(bits, Half()); });
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return 0x7FFFFFFF;
  if (std::isinf(value)) return bits;
  return (bits + 0x1000) & ~0x1FFFu;
}

inline void mma_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaLane mine{d, a, {b0, b1}};
  emulator::warp_operation("mma_16x8x8", mine, [](MmaLane** lanes) {
    float left[16][8], right[8][8];
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int part = 0; part < 4; ++part) {
        left[g + part % 2 * 8][t + part / 2 * 4] = float_of(lanes[lane]->a[part] & ~0x1FFFu);
      }
      for (int part = 0; part < 2; ++part) {
        right[g][t + part * 4] = float_of(lanes[lane]->b[part] & ~0x1FFFu);
      }
    }
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        float sum = 0.0f;
        for (int k = 0; k < 8; ++k) sum += left[g + i / 2 * 8][k] * right[2 * t + i % 2][k];
        lanes[lane]->d[i] += sum;
      }
    }
  });
}

inline void trap() { emulator::fail("trap"); }

inline int cluster_rank() {
  return static_cast<int>(emulator::block - emulator::cluster->blocks.data());
}

inline int cluster_size() { return static_cast<int>(emulator::cluster->blocks.size()); }

inline void cluster_barrier() { emulator::cluster_barrier(); }

inline void load_remote_16(float (&v)[4], const float* shared, int rank) {
  std::memcpy(v, emulator::remote(shared, rank, "load_remote_16"), 16);
}

inline void store_remote_16(void* shared, const uint32_t (&v)[4], int rank) {
  std::memcpy(emulator::remote(shared, rank, "store_remote_16"), v, 16);
}

}  // namespace adapterkern
