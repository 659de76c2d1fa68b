"""The page: a picture, photo or PDF of printed music in, a score out, and how it was read. It wires components."""

import importlib.util
import logging
import os
import time
from collections.abc import Iterator
from functools import cache
from math import ceil, inf, isfinite, log10
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one token at a time gains nothing from threads; on a busy CPU they wait

try:
    import spaces  # a Space with ZeroGPU; before torch
except ImportError:
    spaces = None
if importlib.util.find_spec("gradio") is None:
    raise SystemExit("app.py: gradio is not installed; pip install 'vitomr[app]', or start it with: make app")
import gradio as gr  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from vitomr import views  # noqa: E402
from vitomr.mae import MAE, load_mae, reconstruct  # noqa: E402
from vitomr.notation.grammar import Grammar  # noqa: E402
from vitomr.notation.score import ScoreError, musicxml_bytes  # noqa: E402
from vitomr.page.documents import Pages, page_numbers  # noqa: E402
from vitomr.page.staves import normalise  # noqa: E402
from vitomr.reading.choices import Decoding, control_of, takes_choices  # noqa: E402
from vitomr.rewards import PRESETS, TERMS, reward_of_score  # noqa: E402
from vitomr.sandbox import one_line  # noqa: E402
from vitomr.sandbox import warm as warm_worker  # noqa: E402
from vitomr.serving import (  # noqa: E402
    GRACE,
    MAX_COST,
    MAX_SAMPLES,
    Listeners,
    ServedHosts,
    UploadsOnly,
    Watch,
    boxes_from,
    check_cost,
    decoding_from,
    number_from,
    served_hosts,
    uploaded,
)
from vitomr.transcribe import (  # noqa: E402
    PACKAGED,
    TRUTH_SUFFIXES,
    Progress,
    Transcriber,
    read_truth_of_parts,
)
from vitomr.views import Sheet, hint_html, status_html  # noqa: E402

MAX_TOKENS = int(os.environ.get("VITOMR_MAX_TOKENS") or 1024)
MAX_PAGES = int(os.environ.get("VITOMR_MAX_PAGES") or 8)  # read at a time: others wait
HERE = Path(__file__).parent
UPDATE_SECONDS = 0.1  # at least, between two views of a growing score
MCP = bool(os.environ.get("VITOMR_MCP"))
PAIRS = os.environ.get("VITOMR_PAIRS")  # a folder of pairs of audio actions to choose between
DOWNLOADS = {"MusicXML": ".musicxml", "MXL": ".mxl", "MIDI": ".mid", "PDF": ".pdf", "SVG": ".svg", "LMX": ".lmx"}
EXAMPLES = {
    "bach-invention-1-scan-1": "Bach, a scan of 1853",
    "bach-invention-1-scan-3": "Bach, two lines further",
    "schumann-juengling-photo": "Schumann, like a photo",
    "beethoven-maigesang-piano": "Beethoven, piano",
    "schubert-fruehlingstraum-piano": "Schubert, piano",
    "schubert-fruehlingstraum-voice": "Schubert, voice",
    "schumann-rosen-voice": "Schumann, voice",
    "pages/bach-invention-1": "Bach, the whole page",
}
listeners = Listeners(
    lambda event: getattr(demo._queue.event_ids_to_events.get(event), "session_hash", None),
    grace=inf if spaces else GRACE,  # ZeroGPU reads in a process of its own, which does not see who listens
)
WAYS = {"Greedy": "greedy", "Beam": "beam", "Sampling": "sampling"}
OF_WAY = {"beam": ("beam",), "sampling": ("temperature", "top_k", "top_p")}  # the choices that only this way has


@cache
def reader() -> Transcriber:
    "The model, loaded once. VITOMR_WEIGHTS names a folder or hub id other than the packaged weights."
    int8 = bool(os.environ.get("VITOMR_INT8"))  # faster on a CPU, and a little worse
    return Transcriber.from_pretrained(os.environ.get("VITOMR_WEIGHTS") or None, int8=int8)


@cache
def seer() -> MAE | None:
    "The masked autoencoder, where the package has one; VITOMR_MAE names another folder. Raises `MaeWeightsError`."
    given, packaged = os.environ.get("VITOMR_MAE"), PACKAGED.parent / "tiny-mae"
    return load_mae(given or packaged) if given or packaged.is_dir() else None


def card() -> str:
    "What the model card says, without its title."
    path = Path(os.environ.get("VITOMR_WEIGHTS") or PACKAGED) / "README.md"
    if not path.is_file():
        return "These weights bring no model card."
    return path.read_text(encoding="utf-8").split("\n", 1)[-1]


# Reading


IDLE = status_html("idle", "Drop a picture or a PDF, paste one, or pick an example.")


def decoding(way: str, grammar: str, seed: float, second_look: bool, shifts: float, **others: float) -> Decoding:
    "How to read, from the controls. Raises ValueError."
    used = {name: others[name] for name in OF_WAY.get(str(way), ())}
    return decoding_from(
        MAX_TOKENS, grammar=grammar, seed=seed or 0, second_look=second_look, shifts=shifts, **used
    )  # fmt: skip


def wanted_pages(opened: Pages, pages: str | None) -> list[int]:
    "The pages to read, from 0. Raises ValueError for too many."
    numbers = page_numbers(str(pages or "").strip() or None, len(opened))
    if len(numbers) > MAX_PAGES:
        raise ValueError(f"{len(numbers)} pages asked for; choose up to {MAX_PAGES} at a time, as in 1-{MAX_PAGES}")
    return numbers


def outputs_of(status: str, original="", score="", tokens="", files=None, taken=None) -> list:
    "The value of every output of a reading, in order."
    return [status, original, score, tokens, *(files or [None] * len(DOWNLOADS)), taken]


def present(sheets: list[Sheet], at: int = 0, text: str | None = None) -> Iterator[list]:
    "A finished reading and its files; gradio takes copies before it asks for more."
    sheet = sheets[at]
    if not any(line.look.tokens for line in sheet.lines):
        yield outputs_of(status_html("error", "No music was read in this picture."))
        return
    score = views.sheet_html(views.sheet_svg(sheet), sounds=views.sounds(sheet.score))
    with TemporaryDirectory() as folder:
        stem = Path(sheet.document.name).stem[:50]
        files = [sheet.save(Path(folder, stem + suffix)) for suffix in DOWNLOADS.values()]
        status = status_html("done", text or views.summary(sheet))
        taken = {"sheets": sheets, "at": at}
        yield outputs_of(status, views.pages_html(sheet), score, views.lines_html(sheet), files, taken)


def growing(news: Progress, sofar: str) -> list:
    "A reading that is not finished."
    document = news.document
    if not any(line.tokens for line in document.lines):
        found = gr.skip() if news.kind in ("bar", "again") else views.found_html(document)
        return outputs_of(status_html("busy", f"{sofar}."), found)
    several = len(document.lines) > 1
    bars = max(line.tokens.count("measure") for line in document.lines)
    try:
        svg = views.engraving(document.assembled.score if several else document.lines[0].score, lines=several)
    except ScoreError:  # the beginning of a score that cannot be engraved; the whole of it may be
        return outputs_of(status_html("busy", f"{sofar}."), gr.skip(), gr.skip(), gr.skip())
    tokens = "" if several else views.tokens_html(document.lines[0].tokens, document.lines[0].logp)
    line = f"{sofar}: {views.count(bars, 'bar')} {'of each line ' if several else ''}so far."
    return outputs_of(status_html("busy", line), gr.skip(), views.sheet_html(svg), tokens)


@(spaces.GPU if spaces else lambda f: f)
def transcribe(
    picture: dict | None,
    way: str,
    beam: float,
    temperature: float,
    top_k: float,
    top_p: float,
    grammar: str,
    seed: float,
    samples: float,
    pages: str | None,
    second_look: bool,
    shifts: float,
    boxes: str | None,
) -> Iterator[list]:
    "Read a picture, photo or PDF of printed music. The last answer holds the files."
    if not picture:
        yield outputs_of(IDLE)
        return
    yield outputs_of(status_html("busy", "Reading."))
    watch = Watch(listeners)
    try:
        watch.check()
        path = uploaded(picture)
        how = decoding(
            way, grammar, seed, second_look, shifts, beam=beam, temperature=temperature, top_k=top_k, top_p=top_p
        )
        source = Pages(path)
        numbers = wanted_pages(source, pages)
        given, due, sheets = boxes_from(boxes), 0.0, []
        n = number_from(samples, "samples", 1, MAX_SAMPLES) if way == "sampling" else 1
        check_cost(how, len(numbers), n)
        for i in range(n):
            sofar = f"Reading {i + 1} of {n}" if n > 1 else "Reading"
            for news in reader().read(source, pages=numbers, boxes=given, how=how, seed=how.seed + i, keep=True):
                watch.check()
                if news.kind != "done" and (time.monotonic() >= due or news.kind == "page"):
                    yield growing(news, sofar)
                    due = time.monotonic() + UPDATE_SECONDS * max(1, len(news.document.lines))
            source = news.document  # further samples need neither file nor encoder
            sheets.append(Sheet(source, views.seen_lines(reader(), source)))
        for sheet in sheets:
            sheet.document.forget()
        yield from present(sorted(sheets, key=lambda s: -s.likelihood))
        return
    except (ValueError, OSError) as e:  # PictureError, NoStaffError, ScoreError: one line for a person
        message = one_line(e)
    except Exception as e:
        logging.exception("a picture could not be read")
        message = f"this picture could not be read ({type(e).__name__})"
    yield outputs_of(status_html("error", f"Not read: {message}."))
    raise gr.Error(message, visible=False, print_exception=False)  # for programs; the page has its line


@(spaces.GPU if spaces else lambda f: f)
@takes_choices("max_tokens")
def read_music(picture: gr.FileData, pages: str = "", form: str = "musicxml", **choices) -> str:
    """Read printed music and give it as text: a picture or photo of a line or a page, or a PDF.

    Args:
        picture: the file; PNG, JPEG, TIFF, WEBP or PDF
        pages: of a PDF, as in 1-3,7; empty for all
        form: musicxml, or lmx for tokens, a line of text for each part

    Returns:
        the score
    """
    try:
        if form not in ("musicxml", "lmx"):
            raise ValueError(f"unknown form {form!r}; choose musicxml or lmx")
        path, watch = uploaded(picture), Watch(listeners)
        watch.check()
        if path is None:
            raise ValueError("no picture; give one")
        how = decoding_from(MAX_TOKENS, **choices)
        opened = Pages(path)
        numbers = wanted_pages(opened, pages)
        check_cost(how, len(numbers))
        for news in reader().read(opened, pages=numbers, how=how):  # noqa: B007, the last one holds all
            watch.check()
        return news.document.to_bytes(f".{form}").decode()
    except (ValueError, OSError) as e:
        message = one_line(e)
    except Exception as e:
        logging.exception("a picture could not be read")
        message = f"this picture could not be read ({type(e).__name__})"
    raise gr.Error(message, print_exception=False)


def reveal(taken: dict | None) -> list:
    "What belongs to a finished reading: other readings, texts to edit, boxes, looks."
    if not taken:
        hidden = gr.update(choices=[], value=None, visible=False)
        return [hidden, "", "", "", "", hidden, ""]
    sheets, at = taken["sheets"], taken["at"]
    sheet = sheets[at]
    names = [(f"{i + 1}: log-probability {views.number(s.likelihood)} a token", i) for i, s in enumerate(sheets)]
    lines = [(f"Line {i + 1}", i) for i in range(len(sheet.lines))]
    return [
        gr.update(choices=names, value=at, visible=len(sheets) > 1),
        views.lmx_text(sheet),
        musicxml_bytes(sheet.score).decode(),
        views.boxes_html(sheet.document),
        "",
        gr.update(choices=lines, value=0, visible=len(lines) > 1),
        looked(taken, 0),
    ]


def looked(taken: dict | None, line: int | None) -> str:
    "The look at one line."
    lines = taken["sheets"][taken["at"]].lines if taken else []
    line = line or 0
    if not isinstance(line, int) or line not in range(len(lines)):
        return ""
    seen = lines[line]
    tokens = views.tokens_html(seen.look.tokens, seen.look.logp[:-1].tolist())
    return views.attention_html(seen.img, seen.look) + '<p class="said" aria-live="polite"></p>' + tokens


def select(taken: dict | None, at: int | None) -> Iterator:
    "Another of the readings."
    if not taken or not isinstance(at, int) or at not in range(len(taken["sheets"])):
        yield [gr.skip()] * (len(DOWNLOADS) + 5)
        return
    yield from present(taken["sheets"], at)


def edit(change, taken: dict | None, text: str | None) -> Iterator[list]:
    "The reading with the text of a person; what is wrong in it is said in one line and nothing else changes."
    if not taken:
        yield ["", *[gr.skip()] * (len(DOWNLOADS) + 5)]
        return
    try:
        sheets = list(taken["sheets"])
        sheets[taken["at"]] = change(reader(), sheets[taken["at"]], text or "")
        for shown in present(sheets, taken["at"], "Edited. " + views.summary(sheets[taken["at"]])):
            yield [hint_html("done", "Engraved anew; the downloads hold this version."), *shown]
        return
    except ValueError as e:
        message = one_line(e)
    except Exception as e:
        logging.exception("an edited score could not be engraved")
        message = f"this text could not be engraved ({type(e).__name__})"
    yield [hint_html("error", f"Not engraved: {message}."), *[gr.skip()] * (len(DOWNLOADS) + 5)]


def edit_lmx(taken: dict | None, text: str | None) -> Iterator[list]:
    "Engrave edited tokens."
    yield from edit(views.with_lmx, taken, text)


def edit_musicxml(taken: dict | None, text: str | None) -> Iterator[list]:
    "Engrave edited MusicXML."
    yield from edit(views.with_musicxml, taken, text)


def imagine(taken: dict | None, ratio: float, seed: float) -> str:
    "What the masked autoencoder makes of the picture when most of it is hidden."
    model = seer()
    if not taken or model is None:
        return ""
    img = taken["sheets"][taken["at"]].lines[0].img
    space = reader().model.cfg.staff_space
    wanted = getattr(model.cfg, "staff_space", space)
    img = img if wanted == space else normalise(img, space=wanted, space_in=space, tilt=0.0).img
    try:
        ratio, seed = number_from(ratio, "share", 0, 1, is_whole=False), number_from(seed or 0, "seed", 0, 2**53)
    except ValueError as e:
        return hint_html("error", f"{one_line(e)}.")
    panels = reconstruct(model, img, ratio, seed)
    titles = {"What it sees": panels.masked, "What it imagines": panels.reconstruction, "Both": panels.completed}
    return views.panels_html(titles)


# Reward


NO_TRUTH = hint_html(
    "idle",
    f"To see what a reading would earn, read a picture and give the right score as {', '.join(TRUTH_SUFFIXES)}. "
    "The examples bring theirs.",
)


def number_in(field) -> float:
    "What a weight field holds; 0 for an emptied one."
    return float(field) if isinstance(field, (int, float)) and isfinite(field) else 0.0


def rescore(measured: dict | None, preset: str, *weights: float) -> list:
    "The rewards under the weights of the fields, from what was measured."
    if not measured or not isinstance(preset, str) or preset not in measured["of"]:
        return [gr.skip(), gr.skip()]
    new = dict(zip(TERMS, map(number_in, weights), strict=True))
    group = [b.reweighted(new) for b in measured["of"][preset]]
    names = [f"{i + 1}{' (shown)' if i == measured['at'] else ''}" for i in range(len(group))]
    shown = views.group_html(group, names) if len(group) > 1 else ""
    return [views.reward_html(group[measured["at"]]), shown]


def measure(taken: dict | None, truth: dict | None, preset: str, *weights: float) -> Iterator[tuple]:
    "Measure readings against the truth under every preset, so that a change of preset or weights is at once."
    if not taken or not truth:
        yield None, NO_TRUTH, "", "", "", ""
        return
    yield None, hint_html("busy", "Measuring."), "", "", "", ""
    try:
        path = uploaded(truth)
        true, group = read_truth_of_parts(path), [s.parts for s in taken["sheets"]]
        of = {name: [reward_of_score(parts, true, name, terms=TERMS) for parts in group] for name in PRESETS}
        measured = {"of": of, "at": taken["at"]}
        yield measured, *rescore(measured, preset, *weights), *views.compared_html(group[taken["at"]], true)
        return
    except ValueError as e:  # ScoreError: one line for a person
        message = one_line(e)
    except Exception as e:
        logging.exception("a reading could not be compared")
        message = f"this truth could not be compared ({type(e).__name__})"
    yield None, hint_html("error", f"Not compared: {message}."), "", "", "", ""


def fields_of(preset: str) -> list[dict]:
    "Value and range of the weight of every term: up to the next power of ten."
    weights = PRESETS[preset].weights
    top = 10.0 ** ceil(log10(max(abs(w) for w in weights.values())))
    ranges = [(-top, 0) if term.is_penalty else (0, top) for term in TERMS.values()]
    return [
        {"value": weights.get(term, 0.0), "minimum": low, "maximum": high, "step": top / 100}
        for term, (low, high) in zip(TERMS, ranges, strict=True)
    ]


def choose(measured: dict | None, preset: str) -> list:
    "The rewards under a preset, and its weights in the fields."
    if not (isinstance(preset, str) and preset in PRESETS):
        return [gr.skip()] * (2 + len(TERMS))
    fields = fields_of(preset)
    return [*rescore(measured, preset, *(f["value"] for f in fields)), *(gr.update(**f) for f in fields)]


def warm() -> None:
    "Let the tree distance and the grammar be compiled before somebody waits for them."
    warm_worker("vitomr.notation.pdf", "vitomr.page.documents", "vitomr.rewards")
    reward_of_score([["measure", "C4", "quarter"]], [["measure", "D4", "quarter"]], terms=TERMS)
    Grammar(time=True).legal(["measure", "C4", "quarter"])


# The page


THEME = gr.themes.Default(  # gradio's own file of the semi-bold weight lacks Latin letters
    font=[gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]
)
CSS = (HERE / "assets" / "app.css").read_text(encoding="utf-8")
CSS += "".join(f"#weight-{term} {{ --slider-color: {of.colour}; }}\n" for term, of in TERMS.items())
SCRIPT = f"<script>{(HERE / 'assets' / 'app.js').read_text(encoding='utf-8')}</script>"
INTRO = """# vitomr
Reads **printed music**, a line, a page, a photo or a PDF, and writes it as MusicXML. It does not read handwriting,
tablature, percussion, lyrics or dynamics."""
ABOUT = f"""
1. The page is laid flat; its systems are found and brought to one form: level, one size of staff, black on white.
2. A vision transformer looks at each line in patches; a second transformer writes the music as LMX tokens, one after
   the other.
3. The tokens become a score. What does not add up is mended, so that every program opens the file, and is counted in
   the line above the picture.

A colour says how sure the model was of a note. It is a small model that learned from engraved songs: expect mistakes,
more of them in scans and photos. Pictures are deleted after about an hour and used for nothing else.

From a program:
```python
from gradio_client import Client, handle_file
status, picture, score, tokens, *files = Client(url).predict(picture=handle_file("page.png"), api_name="/transcribe")
```
The files are MusicXML, MXL, MIDI, PDF, SVG and LMX, in this order; status, picture, score and tokens are HTML.
MusicXML as text: `client.predict(handle_file("page.png"), api_name="/read_music")`.
A request may ask for up to {MAX_PAGES} pages, and pages x samples x beam x looks may come to {MAX_COST}; it is stopped
when nobody listens to its answers any more.
"""
NO_MAE = "This installation has no weights of a masked autoencoder; VITOMR_MAE names a folder of them."
PLAYER = (HERE / "assets" / "player.html").read_text(encoding="utf-8")
private = {"api_visibility": "private"}
try:
    seer()
except ValueError as e:  # MaeWeightsError
    raise SystemExit(f"app.py: {e}; VITOMR_MAE names another folder") from None

def control(name: str, **layout) -> gr.components.Component:
    "The control of a field of `Decoding`."
    kind, options = control_of(name)
    return getattr(gr, kind)(**options, elem_id=name.replace("_", "-"), **layout)


with gr.Blocks(title="vitomr", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
    gr.Markdown(INTRO)
    truth = gr.File(label="The right score", height=130, scale=2, min_width=280, elem_id="truth", render=False)
    taken, measured = gr.State(), gr.State()  # the readings; preset → their breakdowns
    with gr.Tabs():
        with gr.Tab("Transcribe"):
            with gr.Row():
                picture = gr.Image(
                    type="filepath", sources=["upload", "clipboard", "webcam"], label="Picture", height=260, scale=3,
                    elem_id="picture",
                )  # fmt: skip
                with gr.Column(scale=2, min_width=280):
                    examples = gr.Examples(
                        [[str(HERE / "examples" / (name + end)) for end in (".png", ".musicxml")] for name in EXAMPLES],
                        [picture, truth],
                        example_labels=list(EXAMPLES.values()),
                        api_visibility="private",
                    )
                    pdf = gr.UploadButton(
                        "Open a PDF or TIFF", file_types=[".pdf", ".tif", ".tiff"], size="sm", elem_id="pdf"
                    )
            with gr.Accordion("How to read", open=False, elem_id="how"):
                with gr.Row():
                    way = gr.Radio(list(WAYS.items()), value="greedy", label="Choice of tokens", scale=4, elem_id="way")
                    grammar = control("grammar", scale=4)
                with gr.Row():
                    pages = gr.Textbox(
                        "", label="Pages of a PDF", placeholder="all, or 1-3,7", scale=3, elem_id="pages"
                    )
                    second_look, shifts = control("second_look", scale=3), control("shifts", scale=3)
                with gr.Row():
                    beam, temperature, top_k, top_p = (control(name) for of in OF_WAY.values() for name in of)
                    samples = gr.Slider(1, 8, 4, step=1, label="Samples", buttons=[], elem_id="samples")
                    seed = control("seed")
                again = gr.Button("Read again", size="sm", elem_id="again")
            status = gr.HTML(IDLE, label="Status", elem_id="status")
            with gr.Column(elem_id="results"):
                readings = gr.Radio([], label="Readings, the likeliest first", visible=False, elem_id="readings")
                with gr.Row(elem_id="sides"):
                    with gr.Column():
                        gr.Markdown("### The picture")
                        original = gr.HTML(label="Picture", apply_default_css=False, elem_id="original")
                    with gr.Column():
                        gr.Markdown("### Transcription")
                        gr.HTML(PLAYER, apply_default_css=False, elem_classes="when-done")
                        score = gr.HTML(label="Transcription", apply_default_css=False, elem_id="score")
                with gr.Row(elem_id="downloads", elem_classes="when-done"):
                    files = [
                        gr.DownloadButton(f"Download {kind}", size="sm", min_width=120, elem_id=f"download-{end[1:]}")
                        for kind, end in DOWNLOADS.items()
                    ]
                with gr.Accordion("Correct it", open=False, elem_id="editor", elem_classes="when-done"):
                    with gr.Tabs():
                        with gr.Tab("LMX"):
                            lmx = gr.Textbox(label="Tokens, a bar to a row", lines=8, max_lines=16, elem_id="lmx")
                            apply_lmx = gr.Button("Engrave", size="sm", elem_id="apply-lmx")
                        with gr.Tab("MusicXML"):
                            xml = gr.Textbox(label="MusicXML", lines=8, max_lines=16, elem_id="xml")
                            apply_xml = gr.Button("Engrave", size="sm", elem_id="apply-xml")
                    edited = gr.HTML(label="Correction", elem_id="edited")
                with gr.Accordion("Correct the systems", open=False, elem_id="systems", elem_classes="when-done"):
                    gr.Markdown(
                        "Drag a box or its corners; draw a new one on empty paper; delete the chosen one with the "
                        "delete key or a double click. Arrow keys move it, with shift they resize it."
                    )
                    frames = gr.HTML(label="Systems", apply_default_css=False, elem_id="frames")
                    boxes = gr.Textbox("", label="Boxes", elem_id="boxes", container=False)
                    reread = gr.Button("Read these systems", size="sm", elem_id="reread")
                with gr.Accordion("What the model wrote"):
                    tokens = gr.HTML(label="LMX tokens", elem_id="tokens")
        with gr.Tab("Reward"):
            gr.Markdown("What this reading would earn in training by reinforcement, term by term.")
            with gr.Row():
                truth.render()
                with gr.Column(scale=3, min_width=280, elem_classes="with-truth"):
                    preset = gr.Radio(list(PRESETS), value="vitomr", label="Preset", elem_id="preset")
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    earned = gr.HTML(NO_TRUTH, label="Reward", apply_default_css=False, elem_id="earned")
                with gr.Column(scale=1, min_width=220, elem_classes="with-truth"):
                    errors = gr.HTML(label="Errors", apply_default_css=False, elem_id="errors")
            group = gr.HTML(label="Group", apply_default_css=False, elem_id="group")
            with gr.Accordion("Weights", elem_classes="with-truth"), gr.Row(elem_id="weights"):
                weights = [
                    gr.Slider(label=term, buttons=[], min_width=140, elem_id=f"weight-{term}", **field)
                    for term, field in zip(TERMS, fields_of("vitomr"), strict=True)
                ]
            with gr.Column(elem_classes="with-truth"):
                diff = gr.HTML(label="Differences, engraved", apply_default_css=False, elem_id="diff")
                with gr.Accordion("Differences, token by token", open=False):
                    token_diff = gr.HTML(label="Differences, token by token", elem_id="token-diff")
        with gr.Tab("Under the hood"):
            gr.Markdown(
                "### Where the reader looked\nChoose a token, or go along them with the arrow keys: the patches that "
                "two attention heads of the decoder looked at while it was written."
            )
            gr.HTML(hint_html("idle", "Read a picture first."), elem_classes="before-reading")
            line = gr.Dropdown([], label="Line of music", visible=False, elem_id="line")
            gaze = gr.HTML(label="Look", apply_default_css=False, elem_id="gaze")
            gr.Markdown("### What the masked autoencoder sees")
            with gr.Row(visible=seer() is not None):
                ratio = gr.Slider(0.1, 0.95, 0.75, step=0.05, label="Share of patches that is hidden", elem_id="ratio")
                mask_seed = gr.Number(0, precision=0, label="Seed", elem_id="mask-seed")
            imagined = gr.HTML(
                hint_html("idle", "Read a picture first." if seer() else NO_MAE),
                label="Imagined", apply_default_css=False, elem_id="imagined",
            )  # fmt: skip
            gr.Markdown("### The model card")
            gr.Markdown(card(), elem_id="card")
        if PAIRS:
            from vitomr.audio.labels import KEYS, LabelStore, label_controls
            from vitomr.audio.preference import load_pairs

            with gr.Tab("Which is better?"):
                store = LabelStore(Path(PAIRS) / "choices.jsonl", load_pairs(PAIRS))
                next_pair, pair_outputs = label_controls(store)
            demo.load(next_pair, None, pair_outputs, **private)
            demo.load(None, None, None, js=KEYS)
    with gr.Accordion("What is this", open=False):
        gr.Markdown(ABOUT)

    how = [way, beam, temperature, top_k, top_p, grammar, seed, samples, pages, second_look, shifts]
    outputs = [status, original, score, tokens, *files, taken]
    belongings = [readings, lmx, xml, frames, boxes, line, gaze]
    read = {"fn": transcribe, "inputs": [picture, *how, boxes], "outputs": outputs}
    read |= {"preprocess": False}  # gradio checks where the file lies, and nobody but vitomr opens it
    read |= {"show_progress": "minimal", "show_progress_on": status, "concurrency_id": "read"}  # one at a time
    compared = [measured, earned, group, errors, diff, token_diff]
    nothing = [None, "", "", "", "", ""]
    # first goes what belonged to the picture before: the page asks for the effects of one event one after the other
    quick = {"queue": False, **private}
    picture.upload(lambda: [None, "", None, *nothing], outputs=[truth, boxes, pdf, *compared], **quick)
    pdf.upload(lambda: [None, "", None, *nothing], outputs=[truth, boxes, picture, *compared], **quick)
    examples.load_input_event.then(lambda: ["", None, *nothing], outputs=[boxes, pdf, *compared], **quick)
    from_pdf = read | {"inputs": [pdf, *how, boxes]}
    reading = [
        picture.upload(  # its HTML is for people, not for a language model
            **read,
            api_name="transcribe",
            trigger_mode="always_last",
            api_visibility="undocumented" if MCP else "public",
        ),
        examples.load_input_event.then(**read, **private),
        pdf.upload(**from_pdf, **private),
    ]
    either = lambda picture, pdf, *rest: (yield from transcribe(picture or pdf, *rest))
    for button in (again, reread):
        reading.append(button.click(**read | {"fn": either, "inputs": [picture, pdf, *how, boxes]}, **private))
    picture.clear(
        lambda: [*outputs_of(IDLE), None, *nothing, *reveal(None)], outputs=[*outputs, truth, *compared, *belongings],
        cancels=reading, **quick,
    )  # fmt: skip

    shown = {"show_progress": "hidden", **private}
    as_is = {"preprocess": False}  # what a program sends is looked at here
    picked = readings.input(select, [taken, readings], outputs, **shown, **as_is)
    corrected = [
        apply_lmx.click(edit_lmx, [taken, lmx], [edited, *outputs], **shown),
        apply_xml.click(edit_musicxml, [taken, xml], [edited, *outputs], **shown),
    ]
    line.input(looked, [taken, line], gaze, **shown, **as_is)
    dreamt = [imagine, [taken, ratio, mask_seed], imagined]
    if seer():
        gr.on([ratio.release, mask_seed.input], *dreamt, **shown)

    scoring = {"show_progress": "hidden", "trigger_mode": "always_last", **private}
    for event in (*(r.then for r in (*reading, picked, *corrected)), truth.upload, truth.clear):
        event(measure, [taken, truth, preset, *weights], compared, **scoring, **as_is)  # any number is a weight
    for event in (*reading, picked, *corrected):
        event.then(reveal, taken, belongings, **shown)
        if seer():
            event.then(*dreamt, **shown)
    preset.input(choose, [measured, preset], [earned, group, *weights], queue=False, **scoring, **as_is)
    gr.on(
        [w.input for w in weights], rescore, [measured, preset, *weights], [earned, group],
        queue=False, **scoring, **as_is,
    )  # fmt: skip

    gr.api(read_music, api_name="read_music", concurrency_id="read")

demo.queue(default_concurrency_limit=1, max_size=20)

if __name__ == "__main__":
    try:
        reader()
    except ValueError as e:  # WeightsError
        raise SystemExit(f"app.py: {e}; VITOMR_WEIGHTS names another folder or hub id") from None
    if MCP and importlib.util.find_spec("mcp") is None:
        raise SystemExit("app.py: VITOMR_MCP asks for an MCP server; install what it needs: pip install 'vitomr[mcp]'")
    Thread(target=warm, daemon=True).start()
    inner = [Middleware(ServedHosts, names=served_hosts()), Middleware(UploadsOnly), Middleware(listeners.middleware)]
    options = {"app_kwargs": {"middleware": inner}}
    options |= {"ssr_mode": False, "run_history": False, "share": False, "max_file_size": "60mb", "mcp_server": MCP}
    demo.launch(theme=THEME, css=CSS, head=SCRIPT, footer_links=["api", "settings"], **options)
