"""What is released: the wheel and the source archive hold what they must and no more, and the commands run from them."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from helpers import ROOT, words, write_jsonl

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"actstore-{PROJECT['version']}"
FOLDERS = {"actstore": "actstore", "trainer": "trainer", "cli": "actstore_cli"}  # in the repository, and in the wheel


def run(*words: object, **more) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def source_files(folder: str) -> set[str]:
    """What of a package belongs into a release: everything in it that git does not ignore."""
    return {p.relative_to(ROOT / folder).as_posix() for p in (ROOT / folder).rglob("*.*") if "__pycache__" not in p.parts}


def build(into: Path, mask: str) -> tuple[Path, Path]:
    """Copy what git knows and build it; the source archive, and the wheel made from that archive."""
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\n")[:-1]
    script = f'umask {mask} && mkdir -p "$0/source" && tar c "$@" | tar x --no-same-permissions -m -C "$0/source"'
    run("bash", "-c", script, into, *(f for f in files if (ROOT / f).is_file()), cwd=ROOT)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", into, into / "source", env=environment, cwd=into)
    return into / f"{NAME}.tar.gz", into / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("build"), "022")


def test_the_wheel_holds_the_three_packages_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    expected = {f"{inside}/{file}" for folder, inside in FOLDERS.items() for file in source_files(folder)}
    info = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    assert names == expected | {f"{NAME}.dist-info/{name}" for name in info}


def test_the_source_archive_holds_what_builds_it_and_nothing_else(built):
    with tarfile.open(built[0]) as archive:
        names = {m.name.removeprefix(f"{NAME}/") for m in archive.getmembers() if m.isfile()}
    expected = {f"{folder}/{file}" for folder in FOLDERS for file in source_files(folder)}
    top = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", "constraints.txt", "MANIFEST.in"}
    assert {n for n in names if ".egg-info/" not in n} == expected | top | {"PKG-INFO", "setup.cfg"}


def test_the_same_source_gives_the_same_wheel(built, tmp_path):
    again = build(tmp_path / "elsewhere", "002")[1]  # other folder, other times, other permissions
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(built[1].read_bytes()).digest()


def test_the_metadata_says_what_a_user_needs(built):
    with zipfile.ZipFile(built[1]) as wheel:
        text = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    metadata = HeaderParser().parsestr(text)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert metadata["Description-Content-Type"] == "text/markdown" and "## Install" in metadata.get_payload()
    extras = set(metadata.get_all("Provides-Extra"))
    readme = (ROOT / "README.md").read_text()
    assert {e for e in extras if f"`{e}`" not in readme} == set()
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_what_is_imported_is_declared():
    """A package that only comes along with another one may go away with it."""
    declared = {re.split(r"[<>=\[;]", d)[0].lower().replace("_", "-") for d in PROJECT["dependencies"]}
    extras = {"obstore", "scipy", "tensorboard", "trackio", "wandb"}
    optional = extras | {"botocore", "triton"}  # docs/remote.md; torch brings it for GPUs
    owners = packages_distributions()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
                names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                for top in {n.split(".")[0] for n in names} - {*sys.stdlib_module_names, *FOLDERS, "actstore_cli"}:
                    mine = {o.lower().replace("_", "-") for o in owners.get(top, [top])}
                    assert mine & (declared | optional), f"{path}: {top} is not declared"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """An environment with the wheel in it; everything else comes from the environment of the tests.

    So do loops that numba has compiled, where the source is the same: that takes longer than all that is tested here.
    """
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    site = next((folder / "env").glob("lib/python*/site-packages"))
    (site / "rest.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "env/bin/python",
        "install",
        "--no-compile",
        "--no-deps",
        "--no-index",
    ]
    run(*pip, built[1])
    for cached in (ROOT / "trainer").rglob("*.nb[ic]"):
        (site / cached.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(cached, site / cached.relative_to(ROOT))
    for source in (ROOT / "trainer").rglob("*.py"):
        shutil.copystat(source, site / source.relative_to(ROOT))  # by its time, numba knows a source again
    return folder / "env/bin"


def test_the_whole_path_runs_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    write_jsonl(tmp_path / "my.jsonl", words(60, 50))
    environment = {**os.environ, "PATH": f"{installed}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    script = """set -euo pipefail
store=$(actstore capture --model toy:16 --backend toy --hook blocks.0.hook_resid_pre --corpus my.jsonl --seq-len 32 --rows 2000)
run=$(trainer fit --store $store --n-latents 32 --k 2 --batch-size 512 --holdout 0.2)
trainer report $run --out report.html
trainer export $run --format saelens --out sae
python -m actstore verify $store
python -m trainer --version
python -c "from importlib.util import find_spec as f; print(*(f(n).origin for n in ('actstore', 'actstore_cli', 'trainer')))"
"""
    printed = run("bash", "-c", script, cwd=tmp_path, env=environment).splitlines()
    assert len(printed[-1].split(str(installed.parent))) == 4 and PROJECT["version"] in printed[-2]
    assert {p.name for p in (tmp_path / "sae").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert "<style>" in (tmp_path / "report.html").read_text()
