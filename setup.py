"""Builds the MPI interposer's libraries into the wheel (mpi_interpose/prebuild.py); all else stands in setup.cfg.

A wheel with libraries is for one platform and any Python. An editable install prebuilds nothing: sources may change.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1 leaves it to the package wheel
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


def prebuild():
    """undertow.mpi_interpose.prebuild of this very tree, which lies in a folder of any name. Needs no dependency."""
    spec = importlib.util.spec_from_file_location(
        "undertow", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = sys.modules["undertow"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return importlib.import_module("undertow.mpi_interpose.prebuild")


class BuildWithLibraries(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        self.made = prebuild().build_into(Path(self.build_lib) / "undertow" / "mpi_interpose" / "prebuilt")

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if Path(module[2]).resolve() != ROOT / "setup.py"]

    def get_outputs(self, include_bytecode=True):
        made = getattr(self, "made", [])
        return [*super().get_outputs(include_bytecode), *map(str, made), *(str(m.with_suffix(".txt")) for m in made)]


class PlatformWheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.libraries = None

    def run(self):
        self.run_command("build")
        self.libraries = self.get_finalized_command("build_py").made
        self.skip_build = True
        self.root_is_pure = not self.libraries
        if self.libraries:  # with root_is_pure the files would go where the interpreter's version names a folder
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self):
        if not self.libraries:
            return super().get_tag()
        return "py3", "none", prebuild().platform_tag(self.libraries)


setup(cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel})
