"""The full-size families: every tensor of a published checkpoint has its place in the models, and no other."""

from __future__ import annotations

import functools
import hashlib

import pytest
import torch

from sdlora.bases.architecture import CARRIED, find_differing, make_part, make_tokenizers, read_family, read_vocabulary
from sdlora.bases.checkpoint_keys import TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX, find_slots
from sdlora.bases.checkpoint_kind import identify_checkpoint
from sdlora.bases.single_file import match_parts
from tests.single_files import write_header_only

# Tensors of the published files: v1-5-pruned-emaonly (less its position_ids), v2-1_512-ema-pruned (less the last layer
# of its text encoder and the projection), sd_xl_base_1.0 (less position_ids and the logit scale).
COUNTS = {
    "sd1": {"unet": 686, "vae": 248, "text_encoder": 196},
    "sd2": {"unet": 686, "vae": 248, "text_encoder": 23 * 12 + 4},
    "sdxl": {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 32 * 12 + 5},
}
PARAMETERS = {  # as the papers and model cards have them
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}
# Keys of the published files, by name, with their shapes.
KNOWN = {
    "sd1": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.time_embed.2.bias": (1280,),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.bias": (1280,),
        "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm3.weight": (320,),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.encoder.mid.block_2.norm1.weight": (512,),
        "first_stage_model.encoder.conv_out.weight": (8, 512, 3, 3),
        "first_stage_model.decoder.norm_out.bias": (128,),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
    },
    "sd2": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": (3072,),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.transformer.resblocks.0.ln_2.bias": (1024,),
        "cond_stage_model.model.ln_final.weight": (1024,),
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.label_emb.0.2.bias": (1280,),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q.weight": (640, 640),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
        "model.diffusion_model.input_blocks.6.0.op.bias": (640,),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.8.0.in_layers.2.weight": (320, 640, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.bias": (768,),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_proj.bias": (1280,),
        "conditioner.embedders.1.model.transformer.resblocks.9.attn.out_proj.weight": (1280, 1280),
    },
}


def stored_shape(slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    if slot.form in ("first", "second", "third"):
        return (3 * shape[0], *shape[1:])
    return {"transposed": shape[::-1], "matrix": (*shape, 1, 1)}.get(slot.form, shape)


@functools.cache
def full_size(family: str) -> tuple[dict[str, dict[str, tuple[int, ...]]], dict[str, tuple[int, ...]], dict[str, int]]:
    """By part the model's names and shapes; the file's keys and shapes; by part the number of parameters."""
    prefixes = {"unet": UNET_PREFIX, "vae": VAE_PREFIX} | {p: known[0] for p, known in TEXT_PREFIXES[family].items()}
    own, keys, sizes = {}, {}, {}
    for part, prefix in prefixes.items():
        config = read_family(family)[part]
        module = make_part(family, part, config)
        own[part] = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        sizes[part] = sum(p.numel() for p in module.parameters())
        for name, slot in find_slots(part, prefix, own[part], config).items():
            shape = stored_shape(slot, own[part][name])
            assert keys.setdefault(slot.key, shape) == shape
    return own, keys, sizes


@pytest.mark.parametrize("family", COUNTS)
def test_full_size_models_have_the_published_tensors_and_parameters(family):
    own, keys, sizes = full_size(family)
    assert {part: len(names) for part, names in own.items()} == {
        part: count if not part.startswith("text") else len(own[part]) for part, count in COUNTS[family].items()
    }
    assert sizes == PARAMETERS[family]
    by_part = {
        part: sum(key.startswith(TEXT_PREFIXES[family][part][0] if part in TEXT_PREFIXES[family] else start)
                  for key in keys)
        for part, start in {**dict.fromkeys(own, ""), "unet": UNET_PREFIX, "vae": VAE_PREFIX}.items()
    }  # fmt: skip
    assert by_part == COUNTS[family]
    assert len(keys) == sum(by_part.values())
    for key, shape in KNOWN[family].items():
        assert keys[key] == shape, key


@pytest.mark.parametrize("family", COUNTS)
def test_full_size_header_is_recognised_and_every_tensor_has_one_place(family, tmp_path):
    _, keys, _ = full_size(family)
    metadata = {"modelspec.prediction_type": "epsilon"}
    checkpoint = identify_checkpoint(write_header_only(tmp_path / "full.safetensors", keys, metadata))
    parts = match_parts(checkpoint, "epsilon")
    assert checkpoint.family == family
    assert {part.name for part in parts} == set(COUNTS[family])
    places = [(slot.key, slot.form) for part in parts for slot in part.slots.values()]
    assert len(places) == len(set(places))
    assert {key for key, _ in places} == set(keys)


def test_sdxl_file_has_the_2515_tensors_of_the_published_one():
    _, keys, _ = full_size("sdxl")
    left_out = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
    }
    assert len(keys) + len(left_out) == 2515


@pytest.mark.parametrize("family", COUNTS)
def test_unet_and_vae_names_equal_those_of_diffusers_converters(family):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    own, keys, _ = full_size(family)
    # each tensor is told by its own number, so that a swapped pair of one shape would show
    tensors = {key: torch.full((), i).expand(shape) for i, (key, shape) in enumerate(keys.items())}
    for part, convert in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        config = read_family(family)[part]
        theirs = convert(dict(tensors), config)
        slots = find_slots(part, {"unet": UNET_PREFIX, "vae": VAE_PREFIX}[part], own[part], config)
        assert set(theirs) == set(own[part])
        for name, value in theirs.items():
            assert tuple(value.shape) == own[part][name]
            assert int(value.flatten()[0]) == int(tensors[slots[name].key].flatten()[0]), name


def test_vocabulary_is_clips():
    words, merges = read_vocabulary()
    assert len(words) == 49408
    assert len(merges) == 48894
    # ids that the published vocab.json and prompts have
    known = {"!": 0, "!</w>": 256, "a</w>": 320, "cat</w>": 2368, "photo</w>": 1125, "of</w>": 539}
    assert {word: words[word] for word in known} == known
    assert words["<|startoftext|>"] == 49406
    assert words["<|endoftext|>"] == 49407
    digest = hashlib.sha256((CARRIED / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert "MIT" in (CARRIED / "LICENSE-bpe_simple_vocab_16e6.txt").read_text()


@pytest.mark.parametrize(
    ("family", "pads"), [("sd1", [49407]), ("sd2", [0]), ("sdxl", [49407, 0])], ids=["sd1", "sd2", "sdxl"]
)
def test_tokenizers_pad_as_the_family_learnt(family, pads):
    tokenizers = make_tokenizers(family)
    assert [t.pad_token_id for t in tokenizers] == pads
    for tokenizer, pad in zip(tokenizers, pads, strict=True):
        assert tokenizer("a photo of a Cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
        padded = tokenizer("a cat", padding="max_length", truncation=True).input_ids
        assert padded == [49406, 320, 2368, 49407, *[pad] * 73]
        assert len(tokenizer) == 49408


@pytest.mark.parametrize("family", COUNTS)
def test_standard_models_differ_in_nothing_from_the_carried_configurations(family):
    """So a file written of one says nothing of its sizes, and any tool's file of these sizes is read the same way."""
    for part in COUNTS[family]:
        module = make_part(family, part, read_family(family)[part])
        config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
        assert find_differing(family, part, config) == {}
        changed = {"layers_per_block": 1} if part in ("unet", "vae") else {"num_hidden_layers": 2}
        assert find_differing(family, part, config | changed) == changed
