// The loss and the gradient of one small Llama, one sequence at a time, so that all of it stays in one core's cache.
//
// A norm's weights are multiplied into the matrix that reads it (its columns), and the scale of attention into the rows
// of the queries; the gradients of these folded matrices are unfolded once at the end. All widths and the length of a
// sequence are multiples of 16. Names: L tokens, D width, F hidden width, Q outputs of the query, key and value
// projections, H heads, G key-value heads, E head dimension, V vocabulary.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "folding.h"
#include "memory.h"
#include "norms.h"
#include "products.h"
#include "vectors.h"

namespace {

double forward(const Dims& d, const float* params, Memory& m, const int64_t* tokens, const int64_t* targets) {
    const int64_t n = d.length, w = d.width;
    for (int64_t i = 0; i < n; ++i) std::memcpy(m.x + i * w, params + tokens[i] * w, w * sizeof(float));
    for (int64_t l = 0; l < d.layers; ++l) {
        Kept& k = m.kept[l];
        const Folded& f = m.folded[l];
        to_unit_size(n, w, d.eps, m.x, k.in, k.in_scale);
        product(n, d.q(), w, k.in, w, 1, f.qkv_t, d.q(), k.qkv, d.q(), false);
        rotate(n, d.heads + d.kv_heads, d.head_dim, m.cosines, m.sines, 1.0f, k.qkv, d.q());
        attend(d, m, k);
        product(n, w, d.mixed(), k.mixed, d.mixed(), 1, f.out_t, w, m.x, w, true);
        to_unit_size(n, w, d.eps, m.x, k.mlp_in, k.mlp_scale);
        product(n, 2 * d.hidden, w, k.mlp_in, w, 1, f.gate_up_t, 2 * d.hidden, k.gate_up, 2 * d.hidden, false);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < d.hidden; j += LANES) {
                const Vec gate = load(k.gate_up + i * 2 * d.hidden + j);
                const Vec up = load(k.gate_up + i * 2 * d.hidden + d.hidden + j);
                store(k.hidden + i * d.hidden + j, gate / (1.0f + exp_of(-gate)) * up);
            }
        product(n, w, d.hidden, k.hidden, d.hidden, 1, f.down_t, w, m.x, w, true);
    }
    to_unit_size(n, w, d.eps, m.x, m.last_in, m.last_scale);
    product(n, d.vocab, w, m.last_in, w, 1, m.head_t, d.vocab, m.logits, d.vocab, false);
    double loss = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        float* row = m.logits + i * d.vocab;
        float most = row[0];
        for (int64_t j = 1; j < d.vocab; ++j) most = row[j] > most ? row[j] : most;
        const float chosen = row[targets[i]];
        Vec total{};
        for (int64_t j = 0; j < d.vocab; j += LANES) {
            const Vec y = exp_of(load(row + j) - most);
            total += y;
            store(row + j, y);
        }
        const float all_of_it = sum(total);
        loss += most + std::log(all_of_it) - chosen;
        const float inverse = 1.0f / all_of_it;
        for (int64_t j = 0; j < d.vocab; j += LANES) store(row + j, load(row + j) * inverse);
        row[targets[i]] -= 1.0f;
    }
    return loss;
}

// Adds the gradients of the folded matrices to `grads`, in the places of the unfolded ones.
void backward(const Dims& d, const float* params, Memory& m, const int64_t* tokens, float* grads) {
    const int64_t n = d.length, w = d.width;
    product(d.vocab, w, n, m.logits, 1, d.vocab, m.last_in, w, m.d_head, w, true);
    product(n, w, d.vocab, m.logits, d.vocab, 1, m.head, w, m.d_in, w, false);
    std::memset(m.d_x, 0, n * w * sizeof(float));
    from_unit_size(n, w, m.last_in, m.last_scale, m.d_in, m.d_x);
    for (int64_t l = d.layers - 1; l >= 0; --l) {
        const Kept& k = m.kept[l];
        const Folded& f = m.folded[l];
        const LayerWeights weights = layer_weights(d, params, l);
        const LayerWeights places = layer_weights(d, grads, l);
        float* d_down = const_cast<float*>(places.down);
        product(w, d.hidden, n, m.d_x, 1, w, k.hidden, d.hidden, d_down, d.hidden, true);
        product(n, d.hidden, w, m.d_x, w, 1, weights.down, d.hidden, m.d_hidden, d.hidden, false);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < d.hidden; j += LANES) {
                const int64_t at = i * 2 * d.hidden + j;
                const Vec gate = load(k.gate_up + at), up = load(k.gate_up + at + d.hidden);
                const Vec share = 1.0f / (1.0f + exp_of(-gate)), d_hidden = load(m.d_hidden + i * d.hidden + j);
                store(m.d_gate_up + at + d.hidden, d_hidden * gate * share);
                store(m.d_gate_up + at, d_hidden * up * share * (1.0f + gate * (1.0f - share)));
            }
        product(2 * d.hidden, w, n, m.d_gate_up, 1, 2 * d.hidden, k.mlp_in, w, const_cast<float*>(places.gate_up), w,
                true);
        product(n, w, 2 * d.hidden, m.d_gate_up, 2 * d.hidden, 1, f.gate_up, w, m.d_in, w, false);
        from_unit_size(n, w, k.mlp_in, k.mlp_scale, m.d_in, m.d_x);
        product(w, d.mixed(), n, m.d_x, 1, w, k.mixed, d.mixed(), const_cast<float*>(places.out), d.mixed(), true);
        product(n, d.mixed(), w, m.d_x, w, 1, weights.out, d.mixed(), m.d_mixed, d.mixed(), false);
        attend_back(d, m, k);
        rotate(n, d.heads + d.kv_heads, d.head_dim, m.cosines, m.sines, -1.0f, m.d_qkv, d.q());
        product(d.q(), w, n, m.d_qkv, 1, d.q(), k.in, w, const_cast<float*>(places.qkv), w, true);
        product(n, w, d.q(), m.d_qkv, d.q(), 1, f.qkv, w, m.d_in, w, false);
        from_unit_size(n, w, k.in, k.in_scale, m.d_in, m.d_x);
    }
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < w; ++j) grads[tokens[i] * w + j] += m.d_x[i * w + j];
}

}  // namespace

extern "C" {

int64_t llama_workspace_floats(const Dims* dims) {
    if (dims->layers > MAX_LAYERS) return -1;
    float* start = nullptr;
    Arena arena(start);
    Memory memory(*dims, arena);
    return arena.used(start);
}

// The mean loss over `sequences` of `length` tokens.
double llama_loss(const Dims* dims, const float* params, const int64_t* tokens, const int64_t* targets,
                  float* workspace) {
    const Dims& d = *dims;
    Arena arena(workspace);
    Memory m(d, arena);
    fold(d, params, m);
    double loss = 0.0;
    for (int64_t s = 0; s < d.sequences; ++s)
        loss += forward(d, params, m, tokens + s * d.length, targets + s * d.length);
    return loss / static_cast<double>(d.sequences * d.length);
}

// The same; its gradient is written to `grads`.
double llama_gradient(const Dims* dims, const float* params, const int64_t* tokens, const int64_t* targets, float* grads,
                      float* workspace) {
    const Dims& d = *dims;
    Arena arena(workspace);
    Memory m(d, arena);
    const int64_t num_params = d.vocab * d.width + d.layers * d.layer_size() + d.width;
    std::memset(grads, 0, num_params * sizeof(float));
    std::memset(m.d_head, 0, d.vocab * d.width * sizeof(float));
    fold(d, params, m);
    double loss = 0.0;
    for (int64_t s = 0; s < d.sequences; ++s) {
        loss += forward(d, params, m, tokens + s * d.length, targets + s * d.length);
        backward(d, params, m, tokens + s * d.length, grads);
    }
    unfold(d, params, m, grads);
    const float share = 1.0f / static_cast<float>(d.sequences * d.length);
    for (int64_t i = 0; i < num_params; ++i) grads[i] *= share;
    return loss / static_cast<double>(d.sequences * d.length);
}

}  // extern "C"
