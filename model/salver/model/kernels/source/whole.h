// Attention of every token of an input to every other, for encoders: the walk of attention.h over the keys
// and values of one input and head, laid out as blocks of a cache that lives as long as they are read.
//
// Rows stand in sixes by their place in their own input, which is never cut: an input has the same bits
// whatever stands beside it.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "attention.h"

namespace salver {

struct Whole {
    const CacheShape& shape;   // heads, head_dim and scale
    const Step& step;
    int window;                // a token sees so many to either side; 0: all
    const float* bias;         // [heads, 2 * reach + TILE] of the distances from -reach on, times log2(e), or null
    int reach;                 // no input is longer
    const float* heads;        // [rows, stride]: queries, keys, values
    std::ptrdiff_t stride;
    void* out;                 // [rows, out_stride]
    std::ptrdiff_t out_stride;
    bool to_bf16;
};

// A thread's room for the blocks of one input and head, which grows as they do.
class Blocks {
public:
    // Lays keys and values out, zeros behind them.
    CacheShape put(const Whole& w, int start, int length, int head) {
        const int dim = w.shape.head_dim, blocks = (length + BLOCK - 1) / BLOCK;
        reserve(blocks, dim);
        const CacheShape shape{floats_.get(), blocks, 1, 1, dim, w.shape.scale};
        const __m512i lanes = _mm512_mullo_epi32(_mm512_set1_epi32(static_cast<int>(w.stride)),
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        for (int block = 0; block < blocks; block++) {
            const int first = block * BLOCK, count = std::min(BLOCK, length - first);
            const float* key = w.heads + (start + first) * w.stride + (w.shape.heads + head) * dim;
            const float* value = key + w.shape.heads * dim;
            float* keys = shape.part<float>(0, block, 0, 0);
            float* values = shape.part<float>(0, block, 1, 0);
            for (int d = 0; d < dim; d++)
                _mm512_storeu_ps(keys + d * BLOCK,
                    _mm512_mask_i32gather_ps(_mm512_setzero_ps(), tail_mask(count), lanes, key + d, sizeof(float)));
            for (int i = 0; i < BLOCK; i++)
                for (int d = 0; d < dim; d += LANES)
                    _mm512_storeu_ps(values + i * dim + d,
                                     i < count ? _mm512_loadu_ps(value + i * w.stride + d) : _mm512_setzero_ps());
        }
        return shape;
    }

    // Block i of the layout is block i.
    const std::int64_t* table() const { return table_.get(); }

private:
    void reserve(int blocks, int dim) {
        if (blocks * dim <= room_ && blocks <= blocks_) return;
        // A load that crosses a line of the cache takes twice as long.
        floats_.reset(static_cast<float*>(std::aligned_alloc(64, sizeof(float) * 2 * blocks * BLOCK * dim)));
        if (floats_ == nullptr) throw std::bad_alloc();
        table_.reset(new std::int64_t[blocks]);
        for (int i = 0; i < blocks; i++) table_[i] = i;
        room_ = blocks * dim;
        blocks_ = blocks;
    }

    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };

    std::unique_ptr<float[], Free> floats_;
    std::unique_ptr<std::int64_t[]> table_;
    int room_ = 0, blocks_ = 0;
};

template <int ROWS>
void attend_whole_rows(const Whole& w, const CacheShape& laid_out, const std::int64_t* table, int start, int length,
                       int head, int first) {
    Walk<Float, ROWS> walk(laid_out, 0, 0, table);
    const int column = head * laid_out.head_dim;
    for (int r = 0; r < ROWS; r++) {
        const int place = first + r;
        const float* bias = w.bias == nullptr ? nullptr : w.bias + head * (2 * w.reach + TILE) + w.reach - place;
        walk.set(r, w.heads + (start + place) * w.stride + column,
                 w.window > 0 ? std::min(length, place + w.window + 1) : length,
                 w.window > 0 ? std::max(0, place - w.window) : 0, bias);
    }
    walk.run();
    for (int r = 0; r < ROWS; r++) {
        const std::ptrdiff_t at = (start + first + r) * w.out_stride + column;
        if (w.to_bf16) {
            walk.get(r, static_cast<bf16*>(w.out) + at);
        } else {
            walk.get(r, static_cast<float*>(w.out) + at);
        }
    }
}

template <int ROWS = QUERY_ROWS>
void attend_whole_some(const Whole& w, int rows, const CacheShape& laid_out, const std::int64_t* table, int start,
                       int length, int head, int first) {
    if constexpr (ROWS >= 1) {
        if (rows == ROWS) {
            attend_whole_rows<ROWS>(w, laid_out, table, start, length, head, first);
        } else {
            attend_whole_some<ROWS - 1>(w, rows, laid_out, table, start, length, head, first);
        }
    }
}

// One head of one input.
inline void attend_whole(const Whole& w, Blocks& blocks, int input, int head) {
    const int start = w.step.query_starts[input], length = w.step.query_starts[input + 1] - start;
    const CacheShape laid_out = blocks.put(w, start, length, head);
    for (int first = 0; first < length; first += QUERY_ROWS)
        attend_whole_some(w, std::min(QUERY_ROWS, length - first), laid_out, blocks.table(), start, length, head, first);
}

}  // namespace salver
