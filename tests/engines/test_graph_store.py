"""One suite for every graph of passages and entities: the fake, Ladybug, NebulaGraph's client against a stub of its server."""

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capibara_flow.engines.ladybug import LadybugGraph
from capibara_flow.engines.nebula import NebulaGraph
from capibara_flow.errors import BadRequest, CannotStart, StoreInUse, StoreUnavailable
from capibara_flow.ports import GraphStore
from tests.engines.graphd import Graphd
from tests.engines.graphs import SCOPES, Deed, deeds, told
from tests.fakes_knowledge import FakeGraph
from topics.knowledge import Mention, Scope

HERE, THERE = Scope("ana"), Scope("berta")
KINDS = ("fake", "ladybug", "nebula", pytest.param("nebula-cluster", marks=[pytest.mark.docker, pytest.mark.timeout(900)]))
_spaces = itertools.count()


@pytest.fixture(params=KINDS)
async def graph(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[GraphStore]:
    """An empty graph of each kind."""
    with ExitStack() as stack:
        if request.param == "fake":
            graph: GraphStore = FakeGraph()
        elif request.param == "ladybug":
            graph = LadybugGraph(tmp_path / "graph.lbug")
        elif request.param == "nebula":
            graph = NebulaGraph([stack.enter_context(Graphd()).address])
        else:
            address = request.getfixturevalue("nebula_cluster")
            graph = NebulaGraph([address], space=f"test_{next(_spaces)}", patience_seconds=60)
        yield graph
        await graph.aclose()


def about(passage: str, entity: str) -> Mention:
    return Mention(passage, entity, entity.title(), about=True)


async def test_who_mentions_what_is_told_from_both_sides(graph: GraphStore):
    rome = [about("p1", "rome"), Mention("p1", "italy", "Italia"), Mention("p2", "rome", "Roma")]
    await graph.put(HERE, "d", rome)
    assert await graph.degrees(HERE, ["rome", "italy", "nobody"]) == {"rome": 2, "italy": 1}
    assert await graph.mentioning(HERE, ["italy", "rome"], 10) == [rome[1], rome[0], rome[2]]
    assert sorted(await graph.mentioned(HERE, ["p1"]), key=repr) == sorted(rome[:2], key=repr)
    assert await graph.documents(HERE) == {"d": 2}


async def test_of_an_entity_that_many_mention_those_that_are_about_it_come_first(graph: GraphStore):
    await graph.put(HERE, "d1", [Mention(f"p{number}", "hub", "Hub") for number in range(8)])
    await graph.put(HERE, "d2", [about("z", "hub")])
    assert [each.passage for each in await graph.mentioning(HERE, ["hub"], 3)] == ["z", "p0", "p1"]


async def test_no_scope_knows_what_another_one_keeps(graph: GraphStore):
    await graph.put(HERE, "d", [Mention("p", "rome", "Rome")])
    await graph.put(THERE, "d", [Mention("p", "rome", "ROMA")])
    await graph.delete(THERE, "d")
    assert await graph.mentioning(HERE, ["rome"], 5) == [Mention("p", "rome", "Rome")]
    for scope in (THERE, Scope("ana", "other"), Scope("an", "adefault")):
        assert await graph.degrees(scope, ["rome"]) == {}
        assert await graph.mentioned(scope, ["p"]) == []
        assert await graph.documents(scope) == {}


async def test_a_document_again_replaces_what_was_kept_of_it_and_the_same_again_changes_nothing(graph: GraphStore):
    await graph.put(HERE, "d", [Mention("p1", "rome", "Rome"), Mention("p2", "paris", "Paris")])
    for _ in range(2):
        await graph.put(HERE, "d", [Mention("p1", "rome", "Rome")])
        assert await graph.degrees(HERE, ["rome", "paris"]) == {"rome": 1}
        assert await graph.documents(HERE) == {"d": 1}
    await graph.put(HERE, "d", [])
    assert await graph.documents(HERE) == {}


async def test_what_is_deleted_is_gone_also_when_it_was_never_there(graph: GraphStore):
    await graph.put(HERE, "d1", [Mention("p1", "rome", "Rome"), Mention("p1", "only", "Only")])
    await graph.put(HERE, "d2", [Mention("p2", "rome", "Rome")])
    for _ in range(2):
        await graph.delete(HERE, "d1")
        assert await graph.degrees(HERE, ["rome", "only"]) == {"rome": 1}
        assert await graph.mentioned(HERE, ["p1"]) == []


async def test_nothing_is_asked_and_nothing_is_found(graph: GraphStore):
    assert await graph.degrees(HERE, []) == {}
    assert await graph.mentioning(HERE, [], 5) == []
    assert await graph.mentioned(HERE, []) == []
    assert await graph.documents(HERE) == {}


async def test_several_documents_at_once_come_to_the_same_as_one_by_one(graph: GraphStore):
    await asyncio.gather(*(graph.put(HERE, f"d{n}", [Mention(f"p{n}", "hub", "Hub"), Mention(f"p{n}", f"e{n}", "E")]) for n in range(8)))
    await asyncio.gather(*(graph.delete(HERE, f"d{n}") for n in range(4)))
    assert await graph.degrees(HERE, ["hub", "e0", "e7"]) == {"hub": 4, "e7": 1}


async def test_a_document_of_many_passages_is_kept_whole(graph: GraphStore):
    many = [Mention(f"p{n:04}", f"e{n % 300}", f"E'{n}\"", about=n % 5 == 0) for n in range(600)]
    await graph.put(HERE, "d", many)
    assert await graph.documents(HERE) == {"d": 600}
    assert sorted(await graph.mentioned(HERE, [each.passage for each in many]), key=repr) == sorted(many, key=repr)
    await graph.delete(HERE, "d")
    assert await graph.degrees(HERE, [f"e{n}" for n in range(300)]) == {}


async def test_a_store_answers_like_the_fake_whatever_was_done(graph: GraphStore):
    """One store for all examples: each begins by deleting what the one before may have left."""
    loop = asyncio.get_running_loop()
    everything = [Deed(scope, document, None) for scope in SCOPES for document in ("d1", "d2", "d3")]

    async def same(each: list[Deed]) -> None:
        fake = FakeGraph()
        for deed in everything:
            await deed.do(graph)
        for deed in each:
            await deed.do(fake)
            await deed.do(graph)
        assert await told(graph) == await told(fake)

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(each=st.lists(deeds(), max_size=7))
    def check(each: list[Deed]) -> None:
        asyncio.run_coroutine_threadsafe(same(each), loop).result(60)

    await asyncio.to_thread(check)


async def test_ladybug_keeps_its_graph_over_a_new_start_and_takes_unknown_characters_for_what_they_are(tmp_path: Path):
    graph = LadybugGraph(tmp_path / "deep" / "graph.lbug")
    odd = [Mention("p", "nul \0 and tab \t", "x' OR 1=1; MATCH (n) DETACH DELETE n //")]
    await graph.put(HERE, "d", odd)
    with pytest.raises(BadRequest):
        await graph.put(HERE, "e", [Mention("q", "half \ud800 of a pair", "x")])
    await graph.aclose()
    again = LadybugGraph(tmp_path / "deep" / "graph.lbug")
    assert await again.mentioned(HERE, ["p"]) == odd
    assert await again.documents(HERE) == {"d": 1}
    await again.aclose()


async def test_ladybug_has_one_owner_and_after_its_end_another(tmp_path: Path):
    first, second = LadybugGraph(tmp_path / "g"), LadybugGraph(tmp_path / "g")
    await first.documents(HERE)
    with pytest.raises(StoreInUse, match="another process uses the graph"):
        await second.documents(HERE)
    await first.aclose()
    with pytest.raises(StoreUnavailable, match="closed"):
        await first.documents(HERE)
    assert await second.documents(HERE) == {}
    await second.aclose()


async def test_ladybug_refuses_a_file_that_is_no_graph_and_leaves_it_alone(tmp_path: Path):
    (tmp_path / "g").write_bytes(b"no graph at all" * 1000)
    graph = LadybugGraph(tmp_path / "g")
    for _ in range(2):
        with pytest.raises(CannotStart, match="cannot be opened"):
            await graph.documents(HERE)
    await graph.aclose()
    assert (tmp_path / "g").read_bytes() == b"no graph at all" * 1000


async def test_ladybug_finds_the_first_of_many_mentions_and_none_of_none(tmp_path: Path):
    graph, fake = LadybugGraph(tmp_path / "g"), FakeGraph()
    many = [Mention(f"p{n:03}", "hub", "Hub", about=n % 100 == 7) for n in range(550)]
    for each in (graph, fake):
        await each.put(HERE, "d", many)
        await each.put(HERE, "e", [Mention("q", "hub", "Hub")])
    for limit in (0, 3, 20, 1000):
        assert await graph.mentioning(HERE, ["hub", "none"], limit) == await fake.mentioning(HERE, ["hub", "none"], limit)
    assert await graph.degrees(HERE, ["hub", "none"]) == {"hub": 551}
    await graph.aclose()


async def test_ladybug_keeps_no_node_that_nothing_leads_to(tmp_path: Path):
    graph = LadybugGraph(tmp_path / "g")
    await graph.put(HERE, "d1", [Mention("p1", "rome", "Rome"), Mention("p1", "only", "Only")])
    await graph.put(HERE, "d2", [Mention("p2", "rome", "Rome")])
    await graph.put(HERE, "d1", [Mention("p3", "other", "Other")])
    left = await graph._in(graph._readers, lambda cypher: cypher("MATCH (n) RETURN label(n), n.id", {}))
    documents, entities, passages = ["d1", "d2"], ["other", "rome"], ["p2", "p3"]
    labels = ["Document"] * 2 + ["Entity"] * 2 + ["Passage"] * 2 + ["Scope"]
    assert sorted(left, key=repr) == [list(each) for each in zip(labels, [*documents, *entities, *passages, None], strict=True)]
    await graph.delete(HERE, "d1")
    await graph.put(HERE, "d2", [])
    assert await graph._in(graph._readers, lambda cypher: cypher("MATCH (n) RETURN n.key", {})) == []
    await graph.aclose()


WRITER = """
import asyncio, pathlib, sys
from capibara_flow.engines.ladybug import LadybugGraph
from topics.knowledge import Mention, Scope
async def write():
    graph = LadybugGraph(pathlib.Path(sys.argv[1]))
    for n in range(10_000):
        await graph.put(Scope("ana"), f"d{n}", [Mention(f"d{n}:{k}", f"e{k}", "E") for k in range(20)])
        print(n, flush=True)
asyncio.run(write())
"""


async def test_ladybug_has_what_it_said_to_have_also_when_its_process_is_killed_in_the_middle(tmp_path: Path):
    path = tmp_path / "graph.lbug"
    writer = await asyncio.create_subprocess_exec(sys.executable, "-c", WRITER, str(path), stdout=asyncio.subprocess.PIPE)
    assert writer.stdout
    lines = [await writer.stdout.readline() for _ in range(12)]
    writer.kill()
    lines += (await writer.stdout.read()).splitlines()
    await writer.wait()
    acknowledged = len([line for line in lines if line.strip().isdigit()])
    graph = LadybugGraph(path)
    kept = await graph.documents(HERE)
    assert set(kept.values()) == {20}
    assert {f"d{n}" for n in range(acknowledged)} <= kept.keys()
    assert len(kept) <= acknowledged + 1
    await graph.put(HERE, "d0", [])
    assert await graph.degrees(HERE, ["e0"]) == {"e0": len(kept) - 1}
    await graph.aclose()
