"""What the documents name is there: pages and headings that they link to, files, commands, options, modules."""

import functools
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

import idcore

ROOT = Path(idcore.__file__).parent.parent
PLACES = "idcore|python_tests|csrc|kernels|examples|docs"
if not (ROOT / "docs").is_dir():
    pytest.skip("not a checkout: docs/ is not installed", allow_module_level=True)
PAGES = sorted(
    p
    for place in (".", "docs", "examples", "idcore/assets")
    for p in (ROOT / place).glob("*.md" if place == "." else "**/*.md")
)
SOURCES = sorted(p for place in ("idcore", "kernels", "csrc") for p in (ROOT / place).rglob("*.*"))


def name_of(path):
    return str(path.relative_to(ROOT))


def anchors(page):
    """What GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def broken_links(page):
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8").replace("\n", " ")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file) if file else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            found.append(target)
    return found


def command_lines(text):
    """Calls of `idcore` and of its modules: in indented blocks, lines joined at backslashes, and between backticks."""
    joined = re.sub(r"\\\n\s*", " ", text)
    blocks = re.findall(r"^    (?:\S+=\S+ )*((?:idcore |python -m idcore[.]).*)$", joined, re.M)
    spans = re.findall(r"`((?:idcore |python -m idcore[.])[^`]+)`", re.sub(r"\s+", " ", joined))
    return blocks + spans


def words_of(line):
    """Up to a comment, a pipe or the next command."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        words = line.split("#")[0].split()
    ends = [i for i, w in enumerate(words) if w in ("|", "&&", ">")]
    return words[: min(ends, default=len(words))]


def complaint(line):
    """What of a command line does not exist, or None."""
    words = words_of(line)
    options = [w.split("=")[0].rstrip(",;.:)") for w in words if re.match(r"--[a-z]", w)]
    if words[0] == "python":
        module = words[2].rstrip(",;.:)")
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            return f"no module {module}"
        files = Path(spec.origin).parent.rglob("*.py") if spec.submodule_search_locations else [Path(spec.origin)]
        text = "".join(f.read_text() for f in files)
        if "parser_of(" in text:
            text += (ROOT / "idcore/training/experiments.py").read_text()
        known = set(re.findall(r"--[a-z][a-z-]*", text))
        known |= {f"--{n.replace('_', '-')}" for n in re.findall(r"(\w+): ", Path(spec.origin).read_text())}
    else:
        command, rest = command_line(), words[1:]
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            names = re.split(r"[,|]", rest[0])
            if not re.fullmatch(r"[a-z-]+", names[0]):  # a placeholder such as NAME or "..."
                return None
            missing = [n for n in names if re.fullmatch(r"[a-z-]+", n) and n not in command.commands]
            if missing:
                return f"no command {missing[0]}"
            command, rest = command.commands[names[0]], rest[1:]
        known = {o for p in command.params for o in [*p.opts, *p.secondary_opts]} | {"--help"}
    unknown = [o for o in options if o not in known]
    return f"no option {unknown[0]}" if unknown else None


@functools.cache
def command_line():
    from idcore.cli import app

    return typer.main.get_command(app)


def test_there_is_something_to_look_at():
    assert len(PAGES) > 15 and len(SOURCES) > 300
    assert sum(len(command_lines(p.read_text(encoding="utf-8"))) for p in PAGES) > 60


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert not broken_links(page)


def test_every_page_is_found_from_the_readme():
    seen, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page.is_dir():
            page = page / "README.md"
        if page.suffix != ".md" or page in seen or not page.exists():
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
        left += [(page.parent / target).resolve() for target in links if not target.startswith("http")]
    assert not [name_of(p) for p in PAGES if p.resolve() not in seen]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_exist(page):
    found = {line: complaint(line) for line in command_lines(page.read_text(encoding="utf-8"))}
    assert not {k: v for k, v in found.items() if v}


def settings_of_trainings():
    from idcore.training.augment.options import AugmentConfig
    from idcore.training.data.options import PrepareConfig
    from idcore.training.dreamidentity.config import DreamIdentityTrainConfig
    from idcore.training.face_vit.config import FaceViTTrainConfig
    from idcore.training.personal.config import BoothConfig, InversionConfig
    from idcore.training.pulid.config import PuLIDTrainConfig
    from idcore.training.sefi_ide.config import SeFiTrainConfig
    from idcore.training.settings import names
    from idcore.training.styleforge.config import StyleForgeConfig
    from idcore.training.tiny_sd.run import TinySDTrainConfig

    all_of_them = (
        AugmentConfig, PrepareConfig, DreamIdentityTrainConfig, FaceViTTrainConfig, BoothConfig, InversionConfig,
        PuLIDTrainConfig, SeFiTrainConfig, StyleForgeConfig, TinySDTrainConfig,
    )  # fmt: skip
    return {name for config in all_of_them for name in names(config)}


def test_settings_that_are_named_exist():
    known = settings_of_trainings()
    sections = {name.split(".")[0] for name in known if "." in name}
    gone, seen = [], 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`(?:--set )?\"?([a-z]+\d?\.[a-z_]+)(?:=[^`]*)?`", text)
        named += re.findall(r"--set \"?([a-z_]+\d?(?:\.[a-z_]+)*)=", text)
        for name in named:
            if name.endswith((".py", ".json", ".safetensors")):
                continue
            if name.split(".")[0] in sections or "." not in name:
                seen += 1
                if name not in known:
                    gone.append(f"{name_of(page)}: {name}")
    assert seen > 40 and not gone


def test_files_that_are_named_exist():
    gone = []
    for path in [*PAGES, *(p for p in SOURCES if p.suffix in (".py", ".h", ".cpp", ".cuh", ".cu"))]:
        for named in re.findall(
            rf"(?<![\w/.])(?:{PLACES})/[\w./-]+\.(?:py|md|h|cpp|cuh?|json|png|txt)\b", path.read_text(encoding="utf-8")
        ):
            if (
                not (ROOT / named).exists() and named != "kernels/__init__.py"
            ):  # architecture.md says why it is not there
                gone.append(f"{name_of(path)}: {named}")
    assert not gone


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("idcore train pulid --bse x", "no option --bse"),
        ("idcore tran pulid", "no command tran"),
        ("python -m idcore.training.nothing --out x", "no module idcore.training.nothing"),
        ("python -m idcore.testing.fuzz OP --bakend x", "no option --bakend"),
        ("idcore train pulid --base tiny-sd --resume # --bse", None),
    ],
)
def test_a_command_that_is_no_more_is_told(line, said):
    assert complaint(line) == said
