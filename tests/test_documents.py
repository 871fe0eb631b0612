"""README, docs and the scripts' docstrings name what there is: scripts, presets, settings, make targets, files, messages."""
import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from config import load
from config.config import PRESETS, Config
from utils.reporting.sections import WHAT_TO_USE
from utils.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "models/demo/CARD.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
COMMAND = re.compile(r"^(\.venv/bin/)?(python3?|torchrun|make|pip|sbatch)\s")
MAKEFILE = (ROOT / "Makefile").read_text()
SETTINGS = dict(load.settings(Config))


# ---- commands --------------------------------------------------------------------------------------------------------

def blocks(text: str) -> Iterator[str]:
    """Indented and fenced blocks."""
    yield from re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    yield from (block.group() for block in re.finditer(r"(?:^(?: {4,}).*\n(?:\s*\n(?= {4}))?)+", text, re.M))


def commands(text: str) -> list[list[str]]:
    """The command lines of a document as words: continued lines joined, variables and loops filled in."""
    found, variables = [], {}
    for block in blocks(text):
        block = re.sub(r"\\\n\s*", " ", block)
        for name, value in re.findall(r'^\s*(\w+)="([^"]*)"', block, re.M):
            variables[name] = " ".join(value.split())
        block = re.sub(r'^\s*\w+="[^"]*"', "", block, flags=re.M)
        for line in map(str.strip, block.splitlines()):
            if loop := re.match(r"for (\w+) in (\S*)", line):
                variables[loop[1]] = loop[2]
            for name in variables:
                line = re.sub(rf"\${name}\b", lambda match: variables[match[0][1:]], line)
            line = re.sub(r"^for .*; do (?:time )?(?:[A-Z_]+=\S+ )*(.*); done$", r"\1", line)
            found += [line] if COMMAND.match(line) else []
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [shlex.split(line, comments=True) for line in (*found, *filter(COMMAND.match, inline))]


SCRIPTS = sorted(file for folder in ("", "experiments", "benchmarks", "models") for file in (ROOT / folder).glob("*.py"))
TEXTS = [(document, document.read_text(encoding="utf-8")) for document in DOCUMENTS]
TEXTS += [(script, re.sub(r"[][]", "", ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""))  # [options]
          for script in SCRIPTS]
EVERY = [(file.relative_to(ROOT).as_posix(), words) for file, text in TEXTS for words in commands(f"{text}\n")]


class Parsed(Exception):
    """A script has understood its arguments."""


def check_arguments(module: str, arguments: list[str], monkeypatch) -> None:
    """Let a script's main read its arguments, with its own choices, and stop there."""
    script = importlib.import_module(module)
    real_config, real_parse = load.load_config, argparse.ArgumentParser.parse_args

    def load_config(*args, **kwargs):
        real_config(*args, **kwargs)
        raise Parsed

    def parse_args(*args, **kwargs):
        real_parse(*args, **kwargs)
        raise Parsed
    if not hasattr(script, "load_config") and not hasattr(script, "argparse"):
        assert not arguments  # it takes none
        return
    monkeypatch.setattr(script, "load_config", load_config, raising=False)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr("sys.argv", [module, *arguments])
    with pytest.raises((Parsed, SystemExit)) as stopped:
        script.main()
    assert stopped.type is Parsed or stopped.value.code == 0  # --help


def check_make(words: list[str]) -> None:
    for word in words:
        name, is_setting, value = word.partition("=")
        if is_setting:
            assert re.search(rf"\$\({name}\)", MAKEFILE), f"no variable {name} in the Makefile"
            load.resolve({"preset": "demo"}, dict(part.split("=", 1) for part in value.split()) if name == "ARGS" else {})
        else:
            assert re.search(rf"^{word}:", MAKEFILE, re.M), f"no target {word} in the Makefile"


def check_command(words: list[str], monkeypatch) -> None:
    program, *rest = words
    if program == "make":
        return check_make(words[1:])
    if program.endswith("pip"):
        return [require(file) for option, file in zip(rest, rest[1:], strict=False) if option in ("-r", "-c")]
    while rest and (rest[0].startswith("--n") or rest[0] in ("--standalone", "job.sh")):  # of torchrun and sbatch
        rest.pop(0)
    if not rest:
        return
    if rest[0] == "-c":
        return ast.parse(rest[1])
    if rest[:2] == ["-m", "pytest"]:
        return [require(place) for place in rest[2:] if not place.startswith("-")]
    if rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
        module, arguments = rest[1], rest[2:]
    else:
        require(rest[0])
        module, arguments = rest[0].removesuffix(".py"), rest[1:]
    if arguments[:1] == ["--verify"] or module == "tests.faults.campaign":  # they read no settings
        return
    check_arguments(module, arguments, monkeypatch)


def require(name: str) -> None:
    assert (ROOT / name).exists(), f"no {name}"


@pytest.mark.parametrize("document, words", EVERY, ids=[f"{name}: {' '.join(words)[:60]}" for name, words in EVERY])
def test_commands_are_understood(document, words, monkeypatch):
    check_command(words, monkeypatch)


@pytest.mark.parametrize("line, fault", [
    ("python smaple.py", AssertionError), ("python -m benchmarks.nothing", AssertionError), ("make demos", AssertionError),
    ("python sample.py guidance.v=1", UserError), ("torchrun --nproc_per_node=8 sample.py --preset paper", UserError),
    ("python create_negative_contexts.py negatives.strategy=near", UserError),
    ("make demo ARGS=guidance.v=1", UserError), ("python -m benchmarks.sampling --stepz 1", AssertionError),
    ("python -m pytest tests/test_nothing.py", AssertionError),
    ("pip install -r requirements-test.txt", AssertionError), ("sbatch job.sh smaple.py", AssertionError)])
def test_a_wrong_command_is_noticed(line, fault, monkeypatch):
    with pytest.raises(fault):
        check_command(line.split(), monkeypatch)


def test_commands_are_found():
    assert commands("    for n in 1 2; do time A_B=1 torchrun --nproc_per_node=$n x.py r=$n; done\n") == [
        ["torchrun", "--nproc_per_node=1", "x.py", "r=1"]]
    text = 'A\n\n    S="a.b=1\n        c.d=2"\n    for s in x y; do\n        python z.py $S e=$s \\\n            f  # g\n\n'
    assert commands(text + "\nB `make t` `t`.\n") == [["python", "z.py", "a.b=1", "c.d=2", "e=x", "f"], ["make", "t"]]
    assert len(EVERY) > 100  # as many as there are


# ---- names, links and messages ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_settings_presets_and_files_that_are_named_exist(document):
    groups = {name.partition(".")[0] for name in SETTINGS if "." in name}
    for code in re.findall(r"`([^`\n]+)`", document.read_text(encoding="utf-8")):
        for name in re.findall(r"(?<![\w./])([a-z]+\.[a-z_]+)(?=$|[=\s,`])", code):
            if name.partition(".")[0] in groups and not name.endswith((".py", ".md", ".csv", ".json", ".png", ".html", ".ckpt")):
                assert name in SETTINGS, f"{document.name}: no setting {name}"
        for preset in re.findall(r"--preset (\w+)", code):
            assert preset in PRESETS or preset == "NAME"
        if re.fullmatch(r"[\w/]+/\w+\.(py|md|jpg|toml)", code) and not code.startswith(("output/", "data/")):
            assert (ROOT / code).exists(), f"{document.name}: no {code}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = unquote(link).partition("#")
        if file.startswith(("http:", "https:", "mailto:")):
            continue
        target = document.parent / file if file else document
        assert target.exists(), f"{document.name}: {link} leads nowhere"
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for words in headings}, link


def messages() -> list[str]:
    """Every text of the code, f-strings with their holes as a NUL."""
    found = []
    for file in (file for folder in ("", "config", "models", "utils", "experiments") for file in (
            (ROOT / folder).rglob("*.py") if folder else ROOT.glob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_said(quoted: str, said: list[str]) -> bool:
    """Whether the parts of a quoted line between its `...` stand in one text of the code, in this order."""
    parts = [part.strip("; ") for part in re.split(r"\.\.\.", quoted) if re.search(r"\w", part)]
    pattern = re.compile(".*?".join(map(re.escape, parts)), re.S)
    return bool(parts) and any(pattern.search(text) for text in said)


def test_the_report_says_what_readme_says_of_what_to_use():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("`", "").split())
    assert WHAT_TO_USE in readme and "--preset recommended" in WHAT_TO_USE


def test_messages_that_are_quoted_exist():
    said = messages()
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 30
    lost = [row for row in rows if not is_said(row, said)]
    assert not lost, "\n".join(lost)
    assert not is_said("...: is an unknown settings; ...", said)
