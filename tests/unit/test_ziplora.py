"""ZipLoRA against its equations, on a tiny base."""

from __future__ import annotations

import pytest
import torch

from sdlora.adapter.delta import Adapter
from sdlora.combining.plan import Member, Plan
from sdlora.combining.ziplora import _draw_scene, _error, _Masks, zip_loras
from sdlora.errors import AdapterFileError, ConfigError
from tests.stacks import hash_base, random_adapter
from tests.tiny import make_tiny_base


@pytest.fixture(scope="module")
def base():
    return make_tiny_base()


@pytest.fixture(scope="module")
def pair(base):
    style = Member(random_adapter(base, 1, rank=2, alpha=1.0), 0.9, name="style")
    return style, Member(random_adapter(base, 2, rank=3, text=True), 1.1, name="subject")


def test_masks_of_one_predict_the_plain_stack_and_one_shown_predicts_alone(base, pair):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([300, 800])
    ids, _ = base.tokenize(["a cat", ""])
    with torch.no_grad():
        text = base.encode_text(ids)
        unet_only = [
            Member(Adapter({p: d for p, d in m.adapter.deltas.items() if p.startswith("unet")}), m.weight) for m in pair
        ]
        expected = []
        for members in (unet_only, unet_only[:1], unet_only[1:]):
            with Plan.of(members).applied(base):
                expected.append(base.predict(x, t, text))
        masks = _Masks(base, *pair)
        with masks.attached():
            torch.testing.assert_close(base.predict(x, t, text), expected[0], rtol=1e-4, atol=1e-5)
            for place in (0, 1):
                with masks.showing(place):
                    torch.testing.assert_close(base.predict(x, t, text), expected[1 + place], rtol=1e-4, atol=1e-5)


def test_the_result_is_the_masked_columns_and_the_rank_is_the_sum(base, pair):
    masks = _Masks(base, *pair)
    generator = torch.Generator().manual_seed(3)
    for mask in masks.parameters:
        mask.data = torch.randn(mask.shape, generator=generator)
    made = masks.result(Plan.of(list(pair)))
    for path, delta in made.deltas.items():
        if not path.startswith("unet"):
            continue
        m_s, m_c = (mask.detach().double() for mask in masks._masks[path])
        style, subject = (m.adapter.deltas[path].weight().double() * m.weight for m in pair)
        torch.testing.assert_close(delta.weight().double(), style * m_s + subject * m_c, rtol=1e-5, atol=1e-6)
        assert delta.rank == 5


def test_learning_brings_both_predictions_nearer_and_leaves_the_base(base, pair):
    before = hash_base(base)
    losses: list[float] = []
    made = zip_loras(base, *pair, "ink", "a cat", steps=40, pictures=2, report=losses.append)
    assert hash_base(base) == before
    assert not any(m._forward_hooks for m in base.unet.modules())
    assert len(losses) == 40

    plan = Plan.of(list(pair))
    scenes = [_draw_scene(base, plan, m, p, 2, 0) for m, p in zip(pair, ("ink", "a cat"), strict=True)]
    fresh, learnt = _Masks(base, *pair), _Masks(base, *pair)
    for path, masks in learnt._masks.items():
        # the file's rows are the members' in the plan's order; read the masks back from its first columns
        for place, mask in enumerate(masks):
            rows = pair[place].adapter.deltas[path].down
            at = next(i for i in range(5) if _is_multiple(made.deltas[path].down[i], rows[0]))
            mask.data = made.deltas[path].down[at] / rows[0]

    def errors(masks):
        with torch.no_grad(), masks.attached():
            generators = [torch.Generator().manual_seed(s) for s in range(900, 912)]
            return sum(float(_error(base, masks, s, i, g)) for i, s in enumerate(scenes) for g in generators)

    assert errors(learnt) < 0.9 * errors(fresh)
    assert float(learnt.overlap()) < float(fresh.overlap())


def _is_multiple(row: torch.Tensor, of: torch.Tensor) -> bool:
    """Whether a row is a masked `of`, for masks that are still near 1."""
    return bool(((row / of - 1).abs() < 0.9).all())


def test_what_cannot_be_zipped_is_one_clear_line(base, pair):
    with pytest.raises(ConfigError, match="--style-prompt"):
        zip_loras(base, *pair, " ", "a cat")
    with pytest.raises(ConfigError, match="0 steps"):
        zip_loras(base, *pair, "ink", "a cat", steps=0)
    apart = [
        Member(Adapter(dict(list(m.adapter.deltas.items())[i : i + 1])), 1.0, name="x") for i, m in enumerate(pair)
    ]
    with pytest.raises(AdapterFileError, match="share no layer"):
        zip_loras(base, *apart, "ink", "a cat")


def test_masks_that_meet_are_made_to_cost(base, pair, monkeypatch):
    """At the start both masks are all ones, so |m_c · m_s| of a layer is its number of columns."""
    firsts = {}
    for penalty in (0.0, 0.01):
        monkeypatch.setattr("sdlora.combining.ziplora.PENALTY", penalty)
        losses: list[float] = []
        zip_loras(base, *pair, "a cat", "ink", steps=1, pictures=1, report=losses.append)
        firsts[penalty] = losses[0]
    shared = pair[0].adapter.deltas.keys() & pair[1].adapter.deltas.keys()
    columns = sum(pair[0].adapter.deltas[p].weight().shape[1] for p in shared if p.startswith("unet."))
    assert firsts[0.01] - firsts[0.0] == pytest.approx(0.01 * columns, rel=1e-4)
