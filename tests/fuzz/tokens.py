"""Random token sequences: each becomes a score that Verovio engraves and plays; nothing raises, no engraver ends.

    python tests/fuzz/tokens.py --count 5000 --seed 0
"""

import random

from harness import Attempt, main
from lmx.linearization import vocabulary as V

from vitomr.notation.engrave import from_verovio
from vitomr.notation.lmx import VOCABULARY
from vitomr.notation.musicxml import to_musicxml

PLAIN = VOCABULARY[3:]
FEW = (
    "measure measure voice:2 voice:1 C4 C4 D5 rest chord grace backup forward 16th eighth 16th maxima 64th quarter "
    "beam:begin beam:begin beam:end tremolo:start tremolo:stop tuplet:start tuplet:stop 3in2 staff:2 rest:measure "
    "tied:start tied:stop slur:start slur:stop"
).split()
SUFFIXES = (
    "beam:begin beam:end beam:begin beam:end beam:forward-hook beam:backward-hook dot tuplet:start tuplet:stop 3in2 "
    "slur:start slur:stop tied:start tied:stop tremolo:start tremolo:stop tremolo:single tremolo:unmeasured tremolo:1 "
    "tremolo:3 staff:1 staff:2 arpeggiate fermata stem:up stem:none trill-mark # 5in4"
).split()
TYPES = [*V.NOTE_TYPE_TOKENS, "rest:measure"]


def note(r: random.Random) -> list[str]:
    found = r.choice((["grace"], ["grace", "grace:slash"])) if r.random() < 0.1 else []
    found = [*found, *(["chord"] if r.random() < 0.15 else []), *(["print-object:no"] if r.random() < 0.05 else [])]
    usual = ("C4", "C4", "D5", "B6", "rest", "forward", "backup")
    found.append(r.choice(usual) if r.random() < 0.8 else r.choice(V.PITCH_TOKENS))
    found += [r.choice(V.VOICE_TOKENS)] if r.random() < 0.3 else []
    found.append(r.choice(TYPES) if r.random() < 0.5 else r.choice(("eighth", "16th", "quarter", "maxima")))
    return found + [r.choice(SUFFIXES) for _ in range(r.randint(0, 4))]


def attribute(r: random.Random) -> list[str]:
    time = ["time", r.choice(list(V.BEATS_TOKENS)), r.choice(list(V.BEAT_TYPE_TOKENS))]
    clef = [r.choice(list(V.CLEF_TOKENS)), r.choice(list(V.STAFF_TOKENS))]
    return r.choice((time, clef, [r.choice(list(V.KEY_TOKENS))]))


def sequence(seed: int) -> list[str]:
    "Any tokens, or a few that meet often, or bars of notes with any suffixes, or such bars with tokens changed."
    r = random.Random(seed)
    kind = r.random()
    if kind < 0.15:
        return [r.choice(PLAIN) for _ in range(r.randint(1, 60))]
    if kind < 0.3:
        return ["measure", *(r.choice(PLAIN) if r.random() > 0.12 else "measure" for _ in range(r.randint(1, 80)))]
    if kind < 0.5:
        return ["measure", *(r.choice(FEW) for _ in range(r.randint(1, 50)))]
    tokens: list[str] = []
    for _ in range(r.randint(1, 6)):
        tokens.append("measure")
        for _ in range(r.randint(0, 8)):
            tokens += attribute(r) if r.random() < 0.08 else note(r)
    for _ in range(r.randint(1, 6) if kind > 0.85 else 0):
        i, change = r.randrange(len(tokens)), r.random()
        tokens[i : i + (change < 0.7)] = [] if change < 0.4 and len(tokens) > 1 else [r.choice(PLAIN)]
    return tokens


def check(seed: int, attempt: Attempt) -> None:
    tokens = sequence(seed)
    said = " ".join(tokens)
    score = attempt(lambda: to_musicxml(tokens))
    assert score is not None, f"to_musicxml raises: {said}"
    divisions = int(score.findtext("part/measure/attributes/divisions"))
    assert 1 <= divisions <= 16383, f"divisions {divisions}: {said}"
    attempt(lambda: from_verovio(score, "midi", "times"))
    attempt(lambda: from_verovio(score, options={"breaks": "auto", "adjustPageWidth": False}))
    assert not attempt.seen, f"{attempt.outcome}: {said}"


if __name__ == "__main__":
    raise SystemExit(main("token sequences", check))
