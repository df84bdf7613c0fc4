// What all loops are called with.

#pragma once

#include <cstdint>

// One hidden layer; the mirror of CompiledLayer in loops.py.
struct SidecastLayer {
    const void *weight;      // (X, D) in the first layer, (D, D) in later ones, packed as the loops say
    const float *source_SD;  // or null
    const float *target_TD;
    int64_t target_stride;   // D, or 0 where one row stands for all targets
};

#define SIDECAST_JOINED(loops, name) sidecast_##loops##_##name
#define SIDECAST_NAME(loops, name) SIDECAST_JOINED(loops, name)
#define EXPORTED(name) SIDECAST_NAME(LOOPS, name)
