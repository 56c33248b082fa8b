from __future__ import annotations

import re

import pytest

from dmt_compile.errors import ConfigError
from dmt_compile.topology import Topology


def test_numbers_its_ranks_host_by_host() -> None:
    topology = Topology(3, 2)
    assert topology.world_size == 6
    assert [topology.host_of(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert str(topology) == "3x2"


@pytest.mark.parametrize(("text", "hosts", "local_ranks"), [("2x4", 2, 4), (" 16 x 8 ", 16, 8), ("1x1", 1, 1)])
def test_parse(text: str, hosts: int, local_ranks: int) -> None:
    assert Topology.parse(text) == Topology(hosts, local_ranks)
    assert Topology.parse(str(Topology.parse(text))) == Topology(hosts, local_ranks)
    assert Topology.parse(Topology(hosts, local_ranks)) == Topology(hosts, local_ranks)


@pytest.mark.parametrize("text", ["", "2", "x4", "2x", "2*4", "2x4x8", "-2x4", "2.0x4", "axb"])
def test_parse_another_form(text: str) -> None:
    expected = (
        f"topology: expected '<hosts>x<local ranks>' such as '2x4', found {text!r}; write the number of hosts first"
    )
    with pytest.raises(ConfigError, match=re.escape(expected)):
        Topology.parse(text)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ((0, 4), "hosts", "0"),
        ((2, 0), "local_ranks", "0"),
        ((2, -1), "local_ranks", "-1"),
        ((1, 1, 0.0), "intra_bytes_per_s", "0.0"),
        ((1, 1, 1.0, -5.0), "cross_bytes_per_s", "-5.0"),
    ],
)
def test_numbers_that_are_not_positive(arguments: tuple[float, ...], field: str, value: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"topology: expected a positive number for {field}, found {value}")
    ):
        Topology(*arguments)  # type: ignore[arg-type]


def test_parse_without_hosts() -> None:
    with pytest.raises(ConfigError, match="expected a positive number for hosts, found 0"):
        Topology.parse("0x2")


def test_environment() -> None:
    assert Topology.from_environment(8, {"LOCAL_WORLD_SIZE": "4"}) == Topology(2, 4)
    assert Topology.from_environment(8, {"LOCAL_WORLD_SIZE": "8"}) == Topology(1, 8)
    assert Topology.from_environment(8, {"LOCAL_WORLD_SIZE": "1"}) == Topology(8, 1)
    assert Topology.from_environment(8, {}) == Topology(1, 8)


def test_environment_is_the_process_environment_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Topology.from_environment(6) == Topology(3, 2)


@pytest.mark.parametrize(("world_size", "local"), [(8, 3), (4, 8), (4, 0)])
def test_environment_with_uneven_hosts(world_size: int, local: int) -> None:
    expected = (
        f"topology: expected a world size that is a multiple of LOCAL_WORLD_SIZE={local}, found {world_size}; "
        "start the same number of ranks on every host, or pass options={'topology': '<hosts>x<local ranks>'}"
    )
    with pytest.raises(ConfigError, match=re.escape(expected)):
        Topology.from_environment(world_size, {"LOCAL_WORLD_SIZE": str(local)})


@pytest.mark.parametrize(("hosts", "local_ranks"), [(2, 2), (3, 2), (2, 4), (4, 2), (1, 3), (5, 1), (3, 8)])
def test_groups_and_peer_order_by_their_definition(hosts: int, local_ranks: int) -> None:
    topology = Topology(hosts, local_ranks)
    place = {host * local_ranks + local: (host, local) for host in range(hosts) for local in range(local_ranks)}
    for rank, (host, local) in place.items():
        assert topology.intra_ranks(rank) == tuple(r for r in place if place[r][0] == host)
        assert topology.peer_ranks(rank) == tuple(r for r in place if place[r][1] == local)
    # Peer order goes through the local ranks, and for each of them through the hosts.
    expected = [rank for local in range(local_ranks) for rank in place if place[rank][1] == local]
    assert topology.peer_order() == tuple(expected)


def test_peer_order_of_small_topologies() -> None:
    assert Topology(2, 2).peer_order() == (0, 2, 1, 3)
    assert Topology(3, 2).peer_order() == (0, 2, 4, 1, 3, 5)
    assert Topology(2, 4).peer_order() == (0, 4, 1, 5, 2, 6, 3, 7)


def test_peer_order_lists_the_peer_groups_one_after_the_other() -> None:
    topology = Topology(3, 4)
    assert topology.peer_order() == tuple(rank for local in range(4) for rank in topology.peer_ranks(local))


def test_grouped_joins_neighbouring_hosts() -> None:
    topology = Topology(4, 2, intra_bytes_per_s=3.0, cross_bytes_per_s=2.0)
    assert topology.grouped(1) == topology
    grouped = topology.grouped(2)
    assert grouped == Topology(2, 4, 3.0, 2.0)
    assert grouped.intra_ranks(5) == (4, 5, 6, 7)
    assert grouped.peer_ranks(5) == (1, 5)
    assert topology.grouped(4) == Topology(1, 8, 3.0, 2.0)


@pytest.mark.parametrize("hosts_per_group", [3, 0, -1, 8])
def test_grouped_with_another_number_than_a_divisor(hosts_per_group: int) -> None:
    expected = f"topology: expected a divisor of 4 hosts as hosts per tower, found {hosts_per_group}"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        Topology(4, 2).grouped(hosts_per_group)
