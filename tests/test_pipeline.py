"""A job from beginning to end on a tiny model: what it leaves, that it repeats, and that mistakes leave nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from PIL import Image

from weaver import outputs, run
from weaver.concepts.concept import Concept, attn2_hash, attn2_projections
from weaver.errors import WeaverError
from weaver.fusion.contexts import ConceptUse
from weaver.inputs import read_inputs
from weaver.jobfile import load_job
from weaver.jobparse import job_from_mapping
from weaver.manifest import PNG_KEY, changed_versions, check_inputs
from weaver.pipeline import weave
from weaver.progress import Stages
from weaver.run import run_job

SIDE = 32


def make_concept(pipe, name: str, word: str, token: str, seed: int = 0, base_hash: str | None = None) -> Concept:
    """A concept with random weights, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        path: 0.5 * torch.randn(linear.weight.shape, generator=generator)
        for path, linear in attn2_projections(pipe.unet).items()
    }
    width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
    vectors = {"text_encoder": torch.randn(1, width, generator=generator)}
    return Concept(name, token, word, base_hash or attn2_hash(pipe.unet), vectors, deltas)


def picture(seed: int, side: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """A model folder with concept files, pictures and masks beside it."""
    folder = tmp_path_factory.mktemp("job")
    pipe.save_pretrained(folder / "model")
    make_concept(pipe, "tom", "cat", "<v1>", 1).save(folder / "tom.safetensors")
    make_concept(pipe, "rex", "dog", "<v2>", 2).save(folder / "rex.safetensors")
    make_concept(pipe, "hills", "mountain", "<v3>", 3).save(folder / "hills.safetensors")
    make_concept(pipe, "stranger", "cat", "<v1>", 4, base_hash="0" * 64).save(folder / "stranger.safetensors")
    (folder / "pictures").mkdir()
    for seed in range(2):
        picture(seed).save(folder / "pictures" / f"{seed}.png")
    picture(5).save(folder / "template.png")
    left = np.zeros((SIDE, SIDE), np.uint8)
    left[8:24, 2:14] = 255
    Image.fromarray(left).save(folder / "left.png")
    Image.fromarray(np.zeros_like(left)).save(folder / "empty.png")
    Image.fromarray(left[:20]).save(folder / "flat.png")
    (folder / "broken.png").write_bytes((folder / "template.png").read_bytes()[:200])
    (folder / "broken.safetensors").write_bytes(b"no tensors")
    return folder


def job_of(folder, **changes):
    mapping = {
        "model": "model",
        "prompt": "a cat and a dog, mountain background",
        "steps": 3,
        "template": {"steps": 2},
        "concepts": [
            {"file": "tom.safetensors", "mask": {"file": "left.png"}},
            {"file": "rex.safetensors", "mask": {"box": [0.5, 0.2, 1, 0.8]}},
        ],
    }
    return job_from_mapping(mapping | changes, folder=folder, source="job.yaml")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """One run with everything in it: training, a background concept, a mask file and a box."""
    mapping = {
        "concepts": [
            {
                "name": "tom",
                "word": "cat",
                "train": {"images": "pictures", "token": "<v1>", "steps": 2, "prior_images": 2, "prior_steps": 1},
                "mask": {"file": "left.png"},
            },
            {"file": "rex.safetensors", "mask": {"box": [0.5, 0.2, 1, 0.8]}},
        ],
        "background": {"file": "hills.safetensors"},
        "seed": 7,
    }
    return run_job(job_of(folder, **mapping), tmp_path_factory.mktemp("results") / "deep" / "run")


def test_all_results_are_there(finished):
    names = {path.relative_to(finished.folder).as_posix() for path in finished.folder.rglob("*") if path.is_file()}
    pictures = {"template.png", "masks.png", "fused.png", "sheet.png"}
    assert names == pictures | {"manifest.json", "report.json", "concepts/tom.safetensors"}
    assert Image.open(finished.folder / "fused.png").size == (SIDE, SIDE)
    assert min(Image.open(finished.folder / "masks.png").size) >= 512
    assert Image.open(finished.folder / "sheet.png").width > 1000


def test_report_has_the_promised_keys(finished):
    report = json.loads((finished.folder / "report.json").read_text())
    assert list(report) == ["stages", "total_seconds", "reconstruction_psnr", "concepts"]
    assert list(report["stages"]) == ["bank", "template", "inversion", "masks", "fusion"]
    assert all(seconds > 0 for stage, seconds in report["stages"].items() if stage != "masks")
    assert report["total_seconds"] >= sum(report["stages"].values()) - 0.1
    assert list(report["concepts"]) == ["tom", "rex", "hills"]
    assert report["concepts"]["tom"] == {"own": None, "base": None, "others": None}


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
    assert record["versions"]["torch"] == torch.__version__
    assert str(finished.folder.parent) not in text and "/" not in record["model"]["name"]
    assert record == json.loads((finished.folder / "manifest.json").read_text())["record"]


def test_the_manifest_makes_the_same_picture_again(finished, tmp_path):
    manifest = finished.folder / "manifest.json"
    job = load_job(manifest)
    check_inputs(manifest, read_inputs(job))
    assert changed_versions(manifest) == []
    again = run_job(job, tmp_path / "again")
    for name in ("fused.png", "template.png", "masks.png"):
        assert (again.folder / name).read_bytes() == (finished.folder / name).read_bytes(), name
    other = json.loads((again.folder / "manifest.json").read_text())
    assert other["record"] == json.loads(manifest.read_text())["record"]


def test_a_manifest_tells_what_has_changed_since(finished, folder, tmp_path):
    manifest = json.loads((finished.folder / "manifest.json").read_text())
    manifest["inputs"]["concepts[1].file"] = "0" * 64
    manifest["record"]["versions"]["torch"] = "0.1"
    path = finished.folder / "changed.json"
    path.write_text(json.dumps(manifest))
    with pytest.raises(WeaverError, match=r"concepts\[1\].file: rex.safetensors is not what it was"):
        check_inputs(path, read_inputs(load_job(path)))
    assert changed_versions(path) == [f"torch {torch.__version__} (was 0.1)"]
    path.unlink()


MISTAKES = {
    "concept of another base model": (
        {"concepts": [{"file": "stranger.safetensors"}]},
        "concepts[0].file: concept 'stranger' belongs to another base model",
    ),
    "concept file unreadable": (
        {"concepts": [{"file": "broken.safetensors"}]},
        "concepts[0].file: ",
    ),
    "token missing in the prompt": (
        {"concepts": [{"file": "tom.safetensors", "prompt": "a cat"}]},
        "concepts[0].prompt: 'a cat' lacks the concept's token '<v1>'",
    ),
    "token of another concept": (
        {"concepts": [{"file": "tom.safetensors", "prompt": "a <v1> cat, <v2> dog"}, {"file": "rex.safetensors"}]},
        "concepts[0].prompt: holds another concept's token '<v2>'",
    ),
    "class word missing in the prompt": (
        {"prompt": "a dog", "concepts": [{"file": "tom.safetensors"}]},
        "concepts[0]: prompt 'a dog' names 'cat' 0 times",
    ),
    "mask of another size": (
        {"concepts": [{"file": "tom.safetensors", "mask": {"file": "flat.png"}}]},
        "concepts[0].mask: ",
    ),
    "empty mask": (
        {"concepts": [{"file": "tom.safetensors", "mask": {"file": "empty.png"}}]},
        "concepts[0].mask: ",
    ),
    "box outside": (
        {"concepts": [{"file": "tom.safetensors", "mask": {"box": [0, 0, 99, 10]}}]},
        "concepts[0].mask: box",
    ),
    "unreadable mask": (
        {"concepts": [{"file": "tom.safetensors", "mask": {"file": "broken.png"}}]},
        "concepts[0].mask.file: ",
    ),
    "unreadable template": ({"template": {"image": "broken.png"}}, "template.image: "),
    "unreadable training picture": (
        {"concepts": [{"word": "cat", "train": {"images": ["pictures/0.png", "broken.png"]}}]},
        "concepts[0].train.images[1]: ",
    ),
    "more steps than the model has": ({"steps": 1001}, "steps: is 1001, expected 1 to 1000"),
    "size the model can't draw": ({"size": [30, 32]}, "size: is 30x32, expected multiples of 8"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_any_sampling_and_leaves_nothing(folder, tmp_path, monkeypatch, mistake):
    changes, message = MISTAKES[mistake]
    monkeypatch.setattr(run, "template_picture", lambda *a, **k: pytest.fail("sampling began"))
    with pytest.raises(WeaverError) as caught:
        run_job(job_of(folder, **changes), tmp_path / "out", source="job.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("job.yaml: ")
    assert list(tmp_path.iterdir()) == []


def test_two_concepts_that_claim_one_mask(folder, tmp_path):
    concepts = [{"file": name, "mask": {"file": "left.png"}} for name in ("tom.safetensors", "rex.safetensors")]
    with pytest.raises(WeaverError, match="tom and rex claim all of each other's mask"):
        run_job(job_of(folder, concepts=concepts, template={"image": "template.png"}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_nothing_half_written(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "fused.png").write_text("of an earlier run")
    job = job_of(folder, template={"image": "template.png"}, steps=1)
    monkeypatch.setattr(outputs, "contact_sheet", full)
    for out in (tmp_path / "new" / "run", kept):
        with pytest.raises(OSError, match="no space left"):
            run_job(job, out)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert [path.name for path in kept.iterdir()] == ["fused.png"]
    assert (kept / "fused.png").read_text() == "of an earlier run"


def test_results_can_not_go_into_a_file(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeaverError, match="out: .*file is a file, not a folder"):
        run_job(job_of(folder), tmp_path / "file" / "run")


def test_a_word_that_is_not_found_tries_another_template(folder, tmp_path, monkeypatch):
    seeds, original = [], run.template_picture

    def counted(*args, **kwargs):
        seeds.append(kwargs["seed"])
        return original(*args, **kwargs)

    def found(self, pipe, template, prompt):
        if len(seeds) < 3:
            raise run.MaskError("no 'cat' was found")
        return self

    monkeypatch.setattr(run, "template_picture", counted)
    monkeypatch.setattr(run.Places, "find", found)
    done = run_job(job_of(folder, template={"steps": 1, "tries": 4}, seed=5, steps=1), tmp_path / "out")
    assert seeds == [5, 5 + run._SEED_STRIDE, 5 + 2 * run._SEED_STRIDE]
    template = json.loads((done.folder / "manifest.json").read_text())["job"]["template"]
    assert template["seed"] == seeds[-1] and template["tries"] == 1
    seeds.clear()
    with pytest.raises(WeaverError, match="no 'cat' was found; 2 templates were tried, from seed 5"):
        run_job(job_of(folder, template={"steps": 1, "tries": 2}, seed=5, steps=1), tmp_path / "none")


def test_weave_is_a_function_of_its_arguments(pipe):
    concepts = [make_concept(pipe, "tom", "cat", "<v1>", 1), make_concept(pipe, "rex", "dog", "<v2>", 2)]
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[0, :, :16] = masks[1, :, 16:] = True
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    processors, scheduler = dict(pipe.unet.attn_processors), pipe.scheduler
    arguments = dict(template=picture(1), masks=masks, steps=2, guidance=2.0)
    first = weave(pipe, "a cat and a dog", concepts, **arguments)
    again = weave(pipe, "a cat and a dog", concepts, **arguments)
    without = weave(pipe, "a cat and a dog", [ConceptUse(c, strength=0) for c in concepts], **arguments)
    assert first.image.tobytes() == again.image.tobytes() != without.image.tobytes()
    assert torch.allclose(first.masks.sum(0), torch.ones(SIDE, SIDE))
    assert pipe.unet.attn_processors == processors and pipe.scheduler is scheduler
    assert all(torch.equal(before[name], value) for name, value in pipe.unet.state_dict().items())


def test_weave_tells_everything_that_does_not_fit(pipe):
    stranger = make_concept(pipe, "stranger", "cat", "<v1>", base_hash="0" * 64)
    with pytest.raises(WeaverError) as caught:
        weave(pipe, "a dog", [stranger], steps=0, size=(30, 32))
    assert all(
        part in str(caught.value) for part in ("steps: is 0", "size: is 32x30", "another base", "names 'cat' 0 times")
    )
    tom = make_concept(pipe, "tom", "cat", "<v1>")
    with pytest.raises(WeaverError, match="there is no concept to draw"):
        weave(pipe, "a dog", [])
    with pytest.raises(WeaverError, match=r"masks have shape \(1, 8, 8\)"):
        weave(pipe, "a cat", [tom], masks=np.ones((1, 8, 8)))
    with pytest.raises(WeaverError, match="the template is 16x16, expected 32x32"):
        weave(pipe, "a cat", [tom], masks=np.ones((1, SIDE, SIDE)), template=picture(0, 16))


def test_stages_are_timed_and_bars_are_drawn_only_when_asked(capfd):
    for bars in (False, True):
        stages = Stages(bars=bars)
        with stages.stage("fusion"), stages.bar("fusion", 2) as move:
            move(1, 2)
            move(2, 2)
        assert stages.seconds["fusion"] > 0
        assert ("fusion" in capfd.readouterr().err) == bars
