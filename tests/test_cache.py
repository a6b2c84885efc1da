"""The cache on disk: what it keeps, what it is found by, and that no fault of disk or process gives a wrong result."""

from __future__ import annotations

import os
import random
import time

import cache_stress as stress
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from filelock import FileLock
from PIL import Image

from weaver import WeaverError
from weaver.cache import Cache, CacheWarning, inversion_identity, store, uncacheable_reasons
from weaver.cli import main
from weaver.features import collect_features
from weaver.inversion import invert
from weaver.latents import encode_image
from weaver.layers import PAPER, InjectionSites
from weaver.sizes import format_bytes, parse_bytes

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


def test_what_decides_an_inversion_is_in_its_identity(tiny_pipe, picture):
    def identity(image=picture, prompt="a dog", steps=3):
        return inversion_identity(tiny_pipe, image, prompt, steps)

    first = identity()
    assert first == identity(picture.copy())
    dotted = picture.copy()
    dotted.putpixel((3, 3), (1, 2, 3))
    others = [identity(dotted), identity(prompt="a cat"), identity(steps=4), identity(torch.zeros(1, 4, 16, 16))]
    others.append(identity(torch.zeros(1, 4, 16, 16).double()))
    weight = tiny_pipe.unet.conv_in.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1e-12  # less than float16 knows
    others.append(identity())
    with torch.no_grad():
        weight.copy_(before)
    scheduler = tiny_pipe.scheduler
    tiny_pipe.scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    others.append(identity())
    tiny_pipe.scheduler = scheduler
    processors = dict(tiny_pipe.unet.attn_processors)
    tiny_pipe.unet.set_attn_processor(AttnProcessor())
    others.append(identity())
    tiny_pipe.unet.set_attn_processor(processors)
    assert identity() == first
    found = [first, *others]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


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


def test_a_model_that_is_changed_beside_its_weights_is_not_cached(tiny_pipe, tmp_path, picture):
    unet = tiny_pipe.unet
    assert uncacheable_reasons(tiny_pipe) == []
    hook = unet.conv_in.register_forward_hook(lambda *a: None)
    assert uncacheable_reasons(tiny_pipe) == ["unet.conv_in has forward hooks"]
    inversion = invert(tiny_pipe, picture, "a dog", 1, cache=Cache(tmp_path / "cache"))
    hook.remove()
    assert inversion.identity is None and not (tmp_path / "cache").exists()
    tiny_pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert "FreeU" in uncacheable_reasons(tiny_pipe)[0]
    tiny_pipe.disable_freeu()
    assert uncacheable_reasons(tiny_pipe) == []


@pytest.mark.parametrize("path", ["vae", "vae.encoder.conv_in", "text_encoder", "text_encoder.final_layer_norm"])
@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
def test_hooks_in_any_part_are_not_cached(tiny_pipe, picture, path, kind):
    part, _, rest = path.partition(".")
    module = getattr(tiny_pipe, part).get_submodule(rest)
    register = module.register_forward_hook if kind == "hook" else module.register_forward_pre_hook
    hook = register(lambda *a: None)
    try:
        assert uncacheable_reasons(tiny_pipe) == [f"{path} has forward hooks"]
        assert inversion_identity(tiny_pipe, picture, "a dog", 1) is None
    finally:
        hook.remove()
    assert uncacheable_reasons(tiny_pipe) == []


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_adapters_in_any_part_are_not_cached(tiny_sdxl, part, monkeypatch):
    monkeypatch.setattr(getattr(tiny_sdxl, part), "_hf_peft_config_loaded", True, raising=False)
    assert uncacheable_reasons(tiny_sdxl) == [f"{part} has adapters loaded: fuse them, or unload them"]


def test_attention_processors_of_the_autoencoder_count(tiny_pipe, picture):
    class Own(AttnProcessor):
        pass

    vae, first = tiny_pipe.vae, inversion_identity(tiny_pipe, picture, "a dog", 1)
    before = dict(vae.attn_processors)
    try:
        vae.set_attn_processor(AttnProcessor())
        assert inversion_identity(tiny_pipe, picture, "a dog", 1) != first
        vae.set_attn_processor(Own())
        assert uncacheable_reasons(tiny_pipe) == ["vae has attention processors of its own (Own)"]
    finally:
        vae.set_attn_processor(before)


def test_offload_and_notes_of_hidden_states_are_no_reason(tiny_pipe, tiny_sdxl, monkeypatch):
    for part in (tiny_pipe.unet, tiny_pipe.vae, tiny_pipe.text_encoder):
        monkeypatch.setattr(part, "_hf_hook", object(), raising=False)  # accelerate's, which wraps `forward`
    assert uncacheable_reasons(tiny_pipe) == []
    encoder = tiny_sdxl.text_encoder
    encoder(torch.zeros(1, 4, dtype=torch.long), output_hidden_states=True)
    assert any(module._forward_hooks for module in encoder.modules())  # transformers leaves them there
    assert uncacheable_reasons(tiny_sdxl) == []


def test_tiles_of_the_autoencoder_are_in_the_identity(tiny_pipe):
    picture, vae = Image.effect_noise((64, 48), 80).convert("RGB"), tiny_pipe.vae
    plain, size = inversion_identity(tiny_pipe, picture, "a dog", 1), vae.tile_sample_min_size
    latents = encode_image(vae, picture)
    vae.enable_slicing()  # one picture is one slice
    try:
        assert torch.equal(encode_image(vae, picture), latents)
        assert inversion_identity(tiny_pipe, picture, "a dog", 1) == plain
        vae.enable_tiling()
        assert not torch.equal(encode_image(vae, picture), latents)
        tiled = inversion_identity(tiny_pipe, picture, "a dog", 1)
        vae.tile_sample_min_size = 2 * size
        larger = inversion_identity(tiny_pipe, picture, "a dog", 1)
    finally:
        vae.tile_sample_min_size = size
        vae.disable_tiling()
        vae.disable_slicing()
    assert plain != tiled != larger != plain
    assert inversion_identity(tiny_pipe, picture, "a dog", 1) == plain


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


@pytest.mark.parametrize(
    ("text", "count"), [("12GB", 12 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 500 * 10**6), ("4096", 4096)]
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "12XB", "1e9", "1.GB"])
def test_amounts_that_are_none(text):
    with pytest.raises(WeaverError, match="500MB"):
        parse_bytes(text)


def test_amounts_as_people_read_them():
    assert [format_bytes(n) for n in (0, 999, 3_800_000, 8 * 2**30)] == ["0 B", "999 B", "3.8 MB", "8.6 GB"]
