"""Which expert answers: the one that was named, else by the first rule that matches, else by what the question is about and how hard.

Nobody is asked too much: images and tools go to experts only that take them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from capibara_flow.domain.fleet import AUTO, Choice, Expert, Fleet, Rule
from capibara_flow.errors import BadRequest, UnknownExpert
from topics.chat import ChatRequest, Complexity, Decision
from topics.plan import Plan, Step

#: The route of what belongs to no other one, and its row of a fleet's policy.
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Understood:
    """What a question is about (*route*, perhaps ``default``), how much it asks for, how sure that is (0 to 1), and why."""

    route: str
    complexity: Complexity
    confidence: float
    reasoning: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """Who answers, and the names of those who take over, in order, should he be out of reach."""

    decision: Decision
    alternatives: tuple[str, ...] = ()

    def plan(self, *, grounded: bool = False) -> Plan:
        """The stages that the decision leads to; a *grounded* answer rests on sources, which are looked for first."""
        before = (Step(stage="retriever"),) if grounded else ()
        return Plan(steps=(*before, Step(stage="caller", expert=self.decision.model_id)))


def wants(request: ChatRequest, fleet: Fleet) -> Expert | None:
    """The expert that *request* names, or none when the router may choose; raises ``UnknownExpert``."""
    if request.model is None or request.model.lower() in AUTO:
        return None
    if expert := fleet.find(request.model):
        return expert
    names = ", ".join(expert.name for expert in fleet.active)
    raise UnknownExpert(f"no expert is called {request.model!r}; there are: auto, {names}")


def lacks(request: ChatRequest, expert: Expert) -> tuple[str, ...]:
    """What the request carries and *expert* cannot take: ``images``, ``tools``."""
    able = {"images": "image" in expert.modalities, "tools": expert.tools}
    return tuple(each for each in _carried(request) if not able[each])


def candidates(request: ChatRequest, fleet: Fleet) -> tuple[Expert, ...]:
    """Who can answer: the expert that is named, or else the default and all others that take what it carries, the dearest first.

    Raises ``UnknownExpert``, or ``BadRequest`` that tells whom it asked too much of, and what.
    """
    if named := wants(request, fleet):
        if lacking := lacks(request, named):
            raise BadRequest(f"{named.name} does not take {' and '.join(lacking)}")
        return (named,)
    by_priority = sorted(fleet.active, key=lambda expert: -expert.priority)
    if found := tuple(each for each in (fleet.fallback, *by_priority) if not lacks(request, each)):
        return found
    raise BadRequest(f"no expert of this fleet takes {' and '.join(_carried(request))}")


def needs_reading(request: ChatRequest, fleet: Fleet) -> bool:
    """Whether what *request* is about can make a difference: it names nobody, no rule speaks for it, and there is a policy."""
    return bool(fleet.policy) and wants(request, fleet) is None and _rule(request, fleet, candidates(request, fleet)) is None


def choose(request: ChatRequest, fleet: Fleet, understood: Understood | None = None) -> Chosen:
    """Choose an expert, by what was *understood* of the question if anything was; raises what ``candidates`` raises."""
    able = candidates(request, fleet)
    if wants(request, fleet):
        return Chosen(_decision(able[0], "named", 1.0, f"the request names {able[0].name}"))
    if found := _rule(request, fleet, able):
        rule, expert = found
        decision = _decision(expert, rule.route, 0.8, f"a pattern of route {rule.route} matches")
        return Chosen(decision, _behind(expert, rule.then, fleet, able))
    if understood is None:
        return Chosen(_decision(able[0], DEFAULT, 0.5, "no rule matches"), _behind(able[0], fleet.then, fleet, able))
    return _by_policy(fleet, able, understood)


def _rule(request: ChatRequest, fleet: Fleet, able: Sequence[Expert]) -> tuple[Rule, Expert] | None:
    """The first rule that speaks for the question and names somebody who is *able*, and whom it names."""
    named = ((rule, fleet.find(rule.expert)) for rule in fleet.rules)
    return next(((rule, expert) for rule, expert in named if expert and expert in able and rule.matches(request.question)), None)


def _by_policy(fleet: Fleet, able: Sequence[Expert], understood: Understood) -> Chosen:
    row = fleet.policy.get(understood.route) or fleet.policy.get(DEFAULT)
    choice = row.at(understood.complexity) if row else Choice(experts=(fleet.fallback.name,))
    # Whoever is not able, or not active, is passed over.
    first = next((expert for expert in map(fleet.find, choice.experts) if expert and expert in able), able[0])
    reasoning = understood.reasoning
    if choice.vote:
        reasoning += f"; a consensus of {', '.join(choice.experts)} is wanted: without a voter, {first.name} answers"
    decision = Decision(
        model_id=first.name,
        route_name=understood.route,
        complexity=understood.complexity,
        confidence=round(understood.confidence, 4),
        reasoning=reasoning,
    )
    return Chosen(decision, _behind(first, (*choice.experts, *fleet.then), fleet, able))


def _behind(first: Expert, names: Sequence[str], fleet: Fleet, able: Sequence[Expert]) -> tuple[str, ...]:
    """The names of those of *names* that are *able*, behind *first*: as many as a command carries."""
    found = [expert.name for expert in map(fleet.find, names) if expert and expert in able and expert != first]
    return tuple(dict.fromkeys(found))[:16]


def _decision(expert: Expert, route: str, confidence: float, reasoning: str) -> Decision:
    return Decision(model_id=expert.name, route_name=route, complexity="moderate", confidence=confidence, reasoning=reasoning)


def _carried(request: ChatRequest) -> tuple[str, ...]:
    return tuple(name for name, there in (("images", request.has_image), ("tools", bool(request.tools))) if there)
