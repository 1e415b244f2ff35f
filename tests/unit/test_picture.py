"""Pictures hold by pixel value, whatever mode and format they come in."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sdlora.data.picture import fit_picture, read_picture
from sdlora.errors import DataError


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_grey16(path, rows, transparent=None):
    """A 16-bit grey PNG, written by hand so that no library's conversion is in the way."""
    h, w = len(rows), len(rows[0])
    raw = b"".join(b"\0" + b"".join(struct.pack(">H", v) for v in row) for row in rows)
    trns = chunk(b"tRNS", struct.pack(">H", transparent)) if transparent is not None else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + trns + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))


def pixels(path):
    image = read_picture(path)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def test_exif_orientation_turns_the_picture(tmp_path):
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    image.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter clockwise: the left end comes to the top
    image.save(tmp_path / "a.png", exif=exif)
    assert pixels(tmp_path / "a.png") == [[[255, 0, 0]], [[0, 0, 255]]]


def test_transparency_lies_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 255, 51)):
        image.putpixel((x, 0), (0, 100, 200, alpha))
    image.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png") == [[[255, 255, 255], [0, 100, 200], [204, 224, 244]]]


def test_grey_with_alpha_lies_on_white(tmp_path):
    image = Image.new("LA", (2, 1))
    image.putpixel((0, 0), (0, 0))
    image.putpixel((1, 0), (80, 255))
    image.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png") == [[[255] * 3, [80] * 3]]


@pytest.mark.parametrize("transparent", [1, b"\xff\x00"])
def test_a_palettes_clear_colour_is_white(tmp_path, transparent):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=transparent)
    assert pixels(tmp_path / "a.png") == [[[10, 20, 30], [255, 255, 255]]]


def test_a_clear_colour_of_rgb_and_grey_is_white(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png", transparency=(1, 2, 3))
    Image.new("L", (1, 1), 9).save(tmp_path / "b.png", transparency=9)
    assert pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png") == [[[255] * 3]]


def test_16_bit_grey_is_rescaled_not_clipped(tmp_path):
    write_grey16(tmp_path / "a.png", [[0, 257, 32896, 65535, 300]])
    assert pixels(tmp_path / "a.png") == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3, [1] * 3]]
    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "b.tif")
    assert pixels(tmp_path / "b.tif") == [[[0] * 3, [128] * 3, [255] * 3]]


def test_16_bit_greys_clear_value_is_white(tmp_path):
    write_grey16(tmp_path / "a.png", [[514, 515]], transparent=514)
    assert pixels(tmp_path / "a.png") == [[[255] * 3, [2] * 3]]


def test_cmyk_bilevel_and_palette_become_their_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    r, g, b = pixels(tmp_path / "a.jpg")[8][8]
    assert r >= 253
    assert max(g, b) <= 2
    Image.new("CMYK", (1, 1), (255, 0, 0, 0)).save(tmp_path / "c.tif")
    assert pixels(tmp_path / "c.tif") == [[[0, 255, 255]]]
    Image.new("1", (2, 1), 1).save(tmp_path / "b.png")
    assert pixels(tmp_path / "b.png") == [[[255] * 3] * 2]


def test_a_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("#ff0000", "#00ff00")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "a.gif")[0][0] == [255, 0, 0]


def test_numbers_without_a_meaning_as_colours_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match=r"f\.tif: is a picture of floating-point numbers; save it as 8-bit RGB"):
        read_picture(tmp_path / "f.tif")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(DataError, match="32-bit numbers"):
        read_picture(tmp_path / "i.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif"])
def test_every_cut_of_a_picture_is_refused_or_read_whole(tmp_path, suffix):
    rng = np.random.default_rng(0)
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(whole)
    data, cut = whole.read_bytes(), tmp_path / f"cut.{suffix}"
    expected = pixels(whole)
    refused = []
    for length in range(0, len(data), max(1, len(data) // 40)):
        cut.write_bytes(data[:length])
        try:
            assert pixels(cut) == expected
        except DataError as error:
            refused.append(str(error))
    assert len(refused) >= 35
    assert all(line.startswith(f"{cut}: ") and "\n" not in line for line in refused)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 1600 pixels: only a warning by default
    with pytest.raises(DataError, match=r"a\.png: is too large to be a training picture; scale it down"):
        read_picture(tmp_path / "a.png")


def test_fit_keeps_the_centre_square_of_the_shorter_side():
    image = Image.new("RGB", (6, 2), "red")
    image.paste((0, 0, 255), (2, 0, 4, 2))
    assert np.asarray(fit_picture(image, 2)).tolist() == [[[0, 0, 255]] * 2] * 2
    assert fit_picture(image, 8).getcolors() == [(64, (0, 0, 255))]
    tall = fit_picture(image.transpose(Image.Transpose.ROTATE_90), 16)
    assert tall.getcolors() == [(256, (0, 0, 255))]


def test_a_sliver_does_not_grow_on_its_way(monkeypatch):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: sizes.append(self.size) or resize(self, *a, **k))
    assert fit_picture(Image.new("RGB", (1, 60000)), 64).size == (64, 64)
    assert sizes == [(1, 1)]
