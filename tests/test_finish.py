"""Scores to keep: valid by the schema, named, dated, clean, and with the same notes in another program."""

import importlib.util
import os
import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from vitomr.data.engravers import EngraverError, find_program
from vitomr.data.synthesis import Shards
from vitomr.notation.finish import finish_score
from vitomr.notation.lmx import VOCABULARY, decode
from vitomr.notation.musicxml import MARK_COLOUR, to_musicxml
from vitomr.notation.score import musicxml_bytes, mxl_bytes, read_score, root_of
from vitomr.page.assemble import Line, assemble
from vitomr.page.words import Direction, PageWords, Placed, Syllable, add_words
from vitomr.reading.transcription import Document, PageReading, SystemReading, Transcription

XLINK = """<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema" targetNamespace="http://www.w3.org/1999/xlink">
<xs:attribute name="href" type="xs:anyURI"/><xs:attribute name="type" type="xs:string"/>
<xs:attribute name="role" type="xs:string"/><xs:attribute name="title" type="xs:string"/>
<xs:attribute name="show" type="xs:string"/><xs:attribute name="actuate" type="xs:string"/></xs:schema>"""


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    "MusicXML 4.0 from the package `musicxml`, which carries all but the six attributes of XLink."
    xmlschema = pytest.importorskip("xmlschema")
    if importlib.util.find_spec("musicxml") is None:
        pytest.skip("the package musicxml, which carries the schema, is not installed")
    folder = Path(importlib.util.find_spec("musicxml").origin).parent / "generate_classes"
    here = tmp_path_factory.mktemp("xsd")
    (here / "xlink.xsd").write_text(XLINK)
    text = (folder / "musicxml_4_0.xsd").read_text(encoding="utf-8")
    text = re.sub(r"http://www\.musicxml\.org/xsd/xlink\.xsd", (here / "xlink.xsd").as_uri(), text)
    text = re.sub(r"http://www\.musicxml\.org/xsd/xml\.xsd", (folder / "xml.xsd").as_uri(), text)
    (here / "musicxml.xsd").write_text(text, encoding="utf-8")
    return xmlschema.XMLSchema(here / "musicxml.xsd")


def faults(schema, score: ET.Element) -> list[str]:
    data = musicxml_bytes(score).decode()
    data = re.sub(r"<!DOCTYPE[^>]*>", "", data)
    return [f"{e.path}: {e.reason}" for e in schema.iter_errors(ET.fromstring(data.encode()))][:3]


def sounding(score: ET.Element) -> list[list[tuple]]:
    "Per part: bar, onset and end in quarters, and pitch of each note, in order of time; read off the file alone."
    found = []
    for part in score.iterfind("part"):
        notes, divisions = [], 1
        for bar, measure in enumerate(part.iterfind("measure")):
            now = start = 0.0
            for e in measure:
                divisions = int(e.findtext("divisions") or divisions) if e.tag == "attributes" else divisions
                length = float(e.findtext("duration") or 0) / divisions
                if e.tag == "note":
                    start = start if e.find("chord") is not None else now
                    now = max(now, start + length)
                    if (pitch := e.find("pitch")) is not None and e.find("grace") is None:
                        said = pitch.findtext("step"), float(pitch.findtext("alter") or 0), pitch.findtext("octave")
                        notes.append((bar, round(start, 3), round(start + length, 3), *said))
                elif e.tag in ("backup", "forward"):
                    now = max(0.0, now + (length if e.tag == "forward" else -length))
        found.append(sorted(notes))
    return found


def a_document(name: str = "lied.png") -> Document:
    "A voice and a piano in two systems; the voice has a bar too short, one too long, and words."
    voice = "measure key:fifths:1 clef:G2 time beats:2 beat-type:4 G4 quarter A4 quarter measure B4 quarter"
    bar = "voice:1 G4 half staff:1 backup half voice:5 G2 half staff:2"
    piano = f"measure key:fifths:1 clef:G2 staff:1 clef:F4 staff:2 time beats:2 beat-type:4 {bar} measure {bar}"
    more = "measure C5 half D5 half"
    systems = []
    for k in range(2):
        lines = [Transcription((voice if k == 0 else voice + " " + more).split(), [], np.zeros((9, 9), np.uint8)),
                 Transcription(piano.split(), [], np.zeros((9, 9), np.uint8), n_staves=2)]  # fmt: skip
        systems.append(SystemReading((0, 0, 9, 9), np.zeros((4, 2)), lines))
    at = systems[0].lines[0].tokens.index("quarter")
    syllable, dolce = Syllable("Lied", "single", extends=True), Direction("dolce", 0, True)
    systems[0].lines[0].words = Placed("", [[(at, syllable)]], [(at, dolce)])
    page = PageReading(1, np.zeros((9, 9), np.uint8), systems=systems, words=PageWords("", "Nr. 1", "K", "L"))
    return Document(name, [page])


@pytest.mark.parametrize("marks", [False, True])
def test_a_file_has_title_people_names_instruments_software_and_date(schema, marks, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    score = read_score(a_document().save(tmp_path / "a.mxl", marks=marks))
    assert faults(schema, score) == []
    assert score.findtext("work/work-title") == "lied"
    assert [c.text for c in score.iterfind("identification/creator")] == ["K", "L"]
    assert re.fullmatch(r"vitomr \d+\.\d+\.\d+.*", score.findtext("identification/encoding/software"))
    assert score.findtext("identification/encoding/encoding-date") == "1970-01-02"
    listed = [(p.findtext("part-name"), p.findtext(".//instrument-sound")) for p in score.iter("score-part")]
    assert listed == [("Voice", "voice.vocals"), ("Piano", "keyboard.piano")]
    text = musicxml_bytes(score).decode()
    assert (MARK_COLOUR in text) == marks and ("too long" in text) == marks
    assert "dolce" in text and "<text>Lied</text>" in text


def test_marks_and_clean_files_hold_the_same_notes():
    document = a_document()
    assert sounding(document.finished()) == sounding(document.finished(marks=True)) == sounding(document.score)


def test_a_picture_without_a_file_has_no_title_of_its_own():
    assert a_document("picture").finished().find("work") is None


def test_hidden_rests_of_a_second_voice_become_forward(schema):
    tokens = ("measure key:fifths:0 clef:G2 time beats:4 beat-type:4 voice:1 C5 half D5 half backup whole "
              "print-object:no rest voice:2 half E4 half").split()  # fmt: skip
    score = to_musicxml(tokens)
    hidden = [n for n in score.iter("note") if n.get("print-object") == "no"]
    assert len(hidden) == 1
    done = finish_score(score)
    assert not [n for n in done.iter("note") if n.get("print-object") == "no"]
    (forward,) = done.iter("forward")
    assert forward.findtext("voice") == hidden[0].findtext("voice")
    assert forward.findtext("duration") == hidden[0].findtext("duration")
    assert sounding(done) == sounding(score) and faults(schema, done) == []


def test_every_excerpt_and_broken_reading_passes_the_schema(schema, shards: Shards):
    rng = np.random.default_rng(5)
    for i in range(0, len(shards), 4):
        tokens = decode(shards[i].ids.tolist())
        broken = [t for t in tokens if rng.random() > 0.08]
        broken[rng.integers(len(broken))] = VOCABULARY[rng.integers(3, len(VOCABULARY))]
        for said in (tokens, broken):
            made = assemble([[Line(said)], [Line(said)]]).score
            for written in (to_musicxml(said), made):  # as the app's page and requests give them, with marks
                assert faults(schema, written) == [], " ".join(map(str, said))
            add_words(made, {}, {}, [PageWords("T", "S", "C", "L")], ["Violine"])
            assert faults(schema, finish_score(made)) == [], " ".join(map(str, said))


def test_musescore_opens_a_file_with_the_same_notes(tmp_path):
    try:
        program = find_program("musescore")
    except EngraverError:
        pytest.skip("MuseScore is not installed")
    score = a_document().finished()
    (tmp_path / "a.mxl").write_bytes(mxl_bytes(score))
    env = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path), "QT_QPA_PLATFORM": "offscreen"}
    subprocess.run([program, "-o", tmp_path / "b.musicxml", tmp_path / "a.mxl"], check=True, timeout=120,
                   capture_output=True, env=os.environ | env)  # fmt: skip
    again = root_of((tmp_path / "b.musicxml").read_bytes())
    assert sounding(again) == sounding(score)
    assert [t.text for t in again.iter("part-name")] == [t.text for t in score.iter("part-name")]
    assert [t.text for t in again.iterfind(".//lyric/text")] == ["Lied"]
