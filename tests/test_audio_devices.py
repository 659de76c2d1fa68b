"Curves as CSV, MIDI and OSC, and the page on which they move."

import csv
import io
import struct

import numpy as np
import pytest
import torch
from pythonosc.osc_bundle import OscBundle

from vitomr.audio.devices import export_action, framed, preview_html, to_csv, to_midi, to_osc

ACTION = torch.tensor([[0.0, 0.5, 0.5, 1.0], [1.0, 1.0, 0.25, 0.25]])
NAMES = ("bass", "high, loud")


def test_csv_is_read_back():
    rows = list(csv.reader(io.StringIO(to_csv(ACTION, 20.0, NAMES).decode())))
    assert rows[0] == ["time", "bass", "high, loud"]
    table = np.array(rows[1:], float)
    np.testing.assert_allclose(table[:, 0], [0, 0.05, 0.1, 0.15])
    np.testing.assert_allclose(table[:, 1:], ACTION.T)


def test_midi_holds_a_control_change_wherever_a_value_changes(tmp_path):
    music21_midi = pytest.importorskip("music21.midi")
    path = export_action(tmp_path / "a.mid", ACTION, 20.0, NAMES)
    assert path.read_bytes() == to_midi(ACTION, 20.0, NAMES)
    f = music21_midi.MidiFile()
    f.open(path)
    f.read()
    f.close()
    assert f.ticksPerQuarterNote == 500
    now, found = 0, []
    for e in f.tracks[0].events:
        if isinstance(e, music21_midi.DeltaTime):
            now += e.time
        elif e.type == music21_midi.ChannelVoiceMessages.CONTROLLER_CHANGE:
            found.append((now, e.channel, e.parameter1, e.parameter2))
    assert found == [(0, 1, 20, 0), (0, 1, 21, 127), (50, 1, 20, 64), (100, 1, 21, 32), (150, 1, 20, 127)]


def test_osc_is_read_by_another_library():
    data, at, found = to_osc(ACTION, 20.0, NAMES), 0, []
    while at < len(data):
        (size,) = struct.unpack(">i", data[at : at + 4])
        raw = data[at + 4 : at + 4 + size]
        when = struct.unpack(">Q", raw[8:16])[0] / 2**32
        found += [(round(when, 6), m.address, m.params) for m in OscBundle(raw)]
        at += 4 + size
    bass, high = "/device/bass", "/device/high__loud"
    assert found == [(0, bass, [0.0]), (0, high, [1.0]), (0.05, bass, [0.5]), (0.1, high, [0.25]), (0.15, bass, [1.0])]


@pytest.mark.parametrize("call, told", [
    (lambda p: export_action(p / "a.xls", ACTION, 20.0), "choose from .csv, .mid, .osc"),
    (lambda p: to_csv(ACTION + 1, 20.0), "numbers from 0 to 1"),
    (lambda p: to_csv(ACTION[0], 20.0), "devices, frames"),
    (lambda p: to_osc(ACTION * torch.nan, 20.0), "numbers from 0 to 1"),
    (lambda p: to_midi(ACTION, 0.0), "frame rate"),
    (lambda p: to_midi(ACTION, 20.0, channel=17), "1 to 16"),
    (lambda p: to_csv(ACTION, 20.0, ["one"]), "a name for each"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(tmp_path, call, told):
    with pytest.raises(ValueError, match=told) as e:
        call(tmp_path)
    assert len(str(e.value)) <= 200


def test_the_preview_is_one_page_without_outside_addresses():
    page = preview_html(ACTION, 20.0, torch.zeros(4410), names=("<b>", "x"), title="a & b")
    assert page.count("<polyline") == page.count("<meter") == 2 and "<audio controls" in page
    assert "<b>" not in page and "&lt;b&gt;" in page and "a &amp; b" in page and "http" not in page and "$" not in page
    assert "<audio" not in preview_html(ACTION, 20.0)
    assert 'sandbox="allow-scripts"' in framed(page) and "&lt;audio" in framed(page)
