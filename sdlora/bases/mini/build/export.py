"""Writes the built parts as the diffusers folder that ships in the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from .captions import emoji_tags, learn_vocabulary
from .layout import new_head
from .pictures import Pictures
from .state import load_state, save_state
from .unet import SCHEDULE, new_text_encoder, new_unet, trained_things
from .vae import load_vae

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def learn_tokenizer(pictures: Pictures, art_folder: Path, work: Path) -> CLIPTokenizer:
    """The tokenizer learnt from all labels and search words; cached in the build folder."""
    folder = work / "tokenizer"
    if not (folder / "vocab.json").exists():
        vocab, merges = learn_vocabulary(sorted(set(pictures.labels)), emoji_tags(art_folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
        (folder / "things.json").write_text(json.dumps(trained_things(pictures), indent=0), "utf-8")
    return read_tokenizer(folder)


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIPTokenizer from `vocab.json` and `merges.txt`."""
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()[1:]
    merges: Any = [tuple(line.split(" ")) for line in lines if line]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def export_mini(work: Path, out: Path = WEIGHTS) -> None:
    """Writes the diffusers folder in fp16, with the UNet's and the text encoder's running averages."""
    tokenizer = read_tokenizer(work / "tokenizer")
    unet, text = new_unet(), new_text_encoder(len(tokenizer))
    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text, "layout_head": new_head()})
    state = load_state(work / "unet.part.safetensors")
    with torch.no_grad():
        for p, a in zip(both.parameters(), state["average"], strict=True):
            p.copy_(a)
    vae = load_vae(work, "decoder" if (work / "decoder.safetensors").exists() else "vae")
    pipe: Any = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=PNDMScheduler(**SCHEDULE_FOR_PIPELINE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):  # readers older than transformers 5 look for these
        (out / "tokenizer" / name).write_bytes((work / "tokenizer" / name).read_bytes())
    things = (work / "tokenizer" / "things.json").read_text("utf-8")
    (out / "things.json").write_text(things, "utf-8")


def take_shipped(work: Path, shipped: Path = WEIGHTS) -> tuple[Any, Any]:
    """Sets up a build folder from the shipped weights, to train them further; returns their UNet and text encoder.

    The latents stay those of the shipped autoencoder; optimizer state and the layout head start afresh.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    (work / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (work / "tokenizer" / name).write_bytes((shipped / "tokenizer" / name).read_bytes())
    (work / "tokenizer" / "things.json").write_bytes((shipped / "things.json").read_bytes())
    vae: Any = AutoencoderKL.from_pretrained(shipped / "vae", torch_dtype=torch.float32)
    if not (work / "vae.safetensors").exists():
        save_state(work / "vae.safetensors", {"model": vae.state_dict()})
    unet: Any = UNet2DConditionModel.from_pretrained(shipped / "unet", torch_dtype=torch.float32)
    text: Any = CLIPTextModel.from_pretrained(shipped / "text_encoder", dtype=torch.float32)
    return unet, text


SCHEDULE_FOR_PIPELINE = {k: v for k, v in SCHEDULE.items() if k != "clip_sample"} | {"skip_prk_steps": True}
