// One step of a per-parameter rule for any number of copies of any number of tensors; `metaopt.perparameter.cpp` puts the
// constants of one rule before this text, and one structure for each kind of network and its dispatch after it.
//
// A tensor is walked in blocks of L elements, whose features are planes x[feature][lane] in the L1 cache, three times: to
// move the accumulators, to measure the factored features, and to run the network. What a feature is divided by is folded
// into the first layer's weights. Features of a row or a column alone become, with their weights, a hidden vector for that
// row or column, from which the first layer starts.
//
// The two factored axes of a tensor, one before the other, make it [outer, n1, middle, n2, inner]. A *line* is the
// contiguous run of n2 * inner elements; line vectors have an entry for each (outer, n1, middle, inner) and column vectors
// for each (outer, middle, n2, inner).
//
// Sums are cut into chunks that depend on a tensor's shape alone, so no result depends on the number of threads.

#include <algorithm>
#include <functional>
#include <new>
#include <vector>

namespace {  // the libraries of two rules have other types of the same names

typedef T V __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef T Unaligned __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(sizeof(T))));

constexpr int64_t W = VECTOR_BYTES / sizeof(T);
constexpr int64_t L = 256 / sizeof(T);
constexpr int TILE = 4;                     // outputs of a layer that are summed in registers at once
constexpr int TILE_VECTORS = VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t CHUNK = 1 << 14;          // elements of which one thread takes care, at least
constexpr int64_t MOST_CHUNKS = 64;         // each has its own sums of columns
constexpr int64_t BLOCKS_PER_FLUSH = 64;    // single-precision sums get no longer than that

#define LANES INDEPENDENT for (int64_t l = 0; l < L; ++l)

typedef T Lanes[L];
typedef T Overrun[L + W];  // segments are written in whole vectors, in ascending order

struct Tensor {  // a row of the table that Python fills; every stride counts the numbers from one copy to the next
    int64_t network, size, n1, middle, n2, inner, row_is_line;
    const T *param, *grad, *momentum, *rms, *row, *col;  // vectors keep the whole second moment in row
    T *new_param, *new_momentum, *new_rms, *new_row, *new_col;
    const T *scale, *keep, *momentum_decay, *rms_decay, *factored_decay;
    int64_t scale_stride, keep_stride, momentum_stride, rms_stride, factored_stride;
    const T *weight[MOST_LAYERS], *bias[MOST_LAYERS];
    int64_t weight_stride[MOST_LAYERS], bias_stride[MOST_LAYERS];
};

inline T clipped(T g) {  // keeps NaN, unless the rule takes it for 0
    if (NAN_TO_ZERO) g = g == g ? g : T(0);
    return HAS_CLIP ? (g < -CLIP ? -CLIP : (g > CLIP ? CLIP : g)) : g;
}

inline V clipped(V g) {
    if (NAN_TO_ZERO) g = g == g ? g : V{};
    if (HAS_CLIP) {
        g = g < -CLIP ? V{} - CLIP : g;
        g = g > CLIP ? V{} + CLIP : g;
    }
    return g;
}

inline T at_least(const T x, const T low) { return x < low ? low : x; }  // keeps NaN

inline T inverse_root(const T x) { return T(1) / std::sqrt(x); }

template <class Work>
void each(const int64_t count, const int threads, const Work& work) {
#ifdef _OPENMP
    if (threads > 1 && count > 1) {
        bool no_memory = false;  // exceptions must not leave a parallel region
        #pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(||: no_memory)
        for (int64_t i = 0; i < count; ++i) {
            try {
                work(i);
            } catch (const std::bad_alloc&) {
                no_memory = true;
            }
        }
        if (no_memory) throw std::bad_alloc();
        return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) work(i);
}

// -- the network -------------------------------------------------------------------------------------------------------

// N outputs from h on, of `in` [IN][L]; they start from `start` if it is given, else from the bias.
template <int N, int IN, int OUT, bool LAST>
inline void tile(const int h, const T* weight, const T* bias, const Overrun* start, const Lanes* in, Lanes* out) {
    for (int64_t at = 0; at < L; at += W * TILE_VECTORS) {
        V sum[N][TILE_VECTORS];
        for (int n = 0; n < N; ++n)
            for (int j = 0; j < TILE_VECTORS; ++j)
                sum[n][j] = start ? *(const Unaligned*)&start[h + n][at + j * W] : bias[h + n] - V{};
        for (int f = 0; f < IN; ++f) {
            V x[TILE_VECTORS];
            for (int j = 0; j < TILE_VECTORS; ++j) x[j] = *(const V*)&in[f][at + j * W];
            for (int n = 0; n < N; ++n) {
                const T w = weight[f * OUT + h + n];
                for (int j = 0; j < TILE_VECTORS; ++j) sum[n][j] += w * x[j];
            }
        }
        for (int n = 0; n < N; ++n)
            for (int j = 0; j < TILE_VECTORS; ++j)
                *(V*)&out[h + n][at + j * W] = LAST ? sum[n][j] : (V{} > sum[n][j] ? V{} : sum[n][j]);  // keeps NaN
    }
}

template <int IN, int OUT, bool LAST>
inline void layer(const T* weight, const T* bias, const Overrun* start, const Lanes* in, Lanes* out) {
    int h = 0;
    for (; h + TILE <= OUT; h += TILE) tile<TILE, IN, OUT, LAST>(h, weight, bias, start, in, out);
    if constexpr (OUT % TILE != 0) tile<OUT % TILE, IN, OUT, LAST>(h, weight, bias, start, in, out);
}

// Layers from I on; returns which of the two buffers holds the outputs.
template <class N, int I>
inline int rest(const T* const* weight, const T* const* bias, Lanes (*hidden)[N::WIDEST]) {
    if constexpr (I < N::LAYERS) {
        layer<N::SIZES[I], N::SIZES[I + 1], I + 1 == N::LAYERS>(
            weight[I], bias[I], nullptr, hidden[(I + 1) % 2], hidden[I % 2]);
        return rest<N, I + 1>(weight, bias, hidden);
    } else {
        return (I + 1) % 2;
    }
}

// -- one tensor of one copy --------------------------------------------------------------------------------------------

// Where in x the features are; `OWN` of them need nothing but the element's own accumulators.
template <class N>
struct Planes {
    static constexpr int MATRIX = N::FACTORED, VECTOR = !N::FACTORED;
    static constexpr bool ROWS = N::ROW >= 0 || N::COL >= 0, RSQRTS = N::RSQRT_ROW >= 0 || N::RSQRT_COL >= 0;
    static constexpr int G = 0, CLIPPED_G = G + (N::G >= 0), P = CLIPPED_G + (N::CLIPPED_G >= 0),
        LOG_ABS_P = P + (N::P >= 0), M = LOG_ABS_P + (N::LOG_ABS_P >= 0), V = M + (N::M >= 0) * N::MOMENTA,
        M_R = V + (N::V >= 0) * N::RMSES, R = M_R + (N::M_R >= 0) * N::MOMENTA, G_R = R + (N::R >= 0) * N::RMSES,
        DIAG = G_R + (N::G_R >= 0) * N::RMSES, RSQRT_DIAG = DIAG + (VECTOR && ROWS) * N::FACTORS,
        FACTORED_G = RSQRT_DIAG + (VECTOR && RSQRTS) * N::FACTORS,
        FACTORED_M = FACTORED_G + (N::FACTORED_G >= 0) * N::FACTORS,
        COUNT = FACTORED_M + (N::FACTORED_M >= 0) * N::FACTORS, OWN = MATRIX ? FACTORED_G : COUNT;
    static constexpr bool SIDES = MATRIX && (ROWS || RSQRTS);  // some features are of a row or a column alone
};

struct Side {  // the line vectors or the column vectors, each [length] with room to overrun
    int64_t length = 0, stride = 0;
    T* moments = nullptr;  // [FACTORS][length], without room
    std::vector<T> sums, rsqrts, factors, hidden;
    T weights[2][MOST_FACTORS][WIDEST_FIRST];  // of the moments and of their inverse roots
};

template <class N>
class Run {
    typedef Planes<N> X;
    static constexpr int HIDDEN = N::SIZES[1], OUTPUTS = N::SIZES[N::LAYERS];
    static constexpr bool FOLDED = X::SIDES;

    const Tensor& t;
    const int64_t copy, line, lines;
    int64_t chunks, chunk_size;
    T momentum_decay[N::MOMENTA + 1], rms_decay[N::RMSES + 1], factored_decay[N::FACTORS + 1];
    const T *weight[N::LAYERS], *bias[N::LAYERS];
    const T *param, *grad;
    T *momentum, *rms, *diag;  // the new ones
    Side by_line, by_column;
    std::vector<T> column_sums;   // [chunks][columns]
    std::vector<double> squares;  // [chunks][X::COUNT]
    T folded[X::COUNT + 1][HIDDEN];

    struct Block {
        int64_t at, n;
        const T *g, *p, *m[N::MOMENTA + 1], *v[N::RMSES + 1], *d[N::FACTORS + 1];
        alignas(64) Lanes clipped_g, padded[1 + N::MOMENTA + N::RMSES + N::FACTORS];
    };

    struct Network {
        alignas(64) Lanes x[X::COUNT + 1], hidden[2][N::WIDEST];
        alignas(64) Overrun s[N::FACTORS + 1], start[HIDDEN];
    };

public:
    Run(const Tensor& tensor, const int64_t copy)
        : t(tensor), copy(copy), line(N::FACTORED ? t.n2 * t.inner : L), lines((t.size + line - 1) / line) {
        const int64_t most = N::FACTORED ? std::min(MOST_CHUNKS, t.n1 / 8) : MOST_CHUNKS;
        chunks = std::max(int64_t(1), std::min(t.size / CHUNK, most));
        const int64_t lines_each = (lines + chunks - 1) / chunks;
        chunk_size = lines_each * line;
        chunks = (lines + lines_each - 1) / lines_each;
        for (int k = 0; k < N::MOMENTA; ++k) momentum_decay[k] = t.momentum_decay[copy * t.momentum_stride + k];
        for (int k = 0; k < N::RMSES; ++k) rms_decay[k] = t.rms_decay[copy * t.rms_stride + k];
        for (int k = 0; k < N::FACTORS; ++k) factored_decay[k] = t.factored_decay[copy * t.factored_stride + k];
        for (int i = 0; i < N::LAYERS; ++i) {
            weight[i] = t.weight[i] + copy * t.weight_stride[i];
            bias[i] = t.bias[i] + copy * t.bias_stride[i];
        }
        param = t.param + copy * t.size;
        grad = t.grad + copy * t.size;
        momentum = t.new_momentum + copy * N::MOMENTA * t.size;
        rms = t.new_rms + copy * N::RMSES * t.size;
        diag = t.new_row + copy * N::FACTORS * t.size;
        squares.assign(chunks * (X::COUNT + 1), 0);
        if constexpr (N::FACTORED) {
            shape(by_line, t.size / t.n2, t.row_is_line);
            shape(by_column, t.size / t.n1, !t.row_is_line);
            column_sums.assign(chunks * by_column.length, 0);
        }
    }

    void step(const int threads) {
        each(chunks, threads, [this](const int64_t chunk) {
            accumulate(chunk);
            if constexpr (N::FACTORED) sum_lines(chunk);
        });
        if constexpr (N::FACTORED) {
            factor();
            if constexpr (X::OWN < X::COUNT) each(chunks, threads, [this](const int64_t chunk) { measure(chunk); });
        }
        fold();
        // before anyone applies: vectors of hidden entries are read whole, beyond the end of a chunk's own
        if constexpr (FOLDED)
            each(chunks, threads, [this](const int64_t chunk) {
                hide(by_line, begin(chunk) / line * t.inner, end(chunk) / line * t.inner, bias[0]);
            });
        each(chunks, threads, [this](const int64_t chunk) { apply(chunk); });
    }

private:
    int64_t begin(const int64_t chunk) const { return chunk * chunk_size; }
    int64_t end(const int64_t chunk) const { return std::min(t.size, begin(chunk) + chunk_size); }

    void shape(Side& side, const int64_t length, const bool is_row) {
        side.length = length;
        side.stride = length + W;
        side.moments = (is_row ? t.new_row : t.new_col) + copy * N::FACTORS * length;
        side.sums.assign(length, 0);
        side.rsqrts.assign(N::FACTORS * side.stride, 0);
        side.factors.assign(N::FACTORS * side.stride, 0);
        if (FOLDED) side.hidden.assign(HIDDEN * side.stride, 0);
    }

    int64_t column_of(const int64_t at_line) const {  // where a line begins among the column vectors
        return (at_line / (t.n1 * t.middle) * t.middle + at_line % t.middle) * line;
    }

    // -- pass 1: accumulators, sums over rows and columns, mean squares of an element's own features

    void accumulate(const int64_t chunk) {
        square<0, X::OWN>(chunk, [this](Block& block, Network& network) {
            move(block);
            planes<true, false>(block, network.x, network.s);
        });
    }

    // Sums of the squares of features FROM .. TO over a chunk; fill makes those of a block.
    template <int FROM, int TO, class Fill>
    void square(const int64_t chunk, const Fill& fill) {
        Network network;
        Block block;
        double* total = &squares[chunk * (X::COUNT + 1)];
        alignas(64) V sums[X::COUNT + 1] = {};
        int64_t blocks = 0;
        for (int64_t at = begin(chunk); at < end(chunk); at += L) {
            const int64_t n = std::min(L, end(chunk) - at);
            take(block, at, n);
            fill(block, network);
            add_squares<FROM, TO>(network.x, n, sums);
            if (++blocks % BLOCKS_PER_FLUSH == 0) flush<FROM, TO>(sums, total);
        }
        flush<FROM, TO>(sums, total);
    }

    // L elements of the gradient and the parameter, padded with zeros after n.
    void take(Block& block, const int64_t at, const int64_t n) {
        block.at = at;
        block.n = n;
        std::memset(block.clipped_g, 0, sizeof(Lanes));
        for (int64_t l = 0; l < n; ++l) block.clipped_g[l] = clipped(grad[at + l]);
        block.g = block.clipped_g;
        block.p = lanes(param + at, n, block.padded[0]);
    }

    void accumulators(Block& block) {
        Lanes* padded = block.padded + 1;
        for (int k = 0; k < N::MOMENTA; ++k) block.m[k] = lanes(momentum + k * t.size + block.at, block.n, *padded++);
        for (int k = 0; k < N::RMSES; ++k) block.v[k] = lanes(rms + k * t.size + block.at, block.n, *padded++);
        if constexpr (!N::FACTORED)
            for (int k = 0; k < N::FACTORS; ++k) block.d[k] = lanes(diag + k * t.size + block.at, block.n, *padded++);
    }

    static const T* lanes(const T* from, const int64_t n, T* padded) {
        if (n == L) return from;
        std::memset(padded, 0, sizeof(Lanes));
        std::memcpy(padded, from, n * sizeof(T));
        return padded;
    }

    void move(Block& block) {
        const T* g = block.g;
        alignas(64) Lanes square;
        LANES square[l] = g[l] * g[l];
        const int64_t from = copy * t.size, at = block.at, n = block.n;
        for (int k = 0; k < N::MOMENTA; ++k)
            blend(t.momentum + from * N::MOMENTA + k * t.size + at, g, momentum_decay[k], momentum + k * t.size + at, n);
        for (int k = 0; k < N::RMSES; ++k)
            blend(t.rms + from * N::RMSES + k * t.size + at, square, rms_decay[k], rms + k * t.size + at, n);
        if constexpr (!N::FACTORED && N::FACTORS > 0) {
            LANES square[l] += T(1e-30);
            for (int k = 0; k < N::FACTORS; ++k)
                blend(t.row + from * N::FACTORS + k * t.size + at, square, factored_decay[k], diag + k * t.size + at, n);
        }
        accumulators(block);
    }

    static void blend(const T* old, const T* value, const T decay, T* to, const int64_t n) {
        const T rest = T(1) - decay;
        if (n == L) {
            LANES to[l] = decay * old[l] + rest * value[l];
        } else {
            for (int64_t l = 0; l < n; ++l) to[l] = decay * old[l] + rest * value[l];
        }
    }

    void sum_lines(const int64_t chunk) {
        T* columns = &column_sums[chunk * by_column.length];
        for (int64_t at = begin(chunk) / line; at < end(chunk) / line; ++at) {
            const T* g = grad + at * line;
            T* column = columns + column_of(at);
            if (t.inner == 1) {
                V sum = {};
                int64_t i = 0;
                for (; i + W <= line; i += W) {
                    V x = clipped(V(*(const Unaligned*)(g + i)));
                    x *= x;
                    *(Unaligned*)(column + i) += x;
                    sum += x;
                }
                T last = 0;
                for (; i < line; ++i) {
                    const T x = clipped(g[i]) * clipped(g[i]);
                    column[i] += x;
                    last += x;
                }
                for (int64_t l = 0; l < W; ++l) last += sum[l];
                by_line.sums[at] = last;
            } else {
                T* sums = &by_line.sums[at * t.inner];
                for (int64_t i = 0; i < t.n2; ++i)
                    for (int64_t e = 0; e < t.inner; ++e) {
                        const T x = clipped(g[i * t.inner + e]) * clipped(g[i * t.inner + e]);
                        column[i * t.inner + e] += x;
                        sums[e] += x;
                    }
            }
        }
    }

    // -- between the passes: second moments of rows and columns, and what a gradient is multiplied by for them

    void factor() {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const T* part = &column_sums[chunk * by_column.length];
            for (int64_t i = 0; i < by_column.length; ++i) by_column.sums[i] += part[i];
        }
        Side &row = t.row_is_line ? by_line : by_column, &col = t.row_is_line ? by_column : by_line;
        const int64_t outer = t.size / (t.n1 * t.middle * line);
        moments(by_line, t.row_is_line ? t.row : t.col, t.n2);
        moments(by_column, t.row_is_line ? t.col : t.row, t.n1);
        for (int k = 0; k < N::FACTORS; ++k) {
            const T* moment = row.moments + k * row.length;
            T* factors = &row.factors[k * row.stride];
            if (t.row_is_line)
                relative(moment, outer, t.n1, t.middle * t.inner, factors);
            else
                relative(moment, outer * t.middle, t.n2, t.inner, factors);
            const T* other = col.moments + k * col.length;
            T* other_factors = &col.factors[k * col.stride];
            INDEPENDENT
            for (int64_t i = 0; i < col.length; ++i) other_factors[i] = inverse_root(at_least(other[i], T(1e-9)));
        }
    }

    void moments(Side& side, const T* old, const int64_t count) {
        old += copy * N::FACTORS * side.length;
        for (int k = 0; k < N::FACTORS; ++k) {
            const T decay = factored_decay[k], rest = T(1) - decay, share = T(1) / T(count);
            T *to = side.moments + k * side.length, *root = &side.rsqrts[k * side.stride];
            const T *from = old + k * side.length, *sums = side.sums.data();
            INDEPENDENT
            for (int64_t i = 0; i < side.length; ++i) {
                to[i] = decay * from[i] + rest * (sums[i] * share + T(1e-30));
                root[i] = inverse_root(to[i] + T(1e-8));
            }
        }
    }

    // Row factors: `moment` [outer, n, inner] relative to its mean over n.
    static void relative(const T* moment, const int64_t outer, const int64_t n, const int64_t inner, T* factors) {
        for (int64_t o = 0; o < outer; ++o, moment += n * inner, factors += n * inner)
            for (int64_t e = 0; e < inner; ++e) {
                double sum = 0;
                for (int64_t i = 0; i < n; ++i) sum += moment[i * inner + e];
                const T mean = T(sum / n) + T(1e-9);
                for (int64_t i = 0; i < n; ++i)
                    factors[i * inner + e] = inverse_root(at_least(moment[i * inner + e] / mean, T(1e-9)));
            }
    }

    // -- pass 2: mean squares of the factored features

    void measure(const int64_t chunk) {
        square<X::OWN, X::COUNT>(chunk, [this](Block& block, Network& network) {
            accumulators(block);
            fill<false>(block, network);
            planes<false, true>(block, network.x, network.s);
        });
    }

    template <int FROM, int TO>
    static void add_squares(Lanes* x, const int64_t n, V* sums) {
        for (int f = FROM; f < TO; ++f) {
            for (int64_t l = n; l < L; ++l) x[f][l] = 0;
            V sum = sums[f];
            for (int64_t l = 0; l < L; l += W) sum += *(const V*)&x[f][l] * *(const V*)&x[f][l];
            sums[f] = sum;
        }
    }

    template <int FROM, int TO>
    static void flush(V* sums, double* total) {
        for (int f = FROM; f < TO; ++f) {
            for (int64_t l = 0; l < W; ++l) total[f] += double(sums[f][l]);
            sums[f] = V{};
        }
    }

    // -- between the passes: the first layer's weights with all divisors in them

    void fold() {
        double mean[X::COUNT + 1] = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int f = 0; f < X::COUNT; ++f) mean[f] += squares[chunk * (X::COUNT + 1) + f];
        T inverse[X::COUNT + 1];
        for (int f = 0; f < X::COUNT; ++f) inverse[f] = inverse_root(NORM_EPS + T(mean[f] / t.size));
        std::memset(folded, 0, sizeof(folded));
        const auto put = [&](const int row, const int plane, const int count) {
            if (row < 0) return;
            for (int k = 0; k < count; ++k)
                for (int h = 0; h < HIDDEN; ++h)
                    folded[plane + k][h] += weight[0][(row + k) * HIDDEN + h] * inverse[plane + k];
        };
        put(N::G, X::G, 1);
        put(N::CLIPPED_G, X::CLIPPED_G, 1);
        put(N::P, X::P, 1);
        put(N::LOG_ABS_P, X::LOG_ABS_P, 1);
        put(N::M, X::M, N::MOMENTA);
        put(N::V, X::V, N::RMSES);
        put(N::M_R, X::M_R, N::MOMENTA);
        put(N::R, X::R, N::RMSES);
        put(N::G_R, X::G_R, N::RMSES);
        put(N::FACTORED_G, X::FACTORED_G, N::FACTORS);
        put(N::FACTORED_M, X::FACTORED_M, N::FACTORS);
        if constexpr (!N::FACTORED) {
            put(N::ROW, X::DIAG, N::FACTORS);
            put(N::COL, X::DIAG, N::FACTORS);
            put(N::RSQRT_ROW, X::RSQRT_DIAG, N::FACTORS);
            put(N::RSQRT_COL, X::RSQRT_DIAG, N::FACTORS);
        }
        if constexpr (FOLDED) {
            side_weights(by_line, t.row_is_line);
            side_weights(by_column, !t.row_is_line);
            hide(by_column, 0, by_column.length, nullptr);
        }
    }

    void side_weights(Side& side, const bool is_row) {
        const int rows[2] = {is_row ? N::ROW : N::COL, is_row ? N::RSQRT_ROW : N::RSQRT_COL};
        for (int kind = 0; kind < 2; ++kind)
            for (int k = 0; k < N::FACTORS; ++k) {
                const T* value = kind ? &side.rsqrts[k * side.stride] : side.moments + k * side.length;
                double sum = 0;
                for (int64_t i = 0; i < side.length; ++i) sum += double(value[i] * value[i]);
                const T inverse = inverse_root(NORM_EPS + T(sum / side.length));
                for (int h = 0; h < HIDDEN; ++h)
                    side.weights[kind][k][h] = rows[kind] < 0 ? 0 : weight[0][(rows[kind] + k) * HIDDEN + h] * inverse;
            }
    }

    // The hidden vectors of the entries from `from` up to `to`, on top of `start` [HIDDEN].
    void hide(Side& side, const int64_t from, const int64_t to, const T* start) {
        for (int h = 0; h < HIDDEN; ++h) {
            T* hidden = &side.hidden[h * side.stride];
            std::fill(hidden + from, hidden + to, start ? start[h] : T(0));
            for (int kind = 0; kind < 2; ++kind)
                for (int k = 0; k < N::FACTORS; ++k) {
                    const T* value = kind ? &side.rsqrts[k * side.stride] : side.moments + k * side.length;
                    const T w = side.weights[kind][k][h];
                    if (w != T(0)) {
                        INDEPENDENT
                        for (int64_t i = from; i < to; ++i) hidden[i] += w * value[i];
                    }
                }
        }
    }

    // -- pass 3: the network, and the new parameter or the outputs

    void apply(const int64_t chunk) {
        Network network;
        Block block;
        const T scale = t.scale[copy * t.scale_stride], keep = t.keep[copy * t.keep_stride];
        T* to = t.new_param + copy * t.size * (OWN_FINISH ? OUTPUTS : 1);
        for (int64_t at = begin(chunk); at < end(chunk); at += L) {
            const int64_t n = std::min(L, end(chunk) - at);
            take(block, at, n);
            accumulators(block);
            if constexpr (N::FACTORED) fill<true>(block, network);
            planes<true, true>(block, network.x, network.s);
            layer<X::COUNT, HIDDEN, N::LAYERS == 1>(
                folded[0], bias[0], FOLDED ? network.start : nullptr, network.x, network.hidden[0]);
            const Lanes* out = network.hidden[rest<N, 1>(weight, bias, network.hidden)];
            if constexpr (OWN_FINISH) {
                for (int k = 0; k < OUTPUTS; ++k) std::memcpy(to + k * t.size + at, out[k], n * sizeof(T));
            } else {
                alignas(64) Lanes moved;
                const T *d = out[0], *s = out[OUTPUTS > 1], *p = block.p;
                LANES moved[l] = keep * p[l] - scale * (HAS_MAGNITUDE ? d[l] * std::exp(MAGNITUDE * s[l]) : d[l]);
                std::memcpy(to + at, moved, n * sizeof(T));
            }
        }
    }

    // The factors of a block's elements, and what their first layer starts from.
    template <bool START>
    void fill(const Block& block, Network& network) {
        int64_t at_line = block.at / line, i = block.at % line, length;
        for (int64_t l = 0; l < block.n; l += length) {
            const int64_t e = t.inner > 1 ? i % t.inner : 0;
            length = std::min(block.n - l, t.inner > 1 ? t.inner - e : line - i);
            const int64_t a = at_line * t.inner + e, b = column_of(at_line) + i;
            for (int k = 0; k < N::FACTORS; ++k)
                combine<std::multiplies<>>(
                    &by_line.factors[k * by_line.stride + a], &by_column.factors[k * by_column.stride + b], length,
                    network.s[k] + l);
            if constexpr (START && FOLDED)
                for (int h = 0; h < HIDDEN; ++h)
                    combine<std::plus<>>(
                        &by_line.hidden[h * by_line.stride + a], &by_column.hidden[h * by_column.stride + b], length,
                        network.start[h] + l);
            i += length;
            if (i == line) i = 0, ++at_line;
        }
    }

    template <class Operation>
    void combine(const T* of_line, const T* of_column, const int64_t length, T* to) const {
        const Operation operation;
        if (t.inner > 1) {
            for (int64_t l = 0; l < length; l += W)
                *(Unaligned*)(to + l) =
                    operation(V(*(const Unaligned*)(of_line + l)), V(*(const Unaligned*)(of_column + l)));
        } else {
            const V same = *of_line - V{};
            for (int64_t l = 0; l < length; l += W)
                *(Unaligned*)(to + l) = operation(same, V(*(const Unaligned*)(of_column + l)));
        }
    }

    // The features of a block: those of the elements' own accumulators, the factored ones, or both.
    template <bool FIRST, bool SECOND>
    static inline void planes(const Block& block, Lanes* x, Overrun* s) {
        const T *g = block.g, *p = block.p;
        if constexpr (FIRST) {
            if constexpr (N::G >= 0) LANES x[X::G][l] = g[l];
            if constexpr (N::CLIPPED_G >= 0)
                LANES x[X::CLIPPED_G][l] = g[l] < T(-0.1) ? T(-0.1) : (g[l] > T(0.1) ? T(0.1) : g[l]);
            if constexpr (N::P >= 0) LANES x[X::P][l] = p[l];
            if constexpr (N::LOG_ABS_P >= 0) LANES x[X::LOG_ABS_P][l] = std::log(std::abs(p[l]) + T(1e-8));
            alignas(64) Lanes r[N::RMSES + 1];
            if constexpr (N::R >= 0 || N::M_R >= 0 || N::G_R >= 0)
                for (int k = 0; k < N::RMSES; ++k) LANES r[k][l] = inverse_root(block.v[k][l] + RMS_EPS);
            for (int k = 0; k < N::MOMENTA; ++k) {
                const T* m = block.m[k];
                if constexpr (N::M >= 0) LANES x[X::M + k][l] = m[l];
                if constexpr (N::M_R >= 0) LANES x[X::M_R + k][l] = m[l] * r[N::RMSES > 1 ? k : 0][l];
            }
            for (int k = 0; k < N::RMSES; ++k) {
                if constexpr (N::V >= 0) LANES x[X::V + k][l] = block.v[k][l];
                if constexpr (N::R >= 0) LANES x[X::R + k][l] = r[k][l];
                if constexpr (N::G_R >= 0) LANES x[X::G_R + k][l] = g[l] * r[k][l];
            }
            if constexpr (!N::FACTORED)
                for (int k = 0; k < N::FACTORS; ++k) {
                    const T *d = block.d[k], *m = block.m[k < N::MOMENTA ? k : 0];
                    if constexpr (X::ROWS) LANES x[X::DIAG + k][l] = d[l];
                    if constexpr (X::RSQRTS) LANES x[X::RSQRT_DIAG + k][l] = inverse_root(d[l] + T(1e-8));
                    if constexpr (N::FACTORED_G >= 0) LANES x[X::FACTORED_G + k][l] = g[l] * inverse_root(d[l] + T(1e-9));
                    if constexpr (N::FACTORED_M >= 0) LANES x[X::FACTORED_M + k][l] = m[l] * inverse_root(d[l] + DIAGONAL_EPS);
                }
        }
        if constexpr (SECOND && N::FACTORED)
            for (int k = 0; k < N::FACTORS; ++k) {
                const T* m = block.m[k < N::MOMENTA ? k : 0];
                if constexpr (N::FACTORED_G >= 0) LANES x[X::FACTORED_G + k][l] = g[l] * s[k][l];
                if constexpr (N::FACTORED_M >= 0) LANES x[X::FACTORED_M + k][l] = m[l] * s[k][l];
            }
    }
};

void one(const Tensor& tensor, int64_t copy, int threads);

}  // namespace

extern "C" int step(const int64_t count, const int64_t copies, const Tensor* tensors, const int threads) {
    try {
        std::vector<const Tensor*> small;
        int64_t total = 0;
        for (int64_t j = 0; j < count; ++j) {
            if (tensors[j].size >= 2 * CHUNK && copies < threads)
                for (int64_t k = 0; k < copies; ++k) one(tensors[j], k, threads);
            else
                small.push_back(&tensors[j]), total += tensors[j].size * copies;
        }
        const int64_t each_copy = small.size();
        each(copies * each_copy, total < CHUNK / 8 ? 1 : threads,  // so little is done before a second thread is there
             [&](const int64_t i) { one(*small[i % each_copy], i / each_copy, 1); });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
