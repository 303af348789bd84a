"""README.md and docs/: their commands, code and data work as written, and the site builds without warnings."""

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
from PIL import Image

from idefics_lit.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = {
    name: re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for name, path in PAGES.items()
}


def commands(name):
    """Yield the commands of a page, each with the last config that the page shows before it."""
    config = ""
    for language, code in BLOCKS[name]:
        if language == "yaml":
            config = code
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
            if command := re.search(r"-m idefics_lit (\w.*)", line):
                yield pytest.param(shlex.split(command[1]), config, id=f"{name}: {command[1]}")


@pytest.mark.parametrize("name", PAGES)
def test_the_language_of_each_block_has_a_test(name):
    untested = {"text"}  # formulas and file trees
    assert {language for language, _ in BLOCKS[name]} <= {"bash", "python", "yaml", "csv", "json"} | untested


@pytest.mark.parametrize(("args", "config"), [command for name in PAGES for command in commands(name)])
def test_commands_parse(args, config, tmp_path, monkeypatch, capsys):
    """Run evaluations of the small model; only parse fits, which take minutes, and commands with missing files."""
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
def test_example_data_is_read(language, code, tmp_path, capsys):
    if "image" not in code:  # a line of a submission
        assert json.loads(code)
        return
    (tmp_path / f"train.{language.replace('json', 'jsonl')}").write_text(code)
    for path in set(re.findall(r"scans/\w+\.png", code)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("L", (60, 80)).save(tmp_path / path)
    main(["check", "--model.pretrained", "tiny", "--data.source", str(tmp_path), "--data.val_split", "train"])
    questions = len(code.splitlines()) - (language == "csv")
    assert re.search(rf"^questions +{questions} ", capsys.readouterr().out, flags=re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in PAGES if any(language == "bash" for language, _ in BLOCKS[name])])
def test_shell_code_parses(name):
    code = "\n".join(code for language, code in BLOCKS[name] if language == "bash")
    done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name in PAGES if any(language == "python" for language, _ in BLOCKS[name])])
def test_python_code_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(code for language, code in BLOCKS[name] if language == "python")
    exec(compile(code, PAGES[name], "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("code", [code for name in PAGES for language, code in BLOCKS[name] if language == "yaml"])
def test_configs_parse(code, tmp_path, capsys):
    (tmp_path / "my.yaml").write_text(code)
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={ROOT}/configs/docvqa.yaml", f"--config={tmp_path}/my.yaml", "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)


class Links(HTMLParser):
    """The links, anchors and code spans of a page of the site."""

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
    """Build the site; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # a message of the theme
    args = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert len(log.splitlines()) == 3, log  # the start, the folder, the duration
    return {file: Links(file) for file in folder.rglob("*.html")}


def test_links_have_a_target(site):
    folder = next(file for file in site if file.name == "index.html" and (file.parent / "404.html").exists()).parent
    broken = []
    for file, page in site.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if url.scheme != "https" or "." not in url.netloc:
                    broken.append((file.name, link))
                continue
            path = unquote(url.path)
            target = folder / path.lstrip("/") if path.startswith("/") else (file.parent / path).resolve()
            target = target / "index.html" if target.is_dir() and path else target if path else file
            if not target.is_file() or (url.fragment and unquote(url.fragment) not in site[target].anchors):
                broken.append((file.name, link))
    assert not broken


def test_pages_load_nothing_from_other_hosts(site):
    external = re.compile(r"<(?:script|img|iframe)[^>]* src=\"?https?:|<link[^>]* href=\"?https?:")
    assert not [file for file in site if external.search(file.read_text())]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "check", "ask", "demo", "export"])
def test_every_key_is_documented(command, site, capsys):
    """All keys that ``--print_config`` prints are on the page of keys."""
    page = next(page for file, page in site.items() if file.name == "configs.html")
    with pytest.raises(SystemExit):
        main([command, "--print_config"])
    keys = [*flat(yaml.safe_load(capsys.readouterr().out))]
    assert len(keys) > 80
    assert command in page.code
    assert not [key for key in keys if key not in page.code and f"--{key}" not in page.code]


def flat(config, prefix=""):
    """Yield the dotted keys of a config; an object with a ``class_path`` is the value of one key."""
    for name, value in config.items():
        if isinstance(value, dict) and "class_path" not in value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
