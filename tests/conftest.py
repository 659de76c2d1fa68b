"""What several tests need: a little music, shards made of it, and a model small enough for seconds."""

import os

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: workers share the cores

import music21
import numpy as np
import pytest
import torch

from vitomr.data.synthesis import Shards, build
from vitomr.decoder import READERS, Reader
from vitomr.notation.score import cut_excerpt, music21_to_xml, parts, root_of

PIANO = """<score-partwise version="4.0"><part-list><score-part id="P1"><part-name>Piano</part-name></score-part></part-list><part id="P1">
<measure number="1"><attributes><divisions>4</divisions><key><fifths>-2</fifths></key><time><beats>3</beats><beat-type>4</beat-type></time>
<staves>2</staves><clef number="1"><sign>G</sign><line>2</line></clef><clef number="2"><sign>F</sign><line>4</line></clef></attributes>
<note><pitch><step>B</step><alter>-1</alter><octave>4</octave></pitch><duration>4</duration><voice>1</voice><type>quarter</type><stem>up</stem><staff>1</staff></note>
<note><chord/><pitch><step>D</step><octave>5</octave></pitch><duration>4</duration><voice>1</voice><type>quarter</type><stem>up</stem><staff>1</staff></note>
<note><pitch><step>F</step><alter>1</alter><octave>5</octave></pitch><duration>2</duration><voice>1</voice><type>eighth</type><accidental>sharp</accidental><stem>down</stem><staff>1</staff><beam number="1">begin</beam></note>
<note><pitch><step>G</step><octave>5</octave></pitch><duration>2</duration><voice>1</voice><type>eighth</type><stem>down</stem><staff>1</staff><beam number="1">end</beam></note>
<note><rest/><duration>4</duration><voice>1</voice><type>quarter</type><staff>1</staff></note><backup><duration>12</duration></backup>
<note><pitch><step>G</step><octave>2</octave></pitch><duration>12</duration><voice>5</voice><type>half</type><dot/><stem>up</stem><staff>2</staff><notations><tied type="start"/></notations></note></measure>
<measure number="2"><note><pitch><step>C</step><octave>5</octave></pitch><duration>12</duration><voice>1</voice><type>half</type><dot/><stem>down</stem><staff>1</staff></note>
<backup><duration>12</duration></backup>
<note><pitch><step>G</step><octave>2</octave></pitch><duration>12</duration><voice>5</voice><type>half</type><dot/><stem>up</stem><staff>2</staff><notations><tied type="stop"/></notations></note></measure>
</part></score-partwise>"""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Several workers share out whole files, so that what a file's tests share is made once; and notebooks one by one."
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "test_notebooks.py" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _no_words(request, monkeypatch):
    "Words are read in their own tests alone; they take seconds a page."
    if "test_words" not in request.module.__name__:
        monkeypatch.setattr("vitomr.transcribe.can_read_words", lambda: False)


@pytest.fixture(scope="session")
def piano():
    "A two-bar piano part: chord, accidental, beam, tie across the bar, two staves."
    return parts(root_of(PIANO.encode()))[0].element


@pytest.fixture(scope="session")
def excerpts():
    "Forty excerpts of one to five bars from Bach chorales."
    rng = np.random.default_rng(0)
    found = []
    for name in ("bach/bwv66.6", "bach/bwv269", "bach/bwv347", "bach/bwv84.5"):
        for part in parts(music21_to_xml(music21.corpus.parse(name)))[:2]:
            for _ in range(5):
                n = int(rng.integers(1, 6))
                found.append(cut_excerpt(part.element, int(rng.integers(part.n_measures - n)), n))
    return found


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    "Forty synthesised samples from music21's corpus."
    folder = tmp_path_factory.mktemp("shards")
    build("music21", folder, 40, seed=11)
    return Shards(folder)


@pytest.fixture(scope="session")
def smoke():
    "An untrained reader of the smoke size."
    torch.manual_seed(0)
    return Reader(READERS["smoke"]).eval()
