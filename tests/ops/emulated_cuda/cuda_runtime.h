// Stands in for CUDA's header of this name, so that a C++ compiler takes the .cu files as they are and a launch runs on the CPU.
//
// Lanes of a warp are fibers that take turns: each runs until it meets a shuffle, where it leaves its value and waits for the others. A
// lane that traps goes no further, and the launch fails. What only a GPU has is not shown: parallel warps, coalescing, the order of memory.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; cudaStream_t stream; };

inline dim3 blockIdx, threadIdx;

namespace emulation {

constexpr int LANES = 32;
constexpr size_t STACK = 128 << 10;

inline ucontext_t scheduler;
inline std::array<ucontext_t, LANES> lanes;
inline std::array<bool, LANES> done;
inline std::array<std::array<uint32_t, LANES>, 2> exchanged;  // of this shuffle and of the one before, which a lane may still have to read
inline std::array<int, LANES> shuffles;                       // that each lane has met
inline int current;                                           // the lane that runs
inline bool trapped;
inline const void* body;
inline void (*call)(const void*);

inline void leave() { swapcontext(&lanes[current], &scheduler); }

inline void enter() {
  call(body);
  done[current] = true;
  leave();
}

// One turn for each lane of a warp, until all are done.
template <class Body>
void run_warp(const Body& run, unsigned first, unsigned threads) {
  static std::vector<char> stacks(LANES * STACK);
  body = &run;
  call = [](const void* b) { (*static_cast<const Body*>(b))(); };
  const int count = int(min(threads - first, unsigned(LANES)));
  done.fill(true);
  shuffles.fill(0);
  for (int lane = 0; lane < count; ++lane) {
    getcontext(&lanes[lane]);
    lanes[lane].uc_stack.ss_sp = stacks.data() + lane * STACK;
    lanes[lane].uc_stack.ss_size = STACK;
    makecontext(&lanes[lane], enter, 0);
    done[lane] = false;
  }
  while (!std::all_of(done.begin(), done.end(), [](bool d) { return d; })) {
    for (current = 0; current < count; ++current) {
      threadIdx.x = first + unsigned(current);
      if (!done[current]) swapcontext(&scheduler, &lanes[current]);
    }
  }
}

template <class T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) == 4);
  auto& values = exchanged[shuffles[current]++ % 2];
  std::memcpy(&values[current], &value, 4);
  leave();
  std::memcpy(&value, &values[source], 4);
  return value;
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) { return emulation::shuffle(value, emulation::current ^ distance); }

template <class T>
T __shfl_sync(unsigned, T value, int source, int width) {
  return emulation::shuffle(value, emulation::current / width * width + source);
}

inline void __trap() {
  emulation::trapped = emulation::done[emulation::current] = true;
  emulation::leave();
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  emulation::trapped = false;
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x)
    for (unsigned first = 0; first < config->blockDim.x; first += emulation::LANES)
      emulation::run_warp([&] { kernel(arguments...); }, first, config->blockDim.x);
  return emulation::trapped ? cudaErrorLaunchFailure : cudaSuccess;
}
