"""Hand what settings.ini and README.md say to setuptools; the rest is in pyproject.toml."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).resolve().parent
parser = ConfigParser()
parser.read_string((here / "settings.ini").read_text(encoding="utf-8"))
cfg = parser["DEFAULT"]
readme = here / "README.md"

suffix = "_requirements"
extras = {key.removesuffix(suffix): value.split() for key, value in cfg.items() if key.endswith(suffix)}
of_tests = [listed for name, listed in extras.items() if name not in ("docs", "mcp")]
extras["dev"] = sorted({requirement for listed in of_tests for requirement in listed})

setup(
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    # The README without its Space front matter.
    long_description=readme.read_text(encoding="utf-8").split("\n---\n", 1)[-1].lstrip() if readme.exists() else "",
    long_description_content_type="text/markdown",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
