"""What can be adapted, by name, as a person may write it."""

from __future__ import annotations

import pytest

from sdlora.config import Recipe, compare, recipe_from_toml, recipe_to_toml
from sdlora.errors import ConfigError
from sdlora.targets import endings_of, lies_in, parse_block_rank, prefix_of


def test_a_kind_is_its_modules_and_any_other_word_is_itself() -> None:
    assert endings_of("feed-forward", "unet") == ("ff.net.0.proj", "ff.net.2")
    assert endings_of("feed-forward", "text_encoder_2") == ("mlp.fc1", "mlp.fc2")
    assert endings_of("cross-attention", "text_encoder") == ()
    assert endings_of("attn2.to_k", "unet") == endings_of("attn2.to_k", "text_encoder") == ("attn2.to_k",)


@pytest.mark.parametrize(
    ("block", "prefix"),
    [
        ("down", "unet.down_blocks"),
        ("mid", "unet.mid_block"),
        ("up.0.attentions.1", "unet.up_blocks.0.attentions.1"),
        ("style-only", "unet.up_blocks.0.attentions.1"),
        ("content-only", "unet.up_blocks.0.attentions.0"),
        ("text_encoder", "text_encoder"),
        ("text_encoder_2.31", "text_encoder_2.text_model.encoder.layers.31"),
    ],
)
def test_a_block_is_the_start_of_its_modules_paths(block: str, prefix: str) -> None:
    assert prefix_of(block) == prefix


def test_a_block_ends_where_a_word_ends() -> None:
    assert lies_in("unet.up_blocks.1.resnets.0", "unet.up_blocks.1")
    assert not lies_in("unet.up_blocks.10.resnets.0", "unet.up_blocks.1")
    assert not lies_in("text_encoder_2.text_model", "text_encoder")


def test_block_ranks() -> None:
    found = parse_block_rank("up.0=16:8")
    assert (found.prefix, found.rank, found.alpha) == ("unet.up_blocks.0", 16, 8.0)
    assert parse_block_rank("mid=4").alpha is None
    assert parse_block_rank("mid=4:.5e1").alpha == 5.0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"targets": ()}, "targets = [] adapts nothing; give at least one of attention"),
        ({"targets": ("feed-foward",)}, "target 'feed-foward' is not known; did you mean feed-forward?"),
        ({"targets": ("to q",)}, "target 'to q' is not known"),
        ({"blocks": ("upp",)}, "block 'upp' is not known"),
        ({"blocks": ("style",)}, "block 'style' is not known"),
        ({"blocks": ("text_encoder",)}, "block 'text_encoder' is not known; use down, mid, up"),
        ({"block_ranks": ("up.0",)}, "write BLOCK=RANK or BLOCK=RANK:ALPHA, such as up.0=16:8"),
        ({"block_ranks": ("up.0=16:",)}, "write BLOCK=RANK"),
        ({"block_ranks": ("up.0=0",)}, "rank 0 is out of range; give 1 to 1024"),
        ({"block_ranks": ("up.0=4:0",)}, "alpha 0 is out of range"),
        ({"block_ranks": ("sideways=4",)}, "block 'sideways' is not known"),
        ({"block_ranks": ("up.0=4", "up.0=8")}, "names one block twice: 'up.0=4' and 'up.0=8'"),
        ({"conv_rank": 0}, "conv_rank = 0 is out of range"),
        ({"conv_alpha": 0.0}, "conv_alpha = 0.0 is out of range"),
        ({"dropout": 1.0}, "dropout = 1.0 is out of range; give a share from 0 to below 1"),
        ({"rank_dropout": -0.1}, "rank_dropout = -0.1 is out of range"),
        ({"module_dropout": 2.0}, "module_dropout = 2.0 is out of range"),
        ({"max_norm": -1.0}, "max_norm = -1.0 is out of range"),
        ({"lora_plus_ratio": 0.5}, "lora_plus_ratio = 0.5 is out of range"),
        ({"merge": ("a.safetensors:x",)}, "weight 'x' is no finite number"),
        ({"merge": (" ",)}, "leave out the empty name"),
        ({"text_encoder_2_learning_rate": 1e-4}, "set text_encoder = true (--text-encoder)"),
    ],
)
def test_a_wrong_choice_is_one_line_with_its_fix(values: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe(**values)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


CHOSEN = Recipe(
    targets=("attention", "convolutions", "ff.net.2"), blocks=("up.0", "mid"), block_ranks=("up.0=16:8",), conv_rank=4,
    conv_alpha=2.0, rank_stabilised=True, dora=True, dropout=0.1, rank_dropout=0.2, module_dropout=0.05, max_norm=1.0,
    lora_plus_ratio=16.0, text_encoder=True, text_encoder_learning_rate=1e-4, text_encoder_2_learning_rate=2e-4,
    continue_from="a/b.safetensors", merge=("c.safetensors:0.5",),
)  # fmt: skip


def test_choices_come_back_from_toml(tmp_path) -> None:
    (tmp_path / "r.toml").write_text(recipe_to_toml(CHOSEN))
    assert recipe_from_toml(tmp_path / "r.toml") == CHOSEN


def test_what_a_file_is_called_decides_nothing() -> None:
    assert compare(CHOSEN, CHOSEN) == []
    moved = {"continue_from": "elsewhere.safetensors", "merge": ("d.safetensors",)}
    assert compare(Recipe(), Recipe(**moved)) == []
    assert compare(Recipe(), Recipe(dora=True)) == ["dora false -> true"]
    assert compare(Recipe(), Recipe(targets=("attention", "time"))) == [
        'targets ["attention"] -> ["attention", "time"]'
    ]
    one = Recipe(text_encoder=True)
    assert compare(one, Recipe(text_encoder=True, text_encoder_2_learning_rate=one.learning_rate)) == []
