"""What every fuzzer shares: seeded inputs, what counts as a defect, and the figures at the end."""

import argparse
import os
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

MOST_SECONDS = 25.0  # by the clock, of one step: the limit of a worker is 20
MOST_GROWTH = 2_000_000_000  # bytes of this process
MOST_CHARACTERS = 200  # of an error line


@dataclass
class Report:
    "The figures of a run."

    name: str
    n: int = 0
    outcomes: Counter = field(default_factory=Counter)
    defects: list[tuple[int, str]] = field(default_factory=list)  # seed and what is wrong
    slowest: float = 0.0  # seconds by the clock
    busiest: float = 0.0  # seconds of this process's processor time
    growth: int = 0  # bytes of this process

    def __str__(self) -> str:
        seen = ", ".join(f"{n} {kind}" for kind, n in self.outcomes.most_common())
        return (
            f"{self.name}: {self.n} inputs, {len(self.defects)} defects; {seen}; slowest step "
            f"{self.slowest:.1f} s by the clock, at most {self.busiest:.1f} s of the processor in this process, which "
            f"grew by {self.growth / 1e6:.0f} MB"
        )


def memory() -> int:
    "The most that this process has held so far, bytes."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def line_of(e: Exception) -> str | None:
    "What is wrong with an error as a line for a person; None for a good one."
    text = str(e)
    if not isinstance(e, (ValueError, OSError)) or isinstance(e, UnicodeError):
        return f"{type(e).__name__}: {''.join(traceback.format_exception(e)[-2:])[-400:]}"
    if not text or "\n" in text or len(text) > MOST_CHARACTERS:
        return f"an error line of {len(text)} characters: {text[:300]!r}"
    return None


def kind_of(e: Exception) -> str:
    "What came of an input that was refused, in words."
    if "ended its worker" in str(e):
        return "caught crashes"
    return "stopped at a limit" if "takes more than" in str(e) or "needs more than" in str(e) else "refused"


class Attempt:
    "Do one thing with an input after the other; each ends with a result or with one line, in time."

    def __init__(self):
        self.seen: list[str] = []  # what came of those that were refused
        self.wrong: list[str] = []
        self.slowest = self.busiest = 0.0

    def __call__(self, work: Callable, seconds: float = MOST_SECONDS):
        "What the work gives; None where it is refused."
        start, busy = time.monotonic(), time.process_time()
        try:
            return work()
        except Exception as e:
            self.seen.append(kind_of(e))
            self.wrong += [fault] if (fault := line_of(e)) else []
        finally:
            took, busy = time.monotonic() - start, time.process_time() - busy
            self.slowest, self.busiest = max(self.slowest, took), max(self.busiest, busy)
            if took > seconds:
                self.wrong.append(f"took {took:.1f} s by the clock, {busy:.1f} s of the processor")

    @property
    def outcome(self) -> str:
        "The worst that was seen."
        return next((k for k in ("caught crashes", "stopped at a limit", "refused") if k in self.seen), "done")


def run(
    name: str,
    check: Callable[[int, Attempt], None],  # seed; AssertionError for what is wrong
    count: int,
    seed: int,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    "Try inputs of the seeds from `seed` on."
    report, before = Report(name), 0
    for number in range(seed, seed + count):
        attempt = Attempt()
        try:
            check(number, attempt)
        except Exception as e:
            attempt.wrong.append(str(e) if isinstance(e, AssertionError) else f"the fuzzer failed: {e!r}")
        before = before or memory()
        report.n, report.slowest = report.n + 1, max(report.slowest, attempt.slowest)
        report.busiest = max(report.busiest, attempt.busiest)
        report.growth = max(report.growth, memory() - before)
        if report.growth > MOST_GROWTH:
            attempt.wrong.append(f"this process grew by {report.growth / 1e6:.0f} MB")
        report.outcomes["wrong" if attempt.wrong else attempt.outcome] += 1
        for wrong in attempt.wrong[:1]:
            report.defects.append((number, wrong))
            say(f"seed {number}: {wrong}")
    return report


def main(name: str, check: Callable[[int, Attempt], None]) -> int:
    "The command of a fuzzer: exit status 1 when there are defects."
    parser = argparse.ArgumentParser(description=f"Try hostile {name}; the figures come last.")
    parser.add_argument("--count", type=int, default=1000, help="inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the first input; the next ones count up")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    report = run(name, check, args.count, args.seed, say=lambda line: print(line, flush=True))
    print(report)
    return int(bool(report.defects))
