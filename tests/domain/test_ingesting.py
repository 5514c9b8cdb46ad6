"""What is decided of documents, and of stores that do not agree."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.chunking import Chunk, chunks
from capibara_flow.domain.ingesting import (
    Stock,
    confirmed,
    decide,
    document_id,
    edition_in,
    edition_of,
    findings,
    linked_as,
    owner,
    passage_ids,
    passages_of,
)
from topics.knowledge import Document, Scope

SCOPE = Scope("acme")
NOW = datetime(2024, 2, 3, tzinfo=UTC)


def document(id: str = "d", digest: str = "x", *, title: str = "Title", passages: int = 3, edition: str = "") -> Document:
    return Document(id, SCOPE, title, f"{id}.txt", digest, "es", NOW, passages=passages, edition=edition)


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8)), min_size=2, max_size=2, unique=True))
def test_ids_are_told_apart_by_tenant_collection_and_address(pair: list[tuple[str, str, str]]) -> None:
    (one, two, three), (four, five, six) = pair
    assert document_id(Scope(one, two), three) != document_id(Scope(four, five), six)


IDS, DIGESTS = st.sampled_from("abc"), st.sampled_from("xyz")


@given(IDS, DIGESTS, st.sampled_from(["", "Title", "Other"]), st.none() | DIGESTS, st.none() | IDS)
def test_content_is_kept_once_and_under_its_newest_address(id: str, digest: str, title: str, before: str | None, other: str | None) -> None:
    ready = document(id, before) if before else None
    same = document(other, digest) if other and (other != id or before == digest) else None
    decision = decide(id, digest, title, ready, same)
    if decision.how == "unchanged":
        assert decision.stands is ready is not None
        assert ready.digest == digest
    elif decision.how == "same":
        assert decision.stands is same is not None
        assert same.id != id
        assert same.digest == digest
    else:
        assert decision.stands is None
        assert (decision.how == "replaced") == (ready is not None)
    again = decide(id, digest, title, replace(document(id, digest), title=title or "Title"), same)
    assert again.how == "unchanged"


@pytest.mark.parametrize("edition", ["", "e1"])
def test_passages_are_known_by_their_document_and_its_edition(edition: str) -> None:
    text = "Una frase.\n\nOtra frase.\n\nUna más."
    one = document(passages=1, edition=edition)
    made = passages_of(one, chunks(text))
    assert [passage.id for passage in made] == passage_ids(one)
    assert not set(passage_ids(one)) & {*passage_ids(document(digest="y", edition="e2")), *passage_ids(document("e", edition=edition))}
    assert edition_in(made[0].id) == (("d", "e1") if edition else None)
    assert owner(linked_as(one)) == "d"
    assert all(text[passage.start : passage.end] == passage.text for passage in made)
    assert made[0].updated == NOW.timestamp()


def test_passages_and_links_of_earlier_releases_keep_their_names() -> None:
    assert passage_ids(document(passages=1)) == ["83fe0381c5625b632ad8befe1fdbba86d92652ef"]
    assert linked_as(document()) == "d"


_CUTS = st.lists(st.builds(Chunk, st.integers(0, 2), st.integers(0, 2), st.text(max_size=2), st.tuples(st.text(max_size=1))), max_size=2)


@given(st.tuples(DIGESTS, st.text(max_size=2), _CUTS), st.tuples(DIGESTS, st.text(max_size=2), _CUTS))
def test_an_edition_is_another_one_as_soon_as_any_passage_would_be(
    one: tuple[str, str, list[Chunk]], other: tuple[str, str, list[Chunk]]
) -> None:
    first, second = (edition_of(document(digest=digest, title=title), cut) for digest, title, cut in (one, other))
    assert (first == second) == (one == other)


def test_stores_that_agree_need_nothing() -> None:
    ready = {"a": document("a"), "b": document("b", title="1984"), "c": document("c", edition="e1")}
    assert findings(SCOPE, Stock(ready, {}, {"a": 3, "b": 3, "c": 3}, {"a": 3, "c.e1": 2})) == []


def test_each_way_of_not_agreeing_has_its_repair() -> None:
    names = ("fewer", "more", "unlinked", "overlinked", "elsewhere", "changed", "torn", "whole", "busy")
    ready = {id: document(id, edition="e1") for id in names}
    stock = Stock(
        ready,
        {id: document(id) for id in ("begun", "changed", "torn")},
        {
            "fewer": 2,
            "more": 4,
            "unlinked": 3,
            "overlinked": 3,
            "elsewhere": 3,
            "changed": 3,
            "torn": 2,
            "whole": 3,
            "begun": 1,
            "orphan": 2,
        },
        {"fewer.e1": 2, "more.e1": 3, "overlinked.e1": 4, "elsewhere.e1": 3, "elsewhere": 1, "changed.e1": 3, "whole.e1": 1, "stray.e3": 1},
    )
    found = {each.document: each for each in findings(SCOPE, stock, busy={"busy"})}
    assert {id: each.repair for id, each in found.items()} == {
        "begun": "remove",
        "changed": "trim",
        "elsewhere": "trim",
        "fewer": "remove",
        "more": "trim",
        "orphan": "remove",
        "overlinked": "relink",
        "stray": "remove",
        "torn": "remove",
        "unlinked": "relink",
    }
    assert found["fewer"].address == "fewer.txt"
    assert found["fewer"].why == "1 of its 3 passages are lost"


def test_only_what_two_looks_agree_on_is_believed() -> None:
    one = findings(SCOPE, Stock({}, {}, {"growing": 1, "orphan": 2}))
    two = findings(SCOPE, Stock({"growing": document("growing", passages=2)}, {}, {"growing": 2, "orphan": 2, "newer": 1}, {"growing": 2}))
    assert [each.document for each in confirmed(one, two)] == ["orphan"]
