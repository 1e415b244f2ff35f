"""Files that are wrong in one way each are refused in a line, or read; none crashes, hangs or does nothing."""

import pytest

from sdlora.adapter.file import read_adapter
from sdlora.cli import main
from tests.malformed_files import broken_rules, damaged, find_fault, sound_files

RULES = list(broken_rules())


def test_the_corpus_is_large_and_its_files_differ():
    assert len({content for _, content in RULES}) >= 270
    assert len({name for name, _ in RULES}) == len(RULES)


@pytest.mark.parametrize(("name", "content"), sound_files().items(), ids=list(sound_files()))
def test_what_the_corpus_is_made_of_is_sound(tmp_path, name, content):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    assert len(read_adapter(file).deltas) == (2 if name == "two modules" else 1)


def test_every_broken_rule_is_refused_in_a_line(tmp_path):
    file, faults = tmp_path / "a.safetensors", []
    for name, content in RULES:
        file.write_bytes(content)
        fault, read = find_fault(file)
        if fault or read:
            faults.append(f"{name}: {fault or 'read'}")
    assert not faults


def test_verbs_say_it_and_write_nothing(tmp_path, capsys):
    file, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for name, content in RULES[::23]:
        file.write_bytes(content)
        for command in (["inspect", str(file)], ["convert", str(file), "--to", "kohya", "--out", str(out)]):
            assert main(command) == 2, name
            said = capsys.readouterr()
            assert said.err.startswith("error: "), name
            assert said.err.count("\n") == 1, name
            assert said.out == "", name
        assert not out.exists()


def test_random_damage_is_refused_or_read(tmp_path):
    file, faults, read = tmp_path / "a.safetensors", [], 0
    for name, content in damaged(seed=0, count=2000):
        file.write_bytes(content)
        fault, sound = find_fault(file)
        read += sound
        if fault:
            faults.append(f"{name}: {fault}")
    assert not faults
    assert 20 < read < 1000  # some damage is in a name of the metadata, or in a number
