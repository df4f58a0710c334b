"""What every suite shares: the machine in the JSON, and the figures of `extra_info` under pytest-benchmark's
tables."""

import platform
from collections import defaultdict
from pathlib import Path

import pytest
import torch


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["processor"] = processor()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    groups = defaultdict(list)
    for bench in session.benchmarks if session else []:
        if bench.extra_info and not bench.has_error:
            groups[bench.group].append(bench)
    for group, benches in groups.items():
        terminalreporter.section(group, sep="-")
        for bench in benches:
            figures = "  ".join(f"{key} {value}" for key, value in bench.extra_info.items())
            terminalreporter.write_line(f"{bench.params['who']:<28} {bench.stats.median * 1e3:9.3f} ms  {figures}")
