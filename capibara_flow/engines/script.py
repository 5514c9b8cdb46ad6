"""Scripts for the scripted engine: which answer belongs to which question. Pure; the server is in ``scripted``."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from capibara_flow.settings import SettingsError
from topics.message import Part


class Call(Part):
    """A tool call of a scripted answer; *arguments* as a table, or as text that need not be JSON."""

    name: str
    arguments: dict[str, Any] | str = Field(default_factory=dict)
    id: str | None = None

    @property
    def text(self) -> str:
        """The arguments as they go over the wire."""
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments, ensure_ascii=False)


class Fail(Part):
    """How an answer goes wrong: *before* it with an HTTP status, or after so many tokens of the whole answer.

    A continuation that begins at or behind that token does not fail. *times* limits how often it happens; 0 is always.
    """

    before: int | None = Field(default=None, ge=400, le=599)
    broken_after: int | None = Field(default=None, ge=0)
    error_after: int | None = Field(default=None, ge=0)
    hang_after: int | None = Field(default=None, ge=0)
    times: int = Field(default=0, ge=0)


class Answer(Part):
    """One scripted answer and when it is given: *when* is searched in the last user message, case ignored.

    It is a *text*, or *tokens*, or it *counts* from 1 to the number that the first group of *when* finds. Its tokens
    come *delay_ms* apart, or *burst* of them at once after as many delays, as engines do that guess several tokens ahead.
    """

    when: str | None = None
    after_tool: bool = False
    text: str = ""
    tokens: tuple[str, ...] = ()
    counts: bool = False
    delay_ms: float = Field(default=0, ge=0)
    burst: int = Field(default=1, ge=1)
    reasoning: str = ""
    tool_calls: tuple[Call, ...] = ()
    fail: Fail = Fail()
    finish_reason: str | None = None

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if bool(self.text) + bool(self.tokens) + self.counts > 1:
            raise ValueError("give one of text, tokens and counts")
        try:
            pattern = re.compile(self.when or "")
        except re.error as error:
            raise ValueError(f"when: {self.when!r} is not a regular expression: {error}") from error
        if self.counts and not pattern.groups:
            raise ValueError("when: an answer that counts needs a group that finds the number")
        return self

    def spoken(self, question: str) -> tuple[str, ...]:
        """The answer to *question* in tokens; a text is cut before its blanks, as a language model does it."""
        if self.counts:
            return tuple(f"{number} " for number in range(1, self._number(question) + 1))
        return self.tokens or tuple(re.findall(r"\s*\S+|\s+", self.text))

    def _number(self, question: str) -> int:
        found = re.search(self.when or "", question, re.IGNORECASE)
        digits = (found and found[1]) or ""
        return min(int(digits[:9]), MOST_COUNTED) if digits.isdecimal() else 0

    def due(self, index: int) -> float:
        """When the token *index* of what is said is due, in seconds after the beginning: a burst comes with its first token."""
        return (index - index % self.burst + 1) * self.delay_ms / 1000

    @property
    def ends_with(self) -> str:
        """Its finish reason when nothing cuts it short."""
        return self.finish_reason or ("tool_calls" if self.tool_calls else "stop")

    def fits(self, question: str, after_tool: bool) -> bool:
        """Whether this is the answer to *question*, asked anew or with a tool's result."""
        return self.after_tool == after_tool and re.search(self.when or "", question, re.IGNORECASE) is not None


#: Where an answer stops that counts.
MOST_COUNTED = 10_000
DEFAULT = Answer(text="This is a scripted answer: no language model was asked.")


class Script(Part):
    """Scripted answers, the first that fits is given, and the *default* when none does."""

    answer: tuple[Answer, ...] = ()
    default: Answer = DEFAULT

    def choose(self, messages: list[dict[str, Any]]) -> Answer:
        """The answer to a conversation in OpenAI's form."""
        question = question_of(messages)
        asked = [each for each in messages if each.get("role") != "assistant"]
        after_tool = bool(asked) and asked[-1].get("role") == "tool"
        return next((each for each in self.answer if each.fits(question, after_tool)), self.default)


def load_script(path: Path | str) -> Script:
    """Read a script; raises ``SettingsError`` naming file, key and reason."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        return Script.model_validate(_as_tuples(raw))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'script'}: {each['msg']}" for each in error.errors())
        raise SettingsError(f"{path}: {problems}") from error
    except ValueError as error:
        raise SettingsError(f"{path}: not TOML: {error}") from error


def question_of(messages: list[dict[str, Any]]) -> str:
    """The words of the last user message."""
    return next((text_of(each) for each in reversed(messages) if each.get("role") == "user"), "")


def text_of(message: dict[str, Any]) -> str:
    """The words of a message in OpenAI's form."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def rest_of(tokens: tuple[str, ...], prefix: str) -> tuple[int, tuple[str, ...]]:
    """Where *prefix* ends in *tokens*, as an index, and what is left; all is left when the answer begins otherwise."""
    if not "".join(tokens).startswith(prefix):
        return 0, tokens
    left = len(prefix)
    for index, token in enumerate(tokens):
        if left < len(token):
            return index, (token[left:], *tokens[index + 1 :])
        left -= len(token)
    return len(tokens), ()


def _as_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_as_tuples(each) for each in value)
    return {key: _as_tuples(each) for key, each in value.items()} if isinstance(value, dict) else value
