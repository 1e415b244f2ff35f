"""The Recipe holds against what a person may write in its TOML file and its flags."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.config import (
    DEFAULTS,
    FIELDS,
    Recipe,
    compare,
    make_recipe,
    recipe_from_toml,
    recipe_to_toml,
    suggest,
)
from sdlora.errors import ConfigError
from sdlora.flags import describe_fields

# Everything but control characters, half characters and line separators may be in a text.
texts = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=12)
prompts = texts.filter(str.strip)
rates = st.floats(1e-12, 1.0)
recipes = st.builds(
    Recipe,
    base=texts.filter(bool),
    steps=st.integers(1, 10_000_000),
    batch_size=st.integers(1, 4096),
    rank=st.integers(1, 1024),
    alpha=st.none() | st.floats(1e-6, 1e6),
    learning_rate=rates,
    schedule=st.sampled_from(["cosine", "constant"]),
    warmup_steps=st.integers(0, 10_000),
    weight_decay=st.floats(0, 1),
    min_snr_gamma=st.floats(0, 1e300),
    caption_dropout=st.floats(0, 1),
    flip=st.booleans(),
    resolution=st.none() | st.integers(1, 1024).map(lambda n: 8 * n),
    seed=st.integers(0, 2**63 - 1),
    trigger=texts,
    text_encoder=st.just(True),
    text_encoder_learning_rate=st.none() | rates,
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    preview=st.lists(prompts, min_size=1, max_size=3).map(tuple),
    preview_every=st.integers(0, 1000),
    checkpoint_every=st.integers(0, 1000),
)


@settings(max_examples=150, deadline=None)
@given(recipes)
def test_a_recipe_comes_back_from_its_toml(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_bytes(recipe_to_toml(recipe).encode())
    assert recipe_from_toml(path) == recipe


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbf# a preset\r\nsteps = 700\r\nrank = 4\r\nalpha = 2\r\n")
    recipe = recipe_from_toml(path, {"rank": 16})
    assert (recipe.steps, recipe.rank, recipe.alpha, recipe.batch_size) == (700, 16, 2.0, DEFAULTS["batch_size"])
    assert type(recipe.alpha) is float


def test_every_field_of_a_preset_can_be_written_by_hand(tmp_path):
    path = tmp_path / "all.toml"
    path.write_text(
        'base = "mini"\nsteps = 300\nbatch_size = 8\naccumulation = 2\nrank = 8\nalpha = 8\nlearning_rate = 1e-3\n'
        'schedule = "constant"\nwarmup_steps = 0\nweight_decay = 0\nmin_snr_gamma = 0\nmax_grad_norm = 1\n'
        'caption_dropout = 0\nflip = false\nresolution = 512\nseed = 1\ntrigger = "ink style"\ntext_encoder = true\n'
        'text_encoder_learning_rate = 5e-4\nprecision = "fp32"\npreview = ["a fox", "an owl"]\npreview_every = 50\n'
        "checkpoint_every = 0\n"
    )
    recipe = recipe_from_toml(path)
    assert recipe.preview == ("a fox", "an owl")
    assert recipe.text_encoder_rate == 5e-4
    assert recipe.images_per_step == 16
    assert not recipe.flip


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("lerning_rate = 1", "unknown key lerning_rate; did you mean learning_rate?"),
        ("learning-rate = 1", "unknown key learning-rate; did you mean learning_rate?"),
        ("lr = 1", "did you mean learning_rate?"),
        ("[train]\nsteps = 3", "unknown key train; tables are not used"),
        ("zzzzzz = 1", "known are base, "),
        ("rank = 0", "rank = 0 is out of range; give 1 to 1024"),
        ("learning_rate = -1e-3", "learning_rate = -0.001 is out of range; give a number above 0"),
        ("learning_rate = 0", "learning_rate = 0.0 is out of range"),
        ("learning_rate = nan", "learning_rate = nan is not a finite number"),
        ("alpha = inf", "alpha = inf is not a finite number"),
        ("alpha = 0", "alpha = 0.0 is out of range"),
        ("batch_size = 0", "batch_size = 0 is out of range; give 1"),
        ("steps = 0", "steps = 0 is out of range"),
        ("steps = true", "steps = true is not a whole number"),
        ("steps = 3.0", "steps = 3.0 is not a whole number"),
        ('steps = "300"', 'steps = "300" is not a whole number; write 300 without quotes'),
        ('flip = "false"', 'flip = "false" is not true or false; write false without quotes'),
        ("flip = 0", "flip = 0 is not true or false"),
        ("resolution = 100", "resolution = 100 is out of range; give a multiple of 8"),
        ("caption_dropout = 1.1", "caption_dropout = 1.1 is out of range; give a share from 0 to 1"),
        (
            'schedule = "cosin"',
            "use cosine or constant or linear or cosine-restarts or polynomial; did you mean cosine?",
        ),
        ('precision = "int8"', "use fp32 or bf16 or fp16"),
        ("trigger = 3", 'trigger = 3 is not text in quotes; write "3"'),
        ('trigger = "a\\nb"', "holds a line break"),
        ('preview = "a fox"', 'preview = "a fox" is not a list; give a list of texts: ["a fox"]'),
        ('preview = [""]', "leave out the empty prompt"),
        ("seed = -1", "seed = -1 is out of range"),
        ("seed = 9223372036854775808", "seed = 9223372036854775808 is out of range"),
        (f"alpha = 1{'0' * 400}", "alpha = inf is not a finite number"),
        ("text_encoder_learning_rate = 1e-4", "set text_encoder = true (--text-encoder)"),
        ("preview_every = 50", "give a prompt with preview (--preview)"),
        ("huber_c = 0.2", 'huber_c = 0.2 has no use while loss = "l2"; set loss = "huber" or leave it out'),
        ('weighting = "debiased"\nmin_snr_gamma = 1', 'no use while weighting = "debiased"; set weighting = "min-snr"'),
        ("pyramid_discount = 0.5", "has no use while pyramid_noise = 0; set pyramid_noise above 0 or leave it out"),
        ("schedule_cycles = 2", 'has no use while schedule = "cosine"; set schedule = "cosine-restarts"'),
        ("t_min = 0.5\nt_max = 0.5", "t_min = 0.5 and t_max = 0.5 leave no step to train"),
        ("t_max = 0", "t_max = 0.0 is out of range"),
        ("noise_offset = -0.1", "noise_offset = -0.1 is out of range"),
        ('loss = "l1"', "use l2 or huber"),
        ("steps = ", "is not TOML"),
        ("steps = 1\nsteps = 2", "is not TOML"),
    ],
)
def test_a_wrong_value_is_named_with_its_fix_in_one_line(tmp_path, line, says):
    path = tmp_path / "r.toml"
    path.write_text(line)
    with pytest.raises(ConfigError) as error:
        recipe_from_toml(path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_toml_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read"):
        recipe_from_toml(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        recipe_from_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'trigger = "\xe9"')
    with pytest.raises(ConfigError, match="is not UTF-8 at byte 11"):
        recipe_from_toml(tmp_path / "latin.toml")


def test_the_same_values_from_python_meet_the_same_checks():
    with pytest.raises(ConfigError, match="did you mean batch_size"):
        make_recipe({"batch_sise": 3})
    with pytest.raises(ConfigError, match="preview"):
        Recipe(preview="a fox")
    with pytest.raises(ConfigError, match="rank"):
        dataclasses.replace(Recipe(), rank=0)


def test_warm_up_shrinks_with_a_short_run_only_where_it_was_not_given():
    assert make_recipe({"steps": 300}).warmup_steps == 20
    assert make_recipe({"steps": 10}).warmup_steps == 2
    assert make_recipe({"steps": 10, "warmup_steps": 7}).warmup_steps == 7


def test_compare_names_what_decides_the_result_and_nothing_else():
    a = Recipe(preview=("a",), checkpoint_every=5)
    assert compare(a, Recipe(preview_every=0)) == []
    assert compare(Recipe(rank=8), Recipe(rank=8, alpha=8)) == []
    assert compare(Recipe(), Recipe(steps=600)) == ["steps 300 -> 600"]
    assert compare(Recipe(), Recipe(rank=4)) == ["rank 8 -> 4", "alpha 8.0 -> 4.0"]
    assert compare(Recipe(trigger="x"), Recipe()) == ['trigger "x" -> ""']
    assert compare(Recipe(text_encoder=True), Recipe(text_encoder=True, text_encoder_learning_rate=1e-3)) == []
    assert compare(Recipe(text_encoder=True), Recipe(text_encoder=True, text_encoder_learning_rate=1e-4)) != []


def test_every_field_says_what_it_is():
    found = describe_fields()
    assert list(found) == list(FIELDS)
    assert all(text.endswith(".") for text in found.values())


def test_suggest_is_silent_where_nothing_is_near():
    assert suggest("--stpes", ["--steps", "--seed"]) == "; did you mean --steps?"
    assert suggest("--qqqq", ["--steps", "--seed"]) == ""
