"""`weaver cache`, and what it takes for a cache."""

from __future__ import annotations

import os

import cache_stress as stress
import pytest

from weaver.cache import Cache
from weaver.cli import main


def test_the_command_lists_prunes_and_clears(tmp_path, capsys):
    cache = Cache(tmp_path)
    for number in range(3):
        cache.put(stress.identity_of(number) | {"prompt": f"prompt {number}"}, stress.tensors_of(number, 1 << 16))
    assert main(["cache", "list", "--folder", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "3 entries (811.9 kB)" in told and "'prompt 1'" in told
    assert main(["cache", "prune", "--to", "600 kB", "--folder", str(tmp_path)]) == 0
    assert "1 entry (270.6 kB)" in capsys.readouterr().out
    assert main(["cache", "clear", "--folder", str(tmp_path)]) == 0
    assert cache.entries() == [] and "2 entries" in capsys.readouterr().out
    file = tmp_path / "file"
    file.write_text("")
    assert main(["cache", "list", "--folder", str(file)]) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["list", "prune", "clear"])
def test_a_folder_that_is_no_cache_is_refused(tmp_path, capsys, action):
    for name in ("notes.txt", "passwd"):
        (tmp_path / name).write_text("")
    assert main(["cache", action, "--folder", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path} is no cache: it holds 'notes.txt' and no entry; name a cache's folder" in told
    assert told.count("\n") == 1 and sorted(os.listdir(tmp_path)) == ["notes.txt", "passwd"]


@pytest.mark.parametrize("action", ["list", "prune", "clear"])
@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_an_empty_folder_is_an_empty_cache(tmp_path, capsys, there, action):
    folder = tmp_path / "cache"
    if there:
        folder.mkdir()
    assert main(["cache", action, "--folder", str(folder)]) == 0
    assert "0 entries" in capsys.readouterr().out
    assert folder.exists() == there and not list(folder.glob("*"))


def test_a_cache_stays_one_beside_other_files(tmp_path, capsys):
    """As ".DS_Store" or "lost+found" come to be there."""
    cache = Cache(tmp_path)
    cache.put(stress.identity_of(1), stress.tensors_of(1, 64))
    (tmp_path / "lost+found").mkdir()
    for action, count in (("list", "1 entry"), ("clear", "1 entry"), ("prune", "0 entries"), ("list", "0 entries")):
        assert main(["cache", action, "--folder", str(tmp_path)]) == 0
        assert count in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == [".lock", "lost+found"]


@pytest.mark.parametrize(
    "card",
    [
        "5",
        '{"identity": 5}',
        '{"identity": {"inversion": 3}}',
        '{"identity": {"kind": null}}',
        '{"identity": {"picture": null}}',
        '{"identity": {"kind": "inversion", "number": 3, "prompt": "yes"}}',
        '{"identity"',
    ],
)
def test_a_damaged_card_is_listed_as_such(tmp_path, capsys, card):
    cache = Cache(tmp_path)
    for number in (1, 2):
        cache.put(stress.identity_of(number) | {"prompt": f"prompt {number}"}, stress.tensors_of(number, 64))
    key = cache.entries()[0].key
    kept = next(entry for entry in cache.entries() if entry.key != key)
    (tmp_path / key / "entry.json").write_text(card)
    assert main(["cache", "list", "--folder", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"{key[:12]}  damaged " in told and "2 entries" in told
    assert f"{kept.key[:12]}  inversion " in told and repr(kept.identity["prompt"]) in told
    assert [entry.key for entry in cache.prune()] == [key]


def test_identities_of_any_shape_are_listed(tmp_path, capsys):
    for identity in ({"kind": None, "picture": None}, {"inversion": 3}, {"kind": "x", "picture": {"rgb": 5}}):
        Cache(tmp_path).put(identity, stress.tensors_of(1, 64))
    assert main(["cache", "list", "--folder", str(tmp_path)]) == 0
    assert "3 entries" in capsys.readouterr().out
