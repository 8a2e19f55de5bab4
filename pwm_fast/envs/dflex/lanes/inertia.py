"""Matrices and inertia: what the composite-rigid-body mass matrix is made of."""

import re

import warp as wp

from pwm_fast.envs.dflex.lanes.bundle import Bundle, public

ENTRIES = ("00", "11", "22", "01", "02", "12")  # of the matrix that the rows of a Sym hold


def functions(bundle: Bundle) -> dict:
    """The functions of this room, by name."""
    Vec, Quat, Mat, Sym = bundle.Vec, bundle.Quat, bundle.Mat, bundle.Sym

    @bundle.func_native(
        9,
        """float x = r@0, y = r@1, z = r@2, w = r@3, k = 2.0f * w * w - 1.0f;
           out@0 = k + 2.0f * x * x;       out@1 = 2.0f * (x * y - w * z); out@2 = 2.0f * (x * z + w * y);
           out@3 = 2.0f * (x * y + w * z); out@4 = k + 2.0f * y * y;       out@5 = 2.0f * (y * z - w * x);
           out@6 = 2.0f * (x * z - w * y); out@7 = 2.0f * (y * z + w * x); out@8 = k + 2.0f * z * z;""",
        """float x = r@0, y = r@1, z = r@2, w = r@3;
           float xy = adj_ret@1 + adj_ret@3, xz = adj_ret@2 + adj_ret@6, yz = adj_ret@5 + adj_ret@7;
           float wx = adj_ret@7 - adj_ret@5, wy = adj_ret@2 - adj_ret@6, wz = adj_ret@3 - adj_ret@1;
           adj_r@0 += 2.0f * (2.0f * x * adj_ret@0 + y * xy + z * xz + w * wx);
           adj_r@1 += 2.0f * (2.0f * y * adj_ret@4 + x * xy + z * yz + w * wy);
           adj_r@2 += 2.0f * (2.0f * z * adj_ret@8 + x * xz + y * yz + w * wz);
           adj_r@3 += 2.0f * (2.0f * w * (adj_ret@0 + adj_ret@4 + adj_ret@8) + x * wx + y * wy + z * wz);""",
    )
    def matrix(r: Quat) -> Mat: ...

    @bundle.func_native(
        3,
        """out@0 = m@0 * v@0 + m@1 * v@1 + m@2 * v@2; out@1 = m@3 * v@0 + m@4 * v@1 + m@5 * v@2;
           out@2 = m@6 * v@0 + m@7 * v@1 + m@8 * v@2;""",
        """float g0 = adj_ret@0, g1 = adj_ret@1, g2 = adj_ret@2;
           adj_m@0 += g0 * v@0; adj_m@1 += g0 * v@1; adj_m@2 += g0 * v@2;
           adj_m@3 += g1 * v@0; adj_m@4 += g1 * v@1; adj_m@5 += g1 * v@2;
           adj_m@6 += g2 * v@0; adj_m@7 += g2 * v@1; adj_m@8 += g2 * v@2;
           adj_v@0 += m@0 * g0 + m@3 * g1 + m@6 * g2; adj_v@1 += m@1 * g0 + m@4 * g1 + m@7 * g2;
           adj_v@2 += m@2 * g0 + m@5 * g1 + m@8 * g2;""",
    )
    def times(m: Mat, v: Vec) -> Vec: ...

    @bundle.func_native(
        3,
        """out@0 = m@0 * v@0 + m@3 * v@1 + m@6 * v@2; out@1 = m@1 * v@0 + m@4 * v@1 + m@7 * v@2;
           out@2 = m@2 * v@0 + m@5 * v@1 + m@8 * v@2;""",
        """float g0 = adj_ret@0, g1 = adj_ret@1, g2 = adj_ret@2;
           adj_m@0 += v@0 * g0; adj_m@1 += v@0 * g1; adj_m@2 += v@0 * g2;
           adj_m@3 += v@1 * g0; adj_m@4 += v@1 * g1; adj_m@5 += v@1 * g2;
           adj_m@6 += v@2 * g0; adj_m@7 += v@2 * g1; adj_m@8 += v@2 * g2;
           adj_v@0 += m@0 * g0 + m@1 * g1 + m@2 * g2; adj_v@1 += m@3 * g0 + m@4 * g1 + m@5 * g2;
           adj_v@2 += m@6 * g0 + m@7 * g1 + m@8 * g2;""",
    )
    def transposed_times(m: Mat, v: Vec) -> Vec: ...

    @bundle.func_native(
        3,
        """out@0 = k.data[0][0] * v@0 + k.data[0][1] * v@1 + k.data[0][2] * v@2;
           out@1 = k.data[1][0] * v@0 + k.data[1][1] * v@1 + k.data[1][2] * v@2;
           out@2 = k.data[2][0] * v@0 + k.data[2][1] * v@1 + k.data[2][2] * v@2;""",
        """float g0 = adj_ret@0, g1 = adj_ret@1, g2 = adj_ret@2;
           adj_v@0 += k.data[0][0] * g0 + k.data[1][0] * g1 + k.data[2][0] * g2;
           adj_v@1 += k.data[0][1] * g0 + k.data[1][1] * g1 + k.data[2][1] * g2;
           adj_v@2 += k.data[0][2] * g0 + k.data[1][2] * g1 + k.data[2][2] * g2;""",
    )
    def constant_times(k: wp.mat33, v: Vec) -> Vec: ...

    @bundle.func_native(
        3,
        """out@0 = s@0 * v@0 + s@3 * v@1 + s@4 * v@2; out@1 = s@3 * v@0 + s@1 * v@1 + s@5 * v@2;
           out@2 = s@4 * v@0 + s@5 * v@1 + s@2 * v@2;""",
        """float g0 = adj_ret@0, g1 = adj_ret@1, g2 = adj_ret@2;
           adj_s@0 += g0 * v@0; adj_s@1 += g1 * v@1; adj_s@2 += g2 * v@2;
           adj_s@3 += g0 * v@1 + g1 * v@0; adj_s@4 += g0 * v@2 + g2 * v@0; adj_s@5 += g1 * v@2 + g2 * v@1;
           adj_v@0 += s@0 * g0 + s@3 * g1 + s@4 * g2; adj_v@1 += s@3 * g0 + s@1 * g1 + s@5 * g2;
           adj_v@2 += s@4 * g0 + s@5 * g1 + s@2 * g2;""",
    )
    def symmetric_times(s: Sym, v: Vec) -> Vec: ...

    def constant(entry: re.Match) -> str:  # entry of a symmetric wp.mat33
        return "k.data[{}][{}]".format(*ENTRIES[int(entry[1])])

    about_a_point = """float x = c@0, y = c@1, z = c@2;
           out@0 = K0 + m * (y * y + z * z); out@1 = K1 + m * (x * x + z * z); out@2 = K2 + m * (x * x + y * y);
           out@3 = K3 - m * x * y; out@4 = K4 - m * x * z; out@5 = K5 - m * y * z;"""
    about_a_point_adjoint = """float x = c@0, y = c@1, z = c@2, f = 2.0f * m;
           float g3 = m * adj_ret@3, g4 = m * adj_ret@4, g5 = m * adj_ret@5;
           adj_c@0 += f * x * (adj_ret@1 + adj_ret@2) - y * g3 - z * g4;
           adj_c@1 += f * y * (adj_ret@0 + adj_ret@2) - x * g3 - z * g5;
           adj_c@2 += f * z * (adj_ret@0 + adj_ret@1) - x * g4 - y * g5;"""

    @bundle.func_native(6, re.sub(r"K(\d)", constant, about_a_point), about_a_point_adjoint)
    def parallel_axis_constant(k: wp.mat33, m: float, c: Vec) -> Sym:
        """Inertia k about the centre of mass, seen from c away: k + m (|c|^2 1 - c c^T)."""

    @bundle.func_native(
        6,
        re.sub(r"K(\d)", r"k@\1", about_a_point),
        about_a_point_adjoint + "".join(f"adj_k@{i} += adj_ret@{i};" for i in range(6)),
    )
    def parallel_axis(k: Sym, m: float, c: Vec) -> Sym: ...

    # with A = R S: result = A R^T; adj_S = R^T G R, adj_R = 2 G A (G the symmetric adjoint, off-diagonals halved)
    rows_of_a = """
        float a0 = r@0 * S0 + r@1 * S3 + r@2 * S4, a1 = r@0 * S3 + r@1 * S1 + r@2 * S5;
        float a2 = r@0 * S4 + r@1 * S5 + r@2 * S2;
        float b0 = r@3 * S0 + r@4 * S3 + r@5 * S4, b1 = r@3 * S3 + r@4 * S1 + r@5 * S5;
        float b2 = r@3 * S4 + r@4 * S5 + r@5 * S2;
        float c0 = r@6 * S0 + r@7 * S3 + r@8 * S4, c1 = r@6 * S3 + r@7 * S1 + r@8 * S5;
        float c2 = r@6 * S4 + r@7 * S5 + r@8 * S2;"""
    congruence_forward = (
        rows_of_a
        + """
        out@0 = a0 * r@0 + a1 * r@1 + a2 * r@2; out@1 = b0 * r@3 + b1 * r@4 + b2 * r@5;
        out@2 = c0 * r@6 + c1 * r@7 + c2 * r@8; out@3 = a0 * r@3 + a1 * r@4 + a2 * r@5;
        out@4 = a0 * r@6 + a1 * r@7 + a2 * r@8; out@5 = b0 * r@6 + b1 * r@7 + b2 * r@8;"""
    )
    congruence_adjoint = (
        rows_of_a
        + """
        float gx = 2.0f * adj_ret@0, gy = 2.0f * adj_ret@1, gz = 2.0f * adj_ret@2;
        float gxy = adj_ret@3, gxz = adj_ret@4, gyz = adj_ret@5;
        adj_r@0 += gx * a0 + gxy * b0 + gxz * c0; adj_r@1 += gx * a1 + gxy * b1 + gxz * c1;
        adj_r@2 += gx * a2 + gxy * b2 + gxz * c2;
        adj_r@3 += gxy * a0 + gy * b0 + gyz * c0; adj_r@4 += gxy * a1 + gy * b1 + gyz * c1;
        adj_r@5 += gxy * a2 + gy * b2 + gyz * c2;
        adj_r@6 += gxz * a0 + gyz * b0 + gz * c0; adj_r@7 += gxz * a1 + gyz * b1 + gz * c1;
        adj_r@8 += gxz * a2 + gyz * b2 + gz * c2;"""
    )
    congruence_adjoint_s = """
        float p0 = gx * r@0 + gxy * r@3 + gxz * r@6, p1 = gx * r@1 + gxy * r@4 + gxz * r@7;
        float p2 = gx * r@2 + gxy * r@5 + gxz * r@8;
        float q0 = gxy * r@0 + gy * r@3 + gyz * r@6, q1 = gxy * r@1 + gy * r@4 + gyz * r@7;
        float q2 = gxy * r@2 + gy * r@5 + gyz * r@8;
        float t0 = gxz * r@0 + gyz * r@3 + gz * r@6, t1 = gxz * r@1 + gyz * r@4 + gz * r@7;
        float t2 = gxz * r@2 + gyz * r@5 + gz * r@8;
        adj_s@0 += 0.5f * (r@0 * p0 + r@3 * q0 + r@6 * t0);
        adj_s@1 += 0.5f * (r@1 * p1 + r@4 * q1 + r@7 * t1);
        adj_s@2 += 0.5f * (r@2 * p2 + r@5 * q2 + r@8 * t2);
        adj_s@3 += r@0 * p1 + r@3 * q1 + r@6 * t1;
        adj_s@4 += r@0 * p2 + r@3 * q2 + r@6 * t2;
        adj_s@5 += r@1 * p2 + r@4 * q2 + r@7 * t2;"""

    @bundle.func_native(
        6,
        re.sub(r"S(\d)", r"s@\1", congruence_forward),
        re.sub(r"S(\d)", r"s@\1", congruence_adjoint) + congruence_adjoint_s,
    )
    def congruence(r: Mat, s: Sym) -> Sym:
        """R S R^T."""

    @bundle.func_native(6, *(re.sub(r"S(\d)", constant, x) for x in (congruence_forward, congruence_adjoint)))
    def congruence_constant(r: Mat, k: wp.mat33) -> Sym: ...

    @bundle.func_native(
        3,
        """out@0 = c@0 * (r@4 * r@8 - r@5 * r@7) + c@1 * (r@5 * r@6 - r@3 * r@8) + c@2 * (r@3 * r@7 - r@4 * r@6);
           out@1 = c@0 * (r@7 * r@2 - r@8 * r@1) + c@1 * (r@8 * r@0 - r@6 * r@2) + c@2 * (r@6 * r@1 - r@7 * r@0);
           out@2 = c@0 * (r@1 * r@5 - r@2 * r@4) + c@1 * (r@2 * r@3 - r@0 * r@5) + c@2 * (r@0 * r@4 - r@1 * r@3);""",
        """float g0 = adj_ret@0, g1 = adj_ret@1, g2 = adj_ret@2, x = c@0, y = c@1, z = c@2;
           adj_c@0 += g0 * (r@4 * r@8 - r@5 * r@7) + g1 * (r@7 * r@2 - r@8 * r@1) + g2 * (r@1 * r@5 - r@2 * r@4);
           adj_c@1 += g0 * (r@5 * r@6 - r@3 * r@8) + g1 * (r@8 * r@0 - r@6 * r@2) + g2 * (r@2 * r@3 - r@0 * r@5);
           adj_c@2 += g0 * (r@3 * r@7 - r@4 * r@6) + g1 * (r@6 * r@1 - r@7 * r@0) + g2 * (r@0 * r@4 - r@1 * r@3);
           adj_r@3 += g0 * (r@7 * z - r@8 * y); adj_r@4 += g0 * (r@8 * x - r@6 * z);
           adj_r@5 += g0 * (r@6 * y - r@7 * x);
           adj_r@6 += g0 * (y * r@5 - z * r@4); adj_r@7 += g0 * (z * r@3 - x * r@5);
           adj_r@8 += g0 * (x * r@4 - y * r@3);
           adj_r@6 += g1 * (r@1 * z - r@2 * y); adj_r@7 += g1 * (r@2 * x - r@0 * z);
           adj_r@8 += g1 * (r@0 * y - r@1 * x);
           adj_r@0 += g1 * (y * r@8 - z * r@7); adj_r@1 += g1 * (z * r@6 - x * r@8);
           adj_r@2 += g1 * (x * r@7 - y * r@6);
           adj_r@0 += g2 * (r@4 * z - r@5 * y); adj_r@1 += g2 * (r@5 * x - r@3 * z);
           adj_r@2 += g2 * (r@3 * y - r@4 * x);
           adj_r@3 += g2 * (y * r@2 - z * r@1); adj_r@4 += g2 * (z * r@0 - x * r@2);
           adj_r@5 += g2 * (x * r@1 - y * r@0);""",
    )
    def cofactor_times(r: Mat, c: Vec) -> Vec:
        """b with [b]x = R [c]x R^T, for any R."""

    return public(locals())
