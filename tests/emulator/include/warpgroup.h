// Barriers in shared memory and the products of warpgroups, as compute capability 9.0 has them.
//
// A product reads its operands, and fills its sums, between its start and its wait: under odd seeds
// at once, else at the wait. Its registers are NaN meanwhile. Its warp must have fenced what copies
// and other blocks stored, after it landed; plain stores are not watched.
#pragma once

#include "emulator.h"

namespace adapterkern {

inline uint32_t shared_address(const void* pointer) {
  emulator::check_shared(pointer, 1, 1, "shared_address");
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               emulator::block->shared);
}

struct alignas(8) Barrier {
  uint8_t mark, arrivals, left, phase;
  int32_t
      bytes;  // that this phase expects and that have not landed; those that came early count less
};
constexpr uint8_t kMade = 0x8A;

inline void check_made(const Barrier* barrier, const char* name) {
  emulator::check_shared(barrier, sizeof(Barrier), sizeof(Barrier), name);
  if (barrier->mark != kMade) emulator::fail(std::string(name) + ": no barrier was made here");
}

inline void barrier_init(Barrier* barrier, int arrivals) {
  emulator::check_shared(barrier, sizeof(Barrier), sizeof(Barrier), "barrier_init");
  if (barrier->mark == kMade) emulator::fail("barrier_init: there is a barrier already");
  const auto count = static_cast<uint8_t>(arrivals);
  *barrier = {kMade, count, count, 0, 0};
}

inline void barriers_made() {}

// Ends the phase if nothing is missing, and lets the waiting threads of its block look again.
inline void end_phase(Barrier* barrier, emulator::Block& of) {
  if (barrier->left > 0 || barrier->bytes != 0) return;
  barrier->left = barrier->arrivals;
  ++barrier->phase;
  emulator::set_ready(of, emulator::State::kAtBarrier);
}

inline void barrier_expect(Barrier* barrier, int bytes) {
  check_made(barrier, "barrier_arrive");
  if (barrier->left == 0) emulator::fail("barrier_arrive: more arrivals than the barrier has");
  barrier->bytes += bytes;
  --barrier->left;
  end_phase(barrier, *emulator::block);
  emulator::wait_as(emulator::State::kAside);  // others may run before what follows
}

inline void barrier_arrive(Barrier* barrier) { barrier_expect(barrier, 0); }

// The copies of this thread land, and it arrives, now or at any later time.
inline void copy_async_arrive(Barrier* barrier) {
  check_made(barrier, "copy_async_arrive");
  emulator::Block& of = *emulator::block;
  emulator::land([&of, barrier, copies = std::move(emulator::current().open)] {
    for (const emulator::Copy& copy : copies) carry_out(copy, of);
    if (barrier->left == 0) emulator::fail("copy_async_arrive: more than the barrier has");
    --barrier->left;
    end_phase(barrier, of);
  });
  emulator::current().open.clear();
}

inline bool barrier_passed(Barrier* barrier, int parity) {
  check_made(barrier, "barrier_passed");
  return barrier->phase % 2 != parity;
}

inline void barrier_wait(Barrier* barrier, int parity) {
  while (!barrier_passed(barrier, parity)) emulator::wait_as(emulator::State::kAtBarrier);
}

// An address in a block of the cluster: the block's number above the offset.
constexpr int kOffsetBits = 18;

inline uint32_t remote_address(const void* shared, int rank) {
  if (rank < 0 || rank >= static_cast<int>(emulator::cluster->blocks.size())) {
    emulator::fail("remote_address: block " + std::to_string(rank) + " is not in the cluster");
  }
  return static_cast<uint32_t>(rank) << kOffsetBits | shared_address(shared);
}

// Lands at once under odd seeds, else at any later time, in any order.
template <int n>
void store_async(uint32_t to, const uint32_t (&v)[n], uint32_t barrier) {
  emulator::Block& other = emulator::cluster->blocks[to >> kOffsetBits];
  const uint32_t offset = to & ((1u << kOffsetBits) - 1);
  if (emulator::cluster->blocks.size() == 1) {
    emulator::fail("store_async: the block is the only one of its cluster");
  }
  if (to >> kOffsetBits != barrier >> kOffsetBits) {
    emulator::fail("store_async: the barrier is in another block");
  }
  if (offset % (4 * n) != 0 || offset + 4 * n > other.shared_bytes) {
    emulator::fail("store_async: misaligned, or outside of the shared memory of the block");
  }
  auto* const counts = reinterpret_cast<Barrier*>(other.shared + barrier % (1u << kOffsetBits));
  if (counts->mark != kMade) emulator::fail("store_async: no barrier was made here");
  std::vector<uint32_t> words(v, v + n);
  emulator::land([&other, offset, counts, words] {
    if (other.has_ended()) emulator::fail("store_async: the other block has ended");
    std::memcpy(other.shared + offset, words.data(), 4 * n);
    other.landed_at[offset / 16] = ++other.landed;
    counts->bytes -= 4 * n;
    end_phase(counts, other);
  });
}

inline void fence_async_proxy() { emulator::current().fenced_at = emulator::block->landed; }

inline void warpgroup_fence(float (&)[32]) {
  char nothing;
  emulator::warp_operation("warpgroup_fence", nothing,
                           [](char**) { emulator::current_warp().products.fenced = true; });
}

inline void warpgroup_wait(float (&)[32]) {
  char nothing;
  emulator::warp_operation("warpgroup_wait", nothing, [](char**) {
    emulator::WarpProducts& products = emulator::current_warp().products;
    for (const auto& compute : products.late) compute();
    for (const auto& finish : products.finishes) finish();
    products = {};
  });
}

}  // namespace adapterkern

namespace emulator {

// A matrix in shared memory as its descriptor tells it: PTX ISA, "Matrix Descriptor Format" and the
// canonical layouts of the swizzle over 128 bytes.
struct Operand {
  uint64_t descriptor;
  bool along_rows;     // whether the 16 elements of a product are contiguous
  uint32_t fenced_at;  // what had landed when the lanes fenced it

  uint64_t field(int first, int bits) const { return descriptor >> first & ((1ull << bits) - 1); }

  void check() const {
    if (field(62, 2) != 1) fail("wgmma: not the swizzle over 128 bytes");
    if (field(49, 3) != 0) fail("wgmma: a base offset, for a tile that starts at 1024 bytes");
    const uint64_t in_row = (field(0, 14) << 4) % 128;
    if (in_row + (along_rows ? 32 : 128) > 128) fail("wgmma: an operand that leaves its rows");
  }

  // Returns the bits of element (row, k); b is told by its transpose.
  uint16_t at(int row, int k) const {
    const uint64_t start = field(0, 14) << 4, eight = field(32, 14) << 4;
    const int line = along_rows ? row : k, in_line = along_rows ? k : row;
    uint64_t address = start + line / 8 * eight + line % 8 * 128 + in_line * 2;
    address ^= (address >> 7 & 7) << 4;
    if (address + 2 > block->shared_bytes) fail("wgmma: outside of the shared memory of the block");
    if (block->landed_at[address / 16] > fenced_at) fail("wgmma: reads what was not fenced");
    uint16_t bits;
    std::memcpy(&bits, block->shared + address, 2);
    return bits;
  }
};

// One wgmma for the 16 rows of this warp.
template <typename Widen>
void warpgroup_product(float (&d)[32], uint64_t a, uint64_t b, bool transposed, Widen widen) {
  struct Lane {
    float* d;
    uint64_t a, b;
  } mine{d, a, b};
  warp_operation("wgmma", mine, [transposed, widen](Lane** lanes) {
    WarpProducts& products = current_warp().products;
    if (!products.fenced) fail("wgmma: its registers are not fenced");
    for (int lane = 1; lane < kWarpSize; ++lane) {
      if (lanes[lane]->a != lanes[0]->a || lanes[lane]->b != lanes[0]->b) {
        fail("wgmma: lanes describe other operands");
      }
    }
    std::vector<float*> registers;
    for (int lane = 0; lane < kWarpSize; ++lane) registers.push_back(lanes[lane]->d);
    auto [found, is_new] = products.sums.try_emplace(registers[0]);
    std::vector<float>& sums = found->second;
    if (is_new) {
      for (float* of_lane : registers) {
        sums.insert(sums.end(), of_lane, of_lane + 32);
        std::memset(of_lane, kPoison, 32 * sizeof(float));
      }
      products.finishes.push_back([registers, &sums] {
        for (int lane = 0; lane < kWarpSize; ++lane) {
          std::copy_n(sums.begin() + 32 * lane, 32, registers[lane]);
        }
      });
    }
    const int first_thread = current().linear / kWarpSize * kWarpSize;
    uint32_t fenced_at = block->landed;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      fenced_at = std::min(fenced_at, block->threads[first_thread + lane].fenced_at);
    }
    const Operand left{lanes[0]->a, true, fenced_at};
    const Operand right{lanes[0]->b, !transposed, fenced_at};
    left.check();
    right.check();
    const int first_row = first_thread / kWarpSize % 4 * 16;
    const auto compute = [=, &sums] {
      for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 64; ++column) {
          float sum = 0.0f;
          for (int k = 0; k < 16; ++k) {
            sum += widen(left.at(first_row + row, k)) * widen(right.at(column, k));
          }
          const int lane = row % 8 * 4 + column % 8 / 2;
          sums[32 * lane + column / 8 * 4 + row / 8 * 2 + column % 2] += sum;
        }
      }
    };
    if (cluster->eager_copies) return compute();
    products.late.push_back(compute);
  });
}

}  // namespace emulator
