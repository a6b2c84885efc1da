"""Draw and measure many cases: in several processes, each case once, what is finished kept for the next call."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from weaver.apart import call_all
from weaver.concepts.concept import Concept
from weaver.embedded import concept_hashes, concept_path, load_pipeline, model_hash
from weaver.embedded.identity import IDENTITY_FILE
from weaver.embedded.segmenter import SEGMENTER_FILE
from weaver.errors import WeaverError
from weaver.evaluation.drawing import STEPS, Drawer
from weaver.evaluation.measures import Measures, measure
from weaver.evaluation.prompts import Case, Prompt
from weaver.evaluation.settings import Settings
from weaver.folder import whole_file, writing_alone
from weaver.hashing import file_hash
from weaver.models import quiet_libraries
from weaver.progress import Stages

__all__ = [
    "SECONDS",
    "alone",
    "case_path",
    "drawer_for",
    "expected_minutes",
    "identity",
    "made_with",
    "measured",
    "one_thread",
    "picture_path",
    "run_cases",
    "template_path",
]

SECONDS = {"template": 3.9, "merged": 1.6, "prompt": 0.1, "mixed": 4.8, "fused": 2.7}
"""Of one core (an Intel Xeon 6) in 24 steps: a case's template with its inversion and features, and a picture of each
kind with its measures."""
_WAIT = 1.0  # seconds
_SOURCES = Path(__file__).parents[1]
_NOT_DRAWING = (
    "commands",
    "cli.py",
    "embedded/training",
    *(f"evaluation/{name}.py" for name in ("arms", "bootstrap", "charts", "field", "report", "results")),
    *(f"evaluation/{name}.py" for name in ("suite", "sweep")),
)


def expected_minutes(
    cases: int, drawn: Sequence[Settings], processes: int, *, times: int = 1, steps: int = STEPS
) -> float:
    """About how long it takes with a quiet core for each process.

    Settings that are equal are drawn once; in a sweep every one of them is drawn so many `times`, each arm with
    templates of its own.
    """
    settings = list(dict.fromkeys(drawn)) if times == 1 else drawn
    templates = 1 if times == 1 else len(drawn)
    each = templates * SECONDS["template"] + times * sum(SECONDS[one.kind] for one in settings)
    return cases * each * steps / STEPS / processes / 60


def run_cases(
    folder: Path,
    cases: Sequence[Case],
    arms: Mapping[str, Settings],
    *,
    processes: int = 1,
    steps: int = STEPS,
    stages: Stages | None = None,
) -> list[dict]:
    """Every case's record, in order: drawn and measured now, or before.

    A case is finished when its `case.json` is there, was made of the same model, concepts, steps and code, and holds
    every arm with the same settings; else what is missing is made. So an interrupted run goes on where it was, and arms
    that are not asked for stay. Processes that work in one folder wait for each other.

    Parameters
    ----------
    folder : gets `cases/<case>/` with `template.png`, `<arm>.png` and `case.json`
    arms : the settings of each arm by its name; arms of equal settings have one picture
    processes : how many work at once, each on one core; more than one are started afresh
    steps : of template, inversion and fusion

    Raises `WeaverError` while another evaluation works in the folder.

    Returns mappings: "case", "steps", "template" ("made" or "drawn"), and "arms", of each what `Measures` holds.
    """
    stages = stages or Stages(bars=False)
    jobs = [(folder / "cases" / case.name, case, dict(arms), steps) for case in cases]
    with alone(folder):
        waiting = [job for job in jobs if _finished(*job) is None]
        waiting.sort(key=lambda job: -_count(job[1].prompt))  # what takes longest first: cores end at about one time
        total = len(waiting) * len(arms)
        with stages.bar("drawing", total or 1, left=True) as move:
            call_all(_run_case, waiting, move, total, processes)
        return [_finished(*job) for job in jobs]


def identity(case: Case, arms: Mapping[str, Settings], steps: int) -> str:
    """SHA-256 of all that a case's record follows from."""
    names = {*case.prompt.concepts, *([case.prompt.background] if case.prompt.background else [])}
    told = {
        "case": asdict(case),
        "arms": {name: settings.as_mapping() for name, settings in arms.items()},
        "steps": steps,
        "concepts": concept_hashes(names),
        **made_with(),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only evaluation in a folder; raises `WeaverError` while another one is."""
    with ExitStack() as held:
        try:
            held.enter_context(writing_alone(folder, wait=_WAIT))
        except (OSError, NotImplementedError) as error:
            raise WeaverError(
                f"out: {folder} can't be locked ({error}): wait for the other evaluation there, or name another"
            ) from error
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread within the block: ten times faster than on two of a busy machine, the same numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawer_for(case: Case, *, steps: int = STEPS) -> Drawer:
    """What draws a case, with this process's model and concepts."""
    names = [*case.prompt.concepts, *([case.prompt.background] if case.prompt.background else [])]
    return Drawer(_pipeline(), case, {name: _concept(name) for name in names}, steps)


def measured(drawer: Drawer, settings: Settings, image: Image.Image) -> Measures:
    """The measures of a case's picture by some settings, against its template where it was to keep that."""
    prompt, template = drawer.case.prompt, drawer.template
    kept = {"template": template.picture, "masks": template.masks} if settings.has_template else {}
    return measure(image, prompt.animals, prompt.text, background=prompt.background, **kept)


def template_path(folder: Path, case: str) -> Path:
    """A case's template."""
    return folder / "cases" / case / "template.png"


def case_path(folder: Path, case: str) -> Path:
    """A case's record, which is there when the case is finished."""
    return folder / "cases" / case / "case.json"


def picture_path(folder: Path, case: str, arm: str) -> Path:
    """A case's picture by an arm."""
    return folder / "cases" / case / f"{arm}.png"


@cache
def made_with() -> dict:
    """SHA-256 of the model, its helpers and the code, and the library's version: figures of one table are of one."""
    return {
        "model": model_hash(),
        "identity": file_hash(IDENTITY_FILE),
        "segmenter": file_hash(SEGMENTER_FILE),
        "torch": torch.__version__,
        "code": _code_hash(),
    }


def _code_hash() -> str:
    """SHA-256 of the code that draws and measures, without what it says of itself: one table is of one code."""
    digest = hashlib.sha256()
    for package in (_SOURCES, _SOURCES.parent / "weaver_kernels"):
        for path in sorted(package.rglob("*.py")):
            name = path.relative_to(package).as_posix()
            if not name.startswith(_NOT_DRAWING):
                digest.update(f"{package.name}/{name}\n{_without_comments(path.read_bytes())}".encode())
    return digest.hexdigest()


def _without_comments(source: bytes) -> str:
    """What a module does: its syntax, without comments, docstrings and other strings that stand by themselves."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_text(one)]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _kept(folder: Path, case: Case, steps: int) -> dict[str, dict]:
    """What of a case's record is of the same origin and whole, by arm, each with its settings' identity ("of")."""
    try:
        record = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        arms = record["arms"] if record["identity"] == identity(case, {}, steps) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {arm: found for arm, found in arms.items() if (folder / f"{arm}.png").is_file()}


def _finished(folder: Path, case: Case, arms: Mapping[str, Settings], steps: int) -> dict | None:
    """The record of a case, of these arms alone, where it is there, whole and of the same origin."""
    kept = _kept(folder, case, steps)
    same = all(kept.get(arm, {}).get("of") == _of(case, settings, steps) for arm, settings in arms.items())
    if not same or not (folder / "template.png").is_file():
        return None
    record = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    return record | {"arms": {arm: {k: v for k, v in kept[arm].items() if k != "of"} for arm in arms}}


def _of(case: Case, settings: Settings, steps: int) -> str:
    """SHA-256 of all that one picture follows from."""
    return identity(case, {"": settings}, steps)


@cache
def _pipeline():
    """This process's model."""
    quiet_libraries()
    return load_pipeline()


@cache
def _concept(name: str) -> Concept:
    return Concept.load(concept_path(name))


def _run_case(folder: Path, case: Case, arms: dict[str, Settings], steps: int, move) -> None:
    """Draw and measure what is missing of one case. Its record has what is whole: each arm after its picture."""
    with one_thread():
        drawer, known, of = drawer_for(case, steps=steps), {}, {arm: _of(case, arms[arm], steps) for arm in arms}
        kept = _kept(folder, case, steps)
        found = {arm: told for arm, told in kept.items() if arm not in of or told.get("of") == of[arm]}
        record = {"case": case.name, "identity": identity(case, {}, steps), "steps": steps}
        record["template"] = drawer.template.source
        record["arms"] = found
        _write(record, folder / "case.json")
        _save(drawer.template.picture, folder / "template.png")
        for number, (arm, settings) in enumerate(arms.items(), start=1):
            if arm not in found:
                if settings not in known:
                    image = drawer.draw(settings)
                    known[settings] = image, asdict(measured(drawer, settings, image)) | {"of": of[arm]}
                image, measures = known[settings]
                _save(image, folder / f"{arm}.png")
                found[arm] = measures
                _write(record, folder / "case.json")
            move(number, len(arms))


def _count(prompt: Prompt) -> int:
    """How many concepts are drawn."""
    return len(prompt.concepts) + bool(prompt.background)


def _write(record: Mapping, path: Path) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _save(image: Image.Image, path: Path) -> None:
    with whole_file(path) as partial:
        image.save(partial, format="PNG")
