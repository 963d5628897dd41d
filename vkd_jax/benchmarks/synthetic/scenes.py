"""Draws images without people: one thing of one color on a background, for questions of general ability."""

import math

import numpy as np
from PIL import Image, ImageDraw

from vkd_jax.benchmarks.synthetic.portraits import BACKGROUNDS, OVERSAMPLE, Pen, arc, gradient, shade

THINGS = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "moon",
    "house",
    "tree",
    "flower",
    "fish",
    "boat",
    "cup",
)
WOOD, INK, WHITE = (112, 76, 48), (40, 36, 40), (250, 250, 248)


def draw_scene(thing: str, color: str, background: str, rng: np.random.Generator, size: int = 96) -> Image.Image:
    """Draws a `thing` of one named color on a background of another; `rng` moves, scales and tilts it."""
    side = size * OVERSAMPLE
    image = gradient(BACKGROUNDS[background], side)
    x, y = rng.uniform(0.42, 0.58, 2) * side
    scale, tilt = rng.uniform(0.26, 0.36) * side, rng.uniform(-0.2, 0.2)
    pen = Pen(ImageDraw.Draw(image, "RGBA"), x, y, scale, tilt)
    _draw_thing(pen, thing, BACKGROUNDS[color])
    pixels = np.asarray(image.reduce(OVERSAMPLE), np.float32)
    pixels = pixels * rng.uniform(0.90, 1.08) + rng.integers(-3, 4, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_thing(pen: Pen, thing: str, fill) -> None:  # noqa: C901 (one branch per thing)
    dark, light = shade(fill, -0.3), shade(fill, 0.3)
    if thing == "circle":
        pen.ellipse(0, 0, 1, 1, dark)
        pen.ellipse(0, 0, 0.93, 0.93, fill)
    elif thing == "square":
        pen.shape([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)], dark)
        pen.shape([(-0.83, -0.83), (0.83, -0.83), (0.83, 0.83), (-0.83, 0.83)], fill)
    elif thing == "triangle":
        pen.shape([(0, -1.05), (1.08, 0.85), (-1.08, 0.85)], dark)
        pen.shape([(0, -0.90), (0.95, 0.78), (-0.95, 0.78)], fill)
    elif thing == "star":
        for radius, ink in ((1.18, dark), (1.05, fill)):
            turns = [(i, radius * (1 if i % 2 == 0 else 0.45)) for i in range(10)]
            pen.shape([(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in turns], ink)
    elif thing == "heart":
        for grow, ink in ((1.08, dark), (0.98, fill)):
            t = np.linspace(0, 2 * math.pi, 48)
            x = grow * np.sin(t) ** 3
            y = -grow * (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
            pen.shape(np.stack([x, y], axis=1), ink)
    elif thing == "moon":
        pen.shape([*arc(0, 0, 1.05, 1.05, 50, 310, 30), *arc(0.45, 0, 0.80, 0.88, 300, 60, 30)], fill)
    elif thing == "house":
        pen.shape([(-0.8, -0.1), (0.8, -0.1), (0.8, 0.95), (-0.8, 0.95)], fill)
        pen.shape([(0, -1.05), (1.1, -0.05), (-1.1, -0.05)], dark)
        pen.shape([(-0.20, 0.35), (0.20, 0.35), (0.20, 0.95), (-0.20, 0.95)], WOOD)
        for x in (-0.52, 0.52):
            pen.shape([(x - 0.17, 0.12), (x + 0.17, 0.12), (x + 0.17, 0.46), (x - 0.17, 0.46)], WHITE)
    elif thing == "tree":
        pen.shape([(-0.18, 0.2), (0.18, 0.2), (0.24, 1.1), (-0.24, 1.1)], WOOD)
        for x, y, r in ((-0.5, -0.05, 0.5), (0.5, -0.05, 0.5), (0, -0.5, 0.62)):
            pen.ellipse(x, y, r, r, fill)
        pen.ellipse(-0.15, -0.62, 0.22, 0.18, light)
    elif thing == "flower":
        pen.line([(0, 0.2), (0.05, 1.25)], (40, 90, 40), 0.14)
        for i in range(6):
            t = i * math.pi / 3
            pen.ellipse(0.56 * math.cos(t), -0.2 + 0.56 * math.sin(t), 0.38, 0.38, fill)
        pen.ellipse(0, -0.2, 0.30, 0.30, INK)
    elif thing == "fish":
        pen.shape([(0.55, 0), (1.25, -0.6), (1.25, 0.6)], dark)
        pen.ellipse(-0.15, 0, 1.0, 0.62, fill)
        pen.ellipse(-0.70, -0.14, 0.15, 0.15, WHITE)
        pen.ellipse(-0.72, -0.14, 0.08, 0.08, INK)
        pen.line(arc(-0.5, 0, 0.2, 0.42, -60, 60, 8), dark, 0.07)
    elif thing == "boat":
        pen.shape([(-1.15, 0.45), (1.15, 0.45), (0.7, 1.0), (-0.7, 1.0)], WOOD)
        pen.line([(0, -1.1), (0, 0.45)], INK, 0.09)
        pen.shape([(0.08, -1.1), (1.0, 0.30), (0.08, 0.30)], fill)
        pen.shape([(-0.08, -0.8), (-0.85, 0.30), (-0.08, 0.30)], fill)
    elif thing == "cup":
        pen.line(arc(0.68, 0.05, 0.42, 0.40, -80, 80, 12), dark, 0.18)
        pen.shape([(-0.8, -0.7), (0.8, -0.7), (0.62, 0.9), (-0.62, 0.9)], fill)
        pen.ellipse(0, -0.7, 0.80, 0.20, dark)
