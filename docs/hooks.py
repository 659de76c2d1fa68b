"""What mkdocs needs to know of this repository: notebooks as pages, links that work in both places, math as MathML."""

import html
import json
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "DESIGN.md", "SECURITY.md", "examples/README.md")
BESIDE = ("nbs/**/*.ipynb", "lab/**/*.md", "lab/**/*.png", "assets/*.png", "assets/*.jpg", "examples/*.png")
ROOMS = ("notation", "page", "train", "data", "nn", "reading", "audio", "tasks")  # as in DESIGN.md
LAB = [
    {"Lab": "lab/README.md"},
    {"Training runs": "lab/training.md"},
    {"GRPO trials": "lab/practice/README.md"},
    {"GRPO, all tables": "lab/practice/trials.md"},
]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
HREF = re.compile(r'(?<= href=")(?!\w+:|#|/)([^"#]+)(#[^"]*)?(?=")')
CELL = re.compile(r'(?=<div class="jp-Cell jp-(?:MarkdownCell|CodeCell[^>]*>\s*<div class="jp-Cell ))')
NO_MATH = re.compile(r"(<(pre|code|script|style|svg)\b.*?</\2>)", re.S)
OUTSIDE = re.compile(r"<script\b(?:(?!</script>).)*?https?://.*?</script>", re.S)


def beside() -> list[str]:
    "Files outside docs/ that the site shows, as paths of the repository."
    found = {p for pattern in (*PAGES, *BESIDE) for p in ROOT.glob(pattern) if p.is_file()}
    names = sorted(p.relative_to(ROOT).as_posix() for p in found)
    return [name for name in names if not any(part.startswith(("_", ".")) for part in Path(name).parts)]


def heading(name: str) -> str:
    "The first heading of a notebook."
    cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
    text = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return text.splitlines()[0].lstrip("# ")


def chapters() -> list:
    "The navigation of the notebooks: numbered chapters, one section for each folder, then the single rooms."
    names = [Path(name).relative_to("nbs") for name in beside() if name.endswith(".ipynb")]
    numbered = [p for p in names if p.name[0].isdigit()]
    rooms = sorted({p.parts[0] for p in names if len(p.parts) > 1}, key=lambda room: (*ROOMS, room).index(room))
    found = [{f"{p.name[:2]} {heading(f'nbs/{p}')}": f"nbs/{p}"} for p in numbered]
    for room in rooms:
        found.append({f"{room}/": [{p.stem: f"nbs/{p}"} for p in names if len(p.parts) > 1 and p.parts[0] == room]})
    single = [{p.stem: f"nbs/{p}"} for p in names if len(p.parts) == 1 and p not in numbered]
    return [*found, {"single notebooks": single}]


def on_config(config):
    for section in config.nav:
        if "Chapters" in section:
            section["Chapters"] = [*section["Chapters"], *chapters(), *LAB]
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files, config):
    for name in beside():
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def site_path(target: str, page_path: str, files) -> str | None:
    "The source path in the site of a link on a page; None for a file that the site does not show."
    here = page_path if (ROOT / page_path).is_file() else f"docs/{page_path}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    path = {"README.md": "docs/index.md"}.get(path, path)
    path = path.removeprefix("docs/")
    return path if files.get_file_from_path(path) else None


def in_repository(target: str, page_path: str, config) -> str:
    "The address of a file that the site does not show."
    here = page_path if (ROOT / page_path).is_file() else f"docs/{page_path}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    return f"{config.extra['repository']}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"


def on_page_markdown(markdown, page, config, files):
    "Links are written for the repository; the site has the same files at other places."
    here = page.file.src_uri

    def moved(found):
        target, anchor = found[1], found[2] or ""
        path = site_path(target, here, files)
        if path is None:
            return in_repository(target, here, config) + anchor
        return posixpath.relpath(path, posixpath.dirname(here) or ".") + anchor

    return LINK.sub(moved, markdown)


def on_page_content(content, page, config, files):
    "Notebooks: links to notebooks, equations as MathML, and no script from elsewhere."
    if not page.file.src_uri.endswith(".ipynb"):
        return content

    def moved(found):
        path = site_path(found[1], page.file.src_uri, files)
        if path is None:
            return in_repository(found[1], page.file.src_uri, config) + (found[2] or "")
        return files.get_file_from_path(path).url_relative_to(page.file) + (found[2] or "")

    content = shown(HREF.sub(moved, OUTSIDE.sub("", content)))
    parts, at = [], 0
    for kept in NO_MATH.finditer(content):
        parts += [equations(content[at : kept.start()]), kept[0]]
        at = kept.end()
    return "".join([*parts, equations(content[at:])])


def shown(content: str) -> str:
    "A notebook without its cells for nbdev alone; imports are folded."
    first, *cells = CELL.split(content)
    kept = [first]
    for i, cell in enumerate(cells):
        text = re.sub(r"<[^>]+>", "", cell.partition("<pre>")[2].partition("</pre>")[0]).strip()
        if re.match(r"#\| *(default_exp|hide)\b", text) and i + 1 < len(cells):
            continue
        if re.match(r"(#\| *\w+\s+)*(import|from) ", text) and "jp-OutputArea" not in cell and i + 1 < len(cells):
            cell = f"<details class=imports><summary>Imports</summary>{cell}</details>"
        kept.append(cell)
    return "".join(kept)


def equations(text: str) -> str:
    "LaTeX between dollars as MathML, which browsers draw themselves."
    text = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(html.unescape(m[1].strip()), display="block"), text, flags=re.S)
    return re.sub(r"(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", lambda m: convert(html.unescape(m[1])), text)
