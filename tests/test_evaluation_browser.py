"""The report in a real browser, where there is one: it shows its pictures, and its boxes work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from PIL import Image

from weaver.evaluation.arms import ARMS, FULL, default_settings
from weaver.evaluation.prompts import Case
from weaver.evaluation.report import write_report
from weaver.evaluation.results import Results, summarise
from weaver.evaluation.runner import picture_path, template_path
from weaver.evaluation.suite import suite

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = """<script>
const images = [...document.images];
const seen = images.filter(i => i.complete && i.naturalWidth >= 64).length;
const shown = () => [...document.querySelectorAll('.case')].filter(c => c.offsetHeight > 0).length;
const counts = [shown()];
document.getElementById('failed').click(); counts.push(shown());
document.querySelector('.filter input[name=group]').click(); counts.push(shown());
const wide = document.documentElement.scrollWidth <= window.innerWidth;
document.title = `images ${seen} of ${images.length}; cases ${counts}; fits ${wide}`;
</script>"""


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("WEAVER_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}, or name it by WEAVER_BROWSER")
    return found


def measured(right: bool) -> dict:
    concept = {"kind": "animal", "present": True, "right": right, "leaked": False}
    concept |= {"own": 0.9, "base": 0.1, "others": 0.1}
    return {"concepts": [{"name": n, **concept} for n in ("pug", "tuxedo-cat")], "edge_iou": 0.5, "mask_iou": 0.9,
            "background_psnr": 21.0}  # fmt: skip


def test_the_report_shows_its_pictures_and_its_boxes_work(browser, tmp_path):
    """Three cases of two groups, of which one fails."""
    groups = ("two", "two", "touching")
    of = [[p for p in suite() if p.group == group][place] for place, group in enumerate(groups)]
    cases, arms = [Case(prompt, 0) for prompt in of], {arm.name: arm.settings(default_settings()) for arm in ARMS}
    records = []
    for number, case in enumerate(cases):
        template_path(tmp_path, case.name).parent.mkdir(parents=True)
        for path in [template_path(tmp_path, case.name), *(picture_path(tmp_path, case.name, arm) for arm in arms)]:
            Image.new("RGB", (64, 64), (60 * number, 120, 200)).save(path)
        found = {arm: measured(right=arm != FULL or number != 1) for arm in arms}
        records.append({"case": case.name, "template": "made", "arms": found})
    results = Results(tuple(cases), tuple(records), arms, 2)
    page = write_report(tmp_path, results, summarise(results))
    page.write_text(page.read_text(encoding="utf-8").replace("</html>", f"{PROBE}</html>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    done = subprocess.run(
        [browser, *options, "--window-size=1500,900", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    images = len(cases) * (len(arms) + 1) + 4  # and a picture of each concept that is drawn
    assert re.fullmatch(r"images (\d+) of \1; cases 3,1,0; fits true", title[1]), title[1]
    assert int(title[1].split()[1]) >= images
