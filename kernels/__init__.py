"""Fused operations, one file per op: the plain-torch definition first, then the faster backends tested against it.
Installed as `pwm_fast.kernels`."""
