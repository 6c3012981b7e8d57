// Includes THINKTWICE_KERNELS once per instruction set, each time in a namespace of that set's name, and
// defines ISA_DISPATCH, which picks the copy that this machine runs.
//
// The kernels use GCC's vector types, which are lowered before `target_clones` takes effect; with one copy of
// the source per set they are lowered for the set at hand. In the included file KERNEL_TARGET marks every
// function, and KERNEL_WIDTH is the number of floats in a vector. No include guard: once per source file.
#if defined(__x86_64__)
#define KERNEL_WIDTH 16
#define KERNEL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
namespace avx512 {
#include THINKTWICE_KERNELS
}
#undef KERNEL_WIDTH
#undef KERNEL_TARGET

#define KERNEL_WIDTH 8
#define KERNEL_TARGET __attribute__((target("avx2,fma")))
namespace avx2 {
#include THINKTWICE_KERNELS
}
#undef KERNEL_WIDTH
#undef KERNEL_TARGET
#endif

#define KERNEL_WIDTH 4
#define KERNEL_TARGET
namespace baseline {
#include THINKTWICE_KERNELS
}
#undef KERNEL_WIDTH
#undef KERNEL_TARGET

#if defined(__x86_64__)
#define ISA_DISPATCH(...)                                                                     \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                 \
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")           \
       ? avx512::__VA_ARGS__                                                                  \
       : (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2::__VA_ARGS__ \
                                                                          : baseline::__VA_ARGS__))
#else
#define ISA_DISPATCH(...) baseline::__VA_ARGS__
#endif
