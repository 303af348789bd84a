"""Hooks of mkdocs: include sections of other files, rewrite links to them, and generate the lists of configs and keys.

- A paragraph that consists of one link to a Markdown file outside docs/, or to a section of it, becomes that text.
- A link to another file of the repository leads to a page that shows the file; links to configs lead to configs.html.
- In configs.md, ``<!-- configs -->`` and ``<!-- keys -->`` become the shipped configs and the keys of the command line.
"""

import json
import os
import re
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, capture_parser
from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from idefics_lit.cli.main import main
from idefics_lit.cli.parser import TRAINER_HELP

ROOT = Path(__file__).resolve().parents[1]
DOCS, CONFIGS = ROOT / "docs", ROOT / "configs"
REPOSITORY = "repository"  # the folder of the site for pages that show files outside docs/
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
INCLUDE = re.compile(r"^\[[^]]+\]\((/[^)\s#]+\.md)(#[^)\s]+)?\)$", flags=re.MULTILINE)
IMAGES = (".png", ".svg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, directly or through another Markdown file."""
    pages = sorted(DOCS.glob("*.md"))
    for page in pages:  # grows while Markdown files outside docs/ are found
        for path in (Path(link[1]) for link in LINK.finditer(_read(page)) if link[1].startswith("/")):
            uri = _site_path(path)
            if not uri.startswith(REPOSITORY) or files.get_file_from_path(uri):
                continue
            if path.suffix in IMAGES:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
                continue
            if path.suffix == ".md":
                pages.append(path)
            content = f"# {path.name}\n\n`{path.relative_to(ROOT)}`\n\n{_block(path.suffix[1:], path.read_text())}"
            files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Expand what a page includes and rewrite its links to pages of the site."""
    uri = page.file.src_uri
    source = ROOT / uri.removeprefix(f"{REPOSITORY}/") if uri.startswith(REPOSITORY) else DOCS / uri
    if not source.is_file():  # a generated page that shows code
        return markdown
    markdown = _read(source)
    if uri == "configs.md":
        markdown = markdown.replace("<!-- configs -->", "\n".join(_configs()))
        markdown = markdown.replace("<!-- keys -->", "\n".join(_keys()))

    def relative(link: re.Match[str]) -> str:
        if not link[1].startswith("/"):
            return link[0]
        return f"]({os.path.relpath(_site_path(Path(link[1])), os.path.dirname(uri) or '.')}{link[2] or ''})"

    return LINK.sub(relative, markdown)


def _read(path: Path) -> str:
    """Return a Markdown file with included sections and with absolute paths in links to files of the repository."""

    def absolute(link: re.Match[str]) -> str:
        target = (path.parent / link[1]).resolve()
        return f"]({target}{link[2] or ''})" if target.is_file() and target.is_relative_to(ROOT) else link[0]

    def include(link: re.Match[str]) -> str:
        target = Path(link[1])
        return link[0] if target.is_relative_to(DOCS) else _section(_read(target), link[2])

    return INCLUDE.sub(include, LINK.sub(absolute, path.read_text()))


def _section(text: str, anchor: str | None) -> str:
    """Return the text between a heading and the next heading; without an anchor all text after the first heading."""
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


def _site_path(path: Path) -> str:
    """Return the path on the site of a file of the repository."""
    if path.is_relative_to(DOCS):
        return str(path.relative_to(DOCS))
    if path.is_relative_to(CONFIGS):
        return f"configs.md#{slugify(str(path.relative_to(CONFIGS)), '-')}"
    return f"{REPOSITORY}/{path.relative_to(ROOT)}{'' if path.suffix in ('.md', *IMAGES) else '.md'}"


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


def _configs() -> Iterator[str]:
    """Yield each config: its command, its purpose, and its keys with their comments."""
    for path in sorted(CONFIGS.rglob("*.yaml"), key=lambda path: (len(path.parts), path.name != "docvqa.yaml", path)):
        head, _, body = path.read_text().partition("\n\n")
        command, *purpose = head.replace("\n#", "\n").removeprefix("# ").splitlines()
        yield f"### {path.relative_to(CONFIGS)}\n\n{_block('bash', command)}"
        yield re.sub(r"docs/(\w+\.md)", r"[\1](\1)", textwrap.dedent("\n".join(purpose))) + "\n"
        yield _block("yaml", body)


def _keys() -> Iterator[str]:
    """Yield each command with its own options, then the keys of a fit, which all commands have."""
    # With a config, which may name any command, the parsers of all commands have their options. jsonargparse has no
    # public access to them.
    parsers: dict[str, ArgumentParser] = capture_parser(main, ["--config"])._subcommands_action.choices
    keys = _options(parsers["fit"])
    yield "### Commands\n"
    for command, parser in parsers.items():
        own = "".join(f" `--{key}`: {option.help}." for key, option in _options(parser).items() if key not in keys)
        yield f"`{command}`\n:   {parser.description}{own}\n"
    most_used = [f"trainer.{name}" for name in TRAINER_HELP]
    for title, group in {
        "The run": [key for key in keys if "." not in key],
        "The model": [key for key in keys if re.fullmatch(r"model\.\w+", key)],
        "The adapter": [key for key in keys if key.startswith("model.lora.")],
        "The data": [key for key in keys if key.startswith("data.")],
        "The Trainer, most used": most_used,
        "The Trainer, more": [key for key in keys if key.startswith("trainer.") and key not in most_used],
    }.items():
        yield f"### {title}\n"
        for key in group:
            type_, default = _type(getattr(keys[key], "_typehint", str)), _default(keys[key].default)
            text = TRAINER_HELP.get(key.removeprefix("trainer."), keys[key].help)
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split()))  # Lightning's reStructuredText
            yield f"`{key}`: {type_}{default}\n:   {text}\n"


def _options(parser: ArgumentParser) -> dict[str, Action]:
    """Return the options of a command without groups of options, linked ones and those that only print."""
    options = {option.dest: option for option in parser._actions if option.default != SUPPRESS}
    settable = {*parser.get_defaults().keys()}  # without groups and linked options
    return {key: option for key, option in options.items() if key in settable or key == "trainer.logger"}


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
