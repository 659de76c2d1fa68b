"Audio files, the two published layouts, and scores rendered with an exact reference."

import csv
import functools
import http.server
import io
import threading
import zipfile

import music21
import numpy as np
import pytest

from vitomr.audio import data as audio_data
from vitomr.audio.cqt import CQTConfig
from vitomr.audio.data import (
    AudioError,
    FreeMusic,
    MusicNet,
    Note,
    download_audio,
    midi_file,
    part_loudness,
    read_audio,
    render,
    roll,
    score_notes,
    soundfont,
    synthesise,
    windows,
    with_dynamics,
)
from vitomr.data.download import DownloadError

soundfile = pytest.importorskip("soundfile")
CFG = CQTConfig(hop=512)


def tone(seconds, rate, hertz=440.0):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def peak(x, rate=22_050):
    "The strongest frequency."
    return np.argmax(abs(np.fft.rfft(x * np.hanning(len(x))))) * rate / len(x)


@pytest.fixture
def fma(tmp_path):
    "The published layout: two header rows, a row of names, numbered folders."
    (tmp_path / "fma_metadata").mkdir()
    with open(tmp_path / "fma_metadata" / "tracks.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["", "album", "artist", "set", "set", "track", "track"])
        rows.writerow(["", "title", "name", "split", "subset", "genre_top", "title"])
        rows.writerow(["track_id"] + [""] * 6)
        rows.writerow([2, "A", "Ann", "training", "small", "Hip-Hop", "Food, and\nmore"])
        rows.writerow([1005, "B", "Bob", "test", "small", "Rock", "Two"])
        rows.writerow([1006, "B", "Bob", "training", "medium", "Rock", "Three"])
    for number, hertz in ((2, 440.0), (1005, 880.0)):
        folder = tmp_path / "fma_small" / f"{number:06d}"[:3]
        folder.mkdir(parents=True)
        both = np.stack([tone(3, 44_100, hertz)] * 2, 1)
        soundfile.write(folder / f"{number:06d}.mp3", both, 44_100, format="MP3")
    return tmp_path


@pytest.fixture
def musicnet(tmp_path):
    for split, number in (("train", 1727), ("test", 2303)):
        (tmp_path / f"{split}_data").mkdir()
        (tmp_path / f"{split}_labels").mkdir()
        soundfile.write(tmp_path / f"{split}_data" / f"{number}.wav", tone(2, 44_100), 44_100)
        with open(tmp_path / f"{split}_labels" / f"{number}.csv", "w", newline="") as f:
            rows = csv.writer(f)
            rows.writerow("start_time end_time instrument note start_beat end_beat note_value".split())
            rows.writerow([0, 44_100, 43, 69, 0.0, 1.0, "Quarter"])
            rows.writerow([22_050, 88_200, 1, 57, 0.5, 2.0, "Dotted Quarter"])
    return tmp_path


def test_a_file_is_read_at_the_rate_and_from_the_place_asked_for(tmp_path):
    x = np.concatenate([tone(1, 44_100, 440), tone(1, 44_100, 880)])
    soundfile.write(tmp_path / "two.wav", np.stack([x, 0 * x], 1), 44_100)
    whole = read_audio(tmp_path / "two.wav")
    assert len(whole) == 44_100 and whole.dtype == np.float32 and abs(abs(whole).max() - 0.15) < 0.01
    later = read_audio(tmp_path / "two.wav", start=1.0, seconds=0.5)
    assert len(later) == 11_025 and abs(peak(later) - 880) < 3


def test_free_music(fma):
    data = FreeMusic(fma, output_format="cqt", max_duration=2.0, cfg=CFG)
    assert len(data) == 2 and [t.number for t in data.tracks] == [2, 1005]
    assert (data.tracks[0].genre, data.tracks[0].title, data.tracks[1].artist) == ("Hip-Hop", "Food, and\nmore", "Bob")
    assert data[0].shape == (2, 84, CFG.n_frames(44_100))
    strongest = [int(data[i].norm(dim=0).sum(1).argmax()) for i in range(2)]
    assert strongest == [45, 57]  # A4 and A5, counted from C1
    sound = FreeMusic(fma, output_format="audio", max_duration=None, split="test", cfg=CFG)
    assert len(sound) == 1 and abs(len(sound[0]) - 3 * 22_050) < 2000 and abs(peak(sound[0].numpy()) - 880) < 3
    found = list(data.windows(1.0))
    assert [start for _, start, _ in found[:2]] == [0.0, 1.0] and {x.shape for *_, x in found} == {(2, 84, 44)}


def test_a_missing_or_broken_track_names_itself(fma):
    (fma / "fma_small").rename(fma / "fma_medium")
    with pytest.raises(AudioError, match="001006.mp3 is listed"):
        FreeMusic(fma, subset="medium")
    skipped = FreeMusic(fma, subset="medium", missing="skip", max_duration=1.0, cfg=CFG)
    assert len(skipped) == 2 == len(skipped.tracks) and "001006.mp3" in skipped.faults[0]
    for broken in (b"", b"ID3 no sound" * 100):
        skipped.paths[0].write_bytes(broken)
        with pytest.raises(AudioError, match="000002.mp3") as e:
            skipped[0]
        assert len(str(e.value)) <= 200
        with pytest.raises(AudioError, match="000002.mp3"):
            list(skipped.windows(0.5))
    with pytest.raises(AudioError, match="fma_small"):
        FreeMusic(fma)
    (fma / "fma_metadata" / "tracks.csv").write_text("a,b\nc,d\n")
    with pytest.raises(AudioError, match="no column set/split"):
        FreeMusic(fma, subset="medium")
    with pytest.raises(ValueError, match="cqt, audio"):
        FreeMusic(fma, output_format="mel")


def test_musicnet(musicnet):
    data = MusicNet(musicnet, split="train", max_duration=1.0, cfg=CFG)
    assert len(data) == 1 and data[0].shape == (2, 84, 44)
    assert data.notes(0) == [Note(0.0, 1.0, 69, instrument=43), Note(0.5, 2.0, 57, instrument=1)]
    picture = roll(data.notes(0), 40, 20.0)
    assert picture[69].nonzero()[:, 0].tolist() == list(range(20))
    assert picture[57].nonzero()[:, 0].tolist() == list(range(10, 40)) and picture.sum() == 50
    assert roll(data.notes(0), 10, 20.0, start=0.75)[69].sum() == 5
    assert len(MusicNet(musicnet, split="test", cfg=CFG)) == 1
    with pytest.raises(AudioError, match="dev_data"):
        MusicNet(musicnet, split="dev")
    (musicnet / "train_labels" / "1727.csv").write_text("start_time,end_time,instrument,note\n1,x,1,60\n")
    with pytest.raises(AudioError, match="1727.csv, line 2"):
        data.notes(0)
    (musicnet / "train_data" / "1727.wav").unlink()
    with pytest.raises(AudioError, match="1727.wav"):
        MusicNet(musicnet, cfg=CFG)


def test_windows_are_a_stream_without_seams_and_without_zeros(tmp_path):
    rng = np.random.default_rng(0)
    x = (0.2 * rng.standard_normal(22_050 * 7 + 11)).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", x, 22_050, subtype="FLOAT")
    found = list(windows(tmp_path / "noise.wav", 1.0, step=0.5))
    assert [start for start, _ in found] == [k / 2 for k in range(13)]
    for start, w in found:
        np.testing.assert_array_equal(w, x[round(start * 22_050) :][:22_050])
    *_, (start, rest) = windows(tmp_path / "noise.wav", 2.0, keep_rest=True)
    assert start == 6.0 and len(rest) == 22_050 + 11
    soundfile.write(tmp_path / "other.wav", tone(9, 48_000), 48_000)
    pieces = np.concatenate([w for _, w in windows(tmp_path / "other.wav", 0.7)])
    np.testing.assert_allclose(pieces[1000:], tone(9, 22_050)[: len(pieces)][1000:], atol=1e-3)


def test_a_download_comes_from_a_server_and_is_unpacked(tmp_path):
    served, buffer = tmp_path / "served", io.BytesIO()
    served.mkdir()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("fma_metadata/tracks.csv", "hello")
    (served / "fma_metadata.zip").write_bytes(buffer.getvalue())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=served)) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{s.server_port}/fma_metadata.zip"
        folder = download_audio("fma_metadata", tmp_path / "data", url=url)
        assert (folder / "tracks.csv").read_text() == "hello"
        assert download_audio("fma_metadata", tmp_path / "data", url="http://127.0.0.1:1/none") == folder
        (served / "bad.zip").write_text("no zip")
        with pytest.raises(DownloadError, match="not a readable zip"):
            download_audio("musicnet", tmp_path / "data", url=url.replace("fma_metadata.zip", "bad.zip"))
        s.shutdown()
    with pytest.raises(DownloadError, match="choose from fma_small"):
        download_audio("fma", tmp_path)


@pytest.fixture(scope="module")
def score():
    return music21.corpus.parse("bach/bwv66.6")


def test_notes_of_a_score_agree_with_music21(score):
    parts = score_notes(score)
    assert [name for name, _ in parts] == ["Bass", "Tenor", "Alto", "Soprano"]
    soprano = score.parts[0].stripTies().flatten().notes
    assert [n.pitch for n in parts[3][1]] == [n.pitch.midi for n in soprano]
    np.testing.assert_allclose([n.start for n in parts[3][1]], [float(n.offset) * 60 / 96 for n in soprano])


def test_tempo_changes_are_followed():
    s = music21.converter.parse("tinynotation: 4/4 c4 d e f g a b c'")
    s.insert(0, music21.tempo.MetronomeMark(number=60))
    s.insert(2, music21.tempo.MetronomeMark(number=120))
    ((_, notes),) = score_notes(s)
    assert [n.start for n in notes] == [0, 1, 2, 2.5, 3, 3.5, 4, 4.5] and notes[-1].end == 5


def test_a_file_that_is_no_score_names_itself(tmp_path):
    (tmp_path / "x.musicxml").write_text("<nothing")
    for path, told in ((tmp_path / "x.musicxml", "x.musicxml"), (tmp_path / "none.mid", "none.mid")):
        with pytest.raises(AudioError, match=told):
            render(path)
    with pytest.raises(AudioError, match="no notes"):
        render(music21.stream.Score())


@pytest.mark.parametrize("font", [None, "installed"])
def test_the_reference_of_a_rendered_score_is_exact(score, font):
    if font and not (font := soundfont()):
        pytest.skip("no soundfont or no fluidsynth")
    made = render(score, seconds=3, font=font)
    assert made.stems.shape == (4, 66_150) and np.isfinite(made.stems).all() and abs(made.stems).max() < 1
    np.testing.assert_array_equal(made.mix, made.stems.sum(0))
    loud = part_loudness(made.stems, CFG)
    assert loud.shape == (4, CFG.n_frames(66_150)) and loud.min() >= 0 and loud.max() <= 1
    assert (loud[:, 10:].mean(1) > 0.3).all()
    without = render([(n, [] if n == "Tenor" else p) for n, p in score_notes(score)], seconds=3, font=font)
    others = [0, 2, 3]
    np.testing.assert_allclose(without.stems[others], made.stems[others], atol=1e-4)
    assert not without.stems[1].any() and not part_loudness(without.stems, CFG)[1].any()


def test_loudness_is_the_level_in_decibels():
    wave = np.stack([tone(1, 22_050) / 0.3 * 2**0.5 * 0.1 * 10 ** (-db / 20) for db in (-6, 0, 10, 20, 50)])
    middle = part_loudness(wave, CFG)[:, 20]
    np.testing.assert_allclose(middle, [1, 1, 0.75, 0.5, 0], atol=1e-3)


def test_synthesis_plays_pitch_time_and_velocity():
    soft, loud = (synthesise([Note(0.5, 1.0, 57, v)], 2.0) for v in (60, 120))
    assert abs(peak(loud[11_025:22_050]) - 220) < 3
    assert not loud[:11_025].any() and not loud[round(1.1 * 22_050) :].any()
    np.testing.assert_allclose(loud, 4 * soft, atol=1e-6)
    assert synthesise([Note(3.0, 4.0, 60)], 2.0).shape == (44_100,)


def test_dynamics_are_seeded_and_independent():
    parts = [(str(i), [Note(t, t + 1.0, 60) for t in range(40)]) for i in range(3)]
    one, again, other = (with_dynamics(parts, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert {n.velocity for n in one[0][1]} != {n.velocity for n in one[1][1]}
    assert all(1 <= n.velocity <= 127 for _, p in one for n in p) and any(len(p) < 40 for _, p in one)


def test_a_midi_file_is_read_back_by_music21(tmp_path):
    events = [(0.0, b"\x90\x3c\x40"), (0.5, b"\x80\x3c\x00"), (0.5, b"\x90\x40\x40"), (100.0, b"\x80\x40\x00")]
    (tmp_path / "a.mid").write_bytes(midi_file(events))
    ((_, notes),) = score_notes(tmp_path / "a.mid")
    assert [(n.start, n.end, n.pitch) for n in notes] == [(0, 0.5, 60), (0.5, 100.0, 64)]


def test_a_missing_library_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    audio_data._libraries.cache_clear()
    with pytest.raises(AudioError, match=r"vitomr\[audio\]"):
        read_audio(tmp_path / "x.wav")
    audio_data._libraries.cache_clear()
