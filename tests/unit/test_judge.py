"""The judge that ships with `mini`, held against real pictures, pictures of nothing and what its README publishes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.bases.mini.judge import FOLDER, OTHER, Judge, load_judge, prepare, words_of
from sdlora.errors import BaseModelError, DataError

DATASETS = Path(__file__).parents[2] / "datasets"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def drawings(folder: str) -> tuple[list[Image.Image], list[str]]:
    """The pictures of a shipped data folder and their labels, which are the file names."""
    files = sorted((DATASETS / folder).glob("*.png"))
    images = [Image.open(f).convert("RGB") for f in files]
    return images, [f.stem.replace("-", " ") for f in files]


@pytest.fixture(scope="module")
def ink() -> tuple[list[Image.Image], list[str]]:
    return drawings("ink")


# The judge names 96.9 % of held-out ink pictures and 69.6 % of held-out clay ones, which it takes for flat.
@pytest.mark.parametrize(("style", "floor"), [("ink", 0.95), ("clay", 0.65)])
def test_style_of_the_shipped_pictures_is_named(judge: Judge, style: str, floor: float) -> None:
    images, _ = drawings(style)
    said = judge.style_of(images)
    assert said.count(style) >= floor * len(said), said


@pytest.mark.parametrize("style", ["ink", "clay"])
def test_things_of_the_shipped_pictures_are_in_the_top_five(judge: Judge, style: str) -> None:
    images, labels = drawings(style)
    ranks = judge.rank_of(images, labels)
    assert sum(r < 5 for r in ranks) >= 0.9 * len(ranks), dict(zip(labels, ranks, strict=True))


def test_the_cat_is_recognised_in_every_shipped_face(judge: Judge) -> None:
    images, _ = drawings("cat")
    ranks = judge.rank_of(images, ["the cat"] * len(images))
    assert max(ranks) < 5
    assert ranks.count(0) >= 0.8 * len(ranks), ranks


def test_other_things_are_not_the_cat(judge: Judge, ink: tuple[list[Image.Image], list[str]]) -> None:
    ranks = judge.rank_of(ink[0], ["the cat"] * len(ink[0]))
    assert sum(r < 5 for r in ranks) <= 0.05 * len(ranks), ranks


def test_colourful_pictures_are_not_called_ink_even_in_grey(judge: Judge) -> None:
    images = drawings("clay")[0] + drawings("cat")[0]
    grey = [image.convert("L") for image in images]
    assert judge.style_of(images).count("ink") <= 0.05 * len(images)
    assert judge.style_of(grey).count("ink") <= 0.1 * len(images)


def test_pictures_of_nothing_have_no_style(judge: Judge) -> None:
    rng = np.random.default_rng(0)
    nothing = [Image.new("RGB", (128, 128), c) for c in ("white", "black", "grey", "red")]
    nothing += [Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)) for _ in range(4)]
    assert judge.style_of(nothing) == [OTHER] * 8
    assert judge.style_probabilities(nothing)[:, judge.styles.index("ink")].max() < 0.2


def test_scores_agree_with_ranks_embeddings_and_names(judge: Judge, ink: tuple[list[Image.Image], list[str]]) -> None:
    images, labels = ink[0][:6], ink[1][:6]
    scores = judge.subject_scores(images)
    assert scores.shape == (6, len(judge.labels))
    order = scores.argsort(1, descending=True).tolist()
    assert judge.rank_of(images, labels) == [o.index(judge.row_of(x)) for o, x in zip(order, labels, strict=True)]
    own = (judge.embed(images) * judge.embed_labels(labels)).sum(1)
    torch.testing.assert_close(own, scores[range(6), [judge.row_of(x) for x in labels]])
    torch.testing.assert_close(judge.embed(images).norm(dim=1), torch.ones(6))
    chances = judge.style_probabilities(images)
    torch.testing.assert_close(chances.sum(1), torch.ones(6))
    assert torch.equal(chances[:, :-1].argmax(1), judge.style_scores(images).argmax(1))


def test_a_picture_is_judged_alike_in_any_batch_size_and_mode(judge: Judge) -> None:
    images = drawings("clay")[0][:5]
    together = judge.subject_scores(images)
    alone = torch.cat([judge.subject_scores([image]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    doubled = [image.resize((256, 256), Image.Resampling.NEAREST) for image in images]
    torch.testing.assert_close(judge.subject_scores(doubled), together, atol=1e-5, rtol=0)
    grey = [image.convert("L") for image in images]
    assert torch.equal(prepare(grey), prepare([image.convert("RGB") for image in grey]))


def test_transparent_and_oblong_pictures_lie_on_white() -> None:
    clear = Image.new("RGBA", (128, 64), (0, 0, 0, 0))
    assert torch.equal(prepare([clear]), torch.ones(1, 3, 64, 64))
    bar = prepare([Image.new("RGB", (128, 64), "black")])
    assert bar[0, :, :16].eq(1).all()
    assert bar[0, :, 16:48].eq(-1).all()
    assert bar[0, :, 48:].eq(1).all()


def test_an_unknown_label_names_the_nearest(judge: Judge) -> None:
    with pytest.raises(DataError, match=r"'red aple'.*'red apple'"):
        judge.rank_of([Image.new("RGB", (128, 128))], ["red aple"])
    with pytest.raises(DataError, match="1 pictures but 2 labels"):
        judge.rank_of([Image.new("RGB", (128, 128))], ["fox", "fox"])


def test_no_pictures_give_empty_scores(judge: Judge) -> None:
    assert judge.rank_of([], []) == []
    assert judge.subject_scores([]).shape == (0, len(judge.labels))
    assert judge.style_of([]) == []


def test_a_folder_without_a_judge_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        load_judge(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_bytes((FOLDER / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((FOLDER / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(BaseModelError, match="no usable judge"):
        load_judge(tmp_path)


def test_labels_and_files_are_what_the_readme_says(judge: Judge) -> None:
    assert len(judge.labels) == 862
    assert "the cat" in judge.labels
    assert judge.styles == ["noto", "twemoji", "emojione", "fxemoji", "flat", "clay", "ink"]
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 4_000_000
    figures = json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))
    top5 = figures["accuracy"]["held out, as drawn"]["subject_top5"]
    assert f"| {100 * top5:.1f} % |" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_words_are_parted_at_marks() -> None:
    assert words_of("T-shirt") == ["t", "shirt"]
    assert words_of("jack-o-lantern") == ["jack", "o", "lantern"]
