// A step of a decoder or an encoder: a list of operations, run by all threads together with a barrier between two.
//
// Plain C interface, called through ctypes. The threads are OpenMP's, those that torch uses: the
// caller passes the address of GOMP_parallel, so that one pool of threads exists in the process.

#include <algorithm>
#include <atomic>
#include <linux/futex.h>
#include <memory>
#include <sys/syscall.h>
#include <unistd.h>
#include <utility>

#include "attention.h"
#include "gemm.h"
#include "int4.h"
#include "simd.h"
#include "whole.h"

using namespace salver;

namespace {

enum Precision : std::int32_t { FLOAT = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
enum Kind : std::int32_t {
    EMBED = 0, RMS_NORM = 1, LAYER_NORM = 2, MULTIPLY = 3, ROTATE_AND_STORE = 4, ATTEND = 5, QUANTIZE = 6, PROGRESS = 7,
    ADD_SEGMENTS = 8, ROTATE = 9, ATTEND_WHOLE = 10, ATTEND_SOURCE = 11, SHRINK = 12
};

// A matrix of activations with one row for each row of the step.
struct Buffer {
    void* data;
    std::int64_t stride;       // elements
    std::int32_t precision;
    std::int32_t width;        // elements in use
    float* group_scale;        // int8 alone: [groups, scale_stride], a column for each row
    float* row_offset;         // int8 alone: -128 times the sum
    std::int64_t scale_stride;
    std::int32_t group;        // int8 alone: values that share a scale, a multiple of 16
    float* group_sum;          // for int4 weights, or null: as group_scale, the sum of each group
};

struct Weight {
    const void* data;          // packed in panels, or rows for a table
    const float* bias;         // panel order, or null
    const float* column_scale; // int8 alone, panel order
    std::int32_t precision;
    std::int32_t rows, depth;  // [rows, depth] as in the checkpoint
    std::int32_t panels;       // 0: a table
};

struct Operation {
    std::int32_t kind;
    std::int32_t layer;
    std::int32_t in, out;      // buffers
    std::int32_t weight;       // of the list of weights, or -1
    std::int32_t extra;        // EMBED: the weight of learned positions, or -1; attention: the bias's reach
    std::int32_t window;       // ROTATE, ATTEND_WHOLE: how far a token sees to either side; 0: everywhere
    std::int32_t epilogue, activation;
    const float* scale;        // norms; attention: the bias, or null
    const float* shift;        // LAYER_NORM
    float epsilon;             // norms; EMBED: what the embeddings are multiplied by, 0 for nothing
    std::int32_t adapted;      // which of the places that adapters change, or -1
};

struct Program {
    const Operation* operations;
    std::int32_t num_operations;
    std::int32_t cache_precision;
    std::int32_t pairs;        // attention multiplies bf16 with bf16, else with floats
    const Buffer* buffers;
    const Weight* weights;
    CacheShape cache;
    const Adapted* adapted;    // [places, num_adapters]
    std::int32_t num_adapters;
    float* shrunk;             // [rows, shrunk_stride]
    std::int64_t shrunk_stride;
};

// Threads meet here. They spin for a moment, since operations are short; then they sleep, which frees the
// processor for the thread that is late because another process has taken its own.
class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        if (threads_ == 1) return;
        const std::uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_seq_cst);
            if (sleeping_.load(std::memory_order_seq_cst) > 0) futex(FUTEX_WAKE_PRIVATE, threads_);
            return;
        }
        for (int spins = 0; spins < SPINS; spins++) {
            if (round_.load(std::memory_order_acquire) != round) return;
            _mm_pause();
        }
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        while (round_.load(std::memory_order_seq_cst) == round) futex(FUTEX_WAIT_PRIVATE, round);
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
    }

private:
    static constexpr int SPINS = 1500;  // about 30 microseconds

    void futex(int operation, std::uint32_t value) {
        syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&round_), operation, value, nullptr, nullptr, 0);
    }

    const int threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<std::uint32_t> round_{0};
    std::atomic<int> sleeping_{0};
};

// Deals out the pieces of an operation, so that a thread that lost its processor for a while does less.
class Dealer {
public:
    void clear() { next_.store(0, std::memory_order_relaxed); }
    int take() { return next_.fetch_add(1, std::memory_order_relaxed); }

private:
    alignas(64) std::atomic<int> next_{0};
};

std::pair<int, int> part(int count, int thread, int threads) {
    return {static_cast<int>(static_cast<std::int64_t>(count) * thread / threads),
            static_cast<int>(static_cast<std::int64_t>(count) * (thread + 1) / threads)};
}

// Deals out runs of pieces: to every thread of its own part first, which lies in its cache since the operations
// before, then of the parts of those that are late.
class Parts {
public:
    explicit Parts(int threads) : threads_(threads), dealt_(new Count[threads]) {}

    void clear() {
        for (int i = 0; i < threads_; i++) dealt_[i].of.store(0, std::memory_order_relaxed);
    }

    // The next [begin, end) of `count` pieces, at most `most` and half of what a part has left, but not fewer than
    // `least`; empty: all are dealt.
    std::pair<int, int> take(int count, int thread, int least, int most) {
        for (int i = 0; i < threads_; i++) {
            const int owner = (thread + i) % threads_;
            const auto [begin, end] = part(count, owner, threads_);
            std::atomic<int>& dealt = dealt_[owner].of;
            for (int first = begin + dealt.load(std::memory_order_relaxed); first < end;) {
                const int last = std::min(end, first + std::max(least, std::min(most, (end - first) / 2)));
                int expected = first - begin;
                if (dealt.compare_exchange_weak(expected, last - begin, std::memory_order_relaxed)) return {first, last};
                first = begin + expected;
            }
        }
        return {count, count};
    }

private:
    struct alignas(64) Count {
        std::atomic<int> of{0};
    };

    const int threads_;
    std::unique_ptr<Count[]> dealt_;
};

// How the pieces of an operation are dealt out: one by one, or in runs that stay with a thread.
struct Deal {
    explicit Deal(int threads) : parts(threads) {}
    void clear() {
        pieces.clear();
        parts.clear();
    }
    Dealer pieces;
    Parts parts;
};

float* floats(const Buffer& buffer, int row) { return static_cast<float*>(buffer.data) + row * buffer.stride; }

constexpr int NOT_FINITE = 0x01 | 0x08 | 0x10 | 0x80;  // of VFPCLASS: quiet NaN, either infinity, signalling NaN

// Symmetric int8 with one scale for each group of a row (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
// Quantization", does so with their states): an outlier spoils its own group alone, and rows don't know one another.
void put_groups(const Buffer& to, int row, const float* values) {
    std::int8_t* out = static_cast<std::int8_t*>(to.data) + row * to.stride;
    float *scale = to.group_scale + row, *of_group = to.group_sum == nullptr ? nullptr : to.group_sum + row;
    float offset = 0;
    for (int begin = 0; begin < to.width; begin += to.group, scale += to.scale_stride) {
        const int end = std::min(to.width, begin + to.group);
        __m512 most = _mm512_setzero_ps();
        __mmask16 broken = 0;
        for (int i = begin; i < end; i += LANES) {
            const __m512 x = _mm512_maskz_loadu_ps(tail_mask(end - i), values + i);
            most = _mm512_max_ps(most, _mm512_abs_ps(x));
            broken |= _mm512_fpclass_ps_mask(x, NOT_FINITE);
        }
        const float highest = _mm512_reduce_max_ps(most);
        const __m512 inverse = _mm512_set1_ps(highest > 0 ? 127.0f / highest : 0.0f);
        __m512i sum = _mm512_setzero_si512();
        for (int i = begin; i < end; i += LANES) {
            const __mmask16 mask = tail_mask(end - i);
            const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, values + i), inverse));
            sum = _mm512_add_epi32(sum, rounded);
            _mm_mask_storeu_epi8(out + i, mask, _mm512_cvtepi32_epi8(rounded));
        }
        // What is not numbers stays that: the scale carries it.
        *scale = broken ? std::numeric_limits<float>::quiet_NaN() : highest / 127.0f;
        const int total = _mm512_reduce_add_epi32(sum);
        offset = std::fma(static_cast<float>(-128 * total), *scale, offset);
        if (of_group != nullptr) {
            *of_group = static_cast<float>(total) * *scale;
            of_group += to.scale_stride;
        }
    }
    to.row_offset[row] = offset;
}

// A row of floats into a buffer of any precision.
void put_row(const Buffer& to, int row, const float* values) {
    if (to.precision == FLOAT) {
        std::memcpy(floats(to, row), values, to.width * sizeof(float));
        return;
    }
    if (to.precision == BF16) {
        bf16* out = static_cast<bf16*>(to.data) + row * to.stride;
        for (int i = 0; i < to.width; i += LANES) {
            const __mmask16 mask = tail_mask(to.width - i);
            store(out + i, _mm512_maskz_loadu_ps(mask, values + i), mask);
        }
        return;
    }
    put_groups(to, row, values);
}

// Row `index` of a weight, as floats.
void read_row(const Weight& w, std::int64_t index, float* out, bool add) {
    auto put = [&](int k, float value) { out[k] = add ? out[k] + value : value; };
    const std::int64_t depth = w.depth;
    if (w.panels == 0) {
        for (int k = 0; k < w.depth; k += LANES) {
            const __mmask16 mask = tail_mask(w.depth - k);
            __m512 x = w.precision == FLOAT
                ? _mm512_maskz_loadu_ps(mask, static_cast<const float*>(w.data) + index * depth + k)
                : load_bf16(static_cast<const bf16*>(w.data) + index * depth + k, mask);
            if (add) x = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out + k), x);
            store(out + k, x, mask);
        }
        return;
    }
    const std::int64_t panel = index / PANEL * PANEL * depth;
    const int column = static_cast<int>(index % PANEL);
    for (int k = 0; k < w.depth; k++) {
        if (w.precision == FLOAT) {
            put(k, static_cast<const float*>(w.data)[panel + packed_index<Float>(column, k)]);
        } else if (w.precision == BF16) {
            put(k, to_float(static_cast<const bf16*>(w.data)[panel + packed_index<Half>(column, k)]));
        } else {
            const int value = static_cast<const std::uint8_t*>(w.data)[panel + packed_index<Int8>(column, k)] - 128;
            put(k, static_cast<float>(value) * w.column_scale[index]);
        }
    }
}

// The row as floats, in `room` where it is kept otherwise.
const float* floats_of(const Buffer& from, int row, float* room) {
    if (from.precision == FLOAT) return floats(from, row);
    if (from.precision == BF16) {
        const bf16* x = static_cast<const bf16*>(from.data) + row * from.stride;
        for (int i = 0; i < from.width; i += LANES) {
            const __mmask16 mask = tail_mask(from.width - i);
            store(room + i, load_bf16(x + i, mask), mask);
        }
        return room;
    }
    const std::int8_t* x = static_cast<const std::int8_t*>(from.data) + row * from.stride;
    const float* scale = from.group_scale + row;
    for (int begin = 0; begin < from.width; begin += from.group, scale += from.scale_stride) {
        const int end = std::min(from.width, begin + from.group);
        for (int i = begin; i < end; i += LANES) {
            const __mmask16 mask = tail_mask(end - i);
            const __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, x + i)));
            store(room + i, _mm512_mul_ps(value, _mm512_set1_ps(*scale)), mask);
        }
    }
    return room;
}

void norm_row(const Operation& op, const Adapted* own, const float* x, int width, float* out) {
    const float* scale = own != nullptr && own->scale != nullptr ? own->scale : op.scale;
    const float* shift = own != nullptr && own->bias != nullptr ? own->bias : op.shift;
    __m512 sum = _mm512_setzero_ps();
    float mean = 0;
    if (op.kind == LAYER_NORM) {
        for (int i = 0; i < width; i += LANES)
            sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(tail_mask(width - i), x + i));
        mean = _mm512_reduce_add_ps(sum) / static_cast<float>(width);
        sum = _mm512_setzero_ps();
    }
    for (int i = 0; i < width; i += LANES) {
        const __mmask16 mask = tail_mask(width - i);
        const __m512 from = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(mean));
        sum = _mm512_fmadd_ps(from, from, sum);
    }
    const float inverse = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(width) + op.epsilon);
    for (int i = 0; i < width; i += LANES) {
        const __mmask16 mask = tail_mask(width - i);
        __m512 y = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(mean));
        y = _mm512_mul_ps(_mm512_mul_ps(y, _mm512_set1_ps(inverse)), _mm512_maskz_loadu_ps(mask, scale + i));
        if (shift != nullptr) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, shift + i));
        store(out + i, y, mask);
    }
}

template <typename Out>
Gemm product(const Weight& w, const Buffer& in, Out out, int rows) {
    Gemm g{};
    g.input = in.data;
    g.input_stride = in.stride;
    g.group_scale = in.group_scale;
    g.group_sum = in.group_sum;
    g.row_offset = in.row_offset;
    g.scale_stride = in.scale_stride;
    g.group = in.group;
    g.weight = w.data;
    g.column_scale = w.column_scale;
    g.rows = rows;
    g.panels = w.panels;
    g.depth = w.depth;
    g.epilogue = out;
    return g;
}


using Multiply = void (*)(const Gemm&, int, int, int, int);

Multiply multiply_of(const Weight& w, const Buffer& in) {
    if (w.precision == FLOAT) return multiply<Float>;
    if (w.precision == INT8) return multiply<Int8>;
    if (w.precision == INT4) return multiply<Int4>;
    return in.precision == FLOAT ? multiply<Widened> : multiply<Half>;
}

constexpr int NEAR = 1 << 19;  // bytes of the input that stay in a core's own cache while panels pass
constexpr int SIZES[] = {sizeof(float), sizeof(bf16), sizeof(std::int8_t)};  // by precision

// Into how many blocks tiles of a product's input are cut, that each stays near.
int blocks_of(const Gemm& g, const Buffer& in, int tiles) {
    const int tile_bytes = MAX_ROWS * g.depth * SIZES[in.precision];
    return (tiles * std::min(tile_bytes, NEAR / 4) + NEAR - 1) / NEAR;
}

void run_product(const Gemm& g, const Buffer& in, Multiply multiply, int threads, Dealer& dealer) {
    // All threads are at the same rows, as many as stay near: they pass the panels one after the other.
    const int tiles = tiles_of(g.rows), blocks = blocks_of(g, in, tiles);
    // With few rows the weight streams from memory, which likes long runs.
    const int pieces = threads * (g.rows < 8 ? 2 : 8);
    const int run = threads == 1 ? g.panels : std::max(1, g.panels / pieces);
    const int runs = (g.panels + run - 1) / run;
    for (int mine = dealer.take(); mine < blocks * runs; mine = dealer.take()) {
        const int block = mine / runs, begin = mine % runs * run;
        multiply(g, begin, std::min(g.panels, begin + run), tiles * block / blocks, tiles * (block + 1) / blocks);
    }
}

constexpr int MAX_WIDTH = 32768;
constexpr int OWN_TILES = 8;      // with so many for every thread each takes rows of its own through several operations
constexpr int LEAST_TILES = 4;    // at a time: a weight is read for fewer as fast as it comes, but no faster
constexpr int OUTPUT = 2 * NEAR;  // bytes of the widest buffer that rows taken at a time may have

struct Team {
    const Program& program;
    const Step& step;
    void (*on_progress)();
    int threads;
    Barrier barrier;
    Deal deals[3];  // of operation i the one i % 3; the next one is cleared meanwhile
    std::atomic<int> next_thread{0};
};

// The adapters of an operation in this step.
ProductAdapters adapters_of(const Program& p, const Step& step, const Operation& op) {
    if (op.adapted < 0 || step.adapters == nullptr) return {};
    return {p.adapted + static_cast<std::ptrdiff_t>(op.adapted) * p.num_adapters, step.adapters, p.shrunk, p.shrunk_stride};
}

void shrink_rows(const Buffer& in, const ProductAdapters& adapters, float* out, int begin, int end) {
    alignas(64) float room[MAX_WIDTH];
    for (int row = begin; row < end; row++) {
        const Adapted* own = adapters.own(row);
        if (own != nullptr && own->rank > 0)
            shrink_row(floats_of(in, row, room), *own, in.width, out + row * adapters.stride);
    }
}

constexpr int CHUNK = 24;  // query rows of a piece of attention
template <typename T>
void attend_all(const Program& p, const Step& step, const Operation& op, Dealer& dealer) {
    const Buffer &in = p.buffers[op.in], &out = p.buffers[op.out];
    const Attention a{p.cache, step, op.layer, static_cast<const float*>(in.data), in.stride,
                      out.data, out.stride, out.precision == BF16, op.scale, op.extra};
    const int group = p.cache.heads / p.cache.kv_heads;
    int mine = dealer.take(), piece = 0;
    // From the last to the first: the later pieces of a chunk have the most keys.
    for (int sequence = step.num_sequences - 1; sequence >= 0; sequence--) {
        const int rows = (step.query_starts[sequence + 1] - step.query_starts[sequence]) * group;
        const int pieces = (rows + CHUNK - 1) / CHUNK;
        const int end = piece + pieces * p.cache.kv_heads;
        for (; mine < end; mine = dealer.take()) {
            const int chunk = pieces - 1 - (mine - piece) / p.cache.kv_heads;
            attend<T>(a, sequence, (mine - piece) % p.cache.kv_heads, chunk * CHUNK, std::min(rows, (chunk + 1) * CHUNK));
        }
        piece = end;
    }
}

void attend_whole_all(const Program& p, const Step& step, const Operation& op, int thread, Parts& parts) {
    const Buffer &in = p.buffers[op.in], &out = p.buffers[op.out];
    const Whole whole{p.cache, step, op.window, op.scale, op.extra, static_cast<const float*>(in.data), in.stride,
                      out.data, out.stride, out.precision == BF16};
    thread_local Blocks blocks;
    const int pieces = step.num_sequences * p.cache.heads;
    for (;;) {
        const auto [first, last] = parts.take(pieces, thread, 1, p.cache.heads);
        if (first == last) return;
        for (int mine = first; mine < last; mine++) attend_whole(whole, blocks, mine / p.cache.heads, mine % p.cache.heads);
    }
}

// Operations that know rows alone: nothing of one row depends on another.
bool by_rows(const Operation& op) {
    return op.kind != ATTEND && op.kind != ATTEND_SOURCE && op.kind != ATTEND_WHOLE && op.kind != PROGRESS;
}

Gemm product_of(const Program& p, const Step& step, const Operation& op) {
    const Buffer &in = p.buffers[op.in], &out = p.buffers[op.out];
    const Weight& w = p.weights[op.weight];
    Epilogue e{op.epilogue, op.activation, out.precision == BF16, out.data, out.stride, 0, w.bias, adapters_of(p, step, op)};
    e.columns = op.epilogue == Epilogue::GATED ? w.rows / 2 : w.rows;
    return product(w, in, e, step.num_rows);
}

// Rows [begin, end) of an operation by rows other than a product.
void run_rows(const Program& p, const Step& step, const Operation& op, int begin, int end) {
    const Buffer &in = p.buffers[op.in], &out = p.buffers[op.out];
    const ProductAdapters adapters = adapters_of(p, step, op);
    switch (op.kind) {
        case EMBED:
            for (int row = begin; row < end; row++) {
                read_row(p.weights[op.weight], step.token_ids[row], floats(out, row), false);
                if (const Adapted* own = adapters.own(row); own != nullptr)
                    adapt_embedding(*own, step.token_ids[row], out.width, floats(out, row));
                if (op.epsilon != 0)
                    for (int i = 0; i < out.width; i++) floats(out, row)[i] *= op.epsilon;
                if (op.extra >= 0) read_row(p.weights[op.extra], step.positions[row], floats(out, row), true);
            }
            break;
        case RMS_NORM:
        case LAYER_NORM: {
            alignas(64) float normed[MAX_WIDTH];
            for (int row = begin; row < end; row++) {
                norm_row(op, adapters.own(row), floats(in, row), in.width, normed);
                put_row(out, row, normed);
            }
            break;
        }
        case QUANTIZE:
            for (int row = begin; row < end; row++) put_row(out, row, floats(in, row));
            break;
        case ROTATE_AND_STORE:
            for (int row = begin; row < end; row++) {
                if (p.cache_precision == FLOAT) {
                    rotate_and_store<Float>(p.cache, step, op.layer, row, floats(in, row));
                } else {
                    rotate_and_store<Half>(p.cache, step, op.layer, row, floats(in, row));
                }
            }
            break;
        case ADD_SEGMENTS:
            for (int row = begin; row < end; row++) read_row(p.weights[op.weight], step.segments[row], floats(out, row), true);
            break;
        case ROTATE: {
            const float *cos = op.window > 0 ? step.local_cos : step.cos, *sin = op.window > 0 ? step.local_sin : step.sin;
            for (int row = begin; row < end; row++) {
                const std::ptrdiff_t angles = static_cast<std::ptrdiff_t>(row) * (p.cache.head_dim / 2);
                rotate(p.cache, cos + angles, sin + angles, floats(in, row));
            }
            break;
        }
        case SHRINK:
            shrink_rows(in, adapters, p.shrunk, begin, end);
            break;
    }
}

void run_operation(Team& team, const Operation& op, int thread, Deal& deal) {
    const Program& p = team.program;
    const Step& step = team.step;
    switch (op.kind) {
        case MULTIPLY: {
            const Buffer& in = p.buffers[op.in];
            run_product(product_of(p, step, op), in, multiply_of(p.weights[op.weight], in), team.threads, deal.pieces);
            break;
        }
        case ATTEND_WHOLE:
            attend_whole_all(p, step, op, thread, deal.parts);
            break;
        case ATTEND:
        case ATTEND_SOURCE: {
            const Step& over = op.kind == ATTEND ? step : *step.source;
            if (p.cache_precision == FLOAT) {
                attend_all<Float>(p, over, op, deal.pieces);
            } else if (p.pairs) {
                attend_all<Half>(p, over, op, deal.pieces);
            } else {
                attend_all<Widened>(p, over, op, deal.pieces);
            }
            break;
        }
        case PROGRESS:
            if (thread == 0 && team.on_progress != nullptr) team.on_progress();
            break;
        default: {
            const auto [begin, end] = part(step.num_rows, thread, team.threads);
            run_rows(p, step, op, begin, end);
        }
    }
}

bool left_out(const Step& step, const Operation& op) { return op.kind == SHRINK && step.adapters == nullptr; }

// Operations [begin, end), all by rows: a thread takes some rows through all of them, while they are in its own
// cache, and meets the others only after the last.
void run_together(Team& team, int begin, int end, int thread, Parts& parts) {
    const Program& p = team.program;
    const Step& step = team.step;
    const int tiles = tiles_of(step.num_rows);
    std::int64_t widest = 1;
    for (int i = begin; i < end; i++) {
        const Buffer& out = p.buffers[p.operations[i].out];
        widest = std::max(widest, out.stride * SIZES[out.precision]);
    }
    const int most = static_cast<int>(OUTPUT / (widest * MAX_ROWS));
    for (;;) {
        const auto [first, last] = parts.take(tiles, thread, LEAST_TILES, most);
        if (first == last) return;
        for (int i = begin; i < end; i++) {
            const Operation& op = p.operations[i];
            if (left_out(step, op)) continue;
            if (op.kind != MULTIPLY) {
                run_rows(p, step, op, row_of_tile(step.num_rows, first), row_of_tile(step.num_rows, last));
                continue;
            }
            const Buffer& in = p.buffers[op.in];
            const Gemm g = product_of(p, step, op);
            const Multiply multiply = multiply_of(p.weights[op.weight], in);
            const int blocks = blocks_of(g, in, last - first);
            for (int block = 0; block < blocks; block++)
                multiply(g, 0, g.panels, first + (last - first) * block / blocks, first + (last - first) * (block + 1) / blocks);
        }
    }
}

void work(void* argument) {
    Team& team = *static_cast<Team*>(argument);
    const int thread = team.next_thread.fetch_add(1), count = team.program.num_operations;
    const Operation* operations = team.program.operations;
    const bool together = tiles_of(team.step.num_rows) >= OWN_TILES * team.threads;
    int i = 0;
    for (int number = 0, next; number < count; number = next) {
        next = number + 1;
        if (left_out(team.step, operations[number])) continue;
        if (together && by_rows(operations[number]))
            while (next < count && by_rows(operations[next])) next++;
        // Nobody is at deal i + 1 before all have met after i, nor still at i - 2.
        if (thread == 0) team.deals[(i + 1) % 3].clear();
        if (next > number + 1) {
            run_together(team, number, next, thread, team.deals[i % 3].parts);
        } else {
            run_operation(team, operations[number], thread, team.deals[i % 3]);
        }
        team.barrier.wait();
        i++;
    }
}

struct HeadWork {
    Gemm gemm;
    const Buffer& in;
    Multiply multiply;
    float* shrunk;
    int threads;
    Barrier barrier;
    std::atomic<int> next_thread{0};
    Dealer dealer;
};

void work_head(void* argument) {
    HeadWork& head = *static_cast<HeadWork*>(argument);
    const ProductAdapters& adapters = head.gemm.epilogue.adapters;
    if (adapters.numbers != nullptr) {
        const auto [begin, end] = part(head.gemm.rows, head.next_thread.fetch_add(1), head.threads);
        shrink_rows(head.in, adapters, head.shrunk, begin, end);
        head.barrier.wait();
    }
    run_product(head.gemm, head.in, head.multiply, head.threads, head.dealer);
}

struct PackWork {
    const void* from;
    std::int32_t from_bf16, precision, rows, depth, gated, threads;
    void* to;
    float* column_scale;
    std::atomic<int> next_thread{0};
};

template <typename T, typename Convert>
void pack_row(const PackWork& p, int panel, int column, Convert convert) {
    using Value = typename T::Weight;
    Value* to = static_cast<Value*>(p.to) + static_cast<std::ptrdiff_t>(panel) * PANEL * p.depth;
    for (int k = 0; k < p.depth; k++) to[packed_index<T>(column, k)] = convert(k);
}

template <typename Value>
void pack_blocks(const PackWork& p, int panel, int column, Value value) {
    const int blocks = p.depth / Int4::BLOCK;
    std::uint8_t* to = static_cast<std::uint8_t*>(p.to) + static_cast<std::ptrdiff_t>(panel) * Int4::BYTES * blocks;
    for (int block = 0; block < blocks; block++, to += Int4::BYTES) {
        float w[Int4::BLOCK];
        for (int i = 0; i < Int4::BLOCK; i++) w[i] = value(block * Int4::BLOCK + i);
        const Block packed = quantized(w);
        for (int i = 0; i < Int4::BLOCK; i += Int4::STEP)
            for (int byte = 0; byte < Int4::HELD; byte++)
                to[(i / Int4::STEP * PANEL + column) * Int4::HELD + byte] =
                    static_cast<std::uint8_t>(packed.values[i + byte] | packed.values[i + Int4::HELD + byte] << 4);
        const std::uint16_t halves[] = {_cvtss_sh(packed.scale, 0), _cvtss_sh(packed.least, 0)};
        for (int which = 0; which < 2; which++)
            std::memcpy(to + Int4::VALUES + 2 * (which * PANEL + column), halves + which, sizeof halves[0]);
    }
}

void pack_column(const PackWork& p, int panel, int column) {
    const int row = weight_row(panel, column, p.rows, p.gated != 0);
    const std::ptrdiff_t start = static_cast<std::ptrdiff_t>(row) * p.depth;
    auto value = [&](int k) {
        if (row < 0) return 0.0f;
        return p.from_bf16 ? to_float(static_cast<const bf16*>(p.from)[start + k])
                           : static_cast<const float*>(p.from)[start + k];
    };
    if (p.precision == FLOAT) {
        pack_row<Float>(p, panel, column, value);
    } else if (p.precision == BF16) {
        if (p.from_bf16 && row >= 0) {
            pack_row<Half>(p, panel, column, [&](int k) { return static_cast<const bf16*>(p.from)[start + k]; });
        } else {
            pack_row<Half>(p, panel, column, [&](int k) { return to_bf16(value(k)); });
        }
    } else if (p.precision == INT4) {
        pack_blocks(p, panel, column, value);
    } else {
        float highest = 0;
        for (int k = 0; k < p.depth; k++) highest = std::max(highest, std::fabs(value(k)));
        const float inverse = highest > 0 ? 127.0f / highest : 0.0f;
        p.column_scale[panel * PANEL + column] = highest / 127.0f;
        pack_row<Int8>(p, panel, column, [&](int k) {
            return static_cast<std::uint8_t>(static_cast<int>(std::nearbyint(value(k) * inverse)) + 128);
        });
    }
}

void work_pack(void* argument) {
    PackWork& p = *static_cast<PackWork*>(argument);
    const int panels = ((p.gated ? p.rows / 2 : p.rows) + (p.gated ? LANES : PANEL) - 1) / (p.gated ? LANES : PANEL);
    const auto [begin, end] = part(panels, p.next_thread.fetch_add(1), p.threads);
    for (int panel = begin; panel < end; panel++)
        for (int column = 0; column < PANEL; column++) pack_column(p, panel, column);
}

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel parallel_region = nullptr;

void in_parallel(void (*function)(void*), void* argument, int threads) {
    if (threads == 1) {
        function(argument);
    } else {
        parallel_region(function, argument, static_cast<unsigned>(threads), 0);
    }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Bumped with any change of the structures or of a result's bits.
std::int32_t salver_version() { return 7; }

void salver_use_threads_of(void* gomp_parallel) { parallel_region = reinterpret_cast<Parallel>(gomp_parallel); }

void salver_run(const Program* program, const Step* step, std::int32_t threads, void (*on_progress)()) {
    Team team{*program, *step, on_progress, threads, Barrier(threads), {Deal(threads), Deal(threads), Deal(threads)}};
    in_parallel(work, &team, threads);
}

// float [rows, weight->rows] of rows of a buffer: the head. `adapted` by the numbers that `adapters` gives the rows,
// null where none has one; `shrunk` [rows, stride] is room for them.
void salver_multiply(const Buffer* in, const Weight* weight, float* out, std::int32_t rows, std::int32_t threads,
                     const Adapted* adapted, const std::int32_t* adapters, float* shrunk, std::int64_t stride) {
    const Epilogue e{Epilogue::STORE, NONE, false, out, weight->rows, weight->rows, weight->bias, {adapted, adapters, shrunk, stride}};
    HeadWork head{product(*weight, *in, e, rows), *in, multiply_of(*weight, *in), shrunk, threads, Barrier(threads)};
    in_parallel(work_head, &head, threads);
}

// Copies rows of floats into a buffer of the precision that products want.
void salver_put_rows(const Buffer* to, const float* from, const std::int64_t* rows, std::int32_t count, std::int64_t stride) {
    for (int i = 0; i < count; i++) put_row(*to, i, from + rows[i] * stride);
}

void salver_pack(const void* from, std::int32_t from_bf16, std::int32_t precision, std::int32_t rows, std::int32_t depth,
                 std::int32_t gated, void* to, float* column_scale, std::int32_t threads) {
    PackWork pack{from, from_bf16, precision, rows, depth, gated, threads, to, column_scale};
    in_parallel(work_pack, &pack, threads);
}
}
#pragma GCC visibility pop
