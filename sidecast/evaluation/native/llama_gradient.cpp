// The loss and the gradient of one small Llama, one sequence at a time, so that all of it stays in one core's cache.
//
// A norm's weights are multiplied into the matrix that reads it (its columns), and the scale of attention into the rows
// of the queries; the gradients of these folded matrices are unfolded once at the end. All widths and the length of a
// sequence are multiples of 16. Names: L tokens, D width, F hidden width, Q outputs of the query, key and value
// projections, H heads, G key-value heads, E head dimension, V vocabulary.

#include <cstdint>
#include <cstring>
#include <cmath>

namespace {

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(64), aligned(4), may_alias));

struct Dims {
    int64_t vocab, width, hidden, layers, heads, kv_heads, head_dim, sequences, length;
    double rope_theta, eps;
    int64_t q() const { return (heads + 2 * kv_heads) * head_dim; }
    int64_t mixed() const { return heads * head_dim; }
    int64_t layer_size() const { return width * (q() + mixed() + 3 * hidden + 2); }
};

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec all(float x) { return x - Vec{}; }

inline float sum(Vec v) {
    float total = 0.0f;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

inline Vec exp_of(Vec x) {
    // Below -87 a result is 0 for all purposes here; above 88 it is infinite, and a comparison lets NaN pass.
    const Vec low = all(-87.0f), high = all(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec shifter = all(12582912.0f);
    const Vec shifted = x * 1.44269504f + shifter;
    const Vec n = shifted - shifter;
    const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vec p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    VecInt bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    VecInt raised;
    std::memcpy(&raised, &p, sizeof raised);
    raised += (bits - 0x4B400000) << 23;
    std::memcpy(&p, &raised, sizeof p);
    return p;
}

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
    int64_t j = 0;
    for (; j + 64 <= n; j += 64) columns<4>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, adds);
    switch ((n - j) / LANES) {
        case 3: columns<3>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, adds); break;
        case 2: columns<2>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, adds); break;
        case 1: columns<1>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, adds); break;
        default: break;
    }
}

void transpose(int64_t rows, int64_t cols, const float* from, int64_t ldf, float* to) {
    for (int64_t i0 = 0; i0 < rows; i0 += LANES)
        for (int64_t j = 0; j < cols; ++j)
            for (int64_t i = i0; i < i0 + LANES; ++i) to[j * rows + i] = from[i * ldf + j];
}

// y = x scaled to unit root mean square, row by row.
void to_unit_size(int64_t rows, int64_t width, double eps, const float* x, float* y, float* scale) {
    for (int64_t i = 0; i < rows; ++i) {
        Vec squares{};
        for (int64_t j = 0; j < width; j += LANES) squares += load(x + i * width + j) * load(x + i * width + j);
        const float s = 1.0f / std::sqrt(sum(squares) / width + static_cast<float>(eps));
        for (int64_t j = 0; j < width; j += LANES) store(y + i * width + j, load(x + i * width + j) * s);
        scale[i] = s;
    }
}

// d_x += what the gradient d_y of y means for x.
void from_unit_size(int64_t rows, int64_t width, const float* y, const float* scale, const float* d_y, float* d_x) {
    for (int64_t i = 0; i < rows; ++i) {
        Vec products{};
        for (int64_t j = 0; j < width; j += LANES) products += load(d_y + i * width + j) * load(y + i * width + j);
        const float mean = sum(products) / width, s = scale[i];
        for (int64_t j = 0; j < width; j += LANES) {
            const int64_t at = i * width + j;
            store(d_x + at, load(d_x + at) + (load(d_y + at) - load(y + at) * mean) * s);
        }
    }
}

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
        next_ += (count + LANES - 1) / LANES * LANES;
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

void attend(const Dims& d, Memory& m, Kept& k) {
    const int64_t n = d.length, e = d.head_dim, q = d.q(), shared = d.heads / d.kv_heads;
    for (int64_t g = 0; g < d.kv_heads; ++g) {
        const float* keys = k.qkv + d.mixed() + g * e;
        const float* values = keys + d.kv_heads * e;
        transpose(n, e, keys, q, m.turned);
        for (int64_t h = g * shared; h < (g + 1) * shared; ++h) {
            float* shares = k.shares + h * n * n;
            for (int64_t i0 = 0; i0 < n; i0 += LANES) {
                const int64_t seen = i0 + LANES;
                product(LANES, seen, e, k.qkv + i0 * q + h * e, q, 1, m.turned, n, shares + i0 * n, n, false);
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
                product(LANES, e, seen, shares + i0 * n, n, 1, values, q, k.mixed + i0 * d.mixed() + h * e, d.mixed(),
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
            for (int64_t i0 = 0; i0 < n; i0 += LANES) {
                const int64_t seen = i0 + LANES;
                product(LANES, seen, e, d_mixed + i0 * d.mixed(), d.mixed(), 1, m.turned, n, m.scores + i0 * n, n,
                        false);
                for (int64_t i = i0; i < seen; ++i) {
                    float* row = m.scores + i * n;
                    const float* share = shares + i * n;
                    Vec products{};
                    for (int64_t j = 0; j < seen; j += LANES) products += load(row + j) * load(share + j);
                    const float mean = sum(products);
                    for (int64_t j = 0; j < seen; j += LANES) store(row + j, load(share + j) * (load(row + j) - mean));
                }
                product(LANES, e, seen, m.scores + i0 * n, n, 1, k.qkv + key_at, q, m.d_qkv + i0 * q + h * e, q, false);
            }
            // Keys and values of rows from i0 on are seen by the queries from i0 on.
            for (int64_t i0 = 0; i0 < n; i0 += LANES) {
                product(LANES, e, n - i0, m.scores + i0 * n + i0, 1, n, k.qkv + i0 * q + h * e, q,
                        m.d_qkv + i0 * q + key_at, q, adds);
                product(LANES, e, n - i0, shares + i0 * n + i0, 1, n, d_mixed + i0 * d.mixed(), d.mixed(),
                        m.d_qkv + i0 * q + value_at, q, adds);
            }
        }
    }
}

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
