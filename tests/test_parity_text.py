"""Token ids, labels and pixels equal the reference's, record by record.

One difference is not ours to mend and is asserted as it is: the reference's slow tokenizer puts a space of its own before
every chunk, today's only before a chunk that has none. So where a chunk begins with a space, the reference's ids are ours
for the same chunk with one more space. Such records are recognised by that rule, never by their place in the file.
"""

from dataclasses import replace

import pytest
from goldens import conversations, golden_image, model_batches, tokenizer
from transformers import CLIPImageProcessorPil

from llava_nb.conversation import Segment, get_template, normalise
from llava_nb.imageproc import ImageTransform
from llava_nb.masking import Encoder

IMAGE, FEATURES = -200, 3
RECORDS = conversations()


def chunks_begin(segments: list[Segment]) -> list[int]:
    """Where the text chunks begin: at the front, and after each image."""
    return [k for k, s in enumerate(segments) if s.kind == "text" and (k == 0 or segments[k - 1].kind == "image")]


def encode(record: dict, slow_spaces: bool = False) -> tuple[list[int], list[int]]:
    """Our ids and labels, each run of placeholders collapsed to one -200; with the slow tokenizer's spaces if asked."""
    tok = tokenizer(record["legacy"])
    encoder = Encoder(tok, image_token_id=len(tok), image_seq_len=FEATURES, max_length=2048)
    turns = normalise({"conversations": record["conversations"]} | ({"image": "x"} if record["image"] else {}))
    segments = get_template(record["template"]).segments(turns)
    for k in chunks_begin(segments) if slow_spaces else ():
        if segments[k].text.startswith(" "):
            segments[k] = replace(segments[k], text=" " + segments[k].text)
    encoded = encoder(segments)
    inside = {p for start, end in encoded.image_spans for p in range(start + 1, end)}
    ids = [IMAGE if i == len(tok) else i for p, i in enumerate(encoded.input_ids) if p not in inside]
    return ids, [l for p, l in enumerate(encoded.labels) if p not in inside]


@pytest.mark.parametrize("index", range(len(RECORDS)))
def test_ids_and_labels(index):
    record = RECORDS[index]
    ours = encode(record)
    if ours[0] != record["input_ids"]:
        mended = encode(record, slow_spaces=True)
        assert mended != ours, "differs, and no chunk begins with a space"
        ours = mended
    assert ours == (record["input_ids"], record["labels"])


def test_few_records_need_the_exception():
    needed = sum(encode(r)[0] != r["input_ids"] for r in RECORDS)
    assert needed <= len(RECORDS) // 20


@pytest.mark.parametrize("name", model_batches())
def test_pixels(name):
    batch = model_batches()[name]
    transform = ImageTransform(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), batch["aspect"]
    )
    total = sum(float(transform(golden_image(*r["image"])).double().sum()) for r in batch["records"] if "image" in r)
    assert total == pytest.approx(batch["pixel_sum"], rel=1e-6)
