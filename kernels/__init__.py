"""One file per op: its plain-torch definition, its Triton kernels and the operators that launch them, explicit forward
and backward functions, and the choice of backend.

Rows come grouped, x [G, R, N]: G = 1 for the shared world model, P for actors, P * K for critics.
"""
