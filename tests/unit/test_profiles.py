"""Block weights and schedules: what they are for each module and moment, and that they are written as they are read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.bases.architecture import make_part, read_family
from sdlora.combining.plan import Member, Plan
from sdlora.errors import ConfigError
from sdlora.generating.infotext import Tag, parse_prompt
from sdlora.profiles import (
    SCHEMES,
    BlockWeights,
    Profile,
    Schedule,
    parse_blocks,
    parse_profile,
    parse_schedule,
    parse_stacked,
    position_of,
    split_parts,
)
from tests.stacks import random_adapter
from tests.tiny import make_tiny_base

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def unet(request):
    """(family, the UNet's module paths that have a weight, and their shapes) of the full-size architecture."""
    with torch.device("meta"):
        model = make_part(request.param, "unet", read_family(request.param)["unet"])
    return request.param, {f"unet.{n}": m for n, m in model.named_modules() if getattr(m, "weight", None) is not None}


def test_every_layer_has_one_position_of_the_whole_vector(unet):
    family, modules = unet
    scheme = {"sd1": "sd1-26", "sdxl": "sdxl-20"}[family]
    found = {path: position_of(path, scheme) for path in modules}
    loose = {path for path, position in found.items() if position is None}
    assert all(p.startswith(("unet.time_embedding", "unet.add_embedding", "unet.conv_norm_out", "unet.conv_out"))
               for p in loose)  # fmt: skip
    assert set(found.values()) - {None} == set(SCHEMES[scheme]) - {"BASE"}


def test_every_attention_layer_has_one_position_of_the_short_vector(unet):
    family, modules = unet
    scheme = {"sd1": "sd1-17", "sdxl": "sdxl-12"}[family]
    attention = [path for path in modules if path.endswith(ATTENTION)]
    assert len(attention) == {"sd1": 128, "sdxl": 560}[family]
    found = {path: position_of(path, scheme) for path in attention}
    assert None not in found.values()
    assert set(found.values()) == set(SCHEMES[scheme]) - {"BASE"}


def test_positions_are_those_of_the_first_names(unet):
    """Against the table that names SDXL's files, and for SD 1 against the two ends of each level."""
    family, modules = unet
    if family == "sdxl":
        from sdlora.adapter import keys

        for path in modules:
            if ".attentions." in path and path.endswith(ATTENTION):
                name = keys.write_name(path, "kohya", "sdxl", False)
                kind, _, rest = name.removeprefix("lora_unet_").partition("_block")
                number = rest.removeprefix("s_").split("_")[0]
                expected = (
                    {"input": f"IN{int(number or 0):02}", "output": f"OUT{int(number or 0):02}"} if number else {}
                )
                assert position_of(path, "sdxl-20") == expected.get(kind, "M00"), name
        return
    widths = {position_of(p, "sd1-26"): m.weight.shape[0] for p, m in modules.items() if p.endswith("attn1.to_q")}
    assert widths == {
        "IN01": 320, "IN02": 320, "IN04": 640, "IN05": 640, "IN07": 1280, "IN08": 1280, "M00": 1280,
        "OUT03": 1280, "OUT04": 1280, "OUT05": 1280, "OUT06": 640, "OUT07": 640, "OUT08": 640,
        "OUT09": 320, "OUT10": 320, "OUT11": 320,
    }  # fmt: skip
    assert position_of("unet.down_blocks.2.downsamplers.0.conv", "sd1-26") == "IN09"
    assert position_of("unet.up_blocks.1.upsamplers.0.conv", "sd1-26") == "OUT05"
    assert position_of("unet.down_blocks.2.downsamplers.0.conv", "sd1-17") is None
    assert position_of("text_encoder.text_model.encoder.layers.3.self_attn.q_proj", "sd1-17") == "BASE"


def test_a_vector_gives_each_block_its_value():
    values = [round(0.1 * i, 1) for i in range(17)]
    for text in (",".join(map(str, values)), "sd1-17/" + ",".join(map(str, values))):
        weights = parse_blocks(text)
        assert weights.at("text_encoder.text_model.encoder.layers.0.self_attn.q_proj") == 0.0
        assert weights.at("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q") == 0.2
        assert weights.at("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v") == 0.7
        assert weights.at("unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_q") == 1.6
        assert weights.at("unet.conv_in") == 1.0  # the 17 leave it out
        assert str(weights) == "sd1-17/" + ",".join(f"{v:g}" for v in values)


def test_named_blocks_take_the_longest_name_that_fits():
    for order in ("up=0.5,up.1=0.2,up.1.attentions.0=0", "up.1.attentions.0=0,up.1=0.2,up=0.5"):
        weights = parse_blocks(order)
        assert weights.at("unet.up_blocks.1.attentions.0.proj_in") == 0.0
        assert weights.at("unet.up_blocks.1.attentions.1.proj_in") == 0.2
    weights = parse_blocks("up=0.5,up.1=0.2,up.1.attentions.0=0,text_encoder=2")
    assert weights.at("unet.up_blocks.0.attentions.0.proj_in") == 0.5
    assert weights.at("unet.up_blocks.1.attentions.1.proj_in") == 0.2
    assert weights.at("unet.up_blocks.1.attentions.0.proj_in") == 0.0
    assert weights.at("unet.up_blocks.10.attentions.0.proj_in") == 0.5
    assert weights.at("unet.down_blocks.1.attentions.0.proj_in") == 1.0
    assert weights.at("text_encoder.text_model.encoder.layers.0.mlp.fc1") == 2.0


def test_a_schedule_is_linear_between_its_points_and_nothing_outside_its_span():
    schedule = Schedule(parse_schedule("0@0.2,1@0.6,0.5@0.8"), start=0.1, stop=0.9)
    assert Schedule(start=0.25, stop=0.75).at(0.25) == Schedule(start=0.25, stop=0.75).at(0.75) == 1.0
    expected = {0.0: 0, 0.05: 0, 0.1: 0, 0.2: 0, 0.3: 0.25, 0.4: 0.5, 0.6: 1, 0.7: 0.75, 0.8: 0.5, 0.9: 0.5, 0.91: 0}
    for t, value in expected.items():
        assert schedule.at(t) == pytest.approx(value), t


def test_a_profile_multiplies_blocks_and_schedule_and_leaves_the_text_alone():
    profile = parse_profile({"blocks": "mid=0.5", "schedule": "1@0,0@1"})
    assert profile.at("unet.mid_block.attentions.0.proj_in", 0.25) == pytest.approx(0.375)
    assert profile.at("unet.mid_block.attentions.0.proj_in", None) == 0.5
    assert profile.at("text_encoder.text_model.x", 0.25) == 1.0
    assert not profile.static
    constant = parse_profile({"schedule": "0.5@0,0.5@1"})
    assert constant.static
    assert constant.at("unet.mid_block.x", None) == 0.5


def test_a_plan_follows_blocks_and_schedule():
    base = make_tiny_base()
    adapter = random_adapter(base, 1)
    profile = parse_profile({"blocks": "up=0.5,down=0"})
    plan = Plan.of([Member(adapter, 0.8, profile=profile)])
    assert plan.is_static
    for path, delta in adapter.deltas.items():
        factor = {"up_blocks": 0.5, "down_blocks": 0.0}.get(path.split(".")[1], 1.0)
        if factor == 0:
            assert path not in plan.paths
        else:
            torch.testing.assert_close(plan.delta(path), 0.8 * factor * delta.weight(), rtol=1e-6, atol=1e-7)


def test_a_scheduled_plan_is_at_each_moment_the_static_one_of_that_weight():
    base = make_tiny_base()
    one, two = random_adapter(base, 1), random_adapter(base, 2, rank=2)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ids, _ = base.tokenize(["a cat"])
    with torch.no_grad():
        text = base.encode_text(ids)
        for method in ("linear", "np:mu=2"):
            moving = Plan.of(
                [Member(one, 0.9, profile=parse_profile({"schedule": "0@0,2@1"})), (two, 0.5)], method=method
            )
            assert not moving.is_static
            for t in (999, 700, 0):
                done = 1 - t / 999
                with Plan.of([(one, 0.9 * 2 * done), (two, 0.5)], method=method).applied(base):
                    expected = base.predict(x, torch.tensor([t]), text)
                with moving.applied(base) as stacked:
                    found = stacked.predict(x, torch.tensor([t]), text)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


number = st.floats(-4, 4).map(lambda x: float(f"{x:.6g}"))
moment = st.floats(0, 1).map(lambda x: float(f"{x:.4g}"))
blocks = st.one_of(
    st.dictionaries(st.sampled_from(["down", "mid", "up.1", "down.0.attentions.1", "text_encoder"]), number, min_size=1)
    .map(lambda d: BlockWeights(tuple(d.items()))),
    st.sampled_from(sorted(SCHEMES)).flatmap(
        lambda s: st.lists(number, min_size=len(SCHEMES[s]), max_size=len(SCHEMES[s])).map(
            lambda v: BlockWeights(scheme=s, values=tuple(v))
        )
    ),
)  # fmt: skip
schedules = st.builds(
    lambda points, span: Schedule(tuple(sorted(points.items())), *sorted(span)),
    st.dictionaries(moment, number, min_size=1, max_size=4),
    st.lists(moment, min_size=2, max_size=2, unique=True),
)
profiles = st.builds(Profile, st.none() | blocks, st.none() | schedules).filter(lambda p: p.parts())


@settings(max_examples=300, deadline=None)
@given(profiles, number, number)
def test_what_is_written_reads_back(profile, weight, te_weight):
    tag = Tag("ink", weight, te_weight, profile)
    plain, (read,) = parse_prompt(f"a cat {tag}")
    assert plain == "a cat"
    assert (read.weight, read.te_weight) == (weight, te_weight)
    assert read.profile.parts() == profile.parts()
    spec = parse_stacked(f"x.safetensors:{weight}:{te_weight}:{':'.join(profile.parts())}")
    assert (spec.weight, spec.te_weight, spec.profile) == (weight, te_weight, read.profile)
    for path in ("unet.mid_block.attentions.0.a", "unet.down_blocks.0.attentions.1.b", "text_encoder.text_model.c"):
        for t in (None, 0.0, 0.33, 1.0):
            assert math.isclose(read.profile.at(path, t), profile.at(path, t), abs_tol=1e-9)


def test_the_communitys_tag_and_the_command_lines_parts():
    _, (tag,) = parse_prompt("a <lora:ink:0.8:lbw=1,0,0,0,0,0,0,0,0,0,0,0:start=0.2:stop=0.7> cat")
    assert tag.profile.blocks.scheme == "sdxl-12"
    assert (tag.profile.schedule.start, tag.profile.schedule.stop) == (0.2, 0.7)
    _, (tag,) = parse_prompt("<lora:ink:lbw=mid=0>")
    assert (tag.weight, tag.profile.blocks.named) == (1.0, (("mid", 0.0),))
    spec = parse_stacked(r"C:\loras\ink.safetensors:0.8:0.5:mask=C:\left.png:schedule=0@0,1@1")
    assert (str(spec.file), spec.weight, spec.te_weight) == (r"C:\loras\ink.safetensors", 0.8, 0.5)
    assert str(spec.mask) == r"C:\left.png"
    assert parse_stacked("a=b.safetensors").profile is None
    assert split_parts("") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.safetensors:1:bloks=mid=0", "did you mean blocks?"),
        ("a.safetensors:1:foo=2", "use blocks, lbw"),
        ("a.safetensors:start=0.1:start=0.2", "start is given twice"),
        ("a.safetensors:start=", "start is empty"),
        ("a.safetensors:blocks=mid=0:lbw=mid=1", "one and the same"),
        ("a.safetensors:lbw=1,2,3", "3 block weights fit no scheme"),
        ("a.safetensors:lbw=sd1-17/1,2", "sd1-17 has 17 block weights, not 2"),
        ("a.safetensors:lbw=sd1-18/1,2", "did you mean sd1-17?"),
        ("a.safetensors:blocks=dawn.1=0", "block 'dawn.1' is not known"),
        ("a.safetensors:blocks=mid=0,mid=1", "names mid twice"),
        ("a.safetensors:blocks=mid=nan", "no finite number"),
        ("a.safetensors:schedule=0,1", "is no value@t"),
        ("a.safetensors:schedule=0@0.5,1@0.2", "t must rise"),
        ("a.safetensors:schedule=0@2", "give 0"),
        ("a.safetensors:start=0.5:stop=0.5", "never act"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(text, says):
    with pytest.raises(ConfigError) as caught:
        parse_stacked(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vector_for_another_family_is_refused():
    vector = parse_blocks(",".join(["1"] * 12))
    vector.check_family("sdxl", "ink")
    with pytest.raises(ConfigError, match="12 block weights are sdxl-12"):
        vector.check_family("sd1", "ink")
    parse_blocks(",".join(["1"] * 17)).check_family("sd2", "ink")
    with pytest.raises(ConfigError, match="is SDXL's"):
        parse_blocks("style-only=0").check_family("sd1", "ink")
    base = make_tiny_base()
    profile = Profile(parse_blocks(",".join(["1"] * 17)))
    with pytest.raises(ConfigError, match="family mini has not"):
        Plan.of([Member(random_adapter(base, 1), profile=profile)]).check(base)
