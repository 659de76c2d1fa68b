"""What the packaged model reads on assets/photo.jpg, engraved. Writes assets/read.png, which the README shows."""

from pathlib import Path

import cv2
import numpy as np

from vitomr.notation.engrave import engrave
from vitomr.page.staves import open_picture
from vitomr.transcribe import Transcriber

HERE = Path(__file__).parent


def main() -> None:
    photo = open_picture(HERE / "photo.jpg")
    read = Transcriber.from_pretrained().transcribe(HERE / "photo.jpg", words=False)
    engraved = engrave(read.score, staff_space=12).img
    size = photo.shape[1], round(engraved.shape[0] * photo.shape[1] / engraved.shape[1])
    engraved = cv2.resize(engraved, size, interpolation=cv2.INTER_AREA)
    levels = (np.round(engraved / 32) * 32).clip(0, 255).astype(np.uint8)  # few grays: a small file
    cv2.imwrite(str(HERE / "read.png"), levels, [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()
