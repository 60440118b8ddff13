"""Lines and pages of text, drawn from a seed as input for networks that read documents, with the true answers."""

from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Array = npt.NDArray[Any]

FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
)  # fmt: skip
"""Fonts that ship with matplotlib."""

WORDS = """about account address after again amount answer area before begin between bridge building business carry
centre change children city clear colour common company complete contact correct country course current date delivery
department direct different door early earth east energy enough evening example express family figure final first
follow food form friend garden general government great green group hand hundred important inside island keep kitchen
language large later learn letter light little long machine market material measure member middle minute money morning
mountain music name national nature never north notice number office often open order other page paper part people
period picture place plain point post power present price problem product question quick quiet rain reach ready reason
receipt record region report rest right river road round school science second section service seven several short
should side simple small south special square station still story street strong study summer sure surface system table
teacher thousand three ticket time today together total town travel under until value village voice watch water weather
west white whole window winter without wonder word work world write year yellow young""".split()

IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)[:, :, None, None]
"""Mean and standard deviation of the colours."""

SHEET = 448  # pixels a side of a page while it is turned, before it is scaled down


def lines(count: int, seed: int) -> tuple[Array, Array]:
    """Draw lines of text, about half of them upside down: (count, 3, 48, 192) in -1..1, and whether each is turned."""
    rng, height, width = np.random.default_rng(seed), 48, 192
    drawn, turned = np.zeros((count, 3, height, width), np.float32), rng.integers(2, size=count)
    for pixels, is_turned in zip(drawn, turned, strict=True):
        image = _line(rng)
        image = image.transpose(Image.Transpose.ROTATE_180) if is_turned else image
        wide = min(width, max(1, round(image.width * height / image.height)))
        pixels[:, :, :wide] = _noisy(rng, image.resize((wide, height), Image.Resampling.BILINEAR)) / 127.5 - 1
    return drawn, turned


def turned_pages(count: int, seed: int) -> tuple[Array, Array]:
    """Draw pages of text, turned clockwise: (count, 3, 224, 224), and the number of right angles of each."""
    rng, size = np.random.default_rng(seed), 224
    turns = rng.integers(4, size=count)
    drawn = []
    for quarters in turns:
        image = _page(rng, SHEET, SHEET)[0].rotate(-90 * int(quarters))
        drawn.append(_normalised(_noisy(rng, image.resize((size, size), Image.Resampling.BILINEAR))))
    return np.stack(drawn), turns


def pages(count: int, seed: int, size: int = 320) -> tuple[Array, list[Array]]:
    """Draw pages of text: (count, 3, size, size), and the boxes of the lines on each: (n, 4), x0, y0, x1, y1."""
    rng = np.random.default_rng(seed)
    drawn = [_page(rng, size, size) for _ in range(count)]
    return np.stack([_normalised(_noisy(rng, image)) for image, _ in drawn]), [boxes for _, boxes in drawn]


def _line(rng: np.random.Generator) -> Image.Image:
    letters = _font(str(rng.choice(FACES)), int(rng.integers(24, 44)))
    text = _phrase(rng, int(rng.integers(1, 5)))
    left, top, right, bottom = letters.getbbox(text)
    before, after, above, below = (int(n) for n in rng.integers(2, 9, 4))
    paper, ink = _colours(rng)
    image = Image.new("RGB", (int(right - left) + before + after, int(bottom - top) + above + below), paper)
    ImageDraw.Draw(image).text((before - left, above - top), text, ink, letters)
    return image


def _page(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, Array]:
    """Draw lines of several sizes below one another, in one face; return the boxes of their ink as well."""
    paper, ink = _colours(rng)
    image, face = Image.new("RGB", (width, height), paper), str(rng.choice(FACES))
    boxes: list[tuple[float, float, float, float]] = []
    draw, y = ImageDraw.Draw(image), int(rng.integers(8, 30))
    while True:
        letters, x = _font(face, int(rng.integers(14, 34))), int(rng.integers(8, width // 5))
        text = _phrase(rng, int(rng.integers(1, 7)))
        while " " in text and x + letters.getbbox(text)[2] > width - 8:
            text = text.rpartition(" ")[0]
        box = draw.textbbox((x, y), text, letters)
        if box[3] > height - 8:
            return image, np.array(boxes).astype(np.int64).reshape(-1, 4)
        if box[2] <= width - 4:
            draw.text((x, y), text, ink, letters)
            boxes.append(box)
        y = int(box[3] + rng.integers(6, 24))


def _phrase(rng: np.random.Generator, words: int) -> str:
    """Return random words, some of them capitalised, upper-case, or replaced by numbers."""
    made = []
    for word in rng.choice(WORDS, words).tolist():
        kind = int(rng.integers(10))
        number = str(rng.integers(1, 10 ** int(rng.integers(1, 6))))
        form = {0: number, 1: word.upper(), 2: word.capitalize(), 3: word.capitalize(), 4: word.capitalize()}
        made.append(form.get(kind, word) + "," * int(rng.integers(12) == 0))
    return " ".join(made)


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the colours of paper and ink: light and dark, or one time in five the other way round."""
    levels = rng.integers(170, 256), rng.integers(0, 90)
    paper, ink = (tuple(np.clip(level + rng.integers(-25, 26, 3), 0, 255).tolist()) for level in levels)
    return (ink, paper) if rng.integers(5) == 0 else (paper, ink)


def _noisy(rng: np.random.Generator, image: Image.Image) -> Array:
    """Return an image as (3, height, width) in 0..255, with noise."""
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)
    return np.clip(pixels + rng.normal(0, rng.uniform(0, 12), pixels.shape), 0, 255).astype(np.float32)


def _normalised(pixels: Array) -> Array:
    mean, std = IMAGENET
    return np.asarray((pixels / 255 - mean) / std, np.float32)


@cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")), size)
