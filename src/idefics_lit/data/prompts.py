"""Prompts: questions and answers in the model's own chat template."""

from typing import TYPE_CHECKING, Any, Literal

from idefics_lit.pretrained import quiet_transformers

if TYPE_CHECKING:
    from transformers import ProcessorMixin

PromptStyle = Literal["recipe", "idefics"]
PLACEHOLDERS = ("\ue000", "\ue001")  # of question and answer: characters that Unicode leaves to programs
PROBE = "Aé  <&>\"'\\n\n{{ x }} {% 1"  # a template that changes texts, such as by escaping, changes it


class PromptTemplate:
    """Apply a processor's chat template.

    Args:
        processor: the processor.
        prompt_style: see `idefics_lit.Idefics2Collator`.
    """

    def __init__(self, processor: "ProcessorMixin", prompt_style: PromptStyle) -> None:
        self.processor, self.prompt_style = processor, prompt_style
        self._frames: dict[tuple[int, bool], str] = {}  # rendered templates, by number of pages and lack of an answer

    def text(self, pages: int, question: str, answer: str | None) -> str:
        """Return the complete assistant's turn with an answer, its opening without; one ``<image>`` for each page."""
        key = pages, answer is None
        if key not in self._frames:
            self._frames[key] = self._render(pages, *PLACEHOLDERS[: 1 if answer is None else 2])
            probe = None if answer is None else PROBE
            if _fill(self._frames[key], PROBE, probe) != self._render(pages, PROBE, probe):
                self._frames[key] = ""
        return _fill(self._frames[key], question, answer) or self._render(pages, question, answer)

    def _render(self, pages: int, question: str, answer: str | None = None) -> str:
        images = [{"type": "image"}] * pages
        if self.prompt_style == "recipe":
            content = [_text_part("Answer briefly."), *images, _text_part(question)]
        else:
            content = [*images, _text_part(f"{question}\nGive a very brief answer.")]
        messages: list[Any] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [_text_part(answer)]})
        with quiet_transformers():  # SmolVLM2's processor warns of its own arguments in transformers before 5.24
            text = self.processor.apply_chat_template(messages, add_generation_prompt=answer is None)
        return str(text).strip()


def _fill(frame: str, question: str, answer: str | None) -> str:
    """Put texts in the place of `PLACEHOLDERS`: rendering the template for each text is a hundred times slower."""
    before, _, rest = frame.partition(PLACEHOLDERS[0])
    between, _, after = rest.partition(PLACEHOLDERS[1])
    return f"{before}{question}{between}{answer or ''}{after}" if frame else ""


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
