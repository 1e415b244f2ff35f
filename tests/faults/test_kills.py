"""Runs that are killed with SIGKILL end, started again, in the bytes of a run that nothing happened to."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from kills import Killer, make_context


@pytest.fixture(scope="module")
def context():
    return make_context()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), [("plain", 40), ("rich", 20)])
def test_killed_at_random_moments_ends_in_the_same_bytes(context, tmp_path, name, kills, tell):
    found = Killer(tmp_path, name, context).kill_at_random(kills)
    tell(found)
    assert found.kills == kills
    assert found.in_save >= kills // 8
    assert (found.lost, found.different) == (0, 0)
    assert found.runs >= 1


@pytest.mark.slow
def test_killed_at_every_call_of_a_save_and_of_a_runs_end_ends_in_the_same_bytes(context, tmp_path, tell):
    found, kinds = Killer(tmp_path, "short", context).kill_at_every_call("checkpoints/step-000003")
    tell(found)
    assert {"create", "write", "sync", "sync folder", "rename", "mkdir", "unlink", "rmdir"} <= set(kinds)
    assert found.kills == found.runs > len(kinds) > 30
    assert (found.lost, found.different) == (0, 0)
