"""The documentation is true: links lead somewhere, examples run, commands parse, lists agree with the code."""

import argparse
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import reading_times
import yaml
from test_repo import LIB, RANK, ROOT, settings

from vitomr.cli import main, parser
from vitomr.decoder import READERS, Reader, save_reader

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "lab").rglob("*.md")])
PAGES += [ROOT / "lab" / "README.md", ROOT / "lab" / "training.md", ROOT / "examples" / "README.md"]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!_.]*.ipynb"))
FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^\1```$", re.M | re.S)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    "Markdown of a page or of the text cells of a notebook, without code."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(path: Path) -> set[str]:
    "Names of the headings of a page, as GitHub and mkdocs make them."
    heads = re.findall(r"^#+ +(.+?)\s*$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in heads}


def blocks(page: str) -> dict[str, str]:
    "Title → code of the examples of a page that have a title."
    return {title: code for _, _, title, code in FENCE.findall((DOCS / page).read_text(encoding="utf-8")) if title}


def commands() -> list[tuple[str, str]]:
    "Every `vitomr` command of the pages."
    found = []
    for path in PAGES:
        for indent, language, _, code in FENCE.findall(path.read_text(encoding="utf-8")):
            lines = re.sub(r"\\\n\s*", " ", code).splitlines() if language in ("", "bash") else []
            found += [(name(path), x.strip()) for x in lines if x.removeprefix(indent).startswith("vitomr ")]
    return found


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=name)
def test_links_lead_somewhere(path):
    bad = []
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text_of(path)):
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        if not to.exists() or (anchor and to.suffix == ".md" and anchor not in anchors(to)):
            bad.append(target)
    assert not bad, f"{name(path)} links to {bad}, which are not there"


def test_the_navigation_names_pages_that_exist_and_all_of_them():
    def named(item) -> list[str]:
        inside = item.values() if isinstance(item, dict) else item
        return [item] if isinstance(item, str) else [x for v in inside for x in named(v)]

    nav = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert not [page for page in nav if not (DOCS / page).is_file() and not (ROOT / page).is_file()]
    assert {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")} <= set(nav)


@cache
def defined_in(module: str) -> set[str]:
    "Names that a module defines at its top level; what it only imports is none of them."
    code = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    return set(re.findall(r"^(?:class |def |async def )?(\w+)(?: *[:=(]|$)", code, re.M))


def test_the_reference_names_what_there_is():
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: ([\w.]+)\.(\w+)$", text, re.M)
    assert not [f"{module}.{x}" for module, x in named if x not in defined_in(module)] and len(named) > 50


def test_design_lists_the_rooms_there_are_in_the_order_that_is_enforced():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "DESIGN.md").read_text(encoding="utf-8"), re.M)
    assert {room: int(row) - 1 for row, room in rows} == RANK
    there = {p.stem for p in LIB.glob("[!_]*.py")} | {p.parent.name for p in LIB.glob("*/__init__.py")}
    assert {room for _, room in rows} == there
    assert [int(row) for row, _ in rows] == sorted(int(row) for row, _ in rows)


@pytest.mark.parametrize("page, command", commands())
def test_commands_parse(page, command, monkeypatch):
    def refuse(self, message):
        raise AssertionError(f"{page}: {command}: {message}")

    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    args = [a for a in shlex.split(command, comments=True)[1:] if a != "…"]
    if args != ["transcribe", "--help"] and "…" not in command:
        parser().parse_args(args)


def test_scripts_and_targets_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z.]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    missing = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        scripts = re.findall(r"\b(?:python|pytest) ((?:benchmarks|tests|assets|lab)/[\w/]+\.py)", text)
        missing += [f"{name(path)}: {s}" for s in scripts if not (ROOT / s).is_file()]
        made = re.findall(r"(?:^ *|`)make ([a-z.]+)(?=[ `\n])", text, re.M)
        missing += [f"{name(path)}: make {t}" for t in made if t not in targets]
    assert not missing


def test_serving_lists_the_variables_that_the_code_reads():
    code = "".join(p.read_text(encoding="utf-8") for p in [ROOT / "app.py", *LIB.rglob("*.py")])
    read = set(re.findall(r"environ(?:\.get\(|\.setdefault\(|\[)\"(VITOMR_\w+)\"", code))
    said = set(re.findall(r"`(VITOMR_\w+)`", (DOCS / "how-to" / "serving.md").read_text(encoding="utf-8")))
    assert read == said


@pytest.fixture
def at(tmp_path, monkeypatch):
    "A folder with the examples of the repository, and the files of a page's examples."
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(page: str) -> Path:
        for title, code in blocks(page).items():
            (tmp_path / title).write_text(code, encoding="utf-8")
        return tmp_path

    yield write
    for module in ("mine", "columns"):
        sys.modules.pop(module, None)


def command_of(page: str, *words: str) -> list[str]:
    (found,) = [c for p, c in commands() if p == f"docs/{page}" and all(w in c for w in words)]
    return shlex.split(found, comments=True)[1:]


def run(folder: Path, title: str) -> None:
    exec(compile((folder / title).read_text(encoding="utf-8"), title, "exec"), {"__name__": "__main__"})


def test_the_page_on_policies_works_as_written(at, capsys):
    folder = at("how-to/own-policy.md")
    run(folder, "records.py")
    assert main([*command_of("how-to/own-policy.md", "--policy"), "--steps", "25"]) == 0
    steps = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert len(steps) == 25 and steps[-1]["reward"] > 2 * steps[0]["reward"]
    run(folder, "train.py")
    assert float(re.search(r"tensor\(([\d.]+)", capsys.readouterr().out)[1]) > 0.1


def test_the_page_on_rewards_works_as_written(at, capsys):
    folder = at("how-to/own-reward.md")
    save_reader(Reader(READERS["smoke"]), folder / "small")
    more = ["--reward", "columns:same_length", "--reward-weight", "1", "--init", "small"]  # not the packaged 11 M
    assert main([*command_of("how-to/own-reward.md", "mine:brief"), *more]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert {"term/brief", "term/same_length", "term/TED"} <= first.keys() and first["term/brief"] < 0
    run(folder, "check.py")
    total = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()}
    assert total["perfect"] > total["cut"] > total["empty"]


def test_the_page_on_data_works_as_written(at, capsys):
    run(at("how-to/own-data.md"), "data.py")
    assert len(capsys.readouterr().out.splitlines()) == len(list((ROOT / "examples").glob("*.png")))
    assert main(command_of("how-to/own-data.md", "data check examples")) == 0


def test_the_tutorial_works_as_written(at, capsys):
    folder = at("tutorial.md")
    run(folder, "confidence.py")
    assert re.search(r"least certain token: \d+%", capsys.readouterr().out)
    run(folder, "read.py")
    assert re.match(r"\d+ bars, \d+ errors repaired", capsys.readouterr().out) and Path("song.musicxml").is_file()


def test_versions_agree():
    version = settings()["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def test_issue_forms_and_workflow_are_what_github_expects():
    github = ROOT / ".github"
    for form in (github / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        asked = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= asked.keys() and all("type" in item for item in asked["body"]), form
    jobs = yaml.safe_load((github / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert any(step.get("run", "").startswith("make test") for step in jobs["test"]["steps"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"nbdev-clean", "nbdev-export", "ruff"}


def test_reading_times():
    assert reading_times.minutes(2500, 300) == 15
    assert reading_times.words_of("Two [words](http://x.org/a/b).") == 2
    assert 300 < reading_times.readme_words() <= 1000
    known = ""
    long = {n for n, size in reading_times.notebooks().items() if reading_times.minutes(*size) > reading_times.LIMIT}
    assert not long - {f"nbs/{n}.ipynb" for n in known.split()}, "split it by idea: a notebook reads in 15 minutes"
