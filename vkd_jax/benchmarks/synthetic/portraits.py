"""Draws portraits: a `Look` is the identity of a person, a `View` what differs between images.

Everything is a polygon or a thick line in head units: the origin lies in the middle of the head, y points
down, the chin is near y = 1 and the crown near y = -1. A `Pen` maps head units to pixels, so that tilting the
head or stepping back is a change of pen. Images are drawn `OVERSAMPLE` times too large and scaled down.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]

OVERSAMPLE = 3
BACKGROUNDS: dict[str, Color] = {
    "red": (196, 58, 58), "orange": (242, 150, 52), "yellow": (248, 222, 98), "green": (84, 164, 92),
    "blue": (74, 128, 212), "purple": (136, 92, 188), "pink": (248, 174, 202), "grey": (164, 168, 174),
}  # fmt: skip
SKINS: dict[str, Color] = {
    "porcelain": (250, 221, 200), "peach": (240, 193, 158), "olive": (214, 165, 116),
    "tan": (184, 126, 82), "brown": (136, 86, 54), "ebony": (88, 56, 40),
}  # fmt: skip
HAIRS: dict[str, Color] = {
    "black": (36, 32, 36), "brown": (104, 66, 38), "blond": (232, 196, 104), "ginger": (206, 96, 36),
    "silver": (206, 208, 214), "teal": (28, 142, 144), "magenta": (196, 54, 126),
}  # fmt: skip
EYES: dict[str, Color] = {"brown": (96, 58, 28), "blue": (52, 120, 206), "green": (58, 142, 74)}
CLOTHES: dict[str, Color] = {
    "red": (206, 44, 48), "orange": (240, 128, 36), "yellow": (246, 206, 60), "green": (46, 142, 76),
    "turquoise": (56, 190, 190), "blue": (44, 88, 190), "purple": (122, 62, 166), "pink": (240, 130, 172),
    "white": (242, 242, 238), "black": (46, 48, 56), "brown": (120, 80, 52),
}  # fmt: skip
FRAMES: dict[str, Color] = {"black": (28, 28, 32), "red": (204, 36, 44), "blue": (32, 82, 200)}

HAIR_STYLES = (
    "short", "parted", "spiky", "curly", "long", "wavy", "bob", "bun", "pigtails", "braids", "bald", "mohawk",
)  # fmt: skip
FACES = {"oval": (0.74, 2.2), "round": (0.86, 2.1), "square": (0.80, 3.2), "heart": (0.80, 2.0)}
GARMENTS = ("plain", "collar", "suit", "hoodie", "stripes", "dots", "turtleneck", "overalls", "scarf")
GLASSES = ("none", "round", "square", "shades")
BEARDS = ("none", "moustache", "goatee", "full")
HATS = ("none", "beanie", "cap", "brim", "headband")
WHITE, INK = (250, 250, 248), (38, 30, 32)


@dataclasses.dataclass(frozen=True)
class Look:
    """The identity features: the same in every image of a person. Values are keys of the tables above."""

    skin: str
    hair: str
    hair_style: str
    eyes: str
    face: str
    garment: str
    clothes: str
    accent: str  # color of tie, stripes, dots, scarf and hat
    glasses: str
    frames: str
    beard: str
    hat: str
    earrings: bool
    freckles: bool
    lashes: bool


@dataclasses.dataclass(frozen=True)
class View:
    """The features that differ between images. Lengths are fractions of the image's side, angles in radians."""

    background: str
    yaw: float  # -1 looks to the image's left edge, 1 to its right edge
    pitch: float  # -1 looks up, 1 down
    tilt: float  # of the head
    scale: float  # half height of the head
    x: float  # middle of the head
    y: float
    light: float  # overall brightness, 1 is neutral
    side: float  # shading: -1 lit from the left, 1 from the right
    smile: float  # 1 a wide smile, 0 a straight mouth
    mouth_open: bool
    noise_seed: int


YAWS = (-1.0, 0.0, 1.0)  # looking left, ahead, right


def random_view(rng: np.random.Generator) -> View:
    """A view drawn from everything that may differ between two images of a person."""
    yaw = rng.choice(YAWS) + rng.uniform(-0.15, 0.15)
    return View(
        background=str(rng.choice(list(BACKGROUNDS))),
        yaw=float(yaw),
        pitch=float(rng.uniform(-0.6, 0.6)),
        tilt=float(rng.uniform(-0.13, 0.13)),
        scale=float(rng.uniform(0.245, 0.295)),
        x=float(rng.uniform(0.45, 0.55)),
        y=float(rng.uniform(0.42, 0.50)),
        light=float(rng.uniform(0.90, 1.08)),
        side=float(rng.uniform(-1, 1)),
        smile=float(rng.uniform(0.1, 1.0)),
        mouth_open=bool(rng.random() < 0.3),
        noise_seed=int(rng.integers(2**31)),
    )


def shade(color: Color, amount: float) -> Color:
    """`color` moved towards white (amount > 0) or black (amount < 0)."""
    target = 255 if amount > 0 else 0
    return tuple(round(c + (target - c) * abs(amount)) for c in color)


_ANGLES = np.linspace(0, 2 * math.pi, 40, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, n: int = 16) -> list:
    """Points of an ellipse from `start` to `stop` degrees, clockwise on the screen, 0 pointing right."""
    t = np.radians(np.linspace(start, stop, n))
    return np.stack([cx + rx * np.cos(t), cy + ry * np.sin(t)], axis=1).tolist()


class Pen:
    """Draws shapes given in head units onto an image, turned by `angle` about (0, 1)."""

    def __init__(self, draw: ImageDraw.ImageDraw, x: float, y: float, scale: float, angle: float = 0.0):
        self.draw, self.scale = draw, scale
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        self.turn = np.array([[cos, sin], [-sin, cos]])
        self.shift = np.array([x, y + scale]) - np.array([0.0, 1.0]) @ self.turn

    def pixels(self, points) -> list[tuple[float, float]]:
        """Pixel coordinates of points in head units."""
        return list(map(tuple, (np.asarray(points, np.float64) @ self.turn + self.shift).tolist()))

    def shape(self, points, fill) -> None:
        """A filled polygon."""
        self.draw.polygon(self.pixels(points), fill=fill)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, fill) -> None:
        """A filled ellipse about (cx, cy)."""
        self.shape(_CIRCLE * (rx, ry) + (cx, cy), fill)

    def line(self, points, fill, width: float) -> None:
        """A line with round ends and joints."""
        pixels, width = self.pixels(points), max(1, round(width * self.scale))
        self.draw.line(pixels, fill=fill, width=width, joint="curve")
        if width > 3:
            radius = width / 2 - 0.5
            for x, y in (pixels[0], pixels[-1]):
                self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def draw_portrait(look: Look, view: View, size: int = 96) -> Image.Image:
    """The portrait of one person in one view, an RGB image of size x size pixels."""
    side = size * OVERSAMPLE
    image = gradient(BACKGROUNDS[view.background], side)
    draw = ImageDraw.Draw(image, "RGBA")  # RGBA: translucent fills blend instead of overwriting
    x, y, scale = view.x * side, view.y * side, view.scale * side
    head = Pen(draw, x, y, scale, view.tilt)
    body = Pen(draw, x, y, scale)

    _back_hair(head, look)
    _body(body, look)
    _head(head, look, view)
    _eyes(head, look, view)
    _mouth_and_beard(head, look, view)
    _front_hair(head, look)
    _hat(head, look, view)
    _glasses(head, look, view)
    return _light(image.reduce(OVERSAMPLE), view)


def gradient(color: Color, side: int) -> Image.Image:
    """A square of `color`, somewhat lighter at the top than at the bottom."""
    rows = np.linspace(shade(color, 0.10), shade(color, -0.10), side).astype(np.uint8)
    return Image.fromarray(rows[:, None]).resize((side, side), Image.Resampling.NEAREST)


def _light(image: Image.Image, view: View) -> Image.Image:
    pixels = np.array(image, np.float32)
    across = np.linspace(-1, 1, image.width, dtype=np.float32)
    pixels *= np.float32(view.light) * (1 + np.float32(0.10 * view.side) * across)[None, :, None]
    pixels += np.random.default_rng(view.noise_seed).integers(-3, 4, pixels.shape, np.int8)
    return Image.fromarray(pixels.clip(0, 255, out=pixels).astype(np.uint8))


def _outline(look: Look) -> list:
    """The head's outline: a superellipse, narrowed towards the chin for heart-shaped faces."""
    width, power = FACES[look.face]
    x = np.sign(_CIRCLE[:, 0]) * np.abs(_CIRCLE[:, 0]) ** (2 / power) * width
    y = np.sign(_CIRCLE[:, 1]) * np.abs(_CIRCLE[:, 1]) ** (2 / power)
    if look.face == "heart":
        x = x * np.where(y > 0, 1 - 0.35 * y**2, 1)
    return np.stack([x, y], axis=1)


def _head(pen: Pen, look: Look, view: View) -> None:
    skin = SKINS[look.skin]
    dark = shade(skin, -0.22)
    width = FACES[look.face][0]
    for sign in (-1, 1):  # the far ear hides when the head turns
        ear = sign * (width + 0.02) - 0.10 * view.yaw
        pen.ellipse(ear, 0.08, 0.15, 0.21, skin)
        pen.ellipse(ear, 0.08, 0.08, 0.12, dark)
        if look.earrings:
            pen.ellipse(ear + 0.03 * sign, 0.36, 0.10, 0.10, (250, 204, 40))
    outline = _outline(look)
    pen.shape(outline, skin)
    pen.shape(np.concatenate([outline[:21], outline[20::-1] * (0.86, 0.82)]), (*dark, 90))  # under the chin
    shift = 0.26 * view.yaw
    for sign in (-1, 1):
        pen.ellipse(sign * 0.42 + shift, 0.36, 0.17, 0.12, (226, 84, 84, 70))
    if look.freckles:
        for x, y in ((-0.50, 0.26), (-0.38, 0.36), (-0.28, 0.24), (0.50, 0.26), (0.38, 0.36), (0.28, 0.24)):
            pen.ellipse(x + shift, y, 0.045, 0.045, shade(skin, -0.42))


def _eyes(pen: Pen, look: Look, view: View) -> None:
    iris, brow = EYES[look.eyes], shade(HAIRS[look.hair], -0.3)
    dx, dy = 0.26 * view.yaw, 0.12 * view.pitch
    for sign in (-1, 1):
        x, y = sign * 0.34 + dx, -0.04 + dy
        pen.ellipse(x, y, 0.20, 0.145, WHITE)
        px, py = x + 0.08 * view.yaw, y + 0.03 * view.pitch
        pen.ellipse(px, py, 0.115, 0.125, iris)
        pen.ellipse(px, py, 0.055, 0.06, (16, 14, 16))
        pen.ellipse(px - 0.04, py - 0.05, 0.03, 0.03, WHITE)
        pen.line(arc(x, y, 0.21, 0.15, 195, 345, 9), INK, 0.07 if look.lashes else 0.045)
        if look.lashes:
            pen.line([(x + sign * 0.19, y - 0.06), (x + sign * 0.29, y - 0.14)], INK, 0.05)
        pen.line([(x - 0.19, y - 0.25), (x, y - 0.31), (x + 0.19, y - 0.25)], brow, 0.07)


def _mouth_and_beard(pen: Pen, look: Look, view: View) -> None:
    skin, hair = SKINS[look.skin], HAIRS[look.hair]
    shift, dy = 0.26 * view.yaw, 0.10 * view.pitch
    if look.beard == "full":
        outline = _outline(look)
        lower = outline[(outline[:, 1] >= 0.05)]
        order = np.argsort(-lower[:, 0])
        rim = lower[order] * (1.04, 1.10)
        inner = arc(0.6 * shift, 0.22, 0.56, 0.24, 180, 0, 12)
        pen.shape([*rim.tolist(), *inner], hair)
    elif look.beard == "goatee":
        pen.ellipse(shift, 0.86 + 0.5 * dy, 0.22, 0.22, hair)
    nose = 0.34 * view.yaw
    pen.line(
        [(nose - 0.02, 0.06 + dy), (nose + 0.07, 0.27 + dy), (nose - 0.06, 0.30 + dy)],
        shade(skin, -0.3),
        0.06,
    )
    y, width, curve = 0.58 + dy, 0.27, 0.16 * view.smile
    lip = (190, 44, 60) if look.lashes else shade(skin, -0.5)
    if look.beard in ("moustache", "goatee", "full"):
        pen.shape(
            [(shift, 0.38 + dy), (shift + 0.34, 0.50 + dy), (shift + 0.26, 0.55 + dy), (shift, 0.49 + dy),
             (shift - 0.26, 0.55 + dy), (shift - 0.34, 0.50 + dy)], shade(hair, -0.12)
        )  # fmt: skip
        y, width = y + 0.05, 0.20
    if view.mouth_open:
        pen.shape(arc(shift, y - 0.02, width, 0.10 + curve, 0, 180, 14), (110, 24, 34))
        pen.shape([(shift - width * 0.8, y - 0.02), (shift + width * 0.8, y - 0.02),
                   (shift + width * 0.6, y + 0.06), (shift - width * 0.6, y + 0.06)], WHITE)  # fmt: skip
    else:
        points = [(shift + width * t, y + curve * (1 - t * t)) for t in np.linspace(-1, 1, 9)]
        pen.line(points, lip, 0.09 if look.lashes else 0.07)


def _back_hair(pen: Pen, look: Look) -> None:
    """The part of the hair that lies behind neck and shoulders."""
    hair, width = HAIRS[look.hair], FACES[look.face][0]
    dark = shade(hair, -0.15)
    if look.hair_style == "long":
        pen.shape([*arc(0, -0.1, width + 0.26, 1.08, 180, 360), (width + 0.42, 1.75), (-width - 0.42, 1.75)], dark)
    elif look.hair_style == "wavy":
        pen.ellipse(0, -0.1, width + 0.26, 1.06, dark)
        for i, y in enumerate((-0.35, 0.05, 0.45, 0.85, 1.2)):
            x = width + 0.14 + 0.06 * (i % 2)
            pen.ellipse(-x, y, 0.34, 0.32, dark)
            pen.ellipse(x, y, 0.34, 0.32, dark)
    elif look.hair_style == "bob":
        pen.shape([*arc(0, -0.1, width + 0.28, 1.08, 180, 360), (width + 0.34, 0.80), (-width - 0.34, 0.80)], dark)
    elif look.hair_style == "curly":
        pen.ellipse(0, -0.25, width + 0.42, 1.12, dark)
        for t in np.radians(np.arange(150, 400, 22)):
            pen.ellipse((width + 0.40) * math.cos(t), -0.30 + 1.08 * math.sin(t), 0.26, 0.26, dark)
    elif look.hair_style == "pigtails":
        for sign in (-1, 1):
            pen.ellipse(sign * (width + 0.42), -0.25, 0.20, 0.20, shade(CLOTHES[look.accent], -0.1))
            pen.ellipse(sign * (width + 0.60), 0.12, 0.34, 0.46, hair)
    elif look.hair_style == "bun":
        pen.ellipse(0, -1.28, 0.44, 0.38, hair)
        pen.ellipse(0, -1.04, 0.30, 0.10, shade(CLOTHES[look.accent], -0.1))


def _front_hair(pen: Pen, look: Look) -> None:  # noqa: C901 (one branch per style)
    """The part of the hair that lies on the head."""
    if look.hair_style == "bald":
        pen.ellipse(-0.28, -0.72, 0.16, 0.09, (255, 255, 255, 90))  # a highlight on the scalp
        return
    hair, width = HAIRS[look.hair], FACES[look.face][0]
    light, dark = shade(hair, 0.22), shade(hair, -0.25)

    def cap(hairline: list, grow: float = 0.09, low: float = 0.0) -> None:
        pen.shape([*arc(0, -0.12, width + grow, 0.96 + grow, 180 - low, 360 + low, 20), *hairline], hair)

    arch = arc(0, -0.10, width - 0.06, 0.50, 0, -180, 12)
    if look.hair_style == "mohawk":
        pen.shape([(-0.20, -0.60), (-0.34, -1.46), (-0.12, -1.34), (0, -1.58), (0.12, -1.34), (0.34, -1.46),
                   (0.20, -0.60)], hair)  # fmt: skip
        pen.line([(0, -0.72), (0, -1.30)], light, 0.08)
        return
    if look.hair_style == "parted":
        cap(
            [(width - 0.02, -0.15), (width - 0.12, -0.50), (-0.30, -0.72), (-0.50, -0.34), (-width, -0.05)],
            0.12,
        )
        pen.line([(-0.32, -0.72), (-0.36, -1.00)], dark, 0.05)
    elif look.hair_style in ("bob", "pigtails"):  # a straight fringe
        fringe = np.linspace(width - 0.04, -width + 0.04, 9)
        cap([(x, -0.36 + 0.05 * (i % 2)) for i, x in enumerate(fringe)], 0.12, low=18)
    elif look.hair_style in ("long", "braids", "wavy"):  # a middle parting
        cap(
            [(width, 0.15), (width - 0.14, -0.30), (0, -0.80), (-width + 0.14, -0.30), (-width, 0.15)],
            0.12,
            low=14,
        )
        pen.line([(0, -0.80), (0, -1.04)], dark, 0.05)
    else:
        cap(arch, 0.10)
    if look.hair_style == "spiky":
        for degrees in range(190, 360, 20):
            t = math.radians(degrees)
            x, y = (width + 0.04) * math.cos(t), -0.12 + 0.98 * math.sin(t)
            pen.shape([(x - 0.20, y + 0.10), (x * 1.30, y * 1.32), (x + 0.20, y + 0.10)], hair)
    elif look.hair_style == "curly":
        for x in np.linspace(-width + 0.10, width - 0.10, 6):
            pen.ellipse(x, -0.64 + 0.36 * (x / width) ** 2, 0.20, 0.20, hair)
        for x in (-0.4, 0.05, 0.45):
            pen.line(arc(x, -0.95, 0.13, 0.12, 150, 330, 6), light, 0.05)
    elif look.hair_style == "braids":
        for sign in (-1, 1):
            for i in range(6):
                x = sign * (width + 0.10 + 0.04 * i)
                pen.ellipse(x, 0.20 + 0.26 * i, 0.20, 0.17, hair if i % 2 else dark)
            pen.ellipse(sign * (width + 0.33), 1.66, 0.14, 0.10, CLOTHES[look.accent])
    if look.hair_style not in ("curly", "spiky"):
        pen.line(arc(0.0, -0.20, width - 0.16, 0.72, 215, 265, 8), (*light, 170), 0.09)


def _hat(pen: Pen, look: Look, view: View) -> None:
    color, width = CLOTHES[look.accent], FACES[look.face][0]
    dark, light = shade(color, -0.28), shade(color, 0.30)
    if look.hat == "beanie":
        pen.ellipse(0, -1.34, 0.20, 0.20, light)
        pen.shape(arc(0, -0.50, width + 0.17, 0.82, 180, 360, 20), color)
        pen.shape(
            [(-width - 0.19, -0.66), (width + 0.19, -0.66), (width + 0.19, -0.40), (-width - 0.19, -0.40)],
            dark,
        )
    elif look.hat == "cap":
        pen.shape(arc(0, -0.52, width + 0.14, 0.70, 180, 360, 20), color)
        x = 0.30 * view.yaw
        pen.shape(
            arc(x, -0.52, width + 0.10, 0.20, 180, 360, 12) + arc(x, -0.52, width + 0.22, 0.16, 0, 180, 12),
            dark,
        )
        pen.ellipse(x * 0.6, -0.88, 0.16, 0.14, light)
    elif look.hat == "brim":
        pen.shape([(-width, -0.62), (-width + 0.10, -1.32), (width - 0.10, -1.32), (width, -0.62)], color)
        pen.ellipse(0, -0.58, width + 0.62, 0.17, color)
        pen.shape([(-width + 0.01, -0.88), (width - 0.01, -0.88), (width, -0.66), (-width, -0.66)], dark)
    elif look.hat == "headband":
        pen.shape(
            [
                *arc(0, -0.10, width + 0.13, 0.70, 200, 340, 14),
                *arc(0, -0.02, width + 0.12, 0.50, 340, 200, 14),
            ],
            color,
        )


def _glasses(pen: Pen, look: Look, view: View) -> None:
    if look.glasses == "none":
        return
    frame, width = FRAMES[look.frames], FACES[look.face][0]
    dx, y = 0.26 * view.yaw, -0.02 + 0.12 * view.pitch
    for sign in (-1, 1):
        x = sign * 0.36 + dx
        if look.glasses == "round":
            pen.ellipse(x, y, 0.28, 0.27, (255, 255, 255, 50))
            pen.line(arc(x, y, 0.29, 0.28, 0, 360, 24), frame, 0.085)
        else:
            box = [(x - 0.30, y - 0.22), (x + 0.30, y - 0.22), (x + 0.27, y + 0.24), (x - 0.27, y + 0.24)]
            pen.shape(box, (255, 255, 255, 50) if look.glasses == "square" else (*shade(frame, -0.4), 235))
            pen.line([*box, box[0], box[1]], frame, 0.085)
            if look.glasses == "shades":
                pen.line([(x - 0.14, y + 0.10), (x + 0.04, y - 0.12)], (255, 255, 255, 110), 0.06)
        pen.line([(x + sign * 0.29, y - 0.04), (sign * width, y - 0.02)], frame, 0.07)
    pen.line([(dx - 0.08, y - 0.04), (dx + 0.08, y - 0.04)], frame, 0.08)


def _body(pen: Pen, look: Look) -> None:  # noqa: C901 (one branch per garment)
    skin, cloth, accent = SKINS[look.skin], CLOTHES[look.clothes], CLOTHES[look.accent]
    dark = shade(cloth, -0.28)
    pen.shape([(-0.36, 0.60), (0.36, 0.60), (0.44, 1.60), (-0.44, 1.60)], shade(skin, -0.20))
    if look.garment == "hoodie":
        pen.ellipse(0, 1.28, 0.92, 0.42, dark)
        pen.shape([(-0.36, 0.90), (0.36, 0.90), (0.40, 1.60), (-0.40, 1.60)], shade(skin, -0.20))
    left = [(-0.44, 1.24), (-1.00, 1.40), (-1.40, 1.62), (-1.56, 2.10), (-1.62, 3.2)]
    neckline = arc(0, 1.22, 0.46, 0.34, 0, 180, 10)
    torso = [*neckline, *left, *[(-x, y) for x, y in reversed(left)]]
    pen.shape(torso, cloth)
    if look.garment == "stripes":
        for y in (1.62, 2.02, 2.42, 2.82):
            half = 1.36 if y < 1.7 else 1.54
            pen.shape([(-half, y), (half, y), (half + 0.03, y + 0.20), (-half - 0.03, y + 0.20)], accent)
    elif look.garment == "dots":
        for row, y in enumerate((1.66, 1.96, 2.26, 2.56)):
            for x in np.arange(-1.2, 1.3, 0.48) + 0.24 * (row % 2):
                pen.ellipse(x, y, 0.12, 0.12, accent)
    elif look.garment == "collar":
        for sign in (-1, 1):
            pen.shape([(sign * 0.46, 1.12), (0, 1.58), (sign * 0.34, 1.78), (sign * 0.66, 1.34)], shade(accent, 0.1))
        for y in (1.86, 2.14, 2.42):
            pen.ellipse(0, y, 0.06, 0.06, WHITE)
    elif look.garment == "suit":
        pen.shape([(-0.46, 1.22), (0.46, 1.22), (0.0, 2.60)], WHITE)
        pen.shape([(-0.12, 1.46), (0.12, 1.46), (0.17, 2.2), (0, 2.5), (-0.17, 2.2)], accent)
        for sign in (-1, 1):
            pen.shape([(sign * 0.44, 1.18), (sign * 0.80, 1.50), (sign * 0.56, 1.66), (0, 2.6)], dark)
    elif look.garment == "hoodie":
        for sign in (-1, 1):
            pen.line([(sign * 0.24, 1.52), (sign * 0.26, 2.05)], WHITE, 0.08)
        pen.line(neckline, dark, 0.12)
    elif look.garment == "turtleneck":
        pen.shape([(-0.42, 0.98), (0.42, 0.98), (0.56, 1.46), (-0.56, 1.46)], cloth)
        pen.line(arc(0, 1.30, 0.56, 0.22, 10, 170, 10), dark, 0.07)
    elif look.garment == "overalls":
        for sign in (-1, 1):
            pen.shape([(sign * 0.56, 1.26), (sign * 0.84, 1.34), (sign * 0.74, 2.0), (sign * 0.46, 2.0)], accent)
        pen.shape([(-0.80, 1.84), (0.80, 1.84), (0.90, 3.2), (-0.90, 3.2)], accent)
        for sign in (-1, 1):
            pen.ellipse(sign * 0.60, 1.92, 0.10, 0.10, (250, 204, 40))
    elif look.garment == "scarf":
        pen.shape([*arc(0, 1.06, 0.62, 0.26, 180, 0, 12)[::-1], *arc(0, 1.24, 0.74, 0.40, 0, 180, 12)], accent)
        pen.shape([(0.16, 1.44), (0.52, 1.40), (0.60, 2.30), (0.20, 2.30)], shade(accent, -0.18))
    else:
        pen.line(neckline, dark, 0.09)
    for sign in (-1, 1):
        pen.line([(sign * 1.14, 1.90), (sign * 1.18, 3.2)], (*dark, 150), 0.06)
