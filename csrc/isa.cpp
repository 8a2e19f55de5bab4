#include "isa.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#ifdef PWM_FAST_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pwm_fast {
namespace {

struct Selection {
    Isa isa;
    bool forced;
};

Isa find(const std::string& name, const char* asked_by) {
    std::string known;
    for (const Isa isa : available_isas()) {
        if (name == name_of(isa)) return isa;
        known += std::string(known.empty() ? "" : ", ") + name_of(isa);
    }
    throw std::invalid_argument(std::string(asked_by) + " '" + name + "' cannot run here; available: " + known);
}

#ifdef PWM_FAST_AMX
// Tiles of bfloat16, AVX512-BF16 beside them, and the system's leave to use them: Linux gives the tiles' 8 KB of registers
// to a process that asks for them.
bool has_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = (d >> 22 & 1) && (d >> 24 & 1);
    if (!tiles || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
    constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

Selection& selection() {
    static Selection chosen = [] {
        const char* const wanted = std::getenv("PWM_FAST_ISA");
        if (wanted == nullptr || *wanted == 0) return Selection{available_isas().front(), false};
        return Selection{find(wanted, "PWM_FAST_ISA: instruction set"), true};
    }();
    return chosen;
}

}  // namespace

const char* name_of(Isa isa) {
    constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
    return names[static_cast<int>(isa)];
}

const std::vector<Isa>& available_isas() {
    static const std::vector<Isa> list = [] {
        std::vector<Isa> found;
#ifdef PWM_FAST_X86
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#ifdef PWM_FAST_AMX
        if (avx2 && avx512 && has_amx()) found.push_back(Isa::amx);
#endif
#ifdef PWM_FAST_AVX512BF16
        if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(Isa::avx512bf16);
#endif
        if (avx2 && avx512) found.push_back(Isa::avx512);
        // On Intel's cores dpbf16ps takes more than twice a multiply-add's time (bench/test_native.py): there
        // it is better to make floats of pairs.
        const auto pairs = std::find(found.begin(), found.end(), Isa::avx512bf16);
        if (pairs != found.end() && __builtin_cpu_is("intel")) std::rotate(pairs, pairs + 1, found.end());
        if (avx2) found.push_back(Isa::avx2);
#endif
        found.push_back(Isa::portable);
        return found;
    }();
    return list;
}

Isa selected_isa() { return selection().isa; }

bool isa_is_forced() { return selection().forced; }

void set_isa(const std::string& name) {
    selection() = {find(name, "instruction set"), true};
}

}  // namespace pwm_fast
