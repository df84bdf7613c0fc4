// fp32 values at a time, as many as the processor's own vectors hold: wider ones are taken apart through memory.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int VEC_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VEC_BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VEC_BYTES = 16, REGISTERS = 32;
#else
constexpr int VEC_BYTES = 16, REGISTERS = 16;
#endif
constexpr int LANES = VEC_BYTES / sizeof(float);
// What all sizes are multiples of, on every processor.
constexpr int TILE = 16;
typedef float Vec __attribute__((vector_size(VEC_BYTES), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(VEC_BYTES), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec all(float x) { return x - Vec{}; }

inline float sum(Vec v) {
    float total = 0.0f;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

inline Vec exp_of(Vec x) {
    // Below -87 a result is 0 for all purposes here; above 88 it is infinite, and a comparison lets NaN pass.
    const Vec low = all(-87.0f), high = all(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec shifter = all(12582912.0f);
    const Vec shifted = x * 1.44269504f + shifter;
    const Vec n = shifted - shifter;
    const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vec p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    VecInt bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    VecInt raised;
    std::memcpy(&raised, &p, sizeof raised);
    raised += (bits - 0x4B400000) << 23;
    std::memcpy(&p, &raised, sizeof p);
    return p;
}

}  // namespace
