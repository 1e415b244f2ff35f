"""What diagnose says, against the dense ΔWs and their singular value decompositions."""

from __future__ import annotations

import json

import pytest
import torch

from sdlora.adapter.delta import Adapter, Card, Dora, LowRank
from sdlora.cli import main
from sdlora.combining.diagnose import Diagnosis, diagnose
from sdlora.combining.plan import Member
from sdlora.errors import AdapterFileError
from tests.stacks import random_adapter
from tests.tiny import make_tiny_base

PATHS = ("unet.down_blocks.0.a", "unet.mid_block.b", "unet.mid_block.c")
OUT, IN = 20, 16


def random_pair(generator, rank: int, alpha: float, kernel: int | None = None) -> LowRank:
    into = (IN,) if kernel is None else (IN, kernel, kernel)
    ones = () if kernel is None else (1, 1)
    down = torch.randn(rank, *into, generator=generator)
    return LowRank(down, torch.randn(OUT, rank, *ones, generator=generator), alpha)


def make(seed: int, rank: int, alpha: float, kernel: int | None = None) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter({path: random_pair(generator, rank, alpha, kernel) for path in PATHS})


def dense(member: Member, path: str) -> torch.Tensor:
    return member.weight * member.adapter.deltas[path].weight().double().flatten(1)


def basis(matrix: torch.Tensor) -> torch.Tensor:
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, s > 1e-5 * s[0]]


@pytest.mark.parametrize("kernel", [None, 3])
def test_every_figure_equals_the_dense_one(kernel):
    style, subject = Member(make(1, 3, 6.0, kernel), 0.8), Member(make(2, 5, 1.0, kernel), -1.3)
    found = diagnose(style, subject)
    energies = [0.0, 0.0]
    product = risked = 0.0
    for path in PATHS:
        s, c = dense(style, path), dense(subject, path)
        figures = found.layers[path]
        q_s, q_c = basis(s.T), basis(c.T)
        cosines = torch.linalg.svdvals(q_s.T @ q_c)
        outputs = torch.linalg.svdvals(basis(s).T @ basis(c))
        assert figures.style_energy == pytest.approx(float((s**2).sum()), rel=1e-6)
        assert figures.cosine == pytest.approx(float((s * c).sum() / (s.norm() * c.norm())), abs=1e-6)
        assert figures.input_overlap == pytest.approx(float((cosines**2).mean()), abs=1e-6)
        assert figures.output_overlap == pytest.approx(float((outputs**2).mean()), abs=1e-6)
        assert figures.at_risk == pytest.approx(float(((c @ q_s) ** 2).sum() / (c**2).sum()), abs=1e-6)
        strongest = max(float((s**2).sum()), float((c**2).sum()))
        assert figures.combined_energy == pytest.approx(float(((s + c) ** 2).sum()) / strongest, rel=1e-6)
        assert figures.input_random == pytest.approx(5 / s.shape[1])
        assert figures.risk_random == pytest.approx(3 / s.shape[1])
        energies = [energies[0] + float((s**2).sum()), energies[1] + float((c**2).sum())]
        product += float((s * c).sum())
        risked += float(((c @ q_s) ** 2).sum())
    assert found.style_energy == pytest.approx(energies[0], rel=1e-6)
    assert found.whole.cosine == pytest.approx(product / (energies[0] * energies[1]) ** 0.5, abs=1e-6)
    assert found.whole.at_risk == pytest.approx(risked / energies[1], rel=1e-6)
    assert set(found.blocks) == {"down.0", "mid"}
    middle = [found.layers[path] for path in PATHS[1:]]
    assert found.blocks["mid"].style_energy == pytest.approx(sum(f.style_energy for f in middle))
    assert found.blocks["mid"].input_overlap == pytest.approx(sum(f.input_overlap for f in middle) / 2)


def test_random_spaces_overlap_as_the_baseline_says():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(400):
        one, two = (Adapter({"unet.a": random_pair(generator, rank, 1.0)}) for rank in (2, 4))
        rows.append(diagnose(Member(one), Member(two)).whole)
    for name, random in (("input_overlap", 4 / IN), ("output_overlap", 4 / OUT), ("at_risk", 2 / IN)):
        mean = sum(getattr(row, name) for row in rows) / len(rows)
        assert mean == pytest.approx(random, rel=0.08), name
    assert rows[0].input_random == 4 / IN


def in_space(rows: torch.Tensor, seed: int) -> Adapter:
    up = torch.randn(OUT, len(rows), generator=torch.Generator().manual_seed(seed))
    return Adapter({"unet.a": LowRank(rows, up, float(len(rows)))})


def test_spaces_that_are_the_same_within_each_other_or_apart():
    q, _ = torch.linalg.qr(torch.randn(IN, IN, generator=torch.Generator().manual_seed(5)))
    rows = q.T.contiguous()
    cases = {
        "same": (rows[:4], torch.randn(4, 4, generator=torch.Generator().manual_seed(6)) @ rows[:4], 1.0, 1.0),
        "subject within style": (rows[:6], rows[1:3], 1.0, 1.0),
        "apart": (rows[:4], rows[4:8], 0.0, 0.0),
    }
    for name, (style, subject, overlap, risk) in cases.items():
        found = diagnose(Member(in_space(style, 1)), Member(in_space(subject, 2))).whole
        assert found.input_overlap == pytest.approx(overlap, abs=1e-6), name
        assert found.at_risk == pytest.approx(risk, abs=1e-6), name
    half = diagnose(Member(in_space(rows[:2], 1)), Member(in_space(rows[1:3], 2))).whole
    assert half.input_overlap == pytest.approx(0.5, abs=1e-6)


def test_rows_that_change_nothing_are_no_space():
    """A down factor of rank 4 whose up factor uses two of its rows reads two features, not four."""
    rows = torch.eye(IN)[:4]
    up = torch.randn(OUT, 4, generator=torch.Generator().manual_seed(1))
    up[:, 2:] = 0
    style = Adapter({"unet.a": LowRank(rows, up, 4.0)})
    found = diagnose(Member(style), Member(in_space(torch.eye(IN)[2:4], 2))).whole
    assert found.input_overlap == pytest.approx(0.0, abs=1e-9)
    assert found.risk_random == pytest.approx(2 / IN)


def test_a_lora_with_itself_and_its_opposite():
    one = Member(make(1, 3, 3.0))
    same = diagnose(one, one).whole
    assert (same.cosine, same.at_risk, same.combined_energy) == pytest.approx((1.0, 1.0, 4.0))
    opposite = diagnose(one, Member(one.adapter, -1.0))
    assert opposite.whole.cosine == pytest.approx(-1.0)
    assert opposite.whole.combined_energy == pytest.approx(0.0, abs=1e-9)
    assert "cancel" in opposite.sentences()["cosine"]
    assert "less than apart" in opposite.sentences()["combined_energy"]


def sentences(style: Adapter, subject: Adapter) -> dict[str, str]:
    return diagnose(Member(style), Member(subject)).sentences()


def test_sentences_follow_the_figures():
    q = torch.eye(IN)
    apart, shared = (
        sentences(in_space(q[:3], 1), in_space(q[3:6], 2)),
        sentences(in_space(q[:3], 1), in_space(q[:3], 2)),
    )
    assert "another --seed" in shared["input_overlap"]
    some = sentences(in_space(q[:4], 1), in_space(torch.cat([q[:1] + q[9:10], q[10:13]]), 2))
    assert "nothing to do" in some["input_overlap"]
    assert "nothing to do" in apart["input_overlap"]
    assert shared["at_risk"].startswith("100% of the subject")
    assert apart["at_risk"].startswith("Only 0%")
    strong = Adapter({"unet.a": LowRank(q[:3] * 9, in_space(q[:3], 1).deltas["unet.a"].up, 3.0)})
    assert "The style has" in sentences(strong, in_space(q[3:6], 2))["energy"]
    assert "The subject has" in sentences(in_space(q[3:6], 2), strong)["energy"]
    none = diagnose(Member(in_space(q[:3], 1)), Member(Adapter({"unet.b": make(1, 2, 2.0).deltas[PATHS[0]]})))
    assert isinstance(none, Diagnosis)
    assert "share no layer" in none.sentences()["layers"]
    assert (none.style_only, none.subject_only) == (("unet.a",), ("unet.b",))


def test_what_cannot_be_compared_is_one_clear_line():
    one = make(1, 3, 3.0)
    path = PATHS[0]
    with pytest.raises(AdapterFileError, match="two families, sd1 and sdxl"):
        diagnose(Member(Adapter(one.deltas, Card(family="sd1"))), Member(Adapter(one.deltas, Card(family="sdxl"))))
    with pytest.raises(AdapterFileError, match="is a DoRA"):
        diagnose(Member(one), Member(Adapter({path: Dora(one.deltas[path], torch.ones(OUT, 1))})))
    with pytest.raises(AdapterFileError, match="another shape"):
        diagnose(Member(one), Member(Adapter({path: LowRank(torch.ones(1, 3), torch.ones(OUT, 1), 1.0)})))
    with pytest.raises(AdapterFileError, match="subject changes nothing"):
        diagnose(Member(one), Member(one, 0.0, name="subject"))


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    base, folder = make_tiny_base(), tmp_path_factory.mktemp("loras")
    random_adapter(base, 1, rank=2).save(str(folder / "style.safetensors"))
    random_adapter(base, 2, rank=3, text=True).save(str(folder / "subject.safetensors"))
    return folder


def test_the_command_prints_a_table_of_80_columns_json_and_a_map(files, tmp_path, capsys):
    names = [str(files / f"{name}.safetensors") for name in ("style", "subject")]
    assert main(["diagnose", *names, "--map", str(tmp_path / "map.png")]) == 0
    table = capsys.readouterr().out
    assert all(len(line) <= 80 for line in table.splitlines() if not line.startswith(("- ", "layers")))
    assert main(["diagnose", f"{names[0]}:0.5", names[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for key in ("energy", "cosine", "input_overlap", "output_overlap", "at_risk", "combined_energy", "layers"):
        assert key in found
    assert len(found["layers"]) == 32
    assert len(found["subject_only"]) == 8
    whole = json.loads(_json(names, capsys))
    assert found["energy"]["style"] == pytest.approx(whole["energy"]["style"] / 4)
    assert found["cosine"] == pytest.approx(whole["cosine"])
    from PIL import Image

    with Image.open(tmp_path / "map.png") as picture:
        assert picture.width > 800


def _json(names, capsys) -> str:
    assert main(["diagnose", *names, "--json"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--map", "x.txt"], "is no .png file"),
        (["--jsn"], "did you mean --json"),
    ],
)
def test_a_wrong_command_is_one_line(files, capsys, more, says):
    names = [str(files / f"{name}.safetensors") for name in ("style", "subject")]
    assert main(["diagnose", *names, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error


def test_zip_by_command_learns_a_file_and_says_what_is_missing(tmp_path, capsys):
    from sdlora.bases.family import load_base

    base = load_base("mini")
    for seed, name in ((1, "style"), (2, "subject")):
        random_adapter(base, seed, rank=2, size=0.02).save(str(tmp_path / f"{name}.safetensors"))
    names = [str(tmp_path / f"{name}.safetensors") for name in ("style", "subject")]
    out = tmp_path / "both.safetensors"
    command = ["combine", *names, "--out", str(out), "--method", "zip"]
    assert main(command) == 2
    assert "--base mini" in capsys.readouterr().err
    assert main([*command[:5], "--base", "mini", "--out", str(out)]) == 2
    assert "is for --method zip" in capsys.readouterr().err
    assert main(["combine", names[0], "--method", "zip", "--base", "mini", "--out", str(out)]) == 2
    assert "for two LoRAs" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--base", "mini", "--zip-steps", "1", "--style-prompt", "ink"]) == 0
    assert "step 1/1" in capsys.readouterr().err
    from sdlora.adapter.file import read_adapter

    assert {delta.rank for delta in read_adapter(out).deltas.values()} == {4}
