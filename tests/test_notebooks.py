"""Every notebook runs from top to bottom in a process of its own; chapters with parameters run under papermill too."""

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
TIMEOUT = 300  # seconds a notebook

NOTEBOOKS = sorted(
    p for p in NBS.rglob("*.ipynb") if not any(part.startswith(("_", ".")) for part in p.relative_to(NBS).parts)
)
RUN_NB = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
cfg = get_config()
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
sys.exit(not ok)
"""


def name(path: Path) -> str:
    return path.relative_to(NBS).as_posix()


def parameters(path: Path) -> list[str] | None:
    "Names set in the cell tagged `parameters`; None where there is no such cell, or no readable notebook."
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except ValueError:  # test_notebook names it
        return None
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", []):
            body = ast.parse("".join(cell["source"])).body
            targets = [t for o in body if isinstance(o, ast.Assign | ast.AnnAssign)
                       for t in (o.targets if isinstance(o, ast.Assign) else [o.target])]
            return [t.id for t in targets if isinstance(t, ast.Name)]
    return None


def run(*args: str) -> None:
    "Run Python with `args` in the repository root; fail with the end of its output. Leaves no process behind."
    env = os.environ | {"MPLBACKEND": "agg"}
    with subprocess.Popen(
        [sys.executable, *args], cwd=ROOT, env=env, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:
        late = False
        try:
            out, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if late or process.returncode:
        pytest.fail(("" if not late else f"still running after {TIMEOUT} s\n") + out[-8000:], pytrace=False)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook(path):
    run("-c", RUN_NB, str(path))


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if parameters(p) is not None], ids=name)
def test_papermill(path, tmp_path):
    given = []
    for folder in {"run_dir", "runs"} & set(parameters(path)):
        given += ["-r", folder, str(tmp_path / "run")]
    run("-m", "papermill", str(path), str(tmp_path / path.name), "-k", "python3", "--no-progress-bar", *given)
