"""A build's state comes back whole, optimizers' too, and no file of ours can run code."""

import ast
from pathlib import Path

import pytest
import torch

import sdlora
from sdlora.bases.mini.build.state import load_state, save_state

SOURCES = sorted(Path(sdlora.__file__).parent.rglob("*.py"))
PICKLES = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
RUNS_CODE = {"torch.load", "torch.save", "torch.hub.load", "eval", "exec"}


def test_a_state_comes_back_with_its_optimizer(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "name": "x", "none": None}
    save_state(tmp_path / "a.safetensors", state)
    found = load_state(tmp_path / "a.safetensors")
    assert (found["step"], found["name"], found["none"]) == (7, "x", None)
    other = torch.nn.Linear(3, 2)
    second = torch.optim.AdamW(other.parameters())
    other.load_state_dict(found["model"])
    second.load_state_dict(found["optimizer"])
    for net, steps in ((model, optimizer), (other, second)):
        steps.zero_grad()
        net(torch.ones(1, 3)).sum().backward()
        steps.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert load_state(tmp_path / "none.safetensors") == {}


def test_tensors_that_share_their_numbers_are_kept_apart(tmp_path):
    whole = torch.arange(6.0)
    save_state(tmp_path / "a.safetensors", {"a": whole[:3], "b": [whole, whole.view(2, 3).T]})
    found = load_state(tmp_path / "a.safetensors")
    assert found["a"].tolist() == [0, 1, 2]
    assert found["b"][1].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(SOURCES[0].parents[0])) for p in SOURCES])
def test_nothing_is_read_that_can_run_code(path):
    """No pickles: neither the module nor what reads them for others."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not {n.partition(".")[0] for n in names} & PICKLES, path
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in RUNS_CODE, f"{path}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert ast.unparse(node.value) == "False", f"{path}:{node.value.lineno}"
