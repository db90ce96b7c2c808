"""Started by Ray in place of a worker's `python`: has forked_workers.py fork the worker, and ends when the worker does.

`python -IS ask_for_worker.py ADDRESS WORKER_PROGRAM ARGUMENTS...`: of the standard library alone, as Ray starts one for every worker.
"""

import json
import os
import signal
import socket
import sys

address, *command = sys.argv[1:]
wanted = {
    "command": command,
    "folder": os.getcwd(),
    "environment": dict(os.environ),
    "blocked_signals": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "niceness": os.nice(0),
}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(f"\0{address}")
    socket.send_fds(connection, [b"\0"], [0, 1, 2])
    connection.sendall(json.dumps(wanted).encode())
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
