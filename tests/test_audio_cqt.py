"The constant-Q transform: shapes, librosa as the oracle, the inverse, trimming and padding."

import numpy as np
import pytest
import torch

from vitomr.audio.cqt import CQT, CQTConfig, Player, filters, fit_frames, plot_cqt, snr

librosa = pytest.importorskip("librosa")
SMALL = CQTConfig(hop=256, n_bins=36, fmin=130.81)


@pytest.fixture(scope="module")
def cqt():
    return CQT(CQTConfig())


@pytest.fixture(scope="module")
def music():
    "Fading tones over the whole range, one second."
    rng, t = np.random.default_rng(0), np.arange(22_050) / 22_050
    waves = [rng.normal() * np.sin(2 * np.pi * f * t + rng.uniform(0, 6)) for f in rng.uniform(60, 3600, 40)]
    return (0.1 * sum(waves) * np.hanning(len(t))).astype(np.float32)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 8831, 8832, 20_000, 60_001])
def test_shape_for_every_length(cqt, length):
    c = cqt(torch.randn(length))
    assert c.shape == (2, 84, 1 + length // 64) and c.dtype == torch.float32


def test_librosa_filters_applied_directly_agree_to_single_precision(cqt, music):
    frequencies = librosa.cqt_frequencies(84, fmin=librosa.note_to_hz("C1"))
    waves, lengths = librosa.filters.wavelet(freqs=frequencies, sr=22_050)
    padded, ours = np.pad(music, 8192), cqt(torch.from_numpy(music))
    for m in (0, 7, 100, 200, 344):
        direct = (waves.conj() * padded[64 * m : 64 * m + 16_384]).sum(1) * lengths**0.5
        np.testing.assert_allclose(ours[0, :, m] + 1j * ours[1, :, m], direct, atol=2e-5 * abs(direct).max())


def test_librosa_cqt_agrees_within_its_own_approximation(cqt, music):
    theirs = librosa.cqt(music, sr=22_050, hop_length=64, n_bins=84, fmin=librosa.note_to_hz("C1"))
    c = cqt(torch.from_numpy(music)).numpy()
    assert c.shape[1:] == theirs.shape
    size = np.linalg.norm(theirs)
    assert np.linalg.norm(c[0] + 1j * c[1] - theirs) < 0.03 * size
    assert np.linalg.norm(np.hypot(*c) - abs(theirs)) < 0.015 * size


# librosa.cqt of librosa 1.0.0 (Python 3.12) of `music`, bin: frames 60, 172 and 280; 0.11 gives the same bits.
LIBROSA_1 = {
    0: [0.000025-0.000043j, -0.000021+0.000013j, 0.000052-0.000021j],
    12: [-0.849365-0.277423j, 2.161901+1.585439j, 0.567594-0.795576j],
    24: [0.093687-0.112619j, -0.433025-0.008641j, 0.011583-0.160034j],
    36: [0.000003+0.000401j, -0.001413+0.000271j, -0.000615+0.000044j],
    48: [-0.106651+0.190160j, -0.897874+0.729299j, 0.267112+0.223209j],
    60: [0.207083-0.274639j, 0.299206-0.807829j, 0.307191-0.064398j],
    72: [0.170635-0.078032j, -0.782256-0.493353j, -0.086068+0.303008j],
    83: [-0.010317-0.001336j, -0.009194+0.015698j, 0.002635-0.005085j],
}


def test_librosa_1_agrees_as_well(cqt, music):
    c = cqt(torch.from_numpy(music)).numpy()
    ours = (c[0] + 1j * c[1])[list(LIBROSA_1)][:, [60, 172, 280]]
    theirs = np.array(list(LIBROSA_1.values()))
    assert np.linalg.norm(ours - theirs) < 0.03 * np.linalg.norm(theirs)
    now = librosa.cqt(music, sr=22_050, hop_length=64, n_bins=84, fmin=librosa.note_to_hz("C1"))
    np.testing.assert_allclose(now[list(LIBROSA_1)][:, [60, 172, 280]], theirs, atol=1e-5)


def test_a_batch_gives_what_its_clips_give_and_blocks_leave_no_seam():
    cqt = CQT(SMALL)
    clips = torch.randn(2, 3, 30_000, generator=torch.Generator().manual_seed(0))
    c = cqt(clips)
    assert c.shape == (2, 3, 2, 36, 118)
    torch.testing.assert_close(c[1, 2], cqt(clips[1, 2]))
    later = cqt(torch.cat([torch.zeros(10 * 256), clips[0, 0]]))  # the same sound in other places of its blocks
    torch.testing.assert_close(later[..., 10:], c[0, 0], atol=1e-5, rtol=1e-4)


def test_the_transpose_is_the_transpose():
    cqt, g = CQT(SMALL), torch.Generator().manual_seed(0)
    x = torch.randn(1, 5000, generator=g)
    c = torch.complex(torch.randn(1, 36, 20, generator=g), torch.randn(1, 36, 20, generator=g))
    here, there = (cqt.complex(x).conj() * c).sum().real, (x * cqt.adjoint(c, 5000)).sum()
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-3)


def test_the_inverse_brings_back_what_lies_in_the_band(cqt, music):
    x = torch.from_numpy(music)
    back = cqt.inverse(cqt(x[None]), len(x), iterations=20)
    assert back.shape == (1, len(x)) and snr(x, back[0]) > 30
    with pytest.raises(ValueError, match="frames"):
        cqt.inverse(cqt(x), 10)
    with pytest.raises(ValueError, match="expected"):
        cqt.inverse(torch.zeros(2, 83, 5))


@pytest.mark.parametrize("side, longer, shorter", [
    ("end", [1, 2, 3, 4, 0, 0, 0], [1, 2, 3]),
    ("beginning", [0, 0, 0, 1, 2, 3, 4], [2, 3, 4]),
    ("both", [0, 1, 2, 3, 4, 0, 0], [2, 3, 4]),
])  # fmt: skip
def test_trim_and_pad(side, longer, shorter):
    x = torch.arange(1, 5).expand(2, 3, 4)
    assert fit_frames(x, 7, side)[1, 2].tolist() == longer and fit_frames(x, 4, side).equal(x)
    assert fit_frames(x, 3, side)[0, 0].tolist() == shorter


def test_bad_input_is_one_clear_line(cqt):
    for bad, told in ((torch.zeros(0), "one sample"), (torch.tensor([0.0, torch.nan]), "NaN")):
        with pytest.raises(ValueError, match=told) as e:
            cqt(bad)
        assert len(str(e.value)) <= 200 and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="end, beginning, both"):
        fit_frames(torch.zeros(3), 4, "middle")
    with pytest.raises(ValueError, match="too high"):
        CQTConfig(sample_rate=8000)
    with pytest.raises(ValueError, match="whole numbers"):
        CQTConfig(hop=0)


def test_pictures_and_player():
    cfg = CQTConfig()
    assert [len(w) for w in filters(cfg)][0] == 11_685
    ax = plot_cqt(torch.rand(2, 84, 50), cfg, "noise")
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"C{k}" for k in range(1, 8)]
    html = Player(torch.zeros(2205), label='"<b>')._repr_html_()
    assert html.startswith("<audio controls") and "<b>" not in html and "data:audio/" in html
