"""Turns as a broker would have kept them, told message by message."""

from dataclasses import dataclass, field

from capibara_flow.domain.record import Entry, Record
from topics.chat import CallExpert, CancelTurn, ChatMessage, ChatRequest, Decision, ExpertCalled, RouteTurn, TurnFailed, TurnRouted
from topics.knowledge import Source
from topics.message import PRINCIPAL, TENANT, Message
from topics.output import Done, Output, Routed, Token, Usage
from topics.plan import Plan, Step

TURN = "01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F"
BEGAN = 1_785_585_600.0  # long after the id was made, so that the id says nothing of the door
REQUEST = ChatRequest(messages=(ChatMessage(role="user", content="count to five"),))
PLAN = Plan(steps=(Step(stage="caller", expert="one"),))


@dataclass
class Kept:
    """A turn in the making: *at* is the broker's clock in seconds since it began, *skew* is by how much the workers' clocks are ahead."""

    turn: str = TURN
    tenant: str = "acme"
    skew: float = 0.0
    at: float = 0.0
    entries: list[Entry] = field(default_factory=list)

    def put(self, subject: str, data: bytes, stream: str = "CF_LOG") -> None:
        """Store *data* now."""
        headers = {TENANT: self.tenant, PRINCIPAL: "ana"}
        self.entries.append(Entry(stream, len(self.entries) + 1, BEGAN + self.at, subject.replace("{turn}", self.turn), headers, data))

    def log(self, message: Message, subject: str = "") -> None:
        """Let the log have *message*."""
        stream = "CF_DEAD" if isinstance(message, TurnFailed) else "CF_CTL" if isinstance(message, CancelTurn) else "CF_LOG"
        self.put(subject or message.subject, message.model_dump_json(exclude_none=True).encode(), stream)

    def wait(self, seconds: float) -> "Kept":
        """Let time pass."""
        self.at += seconds
        return self

    def asked(self, request: ChatRequest = REQUEST) -> "Kept":
        """The question."""
        self.log(RouteTurn(turn=self.turn, request=request), "cf.log.{turn}.asked.router")
        return self

    def routed(self, expert: str = "one", lasted: float = 0.0, **more: object) -> "Kept":
        """The router's decision, made in *lasted* seconds until now, and its call of *expert*."""
        known = {"route_name": "default", "complexity": "simple", "confidence": 0.5, "reasoning": "no rule matches"}
        decision = Decision.model_validate({**known, "model_id": expert, **more})
        now = BEGAN + self.at + self.skew
        self.say(Routed.of(self.turn, decision, PLAN))
        self.log(TurnRouted(turn=self.turn, decision=decision, plan=PLAN, started=now - lasted, ended=now))
        return self.called(expert)

    def called(self, expert: str = "one", passed: int = 0, request: ChatRequest = REQUEST, sources: tuple[Source, ...] = ()) -> "Kept":
        """A call of *expert*."""
        asked = request.model_copy(update={"model": expert})
        call = CallExpert(turn=self.turn, expert=expert, bucket=3, request=asked, passed=passed, sources=sources)
        self.log(call, f"cf.log.{{turn}}.asked.call.{expert}.3")
        return self

    def taken(self, process: str = "caller@a:1", claim: str | None = None, branch: str = "main") -> "Kept":
        """Somebody takes the branch."""
        self.put(f"cf.out.{{turn}}.lease.{branch}", f"{process} {claim or len(self.entries)}".encode(), "CF_OUT")
        return self

    def say(self, *outputs: Output) -> "Kept":
        """Output, as one batch."""
        lines = (output.model_copy(update={"turn": self.turn}).line() for output in outputs)
        self.put("cf.out.{turn}.data.main", b"\n".join(lines), "CF_OUT")
        return self

    def words(self, *texts: str) -> "Kept":
        """Some words of the answer."""
        return self.say(*(Token(turn=self.turn, text=text) for text in texts))

    def account(self, outcome: str = "stop", expert: str = "one", lasted: float = 0.1, **more: object) -> "Kept":
        """How an attempt ended that lasted until now."""
        now = BEGAN + self.at + self.skew
        known = {"attempt": 1, "branch": "main", "expert": expert, "outcome": outcome, "started": now - lasted, "ended": now}
        self.log(ExpertCalled.model_validate({**known, "turn": self.turn, **more}))
        return self

    def done(self, reason: str = "stop", expert: str = "one", tokens: int = 2) -> "Kept":
        """The end of the answer."""
        usage = Usage(turn=self.turn, prompt_tokens=3, completion_tokens=tokens, burnt_tokens=tokens)
        return self.say(usage, Done(turn=self.turn, finish_reason=reason, model_id=expert))

    @property
    def record(self) -> Record:
        """All of it."""
        return Record(self.turn, tuple(self.entries))

    def without(self, *streams: str) -> Record:
        """What is left when *streams* keep nothing."""
        return Record(self.turn, tuple(each for each in self.entries if each.stream not in streams))


def plain(kept: Kept | None = None, expert: str = "one", text: str = "one two") -> Kept:
    """A turn without any trouble: 1 s in all."""
    kept = (kept or Kept()).asked().wait(0.1).routed(expert, lasted=0.05).wait(0.1).taken()
    kept.wait(0.3).words(*text.split(" ")).wait(0.4).done(expert=expert)
    return kept.wait(0.1).account(expert=expert, lasted=0.8, first_token=BEGAN + kept.at + kept.skew - 0.5)


def passed_on(kept: Kept | None = None) -> Kept:
    """A turn whose first expert is out of reach."""
    kept = (kept or Kept()).asked().wait(0.1).routed("one").wait(0.1).taken()
    kept.wait(0.2).account("passed on: engine unreachable", lasted=0.2).called("two", passed=1).wait(0.3).taken("caller@b:2")
    return kept.wait(0.1).words("hello").wait(0.1).done(expert="two").account(expert="two", lasted=0.2, attempt=2)
