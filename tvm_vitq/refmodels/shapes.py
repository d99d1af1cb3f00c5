"""The twelve outlines of the procedural images, as signed distances (negative inside) on the unit disc.

Every outline takes one proportion in [0, 1] per image (how thick an arm, how long an axis); training and test
images draw it from disjoint intervals.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _polygon(vertices: Callable[[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]) -> Distance:
    """Signed distance to a polygon: nearest edge, sign by the even-odd rule (crossings of a ray along x)."""

    def distance(x: np.ndarray, y: np.ndarray, t: np.ndarray) -> np.ndarray:
        t = t[:, None, None]
        corners = vertices(t)
        nearest = np.full(x.shape, np.inf, np.float32)
        inside = np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            ex, ey = bx - ax, by - ay
            wx, wy = x - ax, y - ay
            along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
            crosses = (wy < 0) != (y < by)
            inside ^= crosses & ((ex * wy - ey * wx > 0) == (ey > 0)) & (ey != 0)
        return np.where(inside, -np.sqrt(nearest), np.sqrt(nearest))

    return distance


def _points(*pairs: tuple[object, object]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs]


def _disc(x: np.ndarray, y: np.ndarray, t: np.ndarray) -> np.ndarray:
    squeeze = (0.8 + 0.2 * t)[:, None, None]
    return (np.hypot(x, y / squeeze) - 0.9) * squeeze


def _ring(x: np.ndarray, y: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.68) - (0.2 + 0.1 * t)[:, None, None]


def _crescent(x: np.ndarray, y: np.ndarray, t: np.ndarray) -> np.ndarray:
    bite = np.hypot(x - (0.45 + 0.2 * t)[:, None, None], y) - 0.75
    return np.maximum(np.hypot(x, y) - 0.95, -bite)


def _triangle(t):
    return _points((0 * t, -1 + 0 * t), (0.72 + 0.2 * t, 0.75 + 0 * t), (-0.72 - 0.2 * t, 0.75 + 0 * t))


def _box(half_width, half_height):
    return _points(
        (half_width, half_height),
        (half_width, -half_height),
        (-half_width, -half_height),
        (-half_width, half_height),
    )


def _star(t):
    tips = []
    for k in range(10):
        angle = np.pi * k / 5
        radius = 1 + 0 * t if k % 2 == 0 else 0.36 + 0.12 * t
        tips.append((np.sin(angle) * radius, -np.cos(angle) * radius))
    return _points(*tips)


def _plus(t):
    a, one = 0.24 + 0.12 * t, 0.95 + 0 * t
    return _points(
        (a, one), (a, a), (one, a), (one, -a), (a, -a), (a, -one),
        (-a, -one), (-a, -a), (-one, -a), (-one, a), (-a, a), (-a, one),
    )  # fmt: skip


def _heart(t):
    outline = []
    for angle in np.linspace(0, 2 * np.pi, 20, endpoint=False):
        height = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
        outline.append(((0.9 + 0.2 * t) * np.sin(angle) ** 3 * 0.95, -height / 17 + 0 * t))
    return _points(*outline)


def _tee(t):
    a, one = 0.2 + 0.12 * t, 0.9 + 0 * t
    return _points(
        (one, -one), (one, -one + 2 * a), (a, -one + 2 * a), (a, one),
        (-a, one), (-a, -one + 2 * a), (-one, -one + 2 * a), (-one, -one),
    )  # fmt: skip


def _ell(t):
    a, w, h = 0.4 + 0.24 * t, 0.62 + 0 * t, 0.95 + 0 * t
    return _points((-w, -h), (-w + a, -h), (-w + a, h - a), (w, h - a), (w, h), (-w, h))


def _arrow(t):
    a, one = 0.18 + 0.14 * t, 1 + 0 * t
    return _points(
        (0 * t, -one), (0.8 * one, -0.1 * one), (a, -0.1 * one), (a, one),
        (-a, one), (-a, -0.1 * one), (-0.8 * one, -0.1 * one),
    )  # fmt: skip


SHAPES: dict[str, Distance] = {
    "disc": _disc,
    "ring": _ring,
    "crescent": _crescent,
    "triangle": _polygon(_triangle),
    "square": _polygon(lambda t: _box(0.68 + 0.12 * t, 0.8 + 0 * t)),
    "bar": _polygon(lambda t: _box(0.26 + 0.14 * t, 1 + 0 * t)),
    "star": _polygon(_star),
    "plus": _polygon(_plus),
    "heart": _polygon(_heart),
    "tee": _polygon(_tee),
    "ell": _polygon(_ell),
    "arrow": _polygon(_arrow),
}
