"""Ranks: what every one of them gets, and that none waits for ever for one that failed or never came."""

import os
import time

import pytest
import torch
from on_ranks import free_port, on_ranks

from stepkto_fast import ranks
from stepkto_fast.errors import RunError

TIMEOUT = 2.0  # seconds


def join():
    ranks.open_ranks(TIMEOUT)


def run_error():
    raise RunError("the file is gone: bring it back")


def mistake():
    return {}["missing"]


def collectives(rank):
    calls = []

    def action():
        calls.append(rank)
        return ["from", rank]

    return {
        "place": (ranks.started(), ranks.rank(), ranks.size(), ranks.is_main()),
        "gather": ranks.gather({"rank": rank, "tensor": torch.full((2,), rank)}),
        "from_main": (ranks.from_main(action), calls),
        "sum": ranks.sum_over_ranks(torch.tensor([1.0, rank], dtype=torch.float64)),
        "run error": message(lambda: ranks.from_main(run_error), RunError),
        "mistake": message(lambda: ranks.from_main(mistake), KeyError if rank == 0 else RunError),
        "afterwards": ranks.gather(rank),
        "lost": lost(rank),
    }


def message(action, expected):
    with pytest.raises(expected) as error:
        action()
    return str(error.value)


def lost(rank):
    """What rank 0 says of another that is busy with something else."""
    if rank:
        time.sleep(2 * TIMEOUT)
        return None
    return message(lambda: ranks.gather(rank), RuntimeError)


@pytest.fixture(scope="module")
def of_two():
    return on_ranks(2, collectives, join=join)


def test_every_rank_knows_its_place(of_two):
    assert [found["place"] for found in of_two] == [(True, 0, 2, True), (True, 1, 2, False)]


def test_every_rank_gets_what_all_gave(of_two):
    for found in of_two:
        assert [given["rank"] for given in found["gather"]] == [0, 1]
        assert [given["tensor"].tolist() for given in found["gather"]] == [[0, 0], [1, 1]]
        assert found["sum"].tolist() == [2.0, 1.0]


def test_what_rank_0_does_is_done_once_and_known_to_all(of_two):
    assert [found["from_main"] for found in of_two] == [(["from", 0], [0]), (["from", 0], [])]


def test_what_fails_on_rank_0_fails_on_all_and_they_stay_in_step(of_two):
    assert [found["run error"] for found in of_two] == ["the file is gone: bring it back"] * 2
    assert [found["mistake"] for found in of_two] == ["'missing'", "rank 0 failed: KeyError: 'missing'"]
    assert [found["afterwards"] for found in of_two] == [[0, 1]] * 2


def test_a_rank_that_does_not_answer_is_an_error_after_the_timeout(of_two):
    assert "Timed out" in of_two[0]["lost"]


def test_a_rank_that_never_comes_is_an_error_after_the_timeout(monkeypatch):
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RunError, match=r"rank 0 could not join the 2 ranks within distributed_timeout \(1 s\)"):
        ranks.open_ranks(1.0)
    assert not ranks.started()


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RunError, match="local rank 2 on a machine with 2 GPUs: give --nproc-per-node at most as many"):
        ranks.open_ranks(1.0)


def test_one_process_is_one_rank(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "1")
    ranks.open_ranks(1.0)
    assert (ranks.started(), ranks.rank(), ranks.size(), ranks.is_main()) == (False, 0, 1, True)
    assert ranks.gather("value") == ["value"]
    assert ranks.from_main(lambda: "value") == "value"
    assert message(lambda: ranks.from_main(mistake), KeyError) == "'missing'"
    values = torch.ones(3)
    assert ranks.sum_over_ranks(values) is values
    ranks.barrier()
    ranks.close_ranks()
