"""What every test finds set, whether it is started by `make test` or by a bare `pytest`."""
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")                 # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")     # and fork without a warning
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("LLAVA_NB_CACHE", tempfile.mkdtemp())   # converted records, not among the user's own
if shutil.which("nvidia-smi") is None: os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_collection_modifyitems(items):
    "Tests marked `gpu` are skipped, by name, where there is none"
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked: return
    import torch
    if torch.cuda.is_available(): return
    for item in marked: item.add_marker(pytest.mark.skip(reason="needs CUDA"))
