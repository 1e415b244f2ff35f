"""The `parameters` text, read back by our parser and by rules written out after A1111's."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.errors import ConfigError
from sdlora.generating.infotext import Tag, format_infotext, parse_infotext, parse_prompt

SETTINGS = {
    "Steps": 20,
    "Sampler": "DPM++ 2M",
    "CFG scale": "5",
    "Seed": 7,
    "Size": "128x64",
    "Model hash": "0123456789",
    "Model": "mini",
    "Lora hashes": "ink: 0123abcdef, cat: 4567abcdef",
    "Version": "sdlora 0.1.0",
}


def read_as_a1111(text: str) -> dict[str, str]:
    """What the web UI's paste button does: the last line is settings where three match, the rest is prompts."""
    *lines, last = text.strip().split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    if len(found) < 3:
        lines.append(last)
        found = []
    prompt, negative, in_negative = "", "", False
    for line in (x.strip() for x in lines):
        if line.startswith("Negative prompt:"):
            in_negative, line = True, line[16:].strip()
        if in_negative:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    result = {"Prompt": prompt, "Negative prompt": negative}
    for key, value in found:
        value = json.loads(value) if value[:1] == '"' and value[-1:] == '"' else value
        size = re.match(r"^(\d+)x(\d+)$", value)
        if size:
            result[f"{key}-1"], result[f"{key}-2"] = size.groups()
        else:
            result[key] = value
    return result


def test_a1111_rules_read_every_field():
    prompt = "a cat, ink <lora:ink:0.8>\nsecond line: 3, yes"
    got = read_as_a1111(format_infotext(prompt, "blur, (bad:1.2)", SETTINGS))
    assert got["Prompt"] == prompt
    assert got["Negative prompt"] == "blur, (bad:1.2)"
    assert (got["Size-1"], got["Size-2"]) == ("128", "64")
    for key, value in SETTINGS.items():
        if key != "Size":
            assert got[key] == str(value)


def test_settings_line_is_written_as_other_tools_write_it():
    assert format_infotext("a cat", "", SETTINGS).split("\n") == [
        "a cat",
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 5, Seed: 7, Size: 128x64, Model hash: 0123456789, Model: mini, "
        'Lora hashes: "ink: 0123abcdef, cat: 4567abcdef", Version: sdlora 0.1.0',
    ]


_LINE = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=40).map(str.strip)
_PLAIN = _LINE.filter(lambda s: not s.startswith("Negative prompt:"))
_VALUE = _LINE.filter(lambda s: s == "" or (s[0] != '"' and s[-1] != '"'))


@settings(max_examples=200, deadline=None)
@given(_PLAIN, _PLAIN, _VALUE)
def test_round_trip_keeps_prompt_negative_and_settings(prompt, negative, value):
    text = format_infotext(prompt, negative, SETTINGS | {"Model": value})
    got = parse_infotext(text)
    assert got == (prompt, negative, {k: str(v) for k, v in (SETTINGS | {"Model": value}).items()})
    assert read_as_a1111(text)["Model"] == value


def test_tags_are_taken_out_of_the_prompt():
    plain, tags = parse_prompt("a cat <lora:ink:0.8> in <lora:big hat> the <lora:c:0.5:-1e1>rain")
    assert plain == "a cat in the rain"
    assert tags == [Tag("ink", 0.8, 0.8), Tag("big hat", 1.0, 1.0), Tag("c", weight=-10.0, te_weight=0.5)]
    assert [str(t) for t in tags] == ["<lora:ink:0.8>", "<lora:big hat:1>", "<lora:c:0.5:-10>"]


def test_prompt_without_tags_stays_as_it_is():
    assert parse_prompt("a  cat,\n <b> ") == ("a  cat,\n <b> ", [])


@pytest.mark.parametrize("tag", ["<lora:>", "<lora::1>", "<lora:a:x>", "<lora:a:nan>", "<lora:a:1:2:3>", "<lora:a:>"])
def test_garbled_tag_is_one_line(tag):
    with pytest.raises(ConfigError, match="not a LoRA tag; write <lora:name:weight>"):
        parse_prompt(f"a {tag} cat")
