"""Make the engraved examples anew: python examples/make.py openscore-lieder.zip (the two scans are copies)."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vitomr.data.corpora import open_corpus
from vitomr.data.degrade import degrade
from vitomr.notation.engrave import engrave
from vitomr.notation.lmx import linearise
from vitomr.notation.score import as_score, cut_excerpt, musicxml_bytes, parts

HERE = Path(__file__).parent
EXAMPLES = {  # name: song, staves of the part, first bar from 0, bars, font
    "beethoven-maigesang-piano": ("lc6491377", 2, 0, 5, "Leipzig"),
    "schubert-fruehlingstraum-piano": ("lc5023603", 2, 0, 4, "Leland"),
    "schubert-fruehlingstraum-voice": ("lc5023603", 1, 4, 4, "Leland"),
    "schumann-rosen-voice": ("lc6982743", 1, 3, 4, "Bravura"),
    "schumann-juengling-photo": ("lc4978393", 2, 0, 4, "Gootville"),
}
LAYOUT = {"spacingLinear": 0.34, "spacingNonLinear": 0.66, "lyricSize": 3.2}
PHOTO_SEED = 6  # of the chance in the photo's light, lens and tilt


def main(corpus: str) -> None:
    songs = {s.id: s for s in open_corpus(corpus, split="dev")}
    for name, (song, n_staves, start, n_measures, font) in EXAMPLES.items():
        part = next(p for p in parts(songs[song].load()) if p.n_staves == n_staves)
        excerpt = cut_excerpt(part.element, start, n_measures)
        is_photo = name.endswith("photo")
        img = engrave(excerpt, font=font, staff_space=11 if is_photo else 16, options=LAYOUT).img
        if is_photo:
            img = degrade(np.pad(img, 40, constant_values=255), np.random.default_rng(PHOTO_SEED), "photo").img
        Image.fromarray(img).save(HERE / f"{name}.png", optimize=True)
        (HERE / f"{name}.lmx").write_text(" ".join(linearise(excerpt).tokens) + "\n")
        (HERE / f"{name}.musicxml").write_bytes(musicxml_bytes(as_score(excerpt)))


if __name__ == "__main__":
    main(*sys.argv[1:])
