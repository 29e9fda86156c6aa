// A block of floats as 4-bit values with a scale and a least value.
#pragma once

#include <algorithm>
#include <cmath>

#include "gemm.h"

namespace salver {

inline float as_half(float value) { return _cvtsh_ss(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)); }

struct Block {
    float scale, least;  // both as 16 bits hold them
    std::uint8_t values[Int4::BLOCK];
    float error;         // sum of squares

    // The values nearest to w on the lattice scale * q + least.
    Block(const float* w, float at, float from) : scale(as_half(at)), least(as_half(from)), error(0) {
        const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
        for (int i = 0; i < Int4::BLOCK; i++) {
            const float q = std::min(15.0f, std::max(0.0f, std::nearbyint((w[i] - least) * inverse)));
            const float missed = w[i] - std::fma(scale, q, least);
            values[i] = static_cast<std::uint8_t>(q);
            error = std::fma(missed, missed, error);
        }
    }
};

// The step of the lattice that w already lies on, or 0: what is left of blocks that ggml has quantized.
inline float step_of(const float* w) {
    float sorted[Int4::BLOCK];
    std::copy(w, w + Int4::BLOCK, sorted);
    std::sort(sorted, sorted + Int4::BLOCK);
    const float range = sorted[Int4::BLOCK - 1] - sorted[0];
    float step = range;
    for (int i = 1; i < Int4::BLOCK; i++)
        if (const float gap = sorted[i] - sorted[i - 1]; gap > range / 32) step = std::min(step, gap);
    return step;
}

// The best of some ways to quantize a block: from its least to its greatest value (Q4_1), with the value that is
// farthest from zero at one end and zero on the lattice (Q4_0), and on the lattice where it already lies. So the
// blocks of a GGUF file of these types come back as they were.
inline Block quantized(const float* w) {
    const auto [low, high] = std::minmax_element(w, w + Int4::BLOCK);
    Block best(w, (*high - *low) / 15.0f, *low);
    const auto consider = [&](float scale, float least) {
        const Block other(w, scale, least);
        if (other.error < best.error) best = other;
    };
    const float close = 1e-4f * best.scale;
    if (best.error <= close * close) return best;
    const float farthest = std::fabs(*low) > std::fabs(*high) ? *low : *high;
    consider(farthest / -8.0f, farthest);
    const float step = step_of(w);
    if (best.error > close * close)
        for (int below = 0; below <= 15; below++) consider(step, *low - static_cast<float>(below) * as_half(step));
    return best;
}

}  // namespace salver
