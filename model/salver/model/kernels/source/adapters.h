// What LoRA adapters change of an operation, row by row: each row bears the number of its own, or none.
//
// A row's product with an adapter's first matrix ("shrunk") is made beforehand, in floats; the second matrix is
// multiplied where the base's product leaves its registers. Nothing depends on the rows beside it.
#pragma once

#include "simd.h"

namespace salver {

constexpr int RANKS = 8;  // ranks are padded to a multiple of so many

// One adapter at one operation. All zero: it changes nothing there.
struct Adapted {
    const float* a;             // [rank, depth]; of an embedding [vocabulary, rank]
    const float* b;             // [panels, rank, 32 columns]; of an embedding [rank, width]
    const std::int32_t* ranks;  // of each panel, the first that is not all zero and the one past the last
    const float* scale;         // DoRA's, of each column in panel order; of a norm its weight; or null
    const float* bias;          // in panel order; of a norm its bias; of an embedding its table; null: the base's
    std::int32_t rank;
};

// Those of one product.
struct ProductAdapters {
    const Adapted* of;            // by number
    const std::int32_t* numbers;  // of each row, -1 for none; null: no row has one
    const float* shrunk;          // [rows, stride]
    std::int64_t stride;

    const Adapted* own(int row) const {
        return numbers == nullptr || numbers[row] < 0 ? nullptr : of + numbers[row];
    }
};

// Two times 16 columns of panel `panel` of a row's product, before the bias, which may be another.
__attribute__((noinline)) inline void adapt(const ProductAdapters& p, const Adapted& own, int row, int panel, __m512& first,
                                            __m512& second, const float*& bias) {
    constexpr int COLUMNS = 2 * LANES;
    __m512 low = first, high = second;
    if (own.rank > 0) {
        const float* x = p.shrunk + row * p.stride;
        const float* b = own.b + static_cast<std::ptrdiff_t>(panel) * own.rank * COLUMNS;
        for (int r = own.ranks[2 * panel]; r < own.ranks[2 * panel + 1]; r++) {
            const __m512 value = _mm512_set1_ps(x[r]);
            low = _mm512_fmadd_ps(value, _mm512_loadu_ps(b + r * COLUMNS), low);
            high = _mm512_fmadd_ps(value, _mm512_loadu_ps(b + r * COLUMNS + LANES), high);
        }
    }
    if (own.scale != nullptr) {
        low = _mm512_mul_ps(low, _mm512_loadu_ps(own.scale + panel * COLUMNS));
        high = _mm512_mul_ps(high, _mm512_loadu_ps(own.scale + panel * COLUMNS + LANES));
    }
    if (own.bias != nullptr) bias = own.bias;
    first = low;
    second = high;
}

// The products of a row with the rows of a matrix [rank, depth].
inline void shrink_row(const float* x, const Adapted& own, int depth, float* out) {
    for (int begin = 0; begin < own.rank; begin += RANKS) {
        const float* a = own.a + static_cast<std::ptrdiff_t>(begin) * depth;
        __m512 sum[RANKS];
#pragma GCC unroll 8
        for (int r = 0; r < RANKS; r++) sum[r] = _mm512_setzero_ps();
        for (int i = 0; i < depth; i += LANES) {
            const __mmask16 mask = tail_mask(depth - i);
            const __m512 value = _mm512_maskz_loadu_ps(mask, x + i);
#pragma GCC unroll 8
            for (int r = 0; r < RANKS; r++)
                sum[r] = _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(mask, a + r * static_cast<std::ptrdiff_t>(depth) + i), sum[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < RANKS; r++) out[begin + r] = _mm512_reduce_add_ps(sum[r]);
    }
}

// A row of an embedding, its table replaced and a product added.
inline void adapt_embedding(const Adapted& own, std::int64_t index, int width, float* out) {
    if (own.bias != nullptr) std::memcpy(out, own.bias + index * width, width * sizeof(float));
    for (int r = 0; r < own.rank; r++) {
        const float value = own.a[index * own.rank + r];
        for (int k = 0; k < width; k++) out[k] = std::fma(value, own.b[static_cast<std::ptrdiff_t>(r) * width + k], out[k]);
    }
    if (own.scale != nullptr)
        for (int k = 0; k < width; k++) out[k] *= own.scale[k];
}

}  // namespace salver
