// The two tile loops of a nowcast on a CPU, fused: no hidden vector leaves the core's own cache.
//
// Torch's operators read and write every hidden vector once for each addend, activation, product and sum. Here the
// sums of a product stay in registers until addends, SiLU and row sums are done.
//
// Included once for each kind of processor, by a file that defines
//   LOOPS               the name of the loops: functions are called sidecast_LOOPS_...
//   FOR_THIS_PROCESSOR  an attribute that lets a function use the processor's instructions
//   LANES               fp32 values of one vector
//   VECTORS, ROWS       vectors of a row, and rows, whose sums are in registers at once
// Attributes rather than compiler options: one file compiled with options could give the linker its copy of an inline
// function for all of them.
//
// Suffixes as in the Python files: D hidden, X edge features, S source nodes, T target nodes, F kernel elements.
// Everything is fp32 and contiguous. D is a multiple of PANEL. Weights are packed in panels of PANEL columns: element
// (k, d) of a (K, D) matrix is at [d / PANEL][k][d % PANEL].

#include <cstdint>

#include "layer.h"

#define INLINE static inline __attribute__((always_inline)) FOR_THIS_PROCESSOR

namespace {

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr int PANEL = 16;
constexpr int LEAST_VECTORS = PANEL / LANES;
constexpr int TILE = 16 * ROWS;  // edges: two tiles of 128-wide vectors and the weights between them stay in 192 KiB
static_assert(PANEL % LANES == 0 && VECTORS % LEAST_VECTORS == 0);

// Hidden layers on the edges from all sources to all targets of a part.
struct Edges {
    const float *features_XTS;
    int64_t num_features, num_targets, num_sources;
    const SidecastLayer *layers;
    int64_t num_layers, dim;
    float *tiles;  // scratch for 2 * TILE hidden vectors
};

// Some sources of one target: the rows of a tile.
struct Tile {
    int64_t target, source, num_rows;
};

// Where the rows of a group are in memory. A group is worked on whole: rows beyond the last repeat it.
struct Group {
    const float *row[ROWS];
};

INLINE Vector load(const float *from) { return *reinterpret_cast<const Unaligned *>(from); }
INLINE void store(float *to, Vector value) { *reinterpret_cast<Unaligned *>(to) = value; }
INLINE void add_to(float *to, Vector value) { store(to, load(to) + value); }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// x / (1 + 2^(-x log2 e)), the power from its nearest integer and a polynomial for the rest.
INLINE Vector silu(Vector x) {
    const Vector low = Vector{} - 126.0f, high = Vector{} + 126.0f;
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
    Vector power = x * -1.44269504088896341f;
    power = power > low ? power : low;
    power = power < high ? power : high;
    Vector shifted = power + round;
    Vector rest = power - (shifted - round);
    Vector series = rest * 1.339887440e-3f + 9.618437357e-3f;
    series = series * rest + 5.550332500e-2f;
    series = series * rest + 2.402264476e-1f;
    series = series * rest + 6.931472057e-1f;
    series = series * rest + 1.0f;
    const Bits exponent = reinterpret_cast<Bits>(shifted) << 23;
    const Vector exponential = reinterpret_cast<Vector>(reinterpret_cast<Bits>(series) + exponent);
    return x / (1.0f + exponential);
}

INLINE Group group_of(const float *rows, int64_t stride, int64_t first, int64_t num_rows) {
    Group group;
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) group.row[row] = rows + smaller(first + row, num_rows - 1) * stride;
    return group;
}

// Where vector number v of row k of a strip is, counted from the strip's first panel.
INLINE int64_t in_strip(int v, int64_t k, int64_t num_k) {
    return (v * LANES / PANEL * num_k + k) * PANEL + v * LANES % PANEL;
}

// Adds rows (of K elements, k_stride apart) @ one packed strip (K, NUM * LANES) to the sums. Kept apart from its callers:
// with their variables in the same function, compilers run out of registers in this loop and take twice as long in it.
template <int NUM>
__attribute__((noinline)) FOR_THIS_PROCESSOR void multiply(Vector (&sums)[ROWS][NUM], const Group &rows, int64_t k_stride,
                                                           int64_t num_k, const float *strip) {
    Vector in_registers[ROWS][NUM];
    const float *at[ROWS];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
        for (int v = 0; v < NUM; v++) in_registers[row][v] = sums[row][v];
        at[row] = rows.row[row];
    }
    for (int64_t k = 0; k < num_k; k++) {
        Vector weights[NUM];
#pragma GCC unroll 4
        for (int v = 0; v < NUM; v++) weights[v] = load(strip + in_strip(v, k, num_k));
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            const float factor = at[row][k * k_stride];
#pragma GCC unroll 4
            for (int v = 0; v < NUM; v++) in_registers[row][v] += factor * weights[v];
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
        for (int v = 0; v < NUM; v++) sums[row][v] = in_registers[row][v];
}

// What goes into a hidden layer: edge features, or the vectors of the layer before.
struct Input {
    const float *rows;
    int64_t row_stride, k_stride, num_k;
};

// Columns d and up of one hidden layer on a tile; adds the sum of its vectors to row_sum_D unless that is null.
template <bool has_source, int NUM>
INLINE void hidden_strip(float *out, const Input &in, const SidecastLayer &layer, const Tile &tile, int64_t dim, int64_t d,
                         float *row_sum_D) {
    const float *weight = static_cast<const float *>(layer.weight) + d * in.num_k;
    const float *target_D = layer.target_TD + tile.target * layer.target_stride + d;
    const float *source_RD = has_source ? layer.source_SD + tile.source * dim + d : nullptr;
    Vector target[NUM], total[NUM] = {};
#pragma GCC unroll 4
    for (int v = 0; v < NUM; v++) target[v] = load(target_D + v * LANES);
    for (int64_t first = 0; first < tile.num_rows; first += ROWS) {
        const int64_t num_here = smaller(tile.num_rows - first, ROWS);
        Vector sums[ROWS][NUM];
        Group sources = has_source ? group_of(source_RD, dim, first, tile.num_rows) : Group{};
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
            for (int v = 0; v < NUM; v++)
                sums[row][v] = has_source ? target[v] + load(sources.row[row] + v * LANES) : target[v];
        multiply(sums, group_of(in.rows, in.row_stride, first, tile.num_rows), in.k_stride, in.num_k, weight);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
            for (int v = 0; v < NUM; v++) {
                const Vector hidden = silu(sums[row][v]);
                store(out + (first + row) * dim + d + v * LANES, hidden);
                if (row < num_here) total[v] += hidden;
            }
        }
    }
    if (row_sum_D) {
#pragma GCC unroll 4
        for (int v = 0; v < NUM; v++) add_to(row_sum_D + d + v * LANES, total[v]);
    }
}

// One hidden layer on a tile, from column d.
template <bool has_source, int NUM>
INLINE void hidden_layer(float *out, const Input &in, const SidecastLayer &layer, const Tile &tile, int64_t dim, int64_t d,
                         float *row_sum_D) {
    for (; d + NUM * LANES <= dim; d += NUM * LANES)
        hidden_strip<has_source, NUM>(out, in, layer, tile, dim, d, row_sum_D);
    if constexpr (NUM > LEAST_VECTORS)
        hidden_layer<has_source, NUM / 2>(out, in, layer, tile, dim, d, row_sum_D);
}

// All hidden layers on a tile; returns the vectors of the last.
INLINE const float *hidden_layers(const Edges &edges, const Tile &tile, float *row_sum_D) {
    const int64_t dim = edges.dim;
    float *out = edges.tiles, *other = edges.tiles + TILE * dim;
    Input in{edges.features_XTS + tile.target * edges.num_sources + tile.source, 1,
             edges.num_targets * edges.num_sources, edges.num_features};
    for (int64_t depth = 0; depth < edges.num_layers; depth++) {
        const SidecastLayer &layer = edges.layers[depth];
        float *sum_D = depth == edges.num_layers - 1 ? row_sum_D : nullptr;
        if (layer.source_SD)
            hidden_layer<true, VECTORS>(out, in, layer, tile, dim, 0, sum_D);
        else
            hidden_layer<false, VECTORS>(out, in, layer, tile, dim, 0, sum_D);
        in = {out, dim, 1, dim};
        float *free = other;
        other = out;
        out = free;
    }
    return in.rows;
}

// Adds sum over the rows of (row @ scale) * gain to gained_D, from column d.
template <int NUM>
INLINE void gained_sum(const float *hidden, const Tile &tile, int64_t dim, int64_t d, const float *scale,
                       const float *gain_SD, float *gained_D) {
    for (; d + NUM * LANES <= dim; d += NUM * LANES) {
        Vector total[NUM] = {};
        for (int64_t first = 0; first < tile.num_rows; first += ROWS) {
            const int64_t num_here = smaller(tile.num_rows - first, ROWS);
            Vector sums[ROWS][NUM] = {};
            multiply(sums, group_of(hidden, dim, first, tile.num_rows), 1, dim, scale + d * dim);
            Group gains = group_of(gain_SD + tile.source * dim + d, dim, first, tile.num_rows);
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++)
                if (row < num_here) {
#pragma GCC unroll 4
                    for (int v = 0; v < NUM; v++) total[v] += sums[row][v] * load(gains.row[row] + v * LANES);
                }
        }
#pragma GCC unroll 4
        for (int v = 0; v < NUM; v++) add_to(gained_D + d + v * LANES, total[v]);
    }
    if constexpr (NUM > LEAST_VECTORS) gained_sum<NUM / 2>(hidden, tile, dim, d, scale, gain_SD, gained_D);
}

INLINE float dot(const float *a, const float *b, int64_t dim) {
    Vector sums[LEAST_VECTORS] = {};
    for (int64_t d = 0; d < dim; d += PANEL)
        for (int v = 0; v < LEAST_VECTORS; v++) sums[v] += load(a + d + v * LANES) * load(b + d + v * LANES);
    for (int v = 1; v < LEAST_VECTORS; v++) sums[0] += sums[v];
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; lane++) sum += sums[0][lane];
    return sum;
}

}  // namespace

extern "C" {

// Bytes of scratch for one call.
int64_t EXPORTED(scratch_bytes)(int64_t dim) { return 2 * TILE * dim * static_cast<int64_t>(sizeof(float)); }

// Kernels.message_sums; adds to hidden_TD and gained_TD.
FOR_THIS_PROCESSOR void EXPORTED(message_sums)(const float *features_XTS, int64_t num_features, int64_t num_targets,
                                              int64_t num_sources, const SidecastLayer *layers, int64_t num_layers,
                                              int64_t dim, const void *scale, const float *gain_SD, float *hidden_TD,
                                              float *gained_TD, void *scratch) {
    const Edges edges{features_XTS, num_features, num_targets, num_sources, layers, num_layers, dim,
                      static_cast<float *>(scratch)};
    for (int64_t target = 0; target < num_targets; target++) {
        for (int64_t source = 0; source < num_sources; source += TILE) {
            const Tile tile{target, source, smaller(num_sources - source, TILE)};
            const float *hidden = hidden_layers(edges, tile, hidden_TD + target * dim);
            gained_sum<VECTORS>(hidden, tile, dim, 0, static_cast<const float *>(scale), gain_SD,
                                 gained_TD + target * dim);
        }
    }
}

// Kernels.changes. output_FD: last layer, one row for each kernel element.
FOR_THIS_PROCESSOR void EXPORTED(changes)(const float *features_XTS, int64_t num_features, int64_t num_targets,
                                         int64_t num_sources, const SidecastLayer *layers, int64_t num_layers,
                                         int64_t dim, const float *output_FD, const float *output_bias_F,
                                         int64_t num_elements, float *change_TSF, void *scratch) {
    const Edges edges{features_XTS, num_features, num_targets, num_sources, layers, num_layers, dim,
                      static_cast<float *>(scratch)};
    for (int64_t target = 0; target < num_targets; target++) {
        for (int64_t source = 0; source < num_sources; source += TILE) {
            const Tile tile{target, source, smaller(num_sources - source, TILE)};
            const float *hidden = hidden_layers(edges, tile, nullptr);
            float *change = change_TSF + (target * num_sources + source) * num_elements;
            for (int64_t row = 0; row < tile.num_rows; row++)
                for (int64_t element = 0; element < num_elements; element++)
                    *change++ = output_bias_F[element] + dot(hidden + row * dim, output_FD + element * dim, dim);
        }
    }
}

}  // extern "C"
