// Runs a fuzz target (fuzz_*.cpp) on random bytes: needs no clang, and the same seeds are the same inputs. A failure
// says which input it was. Built with the address and undefined-behaviour sanitizers by `make sanitize-random`.
//
//   random_bytes [inputs] [seed of the first one]
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// A sanitizer that has found something aborts too, so that the input is named.
extern "C" const char* __asan_default_options() { return "abort_on_error=1"; }

namespace {

volatile std::sig_atomic_t current_seed = 0;

void name_the_input(int) {
    std::fprintf(stderr, "failed on one input; repeat it with the arguments: 1 %d\n", current_seed);
    std::_Exit(1);
}

std::vector<uint8_t> input_of(int seed) {
    std::mt19937 random(static_cast<uint32_t>(seed));
    std::vector<uint8_t> bytes(random() % 401);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    return bytes;
}

}  // namespace

int main(int argc, char** argv) {
    const int inputs = argc > 1 ? std::atoi(argv[1]) : 1000;
    const int first = argc > 2 ? std::atoi(argv[2]) : 0;
    std::signal(SIGABRT, name_the_input);
    for (int seed = first; seed < first + inputs; ++seed) {
        current_seed = seed;
        const std::vector<uint8_t> bytes = input_of(seed);
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    std::printf("%s: %d random inputs, no finding\n", argv[0], inputs);
}
