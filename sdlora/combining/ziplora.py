"""ZipLoRA: learns, for one pair, how much of every column of each ΔW to take; the result is an ordinary file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.delta import Adapter, Delta, LowRank, pair_of
from ..adapter.vector import Vector
from ..bases.family import Base
from ..bases.prompts import encode_prompts
from ..bases.sampling import make_noise, make_scheduler, solve
from ..bases.text import Text
from ..errors import AdapterFileError, ConfigError
from .plan import Member, Plan, find_module
from .stack import combine

Report = Callable[[float], None]
"""Called after every step with its loss."""

LEARNING_RATE, PENALTY, BATCH_PICTURES = 0.01, 0.01, 4


@dataclass(frozen=True)
class Scene:
    """What one adapter of the pair draws on its own: latents x0, and the text they were drawn for."""

    x0: Tensor
    """float32 [N, 4, H/8, W/8]."""
    alone: Text
    """Encoded with that adapter alone, [N, 77, D]."""
    together: Text
    """Encoded with both, as the result will be used."""


def zip_loras(
    base: Base,
    style: Member,
    subject: Member,
    style_prompt: str,
    subject_prompt: str,
    *,
    steps: int = 100,
    pictures: int = 4,
    seed: int = 0,
    report: Report | None = None,
) -> Adapter:
    """One adapter ΔW = ΔW_s diag(m_s) + ΔW_c diag(m_c) that draws each prompt as its own adapter does.

    A column mask m for every layer and adapter, from 1 on, learns to keep both predictions on pictures that each
    adapter draws alone, while Σ|m_c · m_s| keeps the masks out of each other's way. A layer that one has, and the text
    encoder's, are the weighted sum. Ranks add up.

    Raises: ConfigError for a prompt or a number that cannot be used; AdapterFileError where a layer is not low rank.
    Source: Shah et al. 2024, ZipLoRA (ECCV), equations 3 to 5: 100 steps at 0.01, a penalty of 0.01.
    """
    for name, prompt in (("style", style_prompt), ("subject", subject_prompt)):
        if not prompt.strip():
            raise ConfigError(f"zip needs a prompt that the {name} answers to; give --{name}-prompt TEXT")
    if steps < 1 or pictures < 1:
        raise ConfigError(f"zip with {steps} steps and {pictures} pictures learns nothing; give 1 or more of both")
    plan = Plan.of([style, subject])
    plan.check(base)
    masks = _Masks(base, style, subject)
    scenes = [
        _draw_scene(base, plan, member, prompt, pictures, seed)
        for member, prompt in ((style, style_prompt), (subject, subject_prompt))
    ]
    optimizer = torch.optim.Adam(masks.parameters, lr=LEARNING_RATE)
    with masks.attached():
        for step in range(steps):
            generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + step)
            error = torch.zeros((), device=base.device)
            for place, scene in enumerate(scenes):
                error = error + _error(base, masks, scene, place, generator)
            loss = error + PENALTY * masks.overlap()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if report is not None:
                report(float(loss.detach()))
    return masks.result(plan)


def _draw_scene(base: Base, plan: Plan, member: Member, prompt: str, count: int, seed: int) -> Scene:
    """Pictures of one prompt by one adapter alone, as latents."""
    side_px = base.resolution_px
    with torch.no_grad(), plan.applied(base):
        together = encode_prompts(base, [prompt])[0].text
    with torch.no_grad(), Plan.of([member]).applied(base):
        wording = encode_prompts(base, [prompt])[0]
        noise = torch.stack([make_noise(seed + i, side_px, side_px, base.latent_factor) for i in range(count)])
        text = wording.text.expand(count)
        x0 = solve(base, noise, text, wording.negative, make_scheduler(base), 20, 5.0, lambda done: None)
    return Scene(x0, text, together.expand(count))


def _error(base: Base, masks: _Masks, scene: Scene, place: int, generator: torch.Generator) -> Tensor:
    """The mean squared difference between the pair's prediction and the one adapter's, on noised pictures."""
    rows = torch.randint(len(scene.x0), (BATCH_PICTURES,), generator=generator)
    t = torch.randint(len(base.alphas_cumprod), (BATCH_PICTURES,), generator=generator)
    x0 = scene.x0[rows.to(scene.x0.device)]
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    alpha_bar = base.alphas_cumprod[t].to(x0)[:, None, None, None]
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    t = t.to(base.device)
    picked = rows.tolist()
    with torch.no_grad(), masks.showing(place):
        wanted = base.predict(x_t, t, scene.alone[picked].to(base.device)).float()
    found = base.predict(x_t, t, scene.together[picked].to(base.device)).float()
    return (found - wanted).square().mean()


class _Masks:
    """The column masks of the layers that both adapters have, and the hooks that act on them."""

    def __init__(self, base: Base, style: Member, subject: Member) -> None:
        self._members = (style, subject)
        self._shown: int | None = None
        self._modules: dict[str, nn.Module] = {}
        self._factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._masks: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self._base = base
        deltas = {**style.adapter.deltas, **subject.adapter.deltas}  # biases and norms have no columns to mask
        paths = [p for p, delta in deltas.items() if p.startswith("unet.") and not isinstance(delta, Vector)]
        for path in sorted(paths):
            module = find_module(base, path)
            acting = [m for m in self._members if path in m.adapter.deltas and m.weight_of(path) != 0]
            if module is None or not acting:
                continue
            if not isinstance(module, nn.Linear):
                raise AdapterFileError(f"{path} is no linear layer, which zip needs; combine with linear or np")
            self._modules[path] = module
            self._factors[path] = [_factors_of(base, member, path) for member in self._members]
            if len(acting) == 2:
                ones = [torch.ones(module.in_features, device=base.device) for _ in range(2)]
                self._masks[path] = (nn.Parameter(ones[0]), nn.Parameter(ones[1]))
        if not self._masks:
            raise AdapterFileError(
                f"{style.name} and {subject.name} share no layer; nothing gets in its way, use linear"
            )

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [mask for pair in self._masks.values() for mask in pair]

    def overlap(self) -> Tensor:
        """Σ|m_c · m_s| over the layers."""
        return torch.stack([(a @ b).abs() for a, b in self._masks.values()]).sum()

    @contextmanager
    def showing(self, place: int) -> Iterator[None]:
        """Within it one adapter acts alone, unmasked."""
        self._shown = place
        try:
            yield
        finally:
            self._shown = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [module.register_forward_hook(self._hook(path)) for path, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
            x = inputs[0]
            for place, (down, up) in enumerate(self._factors[path]):
                if self._shown not in (None, place) or not down.numel():
                    continue
                masked = x
                if self._shown is None and path in self._masks:
                    masked = x * self._masks[path][place].to(x.dtype)
                y = y + (masked @ down.T) @ up.T
            return y

        return hook

    def result(self, plan: Plan) -> Adapter:
        """The pair as one adapter."""
        members = []
        for place, member in enumerate(self._members):
            deltas: dict[str, Delta] = dict(member.adapter.deltas)
            for path, pair in self._masks.items():
                delta = deltas[path]
                assert isinstance(delta, LowRank)
                deltas[path] = LowRank(
                    delta.down.float() * pair[place].detach().to(delta.down.device), delta.up, delta.alpha
                )
            members.append(replace(member, adapter=Adapter(deltas, member.adapter.card)))
        made = combine(members)
        return Adapter(made.deltas, replace(made.card, settings=made.card.settings | {"method": "zip"}))


def _factors_of(base: Base, member: Member, path: str) -> tuple[Tensor, Tensor]:
    """down [r, in] and up [out, r] in the base's dtype, weight and alpha folded in; empty where there are none."""
    empty = torch.zeros(0, 0, device=base.device)
    if path not in member.adapter.deltas or member.weight_of(path) == 0:
        return empty, empty
    delta = member.adapter.deltas[path]
    if not isinstance(delta, LowRank) or pair_of(delta) is None:
        raise AdapterFileError(f"{member.name}: {path} is {type(delta).__name__}, not low rank; zip needs plain LoRAs")
    up = delta.up.float() * (delta.scale * member.weight_of(path))
    return delta.down.to(base.device, base.dtype), up.to(base.device, base.dtype)
