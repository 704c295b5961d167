"""The Slurm template on two nodes of one process each: bash, torchrun and signals are real, srun and scontrol shims."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from storms.pictures import write_pictures
from storms.processes import Run, children

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "configs" / "imagenet" / "train.slurm"
CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 2, num_heads: 2}}
data: {{root: {root}, num_workers: 1}}
train:
  epochs: 300
  global_batch_size: 6
  device: cpu
  num_threads: 1
  optimizer: {{lr: 1e-3}}
  log_every_steps: 1
eval: {{crop_pct: 1.0, every_epochs: 1000}}
"""
SHIMS = {
    # a step: the command once on each node, without srun's own options; or only the word that it leaves in run.json
    "srun": """\
while [[ $1 == --* ]]; do shift; done
if [[ ${STATUS+set} ]]; then
    [[ -z $STATUS ]] || printf '{\\n  "status": "%s"\\n}\\n' "$STATUS" > "$RUN_DIR/run.json"
    exit 3
fi
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & echo $! >> "$SHIMS/step-pids"; done
code=0
for pid in $(jobs -p); do wait "$pid" || code=$?; done
echo "$code" > "$SHIMS/step-code"
exit "$code"
""",
    "scontrol": """\
if [[ "$1 $2" == "show hostnames" ]]; then echo localhost; else echo "$@" >> "$SHIMS/requeued"; fi
""",
}


class Job:
    """A job of the template in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.shims = folder, folder / "shims"
        self.run = Run(folder / "run", ())
        self.shims.mkdir()
        for name, text in SHIMS.items():
            (self.shims / name).write_text(f"#!/bin/bash\n{text}")
            (self.shims / name).chmod(0o755)

    def start(self, **environment: str) -> subprocess.Popen:
        """What Slurm does when the job gets its nodes."""
        command = ["bash", str(TEMPLATE), str(self.folder / "tiny.yaml"), f"run_dir={self.run.folder}"]
        slurm = {"JOB_ID": str(os.getpid()), "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "1", "CPUS_PER_TASK": "1"}
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                **{f"SLURM_{name}": value for name, value in slurm.items()},
                "SLURM_JOB_NODELIST": "node[1-2]",
                "SHIMS": str(self.shims),
                "RUN_DIR": str(self.run.folder),
                "PATH": f"{self.shims}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )

    def signal_step(self) -> None:
        """SIGUSR1 to every process of the step, as Slurm sends it."""
        for pid in map(int, (self.shims / "step-pids").read_text().split()):
            for process in [*descendants(pid), pid]:
                os.kill(process, signal.SIGUSR1)

    @property
    def requests(self) -> list[str]:
        """What the job has asked of scontrol."""
        path = self.shims / "requeued"
        return path.read_text().splitlines() if path.exists() else []


def descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield from descendants(child)
        yield child


@pytest.mark.proof
def test_a_signal_before_the_limit_saves_the_run_and_requeues_the_job(tmp_path):
    write_pictures(tmp_path / "data", 17, 7, per_shard=5)
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(root=tmp_path / "data"))
    job = Job(tmp_path)
    process = job.start()
    deadline = time.monotonic() + 300
    while job.run.last_step < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    job.signal_step()
    assert process.wait(300) == 0
    assert (job.shims / "step-code").read_text() == "1\n"  # torchrun waited for its ranks, the signal did not kill it
    assert job.run.record["status"] == "stopped" and job.run.record["hardware"]["num_ranks"] == 2
    assert job.run.saved_step == job.run.last_step
    assert job.requests == [f"requeue {os.getpid()}"]


@pytest.mark.parametrize(("status", "code"), [("stopped", 0), ("completed", 3), ("failed", 3), ("running", 3), ("", 3)])
def test_only_a_start_that_was_stopped_is_requeued(tmp_path, status, code):
    """Not one that ends before it has written anything, such as under a config that is wrong by now."""
    job = Job(tmp_path)
    job.run.folder.mkdir()
    (job.run.folder / "run.json").write_text('{\n  "status": "stopped"\n}\n')  # by an earlier start
    assert job.start(STATUS=status).wait(300) == code
    assert len(job.requests) == (status == "stopped")


def test_a_job_without_a_config_says_so(tmp_path):
    result = subprocess.run(["bash", str(TEMPLATE)], capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "no config is given" in result.stderr
