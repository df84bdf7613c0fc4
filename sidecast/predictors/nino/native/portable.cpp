// fp32 loops for processors that are not x86: compilers take their vectors apart into what the processor has.

#if !defined(__x86_64__)

#define LOOPS portable
#define FOR_THIS_PROCESSOR
#define LANES 8
#define VECTORS 2
#define ROWS 6
#include "fp32_tiles.h"

extern "C" int sidecast_portable_runs_here() { return 1; }

#else

extern "C" int sidecast_portable_runs_here() { return 0; }

#endif
