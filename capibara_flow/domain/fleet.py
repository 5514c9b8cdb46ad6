"""The fleet: which experts there are, how they are reached, and which rules send a question to them."""

import re
from collections import Counter
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from topics.chat import Sampling
from topics.message import Part
from topics.streams import subject_token

#: Model names that leave the choice to the router: no expert may bear them.
AUTO = frozenset({"", "auto", "capibara"})
Dialect = Literal["openai", "llama_server", "vllm", "llama_completion", "ollama"]


class Timeouts(Part):
    """How long a caller waits for an engine, in seconds."""

    connect_seconds: float = Field(default=5, gt=0)
    first_token_seconds: float = Field(default=120, gt=0)
    between_tokens_seconds: float = Field(default=30, gt=0)


class Expert(Part):
    """One served model: *model* is its name at the engine, *urls* are replicas of it."""

    name: str = Field(min_length=1, max_length=64)
    dialect: Dialect = "openai"
    urls: tuple[str, ...] = Field(min_length=1)
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

    @field_validator("urls")
    @classmethod
    def _are_http(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            # Not repeated in the message: it would put the password into the log.
            if "@" in re.split(r"[/?#]", url.partition("//")[2] or url, maxsplit=1)[0]:
                raise ValueError("an address with a user or password in it: give the secret as api_key instead")
            if not re.match(r"https?://[^/\s]+", url):
                raise ValueError(f"{url!r} is not an http:// or https:// address")
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


class Fleet(Part):
    """All experts; *default* answers what no rule claims (the first active expert when it is left out), *then* takes over from it."""

    experts: tuple[Expert, ...] = Field(min_length=1)
    rules: tuple[Rule, ...] = ()
    default: str | None = None
    then: tuple[str, ...] = Field(default=(), max_length=16)

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        known = Counter(name for expert in self.experts for name in {expert.name, *expert.aliases})
        if doubles := sorted(name for name, count in known.items() if count > 1):
            raise ValueError(f"the same name for several experts: {', '.join(doubles)}")
        if reserved := sorted(name for name in known if name.lower() in AUTO):
            raise ValueError(f"reserved for the router's own choice: {', '.join(map(repr, reserved))}")
        tokens = Counter(subject_token(expert.name) for expert in self.experts)
        if doubles := sorted(token for token, count in tokens.items() if count > 1):
            raise ValueError(f"names that differ only in punctuation: {', '.join(doubles)}")
        named = [("default", self.default), *(("then", name) for name in self.then)]
        named += [(f"rule {rule.route}", name) for rule in self.rules for name in (rule.expert, *rule.then)]
        for user, name in named:
            if name is not None and name not in known:
                raise ValueError(f"{user} names the unknown expert {name!r}; known are: {', '.join(sorted(known))}")
        if not any(expert.active for expert in self.experts):
            raise ValueError("no expert is active")
        return self

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
