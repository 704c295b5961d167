"""A trace of some of a run's steps by torch.profiler: where the time goes, of the main rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from vitreuse.config import ProfileConfig
from vitreuse.io.durable import durable_file
from vitreuse.io.process import print_note

TRACE = "trace.json"


class StepTrace:
    """Traces the steps that a recipe names, with the waits for their data, into a file for Perfetto.

    Args:
        settings: Which steps; None for none.
        folder: The run folder, in which trace.json appears once the last of these steps is done.
        device: Where the run computes.
    """

    def __init__(self, settings: ProfileConfig | None, folder: Path, device: torch.device) -> None:
        self.settings, self.path = settings, folder / TRACE
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile: profile | None = None

    def go_on(self, step: int) -> None:
        """Told how many steps are done before this start; says so where the first to trace is one and left no trace."""
        if self.settings is not None and step >= self.settings.first_step and not self.path.exists():
            print_note(f"train.profile traces nothing: step {self.settings.first_step} was done before this start.")

    def begin(self, step: int) -> None:
        """Told how many steps are done, before the data of the next one are asked for."""
        if self.settings is not None and self._profile is None and step == self.settings.first_step - 1:
            self._profile = profile(activities=self._activities, record_shapes=True)
            self._profile.start()

    def reach(self, step: int) -> None:
        """Told how many steps are done, before anything else is."""
        if self.settings is not None and step == self.settings.first_step - 1 + self.settings.num_steps:
            self.end()

    def end(self) -> None:
        """Writes what was traced, of fewer steps where a run stops amid them."""
        if self._profile is None:
            return
        self._profile.stop()
        with durable_file(self.path) as file:
            self._profile.export_chrome_trace(file.name)
        self._profile, self.settings = None, None
        print_note(f"{self.path} has the trace: ui.perfetto.dev shows it.")
