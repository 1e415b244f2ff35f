"""Image features of the judge, CLIP and DINO, against the models called by hand; the last two are tiny and random."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sdlora.bases.mini.judge import load_judge
from sdlora.errors import ConfigError
from sdlora.generating.features import (
    BATCH_PICTURES,
    ClipFeatures,
    DinoFeatures,
    JudgeFeatures,
    TwoFeatures,
    load_features,
)

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a tiny CLIP, both towers, and the model."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip import CLIPImageProcessor

    torch.manual_seed(0)
    vision = TOWER | {"image_size": 32, "patch_size": 16}
    text = TOWER | {"vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """The folder of a tiny DINO, and the model."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    model = Dinov2Model(Dinov2Config(**TOWER, image_size=28, patch_size=14)).eval()
    folder = tmp_path_factory.mktemp("dino")
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder)
    return folder, model


def make_pictures(count=3, mode="RGB"):
    return [Image.effect_noise((40, 50 + i), 40 + 9 * i).convert(mode) for i in range(count)]


def pixels_of(folder, pictures):
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, use_fast=False)(pictures, return_tensors="pt")["pixel_values"]


def test_clip_features_are_the_whole_model_s_image_embeddings(clip):
    folder, model = clip
    pictures = make_pictures()
    features = ClipFeatures(str(folder))
    with torch.no_grad():
        hidden = model.vision_model(pixel_values=pixels_of(folder, pictures)).pooler_output
        expected = F.normalize(model.visual_projection(hidden), dim=1)
    torch.testing.assert_close(features.style(pictures), expected)
    torch.testing.assert_close(features.subject(pictures), expected)
    assert features.name.startswith("CLIP (clip")


def test_dino_features_are_the_normalised_class_token(dino):
    folder, model = dino
    pictures = make_pictures()
    with torch.no_grad():
        expected = F.normalize(model(pixel_values=pixels_of(folder, pictures)).last_hidden_state[:, 0], dim=1)
    torch.testing.assert_close(DinoFeatures(str(folder)).subject(pictures), expected)


def test_many_pictures_are_read_in_batches_and_in_order(clip):
    features = ClipFeatures(str(clip[0]))
    pictures = make_pictures(BATCH_PICTURES + 2)
    torch.testing.assert_close(features.style(pictures)[-1:], features.style(pictures[-1:]))


def test_pictures_of_any_mode_are_read(dino):
    features = DinoFeatures(str(dino[0]))
    grey = make_pictures(2, "L")
    torch.testing.assert_close(features.style(grey), features.style([p.convert("RGB") for p in grey]))


def test_two_readers_share_the_work(clip, dino):
    by_clip, by_dino = ClipFeatures(str(clip[0])), DinoFeatures(str(dino[0]))
    both = TwoFeatures(by_clip, by_dino)
    pictures = make_pictures()
    assert torch.equal(both.style(pictures), by_clip.style(pictures))
    assert torch.equal(both.subject(pictures), by_dino.subject(pictures))
    assert both.name == f"{by_clip.name} for the style, {by_dino.name} for the subject"


def test_judge_reads_style_and_subject_with_its_two_heads():
    judge, pictures = load_judge(), make_pictures(2)
    features = JudgeFeatures(judge)
    assert torch.equal(features.style(pictures), judge.embed_style(pictures))
    assert torch.equal(features.subject(pictures), judge.embed(pictures))


def test_base_decides_what_looks_at_its_pictures(clip, dino):
    assert isinstance(load_features("mini"), JudgeFeatures)
    both = load_features("mini", str(clip[0]), str(dino[0]))
    assert isinstance(both, TwoFeatures)
    assert isinstance(both.by_style, ClipFeatures)
    assert isinstance(both.by_subject, DinoFeatures)
    assert isinstance(load_features("mini", clip=str(clip[0])), ClipFeatures)
    assert isinstance(load_features("mini", dino=str(dino[0])), DinoFeatures)
    with pytest.raises(ConfigError, match="give --clip and --dino a folder or hub id, such as openai"):
        load_features("sd1")


def test_what_cannot_be_read_is_one_line_that_names_the_flag(clip, dino, tmp_path):
    with pytest.raises(ConfigError, match=r"^--clip \S+: is a dinov2, not a CLIP; give a folder or hub id of one$"):
        ClipFeatures(str(dino[0]))
    with pytest.raises(ConfigError, match=r"^--dino \S+: is a clip, not a DINO"):
        DinoFeatures(str(clip[0]))
    with pytest.raises(ConfigError, match=r"^--clip \S+: there is no such folder"):
        ClipFeatures(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"^--dino \S+: no DINO can be read there") as found:
        DinoFeatures(str(tmp_path))
    assert "\n" not in str(found.value)
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in dino[0].iterdir():
        data = file.read_bytes()
        (cut / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(ConfigError, match=r"^--dino \S+: no DINO can be read there"):
        DinoFeatures(str(cut))
