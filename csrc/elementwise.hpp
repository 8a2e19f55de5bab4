// The CPU kernels of pwm_fast.kernels: row-wise normalisation with Mish or SimNorm, two-hot heads, returns, Adam.
#pragma once

#include <pybind11/pybind11.h>

void register_elementwise(pybind11::module_& module);
