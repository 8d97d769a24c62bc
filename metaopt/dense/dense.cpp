// Losses, gradients and whole training runs of dense networks; `metaopt.dense.cpp` puts the type T before this text.
//
// A copy belongs to one thread, so no result depends on their number, and lives in that thread's cache: weights as
// [in][wide], examples and activations as [batch][wide], where `wide` is a layer's outputs filled up with zeros to whole
// vectors. The three products of a layer then have one form, with sums in registers (`product`).

#include <algorithm>
#include <new>
#include <vector>

#ifdef VECTORISED
#if __GLIBC_PREREQ(2, 35)
VECTORISED(erf)
VECTORISED(expm1)
VECTORISED(log1p)
#endif
#endif

namespace {

typedef T V __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef T Unaligned __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(sizeof(T))));

constexpr int64_t W = VECTOR_BYTES / sizeof(T);
constexpr int64_t ROWS = VECTOR_BYTES == 64 ? 8 : 4;  // of a tile: with 3 vectors each, its sums fill the registers

enum Activation { RELU, GELU, SILU, ELU, SOFTPLUS, TANH, SIN, LINEAR };  // the order of metaopt.dense.network
enum Loss { CROSS_ENTROPY, SQUARED_ERROR, HINGE, MSE };
enum Outcome { DONE, NO_MEMORY, NO_SUCH_CLASS, NO_SUCH_EXAMPLE };

typedef void Update(int64_t count, void* const* pointers, const int64_t* sizes, const double* coefficients, int64_t stride,
                    int threads);  // a program's step (metaopt.program.cpp)

inline int64_t padded(const int64_t count) { return (count + W - 1) / W * W; }

// -- products and transposes -------------------------------------------------------------------------------------------

// c[r][n] = start[n] + sum_k a[r * row + k * depth] * b[k][n] for R rows and N vectors of columns.
template <int R, int N>
inline void tile(const T* a, const int64_t row, const int64_t depth, const int64_t count, const T* b, const int64_t wide,
                 const T* start, T* c) {
    V sum[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sum[r][n] = start ? *(const V*)(start + n * W) : V{};
    for (int64_t k = 0; k < count; ++k, a += depth, b += wide) {
        V x[N];
        for (int n = 0; n < N; ++n) x[n] = *(const V*)(b + n * W);
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) sum[r][n] += a[r * row] * x[n];
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) *(V*)(c + r * wide + n * W) = sum[r][n];
}

template <int R, int N>
void tiles(const int64_t rows, const T* a, const int64_t row, const int64_t depth, const int64_t count, const T* b,
           const int64_t wide, const T* start, T* c) {
    if constexpr (R > 1) {
        if (rows < R) return tiles<R / 2, N>(rows, a, row, depth, count, b, wide, start, c);
    }
    for (int64_t i = 0; i < rows; i += R) {
        const int64_t at = std::min(i, rows - R);  // the last tile writes some rows twice
        tile<R, N>(a + at * row, row, depth, count, b, wide, start, c + at * wide);
    }
}

// c [rows][wide] = start [wide], or 0, + a [rows][count] b [count][wide], where a's entries lie at r * row + k * depth.
void product(const int64_t rows, const T* a, const int64_t row, const int64_t depth, const int64_t count, const T* b,
             const int64_t wide, const T* start, T* c) {
    for (int64_t at = 0, vectors; at < wide; at += vectors * W) {
        const int64_t left = (wide - at) / W;
        const T* begin = start ? start + at : nullptr;
        vectors = left > 4 ? 3 : left == 4 ? 2 : left;
        const auto band = vectors == 3 ? tiles<ROWS, 3> : vectors == 2 ? tiles<ROWS, 2> : tiles<ROWS, 1>;
        band(rows, a, row, depth, count, b + at, wide, begin, c + at);
    }
}

typedef std::make_integer_sequence<int, int(W)> Lane;

template <bool HIGH, int... I>
inline V interleaved(const V a, const V b, std::integer_sequence<int, I...>) {
    constexpr int BEGIN = HIGH ? int(W) / 2 : 0;
#ifdef __clang__
    return __builtin_shufflevector(a, b, BEGIN + (I % 2 ? int(W) : 0) + I / 2 ...);
#else
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
    typedef Index Indices __attribute__((vector_size(VECTOR_BYTES)));
    return __builtin_shuffle(a, b, Indices{(BEGIN + (I % 2 ? int(W) : 0) + I / 2)...});
#endif
}

inline void transpose_square(const T* from, const int64_t from_row, T* to, const int64_t to_row) {
    V rows[W];
    for (int64_t i = 0; i < W; ++i) rows[i] = *(const Unaligned*)(from + i * from_row);
    for (int64_t apart = 1; apart < W; apart *= 2) {
        V next[W];
        for (int64_t i = 0; i < W / 2; ++i) {
            next[2 * i] = interleaved<false>(rows[i], rows[i + W / 2], Lane());
            next[2 * i + 1] = interleaved<true>(rows[i], rows[i + W / 2], Lane());
        }
        for (int64_t i = 0; i < W; ++i) rows[i] = next[i];
    }
    for (int64_t i = 0; i < W; ++i) *(Unaligned*)(to + i * to_row) = rows[i];
}

// to [columns][to_row] = from [rows][from_row], transposed
void transpose(const T* from, const int64_t rows, const int64_t columns, const int64_t from_row, T* to,
               const int64_t to_row) {
    const int64_t whole_rows = rows / W * W, whole_columns = columns / W * W;
    for (int64_t i = 0; i < whole_rows; i += W)
        for (int64_t j = 0; j < whole_columns; j += W)
            transpose_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
}

// -- activations -------------------------------------------------------------------------------------------------------

template <class Function>
inline void each(const int64_t count, T* h, T* slope, const Function& function) {
    INDEPENDENT
    for (int64_t i = 0; i < count; ++i) h[i] = function(h[i], slope[i]);
}

// h becomes the activation of h, and slope its derivative there. Comparisons are such that NaN stays.
void activate(const int64_t activation, const int64_t count, T* h, T* slope) {
    switch (activation) {
    case RELU:
        return each(count, h, slope, [](const T z, T& d) {
            d = z <= 0 ? T(0) : T(1);
            return z <= 0 ? T(0) : z;
        });
    case GELU:
        return each(count, h, slope, [](const T z, T& d) {
            const T share = T(0.5) * (1 + std::erf(z * T(0.70710678118654752440)));
            d = share + z * std::exp(T(-0.5) * z * z) * T(0.39894228040143267794);
            return z * share;
        });
    case SILU:
        return each(count, h, slope, [](const T z, T& d) {
            const T share = 1 / (1 + std::exp(-z));
            d = share * (1 + z * (1 - share));
            return z * share;
        });
    case ELU:
        return each(count, h, slope, [](const T z, T& d) {
            d = z > 0 ? T(1) : std::exp(z);
            return z > 0 ? z : std::expm1(z);
        });
    case SOFTPLUS:  // torch takes the identity above 20
        return each(count, h, slope, [](const T z, T& d) {
            const T power = std::exp(z > 20 ? T(20) : z);
            d = z > 20 ? T(1) : power / (1 + power);
            return z > 20 ? z : std::log1p(power);
        });
    case TANH:
        return each(count, h, slope, [](const T z, T& d) {
            const T value = std::tanh(z);
            d = 1 - value * value;
            return value;
        });
    case SIN:  // in two walks, as compilers would join them to a function that has no vector form
        each(count, h, slope, [](const T z, T& d) {
            d = std::cos(z);
            return z;
        });
        return each(count, h, slope, [](const T z, T&) { return std::sin(z); });
    default:
        return each(count, h, slope, [](const T z, T& d) {
            d = 1;
            return z;
        });
    }
}

// -- losses ------------------------------------------------------------------------------------------------------------

struct Outputs {  // of the last layer, transposed; their gradient is written over them
    int64_t count, batch;
    T* z;                  // [count][batch]
    const int64_t* label;  // [batch], or else
    const T* target;       // [count][batch]
    T share;               // of each term in the loss
    T *loss, *most, *sum;  // [batch]: each example's loss, and what is needed on the way
};

#define EXAMPLES INDEPENDENT for (int64_t l = 0; l < o.batch; ++l)

void cross_entropy(const Outputs& o, const T smoothing) {
    const int64_t batch = o.batch;
    const T each_class = smoothing / T(o.count);
    EXAMPLES o.most[l] = o.z[l], o.sum[l] = 0;
    for (const T* z = o.z + batch; z < o.z + o.count * batch; z += batch)
        EXAMPLES o.most[l] = z[l] > o.most[l] ? z[l] : o.most[l];
    for (T* z = o.z; z < o.z + o.count * batch; z += batch) EXAMPLES z[l] -= o.most[l];
    EXAMPLES o.loss[l] = (smoothing - 1) * o.z[o.label[l] * batch + l];
    if (smoothing > 0)
        for (const T* z = o.z; z < o.z + o.count * batch; z += batch) EXAMPLES o.loss[l] -= each_class * z[l];
    INDEPENDENT
    for (int64_t i = 0; i < o.count * batch; ++i) o.z[i] = std::exp(o.z[i]);
    for (const T* z = o.z; z < o.z + o.count * batch; z += batch) EXAMPLES o.sum[l] += z[l];
    EXAMPLES o.loss[l] += std::log(o.sum[l]);
    for (T* z = o.z; z < o.z + o.count * batch; z += batch) EXAMPLES z[l] = (z[l] / o.sum[l] - each_class) * o.share;
    for (int64_t l = 0; l < batch; ++l) o.z[o.label[l] * batch + l] -= (1 - smoothing) * o.share;
}

void squared_error(const Outputs& o) {
    EXAMPLES o.loss[l] = 0;
    for (int64_t j = 0; j < o.count; ++j) {
        T* z = o.z + j * o.batch;
        EXAMPLES {
            const T error = z[l] - T(o.label[l] == j) + 1 / T(o.count);
            o.loss[l] += error * error;
            z[l] = 2 * o.share * error;
        }
    }
}

void hinge(const Outputs& o) {
    T *own = o.most, *violations = o.sum;
    EXAMPLES own[l] = o.z[o.label[l] * o.batch + l], o.loss[l] = violations[l] = 0;
    for (int64_t j = 0; j < o.count; ++j) {
        T* z = o.z + j * o.batch;
        EXAMPLES {
            const T other = T(o.label[l] != j), margin = 1 + z[l] - own[l];
            o.loss[l] += (margin <= 0 ? T(0) : margin) * other;
            z[l] = (margin <= 0 ? T(0) : o.share) * other;
            violations[l] += z[l];
        }
    }
    for (int64_t l = 0; l < o.batch; ++l) o.z[o.label[l] * o.batch + l] = -violations[l];
}

void mse(const Outputs& o) {
    EXAMPLES o.loss[l] = 0;
    for (int64_t j = 0; j < o.count; ++j) {
        T* z = o.z + j * o.batch;
        const T* target = o.target + j * o.batch;
        EXAMPLES {
            const T error = z[l] - target[l];
            o.loss[l] += error * error;
            z[l] = 2 * o.share * error;
        }
    }
}

// -- one copy ----------------------------------------------------------------------------------------------------------

struct Network {  // metaopt.dense.cpp fills it
    int64_t batch, layers, loss;
    const int64_t* activations;  // of every layer but the last
    const int64_t* sizes;  // of the inputs, then of every layer's outputs
    double smoothing;
};

struct Examples {  // inputs [batch][features]; labels [batch], or else targets [batch][outputs]
    const T* inputs;
    const int64_t* labels;
    const T* targets;
};

struct Layer {
    int64_t in, out, wide;
    int64_t activation;     // none of the last
    int64_t weight, bias;   // where they begin among a copy's numbers
    T *outputs, *slope;     // [batch][wide]; going back, outputs become the loss's gradient there
    T* turned;              // the weight as [out][wide of the layer before]; none of the first
};

// A thread's working memory, and what is done in it. Everything that is padding is 0.
class Copy {
public:
    int64_t size = 0;            // of parameters, gradients and each slot
    std::vector<T*> numbers;     // parameters, gradients, slots
    T* inputs;                   // [batch][features], for those who gather examples
    T* targets;
    std::vector<int64_t> labels;

    Copy(const Network& network, const int64_t slots) : labels(network.batch), network(network) {
        for (int64_t i = 0; i < network.layers; ++i) {
            const int64_t in = network.sizes[i], out = network.sizes[i + 1], wide = padded(out);
            const int64_t activation = i + 1 < network.layers ? network.activations[i] : int64_t(LINEAR);
            layers.push_back({in, out, wide, activation, size, size + in * wide, nullptr, nullptr, nullptr});
            size += (in + 1) * wide;
        }
        for (int64_t i = 0; i < slots + 2; ++i) numbers.push_back(zeros(size));
        inputs = zeros(network.batch * network.sizes[0]);
        targets = zeros(network.batch * layers.back().out);
        columns = zeros(layers.back().wide * network.batch);
        target_columns = zeros(layers.back().out * network.batch);
        losses = zeros(3 * network.batch);
        for (size_t i = 0; i < layers.size(); ++i) {
            layers[i].outputs = zeros(network.batch * layers[i].wide);
            layers[i].slope = zeros(network.batch * layers[i].wide);
            if (i) layers[i].turned = zeros(layers[i].out * layers[i - 1].wide);
        }
    }

    ~Copy() {
        for (T* block : blocks) ::operator delete(block, ALIGNED);
    }
    Copy(const Copy&) = delete;

    // Between a copy's numbers and those of copy k as torch has them: weight [out][in] and bias [out] of each layer.
    void read(T* own, const T* const* theirs, const int64_t k) const {
        std::fill_n(own, size, T(0));  // an update of the copy before may have left anything in the padding
        for (const Layer& layer : layers) {
            const T *weight = *theirs++ + k * layer.in * layer.out, *bias = *theirs++ + k * layer.out;
            transpose(weight, layer.out, layer.in, layer.in, own + layer.weight, layer.wide);
            std::copy_n(bias, layer.out, own + layer.bias);
        }
    }

    void write(const T* own, T* const* theirs, const int64_t k) const {
        for (const Layer& layer : layers) {
            T *weight = *theirs++ + k * layer.in * layer.out, *bias = *theirs++ + k * layer.out;
            transpose(own + layer.weight, layer.in, layer.out, layer.wide, weight, layer.in);
            std::copy_n(own + layer.bias, layer.out, bias);
        }
    }

    // Whether all of copy k's numbers are, as torch has them.
    bool are_finite(const T* const* theirs, const int64_t k) const {
        bool finite = true;
        for (const Layer& layer : layers)
            for (const int64_t count : {layer.in * layer.out, layer.out}) {
                const T* numbers = *theirs++ + k * count;
                for (int64_t i = 0; i < count; ++i) finite &= bool(std::isfinite(numbers[i]));
            }
        return finite;
    }

    // The mean loss of a batch; gradients are among the numbers then. Labels must be classes.
    T loss_and_gradients(const Examples& examples) {
        const T* params = numbers[0];
        T* grads = numbers[1];
        const T* x = examples.inputs;
        int64_t stride = network.sizes[0];
        for (const Layer& layer : layers) {
            const T *weight = params + layer.weight, *bias = params + layer.bias;
            product(network.batch, x, stride, 1, layer.in, weight, layer.wide, bias, layer.outputs);
            if (&layer != &layers.back()) activate(layer.activation, network.batch * layer.wide, layer.outputs, layer.slope);
            x = layer.outputs, stride = layer.wide;
        }
        const T loss = of_outputs(examples);
        for (size_t i = layers.size(); i--;) {
            const Layer& layer = layers[i];
            const T* delta = layer.outputs;
            x = i ? layers[i - 1].outputs : examples.inputs;
            stride = i ? layers[i - 1].wide : network.sizes[0];
            product(layer.in, x, 1, stride, network.batch, delta, layer.wide, nullptr, grads + layer.weight);
            product(1, &ONE, 0, 0, network.batch, delta, layer.wide, nullptr, grads + layer.bias);
            if (i) backward(layer, layers[i - 1]);
        }
        return loss;
    }

private:
    static constexpr std::align_val_t ALIGNED{64};
    static constexpr T ONE = 1;

    const Network& network;
    std::vector<Layer> layers;
    std::vector<T*> blocks;
    T *columns, *target_columns, *losses;

    T* zeros(const int64_t count) {
        blocks.push_back(nullptr);
        blocks.back() = (T*)::operator new(sizeof(T) * padded(count), ALIGNED);
        std::fill_n(blocks.back(), padded(count), T(0));
        return blocks.back();
    }

    // The loss; the last layer's outputs become its gradient.
    T of_outputs(const Examples& examples) {
        const Layer& last = layers.back();
        const int64_t batch = network.batch;
        const bool by_output = network.loss == HINGE || network.loss == MSE;
        const double share = 1.0 / double(batch * (by_output ? last.out : 1));
        const Outputs outputs{
            last.out, batch, columns, examples.labels, target_columns, T(share), losses, losses + batch, losses + 2 * batch};
        transpose(last.outputs, batch, last.wide, last.wide, columns, batch);
        switch (network.loss) {
        case CROSS_ENTROPY: cross_entropy(outputs, T(network.smoothing)); break;
        case SQUARED_ERROR: squared_error(outputs); break;
        case HINGE: hinge(outputs); break;
        default:
            transpose(examples.targets, batch, last.out, last.out, target_columns, batch);
            mse(outputs);
        }
        transpose(columns, last.wide, batch, batch, last.outputs, last.wide);
        double sum = 0;
        for (int64_t l = 0; l < batch; ++l) sum += double(losses[l]);
        return T(sum * share);
    }

    void backward(const Layer& layer, const Layer& before) {
        transpose(numbers[0] + layer.weight, layer.in, layer.out, layer.wide, layer.turned, before.wide);
        product(network.batch, layer.outputs, layer.wide, 1, layer.out, layer.turned, before.wide, nullptr, before.outputs);
        T *delta = before.outputs, *slope = before.slope;
        const int64_t count = network.batch * before.wide;
        if (before.activation == RELU) {  // as in torch, what is cut off is 0 though NaN came back
            INDEPENDENT
            for (int64_t i = 0; i < count; ++i) delta[i] = slope[i] == 0 ? T(0) : delta[i];
        } else {
            INDEPENDENT
            for (int64_t i = 0; i < count; ++i) delta[i] *= slope[i];
        }
    }
};

// work(copy, k), which returns an Outcome, for k < copies; the greatest of them.
template <class Work>
int for_each_copy(const Network& network, const int64_t slots, const int64_t copies,
                  [[maybe_unused]] const int threads, const Work& work) {
    const auto share = [&](const int64_t begin, const int64_t end) {
        int outcome = DONE;
        try {
            Copy copy(network, slots);
            for (int64_t k = begin; k < end; ++k) outcome = std::max(outcome, int(work(copy, k)));
        } catch (const std::bad_alloc&) {
            outcome = std::max(outcome, int(NO_MEMORY));
        }
        return outcome;
    };
#ifdef _OPENMP
    if (threads > 1 && copies > 1) {
        int outcome = DONE;
        #pragma omp parallel num_threads(threads) reduction(max: outcome)
        {
            const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
            outcome = share(copies * i / n, copies * (i + 1) / n);
        }
        return outcome;
    }
#endif
    return share(0, copies);
}

bool classes_exist(const Network& network, const int64_t* labels) {
    const uint64_t classes = uint64_t(network.sizes[network.layers]);
    bool exist = true;
    for (int64_t b = 0; b < network.batch; ++b) exist &= uint64_t(labels[b]) < classes;
    return exist;
}

}  // namespace

// Losses [copies] and gradients of copies on batches of their own: inputs [copies][batch][features], and labels
// [copies][batch] or targets [copies][batch][outputs].
extern "C" int gradients(const Network* network, const int64_t copies, const T* const* params, const T* inputs,
                         const int64_t* labels, const T* targets, T* losses, T* const* grads, const int threads) {
    const int64_t batch = network->batch, features = network->sizes[0], outputs = network->sizes[network->layers];
    return for_each_copy(*network, 0, copies, threads, [&](Copy& copy, const int64_t k) {
        const int64_t* own = labels ? labels + k * batch : nullptr;
        if (own && !classes_exist(*network, own)) return NO_SUCH_CLASS;
        copy.read(copy.numbers[0], params, k);
        losses[k] = copy.loss_and_gradients({inputs + k * batch * features, own, targets + k * batch * outputs});
        copy.write(copy.numbers[1], grads, k);
        return DONE;
    });
}

// Training runs: params and new_params are [2 * layers] addresses, slots and new_slots as many for each slot; inputs
// [examples][features], labels [examples] or targets [examples][outputs], indices [copies][steps][batch], coefficients
// [copies][steps][count]. What a copy whose `finite` is false has become is left as it is.
extern "C" int unroll(const Network* network, const int64_t copies, const int64_t steps, const T* const* params,
                      const int64_t slots, const T* const* old_slots, const int64_t examples, const T* inputs,
                      const int64_t* labels, const T* targets, const int64_t* indices, Update* update, const int64_t count,
                      const double* coefficients, T* losses, T* const* new_params, T* const* new_slots, bool* finite,
                      const int threads) {
    const int64_t batch = network->batch, features = network->sizes[0], outputs = network->sizes[network->layers];
    return for_each_copy(*network, slots, copies, threads, [&](Copy& copy, const int64_t k) {
        copy.read(copy.numbers[0], params, k);
        for (int64_t s = 0; s < slots; ++s) copy.read(copy.numbers[2 + s], old_slots + 2 * network->layers * s, k);
        finite[k] = true;
        for (int64_t t = k * steps; finite[k] && t < (k + 1) * steps; ++t) {
            for (int64_t b = 0; b < batch; ++b) {
                const int64_t row = indices[t * batch + b];
                if (uint64_t(row) >= uint64_t(examples)) return NO_SUCH_EXAMPLE;
                std::copy_n(inputs + row * features, features, copy.inputs + b * features);
                if (labels) copy.labels[b] = labels[row];
                else std::copy_n(targets + row * outputs, outputs, copy.targets + b * outputs);
            }
            if (labels && !classes_exist(*network, copy.labels.data())) return NO_SUCH_CLASS;
            losses[t] = copy.loss_and_gradients({copy.inputs, labels ? copy.labels.data() : nullptr, copy.targets});
            finite[k] = std::isfinite(losses[t]);
            update(1, (void* const*)copy.numbers.data(), &copy.size, coefficients + t * count, 0, 1);
        }
        copy.write(copy.numbers[0], new_params, k);
        for (int64_t s = 0; s < slots; ++s) copy.write(copy.numbers[2 + s], new_slots + 2 * network->layers * s, k);
        finite[k] = finite[k] && copy.are_finite(new_params, k);
        return DONE;
    });
}
