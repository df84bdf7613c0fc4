// Norms' weights and the scale of attention into the matrices beside them and out again; angles of the rotations.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "memory.h"
#include "products.h"

namespace {

void fold(const Dims& d, const float* params, Memory& m) {
    const float* norm = params + d.vocab * d.width + d.layers * d.layer_size();
    for (int64_t i = 0; i < d.vocab; ++i)
        for (int64_t j = 0; j < d.width; ++j) m.head[i * d.width + j] = params[i * d.width + j] * norm[j];
    transpose(d.vocab, d.width, m.head, d.width, m.head_t);
    const float scale = 1.0f / std::sqrt(static_cast<float>(d.head_dim));
    for (int64_t l = 0; l < d.layers; ++l) {
        const LayerWeights w = layer_weights(d, params, l);
        Folded& f = m.folded[l];
        for (int64_t i = 0; i < d.q(); ++i)
            for (int64_t j = 0; j < d.width; ++j)
                f.qkv[i * d.width + j] =
                    w.qkv[i * d.width + j] * w.attention_norm[j] * (i < d.mixed() ? scale : 1.0f);
        for (int64_t i = 0; i < 2 * d.hidden; ++i)
            for (int64_t j = 0; j < d.width; ++j) f.gate_up[i * d.width + j] = w.gate_up[i * d.width + j] * w.mlp_norm[j];
        transpose(d.q(), d.width, f.qkv, d.width, f.qkv_t);
        transpose(2 * d.hidden, d.width, f.gate_up, d.width, f.gate_up_t);
        transpose(d.width, d.mixed(), w.out, d.mixed(), f.out_t);
        transpose(d.width, d.hidden, w.down, d.hidden, f.down_t);
    }
    const int64_t half = d.head_dim / 2;
    for (int64_t i = 0; i < d.length; ++i)
        for (int64_t j = 0; j < half; ++j) {
            // In single precision, as Hugging Face has it.
            const float frequency =
                static_cast<float>(std::pow(d.rope_theta, -static_cast<double>(2 * j) / d.head_dim));
            const float angle = static_cast<float>(i) * frequency;
            m.cosines[i * half + j] = std::cos(angle);
            m.sines[i * half + j] = std::sin(angle);
        }
}

// In place: the gradient of a matrix from that of the folded one, and that of the norm's weights.
void unfold_matrix(int64_t rows, int64_t width, const float* matrix, const float* norm, float* d_matrix, float* d_norm,
                   int64_t num_scaled, float scale) {
    std::memset(d_norm, 0, width * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) {
        const float factor = i < num_scaled ? scale : 1.0f;
        for (int64_t j = 0; j < width; ++j) {
            const float gradient = d_matrix[i * width + j] * factor;
            d_norm[j] += gradient * matrix[i * width + j];
            d_matrix[i * width + j] = gradient * norm[j];
        }
    }
}

void unfold(const Dims& d, const float* params, Memory& m, float* grads) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(d.head_dim));
    for (int64_t l = 0; l < d.layers; ++l) {
        const LayerWeights w = layer_weights(d, params, l), g = layer_weights(d, grads, l);
        unfold_matrix(d.q(), d.width, w.qkv, w.attention_norm, const_cast<float*>(g.qkv),
                      const_cast<float*>(g.attention_norm), d.mixed(), scale);
        unfold_matrix(2 * d.hidden, d.width, w.gate_up, w.mlp_norm, const_cast<float*>(g.gate_up),
                      const_cast<float*>(g.mlp_norm), 0, 1.0f);
    }
    const int64_t norm_at = d.vocab * d.width + d.layers * d.layer_size();
    unfold_matrix(d.vocab, d.width, params, params + norm_at, m.d_head, grads + norm_at, 0, 1.0f);
    for (int64_t i = 0; i < d.vocab * d.width; ++i) grads[i] += m.d_head[i];
}

}  // namespace
