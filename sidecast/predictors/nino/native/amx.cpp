// bf16 loops for processors that multiply tiles of bf16 (AMX): the products of sixteen edges with 64 columns run beside the
// AVX-512 instructions that finish the sixteen edges before them.

#if defined(__x86_64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || __GNUC__ >= 11)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOOPS amx
#include "bf16_tiles.h"

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define AMX_INLINE inline __attribute__((always_inline)) AMX

namespace {

constexpr int TILE_ROWS = 16;  // edges of one AMX tile
constexpr int TILE_K = 32;     // bf16 of each of them

// What one instruction configures for a thread: rows and bytes of a row of each AMX tile.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The AMX tiles of this thread, for as long as this object lives: unused ones cost nothing when threads change places.
struct TilesInUse {
    AMX TilesInUse() {
        const TileShapes shapes;
        // Compilers do not see what the instruction reads.
        asm volatile("" ::"r"(&shapes) : "memory");
        _tile_loadconfig(&shapes);
    }
    AMX ~TilesInUse() { _tile_release(); }
};

// Adds one step of K of the product of sixteen edges (rows of D bf16) with one strip of a packed matrix.
AMX_INLINE void multiply_step(const Half *rows, const Half *strip, int64_t dim, int64_t step) {
    asm volatile("" ::: "memory");
    const int64_t panel = dim * LANES, row_bytes = dim * static_cast<int64_t>(sizeof(Half));
    const Half *inputs = rows + step * TILE_K;
    const Half *first = strip + step * TILE_K * LANES, *second = first + panel, *third = second + panel;
    const Half *fourth = third + panel;
    _tile_loadd(4, inputs, row_bytes);
    _tile_loadd(5, first, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, second, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, third, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, fourth, 64);
    _tile_dpbf16ps(3, 4, 5);
}

AMX_INLINE void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Sums of sixteen edges, by panels.
struct alignas(64) Sums {
    float panel[PANELS][TILE_ROWS][LANES];
};

AMX_INLINE void store_sums(Sums &sums) {
    _tile_stored(0, sums.panel[0], 64);
    _tile_stored(1, sums.panel[1], 64);
    _tile_stored(2, sums.panel[2], 64);
    _tile_stored(3, sums.panel[3], 64);
}

// Multiplies the vectors of a tile with one strip, and hands the sums of each to finish.
template <class Finish>
AMX_INLINE void multiply(const Half *in, const Half *strip, int64_t num_rows, int64_t dim, Finish &finish) {
    Sums sums[2];
    const int64_t num_steps = dim / TILE_K, num_groups = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t rows_of_step = (TILE_ROWS + num_steps - 1) / num_steps;
    for (int64_t group = 0; group <= num_groups; group++) {
        const bool multiplies = group < num_groups;
        const int64_t before = (group - 1) * TILE_ROWS;
        const Sums &done = sums[(group + 1) % 2];
        if (multiplies) clear_sums();
        for (int64_t step = 0; step < num_steps; step++) {
            if (multiplies) multiply_step(in + group * TILE_ROWS * dim, strip, dim, step);
            if (group == 0) continue;
            const int64_t last = smaller(smaller((step + 1) * rows_of_step, TILE_ROWS), num_rows - before);
            for (int64_t row = step * rows_of_step; row < last; row++) finish(before + row, &done.panel[0][row][0]);
        }
        if (multiplies) store_sums(sums[group % 2]);
    }
}

// Where the sums of one panel lie, from those of the first.
constexpr int64_t PANEL_STEP = TILE_ROWS * LANES;

// Addends, SiLU and rounding of one strip of a hidden layer, and the sum of its rows.
template <bool has_source>
struct Hidden {
    Half *out;
    const float *source;
    int64_t dim;
    __m512 target[PANELS], total[PANELS];

    AMX_INLINE void operator()(int64_t row, const float *sums) {
        __m512 hidden[PANELS];
#pragma GCC unroll 4
        for (int panel = 0; panel < PANELS; panel++) {
            __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + panel * PANEL_STEP), target[panel]);
            if (has_source) sum = _mm512_add_ps(sum, _mm512_loadu_ps(source + row * dim + panel * LANES));
            hidden[panel] = silu(sum);
            total[panel] = _mm512_add_ps(total[panel], hidden[panel]);
        }
#pragma GCC unroll 2
        for (int panel = 0; panel < PANELS; panel += 2)
            _mm512_storeu_si512(out + row * dim + panel * LANES,
                                (__m512i)_mm512_cvtne2ps_pbh(hidden[panel + 1], hidden[panel]));
    }
};

// The sum over rows of a product times the gain of each.
struct Gained {
    const float *gain;
    int64_t dim;
    __m512 total[PANELS];

    AMX_INLINE void operator()(int64_t row, const float *sums) {
#pragma GCC unroll 4
        for (int panel = 0; panel < PANELS; panel++)
            total[panel] = _mm512_fmadd_ps(_mm512_load_ps(sums + panel * PANEL_STEP),
                                           _mm512_loadu_ps(gain + row * dim + panel * LANES), total[panel]);
    }
};

AMX_INLINE void add_to(float *sum, const __m512 (&total)[PANELS]) {
#pragma GCC unroll 4
    for (int panel = 0; panel < PANELS; panel++)
        _mm512_storeu_ps(sum + panel * LANES, _mm512_add_ps(_mm512_loadu_ps(sum + panel * LANES), total[panel]));
}

struct Tiles {
    static constexpr int TILE = 96;  // edges: a multiple of the rows of either kind of group

    template <bool has_source>
    static AMX void layer(Half *out, const Half *in, const Edges &edges, const SidecastLayer &layer, const Tile &tile,
                          float *row_sum_D) {
        const int64_t dim = edges.dim;
        const float *target_D = layer.target_TD + tile.target * layer.target_stride;
        for (int64_t d = 0; d < dim; d += STRIP) {
            const float *source = has_source ? layer.source_SD + tile.source * dim + d : nullptr;
            Hidden<has_source> finish{out + d, source, dim, {}, {}};
#pragma GCC unroll 4
            for (int panel = 0; panel < PANELS; panel++)
                finish.target[panel] = _mm512_loadu_ps(target_D + d + panel * LANES);
            multiply(in, static_cast<const Half *>(layer.weight) + d * dim, tile.num_rows, dim, finish);
            if (row_sum_D) add_to(row_sum_D + d, finish.total);
        }
    }

    static AMX void later_layer(Half *out, const Half *in, const Edges &edges, int64_t depth, const Tile &tile,
                                float *row_sum_D) {
        if (edges.layers[depth].source_SD)
            layer<true>(out, in, edges, edges.layers[depth], tile, row_sum_D);
        else
            layer<false>(out, in, edges, edges.layers[depth], tile, row_sum_D);
    }

    // Adds sum over the rows of (row @ scale) * gain to gained_D.
    static AMX void gained_sum(const Half *hidden, const Tile &tile, int64_t dim, const Half *scale,
                               const float *gain_SD, float *gained_D) {
        for (int64_t d = 0; d < dim; d += STRIP) {
            Gained finish{gain_SD + tile.source * dim + d, dim, {}};
            multiply(hidden, scale + d * dim, tile.num_rows, dim, finish);
            add_to(gained_D + d, finish.total);
        }
    }
};

bool has_amx() {
    unsigned a, b, c, d;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE);
}

// Asks the system to keep the tiles of this process's threads; it refuses where it does not know them.
bool is_permitted() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

extern "C" {

// Also asks for permission, without which the functions below end the process.
int EXPORTED(runs_here)() { return has_avx512_bf16() && has_amx() && is_permitted(); }

int64_t EXPORTED(scratch_bytes)(int64_t dim) { return scratch_bytes<Tiles>(dim); }

void EXPORTED(message_sums)(const float *features_XTS, int64_t num_features, int64_t num_targets, int64_t num_sources,
                            const SidecastLayer *layers, int64_t num_layers, int64_t dim, const void *scale,
                            const float *gain_SD, float *hidden_TD, float *gained_TD, void *scratch) {
    const TilesInUse in_use;
    message_sums<Tiles>({features_XTS, num_features, num_targets, num_sources, layers, num_layers, dim},
                 static_cast<const Half *>(scale), gain_SD, hidden_TD, gained_TD, static_cast<Half *>(scratch));
}

void EXPORTED(changes)(const float *features_XTS, int64_t num_features, int64_t num_targets, int64_t num_sources,
                       const SidecastLayer *layers, int64_t num_layers, int64_t dim, const float *output_FD,
                       const float *output_bias_F, int64_t num_elements, float *change_TSF, void *scratch) {
    const TilesInUse in_use;
    changes<Tiles>({features_XTS, num_features, num_targets, num_sources, layers, num_layers, dim}, output_FD,
            output_bias_F, num_elements, change_TSF, static_cast<Half *>(scratch));
}

}  // extern "C"

#else

extern "C" int sidecast_amx_runs_here() { return 0; }

#endif
