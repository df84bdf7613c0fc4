// The sizes of a model, where its weights lie in the parameter vector, and the workspace for all else.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

struct Dims {
    int64_t vocab, width, hidden, layers, heads, kv_heads, head_dim, sequences, length;
    double rope_theta, eps;
    int64_t q() const { return (heads + 2 * kv_heads) * head_dim; }
    int64_t mixed() const { return heads * head_dim; }
    int64_t layer_size() const { return width * (q() + mixed() + 3 * hidden + 2); }
};

struct LayerWeights {
    const float *qkv, *out, *gate_up, *down, *attention_norm, *mlp_norm;
};

LayerWeights layer_weights(const Dims& d, const float* params, int64_t layer) {
    const float* p = params + d.vocab * d.width + layer * d.layer_size();
    LayerWeights w{};
    w.qkv = p;
    w.out = w.qkv + d.q() * d.width;
    w.gate_up = w.out + d.width * d.mixed();
    w.down = w.gate_up + 2 * d.hidden * d.width;
    w.attention_norm = w.down + d.width * d.hidden;
    w.mlp_norm = w.attention_norm + d.width;
    return w;
}

// Folded matrices (outputs x inputs) and their transposes.
struct Folded {
    float *qkv, *qkv_t, *gate_up, *gate_up_t, *out_t, *down_t;
};

struct Kept {
    float *in, *in_scale, *qkv, *shares, *mixed, *mlp_in, *mlp_scale, *gate_up, *hidden;
};

class Arena {
  public:
    explicit Arena(float* start) : next_(start) {}
    float* take(int64_t count) {
        float* taken = next_;
        next_ += (count + TILE - 1) / TILE * TILE;
        return taken;
    }
    int64_t used(const float* start) const { return next_ - start; }

  private:
    float* next_;
};

constexpr int64_t MAX_LAYERS = 64;

struct Memory {
    Folded folded[MAX_LAYERS];
    Kept kept[MAX_LAYERS];
    float *head, *head_t, *d_head, *cosines, *sines, *x, *d_x, *last_in, *last_scale, *logits, *d_qkv, *d_mixed, *d_in,
        *d_gate_up, *d_hidden, *scores, *turned;

    Memory(const Dims& d, Arena& arena) {
        const int64_t n = d.length;
        for (int64_t l = 0; l < d.layers; ++l) {
            folded[l] = {arena.take(d.q() * d.width),          arena.take(d.q() * d.width),
                         arena.take(2 * d.hidden * d.width),   arena.take(2 * d.hidden * d.width),
                         arena.take(d.mixed() * d.width),      arena.take(d.hidden * d.width)};
            kept[l] = {arena.take(n * d.width), arena.take(n),           arena.take(n * d.q()),
                       arena.take(d.heads * n * n), arena.take(n * d.mixed()), arena.take(n * d.width),
                       arena.take(n),           arena.take(n * 2 * d.hidden), arena.take(n * d.hidden)};
        }
        head = arena.take(d.vocab * d.width);
        head_t = arena.take(d.vocab * d.width);
        d_head = arena.take(d.vocab * d.width);
        cosines = arena.take(n * d.head_dim / 2);
        sines = arena.take(n * d.head_dim / 2);
        x = arena.take(n * d.width);
        d_x = arena.take(n * d.width);
        last_in = arena.take(n * d.width);
        last_scale = arena.take(n);
        logits = arena.take(n * d.vocab);
        d_qkv = arena.take(n * d.q());
        d_mixed = arena.take(n * d.mixed());
        d_in = arena.take(n * d.width);
        d_gate_up = arena.take(n * 2 * d.hidden);
        d_hidden = arena.take(n * d.hidden);
        scores = arena.take(n * n);
        turned = arena.take(n * d.head_dim);
    }
};

}  // namespace
