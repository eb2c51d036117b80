"""`actstore` and `trainer` for long scripts, without seconds of imports each: children of one process that has imported.

A shim with a command's name hands its arguments, folder, environment and open files to that process, which forks. It
computes nothing itself: torch's threads do not survive a fork. That the installed commands start by themselves is tested
in tests/cli, and by `make demo`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from helpers import ROOT

SHIM = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    asked = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode() + b"\\n"
    server.sendall(asked[socket.send_fds(server, [asked], [0, 1, 2]):])
    code = server.recv(1)
sys.exit(code[0] if code else 70)
"""


@contextlib.contextmanager
def warm_commands() -> Iterator[str]:
    """Yield a folder with both commands, to be the first of a PATH."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        for name in ("actstore", "trainer"):
            shim = Path(folder) / name
            shim.write_text(SHIM.format(python=sys.executable, path=f"{folder}/socket"))
            shim.chmod(0o755)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        command = [sys.executable, "-m", "harness.warm", str(listener.fileno())]
        with subprocess.Popen(command, env=environment, cwd=ROOT, pass_fds=[listener.fileno()]) as server:
            try:
                yield folder
            finally:
                server.terminate()


def _run(connection: socket.socket) -> None:
    """Run one command in this process, as its shim was asked to, and say how it ended."""
    asked, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not asked.endswith(b"\n"):
        asked += connection.recv(1 << 20)
    sys.argv, folder, environment = json.loads(asked)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 0
    try:
        COMMANDS[Path(sys.argv[0]).name]()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([code]))


if __name__ == "__main__":
    import actstore_cli.actstore
    import actstore_cli.trainer
    import transformers.convert_slow_tokenizer
    import transformers.models.auto.tokenization_auto
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401
    import zarr  # noqa: F401
    from attacks.run import load_everything

    import actstore.backends.transformers  # noqa: F401

    load_everything()
    COMMANDS = {"actstore": actstore_cli.actstore.main, "trainer": actstore_cli.trainer.main}
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                try:
                    _run(connection)
                finally:
                    os._exit(70)
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
