// The Python module pwm_fast._native: each register_X lives beside what it registers.
#include <pybind11/pybind11.h>

void register_critic_epoch(pybind11::module_& module);
void register_dynamics_rollout(pybind11::module_& module);
void register_elementwise(pybind11::module_& module);
void register_gemm(pybind11::module_& module);
void register_sampling(pybind11::module_& module);
void register_scheduler(pybind11::module_& module);

PYBIND11_MODULE(_native, module) {
    module.doc() = "C++ backends of pwm_fast: episode sampling, the rollout scheduler and CPU kernels.";
    register_sampling(module);
    register_scheduler(module);
    register_elementwise(module);
    register_gemm(module);
    register_critic_epoch(module);
    register_dynamics_rollout(module);
}
