// bf16 loops for processors that multiply pairs of bf16 (AVX-512 BF16).

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)

#define LOOPS avx512_bf16
#include "bf16_tiles.h"

namespace {

struct Pairs {
    static constexpr int TILE = 8 * ROWS;  // edges

    static AVX512_BF16 void later_layer(Half *out, const Half *in, const Edges &edges, int64_t depth, const Tile &tile,
                                        float *row_sum_D) {
        hidden_layer<false>(out, in, edges, depth, tile, row_sum_D);
    }

    // Adds sum over the rows of (row @ scale) * gain to gained_D.
    static AVX512_BF16 void gained_sum(const Half *hidden, const Tile &tile, int64_t dim, const Half *scale,
                                       const float *gain_SD, float *gained_D) {
        for (int64_t d = 0; d < dim; d += STRIP) {
            __m512 total[PANELS] = {};
            for (int64_t first = 0; first < tile.num_rows; first += ROWS) {
                __m512 sums[ROWS][PANELS] = {};
                const Half *rows[ROWS];
#pragma GCC unroll 6
                for (int row = 0; row < ROWS; row++) rows[row] = hidden + row_of(first, row, tile.num_rows) * dim;
                multiply(sums, rows, scale + d * dim, dim);
                const int64_t num_here = smaller(tile.num_rows - first, ROWS);
#pragma GCC unroll 6
                for (int row = 0; row < ROWS; row++) {
                    if (row < num_here) {
                        const float *gain = gain_SD + (tile.source + first + row) * dim + d;
#pragma GCC unroll 4
                        for (int panel = 0; panel < PANELS; panel++)
                            total[panel] =
                                _mm512_fmadd_ps(sums[row][panel], _mm512_loadu_ps(gain + panel * LANES), total[panel]);
                    }
                }
            }
            for (int panel = 0; panel < PANELS; panel++) {
                float *sum = gained_D + d + panel * LANES;
                _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), total[panel]));
            }
        }
    }
};

}  // namespace

extern "C" {

int EXPORTED(runs_here)() { return has_avx512_bf16(); }

int64_t EXPORTED(scratch_bytes)(int64_t dim) { return scratch_bytes<Pairs>(dim); }

void EXPORTED(message_sums)(const float *features_XTS, int64_t num_features, int64_t num_targets, int64_t num_sources,
                            const SidecastLayer *layers, int64_t num_layers, int64_t dim, const void *scale,
                            const float *gain_SD, float *hidden_TD, float *gained_TD, void *scratch) {
    message_sums<Pairs>({features_XTS, num_features, num_targets, num_sources, layers, num_layers, dim},
                 static_cast<const Half *>(scale), gain_SD, hidden_TD, gained_TD, static_cast<Half *>(scratch));
}

void EXPORTED(changes)(const float *features_XTS, int64_t num_features, int64_t num_targets, int64_t num_sources,
                       const SidecastLayer *layers, int64_t num_layers, int64_t dim, const float *output_FD,
                       const float *output_bias_F, int64_t num_elements, float *change_TSF, void *scratch) {
    changes<Pairs>({features_XTS, num_features, num_targets, num_sources, layers, num_layers, dim}, output_FD,
            output_bias_F, num_elements, change_TSF, static_cast<Half *>(scratch));
}

}  // extern "C"

#else

extern "C" int sidecast_avx512_bf16_runs_here() { return 0; }

#endif
