"""Launches over several hosts: the wire between them, and who may join."""

import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import AutotuneError, NothingFitsError
from autotune.plan import Engine, Plan
from autotune.spec.workload import Workload
from autotune.trial.launch import rank_environment
from autotune.trial.nodes.follower import follow
from autotune.trial.nodes.hosts import Endpoint, differences, interface_of, is_here
from autotune.trial.nodes.leader import Leader
from autotune.trial.nodes.remote import RemoteRank
from autotune.trial.nodes.wire import (
    SECRET_FILE_VARIABLE,
    SECRET_VARIABLE,
    Wire,
    WireClosed,
    WrongSecret,
    shared_secret,
)
from autotune.trial.processes import process_state
from autotune.trial.protocol import (
    REQUEST_FILE,
    ModelSource,
    Outcome,
    RankError,
    RankResult,
    Request,
    heartbeat_file,
    rank_result_file,
    read_message,
    write_message,
)
from autotune.trial.ranks import LocalRank, rank_log

SECRET = b"of all hosts"


@contextmanager
def wires(*, accepted: bytes = SECRET, connected: bytes = SECRET) -> Iterator[tuple[Wire, Wire]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    made: dict[str, Wire] = {}
    thread = threading.Thread(
        target=lambda: made.update(leader=Wire(there, accepted, accepted=True))
    )
    thread.start()
    follower = Wire(here, connected, accepted=False)
    thread.join()
    try:
        yield made["leader"], follower
    finally:
        follower.close()
        made["leader"].close()


def test_messages_arrive_in_order_both_ways() -> None:
    with wires() as (leader, follower):
        for number in range(3):
            leader.send("start", rank=number)
        follower.send("exit", rank=7, code=-9, text="x" * 3_000_000)
        ranks = [message["rank"] for _ in range(3) if (message := follower.receive(5))]
        assert ranks == [0, 1, 2]
        answer = leader.receive(5)
        assert answer is not None and answer["code"] == -9 and len(answer["text"]) == 3_000_000
        assert leader.receive(0.01) is None


def test_another_secret_is_noticed_by_both() -> None:
    with wires(connected=b"a guess") as (leader, follower):
        leader.send("leader")
        with pytest.raises(WrongSecret):
            follower.receive(5)
        follower.send("join")
        with pytest.raises(WrongSecret):
            leader.receive(5)


def test_a_frame_said_twice_is_refused() -> None:
    with wires() as (leader, follower):
        sent: list[bytes] = []
        write = leader._write
        leader._write = lambda data: (sent.append(data), write(data))[1]  # type: ignore[method-assign]
        leader.send("signal", rank=1)
        assert follower.receive(5) is not None
        write(sent[0])
        with pytest.raises(WireClosed, match="forged"):
            follower.receive(5)


def test_another_program_is_turned_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stranger = socket.create_connection(listener.getsockname())
        connection, _ = listener.accept()
        with stranger, connection:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: leader\r\n\r\n")
            with pytest.raises(WireClosed, match="another protocol"):
                Wire(connection, SECRET, accepted=True)


def test_the_secret_comes_from_a_variable_or_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    monkeypatch.delenv(SECRET_FILE_VARIABLE, raising=False)
    with pytest.raises(AutotuneError, match=SECRET_VARIABLE):
        shared_secret()
    (tmp_path / "secret").write_text("from a file\n")
    monkeypatch.setenv(SECRET_FILE_VARIABLE, str(tmp_path / "secret"))
    assert shared_secret() == b"from a file"
    monkeypatch.setenv(SECRET_VARIABLE, "given")
    assert shared_secret() == b"given"
    monkeypatch.delenv(SECRET_VARIABLE)
    monkeypatch.setenv(SECRET_FILE_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(AutotuneError, match="No such file"):
        shared_secret()


@pytest.mark.parametrize("text", ["", "host", ":29400", "host:", "host:0", "host:99999", "h:x"])
def test_endpoints_that_are_none(text: str) -> None:
    with pytest.raises(AutotuneError, match="HOST:PORT"):
        Endpoint.parse(text)


def test_endpoints() -> None:
    assert Endpoint.parse("10.0.0.1:29400") == Endpoint(host="10.0.0.1", port=29400)
    assert str(Endpoint.parse("[fe80::1]:1")) == "[fe80::1]:1"
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1")  # of no host: RFC 5737
    assert interface_of("127.0.0.1") == "lo"


def test_differences_are_named() -> None:
    there, here = {"torch": "2.11", "--seq-len": "128"}, {"torch": "2.13", "--seq-len": "128"}
    assert differences(there, here) == "torch 2.11 there, 2.13 here"
    assert differences(here, here) == ""


def free_endpoint() -> Endpoint:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return Endpoint(host="127.0.0.1", port=probe.getsockname()[1])


def leader_at(endpoint: Endpoint, **changes: Any) -> Leader:
    values = {
        "num_nodes": 2,
        "ranks_per_node": 1,
        "secret": SECRET,
        "description": {"torch": "2.13"},
        "join_limit_s": 10.0,
    }
    return Leader(endpoint, **(values | changes))  # type: ignore[arg-type]


def join(endpoint: Endpoint, **changes: Any) -> list[BaseException | None]:
    """Follow in a thread of its own; return where its end will be noted."""
    values = {
        "node_rank": None,
        "secret": SECRET,
        "description": {"torch": "2.13"},
        "wait_limit_s": 10.0,
    }
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            follow(endpoint, **(values | changes))  # type: ignore[arg-type]
            ended.append(None)
        except AutotuneError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    ended_threads.append(thread)
    return ended


ended_threads: list[threading.Thread] = []


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    while ended_threads:
        thread = ended_threads.pop()
        thread.join(20)
        assert not thread.is_alive()


def test_a_host_joins_and_is_let_go() -> None:
    endpoint = free_endpoint()
    ended = join(endpoint)
    with leader_at(endpoint):
        assert not ended
    ended_threads[0].join(20)
    assert ended == [None]


def test_hosts_that_differ_are_refused_on_both_sides() -> None:
    endpoint = free_endpoint()
    said: list[str] = []
    ended = join(endpoint, description={"torch": "2.11"})
    with (
        pytest.raises(NothingFitsError, match="node 1 is not"),
        leader_at(endpoint, join_limit_s=2.0, say=said.append),
    ):
        pass
    ended_threads[0].join(20)
    assert isinstance(ended[0], AutotuneError) and ended[0].exit_code == 2
    assert "torch 2.11 there, 2.13 here" in str(ended[0])
    assert any("torch 2.11 there, 2.13 here" in line for line in said)


def test_a_node_rank_that_is_taken_is_refused() -> None:
    endpoint = free_endpoint()
    join(endpoint, node_rank=1)
    with leader_at(endpoint):
        ended = join(endpoint, node_rank=1)
        ended_threads[-1].join(20)
        assert "--node-rank 1" in str(ended[0])


def test_another_secret_is_said_to_who_joins() -> None:
    endpoint = free_endpoint()
    ended = join(endpoint, secret=b"a guess")
    with pytest.raises(NothingFitsError), leader_at(endpoint, join_limit_s=2.0):
        pass
    ended_threads[0].join(20)
    assert "another secret" in str(ended[0])


def test_without_a_leader_a_host_gives_up() -> None:
    endpoint = free_endpoint()
    with pytest.raises(NothingFitsError, match="No leader at"):
        follow(endpoint, node_rank=None, secret=SECRET, description={}, wait_limit_s=0.2)


def test_an_endpoint_of_another_host_cannot_be_led_from_here() -> None:
    with (
        pytest.raises(NothingFitsError, match="cannot listen"),
        leader_at(Endpoint(host="192.0.2.1", port=29400)),
    ):
        pass


class Forked(LocalRank):
    def lost(self) -> str | None:
        return "the fork server died" if self.returncode is not None else None


class Sleepers:
    """Starts processes that wait for a signal, with what a rank would have written by then."""

    def start(self, number: int, folder: Path, variables: Mapping[str, str]) -> LocalRank:
        assert variables["MASTER_ADDR"] == "127.0.0.1" and variables["WORLD_SIZE"] == "2"
        (folder / heartbeat_file(number)).touch()
        rank_log(folder, number).write_text(f"rank {number} of {variables['WORLD_SIZE']}\n")
        request = read_message(Request, folder / REQUEST_FILE)
        error = RankError(outcome=Outcome.OOM, message="no", traceback="", time_s=time.monotonic())
        failed = RankResult(
            launch_id=request.launch_id, rank=number, world_size=2, complete=True, error=error
        )
        if variables.get("AUTOTUNE_TEST") == "fails":
            write_message(failed, folder / rank_result_file(number))
        kind = Forked if variables.get("AUTOTUNE_TEST") == "forked" else LocalRank
        return kind(subprocess.Popen(["sleep", "100"], start_new_session=True))

    def kill_stragglers(self, tag: str) -> None:
        assert tag == "one"

    def notes(self) -> list[str]:
        return []


@contextmanager
def launched(leader: Leader, folder: Path, **more: str) -> Iterator[tuple[LocalRank, RemoteRank]]:
    """Start a rank on either host; stop them at the end."""
    plan = Plan(strategy="ddp", engine=Engine.DDP, dp_replicate=2)
    request = Request(
        launch_id="one",
        mode="trial",
        model=ModelSource(name="tiny-qwen3", config={}),
        plan=plan.to_dict(),
        workload=Workload(seq_len=64, global_batch_size=2),
        device="cpu",
        out_dir=str(folder),
    )
    write_message(request, folder / REQUEST_FILE)
    variables = rank_environment(request, folder, "one", 2) | more
    ranks = [leader.start(number, folder, variables) for number in (0, 1)]
    try:
        yield ranks  # type: ignore[misc]
    finally:
        for rank in ranks:
            rank.signal(signal.SIGKILL)
        assert all(rank.wait(10) is not None for rank in ranks)
        leader.kill_stragglers("one")


def sleepers(fork: bool, folder: Path) -> nullcontext[Sleepers]:
    return nullcontext(Sleepers())


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_rank_of_another_host_is_a_rank_as_any_other(tmp_path: Path) -> None:
    endpoint = free_endpoint()
    join(endpoint, starters=sleepers)
    with leader_at(endpoint, local=Sleepers()) as leader:
        with launched(leader, tmp_path) as (_, there):
            until(lambda: there.pid > 0 and rank_log(tmp_path, 1).exists())
            assert rank_log(tmp_path, 1).read_text() == "rank 1 of 2\n"
            assert there.poll() is None and there.state() == "R"
            until(lambda: (tmp_path / heartbeat_file(1)).exists())
            there.signal(signal.SIGSTOP)
            until(lambda: there.state() == "T")
            there.signal(signal.SIGCONT)
            until(lambda: there.state() != "T")
            limit = 64 * 2**20
            resource.prlimit(there.pid, resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
            time.sleep(0.5)  # its host looks ten times a second
            there.signal(signal.SIGTERM)
            assert there.wait(10) == -signal.SIGTERM and there.state() is None
            left = there.memory_left()
            assert left is not None and limit / 2 < left < limit
        with launched(leader, tmp_path, AUTOTUNE_TEST="fails"):
            until(lambda: (tmp_path / rank_result_file(1)).exists())
            result = read_message(RankResult, tmp_path / rank_result_file(1))
            assert result.error is not None and result.error.outcome is Outcome.OOM
            assert abs(time.monotonic() - result.error.time_s) < 10


def test_that_a_fork_server_of_another_host_died_is_known_here(tmp_path: Path) -> None:
    endpoint = free_endpoint()
    join(endpoint, starters=sleepers)
    with leader_at(endpoint, local=Sleepers()) as leader:
        with launched(leader, tmp_path, AUTOTUNE_TEST="forked") as (_, there):
            there.signal(signal.SIGKILL)
            assert there.wait(10) == -signal.SIGKILL
            assert there.lost() == "the fork server died"
        with launched(leader, tmp_path) as (_, there):
            there.signal(signal.SIGKILL)
            assert there.wait(10) == -signal.SIGKILL and there.lost() is None


def test_a_lost_host_is_named_as_the_cause(tmp_path: Path) -> None:
    endpoint = free_endpoint()
    ended = join(endpoint, starters=sleepers)
    with leader_at(endpoint, local=Sleepers()) as leader, launched(leader, tmp_path) as (_, there):
        until(lambda: there.pid > 0)
        leader._hosts.host(1).wire.close()
        until(lambda: there.poll() is not None)
        result = read_message(RankResult, tmp_path / rank_result_file(1))
        assert result.complete and result.error is not None
        assert "lost with its host" in result.error.message
        ended_threads[-1].join(20)
        assert isinstance(ended[0], NothingFitsError) and "was lost" in str(ended[0])
        assert process_state(there.pid) is None  # it stopped its ranks by itself
        join(endpoint, starters=sleepers)  # it comes back, and the next launch finds it
        with launched(leader, tmp_path) as (_, again):
            until(lambda: again.pid > 0)
