"""Commands of ours without their five seconds of imports: a process that forks one for each.

`serve` imports everything once and is not touched by what its children do. `CLIENT` is the text of
an executable that hands over its words, folder, environment and standard streams, and ends as the
command does.
"""

import json
import os
import signal
import socket
import sys
import traceback
from importlib import import_module

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


def serve(address: str, modules: dict[str, str]) -> None:
    """Take orders at a Unix socket until killed; modules: whose `main` a client of a name calls."""
    for module in ("ddb_fast.pipeline", "ddb_fast.sweep", *modules.values()):
        import_module(module)  # no thread exists yet, so forking is safe
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            order, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                order.sendall(bytes([_run(order, modules)]))
                os._exit(0)
            order.close()


def _run(order: socket.socket, modules: dict[str, str]) -> int:
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
        status = import_module(modules[given["name"]]).main(given["words"])
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
