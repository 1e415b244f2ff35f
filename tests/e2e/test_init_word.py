"""A run that starts from a word: what its first steps learn, what they leave, and that it goes on to the bit."""

import pytest
import torch

from sdlora.adapter.layers import attach
from sdlora.cli import main
from sdlora.combining.plan import Plan
from sdlora.training import loop
from sdlora.training.checkpoint import load_newest
from sdlora.training.loop import train_adapter
from sdlora.training.run import Run
from tests.pictures import make_folder
from tests.short_runs import change, losses, rows, train_until
from tests.tiny import make_tiny_base

WORD = {"trigger": "ink", "init_word": "cat", "caption_dropout": 0.0, "flip": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


def predict(base, prompt, t=600):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return base.predict(x, torch.tensor([t]), base.encode_text(base.tokenize([prompt])[0]))


def test_first_steps_learn_what_the_base_draws_for_the_word(folder, out, capsys):
    base = make_tiny_base()
    recipe = change(steps=161, init_steps=160, learning_rate=1e-6, init_learning_rate=2e-2, batch_size=6, **WORD)
    adapter = train_adapter(folder, base, recipe, out)
    said = "the first 160 steps learn what the base draws for cat (learning rate 0.02)"
    assert said in capsys.readouterr().err
    found = losses(out)[:160]
    assert sum(found[-20:]) < 0.25 * sum(found[:20])
    prompt = "ink, a red square"
    before, goal = predict(base, prompt), predict(base, "cat, a red square")
    with Plan.of([(adapter, 1.0)]).applied(base) as stacked:
        after = predict(stacked, prompt)
    assert (after - goal).norm() < 0.6 * (before - goal).norm()


def test_a_word_that_is_the_trigger_itself_leaves_nothing_to_learn(folder, out):
    recipe = change(steps=4, init_steps=2, warmup_steps=0, **WORD | {"init_word": "ink", "caption_dropout": 1.0})
    train_adapter(folder, make_tiny_base(), recipe, out)
    learnt = rows(out)
    assert [row["loss"] for row in learnt[:2]] == [0.0, 0.0]  # the up factors are zero, so the base says the same
    assert all(row["loss"] > 0.1 for row in learnt[2:])
    assert [row.get("learnt") for row in learnt] == ["init_word", "init_word", None, None]


def test_no_caption_is_dropped_while_the_word_is_learnt(folder, out):
    recipe = change(steps=2, init_steps=1, warmup_steps=0, **WORD | {"caption_dropout": 1.0})
    train_adapter(folder, make_tiny_base(), recipe, out)
    assert losses(out)[0] > 0  # of empty captions the base says to the teacher what it says to the learner


def test_the_pictures_begin_with_an_optimizer_that_knows_nothing_of_the_word(folder, out):
    recipe = change(steps=7, init_steps=4, **WORD)
    train_adapter(folder, make_tiny_base(), recipe, out)
    checkpoint = load_newest(Run(out).checkpoints, print)
    assert checkpoint.step == 7
    assert {float(value) for key, value in checkpoint.optimizer.items() if key.startswith("step/")} == {3.0}


def test_the_teacher_is_the_base_without_the_lora(folder, out, monkeypatch):
    """A teacher that learnt along would have a loss of nothing at all."""
    base, seen = make_tiny_base(), []
    accumulate = loop.accumulate

    def watch(*args):
        loss = accumulate(*args)
        word, layers = args[-1], args[2]
        seen.append((word.text.states.clone(), all("forward" in x.module.__dict__ for x in layers.layers)))
        return loss

    monkeypatch.setattr(loop, "accumulate", watch)
    train_adapter(folder, base, change(steps=4, init_steps=3, text_encoder=True, **WORD), out)
    assert all(attached for _, attached in seen)
    assert all(torch.equal(text, seen[0][0]) for text, _ in seen)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_stopped_run_ends_with_the_same_bytes(folder, tmp_path, monkeypatch, step):
    recipe = change(steps=7, init_steps=4, checkpoint_every=1, ema_decay=0.9, **WORD)
    straight, out = tmp_path / "straight.safetensors", tmp_path / "out.safetensors"
    train_adapter(folder, make_tiny_base(), recipe, straight)
    train_until(monkeypatch, step + 1, folder, make_tiny_base(), recipe, out)
    train_adapter(folder, make_tiny_base(), recipe, out)
    assert out.read_bytes() == straight.read_bytes()
    assert rows(out) == rows(straight)


def test_aside_gives_the_base_back_and_takes_it_again():
    base = make_tiny_base()
    plain = predict(base, "ink")
    layers = attach({"unet": base.unet}, {"unet": ("attention",)}, rank=2, alpha=2.0, seed=0)
    with torch.no_grad():
        for layer in layers.layers:
            layer.up.normal_(generator=torch.Generator().manual_seed(0))
    learnt = predict(base, "ink")
    assert not torch.equal(learnt, plain)
    with layers.aside():
        assert torch.equal(predict(base, "ink"), plain)
    assert torch.equal(predict(base, "ink"), learnt)
    layers.detach_from_base()
    with layers.aside():
        assert torch.equal(predict(base, "ink"), plain)
    assert torch.equal(predict(base, "ink"), plain)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--init-word", "cat"], 'init_word = "cat" has no use while trigger = ""; set trigger (--trigger)'),
        (["--init-steps", "5"], 'init_steps = 5 has no use while init_word = ""'),
        (["--trigger", "ink", "--init-word", " "], 'init_word = " " is out of range; give a word or two'),
        (["--trigger", "ink", "--init-word", "cat", "--steps", "150"], "init_steps = 150 leaves none of 150 steps"),
        (["--trigger", "ink", "--init-word", "cat", "--init-learning-rate", "0"], "init_learning_rate = 0.0 is out of"),
    ],
)
def test_what_cannot_be_is_one_line(folder, out, capsys, flags, says):
    assert main(["train", str(folder), "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not out.parent.joinpath("out.run").exists()


def test_dry_run_says_it(folder, out, capsys):
    flags = ["--trigger", "ink", "--init-word", "cat", "--init-learning-rate", "0.003", "--dry-run"]
    assert main(["train", str(folder), "--out", str(out), *flags]) == 0
    shown = capsys.readouterr()
    assert 'init_word = "cat"' in shown.out
