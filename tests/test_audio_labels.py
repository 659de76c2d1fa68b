"Choices of a person: saved at once, taken up again, heard at equal loudness."

import json

import numpy as np
import pytest
import torch

from vitomr.audio.cqt_policy import Clip
from vitomr.audio.labels import LabelStore, at_level, candidates_html, equally_loud, label_page, sonified
from vitomr.audio.preference import Pair


def some_pairs(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    clips = [Clip(torch.randn(2, 8, 12, generator=g), None, f"clip {i}", np.zeros(6000, np.float32)) for i in range(n)]
    return [Pair(c, torch.rand(4, 12, generator=g), torch.rand(4, 12, generator=g)) for c in clips]


def test_choices_are_on_the_disk_at_once_and_taken_up_again(tmp_path):
    pairs, path = some_pairs(), tmp_path / "new" / "choices.jsonl"
    store = LabelStore(path, pairs, rater="ann")
    for choice in ("first", "tie", "second"):
        i = store.next()
        store.add(i, choice)
        assert json.loads(path.read_text().splitlines()[-1])["choice"] == choice
    again = LabelStore(path, pairs, rater="ann")
    assert again.next() == 3 and again.current() == {0: "first", 1: "tie", 2: "second"}
    assert again.undo() == 2 and again.undo() == 1 and LabelStore(path, pairs, rater="ann").next() == 1
    again.add(1, "skip")
    assert [p.label for p in again.labelled()] == [1.0, None, None, None] and again.next() == 2


def test_raters_do_not_see_each_other_and_labels_are_their_mean(tmp_path):
    pairs, path = some_pairs(), tmp_path / "choices.jsonl"
    for rater, choices in (("ann", ("first", "first", "second")), ("bob", ("second", "first", "tie"))):
        store = LabelStore(path, pairs, rater=rater)
        for c in choices:
            store.add(store.next(), c)
    assert [p.label for p in LabelStore(path, pairs).labelled()] == [0.5, 1.0, 0.25, None]
    assert LabelStore(path, pairs, rater="cat").next() == 0


def test_a_torn_last_line_is_dropped_and_other_damage_is_named(tmp_path):
    pairs, path = some_pairs(), tmp_path / "choices.jsonl"
    store = LabelStore(path, pairs)
    store.add(0, "first"), store.add(1, "second")
    path.write_bytes(path.read_bytes()[:-9])
    again = LabelStore(path, pairs)
    assert again.next() == 1
    again.add(1, "tie")
    assert LabelStore(path, pairs).current() == {0: "first", 1: "tie"}
    with pytest.raises(ValueError, match="line 1: a choice about another pair"):
        LabelStore(path, some_pairs(seed=1))
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1: not a choice"):
        LabelStore(path, pairs)
    for pair, choice in ((0, "better"), (9, "first"), (-1, "first")):
        with pytest.raises(ValueError, match="first, second, tie, skip"):
            store.add(pair, choice)


def test_both_candidates_are_equally_loud_and_never_clip():
    quiet, spiky = 0.001 * np.sin(np.arange(4000)), np.zeros(4000)
    spiky[::400] = 5.0
    a, b = equally_loud(quiet, spiky)
    rms = [np.sqrt(np.mean(np.square(x, dtype=float))) for x in (a, b)]
    assert rms[0] == pytest.approx(rms[1], rel=1e-4) and max(abs(a).max(), abs(b).max()) <= 0.5 + 1e-6
    assert not at_level(np.zeros(10)).any()


def test_each_device_sounds_its_own_note_when_it_moves():
    action = torch.zeros(4, 40)
    action[2, 20:] = 1.0
    sound = sonified(action, 20.0)
    spectrum = abs(np.fft.rfft(sound[24_000:44_000]))
    assert len(sound) == 44_100 and np.argmax(spectrum) * 22_050 / 20_000 == pytest.approx(329.6, abs=1.2)
    assert abs(sound[:20_000]).max() < 1e-6
    assert len(sonified(action, 20.0, np.ones(1000))) == 1000


def test_the_page_asks_saves_and_goes_on(tmp_path):
    pairs, path = some_pairs(2), tmp_path / "choices.jsonl"
    store = LabelStore(path, pairs)
    page = label_page(store, 20.0)
    by_id = {getattr(b, "elem_id", None): b._id for b in page.blocks.values()}
    function = {t[0]: f.fn for f in page.fns.values() for t in f.targets if t[1] == "click"}
    loaded = next(f.fn for f in page.fns.values() if any(t[1] == "load" for t in f.targets) and f.fn)
    first, second, status, i = loaded()
    assert i == 0 and "0 of 2" in status and first != second and first.count("<iframe") == second.count("<iframe") == 1
    *_, status, i = function[by_id["ab-second"]](0)
    assert i == 1 and "Saved" in status and store.current() == {0: "second"}
    *_, status, i = function[by_id["ab-tie"]](1)
    assert i == -1 and "no more" in status
    *_, status, i = function[by_id["ab-undo"]]()
    assert i == 1 and "Taken back" in status and LabelStore(path, pairs).next() == 1
    assert all(x in html for html in candidates_html(pairs[0], 20.0) for x in ("srcdoc", "&lt;audio"))
