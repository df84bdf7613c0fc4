// fp32 loops for x86 processors with AVX2 and FMA.

#if defined(__x86_64__)

#define LOOPS avx2
#define FOR_THIS_PROCESSOR __attribute__((target("avx2,fma")))
#define LANES 8
// Twelve of sixteen registers for sums, which leaves three for operands.
#define VECTORS 2
#define ROWS 6
#include "fp32_tiles.h"

extern "C" int sidecast_avx2_runs_here() {
    return __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma");
}

#else

extern "C" int sidecast_avx2_runs_here() { return 0; }

#endif
