"""What every suite shares: the machine in the JSON, what was not timed and why, and the figures of `extra_info` under
pytest-benchmark's tables."""

import importlib.metadata
import platform
from collections import defaultdict
from pathlib import Path

import pytest
import torch

PEERS = ("transformers", "trl", "liger-kernel")


def pytest_addoption(parser):
    parser.addoption("--goals", action="store_true", help="the shapes that the goals are stated for: half an hour")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["processor"] = processor()
    machine_info["instructions"] = torch.backends.cpu.get_cpu_capability()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["packages"] = {name: version(name) for name in PEERS}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """What was skipped or failed, with the reason: the JSON would not know that it was ever meant to run."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    output_json["not_timed"] = {
        report.nodeid: report.longrepr[-1]
        if isinstance(report.longrepr, tuple)
        else report.longrepr.reprcrash.message.splitlines()[0]
        for outcome in ("skipped", "failed")
        for report in reporter.stats.get(outcome, [])
    }


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
            terminalreporter.write_line(f"{bench.params['who']:<48} {bench.stats.median * 1e3:9.3f} ms  {figures}")
