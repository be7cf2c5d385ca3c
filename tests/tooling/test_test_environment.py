"""The ground the other tests stand on holds: no network, real servers, warnings as errors."""

import socket
import warnings

import pytest
import redis
import sqlalchemy as sa
from redis.backoff import NoBackoff
from redis.retry import Retry


def test_a_test_cannot_reach_another_machine() -> None:
    with socket.socket() as connection, pytest.raises(AssertionError, match="only loopback"):
        connection.connect(("192.0.2.1", 80))
    with pytest.raises(AssertionError, match=r"look up example\.com"):
        socket.getaddrinfo("example.com", 443)


def test_loopback_stays_open() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as connection,
    ):
        assert connection.getpeername()[0] == "127.0.0.1"


def test_a_warning_fails_the_test() -> None:
    with pytest.raises(DeprecationWarning):
        warnings.warn("old", DeprecationWarning, stacklevel=1)


def test_postgres_answers_and_each_database_is_its_own(postgres_url, new_postgres_database) -> None:
    one, two = new_postgres_database(), new_postgres_database()
    assert len({postgres_url, one, two}) == 3
    engine = sa.create_engine(one)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE here (id int)"))
        version = connection.execute(sa.text("SHOW server_version_num")).scalar_one()
    assert int(version) >= 180000
    assert sa.inspect(engine).get_table_names() == ["here"]
    other = sa.create_engine(two)
    assert sa.inspect(other).get_table_names() == []
    engine.dispose()
    other.dispose()


def test_redis_answers_only_with_its_password(redis_url) -> None:
    client = redis.Redis.from_url(redis_url)
    assert client.ping()
    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    port = client.connection_pool.connection_kwargs["port"]
    client.close()
    stranger = redis.Redis(port=port, retry=Retry(NoBackoff(), 0))
    with pytest.raises(redis.exceptions.AuthenticationError):
        stranger.ping()
    stranger.close()
