// The register machine of `metaopt.program.population`; `metaopt.program.population_cpp` puts the type T, and `execute` and
// `reduce`, which know the operations, before this text.
//
// A run belongs to one thread, so no result depends on their number. The thread goes through the run's code once for each
// block of elements, whose registers stay in the first-level cache; inputs are read where they lie. A reduction needs all of
// its operand: code that has some is cut behind each, all blocks pass through one part before the next begins, and the
// registers are as long as the run's row.

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr int64_t BLOCK = 2048 / sizeof(T);

struct Launch {
    int64_t count, size;      // runs, and the elements of each
    int64_t inputs, outputs;  // tensors [count][size] each
    int64_t longest, registers, width;  // instructions, registers and numbers that a run has at most
    int64_t segments;
    const int64_t* sizes;         // [segments], of the tensors in a run's row
    const int64_t* programs;      // [count]
    const int32_t* instructions;  // [programs][longest][5]
    const int32_t* lengths;       // [programs]
    const int32_t* results;       // [programs][outputs], an operand each
    const int32_t* present;       // [programs], of the outputs
    const T* numbers;             // [count][width]
    T* const* sources;            // [inputs], only read
    T* const* targets;            // [outputs], which may be inputs
};

// Element 0 of a value: of the run if it moves, which a block's part of it is then found from, else of the block.
struct Place {
    T* at;  // null: a number
    T number;
    bool moves;
    Operand of(const int64_t begin) const { return {at && moves ? at + begin : at, number}; }
};

struct Instruction {
    int32_t opcode;
    Place target;
    Place operands[3];
};

struct Copy {
    T* to;
    bool moves;
    Place from;
};

class Thread {
public:
    explicit Thread(const Launch& launch) : launch(launch), registers(launch.registers) {}

    void run(const int64_t r) {
        const int64_t program = launch.programs[r];
        const int32_t* const code = launch.instructions + program * launch.longest * 5;
        const int64_t length = launch.lengths[program];
        bool whole = false;
        for (int64_t k = 0; k < length; ++k) whole |= code[5 * k] >= FIRST_REDUCTION;
        const int64_t blocks = (launch.size + BLOCK - 1) / BLOCK;
        reserve(launch.registers * BLOCK * (whole ? blocks : 1));
        resolve(r, program, code, length, whole, whole ? blocks * BLOCK : BLOCK);
        for (int64_t from = 0;;) {
            int64_t to = from;
            while (to < length && instructions[to].opcode < FIRST_REDUCTION) ++to;
            for (int64_t begin = 0; begin < launch.size; begin += BLOCK) {
                const int64_t count = std::min(BLOCK, launch.size - begin);
                for (int64_t k = from; k < to; ++k) step(instructions[k], begin, count);
                if (to == length)
                    for (const Copy& copy : copies) store(copy, begin, count);
            }
            if (to == length) return;
            const Instruction& last = instructions[to];
            reduce(last.opcode, last.operands[0].at, last.target.at, launch.size, launch.segments, launch.sizes);
            from = to + 1;
        }
    }

private:
    const Launch& launch;
    std::vector<Place> registers;  // where the values are that they hold now
    std::vector<Instruction> instructions;
    std::vector<Copy> copies;
    std::unique_ptr<T[]> memory;
    int64_t reserved = 0;

    void reserve(const int64_t count) {
        if (count <= reserved) return;
        memory.reset(new T[count]);
        reserved = count;
    }

    // Where each instruction of run r finds its operands, and what has to be copied at the end of a block.
    void resolve(const int64_t r, const int64_t program, const int32_t* code, const int64_t length, const bool whole,
                 const int64_t stride) {
        const T* const numbers = launch.numbers + r * launch.width;
        const auto place = [&](const int32_t k) { return k < 0 ? Place{nullptr, numbers[~k], false} : registers[k]; };
        const auto own = [&](const int32_t k) { return Place{memory.get() + k * stride, T(0), whole}; };
        for (int64_t k = 0; k < launch.inputs; ++k) registers[k] = {launch.sources[k] + r * launch.size, T(0), true};
        instructions.resize(length);
        for (int64_t k = 0; k < length; ++k, code += 5) {
            Instruction& made = instructions[k];
            made.opcode = code[0];
            for (int i = 0; i < 3; ++i) made.operands[i] = place(code[2 + i]);
            made.target = registers[code[1]] = own(code[1]);
        }
        const int32_t* const last = launch.results + program * launch.outputs;
        const int64_t present = launch.present[program];
        copies.clear();
        for (int64_t k = 0; k < present; ++k) {  // an input that another output may overwrite
            const Place from = place(last[k]);
            if (last[k] >= launch.inputs || !from.at || from.at != launch.sources[last[k]] + r * launch.size) continue;
            if (from.at == launch.targets[k] + r * launch.size) continue;
            const Place to = registers[last[k]] = own(last[k]);
            copies.push_back({to.at, to.moves, from});
        }
        for (int64_t k = 0; k < present; ++k) {
            const Place from = place(last[k]);
            T* const to = launch.targets[k] + r * launch.size;
            if (from.at != to) copies.push_back({to, true, from});
        }
    }

    static void step(const Instruction& it, const int64_t begin, const int64_t count) {
        const Operand operands[3] = {it.operands[0].of(begin), it.operands[1].of(begin), it.operands[2].of(begin)};
        execute(it.opcode, it.target.at + (it.target.moves ? begin : 0), count, operands);
    }

    static void store(const Copy& copy, const int64_t begin, const int64_t count) {
        const Operand from = copy.from.of(begin);
        T* const to = copy.to + (copy.moves ? begin : 0);
        if (from.at)
            std::copy(from.at, from.at + count, to);
        else
            std::fill(to, to + count, from.number);
    }
};

}  // namespace

// One step of all runs. Returns 0, or 1 if there is no memory for registers.
extern "C" int step(const Launch* launch, [[maybe_unused]] const int threads) {
    const auto share = [&](const int64_t begin, const int64_t end) {
        try {
            Thread thread(*launch);
            for (int64_t r = begin; r < end; ++r) thread.run(r);
        } catch (const std::bad_alloc&) {
            return 1;
        }
        return 0;
    };
#ifdef _OPENMP
    if (threads > 1 && launch->count > 1 && launch->count * launch->size >= SERIAL_BELOW) {
        int outcome = 0;
        #pragma omp parallel num_threads(threads) reduction(max: outcome)
        {
            const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
            outcome = share(launch->count * i / n, launch->count * (i + 1) / n);
        }
        return outcome;
    }
#endif
    return share(0, launch->count);
}
