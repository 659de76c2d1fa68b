"""Several users at once for a while: they upload pictures, read them, and some leave before the answer.

    python tests/fuzz/users.py --users 8 --minutes 60 --seed 0

Exit status 1 when the app ends, a traceback is logged, an error is longer than one line of 200 characters, or memory in
the last quarter is 300 MB above that of the second quarter. The figures come last.
"""

import argparse
import json
import os
import random
import statistics
import threading
import time
import uuid
from collections import Counter
from pathlib import Path

import httpx
import psutil
from api import ROOT, App

PICTURES = sorted((ROOT / "examples").glob("*.png")) + [ROOT / "assets" / "photo.jpg"]
MOST_GROWTH = 300e6  # bytes, of the app and all its processes, from the second quarter of the time to the last


class User(threading.Thread):
    "One visitor, who reads one picture after the other."

    def __init__(self, server: App, seed: int, until: float):
        super().__init__(daemon=True)
        self.server, self.random, self.until = server, random.Random(seed), until
        self.http = httpx.Client(base_url=server.http.base_url, timeout=600)
        self.seen, self.wrong, self.seconds = Counter(), [], []

    def read(self, picture: Path) -> None:
        call = next(c for c in self.server.config["dependencies"] if c["api_name"] == "read_music")
        with picture.open("rb") as f:
            there = self.http.post("/gradio_api/upload", files={"files": f}).json()[0]
        data = self.server.usual(call)
        data[0] = {"path": there, "meta": {"_type": "gradio.FileData"}}
        session = uuid.uuid4().hex
        body = {"data": data, "fn_index": call["id"], "session_hash": session}
        if self.http.post("/gradio_api/queue/join", json=body).status_code != 200:
            self.seen["turned away"] += 1
            return
        leaves_after = self.random.uniform(0, 3) if self.random.random() < 0.2 else None
        begun = time.monotonic()
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as lines:
            for line in lines.iter_lines():
                if leaves_after is not None and time.monotonic() - begun > leaves_after:
                    self.seen["left"] += 1
                    return
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") in ("process_completed", "unexpected_error"):
                    error = (message.get("output") or {}).get("error")
                    if error is not None and (len(str(error)) > 200 or "\n" in str(error)):
                        self.wrong.append(f"an error of {len(str(error))} characters: {str(error)[:200]}")
                    self.seen["read" if message.get("success") else f"error: {str(error)[:60]}"] += 1
                    self.seconds.append(time.monotonic() - begun)
                    return

    def run(self) -> None:
        while time.monotonic() < self.until:
            try:
                self.read(self.random.choice(PICTURES))
            except httpx.HTTPError as e:
                self.wrong.append(f"{type(e).__name__}: {e}")


def memory(process: psutil.Process) -> int:
    "Bytes that the app and its processes hold."
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try:
            total += p.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server = App()
    process, begun = psutil.Process(server.process.pid), time.monotonic()
    users = [User(server, args.seed + i, begun + 60 * args.minutes) for i in range(args.users)]
    for user in users:
        user.start()
    samples = []
    while any(u.is_alive() for u in users) and server.process.poll() is None:
        samples.append(memory(process))
        time.sleep(min(5.0, 60 * args.minutes / 40))
    wrong = [w for u in users for w in u.wrong]
    if server.process.poll() is not None:
        wrong.append(f"the app ended with {server.process.returncode}")
    wrong += [f"{n} tracebacks in the log"] if (n := server.own_faults()) else []
    quarter = max(1, len(samples) // 4)
    early, late = statistics.median(samples[quarter : 2 * quarter]), statistics.median(samples[-quarter:])
    wrong += [f"memory grew by {(late - early) / 1e6:.0f} MB"] if late - early > MOST_GROWTH else []
    seen, seconds = sum((u.seen for u in users), Counter()), [s for u in users for s in u.seconds]
    files = sum(p.is_file() for p in Path(server.folder.name).rglob("*"))
    for line in wrong[:20]:
        print(line)
    print(
        f"users: {args.users} for {args.minutes:g} minutes, {len(wrong)} defects; "
        f"{', '.join(f'{n} {kind}' for kind, n in seen.most_common())}; "
        f"median {statistics.median(seconds or [0]):.1f} s, slowest {max(seconds, default=0):.1f} s a request; "
        f"memory {early / 1e6:.0f} MB in the second quarter, {late / 1e6:.0f} MB in the last; {files} files cached"
    )
    server.process.kill()
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
