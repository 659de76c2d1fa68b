"""Words of the README, and how long each notebook takes to read: python tests/reading_times.py

A notebook of 2,500 words and 300 lines of code takes 15 minutes: 250 words a minute, and 60 lines of code a minute.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS, LINES = 250, 60  # a minute
LIMIT = 15  # minutes, of a chapter


def words_of(text: str) -> int:
    "Words of Markdown; addresses, HTML and marks are none."
    text = re.sub(r"\]\([^)]*\)|<[^>]+>|https?://\S+", " ", text)
    return len([w for w in text.split() if re.search(r"\w", w)])


def size_of(path: Path) -> tuple[int, int]:
    "Words of the text of a notebook, and lines of its code; empty lines and comments of nbdev are none."
    words = lines = 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += words_of(text)
        elif cell["cell_type"] == "code":
            lines += sum(bool(x.strip()) and not x.startswith("#|") for x in text.splitlines())
    return words, lines


def minutes(words: int, lines: int) -> float:
    return words / WORDS + lines / LINES


def readme_words() -> int:
    "Words of README.md without the front matter of the Space."
    return words_of((ROOT / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[1])


def notebooks() -> dict[str, tuple[int, int]]:
    "Name → words, lines."
    return {p.relative_to(ROOT).as_posix(): size_of(p) for p in sorted((ROOT / "nbs").rglob("[!_.]*.ipynb"))}


def main() -> None:
    print(f"README.md: {readme_words()} words")
    print(f"{'words':>6} {'lines':>6} {'minutes':>8}")
    sizes = notebooks()
    for name, size in sorted(sizes.items(), key=lambda item: -minutes(*item[1])):
        print(f"{size[0]:6} {size[1]:6} {minutes(*size):8.1f} {'>' if minutes(*size) > LIMIT else ' '} {name}")
    long = sum(minutes(*size) > LIMIT for size in sizes.values())
    print(f"{len(sizes)} notebooks, {long} of them over {LIMIT} minutes")


if __name__ == "__main__":
    main()
