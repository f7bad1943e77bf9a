// Threads of a block as fibers of the C library. A fiber runs until it has to wait for others, then the next
// one runs.
#include "emulator.h"

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace effattn::cuda {
namespace {

constexpr int kLanesOfWarp = 32;
constexpr size_t kStackBytes = 96 * 1024;

// What threads that meet at a barrier leave for each other. A round is over when all have come; the last one
// computes what the others wait for.
struct Meeting {
  int members = 0, come = 0;
  int64_t round = 0;
  int kind = 0;  // of what the first one came for: threads that diverged would hang on a GPU
};

struct Warp {
  Meeting meeting;
  float in[kLanesOfWarp], exchanged[kLanesOfWarp], a[kLanesOfWarp][4], b[kLanesOfWarp][2], c[kLanesOfWarp][4];
  uint32_t narrow_a[kLanesOfWarp][4], narrow_b[kLanesOfWarp][2];
  const char* rows[kLanesOfWarp];
  uint16_t matrices[kLanesOfWarp][8];
};

struct Copy {
  void* to;
  const void* from;
  bool inside;
};

struct Block {
  int64_t index = 0;
  int rank = 0;
  std::unique_ptr<char[]> shared;
  Meeting meeting;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* asan = nullptr;
  Block* block = nullptr;
  int thread = 0;
  bool done = false, has_waited = false;
  std::vector<std::vector<Copy>> copies;  // by group, the last one not committed yet
};

struct Machine {
  EmulatedLaunch launch;
  std::vector<Block> blocks;  // of one cluster
  std::vector<Fiber> fibers;
  Meeting cluster;
  size_t running = 0, alive = 0;
  int64_t progress = 0;  // threads that came to a barrier or to their end
  ucontext_t caller;
  void* caller_asan = nullptr;
  const void* caller_stack = nullptr;
  size_t caller_stack_bytes = 0;
};

// One a launch under way: a fiber of a dependent one runs those in front of it while it waits for them.
std::deque<Machine> machines;
size_t under_way = 0;
// Launches that have not begun, in order. All but the first are dependent.
std::vector<EmulatedLaunch> pending;

Machine& machine() { return machines[under_way - 1]; }

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

Fiber& self() { return machine().fibers[machine().running]; }
Warp& warp() { return self().block->warps[self().thread / kLanesOfWarp]; }
int lane() { return self().thread % kLanesOfWarp; }

void switched(void* asan) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(asan, &stack, &bytes);
  if (machine().caller_stack == nullptr) machine().caller_stack = stack, machine().caller_stack_bytes = bytes;
#else
  (void)asan;
#endif
}

// `keep`: where the stack of the one that goes is remembered, null if it never comes back.
void go_to(ucontext_t* from, ucontext_t* to, [[maybe_unused]] void** keep, [[maybe_unused]] const void* stack,
           [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(keep, stack, bytes);
#endif
  swapcontext(from, to);
}

void run_next() {
  Fiber& from = self();
  do {
    machine().running = (machine().running + 1) % machine().fibers.size();
  } while (self().done);
  Fiber& to = self();
  if (&to == &from) return;
  go_to(&from.context, &to.context, &from.asan, to.stack.get(), kStackBytes);
  switched(from.asan);
}

void start() {
  switched(nullptr);
  machine().launch.body();
  Fiber& fiber = self();
  if (machine().launch.is_dependent && !fiber.has_waited) fail("a thread of a dependent launch did not wait");
  for (const std::vector<Copy>& group : fiber.copies) {
    if (!group.empty()) fail("a thread ended before what it copies was there");
  }
  fiber.done = true;
  ++machine().progress;
  if (--machine().alive > 0) {
    do {
      machine().running = (machine().running + 1) % machine().fibers.size();
    } while (self().done);
    go_to(&fiber.context, &self().context, nullptr, self().stack.get(), kStackBytes);
  } else {
    go_to(&fiber.context, &machine().caller, nullptr, machine().caller_stack, machine().caller_stack_bytes);
  }
}

// To begin where every fiber does.
void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start, 0);
}

// Waits until all members came; `last` is called by the one that comes last.
template <class F>
void meet(Meeting& meeting, int kind, F last) {
  if (meeting.come == 0) meeting.kind = kind;
  if (meeting.kind != kind) fail("threads of a group wait at different barriers");
  const int64_t round = meeting.round;
  ++machine().progress;
  if (++meeting.come == meeting.members) {
    last();
    meeting.come = 0;
    ++meeting.round;
    return;
  }
  while (meeting.round == round) {
    const int64_t before = machine().progress;
    run_next();
    // Every other thread had its turn since.
    if (meeting.round != round || machine().progress != before) continue;
    fail("threads wait for some that do not come");
  }
}

enum Kind { kBlock, kCluster, kWarp, kExchange, kMultiply, kMultiplyNarrow, kLoadMatrices };

// As GPUs do it at worst: products exact, their sum with c rounded towards zero.
float towards_zero(double x) {
  float y = static_cast<float>(x);
  if (std::isfinite(x) && std::fabs(static_cast<double>(y)) > std::fabs(x)) y = std::nextafterf(y, 0.0f);
  return y;
}

// c += a b, of a(row, k) and b(k, col).
template <int kDepth, class A, class B>
void multiply(Warp& w, A a, B b) {
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) {
      float& c = w.c[row % 8 * 4 + col / 2][row / 8 * 2 + col % 2];
      double sum = c;
      for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a(row, k)) * static_cast<double>(b(k, col));
      c = towards_zero(sum);
    }
  }
}

template <class T>
float half_of(uint32_t pair, int k) {
  return to_float(T{static_cast<uint16_t>(pair >> k % 2 * 16)});
}

void run(const EmulatedLaunch& launch) {
  if (++under_way > machines.size()) machines.emplace_back();
  Machine& m = machine();
  m.launch = launch;
  m.caller_stack = nullptr;
  m.blocks = std::vector<Block>(launch.cluster);
  const size_t fibers = static_cast<size_t>(launch.cluster) * launch.threads;
  m.fibers.resize(fibers);
  const char* const order = std::getenv("EFFATTN_EMULATOR_ORDER");
  const bool backwards = order != nullptr && std::string(order) == "backwards";
  for (int64_t first = 0; first < launch.blocks; first += launch.cluster) {
    for (int rank = 0; rank < launch.cluster; ++rank) {
      Block& block = m.blocks[rank];
      block.index = first + rank;
      block.rank = rank;
      block.shared.reset(new char[launch.shared_bytes]);  // anew, or a block would find what another one left
      std::memset(block.shared.get(), 0xff, launch.shared_bytes);
      block.meeting = {launch.threads, 0, 0, 0};
      block.warps = std::vector<Warp>(launch.threads / kLanesOfWarp);
      for (Warp& w : block.warps) w.meeting.members = kLanesOfWarp;
      for (int i = 0; i < launch.threads; ++i) {
        Fiber& fiber = m.fibers[rank * launch.threads + i];
        fiber.block = &block;
        fiber.thread = backwards ? launch.threads - 1 - i : i;
        fiber.done = fiber.has_waited = false;
        fiber.copies.clear();
        prepare(fiber);
      }
    }
    m.cluster = {static_cast<int>(fibers), 0, 0, 0};
    m.alive = fibers;
    m.running = 0;
    go_to(&m.caller, &m.fibers[0].context, &m.caller_asan, m.fibers[0].stack.get(), kStackBytes);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(m.caller_asan, nullptr, nullptr);
#endif
  }
  --under_way;
}

void check_tf32(float x) {
  if (std::isfinite(x) && (bits_of(x) & 0x1fff) != 0) fail("an operand of a product is not in TF32");
}

// Of an access to shared memory, which has to be aligned.
void check_shared(const char* at, int64_t bytes) {
  const int64_t offset = at - self().block->shared.get();
  if (offset < 0 || offset + bytes > machine().launch.shared_bytes)
    fail("an address is not in shared memory");
  if (offset % bytes != 0) fail("an address in shared memory is not aligned");
}

}  // namespace

int thread_index() { return self().thread; }
int64_t block_index() { return self().block->index; }
int cluster_rank() { return self().block->rank; }
char* shared_memory() { return self().block->shared.get(); }
void sync_block() {
  meet(self().block->meeting, kBlock, [] {});
}
void sync_warp() {
  meet(warp().meeting, kWarp, [] {});
}
void sync_cluster() {
  meet(machine().cluster, kCluster, [] {});
}

float shfl_xor(float x, int bits) {
  Warp& w = warp();
  w.in[lane()] = x;
  // Copied, since the first to go on may be back before the last has read.
  meet(w.meeting, kExchange, [&] { std::memcpy(w.exchanged, w.in, sizeof w.in); });
  return w.exchanged[lane() ^ bits];
}

float load_dsmem(const float* shared, int rank) {
  const char* const begin = self().block->shared.get();
  const int64_t offset = reinterpret_cast<const char*>(shared) - begin;
  if (offset < 0 || offset + 4 > machine().launch.shared_bytes)
    fail("an address of the cluster is not in shared memory");
  if (rank < 0 || rank >= static_cast<int>(machine().blocks.size()))
    fail("there is no such block in the cluster");
  float x;
  std::memcpy(&x, machine().blocks[rank].shared.get() + offset, 4);
  return x;
}

void mma_m16n8k8_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  for (const float x : a) check_tf32(x);
  for (const float x : b) check_tf32(x);
  Warp& w = warp();
  const int l = lane();
  std::memcpy(w.a[l], a, sizeof a);
  std::memcpy(w.b[l], b, sizeof b);
  std::memcpy(w.c[l], c, sizeof c);
  meet(w.meeting, kMultiply, [&] {
    multiply<8>(
        w, [&](int row, int k) { return w.a[row % 8 * 4 + k % 4][k / 4 * 2 + row / 8]; },
        [&](int k, int col) { return w.b[col * 4 + k % 4][k / 4]; });
  });
  std::memcpy(c, w.c[l], sizeof c);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Warp& w = warp();
  const int l = lane();
  std::memcpy(w.narrow_a[l], a, sizeof a);
  std::memcpy(w.narrow_b[l], b, sizeof b);
  std::memcpy(w.c[l], c, sizeof c);
  meet(w.meeting, kMultiplyNarrow, [&] {
    multiply<16>(
        w,
        [&](int row, int k) {
          return half_of<T>(w.narrow_a[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8], k);
        },
        [&](int k, int col) { return half_of<T>(w.narrow_b[col * 4 + k % 8 / 2][k / 8], k); });
  });
  std::memcpy(c, w.c[l], sizeof c);
}
template void mma_m16n8k16<BFloat16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);
template void mma_m16n8k16<Float16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);

template <bool kTransposed>
void ldmatrix_x4(uint32_t (&x)[4], const void* row) {
  const char* const at = static_cast<const char*>(row);
  check_shared(at, 16);
  Warp& w = warp();
  const int l = lane(), g = l / 4, t = l % 4;
  w.rows[l] = at;
  meet(w.meeting, kLoadMatrices, [&] {
    for (int i = 0; i < kLanesOfWarp; ++i) std::memcpy(w.matrices[i], w.rows[i], 16);
  });
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int r, int c) -> uint32_t { return w.matrices[8 * i + r][c]; };
    x[i] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                       : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
}
template void ldmatrix_x4<false>(uint32_t (&)[4], const void*);
template void ldmatrix_x4<true>(uint32_t (&)[4], const void*);

void cp_async_16(void* shared, const void* global, bool inside) {
  check_shared(static_cast<const char*>(shared), 16);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("an address of a copy is not aligned");
  Fiber& fiber = self();
  if (fiber.copies.empty()) fiber.copies.emplace_back();
  fiber.copies.back().push_back({shared, global, inside});
}
void cp_async_commit() { self().copies.emplace_back(); }
void cp_async_wait(int pending) {
  std::vector<std::vector<Copy>>& copies = self().copies;
  // Behind the groups that are committed stands the one that is not.
  while (static_cast<int>(copies.size()) - 1 > pending) {
    for (const Copy& copy : copies.front()) {
      copy.inside ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    }
    copies.erase(copies.begin());
  }
}

void grid_dependency_wait() {
  if (!pending.empty()) run_next();  // others of the cluster come as far as they do by themselves
  run_launches();
  self().has_waited = true;
}

float to_float(Float16 x) {
  _Float16 h;
  std::memcpy(&h, &x, 2);
  return static_cast<float>(h);
}
template <>
float from_float<float>(float x) {
  return x;
}
template <>
Float16 from_float<Float16>(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  Float16 y;
  std::memcpy(&y, &h, 2);
  return y;
}
template <>
BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

void emulate(EmulatedLaunch launch) {
  if (launch.threads % kLanesOfWarp != 0) fail("a block must have whole warps");
  // What other libraries launched is in front of a call's first launch.
  if (launch.is_dependent && pending.empty()) fail("the first launch of a call is dependent");
  if (!launch.is_dependent) run_launches();
  pending.push_back(std::move(launch));
}

void run_launches() {
  if (pending.empty()) return;
  const EmulatedLaunch last = std::move(pending.back());
  pending.pop_back();
  run(last);
  run_launches();  // where no thread of the last one waited
}

}  // namespace effattn::cuda
