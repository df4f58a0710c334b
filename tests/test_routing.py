"""The routed backward: which (token, vocabulary tile) pairs it visits, what it leaves out, and what it says of that."""

import functools
import itertools

import pytest
import stepkto_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_backends import INTERPRETING, device_of, fixture_over, moved, where_it_runs
from stepkto_kernels import backend, backends, watch
from stepkto_kernels.linear_logp import eager, native
from stepkto_kernels.linear_logp import reference as truth
from stepkto_kernels.linear_logp.eager import VOCAB_TILE

linear_logp, linear_logp_entropy = moved(stepkto_kernels.linear_logp), moved(stepkto_kernels.linear_logp_entropy)
on_backend = fixture_over("linear_logp", "native", "triton")
on_triton = fixture_over("linear_logp", "triton")  # how its kernels go about it
BLOCK = 128
FLOOR = 1e-6  # of fp32 arithmetic


def peaked(tokens, tiles, seed=0, spread=6.0):
    """Logits of (tokens, tiles * VOCAB_TILE) entries, most of whose mass lies in a few tiles, and sampled targets."""
    generator = torch.Generator().manual_seed(seed)
    offset = spread * torch.randn(tokens, tiles, generator=generator)
    z = torch.randn(tokens, tiles, VOCAB_TILE, generator=generator) + offset[..., None]
    z = z.flatten(1)
    target = torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(1)
    return z, target


def logit_gradient(z, target, grad, grad_entropy=None, **options):
    """dL/dlogits, read off dhidden: with the identity for a head, hidden states are logits."""
    hidden = z.clone().requires_grad_()
    head = torch.eye(z.shape[1])
    if grad_entropy is None:
        total = (linear_logp(hidden, head, target, **options) * grad).sum()
    else:
        logp, entropy = linear_logp_entropy(hidden, head, target, **options)
        total = (logp * grad).sum() + (entropy * grad_entropy).sum()
    return torch.autograd.grad(total, hidden)[0].double()


def masses(z, target):
    """Truth: the mass of each (token, tile) pair without the target's entry, and 1 - p of the targets; fp64."""
    p = z.double().softmax(-1)
    here = torch.nn.functional.one_hot(target, z.shape[1]).bool()
    p = p.masked_fill(here, 0)
    return p.unflatten(1, (-1, VOCAB_TILE)).sum(-1), p.sum(-1)


@pytest.mark.parametrize("filter_eps", [2**-9, 2**-4, 0.3])
def test_what_is_left_out_stays_within_the_promised_share_of_every_token(filter_eps, on_backend):
    z, target = peaked(140, 4)
    grad = torch.randn(140, generator=torch.Generator().manual_seed(1))
    with watch() as calls:
        found = logit_gradient(z, target, grad, filter_eps=filter_eps)
    (call,) = calls
    exact = logit_gradient(z, target, grad, filter_eps=0)
    _, rest = masses(z, target)
    missing = (found - exact).abs().sum(-1) / grad.abs()
    assert (missing <= filter_eps * rest + FLOOR).all()
    assert call.path == "routed"
    assert 0 < call.dropped_mean <= call.dropped_max <= filter_eps
    assert call.dropped_max == pytest.approx((missing / rest).max().item(), rel=0.05, abs=1e-5)
    # whole tiles of a token are left out, and the target's never
    zeros = (found == 0).unflatten(1, (-1, VOCAB_TILE))
    assert (zeros.all(-1) | ~zeros.any(-1)).float().mean() > 0.99
    assert not zeros.all(-1).gather(1, (target // VOCAB_TILE)[:, None]).any()


def test_the_lightest_tiles_are_left_out_and_as_many_as_the_bound_allows(on_backend):
    filter_eps = 2**-6
    z, target = peaked(64, 6)
    with watch() as calls:
        found = logit_gradient(z, target, torch.ones(64), filter_eps=filter_eps)
    mass, rest = masses(z, target)
    ascending, tile = mass.sort(-1)
    allowed = ascending.cumsum(-1) <= filter_eps * rest[:, None] * 0.99  # bisection stops just short of the bound
    left_out = torch.zeros_like(allowed).scatter(1, tile, allowed)
    left_out.scatter_(1, (target // VOCAB_TILE)[:, None], False)
    visited = found.unflatten(1, (-1, VOCAB_TILE)).abs().sum(-1) > 0
    assert (visited & left_out).float().mean() < 0.01
    assert calls[0].rho == pytest.approx(visited.float().mean().item(), abs=1e-6)
    assert calls[0].rho < 0.7


@pytest.mark.parametrize("filter_eps", [2**-9, 2**-3])
def test_the_bound_covers_the_gradient_of_the_entropy(filter_eps, on_backend):
    z, target = peaked(50, 4, seed=2)
    generator = torch.Generator().manual_seed(3)
    grad, grad_entropy = torch.randn(2, 50, generator=generator)
    run = functools.partial(logit_gradient, z, target, grad, grad_entropy)
    with watch() as calls:
        found = run(filter_eps=filter_eps)
    _, rest = masses(z, target)
    budget = filter_eps * rest * (grad.abs() + grad_entropy.abs())
    assert ((found - run(filter_eps=0)).abs().sum(-1) <= budget + FLOOR).all()
    assert calls[0].rho < 0.99


def test_the_threshold_is_found_to_a_hundredth_of_the_budget(on_backend):
    """Tiles of similar masses: a coarse threshold would visit many that the bound allows to leave out."""
    filter_eps = 0.3
    z, target = peaked(60, 16, spread=1.0)
    found = logit_gradient(z, target, torch.ones(60), filter_eps=filter_eps)
    mass, rest = masses(z, target)
    home = target // VOCAB_TILE
    mass.scatter_(1, home[:, None], float("inf"))  # never left out
    ascending, tile = mass.sort(-1)
    left_out = torch.zeros_like(mass, dtype=torch.bool).scatter(
        1, tile, ascending.cumsum(-1) <= filter_eps * rest[:, None] * 0.99
    )
    visited = found.unflatten(1, (-1, VOCAB_TILE)).abs().sum(-1) > 0
    assert left_out.float().mean() > 0.3
    assert (visited & left_out).float().mean() < 0.005


def test_what_is_reported_leaves_the_target_s_own_tile_out(on_backend):
    """A light tile that holds the target is visited, and so is not reported as dropped."""
    z = torch.full((1, 3 * VOCAB_TILE), -9.0)
    z[0, :VOCAB_TILE] = 4.0
    z[0, VOCAB_TILE] = 9.5  # the target; the rest of its tile weighs 2e-6 of what is not the target
    with watch() as calls:
        logit_gradient(z, torch.tensor([VOCAB_TILE]), torch.ones(1), filter_eps=1e-5)
    mass, rest = masses(z, torch.tensor([VOCAB_TILE]))
    assert calls[0].rho == pytest.approx(2 / 3)
    assert calls[0].dropped_max == pytest.approx((mass[0, 2] / rest[0]).item(), rel=1e-3)


def test_where_too_little_can_be_left_out_nothing_is(on_backend):
    z, target = peaked(20, 4, spread=0.1)
    z[0, 3 * VOCAB_TILE :] = -30.0  # one of 80 pairs
    target[0] = 0
    with watch() as calls:
        found = logit_gradient(z, target, torch.ones(20), filter_eps=2**-9)
    assert (calls[0].path, calls[0].rho, calls[0].dropped_max, calls[0].dropped_mean) == ("dense", 1, 0, 0)
    assert torch.equal(found, logit_gradient(z, target, torch.ones(20), filter_eps=0))


def test_an_entropy_bonus_alone(on_backend):
    """Tokens whose log-probability carries no gradient, only their entropy."""
    z, target = peaked(9, 2)
    weights = torch.linspace(-1, 1, 9)
    found = logit_gradient(z, target, torch.zeros(9), weights, filter_eps=0)
    p = z.double().softmax(-1)
    entropy = -(p * p.log()).sum(-1, keepdim=True)
    exact = -weights.double()[:, None] * p * (p.log() + entropy)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
    assert found.abs().sum(-1)[weights != 0].min() > 0


@pytest.mark.parametrize("tokens", [128, 200, 256])
@pytest.mark.parametrize("rows", [1, 1000, 10**6], ids="workspace of {} rows".format)
def test_every_tile_is_in_one_chunk_and_no_chunk_overflows(tokens, rows, on_triton):
    from stepkto_kernels.linear_logp import triton_route

    z, target = peaked(tokens, 7, seed=8)
    device = device_of("triton")
    results = eager.linear_logp_forward(z, torch.eye(z.shape[1]), target, None, 1.0, None, 1.0, -100, False)
    logp, lse, tile_lse = (x.to(device) for x in results[:3])
    for live in (torch.ones(tokens, dtype=torch.bool), torch.arange(tokens) % 3 == 0):
        for filter_eps in (0.0, 2**-6):
            routes = triton_route.route(live.to(device), target.to(device), logp, lse, tile_lse, None, filter_eps, rows)
            first_tile, base = routes.first_tile.tolist(), routes.base.tolist()
            assert first_tile[0] == 0
            assert first_tile[-1] == 7
            assert all(a <= b for a, b in itertools.pairwise(first_tile))
            assert all(base[b] - base[a] <= routes.capacity for a, b in itertools.pairwise(first_tile))
            assert all(x % BLOCK == 0 for x in base)
            assert sorted(routes.order.tolist()) == list(range(tokens))
            counts = (routes.rank >= 0).sum(1).tolist()
            assert [b - a for a, b in itertools.pairwise(base)] == [-(-c // BLOCK) * BLOCK for c in counts]
            assert routes.chunks > 1 or rows > 1


def test_a_sum_that_overflows_fp16_is_infinite_and_not_nan(small_workspace, on_backend):
    hidden = torch.zeros(4, 8, dtype=torch.float16, requires_grad=True)
    weight = torch.full((1000, 8), 60_000.0, dtype=torch.float16)
    weight[::2] = -60_000.0
    small_workspace()
    logp = linear_logp(hidden, weight, torch.tensor([1, 3, 5, 7]), filter_eps=0)
    (dhidden,) = torch.autograd.grad(4 * logp.sum(), hidden)
    assert dhidden.eq(float("inf")).all()


def test_zero_leaves_nothing_out_and_flat_distributions_take_the_dense_path(on_backend):
    z, target = peaked(40, 4)
    with watch() as calls:
        logit_gradient(z, target, torch.ones(40), filter_eps=0)
        logit_gradient(z * 0.01, target, torch.ones(40), filter_eps=2**-9)
        logit_gradient(z, target, torch.ones(40), filter_eps=2**-9)
    assert [call.path for call in calls] == ["dense", "dense", "routed"]
    assert [call.rho for call in calls[:2]] == [call.rho_blocks for call in calls[:2]] == [1, 1]
    assert [call.dropped_max for call in calls[:2]] == [0, 0]


def test_auto_is_exact_for_fp32_and_filters_16_bits(on_backend):
    z, target = peaked(40, 4)
    with watch() as calls:
        logit_gradient(z, target, torch.ones(40))
        hidden = z.bfloat16().requires_grad_()
        linear_logp(hidden, torch.eye(z.shape[1], dtype=torch.bfloat16), target).sum().backward()
    assert calls[0].rho == 1
    assert calls[1].rho < 1
    assert 0 < calls[1].dropped_max <= 2**-9


@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "logp and entropy"])
def test_an_exact_backward_uses_what_the_forward_kept_where_it_fits(entropy, on_triton, monkeypatch):
    z, target = peaked(70, 3)
    hidden, weight = z[:, :40].bfloat16(), torch.randn(300, 40).bfloat16()
    target, grad = target % 300, torch.randn(2, 70)

    def run(filter_eps):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if entropy:
            total = sum(
                (x * g).sum()
                for x, g in zip(linear_logp_entropy(*leaves, target, filter_eps=filter_eps), grad, strict=True)
            )
        else:
            total = (linear_logp(*leaves, target, filter_eps=filter_eps) * grad[0]).sum()
        return torch.autograd.grad(total, leaves)

    device = device_of("triton")
    assert eager.stores_probs(hidden.to(device), weight, None, 0.0)
    assert not eager.stores_probs(hidden.to(device), weight, None, 2**-9)
    assert not eager.stores_probs(hidden.to(device), weight, 30.0, 0.0)
    assert not eager.stores_probs(hidden.float().to(device), weight, None, 0.0)
    kept = run(0)
    monkeypatch.setattr(eager, "STORED_BYTES", 2 * 70 * 3 * VOCAB_TILE - 1)
    assert not eager.stores_probs(hidden.to(device), weight, None, 0.0)
    again = run(0)
    for a, b in zip(kept, again, strict=True):
        assert not torch.equal(a, b)  # one more rounding: it did come from what was kept
        assert (a - b).norm() <= 5e-3 * b.norm()


def test_nothing_is_kept_where_no_gradient_is_needed(on_triton, monkeypatch):
    from stepkto_kernels.linear_logp import triton_forward

    stored = []
    tiles = triton_forward.linear_logp_tiles

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **keywords):
                stored.append(keywords["STORE"])
                return tiles[grid](*args, **keywords)

            return launch

    monkeypatch.setattr(triton_forward, "linear_logp_tiles", Spy())
    hidden, weight = torch.randn(3, 8).bfloat16(), torch.randn(20, 8).bfloat16().requires_grad_()
    target = torch.tensor([1, 2, 3])
    linear_logp(hidden, weight, target, filter_eps=0)
    linear_logp(hidden, weight.detach(), target, filter_eps=0)
    with torch.no_grad():
        linear_logp(hidden, weight, target, filter_eps=0)
    assert stored == [True, False, False]


def test_only_tokens_with_a_coefficient_are_visited(on_backend):
    z, target = peaked(40, 4)
    grad = torch.zeros(40)
    grad[[3, 17, 31]] = torch.tensor([1.0, -0.5, 2.0])
    target[17] = -100
    z[5] = float("nan")  # a token without a coefficient reaches no sum
    hidden, weight = z.clone().requires_grad_(), torch.eye(z.shape[1]).requires_grad_()
    with watch() as calls:
        logp = linear_logp(hidden, weight, target, filter_eps=0)
        dhidden, dweight = torch.autograd.grad((logp[grad != 0] * grad[grad != 0]).sum(), (hidden, weight))
    assert calls[0].rho == 1  # of the two live tokens
    live = torch.tensor([3, 31])
    assert dhidden.abs().sum(-1).nonzero().squeeze(1).tolist() == live.tolist()
    dz = logit_gradient(z[live], target[live], grad[live], filter_eps=0)
    torch.testing.assert_close(dweight.double(), dz.T @ z[live].double(), rtol=1e-5, atol=1e-5)


def test_a_token_so_certain_that_nothing_else_has_mass_is_no_burden(on_backend):
    z, target = torch.zeros(3, 4 * VOCAB_TILE), torch.tensor([7, 200, 300])
    z[torch.arange(3), target] = 200.0
    with watch() as calls:
        found = logit_gradient(z, target, torch.ones(3), filter_eps=2**-9)
    assert found.abs().max() <= 1e-30
    assert calls[0].rho == 0.25  # each target's own tile


def test_no_live_token_at_all(on_backend):
    z, target = peaked(5, 2)
    with watch() as calls:
        found = logit_gradient(z, target, torch.zeros(5), filter_eps=2**-9)
    assert found.eq(0).all()
    assert calls[0].rho == calls[0].dropped_max == 0


@pytest.fixture
def small_workspace(monkeypatch):
    def shrink():
        monkeypatch.setattr(native, "WORKSPACE_BYTES", 1)
        if device_of("triton") == "cuda" or INTERPRETING:
            from stepkto_kernels.linear_logp import triton_backward

            monkeypatch.setattr(triton_backward, "WORKSPACE_BYTES", 1)

    return shrink


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_size_of_the_workspace_changes_only_rounding(dtype, small_workspace, on_backend):
    generator = torch.Generator().manual_seed(0)
    vocabulary = 1000 if on_backend == "triton" else 60_000  # native takes one tile at a time of anything smaller
    hidden = torch.randn(200, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 24, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(vocabulary, (200,), generator=generator)

    def run():
        return torch.autograd.grad(linear_logp(hidden, weight, target).sum(), (hidden, weight))

    whole = run()
    small_workspace()
    parts = run()
    assert torch.equal(whole[1], parts[1])  # a tile's tokens are added in the same order
    # a sum carried in 16 bits and a remainder of 16 (triton) or 8 (native): one rounding apart
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(parts[0], whole[0], rtol=eps, atol=eps * 1e-2 * whole[0].abs().max().item())


@pytest.mark.parametrize("name", [where_it_runs("linear_logp", name) for name in ("native", "triton")])
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 150),
    size=st.integers(1, 20),
    vocabulary=st.integers(1, 400),
    scale=st.floats(0, 8),
    filter_eps=st.sampled_from([0.0, 2**-9, 0.1]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_against_the_truth(name, tokens, size, vocabulary, scale, filter_eps, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, size, generator=generator)
    weight = torch.randn(vocabulary, size, generator=generator) / size**0.5
    target = torch.randint(-1, vocabulary, (tokens,), generator=generator)  # -1: ignored
    grad = torch.randn(tokens, generator=generator) * (torch.rand(tokens, generator=generator) < 0.8)

    def run(function, dtype, **options):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        logp = function(*leaves, target, ignore_index=-1, **options)
        return logp.detach(), *torch.autograd.grad((logp * grad.to(logp)).sum(), leaves)

    with backend(name):
        logp, dhidden, dweight = run(linear_logp, torch.float32, filter_eps=filter_eps)
    exact_logp, exact_dhidden, exact_dweight = run(truth.linear_logp, torch.float64)
    z = hidden.double() @ weight.double().T
    floor = 1e-5 * (1 + z.abs().max())  # fp32: a few dozen roundings of the largest logit
    torch.testing.assert_close(logp.double(), exact_logp, rtol=1e-5, atol=floor.item())
    # what is left out of a token's gradient moves dhidden by at most its share of the largest row of the head
    left_out = filter_eps * -torch.expm1(exact_logp) * grad.abs().double()
    far = weight.double().abs().max(0).values
    scale_of_dz = grad.abs().double()
    assert (
        (dhidden - exact_dhidden).abs() <= left_out[:, None] * far + floor * scale_of_dz[:, None] * far + 1e-30
    ).all()
    bound = (left_out + floor * scale_of_dz) @ hidden.double().abs()
    assert ((dweight - exact_dweight).abs() <= bound + 1e-30).all()


def test_micro_batches_add_up(on_backend):
    z, target = peaked(160, 3, seed=5)
    weight = torch.eye(z.shape[1]).requires_grad_()
    grad = torch.randn(160, generator=torch.Generator().manual_seed(6))

    def dweight(rows):
        logp = linear_logp(z[rows], weight, target[rows], filter_eps=0)
        return torch.autograd.grad((logp * grad[rows]).sum(), weight)[0]

    whole = dweight(slice(None))
    parts = sum(dweight(rows) for rows in (slice(0, 1), slice(1, 130), slice(130, 160)))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5 * whole.abs().max().item())
    shuffled = torch.randperm(160, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(dweight(shuffled), whole, rtol=1e-5, atol=1e-5 * whole.abs().max().item())


@pytest.mark.parametrize("reference_first", [True, False], ids=["reference first", "reference second"])
@pytest.mark.parametrize("filter_eps", [0.0, 2**-9])
def test_any_backward_follows_any_forward(reference_first, filter_eps, on_backend):
    z, target = peaked(60, 3)
    target[7] = -100
    options = (None, 1.0, None, 1.0, -100)
    device = device_of(on_backend)
    operands = z.to(device), torch.eye(z.shape[1], device=device), target.to(device)
    kernels = backends._KERNELS["linear_logp"]
    pair = [kernels["reference"], kernels[on_backend]]
    first, second = pair if reference_first else reversed(pair)
    grad = torch.ones(60, device=device)
    needs = filter_eps, True, True, False

    def gradients(forward, backward):
        results = forward(*operands, *options, False)
        return backward(grad, *operands, *results, *options, *needs)[:2]

    mixed = gradients(first.forward, second.backward)
    pure = gradients(pair[0].forward, pair[0].backward)
    for a, b in zip(mixed, pure, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 if filter_eps == 0 else 1e-2)


@pytest.mark.parametrize("needs_gradient", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)], ids=str)
def test_gradients_that_nobody_needs_launch_no_kernel(needs_gradient, on_triton, monkeypatch):
    from stepkto_kernels.linear_logp import triton_backward

    launched = []

    class Spy:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **keywords):
                launched.append((self.kernel.__name__, keywords.get("NEED_WEIGHT")))
                return self.kernel[grid](*args, **keywords)

            return launch

    for name in ("pair_gradients", "weight_gradients", "hidden_gradients"):
        monkeypatch.setattr(triton_backward, name, Spy(getattr(triton_backward, name)))
    z, target = peaked(20, 2)
    operands = z, torch.eye(z.shape[1]), torch.zeros(z.shape[1])
    leaves = [x.requires_grad_(bool(n)) for x, n in zip(operands, needs_gradient, strict=True)]
    linear_logp(leaves[0], leaves[1], target, bias=leaves[2]).sum().backward()
    need_hidden, need_weight, need_bias = map(bool, needs_gradient)
    expected = [("pair_gradients", None)]
    expected += [("weight_gradients", need_weight)] if need_weight or need_bias else []
    expected += [("hidden_gradients", None)] if need_hidden else []
    assert launched == expected
    for leaf, need in zip(leaves, needs_gradient, strict=True):
        assert (leaf.grad is not None) == bool(need)


def test_tokens_that_share_rare_tiles_become_neighbours(on_triton):
    """256 tokens, interleaved, that visit one of two disjoint sets of tiles: in order, each block visits one set."""
    tiles, tokens = 8, 2 * BLOCK
    z = torch.zeros(tokens, tiles * VOCAB_TILE)
    z[0::2, : 4 * VOCAB_TILE] = 30.0
    z[1::2, 4 * VOCAB_TILE :] = 30.0
    target = torch.where(torch.arange(tokens) % 2 == 0, 0, 4 * VOCAB_TILE)
    with watch() as calls:
        logit_gradient(z, target, torch.ones(tokens), filter_eps=2**-9)
    assert (calls[0].rho, calls[0].rho_blocks) == (0.5, 0.5)


def test_offsets_beyond_32_bits(on_backend):
    """Rows of a head 2^30 entries apart, as in a matrix of over 2^31 entries; untouched memory costs nothing."""
    device = device_of(on_backend)
    spread = torch.empty_strided((3, 4), (2**30, 1), device=device)
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    spread.copy_(weight)
    hidden = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([2, 0], device=device)
    results = []
    for head in (spread, weight.to(device)):
        h = hidden.to(device).requires_grad_()
        logp = stepkto_kernels.linear_logp(h, head, target)
        results.append((logp.detach(), *torch.autograd.grad(logp.sum(), h)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_watch_collects_only_while_it_lasts_and_can_be_nested(on_backend):
    z, target = peaked(3, 2)
    with watch() as outer:
        logit_gradient(z, target, torch.ones(3))
        with watch() as inner:
            logit_gradient(z, target, torch.ones(3))
    logit_gradient(z, target, torch.ones(3))
    assert (len(outer), len(inner)) == (2, 1)


def test_the_reference_backend_records_nothing():
    z, target = peaked(3, 2)
    with watch() as calls, backend("reference"):
        logit_gradient(z, target, torch.ones(3))
    assert calls == []
