"""`undertow train` with a pause in every step until the file named first exists, so that the world can change."""

import sys
import time
from pathlib import Path

from undertow.__main__ import main
from undertow.examples.train import Run

PAUSE_S = 0.5
_step = Run.step


def step(self, number):
    if not Path(sys.argv[1]).exists():
        time.sleep(PAUSE_S)
    return _step(self, number)


if __name__ == "__main__":
    Run.step = step
    sys.exit(main(["train", *sys.argv[2:]]))
