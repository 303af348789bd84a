"""The collator with the processors of Idefics3-8B, SmolVLM and SmolVLM2, against the processors alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.data.image_layout import count_images
from idefics_lit.data.pixels import PageProcessor
from idefics_lit.errors import InputError
from idefics_lit.pretrained import load_processor

PAGE = Image.linear_gradient("L").resize((1706, 2198))
WIDE = Image.radial_gradient("L").resize((900, 300))
SMALL = Image.linear_gradient("L").resize((60, 40))
QUESTION = "Is it  5 ½ inches, 12.80 € or 007?"
PAGE_TOKENS = {  # of PAGE, with splitting and without; from the specification of each model
    "Idefics3-8B-Llama3": (None, None),  # another vocabulary in these tests: tags have more tokens
    "SmolVLM-Instruct": (1548, 88),
    "SmolVLM-256M-Instruct": (1127, 67),
    "SmolVLM2-2.2B-Instruct": (1416, 84),
    "SmolVLM2-256M-Video-Instruct": (1127, 67),
}


def text(words):
    return {"type": "text", "text": words}


def hub_inputs(processor, example, answer=None, style="recipe"):
    """Return a processor's own inputs for an example; with the newline after an answer's end."""
    images = [{"type": "image", "image": image} for image in example.images]
    content = [text("Answer briefly."), *images, text(example.question)]
    if style == "idefics":
        content = [*images, text(f"{example.question}\nGive a very brief answer.")]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [text(answer)]})
    return processor.apply_chat_template(
        messages, add_generation_prompt=answer is None, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.fixture(scope="module")
def processor(family_files):
    return load_processor(str(family_files))


@pytest.fixture(scope="module")
def name(family_files):
    return family_files.name


@pytest.fixture(scope="module")
def hub_processor(family_files):
    """The processor as others load it, but for the tokenizer, which transformers 5 breaks for SmolVLM."""
    processor = AutoProcessor.from_pretrained(family_files)
    processor.tokenizer = load_processor(str(family_files)).tokenizer
    return processor


@pytest.mark.parametrize("style", ["recipe", "idefics"])
@pytest.mark.parametrize("pages", [[PAGE], [PAGE, WIDE], [SMALL]], ids=["a page", "two pages", "small"])
def test_ids_and_pixels_are_those_of_the_hubs_processor(processor, hub_processor, pages, style):
    example = Example(1, QUESTION, pages, ["July 4, 1976"])
    collate = Idefics2Collator(processor, train=False, prompt_style=style, max_length=9000)
    batch = collate([example])
    whole, prompt = (hub_inputs(hub_processor, example, answer, style) for answer in ("July 4, 1976", None))
    assert batch.input_ids[batch.attention_mask == 1].tolist() == whole["input_ids"][0, :-1].tolist()
    assert batch.prompts.input_ids.tolist() == prompt["input_ids"].tolist()
    assert torch.equal(batch.pixel_values, whole["pixel_values"])
    assert torch.equal(batch.pixel_attention_mask, whole["pixel_attention_mask"].bool())
    gathered = batch.input_ids[batch.question_rows].gather(1, batch.prompts.gather_index)
    assert torch.equal(gathered, batch.prompts.input_ids)


def test_a_prompt_begins_with_one_bos(processor, hub_processor):
    tokenizer = processor.tokenizer
    for train in (True, False):
        batch = Idefics2Collator(processor, train=train)([Example(1, "Why?", [SMALL], ["So"])])
        assert (batch.input_ids[0] == tokenizer.bos_token_id).tolist() == [True] + [False] * (
            len(batch.input_ids[0]) - 1
        )
    prompt = hub_processor.apply_chat_template([{"role": "user", "content": [text("Why?")]}])
    assert prompt.startswith(tokenizer.bos_token)  # which the tokenizer of Idefics3-8B adds again


def test_tokens_of_a_page(processor, name, family_files):
    for splitting, tokens in zip((True, False), PAGE_TOKENS[name], strict=True):
        collate = Idefics2Collator(load_processor(str(family_files), image_splitting=splitting), train=True)
        batch = collate([Example(1, "Why?", [PAGE], ["So"])])
        ((start, stop),) = batch.page_spans[0]
        assert tokens in (None, stop - start)
        assert batch.page_images == [[17 if splitting else 1]]
        assert batch.pixel_values.shape[1] == (17 if splitting else 1)


def test_labels_token_by_token(processor):
    """Neither tags, as special tokens or as text, nor newlines between tiles, nor image tokens are labels."""
    example = Example(1, "What is the date?", [WIDE, WIDE], ["July 4"])
    answer = processor.tokenizer(" July 4<end_of_utterance>", add_special_tokens=False).input_ids
    batch = Idefics2Collator(processor, train=True, max_length=9000)([example])
    used = int(batch.attention_mask.sum())
    assert batch.labels[0].tolist() == [-100] * (used - len(answer)) + answer + [-100] * (len(batch.labels[0]) - used)

    batch = Idefics2Collator(processor, train=True, train_on_prompt=True, max_length=9000)([example])
    (first, second), used = batch.page_spans[0], int(batch.attention_mask.sum())
    assert first[1] == second[0]
    ids = batch.input_ids[0].tolist()
    padding = len(ids) - used
    expected = ids[: first[0]] + [-100] * (second[1] - first[0]) + ids[second[1] : used] + [-100] * padding
    assert batch.labels[0].tolist() == expected
    head, tail = processor.tokenizer.batch_decode([ids[: first[0]], ids[second[1] : used]])
    assert head.endswith("User: Answer briefly.")
    assert tail == "What is the date?<end_of_utterance>\nAssistant: July 4<end_of_utterance>"
    block = processor.tokenizer.decode(ids[first[0] : first[1]])
    assert block.startswith("<fake_token_around_image><row_1_col_1><image>")
    assert "<image>\n<fake_token_around_image><row_2_col_1><image>" in block
    assert "<image>\n\n<fake_token_around_image><global-img><image>" in block
    assert block.endswith("<image><fake_token_around_image>")


def test_questions_about_a_page_share_its_row(processor):
    """The page once, then each question as in a row of its own; evaluation finds its prompts in the row."""
    examples = [Example(i, f"What is {i}?", [WIDE], [f"it is {i}"], page_id=0) for i in range(3)]
    examples.append(Example(3, "Who?", [SMALL, WIDE], ["Ann"], page_id=1))
    collate = Idefics2Collator(processor, train=False, max_length=9000)
    batch = collate(examples)
    assert batch.question_rows == [0, 0, 0, 1]
    alone = [collate([example]) for example in examples]
    page = batch.page_spans[0][0][1]
    together = batch.input_ids[0][batch.attention_mask[0] == 1].tolist()
    apart = [one.input_ids[0][one.attention_mask[0] == 1].tolist() for one in alone]
    assert together == apart[0] + apart[1][page:] + apart[2][page:]
    for i, one in enumerate(alone):
        mask = batch.prompts.attention_mask[i].bool()
        assert batch.prompts.input_ids[i][mask].tolist() == one.prompts.input_ids[0].tolist()
        row = batch.input_ids[batch.question_rows[i]]
        assert torch.equal(row[batch.prompts.gather_index[i][mask]], batch.prompts.input_ids[i][mask])
        own = one.labels[0][one.labels[0] != -100]
        assert processor.tokenizer.decode(own) == f" {examples[i].answers[0]}<end_of_utterance>"
    assert [len(row) for row in batch.page_spans] == [len(row) for row in batch.page_images] == [1, 2]
    assert batch.image_keys[0] == batch.image_keys[1][batch.page_images[1][0] :]  # the same page in another row


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(question=st.text(min_size=1), answer=st.text())
def test_the_prompt_is_an_exact_prefix(processor, question, answer):
    collate = Idefics2Collator(processor, train=True)
    if any(token in question + answer for token in collate.special_tokens):
        return
    tokens = collate.tokenize([Example(1, question, [SMALL], [answer])])
    (prompt,), (full,) = tokens.prompt_ids, tokens.full_ids
    assert full[: len(prompt)] == prompt
    assert full[-1] == processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")


def test_tokens_are_those_of_the_hubs_file(processor, family_files):
    """transformers 5 drops the pre-tokenizer of the class that SmolVLM's files name, which splits digits."""
    words = "5 ½ inches,  12"
    file = Tokenizer.from_file(str(family_files / "tokenizer.json"))
    expected = file.encode(words, add_special_tokens=False).ids
    assert processor.tokenizer(words, add_special_tokens=False).input_ids == expected
    theirs = AutoProcessor.from_pretrained(family_files).tokenizer(words, add_special_tokens=False).input_ids
    assert (theirs != expected) == (family_files.name in ("SmolVLM-Instruct", "SmolVLM-256M-Instruct"))


@pytest.mark.parametrize(
    "size", [(1700, 2200), (2480, 3508), (1000, 1000), (900, 300), (500, 4000), (33, 31), (1, 900)]
)
def test_images_of_a_page_are_counted_without_processing_it(processor, size):
    images = processor.image_processor
    count = len(PageProcessor(images).process(Image.new("L", size)))
    assert count_images(images, size) == count
    assert count == {(1700, 2200): 17, (2480, 3508): 13, (900, 300): 9}.get(size, count)


def test_image_size(processor, family_files):
    tile = processor.image_processor.max_image_size["longest_edge"]
    for tiles, images in ((1, 1), (2, 5), (6, 31)):
        small = load_processor(str(family_files), image_size=tiles * tile)
        assert count_images(small.image_processor, PAGE.size) == images
        assert small.image_processor.size["longest_edge"] == tiles * tile
    for size in (tile + 1, 7 * tile):
        with pytest.raises(
            InputError, match=f"data.image_size {size}: choose from {tile}, {2 * tile}, .*{6 * tile}, the"
        ):
            load_processor(str(family_files), image_size=size)


def test_the_default_length_takes_a_page_and_its_question(processor):
    collate = Idefics2Collator(processor, train=True)
    square = Image.new("L", (999, 999))
    batch = collate([Example(1, "Why? " * 200, [square], ["So"])])
    assert batch.input_ids.shape[1] <= collate.max_length
    with pytest.raises(
        InputError, match=r"^row 7: \d+ tokens are more than \d+: shorten the question, or raise data.max"
    ):
        collate([Example(1, "Why? " * 2000, [square], ["So"], source="row 7")])


def test_a_missing_package_is_named(monkeypatch, tmp_path_factory):
    from hub_files import hub_folder
    from transformers.models.smolvlm import processing_smolvlm

    folder = hub_folder("SmolVLM2-256M-Video-Instruct", tmp_path_factory.mktemp("without") / "model")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(InputError, match=r"its processor needs `pip install num2words`$"):
        load_processor(str(folder))
