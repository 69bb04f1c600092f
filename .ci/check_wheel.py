"""Fails unless the wheel holds the package, typed, and nothing else."""

import sys
import zipfile
from pathlib import Path

wheel = Path(sys.argv[1])
names = zipfile.ZipFile(wheel).namelist()
folders = {name.split("/")[0] for name in names}
strangers = {folder for folder in folders if folder != "parallel_orm" and ".dist-info" not in folder}
missing = {"parallel_orm/__init__.py", "parallel_orm/py.typed", "parallel_orm/report.html"} - set(names)
licensed = any(".dist-info/" in name and name.endswith("LICENSE") for name in names)
if strangers or missing or not licensed:
    sys.exit(f"{wheel.name}: beside the package: {sorted(strangers)}, missing: {sorted(missing)}, licence: {licensed}")
print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size // 1024} KiB")
