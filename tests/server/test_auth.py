from __future__ import annotations

import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdp.server.auth import Authenticator
from cdp.server.errors import TokenExpired, TokenForeign, TokenInvalid, TokenUsed
from cdp.store import Store
from journal.errors import CdpError, Forbidden, Unauthorized
from journal.wire import JoinAnswer, authorization

FINGERPRINT = "ab" * 32
MACHINE = uuid.uuid4()


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(tmp_path / "store", file_bytes=1 << 20, map_bytes=64 << 20) as opened:
        yield opened


def make(store: Store, clock: Clock | None = None) -> Authenticator:
    return Authenticator(store.tokens, store.credentials, FINGERPRINT, clock or Clock())


def header(joined: JoinAnswer) -> str:
    return authorization(joined.credential, joined.secret)["Authorization"]


def test_a_token_works_once_also_across_a_restart(store: Store) -> None:
    auth = make(store)
    token = auth.issue_token("agent", MACHINE, 60)
    assert token.startswith(f"cdp1.{FINGERPRINT}.")
    joined = auth.join(token, "agent", "host")
    assert joined.machine == str(MACHINE)
    for again in (auth, make(store)):
        with pytest.raises(TokenUsed):
            again.join(token, "agent", "host")
        principal = again.authenticate(header(joined))
        assert (principal.role, principal.machine) == ("agent", MACHINE)


def test_a_token_is_bound_to_its_role_and_its_time(store: Store) -> None:
    clock = Clock()
    auth = make(store, clock)
    token = auth.issue_token("agent", MACHINE, 60)
    with pytest.raises(TokenForeign):
        auth.join(token, "operator", "me")
    clock.now += 60
    with pytest.raises(TokenExpired):
        auth.join(token, "agent", "host")
    clock.now += 30 * 86400
    auth.issue_token("agent", MACHINE, 60)  # spent ones are forgotten by and by
    with pytest.raises(TokenInvalid):
        auth.join(token, "agent", "host")


def test_of_many_that_come_at_once_one_gets_in(store: Store) -> None:
    auth = make(store)
    token = auth.issue_token("agent", MACHINE, 60)
    results: list[object] = []
    start = threading.Barrier(8)

    def try_it() -> None:
        start.wait()
        try:
            results.append(auth.join(token, "agent", "host"))
        except TokenUsed as error:
            results.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(result, JoinAnswer) for result in results) == 1
    assert sum(isinstance(result, TokenUsed) for result in results) == 7


def test_joining_again_ends_the_credential_before(store: Store) -> None:
    auth = make(store)
    first = auth.join(auth.issue_token("agent", MACHINE, 60), "agent", "host")
    other = auth.join(auth.issue_token("agent", uuid.uuid4(), 60), "agent", "host")
    operator = auth.join(auth.issue_token("operator", None, 60), "operator", "me")
    second = auth.join(auth.issue_token("agent", MACHINE, 60), "agent", "host")
    auth.join(auth.issue_token("operator", None, 60), "operator", "you")
    with pytest.raises(Unauthorized):
        auth.authenticate(header(first))
    for kept in (second, other, operator):
        auth.authenticate(header(kept))


def test_a_removed_machine_leaves_nothing(store: Store) -> None:
    auth = make(store)
    unused = auth.issue_token("agent", MACHINE, 60)
    agent = auth.join(auth.issue_token("agent", MACHINE, 60), "agent", "host")
    pe = auth.issue("pe", MACHINE, "standby")
    auth.forget_machine(MACHINE)
    for ended in (agent, pe):
        with pytest.raises(Unauthorized):
            auth.authenticate(header(ended))
    with pytest.raises(TokenInvalid):
        auth.join(unused, "agent", "host")
    assert store.tokens.items() == {}
    assert store.credentials.items() == {}


def test_no_secret_is_stored(store: Store) -> None:
    auth = make(store)
    token = auth.issue_token("agent", MACHINE, 60)
    joined = auth.join(token, "agent", "host")
    rows = b"".join([*store.tokens.items().values(), *store.credentials.items().values()])
    rows += "".join([*store.tokens.items(), *store.credentials.items()]).encode()
    assert token.rsplit(".", 1)[1].encode() not in rows
    assert joined.secret.encode() not in rows


def test_a_credential_that_was_not_handed_over_does_not_exist(store: Store) -> None:
    auth = make(store)

    def fail(_: JoinAnswer) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        auth.issue("operator", None, "first", hand_over=fail)
    assert not auth.has_operator()


def test_roles_and_machines_are_told_apart(store: Store) -> None:
    auth = make(store)
    agent = auth.authenticate(header(auth.issue("agent", MACHINE, "host")))
    operator = auth.authenticate(header(auth.issue("operator", None, "me")))
    agent.require_role("agent", "pe")
    agent.require_machine(MACHINE)
    operator.require_machine(MACHINE)
    with pytest.raises(Forbidden):
        agent.require_role("operator")
    with pytest.raises(Forbidden):
        agent.require_machine(uuid.uuid4())


ANY_TOKEN = st.one_of(
    st.text(max_size=300),
    st.from_regex(r"cdp1\.[0-9a-f]{64}\.[A-Za-z0-9_-]{43}", fullmatch=True),
    st.builds(lambda tail: f"cdp1.{FINGERPRINT}.{tail}", st.text(max_size=60)),
)


def test_any_text_as_a_token_or_credential_is_refused_by_name(store: Store) -> None:
    auth = make(store)
    auth.issue_token("agent", MACHINE, 60)
    held = auth.issue("agent", MACHINE, "host")

    @given(ANY_TOKEN)
    def tokens(text: str) -> None:
        with pytest.raises(TokenInvalid):
            auth.join(text, "agent", "host")

    @given(
        st.one_of(
            st.none(),
            st.text(max_size=400),
            st.builds(
                lambda tail: f"Bearer {held.credential}.{tail}", st.from_regex(r"[A-Za-z0-9_-]{43}", fullmatch=True)
            ),
            st.builds(lambda tail: f"Bearer {held.credential}{tail}", st.text(max_size=60)),
        )
    )
    def headers(text: str | None) -> None:
        with pytest.raises(CdpError) as caught:
            auth.authenticate(text)
        assert isinstance(caught.value, Unauthorized)

    tokens()
    headers()
