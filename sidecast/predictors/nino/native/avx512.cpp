// fp32 loops for x86 processors with AVX-512F.

#if defined(__x86_64__)

#define LOOPS avx512
#define FOR_THIS_PROCESSOR __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma")))
#define LANES 16
// 24 of 32 registers for sums.
#define VECTORS 4
#define ROWS 6
#include "fp32_tiles.h"

extern "C" int sidecast_avx512_runs_here() {
    return __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("fma");
}

#else

extern "C" int sidecast_avx512_runs_here() { return 0; }

#endif
