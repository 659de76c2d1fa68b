"""Questions with checkable answers: files, rewards, and text that no reward may fall for."""

import json

import numpy as np
import pytest
from PIL import Image

from vitomr.tasks.datasets import (
    TEMPLATES,
    Question,
    TaskDataError,
    answer_text,
    load_questions,
    messages,
    register_template,
    save_questions,
    task_of,
)
from vitomr.tasks.rewards import (
    accuracy,
    answer_of,
    boxes_of,
    detection_f1,
    format_ok,
    grounding,
    iou,
    mean_average_precision,
    number_of,
    ocr,
)
from vitomr.train.reward_functions import compute_rewards, reward_functions


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "a.png")
    Image.new("L", (10, 10), 7).save(tmp_path / "b.png")
    return tmp_path


def record(**change):
    return {"problem": "How many?", "solution": 3, "image": "a.png"} | change


# Files


@pytest.mark.parametrize("as_list", [True, False])
def test_both_layouts_and_both_formats_are_read(folder, as_list):
    said = [
        {"from": "human", "value": "<image>and<image>Where?"},
        {"from": "gpt", "value": "<answer> [1, 2, 3, 4] </answer>"},
    ]
    records = [record(), record(solution="four"), {"id": 9, "image": ["a.png", "b.png"], "conversations": said}]
    path = folder / ("q.json" if as_list else "q.jsonl")
    path.write_text(json.dumps(records, indent=2) if as_list else "\n\n".join(map(json.dumps, records)))
    found = load_questions(path)
    assert [(q.solution, q.task, len(q.images)) for q in found] == [
        (3, "counting", 1),
        ("four", "answer", 1),
        ("[1, 2, 3, 4]", "grounding", 2),
    ]
    assert found[2].name == "9" and [p.mode for p in found[2].pictures()] == ["RGB", "RGB"]
    assert found[2].pictures()[1].getpixel((0, 0)) == (7, 7, 7)


BAD = {
    "a missing problem": ({"solution": 1, "image": "a.png"}, "'problem'"),
    "a missing solution": ({"problem": "?", "image": "a.png"}, "'solution'"),
    "a missing image": ({"problem": "?", "solution": 1}, "'image'"),
    "a fraction": (record(solution=1.5), "float"),
    "true": (record(solution=True), "bool"),
    "a list": (record(solution=[1, 2, 3, 4]), "list"),
    "no file": (record(image="gone.png"), "gone.png"),
    "no path": (record(image=3), "'image'"),
    "a wrong task": (record(task="guessing"), "guessing"),
    "a number as problem": (record(problem=3), "'problem'"),
    "too many places": (record(problem="<image><image>?"), "<image>"),
    "one turn": ({"image": "a.png", "conversations": [{"from": "human", "value": "?"}]}, "conversations"),
    "no record": (3, "int"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("as_list", [True, False])
def test_every_malformed_record_is_named_with_its_line(folder, name, as_list):
    bad, word = BAD[name]
    path = folder / "q.json"
    lines = [json.dumps(x) for x in (record(), bad, record(), bad)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]" if as_list else "\n" + "\n".join(lines))
    with pytest.raises(TaskDataError) as e:
        load_questions(path)
    said = str(e.value)
    assert "line 3: " in said and "line 5: " in said and "line 2: " not in said and word in said and "\n" not in said


def test_many_faults_are_all_named(folder):
    path = folder / "q.jsonl"
    path.write_text("\n".join(["{"] * 40))
    with pytest.raises(TaskDataError) as e:
        load_questions(path)
    assert "40 malformed" in str(e.value) and all(str(n) in str(e.value) for n in range(1, 41))


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '[{"a": ' * 20_000, "\x00", "[1, 2"])
def test_junk_files_are_one_line(folder, text):
    path = folder / "q.json"
    path.write_text(text)
    with pytest.raises(TaskDataError) as e:
        load_questions(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_other_faults_are_one_line(folder):
    for path in (folder / "none.json", folder):
        with pytest.raises(TaskDataError):
            load_questions(path)
    (folder / "latin.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(TaskDataError, match="text"):
        load_questions(folder / "latin.json")
    (folder / "fake.png").write_text("no picture")
    (folder / "q.json").write_text(json.dumps([record(image="fake.png")]))
    with pytest.raises(TaskDataError, match="fake.png"):
        load_questions(folder / "q.json")[0].pictures()


def test_train_sample_size_is_a_seeded_choice(folder):
    (folder / "q.json").write_text(json.dumps([record(solution=i) for i in range(50)]))
    some, same, other = (load_questions(folder / "q.json", train_sample_size=10, seed=s) for s in (1, 1, 2))
    picked = [q.solution for q in some]
    assert picked == [q.solution for q in same] == sorted(set(picked)) and len(picked) == 10
    assert picked != [q.solution for q in other]
    assert len(load_questions(folder / "q.json", train_sample_size=100)) == 50
    with pytest.raises(TaskDataError, match="train_sample_size"):
        load_questions(folder / "q.json", train_sample_size=0)


def test_questions_are_written_and_read_back(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    asked = [
        Question("<image>?", "[1, 2, 3, 4]", (pixels,), "grounding", "x"),
        Question("? {solution}", 4, (folder / "a.png",), "counting"),
    ]
    save_questions(asked, folder / "out" / "q.jsonl")
    back = load_questions(folder / "out" / "q.jsonl")
    assert [(q.problem, q.solution, q.task, q.name) for q in back][0] == ("<image>?", "[1, 2, 3, 4]", "grounding", "x")
    assert (np.asarray(back[0].pictures()[0]) == pixels).all() and back[1].solution == 4


# Templates


def test_templates_are_had_by_name_and_leave_braces_alone():
    q = Question("What is {x} in <image>, {solution}?", "{y}", ("p",))
    register_template("question", "twice", "{problem} {problem}")
    try:
        content = messages(q, question_template="plain", system_template="think")
        assert content[0]["role"] == "system" and "<think>" in content[0]["content"][0]["text"]
        assert content[1]["content"] == [
            {"type": "text", "text": "What is {x} in "},
            {"type": "image"},
            {"type": "text", "text": ", {solution}?"},
        ]
        assert answer_text(q) == "<answer>{y}</answer>" and answer_text(q, "plain") == "{y}"
        assert messages(Question("?", 1, ("p", "q")))[0]["content"][:2] == [{"type": "image"}] * 2
    finally:
        del TEMPLATES["question"]["twice"]
    for f in (
        lambda: register_template("colour", "a", "b"),
        lambda: register_template("question", "a", "b"),
        lambda: messages(q, question_template="none such"),
        lambda: answer_text(q, "none such"),
    ):
        with pytest.raises(ValueError, match="choose from|must hold"):
            f()


# Rewards


@pytest.mark.parametrize(
    ("text", "solution", "worth"),
    [
        ("<answer>3</answer>", 3, 1),
        ("3.0", 3, 1),
        ("3", "3.00", 1),
        ("03", 3, 1),
        ("+3", 3, 1),
        ("3e0", 3, 1),
        ("3.", 3, 1),
        ("3 bars", 3, 0),
        ("three", 3, 0),
        ("", 3, 0),
        ("-3", 3, 0),
        ("<answer>2</answer><answer>3</answer>", 3, 1),
        ("<answer>3</answer> or <answer>2</answer>", 3, 0),
        ("a violin", "a violin", 1),
        ("A violin", "a violin", 0),
        ("10000000000000000000001", 10000000000000000000000, 0),
        ("0.1", "0.10", 1),
        ("nan", "nan", 1),
        ("inf", 3, 0),
        ("٣", 3, 0),
    ],
)
def test_accuracy(text, solution, worth):
    assert accuracy(text, solution) == worth


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("<answer>3</answer>", 1),
        (" <think>hm</think>\n<answer>3</answer>\n", 1),
        ("3", 0),
        ("<answer>3", 0),
        ("x<answer>3</answer>", 0),
        ("<answer>3</answer>x", 0),
        ("<answer>3</answer><answer>3</answer>", 0),
        ("<answer>3</answer><think>hm</think>", 0),
        ("</think><think><answer>3</answer>", 0),
        ("<think>a</think>b<answer>3</answer>", 0),
        ("</answer><answer>", 0),
        ("", 0),
    ],
)
def test_format(text, worth):
    assert format_ok(text) == worth


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("left", -1),
        ("[0, 0, 10]", -1),
        ("[0, 0, 10, 10, 3, 3]", -1),
        ("[a, b, c, d]", -1),
        ("[1e3, 0, 1, 2]", -1),
        ("[12345678, 0, 1, 2]", -1),
        ("[10, 0, 0, 10]", -0.6),
        ("[0, 10, 10, 0]", -0.6),
        ("[3, 3, 3, 9]", -0.6),
        ("[20, 20, 30, 30]", -0.2),
        ("[10, 0, 20, 10]", -0.2),
        ("[0, 0, 5, 10]", 0.25),
        ("[0, 0, 10, 10]", 1),
        ("[ 0.0 ,0,10.000, 10]", 1),
        ("It is at [0, 0, 10, 10].", 1),
        ("[-10, 0, 10, 10]", 0.25),
        ("[0, 0, 10, 10] or [5, 5, 6, 6]", 1),
        ("[[[0, 0, 10, 10]]]", 1),
    ],
)
def test_grounding(text, worth):
    assert grounding(f"<answer>{text}</answer>", "[0, 0, 10, 10]") == pytest.approx(worth)


def test_iou_is_that_of_pixels():
    "Against counting the pixels of both boxes."
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (np.sort(rng.integers(0, 12, (2, 2)), 0).T for _ in range(2))
        masks = []
        for (x1, x2), (y1, y2) in (a, b):
            masks.append(np.zeros((12, 12), bool))
            masks[-1][y1:y2, x1:x2] = True
        both, either = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
        boxes = [tuple(float(v) for v in (c[0, 0], c[1, 0], c[0, 1], c[1, 1])) for c in (a, b)]
        expected = both / either if masks[0].any() and masks[1].any() else 0
        assert iou(*boxes) == pytest.approx(expected)


TWO = "[[0, 0, 10, 10], [20, 0, 30, 10]]"


@pytest.mark.parametrize(
    ("text", "f1", "mean_ap"),
    [
        (TWO, 1, 1),
        ("[]", 0, 0),
        ("none", 0, 0),
        ("[[0, 0, 10, 10]]", 2 / 3, 0.5),
        ("[[20, 0, 30, 10], [0, 0, 10, 10]]", 1, 1),
        ("[[0, 0, 10, 10], [0, 0, 10, 10]]", 0.5, 0.5),
        ("[[0, 0, 10, 8], [20, 0, 30, 8]]", 1, 0.7),
        ("[[50, 0, 60, 10], [0, 0, 10, 10], [20, 0, 30, 10]]", 0.8, 2 / 3),
        ("[[0, 0, 10, 4], [20, 0, 30, 10]]", 0.5, 0.25),
    ],
)
def test_detection(text, f1, mean_ap):
    assert detection_f1(f"<answer>{text}</answer>", TWO) == pytest.approx(f1)
    assert mean_average_precision(text, TWO) == pytest.approx(mean_ap)


def test_detection_takes_the_best_pairs():
    "Two boxes that both overlap the first: each must find its own."
    assert detection_f1("[[2, 0, 12, 10], [0, 0, 10, 10]]", "[[0, 0, 10, 10], [3, 0, 13, 10]]") == 1
    assert detection_f1("[]", "[]") == 1 and detection_f1("[[1, 1, 2, 2]]", "[]") == 0


@pytest.mark.parametrize(
    ("text", "solution", "worth"),
    [
        ("measure C4 quarter", "measure C4 quarter", 1),
        ("measure  D4\nquarter", "measure C4 quarter", 2 / 3),
        ("", "measure C4", 0),
        ("measure", "measure C4 quarter", 1 / 3),
        ("x y z u v w", "measure C4 quarter", 0),
        ("kitten", "sitting", 1 - 3 / 7),
        ("", "", 1),
    ],
)
def test_ocr(text, solution, worth):
    assert ocr(text, solution) == pytest.approx(worth)


MEGA = 1_000_000
HOSTILE = {
    "code": "__import__('os').system('touch hacked')" * 20_000,
    "digits": "9" * MEGA,
    "exponents": "1e999999999" * 50_000,
    "brackets": "[" * MEGA,
    "pairs": "[]" * (MEGA // 2),
    "almost boxes": "[1, 2, 3, " * (MEGA // 10),
    "boxes": "[1, 2, 3, 4]" * (MEGA // 12),
    "spaces": "[" + " " * MEGA + "1, 2, 3, 4]",
    "open tags": "<answer>" * (MEGA // 8),
    "close tags": "</answer>" * (MEGA // 9),
    "thoughts": "<think>" * (MEGA // 14) + "</think>" * (MEGA // 16),
    "nothing": "\x00" * MEGA,
    "words": "measure " * (MEGA // 8),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_of_anything_earns_little_and_costs_little(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = HOSTILE[name]
    for given in (text, f"<answer>{text}</answer>"):
        assert accuracy(given, 3) == 0 and grounding(given, "[500, 500, 600, 600]") <= -0.2
        assert detection_f1(given, TWO) == 0 and ocr(given, "measure C4 quarter") == 0
        assert mean_average_precision(given, TWO) == 0 and format_ok(text) == 0
    assert not list(tmp_path.iterdir())


def test_parsers_are_bounded():
    assert len(boxes_of("[1, 2, 3, 4]" * 5000)) == 500
    assert number_of("9" * 33) is None and number_of("9" * 32) == int("9" * 32)
    assert answer_of("<answer>a</answer></answer>") == "a</answer>"


def test_rewards_by_name_add_up_with_weights():
    states = [
        Question("?", 3, task="counting"),
        Question("?", "[0, 0, 10, 10]", task="grounding"),
        Question("?", TWO, task="detection"),
        Question("?", "measure C4", task="ocr"),
        Question("?", "red", task="answer"),
    ]
    texts = ["<answer>3</answer>", "<answer>[0, 0, 5, 10]</answer>", TWO, "measure D4", "<answer>red</answer>"]
    functions = reward_functions(["task", "format"], [2.0, 0.5])
    terms = [t for (t,) in compute_rewards(functions, states, [[t] for t in texts])]
    assert [t.raw["task"] for t in terms] == pytest.approx([1, 0.25, 1, 0.5, 1])
    assert [t.raw["format"] for t in terms] == [1, 1, 0, 0, 1] and terms[0].weights == {"task": 2.0, "format": 0.5}
    with pytest.raises(ValueError, match="no text"):
        compute_rewards(functions, states[:1], [[17]])
    with pytest.raises(ValueError, match="no box"):
        compute_rewards(reward_functions("grounding"), [{"solution": "left"}], [["[1, 2, 3, 4]"]])


def test_the_form_of_a_solution_tells_its_task():
    given = [5, "[1, 2, 3, 4]", TWO, "[]", "measure C4 quarter", "5", "[left]"]
    assert [task_of(s) for s in given] == ["counting", "grounding", "detection", "detection", "ocr", "answer", "answer"]
