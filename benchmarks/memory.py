"""Memory of the app over many readings: python benchmarks/memory.py --count 1000

Starts the app, reads short lines one after the other as visitors do, each with a session of its own or all with one,
and prints the resident memory of the app and of its workers. It is flat when the last quarter holds no more than the
second one.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from gradio_client import Client, handle_file

ROOT = Path(__file__).resolve().parents[1]
LINES = ("schubert-fruehlingstraum-voice", "schumann-rosen-voice", "beethoven-maigesang-piano")


def resident(pid: int) -> float:
    "MB of a process; 0 for one that is gone."
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def serve(folder: str) -> tuple[subprocess.Popen, str]:
    "The app on a free port, once it answers."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": folder}
    app = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
            return app, f"http://127.0.0.1:{port}"
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    app.terminate()
    raise SystemExit("app.py does not answer")


def main() -> None:
    p = argparse.ArgumentParser(description="Resident memory of the app over many readings.")
    p.add_argument("--count", type=int, default=100, help="readings (default %(default)s)")
    p.add_argument("--visitors", type=int, default=10, help="readings of one session (default %(default)s)")
    p.add_argument("--every", type=int, default=10, help="readings between two lines (default %(default)s)")
    p.add_argument("--picture", type=Path, help="read this instead of short lines")
    p.add_argument("--page", action="store_true", help="read the example's whole page instead of short lines")
    args = p.parse_args()
    pictures = [ROOT / "examples" / f"{name}.png" for name in LINES]
    pictures = [ROOT / "examples" / "pages" / "bach-invention-1.png"] if args.page else pictures
    pictures = [args.picture] if args.picture else pictures
    found = []
    with tempfile.TemporaryDirectory() as folder:
        app, url = serve(folder)
        try:
            print("readings  app MB  workers MB")
            for n in range(args.count):
                if n % args.visitors == 0:
                    client = Client(url, verbose=False, analytics_enabled=False, download_files=False)
                client.predict(handle_file(pictures[n % len(pictures)]), api_name="/transcribe")
                found.append(resident(app.pid))
                if (n + 1) % args.every == 0:
                    print(f"{n + 1:8} {found[-1]:7.0f} {sum(map(resident, children(app.pid))):11.0f}", flush=True)
        finally:
            app.terminate()
            app.wait(20)
    quarter = max(1, args.count // 4)
    second, last = (statistics.median(x) for x in (found[quarter : 2 * quarter] or found, found[-quarter:]))
    print(f"median MB: second quarter {second:.0f}, last quarter {last:.0f}, growth {100 * (last / second - 1):+.1f} %")


if __name__ == "__main__":
    main()
