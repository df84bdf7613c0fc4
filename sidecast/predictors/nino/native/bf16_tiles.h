// What the loops with bf16 products share, on processors with AVX-512 BF16 and on those with AMX, which have both.
//
// Products of hidden vectors take bf16 and add up in fp32; products with edge features, addends, SiLU and sums over
// edges are fp32. Between layers a hidden vector is rounded to bf16.
//
// Suffixes as in the Python files: D hidden, X edge features, S source nodes, T target nodes, F kernel elements.
// D is a multiple of STRIP. Weights of later layers and the scale are packed in panels of LANES columns, k in pairs:
// element (k, d) of a (D, D) matrix is at [d / LANES][k / 2][d % LANES][k % 2]. The first layer's are fp32, (X, D).

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "layer.h"

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) AVX512_BF16

namespace {

typedef uint16_t Half;  // the bits of a bf16

constexpr int LANES = 16;
constexpr int PANELS = 4;
constexpr int STRIP = PANELS * LANES;  // columns whose sums are in registers at once
constexpr int ROWS = 6;                // their sums take 24 of 32 registers

struct Edges {
    const float *features_XTS;
    int64_t num_features, num_targets, num_sources;
    const SidecastLayer *layers;
    int64_t num_layers, dim;
};

// Some sources of one target: the rows of a tile.
struct Tile {
    int64_t target, source, num_rows;
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
// A group of rows is worked on whole: rows beyond the last repeat it.
INLINE int64_t row_of(int64_t first, int row, int64_t num_rows) { return smaller(first + row, num_rows - 1); }
INLINE __m512bh as_pairs(__m512i bits) { return (__m512bh)bits; }

// SiLU is x / 2 plus an even function, which a parabola follows in each of 32 intervals, centred on the multiples of
// WIDTH; in the last one, which has no end, it is |x| / 2. Interpolated at Chebyshev's points, through 0 at 0. All is within
// 1.3e-4, 2^-13, of SiLU: a sixteenth of what rounding to bf16 does to a value near 1.
constexpr float WIDTH = 0.375f;
alignas(64) constexpr float CONSTANT[32] = {
    0.00000000e+0f, -9.54537943e-4f, -1.56432819e-2f, -6.55783191e-2f, -1.57709777e-1f, -2.76597083e-1f,
    -3.95479679e-1f, -4.91049320e-1f, -5.50971687e-1f, -5.73681295e-1f, -5.64571738e-1f, -5.31998277e-1f,
    -4.84507382e-1f, -4.29393500e-1f, -3.72200280e-1f, -3.16754222e-1f, -2.65436739e-1f, -2.19521835e-1f,
    -1.79493770e-1f, -1.45310819e-1f, -1.16608068e-1f, -9.28447545e-2f, -7.34059587e-2f, -5.76691478e-2f,
    -4.50447388e-2f, -3.49984244e-2f, -2.70610284e-2f, -2.08303109e-2f, -1.59679018e-2f, -1.21935299e-2f,
    -9.27802362e-3f, 0.00000000e+0f
};
alignas(64) constexpr float LINEAR[32] = {
    8.97192149e-5f, 7.99306668e-3f, 5.87192513e-2f, 1.64694518e-1f, 3.05278897e-1f, 4.46736723e-1f,
    5.62617183e-1f, 6.41519725e-1f, 6.84464216e-1f, 6.98913574e-1f, 6.93904757e-1f, 6.77404821e-1f,
    6.55390918e-1f, 6.31868899e-1f, 6.09259546e-1f, 5.88849008e-1f, 5.71175516e-1f, 5.56320429e-1f,
    5.44109821e-1f, 5.34245968e-1f, 5.26388288e-1f, 5.20200253e-1f, 5.15373945e-1f, 5.11640429e-1f,
    5.08772910e-1f, 5.06584108e-1f, 5.04922628e-1f, 5.03667653e-1f, 5.02723932e-1f, 5.02017081e-1f,
    5.01489639e-1f, 5.00000000e-1f
};
alignas(64) constexpr float SQUARE[32] = {
    2.48850733e-1f, 2.32583910e-1f, 1.88422874e-1f, 1.32010937e-1f, 7.82902762e-2f, 3.61693241e-2f,
    7.91203231e-3f, -8.38096160e-3f, -1.60776097e-2f, -1.83762629e-2f, -1.76879149e-2f, -1.55980466e-2f,
    -1.30465729e-2f, -1.05364919e-2f, -8.30178428e-3f, -6.42324239e-3f, -4.90144594e-3f, -3.69981909e-3f,
    -2.76854122e-3f, -2.05691578e-3f, -1.51910842e-3f, -1.11624773e-3f, -8.16656800e-4f, -5.95210760e-4f,
    -4.32367087e-4f, -3.13146971e-4f, -2.26200369e-4f, -1.63005519e-4f, -1.17212148e-4f, -8.41178407e-5f,
    -6.02589243e-5f, 0.00000000e+0f
};

INLINE __m512 entry(const float *table, __m512i index) {
    return _mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + LANES));
}

INLINE __m512 silu(__m512 x) {
    const __m512 size = _mm512_abs_ps(x);
    const __m512 within = _mm512_min_ps(size, _mm512_set1_ps(31 * WIDTH));
    // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits.
    const __m512 number = _mm512_fmadd_ps(within, _mm512_set1_ps(1 / WIDTH), _mm512_set1_ps(12582912.0f));
    const __m512i index = _mm512_castps_si512(number);
    const __m512 slope = _mm512_fmadd_ps(size, entry(SQUARE, index), entry(LINEAR, index));
    return _mm512_fmadd_ps(x, _mm512_set1_ps(0.5f), _mm512_fmadd_ps(size, slope, entry(CONSTANT, index)));
}

// Adds rows of D bf16 @ one strip of a packed matrix to the sums.
INLINE void multiply(__m512 (&sums)[ROWS][PANELS], const Half *const (&rows)[ROWS], const Half *strip, int64_t dim) {
    const int64_t num_pairs = dim / 2;
    for (int64_t pair = 0; pair < num_pairs; pair++) {
        __m512bh weights[PANELS];
#pragma GCC unroll 4
        for (int panel = 0; panel < PANELS; panel++)
            weights[panel] = as_pairs(_mm512_loadu_si512(strip + (panel * num_pairs + pair) * 2 * LANES));
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            int32_t bits;
            __builtin_memcpy(&bits, rows[row] + 2 * pair, sizeof bits);
            const __m512bh factor = as_pairs(_mm512_set1_epi32(bits));
#pragma GCC unroll 4
            for (int panel = 0; panel < PANELS; panel++)
                sums[row][panel] = _mm512_dpbf16_ps(sums[row][panel], factor, weights[panel]);
        }
    }
}

// Adds the products of edge features with one strip of the first layer.
INLINE void multiply_features(__m512 (&sums)[ROWS][PANELS], const float *features, const int64_t (&at)[ROWS],
                              int64_t feature_stride, int64_t num_features, const float *strip, int64_t dim) {
    for (int64_t k = 0; k < num_features; k++) {
        __m512 weights[PANELS];
#pragma GCC unroll 4
        for (int panel = 0; panel < PANELS; panel++) weights[panel] = _mm512_loadu_ps(strip + k * dim + panel * LANES);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            const __m512 factor = _mm512_set1_ps(features[k * feature_stride + at[row]]);
#pragma GCC unroll 4
            for (int panel = 0; panel < PANELS; panel++)
                sums[row][panel] = _mm512_fmadd_ps(factor, weights[panel], sums[row][panel]);
        }
    }
}

// One hidden layer on a tile, by AVX-512 BF16 and, the first, in fp32; adds the sum of its vectors to row_sum_D unless
// that is null.
template <bool is_first>
AVX512_BF16 void hidden_layer(Half *out, const Half *in, const Edges &edges, int64_t depth, const Tile &tile,
                              float *row_sum_D) {
    const SidecastLayer &layer = edges.layers[depth];
    const int64_t dim = edges.dim;
    const float *target_D = layer.target_TD + tile.target * layer.target_stride;
    const float *features = edges.features_XTS + tile.target * edges.num_sources + tile.source;
    for (int64_t d = 0; d < dim; d += STRIP) {
        __m512 total[PANELS] = {};
        for (int64_t first = 0; first < tile.num_rows; first += ROWS) {
            __m512 sums[ROWS][PANELS];
            int64_t at[ROWS];
            const Half *rows[ROWS];
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; row++) {
                at[row] = row_of(first, row, tile.num_rows);
                rows[row] = in + at[row] * dim;
#pragma GCC unroll 4
                for (int panel = 0; panel < PANELS; panel++) {
                    sums[row][panel] = _mm512_loadu_ps(target_D + d + panel * LANES);
                    if (layer.source_SD)
                        sums[row][panel] = _mm512_add_ps(
                            sums[row][panel],
                            _mm512_loadu_ps(layer.source_SD + (tile.source + at[row]) * dim + d + panel * LANES));
                }
            }
            if (is_first)
                multiply_features(sums, features, at, edges.num_targets * edges.num_sources, edges.num_features,
                                  static_cast<const float *>(layer.weight) + d, dim);
            else
                multiply(sums, rows, static_cast<const Half *>(layer.weight) + d * dim, dim);
            const int64_t num_here = smaller(tile.num_rows - first, ROWS);
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
                for (int panel = 0; panel < PANELS; panel++) sums[row][panel] = silu(sums[row][panel]);
#pragma GCC unroll 2
                for (int panel = 0; panel < PANELS; panel += 2) {
                    const __m512bh both = _mm512_cvtne2ps_pbh(sums[row][panel + 1], sums[row][panel]);
                    _mm512_storeu_si512(out + (first + row) * dim + d + panel * LANES, (__m512i)both);
                }
                if (row_sum_D && row < num_here) {
#pragma GCC unroll 4
                    for (int panel = 0; panel < PANELS; panel++)
                        total[panel] = _mm512_add_ps(total[panel], sums[row][panel]);
                }
            }
        }
        if (row_sum_D) {
            for (int panel = 0; panel < PANELS; panel++) {
                float *sum = row_sum_D + d + panel * LANES;
                _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), total[panel]));
            }
        }
    }
}

INLINE float dot(const Half *hidden, const float *weight, int64_t dim) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += LANES) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(hidden + d));
        const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        sum = _mm512_fmadd_ps(wide, _mm512_loadu_ps(weight + d), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

// All hidden layers on a tile; returns the vectors of the last. tiles: scratch for 2 * Products::TILE vectors.
template <class Products>
INLINE const Half *hidden_layers(const Edges &edges, const Tile &tile, Half *tiles, float *row_sum_D) {
    Half *out = tiles, *other = tiles + Products::TILE * edges.dim;
    for (int64_t depth = 0; depth < edges.num_layers; depth++) {
        float *sum_D = depth == edges.num_layers - 1 ? row_sum_D : nullptr;
        if (depth == 0)
            hidden_layer<true>(out, other, edges, depth, tile, sum_D);
        else
            Products::later_layer(out, other, edges, depth, tile, sum_D);
        Half *free = other;
        other = out;
        out = free;
    }
    return other;
}

// Kernels.message_sums; adds to hidden_TD and gained_TD.
template <class Products>
AVX512_BF16 void message_sums(const Edges &edges, const Half *scale, const float *gain_SD, float *hidden_TD,
                              float *gained_TD, Half *tiles) {
    for (int64_t target = 0; target < edges.num_targets; target++) {
        for (int64_t source = 0; source < edges.num_sources; source += Products::TILE) {
            const Tile tile{target, source, smaller(edges.num_sources - source, Products::TILE)};
            const Half *hidden = hidden_layers<Products>(edges, tile, tiles, hidden_TD + target * edges.dim);
            Products::gained_sum(hidden, tile, edges.dim, scale, gain_SD, gained_TD + target * edges.dim);
        }
    }
}

// Kernels.changes. output_FD: last layer, one row for each kernel element.
template <class Products>
AVX512_BF16 void changes(const Edges &edges, const float *output_FD, const float *output_bias_F, int64_t num_elements,
                         float *change_TSF, Half *tiles) {
    for (int64_t target = 0; target < edges.num_targets; target++) {
        for (int64_t source = 0; source < edges.num_sources; source += Products::TILE) {
            const Tile tile{target, source, smaller(edges.num_sources - source, Products::TILE)};
            const Half *hidden = hidden_layers<Products>(edges, tile, tiles, nullptr);
            float *change = change_TSF + (target * edges.num_sources + source) * num_elements;
            for (int64_t row = 0; row < tile.num_rows; row++)
                for (int64_t element = 0; element < num_elements; element++)
                    *change++ = output_bias_F[element] +
                                dot(hidden + row * edges.dim, output_FD + element * edges.dim, edges.dim);
        }
    }
}

// Bytes of scratch for one call.
template <class Products>
constexpr int64_t scratch_bytes(int64_t dim) {
    return 2 * Products::TILE * dim * static_cast<int64_t>(sizeof(Half));
}

inline int has_avx512_bf16() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}

}  // namespace
