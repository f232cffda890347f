"""Only what pyproject.toml cannot say: recipes/ and hardware/ lie beside the package and travel inside the wheel as edgekd/_data."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithData(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # an editable install reads them where they are
            for name in ("recipes", "hardware"):
                copytree(Path(__file__).parent / name, Path(self.build_lib) / "edgekd" / "_data" / name, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithData})
