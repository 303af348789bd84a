"""The README and the pages of docs/: what they say can be typed, and the site that is built of them."""

import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from jsonargparse import capture_parser
from PIL import Image

from idefics_lit.cli.main import main
from idefics_lit.cli.parser import OPTION_GROUPS

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = {
    name: re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for name, path in PAGES.items()
}


def commands(name):
    """The commands of a page, each with the config that the page shows last before it."""
    config = ""
    for language, code in BLOCKS[name]:
        if language == "yaml":
            config = code
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
            if found := re.search(r"-m idefics_lit (\w.*)", line):
                yield pytest.param(shlex.split(found[1]), config, id=f"{name}: {found[1]}")


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_tried(name):
    tried = {"bash", "python", "yaml", "csv", "json"}
    shown = {"text"}  # formulas, the tree of files
    assert {language for language, _ in BLOCKS[name]} <= tried | shown


@pytest.mark.parametrize(("args", "config"), [command for name in PAGES for command in commands(name)])
def test_a_command_is_understood(args, config, tmp_path, monkeypatch, capsys):
    """What reads data with the small model runs; a fit takes minutes, other commands need files or a browser."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    Path("my.yaml").write_text(config)
    if "tiny" in args and args[0] in ("validate", "test", "predict", "check"):
        main(args)
        return
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    assert "trainer:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("language", "code"), [block for name in PAGES for block in BLOCKS[name] if block[0] in ("csv", "json")]
)
def test_a_table_is_read(language, code, tmp_path, capsys):
    if "image" not in code:  # a submission
        json.loads(code)
        return
    (tmp_path / f"train.{language.replace('json', 'jsonl')}").write_text(code)
    for path in set(re.findall(r"scans/\w+\.png", code)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("L", (60, 80)).save(tmp_path / path)
    main(["check", "--model.pretrained", "tiny", "--data.source", str(tmp_path), "--data.val_split", "train"])
    questions = len(code.splitlines()) - (language == "csv")
    assert re.search(rf"^questions +{questions} ", capsys.readouterr().out, flags=re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in PAGES if any(language == "bash" for language, _ in BLOCKS[name])])
def test_shell_code_is_shell_code(name):
    code = "\n".join(code for language, code in BLOCKS[name] if language == "bash")
    done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name in PAGES if any(language == "python" for language, _ in BLOCKS[name])])
def test_python_code_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(code for language, code in BLOCKS[name] if language == "python")
    exec(compile(code, PAGES[name], "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("code", [code for name in PAGES for language, code in BLOCKS[name] if language == "yaml"])
def test_a_config_is_understood(code, tmp_path, capsys):
    (tmp_path / "my.yaml").write_text(code)
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={ROOT}/configs/docvqa.yaml", f"--config={tmp_path}/my.yaml", "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)


class Links(HTMLParser):
    """What a page of the site refers to, and what can be referred to in it."""

    def __init__(self, file):
        super().__init__()
        self.links, self.anchors, self.code = [], set(), []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("id", "name"):
                self.anchors.add(value)
            elif name in ("href", "src") and tag != "base":
                self.links.append(value)

    def handle_data(self, data):
        if self.get_starttag_text() == "<code>":
            self.code.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as CI builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # the theme's news about itself
    args = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert len(log.splitlines()) == 3, log  # it begins, where it writes, how long it took
    return {file: Links(file) for file in folder.rglob("*.html")}


def test_every_link_leads_somewhere(site):
    folder = next(file for file in site if file.name == "index.html" and (file.parent / "404.html").exists()).parent
    wrong = []
    for file, page in site.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if url.scheme != "https" or "." not in url.netloc:
                    wrong.append((file.name, link))
                continue
            path = unquote(url.path)
            target = folder / path.lstrip("/") if path.startswith("/") else (file.parent / path).resolve()
            target = target / "index.html" if target.is_dir() and path else target if path else file
            if not target.is_file() or (url.fragment and unquote(url.fragment) not in site[target].anchors):
                wrong.append((file.name, link))
    assert not wrong


def test_nothing_is_fetched_from_elsewhere(site):
    """Links may lead away; a page with all it shows and runs is here."""
    fetched = re.compile(r"<(?:script|img|iframe)[^>]* src=\"?https?:|<link[^>]* href=\"?https?:")
    assert not [file for file in site if fetched.search(file.read_text())]


def test_every_key_is_explained(site):
    page = next(page for file, page in site.items() if file.name == "configs.html")
    for command, parser in capture_parser(main, ["fit"])._subcommands_action.choices.items():
        assert command in page.code
        options = [a.dest for a in parser._actions if a.option_strings and a.dest not in OPTION_GROUPS]
        keys = [key for key in options if key != "help" and not key.endswith(".help")]
        assert len(keys) > 80
        assert not [key for key in keys if key not in page.code and f"--{key}" not in page.code]
