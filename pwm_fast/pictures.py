"""The pictures of a run: `curve` (return against time) and `rollout_gif` (the robot moving)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pwm_fast.state_files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRAMES_PER_SECOND = 25
CONTROL_RATE_HZ = 60
GIF_LIMIT_BYTES = 3_000_000
INK, FAINT, GRID = "#22303c", "#8a97a3", "#e6eaee"
REAL, IMAGINED, KEPT = "#0b7a75", "#c4582b", "#b8860b"


@dataclass(frozen=True)
class Series:
    """One line: values against minutes since the start of the run."""

    label: str
    minutes: Sequence[float]
    values: Sequence[float]


def series(rows: Iterable[Mapping[str, Any]], column: str) -> list[Series]:
    """The values of one column of metrics.csv against its `minutes`, a line per `seed` (and `task`, of several)."""
    found: dict[Any, list[tuple[float, float]]] = {}
    for row in rows:
        value = row.get(column)
        if isinstance(value, (int, float)) and np.isfinite(value) and "minutes" in row:
            found.setdefault((row.get("task", ""), row.get("seed", 0)), []).append((row["minutes"], value))
    lines = sorted(found.items())
    return [Series(f"{task} seed {seed}".strip(), *map(list, zip(*points))) for (task, seed), points in lines]


def curve(
    path: str | Path,
    title: str,
    real: Sequence[Series],
    imagined: Sequence[Series] = (),
    real_same_span: Sequence[Series] = (),
    levels: Mapping[str, float | None] | None = None,
) -> None:
    """Write a PNG: real return per seed and their mean above, imagined return below where there is one.

    A star marks each seed's best, which is the policy that a run keeps.

    `levels` are horizontal lines by label (paper, random, best in the data, behaviour cloning); None is left out.
    `real_same_span` is the real return over as many steps as were imagined: the gap is the model's error.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
    }
    with plt.rc_context(style):
        below = bool(imagined or real_same_span)
        figure, axes = plt.subplots(
            1 + below,
            1,
            figsize=(8.6, 5.6 if below else 4.4),
            sharex=True,
            squeeze=False,
            gridspec_kw={"height_ratios": [2.6, 1][: 1 + below], "hspace": 0.16},
        )
        top = axes[0, 0]
        _lines(top, real, REAL, "real return")
        _best(top, real)
        _levels(top, {k: v for k, v in (levels or {}).items() if v is not None})
        top.set_ylabel("real return")
        top.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=12)
        bottom = axes[-1, 0]
        if below:
            _lines(bottom, imagined, IMAGINED, "imagined")
            _lines(bottom, real_same_span, REAL, "real, same steps")
            bottom.set_ylabel("imagined return")
            if imagined and real_same_span:
                bottom.legend(frameon=False, fontsize=8, loc="lower right")
        bottom.set_xlabel("minutes")
        for axis in axes[:, 0]:
            axis.grid(True, color=GRID, linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(length=0)
            axis.margins(x=0.02)
            axis.yaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:,.4g}" if abs(value) < 10 else f"{value:,.0f}")
            )
        if any(len(s.minutes) for s in [*real, *imagined]):
            bottom.set_xlim(left=0)
        figure.align_ylabels()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140, bbox_inches="tight", facecolor="white")
        plt.close(figure)
    with atomic_file(path) as file:
        file.write(buffer.getvalue())


def _lines(axis: Axes, lines: Sequence[Series], colour: str, label: str) -> None:
    """Each seed thin, their mean thick."""
    several = len(lines) > 1
    for line in lines:
        marker = "o" if len(line.values) <= 40 else None
        axis.plot(
            line.minutes,
            line.values,
            color=colour,
            linewidth=1.0 if several else 2.2,
            alpha=0.45 if several else 1.0,
            marker=marker,
            markersize=2.5 if several else 4,
            label=None if several else label,
        )
    if several:
        minutes, mean = _mean(lines)
        axis.plot(minutes, mean, color=colour, linewidth=2.4, label=f"{label}, mean of {len(lines)} seeds")
        if label == "real return":
            axis.legend(frameon=False, fontsize=8, loc="lower right")


def _best(axis: Axes, lines: Sequence[Series]) -> None:
    """A star on each seed's highest value: the policy that is kept."""
    points = [(line.minutes[int(np.argmax(line.values))], max(line.values)) for line in lines if len(line.values)]
    if points:
        minutes, values = zip(*points)
        axis.scatter(minutes, values, marker="*", s=130, color=KEPT, edgecolor="white", linewidth=0.8, zorder=5)
        minute, value = max(points, key=lambda point: point[1])
        late = minute > 0.7 * max(line.minutes[-1] for line in lines if len(line.minutes))
        axis.annotate(
            f"kept: {value:,.0f}",
            (minute, value),
            xytext=(-7 if late else 7, 6),
            textcoords="offset points",
            ha="right" if late else "left",
            fontsize=8.5,
            color=KEPT,
            fontweight="bold",
        )


def _mean(lines: Sequence[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds at all times that lie within every seed's line."""
    first, last = max(s.minutes[0] for s in lines), min(s.minutes[-1] for s in lines)
    times = np.unique(np.concatenate([np.asarray(s.minutes, dtype=float) for s in lines]))
    times = times[(times >= first) & (times <= last)]
    return times, np.mean([np.interp(times, s.minutes, s.values) for s in lines], axis=0)


def _levels(axis: Axes, levels: Mapping[str, float]) -> None:
    """Dashed lines with their names in the right margin, pushed apart where they would overlap."""
    if not levels:
        return
    for value in levels.values():
        axis.axhline(value, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    low, high = axis.get_ylim()
    gap = 0.055 * (high - low)
    placed = float("-inf")
    for label, value in sorted(levels.items(), key=lambda item: item[1]):
        placed = max(value, placed + gap)
        axis.annotate(
            f"{label}  {value:,.0f}",
            (1.0, value),
            xytext=(1.012, placed),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            fontsize=8.5,
            color="#5b6873",
            va="center",
            annotation_clip=False,
        )


def frame_indices(steps: int, seconds: float) -> np.ndarray:
    """Which of `steps` control steps (60 Hz) to show for real-time playback at 25 frames per second."""
    count = max(int(min(steps / CONTROL_RATE_HZ, seconds) * FRAMES_PER_SECOND), 1)
    return np.minimum(np.round(np.arange(count) * CONTROL_RATE_HZ / FRAMES_PER_SECOND).astype(int), steps - 1)


def write_gif(path: str | Path, frames: np.ndarray, limit: int = GIF_LIMIT_BYTES) -> None:
    """Frames uint8 [T, H, W, 3] as a looping GIF below `limit` bytes (fewer colours, then a smaller picture)."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    durations = [1000 // FRAMES_PER_SECOND] * (len(images) - 1) + [700]
    content = b""
    for colours, scale in ((128, 1.0), (64, 1.0), (48, 0.75), (32, 0.5)):
        size = (round(images[0].width * scale), round(images[0].height * scale))
        scaled = images if scale == 1.0 else [image.resize(size, Image.Resampling.LANCZOS) for image in images]
        # One palette for all frames: colours do not flicker, and unchanged pixels stay out of the file.
        sample = Image.new("RGB", (size[0], size[1] * 3))
        for i, image in enumerate((scaled[0], scaled[len(scaled) // 2], scaled[-1])):
            sample.paste(image, (0, i * size[1]))
        palette = sample.quantize(colours, method=Image.Quantize.MEDIANCUT)
        indexed = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in scaled]
        buffer = io.BytesIO()
        indexed[0].save(
            buffer, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=False
        )
        content = buffer.getvalue()
        if len(content) < limit:
            break
    with atomic_file(path) as file:
        file.write(content)


def rollout_gif(path: str | Path, task: str, joint_q: np.ndarray, seconds: float = 7.0) -> None:
    """Write a GIF of a dflex task's robot from generalised positions joint_q [T, nq], in real time.

    Raises ValueError for an empty or wrongly shaped rollout.
    """
    from pwm_fast.envs.dflex import rendering

    joint_q = np.asarray(joint_q)
    if joint_q.ndim != 2 or not len(joint_q):
        raise ValueError(f"joint_q must be [T >= 1, nq], got shape {list(joint_q.shape)}")
    frames = rendering.render(task, joint_q[frame_indices(len(joint_q), seconds)])
    write_gif(path, np.asarray(frames))
