"""The chat page in a real browser, in front of a whole installation whose engine recites ``page_answers.toml``."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.async_api import BrowserContext, Locator, Page, expect

from capibara_flow.engines import scripted
from capibara_flow.engines.script import load_script
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import Settings, WorkerSettings
from tests.conftest import settings_for
from tests.e2e.wire import Wire
from tests.edge.serving import ROUTED, T, served
from tests.fakes import FakeTurns
from tests.waiting import until as seen
from topics.output import Continued, Loading, Output, Token, Waiting

pytestmark = pytest.mark.browser

COUNTED = " ".join(map(str, range(1, 31)))


@pytest.fixture
async def engine() -> AsyncIterator[str]:
    """An engine that recites what these tests need."""
    runner, url = await scripted.serve(load_script(Path(__file__).with_name("page_answers.toml")))
    yield url
    await runner.cleanup()


@pytest.fixture
def fleet_file(engine: str, tmp_path: Path) -> Path:
    """Two experts; the page believes that one of them is no script."""
    file = tmp_path / "fleet.toml"
    experts = (("eco", "true"), ("phi4_fast", "false"))
    rule = '[[rules]]\nroute = "broken"\nexpert = "phi4_fast"\npatterns = ["falla"]\n'  # who cannot go on from the very words
    file.write_text("".join(f'[[experts]]\nname = "{name}"\nurls = ["{engine}"]\nscripted = {said}\n' for name, said in experts) + rule)
    return file


@pytest.fixture
def settings(broker: EmbeddedBroker, fleet_file: Path) -> Settings:
    """Workers try again soon, and not often."""
    return settings_for(broker, fleet_file, worker=WorkerSettings(retry_seconds=0.05, patience_seconds=0, max_deliver=2))


@pytest.fixture
async def page_url(door: str) -> str:
    """The base URL of an edge in front of a whole installation."""
    return door


@pytest.fixture
async def wire(page_url: str) -> Wire:
    return Wire(page_url)


@pytest.fixture
async def wire_url(wire: Wire) -> AsyncIterator[str]:
    async with wire.open() as url:
        yield url


@pytest.fixture
def asked(page: Page) -> list[dict]:
    """The bodies of all questions that the page has sent."""
    bodies: list[dict] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    return bodies


async def ask(page: Page, question: str) -> Locator:
    """Ask, and return the answer's element."""
    await page.get_by_role("textbox").fill(question)
    await page.keyboard.press("Enter")
    return page.get_by_role("article").last


async def until(answer: Locator, status: str) -> None:
    await expect(answer).to_have_attribute("data-status", status)


async def words(answer: Locator) -> str:
    return " ".join((await answer.locator(".text").inner_text()).split())


async def test_streams_and_shows_model_route_times_and_tokens(page: Page, page_url: str) -> None:
    await page.goto(page_url)
    answer = await ask(page, "cuenta hasta 30")
    await until(answer, "streaming")
    await expect(answer.locator(".text")).to_contain_text("3 ")
    assert await answer.get_attribute("aria-busy") == "true"
    await until(answer, "done")
    assert await words(answer) == COUNTED
    await expect(answer.locator(".model")).to_have_text("eco")
    await expect(answer.locator(".scripted")).to_have_text("guion")
    await expect(answer.locator(".route")).to_have_text(re.compile(r"ruta \S+"))
    await expect(answer.locator(".first")).to_have_text(re.compile(r"primer token [\d,.]+ (ms|s)"))
    await expect(answer.locator(".total")).to_have_text(re.compile(r"total [\d,.]+ (ms|s)"))
    await expect(answer.locator(".tokens")).to_have_text("30 tokens")
    await expect(answer.locator(".finish")).to_have_text("completa")
    await expect(page.get_by_role("status")).to_have_text("Respuesta completa")


async def test_markdown_is_rendered_the_same_while_streaming_and_at_the_end(page: Page, page_url: str) -> None:
    await page.goto(page_url)
    answer = await ask(page, "markdown")
    await until(answer, "done")
    await expect(answer.locator("h2")).to_have_count(1)
    await expect(answer.locator("ol > li")).to_have_count(3)
    await expect(answer.locator("td[align=right]")).to_have_count(2)
    await expect(answer.locator("pre code.language-python")).to_contain_text("def saluda")
    same = """async () => {
        const { GrowingMarkdown, render } = await import("/page/markdown.js");
        const source = JSON.parse(sessionStorage.getItem("capibara.conversation")).turns[0].state.text;
        const [grown, whole] = [document.createElement("div"), document.createElement("div")];
        const growing = new GrowingMarkdown(grown);
        for (const letter of source) growing.append(letter);
        whole.append(render(source));
        return [grown, whole].map((box) => box.innerHTML.replace(/\\s+/g, " ").replace(/> </g, "><").trim());
    }"""
    grown, whole = await page.evaluate(same)
    assert grown == whole
    assert "<table>" in whole


async def test_stop(page: Page, page_url: str) -> None:
    await page.goto(page_url)
    answer = await ask(page, "cuenta hasta 500")
    await expect(answer.locator(".text")).to_contain_text("4 ")
    async with page.expect_response(lambda response: response.request.method == "DELETE") as deleted:
        await page.get_by_role("button", name="Detener").click()
    assert (await deleted.value).ok
    await until(answer, "stopped")
    await expect(answer.locator(".tokens")).to_be_visible()  # the edge itself said the end, and what it took
    await expect(answer.locator(".finish")).to_have_text("detenida")
    assert "500" not in await words(answer)
    again = await ask(page, "¿y ahora?")
    await until(again, "done")


@pytest.mark.parametrize(
    ("language", "held", "said"),
    [
        ("es", Waiting(turn=T, stage="caller", title="engine busy", reason="phi says 503", attempt=2), "Esperando: el modelo está ocupado"),
        ("en", Waiting(turn=T, stage="caller", title="engine busy", reason="phi says 503", attempt=2), "Waiting: the model is busy"),
        ("es", Waiting(turn=T, stage="caller", reason="the cat sits on it", attempt=2), "Esperando: the cat sits on it"),
        ("es", Loading(turn=T, expert="aya", eta_s=20), "Cargando aya, quedan unos 20 s…"),
        ("en", Loading(turn=T, expert="aya"), "Loading aya…"),
    ],
)
async def test_why_nothing_goes_on_is_told_until_words_come(page: Page, language: str, held: Output, said: str) -> None:
    going_on = (Continued(turn=T, how="skip", expert="plain", attempt=3), Token(turn=T, text="words"))
    for script, phase in (([(ROUTED,), (held,)], said), ([(ROUTED,), (held,), going_on], None)):
        async with served(FakeTurns(*script)) as (host, port):
            await page.goto(f"http://{host}:{port}")
            await page.evaluate(f"localStorage.setItem('capibara.language', '{language}')")
            await page.reload()
            answer = await ask(page, "hola")
            if phase:
                await expect(answer.locator(".phase")).to_have_text(phase)
                await expect(answer.locator(".waiting")).to_be_visible()
            else:
                await expect(answer.locator(".text")).to_contain_text("words")
                await expect(answer.locator(".waiting")).to_be_hidden()
                assert await answer.get_attribute("data-status") == "streaming"


async def test_reload_in_mid_answer_goes_on(page: Page, page_url: str) -> None:
    await page.goto(page_url)
    answer = await ask(page, "cuenta hasta 30")
    await expect(answer.locator(".text")).to_contain_text("7 ")
    await page.reload()
    answer = page.get_by_role("article")
    await until(answer, "streaming")
    await until(answer, "done")
    assert await words(answer) == COUNTED
    await expect(answer.locator(".first")).to_be_visible()
    await page.reload()
    await until(answer, "done")
    assert await words(answer) == COUNTED


#: A token's event that is no batch's last (its id says so), one that is, and half of one; each with the number that it says.
PLACES = {
    "inside a batch": rb'id: \d+-\d+\nevent: token\ndata: [^\n]*"text":"(\d\d) "[^\n]*\n\n',
    "after a batch": rb'id: \d+\nevent: token\ndata: [^\n]*"text":"(\d\d) "[^\n]*\n\n',
    "inside an event": rb'event: token\ndata: [^\n]*"text":"(\d\d)',
}


@pytest.mark.parametrize("place", PLACES)
async def test_cut_in_mid_answer_resumes(page: Page, wire: Wire, wire_url: str, place: str) -> None:
    """Nothing is shown twice, and nothing is missing, wherever the cut is."""
    wire.hold_after(PLACES[place])
    await page.goto(wire_url)
    answer = await ask(page, "cuenta a golpes hasta 60")
    held = await seen(lambda: wire.held)
    shown = int(held[1]) - (place == "inside an event")
    await expect(answer.locator(".text")).to_have_text(re.compile(rf"\b{shown}\s*$"))
    wire.cut()
    await until(answer, "done")
    assert wire.cuts == 1
    assert await words(answer) == " ".join(map(str, range(1, 61)))


async def test_error_in_mid_answer_is_never_shown_as_a_finished_answer(page: Page, page_url: str, asked: list[dict]) -> None:
    await page.goto(page_url)
    answer = await ask(page, "falla")
    await until(answer, "failed")
    await expect(answer.get_by_role("alert")).to_contain_text("La respuesta se interrumpió")
    await expect(answer.get_by_role("alert")).to_contain_text("502")
    await expect(answer.locator(".finish")).to_have_text("incompleta")
    await expect(page.get_by_text("completa", exact=True)).to_have_count(0)
    await until(await ask(page, "hola"), "done")
    assert [message["content"] for message in asked[-1]["messages"]] == ["hola"]


async def test_refusal_is_shown_and_can_be_tried_again(page: Page, page_url: str) -> None:
    refusal = {"type": "about:blank", "title": "queue full", "status": 503, "detail": "1000 turns are waiting"}
    await page.route("**/api/chat", lambda route: route.fulfill(status=503, content_type="application/problem+json", json=refusal))
    await page.goto(page_url)
    answer = await ask(page, "hola")
    await until(answer, "failed")
    await expect(answer.get_by_role("alert")).to_contain_text("hay demasiadas preguntas en espera (503): 1000 turns are waiting")
    await page.unroute("**/api/chat")
    await answer.get_by_role("button", name="Preguntar otra vez").click()
    await until(page.get_by_role("article"), "done")
    await expect(page.get_by_role("article")).to_have_count(1)


async def test_connection_lost_for_good_is_an_error_and_can_be_taken_up_again(page: Page, wire: Wire, wire_url: str) -> None:
    await page.clock.install()
    await page.goto(wire_url)
    answer = await ask(page, "cuenta hasta 30")
    await expect(answer.locator(".text")).to_contain_text("5 ")
    wire.broken = True
    wire.cut()
    await expect(answer.locator(".phase")).to_contain_text("Reconectando")
    alert = answer.get_by_role("alert")
    while not await alert.is_visible():
        await page.clock.run_for(3000)
    await until(answer, "failed")
    await expect(alert).to_contain_text("Se perdió la conexión")
    await expect(answer.locator(".finish")).to_have_text("incompleta")
    wire.broken = False
    await alert.get_by_role("button", name="Reconectar").click()
    await until(answer, "done")
    assert await words(answer) == COUNTED


@pytest.mark.parametrize("bypass_csp", [False, True])
async def test_hostile_answer_does_nothing(context: BrowserContext, page_url: str, bypass_csp: bool) -> None:
    """Neither with the content security policy nor with the sanitizer alone, and no other host hears of it."""
    assert context.browser is not None
    page = await (await context.browser.new_context(bypass_csp=bypass_csp)).new_page()
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    await page.goto(page_url)
    answer = await ask(page, "xss")
    await until(answer, "done")
    await expect(answer.locator(".text")).to_contain_text("Fin del ataque")
    assert await page.evaluate("window.pwned") is None
    harm = """box => [...box.querySelectorAll("*")].filter(node =>
        ["SCRIPT", "IMG", "SVG", "IFRAME", "STYLE", "FORM", "LINK", "BASE", "VIDEO", "INPUT", "BUTTON"].includes(node.tagName.toUpperCase())
        || /^\\s*javascript:/i.test(node.getAttribute("href") ?? "")
        || node.getAttributeNames().some(name => name.startsWith("on") || name === "style")
        || node.classList.contains("problem")).map(node => node.outerHTML)"""
    assert await answer.locator(".text").evaluate(harm) == []
    await expect(answer.get_by_role("link", name="una foto")).to_have_attribute("href", "http://elsewhere.test/markdown.png")
    assert hosts == {urlsplit(page_url).netloc}


async def test_language_switch(page: Page, page_url: str) -> None:
    await page.goto(page_url)
    await expect(page.locator("html")).to_have_attribute("lang", "es")
    answer = await ask(page, "hola")
    await expect(answer.locator(".finish")).to_have_text("completa")
    await page.get_by_role("button", name="English").click()
    await expect(page.locator("html")).to_have_attribute("lang", "en")
    await expect(answer.locator(".finish")).to_have_text("complete")
    await expect(page.get_by_role("button", name="New conversation")).to_be_visible()
    await page.reload()
    await expect(page.get_by_role("textbox", name="Your question")).to_be_visible()


async def test_conversation_travels_and_a_new_one_forgets(page: Page, page_url: str, asked: list[dict]) -> None:
    await page.goto(page_url)
    await page.get_by_label("Modelo").select_option("phi4_fast")
    await until(await ask(page, "cuenta hasta 2"), "done")
    await until(await ask(page, "dos"), "done")
    said = [(message["role"], message["content"].strip()) for message in asked[-1]["messages"]]
    assert said == [("user", "cuenta hasta 2"), ("assistant", "1 2"), ("user", "dos")]
    assert asked[-1]["model"] == "phi4_fast"
    await expect(page.get_by_role("article").last.locator(".scripted")).to_have_count(0)
    await page.get_by_role("button", name="Nueva conversación").click()
    await expect(page.get_by_role("article")).to_have_count(0)
    await until(await ask(page, "tres"), "done")
    assert [message["content"] for message in asked[-1]["messages"]] == ["tres"]


async def test_enter_sends_and_shift_enter_breaks_the_line(page: Page, page_url: str, asked: list[dict]) -> None:
    await page.goto(page_url)
    box = page.get_by_role("textbox")
    await box.fill("uno")
    await box.press("Shift+Enter")
    await page.keyboard.type("dos")
    assert asked == []
    await page.keyboard.press("Enter")
    await until(page.get_by_role("article"), "done")
    assert asked[0]["messages"][0]["content"] == "uno\ndos"


async def test_reasoning_is_folded_away(page: Page, page_url: str) -> None:
    await page.goto(page_url)
    answer = await ask(page, "piensa")
    await until(answer, "done")
    assert await words(answer) == "La respuesta es 42."
    thought = answer.get_by_text("Primero pienso un poco.")
    await expect(thought).to_be_hidden()
    await answer.get_by_text("Razonamiento").click()
    await expect(thought).to_be_visible()


async def test_reset_unknown_events_and_tools(page: Page, page_url: str) -> None:
    """What an engine rarely does, from a stream that is written here: also with other line ends, and comments."""
    events = [
        ("turn", {"turn": "T1", "created": 0}),
        ("token", {"text": "equivocado"}),
        ("reset", {"reason": "the engine broke"}),
        ("horoscope", {"sign": "capybara"}),
        ("token", {"text": "ahora "}),
        ("tool", {"index": 0, "id": "a", "name": "hora", "arguments": '{"zona":'}),
        ("tool", {"index": 0, "arguments": ' "UTC"}'}),
        ("token", {"text": "sí."}),
        ("done", {"finish_reason": "length", "model_id": "eco", "timings": {}}),
    ]
    body = ": hola\r\n\r\n" + "".join(f"event:{name}\r\ndata: {json.dumps(data)}\r\n\r\n" for name, data in events)
    headers = {"Content-Type": "text/event-stream", "X-Capibara-Turn": "T1"}
    await page.route("**/api/chat", lambda route: route.fulfill(headers=headers, body=body))
    await page.goto(page_url)
    answer = await ask(page, "hola")
    await until(answer, "done")
    assert await words(answer) == "ahora sí."
    await answer.get_by_text("Herramienta hora").click()
    await expect(answer.get_by_text('{"zona": "UTC"}')).to_be_visible()
    await expect(answer.locator(".finish")).to_have_text("cortada: límite de longitud")


async def test_fits_a_phone(page: Page, page_url: str) -> None:
    await page.set_viewport_size({"width": 390, "height": 780})
    await page.goto(page_url)
    await until(await ask(page, "markdown"), "done")
    assert await page.evaluate("document.documentElement.scrollWidth") == 390
    assert await page.locator("main").evaluate("main => main.scrollWidth - main.clientWidth") == 0
    await expect(page.get_by_role("button", name="Enviar")).to_be_in_viewport()
