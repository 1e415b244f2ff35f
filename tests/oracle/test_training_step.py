"""Training against a plain loop written out with peft and torch alone."""

import copy
import dataclasses
import sys
from pathlib import Path

import peft
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import make_folder
from tiny import make_tiny_base

from sdlora.adapter.layers import attach
from sdlora.config import Recipe
from sdlora.data.cache import encode_folder
from sdlora.data.folder import scan_folder
from sdlora.training.draws import Chances, Order
from sdlora.training.loop import train_adapter
from sdlora.training.metrics import read_rows

RECIPE = Recipe(
    steps=3, batch_size=2, accumulation=2, rank=3, alpha=6.0, schedule="constant", warmup_steps=0, precision="fp32",
    learning_rate=5e-3, weight_decay=0.1, max_grad_norm=0.01, caption_dropout=0.3, seed=11,
)  # fmt: skip


def initial_factors(base, recipe):
    targets = {"unet": base.family.default_targets(False)["unet"]}
    with attach({"unet": base.unet}, targets, rank=recipe.rank, alpha=recipe.scale_alpha, seed=recipe.seed) as layers:
        return {name: factor.detach().clone() for name, factor in layers.named_factors().items()}


def train_with_peft(base, encoded, recipe, prediction_type):
    """Three steps as a textbook has them; returns peft's factors by our names, the losses and the gradient norms."""
    unet = copy.deepcopy(base.unet)
    config = peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0"], lora_dropout=0.0
    )
    peft.inject_adapter_in_model(config, unet)
    factors = {}
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            path, side = name.split(".lora_")
            factors[f"unet.{path}.{'down' if side.startswith('A') else 'up'}"] = parameter
    for name, value in initial_factors(base, recipe).items():
        factors[name].data.copy_(value)

    optimizer = torch.optim.AdamW(
        factors.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=False, foreach=False
    )
    chances = Chances(
        Order(recipe.seed, encoded.repeats), (4, 8, 8), len(base.alphas_cumprod), recipe.caption_dropout, recipe.flip
    )
    losses, norms = [], []
    for step in range(recipe.steps):
        draws = chances.draw(step, recipe.images_per_step)
        errors = []
        for i in range(recipe.images_per_step):
            view, picture = int(draws.mirror[i]), int(draws.picture[i])
            x0 = encoded.mean[view, picture] + encoded.std[view, picture] * draws.posterior[i]
            alpha_bar = float(base.alphas_cumprod[draws.t[i]])
            snr = alpha_bar / (1 - alpha_bar)
            x_t = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * draws.noise[i]
            text = encoded.text.states[draws.caption[i]]
            y = unet(x_t[None], draws.t[i : i + 1], encoder_hidden_states=text[None]).sample[0]
            if prediction_type == "epsilon":
                errors.append(min(snr, 5.0) / snr * (y - draws.noise[i]).square().mean())
            else:
                velocity = alpha_bar**0.5 * draws.noise[i] - (1 - alpha_bar) ** 0.5 * x0
                errors.append(min(snr, 5.0) / (snr + 1) * (y - velocity).square().mean())
        loss = torch.stack(errors).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(factors.values(), recipe.max_grad_norm)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return factors, losses, norms


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_training_equals_a_plain_loop_with_peft(tmp_path, prediction_type):
    folder = make_folder(tmp_path / "data", 3)
    base = make_tiny_base()
    base = dataclasses.replace(base, scheduler_config=base.scheduler_config | {"prediction_type": prediction_type})
    encoded = encode_folder(base, scan_folder(folder), resolution_px=64, flip=True, text=True, progress=False)
    expected, losses, norms = train_with_peft(base, encoded, RECIPE, prediction_type)
    adapter = train_adapter(folder, base, RECIPE, tmp_path / "out.safetensors")

    rows = read_rows(tmp_path / "out.run" / "metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > RECIPE.max_grad_norm  # so clipping took part
    assert {f"{path}.{side}" for path in adapter.deltas for side in ("down", "up")} == expected.keys()
    for path, delta in adapter.deltas.items():
        moved = float(expected[f"{path}.up"].detach().abs().max())
        assert moved > 0, path
        torch.testing.assert_close(delta.up, expected[f"{path}.up"].detach(), rtol=1e-2, atol=2e-5)
        torch.testing.assert_close(delta.down, expected[f"{path}.down"].detach(), rtol=1e-2, atol=2e-5)
