"""Types of a bundle, and how snippets become loops over its lanes."""

import re
from collections.abc import Callable

import warp as wp

# Loops over the lanes must reach LLVM's vectoriser whole: unrolled first, they compile for minutes and run slower.
COMPILER_FLAGS = "-march=native -mllvm=-inline-threshold=9000 -mllvm=-unroll-full-max-count=8"


class Bundle:
    """Types: ``Lane`` [lanes], ``Vec`` [3, lanes], ``Quat`` [4, lanes] (x, y, z, w), ``Mat`` [9, lanes] (row major) and
    ``Sym`` [6, lanes] (xx, yy, zz, xy, xz, yz). They add, subtract and scale by a float with the usual operators.

    Notation of snippets: ``$a`` is lane l of the Lane a, ``a@1`` lane l of row 1 of any other type. Arguments of plain
    Warp types (wp.vec3, float, ...) are constants of the model and get no gradient. ROOT and FLOOR: sqrt and floor.
    """

    def __init__(self, lanes: int):
        self.lanes = lanes
        self.Lane = wp.types.vector(length=lanes, dtype=wp.float32)
        self.Vec, self.Quat, self.Mat, self.Sym = (
            wp.types.matrix(shape=(rows, lanes), dtype=wp.float32) for rows in (3, 4, 9, 6)
        )
        self.each_lane = f'_Pragma("clang loop vectorize(assume_safety)") for (int l = 0; l < {lanes}; ++l)'

    @property
    def types(self) -> dict[str, type]:
        return {name: getattr(self, name) for name in ("Lane", "Vec", "Quat", "Mat", "Sym")}

    def loop(self, body: str) -> str:
        """The snippet ``body`` for every lane."""
        # the builtins become vector instructions, where libm calls would not (they may set errno)
        builtins = (
            ("__builtin_elementwise_sqrt", "__builtin_elementwise_floor") if self.lanes > 1 else ("sqrtf", "floorf")
        )
        body = body.replace("ROOT", builtins[0]).replace("FLOOR", builtins[1])
        body = re.sub(r"@(\d)", r".data[\1][l]", body)
        body = re.sub(r"\$(\w+)", r"\1.c[l]", body)
        return f"for (int l = 0; l < {self.lanes}; ++l) {{ {body} }}"

    def func_native(self, rows: int, body: str, adjoint: str) -> Callable:
        """Decorator: a function with a result of ``rows`` rows (1: a Lane) that ``body`` sets lane by lane as ``out``;
        ``adjoint`` adds to adj_<argument> from adj_ret. (Warp recognises native functions by this method's name.)"""
        kind = f"wp::vec_t<{self.lanes}, float>" if rows == 1 else f"wp::mat_t<{rows}, {self.lanes}, float>"
        return wp.func_native(f"{kind} out; {self.loop(body)} return out;", adj_snippet=self.loop(adjoint))


def public(names: dict) -> dict:
    """The Warp functions among a room's local names."""
    return {name: value for name, value in names.items() if isinstance(value, wp.Function)}
