"""A network that is far away: a TCP proxy that delays what it passes on, in a process of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds from a query's sending to its answer's arrival, beside what the server takes.
LATENCY = 0.002


@contextmanager
def delayed(host: str, port: int, seconds: float) -> Iterator[int]:
    """Yield a port of this machine behind which the server at ``host:port`` answers so many seconds later."""
    command = [sys.executable, "-m", "benchmarks.proxy", host, str(port), str(seconds / 2)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.terminate()


@contextmanager
def far(alias: str) -> Iterator[str]:
    """Yield another alias of the same database, which answers later by :data:`LATENCY`."""
    from django.db import connections

    from parallel_orm.connections import lender

    settings = connections[alias].settings_dict
    port = settings["PORT"] or {"postgresql": 5432, "mysql": 3306}[connections[alias].vendor]
    with delayed(settings["HOST"] or "127.0.0.1", int(port), LATENCY) as port:
        connections.settings["far"] = {**settings, "HOST": "127.0.0.1", "PORT": port}
        try:
            yield "far"
        finally:
            connections["far"].close()
            del connections["far"], connections.settings["far"]
            lender.close_idle()


async def _serve(host: str, port: int, delay: float) -> None:
    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(65536):
            loop.call_later(delay, writer.write, data)  # in order, and none waits for the one before
        loop.call_later(delay, writer.close)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(pass_on(reader, there_writer), pass_on(there_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
