"""What every test finds set, whether it is started by `make test` or by a bare `pytest`."""

import os
import runpy
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # and fork without a warning
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` has two processes side by side
os.environ["LLAVA_NB_CACHE"] = (
    tempfile.mkdtemp()
)  # converted records, not among the user's own, and each process of tests has its own
NO_NETWORK = Path(__file__).parent / "no_network"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(NO_NETWORK), os.environ.get("PYTHONPATH")))
)  # for the processes that tests start
os.environ["LLAVA_NB_NETWORK_LOG"] = tempfile.mkstemp()[1]
runpy.run_path(str(NO_NETWORK / "sitecustomize.py"))  # for this one
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(autouse=True)
def nobody_is_called():
    "A test fails that reached for the network, also where the code that did swallowed the error"
    yield
    log = Path(os.environ["LLAVA_NB_NETWORK_LOG"])
    said = log.read_text()
    log.write_text("")
    assert not said, f"reached for the network:\n{said}"


def pytest_terminal_summary(terminalreporter):
    'What tests counted or measured, `record_property("reached", TEXT)`, after all else; the same said by several is counted'
    said = Counter(
        text for r in terminalreporter.getreports("passed") for key, text in r.user_properties if key == "reached"
    )
    if not said:
        return
    terminalreporter.section("what was reached")
    for text, n in said.items():
        terminalreporter.write_line(f"{n} x {text}" if n > 1 else text)


def pytest_collection_modifyitems(items):
    "Tests marked `gpu` are skipped, by name, where there is none"
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs CUDA"))
