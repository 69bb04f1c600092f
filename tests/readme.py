"""Runs a page's Python blocks as its reader would: in a new Django project, from top to bottom.

What a page can say, all of it invisible or natural to a reader:

* A block whose first line is a comment with a file's name, ``# models.py`` or
  ``# shop/models.py``, is that file of the app (``shop``, if no folder is named).
  A second block for the same file is appended to it.
* ``# settings.py`` is appended to the project's settings, which already name the
  app, ``parallel_orm`` and the aliases ``default``, ``shard0`` and ``shard1``.
* Every other ``python`` block runs in one namespace, in order, as in a Django
  shell, with the app's models imported. ``await`` may stand outside functions.
* ``<!-- python ... -->``: such a block that the reader does not see: rows to begin
  with, assertions about what the last block did.
* ``<!-- not run: why -->`` on the line before a block: it is only shown.

Run as a script, with a project's folder, this is what executes the blocks there;
so it imports nothing of ours.
"""

from __future__ import annotations

import ast
import faulthandler
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_FENCE = re.compile(
    r"^(?P<indent>[ ]*)(?P<ticks>`{3,})(?P<info>[^\n`]*)\n(?P<code>.*?)^[ ]*(?P=ticks)[ ]*$"
    r"|^[ ]*<!-- python\n(?P<hidden>.*?)^[ ]*-->[ ]*$"
    r"|^[ ]*<!-- not run: (?P<why>.+?) -->[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_FILE = re.compile(r"#\s*(?:(?P<app>[a-z_]+)/)?(?P<file>[a-z_]+\.py)\s*")
_SETTINGS = """
from pathlib import Path

HERE = Path(__file__).parent
SECRET_KEY = "not a secret"
USE_TZ = True
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "parallel_orm",
    {app!r},
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {{
    alias: {{"ENGINE": "django.db.backends.sqlite3", "NAME": HERE / f"{{alias}}.sqlite3"}}
    for alias in ("default", "shard0", "shard1")
}}
"""


@dataclass(frozen=True)
class Block:
    """Python on a page: `line` is where its first line of code stands."""

    code: str
    line: int
    file: str | None = None
    app: str | None = None


def blocks_of(text: str) -> list[Block]:
    """Return a page's blocks that are to be run or written, in order."""
    blocks = []
    not_run = None  # where the last such remark ends
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        if match["why"]:
            not_run = match.end()
        elif match["hidden"] is not None:
            blocks.append(Block(textwrap.dedent(match["hidden"]), line))
        elif match["info"].split()[:1] != ["python"]:
            continue
        elif not_run is None or text[not_run : match.start()].strip():
            code = textwrap.dedent(match["code"])
            named = _FILE.fullmatch(code.partition("\n")[0])
            blocks.append(Block(code, line, named["file"], named["app"]) if named else Block(code, line))
    return blocks


def run_page(page: Path, folder: Path) -> str:
    """Make a project of the page in `folder` and run the page there; return what it printed."""
    blocks = blocks_of(page.read_text())
    app = next((block.app for block in blocks if block.app), "shop")
    settings = _SETTINGS.format(app=app)
    files = {"__init__.py": "", "models.py": ""}
    for block in blocks:
        if block.file == "settings.py":
            settings += f"\n{block.code}"
        elif block.file is not None:
            files[block.file] = f"{files.get(block.file, '')}\n{block.code}"
    (folder / app).mkdir()
    (folder / "settings.py").write_text(settings)
    for name, code in files.items():
        (folder / app / name).write_text(code)
    to_run = [asdict(block) for block in blocks if block.file is None]
    modules = [f"{app}.{Path(name).stem}" for name in files if name != "__init__.py"]
    (folder / "blocks.json").write_text(
        json.dumps({"page": str(page), "app": app, "modules": modules, "blocks": to_run})
    )
    # A copy: beside this file there is another `settings`.
    runner = folder / "run_page.py"
    runner.write_text(Path(__file__).read_text())
    done = subprocess.run(
        [sys.executable, "-W", "error", runner.name, str(folder)],
        cwd=folder,
        env={
            **{key: value for key, value in os.environ.items() if not _is_ours(key)},
            "DJANGO_SETTINGS_MODULE": "settings",
            "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)]),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    output = f"{done.stdout}{done.stderr}"
    # A connection that nobody closed is reported when nobody can catch it any more.
    if done.returncode or "Exception ignored" in done.stderr:
        raise AssertionError(f"{page.name} does not run:\n{output}")
    return output


def _is_ours(variable: str) -> bool:
    return variable.startswith("PARALLEL_ORM_TEST")


def _run_blocks(folder: Path) -> None:
    # An alarm: says where every thread hangs.
    faulthandler.dump_traceback_later(90, exit=True)
    plan = json.loads((folder / "blocks.json").read_text())
    import django
    from asgiref.sync import async_to_sync
    from django.apps import apps
    from django.conf import settings
    from django.core.management import call_command
    from django.db import connections

    django.setup()
    for alias in settings.DATABASES:
        call_command("migrate", database=alias, run_syncdb=True, verbosity=0)
    # As in a Django shell: what is defined here belongs to no file.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for module in plan["modules"]:
        __import__(module)
    for model in apps.get_app_config(plan["app"]).get_models():
        namespace[model.__name__] = model
    for block in plan["blocks"]:
        # So that a traceback names the page and its line.
        source = "\n" * (block["line"] - 1) + block["code"]
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, plan["page"], "exec", flags=flags, dont_inherit=True)
        if code.co_flags & inspect.CO_COROUTINE:
            async_to_sync(_awaited)(eval(code, namespace))
        else:
            exec(code, namespace)
    connections.close_all()
    faulthandler.cancel_dump_traceback_later()


async def _awaited(coroutine: Any) -> None:
    await coroutine


if __name__ == "__main__":
    _run_blocks(Path(sys.argv[1]))
