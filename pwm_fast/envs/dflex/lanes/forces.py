"""Forces of the ground and of joint springs."""

import warp as wp

from pwm_fast.envs.dflex.lanes.bundle import Bundle, public

# the tangential force is -slip * grip, grip = min(kf, mu ke depth / |slip|); slip below 1e-12 m/s has no direction
CONTACT = """
    float depth = x@1 < 0.0f ? -x@1 : 0.0f;
    float closing = u@1 < 0.0f ? -u@1 : 0.0f;
    float slip2 = u@0 * u@0 + u@2 * u@2;
    float inverse = slip2 > 1e-24f ? 1.0f / ROOT(slip2) : 0.0f;
    float cap = m.c[3] * m.c[0] * inverse;
    bool slides = cap * depth < m.c[2];
    float grip = slides ? cap * depth : m.c[2];
    float stiffness = m.c[0] + m.c[1] * closing;"""


def functions(bundle: Bundle) -> dict:
    """The functions of this room, by name."""
    Lane, Vec, Quat = bundle.Lane, bundle.Vec, bundle.Quat

    @wp.func_native(
        "int any = 0;"
        + bundle.loop("""float turned = r@3 * (r@2 * k.c[0] - r@0 * k.c[2])
                  + r@1 * (r@0 * k.c[0] + r@1 * k.c[1] + r@2 * k.c[2]);
                  float y = p@1 + k.c[1] * (2.0f * r@3 * r@3 - 1.0f) + 2.0f * turned - radius;
                  any |= y < 1e-5f;""")
        + "return any;",
        adj_snippet="",
    )
    def near_ground(r: Quat, p: Vec, k: wp.vec3, radius: float) -> int:
        """Whether, in any lane, the point k of the link (r, p) is at the ground or less than 1e-5 m above it.

        The margin keeps a lane's result independent of its neighbours: without it rounding would decide."""

    @bundle.func_native(
        3,
        CONTACT + "out@0 = -u@0 * grip; out@1 = depth * stiffness; out@2 = -u@2 * grip;",
        CONTACT
        + """
        float g0 = adj_ret@0, g1 = adj_ret@1, g2 = adj_ret@2;
        float g_grip = -(u@0 * g0 + u@2 * g2);
        float g_slide = slides ? g_grip : 0.0f;
        float g_depth = g1 * stiffness + g_slide * cap;
        float g_slip = -g_slide * cap * depth * inverse * inverse;
        adj_x@1 -= x@1 < 0.0f ? g_depth : 0.0f;
        adj_u@0 += u@0 * g_slip - g0 * grip;
        adj_u@1 -= u@1 < 0.0f ? g1 * depth * m.c[1] : 0.0f;
        adj_u@2 += u@2 * g_slip - g2 * grip;""",
    )
    def ground_force(x: Vec, u: Vec, m: wp.vec4) -> Vec:
        """Force of the ground on a point at x moving with u; m = (ke, kd, kf, mu)."""

    spring = """float below = k.c[2] - $x, above = $x - k.c[3];"""

    @bundle.func_native(
        1,
        spring
        + """$out = -k.c[0] * ($x - k.c[1])
               + limit_stiffness * ((below > 0.0f ? below : 0.0f) - (above > 0.0f ? above : 0.0f));""",
        spring + "$adj_x -= $adj_ret * (k.c[0] + (below > 0.0f || above > 0.0f ? limit_stiffness : 0.0f));",
    )
    def spring_force(x: Lane, k: wp.vec4, limit_stiffness: float) -> Lane:
        """Joint spring and limits; k = (stiffness, target, lower, upper)."""

    return public(locals())
