"""Memory, descriptors, threads and shared memory over many steps and over resumes. SOAK says how many steps: 300 every day, 10,000 by `make torture`."""

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from runs import TIMEOUT, command, config, make_world

STEPS, WARM = int(os.environ.get("SOAK", 300)), 100


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def shared() -> set[str]:
    return {p.name for p in Path("/dev/shm").iterdir()}


def held(p: psutil.Process) -> tuple[int, int, int]:
    """Bytes of its own (RssAnon: without files and what it shares with workers), descriptors, threads. Batches on their way hold some descriptors."""
    own = next(line for line in Path(f"/proc/{p.pid}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(own.split()[1]) * 1024, p.num_fds(), p.num_threads()


def looked_at(file: Path) -> tuple[int, list[tuple[int, int, int, int]]]:
    """Run to the end; what it holds at every logged step."""
    process, found = subprocess.Popen(**command(file, 0), stdout=subprocess.PIPE, stderr=subprocess.STDOUT), []
    p = psutil.Process(process.pid)
    for line in process.stdout:
        if not line.startswith("step"):
            continue
        try:
            found.append((int(line.split()[1].split("/")[0]), *held(p)))
        except (psutil.Error, OSError):
            pass  # it is gone already
    return process.wait(TIMEOUT), found


@pytest.mark.slow
def test_a_long_run_holds_no_more_at_its_end_than_after_its_first_steps(world, record_property):
    before = shared()
    file, _ = config(
        world,
        "soak",
        max_steps=STEPS,
        save_steps=STEPS // 6,
        save_total_limit=2,
        logging_steps=10,
        dataloader_num_workers=2,
    )
    code, found = looked_at(file)
    assert code == 0 and found[-1][0] >= STEPS - 20
    steps, memory, descriptors, threads = np.array([f for f in found if f[0] > WARM][:-1]).T
    third = len(steps) // 3
    early, late = (np.median(memory[part]) / 1e6 for part in (slice(third), slice(-third, None)))
    apart = np.median(steps[-third:]) - np.median(steps[:third])
    record_property(
        "reached",
        f"{STEPS:,} steps: {early:.1f} MB, {late:.1f} MB {apart:.0f} steps later ({(late - early) / apart * 1000:+.2f} MB per 1,000 steps); {descriptors[:third].max()}, then {descriptors[-third:].max()} descriptors at most; {threads.min()}-{threads.max()} threads",
    )
    assert late - early < 1e-3 * apart + 1.5  # MB; the allocator takes a piece now and then
    assert descriptors[-third:].max() <= descriptors[:third].max() + 8 and np.ptp(threads) <= 2
    assert shared() <= before


@pytest.mark.slow
def test_five_resumes_hold_no_more_than_the_first(world, record_property):
    before, ends = shared(), []
    for k in range(6):
        file, _ = config(
            world,
            "resumed",
            max_steps=120,
            num_train_epochs=1,
            save_steps=20,
            save_total_limit=2,
            logging_steps=2,
            dataloader_num_workers=2,
            lr_scheduler_type="constant",
        )
        process = subprocess.Popen(**command(file, 0), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        p, first = psutil.Process(process.pid), None
        for line in process.stdout:
            if not line.startswith("step"):
                continue
            step = int(line.split()[1].split("/")[0])
            first = first or step
            if step >= first + 14:
                break
        ends.append(held(p))
        p.terminate()
        process.stdout.read()
        assert process.wait(TIMEOUT) == 75
    memory, descriptors, threads = np.array(ends).T
    record_property(
        "reached",
        f"6 starts: {memory.min() / 1e6:.0f}-{memory.max() / 1e6:.0f} MB, {descriptors.tolist()} descriptors, {threads.tolist()} threads",
    )
    assert (
        memory[-1] - memory[1] < 10e6 and descriptors[-1] <= descriptors[1:3].max() + 8 and np.ptp(threads[1:]) <= 2
    )  # the first start loads no checkpoint
    time.sleep(1)
    assert shared() <= before
