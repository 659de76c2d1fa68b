"""The page: a picture, photo or PDF of printed music in, a score out, and how it was read. It wires components."""

import importlib.util
import inspect
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
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

from vitomr import opening, proof, views  # noqa: E402
from vitomr.mae import MAE, load_mae, reconstruct  # noqa: E402
from vitomr.notation.grammar import Grammar  # noqa: E402
from vitomr.notation.score import ScoreError, musicxml_bytes  # noqa: E402
from vitomr.page.documents import Pages, n_pages, page_numbers  # noqa: E402
from vitomr.page.staves import normalise, open_picture  # noqa: E402
from vitomr.progress import LEAST_SURE, Pace, busy_html, doubt_text, how_far, how_like_music, waiting_html  # noqa: E402
from vitomr.reading.choices import Decoding, control_of, takes_choices  # noqa: E402
from vitomr.reading.transcription import Document  # noqa: E402
from vitomr.reading.weights import PACKAGED  # noqa: E402
from vitomr.rewards import PRESETS, TERMS, reward_of_score  # noqa: E402
from vitomr.sandbox import one_line, short_name  # noqa: E402
from vitomr.sandbox import warm as warm_worker  # noqa: E402
from vitomr.serving import (  # noqa: E402
    GRACE,
    MAX_COST,
    MAX_SAMPLES,
    Listeners,
    ServedHosts,
    Shelf,
    Turns,
    UploadsOnly,
    Watch,
    boxes_from,
    check_cost,
    decoding_from,
    number_from,
    served_hosts,
    share_arenas,
    trim,
    uploaded,
)
from vitomr.transcribe import REFERENCE_SUFFIXES, Progress, Transcriber, read_references_of_parts  # noqa: E402
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
turns = Turns(at_once=8 if spaces else 1)  # ZeroGPU has a queue of its own
shelf = Shelf()  # of readings; sessions hold their keys
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


IDLE = status_html("idle", "")


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


KEPT = [gr.skip()] * (len(DOWNLOADS) + 4)  # all outputs but the status line stay as they are


def saved(sheet: Sheet) -> Iterator[list[Path]]:
    "The files of a reading; gradio takes copies before it asks for more."
    with TemporaryDirectory() as folder:
        stem = Path(sheet.document.name).stem[:50]
        yield [sheet.save(Path(folder, stem + suffix)) for suffix in DOWNLOADS.values()]


def present(sheets: list[Sheet], at: int = 0, text: str | None = None, history=None) -> Iterator[list]:
    "A finished reading and its files."
    sheet = sheets[at]
    if not any(line.look.tokens for line in sheet.lines):
        yield outputs_of(status_html("error", "No music was read in this picture."))
        return
    score, original, tokens = proof.rows_html(sheet), views.whole_html(sheet), views.lines_html(sheet)
    yield outputs_of(busy_html("Engraved. Writing the files."), original, score, tokens)
    for files in saved(sheet):
        taken = {"sheets": sheets, "at": at, "history": history or proof.History()}
        yield outputs_of(status_html("done", text or views.summary(sheet)), original, score, tokens, files, taken)


def growing(news: Progress, pace: Pace, passed: float, sofar: str) -> list:
    "A reading that is not finished: the page that is read now."
    status = busy_html(sofar + how_far(pace, passed), pace.share)
    page = Document(news.document.name, [news.page] if news.page else news.document.pages[-1:])
    if not any(line.tokens for line in page.lines):
        return outputs_of(status, views.found_html(page))
    several = len(page.lines) > 1
    try:
        svg = views.engraving(page.assembled.score if several else page.lines[0].score, lines=several)
    except ScoreError:  # the beginning of a score that cannot be engraved; the whole of it may be
        return [status, *KEPT]
    tokens = "" if several else views.tokens_html(page.lines[0].tokens, page.lines[0].logp)
    return outputs_of(status, gr.skip(), views.sheet_html(svg), tokens)


def read_once(source: Pages | Document, how: Decoding, watch: Watch, numbers, boxes, anyway: bool, sofar: str):
    "One reading: lists of outputs while it grows; at its end the document, or None where it is too little like music."
    pace, start, due, last, checks = Pace(len(numbers)), time.monotonic(), 0.0, None, not anyway
    checks &= how.temperature == 0 and how.beam == 1  # else it is not known yet how sure the reader is
    for news in reader().read(source, pages=numbers, boxes=boxes, how=how, keep=True):
        watch.check()
        pace.hear(news)
        last = news.document
        if news.kind == "done":
            break
        begun = [line for line in last.lines if line.tokens] if checks else []
        if (sure := how_like_music(begun, pace.done)) is not None:
            checks = False
            if sure < LEAST_SURE:
                yield outputs_of(status_html("warn", doubt_text(sure)), gr.skip())
                yield None
                return
        now = time.monotonic()
        if now >= due or news.kind in ("page", "words"):
            yield growing(news, pace, now - start, sofar)
            due = time.monotonic() + UPDATE_SECONDS * max(1, len(news.page.systems if news.page else ()))
    yield last


@(spaces.GPU if spaces else lambda f: f)
def read_all(source: Pages, how: Decoding, numbers, boxes, n: int, anyway: bool) -> Iterator[list]:
    "All readings of a picture; the last outputs hold the files. Raises ValueError, OSError."
    watch, sheets = Watch(listeners), []
    for i in range(n):
        sofar = f"{i + 1} of {n}: " if n > 1 else ""
        for found in read_once(source, replace(how, seed=how.seed + i), watch, numbers, boxes, anyway, sofar):
            if isinstance(found, list):
                yield found
        if found is None:
            return
        source = found  # further samples need neither file nor encoder
        sheets.append(Sheet(found, views.seen_lines(reader(), found)))
    for sheet in sheets:
        sheet.document.forget()
    yield from present(sorted(sheets, key=lambda s: -s.likelihood))


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
    anyway: bool,
    boxes: str | None,
) -> Iterator[list]:
    """Read a picture, photo or PDF of printed music. The last answer holds the files.

    Args:
        picture: the file; PNG, JPEG, TIFF, WEBP or PDF
        way: greedy, beam or sampling
        beam: width of a beam search
        temperature: of samples
        top_k: samples from the k most probable tokens; 0 for all
        top_p: samples from the most probable tokens that hold this share
        grammar: none; shape, legal tokens only; time, bars add up, too
        seed: of samples
        samples: how many
        pages: of a PDF or TIFF, as in 1-3,7; empty for all
        second_look: read bars again that do not add up
        shifts: places on the grid of patches at which a line is shown; 1 to 4
        anyway: read what does not look like music, too
        boxes: JSON, page from 0 to a list of x0, y0, x1, y1 of systems; empty to find them
    """
    if not picture:
        yield outputs_of(IDLE)
        return
    try:
        path = uploaded(picture)
        how = decoding(
            way, grammar, seed, second_look, shifts, beam=beam, temperature=temperature, top_k=top_k, top_p=top_p
        )
        opened = Pages(path)
        numbers, given = wanted_pages(opened, pages), boxes_from(boxes)
        n = number_from(samples, "samples", 1, MAX_SAMPLES) if way == "sampling" else 1
        check_cost(how, len(numbers), n)
        yield outputs_of(busy_html("Opening the file."))
        with turns.place() as before:
            yield from waited(before)
            for found in read_all(opened, how, numbers, given, n, bool(anyway)):
                before()
                if isinstance(found[-1], dict) and "sheets" in found[-1]:
                    found[-1] = shelf.put(found[-1])
                yield found
        return
    except (ValueError, OSError) as e:  # PictureError, NoStaffError, ScoreError: one line for a person
        message = one_line(e)
    except Exception as e:
        logging.exception("a picture could not be read")
        message = f"this picture could not be read ({type(e).__name__})"
    finally:
        trim()
    yield outputs_of(status_html("error", f"Not read: {message}."))
    raise gr.Error(message, visible=False, print_exception=False)  # for programs; the page has its line


def waited(before) -> Iterator[list]:
    "Outputs while others are read. Raises RefusedError when the visitor leaves."
    watch, said = Watch(listeners, inf), 0
    while n := before():
        watch.check()
        if n != said:
            yield [waiting_html(n), *KEPT]
        said = n
        time.sleep(0.3)
    watch.check()


def begin(picture: dict | None, *rest) -> Iterator[list]:
    "Read what was chosen at once; of several pages, let the visitor choose."
    try:
        several = bool(picture) and n_pages(uploaded(picture)) > 1
    except (ValueError, OSError):
        several = False  # the reading says what is wrong
    if several:
        yield [status_html("idle", "Choose the pages, then press Read."), *KEPT]
    else:
        yield from transcribe(picture, *rest)


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
        path = uploaded(picture)
        if path is None:
            raise ValueError("no picture; give one")
        how = decoding_from(MAX_TOKENS, **choices)
        opened = Pages(path)
        numbers = wanted_pages(opened, pages)
        check_cost(how, len(numbers))
        with turns.place() as before:
            for _ in waited(before):
                pass
            watch = Watch(listeners)
            for news in reader().read(opened, pages=numbers, how=how):  # noqa: B007, the last one holds all
                watch.check()
                before()
        return news.document.to_bytes(f".{form}").decode()
    except (ValueError, OSError) as e:
        message = one_line(e)
    except Exception as e:
        logging.exception("a picture could not be read")
        message = f"this picture could not be read ({type(e).__name__})"
    finally:
        trim()
    raise gr.Error(message, print_exception=False)


# Before and after it


def arrive(picture: dict | None) -> list:
    "What is known of a file at once: its line, the pages that are ticked at first."
    name = short_name(str((picture or {}).get("orig_name") or Path(str((picture or {}).get("path"))).name))
    try:
        n = n_pages(uploaded(picture))
    except (ValueError, OSError):
        n = 1  # the reading says what is wrong
    return [opening.file_html(name, n, most=MAX_PAGES), f"1-{min(n, MAX_PAGES)}" if n > 1 else ""]


def look_over(picture: dict | None) -> Iterator[str]:
    "The pages of a document one after the other, small, with their systems counted."
    yield gr.skip()
    try:
        path = uploaded(picture)
        if path is None or n_pages(path) == 1:
            return
        seen, name = [], short_name(Path(path).name)
        with Pages(path) as opened:
            for i in range(min(len(opened), opening.MOST_THUMBS)):
                seen.append(opening.glance(opened, i))
                yield opening.file_html(name, len(opened), seen, MAX_PAGES)
    except (ValueError, OSError):
        return  # the reading says what is wrong
    finally:
        trim()


def pick(asked: str | None) -> list:
    "An example: its picture, its reference score, its line."
    name = str(asked or "").split("#")[0]  # behind it stands what makes a second click another text
    if name not in EXAMPLES:
        return [gr.skip()] * 4
    picture, reference = (str(HERE / "examples" / (name + end)) for end in (".png", ".musicxml"))
    return [picture, reference, opening.file_html(EXAMPLES[name], 1), ""]


def texts_of(sheet: Sheet) -> str:
    "What the fields of text and the player take over from a reading."
    return views.texts_html(views.lmx_text(sheet), musicxml_bytes(sheet.score).decode(), views.sounds(sheet.score))


def reveal(key: str | None) -> list:
    "What belongs to a finished reading: other readings, texts to edit, boxes, looks."
    taken = shelf.get(key)
    if not taken:
        hidden = gr.update(choices=[], value=None, visible=False)
        return [hidden, "", "", "", hidden, ""]
    sheets, at = taken["sheets"], taken["at"]
    sheet = sheets[at]
    names = [(f"{i + 1}: log-probability {views.number(s.likelihood)} a token", i) for i, s in enumerate(sheets)]
    lines = [(f"Line {i + 1}", i) for i in range(len(sheet.lines))]
    return [
        gr.update(choices=names, value=at, visible=len(sheets) > 1),
        texts_of(sheet),
        views.boxes_html(sheet.document),
        "",
        gr.update(choices=lines, value=0, visible=len(lines) > 1),
        looked(key, 0),
    ]


def looked(key: str | None, line: int | None) -> str:
    "The look at one line."
    taken = shelf.get(key)
    lines = taken["sheets"][taken["at"]].lines if taken else []
    line = line or 0
    if not isinstance(line, int) or line not in range(len(lines)):
        return ""
    seen = lines[line]
    tokens = views.tokens_html(seen.look.tokens, seen.look.logp[:-1].tolist())
    return views.attention_html(seen.img, seen.look) + '<p class="said" aria-live="polite"></p>' + tokens


def select(key: str | None, at: int | None) -> Iterator:
    "Another of the readings."
    taken = shelf.get(key)
    if not taken or not isinstance(at, int) or at not in range(len(taken["sheets"])):
        yield [gr.skip(), *KEPT]
        return
    for shown in present(taken["sheets"], at):
        yield [*shown[:-1], shelf.put(shown[-1], key) or key]


def reflow(key: str | None, width: str | None) -> str:
    "The systems broken into lines of a narrow window."
    taken = shelf.get(key)
    if not taken or taken["sheets"][taken["at"]].edited is not None:
        return gr.skip()
    narrow = int(width) if str(width or "").isdecimal() and 200 <= int(width) < 800 else None
    try:
        return proof.rows_html(taken["sheets"][taken["at"]], narrow)
    except ValueError:
        return gr.skip()


def reflow_narrow(key: str | None, width: str | None) -> str:
    "As `reflow`, after a reading: a wide window shows it already."
    return reflow(key, width) if str(width or "").isdecimal() else gr.skip()


# Corrections

GONE = "this reading was put away to make room; read the picture again"


def correct(key: str | None, command: str | None, width: str | None) -> str:
    "Change notes as a person asked, and engrave the system that changed."
    taken, seq = shelf.get(key), 0
    try:
        asked = json.loads(command or "{}")
        seq, todo = int(asked["seq"]), list(asked["todo"])[:50]
        if not taken:
            raise ValueError(GONE)
        sheet, history, system, chosen, said = taken["sheets"][taken["at"]], taken["history"], None, None, ""
        for change in todo:
            try:
                note, what, value = (change.get(k) for k in ("note", "do", "value"))
                sheet, system, chosen = proof.correct(sheet, history, note or chosen, str(what), value)
            except ValueError as e:  # EditError: the others are made
                said = one_line(e)
        sheets = [sheet if i == taken["at"] else s for i, s in enumerate(taken["sheets"])]
        shelf.put(taken | {"sheets": sheets}, key)
        narrow = int(width) if str(width or "").isdecimal() else None
        row = "" if system is None else proof.row_html(sheet, system, narrow)
        return proof.patch_html(seq, row, chosen, said, (len(history.done), len(history.undone)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        return proof.patch_html(seq, "", None, one_line(e) if isinstance(e, ValueError) else "no such change", (0, 0))


def refresh(key: str | None) -> Iterator[list]:
    "After corrections: the status line, the tokens, the files."
    taken = shelf.get(key)
    if not taken:
        yield [gr.skip()] * (2 + len(DOWNLOADS))
        return
    sheet = taken["sheets"][taken["at"]]
    try:
        status = status_html("done", "Corrected. " + views.summary(sheet))
        for files in saved(sheet):
            yield [status, views.lines_html(sheet), *files]
    except ValueError as e:
        status = status_html("error", f"The files could not be written: {one_line(e)}.")
        yield [status, *[gr.skip()] * (1 + len(DOWNLOADS))]


def edit(change, key: str | None, text: str | None) -> Iterator[list]:
    "The reading with the text of a person; what is wrong in it is said in one line and nothing else changes."
    taken = shelf.get(key)
    if not taken:
        yield ["", gr.skip(), *KEPT]
        return
    try:
        sheets, at = list(taken["sheets"]), taken["at"]
        sheets[at] = change(reader(), sheets[at], text or "")
        history = proof.rewritten(taken["history"], taken["sheets"][at], sheets[at])
        for shown in present(sheets, at, "Corrected. " + views.summary(sheets[at]), history):
            shown[-1] = shelf.put(shown[-1], key) or key
            yield [hint_html("done", "Engraved; the downloads hold this version."), *shown]
        return
    except ValueError as e:
        message = one_line(e)
    except Exception as e:
        logging.exception("an edited score could not be engraved")
        message = f"this text could not be engraved ({type(e).__name__})"
    yield [hint_html("error", f"Not engraved: {message}."), gr.skip(), *KEPT]


def edit_lmx(key: str | None, text: str | None) -> Iterator[list]:
    "Engrave edited tokens."
    yield from edit(views.with_lmx, key, text)


def edit_musicxml(key: str | None, text: str | None) -> Iterator[list]:
    "Engrave edited MusicXML."
    yield from edit(views.with_musicxml, key, text)


def imagine(key: str | None, ratio: float, seed: float) -> str:
    "What the masked autoencoder makes of the picture when most of it is hidden."
    model, taken = seer(), shelf.get(key)
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
    f"To see what a reading would earn, read a picture and give the right score as {', '.join(REFERENCE_SUFFIXES)}. "
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


def measure(key: str | None, reference: dict | None, preset: str, *weights: float) -> Iterator[tuple]:
    "Measure readings against the reference under every preset, so that a change of preset or weights is at once."
    taken = shelf.get(key)
    if not taken or not reference:
        yield None, NO_TRUTH, "", "", "", ""
        return
    yield None, hint_html("busy", "Measuring."), "", "", "", ""
    try:
        path = uploaded(reference)
        true, group = read_references_of_parts(path), [s.parts for s in taken["sheets"]]
        of = {name: [reward_of_score(parts, true, name, terms=TERMS) for parts in group] for name in PRESETS}
        measured = {"of": of, "at": taken["at"]}
        yield measured, *rescore(measured, preset, *weights), *views.compared_html(group[taken["at"]], true)
        return
    except ValueError as e:  # ScoreError: one line for a person
        message = one_line(e)
    except Exception as e:
        logging.exception("a reading could not be compared")
        message = f"this reference could not be compared ({type(e).__name__})"
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
    warm_worker("vitomr.notation.pdf", "vitomr.page.documents", "vitomr.notation.reference")
    reward_of_score([["measure", "C4", "quarter"]], [["measure", "D4", "quarter"]], terms=TERMS)
    Grammar(time=True).legal(["measure", "C4", "quarter"])


# The page


THEME = gr.themes.Default(  # gradio's own file of the semi-bold weight lacks Latin letters
    primary_hue=gr.themes.colors.blue,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_md,
    font=[gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"],
).set(
    body_background_fill="#faf8f4",
    button_primary_background_fill="#1f4b7a",
    button_primary_background_fill_hover="#163a60",
    button_primary_background_fill_dark="#2f6ca8",
    button_primary_text_color="#ffffff",
    body_text_color_subdued="#57534e",
    body_text_color_subdued_dark="#c9c4bc",
    block_label_text_color="#57534e",
    block_info_text_color="#57534e",
    block_info_text_color_dark="#c9c4bc",
    input_placeholder_color="#6b665f",
    input_placeholder_color_dark="#b5afa6",
)
CSS = (HERE / "assets" / "app.css").read_text(encoding="utf-8")
CSS += "".join(f"#weight-{term} {{ --slider-color: {of.colour}; }}\n" for term, of in TERMS.items())
SCRIPT = f"<script>{(HERE / 'assets' / 'app.js').read_text(encoding='utf-8')}</script>"
MAST = '<header class="mast"><h1>vitomr</h1><p>Printed music to MusicXML</p></header>'
LEAD = """<div class="lead"><h2>Turn printed music into a score you can play, correct and print</h2>
<p>Give a photo, a scan or a PDF. vitomr finds the systems, reads every note, and shows its reading under the print,
so that you see at once what to correct.</p></div>"""
STEPS = """<ol class="steps"><li><b>Choose</b> a picture or a PDF; of several pages, tick those you want.</li>
<li><b>Check</b> the bars that are marked: click on a note to change it, play it to hear it.</li>
<li><b>Download</b> MusicXML for MuseScore, Finale or Sibelius, or PDF, MIDI and SVG.</li></ol>
<p class="limits">Not read: handwriting, tablature and percussion.</p>
<h3>Or try one of these</h3>"""
ABOUT = f"""
1. The page is laid flat; its systems are found and brought to one form: level, one size of staff, black on white.
2. A vision transformer looks at each line in patches; a second transformer writes the music as LMX tokens, one after
   the other.
3. The tokens become a score. What does not add up is mended, so that every program opens the file, and is named in
   the line above the reading.

A colour says how sure the model was of a note. It is a small model that learned from engraved songs: expect mistakes,
more of them in scans and photos. Files are deleted about an hour after their last use and used for nothing else.

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


def wire(name: str) -> gr.Textbox:
    "A field that nobody sees: the script writes into it what it has to tell."
    return gr.Textbox("", label=name, elem_id=name, elem_classes="wire", container=False)


def html_part(name: str, value: str = "", **more) -> gr.HTML:
    return gr.HTML(value, label=name.capitalize(), apply_default_css=False, elem_id=name, **more)


with gr.Blocks(title="vitomr: printed music to MusicXML", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
    gr.HTML(MAST, apply_default_css=False)
    reference = gr.File(
        label="The reference score", height=130, scale=2, min_width=280, elem_id="reference", render=False
    )
    taken, measured = gr.State(), gr.State()  # key of the readings on the shelf; preset → their breakdowns
    boxes, example, command, width = (wire(name) for name in ("boxes", "example", "command", "width"))
    with gr.Tabs():
        with gr.Tab("Transcribe"):
            with gr.Row(elem_id="start"):
                with gr.Column(scale=3, min_width=300):
                    gr.HTML(LEAD, apply_default_css=False, elem_classes="first")
                    gr.HTML(opening.drop_html(), apply_default_css=False, elem_id="drop")
                with gr.Column(scale=2, min_width=280, elem_classes="first"):
                    shown = [open_picture(HERE / "assets" / name) for name in ("photo.jpg", "read.png")]
                    gr.HTML(opening.before_after_html(*shown), apply_default_css=False)
            with gr.Column(elem_id="picture"):
                picture = gr.UploadButton("Choose a file", file_types=["image", ".pdf", ".tif", ".tiff"])
            file = html_part("file")
            with gr.Row(elem_id="chosen"):
                pages = gr.Textbox("", label="Pages", info="numbers, as in 1-3,7", scale=2, elem_id="pages")
                go = gr.Button("Read", variant="primary", min_width=120, elem_id="go")
            with gr.Row(elem_id="state"):
                status = gr.HTML(IDLE, label="Status", elem_id="status")
                stop = gr.Button("Stop", size="sm", min_width=90, scale=0, elem_id="stop")
                sure = gr.Button("Read it anyway", size="sm", min_width=140, scale=0, elem_id="sure")
                over = gr.Button("Start over", size="sm", min_width=110, scale=0, elem_id="over")
            with gr.Column(elem_classes="first"):
                gr.HTML(STEPS, apply_default_css=False)
                gr.HTML(opening.examples_html(HERE / "examples", EXAMPLES), apply_default_css=False)
            with gr.Column(elem_id="results"):
                readings = gr.Radio([], label="Readings, the most probable first", visible=False, elem_id="readings")
                gr.HTML(PLAYER, apply_default_css=False, elem_id="bench", elem_classes="when-done")
                original = html_part("original")
                score = html_part("score")
                with gr.Row(elem_id="downloads", elem_classes="when-done"):
                    files = [
                        gr.DownloadButton(f"Download {kind}", size="sm", min_width=120, elem_id=f"download-{end[1:]}",
                                          variant="primary" if kind == "MusicXML" else "secondary")  # fmt: skip
                        for kind, end in DOWNLOADS.items()
                    ]
                with gr.Accordion("Correct the text", open=False, elem_id="editor", elem_classes="when-done"):
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
                    frames = html_part("frames")
                    reread = gr.Button("Read these systems", size="sm", elem_id="reread")
                with gr.Accordion("The tokens that the model wrote", open=False, elem_classes="when-done"):
                    tokens = gr.HTML(label="LMX tokens", elem_id="tokens")
            patch, texts = html_part("patch"), html_part("texts")
            with gr.Accordion("Settings", open=False, elem_id="how"):
                with gr.Row():
                    way = gr.Radio(list(WAYS.items()), value="greedy", label="Choice of tokens", scale=4, elem_id="way")
                    grammar = control("grammar", scale=4)
                with gr.Row():
                    second_look, shifts = control("second_look", scale=3), control("shifts", scale=3)
                    anyway = gr.Checkbox(
                        False, label="Read anything", info="also what is not like music", scale=3, elem_id="anyway"
                    )
                with gr.Row():
                    beam, temperature, top_k, top_p = (control(name) for of in OF_WAY.values() for name in of)
                    samples = gr.Slider(1, 8, 4, step=1, label="Samples", buttons=[], elem_id="samples")
                    seed = control("seed")
                again = gr.Button("Read again with these settings", size="sm", elem_id="again")
        with gr.Tab("Reward"):
            gr.Markdown("What this reading would earn in training by reinforcement, term by term.")
            with gr.Row():
                reference.render()
                with gr.Column(scale=3, min_width=280, elem_classes="with-reference"):
                    preset = gr.Radio(list(PRESETS), value="vitomr", label="Preset", elem_id="preset")
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    earned = gr.HTML(NO_TRUTH, label="Reward", apply_default_css=False, elem_id="earned")
                with gr.Column(scale=1, min_width=220, elem_classes="with-reference"):
                    errors = html_part("errors")
            group = html_part("group")
            with gr.Accordion("Weights", elem_classes="with-reference"), gr.Row(elem_id="weights"):
                weights = [
                    gr.Slider(label=term, buttons=[], min_width=140, elem_id=f"weight-{term}", **field)
                    for term, field in zip(TERMS, fields_of("vitomr"), strict=True)
                ]
            with gr.Column(elem_classes="with-reference"):
                diff = gr.HTML(label="Differences, engraved", apply_default_css=False, elem_id="diff")
                with gr.Accordion("Differences, token by token", open=False):
                    token_diff = gr.HTML(label="Differences, token by token", elem_id="token-diff")
        with gr.Tab("Under the hood"):
            gr.Markdown(
                "### Where did the reader look?\nChoose a token, or go along them with the arrow keys: the patches "
                "that two attention heads of the decoder looked at while it was written."
            )
            gr.HTML(hint_html("idle", "Read a picture first."), elem_classes="before-reading")
            line = gr.Dropdown([], label="Line of music", visible=False, elem_id="line")
            gaze = gr.HTML(label="Look", apply_default_css=False, elem_id="gaze")
            gr.Markdown("### What does the masked autoencoder see?")
            with gr.Row(visible=seer() is not None):
                ratio = gr.Slider(
                    0.1, 0.95, 0.75, step=0.05, label="Share of patches that is hidden", buttons=[], elem_id="ratio"
                )
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
    with gr.Accordion("What is this?", open=False):
        gr.Markdown(ABOUT)

    how = [way, beam, temperature, top_k, top_p, grammar, seed, samples, pages, second_look, shifts, anyway]
    outputs = [status, original, score, tokens, *files, taken]
    belongings = [readings, texts, frames, boxes, line, gaze]
    inputs = [picture, *how, boxes]
    read = {"fn": transcribe, "inputs": inputs, "outputs": outputs}
    read |= {"preprocess": False}  # gradio checks where the file lies, and nobody but vitomr opens it
    read |= {"show_progress": "hidden", "concurrency_id": "read", "concurrency_limit": 20}  # they wait in `turns`
    compared = [measured, earned, group, errors, diff, token_diff]
    nothing = [None, "", "", "", "", ""]
    quick = {"queue": False, "show_progress": "hidden", **private}
    as_is = {"preprocess": False}  # what a program sends is looked at here
    shown = {"show_progress": "hidden", **private}
    by_name = again.click(  # the first of its function, for programs; its HTML is for people, not for a language model
        **read, api_name="transcribe", api_visibility="undocumented" if MCP else "public",
        api_description=inspect.getdoc(transcribe), trigger_mode="always_last",
    )  # fmt: skip
    # first goes what belonged to the picture before: the page asks for the effects of one event one after the other
    picture.upload(
        lambda: [*outputs_of(busy_html("Opening the file.")), None, "", *nothing],
        outputs=[*outputs, reference, boxes, *compared], **quick,
    )  # fmt: skip
    arrived = picture.upload(arrive, picture, [file, pages], **quick, **as_is)
    looking = arrived.then(look_over, picture, file, concurrency_id="look", concurrency_limit=2, **shown, **as_is)
    picked = example.change(
        lambda asked: [*outputs_of(busy_html("Opening the example.")), "", *nothing, *pick(asked)], example,
        [*outputs, boxes, *compared, picture, reference, file, pages], **quick,
    )  # fmt: skip
    reading = [
        arrived.then(**read | {"fn": begin}, **private),
        picked.then(**read, **private),
        by_name,
        go.click(**read, cancels=looking, **private),
        reread.click(**read, **private),
        sure.click(lambda: True, outputs=anyway, **quick).then(**read, **private),
    ]  # fmt: skip
    for event in (picture.upload, example.change):
        event(None, cancels=reading + [looking], **private)
    stop.click(lambda: [status_html("idle", "Stopped."), *KEPT], outputs=outputs, cancels=reading, **quick)
    over.click(
        lambda: [*outputs_of(IDLE), None, None, "", "", False, *nothing, *reveal(None)],
        outputs=[*outputs, picture, reference, file, pages, anyway, *compared, *belongings],
        cancels=reading + [looking], **quick,
    )  # fmt: skip

    chosen = readings.input(select, [taken, readings], outputs, **shown, **as_is)
    corrected = command.change(
        correct, [taken, command, width], patch, trigger_mode="multiple", concurrency_id="correct", **shown, **as_is
    )
    written = corrected.then(
        refresh, taken, [status, tokens, *files], trigger_mode="always_last", concurrency_id="files", **shown
    )
    rewritten = [
        apply_lmx.click(edit_lmx, [taken, lmx], [edited, *outputs], **shown),
        apply_xml.click(edit_musicxml, [taken, xml], [edited, *outputs], **shown),
    ]
    width.change(reflow, [taken, width], score, **shown)
    line.input(looked, [taken, line], gaze, **shown, **as_is)
    dreamt = [imagine, [taken, ratio, mask_seed], imagined]
    if seer():
        gr.on([ratio.release, ratio.input, mask_seed.input], *dreamt, trigger_mode="always_last", **shown)

    scoring = {"show_progress": "hidden", "trigger_mode": "always_last", **private}
    whole = [*reading, chosen, *rewritten]
    for event in (*(r.then for r in (*whole, written)), reference.upload, reference.clear):
        event(measure, [taken, reference, preset, *weights], compared, **scoring, **as_is)  # any number is a weight
    for event in (*whole, written):
        event.then(reveal, taken, belongings, **shown)
        if seer():
            event.then(*dreamt, **shown)
    for event in whole:
        event.then(reflow_narrow, [taken, width], score, **shown)
    preset.input(choose, [measured, preset], [earned, group, *weights], queue=False, **scoring, **as_is)
    gr.on(
        [w.input for w in weights], rescore, [measured, preset, *weights], [earned, group],
        queue=False, **scoring, **as_is,
    )  # fmt: skip

    gr.api(
        read_music, api_name="read_music", concurrency_id="read", api_description=inspect.getdoc(read_music)
    )

demo.queue(default_concurrency_limit=1, max_size=20)

if __name__ == "__main__":
    share_arenas()
    try:
        reader()
    except ValueError as e:  # WeightsError
        raise SystemExit(f"app.py: {e}; VITOMR_WEIGHTS names another folder or hub id") from None
    if MCP and importlib.util.find_spec("mcp") is None:
        raise SystemExit("app.py: VITOMR_MCP asks for an MCP server; install what it needs: pip install 'vitomr[mcp]'")
    Thread(target=warm, daemon=True).start()
    inner = [Middleware(ServedHosts, names=served_hosts()), Middleware(UploadsOnly), Middleware(listeners.middleware)]
    options = {"app_kwargs": {"middleware": inner}, "allowed_paths": [str(HERE / "examples")]}
    options |= {"ssr_mode": False, "run_history": False, "share": False, "max_file_size": "60mb", "mcp_server": MCP}
    options |= {"state_session_capacity": 200}  # what gradio keeps of a visitor; the readings lie on the shelf
    demo.launch(theme=THEME, css=CSS, head=SCRIPT, footer_links=["api", "settings"], **options)
