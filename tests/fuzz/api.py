"""Hostile requests: every endpoint of a running app is sent values of any kind; it answers, in one line, and lives on.

    python tests/fuzz/api.py --count 500 --seed 0
"""

import atexit
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import httpx
from harness import Attempt, main

ROOT = Path(__file__).resolve().parents[2]
LINE = ROOT / "examples" / "schumann-rosen-voice.png"
VALUES = (
    None, True, False, 0, 1, -1, 2, 10**9, 10**30, 0.5, -1e300, "", "x", "1", "a" * 5000, "../../etc/passwd", "\0",
    "measure C4 quarter", "measure " * 3000, "[" * 20_000, "{", '{"0": [[0, 0, 9, 9]]}', '{"0": [[0, 0, 9e99, NaN]]}',
    "<score-partwise/>", "<a>" * 5000, "1-3,7", "1-99999999999999999999", [], [1, [2, [3]]], {}, {"path": None},
    {"path": "/etc/passwd"}, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, {"path": str(LINE)},
    {"path": "http://127.0.0.1:1/a.png", "url": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}},
    {"path": 7}, "<b>&", "greedy", "sampling", "vitomr",
)  # fmt: skip


class App:
    "A running app, which reads a few tokens of a line at most."

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("VITOMR_", "GRADIO_"))}
        env = {"GRADIO_TEMP_DIR": self.folder.name, "GRADIO_SERVER_PORT": str(port), "VITOMR_MAX_TOKENS": "10"}
        self.log = Path(self.folder.name, "log.txt")
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "app.py"], cwd=ROOT, env={**kept, **env}, stdout=out, stderr=subprocess.STDOUT
            )
        atexit.register(self.process.kill)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        for _ in range(600):
            try:
                self.config = self.http.get("/config").json()
                break
            except httpx.TransportError:
                time.sleep(0.2)
        self.components = {c["id"]: c for c in self.config["components"]}
        self.picture, self.reference = self.upload(LINE), self.upload(LINE.with_suffix(".lmx"))
        for name in ("transcribe", "measure"):  # what the session holds from now on
            call = next(c for c in self.config["dependencies"] if c["api_name"] == name)
            self.answer(call, self.usual(call))

    def upload(self, path: Path) -> dict:
        with path.open("rb") as f:
            there = self.http.post("/gradio_api/upload", files={"files": f}).json()[0]
        return {"path": there, "meta": {"_type": "gradio.FileData"}}

    def usual(self, call: dict) -> list:
        "The values that the page itself would send."
        files = {"image": self.picture, "uploadbutton": self.picture, "file": self.reference}
        inputs = [self.components[i] for i in call["inputs"]]
        data = [files.get(c["type"], c["props"].get("value")) for c in inputs]
        return [self.picture, *data[1:]] if call["api_name"] == "read_music" else data

    def answer(self, call: dict, data: list) -> list[dict]:
        "The messages that come back; none for a request that is turned away."
        body = {"data": data, "fn_index": call["id"], "session_hash": "s"}
        content = json.dumps(body, allow_nan=False).encode()
        answer = self.http.post("/gradio_api/queue/join", content=content, headers={"content-type": "application/json"})
        assert answer.status_code < 500, f"{call['api_name']}: status {answer.status_code}"
        if answer.status_code != 200:
            return []
        found = []
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "s"}) as lines:
            for line in lines.iter_lines():
                if line.startswith("data:"):
                    found.append(json.loads(line[5:]))
                    if found[-1]["msg"] in ("process_completed", "close_stream", "unexpected_error"):
                        break
        return found

    def own_faults(self) -> int:
        "Tracebacks in the log that begin or end in this project, not those of gradio about a message it cannot use."
        pieces = self.log.read_text(errors="replace").split("Traceback (most recent call last)")[1:]
        return sum("app.py" in p or "/vitomr/" in p for p in pieces)


@cache
def app() -> App:
    return App()


def check(seed: int, attempt: Attempt) -> None:
    r, server = random.Random(seed), app()
    call = r.choice([c for c in server.config["dependencies"] if c["inputs"]])
    before = server.own_faults()
    data = [v if r.random() < 0.7 else r.choice(VALUES) for v in server.usual(call)]
    if r.random() < 0.05:
        data = data[: r.randrange(len(data) + 1)]
    said = f"{call['api_name']}({json.dumps(data)[:300]})"
    for message in attempt(lambda: server.answer(call, data), seconds=120) or ():
        error = (message.get("output") or {}).get("error") if isinstance(message.get("output"), dict) else None
        assert error is None or (len(str(error)) <= 200 and "\n" not in str(error)), f"{said}: {str(error)[:300]}"
        assert "root:x:0" not in json.dumps(message), f"{said}: a file of the server"
    assert server.process.poll() is None, f"the app ended with {server.process.returncode}: {said}"
    assert server.own_faults() == before, f"a traceback in the log: {said}"


if __name__ == "__main__":
    raise SystemExit(main("requests", check))
