"""The command line: vitomr transcribe | data | train | export | evaluate."""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from vitomr.reading.choices import add_flags, decoding_of


def main(argv: list[str] | None = None) -> int:
    "Run one command; bad input is one line on standard error and exit status 2."
    args = parser().parse_args(argv)
    os.environ.setdefault("VITOMR_SECONDS", "120")  # your own files may take longer than those of a visitor of the app
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as e:
        from vitomr.sandbox import one_line

        print(f"vitomr: {one_line(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vitomr: stopped", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    from vitomr import __version__

    p = argparse.ArgumentParser(prog="vitomr", description="Read pictures of printed music into MusicXML.")
    p.add_argument("--version", action="version", version=f"vitomr {__version__}")
    commands = p.add_subparsers(required=True, metavar="command")
    reading = reading_options()

    t = commands.add_parser(
        "transcribe", parents=[reading], help="pictures, photos and PDFs of printed music to scores"
    )
    t.add_argument("source", type=Path, nargs="+", help="a picture, a PDF, or a folder of them; several of each")
    t.add_argument(
        "-o", "--out", type=Path,
        help="output folder; for one source, the file to write; its suffix (.musicxml, .mxl, .mid, .pdf, .svg, .lmx) is the"
        " format; or - for standard output (default: beside each source)",
    )  # fmt: skip
    t.add_argument("--format", help="formats to write, as in musicxml,mid,pdf (default: musicxml)")
    t.add_argument("--pages", help="pages of each PDF, as in 1-3,7 (default: all)")
    t.add_argument("--jobs", type=int, default=1, help="files to read in parallel, one process each (default: 1)")
    t.add_argument(
        "--words", action=argparse.BooleanOptionalAction,
        help="also read title, names, tempo words and lyrics (default: if the OCR of vitomr[words] is installed)",
    )  # fmt: skip
    t.set_defaults(run=transcribe)

    d = commands.add_parser("data", help="training data").add_subparsers(required=True, metavar="what")
    b = d.add_parser("build", help="engrave excerpts and write shards; continues if called again")
    b.add_argument("--source", required=True, help="music21, or a zip or folder of MusicXML files")
    b.add_argument("--out", type=Path, required=True)
    b.add_argument("--count", type=int, required=True, help="number of excerpts")
    b.add_argument("--split", default="train", choices=("train", "dev", "test"))
    b.add_argument("--seed", type=int, default=0)
    b.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    b.add_argument("--mix", choices=("broad", "wide", "as-written"), help="broad: also transpose, prefer rare bars, add"
                   " reductions and neighbouring systems; wide: the same, with lines of up to 8 bars, long bars and beams"
                   " between the staves; as-written: none of these (default: broad for train, else as-written)")  # fmt: skip
    b.add_argument("--piano", type=float, metavar="SHARE", help="share of excerpts with two staves (default: 0.667)")
    b.add_argument("--reduced", type=float, metavar="SHARE", help="share of those reduced to two staves from scores of"
                   " three or more voices without piano (default: as the mix says)")  # fmt: skip
    b.add_argument("--hands", type=float, metavar="SHARE", help="share of those with the left hand of another song")
    b.add_argument("--lines", type=float, metavar="SHARE", help="share of those with lines of three or four songs")
    b.add_argument("--doubled", type=float, metavar="SHARE", help="share of all with doubled note values")
    b.add_argument("--engraver", default="verovio", help="verovio (default), or musescore or lilypond if installed")
    b.set_defaults(run=data_build)

    d.add_parser("list", help="list known datasets and where to get them").set_defaults(run=data_list)
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("path", help="a dataset: a folder, a zip or JSON file, or music21")
    known.add_argument("--kind", help="layout, if it cannot be recognised; see vitomr data list")
    known.add_argument("--split", help="train, dev or test (default: all)")
    i = d.add_parser("inspect", parents=[known], help="write a contact sheet of some items as PNG")
    i.add_argument("-o", "--out", type=Path, required=True, help="the PNG to write")
    i.add_argument("--count", type=int, default=24, help="number of items (default: 24)")
    i.add_argument("--seed", type=int, default=0, help="which items are chosen (default: 0)")
    i.set_defaults(run=data_inspect)
    s = d.add_parser("stats", parents=[known], help="print sizes, lengths and token frequencies")
    s.add_argument("-o", "--out", type=Path, help="a folder for plots")
    s.set_defaults(run=data_stats)
    c = d.add_parser("check", parents=[known], help="name each broken file; exit status 1 if there are any")
    c.set_defaults(run=data_check)
    q = d.add_parser("questions", help="write pictures with questions and exact answers, as JSON lines")
    q.add_argument("--of", choices=("shapes", "music"), required=True, help="drawn shapes, or engraved systems of --source")
    q.add_argument("--task", default="counting", help="counting, grounding, detection, ocr (music only); or several, as in"
                   " counting,grounding")  # fmt: skip
    q.add_argument("--source", help="for music: a zip or folder of MusicXML files, or music21")
    q.add_argument("--split", default="train", choices=("train", "dev", "test"), help="for music: which songs")
    q.add_argument("--count", type=int, required=True, help="number of questions")
    q.add_argument("--seed", type=int, default=0)
    q.add_argument("-o", "--out", type=Path, required=True, help="the .jsonl file; pictures are written beside it")
    q.set_defaults(run=data_questions)

    g = d.add_parser("download", help="download a dataset by name; resumes if interrupted")
    g.add_argument("name", help="name, as in vitomr data list")
    g.add_argument("--out", type=Path, required=True, help="folder; the dataset is written below it, under its name")
    g.add_argument("--url", help="alternative address of the same archive")
    g.set_defaults(run=data_download)

    r = commands.add_parser("train", help="train the model of a chapter; resumes if interrupted")
    r.add_argument("chapter", nargs="?", default="decoder", help="decoder (a reader, when left out), mae, grpo, audio, vlm or tasks")
    r.add_argument("--preset", default="tiny", help="smoke, tiny or base; for grpo also notes; for audio smoke,"
                   " chorales or one-round; for vlm smoke or tiny")  # fmt: skip
    r.add_argument(
        "--data", type=Path, required=True, action="append",
        help="a folder of shards, or several: --data A --data B; for mae also folders of pictures; for grpo also one"
        " dataset (a folder of png and lmx, JSON records), or with --set target=consensus one folder of scans; for vlm,"
        " tasks, and with a --policy that answers questions, questions as .json or .jsonl",
    )  # fmt: skip
    r.add_argument("--out", type=Path, required=True, help="the run folder")
    r.add_argument("--steps", type=int, help="number of updates (default: the preset's)")
    r.add_argument("--lr", type=float, help="peak learning rate (default: the preset's)")
    r.add_argument("--seed", type=int, help="seed of data order, augmentation and initial weights (default: the preset's)")
    r.add_argument("--init", type=Path, help="a weights folder to start from")
    r.add_argument("--encoder-layers", type=int,
                   help="decoder: encoder layers; layers that --init lacks start as the identity")  # fmt: skip
    r.add_argument("--staff-space", type=float, help="decoder: pixels per staff space of its input")
    r.add_argument("--encoder", type=Path, help="decoder: pretrained encoder weights, as written by vitomr train mae")
    r.add_argument("--tuned", type=int, help="decoder: number of upper encoder layers to train, 0 for none (default: all)")
    r.add_argument("--layer-decay", type=float, help="decoder: learning rate of an encoder layer relative to the layer above")
    r.add_argument("--accumulate", type=int, help="decoder: batches per update")
    r.add_argument("--budget", type=int, help="decoder: patches and tokens per batch; 40000 take 5 GB of GPU memory")
    r.add_argument("--workers", type=int, help="decoder: processes that prepare batches")
    r.add_argument("--scheduled", action="store_true", help="decoder: scheduled sampling")
    r.add_argument("--degradation", help="decoder: clean, light, scan, photo or old; mix or wide: shares of several")
    r.add_argument("--dev", type=Path, help="decoder: a folder of shards to evaluate on during training")
    r.add_argument("--patience", type=int, help="decoder: stop after this many evaluations without improvement")
    r.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of grpo; can be repeated")
    r.add_argument("--reward", action="append", metavar="NAME", help="grpo: vitomr, notes, acai-code, or your own as"
                   " module:function; several times for several")  # fmt: skip
    r.add_argument("--reward-weight", action="append", type=float, metavar="W", help="grpo: of each --reward, in order")
    r.add_argument("--policy", help="grpo: a vision-language model, as hub id or folder; or your own policy, as"
                   " module:factory, with --reward")  # fmt: skip
    r.add_argument("--tracker", help="grpo: trackio, wandb, tensorboard or another of accelerate, or your"
                   " own as module:Class, besides history.jsonl")  # fmt: skip
    r.set_defaults(run=train)

    x = commands.add_parser("export", help="write the averaged weights of a run, finished or not")
    x.add_argument("--run", dest="run_dir", type=Path, required=True, help="a run folder")
    x.add_argument("--out", type=Path, required=True, help="a weights folder")
    x.add_argument("--mean-with", type=Path, action="append", default=[], metavar="FOLDER",
                   help="decoder: average with these weights, for example those of --init; repeat for more or for more weight")  # fmt: skip
    x.set_defaults(run=export)

    e = commands.add_parser("evaluate", parents=[reading], help="error rates of a model, with confidence intervals")
    e.add_argument("--data", required=True, help="a dataset (see vitomr data list), or readings written by --json")
    e.add_argument("--layout", help="layout, if it cannot be recognised")
    e.add_argument("--split", help="train, dev or test (default: all)")
    e.add_argument("--bars", default="3-5", help="excerpt lengths in bars, as in 3-5 (shards only)")
    e.add_argument("--limit", type=int, help="maximum number of pieces (default: 200 of each kind for shards, else all)")
    e.add_argument("--degradation", default="clean", help="degradation presets, as in clean,scan,photo (shards only)")
    e.add_argument("--figures", help="which figures, as in SER,TEDn (default: all)")
    e.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    e.add_argument("--json", type=Path, help="also write all readings to this file")
    e.add_argument("--plots", type=Path, help="folder for plots of the errors")
    e.add_argument("--task", choices=("counting", "grounding", "detection", "ocr", "answer", "all"),
                   help="instead: answer the questions of this task in --data (.json or .jsonl)")  # fmt: skip
    e.add_argument("--policy", help="with --task: a vision-language model, as hub id or folder (default: the reader)")
    e.add_argument("--predictions", type=Path, help="with --task: also write all answers to this file, as JSON lines")
    e.set_defaults(run=evaluate)
    return p


def reading_options() -> argparse.ArgumentParser:
    "Which weights, and how tokens are chosen: the same for every command."
    r = argparse.ArgumentParser(add_help=False)
    r.add_argument("--weights", help="a weights folder or hub id (default: the packaged weights)")
    r.add_argument("--int8", action="store_true", help="eight-bit weights, on the CPU")
    r.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)")
    add_flags(r)
    return r


def transcribe(args) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one token at a time gains nothing from threads
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: expected 1 or more")
    how = decoding_of(args)
    _check_device(args)
    outs, is_one = _outputs(args)
    options = {"weights": args.weights, "int8": args.int8, "device": args.device, "pages": args.pages, "how": how}
    options["words"], missing = args.words, _missing_words(args.words)
    if is_one:
        said = _transcribe_file(*outs.popitem(), **options, is_watched=True)
        print(said, file=sys.stderr if _is_stdout(args.out) else sys.stdout)
        status = 0
    else:
        if args.weights is None or Path(args.weights).is_dir():
            _reader(args.weights, args.int8, args.device)  # weights that cannot be read end here, not once a file
        status = _transcribe_all(outs, args.jobs, options)
    if missing:
        print(f"vitomr: {missing}", file=sys.stderr)
    return status


def _is_stdout(out: Path | None) -> bool:
    return out is not None and str(out) == "-"


def _check_device(args) -> None:
    "Raises ValueError for a device that there cannot be."
    if args.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device!r}: expected cpu, cuda or cuda:0, cuda:1 ...")
    if args.int8 and args.device not in (None, "cpu"):
        raise ValueError(f"--int8 with --device {args.device}: eight bits are for the CPU; leave one of them out")


def _outputs(args) -> tuple[dict[Path, list[Path]], bool]:  # file → what it is written to; is there one only
    "Where everything goes, checked before anything is read. Raises ValueError or OSError in one line."
    from vitomr.page.documents import files_in

    out = args.out
    is_file = out is not None and not _is_stdout(out) and args.format is None and bool(out.suffix) and not out.is_dir()
    is_one = is_file or _is_stdout(out)
    if is_one and (len(args.source) > 1 or args.source[0].is_dir()):
        raise ValueError(f"-o {out.name} names one file; for several sources give a folder, and --format")
    formats = _formats([out.suffix] if is_file else (args.format or "musicxml").split(","))
    if _is_stdout(out) and len(formats) > 1:
        raise ValueError(f"-o - takes one format; {len(formats)} were asked for")
    if _is_stdout(out):
        return {args.source[0]: [Path("-" + formats[0])]}, True
    outs: dict[Path, list[Path]] = {}
    for path in files_in(args.source):
        folder = path.parent if out is None else out
        names = {o.with_suffix("") for written in outs.values() for o in written}
        stem = folder / (path.stem if folder / path.stem not in names else path.name.replace(".", "-"))
        outs[path] = [out] if is_file else [stem.parent / (stem.name + f) for f in formats]
        if clash := next((o for o in outs[path] if o == path), None):
            raise ValueError(f"{clash.name} would be overwritten by what is read of it; give another folder with -o")
    for written in outs.values():
        for o in written:
            _check_writable(o)
    return outs, is_one or (out is None and len(outs) == 1)


def _check_writable(out: Path) -> None:
    "Raises OSError when a file cannot be written there."
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; name a file in it, or give --format")
    folder = next(p for p in out.absolute().parents if p.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{out} cannot be written: {folder} is a file")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise OSError(f"{out} cannot be written: {e.strerror or type(e).__name__} in {folder}") from None


def _missing_words(asked: bool | None) -> str | None:
    "What is missing where words cannot be read. Raises ValueError where they were asked for."
    from vitomr.page.words import MISSING, WordsError, can_read_words

    if asked is False or can_read_words():
        return None
    if asked:
        raise WordsError(MISSING)
    return MISSING


def _formats(names: list[str]) -> list[str]:
    "Suffixes of what to write. Raises ValueError."
    from vitomr.notation.finish import SUFFIXES

    formats = ["." + name.strip().lstrip(".").lower() for name in names]
    for f in formats:
        if f not in SUFFIXES:
            raise ValueError(f"cannot write {f}; choose from {', '.join(SUFFIXES)}")
    return list(dict.fromkeys(formats))


@cache
def _reader(weights: str | None, int8: bool, device: str | None):
    "The reader of this process. Raises ValueError for a device that this machine does not have."
    import torch

    from vitomr.transcribe import Transcriber

    if device and device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: this machine has {_count(torch.cuda.device_count(), 'CUDA device')}")
    return Transcriber.from_pretrained(weights, int8=int8, device=device)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


_stop = None  # of a worker: set when a person stops the program


def _begin_work(stop) -> None:
    "Leave it to the main process to be stopped; it says so to all."
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _transcribe_file(
    path: Path, outs: list[Path], *, weights, int8: bool, device, pages: str | None, how, words: bool | None,
    is_watched: bool = False,
) -> str:  # fmt: skip
    "Read one file, write all formats, and say what was found. Raises ValueError or OSError in one line."
    news_of = _reader(weights, int8, device).read(path, pages=pages, how=how, words=words)
    for news in _watched(path, pages, news_of) if is_watched else news_of:  # noqa: B007, the last one holds all
        if _stop is not None and _stop.is_set():
            raise KeyboardInterrupt
    reading = news.document
    for out in outs:
        if out.name.startswith("-.") and out.parent == Path():  # standard output
            sys.stdout.buffer.write(reading.to_bytes(out.suffix))
            sys.stdout.buffer.flush()
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            reading.save(out)
    faults = sum(1 for p in reading.pages if p.fault)
    found = {"page": len(reading.pages), "system": len(reading.systems), "bar": reading.n_bars}
    told = f"{', '.join(_count(n, what) for what, n in found.items())}, {_count(reading.n_minor, 'error')} repaired"
    where = path.name if outs[0].name.startswith("-.") else ", ".join(map(str, outs))
    return f"{where}: {told}" + (f"; {_count(faults, 'page')} without music found" if faults else "")


def _watched(path: Path, pages: str | None, news_of):
    "The news of a reading; a terminal sees how far it is."
    if not sys.stderr.isatty():
        yield from news_of
        return
    import time

    from vitomr.page.documents import n_pages, page_numbers
    from vitomr.progress import Pace, how_far

    pace, start, due = Pace(len(page_numbers(pages, n_pages(path)))), time.monotonic(), 0.0
    try:
        for news in news_of:
            pace.hear(news)
            now = time.monotonic()
            if now >= due and news.kind != "done":
                print(f"\r\033[K{how_far(pace, now - start)[:100]}", end="", file=sys.stderr, flush=True)
                due = now + 0.5
            yield news
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _transcribe_all(outs: dict[Path, list[Path]], n_jobs: int, options: dict) -> int:
    "Read all files; one that fails is told and passed over. Exit status 1 when any failed."
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from tqdm import tqdm

    n_failed, context = 0, multiprocessing.get_context("spawn")
    stop = context.Event()
    with (
        ProcessPoolExecutor(min(n_jobs, len(outs)), context, initializer=_begin_work, initargs=(stop,)) as pool,
        tqdm(total=len(outs), unit="file", mininterval=1, delay=2, leave=False) as bar,
    ):
        jobs = {pool.submit(_transcribe_file, p, o, **options): p for p, o in outs.items()}
        try:
            for job in as_completed(jobs):
                n_failed += not _tell(job, jobs[job], bar)
        except KeyboardInterrupt:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    print(f"{len(outs) - n_failed} of {_count(len(outs), 'file')} read" + (f", {n_failed} failed" if n_failed else ""))
    return int(n_failed > 0)


def _tell(job, path: Path, bar) -> bool:
    "Say what became of a file; False when it failed."
    bar.update()
    try:
        bar.write(job.result())
        return True
    except Exception as e:  # whatever is wrong with one file, the others are read
        from vitomr.sandbox import one_line, short_name

        said, name = one_line(e), short_name(path.name)
        bar.write(f"vitomr: {one_line(said if name in said else f'{name}: {said}')}", file=sys.stderr)
        return False


def data_build(args) -> None:
    from tqdm import tqdm

    from vitomr.data.synthesis import MIXES, build

    mix = MIXES[args.mix or ("broad" if args.split == "train" else "as-written")]
    asked = {k: getattr(args, k) for k in ("piano", "reduced", "hands", "lines", "doubled")}
    mix = replace(mix, **{k: v for k, v in asked.items() if v is not None})
    bad: list[str] = []

    def on_fault(song: str, why: str) -> None:
        bad.append(song)
        bar.write(f"{song[:60]}: {why}"[:200], file=sys.stderr)

    with tqdm(total=args.count, unit="excerpt", mininterval=1, delay=0.5) as bar:
        build(
            args.source, args.out, args.count, split=args.split, seed=args.seed, jobs=args.jobs, mix=mix,
            engraver=args.engraver, progress=lambda done, _: bar.update(done - bar.n), on_fault=on_fault,
        )  # fmt: skip
    print(f"{args.out}: {args.count} excerpts" + (f"; songs left out: {len(bad)}" if bad else ""))


def data_list(args) -> None:
    from vitomr.data.download import listing

    print(listing())


def data_inspect(args) -> None:
    from vitomr.data.datasets import contact_sheet, open_dataset

    if args.out.suffix.lower() != ".png":
        raise ValueError(f"cannot write {args.out.name}; the sheet is a .png")
    items = open_dataset(args.path, args.kind, args.split)
    sheet = contact_sheet(items, args.count, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(args.out)
    print(f"{args.out}: {min(args.count, len(items))} of {len(items)} items")


def data_stats(args) -> None:
    from vitomr.data.datasets import describe, open_dataset, save_plots, statistics

    measured = statistics(_progress(open_dataset(args.path, args.kind, args.split)))
    print(describe(measured))
    for path in save_plots(measured, args.out) if args.out else ():
        print(path)


def data_check(args) -> int:
    from vitomr.data.datasets import faults, open_dataset

    items, n_bad = open_dataset(args.path, args.kind, args.split), 0
    for item in _progress(items):
        found = faults(item)
        n_bad += bool(found)
        for fault in found:
            print(fault)
    print(f"{args.path}: {n_bad} of {len(items)} items are bad")
    return int(n_bad > 0)


def data_questions(args) -> None:
    from vitomr.tasks.datasets import Question, save_questions

    tasks = args.task.split(",")
    if args.count < 1:
        raise ValueError(f"--count {args.count}: expected 1 or more")
    if args.of == "shapes":
        from vitomr.tasks.shapes import ShapeQuestions

        questions: Sequence[Question] = ShapeQuestions(tasks, args.count, args.seed)
    else:
        from vitomr.tasks.music import music_questions

        if not args.source:
            raise ValueError("--of music needs --source: a zip or folder of MusicXML files, or music21")
        questions = music_questions(args.source, tasks, args.count, split=args.split, seed=args.seed)
    save_questions(_progress(questions), args.out)
    print(f"{args.out}: {args.count} questions")


def data_download(args) -> None:
    from tqdm import tqdm

    from vitomr.data.download import download

    with tqdm(unit="B", unit_scale=True, mininterval=1, delay=0.5) as bar:

        def progress(have: int, total: int | None) -> None:
            bar.total = total
            bar.update(have - bar.n)

        folder = download(args.name, args.out, url=args.url, progress=progress)
    print(f"{folder}: look at it with vitomr data stats {folder}")


def _progress(items):
    from tqdm import tqdm

    return tqdm(items, unit="item", mininterval=1, delay=2)


def train(args) -> None:
    if args.chapter not in CHAPTERS:
        raise ValueError(f"unknown chapter {args.chapter!r}; choose from {', '.join(CHAPTERS)}")
    if find_spec("accelerate") is None:
        raise ValueError("training needs accelerate, which is not installed; pip install 'vitomr[train]'")
    CHAPTERS[args.chapter](args, on_log=lambda h: print(json.dumps(h), flush=True))


def train_decoder(args, on_log) -> None:
    from vitomr.data.batches import PICTURE_MIXES
    from vitomr.data.degrade import PRESETS
    from vitomr.decoder import TRAINING
    from vitomr.decoder import train as fit_reader

    cfg = _training(TRAINING, args)
    given = {k: getattr(args, k) for k in ("accumulate", "layer_decay", "patience")}
    loop = replace(cfg.loop, **{k: v for k, v in given.items() if v is not None})
    losses = replace(cfg.losses, scheduled=loop.steps) if args.scheduled else cfg.losses
    plan, workers = _fed(cfg, args)
    shape = _shape(cfg.reader, args)
    known = [*PRESETS, *PICTURE_MIXES]
    if args.degradation is not None and args.degradation not in known:
        raise ValueError(f"unknown degradation {args.degradation!r}; choose from {', '.join(known)}")
    cfg = replace(cfg, degradation=args.degradation or cfg.degradation)
    cfg = replace(cfg, reader=shape, loop=loop, losses=losses, tuned=args.tuned, plan=plan, workers=workers)
    options = {"init": args.init, "encoder": args.encoder, "on_log": on_log}
    if args.dev:
        from vitomr.evaluate import dev_error

        options["evaluate"] = dev_error(args.dev, space=cfg.reader.staff_space)
    fit_reader(cfg, args.data, args.out, **options)


def _shape(preset, args):
    "The shape of the reader: that of --init or else the preset's, with what was given instead."
    from vitomr.decoder import load_reader

    shape = load_reader(args.init).cfg if args.init else preset
    layers, space = args.encoder_layers, args.staff_space
    if layers is not None and not 1 <= layers <= 48:
        raise ValueError(f"--encoder-layers {layers}; 1 to 48 are possible")
    if space is not None and not 4 <= space <= 16:  # NaN, too
        raise ValueError(f"--staff-space {space:g}; 4 to 16 px are possible")
    given = {"encoder_layers": layers, "staff_space": space}
    return replace(shape, **{k: v for k, v in given.items() if v is not None})


def _fed(cfg, args) -> tuple:
    "How batches are drawn, and by how many processes."
    for name, least in (("budget", 1000), ("workers", 0)):
        if (given := getattr(args, name)) is not None and given < least:
            raise ValueError(f"--{name} {given}; at least {least} is needed")
    many = args.budget and max(cfg.plan.max_batch, args.budget // 75)  # short excerpts need 75 patches and tokens
    plan = replace(cfg.plan, budget=args.budget, max_batch=many) if args.budget else cfg.plan
    return plan, cfg.workers if args.workers is None else args.workers


def train_mae(args, on_log) -> None:
    from vitomr.mae import TRAINING
    from vitomr.mae import train as fit_mae

    fit_mae(_training(TRAINING, args), args.data, args.out, init=args.init, on_log=on_log)


def train_grpo(args, on_log) -> None:
    from contextlib import nullcontext

    from vitomr.train.runs import Tracker, tracker

    is_own = args.policy and ":" in args.policy and not Path(args.policy).exists()
    run = (_train_policy if is_own else _train_vlm) if args.policy else _train_reader
    with tracker(args.tracker, "vitomr", folder=args.out) if args.tracker else nullcontext(Tracker()) as log:

        def told(line: dict) -> None:
            on_log(line)
            log(line)

        run(args, on_log=told, on_samples=log.samples)


def _train_policy(args, **callbacks) -> None:
    "GRPO of a policy of one's own, on records or on the pictures of a dataset."
    from vitomr.reading.pictures import DatasetPictures
    from vitomr.train.loop import LoopConfig
    from vitomr.train.practice import load_object, load_records, practise
    from vitomr.train.runs import load_into
    from vitomr.train.settings import PracticeConfig, with_settings

    if not args.reward:
        raise ValueError("--policy needs --reward module:function, or the name of a music reward")
    import vitomr.reading.reward  # noqa: F401, registers the rewards for music

    loop = LoopConfig(steps=300, lr=1e-3, warmup=5, ema=0.9, weight_decay=0.0, log_every=1)
    cfg = with_settings(PracticeConfig(loop=loop), {**_loop_settings(args), **dict(_setting(s) for s in args.set)})
    policy = load_object(args.policy)()
    if args.init:
        load_into(policy.get_parameters(), args.init)
    (path,) = _one(args.data, "--data")
    data = load_records(path) if path.suffix.lower() in (".json", ".jsonl") else DatasetPictures(path, space=8.0)
    practise(policy, data, args.reward, reward_weights=args.reward_weight or None, cfg=cfg, run_dir=args.out, **callbacks)


def _train_vlm(args, **callbacks) -> None:
    "GRPO of a vision-language model on questions."
    from vitomr.tasks.vlm import TaskConfig, train
    from vitomr.train.loop import LoopConfig
    from vitomr.train.settings import with_settings

    loop = LoopConfig(steps=300, lr=1e-5, warmup=5, ema=0.9, weight_decay=0.0, log_every=1)
    given = {**_loop_settings(args), **dict(_setting(s) for s in args.set)}
    cfg = with_settings(TaskConfig(loop=loop), given)
    (data,) = _one(args.data, "--data")
    rewards = {"reward_funcs": args.reward, "reward_weights": args.reward_weight or None} if args.reward else {}
    source = str(args.init or args.policy)
    train(cfg, _task_reader(source) or source, data, args.out, **rewards, **callbacks)


def _task_reader(folder: str):
    "The music model with its task tokens, where a folder holds one."
    from vitomr.tasks.music_model import TaskReader, answers_questions

    return TaskReader.load(folder) if answers_questions(folder) else None


def train_tasks(args, on_log) -> None:
    "The music model learns to answer questions; its reading stays as it is."
    from vitomr.tasks.music_model import train_tasks as fit_tasks

    (data,) = _one(args.data, "--data")
    settings = {**_loop_settings(args), **dict(_setting(s) for s in args.set)}
    fit_tasks(data, args.out, init=args.init, settings=settings, on_log=on_log)


def train_vlm(args, on_log) -> None:
    "A supervised start on right answers, of a fresh small model or of a given one."
    from vitomr.tasks.shapes import start_on

    (data,) = _one(args.data, "--data")
    settings = {**_loop_settings(args), **dict(_setting(s) for s in args.set)}
    start_on(data, args.out, preset=args.preset, init=args.init and str(args.init), settings=settings, on_log=on_log)


def _one(given: list, name: str) -> list:
    if len(given) != 1:
        raise ValueError(f"{name} was given {len(given)} times; give it once")
    return given


def _loop_settings(args) -> dict:
    return {k: v for k, v in {"steps": args.steps, "lr": args.lr, "seed": args.seed}.items() if v is not None}


def _train_reader(args, **callbacks) -> None:
    "GRPO of a reader, on shards, on a dataset of one's own, or on scans without a reference."
    from vitomr.grpo import PRACTICE, train, with_settings
    from vitomr.reading.pictures import holds_scans

    cfg, data = with_settings(_training(PRACTICE, args), dict(_setting(s) for s in args.set)), args.data
    rewards = {"reward_funcs": args.reward, "reward_weights": args.reward_weight or None} if args.reward else {}
    is_dataset = any(p.is_file() or any(p.rglob("*.lmx")) for p in data)
    if is_dataset or any(holds_scans(folder) for folder in data):
        data = _other_music(args, cfg, is_dataset)
    train(cfg, data, args.out, init=args.init, **rewards, **callbacks)


def _other_music(args, cfg, is_dataset: bool):
    "A dataset with references, or scans."
    from vitomr.decoder import load_reader
    from vitomr.grpo import PACKAGED
    from vitomr.reading.pictures import DatasetPictures, Scans

    if len(args.data) > 1:
        raise ValueError(f"--data was given {len(args.data)} times, with scans among them; put scans into one folder")
    if is_dataset:
        return DatasetPictures(args.data[0], space=load_reader(args.init or PACKAGED).cfg.staff_space)
    from vitomr.transcribe import Transcriber

    data = Scans(args.data[0], cfg, Transcriber.from_pretrained(args.init))
    for fault in data.faults:
        print(f"vitomr: left out: {fault}", file=sys.stderr)
    return data


def train_audio(args, on_log) -> None:
    "Devices that follow the loudness of parts, by GRPO."
    from vitomr.audio.practice import EXPERIMENTS
    from vitomr.audio.practice import train as practise

    if args.preset not in EXPERIMENTS:
        raise ValueError(f"unknown preset {args.preset!r}; choose from {', '.join(EXPERIMENTS)}")
    (data,), (pairs,) = _one(args.data, "--data"), _one(args.reward or [None], "--reward")
    settings = {**_loop_settings(args), **dict(_setting(s) for s in args.set)}
    about = {"data": data, "pairs": pairs, "init": args.init, "settings": settings}
    practise(EXPERIMENTS[args.preset], args.out, **about, on_log=on_log)


CHAPTERS = {"decoder": train_decoder, "mae": train_mae, "grpo": train_grpo, "audio": train_audio, "vlm": train_vlm}
CHAPTERS["tasks"] = train_tasks


def _setting(text: str) -> tuple:
    "NAME=VALUE; the value is JSON, or else a word."
    name, found, value = text.partition("=")
    if not found:
        raise ValueError(f"--set {text}: expected NAME=VALUE, as in num_generations=16 or top_k=[50,10]")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _training(presets: dict, args):
    "A preset with what was given instead."
    if args.preset not in presets:
        raise ValueError(f"unknown preset {args.preset!r}; choose from {', '.join(presets)}")
    cfg = presets[args.preset]
    given = {"steps": args.steps, "lr": args.lr, "seed": args.seed}
    return replace(cfg, loop=replace(cfg.loop, **{k: v for k, v in given.items() if v is not None}))


def export(args) -> None:
    from vitomr import decoder, mae

    if not mae.is_mae_run(args.run_dir):
        model = decoder.export_run(args.run_dir, args.out, args.mean_with)
    elif args.mean_with:
        raise ValueError(f"{args.run_dir} is a run of an MAE; --mean-with is for readers")
    else:
        model = mae.export_run(args.run_dir, args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


def evaluate_task(args) -> None:
    "Answers to questions, and the figures of each task."
    from vitomr.tasks.datasets import load_questions
    from vitomr.tasks.evaluate import answered, report, save_answers

    questions = [q for q in load_questions(args.data) if args.task in (q.task, "all")][: args.limit]
    if args.policy:
        from vitomr.tasks.vlm import load_vlm

        policy = _task_reader(args.policy) or load_vlm(args.policy)
    else:
        from vitomr.tasks.music import MusicAnswers

        policy = MusicAnswers.from_pretrained(args.weights)
    if not questions:
        raise ValueError(f"{args.data}: no question of the task {args.task}")
    rows = list(_progress(answered(policy, questions, temperature=args.temperature, max_actions=args.max_tokens)))
    if args.predictions:
        save_answers(rows, args.predictions)
    print(report(rows))


def evaluate(args) -> None:
    if args.task:
        return evaluate_task(args)
    if args.policy or args.predictions:
        raise ValueError("--policy and --predictions go with --task; the reader's readings are kept by --json")
    from vitomr.evaluate import FIGURES, load_readings, plot_all, read_pairs, report, save_readings

    names = args.figures.split(",") if args.figures else list(FIGURES)
    if unknown := [n for n in names if n not in FIGURES]:
        raise ValueError(f"unknown figure {unknown[0]!r}; choose from {', '.join(FIGURES)}")
    if Path(args.data).suffix.lower() == ".json" and not args.layout:
        readings = load_readings(args.data)
    else:
        options = {"layout": args.layout, "split": args.split, "limit": args.limit, "bars": _range(args.bars)}
        options |= {"degradations": args.degradation.split(","), "how": decoding_of(args)}
        _check_device(args)
        reader = _reader(args.weights, args.int8, args.device)
        readings = list(_progress(read_pairs(reader, args.data, **options)))
    if args.json:
        save_readings(readings, args.json)
    print(report(readings, names, markdown=args.markdown))
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        plot_all(readings).savefig(args.plots / "errors.png", dpi=150)
        print(args.plots / "errors.png")


def _range(text: str) -> range:
    low, _, high = text.partition("-")
    if not (low.isdigit() and (high.isdigit() or not high) and int(low) <= int(high or low)):
        raise ValueError(f"--bars {text}: expected a number or a range as in 3-5")
    return range(int(low), int(high or low) + 1)


if __name__ == "__main__":
    sys.exit(main())
