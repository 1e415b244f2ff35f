"""A base loads with the very weights of its folder, and what is wrong with a folder is one line."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sdlora.bases.family import load_base
from sdlora.bases.source import choose_files, resolve_source, revision_of
from sdlora.errors import BaseModelError
from tests.tiny import make_tiny_base, make_tiny_parts, save_tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture
def broken(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(name) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(str(name), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_loaded_weights_equal_the_saved_ones_in_the_dtype(folder, precision, dtype):
    base = load_base(str(folder), device="cpu", precision=precision)
    for part, module in make_tiny_parts(0).items():
        loaded = base.modules[part].state_dict()
        for name, value in module.state_dict().items():
            wanted = value.to(dtype) if value.is_floating_point() else value
            assert torch.equal(loaded[name], wanted), (part, name)
        assert not base.modules[part].training
        assert not any(p.requires_grad for p in base.modules[part].parameters())
    assert base.name == "pipeline"
    assert base.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert base.resolution_px == 64


def test_loading_says_nothing(folder, capfd, caplog, recwarn):
    with caplog.at_level(logging.WARNING):
        load_base(str(folder), device="cpu", precision="bf16")
    assert capfd.readouterr() == ("", "")
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_fp16_variant_files_load(broken):
    for path in broken.rglob("*.safetensors"):
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(tensors, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()
    base = load_base(str(broken), device="cpu")
    expected = make_tiny_parts(0)["unet"].conv_in.weight.half().float()
    assert torch.equal(base.unet.conv_in.weight, expected)


def test_tokens_are_padded_to_77_and_their_untruncated_length_is_told(folder):
    base = load_base(str(folder), device="cpu")
    ids, lengths = base.tokenize(["cat", "", "x " * 90])
    assert ids.shape == (3, 1, 1, 77)
    ids = ids[:, 0, 0]
    start, end = base.tokenizer.bos_token_id, base.tokenizer.eos_token_id
    cat = base.tokenizer.convert_tokens_to_ids("cat</w>")
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == [start, cat, *[end] * 75]
    assert ids[1].tolist() == [start, *[end] * 76]
    assert lengths == [3, 2, 92]


def test_velocity_base_loads_and_another_prediction_type_does_not(broken):
    path = broken / "scheduler" / "scheduler_config.json"
    edit(path, prediction_type="v_prediction")
    assert load_base(str(broken), device="cpu").scheduler_config["prediction_type"] == "v_prediction"
    edit(path, prediction_type="flow")
    assert "prediction type 'flow' is not known" in refusal(broken)


def test_fingerprint_changes_with_the_weights_and_with_nothing_else(folder, broken):
    before = load_base(str(folder), device="cpu").fingerprint
    assert load_base(str(broken), device="cpu").fingerprint == before
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({k: v * 1.5 for k, v in tensors.items()}, path, {"format": "pt"})
    assert load_base(str(broken), device="cpu").fingerprint != before


def test_base_that_does_not_exist_is_one_line(tmp_path):
    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    assert "there is no such folder" in refusal("nowhere")
    assert "no model_index.json" in refusal(tmp_path)


def test_pickles_and_files_that_are_no_base_are_refused_with_the_reason(tmp_path):
    for name in ("model.ckpt", "model.pt", "model.bin"):
        assert "can run code" in refusal(tmp_path / name)
    (tmp_path / "one.safetensors").write_bytes(b"")
    assert "is empty (0 bytes)" in refusal(tmp_path / "one.safetensors")
    assert "there is no such file" in refusal(tmp_path / "two.safetensors")
    (tmp_path / "notes.txt").write_text("")
    assert "not a base" in refusal(tmp_path / "notes.txt")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_weights_are_named(broken, part):
    path = next((broken / part).glob("*.safetensors"))
    path.unlink()
    assert f"{path.name} is missing" in refusal(broken)
    path.with_suffix(".bin").write_bytes(b"")
    assert "pickled .bin weights, which can run code" in refusal(broken)


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"])
def test_missing_or_garbled_config_is_named(broken, name):
    (broken / name).write_text("{")
    assert name in refusal(broken)
    (broken / name).unlink()
    assert name in refusal(broken)


def test_missing_tokenizer_is_named(broken):
    shutil.rmtree(broken / "tokenizer")
    assert "vocab.json" in refusal(broken)


def test_truncated_and_empty_weights_are_named(broken):
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    for cut in (data[:-1], data[: len(data) // 2], data[:100], data[:5], b"", b"not safetensors at all" * 50):
        path.write_bytes(cut)
        assert str(path) in refusal(broken)


def test_weights_that_misfit_the_config_are_named(broken):
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    missing = dict(tensors)
    del missing["conv_in.weight"]
    safetensors.torch.save_file(missing, path, {"format": "pt"})
    assert "conv_in.weight" in refusal(broken)
    safetensors.torch.save_file(tensors | {"conv_in.weight": torch.zeros(3, 4, 3, 3)}, path, {"format": "pt"})
    assert str(path) in refusal(broken)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_and_extra_weights_of_a_folder_are_counted(broken, part):
    path = next((broken / part).glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    gone = sorted(name for name in tensors if name.endswith(".bias"))[:2]
    more = {f"extra.{i}.weight": torch.zeros(1) for i in range(3)}
    kept = {name: value for name, value in tensors.items() if name not in gone}
    safetensors.torch.save_file(kept | more, path, {"format": "pt"})
    text = refusal(broken)
    assert str(path) in text
    assert "2 weights are missing (" in text
    assert "3 weights belong to nothing (extra.0.weight is the first)" in text
    safetensors.torch.save_file(tensors | more, path, {"format": "pt"})
    text = refusal(broken)
    assert "are missing" not in text
    assert "3 weights belong to nothing (extra.0.weight is the first)" in text


def test_position_numbers_of_older_folders_are_no_extra(broken):
    path = broken / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "text_model.embeddings.position_ids"
    more = {name: torch.arange(77)[None], "logit_scale": torch.zeros(1)}
    safetensors.torch.save_file(tensors | more, path, {"format": "pt"})
    assert load_base(str(broken), device="cpu").family.name == "sd1"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_a_folder_that_are_not_finite_are_counted(broken, part, value):
    path = next((broken / part).glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    for name in [name for name in tensors if name.endswith(".bias")][:2]:
        tensors[name].view(-1)[-1] = value
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    text = refusal(broken)
    assert f"{path}: 2 of its weights hold NaN or infinity as float32 (" in text
    assert text.endswith("; use another base")


def test_weights_too_large_for_float16_name_the_precision(broken):
    path = next((broken / "unet").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    tensors["conv_in.bias"].view(-1)[0] = 1e5
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    load_base(str(broken), device="cpu", precision="bf16")
    with pytest.raises(BaseModelError) as error:
        load_base(str(broken), device="cpu", precision="fp16")
    assert "1 of its weights hold NaN or infinity as float16 (conv_in.bias is the first)" in str(error.value)
    assert "use --precision bf16 where float16 is too small" in str(error.value)


def test_a_vae_of_other_latents_is_refused_with_both_sizes():
    from diffusers import AutoencoderKL

    base = make_tiny_base()
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 16), "norm_num_groups": 4,
    }  # fmt: skip
    deeper = {key: (*value, value[-1]) if isinstance(value, tuple) else value for key, value in blocks.items()}
    wrong = (
        (AutoencoderKL(latent_channels=4, **blocks), "4 channels of each 4 x 4 px where a mini has 4 of 8 x 8"),
        (AutoencoderKL(latent_channels=16, **deeper), "16 channels of each 8 x 8 px where a mini has 4 of 8 x 8"),
    )
    for vae, says in wrong:
        with pytest.raises(BaseModelError, match=says):
            base.family.assemble(
                "tiny", base.modules | {"vae": vae}, base.tokenizers, base.scheduler_config, base.device, base.dtype
            )


def test_missing_text_encoder_weights_are_not_made_up(broken):
    path = broken / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(k for k in tensors if k.endswith("q_proj.weight"))
    del tensors[name]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert "1 weights are missing" in refusal(broken)


@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
    ],
)
def test_other_kinds_are_refused_by_name(broken, kind):
    edit(broken / "model_index.json", _class_name=kind)
    assert kind in refusal(broken)


def test_inpainting_unet_is_refused(tmp_path):
    assert "9 input channels" in refusal(save_tiny_pipeline(tmp_path / "inpaint", in_channels=9))


def test_unknown_precision_and_device_are_refused(folder):
    with pytest.raises(BaseModelError, match="precision 'int8'"):
        load_base(str(folder), precision="int8")
    with pytest.raises(BaseModelError, match="device 'tpu'"):
        load_base(str(folder), device="tpu")


def test_public_name_is_never_a_path(folder):
    source, name, family = resolve_source(f"{folder}/")
    assert (source.resolve(), name, family) == (folder.resolve(), "pipeline", None)


def test_only_safetensors_are_asked_of_the_hub():
    small = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
    small += [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]
    plain = ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    half = "text_encoder/model.fp16.safetensors"
    other = ["v1-5.ckpt", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"]
    files, missing = choose_files([*small, *plain, half, *other, "safety_checker/model.safetensors"])
    assert sorted(files) == sorted([*small, *plain, half])
    assert missing == []
    files, missing = choose_files([*small, "unet/diffusion_pytorch_model.bin"])
    assert missing == [*plain, "text_encoder/model.safetensors"]


def test_both_text_encoders_of_an_sdxl_are_asked_of_the_hub():
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    small = ["model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)]
    small += [f"{name}/{file}" for name in ("tokenizer", "tokenizer_2") for file in ("vocab.json", "merges.txt")]
    weights = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    weights += ["text_encoder/model.safetensors", "text_encoder_2/model.fp16.safetensors"]
    files, missing = choose_files([*small, *weights, "sd_xl_base_1.0.safetensors", "text_encoder_2/model.onnx"])
    assert sorted(files) == sorted([*small, *weights])
    assert missing == []
    assert choose_files([*small, *weights[:3]])[1] == ["text_encoder_2/model.safetensors"]


def test_hub_id_that_cannot_be_had_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    assert "nobody/nothing: no such folder here, and the hub does not give it: no network" in refusal("nobody/nothing")


def test_hub_id_in_the_cache_needs_no_network(folder, monkeypatch):
    import huggingface_hub

    def cached(name, local_files_only=False, **kwargs):
        assert local_files_only
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    source, name, _ = resolve_source("someone/model")
    assert (source, name) == (folder, "someone/model")


def test_a_revision_is_that_of_the_hubs_cache_alone():
    commit = "0123456789abcdef" * 2 + "01234567"
    cache = Path("cache") / "models--someone--model" / "snapshots"
    assert revision_of(cache / commit) == commit
    for other in (
        cache / commit[:39],
        cache / commit.upper(),
        Path("models--a--b") / commit,
        Path("snapshots") / commit,
    ):
        assert revision_of(other) == ""


def test_a_lora_says_the_revision_of_its_base():
    from sdlora.config import Recipe
    from sdlora.training.adapting import make_card, name_sources

    commit = "f" * 40
    base = dataclasses.replace(make_tiny_base(), source=Path("models--someone--model") / "snapshots" / commit)
    card = make_card(base, Recipe(), name_sources(base, Recipe()))
    assert card.settings["base_revision"] == commit
    assert (
        "base_revision" not in make_card(make_tiny_base(), Recipe(), name_sources(make_tiny_base(), Recipe())).settings
    )
