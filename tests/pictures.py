"""A data folder of coloured shapes with captions, for tests that train."""

from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "orange", "purple", "teal", "gold", "black")


def make_folder(folder: Path, count: int = 6, side_px: int = 64) -> Path:
    """Writes `count` pictures and their captions; the same call makes the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colour = COLOURS[i % len(COLOURS)]
        image = Image.new("RGB", (side_px, side_px), "white")
        box = (4 + 3 * i, 6 + 2 * i, 30 + 4 * i, 50 - i)
        (ImageDraw.Draw(image).ellipse if i % 2 else ImageDraw.Draw(image).rectangle)(box, fill=colour)
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} {'circle' if i % 2 else 'square'}")
    return folder
