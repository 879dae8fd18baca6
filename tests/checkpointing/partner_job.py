"""One rank on one machine: saves to memory and its partner's, then waits to be killed; or restores and tells.

    RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python partner_job.py train|restart ROOT [MEMORY]

MEMORY: a folder to pass for the machine's memory, where the machine has none of its own.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same

from undertow.checkpointing import Partner
from undertow.dist.launch import detect, init_process_group

act, root, memory = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
launch = detect()
init_process_group(launch, device=torch.device("cpu"))
job = Job(seed=0 if act == "train" else 9, layers=1)
partner = Partner(host=f"machine-{launch.rank}", memory=memory[0]) if memory else Partner()
ckpt = job.checkpointer(root, host_every=1, partner=partner)
if act == "train":
    for step in range(1, 4):
        ckpt.step(step)
        job.advance(step)
        assert all(report.ok for report in ckpt.wait()), ckpt.reports
    print("saved", flush=True)
    signal.pause()
found = ckpt.restore()
answer = Job(layers=1)
for step in range(1, found or 0):
    answer.advance(step)
crew = ckpt.host.crew
hosts = [place.host.rsplit("/", 1)[-1] for place in crew.places]
places = [place.address for place in crew.places]
right = same(job.state(), answer.state())
print(json.dumps([found, right, ckpt.origins, crew.partners, hosts, places]), flush=True)
ckpt.close()
