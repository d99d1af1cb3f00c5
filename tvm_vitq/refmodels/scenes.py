"""Procedural images: 32x32 RGB, 36 classes (12 outlines x 3 surfaces), under heavy nuisance.

Colour, position, size, rotation, shear, background, clutter, occlusion, light, blur and sensor noise vary
freely. What a picture is made of comes from a `Source`; `TRAIN` and `TEST` share no background family, no
hue, no kind of clutter, no interval of proportions and no random stream, so that test accuracy measures
generalization.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tvm_vitq.refmodels.shapes import SHAPES

SIZE = 32
SURFACES = ("plain", "striped", "dotted")
CLASSES = tuple(f"{surface} {shape}" for shape in SHAPES for surface in SURFACES)
LEVELS = 32
"""Grey levels per channel: the camera's last step, which also lets the images compress well."""

MAX_TURN = np.float32(np.pi / 4)
"""Objects are turned by at most this angle either way."""

Intervals = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes
    ----------
    stream : first word of the random seed.
    hues : intervals of the hue circle (turns) for every colour.
    proportions : intervals of the outlines' parameter.
    backgrounds : names in `BACKGROUNDS`.
    clutter : (length, thickness) intervals of the strokes behind and before the object, in pixels.
    noise : largest standard deviation of the grey noise, of full scale.
    blur : largest weight of a neighbour in the blur.
    contrast : smallest difference in luminance between object and background.
    """

    stream: int
    hues: Intervals
    proportions: Intervals
    backgrounds: tuple[str, ...]
    clutter: tuple[tuple[float, float], tuple[float, float]]
    noise: float = 0.06
    blur: float = 0.2
    contrast: float = 0.16


TRAIN = Source(
    stream=1,
    hues=((0.00, 0.14), (0.26, 0.45), (0.58, 0.72), (0.84, 0.92)),
    proportions=((0.0, 0.35), (0.65, 1.0)),
    backgrounds=("flat", "ramp", "blotches", "waves", "patches"),
    clutter=((7.0, 14.0), (0.5, 1.1)),
)
TEST = Source(
    stream=2,
    hues=((0.15, 0.25), (0.46, 0.57), (0.73, 0.83), (0.93, 0.99)),
    proportions=((0.4, 0.6),),
    backgrounds=("rings", "fractal", "plaid"),
    clutter=((2.0, 5.0), (1.1, 1.7)),
)

_AXIS = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
_Y, _X = np.meshgrid(_AXIS, _AXIS, indexing="ij")


def _uniform(rng: np.random.Generator, n: int, low: float, high: float) -> np.ndarray:
    return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)


def _from_intervals(rng: np.random.Generator, n: int, intervals: Intervals) -> np.ndarray:
    """Uniform over a union of intervals."""
    low, high = np.array(intervals).T
    which = rng.choice(len(intervals), n, p=(high - low) / (high - low).sum())
    return (low[which] + rng.random(n) * (high - low)[which]).astype(np.float32)


def _rotated(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    turn = _uniform(rng, n, 0, 2 * np.pi)
    return np.cos(turn) * _X + np.sin(turn) * _Y, np.cos(turn) * _Y - np.sin(turn) * _X


def _value_noise(rng: np.random.Generator, n: int, cells: int) -> np.ndarray:
    """Random values on a grid of `cells`, interpolated with smoothstep; in [0, 1]."""
    grid = rng.random((n, cells + 1, cells + 1)).astype(np.float32)
    position = (np.arange(SIZE) + 0.5) * cells / SIZE
    cell = position.astype(int)
    step = (position - cell).astype(np.float32)
    step = step * step * (3 - 2 * step)
    rows = grid[:, cell] * (1 - step)[:, None] + grid[:, cell + 1] * step[:, None]
    return rows[:, :, cell] * (1 - step) + rows[:, :, cell + 1] * step


def _flat(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.broadcast_to(_uniform(rng, n, 0, 1), (n, SIZE, SIZE))


def _ramp(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.clip(0.5 + _rotated(rng, n)[0] / SIZE, 0, 1)


def _blotches(rng: np.random.Generator, n: int) -> np.ndarray:
    return _value_noise(rng, n, 3)


def _waves(rng: np.random.Generator, n: int) -> np.ndarray:
    along, across = _rotated(rng, n)
    bend = np.sin(across * _uniform(rng, n, 0.1, 0.3)) * 2
    return 0.5 + 0.5 * np.sin((along + bend) * _uniform(rng, n, 0.3, 0.7) + _uniform(rng, n, 0, 6.3))


def _patches(rng: np.random.Generator, n: int) -> np.ndarray:
    along, across = _rotated(rng, n)
    return ((along > _uniform(rng, n, -9, 9)) * 0.5 + (across > _uniform(rng, n, -9, 9)) * 0.5).astype(
        np.float32
    )


def _rings(rng: np.random.Generator, n: int) -> np.ndarray:
    radius = np.hypot(_X - _uniform(rng, n, -24, 24), _Y - _uniform(rng, n, -24, 24))
    return 0.5 + 0.5 * np.sin(radius * _uniform(rng, n, 0.3, 0.7))


def _fractal(rng: np.random.Generator, n: int) -> np.ndarray:
    return 0.6 * _value_noise(rng, n, 2) + 0.4 * _value_noise(rng, n, 7)


def _plaid(rng: np.random.Generator, n: int) -> np.ndarray:
    along, across = _rotated(rng, n)
    pitch = _uniform(rng, n, 0.25, 0.55)
    return 0.5 + 0.25 * (np.sin(along * pitch) + np.sin(across * pitch * _uniform(rng, n, 0.6, 1.4)))


BACKGROUNDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "flat": _flat,
    "ramp": _ramp,
    "blotches": _blotches,
    "waves": _waves,
    "patches": _patches,
    "rings": _rings,
    "fractal": _fractal,
    "plaid": _plaid,
}


def _colour(rng: np.random.Generator, source: Source, luminance: np.ndarray) -> np.ndarray:
    """RGB (n, 1, 1, 3) of the wanted luminance, hue from the source, free saturation."""
    n = len(luminance)
    hue = _from_intervals(rng, n, source.hues)[:, None, None, None] * np.float32(2 * np.pi)
    chroma = rng.uniform(0.03, 0.22, (n, 1, 1, 1)).astype(np.float32)
    return luminance[..., None] + chroma * np.cos(
        hue - np.float32(2 * np.pi / 3) * np.arange(3, dtype=np.float32)
    )


def _apart(rng: np.random.Generator, luminance: np.ndarray, low: float, high: float) -> np.ndarray:
    """A luminance between `low` and `high` away from the given one, on the side where there is room."""
    step = _uniform(rng, len(luminance), low, high)
    up = np.where(np.abs(luminance - 0.5) < 0.15, rng.random(luminance.shape) < 0.5, luminance < 0.5)
    return np.where(up, luminance + step, luminance - step).astype(np.float32)


def _strokes(rng: np.random.Generator, source: Source, image: np.ndarray, share: float) -> np.ndarray:
    """Draws one stroke of a random colour over a `share` of the images."""
    n = len(image)
    (short, long), (thin, thick) = source.clutter
    along, across = _rotated(rng, n)
    along, across = along - _uniform(rng, n, -14, 14), across - _uniform(rng, n, -14, 14)
    beyond = np.maximum(np.abs(along) - _uniform(rng, n, short / 2, long / 2), 0)
    cover = np.clip(0.5 + _uniform(rng, n, thin, thick) - np.hypot(beyond, across), 0, 1)
    cover = (cover * (rng.random((n, 1, 1)) < share))[..., None]
    return image + cover * (_colour(rng, source, _uniform(rng, n, 0.1, 0.9)) - image)


def _surface(rng: np.random.Generator, kind: np.ndarray) -> np.ndarray:
    """Share of the second colour in the object's surface: none, stripes, or dots on a turned lattice."""
    n = len(kind)
    pitch = 2 * np.pi / _uniform(rng, n, 4.2, 6.2)
    along, across = _rotated(rng, n)
    first = np.cos(along * pitch + _uniform(rng, n, 0, 6.3))
    second = np.cos(across * pitch + _uniform(rng, n, 0, 6.3))
    stripes = np.clip(0.5 + 1.6 * first, 0, 1)
    dots = np.clip(0.5 + 1.6 * (first + second - 0.45), 0, 1)
    return np.choose(kind[:, None, None], [np.zeros_like(stripes), stripes, dots])


def _coverage(rng: np.random.Generator, source: Source, shape: np.ndarray, severity: float) -> np.ndarray:
    """Share of every pixel covered by the object, (n, 32, 32)."""
    n = len(shape)
    scale = _uniform(rng, n, 8.5, 12.5)
    reach = (15.5 - scale) * severity
    along, across = _X - reach * _uniform(rng, n, -1, 1), _Y - reach * _uniform(rng, n, -1, 1)
    turn, stretch = MAX_TURN * severity * _uniform(rng, n, -1, 1), _uniform(rng, n, 0.88, 1.14)
    x = (np.cos(turn) * along + np.sin(turn) * across) / scale * stretch
    y = (np.cos(turn) * across - np.sin(turn) * along) / scale / stretch
    x = x + _uniform(rng, n, -0.15, 0.15) * y
    proportion = _from_intervals(rng, n, source.proportions)
    cover = np.zeros((n, SIZE, SIZE), np.float32)
    for index, distance in enumerate(SHAPES.values()):
        mine = np.flatnonzero(shape == index)
        cover[mine] = np.clip(0.5 - distance(x[mine], y[mine], proportion[mine]) * scale[mine], 0, 1)
    return cover


def _blurred(image: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Separable three-tap blur [w, 1 - 2w, w], edges repeated."""
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        wide = np.pad(image, pad, mode="edge")
        before, after = (np.take(wide, np.arange(SIZE) + shift, axis=axis) for shift in (0, 2))
        image = image + weight * (before + after - 2 * image)
    return image


def draw(source: Source, count: int, seed: int, severity: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """`count` images of the source's stream `seed`.

    `severity` scales the nuisance from 0 (upright, centred objects; no noise, blur or strokes) to 1.

    Returns
    -------
    images : uint8 (count, 32, 32, 3), multiples of 256 // LEVELS.
    labels : int64 (count,), indices into `CLASSES`; every class equally often up to one.
    """
    rng = np.random.Generator(np.random.PCG64([source.stream, seed]))
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(CLASSES))
    shape, kind = np.divmod(labels, len(SURFACES))

    base = _uniform(rng, count, 0.2, 0.8)
    family = rng.integers(len(source.backgrounds), size=count)
    field = np.empty((count, SIZE, SIZE), np.float32)
    for index, name in enumerate(source.backgrounds):
        mine = np.flatnonzero(family == index)
        field[mine] = BACKGROUNDS[name](rng, len(mine))
    near = _colour(rng, source, base)
    far = _colour(rng, source, base + _uniform(rng, count, -0.18, 0.18))
    image = near + field[..., None] * (far - near)
    for _ in range(3):
        image = _strokes(rng, source, image, 0.4 * severity)

    first = _apart(rng, base, source.contrast + 0.12 * (1 - severity), 0.45)
    second = _apart(rng, first, 0.16, 0.4)
    paint = _colour(rng, source, first)
    paint = paint + _surface(rng, kind)[..., None] * (_colour(rng, source, second) - paint)
    image = image + _coverage(rng, source, shape, severity)[..., None] * (paint - image)
    image = _strokes(rng, source, image, 0.5 * severity)

    light = 1 + 0.25 * _rotated(rng, count)[0] / SIZE * _uniform(rng, count, -1, 1)
    image = _blurred(image * light[..., None], _uniform(rng, count, 0, source.blur * severity)[..., None])
    grain = rng.standard_normal((count, SIZE, SIZE, 1), np.float32) + 0.4 * rng.standard_normal(
        (count, SIZE, SIZE, 3), np.float32
    )
    image = image + grain * _uniform(rng, count, 0, source.noise * severity)[..., None]
    return (np.clip(image * LEVELS, 0, LEVELS - 1).astype(np.uint8)) * np.uint8(256 // LEVELS), labels
