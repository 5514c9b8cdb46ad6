"""The router on a real broker: what it says, where it sends, and how it refuses."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from structlog.testing import capture_logs

from capibara_flow import wiring
from capibara_flow.domain.routing import Understood
from capibara_flow.domain.turns import bucket, turn_id
from capibara_flow.runtime import brokers
from capibara_flow.runtime.client import flushed
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import WorkerSettings
from tests.conftest import settings_for
from tests.fakes import FakeAnswers
from tests.waiting import until
from topics.chat import CallExpert, ChatRequest, Decision, PreviewRoute, RouteTurn, TurnFailed, TurnRouted
from topics.grounding import RetrieveSources
from topics.output import Failed, Routed, parse
from topics.streams import router_consumer
from workers import router

TURN = turn_id(milliseconds=1, entropy=bytes(10), tenant="t")
FLEET = """
[[experts]]
name = "phi.mini"
urls = ["http://127.0.0.1:9"]
[[experts]]
name = "painter"
urls = ["http://127.0.0.1:9"]
modalities = ["text", "image"]
[[rules]]
route = "art"
expert = "painter"
patterns = ["paint"]
[policy]
math = ["painter", "phi.mini"]
"""


@dataclass
class Stand:
    """A router at work, the answers it opened, and everything that was published."""

    client: Client
    answers: FakeAnswers
    heard: list[Msg] = field(default_factory=list)
    understood: list[str] = field(default_factory=list)

    async def ask(self, text: str, model: str | None = None, **headers: str) -> None:
        request = ChatRequest.model_validate({"messages": [{"role": "user", "content": text}], "model": model})
        await self.send(RouteTurn(turn=TURN, request=request).model_dump_json().encode(), **headers)

    async def send(self, body: bytes, **headers: str) -> None:
        await self.client.jetstream().publish(f"cf.work.{TURN}.router", body, headers=headers or None)

    async def until(self, subject: str) -> Msg:
        """The first message on *subject*."""
        return (await until(lambda: self.on(subject)))[0]

    def on(self, subject: str) -> list[Msg]:
        """Every message on *subject* so far."""
        return [each for each in self.heard if each.subject == subject]


@pytest.fixture
async def stand(broker: EmbeddedBroker, tmp_path: Path) -> AsyncIterator[Stand]:
    file = tmp_path / "fleet.toml"
    file.write_text(FLEET, encoding="utf-8")
    settings = settings_for(broker, file, worker=WorkerSettings(retry_seconds=0.01))
    await wiring.apply_streams(settings)
    async with AsyncExitStack() as stack:
        observer = await stack.enter_async_context(wiring.connected(settings, "observer"))
        stand = Stand(await stack.enter_async_context(wiring.connected(settings, "edge")), FakeAnswers())

        async def hear(message: Msg) -> None:
            stand.heard.append(message)

        await observer.subscribe("cf.>", cb=hear)
        await flushed(observer)
        nats = brokers.broker(settings, "router")
        await nats.connect()

        async def understand(request: ChatRequest) -> Understood:
            stand.understood.append(request.question)
            route = "math" if "cuánto" in request.question else "default"
            return Understood(route, "simple", 0.9, "it has numbers")

        needs = {"answers": stand.answers, "consumer": router_consumer(), "understand": understand, "clock": lambda: 7.0}
        needs |= {"has_documents": lambda tenant: tenant == "library"}
        await router.build(nats, fleet=lambda: settings.experts, **needs).start()
        stack.push_async_callback(nats.stop)
        yield stand


async def test_who_has_documents_is_answered_from_them(stand: Stand) -> None:
    await stand.ask("Where do capybaras live?", **{"Cf-Tenant": "library"})
    sent = RetrieveSources.read((await stand.until(f"cf.work.{TURN}.retriever")).data)
    assert sent.call.request.question == "Where do capybaras live?"
    assert not stand.on(f"cf.work.{TURN}.call.phi-mini.{bucket('library')}")


async def test_who_only_greets_is_not_answered_from_documents(stand: Stand) -> None:
    await stand.ask("¡Hola, buenos días!", **{"Cf-Tenant": "library"})
    fact = TurnRouted.read((await stand.until(f"cf.log.{TURN}.router")).data)
    assert [step.stage for step in fact.plan.steps] == ["caller"]
    assert not stand.on(f"cf.work.{TURN}.retriever")


async def test_a_turn_is_routed_told_and_sent_on(stand: Stand) -> None:
    await stand.ask("paint a capybara", **{"Cf-Tenant": "acme", "Cf-Principal": "ann", "traceparent": "00-1-2-03"})
    sent = await stand.until(f"cf.work.{TURN}.call.painter.{bucket('acme')}")
    command = CallExpert.read(sent.data)
    assert command.request.model == "painter"
    assert command.request.question == "paint a capybara"
    assert (command.branch, command.plan.steps) == ("main", ())
    headers = sent.headers or {}
    assert {name: headers[name] for name in ("Cf-Tenant", "Cf-Principal", "traceparent")} == {
        "Cf-Tenant": "acme",
        "Cf-Principal": "ann",
        "traceparent": "00-1-2-03",
    }
    routed = parse((await stand.until(f"cf.out.{TURN}.data.main")).data)
    assert isinstance(routed, Routed)
    assert (routed.model_id, routed.route_name, routed.plan) == ("painter", "art", ("caller",))
    fact = TurnRouted.read((await stand.until(f"cf.log.{TURN}.router")).data)
    assert (fact.decision.model_id, fact.started, fact.ended) == ("painter", 7.0, 7.0)


async def test_a_name_with_dots_becomes_a_token_in_the_subject_only(stand: Stand) -> None:
    await stand.ask("hello", "phi.mini")
    command = CallExpert.read((await stand.until(f"cf.work.{TURN}.call.phi_mini.{bucket('')}")).data)
    assert (command.expert, command.request.model) == ("phi_mini", "phi.mini")


async def test_routing_the_same_turn_twice_calls_once(stand: Stand) -> None:
    await stand.ask("hello")
    await stand.ask("hello")
    await until(lambda: len(stand.on(f"cf.log.{TURN}.router")) == 2)
    assert len(stand.on(f"cf.live.{TURN}.main")) == 1


async def test_a_name_that_nobody_bears_ends_the_turn(stand: Stand) -> None:
    await stand.ask("hello", "nobody")
    dead = TurnFailed.read((await stand.until(f"cf.dead.{TURN}.router")).data)
    assert (dead.stage, dead.title) == ("router", "unknown expert")
    failed = stand.answers.outputs[-1]
    assert isinstance(failed, Failed)
    assert failed.status == 404
    assert "phi.mini, painter" in failed.detail


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"turn":"x"}', b"\xff", b"null"])
async def test_what_cannot_be_understood_is_given_up_at_once(stand: Stand, body: bytes) -> None:
    await stand.send(body)
    await stand.until(f"cf.dead.{TURN}.router")
    failed = stand.answers.outputs[-1]
    assert isinstance(failed, Failed)
    assert failed.status == 400


# --- what a question is about -------------------------------------------------------------------------------------------


async def test_what_was_understood_decides_where_no_name_and_no_rule_does(stand: Stand) -> None:
    await stand.ask("¿cuánto es dos más dos?")
    command = CallExpert.read((await stand.until(f"cf.work.{TURN}.call.painter.{bucket('')}")).data)
    assert (command.request.model, command.alternatives) == ("painter", ("phi.mini",))
    routed = parse((await stand.until(f"cf.out.{TURN}.data.main")).data)
    assert isinstance(routed, Routed)
    assert (routed.route_name, routed.complexity, routed.confidence, routed.reasoning) == ("math", "simple", 0.9, "it has numbers")


async def preview(stand: Stand, text: str, model: str | None = None) -> Decision:
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": text}], "model": model})
    asked = PreviewRoute(turn=TURN, request=request)
    return Decision.model_validate_json((await stand.client.request(asked.subject, asked.model_dump_json().encode(), timeout=10)).data)


async def test_a_preview_tells_the_decision_and_does_nothing(stand: Stand) -> None:
    assert (await preview(stand, "¿cuánto es?")).route_name == "math"
    assert (await preview(stand, "paint")).route_name == "art"
    assert (await preview(stand, "paint", "phi.mini")).model_id == "phi.mini"
    assert {each.subject for each in stand.heard} == {f"cf.ctl.{TURN}.route"}


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b'{"turn": "T"}', b"\xff"])
async def test_a_preview_that_cannot_be_read_harms_nobody(stand: Stand, body: bytes) -> None:
    with capture_logs() as said:
        await stand.client.publish(f"cf.ctl.{TURN}.route", body, reply=stand.client.new_inbox())
        await until(lambda: said)
    assert [(each["event"], each["request"]) for each in said] == [("request_not_understood", "PreviewRoute")]
    assert (await preview(stand, "paint")).route_name == "art"


async def test_names_and_rules_need_no_understanding(stand: Stand) -> None:
    await preview(stand, "paint")
    await preview(stand, "hello", "phi.mini")
    assert stand.understood == []
    await preview(stand, "hello")
    assert stand.understood == ["hello"]
