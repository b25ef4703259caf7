"""YAML from outside: plain data, or one line that says what it may not be."""

import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vitopt.yaml_input import MAX_BYTES, InputError, parse, read_text

# Each line repeats the one before nine times: 9 ** 9 values in 300 characters.
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "aliases"),
        ("a: &a [*a]", "alias *a"),
        ("a: &a {b: *a}", "alias *a"),
        ("[" * 100_000, "nested"),
        ("{a: " * 3_000, "nested"),
        ("- " * 3_000, "nested"),
        ("a: " + "9" * 5_000, "number"),
        ("a: " + "1:" * 5_000 + "1", "number"),
        ("a: 0x" + "f" * 5_000, "number"),
        ("a: 1\nb: {c: 1, c: 2}", "'c' appears twice in line 2"),
        ("a: 1\n'a': 2", "'a' appears twice"),
        ("? [1]\n: 2", "key"),
        ("a: !!python/object/apply:os.system [ls]", "os.system"),
        ("a: !strange 1", "!strange"),
        ("a: \0", "unacceptable character"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: " + "x" * MAX_BYTES, "longer"),
        ("a: [" + "x," * 30_000 + "]", "20,000 values"),
    ],
)
def test_what_no_recipe_needs_is_refused_at_once(text, words):
    begin = time.perf_counter()
    with pytest.raises(InputError) as caught:
        parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - begin < 2


def test_aliases_and_merged_keys_may_repeat_a_little():
    text = "quick: &quick {iterations: 5, rounds: 1}\nslow:\n  <<: *quick\n  iterations: 9\nagain: *quick"
    assert parse(text) == yaml.safe_load(text)
    assert parse(text)["slow"] == {"iterations": 9, "rounds": 1}


def test_dates_are_words():
    assert parse("name: 2026-02-30") == {"name": "2026-02-30"}


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(derandomize=True, deadline=None)
@given(_VALUES)
def test_plain_data_comes_back_as_it_was_written(value):
    assert parse(yaml.safe_dump(value, allow_unicode=True)) == value


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(alphabet="ab:-[]{}&*!<>|#'\"?%@, \n\t0159.xe_~\0", max_size=60))
def test_any_text_is_what_yaml_says_or_refused(text):
    try:
        found = parse(text)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert found == yaml.safe_load(text)


def test_pipes_and_long_files_are_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name, words in [("pipe", "pipe"), ("long", "longer"), ("bytes", "utf-8"), ("\0", "null"), ("x" * 300, "name")]:
        with pytest.raises(InputError) as caught:
            read_text(tmp_path / name)
        assert words in str(caught.value)
