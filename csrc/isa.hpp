// Which instruction set the CPU kernels use: the best that this machine runs, or one that is forced.
#pragma once

#include <string>
#include <vector>

namespace pwm_fast {

enum class Isa { portable, avx2, avx512, avx512bf16, amx };  // each has what those before it have

const char* name_of(Isa isa);

// What this machine can run, best first.
const std::vector<Isa>& available_isas();

// The instruction set in use. Raises std::invalid_argument where $PWM_FAST_ISA asks for one that cannot run here.
Isa selected_isa();

// Whether the instruction set was asked for, by set_isa or $PWM_FAST_ISA.
bool isa_is_forced();

// Raises std::invalid_argument where this machine lacks it.
void set_isa(const std::string& name);

}  // namespace pwm_fast
