"""The recipes of captures by several workers run: a fake Slurm array, and machines that are taken away without notice."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, TINY, words, write_jsonl

from actstore.catalog import list_stores, open_store
from actstore.check import check_store

SHARED = {
    "/shared/stores": "stores", "/shared/models/Llama-3.1-8B": str(TINY), "/shared/corpus": "corpus.jsonl",
    "blocks.16.hook_resid_pre": "blocks.1.mlp.hook_post", "--seq-len 1024 --dtype bfloat16 --rows 200000000":
    "--seq-len 128 --batch-tokens 1024 --rows 49152", "sleep 5": "sleep 0.1",
}  # fmt: skip
GROUPS = 6  # of 8,192 rows


def script_of(name: str) -> str:
    """The only script of a recipe, with miniatures in the place of what is large."""
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "recipes" / name).read_text(), re.DOTALL)
    for text, stand_in in SHARED.items():
        assert text in script or text in ("sleep 5",)
        script = script.replace(text, stand_in)
    return script


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a corpus, and the content digest of an undisturbed capture."""
    home = tmp_path_factory.mktemp("shared")
    write_jsonl(home / "corpus.jsonl", words(1200, 60))
    (home / "alone").mkdir()
    (home / "alone" / "corpus.jsonl").symlink_to(home / "corpus.jsonl")
    (alone,) = start(home / "alone", script_of("slurm-array-capture.md"), [{}])
    out, err = alone.communicate(timeout=120)
    assert alone.returncode == 0 and "worker" not in err, err
    return home, open_store(out.strip(), home / "alone" / "stores").content_digest


def start(home: Path, script: str, environments: list[dict[str, str]]) -> list[subprocess.Popen[str]]:
    """Start a script once an environment, as a scheduler does: the script itself is the process that is signalled."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE") and not k.startswith("SLURM_")}
    clean |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(["bash", "-c", script], cwd=home, env={**clean, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, start_new_session=True)
        for more in environments
    ]  # fmt: skip


def wait_for(home: Path, *captures: int) -> None:
    """Wait until each of these processes has claimed a row group, which it does after it has said who it is."""
    deadline, working = time.monotonic() + 100, set()
    while time.monotonic() < deadline and not working >= {f"pid {pid}" for pid in captures}:
        time.sleep(0.01)
        for claim in home.glob("stores/.locks/*.claims/*.lock"):
            with contextlib.suppress(FileNotFoundError):  # swept away at the end
                working.add(claim.read_text())


def capture_of(machine: subprocess.Popen[str]) -> int:
    """The process that a machine's loop has started."""
    children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.01)
    return int(found[0])


def check_shared(home: Path, said: list[str], content: str) -> None:
    """Each who lived to the end has printed the digest of the one store, which is whole and what it always is."""
    (line,) = list_stores(home / "stores")
    assert line.sealed and said and {one.strip() for one in said} == {line.digest}
    store = open_store(line.digest, home / "stores")
    assert store.content_digest == content and len(store.manifest.groups) == GROUPS
    assert not check_store(store.path, data=True).findings


def test_the_slurm_array_finishes_with_one_element_killed_and_one_out_of_time(shared):
    """A fake sbatch: the batch script once an element; SIGKILL to one, SIGUSR1 to another, which is submitted again."""
    home, content = shared
    script, many = script_of("slurm-array-capture.md"), {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0"}
    array = [{**many, "SLURM_ARRAY_TASK_ID": str(i), "SLURM_PROCID": "0", "SLURM_NTASKS": "1"} for i in range(3)]
    (out_of_time,) = start(home, script, array[:1])
    wait_for(home, out_of_time.pid)
    killed, last = start(home, script, array[1:])
    os.kill(out_of_time.pid, signal.SIGUSR1)
    wait_for(home, killed.pid)
    killed.kill()
    _, said = out_of_time.communicate(timeout=120)
    assert out_of_time.returncode == 0 and "worker 0 of 3 (by SLURM_ARRAY_TASK_ID)" in said
    assert "SIGUSR1" in said, said
    killed.communicate()
    (again,) = start(home, script, array[:1])
    outs = [process.communicate(timeout=120) for process in (last, again)]
    assert (last.returncode, again.returncode) == (0, 0), outs
    assert "worker 2 of 3 (by SLURM_ARRAY_TASK_ID)" in outs[0][1]
    check_shared(home, [out for out, _ in outs], content)


def test_spot_instances_finish_whatever_is_killed(shared, tmp_path):
    """The recipe's loop on three machines; their captures are killed without notice, a machine comes back late."""
    home, content = shared
    shutil.copy(home / "corpus.jsonl", tmp_path)
    machines = start(tmp_path, script_of("spot-instances.md"), [{"RANK": str(i)} for i in range(2)])
    captures = [capture_of(machine) for machine in machines]
    wait_for(tmp_path, *captures)
    os.killpg(machines[0].pid, signal.SIGKILL)  # the machine with its loop
    os.kill(captures[1], signal.SIGKILL)  # its loop goes on
    machines += start(tmp_path, script_of("spot-instances.md"), [{"RANK": "2"}, {"RANK": "0"}])
    ended = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines[1:]] == [0, 0, 0], ended
    assert ended[1][1].count("worker 1 of 4 (by RANK)") == 2 and "Killed" in ended[1][1]
    check_shared(tmp_path, [out for out, _ in ended[1:]], content)
