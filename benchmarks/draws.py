"""What practice could take off at most: readings drawn from a reader against the one it is surest of.

    python benchmarks/draws.py --dev data/dev data/other-dev --draws 12 --work runs/draws --out runs/draws.json

GRPO makes likelier what is better among the readings that are drawn. So for each excerpt --draws readings are drawn
at --temperature, and beside the greedy one these are looked at, by TEDn:
`a draw` the mean over all of them; `likeliest` the one of the highest probability, greedy included; `consensus` the
one that is nearest to all the others, which needs no reference (minimum Bayes risk); `best` the one that is nearest to
the reference.
Where `consensus` is below `greedy`, the reader draws what is right more often than anything else and does not say it:
practice can teach it to. Where only `best` is, it cannot tell which is right, and has to learn to see.
Readings are kept in --work; stopped and called again it goes on.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from grpo_result import change, dev_pictures, fingerprint, tedn_counts

from vitomr.decoder import load_reader
from vitomr.notation.lmx import EOS_ID, decode
from vitomr.notation.metrics import micro_rate
from vitomr.reading.policy import Picture, ReaderPolicy
from vitomr.rewards import consensus
from vitomr.train.policy import Sampling

TOGETHER = 2  # pictures


def drawn(policy: ReaderPolicy, pictures: list[Picture], args, kept: Path) -> list[dict]:
    "Reference, readings (the greedy one last) and their log-probabilities of each picture."
    lines = kept.read_text().splitlines(keepends=True) if kept.exists() else []
    done = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may have been cut off
    done = done[: len(done) // TOGETHER * TOGETHER]  # what is drawn together has one seed
    kept.write_text("".join(json.dumps(line) + "\n" for line in done))
    order = sorted(range(len(pictures)), key=lambda i: len(pictures[i].ids))  # alike in length together
    if [line["reference"] for line in done] != [" ".join(decode(pictures[i].ids)) for i in order[: len(done)]]:
        raise SystemExit(f"{kept} holds readings of other excerpts; delete it or use another --work")
    for at in range(len(done), len(order), TOGETHER):
        now = [pictures[i] for i in order[at : at + TOGETHER]]
        ways = (args.draws, Sampling(args.temperature, max_actions=768)), (1, Sampling(0.0, max_actions=768))
        drawn, surest = (policy.rollout(now, n, how, at).actions for n, how in ways)
        actions = [[*a, *b] for a, b in zip(drawn, surest, strict=True)]
        with torch.no_grad():
            logp = policy.score(now, actions, Sampling()).logp.sum(1).reshape(len(now), -1).tolist()
        for picture, group, p in zip(now, actions, logp, strict=True):
            read = [" ".join(decode([t for t in row if t != EOS_ID])) for row in group]
            done.append({"name": picture.name, "reference": " ".join(decode(picture.ids)), "read": read, "logp": p})
        with kept.open("a") as f:
            f.writelines(json.dumps(line) + "\n" for line in done[at:])
    return done


def costs(line: dict) -> dict[str, tuple[float, int]]:
    "TEDn edits of each kind of reading, and the size of the reference."
    reference, *read = (text.split() for text in (line["reference"], *line["read"]))
    counts = [tedn_counts(tokens, reference) for tokens in read]
    (*own, greedy), size = [edits for edits, _ in counts], counts[0][1]
    return {
        "greedy": (greedy, size),
        "a draw": (float(np.mean(own)), size),
        "likeliest": ([*own, greedy][int(np.argmax(line["logp"]))], size),
        "consensus": (own[consensus(read[:-1])], size),
        "best": (min(*own, greedy), size),
    }


def kept_in(args, folder: Path) -> Path:
    "A file for each reader and each way of asking it."
    asked = f"{args.bars}-{args.limit}-{args.draws}-{args.temperature:g}"
    return args.work / f"{folder.name}-{fingerprint(args.init)}-{asked}.jsonl"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dev", type=Path, nargs="+", required=True, metavar="FOLDER", help="folders of excerpts")
    p.add_argument("--init", type=Path, default=Path("vitomr/weights/tiny"), help="the reader")
    p.add_argument("--draws", type=int, default=12, help="readings of each excerpt")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--bars", default="3-5", help="lengths of the excerpts")
    p.add_argument("--limit", type=int, default=100, help="of excerpts, for each number of staves")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--work", type=Path, required=True, help="folder that keeps the readings")
    p.add_argument("--out", type=Path, required=True, help="JSON to write")
    args = p.parse_args()
    if args.draws < 2 or args.temperature <= 0:
        p.error(f"--draws {args.draws} --temperature {args.temperature}: two draws or more above nought were expected")
    args.degradation = "clean"
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    policy, sets = ReaderPolicy(load_reader(args.init)), {}
    for folder in args.dev:
        pictures = dev_pictures(args, folder)
        lines = drawn(policy, pictures, args, kept_in(args, folder))
        with ProcessPoolExecutor(args.threads) as pool:
            rows = list(pool.map(costs, lines, chunksize=4))
        counts = {kind: [row[kind] for row in rows] for kind in rows[0]}
        found = {kind: micro_rate(*zip(*c, strict=True)) for kind, c in counts.items()}
        sets[folder.name] = {
            "excerpts": len(rows),
            "distinct": float(np.mean([len(set(line["read"][:-1])) for line in lines])),
            "TEDn": {kind: {"value": f.value, "low": f.low, "high": f.high} for kind, f in found.items()},
            "against greedy": {kind: change(c, counts["greedy"]) for kind, c in counts.items() if kind != "greedy"},
        }
        print(f"{folder.name}: {len(rows)} excerpts, {sets[folder.name]['distinct']:.1f} different readings of each")
        for kind, f in found.items():
            d = sets[folder.name]["against greedy"].get(kind)
            said = f"{d['value']:+7.1%} ({d['low']:+.1%} to {d['high']:+.1%})" if d else ""
            print(f"  {kind:10} {100 * f.value:5.1f} %  {said}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"draws": args.draws, "temperature": args.temperature, "bars": args.bars}
    args.out.write_text(json.dumps(about | {"sets": sets}, indent=1) + "\n")


if __name__ == "__main__":
    main()
