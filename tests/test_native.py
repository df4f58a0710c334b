"""What only the C++ kernels can get wrong: instruction sets, threads, memory that is not theirs."""

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import stepkto_kernels
import torch
from on_backends import needs
from stepkto_kernels import (
    backend,
    backends,
    linear_logp,
    linear_logp_entropy,
    linear_logp_kl,
    native,
    reference_points,
    watch,
)
from stepkto_kernels.linear_logp import native as head
from stepkto_kernels.linear_logp import reference as truth

pytestmark = needs("linear_logp", "native")
TESTS = Path(__file__).parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(code, **environment):
    """`code` in a process of its own, which finds what this one finds."""
    path = os.pathsep.join([str(TESTS), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path} | environment,
    )  # fmt: skip


def results(function, *leaves, cotangent=1.0):
    leaves = [x.clone().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((x * cotangent).sum() for x in outputs if x.requires_grad)
    return *(x.detach() for x in outputs), *torch.autograd.grad(total, leaves)


def problem(n, d, v, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (torch.randn(v, d, generator=generator) * 4 / d**0.5).to(dtype)
    bias = torch.randn(v, generator=generator).to(dtype)
    return hidden, weight, bias, torch.randint(v, (n,), generator=generator)


CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]  # of x86, as torch names them


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in CAPABILITIES, reason="its builds are for x86")
@pytest.mark.parametrize(("capability", "products"), zip(CAPABILITIES, ["AVX2", "AVX2", "AVX512_CORE"], strict=True))
def test_on_lesser_processors(capability, products):
    """The tests of values and gradients again, with what this processor has and a lesser one lacks switched off."""
    here = torch.backends.cpu.get_cpu_capability()
    if CAPABILITIES.index(here) < CAPABILITIES.index(capability):
        pytest.skip(f"this processor has {here} only")
    environment = {"ATEN_CPU_CAPABILITY": capability.lower(), "ONEDNN_MAX_CPU_ISA": products}
    print_it = "from stepkto_kernels import native; native.missing(); print(native.functions().instruction_set())"
    asked = run(print_it, **environment)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith(f"{capability}, bf16 multiplied as fp32, ")
    code = f"""
        import pytest, sys
        files = [{str(TESTS)!r} + "/test_" + name + ".py" for name in ("linear_logp", "linear_logp_kl", "routing")]
        which = "native and (everything or truth and plain or routing) and not autocast and not compiles"
        sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", which, *files]))
    """
    done = run(code, **environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("filter_eps", [0.0, 2**-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_for_any_number_of_threads(dtype, filter_eps):
    hidden, weight, bias, target = problem(700, 140, 1500, dtype)
    target[::7] = -100
    before = torch.get_num_threads()
    values_N, found = torch.randn(100_000), []
    pair = functools.partial(linear_logp_entropy, target=target, filter_eps=filter_eps)

    def of_heads(h, w, b):
        return pair(h, w, bias=b)

    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            with backend("native"):
                values = results(of_heads, hidden, weight, bias, cotangent=0.7)
                kl = linear_logp_kl(hidden, weight, hidden * 0.9, weight, target)
                points = reference_points(values_N, *[torch.tensor([0, len(values_N)], dtype=torch.int32)] * 2)
                found.append((*values, *kl, *points))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("filter_eps", [0.0, 2**-6])
def test_the_workspace_changes_nothing_in_fp32(filter_eps, monkeypatch):
    hidden, weight, bias, target = problem(300, 8, 60_000, torch.float32)  # chunks of several tiles, and of one

    def gradients():
        with backend("native"):
            logp = functools.partial(linear_logp, target=target, filter_eps=filter_eps)
            return results(lambda h, w, b: logp(h, w, bias=b), hidden, weight, bias)

    whole = gradients()
    monkeypatch.setattr(head, "WORKSPACE_BYTES", 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, gradients(), strict=True))


@pytest.mark.parametrize("filter_eps", [0.0, 2**-9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_several_tiles_and_blocks_against_the_truth(dtype, filter_eps):
    hidden, weight, bias, target = problem(300, 8, 60_000, dtype)
    target[[5, 100]] = -100
    grad = torch.randn(300, generator=torch.Generator().manual_seed(1))
    grad[20:30] = 0
    with backend("native"), watch() as calls:
        found = results(
            lambda h, w, b: linear_logp(h, w, target, bias=b, filter_eps=filter_eps),
            hidden, weight, bias, cotangent=grad,
        )  # fmt: skip
    leaves = [x.double() for x in (hidden, weight, bias)]
    exact = results(lambda h, w, b: truth.linear_logp(h, w, target, bias=b), *leaves, cotangent=grad.double())
    assert calls[0].path == ("dense" if filter_eps == 0 else "routed")
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0, atol=1e-5)
    # bf16 rounds every dL/dz, independently; what is left out weighs up to its share of a gradient's L1 norm
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for a, b in zip(found[1:], exact[1:], strict=True):
        assert (a.double() - b).norm() <= (rounding + 2 * filter_eps) * b.norm()


def test_sums_carried_in_24_bits_are_rounded_to_nearest_in_the_end():
    """Cut off instead, they would be half a unit in the last place too small, on average."""
    hidden, weight, _, target = problem(300, 40, 3000, torch.bfloat16)
    with backend("native"):
        _, found, _ = results(lambda h, w: linear_logp(h, w, target, filter_eps=0), hidden, weight)
    leaves = hidden.double(), weight.double()
    _, exact, _ = results(lambda h, w: truth.linear_logp(h, w, target), *leaves)
    units = (found.double().abs() - exact.abs()) / (torch.finfo(torch.bfloat16).eps * exact.abs())
    assert units.median().abs() < 0.05


def test_a_target_that_is_impossible_spoils_no_gradient():
    """A logit of -inf, as a mask on the vocabulary gives: its log-probability is -inf, all else stays finite."""
    hidden, weight, bias = torch.ones(2, 1), torch.zeros(3, 1), torch.tensor([0, -float("inf"), 0])
    with backend("native"):
        function = functools.partial(linear_logp, target=torch.tensor([1, 0]))
        logp, *gradients = results(lambda h, w, b: function(h, w, bias=b), hidden, weight, bias)
    assert logp.tolist() == [-float("inf"), pytest.approx(-0.693147)]
    assert all(torch.isfinite(x).all() for x in gradients)


def test_an_infinite_logit_takes_all_probability():
    with backend("native"):
        logp = linear_logp(torch.tensor([[1e30]]), torch.tensor([[1.0], [1e30]]), torch.tensor([0]))
    assert logp.item() == -float("inf")


def test_a_head_of_one_row_may_have_any_stride():
    weight = torch.randn(8, 1).T
    hidden = torch.randn(5, 8)
    with backend("native"):
        logp, dhidden, _ = results(lambda h, w: linear_logp(h, w, torch.zeros(5, dtype=torch.int64)), hidden, weight)
    assert logp.eq(0).all()
    assert dhidden.eq(0).all()


def test_products_can_be_switched_off_and_on_again():
    hidden, weight, _, target = problem(20, 16, 300, torch.bfloat16)
    with backend("native"):
        before = linear_logp(hidden, weight, target)
        with torch.backends.mkldnn.flags(enabled=False):
            without = linear_logp(hidden, weight, target)
        after = linear_logp(hidden, weight, target)
    assert torch.equal(before, after)
    torch.testing.assert_close(without, before, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_of_long_rows_are_within_1e_5_of_fp64(dtype):
    hidden, weight, _, target = problem(64, 2048, 3000, dtype)
    hidden[0], target[0] = weight[17] * 1.5, 17  # a logit of 24, and a probability near 1
    with backend("native"):
        found = linear_logp(hidden, weight, target)
    exact = truth.linear_logp(hidden.double(), weight.double(), target)
    assert (found.double() - exact).abs().max() < 1e-5


GUARDED = """
    import ctypes, itertools, mmap, torch
    from stepkto_kernels import backend, linear_logp_entropy, linear_logp_kl

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    PAGE = mmap.PAGESIZE

    def guarded(x):
        '''A copy that ends where memory ends: the page behind it may not be touched.'''
        size = max(x.numel() * x.element_size(), 1)
        whole = -(-size // PAGE) * PAGE
        start = libc.mmap(None, whole + PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 2**64 - 1, 0)
        assert libc.mprotect(start + whole, PAGE, 0) == 0
        memory = (ctypes.c_char * size).from_address(start + whole - size)
        return torch.frombuffer(memory, dtype=x.dtype, count=x.numel()).view(x.shape).copy_(x)

    shapes = [(1, 1, 1), (3, 7, 5), (17, 31, 129), (16, 16, 16), (33, 65, 257), (300, 3, 130), (5, 300, 127)]
    for (n, d, v), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16, torch.float16)):
        hidden, weight, bias = (guarded(torch.randn(size).to(dtype)) for size in ((n, d), (v, d), (v,)))
        target = guarded(torch.randint(v, (n,)))
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        with backend("native"):
            for filter_eps in (0.0, 0.1):
                logp, entropy = linear_logp_entropy(hidden, weight, target, bias=bias, filter_eps=filter_eps)
                grad = guarded(torch.ones(n))
                torch.autograd.grad((logp, entropy), leaves, (grad, grad))
            linear_logp_kl(hidden, weight, hidden, weight, target)
    print("nothing touched")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages by mmap and mprotect, as Linux has them")
@pytest.mark.parametrize("products", ["ALL", "AVX2"])
def test_nothing_is_read_behind_the_inputs(products):
    done = run(GUARDED, ONEDNN_MAX_CPU_ISA=products)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    assert "nothing touched" in done.stdout


PEAK = """
    import ctypes, gc, sys, torch
    from pathlib import Path
    from stepkto_kernels import backend, linear_logp

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    M_MMAP_THRESHOLD = -3  # glibc's: what is freed goes back at once, so that only what is in use counts
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    n, d, v = 2048, 64, 32768
    hidden = torch.randn(n, d).requires_grad_()
    weight = (torch.randn(v, d) * float(sys.argv[1])).requires_grad_()
    target = torch.randint(v, (n,))

    def call(filter_eps):
        with backend("native"):
            logp = linear_logp(hidden, weight, target, filter_eps=filter_eps)
        return torch.autograd.grad(logp.sum(), (hidden, weight))

    for filter_eps in (0.0, 2**-9):
        call(filter_eps)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        grads = call(filter_eps)
        extra = status("VmHWM") - before - sum(x.numel() * x.element_size() for x in grads)
        print(extra / (4 * n * v))
        del grads
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("scale", ["0.01", "1"], ids=["flat", "peaked"])
def test_memory_beyond_inputs_and_gradients_is_a_twentieth_of_the_logits(scale):
    done = run(PEAK.replace("sys.argv[1]", repr(scale)))
    shares = [float(line) for line in done.stdout.split()]
    assert len(shares) == 2, done.stderr[-2000:]
    assert max(shares) < 0.05


def test_fp64_is_left_to_the_reference():
    hidden, weight, _, target = problem(3, 4, 5, torch.float64)
    with backend("native"), pytest.raises(RuntimeError, match=r"products are in fp32 and .* float64"):
        linear_logp(hidden, weight, target)
    assert linear_logp(hidden, weight, target).dtype == torch.float64
    assert backends.choose("linear_logp", hidden) is backends._KERNELS["linear_logp"]["reference"]
    assert backends.choose("linear_logp", hidden.float()) is backends._KERNELS["linear_logp"]["native"]
    assert native.refuses("step_kto", hidden) is None


def test_targets_out_of_range_that_nobody_checked_touch_no_memory():
    """Garbage in, garbage out, but not beyond: validate=False promises no more."""
    hidden, weight, _, _ = problem(4, 8, 300, torch.float32)
    target = torch.tensor([2**40, -(2**40), 300, 5])
    with backend("native"):
        logp, dhidden, dweight = results(
            lambda h, w: linear_logp(h, w, target, validate=False, filter_eps=2**-9), hidden, weight
        )
        good = linear_logp(hidden[3:], weight, target[3:])
    assert torch.equal(logp[3:], good)
    assert dhidden.shape == hidden.shape
    assert dweight.shape == weight.shape


def test_nan_in_a_hidden_state_stays_with_its_token():
    hidden, weight, _, target = problem(40, 8, 300, torch.bfloat16)
    hidden[7] = float("nan")
    with backend("native"):
        logp = linear_logp(hidden, weight, target)
        entropy = linear_logp_entropy(hidden, weight, target)[1]
        kl = linear_logp_kl(hidden, weight, hidden, weight, target).kl
    for x in (logp, entropy, kl):
        assert x.isnan().nonzero().flatten().tolist() == [7]


def test_the_table_says_what_it_runs_on():
    done = subprocess.run([sys.executable, "-m", "stepkto_kernels"], capture_output=True, text=True, check=True)
    instructions, _, threads = native.functions().instruction_set().rpartition(", ")
    assert f"native: {instructions}, " in done.stdout
    assert threads in ("1 thread", "one thread: built without OpenMP")  # conftest.py set one
    assert stepkto_kernels.__version__ in done.stdout
