// The CUDA kernels as functions of the CPU; called by test_cuda_emulated.py.
#define __shared__ static
#include "cuda/parts.cu"
#include "cuda/rotary.cu"
#include "cuda/sampler.cu"
#undef __shared__
#define __shared__
#include "cuda/advance.cu"
#include "cuda/attention.cu"
#include "cuda/cache.cu"

namespace thinktwice::gpu {
namespace {
uint4 memory[16 * 1024];  // the dynamic shared memory
}
}  // namespace thinktwice::gpu

using namespace thinktwice::gpu;

extern "C" {

// `launches_left`: the number of calls of CUDA that succeed before one fails; below 0, none fails.
void prepare(bool backwards, int launches_left) {
  emulated::backwards = backwards;
  emulated::launches_left = launches_left;
  emulated::refill = [](size_t bytes) {
    if (bytes > sizeof memory) std::abort();
    std::memset(memory, 0xff, sizeof memory);  // NaN
    copies.clear();
  };
}

int write_kv(const CacheWrite* work) { return launch_write_kv(*work, nullptr); }
int rotary_write_kv(const Rotary* work, int type) {
  return launch_rotary_write_kv(*work, static_cast<Type>(type), nullptr);
}
int copy_blocks(const BlockCopy* work) { return launch_copy_blocks(*work, nullptr); }
int decode(const Attention* a, int type, bool single_queries) {
  return launch_decode(*a, static_cast<Type>(type), single_queries, nullptr);
}
int prefill(const Attention* a, int type) { return launch_prefill(*a, static_cast<Type>(type), nullptr); }
int64_t parts(const Attention* a, int type) { return most_parts(*a, static_cast<Type>(type)); }
int list_parts(const Attention* a, int type, bool single_queries) {
  return launch_list_parts(*a, static_cast<Type>(type), single_queries, nullptr);
}
int advance(const thinktwice::Advance* work) { return launch_advance(*work, nullptr); }
int sample(const Sampling* work, int type) { return launch_sample(*work, static_cast<Type>(type), nullptr); }
}
