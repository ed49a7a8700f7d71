"""A result in the hands of people who did not train it: transformers' own classes ask and answer as the kit's `Chat` does."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_chat_template import DAY, own
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessorPil, LlavaForConditionalGeneration, pipeline

from llava_nb.chat import Chat, human_turn, picture_of
from llava_nb.checkpoint import save_llava
from llava_nb.imageproc import ImageTransform
from llava_nb.llava import add_image_token, tiny_llava
from llava_nb.masking import Encoder, add_spoken, check_spoken, tiny_tokenizer
from llava_nb.safe.integrity import read_back
from llava_nb.safe.storage import StorageFailed

QUESTIONS = ["What is in the picture?", "And what else?", "Is it large?"]
CLIP = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8))


def result(folder, tokenizer, template: str, **settings):
    "A tiny model with something to say, saved as a run saves it"
    model = tiny_llava(tokenizer)
    model.config.llava_nb |= {
        "template": template,
        "image_aspect_ratio": "square",
        "date": str(DAY),
        "model_max_length": 512,
    } | settings
    with torch.no_grad():
        for p in model.lm_head.parameters():
            p.mul_(20)
        for p in model.model.language_model.layers.parameters():
            p.mul_(3)
    save_llava(model, folder, tokenizer, CLIP)
    return folder


def chatml():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


MADE = {
    "v1": (tiny_tokenizer, "v1"),
    "llava_llama_2": (tiny_tokenizer, "llava_llama_2"),
    "chatml": (chatml, "chatml"),
    "plain": (tiny_tokenizer, "plain"),
    "Qwen 3": (lambda: own("Qwen 3"), "chat_template"),
    "Llama 3.2": (lambda: own("Llama 3.2"), "chat_template"),
}


@pytest.fixture(params=MADE, scope="module")
def made(request, tmp_path_factory):
    make, template = MADE[request.param]
    return result(tmp_path_factory.mktemp("made"), make(), template), template


def test_a_stranger_s_ids_and_answers_are_chat_s(made):
    folder, template = made
    chat, model, processor = (
        Chat.from_pretrained(folder),
        LlavaForConditionalGeneration.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    messages = []
    for k, question in enumerate(QUESTIONS[: 1 if template == "plain" else 3]):
        parts = [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": parts if k else [{"type": "image", "image": picture()}, *parts]})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        asked = chat.prompter([*chat.history, human_turn(question, k == 0)])
        assert inputs["input_ids"][0].tolist() == asked.input_ids
        out = model.generate(**inputs, max_new_tokens=10)[0, inputs["input_ids"].shape[1] :].tolist()
        answer = chat.ask(question, picture() if k == 0 else None, max_new_tokens=10)
        said = processor.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert (said.split("\n")[0] if template == "plain" else said).strip() == answer
        if not answer.strip():
            return
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def test_pipeline_answers_as_chat(made):
    folder, template = made
    ask = pipeline("image-text-to-text", model=str(folder))
    said = ask(
        text=[
            {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTIONS[0]}]}
        ],
        max_new_tokens=10,
        return_full_text=False,
    )
    answer = said[0]["generated_text"]
    assert (answer.split("\n")[0] if template == "plain" else answer).strip() == Chat.from_pretrained(folder).ask(
        QUESTIONS[0], picture(), max_new_tokens=10
    )


def test_the_tokenizer_alone_has_the_template_and_pads_for_generation(made):
    folder, template = made
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer.chat_template == AutoProcessor.from_pretrained(folder).chat_template
        and tokenizer.padding_side == "left"
        and tokenizer.pad_token
    )
    generation = LlavaForConditionalGeneration.from_pretrained(folder).generation_config
    chat = Chat.from_pretrained(folder)
    assert (
        set(generation.eos_token_id) == chat.stop_ids
        and generation.suppress_tokens == chat.banned
        and generation.pad_token_id is not None
    )
    read_back(folder, 2)


def test_a_result_that_answers_otherwise_is_none(made, tmp_path):
    folder, template = made
    if template == "chat_template":
        return  # it is the very text that is read
    copy = shutil.copytree(folder, tmp_path / "copy")
    jinja = copy / "chat_template.jinja"
    jinja.write_text(jinja.read_text().replace("{{- said.gap ~ between -}}", "{{- said.gap ~ between ~ 'x' -}}"))
    with pytest.raises(StorageFailed, match="other ids than the training"):
        read_back(copy, 2)
    (copy / "processor_config.json").write_text("{}")
    with pytest.raises(StorageFailed, match="cannot be used"):
        read_back(copy, 2)


def test_a_weight_that_is_no_number_is_found(tmp_path):
    folder = result(tmp_path / "a", tiny_tokenizer(), "v1")
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(StorageFailed, match="not finite"):
        read_back(folder, 2)


def test_chat_obeys_the_configuration(tmp_path):
    turned = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    folder = result(
        tmp_path / "a", tiny_tokenizer(), "v1", apply_exif=True, image_aspect_ratio="pad", model_max_length=100
    )
    chat = Chat.from_pretrained(folder)
    assert torch.equal(
        chat.prompter.transform(tmp_path / "turned.jpg"),
        ImageTransform(CLIP, "pad", apply_exif=True)(tmp_path / "turned.jpg"),
    )
    assert chat.prompter.context == 100
    with pytest.raises(ValueError, match="context ends at 100"):
        chat.ask("why? " * 60)


def test_pictures_as_people_hand_them_over(tmp_path):
    transform, grey = ImageTransform(CLIP, "pad"), (np.arange(64 * 80).reshape(64, 80) * 12).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    trained, data = transform(tmp_path / "deep.png"), (tmp_path / "deep.png").read_bytes()
    with Image.open(tmp_path / "deep.png") as opened, (tmp_path / "deep.png").open("rb") as file:
        ways = [
            str(tmp_path / "deep.png"),
            opened,
            grey,
            data,
            bytearray(data),
            io.BytesIO(data),
            file,
            [grey],
            (str(tmp_path / "deep.png"),),
        ]
        for way in ways:
            assert torch.equal(transform(picture_of(way)), trained), type(way)
        assert not file.closed
    assert trained.std() > 0.3
    for wrong, said in (
        ([data, data], "2 images were given"),
        ([], "0 images"),
        ("https://x.org/a.png", "no image is downloaded"),
        ("file:///a.png", "no image is downloaded"),
        (torch.zeros(3, 9, 9), "a Tensor is no image"),
        (np.zeros((3, 9, 9), np.uint8), "no image"),
        (np.zeros((9, 9)), "float64"),
        ({"bytes": data}, "a dict is no image"),
        ("data:image/png;base64,???", "no data URI"),
        (io.StringIO("x"), "no image"),
        (Image.new("L", (20_000, 3)), "20,000 x 3"),
        (7, "a int is no image"),
    ):
        with pytest.raises(ValueError, match=said):
            picture_of(wrong)
    palette = Image.new("P", (9, 9))
    palette.info["transparency"] = 0
    transform(picture_of(palette))
    assert palette.info == {"transparency": 0}  # what comes in stays as it is
    with pytest.raises(ValueError, match="32 bits"):
        transform(picture_of(Image.fromarray(grey.astype(np.int32))))


def test_named_tokens_are_themselves_everywhere(tmp_path):
    tokenizer = tiny_tokenizer()
    assert add_spoken(tokenizer, ["<box>", "</box>"]) == ["<box>", "</box>"]
    model = tiny_llava(tokenizer, spoken=["<box>", "</box>"])
    ids = tokenizer.convert_tokens_to_ids(["<box>", "</box>"])
    assert model.config.llava_nb["text_vocab_size"] > max(ids) and model.get_input_embeddings().num_embeddings > max(
        ids
    )
    folder = tmp_path / "a"
    model.config.llava_nb |= {"template": "v1", "special_tokens": ["<box>", "</box>"]}
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[0]] = 1.0  # all it says
    save_llava(model, folder, tokenizer, CLIP)
    read_back(folder, 2)
    chat = Chat.from_pretrained(folder)
    assert not set(ids) & set(chat.banned)
    asked = chat.prompter([human_turn("Where is <box>1,2</box>?", False)]).input_ids
    assert all(i in asked for i in ids)
    processor = AutoProcessor.from_pretrained(folder)
    said = processor.apply_chat_template(
        [{"role": "user", "content": "Where is <box>1,2</box>?"}], add_generation_prompt=True, tokenize=True
    )
    assert said[0] == asked
    hidden = model.get_input_embeddings().weight
    assert torch.isfinite(hidden[ids]).all() and (hidden[ids] - hidden[:2048].mean(0)).abs().max() < 1
    answer = chat.ask("Where?", max_new_tokens=3)
    assert not answer.replace("<box>", "")  # the sign of the logit is chance; what is said is not spelled


@pytest.mark.parametrize(
    "name,why",
    [
        ("<image>", "steers"),
        ("</s>", "steers"),
        ("<s>", "steers"),
        ("<unk>", "steers"),
        ("<|im_start|>", "steers"),
        ("<|eot_id|>", "steers"),
        ("[INST]", "steers"),
        ("<|user|>", "steers"),
        ("a b", "white space"),
        ("", "empty"),
        ("fox", "ordinary"),
        ("<0x0A>", "ordinary"),
    ],
)
def test_tokens_that_no_text_may_say(name, why):
    tokenizer = tiny_tokenizer()
    if name == "fox":
        name = next(p for p in tokenizer.get_vocab() if len(p) > 2 and p.isalpha())
    with pytest.raises(ValueError, match=why):
        check_spoken([name], tokenizer)
    check_spoken(["<box>", "<|box_start|>", "<|object_ref_end|>", "[LOC]", "<loc_12>"], tokenizer)
    with pytest.raises(ValueError, match="steers"):
        check_spoken(["<turn>"], tokenizer, {"<turn>"})


def test_unnamed_tokens_are_spelled_out():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<box>"], special_tokens=True)
    image = add_image_token(tokenizer)
    from llava_nb.conversation import TEMPLATES

    said = TEMPLATES["v1"].segments([{"from": "human", "value": "a"}, {"from": "gpt", "value": "<box>"}])
    box = tokenizer.convert_tokens_to_ids("<box>")
    assert (
        box not in Encoder(tokenizer, image, 1, 99)(said).input_ids
        and Encoder(tokenizer, image, 1, 99, ["<box>"])(said).labels.count(box) == 1
    )
