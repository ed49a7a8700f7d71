"""Chat: one template with training, a cache that changes nothing, streams that add up, errors that name their cause."""

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava_nb.chat import Chat, Prompter, Reader, common_prefix, human_turn, next_token, visible
from llava_nb.checkpoint import save_llava, save_projector, stops, suppressed_token_ids
from llava_nb.conversation import get_template
from llava_nb.llava import tiny_llava
from llava_nb.masking import IGNORE_INDEX, Encoder, tiny_tokenizer
from llava_nb.run.chat_command import main

QUESTIONS = ["What is in the picture?", "And what else?", "Is it large or small?"]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 70, 3), np.uint8))


@pytest.fixture(scope="module")
def parts():
    tokenizer = tiny_tokenizer()
    model = tiny_llava(tokenizer)
    model.config.llava_nb |= {"template": "v1", "image_aspect_ratio": "pad"}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    with (
        torch.no_grad()
    ):  # larger weights: a tiny random model's logits are otherwise nearly equal, and every answer one token
        for p in model.lm_head.parameters():
            p.mul_(20)
        for p in model.model.language_model.layers.parameters():
            p.mul_(3)
    return model.eval(), tokenizer, processor


@pytest.fixture
def chat(parts):
    return Chat(*parts)


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    model, tokenizer, processor = parts
    folder = tmp_path_factory.mktemp("run") / "stage2"
    save_llava(model, folder, tokenizer, processor)
    return folder


def talk(chat: Chat, **kwargs) -> list[str]:
    return [chat.ask(q, picture(0) if k == 0 else None, max_new_tokens=12, **kwargs) for k, q in enumerate(QUESTIONS)]


@torch.no_grad()
def recomputed(parts, turns: list[dict], limit: int = 12) -> list[int]:
    "Greedy ids of the next answer, the whole text read anew for every token and no cache anywhere."
    model, tokenizer, processor = parts
    prompter = Prompter(model.config, tokenizer, processor)
    ids, pixels, out = prompter(turns).input_ids, prompter.transform(picture(0))[None], []
    for _ in range(limit):
        logits = model(
            input_ids=torch.tensor([ids + out]),
            position_ids=torch.arange(len(ids + out))[None],
            pixel_values=pixels,
            use_cache=False,
        ).logits[0, -1]
        logits[suppressed_token_ids(model)] = float("-inf")
        if (token := int(logits.argmax())) == tokenizer.eos_token_id:
            break
        out.append(token)
    return out


def test_cached_turns_equal_a_full_recompute(parts, chat):
    for k, question in enumerate(QUESTIONS):
        turns = [*chat.history, human_turn(question, k == 0)]
        expected = recomputed(parts, turns)
        answer = chat.ask(question, picture(0) if k == 0 else None, max_new_tokens=12)
        encoded = chat.prompter(turns)
        read = chat.reader.ids[len(encoded.input_ids) :]
        assert (
            read == expected[: len(read)] and len(read) >= len(expected) - 1
        )  # the last token is said, and read next time
        assert answer == parts[1].decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    assert any(t["value"] for t in chat.history[1::2])


def test_cached_logits_equal_a_full_read(parts, chat):
    talk(chat)
    encoded = chat.prompter([*chat.history, human_turn("And now?", False)])
    kept = chat.reader.known(encoded.input_ids, encoded.image_spans, chat.images)
    assert kept > encoded.image_spans[0][1]
    cached = chat.reader(encoded.input_ids, encoded.image_spans, chat.images)
    assert torch.allclose(
        cached, Reader(parts[0])(encoded.input_ids, encoded.image_spans, chat.images), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}])
def test_streamed_equals_whole(parts, sampling):
    whole, streamed = Chat(*parts), Chat(*parts)
    answers = talk(whole, **sampling)
    pieces = [
        list(streamed.ask(q, picture(0) if k == 0 else None, max_new_tokens=12, stream=True, **sampling))
        for k, q in enumerate(QUESTIONS)
    ]
    assert ["".join(p) for p in pieces] == answers and whole.history == streamed.history
    assert max(map(len, pieces)) > 1


def test_history_grows_by_a_question_and_an_answer(chat):
    answers = talk(chat)
    assert [t["from"] for t in chat.history] == ["human", "gpt"] * 3
    assert [t["value"] for t in chat.history[1::2]] == answers
    assert [t["value"] for t in chat.history[::2]] == [f"<image>\n{QUESTIONS[0]}", *QUESTIONS[1:]] and len(
        chat.images
    ) == 1
    chat.reset()
    assert chat.history == [] and chat.images == [] and talk(chat) == answers


def test_the_prompt_is_what_training_saw_up_to_the_answer(parts, chat):
    turns = [human_turn(QUESTIONS[0], True), {"from": "gpt", "value": "A cat."}]
    trained, prompt = chat.prompter.encoder(chat.prompter.template.segments(turns)), chat.prompter(turns[:1])
    start = next(i for i, label in enumerate(trained.labels) if label != IGNORE_INDEX)
    assert prompt.input_ids == trained.input_ids[:start] and prompt.image_spans == trained.image_spans


def test_a_dropped_stream_leaves_no_trace(parts, chat):
    fresh = talk(Chat(*parts))
    dropped = chat.ask("Something else?", picture(1), stream=True, max_new_tokens=12)
    next(dropped)
    dropped.close()
    assert chat.history == [] and chat.images == []
    assert talk(chat) == fresh


def test_the_same_words_with_another_picture_are_read_again(parts, chat):
    other = Chat(*parts)
    chat.ask(QUESTIONS[0], picture(0), max_new_tokens=3)
    chat.history, chat.images = [], []
    pixels = chat.prompter.transform(picture(1))
    encoded = chat.prompter([human_turn(QUESTIONS[0], True)])
    assert chat.reader.known(encoded.input_ids, encoded.image_spans, [pixels]) == encoded.image_spans[0][0]
    assert torch.allclose(
        chat.reader(encoded.input_ids, encoded.image_spans, [pixels]),
        other.reader(encoded.input_ids, encoded.image_spans, [pixels]),
        atol=1e-3,
    )


def test_a_second_picture_later_in_the_conversation(parts, chat):
    chat.ask(QUESTIONS[0], picture(0), max_new_tokens=4)
    chat.ask("And here?", picture(1), max_new_tokens=4)
    encoded = chat.prompter([*chat.history, human_turn("Which?", False)])
    assert len(encoded.image_spans) == len(chat.images) == 2
    full = Reader(parts[0])(encoded.input_ids, encoded.image_spans, chat.images)
    assert torch.allclose(chat.reader(encoded.input_ids, encoded.image_spans, chat.images), full, atol=1e-3, rtol=1e-4)


def test_an_overtaken_stream_is_an_error(chat):
    left = chat.ask(QUESTIONS[0], picture(0), stream=True, max_new_tokens=12)
    next(left)
    chat.ask(QUESTIONS[1], max_new_tokens=2)
    with pytest.raises(RuntimeError, match="went on without it"):
        list(left)
    assert len(chat.history) == 2


def test_what_the_loss_never_trained_is_never_said(parts, chat):
    model, tokenizer, _ = parts
    first = model.config.llava_nb["text_vocab_size"]
    assert set(chat.banned) >= {model.config.image_token_id, *range(first, model.config.text_config.vocab_size)}
    logits = torch.zeros(model.config.text_config.vocab_size)
    logits[chat.banned] = 100
    assert all(
        next_token(logits, chat.banned, t, torch.Generator().manual_seed(0)) not in chat.banned
        for t in (0, 1.0)
        for _ in range(50)
    )


def test_damaged_weights_are_named(parts):
    import copy

    model, tokenizer, processor = copy.deepcopy(parts[0]), *parts[1:]
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    chat = Chat(model, tokenizer, processor)
    with pytest.raises(FloatingPointError, match="not finite"):
        chat.ask(QUESTIONS[0], picture(0))
    assert chat.history == []


def test_the_model_s_training_mode_is_put_back(parts):
    model, tokenizer, processor = parts
    model.train()
    Chat(model, tokenizer, processor).ask(QUESTIONS[0], picture(0), max_new_tokens=2)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    "text,image,message",
    [
        ("<image> What?", None, "1 <image> and no image was given"),
        ("<image> or <image>?", 0, "2 <image> and one image was given"),
        ("  ", None, "the question is empty"),
        ("<video> What happens?", None, "holds '<video>', which the model would read as text"),
        ("[image] What is it?", None, "which the model would read as text"),
        ("half \ud800", None, r"holds U\+D800 at character 5"),
        ("nul \0", None, r"holds U\+0000 at character 4"),
        ("a \ufdd0 b", None, r"holds U\+FDD0"),
        ("why? " * 3000, None, r"takes [\d,]+ tokens .*context ends at 2,048"),
    ],
)
def test_questions_that_cannot_be_asked(chat, text, image, message):
    for stream in (False, True):
        with pytest.raises(ValueError, match=message):
            chat.ask(text, None if image is None else picture(image), stream=stream)
    assert chat.history == []


def test_a_picture_that_would_take_gigabytes_is_refused(chat, tmp_path):
    Image.new("1", (20_000, 1)).save(tmp_path / "long.png")
    with pytest.raises(ValueError, match="20,000 x 1"):
        chat.ask("<image>\nWhat?", tmp_path / "long.png")
    assert chat.history == []


def test_missing_picture_and_templates(parts):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        Chat(*parts).ask("What?", "nowhere.png")
    with pytest.raises(ValueError, match="vicuna_v9.*v1"):
        Chat(*parts, template="vicuna_v9")
    model = tiny_llava(parts[1])
    with pytest.raises(ValueError, match="names no template"):
        Chat(model, *parts[1:])


def test_an_answer_ends_where_the_context_does(parts, chat):
    words = QUESTIONS[0] + " why?" * 10
    chat.stop_ids, chat.prompter.context = set(), len(chat.prompter([human_turn(words, False)]).input_ids) + 5
    chat.ask(words, max_new_tokens=100)
    assert len(chat.reader.ids) == chat.prompter.context - 1


def test_plain_ends_at_a_newline(parts):
    chat = Chat(*parts, template="plain")
    assert chat.stop_text == "\n" and set(chat.stop_ids) == {
        parts[1].eos_token_id,
        parts[1].convert_tokens_to_ids("<0x0A>"),
    }
    ids = iter(parts[1].encode("a cat\nand a dog", add_special_tokens=False))
    import llava_nb.chat as module

    old, module.next_token = module.next_token, lambda *args: next(ids)
    try:
        assert chat.ask("", picture(0)) == "a cat"
    finally:
        module.next_token = old


def test_plain_takes_one_picture(parts):
    with pytest.raises(ValueError, match="template 'plain' takes one question with <image>"):
        Chat(*parts, template="plain").ask("What?")


def test_a_picture_of_any_mode(parts):
    rgb = Chat(*parts).ask(QUESTIONS[0], picture(0), max_new_tokens=6)
    assert Chat(*parts).ask(QUESTIONS[0], picture(0).convert("RGBA"), max_new_tokens=6) == rgb
    Chat(*parts).ask(QUESTIONS[0], picture(0).convert("L"), max_new_tokens=2)


@pytest.mark.parametrize("text", ["<image>\nWhat?", "What? <image>", "What?"])
def test_the_picture_s_place_in_the_text_does_not_matter(text):
    assert human_turn(text, True) == {"from": "human", "value": "<image>\nWhat?", "image": True}


def test_half_characters_wait(parts):
    chat, text = Chat(*parts), "a 🐈 cat"
    ids = iter([*parts[1].encode(text, add_special_tokens=False), parts[1].eos_token_id])
    import llava_nb.chat as module

    old, module.next_token = module.next_token, lambda *args: next(ids)
    try:
        pieces = list(chat.ask("What?", stream=True))
    finally:
        module.next_token = old
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces) and len(pieces) > 2


def test_small_functions():
    assert [common_prefix(*x) for x in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 2]), ([1, 5], [1, 2]))] == [
        0,
        2,
        2,
        1,
    ]
    assert visible("x ##", "###", final=False) == "x" and visible("x ### y", "###", final=False) == "x"
    chat_of = lambda name: stops(get_template(name), Encoder(tiny_tokenizer(), 2048, 16, 100))
    eos, line = tiny_tokenizer().eos_token_id, tiny_tokenizer().convert_tokens_to_ids("<0x0A>")
    assert chat_of("v1") == ([eos], "") and chat_of("plain") == (sorted([eos, line]), "\n")


def test_saved_and_loaded(parts, saved):
    loaded = Chat.from_pretrained(saved)
    assert talk(loaded) == talk(Chat(*parts))
    with pytest.raises(FileNotFoundError, match=f"found models in .*{saved.name}"):
        Chat.from_pretrained(saved.parent)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Chat.from_pretrained(saved / "none" / "here")


def test_stage_1_folder_is_named(parts, tmp_path):
    save_projector(parts[0], tmp_path)
    with pytest.raises(FileNotFoundError, match="projector of stage 1 only"):
        Chat.from_pretrained(tmp_path)


def test_command_line(parts, saved, tmp_path, capsys, monkeypatch):
    picture(0).save(tmp_path / "x.png")
    args = [str(saved), "--image", str(tmp_path / "x.png"), "--max_new_tokens", "12"]
    answers = talk(Chat(*parts))
    lines = iter([QUESTIONS[0], "<image>", "/image nowhere.png", QUESTIONS[0], "/reset", *QUESTIONS])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    assert main(args) == 0
    out = capsys.readouterr().out
    assert out.count(answers[0]) >= 2 and answers[2] in out and "no image was given" in out and "nowhere.png" in out
    assert main([str(tmp_path / "none" / "x"), "--ask", "?"]) == 2
    assert capsys.readouterr().err.startswith("llava_nb chat: ")


@pytest.mark.slow
def test_as_a_module(parts, saved, tmp_path):
    picture(0).save(tmp_path / "x.png")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "llava_nb.train",
            "chat",
            str(saved),
            "--image",
            str(tmp_path / "x.png"),
            "--ask",
            QUESTIONS[0],
            "--max_new_tokens",
            "12",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0 and run.stdout.strip() == talk(Chat(*parts))[0]


@pytest.mark.parametrize("images", [["--image", "a.png", "b.png"], ["--image", "a.png", "--image", "b.png"]])
def test_several_images_for_one_question_are_refused_before_the_model_is_loaded(images, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["no/such/model", *images, "--ask", "What?"])
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and "2 images were given and a question takes one" in said
        and "/image PATH" in said
        and "no such folder" not in said
    )


def test_the_command_leaves_the_signal_handlers_as_they_were(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main([str(tmp_path), "--ask", "What?"]) == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_ends_a_conversation_and_not_with_the_trainings_code(saved):
    """The program's own handlers ask for a checkpoint (75); a chat ends with 0."""
    chat = subprocess.Popen(
        [sys.executable, "-m", "llava_nb.train", "chat", str(saved)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert chat.stdout.read(5) == b"you> "
    chat.send_signal(signal.SIGINT)
    said, err = chat.communicate(timeout=60)
    assert chat.returncode == 0 and b"Traceback" not in err and b"outside of training" not in err, err
