"""Hostile pictures and PDFs: files that are cut, changed, or made to cost time and memory are read, or refused.

    python tests/fuzz/pictures.py --count 5000 --seed 0
"""

import io
import random
import struct
import zlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from harness import Attempt, main
from PIL import Image

from vitomr.page.documents import Pages

FORMATS = {
    "a.png": {"format": "PNG"},
    "a.jpg": {"format": "JPEG"},
    "a.tif": {"format": "TIFF", "compression": "tiff_lzw"},
    "b.tif": {"format": "TIFF", "compression": "jpeg"},
    "c.tif": {"format": "TIFF"},
    "a.bmp": {"format": "BMP"},
    "a.gif": {"format": "GIF"},
    "a.webp": {"format": "WEBP"},
    "a.ppm": {"format": "PPM"},
}
OPERATORS = (
    "q Q BT ET W n h S f B b s f* B* W* 0.5 w 1 J 2 j [3 1] 0 d 10 10 m 500 700 l 100 200 300 400 50 60 c "
    "0 0 595 842 re 1 0 0 1 5 5 cm 1e9 0 0 1e9 0 0 cm 0 0 0 0 0 0 cm /F Do /I Do /P scn /Pattern cs /S sh 0.2 g "
    "1 0 0 rg /T 12 Tf (a) Tj 9999999 w 1e38 1e38 m -1e38 0 l NaN 0 m"
).split()


@cache
def whole(name: str) -> bytes:
    "A picture of noise and lines, for TIFF three of them."
    rng, file = np.random.default_rng(len(name)), io.BytesIO()
    pages = []
    for _ in range(3):
        a = rng.integers(160, 255, (60, 90), np.uint8)
        a[10:40:6] = 0
        pages.append(Image.fromarray(a))
    more = {"save_all": True, "append_images": pages[1:]} if name.endswith(".tif") else {}
    if name == "a.jpg":
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a line of music"
        more["exif"] = exif
    pages[0].save(file, **FORMATS[name], **more)
    return file.getvalue()


def damaged(data: bytes, r: random.Random) -> bytes:
    "Cut, or with bytes changed, put in or taken out; mostly near the beginning, where the tables are."
    new = bytearray(data)
    if r.random() < 0.3:
        return bytes(new[: r.randrange(len(new))])
    for _ in range(r.choice((1, 1, 2, 5, 30))):
        at = min(int(r.expovariate(8 / len(new))), len(new) - 1) if r.random() < 0.7 else r.randrange(len(new))
        kind = r.randrange(4)
        if kind == 0:
            new[at] = r.choice((0, 1, 0x7F, 0x80, 0xFF, r.randrange(256)))
        elif kind == 1:
            size = r.choice((2, 4))
            new[at : at + size] = r.choice((b"\xff" * size, b"\0" * size, b"\x7f" + b"\xff" * (size - 1)))
        elif kind == 2:
            del new[at : at + r.randint(1, 20)]
        else:
            new[at:at] = bytes(r.randrange(256) for _ in range(r.randint(1, 20)))
        new = new or bytearray(b"\0")
    return bytes(new)


def png_of(width: int, height: int) -> bytes:
    "A PNG that says it is so large, with a few bytes of pixels."
    piece = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", head) + piece(b"IDAT", pixels) + piece(b"IEND", b"")


def content(r: random.Random) -> bytes:
    "What a page or a form draws."
    if r.random() < 0.2:
        return b"/F Do " * r.choice((1, 2, 10, 50))
    if r.random() < 0.1:  # a long path
        n = r.choice((1000, 30_000))
        return b"0 0 m " + b" ".join(b"%d %d l" % (r.randrange(600), r.randrange(800)) for _ in range(n)) + b" B*"
    return " ".join(r.choice(OPERATORS) for _ in range(r.choice((5, 50, 500)))).encode()


def pdf(r: random.Random) -> bytes:
    "A PDF of a page or two, with forms that draw one another, a pattern, a shading and a picture."
    boxes = (b"0 0 595 842", b"0 0 595 842", b"0 0 1e9 1e9", b"0 0 0 0", b"0 0 14400 1", b"9 9 -9 -9", b"0 0 NaN 5")
    box = r.choice(boxes)
    n_forms = r.randint(1, 8)
    use = lambda k: b"<</XObject<</F %d 0 R/I 4 0 R>>/Pattern<</P 5 0 R>>/Shading<</S 6 0 R>>>>" % k
    stream = lambda head, data: b"<<%s/Length %d>>stream\n%s\nendstream" % (head, len(data), data)
    side = r.choice((1, 50, 5000, 10**6))
    pixels = zlib.compress(bytes(10**5))
    step = r.choice((b"5", b"0.0001", b"0"))
    tile = b"/PatternType 1/PaintType 1/TilingType 1/BBox[0 0 9 9]/XStep %s/YStep %s/Resources%s" % (step, step, use(8))
    image = b"/Type/XObject/Subtype/Image/ColorSpace/DeviceGray/BitsPerComponent 8/Filter/FlateDecode"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R 3 0 R]/Count %d>>" % r.choice((1, 2, 2, 1000, -1)),
        b"<</Type/Page/Parent 2 0 R/MediaBox[%s]/Contents 7 0 R/Resources%s>>" % (box, use(8)),
        stream(image + b"/Width %d/Height %d" % (side, side), pixels),
        stream(tile, content(r)),
        b"<</ShadingType 2/ColorSpace/DeviceGray/Coords[0 0 1 1]/Function<</FunctionType 2/Domain[0 1]/N 1>>>>",
        stream(b"", content(r)),
    ]
    for k in range(n_forms):
        draws = r.choice((8, 8 + k, 8 + (k + 1) % n_forms))  # the first, itself, or the next
        objects.append(stream(b"/Type/XObject/Subtype/Form/BBox[0 0 595 842]/Resources" + use(draws), content(r)))
    data, at = b"%PDF-1.4\n", []
    for i, body in enumerate(objects, 1):
        at.append(len(data))
        data += b"%d 0 obj%sendobj\n" % (i, body)
    table = b"".join(b"%010d 00000 n \n" % a for a in at)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(at) + 1)
    data += head + table + b"trailer<</Root 1 0 R/Size %d>>startxref\n%d\n%%%%EOF" % (len(at) + 1, len(data))
    return damaged(data, r) if r.random() < 0.3 else data


def picture(seed: int) -> tuple[str, bytes]:
    "A file name and what the file holds."
    r = random.Random(seed)
    if r.random() < 0.35:
        return "a.pdf", pdf(r)
    if r.random() < 0.05:
        return "a.png", png_of(r.choice((16, 1000, 29_000, 2**31 - 1)), r.choice((16, 1000, 29_000, 2**31 - 1)))
    name = r.choice(list(FORMATS))
    return r.choice((name, name, "a.pdf", "a.png")), damaged(whole(name), r)


def check(seed: int, attempt: Attempt) -> None:
    name, data = picture(seed)
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        pages = attempt(lambda: Pages(path))
        for i in range(min(3, len(pages)) if pages is not None else 0):
            page = attempt(lambda i=i: pages[i])
            assert page is None or (page.dtype == np.uint8 and page.ndim == 2), "a page that is no gray picture"


if __name__ == "__main__":
    raise SystemExit(main("pictures", check))
