// Sixteen floats at a time: conversions, powers of two, activations.
//
// Every function here is a fixed sequence of IEEE operations, so that a value gives the same bits
// wherever it stands among its neighbours. Compiled without -ffast-math for the same reason.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>

namespace salver {

using bf16 = std::uint16_t;

constexpr int LANES = 16;

inline float to_float(bf16 value) {
    std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline __mmask16 tail_mask(int count) {
    return static_cast<__mmask16>(count >= LANES ? 0xffff : (1u << (count > 0 ? count : 0)) - 1);
}

inline __m512 load_bf16(const bf16* from, __mmask16 mask = 0xffff) {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store(float* to, __m512 value, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(to, mask, value); }

// Rounds to nearest even.
inline void store(bf16* to, __m512 value, __mmask16 mask = 0xffff) {
    _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

inline bf16 to_bf16(float value) {
    bf16 lanes[LANES];
    store(lanes, _mm512_set1_ps(value));
    return lanes[0];
}

// 2^x: the whole part goes into the exponent, a polynomial gives the rest. -inf gives 0.
template <std::size_t DEGREE>
__m512 power_of_two(__m512 x, const float (&coefficients)[DEGREE]) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_set1_ps(coefficients[0]);
#pragma GCC unroll 8
    for (std::size_t i = 1; i < DEGREE; i++) p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(coefficients[i]));
    return _mm512_scalef_ps(p, x);
}

// Within 2 units in the last place.
inline __m512 power_of_two(__m512 x) { return power_of_two(x, {
    2.17022549e-4f, 1.24396884e-3f, 9.67884064e-3f, 5.54833412e-2f, 2.4022983e-1f, 6.93147004e-1f, 1.0f}); }

// Within 7.5e-5 of itself, a twenty-fifth of what rounding to bf16 adds.
inline __m512 rough_power_of_two(__m512 x) { return power_of_two(x, {7.80245215e-2f, 2.26067156e-1f, 6.95833564e-1f, 9.99925196e-1f}); }

enum Activation : std::int32_t { NONE = 0, SILU = 1, GELU = 2, GELU_TANH = 3, RELU = 4 };

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)))));
}

// x Phi(x), within 2 units in the last place of x: Phi is 1/2 + x p(x^2), p a Chebyshev interpolation of
// degree 15 on [0, 5.5^2]. Beyond, Phi is 0 or 1. Not inlined: it would be, some hundred times.
__attribute__((noinline)) inline __m512 gelu(__m512 x) {
    constexpr float END = 5.5f;
    constexpr float COEFFICIENTS[] = {
        -0.000274065998f, 0.000655148178f, -0.0004001958f, 0.000643707812f, -0.00259371055f, 0.0047183563f,
        -0.00670017209f, 0.0101677552f, -0.0150423506f, 0.0203835722f, -0.0260403696f, 0.0320674293f,
        -0.0387934074f, 0.0477377847f, -0.0641723275f, 0.12855193f};
    // Of a NaN both give the second, which is it.
    const __m512 inside = _mm512_max_ps(_mm512_set1_ps(-END), _mm512_min_ps(_mm512_set1_ps(END), x));
    const __m512 t = _mm512_fmadd_ps(_mm512_mul_ps(inside, inside), _mm512_set1_ps(2 / (END * END)), _mm512_set1_ps(-1.0f));
    __m512 p = _mm512_set1_ps(COEFFICIENTS[0]);
#pragma GCC unroll 16
    for (std::size_t i = 1; i < std::size(COEFFICIENTS); i++) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(COEFFICIENTS[i]));
    const __m512 phi = _mm512_fmadd_ps(inside, p, _mm512_set1_ps(0.5f));
    const __mmask16 nothing = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-END), _CMP_LT_OQ);
    return _mm512_mask_blend_ps(nothing, _mm512_mul_ps(x, phi), _mm512_setzero_ps());
}

inline __m512 activate(__m512 x, std::int32_t activation) {
    switch (activation) {
        case SILU:
            return _mm512_mul_ps(x, sigmoid(x));
        case GELU:
            return gelu(x);
        case GELU_TANH: {  // (1 + tanh(u)) / 2 = sigmoid(2u)
            const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
            const __m512 u = _mm512_mul_ps(_mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x),
                                           _mm512_set1_ps(2.0f * 0.79788456f));
            return _mm512_mul_ps(x, sigmoid(u));
        }
        case RELU:
            return _mm512_max_ps(_mm512_setzero_ps(), x);
        default:
            return x;
    }
}

}  // namespace salver
