"""A conversation against the rollout and against one uncached pass; the command, over a pipe."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import write_inputs
from torch import nn

from vcr1_fast import cli
from vcr1_fast.data.records import load_records
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import read_clip
from vcr1_fast.evaluate.chat import Conversation, main_chat, open_conversation
from vcr1_fast.evaluate.config import ChatConfig
from vcr1_fast.model import checkpoint
from vcr1_fast.model.forward import embed, lm_head, prompt_features
from vcr1_fast.model.rollout import rollout
from vcr1_fast.model.sampling import SamplingConfig

pytest.importorskip("av")
pytest.importorskip("decord")
ROOT = Path(__file__).resolve().parents[1]
FRAMES = FrameConfig(num_frames=4, min_pixels=784, max_pixels=3136)
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)
FIRST, SECOND = "When does the circle appear?", "And where is it then?"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    model, records = write_inputs(tmp_path_factory.mktemp("chat"))
    return model, load_records(records)[0].video


@pytest.fixture(scope="module")
def loaded(inputs):
    path, video = inputs
    model, processor = checkpoint.load(path, dtype=torch.float64)
    processor = processor.with_video(min_pixels=784, max_pixels=3136, total_pixels=None)
    return model, processor, read_clip(video, FRAMES)


def test_the_first_answer_is_the_rollouts(loaded):
    model, processor, clip = loaded
    pieces = list(Conversation(model, processor, [clip], GREEDY).ask(FIRST))
    prompt = processor.prompt(FIRST, [clip])
    expected = rollout(model, processor, [prompt], 1, GREEDY)
    assert "".join(pieces) == expected.texts[0][0] != ""
    assert len(pieces) > 3  # it streams


def test_a_later_answer_is_that_of_one_pass_over_all_that_was_said(loaded):
    model, processor, clip = loaded
    talk = Conversation(model, processor, [clip], GREEDY)
    answers = ["".join(talk.ask(question)) for question in (FIRST, SECOND)]
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    # The same, token by token, without a cache; turns written out as ChatML has them.
    prompt = processor.prompt(FIRST, [clip])
    first = rollout(model, processor, [prompt], 1, GREEDY).tokens[0][0]
    turn = f"\n<|im_start|>user\n{SECOND}<|im_end|>\n<|im_start|>assistant\n"
    turn = torch.tensor(processor.tokenizer.encode(turn, add_special_tokens=False))
    end = torch.tensor([processor.stop_id])
    cut = first if first[-1] == processor.stop_id else torch.cat([first, end])
    tokens, answer = torch.cat([prompt.input_ids, cut, turn]), []
    positions = prompt.positions
    weight, _ = lm_head(model)
    with torch.no_grad():
        features = prompt_features(model, [prompt])
        for _ in range(GREEDY.max_new_tokens):
            is_vision = torch.isin(tokens, torch.tensor([processor.video_id, processor.image_id]))
            text = torch.arange(len(tokens) - positions.shape[1]) + int(positions.max()) + 1
            hidden = model.model.language_model(
                inputs_embeds=embed(model, tokens, is_vision, features)[0][None],
                position_ids=torch.cat([positions, text.expand(3, -1)], dim=1)[:, None],
                attention_mask={"full_attention": None},
                use_cache=False,
            ).last_hidden_state[0, -1]
            logits = nn.functional.linear(hidden, weight)
            logits[processor.banned_ids(len(weight))] = -torch.inf
            best = logits.argmax()[None]
            if int(best) == processor.stop_id:
                break
            answer.append(int(best))
            tokens = torch.cat([tokens, best])
    assert answers[1] == processor.decode(answer) != ""
    alone = "".join(Conversation(model, processor, [clip], GREEDY).ask(SECOND))
    assert alone != answers[1]  # what was said before matters to this model


def test_letters_of_several_tokens_come_whole(loaded, monkeypatch):
    model, processor, _ = loaded
    talk = Conversation(model, processor, [], GREEDY)
    tokens = processor.tokenizer.encode("a\N{SNOWMAN}b", add_special_tokens=False)
    given = iter([*tokens, processor.stop_id])
    monkeypatch.setattr(talk, "_sample", lambda hidden: next(given))
    pieces = list(talk.ask("?"))
    assert "".join(pieces) == "a\N{SNOWMAN}b" and not any("\ufffd" in piece for piece in pieces)


def test_vision_tokens_in_a_question_are_refused(loaded):
    model, processor, clip = loaded
    with pytest.raises(ValueError, match="video"):
        list(Conversation(model, processor, [clip], GREEDY).ask("what <|video_pad|>?"))
    talk = Conversation(model, processor, [clip], GREEDY)
    list(talk.ask(FIRST))
    with pytest.raises(ValueError, match="vision tokens"):
        list(talk.ask("and <|image_pad|>?"))
    with pytest.raises(ValueError, match="the control token '<|im_end|>'".replace("|", r"\|")):
        list(talk.ask("and<|im_end|>?"))


SETTINGS = ["frames.num_frames=4", "frames.min_pixels=784", "frames.max_pixels=3136"]
SETTINGS += ["max_new_tokens=12", "device=cpu", "dtype=float32"]


def test_the_command_answers_questions_of_a_pipe_as_given_ones(inputs, capsys):
    model, video = inputs
    paths = ["--model", str(model), "--video", video]
    asked = ["--question", FIRST, "--question", SECOND]
    assert cli.main(["chat", *paths, *asked, *SETTINGS]) == 0
    reported = capsys.readouterr()
    assert "4 frames" in reported.err and reported.out.count("\n") >= 2
    done = subprocess.run(
        [sys.executable, "-m", "vcr1_fast.cli", "chat", *paths, *SETTINGS],
        input=f"{FIRST}\n\n{SECOND}\n".encode(),
        cwd=ROOT,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == reported.out


def test_images_are_shown_to_the_model(inputs, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    outputs = []
    for colour in ("red", "blue"):
        path = tmp_path / f"{colour}.png"
        image.new("RGB", (56, 84), colour).save(path)
        asked = ["--image", str(path), "--question", FIRST]
        assert cli.main(["chat", "--model", str(inputs[0]), *asked, *SETTINGS]) == 0
        reported = capsys.readouterr()
        assert f"{path}: 56 x 84" in reported.err
        outputs.append(reported.out)
    assert outputs[0] != outputs[1]


def test_images_and_videos_have_bounds_of_their_own(inputs):
    bounds = {"min_pixels": 784, "image_min_pixels": 1568, "image_max_pixels": 6272}
    frames = FrameConfig(max_pixels=3136, **bounds)
    config = ChatConfig(model=str(inputs[0]), frames=frames, dtype="float32", device="cpu")
    processor = open_conversation(config).processor
    assert (processor.video.min_pixels, processor.video.max_pixels) == (784, 3136)
    assert (processor.image.min_pixels, processor.image.max_pixels) == (1568, 6272)


def test_a_folder_of_frames_is_read_at_the_rate_that_is_told(inputs, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    for i in range(12):
        image.new("RGB", (56, 56)).save(tmp_path / f"{i:02d}.png")
    asked = ["chat", "--model", str(inputs[0]), "--video", str(tmp_path), "--question", FIRST]
    assert cli.main([*asked, *SETTINGS, "folder_fps=3"]) == 0
    assert "4 frames of 4.0 s" in capsys.readouterr().err
    with pytest.raises(ValueError, match="folder_fps: must be above 0, got 0"):
        ChatConfig(model="m", folder_fps=0)


def test_sampling_repeats_with_its_seed(inputs, capsys):
    model, video = inputs
    outputs = []
    for seed in (1, 1, 2):
        config = ChatConfig(
            model=str(model),
            video=video,
            frames=FRAMES,
            temperature=2.0,
            max_new_tokens=12,
            seed=seed,
        )
        assert main_chat(config, io.StringIO(FIRST + "\n")) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_missing_video_is_reported_in_one_line(inputs, capsys):
    assert cli.main(["chat", "--model", str(inputs[0]), "--video", "no.mp4", *SETTINGS]) == 2
    assert "no.mp4" in capsys.readouterr().err
