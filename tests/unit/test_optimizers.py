"""Every optimizer by its name: it learns, its state goes through a file to the bit, and what is missing is one line."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

sys.path.insert(0, str(Path(__file__).parents[1]))
from optimizers import Prodigy, ScheduleFree, make_module

from sdlora.config import Recipe, make_recipe
from sdlora.errors import ConfigError, RunError
from sdlora.training.averages import Averages
from sdlora.training.optim import flatten_state, make_optimizer, rates_of, restore_state, set_rate
from sdlora.training.optimizers import PACKAGES, check_optimizer
from sdlora.training.settings import advise

RATES = {"adamw": 0.05, "adafactor": 0.05, "prodigy": 1.0, "lion": 0.02, "schedule-free": 0.2}


def make(name):
    generator = torch.Generator().manual_seed(0)
    names = ("unet.a.down", "unet.a.up", "unet.a.magnitude", "unet.b.down", "unet.b.up")
    factors = {n: torch.nn.Parameter(torch.randn(6, 4, generator=generator)) for n in names}
    factors["unet.a.magnitude"] = torch.nn.Parameter(torch.ones(6))
    factors["unet.b.up"].data.zero_()  # as a LoRA starts
    recipe = Recipe(optimizer=name, learning_rate=RATES.get(name, 0.1))
    optimizer = make_optimizer(factors, **rates_of(recipe))
    averages = Averages(factors, optimizer, 0.0)
    averages.begin()
    return factors, optimizer, averages


def update(factors, optimizer, steps):
    """Towards 2 everywhere; gradients that hang on the factors alone. Returns the error before."""
    for step in steps:
        optimizer.zero_grad()
        error = sum((f - 2).square().sum() for f in factors.values())
        error.backward()
        set_rate(optimizer, 1.0 if step % 2 else 0.5)
        optimizer.step()
    return float(error.detach())


def hold_resume(name):
    straight, optimizer, _ = make(name)
    first = update(straight, optimizer, range(1))
    update(straight, optimizer, range(1, 6))
    stopped, before, _ = make(name)
    update(stopped, before, range(3))
    saved = load(save({key: value.clone() for key, value in flatten_state(before).items()}))
    again, after, averages = make(name)
    for key, factor in again.items():
        factor.data.copy_(stopped[key].data)
    restore_state(after, saved)
    averages.begin()
    update(again, after, range(3, 6))
    assert all(torch.equal(straight[key], again[key]) for key in straight)
    whole, resumed = flatten_state(optimizer), flatten_state(after)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    for key, values in ((k, optimizer.state[straight[k]]) for k in straight):
        kinds = {name: type(value) for name, value in after.state[again[key]].items()}
        assert kinds == {name: type(value) for name, value in values.items()}
    assert update(straight, optimizer, range(6, 120)) < first / 2
    return saved


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy", "lion", "schedule-free"])
def test_resumed_optimizer_equals_an_uninterrupted_one(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name][0])
    saved = hold_resume(name)
    if name == "prodigy":
        assert int(saved["k:int/group.0"]) == 3
        assert float(saved["d_numerator:float/group.0"]) != 0
    if name == "schedule-free":
        assert bool(saved["train_mode:bool/group.0"])


def test_groups_and_numbers_of_a_stand_in_come_back(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "prodigyopt", make_module(Prodigy=Prodigy))
    saved = hold_resume("prodigy")
    assert float(saved["d:float/group.0"]) == 1e-3 * 1.1 * 1.1 * 1.1
    assert int(saved["k:int/group.0"]) == 3
    assert int(saved["step:int/unet.a.down"]) == 3
    assert capsys.readouterr().out == ""
    _, optimizer, _ = make("prodigy")
    assert set_rate(optimizer, 0.5) == 0.5e-3  # what Prodigy found is in it
    assert optimizer.options["safeguard_warmup"]
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


@pytest.mark.parametrize("real", [False, True])
def test_schedule_free_shows_its_averages_and_goes_on_to_the_bit(monkeypatch, real):
    if real:
        pytest.importorskip("schedulefree")
    else:
        monkeypatch.setitem(sys.modules, "schedulefree", make_module(AdamWScheduleFree=ScheduleFree))
        hold_resume("schedule-free")
    plain, plain_optimizer, _ = make("schedule-free")
    update(plain, plain_optimizer, range(4))
    factors, optimizer, averages = make("schedule-free")
    update(factors, optimizer, range(3))
    learnt = {name: factor.detach().clone() for name, factor in factors.items()}
    with averages.shown():
        assert not optimizer.param_groups[0]["train_mode"]
        for name, factor in factors.items():
            z = optimizer.state[factor]["z"]
            expected = (learnt[name] - (1 - 0.9) * z) / 0.9  # y = 0.9 x + 0.1 z
            torch.testing.assert_close(factor.detach(), expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(factors["unet.a.down"], learnt["unet.a.down"])
    assert all(torch.equal(factor, learnt[name]) for name, factor in factors.items())
    update(factors, optimizer, range(3, 4))
    assert all(torch.equal(factors[name], plain[name]) for name in plain)


def test_lion_takes_steps_of_one_size():
    pytest.importorskip("lion_pytorch")
    factors, optimizer, _ = make("lion")
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = factors["unet.b.down"].detach().clone()
    update(factors, optimizer, range(1))
    torch.testing.assert_close((factors["unet.b.down"] - before).abs(), torch.full((6, 4), 0.01))


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_missing_package_is_one_line(monkeypatch, name):
    module, package = PACKAGES[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf'optimizer = "{name}" needs the package {package}; pip install') as error:
        check_optimizer(name, torch.device("cpu"))
    assert "sdlora[optimizers]" in str(error.value)
    assert "\n" not in str(error.value)


def test_eight_bits_need_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", make_module())
    with pytest.raises(RunError, match="needs a GPU; use adamw"):
        check_optimizer("adamw8bit", torch.device("cpu"))
    check_optimizer("adamw8bit", torch.device("cuda"))
    check_optimizer("adamw", torch.device("cpu"))


def test_state_that_a_file_cannot_hold_is_an_error():
    factors, optimizer, _ = make("adamw")
    update(factors, optimizer, range(1))
    optimizer.state[factors["unet.a.up"]]["strange"] = [1]
    with pytest.raises(TypeError, match=r"strange of unet\.a\.up is list"):
        flatten_state(optimizer)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"optimizer": "prodigy", "text_encoder": True, "text_encoder_learning_rate": 0.5},
            "one learning rate",
        ),
        ({"optimizer": "prodigy", "lora_plus_ratio": 16}, "leave out lora_plus_ratio = 16.0"),
        ({"optimizer": "schedule-free", "ema_decay": 0.9}, "ema_decay = 0.9 cannot go with"),
        ({"optimizer": "schedule-free", "max_norm": 1}, "max_norm = 1.0 cannot go with"),
        ({"validate_every": 5}, "validate_every = 5 has no use while validation_share = 0.0"),
        ({"ema_decay": 1}, "ema_decay = 1.0 is out of range"),
    ],
)
def test_what_does_not_go_together_is_one_line(values, says):
    with pytest.raises(ConfigError) as error:
        make_recipe(values)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_prodigys_learning_rate_is_one_where_none_is_given():
    assert make_recipe({"optimizer": "prodigy"}).learning_rate == 1.0
    assert make_recipe({"optimizer": "prodigy", "learning_rate": 0.5}).learning_rate == 0.5
    assert make_recipe({"optimizer": "lion"}).learning_rate == Recipe().learning_rate


def test_advice_is_given_where_it_is_due():
    assert advise(Recipe()) == []
    assert advise(make_recipe({"optimizer": "prodigy", "schedule": "constant"})) == []
    assert ["constant schedule" in line for line in advise(make_recipe({"optimizer": "schedule-free"}))] == [True]
    assert len(advise(Recipe(optimizer="prodigy"))) == 2
