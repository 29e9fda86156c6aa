// y = x W^T for a few rows or many, W packed once.
//
// A weight [N, K] is packed in panels of 32 columns of the product. Inside a panel the steps of K
// follow one another, each holding for every column the 1 (float), 2 (bf16), 4 (int8) or 8 (int4) values
// of one load. A gated pair of matrices is packed with 16 columns of the gate and the same 16 of the
// other in one panel, so that both meet in registers.
//
// One accumulator per element of the product walks K from front to back, whatever the number of
// rows: a row's result has the same bits alone and among any others.
#pragma once

#include <algorithm>
#include <type_traits>

#include "adapters.h"
#include "simd.h"

namespace salver {

constexpr int PANEL = 32;
constexpr int AHEAD = 2048;  // bytes of a panel that few rows ask for before their time
constexpr int MAX_ROWS = 12;  // 12 x 2 accumulators, 2 of W, 1 of x: 27 of 32 registers

// What is multiplied how. A load holds STEP values of K of each column, in HELD values of the type Weight. An
// instruction (`multiply`) takes STEP / PARTS of them; `weights` gives them part by part.
struct Float {
    using Input = float;
    using Weight = float;
    using Acc = __m512;
    static constexpr int STEP = 1, HELD = 1, PARTS = 1;
    static Acc zero() { return _mm512_setzero_ps(); }
    static __m512i weights(const Weight* from, int) { return _mm512_loadu_si512(from); }
    static Acc multiply(Acc acc, const Input* x, __m512i w) {
        return _mm512_fmadd_ps(_mm512_set1_ps(*x), _mm512_castsi512_ps(w), acc);
    }
};

// bf16 weights times floats. Half of a pair is a float when the other half is zero, so that the order of
// sums is Float's.
struct Widened {
    using Input = float;
    using Weight = bf16;
    using Acc = __m512;
    static constexpr int STEP = 2, HELD = 2, PARTS = 2;
    static Acc zero() { return _mm512_setzero_ps(); }
    static __m512i weights(const Weight* from, int part) {
        const __m512i pairs = _mm512_loadu_si512(from);
        return part == 0 ? _mm512_slli_epi32(pairs, 16) : _mm512_and_si512(pairs, _mm512_set1_epi32(~0xffff));
    }
    static Acc multiply(Acc acc, const Input* x, __m512i w) { return Float::multiply(acc, x, w); }
};

// bf16 times bf16, two products an instruction.
struct Half {
    using Input = bf16;
    using Weight = bf16;
    using Acc = __m512;
    static constexpr int STEP = 2, HELD = 2, PARTS = 1;
    static Acc zero() { return _mm512_setzero_ps(); }
    static __m512i weights(const Weight* from, int) { return _mm512_loadu_si512(from); }
    static Acc multiply(Acc acc, const Input* x, __m512i w) {
        std::int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)),
                                reinterpret_cast<__m512bh>(w));
    }
};

// Weights are stored plus 128, unsigned, as the instruction wants one side; 128 times the sum of x is taken
// off in floats, once for a row. Sums of integers are exact.
struct Int8 {
    using Input = std::int8_t;
    using Weight = std::uint8_t;
    using Acc = __m512i;
    static constexpr int STEP = 4, HELD = 4, PARTS = 1;
    static Acc zero() { return _mm512_setzero_si512(); }
    static __m512i weights(const Weight* from, int) { return _mm512_loadu_si512(from); }
    static Acc multiply(Acc acc, const Input* x, __m512i w) {
        std::int32_t four;
        std::memcpy(&four, x, sizeof four);
        return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four));
    }
};

// Blocks of 32 weights of a column: each is scale * q + least, with q of 4 bits, and scale and least of 16 (Q4_1
// of ggml). A byte holds q of k in its low half and of k + 4 in its high half. In a panel the 512 bytes of a
// block are followed by the 32 scales and the 32 least values.
struct Int4 {
    using Input = std::int8_t;
    using Weight = std::uint8_t;
    using Acc = __m512i;
    static constexpr int STEP = 8, HELD = 4, PARTS = 2;
    static constexpr int BLOCK = 32, VALUES = PANEL * BLOCK / 2, BYTES = VALUES + 4 * PANEL;
    static Acc zero() { return Int8::zero(); }
    static __m512i weights(const Weight* from, int part) {
        const __m512i both = _mm512_loadu_si512(from);
        return _mm512_and_si512(part == 0 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(0x0f));
    }
    static Acc multiply(Acc acc, const Input* x, __m512i w) { return Int8::multiply(acc, x, w); }
    static __m512 scale(const Weight* block, int half) { return floats(block + VALUES + half * 2 * LANES); }
    static __m512 least(const Weight* block, int half) { return scale(block + 2 * PANEL, half); }

private:
    static __m512 floats(const Weight* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
};

// What becomes of the accumulators of a row: `first` and `second` 16 columns of a panel.
struct Epilogue {
    enum Kind : std::int32_t { STORE = 0, ADD = 1, ACTIVATE = 2, GATED = 3 };
    std::int32_t kind;
    std::int32_t activation;
    bool to_bf16;        // what is stored, else float
    void* out;
    std::ptrdiff_t out_stride;  // elements
    int columns;         // of the output: N, or N / 2 when gated
    const float* bias;   // [N] in panel order, or null
    ProductAdapters adapters;

    template <typename Out>
    void put(Out* row, int column, __m512 value) const {
        if (column < columns) store(row + column, value, tail_mask(columns - column));
    }

    void apply(int row, int panel, __m512 first, __m512 second) const {
        const float* own_bias = bias;
        if (const Adapted* own = adapters.own(row); own != nullptr) {
            __m512 low = first, high = second;
            adapt(adapters, *own, row, panel, low, high, own_bias);
            first = low;
            second = high;
        }
        if (own_bias != nullptr) {
            first = _mm512_add_ps(first, _mm512_loadu_ps(own_bias + panel * PANEL));
            second = _mm512_add_ps(second, _mm512_loadu_ps(own_bias + panel * PANEL + LANES));
        }
        if (kind == ADD) {
            float* to = static_cast<float*>(out) + row * out_stride;
            const int column = panel * PANEL;
            const __mmask16 low = tail_mask(columns - column), high = tail_mask(columns - column - LANES);
            put(to, column, _mm512_add_ps(_mm512_maskz_loadu_ps(low, to + column), first));
            put(to, column + LANES, _mm512_add_ps(_mm512_maskz_loadu_ps(high, to + column + LANES), second));
        } else if (to_bf16) {
            finish(static_cast<bf16*>(out) + row * out_stride, panel, first, second);
        } else {
            finish(static_cast<float*>(out) + row * out_stride, panel, first, second);
        }
    }

    template <typename Out>
    void finish(Out* row, int panel, __m512 first, __m512 second) const {
        if (kind == GATED) {
            put(row, panel * LANES, _mm512_mul_ps(activate(first, activation), second));
            return;
        }
        put(row, panel * PANEL, activate(first, activation));
        put(row, panel * PANEL + LANES, activate(second, activation));
    }
};

struct Gemm {
    const void* input;
    std::ptrdiff_t input_stride;  // elements
    int group;                    // of an int8 input: values of a row that share a scale; the last may be fewer
    const float* group_scale;     // of an int8 input: [groups, scale_stride], a column for each of its rows
    const float* group_sum;       // int4 alone, likewise: the sum of a group, scaled
    const float* row_offset;      // int8 alone: of each row, -128 times its sum
    std::ptrdiff_t scale_stride;
    const void* weight;
    const float* column_scale;    // int8 alone, in panel order
    int rows, panels, depth;
    Epilogue epilogue;
};

// Which of the tiles that pass a panel one after the other.
struct Turn {
    int number = 0, of = 1;
};

// What comes after a panel, asked for while it is multiplied: by every tile its share, evenly. A line that comes
// from far holds one of few places all the while, and without a free one the next load of this panel waits too.
class Ahead {
public:
    // `step` bytes are multiplied in a step of K, from a panel of `steps` steps on.
    Ahead(const void* next, std::ptrdiff_t steps, int step, Turn turn)
        : next_(static_cast<const char*>(next) + steps * step / LINE * turn.number / turn.of * LINE),
          every_(turn.of * LINE / step) {}

    // Whether every step asks for as many lines as it multiplies, by `ask`; else `ask` comes before `every` steps.
    bool each() const { return every_ < 2; }
    int every() const { return every_; }

    void ask() {
        _mm_prefetch(next_, _MM_HINT_T1);
        next_ += LINE;
    }

private:
    static constexpr int LINE = 64;
    const char* next_;
    int every_;
};

// One step of K: what stands in a load of the weight, for ROWS rows of PANELS panels of `size` values.
template <typename T, int ROWS, int PANELS>
inline __attribute__((always_inline)) void multiply_step(typename T::Acc (&acc)[PANELS][ROWS][2], const typename T::Input* x,
                                                         std::ptrdiff_t stride, const typename T::Weight* w,
                                                         std::ptrdiff_t size) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) {
        // The hardware's own prefetch stops at every page. Few rows are bound by memory; for more there is
        // time to bring the next panel near (`Ahead`).
        if constexpr (ROWS <= 4) {
            const char* ahead = reinterpret_cast<const char*>(w + p * size) + AHEAD;
            _mm_prefetch(ahead, _MM_HINT_T0);
            _mm_prefetch(ahead + 64, _MM_HINT_T0);
        }
#pragma GCC unroll 2
        for (int part = 0; part < T::PARTS; part++) {
            const __m512i first = T::weights(w + p * size, part);
            const __m512i second = T::weights(w + p * size + LANES * T::HELD, part);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                const typename T::Input* at = x + r * stride + part * (T::STEP / T::PARTS);
                acc[p][r][0] = T::multiply(acc[p][r][0], at, first);
                acc[p][r][1] = T::multiply(acc[p][r][1], at, second);
            }
        }
    }
}

// All steps of K over `depth` values from x and w on.
template <typename T, int ROWS, int PANELS>
inline __attribute__((always_inline)) void multiply_steps(typename T::Acc (&acc)[PANELS][ROWS][2], const typename T::Input* x,
                                                          std::ptrdiff_t stride, const typename T::Weight* w,
                                                          std::ptrdiff_t size, int depth, Ahead& ahead) {
    const typename T::Input* end = x + depth;
    if (ROWS <= 4 || ahead.each()) {
        for (; x < end; x += T::STEP, w += PANEL * T::HELD) {
            if constexpr (ROWS > 4)
                for (int i = 0; i < 2 * PANELS; i++) ahead.ask();
            multiply_step<T, ROWS, PANELS>(acc, x, stride, w, size);
        }
        return;
    }
    while (x < end) {
        ahead.ask();
        const typename T::Input* until = std::min(end, x + ahead.every() * T::STEP);
        for (; x < until; x += T::STEP, w += PANEL * T::HELD) multiply_step<T, ROWS, PANELS>(acc, x, stride, w, size);
    }
}

// Instructs nothing. Without it g++ copies or stores accumulators in every step, for what is done with them
// after the last.
template <typename T, int ROWS, int PANELS>
inline __attribute__((always_inline)) void keep_in_registers(typename T::Acc (&acc)[PANELS][ROWS][2]) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) asm("" : "+v"(acc[p][r][0]), "+v"(acc[p][r][1]));
}

// ROWS rows of PANELS panels. Few rows take several panels at once: each accumulator waits for its last
// instruction (7 cycles), so a row alone with its two would leave the multiplier idle. Bits don't change:
// an accumulator's own walk is the same.
template <typename T, int ROWS, int PANELS>
void multiply_tile(const Gemm& g, int row, int panel, Turn turn) {
    typename T::Acc acc[PANELS][ROWS][2];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) acc[p][r][0] = acc[p][r][1] = T::zero();
    const auto* x = static_cast<const typename T::Input*>(g.input) + row * g.input_stride;
    const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(PANEL) * g.depth;
    const auto* w = static_cast<const typename T::Weight*>(g.weight) + panel * size;
    Ahead ahead(w + PANELS * size, (g.depth + T::STEP - 1) / T::STEP, PANELS * PANEL * T::HELD * sizeof(*w), turn);
    multiply_steps<T, ROWS, PANELS>(acc, x, g.input_stride, w, size, g.depth, ahead);
    keep_in_registers<T, ROWS, PANELS>(acc);
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) g.epilogue.apply(row + r, panel + p, acc[p][r][0], acc[p][r][1]);
}

// The same with int8. Integers live in registers within a group; what the groups before came to lies in the
// nearest cache meanwhile.
template <int ROWS, int PANELS>
void multiply_groups(const Gemm& g, int row, int panel, Turn turn) {
    alignas(64) __m512 sum[PANELS][ROWS][2];
    for (int p = 0; p < PANELS; p++)
        for (int r = 0; r < ROWS; r++) sum[p][r][0] = sum[p][r][1] = _mm512_set1_ps(g.row_offset[row + r]);
    const std::int8_t* x = static_cast<const std::int8_t*>(g.input) + row * g.input_stride;
    const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(PANEL) * g.depth;
    const std::uint8_t* w = static_cast<const std::uint8_t*>(g.weight) + panel * size;
    const float* scale = g.group_scale + row;
    Ahead ahead(w + PANELS * size, (g.depth + Int8::STEP - 1) / Int8::STEP, PANELS * PANEL * Int8::HELD, turn);
    for (int begin = 0; begin < g.depth; begin += g.group, scale += g.scale_stride) {
        __m512i acc[PANELS][ROWS][2];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) acc[p][r][0] = acc[p][r][1] = Int8::zero();
        const int depth = std::min(g.depth, begin + g.group) - begin;
        multiply_steps<Int8, ROWS, PANELS>(acc, x + begin, g.input_stride, w, size, depth, ahead);
        w += (depth + Int8::STEP - 1) / Int8::STEP * PANEL * Int8::HELD;
        keep_in_registers<Int8, ROWS, PANELS>(acc);
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++)
                    sum[p][r][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[p][r][half]), _mm512_set1_ps(scale[r]),
                                                      sum[p][r][half]);
    }
    for (int p = 0; p < PANELS; p++) {
        const float* columns = g.column_scale + (panel + p) * PANEL;
        const __m512 first = _mm512_loadu_ps(columns), second = _mm512_loadu_ps(columns + LANES);
        for (int r = 0; r < ROWS; r++)
            g.epilogue.apply(row + r, panel + p, _mm512_mul_ps(sum[p][r][0], first), _mm512_mul_ps(sum[p][r][1], second));
    }
}

// The same with int4, whose blocks are the groups of the input.
template <int ROWS, int PANELS>
void multiply_blocks(const Gemm& g, int row, int panel, Turn turn) {
    alignas(64) __m512 sum[PANELS][ROWS][2];
    for (int p = 0; p < PANELS; p++)
        for (int r = 0; r < ROWS; r++) sum[p][r][0] = sum[p][r][1] = _mm512_setzero_ps();
    const std::int8_t* x = static_cast<const std::int8_t*>(g.input) + row * g.input_stride;
    const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(Int4::BYTES) * (g.depth / Int4::BLOCK);
    const std::uint8_t* w = static_cast<const std::uint8_t*>(g.weight) + panel * size;
    const float *scale = g.group_scale + row, *of_row = g.group_sum + row;
    Ahead ahead(w + PANELS * size, g.depth / Int4::BLOCK, PANELS * Int4::BYTES, turn);
    int until = 0;
    for (int begin = 0; begin < g.depth; begin += Int4::BLOCK, w += Int4::BYTES) {
        __m512i acc[PANELS][ROWS][2];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) acc[p][r][0] = acc[p][r][1] = Int4::zero();
        if (ROWS > 4 && ahead.each()) {
            for (int line = 0; line < PANELS * Int4::BYTES; line += 64) ahead.ask();
        } else if (ROWS > 4 && begin == until) {
            ahead.ask();
            until += ahead.every() * Int4::BLOCK;
        }
        for (int k = 0; k < Int4::BLOCK; k += Int4::STEP)
            multiply_step<Int4, ROWS, PANELS>(acc, x + begin + k, g.input_stride, w + k / Int4::STEP * PANEL * Int4::HELD, size);
        keep_in_registers<Int4, ROWS, PANELS>(acc);
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const __m512 of_column = Int4::scale(w + p * size, half), least = Int4::least(w + p * size, half);
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++) {
                    const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[p][r][half]), of_column);
                    const __m512 more = _mm512_fmadd_ps(least, _mm512_set1_ps(of_row[r]), sum[p][r][half]);
                    sum[p][r][half] = _mm512_fmadd_ps(product, _mm512_set1_ps(scale[r]), more);
                }
            }
        scale += g.scale_stride;
        of_row += g.scale_stride;
    }
    for (int p = 0; p < PANELS; p++)
        for (int r = 0; r < ROWS; r++) g.epilogue.apply(row + r, panel + p, sum[p][r][0], sum[p][r][1]);
}

// How many panels at once: up to 24 accumulators, but for a row alone, which is bound by memory.
constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : rows <= 4 ? 3 : rows <= 6 ? 2 : 1; }

template <typename T, int ROWS = MAX_ROWS>
void multiply_rows(const Gemm& g, int rows, int row, int begin, int end, Turn turn = {}) {
    if constexpr (ROWS >= 1) {
        if (rows != ROWS) {
            multiply_rows<T, ROWS - 1>(g, rows, row, begin, end, turn);
            return;
        }
        constexpr int PANELS = panels_at_once(ROWS);
        int panel = begin;
        if constexpr (std::is_same_v<T, Int8>) {
            for (; panel + PANELS <= end; panel += PANELS) multiply_groups<ROWS, PANELS>(g, row, panel, turn);
            for (; panel < end; panel++) multiply_groups<ROWS, 1>(g, row, panel, turn);
        } else if constexpr (std::is_same_v<T, Int4>) {
            for (; panel + PANELS <= end; panel += PANELS) multiply_blocks<ROWS, PANELS>(g, row, panel, turn);
            for (; panel < end; panel++) multiply_blocks<ROWS, 1>(g, row, panel, turn);
        } else {
            for (; panel + PANELS <= end; panel += PANELS) multiply_tile<T, ROWS, PANELS>(g, row, panel, turn);
            for (; panel < end; panel++) multiply_tile<T, ROWS, 1>(g, row, panel, turn);
        }
    }
}

// Rows are multiplied in tiles of about equal size.
inline int tiles_of(int rows) { return (rows + MAX_ROWS - 1) / MAX_ROWS; }

inline int row_of_tile(int rows, int tile) {
    return static_cast<int>(static_cast<std::int64_t>(rows) * tile / tiles_of(rows));
}

// Panels [begin, end) of the product of tiles [first, last): one panel after the other, all rows while it is near.
template <typename T>
void multiply(const Gemm& g, int begin, int end, int first, int last) {
    if (g.rows <= MAX_ROWS) {
        multiply_rows<T>(g, g.rows, 0, begin, end);
        return;
    }
    for (int panel = begin; panel < end; panel++) {
        for (int tile = first; tile < last; tile++) {
            const int row = row_of_tile(g.rows, tile);
            multiply_rows<T>(g, row_of_tile(g.rows, tile + 1) - row, row, panel, panel + 1, {tile - first, last - first});
        }
    }
}

// Of the packed layout: which row of the weight [N, K] is this column of a panel; -1 for padding.
inline int weight_row(int panel, int column, int rows, bool gated) {
    if (!gated) {
        const int row = panel * PANEL + column;
        return row < rows ? row : -1;
    }
    const int half = rows / 2, within = panel * LANES + column % LANES;
    return within < half ? within + (column < LANES ? 0 : half) : -1;
}

// Where element k of a column stands in its panel.
template <typename T>
std::ptrdiff_t packed_index(int column, int k) {
    return static_cast<std::ptrdiff_t>(k / T::STEP) * PANEL * T::STEP + column * T::STEP + k % T::STEP;
}

}  // namespace salver
