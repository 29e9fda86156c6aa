// Causal attention over the paged cache, read in place. One walk for prefill and decode.
//
// A query row walks its keys from the first to its own in tiles of 64 at fixed absolute positions,
// with the running sum of Milakov & Gimelshein 2018 ("Online normalizer calculation for softmax").
// What stands beside the row, how the prompt was cut and which keys came from the cache change nothing
// in that walk, so the row's bits are the same.
//
// Weights are powers of two, log2(e) being part of the query's scale, and relative to `top`. That is the
// first tile's maximum, raised only by a tile that goes MARGIN beyond it: the quotient does not depend on
// it, and so most tiles neither look for their maximum nor touch what was summed.
//
// The cache holds, for a block and a head, 16 keys as [head_dim / STEP][16][STEP] and 16 values as
// [16 / STEP][head_dim][STEP]: sixteen lanes are sixteen keys for the scores, and sixteen dimensions
// for the sum of values. STEP is 2 for bf16 (an instruction multiplies pairs), 1 for float.
//
// Encoders have no cache: whole.h lays out the keys and values of one input and head as blocks, and the same
// walk goes over them, perhaps not from the first key on and with a bias for every distance.
#pragma once

#include <algorithm>

#include "gemm.h"

namespace salver {

constexpr int BLOCK = 16;        // tokens of a block
constexpr int TILE_BLOCKS = 4;   // blocks of a tile
constexpr int TILE = BLOCK * TILE_BLOCKS;
constexpr int QUERY_ROWS = 6;    // rows that share a load of the keys: 6 x 4 accumulators
constexpr int MAX_HEAD_DIM = 256;
constexpr float MARGIN = 8;      // of a score above `top`: weights to 256, far from any overflow

struct Step {
    std::int32_t num_rows;        // padding included
    std::int32_t num_sequences;
    const std::int64_t* token_ids;    // [num_rows]
    const std::int64_t* positions;    // [num_rows]
    const std::int64_t* segments;     // [num_rows], of encoders alone
    const std::int64_t* slots;        // [num_rows]
    const std::int32_t* query_starts; // [num_sequences + 1]
    const std::int32_t* lengths;      // [num_sequences]
    const std::int64_t* block_tables; // [num_sequences, table_stride]
    std::int64_t table_stride;
    const float* cos;                 // [num_rows, head_dim / 2], or null
    const float* sin;
    const float* local_cos;           // of layers with a window, of encoders alone
    const float* local_sin;
    const Step* source;               // of an encoder-decoder: every row as a sequence of one query at the end of
                                      // its source; or null
    const std::int32_t* adapters;     // [num_rows] numbers, -1 for none; null: no row has one
};

struct CacheShape {
    void* keys_and_values;  // [layers][blocks][2][kv_heads][16 * head_dim]
    std::int64_t blocks;
    std::int32_t heads, kv_heads, head_dim;
    float scale;

    template <typename Value>
    Value* part(int layer, std::int64_t block, int which, int kv_head) const {
        const std::int64_t index = ((layer * blocks + block) * 2 + which) * kv_heads + kv_head;
        return static_cast<Value*>(keys_and_values) + index * BLOCK * head_dim;
    }
};

// Turns query and key of a row by angles [head_dim / 2].
inline void rotate(const CacheShape& c, const float* cos, const float* sin, float* heads) {
    const int half = c.head_dim / 2;
    for (int head = 0; head < c.heads + c.kv_heads; head++) {
        float* x = heads + head * c.head_dim;
        for (int i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cos[i] - b * sin[i];
            x[i + half] = b * cos[i] + a * sin[i];
        }
    }
}

// Turns query and key of a row by its position and stores key and value where the row's slot says.
template <typename T>
void rotate_and_store(const CacheShape& c, const Step& step, int layer, int row, float* heads) {
    using Value = typename T::Weight;
    const std::ptrdiff_t angles = static_cast<std::ptrdiff_t>(row) * (c.head_dim / 2);
    if (step.cos != nullptr) rotate(c, step.cos + angles, step.sin + angles, heads);
    if (row >= step.query_starts[step.num_sequences]) return;  // padding
    const std::int64_t block = step.slots[row] / BLOCK;
    const int offset = static_cast<int>(step.slots[row] % BLOCK);
    for (int head = 0; head < c.kv_heads; head++) {
        const float* key = heads + (c.heads + head) * c.head_dim;
        const float* value = key + c.kv_heads * c.head_dim;
        Value* keys = c.part<Value>(layer, block, 0, head);
        Value* values = c.part<Value>(layer, block, 1, head) + (offset / T::STEP) * c.head_dim * T::STEP;
        Value stored[2][MAX_HEAD_DIM];
        for (int i = 0; i < c.head_dim; i += LANES) {
            store(stored[0] + i, _mm512_loadu_ps(key + i));
            store(stored[1] + i, _mm512_loadu_ps(value + i));
        }
        for (int i = 0; i < c.head_dim; i++) {
            keys[(i / T::STEP * BLOCK + offset) * T::STEP + i % T::STEP] = stored[0][i];
            values[i * T::STEP + offset % T::STEP] = stored[1][i];
        }
    }
}

// Sixteen weights each of four blocks, as the product with the values wants them. Returns `total` with them
// added, rounded as they are stored.
inline __m512 put_weights(float* to, const __m512 (&scores)[TILE_BLOCKS], __m512 total) {
    __m512 weights[TILE_BLOCKS];
    for (int i = 0; i < TILE_BLOCKS; i++) {
        weights[i] = power_of_two(scores[i]);
        _mm512_store_ps(to + i * BLOCK, weights[i]);
    }
    return _mm512_add_ps(total, _mm512_add_ps(_mm512_add_ps(weights[0], weights[1]),
                                              _mm512_add_ps(weights[2], weights[3])));
}

inline __m512 put_weights(bf16* to, const __m512 (&scores)[TILE_BLOCKS], __m512 total) {
    const __m512bh one = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    for (int i = 0; i < TILE_BLOCKS; i += 2) {
        const __m512bh two = _mm512_cvtne2ps_pbh(rough_power_of_two(scores[i + 1]), rough_power_of_two(scores[i]));
        _mm512_store_si512(to + i * BLOCK, reinterpret_cast<__m512i>(two));
        total = _mm512_dpbf16_ps(total, two, one);
    }
    return total;
}

// ROWS query rows of one key head, each with its own number of keys.
template <typename T, int ROWS>
class Walk {
    using Value = typename T::Weight;
    using Input = typename T::Input;
    // Few rows wait for memory rather than for the multiplier: blocks lie anywhere, and the hardware's own
    // prefetch stops at every page. Rows of a prompt mostly find theirs where the rows before left them.
    static constexpr bool FEW = ROWS <= 4;

public:
    Walk(const CacheShape& cache, int layer, int kv_head, const std::int64_t* table)
        : cache_(cache), layer_(layer), kv_head_(kv_head), table_(table) {}

    // A row sees the keys [first, keys). `bias`, if any, has an entry for each key, in powers of two.
    void set(int row, const float* query, int keys, int first = 0, const float* bias = nullptr) {
        const __m512 scale = _mm512_set1_ps(cache_.scale * 1.44269504f);
        for (int i = 0; i < cache_.head_dim; i += LANES) {
            store(query_[row] + i, _mm512_mul_ps(_mm512_loadu_ps(query + i), scale));
            _mm512_store_ps(sum_[row] + i, _mm512_setzero_ps());
        }
        keys_[row] = keys;
        first_[row] = first;
        bias_[row] = bias;
        most_ = row == 0 || keys > most_ ? keys : most_;
        const int begin = first / TILE * TILE;
        begin_ = row == 0 || begin < begin_ ? begin : begin_;
        seen_[row] = false;
        top_[row] = 0;
        total_[row] = _mm512_setzero_ps();
    }

    void run() {
        for (int begin = begin_; begin < most_; begin += TILE) tile(begin);
    }

    template <typename Out>
    void get(int row, Out* out) const {
        const __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(total_[row]));
        for (int i = 0; i < cache_.head_dim; i += LANES)
            store(out + i, _mm512_div_ps(_mm512_load_ps(sum_[row] + i), total));
    }

private:
    // The tile's blocks in the cache, as far as keys go. Returns how many.
    int find(int begin, const Value** keys, const Value** values) const {
        const int blocks = std::min(TILE_BLOCKS, (most_ - begin + BLOCK - 1) / BLOCK);
        for (int i = 0; i < blocks; i++) {
            const std::int64_t block = table_[begin / BLOCK + i];
            keys[i] = cache_.part<Value>(layer_, block, 0, kv_head_);
            values[i] = cache_.part<Value>(layer_, block, 1, kv_head_);
        }
        return blocks;
    }

    void tile(int begin) {
        const Value *keys[TILE_BLOCKS], *values[TILE_BLOCKS];
        const int blocks = find(begin, keys, values);
        if constexpr (FEW) {
            if (begin == begin_) {
                for (int i = 0; i < blocks; i++) {
                    ask(keys[i]);
                    ask(values[i]);
                }
                find(begin_, next_keys_, next_values_);
            }
            find(begin + TILE, next_keys_, next_values_);  // past the end those of before stay
        }
        __m512 scores[ROWS][TILE_BLOCKS];
        if (blocks == TILE_BLOCKS) {
            score<TILE_BLOCKS>(0, keys, scores);
        } else {  // what is missing is masked
            for (int i = 0; i < blocks; i++) score<1>(i, keys, scores);
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) weigh(r, begin, scores[r]);
        for (int d = 0; d < cache_.head_dim;) {
            if (cache_.head_dim - d >= 4 * LANES) {
                add_values<4>(d, blocks, values);
                d += 4 * LANES;
            } else if (cache_.head_dim - d >= 2 * LANES) {
                add_values<2>(d, blocks, values);
                d += 2 * LANES;
            } else {
                add_values<1>(d, blocks, values);
                d += LANES;
            }
        }
    }

    // Asks for all of a block's keys or values.
    void ask(const Value* part) const {
        for (int i = 0; i < BLOCK * cache_.head_dim * static_cast<int>(sizeof(Value)); i += 64)
            _mm_prefetch(reinterpret_cast<const char*>(part) + i, _MM_HINT_T0);
    }

    // Scores, less `top`, of BLOCKS blocks from block `first` of the tile on.
    template <int BLOCKS>
    void score(int first, const Value* const* keys, __m512 (&scores)[ROWS][TILE_BLOCKS]) {
        __m512 sum[ROWS][BLOCKS];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int i = 0; i < BLOCKS; i++) sum[r][i] = _mm512_set1_ps(-top_[r]);
        for (int d = 0; d < cache_.head_dim; d += T::STEP) {
            if constexpr (FEW)
                for (int i = 0; i < BLOCKS; i++) _mm_prefetch(next_keys_[first + i] + d * BLOCK, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int part = 0; part < T::PARTS; part++) {
                __m512i key[BLOCKS];
#pragma GCC unroll 4
                for (int i = 0; i < BLOCKS; i++) key[i] = T::weights(keys[first + i] + d * BLOCK, part);
#pragma GCC unroll 6
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                    for (int i = 0; i < BLOCKS; i++)
                        sum[r][i] = T::multiply(sum[r][i], query_[r] + d + part, key[i]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int i = 0; i < BLOCKS; i++) scores[r][first + i] = sum[r][i];
    }

    // Scores, less `top`, to weights.
    void weigh(int r, int begin, __m512 (&scores)[TILE_BLOCKS]) {
        if (bias_[r] != nullptr)
            for (int i = 0; i < TILE_BLOCKS; i++)
                scores[i] = _mm512_add_ps(scores[i], _mm512_loadu_ps(bias_[r] + begin + i * BLOCK));
        const int seen = keys_[r] - begin, hidden = first_[r] - begin;
        if (seen < TILE || hidden > 0) {
            const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
            for (int i = 0; i < TILE_BLOCKS; i++) {
                const __mmask16 there = tail_mask(seen - i * BLOCK) & ~tail_mask(hidden - i * BLOCK);
                scores[i] = _mm512_mask_blend_ps(there, nothing, scores[i]);
            }
        }
        const __m512 most = _mm512_max_ps(_mm512_max_ps(scores[0], scores[1]), _mm512_max_ps(scores[2], scores[3]));
        if (!seen_[r] || _mm512_cmp_ps_mask(most, _mm512_set1_ps(MARGIN), _CMP_GT_OQ) != 0) {
            // A row whose keys begin in a later tile has nothing to raise yet.
            if (hidden < TILE) raise(r, _mm512_reduce_max_ps(most), scores);
        }
        total_[r] = put_weights(weights_[r], scores, total_[r]);
    }

    // Raises a row's `top`; what was summed before is brought to it.
    void raise(int r, float by, __m512 (&scores)[TILE_BLOCKS]) {
        for (__m512& score : scores) score = _mm512_sub_ps(score, _mm512_set1_ps(by));
        top_[r] += by;
        if (!seen_[r]) {
            seen_[r] = true;
            return;
        }
        const __m512 less = power_of_two(_mm512_set1_ps(-by));
        total_[r] = _mm512_mul_ps(total_[r], less);
        for (int i = 0; i < cache_.head_dim; i += LANES)
            _mm512_store_ps(sum_[r] + i, _mm512_mul_ps(_mm512_load_ps(sum_[r] + i), less));
    }

    template <int VECTORS>
    void add_values(int d, int blocks, const Value* const* values) {
        __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_load_ps(sum_[r] + d + v * LANES);
        for (int i = 0; i < blocks; i++) {
            for (int key = 0; key < BLOCK; key += T::STEP) {
                const std::ptrdiff_t at = key * cache_.head_dim + d * T::STEP;
                if constexpr (FEW)
                    for (int v = 0; v < VECTORS; v++)
                        _mm_prefetch(next_values_[i] + at + v * LANES * T::STEP, _MM_HINT_T0);
#pragma GCC unroll 2
                for (int part = 0; part < T::PARTS; part++) {
                    __m512i value[VECTORS];
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++)
                        value[v] = T::weights(values[i] + at + v * LANES * T::STEP, part);
#pragma GCC unroll 6
                    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                        for (int v = 0; v < VECTORS; v++)
                            sum[r][v] = T::multiply(sum[r][v], weights_[r] + i * BLOCK + key + part, value[v]);
                }
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) _mm512_store_ps(sum_[r] + d + v * LANES, sum[r][v]);
    }

    const CacheShape& cache_;
    const int layer_, kv_head_;
    const std::int64_t* const table_;
    int keys_[ROWS], first_[ROWS], most_ = 0, begin_ = 0;
    bool seen_[ROWS];  // whether a row has met a key
    const float* bias_[ROWS];
    float top_[ROWS];
    const Value *next_keys_[TILE_BLOCKS], *next_values_[TILE_BLOCKS];  // of the next tile, when FEW
    __m512 total_[ROWS];
    alignas(64) float sum_[ROWS][MAX_HEAD_DIM];
    alignas(64) Input query_[ROWS][MAX_HEAD_DIM];
    alignas(64) Input weights_[ROWS][TILE];
};

struct Attention {
    const CacheShape& cache;
    const Step& step;
    int layer;
    const float* heads;  // [rows, stride]: query heads first
    std::ptrdiff_t stride;
    void* out;           // [rows, out_stride]
    std::ptrdiff_t out_stride;
    bool to_bf16;
    // [heads, reach + TILE], in powers of two: entry reach - 1 - d is what a key gets at distance d; or null.
    const float* distances;
    int reach;
};

template <typename T, int ROWS>
void attend_rows(const Attention& a, int sequence, int kv_head, int first) {
    const CacheShape& c = a.cache;
    const int group = c.heads / c.kv_heads;
    const int start = a.step.query_starts[sequence];
    const int past = a.step.lengths[sequence] - (a.step.query_starts[sequence + 1] - start);
    Walk<T, ROWS> walk(c, a.layer, kv_head, a.step.block_tables + sequence * a.step.table_stride);
    auto place = [&](int r) {  // of row r: which position of the chunk, which column of the heads
        const int flat = first + r;
        return std::pair(flat / group, (kv_head * group + flat % group) * c.head_dim);
    };
    for (int r = 0; r < ROWS; r++) {
        const auto [position, column] = place(r);
        const int keys = past + position + 1;
        const float* bias = nullptr;
        if (a.distances != nullptr) bias = a.distances + column / c.head_dim * (a.reach + TILE) + a.reach - keys;
        walk.set(r, a.heads + (start + position) * a.stride + column, keys, 0, bias);
    }
    walk.run();
    for (int r = 0; r < ROWS; r++) {
        const auto [position, column] = place(r);
        const std::ptrdiff_t at = (start + position) * a.out_stride + column;
        if (a.to_bf16) {
            walk.get(r, static_cast<bf16*>(a.out) + at);
        } else {
            walk.get(r, static_cast<float*>(a.out) + at);
        }
    }
}

template <typename T, int ROWS = QUERY_ROWS>
void attend_some(const Attention& a, int rows, int sequence, int kv_head, int first) {
    if constexpr (ROWS >= 1) {
        if (rows == ROWS) {
            attend_rows<T, ROWS>(a, sequence, kv_head, first);
        } else {
            attend_some<T, ROWS - 1>(a, rows, sequence, kv_head, first);
        }
    }
}

// Rows [begin, end) of a sequence's chunk, of one key head; `flat` rows are (position, head of the group).
template <typename T>
void attend(const Attention& a, int sequence, int kv_head, int begin, int end) {
    while (begin < end) {
        const int rows = std::min(QUERY_ROWS, end - begin);
        attend_some<T>(a, rows, sequence, kv_head, begin);
        begin += rows;
    }
}

}  // namespace salver
