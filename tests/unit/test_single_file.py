"""Single files: what is in them is told or refused in one line, and no tensor is lost, changed or left out silently."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sdlora.bases.architecture import make_part, read_family
from sdlora.bases.checkpoint_kind import PARTS_KEY
from sdlora.bases.checkpoint_writer import write_checkpoint
from sdlora.bases.facts import read_base_facts
from sdlora.bases.family import load_base
from sdlora.bases.single_file import read_checkpoint
from sdlora.config import Recipe, recipe_from_toml, recipe_to_toml
from sdlora.errors import BaseModelError, ConfigError
from tests.single_files import FAMILIES, make_parts, write_header_only, write_tiny_file
from tests.tiny import make_tiny_parts

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    return {family: write_tiny_file(place / f"{family}.safetensors", family) for family in FAMILIES}


@pytest.fixture
def sd1(files, tmp_path):
    return Path(shutil.copy(files["sd1"], tmp_path / "one.safetensors"))


def refusal(path: Path, **options) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(str(path), device="cpu", **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text or "zero terminal" in text
    return text


def edit(path: Path, *, drop=(), metadata=None, **tensors) -> Path:
    """Writes the file again without some keys, with others, and with other metadata."""
    with safetensors.safe_open(path, "pt") as f:
        said = f.metadata()
        kept = {key: f.get_tensor(key).clone() for key in f.keys() if key not in drop}  # noqa: SIM118
    safetensors.torch.save_file(kept | tensors, path, said if metadata is None else metadata)
    return path


# --- what reads back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_files_read_back_to_the_rounded_weights(family, dtype, tmp_path):
    path = write_tiny_file(tmp_path / "half.safetensors", family, dtype)
    for part, state in read_checkpoint(path).items():
        for name, value in make_parts(family)[part].state_dict().items():
            assert state[name].dtype == dtype
            assert torch.equal(state[name], value.to(dtype)), (part, name)
    base = load_base(str(path), device="cpu", precision="fp32", prediction="epsilon")
    weight = make_parts(family)["unet"].conv_in.weight
    assert torch.equal(base.unet.conv_in.weight, weight.to(dtype).float())


def test_f8_weights_are_cast_up(sd1):
    key = f"{UNET}input_blocks.1.0.in_layers.2.weight"
    weight = make_parts("sd1")["unet"].down_blocks[0].resnets[0].conv1.weight.detach()
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        edit(sd1, **{key: weight.to(dtype)})
        base = load_base(str(sd1), device="cpu", precision="bf16")
        assert torch.equal(base.unet.down_blocks[0].resnets[0].conv1.weight, weight.to(dtype).bfloat16())


def test_same_parts_give_the_same_bytes_and_leave_no_half_file(files, tmp_path):
    again = write_tiny_file(tmp_path / "sd1.safetensors", "sd1")
    assert again.read_bytes() == files["sd1"].read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["sd1.safetensors"]
    with safetensors.safe_open(again, "pt") as f:  # the library agrees that it is a sound file
        assert f.metadata()["modelspec.title"] == "sd1"


def test_file_says_its_kind_and_nothing_of_its_folder(files, tmp_path):
    path = write_tiny_file(tmp_path / "vee.safetensors", "sdxl", prediction="v", zero_snr=True)
    with safetensors.safe_open(path, "pt") as f:
        said, keys = f.metadata(), set(f.keys())
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert said["modelspec.prediction_type"] == "v"
    assert said["modelspec.resolution"] == "64x64"
    assert {"v_pred", "ztsnr"} <= keys
    assert str(tmp_path).encode() not in path.read_bytes()
    assert load_base(str(path), device="cpu").name == "vee"


def test_old_text_encoder_names_without_text_model_read_the_same(sd1):
    start = "cond_stage_model.transformer.text_model."
    with safetensors.safe_open(sd1, "pt") as f:
        tensors = {k.replace(start, "cond_stage_model.transformer."): f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        metadata = f.metadata()
    safetensors.torch.save_file(tensors, sd1, metadata)
    state = make_parts("sd1")["text_encoder"].state_dict()
    assert all(torch.equal(state[n], v) for n, v in read_checkpoint(sd1)["text_encoder"].items())


def test_sd2_in_the_newer_layout_reads_the_same(files, tmp_path):
    with safetensors.safe_open(files["sd2"], "pt") as f:
        tensors = {
            k.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): f.get_tensor(k)
            for k in f.keys()  # noqa: SIM118
        }
        metadata = f.metadata()
    safetensors.torch.save_file(tensors, tmp_path / "new.safetensors", metadata)
    state = make_parts("sd2")["text_encoder"].state_dict()
    found = read_checkpoint(tmp_path / "new.safetensors")["text_encoder"]
    assert all(torch.equal(state[n], v) for n, v in found.items())


def test_vae_attention_stored_as_matrices_reads_the_same(sd1):
    key = "first_stage_model.encoder.mid.attn_1.q.weight"
    weight = make_parts("sd1")["vae"].encoder.mid_block.attentions[0].to_q.weight.detach()
    edit(sd1, **{key: weight.clone()})
    assert torch.equal(read_checkpoint(sd1)["vae"]["encoder.mid_block.attentions.0.to_q.weight"], weight)


def test_weights_do_not_change_when_the_file_does(sd1):
    base = load_base(str(sd1), device="cpu")
    before = {n: v.clone() for n, v in base.unet.state_dict().items()}
    data = bytearray(sd1.read_bytes())
    data[-200_000:] = bytes(200_000)
    with sd1.open("r+b") as f:
        f.write(data)
    assert all(torch.equal(v, before[n]) for n, v in base.unet.state_dict().items())


# --- extra, missing and misshapen tensors -------------------------------------------------------------------------


def test_harmless_tensors_are_left_out_and_said_once(sd1, caplog):
    extras = {
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(2),
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "alphas_cumprod": torch.zeros(1000),
        "sqrt_one_minus_alphas_cumprod": torch.zeros(1000),
        "betas": torch.zeros(1000),
        "posterior_mean_coef1": torch.zeros(1000),
        "model_ema.num_updates": torch.tensor(1),
    }
    edit(sd1, **extras)
    with caplog.at_level(logging.WARNING):
        load_base(str(sd1), device="cpu")
    (record,) = [r.getMessage() for r in caplog.records]
    assert f"{len(extras)} tensors that a base does not need are left out (alphas_cumprod, betas, " in record


def test_loading_a_plain_file_says_nothing(files, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        load_base(str(files["sdxl"]), device="cpu", precision="bf16")
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_last_layer_of_open_clip_h_is_left_out_but_another_is_not(files, tmp_path, caplog):
    path = Path(shutil.copy(files["sd2"], tmp_path / "two.safetensors"))
    place = "cond_stage_model.model."
    edit(
        path, **{f"{place}text_projection": torch.zeros(2), f"{place}transformer.resblocks.3.ln_1.bias": torch.ones(2)}
    )
    with caplog.at_level(logging.WARNING):
        load_base(str(path), device="cpu", prediction="epsilon")
    assert "2 tensors that a base does not need" in caplog.text
    edit(path, **{f"{place}transformer.resblocks.4.ln_1.bias": torch.ones(2)})
    assert "holds 1 that no Stable Diffusion 2.x has" in refusal(path, prediction="epsilon")


def test_missing_and_extra_tensors_are_named_and_counted(sd1):
    gone = [f"{UNET}out.2.weight", "first_stage_model.quant_conv.bias"]
    edit(sd1, drop=gone, something_else=torch.zeros(1), **{f"{UNET}input_blocks.99.0.weight": torch.zeros(1)})
    text = refusal(sd1)
    assert "lacks 2 of the " in text
    assert all(key in text for key in gone)
    assert "and holds 2 that no Stable Diffusion 1.x has (model.diffusion_model.input_blocks.99.0.weight," in text


def test_another_shape_is_named_with_both(sd1):
    edit(sd1, **{f"{UNET}out.2.bias": torch.zeros(5)})
    assert f"{UNET}out.2.bias is 5 where a Stable Diffusion 1.x has 4" in refusal(sd1)


def test_integers_and_scaled_quantisation_are_refused(sd1, files, tmp_path):
    edit(sd1, **{f"{UNET}out.2.bias": torch.zeros(4, dtype=torch.int8)})
    assert "is I8; quantised checkpoints are not supported" in refusal(sd1)
    path = Path(shutil.copy(files["sd1"], tmp_path / "scaled.safetensors"))
    edit(path, scaled_fp8=torch.zeros(1))
    assert "quantised with scales" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_named(sd1, value):
    edit(sd1, **{"first_stage_model.quant_conv.bias": torch.full((8,), value)})
    assert "first_stage_model.quant_conv.bias holds NaN or infinity" in refusal(sd1)


def test_a_weight_too_large_for_the_precision_says_so(sd1):
    edit(sd1, **{f"{UNET}out.2.bias": torch.full((4,), 1e6)})
    assert "out.2.bias is too large for float16; use --precision bf16 or fp32" in refusal(sd1, precision="fp16")
    load_base(str(sd1), device="cpu", precision="bf16")


# --- damaged files ------------------------------------------------------------------------------------------------


def test_truncated_and_damaged_files_are_one_line(sd1):
    data = sd1.read_bytes()
    for cut, why in (
        (data[:-1], "truncated"),
        (data[: len(data) // 2], "truncated"),
        (data[:100], "truncated"),
        (data[:5], "too few"),
        (b"", "is empty"),
        (data + b"x", "1 bytes follow"),
        (struct.pack("<Q", 2**40) + data[8:], "no .safetensors file"),
        (data[:8] + b"\x00" * 100 + data[108:], "broken header"),
    ):
        sd1.write_bytes(cut)
        assert why in refusal(sd1)
    assert "train it again" not in refusal(sd1)


def test_pickles_are_refused_whatever_their_suffix(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "new.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name in ("new.safetensors", "old.safetensors"):
        assert "is a pickle, which can run code" in refusal(tmp_path / name)
    for suffix in (".ckpt", ".pt", ".bin", ".pth"):
        path = tmp_path / f"model{suffix}"
        shutil.copy(tmp_path / "new.safetensors", path)
        assert "can run code" in refusal(path)


def test_metadata_that_makes_no_model_is_refused(sd1):
    def say(parts: object) -> str:
        text = parts if isinstance(parts, str) else json.dumps(parts)
        return refusal(edit(sd1, metadata={PARTS_KEY: text}))

    assert "cannot be read" in say("{")
    assert "cannot be read" in say([1])
    assert "layers_per_block = 100000" in say({"unet": {"layers_per_block": 100_000}})
    assert "in_channels = 9" in say({"unet": {"in_channels": 9}})
    assert "its sizes make no Stable Diffusion 1.x" in say({"unet": {"down_block_types": ["Nonsense"] * 4}})


# --- files of another kind ----------------------------------------------------------------------------------------

PLAIN = {f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3), "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)}
CLIP = {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768)}
CLIP_G = {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)}
LABELS = {f"{UNET}label_emb.0.0.weight": (1536, 2560)}
OTHERS = {
    "an inpainting model": PLAIN | CLIP | {f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)},
    "an instruct-pix2pix model": PLAIN | CLIP | {f"{UNET}input_blocks.0.0.weight": (320, 8, 3, 3)},
    "an upscaler": PLAIN | CLIP | {f"{UNET}input_blocks.0.0.weight": (320, 7, 3, 3)},
    "another kind of model (its UNet has 12": PLAIN | CLIP | {f"{UNET}input_blocks.0.0.weight": (320, 12, 3, 3)},
    "an SDXL refiner": PLAIN | CLIP_G | LABELS,
    "Stable Diffusion 3": {f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (8, 8)} | PLAIN,
    "is Flux": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
    "is Chroma": {f"{UNET}distilled_guidance_layer.in_proj.bias": (8,), f"{UNET}double_blocks.0.a": (8,)},
    "PixArt or Sana": {"adaln_single.linear.weight": (8, 8), "transformer_blocks.0.attn1.to_q.weight": (8, 8)},
    "AuraFlow": {"double_layers.0.attn.w2q.weight": (8, 8)},
    "Stable Cascade": {"clip_txt_mapper.weight": (8, 8)},
    "a diffusion transformer": {f"{UNET}cap_embedder.0.weight": (8,)},
    "Kolors": {"encoder_hid_proj.weight": (8, 8), "down_blocks.0.resnets.0.norm1.weight": (8,)},
    "Playground 2.5": PLAIN | {"edm_mean": (4,)},
    "a CosXL": PLAIN | {"edm_vpred.sigma_max": (1,)},
    "AltDiffusion": PLAIN | {"cond_stage_model.roberta.embeddings.word_embeddings.weight": (8, 8)},
    "is a LoRA, not a base; give it with --lora": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)},
    "is a LoRA, not": {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 8)},
    "a ControlNet": {"control_model.input_hint_block.0.weight": (16, 3, 3, 3)},
    "an IP-Adapter": {"ip_adapter.1.to_k_ip.weight": (8, 8)},
    "a video model": {"down_blocks.0.motion_modules.0.proj.weight": (8, 8)},
    "a textual inversion": {"emb_params": (8, 768)},
    "a UNet alone": {f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3)},
    "is a UNet alone": {"down_blocks.0.resnets.0.norm1.weight": (320,), "conv_in.weight": (320, 4, 3, 3)},
    "a VAE alone": {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)},
    "is a VAE alone": {"encoder.down_blocks.0.resnets.0.norm1.weight": (128,), "quant_conv.weight": (8, 8, 1, 1)},
    "a text encoder alone": CLIP,
    "is a text encoder alone": {"text_model.embeddings.token_embedding.weight": (49408, 768)},
    "has no UNet": CLIP | {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)},
    "has no text encoder": PLAIN,
    "has no VAE": CLIP | {f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3)},
    "has no second text encoder": {},
    "no checkpoint that is known: none of its 1 keys fits, such as what": {"what": (3,)},
    "holds no tensors": {},
}
OTHERS["has no second text encoder"] = (
    PLAIN | LABELS | {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (768,)}
)


@pytest.mark.parametrize("what", OTHERS)
def test_files_of_another_kind_are_refused_with_what_they_are(what, tmp_path):
    path = write_header_only(tmp_path / "other.safetensors", OTHERS[what])
    assert what in refusal(path)
    with pytest.raises(BaseModelError, match=what.replace("(", r"\(")):
        read_base_facts(str(path))


def test_text_encoder_with_other_words_is_refused(tmp_path):
    parts = make_parts("sd1") | {"text_encoder": make_tiny_parts(0, "sd1")["text_encoder"]}
    with pytest.raises(BaseModelError, match="carries no vocabulary"):
        write_checkpoint(parts, tmp_path / "own.safetensors", "sd1")
    path = write_tiny_file(tmp_path / "one.safetensors", "sd1")
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    edit(path, **{key: torch.zeros(600, 32)})
    assert "knows 600 words where CLIP's vocabulary has 49408" in refusal(path)


# --- what is written ----------------------------------------------------------------------------------------------


def test_parts_that_make_no_checkpoint_are_refused_and_nothing_is_written(tmp_path):
    parts, path = make_parts("sd1"), tmp_path / "one.safetensors"
    short = {k: v for k, v in parts.items() if k != "vae"}
    for given, family, dtype, why in (
        (short, "sd1", torch.float16, "needs its vae"),
        (parts, "mini", torch.float16, "a mini base has no single-file form"),
        (parts, "sd1", torch.int8, "cannot be written"),
        (parts, "sdxl", torch.float16, "unet is no part of a Stable Diffusion XL checkpoint"),
    ):
        with pytest.raises(BaseModelError, match=why):
            write_checkpoint(given, path, family, dtype)
    broken = make_tiny_parts(1, "sd1")["unet"]
    torch.nn.init.constant_(broken.conv_out.bias, 1e6)
    with pytest.raises(BaseModelError, match=r"model.diffusion_model.out.2.bias is not finite as torch.float16"):
        write_checkpoint(parts | {"unet": broken}, path, "sd1", torch.float16)
    with pytest.raises(BaseModelError, match="zero terminal SNR goes with prediction v"):
        write_checkpoint(parts, path, "sd1", zero_snr=True)
    with pytest.raises(BaseModelError, match="must end in"):
        write_checkpoint(parts, tmp_path / "one.ckpt", "sd1")
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(sd1):
    before = sd1.read_bytes()
    broken = make_tiny_parts(1, "sd1")["unet"]
    torch.nn.init.constant_(broken.conv_out.bias, float("nan"))
    with pytest.raises(BaseModelError, match="not finite"):
        write_checkpoint(make_parts("sd1") | {"unet": broken}, sd1, "sd1", torch.float32)
    assert sd1.read_bytes() == before
    assert [p.name for p in sd1.parent.iterdir()] == [sd1.name]


# --- what the base predicts ---------------------------------------------------------------------------------------


def predicts(path: Path, **options) -> tuple[str, bool]:
    base = load_base(str(path), device="cpu", **options)
    zero = float(base.alphas_cumprod[-1]) == 0
    assert zero == bool(base.scheduler_config.get("rescale_betas_zero_snr"))
    return base.scheduler_config["prediction_type"], zero


def test_markers_and_metadata_tell_velocity_from_noise(files, tmp_path, caplog):
    path = Path(shutil.copy(files["sdxl"], tmp_path / "x.safetensors"))
    mark, rest = torch.zeros(0), {PARTS_KEY: identify_metadata(path)[PARTS_KEY]}
    edit(path, metadata=rest)
    assert predicts(path) == ("epsilon", False)
    edit(path, metadata=rest | {"modelspec.prediction_type": "v"})
    assert predicts(path) == ("v_prediction", False)
    assert "x predicts velocity (its metadata, modelspec.prediction_type)" in caplog.text
    edit(path, metadata=rest | {"modelspec.predict_key": "v"})
    assert predicts(path) == ("v_prediction", False)
    edit(path, metadata=rest | {"modelspec.prediction_type": "epsilon"}, v_pred=mark)
    assert predicts(path) == ("v_prediction", False)
    edit(path, v_pred=mark, ztsnr=mark)
    assert predicts(path) == ("v_prediction", True)
    assert "x predicts velocity, with zero terminal SNR (its v_pred key)" in caplog.text
    assert "left out" not in caplog.text
    assert predicts(path, prediction="epsilon") == ("epsilon", False)
    assert predicts(path, zero_snr=False) == ("v_prediction", False)
    assert "zero terminal SNR needs a base that predicts velocity" in refusal(path, prediction="epsilon", zero_snr=True)
    edit(path, drop=["v_pred"], metadata=rest)
    assert "it has a ztsnr key, which goes with velocity, but no v_pred key" in refusal(path)
    assert predicts(path, prediction="v") == ("v_prediction", True)


def identify_metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as f:
        return dict(f.metadata())


def test_sd2_that_does_not_say_must_be_told(files, tmp_path):
    path = Path(shutil.copy(files["sd2"], tmp_path / "two.safetensors"))
    parts = {PARTS_KEY: identify_metadata(path)[PARTS_KEY]}
    edit(path, metadata=parts)
    text = refusal(path)
    assert "add --prediction epsilon or --prediction v" in text
    with pytest.raises(BaseModelError, match="add --prediction"):
        read_base_facts(str(path))
    assert predicts(path, prediction="v") == ("v_prediction", False)
    assert predicts(path, prediction="epsilon") == ("epsilon", False)
    edit(path, metadata=parts | {"modelspec.architecture": "stable-diffusion-v2-768-v/lora-merge"})
    assert predicts(path) == ("v_prediction", False)
    edit(path, metadata=parts | {"modelspec.architecture": "stable-diffusion-v2-512"})
    assert predicts(path) == ("epsilon", False)


@pytest.mark.parametrize(
    ("family", "prediction", "side"), [("sd1", "auto", 512), ("sd2", "epsilon", 512), ("sd2", "v", 768)]
)
def test_side_is_the_familys_where_the_file_does_not_say(files, tmp_path, family, prediction, side):
    path = Path(shutil.copy(files[family], tmp_path / "x.safetensors"))
    edit(path, metadata={PARTS_KEY: identify_metadata(path)[PARTS_KEY]})
    assert read_base_facts(str(path), prediction).resolution_px == side
    assert load_base(str(path), device="cpu", prediction=prediction).resolution_px == side


def test_facts_of_a_file_need_no_weights(files):
    facts = read_base_facts(str(files["sdxl"]))
    assert facts.resolution_px == 64
    assert facts.count_tokens(["a photo of a cat"]) == ([7], 77)


def test_recipe_says_prediction_and_zero_snr():
    recipe = Recipe(prediction="v", zero_terminal_snr=True)
    assert Recipe().zero_terminal_snr is None
    with pytest.raises(ConfigError, match="zero_terminal_snr = true needs a base that predicts velocity"):
        Recipe(prediction="epsilon", zero_terminal_snr=True)
    with pytest.raises(ConfigError, match="prediction"):
        Recipe(prediction="x0")
    text = recipe_to_toml(recipe)
    assert 'prediction = "v"' in text
    assert "zero_terminal_snr = true" in text


def test_recipe_with_prediction_survives_its_toml(tmp_path):
    recipe = Recipe(prediction="v", zero_terminal_snr=False)
    (tmp_path / "r.toml").write_text(recipe_to_toml(recipe))
    assert recipe_from_toml(tmp_path / "r.toml") == recipe


def test_carried_configurations_make_models_that_take_no_memory():
    unet = make_part("sdxl", "unet", read_family("sdxl")["unet"])
    assert all(p.is_meta for p in unet.parameters())
