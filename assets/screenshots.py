"""The screenshot of the app for the docs: writes assets/transcribe.png. It needs playwright and chromium."""

import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from memory import serve  # noqa: E402


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
        finally:
            app.terminate()
            app.wait(20)


if __name__ == "__main__":
    main()
