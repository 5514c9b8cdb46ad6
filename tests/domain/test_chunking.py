"""Passages: right offsets, nothing lost, never too large, whatever the text."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.chunking import Chunk, Sizes, chunks, sentences, words_in
from capibara_flow.domain.parsed import Block, cleaned, plain_blocks

SMALL = Sizes(target=12, most=18, overlap=6)
WORDS = [
    "Uno",
    "dos",
    "tres.",
    "¿Qué?",
    "- a",
    "1. b",
    "# T",
    "\n",
    "\n\n",
    " ",
    "| x |",
    "漢字。",
    "x" * 40,
    "TITULO",
    "Dr.",
    "fin!",
    "===",
]
TEXTS = st.one_of(st.text(max_size=600), st.lists(st.sampled_from(WORDS), max_size=120).map(" ".join))
KINDS = st.sampled_from(["heading", "paragraph", "list", "table", "code"])
BLOCKS = st.lists(st.builds(Block, st.integers(-5, 300), st.integers(-5, 400), KINDS, st.integers(0, 6)), max_size=8)


@given(TEXTS, BLOCKS, st.sampled_from([SMALL, Sizes(1, 1, 0), Sizes(5, 40, 100)]))
def test_every_text_becomes_passages_that_cover_it_in_order(text: str, blocks: list[Block], sizes: Sizes) -> None:
    made = chunks(text, blocks, sizes)
    covered = bytearray(len(text))
    for chunk in made:
        assert chunk.text == text[chunk.start : chunk.end] == chunk.text.strip() != ""
        assert words_in(chunk.text) <= sizes.most
        covered[chunk.start : chunk.end] = b"\1" * (chunk.end - chunk.start)
    assert all(seen or each.isspace() for seen, each in zip(covered, text, strict=True))
    assert all(one.start < other.start and one.end < other.end for one, other in pairwise(made))


@given(TEXTS)
def test_cleaning_is_done_once(text: str) -> None:
    once = cleaned(text)
    assert cleaned(once) == once
    assert "\r" not in once
    assert "\x00" not in once


def test_passages_follow_headings_and_carry_their_path() -> None:
    body = "Una frase con ocho palabras que dice algo. "
    text = f"INTRODUCCION\n\n{body}\n\n1 Vida\n\n{body * 2}\n\n1.1 Agua\n\n{body * 2}"
    made = chunks(text, (), Sizes(20, 30, 5))
    assert [chunk.headings for chunk in made] == [("INTRODUCCION",), ("1 Vida",), ("1 Vida", "1.1 Agua")]
    assert made[1].text.startswith("1 Vida\n\nUna frase")


def test_a_paragraph_that_is_cut_repeats_one_sentence_and_others_do_not() -> None:
    one, two, three = "Uno dos tres cuatro cinco seis.", "Siete ocho nueve diez once.", "Doce trece catorce quince dieciseis diecisiete."
    made = chunks(f"{one} {two} {three}", (), Sizes(12, 14, 6))
    assert [chunk.text for chunk in made] == [f"{one} {two}", f"{two} {three}"]
    apart = chunks(f"{one} {two}\n\n{three}", (), Sizes(12, 14, 6))
    assert [chunk.text for chunk in apart] == [f"{one} {two}", three]


def test_tables_and_code_stay_whole_while_they_fit_and_are_cut_by_lines_beyond() -> None:
    table = "\n".join(f"| a{number} | b{number} |" for number in range(4))
    text = f"Antes de la tabla hay texto.\n\n{table}\n\nDespués hay más."
    start = text.index("|")
    blocks = [Block(start, start + len(table), "table")]
    assert any(table in chunk.text for chunk in chunks(text, blocks, Sizes(20, 24, 0)))
    cut = chunks(table, [Block(0, len(table), "table")], Sizes(10, 12, 0))
    assert [chunk.text for chunk in cut] == ["\n".join(table.split("\n")[:2]), "\n".join(table.split("\n")[2:])]


@pytest.mark.parametrize(
    "said",
    [
        ["El Sr. García llegó a las 5 p.m. del lunes.", "¿Vino solo?", "Sí."],
        ["The U.S. Army met Dr. J. R. Smith vs. Jones, etc.", "Then they left!", "“Really?” he said."],
        ["Véase la pág. 12 y el art. 3.", "La Av. Mayo mide 1.5 km.", "… y siguió."],
        ["彼は来た。", "彼女は去った。"],
    ],
)
def test_sentences_end_where_a_reader_would_end_them(said: list[str]) -> None:
    text = " ".join(said)
    assert [text[start:end] for start, end in sentences(text, 0, len(text))] == said


def test_headings_of_plain_text_are_told_by_their_form() -> None:
    text = "Título\n======\nCuerpo uno.\n\nCAPÍTULO DOS\n\n- a\n- b\n\n2.1 Más cosas\n\nUna línea corta\n\n3 gatos vivían allí."
    made = [(block.kind, block.level, block.title) for block in plain_blocks(text)]
    assert made == [
        ("heading", 1, "Título"), ("paragraph", 0, ""), ("heading", 1, "CAPÍTULO DOS"), ("list", 0, ""),
        ("heading", 2, "2.1 Más cosas"), ("paragraph", 0, ""), ("paragraph", 0, ""),
    ]  # fmt: skip


@pytest.mark.parametrize("piece", ["a. ", ".", "x", "\n", "- a\n", "1 A\n\n", '" ', "漢", " "])
def test_time_is_linear_in_hostile_texts(piece: str) -> None:
    """A quadratic step would take minutes here, and the suite's own time limit would end it."""
    made = chunks(piece * (400_000 if piece == "." else 20_000))
    assert all(isinstance(chunk, Chunk) for chunk in made)


def test_sizes_that_cannot_be_are_refused() -> None:
    for target, most, overlap in ((0, 5, 0), (10, 5, 0), (1, 2, -1)):
        with pytest.raises(ValueError, match="sizes of passages"):
            Sizes(target, most, overlap)
