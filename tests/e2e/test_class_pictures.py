"""Class pictures: what a step has of them, that they keep what the base knows, and that runs go on to the bit."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdlora.adapter.layers import attach
from sdlora.bases.family import load_base
from sdlora.bases.sampling import sample
from sdlora.cli import main
from sdlora.combining.plan import Plan
from sdlora.data.cache import encode_folder
from sdlora.data.folder import scan_folder
from sdlora.data.material import class_recipe
from sdlora.errors import DataError, RunError
from sdlora.training.loop import train_adapter
from sdlora.training.objective import Objective
from sdlora.training.prior import Prior
from sdlora.training.processes import Processes
from sdlora.training.setup import make_accelerator
from sdlora.training.step import accumulate, chances_of
from sdlora.training.validation import Validation
from tests.pictures import make_folder
from tests.short_runs import change, losses, train_until
from tests.tiny import make_tiny_base, save_tiny_pipeline


def make_class(folder: Path, sizes=((64, 64),) * 3, caption: str = "a cat") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        Image.linear_gradient("L").rotate(90 * i).resize(size).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def encode(base, folder):
    return encode_folder(base, scan_folder(folder), resolution_px=64, flip=True, text=True, progress=False)


def test_a_step_adds_the_class_pictures_gradient_times_their_weight(tmp_path):
    base = make_tiny_base()
    mine, others = encode(base, make_folder(tmp_path / "data")), encode(base, make_class(tmp_path / "class"))
    recipe = change(accumulation=2, class_data=str(tmp_path / "class"), prior_weight=0.5)
    objective = Objective(recipe, "epsilon", len(base.alphas_cumprod))
    own = class_recipe(recipe)

    def learn(encoded, recipe, prior=None):
        layers = attach({"unet": base.unet}, {"unet": ("to_q", "to_v")}, rank=2, alpha=2.0, seed=0)
        chances = chances_of(base, encoded, recipe, Validation([], recipe))
        accelerator = make_accelerator(base, recipe)
        loss = accumulate(3, base, layers, encoded, objective, chances, accelerator, Processes(), prior)
        gradients = {name: factor.grad.clone() for name, factor in layers.named_factors().items()}
        layers.detach_from_base()
        return float(loss), gradients

    loss, gradients = learn(mine, recipe)
    class_loss, class_gradients = learn(others, own)
    both, found = learn(mine, recipe, Prior.of(base, others, recipe))
    assert both == pytest.approx(loss + 0.5 * class_loss, rel=1e-6)
    moved = 0
    for name in gradients:
        torch.testing.assert_close(found[name], gradients[name] + 0.5 * class_gradients[name], rtol=1e-4, atol=1e-9)
        moved += bool(class_gradients[name].any())
    assert moved == len(gradients) // 2  # the up factors; the others' are zero at the start


def test_what_is_drawn_of_class_pictures_has_addresses_of_its_own(tmp_path):
    base = make_tiny_base()
    folder = make_class(tmp_path / "class", [(64, 64)] * 2)
    (folder / "3_more").mkdir()
    for suffix in (".png", ".txt"):
        (folder / f"1{suffix}").rename(folder / "3_more" / f"1{suffix}")
    recipe = change(class_data=str(folder), caption_dropout=0.5)
    encoded = encode(base, folder)
    prior = Prior.of(base, encoded, recipe)
    draws = [prior.chances.draw(step, 2) for step in range(20)]
    assert Counter(torch.cat([d.picture for d in draws]).tolist()) == {0: 10, 1: 30}
    assert set(torch.cat([d.mirror for d in draws]).tolist()) == {0, 1}
    assert set(torch.cat([d.caption for d in draws]).tolist()) == {0, 1, 2}
    mine = chances_of(base, encoded, recipe, Validation([], recipe)).draw(0, 2)
    assert not torch.equal(mine.noise, draws[0].noise)
    again = Prior.of(base, encoded, recipe).chances.draw(7, 1, 1, 2)  # a place in a step, however it is cut
    assert torch.equal(again.noise[0], draws[7].noise[1])
    assert Prior.of(base, None, recipe) is None
    other = Prior.of(base, encoded, change(seed=1)).chances.draw(0, 2)
    assert not torch.equal(other.noise, draws[0].noise)


def test_run_with_class_pictures_resumes_and_a_changed_folder_is_refused(tmp_path, monkeypatch, capsys):
    data = make_folder(tmp_path / "data", 4)
    folder = make_class(tmp_path / "class", [(64, 64), (96, 48), (48, 96)])
    recipe = change(
        class_data=str(folder), prior_weight=0.7, buckets=True, small_buckets=True, crop="random", crops=2,
        accumulation=2, text_encoder=True, trigger="ink", dropout=0.1, validation_share=0.25,
    )  # fmt: skip
    whole, parts, plain = (tmp_path / f"{name}.safetensors" for name in ("whole", "parts", "plain"))
    adapter = train_adapter(data, make_tiny_base(), recipe, whole)
    said = capsys.readouterr().err
    assert f"{folder}: 3 class pictures, 4 in each step beside yours (5.33 epochs), their loss times 0.7" in said
    assert "class pictures' loss times 0.7" in said
    assert "bucket 80 x 48 px: 1 picture" in said
    assert str(tmp_path) not in json.dumps(adapter.card.settings)
    assert len(adapter.card.settings["class_data"]) == 64
    train_until(monkeypatch, 4, data, make_tiny_base(), recipe, parts)
    (folder / "1.txt").write_text("two cats")
    with pytest.raises(RunError, match=r"the class pictures or their captions \(class_data\) changed"):
        train_adapter(data, make_tiny_base(), recipe, parts)
    (folder / "1.txt").write_text("a cat")
    with pytest.raises(RunError, match=r"prior_weight 0\.7 -> 0\.8"):
        train_adapter(data, make_tiny_base(), dataclasses.replace(recipe, prior_weight=0.8), parts)
    folder.rename(tmp_path / "moved")
    train_adapter(data, make_tiny_base(), dataclasses.replace(recipe, class_data=str(tmp_path / "moved")), parts)
    assert parts.read_bytes() == whole.read_bytes()
    train_adapter(data, make_tiny_base(), dataclasses.replace(recipe, class_data="", prior_weight=1.0), plain)
    assert all(b > a for a, b in zip(losses(plain), losses(whole), strict=True))


@pytest.mark.slow
def test_class_pictures_keep_the_base_nearer_to_itself(tmp_path):
    base = load_base("mini", precision="bf16")  # a random base's own pictures would be nothing to keep
    data, classes, unseen = (tmp_path / name for name in ("data", "class", "unseen"))
    for folder in (data, classes, unseen):
        folder.mkdir()
    drawn = sample(base, ["a cat"] * 8, seeds=list(range(1, 9)), steps=8, width_px=64, height_px=64)
    for i in range(4):
        for folder, picture in ((classes, drawn[i]), (unseen, drawn[4 + i])):
            picture.save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text("a cat")
        Image.new("RGB", (64, 64), (200 + 10 * i, 20, 30)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("a cat")
    encoded = encode(base, unseen)  # its answer to the prompt, not to four pictures of it
    times = torch.tensor([200, 400, 600, 800])
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    alpha_bar = base.alphas_cumprod[times].float().view(4, 1, 1, 1)
    x_t = (alpha_bar.sqrt() * encoded.mean[0] + (1 - alpha_bar).sqrt() * noise).to(base.dtype)

    def answer(*adapters):
        with Plan.of([(adapter, 1.0) for adapter in adapters]).applied(base), torch.no_grad():
            return base.predict(x_t, times, encoded.text[torch.arange(4)]).float()

    before, drift = answer(), {}
    recipe = change(
        precision="bf16", steps=40, batch_size=4, rank=8, learning_rate=2e-3, resolution=64, checkpoint_every=0
    )
    for name, folder in (("without", ""), ("with", str(classes))):
        out = tmp_path / f"{name}.safetensors"
        learnt = train_adapter(data, base, dataclasses.replace(recipe, class_data=folder), out)
        drift[name] = float((answer(learnt) - before).square().mean())
    print("mean squared drift of the answer to the class prompt:", drift)
    assert drift["with"] < 0.85 * drift["without"], drift


def test_problems_of_the_class_folder_are_listed_with_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = str(save_tiny_pipeline(tmp_path / "tiny"))
    data, classes = make_folder(tmp_path / "data", 2), make_class(tmp_path / "class")
    (data / "0.txt").unlink()
    (classes / "1.txt").unlink()
    (classes / "2.png").write_bytes(b"no picture")
    flags = ["--base", base, "--class-data", str(classes)]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    for argv in (["train", str(data), *flags], ["train", str(data), *flags, "--dry-run"]):
        assert main(argv) == 2
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n")) == ("", 1)
        assert "0.png: has no caption (write each one's caption in a .txt file of its name, or give" in captured.err
        assert f"{classes}/1.png: has no caption (write each one's caption in a .txt file of its name)" in captured.err
    assert main(["check", str(data), *flags, "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert [p["file"] for p in report["problems"]] == ["0.png", f"{classes}/1.png", f"{classes}/2.png"]
    assert report["class_pictures"]["pictures"] == 3
    gone = ["check", str(data), "--trigger", "x", "--base", base, "--json", "--class-data"]
    for folder, problem in ((tmp_path / "gone", "does not exist"), (data, "is the data folder itself, and cannot be")):
        assert main([*gone, str(folder)]) == 2
        problems = json.loads(capsys.readouterr().out)["problems"]
        assert any(p["file"] == str(folder) and p["problem"].startswith(problem) for p in problems), problems
    with pytest.raises(DataError, match="has no caption"):
        train_adapter(data, make_tiny_base(), change(class_data=str(classes)), tmp_path / "out.safetensors")
    assert sorted(tmp_path.rglob("*")) == before


def test_check_and_the_plan_say_what_class_pictures_come_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = str(save_tiny_pipeline(tmp_path / "tiny"))
    data = make_folder(tmp_path / "data", 2)
    classes = make_class(data / "class", caption="x " * 80)  # within the data folder, whose pictures they are not
    flags = ["--base", base, "--class-data", str(classes), "--prior-weight", "0.5", "--batch-size", "3", "--steps", "4"]
    line = f"{classes}: 3 class pictures, 3 in each step beside yours (4 epochs), their loss times 0.5"
    assert main(["train", str(data), *flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"class        {line}\n" in out
    assert "2 pictures, 2 different captions" in out
    assert main(["check", str(data), *flags]) == 0
    out = capsys.readouterr().out
    assert f"class             {line}\n" in out
    assert f"caption too long  {classes}/0.png: 82 tokens, the base reads 77" in out
    assert main(["check", str(data), *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pictures"], report["problems"]) == (2, [])
    assert report["class_pictures"]["images_per_epoch"] == 3
    assert report["class_pictures"]["epochs"] == 4
    assert [row["file"] for row in report["class_pictures"]["truncated"]] == ["0.png", "1.png", "2.png"]
