"""The packed mass matrix and its factor.

Row i is entries row[i] .. row[i + 1] - 1: first freedom i itself, then its ancestors upwards (list ``ancestor``).
These functions are not differentiated: dynamics.solve has an adjoint of its own.
"""

import warp as wp

from pwm_fast.envs.dflex.lanes.bundle import Bundle, public


def functions(bundle: Bundle) -> dict:
    """The functions of this room, by name."""
    Lane = bundle.Lane
    lanes, each_lane = bundle.lanes, bundle.each_lane

    @wp.func_native(f"""
        const int* rows = row.data; const int* up = ancestor.data;
        const int n = row.shape[0] - 1;
        auto* from = wp::address(H, g, 0);
        auto* to = wp::address(L, r, g, 0);
        for (int p = 0; p < rows[n]; ++p) {{ {each_lane} to[p].c[l] = from[p].c[l]; }}
        for (int k = n - 1; k >= 0; --k) {{
            float inverse[{lanes}], a[{lanes}];
            {each_lane} inverse[l] = 1.0f / to[rows[k]].c[l];
            for (int p = rows[k] + 1; p < rows[k + 1]; ++p) {{
                {each_lane} a[l] = to[p].c[l] * inverse[l];
                const int first = rows[up[p]];
                for (int s = 0; s < rows[k + 1] - p; ++s) {{
                    {each_lane} to[first + s].c[l] -= to[p + s].c[l] * a[l];
                }}
                {each_lane} to[p].c[l] = a[l];
            }}
            {each_lane} to[rows[k]].c[l] = inverse[l];
        }}""")
    def factorize(
        r: int,
        g: int,
        row: wp.array(dtype=int),
        ancestor: wp.array(dtype=int),
        H: wp.array2d(dtype=Lane),
        L: wp.array3d(dtype=Lane),
    ):
        """Sparse H = L^T D L along the tree (Featherstone 2008, section 6.5); 1 / D sits on L's diagonal."""

    @wp.func_native(f"""
        const int* rows = row.data; const int* up = ancestor.data;
        const int n = row.shape[0] - 1;
        auto* factor = wp::address(L, r, g, 0);
        auto* from = wp::address(b, t, 0);
        auto* to = wp::address(x, t, 0);
        for (int i = 0; i < n; ++i) {{ {each_lane} to[i].c[l] = from[i].c[l]; }}
        for (int i = n - 1; i >= 0; --i) {{
            float a[{lanes}];
            {each_lane} a[l] = to[i].c[l];
            for (int p = rows[i] + 1; p < rows[i + 1]; ++p) {{
                auto* target = to + up[p];
                {each_lane} target->c[l] -= factor[p].c[l] * a[l];
            }}
        }}
        for (int i = 0; i < n; ++i) {{
            float a[{lanes}];
            {each_lane} a[l] = to[i].c[l] * factor[rows[i]].c[l];
            for (int p = rows[i] + 1; p < rows[i + 1]; ++p) {{
                auto* source = to + up[p];
                {each_lane} a[l] -= factor[p].c[l] * source->c[l];
            }}
            {each_lane} to[i].c[l] = a[l];
        }}""")
    def back_substitute(
        r: int,
        g: int,
        t: int,
        row: wp.array(dtype=int),
        ancestor: wp.array(dtype=int),
        L: wp.array3d(dtype=Lane),
        b: wp.array2d(dtype=Lane),
        x: wp.array2d(dtype=Lane),
    ):
        """x = H^-1 b with the factor L[r, g]."""

    @wp.func_native(f"""
        const int* rows = row.data; const int* up = ancestor.data;
        const int n = row.shape[0] - 1;
        auto* to = wp::address(H_grad, g, 0);
        auto* xs = wp::address(x, t, 0);
        auto* ys = wp::address(y, t, 0);
        auto* gx = wp::address(x_grad, t, 0);
        auto* gb = wp::address(b_grad, t, 0);
        for (int i = 0; i < n; ++i) {{
            auto* xi = xs + i; auto* yi = ys + i;
            {each_lane} gx[i].c[l] = 0.0f;
            {each_lane} gb[i].c[l] += yi->c[l];
            {each_lane} to[rows[i]].c[l] -= yi->c[l] * xi->c[l];
            for (int p = rows[i] + 1; p < rows[i + 1]; ++p) {{
                auto* xa = xs + up[p]; auto* ya = ys + up[p];
                {each_lane} to[p].c[l] -= yi->c[l] * xa->c[l] + ya->c[l] * xi->c[l];
            }}
        }}""")
    def spread_solve_gradient(
        g: int,
        t: int,
        row: wp.array(dtype=int),
        ancestor: wp.array(dtype=int),
        x: wp.array2d(dtype=Lane),
        y: wp.array2d(dtype=Lane),
        x_grad: wp.array2d(dtype=Lane),
        b_grad: wp.array2d(dtype=Lane),
        H_grad: wp.array2d(dtype=Lane),
    ):
        """Adjoint of x = H^-1 b with y = H^-1 x_grad: b_grad += y, H_grad -= y x^T + x y^T (lower), x_grad = 0."""

    return public(locals())
