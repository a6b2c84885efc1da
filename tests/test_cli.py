"""The command line: what it says, how it ends, and that mistakes are one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from weaver import cli, run
from weaver.concepts.bank import worker_count
from weaver.demo import demo_job, with_shipped_concepts
from weaver.embedded import CONCEPTS, load_pipeline
from weaver.errors import WeaverError
from weaver.memory import estimate
from weaver.memory.ledger import Peak
from weaver.memory.plans import MemoryPlan
from weaver.version import __version__

RESUMED = "no results were written; the same command goes on from its trainings' checkpoints, if there are any"


def run_cli(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text('prompt: "a cat"\nconcepts: [{file: "embedded:pug", mask: {box: [0, 0, 1, 1]}}]\n')
    return path


def finished(report):
    """Stands in for a run that is done."""
    return lambda job, folder, **options: run.Run(folder, None, (), report)


def test_help_names_the_commands_and_exit_codes(capsys):
    code, out, _ = run_cli(capsys)
    assert code == 0 and "demo" in out and "run" in out and "exit codes: 0 done; 2 bad input" in out


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"weaver {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["demo", "--seed", seed] for seed in ("-1", "9" * 23, "abc", "1.5")),
        *(["run"], ["paint"], ["demo", "--slow"], ["demo", "--seed"]),
    ],
    ids=str,
)
def test_wrong_arguments_end_with_2_and_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.startswith("weaver: ") and err.count("\n") == 1
    assert "_seed" not in err and ("--seed" in err) == ("--seed" in arguments)


def test_a_wrong_job_is_told_in_one_line(capsys, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text('prompt: "a cat"\nsteps: 0\nconcepts: [{file: "embedded:pug", strenght: 1}]\n')
    code, out, err = run_cli(capsys, "run", path, "--out", tmp_path / "out")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"weaver: {path}: steps: must be at least 1, is 0")
    assert "concepts[0].strenght: unknown field; did you mean 'strength'?" in err
    assert not (tmp_path / "out").exists()


def test_a_shipped_concept_that_does_not_ship(capsys, tmp_path, job_file):
    job_file.write_text(job_file.read_text().replace("pug", "pgu"))
    code, _, err = run_cli(capsys, "run", job_file)
    assert code == 2 and "concepts[0].file: no concept 'pgu' ships with the package; did you mean 'pug'?" in err


def test_a_finished_run_says_where_and_how_near(capsys, monkeypatch, tmp_path, job_file):
    scores = {"pug": {"own": 0.9, "base": 0.4, "others": -0.1}, "mine": {"own": None, "base": None, "others": None}}
    report = {"concepts": scores, "total_seconds": 12.3, "cached": ["inversion", "features"]}
    monkeypatch.setattr(run, "run_job", finished(report))
    code, out, err = run_cli(capsys, "run", job_file, "--out", tmp_path / "out")
    assert code == 0 and err == ""
    assert out.splitlines()[0].split() == ["pug", "own", "0.900", "base", "0.400", "others", "-0.100"]
    assert out.splitlines()[-1] == f"{tmp_path / 'out'}: sheet.png shows it all (12 s)" and "mine" not in out
    assert "inversion and features of the template taken from the cache" in out


def test_the_command_line_passes_its_wishes_on(capsys, monkeypatch, job_file):
    seen = {}

    def note(job, folder, **options):
        seen.update(options, job=job, folder=folder)
        return run.Run(folder, None, (), {"concepts": {}, "total_seconds": 1})

    monkeypatch.setattr(run, "run_job", note)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert run_cli(capsys, "run", job_file, "--cache", "off")[0] == 0 and seen["cache"] is None
    assert run_cli(capsys, "run", job_file, "--seed", "5", "--offline")[0] == 0
    assert (
        seen["job"].seed == 5
        and seen["offline"]
        and seen["processes"] is None
        and seen["folder"].as_posix() == "outputs/job"
        and not seen["cache"].features
    )
    assert cli.os.environ["HF_HUB_OFFLINE"] == "1"
    assert run_cli(capsys, "demo", "--quick")[0] == 0
    assert seen["folder"].as_posix() == "outputs/demo" and not any(spec.train for spec in seen["job"].everyone)
    assert seen["cache"].features


def test_a_manifest_is_run_beside_what_it_made(capsys, monkeypatch, tmp_path, job_file):
    manifest = {"weaver_manifest": 1, "job": yaml.safe_load(job_file.read_text()), "inputs": {}}
    manifest["record"] = {"versions": {"torch": "0.1"}, "weights": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    seen = {}
    report = {"concepts": {}, "total_seconds": 1}
    monkeypatch.setattr(
        run,
        "run_job",
        lambda job, folder, **more: seen.update(more, folder=folder) or run.Run(folder, None, (), report),
    )
    code, _, err = run_cli(capsys, "run", tmp_path / "manifest.json")
    assert code == 0 and "made with other versions: torch" in err
    assert seen["folder"].as_posix() == f"outputs/{tmp_path.name}-again" and seen["manifest"] == manifest


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (WeaverError("this is\nwrong"), 2, "weaver: this is wrong\n"),
        (KeyboardInterrupt(), 130, f"weaver: interrupted; {RESUMED}\n"),
        (OSError("disk full"), 1, "weaver: unexpected OSError: disk full (--traceback shows where)\n"),
    ],
    ids=["bad input", "interrupted", "unexpected"],
)
def test_how_a_run_ends(capsys, monkeypatch, job_file, error, code, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(run, "run_job", fail)
    assert run_cli(capsys, "run", job_file) == (code, "", message)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_to_end_is_an_exception_for_the_run(capsys, monkeypatch, job_file, name, code):
    number, cleaned = getattr(signal, name), []

    def ended(*args, **kwargs):
        try:
            signal.raise_signal(number)
        except BaseException:
            cleaned.append(signal.getsignal(number))
            raise

    monkeypatch.setattr(run, "run_job", ended)
    before = signal.signal(number, signal.SIG_DFL)  # `nohup` has the tests ignore one of them
    try:
        assert run_cli(capsys, "run", job_file) == (code, "", f"weaver: terminated; {RESUMED}\n")
        assert cleaned == [signal.SIG_DFL] and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_so(capsys, monkeypatch, job_file):
    monkeypatch.setattr(run, "run_job", lambda *a, **k: signal.raise_signal(signal.SIGHUP) or 1 / 0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert run_cli(capsys, "run", job_file)[0] == 1
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_traceback_on_request(capsys, monkeypatch, job_file):
    monkeypatch.setattr(run, "run_job", lambda *a, **k: 1 / 0)
    code, _, err = run_cli(capsys, "run", job_file, "--traceback")
    assert code == 1 and "ZeroDivisionError" in err and "Traceback" in err


ANIMALS = [name for name, card in CONCEPTS.items() if card.kind == "animal"]
GROUNDS = [name for name, card in CONCEPTS.items() if card.kind == "background"]


@pytest.mark.parametrize("count", range(1, len(ANIMALS) + 1))
def test_demo_with_any_number_of_concepts(count):
    job = demo_job(str(count))
    assert len(job.concepts) == count and job.background is not None
    assert all(f"a {spec.word}" in job.prompt for spec in job.concepts)
    assert job.prompt.endswith(f"{job.background.word} background")


@pytest.mark.parametrize("there", [False, True], ids=["no GPU", "a GPU"])
def test_a_server_is_started_where_concepts_will_train_at_once(there, monkeypatch, tiny_pipe):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    whole, pipe = demo_job(), load_pipeline()
    alone, shipped = demo_job("1", "none"), with_shipped_concepts(whole)
    assert not cli._trains_apart(alone) and not cli._trains_apart(shipped)
    for device in ("auto", "cpu", "cuda"):
        kind = {"auto": "cuda" if there else "cpu"}.get(device, device)
        for job, of in ((whole, pipe), (replace(whole, model="a/folder"), tiny_pipe)):
            assert cli._trains_apart(replace(job, device=device)) == (worker_count(of, device=kind) > 1)


def test_demo_with_named_concepts():
    job = demo_job(f"{ANIMALS[2]}, {ANIMALS[0]}", GROUNDS[1])
    assert [spec.name for spec in job.everyone] == [ANIMALS[2], ANIMALS[0], GROUNDS[1]]
    words = [CONCEPTS[name].word for name in (ANIMALS[2], ANIMALS[0], GROUNDS[1])]
    assert job.prompt == "a {} and a {}, {} background".format(*words)
    assert demo_job(None, "none").background is None
    assert demo_job(None, "none").prompt == demo_job().prompt


def test_quick_takes_the_files_that_ship():
    job = with_shipped_concepts(demo_job())
    assert [spec.file for spec in job.everyone] == [f"embedded:{spec.name}" for spec in demo_job().everyone]
    assert job.prompt == demo_job().prompt


@pytest.mark.parametrize(
    ("concepts", "background", "message"),
    [
        ("0", None, "--concepts: 0 asked for, 1 to"),
        ("99", None, "--concepts: 99 asked for"),
        ("unicorn", None, "--concepts: no animal 'unicorn' ships"),
        ("²", None, "--concepts: no animal '²' ships"),
        ("", None, "--concepts: no animal '' ships"),
        (f"{ANIMALS[0]},{ANIMALS[0]}", None, "--concepts: the same concept twice"),
        (None, "moon", "--background: no background 'moon' ships"),
    ],
)
def test_demo_with_what_does_not_ship(concepts, background, message):
    with pytest.raises(WeaverError, match=message):
        demo_job(concepts, background)


def test_an_estimate_as_a_table_and_as_json(capsys, job_file):
    code, out, err = run_cli(capsys, "estimate", job_file, "--offline")
    assert code == 0 and err == "" and out.count("<- peak") == 1
    assert out.startswith("on cpu in float32, features on the device:\n")
    code, out, _ = run_cli(capsys, "estimate", job_file, "--device", "cuda", "--max-memory", "1GB", "--json")
    found = json.loads(out)
    assert code == 0 and found["device"] == "cuda" and found["peak"]["bytes"] < 10**9
    assert found["stages"][found["peak"]["stage"]]["total"] == found["peak"]["bytes"]
    assert sum(found["stages"]["fusion"]["parts"].values()) == found["stages"]["fusion"]["total"]


def test_a_run_that_can_not_fit_is_refused_in_one_line(capsys, tmp_path, job_file):
    code, out, err = run_cli(capsys, "run", job_file, "--max-memory", "800 kB", "--out", tmp_path / "out")
    assert code == 2 and out == "" and err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert f"{job_file}: a run takes" in err and "in its stage 'fusion'" in err and "raise --max-memory to" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_without_a_gpu_are_refused_in_one_line(capsys, tmp_path):
    code, out, err = run_cli(capsys, "demo", "--quick", "--graphs", "--out", tmp_path / "out")
    assert code == 2 and out == "" and not (tmp_path / "out").exists()
    assert err == "weaver: demo: device: graphs need a CUDA device, the U-Net is on cpu\n"


def test_max_memory_is_handed_on_as_a_plan(capsys, monkeypatch, job_file):
    seen = {}
    report = {"concepts": {}, "total_seconds": 1}
    monkeypatch.setattr(run, "run_job", lambda job, folder, **o: seen.update(o) or run.Run(folder, None, (), report))
    code, out, _ = run_cli(capsys, "run", job_file, "--max-memory", "12GiB")
    assert code == 0 and str(seen["memory"]) == "features on the device" and out.startswith("at most ")
    assert run_cli(capsys, "run", job_file)[0] == 0 and seen["memory"] is None


@pytest.mark.parametrize("fit", [True, False])
def test_graphs_that_do_not_fit_are_left_out_and_it_is_told(capsys, monkeypatch, job_file, fit):
    seen, asked, report = {}, {}, {"concepts": {}, "total_seconds": 1}
    monkeypatch.setattr(run, "run_job", lambda job, folder, **o: seen.update(o) or run.Run(folder, None, (), report))
    found = estimate.Estimate("cuda", "float16", MemoryPlan(), fit, {"fusion": Peak(7)})
    monkeypatch.setattr(estimate, "fit_job", lambda job, limit, **options: asked.update(options) or found)
    code, out, _ = run_cli(capsys, "run", job_file, "--graphs", "--max-memory", "1GB")
    assert code == 0 and asked["graphs"] is True and seen["graphs"] is fit
    told = "steps in CUDA graphs" if fit else "no CUDA graphs, which do not fit"
    assert out.splitlines()[0] == f"at most 7 B on cuda, in fusion: features on the device, {told}"
    assert run_cli(capsys, "run", job_file, "--graphs")[0] == 0 and seen["graphs"] is True


@pytest.mark.parametrize("size", ["12 parsecs", "-1GB", "", "GB"])
def test_what_is_no_amount_of_memory(capsys, job_file, size):
    with pytest.raises(SystemExit) as caught:
        cli.main(["estimate", str(job_file), f"--max-memory={size}"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and "--max-memory" in err and "is no amount of memory" in err and err.count("\n") == 1


def test_a_model_that_is_not_there_is_told_by_its_field(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "job.yaml"
    path.write_text('model: nobody/nothing\nprompt: "a cat"\nconcepts: [{file: "embedded:pug"}]\n')
    code, out, err = run_cli(capsys, "estimate", path, "--offline")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"{path}: model: 'nobody/nothing' can't be loaded; it is not complete in the local cache" in err


def test_a_fresh_process_tells_a_mistake_in_one_line():
    """What the libraries have to say when they are imported stays off the terminal too."""
    given = [sys.executable, "-m", "weaver", "demo", "--concepts", "bogus"]
    clean = {key: value for key, value in os.environ.items() if not key.endswith("_VERBOSITY")}
    ended = subprocess.run(given, env=clean, capture_output=True, text=True)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith("weaver: --concepts: no animal 'bogus' ships") and ended.stderr.count("\n") == 1
