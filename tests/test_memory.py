"""What a run takes: estimated without numbers, beside PyTorch's record of the allocations of the same run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from jobs import TRAINED, job_of
from PIL import Image
from safetensors.torch import save_file

from benchmarks.memory import estimated, make_job, measured
from benchmarks.model_shapes import write_model
from benchmarks.timing import host_peak
from weaver.cache import Cache
from weaver.embedded import load_pipeline
from weaver.errors import WeaverError
from weaver.features import collect_features, reconstruction_psnr
from weaver.fusion import ConceptUse, FusionPlan, sample_fusion, stack_plans
from weaver.inversion import invert
from weaver.job.parse import job_from_mapping
from weaver.latents import decode_latents, encode_image
from weaver.layers import InjectionSites
from weaver.masks.attention import attention_maps
from weaver.memory import estimate, feature_home
from weaver.memory.captures import GRAPHS, GraphsOnPaper
from weaver.memory.estimate import estimate_job, fit_job, most_variants
from weaver.memory.ledger import WEIGHTS, Ledger
from weaver.memory.plans import MemoryPlan, plans_for
from weaver.memory.resting import home_of, lent, modules_of, resting
from weaver.memory.shapes import load_shapes
from weaver.memory.table import table
from weaver.models import ModelError, is_embedded
from weaver.pipeline import weave
from weaver.run import run_job
from weaver.schedule import ddim_scheduler

SITES = InjectionSites("test", resnets=(1, 4), attentions=(4,), resnet_window=0.5, attention_window=0.5)
STEPS = 4


def near(estimate: int, measured: int) -> bool:
    return abs(estimate - measured) <= 0.15 * measured


def on_paper(pipe):
    """The pipeline on a device without numbers, and a ledger that holds its weights."""
    pipe = copy.deepcopy(pipe)
    for module in modules_of(pipe):
        module.to("meta")
    ledger = Ledger("cpu")
    ledger.hold(WEIGHTS, [t for module in modules_of(pipe) for t in (*module.parameters(), *module.buffers())])
    return pipe, ledger


def work(pipe, side: int):
    """What the stages do, by name, each after what it needs is there."""
    picture, z_sites = Image.new("RGB", (side, side)), SITES
    if len(pipe.unet.config.block_out_channels) == 3:
        z_sites = InjectionSites("test", resnets=(1,), attentions=(1, 4))
    inversion = invert(pipe, picture, "a cat", STEPS)
    features = collect_features(pipe, inversion, z_sites)
    masks = torch.zeros(2, side, side)
    masks[0, :, : side // 2], masks[1, :, side // 2 :] = 1, 1
    uses = [ConceptUse(None, "a dog"), ConceptUse(None, "a cat")]

    def fuse(variants=1):
        plan = FusionPlan.build(pipe, uses, masks, prompt="a dog and a cat", suppression=0.2, features=features)
        plan = stack_plans([plan] * variants)
        return sample_fusion(pipe.unet, features.z_T, ddim_scheduler(pipe.scheduler), plan)

    return {
        "encoding": lambda: encode_image(pipe.vae, picture),
        "masks": lambda: attention_maps(pipe, picture, "a cat and a dog", ["cat", "dog"]),
        "inversion": lambda: invert(pipe, picture, "a cat", STEPS),
        "features": lambda: collect_features(pipe, inversion, z_sites),
        "reconstruction": lambda: reconstruction_psnr(pipe, inversion, features),
        "fusion": fuse,
        "variants": lambda: fuse(3),
        "decoding": lambda: decode_latents(pipe.vae, features.reconstruction),
    }


@pytest.mark.parametrize("kind", ["embedded", "tiny", "tiny SDXL"])
def test_every_stage_is_within_15_percent_of_the_allocators_record(kind, request):
    if kind == "embedded":
        pipe, sides = load_pipeline(), (80,)
    else:
        pipe, sides = request.getfixturevalue("tiny_pipe" if kind == "tiny" else "tiny_sdxl"), (48,)
    for side in sides:
        real = {name: host_peak(call) for name, call in work(pipe, side).items()}
        (paper, ledger), told = on_paper(pipe), {}
        with ledger:
            for name, call in work(paper, side).items():
                before = sum(ledger.held.values())
                with ledger.peak() as peak:
                    result = call()
                del result
                told[name] = peak.total - before
        assert [(name, told[name], real[name]) for name in real if not near(told[name], real[name])] == []
        assert ledger.held["working"] < 0.5 * max(real.values())  # what is dead was struck out


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        ((1, 64, 16, 16), (64, 64, 3, 3)),
        ((2, 64, 16, 16), (64, 64, 3, 3)),
        ((2, 33, 15, 17), (40, 33, 3, 3)),
        ((1, 8, 32, 32), (32, 8, 3, 3)),
        ((1, 64, 32, 32), (4, 64, 3, 3)),
        ((1, 64, 32, 32), (64, 64, 1, 1)),
    ],
    ids=str,
)
def test_memory_that_convolutions_take_for_themselves(x, weight, last):
    x, weight = torch.randn(x), torch.randn(weight)
    x = x.to(memory_format=torch.channels_last) if last else x

    def call(x, weight):
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    paper = x.to("meta"), weight.to("meta")
    with torch.no_grad(), Ledger("cpu") as ledger, ledger.peak() as peak:
        out = call(*paper)
    expected = call(x, weight)
    assert out.stride() == expected.stride()
    assert near(peak.total, host_peak(lambda: call(x, weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 60, 77, 24), (2, 3, 300, 300, 8), (1, 1, 900, 600, 32)], ids=str)
def test_memory_that_attention_takes_for_itself(shape, dtype):
    rows, heads, tokens, keys, dim = shape
    q = torch.randn(rows, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, rows, keys, heads, dim, dtype=dtype).transpose(2, 3)
    q_, k_, v_ = (x.to("meta") for x in (q, k, v))
    with torch.no_grad(), Ledger("cpu") as ledger, ledger.peak() as peak:
        F.scaled_dot_product_attention(q_, k_, v_)
    assert near(peak.total, host_peak(lambda: F.scaled_dot_product_attention(q, k, v)))


def whole_job(job_folder, **train):
    """Training, a file and a box as masks, a background concept."""
    concepts = [
        TRAINED | {"train": TRAINED["train"] | train},
        {"file": "rex.safetensors", "word": "dog", "mask": {"box": [0.5, 0.2, 1, 0.8]}},
    ]
    return job_of(job_folder, concepts=concepts, background={"file": "hills.safetensors"}, steps=6)


@pytest.mark.parametrize("kind", ["embedded", "tiny, trained", "tiny, checkpointed"])
def test_a_run_is_within_15_percent_of_its_estimate_in_every_stage(kind, job_folder):
    job = make_job(64, 2, steps=4) if kind == "embedded" else whole_job(job_folder, checkpointing="checkp" in kind)
    told, taken = estimated(job, estimate_job(job)), measured(job)
    assert set(told) == {"template", "inversion", "fusion"} | ({"bank"} if kind != "embedded" else set())
    assert [(name, told[name], taken[name]) for name in told if not near(told[name], taken[name])] == []


def test_numbers_are_not_needed_and_none_are_read(job_folder, tmp_path):
    """Without any weights beside the configurations the estimate is the same."""
    job = whole_job(job_folder)
    folder = tmp_path / "bare"
    for path in (job_folder / "model").rglob("*.json"):
        copied = folder / path.relative_to(job_folder / "model")
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    bare, whole = (estimate_job(j).stages for j in (replace(job, model=str(folder)), job))
    assert list(bare) == list(whole)  # and as large, but for what Python's garbage collection frees sooner or later
    assert [name for name in bare if bare[name].total != pytest.approx(whole[name].total, rel=0.01)] == []
    assert is_embedded(load_shapes("embedded", device="cpu").pipe)


def test_more_steps_hold_more_and_the_host_takes_features_off_a_gpu(job_folder):
    job = job_of(job_folder)
    longer = job_of(job_folder, steps=30)
    few, many = (estimate_job(j, device="cuda").stages["fusion"].parts["features"] for j in (job, longer))
    assert many > 5 * few
    host = estimate_job(longer, device="cuda", plan=MemoryPlan(features="host"))
    assert "features" not in host.stages["fusion"].parts
    assert host.dtype == "float16"


@pytest.fixture
def known(monkeypatch):
    """Peaks that one call estimated are known to the next of the same job and device."""
    monkeypatch.setattr(estimate, "_Estimator", cache(estimate._Estimator))


def test_the_first_plan_that_fits_is_taken(job_folder, known):
    job = job_of(job_folder, steps=40)
    everything, _, host, *_ = plans_for("cuda")
    most, least = (estimate_job(job, device="cuda", plan=plan).nbytes for plan in (everything, plans_for("cuda")[-1]))
    assert least < 0.9 * most
    assert fit_job(job, most + 10_000, device="cuda").plan == everything
    assert fit_job(job, most - 10_000, device="cuda").plan == host  # it trains nothing: how much at once is no help
    with pytest.raises(
        WeaverError, match=r"job: a run takes .* on cuda at the least, in its stage '\w+' .*--max-memory"
    ):
        fit_job(job, least - 10_000, device="cuda")
    kinds = {(plan.features, plan.offload) for plan in plans_for("cpu")}
    assert kinds == {("device", False), ("replayed", False)}
    replayed = estimate_job(job, device="cpu", plan=MemoryPlan("replayed")).stages["fusion"]
    stored = estimate_job(job, device="cpu").stages["fusion"]
    assert "features" not in replayed.parts and replayed.total < stored.total


def test_graphs_hold_a_call_s_memory_and_what_goes_in_and_out():
    """Of kB: x is 1; a call makes two more, of which one is the result; the next kind makes three and keeps none."""

    def small(x):
        return (x + 1) * 2

    def large(x):
        _kept = x + 1, x + 2, x + 3

    with torch.no_grad(), Ledger("cuda") as ledger:
        x, graphs = torch.empty(256, device="meta"), GraphsOnPaper(ledger)
        with ledger.peak() as peak:
            graphs.call("kind", small, x)
        assert ledger.held[GRAPHS] == 3 * 1024  # in, out, and what is free of the pool
        with ledger.peak() as again:
            graphs.call("kind", small, x)
        assert peak.total == again.total == 5 * 1024  # x and a copy of the result
        assert len(graphs) == 1
        with ledger.peak() as peak:
            graphs.call("other", large, x)
        assert peak.total == (1 + 3 + 1 + 3) * 1024  # the call before its capture is beside the pool
        assert ledger.held[GRAPHS] == (2 + 1 + 3) * 1024  # what goes in and out, and one pool as large as the larger
        graphs.clear()
        assert ledger.held[GRAPHS] == 0


def test_graphs_are_counted_where_they_are_asked_for_and_left_out_where_they_do_not_fit(job_folder, known):
    job = job_of(job_folder, steps=12)
    plain, captured = (estimate_job(job, device="cuda", graphs=graphs) for graphs in (False, True))
    held = {name for name, peak in captured.stages.items() if peak.parts.get(GRAPHS)}
    assert {"template", "features", "fusion"} <= held and not {"reconstruction", "decoding"} & held
    assert all(captured.stages[name].total > plain.stages[name].total for name in held)
    assert plain.graphs is None and not any(peak.parts.get(GRAPHS) for peak in plain.stages.values())
    least = estimate_job(job, device="cuda", plan=plans_for("cuda")[-1], graphs=True)
    found = [fit_job(job, limit, device="cuda", graphs=True) for limit in (captured.nbytes, least.nbytes - 1)]
    assert found[0].plan == MemoryPlan() and found[0].graphs is True and found[0].way.endswith("steps in CUDA graphs")
    assert found[1].graphs is False and found[1].way.endswith("no CUDA graphs, which do not fit")
    assert found[1].as_mapping()["graphs"] is False and table(found[1]).count("no CUDA graphs") == 1
    with pytest.raises(WeaverError, match="job: device: graphs need a CUDA device, the run is on cpu: leave them out"):
        estimate_job(job, device="cpu", graphs=True)


def test_as_many_variants_as_fit(job_folder, known):
    job = job_of(job_folder)
    one, five = (estimate_job(job, device="cuda", variants=n) for n in (1, 5))
    assert five.worst == "fusion" and five.stages["fusion"].total > one.stages["fusion"].total
    assert five.stages["features"].total == one.stages["features"].total
    assert most_variants(job, five.nbytes, device="cuda") == 5
    assert most_variants(job, one.nbytes - 1, device="cuda") == 0
    with pytest.raises(WeaverError, match="Cannot estimate: variants is 0, expected 1 or more"):
        estimate_job(job, variants=0)


@pytest.mark.parametrize("fits", [True, False])
def test_features_go_to_the_host_where_they_would_take_over_half_of_what_is_free(fits, tiny_pipe, monkeypatch, caplog):
    z = torch.zeros(1, 4, 24, 24, dtype=torch.float64)
    nbytes = collect_features(tiny_pipe, invert(tiny_pipe, z, "a cat", STEPS), SITES).nbytes
    monkeypatch.setattr(feature_home, "free_bytes", lambda device: 2 * nbytes - (not fits))
    pipe, ledger = on_paper(tiny_pipe)
    with ledger:
        inversion = invert(pipe, z.to("meta"), "a cat", STEPS)
        features = collect_features(pipe, inversion, SITES)
        there = collect_features(pipe, inversion, SITES, storage="meta")  # as it was asked for
    assert features.nbytes == there.nbytes == nbytes
    homes = [{x.device.type for step in found.tensors for x in step.values()} for found in (features, there)]
    assert homes == [{"meta" if fits else "cpu"}, {"meta"}]
    assert caplog.text.count("they are kept in the host's memory") == (not fits)


def test_features_from_the_cache_go_to_the_host_too(tiny_pipe, tmp_path, monkeypatch, caplog):
    cache, z = Cache(tmp_path, features=True), torch.zeros(1, 4, 16, 16, dtype=torch.float64)

    def collect():
        return collect_features(tiny_pipe, invert(tiny_pipe, z, "a cat", STEPS, cache=cache), SITES, cache=cache)

    expected = collect()
    monkeypatch.setattr(feature_home, "free_bytes", lambda device: 0)
    found = collect()
    assert found.cached and caplog.text.count("they are kept in the host's memory") == 1
    for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[path], theirs[path]) for path in ours)


def test_a_plan_of_another_kind_is_told():
    with pytest.raises(WeaverError) as caught:
        MemoryPlan("nowhere", offload="yes", at_once=0)
    assert str(caught.value) == (
        "Cannot plan the memory: features is 'nowhere', expected one of device, host, replayed; "
        "offload is 'yes', expected True or False; at_once is 0, expected a whole number, 1 or more, or None"
    )


def test_parts_rest_and_are_lent():
    module, other = torch.nn.Linear(3, 3, device="meta"), torch.nn.Linear(3, 3)
    with Ledger("cuda"):
        with pytest.raises(RuntimeError, match="stop"), resting([module, other]):
            assert module.weight.device.type == "cpu" and home_of(module).type == "meta" and home_of(other) is None
            with lent(module, other):
                assert module.weight.device.type == "meta" and other.weight.device.type == "cpu"
                with lent(module):
                    pass
                assert module.weight.device.type == "meta"
            assert module.weight.device.type == "cpu"
            raise RuntimeError("stop")
        assert module.weight.device.type == "meta" and home_of(module) is None


@pytest.mark.parametrize("plan", [plans_for("cuda")[-1]], ids=str)
def test_every_plan_gives_the_same_picture(plan, job_folder, tmp_path):
    """On the CPU nothing is moved; what a GPU would do is run on paper by the estimates."""
    pictures = [run_job(job_of(job_folder), tmp_path, memory=memory).result.image for memory in (plan, None)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("plan", [MemoryPlan(), MemoryPlan("host", True), MemoryPlan("replayed", True)], ids=str)
def test_a_whole_weave_on_a_gpu_without_numbers(plan, job_folder):
    """Parts that rest come when they are called and are back afterwards, and the peak is the estimated one."""
    job = job_of(job_folder, steps=12)
    shapes, ledger = load_shapes(job.model, device="cuda", dtype=torch.float16), Ledger("cuda")
    ledger.hold(WEIGHTS, shapes.tensors())
    uses = [ConceptUse(None, "a cat"), ConceptUse(None, "a dog")]
    masks = torch.zeros(2, 32, 32)
    masks[0, 8:24, 2:14], masks[1, 8:24, 18:30] = 1, 1
    with ledger, ledger.peak() as peak:
        weave(shapes.pipe, job.prompt, uses, masks=masks, template=Image.new("RGB", (32, 32)), steps=12, memory=plan)
    assert {tensor.device.type for tensor in shapes.tensors()} == {"meta"}
    stages = estimate_job(job, device="cuda", plan=plan).stages
    assert near(max(stages[name].total for name in ("inversion", "features", "fusion", "decoding")), peak.total)


def test_published_models_in_their_own_size(tmp_path):
    """The features of SD 2.1 at 768 take 575 MB (two windows, 50 steps); its weights 1.29e9 parameters' room."""
    write_model("sd21", tmp_path / "sd21")
    save_file({"<c>": torch.ones(1, 1024)}, tmp_path / "c.safetensors")
    mapping = {"model": "sd21", "prompt": "a cat", "template": {"model": "same"}}
    mapping["concepts"] = [{"file": "c.safetensors", "word": "cat", "mask": {"box": [0, 0, 0.5, 1]}}]
    estimate = estimate_job(job_from_mapping(mapping, folder=tmp_path), device="cuda")
    parts = estimate.stages["fusion"].parts
    assert parts["features"] == pytest.approx(575e6, rel=0.01)
    assert parts["weights"] == pytest.approx(2 * 1.29e9, rel=0.02)
    assert estimate.worst == "reconstruction"  # the autoencoder in float32, all features held
    assert table(estimate).count("<- peak") == 1


def test_what_can_not_be_estimated_is_told(tmp_path, job_folder):
    with pytest.raises(ModelError, match="not complete in the local cache"):
        load_shapes("nobody/nothing", device="cpu", offline=True)
    write_model("sd21", tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "NoSuchAutoencoder"]}))
    with pytest.raises(ModelError, match="vae is a NoSuchAutoencoder of diffusers, which can't be built"):
        load_shapes(str(tmp_path), device="cpu")
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ModelError, match="is a FluxPipeline; what it takes of memory is known for"):
        load_shapes(str(tmp_path), device="cpu", fuses=False)
    with pytest.raises(WeaverError, match="job.yaml: size: is 33x32, expected multiples"):
        estimate_job(job_of(job_folder, size=[33, 32]), source="job.yaml")
