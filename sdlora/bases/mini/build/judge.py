"""Trains the judge on the art of all seven sets, and writes its weights and words as the files that ship."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..judge import FOLDER, INPUT_PX, OTHER, JudgeModel, words_of
from .art import CAT_FACES, PACKAGES
from .judge_glyphs import draw_glyphs
from .judge_views import HIDE, KEEP, change_look, degrade, move, nothings
from .pictures import CAT_LABEL, Pictures
from .state import load_state, save_state
from .vae import encode_means, new_vae

STYLES = {art: {"fluent-emoji-flat": "flat", "fluent-emoji": "clay"}.get(art, art) for art in PACKAGES}
STYLES["fluent-emoji-high-contrast"] = "ink"
"""The judge's name for each set's style."""
HELD_OUT_SHARE = 0.08
HELD_OUT_CATS = 2
EARLY_PX = 48  # the first part of training sees smaller pictures, which takes half the time
EARLY_SHARE = 0.6
GLYPH_SHARE = 0.25  # of the pictures that have glyphs
NOTHINGS = 3  # pictures of nothing in a batch
STYLE_WEIGHT = 0.5
OTHER_WEIGHT = 0.3  # changed looks are several times as many as any one style
SHAKES = (0.0, 0.4)  # noise on the latents, in standard deviations, of the stored round trips


@dataclass(frozen=True)
class Lesson:
    """What the judge learns from: small pictures and each one's label row and style row."""

    pixels: np.ndarray  # uint8 [V, N, 64, 64, 3]: as drawn, then the round trips through the VAE
    label_rows: Tensor  # int64 [N]
    style_rows: Tensor  # int64 [N]
    labels: list[str]
    styles: list[str]
    held: np.ndarray  # bool [N]: never trained on
    glyphs: np.ndarray  # uint8 [G, M, 64, 64, 3]: black and white
    glyph_rows: np.ndarray  # int64 [N]: each picture's place in the glyphs, or -1


def label_of(label: str) -> str:
    """The judge's label: the cat faces of the other sets are all "cat face", as the sets draw no one character."""
    return "cat face" if label in CAT_FACES else label


def held_out(pictures: Pictures, seed: int = 0) -> np.ndarray:
    """Which drawings are never trained on, bool [N]: at most one of a thing that has four or more; two of the cat."""
    rng = np.random.default_rng((seed, 8))
    by_label: dict[str, list[int]] = {}
    for row, label in enumerate(pictures.labels):
        by_label.setdefault(label, []).append(row)
    cats = by_label.pop(CAT_LABEL)
    for label in CAT_FACES:
        by_label.pop(label, None)
    eligible = [rows for _, rows in sorted(by_label.items()) if len(rows) >= 4]
    held = np.zeros(len(pictures.labels), bool)
    for i in rng.permutation(len(eligible))[: round(HELD_OUT_SHARE * len(pictures.labels))]:
        held[rng.choice(eligible[i])] = True
    held[rng.choice(cats, HELD_OUT_CATS, replace=False)] = True
    return held


def _halve(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, 128, 128, 3] to [N, 64, 64, 3] by area."""
    n, side = len(pixels), INPUT_PX
    return (pixels.reshape(n, side, 2, side, 2, 3).mean((2, 4), dtype=np.float32) + 0.5).astype(np.uint8)


@torch.no_grad()
def round_trips(pictures: Pictures, work: Path, batch: int = 32) -> np.ndarray | None:
    """Every picture through the VAE with each of `SHAKES`, uint8 [V, N, 64, 64, 3]; None without a VAE."""
    store = work / "roundtrip.npy"
    if store.exists():
        return np.load(store, mmap_mode="r")
    if not (work / "vae.safetensors").exists():
        return None
    vae: Any = new_vae()
    vae.load_state_dict(load_state(work / "vae.safetensors")["model"])
    vae.eval().to(memory_format=torch.channels_last)
    n = len(pictures.labels)
    out = np.zeros((len(SHAKES), n, INPUT_PX, INPUT_PX, 3), np.uint8)
    rng = torch.Generator().manual_seed(64)
    for i in range(0, n, batch):
        z = encode_means(vae, pictures.pixels[i : i + batch])
        spread = 1 / vae.config.scaling_factor
        for v, shake in enumerate(SHAKES):
            coarse = torch.randn(*z.shape[:2], 4, 4, generator=rng)  # errors of a sampler are not white
            noise = torch.randn(z.shape, generator=rng) + F.interpolate(coarse, z.shape[2:], mode="bilinear")
            noisy = (z + 0.7 * shake * spread * noise).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                x = vae.decode(noisy).sample
            small = F.avg_pool2d((x.float().clamp(-1, 1) + 1) * 127.5, 2)
            out[v, i : i + batch] = small.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        if i // batch % 20 == 0:
            print(f"round trips {i}/{n}", flush=True)
    part = store.with_suffix(".tmp.npy")
    np.save(part, out)
    os.replace(part, store)
    return out


def prepare_lesson(pictures: Pictures, art_folder: Path, work: Path) -> Lesson:
    """The pictures at the judge's size, with their round trips where the VAE is there, and their glyphs."""
    n = len(pictures.labels)
    drawn = np.concatenate([_halve(np.asarray(pictures.pixels[i : i + 256])) for i in range(0, n, 256)])[None]
    trips = round_trips(pictures, work)
    names = [label_of(label) for label in pictures.labels]
    labels, styles = sorted(set(names)), list(STYLES.values())
    glyphs, place = draw_glyphs(pictures, art_folder, work)
    return Lesson(
        drawn if trips is None else np.concatenate([drawn, trips]),
        torch.tensor([labels.index(name) for name in names]),
        torch.tensor([styles.index(STYLES[art]) for art in pictures.arts]),
        labels,
        styles,
        held_out(pictures),
        glyphs,
        np.array([place.get(row, -1) for row in range(n)]),
    )


def _batch(lesson: Lesson, rows_in: np.ndarray, step: int, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [B, 3, 64, 64] in 0..1, label rows (-100: nothing is drawn) and style rows (-100: untold)."""
    picks = np.random.default_rng((seed, step))
    rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = picks.choice(rows_in, batch)
    versions = picks.integers(1, len(lesson.pixels), batch) if len(lesson.pixels) > 1 else np.zeros(batch, int)
    versions[picks.random(batch) < 0.5] = 0
    pixels = lesson.pixels[versions, rows]
    inked = (picks.random(batch) < GLYPH_SHARE) & (lesson.glyph_rows[rows] >= 0)
    kinds = picks.integers(0, len(lesson.glyphs), int(inked.sum()))
    pixels[inked] = lesson.glyphs[kinds, lesson.glyph_rows[rows[inked]]]
    x = move(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, rng)
    looked, effect = change_look(x, 0.55, rng)
    black_and_white = torch.from_numpy(inked)
    x = torch.where(black_and_white[:, None, None, None], x, looked)
    effect[black_and_white] = HIDE  # as two-tone: too near to ink to be taught that it is not
    x[:NOTHINGS] = nothings(NOTHINGS, INPUT_PX, rng)
    x = degrade(x, rng)
    labels, styles = lesson.label_rows[rows].clone(), lesson.style_rows[rows].clone()
    styles[effect == HIDE] = -100
    styles[(effect != HIDE) & (effect != KEEP)] = len(lesson.styles)
    labels[:NOTHINGS], styles[:NOTHINGS] = -100, len(lesson.styles)
    return x, labels, styles


def _rate(step: int, steps: int, peak: float) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (0.05 + 0.95 * step / warm)
    return peak * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def _loss(
    model: JudgeModel, x: Tensor, labels: Tensor, styles: Tensor, tokens: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        subject, style = model.image(((x - 0.5) * 2).contiguous(memory_format=torch.channels_last))
    scale_subject, scale_style = model.scales()
    texts = model.text(*tokens)
    logits = scale_subject * subject @ texts.T
    subject_loss = F.cross_entropy(logits, labels, ignore_index=-100, label_smoothing=0.05)
    anchors = F.normalize(model.style_anchors, dim=1)
    weights = torch.ones(len(anchors))
    weights[-1] = OTHER_WEIGHT
    style_logits = scale_style * style @ anchors.T
    style_loss = F.cross_entropy(style_logits, styles, weights, ignore_index=-100, label_smoothing=0.02)
    return subject_loss, style_loss


def train_judge(
    pictures: Pictures,
    art_folder: Path,
    work: Path,
    *,
    steps: int,
    seed: int = 0,
    batch: int = 64,
    learning_rate: float = 2e-3,
    name: str = "judge",
    shipped: Path | None = None,
) -> None:
    """Trains to `steps`, going on from the last saved state; leaves the averaged weights as `work/{name}.safetensors`.

    `shipped`, a judge's folder, is started from instead of random weights.
    """
    torch.manual_seed(seed)
    lesson = prepare_lesson(pictures, art_folder, work)
    rows_in = np.flatnonzero(~lesson.held)
    vocabulary = sorted({word for label in lesson.labels for word in words_of(label)})
    model = JudgeModel(vocabulary, len(lesson.styles)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if shipped is not None:
        model.load_state_dict({k: v.float() for k, v in load_file(shipped / "model.safetensors").items()})
    tokens = model.text.tokens(lesson.labels)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    start = 0
    saved = load_state(work / f"{name}.part.safetensors")
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start = saved["average"], saved["step"]
    began, shown = time.perf_counter(), 0.0
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, learning_rate)
        x, labels, styles = _batch(lesson, rows_in, step, batch, seed)
        if step < EARLY_SHARE * steps:
            x = F.interpolate(x, (EARLY_PX, EARLY_PX), mode="bilinear", antialias=True)
        subject_loss, style_loss = _loss(model, x, labels, styles, tokens)
        optimizer.zero_grad(set_to_none=True)
        (subject_loss + STYLE_WEIGHT * style_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                average[key] = average[key].lerp(value, 1 - decay) if value.is_floating_point() else value.clone()
        if time.perf_counter() - shown > 15 or step + 1 == steps:
            shown = time.perf_counter()
            pace = (shown - began) / (step + 1 - start)
            line = f"subject {subject_loss.item():.3f} style {style_loss.item():.3f}"
            print(f"{name} {step + 1}/{steps} {line} {pace:.3f} s/step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            save_state(work / f"{name}.part.safetensors", {**state, "step": step + 1})
    words = {"labels": lesson.labels, "styles": lesson.styles, "vocabulary": vocabulary, "steps": steps, "seed": seed}
    save_state(work / f"{name}.safetensors", {"model": average, **words})


def export_judge(work: Path, folder: Path = FOLDER, *, name: str = "judge") -> None:
    """Writes `work/{name}.safetensors` as `config.json` and `model.safetensors` (fp16), each whole or not at all."""
    saved = load_state(work / f"{name}.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    model = saved.pop("model")
    weights = {k: (v.to(torch.float16) if v.is_floating_point() else v).contiguous() for k, v in model.items()}
    config = {"input_px": INPUT_PX, "other": OTHER, **saved}
    part = folder / "model.safetensors.tmp"
    save_file(weights, part)
    part.chmod(0o644)  # safetensors makes files that only their owner reads
    os.replace(part, folder / "model.safetensors")
    part = folder / "config.json.tmp"
    part.write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / "config.json")
