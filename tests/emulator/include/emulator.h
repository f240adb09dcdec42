// CUDA blocks on the host: one fibre a thread, so barriers and warp operations have their meaning.
//
// A fibre runs until it must wait. Which one runs next is the schedule: seed 0 goes round all
// threads in turn; any other seed lets one warp, drawn at random, run far ahead of the others.
// Under odd seeds cp.async copies at once, else at its wait: a missing wait shows under the latter,
// a missing barrier under the former. The blocks of a cluster run together, clusters one after the
// other.
//
// Shared memory starts as NaN and is checked at its edges. An operation that a GPU would refuse, or
// get wrong without a word, throws an Error that names the thread; x86-64 only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using std::min;

// Saves the callee-saved registers on this stack and continues on another one.
extern "C" void emulator_switch(void** saved_stack, void* next_stack);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, . - emulator_switch
)");

namespace emulator {

constexpr int kWarpSize = 32;
constexpr int kMostThreads = 1024;
constexpr unsigned kMostClusterSize = 8;      // blocks; every GPU with clusters can place them
constexpr int kMostSharedBytes = 227 * 1024;  // compute capability 9.0
constexpr unsigned kMostGridYZ = 65535;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type
constexpr unsigned char kGuard = 0xA5;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Copy {
  void* shared;
  const void* global;
  int bytes;
};

enum class State { kReady, kAtWarp, kAtBlock, kAtCluster, kAtBarrier, kAside, kDone };

struct Thread {
  void* stack = nullptr;  // where it continues
  dim3 index;
  int linear = 0;
  State state = State::kReady;
  std::vector<Copy> open;                 // copies since the last commit
  std::vector<std::vector<Copy>> groups;  // committed and not waited for
  uint32_t fenced_at = 0;                 // what had landed at its last fence
};

// The products of a warp's part of a warpgroup that have begun and were not waited for.
struct WarpProducts {
  bool fenced = false;
  std::map<float*, std::vector<float>> sums;          // of each lane, whose registers are poisoned
  std::vector<std::function<void()>> late, finishes;  // what is read at the wait; then the sums
};

// A warp operation in progress; the last lane to arrive carries it out for all.
struct Warp {
  const char* operation = nullptr;
  int arrived = 0;
  void* arguments[kWarpSize];
  WarpProducts products;
};

struct Block {
  dim3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;  // guard, shared memory, guard
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<uint32_t> landed_at;  // of each 16 bytes: the number of what last landed there
  uint32_t landed = 0;
  int at_barrier = 0, done = 0;

  bool has_ended() const { return done == static_cast<int>(threads.size()); }
};

struct Cluster {
  std::vector<Block> blocks;
  int at_barrier = 0;
  bool eager_copies = false;
  std::vector<std::function<void()>> landing;  // stores that are under way
  std::function<void()> body;
  std::string error;
  void* scheduler_stack = nullptr;
};

// The cluster, block and thread that run now.
inline Cluster* cluster = nullptr;
inline Block* block = nullptr;
inline Thread* thread = nullptr;
inline unsigned seed = 0;  // of the launches to come

inline Thread& current() { return *thread; }

[[noreturn]] inline void fail(const std::string& what) {
  std::string where;
  if (thread != nullptr) {
    where = " (block " + std::to_string(block->index.x) + ", " + std::to_string(block->index.y) +
            ", " + std::to_string(block->index.z) + ", thread " + std::to_string(current().linear) +
            ")";
  }
  throw Error(what + where);
}

inline void wait_as(State state) {
  Thread& waiting = current();
  waiting.state = state;
  emulator_switch(&waiting.stack, cluster->scheduler_stack);
}

inline void set_ready(Block& of, State waiting) {
  for (Thread& each : of.threads) {
    if (each.state == waiting) each.state = State::kReady;
  }
}

// Threads that are done count as arrived, at either barrier.
inline void release_barriers() {
  if (block->at_barrier > 0 &&
      block->at_barrier + block->done == static_cast<int>(block->threads.size())) {
    block->at_barrier = 0;
    set_ready(*block, State::kAtBlock);
  }
  size_t arrived = cluster->at_barrier, all = 0;
  for (const Block& each : cluster->blocks) {
    arrived += each.done;
    all += each.threads.size();
  }
  if (cluster->at_barrier > 0 && arrived == all) {
    cluster->at_barrier = 0;
    for (Block& each : cluster->blocks) set_ready(each, State::kAtCluster);
  }
}

inline void arrive_and_wait(int& arrived, State state) {
  ++arrived;
  current().state = state;
  release_barriers();
  if (current().state == state) wait_as(state);
}

inline void barrier() { arrive_and_wait(block->at_barrier, State::kAtBlock); }
inline void cluster_barrier() { arrive_and_wait(cluster->at_barrier, State::kAtCluster); }

// Every lane passes a pointer to its arguments; the last to arrive calls `carry_out` with all 32.
template <typename Arguments, typename CarryOut>
void warp_operation(const char* name, Arguments& mine, CarryOut carry_out) {
  Warp& warp = block->warps[current().linear / kWarpSize];
  if (warp.arrived > 0 && std::strcmp(warp.operation, name) != 0) {
    fail(std::string("lanes of one warp meet in ") + warp.operation + " and in " + name);
  }
  warp.operation = name;
  warp.arguments[current().linear % kWarpSize] = &mine;
  if (++warp.arrived < kWarpSize) return wait_as(State::kAtWarp);
  warp.arrived = 0;
  Arguments* all[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    all[lane] = static_cast<Arguments*>(warp.arguments[lane]);
  }
  carry_out(all);
  const int first = current().linear / kWarpSize * kWarpSize;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    block->threads[first + lane].state = State::kReady;
  }
}

inline Warp& current_warp() { return block->warps[current().linear / kWarpSize]; }

inline void carry_out(const Copy& copy, Block& of) {
  if (copy.bytes > 0) std::memcpy(copy.shared, copy.global, copy.bytes);
  std::memset(static_cast<char*>(copy.shared) + copy.bytes, 0, 16 - copy.bytes);
  of.landed_at[(static_cast<unsigned char*>(copy.shared) - of.shared) / 16] = ++of.landed;
}

inline void check_shared(const void* pointer, size_t bytes, size_t alignment, const char* name) {
  const auto* at = static_cast<const unsigned char*>(pointer);
  if (at < block->shared || at + bytes > block->shared + block->shared_bytes) {
    fail(std::string(name) + ": outside of the shared memory of the block");
  }
  if ((at - block->shared) % alignment != 0) {
    fail(std::string(name) + ": misaligned address in shared memory");
  }
}

// Returns the address in block `rank` that corresponds to `pointer` in this block's shared memory.
inline unsigned char* remote(const void* pointer, int rank, const char* name) {
  check_shared(pointer, 16, 16, name);
  if (rank < 0 || rank >= static_cast<int>(cluster->blocks.size())) {
    fail(std::string(name) + ": block " + std::to_string(rank) + " is not in the cluster");
  }
  Block& other = cluster->blocks[rank];
  if (other.has_ended()) fail(std::string(name) + ": the other block has ended");
  return other.shared + (static_cast<const unsigned char*>(pointer) - block->shared);
}

inline void run_thread(Block& of, Thread& next) {
  block = &of;
  thread = &next;
  emulator_switch(&cluster->scheduler_stack, next.stack);
  thread = nullptr;
  if (!cluster->error.empty()) throw Error(cluster->error);
}

inline void thread_main() {
  try {
    cluster->body();
  } catch (const std::exception& error) {
    cluster->error = error.what();
  }
  current().state = State::kDone;
  ++block->done;
  release_barriers();
  wait_as(State::kDone);
  std::abort();  // nobody switches to a thread that is done
}

// Puts a fresh frame on a stack: six registers, then the address that `ret` goes to.
inline void* prepare_stack(unsigned char* stack) {
  const auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top);
  *--frame = nullptr;  // alignment, as after a call
  *--frame = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < 6; ++i) *--frame = nullptr;
  return frame;
}

// Runs the ready threads of one warp once each; returns whether there was one.
inline bool run_warp(Block& of, size_t warp) {
  bool ran = false;
  for (size_t i = warp * kWarpSize; i < (warp + 1) * kWarpSize; ++i) {
    if (of.threads[i].state != State::kReady) continue;
    run_thread(of, of.threads[i]);
    ran = true;
  }
  return ran;
}

// Carries out a store to a block of the cluster, now or later.
inline void land(std::function<void()> store) {
  if (cluster->eager_copies) return store();
  cluster->landing.push_back(std::move(store));
}

// Lands one of the stores that are under way; returns whether there was one.
inline bool land_one(std::mt19937& random) {
  auto& landing = cluster->landing;
  if (landing.empty()) return false;
  std::swap(landing[random() % landing.size()], landing.back());
  const auto store = std::move(landing.back());
  landing.pop_back();
  store();
  return true;
}

inline void run_cluster(std::mt19937& random) {
  std::vector<std::pair<Block*, size_t>> order;
  for (Block& each : cluster->blocks) {
    for (size_t warp = 0; warp < each.warps.size(); ++warp) order.emplace_back(&each, warp);
  }
  const auto runs = [](const Block& each) { return !each.has_ended(); };
  while (std::any_of(cluster->blocks.begin(), cluster->blocks.end(), runs)) {
    if (seed != 0) std::shuffle(order.begin(), order.end(), random);
    bool ran = false;
    for (Block& each : cluster->blocks) set_ready(each, State::kAside);
    for (const auto& [of, warp] : order) {
      const bool ready = run_warp(*of, warp);
      ran = ran || ready;
      if (seed == 0 || !ready) continue;
      const unsigned most = 1 + random() % 400;  // far enough to pass several barriers
      for (unsigned round = 1; round < most && run_warp(*of, warp); ++round) {
      }
      break;  // draw again
    }
    if (ran && random() % 4 == 0) land_one(random);
    if (!ran && !land_one(random)) {
      fail("deadlock: every thread waits, at a barrier or in a warp operation");
    }
  }
}

inline void check_guards(const Block& of) {
  const unsigned char* end = of.shared + of.shared_bytes;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (of.shared[-1 - static_cast<ptrdiff_t>(i)] != kGuard || end[i] != kGuard) {
      fail("a write outside of the shared memory of the block");
    }
  }
}

inline void check_launch(dim3 grid, int threads, int shared_bytes, unsigned cluster_size) {
  if (threads < 1 || threads > kMostThreads || threads % kWarpSize != 0) {
    fail("launch: " + std::to_string(threads) + " threads a block");
  }
  if (shared_bytes > kMostSharedBytes) {
    fail("launch: " + std::to_string(shared_bytes) + " bytes of shared memory");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > kMostGridYZ || grid.z > kMostGridYZ) {
    fail("launch: grid " + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
         std::to_string(grid.z));
  }
  if (cluster_size < 1 || cluster_size > kMostClusterSize || grid.x % cluster_size != 0) {
    fail("launch: " + std::to_string(grid.x) + " blocks in clusters of " +
         std::to_string(cluster_size));
  }
}

// Poisons the shared memory and prepares the threads, whose stacks follow one another at `stacks`.
inline void prepare_block(Block& of, dim3 index, dim3 grid, int threads, int shared_bytes,
                          unsigned char* stacks) {
  of.index = index;
  of.size = dim3(threads);
  of.grid = grid;
  of.at_barrier = of.done = 0;
  of.shared_bytes = shared_bytes;
  of.memory.resize(shared_bytes + 2 * kGuardBytes + 1024);
  const auto base = reinterpret_cast<uintptr_t>(of.memory.data()) + kGuardBytes;
  of.shared = reinterpret_cast<unsigned char*>((base + 1023) & ~uintptr_t{1023});
  std::memset(of.shared - kGuardBytes, kGuard, shared_bytes + 2 * kGuardBytes);
  std::memset(of.shared, kPoison, shared_bytes);
  of.landed_at.assign(shared_bytes / 16 + 1, 0);
  of.landed = 0;
  of.threads.assign(threads, Thread());
  of.warps.assign(threads / kWarpSize, Warp());
  for (int i = 0; i < threads; ++i) {
    of.threads[i].linear = i;
    of.threads[i].index = dim3(i, 0, 0);
    of.threads[i].stack = prepare_stack(stacks + i * kStackBytes);
  }
}

// Runs `body` as every thread of every block. Throws the first Error.
inline void launch(dim3 grid, int threads, int shared_bytes, unsigned cluster_size,
                   std::function<void()> body) {
  check_launch(grid, threads, shared_bytes, cluster_size);
  // Kept, since a launch may have thousands of blocks; not cleared, so that only used pages exist.
  static std::unique_ptr<unsigned char[]> stacks;
  static size_t room = 0;
  if (const size_t bytes = cluster_size * threads * kStackBytes; room < bytes) {
    stacks.reset(new unsigned char[room = bytes]);
  }
  std::mt19937 random(seed);
  Cluster state;
  state.blocks.resize(cluster_size);
  state.eager_copies = seed % 2 == 1;
  state.body = std::move(body);

  struct Running {  // cleared after an error too
    ~Running() {
      cluster = nullptr;
      block = nullptr;
      thread = nullptr;
    }
  } running;
  cluster = &state;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += cluster_size) {
        for (unsigned rank = 0; rank < cluster_size; ++rank) {
          prepare_block(state.blocks[rank], dim3(x + rank, y, z), grid, threads, shared_bytes,
                        stacks.get() + rank * threads * kStackBytes);
        }
        run_cluster(random);
        for (const Block& each : state.blocks) check_guards(each);
      }
    }
  }
}

}  // namespace emulator

#define threadIdx (emulator::current().index)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block->size)
#define gridDim (emulator::block->grid)

inline void __syncthreads() { emulator::barrier(); }

inline void __syncwarp() {
  char nothing;
  emulator::warp_operation("__syncwarp", nothing, [](char**) {});
}

inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  if (mask != 0xFFFFFFFFu) emulator::fail("__shfl_xor_sync: not all lanes take part");
  struct Lane {
    float value, result;
    int lane_mask;
  } lane{value, 0.0f, lane_mask};
  emulator::warp_operation("__shfl_xor_sync", lane, [](Lane** lanes) {
    for (int i = 0; i < emulator::kWarpSize; ++i) {
      lanes[i]->result = lanes[i ^ lanes[i]->lane_mask]->value;
    }
  });
  return lane.result;
}
