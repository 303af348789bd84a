"""What mkdocs does with docs/ besides: sections of other files, links out of docs/, and the keys of every config.

- A paragraph that is nothing but a link to a Markdown file outside docs/, or to a section of one, becomes its text.
- A link to another file of the repository leads to a page that shows it, one to a config to where that is shown.
- configs.md gets the shipped configs and the command line's keys where it says so.
"""

import json
import os
import re
import textwrap
from argparse import SUPPRESS
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import Namespace, capture_parser
from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from idefics_lit.cli.main import main
from idefics_lit.cli.parser import COMMAND_OPTIONS, COMMANDS, OPTION_GROUPS, TRAINER_HELP

ROOT = Path(__file__).resolve().parents[1]
DOCS, CONFIGS = ROOT / "docs", ROOT / "configs"
SHOWN = "repository"  # the site's folder of pages that show other files
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
PARAGRAPH = re.compile(r"^\[[^]]+\]\((/[^)\s#]+\.md)(#[^)\s]+)?\)$", flags=re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that its pages link to, and those that these link to."""
    pages = sorted(DOCS.glob("*.md"))
    for page in pages:
        for path in (Path(link[1]) for link in LINK.finditer(_text(page)) if link[1].startswith("/")):
            place = _place(path)
            if not place.startswith(SHOWN) or files.get_file_from_path(place):
                continue
            if path.suffix in (".png", ".svg"):
                files.append(File.generated(config, place, abs_src_path=str(path)))
                continue
            if path.suffix == ".md":
                pages.append(path)
            shown = f"# {path.name}\n\n`{path.relative_to(ROOT)}`\n\n{_block(path.suffix[1:], path.read_text())}"
            files.append(File.generated(config, place, content=shown, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what the page includes, and let its links lead to pages of the site."""
    place = page.file.src_uri
    source = ROOT / place.removeprefix(f"{SHOWN}/") if place.startswith(SHOWN) else DOCS / place
    if not source.is_file():  # a page that shows code
        return markdown
    markdown = _text(source)
    if place == "configs.md":
        markdown = markdown.replace("<!-- configs -->", "\n".join(_configs()))
        markdown = markdown.replace("<!-- keys -->", "\n".join(_keys()))

    def lead(link: re.Match[str]) -> str:
        if not link[1].startswith("/"):
            return link[0]
        return f"]({os.path.relpath(_place(Path(link[1])), os.path.dirname(place) or '.')}{link[2] or ''})"

    return LINK.sub(lead, markdown)


def _text(path: Path) -> str:
    """Return a Markdown file with what it includes; links to files of the repository are absolute paths."""

    def absolute(link: re.Match[str]) -> str:
        target = (path.parent / link[1]).resolve()
        return f"]({target}{link[2] or ''})" if target.is_file() and target.is_relative_to(ROOT) else link[0]

    def included(link: re.Match[str]) -> str:
        target = Path(link[1])
        return link[0] if target.is_relative_to(DOCS) else _section(_text(target), link[2])

    return PARAGRAPH.sub(included, LINK.sub(absolute, path.read_text()))


def _section(text: str, anchor: str | None) -> str:
    """Return what stands between a heading and the next one; without an anchor all below the first heading."""
    lines = text.splitlines()
    fenced, start = False, None
    for number, line in enumerate(lines):
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"#+ (.*)", line)
        if heading and start is not None and anchor:
            return "\n".join(lines[start:number])
        if heading and start is None and anchor in (None, f"#{slugify(heading[1], '-')}"):
            start = number + 1
    if start is None:
        raise ValueError(f"no section {anchor}")
    return "\n".join(lines[start:])


def _place(path: Path) -> str:
    """Return where the site has a file of the repository."""
    if path.is_relative_to(DOCS):
        return str(path.relative_to(DOCS))
    if path.is_relative_to(CONFIGS):
        return f"configs.md#{slugify(str(path.relative_to(CONFIGS)), '-')}"
    return f"{SHOWN}/{path.relative_to(ROOT)}{'' if path.suffix in ('.md', '.png', '.svg') else '.md'}"


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


def _configs() -> Iterator[str]:
    """Each config: what is typed, what it is for, and its keys with their comments."""
    for path in sorted(CONFIGS.rglob("*.yaml"), key=lambda path: (len(path.parts), path.name != "docvqa.yaml", path)):
        head, _, body = path.read_text().partition("\n\n")
        command, *why = head.replace("\n#", "\n").removeprefix("# ").splitlines()
        yield f"### {path.relative_to(CONFIGS)}\n\n{_block('bash', command)}"
        yield re.sub(r"docs/(\w+\.md)", r"[\1](\1)", textwrap.dedent("\n".join(why))) + "\n"
        yield _block("yaml", body)


def _keys() -> Iterator[str]:
    """Each command with its own options, and the keys of a fit, which all have."""
    yield "### Commands\n"
    for command, meaning in COMMANDS.items():
        own = "".join(f" `--{option}`: {how['help']}." for option, how in COMMAND_OPTIONS.get(command, {}).items())
        yield f"`{command}`\n:   {meaning}{own}\n"
    fit = capture_parser(main, ["fit"])._subcommands_action.choices["fit"]
    actions = [action for action in fit._actions if action.default != SUPPRESS]
    keys = {action.dest: action for action in actions if action.dest not in OPTION_GROUPS}
    for title, chosen in {
        "The run": [key for key in keys if "." not in key],
        "The model": [key for key in keys if re.fullmatch(r"model\.\w+", key)],
        "The adapter": [key for key in keys if key.startswith("model.lora.")],
        "The data": [key for key in keys if key.startswith("data.")],
        "The Trainer, most used": [f"trainer.{name}" for name in TRAINER_HELP],
        "The Trainer, more": [key for key in keys if key.startswith("trainer.") and key[8:] not in TRAINER_HELP],
    }.items():
        yield f"### {title}\n"
        for key in chosen:
            type_, default = _type(getattr(keys[key], "_typehint", str)), _default(keys[key].default)
            meaning = TRAINER_HELP.get(key.removeprefix("trainer."), keys[key].help)
            meaning = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(meaning.split()))  # Lightning's reStructuredText
            yield f"`{key}`: {type_}{default}\n:   {meaning}\n"


def _type(hint: Any) -> str:  # noqa: ANN401
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    parts = [_type(part) for part in get_args(hint)]
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(parts))
    name = "null" if hint is NoneType else getattr(hint, "__name__", str(hint)).lower()
    return f"{name} of {' and '.join(parts)}" if parts else name


def _default(value: Any) -> str:  # noqa: ANN401
    if value in (None, ""):
        return ""
    value = value.class_path if isinstance(value, Namespace) else value
    return f", default `{value if isinstance(value, str) else json.dumps(value)}`"
