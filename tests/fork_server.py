"""Executables that run commands of ours without seconds of imports: a process forks for each.

`serve` is itself forked from the process of `small` that has imported everything, and is not
touched by what its children do. `CLIENT` is the text of an executable that hands over its words,
folder, environment and standard streams, and ends as the command does.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path

import small

MODULES = {"ddb-fast": "ddb_fast.cli", "launch": "ddb_fast.train"}
"""Executables, and the modules whose `main` takes their words."""

CLIENT = """#!{python} -IS
import json, os, socket, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
{before}
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"\\0"], [0, 1, 2])
    order = dict(words=words, name=name, folder=os.getcwd(), environment=dict(os.environ))
    server.sendall(json.dumps(order).encode())
    server.shutdown(socket.SHUT_WR)
    status = server.recv(1)
sys.exit(status[0] if status else "the command was killed")
"""


@contextlib.contextmanager
def executables(folder: Path, before: str = ""):
    """Write those of `MODULES` into a folder, to work inside the block.

    `launch` takes the place of the Python interpreter in `python -m ddb_fast.train`. before: Python
    text that may change `words`, for the executable `name`.
    """
    before = f"if name == 'launch':\n    words = words[2:]\n{before}"
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:
        address = f"{short}/socket"  # the names of sockets may not be long
        server.bind(address)
        server.listen()
        for name in MODULES:
            text = CLIENT.format(python=sys.executable, before=before, address=address)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        process = small.FORKS.Process(target=serve, args=(server,))
        process.start()
        try:
            yield
        finally:
            process.kill()
            process.join()


def serve(server: socket.socket) -> None:
    """Take orders at a Unix socket until killed."""
    gc.freeze()  # what is imported is no garbage, and every training of a run looks for some
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        order, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            order.sendall(bytes([_run(order)]))
            os._exit(0)
        order.close()


def _run(order: socket.socket) -> int:
    streams = socket.recv_fds(order, 1, 3)[1]
    text = b"".join(iter(lambda: order.recv(65536), b""))
    given = json.loads(text)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(given["folder"])
    os.environ.clear()
    os.environ.update(given["environment"])
    sys.argv = [given["name"], *given["words"]]
    try:
        status = import_module(MODULES[given["name"]]).main(given["words"])
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)
