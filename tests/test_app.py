"""The app as people and programs meet it: a browser, a client, a wrong start; and HTML that no string can break."""

import asyncio
import base64
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
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import music21
import numpy as np
import pypdfium2
import pytest
import torch
from PIL import Image, ImageDraw

from vitomr import views
from vitomr.decoder import READERS, Reader, save_reader
from vitomr.mae import MAE, MAES, save_mae
from vitomr.notation.finish import SUFFIXES
from vitomr.notation.lmx import linearise
from vitomr.notation.metrics import bars_that_add_up, errors_by_kind, symbol_error_rate
from vitomr.notation.musicxml import to_musicxml
from vitomr.notation.reference import tokens_of_parts
from vitomr.notation.score import parts, read_score, root_of
from vitomr.page import staves
from vitomr.reading.choices import Decoding, choice_of, control_of
from vitomr.reading.weights import PACKAGED
from vitomr.rewards import PRESETS, TERMS, Breakdown, reward, reward_of_score
from vitomr.transcribe import Transcriber

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCAN = EXAMPLES / "bach-invention-1-scan-1.png"
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update"]
CHROMIUM += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera that sees no music
BARS = re.compile(r"\b(\d+) bars?\b")


def environment(folder: Path, **more: str) -> dict[str, str]:
    "The environment without what a developer may have set for the app."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VITOMR_", "GRADIO_"))}
    return {**kept, "GRADIO_TEMP_DIR": str(folder / "gradio"), **more}


@contextmanager
def served(folder: Path, **more: str):
    "A running app with the packaged weights, or with random ones where there are none."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = environment(folder, GRADIO_SERVER_PORT=str(port), **more)
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


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "The folder of the app; uploads go to gradio in it."
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def url(home):
    "The app with a small masked autoencoder that has learned nothing."
    torch.manual_seed(0)
    save_mae(MAE(MAES["smoke"]), home / "mae")
    with served(home, VITOMR_MAE=str(home / "mae")) as found:
        yield found


def wait(url: str, app: subprocess.Popen, log: Path) -> str:
    "The address, once something answers there."
    for _ in range(3000):
        assert app.poll() is None, f"app.py ended with {app.returncode}\n{log.read_text()[-4000:]}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return url
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"app.py does not answer after ten minutes\n{log.read_text()[-4000:]}")


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


SETTLED = """(quiet) => new Promise(done => {
    let waiting
    const watched = new MutationObserver(() => wait())
    const end = () => { clearTimeout(waiting); watched.disconnect(); done() }
    const wait = () => { clearTimeout(waiting); waiting = setTimeout(end, quiet) }
    watched.observe(document.body, {childList: true, subtree: true, characterData: true})
    setTimeout(end, 5000)
    wait()
})"""


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

    def wait(self, selector: str) -> None:
        "Until it is there, and the page has stopped changing: the outputs of one event appear one after the other."
        self.page.wait_for_selector(selector)
        self.page.evaluate(SETTLED, 300)

    def again(self) -> None:
        "From now on, the status line that stands there is an old one."
        self.page.evaluate("document.querySelector('#status p')?.setAttribute('data-old', '')")

    def read(self, picture: Path, kind: str = "done") -> str:
        "Hand in a picture; the status line at the end."
        self.again()
        self.page.set_input_files("#picture input[type=file]", picture)
        self.wait(f"#status p.{kind}:not([data-old])")
        return self.page.inner_text("#status .status")

    def fold(self, name: str) -> None:
        self.page.locator("button.label-wrap", has_text=name).click()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def example(self, name: str) -> list[str]:
        "Pick an example; the tokens that were read."
        self.again()
        self.page.get_by_role("button", name=name).click()
        self.wait("#status p.done:not([data-old])")
        return self.tokens()

    def tokens(self) -> list[str]:
        if not self.page.locator("#tokens .bars").count():  # what is folded is not drawn
            self.fold("The tokens that the model wrote")
            self.wait("#tokens .bars")
        return self.page.locator("#tokens .bars .lmx").all_inner_texts()

    def boxes(self, selector: str) -> list[dict]:
        return [e.bounding_box() for e in self.page.locator(selector).all()]

    def total(self, expected: float) -> None:
        "The total of the reward, once it is the expected one."
        shown = f"{round(expected, 3) + 0.0:.3f}".replace("-", "\N{MINUS SIGN}")
        self.page.locator("#earned tfoot td:nth-child(6)").get_by_text(shown, exact=True).wait_for()

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
    visit.tokens()
    assert page.locator("#score svg").first.bounding_box()["width"] > 300
    assert page.locator("#score svg g.measure").count() == page.locator("#tokens .bars > li").count()
    for suffix in ("musicxml", "mxl", "mid", "pdf", "svg", "lmx"):
        with page.expect_download() as download:
            page.click(f"#download-{suffix}")
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert path.stem == SCAN.stem and path.suffix in SUFFIXES and path.stat().st_size
    score = music21.converter.parse(tmp_path / f"{SCAN.stem}.musicxml")
    n_bars = len(score.parts[0].getElementsByClass("Measure"))
    assert n_bars == int(BARS.search(status)[1]) == page.locator("#score svg g.measure").count()
    assert (tmp_path / f"{SCAN.stem}.mid").read_bytes().startswith(b"MThd")
    (printed,) = pypdfium2.PdfDocument(tmp_path / f"{SCAN.stem}.pdf")
    assert [round(x) for x in printed.get_size()] == [595, 842] and printed.render().to_numpy().min() < 128


def test_error_is_one_line_and_the_next_picture_is_read(visit, blank, tmp_path):
    visit.read(SCAN)
    assert "no staff lines" in visit.read(blank, "error")
    assert visit.page.locator("#score .sheet").count() == 0
    assert not visit.page.is_visible("#results")
    no_picture = tmp_path / "words.png"
    no_picture.write_text("not a picture")
    assert "\n" not in visit.read(no_picture, "error")
    visit.page.click("#over")  # back to the first screen, where the examples are
    visit.page.wait_for_selector(".examples")
    assert not visit.page.is_visible("#results")
    visit.example("Schubert, voice")
    assert visit.page.is_visible("#score svg") and visit.page.is_visible("#download-musicxml")


def test_reward_of_an_example(visit):
    "Measured once under the preset, then at once under other presets and weights."
    page, true = visit.page, (EXAMPLES / "schumann-rosen-voice.lmx").read_text().split()
    pred = visit.example("Schumann, voice")
    visit.tab("Reward")
    page.wait_for_selector("#earned .terms")
    expected = {preset: reward(pred, true, preset, terms=TERMS) for preset in PRESETS}
    visit.total(expected["vitomr"].total)
    raw = page.locator("#earned tbody td:nth-child(3)").all_inner_texts()
    assert dict(zip(TERMS, map(float, raw))) == pytest.approx(expected["vitomr"].raw, abs=6e-4)
    errors = page.locator("#errors tbody tr").all_inner_texts()
    assert {k: int(n) for k, n in (e.split("\t") for e in errors)} == errors_by_kind(pred, true)
    assert f"{100 * symbol_error_rate(pred, true):.1f} %" in page.inner_text("#errors")
    page.get_by_role("radio", name="acai-code").click()
    visit.total(expected["acai-code"].total)
    page.locator("#weight-TED input[type=range]").fill("2")
    visit.total(expected["acai-code"].reweighted({"TED": 2}).total)
    page.locator("#weight-MCR input[type=number]").fill("5")
    visit.total(expected["acai-code"].reweighted({"TED": 2, "MCR": 5}).total)
    page.get_by_role("radio", name="notes").click()
    visit.total(expected["notes"].total)


def test_reference_of_a_picture_of_ones_own(visit, tmp_path):
    "None at first, then a file; a bad one is one line, and a new picture forgets it."
    page, reference = visit.page, "#reference input[type=file]"
    visit.read(SCAN)
    pred = visit.tokens()
    visit.tab("Reward")
    page.wait_for_selector("#earned .hint.idle")
    assert "musicxml" in page.inner_text("#earned") and not page.is_visible("#weights")
    bad = tmp_path / "<b>reference<b>.lmx"
    bad.write_text("measure <img src=x onerror=alert(1)>")
    page.set_input_files(reference, bad)
    page.wait_for_selector("#earned .hint.error")
    assert "\n" not in page.inner_text("#earned").strip() and "unknown LMX token" in page.inner_text("#earned")
    assert page.locator("#earned img").count() == 0 and not page.is_visible("#weights")
    page.locator("#reference").get_by_label("Clear").click()
    page.wait_for_selector("#earned .hint.idle")
    page.set_input_files(reference, SCAN.with_suffix(".musicxml"))
    page.wait_for_selector("#earned .terms")
    visit.total(reward(pred, SCAN.with_suffix(".lmx").read_text().split()).total)
    assert page.locator("#diff .sheet").count() == 2 and page.locator("#diff .note[fill]").count() > 5
    visit.tab("Transcribe")
    visit.read(EXAMPLES / "schumann-rosen-voice.png")
    visit.tab("Reward")
    page.wait_for_selector("#earned .hint.idle")


def test_a_page_is_compared_with_its_whole_score(visit, tmp_path):
    page = visit.page
    visit.example("Bach, the whole page")
    with page.expect_download() as download:
        page.click("#download-lmx")
    download.value.save_as(tmp_path / "read.lmx")
    read = [line.split() for line in (tmp_path / "read.lmx").read_text().splitlines()]
    true = read_score(EXAMPLES / "pages" / "bach-invention-1.musicxml")
    visit.tab("Reward")
    page.wait_for_selector("#earned .terms")
    visit.total(reward_of_score(read, true).total)
    assert f"for {len(tokens_of_parts(true)[0])} token" in page.inner_text("#errors")
    assert page.locator("#diff .sheet").count() == 2


def test_a_bar_lights_up_on_both_sides(visit):
    "By pointer on either side, by keyboard, and again to put it out."
    page = visit.page
    visit.example("Schubert, voice")
    lit = "[...document.querySelectorAll('#score .lit')].map(e => "
    lit += "[e.closest('.paper, .sheet').className.split(' ')[0], e.dataset.bar])"
    both = lambda n: [["paper", str(n)], ["sheet", str(n)]]
    page.locator("#score polygon.bar").nth(2).click()
    assert sorted(page.evaluate(lit)) == both(2)
    page.locator("#score g.measure .glass").nth(0).click(position={"x": 5, "y": 5})
    assert sorted(page.evaluate(lit)) == both(0)
    page.locator("#score g.measure").nth(1).focus()
    page.keyboard.press("Enter")
    assert sorted(page.evaluate(lit)) == both(1)
    page.keyboard.press("Enter")
    assert page.evaluate(lit) == []
    outlines = visit.boxes("#score polygon.bar")
    assert len(outlines) == 4 and [b["x"] for b in outlines] == sorted(b["x"] for b in outlines)
    assert "% sure" in page.locator("#score g.note title").first.text_content()


def test_playing_moves_a_highlight(visit):
    page = visit.page
    visit.example("Schubert, voice")
    page.locator(".player .tempo").fill("200")
    page.get_by_role("button", name="Play").click()
    page.wait_for_selector("#score .note.sounding")
    first = page.get_attribute("#score .note.sounding", "id")
    page.wait_for_selector(f"#score .note.sounding:not([id='{first}'])")
    assert page.locator("#score .paper .playing").count() == page.locator("#score .sheet .playing").count() == 1
    page.get_by_role("button", name="Pause").click()
    assert page.locator(".sounding").count() == 0
    page.get_by_role("button", name="Play").click()
    page.wait_for_selector("#score .note.sounding")
    page.get_by_role("button", name="Stop").click()
    assert page.locator(".sounding, .playing").count() == 0


def test_corrections_are_engraved_and_downloaded(visit, tmp_path):
    page = visit.page
    pred = visit.example("Schubert, voice")
    visit.fold("Correct the text")
    visit.wait("#lmx textarea")  # it is drawn when its fold opens
    text = page.locator("#lmx textarea")
    page.wait_for_function("document.querySelector('#lmx textarea').value.includes('measure')")
    before = text.input_value()
    assert before.split() == pred
    text.fill(before + " <b>oops")
    page.click("#apply-lmx")
    visit.wait("#edited .error")
    assert "unknown LMX token '<b>oops'" in page.inner_text("#edited") and visit.tokens() == pred
    text.fill(before + "\nmeasure C4 quarter stem:up")
    page.click("#apply-lmx")
    visit.wait("#edited .done")
    assert visit.tokens() == [*pred, "measure", "C4", "quarter", "stem:up"]
    assert page.locator("#score g.measure").count() == 5
    with page.expect_download() as download:
        page.click("#download-lmx")
    download.value.save_as(tmp_path / "edited.lmx")
    assert (tmp_path / "edited.lmx").read_text().split()[-1] == "stem:up"
    page.get_by_role("tab", name="MusicXML").click()
    xml = page.locator("#xml textarea")
    page.wait_for_function("document.querySelector('#xml textarea').value.includes('<step>C</step>')")
    xml.fill(xml.input_value()[:-30])
    page.click("#apply-xml")
    visit.wait("#edited .error")
    assert "well-formed" in page.inner_text("#edited")


CHOSEN = "#score .sheet .chosen"


def change(visit, key: str) -> None:
    "Press a key and wait for the engraving."
    before = visit.page.evaluate("document.querySelector('#patch .patch')?.dataset.seq ?? '0'")
    visit.page.keyboard.press(key)
    visit.page.wait_for_selector(f"#patch .patch:not([data-seq='{before}'])", state="attached")
    visit.page.wait_for_selector("#score .system:not(.working)")


def test_a_note_is_corrected_with_keys(visit, tmp_path):
    "Pitch, length, taken back and done again; the files follow; what a person types meanwhile stays."
    page = visit.page
    pred = visit.example("Schubert, voice")
    visit.fold("Correct the text")
    visit.wait("#lmx textarea")
    page.wait_for_function("document.querySelector('#lmx textarea').value.includes('measure')")
    at = pred.index("E4")
    page.locator("#score .sheet .note").first.click()
    assert page.locator(CHOSEN).count() >= 1 and page.locator("#score .lit").count() == 2
    assert page.get_attribute("#lmx textarea", "data-row") == "0"  # the row of the bar that is lit
    visit.again()
    change(visit, "ArrowUp")
    assert page.locator(CHOSEN).count() >= 1 and not page.is_disabled("#bench [data-do=undo]")
    visit.wait("#status p.done:not([data-old])")
    assert visit.tokens() == [*pred[:at], "F4", *pred[at + 1 :]]
    page.wait_for_function("document.querySelector('#lmx textarea').value.includes('F4')")
    with page.expect_download() as download:
        page.click("#download-lmx")
    download.value.save_as(tmp_path / "x.lmx")
    assert (tmp_path / "x.lmx").read_text().split()[at] == "F4"
    page.locator("#lmx textarea").press_sequentially("my own words")
    typed = page.locator("#lmx textarea").input_value()
    page.locator("#score .sheet .note").first.click()
    change(visit, "Control+z")
    visit.wait("#editor .kept")  # the reading is another one now, the text is the person's
    assert visit.tokens() == pred and page.locator("#lmx textarea").input_value() == typed
    page.get_by_role("button", name="Take the new text").click()
    assert page.locator("#lmx textarea").input_value().split() == pred


def test_an_example_is_there_after_its_files_were_deleted(visit, home):
    "As after an hour: the picture is read, and its reference score measured."
    visit.example("Schumann, voice")
    for path in (home / "gradio").rglob("*schumann-rosen*"):
        path.unlink()
    visit.page.click("#over")
    visit.example("Schumann, voice")
    visit.tab("Reward")
    visit.page.wait_for_selector("#earned .terms")


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    "Traces, pads and chips: five parallel lines are staves to who looks for staves."
    img, rng = Image.new("L", (1400, 700), 235), np.random.default_rng(1)
    draw = ImageDraw.Draw(img)
    for _ in range(16):
        x, y, n = int(rng.integers(40, 500)), int(rng.integers(40, 600)), int(rng.integers(4, 8))
        for i in range(n):
            draw.line([(x, y + 12 * i), (x + 800, y + 12 * i), (x + 830, y + 12 * i + 30)], fill=40, width=2)
    for x, y in rng.integers((0, 0), (1400, 700), (160, 2)).tolist():
        draw.ellipse([x - 6, y - 6, x + 6, y + 6], fill=30)
    path = tmp_path_factory.mktemp("pictures") / "board.png"
    img.save(path)
    return path


def test_what_is_not_music_is_doubted_before_it_is_read(visit, board):
    said = visit.read(board, "warn")
    assert "does not look like printed music" in said and visit.page.locator("#score g.measure").count() == 0
    assert not visit.page.is_visible("#downloads")
    visit.page.click("#sure")
    visit.wait("#status p.done")
    assert visit.page.locator("#score g.measure").count() > 3


def test_who_comes_second_sees_the_place_and_the_first_may_stop(chromium, url):
    first, second = (Visit(chromium, url) for _ in range(2))
    first.page.get_by_role("button", name="Bach, the whole page").click()
    first.page.wait_for_selector("#original .paper")  # the page and its systems, before anything is read
    assert first.page.locator("#original polygon.system").count() == 6
    second.page.get_by_role("button", name="Schubert, voice").click()
    second.page.get_by_text("One reading is before yours").wait_for()
    first.page.get_by_text("of 6 systems").wait_for()
    first.page.click("#stop")
    first.page.get_by_text("Stopped.").wait_for()
    second.wait("#status p.done")
    first.read(EXAMPLES / "schumann-rosen-voice.png")
    for person in (first, second):
        assert "4 bars" in person.page.inner_text("#status")
        person.leave()


def test_a_new_picture_ends_the_reading_of_the_old_one(visit):
    visit.page.get_by_role("button", name="Bach, the whole page").click()
    visit.page.get_by_text("of 6 systems").wait_for()
    assert "4 bars" in visit.read(EXAMPLES / "schumann-rosen-voice.png")
    visit.page.evaluate(SETTLED, 1500)
    assert "4 bars" in visit.page.inner_text("#status") and visit.page.locator("#score section.system").count() == 1


CONTRAST = """() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m[3] ?? 1] }
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1)
  const behind = (e) => {
    const layers = []
    for (let x = e; x; x = x.parentElement) layers.push(parse(getComputedStyle(x).backgroundColor))
    return layers.reduceRight((below, layer) => over(layer, below), [255, 255, 255, 1])
  }
  const light = (c) => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const found = []
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), e = texts.currentNode.parentElement
    if (!text || !e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue
    if (e.closest("svg, script, style, :disabled, .sr-only") || !e.getClientRects().length) continue
    let opacity = 1
    for (let x = e; x; x = x.parentElement) opacity *= Number(getComputedStyle(x).opacity)
    const below = behind(e), ink = parse(getComputedStyle(e).color)
    ink[3] *= opacity
    const [a, b] = [light(over(ink, below)), light(below)].sort((x, y) => y - x)
    const ratio = (a + 0.05) / (b + 0.05)
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${text.slice(0, 40)}`)
  }
  return found
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(chromium, url, blank, scheme):
    "A contrast of 4.5:1, on the first screen, with an error, with a reading, and in every tab."
    visit = Visit(chromium, url, color_scheme=scheme)
    assert visit.page.evaluate(CONTRAST) == []
    visit.read(blank, "error")
    error = visit.page.eval_on_selector("#status p", "e => getComputedStyle(e).borderLeftColor")
    assert visit.page.evaluate(CONTRAST) == []
    visit.page.click("#over")
    visit.example("Schumann, voice")
    assert visit.page.eval_on_selector("#status p", "e => getComputedStyle(e).borderLeftColor") != error
    visit.fold("Settings")
    visit.fold("Correct the text")
    visit.page.wait_for_selector("#lmx textarea")
    assert visit.page.evaluate(CONTRAST) == []
    for tab, there in (("Reward", "#earned .terms"), ("Under the hood", "#gaze .chosen")):
        visit.tab(tab)
        visit.wait(there)
        assert visit.page.evaluate(CONTRAST) == []
    visit.leave()


def test_draws_are_ranked_and_compared(visit):
    "Three draws: the likeliest is shown, another can be chosen, and the reward sets them side by side."
    page = visit.page
    visit.fold("Settings")
    page.get_by_role("radio", name="Sampling").click()
    page.locator("#temperature input[type=number]").fill("1.5")
    page.locator("#samples input[type=number]").fill("3")
    first = visit.example("Schumann, voice")
    page.wait_for_selector("#readings input >> nth=2")
    labels = page.locator("#readings label").all_inner_texts()
    found = [re.search(r"\N{MINUS SIGN}?\d\.\d{3}", text)[0] for text in labels]
    scores = [float(x.replace("\N{MINUS SIGN}", "-")) for x in found]
    assert scores == sorted(scores, reverse=True) and page.locator("#readings input").first.is_checked()
    page.locator("#readings input").nth(2).click()
    page.wait_for_timeout(1500)
    assert visit.tokens() != first or scores[0] == scores[2]
    visit.tab("Reward")
    page.wait_for_selector("#group tbody tr >> nth=2")
    gains = [float(t.replace("\N{MINUS SIGN}", "-")) for t in page.locator("#group td:nth-child(4)").all_inner_texts()]
    assert sum(gains) == pytest.approx(0, abs=0.02)


def test_a_beam_and_the_grammar_are_chosen(visit):
    "Only the fields of the way that is chosen are shown; what was chosen is what the library reads."
    page = visit.page
    visit.fold("Settings")
    assert not page.is_visible("#beam") and not page.is_visible("#temperature")
    page.get_by_role("radio", name="Beam").click()
    page.wait_for_selector("#beam")
    assert not page.is_visible("#samples")
    page.locator("#beam input[type=number]").fill("2")
    page.get_by_role("radio", name="time").click()
    tokens = visit.example("Schubert, voice")
    assert "All bars add up." in page.inner_text("#status")
    torch.set_num_threads(1)
    how = Decoding(beam=2, grammar="time", max_tokens=1024 if (PACKAGED / "model.safetensors").is_file() else 120)
    if how.max_tokens == 1024:
        found = Transcriber.from_pretrained().transcribe(EXAMPLES / "schubert-fruehlingstraum-voice.png", how=how)
        assert tokens == found.tokens


def test_what_the_masked_autoencoder_sees(visit):
    "Three panels of the size of the line; another share of hidden patches is another picture."
    page, shown = visit.page, "#imagined figure:nth-of-type(1) img"
    visit.example("Schubert, voice")
    visit.tab("Under the hood")
    page.wait_for_selector("#imagined figure:nth-of-type(3)")
    assert page.locator("#imagined figcaption").all_inner_texts() == ["What it sees", "What it imagines", "Both"]
    before = page.get_attribute(shown, "src")
    page.locator("#mask-seed input").fill("7")
    page.wait_for_function(f"before => document.querySelector('{shown}').src !== before", arg=before)
    before = page.get_attribute(shown, "src")
    page.locator("#ratio input[type=range]").focus()
    page.keyboard.press("ArrowLeft")  # by keyboard alone
    page.wait_for_function(f"before => document.querySelector('{shown}').src !== before", arg=before)
    assert page.locator("#ratio input[type=number]").input_value() == "0.7"
    sizes = page.locator("#imagined img").evaluate_all("all => all.map(e => [e.naturalWidth, e.naturalHeight])")
    assert sizes[0] == sizes[1] == sizes[2] and sizes[0][0] > 100


def test_the_look_at_a_token(visit):
    page = visit.page
    tokens = visit.example("Schubert, voice")
    visit.tab("Under the hood")
    page.wait_for_selector("#gaze .chosen")
    note = tokens.index("C5")
    page.locator("#gaze .lmx[data-token]").nth(note).click()
    assert f"Token {note + 1} of {len(tokens)}: C5" in page.inner_text("#gaze .said")
    (x, width), before = page.evaluate(
        "(e => [[e.x.baseVal.value, e.ownerSVGElement.viewBox.baseVal.width], "
        "e.parentNode.innerHTML])(document.querySelector('.gaze rect'))"
    )
    assert 0.3 < x / width < 0.5  # the second bar of four
    page.locator("#gaze .bars").focus()
    page.keyboard.press("ArrowRight")
    assert f"Token {note + 2} of" in page.inner_text("#gaze .said")
    assert "Does not read." in page.inner_text("#card")


@pytest.fixture(scope="module")
def sheet_of_two(tmp_path_factory):
    "A page with two systems."
    lines = [Image.open(EXAMPLES / f"{name}.png").convert("L") for name in ("schubert-fruehlingstraum-voice",) * 2]
    page = Image.new("L", (lines[0].width + 200, 1100), 255)
    for i, line in enumerate(lines):
        page.paste(line, (100, 150 + 400 * i))
    path = tmp_path_factory.mktemp("pages") / "page.png"
    page.save(path)
    return path


def test_a_page_its_systems_and_a_pdf(visit, sheet_of_two, tmp_path):
    "Systems are found; a deleted one is not read again; a PDF of the page is read like the page."
    page = visit.page
    status = visit.read(sheet_of_two)
    assert status.startswith("2 systems, 8 bars"), status
    assert page.locator("#score section.system").count() == 2 and page.locator("#score polygon.bar").count() == 8
    assert page.locator("#original .system").count() == 2 and page.locator("#original polygon.bar").count() == 8
    row = visit.boxes("#score section.system .strip > *")
    assert [b["y"] for b in row] == sorted(b["y"] for b in row)  # each picture above its engraving
    page.locator("#score .sheet g.measure[data-bar='6'] .glass").click(position={"x": 3, "y": 3})
    assert page.locator("#score .paper .lit[data-bar='6']").is_visible()
    page.get_by_role("button", name="Correct the systems").click()
    page.wait_for_selector("#frames rect.box >> nth=1")
    page.locator("#frames rect.box").nth(1).click()
    page.keyboard.press("Delete")
    page.click("#reread")
    visit.wait("#status p.done:text-matches('^(1 system, )?4 bars')")  # not while it is still being read
    assert page.locator("#original polygon.bar").count() == 4


def test_pages_are_chosen_before_they_are_read(visit, sheet_of_two, tmp_path):
    "A document of three pages: its name and pages at once, their systems, and nothing is read until somebody asks."
    page, pdf = visit.page, tmp_path / "three pages.pdf"
    sheet, blank = Image.open(sheet_of_two), Image.new("L", (900, 1100), 255)
    sheet.save(pdf, resolution=200, save_all=True, append_images=[blank, sheet])
    page.set_input_files("#picture input[type=file]", pdf)
    page.wait_for_selector("#file .thumbs label:nth-child(3) img")
    assert "three pages.pdf" in page.inner_text("#file") and "3 pages" in page.inner_text("#file .name")
    assert page.locator("#file .thumbs small").all_inner_texts() == ["2 systems", "no music found", "2 systems"]
    assert page.locator("#pages input, #pages textarea").input_value() == "1-3"
    assert "Choose the pages" in page.inner_text("#status") and not page.is_visible("#results")
    for n in (1, 2):
        page.locator(f"#file .thumbs input[value='{n}']").uncheck()
    assert page.locator("#pages input, #pages textarea").input_value() == "3"
    page.click("#go")
    visit.wait("#status p.done")
    assert "2 systems, 8 bars" in page.inner_text("#status")


def test_a_bar_of_the_second_page_is_followed_and_zoomed(visit, sheet_of_two, tmp_path):
    "The row of a chosen bar comes into the window, on page 2, too; zoom makes rows wider and the window no wider."
    page, pdf = visit.page, tmp_path / "two pages.pdf"
    sheet = Image.open(sheet_of_two)
    sheet.save(pdf, resolution=200, save_all=True, append_images=[sheet])
    page.set_input_files("#picture input[type=file]", pdf)
    page.wait_for_selector("#file .thumbs label:nth-child(2) img")
    page.click("#go")
    visit.wait("#status p.done")
    assert "4 systems, 16 bars" in page.inner_text("#status")
    seen = "e => { const b = e.getBoundingClientRect(); return b.top >= 0 && b.bottom <= innerHeight + 1 }"
    row = page.locator("#score section.system", has=page.locator("polygon.bar[data-bar='13']"))
    page.evaluate("scrollTo(0, 0)")
    assert row.count() == 1 and not row.locator(".paper").evaluate(seen)
    page.locator("#original polygon.bar[data-bar='13']").evaluate(
        "e => e.dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    page.wait_for_function("document.querySelectorAll('#score .lit[data-bar=\"13\"]').length === 2")
    assert row.locator(".paper").evaluate(seen)  # the picture of the row, on the second page
    paper = row.locator(".paper > *").first
    width = paper.bounding_box()["width"]
    page.locator("#bench .zoom button[data-by='1']").click()
    assert "125 %" in page.inner_text("#bench .zoom output")
    assert paper.bounding_box()["width"] == pytest.approx(1.25 * width, rel=0.02)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#bench .zoom button[data-by='-1']").click()
    assert paper.bounding_box()["width"] == pytest.approx(width, rel=0.02)


def test_a_picture_is_pasted(visit):
    data = base64.b64encode((EXAMPLES / "schubert-fruehlingstraum-voice.png").read_bytes()).decode()
    visit.page.evaluate(
        """async (data) => {
            const picture = await (await fetch("data:image/png;base64," + data)).blob()
            const board = new DataTransfer()
            board.items.add(new File([picture], "pasted.png", {type: "image/png"}))
            document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: board, bubbles: true}))
        }""",
        data,
    )
    visit.wait("#status p.done")
    assert visit.page.inner_text("#status .status").startswith("4 bars")
    assert "pasted.png" in visit.page.inner_text("#file")


def test_a_photo_from_the_camera_is_read(visit):
    visit.page.get_by_role("button", name="Take a photo").click()
    visit.page.wait_for_function("document.querySelector('dialog.camera video')?.videoWidth > 0")
    visit.page.get_by_role("button", name="Take the photo").click()
    visit.page.wait_for_selector("#status p.error")
    assert "no staff lines" in visit.page.inner_text("#status .status")


def test_two_people_at_once(chromium, url):
    "Each gets what was asked for."
    people = [Visit(chromium, url) for _ in range(2)]
    names = ["schubert-fruehlingstraum-voice", "schumann-rosen-voice"]
    for person, name in zip(people, names, strict=True):
        person.page.set_input_files("#picture input[type=file]", EXAMPLES / f"{name}.png")
    read = []
    for person in people:
        person.wait("#status p.done")
        read.append(person.tokens())
    keys = ["key:fifths:3", "key:fifths:-3"]
    assert [next(t for t in tokens if t.startswith("key:")) for tokens in read] == keys
    for person in people:
        person.leave()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(chromium, url, scheme):
    "390 px: nothing makes the page scroll sideways, and the notes are black on white."
    phone = Visit(chromium, url, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    phone.read(SCAN)
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    style = "e => [getComputedStyle(e).color, getComputedStyle(e.closest('.sheet')).backgroundColor]"
    ink = phone.page.locator("#score svg g.staff path").first.evaluate(style)
    assert ink == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    rows = "new Set([...document.querySelectorAll('#score .sheet .glass')].map(e => e.getBoundingClientRect().y >> 6))"
    phone.page.wait_for_function(f"{rows}.size > 1")  # broken into lines of the window's width
    assert max(b["x"] + b["width"] for b in phone.boxes("#score .sheet g.measure .glass")) <= 390
    phone.page.click("#over")
    phone.example("Schubert, voice")
    phone.tab("Reward")
    phone.page.wait_for_selector("#earned .terms")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert min(b["width"] for b in phone.boxes("#earned tbody .track, #weights input[type=range]")) > 80
    phone.tab("Under the hood")
    phone.page.wait_for_selector("#gaze .chosen")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    phone.leave()


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    from gradio_client import Client

    return Client(url, verbose=False, analytics_enabled=False, download_files=tmp_path_factory.mktemp("client"))


def test_client_gets_growing_scores_and_files(client):
    from gradio_client import handle_file

    described = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
    names = [p["parameter_name"] for p in described["/transcribe"]["parameters"]]
    ways = "way beam temperature top_k top_p grammar seed samples pages second_look shifts anyway".split()
    assert names == ["picture", *ways, "boxes"]
    assert list(described) == ["/transcribe", "/read_music"]
    names = {p["parameter_name"] for p in described["/read_music"]["parameters"]}
    assert names == {"picture", "pages", "form", *(f.name for f in fields(Decoding))} - {"max_tokens"}
    shown = {c["props"].get("elem_id"): c["props"] for c in client.config["components"]}
    for name in (f.name for f in fields(Decoding) if choice_of(f).label):  # built from the field
        (kind, options), props = control_of(name), shown[name.replace("_", "-")]
        assert props["name"] == kind.lower() and props["label"] == options["label"]
        assert all(props[k] == options[k] for k in ("value", "minimum", "maximum", "step") if k in options)
    job = client.submit(picture=handle_file(SCAN), api_name="/transcribe")
    status, picture, score, tokens, *files = job.result(timeout=90)
    bars = [int(found[1]) for out in job.outputs() if (found := BARS.search(out[0]))]
    assert len(bars) > 1 and bars == sorted(bars)
    assert "<svg" in score and "measure" in tokens and 'data-bar="0"' in picture
    assert {Path(f).suffix for f in files} == set(SUFFIXES)
    assert len(music21.converter.parse(files[0]).parts[0].getElementsByClass("Measure")) == bars[-1]


def test_client_gets_text(client):
    from gradio_client import handle_file

    voice = handle_file(EXAMPLES / "schumann-rosen-voice.png")
    text = client.predict(picture=voice, grammar="shape", api_name="/read_music")
    (part,) = parts(root_of(text.encode()))
    lmx = client.predict(picture=voice, grammar="shape", form="lmx", api_name="/read_music")
    assert len(part.element.findall("measure")) == lmx.split().count("measure") > 2


def test_client_gets_the_error_line(client, blank):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    for name in ("/transcribe", "/read_music"):
        with pytest.raises(AppError, match="no staff lines") as e:
            client.predict(picture=handle_file(blank), api_name=name)
        assert "\n" not in str(e.value)
    with pytest.raises(AppError, match="beam 0"):
        client.predict(picture=handle_file(blank), beam=0, api_name="/read_music")


def ask(http: httpx.Client, call: dict, file: object, components: dict) -> tuple[int, str]:
    "The answer of one endpoint, whoever it is for, to a message that names a file."
    values = [components[i]["props"].get("value") for i in call["inputs"]]
    kinds = [components[i]["type"] for i in call["inputs"]]
    data = [file if k in ("image", "uploadbutton", "file") else v for k, v in zip(kinds, values, strict=True)]
    data = [file, *data[1:]] if call["api_name"] == "read_music" else data
    answer = http.post("/gradio_api/queue/join", json={"data": data, "fn_index": call["id"], "session_hash": "s"})
    return answer.status_code, answer.text


def test_files_of_the_server_stay_there(url, tmp_path):
    "Every endpoint that takes a file, private ones too: the same line whether there is such a file or not."
    shutil.copy(SCAN, tmp_path / "secret.png")
    with httpx.Client(base_url=url, timeout=60) as http:
        config = http.get("/config").json()
        components = {c["id"]: c for c in config["components"]}
        files = {i for i, c in components.items() if c["type"] in ("image", "uploadbutton", "file")}
        calls = [c for c in config["dependencies"] if files & set(c["inputs"]) or c["api_name"] == "read_music"]
        assert {"transcribe", "read_music", "measure"} <= {c["api_name"] for c in calls} and len(calls) > 6
        for call in calls:
            said = {
                ask(http, call, {"path": str(path), **meta}, components)
                for path in (tmp_path / "secret.png", tmp_path / "none.png", SCAN, "/etc/passwd")
                for meta in ({}, {"meta": {"_type": "gradio.FileData"}})
            }
            assert len(said) == 1, call["api_name"]
            ((status, text),) = said
            assert status == 400 and "not uploaded" in text and str(tmp_path) not in text
        said = []
        for path in ("secret.png", "none.png"):  # as text, which is no file for gradio
            values = [components[i]["props"].get("value") for i in calls[-1]["inputs"]]
            event = http.post("/gradio_api/call/read_music", json={"data": [str(tmp_path / path), *values[1:]]}).json()
            said.append(http.get(f"/gradio_api/call/read_music/{event['event_id']}").text)
        assert calls[-1]["api_name"] == "read_music" and said[0] == said[1] and "not uploaded" in said[0]


def test_another_name_is_not_served(url):
    port = urlsplit(url).port
    for host, status in ((f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), (f"evil.example:{port}", 421)):
        assert httpx.get(f"{url}/config", headers={"host": host}, timeout=60).status_code == status, host


def test_a_request_that_costs_too_much_is_one_line(client, blank):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    for choices, says in (({"beam": 10**9}, "beam"), ({"shifts": 1000}, "shifts"), ({"seed": -1}, "seed")):
        with pytest.raises(AppError, match=says) as e:
            client.predict(handle_file(blank), api_name="/read_music", **choices)
        assert "\n" not in str(e.value)


def test_a_language_model_reads_music_by_mcp(tmp_path):
    "A real round trip: initialize, tools/list, tools/call."
    pytest.importorskip("mcp", reason="pip install 'vitomr[mcp]'")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    data = base64.b64encode((EXAMPLES / "schumann-rosen-voice.png").read_bytes()).decode()
    picture = f"data:image/png;base64,{data}"

    async def talk(address):
        async with streamablehttp_client(address) as (read, write, _), ClientSession(read, write) as session:
            name = (await session.initialize()).serverInfo.name
            tools = (await session.list_tools()).tools
            call = lambda **more: session.call_tool("read_music", {"picture": picture, **more})
            return name, tools, await call(form="lmx"), await call(grammar="strict")

    with served(tmp_path, VITOMR_MCP="1") as address:
        name, (tool,), read, wrong = asyncio.run(talk(f"{address}/gradio_api/mcp/"))
    assert name == "vitomr" and tool.name == "read_music" and "printed music" in tool.description
    assert tool.inputSchema["required"] == ["picture"] and {"beam", "grammar"} < tool.inputSchema["properties"].keys()
    assert not read.isError and read.content[0].text.startswith("measure ")
    assert wrong.isError and "shape, time" in wrong.content[0].text


@pytest.mark.parametrize("name", ["VITOMR_WEIGHTS", "VITOMR_MAE"])
def test_missing_weights_are_one_line(tmp_path, name):
    env = environment(tmp_path, **{name: str(tmp_path / "nowhere")})
    done = subprocess.run([sys.executable, "app.py"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(rf"app\.py: .*nowhere.*{name}.*\n", done.stderr), done.stderr


@pytest.fixture(scope="module")
def app():
    "The module app.py, loaded without starting anything."
    spec = importlib.util.spec_from_file_location("app", ROOT / "app.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        spec.loader.exec_module(module)
    return module


def test_samples_share_file_and_encoding(app, tmp_path, monkeypatch):
    "Three samples of a line with their looks: the file is opened once and the encoder sees the line once a place."
    torch.manual_seed(0)
    untrained, opened, encoded = Transcriber(Reader(READERS["smoke"])), [], []
    untrained.model.encoder.register_forward_hook(lambda _, args, out: encoded.append(len(args[0])))
    monkeypatch.setattr(app, "reader", lambda: untrained)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    real = staves._decoded
    monkeypatch.setattr(staves, "_decoded", lambda *args: (opened.append(args), real(*args))[1])
    shutil.copy(EXAMPLES / "schumann-rosen-voice.png", tmp_path / "a.png")
    monkeypatch.setattr(app, "MAX_TOKENS", 30)
    *_, last = app.transcribe(
        {"path": str(tmp_path / "a.png")}, way="sampling", beam=4, temperature=1, top_k=0, top_p=1, grammar="shape",
        seed=0, samples=3, pages="", second_look=True, shifts=2, anyway=False, boxes="",
    )  # fmt: skip
    sheets = app.shelf.get(last[-1])["sheets"]
    assert len(sheets) == 3 and len({s.lmx for s in sheets}) == 3
    assert len(opened) == 1 and encoded == [1, 1]


def test_the_autoencoder_of_the_package_is_found(app, tmp_path, monkeypatch):
    "In weights/tiny-mae beside the reader; without it the page says one line."
    monkeypatch.delenv("VITOMR_MAE", raising=False)
    monkeypatch.setattr(app, "PACKAGED", tmp_path / "tiny")
    assert app.seer.__wrapped__() is None and "VITOMR_MAE" in app.NO_MAE and "\n" not in app.NO_MAE
    save_mae(MAE(MAES["smoke"]), tmp_path / "tiny-mae")
    assert app.seer.__wrapped__().cfg == MAES["smoke"]


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
    shown = ET.fromstring(f"<div>{views.tokens_html(tokens, [-0.1 * i for i in range(len(tokens))])}</div>")
    assert {e.tag for e in shown.iter()} == {"div", "p", "ol", "li", "span"}
    assert [e.text for e in shown.iterfind("ol/li/span")] == tokens
    assert {k for e in shown.iter() for k in e.keys()} == {"class", "title", "tabindex", "data-token"}
    for text in HOSTILE:
        status = ET.fromstring(views.status_html("error", text))
        assert (status.text, status.keys(), len(status)) == (text, ["class", "role"], 0)


def test_hostile_tokens_leave_no_trace_in_the_engraving(app):
    score = to_musicxml(["measure", *HOSTILE, "C4", "quarter"])
    svg = views.sheet_html(views.engraving(score))
    assert "alert" not in svg and "<script" not in svg


def test_examples_carry_their_reference(app):
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(app.EXAMPLES) == {p.stem for p in EXAMPLES.glob("*.png")} | {"pages/bach-invention-1"}
    (piano,) = tokens_of_parts(read_score(EXAMPLES / "pages" / "bach-invention-1.musicxml"))
    assert bars_that_add_up(piano) == (22, 22)
    for name in (n for n in app.EXAMPLES if "/" not in n):
        assert f"| {name} |" in listed
        assert all((EXAMPLES / (name + suffix)).stat().st_size < 300_000 for suffix in (".png", ".lmx", ".musicxml"))
        (part,) = parts(read_score(EXAMPLES / f"{name}.musicxml"))
        assert linearise(part.element).tokens == (EXAMPLES / f"{name}.lmx").read_text().split()


def test_every_term_has_its_colour_and_its_place(app):
    "The worst reading and the best: every bar inside its track, gains to the right of zero."
    weights = {name: float(term.sign) for name, term in TERMS.items()}
    worst = {**dict.fromkeys(TERMS, 0.0), "WF": -3.0, **{name: 1.0 for name, term in TERMS.items() if term.is_penalty}}
    for found in (Breakdown(worst, weights), Breakdown(dict.fromkeys(TERMS, 1.0), dict.fromkeys(TERMS, 1.0))):
        table = ET.fromstring(views.reward_html(found))
        for term, row in zip(TERMS, table.iterfind("tbody/tr"), strict=True):
            assert row[0].text == term and row[1].text
            raw, weighted = (dict(d.split(": ") for d in i.get("style").split("; ")) for i in row.iter("i"))
            assert raw["background"] == weighted["background"] == TERMS[term].colour
            zero = float(row[6].find("span/b").get("style")[6:-1])
            left, width = (float(weighted[k][:-1]) for k in ("left", "width"))
            assert left + width == pytest.approx(zero, abs=0.02) or left == pytest.approx(zero, abs=0.02)
            assert (left < zero - 0.02) == (found.weighted[term] < 0)
        inside = [float(x) for i in table.iter("i") for x in re.findall(r"([-\d.]+)%", i.get("style"))]
        assert min(inside) >= 0 and max(inside) <= 100.01
        assert len(table.findall("tfoot//i")) == len(TERMS)


def test_reward_of_nothing_weighs_nothing(app):
    found = Breakdown(dict.fromkeys(TERMS, 0.0), dict.fromkeys(TERMS, 0.0))
    assert ET.fromstring(views.reward_html(found)).find("tfoot/tr")[5].text == "0.000"


@pytest.mark.parametrize("preset", PRESETS)
def test_fields_hold_the_weights_of_the_preset(app, preset):
    fields = dict(zip(TERMS, app.fields_of(preset), strict=True))
    for term, f in fields.items():
        assert f["minimum"] <= f["value"] == PRESETS[preset].weights.get(term, 0) <= f["maximum"]
        assert f["minimum"] < f["maximum"]


def test_weights_are_scored_without_measuring(app, monkeypatch):
    true = (EXAMPLES / "schumann-rosen-voice.lmx").read_text().split()
    found = {preset: reward(true[:-5], true, preset, terms=TERMS) for preset in PRESETS}
    measured = {"of": {preset: [b, b] for preset, b in found.items()}, "at": 1}
    monkeypatch.setattr(app, "reward_of_score", None)
    shown = app.rescore(measured, "notes", None, "7", float("nan"), *[0.5] * 6)  # emptied and impossible fields count 0
    expected = found["notes"].reweighted({t: 0.0 if t in ("TED", "TEDn", "WF") else 0.5 for t in TERMS})
    assert shown[0] == views.reward_html(expected) and "teaches nothing" in shown[1]
    assert app.choose(measured, "vitomr")[0] == views.reward_html(found["vitomr"])


def test_names_and_tokens_of_a_reference_are_escaped(app, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # as if they were uploaded
    weights = [0.1] * len(TERMS)
    taken = app.shelf.put({"sheets": [SimpleNamespace(parts=[["measure"]])], "at": 0})
    for i, text in enumerate(t for t in HOSTILE if "/" not in t):
        for path in (tmp_path / f"{text}.pdf", tmp_path / f"{i}.lmx"):
            path.write_text(f"measure {text.replace(' ', '')}")
            *_, (measured, line, *others) = app.measure(taken, {"path": str(path)}, "vitomr", *weights)
            hint = ET.fromstring(line)
            assert measured is None and not any(others) and len(hint) == 0 and "\n" not in hint.text
            assert hint.get("class") == "hint error" and (text if path.suffix == ".pdf" else "unknown") in hint.text


def test_no_reference_is_a_friendly_line(app):
    ((measured, line, *others),) = app.measure(None, None, "vitomr", *[0.1] * len(TERMS))
    assert measured is None and not any(others) and "error" not in line and ".mxl" in line
