"""Uses the installed wheel as a stranger would: in a new project, and in a plain script.

Run from outside the checkout with an interpreter that has only the wheel and
what it asks for.
"""

import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import parallel_orm

PROJECT = {
    "project/__init__.py": "",
    "project/settings.py": """
        from pathlib import Path

        SECRET_KEY = "smoke"
        USE_TZ = True
        INSTALLED_APPS = ["shop"]
        DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
        DATABASES = {
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": Path(__file__).parent / "db.sqlite3",
            }
        }
        """,
    "shop/__init__.py": "",
    "shop/models.py": """
        from django.db import models
        from parallel_orm import ParallelManager


        class Thing(models.Model):
            name = models.CharField(max_length=20)

            objects = ParallelManager()
        """,
    "manage.py": """
        import os
        import sys

        if __name__ == "__main__":
            os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
            from django.core.management import execute_from_command_line

            execute_from_command_line(sys.argv)
        """,
    "use.py": """
        import faulthandler
        import os

        from shop.models import Thing


        def use():
            # An alarm: says where every thread hangs.
            faulthandler.dump_traceback_later(90, exit=True)
            Thing.objects.bulk_create(Thing(name=f"n{i}") for i in range(2500))
            things = Thing.objects.filter(pk__gt=0).order_by("pk")
            counted = things.all()
            counted.start_count()
            assert counted.count() == 2500
            fetched = things.filter(pk__lte=10).start_fetch()
            assert [thing.name for thing in fetched] == [f"n{i}" for i in range(10)]
            walked = [thing.pk for thing in things.chunked_iterator(chunk_size=400)]
            assert walked == list(things.values_list("pk", flat=True))
            answers = things.parallel_map(
                lambda thing: (thing.name.upper(), os.getpid()), processes=2, chunk_size=500
            )
            assert [name for name, _ in answers] == [f"N{i}" for i in range(2500)]
            assert os.getpid() not in {pid for _, pid in answers}
            print(str(answers.report).splitlines()[0])
            faulthandler.cancel_dump_traceback_later()
        """,
    # A guard, because worker processes of a script import it again.
    "script.py": """
        import os

        if __name__ == "__main__":
            os.environ["DJANGO_SETTINGS_MODULE"] = "project.settings"
            import django

            django.setup()
            from use import use

            use()
        """,
    # No settings module at all.
    "configured.py": """
        from pathlib import Path

        from django.conf import settings

        if __name__ == "__main__":
            settings.configure(
                SECRET_KEY="smoke",
                USE_TZ=True,
                INSTALLED_APPS=["shop"],
                DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
                DATABASES={
                    "default": {
                        "ENGINE": "django.db.backends.sqlite3",
                        "NAME": Path(__file__).parent / "project" / "db.sqlite3",
                    }
                },
            )
            import django

            django.setup()
            from use import use

            use()
        """,
}

FLUSH = ["manage.py", "flush", "--no-input"]
USES = [
    ["manage.py", "migrate", "--run-syncdb", "--verbosity=0"],
    ["manage.py", "check"],
    ["manage.py", "shell", "-c", "from use import use; use()"],
    FLUSH,
    ["script.py"],
    FLUSH,
    ["configured.py"],
]


def main() -> None:
    package = Path(parallel_orm.__file__).parent
    assert package.parent.name == "site-packages", package
    print(f"parallel_orm {parallel_orm.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in PROJECT.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(text).lstrip())
        for use in USES:
            print("$ python", *use, flush=True)
            subprocess.run([sys.executable, "-W", "error", *use], cwd=folder, check=True)


if __name__ == "__main__":
    main()
