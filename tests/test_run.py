"""A job from beginning to end on a tiny model: what it leaves, and what of it reaches the fusion."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch
from jobs import SIDE, TRAINED, job_of
from PIL import Image

from weaver import Cache, pipeline, run
from weaver.concepts.concept import Concept
from weaver.errors import WeaverError
from weaver.job import choose, prepare
from weaver.job.resolve import TEMPLATE_MODEL, resolve_job
from weaver.manifest import PNG_KEY
from weaver.outputs import TrainedKeptWarning
from weaver.run import run_job


def test_all_results_are_there(finished):
    names = {path.relative_to(finished.folder).as_posix() for path in finished.folder.rglob("*") if path.is_file()}
    pictures = {"template.png", "masks.png", "fused.png", "sheet.png"}
    assert names == pictures | {"manifest.json", "report.json", "concepts/tom.safetensors"}
    assert Image.open(finished.folder / "fused.png").size == (SIDE, SIDE)
    assert min(Image.open(finished.folder / "masks.png").size) >= 512
    assert Image.open(finished.folder / "sheet.png").width > 1000


def test_report_has_the_promised_keys(finished):
    report = json.loads((finished.folder / "report.json").read_text())
    assert list(report) == ["stages", "total_seconds", "reconstruction_psnr", "live_contexts", "concepts"]
    assert list(report["stages"]) == ["bank", "template", "inversion", "masks", "fusion"]
    assert all(seconds > 0 for stage, seconds in report["stages"].items() if stage != "masks")
    assert report["total_seconds"] >= sum(report["stages"].values()) - 0.1
    assert list(report["concepts"]) == ["tom", "rex", "hills"]
    assert report["concepts"]["tom"] == {"own": None, "base": None, "others": None}


def test_a_second_run_takes_the_inversion_from_the_cache(job_folder, tmp_path):
    cache = Cache(tmp_path / "cache", features=True)
    cold, warm = (run_job(job_of(job_folder), tmp_path / name, cache=cache) for name in ("cold", "warm"))
    assert "cached" not in cold.report and warm.report["cached"] == ["inversion", "features"]
    assert warm.result.image.tobytes() == cold.result.image.tobytes()
    assert warm.result.reconstruction_psnr == cold.result.reconstruction_psnr


def test_each_prompt_names_its_own_concept(finished):
    assert finished.result.prompts == (
        "",
        "a cat and a dog, mountain background",
        "a <v1> cat, mountain background",
        "a <v2> dog, mountain background",
        "a cat and a dog, <v3> mountain background",
    )


def test_settings_travel_in_the_picture_without_paths(finished):
    text = Image.open(finished.folder / "fused.png").text[PNG_KEY]
    record = json.loads(text)
    assert record["prompt"] == "a cat and a dog, mountain background" and record["settings"]["seed"] == 7
    assert record["concepts"][0]["trained"]["steps"] == 2 and record["background"]["name"] == "hills"
    assert record["versions"]["torch"] == version("torch")
    assert str(finished.folder.parent) not in text and "/" not in record["model"]["name"]
    assert record == json.loads((finished.folder / "manifest.json").read_text())["record"]


def test_a_word_that_is_not_found_tries_another_template(job_folder, tmp_path, monkeypatch):
    seeds, original = [], choose.template_picture

    def counted(*args, **kwargs):
        seeds.append(kwargs["seed"])
        return original(*args, **kwargs)

    def found(self, pipe, template, prompt, stages=None):
        if len(seeds) < 3:
            raise choose.MaskError("no 'cat' was found")
        return self

    monkeypatch.setattr(choose, "template_picture", counted)
    monkeypatch.setattr(choose.Places, "find", found)
    done = run_job(
        job_of(job_folder, template={"steps": 1, "tries": 4, "model": "same"}, seed=5, steps=1), tmp_path / "out"
    )
    assert seeds == [5, 5 + choose.SEED_STRIDE, 5 + 2 * choose.SEED_STRIDE]
    template = json.loads((done.folder / "manifest.json").read_text())["job"]["template"]
    assert template["seed"] == seeds[-1] and template["tries"] == 1
    seeds.clear()
    with pytest.raises(WeaverError, match="no 'cat' was found; 2 templates were tried, from seed 5"):
        run_job(
            job_of(job_folder, template={"steps": 1, "tries": 2, "model": "same"}, seed=5, steps=1), tmp_path / "none"
        )


class Enough(Exception):
    """Raised where sampling would begin."""


def plan_of(job, pipe, monkeypatch, tmp_path) -> dict[str, str]:
    """What the plan of a job's fusion says, each part as text."""
    seen, kept = [], []

    def stop(*args, **kwargs):
        seen.extend(value for value in args if isinstance(value, pipeline.FusionPlan | float))
        raise Enough

    monkeypatch.setattr(pipeline, "sampler_for", stop)
    monkeypatch.setattr(pipeline.KeptBackground, "build", lambda *args: kept.append("background"))
    monkeypatch.setattr(prepare, "load_model", lambda *a, **k: pipe)
    with pytest.raises(Enough):
        run_job(job, tmp_path / "out")
    plan, eta = seen
    sites, kv = plan.features.sites, next(iter(plan.keys_values.values()))
    return {
        "prompts": str(plan.prompts),
        "keys": str([x.sum().item() for x in (kv.keys, kv.values)]),
        "weights": str([value.tolist() for value in plan.weights.values()]),
        "phases": str(plan.phases),
        "guidance": str(plan.guidance),
        "steps": str(plan.steps),
        "pixels": str(plan.pixels),
        "noise": str(plan.features.z_T.sum().item()),
        "sites": str((sites.resnets, sites.attentions)),
        "windows": str((sites.resnet_window, sites.attention_window)),
        "features": plan.features.kind,
        "eta": str(eta),
        "kept": str(kept),
    }


def with_tom(**changes) -> dict:
    concepts = job_concepts()
    return {"concepts": [concepts[0] | changes, concepts[1]]}


def job_concepts() -> list[dict]:
    return [
        {"file": "tom.safetensors", "mask": {"file": "left.png"}},
        {"file": "rex.safetensors", "mask": {"box": [0.2, 0.2, 1, 0.8]}},
    ]


PICTURE = {"image": "template.png"}
REACHES = {
    "strength": (with_tom(strength=0.5), {"weights"}),
    "window": (with_tom(window=[0, 0.5]), {"weights", "phases"}),
    "scale": (with_tom(scale=0.5), {"keys"}),
    "concept's prompt": (with_tom(prompt="the <v1> cat"), {"prompts", "keys"}),
    "concept's negative prompt": (with_tom(negative_prompt="ugly"), {"prompts", "keys", "weights"}),
    "concept's mask": (with_tom(mask={"box": [0, 0, 0.5, 0.5]}), {"weights"}),
    "background": ({"background": {"file": "hills.safetensors"}}, {"prompts", "keys", "weights"}),
    "negative prompt": ({"negative_prompt": "ugly"}, {"prompts", "keys"}),
    "steps": ({"steps": 3}, {"steps", "noise"}),
    "size": ({"size": [48, 32]}, {"pixels", "weights", "noise"}),
    "source prompt": ({"inversion": {"prompt": "a red ball"}}, {"noise"}),
    "dilation": ({"masks": {"dilation": 4}}, {"weights"}),
    "overlap": ({"masks": {"overlap": "share"}}, {"weights"}),
    "dilation by a part": ({"masks": {"dilation": 0.5}}, {"weights"}),
    "feather": ({"masks": {"feather": 6}}, {"weights"}),
    "down-sampling": ({"masks": {"downsampling": "nearest"}}, {"weights"}),
    "kept background": ({"keep_background": True}, {"kept"}),
    "lambda": ({"fusion": {"lambda": 0.9}}, {"weights"}),
    "guidance": ({"fusion": {"guidance": 5}}, {"guidance"}),
    "eta": ({"fusion": {"eta": 0.3}}, {"eta"}),
    "sites": ({"fusion": {"injection": {"sites": "plug-and-play"}}}, {"sites", "windows"}),
    "ResNet window": ({"fusion": {"injection": {"resnet": 0.1}}}, {"windows"}),
    "features": ({"fusion": {"injection": {"features": "inversion"}}}, {"features"}),
    "attention window": ({"fusion": {"injection": {"attention": 0.1}}}, {"windows"}),
}


@pytest.fixture(scope="module")
def plain_plan(job_folder, pipe, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        job = job_of(job_folder, steps=2, template=PICTURE, concepts=job_concepts())
        return plan_of(job, pipe, monkeypatch, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", REACHES)
def test_every_field_reaches_the_plan(job_folder, pipe, plain_plan, monkeypatch, tmp_path, name):
    changes, parts = REACHES[name]
    mapping = {"steps": 2, "template": PICTURE, "concepts": job_concepts()} | changes
    plan = plan_of(job_of(job_folder, **mapping), pipe, monkeypatch, tmp_path)
    assert {part for part in plan if plan[part] != plain_plan[part]} == parts


@pytest.mark.parametrize(
    "template",
    [{"seed": 3}, {"guidance": 1}, {"steps": 4}, {"prompt": "two pets"}],
    ids=["seed", "guidance", "steps", "prompt"],
)
def test_every_field_of_the_template_reaches_it(job_folder, pipe, monkeypatch, tmp_path, template):
    mine = {"steps": 2, "model": "same"}
    plain, other = (
        plan_of(job_of(job_folder, steps=1, template=mine | changes), pipe, monkeypatch, tmp_path)["noise"]
        for changes in ({}, template)
    )
    assert plain != other


class Watched(run.Stages):
    """Stages that note their bars."""

    def __init__(self, bars):
        super().__init__(bars)
        self.labels = []

    def bar(self, label, total=None, **options):
        self.labels.append(label)
        return super().bar(label, total, **options)


def test_masks_from_attention(job_folder, tmp_path):
    stages = Watched(bars=False)
    concepts = [{"file": name} for name in ("tom.safetensors", "rex.safetensors")]
    done = run_job(
        job_of(job_folder, concepts=concepts, masks={"source": "attention"}, template=PICTURE, steps=1),
        tmp_path / "out",
        stages=stages,
    )
    assert stages.labels == [
        "loading the model",
        *("masks", "inversion", "features", "drawing the template again", "fusion", "decoding"),
    ]
    assert done.result.settings["masks"]["sources"] == ["attention: cat", "attention: dog"]
    assert all(mask.any() for mask in done.result.masks[:2])


def test_the_template_comes_from_sdxl_unless_said_otherwise(job_folder, pipe):
    prompts = ["a <v1> cat", "a <v2> dog"]
    models = {
        wish: resolve_job(job_of(job_folder, template={"model": wish} if wish else {}), pipe, prompts).template.model
        for wish in (None, "same", "model", "embedded")
    }
    assert models == {None: TEMPLATE_MODEL, "same": "same", "model": "same", "embedded": "embedded"}
    assert resolve_job(job_of(job_folder, template=PICTURE), pipe, prompts).template.model is None


def test_the_device_is_written_down(finished):
    manifest = json.loads((finished.folder / "manifest.json").read_text())
    assert manifest["job"]["device"] == manifest["record"]["device"]["type"] == "cpu"


def test_another_model_makes_the_template_without_a_negative_prompt_it_does_not_know(
    job_folder, pipe, monkeypatch, tmp_path
):
    class Plain(type(pipe)):
        def __call__(self, prompt, num_inference_steps, generator, guidance_scale=1.0):
            return super().__call__(
                prompt, num_inference_steps=num_inference_steps, generator=generator, guidance_scale=guidance_scale
            )

    loaded = {str(job_folder / "model"): pipe, "some/model": Plain(**pipe.components)}
    monkeypatch.setattr(prepare, "load_model", lambda model, **options: loaded[model])
    template = {"model": "some/model", "steps": 1}
    job = job_of(job_folder, negative_prompt="ugly", template=template, steps=1)
    done = run_job(job, tmp_path / "out", stages=(stages := Watched(bars=False)))
    record = json.loads((done.folder / "manifest.json").read_text())["record"]
    assert record["template"]["model"] == "some/model" and set(record["weights"]) == {"model", "template.model"}
    assert stages.labels[:2] == ["loading the model", "loading the template's model"]
    assert stages.labels[2:] == ["inversion", "features", "drawing the template again", "fusion", "decoding"]


@pytest.mark.parametrize("failure", [WeaverError("no memory"), KeyboardInterrupt()], ids=["error", "stopped"])
def test_what_was_trained_is_kept_where_the_rest_fails(job_folder, tmp_path, monkeypatch, failure):
    changes = {"prompt": "a cat, mountain", "concepts": [TRAINED]}
    expected = run_job(job_of(job_folder, **changes), tmp_path / "whole").concepts[0]
    out = tmp_path / "out"
    out.mkdir()
    (out / "fused.png").write_bytes(b"of a run before")

    def fail(*args):
        raise failure

    monkeypatch.setattr(run, "_weave", fail)
    with pytest.warns(TrainedKeptWarning, match="trained, and kept: .*tom.safetensors"), pytest.raises(type(failure)):
        run_job(job_of(job_folder, **changes), out)
    kept = Concept.load(out / "concepts" / "tom.safetensors")
    assert all(torch.equal(delta, expected.deltas[name].to(delta)) for name, delta in kept.deltas.items())
    assert {path.name for path in out.iterdir()} == {"fused.png", "concepts"}
    made = [folder / "concepts" / "tom.checkpoint.class" for folder in (out, tmp_path / "whole")]  # pictures of cats
    assert [folder.is_dir() for folder in made] == [True, False]
    assert (out / "fused.png").read_bytes() == b"of a run before"
