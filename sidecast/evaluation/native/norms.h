// Root mean square norms without their weights, which are folded into the matrices that read them.

#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace {

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

}  // namespace
