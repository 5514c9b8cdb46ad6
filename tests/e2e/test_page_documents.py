"""Sources, citations and the panel of documents in a real browser."""

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.async_api import BrowserContext, Page, expect

from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import EdgeSettings, Settings
from tests.conftest import Installation, settings_for
from tests.e2e.test_page import ask, until
from tests.edge.knowing import source
from tests.edge.serving import DONE, ROUTED, USAGE, T, served
from tests.fakes import FakeTurns
from tests.knowledge import Library, knowing
from tests.waiting import until as seen
from topics.output import Cited, Output, SourcesFound, SourceShown, Token

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="window.pwned=1"><script>window.pwned=2</script>'
SOURCES = (
    SourceShown.of(source(1)),
    SourceShown.of(source(2, address="docs/leave.md", text=f"{HOSTILE} [1]")),
    SourceShown.of(source(3, address="javascript:window.pwned=3", title=HOSTILE)),
    SourceShown.of(source(4, address="data:text/html,x", title="")),
)
WORDS = "Treinta días [1][2], salvo los martes [3, 9] (véase [ 1-3 ]). Código: `a[1]` y [enlace [1]](https://h/x)."


def grounded(problem: str | None = None) -> list[tuple[Output, ...]]:
    found = SourcesFound(turn=T, sources=SOURCES, problem=problem)
    return [(ROUTED,), (found,), (Token(turn=T, text=WORDS),), (Cited(turn=T, cited=(1, 2, 3), unknown=(9,)), USAGE, DONE)]


async def test_sources_are_shown_numbered_and_citations_lead_to_them(page: Page) -> None:
    async with served(FakeTurns(*grounded("el grafo no responde"))) as (host, port):
        await page.goto(f"http://{host}:{port}")
        answer = await ask(page, "¿vacaciones?")
        await until(answer, "done")
        sources = answer.locator(".source")
        await expect(sources).to_have_count(4)
        await expect(answer.locator(".sources > summary")).to_have_text("4 fuentes · 3 citadas")
        await expect(answer.locator(".lacking")).to_contain_text("Faltan fuentes: el grafo no responde.")
        await expect(answer.locator(".lacking")).to_contain_text("no son de ninguna fuente: 9")
        await expect(sources.first.get_by_role("link")).to_have_attribute("href", "https://h/1")
        await expect(sources.first.locator("time")).to_have_text("2023-11-14")
        assert [await sources.nth(n).get_attribute("data-cited") for n in range(4)] == ["true", "true", "true", "false"]

        cites = answer.locator(".text a.cite")
        await expect(cites).to_have_text(["1", "2", "3", "1", "3"])
        await expect(answer.locator(".text .unknown")).to_have_text("9")
        await expect(answer.locator(".text code")).to_have_text("a[1]")
        await expect(sources.nth(1).locator("blockquote")).to_be_hidden()
        await cites.nth(1).click()
        await expect(sources.nth(1).locator("blockquote")).to_be_visible()
        await expect(sources.nth(1)).to_be_focused()
        assert urlsplit(page.url).fragment == ""

        await page.get_by_role("button", name="English").click()
        await expect(answer.locator(".sources > summary")).to_have_text("4 sources · 3 cited")
        await expect(answer.locator(".text a.cite")).to_have_count(5)
        await page.reload()
        await expect(page.locator(".source")).to_have_count(4)


async def test_an_answer_without_sources_has_no_citations(page: Page) -> None:
    async with served(FakeTurns((ROUTED,), (Token(turn=T, text="Un array: a [1] y [2]."),), (USAGE, DONE))) as (host, port):
        await page.goto(f"http://{host}:{port}")
        answer = await ask(page, "hola")
        await until(answer, "done")
        await expect(answer.locator(".sources")).to_be_hidden()
        await expect(answer.locator(".cite")).to_have_count(0)


async def test_hostile_documents_do_nothing(context: BrowserContext) -> None:
    """Even without the content security policy."""
    assert context.browser is not None
    page = await (await context.browser.new_context(bypass_csp=True, locale="es-ES")).new_page()
    async with served(FakeTurns(*grounded())) as (host, port):
        await page.goto(f"http://{host}:{port}")
        answer = await ask(page, "hola")
        await until(answer, "done")
        await expect(answer.locator(".source")).to_have_count(4)
        await expect(answer.locator(".source").nth(2)).to_contain_text("<script>")
        assert await answer.locator(".sources").locator("img, script, iframe").count() == 0
        links = await answer.locator(".sources a").evaluate_all("links => links.map((link) => link.protocol)")
        assert links == ["https:"]
        assert await page.evaluate("window.pwned") is None


async def test_whether_an_answer_is_grounded_is_the_person_s_choice_also_where_no_retriever_is(page: Page) -> None:
    bodies: list[dict] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.url.endswith("/api/chat") else None)
    async with served(FakeTurns((ROUTED,), (USAGE, DONE))) as (host, port):
        await page.goto(f"http://{host}:{port}")
        for choice in ("auto", "always", "never"):
            await page.get_by_label("Fuentes").select_option(choice)
            await until(await ask(page, choice), "done")
        await page.get_by_role("button", name="Documentos").click()
        await expect(page.locator("#trouble")).to_contain_text("start a retriever")
    assert [body.get("grounded") for body in bodies] == [None, True, False]
    assert all("collection" not in body for body in bodies)


# --- the panel, in front of a whole installation with stand-ins for the engines ---------------------------------------------


@pytest.fixture
def settings(broker: EmbeddedBroker, fleet_file: Path) -> Settings:
    return settings_for(broker, fleet_file, edge=EdgeSettings(document_bytes=100_000))


@pytest.fixture
async def library(installation: Installation) -> AsyncIterator[Library]:
    async with knowing(installation.settings) as library:
        yield library


def a_file(name: str, content: bytes) -> dict:
    return {"name": name, "mimeType": "text/plain", "buffer": content}


async def test_documents_are_brought_searched_and_removed(page: Page, door: str, library: Library) -> None:
    await page.goto(door)
    await page.get_by_role("button", name="Documentos").click()
    panel = page.get_by_role("dialog")
    await expect(panel.locator("#count")).to_have_text("0 documentos")
    files = [
        a_file("vacaciones.md", b"hay treinta dias de vacaciones"),
        a_file(f"{HOSTILE[:20]}.txt", HOSTILE.encode()),
        a_file("roto.bin", b"\0\0"),
        a_file("grande.txt", b"x" * 200_000),
        a_file("vacio.txt", b""),
    ]
    await panel.locator("#files").set_input_files(files)
    rows = panel.locator("#uploads li")
    await expect(rows).to_have_count(5)
    await expect(rows.filter(has_text="vacaciones.md")).to_contain_text("añadido · 1 pasaje")
    await expect(rows.filter(has_text="roto.bin")).to_contain_text("este archivo no se puede leer: roto.bin: it is neither text")
    await expect(rows.filter(has_text="grande.txt")).to_contain_text("el archivo es demasiado grande")
    await expect(rows.filter(has_text="vacio.txt")).to_contain_text("este archivo no se puede leer: vacio.txt: the document is empty")
    await expect(panel.locator("#shelf li")).to_have_count(2)
    await expect(panel.locator("#count")).to_have_text("2 documentos")

    await panel.locator("#files").set_input_files([files[0]])
    await expect(rows.first).to_contain_text("ya estaba, sin cambios")

    await panel.get_by_role("searchbox").fill("cuantos dias de vacaciones")
    await panel.get_by_role("searchbox").press("Enter")
    await expect(panel.locator("#found .source")).to_have_count(1)
    await panel.get_by_text("El pasaje").click()
    await expect(panel.locator("#found blockquote")).to_have_text("hay treinta dias de vacaciones")
    await expect(panel.locator("#foundSay")).to_be_empty()
    library.related = False
    await panel.get_by_role("searchbox").press("Enter")
    await expect(panel.locator("#foundSay")).to_contain_text("Nada de esto se relaciona lo bastante")
    await expect(panel.locator("#found .source")).to_have_count(1)

    line = panel.locator("#shelf li").filter(has_text="vacaciones.md")
    await line.get_by_role("button").click()
    await line.get_by_role("button").click()
    await expect(panel.locator("#shelf li")).to_have_count(1)
    assert len(library.kept) == 1
    await panel.get_by_role("button", name="Cerrar").click()
    await expect(panel).to_be_hidden()
    assert await page.evaluate("window.pwned") is None


async def test_files_can_be_dropped_and_land_in_the_collection(page: Page, door: str, library: Library) -> None:
    await page.set_viewport_size({"width": 390, "height": 780})
    await page.goto(door)
    await page.get_by_role("button", name="Documentos").click()
    await page.get_by_label("Colección").fill("leyes")
    transfer = await page.evaluate_handle(
        "() => { const data = new DataTransfer(); data.items.add(new File(['hola'], 'hola.txt', {type: 'text/plain'})); return data; }"
    )
    await page.locator("#library").dispatch_event("drop", {"dataTransfer": transfer})
    await expect(page.locator("#uploads li")).to_contain_text("añadido")
    assert await seen(lambda: [scope.collection for scope, _ in library.uploads]) == ["leyes"]
    assert await page.evaluate("document.documentElement.scrollWidth") == 390
