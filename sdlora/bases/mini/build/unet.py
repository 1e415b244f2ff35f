"""Trains the UNet and the text encoder of `mini` from scratch on the latents of the art in all its looks."""

from __future__ import annotations

import functools
import json
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .art import BASE_SETS, Art
from .captions import caption
from .fast import speed_up
from .glyphs import FINE, GLYPHS, draw_glyph
from .layout import Lookup, layout_loss, new_head, train_layout, watch_lookup
from .looks import LOOKS
from .pictures import CAT_LABEL, Pictures
from .state import load_state, save_state
from .vae import SCALING_FACTOR, encode_means

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
LOOK_VARIANTS = 9
PLAIN_SHARE = 0.5
UNSAID_SET = "noto"
"""Whose drawing a caption means that names no set: a caption leaves nothing open, so its drawing can be known."""
SET_WEIGHTS = {"noto": 5.0, "twemoji": 2.5, "emojione": 1.25, "fxemoji": 1.25}
GLYPH_WEIGHT = 3.0  # shapes without colour are the hardest to keep apart, and what many styles are made of
EMPTY_CAPTION_SHARE = 0.1
STRANGE_WORD_SHARE = 0.4  # captions with a word that means nothing: a trigger must not hide the thing
SAID_SHARE = 0.3  # captions of UNSAID_SET's drawings that name it all the same
MIN_SNR_GAMMA = 5.0
LAYOUT_GAIN = 0.3
MAX_WEIGHT = 30.0
EMA_DECAY = 0.998
LAYOUT_WEIGHT = 0.1
LOOKUP_WEIGHT = 0.03
LAYOUT_STEPS = 7500
DECAY_SHARE = 0.6  # the last part of the run, in which the learning rate falls to nothing


def new_unet() -> Any:
    """UNet2DConditionModel for 16 x 16 latents, cross-attention at 16, 8 and 4, heads 32 wide, 36 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(96, 192, 384),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(3, 6, 12),
    )


def new_text_encoder(tokens: int) -> Any:
    """CLIPTextModel, four layers, 128 wide, with the vocabulary's last two entries as start and end."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokens,
            hidden_size=128,
            intermediate_size=1536,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=128,
            bos_token_id=tokens - 2,
            eos_token_id=tokens - 1,
            pad_token_id=tokens - 1,
        )
    )


def drawn_by_all(pictures: Pictures) -> list[str]:
    """The things that all four sets of the base draw, the phases of the moon left out: 355, sorted."""
    drawn: dict[str, set[str]] = {}
    for label, art in zip(pictures.labels, pictures.arts, strict=True):
        if art in BASE_SETS:
            drawn.setdefault(label, set()).add(art)
    return sorted(
        label
        for label, arts in drawn.items()
        if len(arts) == len(BASE_SETS) and "moon" not in label.split()[:-1] + label.split()[1:] and label != CAT_LABEL
    )


def trained_things(pictures: Pictures, count: int = 300) -> list[str]:
    """The things that `mini` is taught: of those that all sets draw, the ones on whose shape they agree most, sorted.

    Agreement is the mean distance between the sets' drawings, grey, at 16 x 16 px. The cat stays in whatever its
    drawings do: the sample subject is one.
    """
    things = drawn_by_all(pictures)
    small: dict[str, list[np.ndarray]] = {label: [] for label in things}
    for row, (label, art) in enumerate(zip(pictures.labels, pictures.arts, strict=True)):
        if art in BASE_SETS and label in small:
            grey = np.asarray(pictures.pixels[row]).mean(2).reshape(16, 8, 16, 8).mean((1, 3))
            small[label].append(grey / 255)

    def spread(label: str) -> float:
        four = np.stack(small[label])
        return float(np.abs(four[:, None] - four[None]).mean())

    return sorted(sorted(things, key=lambda label: (label != "cat", spread(label), label))[:count])


@dataclass(frozen=True)
class Pool:
    """Latents float16 [N, V, 4, 16, 16], scaled; and the words of each variant's look, the first "" (as drawn)."""

    latents: Tensor
    labels: list[str]
    arts: list[str]
    words: list[list[str]]


@functools.cache
def _art(folder: Path) -> Art:
    return Art(folder)


def _draw_variants(
    art_folder: Path, pixels: np.ndarray, label: str, set_name: str, row: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """One drawing as it is, as every glyph and in its looks, uint8 [V, 128, 128, 3], and each one's words.

    None is moved: what is drawn where is then known from the words alone.
    """
    rng = np.random.default_rng((seed, row))
    picture = Image.fromarray(np.asarray(pixels))
    fine = _art(art_folder).render_icon(_art(art_folder).named(label, set_name), FINE)
    variants = [picture, *(draw_glyph(fine, name) for name in GLYPHS)]
    said = ["", *GLYPHS]
    for choice in rng.permutation(len(LOOKS))[:LOOK_VARIANTS]:
        looked, word = LOOKS[choice](picture, rng)
        variants.append(looked)
        said.append(word)
    return np.stack([np.asarray(v) for v in variants]), said


def encode_pool(pictures: Pictures, art_folder: Path, vae: Any, work: Path, seed: int = 0) -> Pool:
    """Every trained drawing as it is, as glyphs and in LOOK_VARIANTS looks, encoded once; kept in the build folder."""
    things = set(trained_things(pictures))
    mine = pictures.where(
        [label in things and art in BASE_SETS for label, art in zip(pictures.labels, pictures.arts, strict=True)]
    )
    index = work / "pool.json"
    saved = load_state(work / "pool.safetensors") if index.exists() else {}
    if not saved:
        latents, words = [], []
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as workers:
            rows = range(len(mine.labels))
            drawn = workers.map(
                _draw_variants, repeat(art_folder), mine.pixels, mine.labels, mine.arts, rows, repeat(seed), chunksize=8
            )
            for row, (pixels, said) in enumerate(drawn):
                latents.append((encode_means(vae, pixels) * SCALING_FACTOR).half())
                words.append(said)
                if row % 100 == 0:
                    print(f"pool {row}/{len(mine.labels)}", flush=True)
        saved = {"latents": torch.stack(latents)}
        save_state(work / "pool.safetensors", saved)
        index.write_text(json.dumps(words), encoding="utf-8")
    words = json.loads(index.read_text(encoding="utf-8"))
    return Pool(saved["latents"], mine.labels, mine.arts, words)


def strange_words(tokenizer: CLIPTokenizer, pool: Pool) -> list[str]:
    """The vocabulary's whole words that no caption of the pool has, sorted: what a user may choose as a trigger."""
    looks = (look for said in pool.words for look in said)
    meant = {word for text in (*pool.labels, *pool.arts, *looks) for word in text.split()}
    whole = (entry.removesuffix("</w>") for entry in tokenizer.get_vocab() if entry.endswith("</w>"))
    return sorted(word for word in whole if len(word) > 2 and word.isascii() and word.isalpha() and word not in meant)


def _draw_batch(
    pool: Pool, rows_in: np.ndarray, step: int, batch: int, seed: int, strange: list[str]
) -> tuple[Tensor, list[str]]:
    rng = np.random.default_rng((seed, 17, step))
    weights = np.array([SET_WEIGHTS[pool.arts[row]] for row in rows_in])
    rows = rng.choice(rows_in, batch, p=weights / weights.sum())
    picked, prompts = [], []
    for row in rows:
        said = pool.words[row]
        variant = 0
        if rng.random() >= PLAIN_SHARE:
            weights = np.array([GLYPH_WEIGHT if word in GLYPHS else 1.0 for word in said[1:]])
            variant = 1 + int(rng.choice(len(said) - 1, p=weights / weights.sum()))
        look = said[variant]
        label, words = pool.labels[row], [look] if look else []
        if pool.arts[row] != UNSAID_SET or rng.random() < SAID_SHARE:
            words.append(f"{pool.arts[row]} style")
        if rng.random() < STRANGE_WORD_SHARE:
            form = int(rng.integers(4))
            one, two = (str(word) for word in rng.choice(strange, 2))
            if form >= 2:
                label = f"{one} {label}"
            if form != 2:
                words.append(f"{two} style" if form != 1 else two)
        empty = rng.random() < EMPTY_CAPTION_SHARE
        prompts.append("" if empty else caption(label, words, rng))
        picked.append(pool.latents[row, variant])
    return torch.stack(picked).float(), prompts


def timestep_table(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of every timestep [T], and the factor [T] that gives the loss its weight in expectation.

    Min-SNR-5 on the noise, and above it LAYOUT_GAIN / SNR (at most MAX_WEIGHT): an error of the noise at high noise
    levels is a small number but a wrong layout, and it is there that the prompt decides what is drawn.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = ((snr.clamp_max(MIN_SNR_GAMMA) + LAYOUT_GAIN) / snr).clamp_max(MAX_WEIGHT)
    share = weight.clamp_min(0.15).sqrt()
    share = share / share.sum()
    return share, weight / share / (weight / share).mean()


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Warm-up over 200 steps, constant, then a straight fall to 2 % over the last DECAY_SHARE."""
    left = (steps - step) / max(1, round(steps * DECAY_SHARE))
    return peak * min(1.0, (step + 1) / 200) * min(1.0, 0.02 + 0.98 * left)


class Trainer:
    """UNet and text encoder under training: the models, AdamW, the running averages and the step reached.

    On a CPU a step's batch is shared by Python threads of one compute thread each, which lose far less to a busy
    machine than operators that are split over threads (`docs/log.md`).
    """

    def __init__(self, tokenizer: CLIPTokenizer, workers: int, learning_rate: float, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        unet, text = new_unet(), new_text_encoder(len(tokenizer))
        self.lookup = Lookup()
        if device == "cpu":
            speed_up(unet)
            watch_lookup(unet, self.lookup)
            text.set_attn_implementation("eager")
        unet.to(memory_format=torch.channels_last)
        self.both = nn.ModuleDict({"unet": unet, "text_encoder": text, "layout_head": new_head()})
        self.both.to(device).train()
        # The optimizer works on float32 masters; the models compute with bfloat16 copies, made once a step.
        self.params: list[Tensor] = [nn.Parameter(p.detach().clone()) for p in self.both.parameters()]
        self.both.to(torch.bfloat16)
        self.copies: list[Tensor] = list(self.both.parameters())
        self.tokenizer, self.device = tokenizer, device
        self.shares = [list(range(len(self.params)))[i::workers] for i in range(workers)]
        groups = [[self.params[i] for i in share] for share in self.shares]
        self.optimizers = [
            torch.optim.AdamW(
                [
                    {"params": [p for p in group if p.dim() > 1], "weight_decay": 0.02},
                    {"params": [p for p in group if p.dim() <= 1], "weight_decay": 0.0},
                ],
                lr=learning_rate,
                betas=(0.9, 0.98),
                fused=True,
            )
            for group in groups
        ]
        self.average = [p.detach().clone() for p in self.params]
        self.step = 0
        schedule: Any = DDPMScheduler(**SCHEDULE)
        self.schedule = schedule
        self.share, weight = timestep_table(schedule.alphas_cumprod)
        self.weight = weight.to(device)
        self.parts = workers if device == "cpu" else 1
        self.threads = ThreadPoolExecutor(self.parts)

    def load(self, path: Path) -> None:
        saved = load_state(path)
        if saved:
            with torch.no_grad():
                torch._foreach_copy_(self.params, list(saved["masters"]))
                torch._foreach_copy_(self.copies, self.params)
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.average, self.step = [a.to(self.device) for a in saved["average"]], saved["step"]

    @torch.no_grad()
    def take_text(self, text: nn.Module, head: nn.Module) -> None:
        """Goes on from a text encoder and a layout head that were trained before."""
        fresh: list[Tensor] = [*text.parameters(), *head.parameters()]
        for kept in (self.params, self.average, self.copies):
            torch._foreach_copy_(kept[-len(fresh) :], fresh)

    @torch.no_grad()
    def take_unet(self, unet: nn.Module) -> None:
        """Goes on from a UNet that was trained before."""
        fresh: list[Tensor] = list(unet.parameters())
        for kept in (self.params, self.average, self.copies):
            torch._foreach_copy_(kept[: len(fresh)], fresh)

    def save(self, path: Path) -> None:
        state = {
            "masters": [p.detach() for p in self.params],
            "optimizers": [o.state_dict() for o in self.optimizers],
            "average": self.average,
            "step": self.step,
        }
        save_state(path, state)

    def _gradients(self, part: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        x0, x_t, noise, t, ids = (v.to(self.device) for v in part)
        x_t = x_t.to(torch.bfloat16, memory_format=torch.channels_last)
        states = self.both["text_encoder"](ids)[0]
        predicted = self.both["unet"](x_t, t, states).sample
        error = (predicted.float() - noise).square().mean((1, 2, 3))  # [B]
        loss = (error * self.weight[t]).mean()
        loss = loss + LAYOUT_WEIGHT * layout_loss(self.both["layout_head"], states, x0)
        loss = loss + LOOKUP_WEIGHT * (miss := self.lookup.take_loss())
        self.miss = miss.item()
        return error.detach(), torch.autograd.grad(loss, self.copies)

    def _sum_gradients(self, done: list[tuple[Tensor, tuple[Tensor, ...]]], share: list[int]) -> float:
        """Means of the parts' gradients for a share of the parameters; returns the sum of their squares."""
        for i in share:
            self.params[i].grad = sum((grads[i].float() for _, grads in done[1:]), done[0][1][i].float()) / len(done)
        norms = torch._foreach_norm([p.grad for i in share if (p := self.params[i]).grad is not None])
        return float(torch.stack(norms).square().sum())

    @torch.no_grad()
    def _update(self, worker: int, scale: float, learning_rate: float, decay: float) -> None:
        """One optimizer step, and then the copies and averages, of a worker's share of the parameters."""
        optimizer, share = self.optimizers[worker], self.shares[worker]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        params = [self.params[i] for i in share]
        torch._foreach_mul_([g for p in params if (g := p.grad) is not None], scale)
        optimizer.step()
        torch._foreach_copy_([self.copies[i] for i in share], params)
        torch._foreach_lerp_([self.average[i] for i in share], params, 1 - decay)

    def train_step(self, x0: Tensor, prompts: list[str], learning_rate: float, seed: int) -> Tensor:
        """One step on scaled latents x0 [B, 4, 16, 16]; returns every sample's error on epsilon [B]."""
        rng = torch.Generator().manual_seed(seed * 1_000_003 + self.step)
        noise = torch.randn(x0.shape, generator=rng)
        t = torch.multinomial(self.share, len(x0), replacement=True, generator=rng)
        x_t = self.schedule.add_noise(x0, noise, t)
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        parts = zip(*(v.chunk(self.parts) for v in (x0, x_t, noise, t, ids)), strict=True)
        done = list(self.threads.map(self._gradients, parts))
        squares = self.threads.map(lambda share: self._sum_gradients(done, share), self.shares)
        scale = 1.0 / max(1.0, sum(squares) ** 0.5)
        decay = min(EMA_DECAY, (self.step + 1) / (self.step + 10))
        list(self.threads.map(lambda w: self._update(w, scale, learning_rate, decay), range(len(self.shares))))
        self.step += 1
        return torch.cat([error for error, _ in done])


def train_unet(
    pool: Pool,
    things: list[str],
    tokenizer: CLIPTokenizer,
    work: Path,
    *,
    steps: int,
    batch: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 2,
    shipped: tuple[Any, Any] | None = None,
) -> None:
    """Trains on the pool's `things` to `steps`, going on from the last saved state, whose averages `export` takes.

    `shipped`, a UNet and a text encoder, are started from instead of random ones. A file STOP in the build folder ends
    the run at its next save.
    """
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    known = set(things)
    rows_in = np.array([row for row, label in enumerate(pool.labels) if label in known])
    strange = strange_words(tokenizer, pool)
    trainer = Trainer(tokenizer, workers if device == "cpu" else 1, learning_rate, seed, device)
    if (work / "unet.part.safetensors").exists():
        trainer.load(work / "unet.part.safetensors")
    else:
        unet, text = shipped or (None, new_text_encoder(len(tokenizer)))

        def draw(step: int, size: int) -> tuple[Tensor, list[str]]:
            return _draw_batch(pool, rows_in, step, size, seed + 1, strange)

        head = train_layout(text, tokenizer, draw, work, steps=LAYOUT_STEPS, seed=seed)
        trainer.take_text(text, head)
        if unet is not None:
            trainer.take_unet(unet)
    began, start, errors = time.perf_counter(), trainer.step, []
    while trainer.step < steps:
        x0, prompts = _draw_batch(pool, rows_in, trainer.step, batch, seed, strange)
        lr = learning_rate_at(trainer.step, steps, learning_rate)
        errors.append(trainer.train_step(x0, prompts, lr, seed).mean())
        if trainer.step % 50 == 0 or trainer.step == steps:
            row = {
                "step": trainer.step,
                "error": round(torch.stack(errors).mean().item(), 5),
                "lookup": round(trainer.miss, 3),
                "lr": lr,
                "s_per_step": round((time.perf_counter() - began) / (trainer.step - start), 4),
            }
            errors = []
            print(json.dumps(row), flush=True)
        if trainer.step % 250 == 0 or trainer.step == steps:
            trainer.save(work / "unet.part.safetensors")
            if (work / "STOP").exists():
                break
