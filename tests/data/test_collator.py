import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.data.sources.values import as_page
from idefics_lit.errors import InputError
from idefics_lit.pretrained import load_processor

FAKE, IMAGE, END = 32000, 32001, 32002
PAGE = Image.new("L", (1706, 2198), 255)


@pytest.fixture(scope="module")
def processor(hub_files):
    return load_processor(str(hub_files))


@pytest.fixture(scope="module")
def small(tiny):
    return load_processor(tiny)


def example(question="What is the date?", *answers, images=1, **kwargs):
    page = Image.new("L", (448, 336), 255)
    return Example(kwargs.pop("question_id", 1), question, [page] * images, list(answers), **kwargs)


def test_ids_and_labels_of_a_whole_example(processor):
    batch = Idefics2Collator(processor, train=True)([Example(1, "What is the date?", [PAGE], ["July 4, 1976"])])
    prompt = [
        *[1, 1247, 28747, 26307, 15643, 28723],  # <s> User: Answer briefly.
        *[FAKE, *[IMAGE] * 64, FAKE],
        *[1824, 349, 272, 3608, 28804, END],  # What is the date?<end_of_utterance>
        *[28705, 13, 7226, 11143, 28747],  # \nAssistant:
    ]
    answer = [4398, 28705, 28781, 28725, 28705, 28740, 28774, 28787, 28784, END]  # July 4, 1976<end_of_utterance>
    padding = -len(prompt + answer) % 16
    assert batch.input_ids.tolist() == [prompt + answer + [0] * padding]
    assert batch.attention_mask.tolist() == [[1] * len(prompt + answer) + [0] * padding]
    assert batch.labels.tolist() == [[-100] * len(prompt) + answer + [-100] * padding]
    assert batch.pixel_values.shape == (1, 1, 3, 980, 760)
    assert batch.pixel_attention_mask.all()


@pytest.mark.parametrize("style", ["recipe", "idefics"])
@pytest.mark.parametrize("pretrained", ["hub", "random", "tiny"])
def test_ids_are_those_of_the_processor(hub_files, tiny, pretrained, style):
    processor = load_processor({"hub": str(hub_files), "random": tiny, "tiny": "tiny"}[pretrained])
    collate = Idefics2Collator(processor, train=False, prompt_style=style)
    for question in ("What?", " What?", "\u2581What?", "\u2581 What?", "<b>?", "\u00e9", "7", "\ue000"):
        for pages in (1, 2):
            asked = example(question, "So", images=pages)
            (expected,) = processor(text=[collate.prompt(asked)], images=[asked.images])["input_ids"]
            assert collate([asked]).prompts.input_ids.tolist() == [expected], question


def test_idefics_prompt(processor):
    batch = Idefics2Collator(processor, train=True, prompt_style="idefics")([Example(1, "Why?", [PAGE], ["So"])])
    text = processor.tokenizer.decode(batch.input_ids[batch.attention_mask == 1])
    assert text.startswith("<s> User:<fake_token_around_image><image>")
    assert text.endswith(
        "<image><fake_token_around_image> Why?\nGive a very brief answer.<end_of_utterance> \n"
        "Assistant: So<end_of_utterance>"
    )


def test_image_splitting(hub_files):
    collate = Idefics2Collator(load_processor(str(hub_files), image_splitting=True), train=True)
    batch = collate([Example(1, "What is the date?", [PAGE], ["July 4, 1976"])])
    assert (batch.input_ids == IMAGE).sum() == 320
    assert (batch.input_ids == FAKE).sum() == 6
    assert batch.pixel_values.shape == (1, 5, 3, 980, 760)


def test_labels_token_by_token_in_a_batch(small):
    examples = [example("Who?", "Ann"), example("What is the total amount due?", "$ 3.50", question_id=2)]
    tokens = small.tokenizer
    for train in (True, False):
        batch = Idefics2Collator(small, train=train)(examples)
        for ids, mask, labels, answer in zip(
            batch.input_ids, batch.attention_mask, batch.labels, ("Ann", "$ 3.50"), strict=True
        ):
            kept = labels != -100
            assert tokens.decode(labels[kept]) == f" {answer}<end_of_utterance>"
            assert (ids[kept] == labels[kept]).all()
            assert mask[0] == 1
            assert kept.nonzero().max() == mask.nonzero().max()  # the answer stands last
        labels = batch.labels
        assert torch.equal(labels.flatten()[batch.supervised_positions + 1], labels[labels != -100])
    prompts = batch.prompts.input_ids, batch.prompts.attention_mask
    for ids, mask in zip(*prompts, strict=True):
        assert mask[-1] == 1
        assert tokens.decode(ids[mask.bool()]).endswith("<end_of_utterance>\nAssistant:")


def test_training_on_the_prompt_leaves_out_padding_and_image_tokens(small):
    batch = Idefics2Collator(small, train=True, train_on_prompt=True)(
        [example("Who?", "Ann"), example("Who is it?", "B")]
    )
    images = torch.isin(batch.input_ids, torch.tensor([small.image_token_id, 3]))
    assert (batch.labels[images] == -100).all()
    assert (batch.labels[batch.attention_mask == 0] == -100).all()
    assert (batch.labels[~images & (batch.attention_mask == 1)] != -100).all()


def test_several_pages_a_question(small):
    batch = Idefics2Collator(small, train=True)(
        [example("Who?", "Ann", images=3), example("Who?", "Bob", question_id=2)]
    )
    assert (batch.input_ids == small.image_token_id).sum(dim=1).tolist() == [192, 64]
    assert batch.pixel_values.shape[:2] == (2, 3)


def test_the_answer_drawn_is_a_function_of_seed_epoch_and_question(small):
    def draw(epoch, seed=0):
        collate = Idefics2Collator(small, train=True, seed=seed)
        examples = [example("Who?", "a", "b", "c", question_id=i, epoch=epoch) for i in range(16)]
        return collate(examples).labels.tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0) != draw(0, seed=1)


def test_without_an_epoch_torch_draws(small):
    collate = Idefics2Collator(small, train=True)
    examples = [example("Who?", "a", "b", "c", question_id=i) for i in range(16)]
    torch.manual_seed(0)
    first, second = collate(examples).labels.tolist(), collate(examples).labels.tolist()
    torch.manual_seed(0)
    assert collate(examples).labels.tolist() == first != second


@pytest.mark.parametrize("later", [False, True], ids=["given", "set later"])
def test_a_text_is_one_answer_and_no_list_of_characters(small, later):
    made = Example(1, "How many?", [PAGE], "3 apples", "count")
    if later:
        made.answers, made.question_types, made.images = "3 apples", "count", PAGE
    ids = Idefics2Collator(small, train=True)([made])
    labels = ids.labels[ids.labels >= 0]
    assert small.tokenizer.decode(labels, skip_special_tokens=True).strip() == "3 apples"
    batch = Idefics2Collator(small, train=False)([Example(1, "How many?", PAGE, "3 apples", "count")])
    assert (batch.prompts.references, batch.prompts.question_types) == ([["3 apples"]], [["count"]])


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("answers", b"3", r"row 5: answers: bytes b'3' is not a list of strings"),
        ("answers", {"3": 1}, "row 5: answers: dict .*is not a list of strings"),
        ("answers", {"3"}, "row 5: answers: set .*is not a list of strings"),
        ("answers", 3, "row 5: answers: int 3 is not a list of strings"),
        ("answers", None, "row 5: answers: NoneType None is not a list of strings"),
        ("answers", ["3", 3], "row 5: answers: int 3 is not a string: give a list of strings"),
        ("answers", [["3"]], "row 5: answers: list .* is not a string"),
        ("question_types", {"form": 1}, "row 5: question_types: dict"),
        ("question", ["Who?"], "row 5: the question is list: give a text"),
        ("question", 5, "row 5: the question is int: give a text"),
        ("question_id", 5.5, "row 5: the id is float: give an int or a text"),
        ("images", "page.png", "row 5: images holds str: give decoded images"),
        ("images", ["page.png"], "row 5: images holds str: give decoded images"),
    ],
)
def test_what_is_no_text_or_image_is_named(small, part, value, message):
    good = {"question_id": 1, "question": "Who?", "images": [PAGE], "answers": ["3"], "source": "row 5"}
    with pytest.raises(InputError, match=message):
        Example(**{**good, part: value})
    made = Example(**good)
    setattr(made, part, value)
    for train in (False, True):
        with pytest.raises(InputError, match=message):
            Idefics2Collator(small, train=train)([made])


def test_evaluation_keeps_all_references_and_does_without(small):
    batch = Idefics2Collator(small, train=False)([example("Who?", "a", "b"), example("Who?", question_id="x")])
    assert batch.prompts.references == [["a", "b"], []]
    assert batch.question_ids == [1, "x"]
    assert (batch.labels[1] == -100).all()


@pytest.mark.parametrize(
    "bad, message",
    [
        (example("Who?", source="row 3"), "row 3: no answer"),
        (
            example("Who <image>?", "a", source="row 3"),
            "row 3: 'Who <image>\\?' holds one of the model's special tokens",
        ),
        (example("Who?", "a</s>", source="row 3"), "special tokens"),
        (example("Who? " * 500, "a", source="row 3"), "row 3: .* tokens are more than 2048"),
        (example("Who?", "a", images=0, source="row 3"), "row 3: it has no page"),
    ],
)
def test_bad_examples_are_named(small, bad, message):
    with pytest.raises(InputError, match=message):
        Idefics2Collator(small, train=True)([example("Who?", "a"), bad])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_image_mode(small, mode):
    image = example("Who?", "a")
    image.images = [Image.new(mode, (448, 336))]
    assert Idefics2Collator(small, train=True)([image]).pixel_values.shape == (1, 1, 3, 336, 448)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(question=st.text(min_size=1), answer=st.text())
def test_the_prompt_is_an_exact_prefix(processor, question, answer):
    """The labels are found by the difference of two lengths: the ids of the prompt must not depend on the answer."""
    collate = Idefics2Collator(processor, train=True)
    if any(token in question + answer for token in collate.special_tokens):
        return
    tokens = collate.tokenize([example(question, answer)])
    ((prompt,), (whole,)) = tokens.prompt_ids, tokens.full_ids
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == END


def test_an_answer_on_a_page_that_the_question_does_not_have_is_named(small):
    warning = r"question 7: its answer is on page 5, counted from 0, but it has 1: .* left out"
    with pytest.warns(UserWarning, match=warning):
        batch = Idefics2Collator(small, train=False)([example("Q?", "a", question_id=7, answer_page=5)])
    assert batch.prompts.reference_pages == [None]
    with pytest.raises(ValueError, match="holds '-3' where the number of a page should be"):
        as_page(-3)


@pytest.mark.parametrize("change", ["", " | upper"])
@pytest.mark.parametrize("style", ["recipe", "idefics"])
def test_texts_are_those_of_the_chat_template(processor, style, change):
    changed = copy.deepcopy(processor)
    changed.chat_template = processor.chat_template.replace("line['text']", f"line['text']{change}")
    assert not change or changed.chat_template != processor.chat_template
    collate = Idefics2Collator(changed, train=True, prompt_style=style)
    texts = ["Plain?", "{{ 1 + 1 }} {% if %}", "{0} %s \\n $1", "a\n  b\t", "\ue000\ue001", "é 名前 \u2028", "'\"<b>"]
    for pages in (1, 2):
        for question in texts:
            for answer in texts:
                example = Example(0, question, [Image.new("L", (40, 30))] * pages, [answer])
                text = {"type": "text"}
                asked = [{"type": "image"}] * pages + [{**text, "text": question.strip()}]
                if style == "recipe":
                    asked.insert(0, {**text, "text": "Answer briefly."})
                else:
                    asked[-1]["text"] += "\nGive a very brief answer."
                turns = [{"role": "user", "content": asked}]
                prompt = changed.apply_chat_template(turns, add_generation_prompt=True)
                assert collate.prompt(example) == prompt.strip()
                turns.append({"role": "assistant", "content": [{**text, "text": answer.strip()}]})
                whole = changed.tokenizer(changed.apply_chat_template(turns).strip()).input_ids
                (ids,) = collate.tokenize([example]).full_ids
                assert whole[-len(ids) :] == ids
