"""What holds for every test: which run here, Triton without a GPU, hypothesis without chance, and what saves time."""

from __future__ import annotations

import gc
import logging
import os

# Tests run side by side, one a core, and so do the processes that they start: more threads would spin, waiting for each
# other. PyTorch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# Without a GPU kernels run in Triton's interpreter, which has to be asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest adds its handlers to loggers that do not propagate, and PyTorch then writes its trace, stacks included, for no
# reader: a tenth of the time to compile.
logging.getLogger("torch.__trace").propagate = True

# Same examples in every run, and no timed assertion on a machine that others use as well.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("reproducible"), max_examples=2000)
hypothesis.settings.load_profile("reproducible")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked ``gpu`` where there is no GPU: a skip would read as a gap of the machine's making."""
    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what was imported out of garbage collections, which tests that compile cause many of."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
