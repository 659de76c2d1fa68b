"""Questions about engraved music: exact answers, and what the reader and the picture say."""

import copy
import json

import cv2
import numpy as np
import pytest
import torch

from vitomr.cli import main
from vitomr.notation.engrave import engrave
from vitomr.notation.score import ScoreError, as_score
from vitomr.tasks.datasets import Question, load_questions
from vitomr.tasks.evaluate import Answered, answered, figures_of, load_answers, report, save_answers
from vitomr.tasks.music import (
    COUNTED,
    DrawnSystem,
    MusicAnswers,
    bar_boxes,
    bars_in_picture,
    draw_system,
    music_question,
    music_questions,
)
from vitomr.tasks.music_model import Form, TaskReader, _normal, answer_ids, answer_of_ids, prompt_of
from vitomr.tasks.rewards import boxes_of, iou, task_reward
from vitomr.tasks.vlm import TaskConfig, supervised_start, train
from vitomr.train.loop import LoopConfig
from vitomr.train.policy import Sampling, SupervisedPolicy, TokenPolicy
from vitomr.train.runs import WeightsError, read_history
from vitomr.train.schedules import Schedule


@pytest.fixture(scope="module")
def systems(excerpts, piano):
    rng = np.random.default_rng(0)
    return [draw_system(piano, rng, "piano"), *(draw_system(e, rng, f"bach:{i}") for i, e in enumerate(excerpts[:8]))]


def test_boxes_hold_the_notes_of_their_bars(systems, excerpts, piano):
    "Each notehead lies in the box of its bar, by the id that the engraver keeps; bars do not overlap."
    for element, n in ((piano, 2), (excerpts[3], len(excerpts[3].findall("measure")))):
        drawn = engrave(as_score(element))
        boxes = bar_boxes(drawn.svg)
        assert len(boxes) == n and all(a[2] == pytest.approx(b[0], abs=1) for a, b in zip(boxes, boxes[1:]))
        pieces = drawn.svg.split('class="measure"')[1:]
        for name, (x, _) in drawn.positions.items():
            (bar,) = [i for i, piece in enumerate(pieces) if f'id="{name}"' in piece]
            assert boxes[bar][0] < x < boxes[bar][2]
        h, w = drawn.img.shape
        assert all(0 <= x1 < x2 <= w and 0 <= y1 < y2 <= h for x1, y1, x2, y2 in boxes)
        row = drawn.img[round(boxes[0][1]), round(boxes[0][0]) + 2 : round(boxes[-1][2]) - 2]
        assert (row < 200).mean() > 0.9, "the upper edge is the first staff line"


def test_two_staves_have_one_box(systems):
    piano = systems[0]
    assert piano.n_staves == 2 and piano.boxes[0][3] - piano.boxes[0][1] > 10 * 8
    assert systems[1].n_staves == 1 and systems[1].boxes[0][3] - systems[1].boxes[0][1] == pytest.approx(32, abs=1)


def test_counts_are_those_of_the_score(excerpts, systems):
    for element, system in zip(excerpts, systems[1:]):
        assert COUNTED["bars"](system.tokens) == len(element.findall("measure"))
        assert COUNTED["notes"](system.tokens) == len(element.findall(".//note/pitch"))
    assert [COUNTED[k](systems[0].tokens) for k in COUNTED] == [2, 8 - 1, 2]


def test_questions_have_their_right_answer(systems):
    rng = np.random.default_rng(1)
    for task in ("counting", "grounding", "detection", "ocr"):
        q = music_question(systems[0], task, rng)
        assert q.task == task and task_reward(f"<answer>{q.solution}</answer>", q.solution, task) == 1
    with pytest.raises(ValueError, match="choose from"):
        music_question(systems[0], "singing", rng)


def test_bars_are_found_in_the_picture(systems):
    "Nine systems of one to five bars, one of them with two staves; their number is given."
    found = [iou(a, b) for s in systems for a, b in zip(bars_in_picture(s.img, len(s.boxes), s.n_staves), s.boxes)]
    assert len(found) == sum(len(s.boxes) for s in systems) and np.mean(found) > 0.85
    large = cv2.resize(systems[0].img, None, fx=1.5, fy=1.5)
    boxes = bars_in_picture(large, 2, 2)
    assert len(boxes) == 2 and iou(boxes[0], tuple(1.5 * v for v in systems[0].boxes[0])) > 0.85
    assert bars_in_picture(np.full((60, 60), 255, np.uint8), 3, 1) == []
    assert bars_in_picture(np.zeros((5, 5), np.uint8), 3, 1) == []


class Knows(MusicAnswers):
    "The reader, with the readings that a test gives it: what it answers from them is what is tested."

    def __init__(self, tokens):
        self.tokens = tokens

    def readings(self, states):
        return [list(self.tokens)] * len(states)


def test_answers_follow_from_reading_and_picture(systems):
    system, rng = systems[0], np.random.default_rng(0)
    who = Knows(system.tokens)
    asked = [
        Question(f"How many {k} are there?", f(system.tokens), (system.img,), "counting") for k, f in COUNTED.items()
    ]
    asked += [music_question(system, t, rng) for t in ("grounding", "detection", "ocr")]
    rows = list(answered(who, asked))
    figures = figures_of(rows)
    assert (
        figures["counting"]["accuracy"].value == figures["ocr"]["exact"].value == figures["detection"]["F1"].value == 1
    )
    assert figures["grounding"]["mean IoU"].value > 0.85
    odd = [
        Question("Where is bar 99?", "[1, 2, 3, 4]", (system.img,)),
        Question("Who wrote it?", "Bach", (system.img,)),
    ]
    assert [r.prediction for r in answered(who, odd)] == ["<answer></answer>"] * 2


def test_the_packaged_reader_answers(systems, tmp_path):
    reader = MusicAnswers.from_pretrained()
    system = systems[0]
    asked = [
        Question("How many bars are there?", 2, (system.img,), "counting"),
        music_question(system, "ocr", np.random.default_rng(0)),
    ]
    asked.append(Question("How many bars are there?", 0, (np.full((80, 90), 255, np.uint8),), "counting"))
    rows = list(answered(reader, asked))
    assert [r.prediction for r in rows[::2]] == ["<answer>2</answer>", "<answer>0</answer>"]
    assert figures_of(rows)["ocr"]["1 − error rate"].value > 0.7
    save_answers(rows, tmp_path / "p.jsonl")
    assert load_answers(tmp_path / "p.jsonl") == [Answered(**vars(r) | {"seconds": round(r.seconds, 4)}) for r in rows]
    assert "counting" in report(rows) and "n = 2" in report(rows)
    (tmp_path / "p.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="no predictions"):
        load_answers(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match="no question"):
        report([])


def test_ocr_demonstration_and_evaluation_of_the_reader(tmp_path, capsys):
    "The third demonstration: OCR, with a fresh small vision-language model; then the reader on the same questions."
    pytest.importorskip("transformers", reason="needs vitomr[vlm]")
    data, start, told = tmp_path / "q.jsonl", tmp_path / "start", tmp_path / "p.jsonl"
    words = [
        "data",
        "questions",
        "--of",
        "music",
        "--source",
        "music21",
        "--split",
        "dev",
        "--task",
        "ocr",
        "--count",
        2,
    ]
    run = lambda *w: main([str(x) for x in w])
    assert run(*words, "--out", data) == 0
    assert [q.task for q in load_questions(data)] == ["ocr", "ocr"]
    assert (
        run("train", "vlm", "--preset", "smoke", "--data", data, "--out", start, "--steps", 1, "--set", "batch_size=2")
        == 0
    )
    small = ("--set", "num_generations=2", "--set", "per_device_batch_size=4", "--set", "max_actions=8")
    assert (
        run(
            "train",
            "grpo",
            "--policy",
            start / "weights",
            "--data",
            data,
            "--out",
            tmp_path / "r",
            "--steps",
            1,
            *small,
        )
        == 0
    )
    capsys.readouterr()
    assert run("evaluate", "--task", "ocr", "--data", data, "--predictions", told) == 0
    assert "1 − error rate" in capsys.readouterr().out
    assert json.loads(told.read_text().splitlines()[0])["prediction"].startswith("<answer>measure")
    assert run("evaluate", "--task", "counting", "--data", data) == 2


def test_faults_are_one_line(tmp_path, piano):
    with pytest.raises(ScoreError, match="drawing"):
        bar_boxes("<svg/>")
    (tmp_path / "one.musicxml").write_bytes(b"<score-partwise/>")
    with pytest.raises(ValueError, match="one|no |fewer") as e:
        music_questions(tmp_path, ["ocr"], 3)
    assert "\n" not in str(e.value)
    assert DrawnSystem(np.zeros((1, 1), np.uint8), ("measure",), ()).n_staves == 1


# Task tokens


@pytest.fixture(scope="module")
def asked(systems):
    rng = np.random.default_rng(2)
    some = [systems[0], *systems[1:4]]
    return [music_question(s, t, rng) for s in some for t in ("counting", "grounding", "detection")]


@pytest.fixture
def policy(smoke):
    return TaskReader(copy.deepcopy(smoke))


def test_right_answers_go_to_tokens_and_back(asked):
    for q in asked:
        normal = _normal(q, 8.0)
        ids = answer_ids(q, normal)
        text = answer_of_ids(q, normal, ids).text
        assert ids[-1] == 2 and task_reward(text, q.solution, q.task) > 0.85
        form = Form([prompt_of(q.problem)])
        for t in [*prompt_of(q.problem), *ids]:
            assert form.mask()[0, t], "the rules forbid a right answer"
            form.advance(None)
    with pytest.raises(ValueError, match="no task token"):
        prompt_of("Write the music as LMX.")
    with pytest.raises(ValueError, match="no box"):
        answer_ids(Question("Where is bar 1?", "left", asked[0].images), _normal(asked[0], 8.0))


@pytest.mark.parametrize("how", [Sampling(1.0, 0, 9), Sampling(0.7, 5, 9), Sampling(1.0, 0, 9, 0.7)], ids=str)
def test_task_tokens_sampled_and_scored_agree(policy, asked, how):
    assert isinstance(policy, TokenPolicy) and isinstance(policy, SupervisedPolicy)
    with torch.no_grad():
        policy.model.head.bias[2] = -9.0  # longer answers
    sampled = policy.rollout(asked, 3, how, seed=4)
    scored = policy.score(asked, sampled.actions, how, full=True)
    assert torch.equal(sampled.scored.mask, scored.mask) and scored.mask.any(1).all()
    assert (sampled.scored.logp - scored.logp).abs().max() < 1e-4
    assert (sampled.scored.entropy - scored.entropy).abs().max() < 1e-4
    lengths = [len(a) for g in sampled.actions for a in g]
    assert lengths == scored.mask.sum(1).tolist() and max(lengths) <= 9
    assert [a[-1] != 2 for g in sampled.actions for a in g] == sampled.truncated.tolist()
    alone = policy.score(asked[1:2], sampled.actions[1:2], how).logp
    assert torch.allclose(alone, scored.logp[3:6, : alone.shape[1]], atol=1e-4)
    for q, group in zip(asked, sampled.actions):
        for a in group:
            assert a.text.startswith("<answer>") and (
                q.task == "counting" or len(boxes_of(a.text)) == (len(a) - 1) // 4
            )


def test_what_is_learned_leaves_reading_alone(policy, asked, tmp_path):
    before = {k: v.clone() for k, v in policy.reader.state_dict().items()}
    eyes = {k: v.clone() for k, v in policy.model.encoder.state_dict().items()}
    cfg = LoopConfig(steps=8, lr=3e-3, warmup=1, ema=0.2, log_every=1, bf16=False)
    supervised_start(policy, asked, cfg, tmp_path / "start", batch_size=6)
    lines = read_history(tmp_path / "start")
    assert lines[-1]["ce"] < lines[0]["ce"] - 0.5
    grpo = TaskConfig(
        num_generations=4, per_device_batch_size=8, max_actions=Schedule(9), loop=LoopConfig(steps=2, lr=1e-3, warmup=1)
    )
    train(grpo, policy, asked, tmp_path / "grpo")
    assert all(abs(x["ratio_off"]) < 1e-4 for x in read_history(tmp_path / "grpo"))
    again = TaskReader.load(tmp_path / "grpo" / "weights")
    assert all(torch.equal(v, before[k]) for k, v in again.reader.state_dict().items())
    assert all(torch.equal(v, eyes[k]) for k, v in again.model.encoder.state_dict().items())
    mine, theirs = policy.get_parameters(), again.get_parameters()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    (tmp_path / "grpo" / "weights" / "tasks.safetensors").write_bytes(b"broken")
    with pytest.raises(WeightsError, match="tasks.safetensors"):
        TaskReader.load(tmp_path / "grpo" / "weights")


def test_task_tokens_from_the_command_line(policy, systems, tmp_path, capsys):
    policy.save(tmp_path / "reader")
    run = lambda *w: main([str(x) for x in w])
    data = tmp_path / "q.jsonl"
    words = ["data", "questions", "--of", "music", "--source", "music21", "--split", "dev", "--count", 2]
    assert run(*words, "--task", "counting,grounding", "--out", data) == 0
    init = ("--init", tmp_path / "reader")
    assert (
        run("train", "tasks", "--data", data, "--out", tmp_path / "s", *init, "--steps", 1, "--set", "batch_size=2")
        == 0
    )
    small = ("--set", "num_generations=2", "--set", "per_device_batch_size=4", "--set", "max_actions=5")
    command = ("train", "grpo", "--policy", tmp_path / "s" / "weights", "--data", data, "--out", tmp_path / "g")
    assert run(*command, "--steps", 1, *small) == 0
    capsys.readouterr()
    assert run("evaluate", "--task", "all", "--data", data, "--policy", tmp_path / "g" / "weights") == 0
    said = capsys.readouterr().out
    assert "counting" in said and "mean IoU" in said
