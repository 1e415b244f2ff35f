"""The Recipe: one frozen, typed description of a training run, from defaults, a TOML file and flags."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .agreement import check_agreement
from .errors import ConfigError
from .limits import LIMITS
from .values import read_toml, show, suggest, to_toml, typed


@dataclass(frozen=True)
class Recipe:
    """Every value that decides what a training run makes; the strings under the fields are the flags' help.

    Raises: ConfigError, naming the key, the value and the fix, where a value cannot be used.
    """

    base: str = "mini"
    """The Stable Diffusion to teach: `mini`, a diffusers folder, a `.safetensors` checkpoint, or a hub id."""
    prediction: Literal["auto", "epsilon", "v"] = "auto"
    """What the base predicts, noise or velocity; auto is what the base says of itself."""
    zero_terminal_snr: bool | None = None
    """The base's last step is pure noise (many v-prediction models). Without it: what the base says of itself."""
    steps: int = 300
    """Optimizer steps in all."""
    batch_size: int = 8
    """Pictures in one pass through the model, of each process where several train."""
    accumulation: int = 1
    """Passes added up before each optimizer step."""
    rank: int = 8
    """Rank of each layer's low-rank change: higher learns more, makes a larger file, and forgets more."""
    alpha: float | None = None
    """The change is scaled by alpha / rank. Without it: the rank, so a scale of 1."""
    rank_stabilised: bool = False
    """Scales by alpha / √rank, so that a higher rank learns as fast; the file says an alpha of the same scale."""
    targets: tuple[str, ...] = ("attention",)
    """What is adapted: attention, cross-attention, self-attention, feed-forward, projections, convolutions, time, or
    how modules' names end (to_q); several, with commas."""
    blocks: tuple[str, ...] = ()
    """Adapts only these blocks of the UNet: down, mid, up, down.1, up.0.attentions.1; SDXL also has style-only and
    content-only. Without it: all."""
    block_ranks: tuple[str, ...] = ()
    """Another rank, and alpha, for a block: up.0=16 or up.0=16:8; the longest name wins, text_encoder is one too."""
    conv_rank: int | None = None
    """Rank of 3×3 convolutions. Without it: that of the rest."""
    conv_alpha: float | None = None
    """Alpha of 3×3 convolutions. Without it: the same scale as the rest."""
    dora: bool = False
    """Learns DoRA: direction and length of the weights apart. Stronger at low ranks, slower; A1111 cannot use it."""
    dropout: float = 0.0
    """Share of each layer's input that its LoRA does not see in a step, 0 to 1."""
    rank_dropout: float = 0.0
    """Share of each layer's ranks that take no part in a step, 0 to 1."""
    module_dropout: float = 0.0
    """Share of layers whose LoRA takes no part in a step, 0 to 1."""
    max_norm: float = 0.0
    """Layers whose change is longer than this after a step are scaled back to it; 0 turns it off."""
    continue_from: str = ""
    """LoRA file to start from instead of from nothing: the same targets and ranks are needed."""
    merge: tuple[str, ...] = ()
    """LoRA, FILE or FILE:WEIGHT, to merge into the base before training; may be given several times."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion", "schedule-free"] = "adamw"
    """What turns gradients into steps; all but adamw and adafactor need the extra sdlora[optimizers]."""
    learning_rate: float = 1e-3
    """Peak learning rate; lion wants a tenth of adamw's; prodigy finds its own times this, which is 1 if not given."""
    lora_plus_ratio: float = 1.0
    """LoRA+: the up factors' learning rate is this many times the down factors'; 16 is usual, 1 turns it off."""
    schedule: Literal["cosine", "constant", "linear", "cosine-restarts", "polynomial"] = "cosine"
    """What the learning rate does after the warm-up: falls along a cosine, several, a line or a power, or stays."""
    schedule_cycles: int = 3
    """Cosines one after the other in schedule cosine-restarts."""
    schedule_power: float = 2.0
    """Power of schedule polynomial; 1 is a line."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises from 0; if not given, at most a fifth of the steps."""
    weight_decay: float = 0.01
    """Weight decay of the optimizer."""
    loss: Literal["l2", "huber"] = "l2"
    """The error that is made small: squared, or pseudo-Huber, which grows slower where a picture is unlike the rest."""
    huber_c: float = 0.1
    """Errors well above this count by their size and not their square; with a schedule, at the noisiest step."""
    huber_schedule: Literal["exponential", "snr", "constant"] = "exponential"
    """How that bound falls from 1 with the noise: exponentially, with the signal-to-noise ratio, or not at all."""
    weighting: Literal["min-snr", "debiased", "none"] = "min-snr"
    """How the error of a step is weighed by its noise: min-SNR, debiased estimation, or all alike."""
    min_snr_gamma: float = 5.0
    """Caps the weight of low-noise steps in the loss (min-SNR weighting); 0 turns it off."""
    noise_offset: float = 0.0
    """Shifts the noise of each channel by this much at random, so that dark and bright pictures are learnt."""
    pyramid_noise: int = 0
    """Levels of coarser noise added to the noise, each two to four times as coarse as the one before; 0 adds none."""
    pyramid_discount: float = 0.3
    """How strong each level of pyramid noise is, compared to the level before."""
    input_perturbation: float = 0.0
    """More noise in what the base sees than in what it has to predict, by this share; 0.1 is usual."""
    t_min: float = 0.0
    """Trains only steps with at least this share, 0 to 1, of the noise schedule; 0 is no noise."""
    t_max: float = 1.0
    """Trains only steps up to this share, 0 to 1, of the noise schedule; 1 is all noise."""
    t_bias: Literal["uniform", "logit-normal", "early", "late"] = "uniform"
    """Steps of the noise schedule that are trained more: none, the middle, early (little noise), late (much noise)."""
    ema_decay: float = 0.0
    """The file holds the factors' running average, which keeps this much of itself at a step, as 0.99; 0: off."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm when they are longer."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped since their loss or gradient is not finite; one more stops the run."""
    caption_dropout: float = 0.1
    """Share of pictures, 0 to 1, shown without their caption, so that guidance keeps working."""
    flip: bool = True
    """Mirrors half of the pictures; turn it off where left and right matter."""
    resolution: int | None = None
    """Side in pixels that pictures are scaled and centre-cropped to, a multiple of 8. Without it: the base's own."""
    buckets: bool = False
    """Cuts each picture to the size, of several with about the same area, that keeps most of it, not to the square."""
    bucket_step_px: int | None = None
    """The buckets' sides are multiples of this. Without it: 64, or a quarter of a resolution below 256."""
    max_aspect: float = 2.0
    """The longest bucket's long side is at most this many times its short one."""
    crop: Literal["centre", "random"] = "centre"
    """Where what does not fit is cut away: the centre stays, or a place drawn for each of a picture's crops."""
    crops: int = 1
    """Random crops that are made of each picture; each showing draws one."""
    upscale: bool = False
    """Scales pictures up that are too small for every bucket; without it they get smaller buckets."""
    skip_bad: bool = False
    """Goes on without pictures that cannot be used, such as damaged or uncaptioned ones, and says which and why."""
    small_buckets: bool = False
    """Lets a bucket with fewer images than a step show some twice in it; without it that is an error."""
    masks: str = ""
    """Learns only what is white in masks: alpha for the alpha channels, or a folder of grey pictures named alike."""
    mask_outside: float = 0.0
    """Weight, 0 to 1, of what lies outside a picture's mask; 1 is as without masks."""
    caption_lines: bool = False
    """Every line of a caption file is a caption of its own, and each showing of the picture draws one."""
    caption_variants: int = 1
    """Wordings made of each caption by shuffle_tags, tag_dropout and wildcards; each showing draws one."""
    shuffle_tags: bool = False
    """Puts the tags, which commas part, in another order in each variant of a caption."""
    keep_tags: int = 0
    """First tags that are neither shuffled nor left out, the trigger not counted."""
    tag_dropout: float = 0.0
    """Share of the tags, 0 to 1, that each variant of a caption leaves out."""
    wildcards: bool = False
    """Draws one option of each {a|b} in a caption for each variant of it."""
    seed: int = 0
    """Seed of every random draw: the same seed on the same machine makes the same bytes."""
    max_chunks: int = 1
    """Chunks of 75 tokens that a caption may fill; what is beyond them is cut off."""
    clip_skip: int = 0
    """Last layers of the text encoder to leave out, beyond the base's own; where others say clip skip 2, say 1."""
    trigger: str = ""
    """Word that calls the style; put in front of each caption that lacks it, and the caption of pictures with none."""
    init_word: str = ""
    """Words for which the base already draws a little as the pictures are: the first steps learn to draw that for the
    trigger, so that the pictures change less, and less is forgotten."""
    init_steps: int = 150
    """How many of the steps learn the init_word; the rest learn the pictures."""
    init_learning_rate: float | None = None
    """Peak learning rate of those steps. Without it: that of the rest."""
    class_data: str = ""
    """Folder of captioned class pictures, learnt beside yours, as many in each step, to keep what the base knows."""
    class_prompt: tuple[str, ...] = ()
    """Prompt from which the base draws the class pictures that are missing, once, into the run folder; may be given
    several times, and they take turns."""
    class_images: int = 0
    """Class pictures that there should be at least; what class_data has not is drawn from class_prompt."""
    prior_weight: float = 1.0
    """What the class pictures' part of the loss counts."""
    text_encoder: bool = False
    """Also adapts the text encoders, where they have what the targets name."""
    text_encoder_learning_rate: float | None = None
    """Learning rate of the text encoder's part. Without it: that of the rest."""
    text_encoder_2_learning_rate: float | None = None
    """Learning rate of SDXL's second text encoder. Without it: the first's."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of the frozen base; what is trained is always float32."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Keeps the linear layers of the frozen base in 8 or 4 bits: less memory, slower; nf4 needs sdlora[quantise]."""
    recompute: Literal["none", "feed-forward", "all"] = "none"
    """Keeps less for the backward pass and computes it twice: feed-forward (a third less memory), or all; slower."""
    fast_layers: bool = True
    """On a CPU, runs frozen layers as the products that it multiplies fastest, and keeps less; off: as torch does."""
    preview: tuple[str, ...] = ()
    """Prompt to draw during the run, always from the same noise; may be given several times."""
    preview_every: int = 0
    """Steps between previews; 0 draws them only at the end."""
    validation_share: float = 0.0
    """Share of pictures, 0 to 1, that are not learnt but measured, always with the same noise, to see overfitting."""
    validate_every: int = 50
    """Steps between two measurements of the validation loss; the last step is always measured."""
    checkpoint_every: int = 100
    """Steps between saved states that a stopped run goes on from; 0 saves only when it stops."""
    share_captions: bool = False
    """Writes into the LoRA how often each tag of the captions occurs; without it nothing of them is in it."""
    tracker: tuple[str, ...] = ()
    """Also logs to tensorboard, wandb or trackio, in the run folder's trackers; may be given several times."""

    def __post_init__(self) -> None:
        for name in FIELDS:
            object.__setattr__(self, name, check_value(name, getattr(self, name)))
        check_agreement(self)

    @property
    def scale_alpha(self) -> float:
        """The alpha in force: the rank where none was given."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def text_encoder_rate(self) -> float:
        """The text encoder's learning rate in force."""
        return self.learning_rate if self.text_encoder_learning_rate is None else self.text_encoder_learning_rate

    @property
    def text_encoder_2_rate(self) -> float:
        """The second text encoder's learning rate in force."""
        own = self.text_encoder_2_learning_rate
        return self.text_encoder_rate if own is None else own

    @property
    def steps_of_init_word(self) -> int:
        """How many of the first steps learn the init_word; 0 without one."""
        return self.init_steps if self.init_word else 0

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.accumulation


FIELDS: dict[str, Any] = {f.name: typing.get_type_hints(Recipe)[f.name] for f in fields(Recipe)}
"""Each field's name and type."""
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Recipe)}
UNDECISIVE = frozenset(
    {
        "preview",
        "preview_every",
        "checkpoint_every",
        "max_skipped_steps",
        "validate_every",
        "continue_from",
        "merge",
        "recompute",
        "skip_bad",
        "small_buckets",
        "tracker",
        "masks",
        "class_data",
    }
)
"""Fields that do not change what is learnt; of files and folders that they name, the contents decide, not the path."""


def check_value(name: str, value: Any) -> Any:
    """The value of the field `name` in its exact type, with whole numbers accepted where any number is.

    Raises: ConfigError for another type, NaN, infinity, or a value out of range.
    """
    value = typed(name, FIELDS[name], value, DEFAULTS[name])
    fits, fix = LIMITS.get(name, (lambda _: True, ""))
    if value is not None and not fits(value):
        raise ConfigError(f"{name} = {show(value)} is out of range; {fix}")
    return value


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A Recipe from some of its values, the rest at their defaults; a few of these hang on the values given.

    Raises: ConfigError for an unknown key (with the nearest known one) or a value that cannot be used.
    """
    for key in values:
        if key not in FIELDS:
            raise ConfigError(f"unknown key {key}{suggest(key, FIELDS) or '; known are ' + ', '.join(FIELDS)}")
    if values.get("optimizer") == "prodigy" and "learning_rate" not in values:
        values = {**values, "learning_rate": 1.0}
    recipe = Recipe(**values)
    if "warmup_steps" not in values and recipe.warmup_steps > recipe.steps // 5:
        recipe = Recipe(**{**values, "warmup_steps": recipe.steps // 5})
    return recipe


def recipe_from_toml(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a TOML file, with `overrides` (the flags) before its values and the defaults behind them.

    Raises: ConfigError for a file that cannot be read, is no TOML, has an unknown key, or a value that cannot be used.
    """
    values = {} if path is None else read_toml(Path(path))
    for key, value in values.items():
        try:
            if key not in FIELDS:
                table = "; tables are not used, put its keys at the top level" if isinstance(value, dict) else ""
                hint = table or suggest(key, FIELDS) or "; known are " + ", ".join(FIELDS)
                raise ConfigError(f"unknown key {key}{hint}")
            check_value(key, value)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return make_recipe({**values, **(overrides or {})})


def recipe_to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `recipe_from_toml` reads back to an equal Recipe; values left open are comments."""
    lines = []
    for name in FIELDS:
        value = getattr(recipe, name)
        lines.append(f"# {name} is left open" if value is None else f"{name} = {to_toml(value)}")
    return "\n".join(lines) + "\n"


_RATES_IN_FORCE = {
    "text_encoder_learning_rate": "text_encoder_rate",
    "text_encoder_2_learning_rate": "text_encoder_2_rate",
}


def compare(a: Recipe, b: Recipe) -> list[str]:
    """What differs between two recipes, as `steps 300 -> 600`, leaving out what does not change the result."""
    found = []
    for name in FIELDS:
        old, new = getattr(a, name), getattr(b, name)
        if name == "alpha":
            old, new = a.scale_alpha, b.scale_alpha
        elif name in _RATES_IN_FORCE:
            before, after = getattr(a, _RATES_IN_FORCE[name]), getattr(b, _RATES_IN_FORCE[name])
            same = not (a.text_encoder and b.text_encoder) or before == after
            old, new = (None, None) if same else (before, after)
        if old != new and name not in UNDECISIVE:
            found.append(f"{name} {'open' if old is None else show(old)} -> {'open' if new is None else show(new)}")
    return found
