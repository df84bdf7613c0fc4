// Matrix products and transposes, in blocks that stay in registers.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

template <int ROWS, int VECS>
inline void block(int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c,
                  int64_t ldc, bool adds) {
    Vec acc[ROWS][VECS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) acc[i][j] = adds ? load(c + i * ldc + j * LANES) : Vec{};
    for (int64_t p = 0; p < k; ++p) {
        Vec row[VECS];
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) row[j] = load(b + p * ldb + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const Vec x = all(a[i * a_row + p * a_col]);
#pragma GCC unroll 4
            for (int j = 0; j < VECS; ++j) acc[i][j] += x * row[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) store(c + i * ldc + j * LANES, acc[i][j]);
}

template <int VECS>
void columns(int64_t m, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool adds) {
    int64_t i = 0;
    for (; i + 6 <= m; i += 6) block<6, VECS>(k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, adds);
    if (m - i >= 4) {
        block<4, VECS>(k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, adds);
        i += 4;
    }
    for (; i < m; ++i) block<1, VECS>(k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, adds);
}

// c (m x n) = or += a (m x k, any strides) times b (k x n).
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb,
             float* c, int64_t ldc, bool adds) {
    // Six rows of so many vectors, one vector of each of them and a factor fit the registers.
    constexpr int VECS = REGISTERS / 8, WIDTH = VECS * LANES;
    int64_t j = 0;
    for (; j + WIDTH <= n; j += WIDTH) columns<VECS>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, adds);
    switch ((n - j) / LANES) {
        case 3: columns<3>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, adds); break;
        case 2: columns<2>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, adds); break;
        case 1: columns<1>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, adds); break;
        default: break;
    }
}

void transpose(int64_t rows, int64_t cols, const float* from, int64_t ldf, float* to) {
    for (int64_t i0 = 0; i0 < rows; i0 += TILE)
        for (int64_t j = 0; j < cols; ++j)
            for (int64_t i = i0; i < i0 + TILE; ++i) to[j * rows + i] = from[i * ldf + j];
}

}  // namespace
