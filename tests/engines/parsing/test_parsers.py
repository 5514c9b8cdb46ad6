"""What each parser makes of a file; in this process, for what is tried here is harmless."""

import random
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.parsed import Parsed
from capibara_flow.engines.parsing import docx as docx_parser
from capibara_flow.engines.parsing.child import parse
from capibara_flow.engines.parsing.media import DOCX, HTML, MARKDOWN, PDF, TEXT
from capibara_flow.errors import DocumentRefused
from tests.engines.parsing.files import bomb, pdf, word

SPANISH = "El año pasado la señora Núñez viajó a España con su familia. ¿Volverá? «Sí», dijo."


def shown(parsed: Parsed) -> list[tuple[str, str]]:
    return [(block.kind, parsed.text[block.start : block.end].strip()) for block in parsed.blocks]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"])
def test_a_text_is_right_in_any_usual_encoding(encoding: str) -> None:
    parsed = parse(SPANISH.encode(encoding), "nota.txt")
    assert (parsed.text, parsed.language, parsed.media_type) == (SPANISH, "es", TEXT)


def test_bytes_that_are_no_utf8_among_those_that_are_do_no_harm() -> None:
    mixed = "España es así. ".encode() * 20 + "También la señora.".encode("cp1252") + " ¡Qué día!".encode()
    assert parse(mixed, "a.txt").text.endswith("También la señora. ¡Qué día!")
    assert parse("La canción terminó".encode()[:-1], "a.txt").text.startswith("La canción termin")


def test_another_script_is_told_by_its_bytes_or_by_what_is_declared() -> None:
    russian = "Это простой русский текст, который написан в старой кодировке для проверки работы программы."
    assert parse(russian.encode("cp1251"), "a.txt").text == russian
    assert parse(russian.encode("koi8-r"), "a.txt", "text/plain; charset=koi8-r").text == russian
    assert parse(SPANISH.encode(), "a.txt", "text/plain; charset=zlib").text == SPANISH


def test_controls_do_not_survive_and_letters_are_composed() -> None:
    parsed = parse(("palabra " * 100 + "cafe\u0301\x07 a\u200bb\r\nfin\x1b[31m").encode(), "a.txt")
    assert parsed.text.endswith("café ab\nfin[31m")


@pytest.mark.parametrize(
    ("data", "name", "why"),
    [
        (b"", "a.txt", "empty"),
        (b" \n\t ", "a.md", "empty"),
        (random.Random(1).randbytes(5000), "a.txt", "encoding|binary"),
        (bytes(200), "a.txt", "binary"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "a.txt", "PNG image"),
        (b"... --- ...", "a.txt", "no text"),
        (b"<html><script>x()</script></html>", "a.html", "no text"),
        (b"%PDF-1.7\nbroken", "a.pdf", "PDF is broken"),
        (pdf([["Hola mundo"]])[:300], "a.pdf", "PDF is broken|no text"),
        (pdf([["Hola mundo"]], password="secreto"), "a.pdf", "encrypted"),
        (pdf([[], []]), "a.pdf", "OCR"),
        (b"not a pdf", "a.pdf", "content is not"),
        (b"PK\x03\x04broken", "a.docx", "DOCX is broken"),
        (b"PK\x03\x04zip", "a.zip", "ZIP archive"),
        (word()[:2000], "a.docx", "DOCX is broken"),
        (bomb(docx_parser.LARGEST + (1 << 20)), "a.docx", "larger than 256 MB"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_cannot_be_read_is_refused_with_the_reason(data: bytes, name: str, why: str) -> None:
    with pytest.raises(DocumentRefused, match=why):
        parse(data, name)


@given(st.binary(min_size=1, max_size=400))
def test_any_bytes_are_a_text_or_refused(data: bytes) -> None:
    for name in ("a.txt", "a.md", "a.html"):
        try:
            parsed = parse(data, name)
        except DocumentRefused:
            continue
        assert "\x00" not in parsed.text
        assert all(0 <= block.start <= block.end <= len(parsed.text) for block in parsed.blocks)


def test_a_page_is_what_its_reader_reads() -> None:
    page = """<!doctype html><html lang=es><head><meta charset=iso-8859-1><title>La capibara &amp; más</title>
    <meta property="article:modified_time" content="2024-02-03T04:05:06+00:00"><style>p{}</style></head>
    <body><nav>Inicio</nav><h1>La <b>capibara</b></h1><p>Es un <i>roedor</i>&nbsp;grande.<br>Nada&#0; bien.</p><script>alert(1)</script>
    <div hidden>secreto</div><ul><li>hierba<li><p>corteza</p></ul><table><tr><th>Año<th>Peso<tr><td>2023<td>50</table>
    <pre>x = 1
      y</pre>Fin<form><button>Enviar</button></form><footer>pie</footer></body></html>"""
    parsed = parse(page.encode("latin-1"), "a.html")
    assert shown(parsed) == [
        ("heading", "La capibara"),
        ("paragraph", "Es un roedor grande.\nNada bien."),
        ("list", "- hierba\n- corteza"),
        ("table", "Año | Peso\n2023 | 50"),
        ("code", "x = 1\n      y"),
    ]
    assert parsed.text.strip().endswith("Fin")
    assert (parsed.title, parsed.media_type) == ("La capibara & más", HTML)
    assert parsed.updated == datetime(2024, 2, 3, 4, 5, 6, tzinfo=UTC)
    assert [heading.level for heading in parsed.headings] == [1]


def test_a_page_may_nest_as_deeply_as_it_likes() -> None:
    assert "dentro" in parse(b"<div>" * 4_000 + b"dentro", "a.html").text
    assert "dentro" in parse(b"<nav>" * 10 + b"</nav>" * 10 + b"<b><p>" * 200 + b"dentro", "a.html").text


def test_markdown_keeps_its_form_but_for_html_and_front_matter() -> None:
    source = (
        b"---\ntitle: 'Una nota'\n---\n# Uno *dos* [tres](http://x)\n\nTexto **fuerte**.\n\n<p>Hola<script>malo()</script></p>\n\n"
        b"- a\n- b\n  - c\n\n```py\n# no heading\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nSub\n---\n\n> cita\n"
    )
    parsed = parse(source, "a.md")
    assert shown(parsed) == [
        ("heading", "# Uno *dos* [tres](http://x)"),
        ("paragraph", "Texto **fuerte**."),
        ("paragraph", "Hola"),
        ("list", "- a\n- b\n  - c"),
        ("code", "```py\n# no heading\n```"),
        ("table", "| a | b |\n|---|---|\n| 1 | 2 |"),
        ("heading", "Sub\n---"),
        ("paragraph", "> cita"),
    ]
    assert [(each.level, each.title) for each in parsed.headings] == [(1, "Uno dos tres"), (2, "Sub")]
    assert (parsed.title, parsed.media_type) == ("Una nota", MARKDOWN)
    assert "malo" not in parsed.text


def test_a_pdf_is_its_paragraphs_without_what_every_page_repeats() -> None:
    prose = ["La capibara es el roedor más grande del mundo y vive cerca del agua en Amé-", "rica del Sur. Nada muy bien."]
    pages = [["Revista de Zoología", title, *prose, str(number)] for number, title in enumerate(["Origen", "Comida", "Vida"])]
    parsed = parse(pdf(pages, title="Las capibaras", outline=[(0, "Origen"), (1, "Comida"), (2, "Vida")]), "a.pdf")
    assert "agua en América del Sur. Nada muy bien." in parsed.text
    assert "Revista" not in parsed.text
    assert [heading.title for heading in parsed.headings] == ["Origen", "Comida", "Vida"]
    assert (parsed.title, parsed.language, parsed.media_type) == ("Las capibaras", "es", PDF)
    assert parsed.updated == datetime(2024, 2, 3, 4, 5, 6, tzinfo=UTC)


def test_a_pdf_that_only_forbids_changes_is_read() -> None:
    assert parse(pdf([["Hola a todo el mundo"]], password=""), "a.pdf").text.strip() == "Hola a todo el mundo"


def test_a_docx_is_read_in_its_order() -> None:
    parsed = parse(word(title="Capibaras"), "a.docx")
    assert shown(parsed) == [
        ("heading", "La capibara"),
        ("paragraph", "El roedor más grande del mundo vive en América del Sur."),
        ("heading", "Comida"),
        ("list", "- hierba\n- corteza"),
        ("table", "Año | Peso\n2023 | 50 kg"),
    ]
    assert [heading.level for heading in parsed.headings] == [1, 2]
    assert (parsed.title, parsed.language, parsed.media_type) == ("Capibaras", "es", DOCX)
    assert parsed.updated == datetime(2024, 5, 6, tzinfo=UTC)
