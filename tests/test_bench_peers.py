"""bench/peers.py on the CPU at a tiny shape: every peer against the fp64 truth, or its own reason why it cannot run."""

import copy
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import head_inputs  # noqa: E402
import peers  # noqa: E402
import providers  # noqa: E402

TINY = head_inputs.SHAPES["tiny"]
FP32 = TINY._replace(dtype="float32")
CLOSE = (1e-3, 1e-3)  # of peers in fp32, whose logits nobody rounds
PEERS = {name: each for name, each in providers.PROVIDERS.items() if not each.op and each.kind != "none"}
PLAIN = [name for name, each in PEERS.items() if not each.compiles]
COMPILED = [name for name, each in PEERS.items() if each.compiles]
GPU_ONLY = ("Liger cross-entropy", "cut-cross-entropy", "QuACK", "verl")


@pytest.fixture(scope="module")
def make():
    return head_inputs.Maker(torch.device("cpu"))


def start(name, x, gradients=True):
    """(its call, None), or (None, why there is none)"""
    try:
        return PEERS[name].start(x, gradients), None
    except (ImportError, providers.UnsupportedError) as error:
        return None, str(error)


def started(name, x, gradients=True):
    call, reason = start(name, x, gradients)
    if call is None:
        pytest.skip(f"{name}: {reason}")
    return call


def too_far(x, name, found, allowed=providers.TOLERANCE["peers"]):
    """Which of the errors are beyond what is allowed; NaN is."""
    pairs = zip(providers.errors(x, PEERS[name], found), allowed, strict=True)
    return [error is not None and not error <= most for error, most in pairs]


def check(x, name, ways=(False, True), allowed=providers.TOLERANCE["peers"]):
    for gradients in ways:
        found = started(name, x, gradients)()
        assert not any(too_far(x, name, found, allowed)), providers.errors(x, PEERS[name], found)
        dtypes = [None if each is None else each.dtype for each in (found.dhidden, found.dweight)]
        assert dtypes == ([x.hidden.dtype, x.weight.dtype] if gradients else [None, None])


@pytest.mark.parametrize("inputs", ["flat", "peaked 0.6"])
@pytest.mark.parametrize("name", PLAIN)
def test_peers_agree_with_the_truth(make, inputs, name):
    check(make(TINY, inputs), name)


@pytest.mark.parametrize("name", PLAIN)
def test_peers_in_fp32_agree_closely(make, name):
    check(make(FP32, "peaked 0.6"), name, allowed=CLOSE)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_peers_agree_with_the_truth(make, monkeypatch, name):
    """Two inputs with one compilation."""
    monkeypatch.setattr(peers, "ROWS", 40)  # and a rest of 16
    check(make(TINY, "peaked 0.6"), name, ways=[True])
    compiled = counters["stats"]["unique_graphs"]
    check(make(TINY, "flat"), name, ways=[True])
    assert counters["stats"]["unique_graphs"] == compiled


def test_every_shape_is_compiled_for_itself(monkeypatch):
    """Another shape makes torch.compile start afresh; other inputs of the same one, or another peer, do not."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    peers.forget_other_shapes.cache_clear()
    counts = []
    for shape in (TINY, TINY, FP32, FP32, TINY):
        peers.forget_other_shapes(shape, torch.device("cpu"))
        counts.append(len(resets))
    peers.forget_other_shapes.cache_clear()
    assert counts == [1, 1, 2, 2, 3]


def test_a_cpu_without_a_compiler_is_a_reason(make, monkeypatch):
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    with pytest.raises(providers.UnsupportedError, match="needs a C\\+\\+ compiler"):
        PEERS["full logits, torch.compile"].start(make(TINY, "flat"), True)


@pytest.mark.parametrize("name", GPU_ONLY)
def test_peers_that_need_a_gpu_say_so_in_one_line(make, name):
    call, reason = start(name, make(TINY, "flat"))
    assert call is None
    assert len(reason.splitlines()) == 1
    assert ("need" in reason and reason.endswith("GPU")) or reason.startswith("No module named")


def test_no_other_peer_needs_a_gpu(make):
    reasons = {name: start(name, make(TINY, "flat"))[1] for name in PEERS}
    assert {name for name, reason in reasons.items() if reason and "GPU" in reason} <= set(GPU_ONLY)


@pytest.mark.parametrize("name", PEERS)
def test_every_reason_is_one_line(make, name):
    """With a softcap, and completions of unequal length, several have one."""
    plain = make(TINY, "flat")
    shape = TINY._replace(softcap=5.0, completion=25, n=90)
    _, reason = start(name, head_inputs.Inputs(shape, "x", plain.hidden[:90], plain.weight))
    if reason is not None:
        assert len(reason.splitlines()) == 1
        assert any(word in reason for word in ("need", "has no", "No module named"))


@pytest.mark.parametrize("part", ["value", "dhidden", "dweight"])
@pytest.mark.parametrize("name", ["full logits", "torch linear_cross_entropy, chunked", "Liger KTO"])
def test_a_peer_that_is_off_by_a_factor_is_caught(make, monkeypatch, name, part):
    x = make(TINY, "flat")
    right = started(name, x)

    def off(x, gradients):
        found = right()
        return lambda: found._replace(**{part: getattr(found, part) * (1.6 if part == "value" else 1.2)})

    assert too_far(x, name, right()) == [False, False]
    monkeypatch.setitem(PEERS, name, PEERS[name]._replace(start=off))
    assert too_far(x, name, started(name, x)()) == [part == "value", part != "value"]


def test_trl_without_the_packages_of_its_trainers(make, monkeypatch):
    package = pytest.importorskip("trl.trainer")
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    monkeypatch.delattr(package, "utils", raising=False)
    check(make(TINY, "peaked 0.6"), "TRL")
    assert not hasattr(sys.modules["trl.trainer.utils"], "__file__")  # ours


def test_a_package_whose_init_cannot_be_run(tmp_path, monkeypatch):
    folder = tmp_path / "package_that_needs_much"
    folder.mkdir()
    (folder / "__init__.py").write_text("import a_package_that_nobody_has\n")
    (folder / "kernel.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="a_package_that_nobody_has"):
        import package_that_needs_much.kernel
    peers.without_init("package_that_needs_much")
    import package_that_needs_much.kernel

    assert package_that_needs_much.kernel.answer == 42
    with pytest.raises(ImportError, match="No module named 'a_package_that_nobody_has'"):
        peers.without_init("a_package_that_nobody_has")


def verl_of_plain_torch(hidden, weight, labels, temperature, reduction):
    assert (temperature, reduction) == (1.0, "none")
    logp_nv = torch.log_softmax((hidden @ weight.T).float(), -1)
    return logp_nv.gather(1, labels[:, None]).squeeze(1), -(logp_nv.exp() * logp_nv).sum(-1)


def quack_of_plain_torch(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean"):
    return torch.nn.functional.cross_entropy((x @ weight.T).float(), target)


@pytest.mark.parametrize(
    ("name", "module", "function", "stand_in"),
    [
        ("verl", "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", verl_of_plain_torch),
        ("QuACK", "quack.linear_cross_entropy", "chunked_linear_cross_entropy", quack_of_plain_torch),
    ],
)
def test_signs_and_results_of_peers_that_need_a_gpu(make, monkeypatch, name, module, function, stand_in):
    """With plain torch in the place of their functions, which returns what their documentation says."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    setattr(sys.modules[module], function, stand_in)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    x = copy.copy(make(TINY, "flat"))
    x.device = types.SimpleNamespace(type="cuda")
    check(x, name)


@pytest.mark.parametrize(("capability", "can"), [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_quack_is_for_hopper_and_later(make, monkeypatch, capability, can):
    module = types.ModuleType("quack.linear_cross_entropy")
    module.chunked_linear_cross_entropy = quack_of_plain_torch
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    x = copy.copy(make(TINY, "flat"))
    x.device = types.SimpleNamespace(type="cuda")
    if can:
        PEERS["QuACK"].start(x, True)
    else:
        with pytest.raises(providers.UnsupportedError, match="Hopper or Blackwell"):
            PEERS["QuACK"].start(x, True)
