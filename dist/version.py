"""The package's version, alone in a module that imports nothing so that setup.cfg can read it without torch."""

__version__ = "0.1.0"
