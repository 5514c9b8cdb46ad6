"""Which expert answers: the one that was named, else the first rule that matches, else the default; nobody is asked too much."""

from capibara_flow.domain.fleet import AUTO, Expert, Fleet
from capibara_flow.errors import BadRequest, UnknownExpert
from topics.chat import ChatRequest, Decision
from topics.plan import Plan, Step


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
    """Who can answer: the expert that is named, or else the default and all others that take what the request carries.

    Raises ``UnknownExpert``, or ``BadRequest`` that tells whom it asked too much of, and what.
    """
    if named := wants(request, fleet):
        if lacking := lacks(request, named):
            raise BadRequest(f"{named.name} does not take {' and '.join(lacking)}")
        return (named,)
    if found := tuple(each for each in (fleet.fallback, *fleet.active) if not lacks(request, each)):
        return found
    raise BadRequest(f"no expert of this fleet takes {' and '.join(_carried(request))}")


def decide(request: ChatRequest, fleet: Fleet) -> Decision:
    """Choose an expert; raises what ``candidates`` raises."""
    able = candidates(request, fleet)
    if wants(request, fleet):
        return _decision(able[0], "named", 1.0, f"the request names {able[0].name}")
    for rule in fleet.rules:
        expert = fleet.find(rule.expert)
        if expert in able and rule.matches(request.question):
            return _decision(expert, rule.route, 0.8, f"a pattern of route {rule.route} matches")
    return _decision(able[0], "default", 0.5, "no rule matches")


def alternatives(request: ChatRequest, fleet: Fleet, decision: Decision) -> tuple[str, ...]:
    """Who takes over, in order, should the chosen expert be out of reach: nobody from one that was named."""
    if wants(request, fleet):
        return ()
    rule = next((each for each in fleet.rules if each.route == decision.route_name), None)
    found = [fleet.find(name) for name in (rule.then if rule else fleet.then)]
    able = [each.name for each in found if each and each.name != decision.model_id and not lacks(request, each)]
    return tuple(dict.fromkeys(able))


def plan(decision: Decision) -> Plan:
    """The stages that a decision leads to."""
    return Plan(steps=(Step(stage="caller", expert=decision.model_id),))


def _decision(expert: Expert, route: str, confidence: float, reasoning: str) -> Decision:
    return Decision(model_id=expert.name, route_name=route, complexity="moderate", confidence=confidence, reasoning=reasoning)


def _carried(request: ChatRequest) -> tuple[str, ...]:
    return tuple(name for name, there in (("images", request.has_image), ("tools", bool(request.tools))) if there)
