"""Rotations by quaternions (u, w), also by ones that are not normalised: v (2 w^2 - 1) + 2 w u x v + 2 u (u . v)."""

import re

import warp as wp

from pwm_fast.envs.dflex.lanes.bundle import Bundle, public

# sin(h), cos(h) of h = angle / 2 for any finite angle: reduced to |h| <= pi/2 (Cody-Waite), then Taylor, error < 1e-7
HALF_ANGLE = """
    float h = 0.5f * $angle;
    float n = FLOOR(h * 0.318309886183790672f + 0.5f);
    float f = 1.0f - 2.0f * (n - 2.0f * FLOOR(0.5f * n));
    h = (h - n * 3.140625f) - n * 9.67653589793e-4f;
    float h2 = h * h;
    float s = f * h * (1.0f + h2 * (-1.66666667e-1f + h2 * (8.33333333e-3f + h2 * (-1.98412698e-4f
            + h2 * (2.75573192e-6f + h2 * (-2.50521084e-8f + h2 * 1.60590438e-10f))))));
    float c = f * (1.0f + h2 * (-0.5f + h2 * (4.16666667e-2f + h2 * (-1.38888889e-3f + h2 * (2.48015873e-5f
            + h2 * (-2.75573192e-7f + h2 * 2.08767570e-9f))))));"""


def functions(bundle: Bundle) -> dict:
    """The functions of this room, by name."""
    Lane, Vec, Quat = bundle.Lane, bundle.Vec, bundle.Quat

    rotation = """float x = SIGN r@0, y = SIGN r@1, z = SIGN r@2, w = r@3;
        float k = 2.0f * w * w - 1.0f, d = 2.0f * (x * V0 + y * V1 + z * V2), t = 2.0f * w;
        float c0 = y * V2 - z * V1, c1 = z * V0 - x * V2, c2 = x * V1 - y * V0;"""
    rotation_forward = rotation + "out@0 = V0 * k + t * c0 + d * x; out@1 = V1 * k + t * c1 + d * y;"
    rotation_forward += "out@2 = V2 * k + t * c2 + d * z;"
    rotation_adjoint = (
        rotation
        + """
        float g0 = adj_ret@0, g1 = adj_ret@1, g2 = adj_ret@2;
        float e = 2.0f * (x * g0 + y * g1 + z * g2);
        adj_r@0 += SIGN (t * (V1 * g2 - V2 * g1) + d * g0 + e * V0);
        adj_r@1 += SIGN (t * (V2 * g0 - V0 * g2) + d * g1 + e * V1);
        adj_r@2 += SIGN (t * (V0 * g1 - V1 * g0) + d * g2 + e * V2);
        adj_r@3 += 4.0f * w * (V0 * g0 + V1 * g1 + V2 * g2) + 2.0f * (g0 * c0 + g1 * c1 + g2 * c2);"""
    )
    rotation_adjoint_v = """
        adj_v@0 += g0 * k + t * (g1 * z - g2 * y) + e * x;
        adj_v@1 += g1 * k + t * (g2 * x - g0 * z) + e * y;
        adj_v@2 += g2 * k + t * (g0 * y - g1 * x) + e * z;"""

    def rotation_of(v: str, sign: str, *parts: str) -> list[str]:
        return [re.sub(r"V(\d)", v, part).replace("SIGN", sign) for part in parts]

    @bundle.func_native(3, *rotation_of(r"p.c[\1]", "", rotation_forward, rotation_adjoint))
    def rotate_point(r: Quat, p: wp.vec3) -> Vec: ...

    @bundle.func_native(3, *rotation_of(r"v@\1", "", rotation_forward, rotation_adjoint + rotation_adjoint_v))
    def rotate(r: Quat, v: Vec) -> Vec: ...

    @bundle.func_native(3, *rotation_of(r"v@\1", "-", rotation_forward, rotation_adjoint + rotation_adjoint_v))
    def rotate_back(r: Quat, v: Vec) -> Vec: ...

    product_forward = """
        out@0 = a@3 * B0 + a@0 * B3 + a@1 * B2 - a@2 * B1;
        out@1 = a@3 * B1 + a@1 * B3 + a@2 * B0 - a@0 * B2;
        out@2 = a@3 * B2 + a@2 * B3 + a@0 * B1 - a@1 * B0;
        out@3 = a@3 * B3 - a@0 * B0 - a@1 * B1 - a@2 * B2;"""
    product_adjoint_a = """
        float g0 = adj_ret@0, g1 = adj_ret@1, g2 = adj_ret@2, g3 = adj_ret@3;
        adj_a@0 += g0 * B3 - g3 * B0 - g1 * B2 + g2 * B1;
        adj_a@1 += g1 * B3 - g3 * B1 - g2 * B0 + g0 * B2;
        adj_a@2 += g2 * B3 - g3 * B2 - g0 * B1 + g1 * B0;
        adj_a@3 += g3 * B3 + g0 * B0 + g1 * B1 + g2 * B2;"""
    product_adjoint_b = """
        ADJ0 += a@3 * g0 - a@0 * g3 - a@1 * g2 + a@2 * g1;
        ADJ1 += a@3 * g1 - a@1 * g3 - a@2 * g0 + a@0 * g2;
        ADJ2 += a@3 * g2 - a@2 * g3 - a@0 * g1 + a@1 * g0;
        ADJ3 += a@3 * g3 + a@0 * g0 + a@1 * g1 + a@2 * g2;"""

    def product_of(b: str, *parts: str) -> list[str]:
        return [re.sub(r"B(\d)", b, part).replace("ADJ", "adj_b@") for part in parts]

    @bundle.func_native(4, *product_of(r"b@\1", product_forward, product_adjoint_a + product_adjoint_b))
    def product(a: Quat, b: Quat) -> Quat: ...

    @bundle.func_native(4, *product_of(r"b.c[\1]", product_forward, product_adjoint_a))
    def product_constant(a: Quat, b: wp.vec4) -> Quat: ...

    hinge_rotation = HALF_ANGLE + "float b0 = s * k.c[0], b1 = s * k.c[1], b2 = s * k.c[2], b3 = c;"
    hinge_forward, hinge_adjoint = (re.sub(r"B(\d)", r"b\1", x) for x in (product_forward, product_adjoint_a))
    hinge_adjoint += "float j0 = 0.0f, j1 = 0.0f, j2 = 0.0f, j3 = 0.0f;" + product_adjoint_b.replace("ADJ", "j")
    hinge_adjoint += "$adj_angle += 0.5f * (c * (j0 * k.c[0] + j1 * k.c[1] + j2 * k.c[2]) - s * j3);"

    @bundle.func_native(4, hinge_rotation + hinge_forward, hinge_rotation + hinge_adjoint)
    def hinge(a: Quat, k: wp.vec3, angle: Lane) -> Quat:
        """a turned by ``angle`` about the local unit axis k."""

    turn_rate = """
        float b0 = a@0 + h * ( w@0 * a@3 + w@1 * a@2 - w@2 * a@1);
        float b1 = a@1 + h * ( w@1 * a@3 + w@2 * a@0 - w@0 * a@2);
        float b2 = a@2 + h * ( w@2 * a@3 + w@0 * a@1 - w@1 * a@0);
        float b3 = a@3 + h * (-w@0 * a@0 - w@1 * a@1 - w@2 * a@2);
        float k = 1.0f / ROOT(b0 * b0 + b1 * b1 + b2 * b2 + b3 * b3);
        b0 *= k; b1 *= k; b2 *= k; b3 *= k;"""

    @bundle.func_native(
        4,
        turn_rate + "out@0 = b0; out@1 = b1; out@2 = b2; out@3 = b3;",
        turn_rate
        + """
        float along = b0 * adj_ret@0 + b1 * adj_ret@1 + b2 * adj_ret@2 + b3 * adj_ret@3;
        float g0 = k * (adj_ret@0 - b0 * along), g1 = k * (adj_ret@1 - b1 * along);
        float g2 = k * (adj_ret@2 - b2 * along), g3 = k * (adj_ret@3 - b3 * along);
        adj_a@0 += g0 + h * (w@2 * g1 - w@1 * g2 - w@0 * g3);
        adj_a@1 += g1 + h * (w@0 * g2 - w@2 * g0 - w@1 * g3);
        adj_a@2 += g2 + h * (w@1 * g0 - w@0 * g1 - w@2 * g3);
        adj_a@3 += g3 + h * (w@0 * g0 + w@1 * g1 + w@2 * g2);
        adj_w@0 += h * (a@3 * g0 - a@2 * g1 + a@1 * g2 - a@0 * g3);
        adj_w@1 += h * (a@2 * g0 + a@3 * g1 - a@0 * g2 - a@1 * g3);
        adj_w@2 += h * (a@0 * g1 - a@1 * g0 + a@3 * g2 - a@2 * g3);""",
    )
    def turn(a: Quat, w: Vec, h: float) -> Quat:
        """normalise(a + h (w, 0) a): a after a time 2 h at the angular velocity w."""

    return public(locals())
