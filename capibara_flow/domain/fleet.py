"""The fleet: which experts there are, how they are reached, and which rules send a question to them."""

import re
from collections.abc import Iterator
from typing import Literal, Self, get_args

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from topics.chat import Complexity, Sampling
from topics.message import Part
from topics.streams import subject_token

#: Model names that leave the choice to the router: no expert may bear them.
AUTO = frozenset({"", "auto", "capibara"})
#: A path of keys and indices in a fleet, as ``pydantic`` tells where something is wrong.
Where = tuple[str | int, ...]
Dialect = Literal["openai", "llama_server", "vllm", "llama_completion", "ollama"]


class Timeouts(Part):
    """How long a caller waits for an engine, in seconds."""

    connect_seconds: float = Field(default=5, gt=0)
    first_token_seconds: float = Field(default=120, gt=0)
    between_tokens_seconds: float = Field(default=30, gt=0)


class Price(Part):
    """What a million tokens cost, in the operator's own currency."""

    prompt: float = Field(default=0, ge=0)
    completion: float = Field(default=0, ge=0)


class Launch(Part):
    """How an expert host starts the engine of an expert on its own machine; *args* are the engine's own options, as it names them.

    *memory_mib* is what it takes once loaded, *load_seconds* what its loading is known to take; both are measured anew at each load.
    """

    engine: Literal["xllamacpp", "llama_server", "vllm"]
    args: dict[str, str | int | float | bool] = {}
    profiles: tuple[Literal["low_latency_batching", "optimized_kv_cache"], ...] = ()
    memory_mib: int | None = Field(default=None, ge=1)
    load_seconds: float | None = Field(default=None, gt=0)


class Expert(Part):
    """One served model: *model* is its name at the engine, *urls* are replicas of it.

    An expert with *launch* and without *urls* is started by an expert host when it is first asked for. *priority* (the higher, the
    dearer) breaks ties between experts and is evicted last; *consensus_weight* is its voice in a vote.
    """

    name: str = Field(min_length=1, max_length=64)
    dialect: Dialect = "openai"
    urls: tuple[str, ...] = ()
    launch: Launch | None = None
    weights: str | None = None
    hardware: str | None = None
    context_length: int | None = Field(default=None, ge=1)
    languages: tuple[str, ...] = ()
    priority: int = Field(default=1, ge=0, le=100)
    price: Price = Price()
    consensus_weight: float = Field(default=0.75, ge=0, le=1)
    model: str | None = None
    api_key: str | None = None
    aliases: tuple[str, ...] = ()
    active: bool = True
    scripted: bool = False
    modalities: tuple[Literal["text", "image"], ...] = ("text",)
    tools: bool = False
    template: str = "chatml"
    concurrency: int = Field(default=4, ge=1, le=1024)
    sampling: Sampling = Sampling()
    timeouts: Timeouts = Timeouts()

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if not self.urls and self.launch is None:
            raise ValueError("give urls where it is served, or launch for an expert host to start it")
        if self.launch and not self.weights:
            raise ValueError("launch needs weights: a GGUF file, or a model's folder or name for vLLM")
        return self

    @field_validator("urls")
    @classmethod
    def _are_http(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            # Not repeated in the message: it would put the password into the log.
            if "@" in re.split(r"[/?#]", url.partition("//")[2] or url, maxsplit=1)[0]:
                raise ValueError("an address with a user or password in it: give the secret as api_key instead")
            if not re.match(r"https?://[^/\s]+", url):
                raise ValueError("an address that does not begin with http:// or https://")  # not repeated: it may hold a secret
        return tuple(url.rstrip("/") for url in urls)


class Rule(Part):
    """Questions that match any of the *patterns* (regular expressions, case ignored) go to *expert*.

    Should it be out of reach, the experts of *then* take over, in this order.
    """

    route: str
    expert: str
    then: tuple[str, ...] = Field(default=(), max_length=16)
    patterns: tuple[str, ...] = Field(min_length=1)

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns

    def matches(self, question: str) -> bool:
        """Whether this rule speaks for *question*."""
        return any(re.search(pattern, question, re.IGNORECASE) for pattern in self.patterns)


class Choice(Part):
    """Who answers: the first of *experts*; the others take over, in this order, or all of them answer and are put to the *vote*."""

    experts: tuple[str, ...] = Field(min_length=1, max_length=17)
    vote: bool = False

    @model_validator(mode="after")
    def _is_a_choice(self) -> Self:
        if len(set(self.experts)) < len(self.experts):
            raise ValueError("the same expert twice")
        if self.vote and len(self.experts) < 2:
            raise ValueError("a consensus needs two experts at least")
        return self

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: object) -> object:
        """A name, a list of names, or ``{consensus = [names]}``, as people write it."""
        match given:
            case str():
                return {"experts": [given]}
            case list():
                return {"experts": given}
            case {"consensus": experts, **rest} if not rest:
                return {"experts": experts, "vote": True}
        return given


class Row(Part):
    """The experts of one route, by the complexity of the question; a row may also be one choice for all four."""

    simple: Choice
    moderate: Choice
    complex: Choice
    very_complex: Choice

    @model_validator(mode="before")
    @classmethod
    def _same_for_all(cls, given: object) -> object:
        if isinstance(given, str | list):
            return dict.fromkeys(get_args(Complexity), given)
        return given

    def at(self, complexity: Complexity) -> Choice:
        """The choice for *complexity*."""
        return {"simple": self.simple, "moderate": self.moderate, "complex": self.complex, "very_complex": self.very_complex}[complexity]


class Fleet(Part):
    """All experts; *default* answers what no rule claims (the first active expert when it is left out), *then* takes over from it.

    *policy* tells who answers a route, by complexity; the row ``default`` is for questions that belong to none. *routes* is the file
    of the routes, seen from the fleet's own; the seven that come along when it is left out.
    """

    experts: tuple[Expert, ...] = Field(min_length=1)
    rules: tuple[Rule, ...] = ()
    policy: dict[str, Row] = {}
    routes: str | None = None
    default: str | None = None
    then: tuple[str, ...] = Field(default=(), max_length=16)

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        if problems := [*self._unfit_names(), *self._unknown_names()]:
            raise ValidationError.from_exception_data("Fleet", problems)
        if not any(expert.active for expert in self.experts):
            raise ValueError("no expert is active")
        return self

    def _unfit_names(self) -> Iterator[InitErrorDetails]:
        """Names that stand for several experts, or for none."""
        names: set[str] = set()
        tokens: set[str] = set()
        for number, expert in enumerate(self.experts):
            double = expert.name in names
            for name in dict.fromkeys((expert.name, *expert.aliases)):
                where = ("experts", number, "name" if name == expert.name else "aliases")
                if name in names:
                    yield _problem(where, f"the same name for several experts: {name}")
                if name.lower() in AUTO:
                    yield _problem(where, f"reserved for the router's own choice: {name!r}")
                names.add(name)
            token = subject_token(expert.name)
            if token in tokens and not double:
                yield _problem(("experts", number, "name"), f"names that differ only in punctuation: {token}")
            tokens.add(token)

    def _unknown_names(self) -> Iterator[InitErrorDetails]:
        """Experts that are meant to answer, but are not in the fleet."""
        known = {name for expert in self.experts for name in (expert.name, *expert.aliases)}
        for where, name in self._mentioned():
            if name not in known:
                yield _problem(where, f"names the unknown expert {name!r}; known are: {', '.join(sorted(known))}")

    def _mentioned(self) -> Iterator[tuple[Where, str]]:
        """Who is named outside of the list of experts, and where."""
        if self.default is not None:
            yield ("default",), self.default
        yield from ((("then", number), name) for number, name in enumerate(self.then))
        for at, rule in enumerate(self.rules):
            yield ("rules", at, "expert"), rule.expert
            yield from ((("rules", at, "then", number), name) for number, name in enumerate(rule.then))
        for route, row in self.policy.items():
            for level, choice in row:
                yield from ((("policy", route, level, "experts", number), name) for number, name in enumerate(choice.experts))

    def find(self, name: str) -> Expert | None:
        """The active expert of that name or alias."""
        return next((each for each in self.active if name == each.name or name in each.aliases), None)

    @property
    def active(self) -> tuple[Expert, ...]:
        """The experts that may be called."""
        return tuple(expert for expert in self.experts if expert.active)

    @property
    def fallback(self) -> Expert:
        """Who answers what no rule claims."""
        return (self.find(self.default) if self.default else None) or self.active[0]


def _problem(where: Where, reason: str) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("fleet", "{reason}", {"reason": reason}), loc=where, input=None)
