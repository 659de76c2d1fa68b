"""Hostile scores: MusicXML with values, elements and bytes changed is read, linearised, engraved, printed, or refused.

    python tests/fuzz/scores.py --count 5000 --seed 0
"""

import io
import random
import xml.etree.ElementTree as ET
import zipfile
from functools import cache
from pathlib import Path

from harness import Attempt, main

import vitomr
from vitomr.notation.engrave import from_verovio, render_svg
from vitomr.notation.lmx import linearise
from vitomr.notation.pdf import pdf_bytes
from vitomr.notation.reference import tokens_of_musicxml
from vitomr.notation.score import as_score, cut_excerpt, musicxml_bytes, mxl_bytes, parts, root_of

EXAMPLES = Path(vitomr.__file__).parents[1] / "examples"
NUMBERS = ("0", "-1", "", " ", "x", "7", "256", "999999999", "1e9", "1e100000000", "0.5", "1/0", "NaN", "inf")
NUMBERS += ("1" * 5000,)
TYPES = ("maxima", "long", "breve", "whole", "quarter", "eighth", "1024th", "nothing", "")
TAGS = (
    "note chord rest grace duration voice staff backup forward attributes divisions staves time key clef beam tie dot "
    "measure part pitch step octave alter type time-modification notations tuplet slur tied ornaments tremolo barline "
    "repeat ending direction direction-type octave-shift wedge pedal lyric harmony figured-bass print sound transpose "
    "measure-style multiple-rest measure-repeat slash unpitched cue accidental stem notehead"
).split()
SNIPPETS = (
    "<forward><duration>999999999</duration></forward>",
    "<note><grace/><pitch><step>C</step><octave>4</octave></pitch><type>maxima</type></note>",
    "<barline location='right'><ending number='1,2,3' type='stop'/><repeat direction='backward' times='31'/></barline>",
    "<attributes><measure-style><multiple-rest>1000</multiple-rest></measure-style></attributes>",
    "<attributes><measure-style><measure-repeat type='start'>1</measure-repeat></measure-style></attributes>",
    "<attributes><time><beats>3+2</beats><beat-type>8</beat-type></time><staves>16</staves></attributes>",
    "<attributes><clef number='9'><sign>TAB</sign><line>5</line></clef><transpose><chromatic>48</chromatic></transpose>"
    "</attributes>",
    "<direction><direction-type><octave-shift type='down' size='22'/></direction-type></direction>",
    "<direction><direction-type><wedge type='crescendo' number='1'/></direction-type><staff>2</staff></direction>",
    "<note><unpitched/><duration>1</duration><type>eighth</type><beam number='1'>begin</beam></note>",
    "<note><rest measure='yes'/><duration>1024</duration><type>maxima</type><beam number='1'>continue</beam></note>",
    "<harmony><root><root-step>C</root-step></root><kind>major</kind></harmony>",
    "<sound tempo='0'/>",
    "<sound dacapo='yes' segno='a' coda='b' tempo='1e9'/>",
)


@cache
def bases() -> list[bytes]:
    "The examples, and two bars of each, which are changed more often."
    whole = [p.read_bytes() for p in sorted(EXAMPLES.glob("*.musicxml"))]
    short = [ET.tostring(as_score(cut_excerpt(parts(root_of(data))[0].element, 0, 2))) for data in whole]
    return whole + short * 3


def change(root: ET.Element, r: random.Random) -> None:
    "One change somewhere in a tree."
    parent = r.choice([e for e in root.iter() if len(e)] or [root])
    child, kind = parent[r.randrange(len(parent))] if len(parent) else root, r.randrange(9)
    if kind == 0 and len(parent):
        parent.remove(child)
    elif kind == 1 and child is not root:
        parent.insert(r.randrange(len(parent)), child)
    elif kind == 2 and child is not root:
        child.tag = r.choice(TAGS)
    elif kind == 3:
        r.choice([e for e in root.iter() if not len(e)]).text = r.choice(NUMBERS)
    elif kind == 4:
        r.choice([e for e in root.iter() if (e.text or "").strip().isdigit()] or [root]).text = r.choice(NUMBERS)
    elif kind == 5:
        types = list(root.iter("type"))
        for e in r.sample(types, k=min(3, len(types))):
            e.text = r.choice(TYPES)
    elif kind == 6:
        measure = r.choice(list(root.iter("measure")) or [root])
        measure.insert(r.randint(0, len(measure)), ET.fromstring(r.choice(SNIPPETS)))
    elif kind == 7:
        child.set(r.choice(("number", "type", "times", "id", "print-object", "default-x")), r.choice(NUMBERS))
    else:
        note = r.choice(list(root.iter("note")) or [root])
        beam = ET.SubElement(note, "beam", {"number": r.choice("1128")})
        beam.text = r.choice(("begin", "continue", "end", "forward hook"))


def score(seed: int) -> bytes:
    "A score with its tree or its bytes changed; now and then many bars, deep nesting or a damaged archive."
    r = random.Random(seed)
    data, kind = r.choice(bases()), r.random()
    if kind < 0.12:
        damaged = bytearray(mxl_bytes(root_of(data)) if kind < 0.04 else data)
        for _ in range(r.randint(1, 8)):
            at = r.randrange(len(damaged))
            damaged[at : at + r.randint(0, 3)] = bytes(r.randrange(256) for _ in range(r.randint(0, 3)))
        return bytes(damaged[: r.randint(1, len(damaged))] if r.random() < 0.5 else damaged)
    if kind < 0.15:
        tag, n = r.choice(("note", "measure", "a", "notations")), r.choice((31, 40, 1000, 100_000))
        return data.replace(b"</measure>", f"<{tag}>".encode() * n + f"</{tag}>".encode() * n + b"</measure>", 1)
    if kind < 0.17:
        at, end = data.rfind(b"<measure"), data.rfind(b"</measure>") + 10
        return data[:at] + data[at:end] * r.choice((100, 1000, 20_000)) + b"</part></score-partwise>"
    if kind < 0.18:
        box = io.BytesIO()
        with zipfile.ZipFile(box, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("a.xml", data + b" " * r.choice((10**6, 40 * 10**6)))
        return box.getvalue()
    root = root_of(data)
    for _ in range(r.choice((1, 1, 2, 3, 8))):
        change(root, r)
    return ET.tostring(root)


def check(seed: int, attempt: Attempt) -> None:
    data = score(seed)
    root = attempt(lambda: root_of(data, "score.musicxml"))
    attempt(lambda: tokens_of_musicxml(data, "score.musicxml", 4_000_000))
    attempt(lambda: render_svg(data.decode("utf-8", "replace")))
    if root is None:
        return
    attempt(lambda: from_verovio(root, "midi", "times"))
    for part in parts(root):
        attempt(lambda part=part: linearise(part.element, strict=False))
    if seed % 10 == 0:
        attempt(lambda: pdf_bytes(root))
    attempt(lambda: musicxml_bytes(root))


if __name__ == "__main__":
    raise SystemExit(main("scores", check))
