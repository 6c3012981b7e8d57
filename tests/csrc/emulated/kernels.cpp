// The CUDA kernels as functions of the CPU; called by test_cuda_emulated.py.
#define __shared__ static
#include "cuda/rotary.cu"
#include "cuda/sampler.cu"
#undef __shared__
#define __shared__
#include "cuda/attention.cu"
#include "cuda/cache.cu"

namespace thinktwice::gpu {
namespace {
uint4 memory[16 * 1024];  // the dynamic shared memory
}
}  // namespace thinktwice::gpu

using namespace thinktwice::gpu;

extern "C" {

void prepare(bool backwards) {
  emulated::backwards = backwards;
  emulated::refill = [](size_t bytes) {
    if (bytes > sizeof memory) std::abort();
    std::memset(memory, 0xff, sizeof memory);  // NaN
    copies.clear();
  };
}

void write_kv(const CacheWrite* work) { launch_write_kv(*work, nullptr); }
void rotary_write_kv(const Rotary* work, int type) {
  launch_rotary_write_kv(*work, static_cast<Type>(type), nullptr);
}
void copy_blocks(const BlockCopy* work) { launch_copy_blocks(*work, nullptr); }
void decode(const Attention* a, int type, bool single_queries) {
  launch_decode(*a, static_cast<Type>(type), single_queries, nullptr);
}
void prefill(const Attention* a, int type) { launch_prefill(*a, static_cast<Type>(type), nullptr); }
void grouped_decode(const Attention* a, int type) {
  launch_grouped_decode(*a, static_cast<Type>(type), nullptr);
}
void sample(const Sampling* work, int type) { launch_sample(*work, static_cast<Type>(type), nullptr); }
}
