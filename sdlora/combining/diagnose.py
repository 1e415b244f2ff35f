"""How far two LoRAs get in each other's way, from the two files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..adapter.delta import Dora
from ..adapter.truncation import name_block
from ..adapter.vector import Vector
from ..errors import AdapterFileError
from .layer import Factors, factorize
from .plan import Member

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as 0: float32 factors are exact to about 1e-7."""
FAR_FROM_RANDOM = 3.0
"""An overlap of this many times what random spaces have is called shared: by chance it stays far below twice."""
LARGE_SHARE = 0.15
"""A share of the subject's energy at which losing it shows; below it, whatever the overlap, little can be lost."""
SAME_START = 0.5
"""An input overlap that only a common start gives: LoRAs taught with one seed start from the same down factors."""
SAME_DIRECTION = 0.2
"""A cosine beyond which the sum of two changes is noticeably longer, or shorter, than independent ones would give."""
UNEQUAL = 4.0
"""A ratio of energies (2 of lengths) from which on the stronger LoRA usually hides the other at equal weights."""


@dataclass(frozen=True)
class Space:
    """ΔW = U · diag(s) · Vᵀ of one layer, without what counts as 0: U [out, r], s [r], V [n, r]; float64."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        return len(self.s)

    @classmethod
    def of(cls, factors: Factors, weight: float) -> Space:
        """From the factors' own QR factors, so that no dense ΔW is made."""
        q_up, r_up = torch.linalg.qr(factors.up * weight)
        q_down, r_down = torch.linalg.qr(factors.down.T)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        kept = s > RANK_TOLERANCE * s[0] if len(s) and s[0] > 0 else torch.zeros(len(s), dtype=torch.bool)
        return cls(q_up @ u[:, kept], s[kept], q_down @ vh[kept].T)


@dataclass(frozen=True)
class Figures:
    """What is known of one layer, or of several together; energies are ‖ΔW‖² (Frobenius)."""

    style_energy: float
    subject_energy: float
    product: float
    """<ΔW_s, ΔW_c>, the sum of the products of their entries."""
    input_overlap: float
    """Mean cos² of the principal angles between the input spaces: 0 is apart, 1 is within each other."""
    input_random: float
    """What random spaces of these ranks would give."""
    output_overlap: float
    output_random: float
    risked: float
    """‖ΔW_c Q_s‖²: the subject's energy in the style's input space."""
    risk_random: float
    """What of the subject's energy random spaces would share."""

    @property
    def cosine(self) -> float:
        length = math.sqrt(self.style_energy * self.subject_energy)
        return self.product / length if length else 0.0

    @property
    def at_risk(self) -> float:
        """The share of the subject's energy that lies in the style's input space."""
        return self.risked / self.subject_energy if self.subject_energy else 0.0

    @property
    def combined_energy(self) -> float:
        """‖ΔW_s + ΔW_c‖² against that of the stronger one."""
        strongest = max(self.style_energy, self.subject_energy)
        return (self.style_energy + self.subject_energy + 2 * self.product) / strongest if strongest else 0.0

    def to_json(self) -> dict[str, float]:
        return {
            "style_energy": self.style_energy,
            "subject_energy": self.subject_energy,
            "cosine": self.cosine,
            "input_overlap": self.input_overlap,
            "input_overlap_random": self.input_random,
            "output_overlap": self.output_overlap,
            "output_overlap_random": self.output_random,
            "at_risk": self.at_risk,
            "at_risk_random": self.risk_random,
            "combined_energy": self.combined_energy,
        }


@dataclass(frozen=True)
class Diagnosis:
    """Two LoRAs side by side: by layer that both have, by block, and in all."""

    layers: dict[str, Figures]
    blocks: dict[str, Figures]
    whole: Figures
    style_energy: float
    """Of all its layers, those of its own too."""
    subject_energy: float
    style_only: tuple[str, ...]
    subject_only: tuple[str, ...]

    def sentences(self) -> dict[str, str]:
        """One plain sentence on each figure: what it means and what to do."""
        return _explain(self)

    def to_json(self) -> dict[str, Any]:
        """The contract's document, and more."""
        whole = self.whole.to_json()
        return {
            "energy": {"style": self.style_energy, "subject": self.subject_energy},
            **{k: whole[k] for k in ("cosine", "input_overlap", "output_overlap", "at_risk", "combined_energy")},
            "random": {k: whole[f"{k}_random"] for k in ("input_overlap", "output_overlap", "at_risk")},
            "sentences": self.sentences(),
            "blocks": {block: figures.to_json() for block, figures in self.blocks.items()},
            "layers": [{"layer": path, **figures.to_json()} for path, figures in self.layers.items()],
            "style_only": list(self.style_only),
            "subject_only": list(self.subject_only),
        }


def diagnose(style: Member, subject: Member) -> Diagnosis:
    """Compares two weighted LoRAs layer by layer; the first is the style, the second the subject.

    Raises: AdapterFileError for LoRAs of two families, layers of two shapes, a DoRA, or no change at all.
    """
    families = sorted({m.adapter.card.family for m in (style, subject)} - {""})
    if len(families) > 1:
        raise AdapterFileError(f"{style.name} and {subject.name} are of two families, {' and '.join(families)}")
    spaces = [_read_spaces(member) for member in (style, subject)]
    shared = sorted(set(spaces[0]) & set(spaces[1]))
    layers: dict[str, Figures] = {}
    for path in shared:
        s, c = spaces[0][path], spaces[1][path]
        if (len(s.u), len(s.v)) != (len(c.u), len(c.v)):
            raise AdapterFileError(
                f"{path} has another shape in {subject.name} than in {style.name}; they do not go together"
            )
        layers[path] = _compare(s, c)
    if not spaces[0] or not spaces[1]:
        member = subject if spaces[0] else style
        raise AdapterFileError(f"{member.name} changes nothing: all its layers, or its weights, are 0")
    grouped: dict[str, list[Figures]] = {}
    for path, figures in layers.items():
        grouped.setdefault(name_block(path), []).append(figures)
    energies = [sum(float((space.s**2).sum()) for space in one.values()) for one in spaces]
    return Diagnosis(
        layers=layers,
        blocks={block: _sum(rows) for block, rows in sorted(grouped.items())},
        whole=_sum(list(layers.values())),
        style_energy=energies[0],
        subject_energy=energies[1],
        style_only=tuple(sorted(set(spaces[0]) - set(spaces[1]))),
        subject_only=tuple(sorted(set(spaces[1]) - set(spaces[0]))),
    )


def _read_spaces(member: Member) -> dict[str, Space]:
    found: dict[str, Space] = {}
    for path, delta in member.adapter.deltas.items():
        weight = member.weight_of(path)
        if isinstance(delta, Dora):
            raise AdapterFileError(
                f"{member.name}: {path} is a DoRA, whose change depends on its base; give a plain LoRA"
            )
        if isinstance(delta, Vector):  # a bias or a norm: no space that another could share
            continue
        space = Space.of(factorize(delta), weight) if weight else None
        if space is not None and space.rank:
            found[path] = space
    return found


def _compare(style: Space, subject: Space) -> Figures:
    inputs, outputs = style.v.T @ subject.v, style.u.T @ subject.u  # [r_s, r_c], cosines between the bases
    fewer, more = sorted((style.rank, subject.rank))
    weighted = style.s[:, None] * subject.s  # [r_s, r_c]
    energy = float((subject.s**2).sum())
    return Figures(
        style_energy=float((style.s**2).sum()),
        subject_energy=energy,
        product=float((weighted * inputs * outputs).sum()),
        input_overlap=float((inputs**2).sum()) / fewer,
        input_random=more / len(style.v),
        output_overlap=float((outputs**2).sum()) / fewer,
        output_random=more / len(style.u),
        risked=float((subject.s**2 * inputs**2).sum()),
        risk_random=style.rank / len(style.v),
    )


def _sum(rows: Sequence[Figures]) -> Figures:
    """Several layers as one: energies and products add up, overlaps are means over the layers.

    What random spaces put at risk is weighted by the subject's energy, as what is at risk is.
    """
    totals = {field.name: sum(getattr(row, field.name) for row in rows) for field in fields(Figures)}
    for name in ("input_overlap", "input_random", "output_overlap", "output_random"):
        totals[name] /= max(1, len(rows))
    energy = totals["subject_energy"]
    totals["risk_random"] = sum(r.risk_random * r.subject_energy for r in rows) / energy if energy else 0.0
    return Figures(**totals)


def _explain(d: Diagnosis) -> dict[str, str]:
    whole = d.whole
    said: dict[str, str] = {}
    meet = bool(d.layers)
    ratio = whole.style_energy / whole.subject_energy if meet else d.style_energy / d.subject_energy
    where = " in the layers that both have" if meet else ""
    if ratio > UNEQUAL or ratio < 1 / UNEQUAL:
        stronger = "style" if ratio > 1 else "subject"
        times = max(ratio, 1 / ratio)
        said["energy"] = (
            f"The {stronger} has {times:.1f} times the energy{where}: first lower its weight, or raise the other's."
        )
    else:
        said["energy"] = f"Both are about as strong{where}: start with equal weights."
    if not d.layers:
        said["layers"] = "They share no layer, so they do not meet in a sum; linear is all there is to do."
        return said
    if abs(whole.cosine) < SAME_DIRECTION:
        said["cosine"] = "The changes point in different directions: neither adds to nor cancels the other as a whole."
    elif whole.cosine > 0:
        said["cosine"] = "The changes agree in part, so their sum overshoots: use weights below 1 for both."
    else:
        said["cosine"] = "The changes cancel each other in part: they were taught opposite things, use one at a time."
    for side in ("input", "output"):
        found, random = getattr(whole, f"{side}_overlap"), getattr(whole, f"{side}_random")
        if side == "input" and found > max(SAME_START, FAR_FROM_RANDOM * random):
            said["input_overlap"] = (
                f"They read the same features, {found / random:.1f} times as much as by chance, as LoRAs of one seed "
                "do: train one of them with another --seed, or use np."
            )
        elif found > FAR_FROM_RANDOM * random:
            act = "np keeps them apart" if side == "input" else "klora lets each layer show one of them"
            what = "read the same features" if side == "input" else "write to the same features"
            said[f"{side}_overlap"] = f"They {what}, {found / random:.1f} times as much as by chance: {act}."
        else:
            what = "read" if side == "input" else "write to"
            said[f"{side}_overlap"] = f"They {what} features of their own, about as chance has it: nothing to do."
    risk = f"{whole.at_risk:.0%} of the subject"
    if whole.at_risk > LARGE_SHARE and whole.at_risk > FAR_FROM_RANDOM * whole.risk_random:
        said["at_risk"] = f"{risk} passes where the style reads: protect one of them with np or klora."
    else:
        said["at_risk"] = f"Only {risk} passes where the style reads: np would change little."
    expected = (whole.style_energy + whole.subject_energy) / max(whole.style_energy, whole.subject_energy)
    if whole.combined_energy > 1.2 * expected:
        said["combined_energy"] = "Together they change the base more than apart: lower both weights."
    elif whole.combined_energy < 0.8 * expected:
        said["combined_energy"] = "Together they change the base less than apart: each takes from the other."
    else:
        said["combined_energy"] = "Together they change the base as two strangers would: the sum itself is no problem."
    return said


def list_diagnosis(d: Diagnosis, style: str, subject: str) -> list[str]:
    """It as lines of at most 80 columns, but for the sentences."""
    w = d.whole
    said = d.sentences()
    lines = [
        f"style   {style}",
        f"subject {subject}",
        f"layers  {len(d.layers)} of both; of one: style {len(d.style_only)}, subject {len(d.subject_only)}",
        "",
        f"{'':22}{'here':>10}{'by chance':>12}",
        f"{'energy, style':22}{d.style_energy:10.4g}",
        f"{'energy, subject':22}{d.subject_energy:10.4g}",
    ]
    if d.layers:
        lines += [
            f"{'cosine':22}{w.cosine:10.3f}{0:12}",
            f"{'input overlap':22}{w.input_overlap:10.3f}{w.input_random:12.3f}",
            f"{'output overlap':22}{w.output_overlap:10.3f}{w.output_random:12.3f}",
            f"{'subject at risk':22}{w.at_risk:10.3f}{w.risk_random:12.3f}",
            f"{'together / strongest':22}{w.combined_energy:10.3f}",
            "",
            f"{'block':16}{'style':>10}{'subject':>10}{'cosine':>9}{'input':>8}{'output':>8}{'at risk':>9}",
        ]
        lines += [
            f"{block:16}{f.style_energy:10.3g}{f.subject_energy:10.3g}{f.cosine:9.3f}{f.input_overlap:8.3f}"
            f"{f.output_overlap:8.3f}{f.at_risk:9.3f}"
            for block, f in d.blocks.items()
        ]
    return [*lines, "", *(f"- {sentence}" for sentence in said.values())]
