// The two tile loops of a nowcast on a CPU, fused: no hidden vector leaves the core's own cache.
//
// Torch's operators read and write every hidden vector once for each addend, activation, product and sum. Here the
// sums of a product stay in registers until addends, SiLU and row sums are done.
//
// Suffixes as in the Python files: D hidden, X edge features, S source nodes, T target nodes, F kernel elements.
// Everything is fp32 and contiguous. D is a multiple of PANEL. Weights are packed in panels of PANEL columns: element
// (k, d) of a (K, D) matrix is at [d / PANEL][k][d % PANEL].

#include <cstdint>

#if defined(__x86_64__)
#define FOR_THIS_PROCESSOR __attribute__((target("avx2,fma")))
#else
#define FOR_THIS_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline)) FOR_THIS_PROCESSOR

namespace {

typedef float Vector __attribute__((vector_size(32)));
typedef int32_t Bits __attribute__((vector_size(32)));
typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));

constexpr int LANES = 8;
constexpr int PANEL = 2 * LANES;
constexpr int ROWS = 6;           // their sums take twelve of sixteen registers, and leave three for operands
constexpr int TILE = 16 * ROWS;   // edges: two tiles of 128-wide vectors and the weights between them stay in 192 KiB

}  // namespace

// One hidden layer; the mirror of Layer in kernels.py.
struct SidecastLayer {
    const float *weight;     // packed, (X, D) in the first layer, (D, D) in later ones
    const float *source_SD;  // or null
    const float *target_TD;
    int64_t target_stride;   // D, or 0 where one row stands for all targets
};

namespace {

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
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++) group.row[row] = rows + smaller(first + row, num_rows - 1) * stride;
    return group;
}

// Adds rows (of K elements, k_stride apart) @ one packed panel (K, PANEL) to the sums. Kept apart from its callers: with
// their variables in the same function, compilers run out of registers in this loop and take twice as long in it.
__attribute__((noinline)) FOR_THIS_PROCESSOR void multiply(Vector (&sums)[ROWS][2], const Group &rows, int64_t k_stride,
                                                           int64_t num_k, const float *panel) {
    Vector in_registers[ROWS][2];
    const float *at[ROWS];
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++) {
        in_registers[row][0] = sums[row][0];
        in_registers[row][1] = sums[row][1];
        at[row] = rows.row[row];
    }
    for (int64_t k = 0; k < num_k; k++) {
        const Vector left = load(panel + k * PANEL), right = load(panel + k * PANEL + LANES);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            const float factor = at[row][k * k_stride];
            in_registers[row][0] += factor * left;
            in_registers[row][1] += factor * right;
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++) {
        sums[row][0] = in_registers[row][0];
        sums[row][1] = in_registers[row][1];
    }
}

// One hidden layer on a tile; adds the sum of its vectors to row_sum_D unless that is null.
template <bool has_source>
INLINE void hidden_layer(float *out, const float *in, int64_t row_stride, int64_t k_stride, int64_t num_k,
                         const SidecastLayer &layer, const Tile &tile, int64_t dim, float *row_sum_D) {
    const float *target_D = layer.target_TD + tile.target * layer.target_stride;
    const float *source_RD = has_source ? layer.source_SD + tile.source * dim : nullptr;
    for (int64_t d = 0; d < dim; d += PANEL) {
        const Vector target[2] = {load(target_D + d), load(target_D + d + LANES)};
        Vector total[2] = {};
        for (int64_t first = 0; first < tile.num_rows; first += ROWS) {
            const int64_t num_here = smaller(tile.num_rows - first, ROWS);
            Vector sums[ROWS][2];
            Group sources = has_source ? group_of(source_RD + d, dim, first, tile.num_rows) : Group{};
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; row++) {
                sums[row][0] = has_source ? target[0] + load(sources.row[row]) : target[0];
                sums[row][1] = has_source ? target[1] + load(sources.row[row] + LANES) : target[1];
            }
            multiply(sums, group_of(in, row_stride, first, tile.num_rows), k_stride, num_k, layer.weight + d * num_k);
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; row++) {
                Vector left = silu(sums[row][0]), right = silu(sums[row][1]);
                store(out + (first + row) * dim + d, left);
                store(out + (first + row) * dim + d + LANES, right);
                if (row < num_here) {
                    total[0] += left;
                    total[1] += right;
                }
            }
        }
        if (row_sum_D) {
            add_to(row_sum_D + d, total[0]);
            add_to(row_sum_D + d + LANES, total[1]);
        }
    }
}

// All hidden layers on a tile; returns the vectors of the last.
INLINE const float *hidden_layers(const Edges &edges, const Tile &tile, float *row_sum_D) {
    const int64_t dim = edges.dim;
    float *out = edges.tiles, *other = edges.tiles + TILE * dim;
    const float *in = edges.features_XTS + tile.target * edges.num_sources + tile.source;
    int64_t row_stride = 1, k_stride = edges.num_targets * edges.num_sources, num_k = edges.num_features;
    for (int64_t depth = 0; depth < edges.num_layers; depth++) {
        const SidecastLayer &layer = edges.layers[depth];
        float *sum_D = depth == edges.num_layers - 1 ? row_sum_D : nullptr;
        if (layer.source_SD)
            hidden_layer<true>(out, in, row_stride, k_stride, num_k, layer, tile, dim, sum_D);
        else
            hidden_layer<false>(out, in, row_stride, k_stride, num_k, layer, tile, dim, sum_D);
        in = out;
        out = other;
        other = const_cast<float *>(in);
        row_stride = num_k = dim;
        k_stride = 1;
    }
    return in;
}

// Adds sum over the rows of (row @ scale) * gain to gained_D.
INLINE void gained_sum(const float *hidden, const Tile &tile, int64_t dim, const float *scale, const float *gain_SD,
                       float *gained_D) {
    for (int64_t d = 0; d < dim; d += PANEL) {
        Vector total[2] = {};
        for (int64_t first = 0; first < tile.num_rows; first += ROWS) {
            const int64_t num_here = smaller(tile.num_rows - first, ROWS);
            Vector sums[ROWS][2] = {};
            multiply(sums, group_of(hidden, dim, first, tile.num_rows), 1, dim, scale + d * dim);
            Group gains = group_of(gain_SD + tile.source * dim + d, dim, first, tile.num_rows);
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; row++) {
                if (row < num_here) {
                    total[0] += sums[row][0] * load(gains.row[row]);
                    total[1] += sums[row][1] * load(gains.row[row] + LANES);
                }
            }
        }
        add_to(gained_D + d, total[0]);
        add_to(gained_D + d + LANES, total[1]);
    }
}

INLINE float dot(const float *a, const float *b, int64_t dim) {
    Vector sums[2] = {};
    for (int64_t d = 0; d < dim; d += PANEL) {
        sums[0] += load(a + d) * load(b + d);
        sums[1] += load(a + d + LANES) * load(b + d + LANES);
    }
    const Vector both = sums[0] + sums[1];
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; lane++) sum += both[lane];
    return sum;
}

}  // namespace

extern "C" {

// Whether this processor has the instructions that the functions below are compiled to.
int sidecast_runs_here() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

// Bytes of scratch for one call.
int64_t sidecast_scratch_bytes(int64_t dim) { return 2 * TILE * dim * static_cast<int64_t>(sizeof(float)); }

// Kernels.message_sums; adds to hidden_TD and gained_TD.
FOR_THIS_PROCESSOR void sidecast_message_sums(const float *features_XTS, int64_t num_features, int64_t num_targets,
                                              int64_t num_sources, const SidecastLayer *layers, int64_t num_layers,
                                              int64_t dim, const float *scale, const float *gain_SD, float *hidden_TD,
                                              float *gained_TD, float *scratch) {
    const Edges edges{features_XTS, num_features, num_targets, num_sources, layers, num_layers, dim, scratch};
    for (int64_t target = 0; target < num_targets; target++) {
        for (int64_t source = 0; source < num_sources; source += TILE) {
            const Tile tile{target, source, smaller(num_sources - source, TILE)};
            const float *hidden = hidden_layers(edges, tile, hidden_TD + target * dim);
            gained_sum(hidden, tile, dim, scale, gain_SD, gained_TD + target * dim);
        }
    }
}

// Kernels.changes. output_FD: last layer, one row for each kernel element.
FOR_THIS_PROCESSOR void sidecast_changes(const float *features_XTS, int64_t num_features, int64_t num_targets,
                                         int64_t num_sources, const SidecastLayer *layers, int64_t num_layers,
                                         int64_t dim, const float *output_FD, const float *output_bias_F,
                                         int64_t num_elements, float *change_TSF, float *scratch) {
    const Edges edges{features_XTS, num_features, num_targets, num_sources, layers, num_layers, dim, scratch};
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
