"""Screenshots of the app for the README: this script writes assets/*.png. It needs playwright and chromium."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def a_page(path: Path) -> Path:
    "The six systems of the scan, one below the other again."
    lines = [Image.open(EXAMPLES / "bach-invention-1" / f"system-{i}.png").convert("L") for i in range(1, 7)]
    sheet = Image.new("L", (max(i.width for i in lines) + 160, sum(i.height + 30 for i in lines) + 120), 255)
    y = 60
    for line in lines:
        sheet.paste(line, (80, y))
        y += line.height + 30
    sheet.save(path)
    return path


def serve(folder: str) -> tuple[subprocess.Popen, str]:
    "The app on a free port, once it answers."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": folder}
    app = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
            return app, f"http://127.0.0.1:{port}"
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    app.terminate()
    raise SystemExit("app.py does not answer")


def shoot(page: Page, name: str, colours: int = 200) -> None:
    "Save what the page shows, with few colours: small, and fit for notes on white."
    page.wait_for_timeout(600)
    path = Path(__file__).parent / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    Image.open(path).convert("RGB").quantize(colours, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


def visit(browser, url: str, **context) -> Page:
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(240_000)
    page.goto(url)
    page.wait_for_selector("#picture input[type=file]", state="attached")
    return page


def example(page: Page, name: str) -> None:
    page.get_by_role("button", name=name).click()
    page.wait_for_selector("#status p.done")
    page.wait_for_selector("#score polygon.bar")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        app, url = serve(folder)
        try:
            browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = visit(browser, url, viewport={"width": 1100, "height": 800})
            example(page, "Schumann, like a photo")
            page.locator("#score polygon.bar").nth(1).click()
            shoot(page, "transcribe")
            page.get_by_role("tab", name="Reward").click()
            page.wait_for_selector("#diff .sheet")
            shoot(page, "reward")
            page.get_by_role("tab", name="Under the hood").click()
            page.locator("#gaze .lmx[data-token]").nth(40).click()
            shoot(page, "hood")
            page = visit(browser, url, viewport={"width": 1300, "height": 800})
            page.set_input_files("#picture input[type=file]", a_page(Path(folder, "page.png")))
            page.wait_for_selector("#status p.done")
            page.locator("#score polygon.bar").nth(4).click()
            shoot(page, "page")
            page = visit(browser, url, viewport={"width": 390, "height": 800}, color_scheme="dark")
            example(page, "Schubert, voice")
            shoot(page, "phone")
        finally:
            app.terminate()
            app.wait(20)


if __name__ == "__main__":
    main()
