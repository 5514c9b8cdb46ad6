"""Folding a turn's output events into the answer that they amount to."""

from dataclasses import dataclass, field

from topics.chat import FunctionCall, ToolCall
from topics.output import Cited, Done, Failed, Ingested, Output, Reset, Routed, SourcesFound, Token, ToolCalled, Usage


@dataclass
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass
class Collected:
    """An answer in the making; complete when ``done`` or ``failed`` is there."""

    routed: Routed | None = None
    sources: SourcesFound | None = None
    citations: Cited | None = None
    ingested: Ingested | None = None
    usage: Usage | None = None
    done: Done | None = None
    failed: Failed | None = None
    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _calls: dict[int, _Call] = field(default_factory=dict)

    def add(self, output: Output) -> None:
        """Take the next event."""
        match output:
            case Token(text=text, reasoning=reasoning):
                self._text.append(text)
                self._reasoning.append(reasoning or "")
            case ToolCalled():
                self._add_call(output)
            case Reset():
                self._text, self._reasoning, self._calls = [], [], {}
            case Routed():
                self.routed = output
            case SourcesFound():
                self.sources = output
            case Cited():
                self.citations = output
            case Ingested():
                self.ingested = output
            case Usage():
                self.usage = output
            case Done():
                self.done = output
            case Failed():
                self.failed = output

    def _add_call(self, fragment: ToolCalled) -> None:
        call = self._calls.setdefault(fragment.index, _Call())
        call.id = fragment.id or call.id
        call.name = fragment.name or call.name
        call.arguments.append(fragment.arguments)

    @property
    def text(self) -> str:
        """The answer's words."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """The words before the answer, where the expert shows them."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """What the expert wants called, in the order of its indices."""
        return tuple(
            ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments="".join(call.arguments)))
            for _, call in sorted(self._calls.items())
        )
