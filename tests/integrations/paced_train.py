"""`paced_train.py FILE FROM PAUSE_S …`: `undertow train …` that pauses in every step from number FROM on until FILE
exists, so that a run is not over before a test has done to it what it wants, however slow the test is. Pauses grow:
they are twice as long in step 20, and ten times in step 60.
"""

import sys
import time
from pathlib import Path

from undertow.__main__ import main
from undertow.examples.train import Run

_step = Run.step


def paced(file: Path, first: int, pause_s: float):
    def step(self, number):
        deadline_s = time.monotonic() + (pause_s * (1 + (number / 20) ** 2) if number >= first else 0.0)
        while time.monotonic() < deadline_s and not file.exists():
            time.sleep(0.02)
        return _step(self, number)

    return step


if __name__ == "__main__":
    Run.step = paced(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    sys.exit(main(["train", *sys.argv[4:]]))
