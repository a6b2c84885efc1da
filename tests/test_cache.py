"""The cache on disk: what it keeps, what it is found by, and that no fault of disk or process gives a wrong result."""

from __future__ import annotations

import os
import random
import time

import cache_stress as stress
import pytest
import torch
from filelock import FileLock
from PIL import Image

from weaver import WeaverError
from weaver.cache import Cache, CacheWarning, store
from weaver.features import collect_features
from weaver.inversion import invert
from weaver.layers import PAPER, InjectionSites

STEPS = 5
SITES = InjectionSites("some", resnets=(4,), attentions=(4, 7), resnet_window=0.6, attention_window=0.4)


@pytest.fixture
def picture():
    return Image.effect_noise((32, 32), 80).convert("RGB")


def counted(pipe, monkeypatch) -> list:
    """Notes every forward of the U-Net."""
    calls, forward = [], type(pipe.unet).forward
    monkeypatch.setattr(type(pipe.unet), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    return calls


@pytest.mark.parametrize("with_features", [False, True], ids=["latents", "features"])
@pytest.mark.parametrize("name", ["tiny_pipe", "tiny_pipe_v"])
def test_a_warm_run_gives_the_same_numbers_and_skips_the_work(
    name, with_features, request, tmp_path, picture, monkeypatch
):
    pipe = request.getfixturevalue(name)
    cache = Cache(tmp_path / "cache", features=with_features)
    plain = invert(pipe, picture, "a dog", STEPS)
    expected = collect_features(pipe, plain, SITES)
    cold = invert(pipe, picture, "a dog", STEPS, cache=cache)
    assert not cold.cached and not collect_features(pipe, cold, SITES, cache=cache).cached
    calls = counted(pipe, monkeypatch)
    warm = invert(pipe, picture, "a dog", STEPS, cache=cache)
    features = collect_features(pipe, warm, SITES, cache=cache)
    assert len(calls) == (0 if with_features else 3)  # the injected steps
    assert warm.cached and features.cached == with_features
    for name in ("latents", "timesteps", "text"):
        assert torch.equal(getattr(warm, name), getattr(plain, name))
    assert torch.equal(features.reconstruction, expected.reconstruction)
    assert torch.equal(features.timesteps, expected.timesteps) and torch.equal(features.z_T, expected.z_T)
    for step, kept in zip(features.tensors, expected.tensors, strict=True):
        assert step.keys() == kept.keys() and all(torch.equal(step[path], kept[path]) for path in kept)


def test_tensors_come_back_as_they_lay(tmp_path):
    kept = {"first": torch.rand(2, 3, 4, 5), "last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    kept |= {"bfloat16": torch.rand(3, 2).bfloat16().T, "whole": torch.arange(3)}
    Cache(tmp_path).put({"kind": "x"}, kept)
    found = Cache(tmp_path).get({"kind": "x"})
    assert found.keys() == kept.keys() and all(torch.equal(found[name], x) for name, x in kept.items())
    assert all(found[name].stride() == kept[name].stride() for name in ("first", "last", "whole"))
    assert all(x.data_ptr() % 16 == 0 for x in found.values())


def test_progress_reaches_its_end_from_the_cache(tiny_pipe, tmp_path, picture):
    cache, told = Cache(tmp_path, features=True), []
    for _ in range(2):
        told.clear()
        inversion = invert(tiny_pipe, picture, "a dog", 2, cache=cache, progress=lambda *at: told.append(at))
        collect_features(tiny_pipe, inversion, SITES, cache=cache, progress=lambda *at: told.append(at))
    assert told == [(2, 2), (2, 2)]


def test_features_of_other_sites_are_others(tiny_pipe, tmp_path, picture):
    cache = Cache(tmp_path, features=True)
    inversion = invert(tiny_pipe, picture, "a dog", STEPS, cache=cache)
    collect_features(tiny_pipe, inversion, SITES, cache=cache)
    assert not collect_features(tiny_pipe, inversion, PAPER, cache=cache).cached
    assert collect_features(tiny_pipe, inversion, PAPER, cache=cache).cached


def test_features_without_a_reconstruction_do_not_stand_for_those_with_one(tiny_pipe, tmp_path, picture):
    cache = Cache(tmp_path, features=True)
    inversion = invert(tiny_pipe, picture, "a dog", STEPS, cache=cache)
    assert collect_features(tiny_pipe, inversion, SITES, cache=cache, reconstruct=False).reconstruction is None
    assert collect_features(tiny_pipe, inversion, SITES, cache=cache, reconstruct=False).cached
    whole = collect_features(tiny_pipe, inversion, SITES, cache=cache)
    assert not whole.cached and whole.reconstruction is not None


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    room = 3 * 300_000
    cache = Cache(tmp_path, limit=room)
    for number in range(3):
        assert cache.put(stress.identity_of(number), stress.tensors_of(number, 1 << 16))
        for place in tmp_path.glob("*/entry.json"):
            os.utime(place, (time.time() - 100 + number, place.stat().st_mtime - 10))
    assert [entry.identity["number"] for entry in cache.entries()] == [2, 1, 0]
    assert cache.get(stress.identity_of(0)) is not None
    assert [entry.identity["number"] for entry in cache.entries()] == [0, 2, 1]
    assert cache.put(stress.identity_of(3), stress.tensors_of(3, 1 << 16))
    there = [cache.get(stress.identity_of(number)) is not None for number in range(4)]
    assert there == [True, False, True, True]
    assert sum(entry.nbytes for entry in cache.entries()) <= room
    with pytest.warns(CacheWarning, match="limit of 900.0 kB"):
        assert not cache.put(stress.identity_of(9), stress.tensors_of(9, 1 << 18))
    assert len(cache.entries()) == 3


def test_an_entry_that_lost_a_file_is_made_again(tmp_path):
    cache = Cache(tmp_path)
    for lost in ("tensors.safetensors", "entry.json"):
        cache.put(stress.identity_of(1), stress.tensors_of(1, 64))
        next(tmp_path.glob(f"*/{lost}")).unlink()
        assert cache.get(stress.identity_of(1)) is None
        assert cache.put(stress.identity_of(1), stress.tensors_of(1, 64))
        assert stress.check_whole(cache, 2, 64) == 1


@pytest.mark.parametrize("lost", ["tensors.safetensors", "entry.json"])
def test_half_an_entry_is_listed_and_thrown_away_first(tmp_path, lost):
    cache = Cache(tmp_path)
    for number in (1, 2):
        cache.put(stress.identity_of(number), stress.tensors_of(number, 64))
    half = next(tmp_path.glob(f"{cache.entries()[0].key}/{lost}"))
    half.unlink()
    size = sum(file.stat().st_size for file in half.parent.iterdir())
    assert [(entry.key, entry.nbytes) for entry in cache.entries() if entry.damaged] == [(half.parent.name, size)]
    assert [entry.key for entry in cache.prune()] == [half.parent.name]  # though there is room for all
    assert not half.parent.exists() and len(cache.entries()) == 1
    next(tmp_path.glob(f"*/{lost}")).unlink()
    assert len(cache.clear()) == 1 and os.listdir(tmp_path) == [".lock"]


def test_half_an_entry_counts_when_another_is_kept(tmp_path):
    cache = Cache(tmp_path, limit=300_000)
    cache.put(stress.identity_of(1), stress.tensors_of(1, 1 << 15))
    next(tmp_path.glob("*/entry.json")).unlink()
    cache.put(stress.identity_of(2), stress.tensors_of(2, 1 << 15))
    assert [entry.damaged for entry in cache.entries()] == [False]


def test_what_another_process_writes_is_not_thrown_away(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    cache.put(stress.identity_of(1), stress.tensors_of(1, 64))
    writing = tmp_path / ".partial-of-another" / "tensors.safetensors"
    writing.parent.mkdir()
    writing.write_bytes(b"half")
    monkeypatch.setattr(store, "_WAIT", 0.05)
    with FileLock(tmp_path / ".lock"):
        for throw_away in (cache.prune, cache.clear):
            with pytest.raises(WeaverError, match="can't be changed"):
                throw_away()
        assert writing.exists() and len(cache.entries()) == 1


def test_a_folder_that_only_looks_like_an_entry_is_none(tmp_path):
    Cache(tmp_path).put(stress.identity_of(1), stress.tensors_of(1, 64))
    other = tmp_path / ("0" * 64)
    other.mkdir()
    (other / "layer.tar").write_bytes(b"a container's")
    assert len(Cache(tmp_path).clear()) == 1 and (other / "layer.tar").exists()


def test_killed_writers_leave_whole_entries(tmp_path):
    midway, _ = stress.kills(tmp_path, 12, random.Random(0))
    assert midway >= 3


def test_two_writers_and_a_reader(tmp_path):
    assert stress.two_writers(tmp_path, 1.0) >= 1


def test_a_full_disk(tmp_path):
    stress.full_disk(tmp_path)


def test_flipped_bits(tmp_path):
    assert stress.flipped_bits(tmp_path, 30, random.Random(0)) >= 20


def test_a_folder_that_cannot_be_written_costs_no_result(tiny_pipe, tmp_path, picture):
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning, match="nothing is kept in the cache .* \\(Not a directory\\)"):
        inversion = invert(tiny_pipe, picture, "a dog", 1, cache=Cache(tmp_path / "file" / "cache"))
    assert torch.equal(inversion.latents, invert(tiny_pipe, picture, "a dog", 1).latents)


@pytest.mark.parametrize("limit", [-1, None, "2GB", float("nan")], ids=repr)
def test_a_limit_that_is_no_number_of_bytes_is_refused(tmp_path, limit):
    told = f"limit is {limit!r}, expected a number of bytes, 0 or more, such as"
    with pytest.raises(WeaverError, match=told):
        Cache(tmp_path, limit=limit)
    if limit is not None:  # the cache's own
        with pytest.raises(WeaverError, match=told):
            Cache(tmp_path).prune(limit)
