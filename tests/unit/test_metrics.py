"""Rows are never doubled or half, and the loss picture shows the loss."""

import json

from PIL import Image

from sdlora.training.metrics import Metrics, draw_loss, read_rows, smooth


def row(step, loss=1.0):
    return {"step": step, "loss": loss}


def test_rows_after_the_checkpoint_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, 0)
    for step in range(1, 8):
        first.add(row(step))
    first.close()
    path.write_bytes(path.read_bytes() + b'{"step": 8, "lo')  # killed while it wrote
    again = Metrics(path, 5)
    again.add(row(6, 2.0))
    again.close()
    assert [(r["step"], r["loss"]) for r in read_rows(path)] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 2)]


def test_values_that_json_lacks_are_null(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.add({"step": 1, "loss": 0.5, "grad_norm": float("inf")})
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: 1 / 0) == {"step": 1, "loss": 0.5, "grad_norm": None}


def test_smoothing_is_unbiased():
    assert [round(v, 12) for v in smooth([3.0] * 5)] == [3.0] * 5
    a, b = smooth([0.0, 1.0])
    assert a == 0.0
    assert abs(b - 1 / 1.95) < 1e-12


def test_loss_picture_draws_high_losses_high(tmp_path):
    draw_loss([row(s, 1.0 if s <= 50 else 0.1) for s in range(1, 101)], tmp_path / "loss.png")
    image = Image.open(tmp_path / "loss.png").convert("RGB")
    blue = (0x1F, 0x5F, 0xA8)

    def height(x_share):
        x = 70 + round((image.width - 90) * x_share)
        return min(y for y in range(image.height) if image.getpixel((x, y)) == blue)

    assert height(0.3) < 60  # at the top of the frame
    assert height(0.98) > image.height / 2
    assert height(0.98) > height(0.55) > height(0.3)


def test_validation_is_drawn_where_it_was_measured(tmp_path):
    rows = [row(s, 0.5) | ({"validation_loss": 1.8} if s == 50 else {}) for s in range(1, 101)]
    draw_loss(rows, tmp_path / "loss.png")
    image = Image.open(tmp_path / "loss.png").convert("RGB")
    dots = [(x, y) for x in range(960) for y in range(480) if image.getpixel((x, y)) == (0xD2, 0x69, 0x1E)]
    x, y = (sum(values) / len(dots) for values in zip(*dots, strict=True))
    assert abs(x - (70 + 870 / 2)) < 2
    assert abs(y - (430 - 390 * 1.8 / 2)) < 2  # in a frame that ends at 2


def test_one_row_can_be_drawn(tmp_path):
    draw_loss([row(1)], tmp_path / "loss.png")
    draw_loss([row(1, 0.0), row(2, None)], tmp_path / "zero.png")
    draw_loss([], tmp_path / "none.png")
    assert Image.open(tmp_path / "loss.png").size == (960, 480)
    assert not (tmp_path / "none.png").exists()
