// Causal attention of one sequence, and its gradient.

#pragma once

#include <cmath>
#include <cstdint>

#include "memory.h"
#include "products.h"
#include "vectors.h"

namespace {

// Rotates the pairs (i, i + E / 2) of some heads by each row's position; backwards for sign -1.
void rotate(int64_t rows, int64_t heads, int64_t head_dim, const float* cosines, const float* sines, float sign,
            float* x, int64_t ldx) {
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t h = 0; h < heads; ++h) {
            float* __restrict first = x + i * ldx + h * head_dim;
            float* __restrict second = first + half;
            for (int64_t j = 0; j < half; ++j) {
                const float c = cosines[i * half + j], s = sign * sines[i * half + j];
                const float a = first[j], b = second[j];
                first[j] = a * c - b * s;
                second[j] = b * c + a * s;
            }
        }
}

void attend(const Dims& d, Memory& m, Kept& k) {
    const int64_t n = d.length, e = d.head_dim, q = d.q(), shared = d.heads / d.kv_heads;
    for (int64_t g = 0; g < d.kv_heads; ++g) {
        const float* keys = k.qkv + d.mixed() + g * e;
        const float* values = keys + d.kv_heads * e;
        transpose(n, e, keys, q, m.turned);
        for (int64_t h = g * shared; h < (g + 1) * shared; ++h) {
            float* shares = k.shares + h * n * n;
            for (int64_t i0 = 0; i0 < n; i0 += TILE) {
                const int64_t seen = i0 + TILE;
                product(TILE, seen, e, k.qkv + i0 * q + h * e, q, 1, m.turned, n, shares + i0 * n, n, false);
                for (int64_t i = i0; i < seen; ++i) {
                    float* row = shares + i * n;
                    for (int64_t j = i + 1; j < seen; ++j) row[j] = -INFINITY;
                    float most = row[0];
                    for (int64_t j = 1; j <= i; ++j) most = row[j] > most ? row[j] : most;
                    Vec total{};
                    for (int64_t j = 0; j < seen; j += LANES) {
                        Vec x = load(row + j);
                        Vec y = exp_of(x - most);
                        y = x == all(-INFINITY) ? Vec{} : y;
                        total += y;
                        store(row + j, y);
                    }
                    const float inverse = 1.0f / sum(total);
                    for (int64_t j = 0; j < seen; j += LANES) store(row + j, load(row + j) * inverse);
                }
                product(TILE, e, seen, shares + i0 * n, n, 1, values, q, k.mixed + i0 * d.mixed() + h * e, d.mixed(),
                        false);
            }
        }
    }
}

void attend_back(const Dims& d, Memory& m, const Kept& k) {
    const int64_t n = d.length, e = d.head_dim, q = d.q(), shared = d.heads / d.kv_heads;
    for (int64_t g = 0; g < d.kv_heads; ++g) {
        const int64_t key_at = d.mixed() + g * e, value_at = key_at + d.kv_heads * e;
        transpose(n, e, k.qkv + value_at, q, m.turned);
        for (int64_t h = g * shared; h < (g + 1) * shared; ++h) {
            const float* shares = k.shares + h * n * n;
            const float* d_mixed = m.d_mixed + h * e;
            const bool adds = h > g * shared;
            for (int64_t i0 = 0; i0 < n; i0 += TILE) {
                const int64_t seen = i0 + TILE;
                product(TILE, seen, e, d_mixed + i0 * d.mixed(), d.mixed(), 1, m.turned, n, m.scores + i0 * n, n,
                        false);
                for (int64_t i = i0; i < seen; ++i) {
                    float* row = m.scores + i * n;
                    const float* share = shares + i * n;
                    Vec products{};
                    for (int64_t j = 0; j < seen; j += LANES) products += load(row + j) * load(share + j);
                    const float mean = sum(products);
                    for (int64_t j = 0; j < seen; j += LANES) store(row + j, load(share + j) * (load(row + j) - mean));
                }
                product(TILE, e, seen, m.scores + i0 * n, n, 1, k.qkv + key_at, q, m.d_qkv + i0 * q + h * e, q, false);
            }
            // Keys and values of rows from i0 on are seen by the queries from i0 on.
            for (int64_t i0 = 0; i0 < n; i0 += TILE) {
                product(TILE, e, n - i0, m.scores + i0 * n + i0, 1, n, k.qkv + i0 * q + h * e, q,
                        m.d_qkv + i0 * q + key_at, q, adds);
                product(TILE, e, n - i0, shares + i0 * n + i0, 1, n, d_mixed + i0 * d.mixed(), d.mixed(),
                        m.d_qkv + i0 * q + value_at, q, adds);
            }
        }
    }
}

}  // namespace
