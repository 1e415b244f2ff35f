"""Who a process is, as its environment says, and the launchers' files that ship."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sdlora.errors import RunError
from sdlora.training.processes import Processes, count_processes, is_main, joined, quiet_unless_main
from sdlora.training.splitting import Split

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


@pytest.mark.parametrize(("variable", "name"), [("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")])
def test_ways_of_launching_that_are_not_supported_are_refused(monkeypatch, variable, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(RunError, match=f"{name} is not supported"), contextlib.ExitStack() as stack:
        stack.enter_context(joined())


def test_a_base_is_not_split_in_one_process_and_not_by_fsdps_first_version(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match="fsdp_version = 1 splits what is trained too"):
        Processes.join("cpu")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(RunError, match="FSDP splits the base between processes and there is one"):
        Processes.join("cpu")
    for said, split in (("true", Split()), ("FULL_SHARD", Split()), ("SHARD_GRAD_OP", Split(reshard=False))):
        monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", said)
        assert Split.read(2) == split
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert Split.read(2) == Split(offload=True, reshard=False)
    with Split().hidden():
        assert Split.read(2) is None
    assert Split.read(2) is not None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert Split.read(2) is None


@pytest.mark.parametrize(("count", "last"), [("1", "handlers run\n"), ("2", "")])
def test_one_of_several_processes_ends_before_the_interpreter_does(count, last):
    code = (
        "import atexit, sys; from sdlora.training.processes import end; atexit.register(print, 'handlers run');"
        "print('said'); print('heard', file=sys.stderr); end(130)"
    )
    environment = {**os.environ, "WORLD_SIZE": count}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, f"said\n{last}", "heard\n")


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
    assert [p.name for p in CONFIGS] == ["two-cpus.yaml", "two-gpus-fsdp.yaml", "two-gpus.yaml", "two-machines.yaml"]
    docs = (Path(__file__).parents[2] / "docs" / "processes.md").read_text()
    for path in CONFIGS:
        assert f"configs/accelerate/{path.name}" in docs
