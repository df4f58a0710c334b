"""Weights over NCCL: vLLM's own engine for the trainer, with a recorder in the place of NCCL and of the server."""

import importlib.util
import inspect
from contextlib import contextmanager

import pytest
import torch

from stepkto_fast.errors import RunError
from stepkto_fast.vllm_server import AnsweredError

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from vllm.distributed.weight_transfer import base, nccl_engine

from stepkto_fast import weight_transfer
from stepkto_fast.adapters import merged_state
from stepkto_fast.weight_transfer import NCCLTransfer, PolicySource, TransferClient, meeting_point

WORKERS = 4


class Server:
    """In the place of VLLMServer: what it is asked, and a failure where `fail` says."""

    url, host, port = "http://127.0.0.1:8000", "127.0.0.1", 8000

    def __init__(self):
        self.asked, self.fail = [], None

    def get(self, path):
        self.asked.append((path, None))
        return {"world_size": WORKERS}

    def post(self, path, body=None):
        self.asked.append((path, body))
        if path == self.fail:
            raise AnsweredError(f"the vLLM server {self.url} answered {path} with HTTP 500")

    def paths(self):
        return [path for path, _ in self.asked]


class Group:
    """In the place of the NCCL communicator."""

    def __init__(self, place):
        self.place, self.destroyed, self.sent, self.fail = place, False, [], False

    def destroy(self):
        self.destroyed = True


@pytest.fixture
def nccl(monkeypatch):
    """The groups that were opened. Each keeps the tensors that were broadcast."""
    groups = []

    def open_group(place):
        groups.append(Group(place))
        return groups[-1]

    def broadcast(iterator, group, src, post_iter_func, buffer_size_bytes, num_buffers):
        assert src == 0
        group.sent.append([])
        for item in iterator:
            if group.fail:
                raise RuntimeError("NCCL error: unhandled system error")
            group.sent[-1].append((item[0], post_iter_func(item).clone()))

    real = inspect.signature(nccl_engine.packed_nccl_broadcast_producer)
    assert set(inspect.signature(broadcast).parameters) == set(real.parameters)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", open_group)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    monkeypatch.setattr(weight_transfer, "DEVICE", "cpu")
    return groups


@pytest.fixture
def transfer(nccl):
    return NCCLTransfer(Server(), 30)


def same(sent, model):
    expected = list(merged_state(model))
    assert [name for name, _ in sent] == [name for name, _ in expected]
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(sent, expected, strict=True))


def test_the_server_is_asked_in_vllms_order_and_gets_every_tensor(transfer, nccl, model):
    server = transfer._server
    transfer.send(model)
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert server.paths() == ["/get_world_size", "/init_weight_transfer_engine", *update]
    bodies = dict(server.asked)
    # vLLM's own worker reads what it is sent.
    place = nccl_engine.NCCLWeightTransferEngine.init_info_cls(**bodies["/init_weight_transfer_engine"]["init_info"])
    assert (place.rank_offset, place.world_size, place.packed) == (1, 1 + WORKERS, True)
    own = nccl[0].place
    assert (own.rank, own.world_size, own.packed) == (0, 1 + WORKERS, True)
    assert (own.master_address, own.master_port) == (place.master_address, place.master_port)
    told = nccl_engine.NCCLWeightTransferEngine.update_info_cls(**bodies["/update_weights"]["update_info"])
    state = model.state_dict()
    assert told.names == list(state)
    assert told.shapes == [list(t.shape) for t in state.values()]
    assert told.dtype_names == ["float32"] * len(state)
    assert same(nccl[0].sent[0], model)

    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    transfer.send(model)
    assert server.paths()[5:] == update  # the group stays
    assert len(nccl) == 1
    assert same(nccl[0].sent[1], model)
    assert not all(torch.equal(a, b) for (_, a), (_, b) in zip(*nccl[0].sent, strict=True))

    transfer.close()
    assert server.paths()[-1] == "/shutdown_weight_transfer_engine"
    assert nccl[0].destroyed
    transfer.close()
    assert server.paths().count("/shutdown_weight_transfer_engine") == 1


@pytest.mark.parametrize(
    "path", ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"]
)
def test_what_the_server_refuses_is_raised_once_all_ranks_have_every_tensor(transfer, nccl, model, monkeypatch, path):
    seen = []

    def counted(policy):
        for name, tensor in merged_state(policy):
            seen.append(name)
            yield name, tensor

    transfer._source = PolicySource([base.ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in merged_state(model)])
    monkeypatch.setattr(weight_transfer, "merged_state", counted)
    transfer._server.fail = path
    with pytest.raises(RunError, match=f"answered {path} with HTTP 500"):
        transfer.send(model)
    assert seen == list(model.state_dict())
    transfer.close()
    assert "/shutdown_weight_transfer_engine" not in transfer._server.paths()  # its workers may be stuck


def test_what_nccl_says_is_passed_on_with_the_remedy(transfer, nccl, model):
    transfer.send(model)
    nccl[0].fail = True
    with pytest.raises(RunError, match=r"over NCCL \(RuntimeError: NCCL error.*start the server.*vllm_sync reload"):
        transfer.send(model)


def test_every_tensor_is_a_sign_of_life(transfer, nccl, model, monkeypatch):
    watched, signs = [], []

    @contextmanager
    def watchdog(timeout, what, log=None):
        watched.append((timeout, what))
        yield lambda: signs.append(1)

    monkeypatch.setattr(weight_transfer, "watchdog", watchdog)
    transfer.send(model)
    assert watched == [(30, "the transfer of weights to the vLLM server http://127.0.0.1:8000")]
    assert len(signs) == len(model.state_dict())


@pytest.mark.parametrize("answer", [None, {}, {"world_size": 0}, {"world_size": "2"}, [3]])
def test_a_number_of_workers_that_is_none_is_malformed(transfer, model, monkeypatch, answer):
    monkeypatch.setattr(transfer._server, "get", lambda path: answer)
    with pytest.raises(RunError, match="malformed response: its number of workers is"):
        transfer.send(model)


def test_the_meeting_point_is_where_the_server_can_reach_it(monkeypatch):
    address, port = meeting_point(Server())
    assert address == "127.0.0.1"
    assert 1024 <= port < 65536
    nowhere = Server()
    nowhere.host = "no such host"
    with pytest.raises(RunError, match="there is no way to the vLLM server"):
        meeting_point(nowhere)


def test_vllm_is_as_this_package_takes_it():
    """An upgrade that changes what is called, or what the server is asked, fails here."""
    protocol = {
        name: list(inspect.signature(method).parameters)
        for name, method in vars(base.VLLMWeightSyncClient).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }
    own = {name: list(inspect.signature(getattr(TransferClient, name)).parameters) for name in protocol}
    assert own == protocol
    assert len(protocol) == 4
    assert base.WeightSource.__abstractmethods__ == {"metadata", "__iter__"}
    engine = nccl_engine.NCCLTrainerWeightTransferEngine
    inspect.signature(engine.trainer_init).bind("place", client="client", source="source")
    inspect.signature(engine.send_weights).bind("self")
    inspect.signature(engine.shutdown).bind("self")
    from vllm.entrypoints.rl.online.api_router import router

    routes = {(method, route.path) for route in router.routes for method in route.methods}
    posted = {"init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"}
    assert {("POST", f"/{path}") for path in (*posted, "shutdown_weight_transfer_engine")} <= routes
    assert ("GET", "/get_world_size") in routes
