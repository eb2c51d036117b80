"""docs/: every command of the tutorial and the how-to pages runs, the notebook's cells run, the site knows every page."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from actstore_cli.actstore import main as actstore_main
from actstore_cli.trainer import main as trainer_main
from click.testing import CliRunner
from helpers import ROOT, TINY, words, write_jsonl

DOCS = ROOT / "docs"
PAGES = ["tutorial.md", *(f"howto/{path.name}" for path in sorted((DOCS / "howto").glob("*.md")) if path.name != "index.md")]
STAND_INS = {"--rows 65536": "--rows 2000", "--rows 32768": "--rows 2000", "--n-latents 512": "--n-latents 64",
             "data/corpus/stdlib.jsonl": "my.jsonl"}  # fmt: skip


class Shell:
    """Runs the few forms of shell that the pages use, in this process: a process a command would take seconds each."""

    def __init__(self, home: Path, **variables: str) -> None:
        self.home, self.variables = home, variables

    def run(self, line: str) -> str:
        if found := re.fullmatch(r"(\w+)=\$\((.*)\)", line):
            self.variables[found[1]] = self.run(found[2]).strip()
            return ""
        if found := re.fullmatch(r"echo \$(\w+) \| cut -d' ' -f(\d)", line):
            return self.variables[found[1]].split()[int(found[2]) - 1]
        line = re.sub(r"\$(\w+)", lambda name: self.variables[name[1]], line)
        parts = shlex.split(line, comments=True)
        environment = dict(part.split("=", 1) for part in parts if re.match(r"[A-Z_]+=", part))
        program, *arguments = parts[len(environment) :]
        main = {"actstore": actstore_main, "trainer": trainer_main}[program]
        result = CliRunner().invoke(main, arguments, env=environment)
        assert result.exit_code == 0, f"{line}\n{result.stdout}{result.stderr}"
        return result.stdout

    def run_page(self, name: str) -> None:
        script = "\n".join(re.findall(r"```bash\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)).replace("\\\n    ", "")
        for text, stand_in in {**STAND_INS, "file:///tmp/": f"file://{self.home}/"}.items():
            script = script.replace(text, stand_in)
        lines = [line for line in script.splitlines() if line.strip() and not line.startswith("#")]
        assert len(lines) >= 2
        for line in lines:
            self.run(line)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("docs")
    for name in ("gpt2-medium", "my-model", "data/tiny-gpt2"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).symlink_to(TINY)
    texts = words(100, 60)
    write_jsonl(home / "my.jsonl", texts)
    (home / "other.jsonl").write_text("".join(json.dumps({"meta": {"body": text}}) + "\n" for text in texts))
    (home / "ids.jsonl").write_text("".join(json.dumps({"ids": list(range(100))}) + "\n" for _ in range(10)))
    return home


@pytest.fixture(scope="module")
def made(home) -> dict[str, str]:
    """The variables that every how-to page begins with."""
    shell = Shell(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        make(shell)
    return shell.variables


def make(shell: Shell) -> None:
    shell.run("store=$(actstore capture --model gpt2-medium --hook blocks.2.hook_resid_pre --corpus my.jsonl --rows 2000)")
    shell.run("runs=$(trainer fit --store $store --n-latents 64 --k 4,8 --batch-size 256)")
    shell.run("run=$(echo $runs | cut -d' ' -f1)")


@pytest.fixture
def shell(home, made, monkeypatch) -> Shell:
    monkeypatch.chdir(home)
    return Shell(home, **made)


@pytest.mark.parametrize("name", PAGES)
def test_every_command_runs(shell, name):
    if name == "tutorial.md":
        shell.variables.clear()  # it makes its own
    shell.run_page(name) if name != "howto/jupyter.md" else run_python(shell, name)


def run_python(shell: Shell, name: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    scope = {"digest": shell.variables["store"]}
    exec(code, scope)
    assert scope["rows"].shape == (64, 192) and len(scope["run"].metrics) >= 5


def test_the_commands_of_the_index_and_of_the_readme_are_the_same():
    """Those of the README run in tests/test_readme.py."""
    index, readme = (path.read_text() for path in (DOCS / "index.md", ROOT / "README.md"))
    (shown,) = re.findall(r"```\n(store=.*?)```", index, re.DOTALL)
    assert all(line in readme for line in shown.replace("\\\n    ", "").splitlines())


def test_the_notebook_holds_outputs_and_its_cells_run(shell, monkeypatch):
    path = DOCS / "tutorial.ipynb"
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert path.stat().st_size < 300_000 and sum(bool(cell["outputs"]) for cell in cells) >= 6
    assert all(cell["execution_count"] == i for i, cell in enumerate(cells, 1))
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    assert "<svg" in path.read_text() and str(ROOT.parent) not in path.read_text()
    scope: dict = {}
    for cell in cells:
        code = "".join(cell["source"])
        for text, stand_in in {
            "65_536": "2_000",
            "data/corpus/stdlib.jsonl": "my.jsonl",
            "n_latents=512": "n_latents=64",
        }.items():
            code = code.replace(text, stand_in)
        exec(compile(code, path.name, "exec"), scope)


def test_the_site_has_every_page():
    config = (DOCS / "site" / "mkdocs.yml").read_text()
    listed = set(re.findall(r"([\w/.-]+\.md)$", config, re.MULTILINE))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | {
        f"recipes/{p.name}" for p in (ROOT / "recipes").glob("*.md")
    }
    assert there <= listed and listed - there == {"notebook-tutorial.md"}


def options_of(command) -> set[str]:
    """Return every option of a click group or command, those of its commands among them."""
    below = [options_of(sub) for sub in getattr(command, "commands", {}).values()]
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}.union(*below)


def test_every_option_that_is_named_exists():
    known = options_of(actstore_main) | options_of(trainer_main)
    others = {"--strict", "--nproc-per-node", "--help"}  # of mkdocs and torchrun, and click's own
    for path in [
        *DOCS.glob("howto/*.md"),
        *(DOCS / f"{name}.md" for name in ("tutorial", "faq", "concepts", "extending", "index")),
    ]:
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text())) <= known | others, path


def test_links_lead_somewhere():
    """What `mkdocs build --strict` checks too; this also looks at the README and at links out of docs/."""
    for path in [ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "recipes").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w.-]*)?\)", path.read_text()):
            if not re.match(r"\w+:", link):
                assert os.path.exists(path.parent / link), f"{path}: {link}"
