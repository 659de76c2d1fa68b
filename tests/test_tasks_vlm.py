"""Vision-language models as policies: two families with random weights, nothing downloaded."""

import copy
import json

import numpy as np
import pytest
import torch

from vitomr.tasks.datasets import Question, save_questions
from vitomr.tasks.rewards import Answer
from vitomr.tasks.vlm import (
    LoopConfig,
    Prompt,
    SmallVLM,
    TaskConfig,
    VLMPolicy,
    copied,
    load_vlm,
    small_vlm,
    supervised_start,
    train,
    with_lora,
    word_tokenizer,
)
from vitomr.train.policy import Sampling, SupervisedPolicy, TokenPolicy
from vitomr.train.runs import WeightsError, read_history
from vitomr.train.schedules import Schedule

transformers = pytest.importorskip("transformers", reason="needs vitomr[vlm]")

TEXTS = [
    "How many squares are there? Where is the blue square, the one on the left?",
    "Write answer inside <answer> and </answer>.",
]


def picture(seed, size=64):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


QUESTIONS = [
    Question("How many squares are there?", 3, (picture(0),), "counting", "a"),
    Question(
        "Where is the blue square, the one on the left? Where is the blue square?",
        "[1, 2, 30, 40]",
        (picture(1),),
        "grounding",
        "b",
    ),
    Question("<image>Where are <image> squares?", 12, (picture(2), picture(3)), "counting", "c"),
]


def idefics3(seed=0):
    return small_vlm(SmallVLM(width=32, depth=2, vision_width=32, vision_depth=1), TEXTS, seed)


def qwen2_vl(seed=0):
    tokenizer = word_tokenizer([*TEXTS, "<|image_pad|> <|video_pad|>"])
    ids = {t: tokenizer.convert_tokens_to_ids(f"<|{t}|>") for t in ("image_pad", "video_pad")}
    text = {
        "model_type": "qwen2_vl_text",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "hidden_size": 32, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
    )
    sizes = {"patch_size": 8, "min_pixels": 16 * 16, "max_pixels": 64 * 64}
    pictures = transformers.Qwen2VLImageProcessor(**sizes)
    chat = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image_pad|>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    )
    video = transformers.Qwen2VLVideoProcessor(**sizes)
    processor = transformers.Qwen2VLProcessor(pictures, tokenizer, video, chat_template=chat)
    torch.manual_seed(seed)
    return transformers.Qwen2VLForConditionalGeneration(config).eval(), processor


FAMILIES = {"qwen2_vl": qwen2_vl, "idefics3": idefics3}


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request):
    return VLMPolicy(*FAMILIES[request.param]())


def test_it_is_a_policy_of_tokens(policy):
    assert isinstance(policy, TokenPolicy) and isinstance(policy, SupervisedPolicy)
    assert policy.n_choices == policy.base.config.text_config.vocab_size


@pytest.mark.parametrize(
    "how",
    [
        Sampling(1.0, 0, 12),
        Sampling(0.7, 5, 12),
        Sampling(1.3, 0, 6, 0.8),
        Sampling(1.0, 0, 6, 1.0, 0.02),
    ],
    ids=str,
)
def test_sampled_and_scored_log_probabilities_agree(policy, how):
    sampled = policy.rollout(QUESTIONS, 3, how, seed=1)
    scored = policy.score(QUESTIONS, sampled.actions, how, full=True)
    assert [len(g) for g in sampled.actions] == [3, 3, 3] and sampled.truncated.shape == (9,)
    assert torch.equal(sampled.scored.mask, scored.mask) and scored.mask.any(1).all()
    ratio = (scored.logp - sampled.scored.logp).exp()
    assert (ratio - 1).abs().max() < 1e-4 and (sampled.scored.entropy - scored.entropy).abs().max() < 1e-4
    assert torch.allclose(scored.full.exp().sum(-1), torch.ones(()), atol=1e-5)
    if how.top_k:
        assert (scored.full > -torch.inf).sum(-1).max() <= how.top_k
    again = policy.rollout(QUESTIONS, 3, how, seed=1)
    other = policy.rollout(QUESTIONS, 3, how, seed=2)
    assert again.actions == sampled.actions and other.actions != sampled.actions


def test_batch_equals_single_with_padding_on_the_left(policy):
    "Prompts of 20 to 60 tokens, one of them with two pictures, together, alone and in another order."
    how = Sampling(0.0, max_actions=10)
    together = policy.rollout(QUESTIONS, 1, how, 0).actions
    for q, (answer,) in zip(QUESTIONS, together):
        assert policy.rollout([q], 1, how, 0).actions == [[answer]]
    one = Sampling(1.0)
    scored = policy.score(QUESTIONS[::-1], together[::-1], one).logp.flip(0)
    for i, q in enumerate(QUESTIONS):
        alone = policy.score([q], [together[i]], one).logp[0]
        assert torch.allclose(alone, scored[i, : len(alone)], atol=1e-5)


def test_the_picture_matters_and_each_question_sees_its_own(policy):
    answer = policy.rollout(QUESTIONS[:1], 1, Sampling(1.0, max_actions=6), 0).actions[0]
    q, other = QUESTIONS[0], Question(QUESTIONS[0].problem, 3, (picture(9),))
    mine, theirs = (policy.score([x], [answer], Sampling()).logp for x in (q, other))
    both = policy.score([q, other], [answer, answer], Sampling()).logp
    assert not torch.allclose(mine, theirs, atol=1e-6)
    assert torch.allclose(both, torch.cat([mine, theirs]), atol=1e-5)


def test_no_answer_holds_the_place_of_a_picture(policy):
    bad = {policy.base.config.image_token_id, policy.processor.tokenizer.pad_token_id}
    sampled = policy.rollout(QUESTIONS[:1], 16, Sampling(5.0, max_actions=30), 3)
    assert not bad & {t for a in sampled.actions[0] for t in a}
    assert all(isinstance(a, Answer) and isinstance(a.text, str) for a in sampled.actions[0])
    scored = policy.score(QUESTIONS[:1], sampled.actions, Sampling(5.0), full=True)
    assert (scored.full[..., list(bad)] == -torch.inf).all()


def test_an_answer_ends_at_its_first_end_token(policy):
    sampled = policy.rollout(QUESTIONS, 8, Sampling(3.0, max_actions=40), 5)
    flat = [a for g in sampled.actions for a in g]
    ends = [[t in policy.stops for t in a] for a in flat]
    assert any(e[-1] for e in ends) and not any(any(e[:-1]) for e in ends)
    assert [not e[-1] for e in ends] == sampled.truncated.tolist()
    assert not any(policy.processor.tokenizer.eos_token in a.text for a in flat)


def test_gradient_checkpointing_changes_no_gradient(policy):
    actions = policy.rollout(QUESTIONS, 2, Sampling(max_actions=6), 0).actions
    found = []
    for save in (False, True):
        policy.gradient_checkpointing = save
        policy.model.zero_grad()
        policy.score(QUESTIONS, actions, Sampling()).logp.sum().backward()
        found.append({k: p.grad.clone() for k, p in policy.model.named_parameters() if p.grad is not None})
    policy.gradient_checkpointing = False
    policy.model.zero_grad()
    assert policy.layers and found[0].keys() == found[1].keys()
    assert any("vis" in k for k in found[0]), "the encoder of pictures has no gradient"
    assert all(torch.allclose(found[0][k], found[1][k], atol=1e-6) for k in found[0])


def test_supervised_loss_is_that_of_the_right_answer(policy):
    loss = policy.supervised(QUESTIONS[:2])
    for q, mean in zip(QUESTIONS, loss):
        ids = policy.tokens_of(q)
        assert ids[-1] == policy.stops[0] and policy.answer(ids).text == f"<answer>{q.solution}</answer>"
        logits = policy.score([q], [[ids]], Sampling(), full=True).full[0]
        expected = -logits.gather(1, torch.tensor(ids)[:, None]).mean()  # nearly: a few tokens are impossible there
        assert mean.item() == pytest.approx(expected.item(), abs=0.3) and mean.item() > expected.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family, tmp_path):
    policy = VLMPolicy(*FAMILIES[family]())
    policy.base.generation_config.max_new_tokens = 3
    policy.save(tmp_path)
    again = load_vlm(tmp_path, device="cpu", prompt=Prompt("plain", "plain"))
    actions = policy.rollout(QUESTIONS, 2, Sampling(max_actions=5), 0).actions
    again.prompt = policy.prompt
    assert torch.equal(
        policy.score(QUESTIONS, actions, Sampling()).logp, again.score(QUESTIONS, actions, Sampling()).logp
    )


def test_lora_trains_the_adapter_alone_and_is_loaded_on_its_base(tmp_path):
    pytest.importorskip("peft")
    model, processor = idefics3()
    VLMPolicy(model, processor).save(tmp_path / "base")
    policy = load_vlm(tmp_path / "base", lora=2, device="cpu")
    names = policy.get_parameters()
    assert names and all("lora_" in k for k in names) and not any("vision" in k or "lm_head" in k for k in names)
    before = {k: p.detach().clone() for k, p in policy.model.named_parameters()}
    cfg = TaskConfig(
        num_generations=4,
        per_device_batch_size=8,
        max_actions=Schedule(5),
        use_kl=True,
        kl_approximator="full",
        loop=LoopConfig(steps=2, lr=1e-2, warmup=0, ema=0.0, weight_decay=0.0),
    )
    train(cfg, policy, QUESTIONS, tmp_path / "run", reward_funcs=lambda s, a: [float(len(x.text)) for x in a])
    moved = {k for k, p in policy.model.named_parameters() if not torch.equal(p, before[k])}
    assert moved and moved <= set(names)
    assert (tmp_path / "run" / "weights" / "adapter_model.safetensors").is_file()
    again = load_vlm(tmp_path / "run" / "weights", device="cpu")
    actions = policy.rollout(QUESTIONS, 1, Sampling(max_actions=4), 0).actions
    scores = [
        p.score(QUESTIONS, actions, Sampling()).logp for p in (policy, again, load_vlm(tmp_path / "base", device="cpu"))
    ]
    assert torch.allclose(scores[0], scores[1], atol=1e-6) and not torch.allclose(scores[0], scores[2], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_grpo_resumes_exactly(family, tmp_path):
    cfg = TaskConfig(
        num_generations=4,
        per_device_batch_size=8,
        rollout_batch=8,
        micro_batch=4,
        max_actions=Schedule(6),
        temperature=0.9,
        loop=LoopConfig(steps=3, lr=3e-3, warmup=1, ema=0.5, log_every=1),
    )
    start = FAMILIES[family]()
    runs = []
    for name, stops in (("whole", [None]), ("broken", [1, 2, None])):
        for stop in stops:
            policy = VLMPolicy(copy.deepcopy(start[0]), start[1])
            train(cfg, policy, QUESTIONS, tmp_path / name, stop_at=stop)
        runs.append((policy.get_parameters(), read_history(tmp_path / name)))
    (whole, lines), (broken, others) = runs
    assert all(torch.equal(whole[k], broken[k]) for k in whole)
    drop = lambda line: {k: v for k, v in line.items() if k != "seconds"}
    assert [drop(x) for x in lines] == [drop(x) for x in others] and len(lines) == 3
    assert all(abs(x["ratio_off"]) < 1e-4 for x in lines) and {"term/task", "term/format"} <= lines[0].keys()
    told = [json.loads(x) for x in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert {"prediction", "reference", "problem"} <= told[0].keys()


def test_a_supervised_start_learns_and_resumes_exactly(tmp_path):
    cfg, start = LoopConfig(steps=6, lr=3e-3, warmup=1, ema=0.5, log_every=1, bf16=False), idefics3()
    found = []
    for name, stops in (("whole", [None]), ("broken", [3, None])):
        for stop in stops:
            policy = VLMPolicy(copy.deepcopy(start[0]), start[1])
            supervised_start(policy, QUESTIONS, cfg, tmp_path / name, batch_size=6, stop_at=stop)
        found.append(policy.get_parameters())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    lines = read_history(tmp_path / "whole")
    assert lines[-1]["ce"] < lines[0]["ce"] - 0.3
    assert load_vlm(tmp_path / "whole" / "weights", device="cpu").n_choices == policy.n_choices


def test_bad_input_is_one_line(tmp_path):
    policy = VLMPolicy(*idefics3())
    (tmp_path / "config.json").write_text("{}")
    save_questions(QUESTIONS, tmp_path / "q.jsonl")
    for wrong, error, word in (
        (lambda: load_vlm(tmp_path / "none"), WeightsError, "none"),
        (lambda: load_vlm(tmp_path), WeightsError, "vision-language"),
        (lambda: policy.rollout([Question("?", 1)], 2, Sampling(), 0), ValueError, "no picture"),
        (lambda: Prompt("nothing"), ValueError, "choose from"),
        (lambda: TaskConfig(lora=-1), ValueError, "0 or more"),
        (
            lambda: train(TaskConfig(task="guess"), policy, tmp_path / "q.jsonl", tmp_path / "r"),
            ValueError,
            "choose from",
        ),
        (lambda: copied({"x": torch.zeros(5)}, [1, 1], [1, 1]), ValueError, "shape"),
    ):
        with pytest.raises(error, match=word) as e:
            wrong()
        assert "\n" not in str(e.value)
    processor = copy.deepcopy(policy.processor)
    processor.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        VLMPolicy(idefics3()[0], processor)


def test_lora_leaves_eyes_and_head_alone():
    pytest.importorskip("peft")
    for make in FAMILIES.values():
        model = with_lora(make()[0], 2)
        trained = [k for k, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * 2 * 7 and all("lora_" in k for k in trained)


# The command line: the three demonstrations, each once at small size


def run(*words):
    from vitomr.cli import main

    return main([str(w) for w in words])


@pytest.mark.parametrize("task", ["counting", "grounding"])
def test_demonstration_with_shapes(task, tmp_path, capsys):
    data, start, grpo, told = tmp_path / "q.jsonl", tmp_path / "start", tmp_path / "grpo", tmp_path / "out" / "p.jsonl"
    assert run("data", "questions", "--of", "shapes", "--task", task, "--count", 6, "--out", data) == 0
    assert (
        run("train", "vlm", "--preset", "smoke", "--data", data, "--out", start, "--steps", 2, "--set", "batch_size=4")
        == 0
    )
    small = ("--set", "num_generations=4", "--set", "per_device_batch_size=8", "--set", "max_actions=12")
    command = ("train", "grpo", "--policy", start / "weights", "--data", data, "--out", grpo, "--steps", 2, *small)
    assert run(*command) == 0
    assert len(read_history(grpo)) == 2
    config = json.loads((grpo / "config.json").read_text())["grpo"]
    assert config["num_generations"] == 4 and config["question"] == "answer"
    capsys.readouterr()
    command = ("evaluate", "--task", task, "--data", data, "--policy", grpo / "weights", "--predictions", told)
    assert run(*command, "--max-tokens", 8) == 0
    said = capsys.readouterr().out
    assert task in said and "n = 6" in said and "format" in said
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    assert len(rows) == 6 and {"prediction", "solution", "task"} <= rows[0].keys()


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text('{"problem": "?"}\n')
    data = tmp_path / "q.jsonl"
    for words, said in (
        (("evaluate", "--task", "counting", "--data", data), "line 1"),
        (("evaluate", "--data", data, "--policy", "x"), "--task"),
        (("train", "grpo", "--policy", tmp_path, "--data", data, "--out", tmp_path / "r"), "line 1"),
        (("train", "grpo", "--policy", "x", "--data", data, "--out", tmp_path / "r", "--set", "colour=1"), "colour"),
        (("train", "vlm", "--data", data, "--out", tmp_path / "r", "--preset", "huge"), "choose from smoke"),
        (("data", "questions", "--of", "shapes", "--task", "ocr", "--count", 1, "--out", data), "choose from counting"),
        (("data", "questions", "--of", "music", "--count", 1, "--out", data), "--source"),
    ):
        assert run(*words) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1
