"""The command line: vitomr transcribe | data | train | export | evaluate."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    "Run one command; bad input is one line on standard error and exit status 2."
    args = parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as e:
        print(f"vitomr: {str(e).splitlines()[0] if str(e) else type(e).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vitomr: stopped", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="vitomr", description="Read pictures of printed music into MusicXML.")
    commands = p.add_subparsers(required=True, metavar="command")

    t = commands.add_parser("transcribe", help="a picture of one line of music to a score")
    t.add_argument("picture", type=Path)
    t.add_argument(
        "-o", "--out", type=Path, required=True, help="what to write: .musicxml, .mxl, .mid, .lmx or .svg by its suffix"
    )
    t.add_argument("--weights", help="a weights folder or hub id; the packaged ones when left out")
    t.set_defaults(run=transcribe)

    d = commands.add_parser("data", help="training data").add_subparsers(required=True, metavar="what")
    b = d.add_parser("build", help="synthesise excerpts into shards; stopped and called again, it goes on")
    b.add_argument("--source", required=True, help="music21, a zip of MusicXML files, or a folder of them")
    b.add_argument("--out", type=Path, required=True)
    b.add_argument("--count", type=int, required=True, help="how many excerpts")
    b.add_argument("--split", default="train", choices=("train", "dev", "test"))
    b.add_argument("--seed", type=int, default=0)
    b.add_argument("--jobs", type=int, default=1, help="processes")
    b.set_defaults(run=data_build)

    d.add_parser("list", help="the datasets that are known, and where to get them").set_defaults(run=data_list)
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("path", help="a dataset: a folder, a zip or JSON file, or music21")
    known.add_argument("--kind", help="its layout, where the folder does not show it; see vitomr data list")
    known.add_argument("--split", help="train, dev or test; all when left out")
    i = d.add_parser("inspect", parents=[known], help="a contact sheet of some items, as PNG")
    i.add_argument("-o", "--out", type=Path, required=True, help="the PNG to write")
    i.add_argument("--count", type=int, default=24, help="how many items")
    i.add_argument("--seed", type=int, default=0, help="another seed draws other items")
    i.set_defaults(run=data_inspect)
    s = d.add_parser("stats", parents=[known], help="sizes, lengths and token frequencies")
    s.add_argument("-o", "--out", type=Path, help="a folder for plots")
    s.set_defaults(run=data_stats)
    c = d.add_parser("check", parents=[known], help="name each file that is broken; exit status 1 when there are any")
    c.set_defaults(run=data_check)
    g = d.add_parser("download", help="fetch a dataset by name; a download that was cut off goes on")
    g.add_argument("name", help="as in vitomr data list")
    g.add_argument("--out", type=Path, required=True, help="a folder; the dataset lies in it under its name")
    g.add_argument("--url", help="another address of the same archive")
    g.set_defaults(run=data_download)

    r = commands.add_parser("train", help="train a reader; goes on where it stopped")
    r.add_argument("--preset", default="tiny", help="smoke, tiny or base")
    r.add_argument("--data", type=Path, required=True, help="a folder of shards")
    r.add_argument("--out", type=Path, required=True, help="the run folder")
    r.add_argument("--steps", type=int, help="updates, instead of the preset's")
    r.add_argument("--lr", type=float, help="peak learning rate, instead of the preset's")
    r.add_argument("--seed", type=int, help="of order, pictures and fresh weights, instead of the preset's")
    r.add_argument("--init", type=Path, help="a weights folder to start from")
    r.set_defaults(run=train)

    x = commands.add_parser("export", help="the averaged weights of a run, finished or not")
    x.add_argument("--run", dest="run_dir", type=Path, required=True, help="a run folder")
    x.add_argument("--out", type=Path, required=True, help="a weights folder")
    x.set_defaults(run=export)

    e = commands.add_parser("evaluate", help="symbol error rate of a reader")
    e.add_argument("--data", type=Path, required=True, help="a folder of shards, or of NAME.png with NAME.lmx")
    e.add_argument("--weights", help="a weights folder or hub id; the packaged ones when left out")
    e.add_argument("--bars", default="3-5", help="lengths of the excerpts, as in 3-5 (shards only)")
    e.add_argument("--limit", type=int, default=200, help="excerpts of each kind at most (shards only)")
    e.add_argument("--degradation", default="clean", help="clean, light, scan or photo (shards only)")
    e.add_argument("--json", type=Path, help="also write every reading here")
    e.set_defaults(run=evaluate)
    return p


def transcribe(args) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one token at a time gains nothing from threads
    from vitomr.transcribe import SUFFIXES, Transcriber

    if args.out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {args.out.name}; its suffix must be one of {', '.join(SUFFIXES)}")
    reading = Transcriber.from_pretrained(args.weights).transcribe(args.picture)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    reading.save(args.out)
    mended = reading.analysis.n_minor
    print(f"{args.out}: {reading.tokens.count('measure')} bars, {len(reading.tokens)} tokens, {mended} mended")


def data_build(args) -> None:
    from tqdm import tqdm

    from vitomr.data.synthesis import build

    with tqdm(total=args.count, unit="excerpt", mininterval=1, delay=0.5) as bar:
        build(
            args.source, args.out, args.count, split=args.split, seed=args.seed, jobs=args.jobs,
            progress=lambda done, _: bar.update(done - bar.n),
        )  # fmt: skip
    print(f"{args.out}: {args.count} excerpts")


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
    from vitomr.decoder import TRAINING
    from vitomr.decoder import train as fit_reader

    if args.preset not in TRAINING:
        raise ValueError(f"unknown preset {args.preset!r}; choose from {', '.join(TRAINING)}")
    cfg = TRAINING[args.preset]
    given = {"steps": args.steps, "lr": args.lr, "seed": args.seed}
    cfg = replace(cfg, loop=replace(cfg.loop, **{k: v for k, v in given.items() if v is not None}))
    fit_reader(cfg, args.data, args.out, init=args.init, on_log=lambda h: print(json.dumps(h), flush=True))


def export(args) -> None:
    from vitomr.decoder import export_run

    model = export_run(args.run_dir, args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


def evaluate(args) -> None:
    from vitomr.evaluate import read_pairs, report
    from vitomr.transcribe import Transcriber

    low, _, high = args.bars.partition("-")
    if not (low.isdigit() and (high.isdigit() or not high)):
        raise ValueError(f"--bars {args.bars}: expected a number or a range as in 3-5")
    bars = range(int(low), int(high or low) + 1)
    transcriber = Transcriber.from_pretrained(args.weights)
    readings = list(read_pairs(transcriber, args.data, bars=bars, limit=args.limit, degradation=args.degradation))
    if args.json:
        lines = [{"name": r.name, "kind": r.kind, "pred": " ".join(r.pred), "true": " ".join(r.true)} for r in readings]
        args.json.write_text(json.dumps(lines, indent=1) + "\n")
    print(report(readings))


if __name__ == "__main__":
    sys.exit(main())
