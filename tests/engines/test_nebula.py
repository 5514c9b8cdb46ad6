"""What ``NebulaGraph`` does beyond the suite of all graphs, through the real client: sessions, faults, hostile words."""

import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nebula3.common.ttypes import ErrorCode

from capibara_flow.engines import nebula_statements as statements
from capibara_flow.engines.nebula import NebulaGraph
from capibara_flow.errors import BadRequest, CannotStart, StoreUnavailable
from tests.engines.graphd import _STRING, Graphd, _text
from topics.knowledge import Mention, Scope

HERE = Scope("ana")
ROME = Mention("p", "rome", "Rome")


@pytest.fixture
def graphd() -> Iterator[Graphd]:
    with Graphd() as graphd:
        yield graphd


@pytest.fixture
async def graph(graphd: Graphd) -> AsyncIterator[NebulaGraph]:
    """A graph that has one mention, and is patient for as long as any of these faults lasts."""
    graph = NebulaGraph([graphd.address], patience_seconds=20)
    await graph.put(HERE, "d", [ROME])
    yield graph
    await graph.aclose()


@pytest.mark.parametrize("fault", ["expire", "cut"])
async def test_an_expired_session_and_a_lost_connection_heal_unseen(graphd: Graphd, graph: NebulaGraph, fault: str):
    for _ in range(3):
        getattr(graphd, fault)()
        assert await graph.mentioned(HERE, ["p"]) == [ROME]
        await graph.put(HERE, "d", [ROME])


async def test_a_server_that_was_away_is_found_again_and_meanwhile_the_error_is_clear(graphd: Graphd, graph: NebulaGraph):
    graphd.stop()
    brief = NebulaGraph([graphd.address], patience_seconds=0.3)
    with pytest.raises(StoreUnavailable, match=rf"NebulaGraph at 127.0.0.1:{graphd.port} cannot be reached"):
        await brief.documents(HERE)
    graphd.serve()
    assert await graph.documents(HERE) == {"d": 1}
    assert await brief.documents(HERE) == {"d": 1}
    await brief.aclose()


@pytest.mark.parametrize(
    "code", [ErrorCode.E_LEADER_CHANGED, ErrorCode.E_RPC_FAILURE, ErrorCode.E_EXECUTION_ERROR, ErrorCode.E_SESSION_TIMEOUT]
)
async def test_what_may_pass_is_tried_again(graphd: Graphd, graph: NebulaGraph, code: int):
    graphd.refusals = [code, code]
    await graph.put(HERE, "d", [ROME, Mention("p", "paris", "Paris")])
    assert graphd.refusals == []
    assert await graph.degrees(HERE, ["rome", "paris"]) == {"rome": 1, "paris": 1}


async def test_a_put_that_died_at_any_statement_is_completed_by_the_next(graphd: Graphd):
    before = [ROME, Mention("q", "paris", "Paris"), Mention("q", "lima", "Lima")]
    after = [Mention("p", "rome", "ROMA"), Mention("r", "lima", "Lima")]
    graph = NebulaGraph([graphd.address], patience_seconds=0.01)
    broke: list[bool] = []
    for step in range(12):
        await graph.put(HERE, "d", before)
        graphd.break_at = len(graphd.said) + step
        with suppress(StoreUnavailable):
            await graph.put(HERE, "d", after if step % 2 else [])
        broke.append(len(graphd.said) > graphd.break_at)
        graphd.break_at = None
        await graph.put(HERE, "d", after)
        assert sorted(await graph.mentioned(HERE, ["p", "q", "r"]), key=repr) == after
        assert await graph.documents(HERE) == {"d": 2}
        await graph.delete(HERE, "d")
        assert not any(edges for space in graphd.spaces.values() for edges in space.values())
    assert broke.count(True) >= 6
    await graph.aclose()


async def test_a_server_that_does_not_answer_in_time_is_unavailable(graphd: Graphd):
    graph = NebulaGraph([graphd.address], seconds=0.2, patience_seconds=0.01)
    assert await graph.documents(HERE) == {}
    graphd.pause = 1.5
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        await graph.documents(HERE)
    graphd.pause = 0
    await graph.aclose()


async def test_logins_that_fail_again_and_again_do_not_use_the_client_up(graphd: Graphd):
    graphd.broken_logins = 40
    graph = NebulaGraph([graphd.address], patience_seconds=0.01)
    while graphd.broken_logins:
        with suppress(StoreUnavailable):
            await graph.documents(HERE)
    assert await graph.documents(HERE) == {}
    await graph.aclose()


async def test_a_wrong_password_and_a_wrong_statement_are_not_tried_again(graphd: Graphd):
    stranger = NebulaGraph([graphd.address], password="guess")
    with pytest.raises(CannotStart, match="does not let us in"):
        await stranger.documents(HERE)
    await stranger.aclose()
    graph = NebulaGraph([graphd.address])
    await graph.documents(HERE)
    graphd.refusals = [ErrorCode.E_SYNTAX_ERROR]
    with pytest.raises(BadRequest, match="as the test wanted"):
        await graph.documents(HERE)
    await graph.aclose()


async def test_one_of_several_servers_is_enough(graphd: Graphd):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = nobody.getsockname()
    graph = NebulaGraph([address, graphd.address])
    await graph.put(HERE, "d", [ROME])
    assert await graph.documents(HERE) == {"d": 1}
    await graph.aclose()


async def test_words_cannot_break_out_of_a_statement(graph: NebulaGraph):
    words = '"}; DROP SPACE capibara; \\" \\\\" \n\t\0 \x7f $- | ñ 北京 😀'
    await graph.put(Scope(words, words), words, [Mention(words, words, words)])
    assert await graph.mentioned(Scope(words, words), [words]) == [Mention(words, words, words)]
    assert await graph.documents(Scope(words, words)) == {words: 1}
    assert await graph.documents(HERE) == {"d": 1}
    with pytest.raises(BadRequest):
        await graph.put(HERE, "e", [Mention("q", "half \ud800", "x")])


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_literal_is_one_token_and_means_its_text(text: str):
    literal = statements.quoted(text)
    assert re.fullmatch(_STRING, literal)
    assert _text(literal) == text


@pytest.mark.parametrize("name", ["", "two words", "1st", "x;DROP SPACE y", "ñ", "a" * 64])
def test_a_space_has_a_plain_name(name: str):
    with pytest.raises(ValueError, match="cannot be the name of a space"):
        statements.use(name)


async def test_a_document_of_many_mentions_takes_statements_of_a_bounded_size(graphd: Graphd, graph: NebulaGraph):
    await graph.put(HERE, "big", [Mention(f"p{n}", f"e{n}", "N" * 2000) for n in range(1200)])
    assert max(map(len, graphd.said)) < 1_000_000
    assert await graph.documents(HERE) == {"d": 1, "big": 1200}
