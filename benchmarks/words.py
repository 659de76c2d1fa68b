"""Words: title, names, tempo words and lyrics, on pages made from the songs of a corpus.

    python benchmarks/words.py --corpus openscore-lieder.zip [--count 20] [--presets clean,scan,photo] [--split dev]

Each page is the first page of a song as Verovio lays it out, with title, composer, lyricist and part names. Figures are
micro means; a syllable is right when the note it was printed under carries it in the score that was read.
"""

import argparse
import copy
import os
import re
import time
import unicodedata
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import ImageFont
from rapidfuzz.distance import Indel, Levenshtein

from vitomr.data.corpora import Song, open_corpus
from vitomr.data.degrade import degrade
from vitomr.notation.engrave import rasterise_any, render_svg
from vitomr.notation.fonts import FONTS, TEXT_FONTS
from vitomr.notation.score import ScoreError, parts


@dataclass
class Made:
    "A page and the score printed on it."

    name: str
    img: np.ndarray
    score: ET.Element


def _clean(score: ET.Element) -> None:
    "One title, one composer, one lyricist, names on one line; words that Verovio prints and no reader could know go."
    titles = [" ".join((score.findtext(t) or "").split()) for t in ("movement-title", "work/work-title")]
    title = next(filter(None, titles), "")
    who = {c.get("type"): " ".join((c.text or "").split()) for c in score.iterfind("identification/creator")}
    for tag in ("work", "movement-title", "movement-number", "identification", "credit", "defaults"):
        for e in score.findall(tag):
            score.remove(e)
    work, identification = ET.Element("work"), ET.Element("identification")
    ET.SubElement(work, "work-title").text = title
    for kind in ("composer", "lyricist"):
        if who.get(kind):
            ET.SubElement(identification, "creator", {"type": kind}).text = who[kind]
    score[:0] = [work, identification]
    for p in score.iterfind("part-list/score-part"):
        p.find("part-name").attrib.clear()  # some are not printed
        p.find("part-name").text = (p.findtext("part-name") or "").split("\n")[0].strip()
        for tag in ("part-abbreviation", "part-abbreviation-display", "part-name-display"):
            for e in p.findall(tag):
                p.remove(e)


def _header(svg: str, score: ET.Element, units: float, family: str) -> str:
    "Print title, composer and lyricist above the music, as publishers do."
    width = float(re.search(r'class="definition-scale"[^>]*viewBox="0 0 ([\d.]+)', svg)[1])
    who = {c.get("type"): c.text for c in score.iterfind("identification/creator")}
    title = score.findtext("work/work-title")
    size = min(4.2 * units, 0.9 * width / (0.5 * max(1, len(title))))
    rows = [(title, width / 2, 7, size, "middle"), (who.get("composer"), width - 9 * units, 12, 2.2 * units, "end"),
            (who.get("lyricist"), 9 * units, 12, 2.2 * units, "start")]
    text = "".join(f'<text x="{x:.0f}" y="{y * units:.0f}" font-size="{px:.0f}px" text-anchor="{anchor}" '
                   f'font-family="{family}">{escape(said or "")}</text>' for said, x, y, px, anchor in rows)
    at = svg.rindex("</svg>", 0, svg.rindex("</svg>"))
    return svg[:at] + text + svg[at:]


def narrow(family: str) -> float:
    "Size at which a font is as narrow as the one that Verovio spaces syllables for."
    sample = "Das Wandern ist des Muellers Lust"
    wide, usual = (ImageFont.truetype(TEXT_FONTS[f][0], 100).getlength(sample) for f in (family, "STIXGeneral"))
    return min(1.0, 0.92 * usual / wide) if family != "STIXGeneral" else 1.0


def make_page(song: Song, rng: np.random.Generator, space: float) -> Made:
    "The first page of a song. Raises `ScoreError` for one without lyrics on it."
    score = copy.deepcopy(song.load())
    _clean(score)
    for m in score.iter("measure"):
        for e in m.findall("print"):
            m.remove(e)
    names = list(TEXT_FONTS)
    family = names[rng.integers(len(names))]
    units = 180.0  # of Verovio's drawing, a staff space
    width, height = 18 * 105, 18 * 148
    options = {"breaks": "auto", "adjustPageWidth": False, "adjustPageHeight": False, "pageWidth": width,
               "pageHeight": height, "header": "none", "footer": "none", "pageMarginTop": 18 * 14,
               "pageMarginLeft": 90, "pageMarginRight": 90, "pageMarginBottom": 90}
    svg = render_svg(score, font=FONTS[rng.integers(len(FONTS))], staff_space=space, options=options)
    n_bars = len(re.findall(r'<g [^>]*class="measure"', svg))
    for p in score.iterfind("part"):
        p[:] = p[:n_bars]
    if not any(True for _ in score.iter("lyric")):
        raise ScoreError(f"{song.id}: no lyrics on its first page")
    svg = re.sub(r'font-size="([\d.]+)px"', lambda m: f'font-size="{narrow(family) * float(m[1]):.0f}px"', svg)
    return Made(song.id, rasterise_any(_header(svg, score, units, family), family), score)


@dataclass
class Tally:
    "What was counted over the pages of one preset."

    n: int = 0
    title: list[bool] = field(default_factory=list)
    composer: list[bool] = field(default_factory=list)
    lyricist: list[bool] = field(default_factory=list)
    names: list[bool] = field(default_factory=list)
    chars: int = 0
    errors: int = 0
    syllables: int = 0
    placed: int = 0
    words_true: int = 0
    words_read: int = 0
    words_hit: int = 0
    seconds: float = 0.0


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFC", " ".join((text or "").split())).replace("’", "'").replace("‘", "'")
    return text.replace("“", '"').replace("”", '"').replace("„", '"').replace("\xa0", " ")


def _syllable(lyric: ET.Element) -> str:
    text = _plain(" ".join(t.text or "" for t in lyric.findall("text")))
    return re.sub(r"^\d+\.\s*", "", text)


def sung(part: ET.Element) -> list[tuple[str, dict[int, tuple[str, str]]]]:
    "Pitch of each note of a part, and its lyrics: verse → syllable, syllabic. Chord notes and ends of ties left out."
    found = []
    for note in part.iter("note"):
        stops = [t.get("type") for t in note.iterfind("notations/tied")] + [t.get("type") for t in note.iterfind("tie")]
        if note.find("pitch") is None or note.find("chord") is not None or note.find("grace") is not None:
            continue
        lyrics = {}
        for i, lyric in enumerate(note.findall("lyric"), 1):
            number = re.sub(r"\D", "", lyric.get("number", "")) or str(i)
            if _syllable(lyric):
                lyrics[int(number)] = _syllable(lyric), lyric.findtext("syllabic") or "single"
        if "stop" in stops and not lyrics:
            continue
        found.append((note.findtext("pitch/step") + note.findtext("pitch/octave"), lyrics))
    return found


def lyric_text(notes: list, verse: int) -> str:
    "A verse as one reads it."
    text = ""
    for _, lyrics in notes:
        if verse in lyrics:
            syllable, kind = lyrics[verse]
            text += syllable + ("" if kind in ("begin", "middle") else " ")
    return text.strip()


def count_lyrics(true: ET.Element, read: ET.Element | None, tally: Tally) -> list[str]:
    "Errors of characters, and syllables on the right note; returns what went wrong."
    a, b, said = sung(true), sung(read) if read is not None else [], []
    pairs = {}
    for op in Indel.opcodes([p for p, _ in a], [p for p, _ in b]):
        if op.tag == "equal":
            pairs |= dict(zip(range(op.src_start, op.src_end), range(op.dest_start, op.dest_end), strict=True))
    verses = sorted({v for _, lyrics in a for v in lyrics})
    rank = {v: i for i, v in enumerate(verses, 1)}  # verses 1, 3 are printed as the first and second row
    for v in verses:
        reference, got = lyric_text(a, v), lyric_text(b, rank[v])
        wrong = min(len(reference), Levenshtein.distance(reference, got))
        tally.chars, tally.errors = tally.chars + len(reference), tally.errors + wrong
        if wrong:
            said.append(f"verse {v}: {wrong} of {len(reference)}\n      {reference}\n      {got}")
        for i, (_, lyrics) in enumerate(a):
            if v in lyrics:
                tally.syllables += 1
                found = b[pairs[i]][1].get(rank[v], ("", ""))[0] if i in pairs else ""
                ok = Levenshtein.normalized_similarity(lyrics[v][0].lower(), found.lower()) >= 0.5
                tally.placed += ok
                if not ok:
                    said.append(f"{lyrics[v][0]!r} at note {i}: {repr(found) if i in pairs else 'no such note'}")
    for v in {v for _, lyrics in b for v in lyrics} - set(rank.values()):
        text = lyric_text(b, v)
        tally.errors += len(text)
        said.append(f"no such verse: {text}")
    return said


def directions(score: ET.Element) -> list[tuple[int, str]]:
    "Bar and word of all tempo and expression, dynamics left out, each once a bar."
    found = set()
    for part in score.iterfind("part"):
        for bar, measure in enumerate(part.iterfind("measure")):
            for tag in ("direction-type/words", "direction-type/dynamics/other-dynamics"):
                for e in (e for d in measure.iterfind("direction") for e in d.iterfind(tag) if not e.get("color")):
                    found |= {(bar, w) for w in _plain(e.text).split() if sum(c.isalpha() for c in w) >= 3}
    return sorted(found)


def _alike(a: str, b: str) -> bool:
    return Levenshtein.normalized_similarity(a.lower(), b.lower()) >= 0.8


def count_page(made: Made, read: ET.Element | None, tally: Tally) -> list[str]:
    "Add one page to the tally; returns what went wrong."
    said, empty = [], ET.Element("score-partwise")
    read = empty if read is None else read
    tally.n += 1
    for kind, path in (("title", "work/work-title"), ("composer", "identification/creator[@type='composer']"),
                       ("lyricist", "identification/creator[@type='lyricist']")):
        reference, got = _plain(made.score.findtext(path)), _plain(read.findtext(path))
        if reference:
            getattr(tally, kind).append(reference == got)
            if reference != got:
                said.append(f"{kind}: {reference!r} read as {got!r}")
    true_parts, read_parts = parts(made.score), parts(read)
    for i, p in enumerate(true_parts):
        got = _plain(read_parts[i].name) if i < len(read_parts) else ""
        if p.name:
            tally.names.append(_plain(p.name) == got)
            if _plain(p.name) != got:
                said.append(f"name: {p.name!r} read as {got!r}")
        if p.n_staves == 1:
            said += count_lyrics(p.element, read_parts[i].element if i < len(read_parts) else None, tally)
    a, b = directions(made.score), directions(read)
    left = list(b)
    for bar, text in a:
        near = [x for x in left if abs(x[0] - bar) <= 1 and _alike(x[1], text)]
        if near:
            left.remove(min(near, key=lambda x: abs(x[0] - bar)))
            tally.words_hit += 1
        else:
            said.append(f"words {text!r} in bar {bar + 1} not read")
    said += [f"words {text!r} in bar {bar + 1} are none" for bar, text in left]
    tally.words_true, tally.words_read = tally.words_true + len(a), tally.words_read + len(b)
    return said


def _share(values: list[bool]) -> str:
    return f"{sum(values)} of {len(values)} ({100 * np.mean(values):.1f} %)" if values else "none"


def report(name: str, t: Tally) -> None:
    f1 = 2 * t.words_hit / max(1, t.words_true + t.words_read)
    print(f"{name}: {t.n} pages; lyrics CER {100 * t.errors / max(1, t.chars):.2f} % of {t.chars} characters; "
          f"{100 * t.placed / max(1, t.syllables):.2f} % of {t.syllables} syllables on their note; "
          f"title {_share(t.title)}; "
          f"composer {_share(t.composer)}; lyricist {_share(t.lyricist)}; part names {_share(t.names)}; "
          f"tempo words F1 {100 * f1:.1f} %; {t.seconds / max(1, t.n):.1f} s a page for words", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--corpus", required=True, help="a zip or folder of songs with lyrics")
    p.add_argument("--split", default="dev")
    p.add_argument("--count", type=int, default=20, help="pages")
    p.add_argument("--skip", type=int, default=0, help="songs left out at the start")
    p.add_argument("--presets", default="clean,scan,photo")
    p.add_argument("--weights", help="a weights folder; the packaged one when left out")
    p.add_argument("--verbose", action="store_true", help="tell what went wrong")
    p.add_argument("--keep", type=Path, help="a folder for the pages and scores")
    args = p.parse_args()
    from vitomr import transcribe

    reader, seconds = transcribe.Transcriber.from_pretrained(args.weights, device="cpu"), [0.0]
    slow = transcribe._read_words

    def timed(*given, **options):
        start = time.perf_counter()
        try:
            return slow(*given, **options)
        finally:
            seconds[0] += time.perf_counter() - start

    transcribe._read_words = timed
    pages = []
    for i, song in enumerate(open_corpus(args.corpus, split=args.split)[args.skip :]):
        if len(pages) == args.count:
            break
        rng = np.random.default_rng([7, i])
        try:
            pages.append(make_page(song, rng, rng.uniform(11, 17)))
        except ScoreError:
            continue
    for preset in args.presets.split(","):
        tally = Tally()
        for i, made in enumerate(pages):
            img = degrade(made.img, np.random.default_rng(i), preset).img
            seconds[0] = 0.0
            try:
                read = reader.transcribe(img, second_look=0, shifts=1, words=True).score
            except ValueError as e:
                read, said = None, [str(e)]
            said = count_page(made, read, tally)
            tally.seconds += seconds[0]
            if args.verbose:
                print(f"{preset} {made.name} {img.shape}:", *said, sep="\n   ", flush=True)
            if args.keep:
                import cv2

                args.keep.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(args.keep / f"{made.name}-{preset}.png"), img)
        report(preset, tally)


if __name__ == "__main__":
    main()
