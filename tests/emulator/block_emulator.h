// Runs CUDA kernel source on a CPU, one thread block at a time, to test values without a GPU.
//
// Every CUDA thread is a fiber (ucontext) that runs until it reaches a barrier or a warp exchange;
// the scheduler resumes runnable fibers in an order drawn from `seed`, so that a missing
// __syncthreads() shows up as a wrong or unstable result. Blocks run one after another, so
// `__shared__` is a plain static, filled with NaN bits before every block by `forget`. A barrier
// or exchange that some thread of its block or warp never reaches is an error, and so is one that
// threads reach at different lines: on a GPU both are undefined.
//
// With EMULATOR_WITHOUT_BARRIERS, __syncthreads() does nothing: a broken kernel, to test the tests.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__ inline
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulator {

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum class Wait { kNone, kBlock, kWarp };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  Wait wait = Wait::kNone;
  int line = 0;  // of the barrier it waits at
  bool done = false;
  uint64_t exchanged = 0;

  static constexpr size_t kStack = 64 << 10;
};

inline dim3 thread_, block_, block_size_, grid_size_;
inline std::vector<std::unique_ptr<Fiber>> fibers;  // of the running block; kept from one to the next
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::mt19937 order_source{0};
inline std::vector<char> dynamic_shared;

inline void seed(unsigned value) { order_source.seed(value); }

inline void pause(Wait reason, int line) {
  Fiber* self = current;
  self->wait = reason;
  self->line = line;
  swapcontext(&self->context, &scheduler);
  thread_ = self->thread;
}

inline void run_fiber() {
  body();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("block emulator: " + what + ", block (" + std::to_string(block_.x) + ", " +
                           std::to_string(block_.y) + ", " + std::to_string(block_.z) + ")");
}

// Releases the threads begin..end if all of them wait for the same thing.
inline bool release(size_t begin, size_t end, Wait reason) {
  size_t waiting = 0, finished = 0;
  for (size_t i = begin; i < end; ++i) {
    waiting += !fibers[i]->done && fibers[i]->wait == reason;
    finished += fibers[i]->done;
  }
  if (waiting == 0 || waiting + finished < end - begin) return false;
  if (finished > 0)
    fail("a barrier at line " +
         std::to_string(
             std::find_if(fibers.begin() + begin, fibers.end(), [](const auto& f) { return !f->done; })
                 ->get()
                 ->line) +
         " that " + std::to_string(finished) + " threads never reach");
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i]->line != fibers[begin]->line)
      fail("threads wait at different barriers, lines " + std::to_string(fibers[begin]->line) + " and " +
           std::to_string(fibers[i]->line));
  }
  for (size_t i = begin; i < end; ++i) fibers[i]->wait = Wait::kNone;
  return true;
}

inline void start(Fiber& fiber, dim3 thread) {
  fiber.thread = thread;
  fiber.wait = Wait::kNone;
  fiber.done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = Fiber::kStack;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, run_fiber, 0);
}

inline void run_block(size_t count) {
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) {
    order[i] = i;
    start(*fibers[i], {unsigned(i % block_size_.x), unsigned(i / block_size_.x % block_size_.y),
                       unsigned(i / block_size_.x / block_size_.y)});
  }
  for (size_t left = count; left > 0;) {
    bool moved = false;
    std::shuffle(order.begin(), order.end(), order_source);
    for (size_t i : order) {
      Fiber& fiber = *fibers[i];
      if (fiber.done || fiber.wait != Wait::kNone) continue;
      moved = true;
      current = &fiber;
      thread_ = fiber.thread;
      swapcontext(&scheduler, &fiber.context);
      left -= fiber.done;
    }
    for (size_t warp = 0; warp < count; warp += 32)
      moved |= release(warp, std::min(warp + 32, count), Wait::kWarp);
    moved |= release(0, count, Wait::kBlock);
    if (!moved) fail("threads wait for each other: some at a barrier of the block, some at one of a warp");
  }
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void*, const Parameters&... parameters) {
  grid_size_ = grid;
  block_size_ = block;
  body = [&] { kernel(parameters...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_ = {x, y, z};
        std::fill(dynamic_shared.begin(), dynamic_shared.end(), char(0xff));
        run_block(size_t(block.x) * block.y * block.z);
      }
    }
  }
}

inline size_t linear_thread() {
  return thread_.x + size_t(block_size_.x) * (thread_.y + size_t(block_size_.y) * thread_.z);
}

// What the lane `source(own lane)` of the warp passes to the same call.
template <class T>
T exchange(unsigned mask, T value, unsigned source, int line) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) fail("exchanges of a part of a warp are not emulated");
  std::memcpy(&current->exchanged, &value, sizeof value);
  const size_t warp = linear_thread() / 32 * 32;
  pause(Wait::kWarp, line);
  T received;
  std::memcpy(&received, &fibers[warp + source]->exchanged, sizeof received);
  pause(Wait::kWarp, line);
  return received;
}

inline unsigned lane() { return linear_thread() % 32; }

inline unsigned ballot(unsigned mask, bool predicate, int line) {
  unsigned bits = 0;
  for (unsigned other = 0; other < 32; ++other)
    bits |= exchange(mask, unsigned(predicate), other, line) << other;
  return bits;
}

template <class T, class F>
T atomic(T* address, const F& update) {  // fibers never run at once
  const T before = *address;
  *address = update(before);
  return before;
}

}  // namespace emulator

using emulator::dim3;

#define threadIdx emulator::thread_
#define blockIdx emulator::block_
#define blockDim emulator::block_size_
#define gridDim emulator::grid_size_

#ifdef EMULATOR_WITHOUT_BARRIERS
#define __syncthreads() static_cast<void>(0)
#else
#define __syncthreads() emulator::pause(emulator::Wait::kBlock, __LINE__)
#endif
#define __syncwarp(...) emulator::pause(emulator::Wait::kWarp, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  emulator::exchange(mask, value, emulator::lane() ^ (lanes), __LINE__)
#define __shfl_sync(mask, value, source) emulator::exchange(mask, value, (source) % 32, __LINE__)
#define __shfl_down_sync(mask, value, lanes)                                                          \
  emulator::exchange(mask, value,                                                                     \
                     emulator::lane() + (lanes) < 32 ? emulator::lane() + (lanes) : emulator::lane(), \
                     __LINE__)
#define __shfl_up_sync(mask, value, lanes) \
  emulator::exchange(mask, value,          \
                     emulator::lane() >= (lanes) ? emulator::lane() - (lanes) : emulator::lane(), __LINE__)
#define __ballot_sync(mask, predicate) emulator::ballot(mask, predicate, __LINE__)
#define __any_sync(mask, predicate) (emulator::ballot(mask, predicate, __LINE__) != 0)
#define __all_sync(mask, predicate) (emulator::ballot(mask, predicate, __LINE__) == 0xffffffffu)

template <class T>
T atomicAdd(T* address, T value) {
  return emulator::atomic(address, [&](T old) { return old + value; });
}
template <class T>
T atomicOr(T* address, T value) {
  return emulator::atomic(address, [&](T old) { return old | value; });
}
template <class T>
T atomicMax(T* address, T value) {
  return emulator::atomic(address, [&](T old) { return std::max(old, value); });
}

// --- vector types, loads and conversions -------------------------------------------------------

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

template <class T>
T checked(const T* address) {  // a GPU traps here
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) std::abort();
  return *address;
}

}  // namespace emulator

template <class T>
T __ldg(const T* address) {
  return emulator::checked(address);
}
template <class T>
T __ldcs(const T* address) {
  return emulator::checked(address);
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

struct __half {
  _Float16 value;
};
inline __half __ushort_as_half(unsigned short bits) {
  __half half;
  std::memcpy(&half, &bits, sizeof half);
  return half;
}
inline unsigned short __half_as_ushort(__half half) {
  unsigned short bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}
inline float __half2float(__half half) { return static_cast<float>(half.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

struct __nv_bfloat16 {
  unsigned short bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
