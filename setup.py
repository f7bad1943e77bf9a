"""Builds the native parts with csrc/build.py; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import build as native  # noqa: E402  (csrc/build.py)


class NinjaBuild(build_ext):
    """Lets ninja make the shared objects, in place for an editable install."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = ROOT / "effattn" if in_place else Path(self.build_lib).resolve() / "effattn"
        # pip's folder for objects is a new one every time; in place, only what changed is compiled again.
        objects = ROOT / "build" / "editable" if in_place else Path(self.build_temp).resolve()
        self._built = native.build(native.Target.native(), package, objects)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._built]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # The sources are csrc/build.py's business; the extension is named so that wheels carry a platform tag.
    ext_modules=[Extension("effattn._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
