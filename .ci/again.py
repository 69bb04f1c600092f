"""``python .ci/again.py CACHE``: runs what failed in the last run of pytest once more, three times.

One test of many thousands, most of them about threads, processes and servers that are killed, may fail by chance on a
busy machine, and take those with it that share its server. What passes three times alone is told as flaky, to be looked
into, and rejects nothing; what fails again, or is more than a few tests, does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

MOST = 12
TIMES = 3


def main(cache: str) -> int:
    path = Path(cache, "v", "cache", "lastfailed")
    failed = list(json.loads(path.read_text())) if path.exists() else []
    if not 0 < len(failed) <= MOST:
        print(f"{len(failed)} tests failed: none is run again")
        return 1
    for turn in range(TIMES):
        print(f"again, {turn + 1} of {TIMES}: {', '.join(failed)}", flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *failed]
        if subprocess.run(command, check=False, env={**os.environ, "PARALLEL_ORM_TESTS": "again"}).returncode:
            return 1
    for test in failed:
        print(f"FLAKY: {test}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
