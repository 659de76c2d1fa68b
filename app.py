"""The page: a picture of one line of music in, a score out. It wires components; vitomr.transcribe does the reading."""

import html
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from math import exp
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one token at a time gains nothing from threads; on a busy CPU they wait

try:
    import spaces  # a Space with ZeroGPU; before torch
except ImportError:
    spaces = None
import gradio as gr  # noqa: E402

from vitomr.notation.engrave import render_svg  # noqa: E402
from vitomr.transcribe import Transcriber, Transcription  # noqa: E402

MAX_TOKENS = int(os.environ.get("VITOMR_MAX_TOKENS") or 1024)
UPDATE_SECONDS = 0.4  # at least, between two views of a growing score
DOWNLOADS = {"MusicXML": ".musicxml", "MIDI": ".mid", "MXL": ".mxl", "LMX": ".lmx", "SVG": ".svg"}
EXAMPLES = {
    "bach-invention-1-scan-1": "Bach, a scan of 1853",
    "bach-invention-1-scan-3": "Bach, two lines further",
    "schumann-juengling-photo": "Schumann, like a photo",
    "beethoven-maigesang-piano": "Beethoven, piano",
    "schubert-fruehlingstraum-piano": "Schubert, piano",
    "schubert-fruehlingstraum-voice": "Schubert, voice",
    "schumann-rosen-voice": "Schumann, voice",
}


@cache
def reader() -> Transcriber:
    "The model, loaded once. VITOMR_WEIGHTS names a folder or hub id other than the packaged weights."
    return Transcriber.from_pretrained(os.environ.get("VITOMR_WEIGHTS") or None)


# How a reading looks. Every string is escaped; the SVG is Verovio's own, drawn from tokens of a fixed vocabulary.

TINTS = {0.95: "95 % and more", 0.8: "80 to 95 %", 0.5: "50 to 80 %", 0.0: "under 50 %"}  # by least probability


def status_html(kind: str, text: str) -> str:
    "The status line; its kind (idle, busy, done or error) also decides what the page shows."
    role = "alert" if kind == "error" else "status"
    return f'<p class="status {kind}" role="{role}">{html.escape(text)}</p>'


def sheet_html(svg: str) -> str:
    "An engraving as wide as the page; it scrolls sideways where that would make it too small."
    width = re.search(r'viewBox="0 0 (\d+)', svg)[1]
    about = 'tabindex="0" role="img" aria-label="The transcription, engraved"'
    return f'<div class="sheet" {about} style="--natural: {width}px">{svg}</div>'


def token_html(text: str, p: float | None = None, tint: float | None = None) -> str:
    tint = max(least for least in TINTS if p >= least) if tint is None else tint
    title = "" if p is None else f' title="{100 * p:.0f} %"'
    return f'<span class="lmx tint-{100 * tint:.0f}"{title}>{html.escape(text)}</span>'


def tokens_html(tokens: list[str], logp: list[float]) -> str:
    "A line of tokens for each bar, tinted where the model was unsure."
    if not tokens:
        return ""
    bars: list[list[str]] = []
    for token, p in zip(tokens, logp, strict=True):
        if token == "measure" or not bars:
            bars.append([])
        bars[-1].append(token_html(token, exp(p)))
    legend = " ".join(token_html(text, tint=least) for least, text in TINTS.items())
    lines = "".join(f"<li>{' '.join(bar)}</li>" for bar in bars)
    return f'<p class="legend">Probability of a token: {legend}</p><ol class="bars" tabindex="0">{lines}</ol>'


def count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def facts(reading: Transcription) -> str:
    "One line about a finished reading."
    found, n = reading.analysis, len(reading.tokens)
    if found.fatal:
        return "No music was read in this picture."
    sure = 100 * exp(sum(reading.logp) / n)
    mended = Counter(e.kind.replace("-", " ") for e in found.minor)
    kinds = ", ".join(f"{k} {kind}" for kind, k in mended.most_common())
    lines = [
        f"{count(reading.tokens.count('measure'), 'bar')}, {count(n, 'token')}, {sure:.0f} % sure on average.",
        f"Mended: {kinds}." if mended else "Nothing had to be mended.",
        "Orange rests fill a bar." if "unfilled measure" in mended else "",
        f"Stopped at the limit of {MAX_TOKENS} tokens." if reading.truncated else "",
    ]
    return " ".join(line for line in lines if line)


def page(status: str, reading: Transcription | None = None, files: list[Path] | None = None) -> list:
    "The value of every output, in order."
    files = files or [None] * len(DOWNLOADS)
    if reading is None or not reading.tokens:
        return [status, None, "", "", *files]
    svg = render_svg(reading.score, options={"svgViewBox": True})
    return [status, reading.picture, sheet_html(svg), tokens_html(reading.tokens, reading.logp), *files]


IDLE = status_html("idle", "Drop a picture, paste one, or pick an example.")


@(spaces.GPU if spaces else lambda f: f)
def transcribe(picture: dict | None) -> Iterator[list]:
    "Read a picture of one system of one or two staves of printed music. The last answer holds the files."
    path = (picture or {}).get("path")
    if not path:
        yield page(IDLE)
        return
    yield page(status_html("busy", "Reading."))
    try:
        due = 0.0
        for reading in reader().stream(path, max_tokens=MAX_TOKENS):
            if time.monotonic() >= due:
                so_far = count(reading.tokens.count("measure"), "bar")
                yield page(status_html("busy", f"Reading: {so_far} so far."), reading)
                due = time.monotonic() + UPDATE_SECONDS
        with TemporaryDirectory() as folder:  # gradio takes copies before it asks for more
            files = [reading.save(Path(folder, Path(path).stem + suffix)) for suffix in DOWNLOADS.values()]
            yield page(status_html("done", facts(reading)), reading, files)
        return
    except ValueError as e:  # PictureError, NoStaffError, ScoreError: one line for a person
        message = str(e)
    except Exception as e:
        logging.exception("a picture could not be read")
        message = f"this picture could not be read ({type(e).__name__})"
    yield page(status_html("error", f"Not read: {message}."))
    raise gr.Error(message, visible=False, print_exception=False)  # for programs; the page has its line


THEME = gr.themes.Default(  # gradio's own file of the semi-bold weight lacks Latin letters
    font=[gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]
)
CSS = """
.status { margin: 0; padding: .5rem .75rem; border-left: 4px solid var(--color-accent); }
.status.idle { border-color: transparent; padding-left: 0; }
.status.error { border-color: #d55e00; font-weight: 700; }
#status [data-testid="status-tracker"] .error { display: none; }
.gradio-container:not(:has(.sheet)) #results, .gradio-container:not(:has(.status.done)) #downloads { display: none; }
#results h3 { margin: 0; font-size: 1rem; }
.html-container:has(> div > .status, > div > .sheet) { padding: 0; }
#normal-form, #normal-form .image-frame { background: #fff; }
#normal-form button, #normal-form .image-frame, #normal-form img { width: 100%; max-height: 14rem; cursor: default; }
#normal-form img { object-fit: contain; object-position: left; padding: .25rem .75rem; }
.sheet { overflow-x: auto; padding: .75rem; background: #fff; color: #000; border: 1px solid #ccc; }
.sheet svg { display: block; height: auto; width: clamp(.8 * var(--natural), 100%, 1.5 * var(--natural)); }
.bars { margin: 0; padding-left: 2.5rem; max-height: 24rem; overflow-y: auto; list-style: decimal; }
.bars li { font: .85rem/1.9 var(--font-mono); }
.legend { margin: 0 0 .5rem; font-size: .85rem; line-height: 2; }
.lmx { padding: .1rem .2rem; border-radius: 3px; border-bottom: 2px solid transparent; white-space: nowrap; }
.tint-80 { background: rgb(230 159 0 / 22%); }
.tint-50 { background: rgb(230 159 0 / 50%); border-bottom: 2px dotted currentColor; }
.tint-0 { background: rgb(213 94 0 / 55%); border-bottom: 2px solid currentColor; }
"""
INTRO = """# vitomr
Reads a picture of **one line of printed music**, a single system of one or two staves, and writes it as MusicXML.
It does not read whole pages, handwriting, tablature, percussion, lyrics or dynamics."""
ABOUT = """
1. The picture is brought to one form: level, one size of staff, black on white.
2. A vision transformer looks at it in patches; a second transformer writes the music as a line of LMX tokens, one
   after the other.
3. The tokens become a score. What does not add up is mended, so that every program opens the file, and is counted in
   the line above the picture.

A tint says how sure the model was of a token. It is a small model that learned from engraved songs: expect mistakes,
more of them in scans and photos. Pictures are deleted after about an hour and
used for nothing else.

From a program:
```python
from gradio_client import Client, handle_file
status, picture, score, tokens, *files = Client(url).predict(picture=handle_file("line.png"), api_name="/transcribe")
```
The files are MusicXML, MIDI, MXL, LMX and SVG, in this order.
"""

with gr.Blocks(title="vitomr", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
    gr.Markdown(INTRO)
    with gr.Row():
        picture = gr.Image(
            type="filepath", sources=["upload", "clipboard"], label="Picture", height=260, scale=3, elem_id="picture"
        )
        with gr.Column(scale=2, min_width=280):
            examples = gr.Examples(
                [[str(Path(__file__).parent / "examples" / f"{name}.png")] for name in EXAMPLES],
                picture,
                example_labels=list(EXAMPLES.values()),
                api_visibility="private",
            )
    status = gr.HTML(IDLE, label="Status", elem_id="status")
    with gr.Column(elem_id="results"):
        gr.Markdown("### The picture as it is read")
        normal_form = gr.Image(
            label="The picture as it is read", alt_text="The picture, level and in the size that the model sees",
            format="png", interactive=False, show_label=False, buttons=[], elem_id="normal-form",
        )  # fmt: skip
        gr.Markdown("### Transcription")
        score = gr.HTML(label="Transcription", apply_default_css=False, elem_id="score")
        with gr.Row(elem_id="downloads"):
            files = [
                gr.DownloadButton(f"Download {label}", size="sm", min_width=150, elem_id=f"download-{label.lower()}")
                for label in DOWNLOADS
            ]
        with gr.Accordion("What the model wrote"):
            tokens = gr.HTML(label="LMX tokens", elem_id="tokens")
    with gr.Accordion("What is this", open=False):
        gr.Markdown(ABOUT)

    outputs = [status, normal_form, score, tokens, *files]
    read = {"fn": transcribe, "inputs": picture, "outputs": outputs}
    read |= {"preprocess": False}  # gradio checks where the file lies, and nobody but vitomr opens it
    read |= {"show_progress": "minimal", "show_progress_on": status}
    reading = [
        picture.upload(**read, api_name="transcribe", trigger_mode="always_last"),
        examples.load_input_event.then(**read, api_visibility="private"),
    ]
    picture.clear(lambda: page(IDLE), outputs=outputs, cancels=reading, queue=False, api_visibility="private")

demo.queue(default_concurrency_limit=1, max_size=20)

if __name__ == "__main__":
    try:
        reader()
    except ValueError as e:  # WeightsError
        raise SystemExit(f"app.py: {e}; VITOMR_WEIGHTS names another folder or hub id") from None
    options = {"ssr_mode": False, "run_history": False, "share": False, "max_file_size": "60mb"}
    demo.launch(theme=THEME, css=CSS, footer_links=["api", "settings"], **options)
