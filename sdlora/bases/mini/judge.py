"""The judge: says which thing a picture shows and in which style it is drawn.

A small image-text encoder that ships with `mini`. Tests, the demo and evaluation use it; training a LoRA does not.
`judge/README.md` has its data, its licences and its measured accuracy.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import BaseModelError, DataError

FOLDER = Path(__file__).with_name("judge")
INPUT_PX = 64
WIDTHS = (32, 64, 128, 160)
EMBEDDING = 128
STYLE_EMBEDDING = 32
OTHER = "other"
"""The name for a picture that is in none of the styles: blank, noise, or a drawing with its look changed."""


def words_of(label: str) -> list[str]:
    """The label's words in lower case; marks part words ("t-shirt" is "t", "shirt")."""
    return re.findall(r"\w+", label.lower())


class _Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut; halves the picture where the width changes."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        stride = 1 if width_in == width else 2
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(width_in, width, 1, bias=False) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(F.avg_pool2d(x, 2))
        return F.relu(x + y)


def _mean_and_spread(x: Tensor) -> Tensor:
    """Mean and standard deviation of every channel over the picture: [B, 2 C], float32."""
    x = x.float()
    mean = x.mean((2, 3))
    variance = (x.square().mean((2, 3)) - mean.square()).clamp_min(0)
    return torch.cat([mean, (variance + 1e-4).sqrt()], 1)


class ImageEncoder(nn.Module):
    """Pictures [B, 3, 64, 64] in -1..1 to unit subject [B, 128] and style [B, 32] embeddings.

    The subject is read from the last layer; the style from the channel statistics of all layers.
    """

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = WIDTHS
        self.stem = nn.Conv2d(3, a, 5, 2, 2, bias=False)  # [B, a, 32, 32]
        self.stem_norm = nn.BatchNorm2d(a)
        pairs = [(a, b), (b, c), (c, d)]  # [B, b, 16, 16], [B, c, 8, 8], [B, d, 4, 4]
        self.stages = nn.ModuleList(nn.Sequential(_Block(i, o), _Block(o, o)) for i, o in pairs)
        n = 2 * sum(WIDTHS)
        self.subject = nn.Sequential(nn.BatchNorm1d(d), nn.Linear(d, EMBEDDING))
        self.style = nn.Sequential(nn.BatchNorm1d(n), nn.Linear(n, 96), nn.ReLU(), nn.Linear(96, STYLE_EMBEDDING))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem_norm(self.stem(x)))
        statistics = [_mean_and_spread(x)]
        for stage in self.stages:
            x = stage(x)
            statistics.append(_mean_and_spread(x))
        subject = self.subject(statistics[-1][:, : WIDTHS[-1]]).float()
        style = self.style(torch.cat(statistics, 1)).float()
        return F.normalize(subject, dim=1), F.normalize(style, dim=1)


class TextEncoder(nn.Module):
    """Labels to unit embeddings [N, 128], from their words and the words' places."""

    def __init__(self, vocabulary: Sequence[str], max_words: int = 8) -> None:
        super().__init__()
        self.rows = {word: row for row, word in enumerate(vocabulary)}
        self.words = nn.Embedding(len(vocabulary), EMBEDDING)
        self.places = nn.Parameter(torch.zeros(max_words, EMBEDDING))
        last = nn.Linear(128, EMBEDDING)
        self.mix = nn.Sequential(nn.LayerNorm(EMBEDDING), nn.Linear(EMBEDDING, 128), nn.GELU(), last)
        nn.init.normal_(self.words.weight, std=0.1)  # labels start far apart, and the words move quickly
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def tokens(self, labels: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Word rows int64 [N, W] and a mask [N, W] of the places that hold one."""
        ids = torch.zeros(len(labels), len(self.places), dtype=torch.long)
        mask = torch.zeros(len(labels), len(self.places))
        for n, label in enumerate(labels):
            rows = [self.rows[w] for w in words_of(label)][: len(self.places)]
            ids[n, : len(rows)] = torch.tensor(rows)
            mask[n, : len(rows)] = 1
        return ids, mask

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = (self.words(ids) + self.places) * mask[..., None]
        x = x.sum(1) / mask.sum(1, keepdim=True).sqrt()
        return F.normalize((x + self.mix(x)).float(), dim=1)


class JudgeModel(nn.Module):
    """Both encoders, one learnt embedding a style (the last is `OTHER`), and the two temperatures."""

    def __init__(self, vocabulary: Sequence[str], styles: int) -> None:
        super().__init__()
        self.image = ImageEncoder()
        self.text = TextEncoder(vocabulary)
        self.style_anchors = nn.Parameter(torch.randn(styles + 1, STYLE_EMBEDDING))
        self.log_scale = nn.Parameter(torch.tensor([3.0, 2.3]))  # subject, style

    def scales(self) -> Tensor:
        """What the cosines are multiplied by before a softmax: subject and style, [2]."""
        return self.log_scale.clamp(max=3.7).exp()


def prepare(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size and mode as the encoder takes them, squares on white: float32 [B, 3, 64, 64] in -1..1."""
    squares = []
    for image in images:
        rgba = image.convert("RGBA")
        side = max(rgba.size)
        page = Image.new("RGBA", (side, side), "white")
        page.alpha_composite(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2))
        how = Image.Resampling.BOX if side >= INPUT_PX else Image.Resampling.BILINEAR
        small = page.convert("RGB").resize((INPUT_PX, INPUT_PX), how)
        squares.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(INPUT_PX, INPUT_PX, 3))
    return torch.stack(squares).permute(0, 3, 1, 2).float() / 127.5 - 1


class Judge:
    """Scores pictures against every label and style; made by `load_judge()`."""

    def __init__(self, model: JudgeModel, labels: Sequence[str], styles: Sequence[str]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.labels = list(labels)
        self.styles = list(styles)
        self._rows = {label: row for row, label in enumerate(self.labels)}
        with torch.no_grad():
            self._texts = model.text(*model.text.tokens(self.labels))  # [n_labels, 128]
            self._anchors = F.normalize(model.style_anchors.float(), dim=1)  # [n_styles + 1, 32]

    @torch.no_grad()
    def _encode(self, images: Sequence[Image.Image], batch: int = 64) -> tuple[Tensor, Tensor]:
        pairs = [self.model.image(prepare(images[i : i + batch])) for i in range(0, len(images), batch)]
        if not pairs:
            return torch.zeros(0, EMBEDDING), torch.zeros(0, STYLE_EMBEDDING)
        return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """What the pictures show, whatever their style: unit vectors, float32 [B, 128]."""
        return self._encode(images)[0]

    def embed_style(self, images: Sequence[Image.Image]) -> Tensor:
        """How the pictures are drawn: unit vectors, float32 [B, 32]."""
        return self._encode(images)[1]

    def embed_labels(self, labels: Sequence[str]) -> Tensor:
        """The labels' unit vectors, float32 [N, 128], in the same space as `embed`.

        Raises: DataError for a label that the judge does not know.
        """
        return self._texts[[self.row_of(label) for label in labels]]

    def subject_scores(self, images: Sequence[Image.Image]) -> Tensor:
        """Cosine of each picture with each label, float32 [B, n_labels] in -1..1, in the order of `labels`."""
        return self.embed(images) @ self._texts.T

    def style_scores(self, images: Sequence[Image.Image]) -> Tensor:
        """Cosine of each picture with each style, float32 [B, n_styles] in -1..1, in the order of `styles`."""
        return self.embed_style(images) @ self._anchors[:-1].T

    def style_probabilities(self, images: Sequence[Image.Image]) -> Tensor:
        """How likely each style is, and last `OTHER`: float32 [B, n_styles + 1], rows sum to 1."""
        return (self.model.scales()[1] * self.embed_style(images) @ self._anchors.T).softmax(1)

    def style_of(self, images: Sequence[Image.Image]) -> list[str]:
        """The likeliest style of each picture, or `OTHER`."""
        names = [*self.styles, OTHER]
        return [names[i] for i in self.style_probabilities(images).argmax(1).tolist()]

    def row_of(self, label: str) -> int:
        """The label's place in `labels`.

        Raises: DataError for a label that the judge does not know; it names the nearest one.
        """
        row = self._rows.get(label.lower())
        if row is None:
            near = difflib.get_close_matches(label.lower(), self.labels, 1)
            hint = f"did you mean {near[0]!r}?" if near else "see load_judge().labels"
            raise DataError(f"label {label!r} is not one that the judge knows: {hint}")
        return row

    def rank_of(self, images: Sequence[Image.Image], labels: Sequence[str]) -> list[int]:
        """For each picture, how many labels the judge puts before the given one: 0 is best.

        Raises: DataError for a label that the judge does not know, or where the two lists differ in length.
        """
        if len(images) != len(labels):
            raise DataError(f"{len(images)} pictures but {len(labels)} labels: give one label for each picture")
        rows = torch.tensor([self.row_of(label) for label in labels], dtype=torch.long)
        scores = self.subject_scores(images)
        own = scores.gather(1, rows[:, None])
        return [int(n) for n in (scores > own).sum(1)]


def load_judge(folder: Path = FOLDER) -> Judge:
    """The judge that ships with `mini`, or the one in `folder` (config.json, model.safetensors), on the CPU in float32.

    Raises: BaseModelError where the folder does not hold a whole judge.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = JudgeModel(config["vocabulary"], len(config["styles"]))
        model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as problem:
        reason = str(problem).splitlines()[0]
        raise BaseModelError(f"{folder}: no usable judge there ({reason}): install sdlora again") from None
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Judge(model, config["labels"], config["styles"])
