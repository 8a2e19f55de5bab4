"""Vectors: packing, products, lengths."""

import warp as wp

from pwm_fast.envs.dflex.lanes.bundle import Bundle, public


def functions(bundle: Bundle) -> dict:
    """The functions of this room, by name."""
    Lane, Vec, Quat = bundle.Lane, bundle.Vec, bundle.Quat

    @bundle.func_native(
        3,
        "out@0 = $a; out@1 = $b; out@2 = $c;",
        "$adj_a += adj_ret@0; $adj_b += adj_ret@1; $adj_c += adj_ret@2;",
    )
    def vec(a: Lane, b: Lane, c: Lane) -> Vec: ...

    @bundle.func_native(
        4,
        "out@0 = $a; out@1 = $b; out@2 = $c; out@3 = $d;",
        "$adj_a += adj_ret@0; $adj_b += adj_ret@1; $adj_c += adj_ret@2; $adj_d += adj_ret@3;",
    )
    def quat(a: Lane, b: Lane, c: Lane, d: Lane) -> Quat: ...

    @bundle.func_native(
        3,
        """out@0 = a@1 * b@2 - a@2 * b@1;
           out@1 = a@2 * b@0 - a@0 * b@2;
           out@2 = a@0 * b@1 - a@1 * b@0;""",
        """float g0 = adj_ret@0, g1 = adj_ret@1, g2 = adj_ret@2;
           adj_a@0 += b@1 * g2 - b@2 * g1; adj_a@1 += b@2 * g0 - b@0 * g2; adj_a@2 += b@0 * g1 - b@1 * g0;
           adj_b@0 += g1 * a@2 - g2 * a@1; adj_b@1 += g2 * a@0 - g0 * a@2; adj_b@2 += g0 * a@1 - g1 * a@0;""",
    )
    def cross(a: Vec, b: Vec) -> Vec: ...

    @bundle.func_native(
        1,
        "$out = a@0 * b@0 + a@1 * b@1 + a@2 * b@2 + c@0 * d@0 + c@1 * d@1 + c@2 * d@2;",
        """float g = $adj_ret;
           adj_a@0 += g * b@0; adj_a@1 += g * b@1; adj_a@2 += g * b@2;
           adj_b@0 += g * a@0; adj_b@1 += g * a@1; adj_b@2 += g * a@2;
           adj_c@0 += g * d@0; adj_c@1 += g * d@1; adj_c@2 += g * d@2;
           adj_d@0 += g * c@0; adj_d@1 += g * c@1; adj_d@2 += g * c@2;""",
    )
    def power(a: Vec, b: Vec, c: Vec, d: Vec) -> Lane:
        """a . b + c . d: a motion (a, c) against a wrench (b, d)."""

    @bundle.func_native(
        3,
        "out@0 = a@0 * $s; out@1 = a@1 * $s; out@2 = a@2 * $s;",
        """adj_a@0 += adj_ret@0 * $s; adj_a@1 += adj_ret@1 * $s; adj_a@2 += adj_ret@2 * $s;
           $adj_s += a@0 * adj_ret@0 + a@1 * adj_ret@1 + a@2 * adj_ret@2;""",
    )
    def scale(a: Vec, s: Lane) -> Vec: ...

    @bundle.func_native(
        3,
        "out@0 = a@0 + k.c[0]; out@1 = a@1 + k.c[1]; out@2 = a@2 + k.c[2];",
        "adj_a@0 += adj_ret@0; adj_a@1 += adj_ret@1; adj_a@2 += adj_ret@2;",
    )
    def shift(a: Vec, k: wp.vec3) -> Vec: ...

    @bundle.func_native(
        3,
        """float square = a@0 * a@0 + a@1 * a@1 + a@2 * a@2;
           float k = square > 0.0f ? $s / ROOT(square) : 0.0f;
           out@0 = a@0 * k; out@1 = a@1 * k; out@2 = a@2 * k;""",
        """float square = a@0 * a@0 + a@1 * a@1 + a@2 * a@2;
           float k = square > 0.0f ? 1.0f / ROOT(square) : 0.0f;
           float x = a@0 * k, y = a@1 * k, z = a@2 * k;
           float along = x * adj_ret@0 + y * adj_ret@1 + z * adj_ret@2;
           $adj_s += along;
           k *= $s;
           adj_a@0 += k * (adj_ret@0 - x * along);
           adj_a@1 += k * (adj_ret@1 - y * along);
           adj_a@2 += k * (adj_ret@2 - z * along);""",
    )
    def along(a: Vec, s: Lane) -> Vec:
        """s times the unit vector of a; 0 for a = 0."""

    return public(locals())
