"""The app as people and programs meet it: a browser, a client, a wrong start; and HTML that no string can break."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import urlsplit

import music21
import pytest
import torch
from PIL import Image

from vitomr.decoder import READERS, Reader, save_reader
from vitomr.notation.lmx import linearise, to_musicxml
from vitomr.notation.score import parts, read_score
from vitomr.transcribe import PACKAGED, SUFFIXES

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCAN = EXAMPLES / "bach-invention-1-scan-1.png"
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update"]
BARS = re.compile(r"\b(\d+) bars?\b")


def environment(folder: Path, **more: str) -> dict[str, str]:
    "The environment without what a developer may have set for the app."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VITOMR_", "GRADIO_"))}
    return {**kept, "GRADIO_TEMP_DIR": str(folder / "gradio"), **more}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    "A running app with the packaged weights, or with random ones where there are none."
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = environment(folder, GRADIO_SERVER_PORT=str(port))
    if not (PACKAGED / "model.safetensors").is_file():
        torch.manual_seed(0)
        save_reader(Reader(READERS["tiny"]), folder / "weights")
        env |= {"VITOMR_WEIGHTS": str(folder / "weights"), "VITOMR_MAX_TOKENS": "120"}
    log = folder / "log.txt"
    with log.open("w") as out:
        app = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield wait(f"http://127.0.0.1:{port}", app, log)
    finally:
        app.terminate()
        app.wait(20)
    assert "Traceback" not in log.read_text(), log.read_text()[-4000:]


def wait(url: str, app: subprocess.Popen, log: Path) -> str:
    "The address, once something answers there."
    for _ in range(600):
        assert app.poll() is None, f"app.py ended with {app.returncode}\n{log.read_text()[-4000:]}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return url
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"app.py does not answer after two minutes\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "blank.png"
    Image.new("L", (800, 300), 255).save(path)
    return path


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("no browser to test the app in; install one: apt-get update && apt-get install -y chromium")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=CHROMIUM)
        yield browser
        browser.close()


class Visit:
    "A page that remembers whom it asked and what it complained about."

    def __init__(self, browser, url: str, **context):
        self.hosts, self.complaints = set(), []
        self.page = browser.new_context(**context).new_page()
        self.page.set_default_timeout(90_000)
        self.page.on("request", lambda r: self.hosts.add(urlsplit(r.url).hostname))  # None for data: and blob:
        self.page.on("console", lambda m: m.type == "error" and self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.goto(url)
        self.page.wait_for_selector("#picture input[type=file]", state="attached")

    def read(self, picture: Path, kind: str = "done") -> str:
        "Hand in a picture; the status line at the end."
        self.page.set_input_files("#picture input[type=file]", picture)
        self.page.wait_for_selector(f".status.{kind}")
        return self.page.inner_text(".status")

    def leave(self) -> None:
        assert self.hosts <= {"127.0.0.1", None}, f"the page asked {self.hosts}"
        assert not self.complaints, self.complaints
        self.page.context.close()


@pytest.fixture
def visit(chromium, url):
    found = Visit(chromium, url)
    yield found
    found.leave()


def test_picture_in_score_out(visit, tmp_path):
    status, page = visit.read(SCAN), visit.page
    assert page.locator("#score svg").first.bounding_box()["width"] > 300
    assert page.locator("#score svg g.measure").count() == page.locator("#tokens .bars > li").count()
    for suffix in ("musicxml", "midi", "mxl", "lmx", "svg"):
        with page.expect_download() as download:
            page.click(f"#download-{suffix}")
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert path.stem == SCAN.stem and path.suffix in SUFFIXES and path.stat().st_size
    score = music21.converter.parse(tmp_path / f"{SCAN.stem}.musicxml")
    n_bars = len(score.parts[0].getElementsByClass("Measure"))
    assert n_bars == int(BARS.search(status)[1]) == page.locator("#score svg g.measure").count()
    assert (tmp_path / f"{SCAN.stem}.mid").read_bytes().startswith(b"MThd")


def test_error_is_one_line_and_the_next_picture_is_read(visit, blank, tmp_path):
    visit.read(SCAN)
    assert "no staff lines" in visit.read(blank, "error")
    assert visit.page.locator("#score svg").count() == 0
    assert not visit.page.is_visible("#results")
    no_picture = tmp_path / "words.png"
    no_picture.write_text("not a picture")
    assert "\n" not in visit.read(no_picture, "error")
    visit.page.get_by_role("button", name="Schubert, voice").click()
    visit.page.wait_for_selector(".status.done")
    assert visit.page.is_visible("#score svg") and visit.page.is_visible("#download-musicxml")
    visit.page.get_by_label("Remove Image").click()
    visit.page.wait_for_selector(".status.idle")
    assert not visit.page.is_visible("#results")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(chromium, url, scheme):
    "390 px: nothing makes the page scroll sideways, and the notes are black on white."
    phone = Visit(chromium, url, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    phone.read(SCAN)
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    style = "e => [getComputedStyle(e).color, getComputedStyle(e.closest('.sheet')).backgroundColor]"
    ink = phone.page.locator("#score svg g.staff path").first.evaluate(style)
    assert ink == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    phone.leave()


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    from gradio_client import Client

    return Client(url, verbose=False, analytics_enabled=False, download_files=tmp_path_factory.mktemp("client"))


def test_client_gets_growing_scores_and_files(client):
    from gradio_client import handle_file

    described = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
    assert [p["parameter_name"] for p in described["/transcribe"]["parameters"]] == ["picture"]
    job = client.submit(picture=handle_file(SCAN), api_name="/transcribe")
    status, picture, score, tokens, *files = job.result(timeout=90)
    bars = [int(found[1]) for out in job.outputs() if (found := BARS.search(out[0]))]
    assert len(bars) > 1 and bars == sorted(bars)
    assert "<svg" in score and "measure" in tokens
    assert Image.open(picture).size[0] > 300
    assert {Path(f).suffix for f in files} == set(SUFFIXES)
    assert len(music21.converter.parse(files[0]).parts[0].getElementsByClass("Measure")) == bars[-1]


def test_client_gets_the_error_line(client, blank):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="no staff lines") as e:
        client.predict(picture=handle_file(blank), api_name="/transcribe")
    assert "\n" not in str(e.value)


def test_missing_weights_are_one_line(tmp_path):
    env = environment(tmp_path, VITOMR_WEIGHTS=str(tmp_path / "nowhere"))
    done = subprocess.run([sys.executable, "app.py"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(r"app\.py: .*nowhere.*\n", done.stderr), done.stderr


@pytest.fixture(scope="module")
def app():
    "The module app.py, loaded without starting anything."
    spec = importlib.util.spec_from_file_location("app", ROOT / "app.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        spec.loader.exec_module(module)
    return module


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "</span><script>alert(1)</script>",
    "&lt;b&gt;",
    "${7*7}",
    "'",
]


def test_html_escapes_every_string(app):
    tokens = [*HOSTILE, "measure", *HOSTILE]
    shown = ET.fromstring(f"<div>{app.tokens_html(tokens, [-0.1 * i for i in range(len(tokens))])}</div>")
    assert {e.tag for e in shown.iter()} == {"div", "p", "ol", "li", "span"}
    assert [e.text for e in shown.iterfind("ol/li/span")] == tokens
    assert {k for e in shown.iter() for k in e.keys()} == {"class", "title", "tabindex"}
    for text in HOSTILE:
        status = ET.fromstring(app.status_html("error", text))
        assert (status.text, status.keys(), len(status)) == (text, ["class", "role"], 0)


def test_hostile_tokens_leave_no_trace_in_the_engraving(app):
    score = to_musicxml(["measure", *HOSTILE, "C4", "quarter"])
    svg = app.sheet_html(app.render_svg(score, options={"svgViewBox": True}))
    assert "alert" not in svg and "<script" not in svg


def test_examples_carry_their_truth(app):
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(app.EXAMPLES) == {p.stem for p in EXAMPLES.glob("*.png")}
    for name in app.EXAMPLES:
        assert f"| {name} |" in listed
        assert all((EXAMPLES / (name + suffix)).stat().st_size < 300_000 for suffix in (".png", ".lmx", ".musicxml"))
        (part,) = parts(read_score(EXAMPLES / f"{name}.musicxml"))
        assert linearise(part.element).tokens == (EXAMPLES / f"{name}.lmx").read_text().split()
