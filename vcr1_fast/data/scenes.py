"""Synthetic scenes that need looking: coloured shapes that appear, vanish and move over noise.

A scene holds one *mover*, visible throughout and crossing the frame along one axis, and one or
two *visitors*, each visible during one span. The colours within a scene are distinct. The light
falls from one side and above, and warms as the clip plays: so a patch of the background shows,
under its noise, where it lies and when, and a model of a million parameters can learn to read both.
Everything follows from the random generator: equal seeds give equal scenes, frames, questions.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (40, 190, 70),
    "blue": (55, 85, 235),
    "yellow": (235, 215, 45),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MAX_VISITORS = 4  # one in each quarter of the frame
LETTERS = "ABCD"
TRACK_STEPS = 8

# The light of the background, in RGB: how it changes from left to right, from top to bottom, and
# with every second from blue dusk towards warm noon.
_ACROSS = np.array([35.0, 35.0, 35.0])
_DOWN = np.array([-20.0, 40.0, -20.0])
_PER_SECOND = np.array([10.0, 0.0, -10.0])
_NOON = 4.5


@dataclass(frozen=True)
class SceneConfig:
    """Appearance of scenes: times in seconds, sizes in pixels, radii as fractions of the frame."""

    min_seconds: float = 6.0
    """Shortest clip, in seconds."""
    max_seconds: float = 9.0
    """Longest clip, in seconds."""
    fps: tuple[float, ...] = (6.0, 8.0, 10.0, 12.0)
    """Frame rates to sample from."""
    sizes: tuple[tuple[int, int], ...] = ((112, 112),)
    """Frame sizes (height, width) in pixels to sample from."""
    visitors: tuple[int, int] = (1, 2)
    """Fewest and most moving shapes of a clip."""
    span: tuple[float, float] = (0.12, 0.4)
    """Shortest and longest time that a shape is visible, as fractions of the clip."""
    radius: tuple[float, float] = (0.14, 0.19)
    """Smallest and largest radius of a shape, as fractions of the frame."""
    noise: float = 14.0
    """Strength of the pixel noise, in grey levels."""
    step_seconds: float = 0.5
    """Times in answers are multiples of this many seconds."""

    def __post_init__(self) -> None:
        if not 0 < self.min_seconds <= self.max_seconds:
            raise ValueError(
                f"need 0 < min_seconds <= max_seconds, got {self.min_seconds}, {self.max_seconds}"
            )
        if not 1 <= self.visitors[0] <= self.visitors[1] <= MAX_VISITORS:
            raise ValueError(f"visitors must lie in 1..{MAX_VISITORS}, got {self.visitors}")
        if not 0 < self.span[0] <= self.span[1] < 1:
            raise ValueError(f"span must be increasing fractions of the clip, got {self.span}")


@dataclass(frozen=True)
class Thing:
    """One shape, visible in [start, end) seconds, its centre (fractions of the frame) on a line."""

    color: str
    shape: str
    start: float
    end: float
    center: tuple[float, float]
    velocity: tuple[float, float]
    radius: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    def box(self, t: float) -> list[float]:
        """[x0, y0, x1, y1] at time `t`, normalised to 0..1 and clipped to the frame."""
        x, y = (c + v * t for c, v in zip(self.center, self.velocity, strict=True))
        corners = (x - self.radius, y - self.radius, x + self.radius, y + self.radius)
        return [min(max(c, 0.0), 1.0) for c in corners]


@dataclass(frozen=True)
class Scene:
    """A clip before it is drawn. `things[0]` is the mover."""

    duration: float
    fps: float
    size: tuple[int, int]
    things: tuple[Thing, ...]
    direction: str
    noise: float
    seed: int = field(repr=False, default=0)


def sample_scene(rng: np.random.Generator, config: SceneConfig) -> Scene:
    """Draws one scene."""
    step = config.step_seconds
    ticks = int(
        rng.integers(round(config.min_seconds / step), round(config.max_seconds / step) + 1)
    )
    duration = ticks * step
    count = int(rng.integers(config.visitors[0], config.visitors[1] + 1))
    colors = list(rng.permutation(list(COLORS))[: count + 1])
    shapes = [str(rng.choice(SHAPES)) for _ in colors]
    direction = str(rng.choice(list(DIRECTIONS)))
    things = [_mover(rng, config, str(colors[0]), shapes[0], duration, direction)]
    # Visitors sit in different quarters of the frame, so that none hides another.
    quarters = rng.permutation(MAX_VISITORS)
    for i in range(count):
        length = max(1, round(ticks * rng.uniform(*config.span)))
        first = int(rng.integers(0, ticks - length + 1))
        quarter = int(quarters[i])
        center = (0.25 + 0.5 * (quarter % 2), 0.25 + 0.5 * (quarter // 2))
        jitter = rng.uniform(-0.05, 0.05, 2)
        things.append(
            Thing(
                color=str(colors[i + 1]),
                shape=shapes[i + 1],
                start=first * step,
                end=(first + length) * step,
                center=(center[0] + float(jitter[0]), center[1] + float(jitter[1])),
                velocity=(0.0, 0.0),
                radius=float(rng.uniform(*config.radius)),
            )
        )
    size = config.sizes[int(rng.integers(len(config.sizes)))]
    fps = config.fps[int(rng.integers(len(config.fps)))]
    return Scene(
        duration, fps, size, tuple(things), direction, config.noise, int(rng.integers(2**31))
    )


def _mover(
    rng: np.random.Generator,
    config: SceneConfig,
    color: str,
    shape: str,
    duration: float,
    direction: str,
) -> Thing:
    radius = float(rng.uniform(*config.radius))
    dx, dy = DIRECTIONS[direction]
    travel = float(rng.uniform(0.45, 1.0 - 2 * radius))
    lo, hi = radius, 1.0 - radius - travel  # where the path may begin, seen along the motion
    begin = float(rng.uniform(lo, max(lo, hi)))
    along = begin if dx + dy > 0 else 1.0 - begin
    across = float(rng.uniform(radius, 1.0 - radius))
    center = (along, across) if dx else (across, along)
    speed = travel / duration
    return Thing(color, shape, 0.0, duration, center, (dx * speed, dy * speed), radius)


def render(scene: Scene) -> np.ndarray:
    """Draws a scene: (T, H, W, 3) uint8 with T = round(duration * fps)."""
    height, width = scene.size
    rng = np.random.default_rng(scene.seed)
    frames = max(1, round(scene.duration * scene.fps))
    coarse = rng.normal(0.0, 1.0, (math.ceil(height / 8) + 1, math.ceil(width / 8) + 1, 3))
    texture = np.kron(coarse, np.ones((8, 8, 1)))[:height, :width] * scene.noise
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    x, y = (x + 0.5) / width, (y + 0.5) / height
    base = 100.0 + texture + (x - 0.5)[..., None] * _ACROSS + (y - 0.5)[..., None] * _DOWN
    grain = rng.normal(0.0, scene.noise / 2, (height, width, 3))
    clip = np.empty((frames, height, width, 3), np.uint8)
    for i in range(frames):
        t = i / scene.fps
        # The grain drifts, so that a difference of two frames finds more than the shapes.
        picture = base + np.roll(grain, (3 * i, 5 * i), axis=(0, 1)) + (t - _NOON) * _PER_SECOND
        for thing in reversed(scene.things):
            if thing.start <= t < thing.end:
                picture[_covers(thing, t, x, y)] = COLORS[thing.color]
        clip[i] = np.clip(picture, 0, 255).astype(np.uint8)
    return clip


def _covers(thing: Thing, t: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    cx, cy = (c + v * t for c, v in zip(thing.center, thing.velocity, strict=True))
    dx, dy, r = x - cx, y - cy, thing.radius
    if thing.shape == "circle":
        return dx**2 + dy**2 <= r**2
    if thing.shape == "square":
        return (abs(dx) <= r) & (abs(dy) <= r)
    return (abs(dy) <= r) & (2 * abs(dx) <= dy + r)  # a triangle that stands on its base


def track_times(duration: float, fps: float) -> list[float]:
    """The `TRACK_STEPS` times at which boxes are asked for, from the first frame to the last."""
    last = duration - 1.0 / fps
    return [last * i / (TRACK_STEPS - 1) for i in range(TRACK_STEPS)]


def questions(scene: Scene, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Every question on a scene, one dict of record fields each (task, prompt, answer, options)."""
    mover, visitors = scene.things[0], scene.things[1:]
    asked = [
        {
            "task": "temporal_grounding",
            "prompt": {"event": f"the {thing.name} is visible"},
            "answer": [thing.start, thing.end],
        }
        for thing in visitors
    ]
    boxes = [[round(c, 3) for c in mover.box(t)] for t in track_times(scene.duration, scene.fps)]
    asked.append({"task": "tracking", "prompt": {"object": f"the {mover.name}"}, "answer": boxes})
    target = visitors[int(rng.integers(len(visitors)))]
    letter = LETTERS[list(DIRECTIONS).index(scene.direction)]
    asked.append(
        {
            "task": "grounded_qa",
            "prompt": {
                "question": f"Which way does the {mover.name} move while the {target.name} "
                "is visible?"
            },
            "options": list(DIRECTIONS),
            "answer": {"answer": letter, "glue": [[target.start, target.end]]},
        }
    )
    asked.append(
        {
            "task": "multiple_choice",
            "prompt": {"question": f"Which way does the {mover.name} move?"},
            "options": list(DIRECTIONS),
            "answer": letter,
        }
    )
    asked.append(
        {
            "task": "classification",
            "prompt": {"question": "Which colour has the shape that moves?"},
            "options": sorted(thing.color for thing in scene.things),
            "answer": mover.color,
        }
    )
    # Two words of substance each, so that half an event is an event missed.
    events = [f"{mover.color} {scene.direction}wards."]
    events += [f"{thing.color} comes." for thing in sorted(visitors, key=lambda one: one.start)]
    asked.append(
        {
            "task": "caption",
            "prompt": {"instruction": "What happens in the video?"},
            "answer": events,
        }
    )
    return asked


def describe(scene: Scene) -> dict[str, Any]:
    """The scene as plain values, to be kept in a record's metadata."""
    return dataclasses.asdict(scene)
