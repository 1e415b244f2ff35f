"""Who a process is, as its environment says, and the launchers' files that ship."""

import contextlib
from pathlib import Path

import pytest
import yaml

from sdlora.errors import RunError
from sdlora.training.processes import Processes, count_processes, is_main, joined, quiet_unless_main

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "accelerate").glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_alone_is_the_main_one_and_needs_no_other(capsys):
    assert (count_processes(), is_main()) == (1, True)
    with joined() as processes:
        assert (processes.count, processes.index, processes.main) == (1, 0, True)
        assert processes.from_main(lambda: "x") == processes.hand_out(lambda: "x") == "x"
        print("heard")
    assert capsys.readouterr().out == "heard\n"


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")])
def test_another_process_prints_nothing(monkeypatch, capsys, names):
    monkeypatch.setenv(names[0], "1")
    monkeypatch.setenv(names[1], "2")
    assert (count_processes(), is_main()) == (2, False)
    with quiet_unless_main():
        print("unheard")
    assert capsys.readouterr().out == ""


def test_the_parts_of_a_step_are_shared_out_once_each():
    parts = [Processes(3, index).part(micro) for index in range(3) for micro in range(2)]
    assert sorted(parts) == list(range(6))
    assert [Processes(3, index).part(0) for index in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(("variable", "name"), [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP")])
def test_ways_of_launching_that_are_not_supported_are_refused(monkeypatch, variable, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(RunError, match=f"{name} is not supported"), contextlib.ExitStack() as stack:
        stack.enter_context(joined())


def test_a_launcher_that_starts_processes_which_cannot_meet_is_refused(monkeypatch):
    class Apart:
        num_processes, process_index, local_process_index, device = 1, 0, 0, "mps"

        def __init__(self, **options):
            pass

    monkeypatch.setattr("accelerate.PartialState", Apart)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="2 processes were launched that cannot meet on mps"):
        Processes.join("cpu")


@pytest.mark.parametrize("path", CONFIGS, ids=[p.name for p in CONFIGS])
def test_launch_files_are_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    values = yaml.safe_load(path.read_text())
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == values["num_processes"] >= 2
    assert config.mixed_precision == "no"  # the recipe's precision decides
    assert path.read_text().startswith("# ")


def test_the_launch_files_are_those_that_the_docs_name():
    assert [p.name for p in CONFIGS] == ["two-cpus.yaml", "two-gpus.yaml", "two-machines.yaml"]
    docs = (Path(__file__).parents[2] / "docs" / "processes.md").read_text()
    for path in CONFIGS:
        assert f"configs/accelerate/{path.name}" in docs
