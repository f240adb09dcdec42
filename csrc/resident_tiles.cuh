// Shared memory of the resident form: tiles for wgmma, and the rings in which they pass from one
// role of a block to the next. README.md draws it.
#pragma once

#include "tiles.cuh"

namespace adapterkern {

// Tiles of 64 rows of 64 elements in half precision: 128 bytes a row, without padding, for wgmma
// reads them swizzled. They hold tokens by features, tokens by units, or a weight.
constexpr int kTileSide = 64;
constexpr int kTileBytes = kTileSide * kTileSide * 2;

// The address of an element of a tile; elements from a multiple of eight on are contiguous.
template <typename Half>
__device__ __forceinline__ Half* element_of(Half* tile, int row, int column) {
  return tile + row * kTileSide + (column / kVector ^ row % 8) * kVector + column % kVector;
}

// Describes an operand of wgmma for the hardware: the 16 columns, or rows, of a tile from `start`
// on. PTX ISA, "Matrix Descriptor Format" and "Canonical Layouts", for the swizzle over 128 bytes.
__device__ __forceinline__ uint64_t operand_at(const void* start) {
  constexpr uint64_t kSwizzle128 = 1, kEightRows = 8 * 128, kUnused = 1;
  return kSwizzle128 << 62 | (kEightRows >> 4) << 32 | kUnused << 16 |
         (shared_address(start) & 0x3FFFF) >> 4;
}

// Copies a tile of a direct matrix from (first_row, first_column) on, with zeros out of bounds, by
// kThreads threads of which this one is number `thread`.
template <int kThreads, typename Half>
__device__ __forceinline__ void copy_swizzled(Half* tile, const Matrix& matrix, int64_t first_row,
                                              int64_t first_column, int thread) {
  constexpr int kAcross = kTileSide / kVector, kRowsApart = kThreads / kAcross;
  const int first = thread / kAcross, column = thread % kAcross * kVector;
  const auto rows = static_cast<int>(min(matrix.rows - first_row, int64_t{kTileSide}));
  const int bytes = matrix.count(first_row, first_column + column, kVector) * 2;
  const Half* from = matrix.at<Half>(first_row + first, first_column + column);
#pragma unroll
  for (int i = 0; i < kTileSide / kRowsApart; ++i) {
    const int row = first + i * kRowsApart;
    copy_async_16(element_of(tile, row, column), from + i * kRowsApart * matrix.view.stride,
                  row < rows ? bytes : 0);
  }
}

// Slots of shared memory that are filled and freed in turn, each with a barrier for either.
struct Ring {
  unsigned char* tiles;
  Barrier *filled, *freed;
  int slots, bytes;  // of a slot
};

// A role's place in a ring: it passes the slots in turn.
struct Turn {
  const Ring& ring;
  int slot = 0, parity = 0;

  __device__ __forceinline__ explicit Turn(const Ring& ring) : ring(ring) {}

  template <typename Half>
  __device__ __forceinline__ Half* tile(int index = 0) const {
    return reinterpret_cast<Half*>(ring.tiles + slot * ring.bytes + index * kTileBytes);
  }
  __device__ __forceinline__ Barrier* filled() const { return ring.filled + slot; }
  __device__ __forceinline__ void pass() {
    if (++slot < ring.slots) return;
    slot = 0;
    parity ^= 1;
  }
  // Waits until the slot is filled, or freed from its previous use.
  __device__ __forceinline__ void wait_filled() const { barrier_wait(filled(), parity); }
  __device__ __forceinline__ void wait_free() const { barrier_wait(ring.freed + slot, parity ^ 1); }
  // Frees the slot, once all lanes of all warps that read it have come here.
  __device__ __forceinline__ void free() const {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) barrier_arrive(ring.freed + slot);
  }
};

// What a launch of the resident form has to know, and the plan of it (facts.h).
struct ResidentShape {
  static constexpr int kBlockT = kTileSide, kBlockR = kTileSide;
  // Two warpgroups multiply, into the bottleneck and out of it, and four warps copy: two of them
  // the rows, one each weight.
  static constexpr int kGroupThreads = 4 * kWarpSize;
  static constexpr int kRowThreads = 2 * kWarpSize, kWeightThreads = kWarpSize;
  static constexpr int kThreads = 2 * kGroupThreads + kRowThreads + 2 * kWeightThreads;

  static constexpr int kSlotsIn = 3;  // of the weight into the bottleneck
  // Slots of the weight out of it, each with the tiles to add that are not the rows themselves.
  static __host__ __device__ constexpr int slots_out(int more) { return more == 0 ? 3 : 2; }
  // One bottleneck is read while the blocks of the cluster exchange the next one.
  static constexpr int kBottlenecks = 2;
  static constexpr int kSumBytes = kBlockT * kBlockR * 4;  // a block's share of all blocks' sums
  static constexpr int kBarrierBytes = 1024;

  // Bytes beside the slots, for a slice of so many panels.
  static __host__ __device__ constexpr int beside_bytes(int panels) {
    return kBottlenecks * kTileBytes + kSumBytes + 2 * panels * kTileSide * 4 + kBarrierBytes;
  }
  // Slots of rows: what is left. A block needs all panels of its rows, and some of the next ones.
  static __host__ __device__ constexpr int row_slots(int64_t bytes, int panels, int more) {
    return static_cast<int>((bytes - beside_bytes(panels)) / kTileBytes) - kSlotsIn -
           slots_out(more) * (1 + more);
  }
};

// The places of all that in a block's shared memory.
struct ResidentTiles {
  Ring rows, in, out, bottleneck, sums;
  float *bias, *factor;

  __device__ __forceinline__ ResidentTiles(unsigned char* shared, int64_t bytes, int panels,
                                           int more) {
    using Shape = ResidentShape;
    const auto add = [&](Ring& ring, int slots, int slot_bytes) {
      ring = {shared, nullptr, nullptr, slots, slot_bytes};
      shared += slots * slot_bytes;
    };
    add(rows, Shape::row_slots(bytes, panels, more), kTileBytes);
    add(in, Shape::kSlotsIn, kTileBytes);
    add(out, Shape::slots_out(more), (1 + more) * kTileBytes);
    add(bottleneck, Shape::kBottlenecks, kTileBytes);
    add(sums, 1, Shape::kSumBytes);
    bias = reinterpret_cast<float*>(shared);
    factor = bias + panels * kTileSide;
    auto* barrier = reinterpret_cast<Barrier*>(factor + panels * kTileSide);
    for (Ring* ring : {&rows, &in, &out, &bottleneck, &sums}) {
      ring->filled = barrier;
      ring->freed = barrier + ring->slots;
      barrier += 2 * ring->slots;
    }
  }

  // Makes the barriers, by one thread. Copying threads fill one by one, each warp of a group frees;
  // the bottleneck and the sums are filled by all blocks, as one thread of this one expects.
  __device__ __forceinline__ void make_barriers() const {
    using Shape = ResidentShape;
    constexpr int kWarps = Shape::kGroupThreads / kWarpSize;
    const auto make = [](const Ring& ring, int fillers) {
      for (int slot = 0; slot < ring.slots; ++slot) {
        barrier_init(ring.filled + slot, fillers);
        barrier_init(ring.freed + slot, kWarps);
      }
    };
    make(rows, Shape::kRowThreads);
    make(in, Shape::kWeightThreads);
    make(out, Shape::kWeightThreads);
    make(bottleneck, 1);
    make(sums, 1);
    barriers_made();
  }
};

}  // namespace adapterkern
