"""Words of a page: what they are, where they go, and that no note changes."""

import copy
import itertools
import socket
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from vitomr import cli
from vitomr.notation.engrave import rasterise, render_svg
from vitomr.notation.fonts import TEXT_FONTS
from vitomr.page import words
from vitomr.page.systems import find_systems
from vitomr.transcribe import Transcriber

needs_ocr = pytest.mark.skipif(not words.can_read_words(), reason="the OCR of vitomr[words] is not installed")

VERSES = [
    "Sah ein Knab' ein Rös- lein stehn, Rös- lein auf der Hei- den, war so jung und mor- gen- schön,".split(),
    "Kna- be sprach: ich bre- che dich, Rös- lein auf der Hei- den, Rös- lein sprach: ich ste- che dich,".split(),
]
NOTES = "B4e B4e B4e B4e D5e C5e C5q A4e A4e A4e B4e C5q B4q G4e A4e B4e C5e D5e E5e D5q".split()
HEAD = """<attributes><divisions>2</divisions><key><fifths>1</fifths></key>
<time><beats>2</beats><beat-type>4</beat-type></time><clef><sign>G</sign><line>2</line></clef></attributes>"""
SAY = '<direction placement="above"><direction-type><words>{}</words></direction-type></direction>'


def syllabic(verse: list[str], i: int) -> str:
    begins, goes_on = verse[i].endswith("-"), i > 0 and verse[i - 1].endswith("-")
    return "middle" if begins and goes_on else "begin" if begins else "end" if goes_on else "single"


def song() -> ET.Element:
    bars, length = [], 0
    for i, note in enumerate(NOTES):
        if length % 4 == 0:
            bars.append(HEAD + SAY.format("Lieblich") if i == 0 else "")
            bars[-1] += '<print new-system="yes"/>' + SAY.format("poco ritard.") if i == 13 else ""
        n, kind = {"e": (1, "eighth"), "q": (2, "quarter")}[note[2]]
        bars[-1] += f"<note><pitch><step>{note[0]}</step><octave>{note[1]}</octave></pitch><duration>{n}</duration>"
        bars[-1] += f"<type>{kind}</type>"
        for v, verse in enumerate(VERSES, 1):
            bars[-1] += f'<lyric number="{v}"><syllabic>{syllabic(verse, i)}</syllabic>'
            bars[-1] += f"<text>{verse[i].strip('-')}</text></lyric>"
        bars[-1] += "</note>"
        length += n
    inside = "".join(f'<measure number="{k}">{bar}</measure>' for k, bar in enumerate(bars, 1))
    listed = '<part-list><score-part id="P1"><part-name>Singstimme</part-name></score-part></part-list>'
    return ET.fromstring(f'<score-partwise>{listed}<part id="P1">{inside}</part></score-partwise>')


@pytest.fixture(scope="module")
def page() -> np.ndarray:
    "Two systems of a song with two verses, a title and two people."
    svg = render_svg(song(), staff_space=14.0, options={"breaks": "line"})
    sheet = Image.fromarray(np.pad(rasterise(svg), ((170, 20), (20, 20)), constant_values=255))
    draw, width = ImageDraw.Draw(sheet), sheet.size[0]
    for text, x, y, anchor, size in (
        ("Heidenröslein", width / 2, 45, "mm", 50),
        ("Franz Schubert", width - 60, 120, "rm", 27),
        ("Johann Wolfgang von Goethe", 60, 120, "lm", 27),
    ):
        draw.text((x, y), text, anchor=anchor, font=ImageFont.truetype(TEXT_FONTS["STIXGeneral"][0], size))
    return np.asarray(sheet)


@pytest.fixture(scope="module")
def reader() -> Transcriber:
    return Transcriber.from_pretrained(device="cpu")


def lyrics_of(score: ET.Element) -> list[list[tuple[str, str]]]:
    "Per note: syllabic and text of each verse."
    return [[(x.findtext("syllabic"), x.findtext("text")) for x in n.iterfind("lyric")] for n in score.iter("note")]


def without_words(score: ET.Element) -> str:
    "A score, nothing in it that words could have written."
    score = copy.deepcopy(score)
    for e in [e for e in score if e.tag in ("work", "identification")]:
        score.remove(e)
    for name in score.iter("part-name"):
        name.text = ""
    for measure in score.iter("measure"):
        for d in [d for d in measure.iterfind("direction") if d.find("direction-type/words") is not None]:
            measure.remove(d)
        for note in measure.iterfind("note"):
            note.attrib.clear()
            for lyric in note.findall("lyric"):
                note.remove(lyric)
    return ET.tostring(score, encoding="unicode")


@needs_ocr
def test_a_page_keeps_its_words_and_its_notes(page, reader):
    plain = reader.transcribe(page, words=False, second_look=0, shifts=1)
    read = reader.transcribe(page, words=True, second_look=0, shifts=1)
    score = read.score
    assert read.tokens == plain.tokens
    assert without_words(score) == without_words(plain.score)
    assert score.findtext("work/work-title") == "Heidenröslein"
    people = {c.get("type"): c.text for c in score.iterfind("identification/creator")}
    assert people == {"composer": "Franz Schubert", "lyricist": "Johann Wolfgang von Goethe"}
    assert [n.text for n in score.iter("part-name")] == ["Singstimme"]
    assert lyrics_of(score) == [[(syllabic(v, i), v[i].strip("-")) for v in VERSES] for i in range(len(NOTES))]
    said = [(m.get("number"), w.text) for m in score.iter("measure") for w in m.iterfind("direction//words")]
    assert said == [("1", "Lieblich"), ("5", "poco ritard.")]


@needs_ocr
def test_a_single_line_has_words_too(page, reader):
    level = find_systems(page)
    x0, y0, x1, y1 = level.systems[1].box
    read = reader.transcribe(level.img[y0 - 10 : y1 + 10, x0 - 10 : x1 + 10], words=True, second_look=0, shifts=1)
    assert len(read.lines) == 1
    texts = [[text for _, text in note] for note in lyrics_of(read.score)]
    assert texts == [[v[i].strip("-") for v in VERSES] for i in range(13, 20)]


@needs_ocr
def test_ocr_is_silent_and_stays_offline(page, monkeypatch, capfd):
    def refuse(*_):
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    words._engine.cache_clear()
    level = find_systems(page)
    found = words.find_words(words.without_staves(level))
    assert "Heidenröslein" in [w.text for w in found]
    assert capfd.readouterr() == ("", "")


def test_without_the_ocr_one_line_says_what_is_missing(page, reader, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(words, "find_spec", lambda name: None)
    with pytest.raises(words.WordsError) as e:
        reader.transcribe(page, words=True)
    assert "vitomr[words]" in str(e.value) and len(str(e.value)) <= 200 and "\n" not in str(e.value)
    Image.fromarray(page[180:380]).save(tmp_path / "line.png")
    call = ["transcribe", str(tmp_path / "line.png"), "-o", str(tmp_path / "line.musicxml"), "--shifts", "1"]
    assert cli.main([*call, "--words"]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [f"vitomr: {words.MISSING}"]
    assert cli.main(call) == 0
    assert capsys.readouterr().err.strip().splitlines() == [f"vitomr: {words.MISSING}"]
    assert "<lyric" not in (tmp_path / "line.musicxml").read_text()
    assert cli.main([*call, "--no-words"]) == 0
    assert "words" not in capsys.readouterr().err


def test_align_is_the_cheapest_of_all_ways():
    "Against every monotone assignment, tried out."
    rng = np.random.default_rng(3)
    for _ in range(60):
        n, m = rng.integers(1, 5), rng.integers(1, 6)
        spans = [(x, x + w) for x, w in zip(np.sort(rng.uniform(0, 300, n)), rng.uniform(5, 40, n), strict=True)]
        heads = np.sort(rng.uniform(0, 320, m))

        def cost(choice):
            total = 0.0
            for (a, b), j in zip(spans, choice, strict=True):  # noqa: B023
                if j is None:
                    total += 5.0
                else:
                    total += min(abs((a + b) / 2 - heads[j]), abs(a + 7.2 - heads[j]) + 2.4) / 12  # noqa: B023
            return total

        def rises(choice):
            used = [j for j in choice if j is not None]
            return all(a < b for a, b in zip(used, used[1:]))

        every = (c for c in itertools.product([None, *range(m)], repeat=n) if rises(c))
        found = words.align(spans, heads)
        assert rises(found)
        assert cost(found) == pytest.approx(min(cost(c) for c in every))


def test_a_row_of_stems_or_of_dynamics_is_no_verse():
    def row(text: str, y: float) -> words._Row:
        return words._Row([words.Word(t, 50.0 * i, y, 50.0 * i + 30, y + 20) for i, t in enumerate(text.split())])

    verse, stems, soft = row("Sah ein Knab ein", 0), row("V I V L V", 30), row("cresc. poco rit. dim.", 60)
    lone = row("den,", 0)
    split = words._split_verses([[verse, stems, soft], [lone, soft]])
    assert [v for v, _ in split] == [[verse], [lone]]
    assert [r for _, r in split] == [[stems, soft], [soft]]


def test_pieces_without_a_vowel_join_their_neighbour():
    at = {"B": (0, 10), "lüten": (14, 60), "-": (70, 76), "staub": (90, 130)}
    pieces = [words.Word(text, x0, 0, x1, 30) for text, (x0, x1) in at.items()]
    verse = words._syllables(words._Row(words._with_vowels(pieces)))
    assert [(s.text, s.syllabic) for s in verse] == [("Blüten", "begin"), ("staub", "end")]


def test_a_syllable_without_a_note_joins_its_neighbour():
    line = words.LineWords(verses=[[words.Syllable("Lie", "begin", 0, 20), words.Syllable("be", "end", 24, 40)]])
    placed = words.place_words(line, [words.Head(position=7, x=12.0, bar=0)])
    assert [(p, s.text, s.syllabic) for p, s in placed.verses[0]] == [(7, "Liebe", "single")]


def test_words_go_into_the_score_in_the_order_of_the_schema():
    score = song()
    for i, note in enumerate(score.iter("note")):
        note.set("id", f"n{i}")
        for lyric in note.findall("lyric"):
            note.remove(lyric)
    before = without_words(score)
    directions = [(4, words.Direction("dolce", 0.0, False))]
    placed = words.Placed("Alt", [[(0, words.Syllable("Ah", extends=True))]], directions)
    header = words.PageWords("Titel", "Untertitel", "K", "L")
    words.add_words(score, {f"n{i}": (0, 0, i) for i in range(len(NOTES))}, {(0, 0): placed}, [header], ["Alt"])
    assert [e.tag for e in score] == ["work", "identification", "part-list", "part"]
    assert [e.tag for e in score.find("identification")] == ["creator", "creator", "miscellaneous"]
    assert [e.tag for e in next(score.iter("lyric"))] == ["syllabic", "text", "extend"]
    second = score.findall("part/measure")[1]
    assert [e.tag for e in second][:2] == ["direction", "note"] and second[0].get("placement") == "below"
    assert without_words(score) == before


def test_words_stay_on_their_notes_when_a_line_is_corrected():
    old = "measure C5 quarter D5 quarter E5 quarter".split()
    placed = words.Placed("V", [[(2, words.Syllable("a")), (4, words.Syllable("b")), (6, words.Syllable("c"))]])
    new = "measure key:fifths:1 C5 eighth B4 eighth D5 quarter E5 half".split()
    moved = words.move_words(placed, old, new)
    assert [(new[i], s.text) for i, s in moved.verses[0]] == [("eighth", "a"), ("quarter", "b"), ("half", "c")]
    gone = words.move_words(placed, old, "measure C5 quarter E5 quarter".split())
    assert [s.text for _, s in gone.verses[0]] == ["a", "c"]
