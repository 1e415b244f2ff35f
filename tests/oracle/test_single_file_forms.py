"""A single file against diffusers: its reader finds our weights in our file, and both forms of a base act the same."""

from __future__ import annotations

import pytest
import torch

from sdlora.bases.family import load_base
from sdlora.bases.schedule import choose_schedule, cumulate_alphas
from sdlora.bases.single_file import read_checkpoint
from tests.single_files import FAMILIES, make_parts, make_pipeline, write_tiny_file
from tests.tiny import SCHEDULE


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """The family, its folder and its file."""
    family, place = request.param, tmp_path_factory.mktemp(request.param)
    make_pipeline(family).save_pretrained(place / "folder")
    return family, place / "folder", write_tiny_file(place / "one.safetensors", family)


@pytest.fixture(scope="module")
def bases(both):
    family, folder, file = both
    by_folder = load_base(str(folder), device="cpu")
    by_file = load_base(str(file), device="cpu", prediction="epsilon")
    assert by_folder.family is by_file.family
    assert by_file.family.name == family
    return by_folder, by_file


def test_diffusers_reads_our_file_back_to_the_same_weights(both):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    family, folder, file = both
    cls = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    options = {} if family == "sdxl" else {"safety_checker": None, "feature_extractor": None}
    pipe = cls.from_single_file(str(file), config=str(folder), local_files_only=True, **options)
    for part, module in make_parts(family).items():
        theirs = getattr(pipe, part).state_dict()
        ours = module.state_dict()
        assert set(theirs) == set(ours), part
        for name, value in ours.items():
            assert torch.equal(theirs[name], value), (part, name)


def test_read_checkpoint_gives_the_weights_that_were_written(both):
    family, _, file = both
    found = read_checkpoint(file)
    assert set(found) == set(make_parts(family))
    for part, module in make_parts(family).items():
        state = module.state_dict()
        assert set(found[part]) == set(state)
        assert all(torch.equal(found[part][name], value) for name, value in state.items())


def test_folder_and_file_have_bit_identical_weights_and_schedules(bases):
    by_folder, by_file = bases
    assert set(by_folder.modules) == set(by_file.modules)
    for part, module in by_folder.modules.items():
        theirs = module.state_dict()
        for name, value in by_file.modules[part].state_dict().items():
            assert torch.equal(value, theirs[name]), (part, name)
    assert torch.equal(by_folder.alphas_cumprod, by_file.alphas_cumprod)
    assert by_folder.resolution_px == by_file.resolution_px == 64
    assert by_file.name == "one"
    assert by_file.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_folder_and_file_give_bit_identical_text_noise_and_pictures(bases):
    by_folder, by_file = bases
    prompts = ["a photo of a cat", "", "ink drawing, " * 30]
    ids = [base.tokenize(prompts, None)[0] for base in bases]
    assert torch.equal(*ids)
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    with torch.no_grad():
        texts = [base.encode_text(rows) for base, rows in zip(bases, ids, strict=True)]
        noise = [base.predict(x_t, t, text) for base, text in zip(bases, texts, strict=True)]
    assert torch.equal(texts[0].states, texts[1].states)
    assert (texts[0].pooled is None) == (by_folder.family.name != "sdxl")
    if texts[0].pooled is not None:
        assert torch.equal(texts[0].pooled, texts[1].pooled)
    assert torch.equal(*noise)
    assert noise[0].std() > 0
    assert torch.equal(by_folder.decode_latents(x_t), by_file.decode_latents(x_t))
    picture = x_t[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1)
    for a, b in zip(by_folder.encode_pictures(picture), by_file.encode_pictures(picture), strict=True):
        assert torch.equal(a, b)


def test_zero_terminal_snr_equals_diffusers_rescaled_schedule(both):
    from diffusers import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    _, folder, file = both
    theirs = DDIMScheduler(**SCHEDULE | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000) ** 2
    exact = torch.cumprod(1 - rescale_zero_terminal_snr(betas.double()), 0)
    for source in (folder, file):
        base = load_base(str(source), device="cpu", prediction="v", zero_snr=True)
        assert base.scheduler_config["prediction_type"] == "v_prediction"
        assert float(base.alphas_cumprod[-1]) == 0
        assert torch.allclose(base.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
        assert torch.allclose(base.alphas_cumprod, exact, rtol=1e-4, atol=1e-9)
    plain = cumulate_alphas(choose_schedule(SCHEDULE, "v", False, "x"))
    assert float(plain[-1]) == pytest.approx(0.00466, rel=1e-2)


def test_sampling_a_zero_snr_base_starts_at_pure_noise_and_stays_finite(both):
    from sdlora.bases.sampling import make_scheduler, sample

    _, _, file = both
    base = load_base(str(file), device="cpu", prediction="v", zero_snr=True)
    for sampler in ("dpm++", "ddim"):
        scheduler = make_scheduler(base, sampler)
        scheduler.set_timesteps(4)
        assert int(scheduler.timesteps[0]) == 999
        assert float(scheduler.alphas_cumprod[-1]) < 1e-7
        (picture,) = sample(base, ["a cat"], seeds=[0], steps=3, sampler=sampler)
        assert picture.size == (64, 64)
        assert picture.getextrema() != ((0, 0),) * 3
        assert len(picture.getcolors(64 * 64)) > 10
