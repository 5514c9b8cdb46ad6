"""What is decided of documents, and of stores that do not agree."""

from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.chunking import chunks
from capibara_flow.domain.ingesting import (
    Stock,
    confirmed,
    decide,
    document_id,
    findings,
    passage_ids,
    passages_of,
    resumable,
)
from topics.knowledge import Document, Scope

SCOPE = Scope("acme")
NOW = datetime(2024, 2, 3, tzinfo=UTC)


def document(id: str = "d", digest: str = "x", *, title: str = "Title", passages: int = 3) -> Document:
    return Document(id, SCOPE, title, f"{id}.txt", digest, "es", NOW, passages=passages)


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


def test_passages_are_known_by_their_document_and_change_with_its_content() -> None:
    text = "Una frase.\n\nOtra frase.\n\nUna más."
    made = passages_of(document(passages=1), chunks(text))
    assert [passage.id for passage in made] == passage_ids(document(passages=1))
    assert not set(passage_ids(document())) & {*passage_ids(document(digest="y")), *passage_ids(document("e"))}
    assert all(text[passage.start : passage.end] == passage.text for passage in made)
    assert made[0].updated == NOW.timestamp()


def test_a_broken_off_ingestion_goes_on_only_behind_the_same_cut() -> None:
    wanted = passages_of(document(), chunks("Una frase. " * 200))
    kept = {wanted[0].id: wanted[0]}
    assert resumable(wanted, kept)
    assert not resumable(wanted, {})
    assert not resumable(wanted, {wanted[0].id: replace(wanted[0], text="cut elsewhere")})


def test_stores_that_agree_need_nothing() -> None:
    ready = {"a": document("a"), "b": document("b", title="1984")}
    assert findings(SCOPE, Stock(ready, {}, {"a": 3, "b": 3}, {"a": 3})) == []


def test_each_way_of_not_agreeing_has_its_repair() -> None:
    ready = {id: document(id) for id in ("fewer", "more", "unlinked", "overlinked", "whole", "busy")}
    stock = Stock(
        ready,
        {"begun": document("begun")},
        {"fewer": 2, "more": 4, "unlinked": 3, "overlinked": 3, "whole": 3, "begun": 1, "orphan": 2},
        {"fewer": 2, "more": 3, "overlinked": 4, "whole": 1, "stray": 1},
    )
    found = {each.document: each for each in findings(SCOPE, stock, busy={"busy"})}
    assert {id: each.repair for id, each in found.items()} == {
        "begun": "remove",
        "fewer": "remove",
        "more": "rewrite",
        "orphan": "remove",
        "overlinked": "relink",
        "stray": "remove",
        "unlinked": "relink",
    }
    assert found["fewer"].address == "fewer.txt"
    assert found["fewer"].why == "1 of its 3 passages are lost"


def test_only_what_two_looks_agree_on_is_believed() -> None:
    one = findings(SCOPE, Stock({}, {}, {"growing": 1, "orphan": 2}))
    two = findings(SCOPE, Stock({"growing": document("growing", passages=2)}, {}, {"growing": 2, "orphan": 2, "newer": 1}, {"growing": 2}))
    assert [each.document for each in confirmed(one, two)] == ["orphan"]
