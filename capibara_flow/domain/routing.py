"""Which expert answers: the one that was named, else the first rule that matches, else the default."""

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


def able(request: ChatRequest, expert: Expert) -> bool:
    """Whether *expert* can take what the request carries."""
    return "image" in expert.modalities or not request.has_image


def decide(request: ChatRequest, fleet: Fleet) -> Decision:
    """Choose an expert; raises ``UnknownExpert``, or ``BadRequest`` when nobody can see the image."""
    if named := wants(request, fleet):
        if not able(request, named):
            raise BadRequest(f"{named.name} does not take images")
        return _decision(named, "named", 1.0, f"the request names {named.name}")
    for rule in fleet.rules:
        expert = fleet.find(rule.expert)
        if expert and able(request, expert) and rule.matches(request.question):
            return _decision(expert, rule.route, 0.8, f"a pattern of route {rule.route} matches")
    candidates = [fleet.fallback, *fleet.active]
    if expert := next((each for each in candidates if able(request, each)), None):
        return _decision(expert, "default", 0.5, "no rule matches")
    raise BadRequest("no expert of this fleet takes images")


def plan(decision: Decision) -> Plan:
    """The stages that a decision leads to."""
    return Plan(steps=(Step(stage="caller", expert=decision.model_id),))


def _decision(expert: Expert, route: str, confidence: float, reasoning: str) -> Decision:
    return Decision(model_id=expert.name, route_name=route, complexity="moderate", confidence=confidence, reasoning=reasoning)
