"""What is saved is what was trained: the Jinja of every template writes the training's ids, on texts and on content parts."""

from datetime import date
from functools import cache

import pytest
from test_text import byte_level, smollm2
from tokenizers import AddedToken
from transformers import AutoTokenizer

from llava_nb.checkpoint import jinja
from llava_nb.conversation import IMAGE_TOKEN, TEMPLATES, get_template, normalise
from llava_nb.llava import add_image_token
from llava_nb.masking import IGNORE_INDEX, Encoder, tiny_tokenizer

DAY = date(2026, 3, 9)
EACH = "{% for m in messages %}"
ASKS = "{% endfor %}{% if add_generation_prompt %}"
IM = "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
HEADER = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>'"
THOUGHT = "<think>\n\n</think>\n\n"

# How the families' own templates behave, written anew as short as it goes: (Jinja, special tokens, BOS)
FAMILIES = {
    "Qwen 2.5": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        + EACH
        + "{{ "
        + IM
        + " }}"
        + ASKS
        + "<|im_start|>assistant\n{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        None,
    ),
    "Qwen 3": (
        EACH
        + "{% if m['role'] == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n"
        + THOUGHT
        + "' + m['content'] + '<|im_end|>\n' }}"
        "{% else %}{{ "
        + IM
        + " }}{% endif %}"
        + ASKS
        + "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}{{ '"
        + THOUGHT
        + "' }}{% endif %}{% endif %}",
        ["<think>", "</think>", "<|im_start|>", "<|im_end|>"],
        None,
    ),
    "Qwen 3, always thinking": (
        EACH + "{{ " + IM + " }}" + ASKS + "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        ["<think>", "</think>", "<|im_start|>", "<|im_end|>"],
        None,
    ),
    "SmolLM 3": (
        "{{ '<|im_start|>system\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\n\n' }}"
        "{{ (messages[0]['content'] if messages[0]['role'] == 'system' else 'You are SmolLM.') ~ '\n\n<|im_end|>\n' }}"
        + EACH
        + "{% if m['role'] == 'user' %}{{ "
        + IM
        + " }}{% elif m['role'] == 'assistant' %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m['content'].lstrip('\n') + '<|im_end|>\n' }}{% endif %}"
        + ASKS
        + "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}",
        ["<think>", "</think>", "<|im_start|>", "<|im_end|>"],
        None,
    ),
    "Llama 3": (
        "{{ bos_token }}"
        + EACH
        + "{{ "
        + HEADER
        + " }}"
        + ASKS
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
    ),
    "Llama 3.2": (
        "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + (strftime_now('%d %b %Y') if strftime_now is defined "
        "else '26 Jul 2024') + '\n\n' }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% endif %}<|eot_id|>"
        + EACH
        + "{% if m['role'] != 'system' %}{{ "
        + HEADER
        + " }}{% endif %}"
        + ASKS
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
    ),
    "Llama 2": (
        EACH + "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}",
        None,
        "<s>",
    ),
    "Mistral 0.1": (
        "{{ bos_token }}"
        + EACH
        + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}",
        None,
        "<s>",
    ),
    "Mistral 0.3": (
        "{{ bos_token }}" + EACH + "{% if m['role'] == 'user' %}{% if loop.last and messages[0]['role'] == 'system' %}"
        "{{ '[INST] ' + messages[0]['content'] + '\n\n' + m['content'] + '[/INST]' }}{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        ["[INST]", "[/INST]", "</s>"],
        "<s>",
    ),
    "a space asks": (
        "{{ bos_token }}"
        + EACH
        + "{{ m['role'].upper() + ': ' + m['content'] + (eos_token if m['role'] == 'assistant' else ' ') }}"
        + ASKS
        + "{{ 'ASSISTANT: ' }}{% endif %}",
        None,
        "<s>",
    ),
    "Phi 3": (
        EACH
        + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        + ASKS
        + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        None,
    ),
    "Phi 4": (
        EACH + "{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}{% else %}"
        "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}"
        "{% if m['role'] == 'user' %}<|im_start|>assistant<|im_sep|>{% endif %}{% endif %}{% endfor %}",
        ["<|im_start|>", "<|im_sep|>", "<|im_end|>"],
        None,
    ),
    "Gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + EACH
        + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
        + ASKS
        + "{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
        "<bos>",
    ),
    "parts only": (
        EACH
        + "<|im_start|>{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        "<|im_end|>" + ASKS + "<|im_start|>assistant:{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        None,
    ),
}
ANSWERS = [
    "A fox.",
    "東京",
    "42",
    '"Yes", she said.',
    "  two spaces",
    "\nfirst a line",
    "and last ",
    "ASSISTANT: x",
    "user\n",
    "<think>",
    "\n\n\n1. a",
    "é",
    "🦊!",
]


def own(family: str):
    jinja_text, specials, bos = FAMILIES[family]
    if specials is None:
        tokenizer = tiny_tokenizer()
    else:
        tokenizer = byte_level("", [*([bos] if bos else ["<unk>"]), *specials], bos)
    if family == "Phi 3":  # its tokens swallow the white space behind them
        tokenizer.add_tokens([AddedToken(t, rstrip=True, normalized=False) for t in specials], special_tokens=True)
        tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = jinja_text
    return tokenizer


def chatml_llama():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def legacy():
    return AutoTokenizer.from_pretrained(tiny_tokenizer().name_or_path, legacy=True)


def silent():
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = False
    return tokenizer


smol = cache(smollm2)
CASES = {
    "v1": (tiny_tokenizer, "v1"),
    "v1, legacy": (legacy, "v1"),
    "v1, no BOS": (silent, "v1"),
    "llava_llama_2": (tiny_tokenizer, "llava_llama_2"),
    "llava_llama_2, legacy": (legacy, "llava_llama_2"),
    "chatml on Llama": (chatml_llama, "chatml"),
    "chatml, SmolLM2": (smol, "chatml"),
    "chatml on bytes": (lambda: own("Qwen 2.5"), "chatml"),
    "SmolLM2": (smol, "chat_template"),
    **{name: (lambda name=name: own(name), "chat_template") for name in FAMILIES},
}
PLAIN = {
    "plain": tiny_tokenizer,
    "plain, legacy": legacy,
    "plain, no BOS": silent,
    "plain on bytes": lambda: own("Qwen 2.5"),
    "plain, SmolLM2": smol,
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    make, name = CASES[request.param]
    tokenizer = make()
    image = add_image_token(tokenizer)
    return get_template(name, tokenizer, DAY), Encoder(tokenizer, image, 1, 4096)


def conversation(answers: list[str], image: int | None = 0, bare: bool = False) -> list[dict]:
    "Turns as records have them; the image in question number `image`, which says nothing else if it is bare"
    turns = []
    for k, answer in enumerate(answers):
        question = (
            IMAGE_TOKEN if bare and k == image else f"{IMAGE_TOKEN}\nWhat is it, {k}?" if k == image else f"And {k}?"
        )
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return normalise({"conversations": turns} | ({} if image is None else {"image": "x"}))


SHAPES = (
    [conversation([a], (0, None)[k % 2]) for k, a in enumerate(ANSWERS)]
    + [conversation(ANSWERS[k : k + 3], (None, 0, 1)[k % 3]) for k in range(0, 11, 2)]
    + [conversation(["A fox.", "Yes."], 0, True), conversation(["A fox."], 0, True)]
)


def as_messages(turns: list[dict], parts: bool) -> list[dict]:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    found = []
    for turn in turns:
        text = (
            turn["value"].removeprefix(f"{IMAGE_TOKEN}\n").removeprefix(IMAGE_TOKEN)
            if turn.get("image") and parts
            else turn["value"]
        )
        content = [
            *([{"type": "image"}] if turn.get("image") else []),
            *([{"type": "text", "text": text}] if text else []),
        ]
        found.append({"role": roles[turn["from"]], "content": content if parts else text})
    return found


def test_a_prompt_ends_where_learning_begins(case):
    template, encoder = case
    for turns in SHAPES:
        whole = encoder(template.segments(turns))
        for k in range(1, len(turns), 2):
            prompt = encoder(template.prompt(turns[:k])).input_ids
            assert whole.input_ids[: len(prompt)] == prompt, turns
            assert whole.labels[len(prompt)] != IGNORE_INDEX and whole.labels[len(prompt) - 1] == IGNORE_INDEX, turns


def test_the_jinja_writes_the_training_s_ids_and_mask(case):
    template, encoder = case
    tokenizer = encoder.tokenizer
    tokenizer_template, text = tokenizer.chat_template, jinja(template, encoder)
    for turns in SHAPES:
        answers = [t["value"] for t in turns if t["from"] == "gpt"]
        if any(token in answer for token in tokenizer.get_added_vocab() for answer in answers):
            continue  # to a stranger's tokenizer it is one
        plain_answers = all(answer == answer.strip() for answer in answers)
        whole = encoder(template.segments(turns))
        for parts in (False, True):
            messages = as_messages(turns, parts)
            for k in range(1, len(turns), 2):
                if k > 1 and not plain_answers:
                    continue  # an earlier answer of this kind is broken where it was learned
                asked = tokenizer.apply_chat_template(
                    messages[:k], chat_template=text, add_generation_prompt=True
                ).input_ids
                assert asked == encoder(template.prompt(turns[:k])).input_ids, (
                    turns[:k],
                    tokenizer.convert_ids_to_tokens(asked),
                )
            if not plain_answers:
                continue
            made = tokenizer.apply_chat_template(
                messages, chat_template=text, return_assistant_tokens_mask=True, return_dict=True
            )
            assert made["input_ids"] == whole.input_ids
            assert made["assistant_masks"] == [int(label != IGNORE_INDEX) for label in whole.labels]
    assert tokenizer.chat_template == tokenizer_template


def test_a_system_prompt_of_one_s_own(case):
    template, encoder = case
    turns = [{"from": "system", "value": "Answer in one word."}, *conversation(["A fox.", "Yes."])]
    if template.system is None:
        with pytest.raises(ValueError, match="takes no system prompt"):
            template.segments(turns)
        with pytest.raises(Exception, match="takes no system message"):
            encoder.tokenizer.apply_chat_template(as_messages(turns, False), chat_template=jinja(template, encoder))
        return
    whole = encoder(template.segments(turns)).input_ids
    for parts in (False, True):
        assert (
            encoder.tokenizer.apply_chat_template(
                as_messages(turns, parts), chat_template=jinja(template, encoder)
            ).input_ids
            == whole
        )
    assert "Answer in one word." in encoder.tokenizer.decode(whole) and VICUNA_BEGINS not in encoder.tokenizer.decode(
        whole
    )


VICUNA_BEGINS = "A chat between"


def test_a_saved_template_taken_apart_again_is_the_same(case):
    template, encoder = case
    text, own_text = jinja(template, encoder), encoder.tokenizer.chat_template
    try:
        encoder.tokenizer.chat_template = text
        again = get_template(
            "chat_template", encoder.tokenizer, date(2001, 1, 1)
        )  # another day: this one is written down
    finally:
        encoder.tokenizer.chat_template = own_text
    for turns in SHAPES:
        assert encoder(again.segments(turns)) == encoder(template.segments(turns))
    assert again.strips == template.strips and (again.system is None) == (template.system is None)


@pytest.mark.parametrize("name", PLAIN)
def test_captions(name):
    tokenizer = PLAIN[name]()
    encoder, template = Encoder(tokenizer, add_image_token(tokenizer), 1, 4096), TEMPLATES["plain"]
    text = jinja(template, encoder)
    for caption in ("a fox", "東京", " spaced", '"42"'):
        turns = normalise(
            {
                "image": "x",
                "conversations": [
                    {"from": "human", "value": "<image>\nDescribe it."},
                    {"from": "gpt", "value": caption},
                ],
            }
        )
        whole = encoder(template.segments(turns))
        made = tokenizer.apply_chat_template(
            as_messages(turns, True), chat_template=text, return_assistant_tokens_mask=True, return_dict=True
        )
        assert made["input_ids"] == whole.input_ids
        assert made["assistant_masks"] == [int(label != IGNORE_INDEX) for label in whole.labels]
        asked = tokenizer.apply_chat_template(
            as_messages(turns[:1], True), chat_template=text, add_generation_prompt=True
        ).input_ids
        assert asked == encoder(template.prompt(turns[:1])).input_ids == whole.input_ids[: len(asked)]
    with pytest.raises(Exception, match="a caption of one image"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], chat_template=text)
