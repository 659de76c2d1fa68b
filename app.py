"""The page: a picture of one line of music in, a score out, and its reward beside the truth. It wires components."""

import html
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from math import ceil, exp, isfinite, log10
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one token at a time gains nothing from threads; on a busy CPU they wait

try:
    import spaces  # a Space with ZeroGPU; before torch
except ImportError:
    spaces = None
import gradio as gr  # noqa: E402
from PIL import Image  # noqa: E402

from vitomr.figures import TERM_COLOURS, stacked  # noqa: E402
from vitomr.notation.engrave import render_svg  # noqa: E402
from vitomr.notation.metrics import errors_by_kind, symbol_error_rate, token_distance  # noqa: E402
from vitomr.rewards import PRESETS, TERMS, Breakdown, reward  # noqa: E402
from vitomr.transcribe import TRUTH_SUFFIXES, Transcriber, Transcription, read_truth  # noqa: E402

MAX_TOKENS = int(os.environ.get("VITOMR_MAX_TOKENS") or 1024)
HERE = Path(__file__).parent
UPDATE_SECONDS = 0.1  # at least, between two views of a growing score
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
MEANINGS = {
    "TED": "few edits of the tree",
    "TEDn": "few for the tree's size",
    "WF": "well formed",
    "F1": "tokens in common",
    "REP": "repeats itself",
    "LEN": "wrong length",
    "NOTE": "notes in common",
    "BARS": "bars that add up",
    "MCR": "little left to correct",
}
PENALTIES = {term for preset in PRESETS.values() for term, weight in preset.weights.items() if weight < 0}


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


# How a reward looks. Raw values lie on one scale and weighted ones on another, each with its zero marked.


def hint_html(kind: str, text: str) -> str:
    "A line in place of a reward (idle, busy or error)."
    return f'<p class="hint {kind}" role="{"alert" if kind == "error" else "status"}">{html.escape(text)}</p>'


def number(x: float, form: str = ".3f") -> str:
    return f"{round(x, 3) + 0.0:{form}}".replace("-", "\N{MINUS SIGN}")  # + 0.0 makes of -0.0 a plain zero


def bar_html(pieces: list[tuple[str, float, float]], low: float, high: float, dot: float | None = None) -> str:
    "Coloured pieces from one value to another, and a dot, on a scale from low to high, which holds zero."
    place = lambda x: 100 * (x - low) / (high - low)
    drawn = "".join(
        f'<i style="left: {place(min(a, b)):.2f}%; width: {abs(place(b) - place(a)):.2f}%; background: {colour}"></i>'
        for colour, a, b in pieces
    )
    drawn += f'<b style="left: {place(0):.2f}%"></b>'
    drawn += "" if dot is None else f'<em style="left: {place(dot):.2f}%"></em>'
    return f'<span class="track" aria-hidden="true">{drawn}</span>'


def reward_html(found: Breakdown) -> str:
    "A row for each term and one for the total: raw value, weight, weighted value."
    raw, weighted = ({t: values[t] for t in TERMS} for values in (found.raw, found.weighted))
    raw_scale = min(0.0, *raw.values()), max(1.0, *raw.values())
    pieces = [(TERM_COLOURS[term], start, end) for term, start, end in stacked(weighted)]
    ends = [x for _, *piece in pieces for x in piece]
    scale = min(ends), max(ends)
    scale = scale if scale[0] < scale[1] else (0.0, 1.0)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(t)}</th><td class="meaning">{html.escape(MEANINGS[t])}</td>'
        f"<td>{number(x)}</td><td>{bar_html([(TERM_COLOURS[t], 0, x)], *raw_scale)}</td>"
        f"<td>{number(found.weights[t], 'g')}</td><td>{number(weighted[t])}</td>"
        f"<td>{bar_html([(TERM_COLOURS[t], 0, weighted[t])], *scale)}</td></tr>"
        for t, x in raw.items()
    )
    heads = '<th>Term</th><td class="meaning"></td><th colspan="2">Raw</th><th>Weight</th><th colspan="2">Weighted</th>'
    most = number(sum(max(w, 0.0) for w in found.weights.values()), "g")
    total = (
        f'<th scope="row">Total</th><td class="meaning">at most {most}</td><td></td><td></td><td></td>'
        f"<td>{number(found.total)}</td><td>{bar_html(pieces, *scale, dot=found.total)}</td>"
    )
    body = f"<tbody>{rows}</tbody><tfoot><tr>{total}</tr></tfoot>"
    return f'<table class="terms"><thead><tr>{heads}</tr></thead>{body}</table>'


def errors_html(pred: list[str], true: list[str]) -> str:
    "The symbol error rate, and what is wrong kind by kind."
    rate = f"{100 * symbol_error_rate(pred, true):.1f} %"
    edits = f"{count(token_distance(pred, true), 'edit')} for {count(len(true), 'token')}"
    rows = "".join(
        f'<tr><th scope="row">{html.escape(kind)}</th><td>{n}</td></tr>'
        for kind, n in errors_by_kind(pred, true).most_common()
    )
    head = '<thead><tr><th scope="col">Error</th><td>Count</td></tr></thead>'
    table = f'<table class="errors">{head}<tbody>{rows}</tbody></table>'
    table = table if rows else "<p>There is nothing to correct.</p>"
    return f'<p class="rate">Symbol error rate <b>{rate}</b>: {edits}.</p>{table}'


def page(
    status: str, reading: Transcription | None = None, picture: Path | None = None, files: list[Path] | None = None
) -> list:
    "The value of every output, in order."
    files = files or [None] * len(DOWNLOADS)
    if reading is None or not reading.tokens:
        return [status, None, "", "", *files, None]
    svg = render_svg(reading.score, options={"svgViewBox": True})
    shown = [sheet_html(svg), tokens_html(reading.tokens, reading.logp)]
    return [status, picture, *shown, *files, reading.tokens if any(files) else None]


def save_picture(reading: Transcription, path: Path) -> Path:
    Image.fromarray(reading.picture).save(path)
    return path


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
        with TemporaryDirectory() as folder:  # gradio takes copies before it asks for more
            due, seen = 0.0, None
            for reading in reader().stream(path, max_tokens=MAX_TOKENS):
                # One file for all answers: an array would be written anew each time, under a reader of the last.
                seen = seen or save_picture(reading, Path(folder, "picture.png"))
                if time.monotonic() >= due:
                    so_far = count(reading.tokens.count("measure"), "bar")
                    yield page(status_html("busy", f"Reading: {so_far} so far."), reading, seen)
                    due = time.monotonic() + UPDATE_SECONDS
            files = [reading.save(Path(folder, Path(path).stem + suffix)) for suffix in DOWNLOADS.values()]
            yield page(status_html("done", facts(reading)), reading, seen, files)
        return
    except ValueError as e:  # PictureError, NoStaffError, ScoreError: one line for a person
        message = str(e)
    except Exception as e:
        logging.exception("a picture could not be read")
        message = f"this picture could not be read ({type(e).__name__})"
    yield page(status_html("error", f"Not read: {message}."))
    raise gr.Error(message, visible=False, print_exception=False)  # for programs; the page has its line


NO_TRUTH = hint_html(
    "idle",
    f"To see what this reading would earn, give the right score, one part as {', '.join(TRUTH_SUFFIXES)}. "
    "The examples bring theirs.",
)


def number_in(field) -> float:
    "What a weight field holds; 0 for an emptied one."
    return float(field) if isinstance(field, (int, float)) and isfinite(field) else 0.0


def rescore(measured: dict[str, Breakdown] | None, preset: str, *weights: float):
    "The reward under the weights of the fields, from what was measured."
    if not measured or preset not in measured:
        return gr.skip()
    return reward_html(measured[preset].reweighted(dict(zip(TERMS, map(number_in, weights), strict=True))))


def measure(tokens: list[str] | None, truth: dict | None, preset: str, *weights: float) -> Iterator[tuple]:
    "Measure a finished reading against the truth under every preset, so that a change of preset or weights is at once."
    path = (truth or {}).get("path")
    if not tokens or not path:
        yield None, NO_TRUTH, ""
        return
    yield None, hint_html("busy", "Measuring."), ""
    try:
        true = read_truth(path)
        measured = {name: reward(tokens, true, name, terms=TERMS) for name in PRESETS}
        yield measured, rescore(measured, preset, *weights), errors_html(tokens, true)
        return
    except ValueError as e:  # ScoreError: one line for a person
        message = str(e)
    except Exception as e:
        logging.exception("a reading could not be compared")
        message = f"this truth could not be compared ({type(e).__name__})"
    yield None, hint_html("error", f"Not compared: {message}."), ""


def fields_of(preset: str) -> list[dict]:
    "Value and range of the weight of every term: up to the next power of ten."
    weights = PRESETS[preset].weights
    top = 10.0 ** ceil(log10(max(abs(w) for w in weights.values())))
    ranges = [(-top, 0) if term in PENALTIES else (0, top) for term in TERMS]
    return [
        {"value": weights.get(term, 0.0), "minimum": low, "maximum": high, "step": top / 100}
        for term, (low, high) in zip(TERMS, ranges, strict=True)
    ]


def choose(measured: dict[str, Breakdown] | None, preset: str) -> list:
    "The reward under a preset, and its weights in the fields."
    fields = fields_of(preset)
    return [rescore(measured, preset, *(f["value"] for f in fields)), *(gr.update(**f) for f in fields)]


def warm() -> None:
    "Let the tree distance be compiled before somebody waits for it."
    reward(["measure", "C4", "quarter"], ["measure", "D4", "quarter"], terms=TERMS)


THEME = gr.themes.Default(  # gradio's own file of the semi-bold weight lacks Latin letters
    font=[gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]
)
CSS = """
.status, .hint { margin: 0; padding: .5rem .75rem; border-left: 4px solid var(--color-accent); }
.status.idle, .hint.idle { border-color: transparent; padding-left: 0; }
.status.error, .hint.error { border-color: #d55e00; font-weight: 700; }
#status [data-testid="status-tracker"] .error { display: none; }
.gradio-container:not(:has(.sheet)) #results, .gradio-container:not(:has(.status.done)) #downloads { display: none; }
.gradio-container:not(:has(.status.done)) #reward, #reward:not(:has(.terms)) .with-truth { display: none; }
#results h3 { margin: 0; font-size: 1rem; }
.html-container:has(> div > .status, > div > .sheet), #earned .html-container, #errors .html-container { padding: 0; }
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
#weights > .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(140px, 18%), 1fr)); width: 100%;
  background: none; border: 0; }
#weights .head { flex-wrap: nowrap; }
#weights input[type=number] { width: 4.5rem; }
.terms, .errors { border-collapse: collapse; font-size: .9rem; line-height: 1.3; }
.terms { width: 100%; }
.terms th, .terms td, .errors th, .errors td { padding: .2rem .75rem .2rem 0; text-align: left; }
.terms td:not(.meaning, :has(.track)), .terms thead th:nth-child(4), .errors td {
  text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.terms .meaning { opacity: .75; font-weight: 400; }
.terms td:has(.track) { width: 27%; padding-right: 1.25rem; }
.terms tfoot > tr > * { border-top: 1px solid; font-weight: 700; padding-top: .4rem; }
.track { position: relative; display: block; height: 1rem; background: #eee; }
.track i { position: absolute; top: 0; bottom: 0; }
.track b { position: absolute; top: -2px; bottom: -2px; border-left: 1px solid #222; }
.track em { position: absolute; width: .6rem; height: .6rem; margin: .2rem -.3rem; border-radius: 50%; background: #222;
  box-shadow: 0 0 0 2px #fff; }
.errors tbody th { font-weight: 400; }
.errors thead td { font-weight: 700; }
.rate { margin: 0 0 .5rem; }
@media (max-width: 640px) { /* a line for the raw value, one for the weighted */
  .terms tr { display: grid; grid-template-columns: 3.5rem 4rem 1fr; align-items: center; padding: .2rem 0; }
  .terms th, .terms td, .terms td:has(.track) { width: auto; padding: .1rem .5rem .1rem 0; }
  .terms tbody .meaning, .terms thead .meaning, .terms tfoot td:empty { display: none; }
  .terms [colspan] { grid-column: span 2; }
  .terms tfoot > tr { border-top: 1px solid; }
  .terms tfoot > tr > * { border: 0; }
  .terms tfoot .meaning { grid-column: span 2; }
  .terms tfoot td:nth-child(6) { grid-column: 2; }
}
"""
CSS += "".join(f"#weight-{term} {{ --slider-color: {colour}; }}\n" for term, colour in TERM_COLOURS.items())
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
    truth = gr.File(label="The right score", height=130, scale=2, min_width=280, elem_id="truth", render=False)
    with gr.Row():
        picture = gr.Image(
            type="filepath", sources=["upload", "clipboard"], label="Picture", height=260, scale=3, elem_id="picture"
        )
        with gr.Column(scale=2, min_width=280):
            examples = gr.Examples(
                [[str(HERE / "examples" / f"{name}{end}") for end in (".png", ".musicxml")] for name in EXAMPLES],
                [picture, truth],
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
        with gr.Column(elem_id="reward"):
            gr.Markdown("### Reward\nWhat this reading would earn in training by reinforcement, term by term.")
            with gr.Row():
                truth.render()
                with gr.Column(scale=3, min_width=280, elem_classes="with-truth"):
                    preset = gr.Radio(list(PRESETS), value="vitomr", label="Preset", elem_id="preset")
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    earned = gr.HTML(NO_TRUTH, label="Reward", apply_default_css=False, elem_id="earned")
                with gr.Column(scale=1, min_width=220, elem_classes="with-truth"):
                    errors = gr.HTML(label="Errors", apply_default_css=False, elem_id="errors")
            with gr.Accordion("Weights", elem_classes="with-truth"), gr.Row(elem_id="weights"):
                weights = [
                    gr.Slider(label=term, buttons=[], min_width=140, elem_id=f"weight-{term}", **field)
                    for term, field in zip(TERMS, fields_of("vitomr"), strict=True)
                ]
    with gr.Accordion("What is this", open=False):
        gr.Markdown(ABOUT)

    finished = gr.State()  # the tokens of the reading
    measured = gr.State()  # preset → Breakdown
    outputs = [status, normal_form, score, tokens, *files, finished]
    read = {"fn": transcribe, "inputs": picture, "outputs": outputs}
    read |= {"preprocess": False}  # gradio checks where the file lies, and nobody but vitomr opens it
    read |= {"show_progress": "minimal", "show_progress_on": status}
    private = {"api_visibility": "private"}
    # first goes what belonged to the picture before: the page asks for the effects of one event one after the other
    compared, nothing = [measured, earned, errors], [None, "", ""]
    picture.upload(lambda: [None, *nothing], outputs=[truth, *compared], queue=False, **private)
    examples.load_input_event.then(lambda: nothing, outputs=compared, queue=False, **private)
    reading = [
        picture.upload(**read, api_name="transcribe", trigger_mode="always_last"),
        examples.load_input_event.then(**read, **private),
    ]
    picture.clear(
        lambda: [*page(IDLE), None, *nothing], outputs=[*outputs, truth, *compared],
        cancels=reading, queue=False, **private,
    )  # fmt: skip

    scoring = {"show_progress": "hidden", "trigger_mode": "always_last", **private}
    as_is = {"preprocess": False}  # as for pictures; and a number beyond the end of its slider is a weight too
    for event in (*(r.then for r in reading), truth.upload, truth.clear):
        event(measure, [finished, truth, preset, *weights], compared, **scoring, **as_is)
    preset.input(choose, [measured, preset], [earned, *weights], queue=False, **scoring)
    gr.on([w.input for w in weights], rescore, [measured, preset, *weights], earned, queue=False, **scoring, **as_is)

demo.queue(default_concurrency_limit=1, max_size=20)

if __name__ == "__main__":
    try:
        reader()
    except ValueError as e:  # WeightsError
        raise SystemExit(f"app.py: {e}; VITOMR_WEIGHTS names another folder or hub id") from None
    Thread(target=warm, daemon=True).start()
    options = {"ssr_mode": False, "run_history": False, "share": False, "max_file_size": "60mb"}
    demo.launch(theme=THEME, css=CSS, footer_links=["api", "settings"], **options)
